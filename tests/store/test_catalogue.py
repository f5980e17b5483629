"""What is said of models is what they are; random models are whole models."""

import json
import shutil
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from cmdgen.config import CMD_SD15, CMD_SD21, CMD_UCF, MINI, PRESETS, NoiseConfig, packaged_models
from cmdgen.files import write_json
from cmdgen.models.text import ClipTextModel
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.models.vae import KlVae
from cmdgen.pipelines.load import load_pipeline
from cmdgen.schema import read_config, write_config
from cmdgen.store.catalogue import check_folder, count_part, describe_folder, describe_preset, read_licence
from cmdgen.store.create import create_model
from cmdgen.store.parts import NETWORKS, network_configs, read_model


def small(model):
    """A preset at widths that are written in a moment, its text encoder's ids as they are."""
    return replace(
        model,
        text=model.text and replace(model.text, hidden_size=32, intermediate_size=32),
        content=replace(model.content, block_out_channels=(32, 32, 32, 32), cross_attention_dim=32)
        if model.text
        else replace(model.content, width=16, depth=1, heads=1),
        vae=model.vae and replace(model.vae, block_out_channels=(32, 32, 32, 32)),
        autoencoder=replace(model.autoencoder, width=16, heads=2, depth=1),
        motion=replace(model.motion, width=16, heads=1, depth=1, text_width=32 if model.text else None),
    )


SD15 = replace(small(CMD_SD15), text=replace(CMD_SD15.text, num_hidden_layers=1, hidden_size=768))
SD15 = replace(
    SD15, content=replace(SD15.content, cross_attention_dim=768), motion=replace(SD15.motion, text_width=768)
)


def write_sparse(path: Path, module: torch.nn.Module) -> None:
    """A safetensors file of a module's tensors, zeros in half precision that take no room."""
    tensors, end = {}, 0
    for name, tensor in module.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        tensors[name] = {"dtype": "F16", "shape": [*tensor.shape], "data_offsets": [start, end]}
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


def parameters(model) -> dict[str, int]:
    return {part.name: part.parameters for part in describe_preset(model).parts}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_the_table_of_parameters_is_what_the_networks_have(preset) -> None:
    assert parameters(preset) == {name: count_part(name, config) for name, config in network_configs(preset).items()}


def test_the_table_of_parts_names_the_files_of_the_networks() -> None:
    assert all(part.filename == part.network.filename for part in NETWORKS.values())


def test_presets_have_the_published_parameter_counts() -> None:
    sd15, sd21, ucf = map(parameters, (CMD_SD15, CMD_SD21, CMD_UCF))
    assert (sd15["unet"], sd21["unet"]) == (859_520_964, 865_910_724)
    # ViT-L's text half, and ViT-H's without its last layer
    assert (sd15["text_encoder"], sd21["text_encoder"]) == (123_060_480, 340_387_840)
    assert sd15["vae"] == sd21["vae"] == 83_653_863
    assert sd15["autoencoder"] == sd21["autoencoder"] == 47_365_656
    assert ucf["autoencoder"] == 47_359_510
    # DiT-XL and, for UCF, DiT-L, without the projection of the text
    assert sd21["motion"] - 1025 * 1152 == pytest.approx(674.0e6, rel=1e-3)
    assert sd15["motion"] - 769 * 1152 == pytest.approx(674.0e6, rel=1e-3)
    assert ucf["motion"] == pytest.approx(457.1e6, rel=1e-3)
    assert list(ucf) == ["transformer", "autoencoder", "motion"]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_preset_fits_itself_alone(preset) -> None:
    described = describe_preset(preset, dtype="float32")
    assert described.presets == (preset.name,)
    assert described.bytes == 4 * described.parameters


def test_the_packaged_model_is_described_as_its_card_says() -> None:
    mini = describe_folder(packaged_models()["mini"], "mini")
    assert mini.parameters == 19_690_348
    assert mini.presets == ("mini",)
    assert mini.licence == "apache-2.0"
    assert {part.dtype for part in mini.parts} == {"float16"}
    assert describe_preset(MINI).parameters == mini.parameters


def test_parts_of_stable_diffusion_fit_though_their_files_differ_in_what_does_not_matter(tmp_path: Path) -> None:
    # as the file of the original says: a legacy end token, another size
    text = replace(CMD_SD15.text, eos_token_id=2)
    vae = replace(CMD_SD15.vae, sample_size=256)
    with torch.device("meta"):
        modules = {"vae": KlVae(vae), "text_encoder": ClipTextModel(text)}
    for name, module in modules.items():
        write_config(module.config, tmp_path / name)
        write_sparse(tmp_path / name / module.filename, module)
    write_json(tmp_path / "model_index.json", {})
    found = describe_folder(tmp_path, "sd")
    assert {part.name: part.presets for part in found.parts} == {
        "text_encoder": ("cmd-sd15",),
        "vae": ("cmd-sd15", "cmd-sd21"),
    }
    assert found.presets == ("cmd-sd15",)
    assert found.licence is None


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags:\n- x\n---\n# m", "creativeml-openrail-m"),
        ("---\nlicense: other\nlicense_name: 'acme'\n---\n", "acme"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: \x1b[31mred\n---\n", "[31mred"),
        ("# no header\nlicense: mit\n", None),
        ("---\nlicense:\n---\n", None),
        ("\ud800", None),
    ],
)
def test_the_licence_is_read_from_the_header_of_the_card(tmp_path, card, licence) -> None:
    (tmp_path / "README.md").write_bytes(card.encode("utf-8", "surrogatepass"))
    assert read_licence(tmp_path) == licence


def test_a_huge_card_takes_little_memory(tmp_path) -> None:
    with (tmp_path / "README.md").open("wb") as file:
        file.write(b"---\nlicense: mit\n---\n")
        file.truncate(2**28)
    tracemalloc.start()
    try:
        assert read_licence(tmp_path) == "mit"
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_what_is_wrong_with_a_folder_is_named(tiny_model: Path, tmp_path: Path) -> None:
    def error(folder: Path) -> str:
        with pytest.raises(ValueError) as caught:
            check_folder(folder, weights=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = folder / "vae" / KlVae.filename
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert f"{weights}: not a readable safetensors file" in error(folder)
    state = load_file(tiny_model / "vae" / KlVae.filename)
    del state["quant_conv.bias"]
    save_file(state, weights)
    assert error(folder) == f"{weights}: tensor quant_conv.bias is missing"
    weights.rename(weights.with_suffix(".bin"))
    assert "the weights are pickled, and reading those could run any code" in error(folder)
    shutil.rmtree(folder / "vae")
    assert error(folder) == f"{folder}: vae/ is missing, model_index.json lists it"
    shutil.rmtree(folder)
    folder.mkdir()
    assert error(folder) == f"{folder / 'model_index.json'}: No such file or directory"
    write_json(folder / "model_index.json", {})
    assert "has none of the parts text_encoder, unet" in error(folder)


def test_a_random_mini_samples_and_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    create_model(MINI, tmp_path / "a", seed=3, dtype=torch.float16)
    create_model(MINI, tmp_path / "b", seed=3, dtype=torch.float32)
    create_model(MINI, tmp_path / "c", seed=4, dtype=torch.float16)
    assert read_model(tmp_path / "a") == MINI
    assert describe_folder(tmp_path / "a", "a").presets == ("mini",)
    states = [load_file(tmp_path / name / "unet" / KlVae.filename) for name in "abc"]
    name = "conv_in.weight"
    assert torch.equal(states[0][name], states[1][name].half())
    assert not torch.equal(states[0][name], states[2][name])
    pipeline = load_pipeline(tmp_path / "a", device="cpu")
    clip = pipeline.sample("a corgi swimming", steps=1, motion_steps=1, frames=2)
    assert clip.frames.shape == (2, 96, 96, 3)
    assert clip.frames.std() > 0


@pytest.mark.parametrize("model", [SD15, small(CMD_UCF)], ids=["cmd-sd15", "cmd-ucf"])
def test_random_models_of_the_papers_shape_are_read_as_written(model, tmp_path: Path) -> None:
    create_model(model, tmp_path / "model")
    assert read_model(tmp_path / "model") == model
    assert (tmp_path / "model" / "tokenizer").is_dir() == (model.text is not None)
    assert "Never trained" in (tmp_path / "model" / "README.md").read_text()


def test_the_tokenizer_of_a_random_model_ends_texts_where_clips_does(tmp_path: Path) -> None:
    create_model(SD15, tmp_path / "model")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (49406, 49407)
    assert SD15.text.eos_token_id == 49407
    assert max(tokenizer.vocab.values()) < SD15.text.vocab_size
    # no word is called unknown: none was ever shown
    assert tokenizer.unknown_words("a zyzzyva") == []
    peer = CLIPTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    text = "Two dogs' naïve 🐶 jump!"
    ids = peer(text).input_ids
    assert tokenizer([text], 30)[0, : len(ids)].tolist() == ids


def test_a_folder_that_is_there_is_left_alone_and_a_failure_leaves_none(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken exists already: give another folder"):
        create_model(MINI, tmp_path / "taken")
    with pytest.raises(ValueError, match="does not exist"):
        create_model(MINI, tmp_path / "no" / "model")

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KlVae, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        create_model(MINI, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert list((tmp_path / "taken").iterdir()) == []


def test_what_did_not_arrive_as_meant_is_named_with_its_remedy(tiny_model: Path, tmp_path: Path, cmdgen) -> None:
    folder, target = tmp_path / "model", tmp_path / "a.mp4"
    shutil.copytree(tiny_model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()

    def says(text: str, code: int, name: Path = folder) -> None:
        for command in (("models", "show", name), ("sample", "a dog", "-o", target, "--model", name)):
            done = cmdgen(*command)
            assert text in done.err and done.code == code and done.err.count("error:") == 1, done
        assert not target.exists()

    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 343816753\n")
    says("is a Git LFS pointer to a file that is not here: `git lfs pull` brings it", 1)
    weights.with_suffix(".bin").write_bytes(b"")
    weights.unlink()
    says("the weights are pickled, and reading those could run any code", 1)
    weights.write_bytes(whole)
    says("is no checkpoint of Stable Diffusion 1 or 2", 2, weights)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", 7])
def test_a_scheduler_that_no_sampler_integrates_is_refused(tmp_path: Path, name: object) -> None:
    write_json(tmp_path / "scheduler_config.json", {"_class_name": name, "num_train_timesteps": 1000})
    with pytest.raises(ValueError, match=r"_class_name .* is not supported, only 'DDIMScheduler', .* are"):
        read_config(tmp_path, NoiseConfig)
    known = {"PNDMScheduler": "ddim", "EulerDiscreteScheduler": "euler", "LCMScheduler": "lcm", None: "ddim"}
    for name, solver in known.items():
        write_json(tmp_path / "scheduler_config.json", {"_class_name": name} if name else {})
        assert read_config(tmp_path, NoiseConfig) == NoiseConfig(solver=solver)
