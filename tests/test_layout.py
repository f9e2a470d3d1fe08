"""A layout goes through an op as a tensor of channel numbers would."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxquant.graph.capture import trace
from fxquant.graph.layout import STEPS, Layout, backward, forward, forward_any

X = torch.zeros(2, 3, 12)  # batch, tokens, channels
HEADS = torch.zeros(2, 3, 2, 6)

# Each moves or copies elements; the channels are the last axis, or the last two.
MOVES = {
    "heads": (X, lambda x: x.view(2, 3, 3, 4)),
    "heads, the size left open": (X, lambda x: x.view(2, -1, 3, 4)),
    "tokens flattened": (X, lambda x: x.view(-1, 12)),
    "all flattened": (X, lambda x: x.reshape(-1)),
    "everything regrouped": (X, lambda x: x.reshape(6, 3, 4)),
    "heads joined": (HEADS, lambda x: x.reshape(2, 3, 12)),
    "heads before tokens": (HEADS, lambda x: x.transpose(1, 2)),
    "heads with the batch": (HEADS.transpose(1, 2), lambda x: x.reshape(4, 3, 6)),
    "permuted": (HEADS, lambda x: x.permute(2, 0, 3, 1)),
    "an axis more": (X, lambda x: x.unsqueeze(1)),
    "an axis less": (X[:1], lambda x: x.squeeze(0)),
    "flattened heads": (HEADS, lambda x: x.flatten(2)),
    "unflattened": (X, lambda x: x.unflatten(-1, (2, 6))),
    "expanded": (X, lambda x: x[:, None].expand(2, 5, 3, 12)),
    "repeated heads": (HEADS, lambda x: x.repeat_interleave(2, dim=2)),
    "some channels": (X, lambda x: x[..., 2:9]),
    "every other channel": (X, lambda x: x[..., ::2]),
    "some tokens": (X, lambda x: x[:, 1:]),
    "one head": (HEADS, lambda x: x[:, :, 1]),
    "one token": (X, lambda x: x[:, 0]),
    "split channels": (X, lambda x: x.split(5, -1)[2]),
    "split in sizes": (X, lambda x: x.split([4, 6, 2], -1)[1]),
    "split tokens": (X, lambda x: x.split(1, 1)[2]),
    "chunks": (X, lambda x: x.chunk(3, -1)[0]),
    "heads apart": (HEADS, lambda x: x.unbind(2)[1]),
    "tokens rolled": (X, lambda x: x.roll(1, 1)),
    "a query, key and value projection": (X, lambda x: x.view(2, 3, 3, 2, 2).permute(2, 0, 3, 1, 4)[2]),
}


def channels(x: Tensor) -> Layout:
    """Twelve channels: on the last axis, or in two heads."""
    if x.ndim == 3:
        return Layout.last(12, 3)
    return Layout(np.arange(12).reshape([1, 2, 1, 6] if x.shape[1] == 2 else [1, 1, 2, 6]))


def path(x: Tensor, move) -> list:
    """The ops of ``move`` on ``x``, in their order."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    gm = trace(move, [mode.from_tensor(x, static_shapes=True)], mode)
    found = gm.graph.find_nodes(op="placeholder")
    for n in gm.graph.nodes:
        if n.op == "call_function" and n.users and n.all_input_nodes[:1] == found[-1:]:
            found.append(n)
    return found[1:]


def through(nodes: list, layout):
    for node in nodes:
        layout = None if layout is None else forward_any(node, 0, layout)
    return layout


def spelled(layout: Layout, x: Tensor) -> Tensor:
    """The channel of every element of ``x``."""
    return torch.from_numpy(np.broadcast_to(layout.index, x.shape).copy())


@pytest.mark.parametrize("name", MOVES)
def test_a_layout_moves_as_the_elements_do(name):
    x, move = MOVES[name]
    expected = move(spelled(channels(x), x))
    result = through(path(x, move), channels(x))
    assert torch.equal(spelled(result, expected), expected)


@pytest.mark.parametrize("name", MOVES)
def test_the_way_back_undoes_the_way_forth(name):
    x, move = MOVES[name]
    there = channels(x)
    for node in path(x, move):
        before, there = there, forward_any(node, 0, there)
        back = backward(node, 0, there)
        # What was cut away comes back as "left alone"; the rest comes back as it was.
        if isinstance(back, Layout) and isinstance(before, Layout):
            shared = np.broadcast_arrays(back.index, before.index)
            assert ((shared[0] == shared[1]) | (shared[0] == -1)).all() and not back.untouched
        else:
            assert back is not None


# The same ops, and those that add up or fill, along the axis of the channels or with something that is no channel's.
AGAINST = {
    "channels rolled": (X, lambda x: x.roll(1, -1)),
    "everything rolled": (X, lambda x: x.roll(1)),
    "heads and tokens rolled": (HEADS, lambda x: x.roll((1, 1), (1, 2))),
    "channels turned round": (X, lambda x: x.flip(-1)),
    "heads turned round": (HEADS, lambda x: x.flip(1, 2)),
    "channels picked": (X, lambda x: x.index_select(-1, torch.tensor([3, 1, 0]))),
    "channels picked by an index": (X[0, 0], lambda x: x[torch.tensor([3, 1, 0])]),
    "channels picked beside tokens": (X[0], lambda x: x[torch.tensor([0, 1]), torch.tensor([3, 1])]),
    "channels picked by a mask": (X, lambda x: x[torch.ones(2, 3, 12, dtype=torch.bool)]),
    "channels padded": (X, lambda x: F.pad(x, (1, 1))),
    "channels cut by a negative pad": (X, lambda x: F.pad(x, (-1, 0))),
    "tokens padded with ones": (X, lambda x: F.pad(x, (0, 0, 1, 1), value=1.0)),
    "tokens padded with themselves": (X, lambda x: F.pad(x, (0, 0, 1, 1), mode="reflect")),
    "channels added up": (X, lambda x: x.sum(-1)),
    "channels added up, the axis kept": (X, lambda x: x.sum(-1, keepdim=True)),
    "the mean of tokens and channels": (X, lambda x: x.mean((1, 2), keepdim=True)),
    "everything added up": (X, lambda x: x.sum((), keepdim=True)),
    "the mean of the heads": (HEADS, lambda x: x.mean(2)),
}
BESIDE = {
    "tokens turned round": (X, lambda x: x.flip(1)),
    "tokens picked": (X, lambda x: x.index_select(1, torch.tensor([2, 0]))),
    "rows picked by an index": (X, lambda x: x[torch.tensor([1, 0])]),
    "rows picked by a mask": (X, lambda x: x[torch.ones(2, 3, dtype=torch.bool)]),
    "tokens padded": (X, lambda x: F.pad(x, (0, 0, 1, 1))),
    "heads padded by tokens": (HEADS, lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))),
    "tokens added up": (X, lambda x: x.sum(1)),
    "the mean of batch and tokens": (X, lambda x: x.mean((0, 1), keepdim=True)),
}


@pytest.mark.parametrize("name", AGAINST)
def test_an_op_along_the_channels_does_not_carry_them_on(name):
    x, move = AGAINST[name]
    layout = Layout.last(12, x.ndim) if x is not HEADS else channels(x)
    assert through(path(x, move), layout) is None


@pytest.mark.parametrize("name", {**MOVES, **BESIDE})
def test_a_scale_of_the_channels_goes_through_an_op_as_its_layout_says(name):
    x, move = {**MOVES, **BESIDE}[name]
    layout = through(path(x, move), channels(x))
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(12, generator=generator, dtype=torch.float64) + 0.5
    expected = move(numbers) * scale[spelled(layout, move(x))]
    torch.testing.assert_close(move(numbers * scale[spelled(channels(x), x)]), expected, rtol=1e-12, atol=0)


@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_a_layout_in_its_smallest_form_says_the_same(order, sizes):
    index = np.broadcast_to(np.arange(sizes[0])[:, None, None, None], sizes).transpose(order)
    small = Layout.of(index)
    assert np.array_equal(np.broadcast_to(small.index, index.shape), index)
    assert sum(n > 1 for n in small.index.shape) <= 1


def test_query_heads_that_share_a_value_head_share_its_channels():
    q, v = torch.zeros(2, 4, 3, 5), torch.zeros(2, 2, 3, 5)
    mode = FakeTensorMode()
    attention = torch.nn.functional.scaled_dot_product_attention
    gm = trace(lambda q, v: attention(q, v, v, enable_gqa=True), [mode.from_tensor(q), mode.from_tensor(v)], mode)
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    values = Layout(np.arange(10).reshape(1, 2, 1, 5))
    out = forward(node, 2, values)
    assert out.index[0, :, 0, 0].tolist() == [0, 0, 5, 5]
    assert backward(node, 2, out) == values


def test_heads_of_one_group_that_differ_have_no_way_back():
    (node,) = [n for n in path(HEADS, MOVES["repeated heads"][1]) if n.target in STEPS]
    four = Layout(np.arange(24).reshape(1, 1, 4, 6))
    assert backward(node, 0, four) is None
