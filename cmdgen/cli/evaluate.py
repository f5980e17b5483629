"""`cmdgen eval`: how good a model is and what it costs, as a table or as JSON."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import typer

from cmdgen.cli.command import Device, check_flags
from cmdgen.cli.progress import JsonOrQuiet
from cmdgen.evaluation.settings import Evaluation

if TYPE_CHECKING:
    import torch

    from cmdgen.evaluation.report import Report

# where a model is measured
DATA = "mini"
# what each mode does, and the options that it reads
MODES = {
    "cost": ("--cost measures a cold sample", "model"),
    "train_probe": ("--train-probe trains a probe", "data device"),
    "real": ("--real and --generated compare folders", "generated pairs frames size probe"),
}
PREDICTOR = "model clips batch seed data trajectories steps device"
OTHERS = "model clips reconstructed batch seed data probe device"


def evaluate(context: typer.Context, options: Evaluation, request: Device, say: JsonOrQuiet) -> None:
    """Measure a model on what training never showed.

    These are held-out combinations of subject, motion and scene of the rendered world. A model with
    an evdm/ predicts and fills in test clips of --data. With --real and --generated, two folders of
    videos are compared. The report goes to stdout, progress to stderr.

    Examples:
      cmdgen eval mini
      cmdgen eval DIR --clips 100 --json > report.json
      cmdgen eval mini --cost
      cmdgen eval evdm --data digits:MNIST --clips 100
      cmdgen eval --real clips --generated made --pairs
    """
    for name, (what, used) in MODES.items():
        if getattr(options, name):
            check_flags(context, what, f"{name} {used}")
    if options.cost:
        from cmdgen.evaluation.cost import report_cost

        report = report_cost(options.model)
        say.result(report.to_markdown(), report.to_dict())
        return
    from cmdgen.pipelines.device import use_device

    device = use_device(request.device)
    with say.progress() as show:
        if options.train_probe is not None:
            _train_probe(options, device, partial(show, "train"))
            say.result(options.train_probe, {"output": str(options.train_probe)})
        elif options.real is not None:
            from cmdgen.evaluation.compare import compare_folders

            lines, record = compare_folders(options, show)
            say.result("\n".join(lines), record)
        else:
            report = _measure(context, options, str(device), show)
            say.result(report.to_markdown(), report.to_dict())


def _measure(
    context: typer.Context, options: Evaluation, device: str, show: Callable[[str, int, int], None]
) -> "Report":
    from cmdgen.evaluation.measure import load_evaluator
    from cmdgen.evaluation.prediction import evaluate_prediction
    from cmdgen.pipelines.evdm import EvdmPipeline
    from cmdgen.pipelines.load import open_pipeline
    from cmdgen.training.data import open_source

    pipeline = open_pipeline(options.model, device=device)
    name = pipeline.config.name
    if isinstance(pipeline, EvdmPipeline):
        check_flags(context, f"{name} predicts frames", PREDICTOR)
        if not options.clips:
            raise ValueError(f"clips 0: {name} predicts frames, of at least 2 clips")
        return evaluate_prediction(pipeline, open_source(options.data or DATA), options, show)
    check_flags(context, f"{name} makes clips from text", OTHERS)
    return load_evaluator(options.model, device, options.probe, options.data or DATA, show=show).evaluate(options)


def _train_probe(options: Evaluation, device: "torch.device", show: Callable[[int, int], None]) -> None:
    from cmdgen.evaluation.probe import train_probe
    from cmdgen.world.world import open_world

    assert options.train_probe is not None
    probe = train_probe(open_world(options.data or DATA), device=device, on_step=show)
    probe.save_pretrained(options.train_probe)
