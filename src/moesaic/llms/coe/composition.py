"""A composition of experts: which model answers a prompt, by what the prompt is about.

    hard        the expert that the mapping has for the likeliest category
    posterior   the resident expert of the best expected score, Σ_k p_k s_ke; residents by a mapping over posterior
                shares: it knows how the router errs
    blend       likewise, with neighbours' scores, a regression and what was seen before mixed in (see `Estimates`)

An uncertain prompt goes to the expert of `general`. Under a cap on average active parameters or cost, posterior and
blend take a price off the score, so high that the cap holds on the prompts that were fitted to (Lagrange multipliers).
The two steps are those of arXiv 2412.01868, whose formulas are not public; posterior, blend and prices are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import AdapterError, ConfigError, first_line, path_of
from moesaic.llms.coe.category import CategoryRouter
from moesaic.llms.coe.encoders import PROBE, Arrays, Rows, part
from moesaic.llms.coe.estimates import Estimates
from moesaic.llms.coe.problem import GENERAL, Solution
from moesaic.llms.coe.uncertainty import Rule
from moesaic.llms.tables import Floats
from moesaic.runs.folder import atomic_folder, check_writable, writing
from moesaic.runs.states import ARRAYS, VALUES, read_state, write_state

FORMAT = 1
MAPS = ("hard", "posterior", "blend")
_DIGITS = 9
"""Of expected scores: those that agree in as many are alike, and the smaller expert answers."""


@dataclass(frozen=True)
class Decision:
    """Who answers a prompt.

    Attributes:
        expert: a model's name. category: the likeliest, or `general` where the prompt is uncertain.
        confidence: the probability of the likeliest category. probabilities: by category.
        uncertain: whether the rule says so. uncertainty: its u.
        scores: expected, of each resident expert; those of the category alone where map is hard.
    """

    expert: str
    category: str
    confidence: float
    uncertain: bool
    uncertainty: float
    probabilities: Mapping[str, float]
    scores: Mapping[str, float] = field(repr=False)


class Composition:
    """Attributes:
    router, rule, solution: as they were fitted. map: one of `MAPS`.
    experts: R names, the resident ones, those of fewer active parameters first. active: (R,) billions.
    estimates: of the experts' scores. price: (K, R) what is taken off them by the prompt's likely categories.
    allowed: (K, R) which experts may answer a prompt whose likeliest category it is (pins).
    about: how it came to be, and its figures on held-out prompts.
    """

    def __init__(
        self,
        router: CategoryRouter,
        solution: Solution,
        rule: Rule,
        map: str,
        experts: Sequence[str],
        estimates: Estimates,
        arrays: Mapping[str, NDArray[Any]],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.router, self.solution, self.rule, self.map = router, solution, rule, map
        self.experts, self.estimates, self.about = tuple(experts), estimates, dict(about or {})
        self.active, self.price, self.allowed = arrays["active"], arrays["price"], arrays["allowed"]
        shape = len(router.categories), len(self.experts)
        if map not in MAPS or {*solution.expert.values()} != {*self.experts}:
            raise ValueError("its map and its experts do not fit")
        if estimates.means.shape != shape or self.price.shape != shape or self.allowed.shape != shape:
            raise ValueError("estimates, prices and pins must be categories by experts")
        if self.active.shape != shape[1:] or len(estimates.bank) not in (0, len(router.labels)):
            raise ValueError("sizes of the experts, and scores of the bank's prompts")
        missing = {*router.categories, *([GENERAL] if rule.kind != "none" else [])} - solution.expert.keys()
        if missing:
            raise ValueError(f"no expert for {min(missing)}")
        self._of = np.array([self.experts.index(solution.expert[name]) for name in router.categories])
        self._general = self.experts.index(solution.expert[GENERAL]) if GENERAL in solution.expert else 0

    def decide(self, prompt: str) -> Decision:
        """Who answers it."""
        return self.decide_many([prompt])[0]

    def decide_many(self, prompts: Sequence[str]) -> list[Decision]:
        """Who answers each; the same as one by one."""
        if not prompts:
            return []
        rows = self.router.embed(prompts)
        p = self.router.of_rows(rows)
        u = self.rule.of(self.router, rows, p)
        scores, uncertain = self.scores(prompts, rows, p), self.rule.uncertain(u)
        chosen, categories = self.choose(scores, p, uncertain), self.router.categories
        return [
            Decision(
                self.experts[chosen[i]], GENERAL if uncertain[i] else categories[p[i].argmax()], float(p[i].max()),
                bool(uncertain[i]), float(u[i]), dict(zip(categories, p[i].tolist(), strict=True)),
                dict(zip(self.experts, scores[i].tolist(), strict=True)),
            )
            for i in range(len(prompts))
        ]  # fmt: skip

    def scores(self, prompts: Sequence[str], rows: Rows, probabilities: Floats) -> Floats:
        """Expected scores of the experts, (N, R)."""
        if self.map == "hard":
            return np.asarray(self.estimates.means[probabilities.argmax(axis=1)], float)
        return self.estimates(self.router.bank, prompts, rows, probabilities)

    def choose(self, scores: Floats, probabilities: Floats, uncertain: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The numbers of the experts that answer, (N,)."""
        likeliest = probabilities.argmax(axis=1)
        if self.map == "hard":
            best = self._of[likeliest]
        else:
            worth = np.where(self.allowed[likeliest], scores - probabilities @ self.price, -np.inf)
            best = worth.round(_DIGITS).argmax(axis=1)
        return np.asarray(np.where(uncertain, self._general, best), np.int64)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write it, whole or not at all: state.safetensors and state.json. An encoder by name is kept by name.

        Raises:
            ConfigError: the folder is there and is not to be replaced, holds anything else, or cannot be written.
        """
        place = check_free(folder, overwrite=overwrite)
        router, routed = self.router.state()
        estimates, estimated = self.estimates.state()
        arrays: Arrays = {"active": self.active, "price": self.price, "allowed": self.allowed}
        arrays |= {f"router.{n}": a for n, a in router.items()} | {f"estimates.{n}": a for n, a in estimates.items()}
        values = {
            "map": self.map, "experts": list(self.experts), "rule": asdict(self.rule), "router": routed,
            "estimates": estimated, "solution": asdict(self.solution), "about": self.about,
        }  # fmt: skip
        with writing(place), atomic_folder(place) as staging:
            write_state(staging, arrays, values, version=FORMAT)
            (staging / ARRAYS).chmod(0o644)  # safetensors leaves its file readable by its owner alone

    @classmethod
    def load(cls, folder: str | Path) -> Composition:
        """What `save` wrote; it decides as it did.

        Raises:
            ConfigError: there is none, or its encoder cannot be loaded. AdapterError: it is damaged.
        """
        place = path_of(folder)
        if not (place / VALUES).is_file():
            raise ConfigError(f"{folder} holds no composition; `moesaic llm fit` makes one")
        try:
            arrays, values = read_state(place, version=FORMAT)
            if not all(np.isfinite(held).all() for held in arrays.values()):
                raise ValueError("it holds weights that are no numbers")
            solution = Solution(**{**values["solution"], "resident": tuple(values["solution"]["resident"])})
            router = CategoryRouter.restored(part(arrays, "router."), values["router"])
            estimates = Estimates(part(arrays, "estimates."), tuple(values["estimates"]["neighbours"]))
            rule = Rule(**values["rule"])
            made = cls(router, solution, rule, values["map"], values["experts"], estimates, arrays, values["about"])
            _check_decides(made)
            return made
        except ConfigError:
            raise
        except PermissionError as error:
            raise ConfigError(f"{folder} cannot be read: {error.strerror}") from None
        except Exception as error:  # whatever safetensors, JSON and parts make of damage
            raise AdapterError(f"{folder} is damaged ({first_line(error)}): fit it again") from None


def _check_decides(made: Composition) -> None:
    """Raise ValueError, or whatever NumPy makes of it, for parts that do not fit each other."""
    with np.errstate(all="ignore"):
        (found,) = made.decide_many([PROBE])
    if not np.isfinite([found.confidence, found.uncertainty, *found.scores.values()]).all():
        raise ValueError("what it expects is no number")


def check_free(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Where a composition can be written. Raises ConfigError where there is something that it may not replace."""
    place = path_of(folder)
    check_writable(place, f"out={folder}")
    if place.exists() and (not place.is_dir() or {entry.name for entry in place.iterdir()} - {ARRAYS, VALUES}):
        raise ConfigError(f"{folder} holds files that are not a composition's; name another folder")
    if place.exists() and any(place.iterdir()) and not overwrite:
        raise ConfigError(f"{folder} is already there; overwrite=true replaces it")
    return place
