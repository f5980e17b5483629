"""UNets and decoders that look along time, in slices: the same numbers, in as much memory as the model of it says."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmdgen.acceleration import video as video_slices
from cmdgen.acceleration.graphs import Graphed
from cmdgen.acceleration.memory import FusedAttention, Work, choose_slices, count_peak, peak_bytes, run_unet
from cmdgen.acceleration.moments import FrameMoments
from cmdgen.acceleration.rehash import CutUNet
from cmdgen.acceleration.slicer import decode_pictures
from cmdgen.acceleration.video import Cut, SlicedUNet, decode_frames, in_slices
from cmdgen.config import ANIMATEDIFF, SVD, SVD_XT, ModelConfig, MotionConfig, UNetConfig, VaeConfig
from cmdgen.evaluation.flops import list_forwards
from cmdgen.models.temporal import MotionAdapter
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices
from cmdgen.weights import build_empty
from tests import video_unets as video
from tests.acceleration.test_slicer import assert_exact

BATCH, FRAMES, HEIGHT, WIDTH = 2, 5, 12, 20
WIDE = torch.float64


@pytest.fixture(scope="module")
def motion() -> UNet:
    config = video.tiny(ANIMATEDIFF)
    assert isinstance(config.content, UNetConfig) and isinstance(config.adapter, MotionConfig)
    unet, adapter = UNet(config.content), MotionAdapter(replace(config.adapter, use_motion_mid_block=True))
    unet.attach(adapter)
    return video.randomise(unet).double()


@pytest.fixture(scope="module")
def blend() -> UNet:
    return video.randomise(UNet(video.tiny(SVD).content)).double()


@pytest.fixture(scope="module")
def decoder() -> KlVae:
    vae = VaeConfig(block_out_channels=(32, 64, 64), layers_per_block=2, temporal="blend")
    return video.randomise(KlVae(vae)).double()


def conditions(unet: UNet, clips: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Times and text of clips, no two alike."""
    blends = unet.config.temporal == "blend"
    torch.manual_seed(1)
    numbers = torch.rand(clips, 3, dtype=WIDE) if blends else None
    time = unet.project_time(torch.linspace(300, 900, clips), numbers)
    return time, unet.project_text(torch.randn(clips, 1 if blends else 7, 16, dtype=WIDE))


# a position or a frame at a time, parts of a clip, whole clips at the lowest level alone, everything
@pytest.mark.parametrize("size", [1, 20_000, 100_000, 10**9])
@pytest.mark.parametrize("kind", ["motion", "blend"])
@torch.no_grad()
def test_a_sliced_unet_equals_the_whole(request: pytest.FixtureRequest, kind: str, size: int) -> None:
    unet = request.getfixturevalue(kind)
    sample = torch.randn(BATCH * FRAMES, unet.config.in_channels, HEIGHT, WIDTH, dtype=WIDE)
    before, (time, text) = sample.clone(), conditions(unet, BATCH)
    assert_exact(SlicedUNet(unet, size).denoise(sample, time, *text), unet.denoise(sample, time, *text))
    assert torch.equal(sample, before)


@pytest.mark.parametrize("kind", ["motion", "blend"])
@torch.no_grad()
def test_moments_are_taken_of_what_a_norm_of_a_clip_reads(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    unet, measured = request.getfixturevalue(kind), list[int]()
    add = FrameMoments.add
    monkeypatch.setattr(FrameMoments, "add", lambda *given: (measured.append(given[1].shape[1]), add(*given))[1])
    sample = torch.randn(BATCH * FRAMES, unet.config.in_channels, HEIGHT, WIDTH, dtype=WIDE)
    time, text = conditions(unet, BATCH)
    SlicedUNet(unet, 10**9).denoise(sample, time, *text)
    # what a layer's frames become, not the first and last convolution, halves, or tokens
    layers = [layer for stage in unet._stages() for layer in stage.resnets]
    blocks = [layer.spatial_res_block if kind == "blend" else layer for layer in layers]
    assert measured == [block.conv2.out_channels for block in blocks]


class Streams(TorchDispatchMode):
    """Runs slices in an order that streams may have, and keeps them to what streams may do with memory."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order, self.stream, self.seen = order, -1, set[int]()
        # storages that a stream made in the slices that run now
        self.made: dict[int, tuple[int, Tensor]] = {}

    def run(self, work: Callable[[slice, int], None], slices: list[slice], device: object, streams: int) -> None:
        for number in sorted(range(len(slices)), key=lambda i: self.order * (i % streams)):
            self.stream = number % streams
            self.seen.add(self.stream)
            work(slices[number], self.stream)
        # all have ended
        self.stream, self.made = -1, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.stream < 0:
            return result
        given, made = (
            {leaf.untyped_storage().data_ptr(): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}
            for values in ((args, kwargs), result)
        )
        for place in given:
            stream, _ = self.made.get(place, (self.stream, None))
            assert stream == self.stream, f"stream {self.stream} uses what stream {stream} has made"
        # kept: no other tensor has their addresses
        self.made |= {place: (self.stream, leaf) for place, leaf in made.items() if place not in given}
        return result


@pytest.mark.parametrize("size", [20_000, 100_000])
@pytest.mark.parametrize("kind", ["motion", "blend"])
@torch.no_grad()
def test_slices_on_streams_share_nothing_and_have_no_order(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    unet = request.getfixturevalue(kind)
    sample = torch.randn(BATCH * FRAMES, unet.config.in_channels, HEIGHT, WIDTH, dtype=WIDE)
    time, text = conditions(unet, BATCH)
    expected = SlicedUNet(unet, size, 2).denoise(sample, time, *text)
    assert_exact(expected, unet.denoise(sample, time, *text))
    # the first stream's slices before all others', then the other way
    for order in (1, -1):
        with Streams(order) as streams:
            monkeypatch.setattr(video_slices, "run_slices", streams.run)
            made = SlicedUNet(unet, size, 2).denoise(sample, time, *text)
        assert streams.seen == {0, 1} and torch.equal(made, expected)


@pytest.mark.parametrize(("length", "clips"), [(1, 3), (5, 2), (16, 1), (16, 4), (97, 1)])
def test_slices_of_all_streams_are_together_no_more_than_the_one_that_is_counted(
    monkeypatch: pytest.MonkeyPatch, length: int, clips: int
) -> None:
    made: list[tuple[list[slice], int]] = []
    monkeypatch.setattr(
        video_slices, "run_slices", lambda work, slices, device, streams: made.append((slices, streams))
    )

    def cut(size: int, streams: int, device: str = "cpu") -> tuple[list[slice], int]:
        Cut(size, streams).run(lambda part, stream: None, torch.empty(0, device=device), 4, length, clips)
        return made.pop()

    shared = False
    for size in range(1, 5 * length * clips):
        (counted,), _ = cut(size, 3, "meta")
        for streams in (1, 2, 3):
            slices, at_a_time = cut(size, streams)
            assert [i for part in slices for i in range(clips * length)[part]] == list(range(clips * length))
            lengths = [part.stop - part.start for part in slices]
            assert at_a_time in (1, streams) and max(lengths) * at_a_time <= counted.stop
            assert at_a_time > 1 or slices[0] == counted
            # of one clip, or whole
            for part, count in zip(slices, lengths, strict=True):
                assert part.start // length == (part.stop - 1) // length or count % length == part.start % length == 0
            shared |= at_a_time > 1
    assert shared


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["motion", "blend"])
@torch.no_grad()
def test_slices_on_two_streams_of_a_gpu_are_those_on_one(request: pytest.FixtureRequest, kind: str) -> None:
    unet = copy.deepcopy(request.getfixturevalue(kind)).cuda()
    sample = torch.randn(BATCH * FRAMES, unet.config.in_channels, HEIGHT, WIDTH, dtype=WIDE)
    time, text = conditions(request.getfixturevalue(kind), BATCH)
    given = [each.cuda() for each in (sample, time, *text)]
    expected = unet.denoise(*given)
    two = SlicedUNet(unet, 20_000, 2)
    captured: Graphed[Tensor] = Graphed(two.denoise, cache(torch.cuda.graph_pool_handle))
    for _ in range(3):
        assert_exact(two.denoise(*given), expected)
        assert_exact(captured(*given), expected)


@pytest.mark.gpu
@torch.no_grad()
def test_a_large_unet_on_two_streams_has_the_bits_of_the_same_slices_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(ANIMATEDIFF.content, UNetConfig)
    with torch.device("cuda"):
        unet = UNet(ANIMATEDIFF.content)
        unet.attach(MotionAdapter(MotionConfig()))
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        unet = unet.half().eval()
        sample = torch.randn(2 * 16, 4, 40, 64, dtype=torch.float16)
        time = unet.project_time(torch.full((2,), 500.0), None)
        text = unet.project_text(torch.randn(2, 77, 768, dtype=torch.float16))
    two = SlicedUNet(unet, 16 * MIB, 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            video_slices, "run_slices", lambda run, slices, *_: [run(each, i % 2) for i, each in enumerate(slices)]
        )
        expected = two.denoise(sample, time, *text)
    captured: Graphed[Tensor] = Graphed(two.denoise, cache(torch.cuda.graph_pool_handle))
    for _ in range(5):
        assert torch.equal(two.denoise(sample, time, *text), expected)
        assert torch.equal(captured(sample, time, *text), expected)


@pytest.mark.parametrize("size", [1, 20_000, 10**9])
@torch.no_grad()
def test_stills_of_motion_modules_skip_them_in_slices_too(motion: UNet, size: int) -> None:
    sample = torch.randn(3, 4, HEIGHT, WIDTH, dtype=WIDE)
    time, text = conditions(motion, 3)
    assert_exact(SlicedUNet(motion, size).denoise(sample, time, *text), motion.denoise(sample, time, *text))


@pytest.mark.parametrize("kind", ["motion", "blend"])
@torch.no_grad()
def test_a_group_sees_slices_and_never_the_whole(request: pytest.FixtureRequest, kind: str) -> None:
    unet, rows, columns = request.getfixturevalue(kind), set(), set()
    layer = unet.up_blocks[-1]
    spatial, time = layer.attentions[0].transformer_blocks[0], layer.attentions[0]
    time = layer.motion_modules[0].transformer_blocks[0] if kind == "motion" else time.temporal_transformer_blocks[0]
    hooks = [
        spatial.register_forward_pre_hook(lambda _, given: rows.add(tuple(given[0].shape))),
        time.register_forward_pre_hook(lambda _, given: columns.add(tuple(given[0].shape))),
    ]
    sample = torch.randn(BATCH * FRAMES, unet.config.in_channels, HEIGHT, WIDTH, dtype=WIDE)
    condition, text = conditions(unet, BATCH)
    # two frames of 96 channels, what a residual block reads here, or six of 32, a transformer alone;
    # and 153 positions at all times, of both clips
    SlicedUNet(unet, 2 * 96 * HEIGHT * WIDTH * 8).denoise(sample, condition, *text)
    for hook in hooks:
        hook.remove()
    assert rows == {(n, HEIGHT * WIDTH, 32) for n in ((2, 1) if kind == "motion" else (FRAMES,))}
    assert columns == {(BATCH, FRAMES, 120, 32)}


@pytest.mark.parametrize(("kind", "cut"), [("motion", 1), ("motion", 2), ("motion", 3), ("blend", 1), ("blend", 2)])
@torch.no_grad()
def test_a_cut_within_the_last_layer_is_the_same_in_slices(request: pytest.FixtureRequest, kind: str, cut: int) -> None:
    unet = request.getfixturevalue(kind)
    first, second = torch.randn(2, BATCH * FRAMES, unet.config.in_channels, HEIGHT, WIDTH, dtype=WIDE)
    time, text = conditions(unet, BATCH)
    whole, sliced = CutUNet(unet, cut), CutUNet(SlicedUNet(unet, 100_000), cut)
    (output, feature), (sliced_output, sliced_feature) = (each.run(first, time, *text) for each in (whole, sliced))
    assert_exact(output, unet.denoise(first, time, *text))
    assert_exact(sliced_output, output)
    assert_exact(sliced_feature, feature)
    kept = sliced_feature.clone()
    resumed = sliced.resume(sliced_feature, second, time, *text)
    assert_exact(resumed, whole.resume(feature, second, time, *text))
    # nothing before the cut runs, and what is kept stays as it is
    assert_exact(resumed, output)
    assert torch.equal(sliced_feature, kept)


@pytest.mark.parametrize(
    ("model", "size", "saved"), [(ANIMATEDIFF, 512, 1.80), (ANIMATEDIFF, 576, 1.78), (SVD, 576, 1.78)]
)
def test_rehash_of_half_of_the_steps_saves_what_its_operations_say(model: ModelConfig, size: int, saved: float) -> None:
    # the paper's cut leaves the output alone of AnimateDiff's last layer, and attention of SVD's
    sized, paper = replace(model, height=size, width=512 if size == 512 else 1024), 1 if model is SVD else 3
    forwards, last = list_forwards(sized), list_forwards(sized, paper)["content skipped"].count.flops
    step, skipped = (forwards[name].count.flops for name in ("content step", "content skipped"))
    assert 25 * step / (13 * step + 12 * skipped) == pytest.approx(saved, abs=0.005)
    assert last < (0.07 if model is SVD else 0.001) * step


@pytest.mark.parametrize("size", [None, 1, 20_000, 10**9])
@torch.no_grad()
def test_frames_apart_are_decoded_as_all_together(decoder: KlVae, size: int | None) -> None:
    latents = torch.randn(FRAMES, 4, 6, 10, dtype=WIDE)
    before = latents.clone()
    assert_exact(decode_frames(decoder, latents, size), decoder.from_latents(latents))
    assert_exact(decode_pictures(decoder, latents, strips=3), decoder.from_latents(latents))
    assert torch.equal(latents, before)


@pytest.mark.parametrize("kind", ["motion", "blend"])
@torch.no_grad()
def test_slices_are_as_exact_as_the_whole_in_half_precision(request: pytest.FixtureRequest, kind: str) -> None:
    unet = request.getfixturevalue(kind)
    sample = torch.randn(BATCH * FRAMES, unet.config.in_channels, HEIGHT, WIDTH, dtype=WIDE)
    time, text = conditions(unet, BATCH)
    exact = unet.denoise(sample, time, *text)
    try:
        half = unet.bfloat16()
        given = [each.bfloat16() for each in (sample, time, *text)]
        errors = [(run.denoise(*given).double() - exact).norm() for run in (half, SlicedUNet(half, 20_000))]
    finally:
        unet.double()
    assert 0 < errors[1] <= 1.2 * errors[0]


@torch.no_grad()
def test_a_decoder_with_frames_apart_is_as_exact_in_half_precision(decoder: KlVae) -> None:
    latents = torch.randn(FRAMES, 4, 6, 10, dtype=WIDE)
    exact = decoder.from_latents(latents)
    half = KlVae(decoder.config)
    half.load_state_dict(decoder.state_dict())
    half, given = half.bfloat16(), latents.bfloat16()
    errors = [(run.double() - exact).norm() for run in (half.from_latents(given), decode_frames(half, given))]
    assert 0 < errors[1] <= 1.2 * errors[0]


def full_size(model: ModelConfig, *, features: int = 0) -> Work:
    return Work(replace(model, height=576, width=1024), torch.float16, features=features)


# with a module in the middle, and guided
GUIDED = replace(ANIMATEDIFF, adapter=MotionConfig())
MIB = 2**20


@pytest.mark.parametrize("model", [GUIDED, SVD, SVD_XT])
def test_live_bytes_are_those_of_a_model_of_the_memory(model: ModelConfig) -> None:
    work, frames = full_size(model), model.frames
    assert isinstance(model.content, UNetConfig)
    level = 2 * frames * model.content.block_out_channels[0] * 72 * 128 * 2
    # all skips, of which the layers below the first take 2.0625; and a feed-forward of one slice
    for in_turn in (False, True):
        skips = 5.0625 * level / (1 + in_turn)
        for size in (16, 64, 256):
            held = count_peak(run_unet, work, Slices(1, 1, 1, bytes=size * MIB, in_turn=in_turn))
            assert held <= skips + 18 * size * MIB
            if size == 16 and not in_turn:
                assert held >= 0.9 * (skips + 18 * size * MIB)
    kept = count_peak(run_unet, full_size(model, features=1), Slices(1, 1, 1, bytes=16 * MIB))
    assert kept <= 6.0625 * level + 18 * 16 * MIB
    if model.vision is not None:
        vae = build_empty(KlVae, model.vae).half()
        frame = 128 * 576 * 1024 * 2
        latents = torch.empty(frames, 4, 72, 128, dtype=torch.float16, device="meta")
        held = peak_bytes(lambda: decode_frames(vae, latents))
        # each frame at the end of the decoder, and four more for one that is made
        assert 0.99 * (frames + 4) * frame <= held <= 1.001 * (frames + 4) * frame


@pytest.mark.parametrize(
    ("model", "resident", "in_turn", "staged"),
    [(GUIDED, 4.4e9, 3.9e9, 3.9e9), (SVD, 7.3e9, 7.3e9, 4.3e9), (SVD_XT, 9.1e9, 9.1e9, 5.0e9)],
)
def test_a_clip_of_the_largest_size_with_all_weights_is_held_in_gigabytes(
    model: ModelConfig, resident: float, in_turn: float, staged: float
) -> None:
    work = full_size(model)
    slices = Slices(1, 1, 1, strips=8, bytes=16 * MIB)
    assert work.need(slices) <= resident
    assert work.need(replace(slices, in_turn=True)) <= in_turn
    assert work.need(replace(slices, staged=True)) <= staged
    for limit in (int(staged), int(resident)):
        assert work.need(chosen := choose_slices(work, torch.device("cpu"), limit)) <= limit
    # the fastest: not in smaller slices, nor with weights that come and go
    assert choose_slices(work, torch.device("cpu"), 16 * 10**9) == choose_slices(work, torch.device("cpu"))
    assert chosen.bytes is None or chosen.bytes >= 64 * MIB
    with pytest.raises(ValueError, match=r"max memory 1000 MB: to make .* frames of 1024x576 takes at least") as caught:
        choose_slices(work, torch.device("cpu"), 10**9)
    least = int(str(caught.value).split()[-2]) * 10**6
    smallest = choose_slices(work, torch.device("cpu"), least)
    assert smallest.staged and smallest.in_turn and work.need(smallest) <= least
    with pytest.raises(ValueError, match="takes at least"):
        choose_slices(work, torch.device("cpu"), least - 10**6)


@pytest.mark.parametrize("kind", ["motion", "blend"])
@pytest.mark.parametrize("size", [2_000, 20_000, None])
@torch.no_grad()
def test_a_count_on_shapes_is_what_a_step_holds(request: pytest.FixtureRequest, kind: str, size: int | None) -> None:
    unet, slices = request.getfixturevalue(kind), Slices(1, 1, 1, bytes=size)
    time, text = conditions(unet, BATCH)
    sample = torch.randn(BATCH * FRAMES, unet.config.in_channels, HEIGHT, WIDTH, dtype=WIDE)
    held = peak_bytes(lambda: in_slices(unet, slices).denoise(sample, time, *text))
    shapes = UNet(unet.config)
    if kind == "motion":
        shapes.attach(MotionAdapter(MotionConfig(block_out_channels=video.WIDTHS)))
    shapes, given = shapes.double().to("meta"), [each.to("meta") for each in (sample, time, *text)]
    with FusedAttention():
        counted = peak_bytes(lambda: in_slices(shapes, slices).denoise(*given))
    # a few moments of a channel apart
    assert 0.995 * held <= counted <= 1.05 * held
