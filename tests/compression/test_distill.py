"""The two losses of distillation, by what they must and must not see."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cmdgen.compression.distill import Critic, Matched, decoder_tokens, hinge
from cmdgen.compression.prune import prune_network
from cmdgen.config import MINI, UNetConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.unet import UNet
from tests.video_unets import randomise

assert isinstance(MINI.content, UNetConfig)
UNET = replace(MINI.content, block_out_channels=(16, 16, 16), norm_num_groups=4, cross_attention_dim=8)
DIT = replace(MINI.motion, width=32, depth=3, text_width=8)
INPUTS = torch.randn(2, 8, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 8)


def run(unet: nn.Module) -> None:
    unet(*INPUTS)


@torch.no_grad()
@pytest.mark.parametrize("units", [[], ["mid"], ["mid", "level", "attentions.up.1"]])
def test_blocks_of_a_unet_are_matched_to_those_that_they_were(units: list[str]) -> None:
    teacher = randomise(UNet(UNET))
    student = prune_network(teacher, units)
    matched = Matched(student, teacher, units)
    run(student), run(teacher)
    difference = float(matched.difference())
    assert len(matched.pairs) == {0: 7, 1: 6, 3: 4}[len(units)]
    # nothing before the mid block knows that it is gone
    assert difference == 0 if not units else difference > 0
    assert not matched.made


def test_tokens_of_motion_alone_count_frame_by_frame() -> None:
    teacher = randomise(DiT(DIT))
    student = prune_network(teacher, ["blocks.1"])
    matched, pair = Matched(student, teacher, ["blocks.1"]), (torch.randn(2, 14, 32), torch.randn(2, 14, 32))
    # the second block's input was made by two
    assert [teacher.blocks[i] for i in (1, 2)] == [theirs for _, theirs in matched.pairs]
    matched.pairs = matched.pairs[:1]
    matched.made = dict(zip(matched.pairs[0], pair, strict=True))
    # 3 frames of 4 tokens, and two of context
    ours, theirs = (each[:, :12].view(2, 3, 128) for each in pair)
    expected = ((ours - theirs).norm(dim=2) / theirs.norm(dim=2)).mean()
    torch.testing.assert_close(matched.difference((3, 4)), expected)


@torch.no_grad()
def test_one_head_sees_frames_and_the_other_time() -> None:
    critic, tokens = Critic(16, 1), torch.randn(5, 2, 6, 16)
    critic.time[0][2].weight.data.zero_()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert float(critic([tokens], 2).mean()) == pytest.approx(float(critic([tokens[order]], 2).mean()), abs=1e-6)
    critic = Critic(16, 1)
    critic.space[0][2].weight.data.zero_()
    # positions may change places, times may not
    places = torch.tensor([5, 3, 1, 0, 2, 4])
    mean = float(critic([tokens], 2).mean())
    assert float(critic([tokens[:, :, places]], 2).mean()) == pytest.approx(mean, abs=1e-6)
    assert float(critic([tokens[order]], 2).mean()) != pytest.approx(mean, abs=1e-4)


def test_the_heads_alone_learn_from_one_side_and_the_student_alone_from_the_other() -> None:
    config = replace(MINI.autoencoder, width=20, heads=2, decoder_depth=2)
    autoencoder = randomise(CmdAutoencoder(config)).requires_grad_(False)
    content, motion = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(2, 8, 3, 4)
    critic = Critic(20, 2)
    student, teacher = (decoder_tokens(autoencoder, each, motion) for each in (content, content.detach() + 1))
    assert [part.shape for part in student] == [(3, 2, 4, 20)] * 2
    generator, discriminator = hinge(critic, student, teacher, 2)
    discriminator.backward(retain_graph=True)
    assert content.grad is None and all(parameter.grad is not None for parameter in critic.parameters())
    critic.zero_grad()
    generator.backward()
    assert content.grad is not None and not any(parameter.grad is not None for parameter in critic.parameters())


def test_of_tokens_that_are_the_same_the_critic_cannot_gain() -> None:
    critic, tokens = Critic(16, 1), [torch.randn(3, 1, 4, 16)]
    generator, discriminator = hinge(critic, tokens, tokens, 2)
    # max(0, 1 + x) + max(0, 1 - x) is at least 2
    assert float(discriminator.detach()) >= 2 - 1e-6 and torch.isfinite(generator)
