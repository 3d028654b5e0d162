"""How much of a rollout's policy gradient is signal: it is taken on half of the environments and scored on the other half.

    python tests/bench/gradient_signal.py [--config YAML] [--steps T] [--gae-lambda L,L,...] [section.key=value ...]

For the plain gradient and for its sign (Adam's first step), over all LoRA weights and over the weights of one part, it
prints the surrogate's first-order gain a decision, E[sum over tokens of A d log pi], divided by sqrt(2 KL) of that step, KL
being of a decision: the most that a unit of movement can gain, whatever the learning rate. "own" is on the half that gave
the gradient, "other" on the half that did not, with the standard error over environments. Only the second is progress; own
much above other says that the update is mostly noise, other within its error of 0 that there is nothing to learn from yet.

The gradient is of advantages with gae_lambda, the score of Monte Carlo ones (lambda 1), both normalised. An environment's
values come from a head fitted on the other environments of its half, so that nothing of one half enters the other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from OpenVLA_PPO import OpenVLAPPO
from vla_rl.learning.advantages import compute_gae, normalize
from vla_rl.learning.losses import approx_kl, explained_variance, token_mask
from vla_rl.learning.micro_batches import MicroBatches
from vla_rl.learning.parts import build_policy, build_value_head
from vla_rl.learning.rollout_buffer import Minibatch, RolloutBuffer
from vla_rl.model.value_head import ValueHead
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.command_line import find_config
from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import Config
from vla_rl.simulation.vector_env import make_vector_env
from vla_rl.types import ACTION_DIM

FIT_ROUNDS, FIT_STEPS, FIT_BATCH, FIT_LEARNING_RATE = 10, 60, 256, 1e-3
MONTE_CARLO = 1.0  # gae_lambda
TARGET_KL = 0.1  # nats a decision, of the step whose KL is measured: small enough for the first order to hold
PARTS = {
    "all": "",
    "vision": "vision_backbone",
    "projector": "projector.",
    "language model": "language_",
    "proprio": "proprio_",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", default="configs/tiny_gae_ppo.yaml")
    parser.add_argument("--steps", type=int, default=512, help="decisions of each environment")
    parser.add_argument(
        "--gae-lambda",
        type=numbers,
        default=[],
        metavar="L,L,...",
        help="to compare with the setting, over all weights",
    )
    args = parser.parse_intermixed_args()
    changes = {"rollout.n_steps": args.steps, "algorithm.estimator": "gae"}
    config = load_config(find_config(args.config), args.overrides, changes)
    if config.rollout.num_envs < 4 or config.rollout.num_envs % 2:
        raise SystemExit(f"rollout.num_envs={config.rollout.num_envs}: two halves need an even number, 4 or more")
    lambdas = {lam: {"all": ""} for lam in args.gae_lambda} | {config.algorithm.gae_lambda: PARTS}
    policy, rollout, metrics = collect(config)
    print(f"{len(rollout) * config.rollout.num_envs} decisions, {metrics['rollout/episodes']} episodes, ", end="")
    print(f"success {metrics['rollout/success_rate']:.0%}")
    advantages = advantages_of(config, rollout, {*lambdas, MONTE_CARLO})
    nothing = torch.zeros(len(rollout) * config.rollout.num_envs)
    batch = rollout.flatten(nothing, nothing)
    probe = batch.rows(torch.arange(0, len(batch), max(1, len(batch) // 256)))
    gradients = gradients_of_environments(policy, batch, advantages, config)
    print(f"{'lambda':<7} {'direction':<10} {'part':<16} {'numbers':>8} {'own':>7} {'other':>7} {'error':>7}")
    for gae_lambda, parts in lambdas.items():
        report(policy, probe, gradients[gae_lambda], gradients[MONTE_CARLO], parts, f"{gae_lambda:<7g}", config)


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def collect(config: Config) -> tuple:
    torch.manual_seed(config.run.seed)
    policy = build_policy(config)
    head = build_value_head(config, policy.hidden_size)
    envs = make_vector_env(config, config.rollout.num_envs, image_transform=policy.processor.image_transform)
    with tempfile.TemporaryDirectory() as folder:
        trainer = OpenVLAPPO(config, policy, head, envs, None, MetricsLogger(Path(folder), config))
        rollout, metrics = trainer.collect_rollout()
        envs.close()
    return policy, rollout, metrics


def first_half(num_envs: int) -> Tensor:
    """Which environments [N] are of it."""
    return torch.arange(num_envs) % 2 == 0


def advantages_of(config: Config, rollout: RolloutBuffer, lambdas: set[float]) -> dict[float, Tensor]:
    """lambda -> normalised advantages [T, N]."""
    values = torch.zeros_like(rollout.stack("rewards"))  # [T, N]
    half = first_half(values.shape[1])
    for env in range(len(half)):
        fitted = half == half[env]
        fitted[env] = False
        values[:, env] = fit_values(config, rollout, fitted)[:, env]
    returns = gae(config, rollout, values, MONTE_CARLO)[1]
    print(f"explained variance of the returns by heads of other environments {explained_variance(values, returns):.2f}")
    return {lam: normalize(gae(config, rollout, values, lam)[0].flatten()).view_as(values) for lam in lambdas}


def gae(config: Config, rollout: RolloutBuffer, values: Tensor, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """With the row's own value where the next state's is not known (the end of the rollout, or truncated unless that is
    failure)."""
    following = torch.cat([values[1:], values[-1:]])
    truncated = rollout.stack("truncated")
    at_the_limit = values if config.algorithm.bootstrap_truncated else torch.zeros_like(values)
    following = torch.where(truncated, at_the_limit, following)
    done = rollout.stack("terminated"), truncated
    return compute_gae(rollout.stack("rewards"), values, following, *done, config.algorithm.gamma, gae_lambda)


def fit_values(config: Config, rollout: RolloutBuffer, fitted: Tensor) -> Tensor:
    """Values [T, N] of a head fitted on the environments `fitted` [N]."""
    hidden = rollout.stack("hidden")  # [T, N, D]
    generator = torch.Generator().manual_seed(0)
    head = ValueHead(hidden.shape[-1], config.value_head.hidden_sizes, generator)
    optimizer = torch.optim.AdamW(head.parameters(), lr=FIT_LEARNING_RATE)
    rows = hidden[:, fitted].flatten(0, 1)
    target_lambda = config.algorithm.critic_gae_lambda or config.algorithm.gae_lambda
    for _ in range(FIT_ROUNDS):
        with torch.no_grad():
            values = head(hidden.flatten(0, 1)).view(hidden.shape[:2])
        targets = gae(config, rollout, values, target_lambda)[1][:, fitted].flatten()
        for _ in range(FIT_STEPS):
            picked = torch.randint(0, len(rows), (FIT_BATCH,), generator=generator)
            loss = (head(rows[picked]) - targets[picked]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return head(hidden.flatten(0, 1)).view(hidden.shape[:2])


def score(policy, rows: Minibatch, config: Config) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a micro-batch's tokens now, and which count; both [B, A]."""
    temperature = config.rollout.temperature
    logprobs = policy.evaluate_actions(rows.inputs, rows.action_tokens, temperature=temperature).logprobs
    return logprobs, token_mask(rows.steps, policy.chunk_size, ACTION_DIM)


def gradients_of_environments(
    policy, batch: Minibatch, advantages: dict[float, Tensor], config: Config
) -> dict[float, list[list[Tensor]]]:
    """lambda -> for each environment the gradient of the mean over its decisions of A sum log pi."""
    parameters, num_envs = policy.trainable_parameters(), config.rollout.num_envs
    gradients: dict[float, list[list[Tensor]]] = {lam: [] for lam in advantages}
    for env in range(num_envs):
        for found in gradients.values():
            found.append([torch.zeros_like(parameter) for parameter in parameters])
        for indices in torch.arange(env, len(batch), num_envs).split(MicroBatches(config, policy).rows):
            logprobs, mask = score(policy, batch.rows(indices), config)
            joint = (logprobs * mask).sum(1)
            for lam, found in gradients.items():
                objective = joint @ advantages[lam].flatten()[indices] / (len(batch) // num_envs)
                parts = torch.autograd.grad(objective, parameters, retain_graph=True)
                found[env] = [total + part for total, part in zip(found[env], parts, strict=True)]
    return gradients


@torch.no_grad()
def divergence(policy, rows: Minibatch, step: list[Tensor], config: Config) -> float:
    """KL, nats a decision, after a step."""
    parameters = policy.trainable_parameters()
    before = [parameter.clone() for parameter in parameters]
    for parameter, change in zip(parameters, step, strict=True):
        parameter.add_(change)
    total = 0.0
    for micro in rows.split(MicroBatches(config, policy).rows):
        logprobs, mask = score(policy, micro, config)
        total += approx_kl(micro.old_logprobs, logprobs, mask, count=1).item()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
    return total / len(rows)


def report(
    policy,
    probe: Minibatch,
    gradients: list[list[Tensor]],
    scores: list[list[Tensor]],
    parts: dict[str, str],
    label: str,
    config: Config,
) -> None:
    """Lines of the table: directions from `gradients`, what they gain by `scores`, both [N][parameters]."""
    names = [name for name, parameter in policy.network.named_parameters() if parameter.requires_grad]
    half = first_half(len(gradients))

    def gain(env: int, step: list[Tensor]) -> float:
        return sum((g * s).sum().item() for g, s in zip(scores[env], step, strict=True))

    for kind, direction in (("gradient", lambda g: g), ("sign", torch.sign)):
        for part, prefix in parts.items():
            count = sum(g.numel() for n, g in zip(names, gradients[0], strict=True) if n.startswith(prefix))
            if not count:
                continue
            own, other = [], []
            for fitted in (half, ~half):
                mean = [torch.stack(g).mean(0) for g in zip(*(gradients[i] for i in fitted.nonzero()), strict=True)]
                step = [
                    direction(g) if n.startswith(prefix) else torch.zeros_like(g)
                    for n, g in zip(names, mean, strict=True)
                ]
                unit = unit_of(policy, probe, step, config)
                for env, is_own in enumerate(fitted.tolist()):
                    (own if is_own else other).append(gain(env, step) * unit)
            error = torch.tensor(other).std() / len(other) ** 0.5
            means = f"{torch.tensor(own).mean():>7.3f} {torch.tensor(other).mean():>7.3f} {error:>7.3f}"
            print(f"{label} {kind:<10} {part:<16} {count:>8} {means}", flush=True)


def unit_of(policy, probe: Minibatch, step: list[Tensor], config: Config) -> float:
    """What to multiply a step with, so that it moves by sqrt(2 KL) = 1 where KL is of second order."""
    size, kl = 0.05 / sum(s.square().sum() for s in step).sqrt().item(), 0.0
    for _ in range(4):  # to TARGET_KL
        kl = divergence(policy, probe, [s * size for s in step], config)
        size = size * (TARGET_KL / max(kl, 1e-8)) ** 0.5
    size = size * (kl / TARGET_KL) ** 0.5  # of the step whose KL was measured last
    return size / (2 * kl) ** 0.5


if __name__ == "__main__":
    main()
