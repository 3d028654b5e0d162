"""How sure a success rate is, and a difference of two: intervals and tests, pure.

An interval takes states for independent draws. The fixed states of a few tasks are not quite that: it tells what other states
of these tasks would give, not other tasks.
"""

from __future__ import annotations

from math import sqrt

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927), from SciPy; both ends in 0..1."""
    from scipy.stats import binomtest  # a second to import

    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def unpaired_difference(successes: int, trials: int, others: int, other_trials: int) -> tuple[float, float, float]:
    """Of two rates from different states: p - q with its 95 % interval.

    Newcombe's hybrid score interval (Newcombe 1998, Statistics in Medicine 17:873, method 10): with the Wilson intervals
    (l, u) of p and (l', u') of q,

        p - q - sqrt((p - l)^2 + (u' - q)^2)  to  p - q + sqrt((u - p)^2 + (q - l')^2)

    Returns:
        difference, low, high, in -1..1.
    """
    p, q = successes / trials, others / other_trials
    (low, high), (other_low, other_high) = wilson_interval(successes, trials), wilson_interval(others, other_trials)
    difference = p - q
    return (
        difference,
        difference - sqrt((p - low) ** 2 + (other_high - q) ** 2),
        difference + sqrt((high - p) ** 2 + (q - other_low) ** 2),
    )


def paired_difference(gained: int, lost: int, pairs: int) -> tuple[float, float, float]:
    """Of two rates from the same states: (gained - lost) / n with its 95 % interval.

    Wald's interval after half an observation is added to each of the four cells, so that n' = n + 2, b' = gained + 1/2,
    c' = lost + 1/2 (Agresti & Min 2005, Statistics in Medicine 24:729, Wald+2), cut off at -1 and 1:

        ((b' - c') +- z sqrt(b' + c' - (b' - c')^2 / n')) / n'

    Args:
        gained: pairs of which only the first succeeded.
        lost: pairs of which only the second succeeded.

    Returns:
        difference, low, high, in -1..1; the difference is the observed one, not the interval's middle.
    """
    n, gap, either = pairs + 2, gained - lost, gained + lost + 1
    middle, half = gap / n, Z95 * sqrt(either - gap**2 / n) / n
    return gap / pairs, max(-1.0, middle - half), min(1.0, middle + half)


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p that as many states flip this way and that by chance (McNemar 1947): min(1, 2 P(X <= min(b, c))) with X of
    Binomial(b + c, 1/2), from SciPy; 1 where none flipped."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
