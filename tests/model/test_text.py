import shutil
import subprocess
import sys

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import text
from cosmos_cli.paths import EMBEDDED_DIR
from cosmos_cli.spec import TINY


@pytest.fixture(scope="module")
def encoder():
    return text.TextEncoder(EMBEDDED_DIR / "t5", TINY.text, "cpu", torch.float32)


def test_a_damaged_encoder_is_one_line_with_the_remedy(tmp_path):
    shutil.copytree(EMBEDDED_DIR / "t5", tmp_path / "t5")
    weights = tmp_path / "t5" / "model.safetensors"
    for damage in (b"no weights", weights.read_bytes()[:-1], b""):
        weights.write_bytes(damage)
        broken = text.TextEncoder(tmp_path / "t5", TINY.text, "cpu", torch.float32)
        with pytest.raises(UserError, match="is not a complete T5 encoder") as refused:
            broken.encode(["a"])
        assert refused.value.code == ExitCode.ASSET


def captions(count):
    """Distinct captions from one word to more than fit."""
    return [f"take {i} " + "a red square moves left " * (i * i % 131) for i in range(count)]


def test_batches_hold_each_caption_once_and_no_more_tokens_than_allowed(encoder, monkeypatch):
    monkeypatch.setattr(text, "BATCH_TOKENS", 2048)
    given = captions(60)
    batches = encoder.batches(given)
    assert sorted(caption for batch in batches for caption in batch) == sorted(given)
    ids = [
        encoder.tokenizer(b, truncation=True, max_length=encoder.spec.tokens).input_ids
        for b in batches
    ]
    longest = [max(map(len, batch)) for batch in ids]
    assert all(n * len(batch) <= 2048 for n, batch in zip(longest, ids, strict=True))
    assert longest == sorted(longest, reverse=True) and longest[0] == encoder.spec.tokens
    # Few tokens are there only to fill up: that is what sorting by length is for.
    real = sum(len(row) for batch in ids for row in batch)
    assert real > 0.7 * sum(n * len(batch) for n, batch in zip(longest, ids, strict=True))
    assert encoder.batches(given[::-1]) == batches


def test_a_batch_gives_what_each_caption_gives_alone(encoder):
    given = captions(12)
    for caption, embedding in zip(given, encoder.encode(given), strict=True):
        (alone,) = encoder.encode([caption])
        assert embedding.shape == alone.shape
        torch.testing.assert_close(embedding, alone, rtol=2**-9, atol=2**-12)


@torch.inference_mode()
def test_concatenated_captions_give_the_embeddings_of_transformers(encoder):
    given = [*captions(9), "a", "take 3", "take 4"]
    ids = encoder.tokenizer(given, truncation=True, max_length=encoder.spec.tokens).input_ids
    lengths = [len(row) for row in ids]
    assert len(set(lengths)) < len(lengths) and max(lengths) == encoder.spec.tokens
    ours = encoder.forward(torch.tensor([token for row in ids for token in row]), lengths)
    encoder.encoder.set_attn_implementation("eager")
    for row, out in zip(ids, ours.split(lengths), strict=True):
        theirs = encoder.encoder(torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(out, theirs, rtol=0, atol=1e-5)


def test_another_kind_of_t5_is_refused(tmp_path):
    config = T5Config.from_pretrained(EMBEDDED_DIR / "t5", feed_forward_proj="gated-gelu")
    T5EncoderModel(config).save_pretrained(tmp_path)
    for path in (EMBEDDED_DIR / "t5").glob("tokenizer*"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match="gated-gelu") as caught:
        text.TextEncoder(tmp_path, TINY.text, "cpu", torch.float32).encode(["a"])
    assert caught.value.code == ExitCode.ASSET


ORDERS = {
    "text first": "attend()",
    "an order of their own first": "with sdpa_kernel([M], set_priority=True): attend()",
}
AFTER_OTHERS = """
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from cosmos_cli.model import kernels
M = SDPBackend.EFFICIENT_ATTENTION
q = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16, device="cuda")
def attend():
    kernels.biased_attention(q, q, q, q.new_zeros(2, 64, 64), often=False)
{first}
kernels.put_cudnn_first()
hopper = torch.cuda.get_device_capability() in kernels.CUDNN_FIRST
print(kernels.attention_backend(q, q, q) == "cudnn", hopper)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("first", ORDERS.values(), ids=ORDERS)
def test_the_denoiser_uses_cudnn_attention_whatever_ran_before(first):
    # In a process of its own: the order of torch's kernels is fixed at the first attention.
    code = AFTER_OTHERS.format(first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    chosen, wanted = done.stdout.split()
    assert chosen == wanted
