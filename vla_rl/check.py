"""Checks what a training needs and tries each of its parts, trains nothing, and estimates what the run takes.

    python -m vla_rl.check --config configs/tiny_gae_ppo.yaml --task-id 0 --no-wandb
    python start_gae_ppo_training.py --check ...        the same, also of a run that is to be resumed

A line a check, with a tick or a cross, what was found and, at a cross, the remedy. One that fails hides no other, but for
those that need what it could not give, which say so. No run folder is made; what is written to try it is removed.

Not here: what is checked before a training (vla_rl.preflight.needs), the tiny update (vla_rl.preflight.trial), the
arithmetic of the estimate (vla_rl.preflight.estimate).
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from OpenVLA_PPO import OpenVLAPPO
from vla_rl.learning.memory import fit_to_card
from vla_rl.learning.parts import build_trainer, instructions_of
from vla_rl.model.checkpoint_folder import read_statistics, read_tokenizer
from vla_rl.model.execution import compiles
from vla_rl.model.quantization import check_quantization
from vla_rl.preflight import needs, room, trial
from vla_rl.preflight.checklist import Checklist, lines_of
from vla_rl.preflight.estimate import Estimate, Pieces, estimate
from vla_rl.preflight.trial import Trial, trial_settings
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.command_line import TINY_CONFIG, end_of, new_run_settings, parse, settings_parser
from vla_rl.run.failures import say
from vla_rl.run.logs import seconds_text
from vla_rl.run.machine import available_memory
from vla_rl.run.run_folder import check_run_folder
from vla_rl.run.settings import Config, ConfigError
from vla_rl.simulation.probe import Probe, Rendered, render_first_task, settle_tasks
from vla_rl.simulation.suites import check_dense_reward


class Visit:
    """One round of checks: the settings, and what a check leaves for those that need it.

    Use it with `with`: simulators and files end with it.

    Args:
        resumed: the settings are of a run that is to go on.
    """

    model: Path
    names: list[str]
    rendered: Rendered
    trial: Trial
    pieces: Pieces
    estimate: Estimate | None = None

    def __init__(self, config: Config, resumed: bool = False):
        self.config, self.resumed = config, resumed
        self.on_gpu = config.run.device == "cuda" and torch.cuda.is_available()
        self.available = available_memory()  # before anything is built

    def __enter__(self) -> Visit:
        self.cleanup = ExitStack()
        self.probe = self.cleanup.enter_context(Probe())
        return self

    def __exit__(self, *error: object) -> None:
        self.cleanup.close()


CHECKS: Checklist[Visit] = Checklist()


# ------------------------------------------------------------------------------------------------------------ the machine


@CHECKS.add("settings")
def settings(visit: Visit) -> str:
    config = visit.config
    needs.refuse_l1(config)
    tasks = ", ".join(map(str, config.env.task_ids))
    return (
        f"{config.algorithm.estimator}, {config.env.task_suite} task {tasks}, {config.rollout.num_envs} environments, "
        f"{config.run.timesteps:,} timesteps"
    )


@CHECKS.add("device")
def device(visit: Visit) -> str:
    needs.check_device(visit.config)
    return needs.describe_device(visit.config)


@CHECKS.add("compile, 4 bit", "device")
def execution(visit: Visit) -> str:
    settings = visit.config.policy
    check_quantization(settings.quantization, visit.config.run.device)
    compiled = compiles(settings.compile, visit.config.run.device)
    return f"{'compiled' if compiled else 'not compiled'}, quantization {settings.quantization}"


@CHECKS.add("run folder")
def run_folder(visit: Visit) -> str:
    if visit.resumed:
        return f"continues {visit.config.run.name} in {visit.config.run.output_dir}"
    check_run_folder(visit.config)
    return f"can be made in {visit.config.run.output_dir}"


@CHECKS.add("host memory")
def host_memory(visit: Visit) -> str:
    return room.check_host_memory(visit.config, visit.available)


@CHECKS.add("/dev/shm")
def shared_memory(visit: Visit) -> str:
    return room.check_shared_memory(visit.config)


@CHECKS.add("wandb")
def wandb(visit: Visit) -> str:
    return needs.check_wandb_reachable(visit.config)


# ----------------------------------------------------------------------------------------------------------- the simulator


@CHECKS.add("simulator packages")
def versions(visit: Visit) -> str:
    return needs.check_versions()


@CHECKS.add("OpenGL library")
def rendering(visit: Visit) -> str:
    return needs.check_rendering()


@CHECKS.add("renderer", "OpenGL library")
def renderer(visit: Visit) -> str:
    visit.rendered = visit.probe(render_first_task, visit.config)
    return needs.check_renderer(visit.rendered, visit.on_gpu)


@CHECKS.add("frame", "OpenGL library")
def frame(visit: Visit) -> str:
    if not hasattr(visit, "rendered"):
        raise ConfigError("nothing was drawn; see the renderer")
    return needs.check_frame(visit.rendered)


@CHECKS.add("EGL and CUDA device", "device", "OpenGL library")
def egl_device(visit: Visit) -> str:
    if not visit.on_gpu:
        return "the policy is on the CPU"
    if not hasattr(visit, "rendered"):
        raise ConfigError("nothing was drawn; see the renderer")
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return needs.check_egl_device(visit.rendered, None if uuid is None else str(uuid))


@CHECKS.add("tasks settle", "OpenGL library")
def settle(visit: Visit) -> str:
    return needs.check_settled(visit.probe(settle_tasks, visit.config))


@CHECKS.add("reward")
def reward(visit: Visit) -> str:
    env = visit.config.env
    if env.reward == "dense":
        check_dense_reward(env.task_suite, env.task_ids)
    return env.reward


# ---------------------------------------------------------------------------------------------------------- the checkpoint


@CHECKS.add("checkpoint")
def checkpoint(visit: Visit) -> str:
    visit.model, visit.names = needs.find_model(visit.config, visit.resumed)
    read_tokenizer(visit.model)
    return f"whole, {visit.model}"


@CHECKS.add("weights", "checkpoint", "device")
def weights(visit: Visit) -> str:
    return room.check_card(visit.config, visit.model)


@CHECKS.add("action head", "checkpoint")
def head(visit: Visit) -> str:
    return needs.check_head(visit.config, visit.model, visit.names)


@CHECKS.add("statistics", "checkpoint")
def statistics(visit: Visit) -> str:
    key, _ = read_statistics(visit.model, visit.config.unnorm_key(), visit.config.policy.use_proprio)
    return f"of {key}"


@CHECKS.add("used as trained", "checkpoint")
def trained_as(visit: Visit) -> str:
    return needs.check_trained_as(visit.config, visit.model, visit.resumed)


# ------------------------------------------------------------------------------------------------------------ a tiny update


@CHECKS.add("parts", "settings", "device", "compile, 4 bit", "weights", "statistics", "frame", "run folder")
def parts(visit: Visit) -> str:
    """The trainer, with a folder for what it writes beside where the runs will be."""
    output_dir = Path(visit.config.run.output_dir)
    nearest = next(path for path in (output_dir, *output_dir.parents) if path.is_dir())
    folder = Path(visit.cleanup.enter_context(tempfile.TemporaryDirectory(prefix=".check-", dir=nearest)))
    visit.probe.close()
    tiny, start = trial_settings(visit.config), time.perf_counter()
    trainer = build_trainer(OpenVLAPPO, tiny, MetricsLogger(folder, tiny), visit.cleanup, resumed=visit.resumed)
    fit_to_card(trainer, instructions_of(tiny))
    visit.trial = Trial(trainer, visit.config)
    visit.build_s = time.perf_counter() - start
    policy = sum(parameter.numel() for parameter in trainer.actor_parameters)
    return f"policy, {trainer.envs.num_envs} + {trainer.eval_envs.num_envs} simulators in {visit.build_s:.0f} s; LoRA {policy:,} parameters"


@CHECKS.add("learning rates", "parts")
def learning_rates(visit: Visit) -> str:
    return trial.check_learning_rates(visit.trial)


@CHECKS.add("rollout", "parts")
def rollout(visit: Visit) -> str:
    visit.trial.collect()
    environments = visit.config.rollout.num_envs
    return f"{trial.DECISIONS} decisions of {environments} environments, {visit.trial.decision_s:.2f} s each"


@CHECKS.add("update", "rollout")
def update(visit: Visit) -> str:
    visit.trial.learn()
    return trial.check_ratio(visit.trial)


@CHECKS.add("advantages", "update")
def advantages(visit: Visit) -> str:
    return trial.check_advantages(visit.trial)


@CHECKS.add("hidden state", "update")
def hidden_state(visit: Visit) -> str:
    return trial.check_hidden(visit.trial)


@CHECKS.add("value head", "update")
def value_head(visit: Visit) -> str:
    return trial.check_value_head(visit.trial)


@CHECKS.add("values", "update")
def values(visit: Visit) -> str:
    return trial.check_values(visit.trial)


@CHECKS.add("gradients", "update")
def gradients(visit: Visit) -> str:
    return trial.check_gradients(visit.trial)


@CHECKS.add("saved checkpoint", "update")
def saved_checkpoint(visit: Visit) -> str:
    visit.trial.save()
    files, size = visit.trial.checkpoint_files, visit.trial.checkpoint_bytes
    return f"{len(files)} files, whole, {room.size_text(size)} in {visit.trial.save_s:.1f} s"


@CHECKS.add("evaluation", "rollout")
def evaluation(visit: Visit) -> str:
    visit.trial.evaluate()
    environments = visit.trial.trainer.eval_envs.num_envs
    return f"decisions of {environments} environments, {visit.trial.eval_decision_s:.2f} s each"


# ------------------------------------------------------------------------------------------------------------ the whole run


@CHECKS.add("update speed", "saved checkpoint", "evaluation")
def update_speed(visit: Visit) -> str:
    tried = visit.trial
    tried.measure()
    start_s = visit.build_s + tried.build_s + tried.eval_build_s
    names = set(Pieces.__dataclass_fields__) - {"start_s", "rows"}
    pieces = Pieces(start_s=start_s, rows=len(tried.batch), **{name: getattr(tried, name) for name in names})
    kept_gib = (
        room.simulator_memory(visit.config, visit.available) / 2**30
    )  # of several tasks the trial has not built all
    several = len(visit.config.env.task_ids) > 1
    visit.pieces = replace(pieces, workers_gib=max(pieces.workers_gib, kept_gib)) if several else pieces
    visit.estimate = estimate(visit.config, visit.pieces)
    return f"{1 / tried.row_s:.0f} rows/s in the update"


@CHECKS.add("disk", "update speed")
def disk(visit: Visit) -> str:
    expected = visit.estimate
    return room.check_disk(visit.config, expected.checkpoints, visit.pieces.checkpoint_bytes, expected.other_bytes)


@CHECKS.add("memory of the run", "update speed")
def memory_of_the_run(visit: Visit) -> str:
    needed, available = visit.estimate.host_peak_gib, visit.available / 2**30
    trainer, workers = visit.estimate.trainer_host_gib, visit.pieces.workers_gib
    text = f"{needed:.1f} GiB of the host (trainer {trainer:.1f}, simulators {workers:.1f}), {available:.1f} were free"
    if needed > available:
        raise ConfigError(f"{text}; take fewer rollout.num_envs, eval.num_envs or tasks, or give the job more memory")
    return text


# ------------------------------------------------------------------------------------------------------------- the report


def estimate_lines(config: Config, expected: Estimate, pieces: Pieces, available: int) -> list[str]:
    """What a person plans with."""
    rollout, modes = config.rollout, len(config.eval.modes)
    episodes = len(config.env.task_ids) * len(config.eval.states)
    memory = f"{expected.host_peak_gib:.1f} GiB of the host's {available / 2**30:.1f} free"
    if expected.gpu_peak_gib is not None:
        memory = f"{expected.gpu_peak_gib:.1f} GiB of the GPU for torch, {memory}"
    return [
        "estimate, if every episode goes to its step limit (successes are shorter) and the machine is as busy as now:",
        f"  rollout     {seconds_text(expected.rollout_s):>8}  {expected.decisions} decisions; {rollout.num_envs} at a time take "
        f"{pieces.decision_s:.2f} s",
        f"  update      {seconds_text(expected.update_s):>8}  {config.algorithm.n_epochs} x {expected.decisions} rows, "
        f"{1 / pieces.row_s:.0f} a second",
        f"  evaluation  {seconds_text(expected.eval_s):>8}  {modes} x {episodes} episodes",
        f"  run         {seconds_text(expected.total_s):>8}  {expected.iterations} iterations, {expected.evaluations} evaluations, "
        f"{seconds_text(pieces.start_s)} to start",
        f"  memory      {memory}",
        f"  disk        {room.size_text(expected.disk_bytes)}",
    ]


def check_and_report(config: Config, resumed: bool = False) -> int:
    """Prints each result and the estimate; 0 if all checks passed, else 1."""
    start, results = time.perf_counter(), []
    encoding = sys.stdout.encoding
    with Visit(config, resumed) as visit:
        for result in CHECKS.run(visit):
            results.append(result)
            say("\n".join(lines_of(result, encoding)))
        failed = [result.name for result in results if not result.ok]
        if visit.estimate is not None:
            say("\n".join(estimate_lines(config, visit.estimate, visit.pieces, visit.available)))
    seconds = time.perf_counter() - start
    for stack in filter(None, (result.stack for result in results)):
        say(stack, sys.stderr)
    if failed:
        crosses = [result.name for result in results if result.ok is False]
        say(f"{len(crosses)} of {len(results)} checks failed: {', '.join(crosses)} ({seconds:.0f} s)")
        return 1
    say(f"all {len(results)} checks passed ({seconds:.0f} s)")
    return 0


def parse_args(argv: list[str] | None):
    return parse(
        settings_parser(
            "python -m vla_rl.check",
            "Check what a training needs, try its parts and estimate what it takes; nothing is trained.\n\n"
            f"On a CPU: python -m vla_rl.check --config {TINY_CONFIG} --task-id 0 --no-wandb",
        ),
        argv,
    )


def main(argv: list[str] | None = None) -> int:
    """0: all checks passed; 1: one failed; 2: a mistake in the settings or arguments; 75: stopped."""
    args = parse_args(argv)
    return end_of(lambda: check_and_report(new_run_settings(args)))


if __name__ == "__main__":
    sys.exit(main())
