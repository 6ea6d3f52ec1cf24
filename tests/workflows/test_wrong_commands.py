"""Wrong commands and inputs: each answer is one line that names the thing, with its exit code.

Every command between backticks in an answer is pasted: it must be accepted, and it must not end
with the same error. What would take long gets --dry-run.
"""

import re
import shlex

import pytest

from cosmos_cli.model import mp4
from cosmos_cli.paths import Run
from tests.helpers.command import Cosmos, settings
from tests.helpers.stand_ins import moving_square, stand_in_weights

pytestmark = pytest.mark.workflow

VERBS = ["setup", "download", "prep", "train", "promote", "generate", "evaluate", "recipes"]
S = shlex.join(settings())
# The command, its exit code, words of the answer, and a command in the answer to paste, or none.
# A command that starts with NAME=VALUE has this environment variable.
WRONG = [
    # Options.
    ("tran tiny", 2, "'tran' 'train'", "cosmos --help"),
    ("train tiny tiny", 2, "(tiny)", "cosmos train --help"),
    ("train tiny --resume", 2, "--resume", "cosmos train --help"),
    ("train tiny --set", 2, "--set argument", "cosmos train --help"),
    ("generate tiny --prompt", 2, "--prompt argument", "cosmos generate --help"),
    ("train tiny -set seed=1 --plan", 2, "-s", "cosmos train tiny --set seed=1 --plan"),
    ("train tiny --max-steps 9 --plan", 2,
     "--max-steps", "cosmos train tiny --set max_steps=9 --plan"),
    ("generate A red ball", 2, "(red ball)", "cosmos generate --prompt 'A red ball'"),
    ("generate tiny A ball --seed 1", 2,
     "(A ball)", "cosmos generate tiny --prompt 'A ball' --seed 1"),
    ("generate tiny --prompt a --seed -1", 2, "'--seed'", "cosmos generate --help"),
    ("setup tiny --with flash", 2, "'--with' 'flash' apex", "cosmos setup --help"),
    ("download tiny --for all-of-it", 2, "'--for' generate", "cosmos download --help"),
    ("evaluate tiny --prompts -1", 2, "'--prompts'", "cosmos evaluate --help"),
    ("evaluate tiny --output x.pdf", 2, "x.pdf .pdf", "--output x.html"),
    ("generate tiny --prompt a --output x.avi", 2, "x.avi .mp4", None),
    ("generate tiny", 2, "--prompt", '--prompt "A red ball moves left."'),
    # Recipes.
    ("train tinny", 2, "tinny 'tiny' lora_24gb", None),
    ("prep none.yaml", 2, "none.yaml: no such file", None),
    ("train bad", 2, "bad: folder", "cosmos recipes new my_videos --videos bad"),
    ("generate bad/good.jsonl", 2,
     "bad/good.jsonl batch", "cosmos generate --batch bad/good.jsonl"),
    ("prep bad/binary.yaml", 2, "bad/binary.yaml: binary", None),
    ("prep bad/empty.yaml", 2, "bad/empty.yaml: empty", "cosmos recipes copy my_videos"),
    ("prep bad/list.yaml", 2, "bad/list.yaml:1: list", None),
    ("prep bad/tab.yaml", 2, "bad/tab.yaml:2:", None),
    ("recipes check bad/key.yaml", 2, "bad/key.yaml:2: sed 'seed'", None),
    ("recipes keys learning_rat", 2, "learning_rat 'learning_rate'", None),
    ("recipes copy tiny afile", 2, "afile: exists already", "--yes"),
    ("recipes new a/b --videos bad", 2, "a/b letters", None),
    ("recipes new mine --videos afile", 5, "afile: Not a directory mp4", None),
    ("recipes new mine --videos bad --gpus ''", 2, "--gpus: '' H100-80GB", None),
    ("recipes new mine --videos datasets/tiny/videos --gpus 2xH100", 2,
     "'2xH100'", "--gpus 2xH100-80GB"),
    # Values.
    ("train tiny --set seed", 2, "--set seed: key=value", None),
    ("train tiny --set max_steps=0", 2, "max_steps=0 at least 1", None),
    ("train tiny --set learning_rate=nan", 2, "learning_rate=nan number", None),
    ("train tiny --set precision=fp16", 2, "precision=fp16 'bf16'", None),
    ("train tiny --set name=../x", 2, "name=../x letters", None),
    ("prep tiny --set num_frames=10", 2, "num_frames=10 8k", "--set num_frames=9"),
    ("prep tiny --set height=100", 2, "height=100 16", "--set height=96"),
    ("train tiny --plan --set num_processes=7", 2, "num_processes 7", "--set global_batch_size=14"),
    # GPUs, plans and streaming.
    ("train tiny --plan --gpus ''", 2, "--gpus: '' H100-80GB", None),
    ("train tiny --plan --gpus 1xRTX4090-8GB", 2, "8GB 25.4 GB", "--gpus 1xRTX-4090"),
    ("train tiny --plan --gpus 1xL40S,1xRTX-4090", 2, "'1xL40S,1xRTX-4090'", None),
    ("train my_videos --plan --gpus 1xRTX-4090", 7,
     "186.6 GB 24.6 GB",
     "--set lora_rank=16 --set learning_rate=0.0002 --set offload=weights --set zero_stage=1"),
    ("train tiny --plan --set offload=weights", 2,
     "activation_checkpointing zero_stage",
     "--set activation_checkpointing=attention --set zero_stage=1"),
    ("train tiny --plan --set offload=weights --set lora_rank=0", 2,
     "lora_rank", "--set offload=parameters"),
    ("generate tiny --prompt a --set memory=streamd", 2, "memory=streamd 'streamed'", None),
    # Files that are missing, damaged or of another kind.
    ("download lora --check", 4, "CV8x8x8-720p: missing", "cosmos download lora"),
    ("train lora", 4, "7B-Text2World/model.pt: missing", "cosmos download lora --for train"),
    ("train tiny --status --set name=none", 4, "none: no run", "cosmos train tiny --set name=none"),
    ("train tiny --set dataset_dir=none", 5,
     "none/manifest.json not prepared", "cosmos prep tiny --set dataset_dir=none"),
    ("train tiny", 5, "manifest.json num_frames = 9 25", "cosmos prep tiny"),
    (f"train tiny {S} --set name=disk --set min_free_disk_gb=1e5", 4,
     "disk: min_free_disk_gb 100000", None),
    (f"train tiny {S} --set base=none.pt", 4, "none.pt: missing", None),
    ("evaluate nemo_assets --model bad/other.pt", 5,
     "manifest.json not prepared", "cosmos prep nemo_assets"),
    ("generate tiny --prompt a --model bad/page.pt", 4,
     "page.pt: web page", "cosmos download tiny"),
    ("generate tiny --prompt a --model bad/pointer.pt", 4, "pointer.pt: LFS", "git lfs pull"),
    ("generate tiny --prompt a --model bad/half.safetensors", 4,
     "half.safetensors: damaged", "cosmos download tiny"),
    ("generate tiny --prompt a --model bad/empty.pt", 4, "empty.pt: empty", "cosmos download tiny"),
    ("generate tiny --prompt a --lora datasets", 4, "datasets: LoRA", None),
    ("generate tiny --prompt a --set upsampler=bad", 4, "bad: upsampler", "--set upsampler=off"),
    ("generate tiny --prompt a --output afile/x.mp4", 4, "afile: cannot be written", None),
    ("generate tiny --prompt a --model promoted", 4, "promoted", "cosmos promote tiny"),
    ("promote tiny --step 7", 4, "step 7", "--step 1"),
    ("promote tiny --step best", 4, "held-out", "--step latest"),
    ("promote lora", 4, "my_lora checkpoint", "cosmos train lora"),
    # Videos.
    ("prep tiny --set dataset_dir=datasets/none", 5, "datasets/none/videos: No such file", None),
    ("prep tiny --set dataset_dir=datasets/text", 5, "text.mp4: not a video", None),
    ("prep tiny --set dataset_dir=datasets/cut", 5, "cut.mp4: truncated", None),
    ("prep tiny --set dataset_dir=datasets/short", 5, "short.mp4: too short 25", None),
    # Batches.
    ("generate tiny --batch none.jsonl", 2, "none.jsonl: not exist", None),
    ("generate tiny --batch bad/broken.jsonl", 2, "broken.jsonl:1: object", None),
    ("generate tiny --batch bad/steps.jsonl", 2, "steps.jsonl:1: 'steps' 'num_steps'", None),
    ("generate tiny --batch bad/seed.jsonl", 2, "seed.jsonl:1: seed 'x'", None),
    ("generate tiny --batch bad/outside.jsonl", 2, "outside.jsonl:1: ../x.mp4", None),
    # Environment variables.
    ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=two train tiny", 3, "WORLD_SIZE 'two'", "unset WORLD_SIZE"),
    ("HF_ENDPOINT=nope generate tiny --prompt a", 3, "HF_ENDPOINT 'nope'", "unset HF_ENDPOINT"),
    ("DS_ACCELERATOR=tpu train tiny", 3, "DS_ACCELERATOR 'tpu'", "unset DS_ACCELERATOR"),
    (f"NNODES=2 train tiny {S} --set name=nodes", 2, "NNODES 2", "unset NNODES"),
]  # fmt: skip


@pytest.fixture(scope="module")
def cosmos(prepared, tmp_path_factory):
    """A folder with a prepared dataset, a run, and files that are not what they seem."""
    cosmos = Cosmos(prepared, tmp_path_factory.getbasetemp() / "cache")
    run = Run(prepared / "outputs/posttraining/diffusion_text2world/tiny")
    stand_in_weights(run.model(1, "ema"))
    bad = prepared / "bad"
    bad.mkdir()
    texts = {
        "good.jsonl": '{"prompt": "a"}', "broken.jsonl": "a red ball",
        "steps.jsonl": '{"prompt": "a", "steps": 3}', "seed.jsonl": '{"prompt": "a", "seed": "x"}',
        "outside.jsonl": '{"prompt": "a", "output": "../x.mp4"}', "empty.yaml": "", "empty.pt": "",
        "list.yaml": "- a\n", "tab.yaml": "dataset_dir: d\n\tseed: 1\n",
        "key.yaml": "dataset_dir: d\nsed: 1\n", "page.pt": "<!DOCTYPE html><html>404</html>",
        "pointer.pt": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "../afile": "x",
    }  # fmt: skip
    for name, text in texts.items():
        (bad / name).write_text(text)
    (bad / "binary.yaml").write_bytes(bytes(range(256)))
    stand_in_weights(bad / "other.pt")
    (bad / "half.safetensors").write_bytes((bad / "other.pt").read_bytes()[:40])
    clip = (prepared / "datasets/tiny/videos/clip0.mp4").read_bytes()
    for name, content in {"text": b"not a video", "cut": clip[: len(clip) // 3]}.items():
        (prepared / "datasets" / name / "videos").mkdir(parents=True)
        (prepared / "datasets" / name / "videos" / f"{name}.mp4").write_bytes(content)
    (prepared / "datasets/short/videos").mkdir(parents=True)
    mp4.write_mp4(prepared / "datasets/short/videos/short.mp4", moving_square(4, 64, 96), 12, 18)
    return cosmos


def pasted(words, command):
    """The words of a command of an answer; options are added to the command that was typed."""
    words = words if command.startswith(("--", "unset")) else []
    words = words + ([] if command.startswith("unset") else shlex.split(command))
    words = words[words[:1] == ["cosmos"] :]
    if words[:2] == ["recipes", "new"]:
        return [*words, "--yes"]
    plain = {"--dry-run", "--plan", "--help", "recipes"} & {*words}
    return words if plain else [*words, "--dry-run"]


@pytest.mark.parametrize(
    ("command", "code", "named", "paste"), WRONG, ids=[row[0] for row in WRONG]
)
def test_a_wrong_command_is_answered(cosmos, monkeypatch, command, code, named, paste):
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
    done = cosmos(*words, code=code)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    # After a dataset without a usable video, each video has its own line.
    assert len(said) == 1 + ("none of 1 videos" in said[0])
    assert "Traceback" not in done.stderr
    assert [word for word in named.split() if word not in "\n".join(said)] == []
    commands = re.findall("`([^`]+)`", said[-1])
    assert paste in [None, *commands]
    monkeypatch.undo()
    for one in commands:
        # FILE, FOLDER and the like are for the user to fill in.
        if re.search(r"\b(FILE|FOLDER|NAME|TEXT)\b", one) or one.startswith("git"):
            continue
        again = cosmos(*pasted(words, one), code=None)
        assert again.returncode not in (1, 2), again.stderr
        assert said[0] not in again.stderr.splitlines()


def test_there_are_enough_wrong_commands_of_every_verb():
    words = {word for row in WRONG for word in row[0].split()}
    assert {*VERBS} <= words
    assert len(WRONG) >= 60
