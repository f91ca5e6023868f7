"""Whether a comparison shows that routing helps: decided by a rule that is fixed beforehand, never typed.

An arm is above another if the mean of the seed-paired differences of their mean scores exceeds two of their standard
deviations, over at least three seeds; worse, if it is as far below. A deviation counts as no less than what one row
makes, since few rows can agree by chance. Routing helps where a learned router's arm is above every plain LoRA and
every gate that learns nothing (uniform, random) on the same modules: above LoRA alone may be the experts' doing.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moesaic.report.tables import MATCHED, number

LEAST_SEEDS = 3
DEVIATIONS = 2.0
Kind = Literal["plain", "fixed", "learned", "told", "oracle"]
"""Experts are: none; chosen by a rule; by a trained router; by one that needs task ids; by task ids alone."""


@dataclass(frozen=True)
class Verdict:
    """`holds` is None where the cells at hand cannot decide; `worse` names the arms that this one is worse than."""

    arm: str
    claim: str
    holds: bool | None
    worse: list[str]
    text: str


def kind_of(method: str, config: Any) -> Kind:
    """The kind of an arm, from its method and config."""
    if method == "oracle":
        return "oracle"
    if not hasattr(config, "kind"):
        return "plain"
    if not config.kind.learns_routing:
        return "fixed"
    return "told" if config.kind.needs_tasks else "learned"


def verdicts(arms: Sequence[Mapping[str, Any]], baseline: str, *, row: float = 0.0) -> list[dict[str, Any]]:
    """One verdict an arm that learns its routing, or knows it (the oracle).

    Args:
        arms: a summary's: name, method, kind, modules and, of finished ones, seeds, their mean scores (`values`) and
            parameters.
        row: what one scored row makes of a mean score.
        baseline: named first where it is among those that an arm is compared with.
    """
    means = {arm["arm"]: dict(zip(arm["seeds"], arm.get("values", ()), strict=True)) for arm in arms}
    found = []
    for arm in arms:
        alike = [other for other in arms if other["modules"] == arm["modules"]]
        plain = [other for other in alike if other["method"] == "lora"]
        others = {"plain LoRA": sorted(plain, key=lambda other: bool(other["arm"] != baseline))}
        if arm["kind"] == "oracle":
            claim = _oracle_claim(arm, plain)
        elif arm["kind"] in ("learned", "told"):
            others["a gate that learns nothing"] = [other for other in alike if other["kind"] == "fixed"]
            told = arm["kind"] == "told"
            claim = "routing by the task id, which plain LoRA is not told, helps" if told else "routing helps"
        else:
            continue
        missing = [what for what, group in others.items() if not group]
        if missing:
            why = f"there is no arm with {' or '.join(missing)} on the same modules"
            found.append(_undecided(arm["arm"], claim, why))
        else:
            groups = [[other["arm"] for other in group] for group in others.values()]
            found.append(_judge(means, arm["arm"], claim, groups, 100 * row))
    return [asdict(v) for v in found]


def _oracle_claim(arm: Mapping[str, Any], plain: Sequence[Mapping[str, Any]]) -> str:
    own, other = arm.get("trainable_parameters"), max((p.get("trainable_parameters") or 0 for p in plain), default=0)
    if own and other and own > MATCHED * other:
        return f"knowing the task helps, given {own / other:.1f} times the parameters"
    return "knowing the task helps"


def _judge(
    means: Mapping[str, Mapping[int, float]], arm: str, claim: str, groups: list[list[str]], least: float
) -> Verdict:
    """By all arms of all groups; of each group the highest arm is told. `least`: the smallest deviation, in points."""
    said, above, worse = [], [], []
    for group in groups:
        told: list[tuple[float, str]] = []
        for other in group:
            seeds = sorted(means[arm].keys() & means[other].keys())
            if len(seeds) < LEAST_SEEDS:
                text = f"{len(seeds)} seed{'s' * (len(seeds) != 1)} in common with {other}, {LEAST_SEEDS} are needed"
                return _undecided(arm, claim, text)
            gaps = [100 * (means[arm][s] - means[other][s]) for s in seeds]
            mean, deviation = statistics.fmean(gaps), statistics.stdev(gaps)
            line = DEVIATIONS * max(deviation, least)
            above.append(mean > line)
            worse += [other] if -mean > line else []
            best = f", the highest of {len(group)}" if len(group) > 1 else ""
            figures = f"{number(mean, '{:+.1f}')} ± {deviation:.1f} points against {other}{best} ({len(seeds)} seeds)"
            told.append((mean, figures))
        said.append(min(told)[1])
    figures, each = " and ".join(said), "each " if len(above) > 1 else ""
    if all(above):
        text = f"{claim}: {figures}, {each}above two standard deviations"
    elif worse:
        names = " and ".join(worse) if len(worse) <= 2 else f"{worse[0]} and {len(worse) - 1} others"
        text = f"worse than {names} by more than two standard deviations, no sign that {claim}: {figures}"
    else:
        text = f"no sign that {claim}: {figures}, not {each}above two standard deviations"
    return Verdict(arm, claim, all(above), worse, f"{arm}: {text}")


def _undecided(arm: str, claim: str, why: str) -> Verdict:
    return Verdict(arm, claim, None, [], f"{arm}: not decided whether {claim}: {why}")
