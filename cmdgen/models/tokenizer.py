"""CLIP's byte-pair tokenizer, which agrees with transformers' `CLIPTokenizer`."""

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short
from typing import TypeGuard

import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from cmdgen.files import blame, fill_folder, read_json, read_text, replace_with, write_json
from cmdgen.schema import Folder

_BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Lower-cased text to byte-pair tokens between a begin and an end token."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        pad: str = EOS,
        words: Iterable[str] | None = None,
    ) -> None:
        for token in (_BOS, EOS, pad):
            if token not in vocab:
                raise ValueError(f"token {token!r} is not in the vocabulary")
        for pair in merges:
            if not {*pair, "".join(pair)} <= vocab.keys():
                raise ValueError(f"merge {short(' '.join(pair))} is not in the vocabulary")
        self.vocab, self.merges, self.pad = vocab, merges, pad
        self.words = None if words is None else frozenset(words)
        self.bos_id, self.eos_id, self.pad_id = vocab[_BOS], vocab[EOS], vocab[pad]
        self._backend = _backend(BPE(vocab, merges, end_of_word_suffix=_SUFFIX, unk_token=EOS, fuse_unk=False))
        self._backend.add_special_tokens([_BOS, EOS, pad])

    def __call__(self, texts: list[str], length: int) -> Tensor:
        """Texts -> (B, length) int64: begin, tokens cut to fit, end, padding."""
        if length < 2:
            raise ValueError(f"length {length} has no room for the begin and end tokens")
        rows = torch.full((len(texts), length), self.pad_id)
        # text from a broken terminal may hold lone surrogates
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        for row, encoding in zip(rows, self._backend.encode_batch(clean), strict=True):
            ids = [self.bos_id, *encoding.ids[: length - 2], self.eos_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text that training never showed; none without a record of it."""
        if self.words is None:
            return []
        return [word for word in _words(text) if word not in self.words]

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn the merges that occur most often; every byte keeps a token, so any text has one."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        base = [_BOS, EOS, *alphabet, *(letter + _SUFFIX for letter in alphabet)]
        if vocab_size < len(base):
            raise ValueError(f"vocabulary of {vocab_size} is smaller than its {len(base)} bytes")
        captions = list(captions)
        learner = _backend(BPE(end_of_word_suffix=_SUFFIX))
        trainer = BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix=_SUFFIX, show_progress=False
        )
        learner.train_from_iterator(captions, trainer)
        learned = json.loads(learner.to_str())["model"]["merges"][: vocab_size - len(base)]
        merges = [(first, second) for first, second in learned]
        # two pairs can make the same token
        tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges)])
        words = {word for caption in captions for word in _words(caption)}
        return cls({token: i for i, token in enumerate(tokens)}, merges, words=words)

    @classmethod
    def from_pretrained(cls, folder: Folder, *, vocab_size: int = 2**20) -> "Tokenizer":
        """Read vocab.json and merges.txt, or tokenizer.json, for a text encoder of so many tokens.

        ValueError names the wrong file.
        """
        folder = Path(folder)
        path = folder / "vocab.json"
        if path.is_file() or not (folder / "tokenizer.json").is_file():
            vocab: object = read_json(path)
            merges: object = _read_merges(folder / "merges.txt")
        else:
            path = folder / "tokenizer.json"
            model = read_json(path).get("model")
            vocab, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else ({}, [])
        record = folder / "words.json"
        words = read_json(record).get("words") if record.is_file() else None
        if words is not None and not _is_strings(words):
            raise ValueError(f"{record}: not a list of words")
        with blame(path):
            tokenizer = cls(_vocab(vocab), _pairs(merges), pad=_read_pad(folder), words=words)
            if (largest := max(tokenizer.vocab.values())) >= vocab_size:
                raise ValueError(f"token {largest} is none of the text encoder's {vocab_size}")
            return tokenizer

    def save_pretrained(self, folder: Folder, *, length: int = 77) -> None:
        """Write a folder that transformers' `CLIPTokenizer` opens; `length` is its default."""
        special = {"bos_token": _BOS, "eos_token": EOS, "pad_token": self.pad, "unk_token": EOS}
        with fill_folder(Path(folder)) as place:
            write_json(place / "vocab.json", self.vocab)
            with replace_with(place / "merges.txt") as temporary:
                lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
            write_json(place / "tokenizer_config.json", config)
            if self.words is not None:
                write_json(place / "words.json", {"words": sorted(self.words)})


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
    """Split a text into distinct words and pictographs, without punctuation and contractions."""
    text = re.sub(r"['’](?:s|t|re|ve|m|ll|d)\b", " ", unicodedata.normalize("NFC", text).lower())
    words = dict.fromkeys(re.findall(r"[^\W_]+|[^\w\s]", text))
    return [word for word in words if word.isalnum() or unicodedata.category(word) == "So"]


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
    """Read the padding token: Stable Diffusion 2 pads with an exclamation mark."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        pad = read_json(path).get("pad_token") if path.is_file() else None
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if isinstance(pad, str):
            return pad
    return EOS
