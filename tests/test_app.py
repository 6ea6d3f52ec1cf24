"""The command line as a contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_cli.paths import Run
from tests.helpers.command import Cosmos, settings
from tests.helpers.stand_ins import stand_in_weights

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

    # 0.15 s of CPU time on an idle machine. CPU time hardly depends on other processes.
    assert min(seconds() for _ in range(5)) < 0.4


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
    cosmos = Cosmos(prepared)
    before = sorted(cosmos.cwd.rglob("*"))
    for verb in ("download", "prep", "train"):
        cosmos(verb, "tiny", "--dry-run", *settings())
    cosmos("generate", "--prompt", "a ball", "--dry-run")
    cosmos("evaluate", "tiny", "--dry-run", *settings())
    assert sorted(cosmos.cwd.rglob("*")) == before


SEVEN = "Cosmos-Predict1-7B-Text2World"
LACKING = {
    "download": ("download", "tiny", "--check", "--set", "base=none.pt"),
    "prep": ("prep", "seven.yaml"),
    "train": ("train", "tiny", *settings("base=none.pt", "min_free_disk_gb=0.1")),
    "promote": ("promote", "tiny", *settings("base=none.pt")),
    "generate": ("generate", "seven.yaml", "--prompt", "A ball."),
    "upsampler": ("generate", "tiny", "--prompt", "A ball.", "--set", "upsampler=/none"),
    "guard": ("generate", "seven.yaml", "--prompt", "A ball.", "--set", "checkpoints_dir=two"),
    "evaluate": ("evaluate", "seven.yaml"),
    "evaluate's prompts": ("evaluate", "tiny", "--prompts", "1", "--set", "upsampler=/none"),
    "evaluate's dataset": ("evaluate", "seven.yaml", "--set", "dataset_dir=none"),
}
# The codes other than 4.
CODES = {"evaluate": 5, "evaluate's dataset": 5}


@pytest.fixture(scope="module")
def lacking(prepared):
    """A folder with a dataset and weights, but without what the commands of LACKING read next."""
    cosmos = Cosmos(prepared)
    run = Run(prepared / "outputs/posttraining/diffusion_text2world/tiny")
    stand_in_weights(run.model(1, "ema"))
    lines = (f"model: {SEVEN}", "dataset_dir: datasets/tiny", "num_frames: 9", "height: 64")
    lines += ("width: 96", "fps: 12", "upsampler: 'off'", "min_free_disk_gb: 0.1")
    (prepared / "seven.yaml").write_text("\n".join(lines))
    for root in ("checkpoints", "two"):
        stand_in_weights(prepared / root / SEVEN / "model.pt")
    # In `two`, only the guards are missing.
    (prepared / "two/google-t5/t5-11b").mkdir(parents=True)
    (prepared / "two/google-t5/t5-11b/config.json").write_text("{}")
    (prepared / "two/Cosmos-Tokenize1-CV8x8x8-720p").mkdir()
    return cosmos


@pytest.mark.parametrize("case", LACKING)
def test_a_dry_run_ends_as_the_command_does_when_a_file_is_missing(lacking, case):
    before = sorted(lacking.cwd.rglob("*"))
    words, code = LACKING[case], CODES.get(case, 4)
    planned = lacking(*words, "--dry-run", code=code)
    assert sorted(lacking.cwd.rglob("*")) == before
    done = lacking(*words, code=code)
    for said in (planned.stderr, done.stderr):
        assert "Traceback" not in said
        assert [line for line in said.splitlines() if line.startswith("error: ")]


def test_a_dry_run_of_evaluate_measures_nothing(lacking):
    planned = lacking.json("evaluate", "tiny", "--prompts", "3", "--dry-run", *settings())
    assert planned["dry_run"]
    assert planned["prompts"] == 3
    assert list(planned["models"]) == ["base"]
    assert not (lacking.cwd / "outputs" / "evaluation.html").exists()


def test_a_dry_run_of_download_needs_the_videos_and_the_disk(cosmos):
    (cosmos.cwd / "mine.yaml").write_text("model: Cosmos-Tiny-Text2World\ndataset_dir: data\n")
    for more in ([], ["--dry-run"]):
        cosmos("download", "mine.yaml", *more, code=5)


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


def run_script(folder, *words):
    """Run recipes/run.sh with the command of this environment."""
    script = Path(__file__).parents[1] / "recipes" / "run.sh"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", script, *words], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_the_script_of_six_verbs_ends_with_the_code_of_the_first_that_fails(tmp_path):
    for words in ((), ("tiny", "--max-steps", "4"), ("--set", "seed=1")):
        done = run_script(tmp_path, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "bash recipes/run.sh RECIPE" in done.stderr
    done = run_script(tmp_path, "tiny", "--set", "seed=no", "--prompt", "A ball.")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --set seed=no: must be a whole number")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_script_of_six_verbs_prints_only_the_path_of_a_video(tmp_path):
    pairs = settings("max_steps=2", "save_every_steps=2", "warmup_steps=1", "num_steps=2")
    done = run_script(tmp_path, "tiny", *pairs, "--set", "min_free_disk_gb=0.1")
    assert done.returncode == 0, done.stderr
    (path,) = done.stdout.splitlines()
    assert Path(path).stat().st_size


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


def test_a_command_to_paste_leaves_out_options_as_long_as_a_book(cosmos):
    long = ("--set", f"prompt={'word ' * 1000}")
    (line,) = cosmos("promote", "tiny", *long, code=4).stderr.splitlines()
    assert line.endswith("run `cosmos train tiny --set ...` first")


def test_every_command_in_a_message_has_a_recipe_and_options_that_exist():
    import typer

    from cosmos_cli.app import app

    commands = typer.main.get_command(app).commands
    wrong = []
    for path in Path("cosmos_cli").rglob("*.py"):
        text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        # Commands in docstrings are for the reader of the code.
        text = re.sub(r'"""[\s\S]*?"""', "", text)
        wrong += [f"{path}: {found}" for found in re.findall(r"(?:run|then) cosmos \w+", text)]
        for verb, rest in re.findall(r"`cosmos (\w+)([^`\n]*)`", text):
            command = commands[verb]
            if verb == "recipes" and rest:
                command = command.commands[rest.split()[0]]
            known = {name for p in command.params for name in p.opts}
            unknown = set(re.findall(r"--[a-z][a-z-]*", rest)) - known
            takes_recipe = "RECIPE" in {p.metavar for p in command.params}
            # A bare verb is a name, as in "another `cosmos prep` works here".
            if unknown or (
                rest and takes_recipe and not re.search(r"RECIPE|tiny|lora|my_videos|\{", rest)
            ):
                wrong.append(f"{path}: cosmos {verb}{rest}")
    assert wrong == []
