"""The page of an evaluation: what it keeps of an earlier one, and what it explains."""

import json

from cosmos_cli.evaluate import evaluation, page, video_scores
from cosmos_cli.model import edm


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
