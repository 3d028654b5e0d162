"""GAE and GRPO against numbers worked by hand and against the definitions, written as plain loops."""

import math

import pytest
import torch

from vla_rl.learning.advantages import compute_gae, compute_grpo_advantages, normalize, unbroken

NO = [False, False, False, False]


def column(*numbers) -> torch.Tensor:
    """[T, 1]"""
    return torch.tensor(numbers).unsqueeze(1)


def gae_of_column(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    advantages, returns = compute_gae(
        *(column(*x) for x in (rewards, values, next_values, terminated, truncated)), gamma, gae_lambda
    )
    return advantages[:, 0].tolist(), returns[:, 0].tolist()


def random_rollout(seed: int, steps: int = 40, num_envs: int = 3) -> dict[str, torch.Tensor]:
    """Flags exclude each other, as the environment's do; next_values are the next row's but at the ends."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(steps + 1, num_envs, generator=generator)
    kind = torch.rand(steps, num_envs, generator=generator)
    terminated, truncated = kind < 0.08, (kind > 0.08) & (kind < 0.16)
    next_values = torch.where(truncated, torch.randn(steps, num_envs, generator=generator), values[1:])
    return {
        "rewards": torch.randn(steps, num_envs, generator=generator),
        "values": values[:-1],
        "next_values": next_values,
        "terminated": terminated,
        "truncated": truncated,
    }


# by hand


def test_an_episode_that_goes_on_by_hand():
    # gamma 0.5, lambda 0.5: gamma lambda = 0.25
    # delta = r + 0.5 next - v:  1 + 0.5*2 - 1 = 1;  0 + 0.5*4 - 2 = 0;  2 + 0.5*6 - 4 = 1
    # A_2 = 1;  A_1 = 0 + 0.25*1 = 0.25;  A_0 = 1 + 0.25*0.25 = 1.0625;  returns = A + v
    advantages, returns = gae_of_column([1.0, 0, 2], [1.0, 2, 4], [2.0, 4, 6], NO[:3], NO[:3], 0.5, 0.5)
    assert advantages == [1.0625, 0.25, 1.0]
    assert returns == [2.0625, 2.25, 5.0]


def test_success_in_the_middle_by_hand():
    # gamma 0.5, lambda 0.5; row 1 terminates: its delta is 1 - 2 = -1 without next_values, and nothing flows in
    # delta_0 = 0 + 0.5*2 - 1 = 0;  delta_2 = 0 + 0.5*8 - 3 = 1;  delta_3 = 0 + 0.5*4 - 8 = -6
    # A_3 = -6;  A_2 = 1 + 0.25*(-6) = -0.5;  A_1 = -1;  A_0 = 0 + 0.25*(-1) = -0.25
    advantages, returns = gae_of_column(
        [0.0, 1, 0, 0], [1.0, 2, 3, 8], [2.0, 3, 8, 4], [False, True, False, False], NO, 0.5, 0.5
    )
    assert advantages == [-0.25, -1.0, -0.5, -6.0]
    assert returns == [0.75, 1.0, 2.5, 2.0]


def test_a_time_limit_in_the_middle_by_hand():
    # as above, but row 1 is truncated in a state of value 10: delta_1 = 1 + 0.5*10 - 2 = 4, and still nothing flows in
    # A_3 = -6;  A_2 = -0.5;  A_1 = 4;  A_0 = 0 + 0.25*4 = 1
    advantages, returns = gae_of_column(
        [0.0, 1, 0, 0], [1.0, 2, 3, 8], [2.0, 10, 8, 4], NO, [False, True, False, False], 0.5, 0.5
    )
    assert advantages == [1.0, 4.0, -0.5, -6.0]
    assert returns == [2.0, 6.0, 2.5, 2.0]


# the definition


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (1.0, 1.0), (0.7, 0.3)])
def test_gae_is_the_sum_of_discounted_td_errors_of_the_same_episode(seed, gamma, gae_lambda):
    rollout = random_rollout(seed)
    advantages, _ = compute_gae(**rollout, gamma=gamma, gae_lambda=gae_lambda)
    data = {name: tensor.tolist() for name, tensor in rollout.items()}
    steps, num_envs = rollout["rewards"].shape

    def td_error(t: int, n: int) -> float:
        future = 0.0 if data["terminated"][t][n] else gamma * data["next_values"][t][n]
        return data["rewards"][t][n] + future - data["values"][t][n]

    for n in range(num_envs):
        for start in range(steps):
            total = 0.0
            for t in range(start, steps):
                total += (gamma * gae_lambda) ** (t - start) * td_error(t, n)
                if data["terminated"][t][n] or data["truncated"][t][n]:
                    break
            assert advantages[start, n].item() == pytest.approx(total, abs=1e-4)


def test_lambda_zero_is_the_one_step_td_error():
    rollout = random_rollout(1)
    advantages, _ = compute_gae(**rollout, gamma=0.9, gae_lambda=0.0)
    for t, n in [(t, n) for t in range(40) for n in range(3)]:
        target = rollout["rewards"][t, n].item()
        if not rollout["terminated"][t, n]:
            target += 0.9 * rollout["next_values"][t, n].item()
        assert advantages[t, n].item() == pytest.approx(target - rollout["values"][t, n].item(), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_with_lambda_one_the_returns_are_discounted_rewards_and_the_bootstrapped_end(seed):
    rollout = random_rollout(seed)
    _, returns = compute_gae(**rollout, gamma=0.9, gae_lambda=1.0)
    steps, num_envs = rollout["rewards"].shape
    for n in range(num_envs):
        for start in range(steps):
            total, discount = 0.0, 1.0
            for t in range(start, steps):
                total += discount * rollout["rewards"][t, n].item()
                discount *= 0.9
                if rollout["terminated"][t, n]:
                    break
                if rollout["truncated"][t, n] or t == steps - 1:
                    total += discount * rollout["next_values"][t, n].item()
                    break
            assert returns[start, n].item() == pytest.approx(total, abs=1e-4)


def test_advantages_are_zero_where_the_values_are_the_true_returns():
    # reward 1 at the end of a 3-step episode, gamma 0.5: V = 0.25, 0.5, 1
    advantages, _ = gae_of_column([0.0, 0, 1], [0.25, 0.5, 1], [0.5, 1, 7], [False, False, True], NO[:3], 0.5, 0.9)
    assert advantages == [0, 0, 0]


# the ends of episodes


@pytest.mark.parametrize("huge", [1e30, -1e30, math.inf])
def test_a_terminated_step_ignores_the_value_of_the_next_state(huge):
    rollout = random_rollout(2)
    assert rollout["terminated"].any()
    changed = rollout | {"next_values": rollout["next_values"].masked_fill(rollout["terminated"], huge)}
    for first, second in zip(
        compute_gae(**rollout, gamma=0.99, gae_lambda=0.95),
        compute_gae(**changed, gamma=0.99, gae_lambda=0.95),
        strict=True,
    ):
        assert torch.equal(first, second)


def test_a_truncated_step_bootstraps_but_does_not_leak():
    flags = (NO[:3], [False, True, False])
    first, _ = gae_of_column([0.0, 0, 0], [0.0, 0, 0], [0.0, 1, 0], *flags, 0.9, 0.9)
    other_future, _ = gae_of_column([0.0, 0, 99], [0.0, 0, 55], [0.0, 1, 77], *flags, 0.9, 0.9)
    other_bootstrap, _ = gae_of_column([0.0, 0, 0], [0.0, 0, 0], [0.0, 2, 0], *flags, 0.9, 0.9)
    assert first[:2] == other_future[:2]  # the next episode does not matter
    assert other_bootstrap[1] == pytest.approx(2 * first[1]) and first[1] == pytest.approx(0.9)


def test_the_last_row_bootstraps_from_the_state_that_was_reached():
    advantages, _ = gae_of_column([1.0], [2.0], [10.0], [False], [False], 0.9, 0.95)
    assert advantages == pytest.approx([1 + 9 - 2])


def test_environments_do_not_mix():
    rollout = random_rollout(3)
    together = compute_gae(**rollout, gamma=0.99, gae_lambda=0.95)[0]
    for n in range(3):
        alone = compute_gae(**{k: v[:, n : n + 1] for k, v in rollout.items()}, gamma=0.99, gae_lambda=0.95)[0]
        assert torch.equal(together[:, n : n + 1], alone)


def test_the_arguments_are_left_alone():
    rollout = random_rollout(4)
    before = {name: tensor.clone() for name, tensor in rollout.items()}
    compute_gae(**rollout, gamma=0.99, gae_lambda=0.95)
    assert all(torch.equal(before[name], rollout[name]) for name in rollout)


@pytest.mark.parametrize("name", ["rewards", "values", "next_values", "terminated", "truncated"])
def test_gae_refuses_another_shape_instead_of_broadcasting(name):
    rollout = random_rollout(0)
    with pytest.raises(ValueError, match=r"\[40, 1\]"):
        compute_gae(**rollout | {name: rollout[name][:, :1]}, gamma=0.9, gae_lambda=0.9)


def test_gae_refuses_a_missing_time_or_environment_axis():
    with pytest.raises(ValueError, match=r"must be \[T, N\]"):
        compute_gae(**{k: v[:, 0] for k, v in random_rollout(0).items()}, gamma=0.9, gae_lambda=0.9)


@pytest.mark.parametrize("name", ["terminated", "truncated"])
def test_gae_refuses_flags_that_are_not_bool(name):
    rollout = random_rollout(0)
    with pytest.raises(ValueError, match=r"must be bool \[40, 3\], got .*torch\.float32"):
        compute_gae(**rollout | {name: rollout[name].float()}, gamma=0.9, gae_lambda=0.9)


# GRPO


def test_grpo_by_hand():
    # group 1, 0, 0, 0: mean 1/4; deviations 3/4, -1/4 x3; variance with n - 1: (9 + 1 + 1 + 1)/16/3 = 1/4; std 1/2
    # A = 3/2, -1/2, -1/2, -1/2
    advantages, informative = compute_grpo_advantages(torch.tensor([1.0, 0, 0, 0]), 4)
    assert advantages.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert informative.tolist() == [True] * 4


def test_grpo_with_two_episodes_by_hand():
    # 5 and 3: mean 4, std with n - 1 = sqrt(2); A = +-1/sqrt(2)
    advantages, _ = compute_grpo_advantages(torch.tensor([5.0, 3.0]), 2)
    assert advantages.tolist() == pytest.approx([0.7071068, -0.7071068], abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_uniform_group_has_no_advantage_and_is_marked(value):
    advantages, informative = compute_grpo_advantages(torch.tensor([value] * 3 + [0.0, 1.0, 0.0]), 3)
    assert advantages[:3].tolist() == [0, 0, 0]
    assert informative.tolist() == [False] * 3 + [True] * 3


def test_groups_do_not_mix():
    first, second = torch.tensor([1.0, 0, 0]), torch.tensor([100.0, 300, 500])
    together, _ = compute_grpo_advantages(torch.cat([first, second]), 3)
    alone = [compute_grpo_advantages(group, 3)[0] for group in (first, second)]
    assert torch.equal(together, torch.cat(alone))
    assert together[3:].tolist() == pytest.approx([-1, 0, 1])


def test_group_advantages_do_not_depend_on_the_scale_or_offset_of_the_returns():
    returns = torch.tensor([1.0, 0, 0, 1, 1, 0])
    first, _ = compute_grpo_advantages(returns, 3)
    second, _ = compute_grpo_advantages(10 * returns + 5, 3)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("shape", "group_size"), [((7,), 2), ((4,), 1), ((4,), 0), ((2, 4), 4)])
def test_returns_that_make_no_groups_are_refused(shape, group_size):
    with pytest.raises(ValueError, match="cannot be split into groups of"):
        compute_grpo_advantages(torch.zeros(shape), group_size)


# normalize


def test_normalize_by_hand():
    # 1, 2, 3, 4, 5 (mean 3, variance 2): -2/sqrt(2) = -1.4142136, ...
    expected = torch.tensor([-1.4142136, -0.7071068, 0, 0.7071068, 1.4142136])
    torch.testing.assert_close(normalize(torch.arange(1.0, 6)), expected)


def test_normalize_is_over_all_entries_and_keeps_the_shape():
    x = normalize(torch.tensor([[0.0, 10.0], [0.0, 10.0]]))
    torch.testing.assert_close(x, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))


def test_normalize_of_equal_numbers_is_zero():
    assert normalize(torch.full((4,), 3.0)).tolist() == [0, 0, 0, 0]


def test_rows_of_an_episode_that_is_broken_off_do_not_count():
    """Three environments: broken in row 1; ended in row 0 and broken in row 2; going on at the end."""
    ended = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    broken = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    expected = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 1, 1]], dtype=torch.bool)
    assert torch.equal(unbroken(ended, broken), expected)
    assert unbroken(ended, torch.zeros_like(ended)).all()
    with pytest.raises(ValueError, match="not both true"):
        unbroken(ended, ended)


def test_normalized_entries_that_do_not_count_have_no_part_in_mean_and_variance():
    x, counts = torch.tensor([[1.0, 3.0], [100.0, 2.0]]), torch.tensor([[True, True], [False, True]])
    torch.testing.assert_close(normalize(x, counts)[counts], normalize(torch.tensor([1.0, 3.0, 2.0])))
