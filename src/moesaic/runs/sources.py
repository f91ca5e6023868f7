"""Where adapters that become experts lie, and which base model they are of."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import ConfigError, path_of
from moesaic.models.embedded import embedded_name
from moesaic.runs.settings import read_yaml

if TYPE_CHECKING:
    from moesaic.lora.stored import StoredExpert


def folders_of(adapters: Any) -> dict[str, str]:
    """Expert name -> folder, of `adapters=…` as people write it; its own name for one that is not given another.

    A folder of adapters stands for those in it.

    Raises:
        ConfigError: it is no such thing, or two have one name.
    """
    if not adapters:
        return {}
    if isinstance(adapters, dict):
        if not all(isinstance(folder, str) for folder in adapters.values()):
            raise ConfigError(f"adapters={adapters} must name a folder for each, 'adapters={{NAME: FOLDER, …}}'")
        return {str(name): str(folder) for name, folder in adapters.items()}
    if not isinstance(adapters, (str, list)):
        raise ConfigError(f"adapters={adapters} must be folders, comma-separated, or 'adapters={{NAME: FOLDER, …}}'")
    listed = [folder for entry in ([adapters] if isinstance(adapters, str) else adapters) for folder in _within(entry)]
    from moesaic.lora.stored import name_of

    names = [name_of(folder) for folder in listed]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise ConfigError(f"two adapters are called {doubled!r}: give them names, 'adapters={{NAME: FOLDER, …}}'")
    return dict(zip(names, listed, strict=True))


def _within(entry: Any) -> list[str]:
    """An adapter's folder itself; of a folder that holds several, each of them."""
    from moesaic.lora.stored import adapter_in

    folder = path_of(str(entry))
    if not folder.is_dir() or adapter_in(folder):
        return [str(entry)]
    return sorted(str(inner) for inner in folder.iterdir() if adapter_in(inner)) or [str(entry)]


def base_of(experts: Iterable["StoredExpert"]) -> str:
    """The base model of the runs that adapters lie in, or that they name; empty where neither says.

    Raises:
        ConfigError: it is a folder that is gone.
    """
    for expert in experts:
        recipe = expert.folder.parent / "recipe.yaml"
        if recipe.is_file() and (model := read_yaml(recipe).get("model")):
            return str(model)
        if name := embedded_name(expert.base or ""):
            return name
        if expert.base:
            if Path(expert.base).is_absolute() and not Path(expert.base).is_dir():
                raise ConfigError(f"{expert.folder} is of {expert.base}, which is not there: model=… says where it is")
            return expert.base
    return ""
