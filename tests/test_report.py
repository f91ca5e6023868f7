"""The report: escaped, self-contained, readable by machines for people, and drawn where it says."""

import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.report import charts, html, svg
from moesaic.report.page import alone

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


def drawings(page):
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


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


def test_names_and_errors_are_escaped():
    page = html(made_up())
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 5


def test_every_figure_is_there_and_says_what_it_shows():
    found = drawings(html(made_up()))
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


def test_what_is_drawn_lies_within_the_drawing_and_is_finite():
    for d in drawings(html(made_up())):
        _, _, width, height = map(float, d.get("viewBox").split())
        for element in d.iter():
            for key, limit in (
                ("x", width),
                ("x1", width),
                ("x2", width),
                ("cx", width),
                ("y", height),
                ("cy", height),
            ):
                if key in element.attrib:
                    assert 0 <= float(element.get(key)) <= limit, ElementTree.tostring(element)
            for numbers in re.findall(r"-?[\d.]+", element.get("d", "")):
                assert 0 <= float(numbers) <= max(width, height)


def test_dots_stand_at_their_values():
    """Arm i is 5 i points above the baseline: equal steps from the line at zero."""
    drawing = drawings(html(made_up(arms=("lora", "x", "y", "z"))))[0]
    zero = next(float(e.get("x1")) for e in drawing.iter(f"{SVG}line") if e.get("class") == "zero")
    dots = [float(e.get("cx")) - zero for e in drawing.iter(f"{SVG}circle") if e.get("class") == "dot"]
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
    differences, scores = (d for d in drawings(page) if "score" in d.find(f"{SVG}title").text)
    marks = [e.text for e in differences.iter(f"{SVG}text") if e.get("class") == "tick"]
    assert "−80" not in marks
    texts = [e.text for d in (differences, scores) for e in d.iter(f"{SVG}text")]
    assert "−80.0 [−81.0, −79.0]" in texts
    assert "far 10.0" in texts
    for d, dots in ((differences, 6), (scores, 7)):
        assert sum(e.get("class") == "dot" for e in d.iter(f"{SVG}circle")) == dots
        assert [e.get("class") for e in d.iter(f"{SVG}path")] == ["dot"], "one arrow"
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
        assert sum(e.get("class") == "dot" for e in d.iter(f"{SVG}circle")) == dots
        assert not list(d.iter(f"{SVG}path"))
        whiskers = [e for e in d.iter(f"{SVG}line") if e.get("class") == "whisker"]
        assert len(whiskers) == dots
        grid = [e for e in d.iter(f"{SVG}line") if e.get("class") in ("grid", "zero")]
        bottom = max(float(e.get("y2")) for e in grid)
        names = [float(e.get("x")) for e in d.iter(f"{SVG}text") if e.get("text-anchor") == "end"]
        for e in whiskers:
            assert min(names) < float(e.get("x1")) <= float(e.get("x2")) <= 1100 - 24, "the axis reaches its ends"
            assert 16 <= float(e.get("y1")) <= float(e.get("y2")) <= bottom
    assert "Arrow: off the scale" not in page
    assert "What lies far out" not in page


def test_arrows_point_to_where_the_value_lies():
    above, below = (drawings(html(close((0.0, 0.001, 0.002, 0.003, far), sd=0.001))) for far in (0.15, -0.15))
    tips = []
    for found in (above, below):
        for d in (d for d in found if "score" in d.find(f"{SVG}title").text):
            (path,) = d.iter(f"{SVG}path")
            tips.append(tuple(map(float, re.findall(r"[\d.]+", path.get("d"))[:2])))
    (right, _), (_, top), (left, _), (_, bottom) = tips
    assert (right, top, bottom) == (1100 - 24, 16, 380)
    assert left < 100
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
    assert not re.search(r'(fill|stroke)="#', page), "colours come from the style sheet"


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


def test_many_arms_keep_their_labels_apart():
    arms = ("lora", *[f"arm {i}" for i in range(14)])
    drawing = drawings(html(made_up(arms=arms)))[3]
    ys = sorted(float(e.get("y")) for e in drawing.iter(f"{SVG}text") if (e.text or "").startswith(("arm", "lora")))
    assert len(ys) == 15
    assert min(b - a for a, b in itertools.pairwise(ys)) >= 14.9


@given(st.lists(st.floats(0, 300), min_size=1, max_size=15))
def test_labels_are_moved_apart_in_their_order(positions):
    placed = svg.apart(positions, 15.0, 0.0, 300.0)
    order = sorted(range(len(positions)), key=positions.__getitem__)
    gaps = [placed[b] - placed[a] for a, b in itertools.pairwise(order)]
    assert all(gap >= 15 - 1e-9 for gap in gaps)
    assert min(placed) >= -1e-9
    assert max(placed) <= 300 + 1e-9


def test_labels_beside_points_neither_cover_each_other_nor_leave_the_frame():
    points = [(10.0, 50.0), (60.0, 50.0), (90.0, 52.0), (590.0, 10.0)]
    labels = ["a long label"] * 4
    boxes = []
    for x, y, anchor in svg.beside(points, labels, (0.0, 0.0, 600.0, 100.0), size=12.5):
        start = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * svg.label_width(labels)
        boxes.append((start, y - 10, start + svg.label_width(labels), y + 3))
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= 600 and box[3] <= 100 for box in boxes)
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@given(st.lists(st.integers(-100, 100), min_size=1, max_size=20))
def test_most_values_lie_within_the_fences(values):
    low, high = svg.fences(values)
    inside = [v for v in values if low <= v <= high]
    assert len(inside) >= len(values) / 2
    assert len(values) > 4 or inside == values


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_within(low, width):
    found = svg.ticks(low, low + width)
    assert len(found) <= 8
    slack = 1e-6 * max(1.0, abs(low), width)
    assert all(low - slack <= t <= low + width + slack for t in found)


def test_attributes_and_text_are_escaped():
    assert str(svg.tag("a", "<b>", class_='"')) == '<a class="&#34;">&lt;b&gt;</a>'
    assert str(svg.tag("g", svg.tag("b"), x=1.50, y=None)) == '<g x="1.5"><b></b></g>'


def test_a_drawing_alone_is_a_whole_file_with_its_colours():
    dots = [charts.Dot("a<b", 0.1, (0.05, 0.15), [0.05, 0.15], 1)]
    drawing, _ = charts.intervals(dots, zero="base", title="above", description="a")
    root = ElementTree.fromstring(alone(drawing))
    [style] = [child.text for child in root if child.tag.endswith("style")]
    assert all(f"--{name}:" in style for name in ("paper", "ink", "c0", "c7"))
    assert len(list(root.iter())) == len(list(ElementTree.fromstring(drawing).iter())) + 1
