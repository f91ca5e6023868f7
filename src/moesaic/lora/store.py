"""Several stored adapters as the experts of one mixture.

Those of differing ranks are stacked with zero rows, which adds nothing to what they compute, and an expert without a
module has zeros there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from moesaic.errors import AdapterError, ConfigError
from moesaic.lora.stored import StoredExpert, read_expert


class Store:
    """Several stored experts, in order, and what they are together.

    With `general` adapters each expert e is `s_e B_e A_e - mean_g s_g B_g A_g` wherever it has a module (GenKnowSub:
    what they know in common is taken off). Changes are subtracted, not factors, so each expert's rank
    grows by theirs; the adapters' own files stay as they are.

    Raises:
        ConfigError: two of one name, or a name that PEFT would lose.
        AdapterError: as `read_expert`; or two of different base models, or that do not fit each other.
    """

    def __init__(
        self, experts: Sequence[StoredExpert], general: Sequence[StoredExpert] = (), *, ignore_base: bool = False
    ) -> None:
        self.experts, self.general = tuple(experts), tuple(general)
        together = [*experts, *general]
        if not experts:
            raise ConfigError("adapters is empty: name the folders of at least one")
        _check_names([expert.name for expert in experts], self.modules)
        bases = {Path(expert.base).name: expert for expert in together if expert.base}
        if len(bases) > 1 and not ignore_base:
            (one, first), (other, second) = list(bases.items())[:2]
            raise AdapterError(
                f"{first.folder} was trained on {one!r} and {second.folder} on {other!r}: experts share one base model"
            )
        for module in self.modules:
            sizes = {(f.d_in, f.d_out): e for e in together if (f := e.factors.get(module))}
            if len(sizes) > 1:
                (one, first), (other, second) = list(sizes.items())[:2]  # type: ignore[assignment]
                raise AdapterError(f"{module} is {one} in {first.folder} and {other} in {second.folder}: other models")

    @classmethod
    def read(
        cls, adapters: Sequence[str] | Mapping[str, str], general: Sequence[str] = (), *, ignore_base: bool = False
    ) -> Store:
        """From folders, or folders by name; and the folders of general adapters."""
        named = adapters.items() if isinstance(adapters, Mapping) else ((None, folder) for folder in adapters)
        experts = [read_expert(folder, name) for name, folder in named]
        return cls(experts, [read_expert(folder) for folder in general], ignore_base=ignore_base)

    def check_base(self, model: str) -> None:
        """Raise AdapterError where an expert names another base model than `model`; what is not named is not asked."""
        for expert in (*self.experts, *self.general):
            if expert.base and model and Path(expert.base).name != Path(model).name:
                raise AdapterError(
                    f"{expert.folder} was trained on {expert.base!r}, and this model is {model!r}; if they are the "
                    "same, ignore_base=true (adapter.ignore_base=true in a command) says so"
                )

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @cached_property
    def modules(self) -> list[str]:
        """All modules that any expert has."""
        return sorted({module for expert in self.experts for module in expert.factors})

    def rank(self, module: str) -> int:
        """The largest rank at a module."""
        taken_off = sum(g.factors[module].rank for g in self.general if module in g.factors)
        return max(e.factors[module].rank for e in self.experts if module in e.factors) + taken_off

    def stacked(self, module: str, *, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A (E*r, d_in), B (E*r, d_out) and scalings (E,), float32; zeros where an expert lacks the module or rank.

        Raises:
            AdapterError: `size`, the model's (d_in, d_out), is another.
        """
        rank = self.rank(module)
        first = next(e.factors[module] for e in self.experts if module in e.factors)
        if size is not None and (first.d_in, first.d_out) != size:
            raise AdapterError(
                f"{module} is {size[0]} x {size[1]} here, and {first.d_in} x {first.d_out} in "
                f"{self.experts[0].folder}: the adapters are of another base model"
            )
        A = torch.zeros(len(self.experts), rank, first.d_in)
        B = torch.zeros(len(self.experts), rank, first.d_out)
        scaling = torch.ones(len(self.experts))
        for number, expert in enumerate(self.experts):
            factor = expert.factors.get(module)
            if factor is None:
                continue
            whole, start = factor.scaling or 1.0, 0
            scaling[number] = whole
            for part in (expert, *(g for g in self.general if module in g.factors)):
                own = part.factors[module]
                share = own.scaling / (whole if part is expert else -whole * len(self.general))
                a, b = part.read(module)
                rows = slice(start, start + own.rank)
                A[number, rows], B[number, rows] = a.float(), share * b.t().float()
                start += own.rank
        return A.flatten(0, 1), B.flatten(0, 1), scaling


def _check_names(names: Sequence[str], modules: Sequence[str]) -> None:
    parts = {part for module in modules for part in module.split(".")}
    for name in names:
        if not re.fullmatch(r"\w[\w-]*", name) or name.isdigit() or name in parts | {"default", "weight", "bias"}:
            raise ConfigError(
                f"adapter name {name!r} cannot be kept: use letters, digits, - and _, and no number alone or name of a "
                "module, which PEFT would drop on save; give another, 'adapters={NAME: FOLDER}'"
            )
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise ConfigError(f"two adapters are called {doubled!r}: give them names, 'adapters={{NAME: FOLDER}}'")
