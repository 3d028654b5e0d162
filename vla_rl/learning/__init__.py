"""Advantages, losses, rollouts, updates: what the algorithms are made of."""
