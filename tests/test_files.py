"""Files appear whole or not at all; untrusted text is read whole or refused in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmdgen import files
from cmdgen.files import (
    create_folder,
    fill_folder,
    hold_folder,
    parse_json,
    publish,
    read_json,
    read_text,
    replace_with,
    temporary_folder,
    write_json,
)
from tests.killing import full_disk


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), replace_with(path) as temporary:
        assert temporary.parent.parent == tmp_path and temporary.name == "file.txt"
        temporary.write_bytes(b"half")
        raise KeyError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file.txt", "old")]


def test_a_file_that_appears_meanwhile_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for overwrite, text in ((False, "other"), (True, "mine")):
        path.unlink(missing_ok=True)
        try:
            with replace_with(path, overwrite=overwrite) as temporary:
                temporary.write_text("mine")
                path.write_text("other")
        except FileExistsError as error:
            assert not overwrite
            assert str(error) == f"{path} exists: give another name, or replace it with --overwrite"
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_new_file_is_written_with_hard_links_or_without(
    tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        with replace_with(tmp_path / f"{i}", overwrite=overwrite) as temporary:
            temporary.write_text("text")
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"0": "text", "1": "text"}


def test_a_symlink_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_json(tmp_path / "link", {"b": 1, "a": [2]})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), create_folder(tmp_path / "folder") as temporary:
        (temporary / "file").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with create_folder(tmp_path / "folder") as temporary:
        (temporary / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
    with pytest.raises(ValueError, match="folder exists already: give another folder"):
        create_folder(tmp_path / "folder").__enter__()
    with pytest.raises(ValueError, match="does not exist"):
        create_folder(tmp_path / "none" / "folder").__enter__()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[1]", "[1] is not a JSON object"),
        ("null", "None is not a JSON object"),
        ('{"a": 1, "b": 2, "a": 1}', "key 'a' is repeated"),
        ('{"a": {"b": 1, "b": 1}}', "key 'b' is repeated"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": -Infinity}', "-Infinity is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": "\\ud83d"}', "not valid UTF-8"),
        ('{"\\uDe00": 1}', "not valid UTF-8"),
        ("[" * 100_000, "JSON is nested too deeply"),
        (f'{{"a": {"9" * 5000}}}', "Exceeds the limit"),
        (b"\xff", "can't decode byte"),
    ],
)
def test_what_is_not_plain_json_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        parse_json(text)
    assert message in str(error.value)
    path = tmp_path / "file.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < 400


def test_json_may_hold_infinities_where_they_are_allowed() -> None:
    assert parse_json('{"a": -Infinity}', finite=False) == {"a": float("-inf")}
    assert parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_a_text_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    for limit, size in ((2**24, 16), (2**20, 1)):
        with pytest.raises(ValueError) as error:
            read_text(path, limit)
        assert str(error.value) == f"{path}: larger than {size} MiB"


def test_a_name_may_be_as_long_as_any(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".txt", "a." + "b" * 253, "é" * 127):
        with replace_with(tmp_path / name) as temporary:
            temporary.write_text("text")
        assert (tmp_path / name).read_text() == "text"


def test_what_a_killed_process_left_goes_at_the_next_start_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from cmdgen.files import replace_with\n"
        "with replace_with(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "sub" / "dead"], timeout=60).returncode == 9
    files._remove_leftovers.cache_clear()
    with temporary_folder(tmp_path / "sub") as alive:
        assert [path.name for path in (tmp_path / "sub").iterdir()] == [alive.name]
        files._remove_leftovers.cache_clear()
        # that of a process that lives stays
        write_json(tmp_path / "sub" / "file", {})
        assert alive.is_dir()
    assert [path.name for path in tmp_path.rglob("*")] == ["sub", "file"]


def test_names_of_two_processes_differ_where_their_numbers_do_not(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as one, temporary_folder(tmp_path) as other:
        assert one != other


def test_a_folder_is_held_by_one_process_and_an_empty_one_does_not_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with hold_folder(folder):
        for _ in range(2):
            with pytest.raises(OSError, match=f"^{folder} is in use by another cmdgen: wait for its end"):
                hold_folder(folder).__enter__()
    assert not folder.exists()
    with hold_folder(folder):
        write_json(folder / "file", {})
    (tmp_path / "link").symlink_to("run")
    with hold_folder(tmp_path / "link"):
        assert (folder / "file").exists()
        with pytest.raises(OSError, match="is in use by another cmdgen"):
            hold_folder(folder).__enter__()


def test_a_new_folder_appears_whole_and_the_files_of_an_old_one_are_replaced(tmp_path: Path) -> None:
    place = tmp_path / "new" / "folder"
    for text in ("old", "new"):
        with fill_folder(place) as folder:
            assert (folder == place) == (text == "new")
            write_json(folder / "a.json", {"text": text})
        assert read_json(place / "a.json") == {"text": text}
    says = f"^{tmp_path}/other was not written: File too large$"
    with full_disk(100), pytest.raises(OSError, match=says), create_folder(tmp_path / "other") as folder:
        write_json(folder / "a.json", {"text": "x" * 200})
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with full_disk(1000), pytest.raises(OSError) as error:
        write_json(path, {"new": "x" * 2000})
    assert str(error.value) == f"{path} was not written: File too large"
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_all_of_a_file_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, replace = [], os.fsync, os.replace

    def sync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    write_json(tmp_path / "a", {})
    assert done == ["a", "rename", tmp_path.name]
    done.clear()
    with create_folder(tmp_path / "b") as folder:
        (folder / "c").touch()
    assert done == ["c", "b", "rename", tmp_path.name]


@pytest.mark.parametrize("overwrite", [True, False])
def test_files_get_their_names_together_or_none_does(tmp_path: Path, overwrite: bool) -> None:
    for name in ("old", "b"):
        (tmp_path / name).write_text(name)
    with temporary_folder(tmp_path) as folder:
        moves = {}
        for name in ("a", "b", "none/c"):
            (source := folder / name[-1]).write_text("new")
            moves[source] = tmp_path / name
        with pytest.raises(OSError):
            publish(moves, overwrite=overwrite, old=[tmp_path / "old"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "old", "b": "b"}
