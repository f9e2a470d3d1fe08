"""The matcher: what counts as the same spelling, what does not, and what it says then."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from graphs import graph_of, result
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from fxquant.graph.match import Match, Miss, Pattern, one_of, pattern
from fxquant.graph.weights import depends_on_parameters_only, parameter_only


@pattern(x=(2, 8), w=(8,))
def scaled_tanh(x: Tensor, w: Tensor, c: float) -> Tensor:
    return w * torch.tanh(c * x) * x


@pattern(x=(2, 8))
def half_tanh(x: Tensor) -> Tensor:
    return torch.tanh(0.5 * x)


@pattern(x=(2, 8), y=(2, 8))
def difference(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(x - y)


def found(p: Pattern, gm: fx.GraphModule) -> Match:
    match = p.match(result(gm))
    assert isinstance(match, Match), match
    return match


def missed(p: Pattern, gm: fx.GraphModule) -> Miss:
    miss = p.match(result(gm))
    assert isinstance(miss, Miss)
    return miss


def inputs(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("right", [False, True], ids=["(ab)c", "a(bc)"])
def test_a_product_matches_in_any_order_and_association(order: tuple[int, ...], right: bool) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        a, b, c = ([x, w, torch.tanh(3.0 * x)][i] for i in order)
        return a * (b * c) if right else (a * b) * c

    gm = graph_of(fn, (4, 8), (8,))
    match = found(scaled_tanh, gm)
    assert [match.x, match["w"]] == inputs(gm)
    assert match.c == 3.0
    assert match.root is result(gm) and len(match.covered) == 4


def test_a_variable_that_occurs_twice_is_one_node() -> None:
    gm = graph_of(lambda x, y, w: w * torch.tanh(3.0 * x) * y, (4, 8), (4, 8), (8,))
    miss = missed(scaled_tanh, gm)
    assert not miss and "would be both" in miss.reason


HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "x / 2": lambda x: x / 2,
    "x * 0.5": lambda x: x * 0.5,
    "0.25 (2 x)": lambda x: 0.25 * (x * 2),
    "x / 4 * 2": lambda x: x / 4 * 2,
    "-(-x / 2)": lambda x: -(-x / 2),
}


@pytest.mark.parametrize("spelling", HALVES)
def test_numbers_multiply_however_they_are_written(spelling: str) -> None:
    half = HALVES[spelling]
    assert found(half_tanh, graph_of(lambda x: torch.tanh(half(x)), (3, 8)))


@given(st.floats(1e-3, 1e3))
def test_another_number_is_a_miss_that_names_both(c: float) -> None:
    gm = graph_of(lambda x: torch.tanh(x * c), (3, 8))
    outcome = half_tanh.match(result(gm))
    assert bool(outcome) == math.isclose(c, 0.5, rel_tol=1e-8)
    assert outcome or "0.5 is needed" in str(outcome)


def test_a_sum_is_not_a_difference() -> None:
    assert found(difference, graph_of(lambda x, y: torch.exp(0.0 + x - y), (3, 8), (3, 8)))
    assert not difference.match(result(graph_of(lambda x, y: torch.exp(x + y), (3, 8), (3, 8))))


@pytest.mark.parametrize("inner", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("outer", [torch.float32, torch.bfloat16])
def test_casts_between_floats_may_be_anywhere(inner: torch.dtype, outer: torch.dtype) -> None:
    gm = graph_of(lambda x: torch.tanh((x.to(inner) * 0.5).to(outer)), (3, 8), dtype=torch.bfloat16)
    match = found(half_tanh, gm)
    assert match.x in inputs(gm)


def test_a_variable_does_not_read_through_a_cast_that_rounds() -> None:
    gm = graph_of(lambda x: torch.tanh(x.to(torch.bfloat16) * 0.5), (3, 8))
    assert found(half_tanh, gm).x not in inputs(gm)


def tanh_of(gm: fx.GraphModule) -> fx.Node:
    found: list[fx.Node] = [n for n in gm.graph.nodes if n.target is torch.ops.aten.tanh.default]
    return found[0]


def test_a_second_reader_of_an_inner_node_forbids_the_match() -> None:
    gm = graph_of(lambda x: ((half := 0.5 * x), torch.tanh(half)), (3, 8))
    miss = half_tanh.match(tanh_of(gm))
    assert isinstance(miss, Miss) and "is also read by 'output', outside of the half_tanh" in miss.reason
    assert Pattern(half_tanh.fn, half_tanh.examples, shared=True).match(tanh_of(gm))


def test_the_root_may_have_any_number_of_readers() -> None:
    gm = graph_of(lambda x: ((y := torch.tanh(0.5 * x)), y + 1, y * 2), (3, 8))
    assert half_tanh.match(tanh_of(gm))


def test_a_node_that_is_written_in_place_is_not_matched() -> None:
    def fn(x: Tensor) -> Tensor:
        half = 0.5 * x
        half.view(-1).add_(1)
        return torch.tanh(half)

    assert "is written in place by 'add_'" in missed(half_tanh, graph_of(fn, (3, 8))).reason


@pytest.mark.parametrize("when", ["before", "meanwhile", "after"])
def test_a_variable_may_be_written_before_or_after_but_not_meanwhile(when: str) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        if when == "before":
            x.add_(1)
        y = torch.tanh(3.0 * x) * x
        if when == "meanwhile":
            x.add_(1)
        z = torch.neg(w * y)
        if when == "after":
            x.add_(1)
        return z

    root = result(graph_of(fn, (4, 8), (8,))).args[0]
    assert isinstance(root, fx.Node)
    match = scaled_tanh.match(root)
    assert bool(match) == (when != "meanwhile")
    assert match or "is written in place by 'add_' meanwhile" in str(match)


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,
    "widened": Tensor.double,
    "a copy of a copy": lambda x: x.double().clone(),
}


@pytest.mark.parametrize("written", ["the source", "the copy"])
@pytest.mark.parametrize("when", ["never", "before", "meanwhile", "after"])
@pytest.mark.parametrize("copy", COPIES)
def test_a_variable_reads_the_source_of_a_copy_unless_either_was_written_since(copy: str, when: str, written: str) -> None:
    def fn(x: Tensor) -> Tensor:
        if when == "before":
            x.view(-1).add_(1)
        y = COPIES[copy](x)
        changed = x if written == "the source" else y
        if when == "meanwhile":
            changed.view(-1).add_(1)
        z = torch.neg(torch.tanh(0.5 * y))
        if when == "after":
            changed.view(-1).add_(1)
        return z

    gm = graph_of(fn, (3, 8))
    root = result(gm).args[0]
    assert isinstance(root, fx.Node)
    match = half_tanh.match(root)
    assert bool(match) == (when != "meanwhile")
    if match:
        assert match.x in inputs(gm)
    else:
        assert "is written in place by 'add_'" in str(match)


def test_a_copy_that_others_read_as_well_does_not_forbid_the_match() -> None:
    gm = graph_of(lambda x: ((y := x.double()) * 2, torch.tanh(0.5 * y)), (3, 8))
    assert half_tanh.match(tanh_of(gm))


def test_one_of_tells_which_spelling_was_taken_and_leaves_the_rest_unbound() -> None:
    @pattern(x=(2, 8), w=(8,))
    def maybe(x: Tensor, w: Tensor) -> Tensor:
        y = torch.tanh(x)
        return one_of(gain=y * w, plain=y)

    with_gain = found(maybe, graph_of(lambda x, w: torch.tanh(x) * w, (2, 8), (8,)))
    without = found(maybe, graph_of(lambda x: torch.tanh(x), (2, 8)))
    assert (with_gain.taken, without.taken) == (("gain",), ("plain",))
    assert without.w is None
    with pytest.raises(KeyError, match="has no variable 'v'"):
        without["v"]
    assert not hasattr(without, "v")


def test_dims_count_from_either_end_and_shapes_are_not_compared() -> None:
    @pattern(x=(2, 3, 8))
    def centred(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)).transpose(-1, -2).reshape(2, 24)

    assert found(centred, graph_of(lambda x: (x - x.mean(2, True)).permute(0, 2, 1).reshape(5, -1), (5, 6, 7)))
    assert "'dim' of" in missed(centred, graph_of(lambda x: (x - x.mean(1, True)).mT.reshape(5, -1), (5, 6, 7))).reason


def test_a_check_refuses_with_its_sentence() -> None:
    @pattern(lambda m: Miss("'{}' is odd", m.x, 0, (m.x,)), x=(2, 8))
    def refused(x: Tensor) -> Tensor:
        return torch.tanh(x)

    gm = graph_of(lambda x: torch.tanh(x), (2, 8))
    miss = missed(refused, gm)
    assert miss.reason == f"'{inputs(gm)[0]}' is odd" and miss.node is inputs(gm)[0]


def test_the_nearest_miss_is_the_deepest() -> None:
    @pattern(x=(2, 8))
    def either(x: Tensor) -> Tensor:
        return one_of(torch.exp(torch.tanh(torch.sin(x))), torch.exp(torch.cos(x)))

    gm = graph_of(lambda x: torch.exp(torch.tanh(torch.cos(x))), (2, 8))
    miss = missed(either, gm)
    assert miss.node is not None and miss.node.name == "cos" and miss.depth == 2
    assert "aten.sin.default is needed" in miss.reason


def test_find_gives_the_largest_first_and_no_node_twice() -> None:
    gm = graph_of(lambda x: torch.tanh(0.5 * torch.tanh(0.5 * x)), (2, 8))
    matches = list(half_tanh.find(gm))
    assert len(matches) == 2 and not matches[0].covered & matches[1].covered


def test_a_weight_depends_on_parameters_and_constants_purely() -> None:
    def fn(x: Tensor, W: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        B.add_(1)
        return torch.arange(8) * W + 1, x * W, torch.rand_like(W), B * 2, torch.zeros(8)

    gm = graph_of(fn, (8,), (8,), (8,))
    nodes = gm.graph.output_node().all_input_nodes  # pure, mixed, random, written, constant
    weights = parameter_only(gm)
    assert [n in weights for n in nodes] == [True, False, False, False, True]
    assert [depends_on_parameters_only(n) for n in nodes] == [True, False, False, False, False]
