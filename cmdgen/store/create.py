"""Whole models with random weights."""

import hashlib
from itertools import chain
from pathlib import Path

import torch

from cmdgen.config import ModelConfig, TextConfig
from cmdgen.files import create_folder
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.store.parts import PARTS, network_configs, write_model_index
from cmdgen.world.config import WORLD
from cmdgen.world.world import World

# captions that the tokenizer of a random model learns from, and wordings of each
_CAPTIONS, _WORDINGS = 2048, 2


def create_model(model: ModelConfig, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16) -> None:
    """Write a whole model folder with random weights, those that training starts from.

    Parts are drawn in float32 and written one after the other: `dtype` changes precision alone,
    and memory holds one part. The tokenizer is a byte-pair one of our own, learned from the
    rendered world's captions; CLIP's is not ours to write. ValueError where `folder` exists.
    """
    with create_folder(folder) as target:
        for name, config in network_configs(model).items():
            digest = hashlib.blake2b(f"{name}/{seed}".encode(), digest_size=8).digest()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(digest, "big", signed=True))
                network = PARTS[name].network(config)
            # in place, tensor by tensor: a cast while saving would hold both copies
            network.to(dtype).save_pretrained(target / name)
            del network
        card = _CARD.format(name=model.name, seed=seed, dtype=str(dtype).removeprefix("torch."))
        if model.text is not None:
            length = model.text.max_position_embeddings
            _train_tokenizer(model.text).save_pretrained(target / "tokenizer", length=length)
            card += "The tokenizer is cmdgen's own, learned from its rendered world's captions.\n"
        write_model_index(target, model)
        (target / "README.md").write_text(card, encoding="utf-8")


_CARD = """# {name} with random weights

Never trained: its videos are noise. It takes the time and memory of a trained model.
Written by `cmdgen models init {name} --seed {seed} --dtype {dtype}`.
"""


def _train_tokenizer(config: TextConfig) -> Tokenizer:
    """Train a tokenizer whose special tokens have the ids that the text encoder expects."""
    world = World(WORLD)
    indices = world.indices("train", _CAPTIONS)
    wordings = [world.captions(indices, wording) for wording in range(_WORDINGS)]
    learned = Tokenizer.train(chain.from_iterable(wordings), config.vocab_size)
    shift = config.eos_token_id - learned.eos_id
    special = learned.bos_id, learned.eos_id
    vocab = {token: number + shift if number in special else number for token, number in learned.vocab.items()}
    assert len(set(vocab.values())) == len(vocab), "two tokens have one id"
    # no record of words: these weights have seen none
    return Tokenizer(vocab, learned.merges)
