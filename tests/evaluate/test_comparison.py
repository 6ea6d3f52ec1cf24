"""Verdicts on pairs of scores, and the requirements that they meet."""

import pytest

from cosmos_cli.errors import UserError
from cosmos_cli.evaluate import comparison

BETTER = {"concept": "higher", "flicker": "lower", "motion amount": "", "EDM error": "lower"}
LOW = [0.10, 0.12, 0.09, 0.11, 0.10, 0.13, 0.08, 0.11]
HIGH = [0.21, 0.19, 0.20, 0.22, 0.21, 0.24, 0.18, 0.20]
SAME = [0.11, 0.11, 0.10, 0.10, 0.09, 0.13, 0.09, 0.11]
NO, YES = [0.0] * 12, [1.0] * 12


def verdicts(before, after):
    scores = dict.fromkeys(before, "") | BETTER
    rows = comparison.compare({"base": before, "tuned": after}, scores)
    return {row["score"]: row["verdict"] for row in rows}


def rows(**after):
    before = {"concept": NO, "flicker": LOW, "motion amount": LOW}
    return comparison.compare({"base": before, "tuned": before | after}, BETTER)


def test_a_verdict_depends_on_the_better_direction():
    before = {"concept": NO, "flicker": LOW, "motion amount": LOW, "EDM error": HIGH}
    after = {"concept": YES, "flicker": HIGH, "motion amount": HIGH, "EDM error": LOW}
    assert verdicts(before, after) == {
        "concept": "better", "flicker": "worse", "motion amount": "more", "EDM error": "better",
    }  # fmt: skip
    assert verdicts(after, before) == {
        "concept": "worse", "flicker": "better", "motion amount": "less", "EDM error": "worse",
    }  # fmt: skip


def test_a_small_difference_is_none_that_the_videos_can_show():
    found = verdicts({"flicker": LOW, "EDM error": LOW}, {"flicker": SAME, "EDM error": SAME})
    assert found["flicker"] == "no difference that these 8 videos can show"
    assert found["EDM error"] == "no difference that these 8 clips can show"
    one = verdicts({"flicker": [0.1]}, {"flicker": [0.2]})
    assert one["flicker"] == "no difference that this 1 video can show"


def test_more_scores_on_a_page_need_clearer_differences():
    gained = [0.0] * 6 + [1.0] * 6
    alone = verdicts({"concept": NO}, {"concept": gained})
    many = {f"s{i}": SAME for i in range(9)}
    among = verdicts({"concept": NO, **many}, {"concept": gained, **many})
    assert alone["concept"] == "better"
    assert among["concept"].startswith("no difference")


def test_every_model_is_compared_with_the_first():
    found = comparison.compare(
        {"base": {"concept": NO}, "a": {"concept": YES}, "b": {"concept": NO}}, BETTER
    )
    assert [(row["model"], row["reference"]) for row in found] == [("a", "base"), ("b", "base")]
    assert [heading for heading, _ in comparison.tables(found)] == [
        "a compared with base", "b compared with base",
    ]  # fmt: skip
    assert comparison.compare({"base": {"concept": NO}}, BETTER) == []


def test_better_needs_one_score_that_is_better_and_none_that_is_worse():
    assert comparison.unmet(["better"], rows(concept=YES)) == []
    (line,) = comparison.unmet(["better"], rows(**{"motion amount": HIGH}))
    assert line == "--require better: tuned is not better: no score is better"
    (line,) = comparison.unmet(["better"], rows(concept=YES, flicker=HIGH))
    assert line == "--require better: tuned is not better: worse in flicker"


def test_a_named_score_is_required_alone():
    found = rows(concept=YES, flicker=HIGH)
    assert comparison.unmet(["concept"], found) == []
    assert comparison.unmet(["concept", "flicker"], found) == [
        "--require flicker: tuned is not better: worse"
    ]


def test_required_names_are_read_in_any_spelling():
    assert comparison.check_names(["EDM_error", "Better", "edm error"], BETTER) == [
        "EDM error", "better", "EDM error",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"), [("likeness", "no such score"), ("motion-amount", "neither direction")]
)
def test_a_score_that_cannot_be_required_ends_with_code_2(name, words):
    with pytest.raises(UserError, match=words) as caught:
        comparison.check_names([name], BETTER)
    assert caught.value.code == 2
    assert "better, concept, flicker, edm_error" in str(caught.value)
