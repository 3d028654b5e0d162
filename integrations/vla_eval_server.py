"""A model server for vla-eval (AllenAI's vla-evaluation-harness): an outside judge of our checkpoints, over its protocol.

    python -m integrations.vla_eval_server --checkpoint tiny-openvla
    vla-eval run --config integrations/vla_eval_libero.yaml --no-docker

Optional: pip install -r requirements-vla-eval.txt. vla-eval plays the episodes (its own simulator, step limit, success and
statistics); this answers its observations. Not here: how to install it, what was compared (docs/vla_eval.md).

Its conventions (vla-eval 0.8.0, benchmarks/libero/benchmark.py): images uint8 [256, 256, 3], turned by 180 degrees as ours
are; "states" float64 [8], position (m), axis-angle (rad), finger joints (m); actions [7] as LIBERO takes them, of whose
gripper it executes the sign (-1 opens). One observation a simulator step; its base class hands out a chunk of C actions one by
one and asks again when the chunk is used up, as ours are executed.

N observations, K images, C steps in a chunk.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from vla_rl.evaluation.play import sampling_generators
from vla_rl.evaluation.subject import Subject, build_subject, of_checkpoint, of_run
from vla_rl.preflight.needs import check_device, check_policy
from vla_rl.run.command_line import Parser, end_of, parse
from vla_rl.run.section import TEMPERED, Mode
from vla_rl.run.settings import ConfigError
from vla_rl.types import PROPRIO_DIM, Episode, Observation

try:
    from vla_eval.model_servers.predict import PredictModelServer
except ModuleNotFoundError:  # main() says so; what is not of the protocol is of use without it
    PredictModelServer = object

if TYPE_CHECKING:
    import torch

    from vla_rl.model.policy import OpenVLAPolicy

log = logging.getLogger("vla_rl.vla_eval_server")

CAMERAS = ("agentview", "wrist")  # vla-eval's names, in the order of ours


# ------------------------------------------------------------------------------------------------- observations, actions


def to_observation(
    observations: Sequence[Mapping[str, Any]], num_images: int, use_proprio: bool, image_size: int
) -> Observation:
    """What vla-eval's LIBERO benchmarks send, as our environment would show it.

    Args:
        observations: N of {"images": {"agentview": uint8 [H, H, 3], "wrist": ...}, "states": [8], "task_description": str}.
        num_images: K, 1 is the agent view, 2 adds the wrist camera.
        use_proprio: false: "states" may be absent, the proprioception is 0.
        image_size: side in pixels of the images that the policy was trained on, before its own transform.

    Raises:
        ValueError: something is missing, or of a shape or size that is not LIBERO's.
    """
    images = np.stack(
        [np.stack([camera_image(obs, name, image_size) for name in CAMERAS[:num_images]]) for obs in observations]
    )
    proprio = np.zeros((len(observations), PROPRIO_DIM), np.float32)
    if use_proprio:
        proprio = np.stack([read_states(obs) for obs in observations])
    for obs in observations:
        if not isinstance(obs.get("task_description"), str):
            raise ValueError(f"the observation has {sorted(obs)} and no text task_description, the instruction")
    return Observation(images, proprio, tuple(obs["task_description"] for obs in observations))


def camera_image(obs: Mapping[str, Any], name: str, image_size: int) -> np.ndarray:
    """uint8 [S, S, 3] of one camera, at the side S = image_size."""
    images = obs.get("images") or {}
    if name not in images:
        way_out = "; run with --param send_wrist_image=true" if name == "wrist" else ""
        raise ValueError(f"the observation has the images {sorted(images)}, the policy looks at {name}{way_out}")
    return fit_image(np.asarray(images[name]), image_size)


def fit_image(image: np.ndarray, side: int) -> np.ndarray:
    """A rendered image at the side that the policy was trained on: the mean of each block of pixels, rounded (ties to even).

    Args:
        image: uint8 [H, H, 3].

    Returns:
        uint8 [side, side, 3]; the image itself where H is the side.

    Raises:
        ValueError: it is no such image, or its side is no multiple.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(f"expected a square RGB image, uint8 [H, H, 3]; got {image.dtype} {list(image.shape)}")
    factor, rest = divmod(len(image), side)
    if rest or not factor:
        raise ValueError(
            f"the images have {len(image)} pixels a side, the policy was trained on {side}, of which that is no multiple; "
            f"start the server with env.image_size={len(image)} to use them as they are, at your risk"
        )
    if factor == 1:
        return image
    blocks = image.reshape(side, factor, side, factor, 3)
    return np.rint(blocks.mean(axis=(1, 3), dtype=np.float64)).astype(np.uint8)


def read_states(obs: Mapping[str, Any]) -> np.ndarray:
    """float32 [8]: position (m), axis-angle (rad), finger joints (m)."""
    if obs.get("states") is None:
        raise ValueError(f"the observation has {sorted(obs)} and no states; run with --param send_state=true")
    states = np.asarray(obs["states"])
    if states.shape != (PROPRIO_DIM,):
        raise ValueError(f"states of shape {list(states.shape)}; expected [{PROPRIO_DIM}], as LIBERO's benchmark sends")
    return states.astype(np.float32)


def decide(
    policy: OpenVLAPolicy,
    observations: Sequence[Mapping[str, Any]],
    image_size: int,
    mode: Mode = "greedy",
    temperature: float = 1.0,
    generators: Sequence[torch.Generator] | None = None,
) -> np.ndarray:
    """The policy's chunk for each of vla-eval's observations: float32 [N, C, 7], -1..1, gripper -1 (opens) or 1.

    Args:
        mode, temperature: see OpenVLAPolicy.act.
        generators: one an observation, if it is sampled.
    """
    obs = to_observation(observations, policy.num_images, policy.use_proprio, image_size)
    return policy.act(obs, mode=mode, temperature=temperature, generator=generators).actions


def is_of_suite(suite: str, task_suite: str) -> bool:
    """Whether a suite of the harness is the one that the server was started for, or a variant (libero_spatial_swap)."""
    return suite == task_suite or suite.startswith(f"{task_suite}_")


# -------------------------------------------------------------------------------------------------------------- the server


class OpenVLAServer(PredictModelServer):
    """Answers vla-eval's LIBERO observations with the policy's actions, each in the environment's own units and sign.

    Args:
        policy: ready to act.
        task_suite: that will be played; episodes of another one are refused, since its statistics are others.
        image_size: side in pixels of the images that the policy was trained on.
        mode, temperature: see OpenVLAPolicy.act.
        seed: of the sampling. An episode draws what it draws in vla_rl.evaluation.play with this seed.
        max_batch_size: most observations of different sessions that share a forward.
    """

    def __init__(
        self,
        policy: OpenVLAPolicy,
        task_suite: str,
        image_size: int,
        mode: Mode = "greedy",
        temperature: float = 1.0,
        seed: int = 0,
        max_batch_size: int = 1,
    ):
        super().__init__(chunk_size=policy.chunk_size, max_batch_size=max_batch_size)
        self.policy, self.task_suite, self.image_size = policy, task_suite, image_size
        self.mode, self.temperature, self.seed = mode, temperature, seed
        self.generators: dict[str, torch.Generator] = {}  # session -> of its episode
        self.refused: dict[str, str] = {}  # session -> why
        self.warned_of_size = False

    def get_observation_params(self) -> dict[str, Any]:
        """What the benchmark is told to do where its settings say nothing.

        Cabinet and stove are placed by seed 0, as officially; axis-angles are robosuite's, up to 2 pi, as in the data.
        """
        wanted = {"send_state": self.policy.use_proprio, "send_wrist_image": self.policy.num_images == 2}
        return {"env_seed": 0, "quat_no_antipodal": True} | {name: True for name, is_read in wanted.items() if is_read}

    def get_action_spec(self) -> dict[str, Any]:
        from vla_eval.specs import GRIPPER_CLOSE_POS, POSITION_DELTA, ROTATION_AA

        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, Any]:
        from vla_eval.specs import IMAGE_RGB, LANGUAGE, STATE_EEF_POS_AA_GRIP

        specs = {name: IMAGE_RGB for name in CAMERAS[: self.policy.num_images]} | {"language": LANGUAGE}
        return specs | ({"state": STATE_EEF_POS_AA_GRIP} if self.policy.use_proprio else {})

    async def on_episode_start(self, config: dict[str, Any], ctx: Any) -> None:
        """Drops what is left of the last chunk; seeds the episode's sampling.

        Raises nothing: vla-eval reads no answer to this message, and would take an error for that to its first observation.
        """
        await super().on_episode_start(config, ctx)
        task = config.get("task") or {}
        suite, indices = task.get("suite"), (task.get("task_id"), task.get("episode_idx"))
        for known in (self.generators, self.refused):
            known.pop(ctx.session_id, None)
        if suite is not None and not is_of_suite(suite, self.task_suite):
            self.refused[ctx.session_id] = (
                f"the episode is of {suite}, the server was started for {self.task_suite}; start it with --task-suite {suite} "
                "(and policy.unnorm_key=... if the checkpoint has no statistics of that name)"
            )
        elif self.mode == "sampled" and not all(isinstance(index, int) for index in indices):
            self.refused[ctx.session_id] = (
                f"the episode names no task_id and episode_idx, which seed its sampling: {task}"
            )
        elif self.mode == "sampled":
            task_id, state = indices
            episode = Episode(task_id, state, seed=0, resets=state + 1)  # as evaluation_episodes
            self.generators[ctx.session_id] = sampling_generators([episode], self.seed)[0]

    async def on_episode_end(self, result: dict[str, Any], ctx: Any) -> None:
        await super().on_episode_end(result, ctx)
        self.generators.pop(ctx.session_id, None)

    def predict_batch(self, obs_batch: list[dict[str, Any]], ctx_batch: list[Any]) -> list[dict[str, Any]]:
        """A chunk for each observation: {"actions": float32 [C, 7]}, in -1..1, gripper -1 (opens) or 1.

        Raises:
            ValueError: an observation cannot be used, or its episode is of another suite; the harness counts the episode as
                failed and as an error.
        """
        for ctx in ctx_batch:
            if ctx.session_id in self.refused:
                raise ValueError(self.refused[ctx.session_id])
        rendered = np.shape(obs_batch[0].get("images", {}).get(CAMERAS[0]))
        if rendered and rendered[0] != self.image_size and not self.warned_of_size:
            self.warned_of_size = True
            log.warning(
                "the harness renders %d pixels a side, the policy was trained on %d: it sees the mean of each block",
                *(rendered[0], self.image_size),
            )
        generators = None
        if self.mode == "sampled":
            generators = [self.generators[ctx.session_id] for ctx in ctx_batch]
        chunks = decide(self.policy, obs_batch, self.image_size, self.mode, self.temperature, generators)
        return [{"actions": chunk} for chunk in chunks]

    def warm_up(self) -> None:
        """One decision of the largest batch: what is wrong shows before the harness counts it as failed episodes."""
        policy, side, rows = self.policy, self.image_size, self.max_batch_size
        black = np.zeros((rows, policy.num_images, side, side, 3), np.uint8)
        policy.act(Observation(black, np.zeros((rows, PROPRIO_DIM), np.float32), ("do nothing",) * rows), mode="greedy")


# ------------------------------------------------------------------------------------------------------------ command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m integrations.vla_eval_server",
        description="Serve a checkpoint to vla-eval, which evaluates it on LIBERO.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="any setting of the policy, as in training")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", metavar="RUN", help="newest checkpoint of a PPO or GRPO run, with the run's settings")
    model.add_argument(
        "--checkpoint", metavar="MODEL", help="a folder, Hugging Face id or tiny-openvla, used as trained"
    )
    add("--adapter", metavar="FOLDER", help="a LoRA adapter in peft's format, on --checkpoint")
    add("--task-suite", metavar="SUITE", help="that will be played, and whose statistics hold (env.task_suite)")
    add("--mode", choices=get_args(Mode), default="greedy", help="how actions are taken (default %(default)s)")
    add("--temperature", type=float, metavar="T", help="of the modes sampled and mean_action (default 1)")
    add("--device", choices=("cpu", "cuda"), help="(run.device; default: a GPU if there is one)")
    add("--host", default="127.0.0.1", help="address to listen at (default %(default)s; 0.0.0.0 for other machines)")
    add("--port", type=int, default=8000, help="(default %(default)s)")
    add("--max-batch-size", type=int, default=1, metavar="B", help="most sessions that share a forward (default 1)")
    return parse(parser, argv)


def subject_of(args: argparse.Namespace) -> Subject:
    """What is served, as vla_rl.evaluate would evaluate it.

    Raises:
        ConfigError: a setting is wrong, or the run, checkpoint or adapter is not there or torn.
    """
    overrides = [*([f"run.device={args.device}"] if args.device else []), *args.overrides]
    flags = {"env.task_suite": args.task_suite}
    if args.run is None:
        return of_checkpoint(args.checkpoint, args.adapter, overrides, flags)
    if args.adapter is not None:
        raise ConfigError("--adapter goes with --checkpoint; --run has an adapter of its own")
    return of_run(args.run, overrides, flags)


def check(args: argparse.Namespace) -> None:
    """What can be told before anything is loaded.

    Raises:
        ConfigError: vla-eval is not installed, a number is out of range, or the port is taken.
    """
    if PredictModelServer is object:
        raise ConfigError("vla-eval is not installed; run: pip install -r requirements-vla-eval.txt")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise ConfigError(f"--temperature {args.temperature}: expected a number above 0")
    if args.temperature is not None and args.mode not in TEMPERED:
        modes = " or ".join(sorted(TEMPERED))
        raise ConfigError(f"--temperature {args.temperature:g} says nothing to --mode {args.mode}; give --mode {modes}")
    if args.max_batch_size < 1:
        raise ConfigError(f"--max-batch-size {args.max_batch_size}: expected 1 or more")
    try:
        socket.create_server((args.host, args.port)).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen at {args.host}:{args.port} ({error}); give another --port or --host"
        ) from None


def main(argv: list[str] | None = None) -> int:
    """Serves until it is stopped (75); 2: a mistake in the arguments or settings; 1: it failed."""
    args = parse_args(argv)
    return end_of(lambda: run_server(args))


def run_server(args: argparse.Namespace) -> None:
    check(args)
    subject = subject_of(args)
    from vla_eval.model_servers.serve import serve

    config, env = subject.config, subject.config.env
    if args.mode != "greedy" and config.policy.head == "l1":
        raise ConfigError(f"--mode {args.mode} with an L1 head, which has one action; leave it out")
    check_device(config)
    check_policy(config, resumed=subject.run is not None)
    if env.render != "exact":
        log.warning("the policy was trained on images rendered %s; vla-eval renders exact ones", env.render)
    policy, _ = build_subject(subject)
    sampling = args.mode, args.temperature or 1.0, config.run.seed, args.max_batch_size
    server = OpenVLAServer(policy, env.task_suite, env.image_size, *sampling)
    server.warm_up()
    how = f"{args.mode} at temperature {server.temperature:g}" if args.mode in TEMPERED else args.mode
    log.info(
        "serving %s for %s, %s, at ws://%s:%d",
        *(subject.name, env.task_suite, how, args.host, args.port),
    )
    serve(server, host=args.host, port=args.port)


if __name__ == "__main__":
    sys.exit(main())
