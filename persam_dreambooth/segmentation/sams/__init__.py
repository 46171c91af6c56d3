"""The kinds of SAM: each in one file, opened by `checkpoints.open_sam`."""
