"""Data streams: generators with drift at known places, files, rows of any source, and names for them."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError, DataError, MissingDependency, UnknownSetting
from moesaic.trees.streams import Chunk, Drift, Stream, file_stream, named, open_stream, rows_stream, synthetic
from moesaic.trees.streams.synthetic import SYNTHETIC, SyntheticStream

LED = ["1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011"]
DATA = Path(os.environ.get("MOESAIC_DATA") or Path(__file__).parents[2] / "shared" / "data") / "streams"


def whole(chunks: Iterator[Chunk]) -> Chunk:
    found = list(chunks)
    width = found[-1].x.shape[1]
    wide = [np.pad(c.x, ((0, 0), (0, width - c.x.shape[1])), constant_values=np.nan) for c in found]
    return Chunk(np.concatenate(wide), np.concatenate([c.y for c in found]))


def same(one: Chunk, other: Chunk) -> bool:
    return np.array_equal(one.x, other.x, equal_nan=True) and np.array_equal(one.y, other.y)


def until(stream: Stream, kind: type[Exception] = DataError) -> tuple[list[int], str]:
    """Labels that come before an error, and the error."""
    seen: list[int] = []
    try:
        for chunk in stream.chunks():
            seen.extend(chunk.y.tolist())
    except kind as error:
        return seen, str(error)
    raise AssertionError("nothing was raised")


# Generators


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_generators_rows_are_the_same_whatever_the_chunks_and_the_start(name: str) -> None:
    stream = synthetic(name, 900, seed=3)
    rows = whole(stream.chunks(1000))
    assert rows.x.shape == (900, len(stream.features)), name
    assert np.isfinite(rows.x).all()
    assert set(rows.y) <= set(range(len(stream.classes)))
    assert same(rows, whole(stream.chunks(64)))
    assert same(rows, whole(synthetic(name, 900, seed=3).chunks(1)))
    later = whole(stream.chunks(70, start=333))
    assert same(Chunk(rows.x[333:], rows.y[333:]), later)
    assert same(Chunk(rows.x[:250], rows.y[:250]), whole(stream.head(250).chunks(100)))
    assert not list(stream.chunks(start=900))
    assert not same(rows, whole(synthetic(name, 900, seed=4).chunks()))


def test_two_readings_of_a_stream_do_not_disturb_each_other() -> None:
    for name in SYNTHETIC:
        stream = synthetic(name, 120)
        pairs = list(zip(stream.chunks(10), stream.chunks(10), strict=True))
        assert all(same(one, other) for one, other in pairs), name


def test_the_best_classifier_of_led_is_right_in_74_of_100_rows() -> None:
    table = np.array([[int(bit) for bit in digit] for digit in LED])
    x, y = whole(synthetic("led_a", 80_000).head(20_000).chunks())
    assert x.shape == (20_000, 24)
    where = [int(np.argmax((x == table[y, segment][:, None]).mean(axis=0))) for segment in range(7)]
    assert len(set(where)) == 7, "one of them is at another place: one attribute drifts"
    assert sum(place >= 7 for place in where) == 1
    guess = np.abs(x[:, where][:, None] - table[None]).sum(axis=2).argmin(axis=1)
    assert (guess == y).mean() == pytest.approx(0.740, abs=3 * (0.74 * 0.26 / 20_000) ** 0.5)
    assert ((x[:, where] != table[y]).mean(axis=0)) == pytest.approx([0.1] * 7, abs=0.01)


def test_each_concept_of_led_moves_more_attributes() -> None:
    table = np.array([[int(bit) for bit in digit] for digit in LED])
    x, y = whole(synthetic("led_a", 8_000, noise=0).chunks())
    for quarter, moved in enumerate((1, 3, 5, 7)):
        rows = slice(quarter * 2_000, (quarter + 1) * 2_000)
        still = sum(bool((x[rows, segment] == table[y[rows], segment]).all()) for segment in range(7))
        assert still == 7 - moved


def test_sea_has_the_functions_in_order_and_noise_on_a_tenth_of_the_rows() -> None:
    thresholds = np.repeat([8, 9, 9.5, 8], 1_000)
    x, y = whole(synthetic("sea_a", 4_000, noise=0).chunks())
    assert np.array_equal(y, x[:, 0] + x[:, 1] > thresholds)
    x, y = whole(synthetic("sea_a", 4_000).chunks())
    assert (y != (x[:, 0] + x[:, 1] > thresholds)).mean() == pytest.approx(0.1, abs=0.02)
    x, y = whole(synthetic("sea_recurring", 4_000, period=1_000, noise=0).chunks(300))
    assert np.array_equal(y, x[:, 0] + x[:, 1] > np.repeat([7, 9.5, 7, 9.5], 1_000))


def test_no_segment_repeats_another_unless_seeds_are_replayed() -> None:
    replayed = whole(synthetic("sea_a", 4_000, replay_seeds=True).chunks())
    assert same(Chunk(replayed.x[:1000], replayed.y[:1000]), Chunk(replayed.x[3000:], replayed.y[3000:]))
    own = whole(synthetic("sea_a", 4_000).chunks())
    assert len(np.unique(own.x[:, 0])) == 4_000
    back = whole(synthetic("sea_recurring", 4_000, period=500).chunks())
    assert len(np.unique(back.x[:, 0])) == 4_000


def test_drifts_stand_where_the_paper_has_them() -> None:
    assert synthetic("led_a", 1_000_000).drifts == (Drift(250_000), Drift(500_000), Drift(750_000))
    gradual = (Drift(225_000, 50_000), Drift(475_000, 50_000), Drift(725_000, 50_000))
    assert synthetic("sea_g", 1_000_000).drifts == gradual
    assert synthetic("sea_g", 1_000_000).head(500_000).drifts == gradual[:2]
    assert synthetic("rbf_f").drifts == ()
    assert [d.position for d in synthetic("stagger_recurring", 100, period=30).drifts] == [30, 60, 90]


def test_stagger_and_agrawal_change_their_functions() -> None:
    x, y = whole(synthetic("stagger", 400).chunks())
    size, colour, shape = x.T
    rules = [(size == 0) & (colour == 0), (colour == 2) | (shape == 0), size > 0, (size == 0) & (colour == 0)]
    for quarter, rule in enumerate(rules):
        rows = slice(quarter * 100, quarter * 100 + 100)
        assert np.array_equal(y[rows], rule[rows])
    loans = synthetic("agrawal", 4_000, noise=0)
    x, y = whole(loans.chunks())
    age = x[:, loans.features.index("age")]
    told = (age < 40) | (age >= 60)
    assert np.array_equal(y[:1000], told[:1000])
    assert all((y != told)[start : start + 1000].mean() > 0.1 for start in (1000, 2000, 3000))


def test_the_clouds_move_and_have_five_classes() -> None:
    still, fast = (whole(synthetic(name, 3_000).chunks()) for name in ("rbf_m", "rbf_f"))
    assert set(still.y) == set(range(5))
    assert set(whole(synthetic("rbf_m", 500, classes=2).chunks()).y) == {0, 1}
    assert np.allclose(still.x[0], fast.x[0], atol=0.01), "the same clouds, before they have moved"
    assert np.abs(still.x[-100:] - fast.x[-100:]).mean() > 0.05


def blend(length: int, drifts: list[Drift], alive: list[int] | None = None) -> SyntheticStream:
    """Concepts whose rows are their own number and a count."""

    def concept(number: int) -> Callable[[int], Iterator[tuple[dict[int, Any], Any]]]:
        def rows(seed: int) -> Iterator[tuple[dict[int, Any], Any]]:
            kept = [number] if alive is None else alive
            kept.append(number)
            try:
                for count in range(length):
                    yield {0: count}, number
            finally:
                kept.remove(number)

        return rows

    concepts = [concept(number) for number in range(len(drifts) + 1)]
    return SyntheticStream("blend", length, ["x0"], len(concepts), concepts, drifts, [0] * len(concepts), 5)


def test_a_gradual_change_follows_the_sigmoid_and_an_abrupt_one_is_a_switch() -> None:
    y = whole(blend(20_000, [Drift(10_000, 4_000)]).chunks()).y
    at = np.arange(20_000).reshape(20, -1)
    chance = 1 / (1 + np.exp(-4 * (at - 10_000) / 4_000))
    error = 4 * np.sqrt((chance * (1 - chance)).sum(axis=1)) / 1000 + 1e-3
    assert (np.abs(y.reshape(20, -1).mean(axis=1) - chance.mean(axis=1)) < error).all()
    assert whole(blend(9, [Drift(3), Drift(5)]).chunks(2)).y.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_a_concept_goes_on_from_its_own_last_row() -> None:
    x, y = whole(blend(3_000, [Drift(1_000, 400), Drift(2_000, 400)]).chunks(77))
    for concept in range(3):
        assert np.array_equal(x[y == concept, 0], np.arange((y == concept).sum()))


def test_concepts_that_are_over_are_let_go() -> None:
    alive: list[int] = []
    stream = blend(50_000, [Drift(place) for place in range(100, 50_000, 100)], alive)
    most = max(len(alive) for _ in stream.chunks(100))
    assert most <= 2


def test_what_a_generator_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sea_a'"):
        synthetic("seaa")
    with pytest.raises(UnknownSetting, match="did you mean 'noise'"):
        synthetic("sea_a", noisy=0.1)
    settings: dict[str, Any]
    for settings in ({"noise": 0.6}, {"noise": "loud"}, {"replay_seeds": 1}, {"length": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            synthetic("sea_a", **settings)
    for name, settings in (("sea_recurring", {"period": 0}), ("rbf_m", {"classes": 1}), ("hyperplane", {"speed": 2.0})):
        with pytest.raises(ConfigError):
            synthetic(name, **settings)
    with pytest.raises(ConfigError, match="size must be 1 or more"):
        synthetic("sea_a").chunks(0)
    with pytest.raises(ConfigError, match="ask for 1 or more"):
        synthetic("sea_a").head(0)


# Files


def written(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    data = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


CSV = "size,hot,town,label\n1.5,true,Rome,7\n?,FALSE,,b\nNA,nan,Oslo,NA\n-2e3,true, Rome ,7.0\n"


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_csv_file_is_numbers_truth_texts_and_gaps(tmp_path: Path, name: str) -> None:
    stream = file_stream(written(tmp_path, name, CSV))
    for size in (1, 3, 100):
        x, y = whole(stream.chunks(size))
        want = [[1.5, 1, 0], [np.nan, 0, np.nan], [np.nan, np.nan, 1], [-2000, 1, 0]]
        np.testing.assert_array_equal(x, want)
        assert y.tolist() == [0, 1, -1, 0]
    assert (stream.name, stream.features, stream.classes) == ("a", ["size", "hot", "town"], [7, "b"])
    later = file_stream(tmp_path / name).chunks(start=2)
    np.testing.assert_array_equal(whole(later).x, want[2:])
    towns = file_stream(written(tmp_path, name, CSV.replace("b\n", "8\n")), target="town", name="towns")
    assert whole(towns.chunks()).y.tolist() == [0, -1, 1, 0]
    assert (towns.name, towns.features, towns.classes) == ("towns", ["size", "hot", "label"], ["Rome", "Oslo"])


def test_a_csv_file_may_lack_names_or_have_other_delimiters(tmp_path: Path) -> None:
    bare = file_stream(written(tmp_path, "bare.csv", "1,2,0\n3,,1\n"))
    assert bare.features == ["x0", "x1"]
    np.testing.assert_array_equal(whole(bare.chunks()).x, [[1, 2], [3, np.nan]])
    assert file_stream(written(tmp_path, "t.csv", "a\tb\tc\n1\t2\t0\n")).features == ["a", "b"]
    counted = file_stream(written(tmp_path, "pandas.csv", "\ufeff0,1,label\r\n4,5,x\r\n\r\n6,7,y\r\n"))
    assert whole(counted.chunks()).x.tolist() == [[4, 5], [6, 7]]
    with pytest.raises(DataError, match=r"iris.csv:1: a row, or the names of columns\?"):
        file_stream(written(tmp_path, "iris.csv", "5.1,3.5,setosa\n4.9,3.0,setosa\n"))


ARFF = r"""% a comment
@RELATION 'a test'
@attribute 'the size' Real
@attribute colour {red, 'dark blue', "it's"}  % of it
@attribute note string
@attribute n integer
@attribute class{no,yes}

@DATA
1.5, red, hi, 3, yes
% another
?,'dark blue',"hi",4,no
2,'it\'s','a, b',?,?
"""


@pytest.mark.parametrize("name", ["a.arff", "a.arff.gz"])
def test_an_arff_file_has_the_values_that_it_declares(tmp_path: Path, name: str) -> None:
    stream = file_stream(written(tmp_path, name, ARFF))
    assert (stream.features, stream.classes) == (["the size", "colour", "note", "n"], ["no", "yes"])
    x, y = whole(stream.chunks(2))
    np.testing.assert_array_equal(x, [[1.5, 0, 0, 3], [np.nan, 1, 0, 4], [2, 2, 1, np.nan]])
    assert y.tolist() == [1, 0, -1]
    assert file_stream(tmp_path / name, target="colour").classes == ["red", "dark blue", "it's"]
    numbers = file_stream(tmp_path / name, target="n")
    assert whole(numbers.chunks()).y.tolist() == [0, 1, -1]
    assert numbers.classes == [3, 4]


BAD = [
    ("n.csv", "a,b,c\n1,2,x\n1,2\n1,2,y\n", 3, "it has 2 fields, where there are 3 columns"),
    ("n.csv", "a,b,c\n1,2,x\n1,two,z\n3,4,y\n", 3, "'b' is 'two', which is no number"),
    ("n.csv", "a,b,c\n1,2,x\n1,1_000,z\n3,4,y\n", 3, "'b' is '1_000', which is no number"),
    ("n.csv", "a,b,c\n1,2,x\n1,-inf,x\n3,4,y\n", 3, "'b' is -inf, which is not finite"),
    ("n.csv", "a,b,c\n1,true,x\n1,maybe,x\n3,false,y\n", 3, "neither true nor false"),
    ("n.csv", 'a,b,c\n1,2,x\n1,"2"3,x\n3,4,y\n', 3, "a quote that does not end"),
    (
        "n.arff",
        "@attribute a real\n@attribute c {x,y}\n@data\n1,x\none,x\n2,y\n",
        5,
        "'a' is 'one', which is no number",
    ),
    ("n.arff", "@attribute a {p}\n@attribute c {x,y}\n@data\np,x\nq,x\np,y\n", 5, "not among its declared values"),
    (
        "n.arff",
        "@attribute a real\n@attribute c {x,y}\n@data\n1,x\n1,z\n2,y\n",
        5,
        "the label is 'z', which is not among",
    ),
    ("n.arff", "@attribute a real\n@attribute c real\n@data\n1,0\n1,z\n2,1\n", 5, "'c' is 'z', which is no number"),
    ("n.arff", "@attribute a string\n@attribute c {x,y}\n@data\n'p',x\n'p,x\n'p',y\n", 5, "a quote that does not end"),
]


@pytest.mark.parametrize(("name", "text", "line", "why"), BAD)
def test_a_bad_row_ends_the_reading_or_is_counted(tmp_path: Path, name: str, text: str, line: int, why: str) -> None:
    file = written(tmp_path, name, text)
    seen, said = until(file_stream(file))
    assert seen == [0], "the row before it has been given"
    assert said.startswith(f"{file}:{line}: ")
    assert why in said
    stream = file_stream(file, on_bad_rows="skip")
    for _ in range(2):
        assert whole(stream.chunks()).y.tolist() == [0, 1]
        assert stream.skipped.count == stream.head(9).skipped.count == 1
        assert stream.skipped.reasons[0].startswith(f"{file}:{line}: ")


def test_reasons_are_kept_of_the_first_few_rows_only(tmp_path: Path) -> None:
    stream = file_stream(written(tmp_path, "a.csv", "a,b\n1,x\n" + "bad,x\n" * 500), on_bad_rows="skip")
    assert len(whole(stream.chunks()).y) == 1
    assert (stream.skipped.count, len(stream.skipped.reasons)) == (500, 5)
    none = file_stream(written(tmp_path, "b.csv", "a,b\n" + "1\n" * 3), on_bad_rows="skip")
    assert "holds no rows that can be used; of 3 the first: " in until(none)[1]


def test_what_comes_before_damage_is_given(tmp_path: Path) -> None:
    rows = [f"{random.Random(i).random()},{i % 2}\n" for i in range(5_000)]
    packed = gzip.compress(("a,b\n" + "".join(rows)).encode())
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(packed[: len(packed) // 2])
    seen, said = until(file_stream(cut))
    assert said.startswith(f"{cut} is cut off behind line {len(seen) + 1}")
    assert 1_000 < len(seen) < 4_000
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 255
    cut.write_bytes(flipped)
    assert "is damaged behind line" in until(file_stream(cut, on_bad_rows="skip"))[1]
    latin = written(tmp_path, "latin.csv", b"a,b\n1,x\n2,y\n" + "3,é\n".encode("latin-1") + b"4,x\n")
    seen, said = until(file_stream(latin, on_bad_rows="skip"))
    assert seen == [0, 1]
    assert said.startswith(f"{latin}:4: not UTF-8 text")


DATES = "@attribute when date 'yyyy'\n@attribute c {x}\n@data\n"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("e.csv", "", "is empty"),
        ("e.arff", "", "is empty"),
        ("e.csv.gz", "\n\n", "is empty"),
        ("e.csv", "a,a,b\n1,2,3\n", "two columns are called 'a'"),
        ("e.csv", ",a,b\n0,1,2\n", "column 1 has no name"),
        ("e.csv", "a\n1\n", "has one column"),
        ("e.csv", "a,b\n", "holds no rows"),
        ("e.csv", "when,b\n2024-01-31,x\n", "column 'when' holds dates (2024-01-31)"),
        ("e.csv", "when,b\n31/01/2024 10:00,x\n", "column 'when' holds dates"),
        ("e.csv", "a;b;c\n1,5;2;x\n", "column 'a' holds numbers with commas (1,5)"),
        ("e.csv", b"\xff\xfea\x00", "not UTF-8 text"),
        ("e.arff", DATES, "column 'when' holds dates"),
        ("e.arff", "@attribute a real\n@attribute a {x}\n@data\n1,x\n", "two columns are called 'a'"),
        ("e.arff", "@attribute a real\n@attribute c {x,x}\n@data\n1,x\n", "declares a value twice"),
        ("e.arff", "@attribute a real\n@attribute c {x}\n@data\n{0 1, 1 x}\n", "sparse rows are not read"),
        ("e.arff", "@attribute a real\n@attribute c {x}\n", "has no @data"),
        ("e.arff", "@data\n1,2\n", "declares no @attribute"),
        ("e.arff", "@attribute a relational\n@data\n", "of type 'relational'"),
        ("e.arff", "@attribute\n@data\n", "a name and a type are to follow"),
        ("e.arff", "a,b\n1,2\n", "neither @attribute nor @data"),
        ("e.parquet", "no", "is no Parquet file, or damaged"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, text: str | bytes, why: str) -> None:
    file = written(tmp_path, name, text)
    with pytest.raises(DataError) as error:
        list(file_stream(file).chunks())
    assert why in str(error.value)
    assert str(file) in str(error.value)


def test_a_file_that_is_not_there_or_is_asked_for_something_else_says_so(tmp_path: Path) -> None:
    file = written(tmp_path, "a.csv", CSV)
    with pytest.raises(
        ConfigError, match=r"a.csv has no column 'lable'; did you mean 'label'\? source.target= names one of size, hot"
    ):
        file_stream(file, target="lable")
    with pytest.raises(ConfigError, match="choose one of stop, skip"):
        file_stream(file, on_bad_rows="error")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="there is no file"):
        file_stream(tmp_path / "b.csv")
    with pytest.raises(DataError, match="is a folder"):
        file_stream(tmp_path)
    with pytest.raises(ConfigError, match=r"ends in \.csv"):
        file_stream(written(tmp_path, "a.xlsx", CSV))
    file.rename(tmp_path / "plain.csv.gz")
    with pytest.raises(DataError, match="Not a gzipped file"):
        file_stream(tmp_path / "plain.csv.gz")


def test_texts_that_never_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.trees.streams.columns.MAX_CODES", 3)
    monkeypatch.setattr("moesaic.trees.streams.columns.MAX_CLASSES", 3)
    ids = file_stream(written(tmp_path, "a.csv", "id,b\n" + "".join(f"u{i},x\n" for i in range(9))))
    assert until(ids)[0] == [0, 0, 0]
    assert "a.csv:5: column 'id' has over 3 different texts" in until(ids)[1]
    prices = file_stream(written(tmp_path, "b.csv", "a,b\n" + "".join(f"1,{i}.5\n" for i in range(9))))
    seen, said = until(prices)
    assert seen == [0, 1, 2]
    assert "over 3 different labels" in said


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    peaks = []
    for rows in (2_000, 20_000):
        file = written(tmp_path, f"{rows}.csv", "a,b,c\n" + "1.25,2.5,x\n" * rows)
        tracemalloc.start()
        assert sum(len(chunk.y) for chunk in file_stream(file).chunks(500)) == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


LABELS = st.one_of(st.integers(-50, 50), st.sampled_from(["up", "down", "a, b", 'a "quoted" one', "é"]), st.none())
NUMBERS = st.one_of(st.floats(allow_infinity=False), st.integers(-(10**9), 10**9).map(float))


@given(rows=st.lists(st.tuples(NUMBERS, st.sampled_from(["", "p", "q r", "line\nend"]), LABELS), min_size=1))
def test_rows_written_as_csv_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    import csv

    file = tmp_path_factory.getbasetemp() / "round.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("a", "b", "label"), *rows])
    stream = file_stream(file)
    x, y = whole(stream.chunks(3))
    np.testing.assert_array_equal(x[:, 0], [row[0] for row in rows])
    assert [stream.classes[place] if place >= 0 else None for place in y] == [row[2] for row in rows]
    codes = dict.fromkeys(row[1] for row in rows if row[1])
    np.testing.assert_array_equal(x[:, 1], [list(codes).index(row[1]) if row[1] else np.nan for row in rows])


def parquet(file: Path, columns: dict[str, Any], **how: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), file, **how)
    return file


def test_a_parquet_file_is_read_batch_by_batch(tmp_path: Path) -> None:
    rows = 5_000
    columns = {
        "a": [None if i % 7 == 0 else i / 2 for i in range(rows)],
        "flag": [i % 2 == 0 for i in range(rows)],
        "n": list(range(rows)),
        "town": [["Rome", "Oslo", None][i % 3] for i in range(rows)],
        "label": [["up", "down", None][i % 3] for i in range(rows)],
    }
    stream = file_stream(parquet(tmp_path / "a.parquet", columns, row_group_size=700))
    assert (stream.length, stream.features) == (rows, ["a", "flag", "n", "town"])
    x, y = whole(stream.chunks(300))
    np.testing.assert_array_equal(x[:, 0], [np.nan if i % 7 == 0 else i / 2 for i in range(rows)])
    np.testing.assert_array_equal(x[:, 1], [float(i % 2 == 0) for i in range(rows)])
    np.testing.assert_array_equal(x[:, 3], [[0, 1, np.nan][i % 3] for i in range(rows)])
    assert y.tolist() == [[0, 1, -1][i % 3] for i in range(rows)]
    assert {len(chunk.y) for chunk in stream.chunks(300, start=50)} == {300, 150}
    assert file_stream(tmp_path / "a.parquet", target="flag").head(3).length == 3


def test_a_parquet_file_of_other_things_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="column 'day' holds dates"):
        file_stream(parquet(tmp_path / "d.parquet", {"day": [date(2024, 1, 1)], "label": [0]}))
    with pytest.raises(DataError, match="column 'many' is of type list"):
        file_stream(parquet(tmp_path / "l.parquet", {"many": [[1, 2]], "label": [0]}))
    infinite = parquet(tmp_path / "i.parquet", {"a": [1.0, np.inf, 3.0], "label": [0, 1, 2]})
    seen, said = until(file_stream(infinite))
    assert seen == [0]
    assert f"{infinite}:2: 'a' is inf, which is not finite" in said
    skipping = file_stream(infinite, on_bad_rows="skip")
    assert skipping.length is None
    assert whole(skipping.chunks()).x.tolist() == [[1], [3]]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match="this needs pyarrow"):
        file_stream(infinite)


WORDS = ["", "?", "NA", "N/A", "n/a", "NULL", "null", "None", "nan", "NaN", "<NA>"]


@pytest.mark.parametrize("kind", ["csv", "arff", "declared", "texts", "nulls", "rows"])
def test_what_is_missing_is_so_in_every_column_and_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    pd = pytest.importorskip("pandas")
    names, first = ["size", "town", "label"], [1.5, "Rome", "none"]
    texts = [[word] * 3 for word in WORDS]
    lines = [",".join(map(str, row)) for row in [first, *texts]]
    if kind == "csv":
        stream = file_stream(written(tmp_path, "a.csv", "\n".join([",".join(names), *lines])))
    elif kind in ("arff", "declared"):
        types = ["real", "string", "string"] if kind == "arff" else ["real", "{Rome,Oslo}", "{none,mild}"]
        head = [f"@attribute {name} {what}" for name, what in zip(names, types, strict=True)]
        stream = file_stream(written(tmp_path, "a.arff", "\n".join([*head, "@data", *lines])))
    elif kind in ("texts", "nulls"):
        rest: list[Any] = WORDS if kind == "texts" else [None] * len(WORDS)
        sizes = [1.5, *[None] * len(WORDS)]
        columns = {"size": sizes, "town": ["Rome", *rest], "label": ["none", *rest]}
        stream = file_stream(parquet(tmp_path / "a.parquet", columns))
    else:
        gaps = [*WORDS, None, float("nan"), np.float32("nan"), pd.NA, pd.NaT]
        stream = rows_stream([({"size": a, "town": b}, c) for a, b, c in [first, *[[gap] * 3 for gap in gaps]]])
    x, y = whole(stream.chunks())
    assert x[0].tolist() == [1.5, 0]
    assert np.isnan(x[1:]).all()
    assert y.tolist() == [0] + [-1] * (len(y) - 1)
    assert stream.classes[0] == "none"


def test_a_missing_value_that_an_arff_file_declares_is_one(tmp_path: Path) -> None:
    text = "@attribute a {None,NULL}\n@attribute c {mild,None}\n@data\nNULL,None\n?,?\nNone,mild\n"
    x, y = whole(file_stream(written(tmp_path, "a.arff", text)).chunks())
    np.testing.assert_array_equal(x[:, 0], [1, np.nan, 0])
    assert y.tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("name", "rows", "features", "ones"),
    [
        ("electricity_6attr.arff.gz", 45_312, 6, 19_237),
        ("sea_stream.csv.gz", 40_000, 3, 23_065),
        ("weather.csv.gz", 18_159, 8, 5_698),
    ],
)
def test_real_files_are_read_whole(name: str, rows: int, features: int, ones: int) -> None:
    if not (DATA / name).is_file():
        pytest.skip("the real streams are not here: set MOESAIC_DATA")
    stream = open_stream(DATA / name)
    x, y = whole(stream.chunks())
    assert x.shape == (rows, features)
    assert np.isfinite(x).all()
    assert sorted(stream.classes) == [0, 1]
    assert (y == stream.classes.index(1)).sum() == ones


# Rows of any source


def test_rows_are_dictionaries_whose_features_come_and_go() -> None:
    source = [({"a": 1, "b": True}, "x"), ({"b": np.float32(0.5)}, None), ({"a": "2", "c": "red"}, "y")]
    source += [({"c": "blue", "a": None, "b": "?"}, "x"), ({}, float("nan"))]
    stream = rows_stream(source)
    found = list(stream.chunks(2))
    assert [chunk.x.shape for chunk in found] == [(2, 2), (2, 3), (1, 3)]
    np.testing.assert_array_equal(found[0].x, [[1, 1], [np.nan, 0.5]])
    np.testing.assert_array_equal(found[1].x, [[2, np.nan, 0], [np.nan, np.nan, 1]])
    assert np.isnan(found[2].x).all()
    assert whole(iter(found)).y.tolist() == [0, -1, 1, 0, -1]
    assert (stream.features, stream.classes, stream.length) == (["a", "b", "c"], ["x", "y"], 5)
    wide = whole(stream.chunks())
    assert same(wide, whole(iter(found))), "read again: as wide as is known by now, the same otherwise"
    assert same(Chunk(wide.x[3:], wide.y[3:]), whole(stream.chunks(start=3)))


def test_the_label_may_be_in_the_row() -> None:
    stream = rows_stream(lambda: iter([{"a": 1, "ok": "yes"}, {"a": 2}, {"ok": "no"}]), target="ok", name="queue")
    for _ in range(2):
        x, y = whole(stream.chunks())
        np.testing.assert_array_equal(x, [[1], [2], [np.nan]])
        assert y.tolist() == [0, -1, 1]
    assert (stream.features, stream.classes, stream.length, stream.name) == (["a"], ["yes", "no"], None, "queue")


def test_an_iterator_is_read_once_and_no_further_than_asked() -> None:
    asked: list[int] = []

    def endless() -> Iterator[tuple[dict[str, int], int]]:
        while True:
            asked.append(1)
            yield {"a": len(asked)}, 0

    stream = rows_stream(endless())
    assert len(whole(stream.head(25).chunks(10)).y) == len(asked) == 25
    with pytest.raises(DataError, match="can be read only once: give a function"):
        next(stream.chunks())


def test_rows_before_an_error_of_the_source_are_given() -> None:
    def broken() -> Iterator[tuple[dict[str, int], int]]:
        yield {"a": 1}, 0
        yield {"a": 2}, 1
        raise ConnectionError("the queue is gone")

    assert until(rows_stream(broken), ConnectionError) == ([0, 1], "the queue is gone")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (({"a": "red"}, 0), "'a' is 'red', which is no number"),
        (({"a": [1]}, 0), "neither a number nor a text"),
        (({"a": float("inf")}, 0), "not finite"),
        (({"a": 10**400}, 0), "not finite"),
        (({"b": date(2024, 1, 1)}, 0), "column 'b' holds dates"),
        (({"a": 1}, [0]), "the label is"),
        (({"a": 1},), "not a pair"),
        (({1, 2}, 0), "set where a dictionary"),
    ],
)
def test_a_row_that_is_none_is_named(row: Any, why: str) -> None:
    seen, said = until(rows_stream([({"a": 1.0}, 0), row]))
    assert seen == [0]
    assert said.startswith("rows, row 2: ")
    assert why in said


def test_a_source_must_give_rows() -> None:
    with pytest.raises(ConfigError, match="a stream's source is int"):
        rows_stream(3)  # type: ignore[arg-type]


# Names


def test_a_name_opens_a_generator_a_file_or_a_real_stream(tmp_path: Path) -> None:
    assert open_stream("sea_a").length == 100_000
    assert same(whole(open_stream("sea_a", 50, seed=2).chunks()), whole(synthetic("sea_a", 50, seed=2).chunks()))
    file = written(tmp_path, "a.csv", CSV)
    assert open_stream(str(file), target="town").classes == []
    assert len(whole(open_stream(file, length=2).chunks()).y) == 2
    for name, rows, features in (("phishing", 1_250, 9), ("bananas", 5_300, 2), ("image_segments", 2_310, 18)):
        stream = open_stream(name)
        assert whole(stream.chunks()).x.shape == (rows, features)
        assert (stream.name, stream.length) == (name, rows)
    assert open_stream("phishing", length=10).length == 10


def test_an_unknown_name_or_setting_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown stream 'electrcity': did you mean 'electricity'"):
        open_stream("electrcity")
    with pytest.raises(UnknownSetting, match="did you mean 'target'"):
        open_stream(written(tmp_path, "a.csv", CSV), tagret="town")
    with pytest.raises(UnknownSetting, match="phishing has no setting 'noise'"):
        open_stream("phishing", noise=1)
    with pytest.raises(DataError, match=r"there is no file .*none.csv"):
        open_stream("none.csv")


def test_capymoas_data_sets_are_fetched_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, "electricity.arff", ARFF)
    asked: list[Any] = []

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[-2:])
        return subprocess.CompletedProcess(command, len(asked) - 1, f"noise\n{file if len(asked) == 1 else 'no net'}\n")

    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(named, "find_spec", lambda package: object())
    monkeypatch.setattr(named.subprocess, "run", run)
    stream = open_stream("electricity", length=2)
    assert (stream.name, len(whole(stream.chunks()).y)) == ("electricity", 2)
    with pytest.raises(DataError, match="CapyMOA cannot fetch Covtype: no net"):
        open_stream("covtype")
    folder = str(tmp_path / "cache" / "streams")
    assert asked == [["Electricity", folder], ["Covtype", folder]]


def test_rivers_data_sets_are_fetched_where_they_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from river import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no net")

    monkeypatch.setattr(datasets.Elec2, "is_downloaded", False)
    monkeypatch.setattr(datasets.Elec2, "download", offline)
    with pytest.raises(DataError, match="river cannot fetch elec2: no net"):
        open_stream("elec2")


def test_every_name_is_one_of_its_package() -> None:
    from river import datasets

    for kind, arguments in named.RIVER.values():
        getattr(datasets, kind)(*arguments)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("river", "river.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(named, "find_spec", lambda package: None)
    for name, extra in (("sea_a", "trees"), ("phishing", "trees"), ("covtype", "capymoa")):
        with pytest.raises(MissingDependency, match=rf"moesaic\[{extra}\]"):
            open_stream(name)


def test_importing_streams_imports_none_of_the_packages_that_it_may_need() -> None:
    code = "import sys, moesaic.trees.streams; print([m for m in ('pandas', 'river', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_columns_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("time,a,note,y\n2024-01-01,1,x,no\n2024-01-02,2,,yes\n")
    stream = file_stream(tmp_path / "a.csv", drop=["time", "note"])
    (chunk,) = stream.chunks()
    assert stream.features == ["a"]
    assert chunk.x.tolist() == [[1.0], [2.0]]
    assert stream.classes == ["no", "yes"]
    with pytest.raises(DataError, match=r"holds dates .*leave it out: source.drop=time"):
        list(file_stream(tmp_path / "a.csv").chunks())
    with pytest.raises(ConfigError, match="no column 'tme' to drop: did you mean 'time'"):
        file_stream(tmp_path / "a.csv", drop="tme")
    with pytest.raises(ConfigError, match="y is the target"):
        file_stream(tmp_path / "a.csv", drop="y")
    (tmp_path / "a.arff").write_text(
        "@relation r\n@attribute d date\n@attribute a numeric\n@attribute y {n,p}\n@data\n1-1-2024,3,p\n"
    )
    (chunk,) = file_stream(tmp_path / "a.arff", drop="d").chunks()
    assert (chunk.x.tolist(), chunk.y.tolist()) == ([[3.0]], [1])
