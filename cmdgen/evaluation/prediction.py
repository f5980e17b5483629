"""Predicted frames beside real ones, as MCVD measures them, and beside what needs no model.

Of each clip several are sampled, and the best one counts: which of several futures a clip takes is
not to be known (Denton & Fergus 2018, arXiv:1802.07687; Voleti et al. 2022, arXiv:2205.09853).
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.data.clips import ClipSource
from cmdgen.data.digits import Digits
from cmdgen.evaluation.metrics import structural_similarity
from cmdgen.evaluation.profile import Show
from cmdgen.evaluation.report import Figure, Report
from cmdgen.evaluation.settings import Evaluation
from cmdgen.pipelines.clip import Task
from cmdgen.pipelines.evdm import EvdmPipeline
from cmdgen.request import Request

# decibels above the baseline, and per cent of a classifier's score on real frames
_ABOVE, _OF_REAL = {"psnr": 4.0, "psnr_first": 1.5}, 85.0
_NOTES = [
    "Prediction: {current} frames after {past}; interpolation: {current} between {past} and {future}. {clips} test "
    "clips, the best of {trajectories} samples of each, PSNR and SSIM each on its own; beside: one sample, and the "
    "last frame repeated or a linear blend.",
    "PSNR: of a clip's mean squared error, pixels in [0, 1], then the mean over clips. SSIM rounded: of pixels "
    "rounded to 0 and 1 first.",
]
_DIGIT_NOTE = (
    "Both digits named: by a classifier of single digits ({single:.1f} % on real test digits), where the digits "
    "really are, in the first predicted frame of one sample; beside: in the real frame."
)


def clip_psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """(N, ...) x2 in [-1, 1] -> (N,) decibels of each clip's mean squared error.

    Errors below a millionth, which 8 bits cannot show, count as one.
    """
    error = ((prediction.clamp(-1, 1) - target) / 2).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-6).log10()


def clip_ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """(N, C, T, H, W) x2 in [-1, 1] -> (N,): the mean over frames."""
    flat = (rearrange((x.clamp(-1, 1) + 1) / 2, "n c t h w -> (n t) c h w") for x in (prediction, target))
    return structural_similarity(*flat).view(len(target), -1).mean(dim=1)


def repeat_last(past: Tensor, count: int) -> Tensor:
    """(N, C, T, H, W) -> (N, C, count, H, W): the last frame, again and again."""
    return past[:, :, -1:].expand(-1, -1, count, -1, -1)


def blend(past: Tensor, future: Tensor, count: int) -> Tensor:
    """(N, C, T, H, W) x2 -> (N, C, count, H, W): evenly from the last of `past` to the first of `future`."""
    shares = torch.linspace(0, 1, count + 2, device=past.device)[1:-1, None, None]
    return torch.lerp(past[:, :, -1:], future[:, :, :1], shares)


def _measure(made: Tensor, target: Tensor) -> dict[str, Tensor]:
    """(N, C, T, H, W) x2 -> (N,) of each metric."""
    return {
        "psnr": clip_psnr(made, target),
        "psnr_first": clip_psnr(made[:, :, :1], target[:, :, :1]),
        "ssim": clip_ssim(made, target),
        "ssim_rounded": clip_ssim(made.sign(), target.sign()),
    }


@torch.inference_mode()
def evaluate_prediction(pipeline: EvdmPipeline, source: ClipSource, options: Evaluation, show: Show) -> Report:
    """Measure prediction and, where the model can, interpolation on the test clips of a source."""
    shape, model = pipeline.shape, pipeline.plan(Request()).model
    sizes = shape.past, shape.current, shape.future
    side = min(model.size) // 2
    classifier = train_classifier(source, side, show) if isinstance(source, Digits) else None
    pipeline.load()
    scores = defaultdict[str, list[Tensor]](list)
    indices, done = source.indices("test", options.clips), 0
    for rows in indices.split(options.batch):
        clips = source.render(rows, model.size, sum(sizes))
        frames = torch.stack(
            [pipeline.read(clip) for clip in rearrange(clips.frames, "b t c h w -> b t h w c").numpy()]
        )
        past, target, future = frames.to(pipeline.device).split(sizes, dim=2)
        tasks = {"predict": (future[:, :, :0], repeat_last(past, shape.current))}
        if shape.future:
            tasks["interpolate"] = future, blend(past, future, shape.current)
        for task, (known, simple) in tasks.items():
            samples = []
            for trajectory in range(options.trajectories):
                seeds = (options.seed + (done + i) * options.trajectories + trajectory for i in range(len(rows)))
                plans = [pipeline.plan(Request(seed=seed, steps=options.steps)) for seed in seeds]
                samples.append(pipeline.denoise_block(Task(plans), past, known, 0))
            for metric, best in _best(samples, target).items():
                scores[f"{task} {metric}"].append(best)
            for metric, value in _measure(samples[0], target).items():
                scores[f"{task} {metric} one"].append(value)
            for metric, value in _measure(simple, target).items():
                scores[f"{task} {metric} simple"].append(value)
            if classifier is not None and task == "predict":
                labels = clips.labels["digits"], clips.labels["places"][:, shape.past]
                for name, shown in (("digits", samples[0]), ("digits real", target)):
                    scores[name].append(_name_both(classifier, shown[:, 0, 0], *labels))
        done += len(rows)
        show("clips", done, len(indices))
    means = {name: float(torch.cat(values).double().mean()) for name, values in scores.items()}
    notes = [note.format(**vars(shape), **vars(options)) for note in _NOTES]
    figures = list(_figures(means))
    if classifier is not None:
        notes.append(_DIGIT_NOTE.format(single=100 * classifier.accuracy))
    name = model.name
    settings = {"model": name, "split": "test", "clips": len(indices), "trajectories": options.trajectories}
    return Report(f"{name}: {len(indices)} test clips", figures, notes, settings)


def _best(samples: list[Tensor], target: Tensor) -> dict[str, Tensor]:
    """-> (N,) of each metric: that of the best sample."""
    measured = [_measure(sample, target) for sample in samples]
    return {metric: torch.stack([each[metric] for each in measured]).amax(0) for metric in measured[0]}


def _figures(means: dict[str, float]) -> Iterator[Figure]:
    """Yield the rows of the report."""
    for task, simple in (("predict", "repeated"), ("interpolate", "blend")):
        for metric, label in (
            ("psnr", ""),
            ("psnr_first", ", first frame"),
            ("ssim", ""),
            ("ssim_rounded", " rounded"),
        ):
            key = f"{task} {metric}"
            if key not in means or (task, metric) == ("interpolate", "psnr_first"):
                continue
            kind, unit = ("PSNR", "dB") if metric[:4] == "psnr" else ("SSIM", "")
            beside = {"one sample": means[f"{key} one"], simple: means[f"{key} simple"]}
            above = _ABOVE.get(metric, 0.0)
            target, reason = means[f"{key} simple"] + above, f"{simple} + {above:g}" if above else simple
            value = means[key]
            yield Figure(key.replace(" ", "_"), f"{task}: {kind}{label}", value, unit, beside, target, reason=reason)
    if "digits" in means:
        got, real = 100 * means["digits"], 100 * means["digits real"]
        target, reason = real * _OF_REAL / 100, f"{_OF_REAL:g} % of real"
        yield Figure("digits", "predict: both digits named", got, "%", {"real": real}, target, reason=reason)


class DigitClassifier(nn.Module):
    """Names the digit in the middle of a picture, whatever else is there."""

    def __init__(self, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 24), (24, 48), (48, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (side // 8) ** 2, 10))
        # on single test digits
        self.accuracy = 0.0

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, H, W) in [0, 1] -> logits (B, 10)."""
        return self.layers(pictures[:, None])


@torch.inference_mode(False)
def train_classifier(source: Digits, side: int, show: Show, *, epochs: int = 5) -> DigitClassifier:
    """Learn from the training digits, with parts of other digits laid over half of them."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        network = DigitClassifier(side)
        pictures, names = source.singles("train", side)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        batches = [rows for _ in range(epochs) for rows in torch.randperm(len(names), generator=generator).split(64)]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, len(batches))
        for step, rows in enumerate(batches):
            others = pictures[torch.randint(len(names), rows.shape, generator=generator)]
            dy, dx = torch.randint(-side, side + 1, (2,), generator=generator).tolist()
            moved = F.pad(others, (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)))
            moved = moved[:, max(-dy, 0) :, max(-dx, 0) :][:, :side, :side]
            covered = torch.rand(len(rows), 1, 1, generator=generator) < 0.5
            loss = F.cross_entropy(network((pictures[rows] + moved * covered).clamp(max=1)), names[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            show("classifier", step + 1, len(batches))
    network.eval().requires_grad_(False)
    pictures, names = source.singles("test", side)
    network.accuracy = float((network(pictures).argmax(1) == names).double().mean())
    return network


def _name_both(classifier: DigitClassifier, frames: Tensor, names: Tensor, places: Tensor) -> Tensor:
    """(B, H, W) in [-1, 1], (B, 2), (B, 2, 2) -> (B,): 1 where both digits are named, else 0."""
    side = frames.shape[-1] // 2
    rows, columns = (places[..., axis, None] + torch.arange(side) for axis in (0, 1))  # (B, 2, s) each
    clips = torch.arange(len(frames)).view(-1, 1, 1, 1)
    cut = ((frames.cpu() + 1) / 2)[clips, rows[..., None], columns[..., None, :]]  # (B, 2, s, s)
    named = classifier(cut.flatten(0, 1).float()).argmax(1).view_as(names)
    return (named == names).all(dim=1).double()
