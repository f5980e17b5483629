"""Classifier-free guidance and a DDIM step without noise, in one pass over the network's output.

    next = keep sample + move (negative + guidance (positive - negative))

Such a step (eq. 12 of Song et al. 2021, arXiv:2010.02502, with eta = 0) is linear in the sample and
in the prediction, whether that is of noise or of velocity: `keep` and `move` say which step it is.
Guidance is eq. 6 of Ho & Salimans 2022 (arXiv:2207.12598). The network's output is read as it left
the network, and widened in registers: guidance magnifies what rounding would do to it.
"""

import torch
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.language import power_of_two, program, tl, triton


def guided_ddim_step_reference(sample: Tensor, output: Tensor, *, guidance: float, keep: float, move: float) -> Tensor:
    """(B, C, ...), (2 B, C or 2 C, ...) -> (B, C, ...): the definition, in the sample's dtype."""
    negative, positive = output[:, : sample.shape[1]].to(sample.dtype).chunk(2)
    return keep * sample + move * (negative + guidance * (positive - negative))


@triton.jit
def _guided_ddim_step_fwd_kernel(
    sample_ptr, output_ptr, next_ptr, B, N, output_b, guidance, keep, move, BLOCK: tl.constexpr
):
    # one program: BLOCK of the N elements of one sample
    i_b, o_n = program(N, BLOCK)
    m_n = o_n < N
    b_sample = tl.load(sample_ptr + i_b * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_negative = tl.load(output_ptr + i_b * output_b + o_n, mask=m_n, other=0.0).to(tl.float32)
    output_ptr += (i_b + B) * output_b
    b_positive = tl.load(output_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_guided = b_negative + guidance * (b_positive - b_negative)
    b_next = keep * b_sample + move * b_guided
    tl.store(next_ptr + i_b * N + o_n, b_next.to(next_ptr.dtype.element_ty), mask=m_n)


def _launch(sample: Tensor, output: Tensor, *, guidance: float, keep: float, move: float) -> Tensor:
    """(B, C, ...), (2 B, C or 2 C, ...) -> (B, C, ...) in the memory format of the output."""
    layout = torch.contiguous_format
    if output.dim() == 4 and output.shape[1] == sample.shape[1]:
        # as a UNet leaves it, and as it takes the next sample: only the first one is copied here
        last = output.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else layout
    sample = sample.contiguous(memory_format=layout)
    output = output.contiguous(memory_format=layout)
    after = torch.empty_like(sample)
    if after.numel() == 0:
        return after
    batch, size = sample.shape[0], sample[0].numel()
    # 16 bytes of a half-precision output for each thread
    block = min(1024, max(256, power_of_two(size)))
    _guided_ddim_step_fwd_kernel[(batch * triton.cdiv(size, block),)](
        *(sample, output, after, batch, size, output[0].numel(), guidance, keep, move),
        BLOCK=block,
        num_warps=block // 256,
    )
    return after


def guided_ddim_step_obstacle(sample: Tensor, output: Tensor) -> str | None:
    """Say why `guided_ddim_step` runs the reference for these tensors; None where it does not."""
    if torch.compiler.is_compiling():
        return "torch.compile would compile it anew for the numbers of each step"
    return inference_obstacle(sample, output)


def guided_ddim_step(sample: Tensor, output: Tensor, *, guidance: float, keep: float, move: float) -> Tensor:
    """(B, C, ...), (2 B, C or 2 C, ...) -> (B, C, ...): the next sample, in this one's dtype.

    `output` comes from the network, the negative branch first; of 2 C channels the first C are the
    prediction. The kernel is for inference: where an input requires a gradient the reference runs.
    Raises ValueError where shapes do not agree.
    """
    batch, channels = sample.shape[:2]
    if (
        output.shape[0] != 2 * batch
        or output.shape[1] not in (channels, 2 * channels)
        or output.shape[2:] != sample.shape[2:]
    ):
        raise ValueError(
            f"sample {tuple(sample.shape)} and output {tuple(output.shape)} are not (B, C, ...) "
            "and (2 B, C or 2 C, ...)"
        )
    if guided_ddim_step_obstacle(sample, output) is not None:
        return guided_ddim_step_reference(sample, output, guidance=guidance, keep=keep, move=move)
    return _launch(sample, output, guidance=guidance, keep=keep, move=move)
