"""`cmdgen eval`: how good a model is and what it costs, as a table or as JSON."""

from functools import partial

from cmdgen.cli.command import Device
from cmdgen.cli.progress import JsonOrQuiet
from cmdgen.evaluation.settings import Evaluation
from cmdgen.world.config import MINI_WORLD


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
    elif options.train_probe is not None:
        from cmdgen.evaluation.probe import train_probe
        from cmdgen.pipelines.device import choose_device
        from cmdgen.world.world import World

        with say.progress() as show:
            device = choose_device(request.device)
            probe = train_probe(World(MINI_WORLD), device=device, on_step=partial(show, "train"))
        probe.save_pretrained(options.train_probe)
        say.result(options.train_probe, {"output": str(options.train_probe)})
        return
    else:
        from cmdgen.evaluation.measure import load_evaluator

        with say.progress() as show:
            report = load_evaluator(options.model, request.device, options.probe, show=show).evaluate(options)
    say.result(report.to_markdown(), report.to_dict())
