"""`cmdgen profile`: where the time of making clips goes, and what the paper's model computes."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen.cli.command import Only
from cmdgen.cli.errors import on_the_way
from cmdgen.cli.progress import Say, Show
from cmdgen.config import CMD_SD21
from cmdgen.evaluation.report import table
from cmdgen.evaluation.settings import Profiling
from cmdgen.files import check_writable
from cmdgen.request import Request, resolve

if TYPE_CHECKING:
    from cmdgen.evaluation.decoding import Decoding
    from cmdgen.evaluation.flops import PaperTables
    from cmdgen.evaluation.profile import Limits, Measured, Profile

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
