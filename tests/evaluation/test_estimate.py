import pytest
import torch

from cmdgen.evaluation.estimate import EFFICIENCY, estimate
from cmdgen.evaluation.flops import count_work
from cmdgen.evaluation.profile import Limits
from cmdgen.pipelines.load import load_pipeline
from cmdgen.request import Request

# copies that take no time
LIMITS = Limits(flops_per_second=1e9, bytes_per_second=1e30)
FLOAT = torch.float32


def test_an_estimate_is_of_the_operations_and_weights_of_a_run(tiny_model):
    pipeline = load_pipeline(tiny_model)
    plan = pipeline.plan(Request(), batch=2)
    found = estimate(plan, pipeline.dtype, LIMITS, batch=2)
    assert not pipeline.loaded
    counted = count_work(plan, pipeline.dtype, batch=2)
    assert found.flops == sum(stage.flops for stage in counted.values())
    assert found.seconds == pytest.approx(found.flops / 1e9 / EFFICIENCY)
    # headers aside
    files = sum(path.stat().st_size for path in tiny_model.rglob("*.safetensors"))
    assert files * 0.8 < found.weights < files
    assert found.memory > found.weights


def test_larger_clips_take_more_and_rehash_less(pipeline):
    steps = {"steps": 8, "motion_steps": 8}
    base, large, listed = (
        estimate(pipeline.plan(Request(**steps, **more)), FLOAT, LIMITS)
        for more in ({}, {"size": (64, 96)}, {"rehash": ((0, 4), (0, 4))})
    )
    assert large.flops > 3.5 * base.flops and large.activations > 2 * base.activations
    assert listed.flops < 0.9 * base.flops
