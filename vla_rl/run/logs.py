"""What the command lines log: our own lines from INFO on, those of libraries from WARNING on."""

from __future__ import annotations

import logging

OURS = ("vla_rl", "OpenVLA_PPO", "start_gae_ppo_training")  # loggers, and all below them


def configure_logging() -> None:
    """Once, at the start of a command line; where the root has handlers already (a test), they stay as they are."""
    handler = logging.StreamHandler()
    handler.addFilter(is_shown)  # the level of the root does not hold for a library that sets its own
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[handler])
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)


def is_shown(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in OURS
