"""One module a task. Each says its data, its network, its loss, its metrics and its default space, and nothing else."""
