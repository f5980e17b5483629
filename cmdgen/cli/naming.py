"""Names of files from templates and prompts; no name leads out of its folder."""

import re
import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

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
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).lower())
    kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
    words: list[str] = []
    for word in kept.split():
        if words and len("-".join([*words, word]).encode()) > SLUG_BYTES:
            break
        words.append(word)
    # the first word alone may be too long: cut it between letters
    name = "-".join(words).encode()[:SLUG_BYTES].decode(errors="ignore")[:length].strip("-")
    # a mark at the start would join what stands before it
    while name and unicodedata.category(name[0])[0] == "M":
        name = name[1:]
    return f"{name}-" if _DEVICES.fullmatch(name) else name or NAMELESS


def fill(template: str, *, index: int, line: int, seed: int, prompt: str) -> str:
    """Replace a template's fields in braces, such as {index:04d}; {{ and }} are braces.

    Raises ValueError, with the fields that are possible.
    """
    numbers = {"index": index, "line": line, "seed": seed}

    def replace(match: re.Match[str]) -> str:
        name, spec = _read_field(match)
        if name in numbers:
            return format(numbers[name], spec)
        if name == "slug":
            return slug(prompt, int(spec[1:])) if spec else slug(prompt)
        return match[0][0]

    return _BRACES.sub(replace, template)


def fields(template: str) -> set[str]:
    """Return the names of a template's fields. Raises ValueError if it is not a template."""
    return {_read_field(match)[0] for match in _BRACES.finditer(template)} - {""}


def _read_field(match: re.Match[str]) -> tuple[str, str]:
    """Return a field's name and format; both are empty for a doubled brace."""
    if match[0] in ("{{", "}}"):
        return "", ""
    name, colon, spec = (match[1] or "").partition(":")
    if name in FIELDS and (not colon or re.fullmatch(FIELDS[name], spec)):
        return name, spec
    names = ", ".join(f"{{{field}}}" for field in FIELDS)
    raise ValueError(
        f"output {match.string!r}: {match[0]} is none of {names}, such as {{index:04d}} or "
        "{slug:.20}; a brace itself is written twice"
    )


def check_inside(path: str) -> str:
    """Return the path. Raises ValueError unless it is relative and stays in its folder."""
    for kind in (PurePosixPath, PureWindowsPath):
        pure = kind(path)
        if pure.is_absolute() or pure.drive or pure.root or ".." in pure.parts or not pure.name:
            raise ValueError(f"output {path!r} of a job is not a relative path without ..")
    if "\0" in path:
        raise ValueError(f"output {path!r} of a job is not a path")
    return path
