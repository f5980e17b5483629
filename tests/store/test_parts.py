"""Whole models: read as they were written, and refused in one line where parts do not fit."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdgen.config import CMD_UCF, MINI, ModelConfig, VaeConfig
from cmdgen.models.text import ClipTextModel
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.schema import write_config
from cmdgen.store.find import find_model
from cmdgen.store.parts import NETWORKS, PARTS, network_configs, read_model, shared_fields, write_model_index

TINY = VaeConfig(block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1)


def write_parts(model: ModelConfig, folder: Path) -> None:
    for name, config in network_configs(model).items():
        write_config(config, folder / name)
    write_model_index(folder, model)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("model", [MINI, CMD_UCF, replace(MINI, guidance=2.5, fps=12)])
def test_a_model_is_read_as_it_was_written(model: ModelConfig, tmp_path: Path) -> None:
    write_parts(model, tmp_path)
    assert read_model(tmp_path) == model
    assert find_model(str(tmp_path)) == tmp_path


def test_diffusers_opens_a_whole_model_as_stable_diffusion(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["a dog"], 600)
    text = replace(MINI.text, vocab_size=600, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    content = replace(
        MINI.content,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer", length=text.max_position_embeddings)
    ClipTextModel(text).save_pretrained(tmp_path / "text_encoder")
    UNet(content).save_pretrained(tmp_path / "unet")
    KlVae(TINY).save_pretrained(tmp_path / "vae")
    write_model_index(tmp_path, replace(MINI, text=text, content=content, vae=TINY))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a dog", num_inference_steps=2, height=16, width=16, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_parts_that_do_not_meet_and_bad_defaults_are_refused(tmp_path: Path) -> None:
    write_parts(MINI, tmp_path)
    index = tmp_path / "model_index.json"
    good = json.loads(index.read_text())["cmdgen"]
    for changes, message in (
        ({"frames": 0}, "frames 0 is not between 1"),
        ({"sampler": "magic"}, "sampler 'magic' is not supported, expected one of ddim"),
        ({"guidance": "7"}, "guidance '7' is not a number"),
    ):
        edit(index, cmdgen={**good, **changes})
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path)
    edit(index, cmdgen=good)
    edit(tmp_path / "unet" / "config.json", out_channels=16)
    with pytest.raises(ValueError, match="unet/ is 8, but out_channels of unet/ is 16"):
        read_model(tmp_path)
    edit(tmp_path / "unet" / "config.json", out_channels=8)
    edit(tmp_path / "motion" / "config.json", text_width=77)
    with pytest.raises(ValueError, match="text_width of motion/ is 77, but hidden_size of text_e"):
        read_model(tmp_path)


def test_an_unknown_model_and_an_empty_folder_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"unknown model 'maxi': expected a folder, OWNER"):
        find_model("maxi")
    with pytest.raises(ValueError, match=r"cmd-sd15 is a preset, its weights are random: cmdgen"):
        find_model("cmd-sd15")
    with pytest.raises(ValueError, match=r"model_index\.json: No such file"):
        read_model(find_model(str(tmp_path)))


def test_a_model_is_described_without_torch() -> None:
    code = "import sys; from cmdgen.store.find import find_model; from cmdgen.store import parts; "
    code += "parts.read_model(find_model('mini')); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("model", [MINI, CMD_UCF])
def test_every_part_of_a_model_is_in_the_table(model: ModelConfig) -> None:
    values = [value for value in vars(model).values() if hasattr(value, "__dataclass_fields__")]
    configs = {**network_configs(model), "scheduler": model.noise}
    assert len(configs) == len(values) and all(value in configs.values() for value in values)
    for name, config in network_configs(model).items():
        assert NETWORKS[name].network.config_type is PARTS[name].config is type(config)


def test_a_part_shares_the_fields_that_meet_others() -> None:
    assert shared_fields("unet") == {"in_channels", "out_channels", "cross_attention_dim"}
    assert shared_fields("text_encoder") == {"hidden_size"}
    assert shared_fields("autoencoder") == {"channels", "motion_channels"}
    for name in PARTS:
        config = PARTS[name].config
        assert all(hasattr(config(), key) for key in shared_fields(name)), name


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**9, 2**63, 10**400, "x" * 10_000, "\x1b[2J"])
    | st.floats()
    | st.text(max_size=9)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(st.text(), SCALARS, max_size=2)


@pytest.fixture(scope="module")
def descriptions(tiny_model: Path) -> dict[str, dict[str, Any]]:
    """What a model folder says of itself, by the names of files."""
    paths = [tiny_model / "model_index.json", *tiny_model.glob("*/*config.json")]
    return {path.relative_to(tiny_model).as_posix(): json.loads(path.read_text()) for path in paths}


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_description_is_a_model_or_one_line(
    descriptions: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = copy.deepcopy(descriptions)
    for _ in range(data.draw(st.integers(1, 3))):
        part = changed[data.draw(st.sampled_from(sorted(changed)))]
        part = part.get("cmdgen", part)
        if isinstance(part, dict):
            part[data.draw(st.sampled_from(sorted(part)))] = data.draw(VALUES)
    folder = tmp_path_factory.mktemp("described") / "tiny"
    for name, content in changed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    try:
        assert read_model(folder).frames >= 1
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < 600
