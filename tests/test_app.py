"""The command line as a contract."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command import settings

VERBS = ("setup", "download", "prep", "train", "promote", "generate")
HEAVY = ("torch", "transformers", "deepspeed", "huggingface_hub", "torchcodec")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_lists_the_six_verbs_and_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['cosmos', '--help']\n"
        "from cosmos_cli.app import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print('loaded', [m for m in {HEAVY} if m in sys.modules])\n"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert "loaded []" in done.stdout
    assert all(verb in done.stdout for verb in VERBS)


def test_help_answers_at_once():
    def seconds():
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "cosmos_cli", "--help"], capture_output=True, check=True
        )
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    # 0.3 s of CPU time on an idle machine. CPU time hardly depends on other processes.
    assert min(seconds() for _ in range(5)) < 0.8


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(cosmos, verb):
    shown = cosmos(verb, "--help").stdout
    assert f"cosmos {verb}" in shown
    assert "--json" in shown
    assert "--dry-run" in shown


def test_version(cosmos):
    assert cosmos("--version").stdout.startswith("cosmos 0.")


@pytest.mark.parametrize("verb", [*VERBS[:5]])
def test_a_recipe_error_is_the_same_in_every_verb(cosmos, verb):
    (cosmos.cwd / "mine.yaml").write_text("dataset_dir: d\nlearning_rte: 1\n")
    done = cosmos(verb, "mine.yaml", code=2)
    assert "mine.yaml:2" in done.stderr
    assert "learning_rate" in done.stderr
    assert done.stdout == ""
    value = cosmos.json(verb, "mine.yaml", code=2)
    assert value["status"] == "error"
    assert "learning_rte" in value["error"]


def test_an_unknown_option_is_exit_code_two(cosmos):
    cosmos("train", "tiny", "--fast", code=2)
    assert "--fast" in cosmos.json("train", "tiny", "--fast", code=2)["error"]


def test_print_recipe_names_the_origin_of_each_value(cosmos):
    done = cosmos("prep", "tiny", "--print-recipe", *settings("seed=7"))
    lines = {line.split(":")[0]: line for line in done.stdout.splitlines()}
    assert lines["seed"].endswith("# --set")
    assert "tiny.yaml:" in lines["learning_rate"]
    assert lines["beta1"].endswith("# default")


def test_dry_run_of_every_verb_writes_nothing(prepared):
    from tests.helpers.command import Cosmos

    cosmos = Cosmos(prepared)
    before = sorted(cosmos.cwd.rglob("*"))
    for verb in ("download", "prep", "train"):
        cosmos(verb, "tiny", "--dry-run", *settings())
    cosmos("generate", "--prompt", "a ball", "--dry-run")
    assert sorted(cosmos.cwd.rglob("*")) == before


def test_a_closed_pipe_is_not_an_error(cosmos):
    command = f"{sys.executable} -m cosmos_cli recipes keys | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=cosmos.cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_closed_pipe_for_messages_is_not_an_error(cosmos):
    command = f"{sys.executable} -m cosmos_cli recipes copy tiny a.yaml 2>&1 >/dev/null | true"
    command += "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], cwd=cosmos.cwd, check=False)
    assert done.returncode == 0
    assert (cosmos.cwd / "a.yaml").is_file()


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_full_disk_behind_the_output_is_one_line_and_exit_code_four(cosmos, option):
    with Path("/dev/full").open("w") as full:
        process = cosmos.start("recipes", "list", *option, stdout=full)
        _, said = process.communicate()
    assert process.returncode == 4
    assert "standard output: cannot be written: No space left on device" in said
    assert len(said.splitlines()) == 1


def test_a_name_that_is_too_long_is_one_line_and_exit_code_four(cosmos):
    done = cosmos("recipes", "copy", "tiny", "x" * 300, code=4)
    assert "File name too long" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_colour_codes_reach_a_pipe(cosmos):
    done = cosmos("recipes", "list")
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "fix"),
    [
        ("train tiny --max-steps 4", "`cosmos train tiny --set max_steps=4`"),
        ("train tiny --max_steps=4 --plan", "`cosmos train tiny --set max_steps=4 --plan`"),
        ("prep tiny max_steps=4", "`cosmos prep tiny --set max_steps=4`"),
        ("train max_steps=4", "`--set max_steps=4`"),
        ("train tiny --fast", "see `cosmos train --help`"),
        ("trian tiny", "Did you mean 'train'?"),
        ("recipes keys max_step", "did you mean 'max_steps'?"),
        ("train tiny --set height=100", "`--set height=96` or `--set height=112`"),
        ("promote tiny --set seed=3", "run `cosmos train tiny --set seed=3` first"),
        ("train my_videos", "run `cosmos download my_videos --for train`"),
        ("download my_videos --check", "run `cosmos download my_videos` first"),
        ("train my_videos --plan --gpus 8xH100", "`--gpus 8xH100-80GB`"),
        ("train my_videos --plan --gpus 1xH100-80GB", "add `--set offload=optimizer`"),
        ("generate my_videos --model promoted --prompt x", "run `cosmos promote my_videos`"),
    ],
)
def test_a_wrong_command_is_one_line_with_a_command_to_paste(cosmos, command, fix):
    *_, last = cosmos(*command.split(), code=None).stderr.splitlines()
    assert last.startswith("error: ")
    assert fix in last


def test_a_prompt_given_as_the_recipe_is_answered_with_prompt(cosmos):
    done = cosmos("generate", "A robot's arm", code=2)
    assert """`cosmos generate --prompt 'A robot'"'"'s arm'`""" in done.stderr


def test_keys_explains_only_the_named_keys(cosmos):
    shown = cosmos("recipes", "keys", "seed", "lora_rank").stdout
    assert "lora_rank (default 0)" in shown
    assert "learning_rate" not in shown


def test_a_mistyped_key_of_a_batch_is_answered_with_the_nearest(cosmos):
    (cosmos.cwd / "batch.jsonl").write_text('{"promt": "a ball"}\n')
    done = cosmos("generate", "--batch", "batch.jsonl", "--dry-run", code=2)
    assert "batch.jsonl:1: has the unknown key 'promt'; did you mean 'prompt'?" in done.stderr


@pytest.mark.parametrize(
    ("words", "choice"),
    [
        ("cosmos train tiny --set offl", "offload="),
        ("cosmos train tiny --set offload=opt", "offload=optimizer"),
        ("cosmos train tiny --gpus 8xH1", "8xH100-80GB"),
        ("cosmos promote tiny --step b", "best"),
        ("cosmos promote tiny --weights r", "reg"),
        ("cosmos recipes keys lora_r", "lora_rank"),
    ],
)
def test_the_shell_completes_values(cosmos, words, choice):
    count = len(words.split()) - 1
    asked = {"_COSMOS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    process = cosmos.start(env={**cosmos.environment(), **asked})
    shown, _ = process.communicate()
    assert choice in shown.split()
