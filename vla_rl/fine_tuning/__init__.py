"""Supervised fine-tuning: demonstrations, samples, the training on them."""
