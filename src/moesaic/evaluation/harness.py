"""lm-eval is told where a prompt ends, for mixtures that route by the prompt.

Its `hf` model puts a prompt and the continuation that is scored into one row, with neither labels nor a mask: all of
it, padding too, would be the prompt. Here requests whose prompts have as many tokens are scored together, within
`routing_prompt_length`, so that what comes behind counts as the answer. Other models, and texts that are scored as a
whole (`loglikelihood_rolling`), are left to lm-eval as they are.
"""

from collections.abc import Sequence
from functools import wraps
from typing import Any

from moesaic.errors import TrainingError
from moesaic.host import routing_prompt_length
from moesaic.host.hooks import find_host

Request = tuple[Any, Sequence[int], Sequence[int]]
"""Its key, and the tokens of the prompt and of the continuation."""


def tell_prompts() -> None:
    """Have lm-eval's `hf` model tell mixtures what the prompts are, for the rest of this process."""
    from lm_eval.models.huggingface import HFLM

    scored = HFLM._loglikelihood_tokens
    if hasattr(scored, "__wrapped__"):
        return

    @wraps(scored)
    def by_prompt(
        model: Any, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        if not requests or not _is_asked(model, requests):
            return scored(model, requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        if model.batch_size == "auto" and override_bs is None:
            override_bs = model._detect_batch_size()
        found: dict[int, Any] = {}
        for length, places in _by_length(requests, model.max_length).items():
            with routing_prompt_length(model.model, length):
                told = scored(model, [requests[i] for i in places], disable_tqdm=True, override_bs=override_bs)
            found |= zip(places, told, strict=True)
        return [found[i] for i in range(len(requests))]

    HFLM._loglikelihood_tokens = by_prompt


def _is_asked(model: Any, requests: Sequence[Request]) -> bool:
    """Whether the model is a mixture that routes by prompts, and these have some."""
    if model.backend != "causal" or requests[0][0] is None:
        return False
    try:
        return find_host(model.model).asks("by_prompt")
    except TrainingError:
        return False


def _by_length(requests: Sequence[Request], most: int) -> dict[int, list[int]]:
    """Places of the requests by the tokens of their prompts that lm-eval keeps, the longest first."""
    found: dict[int, list[int]] = {}
    for i, (_, prompt, continuation) in enumerate(requests):
        found.setdefault(min(len(prompt), most + 1 - len(continuation)), []).append(i)
    return dict(sorted(found.items(), reverse=True))
