"""A number that is not finite ends a run before anything is stepped with it or saved: with its name, what gave it, and a dump.

A dump is a torch file of tensors and plain values, which vla_rl.replay does again: the settings, the adapter and the value head as
they were, and what was computed on (KINDS).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.learning.rollout_buffer import Minibatch
from vla_rl.learning.trainer_state import Trainer
from vla_rl.run.checkpoint import checkpoint_number, list_checkpoints, save_torch
from vla_rl.types import NonFiniteError, Observation, PolicyInputs

OF_ENVIRONMENT = "No learning rate changes that: mend the environment, then resume."
DUMP_VERSION = 1
# what a dump is of, and what else is in it
KINDS = {
    "act": "observation",  # a decision
    "values": "inputs",  # of states that were reached
    "update": "minibatch, train_actor, steps",  # a loss or a gradient
    "critic": "hidden, returns",  # of a pass of the value head alone
    "step": "episode, actions, chunk, steps",  # of an environment: all actions of the episode, the last decision's, how many of it
}


def check_finite(name: str, value: Tensor | np.ndarray) -> None:
    """Raises NonFiniteError if a value, of any shape, has a NaN or an infinity."""
    if not torch.isfinite(torch.as_tensor(value)).all():
        raise NonFiniteError(f"{name} is not finite")


class FiniteGuard:
    """Around what a trainer computes: a NonFiniteError leaves with the iteration, its source, a dump and the way out."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    @contextmanager
    def acting(self, observation: Observation) -> Iterator[None]:
        """Around a decision. The observation is finite, also after a reset, so that what is not is of the weights."""
        if not np.isfinite(observation.proprio).all():
            error = NonFiniteError("an observation after a reset is not finite")
            raise self.explained(error, "the environment gave it", OF_ENVIRONMENT, None, {})
        try:
            yield
        except NonFiniteError as error:
            arrays = {"images": observation.images, "proprio": observation.proprio}
            shown = {name: torch.from_numpy(array) for name, array in arrays.items()} | {
                "instructions": list(observation.instructions),
                "transformed": observation.image_transform is not None,
            }
            raise self.of_weights(error, "act", observation=shown) from None

    @contextmanager
    def valuing(self, inputs: PolicyInputs) -> Iterator[None]:
        """Around the values of states that were reached."""
        try:
            yield
        except NonFiniteError as error:
            raise self.of_weights(error, "values", inputs=as_values(inputs)) from None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            raise self.of_weights(error, None) from None

    def check_step(
        self,
        envs: Sequence[int],
        chunks: np.ndarray,
        rewards: Tensor,
        proprio: np.ndarray,
        steps: Tensor,
        begun: np.ndarray,
    ) -> None:
        """What some environments gave for their chunks of actions.

        Args:
            envs: N, which environments.
            chunks: float32 [N, C, 7].
            rewards, proprio, steps, begun: [N], [N, 8], int64 [N], bool [N]: where an environment has begun another episode, the
                one before cannot be told any more.

        Raises:
            NonFiniteError: a reward or an observation is not.
        """
        for name, value in {"a reward": rewards, "an observation": torch.from_numpy(proprio)}.items():
            finite = torch.isfinite(value).reshape(len(envs), -1).all(dim=1)
            finite |= torch.from_numpy(self.trainer.envs.dropped[envs])  # which have done nothing
            if finite.all():
                continue
            row = finite.tolist().index(False)
            source, kind, evidence = f"environment {envs[row]} gave it", None, {}
            if not begun[row]:
                state = self.trainer.envs.episode_states()[envs[row]]
                episode, actions = state["episode"], torch.tensor(state["actions"])
                start = f"initial state {episode['initial_state']}, seed {episode['seed']}"
                source += f" in task {episode['task_id']} ({start}) after {len(actions)} actions"
                kind, chunk = "step", torch.from_numpy(chunks[row])
                evidence = {"episode": episode, "actions": actions, "chunk": chunk, "steps": int(steps[row])}
            raise self.explained(NonFiniteError(f"{name} is not finite"), source, OF_ENVIRONMENT, kind, evidence)

    @contextmanager
    def updating(self, minibatch: Minibatch, train_actor: bool, steps: Tensor) -> Iterator[None]:
        """Around an optimizer step: a minibatch's losses and gradients."""
        try:
            yield
        except NonFiniteError as error:
            rows = as_values(minibatch.to(torch.device("cpu")))
            raise self.of_step(
                error, rows, "update", minibatch=rows, train_actor=train_actor, steps=steps.cpu()
            ) from None

    @contextmanager
    def fitting(self, hidden: Tensor, returns: Tensor) -> Iterator[None]:
        """Around a step of the value head alone."""
        try:
            yield
        except NonFiniteError as error:
            rows = {"hidden": hidden.cpu(), "returns": returns.cpu()}
            raise self.of_step(error, rows, "critic", **rows) from None

    def check_weights(self) -> None:
        """What an iteration trained is finite, so what is saved of it is.

        Raises:
            NonFiniteError: it is not; the state before the iteration is the one to go on with.
        """
        for side, parameters in {
            "adapter": self.trainer.actor_parameters,
            "value head": self.trainer.critic_parameters,
        }.items():
            total = sum((parameter.detach().abs().sum() for parameter in parameters), start=torch.zeros(()))
            try:
                check_finite(f"a weight of the {side}", total)
            except NonFiniteError as error:
                raise self.explained(error, "an optimizer step made it", lower(side == "adapter"), None, {}) from None

    def of_weights(self, error: NonFiniteError, kind: str | None, **evidence: Any) -> NonFiniteError:
        """The policy or the value head gave it for something finite. The state of now is not worth a checkpoint, then."""
        trainer = self.trainer
        if trainer.iteration == 0:
            source, way_out = (
                "no step was taken yet",
                "Begin with another policy.checkpoint, policy.adapter or policy.dtype.",
            )
        else:
            saved = list_checkpoints(trainer.logger.folder / "checkpoints")
            before = [folder for folder in saved if checkpoint_number(folder) < trainer.iteration]
            source = f"the weights after iteration {trainer.iteration} give it"
            sound = f"--resume {before[-1]}" if before else "No checkpoint is older than these weights: start again"
            way_out = f"{sound}, with a lower actor.learning_rate or critic.learning_rate."
        found = self.explained(error, source, way_out, kind, evidence)
        found.of_saved_weights = trainer.iteration > 0
        return found

    def of_step(self, error: NonFiniteError, values: dict[str, Any], kind: str, **evidence: Any) -> NonFiniteError:
        """A loss or gradient: of its weights, of its rows, or of what is computed with them."""
        weights = [*self.trainer.actor_parameters, *self.trainer.critic_parameters]
        wrong = [name for name, value in values.items() if not is_finite(value)]
        if not all(is_finite(parameter.detach()) for parameter in weights):
            source = "an optimizer step of this iteration made weights that are not finite"
        elif wrong:
            source = f"of its rows, {', '.join(wrong)} is not finite"
        else:
            source = "its rows and the weights are finite"
        return self.explained(error, source, lower(not str(error).startswith("critic")), kind, evidence)

    def explained(
        self, error: NonFiniteError, source: str, way_out: str, kind: str | None, evidence: dict[str, Any]
    ) -> NonFiniteError:
        iteration = self.trainer.iteration + 1
        dumped = f" Do it again: python -m vla_rl.replay {self.dump(str(error), kind, evidence)}" if kind else ""
        return NonFiniteError(f"{error} in iteration {iteration}: {source}. {way_out}{dumped}")

    def dump(self, name: str, kind: str, evidence: dict[str, Any]) -> Path | str:
        """Writes it into the run's folder; of several processes each writes its own."""
        trainer = self.trainer
        which = f"_rank{trainer.ranks.rank}" if trainer.ranks.size > 1 else ""
        path = trainer.logger.folder / f"nonfinite_iteration_{trainer.iteration + 1:06d}{which}.pt"
        head = trainer.value_head
        settings = trainer.config.model_dump(mode="json")
        settings["rollout"] |= {"temperature": trainer.temperature, "final_temperature": None}
        values = {
            "version": DUMP_VERSION,
            "name": name,
            "kind": kind,
            "settings": settings,
            "adapter": [parameter.detach().cpu() for parameter in trainer.actor_parameters],
            "value_head": {name: tensor.cpu() for name, tensor in head.state_dict().items()}
            if head is not None
            else None,
            **evidence,
        }
        try:
            save_torch(values, path)
        except OSError as problem:  # a full disk must not hide what went wrong
            return f"DUMP (which could not be written: {problem})"
        return path


def lower(actor: bool) -> str:
    return f"Resume with a lower {'actor' if actor else 'critic'}.learning_rate."


def is_finite(value: Any) -> bool:
    """Whether a tensor, or each in a dict, is; what is no tensor of floats is."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def as_values(rows: Minibatch | PolicyInputs) -> dict[str, Any]:
    """Fields by name, as vla_rl.run.files.load_torch reads them."""
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    if "inputs" in values:
        values["inputs"] = as_values(values["inputs"])
    if "instructions" in values:
        values["instructions"] = list(values["instructions"])
    return values
