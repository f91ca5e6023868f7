"""Equal budgets: solved ranks have the parameters that training really has, within 1 %, at the recipe's scale."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import moesaic
from moesaic.data import examples as data
from moesaic.errors import ConfigError
from moesaic.models.embedded import load_model
from moesaic.runs.method import PLAIN
from moesaic.runs.recipe import Recipe, adapter_config, load_recipe, packaged
from moesaic.runs.results import count_trainable
from moesaic.training.budget import TOLERANCE, _spread, at_rank, solve
from moesaic.training.prepared import planned, prepare
from moesaic.training.wrapping import count, outline, with_heads
from tests.tiny import FROM_SCRATCH
from tests.tiny_folders import write_world

BUDGET = 60_000


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("budget")
    return write_world(root)


def recipe_of(world, kind: str, method: str, *settings: str) -> Recipe:
    base = [f"model={world / kind}", f"data={world / f'{kind}-data'}"]
    if method in packaged():
        return load_recipe(method, [*base, *settings])
    return replace(load_recipe("lora", base), method=method, adapter={})


def outlined(recipe: Recipe):
    return outline(recipe, data.load(recipe.data), adapter_config(recipe))


def check_solved(world, kind: str, method: str) -> None:
    recipe = recipe_of(world, kind, method)
    base = outlined(recipe)
    fewest, most = (count(base, at_rank(recipe, adapter_config(recipe, **base.defaults), r))[0] for r in (1, 9))
    budget = (2 * fewest + most) // 3
    solved = solve(recipe, base, budget, "match=trainable_params")
    real = prepare(solved, data.load(recipe.data))
    found = count_trainable(real.model)
    assert abs(found - budget) <= TOLERANCE * budget
    assert found == count(base, solved)[0]
    before, after = (adapter_config(r, **base.defaults) for r in (recipe, solved))
    if method in PLAIN:
        if after.use_rslora:
            assert after.lora_alpha == before.lora_alpha
            return
        scales = [m.scaling["default"] for m in real.model.modules() if isinstance(m, LoraLayer)]
        assert scales == pytest.approx([before.lora_alpha / before.r] * len(scales))
    elif not after.use_rslora:
        assert after.scaling == pytest.approx(before.scaling)


@pytest.mark.parametrize("kind", ["causal", "encoder"])
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_plain_lora_gets_the_budget_and_training_has_as_many(world, kind, name):
    check_solved(world, kind, name)


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_every_mixture_gets_the_budget_and_training_has_as_many(world, name):
    check_solved(world, "causal", name)


@pytest.mark.parametrize("name", ["hotmoe", "mola"])
def test_the_heads_of_an_encoder_count(world, name):
    recipe = recipe_of(world, "encoder", name)
    base = outlined(recipe)
    total, by_module = count(base, recipe)
    heads = count_trainable(base.model.task_heads)
    assert heads > 0
    assert total == sum(by_module.values()) + heads
    assert total == count_trainable(prepare(recipe, data.load(recipe.data)).model)


def test_an_outline_needs_no_weights_and_counts_as_the_model_does(world, tmp_path):
    shutil.copytree(world / "causal", tmp_path / "causal")
    (tmp_path / "causal" / "model.safetensors").unlink()
    bare = recipe_of(tmp_path, "causal", "mola", f"data={world / 'causal-data'}")
    base = outlined(bare)
    assert {p.device.type for p in base.model.parameters()} == {"meta"}
    loaded = with_heads(load_model(str(world / "causal")), data.load(bare.data), bare, adapter_config(bare))
    assert count(base, bare) == count(loaded, bare)
    with pytest.raises(ConfigError, match="cannot load model"):
        prepare(bare, data.load(bare.data))


def test_counting_and_solving_leave_the_model_as_it_was(world):
    recipe = recipe_of(world, "causal", "mola")
    base = with_heads(load_model(recipe.model), data.load(recipe.data), recipe, adapter_config(recipe))
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    solve(recipe, base, BUDGET, "match=trainable_params")
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.requires_grad for p in base.model.parameters())


def test_solving_is_closer_than_any_whole_rank(world):
    recipe = recipe_of(world, "causal", "mola")
    base = outlined(recipe)
    lower, upper = (count(base, at_rank(recipe, adapter_config(recipe, **base.defaults), r))[0] for r in (3, 4))
    budget = lower + (upper - lower) // 3
    solved = solve(recipe, base, budget, "match=x")
    found = count(base, solved)[0]
    assert abs(found - budget) < min(budget - lower, upper - budget)
    pattern = solved.adapter["rank_pattern"]
    assert solved.adapter["r"] == 3
    assert set(pattern.values()) == {4}
    assert (
        solve(recipe, base, upper, "match=x").adapter
        == at_rank(recipe, adapter_config(recipe, **base.defaults), 4).adapter
    )


@pytest.mark.parametrize("name", ["lora", "mola"])
def test_a_module_that_gets_more_rank_has_it_in_training_at_the_same_scale(world, name):
    recipe = recipe_of(world, "causal", name)
    base = outlined(recipe)
    lower, upper = (count(base, at_rank(recipe, adapter_config(recipe, **base.defaults), r))[0] for r in (3, 4))
    solved = solve(recipe, base, (lower + upper) // 2, "match=x")
    raised = set(solved.adapter["rank_pattern"])
    model = prepare(solved, data.load(recipe.data)).model.base_model.model
    wide = "lora_A" if name == "lora" else "moe_lora_A"
    layers = {n: m for n, m in model.named_modules() if hasattr(m, wide)}
    assert 0 < len(raised) < len(layers)
    experts = 1 if name == "lora" else 8
    for module, layer in layers.items():
        stored = getattr(layer, wide)["default"]
        rows = (stored.weight if name == "lora" else stored).shape[0]
        assert rows == experts * (4 if module in raised else 3)
        config = adapter_config(recipe)
        assert layer.scaling["default"] == pytest.approx(config.lora_alpha / config.r)


@pytest.mark.parametrize("name", ["lora", "mola", "dora"])
def test_match_gives_any_method_the_parameters_of_a_recipe(world, name):
    recipe = recipe_of(world, "encoder", name, "match=hotmoe")
    rows = data.load(recipe.data)
    target = count_trainable(prepare(recipe_of(world, "encoder", "hotmoe"), rows).model)
    prepared = prepare(recipe, rows)
    assert abs(count_trainable(prepared.model) - target) <= TOLERANCE * target
    assert prepared.recipe == planned(recipe)[0]
    assert planned(prepared.recipe)[0] == prepared.recipe, "a solved recipe solves to itself"


def test_match_takes_the_targets_of_its_recipe(world, tmp_path):
    narrow = tmp_path / "narrow.yaml"
    narrow.write_text("method: mola\nadapter: {r: 2, num_experts: 4, target_modules: [down_proj]}\n")
    solved = planned(recipe_of(world, "causal", "lora", f"match={narrow}"))[0]
    assert solved.adapter["target_modules"] == ["down_proj"]


def test_a_budget_below_the_routers_is_one_line_that_names_both_settings(world):
    recipe = recipe_of(world, "causal", "hotmoe")
    base = outlined(recipe)
    fewest = count(base, at_rank(recipe, adapter_config(recipe, **base.defaults), 1))[0]
    with pytest.raises(ConfigError) as caught:
        solve(recipe, base, fewest // 2, "match=trainable_params")
    text = str(caught.value)
    assert "\n" not in text
    for part in ("match=trainable_params", "adapter.num_experts=8", f"{fewest // 2:,}", f"{fewest:,}"):
        assert part in text


def test_ranks_are_set_or_solved_not_both(world):
    recipe = recipe_of(world, "causal", "lora", "match=mola", "adapter.rank_pattern={q_proj: 3}")
    with pytest.raises(ConfigError, match=r"match=mola solves the ranks, adapter\.rank_pattern sets them"):
        planned(recipe)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=24), st.floats(0, 1))
def test_spread_is_no_worse_than_nothing_and_in_range(costs, share):
    wanted = int(share * sum(costs))
    chosen = _spread(costs, wanted)
    assert chosen == sorted(set(chosen))
    assert all(0 <= i < len(costs) for i in chosen)
    assert abs(wanted - sum(costs[i] for i in chosen)) <= wanted


@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_equal_costs_are_met_to_half_a_module_and_lie_evenly(size, cost, draw):
    wanted = draw.draw(st.integers(0, size * cost))
    chosen = _spread([cost] * size, wanted)
    assert abs(wanted - cost * len(chosen)) * 2 <= cost
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + size], strict=True)] if chosen else [0]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("method", ["MoLAConfig", "HydraLoRAConfig"])
def test_a_config_is_as_large_as_another_by_one_call(method, world):
    model = load_model(str(world / "causal")).model
    like = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = moesaic.matched(getattr(moesaic, method), model, like=like, num_experts=2)
    assert (config.num_experts, config.task_type) == (2, "CAUSAL_LM")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    wanted = count_trainable(get_peft_model(copy.deepcopy(model), like))
    assert count_trainable(get_peft_model(model, config)) == pytest.approx(wanted, rel=TOLERANCE)


def test_a_config_that_is_given_keeps_what_it_says(world):
    model = load_model(str(world / "causal")).model
    like = LoraConfig(r=32, target_modules=["q_proj", "v_proj"])
    own = moesaic.MoLAConfig(r=4, lora_alpha=8, num_experts=2, target_modules=["q_proj", "v_proj"], aux_weight=0.5)
    config = moesaic.matched(own, model, like=like)
    assert (config.num_experts, config.aux_weight, config.lora_alpha / config.r) == (2, 0.5, 2)
    with pytest.raises(ConfigError, match="num_experts=3 is given beside a config"):
        moesaic.matched(own, model, like=like, num_experts=3)
    with pytest.raises(ConfigError, match=r"like=LoraConfig and adapter\.num_experts=8 disagree"):
        moesaic.matched(moesaic.MoLAConfig, model, like=LoraConfig(r=1, target_modules=["q_proj"]), num_experts=8)
