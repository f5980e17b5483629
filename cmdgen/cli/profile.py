"""`cmdgen profile`: where the time of making clips goes, and what the paper's model computes."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import typer

from cmdgen.cli.command import Only, check_flags, list_flags
from cmdgen.cli.errors import on_the_way
from cmdgen.cli.progress import JsonOrQuiet, Say
from cmdgen.config import CMD_SD21, PUBLIC
from cmdgen.evaluation.report import column, scale, table
from cmdgen.evaluation.settings import Profiling
from cmdgen.request import Request, resolve

# stages, or ways to make clips, as `to_json` explains them
Rows = Sequence[dict[str, Any]]
# what each mode measures, and the options that it reads
MODES = {
    "paper": ("--paper counts the paper's own model", ""),
    "decoding": ("--decoding decodes with the paper's own model", "size runs device dtype"),
    "memory": ("--memory counts one clip", "model size device dtype"),
    "suite": ("--suite measures ways to make one clip", "model size steps runs device dtype compile"),
}
PAPER_SIZE = 512, 1024
# characters of the longest bar
BAR = 25

# rows of the suite; the others are with step rehash
SUITE_LABELS = {"paper": "the paper's count", "clip": "prompt to file"}
# in the tables, the title and the unit or form of what a key of `to_json` holds
COLUMNS = {
    "parameters": ("parameters", ""),
    "weight_bytes": ("weights", "B"),
    "forwards": ("forwards", "{}"),
    "flops": ("", "FLOP"),
    "flops_per_second": ("", "FLOP/s"),
    "share_of_matmul": ("of matmul", "{:.1%}"),
    "bytes_read": ("read", "B"),
    "bytes_per_second": ("", "B/s"),
    "share_of_copy": ("of copy", "{:.1%}"),
}


def profile(
    context: typer.Context,
    options: Profiling,
    request: Annotated[Request, Only(("size", "model", "device", "dtype", "compile"))],
    say: JsonOrQuiet,
) -> None:
    """Measure the stages of sampling: time, memory, work.

    The report goes to stdout, progress to stderr. Each run loads the
    weights anew, except with --suite, which alone can --compile.

    Examples:
      cmdgen profile
      cmdgen profile --steps 10 --trace trace.json --json > profile.json
      cmdgen profile --paper
    """
    flags = list_flags(context)
    for name, (what, used) in MODES.items():
        if getattr(options, name):
            check_flags(context, what, f"{name} {used}")
    if options.paper:
        from cmdgen.evaluation.evdm import compare_with_evdm
        from cmdgen.evaluation.flops import compare_with_paper, count_pruned

        record: Any = compare_with_paper() | {"evdm": compare_with_evdm(), "vdmini": count_pruned()}
        lines = [*_paper_lines(record), "", *_evdm_lines(record["evdm"]), "", *_pruned_lines(record["vdmini"])]
    elif options.decoding:
        lines, record = _decode(request, options.runs if "runs" in flags else 1, say)
    elif options.memory:
        lines, record = _count_memory(request, say)
    elif request.compile and not options.suite:
        raise ValueError("--compile has a use with --suite alone")
    else:
        record = _measure(request, options, say)
        lines = (_suite_lines if options.suite else _stage_lines)(record)
    say.result("\n".join([*lines, "", "`cmdgen profile --help` explains the figures."]), record)


def _measure(request: Request, options: Profiling, say: Say) -> dict[str, Any]:
    """Measure clips: one row, whose weights are read for each run, or those of the suite."""
    from cmdgen.evaluation.profile import Way, plan_suite, profile, trace
    from cmdgen.pipelines.load import load_pipeline

    machine = {name: getattr(request, name) for name in ("device", "dtype", "compile")}
    load = partial(load_pipeline, request.model, **machine)
    pipeline = load()
    clip = replace(request, steps=options.steps, motion_steps=options.steps if pipeline.config.motion else None)
    if options.suite:
        ways = plan_suite(pipeline, clip)
    else:
        ways = {"clip": Way(pipeline.plan(clip, batch=options.batch), options.batch)}
    with on_the_way("ask for a smaller --size or --batch"), say.progress() as show:
        again = (lambda: pipeline) if options.suite else load
        profiled = profile(again, ways, runs=options.runs, show=show)
        if options.trace is not None:
            trace(load(), ways["clip"], options.trace)
    return to_json(profiled)


def _decode(request: Request, runs: int, say: Say) -> tuple[list[str], list[dict[str, Any]]]:
    from cmdgen.evaluation.decoding import compare_decoding
    from cmdgen.pipelines.device import choose_dtype, use_device

    model = resolve(Request(size=request.size or PAPER_SIZE), CMD_SD21).model
    device = use_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    with on_the_way("ask for a smaller --size"), say.progress() as show:
        ways = compare_decoding(model, device, dtype, runs=runs, show=show)
    title = f"{model.name}, {model.frames} frames of {model.width}x{model.height}"
    return [title, "", *table(_decoding_rows(ways))], list(ways.values())


def _count_memory(request: Request, say: Say) -> tuple[list[str], list[dict[str, Any]]]:
    from cmdgen.evaluation.memory import compare_memory
    from cmdgen.pipelines.device import choose_dtype, dtype_name, use_device
    from cmdgen.store.find import find_model
    from cmdgen.store.parts import read_model

    config = PUBLIC.get(request.model) or read_model(find_model(request.model))
    if not config.looks_along_time:
        raise ValueError(f"--memory counts clips of AnimateDiff and SVD, not of {config.name}: see --decoding")
    model = resolve(Request(size=request.size), config).model
    device = use_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    with say.progress() as show:
        rows = compare_memory(model, dtype, device, show)
    title = f"{model.name}, {model.frames} frames of {model.width}x{model.height} in {dtype_name(dtype)}, GB"
    cells = [
        [str(value) if name == "way" else "" if value is None else f"{value / 1e9:.3f}" for name, value in row.items()]
        for row in rows
    ]
    return [title, "", *table([[*rows[0]], *cells])], rows


def to_json(profiled: dict[str, Any]) -> dict[str, Any]:
    """Print one object with --json; these keys stay as they are. Of the run:
      model, frames, height, width, sampler, steps, guidance, batch, runs,
      device, dtype, torch
      compile                         whether the networks were compiled
      capture_seconds                 what the first clip of a process takes more
                                      on a GPU, which captures CUDA graphs; no
                                      other figure has it. With --suite: of rows
      motion_steps, motion_guidance   null for stills, and models without a
                                      motion model
      matmul_flops_per_second         measured before and after the runs: the
                                      fastest of a few products of square
                                      matrices in this dtype
      copy_bytes_per_second           the same of copies of more than caches
                                      hold, read + written
      stages                          an object for each stage that ran: load,
                                      text, content, motion, frame decode,
                                      VAE decode, video encode
      total                           the same object of a whole run, with the
                                      gaps between stages
    Of each stage and of total:
      parameters, weight_bytes        of the half of a network that runs; of
                                      load and total: of all networks
      forwards                        of its network; in total: of all of them
      flops                           two for each multiply-add
      bytes_read                      the weights, once for each forward, of the
                                      token table the rows of one prompt; of
                                      load once; of video encode the frames;
                                      activations are not counted
      seconds                         {median, fastest, slowest} of the runs
                                      after one to warm up
      flops_per_second, bytes_per_second   in the median run
      share_of_matmul, share_of_copy       of the measured limits, 1 is all;
                                      weights that stay in a cache can pass it
      memory_bytes                    highest: {resident}, the process's, on a
                                      CPU, {} where that cannot be told,
                                      {allocated, reserved}, PyTorch's, on a GPU

    With --suite, in one process with the weights loaded, instead of stages and
    total:
      rows                            an object for each way to make a clip:
                                      paper (no guidance, no VAE, no file), clip
                                      (the model's guidance, VAE, mp4 on disk; of
                                      a smooth clip, as random weights make noise,
                                      for which encoders take far longer),
                                      rehash_half, rehash_quarter (the same, full
                                      steps chosen uniformly)
      unet_step                       of clip: {seconds, flops_per_second,
                                      share_of_matmul} of a step of the UNet
    Each of the rows has stages, the keys of total, and:
      full_steps, full_motion_steps   that skip nothing
      guidance, motion_guidance       1 is off
      seconds                         of paper: of its stages, no others; else
                                      from the prompt to the file on disk
      content_step_seconds            the content stage by all of its steps, full
                                      or skipped, with the sampler between them
      flops                           of what runs, skipped steps too
      memory_bytes                    with what earlier rows keep, such as
                                      captured graphs

    With --decoding, a list of ways to decode: whole (the clip through the
    autoencoder at once, single frames through the VAE), default (the slices of
    a run without --max-memory), least (the slices of 40 % of whole's memory).
    A slice has so many frames or positions in the autoencoder, and pictures in
    the VAE, cut in strips. Memory is that of tensors beside the weights: live,
    counted on the shapes of the same run, or PyTorch's on a GPU, reserved with
    the weights. Seconds are the least of the runs; of the VAE, those of its
    first slice times their number.

    With --memory, a list of ways to make a clip, in bytes: all at once, and frames
    through the VAE one by one, as libraries do (of SVD's decoder that is another
    video); then ours, whole and in slices of so many bytes, with the branches of
    guidance in turn. unet and vae are tensors beside weights, peak has all weights,
    staged those of a stage alone; counted on shapes. On a GPU allocated, reserved
    and driver, all memory in use, were measured.

    With --paper, ours are counted as the paper's: multiply-adds, without
    attention's products of queries with keys and of weights with values;
    Table 9 without guidance, text encoder and VAE, the autoencoder there and
    back. Operations are two for each multiply-add, attention's too; in Table 9
    of all that sampling runs. EVDM's tables are of a batch of 64, of UCF 32;
    softmax, gate and linear are what attention is counted as, and the nearest
    is what the paper must have counted. VDMini's UNets are counted with their
    motion modules, one forward of a frame or a clip.
    """
    rows = profiled["rows"]
    clip = rows["clip"]
    content = clip["stages"]["content"]
    if len(rows) > 1:
        step = {name: content[name] for name in ("flops_per_second", "share_of_matmul")}
        return profiled | {"unet_step": {"seconds": clip["content_step_seconds"], **step}}
    settings = {name: value for name, value in profiled.items() if name != "rows"}
    settings["capture_seconds"] = clip["capture_seconds"]
    return settings | {"stages": clip["stages"], "total": {name: clip[name] for name in content}}


# the help ends with it
EPILOG = inspect.cleandoc(to_json.__doc__ or "")


def _title(record: dict[str, Any]) -> list[str]:
    clip = "{frames} frames of {width}x{height}, {sampler} {steps} + {motion_steps} steps"
    if record["motion_steps"] is None:
        clip = "{frames} frames of {width}x{height}, {sampler} {steps} steps"
    if record["frames"] == 1:
        clip = "a still of {width}x{height}, {sampler} {steps} steps"
    machine = "{dtype} on {device}, torch {torch}" + ", compiled" * record["compile"]
    return [f"{{model}}, {clip}".format(**record), machine.format(**record)]


def _seconds(rows: Rows, digits: int) -> list[list[str]]:
    seconds = [row["seconds"] for row in rows]
    form = f"{{fastest:.{digits}f}}-{{slowest:.{digits}f}}"
    return [
        ["seconds", *(f"{each['median']:.{digits}f}" for each in seconds)],
        ["fastest-slowest", *(form.format(**each) for each in seconds)],
    ]


def _column(rows: Rows, key: str) -> list[str]:
    (title, form), values = COLUMNS[key], [row[key] for row in rows]
    if "{" in form:
        return [title, *(form.format(value) if value else "" for value in values)]
    return column(title, form, values)


def _memory(rows: Rows) -> list[list[str]]:
    kinds = rows[-1]["memory_bytes"]
    return [column(kind, "B", [row["memory_bytes"][kind] for row in rows]) for kind in kinds]


def _stage_lines(record: dict[str, Any]) -> list[str]:
    """Return what each stage took, with a bar for its time, and its work beside the limits."""
    stages, total = record["stages"], record["total"]
    rows, names = [*stages.values(), total], ["stage", *stages, "total"]
    title, machine = _title(record)
    matmul, copy = record["matmul_flops_per_second"], record["copy_bytes_per_second"]
    (per_matmul, flops), (per_copy, byte) = scale(matmul), scale(copy)
    seconds = [row["seconds"]["median"] for row in rows]
    longest = max(seconds[:-1])
    cost = [
        *(names, *_seconds(rows, 4)),
        ["share", *(f"{each / seconds[-1]:.1%}" for each in seconds)],
        *_memory(rows),
        ["time", *("█" * round(BAR * each / longest) for each in seconds[:-1]), ""],
    ]
    work = [names, *(_column(rows, key) for key in COLUMNS)]
    return [
        *(f"{title}, batch {record['batch']}", machine),
        f"measured limits: matmul {matmul / per_matmul:.1f} {flops}FLOP/s, copy {copy / per_copy:.1f} {byte}B/s",
        *("", *table(zip(*cost, strict=True)), "", *table(zip(*work, strict=True))),
    ]


def _suite_lines(record: dict[str, Any]) -> list[str]:
    """Return a row for each way to make a clip."""
    rows, step = [*record["rows"].values()], record["unet_step"]
    factor, prefix = scale(step["flops_per_second"])
    labels = (SUITE_LABELS.get(name, "rehash {full_steps}") for name in record["rows"])
    columns = [
        ["clip", *(each.format(**row) for each, row in zip(labels, rows, strict=True))],
        ["full", *("{full_steps} + {full_motion_steps}".format(**row) for row in rows)],
        *_seconds(rows, 3),
        ["ms/step", *(f"{1000 * row['content_step_seconds']:.2f}" for row in rows)],
        *(_column(rows, key) for key in ("flops_per_second", "share_of_matmul")),
        *_memory(rows),
    ]
    return [
        *_title(record),
        f"measured limit: matmul {record['matmul_flops_per_second'] / factor:.1f} {prefix}FLOP/s",
        *("", *table(zip(*columns, strict=True)), ""),
        f"UNet step, guidance {record['guidance']:g}, of prompt to file: "
        f"{1000 * step['seconds']:.2f} ms, {step['flops_per_second'] / factor:.1f} {prefix}FLOP/s, "
        f"{step['share_of_matmul']:.1%} of matmul",
    ]


def _decoding_rows(ways: dict[str, dict[str, Any]]) -> Iterator[Sequence[str]]:
    whole = ways["whole"]
    (kind, *_) = whole["memory"]
    cut = "frames", "positions", "pictures", "strips"
    yield (
        *("way", *cut, "predicted MB"),
        *(f"{name} MB" for name in whole["memory"]),
        *("of whole", "clip s", "VAE s", "total s", "of whole"),
    )
    for name, way in ways.items():
        slices = way["slices"] or {"pictures": 1}
        yield (
            *(name, *(str(slices.get(each, "")) for each in cut)),
            "" if way["predicted"] is None else f"{way['predicted'] / 1e6:.0f}",
            *(f"{value / 1e6:.0f}" for value in way["memory"].values()),
            f"{way['memory'][kind] / whole['memory'][kind]:.1%}",
            *(f"{way[each]:.2f}" for each in ("clip_seconds", "vae_seconds", "seconds")),
            f"{way['seconds'] / whole['seconds']:.1%}",
        )


def _paper_lines(tables: dict[str, Any]) -> list[str]:
    lines = [f"CMD's efficiency tables, counted with {tables['model']}; all figures are 10^12."]
    for name, title in (
        ("table_8", "Table 8: one forward at 512x512"),
        ("table_9", "Table 9: sampling 16 frames at 512x1024"),
    ):
        rows = [("", "paper", "ours, so counted", "apart", "operations")]
        for entry in tables[name]:
            paper, ours, honest = (entry[key] for key in ("published", "ours", "honest"))
            counts = f"{ours:.{2 if ours > 10 else 3}f}", f"{ours / paper - 1:+.2%}"
            operations = f"{honest:.{1 if honest > 10 else 2}f}"
            rows.append((entry["label"], f"{paper:g}", *counts, operations))
        lines += ["", title, "", *table(rows)]
    total = sum(tables["stages"].values())
    stages = [(stage, f"{x:.2f}", f"{x / total:.1%}") for stage, x in tables["stages"].items()]
    heading = "Where the operations of 50 steps are"
    return [*lines, "", heading, "", *table([("", "operations", "share"), *stages])]


def _evdm_lines(tables: dict[str, Any]) -> list[str]:
    from cmdgen.evaluation.evdm import ACCOUNTINGS

    rows: list[tuple[str, ...]] = [("", "level", *("10^6 parameters", "blocks", "attention") * 2)]
    for entry in tables["table_1"]:
        cells = (f"{value:g}" for value in entry["published"])
        rows.append((entry["model"], str(entry["level"]), *cells, *(f"{value:.2f}" for value in entry["ours"])))
    lines = ["EVDM's Table 1: the paper's figures, then ours, operations in 10^9", "", *table(rows)]
    rows = [("", "10^6 parameters", "ours", "10^9 operations", *ACCOUNTINGS, "nearest", "apart")]
    for entry in tables["table_2"]:
        parameters, published = entry["published"]
        counts = (f"{entry[each]:.2f}" for each in ACCOUNTINGS)
        apart = entry[entry["nearest"]] / published - 1
        ours = f"{entry['parameters'] / 10**6:.2f}"
        rows.append((entry["model"], f"{parameters}", ours, f"{published}", *counts, entry["nearest"], f"{apart:+.3%}"))
    return [*lines, "", "EVDM's Table 2, with three accountings of attention", "", *table(rows)]


def _pruned_lines(entries: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [("", "frames", "latents", "parameters", "left", "10^9 operations", "left")]
    for entry in entries:
        whole = next(each for each in entries if each["model"] == entry["model"].removesuffix("-vdmini"))
        cells = ((f"{entry[key]:,.{digits}f}", entry[key] / whole[key]) for key, digits in _PRUNED_COLUMNS.items())
        sizes = str(entry["frames"]), "x".join(map(str, entry["latents"]))
        rows.append((entry["model"], *sizes, *(text for cell, left in cells for text in (cell, f"{left:.1%}"))))
    return ["UNets as VDMini's rule prunes them", "", *table(rows)]


# digits after the point
_PRUNED_COLUMNS = {"parameters": 0, "giga_operations": 1}
