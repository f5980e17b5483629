"""Attention of tokens among themselves: softmax, or linear in their number where they are many."""

from collections.abc import Callable

from torch import Tensor, nn

from cmdgen.config import AttentionConfig
from cmdgen_kernels.gated_attention import gated_attention, orthogonal_features, softmax_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class GatedAttention(nn.Module):
    """EVDM's gate, with the random features that the model is trained with as a buffer."""

    projection: Tensor

    def __init__(self, features: int, head_dim: int, *, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("projection", orthogonal_features(features, head_dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, L, D) x 3 -> (B, N, L, D)."""
        return gated_attention(q, k, v, self.projection, threshold=self.threshold)


def self_attention(config: AttentionConfig, head_dim: int) -> Attend:
    """() -> the attention that a model's configuration names, for heads of that width."""
    if config.attention == "softmax":
        return softmax_attention
    threshold = config.attention_threshold
    return GatedAttention(config.attention_features or head_dim, head_dim, threshold=threshold)
