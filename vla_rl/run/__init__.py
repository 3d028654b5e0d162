"""What every run has, whatever it trains: settings, checkpoints on disk, progress, words for failures."""
