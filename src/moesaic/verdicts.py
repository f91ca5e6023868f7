"""Whether a comparison shows that routing helps: decided by a rule that is fixed beforehand, never typed.

An arm is above another if the mean of the seed-paired differences of their mean scores exceeds two of their standard
deviations, over at least three seeds; worse, if it is as far below. Routing helps where a learned router's arm is above
both the baseline and the uniform gate on the same experts: above the baseline alone may be the experts' doing.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moesaic.tables import number

LEAST_SEEDS = 3
DEVIATIONS = 2.0
MATCHED = 1.05
"""Arms whose trainable parameters differ by no more than this factor count as equal in them."""


@dataclass(frozen=True)
class Verdict:
    """`holds` is None where the cells at hand cannot decide; `worse` names the arms that this one is worse than."""

    arm: str
    claim: str
    holds: bool | None
    worse: list[str]
    text: str


def verdicts(arms: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One verdict an arm that learns its routing, or knows it (the oracle).

    Args:
        arms: a summary's: name, method and, of finished ones, seeds, their mean scores (`values`) and parameters.
    """
    from moesaic.recipe import methods

    known, by_name = methods(), {arm["arm"]: arm for arm in arms}
    uniform = next((arm["arm"] for arm in arms if arm["method"] == "uniform"), None)
    means = {name: dict(zip(arm["seeds"], arm.get("values", ()), strict=True)) for name, arm in by_name.items()}
    found = []
    for name, arm in by_name.items():
        if name == baseline:
            continue
        if arm["method"] == "oracle":
            found.append(_judge(means, name, _oracle_claim(arm, by_name.get(baseline, {})), [baseline]))
        elif getattr(known.get(arm["method"]), "learns_routing", False):
            told = getattr(known[arm["method"]], "needs_tasks", False) is True
            claim = f"routing by the task id, which {baseline} is not told, helps" if told else "routing helps"
            found.append(_judge(means, name, claim, [baseline, uniform]))
    return [asdict(v) for v in found]


def _oracle_claim(arm: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    own, other = arm.get("trainable_parameters"), baseline.get("trainable_parameters")
    if own and other and own > MATCHED * other:
        return f"knowing the task helps, given {own / other:.1f} times the parameters"
    return "knowing the task helps"


def _judge(means: Mapping[str, Mapping[int, float]], arm: str, claim: str, others: list[str | None]) -> Verdict:
    said, above, worse = [], [], []
    for other in others:
        if other is None:
            return _undecided(arm, claim, "there is no arm with a uniform gate")
        seeds = sorted(means.get(arm, {}).keys() & means.get(other, {}).keys())
        if len(seeds) < LEAST_SEEDS:
            text = f"{len(seeds)} seed{'s' * (len(seeds) != 1)} in common with {other}, {LEAST_SEEDS} are needed"
            return _undecided(arm, claim, text)
        gaps = [100 * (means[arm][s] - means[other][s]) for s in seeds]
        mean, deviation = statistics.fmean(gaps), statistics.stdev(gaps)
        if mean > DEVIATIONS * deviation:
            above.append(other)
        if -mean > DEVIATIONS * deviation:
            worse.append(other)
        said.append(f"{number(mean, '{:+.1f}')} ± {deviation:.1f} points against {other} ({len(seeds)} seeds)")
    figures, each = " and ".join(said), "each " if len(said) > 1 else ""
    if len(above) == len(others):
        text = f"{claim}: {figures}, {each}above two standard deviations"
    elif worse:
        text = f"worse than {' and '.join(worse)} by more than two standard deviations, no sign that {claim}: {figures}"
    else:
        text = f"no sign that {claim}: {figures}, not {each}above two standard deviations"
    return Verdict(arm, claim, len(above) == len(others), worse, f"{arm}: {text}")


def _undecided(arm: str, claim: str, why: str) -> Verdict:
    return Verdict(arm, claim, None, [], f"{arm}: not decided whether {claim}: {why}")
