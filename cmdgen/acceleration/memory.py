"""Memory: bytes of tensors that are alive at once, and the largest slices that stay in a limit.

What decoding and encoding hold is counted, not derived: the operators of `acceleration.slicer` run
on the meta device, where a tensor has a shape and no values. Bytes are beside the weights. Not
counted is what a library takes inside one operator, such as a convolution's workspace, and what an
allocator keeps for later.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial, reduce
from itertools import zip_longest
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmdgen.acceleration.slicer import decode_clip, decode_pictures, encode_clip, encode_pictures
from cmdgen.config import ModelConfig
from cmdgen.latents import latent_shapes
from cmdgen.models.attention import MOST_ROWS
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices
from cmdgen.video.pixels import to_rgb24, to_unit
from cmdgen.weights import build_empty
from cmdgen_kernels.gated_attention import is_short, plain_attention

# without a limit: bytes of the tokens in a slice, which a CPU's caches then hold beside weights
SLICE_BYTES = {"cpu": 2**19}
# and values of the VAE's largest map that are made at a time: more of them are not faster
MAP_VALUES = 2**20


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators made while it was entered: those alive, and the most.

    Not counted: tensors that were there before, what an operator takes and gives back inside, and
    under `inference_mode` what it takes that is made of others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, which takes a second, to keep it out of here
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = evaluate(function, args, kwargs)
        # torch keeps the Python object of a storage for as long as the storage lives
        given, held = (
            {id(storage): storage for storage in map(Tensor.untyped_storage, _tensors(values))}
            for values in ((args, kwargs), result)
        )
        for key in held.keys() - given.keys():
            self._add(size := held[key].nbytes())
            weakref.finalize(held[key], self._add, -size)
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


class FusedAttention(TorchFunctionMode):
    """Attention as libraries run it, without scores of long rows; the meta device has none."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return plain_attention(*args) if is_short(args[0]) else torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors that `run` makes and holds at once, on any device."""
    with torch.no_grad(), LiveBytes() as counter:
        run()
    return counter.peak


@dataclass(frozen=True)
class Work:
    """Clips of one model that are decoded, or encoded, together, on the meta device."""

    model: ModelConfig
    dtype: torch.dtype
    batch: int = 1
    verb: str = "decode"

    @cached_property
    def vae(self) -> KlVae | None:
        """Build the VAE, without residual blocks that hold the same as those before them."""
        if self.model.vae is None:
            return None
        layers = 1 if self.verb == "decode" else min(2, self.model.vae.layers_per_block)
        return build_empty(KlVae, replace(self.model.vae, layers_per_block=layers)).to(self.dtype)

    @cached_property
    def autoencoder(self) -> CmdAutoencoder | None:
        """Build the autoencoder; one block is enough, as it holds nothing when it has ended."""
        if self.model.autoencoder is None:
            return None
        return build_empty(CmdAutoencoder, replace(self.model.autoencoder, depth=1, decoder_depth=None)).to(self.dtype)

    @property
    def runs(self) -> "tuple[Run, ...]":
        """Return what the VAE runs and, for videos, what the autoencoder runs."""
        return (run_vae, run_autoencoder) if self.model.frames > 1 and self.model.autoencoder else (run_vae,)

    def peak(self, slices: Slices) -> int:
        """Return the most bytes of tensors at once, beside the weights."""
        return max(count_peak(run, self, slices) for run in self.runs)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """() -> a tensor without values."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def latents(self) -> Tensor:
        """() -> (B, T, C, h, w)."""
        vae, autoencoder = self.model.vae, self.model.autoencoder
        channels = vae.latent_channels if vae else autoencoder.channels if autoencoder else 3
        return self.empty(self.batch, self.model.frames, channels, *self.model.latent_size)


# a network's operators in these slices
Run = Callable[[Work, Slices], object]


def run_vae(work: Work, slices: Slices) -> None:
    """Run a first slice, beside all frames and two copies of all latents."""
    shape = work.batch * work.model.frames, 3, work.model.height, work.model.width
    frames = work.empty(*shape, dtype=torch.uint8)
    latents = [work.latents().flatten(0, 1) for _ in range(2)]
    if work.verb == "encode":
        pictures = to_unit(frames[: slices.pictures])
        if work.vae is not None:
            encode_pictures(work.vae, pictures.to(work.dtype), slices.strips)
    elif work.vae is not None:
        together = slices.pictures if work.model.vision is None else work.model.frames
        to_rgb24(decode_pictures(work.vae, latents[0][:together], slices.strips))


def run_autoencoder(work: Work, slices: Slices) -> None:
    """Run all clips: latents to content and motion, or the other way."""
    assert work.autoencoder is not None
    if work.verb == "encode":
        encode_clip(work.autoencoder, work.latents().transpose(1, 2), slices)
        return
    content, motion = (work.empty(work.batch, *shape) for shape in latent_shapes(work.model))
    decode_clip(work.autoencoder, content, motion, slices)


@cache
def count_peak(run: Run, work: Work, slices: Slices) -> int:
    """Return the most bytes that a run holds at once, beside the weights."""
    _ = work.vae, work.autoencoder
    with FusedAttention():
        return peak_bytes(partial(run, work, slices))


def choose_slices(work: Work, device: torch.device, max_memory: int | None = None) -> Slices:
    """Return the largest slices in which the work holds at most `max_memory` bytes.

    Without a limit, return the fastest slices, and count nothing. Raises ValueError where the
    smallest slices hold more.
    """
    slices, (rows, _) = _fastest_slices(work, device), work.model.latent_size
    if max_memory is None:
        return slices
    if work.model.vision is not None:
        raise ValueError(f"max memory: {work.model.name} decodes all frames together, in no less memory")
    for run in work.runs:
        while count_peak(run, work, slices) > max_memory:
            smaller = _cut(run, slices, rows)
            if smaller == slices:
                least = work.peak(Slices(frames=1, positions=1, pictures=1, strips=rows))
                model, count = work.model, work.batch * work.model.frames
                raise ValueError(
                    f"max memory {max_memory / 1e6:g} MB: to {work.verb} {count} frames of "
                    f"{model.width}x{model.height} takes at least {ceil(least / 1e6)} MB"
                )
            slices = smaller
    return slices


def _fastest_slices(work: Work, device: torch.device) -> Slices:
    """Return whole clips, a frame of each through the VAE; on a CPU, what its caches hold."""
    model, (height, width) = work.model, work.model.latent_size
    frames, pictures = work.batch * model.frames, work.batch
    if model.frames == 1 or model.autoencoder is None:
        return Slices(frames, positions=1, pictures=pictures)
    tokens = height * width // model.autoencoder.patch**2
    positions = work.batch * tokens
    if model.vae is not None:
        values = model.height * model.width * model.vae.block_out_channels[0]
        while 2 * pictures <= min(frames, MAP_VALUES // values):
            pictures *= 2
    positions = min(positions, MOST_ROWS)
    if device.type in SLICE_BYTES:
        length = SLICE_BYTES[device.type] // (model.autoencoder.width * work.dtype.itemsize)
        frames = min(frames, max(1, length // tokens))
        positions = min(positions, max(1, length // model.frames))
    return Slices(frames, positions, pictures)


def _cut(run: Run, slices: Slices, rows: int) -> Slices:
    """Return slices half as large, where a run can have them; at most so many `rows` of strips."""
    if run is run_autoencoder:
        frames, positions = ceil(slices.frames / 2), ceil(slices.positions / 2)
        return replace(slices, frames=frames, positions=positions)
    # strips are slower: single pictures come first
    if slices.pictures > 1:
        return replace(slices, pictures=ceil(slices.pictures / 2))
    return replace(slices, strips=min(2 * slices.strips, rows))


# The shape functions of these operators are Python, and the first of them imports torch's compiler,
# which takes a second. On the meta device others of the same result take their place.
_POINTWISE = {
    *("add", "sub", "rsub", "mul", "div", "pow", "exp", "sqrt", "cos", "sin", "tanh", "gelu", "silu"),
    *("addcmul", "round", "clamp"),
}
aten = torch.ops.aten
_STAND_INS: dict[object, Callable[..., object]] = {
    aten.arange.default: lambda end, **options: torch.empty(end, **{"dtype": torch.long} | options),
    aten.eq.Scalar: lambda x, _: torch.empty_like(x, dtype=torch.bool),
    aten.index.Tensor: lambda x, indices: _index(x, indices),
    aten.addmm.default: lambda bias, x, weight: aten.mm(x, weight),
    aten.mean.dim: aten.sum.dim_IntList,
    aten.polar.default: aten.complex.default,
    aten.upsample_bilinear2d.default: lambda x, size, *_: aten.upsample_nearest2d(x, size),
    aten.native_layer_norm.default: lambda x, *_: (x.new_empty(x.shape), x[:0], x[:0]),
    aten.native_group_norm.default: lambda x, *_: (torch.empty_like(x), x[:0], x[:0]),
    aten.cat.default: lambda parts, dim=0: _join(parts, dim),
    aten.stack.default: lambda parts, dim=0: _join([part.unsqueeze(dim) for part in parts], dim),
}


def evaluate(function: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator; on the meta device without its shape function where there is another way."""
    tensors = _tensors(args)
    device = tensors[0].device if tensors else kwargs.get("device")
    if device is None or device.type != "meta":
        return function(*args, **kwargs)
    if function._schema.is_mutable:
        return kwargs.get("out", args[0])
    name = function._schema.name.removeprefix("aten::")
    if name not in _POINTWISE or not all(x.is_floating_point() or x.is_complex() for x in tensors):
        return _STAND_INS.get(function, function)(*args, **kwargs)
    sizes = zip_longest(*(reversed(tensor.shape) for tensor in tensors), fillvalue=1)
    shape = tuple(max(size) for size in sizes)[::-1]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    # in the largest one's order of memory
    return torch.empty_like(max(tensors, key=Tensor.numel).expand(shape), dtype=dtype)


def _index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Return a tensor of the size that indices of the first axes give."""
    first = [index.shape for index in indices if index is not None and index.dtype != torch.bool]
    if len(first) < len(indices):
        return aten.index.Tensor(x, indices)
    return x.new_empty(*torch.broadcast_shapes(*first), *x.shape[len(indices) :])


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """Return a tensor of all parts' size along one axis; padding keeps the order of memory."""
    first, *others = parts
    padding = [0, 0] * (first.ndim - 1 - dim % first.ndim) + [0, sum(x.shape[dim] for x in others)]
    return F.pad(first, padding)


def _tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
