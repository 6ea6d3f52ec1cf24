"""What training does to a model: it learns the clips' concept, and the EMA follows its formula."""

import json

import pytest
from safetensors.torch import load_file

from cosmos_cli.model.ema import power_gamma
from cosmos_cli.train import status
from tests.helpers.command import Cosmos
from tests.helpers.runs import find_run, train

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


@pytest.mark.parametrize(("rate", "learns"), [(1e-3, True), (1e-9, False)])
def test_training_on_a_concept_lowers_its_held_out_error(prepared, rate, learns):
    cosmos, name = Cosmos(prepared), f"concept{rate}"
    pairs = ("num_processes=1", "max_steps=40", "save_every_steps=40", f"learning_rate={rate}")
    train(cosmos, name, *pairs)
    measured = [row["heldout"] for row in status.rows(find_run(cosmos, name)) if "heldout" in row]
    assert (measured[-1] < 0.4 * measured[0]) is learns


def test_the_ema_of_a_run_follows_its_formula_for_a_hundred_steps(prepared):
    cosmos = Cosmos(prepared)
    pairs = ("num_processes=1", "max_steps=100", "save_every_steps=1", "validate_every_steps=1000")
    small = ("lora_rank=1", "keep_last=1", "num_processes=2", "micro_batch_size=1")
    train(cosmos, "averaged", *pairs, *small)
    run, gamma, average = find_run(cosmos, "averaged"), power_gamma(0.1), {}
    for step in range(1, 101):
        weights = load_file(run.lora(step, "reg"))
        beta = (1 - 1 / step) ** (gamma + 1)
        average = {
            name: beta * average.get(name, 0) + (1 - beta) * weights[name].double()
            for name in weights
        }
    found = load_file(run.lora(100, "ema"))
    assert found.keys() == average.keys()
    assert max((found[name] - average[name]).abs().max() for name in found) < 1e-6
    assert max((found[name] - weights[name]).abs().max() for name in found) > 1e-4


def test_verdicts_tell_a_learned_concept_from_a_spoiled_run(cosmos):
    cosmos("download", "tiny")
    cosmos("prep", "tiny")

    def evaluate(name, *pairs, required, code=0):
        settings = [word for pair in (f"name={name}", *pairs) for word in ("--set", pair)]
        cosmos("train", "tiny", *settings, seconds=3600)
        cosmos("promote", "tiny", *settings, "--name", name)
        words = ("tiny", "--model", "base", "--model", name, "--require", required, "--json")
        done = json.loads(cosmos("evaluate", *words, code=code, seconds=3600).stdout)
        verdicts = {row["score"]: row["verdict"] for row in done["comparisons"]}
        print(name, verdicts)
        return verdicts, done

    for seed in range(3):
        verdicts, _ = evaluate(f"learned{seed}", f"seed={seed}", required="concept")
        assert verdicts.pop("concept") == "better"
        # Motion amount has no better direction, and the error of the held-out clips may fall.
        assert not {verdicts[name] for name in verdicts} & {"worse"}
        for name in ("colour", "shape", "motion", "consistency"):
            assert verdicts[name].startswith("no difference")
    verdicts, done = evaluate("spoiled", "learning_rate=6e-2", required="better", code=6)
    assert "worse" in verdicts.values()
    assert "spoiled is not better: worse in" in done["error"]


def test_twelve_clips_teach_bounces_and_ordinary_motion_stays(cosmos):
    for verb in ("download", "prep", "train", "promote"):
        cosmos(verb, "tiny_video2world", seconds=3600)
    words = ("tiny_video2world", "--prompts", "100", "--json")
    horizon = json.loads(cosmos("evaluate", *words, seconds=7200).stdout)["horizon"]

    def error(name, kind, given=9):
        """The median distance in pixels at the 16th new frame."""
        found = horizon[f"position error, {kind}, {given} given"][name][15]
        print(name, kind, given, found)
        return found

    assert error("tokenizer round trip", "free motion") < 1
    assert error("base", "free motion") <= 2
    # The first frame alone does not show the velocity.
    assert error("base", "free motion", given=1) >= 2 * error("base", "free motion")
    assert error("promoted", "bounces") <= error("base", "bounces") / 2
    assert error("promoted", "free motion") <= 1.5 * error("base", "free motion")
