"""The folder of a comparison: whose it is, and whether what is asked for continues what is there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from moesaic.compare.arms import Plan
from moesaic.compare.settings import BY_CELL, FILE
from moesaic.errors import ConfigError
from moesaic.runs.folder import check_writable, discard, locked, read_json, reading, write_json, write_text, writing
from moesaic.runs.recipe import Recipe, dump
from moesaic.runs.results import command_line
from moesaic.runs.settings import differences, read_yaml

ARMS = "arms.json"
_FREE = {
    "out",
    "overwrite",
    "engine",
    "workers",
    "threads",
    "gpus",
    "keep",
    "save_every",
    "report_to",
    "budget",
    "controls",
}
"""Settings that may be others when a comparison is continued; what the last two came to is compared."""
_GROWING = ("methods", "seeds", "arms")
"""Settings that may be added to."""


def check_folder(out: Path) -> None:
    """Raise ConfigError where `out` cannot be made, or is something else than a comparison's folder."""
    check_writable(out, f"out={out}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; name a folder")
    ours = (".lock", f".{FILE}.part")
    if out.is_dir() and not (out / FILE).is_file() and any(p.name not in ours for p in out.iterdir()):
        raise ConfigError(f"out={out} holds files that are not a comparison's; name another folder")


def check_same(out: Path, planned: Plan) -> None:
    """Raise ConfigError, naming what differs, where `out` holds a comparison that this one does not continue."""
    if not (out / FILE).is_file():
        return
    asked, hint = pinned(planned), "or overwrite=true, or another out="
    younger = {setting.name: setting.default for setting in fields(Recipe)}  # settings that came after the comparison
    stored = {**younger, **read_yaml(out / FILE)}
    for key, new in asked.items():
        old = stored.get(key)
        if key in _FREE:
            continue
        if key in _GROWING:
            kept = old if isinstance(old, (list, dict)) else [old]
            gone = [str(entry) for entry in kept if entry not in new]
            if gone:
                raise ConfigError(f"{out} holds a comparison whose {key} have {', '.join(gone)}: leave it in, {hint}")
        elif key != "adapter" and old != new:
            changed = differences({key: old}, {key: new})
            raise ConfigError(f"{out} holds a comparison with {changed}: set it back, {hint}")
    if not (out / ARMS).is_file():
        if any((out / name).is_dir() for name in ("cells", "tuning")):
            raise ConfigError(f"{out} has runs but no {ARMS}, which says what they were trained on: restore it, {hint}")
        return
    past = _past(out)
    rows = {"training": (past["data_sha256"], planned.data_sha256)}
    rows |= {split: (past["scored_sha256"].get(split, new), new) for split, new in planned.scored_sha256.items()}
    for what, (old, new) in rows.items():
        if old != new:
            raise ConfigError(
                f"{out} holds a comparison on other {what} rows of data={planned.shared.data}: set them back, {hint}"
            )
    for name, arm in resolved(planned)["arms"].items():
        old = past["arms"].get(name, arm)
        for file, digest in arm["read"].items():
            if old["read"].get(file, digest) != digest:
                raise ConfigError(
                    f"{out} holds a comparison with another {file} than there is now: set it back, {hint}"
                )
        before, now = ({"method": a["method"], **a["adapter"]} for a in (old, arm))
        changed = differences(before, now, f"arms.{name}")
        if changed:
            if past.get("budget_of") and past["budget_of"] != planned.budget_of:
                hint = f"or budget={past['budget_of']}, to which arms were matched there, {hint}"
            raise ConfigError(
                f"{out} holds a comparison with {changed}: set back what it comes from (arms, adapter, budget), {hint}"
            )


def _past(out: Path) -> dict[str, Any]:
    """What the comparison in `out` came to. Raises ConfigError where that cannot be read."""
    try:
        past = read_json(out / ARMS)
        with reading(out / ARMS):
            for key, kind in (("arms", dict), ("scored_sha256", dict), ("data_sha256", str), ("command", str)):
                if not isinstance(past[key], kind):
                    raise TypeError(key)
            for arm in past["arms"].values():
                _ = {**arm["adapter"], **arm["read"], "method": arm["method"]}
    except ConfigError:
        raise ConfigError(
            f"{out / ARMS} is damaged, and it says what the runs there were trained on: restore it, or overwrite=true, "
            "or another out="
        ) from None
    return past


def pinned(planned: Plan) -> dict[str, Any]:
    """All settings in one, as they read after a trip through YAML."""
    from omegaconf import OmegaConf

    shared = {key: value for key, value in asdict(planned.shared).items() if key not in BY_CELL}
    merged = OmegaConf.to_container(OmegaConf.create(shared | asdict(planned.settings)))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items() if key != "overwrite"}


def resolved(planned: Plan) -> dict[str, Any]:
    """What the settings came to, as it reads after a trip through JSON."""
    arms = {
        name: {
            "method": arm.recipe.method,
            "num_experts": arm.experts,
            "r": arm.rank,
            "modules_with_one_more": arm.raised,
            "trainable_parameters": arm.trainable,
            "kind": arm.kind,
            "modules": arm.modules,
            "adapter": arm.recipe.adapter,
            "read": arm.read,
        }
        for name, arm in planned.arms.items()
    }
    rows = {"data_sha256": planned.data_sha256, "scored_sha256": planned.scored_sha256}
    found = {**rows, "tasks": planned.tasks, "budget": planned.budget, "budget_of": planned.budget_of, "arms": arms}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


@contextmanager
def claimed(out: Path, planned: Plan) -> Iterator[None]:
    """The folder with its settings written, kept to this process."""
    if planned.settings.overwrite and out.is_dir():
        with locked(out), writing(out):
            discard(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        now, asked = resolved(planned), pinned(planned)
        past = _past(out) if (out / ARMS).is_file() else {}
        before = read_yaml(out / FILE) if past else {}
        write_text(out / FILE, dump(asked))
        arms = {**past.get("arms", {}), **now["arms"]}
        grown = any(before.get(key) != asked[key] for key in _GROWING)
        said = "; ".join([*filter(None, [past.get("command")]), *([command_line()] if grown else [])])
        write_json(out / ARMS, {**past, **now, "command": said, "arms": arms})
        yield


def command(out: Path) -> str:
    """The commands that a comparison was made with: the one that began it, and each that added to it."""
    return str(_past(out)["command"])
