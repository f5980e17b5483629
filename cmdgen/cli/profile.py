"""`cmdgen profile`: where the time of making clips goes, and what the paper's model computes."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen.cli.command import Only
from cmdgen.cli.errors import on_the_way
from cmdgen.cli.progress import Say
from cmdgen.config import CMD_SD21
from cmdgen.evaluation.report import column, scale, shares, spread, table
from cmdgen.evaluation.settings import Profiling
from cmdgen.request import Request, resolve

if TYPE_CHECKING:
    from cmdgen.evaluation.decoding import Decoding
    from cmdgen.evaluation.flops import PaperTables
    from cmdgen.evaluation.profile import Limits, Measured, Profile
    from cmdgen.pipelines.still import StillPipeline

# what each mode measures, and the options that it reads
MODES = {
    "paper": ("--paper counts the paper's own model", ()),
    "decoding": (
        "--decoding decodes with the paper's own model",
        ("size", "runs", "device", "dtype"),
    ),
    "suite": (
        "--suite measures ways to make one clip",
        ("model", "size", "steps", "runs", "device", "dtype", "compile"),
    ),
}
PAPER_SIZE = 512, 1024
# characters of the longest bar
BAR = 25

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
- Memory: tensors beside the weights at once, as planned and as found; live: counted on the same run
  of shapes alone; allocated and reserved: PyTorch's on the GPU, reserved with the weights.
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

PAPER_NOTES = """\
- So counted: multiply-adds, without attention's products of queries with keys and of
  weights with values; Table 9 without guidance, text encoder and VAE, and with the
  autoencoder there and back.
- Operations: two for each multiply-add, attention's too; in Table 9 of all that sampling
  runs: guidance of the content, text encoder, the autoencoder's way back, VAE decoder."""


def profile(
    context: typer.Context,
    options: Profiling,
    request: Annotated[Request, Only(("size", "model", "device", "dtype", "compile"))],
    say: Annotated[Say, Only(("as_json", "quiet"))],
) -> None:
    """Measure each stage of sampling: time, memory, arithmetic, bytes.

    The report goes to stdout, progress to stderr. Only --suite compiles: everything else reads the
    weights for each run.

    Examples:
      cmdgen profile
      cmdgen profile --steps 10 --trace trace.json --json > profile.json
      cmdgen profile --paper
    """
    given = _list_given(context)
    for name, (what, used) in MODES.items():
        if getattr(options, name):
            for other in given:
                if other not in (name, "as_json", "quiet", *used):
                    raise ValueError(f"{what}: --{other} has no use there")
    if options.paper:
        from cmdgen.evaluation.flops import compare_with_paper

        tables = compare_with_paper()
        say.result("\n".join(_paper_lines(tables)), asdict(tables))
    elif options.decoding:
        _decode(request, options.runs if "runs" in given else 1, say)
    elif options.suite:
        _measure_suite(request, options, say)
    elif request.compile:
        raise ValueError("--compile has a use with --suite alone")
    else:
        _profile(request, options, say)


def _list_given(context: typer.Context) -> list[str]:
    """Return the options that the command line has."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def _profile(request: Request, options: Profiling, say: Say) -> None:
    from cmdgen.evaluation import profile as profiling
    from cmdgen.pipelines.load import load_pipeline

    def load() -> "StillPipeline":
        return load_pipeline(request.model, device=request.device, dtype=request.dtype)

    clip = replace(request, steps=options.steps, motion_steps=options.steps)
    way = profiling.Way(load().plan(clip, batch=options.batch), options.batch)
    with on_the_way("ask for a smaller --size or --batch"), say.progress() as show:
        measured = profiling.profile(load, {"clip": way}, runs=options.runs, show=show)
        if options.trace is not None:
            profiling.trace(load(), way, options.trace)
    say.result("\n".join(_stage_lines(measured)), describe(measured))


def _measure_suite(request: Request, options: Profiling, say: Say) -> None:
    from cmdgen.evaluation import profile as profiling
    from cmdgen.pipelines.load import load_pipeline

    pipeline = load_pipeline(
        request.model, device=request.device, dtype=request.dtype, compile=request.compile
    )
    ways = profiling.plan_suite(pipeline, replace(request, steps=options.steps))
    with on_the_way("ask for a smaller --size"), say.progress() as show:
        measured = profiling.profile(lambda: pipeline, ways, runs=options.runs, show=show)
    say.result("\n".join(_suite_lines(measured)), describe(measured))


def _decode(request: Request, runs: int, say: Say) -> None:
    from cmdgen.evaluation.decoding import compare_decoding
    from cmdgen.pipelines.base import choose_device, choose_dtype

    model = resolve(Request(size=request.size or PAPER_SIZE), CMD_SD21).model
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    with on_the_way("ask for a smaller --size"), say.progress() as show:
        ways = compare_decoding(model, device, dtype, runs=runs, show=show)
    entries: Any = [{**asdict(way), "seconds": way.seconds} for way in ways.values()]
    title = f"{model.name}, {model.frames} frames of {model.width}x{model.height}"
    lines = [title, "", *table(_decoding_rows(ways)), "", DECODING_NOTES]
    say.result("\n".join(lines), entries)


def describe(measured: "Profile") -> dict[str, Any]:
    """Print one object with --json; these keys stay as they are. Of the run:
      model, frames, height, width, sampler, steps, guidance, batch, runs,
      device, dtype, torch
      compile                         whether the networks were compiled
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

    With --suite, instead of stages and total:
      rows                            an object for each way to make a clip:
                                      paper, clip, rehash_half, rehash_quarter
      unet_step                       of clip: {seconds, flops_per_second,
                                      share_of_matmul} of a step of the UNet
    Each of the rows has stages, the keys of total, and:
      full_steps, full_motion_steps   that skip nothing
      guidance, motion_guidance       1 is off
      seconds                         of paper: of its stages, no others; else
                                      from the prompt to the file on disk
      content_step_seconds            the content stage by all of its steps
      flops                           of what runs, skipped steps too
    """
    limits = measured.limits
    about = measured.settings | {
        "matmul_flops_per_second": limits.flops_per_second,
        "copy_bytes_per_second": limits.bytes_per_second,
    }
    rows = {name: row.to_dict(limits) for name, row in measured.rows.items()}
    row = measured.rows["clip"]
    if len(rows) == 1:
        return about | {"stages": rows["clip"]["stages"], "total": row.total.to_dict(limits)}
    step = row.stages["content"].to_dict(limits)
    names = ("flops_per_second", "share_of_matmul")
    unet_step = {"seconds": row.step_seconds, **{name: step[name] for name in names}}
    return about | {"rows": rows, "unet_step": unet_step}


# the help ends with it
JSON_KEYS = inspect.cleandoc(describe.__doc__ or "")


def _title(settings: dict[str, Any]) -> list[str]:
    size = "{width}x{height}, {sampler} {steps}"
    clip = f"{{frames}} frames of {size} + {{motion_steps}} steps"
    if settings["frames"] == 1:
        clip = f"a still of {size} steps"
    machine = "{dtype} on {device}, torch {torch}" + ", compiled" * settings["compile"]
    return [f"{{model}}, {clip}".format(**settings), machine.format(**settings)]


def _rates(stages: Sequence["Measured"], limits: "Limits") -> list[list[str]]:
    rates = [stage.flops_per_second for stage in stages]
    return [column("", "FLOP/s", rates), shares("of matmul", rates, limits.flops_per_second)]


def _memory(stages: Sequence["Measured"]) -> list[list[str]]:
    kinds = stages[-1].memory
    return [column(kind, "B", [stage.memory[kind] for stage in stages]) for kind in kinds]


def _stage_lines(measured: "Profile") -> list[str]:
    """Return what each stage took, with a bar for its time, and its work beside the limits."""
    settings, limits, row = measured.settings, measured.limits, measured.rows["clip"]
    stages = [*row.stages.values(), row.total]
    names = ["stage", *row.stages, "total"]
    title, machine = _title(settings)
    (matmul, flops), (copy, byte) = map(scale, limits)
    seconds = [median(stage.seconds) for stage in stages]
    longest = max(seconds[:-1])
    cost = [
        names,
        ["seconds", *(f"{each:.4f}" for each in seconds)],
        ["fastest-slowest", *(spread(stage.seconds, 4) for stage in stages)],
        shares("share", seconds, seconds[-1]),
        *_memory(stages),
        ["time", *("█" * round(BAR * each / longest) for each in seconds[:-1]), ""],
    ]
    work, reading = [stage.work for stage in stages], [stage.bytes_per_second for stage in stages]
    counts = [
        names,
        column("parameters", "", [each.parameters for each in work]),
        column("weights", "B", [each.weight_bytes for each in work]),
        ["forwards", *(str(each.forwards or "") for each in work)],
        column("", "FLOP", [each.flops for each in work]),
        *_rates(stages, limits),
        column("read", "B", [each.bytes_read for each in work]),
        column("", "B/s", reading),
        shares("of copy", reading, limits.bytes_per_second),
    ]
    return [
        f"{title}, batch {settings['batch']}",
        machine,
        f"measured limits: matmul {limits.flops_per_second / matmul:.1f} {flops}FLOP/s, "
        f"copy {limits.bytes_per_second / copy:.1f} {byte}B/s",
        *("", *table(zip(*cost, strict=True)), "", *table(zip(*counts, strict=True)), ""),
        NOTES.format(**settings),
    ]


def _suite_lines(measured: "Profile") -> list[str]:
    """Return a row for each way to make a clip."""
    from cmdgen.evaluation.profile import full_steps

    settings, limit, rows = measured.settings, measured.limits.flops_per_second, measured.rows
    full = {name: full_steps(row.plan) for name, row in rows.items()}
    totals = [row.total for row in rows.values()]
    step = rows["clip"].stages["content"].flops_per_second
    factor, prefix = scale(step)
    columns = [
        ["clip", *(SUITE_LABELS[name].format(content) for name, (content, _) in full.items())],
        ["full", *("{} + {}".format(*steps) for steps in full.values())],
        ["seconds", *(f"{median(total.seconds):.3f}" for total in totals)],
        ["fastest-slowest", *(spread(total.seconds, 3) for total in totals)],
        ["ms/step", *(f"{1000 * row.step_seconds:.2f}" for row in rows.values())],
        *_rates(totals, measured.limits),
        *_memory(totals),
    ]
    return [
        *_title(settings),
        f"measured limit: matmul {limit / factor:.1f} {prefix}FLOP/s",
        *("", *table(zip(*columns, strict=True)), ""),
        f"UNet step, guidance {settings['guidance']:g}, of prompt to file: "
        f"{1000 * rows['clip'].step_seconds:.2f} ms, {step / factor:.1f} {prefix}FLOP/s, "
        f"{step / limit:.1%} of matmul",
        *("", SUITE_NOTES.format(**settings)),
    ]


def _decoding_rows(ways: dict[str, "Decoding"]) -> Iterator[Sequence[str]]:
    whole = ways["whole"]
    (kind, *_) = whole.memory
    yield (
        *("way", "frames", "positions", "pictures", "strips", "predicted MB"),
        *(f"{name} MB" for name in whole.memory),
        *("of whole", "clip s", "VAE s", "total s", "of whole"),
    )
    for name, way in ways.items():
        slices = ("", "", 1, "") if way.slices is None else asdict(way.slices).values()
        yield (
            *(name, *map(str, slices)),
            "" if way.predicted is None else f"{way.predicted / 1e6:.0f}",
            *(f"{value / 1e6:.0f}" for value in way.memory.values()),
            f"{way.memory[kind] / whole.memory[kind]:.1%}",
            *(f"{each:.2f}" for each in (way.clip_seconds, way.vae_seconds, way.seconds)),
            f"{way.seconds / whole.seconds:.1%}",
        )


def _paper_lines(tables: "PaperTables") -> list[str]:
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
    total = sum(tables.stages.values())
    stages = [(name, f"{each:.2f}", f"{each / total:.1%}") for name, each in tables.stages.items()]
    heading = "Where the operations of 50 steps are"
    return [
        *lines,
        "",
        heading,
        "",
        *table([("", "operations", "share"), *stages]),
        "",
        PAPER_NOTES,
    ]
