"""The child process that holds MOA's trees and the JVM they live in; `jvm.py` starts it and talks to it.

It is run as a file, so that it imports nothing of ours: a child needs neither torch nor what `moesaic` imports.

| operation | a | b | payload | answer |
| --- | --- | --- | --- | --- |
| `PREDICT` | classes | number of trees, 0: all | x (float64), trees (int64) | votes (float64); a, b: their shape |
| `LEARN` | class | number of weights | weights of the trees, x (float64) | none; the next one tells of an error |
| `RESET` | tree | | | none |
| `SAVE` | | | slots (int64) | sizes (int64), then the bytes of each; none for a new tree |
| `LOAD` | features | number of slots | slots (int64), a size for each (int64), then their bytes | empty |
| `PREPARE` | tree | | | none |
| `ADD` | number of trees | | | none |
| `COURSE` | classes | rows n | weights (n, trees), x (n, d) (float64), y (n,) (int64) | votes (float64); a, b: shape |
| `CPU` | | | | seconds that this process used (float64) |

Tree k is in slot 2k, and in slot 2k + 1 the one that was prepared and grows beside it, where there is one.

A frame is a header (operation or status, a, b, bytes of payload) and its payload, little endian. A status that is not
0 is an error, its payload the text: `FAILED`, or `IMPOSSIBLE` where what is held cannot be made as it is asked for.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from typing import Any, BinaryIO, Protocol

PREDICT, LEARN, RESET, SAVE, LOAD, PREPARE, ADD, COURSE = range(8)
CPU = 100
FAILED, IMPOSSIBLE = 1, 2
HEADER = struct.Struct("<iiqq")
STACK = 256 << 20
"""Bytes of stack: Java reads and writes a tree by recursion, some 3 kB a level, and a time among the features makes
trees deep."""
ALLOWED = ";".join(
    [
        "maxdepth=100000;maxrefs=100000000;maxarray=10000000;maxbytes=2000000000",
        "moa.AbstractMOAObject;moa.classifiers.AbstractClassifier;moa.classifiers.core.**",
        "moa.classifiers.trees.HoeffdingTree;moa.classifiers.trees.HoeffdingTree$*;moa.core.*;moa.options.*",
        "com.github.javacliparser.*;java.util.ArrayList;java.util.HashMap;java.util.LinkedList;java.util.HashSet",
        "java.util.Map$Entry;java.lang.String;java.lang.Object;java.lang.Number;java.lang.Integer;java.lang.Double",
        "!*",
    ]
)
"""What a saved tree may be made of, as Java's ObjectInputFilter has it: reading anything else could run its code."""


Answer = tuple[bytes, int, int]
"""Payload, a, b."""


class Held(Protocol):
    """What a child holds."""

    silent: tuple[int, ...]
    """Operations without an answer: after one that failed nothing goes on, until one of `anew`."""
    anew: tuple[int, ...]

    def answer(self, operation: int, a: int, b: int, data: bytes) -> Answer | None:
        """Do what a frame asks for."""


class Impossible(Exception):
    """What is asked for cannot be made; the text says what to do."""


class Trees:
    """MOA's Hoeffding trees, `size` of them, over rows that widen."""

    silent: tuple[int, ...] = (LEARN, RESET, PREPARE, ADD)
    anew: tuple[int, ...] = (LOAD,)

    def __init__(self, size: int, options: str, seed: int) -> None:
        import jpype
        from com.yahoo.labs.samoa.instances import Instance
        from java.io import ObjectInputFilter
        from java.lang.invoke import MethodHandles, MethodType
        from java.util import Arrays
        from moa.classifiers.trees import HoeffdingTree

        ObjectInputFilter.Config.setSerialFilter(ObjectInputFilter.Config.createFilter(ALLOWED))
        self.kind, self.options, self.seed = HoeffdingTree, options, seed
        self.doubles, self.tables, self.cubes = (jpype.JArray(jpype.JDouble, n) for n in (1, 2, 3))
        self.trees = jpype.JArray(HoeffdingTree)([self.new() for _ in range(size)])
        self.beside: dict[int, Any] = {}
        """Trees that grow beside others, to take their places."""
        self.settings = str(self.new().getOptions().getAsCLIString())
        lookup = MethodHandles.publicLookup()
        row = self.doubles.class_
        self.votes = lookup.findVirtual(
            HoeffdingTree, "getVotesForInstance", MethodType.methodType(row, Instance.class_)
        )
        self.padded = lookup.findStatic(Arrays, "copyOf", MethodType.methodType(row, row, jpype.java.lang.Integer.TYPE))
        self.features, self.classes = -1, 0
        self.fit(0, 1)

    def new(self) -> Any:
        tree = self.kind()
        tree.setRandomSeed(self.seed)
        tree.getOptions().setViaCLIString(self.options)
        tree.prepareForUse()
        tree.resetLearning()
        return tree

    def fit(self, features: int, classes: int) -> None:
        """Make room for a row; trees go on as they are, their attributes keep their places before the class.

        It is as wide as the row and no wider: a tree takes note of a feature that is there and missing.

        All trees' votes are one call into Java: `i -> Arrays.copyOf(trees[i].getVotesForInstance(row), classes)`,
        put together here from method handles.
        """
        if features == self.features and classes <= self.classes:
            return
        import jpype
        from com.yahoo.labs.samoa.instances import Attribute, DenseInstance, Instances, InstancesHeader
        from java.lang.invoke import MethodHandleProxies, MethodHandles
        from java.util import ArrayList
        from java.util.function import IntFunction

        self.features, self.classes = features, max(classes, self.classes)
        attributes, labels = ArrayList(), ArrayList()
        for i in range(self.features):
            attributes.add(Attribute(f"x{i}"))
        for c in range(self.classes):
            labels.add(str(c))
        attributes.add(Attribute("class", labels))
        header = InstancesHeader(Instances("rows", attributes, 0))
        header.setClassIndex(self.features)
        self.values = self.doubles(self.features + 1)
        self.row = DenseInstance(1.0, self.values)  # it keeps the array itself: a row is written in place
        self.row.setDataset(header)
        vote = MethodHandles.insertArguments(self.votes, 1, self.row)
        pad = MethodHandles.insertArguments(self.padded, 1, jpype.java.lang.Integer(self.classes))
        tree = MethodHandles.arrayElementGetter(self.trees.getClass()).bindTo(self.trees)
        handle = MethodHandles.filterReturnValue(MethodHandles.filterReturnValue(tree, vote), pad)
        self.ballot = MethodHandleProxies.asInterfaceInstance(IntFunction.class_, handle)

    def predict(self, x: Any, classes: int, which: list[int]) -> Any:
        import numpy as np
        from java.util import Arrays

        self.fit(len(x), classes)
        self.values[: self.features] = x
        if which:
            return np.stack([np.asarray(self.ballot.apply(i)) for i in which])
        ballots = self.tables(len(self.trees))  # a new one each time: JPype shows numpy the same copy while one lives
        Arrays.setAll(ballots, self.ballot)
        return np.asarray(ballots)

    def course(self, x: Any, y: list[int], weights: list[list[float]], classes: int) -> Any:
        """Votes (n, trees, classes) on rows (n, d), each asked for before the row is learned."""
        import numpy as np
        from java.util import Arrays

        self.fit(x.shape[1], classes)
        ballots = self.cubes(len(y))
        for t, label in enumerate(y):
            self.values[: self.features] = x[t]
            ballots[t] = asked = self.tables(len(self.trees))
            Arrays.setAll(asked, self.ballot)
            self.taught(label, weights[t])
        return np.asarray(ballots)

    def learn(self, x: Any, y: int, weights: list[float]) -> None:
        self.fit(len(x), y + 1)
        self.values[: self.features] = x
        self.taught(y, weights)

    def taught(self, y: int, weights: list[float]) -> None:
        """The row that is in place is of class `y`."""
        self.values[self.features] = float(y)
        for i, weight in enumerate(weights):
            if weight > 0:
                self.row.setWeight(weight)
                self.trees[i].trainOnInstance(self.row)
                if i in self.beside:
                    self.beside[i].trainOnInstance(self.row)

    def reset(self, which: int) -> None:
        self.trees[which] = self.beside.pop(which) if which in self.beside else self.new()

    def add(self, count: int) -> None:
        import jpype

        self.trees = jpype.JArray(self.kind)([*self.trees, *(self.new() for _ in range(count))])
        features, self.features = self.features, -1  # the one call for all votes is to be put together anew
        self.fit(features, 1)

    def save(self, which: list[int]) -> list[bytes]:
        from org.jpype.pickle import Encoder

        trees = [self.beside[slot // 2] if slot % 2 else self.trees[slot // 2] for slot in which]
        return [bytes(Encoder().pack(tree)) if tree.trainingHasStarted() else b"" for tree in trees]

    def load(self, saved: dict[int, bytes], features: int) -> None:
        """Take the place of all trees, or of none where one is refused; a slot that is not spoken of has a new one."""
        import jpype
        from org.jpype.pickle import Decoder

        found = {}
        for slot, data in saved.items():
            tree = Decoder().unpack(jpype.JArray(jpype.JByte)(data)) if data else self.new()
            if tree is None or tree.getClass() != self.kind.class_:
                raise ValueError("it is no Hoeffding tree")
            if str(tree.getOptions().getAsCLIString()) != self.settings:
                raise ValueError("it grew with other settings")
            found[slot] = tree
        self.fit(features, 1)
        for tree in found.values():
            tree.getVotesForInstance(self.row)  # a tree that lacks parts fails here and not later
        for i in range(len(self.trees)):
            self.trees[i] = found[2 * i] if 2 * i in found else self.new()
        self.beside = {slot // 2: tree for slot, tree in found.items() if slot % 2}

    def answer(self, operation: int, a: int, b: int, data: bytes) -> Answer | None:
        import numpy as np

        if operation == LEARN:
            row = np.frombuffer(data)
            self.learn(row[b:], a, row[:b].tolist())
        elif operation == PREDICT:
            cut = len(data) - 8 * b
            votes = self.predict(np.frombuffer(data[:cut]), a, np.frombuffer(data[cut:], np.int64).tolist())
            return votes.tobytes(), *votes.shape
        elif operation == COURSE:
            numbers = np.frombuffer(data[: -8 * b])
            weights = numbers[: b * len(self.trees)].reshape(b, -1)
            x, y = numbers[weights.size :].reshape(b, -1), np.frombuffer(data[-8 * b :], np.int64)
            votes = self.course(x, y.tolist(), weights.tolist(), a)
            return votes.tobytes(), len(votes) * votes.shape[1], votes.shape[2]
        elif operation == RESET:
            self.reset(a)
        elif operation == PREPARE:
            self.beside[a] = self.new()
        elif operation == ADD:
            self.add(a)
        elif operation == SAVE:
            saved = self.save(np.frombuffer(data, np.int64).tolist())
            return b"".join([np.array([len(s) for s in saved], np.int64).tobytes(), *saved]), 0, 0
        else:
            slots, sizes = np.frombuffer(data[: 16 * b], np.int64).reshape(2, b).tolist()
            ends = 16 * b + np.cumsum([0, *sizes])
            self.load({slot: data[i:j] for slot, (i, j) in zip(slots, pairwise(ends), strict=True)}, a)
            return b"", 0, 0
        return None


def serve(held: Held, source: BinaryIO, out: BinaryIO) -> None:
    """Answer frame after frame until the other end closes."""
    failed = ""
    while len(head := source.read(HEADER.size)) == HEADER.size:
        operation, a, b, size = HEADER.unpack(head)
        data = source.read(size)
        if len(data) < size:
            return
        if operation == CPU:
            write(out, struct.pack("<d", time.process_time()))
            continue
        if failed and operation in held.silent:
            continue
        if failed and operation not in held.anew:
            write(out, failed.encode(), status=FAILED)
            continue
        try:
            told = held.answer(operation, a, b, data)
        except Exception as error:
            if operation in held.silent:  # a tree may have learned half a row: nothing goes on from here
                failed = tell(error)
            else:
                write(out, tell(error).encode(), status=FAILED)
        else:
            if told is not None:
                failed = ""
                write(out, *told)


def write(out: BinaryIO, payload: bytes, a: int = 0, b: int = 0, *, status: int = 0) -> None:
    out.write(HEADER.pack(status, a, b, len(payload)) + payload)
    out.flush()


def tell(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def main(make: Callable[..., Held]) -> None:
    """Hold what `make` makes of the settings that this process was started with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it saves first, then ends this process
    source, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever prints, Java too, prints beside the frames

    def run() -> None:
        try:
            import capymoa
            import jpype

            held = make(**json.loads(sys.argv[1]))
            versions = {"capymoa": capymoa.__version__, "java": str(jpype.java.lang.System.getProperty("java.version"))}
        except BaseException as error:
            payload, status = tell(error).encode(), IMPOSSIBLE if isinstance(error, Impossible) else FAILED
        else:
            payload, status = json.dumps(versions).encode(), 0
        try:
            write(out, payload, status=status)
            if status == 0:
                serve(held, source, out)
        except OSError:
            status = 1  # nobody listens any more
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            os._exit(status)  # the JVM has nothing to save, and would take its time

    threading.stack_size(STACK)
    thread = threading.Thread(target=run)
    parent = os.getppid()
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
        if os.getppid() != parent:  # its input has ended too, but Java may be long at work before that is read
            os._exit(1)


if __name__ == "__main__":
    main(Trees)
