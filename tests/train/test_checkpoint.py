"""Which files of earlier saves a run deletes."""

import json

from cosmos_cli.paths import MANIFEST_FILE, Run
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import saver, status


def written_run(folder, errors):
    """A run with the model files of every step, and the resume states of the last two."""
    run = Run(folder)
    run.checkpoints.mkdir(parents=True)
    for step in errors:
        for kind in ("ema", "reg"):
            run.model(step, kind).touch()
    for step in sorted(errors)[-2:]:
        run.resume_state(step).mkdir()
        (run.resume_state(step) / MANIFEST_FILE).write_text("{}")
    rows = [json.dumps({"step": step, "heldout": error}) for step, error in errors.items()]
    run.metrics.write_text("".join(f"{row}\n" for row in rows))
    return run


def test_keep_models_keeps_the_newest_the_best_and_those_of_resume_states(tmp_path):
    errors = {10: 0.5, 20: 0.2, 30: 0.4, 40: 0.3, 50: 0.6}
    for keep_models, kept in ((0, [*errors]), (1, [20, 40, 50]), (3, [20, 30, 40, 50])):
        run = written_run(tmp_path / str(keep_models), errors)
        r = Recipe(dataset_dir="none", keep_models=keep_models, keep_last=2)
        saver.prune(run, r, status.best_step(run))
        assert run.saved_steps("ema") == run.saved_steps("reg") == kept
        assert run.resumable_steps() == [40, 50]
