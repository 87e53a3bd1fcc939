"""Registers geofm's models with timm when both are imported, in either order.

Importing timm takes seconds, so ``import geofm`` must not do it. If timm is there already, the
models are registered at once; otherwise right after timm has been imported by whoever needs it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from geofm.errors import GeofmError

__all__ = ["install"]

logger = logging.getLogger(__name__)


def install() -> None:
    """Register now, or as soon as timm is imported."""
    # A timm that is still being imported (it cannot have imported us) has no registry yet.
    if "timm" in sys.modules and hasattr(sys.modules["timm"], "create_model"):
        _register()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


def _register() -> None:
    try:
        importlib.import_module("geofm.timm_models")
    except GeofmError as error:
        # A malformed card is no reason for `import timm` to fail; geofm's own calls will say it.
        logger.error("geofm's models are not registered with timm: %s", error)


class _TimmFinder(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find timm, and registers geofm's models after it has loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _TimmLoader(spec.loader)
        return spec


class _TimmLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What the module sees of its loader is the ordinary one again.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
