"""Makes the jobs of one command: several in a forward, each to its file, or all to one stream."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmdgen.cli.errors import MEMORY, PARTIAL, Failure, on_the_way
from cmdgen.cli.inputs import InputFiles
from cmdgen.cli.jobs import LATENTS, STILL, Job, Refused
from cmdgen.cli.progress import Bars, Say, Show
from cmdgen.options import option, read_fields
from cmdgen.request import Plan, write_size
from cmdgen.video.formats import STDOUT, Encoding

if TYPE_CHECKING:
    import numpy as np

    from cmdgen.pipelines.base import Clip, Inputs
    from cmdgen.pipelines.still import StillPipeline
    from cmdgen.video.write import Writer

# formats whose frames can follow one another without an end: clips of one size are one stream
STREAMS = ("y4m", "raw", "mp4")
# largest share of sampling's time that the preview may take
PREVIEW_SHARE = 0.1
# notes that are remembered, so that each is printed once
_MAX_NOTES = 1000

_jobs = partial(option, group="Several clips")


@dataclass(frozen=True)
class Batching:
    """Options of `cmdgen sample` that hold for all jobs."""

    file: str | None = _jobs(
        None,
        "Read prompts, one a line, or JSON objects with options' names as keys, which win over "
        "flags; - is stdin.",
        flags=("--file", "-f"),
        metavar="FILE",
        complete="file",
    )
    num: int = _jobs(
        1,
        "Clips of each prompt. Their seeds count up from --seed, or are random.",
        metavar="N",
        low=1,
        high=100_000,
    )
    batch: int = _jobs(
        1,
        "Clips per forward pass. Each clip is what it would be alone, except for rounding.",
        metavar="N",
        low=1,
        high=1024,
    )
    overwrite: bool = _jobs(False, "Replace existing files.")
    skip_existing: bool = _jobs(False, "Make only clips whose files do not exist yet.")
    fail_fast: bool = _jobs(False, "Stop at the first error.")
    like: Path | None = _jobs(
        None,
        "Make the clip of a file that cmdgen wrote again, except for the options you change.",
        metavar="FILE",
        complete="file",
    )
    preview: Path | None = _jobs(
        None,
        "Rewrite this .png with the content frame while it is sampled.",
        metavar="FILE",
        complete="file",
    )
    dry_run: bool = _jobs(
        False, "Check everything and print what would be made, with estimates of memory and time."
    )

    def __post_init__(self) -> None:
        read_fields(self)
        if self.overwrite and self.skip_existing:
            raise ValueError("--overwrite and --skip-existing contradict each other: give one")


def group(jobs: Iterable[Job | Refused | None], most: int) -> Iterator[list[Job] | Refused]:
    """Yield jobs in order, those together that can be one forward; None ends a group early."""
    together: list[Job] = []
    for job in jobs:
        if together and not (isinstance(job, Job) and _alike(together[0], job)):
            yield together
            together = []
        if isinstance(job, Refused):
            yield job
        elif job is not None:
            together.append(job)
        if together and (len(together) == most or together[0].exists):
            yield together
            together = []
    if together:
        yield together


def _alike(one: Job, other: Job) -> bool:
    if one.exists or other.exists or one.encoding.pixels != other.encoding.pixels:
        return False
    first, second = (
        replace(job.plan, prompt="", seed=0, content_seed=0, motion_seed=0) for job in (one, other)
    )
    return first == second


class Batch:
    """One model and the jobs that it makes.

    `alone` is one job that was named on the command line: its error is the command's. `total` is
    the number of jobs, where it is known.
    """

    def __init__(
        self,
        pipeline: "StillPipeline",
        options: Batching,
        say: Say,
        files: InputFiles,
        *,
        alone: bool,
        total: int | None,
    ) -> None:
        self.pipeline, self.options, self.say, self.files = pipeline, options, say, files
        self.alone, self.total = alone, total
        self.made = self.failed = 0
        # of the stream on stdout, if it has several clips
        self.shape: tuple[object, ...] | None = None
        self.writer: Writer | None = None
        # names of files to the index and the line of their job
        self.targets: dict[str, tuple[int, int]] = {}
        self.notes: set[str] = set()

    def check(self, job: Job) -> Job | Refused:
        """Resolve a job and check where it goes; reads no weights."""
        from cmdgen.video.write import check_output, list_taken

        try:
            request = self.files.fit(job.request, self.pipeline.config)
            batch = min(self.options.batch, self.total or self.options.batch)
            plan = self.pipeline.plan(request, batch=batch)
            job = replace(job, request=request, resolved=plan)
            size = plan.model.height, plan.model.width
            if job.encoding.format == LATENTS and not plan.moves:
                raise ValueError(f"{job.target} holds content and motion: a still has no motion")
            job.encoding.check(size, plan.model.fps)
            if job.target == STDOUT:
                self._check_stream(job, plan)
            else:
                self._check_name(job)
            check_output(
                *(job.target, job.encoding),
                overwrite=self.options.overwrite,
                makes_folder=not self.alone,
            )
        except FileExistsError as error:
            # a sidecar alone is no clip
            if self.options.skip_existing and list_taken(Path(job.target), job.encoding):
                return replace(job, exists=True)
            return Refused(job.index, job.line, error)
        except (ValueError, OSError) as error:
            return Refused(job.index, job.line, error)
        return job

    def _check_stream(self, job: Job, plan: Plan) -> None:
        if self.total == 1:
            return
        if job.encoding.format not in STREAMS:
            raise ValueError(
                f"several clips are no {job.encoding.format} on stdout: {', '.join(STREAMS)} can be"
            )
        model = plan.model
        shape = (model.width, model.height, model.fps, job.encoding)
        if self.shape is None:
            self.shape = shape
        elif self.shape != shape:
            width, height, fps, _ = self.shape
            raise ValueError(
                f"not as the first clip on stdout, {width}x{height} at {fps} frames a second and "
                "encoded alike"
            )

    def _check_name(self, job: Job) -> None:
        path, preview = os.path.abspath(job.target), self.options.preview
        if preview is not None and path == os.path.abspath(preview):
            raise ValueError(f"{job.target} is the preview's name: give another one")
        index, line = self.targets.setdefault(path, (job.index, job.line))
        if index != job.index:
            raise SameName(
                f"{job.target} is the name of a clip of line {line} already: let names differ, by "
                "{index}, {slug} or {seed} in --output"
            )

    def run(self, jobs: Iterable[Job | Refused | None]) -> None:
        """Make the jobs in order; Failure where some could not be made."""
        with ExitStack() as stack, self.say.progress() as show:
            for jobs_together in group(jobs, self.options.batch):
                if isinstance(jobs_together, Refused):
                    self._refuse(jobs_together)
                elif jobs_together[0].exists:
                    self.made += 1
                    job = jobs_together[0]
                    self.say.note(f"{job.target} exists already")
                    self.say.result(job.target, {**job.describe(), "skipped": True})
                else:
                    self._make(jobs_together, show, stack)
                if self.total is not None and not self.alone:
                    show("clips", self.made + self.failed, self.total)
        if self.failed:
            count = self.made + self.failed
            raise Failure(f"{self.failed} of {count} clips were not made", PARTIAL)

    def _refuse(self, refused: Refused) -> None:
        if self.alone:
            raise refused.error
        if self.options.fail_fast:
            raise refused.located
        self.failed += 1
        if not refused.reported:
            self.say.error(str(refused))
        if self.say.as_json:
            self.say.result("", refused.describe())

    def _make(self, jobs: list[Job], show: Show, stack: ExitStack) -> None:
        started = time.monotonic()
        files = [_File(job, self) for job in jobs if job.target != STDOUT]
        try:
            with on_the_way(partial(self._advise, jobs)):
                self._sample(jobs, files, show, stack)
        except Failure as failure:
            # weights that cannot be read are an error of all jobs
            if not self.pipeline.loaded or self.alone:
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
        failed = {file.job.index: file.error for file in files if file.error is not None}
        for job in jobs:
            if job.index in failed:
                self._refuse(Refused(job.index, job.line, failed[job.index]))
            else:
                self._report(job, seconds)

    def _advise(self, jobs: list[Job]) -> str:
        from cmdgen.cli.advice import advise

        return advise(self.pipeline, jobs[0].request, len(jobs))

    def _report(self, job: Job, seconds: float) -> None:
        self.made += 1
        if not self.alone:
            of = "" if self.total is None else f" of {self.total}"
            seed = job.request.seed
            self.say.note(f"{job.index}{of}: {job.target}, seed {seed}, {seconds:.1f} s")
        if job.target != STDOUT:
            model = job.plan.model
            size = {name: getattr(model, name) for name in ("frames", "width", "height", "fps")}
            self.say.result(job.target, {**job.describe(), **size, "seconds": round(seconds, 3)})

    def _sample(self, jobs: list[Job], files: list["_File"], show: Show, stack: ExitStack) -> None:
        """Write frames as they are decoded; of several clips on stdout, those of the first one."""
        self._note(jobs)
        if not self.pipeline.loaded:
            # before a file is opened, whose metadata has the weights' hash
            self.pipeline.load(Bars(show))
        inputs = self.files.read(self.pipeline, jobs[0].request, self.say)
        with ExitStack() as opened:
            for file in files:
                opened.enter_context(file)
                file.open(inputs)
            if not files and self.writer is None:
                self._open_stream(jobs[0], inputs, stack)
            observer = _Writing(self, files, show)
            with suppress(_AllFailed):
                clips = self.pipeline.run(
                    [job.plan for job in jobs],
                    observer,
                    pixels=jobs[0].encoding.pixels,
                    inputs=inputs,
                )
                for file, clip in zip(files, clips, strict=False):
                    file.finish(clip)
                if self.writer is not None:
                    for clip in clips[1:]:
                        self.writer(clip.frames)

    def _open_stream(self, job: Job, inputs: "Inputs | None", stack: ExitStack) -> None:
        alone = self.total == 1 and job.encoding.metadata
        about = describe_clip(self.pipeline, job, inputs) if alone else None
        self.writer = stack.enter_context(open_job(job, about))

    def _note(self, jobs: list[Job]) -> None:
        plan, pipeline = jobs[0].plan, self.pipeline
        own, model, slices, steps = pipeline.config, plan.model, plan.slices, plan.key_steps
        name = own.name
        self._note_once(
            f"{name} of {pipeline.folder} on {pipeline.device}, {pipeline.dtype}",
            f"{len(jobs)} at a time, decoded in slices of {slices.frames} frames, "
            f"{slices.positions} positions, {slices.pictures} pictures in {slices.strips} strips",
            tell=self.say.detail,
        )
        if self.alone:
            self.say.note(f"seed {plan.seed}")
        lines = []
        if (model.width, model.height) != (own.width, own.height):
            lines.append(f"note: {name} was trained at {write_size((own.height, own.width))}")
        if model.frames not in (own.frames, 1):
            lines.append(f"note: {name} was trained on {own.frames} frames")
        if steps is not None:
            full = _list_steps(steps.content, model.steps)
            lines.append(f"rehash: {steps.policy}, content in full at {full}")
            if steps.motion:
                full = _list_steps(steps.motion, model.motion_steps)
                lines.append(f"rehash: motion in full at {full}")
        for job in jobs:
            of, prompt = "" if self.alone else f"line {job.line}: ", job.plan.prompt
            if unknown := dict.fromkeys(pipeline.tokenizer.unknown_words(prompt)):
                lines.append(f"note: {of}unknown words for {name}: {', '.join(unknown)}")
            if not pipeline.fits(prompt):
                lines.append(f"note: {of}{name} reads only the start of this long prompt")
        self._note_once(*lines, tell=self.say.note)

    def _note_once(self, *lines: str, tell: Callable[[str], None]) -> None:
        # a pipe may never end: the latest notes are enough
        if len(self.notes) >= _MAX_NOTES:
            self.notes.clear()
        for line in dict.fromkeys(lines):
            if line not in self.notes:
                tell(line)
        self.notes.update(lines)


class SameName(ValueError):
    """Two jobs would write one file."""


class _AllFailed(Exception):
    """No clip of a forward can be written."""


class _Writing(Bars):
    """Hands frames on, keeps the preview up to date and shows progress."""

    def __init__(self, batch: Batch, files: list["_File"], show: Show) -> None:
        super().__init__(show)
        self.batch, self.files = batch, files
        self.preview = batch.options.preview
        self.estimates = self.preview is not None
        self.started = time.monotonic()
        self.spent = self.last = 0.0

    def step(self, stage: str, done: int, total: int) -> None:
        if self.batch.writer is not None:
            self.batch.writer.check()
        # of several clips, lines would be too many
        if stage != "load" and (self.batch.alone or sys.stderr.isatty()):
            self.show(stage, done, total)

    def estimate(self, decode: Callable[[], "np.ndarray"]) -> None:
        now = time.monotonic()
        if self.spent + self.last <= PREVIEW_SHARE * (now - self.started):
            self.content(0, decode())
            self.last = time.monotonic() - now
            self.spent += self.last

    def content(self, clip: int, picture: "np.ndarray") -> None:
        from cmdgen.video.write import write_still

        if self.preview is not None and clip == 0:
            write_still(self.preview, picture, None, overwrite=True)

    def frames(self, clip: int, frames: "np.ndarray") -> None:
        if self.files:
            self.files[clip].write(frames)
            # the rest of clips that cannot be written need not be made
            if all(file.error is not None for file in self.files):
                raise _AllFailed
        elif clip == 0:
            assert self.batch.writer is not None
            self.batch.writer(frames)


def describe_clip(pipeline: "StillPipeline", job: Job, inputs: "Inputs | None") -> dict[str, Any]:
    """Return the metadata of a job's file: how the clip is made, and how encoded if not plainly."""
    plain, encoding = Encoding(job.encoding.format), job.encoding
    names = ("crf", "codec", "loop")
    differs = {
        name: getattr(encoding, name)
        for name in names
        if getattr(encoding, name) != getattr(plain, name)
    }
    metadata = pipeline.describe(job.plan, inputs)
    return metadata | ({"format": plain.format, **differs} if differs else {})


def open_job(job: Job, metadata: dict[str, Any] | None, *, overwrite: bool = False) -> Any:
    """Return a context whose value writes the job's frames."""
    from cmdgen.video.write import open_video

    model = job.plan.model
    return open_video(
        *(job.target, (model.height, model.width), model.fps, metadata, job.encoding),
        overwrite=overwrite,
        pixels=job.encoding.pixels,
    )


class _File:
    """The file of one job; its errors are this job's alone."""

    def __init__(self, job: Job, batch: Batch) -> None:
        self.job, self.batch = job, batch
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
        """Remove at once what a failed part of the work leaves behind."""
        try:
            try:
                yield
            except BaseException:
                if not self.stack.__exit__(*sys.exc_info()):
                    raise
        except OSError as error:
            self.error = error

    def open(self, inputs: "Inputs | None") -> None:
        if self.job.encoding.metadata:
            self.metadata = describe_clip(self.batch.pipeline, self.job, inputs)
        with self._part():
            if not self.batch.alone:
                Path(self.job.target).parent.mkdir(parents=True, exist_ok=True)
            if self.job.encoding.format not in (STILL, LATENTS):
                overwrite = self.batch.options.overwrite
                self.writer = self.stack.enter_context(
                    open_job(self.job, self.metadata, overwrite=overwrite)
                )

    def write(self, frames: "np.ndarray") -> None:
        if self.error is None and self.writer is not None:
            with self._part():
                self.writer(frames)

    def finish(self, clip: "Clip") -> None:
        if self.error is not None:
            return
        job = self.job
        with self._part():
            if self.writer is None:
                clip = replace(clip, metadata=self.metadata or {})
                clip.save(job.target, job.encoding, overwrite=self.batch.options.overwrite)
            self.stack.close()


def _list_steps(steps: tuple[int, ...], total: int) -> str:
    return f"{len(steps)} of {total} steps: {' '.join(map(str, steps))}"
