"""CLIP's vision transformer (Radford et al. 2021, arXiv:2103.00020), and what it sees of a picture.

Parameter names are those of transformers' `CLIPVisionModelWithProjection`: its files load here, ours
load there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmdgen.config import VisionConfig
from cmdgen.models.pretrained import Pretrained
from cmdgen.models.text import Layer

# of CLIP's training data, by colour
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class PatchEmbeddings(nn.Module):
    """Patches, after a token that stands for the whole picture, plus learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        if config.image_size % patch:
            raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {patch}")
        self.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, D)."""
        patches = self.patch_embedding(pictures).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Embeddings, layers, a normalisation before and one after, of the whole picture's token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        # the name is misspelt in all files
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = nn.Sequential(*(Layer(config) for _ in range(config.num_hidden_layers)))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        tokens = self.encoder["layers"](self.pre_layrnorm(self.embeddings(pictures)))
        return self.post_layernorm(tokens[:, 0])


class ClipVisionModel(Pretrained[VisionConfig]):
    """Pictures to one vector each, in the space that texts share."""

    config_type = VisionConfig
    filename = "model.safetensors"

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) as `prepare_picture` gives them -> (B, D)."""
        return self.visual_projection(self.vision_model(pictures))

    def see(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) of any size, in [-1, 1] -> (B, D)."""
        side, weight = self.config.image_size, self.visual_projection.weight
        return self(prepare_picture(pictures, side).to(weight.dtype))

    @staticmethod
    def rename_stored(name: str) -> str | None:
        """Skip a buffer that old files hold."""
        return None if name.endswith("embeddings.position_ids") else name


def prepare_picture(pictures: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, side, side) as CLIP is used to it.

    Blurred by as much as it is made smaller, then resized, not cropped, as Stable Video Diffusion
    was trained.
    """
    x = pictures
    for axis in (2, 3):
        sigma = max((x.shape[axis] / side - 1) / 2, 0.001)
        radius = int(max(4 * sigma, 3)) // 2
        place = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        bell = torch.exp(-(place**2) / (2 * sigma**2))
        x = x.transpose(axis, 3)
        rows = F.pad(x, (radius, radius, 0, 0), mode="reflect").flatten(0, 2)[:, None]
        x = F.conv1d(rows, (bell / bell.sum())[None, None]).view(x.shape).transpose(axis, 3)
    x = F.interpolate(x, size=(side, side), mode="bicubic", align_corners=True)
    mean, std = (x.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return ((x + 1) / 2 - mean) / std
