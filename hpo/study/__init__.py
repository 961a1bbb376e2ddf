"""What the user writes: the study file, the search space, the objective and its data."""
