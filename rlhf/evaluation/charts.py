"""Charts of the pages as inline SVG that takes its font and its colours, in light and dark mode, from the page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from rlhf.evaluation.chart_labels import Box, nearest, place

Series = tuple[Sequence[float], Sequence[float]]  # x and y

# Placeholder -> CSS variable of the page. matplotlib writes hex colours in lower case.
COLOURS = {
    "#010101": "var(--muted)",
    "#020202": "var(--rule)",
    "#0a0001": "var(--sft)",
    "#0a0002": "var(--ppo)",
    "#0a0003": "var(--ptx)",
    "#0a0004": "var(--other)",
    "#0a0005": "var(--card)",
}
MUTED, RULE, SFT, PPO, PTX, OTHER, CARD = COLOURS
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf",
    "font.size": 8.5,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def series_colour(name: str) -> str:
    """Return the placeholder of a stage's or policy's colour, which is the same everywhere on the page."""
    return {"sft": SFT, "ppo": PPO, "ppo-ptx": PTX}.get(name, OTHER)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the centred moving average over up to `window` values on each side, fewer at the ends: without lag."""
    out = []
    for i in range(len(values)):
        reach = min(window, i, len(values) - 1 - i)
        near = values[i - reach : i + reach + 1]
        out.append(sum(near) / len(near))
    return out


def line_chart(series: Mapping[str, Series], x_label: str) -> str:
    """Draw a metric over training, a line per series and no legend; a long series is smoothed over a faint raw line."""
    with rc_context(STYLE):
        figure, axes = _figure()
        for name, (x, y) in series.items():
            colour = series_colour(name)
            long = len(y) > 30
            if long:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
            marker = None if len(y) > 12 else "o"
            line = smooth(y, max(2, len(y) // 16)) if long else y
            axes.plot(x, line, color=colour, linewidth=1.7, marker=marker, markersize=3)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.02, y=0.12)
        return _svg(figure)


def frontier_chart(series: Mapping[str, Series], x_label: str, y_label: str) -> str:
    """Draw y against x as a path in training order, with the last point marked."""
    with rc_context(STYLE):
        figure, axes = _figure()
        for name, (x, y) in series.items():
            colour = series_colour(name)
            axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.45, marker="o", markersize=2.5)
            axes.plot(x[-1:], y[-1:], color=colour, marker="o", markersize=6, linestyle="none")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(0.06)
        return _svg(figure)


def calibration_chart(rows: Sequence[Mapping[str, float]]) -> str:
    """Draw the share of pairs that the reward model ordered right over its confidence; the diagonal is perfect.

    `rows` are bins with `confidence`, `accuracy` and `n`, the number of pairs, which sets the size of the dot.
    """
    with rc_context(STYLE):
        figure, axes = _figure()
        low = min([0.5, *(row["accuracy"] for row in rows)])
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
        most = max(row["n"] for row in rows)
        axes.plot(x, y, color=PTX, linewidth=1.2, alpha=0.5)
        axes.scatter(x, y, s=[14 + 90 * row["n"] / most for row in rows], color=PTX, linewidths=0)
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(low - 0.04, 1.04)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        return _svg(figure)


class LabelledPoint(NamedTuple):
    """A point with a name and the interval of its y."""

    name: str
    x: float
    y: float
    low: float
    high: float


def named_points_chart(points: Sequence[LabelledPoint], start: float, x_label: str, share: bool = False) -> str:
    """Draw named points over a logarithmic x, each with the interval of its y, in percent if y is a `share`.

    A dashed line marks `start`; a point whose interval covers it is hollow.
    """
    with rc_context(STYLE):
        figure, axes = _figure(3.9, 2.7)
        axes.set_xscale("log")
        axes.axhline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        for point in points:
            hollow = point.low <= start <= point.high
            axes.plot([point.x] * 2, [point.low, point.high], color=PTX, linewidth=1.3, alpha=0.6)
            # A hollow marker is filled with the card's colour, or its own bar would run through it.
            fill = CARD if hollow else PTX
            axes.plot(point.x, point.y, "o", color=PTX, markersize=5.5, markerfacecolor=fill, markeredgewidth=1.3)
        axes.set_xlim(min(point.x for point in points) / 3, max(point.x for point in points) * 3)
        axes.margins(y=0.12)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(LogLocator(numticks=7))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _name_points(figure, axes, points, start)
        return _svg(figure)


def _name_points(figure: Figure, axes: Axes, points: Sequence[LabelledPoint], line: float) -> None:
    """Write each name where it covers nothing, the dashed line at y `line` included; join far ones to their points."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the names fit the axes only as they are now
    texts = [axes.annotate(p.name, (p.x, p.y), (0, 0), textcoords="offset points", va="bottom") for p in points]
    boxes = [text.get_window_extent() for text in texts]
    pixels = [axes.transData.transform([(p.x, p.low), (p.x, p.y), (p.x, p.high)]).tolist() for p in points]
    anchors = [(x, y) for _, (x, y), _ in pixels]
    obstacles: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in anchors]
    obstacles += [(low[0] - 1.5, low[1], low[0] + 1.5, high[1]) for low, _, high in pixels]
    left, bottom, right, top = axes.get_window_extent().extents.tolist()
    level = axes.transData.transform((points[0].x, line))[1]
    obstacles.append((left, level - 1.5, right, level + 1.5))
    # A browser's text line is a little higher than matplotlib's, and it uses another font.
    sizes = [(box.width, box.height + 3) for box in boxes]
    placed = place(anchors, sizes, obstacles, (left, bottom, right, top))
    for text, anchor, box in zip(texts, anchors, placed, strict=True):
        text.set_position((box[0] - anchor[0], box[1] + 1.5 - anchor[1]))
        end = nearest(box, anchor)
        if math.dist(end, anchor) > 8:
            (x0, y0), (x1, y1) = axes.transData.inverted().transform([anchor, end]).tolist()
            axes.plot([x0, x1], [y0, y1], color=MUTED, linewidth=0.5, zorder=1, scalex=False, scaley=False)


def _figure(width: float = 4.3, height: float = 2.35) -> tuple[Figure, Axes]:
    # At 72 dots per inch a pixel of the renderer is a point, which is what SVG is written in.
    figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """Return the figure as an <svg> element that takes its size, font and colours from the page."""
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg (.*?) width="[^"]*" height="[^"]*"', r'<svg \1 role="img"', svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    # Ids are unique only within a figure. Those kept are used: they name clip paths and markers by their content.
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg))
    names = {name for pair in used for name in pair}
    svg = re.sub(r' id="([^"]*)"', lambda match: match.group(0) if match.group(1) in names else "", svg)
    svg = re.sub(r"\s+", " ", svg)
    for placeholder, variable in COLOURS.items():
        svg = svg.replace(placeholder, variable)
    return svg
