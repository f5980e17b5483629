"""`cmdgen eval`: what a model is worth and what it costs, as a table or as JSON."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.models import find_model
from cmdgen.cli.progress import show_progress
from cmdgen.config import MINI_WORLD
from cmdgen.evaluation.report import Report


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A packaged model's name or a folder in diffusers' layout.")
    ] = "mini",
    clips: Annotated[
        int, typer.Option(help="Clips to generate; 0 measures reconstruction alone.")
    ] = 500,
    reconstructed: Annotated[int, typer.Option(help="Clips to encode and decode.")] = 256,
    batch: Annotated[int, typer.Option(help="Clips at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the first clip; the next ones count up.")] = 0,
    probe: Annotated[
        Path | None, typer.Option(help="Folder of the probe.  [default: the packaged one]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    cost: Annotated[
        bool, typer.Option("--cost", help="Measure seconds and memory of a cold `sample` instead.")
    ] = False,
    train_probe: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Train a probe into this folder instead; minutes."),
    ] = None,
) -> None:
    """Measure a model on the held-out combinations of the rendered world.

    The report goes to stdout, progress to stderr.
    """
    if cost:
        from cmdgen.evaluation.cost import report_cost

        _print(report_cost(model), as_json)
    elif train_probe is not None:
        _train_probe(train_probe, device)
    else:
        _print(_evaluate(model, probe, clips, reconstructed, batch, seed, device), as_json)


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
) -> Report:
    from cmdgen.data.world import World
    from cmdgen.evaluation.measure import EvaluationConfig, evaluate
    from cmdgen.evaluation.probe import PACKAGED, Probe
    from cmdgen.pipeline import TextToVideo

    config = EvaluationConfig(clips, reconstructed, batch, seed)
    model = TextToVideo.load(find_model(name), device=device)
    folder = folder or PACKAGED
    if not folder.is_dir():
        raise ValueError(f"no probe in {folder}: make one by `cmdgen eval --train-probe FOLDER`")
    probe = Probe.from_pretrained(folder).to(model.device)
    with show_progress() as show:
        return evaluate(model, World(MINI_WORLD), probe, config, on_progress=show)


def _train_probe(folder: Path, device: str) -> None:
    from functools import partial

    from cmdgen.data.world import World
    from cmdgen.evaluation.probe import train_probe
    from cmdgen.pipeline import choose_device

    with show_progress() as show:
        probe = train_probe(
            World(MINI_WORLD), device=choose_device(device), on_step=partial(show, "train")
        )
    probe.save_pretrained(folder)
    typer.echo(folder)
