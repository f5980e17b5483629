"""`cmdgen eval`: how good a model is and what it costs, as a table or as JSON."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cmdgen.cli.command import Device
from cmdgen.cli.progress import JsonOrQuiet
from cmdgen.evaluation.settings import Evaluation
from cmdgen.world.config import MINI_WORLD

if TYPE_CHECKING:
    import torch


def evaluate(options: Evaluation, request: Device, say: JsonOrQuiet) -> None:
    """Measure a model on what training never showed.

    These are held-out combinations of subject, motion and scene of the rendered world. The report
    goes to stdout, progress to stderr.

    Examples:
      cmdgen eval mini
      cmdgen eval DIR --clips 100 --json > report.json
      cmdgen eval mini --cost
    """
    if options.cost:
        from cmdgen.evaluation.cost import report_cost

        report = report_cost(options.model)
    else:
        from cmdgen.evaluation.measure import load_evaluator
        from cmdgen.pipelines.device import use_device

        device = use_device(request.device)
        with say.progress() as show:
            if options.train_probe is not None:
                _train_probe(options.train_probe, device, partial(show, "train"))
                say.result(options.train_probe, {"output": str(options.train_probe)})
                return
            report = load_evaluator(options.model, str(device), options.probe, show=show).evaluate(options)
    say.result(report.to_markdown(), report.to_dict())


def _train_probe(folder: Path, device: "torch.device", show: Callable[[int, int], None]) -> None:
    from cmdgen.evaluation.probe import train_probe
    from cmdgen.world.world import World

    train_probe(World(MINI_WORLD), device=device, on_step=show).save_pretrained(folder)
