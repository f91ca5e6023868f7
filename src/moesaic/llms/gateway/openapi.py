"""What the gateway answers, as an OpenAPI document: as much as it checks itself; the rest is the backends' to say."""

from __future__ import annotations

from typing import Any

from moesaic.llms.gateway.dialects import FIELDS, MESSAGES, RESPONSES
from moesaic.llms.gateway.making import DOLLARS
from moesaic.llms.gateway.requests import CHAT, COMPLETIONS, EMBEDDINGS, MOST_CHOICES, MOST_TOKENS

Schema = dict[str, Any]

_MODEL: Schema = {"type": "string", "minLength": 1, "maxLength": 200}
_TOKEN: Schema = {"type": "integer", "minimum": 0}
_TOKENS: Schema = {"type": "array", "items": _TOKEN, "minItems": 1}
_TEXTS: Schema = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_INPUT: Schema = {
    "oneOf": [{"type": "string"}, _TEXTS, _TOKENS, {"type": "array", "items": _TOKENS, "minItems": 1}],
}
_PART: Schema = {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string"},
        "content": {"oneOf": [{"type": ["string", "null"]}, {"type": "array", "items": _PART}]},
    },
}


def _whole(most: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": 1, "maximum": most}


_STREAM: Schema = {"type": ["boolean", "null"]}
_WRITING: Schema = {
    "stream": _STREAM, "max_tokens": _whole(MOST_TOKENS), "max_completion_tokens": _whole(MOST_TOKENS),
    "n": _whole(MOST_CHOICES), "best_of": _whole(MOST_CHOICES),
}  # fmt: skip
_LIST: Schema = {"type": "array", "items": _MESSAGE, "minItems": 1}


def _object(*optional: str, **properties: Schema) -> Schema:
    """An object that has all of these but the optional ones, and may have more."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties}


def _closed(*optional: str, **properties: Schema) -> Schema:
    """One that has nothing more, other than null."""
    return {**_object(*optional, **properties), "additionalProperties": _NULL}


def _or_null(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, _NULL]}


_NULL: Schema = {"type": "null"}
_TEXT: Schema = {"type": "string"}
_JSON: Schema = {"type": "object"}
_ANY: Schema = {}
_WORDS: Schema = {"type": "array", "items": _object(type={"const": "text"}, text=_TEXT)}
_ITEMS: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _object("type", type={"const": "message"}, role=_TEXT, content=_TEXT),
            _object(type={"const": "function_call"}, call_id=_TEXT, name=_TEXT, arguments=_TEXT),
            _object(type={"const": "function_call_output"}, call_id=_TEXT, output=_TEXT),
        ]
    },
}
_BLOCKS: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _object(type={"const": "text"}, text=_TEXT),
            _object(type={"const": "tool_use"}, id=_TEXT, name=_TEXT, input=_JSON),
            _object("content", type={"const": "tool_result"}, tool_use_id=_TEXT, content={"anyOf": [_TEXT, _WORDS]}),
        ]
    },
}
_SAID: Schema = {"type": "array", "minItems": 1, "items": _object(role=_TEXT, content={"anyOf": [_TEXT, _BLOCKS]})}


def _served(path: str, **known: Schema) -> Schema:
    """Fields of another API: those that are served, and the values of others that change nothing."""
    served, idle = FIELDS[path]
    values = {name: {"enum": [*kept, None]} for name, kept in idle.items() if name not in served}
    return {**dict.fromkeys(served, _ANY), **values, "stream": _STREAM, "model": _MODEL, **known}


_EFFORT = _closed("effort", effort={"type": ["string", "null"]})
_FORMAT = {
    "anyOf": [
        _object(type={"enum": ["text", "json_object"]}),
        _object(type={"const": "json_schema"}, name=_TEXT, schema=_JSON),
    ]
}
_FUNCTION = _object(type={"const": "function"}, name=_TEXT)
_BODIES: dict[str, tuple[list[str], Schema]] = {
    CHAT: (["model", "messages"], {"model": _MODEL, "messages": _LIST, **_WRITING}),
    COMPLETIONS: (["model", "prompt"], {"model": _MODEL, "prompt": _INPUT, **_WRITING}),
    EMBEDDINGS: (["model", "input"], {"model": _MODEL, "input": _INPUT, **_WRITING, "stream": {"enum": [False, None]}}),
    RESPONSES: (
        ["model", "input"],
        _served(
            RESPONSES, input={"anyOf": [_TEXT, _ITEMS]}, instructions=_or_null(_TEXT), reasoning=_or_null(_EFFORT),
            max_output_tokens=_whole(MOST_TOKENS), tools=_or_null({"type": "array", "items": _FUNCTION}),
            text=_or_null(_closed("format", "verbosity", format=_or_null(_FORMAT), verbosity=_ANY)),
            tool_choice=_or_null(_TEXT, _FUNCTION),
        ),
    ),
    MESSAGES: (
        ["model", "messages"],
        _served(
            MESSAGES, messages=_SAID, max_tokens=_whole(MOST_TOKENS), system=_or_null(_TEXT, _WORDS),
            metadata=_or_null(_JSON),
            tools=_or_null({"type": "array", "items": _closed(
                "type", "description", "strict", "cache_control", type={"enum": ["custom", None]}, name=_TEXT,
                description=_ANY, input_schema=_JSON, strict=_ANY, cache_control=_ANY,
            )}),
            tool_choice=_or_null(
                _object(type={"enum": ["auto", "any", "none"]}), _object(type={"const": "tool"}, name=_TEXT),
            ),
        ),
    ),
}  # fmt: skip

_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
            },
        }
    },
}  # fmt: skip
_CARD: Schema = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {"id": {"type": "string"}, "object": {"const": "model"}},
}
_CARDS: Schema = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"data": {"type": "array", "items": _CARD}},
}
_HEADERS: list[Schema] = [
    {"name": "x-moesaic-session", "in": "header", "schema": {"type": "string"},
     "description": "names a chat, which keeps its expert"},
    {"name": "x-moesaic-dry-run", "in": "header", "schema": {"enum": ["0", "1"]},
     "description": "1: the decision, without the call"},
    {"name": "x-moesaic-budget", "in": "header", "schema": {"type": "string", "pattern": DOLLARS},
     "description": "USD that the request may cost"},
]  # fmt: skip


def _answer(description: str, kind: str = "application/json", schema: Schema | None = None) -> Schema:
    return {"description": description, "content": {kind: {"schema": schema or {"type": "object"}}}}


def _errors(*statuses: int) -> Schema:
    reference = {"$ref": "#/components/schemas/Error"}
    return {str(status): _answer("an error, in one line", schema=reference) for status in statuses}


def _post(path: str, required: list[str], properties: Schema) -> Schema:
    stream = {"description": "an answer", "content": {"application/json": {"schema": {"type": "object"}},
                                                      "text/event-stream": {}}}  # fmt: skip
    schema: Schema = {"type": "object", "required": required, "properties": properties}
    if path in FIELDS:
        schema["additionalProperties"] = _NULL
    return {
        "post": {
            "parameters": _HEADERS,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {"200": stream, **_errors(400, 401, 404, 405, 408, 413, 415, 429, 500, 502, 503, 504)},
        }
    }


def _get(answer: Schema, *statuses: int, **more: Any) -> Schema:
    return {"get": {**more, "responses": {"200": answer, **_errors(*statuses)}}}


def document() -> Schema:
    """OpenAPI 3.1."""
    named = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "moesaic", "version": "1"},
        "paths": {
            **{path: _post(path, *body) for path, body in _BODIES.items()},
            "/v1/models": _get(_answer("what a request may name", schema=_CARDS), 400, 401, 405, 429),
            "/v1/models/{model}": _get(_answer("one of them", schema=_CARD), 400, 401, 404, 405, 429, parameters=named),
            "/health": {"get": {"security": [], "responses": {"200": _answer("it runs"), **_errors(400, 405)}}},
            "/metrics": _get(_answer("for Prometheus", "text/plain", {"type": "string"}), 400, 401, 405, 429),
        },
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
