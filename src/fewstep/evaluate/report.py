"""A report of a run: one page that needs nothing else, its pictures as files, and the figures as JSON.

Pictures need Pillow, plots Matplotlib (``pip install "fewstep[demo]"``).
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.artefacts import write_atomically
from fewstep.errors import MissingExtraError

__all__ = ["Report", "image_grid", "line_plot"]

WIDENED = 1.4
"""How far above the lines with labels a plot shows those without."""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem }
h2 { font-size: 1.25rem; margin-top: 2.6rem; border-top: 1px solid var(--line); padding-top: 1.4rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem }
.strip { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0 } figcaption { font-size: .82rem; margin-top: .3rem }
img { image-rendering: pixelated; display: block; border: 1px solid var(--line); max-width: 100% }
img.plot { image-rendering: auto; border: 0; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
.wide { overflow-x: auto }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line) }
th.text, td.text { text-align: left } td { white-space: nowrap } th { vertical-align: bottom }
td.best { font-weight: 700; background: var(--soft) } p.note, footer { font-size: .85rem; opacity: .8 } code { font-size: .9em }
"""


def image_grid(
    samples: Tensor,
    data_range: tuple[float, float],
    *,
    columns: int,
    scale: int = 4,
    text: Mapping[str, str] | None = None,
) -> bytes:
    """A PNG of samples side by side.

    Args:
        samples: ``"batch channels height width"`` with 1 or 3 channels.
        data_range: the values shown as black and white; beyond them is clipped.
        columns: samples a row.
        scale: side of a pixel.
        text: written into the file, for what reads it (Pillow's ``Image.info``).

    Raises:
        ValueError: for samples that are no images.
        MissingExtraError: if Pillow is not installed.
    """
    try:
        from PIL import Image, PngImagePlugin
    except ImportError as error:
        raise MissingExtraError("Pillow", "demo", "Writing pictures") from error
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise ValueError(f"pictures need samples (batch, 1 or 3, height, width), got shape {tuple(samples.shape)}.")
    low, high = data_range
    pixels = ((samples.detach().cpu().double() - low) / (high - low)).clamp(0, 1).mul(255).round().byte().numpy()
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 128, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    image = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    file, about = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        about.add_text(name, value)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(file, "PNG", pnginfo=about)
    return file.getvalue()


def line_plot(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    faint: Iterable[Sequence[tuple[float, float]]] = (),
    levels: Mapping[str, float] | None = None,
) -> bytes:
    """A PNG of lines over a logarithmic vertical axis.

    Args:
        lines: label -> points.
        xlabel, ylabel: of the axes.
        faint: lines in grey, without labels; they do not widen the frame upwards much beyond the highest of the others.
        levels: label -> height of a dashed horizontal line.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    except ImportError as error:
        raise MissingExtraError("Matplotlib", "demo", "Plotting") from error
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    background = [list(points) for points in faint]
    for points in background:
        axes.plot(*zip(*points, strict=True), color="0.8", linewidth=0.8, zorder=1)
    for (label, points), marker in zip(lines.items(), "osD^vPX<>*" * len(lines), strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.4, label=label)
    for label, height in (levels or {}).items():
        axes.axhline(height, color="0.3", linewidth=1.0, linestyle="--", label=label)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    drawn = [*background, *lines.values()]
    ticks = sorted({x for points in drawn for x, _ in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    coloured = [y for points in lines.values() for _, y in points] + list((levels or {}).values())
    heights = [*coloured, *(y for points in background for _, y in points if y <= WIDENED * max(coloured))]
    if background:
        axes.set_ylim(0.9 * min(heights), 1.1 * max(heights))
    narrow = max(heights) < 20.0 * min(heights)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if narrow else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", linewidth=0.3)
    if len(lines) + len(levels or {}) > 5:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.legend(frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, metadata={"Software": None})
    return file.getvalue()


@dataclass
class Report:
    """A page that is put together piece by piece and then written.

    Args:
        title: heading of the page.
        intro: first paragraph.
        results: the figures, JSON values, written to ``results.json``.
    """

    title: str
    intro: str
    results: dict[str, Any] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading."""
        self.pieces.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text: str, *, note: bool = False) -> None:
        """Add a paragraph."""
        self.pieces.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def links(self, heading: str, links: Sequence[tuple[str, str]]) -> None:
        """Add a heading and links below it: (text, address)."""
        self.heading(heading)
        told = (f'<a href="{html.escape(address)}">{html.escape(text)}</a>' for text, address in links)
        self.pieces.append(f"<p>{', '.join(told)}</p>")

    def pictures(self, pictures: Sequence[tuple[str, str, bytes]], *, plot: bool = False) -> None:
        """Add PNGs side by side: (file name, caption, content)."""
        figures = []
        for name, caption, content in pictures:
            self.files[name] = content
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            kind = ' class="plot" width="760"' if plot else ""
            alt = html.escape(caption)
            figures.append(f'<figure><img{kind} src="{source}" alt="{alt}"><figcaption>{alt}</figcaption></figure>')
        self.pieces.append(f'<div class="strip">{"".join(figures)}</div>')

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        best: Collection[tuple[int, int]] = (),
        text: Collection[int] = (0,),
    ) -> None:
        """Add a table; cells in `best` (row, column) are set off, and the columns in `text` begin at the left."""

        def cell(tag: str, i: int, j: int, content: str) -> str:
            classes = " ".join(name for name, cells in (("best", (i, j) in best), ("text", j in text)) if cells)
            quote = '"' if " " in classes else ""
            kind = f" class={quote}{classes}{quote}" if classes else ""
            return f"<{tag}{kind}>{html.escape(content)}</{tag}>"

        lines = ["".join(cell("th", -1, j, content) for j, content in enumerate(head))]
        lines += ["".join(cell("td", i, j, content) for j, content in enumerate(row)) for i, row in enumerate(rows)]
        self.pieces.append(f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>')

    def page(self) -> str:
        """The page as HTML."""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(self.title)}</title>'
        body = f"<h1>{html.escape(self.title)}</h1><p>{html.escape(self.intro)}</p>{''.join(self.pieces)}"
        return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n'

    def write(self, folder: Path) -> None:
        """Write ``index.html``, ``results.json`` and the pictures into a folder."""
        for name, content in self.files.items():
            write_atomically(folder / name, content)
        write_atomically(folder / "results.json", (json.dumps(self.results, indent=1, allow_nan=False) + "\n").encode())
        write_atomically(folder / "index.html", self.page().encode())
