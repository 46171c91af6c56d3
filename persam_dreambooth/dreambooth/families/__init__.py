"""The model families: each in one file; `registry` finds the family of a checkpoint."""
