"""What every run has, whatever it trains: settings, checkpoints on disk, metrics, progress, words for failures."""
