"""`cmdgen profile`: where the time of sampling goes, and what the paper's model computes."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from cmdgen.cli.errors import Failure, describe
from cmdgen.cli.progress import show_progress
from cmdgen.cli.size import parse_size
from cmdgen.config import ProfileConfig, SampleConfig
from cmdgen.evaluation.report import table

if TYPE_CHECKING:
    from cmdgen.evaluation.flops import PaperTables
    from cmdgen.evaluation.profile import Profile, StageProfile

OWN = "  [default: the model's own]"
# characters of the longest bar
BAR = 30


def profile(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A packaged model's name or a folder in diffusers' layout.")
    ] = "mini",
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size of the video." + OWN)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of both models." + OWN)] = None,
    batch: Annotated[int, typer.Option(help="Clips at a time.")] = ProfileConfig.batch,
    runs: Annotated[
        int, typer.Option(help="Runs to measure, after one to warm up.")
    ] = ProfileConfig.runs,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on a CPU), float32, float16 or bfloat16.")
    ] = "auto",
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one more run as a trace for Chrome or Perfetto."),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Count the paper's Tables 8 and 9 instead; runs no model."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Measure each stage of sampling: time, arithmetic, memory.

    The report goes to stdout, progress to stderr.
    """
    if paper:
        for name in context.params:
            source = context.get_parameter_source(name)
            given = source is not None and source.name == "COMMANDLINE"
            if given and name not in ("paper", "as_json"):
                raise ValueError(f"--paper counts the paper's own model: --{name} has no use there")
        from cmdgen.evaluation.flops import compare_with_paper

        tables = compare_with_paper()
        typer.echo(
            json.dumps(asdict(tables), indent=2) if as_json else "\n".join(_paper_lines(tables))
        )
        return
    if trace is not None and (trace.is_dir() or not os.access(trace.absolute().parent, os.W_OK)):
        raise ValueError(f"{trace}: not the name of a file in a folder that can be written to")
    height, width = (None, None) if size is None else parse_size(size)
    asked = SampleConfig(steps=steps, motion_steps=steps, height=height, width=width)
    config = ProfileConfig(runs=runs, batch=batch)

    from cmdgen.evaluation.profile import profile_sampling
    from cmdgen.pipeline import TextToVideo

    def load() -> TextToVideo:
        return TextToVideo.load(model, device=device, dtype=dtype)

    # what is asked and impossible is said before anything runs
    asked.apply(load().config)
    try:
        with show_progress() as show:
            measured = profile_sampling(load, asked, config, trace=trace, on_progress=show)
    except ValueError as error:
        raise Failure(describe(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not re.search("allocate|overflow|out of memory", str(error)):
            raise
        raise Failure("not enough memory: ask for a smaller --size or --batch") from error
    typer.echo(json.dumps(measured.to_dict(), indent=2) if as_json else "\n".join(_lines(measured)))


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
    """Markdown, with a bar for each stage's time."""
    settings = measured.settings
    giant = measured.matmul_rate >= 1e12
    unit, prefix = (1e12, "T") if giant else (1e9, "G")
    longest = max(median(stage.seconds) for stage in measured.stages.values())
    rows: list[tuple[str, ...]] = [
        (
            *("stage", "parameters", "weights", f"{prefix}FLOP", "seconds", "fastest-slowest"),
            *(f"{prefix}FLOP/s", "of matmul", "peak memory", "time"),
        )
    ]
    for name, stage in (*measured.stages.items(), ("total", measured.total)):
        bar = "" if name == "total" else "█" * round(BAR * median(stage.seconds) / longest)
        rows.append((name, *_cells(stage, unit, measured.matmul_rate), bar))
    return [
        "{model}, {frames} frames of {width}x{height}, {sampler} {steps} + {motion_steps} steps, "
        "batch {batch}, {dtype} on {device}, torch {torch}".format(**settings),
        "",
        *table(rows),
        "",
        f"- Seconds are the median of {settings['runs']} after one run to warm up; the total has "
        "what is between stages too.",
        f"- Matmul: {measured.matmul_rate / unit:.1f} {prefix}FLOP/s, measured in this run.",
        "- Parameters are of the whole part: the autoencoder and the VAE run one half of theirs.",
    ]


def _cells(stage: "StageProfile", unit: float, matmul_rate: float) -> tuple[str, ...]:
    arithmetic = bool(stage.flops)
    return (
        f"{stage.parameters / 1e6:.2f} M" if stage.parameters else "",
        f"{stage.weight_bytes / 2**20:.1f} MiB" if stage.weight_bytes else "",
        f"{stage.flops / unit:.2f}" if arithmetic else "",
        f"{median(stage.seconds):.4f}",
        f"{min(stage.seconds):.4f}-{max(stage.seconds):.4f}",
        f"{stage.rate / unit:.1f}" if arithmetic else "",
        f"{stage.rate / matmul_rate:.1%}" if arithmetic else "",
        ", ".join(f"{bytes_ / 2**20:.0f} MiB {name}" for name, bytes_ in stage.memory.items()),
    )
