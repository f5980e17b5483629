"""`cmdgen sample`: prompts to videos and stills."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from threading import Thread
from typing import TYPE_CHECKING

import typer

from cmdgen.cli.command import list_flags
from cmdgen.cli.inputs import STDIN, InputFiles
from cmdgen.cli.jobs import STILL, Batching, Entry, Job, Refused, check_seeds, make_jobs, open_entries
from cmdgen.cli.like import compare, read_recorded, recall
from cmdgen.cli.naming import check_stdout, check_suffix, fields
from cmdgen.cli.progress import Say
from cmdgen.metadata import INPUT_FIELDS
from cmdgen.options import options_of
from cmdgen.request import Request, resolve
from cmdgen.video.formats import STDOUT, Encoding

if TYPE_CHECKING:
    from cmdgen.pipelines.still import StillPipeline

# clips of a file, all of which are known before the first is made
MAX_JOBS = 10**6


def sample(context: typer.Context, request: Request, jobs: Batching, say: Say) -> None:
    """Make videos from text prompts.

    The paths of the files go to stdout, or with -o - the video itself; everything else goes to
    stderr. In NAME, {index}, {line}, {seed} and {slug} (the prompt's words) are replaced. When
    there are several clips, missing folders are made.

    With -f, and on stdin, each line is a prompt, or a JSON object whose keys are names of options,
    which win over flags; a JSON array of both is read, too. Blank lines and lines that start with #
    are skipped. A line's "output" is a relative path inside the folder of -o. An error names its
    line, and the other clips are made.
    On stdout, clips of one size follow one another as y4m, raw or mp4. A .safetensors file holds
    content frame and motion latents: see cmdgen decode.

    Examples:
      cmdgen sample "a corgi swimming" -o corgi.mp4
      echo "a cat flying" | cmdgen sample -o cat.gif
      cmdgen sample -f prompts.txt --num 4 -o "clips/{index:04d}-{slug}-{seed}.mp4"
      cmdgen sample -f jobs.jsonl --batch 8 --json --skip-existing --seed 1 -o "{line}.mp4"
      cmdgen sample -f jobs.jsonl --shard 2/8 --skip-existing --seed 1 -o "{line}.mp4"
      cmdgen sample -f jobs.jsonl --ray auto --threads 4 --seed 1 -o "{line}.mp4"
      cmdgen sample -f - -o - | ffplay -
      cmdgen sample --like corgi.mp4 --motion-seed 7 -o again.mp4
      cmdgen sample "a corgi jumping" --image corgi.png -o jump.mp4
      cmdgen sample --image photo.png --model svd-xt -o alive.mp4
      cmdgen sample "a cat" --motion-from corgi.mp4 -o cat.mp4
    """
    from cmdgen.store.find import find_model
    from cmdgen.store.parts import list_notes, read_index, read_model
    from cmdgen.video.write import check_output

    check_stdout(request.output, say)
    # a wrong template is one error, not one for each line
    fields(request.output or "")
    piped = [f"--{name.replace('_', '-')}" for name in INPUT_FIELDS if str(getattr(request, name)) == STDIN]
    if piped and (jobs.file == STDIN or (jobs.file is None and request.prompt is None and jobs.like is None)):
        raise ValueError(f"{piped[0]} - and the prompt both need stdin: give PROMPT, or a file with -f")
    if jobs.ray is not None and (piped or request.output == STDOUT):
        raise ValueError("--ray reads and writes files that all machines see: give names, not -")
    files = InputFiles(request)
    if jobs.like is not None:
        recorded = read_recorded(jobs.like)
        flags = set(list_flags(context)) & options_of(Request).keys()
        request = recall(jobs.like, recorded, request, flags)
        files.check_like(recorded, jobs.like, say)
    elif jobs.file is not None and request.prompt is not None:
        raise ValueError("a prompt and -f: give one of them")
    if jobs.preview is not None:
        check_suffix(jobs.preview, Encoding(STILL), overwrite=True)
    # what is wrong with the model or a single clip is said without torch, which takes seconds to import
    folder = find_model(request.model)
    config = read_model(folder)
    reads_text = config.vision is None
    entries: Iterator[Entry | None] = iter([Entry(1, {})])
    complete, total, alone = True, None, False
    if jobs.file is not None or (request.prompt is None and reads_text):
        entries, complete = open_entries(jobs.file)
    queue: Iterable[Job | Refused | None] = make_jobs(entries, request, num=jobs.num, reads_text=reads_text)
    if complete:
        queue = jobs_ahead = list(islice(queue, MAX_JOBS + 1))
        total = len(jobs_ahead)
        alone = jobs.file is None and total == 1 and jobs.shard is None and jobs.ray is None
        if total > MAX_JOBS:
            raise ValueError(f"more than {MAX_JOBS} clips: pipe them in with -f -")
        if total == 0:
            raise ValueError("no prompt: give PROMPT, pipe it in, or a file of them with -f")
        if alone and isinstance(jobs_ahead[0], Refused):
            raise jobs_ahead[0].error
    check_seeds(request, jobs, alone=alone)
    # of what `models pull` has put together, it says so
    for line in [] if "cmdgen" in read_index(folder) else list_notes(config):
        say.note(f"note: {line}")
    if alone and isinstance(job := jobs_ahead[0], Job):
        model = resolve(files.fit(job.request, config), config).model
        job.encoding.check(model.size, model.fps)
        if job.target != STDOUT:
            check_output(job.target, job.encoding, overwrite=jobs.overwrite or jobs.skip_existing)
    # nearly all that these modules make stays: to look for garbage meanwhile costs 0.1 s
    gc.disable()
    import torch

    from cmdgen.cli.batch import Batch
    from cmdgen.pipelines.load import load_pipeline

    gc.enable()
    if jobs.threads is not None:
        torch.set_num_threads(jobs.threads)
    pipeline = load_pipeline(**request.loading)
    if not jobs.dry_run:
        if request.compile:
            say.note("the first step waits for the compiler, for minutes the first time")
        if not request.no_metadata and jobs.ray is None:
            # beside the work that follows
            Thread(target=_hash, args=(pipeline,), daemon=True).start()
    if jobs.ray is None:
        batch = Batch(pipeline, jobs, say, files, alone=alone, total=total)
    else:
        from cmdgen.cli.cluster import Cluster

        batch = Cluster(pipeline, jobs, say, files, alone=False, total=total, request=request)
    checked = batch.check(queue)
    if jobs.like is not None:
        for line in compare(jobs.like, recorded, pipeline, chosen="model" in flags):
            say.note(line)
    if jobs.dry_run:
        files.check()
        from cmdgen.cli.forecast import print_forecast

        print_forecast(checked, batch)
    else:
        batch.run(checked)


def _hash(pipeline: "StillPipeline") -> None:
    # weights that cannot be read are an error of who needs them
    with suppress(ValueError):
        _ = pipeline.weights_hash
