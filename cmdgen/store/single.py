"""Stable Diffusion 1 and 2 in one file, under the names of their authors' code, as a model folder.

Such a file has UNet, VAE and text encoder, no tokenizer and no configuration: what the networks are
is read from the shapes, and what the UNet predicts is told by running it. Only safetensors are read;
averages for further training are left out.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from cmdgen.config import CMD_SD15, CMD_SD21, ModelConfig, UNetConfig
from cmdgen.files import create_folder, user_folder
from cmdgen.models.tokenizer import EOS, Tokenizer
from cmdgen.schema import write_config
from cmdgen.store.catalogue import recognise
from cmdgen.store.hub import PICKLED, find_cached
from cmdgen.store.parts import PARTS, network_configs, write_model_index
from cmdgen.weights import build_empty, open_weights, save_tensors

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
# Stable Diffusion 1 has transformers' names of the text encoder, 2 those of open_clip
_TEXT, _OPEN_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
_RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
_OPEN_LAYER = {
    **{"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"},
    **{"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
}
_OPEN_TEXT_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


# side of the pictures that Stable Diffusion 2 is made for where it predicts velocity
_LARGE = 768


def find_imported(path: Path) -> Path:
    """Return the model folder of a checkpoint, in the user's cache: the first time, it is made."""
    stat = path.stat()
    of = hashlib.blake2b(repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns)).encode(), digest_size=8)
    folder = user_folder("cache") / "imported" / of.hexdigest() / path.stem
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            import_checkpoint(path, folder, None)
        except (OSError, ValueError):
            # another process may have made it meanwhile
            if not folder.is_dir():
                raise
    return folder


def import_checkpoint(path: Path, folder: Path, base: Path | None) -> None:
    """Write the model folder of a checkpoint, its weights as they are stored.

    The tokenizer is that of `base`, a model, or of one that was pulled. Raises ValueError where
    there is none, where the file is no Stable Diffusion 1 or 2, or where `folder` exists.
    """
    if path.suffix in PICKLED:
        raise ValueError(f"{path} is pickled, and reading it could run any code: get it as .safetensors")
    with open_weights(path, "cpu") as file, create_folder(folder) as target:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        model = replace(describe_checkpoint(path, shapes), name=folder.name)
        assert isinstance(model.content, UNetConfig)
        second, tokenizer = model.content.use_linear_projection, _find_tokenizer(path, base)
        # their authors pad texts in two ways
        Tokenizer(tokenizer.vocab, tokenizer.merges, pad="!" if second else EOS).save_pretrained(target / "tokenizer")
        for name, config in network_configs(model).items():
            try:
                network: Any = build_empty(PARTS[name].network, config)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            state = dict(_Checkpoint(path, file, shapes).read(name, network.state_dict()))
            save_tensors(target / name / PARTS[name].filename, state)
            write_config(config, target / name)
        write_model_index(target, model)
        if (predicts := recognise(target, model)) not in (None, model.noise.prediction_type):
            write_model_index(target, replace(model, noise=replace(model.noise, prediction_type=predicts)))
            if second:
                write_config(replace(model.content, sample_size=_LARGE // model.stride), target / "unet")


def _find_tokenizer(path: Path, base: Path | None) -> Tokenizer:
    """Return the tokenizer of a model, or of one in the hub's cache."""
    for folder in [base] if base is not None else [snapshot.folder for snapshot in find_cached()]:
        if (folder / "tokenizer" / "vocab.json").is_file():
            return Tokenizer.from_pretrained(folder / "tokenizer")
    raise ValueError(
        f"{path} has no tokenizer: give --tokenizer to cmdgen models import, the name of a Stable Diffusion here, or "
        "pull one"
    )


def describe_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """Tell from the shapes of a checkpoint's tensors what model it is."""

    def shape(name: str, axes: int = 4) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"{path} is no checkpoint of Stable Diffusion 1 or 2: {name} is missing")
        if len(shapes[name]) != axes or 0 in shapes[name]:
            raise ValueError(f"{path}: {name} has shape {[*shapes[name]]}, expected {axes} sides")
        return shapes[name]

    second = f"{_OPEN_TEXT}token_embedding.weight" in shapes
    preset = CMD_SD21 if second else CMD_SD15
    content, vae, text = preset.content, preset.vae, preset.text
    assert isinstance(content, UNetConfig) and vae is not None and text is not None
    widths = tuple(shape(f"{_UNET}input_blocks.{3 * i + 1}.0.out_layers.3.weight")[0] for i in range(4))
    width, channels = shape(f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", 2)[1], 4
    if shape(f"{_UNET}input_blocks.0.0.weight")[1] != channels:
        raise ValueError(f"{path} reads {shapes[f'{_UNET}input_blocks.0.0.weight'][1]} channels: 4 alone are read")
    tokens, states = shape(f"{_OPEN_TEXT if second else _TEXT + 'text_model.embeddings.'}token_embedding.weight", 2)
    inner = f"{_OPEN_TEXT}transformer.resblocks.0.mlp.c_fc.weight"
    inner = inner if second else f"{_TEXT}text_model.encoder.layers.0.mlp.fc1.weight"
    layer = re.compile(r"cond_stage_model\..*(?:resblocks|layers)\.(\d+)\.")
    layers = {int(match[1]) for name in shapes if (match := layer.match(name))}
    heads = tuple(max(1, each // 64) for each in widths) if second else content.attention_head_dim
    return replace(
        preset,
        content=replace(content, block_out_channels=widths, cross_attention_dim=width, attention_head_dim=heads),
        vae=replace(
            vae,
            block_out_channels=tuple(shape(f"{_VAE}encoder.down.{i}.block.0.conv1.weight")[0] for i in range(4)),
            sample_size=512,
        ),
        text=replace(
            text,
            vocab_size=tokens,
            hidden_size=states,
            intermediate_size=shape(inner, 2)[0],
            # of open_clip, Stable Diffusion reads the last layer but one
            num_hidden_layers=len(layers) - second,
            num_attention_heads=max(1, states // 64),
        ),
        autoencoder=None,
        motion=None,
        frames=1,
        width=512,
    )


@dataclass(frozen=True)
class _Checkpoint:
    """An open file and the shapes in it."""

    path: Path
    file: safe_open
    shapes: dict[str, tuple[int, ...]]

    def read(self, part: str, expected: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Give the tensors of a part under our names; ValueError for one that is missing or other."""
        second = f"{_OPEN_TEXT}token_embedding.weight" in self.shapes
        for name, like in expected.items():
            if part == "text_encoder" and second and (match := re.search(r"self_attn\.([qkv])_proj\.(\w+)", name)):
                layer = re.sub(r".*layers\.(\d+)\..*", r"\1", name)
                whole = self.get(f"{_OPEN_TEXT}transformer.resblocks.{layer}.attn.in_proj_{match[2]}")
                # one matrix for three; what is anything else is refused below
                fits = whole.numel() == 3 * like.numel()
                tensor = whole.view(3, -1)["qkv".index(match[1])] if fits else whole
            else:
                tensor = self.get(stored_name(part, name, second=second))
            if tensor.numel() != like.numel() or not tensor.is_floating_point():
                kind = f"{str(tensor.dtype)[6:]} {[*tensor.shape]}"
                raise ValueError(f"{self.path}: {name} is {kind}, expected numbers of shape {[*like.shape]}")
            # attention of the VAE was convolutions
            yield name, tensor.reshape(like.shape).contiguous()

    def get(self, name: str) -> Tensor:
        """Return a tensor by its name there."""
        if name not in self.shapes:
            raise ValueError(f"{self.path}: tensor {name} is missing")
        tensor: Tensor = self.file.get_tensor(name)
        return tensor


def stored_name(part: str, name: str, *, second: bool = False) -> str:
    """Return what a checkpoint calls a tensor of ours."""
    if part == "unet":
        return _UNET + _unet_name(name)
    if part == "vae":
        return _VAE + _vae_name(name)
    if not second:
        return _TEXT + name
    if name in _OPEN_TEXT_NAMES:
        return _OPEN_TEXT + _OPEN_TEXT_NAMES[name]
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    return f"{_OPEN_TEXT}transformer.resblocks.{match[1]}.{_OPEN_LAYER[match[2]]}.{match[3]}"


def _unet_name(name: str) -> str:
    """Return the name in the UNet of latent diffusion's code, of four levels with two layers each."""
    fixed = {
        **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
        **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
    }
    module, _, kind = name.rpartition(".")
    if module in fixed:
        return f"{fixed[module]}.{kind}"
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(\w+)\.(\d)\.(.+)", name)
    assert match is not None, name
    side, level, list_name, i, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if list_name == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
    if list_name == "upsamplers":
        # after the attention, which the lowest level has not
        return f"output_blocks.{3 * level + 2}.{2 if level else 1}.{rest}"
    if list_name == "resnets":
        inner, _, last = rest.rpartition(".")
        rest = f"{_RESNET[inner]}.{last}"
    if side is None:
        return f"middle_block.{1 if list_name == 'attentions' else 2 * i}.{rest}"
    block = f"input_blocks.{3 * level + i + 1}" if side == "down" else f"output_blocks.{3 * level + i}"
    return f"{block}.{int(list_name == 'attentions')}.{rest}"


def _vae_name(name: str) -> str:
    """Return the name in the VAE of latent diffusion's code, whose levels count from the finest."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
    for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f".{ours}.", f".{theirs}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda match: f"up.{3 - int(match[1])}.", name)
    name = name.replace(".resnets.", ".block.")
    return name.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
