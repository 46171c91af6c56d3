"""What every training shares: devices and processes, checkpoints to resume from, signals, and the log of losses."""
