"""What models read and write, found wherever it stands: names of fields differ from server to server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

PART = 1000
"""Tokens of a picture, a sound, a film or a file of a prompt by our count, whatever its size."""
MEDIA = frozenset(["image_url", "input_image", "input_audio", "audio_url", "video_url", "file"])
FRAME, SHORT = frozenset(["role", "type", "id", "tool_call_id"]), 64
"""Members that hold no text as long as they have no more characters than that."""
UNREAD = frozenset(
    ["model", "user", "metadata", "stop", "logit_bias", "stream_options", "prompt_cache_key", "safety_identifier",
     "service_tier", "reasoning_effort", "verbosity", "tool_choice", "modalities", "audio", "encoding_format"]
)  # fmt: skip
"""Fields of a request that no model is shown."""
SEALED = frozenset(["data", "signature", "encrypted_content"])
"""Members of an answer that are bytes, or that repeat what stands beside them."""

_PLAIN = frozenset(["role", "content"])
"""All that most events of most streams have."""


def said(value: Any, but: frozenset[str] = frozenset()) -> tuple[list[str], int]:
    """Texts of a message or a part of one, and how many pictures, sounds and files it holds.

    Args:
        but: names of members that are passed over.
    """
    texts: list[str] = []
    parts, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, list):
            left.extend(reversed(value))
        elif isinstance(value, dict):
            for name, inner in value.items():
                if not inner or name in but:
                    continue
                if name in MEDIA:
                    parts += 1
                elif not isinstance(inner, str):
                    left.append(inner)
                elif name not in FRAME or len(inner) > SHORT:
                    texts.append(inner)
    return texts, parts


def beside(body: Mapping[str, Any], name: str) -> Iterator[str]:
    """Texts of a request's fields but for one, such as tools and formats. Raises RecursionError."""
    for field, value in body.items():
        if field != name and field not in UNREAD and value:
            if isinstance(value, str):
                yield value
            elif isinstance(value, dict | list):
                yield json.dumps(value, ensure_ascii=False)


def written(choice: Mapping[str, Any]) -> tuple[list[str], int]:
    """What a choice or a part of one adds to an answer. A text that servers say twice counts once."""
    delta = choice.get("delta")
    if isinstance(delta, dict) and delta.keys() <= _PLAIN and not ("text" in choice or "message" in choice):
        text = delta.get("content")
        if isinstance(text, str):
            return [text], 0
    found, parts = [], 0
    for name in ("text", "delta", "message"):
        value = choice.get(name)
        if isinstance(value, str):
            found.append(value)
        elif value:
            texts, count = said(value, SEALED)
            found += dict.fromkeys(texts) if len(texts) > 1 else texts
            parts += count
    return found, parts
