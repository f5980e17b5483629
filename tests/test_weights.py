"""Model folders: what is written is read back, and nothing that a stranger wrote gets further."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cmdgen.config import CMD_SD15, MINI, NoiseConfig, UNetConfig, VaeConfig
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.schema import read_config, write_config
from cmdgen.weights import hash_weights, load_weights, read_tensors, save_tensors

TINY = VaeConfig(block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def error_of(folder: Path, cls: type = KlVae) -> str:
    """The one line that loading a folder ends with."""
    with pytest.raises(ValueError) as error:
        cls.from_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def vae_folder(tmp_path: Path) -> Path:
    KlVae(TINY).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_half_precision_files_load_to_the_dtype_asked_for(tmp_path: Path) -> None:
    vae = KlVae(TINY)
    vae.save_pretrained(tmp_path, dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / KlVae.filename).values()} == {torch.float16}
    for asked, got in ((None, torch.float32), (torch.float64, torch.float64)):
        loaded = KlVae.from_pretrained(tmp_path, dtype=asked)
        assert {parameter.dtype for parameter in loaded.parameters()} == {got}
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        assert not loaded.training
    weight = vae.quant_conv.weight.detach().half().float()
    assert torch.equal(KlVae.from_pretrained(tmp_path).quant_conv.weight, weight)


def test_shards_and_the_fp16_variant_are_found(vae_folder: Path) -> None:
    whole = vae_folder / KlVae.filename
    state = load_file(whole)
    variant = vae_folder / "diffusion_pytorch_model.fp16.safetensors"
    whole.rename(variant)
    assert KlVae.from_pretrained(vae_folder).config == TINY
    variant.unlink()
    names = {name: f"part{i % 2}.safetensors" for i, name in enumerate(state)}
    for part in set(names.values()):
        save_file({n: state[n].clone() for n in state if names[n] == part}, vae_folder / part)
    # of a variant it has had two names
    for index in (
        *(f"{KlVae.filename}.index.json", f"{KlVae.filename}.index.fp16.json"),
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ):
        index = vae_folder / index
        index.write_text(json.dumps({"weight_map": names}))
        loaded = KlVae.from_pretrained(vae_folder).state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        index.rename(index.with_name("other.json"))
    index.with_name("other.json").rename(index)
    index.write_text(json.dumps({"weight_map": {"a": "../part0.safetensors"}}))
    assert "names of files in the folder" in error_of(vae_folder)


def test_written_files_are_readable_as_the_umask_says(vae_folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in vae_folder.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a readable safetensors file"),
        (lambda data: data[:100], "not a readable safetensors file"),
        (lambda data: data[:-1], "not a readable safetensors file"),
        (lambda data: b"\x00" * len(data), "not a readable safetensors file"),
        (lambda data: struct.pack("<Q", 2**63) + data[8:], "not a readable safetensors file"),
    ],
)
def test_a_damaged_file_is_named(vae_folder: Path, damage, message: str) -> None:
    path = vae_folder / KlVae.filename
    path.write_bytes(damage(path.read_bytes()))
    error = error_of(vae_folder)
    assert message in error and str(path) in error


def test_missing_unexpected_and_misshapen_tensors_are_named(vae_folder: Path) -> None:
    path, name = vae_folder / KlVae.filename, "quant_conv.weight"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if key != name}, path)
    assert error_of(vae_folder) == f"{path}: tensor {name} is missing"
    save_file({**state, "extra": torch.zeros(1)}, path)
    assert error_of(vae_folder) == f"{path}: tensor 'extra' is not part of the model"
    save_file({**state, name: torch.zeros(2)}, path)
    assert error_of(vae_folder) == f"{path}: {name} has shape [2], expected [8, 8, 1, 1]"
    save_file({**state, name: state[name].to(torch.int8)}, path)
    assert error_of(vae_folder) == f"{path}: {name} has type I8, not one of F64, F32, F16, BF16"
    path.unlink()
    assert error_of(vae_folder) == f"{path}: No such file or directory"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "mish"}, "act_fn 'mish' is not supported, only 'silu' is"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name 'AutoencoderTiny' is not supported"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDown"]}, "down_block_types"),
        ({"use_quant_conv": False}, "use_quant_conv False is not supported"),
        ({"latent_channels": "4"}, "latent_channels '4' is not a whole number"),
        ({"latent_channels": True}, "latent_channels True is not a whole number"),
        ({"latent_channels": -4}, "latent_channels -4 is not between 1"),
        ({"latent_channels": 10**30}, "is not between 1"),
        ({"latent_channels": 10**400}, "is not between 1"),
        ({"layers_per_block": 10**6}, "layers_per_block 1000000 is not between 1 and 256"),
        ({"block_out_channels": []}, "block_out_channels [] is not a list"),
        ({"block_out_channels": [4, None]}, "block_out_channels None is not a whole number"),
        ({"block_out_channels": {"a": 1}}, "block_out_channels {'a': 1} is not a list"),
        ({"scaling_factor": float("nan")}, "scaling_factor nan is not between"),
        ({"scaling_factor": 0}, "scaling_factor 0.0 is not between"),
        ({"norm_num_groups": 3}, "num_channels"),
    ],
)
def test_a_hostile_vae_configuration_is_one_line(vae_folder: Path, changes: dict[str, object], message: str) -> None:
    path = vae_folder / "config.json"
    edit(path, **changes)
    error = error_of(vae_folder)
    assert error.startswith(f"{path}: ") and message in error and len(error) < 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not supported"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types 'AttnDownBlock2D' is"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types has 1 entries"),
        ({"attention_head_dim": [4, 4.5, 4]}, "attention_head_dim 4.5 is not a whole number"),
        ({"attention_head_dim": 7}, "is not a multiple of heads 7"),
    ],
)
def test_a_hostile_unet_configuration_is_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_config(MINI.content, tmp_path)
    edit(tmp_path / "config.json", **changes)
    error = error_of(tmp_path, UNet)
    assert str(tmp_path / "config.json") in error and message in error


@pytest.mark.parametrize("part", ["config.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "a link to itself"])
def test_what_is_no_file_is_refused_and_nothing_waits_for_it(vae_folder: Path, part: str, kind: str) -> None:
    path = vae_folder / part
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else path)
    assert error_of(vae_folder).startswith(str(path))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ud800", "null"])
def test_what_is_not_an_object_in_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert str(tmp_path / "config.json") in error_of(tmp_path)


def test_a_stock_scheduler_is_read_and_an_unsupported_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    stock = {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_start": 0.00085}
    stock |= {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "steps_offset": 1}
    stock |= {"set_alpha_to_one": False}
    path.write_text(json.dumps({**stock, "trained_betas": None, "clip_sample": False}))
    assert read_config(tmp_path, NoiseConfig) == CMD_SD15.noise
    edit(path, prediction_type="score")
    with pytest.raises(ValueError, match="prediction_type 'score' is not supported, expected"):
        read_config(tmp_path, NoiseConfig)


def test_weights_load_into_a_built_module_without_sharing(tmp_path: Path) -> None:
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_tensors(tmp_path / "linear.safetensors", source.state_dict())
    load_weights(target, tmp_path, "linear.safetensors")
    with torch.no_grad():
        target.weight.add_(1)
    load_weights(source, tmp_path, "linear.safetensors")
    assert torch.equal(source.weight + 1, target.weight)


LOAD = """
import sys, torch
from torch import nn
from cmdgen.weights import build_empty, load_weights

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def build(width):
    layers = [nn.Conv2d(width, width, 3) for _ in range(16)]
    return nn.ModuleList([*layers, *(nn.Linear(width, 9 * width) for _ in range(16))])

model = build_empty(build, 512)
before = memory("VmRSS")
load_weights(model, sys.argv[1], "model.safetensors", dtype=getattr(torch, sys.argv[2]))
# what is mapped takes memory once it is used
right = {bool((tensor == 0.5).all()) for tensor in model.state_dict().values()}
size = sum(tensor.nbytes for tensor in model.state_dict().values())
layouts = {part.weight.is_contiguous(memory_format=torch.channels_last) for part in model[:16]}
print((memory("VmHWM") - before) / size, right == layouts == {True})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path, dtype: str) -> None:
    """Half filters, half matrices, 151 MB in half precision."""
    width = 512
    shapes = {f"{i}.weight": (width, width, 3, 3) for i in range(16)}
    shapes |= {f"{i}.weight": (9 * width, width) for i in range(16, 32)}
    shapes |= {f"{i}.bias": (width if i < 16 else 9 * width,) for i in range(32)}
    state = {name: torch.full(shape, 0.5, dtype=torch.float16) for name, shape in shapes.items()}
    save_file(state, tmp_path / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path, dtype], capture_output=True, text=True, check=True)
    share, right = done.stdout.split()
    assert right == "True"
    assert float(share) < 1.2


@dataclass(frozen=True)
class Names:
    subject: tuple[str, ...]


def test_blocks_and_layers_are_bounded_together(tmp_path: Path) -> None:
    blocks = {"block_out_channels": (32,) * 32, "down_block_types": ("DownBlock2D",) * 32}
    for config in (
        VaeConfig(block_out_channels=(32,) * 32, layers_per_block=9),
        UNetConfig(**blocks, layers_per_block=9),
    ):
        write_config(config, tmp_path)
        with pytest.raises(ValueError, match=r"config.json: 32 blocks of 9 layers are more than 256 layers"):
            read_config(tmp_path, type(config))


def test_names_may_be_many_but_layers_may_not(tmp_path: Path) -> None:
    names = Names(tuple(f"subject {i}" for i in range(1000)))
    write_config(names, tmp_path)
    assert read_config(tmp_path, Names) == names
    write_config(Names(("x",) * 5000), tmp_path)
    with pytest.raises(ValueError, match="subject has 5000 entries, at most 4096 are read"):
        read_config(tmp_path, Names)
    write_config(VaeConfig(block_out_channels=(32,) * 65), tmp_path)
    with pytest.raises(ValueError, match="block_out_channels has 65 entries, at most 64 are read"):
        read_config(tmp_path, VaeConfig)


def test_a_file_is_what_was_written_or_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(3, 5, 2), "b": torch.tensor(2.0).half(), "none": torch.ones(0, 3)}
    tensors |= {
        "c": torch.randn(3).bfloat16(),
        "d": torch.arange(3),
        "e": torch.tensor([True]),
        "f": torch.ones(3, 4).T,
    }
    save_tensors(path, tensors, metadata={"key": 'é "{'})
    whole = path.read_bytes()
    got, metadata = read_tensors(path)
    assert got.keys() == tensors.keys() == load_file(path).keys()
    assert all(torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert metadata == {"format": "pt", "key": 'é "{'}
    save_tensors(path, dict(reversed(tensors.items())), metadata={"key": 'é "{'})
    assert path.read_bytes() == whole
    for bit in range(0, 8 * len(whole), 101):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            got, _ = read_tensors(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            # only a space of the header
            assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


def test_a_damaged_part_of_a_model_is_refused(vae_folder: Path) -> None:
    path = vae_folder / KlVae.filename
    data = bytearray(path.read_bytes())
    data[-5] ^= 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{path} is damaged: its digest is another one$"):
        KlVae.from_pretrained(vae_folder)


def test_a_hash_tells_weights_from_others_wherever_they_lie(tmp_path, tiny_model):
    files = {"unet": "diffusion_pytorch_model.safetensors", "none": "model.safetensors"}
    files["text_encoder"] = "model.safetensors"
    shutil.copytree(tiny_model, tmp_path / "a")
    known = hash_weights(tiny_model, files)
    assert re.fullmatch("[0-9a-f]{32}", known)
    assert hash_weights(tmp_path / "a", dict(reversed(files.items()))) == known
    path = tmp_path / "a" / "unet" / files["unet"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert hash_weights(tmp_path / "a", files) != known
    path.unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: No such file"):
        hash_weights(tmp_path / "a", files)


def test_a_hash_of_much_is_kept_until_a_file_changes(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr("cmdgen.weights.HASHED_AT_ONCE", 0)
    shutil.copytree(tiny_model, tmp_path / "a")
    files = {"vae": KlVae.filename}
    known = hash_weights(tmp_path / "a", files)
    (note,) = (tmp_path / "cache" / "cmdgen" / "weights").iterdir()
    assert note.read_text() == known
    note.write_text("0" * 32)
    assert hash_weights(tmp_path / "a", files) == "0" * 32
    # what is no hash is not believed
    note.write_text("zero")
    assert hash_weights(tmp_path / "a", files) == known
    note.write_text("0" * 32)
    path = tmp_path / "a" / "vae" / KlVae.filename
    os.utime(path, ns=(1, 1))
    assert hash_weights(tmp_path / "a", files) == known


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=9)), min_size=1, max_size=4))
def test_any_bytes_are_weights_or_one_line(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    shutil.copy(tiny_model / "vae" / "config.json", folder)
    content = bytearray((tiny_model / "vae" / KlVae.filename).read_bytes())
    # most of it is the header's
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for place, bits in changes:
        start = int(place * header)
        content[start : start + len(bits)] = bits
    (folder / KlVae.filename).write_bytes(content)
    try:
        KlVae.from_pretrained(folder)
    except ValueError as error:
        assert str(folder / KlVae.filename) in str(error) and "\n" not in str(error)
