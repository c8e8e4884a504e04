"""Fast sweeps, and optional compiled forms of them: `code_sweeps` has the same in torch."""
