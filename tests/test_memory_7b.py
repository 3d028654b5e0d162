"""tests/bench/memory_7b.py: its counts are those of the network and of what bitsandbytes packs."""

import importlib.util
import json

import pytest
import torch

from tests.bench.memory_7b import SHAPES, bytes_of_base, count_of_adapters, main
from tests.model.policies import RECORDED
from vla_rl.model.prismatic import Prismatic
from vla_rl.model.prismatic_config import read_config


@pytest.fixture(scope="module")
def shapes():
    return json.loads(SHAPES.read_text())["openvla"]


@pytest.mark.parametrize(("language_model_only", "expected"), [(False, 107_862_016), (True, 79_953_920)])
def test_adapters_are_those_of_the_layers_that_the_network_names(shapes, tmp_path, language_model_only, expected):
    raw = json.loads((RECORDED / "config.json").read_text())
    del raw["_tiny_timm_overrides"]
    raw["text_config"] = {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        network = Prismatic(read_config(tmp_path))
    layers = [network.get_submodule(name) for name in network.adaptable_linears(language_model_only)]
    count = sum(32 * (layer.in_features + layer.out_features) for layer in layers)
    # of the language model, by hand: 32 layers x 32 x (4 x 8192 + 3 x 15104) = 79.95 M
    assert count_of_adapters(shapes, 32, language_model_only) == count == expected


def test_bfloat16_base_is_two_bytes_a_weight(shapes):
    assert bytes_of_base(shapes) == 2 * 7_541_237_184


def test_nf4_base_packs_the_language_models_layers(shapes):
    # by hand: 32 x (4 x 4096^2 + 3 x 4096 x 11008) = 6.476 G weights of (4 + 8/64 + 32/(64 x 256)) / 8 bytes, the rest 2 bytes
    packed = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    expected = packed * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * (7_541_237_184 - packed)
    assert bytes_of_base(shapes, "nf4") == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(5.47e9, rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="optional: requirements-4bit.txt")
def test_nf4_bytes_are_those_that_are_packed():
    from vla_rl.model.quantization import pack

    packed, state = pack(torch.randn(352, 128))
    tables = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    held = sum(t.numel() * t.element_size() for t in (packed, *tables))
    assert bytes_of_base({"language_model.model.layers.0.x.weight": [352, 128]}, "nf4") == held


def test_the_table_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["memory_7b"])
    main()
    assert "| nf4 | 5.10 GiB | 0.40 GiB | 0.40 GiB | 0.80 GiB | 6.70 GiB |" in capsys.readouterr().out
