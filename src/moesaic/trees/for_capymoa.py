"""DriftMoE as a classifier of CapyMOA's, for its evaluations and for loops over its streams.

```python
from capymoa.evaluation import prequential_evaluation
from capymoa.stream.generator import SEA
from moesaic.trees.for_capymoa import DriftMoEClassifier

stream = SEA()
results = prequential_evaluation(stream, DriftMoEClassifier(stream.get_schema()), max_instances=10_000)
```

Nominal attributes are numbers to it: the places of their values in the schema. Importing this starts CapyMOA's JVM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, MissingDependency
from moesaic.trees.driftmoe import DriftMoE
from moesaic.trees.jvm import check_java
from moesaic.trees.settings import settings as settings_of

check_java()
try:
    from capymoa.base import Classifier
except ImportError:
    raise MissingDependency("capymoa", "capymoa") from None


class DriftMoEClassifier(Classifier):  # type: ignore[misc, unused-ignore]
    """A pool of incremental trees and a router that learns beside them which of them is right about what.

    Args:
        schema: of the stream, whose target has to be a class.
        random_seed: of all that is drawn.
        settings: those of `moesaic.trees.DriftMoEClassifier` but its seed: `fidelity`, `variant`, `backend`,
            `n_experts` and so on. With `backend="capymoa"` the trees are in a process of their own.
    Raises:
        ConfigError: a setting is unknown or impossible, or the schema is one for regression.
        MissingDependency: what the backend needs is not installed.
    """

    def __init__(self, schema: Any, random_seed: int = 1, **settings: Any) -> None:
        super().__init__(schema=schema, random_seed=random_seed)
        if "seed" in settings:
            raise ConfigError("seed is random_seed here, as in all of CapyMOA's learners")
        if not schema.is_classification():
            raise ConfigError("a DriftMoE tells classes, and the schema's target is a number")
        self.core = DriftMoE(settings_of(**settings, seed=random_seed))
        self._given = dict(settings)

    def train(self, instance: Any) -> None:
        """Learn a labeled instance; one whose label is missing changes nothing."""
        label = instance.y_index
        if label >= 0:
            self.core.learn(_row(instance), label)

    def predict_proba(self, instance: Any) -> NDArray[np.float64] | None:
        """Probabilities (classes of the schema,), None before anything was learned; nothing changes by it."""
        if not self.core.rows:
            return None
        return self.core.predict_proba(_row(instance), self.schema.get_num_classes())

    def get_params(self) -> dict[str, Any]:
        """What it was made with, but for the schema and the seed."""
        return dict(self._given)

    def close(self) -> None:
        """End what the trees hold outside of this process."""
        self.core.close()

    def __str__(self) -> str:
        return f"DriftMoE ({self.core.settings.variant}, {self.core.settings.fidelity})"


def _row(instance: Any) -> NDArray[np.float64]:
    return np.ascontiguousarray(instance.x, dtype=np.float64)
