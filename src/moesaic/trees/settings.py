"""What a DriftMoE is made of, and what three fidelities choose where nothing is said."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moesaic.errors import ConfigError, suggest

Variant = Literal["data", "task"]
Fidelity = Literal["best", "paper", "code"]
Backend = Literal["arrays", "river", "capymoa"]
Combine = Literal["top1", "topk", "mixture"]
Rule = Literal["topk", "correct", "all"]


@dataclass(frozen=True)
class Settings:
    """As `settings` makes them, with the defaults of `fidelity="best"`; `DriftMoEClassifier` says what each is."""

    variant: Variant = "data"
    fidelity: Fidelity = "best"
    backend: Any = "arrays"
    n_experts: int = 30
    top_k: int = 3
    combine: Combine = "mixture"
    train: Rule = "all"
    share: float = 0.8
    max_leaves: int = 100
    poisson: float = 6.0
    router: bool = True
    hidden: tuple[int, ...] = (64, 32)
    lr: float = 2e-3
    batch_size: int = 256
    dropout: float = 0.0
    scale: bool = True
    trust: float = 1.0
    recency: float = 8.0
    rate: float = 0.005
    history: int = 2
    label_delay: int = 0
    detect: bool = True
    warning: float = 0.01
    drift: float = 0.001
    explore: float = 0.0
    balance: float = 0.0
    reset_after: int = 0
    warmup: int = 0
    lazy: int | None = None
    seed: int = 0

    def describes(self) -> dict[str, Any]:
        """What makes two the same, as JSON holds it; of a classifier that is given as backend, its class."""
        of = self.backend if isinstance(self.backend, str) else type(self.backend).__name__
        return {**dataclasses.asdict(self), "hidden": list(self.hidden), "backend": of}

    @property
    def counts_top_k(self) -> bool:
        """Whether `top_k` makes a difference."""
        return "topk" in (self.train, self.combine)

    @property
    def has_inert_experts(self) -> bool:
        """Whether experts change nothing that is answered: so it is in the released code's task variant."""
        return self.variant == "task" and self.fidelity == "code"


_PUBLISHED: dict[str, Any] = {
    "backend": "river", "n_experts": 12, "combine": "top1", "train": "topk", "poisson": 0.0, "recency": 0.0,
    "history": 0, "hidden": (256, 128), "scale": False, "detect": False, "share": 1.0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {"best": {}, "paper": {**_PUBLISHED, "dropout": 0.2}, "code": _PUBLISHED}
"""What differs from `Settings`' own defaults."""
MOST = 10**9
"""Of anything that is counted."""
_KNOWN: dict[str, tuple[str, ...]] = {
    "variant": get_args(Variant), "fidelity": get_args(Fidelity), "combine": get_args(Combine), "train": get_args(Rule),
}  # fmt: skip
_LEAST = {
    "n_experts": 1, "top_k": 1, "max_leaves": 1, "batch_size": 1, "history": 0, "label_delay": 0,
    "reset_after": 0, "warmup": 0, "seed": 0,
}  # fmt: skip
_WITHIN = {
    "share": (0.0, 1.0), "poisson": (0.0, 100.0), "lr": (0.0, 1.0), "dropout": (0.0, 0.99), "trust": (0.0, 100.0),
    "recency": (0.0, 100.0), "rate": (0.0, 1.0),
    "warning": (1e-12, 1.0), "drift": (1e-12, 1.0), "explore": (0.0, 1.0), "balance": (0.0, 1.0),
}  # fmt: skip


def settings(fidelity: str = "best", **given: Any) -> Settings:
    """The settings of a fidelity, and what is given in their place where it is not None.

    Raises:
        ConfigError: an unknown name (naming the nearest), or a value that cannot be.
    """
    _one_of("fidelity", fidelity, _KNOWN["fidelity"])
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in given:
        if name not in known:
            raise ConfigError(f"a DriftMoE has no setting {name}; {suggest(name, known)}")
    if given.get("variant") == "task" and given.get("n_experts") is not None:
        raise ConfigError("variant=task has an expert for each class: leave n_experts out")
    chosen = PRESETS[fidelity] | {name: value for name, value in given.items() if value is not None}
    if given.get("share") is None and chosen.get("backend", "arrays") != "arrays":
        chosen["share"] = 1.0
    if isinstance(width := chosen.get("hidden"), (list, int)):
        chosen["hidden"] = tuple(width) if isinstance(width, list) else (width,)
    made = Settings(fidelity=fidelity, **chosen)  # type: ignore[arg-type]
    _check(made)
    numbers: dict[str, Any] = {name: float(getattr(made, name)) for name in _WITHIN}
    made = dataclasses.replace(made, **numbers)
    if given.get("max_leaves") is not None and made.backend != "arrays":
        raise ConfigError("max_leaves is of backend=arrays only: leave it out")
    if given.get("top_k") is not None and not made.counts_top_k:
        raise ConfigError("top_k counts with train=topk or combine=topk only: leave it out, or set one of them")
    return made


def _check(s: Settings) -> None:
    for name, options in _KNOWN.items():
        _one_of(name, getattr(s, name), options)
    if isinstance(s.backend, str):
        _one_of("backend", s.backend, get_args(Backend))
    for name, least in _LEAST.items():
        value = getattr(s, name)
        if type(value) is not int or not least <= value < 2**63:
            raise ConfigError(f"{name}={value!r} must be a whole number, {least} or more")
        if name != "seed" and value > MOST:
            raise ConfigError(f"{name}={value} is more than {MOST:,}")
    for name, (low, high) in _WITHIN.items():
        value = getattr(s, name)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise ConfigError(f"{name}={value!r} must be a number between {low:g} and {high:g}")
    for name in ("router", "scale", "detect"):
        if type(getattr(s, name)) is not bool:
            raise ConfigError(f"{name}={getattr(s, name)!r} must be true or false")
    if s.backend == "capymoa" and s.share < 1:
        raise ConfigError(f"share={s.share}: MOA's trees see all features: share=1")
    if s.lazy is not None and (type(s.lazy) is not int or s.lazy < 0):
        raise ConfigError(f"lazy={s.lazy!r} must be a whole number, 0 or more")
    is_sparse = s.combine != "mixture" and s.train == "topk" and s.variant == "data"
    if s.lazy is not None and (s.history or s.detect or s.warmup or not is_sparse):
        raise ConfigError(
            "lazy needs variant=data, combine=top1 or topk, train=topk, history=0, detect=false and warmup=0, as "
            "fidelity=paper has them: else all experts are asked anyway"
        )
    widths = s.hidden
    if not isinstance(widths, tuple) or not widths or any(type(w) is not int or not 1 <= w <= MOST for w in widths):
        raise ConfigError(f"hidden={s.hidden!r} must be widths of layers, such as (256, 128)")
    if s.variant == "data" and s.counts_top_k and s.top_k > s.n_experts:
        raise ConfigError(f"top_k={s.top_k} is more than n_experts={s.n_experts}")
    if not s.router and s.has_inert_experts:
        raise ConfigError("the released code's task variant is its router: router=false leaves nothing")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r}; {suggest(str(value), known)}")
