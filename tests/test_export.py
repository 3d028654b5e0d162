"""python -m vla_rl.export: what a run has learned, as a thing of its own that acts as the run does."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes import last_of_each
from tests.model.policies import make_obs
from vla_rl import export as command
from vla_rl.evaluation.play import evaluate_policy, evaluation_episodes
from vla_rl.evaluation.subject import build_subject, of_checkpoint, of_run
from vla_rl.export import main
from vla_rl.learning.parts import build_policy
from vla_rl.model import policy as policy_module
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.run.checkpoint import write_checkpoint
from vla_rl.run.load_settings import load_config, save_config
from vla_rl.simulation.vector_env import make_vector_env

TINY = "configs/tiny_gae_ppo.yaml"
SUITE = {"env.task_suite": "libero_spatial"}


def write_run(folder: Path, *overrides: str, seed: int = 0, size: float = 0.02) -> Path:
    """A run folder with one checkpoint, whose LoRA weights are others than in the beginning."""
    config = load_config(TINY, last_of_each("policy.lora.rank=2", "policy.lora.alpha=4", *overrides))
    policy = build_policy(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))

    def write(checkpoint: Path) -> None:
        policy.save_adapter(checkpoint / "adapter")
        save_config(config, checkpoint / "config.yaml")

    folder.mkdir()
    write_checkpoint(folder / "checkpoints", "iteration-000001", policy.fingerprint(), write, keep=9)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Three runs that differ in their seed; the last one's rank and scaling are others, too."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "a", seed=1),
        write_run(folder / "b", seed=2),
        write_run(folder / "c", "policy.lora.rank=3", "policy.lora.alpha=3", seed=3),
    ]


def export(*argv: object) -> int:
    return main([str(arg) for arg in argv])


def of_run_(run: Path) -> OpenVLAPolicy:
    return build_subject(of_run(str(run), [], {}))[0]


def of_model(model: Path) -> OpenVLAPolicy:
    return build_subject(of_checkpoint(str(model), None, [], SUITE))[0]


def logprobs(policy: OpenVLAPolicy, other: OpenVLAPolicy) -> list[torch.Tensor]:
    """Of both, of the tokens that the first one samples."""
    obs = make_obs()
    tokens = policy.act(obs, generator=torch.Generator().manual_seed(0)).action_tokens
    return [p.logprobs(p.prepare(obs), tokens, temperature=1.0) for p in (policy, other)]


# merged


def test_a_merged_model_is_one_of_its_own_that_knows_how_it_is_used(runs, tmp_path, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "new/merged"
    assert export(runs[0], out) == 0
    assert "saved in float32: 100.0% of the adapter's change of the weights survives the rounding" in caplog.text
    merged = of_model(out)
    assert merged.adapter is None
    torch.testing.assert_close(*logprobs(of_run_(runs[0]), merged), atol=1e-4, rtol=0)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}
    told = json.loads((out / "trained_as.json").read_text())
    assert told == json.loads((TRAINED / "trained_as.json").read_text())
    assert sorted(path.name for path in out.parent.iterdir()) == ["merged"]


def test_bfloat16_says_how_much_is_lost(runs, tmp_path, caplog):
    caplog.set_level("INFO")
    small = write_run(tmp_path / "small", "env.image_size=64", "policy.as_trained=false", size=1e-3)
    assert export(small, tmp_path / "merged", "--dtype", "bfloat16") == 0
    said = next(r.getMessage() for r in caplog.records if "survives" in r.getMessage())
    assert said.startswith("saved in bfloat16: ") and float(said.split("%")[0].split()[-1]) < 90
    assert {t.dtype for t in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged/trained_as.json").read_text())["image_size"] == 64  # as the run saw the world


def test_lora_weights_of_peft_are_merged_into_the_model_that_is_named(runs, tmp_path):
    adapter = shutil.copytree(runs[0] / "checkpoints/iteration-000001/adapter", tmp_path / "adapter")
    arguments = ["--checkpoint", "tiny-openvla", "--adapter", adapter, tmp_path / "merged"]
    assert export(*arguments) == 0
    expected = of_run_(runs[0])
    torch.testing.assert_close(*logprobs(expected, of_model(tmp_path / "merged")), atol=1e-4, rtol=0)
    assert (tmp_path / "merged/trained_as.json").read_text() == (TRAINED / "trained_as.json").read_text()


@pytest.mark.libero
@pytest.mark.parametrize("states", [[1], pytest.param(range(10), marks=pytest.mark.slow)])
def test_a_merged_checkpoint_succeeds_where_base_and_adapter_do(tmp_path, states):
    """State 1 in 81 steps; of the ten it fails in some."""
    run = write_run(tmp_path / "run", size=0.01)
    assert export(run, tmp_path / "merged") == 0
    config = load_config(TINY, ["env.num_workers=1"])
    policies = [of_run_(run), of_model(tmp_path / "merged")]
    transform, played = policies[0].processor.image_transform, []
    with closing(make_vector_env(config, min(2, len(states)), evaluation=True, image_transform=transform)) as envs:
        for policy in policies:
            episodes = evaluation_episodes([0], states)
            results = evaluate_policy(policy, envs, episodes, mode="greedy", seed=0, progress=False, temperature=1)
            played.append([(r.episode.initial_state, r.success, r.length) for r in results])
    assert played[0] == played[1] and any(success for _, success, _ in played[0])


# the mean


def change_of(policy: OpenVLAPolicy, name: str) -> torch.Tensor:
    return policy.network.get_submodule(name).get_delta_weight("default")


def test_the_mean_of_runs_is_an_adapter_of_the_summed_rank_that_everything_takes(runs, tmp_path):
    out = tmp_path / "mean"
    assert export("--average", *runs, out, "--as", "adapter") == 0
    mean = build_subject(of_checkpoint("tiny-openvla", str(out), [], SUITE))[0]
    assert (mean.lora.rank, mean.lora.alpha) == (7, 14)
    parts = [of_run_(run) for run in runs]
    for name in ("language_model.model.layers.1.mlp.down_proj", "vision_backbone.featurizer.blocks.0.attn.qkv"):
        expected = sum(change_of(part, name) for part in parts) / 3
        torch.testing.assert_close(change_of(mean, name), expected, atol=1e-6, rtol=1e-4)
    build_policy(load_config(TINY, ["policy.lora.rank=7", "policy.lora.alpha=14", f"policy.adapter={out}"]))
    plain = OpenVLAPolicy.from_checkpoint("tiny-openvla", "parallel", use_proprio=True, unnorm_key="libero_spatial")
    peft.PeftModel.from_pretrained(plain.network, out)
    torch.testing.assert_close(*logprobs(mean, plain), atol=1e-4, rtol=0)


def test_the_merged_mean_acts_as_its_adapter(runs, tmp_path):
    assert export("--average", runs[0], runs[2], tmp_path / "adapter", "--as", "adapter") == 0
    assert export("--average", runs[0], runs[2], tmp_path / "merged") == 0
    mean = build_subject(of_checkpoint("tiny-openvla", str(tmp_path / "adapter"), [], SUITE))[0]
    torch.testing.assert_close(*logprobs(mean, of_model(tmp_path / "merged")), atol=1e-4, rtol=0)
    assert not (tmp_path / "merged/mean").exists()


def test_one_run_as_an_adapter_is_its_own(runs, tmp_path):
    assert export(runs[0], tmp_path / "one", "--as", "adapter") == 0
    theirs, ours = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (runs[0] / "checkpoints/iteration-000001/adapter", tmp_path / "one")
    )
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_runs_of_other_bases_layers_or_policies_have_no_mean(runs, tmp_path, capsys):
    out = tmp_path / "out"
    other = write_run(tmp_path / "base", "policy.checkpoint=tiny-openvla-random", "policy.as_trained=false")
    layers = write_run(tmp_path / "layers", "policy.lora.target_modules=language-model")
    chunks = write_run(tmp_path / "chunks", "policy.chunk_size=4", "policy.as_trained=false")
    for run, words in (
        (other, "were trained on different bases, so their changes have no mean"),
        (layers, "policy.lora.target_modules (all-linear -> language-model)"),
        (chunks, "have no mean: policy.chunk_size (8 -> 4)"),
    ):
        assert export("--average", runs[0], run, out) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert export("--average", runs[0], layers, out, "--as", "adapter") == 2
    assert "adapt other layers" in capsys.readouterr().err
    assert not out.exists()


def test_a_base_that_is_not_told_is_taken_for_the_others_with_a_warning(runs, tmp_path, caplog):
    adapter = shutil.copytree(runs[1] / "checkpoints/iteration-000001/adapter", tmp_path / "peft")
    save_file(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.safetensors")
    assert export("--average", runs[0], adapter, tmp_path / "out", "--as", "adapter") == 0
    assert f"{adapter} does not tell its base" in caplog.text


# whole or not at all


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(runs, tmp_path, monkeypatch, end, capsys):
    def fails(folder, *args, **kwargs):
        (folder / "model.safetensors").write_text("half")
        raise end

    monkeypatch.setattr(policy_module, "save_checkpoint", fails)
    assert export(runs[0], tmp_path / "out") == (130 if end is KeyboardInterrupt else 1)
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


def test_mistakes_are_told_before_the_model_loads(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "build_policy", lambda config: pytest.fail("the model was loaded"))
    run, out, there = runs[0], tmp_path / "out", tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("kept")
    peft_folder = shutil.copytree(run / "checkpoints/iteration-000001/adapter", tmp_path / "peft")
    moved = shutil.copytree(run, tmp_path / "moved")
    settings = moved / "checkpoints/iteration-000001/config.yaml"
    settings.write_text(settings.read_text().replace("checkpoint: tiny-openvla", "checkpoint: /nowhere/model"))
    manifest = settings.with_name("manifest.json")
    entries = json.loads(manifest.read_text())
    del entries["files"]["config.yaml"]
    manifest.write_text(json.dumps(entries))
    monkeypatch.setattr(command.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    for argv, words in (
        ([run, there], "there exists, and the last path is the folder to make"),
        ([run, run], "exists, and the last path"),
        ([out], "nothing to export to"),
        ([run, run, out], "2 RUNs; --average exports their mean"),
        (["--average", run, out], "--average takes two RUNs or more"),
        ([run, out, "--as", "adapter", "--dtype", "bfloat16"], "without --dtype"),
        ([tmp_path / "no", out], "no: no such folder; give a run's"),
        ([there, out], "there has no adapter_config.json; give a run, one of its checkpoints"),
        ([run / "checkpoints/best", out], "no evaluation's checkpoint is kept there"),
        ([peft_folder, out], "tells nothing of its base; give it with --checkpoint MODEL"),
        ([run, out, "policy.chunk_size=4"], "a run is exported as it was trained, without policy.chunk_size=4"),
        ([moved, out], "/nowhere/model; give a folder"),
        ([moved, out], "if it was moved, --checkpoint says where it is now"),
        ([run, there / "file/out"], "file is no folder that can be written to"),
    ):
        assert export(*argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, (argv, error)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**5))
    assert export(run, out) == 2 and "GB free in" in capsys.readouterr().err
    assert not out.exists() and (there / "file").read_text() == "kept"


def test_a_base_that_was_moved_is_told_where_it_is(runs, tmp_path):
    assert export(runs[0], tmp_path / "merged", "--checkpoint", TRAINED) == 0
    assert (tmp_path / "merged/config.json").exists()


def test_another_base_is_refused(runs, tmp_path, capsys):
    assert export(runs[0], tmp_path / "merged", "--checkpoint", "tiny-openvla-random") == 2
    assert "was trained on another base than this one" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
