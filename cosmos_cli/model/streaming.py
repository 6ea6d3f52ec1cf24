"""Stream frozen weights and stored activations between CPU memory and a GPU that cannot hold them.

A pass over a long video computes for seconds, but its weights cross PCIe in a fraction of a second.
So copies on a stream of their own hide behind the arithmetic. Weights only travel to the GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cosmos_cli.model.shared_weights import SharedWeights

# Inductor recompiles a block whose weights start at other offsets than multiples of this.
ALIGNED_BYTES = 16
# Block buffers on the GPU: one computes while the other is filled.
BUFFERS = 2
# The warning for a system that refuses pinned memory.
PAGEABLE = (
    "the system refuses to pin CPU memory (see `ulimit -l`), so weights are streamed from pageable "
    "memory, which is slower and does not overlap with computing"
)


def allocate(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    streamed: Sequence[int],
    device: torch.device,
    absent: Sequence[int] = (),
) -> None:
    """Allocate a module of the meta device: streamed blocks in CPU memory, the rest on `device`.

    Blocks in `absent` stay on the meta device: another process has loaded them.
    """
    places = {child: "cpu" for index in streamed for child in blocks[index].modules()}
    places |= {child: "meta" for index in absent for child in blocks[index].modules()}
    for child in module.modules():
        child.to_empty(device=places.get(child, device), recurse=False)


def pinned(size: int, device: torch.device) -> Tensor:
    """Return `size` bytes of CPU memory to exchange with a device, pinned for a GPU.

    Where pinning is refused, they are pageable.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)


class WeightStream:
    """Brings the frozen weights of some blocks to the device just before each block runs.

    The weights stay in CPU memory: in `shared`, if other processes stream the same. On the device,
    blocks share two buffers in turn. Autograd does not notice that a buffer is overwritten, so a
    backward pass must recompute whole blocks: activation checkpointing is required.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        streamed: Sequence[int],
        device: torch.device,
        shared: SharedWeights | None = None,
    ) -> None:
        self.places = {index: place for place, index in enumerate(streamed)}
        self.weights = (
            _pack_shared(blocks, streamed, device, shared)
            if shared
            else [_pack(blocks[i], pinned(block_bytes(blocks[i]), device)) for i in streamed]
        )
        self.pageable = device.type == "cuda" and not all(w.is_pinned() for w in self.weights)
        size = max(map(len, self.weights), default=0)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        # The place whose weights each buffer holds.
        self.holds = [-1] * BUFFERS
        self.last = -1
        # The number of copies so far.
        self.copies = 0
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.filled = [torch.cuda.Event() for _ in range(BUFFERS)] if self.copying else []
        for index, place in self.places.items():
            _point_to(blocks[index], self.buffers[place % BUFFERS])
            for parameter in _trained(blocks[index]):
                parameter.data = parameter.data.to(device)

    def bring(self, index: int) -> None:
        """Wait for the weights of block `index`, and begin to copy those that are needed next."""
        if (place := self.places.get(index)) is None:
            return
        self._fill(place)
        if self.copying:
            torch.cuda.current_stream().wait_event(self.filled[place % BUFFERS])
        following = self._following(place)
        if following % BUFFERS != place % BUFFERS:
            self._fill(following)
        self.last = place

    def _following(self, place: int) -> int:
        """Guess the next place from the direction. A wrong guess costs time, not correctness."""
        end = len(self.weights) - 1
        if place == 0:
            return min(1, end)
        if place == end:
            # The end of a forward pass: the backward pass or the next forward pass follows.
            return end - 1 if torch.is_grad_enabled() else 0
        return place + 1 if place > self.last else place - 1

    def _fill(self, place: int) -> None:
        turn, weights = place % BUFFERS, self.weights[place]
        if self.holds[turn] == place:
            return
        self.holds[turn] = place
        self.copies += 1
        part = self.buffers[turn][: len(weights)]
        if self.copying is None:
            part.copy_(weights)
            return
        # The block that used this buffer has been launched before; its kernels must finish first.
        self.copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copying):
            part.copy_(weights, non_blocking=True)
            self.filled[turn].record()


def _frozen(block: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in block.parameters() if not parameter.requires_grad]


def _trained(block: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


def block_bytes(block: nn.Module) -> int:
    """Return the bytes of a block's frozen weights, each of them aligned."""
    return sum(map(_aligned, _frozen(block)))


def _aligned(parameter: Tensor) -> int:
    return -(-parameter.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES


def _views(block: nn.Module, flat: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the frozen parameters of a block, each with its part of `flat`."""
    views, start = [], 0
    for parameter in _frozen(block):
        part = flat[start : start + parameter.nbytes].view(parameter.dtype)
        views.append((parameter, part.view(parameter.shape)))
        start += _aligned(parameter)
    return views


def _pack(block: nn.Module, flat: Tensor) -> Tensor:
    """Move a block's frozen weights into one piece of CPU memory, and return it."""
    for parameter, view in _views(block, flat):
        view.copy_(parameter.data)
        parameter.data = view
    return flat


def _pack_shared(
    blocks: Sequence[nn.Module],
    streamed: Sequence[int],
    device: torch.device,
    shared: SharedWeights,
) -> list[Tensor]:
    """Move the streamed blocks that are loaded into shared memory; return that of each.

    The blocks on the meta device are there already.
    """
    sizes, packed = [block_bytes(block) for block in blocks], []
    for index in streamed:
        # Pinning allocates the memory of a block, so it is done just before the weights move there.
        flat = shared.memory(sizes, index, device)
        if any(parameter.is_meta for parameter in _frozen(blocks[index])):
            for parameter, view in _views(blocks[index], flat):
                torch.utils.swap_tensors(parameter, nn.Parameter(view, requires_grad=False))
        else:
            _pack(blocks[index], flat)
            shared.mark_filled(index)
        packed.append(flat)
    shared.close()
    return packed


def _point_to(block: nn.Module, buffer: Tensor) -> None:
    """Make a block's frozen parameters parts of a buffer."""
    for parameter, view in _views(block, buffer):
        parameter.data = view


@dataclass
class Stored:
    """A tensor in CPU memory and, while a backward pass needs it, its copy on the GPU."""

    on_cpu: Tensor
    on_gpu: Tensor | None = None
    copied: torch.cuda.Event | None = None


class ActivationStream:
    """Keeps what the first `count` blocks store for the backward pass in CPU memory.

    The last blocks keep theirs on the GPU, because the backward pass begins there.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stored: dict[int, list[Stored]] = {}
        # Tensors whose copies to CPU memory may still be under way.
        self.leaving: deque[tuple[Tensor, Stored]] = deque()

    def begin(self, index: int) -> bool:
        """Begin the list of block `index`; return False if it stores nothing here."""
        if index >= self.count or not torch.is_grad_enabled():
            return False
        self.stored[index] = []
        return True

    def lend(self, index: int, x: Tensor) -> Callable[[], Tensor]:
        """Return a function that gives `x` in the forward pass and its copy when recomputing."""
        stored, given, needs_gradient = self.put(index, x), [x], x.requires_grad

        def give() -> Tensor:
            if given:
                return given.pop()
            return self.take(index, stored).requires_grad_(needs_gradient)

        return give

    def queue(self, index: int) -> AttentionQueue:
        """Return a queue for the attention outputs of block `index`."""
        return AttentionQueue(self, index)

    def put(self, index: int, tensor: Tensor) -> Stored:
        """Begin to copy a tensor that block `index` stores to CPU memory."""
        stored = Stored(pinned(tensor.nbytes, self.device).view(tensor.dtype).view(tensor.shape))
        self.stored[index].append(stored)
        if self.copying is None:
            stored.on_cpu.copy_(tensor.detach())
            return stored
        while len(self.leaving) > 1:
            # The allocator may reuse the memory of a tensor only after its copy.
            self._wait_for(self.leaving.popleft()[1])
        self._copy(stored.on_cpu, tensor.detach(), stored)
        self.leaving.append((tensor.detach(), stored))
        return stored

    def take(self, index: int, stored: Stored) -> Tensor:
        """Return a tensor of a block on its device, and begin to fetch those of the block before.

        Each tensor can be taken once.
        """
        while self.leaving:
            self._wait_for(self.leaving.popleft()[1])
        own = self.stored[index]
        for one in (*own, *self.stored.get(index - 1, ())):
            self._fetch(one)
        own[:] = [one for one in own if one is not stored]
        tensor, stored.on_gpu = stored.on_gpu, None
        assert tensor is not None
        self._wait_for(stored)
        return tensor

    def _fetch(self, stored: Stored) -> None:
        if stored.on_gpu is not None:
            return
        if self.copying is None:
            stored.on_gpu = stored.on_cpu
            return
        stored.on_gpu = torch.empty_like(stored.on_cpu, device=self.copying.device)
        self._copy(stored.on_gpu, stored.on_cpu, stored)

    def _copy(self, target: Tensor, source: Tensor, stored: Stored) -> None:
        assert self.copying is not None
        self.copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copying):
            target.copy_(source, non_blocking=True)
            stored.copied = torch.cuda.Event()
            stored.copied.record()

    def _wait_for(self, stored: Stored) -> None:
        if stored.copied is not None:
            torch.cuda.current_stream().wait_event(stored.copied)


class AttentionQueue:
    """Keeps the self-attention outputs of a block in CPU memory until its backward pass."""

    def __init__(self, stream: ActivationStream, index: int) -> None:
        self.stream, self.index = stream, index
        self.results: deque[tuple[Stored, list[Any]]] = deque()

    def append(self, result: tuple[Any, ...]) -> None:
        """Store the results of an attention operator. Those after the first are small."""
        output, *others = result
        self.results.append((self.stream.put(self.index, output), others))

    def popleft(self) -> tuple[Any, ...]:
        """Return the results that were stored first."""
        stored, others = self.results.popleft()
        return self.stream.take(self.index, stored), *others
