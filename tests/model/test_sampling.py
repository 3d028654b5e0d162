"""vla_rl/model/sampling.py: what is drawn follows the probabilities and the row's own generator."""

from __future__ import annotations

import pytest
import torch

from vla_rl.model.sampling import draw_noise, mean_index, pick, tempered


def test_a_row_with_its_own_generator_draws_what_it_draws_alone():
    probs = torch.rand(3, 5, 256, generator=torch.Generator().manual_seed(0))

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]

    def draw(probs, generator):
        return pick(probs, draw_noise(probs.shape[1:], generator, len(probs)))

    together, order = draw(probs, generators()), [2, 0]
    assert together.shape == (3, 5)
    assert torch.equal(draw(probs[order], [generators()[i] for i in order]), together[order])
    assert torch.equal(draw(probs[1:2], torch.Generator().manual_seed(8)), together[1:2])
    once = torch.nn.functional.one_hot(torch.tensor([[3, 250]] * 3), 256).float()
    assert draw(once, generators()).tolist() == [[3, 250]] * 3
    with pytest.raises(ValueError, match=r"2 generators for 3 rows"):
        draw(probs, generators()[:2])


@pytest.mark.parametrize("shape", [(3, 256), (3, 5, 256)])
def test_each_row_has_its_own_temperature_or_all_have_one(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    each = tempered(logits, torch.tensor([1.0, 0.5, 0.7]))
    assert all(each[i].equal(logits[i] / t) for i, t in enumerate((1.0, 0.5, 0.7)))
    assert tempered(logits, torch.tensor([0.7])).equal(logits / 0.7)


@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_picked_is_what_torch_multinomial_draws(rows):
    probs = torch.softmax(3 * torch.randn(rows, 56, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    ours, torchs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    expected = torch.multinomial(probs.flatten(0, 1), 1, generator=torchs).view(rows, 56)
    assert pick(probs, draw_noise((56, 256), ours, rows)).equal(expected)
    assert ours.get_state().equal(torchs.get_state())
    torch.manual_seed(2)
    expected = torch.multinomial(probs.flatten(0, 1), 1).view(rows, 56)
    torch.manual_seed(2)
    assert pick(probs, draw_noise((56, 256), None, rows)).equal(expected)


def test_the_mean_index_is_that_of_a_long_row_of_draws():
    probs = torch.softmax(3 * torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    draws = torch.multinomial(
        probs.flatten(0, 1), 100_000, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    error = 5 * 256 / 12**0.5 / 100_000**0.5  # of a mean of draws that are wider than these
    assert (mean_index(probs).flatten() - draws.double().mean(dim=-1)).abs().max() < 0.5 + error
    two = torch.zeros(256)
    two[[10, 21]] = torch.tensor([0.25, 0.75])
    assert mean_index(two).item() == 18  # 18.25
    assert mean_index(torch.eye(256)).equal(torch.arange(256))
