"""Reinforcement learning of vision-language-action models: the parts that OpenVLA_PPO.py puts together."""
