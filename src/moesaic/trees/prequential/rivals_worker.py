"""The child process that holds one of CapyMOA's classifiers; `rivals.py` starts it and talks to it.

It is run as a file and imports nothing of ours, as `jvm_worker.py`, whose frames it speaks.

| operation | a | b | payload | answer |
| --- | --- | --- | --- | --- |
| `PREDICT` | | | x (float64) | probabilities (float64); empty where there is no telling |
| `LEARN` | class | | x (float64) | none; the next one tells of an error |
| `TEST` | rows n | | y (int64), x (n, d) (float64) | predictions (int64) |

A chunk of rows goes through the loop in Java that `capymoa.evaluation.prequential_evaluation` has for MOA's learners,
without the figures that it would keep beside: rows become Java's instances, and predictions an array, in a few calls.
"""

from __future__ import annotations

import inspect
import runpy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

PREDICT, LEARN, TEST = range(3)
Impossible: type[Exception] = ValueError
"""What `jvm_worker.py` takes for a setting that cannot be; it says which."""


class Rival:
    """A classifier of CapyMOA's.

    Args:
        kind: its name in `capymoa.classifier`.
        features, classes: how many.
        given: of its constructor.
    """

    silent: tuple[int, ...] = (LEARN,)
    anew: tuple[int, ...] = ()

    def __init__(self, kind: str, features: int, classes: int, given: dict[str, Any]) -> None:
        import jpype
        from capymoa import __version__, classifier
        from capymoa.stream import Schema
        from com.yahoo.labs.samoa.instances import DenseInstance, Instance, Instances
        from java.lang.invoke import MethodHandles, MethodType

        made = getattr(classifier, kind, None)
        if made is None:
            raise Impossible(f"CapyMOA {__version__} has no classifier {kind}: pip install -U capymoa")
        known = [*inspect.signature(made).parameters]
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise Impossible(f"CapyMOA's {kind} has no setting {name}; {hint}known: {', '.join(sorted(known))}")
        names = [*(f"x{i}" for i in range(features)), "class"]
        labels = {"class": [str(c) for c in range(classes)]}
        self.schema = Schema.from_custom(names, "class", labels, "rows")
        try:
            self.learner = made(self.schema, **given)
        except Exception as error:
            raise Impossible(f"CapyMOA's {kind} cannot be made so: {str(error).splitlines()[0]}") from None
        self.header = self.schema.get_moa_header()
        self.features = features
        lookup, java = MethodHandles.publicLookup(), jpype.java.lang
        # row -> its instance, and what gives it the header
        built = lookup.findConstructor(
            DenseInstance, MethodType.methodType(java.Void.TYPE, java.Double.TYPE, jpype.JArray(jpype.JDouble).class_)
        )
        self.built = MethodHandles.insertArguments(built, 0, java.Double(1.0)).asType(
            MethodType.methodType(Instance.class_, jpype.JArray(jpype.JDouble).class_)
        )
        headed = lookup.findVirtual(Instance, "setDataset", MethodType.methodType(java.Void.TYPE, Instances.class_))
        headed = MethodHandles.insertArguments(headed, 1, self.header)
        self.headed = MethodHandles.foldArguments(MethodHandles.identity(Instance.class_), headed)
        self.added = lookup.findVirtual(Instances, "add", MethodType.methodType(java.Void.TYPE, Instance.class_))
        self.whole = lookup.findVirtual(java.Integer, "intValue", MethodType.methodType(java.Integer.TYPE))

    def rows(self, x: Any, y: Any) -> Any:
        """Rows (n, d) and their classes (n,) as Java's instances: `i -> add(headed(new DenseInstance(1, x[i])))`."""
        import jpype
        import numpy as np
        from com.yahoo.labs.samoa.instances import Instances
        from java.lang.invoke import MethodHandleProxies, MethodHandles
        from java.util.function import IntConsumer
        from java.util.stream import IntStream

        table = jpype.JArray.of(np.concatenate([x, y[:, None].astype(np.float64)], axis=1))
        found = Instances(self.header, len(y))
        step = MethodHandles.arrayElementGetter(table.getClass()).bindTo(table)
        for after in (self.built, self.headed, self.added.bindTo(found)):
            step = MethodHandles.filterReturnValue(step, after)
        IntStream.range(0, len(y)).forEach(MethodHandleProxies.asInterfaceInstance(IntConsumer.class_, step))
        return found

    def test(self, x: Any, y: Any) -> Any:
        import numpy as np
        from java.lang.invoke import MethodHandleProxies
        from java.util.function import ToIntFunction
        from moa.evaluation import EfficientEvaluationLoops
        from moa.streams import CachedInstancesStream

        stream = CachedInstancesStream(self.rows(x, y))
        told = EfficientEvaluationLoops.PrequentialEvaluation(
            stream, self.learner.moa_learner, None, None, -1, 0, False, True
        )
        number = MethodHandleProxies.asInterfaceInstance(ToIntFunction.class_, self.whole)
        return np.array(told.predictions.stream().mapToInt(number).toArray(), np.int64)

    def answer(self, operation: int, a: int, b: int, data: bytes) -> tuple[bytes, int, int] | None:
        import numpy as np
        from capymoa.core import Instance, LabeledInstance

        if operation == TEST:
            y, x = np.frombuffer(data[: 8 * a], np.int64), np.frombuffer(data[8 * a :]).reshape(a, self.features)
            return self.test(x, y).tobytes(), 0, 0
        if operation == LEARN:
            self.learner.train(LabeledInstance.from_array(self.schema, np.frombuffer(data), a))
            return None
        found = self.learner.predict_proba(Instance.from_array(self.schema, np.frombuffer(data)))
        return b"" if found is None else np.asarray(found, np.float64).tobytes(), 0, 0


if __name__ == "__main__":
    worker = runpy.run_path(str(Path(__file__).parents[1] / "jvm_worker.py"))
    Impossible = worker["Impossible"]
    worker["main"](Rival)
