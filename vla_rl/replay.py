"""Does again what gave a number that is not finite, from the dump that the run left (vla_rl.learning.finite).

    python -m vla_rl.replay runs/NAME/nonfinite_iteration_000012.pt [section.key=value ...]

Says whether it is not finite again, and which module's output or which weight's gradient was the first: exit status 0 if it came
again, 1 if not. Settings change what is done again, such as policy.dtype=float32 or run.device=cpu.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from OpenVLA_PPO import OpenVLAPPO
from vla_rl.learning import losses
from vla_rl.learning.finite import DUMP_VERSION, KINDS, check_finite
from vla_rl.learning.parts import build_policy, build_value_head
from vla_rl.learning.rollout_buffer import Minibatch
from vla_rl.reports.metrics import SilentLogger
from vla_rl.run.command_line import end_of, parse
from vla_rl.run.failures import one_line, say
from vla_rl.run.files import load_torch
from vla_rl.run.load_settings import config_from_dict, merge
from vla_rl.run.settings import Config, ConfigError
from vla_rl.simulation.vector_env import make_vector_env
from vla_rl.types import NonFiniteError, Observation, PolicyInputs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vla_rl.replay",
        description="Does again what gave a number that is not finite.",
        allow_abbrev=False,
    )
    parser.add_argument("dump", type=Path, metavar="DUMP", help="RUN/nonfinite_iteration_N.pt")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting of the run")
    args = parse(parser, argv)
    return end_of(lambda: replay(args.dump, args.overrides))


def replay(path: Path, overrides: Sequence[str]) -> int:
    dump = read_dump(path)
    changes = ["distributed.shard=false", "policy.compile=false", "policy.adapter=null", *overrides]
    config = config_from_dict(merge(dump["settings"], changes), str(path))
    say(f"{path}: {dump['name']}, {dump['kind']} ({KINDS[dump['kind']]})")
    try:
        (replay_step if dump["kind"] == "step" else replay_network)(config, dump)
    except NonFiniteError as error:
        say(f"again: {error}")
        return 0
    say("not again: all that was computed is finite")
    return 1


def read_dump(path: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: it is not a dump of this version.
    """
    try:
        dump = load_torch(path)
    except Exception as error:  # of pickle, zip files and torch: there is no common kind
        raise ConfigError(
            f"{path} cannot be read as a dump ({one_line(error)}); expected RUN/nonfinite_iteration_N.pt"
        ) from None
    kind = dump.get("kind") if isinstance(dump, dict) and dump.get("version") == DUMP_VERSION else None
    if kind not in KINDS or not {"name", "settings", "adapter", "value_head", *KINDS[kind].split(", ")} <= dump.keys():
        raise ConfigError(f"{path} is no dump of this version ({DUMP_VERSION}); replay it with the code that wrote it")
    return dump


def replay_network(config: Config, dump: dict[str, Any]) -> None:
    """
    Raises:
        NonFiniteError: it came again.
        ConfigError: the dump's weights are not of the settings' model.
    """
    policy = build_policy(config)
    head = build_value_head(config, policy.hidden_size)
    weights = policy.trainable_parameters()
    if [weight.shape for weight in weights] != [tensor.shape for tensor in dump["adapter"]]:
        raise ConfigError(
            f"policy.checkpoint={config.policy.checkpoint} has other LoRA weights than the dump; give the run's"
        )
    with torch.no_grad():
        for weight, tensor in zip(weights, dump["adapter"], strict=True):
            weight.copy_(tensor)
    if head is not None:
        head.load_state_dict(dump["value_head"])
    idle = SimpleNamespace(num_envs=config.rollout.num_envs)  # nothing is played
    with tempfile.TemporaryDirectory() as folder, naming_modules(policy.network):
        trainer = OpenVLAPPO(config, policy, head, idle, None, SilentLogger(Path(folder)))
        compute(trainer, dump)


def compute(trainer: OpenVLAPPO, dump: dict[str, Any]) -> None:
    """What the dump is of, with its checks; without the optimizers' steps."""
    kind, policy = dump["kind"], trainer.policy
    if kind == "act":
        shown = dict(dump["observation"])
        transform = policy.processor.image_transform if shown.pop("transformed") else None
        arrays = shown["images"].numpy(), shown["proprio"].numpy()
        output = policy.act(
            Observation(*arrays, tuple(shown["instructions"]), transform),
            temperature=trainer.config.rollout.temperature,
        )
        check_finite("a log-probability", output.logprobs)
        check_finite("an action", output.actions)
        with torch.no_grad():
            check_finite("a value", trainer.predict_values(trainer.hidden_of(output)))
    elif kind == "values":
        with torch.no_grad():
            check_finite("a value", trainer.predict_values(policy.compute_hidden(as_inputs(dump["inputs"]))))
    elif kind == "update":
        rows = dump["minibatch"]
        minibatch = Minibatch(**rows | {"inputs": as_inputs(rows["inputs"])})
        metrics = trainer.minibatch_gradients(minibatch, dump["train_actor"], True, dump["steps"])
        for name, value in metrics.items():
            check_finite(name, torch.tensor(value))
        check_gradients(trainer)
    else:
        device = trainer.device
        loss = losses.value_loss(trainer.value_head(dump["hidden"].to(device)), dump["returns"].to(device))
        check_finite("critic/value_loss", loss)
        loss.backward()
        check_gradients(trainer)


def check_gradients(trainer: OpenVLAPPO) -> None:
    networks = {"policy": trainer.policy.network} | ({"value_head": trainer.value_head} if trainer.value_head else {})
    for kind, network in networks.items():
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                check_finite(f"the gradient of {kind}.{name}", parameter.grad)


def as_inputs(values: dict[str, Any]) -> PolicyInputs:
    return PolicyInputs(**values | {"instructions": tuple(values["instructions"])})


@contextmanager
def naming_modules(network: torch.nn.Module) -> Iterator[None]:
    """A NonFiniteError tells which module's output was the first that is not finite, if one was."""
    first: list[str] = []

    def look(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not first and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                first.append(name)

        return hook

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.callback(module.register_forward_hook(look(name or "the network")).remove)
        try:
            yield
        except NonFiniteError as error:
            where = f"; the first output that is not: {first[0]}" if first else "; every module's output is finite"
            raise NonFiniteError(f"{error}{where}") from None


def replay_step(config: Config, dump: dict[str, Any]) -> None:
    """
    Raises:
        NonFiniteError: it came again.
    """
    before = dump["actions"][: len(dump["actions"]) - dump["steps"]].numpy()
    with closing(make_vector_env(config, 1)) as envs:
        envs.restore_episodes([{"episode": dump["episode"], "actions": before}])
        obs, rewards, *_ = envs.step(dump["chunk"].numpy()[None].astype(np.float32))
    check_finite("a reward", rewards)
    check_finite("an observation", obs["proprio"])


if __name__ == "__main__":
    sys.exit(main())
