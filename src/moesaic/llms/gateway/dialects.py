"""Other APIs in a thin form: OpenAI's responses and Anthropic's messages, said as chat and back."""

from __future__ import annotations

from moesaic.llms.gateway.refusals import Refused
from moesaic.llms.gateway.relay import Form
from moesaic.llms.gateway.requests import Asked

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
FORMS: dict[str, type] = {}


def translated(path: str, raw: bytes) -> tuple[Asked, Form]:
    raise NotImplementedError


def refusal(refused: Refused) -> bytes:
    return refused.body()
