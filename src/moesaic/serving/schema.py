"""What OpenAI's clients send, as far as it is served; anything else is refused by name, nothing is left out quietly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Neutral = Literal[0] | None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Request(BaseModel):
    """What both kinds of request may hold. Fields that ask for nothing else than we do are taken and not used."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[list[str], BeforeValidator(_as_list), Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None
    n: Literal[1] | None = None
    seed: int | None = None
    presence_penalty: Neutral = None
    frequency_penalty: Neutral = None
    logit_bias: dict[str, Neutral] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    routing: bool | Literal["tokens"] = False
    """Ours: with the answer, where it went; by token as well."""
    task: str = ""
    """Ours: for methods that are told each row's."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class CompletionRequest(_Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None
