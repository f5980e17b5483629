"""Gradient checkpointing changes what is kept, and nothing else."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cmdgen.config import ModelConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.unet import UNet
from cmdgen.training.recompute import recompute_blocks
from tests.conftest import tiny_config

Loss = Callable[[nn.Module], Tensor]
# more blocks than is usual at this size: they are what is saved on
DEEP = 6


def unet(config: ModelConfig) -> tuple[nn.Module, Loss]:
    x, text = torch.randn(2, 8, 8, 12), torch.randn(2, 5, 16)
    content = replace(config.content, layers_per_block=2)
    return UNet(content), lambda model: model(x, torch.tensor([3, 800]), text).square().mean()


def dit(config: ModelConfig) -> tuple[nn.Module, Loss]:
    model = DiT(replace(config.motion, depth=DEEP))
    for parameter in model.parameters():
        # what starts at zero would hide the blocks
        nn.init.normal_(parameter, std=0.2)
    x, text, context = torch.randn(2, 8, 4, 10), torch.randn(2, 5, 16), torch.randn(2, 8, 8, 12)
    when = torch.tensor([3, 800])
    return model, lambda model: model(x, when, text=text, context=context, split=6).square().mean()


def autoencoder(config: ModelConfig) -> tuple[nn.Module, Loss]:
    x = torch.randn(2, 8, 4, 8, 12)

    def loss(model: nn.Module) -> Tensor:
        assert isinstance(model, CmdAutoencoder)
        return (model.decode(*model.encode(x)) - x).square().mean()

    return CmdAutoencoder(replace(config.autoencoder, depth=DEEP)), loss


def differentiate(model: nn.Module, loss: Loss, *, bf16: bool) -> tuple[Tensor, list[Tensor], int]:
    """-> the loss, all gradients, and the bytes that were kept for the backward pass."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        # once, however often it is kept; weights are there anyway
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(model)
        count = sum(kept.values())
        value.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return value.detach(), gradients, count


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("build", [unet, dit, autoencoder])
def test_recomputed_blocks_give_the_same_gradients_for_less_memory(
    build: Callable[[ModelConfig], tuple[nn.Module, Loss]], bf16: bool
) -> None:
    torch.manual_seed(0)
    model, loss = build(tiny_config())
    names = list(model.state_dict())
    expected = differentiate(model, loss, bf16=bf16)
    recompute_blocks(model)
    found = differentiate(model, loss, bf16=bf16)
    assert list(model.state_dict()) == names
    assert torch.equal(found[0], expected[0])
    assert len(found[1]) == len(expected[1]) > 0
    for gradient, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(gradient, other)
    assert found[2] < 0.25 * expected[2], (found[2], expected[2])
