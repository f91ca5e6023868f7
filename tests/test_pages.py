"""The examples of the pages on feed-forward layers and streams run as written, and their commands are known."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from moesaic.cli.llm import ACTIONS as LLM_ACTIONS
from moesaic.cli.skill import ACTIONS
from moesaic.ffn.method import methods
from moesaic.llms.catalog import Catalog
from moesaic.llms.gateway.config import _SECTIONS, Settings, Trace
from moesaic.llms.gateway.keys import Key
from moesaic.llms.gateway.policy import Policy
from moesaic.llms.router_r1.settings import SETTINGS as R1
from moesaic.llms.running import SETTINGS
from moesaic.runs.conversion import load_conversion
from moesaic.runs.pretraining import load_pretraining
from moesaic.runs.recipe import parse_settings
from moesaic.skills.running import load_look
from moesaic.skills.running import load_run as load_skill_run
from moesaic.trees.comparison import load_comparison
from moesaic.trees.running import load_run

ROOT = Path(__file__).parents[1]
PAGES = ("smoe-dropout", "read-me", "rmoe", "driftmoe", "skillblender", "coe", "router-r1")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("smoe-dropout", r"8 sort 4 1 8 : 1 4 8.*\n4 sort 4 1 8 :"),
        ("read-me", r"round 2\ntensor\(\[\[0.*\n 1 4 8.*memory \d+ read \d+"),
        ("rmoe", r"tensor\(.*tensor\(.* 2\nMoesaicMixtralForCausalLM"),
        ("skillblender", r"\[\(4, 1\), \(4, 4\)\] \(4, 10, 2\) \(4, \d+\)\nSkillBlender \(\d+,\)"),
        ("coe", r"\{'code': 'coder', 'verse': 'poet'.* 16\.0\ncoder poet"),
        ("router-r1", r"4 10\.0 Reward\(total=0\.75, outcome=1\.0, cost_rank=0\.5, fault=''\)"),
        ("driftmoe", r"Accuracy: 9\d\.\d+%\n\[.*\]\nTrue\nAccuracy: .*\n0\.\d+ 0\.\d+ \[0"),
    ],
)
def test_an_example_runs_as_written(page: str, said: str, tmp_path: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(said, done.stdout), done.stdout


def commands() -> list[list[str]]:
    pages = [block for page in PAGES for block in blocks(page, "sh")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages += re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in pages for line in block.splitlines()]
    ours = [line[1:] for line in lines if line[:1] == ["moesaic"]]
    return [
        line for line in ours if line[0] in ("convert", "stream", "skill", "llm") or line[1].startswith("pretrain/")
    ]


@pytest.mark.parametrize("line", commands(), ids=" ".join)
def test_a_command_is_one_that_is_understood(line: list[str]) -> None:
    verb, name, *settings = line
    if verb == "stream":
        assert {"run": load_run, "compare": load_comparison}[name](settings)
    elif verb == "llm":
        assert name in LLM_ACTIONS
        if name == "r1":
            parse_settings(R1[settings[0]], [text for text in settings[1:] if "=" in text])
        elif name in SETTINGS:
            parse_settings(SETTINGS[name], [text for text in settings if "=" in text])
    elif verb == "skill" and name in ("train", "blend"):
        assert load_skill_run(settings, blends=name == "blend").steps > 0
    elif verb == "skill":
        assert name in ACTIONS
        assert load_look(settings, name).folders
    elif verb == "convert":
        assert name in methods()
        assert load_conversion(name, settings).method == name
    else:
        assert load_pretraining(name, settings).steps > 0


def test_the_page_has_every_setting_of_a_gateway_and_its_default(tmp_path: Path) -> None:
    stored = yaml.safe_load(blocks("coe", "yaml")[1])
    given = {name: stored[name] for name in (f.name for f in fields(Settings))}
    assert given == asdict(Settings())
    assert stored["policy"] == asdict(Policy())
    assert {**stored["trace"], "file": ""} == asdict(Trace())
    assert stored["keys"][0].keys() | {"hash"} == {f.name for f in fields(Key)}
    assert stored.keys() == {*given, *_SECTIONS} - {"models", "policies"}
    models = tmp_path / "models.yaml"
    models.write_text(blocks("coe", "yaml")[0])
    assert [*Catalog.read(models)] == ["qwen-7b", "big", "lists"]
