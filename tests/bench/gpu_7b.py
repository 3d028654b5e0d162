"""OpenVLA-7B on one GPU: the speed of each part against the card's own matrix products, the memory, where the time goes.

    python tests/bench/gpu_7b.py [--sections S ...] [--compile] [--no-compile] [--libero] [--json FILE] [--trace FILE]
    python tests/bench/gpu_7b.py --scale tiny --device cpu      the same code at the small model's shapes

No checkpoint is needed: the weights are random, at OpenVLA-7B's shapes, and made on the device. Where the code has a choice it
is made as in a training, unless --compile or --no-compile fixes it; both compare the two. One process; --minutes
limits it, most of which is torch.compile's where its cache (TORCHINDUCTOR_CACHE_DIR) is empty.

"useful" in an update is the forward and the gradient to the inputs, 2 forwards (the weights are frozen); recomputing is not.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from OpenVLA_PPO import OpenVLAPPO
from tests.bench.gpu_figures import busy_share, gpu_intervals, hours_per_million, table, timeline
from tests.bench.gpu_model import SCALES, TASK, Bench, held_gib, release, use, with_settings
from vla_rl.learning.memory import fit_to_card
from vla_rl.learning.rollout_buffer import Minibatch
from vla_rl.run.command_line import ROOT
from vla_rl.run.failures import is_out_of_memory, one_line
from vla_rl.run.load_settings import load_config
from vla_rl.run.progress import peak_memory_gib

# a decision of 16 exact simulators, EGL on an H100, 16 cores, measured alone (docs/performance.md)
SIMULATORS_S = 0.151
# of a 24 GB card, for the CUDA context and 16 simulators' OpenGL; estimated, --libero measures it
BESIDE_TORCH_GIB = 2.0


def ceiling(bench: Bench) -> None:
    for m, k, n in bench.scale.matmuls:
        flops = bench.matmul_flops(m, k, n)
        bench.ceiling_flops = bench.ceiling_flops or flops
        bench.add(f"bf16 matmul {m} x {k} x {n}", flops / 1e12, "TFLOP/s")
    source = torch.empty(2**30 if bench.device.type == "cuda" else 2**20, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds, _ = bench.median(lambda: target.copy_(source))
    bench.add("copy, read + write", 2 * source.numel() / seconds / 1e9, "GB/s")


def forward(bench: Bench) -> None:
    """What act and the bootstraps run, without gradients, from prepared images to the hidden states."""
    policy = bench.policy()
    for rows in bench.scale.rows:
        inputs = policy.prepare(bench.observation(policy, rows))
        seconds, note = bench.median(lambda i=inputs: policy.compute_hidden(i))
        flops = rows * bench.forward_flops(policy) / seconds
        bench.add(f"forward, OFT, {counted(rows)}", 1e3 * seconds, "ms", flops, note)


def counted(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"


def act(bench: Bench) -> None:
    """What the trainer does for a decision; its parts alone, of which the rest is sampling, log-probabilities, decoding."""
    policy, rows = bench.policy(), bench.scale.rows[0]
    obs, generators = bench.observation(policy, rows), [torch.Generator().manual_seed(i) for i in range(rows)]
    temperature, inputs = bench.config().rollout.temperature, policy.prepare(obs)
    prepare, tensors, hidden = (
        1e3 * bench.median(work)[0]
        for work in (
            lambda: policy.prepare(obs),
            lambda: policy.tensors(inputs),
            lambda: policy.compute_hidden(inputs),
        )
    )
    seconds, first = bench.median(lambda: policy.act(obs, temperature=temperature, generator=generators))
    rest = 1e3 * seconds - prepare - hidden
    note = f"preprocessing {prepare:.1f}, inputs {tensors:.1f}, forward {hidden - tensors:.1f}, rest {rest:.1f}"
    bench.add(f"act, OFT, {counted(rows)}", 1e3 * seconds, "ms", note=f"{note}; {first}" if first else note)


def update(bench: Bench) -> None:
    """The trainer's own minibatches, at several gradient checkpointings and micro-batches."""
    rates = time_updates(bench, bench.scale.updates, 76.0)
    if rates:
        bench.fastest = add_fastest(bench, rates, "update, the fastest within 76 GiB")


def update_24(bench: Bench) -> None:
    """The same where torch gets no more memory than a 24 GB card leaves it."""
    bench.made = None  # and what its graphs keep
    budget, is_gpu = 24 - BESIDE_TORCH_GIB, bench.device.type == "cuda"
    release(bench.device)
    if is_gpu:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
    try:
        rates = time_updates(bench, bench.scale.updates_24, budget, f", {budget:g} GiB for torch")
    finally:
        if is_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    if rates:
        add_fastest(bench, rates, "update, the fastest within 24 GiB in all")


def add_fastest(bench: Bench, rates: dict[tuple[str, int], float], work: str) -> tuple[str, int]:
    best = max(rates, key=rates.get)
    useful = 2 * bench.forward_flops(bench.policy()) * rates[best]
    bench.add(work, rates[best], "rows/s", useful, f"{best[0]}, micro-batch {best[1]}")
    return best


def time_updates(
    bench: Bench, choices: Sequence[tuple[str, int]], limit_gib: float, where: str = ""
) -> dict[tuple[str, int], float]:
    """Rows a second of (checkpointing, micro-batch), of those that fit into limit_gib."""
    rates = {}
    with bench.trainer() as trainer:
        batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
        for mode, micro in choices:
            name = f"update, {mode}, micro-batch {micro}{where}"
            if rates and bench.is_late(0.6):  # each is compiled: the rest of the table has its turn
                bench.add(name, None, note="not run: late")
                continue
            trainer.actor_optimizer.zero_grad(set_to_none=True)
            release(bench.device)
            try:
                seconds, note = time_update(bench, trainer, batch, mode, micro)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                bench.add(name, None, note="out of memory")
                continue
            held = held_gib(bench.device)
            note = f"peak {peak_memory_gib(bench.device):.1f} GiB, {held:.1f} held" + (f", {note}" if note else "")
            bench.add(name, 1 / seconds, "rows/s", 2 * bench.forward_flops(trainer.policy) / seconds, note)
            if held <= limit_gib:
                rates[mode, micro] = 1 / seconds
    return rates


def time_update(bench: Bench, trainer: OpenVLAPPO, batch: Minibatch, mode: str, micro: int) -> tuple[float, str]:
    """Seconds a row: the trainer's own backward passes and optimizer steps of a minibatch of whole micro-batches."""
    use(trainer, mode, micro)
    rows = micro * math.ceil(bench.scale.update_rows / micro)
    minibatch, first = (batch.rows(torch.arange(n) % len(batch)) for n in (rows, micro))

    def step(part: Minibatch) -> None:
        trainer.minibatch_gradients(part, train_actor=True, score_actor=True)
        trainer.optimizer_steps(train_actor=True)

    warm_up = bench.seconds(lambda: step(first))
    seconds = statistics.median(bench.seconds(lambda: step(minibatch)) for _ in range(2))
    return seconds / rows, f"first micro-batch {warm_up:.1f} s" if warm_up > 3 * micro * seconds / rows + 1 else ""


def memory(bench: Bench) -> None:
    policy = bench.policy()
    parts = {"frozen weights": 0, "adapters": 0}
    for parameter in policy.network.parameters():
        parts["adapters" if parameter.requires_grad else "frozen weights"] += parameter.nbytes
    for name, size in parts.items():
        bench.add(f"memory of the {name}", size / 2**30, "GiB")
    bench.add("what auto chooses", None, note=auto_choice(bench))


def auto_choice(bench: Bench) -> str:
    """Checkpointing and micro-batch that a training would begin with on this device."""
    with bench.trainer() as trainer:
        trainer.config = with_settings(trainer.config, "algorithm", micro_batch_size="auto")
        trainer.config = with_settings(trainer.config, "policy", gradient_checkpointing="auto")
        fit_to_card(trainer, [TASK])
        return str(trainer.micro_batches.choice)


def ratio(bench: Bench, decoder: str = "parallel", name: str = "OFT") -> None:
    """|ratio - 1| of the tokens of a rollout before any step: how differently acting and scoring round."""
    policy, rows = bench.policy(decoder), bench.scale.rows[0]
    temperature = bench.config(decoder).rollout.temperature
    obs, generator = bench.observation(policy, rows), torch.Generator().manual_seed(0)
    acted = policy.act(obs, temperature=temperature, generator=generator)
    scored = policy.evaluate_actions(acted.inputs, acted.action_tokens, temperature=temperature)
    error = (scored.logprobs.detach().cpu() - acted.logprobs).exp().sub(1).abs()  # [rows, A]
    bench.add(f"ratio error of the first minibatch, {name}, mean", error.mean().item(), note=f"max {error.max():.2g}")


def iteration(bench: Bench) -> None:
    """A part of an iteration with environments that take no time, and what follows for a whole one and for 1 M timesteps."""
    whole = load_config(ROOT / "configs/gae_ppo_config.yaml")
    with bench.trainer() as trainer:
        use(trainer, *bench.fastest)
        trainer.collect_rollout()  # to warm up
        rollout_s, update_s, rows, _ = time_iteration(bench, trainer)
    scale = whole.rollout.num_envs * whole.rollout.n_steps / rows
    rollout_s, update_s = rollout_s * scale, update_s * scale
    how = f"{bench.fastest[0]}, micro-batch {bench.fastest[1]}"
    note = f"rollout {rollout_s:.1f}, update {update_s:.1f} ({how}); {scale:g} times {rows} rows"
    bench.add("an iteration's GPU part", rollout_s + update_s, "s", note=note)
    waits = whole.rollout.n_steps * SIMULATORS_S
    joined = max(rollout_s, waits) if whole.rollout.overlap else rollout_s + waits
    how = "beside the policy" if whole.rollout.overlap else "after the policy"
    note = f"{1e3 * SIMULATORS_S:.0f} ms of simulators a round {how}"
    bench.add("an iteration with its simulators (estimate)", joined + update_s, "s", note=note)
    round_s = joined / whole.rollout.n_steps
    hours = hours_per_million(joined + update_s, round_s, whole)
    note = f"a round of an evaluation as of a rollout, {round_s:.2f} s"
    bench.add("1 M timesteps, evaluations included (estimate)", hours, "h", note=note)


def time_iteration(bench: Bench, trainer: OpenVLAPPO) -> tuple[float, float, int, int]:
    """Seconds of the rollout and of the update, rows, simulator steps."""
    got: list = []
    rollout_s = bench.seconds(lambda: got.append(trainer.collect_rollout()))
    rollout, metrics = got[0]
    batch, _ = trainer.compute_advantages(rollout)
    update_s = bench.seconds(lambda: trainer.update(batch))
    return rollout_s, update_s, len(batch), metrics["rollout/env_steps"]


def libero(bench: Bench) -> None:
    """Two iterations on the real simulators, then the GPU's idle time in a short rollout."""
    bench.made = None  # a policy as at a run's start: nothing captured yet, compiled is what the cache has
    start = time.perf_counter()
    with bench.trainer(libero=True) as trainer:
        use(trainer, *bench.fastest)
        release(bench.device)
        for number in (1, 2):
            rollout_s, update_s, rows, steps = time_iteration(bench, trainer)
            note = f"{steps / rollout_s:.0f} steps/s; update of {rows} rows {update_s:.1f} s"
            note += f", peak {peak_memory_gib(bench.device):.1f} GiB"
            bench.add(f"rollout on LIBERO, iteration {number}", rollout_s, "s", note=note)
            if number == 1:
                began = time.perf_counter() - start
                bench.add("from the weights to the first iteration's end, LIBERO", began, "s")
        if bench.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            others = (total - free - torch.cuda.memory_reserved()) / 2**30
            bench.add("GPU memory beside torch's (CUDA, OpenGL)", others, "GiB")
            trainer.config = with_settings(trainer.config, "rollout", n_steps=4)
            events = trace(bench, trainer.collect_rollout, host=False)
            spans = gpu_intervals(events)
            idle = 100 * (1 - busy_share(spans, spans[0][0], spans[-1][1]))
            note = "4 rounds, between the first and the last kernel"
            bench.add("GPU idle in a rollout on LIBERO", idle, "%", note=note)
        profile_round(bench, trainer, "LIBERO: two rounds and a micro-batch")


def profiled(bench: Bench) -> None:
    with bench.trainer() as trainer:
        use(trainer, *bench.fastest)
        profile_round(bench, trainer, "environments that take no time: two rounds and a micro-batch")


def profile_round(bench: Bench, trainer: OpenVLAPPO, title: str) -> None:
    """The time line and the kernels of two decisions of every environment, the second the rollout's last with its bootstraps,
    and of the update of one micro-batch."""
    trainer.config = with_settings(trainer.config, "rollout", n_steps=2)

    def work() -> None:
        batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
        micro = batch.rows(torch.arange(min(bench.fastest[1], len(batch))))
        trainer.minibatch_gradients(micro, train_actor=True, score_actor=True)
        trainer.optimizer_steps(train_actor=True)

    work()
    with annotated(trainer):
        events = trace(bench, work, title=title)
    bench.texts.append(f"{title} (profiling slows the host):\n{timeline(events)}")


def trace(bench: Bench, work: Callable[[], object], host: bool = True, title: str = "") -> list[dict]:
    """The events of the chrome trace of `work`; with a title its kernels are printed, and --trace keeps it."""
    activities = [ProfilerActivity.CPU] if host else []
    activities += [ProfilerActivity.CUDA] if bench.device.type == "cuda" else []
    with profile(activities=activities) as profiler:
        bench.seconds(work)
    if title:
        order = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
        kernels = profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60)
        bench.texts.append(f"{title}, kernels:\n{kernels}")
    path = bench.args.trace if title and bench.args.trace else bench.folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())["traceEvents"]


@contextmanager
def annotated(trainer: OpenVLAPPO) -> Iterator[None]:
    """Spans of the parts of a round, for the profiler."""
    policy, network, envs = trainer.policy, trainer.policy.network, trainer.envs
    spans = [(trainer, ("decide", "values_of", "minibatch_gradients", "optimizer_steps"))]
    spans += [(policy, ("prepare", "tensors", "generate", "evaluate_actions", "compute_hidden"))]
    spans += [(network, ("embed_images", "run_llama")), (envs, ("step_async", "step_wait", "reset"))]
    wrapped = [(owner, name, getattr(owner, name)) for owner, names in spans for name in names]
    for owner, name, method in wrapped:

        def span(*args, method=method, name=name, **kwargs):
            with record_function(name):
                return method(*args, **kwargs)

        setattr(owner, name, span)
    try:
        yield
    finally:
        for owner, name, _ in wrapped:
            delattr(owner, name)


def vanilla(bench: Bench) -> None:
    """OpenVLA's own decoder: seven tokens, one after another."""
    policy = bench.policy("autoregressive")
    temperature = bench.config("autoregressive").rollout.temperature
    for rows in (bench.scale.rows[0], 1):
        tensors = policy.tensors(policy.prepare(bench.observation(policy, rows)))
        generators = [torch.Generator().manual_seed(i) for i in range(rows)]
        work = partial(policy.generate, *tensors, temperature=temperature, generator=generators)
        seconds, note = bench.median(work)
        flops = rows * bench.forward_flops(policy) / seconds
        bench.add(f"vanilla, 7 tokens, {counted(rows)}", 1e3 * seconds, "ms", flops, note)
    ratio(bench, "autoregressive", "vanilla")


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ceiling": ceiling,
    "forward": forward,
    "act": act,
    "update": update,
    "iteration": iteration,
    "update-24": update_24,
    "profile": profiled,
    "memory": memory,
    "vanilla": vanilla,
    "ratio": ratio,
    "libero": libero,  # with --libero, or named
}


# -------------------------------------------------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    described = describe_machine(args.device)
    print(", ".join(f"{name} {value}" for name, value in described.items()), flush=True)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for bench.compile, name in product(args.modes, args.sections):
            if not run_section(bench, name):
                failed.append(name)
    print("\n" + table(bench.rows, compared=any(card in described["card"] for card in ("H100", "H200"))))
    print("\n".join(f"\n{text}" for text in bench.texts))
    if args.json:
        figures = {"machine": described, "rows": [asdict(row) for row in bench.rows], "failed": failed}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)} (see above)", file=sys.stderr)
    return 1 if failed else 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, help="only these")
    add("--scale", choices=SCALES, default="7b", help="tiny: the small model's shapes")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--compile", action="store_true", help="policy.compile=true; with --no-compile one after the other, compared")
    add("--no-compile", action="store_true", help="policy.compile=false")
    add("--quantization", choices=("none", "nf4"), default="none", help="policy.quantization: the frozen base in 4 bit")
    add("--libero", action="store_true", help="also two iterations on the real simulators")
    add("--minutes", type=float, default=5, help="sections that would begin later are left out")
    add("--json", type=Path, help="also write the figures here")
    add("--trace", type=Path, help="keep the chrome trace of the profiled round here (ui.perfetto.dev shows it)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --scale tiny --device cpu runs the same code on a CPU")
    args.sections = args.sections or [name for name in SECTIONS if name != "libero" or args.libero]
    args.modes = [m for m, given in (("false", args.no_compile), ("true", args.compile)) if given] or ["auto"]
    return args


def run_section(bench: Bench, name: str) -> bool:
    """False if it failed; the others go on."""
    if bench.is_late():
        bench.add(name, None, note="not run: late")
        return True
    print(f"{name} (compile {bench.compile})", flush=True)
    try:
        SECTIONS[name](bench)
    except Exception as error:
        if is_out_of_memory(error):
            bench.add(name, None, note="out of memory")
            return True
        traceback.print_exc()
        bench.add(name, None, note=f"failed: {type(error).__name__}: {one_line(error):.100}")
        return False
    return True


def describe_machine(device: str) -> dict[str, str]:
    card, driver = platform.processor() or platform.machine(), "-"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card = f"{properties.name} {properties.total_memory / 2**30:.0f} GiB"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "CUDA": str(torch.version.cuda), "date": date.today().isoformat()}
    return {"card": card, "driver": driver} | versions


if __name__ == "__main__":
    sys.exit(main())
