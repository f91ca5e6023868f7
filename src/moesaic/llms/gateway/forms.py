"""What the forms of other APIs take out of a chat's answer, whatever a backend wrote there."""

from __future__ import annotations

import json
from typing import Any


def text_of(content: Any) -> str:
    """The text of a message's content, which may come in parts. Raises TypeError for what is neither."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError
    return "".join(text for part in content if isinstance(text := part.get("text"), str))


def argument_text(given: Any) -> str:
    """Arguments of a call as text; some servers send an object. Raises TypeError for anything else."""
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, dict):
        raise TypeError
    return json.dumps(given)


def arguments(given: Any) -> dict[str, Any]:
    """Arguments of a call as an object; those that are none, as a limit cuts them off, in one as they came."""
    text = argument_text(given)
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": text}


def dumped(content: Any) -> bytes:
    """JSON in UTF-8; half surrogates, whose other half may come in the next event, stay escaped."""
    try:
        return json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(content).encode()
