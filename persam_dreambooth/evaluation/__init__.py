"""Figures for what personalization is meant to do: the subject learned, its background not."""
