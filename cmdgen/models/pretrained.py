"""Networks that live in folders: config.json beside weights in safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import nn

from cmdgen.files import blame, fill_folder
from cmdgen.schema import Folder, check_choices, config_path, read_config, write_config
from cmdgen.weights import build_empty, load_weights, save_tensors

C = TypeVar("C")


class Pretrained(nn.Module, Generic[C]):
    """A network that is built from one configuration, in files named as its library names them."""

    # the class of `config`, and the file of the weights
    config_type: ClassVar[type]
    filename: ClassVar[str] = "diffusion_pytorch_model.safetensors"

    def __init__(self, config: C) -> None:
        check_choices(config)
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        folder: Folder,
        *,
        weights: Folder | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read a folder that `save_pretrained` or the library wrote, in evaluation mode.

        `weights` is another folder with the file of the weights. Nothing is initialised first.
        ValueError names the file that is wrong.
        """
        config: Any = read_config(folder, cls.config_type)
        with blame(config_path(folder, cls.config_type)):
            model = build_empty(cls, config)
        load_weights(model, weights or folder, cls.filename, dtype=dtype, device=device, rename=cls.rename_stored)
        return model.eval()

    def save_pretrained(
        self, folder: Folder, *, dtype: torch.dtype | None = None, state: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write the folder that `from_pretrained` and the library read; a new one appears whole.

        `state` are the tensors of a module that holds shards of them.
        """
        with fill_folder(Path(folder)) as place:
            save_tensors(place / self.filename, self.state_dict() if state is None else state, dtype)
            write_config(self.config, place)

    @staticmethod
    def rename_stored(name: str) -> str | None:
        """Map a stored tensor's name to the module's, or to None for a tensor that is skipped."""
        return name
