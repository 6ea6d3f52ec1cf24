"""The building blocks of the pages."""

import re

import pytest

from cosmos_cli import html

HASH = "0123456789abcdef" * 4


def test_a_histogram_shows_the_count_of_each_bar_and_the_range():
    plot = html.histogram([1, 1, 1, 2, 5], "length", bins=4)
    assert re.findall(r">([^<>\n]+)</text>", plot) == ["3", "1", "1", "1", "3", "5"]
    assert "5 in total" in plot
    assert re.findall(r">([^<>\n]+)</text>", html.histogram([0.5, 0.5], "size")) == ["2", "0.5"]


def test_a_smoothed_curve_keeps_a_constant_and_calms_noise():
    flat = [(step, 3.0) for step in range(30)]
    assert html.smooth(flat) == [pytest.approx(point) for point in flat]
    noisy = [(step, float(step % 2)) for step in range(100)]
    calm = [y for _, y in html.smooth(noisy)][20:]
    assert 0.4 < min(calm) < max(calm) < 0.6
    assert html.smooth([]) == []


def test_faint_lines_have_the_colour_of_their_name():
    raw = {"a": [(0, 1.0), (1, float("nan")), (2, 5.0)]}
    plot = html.chart({"a": html.smooth(raw["a"])}, "step", "error", faint=raw)
    colours = re.findall(r'<polyline points="[^"]+" fill="none" stroke="([^"]+)"', plot)
    assert len(colours) == 2 and len(set(colours)) == 1
    # The axis covers the raw points.
    assert ">5</text>" in plot


def test_only_long_words_of_a_table_break_and_only_short_ones_never_do():
    table = html.table([("base", "checkpoints/model.pt", HASH, html.link("a b?.mp4", "a <b>"))])
    cells = re.findall(r"<td([^>]*)>", table)
    assert cells == [" class=short", "", " class=long", ""]
    assert '<a href="a%20b%3F.mp4">a &lt;b&gt;</a>' in table
