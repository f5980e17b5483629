"""Triton kernels of cmdgen, each beside its definition in plain PyTorch; see kernels/README.md."""

from cmdgen_kernels.content_frame import content_frame as content_frame
from cmdgen_kernels.convolution import convolution as convolution
from cmdgen_kernels.convolution import doubled_convolution as doubled_convolution
from cmdgen_kernels.gated_attention import gated_attention as gated_attention
from cmdgen_kernels.geglu import geglu as geglu
from cmdgen_kernels.group_norm_silu import group_norm_silu as group_norm_silu
from cmdgen_kernels.layer_norm import layer_norm as layer_norm
from cmdgen_kernels.motion import motion_latents as motion_latents
from cmdgen_kernels.motion import motion_tokens as motion_tokens
from cmdgen_kernels.rotate import rotate as rotate
from cmdgen_kernels.time_attention import time_attention as time_attention
from cmdgen_kernels.wide_attention import wide_attention as wide_attention
from cmdgen_kernels.yuv420p import yuv420p as yuv420p
