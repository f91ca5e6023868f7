"""Writes docs/findings.md: scripts/findings.md.j2 with figures from results/. Run it as `python scripts/findings.py`.

The prose is fixed, its figures are not; where they would make it untrue, `check` in the template stops it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from results import COMPARISONS, ROOT, spread


class Findings:
    """Figures for the findings' prose, each read from a comparison in results/ by its short name."""

    def __init__(self, folder: Path) -> None:
        self.summaries = {
            name.removeprefix("compare-").removeprefix("nano-"): json.loads((folder / f"{name}.json").read_text())
            for name in COMPARISONS
            if (folder / f"{name}.json").is_file()
        }

    def arm(self, name: str, arm: str) -> dict[str, Any]:
        return next(a for a in self.summaries[name]["arms"] if a["arm"] == arm)

    def mean(self, name: str, arm: str) -> str:
        return spread([100 * v for v in self.arm(name, arm)["values"]])

    def values(self, name: str, arm: str, task: str = "") -> str:
        """By seed: the mean over tasks, or one task."""
        found = self.arm(name, arm)["scores"][task] if task else self.arm(name, arm)
        return ", ".join(f"{100 * v:.1f}" for v in found["values"])

    def task(self, name: str, arm: str, task: str) -> str:
        return f"{100 * self.arm(name, arm)['scores'][task]['mean']:.0f}"

    def gap(self, name: str, arm: str, other: str) -> str:
        """Paired by seed, signed."""
        pairs = zip(self.arm(name, arm)["values"], self.arm(name, other)["values"], strict=True)
        text = spread([100 * (a - b) for a, b in pairs])
        return text if text.startswith("-") else f"+{text}"

    def relative(self, name: str, arm: str) -> str:
        return f"{self.arm(name, arm)['mean_relative_difference']:+.1f} %"

    def routing(self, name: str, arm: str, key: str, form: str) -> str:
        return form.format(self.arm(name, arm)["routing"][key])

    def tuning(self, name: str, arm: str) -> str:
        """Scores of the trials by rate."""
        scores = self.summaries[name]["settings"]["tuning"][arm]
        return ", ".join(f"{100 * score:.1f} at {rate}" for rate, score in scores.items())

    def span(self, name: str, arms: list[str]) -> str:
        """The lowest and the highest mean of some arms."""
        means = [100 * self.arm(name, arm)["mean"] for arm in arms]
        return f"{min(means):.1f} to {max(means):.1f}"

    def check(self, name: str, arm: str, holds: bool) -> str:
        """Nothing, if the verdict on the arm is what the prose around it says; AssertionError if it is not."""
        verdict = next(v for v in self.summaries[name]["verdicts"] if v["arm"] == arm)
        assert verdict["holds"] is holds, f"findings.md.j2 says otherwise of {name}: {verdict['text']}"
        return ""

    def none_holds(self, name: str) -> str:
        """Nothing, if no learned router helps; AssertionError if one does."""
        kinds = {arm["arm"]: arm["kind"] for arm in self.summaries[name]["arms"]}
        held = [v["text"] for v in self.summaries[name]["verdicts"] if v["holds"] and kinds[v["arm"]] == "learned"]
        assert not held, f"findings.md.j2 says otherwise of {name}: {held}"
        return ""


def page(folder: Path) -> str:
    """scripts/findings.md.j2 with its figures filled in."""
    from jinja2 import Environment, StrictUndefined

    found = Findings(folder)
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string((ROOT / "scripts" / "findings.md.j2").read_text())
    known = {name: getattr(found, name) for name in vars(Findings) if not name.startswith("_")}
    return template.render(known)


if __name__ == "__main__":
    (ROOT / "docs" / "findings.md").write_text(page(ROOT / "results"))
