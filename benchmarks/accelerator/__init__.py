"""What one accelerator shows in eight minutes: `python -m benchmarks.accelerator`; see `__main__`."""
