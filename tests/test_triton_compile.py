"""Kernels compiled for GPUs that are not here: nothing spills, everything fits, the tensor cores run, loads are wide."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from fxquant.backend.triton import inspect
from fxquant.backend.triton.attention import bytes_for_each, shared
from fxquant.backend.triton.cost import by_groups, instructions, registers
from fxquant.backend.triton.gpus import COMPILED as DEVICES
from fxquant.backend.triton.inspect import CASES
from fxquant.backend.triton.tile import Choice, Tile, candidates

QUICK = (
    "residual + LayerNorm + quantize, 4096", "W8A8, M = 4096, gated pair",
    "W8A8, M = 4096, gated pair, persistent", "W8A8, M = 4096, bias, residual, persistent", "W8A8, M = 16",
    "W4A8 g128, M = 1, dp4a", "W4A8 g128, M = 16", "W3A8 g128, M = 8", "W2A8, M = 16", "W4A16 g128, M = 16", "W8A16, M = 16",
    "W4A16 NF4 g64, M = 16", "int8 attention, 4096 x 4096, D = 128",
)  # fmt: skip


def budget(on, bits):
    """Instructions per weight that ``on`` can issue while its memory delivers one of so many bits."""
    return 128 * on.processors * on.clock / on.bandwidth * bits / 8


@pytest.mark.parametrize("on", DEVICES, ids=lambda on: f"sm_{on.capability}")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c.name in QUICK else pytest.mark.slow, id=c.name) for c in CASES]
)
def test_a_kernel_compiles_to_what_its_tile_was_chosen_for(case, on):
    seen = case.inspect(on)
    assert seen.stack == 0 and seen.spills == 0
    assert seen.shared <= on.shared
    families = {opcode.split(".")[0] for opcode in seen.loop}
    if "quantize" in case.name or "the same" in case.name:
        assert any(op.startswith("LDG.E.128") for op in seen.opcodes)
        assert not any(op.startswith(("LDG.E.U8", "LDG.E.U16", "STG.E.U8", "STG.E.U16")) for op in seen.opcodes)
        return
    (asked, *_) = case.asked(on)
    if "attention" in case.name:  # both products are in the loop, and keys and values are on their way meanwhile
        hopper = on.capability >= 90 and asked.arguments["BM"] >= 64
        assert ({"IGMMA", "HGMMA"} if hopper else {"IMMA", "HMMA"}) <= families
        assert any(re.match(r"LDGSTS.*\.128", op) for op in seen.loop)
        return
    assert 0.7 < instructions(asked.problem, asked.choice.tile, on) / seen.loop.total() < 1.3
    assert 0.6 < registers(asked.problem, asked.choice.tile, on) / seen.registers < 1.6
    bits, activations = map(int, re.match(r"W(\d+)A(\d+)", case.name).groups())
    if "dp4a" in case.name:
        assert "IDP" in families and not {"IMMA", "IGMMA"} & families
        assert any(op.startswith("LDG.E.128") for op in seen.loop)
        assert seen.per_weight(case.tokens) <= budget(on, bits)
        return
    hopper = by_groups(asked.choice.tile, on)  # what the model of the cost takes it for
    assert {8: ("IMMA", "IGMMA"), 16: ("HMMA", "HGMMA")}[activations][hopper] in families
    assert hopper or on.capability < 90 or case.name == "W8A8, M = 64, gated pair"  # a low tile, for more programs at a time
    assert any(re.match(r"LDGSTS.*\.128", op) for op in seen.loop)
    if case.tokens:  # packed, and the weight goes to the tensor cores without a stop in shared memory
        # Hopper's tiles of groups against int8 store scales there, where a thread does not load those that it needs.
        scales = 2 if hopper and activations == 8 and "g128" in case.name else 0
        assert sum(n for op, n in seen.loop.items() if op.startswith("STS")) <= scales
        if "NF4" in case.name:  # 16 entries cost more than the memory of an A100 or H200 gives time for (docs/gpu.md)
            assert seen.per_weight(case.tokens) * min(1, asked.choice.tile.bm / case.tokens) <= 6.6
        else:
            assert seen.per_weight(case.tokens) <= budget(on, bits)
        if on.capability >= 90:
            assert re.search(r"wgmma\.mma_async[^;]*?\{[^}]*\}, *\n?\s*\{", seen.ptx)


LONGER = 64
"""Instructions that a step of a persistent program may issue beyond a plain one's: it tells first and last steps apart."""


@pytest.mark.parametrize("on", DEVICES, ids=lambda on: f"sm_{on.capability}")
@pytest.mark.parametrize("products", [1, 2])
def test_a_persistent_program_loads_for_the_next_tile_while_one_ends(products, on):
    def compiled(**changes):
        with FakeTensorMode():
            asked, *_ = inspect.launches(run, on, lambda problem, on: Choice(replace(tile, **changes)))
        return asked, inspect.compile_for(asked, on.capability)

    def drained(seen):
        """Whether all that was asked for has come before the result is stored."""
        return seen.ptx.rindex("cp.async.wait_group \t0;") < seen.ptx.rindex("st.global")

    run = inspect.a8_case(4096, program=PROGRAMS[products], products=products)
    tile = Tile(128, 64, 128, 8, 4, persistent=1)
    asked, walking = compiled()
    _, plain = compiled(persistent=0)
    assert asked.grid == (on.processors, 1)
    assert drained(plain) and not drained(walking)
    assert sum(walking.loop.values()) <= sum(plain.loop.values()) + LONGER
    products_of = [
        {op: n for op, n in seen.loop.items() if inspect.PRODUCT.match(op.split(".")[0])} for seen in (walking, plain)
    ]
    assert products_of[0] == products_of[1] != {}
    run = inspect.a8_case(4096, program=PROGRAMS[products], products=products, dtype=torch.float32)  # the largest end
    asked, walking = compiled(stages=2 if on.capability == 89 else 3)  # that fit
    assert walking.stack == 0 and walking.spills == 0
    assert walking.shared <= asked.problem.shared(asked.choice.tile) <= on.shared


FAMILIES = {
    "W8A8": lambda M, products: inspect.a8_case(M, program=PROGRAMS[products], products=products),
    "W4A8 g128": lambda M, products: inspect.a8_case(M, 4, 128, PROGRAMS[products], products),
    "W2A8": lambda M, products: inspect.a8_case(M, 2, program=PROGRAMS[products], products=products),
    "W4A16 g128": lambda M, products: inspect.a16_case(M, 4, True, program=PROGRAMS[products], products=products),
}
PROGRAMS = {1: inspect.RESIDUAL, 2: inspect.GATED}


@pytest.mark.slow
@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("on", DEVICES, ids=lambda on: f"sm_{on.capability}")
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tile_that_may_be_chosen_spills_or_is_too_large(family, on, products):
    def compiled(M, index):
        def choose(problem, on):
            seen.append(list(candidates(problem, on)))
            return seen[-1][index]

        seen = []
        with FakeTensorMode():
            asked, *_ = inspect.launches(FAMILIES[family](M, products), on, choose)
        return seen[-1], asked

    done = set()
    for M in (1, 16, 64, 4096):
        choices, _ = compiled(M, 0)
        for index, (tile, parts) in enumerate(choices):
            # Stages come with the most first, and cost no registers; nor does the number of persistent programs.
            same = (replace(tile, stages=0, persistent=min(tile.persistent, 1)), parts > 1)
            if parts > 2 or same in done:
                continue
            done.add(same)
            seen = inspect.compile_for(compiled(M, index)[1], on.capability)
            assert seen.stack == 0 and seen.spills == 0, (tile, parts)
            assert seen.shared <= on.shared, (tile, parts)
    assert len(done) > 4


MASKS = ((None, 0), (None, 1), ((1, torch.bool), 1), ((0, torch.bool), 1), ((0, torch.float32), 1))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("on", DEVICES, ids=lambda on: f"sm_{on.capability}")
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_no_tile_of_attention_spills_or_is_too_large(width, on, causal):
    """Where sizes divide, and where they do not; under masks of one row, and of as many as there are queries (0 here)."""
    for queries in (16, 64, 1024):
        for mask, odd in MASKS:
            rows = None if mask is None else (mask[0] or queries - odd, mask[1])
            with FakeTensorMode():
                run = inspect.attention_case(queries - odd, 1024 - odd, width, causal, rows)
                (asked,) = inspect.launches(run, on)
            seen, a = inspect.compile_for(asked, on.capability), asked.arguments
            tile = Tile(a["BM"], a["BN"], 0, asked.warps, asked.stages)
            room = shared(tile, a["WIDTH"], a["WIDTH_V"], bytes_for_each(a.get("mask")), on)
            assert seen.stack == 0 and seen.spills == 0, (queries, mask, odd, tile)
            assert seen.shared <= room <= on.shared, (queries, mask, odd, tile)


class Driver:
    """As much of a driver as Triton needs to turn a kernel into its first intermediate form."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


@pytest.mark.parametrize(
    ("T", "N", "launched"),
    [(8, 96, ["w8a8_part", "sum_of_w8a8_part", "w4a16_part", "sum_of_w4a16_part"]), (4096, 4096, ["w8a8_persistent", "w4a16"])],
)  # products of few outputs split K, and have a sum each
def test_inductor_is_shown_the_kernels_and_what_they_write(T, N, launched, monkeypatch):
    import triton
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._guards import TracingContext, tracing
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch.fx.experimental.proxy_tensor import make_fx

    def block(x, weight, q_w, scale_w, sums, packed, scale):
        ops = torch.ops.fxquant
        q, scale_x, _, total, _ = ops.layer_norm_quantize(x, x, weight, None, 1e-5, True, True, False)
        y = ops.a8_gemm(q, scale_x, None, [q_w, scale_w, sums], [], "t0 = gelu(y0)", out_dtype=torch.bfloat16)
        return y, ops.a16_gemm(total, [packed, scale], [])

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    graphs = []

    def compiler(gm, inputs):
        graphs.append(gm)
        return gm.forward

    # What the model ranks first, though it were chosen only where it was timed: a persistent tile among them.
    monkeypatch.setattr(inspect.launch, "chosen", lambda problem, on: inspect.launch.ranked(problem, on)[0])
    with FakeTensorMode() as fake:
        bf16 = dict(device="cuda", dtype=torch.bfloat16)
        inputs = (
            torch.empty(T, 4096, **bf16), torch.empty(4096, **bf16),
            torch.empty(N, 4096, device="cuda", dtype=torch.int8), torch.empty(N, device="cuda"),
            torch.empty(N, device="cuda", dtype=torch.int32),
            torch.empty(N, 1024, device="cuda", dtype=torch.int16), torch.empty(32, N, device="cuda"),
        )  # fmt: skip
        gm = make_fx(block, tracing_mode="fake")(*inputs)
    with tracing(TracingContext(fake)):
        aot_module_simplified(gm, inputs, fw_compiler=compiler, inference_compiler=compiler)
    wrapped = [n for n in graphs[0].graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    kernels = [kernel_side_table.get_kernel(n.kwargs["kernel_idx"]) for n in wrapped]
    assert [kernel.fn.__name__ for kernel in kernels] == ["row_kernel", *launched]
    assert [n.kwargs["tensors_to_clone"] for n in wrapped] == [
        ["q", "scale", "zero_point", "total"], *[["out"]] * len(launched),
    ]  # fmt: skip


def test_inductor_is_shown_attention_of_any_length_and_guards_nothing(monkeypatch):
    import triton
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._guards import TracingContext, tracing
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def attend(q, k, v, scale_q, scale_k, mask):
        y = torch.ops.fxquant.int8_attention(q, k, v, scale_q, scale_k, mask, True, 0.5)
        return (y.transpose(1, 2).flatten(2),)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    graphs = []

    def compiler(gm, inputs):
        graphs.append(gm)
        return gm.forward

    fake, example = FakeTensorMode(shape_env=ShapeEnv()), torch.empty(3, 37, 41)
    sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 3)
    B, L, T = fake.from_tensor(example, source=ConstantSource("x"), symbolic_context=sizes).shape
    with fake:
        q, k = (torch.empty(B, n, h, 64, device="cuda", dtype=torch.int8).transpose(1, 2) for n, h in ((L, 8), (T, 2)))
        v = torch.empty(B, T, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        mask = torch.empty(B, 1, 1, T, device="cuda", dtype=torch.bool)
        inputs = (q, k, v, torch.empty(B, 8, L, device="cuda"), torch.empty(B, 2, T, device="cuda"), mask)
        gm = make_fx(attend, tracing_mode="fake")(*inputs)
    with tracing(TracingContext(fake)):
        aot_module_simplified(gm, inputs, fw_compiler=compiler, inference_compiler=compiler)
    (wrapped,) = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_functional)
    assert wrapped.kwargs["tensors_to_clone"] == ["out"]
    assert not fake.shape_env.guards


def test_a_launch_is_recorded_with_every_argument_of_its_kernel():

    with FakeTensorMode():
        found = inspect.launches(inspect.a8_case(16, N=1024), DEVICES[-1])
    assert [sorted(one.arguments) == sorted(one.kernel.arg_names) for one in found] == [True, True]
    assert found[0].grid[1] == found[1].arguments["PARTS"] > 1
