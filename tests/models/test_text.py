"""The text encoder is transformers' CLIPTextModel, the tokenizer its CLIPTokenizer."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cmdgen.config import TextConfig
from cmdgen.models.text import FILENAME, ClipTextModel, Tokenizer

TINY = TextConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=12,
    eos_token_id=1,
)
TEXTS = [
    "",
    " " * 50,
    "A Corgi, swimming!!  in the OCEAN",
    "dog's we'll it'd 1234 x_y (waves)",
    "héllo wörld 日本語 🐶👩‍👩‍👧",
    "\x00\x07\n\t tab\x1b[0m",
    "e\u0301 İ ß ﬁ \u200b\u00a0there…",
    "a" * 10_000,
    "word " * 3_000,
    "<|endoftext|> hi <|startoftext|> <|EndOfText|> <|endoftext",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    captions = ["a corgi swimming in the ocean", "a dog's bone on the beach, with waves"]
    return Tokenizer.train(captions * 20, 560)


@pytest.mark.parametrize(
    "config", [TINY, replace(TINY, hidden_act="gelu"), replace(TINY, eos_token_id=2)]
)
def test_transformers_and_we_open_each_other_and_give_the_same_numbers(
    config: TextConfig, tmp_path: Path
) -> None:
    peer_config = CLIPTextConfig(**asdict(config), bos_token_id=0, pad_token_id=1)
    CLIPTextModel(peer_config).save_pretrained(tmp_path / "theirs")
    ours = ClipTextModel.from_pretrained(tmp_path / "theirs")
    assert ours.config == config
    ours.save_pretrained(tmp_path / "ours")
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "ours" / FILENAME))
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 5], ids[1, 8:] = 1, 1
    output = ours(ids)
    for folder in ("theirs", "ours"):
        expected = CLIPTextModel.from_pretrained(tmp_path / folder)(ids)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(output.pooled, expected.pooler_output)


def test_a_token_does_not_see_those_after_it() -> None:
    model, ids = ClipTextModel(TINY).double(), torch.randint(3, 60, (1, 12))
    before = model(ids).last_hidden_state
    ids[:, 7:] = 2
    after = model(ids).last_hidden_state
    assert before.dtype == torch.float64
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="13 tokens are more than the text encoder's 12"):
        ClipTextModel(TINY)(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_tokens_are_those_of_transformers(tokenizer: Tokenizer, pad: str, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": pad}}))
    if pad != "!":
        (tmp_path / "special_tokens_map.json").unlink()
    ours, theirs = Tokenizer.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    # transformers 5 writes tokenizer.json alone
    again = Tokenizer.from_pretrained(tmp_path / "theirs")
    for length in (2, 8, 32):
        expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=length)
        assert ours(TEXTS, length).tolist() == expected.input_ids
        assert again(TEXTS, length).tolist() == expected.input_ids


def test_no_text_ends_early_or_fails(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer(["zebra \ud800 ünicode 🐶"], 64).tolist()
    assert ids[0] == tokenizer.bos_id == 0
    assert ids.index(tokenizer.eos_id) > 10
    assert max(tokenizer.vocab.values()) < 560


def test_unknown_words_are_those_that_training_never_showed(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    known = Tokenizer.from_pretrained(tmp_path)
    assert known.unknown_words("A corgi’s zebra, Zebra 🐶! in the OCEAN…") == ["zebra", "🐶"]
    (tmp_path / "words.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).unknown_words("zebra") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", "not readable as JSON"),
        ("vocab.json", '{"a": "b"}', "not a vocabulary"),
        ("vocab.json", '{"a": 1}', "'<|startoftext|>' is not in the vocabulary"),
        ("merges.txt", "a b c\n", "is not a pair"),
        ("merges.txt", "zz zz\n", "is not in the vocabulary"),
        ("words.json", '{"words": [1]}', "not a list of words"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_folder(
    tokenizer: Tokenizer, name: str, content: str, message: str, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(tmp_path)
    text = str(error.value)
    assert message in text and text.startswith(str(tmp_path)) and "\n" not in text
