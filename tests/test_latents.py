import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cmdgen.config import CMD_SD15, CMD_SD21, MINI
from cmdgen.latents import Latents, check_fit, fit_model, latent_shapes, read_header, read_latents, save_latents
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.video.formats import describe_origin
from tests.conftest import tiny_config

# none of float32's
HUGE = torch.full((8, 16, 24), 1e300, dtype=torch.float64)
METADATA = {"model": "tiny", "prompt": "ein Hünd 🐕", "fps": 8}


@pytest.fixture
def latents():
    model = tiny_config()
    generator = torch.Generator().manual_seed(0)
    content, motion = (torch.randn(shape, generator=generator) for shape in latent_shapes(model))
    return Latents(content, motion, 8, METADATA)


@pytest.fixture
def file(latents, tmp_path):
    path = tmp_path / "clip.cmd.safetensors"
    save_latents(path, latents)
    return path


def test_a_file_gives_back_the_latents_bit_for_bit(latents, file):
    read = read_latents(file, tiny_config())
    assert torch.equal(read.content, latents.content)
    assert torch.equal(read.motion, latents.motion)
    assert (read.fps, read.metadata) == (8, METADATA)
    assert list(file.parent.iterdir()) == [file]


def test_a_file_is_safetensors_that_others_read(latents, file):
    assert torch.equal(load_file(file)["content"], latents.content)
    header = read_header(file)
    assert (header.content, header.motion) == ((8, 8, 12), (8, 4, 10))
    assert (header.dtype, header.fps, header.metadata) == ("float32", 8, METADATA)


def test_shapes_are_those_that_the_autoencoder_makes():
    model = tiny_config()
    autoencoder = CmdAutoencoder(model.autoencoder)
    frames = torch.zeros(1, 8, 4, model.height // model.vae.stride, model.width // model.vae.stride)
    with torch.no_grad():
        encoded = autoencoder.encode(frames)
    assert tuple(tuple(half.shape[1:]) for half in encoded) == latent_shapes(model)
    # the paper's: 64x64 latents, 16 frames, patches of 2
    assert latent_shapes(CMD_SD15) == ((4, 64, 64), (8, 16, 64))
    assert latent_shapes(CMD_SD21) == ((4, 64, 128), (8, 16, 96))


def test_latents_say_which_size_and_length_the_model_is_asked_for():
    for model in (MINI, CMD_SD21, replace(MINI, frames=6, height=48, width=96)):
        fitted = fit_model(replace(model, frames=2, height=16, width=16), *latent_shapes(model))
        assert (fitted.frames, fitted.height, fitted.width) == (*(model.frames, model.height, model.width),)


@pytest.mark.parametrize(
    ("content", "motion", "says"),
    [
        ((4, 16, 24), (8, 4, 20), r"content given is of shape \[4, 16, 24\], .* tiny have \[8"),
        ((8, 16, 24), (8, 4, 21), r"motion given is of shape \[8, 4, 21\], .* have \[8, 4, 20\]"),
        ((8, 16, 24), (8, 1, 20), "motion of 1 frame: a clip has 2 or more"),
        ((8, 16, 24), (8, 5, 20), "frames 5 is neither 1 nor a multiple of 2"),
        ((8, 16, 25), (8, 4, 20), "both sides must be multiples of 16"),
    ],
)
def test_latents_of_another_model_are_refused(content, motion, says, tmp_path):
    path = tmp_path / "other.safetensors"
    save_latents(path, Latents(torch.zeros(content), torch.zeros(motion), 8, {}))
    with pytest.raises(ValueError, match=says) as error:
        read_latents(path, tiny_config())
    assert str(error.value).startswith(f"{path}: ")


def test_what_is_given_must_fit_what_is_asked_for(latents):
    model = tiny_config()
    content, motion = tuple(latents.content.shape), tuple(latents.motion.shape)
    check_fit(model, content, motion)
    check_fit(model, None, None)
    with pytest.raises(ValueError, match=r"given is of shape \[8, 4, 10\], 6 frames of 48x32 by tiny have"):
        check_fit(replace(model, frames=6), None, motion)
    with pytest.raises(ValueError, match="no autoencoder: it makes stills"):
        check_fit(replace(model, autoencoder=None), content, None)


def test_files_are_kept_unless_they_are_to_be_replaced(latents, file):
    other = replace(latents, metadata={"fps": 8})
    with pytest.raises(FileExistsError, match="exists: give another name"):
        save_latents(file, other)
    assert read_latents(file).metadata == METADATA
    save_latents(file, other, overwrite=True)
    assert read_latents(file).metadata == {"fps": 8}


def test_a_file_that_cannot_be_written_leaves_nothing(latents, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        save_latents(tmp_path / "no" / "clip.safetensors", latents)
    broken = replace(latents, metadata={"fps": 8, "what": object()})
    with pytest.raises(TypeError):
        save_latents(tmp_path / "clip.safetensors", broken)
    assert not list(tmp_path.iterdir())


def test_origin_of_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "1.png")
    for name in ("1.png", "%d.png"):
        with pytest.raises(ValueError, match=r"1\.png is not a file"):
            describe_origin(tmp_path / name)


def test_origin_has_a_name_that_is_text(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.mp4")
    path.write_bytes(b"")
    assert describe_origin(path)["file"] == r"\xff.mp4"


def test_a_file_that_would_be_hashed_for_minutes_is_refused(tmp_path):
    with (tmp_path / "a.mp4").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"a\.mp4 is larger than 16 GiB: cut the part out"):
        describe_origin(tmp_path / "a.mp4")


def test_origin_is_what_sha256sum_says(tmp_path):
    path = tmp_path / "abc.mp4"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert describe_origin(path) == {"file": "abc.mp4", "sha256": known}
    # pictures one after another
    for number, text in enumerate(("a", "b", "c")):
        (tmp_path / f"{number}.png").write_text(text)
    assert describe_origin(tmp_path / "%d.png") == {"file": "%d.png", "sha256": known}
    for none in ("none.mp4", "%d.jpg"):
        with pytest.raises(FileNotFoundError):
            describe_origin(tmp_path / none)


def write(path, tensors=None, **header):
    """A file that is one of ours but for what is said."""
    shapes = {"content": (8, 16, 24), "motion": (8, 4, 20)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()} | (tensors or {})
    header = {"cmdgen_latents": "1", "comment": '{"fps": 8}'} | header
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata=header)
    return path


@pytest.mark.parametrize(
    ("tensors", "header", "says"),
    [
        ({}, {"cmdgen_latents": "2"}, "version '2' of latents is not supported, 1 is"),
        ({}, {"comment": "{"}, "comment is no JSON of ours: '{'"),
        ({}, {"comment": "[" * 10**5}, "comment is no JSON of ours"),
        ({}, {"comment": '{"fps": NaN}'}, "comment is no JSON of ours"),
        ({}, {"comment": "[8]"}, "comment is no JSON of ours"),
        ({}, {"comment": "{}"}, "fps None is not a whole number from 1 to 240"),
        ({}, {"comment": '{"fps": true}'}, "fps True is not"),
        ({}, {"comment": '{"fps": 1e9}'}, "fps 1000000000.0 is not"),
        ({"motion": None}, {}, r"holds tensors \['content'\], expected content and motion"),
        ({"more": torch.zeros(1)}, {}, r"holds tensors \['content', 'more', 'motion'\]"),
        ({"content": torch.zeros(8, 16)}, {}, r"content has shape \[8, 16\], expected three"),
        ({"motion": torch.zeros(8, 0, 20)}, {}, r"motion has shape \[8, 0, 20\], expected three"),
        ({"motion": torch.zeros(8, 4, 20).int()}, {}, "motion has type I32, not one of F64, F32"),
        ({"motion": torch.full((8, 4, 20), torch.nan)}, {}, "motion has NaN or inf"),
        ({"content": torch.full((8, 16, 24), 1e300, dtype=torch.float64)}, {}, "content has NaN or inf"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_in_a_line(tensors, header, says, tmp_path):
    path = write(tmp_path / "x.safetensors", tensors, **header)
    with pytest.raises(ValueError, match=says) as error:
        read_latents(path, tiny_config())
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_weights_and_what_is_no_file_are_refused(tiny_model, tmp_path):
    weights = tiny_model / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="not latents of cmdgen: its header has no cmdgen_latents"):
        read_latents(weights)
    with pytest.raises(ValueError, match="is not a file"):
        read_header(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize("length", [2**20 + 1, 2**63])
def test_a_header_larger_than_ours_is_not_read(length, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{" + b" " * 2**21)
    with pytest.raises(ValueError, match="they are never this large"):
        read_header(path)


def test_a_file_larger_than_ours_is_not_read(tmp_path):
    path = write(tmp_path / "x.safetensors")
    with path.open("r+b") as file:
        # a hole: it takes no place
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="they are never this large"):
        read_latents(path)


def test_halves_of_precision_are_read(tmp_path):
    path = write(tmp_path / "x.safetensors", {"motion": torch.full((8, 4, 20), 0.5).bfloat16()})
    assert read_latents(path).motion.dtype == torch.float32
    assert read_header(path).dtype == "bfloat16 and float32"


# JSON as deep and odd as it comes, with what the header is made of among it
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "F4", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 2**64), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | JSON,
    }
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_bytes_are_latents_or_one_line_of_error(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    whole = write(path).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    kind = data.draw(st.sampled_from(["bytes", "cut", "flip", "header"]))
    if kind == "bytes":
        content = data.draw(st.binary(max_size=64))
    elif kind == "cut":
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "flip":
        at = data.draw(st.integers(0, 8 + length - 1))
        content = whole[:at] + data.draw(st.binary(min_size=1, max_size=4)) + whole[at + 1 :]
    else:
        key = data.draw(st.sampled_from(["content", "motion", "__metadata__", "more"]))
        header[key] = data.draw(ENTRY | JSON)
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + whole[8 + length :]
    path.write_bytes(content)
    try:
        read = read_latents(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert read.content.isfinite().all() and read.motion.isfinite().all()
        assert 1 <= read.fps <= 240
