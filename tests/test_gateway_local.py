"""A mixture that the gateway loads into its own process: the answers of `moesaic serve`, routed and passed through."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openai import BadRequestError
from peft import get_peft_model

import moesaic
from moesaic.data.examples import Example
from moesaic.evaluation.opening import load, open_adapter
from moesaic.llms.gateway.routers import Decision
from moesaic.models.embedded import load_model
from moesaic.serving.answer import Answer
from moesaic.serving.asking import asked
from moesaic.serving.engine import OneByOne
from tests.gateways import Served, model, serving, write


class Stub:
    name = "moesaic/stub"

    def decide(self, prompt: str, *, session: str) -> Decision:
        return Decision("mixture", "sums", 0.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """nano with three experts that differ, beside the file that names it."""
    folder = tmp_path_factory.mktemp("local")
    torch.manual_seed(0)
    adapted = get_peft_model(
        load_model("nano").model, moesaic.MoLAConfig(target_modules=["q_proj"], r=4, num_experts=3)
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "router" in name:
                weight.normal_(std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = "nano"
    adapted.save_pretrained(str(folder / "mola"))
    with serving(write(folder, [model("mixture", "run:mola", idle=60.0)]), {"moesaic/stub": Stub()}) as found:
        yield found


def test_a_mixture_answers_as_it_does_by_itself(server: Served) -> None:
    prepared = load(open_adapter(str(server.folder / "mola")))
    prompts = [f"{i} 4 2 {i + 1} up =" for i in range(4)]
    wanted = [
        asyncio.run(Answer(OneByOne(prepared), asked(prepared, Example("", p), max_tokens=6)).whole()) for p in prompts
    ]

    async def ask(prompt: str, **more: Any) -> Any:
        client = server.async_client("-")
        return await client.completions.create(model="mixture", prompt=prompt, max_tokens=6, **more)

    async def each() -> list[str]:
        return [found.choices[0].text for found in await asyncio.gather(*map(ask, prompts))]

    async def streamed() -> str:
        return "".join([part.choices[0].text async for part in await ask(prompts[0], stream=True)])

    assert asyncio.run(each()) == wanted
    assert asyncio.run(streamed()) == wanted[0]
    rows = server.rows()
    assert rows[0]["backend_output"] <= 6
    assert {(row["served"], row["ended"]) for row in rows} == {("mixture", "whole")}


def test_a_mixture_is_routed_to_and_says_what_it_does_not_serve(server: Served) -> None:
    client = server.client("-")
    found = client.completions.with_raw_response.create(model="moesaic/stub", prompt="1 2 3 =", max_tokens=4)
    assert found.headers["x-moesaic-expert"] == "mixture"
    with pytest.raises(BadRequestError, match="logprobs"):
        client.completions.create(model="mixture", prompt="1", logprobs=3)
    with pytest.raises(BadRequestError, match="embeds nothing"):
        client.embeddings.create(model="mixture", input="1")
