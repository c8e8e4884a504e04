"""Several runs that belong together: grids, comparisons, diagnoses."""
