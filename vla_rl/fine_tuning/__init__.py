"""Supervised fine-tuning: on demonstrations, and of a token head on what an L1 head does."""
