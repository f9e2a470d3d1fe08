"""Kernels compiled for GPUs that are not here: nothing spills, everything fits, the tensor cores run, loads are wide."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton.language as tl

from fxquant.backend.triton import inspect, launch, weight_only
from fxquant.backend.triton.inspect import CASES

DEVICES = [on for on in launch.KNOWN if on.capability != 86]
QUICK = {
    "residual + LayerNorm + quantize, 4096": "row",
    "int8, M = 4096": "product",
    "int8, M = 16, split K": "product",
    "W4A16 g128, M = 16": "product",
    "W8A16, M = 16": "product",
}
BUDGET = {4: 3.44, 8: 6.9}  # instructions per weight that an H200 issues while its memory delivers one of so many bits


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
    else:
        eight = case.name.startswith("int8")
        wanted = {True: ("IGMMA", "IMMA"), False: ("HGMMA", "HMMA")}[eight][on.capability < 90]
        assert wanted in families
        assert any(re.match(r"LDGSTS.*\.128", op) for op in seen.loop)
        if not eight and on.capability >= 90:  # the weight goes to the tensor cores without a stop in shared memory
            assert "STS" not in families or case.tokens is None
    if case.tokens:
        assert seen.per_weight(case.tokens) <= BUDGET[int(case.name[1])]


@given(
    st.lists(st.integers(0, 0xFFFF), min_size=2, max_size=2),
    st.sampled_from([4, 2]),
    st.booleans(),
    st.sampled_from([(tl.bfloat16, torch.bfloat16, 128), (tl.float16, torch.float16, 1024)]),
)
def test_the_assembly_that_widens_codes_gives_each_code_and_its_offset(words, slices, signed, floats):
    dtype, torch_dtype, magic = floats
    bits = 16 // slices
    for j in range(slices):
        ours = run_ptx(weight_only._widening(j, slices, signed, dtype), words[0] | words[1] << 16, torch_dtype)
        for word, value in zip(words, ours, strict=True):
            code = word >> bits * j & (1 << bits) - 1
            if signed and code >> bits - 1:
                code -= 1 << bits
            offset = {4: magic + (8 if signed else 0), 8: 0 if signed else -128}[bits]
            assert value == code + offset


def run_ptx(text: str, word: int, dtype: torch.dtype) -> list[float]:
    """The two floats that ``text`` leaves in $0, given ``word`` in $1: shr, mov, lop3, add and fma of packed 16-bit floats."""
    registers = {"$1": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def floats(x: int) -> torch.Tensor:
        return torch.tensor([x & 0xFFFF, x >> 16], dtype=torch.int32).to(torch.uint16).view(dtype).double()

    def packed(x: torch.Tensor) -> int:
        low, high = (x.to(dtype).view(torch.uint16).to(torch.int64)).tolist()
        return low | high << 16

    for statement in text.strip("{} ").split(";"):
        op, _, rest = statement.strip().partition(" ")
        to, *values = (part.strip() for part in rest.split(","))
        if op == "mov.b32":
            registers[to] = value(values[0])
        elif op == "shr.b32":
            registers[to] = value(values[0]) >> value(values[1])
        elif op == "lop3.b32":
            a, b, c = map(value, values[:3])
            assert int(values[3], 0) == ((0xF0 & 0xCC) ^ 0xAA)  # the table of a & b ^ c
            registers[to] = (a & b) ^ c
        elif op == "add.rn.f16x2":
            registers[to] = packed(floats(value(values[0])) + floats(value(values[1])))
        elif op == "fma.rn.bf16x2":
            a, b, c = (floats(value(v)) for v in values)
            registers[to] = packed(a * b + c)
        else:
            assert op in ("", ".reg"), statement
    return floats(registers["$0"]).tolist()


def test_the_number_of_stages_is_cut_to_what_shared_memory_holds():
    small = launch.Device(89, 128, 101376)
    tile = launch.weight_only_tile(32, 4, 128, small)
    assert tile.stages == 2 and tile.stages * (64 + 4 * 32) * 128 * 2 <= small.shared


@given(st.integers(1, 20000), st.integers(1, 512), st.sampled_from([1, 8, 16]), st.sampled_from(DEVICES))
def test_a_split_of_k_is_a_power_of_two_that_leaves_two_steps_to_each_part(N, steps, M, on):
    parts = launch.parts(N, steps, launch.int8_tile(M, on), on)
    assert parts & (parts - 1) == 0
    assert parts == 1 or steps >= 2 * parts
    assert launch.parts(N, steps, launch.int8_tile(4096, on), on) == 1


class Driver:
    """As much of a driver as Triton needs to turn a kernel into its first intermediate form."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


def test_inductor_is_shown_the_kernels_and_what_they_write(monkeypatch):
    import triton
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def block(x, weight, q_w, scale_w, packed, scale):
        ops = torch.ops.fxquant
        q, scale_x, _, total, _ = ops.layer_norm_quantize(x, x, weight, None, 1e-5, True, True, False)
        y = ops.int8_gemm(q, q_w, scale_x, None, scale_w, None, None, "gelu", None, torch.bfloat16)
        return y, ops.w4a16_gemm(total, packed, scale)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    graphs = []

    def compiler(gm, inputs):
        graphs.append(gm)
        return gm.forward

    with FakeTensorMode() as fake:
        bf16 = dict(device="cuda", dtype=torch.bfloat16)
        inputs = (
            torch.empty(8, 512, **bf16), torch.empty(512, **bf16),
            torch.empty(96, 512, device="cuda", dtype=torch.int8), torch.empty(96, device="cuda"),
            torch.empty(96, 128, device="cuda", dtype=torch.int16), torch.empty(4, 96, device="cuda"),
        )  # fmt: skip
        gm = make_fx(block, tracing_mode="fake")(*inputs)
    with tracing(TracingContext(fake)):
        aot_module_simplified(gm, inputs, fw_compiler=compiler, inference_compiler=compiler)
    wrapped = [n for n in graphs[0].graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    assert [n.kwargs["tensors_to_clone"] for n in wrapped] == [
        ["q", "scale", "zero_point", "total"], ["parts"], ["out"], ["out"],  # the int8 product of so few outputs splits K
    ]  # fmt: skip


def test_a_launch_is_recorded_with_every_argument_of_its_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = inspect.launches(inspect.int8_case(16, 4096, 4096), launch.KNOWN[-1])
    assert [sorted(one.arguments) == sorted(one.kernel.arg_names) for one in found] == [True, True]
    assert found[0].grid[1] == found[1].arguments["PARTS"] > 1
