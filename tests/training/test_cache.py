"""Shards are made once, memory-mapped, and made again when what they depend on has changed."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmdgen.options import Shard
from cmdgen.training import cache
from cmdgen.training.cache import Rows, fill, fingerprint, read, remove_others
from cmdgen.weights import save_tensors


class Encoder:
    """Counts what it is asked for; row i is [i, -i]."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.seen: list[int] = []
        self.fail_at = fail_at

    def __call__(self, rows: range) -> dict[str, Tensor]:
        if self.fail_at in rows:
            raise KeyboardInterrupt
        self.seen += rows
        values = torch.tensor(rows).float()
        # as a GPU's or a transposed encoder's output: not contiguous
        return {"x": torch.stack((values, -values)).T}


def encode(place: Path, encoder: Encoder, count: int = 10) -> Rows:
    fill(place, count, encoder, lambda *_: None, step=2, rows=4)
    return read(place, ("x",), count)["x"]


def values(rows: Rows) -> list[float]:
    return rows[torch.arange(len(rows))][:, 0].tolist()


def test_gathered_rows_are_those_of_the_concatenation(tmp_path: Path) -> None:
    rows = encode(tmp_path / "x-a", Encoder())
    whole = torch.cat([load_file(path)["x"] for path in rows.paths])
    assert len(rows.paths) == 3
    assert rows.shape == whole.shape == (10, 2)
    chosen = torch.tensor([9, 0, 3, 4, 4, 7])
    assert rows[chosen].dtype == torch.float16
    assert torch.equal(rows[chosen], whole[chosen])


@pytest.mark.skipif(sys.platform != "linux", reason="the list of maps is Linux's")
def test_rows_are_mapped_and_not_read(tmp_path: Path) -> None:
    rows = encode(tmp_path / "x-a", Encoder())
    rows[torch.tensor([0, 5])]
    maps = Path("/proc/self/maps").read_text()
    # the last shard has not been asked for
    assert [str(path) in maps for path in rows.paths] == [True, True, False]


def test_interrupted_encoding_keeps_every_step_that_is_done(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "x-a", Encoder(fail_at=6))
    with pytest.raises(ValueError, match="x-a holds 6 of 10 clips"):
        read(tmp_path / "x-a", ("x",), 10)
    encoder = Encoder()
    assert values(encode(tmp_path / "x-a", encoder)) == list(range(10))
    assert encoder.seen == [6, 7, 8, 9]


def test_larger_and_smaller_counts_share_what_is_there(tmp_path: Path) -> None:
    encode(tmp_path / "x-a", Encoder(), count=9)
    encoder = Encoder()
    assert values(encode(tmp_path / "x-a", encoder, count=12)) == list(range(12))
    assert encoder.seen == [9, 10, 11]
    assert values(encode(tmp_path / "x-a", encoder, count=5)) == list(range(5))
    assert encoder.seen == [9, 10, 11]


def test_only_caches_of_the_same_kind_are_outdated(tmp_path: Path) -> None:
    for name in ("latents-a", "latents-b", "pairs-a"):
        encode(tmp_path / name, Encoder())
    remove_others(tmp_path / "latents-b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents-b", "pairs-a"]


def test_shards_make_the_files_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encode(tmp_path / "x-a", Encoder())
    place, encoders = tmp_path / "parts" / "x-a", [Encoder(), Encoder()]
    for number, encoder in enumerate(encoders):
        if number:
            with pytest.raises(ValueError, match="x-a holds 6 of 10 clips"):
                read(place, ("x",), 10)
        # whatever a second machine would take for new folders
        fill(place, 10, encoder, lambda *_: None, step=2, rows=4 + number, shard=Shard(number, 2))
    assert [encoder.seen for encoder in encoders] == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]
    for path in expected.paths:
        assert path.read_bytes() == (place / path.name).read_bytes()
    # whole files are known by the index, and not opened; what was removed is missed
    monkeypatch.setattr(cache, "open_weights", lambda path: pytest.fail(f"{path} was opened"))
    assert len(read(place, ("x",), 8)["x"].paths) == 2
    (place / "000000004.safetensors").unlink()
    with pytest.raises(ValueError, match="x-a holds 4 of 8 clips"):
        read(place, ("x",), 8)


def test_a_folder_without_an_index_goes_on_as_it_was(tmp_path: Path) -> None:
    """As a version before indices left it: 64 rows a file."""
    fill(tmp_path / "x-a", 70, Encoder(), lambda *_: None, step=2)
    for index in (tmp_path / "x-a").glob("*.json"):
        index.unlink()
    encoder = Encoder()
    fill(tmp_path / "x-a", 80, encoder, lambda *_: None, step=2, rows=1024)
    assert encoder.seen == list(range(70, 80))
    assert values(read(tmp_path / "x-a", ("x",), 80)["x"]) == list(range(80))


@pytest.mark.parametrize("text", ['{"rows": 0, "files": []}', '{"rows": 4, "files": 4}', '{"rows": "4", "files": []}'])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    encode(tmp_path / "x-a", Encoder())
    index = tmp_path / "x-a" / "index-00001-of-00001.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=f"^{index}: .*: remove it, and it is made again$"):
        read(tmp_path / "x-a", ("x",), 10)


def test_a_kill_costs_the_last_minutes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = cache.save_tensors
    monkeypatch.setattr(cache, "_KEEP", 0.0)
    monkeypatch.setattr(
        cache, "save_tensors", lambda path, tensors, **s: (saved.append(len(tensors["x"])), save(path, tensors, **s))
    )
    encode(tmp_path / "x-a", Encoder())
    assert saved == [2, 4, 4, 2, 4, 4, 2, 2]


def test_fingerprint_follows_weights_and_data(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    before = fingerprint([file], "world 64x64")
    assert fingerprint([file], "world 64x64") == before
    assert fingerprint([file], "world 64x48") != before
    file.write_bytes(b"Weights")
    assert fingerprint([file], "world 64x64") != before


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(b"half"), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "is damaged: its digest is another one"),
        (lambda path: shutil.copy(path.with_name("000000000.safetensors"), path), "is of another cache"),
        (lambda path: save_file({"x": torch.zeros(4, 2)}, path), "is damaged: it has no digest"),
        (
            lambda path: save_tensors(path, {"y": torch.zeros(4, 2)}, metadata={"rows": f"x-a {path.stem}"}),
            "of another",
        ),
    ],
)
def test_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    damaged = encode(tmp_path / "x-a", Encoder()).paths[1]
    damage(damaged)
    with pytest.raises(ValueError, match=f"^{damaged}.*{says}.*: remove it, and it is made again$"):
        values(encode(tmp_path / "x-a", Encoder()))
    damaged.unlink()
    assert values(encode(tmp_path / "x-a", Encoder())) == list(range(10))


def test_an_encoding_with_nan_or_inf_is_not_kept(tmp_path: Path) -> None:
    # beyond the largest number of half precision
    huge = torch.full((2, 3), 1e6)
    with pytest.raises(ValueError, match="clip 0 or one of the next 2 is encoded to x with NaN or inf"):
        fill(tmp_path / "x-a", 2, lambda _: {"x": huge}, lambda *_: None, step=2)
    assert not list(tmp_path.rglob("*.safetensors"))
