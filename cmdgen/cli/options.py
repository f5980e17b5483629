"""Options that several commands share, and the groups that `--help` shows options in."""

from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.completion import complete_model, one_of
from cmdgen.config import CUTS, SAMPLERS
from cmdgen.training.config import PRECISIONS

# groups of options; those of one command alone are named there
REPORTING = "Reporting"
MACHINE = "Model and machine"

# in the help of what a model has its own of
OWN = "  [default: the model's own]"

Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Say nothing on stderr but errors.", rich_help_panel=REPORTING
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say more on stderr.", rich_help_panel=REPORTING),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="JSON on stdout instead of text.", rich_help_panel=REPORTING),
]
MODEL_HELP = "A packaged model's name, a folder, or OWNER/NAME that was pulled."
Model = Annotated[
    str,
    typer.Option(help=MODEL_HELP, autocompletion=complete_model, rich_help_panel=MACHINE),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)
]
Probe = Annotated[
    Path | None,
    typer.Option(help="Folder of the probe.  [default: the packaged one]"),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        help=f"One of {', '.join(SAMPLERS)}.{OWN}",
        autocompletion=one_of(SAMPLERS),
    ),
]
Cut = Annotated[
    str,
    typer.Option(
        help=f"Where the UNet is cut, one of {', '.join(CUTS)}; earliest first.",
        autocompletion=one_of(CUTS),
    ),
]
Protect = Annotated[
    float, typer.Option(help="Share of the content frame's steps, the first, that always run.")
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda or cuda:N.",
        autocompletion=one_of(("auto", "cpu", "cuda")),
        rich_help_panel=MACHINE,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (float32 on a CPU), float32, float16 or bfloat16.",
        autocompletion=one_of(("auto", "float32", "float16", "bfloat16")),
        rich_help_panel=MACHINE,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="auto, bf16 or fp32; auto is bf16 on a GPU.",
        autocompletion=one_of(PRECISIONS),
        rich_help_panel=MACHINE,
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", min=1, rich_help_panel=MACHINE)]
