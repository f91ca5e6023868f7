"""What the gateway answers, as an OpenAPI document."""

from __future__ import annotations


def document() -> dict[str, object]:
    return {}
