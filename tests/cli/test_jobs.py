import io
import json
import os
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Context
from typer.main import get_command

from cmdgen.cli.app import app
from cmdgen.cli.batch import group
from cmdgen.cli.jobs import (
    MAX_LINE_BYTES,
    MAX_SKIPPED_BYTES,
    Entry,
    Job,
    Refused,
    make_jobs,
    open_entries,
    read_entries,
)
from cmdgen.config import MINI
from cmdgen.metadata import JOB_FIELDS
from cmdgen.options import MAX_TEXT_BYTES, check_text
from cmdgen.request import Request, resolve
from cmdgen.video.formats import Encoding


def read(data: bytes) -> list[Entry]:
    return list(read_entries(io.BytesIO(data)))


def jobs(data: bytes, output: str | None = None, *, num: int = 1, **flags) -> list[Job | Refused]:
    return list(make_jobs(read(data), Request(output=output, **flags), num=num))


def test_a_line_has_a_prompt_unless_the_model_reads_no_text() -> None:
    entries = read(b'{"seed": 1}\n{"prompt": ""}')
    refused = list(make_jobs(entries, Request(output="x.mp4"), num=1))
    assert [str(each) for each in refused] == [
        "line 1: has no prompt",
        'line 2: the prompt is empty: say what to show, such as "a corgi swimming"',
    ]
    made = list(make_jobs(entries, Request(output="{index}.mp4"), num=2, reads_text=False))
    assert [job.target for job in made] == ["1.mp4", "2.mp4", "3.mp4", "4.mp4"]
    assert [job.request.seed for job in made][:2] == [1, 2]


def test_a_line_is_a_prompt_or_an_object_or_skipped():
    text = '\ufeffa cat\r\n\n  # no cat\n\t{"prompt": "a dog", "steps": 3}  \n[a, fish]\nlast'
    assert read(text.encode()) == [
        Entry(1, {"prompt": "a cat"}),
        Entry(4, {"prompt": "a dog", "steps": 3}),
        Entry(5, {"prompt": "[a, fish]"}),
        Entry(6, {"prompt": "last"}),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "a"', "is not JSON: Expecting ',' delimiter: line 1 column 15"),
        (b'{"prompt": "a"} {}', "is not JSON: Extra data"),
        (b"{'prompt': 'a'}", "is not JSON"),
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "key 'seed' is repeated"),
        (b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "key 'y' is repeated"),
        (b'{"prompt": "a", "guidance": NaN}', "NaN is not a finite number"),
        (b'{"prompt": "a", "guidance": -Infinity}', "-Infinity is not a finite number"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "integer string conversion"),
        (b'{"prompt": ' + b"[" * 500_000, "is nested too deeply"),
        (b"a \xff cat", "is not valid UTF-8"),
        (b"\xff\xfea\0c\0a\0t\0", "is not valid UTF-8"),
        (b"a" * (MAX_LINE_BYTES + 9), f"has {MAX_LINE_BYTES + 10} bytes, more than {MAX_LINE_BYTES}"),
    ],
)
def test_what_is_wrong_with_a_line_is_wrong_with_it_alone(line, says):
    before, wrong, after = read(b"first\n" + line + b"\nlast\n")
    assert (before.values, after.values) == ({"prompt": "first"}, {"prompt": "last"})
    assert (wrong.line, after.line) == (2, 3)
    assert isinstance(wrong.values, ValueError)
    assert says in str(wrong.values) and "\n" not in str(wrong.values)


class Endless(io.RawIOBase):
    """A line without an end, after one that has one."""

    def __init__(self):
        self.given = 0

    def readable(self):
        return True

    def readinto(self, buffer):
        buffer[:] = b"x" * len(buffer)
        if not self.given:
            buffer[:2] = b"a\n"
        self.given += len(buffer)
        return len(buffer)


def test_a_line_that_never_ends_takes_little_memory_and_ends_the_file():
    source = Endless()
    tracemalloc.start()
    try:
        first, last = read_entries(io.BufferedReader(source))
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()
    assert first.values == {"prompt": "a"}
    assert "goes on for more than" in str(last.values)
    assert source.given < MAX_SKIPPED_BYTES + 4 * MAX_LINE_BYTES


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace")))
def test_any_bytes_are_entries_or_errors_in_a_line(data):
    for entry in read(data):
        assert isinstance(entry.values, dict) or "\n" not in str(entry.values)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x))
NAMES = st.sampled_from(
    [
        *("prompt", "output", "seed", "motion-steps", "motion_steps", "guidance", "sampler"),
        *("size", "negative", "rehash", "rehash-file", "crf", "format", "sidecar", "no-metadata"),
        *("model", "batch", "help", "guidance-interval", "fps", "frames", "loop", "codec"),
        "rehash-policy",
    ]
)


@settings(max_examples=60, deadline=None)
@given(values=st.dictionaries(NAMES | st.text(), VALUES, max_size=4))
def test_any_object_is_a_job_or_an_error_in_a_line(values):
    flags = Request(output="{index}.mp4")
    (job,) = make_jobs([Entry(1, {"prompt": "a cat", **values})], flags, num=1)
    assert isinstance(job, Job) or "\n" not in str(job)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seed": 3, "content-seed": 4, "motion_seed": 5}, {"seed": 3, "content_seed": 4}),
        ({"guidance": 2, "motion-guidance": 1.5}, {"guidance": 2.0, "motion_guidance": 1.5}),
        ({"size": "64x32"}, {"size": (32, 64)}),
        ({"guidance-interval": "0.1-0.8"}, {"guidance_interval": (0.1, 0.8)}),
        ({"rehash": 5}, {"rehash": 5}),
        ({"rehash": "0,1,4+0,2"}, {"rehash": ((0, 1, 4), (0, 2))}),
        ({"rehash": "off"}, {"rehash": None}),
        ({"negative": "a\tcar"}, {"negative": "a car"}),
    ],
)
def test_options_of_a_line_win_over_flags(values, expected):
    line = json.dumps({"prompt": "a cat", **values}).encode()
    (job,) = jobs(line, "a.mp4", seed=1, steps=9, fps=7)
    assert isinstance(job, Job), job
    expected = {"steps": 9, "fps": 7, **expected}
    assert {name: getattr(job.request, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": None}, "has no prompt"),
        ({"steps": None}, "'steps' is null: leave it out"),
        ({"sidecar": None}, "'sidecar' is null: leave it out"),
        ({"steps": "5"}, "steps '5' is not a whole number"),
        ({"steps": 5.0}, "steps 5.0 is not a whole number"),
        ({"steps": True}, "steps True is not a whole number"),
        ({"steps": 0}, "steps 0 is not at least 1"),
        ({"steps": [5]}, "steps [5] is not a whole number"),
        ({"guidance": "7"}, "guidance '7' is not a number"),
        ({"guidance": 10**400}, "guidance inf is not between 0 and 100"),
        ({"sidecar": 1}, "sidecar 1 is not true or false"),
        ({"size": 64}, "size 64 is not text"),
        ({"prompt": 5}, "prompt 5 is not text"),
        ({"prompt": {"a": 1}}, "prompt {'a': 1} is not text"),
        ({"rehash": 2.5}, "rehash 2.5 is not text"),
        ({"rehash": "1,2"}, "neither off nor a number of steps"),
        ({"rehash": "0,4,2"}, "do not rise from 0"),
        ({"rehash": "0" + ",1" * 8000}, "neither off nor a number of steps"),
        ({"seed": -1}, "seed -1 is not between"),
        ({"sampler": "euler"}, "sampler 'euler' is not one of"),
        ({"format": "avi"}, "format 'avi' is not one of"),
        ({"crf": 99}, "crf 99 is not one of"),
        ({"loop": 1}, "loop needs one of gif, webp, apng, not mp4"),
        ({"motion-steps": 1, "motion_steps": 2}, "'motion_steps' is given twice"),
        ({"model": "x"}, "'model' is the same for all jobs: give it as a flag"),
        ({"batch": 2}, "'batch' is not one of codec, content_seed,"),
        ({"json": True}, "is not one of codec, content_seed,"),
        ({"speed": 1}, "'speed' is not one of codec, content_seed,"),
        ({"output": "../a.mp4"}, "is not a relative path without .."),
        ({"output": "-"}, "is not a relative path without .."),
        ({"output": "/tmp/a.mp4"}, "is not a relative path without .."),
        ({"output": "a\0.mp4"}, "control character U+0000"),
        ({"output": "{x}.mp4"}, "{x} is none of {index}"),
        ({"output": "a.avi"}, "must end in"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a\0b"}, "the prompt holds the control character U+0000"),
        ({"prompt": "a\x1b[2Jb"}, "the prompt holds the control character U+001B"),
        ({"prompt": "a\ud800b"}, "text is not valid UTF-8"),
        ({"negative": "\udfff"}, "text is not valid UTF-8"),
        ({"prompt": "x" * 100_000}, f"has 100000 bytes, more than {MAX_TEXT_BYTES}"),
    ],
)
def test_what_no_flag_takes_no_line_does(values, says):
    (refused,) = jobs(json.dumps({"prompt": "a cat", **values}).encode(), "a.mp4")
    assert isinstance(refused, Refused)
    assert says in str(refused)
    assert str(refused).startswith("line 1: ")


def test_numbers_have_an_end():
    (refused,) = jobs(b'{"prompt": "a", "guidance": 1e999}', "a.mp4")
    assert "1e999 is not a finite number" in str(refused)
    # a name for each of 10^12 frames would take hours
    (refused,) = jobs(b'{"prompt": "a", "frames": 1000000000000}', "%d.png")
    assert "frames 1000000000000 is not between 1 and 65536" in str(refused)


def test_every_option_of_a_job_is_one_of_the_command():
    assert {"prompt", "output", "seed", "rehash", "crf", "no_metadata"} <= JOB_FIELDS
    process = {"model", "device", "dtype", "batch", "num", "file", "like", "overwrite", "as_json"}
    assert not process & JOB_FIELDS
    command = get_command(app)
    sample = command.get_command(Context(command), "sample")
    parameters = {parameter.name for parameter in sample.params}
    assert process | JOB_FIELDS <= parameters


@pytest.mark.parametrize(
    "text", ["a 🐕‍🦺 swims", "قطة تطير", "cafe\u0301", "\u202eabc\u202c", "日本語", "a" * MAX_TEXT_BYTES]
)
def test_text_of_any_script_stays_as_it_is(text):
    assert check_text("prompt", text) == text


def test_line_breaks_and_tabs_are_spaces():
    assert check_text("prompt", "a\tcat\r\nflies\u2028high") == "a cat  flies high"


def test_seeds_are_consecutive_and_indices_stay_whatever_else_is_wrong():
    lines = b'a\n# b\n{"prompt": 1}\n{"prompt": "c", "seed": 7}\n'
    made = jobs(lines, "{index}-{line}.mp4", seed=3, num=2)
    clips = [job for job in made if isinstance(job, Job)]
    seeds = {job.target: (job.index, job.request.seed) for job in clips}
    expected = {"1-1.mp4": (1, 3), "2-1.mp4": (2, 4), "5-4.mp4": (5, 7), "6-4.mp4": (6, 8)}
    assert list(seeds.items()) == list(expected.items())
    assert [job.line for job in made if isinstance(job, Refused)] == [3]
    drawn = {job.request.seed for job in jobs(b"a\nb", "{index}.mp4", num=3)}
    assert len(drawn) == 6
    (refused,) = jobs(b"a", "{index}.mp4", seed=2**63 - 1, num=2)
    assert "seed 9223372036854775808 is not between" in str(refused)


def test_own_outputs_lie_in_the_folder_of_the_commands():
    line = b'{"prompt": "a", "output": "b/{slug}.gif"}'
    assert jobs(line, "clips/{index}.mp4")[0].target == "clips/b/a.gif"
    assert jobs(line)[0].target == "b/a.gif"
    assert "all of them go to stdout" in str(jobs(line, "-")[0])
    assert "no output" in str(jobs(b"a")[0])


def test_a_still_has_one_frame():
    (job,) = jobs(b"a", "a.png")
    assert (job.encoding.format, job.request.frames) == ("png", 1)
    (refused,) = jobs(b"a", "a.png", frames=4)
    assert "a.png holds one frame, not 4" in str(refused)


def test_a_pipe_gives_its_lines_as_they_come(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    entries, ahead = open_entries(str(path))
    assert not ahead
    os.write(writer, b"a\nb\n")
    assert [next(entries).values["prompt"] for _ in range(2)] == ["a", "b"]
    assert next(entries) is None
    os.write(writer, b"c\n")
    assert next(entries).values == {"prompt": "c"}


def test_a_file_is_known_to_its_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n")
    entries, ahead = open_entries(str(path))
    assert ahead and len(list(entries)) == 2
    with pytest.raises(FileNotFoundError):
        open_entries(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="is a folder"):
        open_entries(str(tmp_path))


def test_those_that_are_alike_are_made_together_in_order():
    def job(index: int, **options) -> Job:
        plan = resolve(Request(prompt="a", **options), MINI)
        return Job(index, 1, Request(), "a.mp4", Encoding("mp4"), plan)

    one, two, three, other = job(1, seed=1), job(2, seed=2), job(3, seed=1), job(4, steps=3)
    refused, kept = Refused(9, 9, ValueError("no")), replace(one, exists=True)
    assert list(group([one, two, three, other], 2)) == [[one, two], [three], [other]]
    assert list(group([one, refused, two, kept, kept, three], 8)) == [*([one], refused, [two], [kept], [kept], [three])]
    assert list(group([one, None, None, two, three], 8)) == [[one], [two, three]]


JOBS = [{"prompt": "a dog"}, {"prompt": "a cat", "seed": 3}, "a bird"]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (json.dumps(JOBS).encode(), [1, 1, 1]),
        (json.dumps(JOBS, indent=2).encode(), [2, 5, 9]),
        (b"# jobs\n\n" + json.dumps(JOBS, indent=2).encode(), [4, 7, 11]),
        (b"[" + b",\n".join(json.dumps(job).encode() for job in JOBS) + b"]\n", [1, 2, 3]),
        # what jq prints
        ("\n".join(json.dumps(job, indent=2) for job in JOBS).encode(), [1, 4, 8]),
        ("\r\n".join(map(json.dumps, JOBS[:2])).encode("utf-16") + "\r\na bird".encode("utf-16-le"), [1, 2, 3]),
        (json.dumps(JOBS, indent=1).encode("utf-16"), [2, 5, 9]),
        (b"\xef\xbb\xbf" + b"\n".join(json.dumps(job).encode() for job in JOBS[:2]) + b"\na bird", [1, 2, 3]),
    ],
)
def test_json_over_lines_and_text_of_windows_are_read_as_what_they_are(data, lines):
    expected = [*JOBS[:2], {"prompt": "a bird"}]
    assert list(read_entries(io.BytesIO(data))) == [Entry(*both) for both in zip(lines, expected, strict=True)]


@pytest.mark.parametrize(
    "data", [b'[\n{"prompt": "a dog"},\n{"prompt"\n]', b'{\n"prompt": "a dog"\n', b'[{"prompt": "a dog"},\n']
)
def test_json_that_breaks_off_is_refused_whole(data):
    (entry,) = read_entries(io.BytesIO(data))
    assert entry.line == 1 and "begins JSON that is not readable" in str(entry.values)


def test_a_value_that_is_no_job_is_refused_alone_and_brackets_may_begin_a_prompt():
    first, second = read_entries(io.BytesIO(b'[\n7,\n"a dog"]'))
    assert "7 is neither a prompt nor an object" in str(first.values)
    assert second == Entry(3, {"prompt": "a dog"})
    for prompt in ("[neon] a sign", '["open"] on a sign', "[a sign", "{a} sign"):
        (entry,) = read_entries(io.BytesIO(prompt.encode()))
        assert isinstance(entry.values, ValueError) == prompt.startswith("{") or entry.values == {"prompt": prompt}
