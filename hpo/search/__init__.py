"""The Optuna side of a study: its storage, samplers, budget, leases, ask, report and tell."""
