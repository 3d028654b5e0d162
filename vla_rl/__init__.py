"""Reinforcement learning of vision-language-action models: the parts that OpenVLA_PPO.py puts together."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m vla_rl.NAME: its imports take seconds, in which Ctrl-C would print a stack
    from vla_rl.run.interruption import stop_while_importing

    stop_while_importing()
