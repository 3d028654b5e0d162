"""Losses against numbers worked by hand, plain loops and exact sums over small distributions."""

import math

import pytest
import torch

from vla_rl.learning.losses import (
    approx_kl,
    clip_fraction,
    explained_variance,
    log_ratio,
    masked_mean,
    of_dims,
    ppo_policy_loss,
    sum_to_level,
    token_mask,
    tokens_per_ratio,
    value_loss,
)

LOW, HIGH = 0.2, 0.28  # ratios are clipped to 0.8 .. 1.28


def logs(*ratios: float) -> torch.Tensor:
    """[B, 1] log-probabilities whose ratios to 0 are those given."""
    return torch.tensor([[math.log(ratio)] for ratio in ratios])


def policy_loss(ratios, advantages) -> float:
    new = logs(*ratios)
    loss = ppo_policy_loss(new, torch.zeros_like(new), torch.tensor(advantages), torch.ones_like(new).bool(), LOW, HIGH)
    return loss.item()


# PPO's clipped loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),  # inside the range
        (1.5, 2.0, -2.56),  # min(1.5*2, 1.28*2)
        (0.5, 2.0, -1.0),  # min(0.5*2, 0.8*2): a bad move of a good action is not clipped
        (0.5, -2.0, 1.6),  # min(-1, -1.6)
        (1.5, -2.0, 3.0),  # min(-3, -2.56): a bad move of a bad action is not clipped
        (0.9, -2.0, 1.8),
    ],
)
def test_clipped_loss_by_hand(ratio, advantage, expected):
    assert policy_loss([ratio], [advantage]) == pytest.approx(expected, abs=1e-6)


def test_loss_is_the_mean_over_the_rows():
    # -( -2.56 ... ): losses -2.56, 1.6, 3.0 from above; mean 2.04 / 3 = 0.68
    assert policy_loss([1.5, 0.5, 1.5], [2.0, -2.0, -2.0]) == pytest.approx(0.68, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.5, 1.0, False),  # good action, already likelier by more than 28 %
        (0.5, 1.0, True),
        (1.5, -1.0, True),
        (0.5, -1.0, False),  # bad action, already less likely by more than 20 %
        (1.25, 1.0, True),  # inside only because the upper side is wider than the lower
        (0.75, -1.0, False),
        (1.0, 1.0, True),
        (1.0, -1.0, True),
    ],
)
def test_gradient_stops_where_clipped_and_is_the_ratio_times_the_advantage_elsewhere(ratio, advantage, moves):
    new = logs(ratio).requires_grad_()
    mask = torch.ones_like(new).bool()
    ppo_policy_loss(new, torch.zeros(1, 1), torch.tensor([advantage]), mask, LOW, HIGH).backward()
    # d(-rho A)/d(log pi) = -rho A
    assert new.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-6)


def test_gradient_at_ratio_one_is_the_policy_gradient():
    # with log_softmax of logits and ratio 1: d/dlogits(-A log pi(a)) = A (pi - onehot(a)); pi = 1/4 each
    logits = torch.zeros(1, 4, requires_grad=True)
    logprobs = logits.log_softmax(-1)[:, 2:3]
    ppo_policy_loss(logprobs, logprobs.detach(), torch.tensor([2.0]), torch.ones(1, 1).bool(), LOW, HIGH).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, 0.5, -1.5, 0.5]]))


def test_a_minibatch_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 6, 14, generator=generator).mul(0.3)
    advantages = torch.randn(6, generator=generator)
    mask = torch.rand(6, 14, generator=generator) < 0.7
    total, count = 0.0, 0
    for b in range(6):
        for k in range(14):
            if mask[b, k]:
                rho = math.exp(new[b, k].item() - old[b, k].item())
                a = advantages[b].item()
                total += min(rho * a, min(max(rho, 0.8), 1.28) * a)
                count += 1
    loss = ppo_policy_loss(new, old, advantages, mask, LOW, HIGH)
    assert loss.item() == pytest.approx(-total / count, abs=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("side", ["logprobs", "old_logprobs"])
def test_masked_entries_count_for_nothing_whatever_is_in_them(bad, side):
    values = {"logprobs": torch.tensor([[0.1, 0.0], [0.0, -0.2]]), "old_logprobs": torch.zeros(2, 2)}
    mask = torch.tensor([[True, False], [False, True]])
    dirty = dict(values)
    dirty[side] = values[side].masked_fill(~mask, bad)
    results = []
    for entries in (values, dirty):
        new = entries["logprobs"].clone().requires_grad_()
        old = entries["old_logprobs"]
        policy = ppo_policy_loss(new, old, torch.tensor([1.0, -1.0]), mask, LOW, HIGH)
        kl = approx_kl(new, old, mask)
        (policy + kl).backward()
        fraction = clip_fraction(new, old, mask, LOW, HIGH)
        results.append((policy.detach(), kl.detach(), fraction, new.grad))
    for clean, dirtied in zip(*results, strict=True):
        assert torch.isfinite(dirtied).all() and torch.equal(clean, dirtied)
    assert (results[0][3][~mask] == 0).all()


def test_micro_batches_with_the_count_of_the_minibatch_add_up_to_it():
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(10, 14, generator=generator)
    start = old + 0.3 * torch.randn(10, 14, generator=generator)
    advantages, values, returns = torch.randn(3, 10, generator=generator)
    mask = torch.rand(10, 14, generator=generator) < 0.5  # rows with different numbers of valid entries
    mask[:3] = False
    mask[0, 0] = True

    def losses(new, v, rows, count, n):
        args = (new[rows], old[rows], mask[rows])
        return (
            ppo_policy_loss(*args[:2], advantages[rows], mask[rows], LOW, HIGH, count)
            + approx_kl(*args, count)
            + value_loss(v[rows], returns[rows], n)
        ), clip_fraction(*args, LOW, HIGH, count)

    whole_new, whole_v = start.clone().requires_grad_(), values.clone().requires_grad_()
    whole, whole_fraction = losses(whole_new, whole_v, slice(None), None, None)
    whole.backward()
    new, v = start.clone().requires_grad_(), values.clone().requires_grad_()
    total = fraction = 0.0
    for rows in torch.arange(10).split(3):
        part, part_fraction = losses(new, v, rows, mask.sum(), 10)
        part.backward()
        total, fraction = total + part.item(), fraction + part_fraction.item()
    assert total == pytest.approx(whole.item(), abs=1e-5)
    assert fraction == pytest.approx(whole_fraction.item(), abs=1e-6) and 0 < fraction < 1
    torch.testing.assert_close(new.grad, whole_new.grad)
    torch.testing.assert_close(v.grad, whole_v.grad)


def test_every_ratio_of_a_decision_has_the_decisions_advantage():
    new, old = torch.zeros(2, 3), torch.zeros(2, 3)
    # ratios 1: loss = -(3*5 + 1*(-1)) / 4 = -3.5
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert ppo_policy_loss(new, old, torch.tensor([5.0, -1.0]), mask, LOW, HIGH).item() == -3.5


@pytest.mark.parametrize(
    ("new", "old", "advantages", "mask"),
    [
        ((4, 7), (4, 1), (4,), (4, 7)),  # would broadcast
        ((4, 7), (4, 7), (4, 1), (4, 7)),
        ((4, 7), (4, 7), (7,), (4, 7)),
        ((4, 7), (4, 7), (4,), (4, 1)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(new, old, advantages, mask):
    with pytest.raises(ValueError, match=r"expected logprobs|must have one shape"):
        ppo_policy_loss(torch.zeros(new), torch.zeros(old), torch.zeros(advantages), torch.ones(mask).bool(), LOW, HIGH)


# masks and levels


def test_tokens_of_steps_that_were_not_executed_are_masked():
    mask = token_mask(torch.tensor([0, 1, 3]), chunk_size=3, action_dim=2)
    assert mask.int().tolist() == [[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert mask.dtype == torch.bool


def test_a_whole_chunk_has_56_tokens():
    assert token_mask(torch.tensor([8]), chunk_size=8, action_dim=7).sum() == 56
    assert token_mask(torch.tensor([8], device="meta"), chunk_size=8, action_dim=7).device.type == "meta"


# row 0: both actions executed; row 1: the first only, so its last two tokens are masked
LOGPROBS = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]])
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


@pytest.mark.parametrize(
    ("level", "sums", "mask"),
    [
        ("token", [[-1, -2, -3, -4], [-5, -6, -7, -8]], [[1, 1, 1, 1], [1, 1, 0, 0]]),
        ("action", [[-3, -7], [-11, 0]], [[1, 1], [1, 0]]),  # -1-2, -3-4; -5-6, nothing
        ("chunk", [[-10], [-11]], [[1], [1]]),
    ],
)
def test_levels_sum_the_executed_tokens(level, sums, mask):
    summed, valid = sum_to_level(LOGPROBS, MASK, level, action_dim=2)
    assert (
        torch.where(valid, summed, 0).tolist() == torch.where(torch.tensor(mask).bool(), torch.tensor(sums), 0).tolist()
    )
    assert valid.int().tolist() == mask
    assert summed.dtype == torch.float32


@pytest.mark.parametrize("level", ["action", "chunk"])
def test_a_masked_infinity_stays_out_of_a_sum_and_its_gradient(level):
    logprobs = LOGPROBS.masked_fill(~MASK, -math.inf).requires_grad_()
    summed, valid = sum_to_level(logprobs, MASK, level, action_dim=2)
    summed.sum().backward()
    assert summed[valid].isfinite().all() and logprobs.grad.tolist() == MASK.float().tolist()


def test_the_ratio_of_a_chunk_is_the_product_of_its_token_ratios():
    generator = torch.Generator().manual_seed(3)
    new, old = torch.randn(2, 5, 14, generator=generator).mul(0.1)
    mask = token_mask(torch.tensor([2, 1, 2, 1, 2]), 2, 7)
    ratio = log_ratio(
        sum_to_level(new, mask, "chunk", 7)[0], sum_to_level(old, mask, "chunk", 7)[0], torch.ones(5, 1).bool()
    ).exp()
    for b in range(5):
        product = math.prod(math.exp(new[b, k].item() - old[b, k].item()) for k in range(14) if mask[b, k])
        assert ratio[b, 0].item() == pytest.approx(product, rel=1e-5)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        sum_to_level(torch.zeros(2, 4), torch.ones(2, 1).bool(), "token", 2)
    with pytest.raises(ValueError, match="must have one shape"):
        masked_mean(torch.zeros(2, 4), torch.ones(4).bool())


def test_masked_mean_divides_by_the_valid_entries_or_by_what_is_given():
    x, mask = torch.tensor([[1.0, 2.0], [3.0, 100.0]]), torch.tensor([[True, True], [True, False]])
    assert masked_mean(x, mask).item() == 2 and masked_mean(x, mask, 12).item() == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_mean_takes_no_notice_of_what_is_masked(bad):
    x = torch.tensor([2.0, bad], requires_grad=True)
    mean = masked_mean(x, torch.tensor([True, False]))
    mean.backward()
    assert mean.item() == 2 and x.grad.tolist() == [1, 0]


# diagnostics

P = torch.tensor([0.5, 0.25, 0.125, 0.125])
Q = torch.tensor([0.25, 0.25, 0.25, 0.25])
# KL(P||Q) = 0.5 ln 2 + 0 + 2 * 0.125 ln(1/2) = 0.25 ln 2;  KL(Q||P) = 0.25 (ln 1/2 + 0 + 2 ln 2) = 0.25 ln 2 too, so a
# third distribution tells the order of the arguments: R = 0.7 0.1 0.1 0.1
R = torch.tensor([0.7, 0.1, 0.1, 0.1])


def exact_kl(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


@pytest.mark.parametrize(("p", "q"), [(P, Q), (Q, P), (P, R), (R, P)])
def test_approx_kl_is_the_exact_kl_in_the_mean_over_samples_of_the_first(p, q):
    # 8 samples in exactly p's shares give the expectation without noise (R: 10 samples)
    n = 8 if p is not R else 10
    samples = torch.repeat_interleave(torch.arange(4), (p * n).round().long())
    kl = approx_kl(p.log()[samples].unsqueeze(1), q.log()[samples].unsqueeze(1), torch.ones(n, 1).bool())
    assert kl.item() == pytest.approx(exact_kl(p, q), abs=1e-6) and kl.item() > 0.05


def test_approx_kl_comes_near_the_exact_kl_with_random_samples():
    generator = torch.Generator().manual_seed(0)
    samples = torch.multinomial(P, 100_000, replacement=True, generator=generator)
    kl = approx_kl(P.log()[samples].unsqueeze(1), R.log()[samples].unsqueeze(1), torch.ones(100_000, 1).bool())
    assert kl.item() == pytest.approx(exact_kl(P, R), rel=0.03)


def test_approx_kl_is_zero_for_equal_policies_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 1000, 1, generator=generator).mul(0.1)
    mask = torch.ones(1, 1).bool()
    assert approx_kl(p, p, torch.ones_like(p).bool()).item() == 0
    assert min(approx_kl(a, b, mask).item() for a, b in zip(p.split(1), q.split(1), strict=True)) >= 0


def test_the_gradient_of_the_kl_penalty_pulls_towards_the_reference():
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    approx_kl(logprobs, torch.tensor([[-2.0]]), torch.ones(1, 1).bool()).backward()
    # d/dx [exp(q - x) - 1 - (q - x)] = 1 - exp(q - x) = 1 - e^-1 = 0.632121 > 0: descent lowers the log-probability
    assert logprobs.grad.item() == pytest.approx(0.632121, abs=1e-5)


def test_clip_fraction_counts_the_ratios_outside_by_hand():
    # outside 0.8..1.28 are 0.5, 0.79, 1.29 and 2: 4 of 8
    new = logs(0.5, 0.79, 0.81, 1.0, 1.25, 1.27, 1.29, 2.0)
    assert clip_fraction(new, torch.zeros(8, 1), torch.ones(8, 1).bool(), LOW, HIGH).item() == 0.5


def test_clip_fraction_is_of_the_valid_ratios():
    mask = torch.tensor([[True], [True], [True], [False]])
    assert clip_fraction(logs(2.0, 1, 1, 2), torch.zeros(4, 1), mask, LOW, HIGH).item() == pytest.approx(1 / 3)


def test_value_loss_by_hand():
    # (1-2)^2 + (3-0)^2 + 0 = 10; mean 10/3; as a part of 20 rows 10/20
    values, returns = torch.tensor([1.0, 3.0, 5.0], requires_grad=True), torch.tensor([2.0, 0.0, 5.0])
    loss = value_loss(values, returns)
    loss.backward()
    assert loss.item() == pytest.approx(10 / 3) and value_loss(values, returns, 20).item() == pytest.approx(0.5)
    assert values.grad.tolist() == pytest.approx([-2 / 3, 2, 0])  # 2 (V - R) / 3


def test_rows_that_do_not_count_add_nothing_to_the_value_loss():
    values, returns = torch.tensor([1.0, 3.0, 5.0], requires_grad=True), torch.tensor([2.0, 0.0, 1000.0])
    loss = value_loss(values, returns, 20, torch.tensor([True, True, False]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and values.grad.tolist() == pytest.approx([-0.1, 0.3, 0])


@pytest.mark.parametrize(("values", "returns"), [((4,), (4, 1)), ((4, 1), (4, 1)), ((4,), (1,))])
def test_value_loss_refuses_shapes_that_would_broadcast(values, returns):
    with pytest.raises(ValueError, match=r"must both be \[B\]"):
        value_loss(torch.zeros(values), torch.zeros(returns))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2, 3], 1.0),  # perfect
        ([6.0, 7, 8], 1.0),  # a constant error does not matter
        ([9.0, 9, 9], 0.0),  # a constant
        ([3.0, 2, 1], -3.0),  # errors -2, 0, 2: variance 8/3 against 2/3
        ([1.0, 2, 2], 2 / 3),  # errors 0, 0, 1: variance 2/9 against 2/3
    ],
)
def test_explained_variance_by_hand(values, expected):
    assert explained_variance(torch.tensor(values), torch.tensor([1.0, 2, 3])) == pytest.approx(expected, abs=1e-6)


def test_explained_variance_of_constant_returns_is_not_a_number_so_none():
    assert explained_variance(torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 4, 4])) is None


def test_tokens_of_some_dimensions_are_those_of_every_executed_action():
    executed = token_mask(torch.tensor([3, 1]), chunk_size=3, action_dim=3)
    expected = [[0, 1, 1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert of_dims(executed, [1, 2], action_dim=3).int().tolist() == expected
    assert torch.equal(of_dims(executed, [2, 0, 1], action_dim=3), executed)


@pytest.mark.parametrize(
    ("level", "num_dims", "tokens"),
    [("token", 7, 1), ("action", 7, 7), ("chunk", 7, 56), ("action", 3, 3), ("chunk", 3, 24)],
)
def test_a_ratio_has_the_tokens_of_its_level_and_the_kl_is_their_sum(level, num_dims, tokens):
    """Each token twice as likely as before: k3 a token is 2 - 1 - log 2, and the log-ratio of a ratio tokens x log 2."""
    assert tokens_per_ratio(level, num_dims, chunk_size=8) == tokens
    mask = of_dims(torch.ones(1, 56, dtype=torch.bool), list(range(num_dims)), 7)
    summed, valid = sum_to_level(torch.full((1, 56), math.log(2)), mask, level, 7)
    assert summed[valid][0].item() == pytest.approx(tokens * math.log(2))
