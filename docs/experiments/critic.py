"""What a value head can know: fits of V(s) on the same rollouts, by what it reads, its size and its loss.

    python docs/experiments/critic.py collect runs/critic_5.pt --task-id 5
    python docs/experiments/critic.py collect runs/critic_5_ppo.pt --task-id 5 --adapter runs/RUN/checkpoints/iteration-000010
    python docs/experiments/critic.py fit runs/critic_5.pt runs/critic_5_ppo.pt
    python docs/experiments/critic.py twins runs/critic_5.pt

`collect` plays episodes of configs/tiny_gae_ppo.yaml as PPO does, of the shipped checkpoint or with a run's adapter, and keeps what
could be read at each decision; then it plays on from some of the states once more. `fit` fits heads on the episodes of one half,
stopped early by a third of it, and prints the explained variance on the other half for 3 splits. `twins` prints how far two plays from
one state agree, which is what the true V would explain.

R decisions, T those of an episode, N environments, F numbers that a head reads, D hidden size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.nn import functional as F

from vla_rl.learning.episodes import EpisodeSampler, EpisodeStreams, reset_finished, step_arguments
from vla_rl.learning.losses import explained_variance
from vla_rl.learning.parts import build_policy
from vla_rl.learning.rollout_buffer import shuffled_rows
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.value_head import ValueHead
from vla_rl.run.command_line import end_of
from vla_rl.run.files import written_whole
from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import Config
from vla_rl.simulation.vector_env import make_vector_env
from vla_rl.types import Observation

CONFIG = Path(__file__).resolve().parents[2] / "configs/tiny_gae_ppo.yaml"


# ---------------------------------------------------------------------- collecting


class States:
    """The language model's states of the last forward, by layer: hooks, so that the policy's own forward is looked at."""

    def __init__(self, policy: OpenVLAPolicy):
        llama, self.num_tokens, self.layers = policy.network.language_model.model, policy.num_tokens, {}
        for number, layer in enumerate([*llama.layers[:-1], llama.norm], start=1):
            layer.register_forward_hook(lambda _, args, output, number=number: self.layers.update({number: output}))
        self.num_patches = policy.num_images * policy.network.vision_backbone.num_patches

    def read(self) -> dict[str, Tensor]:
        """float32 [N, D] each: of the last prompt token, means over the positions that predict an action token, and over patches."""
        found = {}
        for number, states in self.layers.items():
            actions = states[:, -self.num_tokens - 2 : -2]
            found |= {f"last_{number}": actions[:, 0], f"slots_{number}": actions.mean(dim=1)}
            found[f"patches_{number}"] = states[:, 1 : 1 + self.num_patches].mean(dim=1)
        return {name: value.float().clone() for name, value in found.items()}


@torch.no_grad()
def collect(args: argparse.Namespace) -> None:
    # the shaping is not learned from: over an episode it tells the potential of each state, which only the simulator knows
    overrides = [f"env.task_ids=[{args.task_id}]", f"run.seed={args.seed}", "env.reward=dense", "run.torch_threads=1"]
    overrides += [f"env.num_workers={args.workers}"]
    overrides += [] if args.adapter is None else [f"policy.adapter={args.adapter}"]
    config = load_config(CONFIG, overrides)
    policy = build_policy(config)
    with closing(
        make_vector_env(config, config.rollout.num_envs, image_transform=policy.processor.image_transform)
    ) as envs:
        episodes = play(config, policy, envs, args)
        save(args.out, episodes)
        play_twins(policy, envs, episodes, args)


def play(config: Config, policy: OpenVLAPolicy, envs: VectorEnv, args: argparse.Namespace) -> list[dict]:
    """Episodes as PPO plays them, with what could be read at each decision."""
    states, num_envs, limit = States(policy), envs.num_envs, config.max_episode_steps()
    source = EpisodeStreams(EpisodeSampler(config.env.task_ids, "random", args.seed), num_envs)
    rows: list[list[dict]] = [[] for _ in range(num_envs)]  # of the episodes under way
    episodes: list[dict] = []
    obs, _ = reset_finished(envs, np.ones(num_envs, dtype=bool), source)
    taken = np.zeros(num_envs, dtype=np.int64)
    while len(episodes) < args.episodes:
        generators = [source.generator_of(i) for i in range(num_envs)]
        output = policy.act(obs, temperature=config.rollout.temperature, generator=generators)
        read = states.read() | {"proprio": output.inputs.proprio, "time": torch.from_numpy(taken / limit).float()}
        under_way = envs.episode_states()
        step = step_arguments(output.actions, range(num_envs), envs.action_space.shape)
        envs.step_async(*step, source.coming(range(num_envs)))
        raw, rewards, terminated, truncated, info = envs.step_wait()
        taken += info["steps"]
        done = terminated | truncated
        for i in range(num_envs):
            told = {"reward": torch.tensor(float(rewards[i])), "state": under_way[i]}
            rows[i].append({name: value[i] for name, value in read.items()} | told)
            if done[i]:
                episodes.append(whole(rows[i], success=bool(terminated[i])))
                rows[i], taken[i] = [], 0
                if len(episodes) % 40 == 0:
                    wins = np.mean([episode["success"][0] for episode in episodes])
                    print(f"{len(episodes)} episodes, success {wins:.0%}", flush=True)
                    save(args.out, episodes)
        fresh, lost = reset_finished(envs, done, source, info["begun"])
        for i in lost:
            rows[i], taken[i] = [], 0
        obs = fresh or Observation.from_vector_env(raw)
    return episodes


def whole(rows: list[dict], success: bool) -> dict:
    """An episode's rows, each field [T, ...], its return, and the potential of each state, which the shaped rewards
    r + phi' - phi tell: over the rest of the episode they add up to the return less phi."""
    states = [row.pop("state") for row in rows]
    episode = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    left = episode.pop("reward").flip(0).cumsum(0).flip(0)  # [T]
    returns = torch.full_like(left, success)
    return episode | {"success": returns, "potential": returns - left, "states": states, "twin": returns * torch.nan}


def play_twins(policy: OpenVLAPolicy, envs: VectorEnv, episodes: list[dict], args: argparse.Namespace) -> None:
    """Plays on from states that were met, by other draws: `twin` is the return then, NaN where it was not tried.

    Of two plays from one state the returns correlate by Var(V) / Var(R), which is the explained variance of the true V.
    """
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed + 1)
    places = [(episode, t) for episode in episodes for t in range(len(episode["states"]))]
    chosen = [places[k] for k in rng.choice(len(places), min(args.twins, len(places)), replace=False)]
    for start in range(0, len(chosen), envs.num_envs):
        part = chosen[start : start + envs.num_envs]
        states = [episode["states"][t] for episode, t in part]
        obs = Observation.from_vector_env(envs.restore_episodes(states + [None] * (envs.num_envs - len(part))))
        playing = list(range(len(part)))
        while playing:
            output = policy.act(obs.rows(playing), generator=generator)
            envs.step_async(*step_arguments(output.actions, playing, envs.action_space.shape))
            raw, _, terminated, truncated, _ = envs.step_wait()
            obs = Observation.from_vector_env(raw)
            for i in playing:
                episode, t = part[i]
                if terminated[i] or truncated[i]:
                    episode["twin"][t] = float(terminated[i])
            playing = [i for i in playing if not (terminated[i] or truncated[i] or envs.dropped[i])]
        save(args.out, episodes)


def save(path: Path, episodes: list[dict]) -> None:
    fields = {name: torch.cat([e[name] for e in episodes]) for name in episodes[0] if name != "states"}
    lengths = torch.tensor([len(episode["success"]) for episode in episodes])
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        torch.save(fields | {"episode": torch.arange(len(episodes)).repeat_interleave(lengths)}, temporary)


# ---------------------------------------------------------------------- fitting

ALL_LAYERS = [f"{place}_{layer}" for place in ("last", "slots") for layer in (1, 2, 3)]
INPUTS = {  # what a head reads -> fields
    "time": ["time"],
    "proprio": ["proprio"],
    "time, proprio": ["time", "proprio"],
    "prompt": ["last_3"],
    "prompt, slots": ["last_3", "slots_3"],
    "prompt, patches": ["last_3", "patches_3"],
    "prompt, layers": ["last_1", "last_2", "last_3"],
    "prompt, slots, layers": ALL_LAYERS,
    "prompt, time": ["last_3", "time"],
    "prompt, proprio": ["last_3", "proprio"],
    "prompt, time, proprio": ["last_3", "time", "proprio"],
    "prompt, slots, time": ["last_3", "slots_3", "time"],
    "prompt, slots, time, proprio": ["last_3", "slots_3", "time", "proprio"],
    "prompt, slots, layers, time, proprio": [*ALL_LAYERS, "time", "proprio"],
    "potential, time, proprio": ["potential", "time", "proprio"],
    "prompt, potential, time, proprio": ["last_3", "potential", "time", "proprio"],
}
WIDEST = "prompt, slots, layers, time, proprio"
EVERYTHING = [*ALL_LAYERS, "patches_1", "patches_2", "patches_3", "time", "proprio"]
BATCH, RATE, ROLLOUT, PASSES = 256, 1e-3, 1024, 40  # of configs/tiny_gae_ppo.yaml; rows of a rollout, critic_epochs
MOST_PASSES, PATIENCE = 100, 15  # with early stopping
BINS, SIGMA = torch.linspace(-0.1, 1.1, 25), 0.0375  # HL-Gauss: sigma is 0.75 of a bin's width (arXiv:2403.03950)


@dataclass(frozen=True)
class Fit:
    """How a head is fitted."""

    loss: str = "mse"  # mse, huber (beyond half a standard deviation), cross-entropy (returns are 0 or 1), hl-gauss
    widths: tuple[int, ...] = (256,)
    scaled: bool = True  # inputs to mean 0 and variance 1; False: as they are
    returns_scaled: bool = False  # the same of the returns
    dropout: float = 0.0


HEADS = {
    "one hidden layer of 256, MSE, inputs scaled": Fit(),
    "inputs as they are (today's)": Fit(scaled=False),
    "returns scaled": Fit(returns_scaled=True),
    "linear": Fit(widths=()),
    "two hidden layers": Fit(widths=(256, 256)),
    "Huber, returns scaled": Fit(loss="huber", returns_scaled=True),
    "binary cross-entropy": Fit(loss="cross-entropy"),
    "HL-Gauss, 25 bins": Fit(loss="hl-gauss"),
    "dropout 0.5": Fit(dropout=0.5),
}
STRONG = Fit(loss="cross-entropy", widths=(256, 256), dropout=0.5)  # three of them, whose mean is taken


@dataclass(frozen=True)
class Rows:
    """Decisions of some episodes: x float32 [R, F], returns float32 [R] (0 or 1), episode int64 [R]."""

    x: Tensor
    returns: Tensor
    episode: Tensor

    def of(self, episodes: Tensor) -> Rows:
        return self[torch.isin(self.episode, episodes)]

    def __getitem__(self, rows) -> Rows:
        return Rows(self.x[rows], self.returns[rows], self.episode[rows])


class Head:
    """A value head and its optimizer; scales are those of the first rows."""

    def __init__(self, rows: Rows, how: Fit, seed: int):
        self.how, self.generator = how, torch.Generator().manual_seed(seed)
        self.shift, self.scale = (rows.x.mean(0), rows.x.std(0) + 1e-6) if how.scaled else (0.0, 1.0)
        self.mean, self.std = (rows.returns.mean(), rows.returns.std() + 1e-6) if how.returns_scaled else (0.0, 1.0)
        layers = ValueHead(rows.x.shape[1], list(how.widths), self.generator).mlp
        if how.loss == "hl-gauss":
            layers[-1] = nn.Linear(layers[-1].in_features, len(BINS))
            nn.init.zeros_(layers[-1].weight)
        drop = [nn.Sequential(m, nn.Dropout(how.dropout)) if isinstance(m, nn.GELU) else m for m in layers]
        self.network = nn.Sequential(*drop)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE, weight_decay=0.0)

    def outputs(self, x: Tensor) -> Tensor:
        return self.network((x - self.shift) / self.scale)

    @torch.no_grad()
    def values(self, x: Tensor) -> Tensor:
        self.network.eval()
        outputs = self.outputs(x)
        if self.how.loss == "hl-gauss":
            return outputs.softmax(-1) @ BINS
        return outputs[:, 0].sigmoid() if self.how.loss == "cross-entropy" else outputs[:, 0] * self.std + self.mean

    def loss(self, rows: Rows) -> Tensor:
        outputs, returns, loss = self.outputs(rows.x), rows.returns, self.how.loss
        if loss == "hl-gauss":
            edges = torch.cat([BINS, BINS[-1:] + (BINS[1] - BINS[0])]) - (BINS[1] - BINS[0]) / 2
            mass = torch.special.ndtr((edges - returns[:, None]) / SIGMA).diff(dim=1)  # [B, bins]
            return F.cross_entropy(outputs, mass / mass.sum(1, keepdim=True))
        if loss == "cross-entropy":
            return F.binary_cross_entropy_with_logits(outputs[:, 0], returns)
        targets = (returns - self.mean) / self.std
        return (
            F.huber_loss(outputs[:, 0], targets, delta=0.5) if loss == "huber" else F.mse_loss(outputs[:, 0], targets)
        )

    def pass_over(self, rows: Rows) -> None:
        self.network.train()
        for part in shuffled_rows(len(rows.x), BATCH, self.generator):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(rows[part]).backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()


def fit_until_best(train: Rows, check: Rows, test: Rows, how: Fit, seed: int) -> tuple[Tensor, int]:
    """Values [R] of the test rows after the pass with the least squared error on `check`, and that pass."""
    torch.manual_seed(seed)  # of the dropout
    head, least, values, best = Head(train, how, seed), torch.inf, torch.zeros(len(test.x)), 0
    for number in range(1, MOST_PASSES + 1):
        head.pass_over(train)
        error = (head.values(check.x) - check.returns).square().mean()
        if error < least:
            least, values, best = error, head.values(test.x), number
        elif number - best >= PATIENCE:
            break
    return values, best


def fit_as_trained(rows: Rows, test: Rows, how: Fit, seed: int) -> tuple[Tensor, Tensor]:
    """Values of the test rows by a head that was given rollouts one after another, as the trainer's: after the first, and the last."""
    head, found = Head(rows[:ROLLOUT], how, seed), []
    for start in range(0, max(1, len(rows.x) - ROLLOUT + 1), ROLLOUT):
        for _ in range(PASSES):
            head.pass_over(rows[start : start + ROLLOUT])
        found.append(head.values(test.x))
    return found[0], found[-1]


class Data:
    """Rollouts of `collect`, and their splits by episode: a third of all to fit, a sixth to stop early, a half to test."""

    def __init__(self, paths: Sequence[str], splits: int):
        files, self.seeds = [torch.load(path) for path in paths], range(splits)
        for before, after in pairwise(files):
            after["episode"] += before["episode"].max() + 1
        self.fields = {name: torch.cat([file[name] for file in files]) for name in files[-1]}
        self.returns, self.time, self.episode = (self.fields[name] for name in ("success", "time", "episode"))

    def rows(self, names: list[str]) -> Rows:
        parts = [self.fields[name].float().reshape(len(self.returns), -1) for name in names]
        return Rows(torch.cat(parts, dim=1), self.returns, self.episode)

    def split(self, rows: Rows, seed: int) -> tuple[Rows, Rows, Rows]:
        order = torch.randperm(int(self.episode.max()) + 1, generator=torch.Generator().manual_seed(seed))
        half = len(order) // 2
        return rows.of(order[: 2 * half // 3]), rows.of(order[2 * half // 3 : half]), rows.of(order[half:])

    def fits(
        self, names: list[str], how: Fit, share: float = 1.0, heads: int = 1
    ) -> list[tuple[Tensor, Tensor, Tensor, int]]:
        """Of each split the values, returns and time of its test rows, and the passes. Heads' values are averaged."""
        found = []
        for seed in self.seeds:
            train, check, test = self.split(self.rows(names), seed)
            episodes = train.episode.unique()
            train = train.of(episodes[: round(share * len(episodes))])
            fits = [fit_until_best(train, check, test, how, 10 * seed + i) for i in range(heads)]
            values = torch.stack([values for values, _ in fits]).mean(0)
            found.append((values, test.returns, self.split(self.rows(["time"]), seed)[2].x[:, 0], fits[-1][1]))
        return found

    def print_fits(self, name: str, *args, **kwargs) -> None:
        found = self.fits(*args, **kwargs)
        print_line(
            name,
            [explained_variance(*pair) for *pair, _, _ in found],
            f"{mean(passes for *_, passes in found):.0f} passes",
        )

    def print_as_trained(self, name: str, how: Fit) -> None:
        explained = []
        for seed in self.seeds:
            *fitted, test = self.split(self.rows(INPUTS[name]), seed)
            rows = Rows(*(torch.cat(parts) for parts in zip(*(vars(part).values() for part in fitted), strict=True)))
            explained.append(
                [explained_variance(values, test.returns) for values in fit_as_trained(rows, test, how, seed)]
            )
        first, last = zip(*explained, strict=True)
        print_line(
            f"{name}; {how.loss}{'' if how.scaled else ', inputs as they are'}", first, f"{100 * mean(last):.0f}"
        )

    def print_by_time(self, cases: dict[str, tuple]) -> None:
        print(f"\n| share of the step limit | {' | '.join(cases)} | share of rows, their success |")
        fits = [self.fits(*case) for case in cases.values()]
        for low, high in pairwise((0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 1.0)):
            cells = []
            for found in fits:
                inside = [(t >= low) & (t < high) for _, _, t, _ in found]
                explained = [explained_variance(v[w], r[w]) for (v, r, _, _), w in zip(found, inside, strict=True)]
                cells.append(f"{100 * mean(e for e in explained if e is not None):.0f}")
            within = (self.time >= low) & (self.time < high)
            rows = f"{within.float().mean():.0%}, {self.returns[within].mean():.0%}"
            print(f"| {low:g} to {high:g} | {' | '.join(cells)} | {rows} |", flush=True)

    def print_ceiling(self) -> None:
        """Correlation of the returns of two plays from one state: an estimate of what the true V explains."""
        print(
            "\n| two plays from one state | correlation of their returns, 68 % interval | states | of which both end alike |"
        )
        twin = self.fields["twin"]
        for low, high in ((0.0, 1.0), (0.0, 0.3), (0.3, 0.6), (0.6, 1.0)):
            within = ~twin.isnan() & (self.time >= low) & (self.time < high)
            returns, again, count = self.returns[within], twin[within], int(within.sum())
            text = "equal returns"
            if count > 2 and returns.std() > 0 and again.std() > 0:
                r = torch.corrcoef(torch.stack([returns, again]))[0, 1].item()
                text = f"{100 * r:.0f} (+- {100 * (1 - r**2) / count**0.5:.0f})"
            alike = int((returns == again).sum())
            print(f"| from {low:g} to {high:g} of the limit | {text} | {count} | {alike} |")


def mean(numbers: Iterable[float]) -> float:
    return float(np.mean(list(numbers)))


def print_line(name: str, explained: Sequence[float], more: str) -> None:
    middle, low, high = (round(100 * x) for x in (mean(explained), min(explained), max(explained)))
    print(f"| {name} | {middle} ({low} to {high}) | {more} |", flush=True)


def fit(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for paths in args.rollouts:
        data, widest = Data(paths.split("+"), args.splits), INPUTS[WIDEST]
        count, success = int(data.episode.max()) + 1, data.returns[data.time == 0].mean()
        print(
            f"\n## {paths}: {len(data.returns)} decisions, {count} episodes, success {success:.0%}; explained variance in %"
        )
        print("\n| what is read | held out: mean (least to most) | |")
        for name, names in INPUTS.items():
            data.print_fits(name, names, Fit())
        print("\n| the head, of prompt | | |")
        for name, how in HEADS.items():
            data.print_fits(name, INPUTS["prompt"], how)
        print(f"\n| the head, of {WIDEST} | | |")
        for name in ("inputs as they are (today's)", "two hidden layers", "binary cross-entropy", "HL-Gauss, 25 bins"):
            data.print_fits(name, widest, HEADS[name])
        print("\n| three heads of two layers, dropout 0.5 and cross-entropy | | |")
        data.print_fits("everything", EVERYTHING, STRONG, heads=3)
        data.print_fits("everything, potential", [*EVERYTHING, "potential"], STRONG, heads=3)
        print("\n| share of the episodes, of prompt | | |")
        for share in (0.25, 0.5, 1.0):
            data.print_fits(f"{share:.0%}", INPUTS["prompt"], HEADS["binary cross-entropy"], share)
        print(f"\n| {PASSES} passes over each {ROLLOUT} decisions in turn | after the first | after the last |")
        for name in ("time", "prompt", "prompt, slots", "prompt, time, proprio", "potential, time, proprio"):
            for how in (Fit(scaled=False), Fit(loss="cross-entropy")):
                data.print_as_trained(name, how)
        names = ("time", "prompt", WIDEST, "potential, time, proprio")
        data.print_by_time({name: (INPUTS[name], Fit(loss="cross-entropy")) for name in names})


def compare_twins(args: argparse.Namespace) -> None:
    for paths in args.rollouts:
        Data(paths.split("+"), 1).print_ceiling()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("collect", help="play episodes and keep what could be read")
    one.add_argument("out", type=Path)
    one.add_argument("--task-id", type=int, default=5)
    one.add_argument("--adapter", type=Path, help="checkpoint of a run; the shipped checkpoint without")
    one.add_argument("--episodes", type=int, default=480)
    one.add_argument("--seed", type=int, default=100, help="of placements and sampling")
    one.add_argument("--workers", type=int, default=2)
    one.add_argument("--twins", type=int, default=160, help="states from which another play is tried")
    one.set_defaults(do=collect)
    two = commands.add_parser("fit", help="fit value heads and print tables")
    two.add_argument("rollouts", nargs="+", metavar="FILE[+FILE...]", help="files of collect; of one policy together")
    two.add_argument("--splits", type=int, default=3)
    two.set_defaults(do=fit)
    three = commands.add_parser("twins", help="how much of the outcome a state decides")
    three.add_argument("rollouts", nargs="+", metavar="FILE[+FILE...]")
    three.set_defaults(do=compare_twins)
    args = parser.parse_args()
    sys.exit(end_of(lambda: args.do(args)))


if __name__ == "__main__":
    main()
