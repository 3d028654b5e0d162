"""vla_rl/model/sampling.py: what is drawn follows the probabilities and the row's own generator."""

from __future__ import annotations

import pytest
import torch

from vla_rl.model.sampling import draw


def test_a_row_with_its_own_generator_draws_what_it_draws_alone():
    probs = torch.rand(3, 5, 256, generator=torch.Generator().manual_seed(0))

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]

    together, order = draw(probs, generators()), [2, 0]
    assert together.shape == (3, 5)
    assert torch.equal(draw(probs[order], [generators()[i] for i in order]), together[order])
    assert torch.equal(draw(probs[1:2], torch.Generator().manual_seed(8)), together[1:2])
    once = torch.nn.functional.one_hot(torch.tensor([[3, 250]] * 3), 256).float()
    assert draw(once, generators()).tolist() == [[3, 250]] * 3
    with pytest.raises(ValueError, match=r"shorter"):
        draw(probs, generators()[:2])
