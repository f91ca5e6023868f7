"""Registering with PEFT without importing it: torch and PEFT take seconds, and not every user needs them.

PEFT's tables must hold a method before an adapter of it is read. A method's file imports PEFT, so it cannot be imported
while PEFT, or the machine that all methods share, is itself on the way in: the methods come right after the outermost
import of either has ended. Who merely asks where PEFT is, as Transformers does, changes nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_peft(*rooms: str) -> None:
    """Have all methods registered as soon as PEFT is there: now, or when it is imported.

    Args:
        rooms: packages, each module of which may define a method.
    """
    for other in [f for f in sys.meta_path if type(f).__qualname__ == "_Finder" and type(f).__module__ == __name__]:
        sys.meta_path.remove(other)  # of an import before this one: two would ask each other for ever
    finder = _Finder(rooms)
    sys.meta_path.insert(0, finder)
    if "peft" in sys.modules:
        finder.register()


class _Finder(MetaPathFinder):
    """Leaves finding to the others, and has the imports that concern the methods reported by a loader of its own."""

    def __init__(self, rooms: Sequence[str]) -> None:
        self.rooms = rooms
        self.packages = {".".join(room.split(".")[:2]) for room in rooms}
        self.registered = False
        self._within = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" and ".".join(fullname.split(".")[:2]) not in self.packages:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Reporting(spec.loader, self)
                return spec
        return None

    @contextmanager
    def importing(self) -> Iterator[None]:
        depth = getattr(self._within, "depth", 0)
        self._within.depth = depth + 1
        try:
            yield
        finally:
            self._within.depth = depth
        if depth == 0 and "peft" in sys.modules and not self.registered:
            self.register()

    def register(self) -> None:
        self.registered = True
        try:
            for room in self.rooms:
                for module in pkgutil.iter_modules(importlib.import_module(room).__path__):
                    importlib.import_module(f"{room}.{module.name}")
        except BaseException:
            self.registered = False
            raise


class _Reporting(Loader):
    """Another loader, that tells the finder while it runs a module."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with self._finder.importing():
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
