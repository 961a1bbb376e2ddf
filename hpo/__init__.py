"""hpo: hyperparameter search and experiment tracking for PyTorch, with results one can trust.

The command line is `python -m hpo` (or `hpo`); what an objective of one's own needs is in `hpo.study.objective`.
Importing this package imports none of its parts, so that `hpo --help` answers at once.
"""

__version__ = "0.2.0"
