"""What is done to a model's feed-forward layers: methods, by name."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from moesaic.errors import ConfigError, suggest
from moesaic.ffn.checking import check
from moesaic.ffn.watching import Text
from moesaic.host import Host


def setting(default: Any, said: str) -> Any:
    """A setting of a method, and what help says of it."""
    return dataclasses.field(default=default, metadata={"help": said})


@dataclasses.dataclass
class Method(ABC):
    """What is done to a model's feed-forward layers, with its settings. A subclass registers itself by its name."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ()
    """What `convert` takes beside the model, by name: `parts` makes it of text of some domains."""
    training: ClassVar[type | None] = None
    """Settings of a training on conversion, a dataclass whose `steps` are all of it: see `tune`."""
    dense: ClassVar[bool] = True
    """Whether it cuts experts out of a dense model's layers."""
    slims: ClassVar[bool] = True
    """Whether a token may take another number of experts than the model was made for."""
    METHODS: ClassVar[dict[str, type[Method]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            Method.METHODS[cls.name] = cls

    @abstractmethod
    def install(self, model: PreTrainedModel, host: Host) -> None:
        """Put the method's layers in, with weights of any value: they are loaded or filled afterwards."""

    def __post_init__(self) -> None:
        check(self)

    def parts(self, model: PreTrainedModel, text: Text, *, batch_size: int = 8, seed: int = 0) -> dict[str, Any]:
        """What `convert` takes beside the model, made of the model as it is and of text.

        Args:
            text: by domain, rows (n, T) of token ids.
            batch_size: rows in a forward.
            seed: of what is drawn.
        """
        return {}

    def tune(
        self,
        model: PreTrainedModel,
        parts: dict[str, Any],
        batches: Iterator[Mapping[str, Tensor]],
        settings: Any,
        *,
        say: Callable[[str, int, float], None] | None = None,
        first: int = 0,
        around: Any = nullcontext,
    ) -> Iterator[int]:
        """Train a model and its parts before the conversion, by settings of the kind `training`; yields rounds done.

        A method without a training has no rounds.

        Args:
            batches: without end, `input_ids` (B, T).
            say: told of each step: the stage, the step, its loss.
            first: the round to begin with, after a break.
            around: what each forward is in, such as autocast.
        """
        return iter(())

    def written(self, folder: Path, model: PreTrainedModel) -> None:  # noqa: B027
        """Told of the folder that a converted model was saved into, for what the method keeps beside it."""

    @abstractmethod
    def convert(self, model: PreTrainedModel, host: Host, **parts: Any) -> None:
        """Put the layers in with what they take over from the model's own, and from parts that were made beforehand."""

    @classmethod  # noqa: B027
    def resized(cls, model: Any) -> None:
        """Told once the model's table of tokens has another length."""

    def attached(self, model: Any) -> None:  # noqa: B027
        """Told once the host's hooks are on the model: those of a method's own come after them."""


def method_of(name: str) -> type[Method]:
    """The method of that name: one of this room, or a subclass of `Method` that is defined elsewhere.

    Raises:
        ConfigError: where none does.
    """
    known = methods()
    if name not in Method.METHODS:
        raise ConfigError(f"no method {name!r} of feed-forward layers; {suggest(name, known)}")
    return Method.METHODS[name]


def methods() -> dict[str, type[Method]]:
    """Every method of this room, by name."""
    room = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return {
        name: kind for name, kind in sorted(Method.METHODS.items()) if kind.__module__.startswith(f"{__package__}.")
    }
