"""Matplotlib's figures as SVG for a page: text stays text, colours are the style sheet's, and nothing has an id.

Figures are in pixels, from the top left. Colours are stand-ins until a figure is written, when `var(--ink)` and the
like take their places, so that a drawing follows the reader's light or dark mode.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from moesaic.errors import MissingDependency
from moesaic.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTHS = {"wide": 960.0, "narrow": 420.0}
"""A drawing is made once for each; the style sheet shows the one that fits."""

SIZE, SMALL = 12.5, 11.5
"""Of letters: names, and what stands at an axis."""

SERIES = 8
"""Number of series colours in the style sheet."""

_STYLE = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "text.parse_math": False, "lines.scale_dashes": False,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "xtick.major.pad": 7, "ytick.major.pad": 7,
}  # fmt: skip


def drawn(
    draw: Callable[[Sheet], object], title: str, description: str, widths: Mapping[str, float] = WIDTHS
) -> Markup:
    """What `draw` puts on a sheet of each width, by its class, and what a screen reader says of it.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("matplotlib", "report") from None
    made = []
    with warnings.catch_warnings(), style.context(["default", _STYLE]):
        warnings.simplefilter("ignore")  # letters that matplotlib's font lacks: the reader's has them
        for name, width in widths.items():
            sheet = Sheet(Figure(dpi=72), width)
            draw(sheet)
            made.append(sheet.svg(name, title, description))
    return Markup("").join(made)


def printable(text: str) -> str:
    """Without line breaks, and without controls, which XML does not allow."""
    return "".join(c if c.isprintable() else " " for c in text)


def shorten(label: str, longest: int = 28) -> str:
    """A label without its middle where it is long."""
    label = printable(label)
    tail = longest // 3
    return label if len(label) <= longest else f"{label[: longest - tail - 1]}…{label[-tail:]}"


def width(label: str, size: float = SIZE) -> float:
    """Of a label, in pixels; most readers' fonts are a little narrower."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(label, FontProperties(size=size), ismath=False)[0])


def widest(labels: Iterable[str], size: float = SIZE) -> float:
    return max((width(label, size) for label in labels), default=0.0)


def ticks(axis: Axis, form: str, *, room: float = 0.0, whole: bool = False, logarithmic: bool = False) -> None:
    """Few and round, no more than there is room for; 1, 2 and 5 times powers of ten on a logarithmic axis."""
    from matplotlib import ticker

    if logarithmic:
        axis.axes.set_yscale("log")
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    else:
        label = widest(number(float(f"{end:.3g}"), form) for end in axis.get_view_interval())
        most = min(max(2, math.ceil(room / (30 + label))), 10) if room else 6
        axis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole))
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: number(v, form) if abs(v) > 1e-12 else "0"))


def mixed(hue: str, share: float, ground: str) -> str:
    """So much of a colour of the style sheet, and the rest of another."""
    return f"color-mix(in oklab, var(--{hue}) {100 * share:.0f}%, var(--{ground}))"


def tone(share: float, equal: float, strongest: float) -> str:
    """Of a share: from the paper to an equal share's grey, and from there to the strong tone."""
    if share <= equal:
        return mixed("cell", share / equal, "paper")
    return mixed("above", min(1.0, (share - equal) / (strongest - equal)) if strongest > equal else 0.0, "cell")


class Sheet:
    """A figure of a given width, and what is put on it."""

    def __init__(self, figure: Figure, width: float) -> None:
        self.figure, self.narrow = figure, width < 600
        self.width = self.height = width
        self._paints: dict[str, str] = {}
        self._said: list[tuple[str, ...]] = []
        self._cells: list[tuple[list[tuple[float, float]], str, str]] = []

    def resize(self, width: float, height: float) -> None:
        """Before anything is drawn."""
        self.width, self.height = round(width), round(height)
        self.figure.set_size_inches(self.width / 72, self.height / 72)

    def short(self, label: str) -> str:
        return shorten(label, 16 if self.narrow else 28)

    def paint(self, css: str) -> str:
        """The stand-in of a colour of CSS, or of the style sheet's variable of that name."""
        css = css if "(" in css else f"var(--{css})"
        return self._paints.setdefault(css, f"#{len(self._paints) + 1:06x}")

    def mark(self, kind: str, *said: str) -> dict[str, Any]:
        """The argument of an artist that gives it a class, and what is said of each of its parts under the pointer."""
        self._said.append(tuple(map(printable, said)))
        return {"gid": f"{kind}-{len(self._said) - 1}"}

    def axes(self, left: float, top: float, right: float, bottom: float) -> Axes:
        w, h = self.width, self.height
        made = self.figure.add_axes((left / w, 1 - bottom / h, (right - left) / w, (bottom - top) / h))
        made.patch.set_visible(False)
        made.tick_params(length=0, labelsize=SMALL, labelcolor=self.paint("soft"))
        made.grid(color=self.paint("rule"), linewidth=1)
        made.spines["bottom"].set_color(self.paint("soft"))
        return made

    def place(self, axes: Axes, x: float, y: float) -> tuple[float, float]:
        """Where a point of the axes lies on the sheet."""
        across, up = axes.transData.transform((x, y))
        return float(across), self.height - float(up)

    def text(self, x: float, y: float, content: str, *, paint: str = "ink", kind: str = "text", **how: Any) -> None:
        how = {"va": "center_baseline", "size": SIZE, "rotation_mode": "anchor", **self.mark(kind), **how}
        self.figure.text(x, self.height - y, printable(content), color=self.paint(paint), transform=None, **how)

    def centred(self, x: float, y: float, content: str) -> None:
        """The name of an axis or of a place on it, about x or as near as it fits."""
        content = shorten(content, int(self.width // 7))
        half = width(content, SMALL) / 2
        self.text(min(max(x, half), self.width - half), y, content, ha="center", size=SMALL, paint="soft")

    def line(
        self, points: Sequence[tuple[float, float]], paint: str, kind: str = "line", said: str = "", **how: Any
    ) -> None:
        from matplotlib.lines import Line2D

        xs, ys = [x for x, _ in points], [self.height - y for _, y in points]
        how = {"color": self.paint(paint), "solid_capstyle": "round", "transform": None, **self.mark(kind, said), **how}
        self.figure.add_artist(Line2D(xs, ys, **how))

    def dot(
        self, x: float, y: float, paint: str, size: float, said: str = "", kind: str = "dot", marker: str | int = "o"
    ) -> None:
        """A disc or another marker; hollow where it is a ring."""
        how: dict[str, Any] = {"marker": marker, "markersize": size, "markeredgewidth": 0, "linestyle": "none"}
        if kind == "ring":
            how |= {"markerfacecolor": self.paint("paper"), "markeredgewidth": 1.3}
        self.line([(x, y)], paint, kind, said, **how)

    def box(self, x: float, y: float, width: float, height: float, paint: str, said: str = "") -> None:
        """A cell of a table, or a piece of the key where nothing is said of it."""
        x, y = round(x, 1), self.height - round(y, 1)
        corners = [(x, y), (x + width, y), (x + width, y - height), (x, y - height)]
        self._cells.append((corners, self.paint(paint), said))

    def _boxes(self) -> None:
        """One artist for all: thousands take long."""
        from matplotlib.collections import PolyCollection
        from matplotlib.transforms import IdentityTransform

        corners, paints, said = zip(*self._cells, strict=True)
        how = {"linewidths": 0, "transform": IdentityTransform(), **self.mark("cells", *said)}
        self.figure.add_artist(PolyCollection(corners, facecolors=paints, **how))

    def svg(self, name: str, title: str, description: str) -> Markup:
        title, description = printable(title), printable(description)
        if self._cells:
            self._boxes()
        self.figure.patch.set_visible(False)
        written = io.BytesIO()
        self.figure.savefig(written, format="svg")
        tree = ElementTree.fromstring(written.getvalue())
        shapes = {f"#{node.get('id')}": node.attrib for node in tree.iter() if node.tag.endswith("path")}
        root = ElementTree.Element("svg", {
            "xmlns": "http://www.w3.org/2000/svg", **({"class": name} if name else {}), "role": "img",
            "viewBox": f"0 0 {self.width} {self.height}", "width": f"{self.width}", "stroke-linejoin": "round",
            "aria-label": f"{title}. {description}",
        })  # fmt: skip
        for tag, text in (("title", title), ("desc", description)):
            ElementTree.SubElement(root, tag).text = text
        self._css = {hexed: css for css, hexed in self._paints.items()}
        root.extend(part for node in tree for part in self._kept(node, shapes))
        return Markup(ElementTree.tostring(root, encoding="unicode"))

    def _kept(self, node: ElementTree.Element, shapes: Mapping[str, Mapping[str, str]]) -> list[ElementTree.Element]:
        """What is worth keeping of a node: neither definitions nor groups without a mark."""
        tag, given = node.tag.rpartition("}")[2], dict(node.attrib)
        if tag in ("metadata", "defs"):
            return []
        parts = [part for child in node for part in self._kept(child, shapes)]
        if tag == "g":
            kind, _, number = given.get("id", "").partition("-")
            if not number:
                return parts
            group = ElementTree.Element("g", {"class": kind})
            group.extend(parts)
            for part, said in zip(parts, self._said[int(number)], strict=False):
                if said:
                    ElementTree.SubElement(part, "title").text = said
            return [group]
        if tag == "use":
            shape = shapes[given["{http://www.w3.org/1999/xlink}href"]]
            at = f"translate({given['x']} {given['y']})"
            tag, given = "path", {"d": shape["d"], "style": given.get("style", shape.get("style", "")), "transform": at}
        if given.get("transform", "").startswith("rotate(-0 "):
            del given["transform"]
        wanted = {"d", "x", "y", "transform", "style"}
        made = ElementTree.Element(tag, {key: self._tidy(value) for key, value in given.items() if key in wanted})
        made.text = node.text if tag == "text" else None
        return [made]

    def _tidy(self, value: str) -> str:
        """An attribute with short numbers, the reader's font, and colours of the style sheet."""
        value = re.sub(r"font: [^;]*?([\d.]+px)[^;]*", r"font-size: \1", " ".join(value.split()))
        value = "; ".join(sorted(part for part in value.split("; ") if not part.startswith("font-family")))
        value = re.sub(r"\d+\.\d{2,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
        return re.sub(r"#[0-9a-f]{6}", lambda found: self._css[found[0]], value)
