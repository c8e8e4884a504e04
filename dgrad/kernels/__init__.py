"""Compiled forms of what torch alone does slowly. Each is optional: `dgrad.sweeps` holds the same in torch. May import torch only."""
