"""Damaged files of every kind are read, or refused in one line that names them: seeded, the same cases each time."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmdgen.acceleration.calibration import read_calibrations, write_calibrations
from cmdgen.cli.jobs import Job, Refused, make_jobs, read_entries
from cmdgen.data.folder import Folder
from cmdgen.latents import Latents, read_latents, save_latents
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.request import Request
from cmdgen.store.parts import read_model
from cmdgen.training.cache import fill, read
from cmdgen.training.checkpoint import Log, load_checkpoint, save_checkpoint
from cmdgen.training.config import Shared
from cmdgen.training.run import settle

CASES = 150
NUMBERS = (0, 1, -1, 255, 2**31, 2**53, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"), True, None)
TEXTS = ("", " ", "\0", "\ud800", "\x1b[31m", "../../x", "a" * 5000, "%s{slug}", "-", "９", "\u202ex", "nan")


def odd(r: random.Random) -> Any:
    """Return a value that hardly anything expects."""
    nested: Any = []
    for _ in range(r.choice((1, 50))):
        nested = [nested]
    return r.choice((*NUMBERS, *TEXTS, nested, [], {}, [1, "a", None], {"": {}}))


def damage_json(value: Any, r: random.Random) -> Any:
    """Change, remove or add one value at any depth."""
    if isinstance(value, dict | list) and value and r.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = r.choice(keys)
        if r.random() < 0.2:
            del value[key]
        else:
            value[key] = damage_json(value[key], r)
        return value
    return odd(r)


def damage_bytes(data: bytes, r: random.Random) -> bytes:
    """Flip, remove, insert and overwrite bytes, most of them near the start."""
    content = bytearray(data)
    for _ in range(r.choice((1, 2, 16))):
        place = r.randrange(len(content) + 1) if r.random() < 0.5 else min(r.randrange(256), len(content))
        number = struct.pack("<Q", r.choice((0, 1, len(data), 2**32, 2**63, 2**64 - 1)))
        length = r.choice((0, 1, 8, 100, len(data)))
        content[place : place + length] = r.choice((b"", bytes([r.randrange(256)]) * length, number, b"\xff\xfe", b"["))
    return bytes(content)


def damage(path: Path, r: random.Random) -> None:
    """Damage a file as what it is, or as bytes."""
    data = path.read_bytes()
    if r.random() < 0.6 and path.suffix in (".json", ".jsonl"):
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        number = r.randrange(len(lines))
        # what has no encoding is written all the same
        lines[number] = json.dumps(damage_json(json.loads(lines[number]), r)).encode("utf-8", "surrogatepass")
        path.write_bytes(b"\n".join(lines))
    elif r.random() < 0.6 and path.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(damage_json(json.loads(data[8:end]), r)).encode("utf-8", "surrogatepass")
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    else:
        path.write_bytes(damage_bytes(data, r))


def make_checkpoint(folder: Path) -> Path:
    save_checkpoint(folder, {"a": torch.ones(3), "b": torch.tensor(1.0)}, {"step": 3, "origin": {"seed": 0}})
    return folder / "checkpoint.safetensors"


def make_cache(folder: Path) -> Path:
    fill(folder / "x-a", 4, lambda rows: {"x": torch.ones(len(rows), 3)}, lambda *_: None, step=2)
    return folder / "x-a" / "000000000.safetensors"


def make_run(folder: Path) -> Path:
    path = folder / "training" / "run.json"
    path.parent.mkdir()
    gate = {"attention": "gated", "attention_threshold": 1.5, "attention_features": 8}
    shared = Shared("mini", "shapes", (32, 48), 4, latents=Path("latents"), **gate)
    path.write_text(json.dumps(shared.to_json()))
    return path


def make_log(folder: Path) -> Path:
    log = Log(folder / "log.jsonl", 0)
    for step in range(5):
        log.write({"step": step, "loss": 1.5})
    log.close()
    return folder / "log.jsonl"


def make_latents(folder: Path) -> Path:
    save_latents(folder / "a.safetensors", Latents(torch.ones(1, 2, 2), torch.ones(1, 2, 4), 8, {"prompt": "a dog"}))
    return folder / "a.safetensors"


def make_tokenizer(folder: Path) -> Path:
    Tokenizer.train(["a dog swimming"], 520).save_pretrained(folder)
    return folder / "vocab.json"


def make_calibrations(folder: Path) -> Path:
    write_calibrations(folder / "a.json", "m", [])
    return folder / "a.json"


def make_captions(folder: Path) -> Path:
    rows = [{"file": f"{name}.mp4", "caption": ["a dog", name]} for name in "ab"]
    for name in "ab":
        (folder / f"{name}.mp4").touch()
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "captions.jsonl"


def make_lines(folder: Path) -> Path:
    rows = [{"prompt": "a dog", "seed": 1, "output": "a.gif", "frames": 4, "size": "48x32", "guidance": 2.0, "loop": 1}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows * 3)))
    return folder / "a.jsonl"


def read_lines(path: Path) -> None:
    for job in make_jobs(read_entries(path.open("rb")), Request(output="x.gif"), num=1):
        assert isinstance(job, Job | Refused)
        assert "\n" not in str(job)


# how a file is made, and how it is read
KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "checkpoint": (make_checkpoint, lambda path: load_checkpoint(path.parent)),
    "cache": (make_cache, lambda path: read(path.parent, ("x",), 4)["x"][torch.arange(4)]),
    "run": (make_run, lambda path: settle(path.parent.parent, Shared(), "vae")),
    "log": (make_log, lambda path: Log(path, 3).close()),
    "latents": (make_latents, read_latents),
    "tokenizer": (make_tokenizer, lambda path: Tokenizer.from_pretrained(path.parent)),
    "calibrations": (make_calibrations, lambda path: read_calibrations(path, "m")),
    "captions": (make_captions, lambda path: Folder(path.parent)),
    "lines": (make_lines, read_lines),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, read_file = KINDS[kind]
    path = make(tmp_path)
    whole, refused = path.read_bytes(), 0
    for number in range(CASES):
        path.write_bytes(whole)
        damage(path, random.Random(f"{kind}/{number}"))
        try:
            read_file(path)
        except ValueError as error:
            text = str(error)
            assert str(tmp_path) in text and "\n" not in text and len(text) < 7000, (number, text[:300])
            refused += 1
    # a bad line is one job's alone, and no log's
    assert refused > CASES // 3 or kind in ("log", "lines")


@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_damaged_model_is_read_or_refused_in_one_line(part: str, tiny_model: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_model, tmp_path / "m", ignore=ignored)
    path = tmp_path / "m" / part
    whole = path.read_bytes()
    for number in range(CASES):
        path.write_bytes(whole)
        damage(path, random.Random(f"{part}/{number}"))
        try:
            read_model(tmp_path / "m")
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), (number, str(error)[:300])
