"""Names of files: from templates and prompts, checked before anything is made."""

import re
import unicodedata
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from cmdgen.cli.progress import Say
from cmdgen.video.formats import STDOUT, Encoding

# what a template may name, and how each may be formatted
_NUMBER, _WORDS = r"0?[0-9]{1,2}d?", r"\.[0-9]{1,2}"
FIELDS = {"index": _NUMBER, "line": _NUMBER, "seed": _NUMBER, "slug": _WORDS}
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
# bytes: a name has 255, and the other fields need some
SLUG_BYTES = 60
# the slug of a prompt without a letter or digit
NAMELESS = "clip"
# devices on Windows, whatever suffix they have
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)


def slug(prompt: str, length: int = SLUG_BYTES) -> str:
    """Return a prompt's words in lower case as a part of a file's name, in any script.

    It has at most `length` letters and SLUG_BYTES bytes, no dot and no separator; never empty.
    """
    # words of letters, marks that belong to them, and numbers
    if prompt.isascii():
        kept = re.sub("[^a-z0-9]", " ", prompt.lower())
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).lower())
        kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
    name = "-".join(kept.split()).encode()
    if len(name) > SLUG_BYTES:
        # cut between words, or, if the first one alone is too long, between letters
        words, dash, _ = name[: SLUG_BYTES + 1].rpartition(b"-")
        name = words if dash else name[:SLUG_BYTES]
    text = name.decode(errors="ignore")[:length].strip("-")
    # a mark at the start would join what stands before it
    while text and unicodedata.category(text[0])[0] == "M":
        text = text[1:]
    return f"{text}-" if _DEVICES.fullmatch(text) else text or NAMELESS


def fill(template: str, prompt: str, numbers: dict[str, int]) -> str:
    """Replace a template's fields in braces, such as {index:04d}; {{ and }} are braces.

    `numbers` are index, line and seed. Raises ValueError, with the fields that are possible.
    """
    filled = []
    for text, name, spec in _parse(template):
        filled.append(text)
        if name == "slug":
            filled.append(slug(prompt, int(spec[1:] or SLUG_BYTES)))
        elif name:
            filled.append(format(numbers[name], spec))
    return "".join(filled)


def fields(template: str) -> set[str]:
    """Return the names of a template's fields. Raises ValueError if it is not a template."""
    return {name for _, name, _ in _parse(template)} - {""}


@lru_cache(64)
def _parse(template: str) -> tuple[tuple[str, str, str], ...]:
    """Return the pieces of a template: a text, and the name and format of the field after it, if any."""
    pieces, end = [], 0
    for match in _BRACES.finditer(template):
        text, end = template[end : match.start()], match.end()
        if match[0] in ("{{", "}}"):
            pieces.append((text + match[0][0], "", ""))
            continue
        name, colon, spec = (match[1] or "").partition(":")
        if name not in FIELDS or (colon and not re.fullmatch(FIELDS[name], spec)):
            names = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ValueError(
                f"output {template!r}: {match[0]} is none of {names}, such as {{index:04d}} or "
                "{slug:.20}; a brace itself is written twice"
            )
        pieces.append((text, name, spec))
    return (*pieces, (template[end:], "", ""))


def check_inside(path: str) -> str:
    """Return the path. Raises ValueError unless it is relative and stays in its folder."""
    for kind in (PurePosixPath, PureWindowsPath):
        pure = kind(path)
        # a single clip cannot go to stdout, where the others' names go
        if pure.anchor or ".." in pure.parts or not pure.name or path == STDOUT:
            raise ValueError(f"output {path!r} of a job is not a relative path without ..")
    return path


def check_stdout(output: str | None, say: Say) -> None:
    """Raise ValueError where a video is to go to stdout, and cannot."""
    if output == STDOUT:
        from cmdgen.video.write import check_output

        if say.as_json:
            raise ValueError("--json and -o - both need stdout: leave one of them")
        check_output(STDOUT, overwrite=True)


def check_suffix(path: Path, encoding: Encoding, *, overwrite: bool) -> None:
    """Raise where a file of this format cannot be written to `path`, or is named otherwise."""
    from cmdgen.video.write import check_output

    if path.suffix.lower() != f".{encoding.format}":
        raise ValueError(f"{path}: the name must end in .{encoding.format}")
    check_output(path, encoding, overwrite=overwrite)
