"""CLIP's text transformer (Radford et al. 2021, arXiv:2103.00020) and its byte-pair tokenizer.

Parameter names are those of Stable Diffusion's text encoder files, which transformers'
`CLIPTextModel` reads; the tokenizer agrees with transformers' `CLIPTokenizer`.
"""

import json
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

from cmdgen.config import TextConfig
from cmdgen.files import read_json, read_text, replace_with, write_json
from cmdgen.weights import load_model, save_model

FILENAME = "model.safetensors"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


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
        return (
            self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
        )


class CausalAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
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
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, N, L, D / N)
        return self.out_proj(rearrange(out, "b n l d -> b l (n d)"))


class FeedForward(nn.Module):
    """Linear, GELU or its sigmoid approximation, linear."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Layer(nn.Module):
    """Causal attention and feed-forward, each normalised before and around a skip."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = CausalAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """All layers, one after the other."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nn.Module):
    """Embeddings, layers and a last normalisation."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class ClipTextModel(nn.Module):
    """Token ids to the states that condition the diffusion models."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
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

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "ClipTextModel":
        """Read a folder in transformers' layout; ValueError names the file that is wrong."""
        return load_model(
            cls, TextConfig, folder, FILENAME, dtype=dtype, device=device, rename=_rename
        )

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
    ) -> None:
        """Write a folder that transformers' `CLIPTextModel` opens."""
        save_model(self, self.config, folder, FILENAME, dtype=dtype)


class Tokenizer:
    """Lower-cased text to byte-pair tokens between a begin and an end token."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        pad: str = _EOS,
        words: Iterable[str] | None = None,
    ) -> None:
        for token in (_BOS, _EOS, pad):
            if token not in vocab:
                raise ValueError(f"token {token!r} is not in the vocabulary")
        for pair in merges:
            if not {*pair, "".join(pair)} <= vocab.keys():
                raise ValueError(f"merge {short(' '.join(pair))} is not in the vocabulary")
        self.vocab, self.merges, self.pad = vocab, merges, pad
        self.words = None if words is None else frozenset(words)
        self.bos_id, self.eos_id, self.pad_id = vocab[_BOS], vocab[_EOS], vocab[pad]
        self._backend = _backend(
            BPE(vocab, merges, end_of_word_suffix=_SUFFIX, unk_token=_EOS, fuse_unk=False)
        )
        self._backend.add_special_tokens([_BOS, _EOS, pad])

    def __call__(self, texts: list[str], length: int) -> Tensor:
        """Texts -> (B, length) int64: begin, tokens cut to fit, end, padding."""
        if length < 2:
            raise ValueError(f"length {length} has no room for the begin and end tokens")
        rows = torch.full((len(texts), length), self.pad_id)
        # what came from a broken terminal may hold halves of characters
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        for row, encoding in zip(rows, self._backend.encode_batch(clean), strict=True):
            ids = [self.bos_id, *encoding.ids[: length - 2], self.eos_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that training never showed; none where that is not on record."""
        known = self.words
        return [] if known is None else [word for word in _words(text) if word not in known]

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges that occur most often; every byte keeps a token, so any text has one."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        base = [_BOS, _EOS, *alphabet, *(letter + _SUFFIX for letter in alphabet)]
        if vocab_size < len(base):
            raise ValueError(f"vocabulary of {vocab_size} is smaller than its {len(base)} bytes")
        captions = list(captions)
        learner = _backend(BPE(end_of_word_suffix=_SUFFIX))
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            end_of_word_suffix=_SUFFIX,
            show_progress=False,
        )
        learner.train_from_iterator(captions, trainer)
        learned = json.loads(learner.to_str())["model"]["merges"][: vocab_size - len(base)]
        merges = [(first, second) for first, second in learned]
        # two pairs can make the same token
        tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges)])
        words = {word for caption in captions for word in _words(caption)}
        return cls({token: i for i, token in enumerate(tokens)}, merges, words=words)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Read vocab.json and merges.txt, or tokenizer.json; ValueError names the wrong file."""
        folder = Path(folder)
        path = folder / "vocab.json"
        if path.is_file() or not (folder / "tokenizer.json").is_file():
            vocab: object = read_json(path)
            merges: object = _read_merges(folder / "merges.txt")
        else:
            path = folder / "tokenizer.json"
            model = read_json(path).get("model")
            vocab, merges = (
                (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else ({}, [])
            )
        words = folder / "words.json"
        known = read_json(words).get("words") if words.is_file() else None
        if known is not None and not _is_strings(known):
            raise ValueError(f"{words}: not a list of words")
        try:
            return cls(_vocab(vocab), _pairs(merges), pad=_read_pad(folder), words=known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str], *, length: int = 77) -> None:
        """Write a folder that transformers' `CLIPTokenizer` opens; `length` is its default."""
        folder = Path(folder)
        special = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": self.pad, "unk_token": _EOS}
        write_json(folder / "vocab.json", self.vocab)
        with replace_with(folder / "merges.txt") as temporary:
            lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
        write_json(folder / "tokenizer_config.json", config)
        if self.words is not None:
            write_json(folder / "words.json", {"words": sorted(self.words)})


def _backend(model: BPE) -> Backend:
    """CLIP's normalisation and splitting around a byte-pair model."""
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _words(text: str) -> list[str]:
    """Words and pictographs of a text, each once, without punctuation and contractions."""
    text = re.sub(r"['’](?:s|t|re|ve|m|ll|d)\b", " ", unicodedata.normalize("NFC", text).lower())
    found = dict.fromkeys(re.findall(r"[^\W_]+|[^\w\s]", text))
    return [word for word in found if word.isalnum() or unicodedata.category(word) == "So"]


def _rename(name: str) -> str | None:
    """Names as transformers 5 writes them, and a buffer of old files, to Stable Diffusion's."""
    if name.endswith("embeddings.position_ids"):
        return None
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _is_strings(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _vocab(value: object) -> dict[str, int]:
    numbers = list(value.values()) if isinstance(value, dict) else [None]
    if not all(type(i) is int and 0 <= i < 2**20 for i in numbers):
        raise ValueError("not a vocabulary of tokens and their numbers")
    assert isinstance(value, dict)
    return value


def _pairs(value: object) -> list[tuple[str, str]]:
    """Merges as merges.txt has them, "a b", or as tokenizer.json may have them, ["a", "b"]."""
    merges = value if isinstance(value, list) else [None]
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not _is_strings(pair) or len(pair) != 2:
            raise ValueError(f"merge {short(merge)} is not a pair of tokens")
        pairs.append((pair[0], pair[1]))
    return pairs


def _read_merges(path: Path) -> list[str]:
    lines = read_text(path).split("\n")
    return [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]


def _read_pad(folder: Path) -> str:
    """The padding token: Stable Diffusion 2 pads with an exclamation mark."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        pad = read_json(path).get("pad_token") if path.is_file() else None
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if isinstance(pad, str):
            return pad
    return _EOS
