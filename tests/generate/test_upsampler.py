"""The prompt upsampler: released weights in transformers' model, and its cleaned answers."""

import json

import pytest
import torch
import torch.nn.functional as F

from cosmos_cli.errors import UserError
from cosmos_cli.generate import upsampler
from cosmos_cli.prep import captions
from tests.helpers.chat_model import VOCABULARY, chat_folder, chat_tokenizer
from tests.helpers.command import settings

WIDTH, HEADS, KV_HEADS, LAYERS, HIDDEN = 192, 4, 2, 3, 320
K = upsampler.HEAD_WIDTH


def released_state():
    """Return random weights in the released layout."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, generator=g) / shape[-1] ** 0.5

    state = {"tok_embeddings.weight": rand(VOCABULARY, WIDTH), "norm.weight": 1 + rand(WIDTH)}
    for i in range(LAYERS):
        state |= {
            f"layers.{i}.attention.wq.weight": rand(HEADS * K, WIDTH),
            f"layers.{i}.attention.wk.weight": rand(KV_HEADS * K, WIDTH),
            f"layers.{i}.attention.wv.weight": rand(KV_HEADS * K, WIDTH),
            f"layers.{i}.attention.wo.weight": rand(WIDTH, HEADS * K),
            f"layers.{i}.feed_forward.w1.weight": rand(HIDDEN, WIDTH),
            f"layers.{i}.feed_forward.w2.weight": rand(WIDTH, HIDDEN),
            f"layers.{i}.feed_forward.w3.weight": rand(HIDDEN, WIDTH),
            f"layers.{i}.attention_norm.weight": 1 + rand(WIDTH),
            f"layers.{i}.ffn_norm.weight": 1 + rand(WIDTH),
        }
    return state | {"output.weight": rand(VOCABULARY, WIDTH)}


def plain(state, tokens):
    """Return logits (L, V) of the released layout, written from its definition."""

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * state[f"{name}.weight"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T

    angle = torch.outer(torch.arange(len(tokens)), 1e6 ** -(torch.arange(0, K, 2) / K))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    mask = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)
    for i in range(LAYERS):
        at = f"layers.{i}.attention"
        h = norm(x, f"layers.{i}.attention_norm")
        q, k, v = (linear(h, f"{at}.{w}").unflatten(-1, (-1, K)) for w in ("wq", "wk", "wv"))
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        weight = (torch.einsum("qhc,khc->hqk", q, k) / K**0.5 + mask).softmax(-1)
        x = x + linear(torch.einsum("hqk,khc->qhc", weight, v).flatten(1), f"{at}.wo")
        h, ff = norm(x, f"layers.{i}.ffn_norm"), f"layers.{i}.feed_forward"
        x = x + linear(F.silu(linear(h, f"{ff}.w1")) * linear(h, f"{ff}.w3"), f"{ff}.w2")
    return linear(norm(x, "norm"), "output")


@pytest.mark.parametrize("wrap", ["plain", "outer"])
def test_released_weights_give_the_logits_of_the_released_network(tmp_path, wrap):
    state = released_state()
    stored = state
    if wrap == "outer":
        stored = {"model": {f"model.{k}": v for k, v in state.items()}}
        stored["model"]["model.layers.0.attention._extra_state"] = torch.zeros(0)
    torch.save(stored, tmp_path / "model.pt")
    model = upsampler.load_released(tmp_path / "model.pt")
    tokens = torch.randint(0, VOCABULARY, (37,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model(tokens[None]).logits[0]
    torch.testing.assert_close(ours, plain(state, tokens), rtol=0, atol=1e-5)


def test_a_file_of_another_model_is_refused(tmp_path):
    state = released_state()
    for change in ({"net.x.weight": torch.ones(1)}, None):
        other = dict(state, **change) if change else dict(list(state.items())[:-2])
        torch.save(other, tmp_path / "model.pt")
        with pytest.raises(UserError, match="not a prompt upsampler") as refused:
            upsampler.load_released(tmp_path / "model.pt")
        assert refused.value.code == 4


@pytest.mark.parametrize("released", [True, False])
def test_either_kind_of_folder_answers_deterministically(tmp_path, released):
    if released:
        chat_tokenizer(tmp_path)
        torch.save(released_state(), tmp_path / "model.pt")
    else:
        chat_folder(tmp_path)
    model = upsampler.Upsampler(tmp_path, "cpu", torch.float32)
    answer = model.upsample("w5 w6")
    assert answer == model.upsample("w5 w6") == captions.clean(answer)
    assert set(answer.split()) <= {f"w{i}" for i in range(VOCABULARY)}


def test_a_damaged_file_is_one_line_with_the_remedy(tmp_path):
    chat_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="is not a complete prompt upsampler") as refused:
        upsampler.Upsampler(tmp_path, "cpu", torch.float32)
    assert refused.value.code == 4


BODY = "A red robot arm pours coffee, slowly - into a cup"


@pytest.mark.parametrize("prefix", ["", *captions.PREFIXES, "Caption: #####", "#####- * "])
@pytest.mark.parametrize("end", ["", "\n", " \r\n", ",", '"', "\u201d", " -*:' "])
@pytest.mark.parametrize("blank", [" ", "\n\n"])
def test_an_answer_is_cleaned_of_what_is_not_the_caption(prefix, end, blank):
    answer = prefix + BODY.replace(" robot ", f"{blank}robot{blank}") + end
    assert captions.clean(answer) == BODY


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("- **Scene**: a kitchen", "a kitchen"),
        ("A. - **One two three** B. - **Four** C", "A. B. C"),
        (f"A - **{' '.join('abcdefghij')}** B", f"A - **{' '.join('abcdefghij')}** B"),
        ("#### #####x", "#####x"),
        ("Caption: Caption: x", "Caption: x"),
        ("\u201cA \u201cred\u201d ball\u201d", "A \u201cred\u201d ball"),
        ("", ""),
    ],
)
def test_list_and_heading_marks_are_removed_and_text_stays(answer, caption):
    assert captions.clean(answer) == caption


@pytest.mark.workflow
def test_a_short_prompt_is_upsampled_shown_and_saved(cosmos):
    chat_folder(cosmos.cwd / "chat")
    quick = settings("num_steps=2", "guidance=0", "upsampler=chat")
    done = cosmos("generate", "--prompt", "w5 w6", *quick)
    path = cosmos.cwd / done.stdout.strip()
    about = json.loads(path.with_suffix(".json").read_text())
    longer = about["upsampled_prompt"]
    assert about["prompt"] == "w5 w6"
    assert longer
    assert longer != "w5 w6"
    assert f"upsampled: {longer}" in done.stderr
    assert path.with_suffix(".txt").read_text() == longer + "\n"

    limited = cosmos.json(
        "generate", "--prompt", "w5 w6", *quick, "--set", "upsampler_word_limit=1"
    )
    sidecar = (cosmos.cwd / limited["artifacts"][0]).with_suffix(".json")
    assert json.loads(sidecar.read_text())["upsampled_prompt"] is None

    missing = cosmos("generate", "--prompt", "w5", *quick, "--set", "upsampler=nowhere", code=4)
    assert "prompt upsampler" in missing.stderr
