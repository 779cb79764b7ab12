"""Pretraining: objectives, optimizer, state, the loop; knows nothing of FAISS or HTTP.

The package can be called: `vlm.train(PRESET, data=…)` is `vlm.api.training.train`. A function of that name would be
replaced by the package as soon as one of its modules is imported.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        # by its name, since the API stands above training
        return import_module("vlm.api.training").train(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
