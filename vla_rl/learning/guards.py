"""What stops a run that computes something wrong: a first minibatch that is not on policy, replicas that differ.

Not here: numbers that are not finite (vla_rl.learning.finite).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vla_rl.learning.losses import approx_kl, log_ratio, masked_mean, token_mask
from vla_rl.learning.rollout_buffer import Minibatch
from vla_rl.run.distributed import Ranks
from vla_rl.types import ACTION_DIM, InvariantError

# before the first optimizer step the ratio is 1 but for the order of float32 sums; above this the log-probabilities that
# were sampled and those that are scored are not of one distribution (1e-5 at width 128; a temperature of 1.01 for 1: 8e-2)
RATIO_TOLERANCE_FLOAT32 = 1e-3
# in bfloat16 the two forwards round differently: 1e-6 nats a token at width 128, at most 5e-4 where the 7B model's
# ratios are off by 0.015 in the mean and 0.069 at most; a temperature of 1.5 for 1 gives 4e-2
KL_TOLERANCE = 1e-2


def check_first_minibatch(metrics: Mapping[str, float], tokens: int, dtype: str) -> None:
    """Before any optimizer step the ratio is 1 and the KL 0, or sampling and scoring are two distributions.

    Args:
        metrics: actor/ratio_error, the largest |ratio - 1| of a token, and actor/approx_kl, in nats a ratio.
        tokens: that a ratio is of.
        dtype: the policy's; in bfloat16 only the KL is checked.

    Raises:
        InvariantError: one of them is too large.
    """
    ratio_error, kl = metrics["actor/ratio_error"], metrics["actor/approx_kl"]
    why = "the policy scores its own actions differently than it sampled them (another temperature, mask or precision)"
    if dtype == "float32" and ratio_error > RATIO_TOLERANCE_FLOAT32:
        raise InvariantError(
            f"actor/first_minibatch_ratio_error is {ratio_error:.2e}, expected below {RATIO_TOLERANCE_FLOAT32:.0e}: {why}"
        )
    if kl > KL_TOLERANCE * tokens:
        raise InvariantError(
            f"actor/first_minibatch_kl is {kl:.2e}, expected below {KL_TOLERANCE:.0e} a token, {KL_TOLERANCE * tokens:.0e} "
            f"for a ratio of {tokens}: {why}"
        )


def check_rescored(batch: Minibatch, logprobs: Tensor, chunk_size: int, dtype: str) -> dict[str, float]:
    """The rollout's log-probabilities and those of a second scoring are of one distribution, but for rounding.

    Args:
        batch: with the rollout's, old_logprobs [R, A].
        logprobs: of the second scoring [R, A].

    Returns:
        actor/rollout_ratio_error: mean |ratio - 1| of a token.

    Raises:
        InvariantError: see check_first_minibatch.
    """
    tokens = token_mask(batch.steps, chunk_size, ACTION_DIM)
    error = (log_ratio(logprobs, batch.old_logprobs, tokens).exp() - 1).abs()  # [R, A]
    kl = approx_kl(batch.old_logprobs, logprobs, tokens).item()
    check_first_minibatch({"actor/ratio_error": error.max().item(), "actor/approx_kl": kl}, 1, dtype)
    return {"actor/rollout_ratio_error": masked_mean(error, tokens).item()}


def check_replicas(parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """All processes have taken the same steps.

    Raises:
        InvariantError: their trained weights differ.
    """
    if ranks.size == 1:
        return
    sums = ranks.gather(sum(parameter.detach().double().sum() for parameter in parameters).item())
    if len(set(sums)) > 1:
        raise InvariantError(
            f"the trained weights of {ranks.size} processes differ, their sums are {sums}: are their GPUs, drivers and packages the same?"
        )
