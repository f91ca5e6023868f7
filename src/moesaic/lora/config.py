"""The base class of every mixture-of-LoRA config: what PEFT needs, what all methods share, and the register.

A method is a dataclass that derives from `MixtureConfig`, names itself, and says which router, gate and losses it
uses. Defining the class registers it: with PEFT (as its own `peft_type`) and in `METHODS`, from which the command
line, the contract tests and the tables are made.
"""

from __future__ import annotations

import copy
import difflib
import math
import sys
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import partial
from typing import Any, ClassVar, Literal, Self

from peft import PeftConfig
from torch import Tensor

from moesaic.errors import ConfigError, UnknownKeyword, first_line
from moesaic.host.scores import Reader
from moesaic.lora.card import tell_loading
from moesaic.lora.checks import are_folders, check_kinds, check_names, is_numbers, is_ranks
from moesaic.lora.kind import Kind
from moesaic.lora.layer import LayerSettings
from moesaic.lora.loras import TakesLoras
from moesaic.lora.mix import Backend
from moesaic.lora.store import Store
from moesaic.lora.stored import LARGEST
from moesaic.routing import AuxiliaryLoss, Gate, Router, Site

METHODS: dict[str, type[MixtureConfig]] = {}


@dataclass
class MixtureConfig(PeftConfig, metaclass=TakesLoras):
    """Settings that all mixtures of LoRA experts share.

    Raises:
        ConfigError: on an unknown key (naming the nearest known one) or an impossible value.
    """

    method: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    type: ClassVar[Any] = None
    kind: ClassVar[Kind] = Kind()
    level: ClassVar[Literal["linear", "block"]] = "linear"
    """What an expert is: a LoRA pair beside each linear, or beside all linears of a feed-forward block together."""
    unsaved: ClassVar[tuple[str, ...]] = ("adapters", "subtract")
    """Settings that an adapter is made by and does not need any more."""

    r: int = field(default=8, metadata={"help": "rank of one expert"})
    rank_pattern: dict[str, int] | None = field(
        default=None,
        metadata={"help": "rank by module name (or end of it, the longest wins) where not r; the scaling stays r's"},
    )
    num_experts: int = field(default=8, metadata={"help": "experts in each adapted layer"})
    lora_alpha: float = field(default=16, metadata={"help": "scaling numerator: alpha/r, or alpha/sqrt(r) with rslora"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha/sqrt(r) (Kalajdzievski 2023)"})
    alpha_pattern: dict[str, float] | None = field(
        default=None, metadata={"help": "lora_alpha by module name (or end of it, the longest wins) where another"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the experts' input, shared by all experts"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names of the linears to adapt, a regular expression, or 'all-linear'"}
    )
    lora_target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "linears that get one plain LoRA of rank r instead: no router, no experts"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names never to adapt"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved as a whole"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "adapt these layers only"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "token embeddings to train beside the mixture"}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "keep tied embeddings tied where modules_to_save has them"}
    )
    bias: str = field(default="none", metadata={"help": "always 'none': a routed mixture has no bias to train"})
    adapters: list[str] | dict[str, str] | None = field(
        default=None,
        metadata={"help": "folders of trained LoRA adapters, or folders by name: they become the experts, frozen"},
    )
    subtract: list[str] | None = field(
        default=None, metadata={"help": "folders of general adapters whose mean change is taken off each expert's"}
    )
    ignore_base: bool = field(
        default=False, metadata={"help": "take adapters although they name another base model than this one"}
    )
    experts: list[str] | None = field(
        default=None, metadata={"help": "filled in from adapters and saved: the experts' names"}
    )
    task_of: list[int] | None = field(
        default=None, metadata={"help": "the task id that each of the adapters was trained on; 0, 1, … where left out"}
    )
    backend: Backend = field(default="auto", metadata={"help": "auto, rank, grouped or reference: see lora/mix.py"})
    aux_weight: float = field(default=0.01, metadata={"help": "weight of the auxiliary losses; 0 turns them off"})

    def __new__(cls, *args: Any, **kwargs: Any) -> MixtureConfig:
        known = [f.name for f in fields(cls) if f.init]
        for key in kwargs:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                own = [name for name in known if name not in PeftConfig.__dataclass_fields__]
                hint = f": did you mean {near[0]!r}?" if near else f"; known: {', '.join(own)}"
                said = f"unknown setting {key!r} for {cls.__name__}, which got an unexpected keyword argument"
                raise UnknownKeyword(f"{said}{hint}")
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.method:
            return
        name = f"MOESAIC_{cls.method.upper().replace('-', '_')}"
        kind: Any = Enum(f"{cls.__name__}Type", {name: name}, type=str, module=cls.__module__)  # type: ignore[misc]
        setattr(sys.modules[cls.__module__], kind.__name__, kind)  # by its name there, a config is pickled
        cls.type = kind[name]
        METHODS[cls.method] = cls
        register_with_peft(cls)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(first_line(error)) from None
        self.peft_type = type(self).type
        self._is_taken = False
        self.size_is_meant = False  # solved for, or told of elsewhere: see lora/size.py
        self._take_adapters()
        check_kinds(self)
        check_names(self)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if not is_numbers(self.alpha_pattern) or not all(0 < a <= LARGEST for a in (self.alpha_pattern or {}).values()):
            raise ConfigError(f"alpha_pattern={self.alpha_pattern!r} must hold numbers above 0 by module name")
        if not is_ranks(self.rank_pattern):
            raise ConfigError(f"rank_pattern={self.rank_pattern!r} must hold whole numbers by module name")
        for name, value in {"r": self.r, "num_experts": self.num_experts, **(self.rank_pattern or {})}.items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be a whole number of at least 1")
        if not 0 < self.lora_alpha <= LARGEST:
            raise ConfigError(f"lora_alpha={self.lora_alpha} must be above 0, and at most {LARGEST:g}")
        if not 0 <= self.aux_weight <= LARGEST:
            raise ConfigError(
                f"aux_weight={self.aux_weight} must be at least 0, which turns the auxiliary losses off, and at most "
                f"{LARGEST:g}"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} must be at least 0 and below 1")
        if self.bias != "none":
            raise ConfigError(f"bias={self.bias!r} is not supported by mixtures: leave it at 'none'")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform")
        if self.layers_to_transform is not None and not isinstance(self.target_modules, set):
            raise ConfigError(
                "layers_to_transform needs target_modules as a list of names; a pattern picks layers itself"
            )
        for gate in (self.gate(), self.eval_gate()):
            gate.check(self.num_experts)
        if self.experts is not None and not (
            isinstance(self.experts, list)
            and len(self.experts) == self.num_experts
            and all(isinstance(name, str) for name in self.experts)
        ):
            raise ConfigError(f"experts={self.experts!r} must be the names of {self.num_experts} adapters")
        if self.kind.needs_adapters and self.adapters is None and self.experts is None:
            raise ConfigError(f"method {self.method} routes to adapters that are trained already: adapters=a/,b/,…")

    def _take_adapters(self) -> None:
        """Read what the adapters are: their number, names, modules and ranks are the mixture's."""
        self.store: Store | None = None
        for key in ("adapters", "subtract"):
            given = getattr(self, key)
            if isinstance(given, str):
                setattr(self, key, [given])
            elif given is not None and not are_folders(given, named=key == "adapters"):
                raise ConfigError(f"{key}={given!r} must be folders{', or folders by name' * (key == 'adapters')}")
        if self.adapters is None:
            return
        for key in ("target_modules", "lora_target_modules", "exclude_modules", "layers_to_transform"):
            if getattr(self, key) is not None:
                raise ConfigError(f"adapters and {key} disagree: experts are where the adapters have them")
        for key in ("rank_pattern", "alpha_pattern"):
            if getattr(self, key):
                raise ConfigError(f"adapters and {key} disagree: experts have the ranks and scales of the adapters")
        if self.level == "block":
            raise ConfigError(f"adapters cannot go with method {self.method}, whose experts are whole FFNs")
        if self.kind.shares_down:
            raise ConfigError(f"adapters cannot go with method {self.method}, whose experts share one A")
        self.store = Store.read(self.adapters, self.subtract or (), ignore_base=self.ignore_base)
        self.experts, self.num_experts = self.store.names, len(self.store.names)
        if self.task_of is not None and (len(self.task_of) != self.num_experts or min(self.task_of) < 0):
            raise ConfigError(f"task_of={self.task_of} must hold a task id for each of {self.num_experts} adapters")
        self.target_modules = list(self.store.modules)
        ranks = {module: self.store.rank(module) for module in self.store.modules}
        self.r = max(ranks.values())
        self.rank_pattern = {module: rank for module, rank in ranks.items() if rank != self.r} or None

    def taken(self) -> Self:
        """This config for one adapter alone: itself the first time, copies for the adapters that it is given to later.

        An adapter keeps things on its config, such as the texts that its prompts are compared with.
        """
        if not self._is_taken:
            self._is_taken = True
            return self
        return copy.deepcopy(self, {id(self.store): self.store})

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it: the adapters' names stay, where they lay does not."""
        return {**super().to_dict(), **dict.fromkeys(self.unsaved)}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does, and README.md, which PEFT, Transformers and trainers have written by then, says how to load."""
        super().save_pretrained(save_directory, **kwargs)
        tell_loading(save_directory)

    @property
    def scaling(self) -> float:
        """Factor on every expert's output."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def files(self) -> list[str]:
        """Files that it reads beside the adapter: their content is part of what it says."""
        return []

    def experts_at(self, site: Site) -> int:
        """Number of experts of the layer at `site`."""
        return self.num_experts

    def rank_at(self, site: Site) -> int:
        """Rank of one expert of the layer at `site`."""
        return int(_by_name(self.rank_pattern, site, self.r))

    def layer(self, site: Site, *, routed: bool) -> LayerSettings:
        """All that it says of the layer at `site`, which has experts and a router, or else one plain LoRA.

        Raises:
            AdapterError: the experts are adapters, which are of another size there.
        """
        return LayerSettings(
            site=site,
            num_experts=self.experts_at(site) if routed else 1,
            rank=self.rank_at(site),
            shares_down=routed and self.kind.shares_down,
            make_router=partial(self.router, site) if routed else None,
            make_gates=lambda: (self.gate(), self.eval_gate()),
            scaling=self.scaling * _by_name(self.alpha_pattern, site, self.lora_alpha) / self.lora_alpha,
            dropout=self.lora_dropout,
            backend=self.backend,
            merges_factors=self.kind.merges_factors,
            are_trained=self.experts is not None,
            trained=None if self.store is None else self.store.stacked(site.name, size=(site.d_in, site.d_out)),
            inference_mode=self.inference_mode,
        )

    @abstractmethod
    def router(self, site: Site) -> Router:
        """A fresh router for the layer at `site`."""

    @abstractmethod
    def gate(self) -> Gate:
        """The gate, the same for all layers."""

    def eval_gate(self) -> Gate:
        """The gate outside of training, where it is another one."""
        return self.gate()

    def connect(self, routers: list[Router]) -> None:
        """Called once all routers of an adapter exist, in the model's order: for what they share."""

    def targets(self, prompts: list[str]) -> Tensor | None:
        """What the routing of each prompt should be like (N, E), for methods that learn from a teacher; else None."""
        return None

    def scores(self, prompts: list[str]) -> Tensor | None:
        """What each prompt says of the experts (N, E), for methods that route by the prompt as a whole; else None."""
        return None

    def reader(self, model: Any) -> Reader | None:
        """For such methods: what reads these scores off the tokens of `model`, where nobody gives them."""
        return None

    def fit(self, model: Any, loss: Callable[[], float]) -> str:
        """Find without gradients what has none, by `loss` of the model on a few rows.

        Returns:
            What was found, in a line; empty where there is nothing to find.
        """
        return ""

    def losses(self) -> list[AuxiliaryLoss]:
        """The auxiliary losses; built once for each adapter."""
        return []


def _by_name(pattern: dict[str, Any] | None, site: Site, otherwise: Any) -> Any:
    """What a pattern holds of a site: by the longest end of its name that is there."""
    fitting = [name for name in pattern or () if f".{site.name}".endswith(f".{name}")]
    return (pattern or {})[max(fitting, key=len)] if fitting else otherwise


def register_with_peft(cls: type[MixtureConfig]) -> None:
    """Make PEFT know the method: config, tuner and parameter prefix under the class's own type.

    PEFT's register_peft_method accepts only names in its own enum, so the tables are filled directly; they accept
    any string enum whose member's name equals its value.
    """
    from peft import mapping

    from moesaic.lora.tuner import MixtureModel

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[cls.type] = cls
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[cls.type] = MixtureModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[cls.type] = MixtureModel.prefix
