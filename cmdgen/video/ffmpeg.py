"""One run of the ffmpeg that imageio-ffmpeg brings."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import IO

# bytes of what ffmpeg says that are kept
MOST_LOG = 2**23


@contextmanager
def run_ffmpeg(
    *arguments: str, stdin: int = subprocess.DEVNULL, stdout: int | IO[bytes] = subprocess.PIPE
) -> Iterator[tuple["subprocess.Popen[bytes]", bytearray]]:
    """Give the process and the start of its stderr, which is complete when the block has ended.

    The block ends with the process, which is killed if the block fails.
    """
    # most commands and formats do without ffmpeg
    from imageio_ffmpeg import get_ffmpeg_exe

    log = bytearray()
    # in a session of its own: Ctrl-C reaches us alone, and we clean up
    with subprocess.Popen(
        [get_ffmpeg_exe(), "-hide_banner", "-nostats", *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        # AV1's encoder logs to stderr what is no error
        env={**os.environ, "SVT_LOG": "1"},
        start_new_session=True,
    ) as process:
        # a pipe that nobody reads would stop ffmpeg when it is full
        listener = Thread(target=_listen, args=(process.stderr, log), daemon=True)
        try:
            # here, too, Ctrl-C may come: nothing closes the pipe while the thread reads from it
            listener.start()
            yield process, log
        except BaseException:
            process.kill()
            raise
        finally:
            # it is not there yet if starting it was interrupted
            with suppress(RuntimeError):
                listener.join()


def _listen(stderr: IO[bytes], log: bytearray) -> None:
    # it is closed where Ctrl-C comes while this thread is waited for
    with suppress(ValueError):
        while part := stderr.read(2**16):
            if len(log) < MOST_LOG:
                log += part
