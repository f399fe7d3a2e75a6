"""float8 quantisation: scales from the data, saturation, rounding."""

import math

import pytest
import torch

from headway import quant
from headway.errors import InvalidInputError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]


def values(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16).to(DEVICE)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_largest_value_meets_the_top_of_the_format(dtype, scale):
    x = values(50, 3, 24, scale=scale)
    q = quant.quantise(x, dtype)
    assert q.scale.shape == (1,)
    assert q.values.float().abs().max() == torch.finfo(dtype).max
    assert q.values.float().isfinite().all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("per", ["tensor", "head"])
def test_error_is_that_of_the_format(dtype, per):
    """Half a unit in the last place, or of the smallest step."""
    x = values(50, 3, 24)
    x[:, 1] *= 1000
    q = quant.quantise(x, dtype, per)
    assert q.scale.shape == ((1,) if per == "tensor" else (3,))
    back = quant.dequantise(q.values, q.scale)
    info = torch.finfo(dtype)
    step = q.scale.reshape(-1, 1) * info.smallest_normal * info.eps
    bound = torch.maximum(x.float().abs() * info.eps / 2, step / 2) * 1.001
    assert ((back - x.float()).abs() <= bound).all()


def test_scales_per_head_do_not_see_other_heads():
    x = values(50, 3, 24)
    alone = quant.amax_scale(x, per="head")
    x[:, 1] *= 100
    assert torch.equal(quant.amax_scale(x, per="head")[[0, 2]], alone[[0, 2]])


@pytest.mark.parametrize("dtype", FORMATS)
def test_given_scale_saturates_where_a_cast_would_overflow(dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([[top * 1.5, -top * 1e6, math.inf, -math.inf, math.nan, 1.0]], device=DEVICE)
    q = quant.quantise(x, dtype, scale=torch.ones(1, device=DEVICE)).values.float()[0].tolist()
    assert q[:4] == [top, -top, top, -top]
    assert math.isnan(q[4])
    assert q[5] == 1.0


def test_infinities_and_nan_do_not_spoil_the_scale():
    x = values(20, 2, 8)
    want = quant.amax_scale(x)
    x[3, 0, 1], x[4, 1, 2], x[5, 1, 3] = math.inf, -math.inf, math.nan
    assert torch.equal(quant.amax_scale(x), want)
    assert int(quant.quantise(x).values.float().isnan().sum()) == 1


@pytest.mark.parametrize("shape", [(4, 2, 8), (0, 2, 8)])
def test_zeros_and_nothing_have_scale_one(shape):
    q = quant.quantise(torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE), per="head")
    assert q.scale.tolist() == [1.0, 1.0]
    assert not q.values.float().any()


def test_the_smallest_values_have_a_scale_whose_reciprocal_is_a_number():
    x = torch.tensor([[0.0, 2e-37, -1e-37]], device=DEVICE)
    q = quant.quantise(x)
    assert q.scale.reciprocal().isfinite().all()
    torch.testing.assert_close(quant.dequantise(q.values, q.scale), x, rtol=1 / 8, atol=0)


def test_strided_and_batched_inputs():
    x = values(4, 6, 3, 16).transpose(0, 1)
    q = quant.quantise(x, per="head")
    same = quant.quantise(x.contiguous(), per="head")
    assert torch.equal(q.values.float(), same.values.float())
    assert q.values.shape == x.shape


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(4),), r"heads, width"),
        ((torch.zeros(4, 4, dtype=torch.int8),), "wider floating-point"),
        ((torch.zeros(4, 4).to(torch.float8_e5m2),), "wider floating-point"),
        ((torch.zeros(4, 4), torch.bfloat16), "float8 dtype"),
        ((torch.zeros(4, 4), torch.float8_e5m2, "row"), '"tensor" or "head"'),
        ((torch.zeros(4, 4), torch.float8_e5m2, "head", torch.ones(3)), "each of the 4 heads"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(InvalidInputError, match=said):
        quant.quantise(*arguments)


def test_wrong_kinds_are_named():
    x = torch.ones(3, 4, 8)
    with pytest.raises(InvalidInputError, match=r"^x: got list"):
        quant.quantise([1.0])
    with pytest.raises(InvalidInputError, match=r"^scale: got float"):
        quant.quantise(x, scale=2.0)
    with pytest.raises(InvalidInputError, match=r"^scale: got 3 elements"):
        quant.dequantise(quant.quantise(x).values, torch.ones(3))
    with pytest.raises(InvalidInputError, match="scale: got float"):
        quant.dequantise(quant.quantise(x).values, 1.0)
    assert quant.amax_scales([]) == []


@pytest.mark.parametrize("shape", [(3, 0, 8), (3, 4, 0), (0, 4, 8), (0, 0)])
@pytest.mark.parametrize("per", ["tensor", "head"])
def test_nothing_is_quantised_to_nothing(shape, per):
    values, scale = quant.quantise(torch.ones(shape), per=per)
    assert values.shape == shape
    assert scale.shape == (shape[-2] if per == "head" else 1,)
