"""Measurements of dgrad's speed; never tests. `python -m benchmarks --help`."""
