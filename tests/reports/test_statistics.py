"""Intervals and tests of success rates, against published values, SciPy and numbers by hand."""

import pytest
from scipy.stats import binom, norm

from vla_rl.reports.statistics import Z95, mcnemar_exact, paired_difference, unpaired_difference, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # z = 1.959964, z^2 = 3.841459. Centre (p + z^2/2n)/(1 + z^2/n), half width z/(1 + z^2/n) sqrt(pq/n + z^2/4n^2)
        # 8/10: (0.8 + 0.192073)/1.384146 = 0.716740; 1.416010 sqrt(0.016 + 0.009604) = 0.226577
        (8, 10, 0.49016, 0.94332),
        # 0/10: centre 0.192073/1.384146 = 0.138766 = half width
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        # 250/500: centre 0.5; 1.945020 sqrt(0.0005 + 0.0000038415) = 0.043660
        (250, 500, 0.45634, 0.54366),
    ],
)
def test_wilson_interval_by_hand(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 10), -0.2775, 0.2775),
    ],
)
def test_an_unpaired_difference_has_the_published_interval(first, second, low, high):
    difference, *interval = unpaired_difference(*first, *second)
    assert difference == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert interval == pytest.approx([low, high], abs=5e-5)


def test_a_paired_difference_has_the_interval_of_the_r_package():
    """PropCIs, diffpropci.mp(b = 40, c = 20, n = 160): -0.21601726 -0.03089632, of c - b."""
    assert paired_difference(20, 40, 160) == pytest.approx((-0.125, -0.21601726, -0.03089632), abs=1e-8)


def test_without_a_flip_there_is_still_doubt_and_no_interval_leaves_the_range():
    # n' = 12, b' = c' = 1/2: 1.959964 sqrt(1) / 12
    assert paired_difference(0, 0, 10) == pytest.approx((0, -0.163330, 0.163330), abs=1e-6)
    assert paired_difference(2, 0, 2)[2] == 1.0 and paired_difference(0, 2, 2)[1] == -1.0


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (12, 2, 0.0129),  # Armitage & Berry 1994, p. 127: two media for a bacterium
        (1, 7, 0.0703),  # Fagerland et al. 2013 (doi 10.1186/1471-2288-13-91), exact conditional: 2 (1 + 8) / 2^8
        (5, 5, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_has_the_published_p(gained, lost, p):
    assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained) == pytest.approx(p, abs=5e-5)


def test_mcnemar_is_the_tail_of_a_binomial_distribution():
    for gained, lost in ((3, 11), (20, 31), (0, 6)):
        tail = 2 * binom.cdf(min(gained, lost), gained + lost, 0.5)
        assert mcnemar_exact(gained, lost) == pytest.approx(tail)
    assert norm.ppf(0.975) == pytest.approx(Z95, abs=1e-12)
