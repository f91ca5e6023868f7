"""What works with what: each check does it once and for real, and says how it went.

    None            it works
    a text          it works, with a note
    MoesaicError    it is refused, and these are the words

Anything else that is raised is a fault. `tests/test_compatibility.py` holds the checks to what docs/compatibility.md
says; `python scripts/compatibility.py` writes that page.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
)

from moesaic.errors import MoesaicError
from moesaic.host import find_host
from moesaic.lora import METHODS
from tests import tiny
from tests.test_threads import in_threads, replicas
from tests.tiny_folders import save_model
from tests.zoo import IMAGE, ZOO

Check = Callable[[str], "str | None"]
METHODS_TOLD = sorted(METHODS.keys() - {"custom"})
ENCODERS = ("bert", "albert", "modernbert")
GENERATED: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}


def outcome(check: Callable[[], str | None]) -> str:
    """How it went, in words for the page."""
    try:
        said = check()
    except MoesaicError as error:
        return f"refused: {error}"
    return "works" if said is None else f"note: {said}"


@contextmanager
def told() -> Iterator[list[str]]:
    """What is warned of meanwhile, by this library."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found: list[str] = []
        yield found
    told = [str(w.message) for w in seen if w.category is UserWarning]
    found += [text for text in told if text.startswith(("wrapped but never called", "this model keeps experts"))]


def wrapped(method: str, kind: str = "llama", **settings: Any) -> PeftModel:
    return tiny.wrap(ZOO[kind](), tiny.small(method, model=kind, **settings))


def same(found: Tensor, wanted: Tensor, *, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


# -- architectures -----------------------------------------------------------------------------------------------------


def inputs_of(kind: str, model: Any) -> dict[str, Tensor]:
    inputs = tiny.batch(model)
    if kind in ENCODERS:
        inputs["labels"] = torch.tensor([0, 1, 2])
    if kind == "llava":
        inputs["input_ids"] = torch.where(inputs["input_ids"] == IMAGE, 5, inputs["input_ids"])
        inputs["input_ids"][:, :4] = IMAGE
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["pixel_values"] = torch.randn(3, 3, 16, 16)
    return inputs


def architecture(kind: str) -> Check:
    """Train a step, with padding; answer, and generate where the model does."""

    generated = GENERATED | ({"suppress_tokens": [IMAGE]} if kind == "llava" else {})

    def check(method: str) -> str | None:
        with told() as notes:
            model = wrapped(method, kind)
            inputs = inputs_of(kind, model)
            model.train()
            loss = model(**inputs).loss
            if loss.requires_grad:
                loss.backward()
                grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
                assert grads
                assert all(grad.isfinite().all() for grad in grads)
            model.eval()
            asked = {k: v for k, v in inputs.items() if k not in ("labels", "routing_targets")}
            if kind in ENCODERS:
                padded = tiny.padded({k: asked[k] for k in ("input_ids", "attention_mask")}, right=2)
                with torch.no_grad():
                    same(model(**padded).logits, model(**asked).logits)
            elif kind not in ("t5", "mamba", "zamba2"):
                plain = model.generate(**asked, **generated)
                left = tiny.padded({k: asked[k] for k in ("input_ids", "attention_mask")}, left=2)
                made = model.generate(**asked | left, **generated)
                assert torch.equal(made[:, -4:], plain[:, -4:])
                assert torch.equal(model.generate(**asked, **generated, use_cache=False), plain)
            elif kind != "t5":
                assert model.generate(**asked, **generated).shape[1] == asked["input_ids"].shape[1] + 4
            else:
                asked.pop("decoder_input_ids", None)
                assert torch.equal(
                    model.generate(**asked, **generated), model.generate(**asked, **generated, use_cache=False)
                )
        return "; ".join(dict.fromkeys(notes)) or None

    return check


# -- training ----------------------------------------------------------------------------------------------------------


def _step(model: PeftModel, **inputs: Any) -> dict[str, Tensor]:
    loss = model(**inputs).loss
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(method: str) -> str | None:
    """Two sequences in one row, told apart by their positions, answer as in two rows."""
    model = wrapped(method)
    a, b = torch.randint(3, tiny.VOCAB, (1, 6)), torch.randint(3, tiny.VOCAB, (1, 9))
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    with torch.no_grad():
        together = model(input_ids=torch.cat([a, b], dim=1), position_ids=positions, use_cache=False).logits
        apart = [model(input_ids=ids, use_cache=False).logits for ids in (a, b)]
    same(together, torch.cat(apart, dim=1))
    config: Any = model.peft_config["default"]
    if config.kind.needs_tasks or config.kind.needs_targets:
        return "task ids and routing targets are of rows: pack rows of one task"
    return None


def checkpointed(method: str) -> str | None:
    """Gradient checkpointing, not reentrant, gives the same gradients."""
    plain = wrapped(method).train()
    inputs = tiny.batch(plain)
    wanted = _step(plain, **inputs)
    model = wrapped(method).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = _step(model, **inputs)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        same(found[name], grad, atol=1e-5)
    return None


def half(method: str) -> str | None:
    """A bf16 base under bf16 autocast."""
    model = tiny.wrap(tiny.llama().to(torch.bfloat16), tiny.small(method)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _step(model, **tiny.batch(model))
    assert all(grad.isfinite().all() for grad in found.values())
    return None


def quantised(**how: Any) -> Check:
    """A base of bitsandbytes on the CPU: a step of training, and an answer."""

    def check(method: str) -> str | None:
        base = AutoModelForCausalLM.from_pretrained(
            _quantised_folder(), quantization_config=BitsAndBytesConfig(**how), device_map="cpu"
        )
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        if METHODS[method].kind.needs_adapters:
            folders = tiny.adapters("wide llama")
            config = tiny.small(method, model="wide llama", adapters=folders)
        else:
            config = tiny.small(method)
        model = tiny.pin_task(get_peft_model(base, config)).train()
        tiny.randomize_b(model)
        found = _step(model, **tiny.batch(model))
        assert all(grad.isfinite().all() for grad in found.values())
        made = model.eval().generate(input_ids=tiny.batch(model)["input_ids"], **GENERATED)
        assert made.shape[1] == 11
        return None

    return check


ZOO["wide llama"] = lambda: tiny.llama(hidden_size=64, intermediate_size=64)


@cache
def _quantised_folder() -> str:
    folder = tempfile.mkdtemp()
    ZOO["wide llama"]().save_pretrained(folder)
    return folder


# -- answering ---------------------------------------------------------------------------------------------------------


def _answers(model: PeftModel, **settings: Any) -> Tensor:
    ids = tiny.batch(model, rows=1, tokens=9)["input_ids"]
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GENERATED | settings)


def generating(**settings: Any) -> Check:
    """The same tokens as with the plain cache."""

    def check(method: str) -> str | None:
        model = wrapped(method)
        assert torch.equal(_answers(model, **settings), _answers(model))
        return None

    return check


def assisted(method: str) -> str | None:
    model = wrapped(method)
    assert torch.equal(_answers(model, assistant_model=tiny.llama()), _answers(model))
    return None


def prefix_cache(method: str) -> str | None:
    """A beginning that was read before, its cache copied, and another prompt behind it."""
    model = wrapped(method)
    ids = tiny.batch(model, rows=1, tokens=9)["input_ids"]
    cache_of_prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :4], past_key_values=cache_of_prefix)
    assert torch.equal(_answers(model, past_key_values=copy.deepcopy(cache_of_prefix)), _answers(model))
    if find_host(model).readers:
        return "open routing_prompts around both: the beginning alone is another prompt"
    return None


def beams(method: str) -> str | None:
    model = wrapped(method)
    assert torch.equal(_answers(model, num_beams=3), _answers(model, num_beams=3, use_cache=False))
    return None


def paged(method: str) -> str | None:
    """`generate_batch`: requests of all lengths in one row."""
    model = wrapped(method)
    host = find_host(model)
    if host.readers:
        host.readers = {"default": lambda ids, prompt: host_scores.expand(len(ids), -1)}
        host_scores = host.pinned_scores
    host.pinned_tasks = host.pinned_scores = None
    base = model.base_model.model
    ids = tiny.batch(model, rows=3, tokens=9)["input_ids"].tolist()
    made = base.generate_batch(
        [row[: 9 - i] for i, row in enumerate(ids)],
        generation_config=GenerationConfig(**{**GENERATED, "eos_token_id": -1}),
        continuous_batching_config=ContinuousBatchingConfig(page_size=8, num_blocks=32, max_batch_tokens=64),
    )
    base.set_attn_implementation("sdpa")
    tiny.pin_task(model)
    for i, request in enumerate(made.values()):
        plain = model.generate(input_ids=torch.tensor([ids[i][: 9 - i]]), **GENERATED)
        assert request.generated_tokens == plain[0, 9 - i :].tolist()
    return "trains and answers by different gates: roll out with generate" if host.differing() else None


def threads(method: str) -> str | None:
    """Four threads over one model, each with its own batch."""
    model = wrapped(method)
    batches = [tiny.batch(model, rows=2, seed=i, labels=False) for i in range(4)]
    host = find_host(model)
    config: Any = model.peft_config["default"]
    for i, batch in enumerate(batches):
        if config.kind.needs_tasks or config.kind.needs_adapters:
            batch["routing_task_ids"] = torch.tensor([i % 2, 1])
        if host.pinned_scores is not None:
            batch["routing_scores"] = torch.rand(2, config.num_experts)
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in batches]
        found: dict[int, Tensor] = {}

        def ask(i: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    found[i] = model(**batches[i]).logits

        assert not in_threads(ask, 4)
    assert all(torch.equal(found[i], wanted[i]) for i in range(4))
    return None


def data_parallel(method: str) -> str | None:
    """A step of two replicas, made as `nn.DataParallel` makes them, is the mean of their steps."""
    windows = {f.name: False for f in dataclasses.fields(METHODS[method]) if f.name.endswith("_window")}
    model = wrapped(method, aux_weight=0.3, **windows).train()
    halves = [tiny.batch(model, rows=2, tokens=6, seed=i) for i in range(2)]
    loss = torch.stack([model(**half).loss for half in halves]).mean()
    if not loss.requires_grad:
        return "nothing to train"
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    losses: dict[int, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        copies = replicas(model, 2, patch)

        def work(i: int) -> None:
            host = find_host(copies[i])
            host.pinned_tasks, host.pinned_scores = pinned
            losses[i] = copies[i](**halves[i]).loss

        pinned = find_host(model).pinned_tasks, find_host(model).pinned_scores
        assert not in_threads(work, 2)
    torch.stack([losses[0], losses[1]]).mean().backward()
    found = dict(model.named_parameters())
    for name, grad in zip(names, wanted, strict=True):
        if grad is not None:
            torch.testing.assert_close(found[name].grad, grad, atol=1e-5, rtol=1e-3)
    return None


def compiled(method: str) -> str | None:
    """`torch.compile` of the forward, as the backend aot_eager traces it."""
    model = wrapped(method, "llama")
    inputs = tiny.batch(model, labels=False)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(**inputs).logits
        same(torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits, wanted)
    return "decode without it" if find_host(model).asks("by_prompt") and method in ("sequence", "smear") else None


# -- TRL ---------------------------------------------------------------------------------------------------------------


@cache
def _trl_folder() -> Path:
    return save_model(Path(tempfile.mkdtemp()) / "model", "causal")


def _trl_model(
    method: str,
    cls: Any = AutoModelForCausalLM,
    *,
    task_type: str = "CAUSAL_LM",
    aux_weight: float = 0.01,
    **settings: Any,
) -> PeftModel:
    model = cls.from_pretrained(_trl_folder(), **settings)
    if METHODS[method].kind.needs_adapters:
        ZOO["trl"] = lambda: AutoModelForCausalLM.from_pretrained(_trl_folder())
    kind = "trl" if METHODS[method].kind.needs_adapters else "llama"
    return tiny.wrap(model, tiny.small(method, model=kind, task_type=task_type, aux_weight=aux_weight))


def _arguments(cls: Any, **settings: Any) -> Any:
    shared = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "bf16": False}
    return cls(tempfile.mkdtemp(), logging_steps=1, save_strategy="no", **shared, **settings)


def _trained(trainer: Any) -> dict[str, Any]:
    trainer.train()
    found: dict[str, Any] = trainer.state.log_history[0]
    assert math.isfinite(found.get("loss", found.get("train_loss", math.nan)))
    return found


def _learns(method: str) -> bool:
    return any(p.requires_grad for p in wrapped(method).parameters())


PAIRS = [
    {"prompt": "first 3 4 :", "chosen": " 3", "rejected": " 4"},
    {"prompt": "last 5 6 7 :", "chosen": " 7 1", "rejected": " 5"},
] * 2


def dpo(method: str) -> str | None:
    from trl import DPOConfig, DPOTrainer

    if not _learns(method):
        return "nothing to train"
    trainer = DPOTrainer(
        model=_trl_model(method, aux_weight=0.0),
        args=_arguments(DPOConfig),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(_trl_folder()),
    )
    assert abs(_trained(trainer)["loss"] - math.log(2)) < 1e-3
    return None


def kto(method: str) -> str | None:
    from trl.experimental.kto import KTOConfig, KTOTrainer

    if not _learns(method):
        return "nothing to train"
    sides = ("chosen", "rejected")
    rows = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"} for p in PAIRS for side in sides]
    trainer = KTOTrainer(
        model=_trl_model(method),
        args=_arguments(KTOConfig),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(_trl_folder()),
    )
    _trained(trainer)
    return None


def reward(method: str) -> str | None:
    from trl import RewardConfig, RewardTrainer

    if not _learns(method):
        return "nothing to train"
    model = _trl_model(method, AutoModelForSequenceClassification, num_labels=1, task_type="SEQ_CLS")
    trainer = RewardTrainer(
        model=model,
        args=_arguments(RewardConfig),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(_trl_folder()),
    )
    _trained(trainer)
    return None


def grpo(method: str) -> str | None:
    from trl import GRPOConfig, GRPOTrainer

    if not _learns(method):
        return "nothing to train"
    trainer = GRPOTrainer(
        model=_trl_model(method),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=_arguments(GRPOConfig, num_generations=2, max_completion_length=4),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
        processing_class=AutoTokenizer.from_pretrained(_trl_folder()),
    )
    _trained(trainer)
    return None


ARCHITECTURES: dict[str, Check] = {kind: architecture(kind) for kind in ZOO if kind not in ("wide llama", "trl")}
TRAINING: dict[str, Check] = {
    "packed rows": packed,
    "checkpointing": checkpointed,
    "bf16 and autocast": half,
    "DataParallel": data_parallel,
    "8-bit base": quantised(load_in_8bit=True),
    "4-bit base": quantised(load_in_4bit=True),
    "TRL: DPO": dpo,
    "TRL: KTO": kto,
    "TRL: Reward": reward,
    "TRL: GRPO": grpo,
}
ANSWERING: dict[str, Check] = {
    "no cache": generating(use_cache=False),
    "static cache": generating(cache_implementation="static"),
    "chunked prefill": generating(prefill_chunk_size=2),
    "prompt lookup": generating(prompt_lookup_num_tokens=2),
    "assisted": assisted,
    "copied prefix cache": prefix_cache,
    "beams": beams,
    "generate_batch": paged,
    "threads": threads,
    "torch.compile": compiled,
}
TABLES: dict[str, dict[str, Check]] = {
    "Architectures": ARCHITECTURES,
    "Training": TRAINING,
    "Answering": ANSWERING,
}
