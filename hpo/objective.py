"""The names of `hpo.study.objective` at the place where objectives that were written for version 0.1 import them."""

from hpo.study.objective import NoOptions, Objective, Params
from hpo.study.objective import Reporter as Report

__all__ = ["NoOptions", "Objective", "Params", "Report"]
