"""`cmdgen sample`: prompts to videos and stills."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from threading import Thread
from typing import TYPE_CHECKING

import typer

from cmdgen.cli.batch import Batch, Batching, SameName
from cmdgen.cli.inputs import InputFiles
from cmdgen.cli.jobs import (
    MAX_JOBS,
    STILL,
    Entry,
    Job,
    Refused,
    make_jobs,
    open_entries,
    read_piped,
)
from cmdgen.cli.like import Recalled, recall
from cmdgen.cli.naming import fields
from cmdgen.cli.progress import Say
from cmdgen.options import options_of
from cmdgen.request import Request
from cmdgen.video.formats import STDOUT, choose_encoding

if TYPE_CHECKING:
    from cmdgen.pipelines.still import StillPipeline


def sample(context: typer.Context, request: Request, jobs: Batching, say: Say) -> None:
    """Make videos from text prompts.

    The paths of the files go to stdout, or with -o - the video itself; everything else goes to
    stderr. In NAME, {index}, {line}, {seed} and {slug} (the prompt's words) are replaced. When
    there are several clips, missing folders are made.

    With -f, and on stdin, each line is a prompt, or a JSON object whose keys are names of options,
    which win over flags. Blank lines and lines that start with # are skipped. A line's "output" is
    a relative path inside the folder of -o. An error names its line, and the other clips are made.
    On stdout, clips of one size follow one another as y4m, raw or mp4. A .safetensors file holds
    content frame and motion latents: see cmdgen decode.

    Examples:
      cmdgen sample "a corgi swimming" -o corgi.mp4
      echo "a cat flying" | cmdgen sample -o cat.gif
      cmdgen sample -f prompts.txt --num 4 -o "clips/{index:04d}-{slug}-{seed}.mp4"
      cmdgen sample -f jobs.jsonl --batch 8 --json --skip-existing --seed 1 -o "{line}.mp4"
      cmdgen sample -f - -o - | ffplay -
      cmdgen sample --like corgi.mp4 --motion-seed 7 -o again.mp4
      cmdgen sample "a corgi jumping" --image corgi.png -o jump.mp4
      cmdgen sample "a cat" --motion-from corgi.mp4 -o cat.mp4
    """
    if request.output == STDOUT and say.as_json:
        raise ValueError("--json and -o - both need stdout: leave one of them")
    files = InputFiles(request)
    if request.output not in (None, STDOUT):
        # a wrong template is one error, not one for each line
        fields(request.output)
    recalled = None
    if jobs.like is not None:
        encoding = (
            None
            if request.output is None
            else choose_encoding(request.output, format=request.format)
        )
        recalled = recall(
            jobs.like, request, _flags(context), None if encoding is None else encoding.format
        )
        files.check_like(recalled.files, jobs.like, say)
        request = recalled.request
    entries, known = _find_entries(request, jobs, recalled)
    made: Iterable[Job | Refused | None] = make_jobs(entries, request, num=jobs.num)
    total = None
    several = jobs.file is not None or jobs.num > 1
    if known:
        made = list(islice(made, MAX_JOBS + 1))
        total = len(made)
        several = several or total > 1
        _check_known(made, several)
    random = several and request.seed is None and request.output is not None
    if jobs.skip_existing and random and "seed" in fields(request.output or ""):
        raise ValueError("--skip-existing with random seeds in names finds nothing: give --seed")
    _check_targets(request, jobs)
    from cmdgen.pipelines.load import load_pipeline

    pipeline = load_pipeline(
        request.model, device=request.device, dtype=request.dtype, compile=request.compile
    )
    if not jobs.dry_run:
        if request.compile:
            say.note("the first step waits for the compiler, for minutes the first time")
        if not request.no_metadata:
            # beside the work that follows
            Thread(target=_hash, args=(pipeline,), daemon=True).start()
    work = Batch(pipeline, jobs, say, files, alone=not several, total=total)
    checked: Iterable[Job | Refused | None] = (
        work.check(job) if isinstance(job, Job) else job for job in made
    )
    if known:
        checked = _look_ahead(checked, work)
    if recalled is not None:
        for line in recalled.compare(pipeline):
            say.note(line)
    if jobs.dry_run:
        from cmdgen.cli.forecast import print_forecast

        print_forecast(checked, work)
    else:
        work.run(checked)


def _flags(context: typer.Context) -> set[str]:
    """Return the options that come from the command line, not from defaults or settings."""
    sources = {name: context.get_parameter_source(name) for name in options_of(Request)}
    return {
        name
        for name, source in sources.items()
        if source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")
    }


def _find_entries(
    request: Request, jobs: Batching, recalled: Recalled | None
) -> tuple[Iterator[Entry | None], bool]:
    """Return the entries, and whether all are known before any is made."""
    if jobs.file is not None:
        if request.prompt is not None and recalled is None:
            raise ValueError("a prompt and -f: give one of them")
        return open_entries(jobs.file)
    if request.prompt is not None:
        return iter([Entry(0, 1)]), True
    return read_piped(), True


def _check_known(jobs: list[Job | Refused | None], several: bool) -> None:
    if len(jobs) > MAX_JOBS:
        raise ValueError(f"more than {MAX_JOBS} clips: pipe them in with -f -")
    if not jobs:
        raise ValueError("no prompt: give PROMPT, pipe it in, or a file of them with -f")
    if not several and isinstance(jobs[0], Refused):
        raise jobs[0].error


def _check_targets(request: Request, jobs: Batching) -> None:
    from cmdgen.video.write import check_output

    if jobs.preview is not None:
        if choose_encoding(str(jobs.preview)).format != STILL:
            raise ValueError(f"preview {jobs.preview}: the name must end in .png")
        check_output(jobs.preview, overwrite=True)
    if request.output == STDOUT and not jobs.dry_run:
        check_output(STDOUT, overwrite=True)


def _look_ahead(checked: Iterable[Job | Refused | None], work: Batch) -> list[Job | Refused]:
    """Check all jobs before any is made, and report errors."""
    ahead: list[Job | Refused] = []
    for job in checked:
        if isinstance(job, Refused):
            if work.alone:
                raise job.error
            if work.options.fail_fast or isinstance(job.error, SameName):
                raise job.located
            work.say.error(str(job))
            job = replace(job, reported=True)
        if job is not None:
            ahead.append(job)
    return ahead


def _hash(pipeline: "StillPipeline") -> None:
    # weights that cannot be read are an error of who needs them
    with suppress(ValueError):
        _ = pipeline.weights_hash
