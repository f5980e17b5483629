import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdgen.cli.naming import SLUG_BYTES, check_inside, fields, fill, slug


def filled(template: str) -> str:
    return fill(template, "A Corgi, swimming!", {"index": 7, "line": 9, "seed": 42})


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A Corgi, swimming!", "a-corgi-swimming"),
        ("Ein Hündchen -- läuft", "ein-hündchen-läuft"),
        ("一只 猫", "一只-猫"),
        ("कुत्ता", "कुत्ता"),
        ("قطة تطير", "قطة-تطير"),
        ("../../etc/passwd", "etc-passwd"),
        (r"C:\Windows\con.mp4", "c-windows-con-mp4"),
        ("...", "clip"),
        ("🐕‍🦺", "clip"),
        ("\u202egnp.exe", "gnp-exe"),
        ("CON", "con-"),
        ("con", "con-"),
        ("\u0301", "clip"),
        ("½ of ℀", "1-2-of-a-c"),
        ("word " * 40, "word-word-word-word-word-word-word-word-word-word-word-word"),
        ("é" * 100, "é" * 30),
    ],
)
def test_slug_is_the_words_of_a_prompt(prompt, name):
    assert slug(prompt) == name


@settings(deadline=None)
@given(st.text(), st.integers(1, 80))
def test_slug_of_any_prompt_is_one_name_within_its_folder(prompt, length):
    name = slug(prompt, length)
    assert 1 <= len(name.encode()) <= SLUG_BYTES + 1
    assert not re.search(r'[\x00-\x1f./\\:*?"<>|\s]', name)
    assert Path(name).name == name
    assert (Path("/a/b") / f"{name}.mp4").resolve().parent == Path("/a/b")


def test_fields_of_a_template_are_filled_in():
    assert filled("{index:04d}-{slug}-{seed}.mp4") == "0007-a-corgi-swimming-42.mp4"
    assert filled("a/{line}_{slug:.7}.gif") == "a/9_a-corgi.gif"
    assert filled("{{{index}}}") == "{7}"
    assert fields("clips/{index:04d}-{{x}}-{seed}") == {"index", "seed"}


@pytest.mark.parametrize(
    "template",
    [
        *("{}", "{0}", "{prompt}", "{slug.__class__}", "{seed[0]}", "{seed!r}", "{", "}"),
        *("{{seed}", "{index:>9999999999}", "{index:}", "{seed:x}", "{slug:>20}", "{slug:.200}"),
        "{ seed }",
    ],
)
def test_what_is_no_field_is_refused_with_those_there_are(template):
    with pytest.raises(ValueError, match=r"is none of \{index\}, \{line\}, \{seed\}, \{slug\}"):
        filled(template)


@settings(deadline=None)
@given(st.text(alphabet="{}:.!0[]dseedindexluglin/-%", max_size=20))
def test_any_template_is_filled_or_refused(template):
    try:
        assert isinstance(filled(template), str)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("path", ["a.mp4", "b/c.mp4", "..a/b..mp4", "~/x.mp4"])
def test_relative_paths_are_inside(path):
    assert check_inside(path) == path


@pytest.mark.parametrize(
    "path",
    [
        *("-", "/a.mp4", "../a.mp4", "a/../../b.mp4", "a/..", "..", "", ".", "/", "\\a.mp4"),
        *("a\\..\\b.mp4", "C:a.mp4", "C:\\a.mp4", "\\\\host\\share\\a.mp4", "//host/share/a"),
    ],
)
def test_paths_that_may_lead_out_are_not_inside(path):
    with pytest.raises(ValueError, match=r"is not a relative path without \.\."):
        check_inside(path)
