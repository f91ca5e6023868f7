"""Reading what `graph.encode` wrote, with nothing in it believed: sizes, names and links are looked at before use."""

from __future__ import annotations

import collections
import functools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError, first_line
from moesaic.trees import graph_format as g
from moesaic.trees.graph_format import FIXED, SEQUENCES, find, is_key, name_of, slots_of


def _text(text: Any) -> str:
    if type(text) is not str:
        raise AdapterError(f"objects of river's are damaged: {text!r} is no text")
    return text


class _Link:
    """In place of an object that is not made yet."""

    __slots__ = ("to",)

    def __init__(self, to: int) -> None:
        self.to = to


class _Part:
    """An object as it is read: its shape, its sizes and what it holds."""

    __slots__ = ("cls", "held", "kind", "names", "sizes")

    def __init__(self, kind: str, cls: type | None, names: tuple[str, ...], sizes: list[int]) -> None:
        self.kind, self.cls, self.names, self.sizes = kind, cls, names, sizes
        self.held: list[Any] = []


SIZES = {"object": 0, "native": 0, "random": 0, "partial": 2}
"""Whole numbers that say how much an object holds: of numpy's as their first says, of the other kinds one each."""
FEW = {"native": 1, "random": 3, "scalar": 1, "array": 1}
EMPTY: dict[str, Any] = {
    "list": list, "set": set, "dict": dict, "counter": collections.Counter, "ordered": collections.OrderedDict,
    "default": collections.defaultdict,
}  # fmt: skip
MISSING, CHANCES = object(), object()
KEYED = ("dict", "counter", "ordered", "default", "vectors", "set")
KINDS = {*SIZES, *FEW, *EMPTY, *FIXED, "deque", "vectors"}


class Reader:
    """The streams, what was read of them, and the objects that are made of it."""

    def __init__(self, tables: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], prefix: str) -> None:
        streams = {}
        for name, kind in g.STREAMS.items():
            found = arrays[f"{prefix}{name}"]
            if not isinstance(found, np.ndarray) or found.dtype != kind or found.ndim != 1:
                raise AdapterError(f"objects of river's are damaged: {name} are not {np.dtype(kind)} in a row")
            streams[name] = found
        self.left = len(streams["tokens"])
        self.tokens, self.reals, self.wholes = (iter(streams[n].tolist()) for n in ("tokens", "reals", "wholes"))
        self.bytes, self.at = streams["bytes"].tobytes(), 0
        self.texts = [_text(text) for text in tables["texts"]]
        self.classes = [find(_text(module), _text(name)) for module, name in tables["classes"]]
        self.shapes = [self._shape(*shape) for shape in tables["shapes"]]
        self.parts: list[_Part] = []
        self.made: list[Any] = []
        self.unseeded: random.Random | None = None

    def read(self) -> Any:
        root = self._value(None)
        for part in self.parts:  # grows as it is read
            part.held = [self._value(part) for _ in range(self._count(part))]
        if self.left or self.at != len(self.bytes) or [*self.reals] or [*self.wholes]:
            raise AdapterError("objects of river's are damaged: something is left over")
        self._make()
        return self._of(root)

    def _shape(self, kind: str, cls: int, names: Sequence[str]) -> tuple[str, type | None, tuple[str, ...]]:
        if kind not in KINDS or type(cls) is not int or not -1 <= cls < len(self.classes):
            raise AdapterError(f"objects of river's are damaged: there is no {kind!r} of class {cls!r}")
        found = self.classes[cls] if cls >= 0 else None
        if not isinstance(found, type | None):
            raise AdapterError(f"objects of river's are damaged: {found} is no class")
        if found is None if kind in ("object", "native") else found is not None:
            raise AdapterError(f"objects of river's are damaged: {kind!r} of {found}")
        if found is not None and (name_of(found) in g.NATIVE) != (kind == "native"):
            raise AdapterError(f"objects of river's are damaged: {kind!r} of {found}")
        if found is not None and kind == "object":
            slots = slots_of(found)
            if any(n not in slots and (not _text(n).isidentifier() or n.startswith("__")) for n in names):
                raise AdapterError(f"objects of river's are damaged: {found.__name__} cannot hold {[*names]}")
        return kind, found, tuple(map(_text, names))

    # -- reading -------------------------------------------------------------------------------------------------

    def _value(self, owner: _Part | None) -> Any:
        self.left -= 1
        token = next(self.tokens)
        if token >= g.SHAPES:
            kind, cls, names = self.shapes[token - g.SHAPES]
            count = self._size() if kind in ("array", "scalar") else SIZES.get(kind, 1)
            self.parts.append(_Part(kind, cls, names, [self._size() for _ in range(count)]))
            return _Link(len(self.parts) - 1)
        if token >= g.SMALL:
            return token - g.SMALL
        if token == g.REAL:
            return next(self.reals)
        if token in (g.NONE, g.FALSE, g.TRUE):
            return (None, False, True)[(g.NONE, g.FALSE, g.TRUE).index(token)]
        if token == g.WHOLE:
            return next(self.wholes)
        if token in (g.BIG, g.BYTES):
            data = self._bytes(self._size())
            return data if token == g.BYTES else int.from_bytes(data, "little", signed=True)
        if token in (g.TEXT, g.CLASS):
            return (self.texts if token == g.TEXT else self.classes)[self._size()]
        if token == g.AGAIN:
            return _Link(range(len(self.parts))[self._size()])
        if token == g.CHANCE and owner is not None and owner.cls is not None and name_of(owner.cls) == g.GAUSSIAN:
            return CHANCES
        raise AdapterError(f"objects of river's are damaged: there is no token {token} here")

    def _size(self) -> int:
        size = next(self.wholes)
        if size < 0:
            raise AdapterError(f"objects of river's are damaged: {size} of something")
        return int(size)

    def _bytes(self, size: int) -> bytes:
        if size > len(self.bytes) - self.at:
            raise AdapterError("objects of river's are damaged: bytes are missing")
        self.at += size
        return self.bytes[self.at - size : self.at]

    def _count(self, part: _Part) -> int:
        """How many values it holds."""
        if part.kind == "object":
            count = len(part.names)
        elif part.kind in FEW:
            count = FEW[part.kind]
        elif part.kind == "partial":
            count = 1 + part.sizes[0] + 2 * part.sizes[1]
        elif part.kind in SEQUENCES.values():
            count = part.sizes[0]
        elif part.kind == "deque":
            count = 1 + part.sizes[0]
        else:
            count = 2 * part.sizes[0] + (part.kind in ("default", "vectors"))
        if count > self.left:
            raise AdapterError(f"objects of river's are damaged: a {part.kind} of {count} values")
        return count

    # -- making --------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        """Objects that may be empty at first, then those that are made whole, then what the first ones hold."""
        self.made = [MISSING if p.kind in (*FIXED, "vectors") else _shell(p) for p in self.parts]
        for number, part in enumerate(self.parts):
            if part.kind == "vectors":
                self.made[number] = find(*g.VECTORS)(None, self._factory(part))
        waiting = [number for number, part in enumerate(self.parts) if part.kind in FIXED]
        for _ in range(g.DEEPEST):
            ready = {n for n in waiting if all(self._of(v) is not MISSING for v in self.parts[n].held)}
            waiting = [n for n in waiting if n not in ready]
            for number in ready:
                self.made[number] = self._whole(self.parts[number])
        if waiting:
            raise AdapterError("objects of river's are damaged: some hold each other that cannot, or are too deep")
        for last in (False, True):  # keys are looked at when objects have what they hold
            for part, made in zip(self.parts, self.made, strict=True):
                if (part.kind in KEYED) is last:
                    self._fill(part, made)

    def _of(self, value: Any) -> Any:
        return self.made[value.to] if type(value) is _Link else value

    def _factory(self, part: _Part) -> Any:
        factory = self._of(part.held[0])
        if factory is not None and not callable(factory):
            raise AdapterError(f"objects of river's are damaged: {type(factory).__name__} makes no defaults")
        return factory

    def _whole(self, part: _Part) -> Any:
        held = [*map(self._of, part.held)]
        if part.kind == "partial":
            (func, *rest), count = held, part.sizes[0]
            named = dict(zip(rest[count::2], rest[count + 1 :: 2], strict=True))
            return functools.partial(func, *rest[:count], **named)
        return tuple(held) if part.kind == "tuple" else frozenset(_keys(held))

    def _fill(self, part: _Part, made: Any) -> None:
        held = [*map(self._of, part.held)]
        if part.kind == "object":
            assert part.cls is not None
            slots = slots_of(part.cls)
            for name, value in zip(part.names, held, strict=True):
                if name in slots:
                    slots[name].__set__(made, value)
                else:
                    made.__dict__[name] = self._chance(part, held) if value is CHANCES else value
        elif part.kind == "list":
            made.extend(held)
        elif part.kind == "deque":
            made.extend(held[1:])
        elif part.kind == "set":
            made.update(_keys(held))
        elif part.kind in KEYED:
            if part.kind in ("default", "vectors"):
                if part.kind == "default":
                    made.default_factory = self._factory(part)
                held = held[1:]
            for key, value in zip(_keys(held[::2]), held[1::2], strict=True):
                made[key] = value

    def _chance(self, part: _Part, held: list[Any]) -> random.Random:
        """What a Gaussian samples by: one for all that have no seed."""
        seed = dict(zip(part.names, held, strict=True)).get("seed")
        if seed is None:
            self.unseeded = self.unseeded or random.Random()
            return self.unseeded
        return random.Random(seed)


def _keys(keys: list[Any]) -> list[Any]:
    if not all(map(is_key, keys)):
        raise AdapterError("objects of river's are damaged: there are keys that cannot be any")
    return keys


def _shell(part: _Part) -> Any:
    """An object before it holds others."""
    if part.kind == "object":
        assert part.cls is not None
        return object.__new__(part.cls)
    if part.kind in EMPTY:
        return EMPTY[part.kind]()
    if part.kind == "deque":
        return collections.deque(maxlen=part.held[0])
    if part.kind == "random":
        words, at, gauss = part.held
        if not (gauss is None or type(gauss) is float):
            raise AdapterError("objects of river's are damaged: a random number is none")
        made = random.Random(0)
        made.setstate((3, (*np.frombuffer(words, "<u4").tolist(), at), gauss))
        return made
    return _native(part) if part.kind == "native" else _numbers(part)


def _numbers(part: _Part) -> Any:
    dtype, order = part.names
    if not re.fullmatch(r"[<>|][biufc]\d{1,2}", dtype) or order not in ("C", "F"):
        raise AdapterError(f"objects of river's are damaged: numbers of {dtype!r}")
    values = np.frombuffer(bytearray(part.held[0]), dtype).reshape(part.sizes, order="F" if order == "F" else "C")
    return values if part.kind == "array" else values[()]


def _native(part: _Part) -> Any:
    assert part.cls is not None
    made: Any = part.cls(*g.NATIVE[name_of(part.cls)])
    try:
        made.__setstate__(part.held[0])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        raise AdapterError(f"the state of a {part.cls.__name__} is damaged: {first_line(error)}") from None
    return made
