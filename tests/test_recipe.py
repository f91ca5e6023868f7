"""Recipes: packaged by name, files by path, key=value on top; what is unknown is named with the nearest valid one."""

import math
from itertools import pairwise

import pytest

from moesaic.compare.settings import CompareSettings
from moesaic.errors import ConfigError
from moesaic.evaluation.settings import EvalSettings
from moesaic.runs.method import PLAIN, is_routed, methods
from moesaic.runs.recipe import adapter_config, as_used, dump, load_recipe, packaged, parse_settings
from moesaic.runs.settings import differences, parse_overrides, read_yaml


def test_parts_that_custom_is_not_told_follow_the_first_router() -> None:
    config = adapter_config(load_recipe("custom", ["adapter.router_of=random"]))
    assert (config.gate_name, config.losses_names) == ("random", ["random"])


def test_a_packaged_recipe_with_settings_on_top():
    recipe = load_recipe("lora", ["model=nano", "lr=3e-4", "tasks=a,b", "temperature=2", "adapter.r=4", "clip=0"])
    assert (recipe.method, recipe.model, recipe.lr, recipe.tasks) == ("lora", "nano", 3e-4, ["a", "b"])
    assert recipe.temperature == 2.0
    assert recipe.adapter["r"] == 4
    assert recipe.adapter["lora_alpha"] == 32


def test_one_task_is_a_list_too():
    assert load_recipe("lora", ["tasks=a"]).tasks == ["a"]


def test_the_default_temperature_survives_yaml(tmp_path):
    recipe = load_recipe("lora")
    assert math.isinf(recipe.temperature)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(recipe))
    assert load_recipe(str(file)) == recipe
    assert load_recipe(str(tmp_path)) == recipe, "a run folder stands for its recipe"


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_recipe_makes_a_config_of_a_registered_method(name):
    recipe = load_recipe(name)
    assert recipe.method in methods()
    if is_routed(recipe.method) and methods()[recipe.method].kind.needs_adapters:
        with pytest.raises(ConfigError, match="adapters that are trained already"):
            adapter_config(recipe)
    else:
        assert adapter_config(recipe, target_modules=["query"]).r == recipe.adapter["r"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stepz=3"], "unknown key 'stepz'.*did you mean 'steps'"),
        (["r=3"], "settings: r is a setting of the method: write adapter.r"),
        (["adaptor.r=3"], "unknown key 'adaptor.r'.*go under adapter"),
        (["steps"], "'steps' is not of the form key=value"),
        (["steps=many"], "steps"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["steps=99999999999999999999"], "^steps=99999999999999999999 must be at most 100,000,000$"),
        (["batch_size=1000001"], "^batch_size=1000001 must be at most 1,000,000$"),
        (["accumulation=1000001"], "^accumulation=1000001 must be at most 1,000,000$"),
        (["steps=100000000", "batch_size=1000000", "accumulation=100"], "make 10,000,000,000,000,000 rows, above"),
        (["lr=-1"], "lr=-1.0 must be above 0"),
        (["clip=-1"], "cannot be negative"),
        (["schedule=linnear"], "schedule=linnear; did you mean 'linear'"),
        (["precision=fp16"], "precision=fp16"),
        (["resume=yes"], "resume=yes; "),
        (["adapter=3"], "adapter must hold settings"),
        (["adapter={x: {1: 2}}"], "^adapter: the key 1 is no name: if it is meant, quote it$"),
        (["overwrite=5"], "^overwrite=5 must be true or false$"),
        (["steps=2020-13-45"], "^steps=2020-13-45 must be a whole number$"),
    ],
)
def test_a_bad_setting_is_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe("lora", settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="no recipe 'hotmo'; did you mean 'hotmoe'"):
        load_recipe("hotmo")
    with pytest.raises(ConfigError, match=r"no recipe file .*my\.yaml"):
        load_recipe("my.yaml")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "\tx: 1", ""])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        load_recipe(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["1", "true", "1.5"])
@pytest.mark.parametrize("text", ["{}: 3", "arms: {{x: {{method: mola, {}: 2}}}}", "a: [{{{}: 2}}]"])
def test_a_key_that_is_no_text_is_refused(tmp_path, key, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text.format(key))
    with pytest.raises(ConfigError, match=rf"bad\.yaml: the key {key} is no name: if it is meant, quote it$"):
        read_yaml(file)


def test_large_yaml_is_read_and_what_aliases_blow_up_is_not(tmp_path):
    file = tmp_path / "large.yaml"
    file.write_text("a: [" + "1, " * 20_000 + "1]\nb: &b {x: 1}\nc: *b")
    assert len(read_yaml(file)["a"]) == 20_001
    lines = [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise("abcdefgh")]
    file.write_text("a: &a [1, 1]\n" + "\n".join(lines))
    with pytest.raises(ConfigError, match=r"large\.yaml.*this is not YAML"):
        read_yaml(file)


def test_yaml_that_is_nested_too_deep_is_one_line(tmp_path):
    file, deep = tmp_path / "bad.yaml", "[" * 5000 + "]" * 5000
    file.write_text(f"a: {deep}")
    with pytest.raises(ConfigError, match=r"bad\.yaml is nested more than 100 deep"):
        read_yaml(file)
    with pytest.raises(ConfigError, match="must be a whole number"):
        load_recipe("lora", [f"steps={deep}"])


def test_a_slip_in_yaml_is_named_by_its_line(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("method: lora\nadapter:\n  r: 8\n   top_k: 2\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml:4: this is not YAML: mapping values are not allowed"):
        load_recipe(str(file))


def test_a_warm_up_that_is_too_long_is_recorded_as_it_is_used():
    assert load_recipe("lora", ["steps=20", "warmup=9"]).describes()["warmup"] == 9
    short = load_recipe("lora", ["steps=20", "warmup=10"])
    assert (short.describes()["warmup"], as_used(short).warmup) == (2, 2)
    assert as_used(short).describes() == short.describes()


def test_differences_name_each_setting_by_its_path():
    before = {"lr": 1.0, "adapter": {"r": 8, "rank_pattern": {"a": 2, "b": 2}}, "tasks": ["a", "b"]}
    now = {"lr": 1.0, "adapter": {"r": 4, "rank_pattern": {"a": 3, "b": 3}}, "tasks": None, "x": 0}
    assert differences(before, before) == ""
    assert differences(before, now) == (
        "adapter.r=8, now 4; adapter.rank_pattern.a=2, now 3; adapter.rank_pattern.b=2, now 3; "
        "tasks=a,b, now (not set) and 1 more"
    )


def test_unknown_adapter_settings_and_methods_name_the_nearest():
    with pytest.raises(ConfigError, match=r"no setting adapter\.num_expert; did you mean 'num_experts'"):
        adapter_config(load_recipe("mola", ["adapter.num_expert=4"]))
    with pytest.raises(ConfigError, match="no method 'mol'; did you mean 'mola'"):
        adapter_config(load_recipe("mola", ["method=mol"]))


def test_top_k_above_the_number_of_experts_is_refused():
    with pytest.raises(ConfigError, match="top_k"):
        adapter_config(load_recipe("mola", ["adapter.num_experts=2", "adapter.top_k=3"]))


def test_another_method_drops_the_recipes_adapter_settings():
    recipe = load_recipe("mola", ["method=lora", "adapter.r=3"])
    assert recipe.adapter == {"r": 3}


def test_eval_settings_are_checked_likewise():
    assert parse_settings(EvalSettings, ["limit=5", "base=false", "tasks=a"]) == EvalSettings(
        limit=5, base=False, tasks=["a"]
    )
    with pytest.raises(ConfigError, match=r"unknown key 'limt'.*did you mean 'limit'"):
        parse_settings(EvalSettings, ["limt=5"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["seed=-1"], "seed=-1 must be between 0"),
        (["seed=99999999999"], "seed=99999999999"),
        (["clip=nan"], "clip=nan must be a finite number"),
        (["lr=inf"], "lr=inf must be a finite number"),
        (["weight_decay=inf"], "weight_decay=inf"),
        (["tasks={a: 1}"], "tasks=.* must be a list of texts"),
        (["tasks=[[1]]"], "must be a list of texts"),
        (["steps=2.5"], "^steps=2.5 must be a whole number$"),
        (["lr=fast"], "^lr=fast must be a number$"),
        (["model=${nowhere}"], r"^model: the \$\{…\} in it cannot be followed"),
        (["adapter.r=2020-01-01"], r"^adapter\.r: it must be a number, a text"),
        (["out=a\0b"], "NUL"),
    ],
)
def test_a_number_or_kind_that_cannot_be_is_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe("lora", settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["adapter=", "adapter=null"])
def test_an_empty_adapter_section_adds_nothing(text):
    assert load_recipe("lora", [text]) == load_recipe("lora")


@pytest.mark.parametrize("key", ["inference_mode", "peft_type", "base_model_name_or_path"])
def test_what_peft_records_cannot_be_set(key):
    with pytest.raises(ConfigError, match=f"no setting adapter.{key}"):
        adapter_config(load_recipe("hotmoe", [f"adapter.{key}=true"]))


def test_pefts_own_kinds_of_lora_are_methods_without_routers():
    from peft import LoraConfig

    made = {name: adapter_config(load_recipe(name), target_modules=["query"]) for name in PLAIN}
    assert all(type(config) is LoraConfig and not is_routed(name) for name, config in made.items())
    assert [(c.use_rslora, c.use_dora) for c in made.values()] == [(False, False), (True, False), (False, True)]
    assert is_routed("mola")
    assert made["rslora"].lora_alpha / made["rslora"].r ** 0.5 == made["lora"].lora_alpha / made["lora"].r


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("mola", "use_dora=true", "adapter.use_dora=true cannot go with method=mola: DoRA rescales by the norm"),
        ("lora", "use_dora=true", "adapter.use_dora=true makes method=lora another one: method=dora is LoRA with it"),
        ("lora", "use_rslora=true", "method=rslora is LoRA with it"),
        ("dora", "use_dora=false", "adapter.use_dora=false cannot go with method=dora"),
        ("rslora", "use_rslora=false", "adapter.use_rslora=false cannot go with method=rslora"),
    ],
)
def test_settings_that_belie_the_methods_name_are_refused(recipe, setting, message):
    with pytest.raises(ConfigError, match=message) as caught:
        adapter_config(load_recipe(recipe, [f"adapter.{setting}"]))
    assert "\n" not in str(caught.value)


def test_modules_to_save_are_the_recipes_and_the_defaults():
    recipe = load_recipe("lora", ["adapter.modules_to_save=pooler"])
    assert adapter_config(recipe, modules_to_save=["heads"]).modules_to_save == ["heads", "pooler"]
    assert adapter_config(load_recipe("lora"), modules_to_save=["heads"]).modules_to_save == ["heads"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8,8,8", [8, 8, 8]),
        ("0, 1", [0, 1]),
        ("0.5,1e-3", [0.5, 1e-3]),
        ("q,v", ["q", "v"]),
        ("on,off", ["on", "off"]),
        ("yes,1", ["yes", "1"]),
        ("true,null", ["true", "null"]),
    ],
)
def test_a_list_by_commas_is_of_numbers_or_of_names(text, wanted):
    (given,) = parse_overrides([f"adapter.x={text}"])["adapter"].values()
    assert given == wanted
    assert list(map(type, given)) == list(map(type, wanted))
    assert parse_overrides([f"tasks={text}"], lists=("tasks",))["tasks"] == [p.strip() for p in text.split(",")]


def test_a_text_in_quotes_is_one_text_whatever_is_in_it():
    """The shell takes the outer quotes: 'adapter.instructions.a="x, y: 1"'."""
    given = parse_overrides(['adapter.instructions.a="x, y: 1"', "adapter.b='1e-3'", "adapter.c=x, y"])["adapter"]
    assert given == {"instructions": {"a": "x, y: 1"}, "b": "1e-3", "c": ["x", "y"]}


def test_lists_by_commas_are_what_the_adapters_setting_asks_for():
    settings = [f"adapter.{s}" for s in ("experts_per_layer=8,4", "layers_to_transform=0,1", "target_modules=0,1")]
    config = adapter_config(load_recipe("mola", settings))
    assert (config.experts_per_layer, config.layers_to_transform) == ([8, 4], [0, 1])
    assert config.target_modules == {"0", "1"}


@pytest.mark.parametrize("value", ["a", "1.5", "true", "0,x"])
def test_an_entry_of_another_kind_is_told_with_its_list(value):
    shown = value.replace("t", "T")
    with pytest.raises(ConfigError, match=f"^seeds={shown} must be a list of whole numbers, such as 0,1$"):
        parse_settings(CompareSettings, [f"seeds={value}"])


def test_settings_of_an_arm_nest_and_do_not_replace_a_whole():
    assert parse_overrides(["arms.x.adapter.r=2", "arms.x.method=mola", "seeds=1"], lists=("seeds",)) == {
        "arms": {"x": {"adapter": {"r": 2}, "method": "mola"}},
        "seeds": [1],
    }
    with pytest.raises(ConfigError, match=r"'arms\.x\.r=2' sets a part of 'x'"):
        parse_overrides(["arms.x=mola", "arms.x.r=2"])


@pytest.mark.parametrize(
    "text", ["1_000", "0x1F", "true", "no", "1e3", "007", "a,b", "[a]", "{a: 1}", "a: b", "#1", "a #1", "2020-01-01"]
)
def test_a_text_is_taken_as_it_is_written(text):
    recipe = load_recipe("lora", [f"out={text}", f"data={text}", f"model={text}"])
    assert (recipe.out, recipe.data, recipe.model) == (text, text, text)
    assert parse_settings(EvalSettings, [f"data={text}"]).data == text
    assert load_recipe("lora", [f"out='{text}'"]).out == text
    assert load_recipe("lora", [f'out="{text}"']).out == text


@pytest.mark.parametrize("text", ["null", "~", " "])
def test_null_is_no_text(text):
    assert load_recipe("lora", [f"match={text}"]).match is None
    assert parse_settings(EvalSettings, [f"data={text}"]).data is None
    assert load_recipe("lora", ["match='null'"]).match == "null"
    with pytest.raises(ConfigError, match=r"must be a text$"):
        load_recipe("lora", [f"out={text}"])
