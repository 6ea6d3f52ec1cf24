"""Small videos and files of weights that stand for a user's."""

import torch
from safetensors.torch import save_file


def moving_square(frames, height, width):
    """A uint8 CTHW clip of a bright square that moves right over a colour ramp."""
    clip = torch.zeros(3, frames, height, width, dtype=torch.uint8)
    clip[2] = torch.linspace(20, 120, width).to(torch.uint8)
    edge = height // 3
    for t in range(frames):
        left = t * (width - edge) // max(frames - 1, 1)
        clip[0, t, edge : 2 * edge, left : left + edge] = 230
    return clip


def stand_in_weights(path, content="weights"):
    """Writes a file that is whole, but of no model; its name decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"content": torch.tensor(list(content.encode()))}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        path.write_text(content)
