"""Memory: bytes of tensors that are alive at once, and the largest slices that stay in a limit.

What decoding and encoding hold is counted, not derived: the operators of `acceleration.slicer` run
on the meta device, where a tensor has a shape and no values. Bytes are beside the weights. Not
counted is what a library takes inside one operator, such as a convolution's workspace, and what an
allocator keeps for later. UNets that look along time are counted too, and with all weights.
"""

import copy
import weakref
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial, reduce
from itertools import product, zip_longest
from math import ceil
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmdgen.acceleration.rehash import CutUNet
from cmdgen.acceleration.slicer import decode_clip, decode_pictures, encode_clip, encode_pictures
from cmdgen.acceleration.video import in_slices, in_turn
from cmdgen.config import ModelConfig, UNetConfig, VaeConfig
from cmdgen.latents import latent_shapes
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.temporal import MotionAdapter
from cmdgen.models.text import ClipTextModel
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.models.vision import ClipVisionModel
from cmdgen.request import Plan, Slices
from cmdgen.video.pixels import to_rgb24, to_unit
from cmdgen.weights import build_empty
from cmdgen_kernels.gated_attention import is_short, plain_attention
from cmdgen_kernels.time_attention import MOST_ROWS

# without a limit: bytes of the tokens in a slice, which a CPU's caches then hold beside weights
SLICE_BYTES = {"cpu": 2**19}
# with one, ways to run a UNet that looks along time, the fastest first
WAYS: list[dict[str, Any]] = [
    *({"bytes": size} for size in (None, 2**28, 2**26, 2**24)),
    *({"bytes": size, "in_turn": True} for size in (2**24, 2**22, 1)),
]
# of a model, what its networks do not depend on
_SAME: dict[str, Any] = {"name": "", "steps": 1, "sampler": "", "guidance": 1.0, "guidance_first": None, "frames": 1}
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
    # features that are kept from step to step, and the frames of one window, None for all
    features: int = 0
    window: int | None = None
    # "cuda": the runs run, with random weights
    device: str = "meta"

    @classmethod
    def of(cls, plan: Plan, dtype: torch.dtype, batch: int = 1) -> "Work":
        """Return the work of a batch of clips with one plan."""
        kept = plan.key_steps is not None and plan.model.looks_along_time
        return cls(plan.model, dtype, batch, features=kept * len(plan.windows), window=plan.window)

    @property
    def least(self) -> int:
        """Return the bytes of the smallest slices."""
        smallest = WAYS[-1] | {"staged": True} if self.model.looks_along_time else {}
        return self.need(Slices(frames=1, positions=1, pictures=1, strips=self.model.latent_size[0], **smallest))

    @property
    def networks(self) -> dict[str, Any]:
        """Build those of a model that looks along time, by folder."""
        return _build(replace(self.model, **_SAME), self.dtype, self.device)

    def weights(self, *names: str) -> int:
        """Return the bytes of these networks' weights, of all without a name."""
        parts = (self.networks[name] for name in names or self.networks)
        return sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())

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
        """Return what the VAE runs and, for videos, what the autoencoder or a UNet that looks along time runs."""
        if self.model.looks_along_time:
            return run_reader, run_unet, run_vae
        return (run_vae, run_autoencoder) if self.model.frames > 1 and self.model.autoencoder else (run_vae,)

    @property
    def kept(self) -> int:
        """Return the bytes that no slices change: of all frames, and of two copies of all latents."""
        return self.frames().nbytes + 2 * self.latents().nbytes

    def peak(self, slices: Slices) -> int:
        """Return the most bytes of tensors at once, beside the weights."""
        # wherever the weights are
        return max(count_peak(run, self, replace(slices, staged=False)) for run in self.runs)

    def beside(self, run: "Run", *, staged: bool) -> int:
        """Return the bytes of weights that count beside a run: of a UNet that looks along time alone, they do."""
        if not self.model.looks_along_time:
            return 0
        # of a stage alone
        read = {"run_unet": ("unet",), "run_vae": ("vae",)}
        reader = ("text_encoder",) if self.model.vision is None else ("image_encoder", "vae")
        return self.weights(*(read.get(run.__name__, reader) if staged else ()))

    def need(self, slices: Slices) -> int:
        """Return the most bytes at once, of tensors and of the weights that count."""
        held, staged = replace(slices, staged=False), slices.staged
        return max(count_peak(run, self, held) + self.beside(run, staged=staged) for run in self.runs)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """() -> a tensor without values."""
        make = torch.empty if self.device == "meta" else torch.zeros
        return make(shape, dtype=dtype or self.dtype, device=self.device)

    def frames(self) -> Tensor:
        """() -> (B * T, 3, H, W) uint8."""
        return self.empty(self.batch * self.model.frames, 3, self.model.height, self.model.width, dtype=torch.uint8)

    def latents(self) -> Tensor:
        """() -> (B, T, C, h, w)."""
        vae, autoencoder = self.model.vae, self.model.autoencoder
        channels = vae.latent_channels if vae else autoencoder.channels if autoencoder else 3
        return self.empty(self.batch, self.model.frames, channels, *self.model.latent_size)


# a network's operators in these slices
Run = Callable[[Work, Slices], object]


def run_vae(work: Work, slices: Slices) -> None:
    """Run a first slice, beside all frames and two copies of all latents."""
    frames = work.frames()
    latents = [work.latents().flatten(0, 1) for _ in range(2)]
    if work.verb == "encode":
        pictures = to_unit(frames[: slices.pictures])
        if work.vae is not None:
            encode_pictures(work.vae, pictures.to(work.dtype), slices.strips)
    elif work.vae is not None:
        together = work.model.frames if work.model.decodes_clips else slices.pictures
        to_rgb24(decode_pictures(work.vae, latents[0][:together], slices.strips))


def run_autoencoder(work: Work, slices: Slices) -> None:
    """Run all clips: latents to content and motion, or the other way."""
    assert work.autoencoder is not None
    if work.verb == "encode":
        encode_clip(work.autoencoder, work.latents().transpose(1, 2), slices)
        return
    content, motion = (work.empty(work.batch, *shape) for shape in latent_shapes(work.model))
    decode_clip(work.autoencoder, content, motion, slices)


def run_reader(work: Work, slices: Slices) -> None:
    """Run what reads texts, or the picture: CLIP, and the VAE's encoder in float32."""
    model = work.model
    if model.text is not None:
        ids = work.empty(work.batch + 1, model.text.max_position_embeddings, dtype=torch.long)
        work.networks["text_encoder"](ids)
    if model.vision is not None:
        side = model.vision.image_size
        work.networks["image_encoder"](work.empty(1, 3, side, side))
        # in float32, a copy of its weights with it
        vae = copy.deepcopy(work.networks["vae"]).float()
        vae.encode(work.empty(work.batch, 3, model.height, model.width, dtype=torch.float32))


def run_unet(work: Work, slices: Slices) -> None:
    """Run a step, beside all latents in float32, the sampler's and what it makes of them."""
    model, unet = work.model, work.networks["unet"]
    clips = work.batch * (1 if max(model.guidance, model.guidance_first or 0) == 1 else 2)
    rows = clips * (work.window or model.frames)
    # of other windows
    features = [
        work.empty(rows, unet.config.block_out_channels[0], *model.latent_size) for _ in range(work.features - 1)
    ]
    latents = [work.latents().float() for _ in range(4)]
    sample = work.empty(rows, unet.config.in_channels, *model.latent_size)
    tokens = 1 if model.text is None else model.text.max_position_embeddings
    text = unet.project_text(work.empty(clips, tokens, unet.config.cross_attention_dim))
    time = unet.project_time(work.empty(clips), work.empty(clips, 3) if model.vision else None)
    network = in_slices(unet, slices)
    step = CutUNet(network).run if work.features else network.denoise
    in_turn(step, slices)(sample, time, *text)
    del latents, features


@lru_cache(maxsize=4)
def _build(model: ModelConfig, dtype: torch.dtype, device: str) -> dict[str, Any]:
    unet = build_empty(UNet, cast(UNetConfig, model.content))
    if model.adapter is not None:
        unet.attach(build_empty(MotionAdapter, model.adapter))
    networks: dict[str, Any] = {"unet": unet, "vae": build_empty(KlVae, cast(VaeConfig, model.vae))}
    if model.text is not None:
        networks["text_encoder"] = build_empty(ClipTextModel, model.text)
    if model.vision is not None:
        networks["image_encoder"] = build_empty(ClipVisionModel, model.vision)
    if device == "meta":
        return {name: network.to(dtype) for name, network in networks.items()}
    networks = {name: network.to(dtype).to_empty(device=device) for name, network in networks.items()}
    for network in networks.values():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.02)
    return networks


@cache
def count_peak(run: Run, work: Work, slices: Slices) -> int:
    """Return the most bytes that a run holds at once, beside the weights."""
    # weights are not counted
    _ = work.networks if work.model.looks_along_time else None, work.vae, work.autoencoder
    with FusedAttention():
        return peak_bytes(partial(run, work, slices))


def choose_slices(work: Work, device: torch.device, max_memory: int | None = None) -> Slices:
    """Return the largest slices in which the work holds at most `max_memory` bytes.

    Of a UNet that looks along time, with all weights, or those of each stage alone. Without a limit,
    return the fastest slices, and count nothing. Raises ValueError where the smallest slices hold more.
    """
    fastest, model = _fastest_slices(work, device), work.model
    if max_memory is None:
        return fastest
    ways = WAYS if model.looks_along_time else [{}]

    def fit(way: dict[str, Any], *, staged: bool) -> Slices | None:
        slices: Slices | None = replace(fastest, **way)
        for run in work.runs:
            slices = slices and _fit(run, work, slices, max_memory - work.beside(run, staged=staged))
        return slices and replace(slices, staged=staged)

    # each holds less than those before it
    first = bisect_left(ways, True, key=lambda way: fit(way, staged=True) is not None)
    for way, staged in product(ways[first : first + 1], (False, True)):
        # weights that are read again for each clip cost less than smaller slices at each step
        if (slices := fit(way, staged=staged)) is not None:
            return slices
    doing = f"to {work.verb}" if model.autoencoder else "to make"
    raise ValueError(
        f"max memory {max_memory / 1e6:g} MB: {doing} {work.batch * model.frames} frames of "
        f"{model.width}x{model.height} takes at least {ceil(work.least / 1e6)} MB"
    )


def _fit(run: Run, work: Work, slices: Slices, room: int) -> Slices | None:
    """Return slices, these or smaller ones, in which a run has enough of so many bytes; None where it has not."""
    while count_peak(run, work, slices) > room:
        smaller = _cut(run, work, slices)
        if smaller == slices:
            return None
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


def _cut(run: Run, work: Work, slices: Slices) -> Slices:
    """Return slices half as large, where a run can have them."""
    if run is run_autoencoder:
        frames, positions = ceil(slices.frames / 2), ceil(slices.positions / 2)
        return replace(slices, frames=frames, positions=positions)
    if run is not run_vae or work.model.decodes_clips:
        return slices
    # strips are slower: single pictures come first
    if slices.pictures > 1:
        return replace(slices, pictures=ceil(slices.pictures / 2))
    return replace(slices, strips=min(2 * slices.strips, work.model.latent_size[0]))


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
    aten.native_group_norm.default: lambda x, *rest: (torch.empty_like(x), *x.new_empty((2, rest[2], rest[5]))),
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
