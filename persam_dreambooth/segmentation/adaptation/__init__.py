"""Trains adapters of a SAM, for `--adapter`."""
