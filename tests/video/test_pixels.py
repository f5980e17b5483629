"""Our conversion to yuv420p beside ffmpeg's."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch import Tensor

from cmdgen.video.pixels import to_levels, to_rgb24, to_unit, to_yuv420p
from cmdgen.video.read import read_video
from cmdgen.video.write import Output, open_video


def run_ffmpeg(data: np.ndarray, *arguments: str) -> np.ndarray:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", *arguments]
    command += ["-f", "rawvideo", "-"]
    done = subprocess.run(command, input=data.tobytes(), check=True, capture_output=True)
    return np.frombuffer(done.stdout, np.uint8)


def convert_by_ffmpeg(levels: np.ndarray) -> Tensor:
    """(N, H, W, 3) -> planes (N, 3 * H // 2, W) by swscale."""
    count, height, width, _ = levels.shape
    scale = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int"
    size = f"{width}x{height}"
    given = ("-pix_fmt", "rgb24", "-s", size, "-i", "-", "-vf", scale, "-pix_fmt", "yuv420p")
    planes = run_ffmpeg(levels, *given).reshape(count, 3 * height // 2, width)
    return torch.from_numpy(planes.copy())


def decode_by_ffmpeg(planes: Tensor) -> np.ndarray:
    """(N, 3 * H // 2, W) -> (N, H, W, 3) by swscale."""
    count, rows, width = planes.shape
    height = rows * 2 // 3
    scale = "scale=in_color_matrix=bt709:in_range=tv:flags=accurate_rnd+full_chroma_int"
    size = f"{width}x{height}"
    given = ("-pix_fmt", "yuv420p", "-s", size, "-i", "-", "-vf", scale, "-pix_fmt", "rgb24")
    return run_ffmpeg(planes.numpy(), *given).reshape(count, height, width, 3)


def noise(height: int, width: int) -> Tensor:
    """Every pixel its own colour, some of them beyond what there is."""
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2


def waves(height: int, width: int) -> Tensor:
    """Saturated colours that change slowly, and an edge."""
    t = torch.arange(3)[:, None, None] / 16
    y, x = torch.arange(height)[:, None] / 16, torch.arange(width) / 16
    pixels = torch.stack(
        torch.broadcast_tensors(torch.sin(x + t + 0 * y), torch.cos(y - t + 0 * x), torch.sin(x + y)), 1
    ).contiguous()
    pixels[:, :, height // 4 : height // 2, 7:19] = torch.tensor([0.9, -0.8, -0.7])[:, None, None]
    return pixels


def test_every_level_comes_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_levels(to_unit(levels)), levels)
    assert to_levels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    assert to_rgb24(to_unit(levels).view(1, 1, 16, 16).expand(2, 3, 16, 16)).shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("colour", "planes"),
    [
        # ITU-R BT.709 in limited range
        ((-1, -1, -1), (16, 128, 128)),
        ((1, 1, 1), (235, 128, 128)),
        ((1, -1, -1), (63, 102, 240)),
        ((-1, 1, -1), (173, 42, 26)),
        ((-1, -1, 1), (32, 240, 118)),
    ],
)
def test_primaries_have_the_levels_of_the_standard(colour, planes) -> None:
    pixels = torch.tensor(colour).view(1, 3, 1, 1).expand(2, 3, 8, 12)
    made = to_yuv420p(pixels)
    assert made.shape == (2, 12, 12) and made.dtype == torch.uint8
    for part, level in zip(made.flatten(1).split((96, 24, 24), dim=1), planes, strict=True):
        assert (part == level).all()


@pytest.mark.parametrize("size", [(64, 96), (34, 18), (16, 16)])
@pytest.mark.parametrize("make", [noise, waves])
def test_planes_are_those_of_ffmpeg(make, size) -> None:
    pixels = make(*size)
    levels = to_levels(pixels)
    theirs = convert_by_ffmpeg(to_rgb24(pixels).numpy()).int()
    # of the same levels: what is left is ffmpeg's fixed point
    same = (to_yuv420p(to_unit(levels)).int() - theirs).abs()
    assert same.max() <= 1 and same.float().mean() < 0.03
    # of the values themselves
    assert (to_yuv420p(pixels).int() - theirs).abs().max() <= 1


@pytest.mark.parametrize("make", [noise, waves])
def test_pictures_come_back_no_worse_than_by_ffmpeg(make) -> None:
    pixels = make(64, 96)
    exact = ((pixels.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).double().numpy()
    theirs = convert_by_ffmpeg(to_rgb24(pixels).numpy())
    errors = [((decode_by_ffmpeg(each) - exact) ** 2).mean() for each in (to_yuv420p(pixels), theirs)]
    assert errors[0] <= 1.001 * errors[1]


def test_order_of_memory_and_precision_change_nothing() -> None:
    pixels = noise(32, 48).bfloat16()
    expected = to_yuv420p(pixels.float())
    for given in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(to_yuv420p(given), expected)


@pytest.mark.parametrize("size", [(33, 32), (32, 33)])
def test_odd_sides_are_refused(size) -> None:
    with pytest.raises(ValueError, match=f"size {size[1]}x{size[0]} is odd"):
        to_yuv420p(noise(*size))


def test_planes_are_written_as_they_are_and_mean_the_same_colours(tmp_path) -> None:
    pixels = waves(48, 64)
    files = {"rgb24": to_rgb24(pixels), "yuv420p": to_yuv420p(pixels)}
    for name, frames in files.items():
        with open_video(Output(tmp_path / f"{name}.mp4", (48, 64), 8, {}, pixels=name)) as write:
            write(frames.numpy())
    exact = ((pixels + 1) * 127.5).permute(0, 2, 3, 1).double().numpy()
    errors = [((read_video(tmp_path / f"{name}.mp4")[0] - exact) ** 2).mean() for name in files]
    # another matrix or range is ten times as far
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.gpu
def test_planes_of_a_gpu_are_those_of_a_cpu() -> None:
    pixels = noise(64, 96)
    made = to_yuv420p(pixels.cuda())
    assert made.is_cuda
    # products are added up in another way
    differ = (made.cpu().int() - to_yuv420p(pixels).int()).abs()
    assert differ.max() <= 1 and differ.float().mean() < 1e-3
