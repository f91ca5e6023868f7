"""Whether a comparison shows that routing helps: decided by a rule that is fixed beforehand, never typed.

An arm is above another if the mean of the seed-paired differences of their mean scores exceeds two of their standard
deviations, over at least three seeds. Routing helps where a learned router's arm is above both the baseline and the
uniform gate on the same experts: above the baseline alone may be the experts' doing.
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MINUS = "\N{MINUS SIGN}"
LEAST_SEEDS = 3
DEVIATIONS = 2.0
MATCHED = 1.05
"""An oracle with more than this many times the baseline's parameters is said to have them."""

Means = Mapping[str, Mapping[int, float]]
"""Arm -> seed -> mean score."""


@dataclass(frozen=True)
class Verdict:
    """`holds` is None where the cells at hand cannot decide."""

    arm: str
    claim: str
    holds: bool | None
    text: str


def verdicts(
    means: Means, methods: Mapping[str, str], parameters: Mapping[str, int | None], baseline: str
) -> list[dict[str, Any]]:
    """One verdict an arm that learns its routing, or knows it (the oracle).

    Args:
        methods: arm -> its method. parameters: arm -> trainable parameters, where known.
    """
    from moesaic.recipe import methods as registered

    known = registered()
    uniform = next((arm for arm, method in methods.items() if method == "uniform"), None)
    found = []
    for arm, method in methods.items():
        if arm == baseline:
            continue
        if method == "oracle":
            found.append(_judge(means, arm, _oracle_claim(parameters.get(arm), parameters.get(baseline)), [baseline]))
        elif getattr(known.get(method), "learns_routing", False):
            found.append(_judge(means, arm, "routing helps", [baseline, uniform]))
    return [asdict(v) for v in found]


def _oracle_claim(own: int | None, other: int | None) -> str:
    if own and other and own > MATCHED * other:
        return f"knowing the task helps, given {own / other:.1f} times the parameters"
    return "knowing the task helps"


def _judge(means: Means, arm: str, claim: str, others: list[str | None]) -> Verdict:
    said, above = [], []
    for other in others:
        if other is None:
            return Verdict(arm, claim, None, f"{arm}: not decided whether {claim}: there is no arm with a uniform gate")
        seeds = sorted(means.get(arm, {}).keys() & means.get(other, {}).keys())
        if len(seeds) < LEAST_SEEDS:
            text = f"{len(seeds)} seed{'s' * (len(seeds) != 1)} in common with {other}, {LEAST_SEEDS} are needed"
            return Verdict(arm, claim, None, f"{arm}: not decided whether {claim}: {text}")
        gaps = [100 * (means[arm][s] - means[other][s]) for s in seeds]
        mean, deviation = statistics.fmean(gaps), statistics.stdev(gaps)
        above.append(mean > DEVIATIONS * deviation)
        gap = f"{mean:+.1f} ± {deviation:.1f}".replace("-", MINUS)
        said.append(f"{gap} points against {other} ({len(seeds)} seeds)")
    figures, both = " and ".join(said), "each " if len(said) > 1 else ""
    if all(above):
        return Verdict(arm, claim, True, f"{arm}: {claim}: {figures}, {both}above two standard deviations")
    return Verdict(
        arm, claim, False, f"{arm}: no sign that {claim}: {figures}, not {both}above two standard deviations"
    )
