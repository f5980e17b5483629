"""`cmdgen predict` and `cmdgen interpolate`: clips made longer, filled in, and made from nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen.cli.command import Only, list_flags
from cmdgen.cli.errors import on_the_way
from cmdgen.cli.inputs import list_changes, spool
from cmdgen.cli.jobs import Batching, Entry, Refused, check_seeds, make_jobs
from cmdgen.cli.like import compare, read_recorded, recall
from cmdgen.cli.naming import check_stdout
from cmdgen.cli.progress import Say
from cmdgen.config import EvdmConfig, ModelConfig
from cmdgen.options import option, options_of
from cmdgen.request import HOW, MACHINE, MAX_FPS, MAX_FRAMES, WHAT, Plan, Request
from cmdgen.video.formats import describe_origin

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cmdgen.pipelines.base import Pipeline
    from cmdgen.pipelines.clip import Inputs
    from cmdgen.video.read import Source

# bytes of the frames of a file, as the model sees them
MOST_BYTES = 2**30
_FIELDS = (
    *("output", "seed", "frames", "size", "fps", "steps", "sampler"),
    *("format", "crf", "codec", "loop", "sidecar", "no_metadata", "model", "device", "dtype", "compile"),
)
_JOBS = ("num", "batch", "overwrite", "skip_existing", "like")


@dataclass(frozen=True)
class Prediction(Request):
    """A request for new frames of a clip."""

    frames: int | None = option(
        None,
        "New frames; of interpolate: between each two.",
        group=WHAT,
        low=1,
        high=MAX_FRAMES,
        shown="the model's own",
    )
    fps: int | None = option(
        None, "Frames per second.", group=WHAT, low=1, shown="as fast as the first video, or the model's own"
    )
    steps: int | None = option(None, "Sampling steps.", group=HOW, low=1, shown="the model's own")
    model: str = option(
        "evdm",
        "evdm knows two moving digits, evdm-world clips of mini; or a folder that `cmdgen train evdm` made.",
        group=MACHINE,
        complete="model",
    )


Asked = Annotated[Prediction, Only(_FIELDS)]
Several = Annotated[Batching, Only(_JOBS)]
Past = Annotated[Path | None, typer.Argument(metavar="CLIP", help="Video or picture to continue; - is stdin.")]
Parts = Annotated[list[Path], typer.Argument(metavar="FILE", help="Pictures and videos, in order; - is stdin.")]
OnlyNew = Annotated[bool, typer.Option("--only-new", help="Leave out the frames of CLIP.")]


def predict(
    context: typer.Context, request: Asked, jobs: Several, say: Say, clip: Past = None, only_new: OnlyNew = False
) -> None:
    """Continue a clip or a picture by more frames.

    The file holds the clip and then the new frames. The model reads the clip's last few frames, makes
    the next few, and reads those in turn. Without CLIP it makes a clip from nothing.

    Examples:
        cmdgen predict clip.mp4 -o longer.mp4 --frames 20
        cmdgen predict -o free.gif
        cmdgen sample "a corgi swimming" -o - | cmdgen predict - --model evdm-world -o longer.mp4
    """
    _make(context, Given([] if clip is None else [clip], keep=not only_new), request, jobs, say)


def interpolate(context: typer.Context, parts: Parts, request: Asked, jobs: Several, say: Say) -> None:
    """Put frames between those of pictures and clips.

    All frames of all files are kept, and --frames new ones are put between each and the next. They
    are evenly spaced in time. Two pictures must show what a few frames can connect.

    Examples:
        cmdgen interpolate a.png b.png -o between.mp4 --frames 5
        cmdgen interpolate clip.mp4 -o smooth.mp4 --frames 1 --model DIR
    """
    _make(context, Given(parts, apart=True), request, jobs, say)


def _make(context: typer.Context, given: "Given", request: Request, jobs: Batching, say: Say) -> None:
    check_stdout(request.output, say)
    if jobs.like is not None:
        recorded, flags = read_recorded(jobs.like), set(list_flags(context)) & options_of(Request).keys()
        request = recall(jobs.like, recorded, request, flags)
        given.check_like(recorded, jobs.like, say)
    queue = list(make_jobs([Entry(1, {})], request, num=jobs.num, reads_text=False))
    alone = len(queue) == 1
    check_seeds(request, jobs, alone=alone)
    if isinstance(queue[0], Refused):
        raise queue[0].error
    from cmdgen.cli.batch import Batch
    from cmdgen.pipelines.load import load_predictor

    pipeline = load_predictor(request.model, device=request.device, dtype=request.dtype, compile=request.compile)
    batch = Batch(pipeline, jobs, say, given, alone=alone, total=len(queue))
    checked = batch.check(queue)
    if jobs.like is not None:
        for line in compare(jobs.like, recorded, pipeline, chosen="model" in flags):
            say.note(line)
    batch.run(checked)


class Given:
    """Files whose frames are a part of the clip: one part each, or, `apart`, one for each frame."""

    def __init__(self, paths: Sequence[Path], *, apart: bool = False, keep: bool = True) -> None:
        self.paths, self.apart, self.keep = paths, apart, keep
        # a pipe is read once, however often it is named
        copies = {path: spool(path) for path in dict.fromkeys(paths)}
        self.files = [copies[path] for path in paths]
        self.origin = [describe_origin(file) for file in self.files]
        # at the size of all jobs of the command
        self.read_files: list[tuple[np.ndarray, Source]] = []
        self.inputs: Inputs | None = None

    def check_like(self, recorded: Mapping[str, Any], like: Path, say: Say) -> None:
        """Compare with the metadata of the clip to make again; note files of other contents.

        Raises ValueError where that clip had files, and there are none now.
        """
        before = recorded.get("given")
        parts = [part for part in before if isinstance(part, dict)] if isinstance(before, list) else []
        names = ", ".join(short(part.get("file")) for part in parts[:8])
        if parts and not self.origin:
            raise ValueError(f"{like} was made with {names}: give that, too")
        if [part.get("sha256") for part in parts] != [part["sha256"] for part in self.origin]:
            say.note(f"note: {like} was made {f'with files of other contents, {names}' if parts else 'without a file'}")
        self.keep &= recorded.get("only_new") is not True

    def fit(self, request: Request, model: ModelConfig) -> Request:
        """Read the files at the request's size; return the request with what it leaves to them."""
        from cmdgen.video.read import read_frames

        if not self.read_files:
            height, width = request.size or model.size
            with on_the_way("give shorter videos"):
                most = MOST_BYTES // (3 * height * width)
                self.read_files = [read_frames(file, size=(height, width), most=most) for file in self.files]
        if self.apart:
            from cmdgen.pipelines.evdm import fit_gap

            request = fit_gap(request, model)
            if sum(len(frames) for frames, _ in self.read_files) < 2:
                raise ValueError("there is one frame: frames are put between two or more")
        rates = [source.fps for _, source in self.read_files if source.fps]
        if request.fps is None and rates:
            # what moves is as fast as before, with other frames between those of the files
            rate = max(1, round(rates[0] * (1 + (request.frames or 0) if self.apart else 1)))
            if rate > MAX_FPS:
                raise ValueError(
                    f"as fast as the first video is {rate} frames a second, not up to {MAX_FPS}: choose --fps"
                )
            request = replace(request, fps=rate)
        return request

    def count(self, plan: Plan) -> int:
        """Return the length of the clip, with the frames of the files that it keeps."""
        from cmdgen.pipelines.evdm import count_frames

        lengths = [len(frames) for frames, _ in self.read_files]
        return count_frames([1] * sum(lengths) if self.apart else lengths, plan.model.frames, keep=self.keep)

    def read(self, pipeline: "Pipeline", plan: Plan, say: Say) -> "Inputs":
        """Return the frames as the model sees them; what is done to them is noted, once for all jobs."""
        self.inputs = self.inputs or self._read(pipeline, plan, say)
        return self.inputs

    def _read(self, pipeline: "Pipeline", plan: Plan, say: Say) -> "Inputs":
        from cmdgen.pipelines.clip import Inputs
        from cmdgen.pipelines.evdm import EvdmPipeline

        assert isinstance(pipeline, EvdmPipeline) and isinstance(plan.model.content, EvdmConfig)
        size, grey = plan.model.size, plan.model.content.channels == 1
        parts: list[Tensor] = []
        for path, (frames, source) in zip(self.paths, self.read_files, strict=True):
            changes = ["turned grey"] if grey and (frames != frames[..., :1]).any() else []
            changes += list_changes(source, size)
            if not self.apart and len(frames) < plan.model.content.past:
                changes.append(f"{len(frames)} of the {plan.model.content.past} frames that the model reads")
            say.note(f"{path}, {source}: {', '.join(changes) or 'unchanged'}")
            pixels = pipeline.read(frames)
            parts += pixels.split(1, dim=1) if self.apart else [pixels]
        facts = {"given": self.origin, "only_new": not self.keep}
        origin = {name: value for name, value in facts.items() if value}
        return Inputs(given=tuple(parts), keep=self.keep, origin=origin)
