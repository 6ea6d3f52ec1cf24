"""The command line as a contract."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command import Cosmos, settings

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
    assert cosmos.json("train", "tiny", "--fast", code=2)["status"] == "error"


def test_print_recipe_names_the_origin_of_each_value(cosmos):
    done = cosmos("prep", "tiny", "--print-recipe", *settings("seed=7"))
    lines = {line.split(":")[0]: line for line in done.stdout.splitlines()}
    assert lines["seed"].endswith("# --set")
    assert "tiny.yaml:" in lines["learning_rate"]
    assert lines["beta1"].endswith("# default")


def test_dry_run_of_every_verb_writes_nothing(prepared):
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


@pytest.mark.parametrize(
    "words",
    [
        ("train", "tiny", "--dry-run", "--set", f"base={'x' * 400}"),
        ("generate", "tiny", "--prompt", "x", "--dry-run", "--set", f"base={'x' * 400}"),
        ("evaluate", "tiny", "--output", "x" * 400),
        ("recipes", "new", "mine", "--videos", "x" * 400),
    ],
)
def test_a_path_that_the_system_does_not_follow_is_one_line(prepared, words):
    done = Cosmos(prepared)(*words, code=4)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "xxx" in line
    assert "File name too long; " in line
    assert "Traceback" not in done.stderr


def test_options_expand_a_tilde_that_the_shell_left(cosmos, monkeypatch):
    monkeypatch.setenv("HOME", str(cosmos.cwd))
    cosmos("recipes", "copy", "tiny", "~/mine.yaml")
    cosmos("recipes", "schema", "--output", "~/schema.json")
    cosmos("recipes", "check", "~/mine.yaml")
    assert {path.name for path in cosmos.cwd.iterdir()} == {"mine.yaml", "schema.json"}
    (cosmos.cwd / "batch.jsonl").write_text('{"prompt": "a ball"}')
    words = ("--batch", "~/batch.jsonl", "--output", "~/videos", "--dry-run")
    (video,) = cosmos.json("generate", "tiny", *words)["videos"]
    assert Path(video["path"]).parent == cosmos.cwd / "videos"
    refused = cosmos("generate", "tiny", "--prompt", "a", "--lora", "~/none:0.5", code=4)
    assert f"{cosmos.cwd}/none: does not exist" in refused.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE: must be a whole number, at least 1, found 'x'; "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: must be a whole number, at least 1, found '0'; "),
        ({"RANK": "5", "WORLD_SIZE": "1"}, "RANK: is 5, but WORLD_SIZE is 1; "),
        ({"RANK": "1", "LOCAL_RANK": "y"}, "LOCAL_RANK: must be a whole number, at least 0, "),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT: must be a whole number, "),
        ({"DS_ACCELERATOR": "garbage"}, "DS_ACCELERATOR: must be cpu or cuda, found 'garbage'; "),
        ({"HF_ENDPOINT": "http://127.0.0.1:99999"}, "HF_ENDPOINT: must be a URL such as "),
    ],
)
def test_a_wrong_variable_is_one_line_that_names_it(cosmos, monkeypatch, variables, message):
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    for name, value in {**launcher, **variables}.items():
        monkeypatch.setenv(name, value)
    done = cosmos("train", "tiny", code=3)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    (name,) = {*variables} & {line.split(":")[1].strip()}
    assert f"run `unset {name}`" in line


def test_no_colour_codes_reach_a_pipe(cosmos):
    done = cosmos("recipes", "list")
    assert "\x1b" not in done.stdout + done.stderr
