"""Settings of supervised fine-tuning, as vla_rl.run.settings has those of reinforcement learning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vla_rl.run.section import Section
from vla_rl.run.settings import (
    OptimizerConfig,
    PolicyConfig,
    ProgressConfig,
    RunFolderConfig,
    check_decoder,
    check_micro_batches,
)


class DataConfig(Section):
    """Demonstrations in LIBERO's HDF5 layout."""

    files: list[str] = Field(min_length=1, description="HDF5 files, or folders of them")
    name: str = Field(
        description="of the data's statistics in the result, the policy.unnorm_key of later runs, like libero_spatial_no_noops"
    )
    filter_no_ops: bool = Field(
        True, description="leave out steps that move neither arm nor gripper, as OpenVLA's data do"
    )
    validation_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of each task's episodes that is held out; at least one unless 0"
    )
    augment: bool = Field(True, description="OpenVLA's random crops and colours; goes with policy.center_crop=true")


class SupervisedConfig(Section):
    """What is learned of demonstrations: their action tokens, or their actions through an L1 head."""

    head: Literal["tokens", "l1"] = Field(
        "tokens",
        description="tokens: cross-entropy on action tokens; l1: mean absolute error of normalised actions through OpenVLA-OFT's L1 head, "
        "which is trained in full, from the checkpoint's if it has one (to evaluate; for RL: vla_rl.warmstart)",
    )
    method: Literal["lora", "full"] = Field("lora", description="train policy.lora on frozen weights, or every weight")
    steps: int = Field(50_000, ge=1, le=10**9, description="optimizer steps")
    batch_size: int = Field(16, ge=1, le=10**7, description="samples of an optimizer step")
    micro_batch_size: int = Field(
        16, ge=1, le=10**7, description="samples of a forward; gradients add up to the batch's"
    )
    warmup_steps: int = Field(
        0, ge=0, le=10**9, description="steps in which the learning rate rises linearly to its full size"
    )
    final_learning_rate_fraction: float = Field(
        1.0, ge=0, le=1, description="of the learning rate, at the last step; it falls as a cosine (1: constant)"
    )
    label_sigma: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="standard deviation in bins of the Gaussian that a label is spread over, but for the gripper's; 0: one token",
    )
    value_coef: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of an auxiliary loss: the last prompt token's hidden state tells, by a linear map that is thrown away, "
        "value_discount ** steps to success; a critic that reads it has more to go by",
    )
    value_discount: float = Field(0.98, gt=0, lt=1, description="per simulator step, of the auxiliary loss")
    evaluation_interval: int = Field(
        1000, ge=1, le=10**9, description="steps between measurements on the held-out episodes"
    )
    evaluation_samples: int = Field(
        1024, ge=1, le=10**9, description="held-out samples that are measured, evenly spaced"
    )
    checkpoint_interval: int = Field(1000, ge=1, le=10**9, description="steps between checkpoints")
    keep_checkpoints: int = Field(1, ge=1, le=10**6, description="newest checkpoints that are kept")


class SftOptimizerConfig(OptimizerConfig):
    """AdamW of what is trained."""

    learning_rate: float = Field(5e-4, gt=0, le=100, description="step size")  # openvla vla-scripts/finetune.py


class SftLoggingConfig(ProgressConfig):
    """What a run leaves behind."""

    interval: int = Field(50, ge=1, le=10**9, description="steps between lines of metrics.jsonl")
    wandb_project: str = Field("openvla-sft", description="project")


class SftConfig(Section):
    """All settings of supervised fine-tuning, checked against each other."""

    run: RunFolderConfig = Field(default_factory=RunFolderConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    data: DataConfig
    training: SupervisedConfig = Field(default_factory=SupervisedConfig)
    optimizer: SftOptimizerConfig = Field(default_factory=SftOptimizerConfig)
    logging: SftLoggingConfig = Field(default_factory=SftLoggingConfig)

    @model_validator(mode="after")
    def check_combinations(self) -> SftConfig:
        check_decoder(self.policy)
        training = self.training
        if self.policy.adapter is not None:
            raise ValueError(
                f"policy.adapter={self.policy.adapter}: fine-tuning begins with a checkpoint alone; merge the two with "
                "python -m vla_rl.export and give the result as policy.checkpoint"
            )
        if self.policy.head != "tokens":
            raise ValueError("policy.head=l1 says what acts; what is trained is training.head=l1")
        if training.head == "l1" and self.policy.decoder != "parallel":
            raise ValueError(f"training.head=l1 with policy.decoder={self.policy.decoder}; set policy.decoder=parallel")
        if training.head == "l1" and training.label_sigma > 0:
            raise ValueError(
                f"training.head=l1 with training.label_sigma={training.label_sigma:g}, which spreads token labels; set "
                "training.label_sigma=0"
            )
        check_micro_batches(training.batch_size, training.micro_batch_size)
        if self.data.augment != self.policy.center_crop:
            raise ValueError(
                f"data.augment={str(self.data.augment).lower()} with policy.center_crop="
                f"{str(self.policy.center_crop).lower()}; random crops in training need the centre crop afterwards, and it them"
            )
        if training.method == "full" and self.policy.dtype != "float32":
            raise ValueError(
                f"training.method=full with policy.dtype={self.policy.dtype}, which rounds small steps away; "
                "set policy.dtype=float32 or training.method=lora"
            )
        if training.method == "full" and self.policy.quantization != "none":
            raise ValueError(
                f"training.method=full with policy.quantization={self.policy.quantization}, whose weights cannot be trained; "
                "set policy.quantization=none or training.method=lora"
            )
        return self
