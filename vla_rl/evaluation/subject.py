"""What is evaluated: the checkpoint of a run, or a model with or without an adapter, and the settings that it wants.

Nothing is written. Not here: playing it (vla_rl.evaluation.play), flags (vla_rl.evaluate).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla_rl.evaluation.protocol import digest
from vla_rl.learning.parts import build_policy, build_value_head
from vla_rl.model.adapter import lora_of
from vla_rl.model.checkpoint_folder import local_names
from vla_rl.model.find_checkpoint import check_checkpoint
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.trained_as import USE, l1_head_of, read_trained_as
from vla_rl.model.value_head import ValueHead
from vla_rl.preflight.needs import check_device, check_policy, check_rendering
from vla_rl.run import task_suites
from vla_rl.run.checkpoint import find_adapter, find_saved, load_tensors, loading
from vla_rl.run.load_settings import absolute, config_from_dict, expand, merge, put_paths, read_yaml, set_key
from vla_rl.run.run_folder import changed_settings
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.task_suites import PERTURBATIONS, PERTURBED, num_fixed_states, suite_size

log = logging.getLogger(__name__)

# what trained_as.json may tell -> the settings
TRAINED_AS = {
    **{name: [f"policy.{name}"] for name in USE},
    "head": ["policy.head"],
    "image_size": ["env.image_size"],
    "render": ["env.render", "eval.render"],
}
# of a run's policy, what may be otherwise in its evaluation
FREE = tuple(
    f"policy.{name}"
    for name in (
        "checkpoint",
        "adapter",
        "as_trained",
        "gradient_checkpointing",
        "compile",
        "dtype",
        "quantization",
        "unnorm_key",
    )
)
EVALUATION_TEMPERATURE = 1.0  # VLA-RL (arXiv:2505.18719) evaluates at 1 what it samples at 1.5


@dataclass(frozen=True)
class Subject:
    """A policy that can be built, and the settings of its evaluation."""

    name: str
    config: Config  # whose policy.adapter is the very folder, in peft's format, of what is evaluated
    value_head: Path | None  # safetensors file
    run: Path | None = None  # folder of the run that it is of
    trained_on: tuple[str, list[int], list[int]] | None = None  # suite, tasks, fixed states; None of random placements

    @property
    def adapter(self) -> Path | None:
        return None if self.config.policy.adapter is None else Path(self.config.policy.adapter)

    @property
    def temperature(self) -> float:
        """Of the modes TEMPERED."""
        return self.config.eval.temperature or EVALUATION_TEMPERATURE


# ---------------------------------------------------------------------------------------------------------------- a run


def of_run(run: str, overrides: Sequence[str], flags: Mapping[str, Any]) -> Subject:
    """A run's newest checkpoint, or the one that is named, with the run's own settings; with policy.adapter that in its place.

    Args:
        run: runs/NAME, runs/NAME/checkpoints/iteration-NNNNNN or runs/NAME/checkpoints/best.
        overrides, flags: see vla_rl.run.load_settings.load_config; other tasks, states, places and devices, not another policy.

    Raises:
        ConfigError: no run, no checkpoint in it, a torn one; or what is asked for does not go with it.
    """
    folder = find_saved(Path(expand(run, "--run")), "--run ")
    source = f"{folder}/config.yaml"
    recorded = read_yaml(source)
    put_paths(recorded, absolute)
    before = config_from_dict(recorded, source)
    trained_on = None
    if before.env.initial_states != "random":
        trained_on = before.env.task_suite, before.env.task_ids, before.env.initial_states
        set_key(recorded, "env.initial_states", "random")  # what of it is evaluated is refused below
    suite = flags.get("env.task_suite") or before.env.task_suite
    if suite != before.env.task_suite:  # all of it, by its own protocol, in the units that the run was trained in
        set_key(recorded, "policy.unnorm_key", before.unnorm_key())
        set_key(recorded, "env.task_suite", suite)
        set_key(recorded, "env.task_ids", list(range(suite_size(suite)[0])))
        set_key(recorded, "eval.states", list(range(num_fixed_states(suite))))
        set_key(recorded, "eval.max_steps", None)
    if before.run.device == "cuda" and not torch.cuda.is_available():
        put_on_cpu(recorded)
    adapter = asked_adapter(overrides, flags)
    merge(recorded, list(overrides), dict(flags))
    set_key(recorded, "policy.adapter", str(folder / "adapter" if adapter is None else adapter))
    config = config_from_dict(recorded, source)
    changed = changed_settings(before, config, ("policy.", "value_head.", "algorithm.estimator"), FREE)
    if changed:
        raise ConfigError(f"--run {run}: {', '.join(changed)} cannot differ from the run's; it is another policy then")
    if adapter is not None:
        for name, value in lora_of(adapter, check_checkpoint(config.policy.checkpoint)).items():
            set_key(recorded, f"policy.lora.{name}", value)
        config = config_from_dict(recorded, source)
    head = folder / "value_head.safetensors"
    home = folder.parent.parent if folder.parent.name == "checkpoints" else None
    name = folder.name if home is None else f"{home.name}/{folder.name}"
    name += "" if adapter is None else f"+{label(adapter)}"
    return Subject(name, config, head if head.exists() and adapter is None else None, home, trained_on)


def asked_adapter(overrides: Sequence[str], flags: Mapping[str, Any]) -> Path | None:
    """The folder of policy.adapter, where it was given now.

    Raises:
        ConfigError: there are no LoRA weights, or they are torn.
    """
    given = merge({}, list(overrides), dict(flags)).get("policy", {}).get("adapter")
    return find_adapter(Path(given), "policy.adapter=") if isinstance(given, str) else None


def label(adapter: Path) -> str:
    """Of its folder; of a checkpoint's the run and the checkpoint."""
    parts = adapter.parts
    return f"{parts[-4]}-{parts[-2]}" if parts[-3:-2] == ("checkpoints",) and parts[-1] == "adapter" else parts[-1]


# -------------------------------------------------------------------------------------------------------------- a model


def of_checkpoint(checkpoint: str, adapter: str | None, overrides: Sequence[str], flags: Mapping[str, Any]) -> Subject:
    """A model, used as it was trained as far as its folder tells (trained_as.json), else as OpenVLA-OFT.

    Args:
        checkpoint: see policy.checkpoint.
        adapter: see policy.adapter; its rank, alpha and layers are read there.

    Raises:
        ConfigError: a setting is wrong, or the model or adapter is missing or torn.
    """
    values: dict[str, Any] = {}
    merge(values, flags={"policy.checkpoint": checkpoint})
    if flags.get("env.task_suite"):
        set_key(values, "env.task_suite", flags["env.task_suite"])
        set_key(values, "eval.states", list(range(num_fixed_states(flags["env.task_suite"]))))
    model = check_checkpoint(config_from_dict(values, "--checkpoint").policy.checkpoint)
    trained = {name: value for name, value in (read_trained_as(model) or {}).items() if value is not None}
    for name, keys in TRAINED_AS.items():
        for key in keys if name in trained else []:
            set_key(values, key, trained[name])
    if adapter is None and (l1_head := l1_head_of(model, local_names(model))) is not None:
        set_key(values, "policy.head", "l1")
        log.info("%s has an L1 action head (%s), through which it acts (policy.head=l1)", checkpoint, l1_head)
    if not torch.cuda.is_available():
        put_on_cpu(values)
    flags = {**flags, "policy.adapter": adapter}
    folder = asked_adapter(overrides, flags)
    if folder is not None:
        for name, value in lora_of(folder, model).items():
            set_key(values, f"policy.lora.{name}", value)
    merge(values, list(overrides), flags)
    if folder is not None:
        set_key(values, "policy.adapter", str(folder))
    config = config_from_dict(values, "the command line")
    if not trained and checkpoint != "tiny-openvla-random":
        policy = config.policy
        log.warning(
            "%s does not tell how it was trained; taken as decoder=%s chunk_size=%d num_images=%d use_proprio=%s center_crop=%s "
            "(vanilla OpenVLA: policy.decoder=autoregressive policy.chunk_size=1; OpenVLA-OFT's L1 checkpoints: policy.num_images=2 "
            "policy.use_proprio=true)",
            *(checkpoint, policy.decoder, policy.chunk_size, policy.num_images, policy.use_proprio, policy.center_crop),
        )
    name = checkpoint.rstrip("/").rpartition("/")[2] + (f"+{label(folder)}" if folder is not None else "")
    return Subject(name, config, None)


def put_on_cpu(values: dict[str, Any]) -> None:
    """Where torch finds no GPU; run.device and policy.dtype may still be given."""
    for key, value in (("run.device", "cpu"), ("policy.dtype", "float32")):
        set_key(values, key, value)


# ------------------------------------------------------------------------------------------------------------- building


def check_subject(subject: Subject, suites: Sequence[str]) -> None:
    """All that can be told before anything heavy begins.

    Args:
        suites: that are to be evaluated.

    Raises:
        ConfigError: what the settings need is not there, or a run would be tested on what it trained on.
    """
    config = subject.config
    check_unseen(subject, suites)
    check_device(config)
    check_rendering()
    check_policy(config, resumed=subject.run is not None)


def check_unseen(subject: Subject, suites: Sequence[str]) -> None:
    """Raises ConfigError where fixed states that the run trained on are to be evaluated."""
    if subject.trained_on is None:
        return
    suite, tasks, states = subject.trained_on
    shared = sorted(set(states) & set(subject.config.eval.states))
    same_tasks = sorted(set(tasks) & set(subject.config.env.task_ids))
    if suite in suites and shared and same_tasks:
        unseen = [state for state in range(num_fixed_states(suite)) if state not in states]
        way_out = f"--states {','.join(map(str, unseen))}" if unseen else "other tasks"
        raise ConfigError(
            f"the run trained on {suite} task {', '.join(map(str, same_tasks))} from the fixed states {shared}, which would be "
            f"evaluated: the policy would be tested on what it trained on; evaluate {way_out}"
        )


def build_subject(subject: Subject) -> tuple[OpenVLAPolicy, ValueHead | None]:
    """The policy with its LoRA weights, and the value head if there is one.

    Raises:
        ConfigError: the adapter or value head is torn or of another base.
    """
    policy = build_policy(subject.config, adapted=subject.adapter is not None)
    head = None
    if subject.value_head is not None and (head := build_value_head(subject.config, policy.hidden_size)) is not None:
        with loading(subject.value_head):
            head.load_state_dict(load_tensors(subject.value_head))
    return policy, head


def fingerprint(policy: OpenVLAPolicy) -> str:
    """Hex digits, equal for equal base models, decoders and adapters; the adapter's values count, of a base 64 of each tensor."""
    return digest(policy.fingerprint(), {} if policy.adapter is None else policy.adapter_tensors())


def check_suite(suite: str) -> str:
    """Raises ConfigError for what is no task suite that can be played, with what may have been meant."""
    try:
        return task_suites.check_suite(suite)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def family_of(base: str) -> list[str]:
    """A suite and its four perturbations by LIBERO-PRO.

    Raises:
        ConfigError: there is no such suite, or it has none.
    """
    check_suite(base)
    if base not in PERTURBED:
        suffixes = ", _".join(PERTURBATIONS)
        raise ConfigError(
            f"--suite-family {base} has no perturbed suites (_{suffixes}); choose one of {', '.join(PERTURBED)}"
        )
    return [base, *(f"{base}_{kind}" for kind in PERTURBATIONS)]
