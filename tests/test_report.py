"""The report: escaped, self-contained, readable by machines for people, and drawn where it says."""

import itertools
import math
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import MissingDependency
from moesaic.report import charts, html, labels, sheet
from moesaic.report.page import alone, headline

HOSTILE = '<script>alert("x")</script> & co'
SVG = "{http://www.w3.org/2000/svg}"


def spread(mean, sd=0.01):
    return {"mean": mean, "sd": sd, "values": [mean - 0.01, mean, mean + 0.01]}


def made_up(arms=("lora", "mola", HOSTILE), tasks=("a", HOSTILE), layers=3, experts=(2, 4, 4)):
    """A summary as `comparison.summarise` gives it; the first arm is the baseline, the others are routed."""

    def gap(value):
        return {"mean": value, "interval": (value - 0.02, value + 0.03)}

    def routing():
        return {
            "entropy": 0.5,
            "dead_share": 0.0,
            "mutual_information": None,
            "inner_balance": 2.0,
            "outer_balance": 0.3,
            "layer_information": 0.1,
            "entropy_by_layer": {str(layer): 0.9 - 0.1 * layer for layer in range(layers)},
            "by_layer_and_task": {str(i): {t: [1 / experts[i]] * experts[i] for t in tasks} for i in range(layers)},
        }

    made = []
    for i, name in enumerate(arms):
        difference = gap(0.05 * i) | {"seeds": [0, 1, 2], "sd": 0.01, "values": [0.04 * i, 0.05 * i, 0.06 * i]}
        difference["by_task"] = {task: gap(0.05 * i) for task in tasks}
        made.append(
            {
                "arm": name,
                "method": name,
                "lr": 1e-3,
                "status": "done",
                "seeds": [0, 1, 2],
                "scores": {task: spread(0.5 + 0.05 * i) for task in tasks},
                **spread(0.5 + 0.05 * i),
                "difference": difference if i else None,
                "mean_relative_difference": 10.0 * i if i else None,
                "trainable_parameters": 1000 + i,
                "tokens_per_second": 100.0,
                "overhead": 0.1 * i,
                "train_seconds": 10.0,
                "peak_memory_mib": None,
                "routing": routing() if i else None,
                "curve": [(1.0, 3.0), (50.0, 1.0), (100.0, 0.2)],
            }
        )
    known = {"metric": "accuracy", "n": 10, "majority": None, "dominated": False, "base_score": 0.3}
    return {
        "baseline": arms[0],
        "split": "test",
        "settings": {"model": HOSTILE, "steps": 100},
        "seeds": [0, 1, 2],
        "tasks": {task: known | {"base_matthews": None} for task in tasks},
        "base_mean": 0.3,
        "arms": made,
        "missing": [{"arm": "mola", "seed": 3, "status": "failed", "error": HOSTILE}],
        "verdicts": [{"arm": "mola", "claim": "routing helps", "holds": True, "worse": [], "text": f"mola: {HOSTILE}"}],
        "versions": {"moesaic": "0"},
        "device": "cpu",
    }


def drawings(page, width="wide"):
    """Those of a width, without the other."""
    found = [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return [d for d in found if d.get("class") == width]


def marks(drawing, kind):
    return [group for group in drawing.iter(f"{SVG}g") if group.get("class") == kind]


def texts(drawing):
    return [element.text for element in drawing.iter(f"{SVG}text")]


def corners(group):
    """All points of what is drawn in a group, its marker's place included."""
    found = []
    for path in group.iter(f"{SVG}path"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d"))]
        x, y = map(float, re.findall(r"-?[\d.]+", path.get("transform", "0 0")))
        found += [(a + x, b + y) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    return found


def place(group):
    """Where a marker stands."""
    return tuple(map(float, re.findall(r"-?[\d.]+", group.find(f"{SVG}path").get("transform"))))


class Balanced(HTMLParser):
    """Collects tags, and fails where one closes that is not open."""

    VOID = ("meta", "br", "link", "img", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, name, attributes):
        self.seen.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


def parsed(page):
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser.seen


def test_the_page_is_whole_and_asks_the_network_for_nothing():
    page = html(made_up())
    tags = parsed(page)
    assert not [t for t, _ in tags if t in ("script", "link", "img", "iframe", "object")]
    assert not [a for _, a in tags if {"src", "href", "onclick", "onload"} & a.keys()]
    assert "url(" not in page
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\"' )]+", page)) == {"http://www.w3.org/2000/svg"}


def test_the_headline_says_what_came_out():
    summary = made_up()
    assert headline(summary) == "Routing helps mola: 3 arms on 2 tasks"
    summary["verdicts"][0]["holds"] = False
    assert headline(summary) == "Routing does not help mola: 3 arms on 2 tasks"
    summary["verdicts"] *= 2
    assert headline(summary) == "Routing helps none of 2: 3 arms on 2 tasks"
    summary["verdicts"] = []
    assert headline(summary) == "3 arms on 2 tasks"


def test_names_and_errors_are_escaped():
    page = html(made_up())
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 5


def test_every_figure_is_there_and_says_what_it_shows():
    page = html(made_up())
    for width in sheet.WIDTHS:
        found = drawings(page, width)
        titles = [d.find(f"{SVG}title").text for d in found]
        assert titles == [
            "Difference of the mean score to lora",
            "Difference to lora by task",
            "Mean score against time a token over lora, %",
            "Training loss by step",
            "Router entropy by layer",
            "Experts' share of the weight by layer and task, mola",
            f"Experts' share of the weight by layer and task, {HOSTILE}",
        ]
        for d in found:
            assert d.get("role") == "img"
            assert d.get("aria-label").startswith(d.find(f"{SVG}title").text)
            assert d.find(f"{SVG}desc").text


def many():
    """Names, tasks, layers and experts as many and as long as they come."""
    arms = ("a baseline of a long name " * 4, *(f"an arm of a very long name, seed {i}" for i in range(12)))
    tasks = ("arithmetic", *(f"a task of a very long name, number {i}" for i in range(11)))
    summary = made_up(arms, tasks, layers=3, experts=(4, 16, 64))
    for arm in summary["arms"][2:]:
        arm["routing"]["by_layer_and_task"] = {}
    return summary


@pytest.mark.parametrize("summary", [made_up, many, lambda: outlying()])
@pytest.mark.parametrize("width", sheet.WIDTHS)
def test_what_is_drawn_lies_within_the_drawing_and_is_finite(summary, width):
    for d in drawings(html(summary()), width):
        _, _, wide, high = map(float, d.get("viewBox").split())
        assert wide <= sheet.WIDTHS[width]
        for x, y in corners(d):
            assert -1 <= x <= wide + 1
            assert -1 <= y <= high + 1
        for text in d.iter(f"{SVG}text"):
            x, style = float(text.get("x")), text.get("style")
            assert 0 <= float(text.get("y")) <= high
            anchor = re.search(r"text-anchor: (\w+)", style)
            length = sheet.width(text.text, float(re.search(r"font-size: ([\d.]+)px", style)[1]))
            if "rotate" in text.get("transform", ""):
                length *= math.cos(math.radians(40))
            start = x - length * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor[1] if anchor else "start"]
            assert -1 <= start <= start + length <= wide + 1, text.text


def test_the_narrow_drawing_holds_all_that_the_wide_one_does():
    page = html(many())
    for wide, narrow in zip(drawings(page), drawings(page, "narrow"), strict=True):
        for kind in ("dot", "ring", "whisker", "line"):
            assert len(marks(wide, kind)) == len(marks(narrow, kind))
        said = [[e.text for e in d.iter(f"{SVG}title")] for d in (wide, narrow)]
        assert sorted(said[0]) == sorted(said[1])
        full = {label for label in (*texts(wide), *said[0]) if "arithmetic" in label}
        assert full <= {*texts(narrow), *said[1]}
    names = {sheet.shorten(f"an arm of a very long name, seed {i}", 16) for i in range(12)}
    assert len(names) == 12, "their ends tell them apart"
    for d in drawings(page, "narrow")[:5]:
        assert names <= {*texts(d)}


def test_a_line_break_or_a_control_in_a_name_does_no_harm():
    summary = made_up(arms=("\x07lora" * 20, "two\nlines \x1b[1m", "$x_1$ 模型"))
    assert "two lines  [1m" in texts(drawings(html(summary))[0])
    assert "$x_1$ 模型" in texts(drawings(html(summary))[0])


def test_drawings_on_one_page_share_no_ids_and_are_the_same_every_time():
    page = html(made_up())
    for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert " id=" not in found
        assert "#" not in found
    assert html(made_up()) == page


def test_a_page_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"moesaic\[report\]"):
        html(made_up())


def test_dots_stand_at_their_values():
    """Arm i is 5 i points above the baseline: equal steps from the line at zero."""
    drawing = drawings(html(made_up(arms=("lora", "x", "y", "z"))))[0]
    [line] = marks(drawing, "zero")
    dots = [place(dot)[0] - corners(line)[0][0] for dot in marks(drawing, "dot")]
    assert len(dots) == 3
    assert dots == pytest.approx([dots[0], 2 * dots[0], 3 * dots[0]], abs=0.05)


def outlying():
    """Six arms within a few points of the baseline, and one far below."""
    summary = made_up(arms=("lora", *"abcdef", "far"))
    for arm, value in zip(summary["arms"][1:], (-0.01, 0.0, 0.01, 0.02, -0.02, 0.01, -0.8), strict=True):
        arm["difference"] |= {"mean": value, "interval": (value - 0.01, value + 0.01), "values": [value] * 3}
        arm |= spread(0.9 + value)
    return summary


def test_an_axis_leaves_out_what_is_far_off_and_an_arrow_has_its_number():
    page = html(outlying())
    for width in sheet.WIDTHS:
        differences, scores = (d for d in drawings(page, width) if "score" in d.find(f"{SVG}title").text)
        assert "−80" not in texts(differences)
        assert "−80.0 [−81.0, −79.0]" in texts(differences)
        assert "far 10.0" in texts(scores)
        for d, dots in ((differences, 6), (scores, 7)):
            assert len(marks(d, "dot")) == dots
            assert len(marks(d, "arrow")) == 1
    assert page.count("Arrow: off the scale") == 2
    assert "Arrow: off the scale" not in html(made_up())


def close(values, interval=0.01, sd=0.1):
    """An arm for each value: its difference to the baseline, for every task too, and 0.8 below its score."""
    summary = made_up(arms=("lora", *"abcdefgh"[: len(values)]))
    summary["arms"][0] |= spread(0.8 + values[0], sd)
    for arm, value in zip(summary["arms"][1:], values, strict=True):
        gap = {"mean": value, "interval": (value - interval, value + interval)}
        arm["difference"] |= gap | {"values": [value] * 3, "by_task": dict.fromkeys(summary["tasks"], gap)}
        arm |= spread(0.8 + value, sd)
    return summary


@pytest.mark.parametrize("interval", [0.01, 0.07])
def test_what_lies_far_from_the_others_but_on_the_axis_is_drawn_like_them(interval):
    page = html(close((0.10, 0.101, 0.102, 0.103, 0.02), interval))
    differences, scores = (d for d in drawings(page) if "score" in d.find(f"{SVG}title").text)
    for d, dots in ((differences, 5), (scores, 6)):
        assert len(marks(d, "dot")) == dots
        assert not marks(d, "arrow")
        whiskers = marks(d, "whisker")
        assert len(whiskers) == dots
        bottom = float(d.get("viewBox").split()[3]) - 44
        names = [float(e.get("x")) for e in d.iter(f"{SVG}text") if "text-anchor: end" in e.get("style")]
        for e in whiskers:
            (x1, y1), (x2, y2) = corners(e)
            assert min(names) < x1 <= x2 <= 960 - 24, "the axis reaches its ends"
            assert 26 <= y1 <= y2 <= bottom or 26 <= y2 <= y1 <= bottom
    assert "Arrow: off the scale" not in page
    assert "What lies far out" not in page


def test_arrows_point_to_where_the_value_lies():
    above, below = (drawings(html(close((0.0, 0.001, 0.002, 0.003, far), sd=0.001))) for far in (0.15, -0.15))
    tips = []
    for found in (above, below):
        for d in (d for d in found if "score" in d.find(f"{SVG}title").text):
            [arrow] = marks(d, "arrow")
            x, y = place(arrow)
            middle = [sum(axis) / len(axis) for axis in zip(*corners(arrow), strict=True)]
            tips.append((x, y, x - middle[0], y - middle[1]))
    right, top, left, bottom = tips
    assert right[0] == 960 - 24
    assert right[2] > 3
    assert left[0] < 100
    assert left[2] < -3
    assert top[1] == 28
    assert top[3] < -3
    assert bottom[1] == 420 - 46
    assert bottom[3] > 3
    assert "What lies far out shares the strongest colour." in html(close((0.0, 0.001, 0.002, 0.003, 0.15)))


def test_intervals_are_said_to_redraw_the_rows_that_were_scored():
    page = html(made_up() | {"split": "validation"})
    assert page.count("95 % of 10,000 bootstrap draws of the scored rows, paired by row") == 2
    assert "test rows" not in page


def test_scores_are_drawn_against_parameters_only_where_those_differ():
    summary = made_up()
    summary["arms"][2]["trainable_parameters"] = 2000
    assert "Mean score against trainable parameters" in html(summary)
    summary["arms"][2]["method"] = "oracle"
    assert "Mean score against trainable parameters" not in html(summary)


def test_a_page_says_who_is_worse_and_explains_its_columns():
    summary = made_up()
    summary["verdicts"][0] |= {"holds": False, "worse": ["lora"]}
    tags = parsed(html(summary))
    assert ("li", {"class": "worse"}) in tags
    assert sum(t == "dl" and a.get("class") == "legend" for t, a in tags) == 3


def test_tables_have_headers_for_rows_and_columns():
    tags = parsed(html(made_up()))
    scopes = [a.get("scope") for t, a in tags if t == "th"]
    assert set(scopes) == {"row", "col"}
    assert sum(t == "caption" for t, _ in tags) == sum(t == "table" for t, _ in tags) == 3
    assert ("html", {"lang": "en"}) in tags


def test_the_page_follows_light_and_dark_mode():
    page = html(made_up())
    assert "prefers-color-scheme: dark" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    colours = set(re.findall(r"(?:fill|stroke): ([a-z-]+)", drawn))
    assert colours <= {"var", "color-mix", "none"}, "colours come from the style sheet"


@pytest.mark.parametrize("arms", [("lora",), ("lora", "mola")])
def test_small_comparisons_have_fewer_figures(arms):
    page = html(made_up(arms=arms))
    assert len(drawings(page)) == (1 if arms == ("lora",) else 6)


def test_unfinished_arms_and_missing_figures_are_left_out():
    summary = made_up()
    summary["arms"].append({"arm": "late", "method": "mola", "lr": 1e-3, "status": "pending", "seeds": []})
    summary["arms"][1] |= {"difference": None, "routing": None, "curve": [], "trainable_parameters": None, "sd": None}
    page = html(summary)
    parsed(page)
    assert "late" in page


@pytest.mark.parametrize("width", sheet.WIDTHS)
@pytest.mark.parametrize("count", [14, 40])
def test_many_arms_keep_their_labels_apart(width, count):
    series = [charts.Line(f"arm {i}", [(0.0, 1.0), (5.0, 0.01 * i)], i) for i in range(count)]
    [drawing] = drawings(charts.lines(series, across="x", up="y", title="t", description="d"), width)
    ys = sorted(float(e.get("y")) for e in drawing.iter(f"{SVG}text") if e.text.startswith("arm"))
    assert len(ys) == count
    assert min(b - a for a, b in itertools.pairwise(ys)) >= 14.9


def test_lines_differ_without_their_colours():
    series = [charts.Line(f"arm {i}", [(0.0, 1.0), (5.0, 0.01 * i)], i) for i in range(4)]
    [drawing] = drawings(charts.lines(series, across="x", up="y", title="t", description="d"))
    styles = [line.find(f"{SVG}path").get("style") for line in marks(drawing, "line")]
    assert len({(re.search("stroke-dasharray: [^;]*", style) or [""])[0] for style in styles}) == 4


def fills(drawing):
    """By what is said of a cell: how its colour is mixed, and how much of that is in it."""
    cells = [path for group in marks(drawing, "cells") for path in group if path.find(f"{SVG}title") is not None]
    said = {path.find(f"{SVG}title").text: path.get("style") for path in cells}
    found = {of: re.search(r"var\(--(\w+)\) (\d+)%, var\(--(\w+)\)", style).groups() for of, style in said.items()}
    return {of: (strong, int(share), ground) for of, (strong, share, ground) in found.items()}


@pytest.mark.parametrize("experts", [2, 4, 64])
def test_a_router_that_is_uniform_looks_pale(experts):
    layers = {"0": {"a": [1 / experts] * experts}}
    [drawing] = drawings(charts.shares(layers, title="t", description="d"))
    found = [*fills(drawing).values()]
    assert len(found) == experts
    assert {*found} == {("cell", 100, "paper")}, "nothing of the strong tone"
    assert {"none", "an equal share"} <= {*texts(drawing)}


def test_a_share_is_coloured_by_what_it_is_beside_an_equal_one():
    layers = {"0": {"a": [0.0, 0.125, 0.25, 0.625]}}
    [drawing] = drawings(charts.shares(layers, title="t", description="d"))
    assert [*fills(drawing).values()] == [
        ("cell", 0, "paper"), ("cell", 50, "paper"), ("cell", 100, "paper"), ("above", 100, "cell")
    ]  # fmt: skip
    assert "strongest tone: 62 %" in texts(drawing)
    [of_two] = drawings(charts.shares({"": {"a": [0.5, 0.75]}}, title="t", description="d", equal=0.5, over=""))
    assert [*fills(of_two).values()] == [("cell", 100, "paper"), ("above", 50, "cell")]


def test_arms_side_by_side_have_one_scale_of_shares():
    summary = made_up(arms=("lora", "even", "sharp"), experts=(4, 4, 4))
    for layer in summary["arms"][2]["routing"]["by_layer_and_task"].values():
        layer["a"] = [0.9, 0.1, 0.0, 0.0]
    even, sharp = drawings(html(summary))[-2:]
    assert "strongest tone: 90 %" in texts(even)
    assert "strongest tone: 90 %" in texts(sharp)
    assert {strong for strong, *_ in fills(even).values()} == {"cell"}


@given(st.lists(st.floats(0, 300), min_size=1, max_size=15))
def test_labels_are_moved_apart_in_their_order(positions):
    placed = labels.apart(positions, 15.0, 0.0, 300.0)
    order = sorted(range(len(positions)), key=positions.__getitem__)
    gaps = [placed[b] - placed[a] for a, b in itertools.pairwise(order)]
    assert all(gap >= 15 - 1e-9 for gap in gaps)
    assert min(placed) >= -1e-9
    assert max(placed) <= 300 + 1e-9


def test_labels_beside_points_neither_cover_each_other_nor_leave_the_frame():
    points = [(10.0, 50.0), (60.0, 50.0), (90.0, 52.0), (590.0, 10.0)]
    boxes = []
    for x, y, anchor in labels.beside(points, [80.0] * 4, (0.0, 0.0, 600.0, 100.0), size=12.5):
        start = x - {"left": 0.0, "center": 0.5, "right": 1.0}[anchor] * 80.0
        boxes.append((start, y - 6.5, start + 80.0, y + 6.5))
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= 600 and box[3] <= 100 for box in boxes)
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@given(st.lists(st.integers(-100, 100), min_size=1, max_size=20))
def test_most_values_lie_within_the_fences(values):
    low, high = labels.fences(values)
    inside = [v for v in values if low <= v <= high]
    assert len(inside) >= len(values) / 2
    assert len(values) > 4 or inside == values


@pytest.mark.parametrize("width", sheet.WIDTHS)
@pytest.mark.parametrize(("low", "size"), [(-1e6, 3e6), (0.0, 1e-3), (12.0, 31.0), (-0.7, 1.0)])
def test_ticks_are_few_round_and_within(low, size, width):
    dots = [charts.Point("a", low, low, 0.0, 0), charts.Point("b", low + size, low + size, 0.0, 1)]
    drawing, _ = charts.scatter(dots, across="", up="", title="t", description="d")
    [found] = drawings(drawing, width)
    shown = [text.replace("−", "-").replace(",", "") for text in texts(found) if text and text not in "ab"]
    values = [float(text) for text in shown]
    assert 4 <= len(values) <= 18
    slack = 0.08 * size + 1e-9
    assert all(low - slack <= value <= low + size + slack for value in values)
    assert all(len(text.strip("-").replace(".", "").strip("0")) <= 2 for text in shown)


def test_names_are_escaped_and_no_formulas():
    dots = [charts.Dot("<b>&$x$", 0.1, (0.05, 0.15), [0.05, 0.15], 1)]
    drawing, _ = charts.intervals(dots, zero='"', title='<"', description="&")
    assert "<b>" not in drawing
    [root] = drawings(drawing)
    assert "<b>&$x$" in texts(root)
    assert root.get("aria-label") == '<". &'


def test_a_drawing_alone_is_a_whole_file_with_its_colours():
    dots = [charts.Dot("a<b", 0.1, (0.05, 0.15), [0.05, 0.15], 1)]
    drawing, _ = charts.intervals(dots, zero="base", title="above", description="a")
    root = ElementTree.fromstring(alone(drawing))
    [style] = [child.text for child in root if child.tag.endswith("style")]
    assert all(f"--{name}:" in style for name in ("paper", "ink", "c0", "c7"))
    [wide] = drawings(drawing)
    assert len(list(root.iter())) == len(list(wide.iter())) + 1
    assert root.get("class") is None, "the style sheet would hide it where the picture is small"
