import json
import os
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# torch.compile compiles a few small functions here: starting its pool of processes takes longer
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # read when the kernels are imported: without a GPU their tests run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cmdgen.config import MINI, ModelConfig, UNetConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.text import ClipTextModel
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.store.parts import write_model_index

MOST_WORKERS = 8
CAPTIONS = ["a dog swimming in the ocean", "a red car driving", "two birds flying in the sky"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in parallel where pytest-xdist is installed; `-n 0` turns that off."""
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if option.numprocesses is None and whole and not option.usepdb:
        option.numprocesses = min(os.cpu_count() or 1, MOST_WORKERS)
        option.dist = "worksteal"
    if option.numprocesses:
        # the workers share the cores, and read this when they import torch
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def tiny_config() -> ModelConfig:
    """mini's shape at the smallest width that every part still works at."""
    assert MINI.text is not None
    assert MINI.vae is not None
    assert isinstance(MINI.content, UNetConfig)
    text, content, vae = MINI.text, MINI.content, MINI.vae
    return replace(
        MINI,
        name="tiny",
        text=replace(
            text,
            **{"vocab_size": 560, "hidden_size": 16, "intermediate_size": 32},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16},
        ),
        content=replace(
            content,
            block_out_channels=(16,) * len(content.block_out_channels),
            **{"cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4},
        ),
        vae=replace(vae, block_out_channels=(8,) * len(vae.block_out_channels), norm_num_groups=4),
        autoencoder=replace(MINI.autoencoder, patch=2, width=16, heads=2, depth=1, decoder_depth=None),
        motion=replace(MINI.motion, context_patch=4, width=16, depth=1, heads=2, text_width=16),
        **{"frames": 4, "height": 32, "width": 48, "steps": 2, "motion_steps": 2, "motion_guidance": 1.0},
    )


@pytest.fixture(scope="session", autouse=True)
def no_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whoever runs the tests may have settings and models: none of them count, in no process."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights: it samples in a moment, and what it makes moves."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config()
    assert config.text is not None
    assert config.vae is not None
    assert isinstance(config.content, UNetConfig)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "text_encoder": ClipTextModel(config.text),
            "unet": UNet(config.content),
            "vae": KlVae(config.vae),
            "autoencoder": CmdAutoencoder(config.autoencoder),
            "motion": DiT(config.motion),
        }
        # what starts at zero would hide the prompt
        for parameter in parts["motion"].parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    for name, part in parts.items():
        part.save_pretrained(folder / name, dtype=torch.float32)
    tokenizer = Tokenizer.train(CAPTIONS, config.text.vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_model_index(folder, config)
    return folder


@pytest.fixture
def stills(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model without what makes it move."""
    folder = tmp_path / "models" / "still"
    shutil.copytree(tiny_model, folder)
    for part in ("autoencoder", "motion"):
        shutil.rmtree(folder / part)
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    del index["cmdgen"]
    path.write_text(json.dumps(index))
    return folder


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cmdgen(capsys):
    """Runs the command in this process."""
    from cmdgen.cli.app import main

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return Result(end.value.code or 0, *capsys.readouterr())

    return run


# what other projects' code is compared with: a machine that has come to run `-m gpu` may lack it
PEERS = ("diffusers", "transformers")
MISSING = "|".join(name for name in PEERS if find_spec(name) is None)
collect_ignore = [
    str(path)
    for path in Path(__file__).parent.rglob("test_*.py")
    if MISSING and re.search(rf"^from ({MISSING}) ", path.read_text(), re.MULTILINE)
]


def pytest_report_header() -> list[str]:
    """Say which tests are left out."""
    return [f"left out without {MISSING}: {' '.join(map(os.path.basename, collect_ignore))}"] if MISSING else []
