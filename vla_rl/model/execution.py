"""How the network runs, not what it computes: activations recomputed backward, blocks compiled, forwards as CUDA graphs.

Blocks are the layers of the language model and of the ViTs: each is recomputed and compiled by itself, so one compilation
serves all blocks of a kind. Every shape is compiled (and captured) once, hence few shapes: rows are filled up to a size of
ROW_SIZES and the filling is cut off from the result.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vla_rl.run.settings import ConfigError

GRADIENT_CHECKPOINTING = ("none", "selective", "full")  # more and more is recomputed
ROW_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # above, multiples of 32
# compilations of one code: kinds of blocks x row sizes x with and without gradients; torch stops at 8
SPECIALISATIONS = 256

logger = logging.getLogger(__name__)

aten = torch.ops.aten
# what selective checkpointing keeps: products and attention; norms, rotations, gates and sums are cheap to do again
KEPT = {
    *(aten.mm.default, aten.addmm.default, aten.bmm.default),
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


class Blocks:
    """Sets how blocks run.

    Args:
        blocks: each with its own forward.
        compiled: torch.compile them.
    """

    def __init__(self, blocks: Sequence[nn.Module], compiled: bool):
        self.blocks, self.compiled = blocks, compiled
        self.forwards = [block.forward for block in blocks]
        if compiled:
            keep_compilations()
        self.set_gradient_checkpointing("none")

    def set_gradient_checkpointing(self, mode: str) -> None:
        """Args: mode: of GRADIENT_CHECKPOINTING. Gradients are the same in every mode, to the bit where nothing is compiled."""
        if mode not in GRADIENT_CHECKPOINTING:
            raise ConfigError(f"gradient_checkpointing={mode!r}; expected one of {', '.join(GRADIENT_CHECKPOINTING)}")
        self.mode = mode
        for block, forward in zip(self.blocks, self.forwards, strict=True):
            forward = forward if mode == "none" else recomputed(forward, mode)
            # rounding as the uncompiled operations do keeps acting (no gradient) and scoring (gradient) alike in bfloat16
            # and no padding, which a timing at compile time decides
            options = {"emulate_precision_casts": True, "shape_padding": False}
            block.forward = torch.compile(forward, dynamic=False, options=options) if self.compiled else forward


def recomputed(forward: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """A forward that keeps its inputs alone (full), or also the results of KEPT (selective), for the backward pass."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn: dropout is 0
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keeps)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def keeps(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # LoRA's own product is added to what the base gave, which is kept: that sum is cheap to do again
    cheap = operation is aten.addmm.default and args[0].dim() == 2
    return CheckpointPolicy.MUST_SAVE if operation in KEPT and not cheap else CheckpointPolicy.PREFER_RECOMPUTE


# ---------------------------------------------------------------------- few shapes


def row_size(rows: int) -> int:
    """The size that so many rows are filled up to."""
    return next((size for size in ROW_SIZES if size >= rows), -(-rows // 32) * 32)


def fill_rows(tensors: Sequence[Tensor | None], size: int) -> list[Tensor | None]:
    """Tensors [B, ...] with their last row repeated until there are `size` rows."""
    return [
        None if t is None else torch.cat([t, t[-1:].expand(size - len(t), *t.shape[1:])]) if len(t) < size else t
        for t in tensors
    ]


# ---------------------------------------------------------------------- torch.compile


def can_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot run here; None if it can. Its kernels are built by a C compiler, on the CPU by a C++ one."""
    wanted = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "gcc", "clang", "cc")
    if not any(shutil.which(os.environ.get(name, name)) for name in wanted):
        return f"no {' or '.join(wanted[1:])} is on the PATH; apt-get install -y {'g++' if device.type == 'cpu' else 'gcc'}"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"triton cannot be imported ({error}); pip install triton"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():  # for the launchers that triton builds
            return f"Python.h is missing; apt-get install -y python{sysconfig.get_python_version()}-dev"
    return None


def compiles(setting: str, device: str | torch.device) -> bool:
    """Whether to compile, by policy.compile: auto, true or false.

    Raises:
        ConfigError: true, but what it needs is not here.
    """
    device = torch.device(device)
    if setting == "false" or (setting == "auto" and device.type == "cpu"):
        return False
    problem = can_compile(device)
    if problem and setting == "true":
        raise ConfigError(f"policy.compile=true, but {problem}; or set policy.compile=auto")
    if problem:
        logger.warning("not compiled, which is slower: %s", problem)
    return problem is None


def keep_compilations() -> None:
    """Kernels go to the user's cache folder, where a second run finds them; a block may be compiled for many shapes."""
    try:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(os.environ.get("VLA_RL_CACHE") or user / "vla_rl") / "torchinductor"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no writable home, or none at all: torch's own choice is a temporary folder
        pass
    else:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.config.recompile_limit = SPECIALISATIONS
    torch._dynamo.config.accumulated_recompile_limit = 4 * SPECIALISATIONS


# ---------------------------------------------------------------------- CUDA graphs


class CudaGraphs:
    """A function of CUDA tensors, replayed as one graph for each set of shapes (and texts): the CPU launches once, not once a kernel.

    The function must read the same memory each time (weights change in place), wait for nothing and draw nothing. Results
    are copied out of the graphs, whose memory is shared: one replay at a time.

    Args:
        pool: torch.cuda.graph_pool_handle() of all graphs.
        stream: of all captures; each stream would have a workspace of cuBLAS.
    """

    WARMUPS = 2  # calls before a capture: they compile, choose algorithms and make workspaces

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], pool: Any, stream: torch.cuda.Stream):
        self.function, self.pool, self.stream = function, pool, stream
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor | str | None], tuple[Tensor, ...]]] = {}

    def __call__(self, *arguments: Tensor | str | None) -> tuple[Tensor, ...]:
        key = tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in arguments)
        if key not in self.captured:
            self.captured[key] = self.capture(arguments)
        graph, inputs, outputs = self.captured[key]
        for kept, given in zip(inputs, arguments, strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(given)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    def capture(self, arguments: Sequence[Tensor | str | None]) -> tuple:
        inputs = [given.clone() if isinstance(given, Tensor) else given for given in arguments]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(self.WARMUPS):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            outputs = self.function(*inputs)
        return graph, inputs, outputs
