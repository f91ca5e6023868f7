"""The README is run as written."""

import re
import subprocess
import sys
from pathlib import Path

from moesaic.recipe import methods

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs_as_written(tmp_path: Path) -> None:
    (example,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 4 8" in done.stdout.splitlines()[-1]


def test_the_table_of_methods_is_complete() -> None:
    firsts = re.findall(r"^\| (`[^|]*`) \|", README, flags=re.MULTILINE)
    assert sorted(re.findall(r"`([a-z-]+)`", " ".join(firsts))) == sorted(methods())


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", blocks("sh")[0], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
