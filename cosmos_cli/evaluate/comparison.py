"""Compare the scores of models pair by pair, with a verdict in words for each score. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from cosmos_cli.errors import usage_error
from cosmos_cli.evaluate import statistics

# The names of scores of held-out clips. All others are scores of videos.
OF_CLIPS = ("EDM error",)
BETTER, WORSE = "better", "worse"
# Characters that stand for a space where the name of a score is typed.
SPACES = str.maketrans("-_,", "   ")
NOTE = (
    "Each score is compared between videos of the same prompt and seed, or on the same held-out "
    "clip. The interval contains the true difference in about 95 % of evaluations. Verdicts are "
    "corrected for the number of scores on this page (Holm), so a verdict can be no difference "
    "although the interval excludes 0. A distance is one number for all videos, so it has no "
    "interval; its verdict is that of a permutation test. Where the last column is empty, neither "
    "direction is better."
)


@dataclass(frozen=True)
class Features:
    """The features (videos, D) of each model's videos, in the same order, and of held-out clips."""

    name: str
    videos: Mapping[str, np.ndarray]
    held_out: np.ndarray


def compare(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    better: Mapping[str, str],
    features: Features | None = None,
) -> list[dict[str, Any]]:
    """Return one row for each score of each model after the first, which is the reference.

    Args:
        values: for each model and score, one value for each video or clip, in the same order.
        better: for each score, "higher", "lower" or "".
        features: those whose distances are compared too.
    """
    (reference, before), *others = values.items()
    pairs = [
        (model, score, statistics.paired(before[score], after[score]))
        for model, after in others
        for score in before
    ]
    if features:
        first = features.videos[reference]
        for model, _ in others:
            own = statistics.paired_distances(first, features.videos[model], features.held_out)
            pairs.append((model, features.name, own))
    # The tables group the rows of a model.
    pairs.sort(key=lambda pair: [model for model, _ in others].index(pair[0]))
    adjusted = statistics.holm([result.p for _, _, result in pairs])
    rows = []
    for (model, score, result), p_holm in zip(pairs, adjusted, strict=True):
        unit = "clip" if score in OF_CLIPS else "video"
        bounds = (result.low, result.high) if math.isfinite(result.low) else (None, None)
        rows.append({
            "model": model, "reference": reference, "score": score, "better": better[score],
            "count": result.count, "before": result.before, "after": result.after,
            "difference": result.difference, "low": bounds[0], "high": bounds[1],
            "p": result.p, "p_holm": p_holm,
            "verdict": verdict(result, p_holm, better[score], unit),
        })  # fmt: skip
    return rows


def verdict(result: statistics.Paired, p: float, better: str, unit: str) -> str:
    """Return better or worse, more or less if neither direction is better, or no difference."""
    if p > 1 - statistics.LEVEL:
        these = f"this 1 {unit}" if result.count == 1 else f"these {result.count} {unit}s"
        return f"no difference that {these} can show"
    rose = result.difference > 0
    if not better:
        return "more" if rose else "less"
    return BETTER if rose == (better == "higher") else WORSE


Table = tuple[list[tuple[str, ...]], tuple[str, ...]]


def tables(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, Table]]:
    """Return a heading for each model, and its comparisons as table rows with their header."""
    return [
        (f"{model} compared with {reference}", (cells, header))
        for (model, reference), own in groupby(rows, key=itemgetter("model", "reference"))
        for cells in [[_cells(row) for row in own]]
        for header in [("score", "verdict", reference, model, "difference", "95 % interval", "")]
    ]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["score"],
        row["verdict"],
        f"{row['before']:.4g}",
        f"{row['after']:.4g}",
        f"{row['difference']:+.3g}",
        "" if row["low"] is None else f"{row['low']:+.3g} to {row['high']:+.3g}",
        f"{row['better']} is better" if row["better"] else "",
    )


def check_names(required: Sequence[str], better: Mapping[str, str]) -> list[str]:
    """Return the required scores under their own names; the word better stands for all scores.

    In a required score, case, spaces, - and _ do not matter. `better` is the better direction of
    each score of this evaluation: "higher", "lower" or "".

    Raises:
        UserError: there is no such score, or neither direction of it is better.
    """
    names = {_plain(name): name for name in better} | {BETTER: BETTER}
    judged = [BETTER, *(_plain(name) for name, direction in better.items() if direction)]
    for name in required:
        if _plain(name) not in judged:
            what = "neither direction is better" if _plain(name) in names else "no such score"
            fix = f"this evaluation can require {', '.join(judged)}"
            if not better:
                fix += "; --prompts 24 adds the scores of videos"
            raise usage_error(f"--require {name}", what, fix)
    return [names[_plain(name)] for name in required]


def _plain(name: str) -> str:
    return "_".join(name.lower().translate(SPACES).split())


def unmet(required: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each requirement that a model does not reach.

    The requirement `better` needs one score that is better and none that is worse.
    """
    lines = []
    for model, name in dict.fromkeys((row["model"], name) for row in rows for name in required):
        own = [row for row in rows if row["model"] == model and name in (BETTER, row["score"])]
        verdicts = {row["score"]: row["verdict"] for row in own if row["better"]}
        if name != BETTER:
            reached, found = verdicts[name] == BETTER, verdicts[name]
        else:
            worse = [score for score, words in verdicts.items() if words == WORSE]
            reached = BETTER in verdicts.values() and not worse
            found = f"worse in {', '.join(worse)}" if worse else "no score is better"
        if not reached:
            lines.append(f"--require {_plain(name)}: {model} is not better: {found}")
    return lines
