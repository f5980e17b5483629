"""CLIP's text transformer (Radford et al. 2021, arXiv:2103.00020).

Parameter names are those of Stable Diffusion's text encoder files, which transformers'
`CLIPTextModel` reads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.config import TextConfig, VisionConfig
from cmdgen.models.pretrained import Pretrained


class TextOutput(NamedTuple):
    """(B, L, D) states of all tokens and (B, D) of the one that ends the text."""

    last_hidden_state: Tensor
    pooled: Tensor


class Embeddings(nn.Module):
    """Token plus learned position."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        # CLIP's own; PyTorch's unit variance would drown the first layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class SelfAttention(nn.Module):
    """Multi-head attention: of a text's token to itself and those before it, of a picture's to all."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.causal = isinstance(config, TextConfig)
        width, self.heads = config.hidden_size, config.num_attention_heads
        if width % self.heads:
            raise ValueError(f"hidden_size {width} is not a multiple of heads {self.heads}")
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        q, k, v = (
            rearrange(projection(x), "b l (n d) -> b n l d", n=self.heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (B, N, L, D / N)
        return self.out_proj(rearrange(out, "b n l d -> b l (n d)"))


class FeedForward(nn.Module):
    """Linear, GELU or its sigmoid approximation, linear."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and around a skip."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextTransformer(nn.Module):
    """Embeddings, layers and a last normalisation."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = nn.Sequential(*(Layer(config) for _ in range(config.num_hidden_layers)))
        # files name the layers inside an encoder
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        return self.final_layer_norm(self.encoder["layers"](self.embeddings(input_ids)))


class ClipTextModel(Pretrained[TextConfig]):
    """Token ids to the states that condition the diffusion models."""

    config_type = TextConfig
    filename = "model.safetensors"

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.text_model = TextTransformer(config)

    def forward(self, input_ids: Tensor) -> TextOutput:
        """(B, L) -> (B, L, D), (B, D)."""
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens are more than the text encoder's {limit}")
        x = self.text_model(input_ids)  # (B, L, D)
        # Stable Diffusion's files say 2, which no text contains; there the end is the highest id
        legacy = self.config.eos_token_id == 2
        ends = input_ids if legacy else (input_ids == self.config.eos_token_id).int()
        return TextOutput(x, x[torch.arange(len(x), device=x.device), ends.argmax(dim=1)])

    @staticmethod
    def rename_stored(name: str) -> str | None:
        """Map names as transformers 5 writes them; skip a buffer that old files hold."""
        if name.endswith("embeddings.position_ids"):
            return None
        return name if name.startswith("text_model.") else f"text_model.{name}"
