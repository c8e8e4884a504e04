"""Training runs: what a configuration builds, a step, the loop, the run directory."""
