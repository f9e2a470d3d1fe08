"""Where learning of a range starts, and the fake quantization that passes it gradients: the paper's formulas."""

import math

import hypothesis.strategies as st
import torch
from hypothesis import assume, given
from observing import UINT6, batches, either, found, given_spec
from strategies import formats
from torch import Tensor

from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerTensor
from fxquant.numerics.learned import LSQ, LSQPlus, learned_fake_quantize, scale_of, to_learn, to_range
from fxquant.numerics.least_error import GoldenMSE

# Where learning starts


@given(batches())
def test_lsq_starts_at_its_published_step_unless_the_data_ends_before(data):
    x, form = torch.cat(data).double(), IntAffine(4)
    lo, hi = found(LSQ(), data, PerTensor(), form)
    step = 2 * x.abs().mean().item() / math.sqrt(form.qmax)
    assert math.isclose(hi, min(step * form.qmax, max(x.max().item(), 0)), rel_tol=1e-6, abs_tol=1e-30)
    assert math.isclose(lo, max(-step * form.qmax, min(x.min().item(), 0)), rel_tol=1e-6, abs_tol=1e-30)


@given(batches())
def test_lsq_plus_starts_three_deviations_from_the_mean(data):
    x = torch.cat(data).double()
    lo, hi = found(LSQPlus(), data, PerTensor())
    reach = 3 * x.std(correction=0).item()
    tolerance = 1e-6 * x.abs().max().item()
    assert math.isclose(hi, min(x.mean().item() + reach, x.max().item()), abs_tol=tolerance)
    assert math.isclose(lo, max(x.mean().item() - reach, x.min().item()), abs_tol=tolerance)


# Learning


seeds = st.integers(0, 2**32 - 1)


@st.composite
def parameters(draw: st.DrawFn, form: IntAffine, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor | None]:
    """log_scale and zero_point, the latter beside the grid as well."""
    generator = torch.Generator().manual_seed(draw(seeds))
    log_scale = torch.rand(shape, generator=generator) * 20 - 15
    if form.symmetric:
        return log_scale, None
    return log_scale, torch.rand(shape, generator=generator) * (form.qmax + 20) - 10


@given(either, formats, st.data())
def test_the_learned_value_is_that_of_the_format(granularity, form, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    log_scale, zero_point = data.draw(parameters(form, () if granularity == PerTensor() else (3,)))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    x = (torch.randn(5, 3, generator=generator) * log_scale.exp() * form.qmax).to(dtype)
    assume(x.isfinite().all())
    qparams = form.from_range(-1.0, 1.0)._replace(scale=scale_of(log_scale))
    if zero_point is not None:
        qparams = qparams._replace(zero_point=zero_point.round().clamp(0, form.qmax).int())
    plain = form.decode(form.encode(x, qparams, granularity), qparams, granularity, dtype)
    learned = learned_fake_quantize(x, log_scale, zero_point, form, granularity)
    assert learned.dtype == dtype and torch.equal(learned, plain)


@given(either, formats, st.data())
def test_the_gradients_are_those_of_the_paper(granularity, form, data):
    shape = () if granularity == PerTensor() else (3,)
    log_scale, zero_point = data.draw(parameters(form, shape))
    log_scale = log_scale.double().requires_grad_()
    zero_point = None if zero_point is None else zero_point.double().requires_grad_()
    generator = torch.Generator().manual_seed(data.draw(seeds))
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64) * log_scale.detach().exp() * form.qmax
    x.requires_grad_()
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    (learned_fake_quantize(x, log_scale, zero_point, form, granularity) * weight).sum().backward()

    scale = log_scale.detach().exp()
    zero = 0 if zero_point is None else zero_point.detach().round().clamp(0, form.qmax)
    v = x.detach() / scale
    code = v.round() + zero
    inside = (code >= form.qmin) & (code <= form.qmax)
    of_scale = torch.where(inside, v.round() - v, code.clamp(form.qmin, form.qmax) - zero)
    of_zero = torch.where(inside, 0, -scale)
    damping = 1 / math.sqrt(5 * (3 if granularity == PerTensor() else 1) * form.qmax)

    def shared(elements: Tensor) -> Tensor:
        return granularity.reduce(torch.sum, elements * weight).reshape(shape) * damping

    assert torch.allclose(log_scale.grad, shared(of_scale * scale), rtol=1e-10, atol=1e-12 * scale.max())
    assert torch.allclose(x.grad, weight * inside, rtol=1e-12, atol=0)
    if zero_point is not None:
        assert torch.allclose(zero_point.grad, shared(of_zero), rtol=1e-10, atol=1e-12 * scale.max())


@given(formats, st.floats(-3, 3), seeds)
def test_the_gradient_of_the_scale_is_that_of_differences_while_no_code_changes(form, log_scale, seed):
    """Rounding held where it is, out(s) = clamp(x / s + r) s has the slope that is learned by."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.tensor(log_scale, dtype=torch.float64, requires_grad=True)
    zero_point = None if form.symmetric else torch.tensor(float(form.qmax // 3), dtype=torch.float64)
    zero = 0.0 if zero_point is None else zero_point.item()
    codes = torch.randint(form.qmin - 3, form.qmax + 4, (11,), generator=generator) - zero
    x = (codes + torch.rand(11, generator=generator, dtype=torch.float64) * 0.8 - 0.4) * at.detach().exp()
    learned_fake_quantize(x, at, zero_point, form, PerTensor()).sum().backward()
    held = codes - x / at.detach().exp()

    def out(log_scale: float) -> float:
        s = math.exp(log_scale)
        return ((((x / s + held) + zero).clamp(form.qmin, form.qmax) - zero) * s).sum().item()

    # a code at an end of the grid has two slopes; hold it a little inside, as the straight-through clamp does
    assume(not ((codes + zero == form.qmin) | (codes + zero == form.qmax)).any())
    step = 1e-6
    slope = (out(log_scale + step) - out(log_scale - step)) / (2 * step)
    assert math.isclose(at.grad.item() * math.sqrt(11 * form.qmax), slope, rel_tol=1e-5, abs_tol=1e-5 * math.exp(log_scale))


def test_more_elements_damp_the_gradient_by_their_root():
    def gradient(copies: int) -> float:
        log_scale = torch.tensor(-1.0, requires_grad=True)
        x = torch.linspace(-1, 2, 7).repeat(copies)
        learned_fake_quantize(x, log_scale, None, IntAffine(4), PerTensor()).sum().backward()
        assert log_scale.grad is not None
        return log_scale.grad.item()

    assert math.isclose(gradient(16), 4 * gradient(1), rel_tol=1e-5)


@given(st.floats(-1e4, 1e4))
def test_a_learned_scale_is_positive_wherever_it_goes(log_scale):
    scale = scale_of(torch.tensor(log_scale))
    assert scale.isfinite() and scale >= torch.finfo(torch.float32).tiny


@given(st.integers(1, 8), st.floats(-1e4, 1e4))
def test_a_learned_zero_point_stays_in_the_grid(bits, zero_point):
    form = IntAffine(bits, symmetric=False)
    lo, hi = to_range(torch.tensor(0.0), torch.tensor(zero_point), form)
    zero = form.from_range(lo, hi).zero_point
    assert zero is not None and zero == min(max(round(zero_point), 0), form.qmax)
    assert learned_fake_quantize(torch.zeros(3), torch.tensor(0.0), torch.tensor(zero_point), form, PerTensor()).eq(0).all()


def test_a_zero_point_that_left_the_grid_can_learn_its_way_back():
    zero_point = torch.tensor(-4.0, requires_grad=True)
    learned_fake_quantize(-torch.ones(3), torch.tensor(-3.0), zero_point, UINT6, PerTensor()).sum().backward()
    assert zero_point.grad is not None and zero_point.grad < 0  # descent raises it, towards the grid and a lower sum


@given(formats, st.data())
def test_what_was_learned_becomes_a_range_and_comes_back(form, data):
    log_scale, zero_point = data.draw(parameters(form, (3,)))
    qparams = form.from_range(*to_range(log_scale, zero_point, form))
    scale = scale_of(log_scale)
    assert (qparams.scale >= scale.nextafter(torch.zeros(()))).all()
    assert (qparams.scale <= scale.nextafter(torch.tensor(torch.inf))).all()
    if zero_point is not None:
        assert torch.equal(qparams.zero_point, zero_point.round().clamp(0, form.qmax).int())


@given(either, batches(), formats)
def test_learning_starts_where_the_observer_stopped(granularity, data, form):
    lo, hi = found(LSQPlus(), data, granularity, form)
    log_scale, zero_point = to_learn(lo, hi, form)
    qparams = form.from_range(lo, hi)
    assert torch.allclose(scale_of(log_scale), qparams.scale, rtol=1e-5)
    assert (zero_point is None) == form.symmetric
    assert zero_point is None or torch.equal(zero_point.int(), qparams.zero_point)


def test_learning_finds_what_a_search_finds():
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) ** 3
    log_scale, zero_point = to_learn(*found(LSQPlus(), [x], PerTensor()), UINT6)
    assert zero_point is not None
    log_scale.requires_grad_()
    zero_point.requires_grad_()
    optimizer = torch.optim.Adam([log_scale, zero_point], lr=0.05)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = (learned_fake_quantize(x, log_scale, zero_point, UINT6, PerTensor()) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    searched = given_spec(UINT6, PerTensor(), *found(GoldenMSE(), [x], PerTensor())).fake_quantize(x)
    assert losses[-1] < 1.1 * (searched - x).square().mean() < 0.2 * losses[0]
