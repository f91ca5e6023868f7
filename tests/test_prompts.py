"""What the prompt is, however it reaches the model: methods that route by it give the same answer on every way.

The reference is the plain one, a prompt at a time with its cache; adapters and routers are drawn at random.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import moesaic
from moesaic.adapters.prompts import routing_prompts
from moesaic.errors import ConfigError
from moesaic.host import find_host
from moesaic.lora import METHODS
from moesaic.models.embedded import load_model
from tests import composing, tiny

PROMPTS = [f"{i} {7 * i % 10} {3 * i % 8}{' 5' * (i % 4)} {composing.TASKS[i % 3]} =" for i in range(20)]
BY_PROMPT = ("sequence", "smear", "retrieval", "glider")
ASKED: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class World:
    def __init__(self, place: Path) -> None:
        adapters = {task: str(place / task) for task in composing.TASKS}
        texts = {task: [f"{i} 4 {task} =" for i in range(3)] for task in adapters}
        own: dict[str, dict[str, Any]] = {
            "sequence": {"num_experts": 3, "r": 4},
            "smear": {"adapters": adapters, "ignore_base": True, "expert_dropout": 0.0},
            "retrieval": {"adapters": adapters, "ignore_base": True, "texts": texts, "encoder": "hashing"},
        }
        own["glider"] = own["retrieval"]
        self.tokenizer = load_model("nano").tokenizer
        self.models = {}
        for method, settings in own.items():
            base = load_model("nano").model.float()
            model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM", **settings)).eval()
            torch.manual_seed(0)
            tiny.randomize_b(model) if method == "sequence" else None
            for parameter in tiny.router_parameters(model).values():
                torch.nn.init.normal_(parameter, std=0.3)
            self.models[method] = model
        self.ids = [self.tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
        self.plain = {m: [answer(model, ids) for ids in self.ids] for m, model in self.models.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(composing.make(tmp_path_factory.mktemp("prompts")))


@torch.no_grad()
def answer(model: PeftModel, ids: Tensor, **settings: Any) -> list[int]:
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **ASKED | settings)
    return made[0, ids.shape[1] :].tolist()


@torch.no_grad()
def prefix(model: PeftModel, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], past_key_values=cache)
    return cache


def same_model(model: PeftModel, ids: Tensor) -> list[int]:
    return answer(model, ids, assistant_model=load_model("nano").model.float())


WAYS: dict[str, Callable[[PeftModel, Tensor], list[int]]] = {
    "no cache": lambda model, ids: answer(model, ids, use_cache=False),
    "chunks of three": lambda model, ids: answer(model, ids, prefill_chunk_size=3),
    "prompt lookup": lambda model, ids: answer(model, ids, prompt_lookup_num_tokens=2),
    "assisted": same_model,
    "a prefix's cache": lambda model, ids: answer(model, ids, past_key_values=prefix(model, ids)),
    "its copy": lambda model, ids: answer(model, ids, past_key_values=copy.deepcopy(prefix(model, ids))),
    "static cache": lambda model, ids: answer(model, ids, cache_implementation="static"),
}


@pytest.mark.parametrize("method", BY_PROMPT)
@pytest.mark.parametrize("way", list(WAYS))
def test_the_same_prompts_give_the_same_tokens(world: World, method: str, way: str) -> None:
    model = world.models[method]
    for prompt, ids, plain in zip(PROMPTS, world.ids, world.plain[method], strict=True):
        by_text = method in ("retrieval", "glider") and way in ("a prefix's cache", "its copy")
        with routing_prompts(model, [prompt]) if by_text else nullcontext():
            assert WAYS[way](model, ids) == plain, prompt
    assert len({tuple(tokens) for tokens in world.plain[method]}) > 3, "answers that do not depend on the prompt"


@torch.no_grad()
@pytest.mark.parametrize("method", BY_PROMPT)
@pytest.mark.parametrize("training", [False, True])
def test_a_padded_batch_and_generation_in_training_mode(world: World, method: str, training: bool) -> None:
    model = world.models[method]
    tokenizer = world.tokenizer
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    plain = world.plain[method]
    if training:  # gates may differ there: the reference is one at a time in that mode
        model.train()
        find_host(model).pinned_tasks = torch.tensor([1])
    try:
        if training:
            plain = [answer(model, ids, use_cache=False) for ids in world.ids]
        made = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **ASKED)
    finally:
        model.eval()
        find_host(model).pinned_tasks = None
    assert made[:, batch.input_ids.shape[1] :].tolist() == plain


def batched(model: PeftModel, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    asked = GenerationConfig(**{**ASKED, "eos_token_id": -1})
    pages = {"page_size": 8, "num_blocks": 64, "max_batch_tokens": 256, "max_requests_per_batch": 8, **settings}
    base = model.base_model.model
    implementation = base.config._attn_implementation
    try:
        found = base.generate_batch(
            prompts, generation_config=asked, continuous_batching_config=ContinuousBatchingConfig(**pages)
        )
    finally:
        base.set_attn_implementation(implementation)
    return [out.generated_tokens for out in found.values()]


@pytest.mark.parametrize("method", BY_PROMPT)
def test_continuous_batching(world: World, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = batched(world.models[method], [ids[0].tolist() for ids in world.ids])
    assert made == world.plain[method]


@pytest.mark.parametrize("method", ["sequence", pytest.param("smear", marks=pytest.mark.slow)])
def test_continuous_batching_in_parts_and_with_shared_beginnings(world: World, method: str) -> None:
    model = world.models[method]
    begin = torch.cat(world.ids[:3], dim=1)
    prompts = [begin, *(torch.cat([begin, ids], dim=1) for ids in world.ids[3:9])]
    wanted = [answer(model, ids) for ids in prompts]
    for settings in ({"max_batch_tokens": 12}, {"max_requests_per_batch": 1}, {"max_batch_tokens": 100}):
        assert batched(model, [ids[0].tolist() for ids in prompts], **settings) == wanted, settings


def test_a_text_that_continuous_batching_shows_in_parts_is_told(world: World) -> None:
    with pytest.warns(UserWarning, match="shows a prompt in parts"):
        batched(world.models["retrieval"], [torch.cat(world.ids[:3], dim=1)[0].tolist()], max_batch_tokens=12)


def test_continuous_batching_refuses_what_its_thread_cannot_see(world: World) -> None:
    model = world.models["retrieval"]
    with routing_prompts(model, ["1 2 up ="]), pytest.raises(ConfigError, match="thread of its own"):
        batched(model, [[5, 6]])
    with moesaic.trace(model), pytest.raises(ConfigError, match="thread of its own"):
        batched(model, [[5, 6]])


# -- loops of one's own --------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: PeftModel, ids: Tensor, cache: Any, *, chunk: int | None = None) -> list[int]:
    """A greedy loop that tells the model nothing but its tokens."""
    for part in ids.split(chunk or ids.shape[1], dim=1):
        logits = model(input_ids=part, past_key_values=cache).logits
    made = []
    for _ in range(ASKED["max_new_tokens"]):
        token = logits[:, -1:].argmax(dim=-1)
        made.append(int(token))
        logits = model(input_ids=token, past_key_values=cache).logits
    return made


@pytest.mark.parametrize("method", BY_PROMPT)
def test_a_loop_by_hand_needs_to_tell_nothing(world: World, method: str) -> None:
    model = world.models[method]
    for ids, plain in zip(world.ids[:6], world.plain[method], strict=False):
        assert by_hand(model, ids, DynamicCache(config=model.config)) == plain
        if method in ("sequence", "smear"):
            assert by_hand(model, ids, DynamicCache(config=model.config), chunk=ids.shape[1] // 2 + 1) == plain
            cache = DynamicCache(config=model.config)
            with moesaic.routing_prompt_length(model, ids.shape[1]):
                assert by_hand(model, ids, cache, chunk=ids.shape[1] - 1) == plain


def test_a_prompt_read_in_parts_is_told(world: World) -> None:
    model, ids = world.models["retrieval"], world.ids[0]
    with pytest.warns(UserWarning, match="routed by itself"):
        by_hand(model, torch.cat([ids, world.ids[1]], dim=1), DynamicCache(config=model.config), chunk=ids.shape[1])


def test_impossible_lengths_are_refused(world: World) -> None:
    for length in (0, -1, 2.5, "3"):
        with (
            pytest.raises(ConfigError, match="routing_prompt_length"),
            moesaic.routing_prompt_length(world.models["sequence"], length),  # type: ignore[arg-type]
        ):
            pass


@torch.no_grad()
def test_a_cache_filled_behind_the_routers_back_is_told(world: World) -> None:
    model, ids = world.models["sequence"], world.ids[0]
    cache = DynamicCache(config=model.config)
    with model.disable_adapter():
        model(input_ids=ids, past_key_values=cache)
    with pytest.warns(UserWarning, match="have not read"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    cache.crop(2 - ids.shape[1])
    with pytest.warns(UserWarning, match="have not read"):
        model(input_ids=ids[:, 2:], past_key_values=cache)


@torch.no_grad()
def test_a_second_turn_goes_on_from_what_was_given_in_the_first(world: World) -> None:
    """What was answered does not count, as in training on a chat's answers."""
    model, (one, two) = world.models["sequence"], world.ids[:2]
    cache = DynamicCache(config=model.config)
    made = torch.tensor([answer(model, one, past_key_values=cache, max_new_tokens=3)])
    whole = torch.cat([one, made, two], dim=1)
    labels = whole.clone()
    labels[:, : one.shape[1]] = labels[:, one.shape[1] + 3 :] = -100
    wanted = model(input_ids=whole, labels=labels, use_cache=False).logits[:, -1].argmax(dim=-1)
    assert answer(model, whole, past_key_values=cache, max_new_tokens=1) == wanted.tolist()


@torch.no_grad()
def test_a_static_cache_by_hand_and_used_anew(world: World) -> None:
    model = world.models["sequence"]
    cache = StaticCache(config=model.config, max_cache_len=64)
    for ids, plain in zip(world.ids[:3], world.plain["sequence"], strict=False):
        cache.reset()
        assert by_hand(model, ids, cache) == plain


# -- answers that are trained on -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"custom"}))
def test_on_policy_ratios_are_one(method: str) -> None:
    """What GRPO and RLOO compare: the probability of an answer when it was generated, and when it is scored."""
    model = tiny.wrap(tiny.llama(), tiny.small(method))
    torch.manual_seed(0)
    for parameter in tiny.router_parameters(model).values():
        if parameter.requires_grad:
            parameter.normal_(std=0.4)
    model.train()
    inputs = tiny.padded(tiny.batch(model, tokens=7, labels=False), left=3)
    extra = {key: inputs.pop(key) for key in list(inputs) if key.startswith("routing")}
    made = model.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=True,
        suppress_tokens=[tiny.PAD, tiny.EOS],
        return_dict_in_generate=True,
        output_logits=True,
    )
    width = inputs["input_ids"].shape[1]
    answers = made.sequences[:, width:]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], dim=1)
    labels = made.sequences.masked_fill(mask == 0, -100)
    labels[:, :width] = -100
    scored = model(input_ids=made.sequences, attention_mask=mask, labels=labels, **extra).logits[:, width - 1 : -1]
    then, now = (
        logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
        for logits in (torch.stack(made.logits, dim=1), scored)
    )
    torch.testing.assert_close((now - then).exp(), torch.ones_like(now), atol=1e-3, rtol=0)


def test_answers_from_another_gate_than_is_trained_are_told() -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("phatgoose")).train()
    host = find_host(model)
    host.pinned_tasks = host.pinned_scores = None
    with pytest.warns(UserWarning, match="off-policy"):
        model.base_model.model.generate_batch([])


def test_unloading_leaves_generate_as_it_was() -> None:
    base = tiny.llama()
    own = base.generate
    model = tiny.wrap(base, tiny.small("sequence"))
    assert "generate" in vars(base)
    copied = copy.deepcopy(model)
    assert copied.base_model.model.generate.args[0] is copied.base_model.model
    model.unload()
    assert not {"generate", "generate_batch"} & vars(base).keys()
    assert base.generate == own


# -- other sequences than the one that is answered -----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("method", ["sequence", "smear"])
@pytest.mark.parametrize("negative", ["short", "long", "none"])
def test_a_negative_prompt_is_routed_by_itself(world: World, method: str, negative: str) -> None:
    model, ids = world.models[method], world.ids[0]
    other = {"short": world.ids[1][:, :3], "long": torch.cat(world.ids[1:3], dim=1), "none": None}[negative]
    asked = {} if other is None else {"negative_prompt_ids": other}
    made = model.generate(
        input_ids=ids, guidance_scale=1.7, return_dict_in_generate=True, output_scores=True, **asked, **ASKED
    )
    other = ids[:, -1:] if other is None else other

    def scored(prompt: Tensor) -> Tensor:
        length, answer = prompt.shape[1], made.sequences[:, ids.shape[1] :]
        with moesaic.routing_prompt_length(model, length):
            logits = model(input_ids=torch.cat([prompt, answer], dim=1), use_cache=False).logits
        return logits[:, length - 1 : -1].log_softmax(dim=-1)

    with_it, without = scored(ids), scored(other)
    torch.testing.assert_close(
        torch.stack(made.scores, dim=1), 1.7 * (with_it - without) + without, atol=1e-3, rtol=1e-4
    )


@torch.no_grad()
def test_a_negative_prompt_without_a_cache_is_told(world: World) -> None:
    with pytest.warns(UserWarning, match="second sequence"):
        answer(world.models["sequence"], world.ids[0], guidance_scale=1.5, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("method", ["sequence", "smear"])
def test_generate_within_generate_has_its_own_prompt(world: World, method: str) -> None:
    model, seen = world.models[method], []

    class Judge(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            seen.append(answer(model, world.ids[1]))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    made = answer(model, world.ids[0], stopping_criteria=StoppingCriteriaList([Judge()]))
    assert made == world.plain[method][0]
    assert seen
    assert all(tokens == world.plain[method][1] for tokens in seen)


@torch.no_grad()
@pytest.mark.parametrize("method", ["sequence", "smear"])
@pytest.mark.parametrize("way", ["reorder_cache", "batch_select_indices"])
def test_a_caches_rows_take_their_prompts_along(world: World, method: str, way: str) -> None:
    model = world.models[method]
    ids = torch.cat([row[:, :5] for row in world.ids[:3]])
    step, order = torch.tensor([[5], [6], [7]]), torch.tensor([2, 0] if way == "batch_select_indices" else [2, 0, 1])
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    other = copy.deepcopy(cache)
    wanted = model(input_ids=step, past_key_values=cache).logits[order]
    getattr(other, way)(order)
    torch.testing.assert_close(model(input_ids=step[order], past_key_values=other).logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["sequence", pytest.param("smear", marks=pytest.mark.slow)])
@pytest.mark.parametrize("blocks", [16, 11])
def test_requests_that_lose_their_pages_keep_their_prompts(world: World, method: str, blocks: int) -> None:
    prompts = [world.ids[i][0].tolist() for i in (3, 7, 11, 15, 19)]
    made = batched(world.models[method], prompts, page_size=4, num_blocks=blocks)
    assert made == [world.plain[method][i] for i in (3, 7, 11, 15, 19)]


def test_copies_of_pages_are_refused(world: World) -> None:
    asked = GenerationConfig(**{**ASKED, "eos_token_id": -1, "do_sample": True}, num_return_sequences=2)
    with pytest.raises(ConfigError, match="repeat the prompts"):
        world.models["sequence"].base_model.model.generate_batch([[5, 6]], generation_config=asked)


@torch.no_grad()
def test_a_cache_of_another_adapter_is_told(world: World) -> None:
    model = tiny.wrap(tiny.llama(), tiny.small("sequence"))
    model.add_adapter("second", tiny.small("sequence"))
    ids = tiny.batch(model)["input_ids"]
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="have not read"):
        model(input_ids=ids[:, :1], past_key_values=cache)
