"""`cmdgen profile`: where the time of sampling goes, and what the paper's model computes."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from cmdgen.cli.errors import on_the_way
from cmdgen.cli.options import (
    OWN,
    AsJson,
    Device,
    Dtype,
    Model,
    Quiet,
)
from cmdgen.cli.progress import Say
from cmdgen.cli.size import parse_size
from cmdgen.config import CMD_SD21, ProfileConfig, SampleConfig, SuiteConfig
from cmdgen.evaluation.report import table
from cmdgen.store.find import find_model

if TYPE_CHECKING:
    from cmdgen.evaluation.flops import PaperTables
    from cmdgen.evaluation.profile import Profile
    from cmdgen.evaluation.suite import Suite

INSTEAD = "Instead of a sample"

# characters of the longest bar
BAR = 25

# what `--json` prints; the help ends with it
JSON_KEYS = """\
--json prints one object, and these keys stay as they are. Of the run:
  model, frames, height, width, sampler, steps, guidance, batch, runs,
  device, dtype, torch
  motion_steps, motion_guidance   null for stills, which have no motion
  matmul_flops_per_second         measured: a product of square matrices
  copy_bytes_per_second           measured: a large copy, read + written
  stages                          an object for each stage that ran: load,
                                  text, content, motion, frame decode,
                                  VAE decode, video encode
  total                           the same object of a whole run
Of each stage and of total:
  parameters, weight_bytes        of what runs; of load and total: of all
  forwards                        of its network; in total: of all of them
  flops                           two for each multiply-add
  bytes_read                      the weights, once for each forward; of
                                  load once; of video encode the frames;
                                  activations are not counted
  seconds                         {median, fastest, slowest} of the runs
  flops_per_second, bytes_per_second   in the median run
  share_of_matmul, share_of_copy       of the measured limits, 1 is all
  memory_bytes                    highest: {resident} on a CPU, {} where
                                  that cannot be told, {allocated,
                                  reserved} on a GPU

With --suite it prints another, with the same names for the same things:
  model, frames, height, width, sampler, steps, motion_steps, guidance,
  motion_guidance, runs, device, dtype, torch, matmul_flops_per_second,
  compile                         whether the networks were compiled
  rows                            an object for each way to make a clip:
                                  paper, clip, rehash_half, rehash_quarter
  unet_step                       of clip: {seconds, flops_per_second,
                                  share_of_matmul} of a step of the UNet
Of each of the rows:
  full_steps, full_motion_steps   that skip nothing
  guidance, motion_guidance       1 is off
  seconds                         of paper: of its stages, no others; else
                                  from the prompt to the file on disk
  content_step_seconds            the content stage by all of its steps
  flops                           of what runs, skipped steps too
  flops_per_second, share_of_matmul, memory_bytes
  stages                          {flops, seconds} of each that counts"""

NOTES = """\
- Seconds: the median of {runs} after one run to warm up; the total has what is between stages too.
- Memory: the highest; resident is of the whole process, allocated and reserved are PyTorch's on the
  GPU.
- Parameters and weights: of what runs, so the decoders of the autoencoder and the VAE; of load and
  total, of everything that is loaded.
- Read: the weights once for each forward (of the token table, the rows of one prompt), to load all
  of them once, to encode the frames. Activations are not counted, and weights that stay in a cache
  can pass the limit.
- Limits: products of square matrices in this dtype, copies of more than caches hold (read + write).
  The fastest of a few, before and after the runs."""


DECODING_NOTES = """\
- Whole: the clip through the autoencoder at once, single frames through the VAE. Default: the
  slices of a run without --max-memory. Least: those of 40 % of the whole's memory.
- Frames and positions that go through the autoencoder at a time, pictures through the VAE, and the
  strips that each of these is cut into.
- Memory: tensors beside the weights at once, predicted and found; live: counted on the same run of
  shapes alone; allocated and reserved: PyTorch's on the GPU, reserved with the weights.
- Seconds: the least of the runs; of the VAE, those of its first slice times their number."""


SUITE_LABELS = {
    "paper": "the paper's count",
    "clip": "prompt to file",
    "rehash_half": "rehash {}",
    "rehash_quarter": "rehash {}",
}
SUITE_NOTES = """\
- One process, weights loaded, the median of {runs} clips after one to warm up, in the rows' order.
- The paper's count: guidance off in both models; text, content, motion and frame decode, as timed
  one by one: the VAE runs too, and is left out, and there is no file.
- Prompt to file: the model's guidance, VAE, mp4 on disk. Rehash: the same, with so many steps in
  full, chosen uniformly.
- ms/step: the content stage by all of its steps, full or skipped, with the sampler between them.
- Rates: two operations for each multiply-add of what runs, skipped steps too, in all those seconds;
  matmul is the fastest of a few products of square matrices in this dtype, before and after.
- Memory: the highest, weights too; resident is of the whole process; allocated and reserved are
  PyTorch's on the GPU, with what rows above keep for good, such as captured graphs."""


def profile(
    context: typer.Context,
    model: Model = "mini",
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size of the video." + OWN)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of both models.  "
            f"[default: the model's own; {SuiteConfig.steps} of --suite]"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Clips at a time.")] = ProfileConfig.batch,
    runs: Annotated[
        int, typer.Option(help="Runs to measure, after one to warm up.")
    ] = ProfileConfig.runs,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one more run as a trace for Chrome or Perfetto."),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Count the paper's Tables 8 and 9 instead; runs no model.",
            rich_help_panel=INSTEAD,
        ),
    ] = False,
    decoding: Annotated[
        bool,
        typer.Option(
            "--decoding",
            help="Decode a clip of the paper's model, weights random, whole and in slices instead; "
            "512x1024 unless --size says otherwise.",
            rich_help_panel=INSTEAD,
        ),
    ] = False,
    suite: Annotated[
        bool,
        typer.Option(
            "--suite",
            help="Make clips as the paper counts, as a user waits for them, and with step rehash "
            "instead; warm.",
            rich_help_panel=INSTEAD,
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Put the networks of --suite through torch's compiler, which takes minutes for "
            "each row; not counted.",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure each stage of sampling: time, memory, arithmetic, bytes.

    The report goes to stdout, progress to stderr.

    Examples:
        cmdgen profile
        cmdgen profile --steps 10 --trace trace.json --json > profile.json
        cmdgen profile --paper
    """
    say = Say(quiet=quiet)
    printing = ("as_json", "quiet")
    if paper:
        _refuse_others(context, "--paper counts the paper's own model", ("paper", *printing))
        from cmdgen.evaluation.flops import compare_with_paper

        tables = compare_with_paper()
        typer.echo(
            json.dumps(asdict(tables), indent=2) if as_json else "\n".join(_paper_lines(tables))
        )
        return
    if decoding:
        allowed = ("decoding", *printing, "size", "runs", "device", "dtype")
        _refuse_others(context, "--decoding decodes with the paper's own model", allowed)
        given = context.get_parameter_source("runs")
        once = given is None or given.name == "DEFAULT"
        times = 1 if once else runs
        _decode(size or "1024x512", device, dtype, times, say, as_json=as_json)
        return
    if suite:
        used = ("suite", *printing, "model", "size", "steps", "runs", "device", "dtype", "compile")
        _refuse_others(context, "--suite measures ways to make one clip", used)
        height, width = (None, None) if size is None else parse_size(size)
        wanted = SuiteConfig(SuiteConfig.steps if steps is None else steps, runs, height, width)
        _measure_suite(model, wanted, device, dtype, say, compile=compile, as_json=as_json)
        return
    if compile:
        # each run here reads the weights anew, and would compile anew
        raise ValueError("--compile has a use with --suite alone")
    if trace is not None and (trace.is_dir() or not os.access(trace.absolute().parent, os.W_OK)):
        raise ValueError(f"{trace}: not the name of a file in a folder that can be written to")
    height, width = (None, None) if size is None else parse_size(size)
    asked = SampleConfig(steps=steps, motion_steps=steps, height=height, width=width)
    config = ProfileConfig(runs=runs, batch=batch)

    from cmdgen.evaluation.profile import profile_sampling
    from cmdgen.pipeline import TextToVideo

    def load() -> TextToVideo:
        return TextToVideo.load(find_model(model), device=device, dtype=dtype)

    # what is asked and impossible is said before anything runs
    asked.apply(load().config)
    with on_the_way("ask for a smaller --size or --batch"), say.progress() as show:
        measured = profile_sampling(load, asked, config, trace=trace, on_progress=show)
    typer.echo(json.dumps(measured.to_dict(), indent=2) if as_json else "\n".join(_lines(measured)))


def _refuse_others(context: typer.Context, what: str, allowed: tuple[str, ...]) -> None:
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in allowed:
            raise ValueError(f"{what}: --{name} has no use there")


def _decode(size: str, device: str, dtype: str, runs: int, say: Say, *, as_json: bool) -> None:
    """Compare ways to decode a clip, and print the table."""
    height, width = parse_size(size)
    model = SampleConfig(height=height, width=width).apply(CMD_SD21)
    config = ProfileConfig(runs=runs)
    from cmdgen.evaluation.decoding import compare_decoding
    from cmdgen.pipeline import choose_device, choose_dtype

    place = choose_device(device)
    with on_the_way("ask for a smaller --size"), say.progress() as show:
        ways = compare_decoding(
            model, place, choose_dtype(dtype, place), runs=config.runs, on_progress=show
        )
    if as_json:
        entries = [{**asdict(way), "seconds": way.seconds} for way in ways]
        typer.echo(json.dumps(entries, indent=2))
        return
    whole, *_ = ways
    rows = [
        (
            *("way", "frames", "positions", "pictures", "strips", "predicted MB"),
            *(f"{kind} MB" for kind in whole.memory),
            *("of whole", "clip s", "VAE s", "total s", "of whole"),
        )
    ]
    for name, way in zip(("whole", "default", "least"), ways, strict=True):
        cut = way.slices
        first, *_ = way.memory
        rows.append(
            (
                name,
                *(
                    ("", "", "1", "")
                    if cut is None
                    else map(str, (cut.frames, cut.positions, cut.pictures, cut.strips))
                ),
                "" if way.predicted is None else f"{way.predicted / 1e6:.0f}",
                *(f"{value / 1e6:.0f}" for value in way.memory.values()),
                f"{way.memory[first] / whole.memory[first]:.1%}",
                *(f"{each:.2f}" for each in (way.clip_seconds, way.vae_seconds, way.seconds)),
                f"{way.seconds / whole.seconds:.1%}",
            )
        )
    typer.echo(
        "\n".join(
            [
                f"{model.name}, {model.frames} frames of {model.width}x{model.height}",
                "",
                *table(rows),
                "",
                *DECODING_NOTES.splitlines(),
            ]
        )
    )


def _measure_suite(
    model: str,
    config: SuiteConfig,
    device: str,
    dtype: str,
    say: Say,
    *,
    compile: bool,
    as_json: bool,
) -> None:
    """Make clips in all ways, and print the table."""
    from cmdgen.evaluation.suite import measure_suite, plan_suite
    from cmdgen.pipeline import TextToVideo

    pipeline = TextToVideo.load(find_model(model), device=device, dtype=dtype, compile=compile)
    plan_suite(pipeline, config)
    with on_the_way("ask for a smaller --size"), say.progress() as show:
        measured = measure_suite(pipeline, config, on_progress=show)
    typer.echo(
        json.dumps(measured.to_dict(), indent=2) if as_json else "\n".join(_suite_lines(measured))
    )


def _suite_lines(measured: "Suite") -> list[str]:
    """Markdown: a row for each way to make a clip."""
    settings, limit, rows = measured.settings, measured.matmul_flops_per_second, measured.rows
    labels = (SUITE_LABELS[name].format(row.full_steps) for name, row in rows.items())
    each = list(rows.values())
    rates = [row.flops_per_second for row in each]
    taken, rate = measured.step
    factor, prefix = _prefix(rate)
    title = "{model}, {frames} frames of {width}x{height}, {sampler} {steps} + {motion_steps} steps"
    return [
        title.format(**settings),
        "{dtype} on {device}, torch {torch}".format(**settings)
        + (", compiled" if settings["compile"] else ""),
        f"measured limit: matmul {limit / factor:.1f} {prefix}FLOP/s",
        "",
        *table(
            _rows(
                ("clip", *labels),
                ("full", *(f"{row.full_steps} + {row.full_motion_steps}" for row in each)),
                ("seconds", *(f"{median(row.seconds):.3f}" for row in each)),
                (
                    "fastest-slowest",
                    *(f"{min(row.seconds):.3f}-{max(row.seconds):.3f}" for row in each),
                ),
                ("ms/step", *(f"{1000 * row.step_seconds:.2f}" for row in each)),
                _column("", "FLOP/s", rates),
                ("of matmul", *_shares(rates, limit)),
                *(
                    _column(kind, "B", [row.memory[kind] for row in each])
                    for kind in each[0].memory
                ),
            )
        ),
        "",
        f"UNet step, guidance {settings['guidance']:g}, of prompt to file: {1000 * taken:.2f} ms, "
        f"{rate / factor:.1f} {prefix}FLOP/s, {rate / limit:.1%} of matmul",
        "",
        *SUITE_NOTES.format(**settings).splitlines(),
    ]


def _paper_lines(tables: "PaperTables") -> list[str]:
    """Markdown."""
    lines = [f"CMD's efficiency tables, counted with {tables.model}; all figures are 10^12."]
    for title, entries in (
        ("Table 8: one forward at 512x512", tables.table_8),
        ("Table 9: sampling 16 frames at 512x1024", tables.table_9),
    ):
        rows = [("", "paper", "ours, so counted", "apart", "operations")]
        rows += [
            (
                entry.label,
                f"{entry.published:g}",
                f"{entry.ours:.{2 if entry.ours > 10 else 3}f}",
                f"{entry.ours / entry.published - 1:+.2%}",
                f"{entry.honest:.{1 if entry.honest > 10 else 2}f}",
            )
            for entry in entries
        ]
        lines += ["", title, "", *table(rows)]
    rows_of_stages = [("", "operations", "share")]
    total = sum(tables.stages.values())
    rows_of_stages += [
        (name, f"{value:.2f}", f"{value / total:.1%}") for name, value in tables.stages.items()
    ]
    return [
        *lines,
        *("", "Where the operations of 50 steps are", "", *table(rows_of_stages), ""),
        "- So counted: multiply-adds, without attention's products of queries with keys and of",
        "  weights with values; Table 9 without guidance, text encoder and VAE, and with the",
        "  autoencoder there and back.",
        "- Operations: two for each multiply-add, attention's too; in Table 9 of all that sampling",
        "  runs: guidance of the content, text encoder, the autoencoder's way back, VAE decoder.",
    ]


def _lines(measured: "Profile") -> list[str]:
    """Markdown: what each stage took, with a bar for its time, and its work beside the limits."""
    settings, limits = measured.settings, measured.limits
    still = settings["frames"] == 1
    title = (
        "{model}, a still of {width}x{height}, {sampler} {steps} steps, batch {batch}"
        if still
        else "{model}, {frames} frames of {width}x{height}, {sampler} {steps} + {motion_steps} "
        "steps, batch {batch}"
    )
    matmul, flops = _prefix(limits.flops_per_second)
    copy, byte = _prefix(limits.bytes_per_second)
    return [
        title.format(**settings),
        "{dtype} on {device}, torch {torch}".format(**settings),
        f"measured limits: matmul {limits.flops_per_second / matmul:.1f} {flops}FLOP/s, "
        f"copy {limits.bytes_per_second / copy:.1f} {byte}B/s",
        "",
        *_table_of_cost(measured),
        "",
        *_table_of_work(measured),
        "",
        *NOTES.format(**settings).splitlines(),
    ]


def _table_of_cost(measured: "Profile") -> list[str]:
    stages = [*measured.stages.values(), measured.total]
    seconds = [median(stage.seconds) for stage in stages]
    longest = max(seconds[:-1])
    return table(
        _rows(
            ("stage", *measured.stages, "total"),
            ("seconds", *(f"{each:.4f}" for each in seconds)),
            ("fastest-slowest", *(f"{min(s.seconds):.4f}-{max(s.seconds):.4f}" for s in stages)),
            ("share", *(f"{each / seconds[-1]:.1%}" for each in seconds)),
            *(
                _column(kind, "B", [stage.memory[kind] for stage in stages])
                for kind in measured.total.memory
            ),
            bars=("time", *("█" * round(BAR * each / longest) for each in seconds[:-1]), ""),
        )
    )


def _table_of_work(measured: "Profile") -> list[str]:
    stages, limits = [*measured.stages.values(), measured.total], measured.limits
    work = [stage.work for stage in stages]
    arithmetic = [stage.flops_per_second for stage in stages]
    reading = [stage.bytes_per_second for stage in stages]
    return table(
        _rows(
            ("stage", *measured.stages, "total"),
            _column("parameters", "", [each.parameters for each in work]),
            _column("weights", "B", [each.weight_bytes for each in work]),
            ("forwards", *(str(each.forwards or "") for each in work)),
            _column("", "FLOP", [each.flops for each in work]),
            _column("", "FLOP/s", arithmetic),
            ("of matmul", *_shares(arithmetic, limits.flops_per_second)),
            _column("read", "B", [each.bytes_read for each in work]),
            _column("", "B/s", reading),
            ("of copy", *_shares(reading, limits.bytes_per_second)),
        )
    )


def _rows(
    names: tuple[str, ...], *numbers: tuple[str, ...], bars: tuple[str, ...] | None = None
) -> list[tuple[str, ...]]:
    """Columns, numbers to the right, to rows."""
    right = [tuple(cell.rjust(max(map(len, column))) for cell in column) for column in numbers]
    return list(zip(names, *right, *([] if bars is None else [bars]), strict=True))


def _column(name: str, unit: str, values: Sequence[float]) -> tuple[str, ...]:
    """All in the unit of the largest, which the header says; zeros are left out."""
    factor, prefix = _prefix(max(values))
    digits = 1 if max(values) >= 100 * factor else 2
    header = f"{name} {prefix}{unit}".strip()
    return header, *(f"{value / factor:.{digits}f}" if value else "" for value in values)


def _shares(rates: Sequence[float], limit: float) -> list[str]:
    return [f"{rate / limit:.1%}" if rate else "" for rate in rates]


def _prefix(value: float) -> tuple[float, str]:
    """The unit in which the largest of a column has up to four digits before the point or so.

    One step finer than usual: the smallest of it is often a thousandth.
    """
    scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
    return next((scale for scale in scales if value >= 10 * scale[0]), scales[-1])
