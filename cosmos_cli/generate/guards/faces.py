"""Find the faces in a video with RetinaFace on ResNet-50 and pixelate each into 5x5 squares.

Module names are those of the released `Resnet50_Final.pth`. Boxes are (x1, y1, x2, y2) in pixels.
Dimension letters: B batch, C channels, T frames, H height, W width, P priors (anchor boxes).

Source: Deng et al. 2019, RetinaFace, arXiv 1905.00641; biubug6/Pytorch_Retinaface; the thresholds
of nvidia-cosmos/cosmos-predict1 at 4ed35fa, `auxiliary/guardrail/face_blur_filter`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_cli.model import weights
from cosmos_cli.model.finite import require_finite

# Mean of the training images. The network's channel order is blue, green, red.
MEAN_BGR = (104.0, 117.0, 123.0)
# For each of the three feature maps: its stride in pixels, and the edges of the two square priors
# at each cell.
PRIORS = ((8, (16, 32)), (16, (64, 128)), (32, (256, 512)))
CENTRE_VARIANCE, SIZE_VARIANCE = 0.1, 0.2
MIN_SCORE = 0.7
MAX_OVERLAP = 0.4
MOST_CANDIDATES, MOST_FACES = 5000, 750
MIN_PIXELS = 20
SQUARES = 5
FRAMES_AT_ONCE = 4


class FaceBlur:
    """Pixelate the faces of videos.

    Raises:
        UserError: (ASSET) the weight file is missing, damaged or of another network.
    """

    def __init__(self, path: Path, device: str) -> None:
        state = weights.load_tensors(path)
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
        # The head that locates eyes, nose and mouth is not needed.
        state = {k: v for k, v in state.items() if not k.startswith("LandmarkHead.")}
        net = RetinaFace()
        # BatchNorm's counters of training batches; files that an old torch wrote lack them.
        counters = {k: v for k, v in net.state_dict().items() if k.endswith("_tracked")}
        weights.load_strict(net, counters | state, path)
        require_finite(net.state_dict(), path, fix="run `cosmos download RECIPE --check`")
        self.net = net.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def blur(self, pixels_CTHW: Tensor) -> int:
        """Pixelate the faces of a uint8 video in place; return their number, summed over frames."""
        count = 0
        prior_boxes = priors(*pixels_CTHW.shape[2:]).to(self.device)
        mean = torch.tensor(MEAN_BGR, device=self.device)[:, None, None]
        for frames_CTHW in pixels_CTHW.split(FRAMES_AT_ONCE, dim=1):
            frames = frames_CTHW.flip(0).transpose(0, 1).to(self.device, torch.float32)
            scores_TP, offsets_TP4 = self.net(frames - mean)
            boxes_TP4 = decode_boxes(offsets_TP4, prior_boxes)
            for frame_CHW, scores, boxes in zip(
                frames_CTHW.unbind(1), scores_TP, boxes_TP4, strict=True
            ):
                likely = scores > MIN_SCORE
                for box in best(scores[likely].cpu(), boxes[likely].cpu()):
                    count += pixelate(frame_CHW, box)
        return count


def priors(height: int, width: int) -> Tensor:
    """Return the priors (P, 4) as centre x and y, width and height in pixels."""
    levels = []
    for step, edges in PRIORS:
        y, x, edge = torch.meshgrid(
            (torch.arange(math.ceil(height / step)) + 0.5) * step,
            (torch.arange(math.ceil(width / step)) + 0.5) * step,
            torch.tensor(edges, dtype=torch.float32),
            indexing="ij",
        )
        levels.append(torch.stack([x, y, edge, edge], dim=-1).flatten(0, 2))
    return torch.cat(levels)


def decode_boxes(offsets: Tensor, grid: Tensor) -> Tensor:
    """Turn offsets (..., P, 4) from the priors `grid` (P, 4) into boxes (..., P, 4)."""
    centre = grid[:, :2] + CENTRE_VARIANCE * offsets[..., :2] * grid[:, 2:]
    half = grid[:, 2:] * torch.exp(SIZE_VARIANCE * offsets[..., 2:]) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def best(scores: Tensor, boxes: Tensor) -> list[Tensor]:
    """Return the most likely boxes after non-maximum suppression."""
    rest = boxes[scores.argsort(descending=True)[:MOST_CANDIDATES]]
    kept: list[Tensor] = []
    while len(rest) and len(kept) < MOST_FACES:
        kept.append(rest[0])
        rest = rest[1:][_overlap(rest[0], rest[1:]) <= MAX_OVERLAP]
    return kept


def _overlap(box: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union; a box includes both its first and its last pixel."""

    def area(first: Tensor, last: Tensor) -> Tensor:
        return (last - first + 1).clamp(min=0).prod(dim=-1)

    shared = area(torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:]))
    return shared / (area(box[:2], box[2:]) + area(others[:, :2], others[:, 2:]) - shared)


def pixelate(frame_CHW: Tensor, box: Tensor) -> bool:
    """Pixelate a box of a uint8 frame in place; return False if it is too small or outside."""
    # Without the clamp, huge coordinates would not fit into an integer.
    x1, y1, x2, y2 = box.clamp(-1e6, 1e6).int().tolist()
    face = frame_CHW[:, max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
    if min(x2 - x1, y2 - y1) < MIN_PIXELS or not face.numel():
        return False
    squares = F.interpolate(face[None].float(), (SQUARES, SQUARES), mode="bilinear").round()
    face.copy_(F.interpolate(squares, face.shape[1:], mode="nearest")[0])
    return True


# --- the network ----------------------------------------------------------------------------------


class RetinaFace(nn.Module):
    """Predict scores (B, P) and offsets (B, P, 4) of the priors from mean-subtracted frames."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ResNet50()
        self.fpn = nn.ModuleDict(
            {f"output{i}": _conv(width, 256, 1) for i, width in ((1, 512), (2, 1024), (3, 2048))}
            | {f"merge{i}": _conv(256, 256) for i in (1, 2)}
        )
        self.ssh1, self.ssh2, self.ssh3 = Context(), Context(), Context()
        self.ClassHead = _head(2)
        self.BboxHead = _head(4)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the face probability (B, P) and offsets (B, P, 4) of each prior."""
        # 1. A feature pyramid: each of three maps is merged with the next coarser one.
        maps = [F.relu(self.fpn[f"output{i}"](x)) for i, x in enumerate(self.body(frames), start=1)]
        for i in (2, 1):
            coarser = F.interpolate(maps[i], maps[i - 1].shape[2:], mode="nearest")
            maps[i - 1] = F.relu(self.fpn[f"merge{i}"](maps[i - 1] + coarser))
        # 2. Context around each cell, then the two heads.
        maps = [ssh(x) for ssh, x in zip((self.ssh1, self.ssh2, self.ssh3), maps, strict=True)]
        classes = _per_prior(self.ClassHead, maps, 2)
        return classes.softmax(dim=-1)[..., 1], _per_prior(self.BboxHead, maps, 4)


class ResNet50(nn.Module):
    """Run ResNet-50, with strides in its 3x3 convolutions, and output its last three stages."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 256, 512, 1024, 2048)
        for i, ((inputs, outputs), blocks) in enumerate(
            zip(pairwise(widths), (3, 4, 6, 3), strict=True), start=1
        ):
            first = Bottleneck(inputs, outputs, stride=1 if i == 1 else 2)
            rest = (Bottleneck(outputs, outputs) for _ in range(blocks - 1))
            self.add_module(f"layer{i}", nn.Sequential(first, *rest))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features with 512, 1024 and 2048 channels at 1/8, 1/16 and 1/32 of the size."""
        x = F.relu(self.bn1(self.conv1(frames)))
        x = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))
        fine = self.layer2(x)
        middle = self.layer3(fine)
        return fine, middle, self.layer4(middle)


class Bottleneck(nn.Module):
    """Run a residual block of ResNet-50: three convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1, self.bn1 = _conv(inputs, inner, 1)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride)
        self.conv3, self.bn3 = _conv(inner, outputs, 1)
        if inputs != outputs:
            self.downsample = _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class Context(nn.Module):
    """Combine receptive fields of 3, 5 and 7 cells, from 3x3 convolutions, as RetinaFace does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3X3 = _conv(256, 128)
        self.conv5X5_1 = _conv(256, 64)
        self.conv5X5_2 = _conv(64, 64)
        self.conv7X7_2 = _conv(64, 64)
        self.conv7x7_3 = _conv(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, 256, H, W) to features of the same shape."""
        five = F.relu(self.conv5X5_1(x))
        seven = F.relu(self.conv7X7_2(five))
        parts = [self.conv3X3(x), self.conv5X5_2(five), self.conv7x7_3(seven)]
        return F.relu(torch.cat(parts, dim=1))


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _head(values: int) -> nn.ModuleList:
    """Return one 1x1 convolution per feature map, with `values` outputs for each of two priors."""
    return nn.ModuleList(nn.ModuleDict({"conv1x1": nn.Conv2d(256, 2 * values, 1)}) for _ in PRIORS)


def _per_prior(head: nn.ModuleList, maps: list[Tensor], values: int) -> Tensor:
    """Return a head's outputs (B, P, values) in the order of `priors`."""
    outputs = [part["conv1x1"](x) for part, x in zip(head, maps, strict=True)]
    return torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, values) for x in outputs], dim=1)
