"""The size of a video as it is written in a shell."""

import re


def parse_size(size: str) -> tuple[int, int]:
    """WIDTHxHEIGHT -> (height, width), the order of tensors."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    if match is None:
        raise ValueError(f"size {size!r} is not WIDTHxHEIGHT, such as 64x64")
    return int(match[2]), int(match[1])
