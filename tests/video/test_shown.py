"""What a person sees in a player or a viewer is what is read."""

import struct

import numpy as np
import pytest
from PIL import Image

from cmdgen.video import read
from cmdgen.video.read import read_clip, read_video

QUARTERS = ((220, 40, 30), (30, 180, 60), (40, 60, 220), (230, 220, 40))


def quarters(side: int) -> np.ndarray:
    """(H, W, 3): one colour in each quarter."""
    colours = np.array(QUARTERS, np.uint8).reshape(2, 2, 3)
    return colours.repeat(side // 2, 0).repeat(side // 2, 1)


def seen(path: object) -> np.ndarray:
    """Read the middles of the quarters of a file's first frame."""
    clip, _ = read_clip(path, frames=2, size=(64, 64), fps=8)
    return clip[0, 16::32, 16::32].reshape(4, 3).astype(int)


@pytest.fixture
def film(tmp_path, ffmpeg):
    """Writes the quarters through ffmpeg's filters and options."""

    def write(name: str, *options: object, side: int = 64, count: int = 4):
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{side}x{side}", "-r", "8", "-i", "-"]
        done = ffmpeg("-v", "error", *raw, *options, name, folder=tmp_path, data=quarters(side).tobytes() * count)
        assert not done.returncode, done.stderr
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("curve", "most"), [("arib-std-b67", 16), ("smpte2084", 16), ("bt709", 8)], ids=["HLG", "PQ", "BT.2020"]
)
def test_wide_gamuts_and_hdr_keep_their_colours(film, curve, most):
    convert = f"zscale=tin=bt709:pin=bt709:min=gbr:rin=pc:t={curve}:p=bt2020:m=bt2020nc:r=tv:npl=203"
    tags = ["-colorspace", "bt2020nc", "-color_primaries", "bt2020", "-color_trc", curve]
    how = ["-c:v", "libx265", "-x265-params", "log-level=error", "-crf", "5"]
    path = film("a.mov", "-vf", f"{convert},format=yuv420p10le", *how, *tags)
    assert np.abs(seen(path) - QUARTERS).max() <= most


@pytest.mark.parametrize(("side", "matrix"), [(720, "bt709"), (240, "bt601")])
def test_colours_without_a_tag_go_by_the_size_of_the_frame(film, side, matrix):
    how = ["-c:v", "libx264", "-preset", "ultrafast", "-crf", "4", "-color_range", "tv"]
    untag = ["-bsf:v", "h264_metadata=matrix_coefficients=2:colour_primaries=2:transfer_characteristics=2"]
    path = film("a.h264", "-vf", f"scale=out_color_matrix={matrix},format=yuv420p", *how, *untag, side=side, count=2)
    assert np.abs(seen(path) - QUARTERS).max() <= 6


def test_interlaced_fields_become_frames(tmp_path, ffmpeg):
    # a bar that moves by 2 pixels a field: the fields of one frame show it at two places
    bars = np.zeros((16, 64, 64, 3), np.uint8)
    for number, frame in enumerate(bars):
        frame[:, 2 * number : 2 * number + 16] = 255
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x64", "-r", "16", "-i", "-"]
    woven = ["-vf", "interlace=scan=tff:lowpass=off", "-flags", "+ildct+ilme", "-c:v", "libx264", "-x264opts", "tff=1"]
    done = ffmpeg("-v", "error", *raw, *woven, "-qp", "4", "a.mp4", folder=tmp_path, data=bars.tobytes())
    assert not done.returncode, done.stderr
    frame = read_video(tmp_path / "a.mp4")[0][4].astype(float)
    # a comb differs from line to line
    assert np.abs(np.diff(frame[8:-8], axis=0)).mean() < 1


def box(name: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I4s", 8 + len(data), name) + data


def full(name: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(name, struct.pack(">I", version << 24 | flags), *parts)


def find(data: bytes, name: bytes) -> bytes:
    place = data.index(name)
    (size,) = struct.unpack(">I", data[place - 4 : place])
    return data[place - 4 : place - 4 + size]


@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_in_tiles_is_whole_and_upright(tmp_path, ffmpeg, turned):
    side, tiles = 64, []
    for colour in QUARTERS:
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{side}x{side}", "-i", "-", "-frames:v", "1"]
        convert = ["-vf", "scale=out_color_matrix=bt601:out_range=pc,format=yuvj420p", "-c:v", "libx265"]
        how = ["-x265-params", "log-level=error:qp=8:info=0", "-tag:v", "hvc1", "-y", "tile.mp4"]
        data = np.full((side, side, 3), colour, np.uint8).tobytes()
        assert not ffmpeg("-v", "error", *raw, *convert, *how, folder=tmp_path, data=data).returncode
        file = (tmp_path / "tile.mp4").read_bytes()
        tiles.append((find(file, b"hvcC"), find(file, b"mdat")[8:]))
    items = [*(data for _, data in tiles), struct.pack(">BBBBHH", 0, 0, 1, 1, 2 * side, 2 * side)]
    sizes = [full(b"ispe", struct.pack(">II", size, size)) for size in (side, 2 * side)]
    colours = box(b"colr", b"nclx", struct.pack(">HHHB", 1, 13, 6, 128))
    # properties by their numbers from 1: the last turns by 90 degrees counter-clockwise
    properties = box(b"ipco", tiles[0][0], *sizes, colours, full(b"pixi", bytes([3, 8, 8, 8])), box(b"irot", b"\1"))
    whole = [3, 4, 5, *([0x86] if turned else [])]
    rows = [struct.pack(">HB4B", i, 4, 0x81, 2, 4, 5) for i in range(1, 5)]
    owners = full(b"ipma", struct.pack(">I", 5), *rows, struct.pack(">HB", 5, len(whole)), bytes(whole))
    kinds = [b"hvc1"] * 4 + [b"grid"]
    infos = [
        full(b"infe", struct.pack(">HH4s", i, 0, kind), b"\0", version=2, flags=kind == b"hvc1")
        for i, kind in enumerate(kinds, 1)
    ]
    start = box(b"ftyp", b"heic", struct.pack(">I", 0), b"mif1heic")

    def describe(place: int) -> bytes:
        extents = []
        for i, item in enumerate(items, 1):
            extents.append(struct.pack(">HHHII", i, 0, 1, place, len(item)))
            place += len(item)
        return full(
            b"meta",
            full(b"hdlr", b"\0" * 4, b"pict", b"\0" * 13),
            full(b"pitm", struct.pack(">H", 5)),
            full(b"iloc", b"\x44\x00", struct.pack(">H", 5), *extents),
            full(b"iinf", struct.pack(">H", 5), *infos),
            full(b"iref", box(b"dimg", struct.pack(">HH4H", 5, 4, 1, 2, 3, 4))),
            box(b"iprp", properties, owners),
        )

    head = start + describe(len(start) + len(describe(0)) + 8)
    path = tmp_path / "a.heic"
    path.write_bytes(head + box(b"mdat", *items))
    expected = np.rot90(np.array(QUARTERS).reshape(2, 2, 3), 1 if turned else 0).reshape(4, 3)
    assert np.abs(seen(path) - expected).max() <= 8
    clip, source = read_clip(path, frames=3, size=(16, 16), fps=8)
    assert (source.width, source.held, (clip == clip[0]).all()) == (2 * side, 0, True)
    assert read_video(path)[0].shape == (1, 2 * side, 2 * side, 3)


def test_an_ffmpeg_that_does_not_join_tiles_is_found_out(film, monkeypatch):
    path = film("a.mkv", "-c:v", "ffv1", count=1)
    monkeypatch.setattr(read, "_choose_filters", lambda file: ("V:0", [], [], {64, 128}))
    with pytest.raises(ValueError, match=r"a\.mkv is a picture in tiles: this ffmpeg reads one"):
        seen(path)


@pytest.mark.parametrize("suffix", ["bmp", "tiff", "ppm", "tga", "jp2"])
def test_pictures_of_other_kinds_are_read(tmp_path, suffix):
    Image.fromarray(quarters(64)).save(tmp_path / f"a.{suffix}")
    assert np.abs(seen(tmp_path / f"a.{suffix}") - QUARTERS).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "I;16"])
def test_pictures_of_other_modes_are_read(tmp_path, mode):
    picture = np.full((8, 8), 255 if mode != "I;16" else 65_535, np.uint8 if mode != "I;16" else np.uint16)
    image = Image.fromarray(picture) if mode == "I;16" else Image.fromarray(picture).convert(mode)
    image.save(tmp_path / "a.tiff")
    assert (read_video(tmp_path / "a.tiff")[0] == 255).all()


def profile(*columns: tuple[float, float, float]) -> bytes:
    """Return an ICC profile of gamma 1 whose red, green and blue are these colours, XYZ."""
    number = lambda value: struct.pack(">i", round(value * 65_536))  # noqa: E731
    tags = {
        name: b"XYZ \0\0\0\0" + b"".join(map(number, xyz))
        for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }
    tags |= {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(number, (0.9642, 1, 0.8249)))}
    tags |= {name: b"curv\0\0\0\0\0\0\0\1\x02\x33\0\0" for name in (b"rTRC", b"gTRC", b"bTRC")}
    tags |= {b"desc": b"desc\0\0\0\0\0\0\0\2x\0" + b"\0" * 78, b"cprt": b"text\0\0\0\0x\0\0\0"}
    table, data, place = b"", b"", 132 + 12 * len(tags)
    for name, body in tags.items():
        body += b"\0" * (-len(body) % 4)
        table += struct.pack(">4sII", name, place + len(data), len(body))
        data += body
    size = place + len(data)
    head = struct.pack(">I4xI4s4s4s12x4s", size, 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head = head.ljust(68, b"\0") + b"".join(map(number, (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


@pytest.mark.parametrize("transparent", [False, True])
def test_colours_go_by_the_profile_of_a_picture(tmp_path, transparent):
    # sRGB's primaries at D50, red and blue in each other's place
    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    image = Image.fromarray(quarters(64))
    if transparent:
        image.putalpha(255)
    image.save(tmp_path / "a.png", icc_profile=profile(blue, green, red))
    assert np.abs(seen(tmp_path / "a.png") - np.array(QUARTERS)[:, ::-1]).max() <= 20
    image.save(tmp_path / "b.png", icc_profile=b"no profile")
    assert np.abs(seen(tmp_path / "b.png") - QUARTERS).max() == 0


def test_a_photograph_with_a_second_picture_in_it_is_the_first(tmp_path):
    first, second = Image.fromarray(quarters(64)), Image.new("RGB", (64, 64))
    first.save(tmp_path / "a.mpo", format="MPO", save_all=True, append_images=[second], quality=95)
    frames, _ = read_video(tmp_path / "a.mpo")
    assert len(frames) == 1 and frames.mean() > 50


def test_a_gif_that_asks_for_no_time_is_shown_as_players_do(tmp_path):
    pages = [Image.new("L", (8, 8), level) for level in (0, 100, 200)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=10)
    clip, source = read_clip(tmp_path / "a.gif", frames=3, size=(8, 8), fps=10)
    assert source.fps == pytest.approx(10) and len({int(frame.mean()) for frame in clip}) == 3


def test_a_sequence_may_be_of_other_pictures(tmp_path):
    for number in range(3):
        Image.new("L", (8, 8), 100 * number).save(tmp_path / f"f-{number}.jpg")
    clip, _ = read_clip(tmp_path / "f-%d.jpg", frames=3, size=(8, 8), fps=8)
    assert np.abs(clip[:, 0, 0, 0].astype(int) - [0, 100, 200]).max() <= 2


def test_a_damaged_film_says_so(film, tmp_path):
    path = film("a.h264", "-c:v", "libx264", "-preset", "ultrafast", "-g", "4", "-qp", "8", count=16)
    assert not read_clip(path, frames=16, size=(16, 16), fps=None)[1].damaged
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 3, len(data), 97):
        data[place] ^= 0x55
    (tmp_path / "b.h264").write_bytes(data)
    assert read_clip(tmp_path / "b.h264", frames=16, size=(16, 16), fps=None)[1].damaged


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "CMYK", "I;16"])
def test_a_picture_whose_rows_are_converted_in_turn_is_the_same(mode: str, tmp_path, monkeypatch) -> None:
    file = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    noise = np.random.default_rng(0).integers(0, 255, (9, 7, 4), np.uint8)
    picture = Image.fromarray(noise[..., 0].astype(np.uint16) * 257 if mode == "I;16" else noise)
    picture.convert(mode).save(file) if mode != "I;16" else picture.save(file)
    whole, _ = read_video(file)
    monkeypatch.setattr(read, "_PIXELS_TOGETHER", 14)
    assert np.array_equal(read_video(file)[0], whole)


def test_what_is_transparent_in_an_avif_is_white_in_each_of_its_frames(tmp_path):
    frames = []
    for colour in QUARTERS[:3]:
        frame = np.full((64, 64, 4), (*colour, 255), np.uint8)
        frame[:, 32:, 3] = 0
        frames.append(Image.fromarray(frame))
    frames[0].save(tmp_path / "still.avif", quality=95)
    frames[0].save(tmp_path / "film.avif", quality=95, save_all=True, append_images=frames[1:], duration=250)
    # as a picture without transparency, which ffmpeg shows
    frames[0].convert("RGB").save(tmp_path / "plain.avif", quality=95)
    for name, colours in (("still.avif", QUARTERS[:1]), ("film.avif", QUARTERS[:3])):
        shown, _ = read_video(tmp_path / name, max_frames=4)
        assert len(shown) == len(colours)
        assert np.abs(shown[:, 32, 16].astype(int) - colours).max() <= 6
        assert (shown[:, 32, 48] >= 250).all()
    clip, source = read_clip(tmp_path / "film.avif", frames=8, size=(64, 64), fps=8)
    assert (source.fps, source.seconds, source.held) == (4, 0.75, 2)
    assert np.abs(clip[:6, 32, 16].astype(int) - np.repeat(QUARTERS[:3], 2, axis=0)).max() <= 6
    assert np.abs(read_video(tmp_path / "plain.avif", max_frames=1)[0][0, 32, 48].astype(int) - QUARTERS[0]).max() <= 6
