"""Writing a function into a graph: what is traced once is as good as what is traced each time."""

import pytest
import torch
from graphs import graph_of, run, values_of
from torch import Tensor

from fxquant.graph.rewrite import replace

aten = torch.ops.aten


def test_equal_rewrites_traced_once_compute_what_each_should() -> None:
    def model(x: Tensor, W: Tensor, V: Tensor) -> Tensor:
        return torch.relu(x @ W) - torch.relu(x @ V)

    gm = graph_of(model, (4, 8), (8, 8), (8, 8))
    values = values_of(gm)
    wanted = run(gm, values)
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.relu.default)):
        replace(gm, node, lambda x: (x + x.abs()) / 2, *node.args, memo="relu")
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.div.Tensor)):  # its inputs came out of one trace
        replace(gm, node, lambda x, y: x / y, *node.args, memo="div")
    sub = next(iter(gm.graph.find_nodes(op="call_function", target=aten.sub.Tensor)))
    replace(gm, sub, lambda a, b: a - b, *sub.args, memo="sub")
    gm.recompile()
    gm.graph.lint()
    torch.testing.assert_close(run(gm, values), wanted)


def test_a_memo_is_for_one_type_of_arguments() -> None:
    def model(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(x), torch.relu(y)

    gm = graph_of(model, (4, 8), (3, 5))
    values = values_of(gm)
    wanted = run(gm, values)
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.relu.default)):
        replace(gm, node, lambda x: x.reshape(-1).clamp_min(0).reshape(x.shape), *node.args, memo="flat")
    gm.recompile()
    torch.testing.assert_close(run(gm, values), wanted)


@pytest.mark.parametrize("numbers", [(2, 2.0), (2.0, 2), (True, 1.0)])
def test_a_memo_tells_equal_numbers_of_different_types_apart(numbers: tuple[float, float]) -> None:
    gm = graph_of(lambda x, y: (torch.relu(x), torch.relu(y)), *[torch.ones(4, dtype=torch.int64)] * 2)
    for node, number in zip(list(gm.graph.find_nodes(op="call_function", target=aten.relu.default)), numbers, strict=True):
        replace(gm, node, lambda x, k: x * k, *node.args, number, memo="times")
    gm.recompile()
    dtypes = [torch.float32 if type(number) is float else torch.int64 for number in numbers]
    assert [y.dtype for y in run(gm, values_of(gm))] == dtypes
