"""WebDataset tars of captioned videos are the folder that they were packed from."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdgen.data.folder import Folder
from cmdgen.video.formats import Encoding
from tests.videos import write_video

NAMES = ("deep/a", "deep/bb", "c", "d-d", "e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of noise in several formats, with a .txt beside each."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "deep").mkdir()
    for number, name in enumerate(NAMES):
        frames = np.random.default_rng(number).integers(0, 255, (16, 12, 20, 3), np.uint8)
        file = folder / f"{name}{'.gif' if name == 'c' else '.mp4'}"
        write_video(file, frames, 8, None, Encoding(file.suffix[1:]))
        file.with_suffix(".txt").write_text(f"clip {name}\nlike  {name}\n")
    return folder


def pack(tar: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """Pack some videos of a folder, each beside its captions."""
    tar.parent.mkdir(exist_ok=True)
    with tarfile.open(tar, "w") as archive:
        for name in names:
            for file in sorted(folder.glob(f"{name}.*")):
                archive.add(file, arcname=str(file.relative_to(folder)))
    return tar


def add(tar: Path, **members: bytes) -> Path:
    with tarfile.open(tar, "a") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return tar


def test_tars_and_the_folder_give_the_same_batches(folder: Path, tmp_path: Path) -> None:
    # in any order, over any number of files
    pack(tmp_path / "tars" / "000001.tar", folder, NAMES[3:])
    pack(tmp_path / "tars" / "000000.tar", folder, NAMES[2::-1])
    videos = Folder(folder, frames=16)
    for path in (tmp_path / "tars", pack(tmp_path / "all.tar", folder, NAMES)):
        tars = Folder(path, frames=16)
        assert tars.contents == videos.contents
        for split in ("train", "test"):
            indices = tars.indices(split, 9)
            assert torch.equal(indices, videos.indices(split, 9))
            got, expected = (source.render(indices, (6, 8)) for source in (tars, videos))
            assert torch.equal(got.frames, expected.frames)
            assert tars.captions(indices, 1) == videos.captions(indices, 1)


def test_captions_of_a_json_are_read_as_lists_are(folder: Path, tmp_path: Path) -> None:
    tar, film = tmp_path / "a.tar", (folder / "e.mp4").read_bytes()
    texts = [json.dumps({"caption": ["a  dog", "a hound"], "licence": "CC0"}), json.dumps({"text": "a cat"})]
    add(tar, **{"1.mp4": film, "1.json": texts[0].encode(), "2.json": texts[1].encode(), "2.mp4": film, ".x": b""})
    videos = Folder(tar)
    assert videos.captions([0, 1], 1) == ["a hound", "a cat"]


def test_a_peer_writes_what_is_read(folder: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "%06d.tar"), maxcount=2, verbose=0) as writer:
        for name in NAMES[3:] + NAMES[:2]:
            text = folder / f"{name}.txt"
            writer.write({"__key__": name, "mp4": (folder / f"{name}.mp4").read_bytes(), "txt": text.read_text()})
    assert len(list(tmp_path.glob("*.tar"))) == 2
    tars = Folder(tmp_path, frames=16)
    assert tars.captions(range(4)) == ["clip d-d", "clip deep/a", "clip deep/bb", "clip e"]
    # and what it reads is what is read here
    for sample in webdataset.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False):
        number = [video.name for video in tars._videos].index(f"{sample['__key__']}.mp4")
        with tars._videos[number].unpacked() as file:
            assert file.read_bytes() == sample["mp4"]


def test_what_is_wrong_with_a_tar_is_one_line(folder: Path, tmp_path: Path) -> None:
    def refuse(path: Path) -> str:
        with pytest.raises(ValueError) as error:
            Folder(path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
        return str(error.value)

    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    assert "none.tar is not a readable tar" in refuse(tmp_path / "none.tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(folder / "e.mp4", "e.mp4")
    assert "packed.tar is not a readable tar" in refuse(tmp_path / "packed.tar")
    assert "silent.tar/1.mp4: the caption is missing" in refuse(add(tmp_path / "silent.tar", **{"1.mp4": b"0"}))
    one = {"1.mp4": b"0", "1.json": b"{"}
    assert "bad.tar: 1.json: not readable as JSON" in refuse(add(tmp_path / "bad.tar", **one))
    (tmp_path / "twice").mkdir()
    for name in "ab":
        add(tmp_path / "twice" / f"{name}.tar", **{"1.mp4": b"0", "1.txt": b"x"})
    assert "a.tar/1.mp4 has the same key" in refuse(tmp_path / "twice")
    # a part that was not downloaded
    whole = pack(tmp_path / "half.tar", folder, NAMES)
    whole.write_bytes(whole.read_bytes()[:-14_000])
    assert "half.tar" in refuse(whole)


def test_a_damaged_video_is_named_by_its_tar(folder: Path, tmp_path: Path) -> None:
    tar = pack(tmp_path / "a.tar", folder, NAMES)
    add(tar, **{"f.mp4": b"\0" * 100, "f.txt": b"nothing"})
    videos = Folder(tar, frames=16)
    assert videos.left_out == {"f.mp4": f"{tar}/f.mp4 is not a readable video or picture"}
