"""Makes the jobs of one command: several in a forward, each to its file, or all to one stream."""

import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from cmdgen.cli.advice import advise
from cmdgen.cli.errors import MEMORY, PARTIAL, USAGE, Failure, exit_code, on_the_way
from cmdgen.cli.jobs import LATENTS, STILL, Batching, Job, Refused
from cmdgen.cli.progress import Bars, Say, Show
from cmdgen.config import ModelConfig
from cmdgen.options import WHOLE, Size, write_size
from cmdgen.pipelines.base import Pipeline
from cmdgen.pipelines.clip import Clip, Inputs
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Plan, Request, quality_settings, shared_settings
from cmdgen.video.formats import STDOUT, Encoding, name_sidecar
from cmdgen.video.read import read_metadata
from cmdgen.video.write import Output, Writer, check_output, is_sidecar, open_video, write_sidecar, write_still

# formats whose frames can follow one another without an end: clips of one size are one stream
STREAMS = ("y4m", "raw", "mp4")
# largest share of sampling's time that the preview may take
PREVIEW_SHARE = 0.1
# times the pixels of the model's own clip from which memory is estimated first
_LARGE = 8
# frames of motion modules: users complain of fewer
_FEWEST = 8
# notes that are remembered, so that each is printed once, and names of files of a pipe
_MAX_NOTES, _MAX_NAMES = 1000, 100_000


def group(jobs: Iterable[Job | Refused | None], most: int) -> Iterator[list[Job] | Refused]:
    """Yield jobs in order, those together that can be one forward; None ends a group early.

    A group lies in one block of `most` indices: a shard, which has whole blocks, makes the same groups.
    """
    for kind, alike in groupby(jobs, partial(_share, most)):
        if isinstance(kind, Refused):
            yield kind
        elif kind is not None:
            while together := list(islice(alike, 1 if isinstance(kind, Job) else most)):
                # no job is None or Refused where their kind is neither
                yield cast(list[Job], together)


def _share(most: int, job: Job | Refused | None) -> object:
    """Return what jobs of one forward have in common, of others themselves."""
    if not isinstance(job, Job) or job.exists:
        return job
    return (job.index - 1) // most, job.target == STDOUT, job.encoding.pixels, shared_settings(job.plan)


class Files(Protocol):
    """Files that a clip is made with, for all jobs of a command."""

    def fit(self, request: Request, model: ModelConfig) -> Request:
        """Return the request with what the files say where it says nothing."""

    def count(self, plan: Plan) -> int:
        """Return how many frames a video has, with those of the files that it keeps."""

    def read(self, pipeline: Any, plan: Plan, say: Say) -> Inputs | None:
        """Return what the pipeline takes of the files, at the plan's size."""


@dataclass
class Batch:
    """One model and the jobs that it makes."""

    pipeline: Pipeline
    options: Batching
    say: Say
    files: Files
    # whether there is only one job, of the command line: its error is the command's
    alone: bool
    # number of jobs, None where more may come
    total: int | None
    made: int = 0
    failed: int = 0
    # real paths of files to the index and the line of their job
    targets: dict[str, tuple[int, int]] = field(default_factory=dict)
    # size, rate and encoding of the stream on stdout, if it has several clips
    shape: tuple[Size, int, Encoding] | None = None
    writer: Writer | None = None
    # while jobs are made
    stack: ExitStack = field(default_factory=ExitStack)
    show: Show = field(init=False)
    most: int = field(init=False)

    def __post_init__(self) -> None:
        # clips of a forward: as many in every shard
        self.most = min(self.options.batch, self.total or self.options.batch)
        self.note, self.detail = map(lru_cache(_MAX_NOTES), (self.say.note, self.say.detail))

    def check(self, jobs: Iterable[Job | Refused | None]) -> Iterable[Job | Refused | None]:
        """Resolve jobs and check where they go; read no weights.

        Where the number of jobs is known, all of them are checked now, and errors are reported.
        """
        selected: Iterable[Job | Refused | None] = self._select(jobs)
        if self.total is not None:
            selected = kept = list(selected)
            self.total = len(kept)
        checked = (self._check(job) if isinstance(job, Job) else job for job in selected)
        if self.total is None:
            return checked
        return [self._report(job) if isinstance(job, Refused) else job for job in checked]

    def _select(self, jobs: Iterable[Job | Refused | None]) -> Iterator[Job | Refused | None]:
        """Yield the jobs of this shard; of the others, check that their names differ."""
        shard = self.options.shard or WHOLE
        for job in jobs:
            if job is None or shard.has((job.index - 1) // self.options.batch):
                yield job
            elif isinstance(job, Job) and job.target != STDOUT and self.total is not None:
                self._check_names(job, [job.target])

    def _check(self, job: Job) -> Job | Refused:
        try:
            request = self.files.fit(job.request, self.pipeline.config)
            plan = self.pipeline.plan(request, batch=self.most)
            if job.encoding.format == LATENTS and (plan.model.motion is None or not plan.moves):
                name = "a still" if plan.model.frames == 1 else plan.model.name
                raise ValueError(f"{job.target} holds content and motion: {name} has no motion")
            job.encoding.check(plan.model.size, plan.model.fps)
            length = plan.model.frames if job.encoding.format == STILL else self.files.count(plan)
            job = replace(job, request=request, resolved=plan, length=length)
            if job.target == STDOUT:
                self._check_stream(job.encoding, plan)
            else:
                self._check_names(job, [job.target, *job.files])
            overwrite, makes_folder = self.options.overwrite, not self.alone
            try:
                check_output(job.target, job.encoding, overwrite=overwrite, makes_folder=makes_folder)
            except FileExistsError:
                if not self.options.skip_existing or (existing := self._find(job)) is None:
                    raise
                job = existing
            return job
        except (ValueError, OSError) as error:
            return Refused(job.index, job.line, error)

    def _find(self, job: Job) -> Job | None:
        """Return a job some of whose files exist as what is to be done; None where they are not its own."""
        sidecar = f"{job.target}.json"
        missing = [file for file in job.files if not os.path.lexists(file)]
        if job.encoding.sidecar and sidecar not in missing and not is_sidecar(Path(sidecar)):
            return None
        if missing == [sidecar] and job.encoding.kind.metadata:
            # the sidecar is made of those
            with suppress(ValueError):
                read_metadata(job.target)
                return replace(job, exists=True)
            return None
        return replace(job, exists=not missing, unfinished=bool(missing))

    def _check_stream(self, encoding: Encoding, plan: Plan) -> None:
        if self.total == 1:
            return
        if encoding.format not in STREAMS:
            raise ValueError(f"several clips cannot go to stdout as {encoding.format}: use {', '.join(STREAMS)}")
        shape = plan.model.size, plan.model.fps, encoding
        self.shape = self.shape or shape
        if self.shape != shape:
            size, fps, _ = self.shape
            raise ValueError(
                f"not as the first clip on stdout, {write_size(size)} at {fps} frames a second and encoded alike"
            )

    def _check_names(self, job: Job, names: Iterable[str]) -> None:
        """Raise where another job, or the preview, has a name of this one, however it is written."""
        preview = self.options.preview
        for name in map(_real, names):
            if preview is not None and name == os.path.realpath(preview):
                raise ValueError(f"{job.target} is the preview's name: give another one")
            index, line = self.targets.setdefault(name, (job.index, job.line))
            if self.total is None and len(self.targets) > _MAX_NAMES:
                # a pipe may never end
                del self.targets[next(iter(self.targets))]
            if index != job.index:
                text = (
                    f"{job.target} is the name of a clip of line {line} already: let names differ, by "
                    "{index}, {slug} or {seed} in --output"
                )
                if self.total is None:
                    raise ValueError(text)
                # nothing is made yet: all of the command is wrong
                raise Failure(f"line {job.line}: {text}", USAGE)

    def _report(self, refused: Refused) -> Refused:
        """Report an error once; raise it where it ends the command."""
        if self.alone:
            raise refused.error
        if self.options.fail_fast:
            raise Failure(str(refused), exit_code(refused.error))
        if not refused.reported:
            self.say.error(str(refused))
        return replace(refused, reported=True)

    def run(self, jobs: Iterable[Job | Refused | None]) -> None:
        """Make the jobs in order; Failure where some could not be made."""
        with self.stack, self.say.progress() as self.show:
            self.make_all(jobs)
        if self.failed:
            count = self.made + self.failed
            raise Failure(f"{self.failed} of {count} clips were not made", PARTIAL)

    def make_all(self, jobs: Iterable[Job | Refused | None]) -> None:
        """Make the jobs, those together that can be one forward."""
        for jobs_together in group(jobs, self.options.batch):
            if isinstance(jobs_together, Refused):
                self._refuse(jobs_together)
            elif jobs_together[0].exists:
                self._keep(jobs_together[0])
            else:
                self.make(jobs_together)
            self._show_clips()

    def _show_clips(self) -> None:
        if self.total is not None and not self.alone:
            self.show("clips", self.made + self.failed, self.total)

    def _keep(self, job: Job) -> None:
        """Count a clip that is there as made; write a sidecar that it lacks."""
        sidecar = name_sidecar(Path(job.target))
        if job.encoding.sidecar and not sidecar.exists():
            try:
                write_sidecar(Path(job.target), read_metadata(job.target))
            except (ValueError, OSError) as error:
                return self._refuse(Refused(job.index, job.line, error))
        self.made += 1
        self.say.note(f"{job.target} exists already")
        self.say.result(job.target, {**job.describe(), "skipped": True})

    def _refuse(self, refused: Refused) -> None:
        self._report(refused)
        self.failed += 1
        if self.say.as_json:
            self.say.result("", refused.describe())

    def make(self, jobs: list[Job]) -> None:
        """Make jobs of one forward."""
        started = time.monotonic()
        try:
            with on_the_way(lambda: advise(self.pipeline, jobs[0].request, len(jobs))):
                errors = self._sample(jobs)
        except Failure as failure:
            # weights that cannot be read are an error of all jobs
            if not self.pipeline.loaded or self.alone:
                raise
            if failure.code == MEMORY and len(jobs) > 1 and jobs[0].target != STDOUT:
                self.say.note(f"note: not enough memory for {len(jobs)} clips at a time")
                self.make(jobs[: len(jobs) // 2])
                self.make(jobs[len(jobs) // 2 :])
                return
            errors = {job.index: failure for job in jobs}
        seconds = (time.monotonic() - started) / len(jobs)
        for job in jobs:
            error = errors.get(job.index)
            if self.options.skip_existing and isinstance(error, FileExistsError):
                # another process made it meanwhile
                self._keep(job)
            elif error is not None:
                self._refuse(Refused(job.index, job.line, error))
            else:
                self._finish(job, seconds)

    def _finish(self, job: Job, seconds: float) -> None:
        self.made += 1
        if not self.alone:
            number = f"{job.index}" if self.total is None else f"{self.made + self.failed} of {self.total}"
            self.say.note(f"{number}: {job.target}, seed {job.request.seed}, {seconds:.1f} s")
        if job.target != STDOUT:
            model = job.plan.model
            size = {"frames": job.length, "width": model.width, "height": model.height, "fps": model.fps}
            self.say.result(job.target, {**job.describe(), **size, "seconds": round(seconds, 3)})

    def _sample(self, jobs: list[Job]) -> dict[int, Exception]:
        """Write frames as they are decoded; of several clips on stdout, those of the first one.

        Returns the errors of files by the jobs' indices.
        """
        self._note(jobs)
        first = jobs[0]
        if not (self.pipeline.loaded or first.plan.slices.staged):
            # before a file is opened, whose metadata has the weights' hash
            self.pipeline.load(Bars(self.show))
        self._check_memory(first.plan, len(jobs))
        inputs = self.files.read(self.pipeline, first.plan, self.say)
        with ExitStack() as opened:
            files = [_File(self, job, inputs, opened) for job in jobs if job.target != STDOUT]
            if not files and self.writer is None:
                self.writer = self.stack.enter_context(self.open(first, inputs))
            plans = [job.plan for job in jobs]
            clips = self.pipeline.run(plans, _Writing(self, files), pixels=first.encoding.pixels, inputs=inputs)
            for file, clip in zip(files, clips, strict=False):
                file.send(None if file.video else clip)
            if self.writer is not None:
                for clip in clips[1:]:
                    self.writer(clip.frames)
        return {file.job.index: file.error for file in files if file.error is not None}

    def _check_memory(self, plan: Plan, count: int) -> None:
        """Raise MemoryError, before any work, where clips far larger than the model's do not fit."""
        model, trained = plan.model, self.pipeline.config
        volume, usual = (each.frames * each.height * each.width for each in (model, trained))
        if volume * count <= _LARGE * usual:
            return
        from cmdgen.evaluation.estimate import estimate_activations
        from cmdgen.evaluation.memory import measure_memory

        free = measure_memory(self.pipeline.device).free
        if free is not None and estimate_activations(plan, self.pipeline.dtype, batch=count) > free:
            raise MemoryError

    def open(self, job: Job, inputs: Inputs | None) -> AbstractContextManager[Writer]:
        """Return a context that gives a writer of the job's frames; on stdout, of all jobs'.

        The metadata record how the clip is made, and its encoding where that is not the default.
        """
        about, encoding, model = None, job.encoding, job.plan.model
        if encoding.metadata and (job.target != STDOUT or self.total == 1):
            chosen = {"crf": encoding.crf, "codec": encoding.codec, "loop": encoding.loop or None}
            chosen = {name: value for name, value in chosen.items() if value is not None}
            plain = self.pipeline.describe(job.plan, inputs)
            about = {**plain, "format": encoding.format, **chosen} if chosen else plain
        overwrite = self.options.overwrite or job.unfinished
        return open_video(Output(job.target, model.size, model.fps, about, encoding, overwrite, encoding.pixels))

    def _note(self, jobs: list[Job]) -> None:
        """Note how clips are made and what may surprise; the same line only once."""
        plan, pipeline = jobs[0].plan, self.pipeline
        model, slices, steps, trained = plan.model, plan.slices, plan.key_steps, pipeline.config
        name = trained.name
        self.detail(f"{name} of {pipeline.folder} on {pipeline.device}, {pipeline.dtype}")
        self.detail(
            f"{len(jobs)} at a time, decoded in slices of {slices.frames} frames, "
            f"{slices.positions} positions, {slices.pictures} pictures in {slices.strips} strips"
        )
        if self.alone:
            self.note(f"seed {plan.seed}")
        if model.size != trained.size:
            self.note(f"note: {name} was trained at {write_size(trained.size)}")
        if model.motion is not None and model.frames not in (trained.frames, 1):
            self.note(f"note: {name} was trained on {trained.frames} frames")
        if model.adapter is not None and 1 < model.frames < _FEWEST:
            self.note(f"note: {name} was trained on {trained.frames} frames: so few may be noise")
        if chosen := quality_settings(jobs[0].request, trained):
            named = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items())
            self.note(f"quality {jobs[0].request.quality}: {named}")
        if len(plan.windows) > 1:
            self.note(f"{len(plan.windows)} windows of {plan.window} frames, {plan.overlap} of them shared")
        if steps is not None:
            full = _list_steps(steps.content, model.steps)
            self.note(f"rehash: {steps.policy}, content in full at {full}")
            if steps.motion:
                full = _list_steps(steps.motion, model.motion_steps)
                self.note(f"rehash: motion in full at {full}")
        self.note_prompts(jobs)

    def note_prompts(self, jobs: list[Job]) -> None:
        """Note what a model does not read of prompts."""
        pipeline, name = self.pipeline, self.pipeline.config.name
        if not isinstance(pipeline, StillPipeline) or pipeline.config.text is None:
            return
        for job in jobs:
            of, prompt = "" if self.alone else f"line {job.line}: ", job.plan.prompt
            if unknown := dict.fromkeys(pipeline.tokenizer.unknown_words(prompt)):
                self.note(f"note: {of}unknown words for {name}: {', '.join(unknown)}")
            if weights := re.findall(r"\([^()]*[^()\d]:\s*[\d.]+\)", prompt):
                self.note(f"note: {of}weights are read as words: {', '.join(weights)}")
            if not pipeline.fits(prompt):
                self.note(f"note: {of}{name} reads only the start of this long prompt")


def _list_steps(steps: tuple[int, ...], total: int) -> str:
    return f"{len(steps)} of {total} steps: {' '.join(map(str, steps))}"


def _real(file: str) -> str:
    """Return a path without symlinks, as os.path.realpath does; a folder's is found once."""
    folder, name = os.path.split(os.path.abspath(file))
    real = os.path.join(_real_folder(folder), name)
    return os.path.realpath(real) if os.path.islink(real) else real


_real_folder = lru_cache(256)(os.path.realpath)


class _File:
    """The file of one job; its errors are this job's alone."""

    def __init__(self, batch: Batch, job: Job, inputs: Inputs | None, stack: ExitStack) -> None:
        self.job, self.video = job, job.encoding.kind.video
        self.error: OSError | None = None
        self.parts = _write(batch, job, inputs)
        stack.callback(self.parts.close)
        self.send(None)

    def send(self, part: np.ndarray | Clip | None) -> None:
        """Write a part; after an error nothing is written any more."""
        try:
            self.parts.send(part)
        except StopIteration as end:
            self.error = self.error or end.value


def _write(batch: Batch, job: Job, inputs: Inputs | None) -> Generator[None, Any, OSError | None]:
    """Write the parts that are sent; return the error, if any. No half-written file is left.

    The parts of a video are frames and, at their end, None; of any other file, it is the clip.
    """
    try:
        if not batch.alone:
            Path(job.target).parent.mkdir(parents=True, exist_ok=True)
        if job.encoding.kind.video:
            with batch.open(job, inputs) as write:
                while (frames := (yield)) is not None:
                    write(frames)
        else:
            clip = yield
            clip.save(job.target, job.encoding, overwrite=batch.options.overwrite or job.unfinished)
    except OSError as error:
        return error
    return None


class _Writing(Bars):
    """Hands frames on, keeps the preview up to date and shows progress."""

    def __init__(self, batch: Batch, files: list[_File]) -> None:
        super().__init__(batch.show)
        self.batch, self.files = batch, files
        self.preview = batch.options.preview
        self.estimates = self.preview is not None
        self.started = time.monotonic()
        self.spent = 0.0

    def step(self, stage: str, done: int, total: int) -> None:
        if self.batch.writer is not None:
            self.batch.writer.check()
        # of several clips, lines would be too many
        if stage != "load" and (self.batch.alone or sys.stderr.isatty()):
            self.show(stage, done, total)

    def estimate(self, decode: Callable[[], np.ndarray]) -> None:
        now = time.monotonic()
        if self.spent <= PREVIEW_SHARE * (now - self.started):
            self.content(0, decode())
            self.spent += time.monotonic() - now

    def content(self, clip: int, picture: np.ndarray) -> None:
        if self.preview is not None and clip == 0:
            write_still(self.preview, picture, None, Encoding(STILL), overwrite=True)

    def frames(self, clip: int, frames: np.ndarray) -> None:
        if self.files and self.files[clip].video:
            self.files[clip].send(frames)
        elif not self.files and clip == 0:
            assert self.batch.writer is not None
            self.batch.writer(frames)
