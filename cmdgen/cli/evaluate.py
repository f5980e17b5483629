"""`cmdgen eval`: what a model is worth and what it costs, as a table or as JSON."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.options import AsJson, Device, ModelArgument, Probe, Quiet
from cmdgen.cli.progress import Say
from cmdgen.evaluation.report import Report
from cmdgen.store.find import find_model
from cmdgen.world.config import MINI_WORLD

INSTEAD = "Instead of the evaluation"


def evaluate(
    model: ModelArgument = "mini",
    clips: Annotated[
        int, typer.Option(help="Clips to generate; 0 measures reconstruction alone.")
    ] = 500,
    reconstructed: Annotated[int, typer.Option(help="Clips to encode and decode.")] = 256,
    batch: Annotated[int, typer.Option(help="Clips at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the first clip; the next ones count up.")] = 0,
    probe: Probe = None,
    cost: Annotated[
        bool,
        typer.Option(
            "--cost",
            help="Measure seconds and memory of a cold `sample`.",
            rich_help_panel=INSTEAD,
        ),
    ] = False,
    train_probe: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Train a probe into this folder; minutes.",
            rich_help_panel=INSTEAD,
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on the held-out combinations of the rendered world.

    The report goes to stdout, progress to stderr.

    Examples:
        cmdgen eval mini
        cmdgen eval DIR --clips 100 --json > report.json
        cmdgen eval mini --cost
    """
    say = Say(quiet=quiet)
    if cost:
        from cmdgen.evaluation.cost import report_cost

        _print(report_cost(model), as_json)
    elif train_probe is not None:
        _train_probe(train_probe, device, say)
    else:
        _print(_evaluate(model, probe, clips, reconstructed, batch, seed, device, say), as_json)


def _print(report: Report, as_json: bool) -> None:
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.to_markdown())


def _evaluate(
    name: str,
    folder: Path | None,
    clips: int,
    reconstructed: int,
    batch: int,
    seed: int,
    device: str,
    say: Say,
) -> Report:
    from cmdgen.evaluation.measure import EvaluationConfig, evaluate
    from cmdgen.evaluation.probe import PACKAGED, Probe
    from cmdgen.pipeline import TextToVideo
    from cmdgen.world.world import World

    config = EvaluationConfig(clips, reconstructed, batch, seed)
    model = TextToVideo.load(find_model(name), device=device)
    folder = folder or PACKAGED
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no probe in {folder}: make one by `cmdgen eval --train-probe FOLDER`"
        )
    probe = Probe.from_pretrained(folder).to(model.device)
    with say.progress() as show:
        return evaluate(model, World(MINI_WORLD), probe, config, on_progress=show)


def _train_probe(folder: Path, device: str, say: Say) -> None:
    from functools import partial

    from cmdgen.evaluation.probe import train_probe
    from cmdgen.pipeline import choose_device
    from cmdgen.world.world import World

    with say.progress() as show:
        probe = train_probe(
            World(MINI_WORLD), device=choose_device(device), on_step=partial(show, "train")
        )
    probe.half().save_pretrained(folder)
    typer.echo(folder)
