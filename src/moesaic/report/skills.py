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
    curves = {r["run"]: r["learning"] for r in results if r["learning"]}
    tasks = ", ".join(dict.fromkeys(r["task"] for r in results))
    facts = [
        ("task", tasks), ("body", ", ".join(dict.fromkeys(r["body"] for r in results))),
        ("rollouts", f"{first['rollouts']} of {first['seconds']:g} s"),
        ("skills", ", ".join(first["skills"])),
        ("trained", ", ".join(f"{r['trained'].get('steps', 0):,} steps" for r in results)),
    ]  # fmt: skip
    return of_run(
        "moesaic skill", f"{', '.join(dict.fromkeys(r['kind'] for r in results))} on {tasks}",
        facts=[(name, said) for name, said in facts if said], grids=grids(results),
        figures=[
            *(made for r in results if (made := _weights(r, several=len(results) > 1)) is not None),
            *([learning(curves)] if curves else []),
        ],
        settings={r["run"]: r["trained"].get("settings", {}) for r in results}, versions=first["versions"],
    )  # fmt: skip


def learning_page(results: Mapping[str, Any], rounds: Sequence[Sequence[float]]) -> str:
    """The page of a policy that was trained, and not yet measured."""
    kept, last = results["settings"], results["last"]
    facts = [("task", results["task"]), ("body", kept["body"]), ("skills", ", ".join(kept["skills"])),
             ("trained", f"{results['steps']:,} steps in {results['cpu_seconds']:.0f} CPU seconds"),
             ("bodies that diverged", f"{results['diverged']:,}" if results["diverged"] else ""),
             ("command", results["command"])]  # fmt: skip
    named = {"reward": "reward a step", "falls": "falls a step", "std": "deviation of actions", "lr": "learning rate"}
    ended = [[said, f"{last[name]:.3g}"] for name, said in named.items() if name in last]
    return of_run(
        "moesaic skill", f"{results['kind']} on {results['task']}", facts=[(a, b) for a, b in facts if b],
        grids=[Grid("The last round", ["figure", "value"], ended, [])],
        figures=[learning({results["kind"]: rounds})] if rounds else [],
        settings={results["task"]: kept}, versions=results["versions"],
    )  # fmt: skip


def learning(runs: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Curves of runs by name: points (steps, reward a step, share of steps that were falls)."""
    drawn = []
    for which, up in ((1, "reward a step"), (2, "falls, % of steps")):
        series = [
            charts.Line(name, [(point[0], point[which] * (100 if which == 2 else 1)) for point in points], number)
            for number, (name, points) in enumerate(runs.items())
        ]
        said = "; ".join(f"{s.label} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series)
        drawn.append((up, charts.lines(series, across="control steps", up=up, title=up, description=said)))
    return Figure("Learning", drawn, "Means over rounds of training, with exploration and randomised bodies.")


def grids(results: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Tables: accuracy, then feasibility."""
    errors = list(dict.fromkeys(name for r in results for name in r["errors"]))
    rows = [
        [r["run"], r["kind"], *(_error(r["errors"].get(name)) for name in errors), f"{100 * r['success']:.0f}",
         f"{100 * r['survival']:.0f}"]
        for r in results
    ]  # fmt: skip
    accuracy = Grid(
        "Accuracy", ["run", "kind", *(f"{name} error, {unit(name)}" for name in errors), "success, %", "survival, %"],
        rows,
        [("error", "just before a goal changes or the episode ends: mean ± standard deviation over rollouts"),
         ("success", "goals that were met, standing"), ("survival", "rollouts without a fall")],
    )  # fmt: skip
    named = {"velocity": "|dq|, rad/s", "torque": "|torque|, Nm", "energy": "|dq| |torque|, W", "tilt": "tilt, rad",
             "height": "height, m", "jerk": "action change²", "jolt": "jolt, m/s"}  # fmt: skip
    moving = [[r["run"], *(f"{r[name]:.3g}" for name in named)] for r in results]
    return [
        accuracy,
        Grid("Feasibility", ["run", *named.values()], moving, [("all", "means over steps before a fall")]),
    ]


def unit(error: str) -> str:
    """Of an error, by its name."""
    return {"velocity": "m/s", "sideways": "m/s", "turn": "rad/s"}.get(error, "m")


def _error(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{found['mean']:.3f} ± {found['sd']:.3f}"


def _weights(result: Mapping[str, Any], *, several: bool) -> Figure | None:
    """For each skill, its weight in each joint over the rollout."""
    if not result["weights"]:
        return None
    drawn = []
    each = result["seconds"] / len(result["weights"])
    equal = 1 / len(result["skills"])
    strongest = max(2 * equal, *(weight for part in result["weights"] for row in part for weight in row))
    for number, skill in enumerate(result["skills"]):
        over = {joint: [part[row][number] for part in result["weights"]] for row, joint in enumerate(result["joints"])}
        made = charts.shares(
            {"": over}, title=f"Weight of {skill} by joint, over time", over="", of="second", strongest=strongest,
            equal=equal,
            names=[f"{each * part:.3g}" for part in range(len(result["weights"]))],
            description=f"Mean weights of {skill}, from the beginning of a rollout to its end.",
        )  # fmt: skip
        drawn.append((skill, made))
    caption = f"Mean over rollouts, in {len(result['weights'])} parts of {result['seconds']:g} s."
    of = f", {result['run']}" if several else ""
    return Figure(f"Which skill each joint listens to{of}", drawn, caption)
