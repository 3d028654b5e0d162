"""What a run needs, told or tried before it begins."""
