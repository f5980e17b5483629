import pytest
import torch
from torch import Tensor

from cmdgen.config import NoiseConfig
from cmdgen.diffusion.guidance import guide
from cmdgen.diffusion.samplers import SAMPLERS, Sampling

POSITIVE, NEGATIVE = torch.full((2, 3), 2.0), torch.full((2, 3), -1.0)
CONTEXT = torch.tensor([[10.0], [20.0]])
X, T = torch.randn(2, 4, 3, 5), torch.full((2,), 7)


def predict(x: Tensor, t: Tensor, text: Tensor, context: Tensor) -> Tensor:
    """Depends on every argument of its own sample and on nothing else."""
    shift = text.mean(dim=1) + context[:, 0] + t
    return (x + shift.view(-1, 1, 1, 1)).sin()


class Counting:
    def __init__(self, channels: int = 4) -> None:
        self.batches: list[int] = []
        self.channels = channels

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, context: Tensor) -> Tensor:
        self.batches.append(x.shape[0])
        assert x.shape[0] == t.shape[0] == text.shape[0] == context.shape[0]
        return predict(x, t, text, context).repeat(1, self.channels // 4, 1, 1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0, 7.5])
def test_guided_prediction_extrapolates_on_every_channel(scale: float) -> None:
    model = Counting()
    guided = guide(model, scale, (POSITIVE, CONTEXT), (NEGATIVE, CONTEXT))(X, T)
    given, without = predict(X, T, POSITIVE, CONTEXT), predict(X, T, NEGATIVE, CONTEXT)
    torch.testing.assert_close(guided, without + scale * (given - without))
    assert model.batches == [4]


def test_scale_one_is_one_conditional_forward() -> None:
    model = Counting()
    guided = guide(model, 1.0, (POSITIVE, CONTEXT), (NEGATIVE, CONTEXT))(X, T)
    assert torch.equal(guided, predict(X, T, POSITIVE, CONTEXT))
    assert model.batches == [2]


def test_kept_context_alone_gives_no_guidance() -> None:
    guided = guide(predict, 5.0, (POSITIVE, CONTEXT), (POSITIVE, CONTEXT))(X, T)
    torch.testing.assert_close(guided, predict(X, T, POSITIVE, CONTEXT))


def test_learned_variance_comes_from_the_positive_branch() -> None:
    guided = guide(Counting(8), 3.0, (POSITIVE, CONTEXT), (NEGATIVE, CONTEXT))(X, T)
    given, without = predict(X, T, POSITIVE, CONTEXT), predict(X, T, NEGATIVE, CONTEXT)
    torch.testing.assert_close(guided[:, :4], without + 3 * (given - without))
    assert torch.equal(guided[:, 4:], given)


def test_guidance_combines_in_the_precision_of_the_sample() -> None:
    guided = guide(lambda x, t, text: text[:, :, None, None].bfloat16(), 7.5, (POSITIVE,), (NEGATIVE,))(X[:, :3], T)
    assert guided.dtype == torch.float32 and guided[0, 0, 0, 0] == -1 + 7.5 * 3


def test_unequal_numbers_of_conditions_are_rejected() -> None:
    with pytest.raises(ValueError, match="2 positive conditions, 1 negative"):
        guide(predict, 2.0, (POSITIVE, CONTEXT), (NEGATIVE,))


@pytest.mark.parametrize("name", SAMPLERS)
def test_outside_of_its_interval_guidance_is_off_and_costs_nothing(name: str) -> None:
    noise = NoiseConfig(timestep_spacing="trailing")
    seen: list[tuple[int, int]] = []

    def model(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen.append((int(t[0]), len(x)))
        return (x * text.mean(dim=1).view(-1, 1, 1, 1)).sin()

    def run(interval: tuple[int, int] | None, scale: float = 3.0) -> Tensor:
        denoise = guide(model, scale, (POSITIVE,), (NEGATIVE,), interval=interval)
        generators = [torch.Generator() for _ in X]
        return SAMPLERS[name](denoise, X, Sampling(noise, 10, generators))

    everywhere, nowhere = run((0, 999)), run((1000, 1000))
    assert torch.equal(everywhere, run(None))
    assert torch.equal(nowhere, run(None, scale=1.0))
    seen.clear()
    between = run((299, 699))
    # trailing: 999, 899 ... 99
    assert seen == [(t, 4 if 299 <= t <= 699 else 2) for t in range(999, 0, -100)]
    assert not torch.allclose(between, everywhere) and not torch.allclose(between, nowhere)
