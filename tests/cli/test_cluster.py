"""Clips that a Ray cluster makes are those of one process, even where one of its processes dies; Ctrl-C ends all."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from cmdgen.cli.cluster import Worker
from cmdgen.cli.jobs import Batching, Entry, Job, make_jobs
from cmdgen.request import Request

ROOT = Path(__file__).parents[2]
LINES = ["a dog", "a cat", '{"prompt": "none", "steps": 0}', "a bird", "a red car", "two birds", "a dog", "a cat"]


def command(model: Path, folder: Path, *options: object) -> list[str]:
    shared = ["--model", model, "--seed", 1, "--batch", 2, "--threads", 1, "--json"]
    options = ("-f", folder.parent / "jobs.txt", "-o", folder / "{index}.mp4", *shared, *options)
    return [sys.executable, "-m", "cmdgen", "sample", *map(str, options)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(process: int) -> list[int]:
    """Return the processes that a process and its threads have started, and theirs."""
    found = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in listed.read_text().split()]
    return [one for child in found for one in (child, *descendants(child))]


def actors(process: int) -> list[int]:
    """Return the processes of a driver that are actors of ours."""
    found = []
    for child in descendants(process):
        with suppress(OSError):
            if "ray::Worker" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(child)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the list of children is Linux's")
def test_a_cluster_makes_the_files_of_one_process_though_an_actor_dies(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.txt").write_text("".join(f"{line}\n" for line in LINES))
    one, many = tmp_path / "one", tmp_path / "many"
    alone = subprocess.run(command(tiny_model, one), env=environment(), capture_output=True, text=True)
    assert alone.returncode == 6, alone.stderr
    driver = subprocess.Popen(
        command(tiny_model, many, "--ray", "local"), env=environment(), stdout=subprocess.PIPE, text=True
    )
    deadline, killed = time.monotonic() + 300, 0
    while driver.poll() is None and time.monotonic() < deadline and not killed:
        if any(many.glob("*.mp4")) and (running := actors(driver.pid)):
            os.kill(running[0], signal.SIGKILL)
            killed = running[0]
        time.sleep(0.01)
    out, _ = driver.communicate(timeout=300)
    assert killed and driver.returncode == 6
    assert {path.name: path.read_bytes() for path in many.glob("*.mp4")} == {
        path.name: path.read_bytes() for path in one.iterdir()
    }
    got, expected = (
        sorted(map(json.loads, text.splitlines()), key=lambda r: r["index"]) for text in (out, alone.stdout)
    )
    for records in (got, expected):
        for record in records:
            record.pop("seconds", None)
            record["output"] = Path(record.get("output", "")).name
    assert got == expected and len(got) == len(LINES)


@pytest.mark.skipif(sys.platform != "linux", reason="the list of children is Linux's")
def test_ctrl_c_ends_a_cluster(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.txt").write_text("".join(f"{line}\n" for line in 10 * LINES))
    driver = subprocess.Popen(
        command(tiny_model, tmp_path / "many", "--ray", "local"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # behind a shell's & it would be ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while driver.poll() is None and time.monotonic() < deadline and not actors(driver.pid):
        time.sleep(0.05)
    started = {driver.pid, *descendants(driver.pid)}
    # as a terminal does
    os.killpg(driver.pid, signal.SIGINT)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130 and "Traceback" not in err
    while (left := {each for each in started if is_alive(each)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left and len(started) > 3


def test_a_cluster_needs_files(cmdgen, tiny_model: Path, tmp_path: Path) -> None:
    for options, says in (
        (["-o", "-"], "--ray reads and writes files that all machines see"),
        (["-o", tmp_path / "a.png", "--preview", tmp_path / "b.png"], "leave it out with --ray"),
    ):
        result = cmdgen("sample", "a dog", "--model", tiny_model, "--ray", "local", *options)
        assert result.code == 2 and says in result.err


def test_without_ray_one_line_says_how_to_get_it(cmdgen, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = cmdgen("sample", "a dog", "--model", tiny_model, "-o", tmp_path / "a.png", "--ray", "local")
    assert result.code == 1 and result.err.endswith("error: --ray needs the package ray: pip install ray\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the test extra has Ray for Linux alone")
def test_a_worker_loads_what_the_command_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded: list[dict[str, object]] = []

    def load(model: str, **options: object) -> None:
        loaded.append({"model": model, **options})
        raise ValueError("seen")

    monkeypatch.setattr("cmdgen.pipelines.load.load_pipeline", load)
    asked = {"model": "small", "device": "cpu", "dtype": "float32", "compile": True, "lora": ("a:0.5",)}
    asked["decoder"] = tmp_path
    with pytest.raises(ValueError, match="seen"):
        Worker(Request(**asked), Batching(), as_json=False)
    assert loaded == [asked]


@pytest.mark.skipif(sys.platform != "linux", reason="the test extra has Ray for Linux alone")
@pytest.mark.parametrize("as_json", [False, True])
def test_a_clip_that_fails_is_a_line_of_stdout_in_json_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(was_current_actor_reconstructed=False))
    request = Request(model=str(tiny_model), output=str(tmp_path / "a" / "{index}.png"), seed=1)
    worker = Worker(request, Batching(), as_json=as_json)
    (job,) = worker.batch.check(make_jobs([Entry(1, {"prompt": "a dog"})], request, num=1))
    assert isinstance(job, Job)
    # no folder can be made there
    (tmp_path / "a").touch()
    lines, made, failed, failure = worker.make([job])
    assert (made, failed, failure) == (0, 1, None)
    assert [kind for kind, _ in lines if kind != "detail"] == ["error", "result"][: 1 + as_json]
