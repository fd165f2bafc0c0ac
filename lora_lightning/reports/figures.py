"""Figures for print as PNG and SVG in one style; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_lightning.lora.errors import MissingPackageError
from lora_lightning.lora.formats.atomic_dir import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D3A9B", "#8C6D31", "#555555", "#F0E442")
"""Okabe and Ito's colors, which color-blind people can tell apart, and some more."""
PAGE, COLUMN = 6.8, 4.4
"""Widths in inches: of a page's text, and of a figure with one panel."""
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "lora_lightning",
}
DPI = 200
ENDINGS = ("png", "svg")


class Drawing(NamedTuple):
    """A figure with its title and its caption."""

    title: str
    caption: str
    figure: Figure


def refuse_missing() -> None:
    """Raise a MissingPackageError where matplotlib is not installed."""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "plots need matplotlib: pip install 'lora_lightning[plots]', or do without them: --plots false"
        ) from error


@contextmanager
def plot_style() -> Iterator[None]:
    """Within the block figures have one style; the user's settings of matplotlib are restored."""
    import matplotlib.style

    with matplotlib.style.context(STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*constrained_layout not applied.*")  # a figure without room
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def image_bytes(canvas: Figure) -> dict[str, bytes]:
    """PNG and SVG by file ending; equal figures have equal bytes."""
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # the layout is computed, once for both
    files = {}
    for ending, options in (
        ("png", {"dpi": DPI, "metadata": {"Software": None}}),
        ("svg", {"metadata": {"Date": None}}),
    ):
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=ending, facecolor="white", **options)  # type: ignore[arg-type]
        files[ending] = buffer.getvalue()
    return files


def write_figures(folder: Path, drawings: Mapping[str, Drawing], earlier: Any = ()) -> dict[str, bytes]:
    """Write each figure as `NAME.png` and `NAME.svg`; returns the SVG by name.

    Args:
        drawings: by file name without its ending.
        earlier: names of an earlier call's files, from some JSON file: they are removed.
    """
    for name in earlier if isinstance(earlier, list) else []:
        if isinstance(name, str) and name == Path(name).name and name.endswith(ENDINGS):
            (folder / name).unlink(missing_ok=True)
    if not drawings:
        return {}
    with plot_style():
        files = {name: image_bytes(drawing.figure) for name, drawing in drawings.items()}
    for name, formats in files.items():
        for ending, data in formats.items():
            write_bytes(folder / f"{name}.{ending}", data)
    return {name: formats["svg"] for name, formats in files.items()}


def ticks(labels: list[str], most: int = 12) -> tuple[list[int], list[str]]:
    """Positions and labels of an axis, some left out where there is no room."""
    step = -(-len(labels) // most) or 1
    at = list(range(0, len(labels), step))
    return at, [labels[i] for i in at]


def rank_ticks(count: int, most: int = 5) -> tuple[list[int], list[str]]:
    """1 and round numbers up to `count`, for an axis of directions; positions count from 0."""
    step = 1
    while count > most * step:
        step *= 2
    numbers = sorted({1, *range(step, count + 1, step)})
    return [number - 1 for number in numbers], [str(number) for number in numbers]
