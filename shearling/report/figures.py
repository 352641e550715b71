"""Figures as inline `<svg>` text: the same input gives the same bytes, and text stays text."""

import hashlib
import html
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

WIDTH_INCHES = 7.6
SMOOTH_ABOVE = 200  # points: from here on the noise of single batches hides the curve
SORT_ABOVE = 256  # entries: more are narrower than a pixel each
COLUMNS = 1024  # of a sorted row, enough for its course and little for the page
THOUSANDS_ABOVE = 10_000  # along x: from here on 20k and 3M
COLOURS = ("#1f5fa8", "#d1622b", "#2e8b57", "#8a4fae", "#b5373f", "#6b6b6b", "#a8841f", "#2a9aa8")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "shearling",
    "text.parse_math": False,  # a label may hold a dollar
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888",
    "axes.grid": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}


def loss_curves(
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    goals: Mapping[str, float] | None = None,
) -> str:
    """One line a label through its (x, y) points; long ones faintly, with their running mean on top.

    `goals` draws a dashed level in the colour of the label's line. Points that aren't finite can't be drawn: they are
    counted in the legend.
    """
    from matplotlib.ticker import EngFormatter

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        lines, labels = [], []
        for i, (label, points) in enumerate(series.items()):
            finite = [(float(x), float(y)) for x, y in points if math.isfinite(float(y))]
            colour = COLOURS[i % len(COLOURS)]
            lines.append(_line(axes, finite, colour))
            lost = len(points) - len(finite)
            labels.append(f"{label} ({lost} points not finite)" if lost else label)
            if goals and label in goals:
                axes.axhline(goals[label], color=colour, linestyle=(0, (4, 3)), linewidth=0.8)
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        if axes.get_xlim()[1] >= THOUSANDS_ABOVE:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(True)
        if lines:
            axes.legend(lines, labels)

    return _svg(draw, height_inches=3.4, name=title or f"{y_label} over {x_label}")


def stacked_shares(series: Mapping[str, Points], *, x_label: str, y_label: str, title: str = "") -> str:
    """Shares that sum to 1 as a stacked area, each holding from its x to the next; all series have the same xs."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    xs = [x for x, _ in next(iter(series.values()))]
    ys = [[y for _, y in points] for points in series.values()]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(ys))]

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        areas = axes.stackplot(xs, ys, colors=colours, step="post", alpha=0.85, linewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label, title=title, ylim=(0, 1), xlim=(min(xs), max(xs)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if xs[-1] >= THOUSANDS_ABOVE:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(areas[::-1], list(series)[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))

    return _svg(draw, height_inches=3.0, name=title or f"{y_label} over {x_label}")


def masks_by_layer(mask: Sequence[Any], *, title: str) -> str:
    """Mask values as a heat map, [layers][entries], [layers][kv_heads][groups] (the last two as one) or [entries].

    Rows of more than SORT_ABOVE entries are sorted, the highest first, so that they show how hard the mask is.
    """
    from matplotlib.ticker import MaxNLocator

    rows = _rows(mask)
    entries = len(rows[0])
    is_sorted = entries > SORT_ABOVE
    shown = [_descending(row) for row in rows] if is_sorted else rows
    by_layer = isinstance(mask[0], Sequence)

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        image = axes.imshow(
            shown,
            cmap="Blues",
            vmin=0.0,
            vmax=1.0,
            aspect="auto",
            interpolation="none",
            extent=(-0.5, entries - 0.5, len(rows) - 0.5, -0.5),
        )
        axes.set(title=title, xlabel="entry, each row sorted from high to low" if is_sorted else "entry")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if by_layer:
            axes.set_ylabel("layer")
        else:
            axes.set_yticks([])
        axes.spines[:].set_visible(True)
        figure.colorbar(image, ax=axes, label="mask", fraction=0.03, pad=0.02, ticks=[0, 0.5, 1])

    return _svg(draw, height_inches=1.3 + min(2.8, 0.14 * len(rows)), name=title)


def kept_by_layer(kept_layers: Sequence[int], source_layers: int, *, title: str = "") -> str:
    """A strip of the source's layers, those that stay filled in."""
    from matplotlib.ticker import MaxNLocator

    kept = set(kept_layers)

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for layer in range(source_layers):
            colour = COLOURS[0] if layer in kept else "#f2f2f2"
            axes.bar(layer, 1, width=0.86, color=colour, edgecolor="#888", linewidth=0.6)
        axes.set(title=title, xlabel="layer of the source", xlim=(-0.7, source_layers - 0.3), ylim=(0, 1), yticks=[])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[:].set_visible(False)

    return _svg(draw, height_inches=1.1 if title else 0.9, name=title or "layers kept")


def _line(axes: "Axes", points: Points, colour: str) -> Any:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(points) > SMOOTH_ABOVE:
        axes.plot(xs, ys, color=colour, linewidth=0.6, alpha=0.25)
        ys = _running_mean(ys, window=max(5, len(points) // 40))
    marker = "o" if len(points) <= 30 else ""
    return axes.plot(xs, ys, color=colour, linewidth=1.4, marker=marker, markersize=3)[0]


def _running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """Each value's mean with its neighbours, over a window that is cut off at both ends."""
    sums = [0.0, *accumulate(values)]
    half = window // 2
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _rows(mask: Sequence[Any]) -> list[list[float]]:
    if not isinstance(mask[0], Sequence):
        return [[float(value) for value in mask]]
    nested = isinstance(mask[0][0], Sequence)
    return [[float(value) for inner in row for value in inner] if nested else list(map(float, row)) for row in mask]


def _descending(row: Sequence[float]) -> list[float]:
    ordered = sorted(row, reverse=True)
    columns = min(COLUMNS, len(ordered))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * columns)] for i in range(columns)]


def _svg(draw: "Callable[[Figure], None]", *, height_inches: float, name: str) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        # matplotlib measures text with its own font and warns of what that lacks; the browser draws with another.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        # No metadata at all: it would hold the time, and addresses that nothing may be fetched from.
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue(), name)


def _inline(document: str, name: str) -> str:
    """The `<svg>` element alone, its ids its own: matplotlib numbers them alike in every figure, styles reach all."""
    svg = document[document.index("<svg") :].strip()
    key = "f" + hashlib.sha256(svg.encode()).hexdigest()[:10]
    svg = re.sub(r'(?<=\sid=")', f"{key}-", svg)
    svg = re.sub(r'(?<=href="#)|(?<=url\(#)', f"{key}-", svg)
    svg = svg.replace('<style type="text/css">*{', f'<style type="text/css">#{key} *{{', 1)
    return svg.replace("<svg ", f'<svg id="{key}" role="img" aria-label="{html.escape(name)}" ', 1)
