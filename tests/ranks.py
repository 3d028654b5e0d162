"""Functions of tests run in several processes, as torchrun starts them.

`run_ranks(2, "tests.run.test_distributed:sums", folder)` runs sums(ranks, folder) in each of two; what it returns on each comes back.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def torchrun(processes: int, *arguments: str, timeout_s: float = 300, **options: Any) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        *arguments,
    ]
    options = {"capture_output": True, "text": True, "cwd": ROOT} | options
    return subprocess.run(command, timeout=timeout_s, **options)


def run_ranks(processes: int, function: str, folder: Path, *arguments: Any) -> list[Any]:
    """function: "module:name" of function(ranks, folder, *arguments), which returns what JSON can hold."""
    folder.mkdir(parents=True, exist_ok=True)
    done = torchrun(processes, "-m", "tests.ranks", function, str(folder), json.dumps(arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    from vla_rl.run.distributed import joined

    name, folder, arguments = sys.argv[1:]
    module, function = name.split(":")
    with joined("cpu") as ranks:
        result = getattr(importlib.import_module(module), function)(ranks, Path(folder), *json.loads(arguments))
        (Path(folder) / f"result_{ranks.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
