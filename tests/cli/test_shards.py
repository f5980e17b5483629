"""The clips of one file, made by several processes."""

import json
from pathlib import Path

import pytest

from cmdgen.options import Shard, parse_shard


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Seven clips; some of them cannot be one forward with their neighbours, one is refused."""
    lines = [
        *("a dog", "a cat", '{"prompt": "a bird", "steps": 3}', "a red car", '{"prompt": "none", "steps": 0}'),
        *("a dog jumping", "two birds"),
    ]
    path = tmp_path / "jobs.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("batch", [1, 2])
def test_shards_make_the_files_of_one_process(batch: int, jobs: Path, cmdgen, tiny_model: Path, tmp_path: Path) -> None:
    options = ["sample", "-f", jobs, "--seed", 1, "--model", tiny_model, "--batch", batch, "--json"]
    whole = cmdgen(*options, "-o", tmp_path / "whole/{index}-{slug}.mp4")
    parts = [cmdgen(*options, "--shard", f"{i}/2", "-o", tmp_path / "parts/{index}-{slug}.mp4") for i in (1, 2)]
    assert (whole.code, sorted(part.code for part in parts)) == (6, [0, 6])
    assert len(files(tmp_path / "whole")) == 6
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    made = [json.loads(line)["index"] for part in parts for line in part.out.splitlines()]
    assert sorted(made) == [1, 2, 3, 4, 5, 6, 7]


def test_a_shard_started_again_makes_what_it_lacks(jobs: Path, cmdgen, tiny_model: Path, tmp_path: Path) -> None:
    options = ["sample", "-f", jobs, "--seed", 1, "--model", tiny_model, "--skip-existing", "--json"]
    options += ["--shard", "2/2", "-o", tmp_path / "{index}.mp4"]
    cmdgen(*options)
    # what another shard makes meanwhile moves nothing from one shard to another
    (tmp_path / "1.mp4").touch()
    (tmp_path / "4.mp4").unlink()
    again = [json.loads(line) for line in cmdgen(*options).out.splitlines()]
    assert [(made["index"], made.get("skipped", False)) for made in again] == [(2, True), (4, False), (6, True)]


def test_a_shard_may_be_empty_and_one_prompt_has_shards(cmdgen, tiny_model: Path, tmp_path: Path) -> None:
    options = ["sample", "a dog", "--model", tiny_model, "-o", tmp_path / "{index}.png"]
    empty = cmdgen(*options, "--shard", "2/2")
    assert (empty.code, empty.out) == (0, "")
    assert cmdgen(*options, "--num", 3, "--shard", "2/2").out == f"{tmp_path / '2.png'}\n"


def test_one_name_in_two_shards_is_an_error_of_both(cmdgen, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog\na cat\n")
    for shard in ("1/2", "2/2"):
        result = cmdgen(
            "sample", "-f", tmp_path / "a.txt", "--model", tiny_model, "-o", tmp_path / "a.png", "--shard", shard
        )
        assert result.code == 2 and "is the name of a clip of line" in result.err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4"}, Shard(2, 4)),
        # --array=1-3, and --array=0-20:10
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}, Shard(2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "10", "SLURM_ARRAY_TASK_STEP": "10", "SLURM_ARRAY_TASK_COUNT": "3"}, Shard(1, 3)),
        # torchrun in each task
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "RANK": "3", "WORLD_SIZE": "4"}, Shard(7, 8)),
    ],
)
def test_a_shard_is_read_from_the_environment(environment: dict[str, str], shard: Shard, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert parse_shard("auto") == shard


def test_what_is_no_shard_is_refused(monkeypatch) -> None:
    for text in ("0/2", "3/2", "1/0", "1", "a/b", "-1/2", ""):
        with pytest.raises(ValueError, match="is neither auto nor I/N, from 1/N to N/N"):
            parse_shard(text)
    with pytest.raises(ValueError, match="neither a SLURM array nor torchrun started this process"):
        parse_shard("auto")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    # --array=0,7
    for number in ("7", "x"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", number)
        with pytest.raises(ValueError, match="do not count tasks one by one"):
            parse_shard("auto")
