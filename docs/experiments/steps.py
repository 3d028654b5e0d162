"""What the scripts of several steps have in common: each step is a command and what it leaves; what is there is not made again."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

Steps = dict[str, tuple[str, str | Callable[[Path], None]]]  # name -> what it leaves, its command or what makes that


def run_steps(doc: str, steps: Steps) -> int:
    """The command line of such a script; 0, or raises CalledProcessError."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(steps)
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--print", action="store_true", help="print the commands")
    args = parser.parse_args()
    for name in args.steps:
        leaves, work = steps[name]
        if args.print:
            print(f"python {work}" if isinstance(work, str) else f"# {leaves}: see {work.__name__}")
        elif (REPOSITORY / leaves).exists():
            print(f"{name}: {leaves} is there", flush=True)
        elif isinstance(work, str):
            print(f"{name}: python {work}", flush=True)
            subprocess.run([sys.executable, *shlex.split(work)], cwd=REPOSITORY, check=True)
        else:
            work(REPOSITORY / leaves)
    return 0
