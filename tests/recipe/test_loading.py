from __future__ import annotations

import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.recipe import loading
from cosmos_cli.recipe.keys import SET_BY_FAST, Recipe
from cosmos_cli.recipe.loading import LoadedRecipe, dump
from cosmos_cli.spec import MODELS, TINY


@pytest.fixture(autouse=True)
def no_output_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTPUT_ROOT", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "r.yaml"


def load(file: Path, *lines: str, overrides: tuple[str, ...] = ()) -> LoadedRecipe:
    file.write_text("\n".join(["dataset_dir: data", *lines, ""]), encoding="utf-8")
    return loading.load(file, overrides)


def complaint(file: Path, *lines: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load(file, *lines, overrides=overrides)
    assert caught.value.code == ExitCode.USAGE
    return str(caught.value)


WRONG = [
    ("learning_rte: 5e-5", "unknown key; did you mean 'learning_rate'?"),
    ("Learning_Rate: 5e-5", "unknown key; did you mean 'learning_rate'?"),
    ("num_frame: 121", "unknown key; did you mean 'num_frames'?"),
    ("batch_size: 8", "unknown key; did you mean 'micro_batch_size'?"),
    ("xyzzy: 1", "unknown key; `cosmos recipes keys` lists them all"),
    ("hf_token: abc", "unknown key"),
    ("model: Cosmos-Predict1-7B", "did you mean 'Cosmos-Predict1-7B-Text2World'?"),
    ("model: 7", "must be one of Cosmos-Predict1-7B-Text2World, "),
    ("learning_rate: fast", "must be a number, above 0 and at most 1, found 'fast'"),
    ("learning_rate: '5e-5'", "found '5e-5'; take the quotes away"),
    ("learning_rate: 0", "must be a number, above 0 and at most 1, found 0"),
    ("learning_rate: -5e-5", "found -5e-5"),
    ("learning_rate: .nan", "found .nan"),
    ("grad_clip: .inf", "must be a number, above 0, found .inf"),
    ("grad_clip: 1e999", "found 1e999"),
    ("grad_clip: 1_0", "must be a number, above 0, found '1_0'"),
    ("grad_clip: true", "must be a number, above 0, found true"),
    ("grad_clip: [1.0]", "must be a single value, found a list"),
    ("grad_clip: {max: 1.0}", "must be a single value, found a mapping"),
    ("grad_clip: !!float 1", "no anchors, aliases or tags here, found 'tag:yaml.org,2002:float'"),
    ("grad_clip: &x 1", "no anchors, aliases or tags here, found 'x'"),
    ("grad_clip: *x", "no anchors, aliases or tags here, found 'x'"),
    ("beta1: 1.0", "must be a number, at least 0 and below 1, found 1.0"),
    ("beta2: 1.5", "must be a number, at least 0 and below 1, found 1.5"),
    ("max_steps: -3", "must be a whole number, at least 1 and at most 100000000, found -3"),
    ("max_steps: 2e3", "must be a whole number"),
    ("max_steps: 10.5", "found 10.5"),
    ("max_steps: 12:30", "found '12:30'"),
    ("max_steps:", "found nothing"),
    ("max_steps: null", "found null"),
    ("warmup_steps: -1", "must be a whole number, at least 0 and at most 1000000000, found -1"),
    ("lr_end_factor: 2", "must be a number, at least 0 and at most 1, found 2"),
    ("zero_stage: 4", "must be a whole number, at least 0 and at most 3, found 4"),
    ("precision: fp16", "must be one of bf16, fp32, found 'fp16'"),
    ("resize: Crop", "found 'Crop'; did you mean 'crop'?"),
    ("fps_policy: rejects", "did you mean 'reject'?"),
    ("strict: yes", "must be true or false, found 'yes'"),
    ("strict: 1", "must be true or false, found 1"),
    ("prompt: 5", "must be text that is not empty, or null, found 5; put it in quotes"),
    ("prompt: ''", "must be text that is not empty, or null, found ''"),
    ('videos_dir: "a\\0b"', "must be text that is not empty, or null"),
    ('prompt: "a \\ud800"', r"holds '\ud800', which is not a character; write it as UTF-8 text"),
    ('negative_prompt: "\\udfff"', r"holds '\udfff', which is not a character"),
    ("negative_prompt: 5", "must be text, or null, found 5; put it in quotes"),
    ("dataset_revision: 12e4567", "found 12e4567; put it in quotes"),
    ("dataset_repo: https://hub/x", "must be a hub name like owner/name, or embedded, or null"),
    ("name: ../x", "must be text of letters, digits, '.', '_' and '-', found '../x'"),
    ("name: .hidden", "found '.hidden'"),
    ("name: 2024", "found 2024; put it in quotes"),
    ("num_processes: all", "must be a whole number, at least 1 and at most 65536, or auto"),
    ("num_processes: 0", "found 0"),
    ("num_frames: 120", "must be 8k + 1 and at most 121, found 120; use `--set num_frames=113`"),
    ("num_frames: 5", "found 5; use `--set num_frames=1` or `--set num_frames=9`"),
    ("num_frames: 129", "found 129; use `--set num_frames=121`"),
    ("height: 700", "must be a multiple of 16 and at most 1920, found 700; use `--set height=688`"),
    ("width: 1928", "found 1928; use `--set width=1920`"),
    ("height: 8", "must be a whole number, at least 16, found 8"),
    ("fps: 0", "must be a number, above 0 and at most 240, found 0"),
    (
        "clip_stride_frames: 0",
        "must be a whole number, at least 1 and at most 1000000000, or null, found 0",
    ),
    ("ema_rate: 0.3", "must be a number, above 0 and at most 0.28, found 0.3"),
    (
        "num_processes: 3",
        "global_batch_size 8 is not a multiple of micro_batch_size x num_processes",
    ),
    ("sequence_parallel: 3", "must divide 32 heads and 56320 tokens, found 3"),
    ("seed: 4294967296", "at least 0 and below 4294967296, found 4294967296"),
    ("video_crf: 52", "found 52"),
    ("max_steps: " + "9" * 400, "99..."),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_line_is_named_with_file_line_and_key(file: Path, line: str, message: str) -> None:
    text = complaint(file, "", "# a comment", line)
    assert message in text
    assert text.startswith(f"{file}:4: {line.partition(':')[0]}: ")
    assert "\n" not in text


@pytest.mark.parametrize("mode", ["attention", "most"])
def test_modes_that_store_attention_refuse_transformer_engine_all(file: Path, mode: str) -> None:
    lines = ("transformer_engine: all", f"activation_checkpointing: {mode}")
    assert f"{mode} cannot store the attention of transformer_engine all" in complaint(file, *lines)
    assert load(file, "transformer_engine: linears", lines[1])
    assert load(file, lines[0], "activation_checkpointing: all")


def test_fp8_needs_a_multiple_of_16_tokens_in_each_process(file: Path) -> None:
    lines = ("transformer_engine: linears", "num_frames: 1", "height: 480", "width: 848")
    said = complaint(file, *lines)
    assert "transformer_engine: needs a multiple of 16 tokens in each process, found 1590" in said
    assert load(file, *lines, "micro_batch_size: 8").recipe.transformer_engine == "linears"
    # 8 x 1590 tokens, split over two processes.
    shared = ("micro_batch_size: 8", "sequence_parallel: 2", "num_processes: 2")
    assert "found 6360" in complaint(file, *lines, *shared)


def test_a_video2world_clip_is_longer_than_the_frames_it_is_given(file: Path) -> None:
    lines = ("model: Cosmos-Predict1-7B-Video2World", "num_frames: 9")
    assert "is given up to 9, found 9; use `--set num_frames=17`" in complaint(file, *lines)
    assert load(file, lines[0], "num_frames: 17").recipe.spec.takes_frames
    assert load(file, lines[1])


def test_a_key_given_twice_is_named_with_both_lines(file: Path) -> None:
    assert complaint(file, "seed: 1", "fps: 24", "seed: 2") == (
        f"{file}:4: seed: given twice, first at {file}:2; keep one of them"
    )


def test_a_missing_dataset_dir_is_named(file: Path) -> None:
    file.write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"r\.yaml: dataset_dir: required and missing"):
        loading.load(file)


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(file: Path) -> None:
    lines = complaint(
        file,
        "model: 7B",
        "learning_rte: 5e-5",
        "num_frames: 120",
        "height: 700",
        "strict: yes",
        "seed: [1]",
        overrides=("max_steps=-1", "nonsense", "stepz=3"),
    ).splitlines()
    keys = ["seed", "nonsense", "model", "learning_rte", "num_frames", "height", "strict"]
    assert len(lines) == 9
    for line, key in zip(lines, [*keys, "max_steps", "stepz"], strict=True):
        assert key in line


def test_a_wrong_value_causes_no_second_problem(file: Path) -> None:
    text = complaint(file, "global_batch_size: many", "num_processes: 3")
    assert len(text.splitlines()) == 1


def test_a_batch_smaller_than_one_pass_is_refused_with_the_smallest(file: Path) -> None:
    lines = ("global_batch_size: 2", "micro_batch_size: 3", "num_processes: 1")
    assert complaint(file, *lines).endswith("= 3 x 1 = 3; use `--set global_batch_size=3`")


def test_an_override_has_the_errors_of_the_file(file: Path) -> None:
    text = complaint(file, overrides=("learning_rte=1", "learning_rate=fast"))
    first, second = text.splitlines()
    assert first == "--set learning_rte=1: unknown key; did you mean 'learning_rate'?"
    assert second.startswith("--set learning_rate=fast: must be a number")


def test_an_override_replaces_a_wrong_value_and_the_last_one_wins(file: Path) -> None:
    loaded = load(file, "num_frames: 120", overrides=("num_frames=33", "num_frames=57"))
    assert loaded.recipe.num_frames == 57
    assert loaded.origins["num_frames"] == "--set"


def test_speed_fast_sets_its_keys_and_an_override_of_it_wins(file: Path) -> None:
    fast = load(file, "speed: fast")
    assert {key: getattr(fast.recipe, key) for key in SET_BY_FAST} == SET_BY_FAST
    assert fast.origins["num_steps"] == "speed fast"
    file.write_text(dump(fast.recipe))
    assert loading.load(file).recipe == fast.recipe
    exact = loading.load(file, ["speed=exact"]).recipe
    assert (exact.sampler, exact.num_steps) == ("euler", 35)
    assert load(file, "num_steps: 20", overrides=("speed=fast",)).recipe == fast.recipe
    assert load(file, "num_steps: 20", overrides=("speed=exact",)).recipe.num_steps == 20
    assert fast.recipe.passes < fast.recipe.exact_passes == 70


def test_a_key_that_speed_fast_overrides_is_refused(file: Path) -> None:
    for lines, overrides in (
        (("num_steps: 20", "speed: fast"), ()),
        (("speed: fast",), ("num_steps=20",)),
        ((), ("speed=fast", "num_steps=20")),
    ):
        text = complaint(file, *lines, overrides=overrides)
        assert "num_steps 20 has no effect with speed fast" in text
        assert "`--set speed=exact`" in text


def test_origins_say_where_each_value_came_from(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", "/elsewhere")
    loaded = load(file, "seed: 3", "output_root: here", overrides=("fps=30",))
    assert loaded.path == file
    assert loaded.origins.keys() == Recipe.model_fields.keys()
    expected = {
        "dataset_dir": f"{file}:1",
        "seed": f"{file}:2",
        "fps": "--set",
        "height": "model default",
        "beta1": "default",
        "output_root": "environment OUTPUT_ROOT",
    }
    assert {key: loaded.origins[key] for key in expected} == expected
    assert loaded.recipe.output_root == "/elsewhere"
    assert loaded.recipe.run_dir == Path("/elsewhere/posttraining/diffusion_text2world/my_run")


def test_output_root_of_the_environment_wins_over_set_and_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", "/elsewhere")
    loaded = load(file, overrides=("output_root=here",))
    assert loaded.recipe.output_root == "/elsewhere"
    assert "OUTPUT_ROOT=/elsewhere wins over --set output_root=here" in loaded.warnings[0]


def test_clip_shape_comes_from_the_model_unless_given(file: Path) -> None:
    loaded = load(file, f"model: {TINY.name}", "width: 192")
    r = loaded.recipe
    assert (r.num_frames, r.height, r.width, r.fps) == (TINY.num_frames, TINY.height, 192, TINY.fps)
    assert loaded.origins["width"] == f"{file}:3"
    assert r.spec is TINY


def test_numbers_words_and_dates_are_not_converted_as_in_yaml_1_1(file: Path) -> None:
    r = load(file, "learning_rate: 5e-5", "adam_eps: 1e-8", "name: no", "group: 2024-01-01").recipe
    assert (r.learning_rate, r.adam_eps, r.name, r.group) == (5e-5, 1e-8, "no", "2024-01-01")


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("warmup_steps: 1250", "the learning rate never exceeds 79.9% of learning_rate"),
        ("warmup_steps: 1000", "the learning rate never exceeds 99.9% of learning_rate"),
        ("height: 480", "1280x480 is not a size that"),
        ("num_frames: 57", "num_frames 57 is not the 121 that"),
        ("clip_stride_frames: 1", "clips overlap by 120 frames"),
        ("save_every_steps: 1001", "a killed run starts again from step 0"),
        ("log_every_steps: 1001", "only the metrics of the last step"),
        ("keep_last: 1", "no older one to fall back on"),
        ("dataset_revision: main", "dataset_revision has no effect without dataset_repo"),
        ("dataset_include: '*.mp4'", "dataset_include has no effect without dataset_repo"),
    ],
)
def test_an_unusual_value_gives_a_warning(file: Path, line: str, warning: str) -> None:
    assert load(file).warnings == ()
    (found,) = load(file, line).warnings
    assert warning in found


def test_every_shipped_recipe_loads_and_fits_the_schema() -> None:
    assert set(loading.shipped()) == {
        "tiny", "nemo_assets", "hdvila", "my_videos", "lora", "lora_24gb",
        "lora_24gb_full_size", "two_gpus", "four_gpus", "two_nodes",
        "hdvila_video2world", "my_videos_video2world", "tiny_video2world",
    }  # fmt: skip
    validator = jsonschema.Draft202012Validator(loading.json_schema())
    for name, path in loading.shipped().items():
        loaded = loading.load(name)
        assert loaded.path.samefile(path)
        entries = {key: loaded.recipe.model_dump()[key] for key in loaded.recipe.model_fields_set}
        validator.validate(entries)
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**entries, "learning_rte": 1})


def test_every_key_of_a_shipped_recipe_has_a_comment_sentence_above_it() -> None:
    for path in loading.shipped().values():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# ")
        for comment, line in pairwise(lines):
            if line and not line.startswith("#"):
                assert comment.startswith("# "), f"{path}: {line}"
                assert comment.endswith("."), f"{path}: {comment}"


def test_nemo_assets_has_the_published_values() -> None:
    loaded = loading.load("nemo_assets")
    r = loaded.recipe
    assert r.learning_rate == pytest.approx(2**-14.3, rel=1e-6)
    assert (r.beta1, r.beta2, r.adam_eps, r.weight_decay) == (0.9, 0.99, 1e-10, 0.1)
    assert (r.warmup_steps, r.max_steps, r.save_every_steps) == (2500, 2000, 200)
    assert (r.num_frames, r.height, r.width) == (121, 720, 1280)
    assert (r.fps_policy, r.resize, r.stride) == ("keep", "stretch", 1)
    assert (r.global_batch_size, r.micro_batch_size, r.num_processes) == (8, 1, 8)
    assert r.prompt == "A video of sks teal robot."
    parent = "checkpoints/posttraining/diffusion_text2world"
    name = "text2world_7b_example_cosmos_nemo_assets"
    assert r.run_dir == Path(parent, name).absolute()
    assert len(loaded.warnings) == 2


def test_a_recipe_is_found_by_path_first_then_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = loading.shipped()["tiny"]
    assert loading.find_recipe("tiny") == loading.find_recipe("tiny.yaml") == shipped
    (tmp_path / "tiny").mkdir()
    assert loading.find_recipe("tiny") == shipped
    (tmp_path / "tiny.yaml").write_text("dataset_dir: mine\n")
    assert loading.find_recipe("tiny") == shipped
    assert loading.find_recipe("tiny.yaml") == Path("tiny.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nemo_asets", "nemo_asets: no such recipe; did you mean 'nemo_assets'? shipped recipes: "),
        ("zzz", "zzz: no such recipe; shipped recipes: four_gpus, hdvila, hdvila_video2world, "),
        ("no/tiny.yaml", "no/tiny.yaml: no such file; did you mean 'tiny'?"),
        ("nope.yaml", "nope.yaml: no such file"),
        (".", ".: a folder, not a recipe"),
        ("x" * 5000, "cannot be read (File name too long)"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        loading.load(name)
    assert caught.value.code == ExitCode.USAGE
    assert message in str(caught.value)


def test_explain_aligns_the_origin_of_every_value_as_a_comment(file: Path) -> None:
    loaded = load(file, "prompt: " + "long " * 40, "seed: 3")
    text = loading.explain(loaded)
    assert yaml.safe_load(text) == loaded.recipe.model_dump()
    lines = {line.partition(":")[0]: line for line in text.splitlines()}
    assert lines["seed"].endswith(f"  # {file}:3")
    assert lines["height"].endswith("  # model default")
    long = lines.pop("prompt")
    del lines["text_encoder_repo"]  # Long too.
    assert long.endswith(f"long  # {file}:2")
    assert len({line.index("  # ") for line in lines.values() if "   #" not in line}) == 1
    assert len({line.index("# ") for line in lines.values()}) == 1


PATHS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    values=st.fixed_dictionaries(
        {"dataset_dir": PATHS},
        optional={
            "model": st.sampled_from(list(MODELS)),
            "prompt": st.none() | PATHS,
            "negative_prompt": st.none() | PATHS | st.just(""),
            "name": st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,20}\Z"),
            "learning_rate": st.floats(0, 1, exclude_min=True),
            "seed": st.integers(0, 2**32 - 1),
            "num_frames": st.integers(2, 15).map(lambda k: 8 * k + 1),
            "num_processes": st.sampled_from(["auto", 1, 2, 8]),
            "strict": st.booleans(),
        },
    )
)
def test_a_dumped_recipe_is_read_back_as_it_was(file: Path, values: dict[str, object]) -> None:
    before = Recipe.model_validate(values)
    file.write_text(loading.dump(before), encoding="utf-8")
    assert loading.load(file).recipe == before


def test_a_recipe_cannot_be_changed() -> None:
    r = loading.load("tiny").recipe
    with pytest.raises(ValueError, match="frozen"):
        r.seed = 1  # type: ignore[misc]


def test_the_key_reference_has_every_key_in_its_group() -> None:
    rows = loading.key_reference()
    assert [row.name for row in rows] == list(Recipe.model_fields)
    groups = list(dict.fromkeys(row.group for row in rows))
    assert groups == ["model", "data", "training", "sampling", "output"]
    assert sorted(rows, key=lambda row: groups.index(row.group)) == rows
    for row in rows:
        assert row.description.endswith(".")
        assert row.takes
    by_name = {row.name: row for row in rows}
    assert by_name["dataset_dir"].default == "required"
    assert by_name["fps"].default == "the model's"
    assert by_name["zero_stage"].takes == "a whole number, at least 0 and at most 3"


def test_the_recipe_is_read_without_torch_and_quickly() -> None:
    code = (
        "import sys, cosmos_cli.recipe.loading as r; r.load('tiny');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'deepspeed', 'numpy')))"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime)
    # 0.2 s of CPU time on an idle core; the rest is for cores that other tests slow down.
    assert min(seconds) < 0.6


def test_a_tilde_is_the_home_folder_only_in_paths(file: Path) -> None:
    loaded = load(file, "output_root: ~/runs\nprompt: ~/runs").recipe
    assert loaded.output_root == str(Path.home() / "runs")
    assert loaded.prompt == "~/runs"
    lines = ("upsampler: ~/chat", "caption: vlm", "caption_model: ~/eyes", "base: ~nobody-here/b")
    loaded = load(file, *lines).recipe
    assert loaded.upsampler == str(Path.home() / "chat")
    assert loaded.caption_model == str(Path.home() / "eyes")
    assert loaded.base == "~nobody-here/b"


def test_a_recipe_of_ours_warns_only_of_what_the_user_changes(tmp_path: Path) -> None:
    copied = tmp_path / "copied.yaml"
    text = loading.find_recipe("nemo_assets").read_text()
    copied.write_text(text)
    for name in ("nemo_assets", copied):
        loaded = loading.load(name)
        assert len(loaded.warnings) == 2
        assert loaded.unexpected == ()
        (changed,) = loading.load(name, ["keep_last=1"]).unexpected
        assert changed.startswith("keep_last 1")
    copied.write_text(text.replace("warmup_steps: 2500", "warmup_steps: 2600"))
    assert len(loading.load(copied).unexpected) == 2
