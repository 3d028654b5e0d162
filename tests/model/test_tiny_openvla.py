"""vla_rl/model/tiny_openvla.py: the built-in checkpoint is the same everywhere, small, complete and of use for learning."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
from contextlib import closing
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from vla_rl.evaluation.play import evaluate_policy, evaluation_episodes
from vla_rl.model import tiny_openvla
from vla_rl.model.find_checkpoint import check_checkpoint
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.prismatic import load_network
from vla_rl.model.tiny_openvla import TRAINED, ensure_tiny_openvla, write_tiny_openvla
from vla_rl.run.load_settings import load_config
from vla_rl.run.task_suites import BASE_SUITES
from vla_rl.simulation.vector_env import make_vector_env


@pytest.fixture(scope="module")
def folder():
    return ensure_tiny_openvla()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_bytes_every_time_and_at_most_15_mb(folder, tmp_path):
    torch.manual_seed(123)  # the caller's randomness does not matter and is not used up
    before = torch.get_rng_state()
    write_tiny_openvla(tmp_path / "again")
    assert torch.get_rng_state().equal(before)
    assert contents(tmp_path / "again") == contents(folder)
    assert sum(map(len, contents(folder).values())) < 15e6


def test_process_that_comes_second_takes_what_the_first_made(folder, tmp_path, monkeypatch):
    target = tmp_path / "assets" / "tiny_openvla"

    def write_while_another_process_finishes(unfinished: Path) -> None:
        monkeypatch.setattr(tiny_openvla, "write_tiny_openvla", write_tiny_openvla)
        ensure_tiny_openvla(target)
        unfinished.mkdir()
        (unfinished / "half.txt").write_text("of the slower process")

    monkeypatch.setattr(tiny_openvla, "write_tiny_openvla", write_while_another_process_finishes)
    assert ensure_tiny_openvla(target) == target
    assert contents(target) == contents(folder)
    assert [path.name for path in target.parent.iterdir()] == ["tiny_openvla"]  # nothing half-made is left


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_openvla, "write_tiny_openvla", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure_tiny_openvla(tmp_path / "assets" / "tiny_openvla")
    assert not list((tmp_path / "assets").iterdir())


def test_older_recipe_is_made_anew(folder, tmp_path):
    target = tmp_path / "tiny_openvla"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"_tiny_recipe": 0}))
    assert contents(ensure_tiny_openvla(target)) == contents(folder)
    times = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    ensure_tiny_openvla(target)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == times  # made once


@pytest.mark.parametrize(
    "text", ["pick up the black bowl", "In: What?\nOut:", "café 字 🤖", "Zebra 42!", "<s> is text?"]
)
def test_any_text_is_encoded_without_loss(folder, text):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert max(ids) < 704 and tokenizer.token_to_id("<unk>") not in ids
    if "<s>" not in text:
        assert tokenizer.decode(ids) == text


@pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="libero is not installed")
def test_words_of_all_libero_instructions_are_one_token_each(folder):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    package = Path(importlib.util.find_spec("libero").submodule_search_locations[0])  # not imported: it asks questions
    source = (package / "libero" / "benchmark" / "libero_suite_task_map.py").read_text()
    tasks = ast.literal_eval(ast.parse(source).body[0].value)
    for suite in BASE_SUITES:
        for name in tasks[suite]:
            words = re.sub(r"^[A-Z_]*SCENE\d+_", "", name).split("_")
            assert len(tokenizer.encode(" ".join(words).lower(), add_special_tokens=False).ids) == len(words), name


def test_statistics_cover_every_suite(folder):
    statistics = json.loads((folder / "dataset_statistics.json").read_text())
    assert set(statistics) == {f"{suite}_no_noops" for suite in BASE_SUITES}
    for entry in statistics.values():
        for key, size in (("action", 7), ("proprio", 8)):
            low, high = entry[key]["q01"], entry[key]["q99"]
            assert len(low) == len(high) == size and all(a < b for a, b in zip(low, high, strict=True))
        assert entry["action"]["mask"] == [True] * 6 + [False]


@torch.no_grad()
def test_action_distribution_is_broad_but_not_uniform_and_depends_on_what_is_seen_and_read(folder):
    network = load_network(folder, use_proprio=True)
    generator = torch.Generator().manual_seed(0)
    pixels = F.interpolate(torch.randn(2, 6, 8, 8, generator=generator), size=112, mode="bilinear")[[0, 1, 0, 0]]
    ids = torch.tensor([[1, *range(300, 330)]] * 4)
    ids[2, 15] = 350
    proprio = torch.zeros(4, 8)
    proprio[3] += 0.3
    # rows 1, 2 and 3 differ from row 0 in the image, one word, the proprio
    prompt = network.embed_prompt(ids, torch.ones_like(ids), pixels, proprio)
    logits = network.action_logits(network.forward_slots(prompt, 56))  # [4, 56, 256]
    probs = logits.softmax(dim=-1)
    entropy = -(probs * probs.log()).sum(dim=-1).mean().item()
    assert math.log(256) - 1.5 < entropy < math.log(256) - 0.2
    assert probs.max() < 0.3
    assert all((logits[0] - logits[i]).std() > 0.1 for i in (1, 2, 3))  # of logits whose own deviation is 1
    assert logits[0].std(dim=0).mean() > 0.3  # the slots differ, though all their embeddings are zero


# the trained ones, in the repository


@pytest.mark.parametrize("name", ["tiny-openvla", "tiny-openvla-ppo"])
def test_the_trained_checkpoints_are_small_and_of_the_same_network(folder, name):
    found = check_checkpoint(name, use_proprio=True)
    names = {path.name for path in found.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "dataset_statistics.json"} <= names
    assert sum(path.stat().st_size for path in found.rglob("*")) <= 15e6
    trained, random = load_file(found / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {n: t.shape for n, t in trained.items()} == {n: t.shape for n, t in random.items()}
    assert not torch.equal(trained["language_model.lm_head.weight"], random["language_model.lm_head.weight"])


def test_the_trained_checkpoint_has_the_statistics_of_its_data():
    (statistics,) = json.loads((TRAINED / "dataset_statistics.json").read_text()).values()
    assert statistics["num_trajectories"] >= 300 and statistics["action"]["mask"] == [True] * 6 + [False]
    action = statistics["action"]
    assert all(-1 <= low < high <= 1 for low, high in zip(action["q01"], action["q99"], strict=True))


@pytest.mark.libero
@pytest.mark.parametrize(("checkpoint", "task"), [("tiny-openvla", 0), ("tiny-openvla-ppo", 2)])
def test_the_trained_checkpoints_solve_a_task_now_and_then(checkpoint, task):
    config = load_config(Path(__file__).parents[2] / "configs/tiny_gae_ppo.yaml")
    settings = config.policy
    policy = OpenVLAPolicy.from_checkpoint(
        checkpoint,
        settings.decoder,
        use_proprio=settings.use_proprio,
        chunk_size=settings.chunk_size,
        center_crop=settings.center_crop,
        unnorm_key="libero_spatial",
    )
    with closing(make_vector_env(config, 2)) as envs:
        episodes = evaluation_episodes([task], range(2))
        results = evaluate_policy(policy, envs, episodes, mode="greedy", temperature=1.0, seed=0, progress=False)
    assert sum(result.success for result in results) >= 1
