"""A policy of one's own in this process: a causal language model whose KV cache is kept from round to round.

All conversations stand in one batch. What each reads is put to its end, and where rows are of different length the
cache has holes, which attention leaves out: a token's position is its number in its own row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.llms.router_r1.engine import STEP, Rounds, Written
from moesaic.llms.router_r1.transcript import TAGGED, Dialect

LONGEST_TOKEN = 200
"""Characters of one at most."""


def clipped(tokenizer: Any, text: str, tokens: int) -> str:
    """As much of a text as so many tokens hold."""
    text = text[: tokens * LONGEST_TOKEN]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens]))


def _turn(tokenizer: Any) -> tuple[str, str]:
    """What a chat template puts around a user's turn between two of the assistant's."""
    turns = [{"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "§"), ("user", "¶"))]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition("§")[2].partition("¶")
    return before, after


class LocalPolicy:
    """A Transformers model as a policy.

    Attributes:
        model, tokenizer: in evaluation mode while it writes. dialect: that it writes.
        temperature: 0 takes the likeliest token.
        max_new_tokens: of one generation. generator: of draws.
        keep: False begins each round anew, from the whole text: the slow way, to compare with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        dialect: Dialect = TAGGED,
        temperature: float = 1.0,
        max_new_tokens: int = 1024,
        seed: int | None = None,
        keep: bool = True,
    ) -> None:
        if not 0 <= temperature < float("inf") or max_new_tokens < 1:
            raise ConfigError("temperature from 0 on, max_new_tokens from 1 on")
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.dialect, self.max_new_tokens, self.keep = dialect, max_new_tokens, keep
        self.generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self._closing = {i for i, text in enumerate(texts) if ">" in text}
        self._ends = {tokenizer.eos_token_id} - {None}
        self._turn = _turn(tokenizer) if dialect.turns and tokenizer.chat_template else None

    def encode(self, prompt: str) -> list[int]:
        """A user's turn through the chat template; as plain text where the tokenizer has none."""
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(prompt)["input_ids"])

    def heard(self, reply: str) -> list[int]:
        """A reply as it is shown: a turn of its own where the dialect has it so and the tokenizer has a template."""
        if self._turn:
            reply = self._turn[0] + reply.strip() + self._turn[1]
        return list(self.tokenizer(reply, add_special_tokens=False)["input_ids"])

    def begin(self, prompts: Sequence[str]) -> Rounds:
        return _Rounds(self, [self.encode(prompt) for prompt in prompts])

    def stopped(self, ids: list[int]) -> bool:
        """Whether a generation ends with its last token."""
        if ids[-1] in self._ends:
            return True
        if ids[-1] not in self._closing:
            return False
        text = self.tokenizer.decode(ids[-12:])
        return any(stop in text for stop in self.dialect.stops)

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each row of logits (B, V), and its log probability."""
        if not self.temperature:
            tokens = logits.argmax(-1)
            return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        logs = (logits / self.temperature).log_softmax(-1)
        tokens = torch.multinomial(logs.exp(), 1, generator=self.generator)
        return tokens[:, 0], logs.gather(-1, tokens)[:, 0]


class _Rounds:
    def __init__(self, policy: LocalPolicy, prompts: list[list[int]]) -> None:
        self.policy = policy
        self._before: list[list[int]] = [[] for _ in prompts]
        self._pending = [list(prompt) for prompt in prompts]
        self._rows = list(range(len(prompts)))
        self._cache: Any = None
        self._mask = torch.empty(len(prompts), 0, dtype=torch.long, device=policy.model.device)

    def read(self, who: int, text: str) -> tuple[int, ...]:
        ids = self.policy.heard(text)
        self._pending[who] += ids
        return tuple(ids)

    def clip(self, text: str, tokens: int) -> str:
        return clipped(self.policy.tokenizer, text, tokens)

    @torch.inference_mode()
    def write(self, who: Sequence[int]) -> list[Written]:
        policy, who = self.policy, list(who)
        if not who:
            return []
        self._take(who)
        logits = self._feed([self._pending[i] for i in who])
        for i in who:
            self._before[i] += self._pending[i]
        ids: list[list[int]] = [[] for _ in who]
        logs: list[list[float]] = [[] for _ in who]
        active, step = list(range(len(who))), STEP.get()
        while active:
            step()
            tokens, chances = policy.draw(logits[active].float())
            for at, token, chance in zip(active, tokens.tolist(), chances.tolist(), strict=True):
                ids[at].append(token)
                logs[at].append(chance)
            on = [at for at in active if len(ids[at]) < policy.max_new_tokens and not policy.stopped(ids[at])]
            if not on:
                break
            going = set(on)
            logits = self._feed([ids[at][-1:] if at in going else [] for at in range(len(who))])
            active = on
        for at, i in enumerate(who):
            self._pending[i] = ids[at][-1:]
            self._before[i] += ids[at][:-1]
        texts = policy.tokenizer.batch_decode([[t for t in own if t not in policy._ends] for own in ids])
        return [
            Written(policy.dialect.cut(text), len(own), tuple(own), tuple(log))
            for text, own, log in zip(texts, ids, logs, strict=True)
        ]

    def _take(self, who: list[int]) -> None:
        """Leave the rows of others out of the cache, for good."""
        if not self.policy.keep:
            self._cache, self._rows = None, who
            self._mask = self._mask.new_empty(len(who), 0)
            for i in who:
                self._pending[i], self._before[i] = self._before[i] + self._pending[i], []
        elif who != self._rows:
            at = torch.tensor([self._rows.index(i) for i in who], device=self._mask.device)
            if self._cache is not None:
                self._cache.batch_select_indices(at)
            self._mask, self._rows = self._mask[at], who

    def _feed(self, rows: list[list[int]]) -> Tensor:
        """Logits (B, V) after each row's new tokens; those of a row without any mean nothing."""
        from transformers import DynamicCache

        model = self.policy.model
        width, device = max(map(len, rows)), self._mask.device
        pad = self.policy.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        new = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        places = (self._mask.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
        self._mask = torch.cat([self._mask, new], dim=1)
        if self._cache is None:
            self._cache = DynamicCache(config=model.config)
        return model(
            input_ids=ids, attention_mask=self._mask, position_ids=places, past_key_values=self._cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
