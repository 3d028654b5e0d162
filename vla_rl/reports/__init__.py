"""What a run shows: its numbers, curves, report, and where else they go."""
