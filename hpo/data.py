"""The names of `hpo.study.data` at the place where objectives that were written for version 0.1 import them."""

from hpo.study.data import Data, DataInfo, Split, data_home

__all__ = ["Data", "DataInfo", "Split", "data_home"]
