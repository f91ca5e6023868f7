"""`moesaic methods`: what is told of every method is what its config, docstring and recipes hold."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

import moesaic
from moesaic.cli.main import main
from moesaic.cli.methods import describe, ffn_methods, overview
from moesaic.lora import METHODS
from moesaic.runs.method import PLAIN, methods
from moesaic.runs.recipe import load_recipe


@pytest.mark.parametrize("name", [*METHODS, *PLAIN])
def test_every_setting_has_its_default_and_a_line(name):
    about = describe(name)
    assert all(s["help"] and "\n" not in s["help"] for s in about["settings"])
    assert all(load_recipe(recipe).method == name for recipe in about["recipes"])
    assert name in about["recipes"]
    json.dumps(about)
    if name in METHODS:
        defaults = {f.name: f.default for f in fields(METHODS[name]) if isinstance(f.default, (int, float, str))}
        told = {s["name"]: s["default"] for s in about["settings"]}
        assert {key: defaults[key] for key in defaults.keys() & told.keys()} == {
            key: told[key] for key in defaults.keys() & told.keys()
        }
        assert len(told) > 10
        assert about["about"] in __import__(METHODS[name].__module__, fromlist=["x"]).__doc__


def test_what_is_listed_is_what_the_methods_say_themselves():
    known = {name: PLAIN.get(name) or kind for name, kind in methods().items()}
    known |= {f"convert/{name}": kind for name, kind in ffn_methods().items()}
    assert {row["method"]: (row["summary"], row["paper"]) for row in overview()} == {
        name: (about.summary, about.paper) for name, about in known.items()
    }
    code = "import sys; from moesaic.cli.methods import overview; overview(); print({'torch', 'peft'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_methods_own_settings_come_before_those_of_all():
    settings = describe("mola")["settings"]
    shared = [s["shared"] for s in settings]
    assert shared == sorted(shared)
    assert {s["name"] for s in settings if not s["shared"]} == {
        "lora_dropout", "aux_weight", "top_k", "experts_per_layer",
    }  # fmt: skip
    assert {s["name"]: s["default"] for s in describe("dora")["settings"]}["use_dora"] is True


def test_the_recipes_values_stand_beside_the_defaults():
    settings = {s["name"]: s["recipe"] for s in describe("mola")["settings"] if s["recipe"] is not None}
    assert settings == load_recipe("mola").adapter


def test_help_is_text_without_tags():
    assert not any("<" in s["help"] for s in describe("lora")["settings"])


def test_one_method_on_the_command_line(capsys):
    assert main(["methods", "custom"]) == 0
    said = capsys.readouterr().out
    for part in (
        "mix and match",
        "recipes: custom",
        "adapter.router_of=mola,rmoe",
        "losses_of",
        "moesaic.CustomConfig(",
    ):
        assert part in said
    assert main(["methods", "mola", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == "moesaic.MoLAConfig"
    assert main(["methods", "molla"]) == 2
    assert capsys.readouterr().err.startswith("moesaic: no method 'molla'; did you mean 'mola'?")


def test_configs_are_public_names_that_can_be_listed():
    assert {config.__name__ for config in METHODS.values()} <= set(dir(moesaic))
    assert {"trace", "from_pretrained", "RoutedTrainerMixin"} <= set(dir(moesaic))
    assert all(hasattr(moesaic, name) for name in dir(moesaic))
