"""River's objects as data that JSON and numpy files hold. Pickles would run code, and outlive no release of river's.

Objects are numbered in the order in which they are met, breadth first, and written as one stream of tokens with four
more beside it: numbers, whole numbers, bytes and texts. A token is a constant, a small whole number, "the next of a
stream", "an object met before" or "a new object of this shape"; a shape is a kind, a class and the names of what such
an object holds. Shared objects stay shared, and circles are no trouble.

What a file may name is listed in `graph_format.py`: classes of river's estimators, made without calling anything of
theirs and filled name by name, and compiled ones that take their state as bytes. No function but two is looked up.
What river's Gaussians sample by (2.5 kB of random numbers each, and none of it is for learning) is left out.
"""

from __future__ import annotations

import collections
import functools
import random
import types
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError, MissingDependency
from moesaic.trees import graph_format as g
from moesaic.trees.graph_format import FIXED, SEQUENCES, find, is_key, name_of, slots_of
from moesaic.trees.graph_reader import Reader

Shape = tuple[str, int, tuple[str, ...]]
"""Kind, number of its class or -1, names."""


def encode(obj: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """An object and all it holds: what JSON can hold, and four arrays (n,) whose names begin with `prefix`.

    Raises:
        AdapterError: it holds something that is neither plain data nor an object of river's.
    """
    writer = _Writer()
    writer.write(obj)
    classes, shapes = [*map(list, writer.classes)], [[kind, cls, [*names]] for kind, cls, names in writer.shapes]
    tables = {"river": _river(), "classes": classes, "shapes": shapes, "texts": [*writer.texts]}
    return tables, {f"{prefix}{name}": np.array(getattr(writer, name), kind) for name, kind in g.STREAMS.items()}


def decode(tables: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], prefix: str = "") -> Any:
    """The object that `encode` wrote.

    Raises:
        AdapterError: another release of river wrote it, it is damaged, or it names what is not listed here.
    """
    here = _river()
    try:
        if (written := tables["river"]) != here:
            raise AdapterError(f"river {written} wrote this, and {here} is installed: pip install river=={written}")
        return Reader(tables, arrays, prefix).read()
    except AdapterError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, StopIteration) as error:
        raise AdapterError(f"objects of river's are damaged: {type(error).__name__} {error}") from None


def _river() -> str:
    try:
        import river
    except ImportError:
        raise MissingDependency("river", "trees") from None
    return str(river.__version__)


class _Writer:
    """The streams, and what is still to be written."""

    def __init__(self) -> None:
        self.tokens, self.reals, self.wholes, self.bytes = array("H"), array("d"), array("q"), bytearray()
        self.texts: dict[str, int] = {}
        self.classes: dict[tuple[str, str], int] = {}
        self.shapes: dict[Shape, int] = {}
        self.met: dict[int, int] = {}
        self.coming: collections.deque[tuple[Any, Iterator[Any], int]] = collections.deque()
        self.alive: list[Any] = []  # what was made here must not leave its `id` to another

    def write(self, obj: Any) -> None:
        self._value(obj, 0)
        while self.coming:
            owner, held, depth = self.coming.popleft()
            chance = name_of(type(owner)) == g.GAUSSIAN
            for value in held:
                if chance and type(value) is random.Random:
                    self.tokens.append(g.CHANCE)
                else:
                    self._value(value, depth)

    def _value(self, obj: Any, depth: int) -> None:
        put, kind = self.tokens.append, type(obj)
        if kind is float:
            put(g.REAL)
            self.reals.append(obj)
        elif obj is None or kind is bool:
            put(g.NONE if obj is None else g.TRUE if obj else g.FALSE)
        elif kind is int:
            self._whole(obj)
        elif kind is str:
            put(g.TEXT)
            self.wholes.append(self.texts.setdefault(obj, len(self.texts)))
        elif kind is bytes:
            put(g.BYTES)
            self._bytes(obj)
        elif (number := self.met.get(id(obj))) is not None:
            put(g.AGAIN)
            self.wholes.append(number)
        elif isinstance(obj, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
            put(g.CLASS)
            self.wholes.append(self._class(obj))
        else:
            self.met[id(obj)] = len(self.met)
            self._new(obj, kind, depth)

    def _whole(self, obj: int) -> None:
        if 0 <= obj < g.SHAPES - g.SMALL:
            self.tokens.append(g.SMALL + obj)
        elif -(1 << 63) <= obj < 1 << 63:
            self.tokens.append(g.WHOLE)
            self.wholes.append(obj)
        else:
            self.tokens.append(g.BIG)
            self._bytes(obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True))

    def _bytes(self, data: bytes) -> None:
        self.wholes.append(len(data))
        self.bytes += data

    def _class(self, cls: Any) -> int:
        if find(*name_of(cls)) is not cls:
            raise AdapterError(f"{'.'.join(name_of(cls))} is not what river has by that name, and cannot be saved")
        return self.classes.setdefault(name_of(cls), len(self.classes))

    def _new(self, obj: Any, kind: type, depth: int) -> None:
        """A new object's token; what it holds comes later."""
        shape, sizes, held = self._look(obj, kind)
        depth = depth + 1 if shape[0] in FIXED else 0
        if depth > g.DEEPEST:
            raise AdapterError(f"a {shape[0]} is more than {g.DEEPEST} deep in others, and cannot be saved")
        keys = obj if isinstance(obj, dict | set | frozenset) else ()
        if other := [type(key).__name__ for key in keys if not is_key(key)]:
            raise AdapterError(f"a {shape[0]} with a key that is a {other[0]} cannot be saved")
        token = g.SHAPES + self.shapes.setdefault(shape, len(self.shapes))
        if token > np.iinfo(g.STREAMS["tokens"]).max:
            raise AdapterError("these are objects of too many kinds to be saved")
        self.tokens.append(token)
        self.wholes.extend(sizes)
        self.coming.append((obj, iter(held), depth))

    def _look(self, obj: Any, kind: type) -> tuple[Shape, Sequence[int], Sequence[Any]]:
        """An object's shape, sizes and what it holds."""
        if name := SEQUENCES.get(kind):
            return (name, -1, ()), [len(obj)], obj
        if name := g.MAPPINGS.get(kind):
            return (name, -1, ()), [len(obj)], _pairs(obj)
        if kind is collections.defaultdict:
            return ("default", -1, ()), [len(obj)], [obj.default_factory, *_pairs(obj)]
        if kind is collections.deque:
            return ("deque", -1, ()), [len(obj)], [obj.maxlen, *obj]
        if kind is functools.partial:
            sizes = len(obj.args), len(obj.keywords)
            return ("partial", -1, ()), sizes, [obj.func, *obj.args, *_pairs(obj.keywords)]
        if kind is random.Random:
            _, (*words, at), gauss = obj.getstate()
            return ("random", -1, ()), [], [np.array(words, "<u4").tobytes(), at, gauss]
        if kind is np.ndarray or isinstance(obj, np.generic):
            if obj.dtype.kind not in "biufc":
                raise AdapterError(f"numpy's {obj.dtype} cannot be saved")
            order = "F" if obj.flags.f_contiguous and not obj.flags.c_contiguous else "C"
            named = "array" if kind is np.ndarray else "scalar"
            return (named, -1, (obj.dtype.str, order)), [obj.ndim, *obj.shape], [obj.tobytes(order)]
        if name_of(kind) in g.NATIVE:
            return ("native", self._class(kind), ()), [], [bytes(obj.__getstate__())]
        if name_of(kind) == g.VECTORS:
            _, (data, factory, mask, _) = obj.__reduce__()
            if mask is not None:
                raise AdapterError("a VectorDict with a mask cannot be saved")
            self.alive.append(data)
            return ("vectors", -1, ()), [len(data)], [factory, *_pairs(data)]
        number = self._class(kind)
        found = {n: getattr(obj, n) for n in slots_of(kind) if hasattr(obj, n)} | getattr(obj, "__dict__", {})
        return ("object", number, tuple(found)), [], [*found.values()]


def _pairs(mapping: Mapping[Any, Any]) -> list[Any]:
    return [part for pair in mapping.items() for part in pair]
