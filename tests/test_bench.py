"""The benchmark's own arithmetic, and that every table is there. No test asserts a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

from moesaic import bench
from moesaic.bench import arms, compiled, crossover, generating, measure, peers, quantised, scale, suite
from moesaic.errors import ConfigError
from moesaic.lora import METHODS

TINY = {"d": 16, "layers": 1, "batch": 2, "tokens": 8}
GENERATING = {"d": 16, "layers": 1, "prompt": 4, "new": 2, "tokens": 8}
SIZES = {
    "linear": {"d": 16, "tokens": 8},
    "model": TINY,
    "generating": GENERATING,
    "scale": TINY,
    "crossover": {"d": 16, "tokens": 8},
    "quantised": {"d": 64, "layers": 1, "batch": 1, "tokens": 8, "prompt": 4, "new": 2},
}
SUITES = ("mix", "train", "decode", "prefill")
"""Those that run here together; the others have tests of their own."""


CEILING = measure.ceiling


@pytest.fixture(autouse=True, scope="module")
def no_ceiling() -> Iterator[None]:
    """It takes a second or two whenever something is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "ceiling", lambda dtype: CEILING(dtype, n=16, megabytes=1))
        yield


def test_ratios_are_medians_round_by_round() -> None:
    seconds = {"lora": [1.0, 2.0, 4.0], "slow": [2.0, 3.0, 20.0]}
    rows = measure.table(seconds, "lora")
    assert rows["lora"] == {"ms": 2000.0, "ratio": 1.0, "low": 1.0, "high": 1.0}
    assert rows["slow"]["ms"] == 3000.0
    assert rows["slow"]["ratio"] == 2.0  # of 2, 1.5 and 5; the ratio of medians would be 1.5
    assert (rows["slow"]["low"], rows["slow"]["high"]) == (1.75, 3.5)


def test_overhead_is_a_share_of_the_loops() -> None:
    seconds = {"base": [1.0, 1.0, 2.0], "loop": [5.0, 3.0, 4.0], "arm": [2.0, 2.0, 2.5]}
    assert measure.overhead_share(seconds, base="base", loop="loop") == {"arm": 0.25}


def test_arithmetic_adds_the_last_products_of_further_experts() -> None:
    extra = {suite.MATCHED: [9.0, 9.0], suite.FFNS: [3.0, 3.0]}
    row = suite.arithmetic([20.0, 20.0], extra, 2)  # top-2: a third of the FFNs on top
    assert (row["ms"], row["expected_ms"], row["ffn_ms"], row["ratio"]) == (20000.0, 10000.0, 3000.0, 2.0)


def test_arms_run_in_turn_and_warm_up_is_not_counted() -> None:
    ran: list[str] = []
    steps = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    told: list[tuple[int, int]] = []
    seconds = measure.interleave(steps, 3, progress=lambda i, n: told.append((i, n)))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert told == [(i, 5) for i in range(5)]
    assert all(sorted(ran[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))


def test_steps_run_without_the_mode_that_models_are_made_in() -> None:
    seen: list[int] = []
    with torch.device("cpu"):
        measure.interleave(
            {"a": lambda: seen.append(torch._C._len_torch_function_stack())}, 1, progress=lambda i, n: None
        )
        assert torch._C._len_torch_function_stack() == 1
    assert seen == [0, 0, 0]


def test_kernels_are_operators_that_compute() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    assert measure.kernels(lambda: None) == {"events": 0, "kernels": 0, "syncs": 0}
    views = measure.kernels(lambda: x.t().view(8, 2, 2).unsqueeze(0))
    assert views["events"] >= 3
    assert views["kernels"] == views["syncs"] == 0
    assert measure.kernels(lambda: torch.relu(nn.functional.linear(x, weight)))["kernels"] == 2
    assert measure.kernels(lambda: x.t().contiguous())["kernels"] == 1
    read = measure.kernels(lambda: x.sum().item())
    assert (read["kernels"], read["syncs"]) == (1, 1)


def test_a_grouped_product_is_one_kernel() -> None:
    rows, m = torch.randn(8, 4), torch.randn(3, 4, 8)
    ends = torch.tensor([2, 5, 8], dtype=torch.int32)
    product = measure.kernels(lambda: nn.functional.grouped_mm(rows, m, offs=ends))
    assert (product["kernels"], product["syncs"]) == (1, 0)


def test_backward_kernels_count_too() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    forward = measure.kernels(lambda: torch.tanh(x))["kernels"]
    both = measure.kernels(lambda: torch.tanh(x).sum().backward())["kernels"]
    assert forward == 1
    assert both >= 3


def test_every_method_is_an_arm() -> None:
    names = {*arms.methods("linear"), *arms.methods("block")}
    assert names == {name for name, cls in METHODS.items() if not cls.kind.needs_adapters} - arms.NO_METHOD
    assert "mixlora" in arms.methods("block")
    assert "mixlora" not in arms.methods("linear")


def test_the_matched_lora_has_the_rank_of_a_block_level_method() -> None:
    from peft import get_peft_model

    def ranks(config: Any) -> dict[str, int]:
        model = get_peft_model(arms.llama(16, 1), config)
        return {
            name.rpartition(".")[2]: module.weight.shape[0] if isinstance(module, nn.Linear) else len(module)
            for name, parts in (
                (n, m) for n, m in model.named_modules() if hasattr(m, "lora_A") or hasattr(m, "moe_lora_A")
            )
            for module in (getattr(parts, "lora_A", None) or parts.moe_lora_A).values()
        }

    assert ranks(suite.matched_lora()) == ranks(arms.mixture("mixlora", arms.LINEARS))


@pytest.fixture(scope="module")
def result() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (suite, generating):
            patch.setattr(module, "COUNTED", TINY)
        threads = torch.get_num_threads()
        only = ["mola", "moelora", "mixlora"]
        found = suite.run(rounds=2, sizes=SIZES, only=only, memory=False, suites=SUITES)
        torch.set_num_threads(threads)
    return json.loads(json.dumps(found))


def test_every_table_has_the_arms_it_should(result: Any) -> None:
    linear = {"lora", "mola", "moelora", arms.LOOP}
    assert result["linear"].keys() == linear | {"frozen linear"}
    assert result["model_step"].keys() == linear | {"mixlora", arms.FROZEN, *peers.TRAINED}
    assert result["linear_overhead_share_of_loop"].keys() == {"lora", "mola", "moelora"}
    shares = {"lora", "mola", "moelora", "mixlora", *peers.TRAINED}
    assert result["model_overhead_share_of_loop"].keys() == shares
    assert result["model_overhead_share_of_xlora"].keys() == shares - {peers.XLORA} | {arms.LOOP}
    assert result["kernels"].keys() == linear | {"mixlora", *peers.TRAINED}
    assert result["arithmetic"].keys() == {"mixlora"}
    assert result["peak_memory_mib"] == {}
    assert result["kernels"]["lora"]["events_ratio"] == result["kernels"]["lora"]["kernels_ratio"] == 1.0
    assert result["kernels"][arms.LOOP]["kernels"] > result["kernels"]["mola"]["kernels"]
    generated = linear | {"mixlora", arms.FROZEN, *peers.GENERATES}
    assert result["decode"].keys() == {"1", "8", "32"}
    for rows in (*result["decode"].values(), result["prefill"], result["decode_kernels"]):
        assert rows.keys() == generated
    assert result["decode_kernels"]["lora"]["kernels_ratio"] == result["decode"]["8"]["lora"]["ratio"] == 1.0
    assert result["decode"]["8"][arms.FROZEN]["to_base"] == 1.0


def test_tables_have_a_row_for_each_arm_and_the_same_columns(result: Any) -> None:
    made = bench.tables(result)
    assert [len(rows) for _, rows in made] == [5, 10, 1, 11, 11]
    assert all(row.keys() == rows[0].keys() for _, rows in made for row in rows)
    for key in (
        "kernels",
        "arithmetic",
        "model_overhead_share_of_loop",
        "generating",
    ):  # of later files
        del result[key]
    assert [len(rows) for _, rows in bench.tables(result)] == [5, 10]


def test_scale_follows_experts_adapters_length_and_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in (("LENGTHS", (4, 8)), ("DEPTHS", (1, 2)), ("WIDTHS", (16, 32))):
        monkeypatch.setattr(scale, name, values)
    told: list[str] = []

    def progress(what: str) -> Any:
        told.append(what)
        return lambda index, total: None

    found = scale.run(2, TINY, progress, experts=(2, 8), adapters=(2, 8))
    assert found["experts"].keys() == {"lora, rank k*r", "2", "8"}
    assert found["experts"]["8"]["ratio"] == found["adapters, decoding"]["8"]["ratio"] == 1.0
    assert found["length"].keys() == {"4 tokens", "8 tokens"}
    assert found["depth"].keys() == {"1 layers", "2 layers"}
    assert found["adapters, prefill"]["8"]["megabytes"] == 4 * found["adapters, prefill"]["2"]["megabytes"]
    assert found["width"].keys() == {"d=16", "d=32"}
    assert len(told) == 9
    titles = [title for title, _ in bench.tables({"scale": found})]
    assert titles == [f"How cost grows: {what}" for what in found]


def test_suites_run_alone() -> None:
    threads = torch.get_num_threads()
    found = suite.run(suites=["prefill"], rounds=2, sizes=SIZES, only=["mola"])
    torch.set_num_threads(threads)
    assert found.keys() == {"settings", "machine", "ceiling", "rank_space_up_to", "generating", "prefill"}
    assert found["ceiling"]["gflops"] > 0
    [(title, rows)] = bench.tables(found)
    assert "8 tokens" in title
    assert len(rows) == 9


def test_compiled_decoding_is_timed_apart_from_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that compiles nothing; one graph a step, of each arm its own."""
    traced: list[int] = []

    def nothing(graph: Any, inputs: Any) -> Any:
        traced.append(len(inputs))
        return graph

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, fullgraph, mode: compile(run, backend=nothing, fullgraph=True))
    threads = torch.get_num_threads()
    found = suite.run(suites=["compiled"], rounds=2, sizes=SIZES, only=["mola", "sequence"])
    torch.set_num_threads(threads)
    assert found["compiled"].keys() == {arms.FROZEN, "lora", "mola", arms.LOOP}
    assert len(traced) == len(found["compiled"]) + 1  # the first is to warm up
    assert found["compiled"]["lora"]["compiling_ratio"] == 1.0
    assert found["compiled"]["mola"]["compiling"] > 0
    [(title, rows)] = bench.tables(found)
    assert "compiled" in title
    assert len(rows) == 4


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(compiled, "get_cpp_compiler", fails)
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"install g\+\+"):
        suite.run(rounds=2, progress=told.append)
    assert not told  # nothing was measured in vain


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_crossover_is_where_pairs_alone_become_the_faster_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(ratios: list[float]) -> Any:
        left = iter(ratios)
        row = {"ms": 1.0, "ratio": 0.5, "low": 0.5}
        monkeypatch.setattr(measure, "table", lambda *args: {"rank": row, "grouped": {**row, "high": next(left)}})
        return crossover.run(2, SIZES["crossover"], lambda what: lambda index, total: None)

    monkeypatch.setattr(crossover, "EXPERTS", (4, 8, 16))
    assert run([1.5, 1.0, 0.9])["limit"] == 64
    assert run([1.5, 0.9, 1.2])["limit"] == 32
    assert run([0.9, 0.9, 0.9])["limit"] == 0
    found = run([1.5, 1.2, 1.1])
    assert found["limit"] == 128
    [(title, rows)] = bench.tables({"crossover": {**found, **SIZES["crossover"]}})
    assert "up to E*r = 128" in title
    assert [row["E*r"] for row in rows] == ["32", "64", "128"]


@pytest.mark.usefixtures("one_thread")
def test_both_ways_of_the_crossover_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    plain = crossover.mix
    monkeypatch.setattr(crossover, "mix", lambda *args, **how: found.append(plain(*args, **how)) or found[-1])
    for way in ("rank", "grouped"):
        crossover._step(8, {"d": 16, "tokens": 8}, way)()
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.usefixtures("one_thread")
def test_quantised_bases_train_and_decode_beside_lora() -> None:
    found = suite.run(suites=["quantised"], rounds=2, sizes=SIZES, only=["mola"])["quantised"]
    bases = [quantised.PLAIN, *quantised.installed()]
    assert "bitsandbytes, 4 bits" in bases
    for kind in ("training", "decoding"):
        assert list(found[kind]) == bases
        assert all(arms.keys() == {"lora", "mola"} for arms in found[kind].values())
        assert found[kind][quantised.PLAIN]["mola"]["to_plain"] == found[kind][bases[1]]["lora"]["ratio"] == 1.0
    assert [len(rows) for _, rows in bench.tables({"quantised": found})] == [2 * len(bases)] * 2


def test_a_machine_without_quantisers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes torchao"):
        suite.run(suites=["quantised"], rounds=2)


@pytest.mark.usefixtures("one_thread")
def test_a_shape_is_every_models(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    made = arms.llama

    def llama(d: int, layers: int) -> Any:
        model = made(d, layers)
        monkeypatch.setattr(type(model), "to", lambda self, dtype: (seen.append((d, layers, dtype)), self)[1])
        return model

    monkeypatch.setattr(arms, "llama", llama)
    shape = {"d": 32, "layers": 2, "dtype": "bfloat16", "dropout": 0.1}
    suite.run(suites=["prefill"], rounds=2, sizes=SIZES, shape=shape, only=["mola"])
    assert seen == [(32, 2, torch.bfloat16)]


@pytest.mark.usefixtures("one_thread")
def test_half_precision_and_dropout_train(result: Any) -> None:
    shape = {"dtype": "bfloat16", "dropout": 0.1}
    found = suite.run(suites=["mix", "train"], rounds=2, sizes=SIZES, shape=shape, only=["mola"], memory=False)
    assert found["settings"]["dropout"] == found["model"]["dropout"] == 0.1
    assert found["model_step"].keys() == {
        arms.FROZEN,
        "lora",
        "mola",
        arms.LOOP,
    }  # those that drop nothing are left out
    assert [len(rows) for _, rows in bench.tables(found)] == [4, 4]
    configs = arms.arms(arms.LINEARS, ["mola"], arms.Mixtures.of(found["model"]))
    assert {config.lora_dropout for config in configs.values()} == {0.1}


@pytest.mark.usefixtures("one_thread")
def test_mixtures_are_of_the_size_that_is_asked_for() -> None:
    shape = {"experts": 3, "r": 2, "top_k": 1, "layers": 1}
    found = suite.run(suites=["prefill"], rounds=2, sizes=SIZES, shape=shape, only=["mola"])
    assert found["settings"] == {**shape, "rounds": 2, "dtype": "float32", "methods": ["mola"]}
    assert "beside a LoRA of rank 6," in bench.header(found)
    ways = generating.configs(["mola"], shape)
    mola = ways["mola"]
    assert (ways["lora"].r, mola.num_experts, mola.r, mola.top_k) == (6, 3, 2, 1)
    model: Any = ways[peers.EINSUM](arms.llama(16, 1))
    assert {tuple(m.lora_A.shape) for m in model.modules() if isinstance(m, peers.Einsum)} == {(3, 2, 16), (3, 2, 64)}
    model = ways[peers.SUM](arms.llama(16, 1))
    assert list(model.peft_config) == ["expert0", "expert1", "expert2"]
    assert ways[peers.ACTIVE](arms.llama(16, 1)).peft_config["default"].r == 2


def test_figures_of_other_suites_stay_in_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "made" / "bench.json"
    monkeypatch.setattr(measure, "keep_freed_memory", lambda: None)

    def run(*, rounds: int, shape: Any, device: str, suites: Any, keep: Any, **settings: Any) -> Any:
        found = suite.described(rounds, shape, device)
        for name in suites:
            if name == "scale":
                raise KeyboardInterrupt
            found[name] = 1
            keep(found)
        return found

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(bench, "tables", lambda result: [])
    bench.main(["suites=mix", f"out={file}"])
    with pytest.raises(KeyboardInterrupt):
        bench.main(["suites=train,scale", f"out={file}"])
    assert {"mix", "train"} < json.loads(file.read_text()).keys()
    kept = file.read_text()
    for other in ("dtype=bfloat16", "rounds=4", "d=64"):
        with pytest.raises(ConfigError, match=r"bench.json holds figures of other settings .*name another file"):
            bench.main(["suites=scale", f"out={file}", other])
    with pytest.raises(ConfigError, match=r"other settings \(methods not given, now \['mola'\]\)"):
        bench.main(["suites=mix", "methods=mola", f"out={file}"])
    assert file.read_text() == kept


def test_a_run_goes_on_with_the_suites_that_its_file_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, left = tmp_path / "bench.json", list(suite.SUITES)
    monkeypatch.setattr(measure, "keep_freed_memory", lambda: None)
    asked: list[list[str]] = []

    def run(*, rounds: int, shape: Any, device: str, suites: Any, keep: Any, **settings: Any) -> Any:
        asked.append(list(suites))
        found = suite.described(rounds, shape, device)
        for name in suites[:2]:
            found[suite.KEYS[name]] = {}
            keep(found)
        file.write_text(json.dumps({**json.loads(file.read_text()), "of another process": 1}))
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(bench, "tables", lambda result: [("Table of " + key, [{"arm": "x"}]) for key in result][2:])
    for start in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            bench.main([f"out={file}"])
        told = capsys.readouterr()
        assert asked[-1] == left[start:]
        assert "goes on with the other suites" in told.err
        assert told.out.count("│ x") == 2
        assert told.out.count("beside a LoRA of rank 64") == 1
    assert "has mix, train already" in " ".join(told.err.split())
    assert "of another process" in json.loads(file.read_text())


def test_a_crossover_is_kept_for_this_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moesaic.lora import crossover as own

    monkeypatch.setattr(own, "file", lambda: tmp_path / "made" / "crossover.json")
    monkeypatch.setattr(measure, "keep_freed_memory", lambda: None)
    size = {"d": 1024}
    monkeypatch.setattr(suite, "run", lambda **settings: {"crossover": {"limit": 96, "table": {}, **size}})
    monkeypatch.setattr(bench, "tables", lambda result: [])
    bench.main(["suites=crossover", "dtype=bfloat16"])
    told = " ".join(capsys.readouterr().err.split())
    assert "crossover.json: on cpu" in told
    assert "up to E*r = 96" in told
    bench.main(["suites=crossover", "rounds=4"])  # too few
    size["d"] = 64  # which says nothing of models
    bench.main(["suites=crossover", "dtype=float32"])
    assert own.read("cpu") == {"bfloat16": 96}
    assert "the crossover is not kept" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[1]", '{"cpu": 3}', "\x00"], ids=lambda text: text[:8])
def test_a_crossover_file_that_cannot_be_read_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    from moesaic.lora import crossover as own

    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    (tmp_path / "crossover.json").write_text(text)
    assert own.read("cpu") == {}
    own.keep("cpu", "float32", 96)
    assert own.read("cpu") == {"float32": 96}
    assert [file.name for file in tmp_path.iterdir()] == ["crossover.json"]


def test_a_folder_where_crossovers_are_kept_is_told_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    (tmp_path / "crossover.json").mkdir()
    with pytest.raises(ConfigError, match=r"crossover.json, where crossovers are kept, is a folder; remove it"):
        bench.main(["suites=crossover"])


def test_a_crossover_that_could_not_be_kept_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", "/dev/null/cache")
    monkeypatch.setattr(suite, "run", lambda **settings: pytest.fail("measured in vain"))
    with pytest.raises(ConfigError, match=r"crossover.json, where crossovers are kept .* cannot be written"):
        bench.main(["suites=crossover"])


def test_steps_of_decoding_leave_the_prompt_in_the_cache() -> None:
    seen: list[int] = []

    class Model(nn.Module):
        def forward(self, input_ids: Any, past_key_values: Any) -> None:
            seen.append(past_key_values.get_seq_length())
            states = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
            past_key_values.update(states, states, 0)

    step = generating.decoding(Model(), GENERATING, rows=3)
    step()
    step()
    assert seen == [0, 4, 5, 4, 5]


def test_arms_share_the_weights_of_their_base() -> None:
    base = arms.llama(16, 1)
    kept = {p.data_ptr() for p in base.parameters()}
    for config in generating.configs(["mola"]).values():
        own = {p.data_ptr() for n, p in generating.adapted(base, config).named_parameters() if "lora" not in n}
        assert own == kept
    assert all(type(module).__name__ != "MixtureLinear" for module in base.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rounds=1"], "rounds=1 must be at least 2"),
        (["suites=decoding"], "suites: there is no suite 'decoding'; did you mean 'decode'"),
        (["d=40"], "d=40 must be a multiple of 16"),
        (["layers=0"], "layers=0 must be at least 1"),
        (["dropout=1"], "dropout=1.0 must be at least 0 and below 1"),
        (["dtype=bf16"], "dtype: there is no 'bf16'; did you mean 'bfloat16'"),
        (["device=meta"], "device: there is no 'meta'; known: cpu, cuda"),
        (["device=cpu:x"], "device=cpu:x cannot be used: "),
        (["methods=[mol]"], "methods: no method 'mol' to measure; did you mean 'mola'"),
        (["methods=mol"], "methods: no method 'mol' to measure"),
        (["out=/dev/null/x.json"], "out=/dev/null/x.json cannot be written: Not a directory"),
        (["out=tests"], "out=tests is a folder"),
        (["out=tests/../results/demo.json"], "holds something else than figures"),
        (["methods=[]"], r"methods=\[\] names nothing"),
        (["suites=[]"], r"suites=\[\] names nothing"),
        (["methods=lora"], "methods: LoRA is always measured"),
        (["top_k=9"], "top_k=9 must be at most experts=8"),
        (["experts=1"], "top_k=2 must be at most experts=1"),
        (["tokens=0"], "tokens=0 must be at least 1"),
        (["r=-1"], "r=-1 must be at least 1"),
        (["dtype=float16"], "dtype=float16 has no fast products on a CPU"),
        (["round=3"], "round"),
    ],
)
def test_impossible_settings_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        bench.main(settings)
    assert "\n" not in str(error.value)


def test_methods_are_named_with_or_without_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(*, only: list[str], **settings: Any) -> Any:
        asked.append(only)
        raise ConfigError("enough")

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(measure, "keep_freed_memory", lambda: None)
    for text in ("mola", "mola,rmoe", "[mola]"):
        with pytest.raises(ConfigError, match="enough"):
            bench.main([f"methods={text}"])
    assert asked == [["mola"], ["mola", "rmoe"], ["mola"]]


def test_einsum_is_what_the_folded_mixture_gives() -> None:
    """The peer is no straw man: with the same weights it answers as `mola` does."""
    torch.manual_seed(0)
    base = arms.llama(16, 1)
    model: Any = generating.adapted(base, arms.mixture("mola", arms.LINEARS))
    other = generating.adapted(base, peers.einsum)
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "MixtureLinear"]
    written = [module for module in other.modules() if isinstance(module, peers.Einsum)]
    assert len(layers) == len(written) == len(arms.LINEARS)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        for layer, own in zip(layers, written, strict=True):
            B = layer.moe_lora_B["default"].normal_()
            own.lora_router.weight.copy_(layer.router("default").linear.weight)
            own.lora_A.copy_(layer.moe_lora_A["default"].view_as(own.lora_A))
            own.lora_B.copy_(
                model.peft_config["default"].scaling * B.unflatten(0, own.lora_A.shape[:2]).transpose(1, 2)
            )
        torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
