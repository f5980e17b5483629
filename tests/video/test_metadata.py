import json
import struct
from base64 import b85decode
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cmdgen.files import parse_json
from cmdgen.video.formats import FORMATS, choose_encoding
from cmdgen.video.read import MOST_HEAD, read_metadata, read_video
from cmdgen.video.write import MOST_METADATA, write_still
from tests.videos import write_video

FRAMES = np.zeros((2, 16, 16, 3), np.uint8)
HOLDING = ("a.mp4", "a.webm", "a.mkv", "a.gif", "a.webp", "a.apng", "a.png")
# equal examples each time, few enough to be quick
STEADY = settings(derandomize=True, max_examples=25, deadline=None, database=None)


def make(path, about, **how):
    encoding = choose_encoding(str(path), **how)
    if encoding.format == "png":
        write_still(path, FRAMES[0], about, encoding)
    else:
        write_video(path, FRAMES, 8, about, encoding)


@pytest.mark.parametrize("name", HOLDING)
def test_metadata_comes_back_whatever_the_prompt_holds(tmp_path, name):
    prompt = 'a=b; #c \\ "é"\nnew\\\nline\r\n[STREAM]\ncomment=x 犬 🐕 \u202e\0\x7f'
    # more than an argument of a command may have
    metadata = {"prompt": prompt, "seed": 2**63 - 1, "guidance": 7.5, "negative": "🐕=" * 40_000}
    metadata["file"] = None
    make(tmp_path / name, metadata)
    assert read_metadata(tmp_path / name) == metadata
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_metadata_that_could_not_be_read_again_is_refused(tmp_path):
    for metadata, says in (({"a": "x" * MOST_METADATA}, "at most"), ({"a": float("nan")}, "JSON")):
        with pytest.raises(ValueError, match=says):
            make(tmp_path / "a.mp4", metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*HOLDING, "a.y4m"])
@pytest.mark.parametrize("asked", [True, False])
def test_metadata_is_left_out_on_request(tmp_path, name, asked):
    make(tmp_path / name, None if asked else {"prompt": "a secret dog"}, metadata=asked)
    assert b"secret" not in (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match="holds no metadata of cmdgen"):
        read_metadata(tmp_path / name)


@pytest.mark.parametrize("name", ["a.y4m", "a.raw", "%04d.png"])
def test_a_sidecar_is_read_where_the_file_has_no_metadata(tmp_path, name):
    make(tmp_path / name, {"seed": 3}, sidecar=True)
    assert read_metadata(tmp_path / name) == {"seed": 3}
    assert read_metadata(tmp_path / f"{name}.json") == {"seed": 3}


# of two frames, black and white, as version 0.1.0 wrote them
OLD = {
    "a.webp": (
        "Qb|Te`~Uy|S4BclR!}%t3IG5A3IG5A0RR92002QwNlgX-00960|Nj60K~7CZG5`Po000000003100961eE<LgR!}"
        "$~8UO$QFaZFa0V)Cj0ssKO5+$Sn18@NT{_d&(002QwO-3>R00000000000RR92004ae0034{I3OAT001-r0G$CU0"
        "ssO4000stqyPhO0RH~ncmMzZMOaBjTmS$7O-%qQ0000800D<-00aO40096102%-Q00001l7;{Q0000m0000i0000"
        "0K~qCXNdN!<dm>|PWM^e=B03^4E-@}JA}k_sa&K*LbRs$;VIX8&buchyHfJJz"
    ),
    "a.apng": (
        "iBL{Q4GJ0x0000DNk~Le00002000022m$~A0R7aOa{vGUFlkg+bYpLAZDnqB000000DB^1ZDeO<ZX!A&FfK7JFd{"
        "4>aB^>LaC9O%B4Hq8!?tH4eRgrn$^ZZW32;bRa{vGU000000RV(~7jpmr00?1YR7?N>00IC2008rilW+h402*dvR"
        "7?N>0000000IC200IC2000000000100;m8>(B^p0000ENkl<Zc${No00R~X1pojz00u;81!e#M02*dvR7?N>0096"
        "100IC200IC2000000000100;m8aHHb70000NW@JHB00002c${PW|NlP&0|N^K7ytky6axbcnrFNK0000<MNUMnLS"
        "TX"
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_files_of_older_versions_have_their_metadata(tmp_path, name):
    (tmp_path / name).write_bytes(b85decode(OLD[name]))
    assert read_metadata(tmp_path / name) == {"cmdgen": "0.1.0", "prompt": "a dög"}
    assert (read_video(tmp_path / name)[0] == np.array([0, 255]).reshape(2, 1, 1, 1)).all()


def test_every_format_keeps_its_metadata_somewhere():
    assert {each.name for each in FORMATS.values() if each.metadata} == {
        *("mp4", "webm", "mkv", "gif", "webp", "apng", "png", "safetensors")
    }


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def test_the_header_of_a_safetensors_is_read_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {"__metadata__": {"comment": '{"seed": 4}'}, "x": {"data_offsets": [0, 10**12]}}
    path.write_bytes(safetensors(json.dumps(header).encode()))
    assert read_metadata(path) == {"seed": 4}


def png_with(text: str) -> bytes:
    fields = PngInfo()
    fields.add_itxt("comment", text)
    Image.new("RGB", (4, 4)).save(stream := BytesIO(), "PNG", pnginfo=fields)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.mp4", b""),
        ("a.mp4", b"not a video\n" * 100),
        ("a.json", b"[1]"),
        ("a.json", b"[" * 1_000_000),
        ("a.json", b'{"a": ' * 100_000),
        ("a.json", b'{"a": NaN}'),
        ("a.json", b'{"a": 1e999}'),
        ("a.json", b'{"a": 1, "a": 2}'),
        ("a.json", b'{"a": "\\ud800"}'),
        ("a.json", b'{"a": ' + b"1" * 5000 + b"}"),
        ("a.json", b'{"a": "\xff"}'),
        ("a.json", b'{"a": "' + b"x" * MOST_HEAD + b'"}'),
        ("a.png", png_with("my dog")),
        ("a.png", png_with("[" * 100_000)),
        ("a.png", png_with("{}")[:40]),
        ("a.gif", b"GIF89a" + b"\xff" * 100),
        ("a.webp", b"RIFF\xff\xff\xff\xffWEBPEXIF\xff\xff\xff\xff" + b"\xff" * 100),
        ("a.webp", b"RIFF\0\0\0\0WEBP" + b"X\0\0\0\0\0\0\0" * 1000),
        ("a.jpg", b"\xff\xd8\xff" + b"\0" * 100),
        ("a.safetensors", b"\1"),
        ("a.safetensors", safetensors(b"{}", 2**63)),
        ("a.safetensors", safetensors(b"{}", MOST_HEAD)),
        ("a.safetensors", safetensors(b"[" * 100_000)),
        ("a.safetensors", safetensors(b'{"__metadata__": 3}')),
        ("a.safetensors", safetensors(b'{"__metadata__": {"comment": "{"}}')),
        ("a.mp4", b"#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"),
        ("a.mp4", b"ffconcat version 1.0\nfile 'other.mp4'\n"),
        ("a.mp4", b';FFMETADATA1\ncomment={"seed": 1}\n'),
    ],
)
def test_foreign_files_are_one_line(tmp_path, written, name, content):
    (tmp_path / "other.mp4").write_bytes(written("a.mp4", 2, 16, 16))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} holds no metadata of cmdgen") as caught:
        read_metadata(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.mp4 does not exist"):
        read_metadata(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="is not a file"):
        read_metadata(tmp_path)
    with pytest.raises(ValueError, match="too long"):
        read_metadata(tmp_path / ("a" * 300))


# neither has halves of letters
TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab\n=\\"), inner, max_size=4),
    max_leaves=10,
)


@STEADY
@given(metadata=st.dictionaries(TEXT, JSON, max_size=6))
def test_any_metadata_comes_back(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("any") / "a.png"
    make(path, metadata)
    assert read_metadata(path) == metadata


@STEADY
@given(text=st.binary() | st.text() | st.text('{}[]",:1e9\\u'))
def test_text_is_metadata_or_a_value_error(text):
    with suppress(ValueError):
        assert isinstance(parse_json(text), dict)


@STEADY
@given(
    name=st.sampled_from(["a.mp4", "a.gif", "a.webp", "a.apng", "a.png", "a.safetensors"]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    kept=st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_file_has_metadata_or_is_one_line(tmp_path_factory, written, name, changes, kept):
    ours = json.dumps({"seed": 1})
    made = {
        "a.png": lambda: png_with(ours),
        "a.safetensors": lambda: safetensors(json.dumps({"__metadata__": {"comment": ours}}).encode()),
    }
    data = bytearray(made[name]() if name in made else written(name, 2, 16, 16))
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(data[: int(kept * len(data))])
    try:
        assert isinstance(read_metadata(path), dict)
    except ValueError as error:
        assert "\n" not in str(error)
