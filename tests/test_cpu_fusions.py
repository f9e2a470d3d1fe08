"""What is joined and fused on a CPU, between the products and with them; the numbers stay what they were, to the last bit."""

import pytest
import torch
import torch.nn.functional as F
from blocks import COUNTS, NORMS, Block, D, data, quantized
from graphs import distance, ops, run
from instruction_sets import needs_library
from torch import Tensor

from fxquant.backend.cpu import ops as cpu
from fxquant.backend.fuse_norms import fuse_norms
from fxquant.backend.fuse_products import fuse_products
from fxquant.backend.join_products import join_gates, join_products
from fxquant.backend.kernels import KERNELS
from fxquant.backend.lower import lower
from fxquant.graph.fuel import Fuel

pytestmark = needs_library


@pytest.mark.parametrize("block", NORMS)
def test_norms_fuse_with_their_quantization_and_products_with_both(block: Block) -> None:
    plain, ours = quantized(block, "cpu"), quantized(block, "cpu")
    lower(ours, KERNELS, Fuel())
    before = run(ours, data(ours))
    assert fuse_norms(ours, Fuel()) is not None and ops(ours)["normalize_rows_u8"] == COUNTS[block][0]
    apart = run(ours, data(ours))
    fuse_products(ours, Fuel())
    ours.graph.lint()
    ours.recompile()
    assert ops(ours)["linear_rows_u8s8"] > 0
    assert torch.equal(*run(ours, data(ours)), *apart)
    for other in (before, run(plain, data(plain))):
        assert distance(other, apart) < 1e-6


def test_rows_that_are_viewed_in_another_shape_before_they_are_quantized_stay_apart() -> None:
    def block(x, G, B, WU):
        h = F.layer_norm(x, (D,), G, B).reshape(-1, D)
        return F.linear(h, WU), h

    gm = quantized(block, "cpu", recipe="W8A8", dynamic=False)
    lower(gm, KERNELS, Fuel())
    before = run(gm, data(gm))
    (miss,) = fuse_norms(gm, Fuel())
    gm.recompile()
    assert "viewed in another shape" in miss.reason and ops(gm)["normalize_rows_u8"] == 0
    assert all(map(torch.equal, run(gm, data(gm)), before))


def test_the_scale_that_a_transform_leaves_on_a_shortcut_goes_along() -> None:
    def block(x, G, B, WU, WD, G2, B2, WO):
        h = F.layer_norm(x, (D,), G, B)
        return F.linear(F.layer_norm(F.linear(F.linear(h, WU), WD) + h, (D,), G2, B2), WO)

    gm = quantized(block, "cpu")
    lower(gm, KERNELS, Fuel())
    fuse_norms(gm, Fuel())
    apart, between = run(gm, data(gm)), ops(gm)["mul"]
    fuse_products(gm, Fuel())
    gm.graph.lint()
    gm.recompile()
    (scaled,) = [n for n in gm.graph.nodes if n.target is cpu.linear_rows and n.args[10] is not None]
    assert scaled.args[11] is not None and ops(gm)["mul"] == between - 1
    assert torch.equal(*run(gm, data(gm)), *apart)


GATED = {  # block -> whether it becomes one op
    "gate first": (lambda x, WG, WU, WD: F.linear(F.silu(F.linear(x, WG)) * F.linear(x, WU), WD), True),
    "gate last": (lambda x, WG, WU, WD: F.linear(F.linear(x, WU) * F.gelu(F.linear(x, WG)), WD), True),
    "no activation": (lambda x, WG, WU, WD: F.linear(F.linear(x, WG) * F.linear(x, WU), WD), True),
    "two activations": (lambda x, WG, WU, WD: F.linear(F.silu(F.linear(x, WG)) * F.silu(F.linear(x, WU)), WD), False),
    "other codes": (lambda x, WG, WU, WD: F.linear(F.silu(F.linear(x.sin(), WG)) * F.linear(x, WU), WD), False),
    "broadcast": (lambda x, WG, WU, WD: F.linear(F.silu(F.linear(x, WG)) * F.linear(x[:1], WU), WD), False),
    "the square of one": (lambda x, WG, WU, WD: F.linear((y := F.linear(x, WG)) * y, WD) + F.linear(x, WU)[..., :D], False),
    "read by others": (lambda x, WG, WU, WD: ((y := F.silu(F.linear(x, WG))).sum(), F.linear(y * F.linear(x, WU), WD)), False),
    "one bias": (lambda x, WG, WU, BU, WD: F.linear(F.silu(F.linear(x, WG)) * F.linear(x, WU, BU), WD), False),
    "two biases": (lambda x, WG, WU, BU, WD: F.linear(F.silu(F.linear(x, WG, BU)) * F.linear(x, WU, BU), WD), True),
}


@pytest.mark.parametrize("block", GATED)
def test_a_gate_what_it_lets_through_and_their_codes_become_one_op(block: str) -> None:
    fn, fuses = GATED[block]
    gm = quantized(fn, "cpu", recipe="W8A8", dynamic=False)
    lower(gm, KERNELS, Fuel())
    before = run(gm, data(gm))
    misses = fuse_products(gm, Fuel())
    gm.graph.lint()
    gm.recompile()
    assert ops(gm)["linear_gated_u8s8"] == fuses
    assert fuses or any(miss.reason for miss in misses)
    assert all(map(torch.equal, run(gm, data(gm)), before))


@pytest.mark.parametrize("recipe", ["W4A8", "W4A16"])
@pytest.mark.parametrize("block", GATED)
def test_a_gate_of_low_bit_weights_and_what_it_lets_through_become_one_op(block: str, recipe: str) -> None:
    fn, joins = GATED[block]
    gm = quantized(fn, "cpu", recipe=recipe, dynamic=False)
    lower(gm, KERNELS, Fuel())
    before = run(gm, data(gm))
    misses = join_gates(gm, Fuel())
    gm.graph.lint()
    gm.recompile()
    assert ops(gm)["low_bit_gated_u8" if recipe == "W4A8" else "low_bit_gated_float"] == joins
    assert joins or any(miss.reason for miss in misses)
    assert all(map(torch.equal, run(gm, data(gm)), before))


def test_a_gate_and_what_it_lets_through_of_other_bits_stay_apart() -> None:
    gm = quantized(GATED["gate first"][0], "cpu", recipe="W4A8, WU W2", dynamic=False)
    lower(gm, KERNELS, Fuel())
    reasons = [miss.reason for miss in join_gates(gm, Fuel())]
    assert any("have other bits and groups: (4, 128) and (2, 64)" in reason for reason in reasons)
    assert ops(gm)["low_bit_gated_u8"] == 0 and ops(gm)["low_bit_linear_u8"] == 3


def heads(y: Tensor) -> Tensor:
    return y.view(*y.shape[:-1], -1, 32).transpose(1, 2)


def attention_of(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [heads(F.linear(x, w)) for w in weights]


JOINED = {  # block -> how many products are left
    "queries, keys and values": (lambda x, WQ, WG, WU: sum(h.sum(1).sum(-1) for h in attention_of(x, WQ, WG, WU)), 1),
    "others read between them": (lambda x, WQ, WG: (y := F.linear(x, WQ).exp()) + (F.linear(x, WG) * y.sum())[..., :D], 1),
    "with biases": (lambda x, WG, WU, BU: F.linear(x, WG, BU).cos() + F.linear(x, WU, BU).sin(), 1),
    "other inputs": (lambda x, WG, WU: F.linear(x, WG).cos() + F.linear(x.sin(), WU).sin(), 2),
    "other epilogues": (lambda x, WG, WU: F.silu(F.linear(x, WG)).cos() + F.linear(x, WU).sin(), 2),
    "a bias and none": (lambda x, WG, WU, BU: F.linear(x, WG, BU).cos() + F.linear(x, WU).sin(), 2),
    "no whole panels": (lambda x, WG, WN: F.linear(x, WG)[..., : D - 8] + F.linear(x, WN).sin(), 2),
    "rows are viewed as one": (lambda x, WG, WU: F.linear(x, WG).view(-1).sum() + F.linear(x, WU).sin(), 2),
    "one is returned": (lambda x, WG, WU: (heads(F.linear(x, WG)), F.linear(x, WU).sin()), 2),
    "one is written to": (lambda x, WG, WU: ((y := F.linear(x, WG))[..., :4].mul_(2).sum() + y) * F.linear(x, WU).sin(), 2),
    "strides are asked for": (lambda x, WG, WU: F.linear(x, WG).as_strided((2, 2), (1, 1)).sum() + F.linear(x, WU).sin(), 2),
}


@pytest.mark.parametrize("recipe", ["W8A8", "W4A8", "W4A16"])
@pytest.mark.parametrize("block", JOINED)
def test_products_of_the_same_input_become_one(block: str, recipe: str) -> None:
    fn, left = JOINED[block]
    gm = quantized(fn, "cpu", recipe=recipe, dynamic=False)
    lower(gm, KERNELS, Fuel())
    fuse_products(gm, Fuel())
    before = run(gm, data(gm))
    misses = join_products(gm, Fuel())
    gm.graph.lint()
    gm.recompile()
    counts = ops(gm)
    assert sum(counts[op] for op in ("linear_u8s8", "low_bit_linear_u8", "low_bit_linear_float")) == left
    assert all(miss.reason for miss in misses) and (not misses or left == 2)
    assert all(map(torch.equal, run(gm, data(gm)), before))


def test_a_product_that_others_read_too_is_not_fused_and_says_why() -> None:
    def block(x, WU, WO):
        y = F.linear(x, WU)
        return y.sin(), F.linear(y[..., :D], WO), F.linear(y.relu()[..., :D], WO)

    gm = quantized(block, "cpu", recipe="no transforms", dynamic=False)
    lower(gm, KERNELS, Fuel())
    reasons = [miss.reason for miss in fuse_products(gm, Fuel())]
    assert ops(gm)["linear_rows_u8s8"] == 0
    assert reasons and all(reasons)


def written_behind(x, WG, WU, WD):
    g, u = F.silu(F.linear(x, WG)), F.linear(x, WU)
    x.add_(1)
    return F.linear(g * u, WD) + x


def written_between(x, WG, WU, WD):
    part, g = x[..., :4], F.silu(F.linear(x, WG))
    part.add_(1)
    return F.linear(g * F.linear(x, WU), WD)


def written_between_two_that_are_added(x, WG, WU):
    part, y = x[..., :4], F.linear(x, WG)
    part.add_(1)
    return y.sin() + F.linear(x, WU).cos()


@pytest.mark.parametrize("recipe", ["W4A8", "W4A16"])
@pytest.mark.parametrize(
    ("block", "gates"), [(written_behind, True), (written_between, False), (written_between_two_that_are_added, False)]
)
def test_products_are_joined_with_what_their_input_held_when_they_read_it(block: Block, gates: bool, recipe: str) -> None:
    """Of an input that is written to, each product has codes of its own; in floating point the input itself is read."""
    gm = quantized(block, "cpu", recipe=recipe, dynamic=False)
    lower(gm, KERNELS, Fuel())
    before = run(gm, data(gm))
    misses = [*join_gates(gm, Fuel()), *join_products(gm, Fuel())]
    gm.graph.lint()
    gm.recompile()
    counts = ops(gm)
    assert (counts["low_bit_gated_u8"], counts["low_bit_gated_float"]) == (0, gates and recipe == "W4A16")
    if recipe == "W4A16" and not gates:
        assert any("is written to by 'add_'" in miss.reason for miss in misses)
    assert all(map(torch.equal, run(gm, data(gm)), before))
