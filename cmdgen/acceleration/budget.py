"""What decoding and encoding a clip hold in memory, and how finely to slice to stay in a budget.

Bytes of tensors beside the weights, at the moment of most of them: what the operators in
`acceleration.slicer` and in the models make, counted from their shapes. Not counted is what a
library takes inside a single operator, such as a convolution's workspace, and what an allocator
keeps for later.
"""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import torch

from cmdgen.acceleration.slicer import Slices
from cmdgen.config import AutoencoderConfig, ModelConfig, VaeConfig

# unless memory says otherwise: tokens in a slice, which a CPU's caches then hold beside weights
SLICE_BYTES = {"cpu": 2**19}
# and pixels that go through the VAE at a time: more of them are not faster
PIXELS = 2**15
# bytes that are of no account
LITTLE = 2**25

# model, slices, dtype, how many clips -> bytes
Peak = Callable[[ModelConfig, Slices, torch.dtype, int], int]


def choose_slices(
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 1,
    max_memory: int | None = None,
) -> Slices:
    """The largest slices that keep decoding `batch` clips within `max_memory` bytes, if given.

    Otherwise those that are fastest of what takes no more than whole clips through the autoencoder
    and a frame of each through the VAE.
    Raises ValueError where no slices are small enough.
    """
    peaks = frame_decoding_peak, vae_decoding_peak
    return _choose("decode", *peaks, model, dtype, device, batch, max_memory)


def choose_encoding_slices(
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 1,
    max_memory: int | None = None,
) -> Slices:
    """`choose_slices` for encoding: frames to latents by the VAE, these to content and motion."""
    peaks = frame_encoding_peak, vae_encoding_peak
    return _choose("encode", *peaks, model, dtype, device, batch, max_memory)


def _choose(
    verb: str,
    autoencoder_peak: Peak,
    vae_peak: Peak,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    max_memory: int | None,
) -> Slices:
    def peak(slices: Slices) -> int:
        of_vae = vae_peak(model, slices, dtype, batch)
        if not moves:
            return of_vae
        return max(of_vae, autoencoder_peak(model, slices, dtype, batch))

    pictures = batch * model.frames
    frame = model.height * model.width
    slices = Slices(frames=pictures, positions=1, pictures=batch)
    if moves := model.frames > 1:
        assert model.autoencoder is not None
        _, tokens = _tokens(model)
        slices = replace(slices, positions=batch * tokens)
        whole = max(LITTLE, peak(slices))
        while 2 * slices.pictures <= min(pictures, PIXELS // frame):
            more = replace(slices, pictures=2 * slices.pictures)
            if vae_peak(model, more, dtype, batch) > whole:
                break
            slices = more
        if device.type in SLICE_BYTES:
            length = SLICE_BYTES[device.type] // (model.autoencoder.width * dtype.itemsize)
            slices = replace(
                slices,
                frames=min(slices.frames, max(1, length // tokens)),
                positions=min(slices.positions, max(1, length // model.frames)),
            )
    if max_memory is None:
        return slices

    rows = model.height // _stride(model)
    finest = Slices(frames=1, positions=1, pictures=1, strips=rows)
    if (least := peak(finest)) > max_memory:
        raise ValueError(
            f"max memory {max_memory / 1e6:g} MB: to {verb} {pictures} frames of "
            f"{model.width}x{model.height} takes at least {ceil(least / 1e6)} MB"
        )
    while moves and autoencoder_peak(model, slices, dtype, batch) > max_memory:
        frames, positions = ceil(slices.frames / 2), ceil(slices.positions / 2)
        slices = replace(slices, frames=frames, positions=positions)
    while vae_peak(model, slices, dtype, batch) > max_memory:
        if slices.pictures > 1:
            slices = replace(slices, pictures=ceil(slices.pictures / 2))
        else:
            slices = replace(slices, strips=min(2 * slices.strips, rows))
    return slices


def decoding_peak(model: ModelConfig, slices: Slices, dtype: torch.dtype, batch: int = 1) -> int:
    """Bytes of decoding `batch` clips in these slices, from content and motion to frames."""
    vae = vae_decoding_peak(model, slices, dtype, batch)
    if model.frames == 1:
        return vae
    return max(vae, frame_decoding_peak(model, slices, dtype, batch))


def frame_decoding_peak(
    model: ModelConfig, slices: Slices, dtype: torch.dtype, batch: int = 1
) -> int:
    """Bytes of `slicer.decode_clip`."""
    config, tokens = _tokens(model)
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    clip = model.frames * batch * tokens * config.width * size
    together = min(model.frames, max(1, slices.frames // batch))
    return clip + max(
        # the sum is wide, its first term of one frame
        tokens * config.width * wide * (together + 1) * batch * 2,
        _blocks(config, tokens, model.frames, slices, size),
        # a result, what it was before the bias, and its rearrangement
        3 * model.frames * batch * tokens * config.patch**2 * config.channels * size,
    )


def frame_encoding_peak(
    model: ModelConfig, slices: Slices, dtype: torch.dtype, batch: int = 1
) -> int:
    """Bytes of `slicer.encode_clip`, with the latents that it is given."""
    config, tokens = _tokens(model)
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    places = model.frames * batch * tokens
    latents = places * config.patch**2 * config.channels
    return (
        places * config.width * size
        + latents * size
        + max(
            # rearranged
            latents * size,
            _blocks(config, tokens, model.frames, slices, size),
            # weights before and after the softmax, and what is weighted; the bias as above
            latents * max(3 * size, size + 2 * wide + (0 if size == wide else wide)),
        )
    )


def _tokens(model: ModelConfig) -> tuple[AutoencoderConfig, int]:
    """The autoencoder, and how many tokens it makes of a frame."""
    config = model.autoencoder
    assert config is not None
    return config, model.height * model.width // (_stride(model) * config.patch) ** 2


def _stride(model: ModelConfig) -> int:
    """Pixels along one side of what the autoencoder works on, which may be pixels."""
    return 1 if model.vae is None else model.vae.stride


def _blocks(config: AutoencoderConfig, tokens: int, frames: int, slices: Slices, size: int) -> int:
    """Bytes of the groups of the autoencoder's blocks, beside the clip."""
    width, wide = config.width, max(4, size)
    # cosine and sine for each pair of channels, of queries and of keys
    rotations = 2 * (tokens + frames) * width * wide
    # the feed-forward network has its input, its norm, 8 widths, and twice 4 from these
    in_space = max(_mixing(config, tokens, size, wide), 18 * width * size)
    in_time = _mixing(config, frames, size, wide)
    return rotations + max(slices.positions * frames * in_time, slices.frames * tokens * in_space)


def _mixing(config: AutoencoderConfig, length: int, size: int, wide: int) -> int:
    """Bytes for each token of attention among `length` of them, its norm and projections."""
    width, heads = config.width, config.heads
    # the norm, queries, keys and values, and the first two of these turned
    projected = 6 * width * size
    turning = 4 * width * size + (0 if size == wide else 4 * width * wide)
    if config.attention == "gated" and length > config.attention_threshold * (width // heads):
        # twice over the features, with what a product or softmax makes of it, and contiguous copies
        scores = 3 * heads * config.attention_features * wide
    else:
        scores = 3 * heads * length * wide if length <= _short(size) else 0
    return projected + max(turning, 3 * width * size + scores)


def _short(size: int) -> int:
    """Rows up to this have all their scores in memory on a CPU; fused kernels never have them."""
    return 256 if size == 2 else 32


def vae_decoding_peak(
    model: ModelConfig, slices: Slices, dtype: torch.dtype, batch: int = 1
) -> int:
    """Bytes of `slicer.decode_pictures` of one slice, with the clip's latents and its frames."""
    config = model.vae
    assert config is not None
    area = model.height * model.width
    latents = area // config.stride**2 * config.latent_channels
    # in the order of clips, and in that of decoding
    held = batch * model.frames * (3 * area + 2 * latents * dtype.itemsize)
    # those of a slice: unscaled, in another order of memory, and after a convolution
    held += 3 * slices.pictures * latents * dtype.itemsize
    rows, columns = model.height // config.stride, model.width // config.stride
    size = dtype.itemsize
    if slices.strips == 1:
        return held + slices.pictures * _whole(config, rows * columns, size)
    return held + slices.pictures * _in_strips(config, rows, columns, slices.strips, size)


def vae_encoding_peak(
    model: ModelConfig, slices: Slices, dtype: torch.dtype, batch: int = 1
) -> int:
    """Bytes of `slicer.encode_pictures` of one slice, with the clip's frames and its latents.

    Frames are bytes, of which each slice makes its values; without a VAE, all are made.
    """
    config = model.vae
    area, size = model.height * model.width, dtype.itemsize
    if config is None:
        return batch * model.frames * 3 * area * (1 + 2 * max(4, size))
    latents = area // config.stride**2 * config.latent_channels
    # those of each slice, and then of all
    held = batch * model.frames * (3 * area + 2 * latents * size)
    # the values of a slice, before the last operation on them or in another order of memory
    held += slices.pictures * 2 * 3 * area * max(4, size)
    if slices.strips == 1:
        return held + slices.pictures * _whole_encoder(config, area, size)
    rows, columns = model.height // config.stride, model.width // config.stride
    return held + slices.pictures * _encoder_in_strips(config, rows, columns, slices.strips, size)


def _whole(config: VaeConfig, area: int, size: int) -> int:
    """Bytes of one picture, its latent of so many positions, as the modules decode it."""
    widths = config.block_out_channels[::-1]
    peaks = [_middle(config, area, size)]
    before = widths[0]
    for level, width in enumerate(widths):
        area_here = area * 4**level * size
        peaks.append(area_here * _resnets(before, width, config.layers_per_block + 1))
        if level < len(widths) - 1:
            # doubled, then convolved
            peaks.append(area_here * (before + width + 8 * width))
        before = width
    peaks.append(area * 4 ** (len(widths) - 1) * size * 3 * widths[-1])
    return max(peaks)


def _whole_encoder(config: VaeConfig, area: int, size: int) -> int:
    """Bytes of one picture of so many positions, as the modules encode it, beside its values."""
    widths = config.block_out_channels
    peaks = [_middle(config, area // config.stride**2, size)]
    before = widths[0]
    for level, width in enumerate(widths):
        area_here = area // 4**level * size
        peaks.append(area_here * _resnets(before, width, config.layers_per_block))
        if level < len(widths) - 1:
            # padded, which is little more, then convolved
            edge = 2 * ceil(area**0.5) * size
            peaks.append(area_here * (before + 2 * width + ceil(width / 4)) + width * edge)
        before = width
    return max(peaks)


def _resnets(before: int, width: int, layers: int) -> int:
    """Channels, at once, of a block's residual blocks, the first of which has `before` of them."""
    peaks = []
    for i in range(layers):
        # a block's input lives until its end
        kept, channels = (before, width) if i else (0, before)
        shortcut = 0 if channels == width else width
        peaks.append(
            kept
            + max(
                # the norm and its activation, the convolution of that
                3 * channels,
                2 * channels + width,
                # once more, beside the first result
                channels + 3 * width,
                # the sum with the skip
                channels + shortcut + 2 * width,
            )
        )
    return max(peaks)


def _middle(config: VaeConfig, area: int, size: int) -> int:
    """Bytes up to the end of the middle block: a map, its norm, queries, keys, values, outputs."""
    width, wide = config.block_out_channels[-1], max(4, size)
    scores = 3 * area * area * wide if area <= _short(size) else 0
    return 8 * area * width * size + scores


def _in_strips(config: VaeConfig, rows: int, columns: int, strips: int, size: int) -> int:
    """Bytes of one picture, its latent of so many rows and columns, in strips of the rows."""
    widths = config.block_out_channels[::-1]
    strip_rows = ceil(rows / strips)
    peaks = [_middle(config, rows * columns, size)]
    before = widths[0]
    # the first maps are parts of the middle block's
    whole = widths[0] * rows * columns * size
    for level, width in enumerate(widths):
        positions, across = rows * columns * 4**level, columns * 2**level
        high = strip_rows * 2**level
        layers = config.layers_per_block + 1
        resnets = _resnets_in_strips(before, width, layers, positions, across, high, size)
        peaks.append(whole + resnets)
        if level < len(widths) - 1:
            doubled = width * 2 * across * (2 * high + 4) * size
            peaks.append(
                whole
                + 4 * width * positions * size
                + 2 * width * across * size
                + max(
                    doubled + _window(width, across, high, size),
                    _moments(width, 2 * across, 2 * high, size),
                )
            )
        whole, before = 0, width
    peaks.append(widths[-1] * positions * size + _window(widths[-1], across, high, size))
    return max(peaks)


def _encoder_in_strips(config: VaeConfig, rows: int, columns: int, strips: int, size: int) -> int:
    """Bytes of one picture, its latent of so many rows and columns, beside its values."""
    widths, stride = config.block_out_channels, config.stride
    strip_rows = ceil(rows / strips)
    peaks = [_middle(config, rows * columns, size)]
    before = widths[0]
    for level, width in enumerate(widths):
        scale = stride // 2**level
        positions, across, high = rows * columns * scale**2, columns * scale, strip_rows * scale
        layers = config.layers_per_block
        peaks.append(_resnets_in_strips(before, width, layers, positions, across, high, size))
        if level < len(widths) - 1:
            # a strip and its result beside all of them
            padded = (high + 1) * (across + 1)
            peaks.append(width * size * (positions + padded + ceil(high * across / 4)))
        before = width
    return max(peaks)


def _resnets_in_strips(
    before: int, width: int, layers: int, positions: int, across: int, high: int, size: int
) -> int:
    """Bytes of a block's residual blocks, on strips of so many rows of a map."""
    peaks = []
    for i in range(layers):
        channels = width if i else before
        strip = width * across * high * size
        # its strips become those of the skip and of the hidden map, one after another
        maps = channels + width if channels == width else max(channels, 2 * width)
        # beside them the last row of the strip before, and that of this one
        edges = 2 * channels * across * size
        window, moments = _window(width, across, high, size), _moments(width, across, high, size)
        first = max(_window(channels, across, high, size) + strip, strip + moments, 2 * strip)
        peaks.append(maps * positions * size + edges + first)
        peaks.append(2 * width * positions * size + edges + max(window + strip, moments))
    return max(peaks)


def _window(channels: int, across: int, high: int, size: int) -> int:
    """Bytes of a strip with its halo, and of the wide one that is cast to it."""
    return channels * across * ((high + 2) * size + high * _cast(size))


def _moments(channels: int, across: int, high: int, size: int) -> int:
    """Bytes of the deviations of a strip, and of a wide copy of it."""
    return channels * across * high * (max(size, 4) + _cast(size))


def _cast(size: int) -> int:
    """Bytes of a number's wide copy, if it needs one."""
    return 0 if size >= 4 else 4
