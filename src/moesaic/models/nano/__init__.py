"""nano: the small language model that moesaic trains itself and ships, with the tasks that it is fine-tuned on.

``corpus`` generates its pre-training text, ``pretrain`` trains it, ``tasks`` holds six tasks for fine-tuning it.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder with config, weights (bf16) and tokenizer, as ``from_pretrained`` wants it."""
    return Path(__file__).parent / "weights"
