import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCosmos
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosmos_cli.model import tokenizer as module
from cosmos_cli.model import weights
from cosmos_cli.model.tokenizer import Tokenizer
from cosmos_cli.spec import COSMOS_7B, TokenizerSpec

SMALL = TokenizerSpec(channels=8, latent_channels=4)
KEYS = Path(__file__).parent / "data" / "tokenizer_cv8x8x8_keys.txt"


@torch.no_grad()
def randomize(network: torch.nn.Module) -> None:
    """Weights that keep the size of a signal, so that every frame and pixel shows in the output."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if "norm" in name:
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
        elif weight.ndim == 5:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)


def tokenizer(spec: TokenizerSpec = SMALL) -> Tokenizer:
    tok = Tokenizer(spec)
    randomize(tok)
    tok.mean.normal_(generator=torch.Generator().manual_seed(1))
    tok.std.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return tok.requires_grad_(False)


def video(frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, AutoencoderKLCosmos]:
    """Ours with the weights of diffusers', by way of the files on disk."""
    theirs = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 16, 32, 32),
        decode_block_out_channels=(16, 32, 32, 32),
        latents_mean=[i / 100 for i in range(64)],
        latents_std=[1 + i / 100 for i in range(64)],
    ).eval()
    randomize(theirs)
    folder = tmp_path_factory.mktemp("diffusers")
    theirs.save_pretrained(folder)
    ours = Tokenizer(SMALL)
    weights.load_strict(ours, weights.load_tokenizer_state(folder), folder)
    return ours.requires_grad_(False), theirs.requires_grad_(False)


def test_keys_and_shapes_are_the_released_ones():
    with torch.device("meta"):
        tok = Tokenizer(COSMOS_7B.tokenizer)
    ours = {key: ",".join(map(str, value.shape)) for key, value in tok.state_dict().items()}
    assert ours.pop("mean") == ours.pop("std") == "16,16"
    released = dict(line.split() for line in KEYS.read_text().splitlines())
    released = {key: shape for key, shape in released.items() if "patcher3d" not in key}
    assert ours == released


def test_the_parameter_count_is_the_released_one():
    with torch.device("meta"):
        tok = Tokenizer(COSMOS_7B.tokenizer)
    assert sum(p.numel() for p in tok.parameters()) == 105_653_696


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 16, 16), (9, 24, 40), (17, 8, 16), (121, 40, 56)]
)
def test_latent_and_reconstruction_equal_diffusers(twins, frames, height, width):
    ours, theirs = twins
    clip = video(frames, height, width)
    z = ours.encode_raw(clip)
    expected = theirs.encode(clip).latent_dist.mode()
    assert z.shape == (1, 4, 1 + (frames - 1) // 8, height // 8, width // 8)
    assert z.std() > 0.1
    torch.testing.assert_close(z, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        ours.decode_raw(expected), theirs.decode(expected).sample, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("given", [1, 9])
def test_first_latents_do_not_depend_on_later_frames(given):
    """So a Video2World model is given what it was trained with.

    Of a clip of equal length, to the bit. Encoded alone they differ by the rounding of kernels,
    which sum in another order for another size.
    """
    tok, clip = tokenizer(), video(25)
    other = torch.cat((clip[:, :, :given], video(25).flip(2)[:, :, given:]), dim=2)
    count = 1 + (given - 1) // 8
    first, changed = (tok.encode(x)[:, :, :count] for x in (clip, other))
    assert torch.equal(first, changed)
    assert not torch.equal(tok.encode(clip)[:, :, count:], tok.encode(other)[:, :, count:])
    alone = tok.encode(clip[:, :, :given])
    torch.testing.assert_close(alone, first, atol=1e-5, rtol=0)


def test_scale_is_per_channel_and_latent_frame(twins):
    ours, _ = twins
    clip = video(9)
    z, x0 = ours.encode_raw(clip), ours.encode(clip)
    for channel in range(4):
        for frame in range(2):
            mean = (16 * channel + frame) / 100
            expected = (z[:, channel, frame] - mean) / (1 + mean) * 0.5
            torch.testing.assert_close(x0[:, channel, frame], expected)


def test_decode_undoes_the_scale_of_encode():
    tok = tokenizer()
    clip = video(17)
    expected = tok.decode_raw(tok.encode_raw(clip)).clamp(-1, 1)
    torch.testing.assert_close(tok.decode(tok.encode(clip)), expected, atol=1e-4, rtol=0)


def test_decoded_video_is_within_its_range():
    tok = tokenizer()
    decoded = tok.decode(torch.randn(1, 4, 2, 2, 2) * 1e4)
    assert decoded.min() == -1
    assert decoded.max() == 1


def test_no_latent_frame_depends_on_later_pixels():
    tok = tokenizer()
    clip = video(25)
    z = tok.encode(clip)
    for frame in (1, 9, 17):
        changed = clip.clone()
        changed[:, :, frame:] = 0
        other = tok.encode(changed)
        seen = 1 + (frame - 1) // 8
        torch.testing.assert_close(other[:, :, :seen], z[:, :, :seen])
        assert (other[:, :, seen] - z[:, :, seen]).abs().max() > 1e-3


def test_no_pixel_depends_on_later_latent_frames():
    tok = tokenizer()
    x0 = torch.randn(1, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    decoded = tok.decode(x0)
    torch.testing.assert_close(tok.decode(x0[:, :, :2]), decoded[:, :, :9], atol=1e-4, rtol=0)


@pytest.mark.parametrize("piece", [1, 2, 3, 4])
def test_decoding_in_pieces_equals_decoding_at_once(piece):
    # In double precision, where rounding does not hide a small mistake.
    tok = tokenizer().double()
    for frames in (1, 9, 25, 33, 121):
        z = tok.encode_raw(video(frames).double())
        tok.decoder.piece = 16
        whole = tok.decode_raw(z)
        tok.decoder.piece = piece
        assert whole.shape[2] == frames
        torch.testing.assert_close(tok.decode_raw(z), whole, atol=1e-12, rtol=0)


def test_a_failed_decode_leaves_no_state_for_the_next_video():
    tok = tokenizer()
    z = tok.encode_raw(video(49))
    expected = tok.decode_raw(z)
    hook = tok.decoder.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tok.decode_raw(z)
    hook.remove()
    assert torch.equal(tok.decode_raw(z), expected)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that existed at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, identity, size):
        self.known.discard(identity)
        self.live -= size


def test_a_full_size_video_is_coded_in_bounded_memory():
    with FakeTensorMode(), torch.no_grad():
        tok = Tokenizer(COSMOS_7B.tokenizer)
        clip, x0 = torch.empty(1, 3, 121, 704, 1280), torch.empty(1, 16, 16, 88, 160)
        with LiveBytes() as encoding:
            assert tok.encode(clip).shape == x0.shape
        with LiveBytes() as decoding:
            assert tok.decode(x0).shape == clip.shape
    # In fp32, twice what it takes in bf16.
    assert 4 * 2**30 < decoding.peak < 8 * 2**30
    assert 4 * 2**30 < encoding.peak < 16 * 2**30


@pytest.mark.slow
def test_compiled_blocks_give_the_same_latent():
    tok, x = tokenizer(), video(9)
    plain = tok.encode(x)
    tok.compile_blocks()
    compiled = tok.encode(x)
    assert not torch.equal(compiled, plain)
    assert (compiled - plain).abs().max() < 1e-5


def test_chunks_are_coded_independently():
    tok = tokenizer(replace(SMALL, chunk_frames=9))
    first, second = video(9), video(9).flip(2)
    both = tok.encode(torch.cat((first, second), dim=2))
    assert both.shape[2] == 4
    torch.testing.assert_close(both, torch.cat((tok.encode(first), tok.encode(second)), dim=2))
    expected = torch.cat([tok.decode(part) for part in both.split(2, dim=2)], dim=2)
    torch.testing.assert_close(tok.decode(both), expected)


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(8, 16, 16), (129, 8, 8), (9, 20, 16), (9, 16, 20)]
)
def test_a_video_that_does_not_fit_is_refused(frames, height, width):
    with torch.device("meta"):
        tok, clip = Tokenizer(SMALL), torch.empty(1, 3, frames, height, width)
    with pytest.raises(ValueError, match=str(frames)):
        tok.encode(clip)


def test_a_latent_that_does_not_fit_is_refused():
    with torch.device("meta"):
        tok, x0 = Tokenizer(SMALL), torch.empty(1, 4, 17, 2, 2)
    with pytest.raises(ValueError, match="17 frames"):
        tok.decode(x0)


def test_haar_bands_of_a_constant_are_its_mean_and_zeros():
    bands = module.haar(torch.full((1, 3, 2, 4, 4), 0.75))
    assert torch.equal(bands[:, :3], torch.full((1, 3, 1, 2, 2), 0.75))
    assert not bands[:, 3:].any()


@pytest.mark.parametrize(("axis", "band"), [(4, 1), (3, 2), (2, 4)])
def test_haar_band_order_is_time_height_width(axis, band):
    step = torch.tensor([1.0, -1.0])
    x = step.view([2 if i == axis else 1 for i in range(5)]).expand(1, 1, 2, 2, 2)
    assert module.haar(x).flatten().nonzero().item() == band


def test_inverse_haar_undoes_haar_exactly_in_bf16():
    x = (torch.randint(0, 16, (1, 2, 4, 6, 8)) / 16).bfloat16()
    assert torch.equal(module.inverse_haar(module.haar(x)), x)


def test_gradients_reach_every_parameter():
    tok = tokenizer().requires_grad_(True)
    tok.decode_raw(tok.encode_raw(video(9))).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in tok.parameters())


@pytest.mark.gpu
def test_wide_attention_on_a_gpu_equals_pytorch():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 100, 1, 512, generator=generator) for _ in range(3))
    q, k, v = (x.bfloat16().cuda() for x in (3 * q, k, v))
    expected = module.kernels.attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(
        module.kernels.wide_attention(q, k, v).double(), expected, atol=2e-2, rtol=0
    )


def test_the_norm_of_a_gpu_is_group_norm_of_each_frame():
    generator = torch.Generator().manual_seed(0)
    norm = module.FrameNorm(8).requires_grad_(False)
    randomize(norm)
    # The mean of one frame is far from 0. Another frame is 0 everywhere.
    x = 3 * torch.randn(2, 8, 3, 5, 7, generator=generator)
    x[:, :, 1] += 50
    x[:, :, 2] = 0
    given = norm.norm.weight, norm.norm.bias, norm.norm.eps
    torch.testing.assert_close(module.kernels.frame_norm(x, *given), norm(x), atol=2e-5, rtol=0)
    half = x.bfloat16()
    found = module.kernels.frame_norm(half, *(p.bfloat16() for p in given[:2]), given[2])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), norm(half.float()), atol=0.05, rtol=0)


@pytest.mark.gpu
def test_a_tokenizer_on_a_gpu_equals_one_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tok, x = tokenizer(), video(49)
    latent = tok.encode(x)
    expected = latent, tok.decode(latent)
    tok = tok.cuda()
    found = tok.encode(x.cuda()).cpu(), tok.decode(latent.cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
