"""Trains adapters of a SAM."""
