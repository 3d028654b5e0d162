"""How much of a rollout's policy gradient is signal: it is taken on half of the environments and scored on the other half.

    python tests/bench/gradient_signal.py [--config YAML] [--steps T] [section.key=value ...]

For the plain gradient and for its sign (Adam's first step), over all LoRA weights and over the weights of one part, it
prints the surrogate's first-order gain a decision, E[sum over tokens of A d log pi], divided by sqrt(2 KL) of that step, KL
being of a decision: the most that a unit of movement can gain, whatever the learning rate. "own" is on the half that gave
the gradient, "other" on the half that did not, with the standard error over environments. Only the second is progress; own
much above other says that the update is mostly noise, other within its error of 0 that there is nothing to learn from yet.
Advantages are normalised; values come from a head fitted on the other half.
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
from start_gae_ppo_training import build_policy, build_value_head, find_config
from vla_rl.advantages import compute_gae, normalize
from vla_rl.config import Config, load_config
from vla_rl.losses import approx_kl, explained_variance, token_mask
from vla_rl.metrics import MetricsLogger
from vla_rl.rollout_buffer import Minibatch, RolloutBuffer
from vla_rl.types import ACTION_DIM
from vla_rl.value_head import ValueHead
from vla_rl.vector_env import make_vector_env

FIT_ROUNDS, FIT_STEPS, FIT_BATCH, FIT_LEARNING_RATE = 10, 60, 256, 1e-3
TARGET_KL = 0.1  # nats a decision, of the step whose KL is measured: small enough for the first order to hold
PARTS = {"all": "", "vision": "vision_backbone", "projector": "projector.fc", "language model": "language_model"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", default="configs/tiny_gae_ppo.yaml")
    parser.add_argument("--steps", type=int, default=512, help="decisions of each environment")
    args = parser.parse_intermixed_args()
    changes = {"rollout.n_steps": args.steps, "algorithm.estimator": "gae"}
    config = load_config(find_config(args.config), args.overrides, changes)
    if config.rollout.num_envs < 4 or config.rollout.num_envs % 2:
        raise SystemExit(f"rollout.num_envs={config.rollout.num_envs}: two halves need an even number, 4 or more")
    policy, rollout, metrics = collect(config)
    print(f"{len(rollout) * config.rollout.num_envs} decisions, {metrics['rollout/episodes']} episodes, ", end="")
    print(f"success {metrics['rollout/success_rate']:.0%}")
    batch, half = advantages_of(config, rollout)
    gradients = gradients_of_environments(policy, batch, config)  # [N][parameters]
    report(policy, batch, gradients, half, config)


def collect(config: Config) -> tuple:
    torch.manual_seed(config.run.seed)
    policy = build_policy(config)
    head = build_value_head(config, policy.hidden_size)
    envs = make_vector_env(config, config.rollout.num_envs)
    with tempfile.TemporaryDirectory() as folder:
        trainer = OpenVLAPPO(config, policy, head, envs, None, MetricsLogger(Path(folder), config))
        rollout, metrics = trainer.collect_rollout()
        envs.close()
    return policy, rollout, metrics


def advantages_of(config: Config, rollout: RolloutBuffer) -> tuple[Minibatch, Tensor]:
    """Rows with normalised advantages, and which environments [N] are of the first half."""
    values = torch.zeros_like(rollout.stack("rewards"))  # [T, N]
    half = torch.arange(values.shape[1]) % 2 == 0
    for fitted in (half, ~half):
        values[:, ~fitted] = fit_values(config, rollout, fitted)[:, ~fitted]
    advantages, returns = gae(config, rollout, values, config.algorithm.gae_lambda)
    print(f"explained variance of the returns by the other half's head {explained_variance(values, returns):.2f}")
    return rollout.flatten(normalize(advantages).flatten(), returns.flatten()), half


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


def gradients_of_environments(policy, batch: Minibatch, config: Config) -> list[list[Tensor]]:
    """For each environment the gradient of the mean over its decisions of A sum log pi."""
    parameters, num_envs, gradients = policy.trainable_parameters(), config.rollout.num_envs, []
    for env in range(num_envs):
        rows = batch.rows(torch.arange(env, len(batch), num_envs))
        for parameter in parameters:
            parameter.grad = None
        for micro in rows.split(config.algorithm.micro_batch_size):
            logprobs, mask = score(policy, micro, config)
            ((logprobs * mask).sum(1) @ micro.advantages / len(rows)).backward()
        gradients.append([parameter.grad.clone() for parameter in parameters])
    return gradients


@torch.no_grad()
def divergence(policy, rows: Minibatch, step: list[Tensor], config: Config) -> float:
    """KL, nats a decision, after a step."""
    parameters = policy.trainable_parameters()
    before = [parameter.clone() for parameter in parameters]
    for parameter, change in zip(parameters, step, strict=True):
        parameter.add_(change)
    total = 0.0
    for micro in rows.split(config.algorithm.micro_batch_size):
        logprobs, mask = score(policy, micro, config)
        total += approx_kl(micro.old_logprobs, logprobs, mask, count=1).item()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
    return total / len(rows)


def report(policy, batch: Minibatch, gradients: list[list[Tensor]], half: Tensor, config: Config) -> None:
    names = [name for name, parameter in policy.network.named_parameters() if parameter.requires_grad]
    probe = batch.rows(torch.arange(0, len(batch), max(1, len(batch) // 256)))

    def gain(env: int, step: list[Tensor]) -> float:
        return sum((g * s).sum().item() for g, s in zip(gradients[env], step, strict=True))

    print(f"{'direction':<10} {'part':<16} {'numbers':>8} {'own':>7} {'other':>7} {'error':>7}")
    for kind, direction in (("gradient", lambda g: g), ("sign", torch.sign)):
        for part, prefix in PARTS.items():
            own, other = [], []
            for fitted in (half, ~half):
                mean = [torch.stack(g).mean(0) for g in zip(*(gradients[i] for i in fitted.nonzero()), strict=True)]
                step = [
                    direction(g) if n.startswith(prefix) else torch.zeros_like(g)
                    for n, g in zip(names, mean, strict=True)
                ]
                norm = sum(s.square().sum() for s in step).sqrt()
                size, kl = 0.05 / norm, 0.0
                for _ in range(4):  # to TARGET_KL
                    kl = divergence(policy, probe, [s * size for s in step], config)
                    size = size * (TARGET_KL / max(kl, 1e-8)) ** 0.5
                size = size * (kl / TARGET_KL) ** 0.5  # of the step whose KL was measured last
                unit = size / (2 * kl) ** 0.5
                for env, is_own in enumerate(fitted.tolist()):
                    (own if is_own else other).append(gain(env, step) * unit.item())
            count = sum(p.numel() for n, p in policy.network.named_parameters() if n in names and n.startswith(prefix))
            error = torch.tensor(other).std() / len(other) ** 0.5
            mean_own, mean_other = torch.tensor(own).mean(), torch.tensor(other).mean()
            print(f"{kind:<10} {part:<16} {count:>8} {mean_own:>7.3f} {mean_other:>7.3f} {error:>7.3f}", flush=True)


if __name__ == "__main__":
    main()
