"""A pruned model learns from the whole one in the loop of all stages; a small decoder from the large one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cmdgen.compression.distill import Critic
from cmdgen.config import MINI
from cmdgen.diffusion.schedule import alphas_cumprod
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.tiny_vae import TinyVae
from cmdgen.models.unet import UNet
from cmdgen.store.parts import read_model
from cmdgen.training.config import ContentLoss
from cmdgen.training.distillation import Distillation
from cmdgen.training.distributed import Ranks
from cmdgen.weights import read_tensors
from tests.video_unets import randomise

FEW = ("--batch", 4, "--clips", 4, "--held-out", 2, "--data", "shapes", "--log-every", 1, "--threads", 1)


@pytest.fixture
def small(cmdgen, tiny_model: Path, tmp_path: Path) -> Path:
    assert cmdgen("compress", "prune", tiny_model, "-o", tmp_path / "small", "--rule", "vdmini").code == 0
    return tmp_path / "small"


def read_log(folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "training" / stage / "log.jsonl").read_text().splitlines()]


def test_a_student_learns_and_resumes_exactly_with_its_critic(
    cmdgen, tiny_model: Path, small: Path, tmp_path: Path
) -> None:
    shutil.copytree(small, tmp_path / "other")
    before, about = UNet.from_pretrained(small / "unet").state_dict(), read_model(small)
    teach = ("train", "content", "--teacher", tiny_model, *FEW)
    done = cmdgen(*teach, "-o", small, "--steps", 4)
    assert done.code == 0, done.err
    for steps in (2, 4):
        assert cmdgen(*teach, "-o", tmp_path / "other", "--steps", steps).code == 0
    states = [read_tensors(each / "training/content/checkpoint.safetensors")[0] for each in (small, tmp_path / "other")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert any(name.startswith("exp_avg.critic.") for name in states[0])
    # the model is the same, with other weights, and the critic no part of it
    assert read_model(small) == about and not (small / "critic").exists()
    after = UNet.from_pretrained(small / "unet").state_dict()
    assert not all(torch.equal(after[name], tensor) for name, tensor in before.items())
    logged = [line for line in read_log(small, "content") if "icd" in line]
    assert len(logged) == 4 and all(line["icd"] > 0 for line in logged) and any("mca" in line for line in logged)


def test_the_critics_gradient_is_as_long_as_that_of_the_task() -> None:
    part = object.__new__(Distillation)
    part.weights = ContentLoss(icd=0.0, mca=0.5)
    part.teacher, part.ranks = torch.nn.Identity(), Ranks()
    part.matched = SimpleNamespace(difference=lambda grid: torch.zeros(()))  # type: ignore[assignment]
    part.autoencoder = randomise(CmdAutoencoder(replace(MINI.autoencoder, width=20, heads=2, decoder_depth=2)))
    part.critic = Critic(20, 2)
    motion = torch.randn(5, 8, 3, 4)
    stage = SimpleNamespace(
        alphas=alphas_cumprod(MINI.noise), noise=MINI.noise, halves=lambda x0, batch: (x0, batch["motion"])
    )
    # the critic sees two of five clips; the first is too noisy
    batch = {"timestep": torch.tensor([900, 10, 500, 20, 30]), "motion": motion}
    noisy, taught, output = torch.randn(3, 5, 8, 6, 6)
    output.requires_grad_()
    task = 1e-3 * output.square().mean()
    total, named = part.loss(stage, batch, noisy, (output, taught), task)
    assert float(total.detach()) == pytest.approx(float(named["critic"].detach()))
    (task_alone,) = torch.autograd.grad(task, output, retain_graph=True)
    total.backward()
    assert float(output.grad[1:3].norm()) == pytest.approx(0.5 * float(task_alone[1:3].norm()), rel=1e-4)
    assert not output.grad[[0, 3, 4]].any()


def test_motion_and_the_critic_alone_are_taught_too(cmdgen, tiny_model: Path, small: Path) -> None:
    arguments = ("--teacher", tiny_model, *FEW, "-o", small, "--steps", 2)
    assert cmdgen("train", "motion", *arguments, "--mca", 0).code == 0
    logged = read_log(small, "motion")
    # in the first step all blocks are the teacher's, which lost none here
    assert logged[0]["icd"] == 0 and "mca" not in logged[0]
    state, _ = read_tensors(small / "training/motion/checkpoint.safetensors")
    assert not any(name.startswith("exp_avg.critic.") for name in state)


def test_a_small_decoder_learns_from_the_large_one(cmdgen, tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cmdgen("train", "decoder", "--teacher", tiny_model, *FEW, "-o", run, "--steps", 30, "--lr", 0.003)
    assert done.code == 0, done.err
    assert TinyVae.from_pretrained(run / "decoder").config.latent_channels == 8
    pixels = [line["pixels"] for line in read_log(run, "decoder") if "pixels" in line]
    assert pixels[-1] < pixels[0] and "psnr_teacher" in read_log(run, "decoder")[-1]
    made = cmdgen("sample", "a dog", "--model", tiny_model, "--decoder", run / "decoder", "-o", tmp_path / "a.gif")
    assert made.code == 0, made.err


def test_what_cannot_be_taught_is_refused(cmdgen, tiny_model: Path, small: Path, tmp_path: Path) -> None:
    teach = ("--teacher", tiny_model, *FEW, "-o", small)
    for arguments, message in (
        (("content", "-o", tmp_path / "run", "--icd", 1), "--icd has no effect without --teacher"),
        (("vae", *teach), "--teacher has no effect on vae"),
        (("content", *teach, "--size", "64x64"), "--size has no effect with --teacher"),
        (("content", *teach, "--attention-threshold", 1.5), "--attention-threshold has no effect with --teacher"),
        (("content", *teach, "-o", tmp_path / "run"), "is no model: cmdgen compress prune"),
        (("content", *teach, "--teacher", "mini"), "was not pruned from mini"),
    ):
        done = cmdgen("train", *arguments)
        assert done.code and message in done.err, (arguments, done)
