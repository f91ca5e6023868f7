"""Pages of policies: how well they do, how they move, and which skill each joint listens to when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.report import charts
from moesaic.report.page import Figure, of_run
from moesaic.report.text import Grid


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page of policies that were measured, side by side where they are several."""
    first = results[0]
    facts = [
        ("task", first["task"]), ("body", first["body"]),
        ("rollouts", f"{first['rollouts']} of {first['seconds']:g} s"),
        ("skills", ", ".join(first["skills"])),
        ("trained", ", ".join(f"{r['trained'].get('steps', 0):,} steps" for r in results)),
    ]  # fmt: skip
    return of_run(
        "moesaic skill", f"{', '.join(dict.fromkeys(r['kind'] for r in results))} on {first['task']}",
        facts=[(name, said) for name, said in facts if said], grids=grids(results),
        figures=[made for r in results if (made := _weights(r)) is not None],
        settings={r["run"]: r["trained"].get("settings", {}) for r in results}, versions=first["versions"],
    )  # fmt: skip


def grids(results: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Tables: accuracy, then feasibility."""
    errors = list(dict.fromkeys(name for r in results for name in r["errors"]))
    rows = [
        [r["run"], r["kind"], *(_error(r["errors"].get(name)) for name in errors), f"{100 * r['success']:.0f} %",
         f"{100 * r['survival']:.0f} %"]
        for r in results
    ]  # fmt: skip
    accuracy = Grid(
        "Accuracy", ["run", "kind", *(f"{name} error" for name in errors), "success", "survival"], rows,
        [("error", "m, m/s or rad when a goal changes or the episode ends: mean and standard deviation over rollouts")],
    )  # fmt: skip
    named = {"velocity": "|dq| rad/s", "torque": "|torque| Nm", "energy": "their product", "tilt": "tilt rad",
             "height": "height m", "jerk": "action change²", "jolt": "jolt m/s"}  # fmt: skip
    moving = [[r["run"], *(f"{r[name]:.3f}" for name in named)] for r in results]
    return [
        accuracy,
        Grid("Feasibility", ["run", *named.values()], moving, [("all", "means over steps before a fall")]),
    ]


def _error(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['mean']:.3f} ± {found['sd']:.3f}"


def _weights(result: Mapping[str, Any]) -> Figure | None:
    """For each skill, its weight in each joint over the rollout."""
    if not result["weights"]:
        return None
    drawn = []
    for number, skill in enumerate(result["skills"]):
        over = {joint: [part[row][number] for part in result["weights"]] for row, joint in enumerate(result["joints"])}
        made = charts.shares(
            {"": over}, title=f"Weight of {skill} by joint, over time", over="", of="time",
            description=f"Mean weights of {skill}, from the beginning of a rollout to its end.",
        )  # fmt: skip
        drawn.append((skill, made))
    caption = f"Mean over rollouts, in {len(result['weights'])} parts of {result['seconds']:g} s."
    return Figure("Which skill each joint listens to", drawn, caption)
