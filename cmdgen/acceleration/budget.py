"""What decoding a clip holds in memory, and how finely to slice it to stay within a budget.

Bytes of tensors beside the weights, at the moment of most of them: what the operators in
`acceleration.slicer` and in the models make, counted from their shapes. Not counted is what a
library takes inside a single operator, such as a convolution's workspace, and what an allocator
keeps for later.
"""

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
    assert model.vae is not None
    pictures = batch * model.frames
    frame = model.height * model.width
    slices = Slices(frames=pictures, positions=1, pictures=batch)
    if moves := model.frames > 1:
        assert model.autoencoder is not None
        tokens = frame // (model.vae.stride * model.autoencoder.patch) ** 2
        slices = replace(slices, positions=batch * tokens)
        whole = max(LITTLE, decoding_peak(model, slices, dtype, batch=batch))
        while 2 * slices.pictures <= min(pictures, PIXELS // frame):
            more = replace(slices, pictures=2 * slices.pictures)
            if vae_decoding_peak(model, more, dtype, batch=batch) > whole:
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

    rows = model.height // model.vae.stride
    finest = Slices(frames=1, positions=1, pictures=1, strips=rows)
    if (least := decoding_peak(model, finest, dtype, batch=batch)) > max_memory:
        raise ValueError(
            f"max memory {max_memory / 1e6:g} MB: to decode {pictures} frames of "
            f"{model.width}x{model.height} takes at least {ceil(least / 1e6)} MB"
        )
    while moves and frame_decoding_peak(model, slices, dtype, batch=batch) > max_memory:
        frames, positions = ceil(slices.frames / 2), ceil(slices.positions / 2)
        slices = replace(slices, frames=frames, positions=positions)
    while vae_decoding_peak(model, slices, dtype, batch=batch) > max_memory:
        if slices.pictures > 1:
            slices = replace(slices, pictures=ceil(slices.pictures / 2))
        else:
            slices = replace(slices, strips=min(2 * slices.strips, rows))
    return slices


def decoding_peak(model: ModelConfig, slices: Slices, dtype: torch.dtype, *, batch: int = 1) -> int:
    """Bytes of decoding `batch` clips in these slices, from content and motion to frames."""
    vae = vae_decoding_peak(model, slices, dtype, batch=batch)
    if model.frames == 1:
        return vae
    return max(vae, frame_decoding_peak(model, slices, dtype, batch=batch))


def frame_decoding_peak(
    model: ModelConfig, slices: Slices, dtype: torch.dtype, *, batch: int = 1
) -> int:
    """Bytes of `slicer.decode_clip`."""
    config, vae = model.autoencoder, model.vae
    assert config is not None and vae is not None
    stride = vae.stride * config.patch
    tokens = model.height * model.width // stride**2
    frames, width = model.frames, config.width
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    clip = frames * batch * tokens * width * size
    # cosine and sine for each pair of channels, of queries and of keys
    rotations = 2 * (tokens + frames) * width * wide
    peaks = [
        # the sum is wide, its first term of one frame
        tokens * width * wide * (min(frames, max(1, slices.frames // batch)) + 1) * batch * 2,
        rotations + slices.positions * frames * _mixing(config, frames, size, wide),
        rotations
        + slices.frames
        * tokens
        # the feed-forward network has its input, its norm, 8 widths, and twice 4 from these
        * max(_mixing(config, tokens, size, wide), 18 * width * size),
        # a result, what it was before the bias, and its rearrangement
        3 * frames * batch * tokens * config.patch**2 * config.channels * size,
    ]
    return clip + max(peaks)


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
    model: ModelConfig, slices: Slices, dtype: torch.dtype, *, batch: int = 1
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


def _whole(config: VaeConfig, area: int, size: int) -> int:
    """Bytes of one picture, its latent of so many positions, as the modules decode it."""
    widths = config.block_out_channels[::-1]
    peaks = [_middle(config, area, size)]
    before = widths[0]
    for level, width in enumerate(widths):
        area_here = area * 4**level * size
        for i in range(config.layers_per_block + 1):
            # a block's input lives until its end
            kept, channels = (before, width) if i else (0, before)
            shortcut = 0 if channels == width else width
            peaks.append(
                area_here
                * (
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
            )
        if level < len(widths) - 1:
            # doubled, then convolved
            peaks.append(area_here * (before + width + 8 * width))
        before = width
    peaks.append(area * 4 ** (len(widths) - 1) * size * 3 * widths[-1])
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
    cast = 0 if size >= 4 else 4
    peaks = [_middle(config, rows * columns, size)]
    before = widths[0]
    # the first maps are parts of the middle block's
    whole = widths[0] * rows * columns * size
    for level, width in enumerate(widths):
        positions, across = rows * columns * 4**level, columns * 2**level
        high = strip_rows * 2**level

        def normalised(channels: int, high: int = high, across: int = across) -> int:
            """A strip with its halo, and the wide one that is cast to it."""
            return channels * across * ((high + 2) * size + high * cast)

        def measured(channels: int, high: int = high, across: int = across) -> int:
            """The deviations of a strip, and a wide copy of it."""
            return channels * across * high * (max(size, 4) + cast)

        for i in range(config.layers_per_block + 1):
            channels = width if i else before
            strip = width * across * high * size
            # its strips become those of the skip and of the hidden map, one after another
            maps = channels + width if channels == width else max(channels, 2 * width)
            # beside them the last row of the strip before, and that of this one
            edges = 2 * channels * across * size
            first = edges + max(normalised(channels) + strip, strip + measured(width), 2 * strip)
            second = edges + max(normalised(width) + strip, measured(width))
            peaks.append(whole + maps * positions * size + first)
            peaks.append(whole + 2 * width * positions * size + second)
        if level < len(widths) - 1:
            doubled = width * 2 * across * (2 * high + 4) * size
            strip = width * 2 * across * 2 * high * size
            peaks.append(
                whole
                + 4 * width * positions * size
                + 2 * width * across * size
                + max(doubled + normalised(width), measured(width, 2 * high, 2 * across))
            )
        whole, before = 0, width
    peaks.append(widths[-1] * positions * size + normalised(widths[-1]))
    return max(peaks)
