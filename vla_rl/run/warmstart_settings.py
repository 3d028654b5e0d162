"""Settings of a warm start: a token head that learns what an L1 head does (vla_rl.warmstart)."""

from __future__ import annotations

from pydantic import Field, ValidationError, model_validator

from vla_rl.run.section import Mode, Section
from vla_rl.run.settings import (
    Config,
    EnvConfig,
    EvalConfig,
    LoggingConfig,
    OptimizerConfig,
    PolicyConfig,
    ProgressConfig,
    RolloutConfig,
    RunConfig,
    RunFolderConfig,
    check_micro_batches,
)


class CollectionConfig(Section):
    """The episodes of an iteration, whose decisions the L1 head labels."""

    episodes: int = Field(
        32, ge=1, le=10**6, description="episodes an iteration, each played to its end; tasks take turns"
    )
    num_envs: int = Field(8, ge=1, le=2**16, description="environments that play them")
    mixed_iterations: int = Field(
        4,
        ge=1,
        le=10**9,
        description="iterations in which the share of decisions that the token head takes rises from 0, in equal steps; after them it "
        "takes all; the L1 head labels all of them",
    )
    noise: float = Field(
        0.05,
        ge=0,
        le=1e6,
        description="standard deviation of a push added to the arm's translation in a decision of the L1 head, the same in all of its "
        "steps (1 is 5 cm a step)",
    )
    temperature: float = Field(1.0, gt=0, le=1000, description="of the token head's decisions, which are sampled")
    keep: int = Field(
        20_000,
        ge=1,
        le=10**7,
        description="newest labelled decisions that are learned from, in whole iterations (150 kB an image at 224 px)",
    )


class WarmstartTrainingConfig(Section):
    """Cross-entropy of the token head on the L1 head's actions, and when it ends."""

    iterations: int = Field(20, ge=1, le=10**9, description="at most")
    margin: float = Field(
        0.05,
        ge=0,
        le=1,
        description="ends when the token head's success, in the first of eval.modes, is at most this much below the L1 head's",
    )
    steps_per_iteration: int = Field(200, ge=1, le=10**9, description="optimizer steps, on all decisions that are kept")
    batch_size: int = Field(64, ge=1, le=10**7, description="decisions of an optimizer step")
    micro_batch_size: int = Field(
        16, ge=1, le=10**7, description="decisions of a forward; gradients add up to the batch's"
    )
    train_head: bool = Field(
        True, description="train the LM head's rows of the 256 action ids too, which an L1 checkpoint never trained"
    )
    label_sigma: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="standard deviation in bins that a label is spread over, but for the gripper's; 0: one token",
    )
    warmup_steps: int = Field(
        0, ge=0, le=10**9, description="steps in which the learning rate rises linearly to its full size"
    )
    final_learning_rate_fraction: float = Field(
        1.0, ge=0, le=1, description="of the learning rate, at the last step of all iterations; it falls as a cosine"
    )
    keep_checkpoints: int = Field(
        1, ge=1, le=10**6, description="newest checkpoints that are kept; one is written each iteration"
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of all iterations."""
        return self.iterations * self.steps_per_iteration


class WarmstartOptimizerConfig(OptimizerConfig):
    """AdamW of the LoRA weights and the token rows."""

    learning_rate: float = Field(5e-4, gt=0, le=100, description="step size")  # openvla-oft vla-scripts/finetune.py


class WarmstartEvalConfig(EvalConfig):
    """Success of both heads from the benchmark's fixed states; the L1 head's once, since it never changes."""

    interval: int = Field(
        1, ge=1, le=10**9, description="iterations between evaluations; the last one is evaluated too"
    )
    modes: list[Mode] = Field(
        ["greedy"], min_length=1, description="of the token head; the L1 head has one action for an observation"
    )
    video: bool = Field(False, description="has no meaning here")


class WarmstartLoggingConfig(ProgressConfig):
    """What a run leaves behind."""

    wandb_project: str = Field("openvla-warmstart", description="project")


class WarmstartConfig(Section):
    """All settings of a warm start, checked against each other. policy.head has no meaning here: both heads act."""

    run: RunFolderConfig = Field(default_factory=RunFolderConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    env: EnvConfig = Field(default_factory=EnvConfig)
    collection: CollectionConfig = Field(default_factory=CollectionConfig)
    training: WarmstartTrainingConfig = Field(default_factory=WarmstartTrainingConfig)
    optimizer: WarmstartOptimizerConfig = Field(default_factory=WarmstartOptimizerConfig)
    eval: WarmstartEvalConfig = Field(default_factory=WarmstartEvalConfig)
    logging: WarmstartLoggingConfig = Field(default_factory=WarmstartLoggingConfig)

    @model_validator(mode="after")
    def check_combinations(self) -> WarmstartConfig:
        training = self.training
        check_micro_batches(training.batch_size, training.micro_batch_size)
        try:
            self.as_config()
        except ValidationError as error:
            raise ValueError(str(error.errors()[0].get("ctx", {}).get("error") or error.errors()[0]["msg"])) from None
        return self

    def as_config(self) -> Config:
        """What makes the policy with its L1 head and the simulators, as for a training."""
        policy = {"head": "l1"}
        if self.run.device == "cuda" and self.policy.gradient_checkpointing == "auto":
            policy["gradient_checkpointing"] = "full"  # nothing is measured first, as in fine-tuning
        return Config(
            run=RunConfig(**self.run.model_dump()),
            policy=self.policy.model_copy(update=policy),
            env=self.env,
            rollout=RolloutConfig(num_envs=self.collection.num_envs, temperature=self.collection.temperature),
            eval=EvalConfig(**self.eval.model_dump()),
            logging=LoggingConfig(**self.logging.model_dump()),
        )
