"""vla_rl/model/execution.py: recomputed, compiled or replayed, a network computes the same."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.model.policies import DECODERS, make_obs, make_policy, move_adapters
from vla_rl.model import execution
from vla_rl.model.execution import GRADIENT_CHECKPOINTING, CudaGraphs, compiles, fill_rows, row_size
from vla_rl.run.settings import ConfigError


def scored(policy, out):
    """Log-probabilities of an output's tokens, and their gradients."""
    evaluation = policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.0)
    (evaluation.logprobs.mean() + evaluation.hidden.pow(2).mean()).backward()
    gradients = [parameter.grad for parameter in policy.trainable_parameters()]
    for parameter in policy.trainable_parameters():
        parameter.grad = None
    return evaluation.logprobs.detach(), gradients


def act(policy, rows: int = 3, num_images: int = 1):
    return policy.act(make_obs(rows, num_images), generator=[torch.Generator().manual_seed(i) for i in range(rows)])


# ---------------------------------------------------------------------- recomputed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_images", [1, 2])  # two: and the proprioception
@pytest.mark.parametrize("decoder", DECODERS)
def test_gradients_are_bit_equal_in_every_mode(decoder, num_images, dtype):
    policy = make_policy(decoder, dtype=dtype, num_images=num_images, use_proprio=num_images == 2)
    move_adapters(policy)
    out = act(policy, num_images=num_images)
    results = {}
    for mode in GRADIENT_CHECKPOINTING:
        policy.set_gradient_checkpointing(mode)
        assert policy.gradient_checkpointing == mode
        results[mode] = scored(policy, out)
    assert all(g.abs().max() > 0 for g in results["none"][1])
    for mode in ("selective", "full"):
        assert results[mode][0].equal(results["none"][0])
        assert all(a.equal(b) for a, b in zip(results[mode][1], results["none"][1], strict=True))


def test_full_does_the_products_again_and_selective_does_not():
    policy = make_policy()
    out = act(policy)
    flops = {}
    for mode in GRADIENT_CHECKPOINTING:
        policy.set_gradient_checkpointing(mode)
        with FlopCounterMode(display=False) as counter:
            scored(policy, out)
        flops[mode] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.0)
    assert flops["selective"] == flops["none"]
    assert flops["full"] == pytest.approx(flops["none"] + counter.get_total_flops(), rel=0.1)


def test_full_keeps_less():
    policy = make_policy()
    out = act(policy)
    kept = {}
    for mode in ("none", "full"):  # selective keeps its own, which no hook sees
        policy.set_gradient_checkpointing(mode)
        seen: dict[int, int] = {}

        def pack(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            evaluation = policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.0)
        kept[mode] = sum(seen.values())
        evaluation.logprobs.sum().backward()
    assert kept["full"] < 0.5 * kept["none"]


def test_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="expected one of none, selective, full"):
        make_policy(gradient_checkpointing="some")


# ---------------------------------------------------------------------- compiled


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without code generation, which would take minutes: what is traced runs as the operations it is made of."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda forward, *, dynamic, options: compile(forward, dynamic=dynamic, backend="aot_eager")
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("decoder", ["parallel", pytest.param("autoregressive", marks=pytest.mark.slow)])
def test_one_trace_serves_all_blocks_of_a_kind(decoder, traced):
    inputs = {"num_images": 2, "use_proprio": True}
    plain, compiled = make_policy(decoder, **inputs), make_policy(decoder, **inputs, compiled=True)
    for policy in (plain, compiled):
        move_adapters(policy)
    expected, out = act(plain, num_images=2), act(compiled, num_images=2)
    assert out.action_tokens.equal(expected.action_tokens)
    torch.testing.assert_close(out.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    for ours, theirs in zip(scored(compiled, out)[1], scored(plain, out)[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
    # Llama, DINO, SigLIP, each with and without gradients; some first blocks read what needs none, or is laid out otherwise
    blocks = len(compiled.network.blocks())
    assert traced["stats"]["unique_graphs"] <= 9 < 2 * blocks
    assert not traced["graph_break"]
    before = traced["stats"]["unique_graphs"]
    act(compiled, rows=4, num_images=2)  # as many as 3 are filled up to
    scored(compiled, act(compiled, num_images=2))
    assert traced["stats"]["unique_graphs"] == before


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_compiled_kernels_act_and_score_alike_in_bfloat16(decoder):
    torch._dynamo.reset()
    plain, compiled = (make_policy(decoder, compiled=c, dtype=torch.bfloat16) for c in (False, True))
    for policy in (plain, compiled):
        move_adapters(policy)
    out = act(compiled)
    for mode in GRADIENT_CHECKPOINTING:
        compiled.set_gradient_checkpointing(mode)
        logprobs, gradients = scored(compiled, out)
        error = (logprobs - out.logprobs).abs()
        assert error.max() == 0 if decoder == "parallel" else error.mean() < 5e-3
        flat, expected = (torch.cat([g.flatten() for g in each]) for each in (gradients, scored(plain, out)[1]))
        assert torch.nn.functional.cosine_similarity(flat, expected, dim=0) > 0.98


def test_compiled_prompts_have_few_lengths(monkeypatch):
    monkeypatch.setattr(execution, "can_compile", lambda device: None)
    policy = make_policy(compiled=True, lora=None)
    ids, mask = policy.processor.tokenize(("Lift", "Lift"))
    assert mask.all()  # one length: nothing is padded, and attention needs no mask
    lengths = {policy.processor.tokenize((text,))[0].shape[1] for text in ("Lift", "lift it", "open the drawer")}
    assert all(length % 8 == 0 for length in lengths - {ids.shape[1]}) and len(lengths) <= 3
    assert policy.processor.tokenize(("Lift",))[0].shape[1] % 8 == 0


def test_rows_are_filled_up_to_few_sizes():
    assert [row_size(rows) for rows in (1, 3, 5, 9, 13, 17, 33, 64, 65, 100)] == [1, 4, 8, 12, 16, 24, 48, 64, 96, 128]
    filled = fill_rows([torch.arange(6).view(3, 2), None], 4)
    assert filled[0].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5]] and filled[1] is None


def test_compile_needs_a_compiler(monkeypatch, caplog):
    assert compiles("auto", "cpu") is compiles("false", "cuda") is False
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"policy.compile=true, but no g\+\+ or clang\+\+ .*apt-get install"):
        compiles("true", "cpu")
    assert compiles("auto", "cuda") is False
    assert "not compiled, which is slower: no gcc" in caplog.text
    with pytest.raises(ConfigError, match="compile nothing"):
        make_policy(compiled=True)


def test_compilations_are_kept_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("VLA_RL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    execution.keep_compilations()
    assert Path(os.environ.pop("TORCHINDUCTOR_CACHE_DIR")) == tmp_path / "vla_rl" / "torchinductor"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # not a folder: torch's own choice
    execution.keep_compilations()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


# ---------------------------------------------------------------------- CUDA graphs


class FakeGraph:
    """Replays by calling again, into the memory of the captured results."""

    def replay(self):
        for kept, new in zip(self.outputs, self.function(*self.inputs), strict=True):
            kept.copy_(new)


@pytest.fixture
def fake_cuda(monkeypatch):
    captures = []

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(graph, pool, stream):
        captures.append((pool, type(stream)))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return captures


def replayed(function) -> CudaGraphs:
    class Replayed(CudaGraphs):
        def capture(self, arguments):
            graph, inputs, outputs = super().capture(arguments)
            graph.function, graph.inputs, graph.outputs = self.function, inputs, outputs
            return graph, inputs, outputs

    return Replayed(function, "pool", torch.cuda.Stream())


def test_a_graph_is_captured_once_for_each_shape(fake_cuda):
    weight, calls = torch.ones(2), []

    def function(x, y):
        calls.append(len(x))
        return (2 * x * weight if y is None else x + y,)

    graphs = replayed(function)
    first = graphs(torch.tensor([1.0, 2.0]), None)
    assert calls == [2] * 4  # two to warm up, the capture, the first replay
    weight.mul_(10)  # in place, as an optimizer does
    second = graphs(torch.tensor([3.0, 4.0]), None)
    assert first[0].tolist() == [2, 4] and second[0].tolist() == [60, 80]  # the first result was copied out
    assert len(fake_cuda) == 1
    assert graphs(torch.ones(2), torch.ones(2))[0].tolist() == [2, 2]
    assert graphs(torch.ones(1), torch.ones(1))[0].tolist() == [2]
    assert fake_cuda == [("pool", torch.cuda.Stream)] * 3


def test_a_graph_is_captured_once_for_each_text(fake_cuda):
    graphs = replayed(lambda mode, x: (x + len(mode),))
    results = [graphs(mode, torch.tensor([x]))[0].item() for mode, x in (("a", 1), ("ab", 1), ("a", 5), ("ab", 5))]
    assert results == [2, 3, 6, 7] and len(fake_cuda) == 2
