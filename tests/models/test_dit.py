import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmdgen.config import CMD_SD15, CMD_SD21, CMD_UCF, DiTConfig, ModelConfig
from cmdgen.models import dit
from cmdgen.models.dit import DiT, Mlp, grid_positions

MOTION = DiTConfig(in_channels=5, width=24, depth=2, heads=2, text_width=7, context_channels=3, context_patch=4)
IMAGE = replace(MOTION, in_channels=3, text_width=None, context_channels=None, num_classes=6)

SAMPLE = torch.randn(2, 5, 4, 10, generator=torch.Generator().manual_seed(1))
CONDITIONS = {
    "text": torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(2)),
    "context": torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(3)),
}
T = torch.tensor([3, 700])


def build(config: DiTConfig) -> DiT:
    """A model whose gates are open, unlike a new one's."""
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def predict(model: DiT, sample: Tensor = SAMPLE, split: int = 6, **changed: Tensor) -> Tensor:
    conditions = CONDITIONS | changed
    return model(sample, T, text=conditions["text"], context=conditions["context"], split=split)


@pytest.mark.parametrize(
    ("depth", "width", "heads", "millions"),
    [(12, 384, 6, 32.6), (12, 768, 12, 129.8), (24, 1024, 16, 457.1), (28, 1152, 16, 674.0)],
)
def test_papers_sizes_have_their_parameter_counts(depth: int, width: int, heads: int, millions: float) -> None:
    with torch.device("meta"):
        model = DiT(DiTConfig(depth=depth, width=width, heads=heads, text_width=None))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.002)


@pytest.mark.parametrize(
    ("preset", "size", "motion", "content"),
    [
        (CMD_SD21, (64, 128), 384, 128),
        (CMD_SD21, (64, 64), 256, 64),
        (CMD_SD15, (64, 64), 256, 256),
        (CMD_SD15, (32, 32), 128, 64),
        (CMD_UCF, (64, 64), 256, 256),
    ],
)
def test_papers_settings_have_their_token_counts(
    preset: ModelConfig, size: tuple[int, int], motion: int, content: int
) -> None:
    assert preset.motion is not None and preset.autoencoder is not None
    config = replace(preset.motion, width=16, heads=1, depth=1, text_width=None)
    model, counts = DiT(config), []
    for part in (model.embed_context, model.embed_sample, model.blocks[0]):
        part.register_forward_hook(lambda *arguments: counts.append(arguments[2].shape[1]))
    rows, columns = (side // preset.autoencoder.patch for side in size)
    z = torch.zeros(1, config.in_channels, preset.frames, columns + rows)
    context = torch.zeros(1, preset.autoencoder.channels, *size)
    output = model(z, torch.zeros(1), context=context, split=columns)
    assert counts == [content, motion, motion + content]
    assert output.shape == (1, 2 * config.in_channels, *z.shape[2:])


def test_new_model_outputs_zero() -> None:
    assert not predict(DiT(MOTION)).any()
    labels = torch.tensor([1, 6])
    assert not DiT(IMAGE)(torch.randn(2, 3, 4, 6), T, labels=labels).any()


@pytest.mark.parametrize("learned", [True, False])
def test_learned_sigma_doubles_the_channels(learned: bool) -> None:
    output = predict(build(replace(MOTION, learned_sigma=learned)))
    assert output.shape == (2, 10 if learned else 5, 4, 10)


def test_positions_are_sines_and_cosines_of_the_grid() -> None:
    table = grid_positions(3, 5, 16, torch.empty(0, dtype=torch.float64)).view(3, 5, 16)
    for row in range(3):
        for column in range(5):
            expected = [
                wave(position * 10000 ** (-i / 4))
                for position in (row, column)
                for wave in (math.sin, math.cos)
                for i in range(4)
            ]
            assert table[row, column].tolist() == pytest.approx(expected)


def test_image_model_sees_a_rectangle_as_it_is() -> None:
    model, labels = build(IMAGE), torch.tensor([1, 2])
    image = torch.randn(2, 3, 4, 6)
    output = model(image, T, labels=labels)
    assert output.shape == (2, 6, 4, 6)
    # the same patches in the same order, laid out as another rectangle
    patches = image.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)  # (B, C, L, 2, 2)
    other = patches.unflatten(2, (3, 2)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 6, 4)
    other_output = model(other, T, labels=labels).unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)
    same_order = output.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)
    assert (other_output - same_order).abs().max() > 1e-3


def test_width_and_height_parts_of_the_motion_are_told_apart() -> None:
    # equal content at equal indices of two equal parts: only the part's kind differs
    model = build(MOTION)
    half = torch.randn(2, 5, 4, 6)
    across, down = predict(model, torch.cat((half, half), dim=-1)).split(6, dim=-1)
    assert (across - down).abs().max() > 1e-3


def test_swapped_parts_of_the_motion_are_noticed() -> None:
    model = build(MOTION)
    across, down = SAMPLE.split((6, 4), dim=-1)
    swapped = predict(model, torch.cat((down, across), dim=-1))
    assert (swapped.roll(6, dims=-1) - predict(model)).abs().max() > 1e-3
    # swapped tokens under the swapped split are still not the same motion
    swapped = predict(model, torch.cat((down, across), dim=-1), split=4)
    assert (swapped.roll(6, dims=-1) - predict(model)).abs().max() > 1e-3


@pytest.mark.parametrize("split", [0, 5, 10, 12])
def test_split_that_cuts_no_patches_is_rejected(split: int) -> None:
    with pytest.raises(ValueError, match=f"split {split} "):
        predict(DiT(MOTION), split=split)


def test_sizes_that_are_not_whole_patches_are_rejected() -> None:
    model = DiT(MOTION)
    with pytest.raises(ValueError, match="3x10 is not a multiple of the patch 2"):
        predict(model, SAMPLE[:, :, :3])
    with pytest.raises(ValueError, match="8x10 is not a multiple of the patch 4"):
        predict(model, context=CONDITIONS["context"][..., :10])
    with pytest.raises(ValueError, match="width 24 is not a multiple of heads 5"):
        DiT(replace(MOTION, heads=5))


def test_wrong_conditions_are_rejected() -> None:
    model = DiT(MOTION)
    with pytest.raises(ValueError, match="needs text"):
        model(SAMPLE, T, context=CONDITIONS["context"], split=6)
    with pytest.raises(ValueError, match="takes no labels"):
        model(SAMPLE, T, labels=T, split=6, **CONDITIONS)
    with pytest.raises(ValueError, match="needs split"):
        model(SAMPLE, T, **CONDITIONS)
    with pytest.raises(ValueError, match="needs labels"):
        DiT(IMAGE)(torch.randn(2, 3, 4, 6), T)


def test_every_condition_changes_the_prediction_of_its_own_sample_only() -> None:
    model = build(MOTION)
    before = predict(model)
    for name, value in CONDITIONS.items():
        changed = value.clone()
        changed[1] += 1
        difference = (predict(model, **{name: changed}) - before).abs().amax(dim=(1, 2, 3))
        assert difference[0] < 1e-4 < 1e-3 < difference[1], name


def test_text_joins_as_the_mean_of_its_tokens() -> None:
    model = build(MOTION)
    shuffled = CONDITIONS["text"][:, [2, 0, 1]].repeat(1, 2, 1)
    torch.testing.assert_close(predict(model, text=shuffled), predict(model), rtol=1e-3, atol=1e-4)


def test_null_class_has_a_row_of_its_own() -> None:
    model = build(IMAGE)
    image = torch.randn(1, 3, 4, 6).expand(7, -1, -1, -1)
    outputs = model(image, torch.full((7,), 5), labels=torch.arange(7))
    distances = torch.cdist(outputs.flatten(1), outputs.flatten(1))
    assert (distances + torch.eye(7) > 1e-3).all()


def test_batch_of_two_equals_two_batches_of_one() -> None:
    model = build(MOTION).double()
    sample, conditions = SAMPLE.double(), {k: v.double() for k, v in CONDITIONS.items()}
    both = model(sample, T, split=6, **conditions)
    for i in (0, 1):
        rows = slice(i, i + 1)
        one = model(sample[rows], T[rows], split=6, **{k: v[rows] for k, v in conditions.items()})
        torch.testing.assert_close(both[rows], one)


def test_autocast_stays_close() -> None:
    model = build(MOTION)
    with torch.autocast("cpu", torch.bfloat16):
        low = predict(model)
    assert (low - predict(model)).norm() < 0.05 * predict(model).norm()


def fused_gelu(bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
    """What CUDA does: cuBLASLt's GELU, and PyTorch's in its place, are by tanh."""
    assert use_gelu
    return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")


def test_an_mlp_is_gelu_by_tanh_where_the_product_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = Mlp(12).requires_grad_(False), torch.randn(2, 5, 12)
    plain = mlp(x)
    assert torch.equal(plain, mlp[2](F.gelu(mlp[0](x), approximate="tanh")))
    monkeypatch.setattr(dit, "_fuses_gelu", lambda x, layer: True)
    # a CPU's is by erf
    assert torch.equal(mlp(x), mlp[2](F.gelu(mlp[0](x))))
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mlp(x))
    monkeypatch.setattr(torch, "_addmm_activation", fused_gelu)
    torch.testing.assert_close(mlp(x), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpus_product_fuses_gelu_by_tanh(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = Mlp(72).cuda().requires_grad_(False)
    x = torch.randn(2, 77, 72, device="cuda", dtype=dtype)
    calls, run = [], torch._addmm_activation

    def note(*inputs: Tensor, use_gelu: bool) -> Tensor:
        calls.append(use_gelu)
        return run(*inputs, use_gelu=use_gelu)

    monkeypatch.setattr(torch, "_addmm_activation", note)
    exact, ours = mlp.to(dtype).double()(x.double()), mlp.to(dtype)(x)
    assert calls == [True]
    plain = nn.Sequential.forward(mlp, x)
    largest = exact.abs().max() * torch.finfo(dtype).eps
    assert (ours - exact).abs().max() <= max(2 * (plain - exact).abs().max(), largest)
    # with a gradient, in float32 and under autocast it is the layers
    mlp(x.requires_grad_()).sum().backward()
    mlp.float()(x.float())
    with torch.autocast("cuda", dtype), torch.no_grad():
        mlp(x)
    assert calls == [True]


def test_saved_model_comes_back_exactly(tmp_path: Path) -> None:
    model = build(MOTION)
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    assert again.config == MOTION
    torch.testing.assert_close(predict(again), predict(model), rtol=0, atol=0)


def test_whitened_text_is_the_mean_state_through_what_was_measured() -> None:
    model, text = build(replace(MOTION, text_whitened=True)), CONDITIONS["text"]
    model.text_mean.copy_(text.mean(dim=(0, 1)))
    model.text_whitening.copy_(torch.diag(torch.arange(7.0)))
    assert not model.pool(text)[:, 0].any()
    torch.testing.assert_close(model.pool(text)[:, 3], 3 * (text.mean(dim=1) - text.mean(dim=(0, 1)))[:, 3])
    plain = build(MOTION)
    plain.load_state_dict(model.state_dict(), strict=False)
    white = ((text.mean(dim=1) - text.mean(dim=(0, 1))) * torch.arange(7.0))[:, None]
    torch.testing.assert_close(predict(model), predict(plain, text=white))
