"""Names of files made of a template, and of what comes from a prompt: they never leave a folder."""

import re
import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

# what a template may name, and how each may be formatted
_NUMBER, _WORDS = r"0?[0-9]{1,2}d?", r"\.[0-9]{1,2}"
FIELDS = {"index": _NUMBER, "line": _NUMBER, "seed": _NUMBER, "slug": _WORDS}
# bytes: a name has 255, and others stand beside it
SLUG_BYTES = 60
# of a prompt without a letter or digit
NAMELESS = "clip"
# devices, on Windows, whatever suffix they have
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)


def slug(prompt: str, length: int = SLUG_BYTES) -> str:
    """A prompt as part of a file's name: its words in lower case, letters of all scripts kept.

    At most `length` letters and SLUG_BYTES bytes, never empty, without a dot or a separator.
    """
    # letters, marks that belong to them, and numbers; what is none of these parts words
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).lower())
    kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
    words: list[str] = []
    for word in kept.split():
        if words and len("-".join([*words, word]).encode()) > SLUG_BYTES:
            break
        words.append(word)
    # a first word may be too long already: no part of a letter stays
    name = "-".join(words).encode()[:SLUG_BYTES].decode(errors="ignore")[:length].strip("-")
    # a mark alone would join what stands before it
    while name and unicodedata.category(name[0])[0] == "M":
        name = name[1:]
    return f"{name}-" if _DEVICES.fullmatch(name) else name or NAMELESS


def fill(template: str, *, index: int, line: int, seed: int, prompt: str) -> str:
    """A template's fields in braces replaced, such as {index:04d}; {{ and }} are braces.

    ValueError lists the fields there are.
    """
    values = {"index": index, "line": line, "seed": seed}

    def value(name: str, spec: str) -> str:
        if name == "slug":
            return slug(prompt, int(spec[1:])) if spec else slug(prompt)
        return format(values[name], spec)

    return "".join(part if isinstance(part, str) else value(*part) for part in _split(template))


def fields(template: str) -> set[str]:
    """The names of a template's fields; ValueError where it is none."""
    return {part[0] for part in _split(template) if not isinstance(part, str)}


def _split(template: str) -> list[str | tuple[str, str]]:
    """Literal parts, and fields with their formats."""
    parts: list[str | tuple[str, str]] = []
    at = 0
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]*)\}|[{}]", template):
        parts.append(template[at : match.start()])
        at = match.end()
        if match[0] in ("{{", "}}"):
            parts.append(match[0][0])
            continue
        name, _, spec = (match[1] or "").partition(":")
        if name not in FIELDS or (":" in match[0] and not re.fullmatch(FIELDS[name], spec)):
            known = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ValueError(
                f"output {template!r}: {match[0]} is none of {known}, such as {{index:04d}} or "
                "{slug:.20}; a brace itself is written twice"
            )
        parts.append((name, spec))
    parts.append(template[at:])
    return parts


def check_inside(path: str) -> str:
    """The path itself; ValueError unless it is relative and stays where it is taken from."""
    for kind in (PurePosixPath, PureWindowsPath):
        pure = kind(path)
        if pure.is_absolute() or pure.drive or pure.root or ".." in pure.parts or not pure.name:
            raise ValueError(f"output {path!r} of a job is not a relative path without ..")
    if "\0" in path:
        raise ValueError(f"output {path!r} of a job is no path")
    return path
