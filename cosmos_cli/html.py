"""Build self-contained HTML pages of text, tables, images, videos and plots. No torch.

A page is a title and a list of sections. Every function returns escaped HTML. A page loads nothing
from elsewhere, so it opens without a network. It follows the browser's dark or light mode.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --soft: light-dark(#666, #aaa); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fff, #17181a); color: light-dark(#1b1b1b, #e6e6e6); }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums }
img, video { max-width: 100%; border-radius: 4px } figure { margin: 0 0 1rem }
figcaption, .soft { color: var(--soft); font-size: .9rem }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.5rem }
svg { width: 100%; height: auto; max-width: 40rem }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
pre { overflow-x: auto; font-size: .85rem }
"""
# A palette that colour-blind readers can tell apart. Source: Okabe and Ito 2008.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MOST_TICKS = 6
MEDIA = {".mp4": "video/mp4", ".jpg": "image/jpeg", ".png": "image/png"}


def page(title: str, sections: Iterable[tuple[str, str]], note: str = "") -> str:
    """Return a whole document.

    Args:
        title: the title and first heading.
        sections: a heading and its HTML for each section.
        note: a paragraph below the title.
    """
    parts = [f"<h2>{html.escape(heading)}</h2>\n{body}" for heading, body in sections]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n{text(note) if note else ''}\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def text(words: str) -> str:
    """Return a paragraph."""
    return f"<p>{html.escape(words)}</p>"


def code(words: str) -> str:
    """Return preformatted lines, such as a command or a recipe."""
    return f"<pre>{html.escape(words)}</pre>"


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Return a table. Its cells are escaped, except those that are `Html`."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = ["<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return (
        f"<table><tr>{head}</tr>{''.join(lines)}</table>"
        if head
        else (f"<table>{''.join(lines)}</table>")
    )


class Html(str):
    """Text that is already HTML and is not escaped again."""

    __slots__ = ()


def _cell(cell: object) -> str:
    return str(cell) if isinstance(cell, Html) else html.escape("" if cell is None else str(cell))


def row(*parts: str) -> str:
    """Return the parts side by side, or below each other on a narrow screen."""
    return f'<div class="row">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def media(path: Path, caption: str = "") -> Html:
    """Return an image, or a video that plays in a loop, embedded in the page."""
    kind = MEDIA[path.suffix]
    data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if kind.startswith("video"):
        inner = f'<video src="{data}" controls loop muted autoplay playsinline></video>'
    else:
        inner = f'<img src="{data}" alt="{html.escape(caption)}" loading="lazy">'
    return Html(f"<figure>{inner}<figcaption>{html.escape(caption)}</figcaption></figure>")


def chart(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> Html:
    """Plot one line of (x, y) points per name as SVG, without points that are not finite."""
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    points = [point for line in kept.values() for point in line]
    if not points:
        return Html(text("nothing to draw"))
    (x0, x1), (y0, y1) = (_bounds([point[axis] for point in points]) for axis in (0, 1))
    x_ticks = [x for x in _ticks(x0, x1) if x0 <= x <= x1]
    y_ticks = _ticks(y0, y1)
    y0, y1 = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return 60 + 560 * (x - x0) / (x1 - x0), 222 - 210 * (y - y0) / (y1 - y0)

    parts, legend = [], []
    for y in y_ticks:
        down = place(x0, y)[1]
        parts.append(f'<line x1="60" x2="620" y1="{down:.1f}" y2="{down:.1f}" stroke="#8883"/>')
        parts.append(f'<text x="54" y="{down + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in x_ticks:
        across = place(x, y0)[0]
        parts.append(f'<text x="{across:.1f}" y="240" text-anchor="middle">{x:.6g}</text>')
    for i, (name, line) in enumerate(kept.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in (place(*p) for p in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{place(*p)[0]:.1f}" cy="{place(*p)[1]:.1f}" r="2.5" fill="{colour}"/>'
            for p in (line if len(line) <= 30 else ())
        ]
        legend.append(f'<span style="color:{colour}">&#9644; {html.escape(name)}</span>')
    names = f"{html.escape(y_name)} over {html.escape(x_name)}"
    return Html(
        f'<figure><svg viewBox="0 0 640 248" role="img" aria-label="{names}">{"".join(parts)}</svg>'
        f"<figcaption>{names}: {' '.join(legend)}</figcaption></figure>"
    )


def histogram(values: Sequence[float], name: str, bins: int = 12) -> Html:
    """Plot the number of values in each of `bins` equal ranges as SVG."""
    if not values:
        return Html(text("nothing to draw"))
    low, high = _bounds(values)
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    parts = []
    for i, count in enumerate(counts):
        height = 110 * count / max(counts)
        x, width = 20 + 600 / bins * i, 600 / bins - 2
        parts.append(
            f'<rect x="{x:.1f}" y="{130 - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" fill="{COLOURS[0]}"><title>{count}</title></rect>'
        )
    parts.append(f'<text x="20" y="146">{low:.4g}</text>')
    parts.append(f'<text x="620" y="146" text-anchor="end">{high:.4g}</text>')
    label = html.escape(f"{name} ({len(values)})")
    return Html(
        f'<figure><svg viewBox="0 0 640 150" role="img" aria-label="{label}">{"".join(parts)}'
        f"</svg><figcaption>{label}</figcaption></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return evenly spaced round numbers; the first is at most `low`, the last at least `high`."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= next(
        part for part in (0.2, 0.25, 0.5, 1, 2) if (high - low) / step <= part * MOST_TICKS
    )
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
