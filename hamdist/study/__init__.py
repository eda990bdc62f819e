"""Comparisons, studies and proofs; called, `hamdist.study(...)`, it runs a study.

`interface` (the functions and their results), `run` (levels beside backpropagation), `report`,
`grid` (many runs), `gradient_descent` and `propagation` (two studies of the papers' claims),
`simulate` (a cluster that is not there), `verify` (the proof), `view` (the page)."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """This package as `hamdist.study`, where Python itself puts it once it is imported."""

    def __call__(self, *settings: Any, **options: Any) -> Any:
        """Run a study.

        Args:
            *settings: the study's name or file (interface/study.py).
            **options: as of `hamdist study`.
        """
        return import_module("hamdist.study.interface.study").study(*settings, **options)


sys.modules[__name__].__class__ = CallableModule
