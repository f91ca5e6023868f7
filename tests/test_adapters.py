"""Adapters that are trained already: read exactly, routed as each paper says, exported as they came."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import moesaic
from moesaic.adapters.arrow import ArrowRouter, prototypes
from moesaic.adapters.export import collapse, export_expert, truncated
from moesaic.adapters.glider import GliderRouter
from moesaic.adapters.lorahub import search
from moesaic.adapters.phatgoose import GateRouter
from moesaic.adapters.prompts import routing_prompts
from moesaic.errors import AdapterError, ConfigError
from moesaic.host import find_host, routing_scores, routing_tasks
from moesaic.lora import METHODS
from moesaic.lora.store import Store
from moesaic.lora.stored import WEIGHTS, read_expert
from moesaic.routing import RoutingContext
from tests import tiny

KINDS: dict[str, dict[str, Any]] = {
    "sort": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "speak": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "k_proj"]},
    "count": {
        "r": 6,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 16},
    },
}
"""Ranks, scalings, patterns and targets that differ."""
INSTRUCTIONS = {"sort": "put numbers in order", "speak": "say it in French", "count": "how many words are there"}


def write_adapter(folder: Path, seed: int = 0, **config: Any) -> Any:
    """A plain PEFT adapter of tiny Llama with random factors, saved; and the model that it was saved from."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny.llama(), LoraConfig(**config, init_lora_weights=False))
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("adapters")
    models = {name: write_adapter(place / name, seed, **kind) for seed, (name, kind) in enumerate(KINDS.items())}
    return {"models": models, "folders": {name: str(place / name) for name in KINDS}}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))


def compose(method: str, sources: dict[str, Any], **settings: Any) -> Any:
    return get_peft_model(tiny.llama(), METHODS[method](adapters=sources["folders"], **settings)).eval()


def hashes(folder: str) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}


# -- the store -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_hot_routing_is_the_adapter_itself(sources: dict[str, Any], ids: Tensor) -> None:
    before = {name: hashes(folder) for name, folder in sources["folders"].items()}
    model = compose("oracle", sources)
    for number, (name, source) in enumerate(sources["models"].items()):
        with routing_tasks(model, task_ids=[number]):
            got = model(input_ids=ids).logits
        torch.testing.assert_close(got, source(input_ids=ids).logits, rtol=0, atol=1e-6)
        assert not torch.allclose(got, tiny.llama()(input_ids=ids).logits, atol=1e-3), f"{name} must change something"
    assert {name: hashes(folder) for name, folder in sources["folders"].items()} == before


@pytest.mark.parametrize("method", ["phatgoose", "lora-mixer", "hotmoe"])
def test_only_routers_learn_and_experts_stay_bit_for_bit(method: str, sources: dict[str, Any], ids: Tensor) -> None:
    model = compose(method, sources).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids, routing_task_ids=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    model.set_adapter("default")
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed
    assert all(".moe_lora_router." in name for name in changed)


def test_a_gate_that_has_learned_nothing_is_a_half(sources: dict[str, Any], ids: Tensor) -> None:
    """PHATGOOSE's training starts from sigmoid(0): half of each row's own expert."""
    model = compose("phatgoose", sources).train()
    with moesaic.trace(model, keep_weights=True) as trace, routing_tasks(model, task_ids=[0, 1, 2]):
        model(input_ids=ids)
    for name in trace.modules:
        for weights in trace.weights(name):
            assert torch.equal(weights.view(3, -1, 3), 0.5 * torch.eye(3).unsqueeze(1).expand(3, 7, 3))


@torch.no_grad()
def test_general_knowledge_is_subtracted_as_a_change_not_by_factor(sources: dict[str, Any]) -> None:
    folders = sources["folders"]
    store = Store.read({"sort": folders["sort"], "count": folders["count"]}, [folders["speak"], folders["count"]])

    def change(name: str, module: str) -> Any:
        expert = read_expert(folders[name])
        if module not in expert.factors:
            return 0.0
        a, b = expert.read(module)
        return expert.factors[module].scaling * (b @ a)

    for module in store.modules:
        A, B, scaling = store.stacked(module)
        A, B = A.unflatten(0, (2, -1)), B.unflatten(0, (2, -1))
        for number, name in enumerate(store.names):
            wanted = change(name, module) - (change("speak", module) + change("count", module)) / 2
            torch.testing.assert_close(scaling[number] * B[number].t() @ A[number], wanted)


def test_absent_modules_are_zero_and_ranks_are_padded(sources: dict[str, Any]) -> None:
    store = Store.read(sources["folders"])
    A, B, _ = store.stacked("model.layers.0.self_attn.k_proj")
    assert A.shape[0] == 3 * 3
    assert B.unflatten(0, (3, -1))[0].abs().max() == 0
    assert B.unflatten(0, (3, -1))[2].abs().max() == 0
    assert store.rank("model.layers.0.self_attn.q_proj") == 4
    assert store.rank("model.layers.0.mlp.down_proj") == 6


def edited(tmp_path: Path, sources: dict[str, Any], **changes: Any) -> Path:
    folder = tmp_path / "edited"
    shutil.copytree(sources["folders"]["sort"], folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True, and DoRA rescales"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"peft_type": "IA3"}, "adapter of type 'IA3'"),
        ({"r": 5}, "has rank 5 by its config"),
        ({"r": "x"}, "r and lora_alpha must be numbers"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 2 by its config"),
        ({"alpha_pattern": [1]}, "alpha_pattern must hold numbers"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, sources: dict[str, Any]
) -> None:
    with pytest.raises(AdapterError, match=message):
        read_expert(edited(tmp_path, sources, **changes))


def test_damaged_adapters_are_refused(tmp_path: Path, sources: dict[str, Any]) -> None:
    folder = edited(tmp_path, sources)
    whole = load_file(folder / WEIGHTS)

    def refused(message: str) -> None:
        with pytest.raises(AdapterError, match=message) as caught:
            Store.read([str(folder)]).stacked("model.layers.0.self_attn.q_proj")
        assert "\n" not in str(caught.value)

    key = next(k for k in whole if "layers.0.self_attn.q_proj.lora_A" in k)
    save_file({k: v for k, v in whole.items() if k != key}, folder / WEIGHTS)
    refused("without the other factor")
    save_file({**whole, key: whole[key] * float("nan")}, folder / WEIGHTS)
    refused("numbers that are not finite")
    save_file({**whole, key: whole[key][:, :, None, None].contiguous()}, folder / WEIGHTS)
    refused("is a convolution")
    save_file({**whole, "base_model.model.x.lora_magnitude_vector": whole[key].clone()}, folder / WEIGHTS)
    refused("is no factor of a linear layer")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    refused("damaged or truncated")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused("is not read, since it may run code")
    (folder / "adapter_config.json").write_text("{")
    refused("cannot be read")
    (folder / "adapter_config.json").unlink()
    refused("it has no adapter_config.json")
    shutil.rmtree(folder)
    refused("there is no adapter folder")


@pytest.mark.parametrize("name", ["0", "q_proj", "default", "a.b", "", "a b"])
def test_names_that_would_be_lost_are_refused(name: str, sources: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be kept"):
        Store.read({name: sources["folders"]["sort"]})


def test_two_of_one_name_are_refused(sources: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="two adapters are called 'sort'"):
        Store.read([sources["folders"]["sort"]] * 2)
    assert Store.read({"one": sources["folders"]["sort"], "two": sources["folders"]["sort"]}).names == ["one", "two"]


def test_adapters_of_another_base_are_refused(tmp_path: Path, sources: dict[str, Any]) -> None:
    other = edited(tmp_path, sources, base_model_name_or_path="somebody/else")
    named = tmp_path / "named"
    shutil.copytree(sources["folders"]["sort"], named)
    file = named / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "some/body"}))
    with pytest.raises(AdapterError, match="experts share one base model"):
        Store.read([str(other), str(named)])
    assert len(Store.read([str(other), str(named)], ignore_base=True).experts) == 2
    wide = write_adapter_of(tiny.llama(hidden_size=32), tmp_path / "wide")
    with pytest.raises(AdapterError, match="other models"):
        Store.read({"a": sources["folders"]["sort"], "b": wide})
    with pytest.raises(AdapterError, match="the adapters are of another base model"):
        get_peft_model(tiny.llama(), METHODS["arrow"](adapters={"a": wide}))


def write_adapter_of(model: Any, folder: Path) -> str:
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("arrow", {"target_modules": ["q_proj"]}, "adapters and target_modules disagree"),
        ("mixlora", {}, "whose experts are whole FFNs"),
        ("hydralora", {}, "whose experts share one A"),
        ("arrow", {"top_k": 4}, "top_k=4 must be between 1 and num_experts=3"),
        ("arrow", {"router_temperature": 0.0}, "must be above 0"),
        ("glider", {"instructions": {"speak": "x"}}, "every adapter needs instructions, by its name: 'sort' has none"),
        ("glider", {"instructions": {**INSTRUCTIONS, "x": "y"}}, "there is no adapter 'x'"),
        ("lorahub", {"weights": [1.0]}, "weights has 1 entries for 3 adapters"),
    ],
)
def test_impossible_settings_are_refused(
    method: str, settings: dict[str, Any], message: str, sources: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        METHODS[method](adapters=sources["folders"], **settings)


def test_a_router_over_adapters_needs_some() -> None:
    with pytest.raises(ConfigError, match="routes to adapters that are trained already"):
        METHODS["arrow"]()


# -- Arrow -----------------------------------------------------------------------------------------------------------


def gapped(seed: int, *, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """A (1, r, d_in) and B (1, r, d_out) whose product has singular values that fall by `ratio`."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(12, 4, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(10, 4, generator=generator))
    values = ratio ** torch.arange(4.0)
    mix = torch.randn(4, 4, generator=generator) + 3 * torch.eye(4)
    return (mix @ torch.diag(values) @ right.t())[None], torch.linalg.solve(mix.t(), left.t())[None]


@given(seed=st.integers(0, 99), ratio=st.sampled_from([0.3, 0.9, 0.95, 0.99]))
def test_prototypes_are_the_first_singular_vectors(seed: int, ratio: float) -> None:
    A, B = gapped(seed, ratio=ratio)
    wanted = torch.linalg.svd(B[0].double().t() @ A[0].double()).Vh[0].float()
    assert abs(float(prototypes(A, B)[0] @ wanted)) > 1 - 1e-4


def test_prototypes_do_not_mind_how_a_change_is_factored() -> None:
    A, B = gapped(0)
    first = prototypes(A, B)[0]
    turn, _ = torch.linalg.qr(torch.randn(12, 12))
    padded = (torch.nn.functional.pad(m, (0, 0, 0, 3)) for m in (A, B))
    for a, b in ((7 * A, B / 7), (A, B @ turn.t()), tuple(padded)):
        assert abs(float(prototypes(a, b)[0] @ first)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(prototypes(A, 0 * B), torch.zeros(1, 10))


@given(seed=st.integers(0, 99), sign=st.sampled_from([-1.0, 1.0]), expert=st.integers(0, 2))
def test_an_experts_own_direction_scores_it_highest(seed: int, sign: float, expert: int) -> None:
    router = ArrowRouter(10, 3, temperature=1.0)
    parts = [gapped(3 * seed + i) for i in range(3)]
    router.read_experts(torch.cat([a[0] for a, _ in parts]), torch.cat([b[0] for _, b in parts]))
    logits = router(sign * 5 * router.prototypes[expert])
    assert int(logits.argmax()) == expert
    flipped = router(-router.prototypes[expert] * sign * 5)
    torch.testing.assert_close(flipped, logits)


# -- PHATGOOSE and GLIDER --------------------------------------------------------------------------------------------


def test_local_scores_are_correlations() -> None:
    router = GateRouter(8, 3).eval()
    torch.nn.init.normal_(router.gates)
    h = torch.randn(2, 5, 8)
    logits = router(h)
    for e in range(3):
        for x, got in zip(h.view(-1, 8), logits.view(-1, 3)[:, e], strict=True):
            pearson = torch.corrcoef(torch.stack([x, router.gates[e].detach()]))[0, 1]
            assert float(got) == pytest.approx(8**0.5 * float(pearson), abs=1e-3)


def test_gates_of_zero_route_to_all_alike() -> None:
    assert torch.equal(GateRouter(8, 3).eval()(torch.randn(4, 8)), torch.zeros(4, 3))


def glider(**settings: Any) -> GliderRouter:
    router = GliderRouter(8, 3, **{"alpha": None, "high": 100.0, "low": 3.0, "threshold": 0.8, **settings}).eval()
    torch.manual_seed(4)
    torch.nn.init.normal_(router.gates)
    return router


def scored(*rows: list[float]) -> RoutingContext:
    return RoutingContext(scores=torch.tensor(rows))


def test_alpha_zero_is_phatgoose_and_a_large_one_the_global_choice() -> None:
    h, context = torch.randn(2, 5, 8), scored([0.1, 0.9, 0.2], [0.6, 0.5, 0.4])
    local = GateRouter(8, 3).eval()
    local.load_state_dict(glider().state_dict())
    assert torch.equal(glider(alpha=0.0)(h, context), local(h))
    chosen = glider(alpha=1e4)(h, context).argmax(-1)
    assert torch.equal(chosen, torch.tensor([[1] * 5, [0] * 5]))


def test_a_constant_added_to_global_scores_changes_no_weight() -> None:
    h = torch.randn(2, 5, 8)
    router = glider(alpha=3.0)
    one, other = (
        router(h, scored([0.1 + c, 0.9 + c, 0.2 + c], [0.6 + c, 0.5 + c, 0.4 + c])).softmax(-1) for c in (0, 5)
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_threshold_turns_alpha_exactly_there() -> None:
    router = glider(threshold=0.5)
    scores = torch.tensor([[0.5, 0.1, 0.0], [0.5000001, 0.1, 0.0]])
    assert torch.equal(router.weighed(scores), torch.tensor([[3.0], [100.0]]) * scores)


def test_scores_by_sequence_equal_one_by_one() -> None:
    router, h = glider(), torch.randn(2, 5, 8)
    rows = [[0.1, 0.9, 0.2], [0.6, 0.5, 0.4]]
    together = router(h, scored(*rows))
    for i, row in enumerate(rows):
        torch.testing.assert_close(router(h[i : i + 1], scored(row))[0], together[i])


@torch.no_grad()
@pytest.mark.parametrize("method", ["arrow", "phatgoose", "glider"])
def test_one_expert_is_its_adapter_and_the_order_of_experts_does_not_matter(
    method: str, sources: dict[str, Any], ids: Tensor
) -> None:
    def made(*names: str, top_k: int = 1) -> Any:
        settings: dict[str, Any] = {"adapters": {name: sources["folders"][name] for name in names}, "top_k": top_k}
        if method == "glider":
            settings |= {"instructions": {n: INSTRUCTIONS[n] for n in names}, "encoder": "hashing"}
        model = get_peft_model(tiny.llama(), METHODS[method](**settings)).eval()
        for module in model.modules():
            if isinstance(module, GateRouter):
                for number, name in enumerate(names):
                    torch.manual_seed(list(KINDS).index(name))
                    torch.nn.init.normal_(module.gates[number])
        return model

    def logits(model: Any) -> Tensor:
        if method != "glider":
            return model(input_ids=ids).logits
        with routing_prompts(model, ["put numbers in order", "say it", "count words"]):
            return model(input_ids=ids).logits

    torch.testing.assert_close(
        logits(made("count")), sources["models"]["count"](input_ids=ids).logits, rtol=0, atol=1e-6
    )
    for top_k in (1, 2, 3):
        first, other = (logits(made(*order, top_k=top_k)) for order in (KINDS, reversed(KINDS)))
        torch.testing.assert_close(first, other, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("method", "k"), [("arrow", 1), ("arrow", 3), ("phatgoose", 1), ("phatgoose", 3)])
def test_k_experts_a_token_and_all_of_them_are_a_softmax(
    method: str, k: int, sources: dict[str, Any], ids: Tensor
) -> None:
    model = compose(method, sources, top_k=k)
    for parameter in tiny.router_parameters(model).values():
        torch.nn.init.normal_(parameter)
    with moesaic.trace(model, keep_weights=True) as trace:
        model(input_ids=ids)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "moe_lora_router")}
    assert len(trace.modules) == len(layers)
    for name in trace.modules:
        for weights in trace.weights(name):
            assert ((weights > 0).sum(-1) == k).all()
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            if k == 1:
                assert (weights.amax(-1) == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("cache", [True, False])
def test_generation_keeps_the_prompts_scores(sources: dict[str, Any], ids: Tensor, cache: bool) -> None:
    model = compose("glider", sources, instructions=INSTRUCTIONS, encoder="hashing", alpha=1e4, top_k=1)
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache}
    for name, source in sources["models"].items():
        with routing_prompts(model, [INSTRUCTIONS[name]] * 3):
            got = model.generate(input_ids=ids, **asked)
        assert torch.equal(got, source.generate(input_ids=ids, **asked)), name
    rows = [INSTRUCTIONS[name] for name in KINDS]
    with routing_prompts(model, rows):
        beams = model.generate(input_ids=ids, num_beams=2, **asked)
    for i, source in enumerate(sources["models"].values()):
        own = source.generate(input_ids=ids[i : i + 1], num_beams=2, **asked)
        assert torch.equal(beams[i, : own.shape[1]], own[0])
        assert set(beams[i, own.shape[1] :].tolist()) <= {tiny.EOS, tiny.PAD}


def test_a_model_that_was_not_told_the_prompt_says_so(sources: dict[str, Any], ids: Tensor) -> None:
    model = compose("retrieval", sources, texts={k: [v] for k, v in INSTRUCTIONS.items()}, encoder="hashing")
    find_host(model).readers.clear()
    with pytest.raises(ConfigError, match="routing_prompts"):
        model(input_ids=ids)
    with pytest.raises(ConfigError, match="2 columns for 3 experts"), routing_scores(model, torch.zeros(3, 2)):
        model(input_ids=ids)
    with pytest.raises(ConfigError, match="not finite"), routing_scores(model, torch.full((3, 3), torch.nan)):
        pass


@torch.no_grad()
def test_retrieval_takes_the_adapter_of_the_nearest_text(sources: dict[str, Any], ids: Tensor) -> None:
    texts = {
        name: [text, f"{text} please"][: 1 + number % 2] for number, (name, text) in enumerate(INSTRUCTIONS.items())
    }
    model = compose("retrieval", sources, texts=texts, encoder="hashing")
    with routing_prompts(model, list(INSTRUCTIONS.values())):
        got = model(input_ids=ids).logits
    for i, source in enumerate(sources["models"].values()):
        torch.testing.assert_close(got[i], source(input_ids=ids).logits[i], rtol=0, atol=1e-6)


# -- saving, exporting, collapsing -----------------------------------------------------------------------------------


@torch.no_grad()
def test_routers_instructions_and_vectors_are_saved(sources: dict[str, Any], ids: Tensor, tmp_path: Path) -> None:
    model = compose("glider", sources, instructions=INSTRUCTIONS, encoder="hashing")
    for parameter in tiny.router_parameters(model).values():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path / "out"))
    back = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "out")).eval()
    config: Any = back.peft_config["default"]
    assert config.instructions == INSTRUCTIONS
    assert config.experts == list(KINDS)
    assert config.adapters is None
    prompts = ["order 3 1 2", "translate", "count"]
    with routing_prompts(model, prompts), routing_prompts(back, prompts):
        assert torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
def test_an_exported_expert_is_the_adapter_that_came_in(sources: dict[str, Any], ids: Tensor, tmp_path: Path) -> None:
    compose("arrow", sources).save_pretrained(str(tmp_path / "out"))
    for name, source in sources["models"].items():
        export_expert(tmp_path / "out", name, tmp_path / name)
        back = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / name)).eval()
        assert torch.equal(back(input_ids=ids).logits, source(input_ids=ids).logits)
    with pytest.raises(ConfigError, match="has no expert 'sotr'; did you mean 'sort'"):
        export_expert(tmp_path / "out", "sotr", tmp_path / "x")
    with pytest.raises(ConfigError, match="is already there"):
        export_expert(tmp_path / "out", "sort", tmp_path / "sort")
    assert not (tmp_path / "x").exists()


@torch.no_grad()
@pytest.mark.parametrize("method", ["uniform", "cat", "lorahub"])
def test_a_static_mixture_collapses_into_one_lora(
    method: str, sources: dict[str, Any], ids: Tensor, tmp_path: Path
) -> None:
    model = compose(method, sources, **({"weights": [0.7, -0.4, 0.2]} if method == "lorahub" else {}))
    for parameter in tiny.router_parameters(model).values():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path / "out"))
    errors = collapse(tmp_path / "out", tmp_path / "one")
    assert set(errors.values()) == {0.0}
    back = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "one")).eval()
    torch.testing.assert_close(back(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
    small = collapse(tmp_path / "out", tmp_path / "small", rank=2)
    assert all(0 < error < 1 for error in small.values())


def test_a_truncation_is_the_best_of_its_rank_and_tells_its_error() -> None:
    A, B = torch.randn(6, 10), torch.randn(6, 12)
    whole = B.t() @ A
    a, b, error = truncated(A, B, 3)
    values = torch.linalg.svdvals(whole)
    assert a.shape == (3, 10)
    assert error == pytest.approx(float((whole - b.t() @ a).norm() / whole.norm()), rel=1e-4)
    assert error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-4)


def test_a_routed_mixture_does_not_collapse_and_says_why(sources: dict[str, Any], tmp_path: Path) -> None:
    compose("arrow", sources).save_pretrained(str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="weights differ by token or prompt"):
        collapse(tmp_path / "out", tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_the_search_finds_weights_without_gradients() -> None:
    wanted = torch.tensor([0.8, 0.0, -0.5])
    tried: list[list[float]] = []

    def loss(weights: list[float]) -> float:
        tried.append(weights)
        return float((torch.tensor(weights) - wanted).square().sum())

    best = search(loss, 3, budget=120)
    assert len(tried) <= 120
    assert all(abs(w) <= 1.5 for weights in tried for w in weights)
    assert loss(best) < 0.3 * loss([0.0] * 3)
    assert search(loss, 3, budget=40) == search(loss, 3, budget=40)
