"""The objectives that come with hpo, as the package `hpo.objectives`."""
