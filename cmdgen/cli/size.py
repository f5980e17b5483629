"""Sizes as they are written in a shell: of a video, and of memory."""

import re


def parse_size(size: str) -> tuple[int, int]:
    """WIDTHxHEIGHT -> (height, width), the order of tensors."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    if match is None:
        raise ValueError(f"size {size!r} is not WIDTHxHEIGHT, such as 64x64")
    return int(match[2]), int(match[1])


_UNITS = {"M": 10**6, "MB": 10**6, "MIB": 2**20, "G": 10**9, "GB": 10**9, "GIB": 2**30}


def parse_memory(memory: str) -> int:
    """A number with its unit -> bytes."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?([A-Z]{1,3})", memory.upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"memory {memory!r} is not a number of MB, MiB, GB or GiB, such as 4GB")
    return round(float(match[1]) * _UNITS[match[2]])
