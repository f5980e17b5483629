"""Files appear whole or not at all; untrusted text is read whole or refused in one line."""

from pathlib import Path

import pytest

from cmdgen.files import create_folder, parse_json, read_json, read_text, replace_with, write_json


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), replace_with(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
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
            assert str(error) == f"{path} exists: give another name, or overwrite it"
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
