"""Gradient checkpointing: less memory for activations, one more forward pass."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from cmdgen.models import autoencoder, dit, evdm, layers, text, unet, vae

# they hold most activations, and none contains another
BLOCKS = (
    *(layers.ResnetBlock, unet.SpatialTransformer, vae.SpatialAttention, text.Layer),
    *(dit.Block, autoencoder.Block, evdm.Layer),
)


def recompute_blocks(module: nn.Module) -> None:
    """Make the blocks of a model keep only their inputs, and run again in the backward pass.

    Loss and gradients stay the same (Chen et al. 2016, arXiv:1604.06174): dropout draws alike.
    """
    for block in module.modules():
        if isinstance(block, BLOCKS):
            block.forward = partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False
            )
