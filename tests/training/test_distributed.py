"""Several processes train as one does, and go on from each other's checkpoints."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from cmdgen.training.checkpoint import load_checkpoint, save_checkpoint, save_shards
from cmdgen.training.distributed import Ranks, join
from cmdgen.training.randomness import Draws, seeded
from cmdgen.weights import save_tensors
from tests.training.ranks import FEW

STAGES = ("vae", "autoencoder", "content", "motion", "decoder", "evdm")


def curve(folder: Path, stage: str) -> list[list[float]]:
    lines = map(json.loads, (folder / "training" / stage / "log.jsonl").read_text().splitlines())
    return [[line["loss"], line["grad"]] for line in lines if "grad" in line]


def loaded(folder: Path, stage: str) -> object:
    """Return the step and a hash of each tensor that a checkpoint gave."""
    return json.loads((folder / "training" / stage / "loaded.json").read_text())


def copy(folder: Path, name: str, *removed: str) -> Path:
    target = folder.with_name(name)
    shutil.copytree(folder, target)
    for stage in removed:
        shutil.rmtree(target / "training" / stage)
    return target


def steps_are_equal(place: Path) -> None:
    """Every stage, by one process and by two."""
    from tests.training.ranks import train

    one = place / "one"
    for stage in STAGES:
        two = copy(one, f"two-{stage}") if one.exists() else place / f"two-{stage}"
        options = ("--gradient-checkpointing", "--accumulate", 2) if stage in ("content", "evdm") else ()
        folders = (place / "evdm-one", place / "evdm-two") if stage == "evdm" else (one, two)
        for world, folder in enumerate(folders, 1):
            train(world, stage, folder, 2, *options)
        alone, together = (torch.tensor(curve(folder, stage), dtype=torch.float64) for folder in folders)
        assert len(alone) == 2
        error = (together / alone - 1).abs()
        print(f"{stage}: loss {error[:, 0].max():.1e}, gradient {error[:, 1].max():.1e}")
        assert error[:, 0].max() < 1e-6 and error[:, 1].max() < 1e-5, stage


def gradients_are_rounded_alone(place: Path) -> None:
    """With --reduce bf16 the losses are of the same weights; gradients differ by what bfloat16 rounds."""
    from tests.training.ranks import train

    one, two = copy(place / "one", "exact", "autoencoder"), copy(place / "one", "rounded", "autoencoder")
    train(1, "autoencoder", one, 1)
    train(2, "autoencoder", two, 1, "--reduce", "bf16")
    (loss, gradient), (near, rough) = curve(one, "autoencoder") + curve(two, "autoencoder")
    print(f"rounded: gradient {abs(rough / gradient - 1):.1e}")
    assert abs(near / loss - 1) < 1e-6 and 1e-6 < abs(rough / gradient - 1) < 2**-8


def distillation_is_shared(place: Path) -> None:
    """A pruned denoiser and a small decoder; with a critic, which sees some clips of each process, two train too."""
    from cmdgen.cli.app import main
    from tests.training.ranks import fork, train

    teacher, one = place / "one", place / "small"
    assert fork(1, lambda _: main(["compress", "prune", str(teacher), "-o", str(one), "--rule", "vdmini"])) == [0]
    for stage, options in (("content", ("--mca", 0)), ("decoder", ())):
        two = copy(one, f"small-{stage}")
        for world, folder in ((1, one), (2, two)):
            train(world, stage, folder, 2, "--teacher", teacher, *options)
        alone, together = (torch.tensor(curve(folder, stage), dtype=torch.float64) for folder in (one, two))
        error = (together / alone - 1).abs()
        print(f"{stage} of a teacher: loss {error[:, 0].max():.1e}, gradient {error[:, 1].max():.1e}")
        assert error[:, 0].max() < 1e-6
    train(2, "motion", one, 2, "--teacher", teacher)
    assert len(curve(one, "motion")) == 2


def any_number_goes_on(place: Path) -> None:
    """A checkpoint of one goes on in one and two, that of two in one and, in two nodes, four; all bits are equal."""
    from tests.training.ranks import train

    for before, stage in ((1, "autoencoder"), (2, "content")):
        begun = copy(place / "one", f"begun-{before}", stage)
        train(before, stage, begun, 1)
        hashes, losses = [], []
        for world in (1, 2 * before):
            folder = copy(begun, f"{begun.name}-{world}")
            train(world, stage, folder, 2, nodes=before)
            hashes.append(loaded(folder, stage))
            losses.append(curve(folder, stage)[1][0])
            # one format replaces the other
            kinds = {path.suffix for path in (folder / "training" / stage).glob("checkpoint*")}
            assert kinds == {"" if world > 1 else ".safetensors"}
        assert hashes[0] == hashes[1]
        error = max(abs(loss / losses[0] - 1) for loss in losses)
        print(f"{stage} from {before}: loss of the next step {error:.1e}")
        assert error < 1e-6


def checkpoints_are_whole(place: Path) -> None:
    """The leading process dies at every rename of a second checkpoint."""
    from tests.killing import _die
    from tests.training.ranks import fork

    folder = place / "torn"
    folder.mkdir()

    def write(rank: int, step: int, die_at: int) -> None:
        with join(torch.device("cpu")) as ranks:
            from torch.distributed.tensor import distribute_tensor

            full = torch.arange(10.0) + step
            tensors = {"a": distribute_tensor(full, ranks.mesh), "b": torch.tensor(float(step))}
            if die_at and rank == 0:
                _die(die_at)
            save_shards(folder, tensors, {"step": step}, ranks, background=bool(step % 2)).result()

    assert fork(2, partial(write, step=1, die_at=0)) == [0, 0]
    died = 0
    while True:
        codes = fork(2, partial(write, step=2, die_at=died + 1))
        read = load_checkpoint(folder)
        assert read is not None
        step = read.state["step"]
        tensors = {"a": torch.zeros(10), "b": torch.zeros(())}
        read.copy_to(tensors)
        assert torch.equal(tensors["a"], torch.arange(10.0) + step) and tensors["b"] == step
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors", ".json"}
        if codes == [0, 0]:
            break
        died += 1
        assert codes[0] == 9 and codes[1] != 0, codes
    assert died >= 2 and step == 2
    assert [path.name for path in folder.iterdir()] == ["checkpoint-000000002"]
    print(f"torn: {died} renames")


def test_several_processes_train_as_one(tmp_path: Path) -> None:
    # in a process of its own, whose children share what it imports
    subprocess.run([sys.executable, "-m", __name__, tmp_path], check=True, timeout=900)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    # of a zombie nothing is left but its exit code
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="the list of children is Linux's")
def test_a_killed_rank_ends_all_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    train = ["-m", "tests.training.ranks", "vae", "-o", tmp_path, *FEW, "--steps", 100_000, "--save-every", 0]
    with subprocess.Popen([*launch, "--standalone", *map(str, train)], stderr=subprocess.PIPE) as torchrun:
        state, deadline = tmp_path / "training/vae", time.monotonic() + 300
        while not list(state.glob("checkpoint-*")) and time.monotonic() < deadline:
            assert torchrun.poll() is None
            time.sleep(0.2)
        ranks = children(torchrun.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert torchrun.wait(timeout=120) != 0
    assert not any(map(is_running, ranks))
    read = load_checkpoint(state)
    assert read is not None and read.state["step"] > 0


def test_what_is_wrong_with_a_checkpoint_of_shards_is_one_line(tmp_path: Path) -> None:
    """Checked before anything is read."""
    place = tmp_path / "checkpoint-000000001"
    place.mkdir()
    save_tensors(place / "a.safetensors", {"a": torch.arange(3.0)})
    digest = hashlib.blake2b((place / "a.safetensors").read_bytes(), digest_size=16).hexdigest()
    for state, says in (
        ({"step": 1, "files": {"a.safetensors": "0"}}, "a.safetensors is damaged: its digest is another one"),
        ({"step": 1, "files": {}}, "names other files than there are"),
        ({"step": 1, "files": {"a.safetensors": digest, "b.safetensors": digest}}, "names other files"),
        ({"step": 1}, "names other files"),
        ([], "is not a JSON object"),
    ):
        (place / "state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match=f"^{place} is not a readable checkpoint: use --restart .*{says}"):
            load_checkpoint(tmp_path)
    (place / "state.json").write_text(json.dumps({"step": 1, "files": {"a.safetensors": digest}}))
    read = load_checkpoint(tmp_path)
    assert read is not None and (read.state, read.shapes) == ({"step": 1}, {"a": [3]})
    # a kill may leave it beside one of one process
    kept = shutil.copytree(place, tmp_path / "kept")
    for step in (0, 3):
        save_checkpoint(tmp_path, {"a": torch.zeros(3)}, {"step": step})
        assert not place.exists()
        shutil.copytree(kept, place)
        newest = load_checkpoint(tmp_path)
        assert newest is not None and newest.state["step"] == max(1, step)


def test_a_batch_is_shared_out_evenly(tmp_path: Path) -> None:
    ranks = [Ranks(rank, 3) for rank in range(3)]
    assert [list(range(6))[one.part(6)] for one in ranks] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="a batch of 8 rows is not a multiple of the 3 processes"):
        ranks[0].part(8)
    whole = Draws(seeded("x"), 6)(torch.randn, 5)
    parts = [Draws(seeded("x"), 6, one.part(6))(torch.randn, 5) for one in ranks]
    assert torch.equal(torch.cat(parts), whole)


if __name__ == "__main__":
    # imported once, and not in every child
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor

    from cmdgen.training import run  # noqa: F401
    from tests.training.ranks import prepare

    prepare()
    for check in (
        *(checkpoints_are_whole, steps_are_equal, gradients_are_rounded_alone),
        *(distillation_is_shared, any_number_goes_on),
    ):
        if len(sys.argv) < 3 or check.__name__ in sys.argv[2:]:
            started = time.monotonic()
            check(Path(sys.argv[1]))
            print(f"{check.__name__}: {time.monotonic() - started:.0f} s")
