"""AdamW from settings: a resumed optimizer has the moments of before and the settings of now."""

import pytest
import torch

from vla_rl.learning.optimizer import adamw, load_optimizer
from vla_rl.run.settings import ActorConfig


def test_the_settings_arrive():
    settings = ActorConfig(learning_rate=3e-3, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    (group,) = adamw([torch.nn.Parameter(torch.ones(2))], settings).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-3, 0.1, (0.8, 0.9), 1e-6)


def test_a_resumed_optimizer_has_the_moments_of_before_and_the_settings_of_now():
    weight = torch.nn.Parameter(torch.ones(2))
    before = adamw([weight], ActorConfig(learning_rate=1e-3))
    weight.grad = torch.tensor([1.0, 2.0])
    before.step()
    after = adamw([weight], ActorConfig())
    load_optimizer(after, before.state_dict(), ActorConfig(learning_rate=5e-4, weight_decay=0.2))
    assert torch.equal(after.state[weight]["exp_avg"], before.state[weight]["exp_avg"])
    assert (after.param_groups[0]["lr"], after.param_groups[0]["weight_decay"]) == (5e-4, 0.2)


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {},
        {"state": [], "param_groups": []},
        {"state": {0: {}}},
        {"state": {1: None}},
        {"state": {0: {"step": torch.zeros(()), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(2)}}},
        {"state": {0: {"step": torch.zeros(()), "exp_avg": torch.zeros(2, dtype=int), "exp_avg_sq": torch.zeros(2)}}},
        {"state": {0: {"step": 1.0, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}},
    ],
)
def test_what_is_no_state_of_it_is_refused(state):
    optimizer = adamw([torch.nn.Parameter(torch.ones(2))], ActorConfig())
    with pytest.raises(ValueError, match="an optimizer's"):
        load_optimizer(optimizer, state, ActorConfig())


def test_a_file_changes_nothing_but_the_moments():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = adamw([weight], ActorConfig())
    state = optimizer.state_dict()
    state["param_groups"][0] |= {"maximize": True, "amsgrad": True}
    load_optimizer(optimizer, state, ActorConfig())
    assert (optimizer.param_groups[0]["maximize"], optimizer.param_groups[0]["amsgrad"]) == (False, False)
