"""How many bytes of tensors live at once: of what runs on a CPU, or of shapes alone."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators made while it was entered: those alive, and the most.

    Not counted: tensors that were there before, what an operator takes and gives back inside, and
    under `inference_mode` what it takes that is made of others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {id(each.untyped_storage()) for each in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        for each in _tensors(result):
            storage = each.untyped_storage()
            if id(storage) not in before and id(storage) not in self.known:
                self._take(storage)
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def give_back() -> None:
            self.now -= size
            del self.known[key]

        # torch keeps the Python object of a storage for as long as the storage lives
        self.known[key] = weakref.finalize(storage, give_back)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that `run` makes and holds at once; of fake ones too."""
    with torch.no_grad(), LiveBytes() as counter:
        run()
    return counter.peak
