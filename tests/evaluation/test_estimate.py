import pytest

from cmdgen.config import SampleConfig
from cmdgen.evaluation.estimate import EFFICIENCY, estimate
from cmdgen.evaluation.flops import count_sampling
from cmdgen.evaluation.profile import Limits
from cmdgen.pipeline import TextToVideo

# copies that take no time
LIMITS = Limits(flops_per_second=1e9, bytes_per_second=1e30)


@pytest.fixture(scope="module")
def model(tiny_model):
    return TextToVideo.load(tiny_model)


def test_an_estimate_is_of_the_operations_and_weights_of_a_run(model, tiny_model):
    found = estimate(model, SampleConfig(), LIMITS, batch=2)
    assert "parts" not in vars(model)
    counted = count_sampling(model.config, batch=2)
    assert found.flops == sum(stage.flops for stage in counted.values())
    assert found.seconds == pytest.approx(found.flops / 1e9 / EFFICIENCY)
    # headers aside
    files = sum(path.stat().st_size for path in tiny_model.rglob("*.safetensors"))
    assert files * 0.8 < found.weights < files
    assert found.memory > found.weights


def test_larger_clips_take_more_and_rehash_less(model):
    base = estimate(model, SampleConfig(steps=8, motion_steps=8), LIMITS)
    large = estimate(model, SampleConfig(steps=8, motion_steps=8, width=96, height=64), LIMITS)
    assert large.flops > 3.5 * base.flops and large.activations > 2 * base.activations
    listed = SampleConfig(steps=8, motion_steps=8, rehash_steps=((0, 4), (0, 4)))
    assert estimate(model, listed, LIMITS).flops < 0.9 * base.flops
