"""A policy at an OpenAI-compatible endpoint: each conversation is a chat, which it is asked to go on with.

    tags                  user PROMPT, assistant "… </search>", user "<information> … </information>", assistant …
    calls in the text     the same, with <tool_call> and <tool_response>
    calls natively        user PROMPT + tools, assistant {tool_calls}, tool REPLY, assistant …

Stops are given to the endpoint, and put back where it cut them off. Native calls are written out as the dialect has
them, so that transcripts, faults and answers are the same whichever way a call came.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moesaic.errors import ConfigError, first_line
from moesaic.llms.catalog import Catalog, Model
from moesaic.llms.gateway.tokens import BYTES
from moesaic.llms.router_r1.asking import completion_tokens, post, text_of
from moesaic.llms.router_r1.calls import Calls, tools, written
from moesaic.llms.router_r1.engine import Written
from moesaic.llms.router_r1.transcript import TAGGED, Dialect

logger = logging.getLogger(__name__)


class HttpPolicy:
    """A model of a catalog as a policy; it tells no tokens, so that it can answer and not be trained.

    Attributes:
        dialect: that it writes. tools: the functions it is given, natively; empty where calls stand in the text.
    """

    def __init__(
        self,
        model: Model,
        *,
        dialect: Dialect = TAGGED,
        offered: Catalog | None = None,
        at_once: int = 10,
        retries: int = 2,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        timeout: float | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """
        Args:
            offered: models that the endpoint is given as native tools, with a dialect `Calls(listed=False)`.
            at_once: conversations. retries: tries after the first, for what may pass. max_tokens: of one generation.
            timeout: seconds of one try; the model's own `total` where None.
        Raises:
            ConfigError: a model without an address, or whose key is not set; tools for another dialect, or a dialect
                that leaves them out.
        """
        model.key()
        if not model.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"model {model.name} has no http endpoint to be a policy at")
        if (offered is None) == (isinstance(dialect, Calls) and not dialect.listed):
            raise ConfigError("native tools and a dialect Calls(listed=False) go together: give both or neither")
        self.model, self.dialect, self.tools = model, dialect, [] if offered is None else tools(offered.values())
        self.retries, self.max_tokens, self.temperature = retries, max_tokens, temperature
        self.timeout, self._sleep = timeout, sleep
        self._workers = ThreadPoolExecutor(at_once, thread_name_prefix="policy")

    def begin(self, prompts: Sequence[str]) -> _Chats:
        return _Chats(self, prompts)

    def side_by_side(self, chats: Sequence[list[dict[str, Any]]]) -> list[tuple[dict[str, Any], Written]]:
        """The assistant's next message to each chat, as the chat keeps it, and what that is in the dialect."""
        return list(self._workers.map(self._go_on, chats))

    def _go_on(self, messages: list[dict[str, Any]]) -> tuple[dict[str, Any], Written]:
        body: dict[str, Any] = {"messages": messages, "max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.tools:
            body |= {"tools": self.tools, "parallel_tool_calls": False}
        else:
            body["stop"] = list(self.dialect.stops)
        try:
            said = post(self.model, body, timeout=self.timeout, retries=self.retries, sleep=self._sleep)
            choice = said["choices"][0]
            message, text = self._message(choice)
            return message, Written(text, completion_tokens(said, text, self.model))
        except Exception as error:  # whatever an endpoint sends: this conversation ends, and the others go on
            why = f"{self.model.name}: {first_line(error) or type(error).__name__}"
            logger.warning("a conversation ends early: %s", why)
            return {}, Written("", 0, failure=why)

    def _message(self, choice: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """What the chat keeps of a choice, and its text up to the stop; of native calls the first alone."""
        message, stops = choice["message"], self.dialect.stops
        content = text_of(message.get("content"))
        if not self.tools and choice.get("finish_reason") != "length":
            named = choice.get("stop_reason", choice.get("matched_stop", ...))  # vLLM's and SGLang's: None for an end
            if named is ...:
                content = self.dialect.closed(content)
            elif named in stops and not content.endswith(named):
                content += named
        content = self.dialect.cut(content)
        kept: dict[str, Any] = {"role": "assistant", "content": content}
        if self.tools and message.get("tool_calls") and not content.endswith(stops):
            kept["tool_calls"] = [{"id": "call", "type": "function", **message["tool_calls"][0]}]
        return kept, written({**message, "tool_calls": None, **kept}, self.dialect)

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)


class _Chats:
    def __init__(self, policy: HttpPolicy, prompts: Sequence[str]) -> None:
        self.policy = policy
        self._chats: list[list[dict[str, Any]]] = [[{"role": "user", "content": prompt}] for prompt in prompts]

    def write(self, who: Sequence[int]) -> list[Written]:
        found = self.policy.side_by_side([self._chats[i] for i in who])
        for i, (message, _) in zip(who, found, strict=True):
            chat = self._chats[i]
            if message and chat[-1]["role"] == "assistant":  # nothing was read: it is one turn still
                message = {**message, "content": chat.pop()["content"] + message["content"]}
            chat += [message] if message else []
        return [written for _, written in found]

    def read(self, who: int, text: str) -> tuple[int, ...]:
        chat, (before, after) = self._chats[who], self.policy.dialect.around
        if calls := chat[-1].get("tool_calls"):
            content = text.removeprefix(before).removesuffix(after)
            chat.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": content})
        else:
            chat.append({"role": "user", "content": text.strip()})
        return ()

    def clip(self, text: str, tokens: int) -> str:
        """By bytes, as nobody tells the endpoint's tokens."""
        return text.encode("utf-8", "replace")[: tokens * BYTES].decode("utf-8", "ignore")
