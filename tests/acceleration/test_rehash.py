"""What runs on a skipped step, and what is reused."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cmdgen.acceleration.rehash import CutDiT, CutUNet, Network, Rehash
from cmdgen.config import MINI, DiTConfig, UNetConfig
from cmdgen.models.dit import DiT
from cmdgen.models.unet import UNet

assert isinstance(MINI.content, UNetConfig) and MINI.motion is not None
SMALL = {
    **{"in_channels": 4, "out_channels": 4, "cross_attention_dim": 12},
    **{"norm_num_groups": 4, "attention_head_dim": 2},
}
UNETS = {
    # its last up stage has two layers without attention
    "mini": replace(MINI.content, block_out_channels=(8, 16, 24), **SMALL),
    # three with
    "sd": UNetConfig(block_out_channels=(8, 16, 16, 24), **SMALL),
}
TIMESTEP = torch.tensor([7, 7])
TEXT, CONTEXT = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 5, 12), (2, 4, 8, 16))
)
MOTION = DiTConfig(width=32, depth=3, heads=2, text_width=12, context_channels=4, context_patch=4)


def cut_unet(name: str) -> tuple[Network, nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    unet = UNet(UNETS[name]).eval()
    time, text = unet.project_time(TIMESTEP), unet.project_text(TEXT)
    return CutUNet(unet), unet, (torch.randn(2, 4, 16, 24), time, *text)


def cut_dit() -> tuple[Network, nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    dit = DiT(MOTION).eval()
    for parameter in dit.parameters():
        # blocks start as the identity
        nn.init.normal_(parameter, std=0.2)
    modulations = dit.modulations(TIMESTEP, text=TEXT)
    ground = dit.place(4, 12, context=CONTEXT, split=8)
    return CutDiT(dit), dit, (torch.randn(2, 8, 4, 12), modulations, ground)


NETWORKS = {**{name: (cut_unet, name) for name in UNETS}, "motion": (cut_dit,)}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def network(request: pytest.FixtureRequest):
    make, *arguments = request.param
    with torch.no_grad():
        yield make(*arguments)


def forward(module: nn.Module, x: Tensor, *_: Tensor) -> Tensor:
    if isinstance(module, DiT):
        return module(x, TIMESTEP, text=TEXT, context=CONTEXT, split=8)
    return module(x, TIMESTEP, TEXT)


def test_a_full_step_is_the_networks_forward_bit_for_bit(network) -> None:
    cut, module, given = network
    rehash = Rehash(cut, range(3))
    for _ in range(3):
        assert torch.equal(rehash(*given), forward(module, *given))


def test_a_skipped_step_on_the_same_sample_is_a_full_one(network) -> None:
    cut, module, given = network
    rehash = Rehash(cut, {0})
    rehash(*given)
    torch.testing.assert_close(rehash(*given), forward(module, *given))


def test_features_are_of_the_last_full_step(network) -> None:
    cut, module, (x, *rest) = network
    others = [torch.randn_like(x) for _ in range(5)]
    rehash = Rehash(cut, {0, 2})
    results = [rehash(other, *rest) for other in others]
    for step, source in ((1, 0), (3, 2), (4, 2)):
        _, feature = cut.run(others[source], *rest)
        assert torch.equal(results[step], cut.resume(feature, others[step], *rest))
        assert not torch.equal(results[step], forward(module, others[step], *rest))


def test_where_guidance_goes_off_the_positive_half_is_reused(network) -> None:
    """A batch of two is the two branches of one clip, the negative one first."""
    cut, _, (x, t, *conditions) = network
    positive = x[1:], t[1:], *(condition[1:] for condition in conditions)
    rehash = Rehash(cut, {0})
    rehash(x, t, *conditions)
    feature = cut.run(x, t, *conditions)[1]
    off = rehash(*positive)
    torch.testing.assert_close(off, cut.resume(feature[1:], *positive))
    torch.testing.assert_close(rehash(*positive), off)
    with pytest.raises(AssertionError, match="guidance came on"):
        rehash(x, t, *conditions)


def test_one_feature_is_all_that_is_kept(network) -> None:
    cut, module, given = network
    before = {name: id(tensor) for name, tensor in module.named_parameters()}
    rehash = Rehash(cut, {0, 1})
    rehash(*given)
    first = rehash.feature
    rehash(*given)
    rehash(*given)
    assert rehash.feature is not first
    tensors = [each for each in vars(rehash).values() if isinstance(each, Tensor)]
    assert tensors == [rehash.feature]
    assert {name: id(tensor) for name, tensor in module.named_parameters()} == before
    assert not [name for name in vars(module) if "feature" in name]


def count_calls(module: nn.Module, run) -> Counter[str]:
    calls: Counter[str] = Counter()
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, part in module.named_modules()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("name", UNETS)
def test_a_skipped_step_runs_nothing_of_the_unet_before_its_last_layer(name: str) -> None:
    network, unet, given = cut_unet(name)
    rehash = Rehash(network, {0})
    rehash(*given)
    calls = count_calls(unet, lambda: rehash(*given))
    stages, layers = len(unet.up_blocks), len(unet.up_blocks[-1].resnets)
    last = f"up_blocks.{stages - 1}"
    expected = {"conv_in", "conv_out", f"{last}.resnets.{layers - 1}"}
    if name == "sd":
        expected.add(f"{last}.attentions.{layers - 1}")
    ran = {part for part in calls if not any(part.startswith(f"{each}.") for each in expected)}
    assert ran == expected


def test_a_skipped_step_runs_no_block_of_the_motion_model() -> None:
    network, dit, given = cut_dit()
    rehash = Rehash(network, {0})
    rehash(*given)
    calls = count_calls(dit, lambda: rehash(*given))
    assert not [name for name in calls if name.startswith("blocks")]
    assert set(calls) - {""} == {"embed_sample", "final"}


def test_the_sample_of_a_skipped_step_goes_into_the_last_layer() -> None:
    network, _, (x, *rest) = cut_unet("sd")
    _, feature = network.run(x, *rest)
    assert not torch.equal(network.resume(feature, x, *rest), network.resume(feature, -x, *rest))
