"""Makes the jobs of one command: several in a forward, each to its file, or all to one stream."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmdgen.cli.advice import advise
from cmdgen.cli.errors import MEMORY, PARTIAL, Failure, on_the_way
from cmdgen.cli.given import GivenFiles
from cmdgen.cli.jobs import LATENTS, STILL, Job, Refused
from cmdgen.cli.progress import Say, Show
from cmdgen.config import ModelConfig
from cmdgen.video.formats import STDOUT, Encoding

if TYPE_CHECKING:
    import numpy as np

    from cmdgen.pipeline import Clip, Given, TextToVideo
    from cmdgen.video.write import Writer

# formats whose frames can follow one another without an end: clips of one size are one stream
STREAMS = ("y4m", "raw", "mp4")
# of the time that sampling takes, at most, for looking at it
PREVIEW_SHARE = 0.1
# lines that are said once
_MOST_NOTED = 1000


@dataclass(frozen=True)
class Manner:
    """How jobs are made, whatever they are."""

    # clips in a forward
    batch: int = 1
    overwrite: bool = False
    skip_existing: bool = False
    fail_fast: bool = False
    preview: Path | None = None
    # one job that is asked for by name: what is wrong with it is what is wrong
    alone: bool = False
    # how many there are, where that is known
    total: int | None = None


@dataclass(frozen=True)
class Kept:
    """A job whose file is there already."""

    job: Job


def group(
    jobs: Iterable[Job | Refused | Kept | None], most: int
) -> Iterator[list[Job] | Refused | Kept]:
    """Jobs in their order, those together that can be one forward; None ends what waits."""
    together: list[Job] = []
    for job in jobs:
        if together and not (isinstance(job, Job) and _alike(together[0], job)):
            yield together
            together = []
        if isinstance(job, Refused | Kept):
            yield job
        elif job is not None:
            together.append(job)
        if len(together) == most:
            yield together
            together = []
    if together:
        yield together


def _alike(one: Job, other: Job) -> bool:
    if one.encoding.pixels != other.encoding.pixels:
        return False
    return replace(one.config, seed=0) == replace(other.config, seed=0)


class Batch:
    """One model and the jobs that it makes."""

    def __init__(
        self, pipeline: "TextToVideo", manner: Manner, say: Say, files: GivenFiles
    ) -> None:
        self.pipeline, self.manner, self.say = pipeline, manner, say
        self.files = files
        self.made = self.failed = 0
        # of the stream on stdout, if it is one of several clips
        self.shape: tuple[object, ...] | None = None
        self.writer: Writer | None = None
        # names to the index and the line of the job that has them
        self.targets: dict[str, tuple[int, int]] = {}
        self.noted: set[str] = set()

    def check(self, job: Job) -> Job | Refused | Kept:
        """What is to become of a job; reads no weights."""
        from cmdgen.video.write import check_output, list_taken

        try:
            job = replace(job, config=self.files.fit(job.config, self.pipeline.config))
            asked = job.config.apply(self.pipeline.config)
            if job.encoding.format == LATENTS and asked.frames == 1:
                raise ValueError(f"{job.target} holds content and motion: a still has no motion")
            self.pipeline.plan_rehash(job.config)
            self.pipeline.plan_decoding(job.config)
            job.encoding.check((asked.height, asked.width), asked.fps)
            if job.target == STDOUT:
                self._check_stream(job, asked)
            else:
                self._check_name(job)
            check_output(
                *(job.target, job.encoding),
                overwrite=self.manner.overwrite,
                makes_folder=not self.manner.alone,
            )
        except FileExistsError as error:
            # a sidecar alone is no clip
            if self.manner.skip_existing and list_taken(Path(job.target), job.encoding):
                return Kept(job)
            return Refused(job.index, job.line, error)
        except (ValueError, OSError) as error:
            return Refused(job.index, job.line, error)
        return job

    def _check_stream(self, job: Job, asked: ModelConfig) -> None:
        if self.manner.total == 1:
            return
        if job.encoding.format not in STREAMS:
            raise ValueError(
                f"several clips are no {job.encoding.format} on stdout: {', '.join(STREAMS)} can be"
            )
        shape = (asked.width, asked.height, asked.fps, job.encoding)
        if self.shape is None:
            self.shape = shape
        elif self.shape != shape:
            width, height, fps, _ = self.shape
            raise ValueError(
                f"not as the first clip on stdout, {width}x{height} at {fps} frames a second and "
                "encoded alike"
            )

    def _check_name(self, job: Job) -> None:
        if self.manner.preview is not None and os.path.abspath(job.target) == os.path.abspath(
            self.manner.preview
        ):
            raise ValueError(f"{job.target} is the preview's name: give another one")
        own = job.index, job.line
        index, line = self.targets.setdefault(os.path.abspath(job.target), own)
        if index != job.index:
            raise SameName(
                f"{job.target} is the name of a clip of line {line} already: let names differ, by "
                "{index}, {slug} or {seed} in --output"
            )

    def run(self, jobs: Iterable[Job | Refused | Kept | None]) -> None:
        """Make them in their order; Failure where some could not be made."""
        with ExitStack() as stack, self.say.progress() as show:
            for each in group(jobs, self.manner.batch):
                if isinstance(each, Refused):
                    self._refuse(each)
                elif isinstance(each, Kept):
                    self.made += 1
                    self.say.note(f"{each.job.target} is there already")
                    record = {**each.job.describe(), "skipped": True}
                    self.say.result(each.job.target, record)
                else:
                    self._make(each, show, stack)
                if self.manner.total is not None and not self.manner.alone:
                    show("clips", self.made + self.failed, self.manner.total)
        if self.failed:
            count = self.made + self.failed
            raise Failure(f"{self.failed} of {count} clips were not made", PARTIAL)

    def _refuse(self, refused: Refused) -> None:
        if self.manner.alone:
            raise refused.error
        if self.manner.fail_fast:
            raise refused.located
        self.failed += 1
        if not refused.told:
            self.say.error(str(refused))
        if self.say.as_json:
            self.say.result("", refused.describe())

    def _make(self, jobs: list[Job], show: Show, stack: ExitStack) -> None:
        started = time.monotonic()
        files = [_File(job, self.manner) for job in jobs if job.target != STDOUT]
        try:
            with on_the_way(lambda: advise(self.pipeline, jobs[0].config, len(jobs))):
                self._sample(jobs, files, show, stack)
        except Failure as failure:
            # of weights that cannot be read, all jobs would say the same
            if "parts" not in vars(self.pipeline) or self.manner.alone:
                raise
            if failure.code == MEMORY and len(jobs) > 1 and files:
                self.say.note(f"note: not enough memory for {len(jobs)} clips at a time")
                for half in jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]:
                    self._make(half, show, stack)
                return
            for job in jobs:
                self._refuse(Refused(job.index, job.line, failure))
            return
        seconds = (time.monotonic() - started) / len(jobs)
        failed = {file.job: file.error for file in files if file.error is not None}
        for job in jobs:
            if job in failed:
                self._refuse(Refused(job.index, job.line, failed[job]))
            else:
                self._tell(job, seconds)

    def _tell(self, job: Job, seconds: float) -> None:
        self.made += 1
        asked = job.config.apply(self.pipeline.config)
        if not self.manner.alone:
            of = "" if self.manner.total is None else f" of {self.manner.total}"
            self.say.note(f"{job.index}{of}: {job.target}, seed {job.config.seed}, {seconds:.1f} s")
        if job.target == STDOUT:
            return
        record = {
            **job.describe(),
            **{"frames": asked.frames, "width": asked.width, "height": asked.height},
            **{"fps": asked.fps, "seconds": round(seconds, 3)},
        }
        self.say.result(job.target, record)

    def _sample(self, jobs: list[Job], files: list["_File"], show: Show, stack: ExitStack) -> None:
        """Frames go on as they are decoded; of several clips on stdout, those of the first one."""
        config = jobs[0].config
        asked = config.apply(self.pipeline.config)
        self._note(jobs, asked)
        self._load(show)
        given = self.files.read(self.pipeline, config, self.say)
        preview = None if self.manner.preview is None else _Preview(self.manner.preview)
        with ExitStack() as opened:
            for file in files:
                opened.enter_context(file)
                file.open(self.pipeline, asked, given)
            if not files:
                self._open_stream(jobs[0], asked, given, stack)

            def take(i: int, frames: "np.ndarray") -> None:
                if files:
                    files[i].write(frames)
                    # the rest of clips that cannot be written need not be made
                    if all(file.error is not None for file in files):
                        raise _AllFailed
                elif i == 0:
                    assert self.writer is not None
                    self.writer(frames)

            def show_content(i: int, picture: "np.ndarray") -> None:
                if preview is not None and i == 0:
                    preview.show(picture)

            def report(stage: str, done: int, total: int) -> None:
                if self.writer is not None:
                    self.writer.check()
                if stage != "load" and self._shows_stages:
                    show(stage, done, total)

            with suppress(_AllFailed):
                clips = self.pipeline.sample_batch(
                    *([job.prompt for job in jobs], replace(config, seed=0)),
                    [job.config.seed for job in jobs],
                    pixels=jobs[0].encoding.pixels,
                    on_progress=report,
                    on_content=show_content,
                    on_frames=take,
                    on_estimate=None if preview is None else preview.look,
                    given=given,
                )
                for file, clip in zip(files, clips, strict=False):
                    file.finish(clip)
                if self.writer is not None:
                    for clip in clips[1:]:
                        self.writer(clip.frames)

    @property
    def _shows_stages(self) -> bool:
        # of several clips, lines would be too many
        return self.manner.alone or sys.stderr.isatty()

    def _load(self, show: Show) -> None:
        """Read the weights; before a file is opened, whose metadata has their hash."""
        if "parts" not in vars(self.pipeline):
            show("load", 0, 1)
            _ = self.pipeline.parts
            show("load", 1, 1)

    def _open_stream(
        self, job: Job, asked: ModelConfig, given: "Given | None", stack: ExitStack
    ) -> None:
        from cmdgen.video.write import open_video

        if self.writer is None:
            alone = self.manner.total == 1 and job.encoding.metadata
            self.writer = stack.enter_context(
                open_video(
                    *(STDOUT, (asked.height, asked.width), asked.fps),
                    describe_clip(self.pipeline, job, given) if alone else None,
                    job.encoding,
                    pixels=job.encoding.pixels,
                )
            )

    def _note(self, jobs: list[Job], asked: ModelConfig) -> None:
        own, config = self.pipeline.config, jobs[0].config
        slices = self.pipeline.plan_decoding(config, batch=len(jobs))
        self._detail_once(
            f"{own.name} of {self.pipeline.folder} on {self.pipeline.device}, {self.pipeline.dtype}"
        )
        self._detail_once(
            f"{len(jobs)} at a time, decoded in slices of {slices.frames} frames, "
            f"{slices.positions} positions, {slices.pictures} pictures in {slices.strips} strips"
        )
        if self.manner.alone:
            self.say.note(f"seed {config.seed}")
        if (asked.width, asked.height) != (own.width, own.height):
            self._note_once(f"note: {own.name} was trained at {own.width}x{own.height}")
        if asked.frames not in (own.frames, 1):
            self._note_once(f"note: {own.name} was trained on {own.frames} frames")
        if (plan := self.pipeline.plan_rehash(config)) is not None:
            full = f"content in full at {_list_steps(plan.content, asked.steps)}"
            self._note_once(f"rehash: {plan.policy}, {full}")
            if plan.motion:
                full = _list_steps(plan.motion, asked.motion_steps)
                self._note_once(f"rehash: motion in full at {full}")
        for job in jobs:
            of = "" if self.manner.alone else f"line {job.line}: "
            if unknown := dict.fromkeys(self.pipeline.tokenizer.unknown_words(job.prompt)):
                self._note_once(f"note: {of}{own.name} has never seen: {', '.join(unknown)}")
            if not self.pipeline.fits(job.prompt):
                self._note_once(
                    f"note: {of}{own.name} reads the start of this prompt only: it is too long"
                )

    def _note_once(self, line: str) -> None:
        if self._is_new(line):
            self.say.note(line)

    def _detail_once(self, line: str) -> None:
        if self._is_new(line):
            self.say.detail(line)

    def _is_new(self, line: str) -> bool:
        # of a pipe that never ends, the latest will do
        if len(self.noted) >= _MOST_NOTED:
            self.noted.clear()
        known = line in self.noted
        self.noted.add(line)
        return not known


class SameName(ValueError):
    """Two jobs would write one file."""


class _AllFailed(Exception):
    """No clip of a forward can be written."""


def describe_clip(pipeline: "TextToVideo", job: Job, given: "Given | None") -> dict[str, Any]:
    """The metadata of a job's file: what makes the clip, and how it is encoded unless plainly."""
    metadata = pipeline.describe(job.prompt, job.config, given=given)
    plain = Encoding(job.encoding.format)
    differs = {
        name: value
        for name in ("crf", "codec", "loop")
        if (value := getattr(job.encoding, name)) != getattr(plain, name)
    }
    return metadata | ({"encoding": {"format": plain.format, **differs}} if differs else {})


class _File:
    """Where the frames of one job go; what fails here fails this job alone."""

    def __init__(self, job: Job, manner: Manner) -> None:
        self.job, self.overwrite, self.makes_folder = job, manner.overwrite, not manner.alone
        self.format = job.encoding.format
        self.error: OSError | None = None
        self.stack = ExitStack()
        self.writer: Writer | None = None
        self.metadata: dict[str, Any] | None = None

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: Any) -> None:
        with suppress(OSError):
            self.stack.__exit__(*error)

    @contextmanager
    def _part(self) -> Iterator[None]:
        """Around a part of the work: what it leaves behind where it fails is removed at once."""
        try:
            try:
                yield
            except BaseException:
                if not self.stack.__exit__(*sys.exc_info()):
                    raise
        except OSError as error:
            self.error = error

    def open(self, pipeline: "TextToVideo", asked: ModelConfig, given: "Given | None") -> None:
        from cmdgen.video.write import open_video

        if self.job.encoding.metadata:
            self.metadata = describe_clip(pipeline, self.job, given)
        if self.makes_folder:
            with self._part():
                Path(self.job.target).parent.mkdir(parents=True, exist_ok=True)
        if self.error is None and self.format not in (STILL, LATENTS):
            with self._part():
                self.writer = self.stack.enter_context(
                    open_video(
                        *(self.job.target, (asked.height, asked.width), asked.fps, self.metadata),
                        self.job.encoding,
                        overwrite=self.overwrite,
                        pixels=self.job.encoding.pixels,
                    )
                )

    def write(self, frames: "np.ndarray") -> None:
        if self.error is None and self.writer is not None:
            with self._part():
                self.writer(frames)

    def finish(self, clip: "Clip") -> None:
        from cmdgen.latents import save_latents
        from cmdgen.video.write import write_still

        if self.error is not None:
            return
        with self._part():
            if self.format == LATENTS:
                assert clip.latents is not None
                latents = replace(clip.latents, metadata=self.metadata or {})
                save_latents(self.job.target, latents, overwrite=self.overwrite)
            elif self.format == STILL:
                write_still(
                    *(self.job.target, clip.content, self.metadata, self.job.encoding),
                    overwrite=self.overwrite,
                )
            self.stack.close()


class _Preview:
    """Shows the content frame while it is sampled, in little of that time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()
        self.spent = self.last = 0.0

    def look(self, estimate: Callable[[], "np.ndarray"]) -> None:
        now = time.monotonic()
        if self.spent + self.last <= PREVIEW_SHARE * (now - self.started):
            self.show(estimate())
            self.last = time.monotonic() - now
            self.spent += self.last

    def show(self, picture: "np.ndarray") -> None:
        from cmdgen.video.write import write_still

        write_still(self.path, picture, None, overwrite=True)


def _list_steps(steps: tuple[int, ...], total: int) -> str:
    return f"{len(steps)} of {total} steps: {' '.join(map(str, steps))}"
