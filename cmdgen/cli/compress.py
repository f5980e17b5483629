"""`cmdgen compress`: which blocks of a model matter, the model without the others, and both compared."""

from dataclasses import asdict

import typer

from cmdgen.cli.command import Device, check_flags, expand
from cmdgen.cli.errors import on_the_way
from cmdgen.cli.help import Command, Group
from cmdgen.cli.progress import JsonOrQuiet
from cmdgen.config import IMPORTANCE, UNetConfig
from cmdgen.evaluation.settings import Contest, Pruning, Weighing, check_writable

app = typer.Typer(cls=Group, no_args_is_help=True, help="Make a model smaller: measure its blocks, drop some, compare.")


@app.command(cls=Command)
@expand
def importance(options: Weighing, request: Device, say: JsonOrQuiet) -> None:
    """Measure what each block of a model is worth.

    Makes the same clips of held-out captions without one block at a time: how far they move from the
    whole model's, what the probe still names, and the time that is saved. Blocks that can be dropped are
    dropped; other layers become their shortcuts. A stop loses one block: the same command goes on. The
    table goes to stdout.

    Examples:
      cmdgen compress importance mini -o importance.json --plot map.png
      cmdgen compress importance DIR --part motion --clips 64
    """
    from cmdgen.compression.chart import draw_importance
    from cmdgen.evaluation.compression import list_importance, measure_importance
    from cmdgen.evaluation.measure import load_evaluator

    with say.progress() as show:
        evaluator = load_evaluator(options.model, request.device, options.probe, options.data, show=show)
        path = options.output or evaluator.pipeline.folder / IMPORTANCE
        check_writable(path)
        with on_the_way("ask for a smaller --batch"):
            measured = measure_importance(evaluator, options, path)
    if options.plot is not None:
        draw_importance(options.plot, measured)
    say.result("\n".join(list_importance(measured)), asdict(measured))


@app.command(cls=Command)
@expand
def prune(context: typer.Context, options: Pruning, say: JsonOrQuiet) -> None:
    """Write a model without some of its blocks; it samples at once, and `cmdgen train --teacher` mends it.

    VDMini's rule is for UNets: the mid block, the innermost level, and all but one layer of each other
    level except the next one go. The measured rule needs a file of `cmdgen compress importance`. The
    folder's path goes to stdout.

    Examples:
      cmdgen compress prune mini -o small --rule measured --budget 0.7
      cmdgen compress prune mini -o small --drop unet.mid --drop motion.blocks.4
    """
    if options.rule != "measured":
        check_flags(context, "without --rule measured nothing is chosen", "folder model rule drop")

    from cmdgen.compression.importance import choose_units, read_importance
    from cmdgen.compression.prune import prune_folder
    from cmdgen.compression.units import list_rule
    from cmdgen.store.catalogue import describe_folder
    from cmdgen.store.find import find_model
    from cmdgen.store.parts import hash_weights, read_model

    folder = find_model(options.model)
    model, dropped = read_model(folder), [*options.drop]
    if not isinstance(model.content, UNetConfig):
        raise ValueError(f"{model.name} has no UNet to prune")
    if options.rule == "vdmini":
        dropped += [f"unet.{unit}" for unit in list_rule(model.content)]
    elif options.rule == "measured":
        path = options.importance or folder / IMPORTANCE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: measure by cmdgen compress importance {options.model}")
        importance = read_importance(path)
        if importance.weights != hash_weights(folder):
            raise ValueError(f"{path} was measured of other weights than {folder} has: measure again")
        dropped += choose_units(importance, model, options.budget)
    elif not dropped:
        raise ValueError("nothing to drop: give --rule, or --drop with the name of a block")
    dropped = [*dict.fromkeys(dropped)]
    prune_folder(folder, options.folder, dropped)
    before, after = (describe_folder(each, each.name).parameters for each in (folder, options.folder))
    say.note(f"dropped {', '.join(dropped)}")
    say.note(f"{after:,} of {before:,} parameters are left")
    record = {"output": str(options.folder), "dropped": dropped, "parameters": after, "before": before}
    say.result(options.folder, record)


@app.command(cls=Command)
@expand
def compare(options: Contest, request: Device, say: JsonOrQuiet) -> None:
    """Compare smaller models with the whole one, on the same captions and seeds.

    Measures parameters and time of each part, how close the clips are to the whole model's, what the
    probe names, and the Frechet distance of its features to those of real clips. The whole model also
    decodes as VDMini prunes decoders, and with each --decoder. The table goes to stdout.

    Examples:
      cmdgen compress compare mini small --clips 128
      cmdgen compress compare mini small --decoder TINY
    """
    from cmdgen.evaluation.compression import compare_models, list_comparison

    with say.progress() as show, on_the_way("ask for a smaller --batch"):
        comparison = compare_models(options, request.device, show)
    say.result("\n".join(list_comparison(comparison)), comparison)
