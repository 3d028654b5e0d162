"""A small environment and a small policy behind the real interfaces, so that tests run the real trainer in seconds.

N environments, C steps in a chunk, A = 7C action tokens, D hidden size, V action bins.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from safetensors.torch import load_file, save_file
from torch import nn

from vla_rl.model.sampling import draw_noise, mean_index, pick
from vla_rl.types import ACTION_DIM, ActionEvaluation, Episode, Observation, PolicyInputs, PolicyOutput

CHUNK = 2
BINS = 4  # of each action dimension: two negative, two positive


def last_of_each(*overrides: str) -> list[str]:
    """Of settings like "run.seed=1" that are given twice, which is a mistake, the later one."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


class FakeEnv(gymnasium.Env):
    """Move to the side that the picture's colour shows: red is left, blue is right.

    Success (reward 1, terminated) after `needed` right moves. max_steps simulator steps end an episode (truncated), so with
    three moves and three needed chance is (1/2)^3 = 12.5 %. The move is the sign of the first number
    of the first action of a chunk.
    """

    def __init__(self, index: int = 0, max_steps: int = 3 * CHUNK, needed: int = 3):
        self.index, self.max_steps, self.needed = index, max_steps, needed
        self.observation_space = spaces.Dict(
            images=spaces.Box(0, 255, (1, 8, 8, 3), np.uint8),
            proprio=spaces.Box(-np.inf, np.inf, (8,), np.float32),
            instruction=spaces.Text(100),
        )
        self.action_space = spaces.Box(-1, 1, (CHUNK, ACTION_DIM), np.float32)
        self.episode: Episode | None = None
        self.targets, self.steps, self.right, self.ended, self.actions = np.zeros(100, int), 0, 0, False, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = options["episodes"][self.index]
        state = -1 if self.episode.initial_state is None else self.episode.initial_state
        self.targets = np.random.default_rng([self.episode.seed, state + 1]).integers(2, size=100)
        self.steps, self.right, self.ended, self.actions = 0, 0, False, []
        return self.observe(), {}

    def observe(self):
        images = np.zeros((1, 8, 8, 3), np.uint8)
        images[..., 2 if self.targets[self.steps // CHUNK] else 0] = 255
        instruction = f"do task {self.episode.task_id}" if self.episode else ""
        return {"images": images, "proprio": np.full(8, self.steps, np.float32), "instruction": instruction}

    def step(self, actions):
        if self.ended:
            return self.observe(), 0.0, *self.ended, {"steps": 0, "success": False}
        self.actions.append(np.array(actions, dtype=np.float32))
        self.right += (actions[0, 0] > 0) == bool(self.targets[self.steps // CHUNK])
        executed = min(CHUNK, self.max_steps - self.steps)
        self.steps += executed
        success = self.right == self.needed
        truncated = self.steps >= self.max_steps and not success
        self.ended = (success, truncated) if success or truncated else False
        return self.observe(), float(success), success, truncated, {"steps": executed, "success": success}

    def episode_state(self):
        if self.episode is None:
            return None
        actions = np.array(self.actions, dtype=np.float32).reshape(-1, ACTION_DIM)
        return {"episode": vars(self.episode), "actions": actions}

    def restore_episodes(self, states):
        state = states[self.index]
        obs, _ = self.reset(options={"episodes": {self.index: Episode(**state["episode"])}})
        for actions in state["actions"].reshape(-1, CHUNK, ACTION_DIM):
            obs, *_ = self.step(actions)
        return obs

    def replay(self, episode, actions):
        self.reset(options={"episodes": {self.index: episode}})
        frames, success = [self.observe()["images"][0]], False
        for number, action in enumerate(actions):
            if number % CHUNK == 0:
                decision = np.stack([*actions[number : number + CHUNK], *[action] * CHUNK][:CHUNK])
                obs, _, success, *_ = self.step(decision)
            frames.append(obs["images"][0])
        return np.stack(frames), bool(success), obs["instruction"]


class Resting:
    """An environment that does not take part in a step."""

    def __init__(self, env):
        self.env = env

    def step(self, actions):
        return self.env.unwrapped.observe(), 0.0, False, False, {"steps": 0, "success": False}


class FakeVectorEnv(SyncVectorEnv):
    """Lets an environment idle after its end, or begin the next episode in the same step; SyncVectorEnv demands a reset."""

    under_way = None  # what step_wait will return
    on_wait = None

    @cached_property
    def dropped(self):
        return np.zeros(self.num_envs, bool)

    def replace_dead(self):
        pass

    def reset(self, **kwargs):
        assert self.under_way is None, "reset while a step is under way"
        for index, obs in enumerate(self._env_obs):  # those for which others may have left no episode
            self._env_obs[index] = self.envs[index].unwrapped.observe() if obs is None else obs
        return super().reset(**kwargs)

    def step(self, actions):
        self.step_async(actions, np.ones(self.num_envs, dtype=bool))
        return self.step_wait()

    def step_async(self, actions, active, episodes=None):
        assert self.under_way is None, "a second step while one is under way"
        before = self.envs
        self._autoreset_envs[:] = False
        self.envs = [env if playing else Resting(env) for env, playing in zip(before, active, strict=True)]
        try:
            obs, rewards, terminated, truncated, info = super().step(actions)
        finally:
            self.envs = before
        begun = [i for i in episodes or {} if terminated[i] or truncated[i]]
        info["begun"] = np.isin(np.arange(self.num_envs), begun)
        reached = obs | {"images": obs["images"].copy(), "proprio": obs["proprio"].copy()}
        for i in begun:
            first, _ = self.envs[i].reset(options={"episodes": episodes})
            self._env_obs[i] = first  # which a reset of others shows, too
            for name in ("images", "proprio"):
                obs[name][i] = first[name]
            obs["instruction"] = (*obs["instruction"][:i], first["instruction"], *obs["instruction"][i + 1 :])
        if truncated[begun].any():
            info["truncated_obs"] = reached
        self.under_way = obs, rewards, terminated, truncated, info

    def step_wait(self):
        result, self.under_way = self.under_way, None
        return result

    def replay(self, recordings):
        assert self.under_way is None, "a replay while a step is under way"
        for episode, actions in recordings:
            yield FakeEnv(0, self.envs[0].unwrapped.max_steps, self.envs[0].unwrapped.needed).replay(episode, actions)

    def episode_states(self):
        assert self.under_way is None, "a question while a step is under way"
        return list(self.call("episode_state"))

    def restore_episodes(self, states):
        observations = self.call("restore_episodes", states)
        batch = {name: np.stack([obs[name] for obs in observations]) for name in ("images", "proprio")}
        return batch | {"instruction": tuple(obs["instruction"] for obs in observations)}


class FlakyVectorEnv(FakeVectorEnv):
    """Loses environments, as their worker would be: of the n-th step or reset those that `breaks` names."""

    breaks: dict[tuple[str, int], list[int]]  # ("step" or "reset", n from 0 on) -> environments
    counts: dict[str, int]

    def lose(self, what):
        number = self.counts[what] = self.counts.get(what, -1) + 1
        return [i for i in self.breaks.get((what, number), []) if self.envs[i].unwrapped.episode is not None]

    def step_wait(self):
        result = obs, rewards, terminated, truncated, info = super().step_wait()
        for i in self.lose("step"):
            rewards[i], terminated[i], truncated[i], info["begun"][i], self.dropped[i] = 0, False, False, False, True
            info["steps"][i], obs["proprio"][i], obs["images"][i] = 0, np.nan, 255
        return result

    def reset(self, *, options):
        mask = np.array(options["reset_mask"])
        self.dropped[mask] = False
        result = super().reset(options=options)
        for i in self.lose("reset"):
            self.dropped[i] = not mask[i]
        return result


def make_flaky(envs: FakeVectorEnv, breaks: dict[tuple[str, int], list[int]]) -> None:
    """Turns a vector into one that loses environments."""
    envs.__class__ = FlakyVectorEnv
    envs.breaks, envs.counts = breaks, {}


def make_envs(num_envs: int, **kwargs) -> FakeVectorEnv:
    fns = [lambda i=i: FakeEnv(i, **kwargs) for i in range(num_envs)]
    return FakeVectorEnv(fns, autoreset_mode=AutoresetMode.DISABLED)


class FakePolicy:
    """A linear layer on the mean colour, and a trainable one on top: base weights frozen, "adapter" trainable."""

    hidden_size = 16
    chunk_size = CHUNK
    gradient_checkpointing = "none"

    def __init__(self, seed: int = 0, gives_hidden: bool = True):
        generator = torch.Generator().manual_seed(seed)
        self.gives_hidden = gives_hidden
        self.base = nn.Parameter(torch.randn(3, self.hidden_size, generator=generator), requires_grad=False)
        self.head = nn.Parameter(
            0.1 * torch.randn(self.hidden_size, CHUNK * ACTION_DIM * BINS, generator=generator), requires_grad=False
        )
        self.adapter = nn.Parameter(torch.zeros(self.hidden_size, self.hidden_size))
        self.rows: list[int] = []  # of each forward of the network

    def forward(self, inputs: PolicyInputs, adapter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows.append(len(inputs))
        features = torch.tanh(inputs.images.float().div(255).mean(dim=(1, 2, 3)) @ self.base)  # [N, D]
        hidden = features + features @ adapter
        return (hidden @ self.head).unflatten(-1, (-1, BINS)), hidden  # [N, A, V], [N, D]

    @property
    def forwards(self) -> int:
        return len(self.rows)

    def prepare(self, obs: Observation) -> PolicyInputs:
        return PolicyInputs(torch.from_numpy(obs.images), torch.from_numpy(obs.proprio), obs.instructions)

    def act(self, obs, *, mode="sampled", temperature=1.0, generator=None) -> PolicyOutput:
        inputs = self.prepare(obs)
        with torch.no_grad():
            logits, hidden = self.forward(inputs, self.adapter)
        logprobs = (logits / temperature).log_softmax(-1)
        tokens = {
            "greedy": lambda: logits.argmax(-1),
            "mean_action": lambda: mean_index(logprobs.exp()),
            "sampled": lambda: pick(logprobs.exp(), draw_noise(logprobs.shape[1:], generator, len(logprobs))),
        }[mode]()
        actions = (tokens.float() - (BINS - 1) / 2) / (BINS / 2)  # -0.75 .. 0.75
        return PolicyOutput(
            action_tokens=tokens,
            logprobs=logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
            actions=actions.unflatten(-1, (CHUNK, ACTION_DIM)).numpy().astype(np.float32),
            hidden=hidden if self.gives_hidden else None,
            inputs=inputs,
        )

    def score(self, inputs, tokens, temperature, adapter) -> ActionEvaluation:
        logits, hidden = self.forward(inputs, adapter)
        logprobs = (logits / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return ActionEvaluation(
            logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy, hidden if self.gives_hidden else None
        )

    def evaluate_actions(self, inputs, action_tokens, *, temperature) -> ActionEvaluation:
        return self.score(inputs, action_tokens, temperature, self.adapter)

    def compute_hidden(self, inputs):
        with torch.no_grad():
            return self.forward(inputs, self.adapter)[1]

    def logprobs(self, inputs, action_tokens, *, temperature):
        with torch.no_grad():
            return self.evaluate_actions(inputs, action_tokens, temperature=temperature).logprobs

    def reference_logprobs(self, inputs, action_tokens, *, temperature):
        with torch.no_grad():
            return self.score(inputs, action_tokens, temperature, torch.zeros_like(self.adapter)).logprobs

    def set_gradient_checkpointing(self, mode: str) -> None:
        self.gradient_checkpointing = mode

    def trainable_parameters(self):
        return [self.adapter]

    def save_adapter(self, folder: Path, values=None) -> None:
        folder.mkdir(parents=True)
        save_file({"adapter": self.adapter.detach() if values is None else values[0]}, folder / "adapter.safetensors")

    def load_adapter(self, folder: Path) -> None:
        with torch.no_grad():
            self.adapter.copy_(load_file(folder / "adapter.safetensors")["adapter"])

    def fingerprint(self) -> str:
        return f"fake-{self.hidden_size}"


CUDA_SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is free. "
    "Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory 76.00 GiB is allocated by "
    "PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)


class WatchedPolicy(FakePolicy):
    """Notes its scorings: the mode, the rows, and whether the adapter had a gradient; runs out of memory as it is told."""

    def __init__(self, fits=lambda policy, rows: True, **kwargs):
        super().__init__(**kwargs)
        self.scored, self.fits, self.acted = [], fits, []

    def evaluate_actions(self, inputs, action_tokens, *, temperature):
        self.scored.append((self.gradient_checkpointing, len(inputs), self.adapter.grad is not None))
        if not self.fits(self, len(inputs)):
            raise torch.OutOfMemoryError(CUDA_SAID)
        return super().evaluate_actions(inputs, action_tokens, temperature=temperature)

    def act(self, obs, **kwargs):
        self.acted.append(obs)
        return super().act(obs, **kwargs)
