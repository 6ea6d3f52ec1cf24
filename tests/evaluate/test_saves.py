"""The step that the scores of the saves choose."""

from cosmos_cli.evaluate import saves

BETTER = {"concept": "higher", "flicker": "lower", "motion amount": "", "EDM error": "lower"}


def row(step, score, after, verdict):
    return {
        "model": f"step {step}", "score": score, "better": BETTER[score], "before": 0.0,
        "after": after, "verdict": verdict,
    }  # fmt: skip


def test_the_step_with_the_most_better_scores_is_chosen():
    rows = [
        row(50, "concept", 0.4, "better"), row(50, "flicker", 0.1, "no difference"),
        row(100, "concept", 0.9, "better"), row(100, "flicker", 0.3, "worse"),
    ]  # fmt: skip
    assert saves.choose(rows, [50, 100]) == 50


def test_equal_steps_are_ordered_by_their_mean_rank_then_by_age():
    rows = [
        row(step, score, after, "better" if score == "concept" else "no difference")
        for step, concept, flicker in ((50, 0.5, 0.2), (100, 0.8, 0.1), (150, 0.8, 0.1))
        for score, after in (("concept", concept), ("flicker", flicker))
    ]
    assert saves.choose(rows, [50, 100, 150]) == 100


def test_the_base_is_chosen_if_no_step_is_better():
    rows = [row(50, "concept", 0.9, "no difference"), row(50, "flicker", 0.0, "no difference")]
    assert saves.choose(rows, [50]) == 0
    # The held-out error makes its own choice, and neither direction of the motion is better.
    rows += [row(50, "EDM error", 0.1, "better"), row(50, "motion amount", 2.0, "more")]
    assert saves.choose(rows, [50]) == 0
