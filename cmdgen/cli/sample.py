"""`cmdgen sample`: prompts to videos and stills; its options, and what they have jobs made of."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from cmdgen.cli.batch import Batch, Kept, Manner, SameName
from cmdgen.cli.completion import one_of
from cmdgen.cli.forecast import print_plan
from cmdgen.cli.given import GivenFiles
from cmdgen.cli.jobs import (
    MOST_JOBS,
    STILL,
    Entry,
    Job,
    Options,
    Refused,
    make_jobs,
    open_entries,
    read_piped,
)
from cmdgen.cli.like import Memory, recall
from cmdgen.cli.naming import fields
from cmdgen.cli.options import (
    MACHINE,
    OWN,
    AsJson,
    Device,
    Dtype,
    Model,
    Quiet,
    Verbose,
)
from cmdgen.cli.progress import Say
from cmdgen.config import CUTS, POLICIES, SAMPLERS, SampleConfig
from cmdgen.store.find import find_model
from cmdgen.video.formats import CODECS, FORMATS, STDOUT, choose_encoding

if TYPE_CHECKING:
    from cmdgen.pipeline import TextToVideo

# groups of options: a job may set those of the first ones
WHAT, HOW, FASTER, FILE = "What is made", "How it is sampled", "Faster", "The file"
OF_JOBS = {WHAT, HOW, FASTER, FILE}
GIVEN = "Given, not sampled"
JOBS = "Several, and again"


def sample(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="What the video shows; piped in where it is not given.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="NAME",
            help="The file to write, by its suffix a video, or a still as .png; - is stdout. "
            "{index}, {line}, {seed} and {slug} are filled in.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Same seed, same frames.  [default: a random one]", rich_help_panel=WHAT),
    ] = None,
    content_seed: Annotated[
        int | None,
        typer.Option(help="Seed of what is seen alone.  [default: --seed]", rich_help_panel=WHAT),
    ] = None,
    motion_seed: Annotated[
        int | None,
        typer.Option(help="Seed of how it moves alone.  [default: --seed]", rich_help_panel=WHAT),
    ] = None,
    negative: Annotated[
        str,
        typer.Option(
            help="What guidance leads away from.", show_default=False, rich_help_panel=WHAT
        ),
    ] = SampleConfig.negative,
    frames: Annotated[
        int | None,
        typer.Option(
            help="Length of the video; 1 is the content frame alone." + OWN, rich_help_panel=WHAT
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Size of the video." + OWN, rich_help_panel=WHAT),
    ] = None,
    fps: Annotated[
        int | None,
        typer.Option(help="Frames per second of the file." + OWN, rich_help_panel=WHAT),
    ] = None,
    content_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep the content frame of a video, or of latents that `cmdgen encode` wrote, and "
            "draw the motion.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    motion_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep the motion of a video, or of latents, and draw the content frame.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Animate a picture of any size: it is the content frame.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps for the content frame." + OWN, rich_help_panel=HOW),
    ] = None,
    motion_steps: Annotated[
        int | None, typer.Option(help="Steps for the motion." + OWN, rich_help_panel=HOW)
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(SAMPLERS)}." + OWN,
            autocompletion=one_of(SAMPLERS),
            rich_help_panel=HOW,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="How strictly content follows the prompt; 1 is off." + OWN, rich_help_panel=HOW
        ),
    ] = None,
    motion_guidance: Annotated[
        float | None,
        typer.Option(
            help="How strictly motion follows the prompt; 1 is off." + OWN, rich_help_panel=HOW
        ),
    ] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            metavar="LOW-HIGH",
            help="Guide only where noise is between these shares of the schedule, such as 0.1-0.8: "
            "faster, not the same.",
            show_default=False,
            rich_help_panel=FASTER,
        ),
    ] = None,
    rehash: Annotated[
        str,
        typer.Option(
            metavar="N|STEPS|off",
            help="Run N of the steps in full, and reuse features at all others: faster, not the "
            "same. Of motion, as many in proportion. Or say which: 0,1,4+0,2 of content and "
            "motion.",
            rich_help_panel=FASTER,
        ),
    ] = "off",
    rehash_policy: Annotated[
        str | None,
        typer.Option(
            help=f"How those are chosen, one of {', '.join(POLICIES)}.  [default: minimax]",
            autocompletion=one_of(POLICIES),
            rich_help_panel=FASTER,
        ),
    ] = None,
    rehash_threshold: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="Run the steps in full that are less similar than G to the last one, instead of "
            "N.",
            show_default=False,
            rich_help_panel=FASTER,
        ),
    ] = None,
    rehash_cut: Annotated[
        str,
        typer.Option(
            help=f"Where the UNet is cut, one of {', '.join(CUTS)}; earliest first.",
            autocompletion=one_of(CUTS),
            rich_help_panel=FASTER,
        ),
    ] = SampleConfig.rehash_cut,
    rehash_protect: Annotated[
        float,
        typer.Option(
            help="Share of the content frame's steps, the first, that always run.",
            rich_help_panel=FASTER,
        ),
    ] = SampleConfig.rehash_protect,
    rehash_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Made by `cmdgen rehash calibrate`." + OWN,
            rich_help_panel=FASTER,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(FORMATS)}.  [default: by the suffix; on stdout y4m]",
            autocompletion=one_of(FORMATS),
            rich_help_panel=FILE,
        ),
    ] = None,
    crf: Annotated[
        int | None,
        typer.Option(
            help="How much is lost, from 0, the least.  [default: the codec's, little]",
            rich_help_panel=FILE,
        ),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(CODECS)}.  [default: the format's]",
            autocompletion=one_of(CODECS),
            rich_help_panel=FILE,
        ),
    ] = None,
    loop: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How often a gif, webp or apng plays.  [default: 0, for ever]",
            rich_help_panel=FILE,
        ),
    ] = None,
    sidecar: Annotated[
        bool,
        typer.Option(
            "--sidecar", help="Write the metadata to NAME.json as well.", rich_help_panel=FILE
        ),
    ] = False,
    no_metadata: Annotated[
        bool,
        typer.Option(
            "--no-metadata",
            help="Leave out of the file what made it.",
            rich_help_panel=FILE,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace files that are there.", rich_help_panel=JOBS),
    ] = False,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="A prompt a line, or a JSON object a line with the names of options as keys, "
            "which win over flags; - is stdin.",
            rich_help_panel=JOBS,
        ),
    ] = None,
    num: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=100_000,
            help="Clips of each prompt: seeds --seed, --seed + 1, and so on, or random ones.",
            rich_help_panel=JOBS,
        ),
    ] = 1,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="Clips that are made at a time; each is as it would be alone, but for rounding.",
            rich_help_panel=JOBS,
        ),
    ] = Manner.batch,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing", help="Make only what is not there yet.", rich_help_panel=JOBS
        ),
    ] = False,
    fail_fast: Annotated[
        bool,
        typer.Option(
            "--fail-fast", help="End at the first that cannot be made.", rich_help_panel=JOBS
        ),
    ] = False,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take prompt, seeds and all options from a file that cmdgen wrote; flags win.",
            rich_help_panel=JOBS,
        ),
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rewrite this png with the content frame while it is sampled.",
            rich_help_panel=JOBS,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, and say what would be made, in how much memory and time.",
            rich_help_panel=JOBS,
        ),
    ] = False,
    model: Model = "mini",
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What decoding may hold beside the weights, such as 4GB: the result stays the "
            "same.  [default: what is fastest]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Put the networks through torch's compiler: minutes for the first clip of a size, "
            "less for those that follow in the same process.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make videos from text prompts.

    The paths of the files go to stdout, or with -o - the video itself; everything else goes to
    stderr. In a name {index}, {line}, {seed} and {slug}, the prompt's words, are filled in. Of
    several clips, folders that are missing are made.

    With -f, and of what is piped in, each line is a prompt, or a JSON object with the names of
    options as keys, which win over flags; blank lines and those that start with # are skipped. The
    "output" of such a line is relative, without .., and lies in the folder of -o. What is wrong
    with a line is said with its number, and the others are made. On stdout, clips of one size
    follow one another as y4m, raw or mp4. As .safetensors, a clip is its content frame and motion
    latents: see cmdgen decode.

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
    say = Say(quiet=quiet, verbose=verbose, as_json=as_json)
    if output == STDOUT and as_json:
        raise ValueError("--json and -o - both need stdout: leave one of them")
    if overwrite and skip_existing:
        raise ValueError("--overwrite and --skip-existing contradict each other: give one")
    files = GivenFiles(content_from=content_from, motion_from=motion_from, image=image)
    for half, number in (("content", content_seed), ("motion", motion_seed)):
        if number is not None and files.holds(half):
            raise ValueError(f"--{half}-seed draws nothing where the {half} is given: leave it out")
    options = Options(context, get_type_hints(sample), OF_JOBS)
    values = dict(context.params)
    if output not in (None, STDOUT):
        # of a template that is none, each line would say so
        fields(output)
    memory = None
    if like is not None:
        given = {name for name in values if _is_given(context, name)}
        target = None if output is None else choose_encoding(output, format=format).format
        memory = recall(like, options, given, target)
        files.check_like(memory.files, like, say)
        values |= memory.values
    entries, known = _find_entries(prompt, file, memory)
    jobs: Iterable[Job | Refused | None] = make_jobs(entries, options, values, num=num)
    several = file is not None or num > 1
    total = None
    if known:
        jobs = list(islice(jobs, MOST_JOBS + 1))
        total = len(jobs)
        if total > MOST_JOBS:
            raise ValueError(f"more than {MOST_JOBS} clips: pipe them in with -f -")
        several = several or total > 1
        if not jobs:
            raise ValueError("no prompt: give PROMPT, pipe it in, or a file of them with -f")
        if not several and isinstance(jobs[0], Refused):
            raise jobs[0].error
    if several and skip_existing and seed is None and output and "seed" in fields(output):
        raise ValueError("--skip-existing with random seeds in names finds nothing: give --seed")
    manner = Manner(
        batch=batch,
        overwrite=overwrite,
        skip_existing=skip_existing,
        fail_fast=fail_fast,
        preview=preview,
        alone=not several,
        total=total,
    )
    from cmdgen.pipeline import TextToVideo
    from cmdgen.video.write import check_output

    if preview is not None:
        if choose_encoding(str(preview)).format != STILL:
            raise ValueError(f"preview {preview}: the name must end in .png")
        check_output(preview, overwrite=True)
    if output == STDOUT and not dry_run:
        check_output(STDOUT, overwrite=True)
    pipeline = TextToVideo.load(
        find_model(values["model"]),
        device=values["device"],
        dtype=values["dtype"],
        compile=values["compile"],
    )
    if compile and not dry_run:
        say.note("the first step waits for the compiler, for minutes where all is new to it")
    if not no_metadata and not dry_run:
        # while other things are done
        Thread(target=_hash, args=(pipeline,), daemon=True).start()
    work = Batch(pipeline, manner, say, files)
    checked = _check(jobs, work)
    if known:
        checked = iter(_look_ahead(checked, say, manner))
    if memory is not None:
        for line in memory.compare(pipeline):
            say.note(line)
    if dry_run:
        print_plan(checked, pipeline, manner, say)
    else:
        work.run(checked)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option comes from the command line, not from a default or a file of them."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _find_entries(
    prompt: str | None, file: str | None, like: Memory | None
) -> tuple[Iterator[Entry | None], bool]:
    """What is asked for, and whether all of it is known before any of it is made."""
    if file is not None:
        if prompt is not None:
            raise ValueError("a prompt and -f: give one of them")
        return open_entries(file)
    if prompt is not None:
        return iter([Entry(0, 1, {"prompt": prompt})]), True
    if like is not None:
        return iter([Entry(0, 1)]), True
    return read_piped(), True


def _check(
    jobs: Iterable[Job | Refused | None], work: Batch
) -> Iterator[Job | Refused | Kept | None]:
    for job in jobs:
        yield work.check(job) if isinstance(job, Job) else job


def _look_ahead(
    checked: Iterable[Job | Refused | Kept | None], say: Say, manner: Manner
) -> list[Job | Refused | Kept]:
    """All of them, before any is made; what is wrong with some is said."""
    ahead: list[Job | Refused | Kept] = []
    for each in checked:
        if isinstance(each, Refused):
            if manner.alone:
                raise each.error
            if manner.fail_fast or isinstance(each.error, SameName):
                raise each.located
            say.error(str(each))
            each = replace(each, told=True)
        if each is not None:
            ahead.append(each)
    return ahead


def _hash(pipeline: "TextToVideo") -> None:
    # weights that cannot be read are an error of who needs them
    with suppress(ValueError):
        _ = pipeline.weights_hash
