"""LIBERO on MuJoCo: tasks, environments, worker processes, goals. Knows no torch."""
