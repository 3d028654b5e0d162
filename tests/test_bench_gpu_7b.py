"""tests/bench/gpu_7b.py: its figures against numbers from elsewhere, and all of it at the small model's shapes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bench import gpu_7b
from tests.bench.gpu_figures import (
    TARGETS,
    Row,
    Target,
    busy_share,
    forward_flops,
    hours_per_million,
    table,
    timeline,
    union,
)
from tests.bench.gpu_model import TASK, Bench, InstantEnvs, random_network, write_small_files
from vla_rl.model import quantization
from vla_rl.model.checkpoint_folder import official_name
from vla_rl.model.prismatic import Prismatic
from vla_rl.model.prismatic_config import read_config
from vla_rl.run.load_settings import load_config
from vla_rl.types import Episode

ROOT = Path(__file__).parents[1]
TINY = ["--scale", "tiny", "--device", "cpu"]


@pytest.fixture(scope="module")
def shapes_7b(tmp_path_factory) -> Prismatic:
    folder = tmp_path_factory.mktemp("7b")
    write_small_files(folder, "7b")
    with torch.device("meta"):
        return Prismatic(read_config(folder))


def test_the_random_network_has_the_official_names_and_shapes(shapes_7b):
    official = json.loads((ROOT / "tests/data/state_dict_keys_7b.json").read_text())["openvla"]
    assert {official_name(name): list(p.shape) for name, p in shapes_7b.named_parameters()} == official


def test_a_row_of_345_tokens_takes_the_flops_that_were_counted_before(shapes_7b):
    """4.97 TFLOP a row, and 16 rows in 223 ms 354 TFLOP/s: counted for measurements on an H100 by another script."""
    flops = forward_flops(shapes_7b, 345)
    assert flops == pytest.approx(4.97e12, rel=0.01)
    assert 16 * flops / 0.223 == pytest.approx(354e12, rel=0.005)


def test_flops_are_those_of_the_published_sizes(shapes_7b):
    """Llama-2 7B: 32 layers; DINOv2 ViT-L/14 with 4 registers: 24; SigLIP SO400M/14: 27; of both the last one is not read."""
    llama = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 345 + 4 * 32 * 4096 * 345**2
    dino = 2 * 23 * (4 * 1024**2 + 2 * 1024 * 4096) * 261 + 4 * 23 * 1024 * 261**2  # 256 patches, class, registers
    siglip = 2 * 26 * (4 * 1152**2 + 2 * 1152 * 4304) * 256 + 4 * 26 * 1152 * 256**2
    projector = 2 * (2176 * 8704 + 8704 * 4096 + 4096 * 4096) * 256
    assert forward_flops(shapes_7b, 345) == llama + dino + siglip + projector
    assert forward_flops(shapes_7b, 345, images=2) == llama + 2 * (dino + siglip + projector)


def test_hours_of_a_million_timesteps_by_hand():
    """1e6 / 8,192 = 122.07 iterations of 116 s; 14 evaluations of 2 x 50 episodes of 28 decisions in 8 environments."""
    sizes = ["rollout.num_envs=16", "rollout.n_steps=64", "policy.chunk_size=8", "eval.interval=10", "eval.num_envs=8"]
    config = load_config(ROOT / "configs/gae_ppo_config.yaml", [*sizes, "eval.states=0-49"])
    # (122.07 x 116 + 14 x 350 x 0.428) / 3600
    assert hours_per_million(116, 0.428, config) == pytest.approx(4.516, abs=1e-3)


def test_busy_shares_count_overlapping_kernels_once():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert union([(0, 10), (1, 2), (9, 11)]) == [(0, 11)]
    assert busy_share([(0, 2), (1, 3), (5, 6)], 0, 10) == pytest.approx(0.4)
    assert busy_share([(0, 2), (8, 20)], 1, 10) == pytest.approx(3 / 9)
    assert busy_share([], 0, 1) == busy_share([(0, 1)], 1, 1) == 0


def test_the_time_line_shows_spans_in_order_and_when_the_gpu_worked():
    def event(cat, name, start_ms, ms):
        return {"ph": "X", "cat": cat, "name": name, "ts": 1000 * start_ms, "dur": 1000 * ms}

    events = [
        event("user_annotation", "step_wait", 60, 40),
        event("user_annotation", "generate", 10, 40),
        event("user_annotation", "decide", 0, 60),
        event("user_annotation", "Optimizer.step#AdamW.step", 1, 1),
        event("cpu_op", "aten::mm", 1, 1),
        event("kernel", "gemm", 30, 25),
        event("gpu_memcpy", "copy", 50, 10),
        {"ph": "M", "name": "process_name"},
    ]
    _, decide, generate, wait, gpu = timeline(events, width=10).splitlines()
    assert generate.startswith("  generate ") and not wait.startswith(" ")  # it is a part of decide
    assert decide.split() == ["decide", "0.0", "60.0", "50%", "|======", "|"]
    assert wait.split() == ["step_wait", "60.0", "40.0", "0%", "|", "====|"]
    assert gpu.split() == ["GPU", "0.0", "100.0", "30%", "|", "###", "|"]
    without = timeline([e for e in events if e.get("cat") == "user_annotation"], width=10).splitlines()
    assert len(without) == 4 and "%" not in "".join(without)


def test_the_table_says_whether_a_target_is_met_only_on_the_card_that_it_is_of():
    rows = [
        Row("act, OFT, 16 rows", 180.0, "ms"),
        Row("forward, OFT, 16 rows", 150.0, "ms", share=0.5),
        Row("update, none, micro-batch 16", None, note="out of memory"),
    ]
    met, missed, out = table(rows, compared=True).splitlines()[2:]
    assert met == "| act, OFT, 16 rows | <= 190 ms met | 180 ms |  |  |"
    assert missed == "| forward, OFT, 16 rows | >= 58% of the ceiling missed | 150 ms | 50% |  |"
    assert out == "| update, none, micro-batch 16 |  | - |  | out of memory |"
    assert "met" not in table(rows[:2], compared=False).partition("\n")[2].replace("| |", "")
    assert Target(42, at_least=True).is_met(42, None) and not Target(0.5, of_ceiling=True).is_met(0.4, None)


def test_compiled_and_eager_are_compared_by_their_speed():
    rows = [
        Row("act", 300.0, "ms", compiled="false"),
        Row("update", 10.0, "rows/s", compiled="false"),
        Row("act", 200.0, "ms", compiled="true"),
        Row("update", 25.0, "rows/s", compiled="true"),
    ]
    *_, act, update = table(rows, compared=False).splitlines()
    assert act.startswith("| act, compiled |") and "1.50 times as fast as eager" in act
    assert "2.50 times as fast as eager" in update


@pytest.mark.slow
def test_all_sections_run_at_the_small_shapes(tmp_path, capsys):
    files = ["--json", str(tmp_path / "figures.json"), "--trace", str(tmp_path / "trace.json")]
    assert gpu_7b.main([*TINY, *files]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["work"]: row for row in figures["rows"]}
    assert figures["failed"] == [] and figures["machine"]["torch"] == torch.__version__
    for work in (
        *("bf16 matmul 256 x 256 x 256", "copy, read + write", "forward, OFT, 4 rows", "forward, OFT, 1 row"),
        *("act, OFT, 4 rows", "update, full, micro-batch 2", "update, the fastest within 76 GiB"),
        *("update, the fastest within 24 GiB in all", "vanilla, 7 tokens, 4 rows", "vanilla, 7 tokens, 1 row"),
        *("memory of the frozen weights", "an iteration's GPU part", "an iteration with its simulators (estimate)"),
        "1 M timesteps, evaluations included (estimate)",
    ):
        assert rows[work]["value"] > 0, work
    for name in ("OFT", "vanilla"):
        assert 0 <= rows[f"ratio error of the first minibatch, {name}, mean"]["value"] < 0.1
    assert rows["what auto chooses"]["note"]
    printed = capsys.readouterr().out
    assert printed.count("\n| ") >= len(rows) and "minibatch_gradients" in printed and "self_cpu" not in printed.lower()
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())
    known = {work for work in TARGETS if "16" not in work and "32" not in work and "LIBERO" not in work}
    assert known <= rows.keys()  # else a target would never be compared


@pytest.mark.slow
def test_a_section_alone_runs_as_a_program_in_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "tests/bench/gpu_7b.py"), *TINY, "--sections", "memory"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| memory of the adapters |" in done.stdout and "act, OFT" not in done.stdout


def test_a_failed_section_is_told_and_the_others_go_on(monkeypatch, capsys):
    def fail(bench):
        raise ValueError("no luck\nat all")

    def exhaust(bench):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setitem(gpu_7b.SECTIONS, "vanilla", fail)
    monkeypatch.setitem(gpu_7b.SECTIONS, "ratio", exhaust)
    assert gpu_7b.main([*TINY, "--sections", "vanilla", "ratio", "ceiling"]) == 1
    printed = capsys.readouterr()
    assert "| vanilla |  | - |  | failed: ValueError: no luck" in printed.out
    assert "| ratio |  | - |  | out of memory |" in printed.out
    assert "| copy, read + write |" in printed.out and "failed: vanilla (see above)" in printed.err
    assert gpu_7b.main([*TINY, "--sections", "ceiling", "--minutes", "0"]) == 0
    assert "| ceiling |  | - |  | not run: late |" in capsys.readouterr().out


def test_a_micro_batch_that_does_not_fit_is_a_line(monkeypatch, capsys):
    def time_update(bench, trainer, batch, mode, micro):
        if micro == 4:
            raise torch.OutOfMemoryError("too much")
        return 0.5, ""

    monkeypatch.setattr(gpu_7b, "time_update", time_update)
    assert gpu_7b.main([*TINY, "--sections", "update"]) == 0
    printed = capsys.readouterr().out
    assert "| update, none, micro-batch 4 |  | - |  | out of memory |" in printed
    assert "| update, full, micro-batch 2 |  | 2 rows/s |" in printed


def test_without_a_gpu_the_program_says_what_runs_on_a_cpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        gpu_7b.main([])
    assert "--scale tiny --device cpu" in capsys.readouterr().err


def test_random_weights_are_frozen_finite_and_the_same_each_time(tmp_path):
    write_small_files(tmp_path, "tiny")
    first, second = (random_network(tmp_path, torch.device("cpu"), torch.bfloat16) for _ in range(2))
    for (name, ours), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert not ours.requires_grad and ours.dtype == torch.bfloat16, name
        assert torch.isfinite(ours).all() and ours.equal(other), name


def test_in_4_bit_the_language_models_layers_are_packed_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "pack", lambda weight: (weight.flatten()[::2, None].to(torch.uint8), None))
    write_small_files(tmp_path, "tiny")
    network = random_network(tmp_path, torch.device("cpu"), torch.bfloat16, "nf4")
    packed = [name for name, p in network.named_parameters() if p.dtype == torch.uint8]
    assert len(packed) == 3 * 7 and all(".layers." in name and "_proj." in name for name in packed)


def test_environments_that_take_no_time_end_spread_over_time_half_of_them_in_success(tmp_path):
    bench = Bench(gpu_7b.parse_args(TINY), tmp_path)
    policy, config = bench.policy(), bench.config()
    with bench.trainer() as trainer:
        rollout, metrics = trainer.collect_rollout()
    assert metrics["rollout/success_rate"] == 1.0 and metrics["rollout/episodes"] == 1  # environment 0, at once
    assert rollout.transitions[0].inputs.images.shape[1:] == (1, 112, 112, 3)
    assert rollout.transitions[0].inputs.instructions == (TASK,) * 4
    envs = InstantEnvs(policy, config)
    episodes = {i: Episode(0, None, seed=i) for i in range(4)}
    envs.reset(options={"episodes": episodes})
    ends = [[] for _ in range(4)]
    for decision in range(60):
        _, rewards, terminated, truncated, _ = envs.step(np.zeros(envs.action_space.shape, np.float32))
        assert (rewards == terminated).all()
        done = terminated | truncated
        for index in np.flatnonzero(done):
            ends[index].append((decision, bool(terminated[index])))
        if done.any():
            envs.reset(options={"reset_mask": done, "episodes": episodes})
    # what a truncated episode ended in is prepared, too
    envs.step_async(np.zeros(envs.action_space.shape, np.float32), np.ones(4, bool), episodes)
    while "truncated_obs" not in (info := envs.step_wait()[-1]):
        envs.step_async(np.zeros(envs.action_space.shape, np.float32), np.ones(4, bool), episodes)
    assert info["truncated_obs"]["image_transform"] == policy.processor.image_transform
    # 220 steps in chunks of 8: 28 decisions an episode, the first ones cut
    assert [end[:2] for end in ends] == [
        [(0, True), (28, True)],
        [(7, False), (35, False)],
        [(14, True), (42, True)],
        [(21, False), (49, False)],
    ]
