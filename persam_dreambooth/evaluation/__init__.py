"""Evaluates personalization: whether a model learns the subject and not its background."""
