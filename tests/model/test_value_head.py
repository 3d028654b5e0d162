"""The value head: its size, its precision, its start and its file."""

import pytest
import torch

from vla_rl.model.value_head import ValueHead


def head(seed: int = 0, hidden_size: int = 16, hidden_sizes=(8,)) -> ValueHead:
    return ValueHead(hidden_size, list(hidden_sizes), torch.Generator().manual_seed(seed))


def test_the_head_of_the_7b_model_has_4196353_parameters():
    # 4096*1024 + 1024 + 1024 + 1; without a generator, on the meta device: no 16 MB and no orthogonalisation
    with torch.device("meta"):
        assert sum(p.numel() for p in ValueHead(4096, [1024]).parameters()) == 4_196_353


@pytest.mark.parametrize(("hidden_sizes", "parameters"), [([], 17), ([8], 145), ([8, 4], 177), ([8, 4, 2], 185)])
def test_any_number_of_hidden_layers_works(hidden_sizes, parameters):
    # 16+1 = 17; 16*8+8 + 8+1 = 145; 136 + 8*4+4 + 4+1 = 177; 136 + 36 + 4*2+2 + 2+1 = 185
    made = head(hidden_sizes=hidden_sizes)
    assert sum(p.numel() for p in made.parameters()) == parameters
    assert made(torch.randn(5, 16)).shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_hidden_states_of_any_precision_give_float32_values(dtype):
    values = head()(torch.ones(3, 16, dtype=dtype))
    assert values.dtype == torch.float32 and values.shape == (3,)


def test_weights_are_float32():
    assert {p.dtype for p in head().parameters()} == {torch.float32}


@pytest.mark.parametrize("hidden_sizes", [[], [64], [64, 32]])
def test_values_start_at_zero_whatever_is_seen(hidden_sizes):
    made = head(hidden_size=256, hidden_sizes=hidden_sizes)
    assert (made(100 * torch.randn(200, 256, generator=torch.Generator().manual_seed(1))) == 0).all()


def test_biases_start_at_zero():
    assert all((p == 0).all() for name, p in head().named_parameters() if name.endswith("bias"))


def test_equal_generators_give_equal_heads_whatever_torchs_own_state_is():
    torch.manual_seed(1)
    first = head(seed=5)
    torch.manual_seed(2)
    second, third = head(seed=5), head(seed=6)
    weights = [made.mlp[0].weight for made in (first, second, third)]
    assert torch.equal(*weights[:2]) and not torch.equal(*weights[1:])


def test_the_gradient_reaches_the_last_layer_at_once_and_everything_after_one_step():
    hidden = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    made = head(hidden_sizes=[8, 4])
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-4)
    made(hidden).sum().backward()
    reached = {name for name, p in made.named_parameters() if p.grad.abs().sum() > 0}
    assert reached == {"mlp.4.weight", "mlp.4.bias"} and hidden.grad.abs().sum() == 0
    optimizer.step()
    made(hidden).sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())


def test_the_head_can_learn_a_value():
    made = head()
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    target = torch.where(hidden[:, 0] > 0, 1.0, 0.0)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (made(hidden) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02  # a constant leaves 0.25
