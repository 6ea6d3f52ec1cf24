"""RetinaFace in the released layout, its boxes, and what the blur changes."""

import json

import pytest
import torch
from transformers import ResNetBackbone, ResNetConfig

from cosmos_cli import paths
from cosmos_cli.errors import UserError
from cosmos_cli.generate.guards import faces
from cosmos_cli.generate.jobs import Job, Weights
from cosmos_cli.generate.phases import Pipeline
from cosmos_cli.model import rgb, video
from cosmos_cli.recipe import loading
from tests.helpers.command import settings

STAGES = ((64, 256, 3), (256, 512, 4), (512, 1024, 6), (1024, 2048, 3))


def convolutions():
    """Name, name of the norm behind it, inputs, outputs, kernel of all without a bias."""
    yield "body.conv1", "body.bn1", 3, 64, 7
    for i, (inputs, outputs, blocks) in enumerate(STAGES, start=1):
        for j in range(blocks):
            block, inner, before = f"body.layer{i}.{j}", outputs // 4, outputs if j else inputs
            yield f"{block}.conv1", f"{block}.bn1", before, inner, 1
            yield f"{block}.conv2", f"{block}.bn2", inner, inner, 3
            yield f"{block}.conv3", f"{block}.bn3", inner, outputs, 1
            if not j:
                yield f"{block}.downsample.0", f"{block}.downsample.1", before, outputs, 1
    for i, width in ((1, 512), (2, 1024), (3, 2048)):
        yield f"fpn.output{i}.0", f"fpn.output{i}.1", width, 256, 1
    for i in (1, 2):
        yield f"fpn.merge{i}.0", f"fpn.merge{i}.1", 256, 256, 3
    for i in (1, 2, 3):
        for name, inputs, outputs in (
            ("conv3X3", 256, 128), ("conv5X5_1", 256, 64), ("conv5X5_2", 64, 64),
            ("conv7X7_2", 64, 64), ("conv7x7_3", 64, 64),
        ):  # fmt: skip
            yield f"ssh{i}.{name}.0", f"ssh{i}.{name}.1", inputs, outputs, 3


def released_state():
    """All weights of the released file: convolutions 0, norms that change nothing."""
    state = {}
    for conv, norm, inputs, outputs, kernel in convolutions():
        state[f"{conv}.weight"] = torch.zeros(outputs, inputs, kernel, kernel)
        state |= {f"{norm}.{n}": torch.ones(outputs) for n in ("weight", "running_var")}
        state |= {f"{norm}.{n}": torch.zeros(outputs) for n in ("bias", "running_mean")}
        state[f"{norm}.num_batches_tracked"] = torch.tensor(9)
    for head, values in (("ClassHead", 2), ("BboxHead", 4), ("LandmarkHead", 10)):
        for i in range(3):
            state[f"{head}.{i}.conv1x1.weight"] = torch.zeros(2 * values, 256, 1, 1)
            state[f"{head}.{i}.conv1x1.bias"] = torch.zeros(2 * values)
    return state


def spot_state(bias=-10.0):
    """Weights that take a blue spot for a face of 32 pixels; above bias 0 everything is one."""
    state = released_state()
    state["body.conv1.weight"][0, 0, 3, 3] = 1
    for name in ("body.layer1.0.downsample.0", "body.layer2.0.downsample.0", "fpn.output1.0"):
        state[f"{name}.weight"][0, 0, 0, 0] = 1
    for name in ("fpn.merge1.0", "ssh1.conv3X3.0"):
        state[f"{name}.weight"][0, 0, 1, 1] = 1
    # Of a cell's two priors the second, of its two classes the second.
    state["ClassHead.0.conv1x1.weight"][3, 0] = 1
    for i in range(3):
        state[f"ClassHead.{i}.conv1x1.bias"][[1, 3]] = bias
    return state


def save(path, state, **how):
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path, **how)
    return path


def test_the_state_dict_is_the_released_one_and_old_files_load(tmp_path):
    state = released_state()
    assert len(state) == 456
    assert sum(tensor.numel() for tensor in state.values()) == 27_351_657
    old = {k: v for k, v in state.items() if "tracked" not in k}
    path = save(tmp_path / "Resnet50_Final.pth", old, _use_new_zipfile_serialization=False)
    assert faces.FaceBlur(path, "cpu").blur(torch.zeros(3, 1, 64, 64, dtype=torch.uint8)) == 0


@pytest.mark.parametrize("damage", ["missing", "lacks", "more", "shape", "nan", "text"])
def test_a_missing_damaged_or_wrong_file_is_an_error(tmp_path, damage):
    path, state = tmp_path / "Resnet50_Final.pth", released_state()
    name = "ssh2.conv7x7_3.0.weight"
    if damage == "lacks":
        del state[name]
    elif damage == "more":
        state["body.fc.weight"] = torch.zeros(1)
    elif damage == "shape":
        state[name] = state[name][:1]
    elif damage == "nan":
        state[name] += torch.nan
    if damage == "text":
        path.write_text("not weights")
    elif damage != "missing":
        save(path, state)
    with pytest.raises(UserError, match=r"Resnet50_Final\.pth") as refused:
        faces.FaceBlur(path, "cpu")
    assert refused.value.code == 4


def test_the_backbone_equals_transformers_resnet_50():
    torch.manual_seed(0)
    theirs = ResNetBackbone(ResNetConfig(out_features=["stage2", "stage3", "stage4"])).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    state = {}
    for name, tensor in theirs.state_dict().items():
        *place, kind, what = name.split(".")
        part = {"convolution": ("conv", "0"), "normalization": ("bn", "1")}[kind]
        if place[0] == "embedder":
            state[f"{part[0]}1.{what}"] = tensor
            continue
        stage, block = int(place[2]) + 1, place[4]
        inner = f"downsample.{part[1]}" if place[5] == "shortcut" else part[0] + str(
            int(place[6]) + 1
        )  # fmt: skip
        state[f"layer{stage}.{block}.{inner}.{what}"] = tensor
    ours = faces.ResNet50().eval()
    ours.load_state_dict(state)
    frames = torch.randn(1, 3, 72, 104)
    with torch.inference_mode():
        for x, y in zip(ours(frames), theirs(frames).feature_maps, strict=True):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def test_every_cell_has_priors_of_two_sizes_in_row_order():
    grid = faces.priors(40, 72)
    assert len(grid) == 2 * (5 * 9 + 3 * 5 + 2 * 3)
    assert grid[:3].tolist() == [[4, 4, 16, 16], [4, 4, 32, 32], [12, 4, 16, 16]]
    assert grid[18].tolist() == [4, 12, 16, 16]
    assert grid[91].tolist() == [8, 8, 128, 128]
    assert grid[-1].tolist() == [80, 48, 512, 512]


def test_offsets_shift_and_scale_a_prior():
    grid = torch.tensor([[100.0, 60.0, 20.0, 10.0]])
    assert faces.decode_boxes(torch.zeros(2, 1, 4), grid).tolist() == [[[90, 55, 110, 65]]] * 2
    twice = 5 * torch.tensor(2.0).log()
    box = faces.decode_boxes(torch.tensor([[5.0, -2.0, twice, -twice]]), grid)[0]
    assert torch.allclose(box, torch.tensor([90.0, 55.5, 130.0, 60.5]))


def test_the_likeliest_of_overlapping_boxes_is_kept():
    def square(x):
        return [x, 0.0, x + 9, 9.0]

    # Intersection over union with the first: 6/14, 5/15, 2/18; the second hides nobody.
    boxes = torch.tensor([square(0), square(4), square(8), square(100), square(105)])
    kept = faces.best(torch.tensor([0.9, 0.8, 0.75, 0.71, 0.99]), boxes)
    assert [box[0].item() for box in kept] == [105, 0, 8, 100]
    assert faces.best(torch.zeros(0), torch.zeros(0, 4)) == []
    apart = torch.tensor([square(20.0 * i) for i in range(800)])
    assert len(faces.best(torch.linspace(1, 0.7, 800), apart)) == 750


def test_a_box_becomes_5x5_squares_and_nothing_else_changes():
    torch.manual_seed(0)
    before = torch.randint(0, 256, (3, 60, 70), dtype=torch.uint8)
    frame = before.clone()
    assert faces.pixelate(frame, torch.tensor([20.9, 10.2, 45.9, 45.0]))
    inside = torch.zeros_like(before, dtype=torch.bool)
    inside[:, 10:45, 20:45] = True
    assert torch.equal(frame[~inside], before[~inside])
    squares = frame[:, 10:45, 20:45].unflatten(1, (5, 7)).unflatten(3, (5, 5))
    # The middle of each square of 7 x 5 is a pixel.
    assert torch.equal(squares, before[:, 13:45:7, 22:45:5][:, :, None, :, None].expand_as(squares))


@pytest.mark.parametrize(
    ("box", "changed"),
    [
        ([10, 10, 29, 40], None),
        ([10, 10, 40, 29], None),
        ([80, 10, 120, 40], None),
        ([-60, 10, -5, 40], None),
        ([-50, -50, 20, 20], (slice(0, 20), slice(0, 20))),
        ([50, 40, 1e30, 1e30], (slice(40, 60), slice(50, 70))),
    ],
)
def test_small_boxes_are_skipped_and_large_ones_are_clipped(box, changed):
    before = torch.arange(60 * 70).reshape(1, 60, 70).remainder(251).to(torch.uint8)
    frame = before.clone()
    assert faces.pixelate(frame, torch.tensor(box, dtype=torch.float32)) == bool(changed)
    differs = frame != before
    assert bool(differs.any()) == bool(changed)
    if changed:
        differs[:, *changed] = False
        assert not differs.any()


def test_only_the_face_in_its_frame_is_pixelated(tmp_path):
    blur = faces.FaceBlur(save(tmp_path / "f.pth", spot_state()), "cpu")
    torch.manual_seed(0)
    before = torch.randint(0, 100, (3, 6, 80, 112), dtype=torch.uint8)
    # The cell in row 4 and column 6 looks at pixel (32, 48) and its neighbours.
    before[2, 5, 31:35, 47:51] = 255
    pixels = before.clone()
    assert blur.blur(pixels) == 1
    inside = torch.zeros_like(before, dtype=torch.bool)
    inside[:, 5, 20:52, 36:68] = True
    assert torch.equal(pixels[~inside], before[~inside])
    colours = pixels[:, 5, 20:52, 36:68].flatten(1).unique(dim=1)
    assert colours.shape[1] <= 25
    before[:2, 5, 31:35, 47:51] = 255
    before[2, 5] = 0
    assert blur.blur(before) == 0


def test_a_video_is_written_with_pixelated_faces(tmp_path):
    r = loading.load("tiny", settings("num_steps=2", "guidance=0")[1::2]).recipe
    base = Weights(paths.model_files(r.spec, r.checkpoints_dir).dit, "")
    pipeline = Pipeline(r, "cpu", in_turn=False)
    jobs = [Job("A red ball.", r, base, tmp_path / name) for name in ("as_made.mp4", "blurred.mp4")]
    for job in jobs:
        (result,) = pipeline.run([job])
        assert result.made
        # In these weights everything is a face.
        released = save(tmp_path / "Resnet50_Final.pth", spot_state(bias=10.0))
        pipeline.videos.face_blur = faces.FaceBlur(released, "cpu")
    found = [json.loads(job.path.with_suffix(".json").read_text())["blurred_faces"] for job in jobs]
    assert found[0] is None
    assert found[1] >= r.num_frames
    as_made, blurred = (video.read_frames(job.path, range(r.num_frames)) for job in jobs)
    expected = as_made.clone()
    pipeline.videos.face_blur.blur(expected)
    assert rgb.psnr(blurred, expected) > rgb.psnr(blurred, as_made) + 3
