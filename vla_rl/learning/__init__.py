"""Advantages, losses, rollouts, updates, evaluation: what the algorithms are made of."""
