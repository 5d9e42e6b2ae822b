"""Rendering of the HTML pages: one style, the templates' environment and the formats of numbers.

The template engine escapes the text of models and users; only our own charts are inserted unescaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf.system.console import duration


def render(template: str, filters: Mapping[str, Callable[..., Any]], /, **values: Any) -> str:
    """Return the page of a template in html_templates, with `filters` beside those below; a missing value raises."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "html_templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in (number, percent, signed, duration, count, share)}
    environment.filters |= filters
    return environment.get_template(template).render(**values)


def number(value: float | None, digits: int = 2) -> str:
    """Return a rounded number with a true minus sign; a dash for what is not known."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Return a change with its sign; empty for None."""
    if value is None:
        return ""
    text = number(value, digits)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def percent(value: float | None) -> str:
    """Return a share in whole percent, with a no-break space; a dash for None."""
    return "–" if value is None else f"{100 * value:.0f}\u00a0%"


def count(value: float | None) -> str:
    """Return a number of weights as 9.2 k or 4.88 M; a dash for None."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}\u00a0{unit}"
    return f"{value:.0f}"


def share(value: float | None) -> str:
    """Return a share of weights in percent with two significant digits; a dash for None."""
    return "–" if value is None else f"{100 * value:.2g}\u00a0%" if value < 0.995 else "100\u00a0%"
