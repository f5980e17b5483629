"""Triton kernels of cmdgen, each beside its definition in plain PyTorch; see kernels/README.md."""

from cmdgen_kernels.content_frame import content_frame
from cmdgen_kernels.convolution import convolution
from cmdgen_kernels.gated_attention import gated_attention
from cmdgen_kernels.geglu import geglu
from cmdgen_kernels.group_norm_silu import group_norm_silu
from cmdgen_kernels.guided_ddim_step import guided_ddim_step
from cmdgen_kernels.layer_norm import layer_norm
from cmdgen_kernels.motion import motion_latents, motion_tokens
from cmdgen_kernels.rotate import rotate
from cmdgen_kernels.wide_attention import wide_attention
from cmdgen_kernels.yuv420p import yuv420p

__all__ = [
    "content_frame",
    "convolution",
    "gated_attention",
    "geglu",
    "group_norm_silu",
    "guided_ddim_step",
    "layer_norm",
    "motion_latents",
    "motion_tokens",
    "rotate",
    "wide_attention",
    "yuv420p",
]
