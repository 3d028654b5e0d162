"""What sections of settings are made of: strictness, values written in several ways, and what each command's begin with.

Not here: the sections (vla_rl.run.settings, sft_settings, warmstart_settings).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from vla_rl.run.task_suites import NUM_FIXED_STATES


def parse_indices(value: Any) -> Any:
    """Turns "0-3,7" into [0, 1, 2, 3, 7]; leaves anything that is not such a string to the type check."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str) or value == "random":
        return value
    indices: list[int] = []
    for part in value.split(","):
        written = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part.strip(), re.ASCII)
        first, last = (int(written[1]), int(written[2] or written[1])) if written else (1, 0)
        if last < first:
            raise ValueError(f"{value!r:.60} is not a list of indices; write it like 0-39,45")
        indices += range(first, last + 1)
    return indices


Indices = Annotated[list[Annotated[int, Field(ge=0, lt=1000)]], BeforeValidator(parse_indices)]
StateIndex = Annotated[int, Field(ge=0, lt=NUM_FIXED_STATES)]
States = Annotated[list[StateIndex], Field(min_length=1), BeforeValidator(parse_indices)]
ActionDims = Annotated[list[Annotated[int, Field(ge=0, lt=7)]], Field(min_length=1), BeforeValidator(parse_indices)]

Mode = Literal["greedy", "mean_action", "sampled"]  # how a token is taken of its distribution (OpenVLAPolicy.act)
TEMPERED = {"mean_action", "sampled"}  # modes to which the temperature matters


def check_name(name: Any) -> Any:
    """Names one folder on a disk, in a shell and in Weights & Biases; spaces, = and all letters do."""
    legal = r"(?!-|\.{1,2}$)(?=.*\S)[^/\x00-\x1f\x7f-\x9f\u2028\u2029]+"
    if isinstance(name, str) and not (re.fullmatch(legal, name) and len(name.encode()) <= 255):
        raise ValueError(
            f"{name!r:.60} cannot name a folder; give one name such as task0_seed1, of at most 255 bytes, without slash or "
            "control character and not beginning with a dash (run.output_dir says where the folder is made)"
        )
    return name


RunName = Annotated[str | None, BeforeValidator(check_name)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def check_yaml_value(cls, value: Any, info: ValidationInfo) -> Any:
        """A section whose lines are all commented out is null in YAML; a bool would pass for the numbers 0 and 1."""
        kind = cls.model_fields[info.field_name].annotation
        if value is None and isinstance(kind, type) and issubclass(kind, Section):
            return {}
        if isinstance(value, bool) and kind is not bool:
            word = str(value).lower()
            raise ValueError(f"expected another value than {word} (YAML reads yes, no, on and off so; quote the word)")
        return value


class RunFolderConfig(Section):
    """Where and how a run goes on, whatever it trains."""

    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything that is drawn")
    device: Literal["cpu", "cuda"] = Field("cuda", description="where the policy runs")
    torch_threads: int | None = Field(
        None, ge=1, le=4096, description="CPU threads of torch; null leaves torch's own choice"
    )
    output_dir: str = Field("runs", description="each run makes its own folder in this one")
    grace_s: float = Field(
        30.0, ge=1, le=86400, description="seconds from a signal that asks for an end until it is over, saved or not"
    )
    name: RunName = Field(None, description="of the run's folder; null makes one of what is trained, seed and time")


class ProgressConfig(Section):
    """What any run shows and sends."""

    progress: bool = Field(True, description="tqdm bars")
    tensorboard: bool = Field(False, description="write TensorBoard files to the run folder")
    wandb: bool = Field(False, description="log to Weights & Biases")
    wandb_project: str = Field("openvla-ppo", description="project")
    wandb_entity: str | None = Field(None, description="user or team; null takes your default")
    wandb_mode: Literal["online", "offline"] = Field(
        "online", description="offline writes to the run folder; no network"
    )
