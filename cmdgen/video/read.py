"""Any video file that ffmpeg knows to frames, and the metadata that `video.write` put in."""

import json
import os
import re
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe, read_frames
from PIL import Image


def read_video(
    path: str | os.PathLike[str], *, max_frames: int | None = None
) -> tuple[np.ndarray, float]:
    """A file -> uint8 (T, H, W, 3) and its frames per second; the first `max_frames` if given.

    Raises ValueError, in one line, for a file that is missing or holds no whole frame.
    """
    frames = read_frames(
        str(_existing(path)), output_params=["-sws_flags", "accurate_rnd+full_chroma_int"]
    )
    try:
        about = next(frames)
        width, height = about["size"]
        pixels = b"".join(islice(frames, max_frames))
    except (OSError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a readable video") from error
    finally:
        frames.close()
    if not pixels:
        raise ValueError(f"{path} holds no frame")
    return np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3), float(about["fps"])


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """An mp4 or PNG of ours -> its metadata; ValueError, in one line, for any other file."""
    file = _existing(path)
    try:
        metadata = json.loads(_png_comment(file) if file.suffix == ".png" else _comment(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no metadata of cmdgen") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} holds no metadata of cmdgen")
    return metadata


def _png_comment(file: Path) -> str:
    with Image.open(file, formats=("PNG",)) as image:
        comment = image.info.get("comment")
    return comment if isinstance(comment, str) else ""


def _comment(file: Path) -> bytes:
    done = subprocess.run(
        [get_ffmpeg_exe(), "-v", "error", "-i", f"file:{file}", "-f", "ffmetadata", "-"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    # an ffmetadata value ends at the first newline that no backslash precedes
    found = re.search(rb"^comment=((?:\\.|[^\\\n])*)$", done.stdout, re.MULTILINE | re.DOTALL)
    return re.sub(rb"\\(.)", rb"\1", found[1], flags=re.DOTALL) if found else b""


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"{path} is not a file")
    return file
