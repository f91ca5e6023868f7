"""A Read-ME model for the engine: all of it but its experts, and what the engine does not do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from moesaic.errors import ConfigError, first_line
from moesaic.ffn.read_me import banks_of
from moesaic.ffn.serving import attention
from moesaic.ffn.serving.files import unmap
from moesaic.ffn.serving.streamed import StreamedBank
from moesaic.ffn.stored import class_of, described, read

logger = logging.getLogger(__name__)

NOT_GREEDY = (
    "do_sample", "num_beams", "repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens",
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "sequence_bias", "guidance_scale", "stop_strings",
)  # fmt: skip
"""Settings of `generate` that change which token is written."""


def without_experts(folder: Path, dtype: Any) -> PreTrainedModel:
    """The model, its experts left on disk.

    Args:
        dtype: of its weights; that of the folder's where None.
    Raises:
        ConfigError: the folder is of another method, or a model whose attention the engine does not have.
        AdapterError: the folder holds no converted model, or a damaged one.
    """
    made = class_of(folder)
    if described(folder)["moesaic"].get("method") != "read-me":
        raise ConfigError(f"{folder} is no Read-ME model: its experts are not known before it runs")
    left_out = {"_keys_to_ignore_on_load_unexpected": [r"\.experts\."], "__module__": __name__}
    with banks_of(StreamedBank):
        streamed = cast(type[PreTrainedModel], type(made.__name__, (made,), left_out))
        model = read(streamed, folder, dtype=dtype or "auto").eval()
    unmap(model, folder)  # the file may be cut while it is served
    _check_attention(model.config)
    _check_in_pieces(model)
    _tell_of_settings(folder, model.generation_config)
    return model


def _check_attention(config: Any) -> None:
    """Raise ConfigError for what `attention.attend` does not do."""
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if getattr(config, "attn_logit_softcapping", None):
        others.add("scores that are capped")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    others |= {f"positions of the kind {kind}" for kind in kinds & {"dynamic", "longrope"}}  # of a whole batch's length
    if others:
        raise ConfigError(f"the engine does not serve models with {', '.join(sorted(others))}")


@torch.no_grad()
def _check_in_pieces(model: Any) -> None:
    """Give a model the engine's attention, in which requests in pieces side by side must be what each is alone.

    The experts are not there yet, and add nothing.

    Raises:
        ConfigError: where they are not, as with attention of a model's own, positions that are counted otherwise, or
            layers that hand more than keys and values from token to token.
    """
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.pre_gate.embedding.num_embeddings
    prompts = [torch.randint(vocabulary, (n,), generator=draw).tolist() for n in (5, 7)]
    pasts, name = [attention.Past(), attention.Past()], type(model).__name__.removeprefix("Moesaic")
    try:
        alone = torch.stack([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in prompts])
        model.set_attn_implementation(attention.NAME)
        for begin, end in ((0, 3), (3, None)):
            pieces = [ids[begin:end] for ids in prompts]
            model.known_routes = torch.zeros(1, sum(map(len, pieces)), model.pre_gate.num_experts)
            together = attention.forward(model, list(zip(pasts, pieces, strict=True)))
            for past in pasts:
                past.length = 3
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"the engine does not serve {name}: {first_line(error)}") from None
    finally:
        model.known_routes = None
    near = (1e-3 if together.dtype == torch.float32 else 0.05) * alone.abs().max()
    if not torch.allclose(alone, together, rtol=0, atol=float(near), equal_nan=True):
        raise ConfigError(f"the engine does not serve {name}: its attention or its positions are of another kind")


def _tell_of_settings(folder: Path, found: GenerationConfig | None) -> None:
    plain = GenerationConfig()
    ignored = [name for name in NOT_GREEDY if getattr(found, name, None) not in (None, False, getattr(plain, name))]
    if ignored:
        logger.warning(
            "the engine writes the likeliest token: %s in %s/generation_config.json has no effect",
            ", ".join(ignored),
            folder,
        )
