"""What follows a product on a GPU: which nodes become the end of its kernel, what its program says, that it means the same."""

import inspect
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from blocks import D, data, quantized
from graphs import distance, ops, run
from torch import Tensor, fx

from fxquant.backend.kernels import KERNELS
from fxquant.backend.lower import lower
from fxquant.backend.triton import launch
from fxquant.backend.triton.fuse_epilogue import BINARY, GEMMS, UNARY, arguments, fuse_epilogues
from fxquant.backend.triton.program import OPS, Program
from fxquant.graph.fold import fold
from fxquant.graph.fuel import Fuel
from fxquant.graph.spelling import FAMILIES

PRODUCT = torch.ops.fxquant.a8_gemm.default


def lowered(fn: Callable[..., object], recipe: str = "no transforms", *, dynamic: bool = True) -> fx.GraphModule:
    """``fn`` in float32 with the kernels for GPUs, whose ops run their plain PyTorch meaning, and nothing fused."""
    gm = quantized(fn, "cpu", recipe=recipe, dynamic=dynamic)
    with patch.object(launch, "why_not", lambda where: ""):
        lower(gm, KERNELS, Fuel())
    return gm


def programs(gm: fx.GraphModule) -> list[str]:
    return [arguments(node)["program"] for node in gm.graph.find_nodes(op="call_function", target=PRODUCT)]


def square_and_divide(x, WQ):
    return F.linear(x, WQ).square() / 3.0


def residual_of_another_lead(x, WQ, BO):
    return x + (F.linear(x, WQ, BO) * 0.5).relu()


def row_and_scalar(x, WQ):
    y = F.linear(x, WQ)
    return y * x.amax(-1, keepdim=True) + x.amax()


def one_value_twice(x, WQ):
    y = F.linear(x, WQ)
    return y * torch.sigmoid(1.702 * y)


def soft_cap(x, WQ):
    return torch.tanh(F.linear(x, WQ) / 30.0) * 30.0


def two_residuals(x, WQ, BO):
    return F.linear(x, WQ) + x + (x - BO)


def gate_first(x, WG, WU):
    return F.silu(F.linear(x, WG)) * F.linear(x, WU)


def up_first(x, WU, WG):
    up = F.linear(x, WU)
    return up * F.gelu(F.linear(x, WG))


def gate_with_biases(x, WG, WU, BU):
    return F.relu(F.linear(x, WG, BU)) * F.linear(x, WU, BU)


def sum_scaled(x, WQ):
    return torch.add(x, F.linear(x, WQ), alpha=0.25)


def clamped(x, WQ):
    return F.linear(x, WQ).clamp(-0.5, 0.25).neg()


def gate_of_halves(x, WU):
    gate, up = F.linear(x, WU).chunk(2, -1)
    return F.silu(gate) * up


def gate_of_slices_with_bias(x, WU, BU):
    y = F.linear(x, WU, BU)
    return y[..., D:] * F.gelu(y[..., :D])


def gate_of_a_split(x, WU):
    value, gate = torch.split(F.linear(x, WU), D, dim=-1)
    return x + value * torch.sigmoid(gate)


FUSES = {
    square_and_divide: ["t0 = square(y0); t1 = div(t0, 3.0)"],
    residual_of_another_lead: ["t0 = add(y0, column0); t1 = mul(t0, 0.5); t2 = relu(t1); t3 = add(full1, t2)"],
    row_and_scalar: ["t0 = mul(y0, row0); t1 = add(t0, scalar1)"],
    one_value_twice: ["t0 = mul(y0, 1.702); t1 = sigmoid(t0); t2 = mul(y0, t1)"],
    soft_cap: ["t0 = div(y0, 30.0); t1 = tanh(t0); t2 = mul(t1, 30.0)"],
    two_residuals: ["t0 = add(y0, full0); t1 = add(t0, full1)"],
    gate_first: ["t0 = silu(y0); t1 = mul(t0, y1)"],
    up_first: ["t0 = gelu(y1); t1 = mul(y0, t0)"],
    gate_with_biases: ["t0 = add(y0, column0); t1 = relu(t0); t2 = add(y1, column0); t3 = mul(t1, t2)"],
    sum_scaled: ["t0 = mul(y0, 0.25); t1 = add(full0, t0)"],
    clamped: ["t0 = maximum(y0, -0.5); t1 = minimum(t0, 0.25); t2 = neg(t1)"],
    gate_of_halves: ["t0 = silu(y0); t1 = mul(t0, y1)"],
    gate_of_slices_with_bias: ["t0 = add(y0, column0); t1 = gelu(t0); t2 = add(y1, column1); t3 = mul(t2, t1)"],
    gate_of_a_split: ["t0 = sigmoid(y1); t1 = mul(y0, t0); t2 = add(full0, t1)"],
}


def test_what_is_pointwise_ends_the_kernel_and_means_the_same() -> None:
    def blocks(x, WQ, BO, WG, WU, BU):  # in one graph, which is traced once
        given = locals()
        return tuple(f(*(given[name] for name in inspect.signature(f).parameters)) for f in FUSES)

    gm = lowered(blocks)
    values = data(gm)
    before = run(gm, values)
    fuse_epilogues(gm, Fuel())
    gm.graph.lint()
    assert programs(gm) == [program for expected in FUSES.values() for program in expected]
    assert distance(before, run(gm, values)) < 1e-6
    assert run(gm, data(gm, (3, 7, D)))[0].shape[:2] == (3, 7)  # other numbers than the symbols stood for


def product_read_twice(x, WQ):
    y = F.linear(x, WQ)
    return y, y.relu()


def mean_of_itself(x, WQ):
    y = F.linear(x, WQ)
    return y - y.mean(-1, keepdim=True)


def written_to_later(x, WQ):
    y = F.linear(x, WQ)
    z = y + x
    x.add_(1.0)
    return z


def broadcast_in_the_middle(x, WQ):
    return F.linear(x, WQ) + x[:, :1]


def pair_of_other_activations(x, WG, WU):
    return F.silu(F.linear(x, WG)) * F.linear(x + 1.0, WU)


def gate_that_others_read(x, WG, WU):
    g = F.silu(F.linear(x, WG))
    return g * F.linear(x, WU), g


def halves_that_stay_apart(x, WU):
    a, b = F.linear(x, WU).chunk(2, -1)
    return F.silu(a), b


def halves_read_whole_too(x, WU):
    y = F.linear(x, WU)
    a, b = y.chunk(2, -1)
    return F.silu(a) * b, y


def unequal_parts(x, WU):
    a, b = torch.split(F.linear(x, WU), [100, 156], dim=-1)
    return F.silu(a), b


def every_other(x, WU):
    y = F.linear(x, WU)
    return F.silu(y[..., ::2]) * y[..., 1::2]


def one_half_twice(x, WU):
    y = F.linear(x, WU)
    return F.silu(y[..., :D]) * y[..., :D]


def grows_the_batch(x, BO, WQ):
    return F.linear(x[:1], WQ) + x


STAYS = {
    product_read_twice: [""],
    mean_of_itself: [""],
    broadcast_in_the_middle: [""],
    pair_of_other_activations: ["", "t0 = silu(y0); t1 = mul(t0, full0)"],
    gate_that_others_read: ["t0 = silu(y0)", "t0 = mul(full0, y0)"],
    halves_that_stay_apart: [""],
    halves_read_whole_too: [""],
    unequal_parts: [""],
    every_other: [""],
    one_half_twice: [""],
    grows_the_batch: [""],
}


def test_what_is_not_pointwise_or_is_read_elsewhere_stays() -> None:
    def blocks(x, WQ, BO, WG, WU, BU):
        given = locals()
        return tuple(f(*(given[name] for name in inspect.signature(f).parameters)) for f in STAYS)

    gm = lowered(blocks, dynamic=False)
    values = data(gm)
    before = run(gm, values)
    fuse_epilogues(gm, Fuel())
    assert programs(gm) == [program for expected in STAYS.values() for program in expected]
    assert distance(before, run(gm, values)) < 1e-6


def test_an_operand_that_is_written_to_is_read_before() -> None:
    gm = lowered(written_to_later, dynamic=False)
    values = data(gm)
    before = run(gm, values)
    assert fuse_epilogues(gm, Fuel()) == []
    assert distance(before, run(gm, values)) < 1e-6


def test_every_op_that_is_recognised_is_one_of_a_program_and_means_the_same() -> None:
    def applied(target: torch._ops.OpOverload, y: Tensor, x: Tensor) -> Tensor:
        if target in UNARY:
            return target(y)
        return target(y, x if str(target._schema.arguments[1].type) == "Tensor" else 0.5)

    def block(x, WQ):
        return tuple(applied(target, F.linear(x, WQ).square() + 0.5, x) for target in (*UNARY, *BINARY))  # positive, for roots

    gm = lowered(block, dynamic=False)
    values = data(gm)
    before = run(gm, values)
    fuse_epilogues(gm, Fuel())
    found = [Program.parse(program).steps[-1].op for program in programs(gm)]
    assert found == [*UNARY.values(), *BINARY.values()]
    assert set(found) <= set(OPS)
    assert distance(before, run(gm, values)) < 1e-6


@pytest.mark.parametrize("recipe", ["static", "static symmetric"])
def test_between_two_static_products_only_codes_are_stored(recipe: str) -> None:
    def block(x, WU, BU, WD):
        return F.linear(F.gelu(F.linear(x, WU, BU)), WD)

    gm = lowered(block, recipe)
    values = data(gm)
    before = run(gm, values)
    fuse_epilogues(gm, Fuel())
    up, down = gm.graph.find_nodes(op="call_function", target=PRODUCT)
    assert up.meta["val"].dtype is torch.int8
    assert "round" in arguments(up)["program"]
    read = arguments(down)["q"]
    while FAMILIES.get(read.target) == "view":
        read = read.args[0]
    assert read is up
    assert ops(gm)["gelu"] == 0
    assert torch.equal(*before, *run(gm, values))


def test_fuel_stops_the_growth_of_products() -> None:
    gm = lowered(gate_that_others_read)
    fuel = Fuel(1)
    fuse_epilogues(gm, fuel)
    assert len(fuel.log) == 1
    assert sorted(programs(gm)) == ["", "t0 = silu(y0)"]


@pytest.mark.parametrize("recipe", ["W3A8", "ternary", "W4A16", "W8A16"])
def test_halves_of_packed_weights_are_cut_with_their_scales(recipe: str) -> None:
    def block(x, WU):
        gate, up = F.linear(x, WU).chunk(2, -1)
        return F.silu(gate) * up

    gm = quantized(block, "cpu", torch.float16 if recipe.endswith("16") else torch.float32, recipe)
    with patch.object(launch, "why_not", lambda where: ""):
        lower(gm, KERNELS, Fuel())
    values = data(gm)
    before = run(gm, values)
    fuse_epilogues(gm, Fuel())
    gm.graph.lint()
    (product,) = [node for node in gm.graph.nodes if node.target in GEMMS]
    assert len(arguments(product)["weights"]) in (4, 6) and not ops(gm)["chunk"]
    assert distance(before, run(gm, values)) < (2e-3 if recipe.endswith("16") else 1e-6)
    assert not {"narrow", "slice", "clone"} & set(ops(fold(gm).runtime))  # cut once, with the weights


def test_without_fuel_halves_stay_one_product() -> None:
    gm = lowered(gate_of_halves)
    before = gm.code
    assert fuse_epilogues(gm, Fuel(0)) == []
    gm.recompile()
    assert gm.code == before
