"""README.md of a saved mixture says how to load it, whoever wrote the rest of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

import moesaic
from moesaic.cli.main import main
from moesaic.lora.card import HEADING, LOADING, tell_loading
from moesaic.models.embedded import load_model
from tests.composing import asked, make
from tests.tiny_folders import save_model, write_tasks


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("cards") / "base", "causal")


def mixture(**settings: object) -> moesaic.MoLAConfig:
    return moesaic.MoLAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)


def told(folder: Path) -> str:
    """A card, which says how to load once."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.count("import moesaic") == card.count(HEADING) == 1
    assert LOADING.rstrip() in card  # PEFT drops the last end of line where it writes the card again
    return card


def test_what_peft_saves_says_how_to_load(base, tmp_path):
    model = get_peft_model(load_model(str(base)).model, mixture())
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert "library_name: peft" in told(tmp_path)


def test_a_second_adapters_folder_says_it_too(base, tmp_path):
    model = get_peft_model(load_model(str(base)).model, mixture())
    model.add_adapter("second", mixture(num_experts=2))
    model.save_pretrained(tmp_path)
    assert told(tmp_path / "second") == f"{HEADING}\n\n{LOADING}"


def test_what_transformers_saves_says_how_to_load(base, tmp_path):
    model = load_model(str(base)).model
    model.add_adapter(mixture())
    model.save_pretrained(tmp_path)
    told(tmp_path)


def test_the_users_own_card_is_kept(base, tmp_path):
    mine = "---\nlicense: mit\n---\n\n# Mine\n\nWords, 'quoted', é.\n"
    (tmp_path / "README.md").write_text(mine, encoding="utf-8")
    model = get_peft_model(load_model(str(base)).model, mixture())
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = told(tmp_path)
        assert "license: mit" in card
        assert card.index("Words, 'quoted', é.") < card.index(HEADING)


def test_a_card_that_says_it_is_left_as_it_is(tmp_path):
    mine = "# Mine\n\n    import moesaic\n\n\n"
    (tmp_path / "README.md").write_text(mine)
    mixture().save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == mine


def test_what_sft_trainer_saves_says_how_to_load(base, tmp_path):
    how = SFTConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    rows = Dataset.from_list([{"prompt": "first 1 2 :", "completion": "1"}] * 2)
    trainer = SFTTrainer(str(base), how, train_dataset=rows, peft_config=mixture())
    trainer.train()
    told(tmp_path / "checkpoint-1")
    trainer.save_model()
    assert "trained using [TRL]" in told(tmp_path)


def test_a_run_says_how_to_load(base, tmp_path):
    write_tasks(tmp_path / "data", "causal")
    common = [f"model={base}", f"data={tmp_path / 'data'}", "tasks=copy", "steps=1", "batch_size=2"]
    for method in ("mola", "lora"):
        assert main(["train", method, f"out={tmp_path / method}", *common]) == 0
    assert "# mola on" in told(tmp_path / "mola" / "adapter")
    assert "moesaic" not in (tmp_path / "lora" / "adapter" / "README.md").read_text().partition(HEADING)[2]


def test_a_composition_says_how_to_load(tmp_path):
    assert main(asked(make(tmp_path), tmp_path / "out", "method=arrow")) == 0
    assert "# arrow on nano" in told(tmp_path / "out" / "adapter")


def test_a_card_in_another_encoding_is_kept(tmp_path):
    mine = "Eigene Größe".encode("latin-1")
    (tmp_path / "README.md").write_bytes(mine)
    tell_loading(tmp_path)
    assert (tmp_path / "README.md").read_bytes().startswith(mine + b"\n\n" + HEADING.encode())
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
