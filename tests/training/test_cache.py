"""Shards are made once, and again when what they depend on has changed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cmdgen.training.cache import cached, fingerprint


class Encoder:
    """Counts what it is asked for."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.seen: list[int] = []
        self.fail_at = fail_at

    def __call__(self, rows: range) -> dict[str, Tensor]:
        if rows.start == self.fail_at:
            raise KeyboardInterrupt
        self.seen += rows
        return {"x": torch.tensor(rows).float()[:, None]}


def read(folder: Path, encoder: Encoder, count: int = 10, key: str = "a") -> list[float]:
    tensors = cached(folder, "latents", key, count, encoder, lambda *_: None, shard=4)
    return tensors["x"].flatten().tolist()


def test_interrupted_cache_continues_after_its_whole_shards(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path, Encoder(fail_at=8))
    encoder = Encoder()
    assert read(tmp_path, encoder) == list(range(10))
    assert encoder.seen == [8, 9]


def test_larger_count_reuses_whole_shards(tmp_path: Path) -> None:
    read(tmp_path, Encoder())
    encoder = Encoder()
    assert read(tmp_path, encoder, count=12) == list(range(12))
    assert encoder.seen == [8, 9, 10, 11]


def test_another_key_is_another_cache_and_the_outdated_one_goes(tmp_path: Path) -> None:
    read(tmp_path, Encoder())
    encoder = Encoder()
    read(tmp_path, encoder, key="b")
    assert encoder.seen == list(range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["latents-b"]


def test_fingerprint_follows_weights_and_data() -> None:
    module = nn.Conv2d(2, 3, 1)
    before = fingerprint(module, "world 64x64")
    assert fingerprint(module, "world 64x64") == before
    assert fingerprint(module, "world 64x48") != before
    module.weight.data[0, 0] += 1e-3
    assert fingerprint(module, "world 64x64") != before


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    read(tmp_path, Encoder())
    shard = next((tmp_path / "latents-a").glob("0000004-*"))
    shard.write_bytes(b"half")
    with pytest.raises(ValueError, match=shard.name):
        read(tmp_path, Encoder())
