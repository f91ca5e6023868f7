"""`python -m moesaic.with PROGRAM`: programs that know nothing of moesaic load a mixture."""

import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

import moesaic
from moesaic.models.embedded import load_model
from tests.tiny_folders import save_model

PROGRAM = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import pipeline

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
said = pipeline("text-generation", sys.argv[1], max_new_tokens=2)("first 1 2 :")
print(__name__, sys.argv[2:], type(model.peft_config["default"]).__name__, type(said).__name__)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("with")
    base = load_model(str(save_model(root / "base", "causal")))
    get_peft_model(base.model, moesaic.MoLAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        root / "mixture"
    )
    base.tokenizer.save_pretrained(root / "mixture")
    (root / "program.py").write_text(PROGRAM)
    return root


def run(place: Path, *line: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moesaic.with", *line]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("how", [["program.py"], ["-m", "program"]])
def test_a_program_loads_a_mixture(place, how):
    done = run(place, *how, "mixture", "--flag", "x=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "__main__ ['--flag', 'x=1'] MoLAConfig list"


def test_a_console_script_is_called_by_its_name(place):
    done = run(place, "moesaic", "--version")
    assert (done.returncode, done.stdout) == (0, f"moesaic {moesaic.__version__}\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["lm_evil"], "no console script lm_evil is installed"),
        (["gone.py"], "there is no file gone.py"),
        (["-m", "gone.away"], "no module gone.away is installed"),
        (["-m"], "-m names no module"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(place, line, said):
    done = run(place, *line)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
