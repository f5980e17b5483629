import pytest
import torch
import torch.nn.functional as F

from cmdgen_kernels import geglu
from cmdgen_kernels.geglu import geglu_obstacle, geglu_reference


def op(x):
    """The op, which has to take the kernel."""
    assert geglu_obstacle(x) is None
    return geglu(x)


@pytest.mark.parametrize("shape", [(3, 5, 2 * 24), (1, 2), (2, 3, 2 * 1500), (2, 1, 3, 2 * 7)])
def test_geglu_matches_the_reference(shape, dtype, device, assert_parity):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    assert_parity(op, geglu_reference, 3 * x, gradients=False)


def test_gates_pass_the_normal_distribution_to_six_digits(device):
    gate = torch.linspace(-9, 9, 4096, device=device)[:, None]
    passed = op(torch.cat((1 / gate, gate), dim=1))
    torch.testing.assert_close(passed.double(), torch.special.ndtr(gate.double()), rtol=0, atol=4e-7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gates_that_are_not_finite_give_no_finite_result(dtype, device):
    gate = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype, device=device)
    result = op(torch.cat((torch.ones_like(gate), gate)))
    assert result[0] == torch.inf and result[1:].isnan().all()


def test_gates_far_from_zero_pass_all_or_nothing(dtype, device):
    gate = torch.tensor([100.0, -100.0, 0.0], dtype=dtype, device=device)
    assert op(torch.cat((torch.ones_like(gate), gate))).tolist() == [100.0, 0.0, 0.0]


def test_the_reference_is_half_times_gelu_of_half(device):
    x = torch.randn(3, 10, dtype=torch.float64, device=device)
    assert torch.equal(geglu(x), x[:, :5] * F.gelu(x[:, 5:]))


def test_gradients_come_from_the_reference(device):
    x = torch.randn(3, 10, device=device, requires_grad=True)
    assert "gradient" in (geglu_obstacle(x) or "")
    (grad,) = torch.autograd.grad(geglu(x).sum(), x)
    assert grad.all()


def test_an_odd_width_is_refused(device):
    with pytest.raises(ValueError, match="width 5 is odd"):
        geglu(torch.zeros(2, 5, device=device))
