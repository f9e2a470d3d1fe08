"""A convolution over patches is a linear layer; any other convolution is left alone."""

import pytest
import torch
from torch import nn

from fxquant.graph.capture import Parameter, trace
from fxquant.graph.fuel import Fuel
from fxquant.patterns.canonical import canonicalize

aten = torch.ops.aten


def traced(conv: nn.Module, x: torch.Tensor) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    names, parameters = zip(*conv.named_parameters(), strict=True)
    call = lambda x, *p: torch.func.functional_call(conv, dict(zip(names, p, strict=True)), (x,))  # noqa: E731
    mode = torch._subclasses.FakeTensorMode()
    inputs = [x, *(p.detach() for p in parameters)]
    gm = trace(call, [mode.from_tensor(t) for t in inputs], mode)
    for node, name in zip(gm.graph.find_nodes(op="placeholder")[1:], names, strict=True):
        node.meta["parameter"] = Parameter(name, "parameter")
    return gm, inputs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (lambda **k: nn.Conv1d(3, 8, 4, stride=4, **k), (2, 3, 12)),
        (lambda **k: nn.Conv2d(3, 8, (4, 2), stride=(4, 2), **k), (2, 3, 8, 6)),
        (lambda **k: nn.Conv2d(3, 8, 4, stride=4, padding="valid", **k), (2, 3, 8, 12)),
        (lambda **k: nn.Conv3d(3, 8, 2, stride=2, **k), (2, 3, 4, 6, 2)),
    ],
)
@torch.no_grad()
def test_patches_are_a_linear_layer(conv: object, shape: tuple[int, ...], bias: bool) -> None:
    module = conv(bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64)
    gm, inputs = traced(module, x)
    canonicalize(gm, Fuel())
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(aten.linear.default) == 1
    assert not any("conv" in str(t) for t in targets)
    torch.testing.assert_close(gm(*inputs), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, stride=2),
        nn.Conv2d(4, 8, 2, stride=2, padding=1),
        nn.Conv2d(4, 8, 2, stride=2, dilation=2),
        nn.Conv2d(4, 8, 2, stride=2, groups=2),
    ],
)
@torch.no_grad()
def test_windows_that_overlap_or_are_padded_stay_a_convolution(conv: nn.Module) -> None:
    gm, _ = traced(conv, torch.randn(2, 4, 12, 12))
    canonicalize(gm, Fuel())
    assert any("conv" in str(node.target) for node in gm.graph.nodes)


@torch.no_grad()
def test_a_size_that_the_window_does_not_divide_stays_a_convolution() -> None:
    gm, _ = traced(nn.Conv2d(4, 8, 4, stride=4), torch.randn(2, 4, 13, 12))
    canonicalize(gm, Fuel())
    assert any("conv" in str(node.target) for node in gm.graph.nodes)
