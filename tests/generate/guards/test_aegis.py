"""Aegis in the released layout: a Llama of transformers with a LoRA of peft, and its verdicts."""

import shutil
import sys
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from cosmos_cli import paths
from cosmos_cli.errors import UserError
from cosmos_cli.generate.guards import guardrail
from cosmos_cli.generate.guards.aegis import CATEGORIES, Aegis, block_reason
from cosmos_cli.generate.jobs import Job, Weights
from cosmos_cli.generate.phases import Pipeline
from cosmos_cli.generate.text_models import TextModels
from cosmos_cli.recipe import loading

WORDS = ("<unk>", "</s>", "[/INST]", "zorg", "safe", "unsafe", "O4,O12", "ball")
UNK, EOS, ASKED, BAD, SAFE, UNSAFE, WHY, _ = range(len(WORDS))
WIDTH, FOUND = 16, 15


def tokenizer_folder(folder, unk="<unk>"):
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=unk))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, unk_token=unk, eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def llama_guard(folder, tokens=2048):
    """Write a Llama that says "safe", or "unsafe" if one channel of the mean value is set."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=WIDTH,
        max_position_embeddings=tokens, eos_token_id=EOS, bos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(parameter.ndim == 1)
        # Queries score all keys alike, so attention is the mean over all tokens.
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), WIDTH))
        attention.o_proj.weight.copy_(torch.eye(WIDTH))
        model.lm_head.weight[SAFE, ASKED] = 1
        model.lm_head.weight[UNSAFE, FOUND] = 1
        # Fix the tokens that follow each word of an answer.
        model.lm_head.weight[EOS, SAFE] = model.lm_head.weight[WHY, UNSAFE] = 1e6
        model.lm_head.weight[EOS, WHY] = 1e6
    model.save_pretrained(folder)
    tokenizer_folder(folder)


def aegis_lora(base, folder):
    """Write a LoRA that sets that channel for a word."""
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["v_proj"])
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    factors = {n: p for n, p in model.named_parameters() if "lora" in n}
    with torch.no_grad():
        for name, factor in factors.items():
            factor.zero_()
            factor[(0, BAD) if "lora_A" in name else (FOUND, 0)] = 1e4
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Return a checkpoints folder with Aegis and a tiny T5."""
    root = tmp_path_factory.mktemp("checkpoints")
    llama_guard(root / paths.LLAMA_GUARD_DIR)
    aegis_lora(root / paths.LLAMA_GUARD_DIR, root / paths.AEGIS_DIR)
    return root


def load(root):
    folders = root / paths.LLAMA_GUARD_DIR, root / paths.AEGIS_DIR
    return Aegis(*folders, "cpu", torch.float32)


def test_the_lora_makes_the_model_say_what_is_unsafe_and_why(released):
    aegis = load(released)
    assert aegis.reason("a ball {rolls}") == ""
    assert aegis.reason("a zorg beside a ball") == "Guns and Illegal Weapons, Profanity"
    assert torch.is_grad_enabled()


def test_without_its_lora_the_model_finds_nothing(released, tmp_path):
    shutil.copytree(released, tmp_path / "c")
    file = tmp_path / "c" / paths.AEGIS_DIR / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, file)
    assert load(tmp_path / "c").reason("a zorg") == ""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("safe", ""), (" safe\n", ""), ("Safe", ""),
        ("unsafe\nO2", "Sexual"), ("UNSAFE\nO10", "Harassment"), ("unsafe\nO11", "Threat"),
        ("unsafe\nO1,O3", "Violence, Criminal Planning/Confessions"),
        ("unsafe\nO12, O12", "Profanity"), ("unsafe\nO9", "it is unsafe"),
        ("unsafe", "it is unsafe"),
        ("safe\nunsafe\nO7", "Sexual (minor)"), ("", "it could not be judged"),
        ("It is safe.", "it could not be judged"), ("\u2047", "it could not be judged"),
    ],
)  # fmt: skip
def test_what_is_not_plainly_safe_is_blocked(answer, reason):
    assert block_reason(answer) == reason


def test_the_policy_has_the_eleven_categories_of_the_reference():
    assert [int(number) for number in CATEGORIES] == [*range(1, 9), 10, 11, 12]


def test_a_prompt_beyond_the_models_context_is_blocked(tmp_path):
    llama_guard(tmp_path / paths.LLAMA_GUARD_DIR, tokens=800)
    aegis_lora(tmp_path / paths.LLAMA_GUARD_DIR, tmp_path / paths.AEGIS_DIR)
    aegis = load(tmp_path)
    assert aegis.reason("ball " * 10) == ""
    assert "too long to be judged" in aegis.reason("ball " * 1000)


def released_recipe(root):
    return loading.load("nemo_assets", [f"checkpoints_dir={root}"]).recipe


@pytest.mark.parametrize(
    ("folder", "file", "damage"),
    [
        (paths.AEGIS_DIR, "adapter_model.safetensors", "missing"),
        (paths.AEGIS_DIR, "adapter_config.json", "missing"),
        (paths.AEGIS_DIR, "adapter_model.safetensors", "text"),
        (paths.AEGIS_DIR, "adapter_config.json", "text"),
        (paths.AEGIS_DIR, "adapter_model.safetensors", "lacks"),
        (paths.AEGIS_DIR, "adapter_model.safetensors", "shape"),
        (paths.LLAMA_GUARD_DIR, "model.safetensors", "missing"),
        (paths.LLAMA_GUARD_DIR, "model.safetensors", "lacks"),
        (paths.LLAMA_GUARD_DIR, "model.safetensors", "text"),
        (paths.LLAMA_GUARD_DIR, "config.json", "missing"),
        (paths.LLAMA_GUARD_DIR, "tokenizer.json", "missing"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_with_the_remedy(
    released, tmp_path, folder, file, damage
):
    shutil.copytree(released, tmp_path / "c")
    path = tmp_path / "c" / folder / file
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("not found")
    else:
        state = load_file(path)
        name = min(state)
        rest = {n: t for n, t in state.items() if n != name}
        save_file(rest | ({name: state[name][:1]} if damage == "shape" else {}), path)
        # transformers requires this metadata in its files.
        save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="guardrail cannot be read") as refused:
        guardrail.aegis(released_recipe(tmp_path / "c"), "cpu", torch.float32)
    assert refused.value.code == 4
    assert "cosmos download" in refused.value.fix


def whole_release(released, root):
    """`released` with all else that is looked for before a prompt is encoded."""
    shutil.copytree(released, root)
    guards = paths.model_files(released_recipe(root).spec, str(root)).guardrail
    shutil.copytree(paths.EMBEDDED_DIR / "guardrail" / "blocklist", guards / "blocklist")
    for file in (
        guards / "video_content_safety_filter" / "safety_filter.pt",
        guards / "face_blur_filter" / "Resnet50_Final.pth",
        root / paths.SIGLIP_DIR / "config.json",
    ):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
    config = T5Config(
        vocab_size=len(WORDS), d_model=1024, d_kv=4, d_ff=8, num_layers=1, num_heads=1
    )
    T5EncoderModel(config).save_pretrained(root / paths.TEXT_ENCODER_DIR)
    tokenizer_folder(root / paths.TEXT_ENCODER_DIR)
    return released_recipe(root)


def test_aegis_judges_prompts_and_upsampled_prompts_once_per_batch(
    released, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    r = whole_release(released, tmp_path / "c")
    prompts = ["a ball", "a zorg", "a nude ball", "a red ball"]
    jobs = [Job(p, r, Weights(tmp_path, ""), tmp_path / f"{i}.mp4") for i, p in enumerate(prompts)]
    pipeline = Pipeline(r, "cpu", in_turn=True)
    prepared, failed = pipeline.prepare(jobs)
    assert list(prepared) == [jobs[0], jobs[3]]
    assert {job: error.code for job, error in failed.items()} == {jobs[1]: 8, jobs[2]: 8}
    assert "blocked by the guard Aegis: Guns and Illegal Weapons, Profanity" in str(failed[jobs[1]])
    assert "block list" in str(failed[jobs[2]])
    assert capsys.readouterr().err.count("Aegis: ") == 1
    texts = pipeline.texts
    assert not texts.__dict__.keys() & {"aegis", "encoder"}
    for prompt, upsampled in (("a ball", "a ball with a zorg"), ("a zorg", "a ball")):
        reasons = {words: texts.aegis.reason(words) for words in (prompt, upsampled)}
        with pytest.raises(UserError, match="guard Aegis"):
            texts.require_safe(prompt, upsampled, reasons)


@pytest.mark.parametrize("guard", ["Resnet50_Final.pth", "safety_filter.pt", "LlamaGuard-7b"])
def test_a_missing_guard_stops_everything_before_the_first_phase(released, tmp_path, guard):
    r = whole_release(released, tmp_path / "c")
    (path,) = (tmp_path / "c").rglob(guard)
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=guard) as refused:
        TextModels(r, "cpu")
    assert refused.value.code == 4
    assert "cosmos download" in refused.value.fix


def test_without_peft_it_says_what_to_install(released, tmp_path, monkeypatch):
    r = whole_release(released, tmp_path / "c")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="needs the package peft") as refused:
        TextModels(r, "cpu")
    assert refused.value.code == 3
    assert "[guardrails]" in refused.value.fix
