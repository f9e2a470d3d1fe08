"""Calls that became one op compute what they computed, to the last bit, and nothing is read before or after it should be."""

import math
import warnings
from operator import getitem
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import needs_library
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.backend.chain_calls import chain_calls
from fxquant.backend.cpu import low_bit, ops
from fxquant.backend.cpu.chain import OPS, Value, chain, chain_reference, sentence
from fxquant.graph.fuel import Fuel

pytestmark = needs_library
K = 64


def weight(seed: int, n: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-127, 128, (n, K), dtype=torch.int8, generator=generator)
    scale, bias = torch.rand(n, generator=generator) / 500, torch.randn(n, generator=generator)
    return ops.pack_panels(w), scale, w.sum(1, dtype=torch.int32), bias


def low_bit_weight(seed: int) -> low_bit.Packed:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (K, K), dtype=torch.int8, generator=generator)
    return low_bit.pack(codes, torch.rand(K, 2, generator=generator) / 50, None, 4, 32)


WEIGHTS, LOW_BIT = [weight(seed) for seed in range(8)], [low_bit_weight(seed) for seed in range(8)]  # outside of what is traced


def product(x: Tensor, seed: int) -> Tensor:
    y: Tensor = ops.linear(*ops.quantize_rows(x, 8, False), *WEIGHTS[seed], K, "gelu", x.dtype)
    return y


def rows(x: Tensor, seed: int) -> Tensor:
    *codes, total, _ = ops.linear_rows(
        *ops.quantize_rows(x, 8, True), *WEIGHTS[seed], K, "none", x.dtype,
        x, None, "layer", None, None, 1e-5, 6, False, True, False,
    )  # fmt: skip
    y: Tensor = low_bit.linear_u8(*codes, *LOW_BIT[seed], None, 4, 32, K, "none", x.dtype)
    return y + total if seed % 2 else y


def attended(x: Tensor, seed: int) -> Tensor:
    columns = [list(column) for column in zip(*WEIGHTS[seed : seed + 3], strict=True)]
    columns[3][seed % 3] = None  # of no bias
    codes = ops.attend(*ops.quantize_rows(x, 8, False), *columns, 4, x.dtype, None, bool(seed % 2), 0.25, 8, False)
    y: Tensor = ops.linear(*codes, *WEIGHTS[seed], K, "none", x.dtype)
    return y


def few_bits(x: Tensor, seed: int) -> Tensor:
    y: Tensor = low_bit.linear_float(x, *LOW_BIT[seed], None, 4, 32, K, "silu", x.dtype)
    return y


def heads(x: Tensor, seed: int) -> Tensor:
    q = x.unflatten(-1, (4, 16)).transpose(1, 2)
    k = q[:, : 1 + seed % 2 * 3]
    y: Tensor = ops.attention(q, k, k, None, False, 0.25).transpose(1, 2).flatten(2)
    return y


def written(x: Tensor, seed: int) -> Tensor:
    y = x.clone()
    z = product(y, seed)
    y.mul_(0.5)
    return z + product(y, seed)


def noisy(x: Tensor, seed: int) -> Tensor:
    return x + torch.rand_like(x)


STEPS = (product, rows, attended, few_bits, heads, written, lambda x, seed: x + 0.5, noisy)


def traced(steps: list[tuple[int, int, int]]) -> tuple[fx.GraphModule, Tensor]:
    """A graph in which each step reads the result that it names, counted back; all that nothing reads comes out."""

    def forward(x: Tensor) -> list[Tensor]:
        values, read = [x], set()
        for i, seed, back in steps:
            source = max(0, len(values) - 1 - back)
            read.add(source)
            values.append(STEPS[i](values[source], seed))
        return [y for i, y in enumerate(values) if i not in read]

    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(0))
    return make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)(x), x


@given(st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=6))
def test_a_graph_computes_the_same_to_the_last_bit(steps: list[tuple[int, int, int]]) -> None:
    gm, x = traced(steps)
    calls = [n for n in gm.graph.nodes if n.target in OPS.values()]
    torch.manual_seed(0)
    expected = [y.clone() for y in gm(x.clone())]
    count = chain_calls(gm, Fuel())
    gm.graph.lint()
    chained = gm.graph.find_nodes(op="call_function", target=chain)
    left = [n for n in gm.graph.nodes if n.target in OPS.values()]
    assert len(left) == len(calls) - count and (count >= 2 * len(chained) > 0 or count == 0)
    torch.manual_seed(0)
    assert all(torch.equal(y, wanted) for y, wanted in zip(gm(x.clone()), expected, strict=True))
    for node in chained:
        given, program = node.args
        assert not set(program) & {"\n", '"', "\\"}  # it may become a literal of C++
        shapes = [(v.shape, v.stride(), v.dtype) for v in node.meta["val"]]
        assert shapes == [(v.shape, v.stride(), v.dtype) for v in chain_reference([n.meta["val"] for n in given], program)]


def test_what_stands_between_and_reads_nothing_comes_before() -> None:
    gm, x = traced([(0, 1, 0), (6, 0, 1), (0, 2, 1)])  # a product, a sum of what it read, and a product of the product
    expected = gm(x)
    assert chain_calls(gm, Fuel()) == 4
    assert len(gm.graph.find_nodes(op="call_function", target=chain)) == 1 and all(map(torch.equal, gm(x), expected))


@pytest.mark.parametrize("back", [0, 1])
def test_who_reads_a_result_ends_the_run(back: int) -> None:
    """Though the next call reads something else: no result of a long run waits in memory for a reader."""
    gm, x = traced([(0, 1, 0), (6, 0, 0), (0, 2, back)])
    expected = gm(x)
    assert chain_calls(gm, Fuel()) == 4
    assert len(gm.graph.find_nodes(op="call_function", target=chain)) == 2 and all(map(torch.equal, gm(x), expected))


def test_outputs_that_are_taken_late_or_twice() -> None:
    gm, x = traced([(0, 1, 0), (0, 2, 0)])
    first, *_ = [n for n in gm.graph.nodes if n.target in OPS.values()]
    (returned,) = gm.graph.output_node().args
    with gm.graph.inserting_before(gm.graph.output_node()):
        late = [gm.graph.call_function(getitem, (first, i)) for i in (1, 1, 2)]
    for node, i in zip(late, (1, 1, 2), strict=True):
        node.meta["val"] = first.meta["val"][i]
    gm.graph.output_node().args = ([*returned, *late],)
    gm.recompile()
    expected = gm(x)
    assert chain_calls(gm, Fuel()) == 4
    (node,) = gm.graph.find_nodes(op="call_function", target=chain)
    assert len(node.meta["val"]) == 3 and all(map(torch.equal, gm(x), expected))


def test_a_whole_number_where_the_op_wants_another() -> None:
    def forward(q: Tensor) -> Tensor:
        y: Tensor = ops.attention(ops.attention(q, q, q, None, False, 1), q, q, None, False, 2)
        return y

    q = torch.randn(1, 2, 4, 16)
    gm = make_fx(forward, tracing_mode="fake")(q)
    for node in gm.graph.find_nodes(op="call_function", target=ops.attention):
        node.update_arg(5, int(node.args[5]))
    assert chain_calls(gm, Fuel()) == 2 and torch.equal(gm(q), forward(q))


def test_no_locale_changes_a_number() -> None:
    """In some a number has a comma where C has a point."""
    for x in (1e-5, 0.25, -0.0, 5e-324, math.inf):
        assert "." not in (word := sentence("return", [x])) and "," not in word
    q = torch.randn(3, 1, 2, 4, 16)
    program = sentence("attention", [Value(0), Value(1), Value(2), None, False, 0.75]) + "; return %3"
    assert torch.equal(chain([*q], program)[0], ops.attention(*q, None, False, 0.75))


def test_without_fuel_nothing_is_chained() -> None:
    gm, _ = traced([(0, 1, 0), (0, 2, 0)])
    assert chain_calls(gm, Fuel(0)) == 0 and not gm.graph.find_nodes(op="call_function", target=chain)


def test_every_op_can_be_called() -> None:
    """Each with its own arguments, against itself; of linear_gated and the gated ones of low_bit, which no step above has."""
    x = torch.randn(3, K)
    codes = ops.quantize_rows(x, 8, False)
    gate = low_bit.pack(torch.randint(-2, 2, (2 * K, K), dtype=torch.int8), torch.rand(2 * K, 1), None, 2, K)
    given: dict[str, list[object]] = {
        "quantize_rows_u8": [x, 8, False],
        "normalize_rows_u8": [x, x, torch.rand(K), "rms", torch.rand(K), None, 1e-6, 8, False, True, True],
        "linear_u8s8": [*codes, *weight(1), K, "relu", torch.bfloat16],
        "linear_rows_u8s8": [
            *codes, *weight(1), K, "silu", torch.float16, None, None, "none", None, None, 0.1, 4, True, False, True,
        ],
        "linear_gated_u8s8": [*codes, *weight(1, 2 * K), K, "silu", torch.float32, 8, False],
        "attention": [*torch.randn(3, 2, 4, 6, 16), torch.rand(2, 1, 1, 6) > 0.2, False, 0.3],
        "attend_u8s8": [*(t[None] for t in codes), *([w] * 3 for w in weight(2)), 2, torch.float32, None, True, 0.3, 8, False],
        "low_bit_linear_u8": [*codes, *low_bit_weight(1), None, 4, 32, K, "none", torch.float32],
        "low_bit_linear_float": [x, *low_bit_weight(1), torch.randn(K), 4, 32, K, "gelu_tanh", torch.float32],
        "low_bit_gated_u8": [*codes, *gate, None, 2, K, K, "silu", torch.float32],
        "low_bit_gated_float": [x, *gate, None, 2, K, K, "silu", torch.float32],
    }  # fmt: skip
    assert given.keys() == OPS.keys()
    for name, arguments in given.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PyTorch says so if an op returns one tensor twice
            expected = OPS[name](*arguments)
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        tensors: list[Tensor] = []

        def numbered(a: object, tensors: list[Tensor] = tensors) -> object:
            if isinstance(a, Tensor):
                tensors.append(a)
                return Value(len(tensors) - 1)
            return [numbered(item) for item in a] if isinstance(a, list) else a

        called = sentence(name, [numbered(a) for a in arguments])
        expected = [(i, y) for i, y in enumerate(expected) if y.numel()]  # results that nobody asked for may be one tensor
        program = f"{called}; {sentence('return', [Value(len(tensors) + i) for i, _ in expected])}"
        wanted = [y for _, y in expected]
        assert all(map(torch.equal, chain(tensors, program), wanted)), name
        assert all(map(torch.equal, chain_reference(tensors, program), wanted)), name
        torch.library.opcheck(chain, (tensors, program), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("quantize_rows_u8 %0 i8 b0; return %4", "value 4, which there is not"),
        ("quantize_rows_u8 %3 i8 b0; return %1", "value 3, which there is not"),
        ("quantize_rows_u8 %0 f4020000000000000 b0; return %1", "kind f where i is needed"),
        ("quantize_rows_u8 %0 i8 b0 b0; return %1", "more arguments than a call takes"),
        ("quantize_rows_u8 %0; return %1", r"kind \. where i is needed"),
        ("quantize %0 i8 b0; return %1", "no op 'quantize' that a program may call"),
        ("quantize_rows_u8 %0 ?8 b0; return %1", r"the word '\?8', which is no argument"),
    ],
)
def test_a_program_that_makes_no_sense_is_refused(program: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        chain([torch.ones(1, K)], program)


@pytest.mark.parametrize("x", [object(), "two words", "a;b", "", 1j])
def test_what_no_program_can_hold(x: object) -> None:
    with pytest.raises(TypeError, match="a program cannot hold"):
        sentence("return", [x])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.up, self.down = (nn.Linear(K, K) for _ in range(6))
        self.first, self.second = nn.LayerNorm(K), nn.LayerNorm(K)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], 4, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.first(x + self.out(y))
        z: Tensor = self.second(x + self.down(nn.functional.gelu(self.up(x))))
        return z


def last_of(folder: Path, pattern: str) -> str:
    """The file of the graph that was compiled last: Dynamo may have begun anew."""
    return max(folder.glob(f"*/{pattern}"), key=lambda path: int(path.parent.name.removeprefix("graph"))).read_text()


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_all_layers_of_an_encoder_are_one_op_but_for_the_end(tmp_path: Path, dynamic: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer(), Layer()).eval(), torch.randn(2, 7, K)
    outputs, texts = [], []
    for i, fuel in enumerate((None, -1)):
        torch._dynamo.reset()
        if fuel is not None:  # all rewrites but the two chains
            fuel = len(last_of(tmp_path / "0", "rewrites.txt").splitlines()) - 2
        options = {"trace": str(tmp_path / str(i)), "fuel": fuel}
        outputs.append(torch.compile(model, backend="outlierq", options=options, dynamic=dynamic)(x))
        texts.append(last_of(tmp_path / str(i), "*_chained.py"))
    # Nothing is quantized behind the last norm: its residual is scaled by an op of PyTorch, which stands before two products.
    assert texts[0].count("torch.ops.fxquant.chain.default(") == texts[0].count("torch.ops.fxquant.") == 2
    assert "torch.ops.fxquant.chain" not in texts[1] and texts[1].count("torch.ops.fxquant.") > 10
    assert torch.equal(*outputs)
