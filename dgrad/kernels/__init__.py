"""Compiled forms of what torch alone does slowly. Each is optional: `dgrad.kernels.code_sweeps` holds the same in torch. May import torch only."""
