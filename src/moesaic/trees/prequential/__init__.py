"""Prequential evaluation: test, then train, row by row, with figures, recovery after drifts and exact resumption."""

from moesaic.trees.prequential.baselines import Majority, NoChange, RiverLearner, from_river
from moesaic.trees.prequential.learner import Forked, Learner, Quick, Watched
from moesaic.trees.prequential.metrics import METRICS, Evaluator, Figures
from moesaic.trees.prequential.recovery import Recovery, recoveries
from moesaic.trees.prequential.result import Result
from moesaic.trees.prequential.run import prequential

__all__ = [
    "METRICS",
    "Evaluator",
    "Figures",
    "Forked",
    "Learner",
    "Majority",
    "NoChange",
    "Quick",
    "Recovery",
    "Result",
    "RiverLearner",
    "Watched",
    "from_river",
    "prequential",
    "recoveries",
]
