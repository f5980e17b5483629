"""A clip of the tiny model, and `cmdgen sample` with that model."""

import pytest

from cmdgen.cli.app import main
from cmdgen.latents import save_latents
from cmdgen.pipelines.load import load_pipeline

PROMPT = "a dog swimming in the ocean"


@pytest.fixture
def sample(cmdgen, tiny_model):
    """Runs `cmdgen sample` with the tiny model."""
    return lambda *arguments: cmdgen("sample", "--model", tiny_model, *arguments)


@pytest.fixture(scope="session")
def model(tiny_model):
    return load_pipeline(tiny_model)


@pytest.fixture(scope="session")
def clip(model):
    return model.sample(PROMPT, seed=5)


@pytest.fixture(scope="session")
def latents(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "clip.cmd.safetensors"
    save_latents(path, clip.latents)
    return path


@pytest.fixture
def streamed(capfdbinary):
    """Runs the command in this process; what it writes is bytes."""

    def run(*arguments: object) -> tuple[int, bytes, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return end.value.code or 0, out, err.decode()

    return run
