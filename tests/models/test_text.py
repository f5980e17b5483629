"""The text encoder is transformers' CLIPTextModel, the tokenizer its CLIPTokenizer."""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cmdgen.config import TextConfig
from cmdgen.models.text import ClipTextModel
from cmdgen.models.tokenizer import Tokenizer

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


# one of each is a word, or a piece of one
SCRIPTS = [
    *("à-ÿ", "Ā-ž", "Ά-ώ", "А-я", "Ա-և", "א-ת", "ء-ي", "܀-ܯ", "ऄ-ह", "অ-হ", "அ-ஹ", "ക-ഹ", "ก-ฮ"),
    *("ກ-ຮ", "ཀ-ཬ", "က-အ", "Ა-Ჰ", "ა-ჰ", "ᄀ-ᇿ", "가-힣", "ሀ-ፚ", "Ꭰ-Ᏼ", "ក-អ", "ᠠ-ᡷ", "ぁ-ん"),
    *("ァ-ヺ", "一-龥", "𠀀-𠿿", "𐌰-𐍊", "𐐀-𐑏", "𝐀-𝟋", "Ａ-ｚ", "ᵃ-ᵿ", "Ǆ-ǌ", "ẞ-ỿ", "ﬀ-ﬆ"),
]
SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2003\u2009\u2028\u2029\u202f\u205f\u3000"
CONTROLS = [
    *map(chr, chain(range(32), range(127, 160))),
    *("\u200b", "\u200c", "\u200d", "\u200e", "\u202e", "\u2060", "\ufeff", "\ufffc", "\ufffd"),
    *("\xad", "\u034f", "\u061c", "\ue000", "\U000e0061", "\U0010fffd", "\ufffe"),
]
EMOJI = [*("🐶", "👩🏽‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇳🇱", "🇺", "1️⃣", "❤️", "☺", "👍🏿", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "🧑🏻‍❤️‍💋‍🧑🏾", "‍", "️", "🫠")]
PIECES = [
    *("a photo of", "astronaut", "riding", "horse", "4k", "trending on artstation", "Rembrandt"),
    *("don't", "we'LL", "it’s", "I'm", "they'd've", "'s", "''t", "rock'n'roll", "y'all're", "'"),
    *("<|startoftext|>", "<|endoftext|>", "<|EndOfText|>", "<|endoftext", "|>", "<|", "</w>", "!"),
    *("!!", "a!b", "1234567890", "3.14e-10", "½", "Ⅻ", "x²", "٣٤٥", "１２３", "①", "1,000,000th"),
    *("İstanbul", "ΣΊΣΥΦΟΣ", "Straße", "ẞ", "ǅ", "ﬁn", "Å", "e\u0301", "한", "\u1112\u1161\u11ab"),
    *("http://x.org/?q=a&b#c", "snake_case", "C++", "(((masked:1.3)))", "[a|b]", "--ar 16:9", "#tag"),
    *("…", "“quoted”", "¿qué?", "„so“", "€5", "™", "\\n", "&amp;", "a—b", "x" * 30, "ha" * 40),
]


def varied_texts(count: int) -> list[str]:
    """Texts of every kind that a tokenizer may trip over, the same at each call."""
    draw = random.Random(0)

    def character(span: str) -> str:
        return chr(draw.randint(ord(span[0]), ord(span[2])))

    def marked() -> str:
        marks = (chr(draw.choice((0x300, 0x483, 0x591, 0x64B, 0x93C, 0x20D0)) + i) for i in range(9))
        return draw.choice("aEoñяא각") + "".join(draw.sample(list(marks), draw.randint(1, 4)))

    def cased() -> str:
        word = draw.choice(PIECES)
        return "".join(draw.choice((letter.upper(), letter.lower())) for letter in word)

    def anything() -> str:
        point = draw.choice((draw.randrange(0x3000), draw.randrange(0x110000)))
        # halves of characters are no text
        return chr(point) if not 0xD800 <= point < 0xE000 else "\ud7ff"

    kinds: list[Callable[[], str]] = [
        lambda: draw.choice(PIECES),
        lambda: "".join(character(span) for span in [draw.choice(SCRIPTS)] * draw.randint(1, 8)),
        lambda: "".join(draw.choices(EMOJI, k=draw.randint(1, 4))),
        lambda: "".join(draw.choices(CONTROLS, k=draw.randint(1, 4))),
        lambda: str(draw.randrange(10 ** draw.randint(1, 12))),
        *(marked, cased, anything),
    ]
    texts = ["", " ", SPACES, "!", *PIECES, *EMOJI, *CONTROLS]
    texts += ["word " * 3_000, "a" * 10_000, "🐶" * 500, "e" + "\u0301" * 2_000, "日本" * 2_000]
    while len(texts) < count:
        # of one kind, or mixed; run together, or with spaces of any kind between
        chosen = draw.choices(kinds, k=draw.choice((1, 1, 3)))
        gaps = draw.choice(("", " ", SPACES))
        size = draw.choice((1, 3, 10, 60))
        parts = (draw.choice(chosen)() + "".join(draw.sample(gaps, min(1, len(gaps)))) for _ in range(size))
        texts.append("".join(parts))
    return texts[:count]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's own vocabulary, as the tokenizer folder that Stable Diffusion has."""
    package, name = "open_clip_torch", "bpe_simple_vocab_16e6.txt.gz"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [path for file in files if file.name == name and (path := Path(file.locate())).is_file()]
    if not found:
        pytest.skip(f"no {name}: pip install --no-deps {package}")
    # the list of merges is cut where the vocabulary of 49,408 is full
    lines = gzip.decompress(found[0].read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # every other byte is shown by a letter from 256 on
    shown = [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]
    tokens = [*shown, *(letter + "</w>" for letter in shown)]
    tokens += [line.replace(" ", "") for line in lines]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == len(set(tokens)) == TextConfig().vocab_size
    folder = tmp_path_factory.mktemp("clip")
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    captions = ["a corgi swimming in the ocean", "a dog's bone on the beach, with waves"]
    return Tokenizer.train(captions * 20, 560)


@pytest.mark.parametrize("config", [TINY, replace(TINY, hidden_act="gelu"), replace(TINY, eos_token_id=2)])
def test_transformers_and_we_open_each_other_and_give_the_same_numbers(config: TextConfig, tmp_path: Path) -> None:
    peer_config = CLIPTextConfig(**asdict(config), bos_token_id=0, pad_token_id=1)
    CLIPTextModel(peer_config).save_pretrained(tmp_path / "theirs")
    ours = ClipTextModel.from_pretrained(tmp_path / "theirs")
    assert ours.config == config
    ours.save_pretrained(tmp_path / "ours")
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "ours" / ClipTextModel.filename))
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


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_a_thousand_texts_have_the_ids_of_transformers_in_clips_vocabulary(
    clip_folder: Path, pad: str, tmp_path: Path
) -> None:
    """Stable Diffusion 1 pads with the end of the text, 2 with an exclamation mark."""
    folder = shutil.copytree(clip_folder, tmp_path / "tokenizer")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = Tokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    texts = varied_texts(1000)
    assert len(set(texts)) > 900
    for length in (77, 2, 8, 256):
        expected = theirs(texts, padding="max_length", truncation=True, max_length=length)
        actual = ours(texts, length).tolist()
        different = [text for text, a, b in zip(texts, actual, expected.input_ids, strict=True) if a != b]
        assert different == []
    assert ours([""], 4).tolist() == [[49406, 49407, *[0 if pad == "!" else 49407] * 2]]


def test_clips_ids_are_the_known_ones(clip_folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(clip_folder)
    for text, ids in {
        "a photo of an astronaut riding a horse": [320, 1125, 539, 550, 18376, 6765, 320, 4558],
        "A  photo of a CAT": [320, 1125, 539, 320, 2368],
        "hello world!": [3306, 1002, 256],
    }.items():
        assert tokenizer([text], len(ids) + 2).tolist() == [[49406, *ids, 49407]]


def test_no_text_ends_early_or_fails(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer(["zebra \ud800 ünicode 🐶"], 64).tolist()
    assert ids[0] == tokenizer.bos_id == 0
    assert ids.index(tokenizer.eos_id) > 10
    assert max(tokenizer.vocab.values()) < 560


def test_unknown_words_are_those_that_training_never_showed(tokenizer: Tokenizer, tmp_path: Path) -> None:
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


def test_a_tokenizer_fits_its_text_encoder(tmp_path):
    tokenizer = Tokenizer.train(["a dog"], 520)
    tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path, vocab_size=len(tokenizer.vocab)).vocab == tokenizer.vocab
    with pytest.raises(ValueError, match=f"^{tmp_path}/vocab.json: token .* is none of the text encoder's 500$"):
        Tokenizer.from_pretrained(tmp_path, vocab_size=500)
