"""EVDM against the counts that its paper prints, and against what each of its parts should do."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cmdgen.config import PRESETS, EvdmConfig
from cmdgen.evaluation.prediction import blend, clip_psnr
from cmdgen.models.attention import GatedAttention
from cmdgen.models.evdm import Evdm, follow, norm_groups, resample, shuffle

TINY = EvdmConfig(past=2, current=3, future=1, patch=2, width=8, attention="gated", dropout=0.0)
# Zhang et al. 2023, tables 2 and 3, in millions: 27.9, 62.8, 251.2; 12.5, 28.1, 112.4, 252.7; 20.4, 182.7
COUNTS = {
    "mcvd-sm": 27_941_765,
    "mcvd-kth": 62_831_141,
    "mcvd-bair": 251_174_991,
    "mcvd-ucf": 564_990_060,
    "evdm-sm": 12_525_285,
    "evdm-kth": 28_138_805,
    "evdm-bair": 112_384_623,
    "evdm-ucf": 252_695_964,
    "evdm-l-sm": 9_061_525,
    "evdm-l-kth": 20_351_549,
    "evdm-l-bair": 81_260_415,
    "evdm-l-ucf": 182_685_108,
}


def count(config: EvdmConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Evdm(config).parameters())


def build(**changes: object) -> Evdm:
    torch.manual_seed(0)
    network = Evdm(replace(TINY, **changes)).double().eval()
    for parameter in network.parameters():
        # what starts at zero would hide everything behind it
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(batch, 1, 6, 32, 16, generator=generator, dtype=torch.float64)
    return frames[:, :, :3], torch.arange(batch) * 300, frames[:, :, 3:]


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_papers(name: str) -> None:
    config = PRESETS[name].content
    assert isinstance(config, EvdmConfig)
    assert count(config) == COUNTS[name]


def test_parameters_of_the_odd_rows_are_the_papers() -> None:
    # table 3 has BAIR from one past frame, and table 2 prints 5.92 and 53.0 for two EVDM-L
    assert count(replace(PRESETS["mcvd-bair"].content, past=1)) == 251_169_807
    assert count(replace(PRESETS["evdm-l-sm"].content, modulation="half")) == 5_915_845
    assert count(replace(PRESETS["evdm-l-bair"].content, modulation="half")) == 53_022_735


@pytest.mark.parametrize(
    ("name", "linear"),
    [("evdm-sm", {1024, 256}), ("evdm-kth", {1024, 256}), ("evdm-bair", {1024}), ("evdm-ucf", {1024})],
)
def test_the_gate_is_open_where_positions_exceed_twice_the_width(name: str, linear: set[int]) -> None:
    with torch.device("meta"):
        network = Evdm(PRESETS[name].content)
    gates = [module for module in network.modules() if isinstance(module, GatedAttention)]
    # three on the way down at each of two levels, one in the middle, one up at each of three
    assert len(gates) == 10
    for gate in gates:
        width = gate.projection.shape[1]
        assert gate.projection.shape == (width, width)
        assert {length for length in (1024, 256, 64) if length > gate.threshold * width} == linear


@pytest.mark.parametrize(
    "changes",
    [{}, {"split": True}, {"block": "mcvd"}, {"modulation": "half", "activation": "silu"}, {"mask": True, "reach": 2}],
)
def test_a_batch_is_its_clips_one_by_one(changes: dict[str, object]) -> None:
    network, (sample, timestep, context) = build(**changes), inputs()
    whole = network(sample, timestep, context)
    assert whole.shape == sample.shape
    for i in range(2):
        part = slice(i, i + 1)
        torch.testing.assert_close(network(sample[part], timestep[part], context[part]), whole[part])
    assert not torch.allclose(whole, network(sample, timestep + 500, context))
    assert not torch.allclose(whole, network(sample, timestep, context.flip(2)))


def test_fresh_blocks_add_nothing_and_the_output_is_zero() -> None:
    torch.manual_seed(0)
    sample, timestep, context = (x.float() if x.is_floating_point() else x for x in inputs())
    assert not Evdm(TINY)(sample, timestep, context).any()


def test_a_fresh_network_with_a_mask_keeps_the_nearest_known_frames() -> None:
    torch.manual_seed(0)
    config = replace(TINY, past=2, future=2, mask=True)
    network = Evdm(config)
    past, future = torch.randn(2, 1, config.channels, 2, 16, 16)
    nothing, sample = torch.zeros_like(past), torch.randn(1, config.channels, config.current, 16, 16)
    # nothing is new but a fiftieth, of 0
    kept = 1 / (1 + math.exp(-4))
    last, first = past[:, :, -1:].expand_as(sample), future[:, :, :1].expand_as(sample)
    for context, expected in (
        ((past, future), blend(past, future, config.current)),
        ((past, nothing), last),
        ((nothing, future), first),
        ((nothing, nothing), torch.zeros_like(sample)),
    ):
        torch.testing.assert_close(network(sample, torch.tensor([500]), torch.cat(context, dim=2)), kept * expected)
    # of a batch each row has frames of its own
    both = torch.cat([torch.cat([past, nothing], dim=2), torch.cat([nothing, future], dim=2)])
    made = network(sample.expand(2, -1, -1, -1, -1), torch.tensor([500, 1]), both)
    torch.testing.assert_close(made, kept * torch.cat([last, first]))
    with torch.autocast("cpu", torch.bfloat16):
        made = network(sample, torch.tensor([500]), torch.cat([past, nothing], dim=2))
    torch.testing.assert_close(made, kept * last, rtol=1e-3, atol=1e-5)
    alone = Evdm(replace(config, future=0))
    torch.testing.assert_close(alone(sample, torch.tensor([500]), past), kept * last)
    # and where the mask is open, all of it
    with torch.no_grad():
        bias = network.conv_out.bias.unflatten(0, (config.current, config.channels + 1, config.patch**2))
        bias[:, :-1], bias[:, -1] = 0.5, 50
    torch.testing.assert_close(network(sample, torch.tensor([500]), both[:1]), torch.full_like(sample, 0.5))


def test_what_moves_is_followed_from_both_sides() -> None:
    config = replace(TINY, past=2, current=5, future=2, patch=4, mask=True, reach=4)
    clip = torch.full((1, 1, 9, 64, 64), -1.0, dtype=torch.float64)
    textures = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for texture, (top, left, dy, dx) in zip(textures, ((8, 4, -1, 4), (24, 40, 2, 0)), strict=True):
        for t in range(9):
            place = slice(top + dy * t, top + dy * t + 20), slice(left + dx * t, left + dx * t + 20)
            clip[0, 0, t, *place] = clip[0, 0, t, *place].maximum(texture)
    past, target, future = clip.split([2, 5, 2], dim=2)
    nothing, black = torch.zeros_like(past), torch.full_like(target, -1)

    def check(made: torch.Tensor, expected: torch.Tensor) -> None:
        for t in range(5):
            # edges are mixed with the black around them
            assert clip_psnr(made[:, :, t], expected[:, :, t]).min() > 18, t

    # where it was it is not: at frames 1, 2 and 3
    resting = past[:, :, 1:].expand_as(target)
    assert all(clip_psnr(resting[:, :, t], target[:, :, t]) < 16 for t in range(3))
    check(follow(torch.cat([past, future], dim=2), config), target)
    # the third frame is three away from either
    ahead = torch.cat([target[:, :, :3], black[:, :, 3:]], dim=2)
    back = torch.cat([black[:, :, :2], target[:, :, 2:]], dim=2)
    check(follow(torch.cat([past, nothing], dim=2), config), ahead)
    check(follow(torch.cat([nothing, future], dim=2), config), back)
    check(follow(past, replace(config, future=0)), ahead)
    check(follow(future, replace(config, past=0)), back)
    assert (follow(torch.cat([nothing, nothing], dim=2), config) == -1).all()
    # clips of a batch move as they do, and a single known frame rests
    alone = past.clone()
    alone[:, :, 0] = 0
    rests = torch.cat([past[:, :, 1:].expand(-1, -1, 3, -1, -1), black[:, :, 3:]], dim=2)
    both = torch.cat([torch.cat([past.flip(4), nothing], dim=2), torch.cat([alone, nothing], dim=2)])
    check(follow(both, config), torch.cat([ahead.flip(4), rests]))
    check(follow(past[:, :, 1:], replace(config, past=1, future=0)), rests)


def test_a_fresh_network_keeps_what_it_followed_and_sees_it() -> None:
    config = replace(TINY, past=2, current=3, future=1, mask=True, reach=2)
    torch.manual_seed(0)
    sample, timestep, context = inputs()
    kept, share = follow(context, config), 1 / (1 + math.exp(4))
    network = Evdm(config).double()
    torch.testing.assert_close(network(sample, timestep, context), (1 - share) * kept)
    assert network.conv_in.in_channels == 4 * (6 + 3)
    with pytest.raises(ValueError, match="reach 2 is of what a mask keeps, and there is no mask"):
        Evdm(replace(TINY, reach=2))


def test_resampling_is_a_filter_of_1_3_3_1() -> None:
    x = torch.randn(1, 2, 12, 10, dtype=torch.float64)
    taps = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64)
    kernel = (torch.outer(taps, taps) / 64).expand(2, 1, 4, 4)
    torch.testing.assert_close(resample(x, "down"), F.conv2d(x, kernel, stride=2, padding=1, groups=2))
    inside = (..., slice(1, -1), slice(1, -1))
    up = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=2)
    torch.testing.assert_close(resample(x, "up")[inside], up[inside])


def test_shuffled_groups_take_turns() -> None:
    x = torch.arange(8.0).view(1, 8, 1, 1)
    assert shuffle(x).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_narrow_norms_have_a_group() -> None:
    assert [norm_groups(channels) for channels in (3, 8, 64, 96, 288)] == [1, 2, 16, 24, 32]


def test_a_width_that_cannot_be_split_is_one_line() -> None:
    for width, reduction in ((12, 4), (8, 8)):
        with pytest.raises(ValueError, match=f"width {width} is not a multiple of 8, and of twice the reduction"):
            Evdm(replace(TINY, width=width, reduction=reduction))


@pytest.mark.parametrize("attention", ["softmax", "gated"])
def test_saved_and_read_it_is_the_same(tmp_path, attention: str) -> None:
    network = build(attention=attention).float()
    network.save_pretrained(tmp_path)
    again = Evdm.from_pretrained(tmp_path)
    assert again.config == replace(TINY, attention=attention)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
