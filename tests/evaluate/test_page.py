"""The page of an evaluation: what it keeps of an earlier one, and what it explains."""

import json

import torch

from cosmos_cli.evaluate import comparison, evaluation, features, page, samples
from cosmos_cli.evaluate.samples import Sample, Trial
from cosmos_cli.model import edm, video_scores
from cosmos_cli.recipe import loading
from tests.helpers.stand_ins import moving_square


def test_a_larger_earlier_evaluation_is_kept_under_another_name(tmp_path, capsys):
    path = tmp_path / "e.html"

    def write(prompts, *models):
        figures = {"prompts": prompts, "models": {model: {} for model in models}}
        page.keep_larger(path, figures)
        path.write_text(f"{prompts} {models}")
        (tmp_path / "e_base_others.mp4").write_text(f"{prompts}")
        record = {**figures, "files": ["e_base_others.mp4"]}
        path.with_suffix(".json").write_text(json.dumps(record))

    write(12, "base")
    write(200, "base", "promoted")
    assert {path.name for path in tmp_path.iterdir()} == {
        "e.html", "e.json", "e_base_others.mp4",
    }  # fmt: skip
    write(12, "base", "promoted")
    assert "e_200.html" in capsys.readouterr().err
    assert (tmp_path / "e_200.html").read_text().startswith("200")
    assert (tmp_path / "e_200_base_others.mp4").read_text() == "200"
    # Other models are another evaluation. One without a record may have been larger.
    write(12, "base")
    assert (tmp_path / "e_12.html").is_file()
    path.with_suffix(".json").unlink()
    write(12, "base")
    assert (tmp_path / "e_earlier.html").is_file()


def test_every_figure_of_the_page_is_explained():
    model = {"scores": dict.fromkeys(evaluation.CHANCE, 0.5), "nearest_clip": 0.2, "edm": {}}
    model["video_scores"] = dict.fromkeys(video_scores.SCORES, 0.5)
    model["edm"] = {f"sigma_{sigma:.2g}": 0.1 for sigma in edm.FIXED_SIGMAS}
    figures = {"models": {"base": model}, "psnr": 30.0, "clips_apart": 0.4, "prompts": 2}
    html = page._figures(figures | {"clips": "held-out"})
    rows = page.figure_rows(figures)
    # Flicker is better if lower. The motion amount and the nearest clip have no better direction.
    assert html.count(">lower</td>") == len(edm.FIXED_SIGMAS) + 1
    assert html.count(">higher</td>") == len(rows) - len(edm.FIXED_SIGMAS) - 3
    assert "of the dataset" in html and "held-out clips" in html


def real_page(path, count=3):
    """The page of an evaluation of the 7B: two models, videos wider than the page shows."""
    r = loading.load("my_videos", [f"output_root={path.parent / 'runs'}"]).recipe
    names = [features.LIKENESS, features.MATCH, *video_scores.SCORES]
    better = {name: evaluation.MEANINGS[name][1] for name in names}
    made = {}
    for model, level in (("base", 0.4), ("promoted", 0.7)):
        scores = [dict.fromkeys(names, level + 0.01 * i) for i in range(count)]
        trials = [Trial(f"A <robot> pours a cup of tea, take {i}.", i) for i in range(count)]
        pixels = moving_square(9, 264, 480)
        made[model] = [
            samples.shrunk(Sample(trial, pixels, torch.zeros(1), own), evaluation.SHOWN_WIDTH)
            for trial, own in zip(trials, scores, strict=True)
        ]
    values = {model: evaluation.by_score(own, names) for model, own in made.items()}
    figures = {
        "prompts": count, "clips": "held-out", "not_measured": {"held-out distance": "a reason"},
        "comparisons": comparison.compare(values, better),
        "models": {
            model: {"weights": "0" * 64, **evaluation._summary(own, None, model)}
            for model, own in values.items()
        },
    }  # fmt: skip
    return page.write_page(path, r, figures, made)


def test_the_page_of_real_videos_shows_each_next_to_its_scores(tmp_path):
    written = real_page(tmp_path / "e.html")
    text = written[0].read_text()
    assert [path.name for path in written[1:-1]] == [
        f"e_{model}_{i}.mp4" for i in (1, 2, 3) for model in ("base", "promoted")
    ]
    assert text.count("<video") == 6 and 'src="http' not in text
    assert "A &lt;robot&gt; pours a cup of tea, take 0. (seed 0)" in text
    assert "promoted: likeness 0.7, prompt match 0.7" in text
    assert "held-out distance</td>" in text and ">a reason</td>" in text
    # The videos stand between the verdicts and the figures.
    order = [text.index(f"<h2>{name}") for name in ("promoted compared", "Videos", "Figures")]
    assert order == sorted(order)
    assert json.loads(written[-1].read_text())["files"] == [path.name for path in written[1:-1]]


def test_the_noise_levels_shown_are_those_that_were_measured():
    errors = {"sigma_0.63": 0.25, "sigma_6.3": 0.5}
    rows = page.figure_rows({"models": {"base": {"edm": errors}}})
    assert rows == [
        ("EDM error, sigma 0.63", "", "0.2500"), ("EDM error, sigma 6.3", "", "0.5000"),
    ]  # fmt: skip
