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
from urllib.parse import quote

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --soft: light-dark(#666, #aaa);
  --link: light-dark(#0062a3, #6cb8f0) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fff, #17181a); color: light-dark(#1b1b1b, #e6e6e6);
  overflow-wrap: break-word }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } a { color: var(--link) }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums }
.short, .name { white-space: nowrap }
td { min-width: 8rem; overflow-wrap: anywhere } td.short { min-width: 0 }
td.long { min-width: 11rem } td figure, td > a { min-width: 12rem }
td > a { display: inline-block } table + table { margin-top: 1.5rem }
img, video { max-width: 100%; border-radius: 4px } figure { margin: 0 0 1rem }
figcaption, .soft { color: var(--soft); font-size: .9rem }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 1.5rem } .row > div { max-width: 40rem } .row video { width: 100% }
.sheet { width: fit-content } .heads { display: grid; grid-auto-columns: 1fr;
  grid-auto-flow: column; color: var(--soft); font-size: .9rem }
svg { width: 100%; height: auto; max-width: 30rem }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft) }
pre { overflow-x: auto; font-size: .85rem }
"""
# A palette that colour-blind readers can tell apart. Source: Okabe and Ito 2008.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MOST_TICKS = 6
# Cells of a table break anywhere, as a hash or a path must. Cells of more than LONG characters are
# wider, and cells of at most SHORT characters do not break.
LONG, SHORT = 40, 12
# Size of a plot and its margins: left, top, right, bottom. In a column of `row`, a unit is a pixel.
WIDTH, HEIGHT, MARGINS = 400, 220, (58, 14, 14, 26)
# A smoothed curve averages over about this share of its points.
SMOOTHING_SHARE = 0.2
MEDIA = {".mp4": "video/mp4", ".jpg": "image/jpeg", ".png": "image/png"}


def page(title: str, sections: Iterable[tuple[str, str]], note: str = "") -> str:
    """Return a document of sections, (heading, HTML) each, with the note below the title."""
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
    lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
    first = f"<tr>{head}</tr>" if head else ""
    return f"<table>{first}{''.join(lines)}</table>"


class Html(str):
    """Text that is already HTML and is not escaped again."""

    __slots__ = ()


def _cell(cell: object) -> str:
    if isinstance(cell, Html):
        return f"<td>{cell}</td>"
    words = "" if cell is None else str(cell)
    kind = " class=long" if len(words) > LONG else " class=short" if len(words) <= SHORT else ""
    return f"<td{kind}>{html.escape(words)}</td>"


def link(target: str, words: str) -> Html:
    """Return a link to a file, relative to the page."""
    return Html(f'<a href="{html.escape(quote(target))}">{html.escape(words)}</a>')


def row(*parts: str) -> str:
    """Return the parts side by side, or below each other on a narrow screen."""
    return f'<div class="row">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def media(path: Path, caption: str = "", target: str = "", heads: Sequence[str] = ()) -> Html:
    """Return an image, or a video that plays in a loop, embedded in the page.

    Args:
        path: an mp4, jpg or png file.
        caption: the text below it.
        target: the file that a click on the image opens, relative to the page.
        heads: the names of an image's columns, which all have the same width.
    """
    kind = MEDIA[path.suffix]
    data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if kind.startswith("video"):
        inner = f'<video src="{data}" controls loop muted autoplay playsinline></video>'
    else:
        inner = f'<img src="{data}" alt="{html.escape(caption)}" loading="lazy">'
    if target:
        inner = f'<a href="{html.escape(quote(target))}">{inner}</a>'
    if heads:
        names = "".join(f"<span>{html.escape(name)}</span>" for name in heads)
        inner = f'<div class="heads">{names}</div>{inner}'
    words = link(target, caption) if target else html.escape(caption)
    below = f"<figcaption>{words}</figcaption>" if caption else ""
    return Html(f"<figure{' class=sheet' if heads else ''}>{inner}{below}</figure>")


def chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_name: str,
    y_name: str,
    faint: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Html:
    """Plot one line of (x, y) points per name as SVG, without points that are not finite.

    The lines in `faint` have the colours of their names and lie behind the others.
    """
    kept = {name: _finite(line) for name, line in series.items()}
    behind = {name: _finite(line) for name, line in (faint or {}).items()}
    points = [point for lines in (kept, behind) for line in lines.values() for point in line]
    if not points:
        return Html(text("nothing to draw"))
    (x0, x1), (y0, y1) = (_bounds([point[axis] for point in points]) for axis in (0, 1))
    y_ticks = _ticks(y0, y1)
    y0, y1 = y_ticks[0], y_ticks[-1]
    left, top, right, bottom = MARGINS

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (WIDTH - left - right) * (x - x0) / (x1 - x0)
        return across, HEIGHT - bottom - (HEIGHT - top - bottom) * (y - y0) / (y1 - y0)

    parts, legend = [], []
    for y in y_ticks:
        down = place(x0, y)[1]
        parts.append(
            f'<line x1="{left}" x2="{WIDTH - right}" y1="{down:.1f}" y2="{down:.1f}" '
            f'stroke="#8883"/><text x="{left - 6}" y="{down + 4:.1f}" text-anchor="end">{y:.6g}'
            "</text>"
        )
    for x in _ticks(x0, x1):
        if x0 <= x <= x1:
            parts.append(_label(place(x, y0)[0], HEIGHT - 8, f"{x:.6g}"))
    for i, (name, line) in enumerate(kept.items()):
        colour = COLOURS[i % len(COLOURS)]
        for points, opacity in ((behind.get(name, []), 0.3), (line, 1)):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points))
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
                f'opacity="{opacity}"/>'
            )
        parts += [
            f'<circle cx="{place(*p)[0]:.1f}" cy="{place(*p)[1]:.1f}" r="2.5" fill="{colour}"/>'
            for p in (line if len(line) <= 30 and not behind else ())
        ]
        mark = f'<span style="color:{colour}">&#9644;</span>'
        legend.append(f'<span class="name">{mark} {html.escape(name)}</span>')
    names = f"{html.escape(y_name)} over {html.escape(x_name)}"
    return _figure(parts, names, f"{names}: {' '.join(legend)}")


def smooth(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points with each y averaged with the earlier ones, whose weights decay."""
    decay = 1 - 1 / max(SMOOTHING_SHARE * len(line), 1)
    smoothed, total, weight = [], 0.0, 0.0
    for x, y in _finite(line):
        # The weights add up, so the first points are not drawn towards 0.
        total, weight = decay * total + y, decay * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def _finite(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]


def histogram(values: Sequence[float], name: str, bins: int = 10) -> Html:
    """Plot the number of values in each of `bins` equal ranges as SVG."""
    if not values:
        return Html(text("nothing to draw"))
    low, high = _bounds(values)
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    left, top, right, bottom = MARGINS[2], 20, MARGINS[2], MARGINS[3]
    width = (WIDTH - left - right) / bins
    parts = []
    for i, count in enumerate(counts):
        height = (HEIGHT - top - bottom) * count / max(counts)
        x, y = left + width * i, HEIGHT - bottom - height
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{height:.1f}" '
            f'fill="{COLOURS[0]}"/>'
        )
        if count:
            parts.append(_label(x + width / 2, y - 4, str(count)))
    ticks = ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    for share, anchor in ticks if min(values) < max(values) else ticks[1:2]:
        x, value = left + width * bins * share, low + (high - low) * share
        parts.append(_label(x, HEIGHT - 8, f"{value:.3g}", anchor))
    label = html.escape(f"{name}; {len(values)} in total")
    return _figure(parts, label, label)


def _label(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def _figure(parts: Iterable[str], label: str, caption: str) -> Html:
    return Html(
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg><figcaption>{caption}</figcaption></figure>"
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
