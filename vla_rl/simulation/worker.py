"""The environments of one worker process: what it does with a command, and what it gives back.

Not here: the processes and their pipes (vla_rl.simulation.vector_env), the environments (vla_rl.simulation.libero_env). No torch.

M places of a worker, K images, S side of the model's image.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, MultiBinary
from gymnasium.vector.utils import batch_space, create_empty_array

from vla_rl.simulation.libero_env import LiberoEnv, Simulators, as_dict
from vla_rl.types import Episode, ImageTransform


@dataclasses.dataclass(frozen=True)
class Shown:
    """What of a LiberoEnv's observation a worker passes on, done there and once an image.

    Args:
        image_transform: gives the policy's images in place of the rendered ones.
    """

    image_transform: ImageTransform | None = None

    def space(self, space: Dict) -> Dict:
        """Of LiberoEnv's observation space: the arrays, without the instruction, which is a text."""
        rendered, size = space["images"], getattr(self.image_transform, "size", None)
        shown = {"images": rendered, "proprio": space["proprio"]}
        if self.image_transform is not None:
            shown["images"] = Box(0, 255, (rendered.shape[0], size, size, 3), np.uint8)
        return Dict(shown)

    def __call__(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        shown = {"images": obs["images"], "proprio": obs["proprio"]}
        if self.image_transform is not None:
            shown["images"] = np.stack([self.image_transform(image) for image in obs["images"]])
        return shown


EPISODE_ROW = ("there is one", *(field.name for field in dataclasses.fields(Episode)))  # a worker's actions are arrays


def episode_row(episode: Episode | Mapping[str, Any]) -> list[int]:
    return [1, *(-1 if value is None else value for value in as_dict(episode).values())]


def episode_of(row: np.ndarray) -> Episode | None:
    """The episode of an `episode_row`, int64; None of zeros."""
    there, *values = row.tolist()
    return Episode(*(None if value == -1 else value for value in values)) if there else None


class Worker(gymnasium.Env):
    """The environments of one process, as one with arrays [M, ...] for everything."""

    def __init__(
        self,
        env_kwargs: dict[str, Any],
        indices: list[int],
        places: int,
        simulators: Simulators,
        shown: Shown = Shown(),
    ):
        self.envs = {i: LiberoEnv(**env_kwargs, index=i, simulators=simulators) for i in indices}
        single = LiberoEnv(**env_kwargs)
        arrays = shown.space(single.observation_space)
        self.observation_space = batch_space(arrays, places)
        actions: Box = batch_space(single.action_space, places)
        episodes = Box(-1, np.iinfo(np.int64).max, (places, len(EPISODE_ROW)), np.int64)
        self.action_space = Dict(actions=actions, active=MultiBinary(places), episodes=episodes)
        self.observations = create_empty_array(arrays, places)
        self.simulators, self.shown = simulators, shown
        self.places = places
        self.env_kwargs, self.recording = env_kwargs, None

    def reset(self, *, seed: int | None = None, options: dict[str, Any]) -> tuple[dict, dict]:
        """options: {"starts": {i: arguments of LiberoEnv.reset, or {"state": of LiberoEnv.restore_episode}}}."""
        instructions = {}
        for place, (i, env) in enumerate(self.envs.items()):
            start = options["starts"].get(i)
            if start is not None:
                obs = env.restore_episode(start["state"]) if "state" in start else env.reset(**start)[0]
                instructions[i] = obs["instruction"]
                self.keep(place, obs)
        return self.observations, {"instructions": tuple(instructions.items())}  # gymnasium takes a dict apart

    def step(self, action: dict[str, np.ndarray]) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        rewards, steps = np.zeros(self.places), np.zeros(self.places, np.int64)
        terminated, truncated, success, begun = np.zeros((4, self.places), dtype=bool)
        instructions, ended = [], []
        for place, (i, env) in enumerate(self.envs.items()):
            if action["active"][place]:
                obs, rewards[place], terminated[place], truncated[place], info = env.step(action["actions"][place])
                steps[place], success[place] = info["steps"], info["success"]
                following = episode_of(action["episodes"][place])
                if following is not None and (terminated[place] or truncated[place]):
                    if truncated[place]:
                        ended.append((i, self.shown(obs)))
                    obs, _ = env.reset(options={"episode": following})
                    instructions.append((i, obs["instruction"]))
                    begun[place] = True
                self.keep(place, obs)
        infos = {"steps": steps, "success": success, "begun": begun}
        infos |= {"instructions": tuple(instructions), "truncated": tuple(ended)}  # gymnasium takes a dict apart
        return self.observations, rewards, terminated, truncated, infos

    def keep(self, place: int, obs: dict[str, Any]) -> None:
        for name, array in self.shown(obs).items():
            self.observations[name][place] = array

    def episode_states(self) -> dict[int, dict[str, Any] | None]:
        return {i: env.episode_state() for i, env in self.envs.items()}

    def replay(self) -> tuple[np.ndarray, bool, str] | None:
        """LiberoEnv.replay of `recording`, which the vector has set: an episode and its actions, or None. In an environment of
        its own: the others stay where they are."""
        if self.recording is None:
            return None
        return LiberoEnv(**self.env_kwargs, simulators=self.simulators).replay(*self.recording)

    def renderer_name(self) -> str | None:
        """See vla_rl.simulation.rendering.Renderer.name; None before the first episode."""
        renderers = (shared.simulator.renderer for shared in self.simulators.kept.values())
        return next((renderer.name() for renderer in renderers if renderer is not None), None)

    def close(self) -> None:
        self.simulators.close()


@dataclasses.dataclass(frozen=True)
class MakeWorker:
    """Builds a worker; called in the main process too (for the spaces), hence the check of the process."""

    env_kwargs: dict[str, Any]
    indices: list[int]
    places: int
    simulators_per_worker: int
    cache_gb: float
    shown: Shown
    told: str | None
    parent_pid: int

    def __call__(self) -> Worker:
        if os.getpid() != self.parent_pid:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
        simulators = Simulators(self.simulators_per_worker, self.cache_gb, self.told)
        return Worker(self.env_kwargs, self.indices, self.places, simulators, self.shown)
