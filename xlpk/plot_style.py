"""How figures look, and their way into SVG and PNG. The only user of matplotlib.

For black and white and for the colour-blind too: lines differ by colour (Okabe & Ito 2008), stroke and marker, areas by
colour and hatch.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STROKES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.7,
    "lines.linewidth": 1.5,
}


def render(name: str, draw: Callable[..., Any], *args: Any) -> str:
    """The SVG element that `draw` makes. Ids get `name` in front, so that several fit one page."""
    from matplotlib import rc_context

    with rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks: the reader's browser has another one
        figure = draw(*args)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")  # Verdana has the same widths
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    # Hundredths of a point are enough; what stands between tags is text.
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d{2})\d+", r"\1", tag[0]), text)


def save(path: Path, draw: Callable[..., Any], *args: Any) -> None:
    """The picture that `draw` makes, as PNG."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        draw(*args).savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})


def new_figure(width: float, height: float) -> Any:
    """An empty figure; inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """How the line of the configuration with this index is drawn."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STROKES[index % len(STROKES)]}


def marked_line(index: int) -> dict[str, Any]:
    """The same, with markers."""
    return {**line_style(index), "marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def legend_below(figure: Any, axis: Any, n: int) -> None:
    """The legend of `axis`, below the axes so that it hides nothing; `n` lines: more than one take two columns."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 60 else 2 if n > 1 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.5)


def plain_tick(value: float, _: int) -> str:
    """A tick of a logarithmic axis: 0.01, not a power in TeX."""
    return f"{value:g}"


def log_if_wide(axis: Any, values: Sequence[Array]) -> None:
    """A logarithmic x axis where the largest of all values is above 20 times the smallest."""
    every = np.concatenate(list(values)) if values else np.zeros(0)
    if len(every) and every.min() > 0 and every.max() > 20 * every.min():
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(plain_tick)
