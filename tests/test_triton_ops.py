"""The ops as a CPU sees them: their plain meaning, their fake implementation, and an import where there is no Triton."""

import subprocess
import sys

import pytest
import torch

from fxquant.backend.triton import attention, gemm, row
from fxquant.backend.triton.codes import Codes

X = torch.linspace(-3, 5, 6 * 64).view(6, 64)
CODES = torch.arange(-7, 8, dtype=torch.int8).repeat(64)[: 9 * 64].view(9, 64)
SCALE = torch.linspace(0.01, 0.02, 9)
SUMS = CODES.sum(1, dtype=torch.int32)
W4, W8 = Codes(4, 16).pack(CODES, 16), Codes(8, 16).pack(CODES, 16)
FEW = CODES.clamp(-3, 3)


def norm_quantize(x):
    return torch.ops.fxquant.layer_norm_quantize(x, x, None, None, 1e-5, False, True, True)


def rms(x):
    return torch.ops.fxquant.rms_norm_quantize(x, None, torch.ones(64), 1e-5)


def int8(x):
    q, scale, zero_point = torch.ops.fxquant.quantize_rows(x, False)
    weight, program = [CODES, SCALE, SUMS], "t0 = add(y0, column0); t1 = silu(t0)"
    return torch.ops.fxquant.a8_gemm(q, scale, zero_point, weight, [SCALE], program)


def w3a8_gated(x):
    q, scale, _ = torch.ops.fxquant.quantize_rows(x, True)
    weight = [Codes(3).pack(FEW, 32), SCALE, FEW.sum(1, dtype=torch.int32)]
    return torch.ops.fxquant.a8_gemm(q, scale, None, weight * 2, [], "t0 = silu(y0); t1 = mul(t0, y1)", 3, width=32)


def w4a16(x):
    return torch.ops.fxquant.a16_gemm(x, [W4, SCALE[None]], [], "", False, 4, 64, 16)


def w8a16(x):
    return torch.ops.fxquant.a16_gemm(x, [W8, SCALE[None]], [], "", False, 8, 64, 16)


def attend(x):
    codes, scale, _ = torch.ops.fxquant.quantize_rows(x, True)
    q, s = codes.view(1, -1, 4, 16).transpose(1, 2), scale.view(1, 1, -1).expand(1, 4, -1)
    return attention.int8_attention(q, q[:, ::2], q[:, ::2].half(), s, s[:, ::2], None, True)


@pytest.mark.parametrize("call", [norm_quantize, rms, int8, w3a8_gated, w4a16, w8a16, attend])
def test_a_compiled_op_on_the_cpu_is_its_plain_meaning(call):
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 0)
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(traced, call(X), rtol=0, atol=0)


def test_int8_products_are_near_float_ones():
    weight = CODES.float() * SCALE[:, None]
    truth = torch.nn.functional.silu(X @ weight.T + SCALE)
    error = (int8(X) - truth).norm() / truth.norm()
    assert error < 0.01


def test_weight_only_products_equal_those_of_the_decoded_weight():
    truth = X @ (CODES.float() * SCALE[:, None]).T
    torch.testing.assert_close(w4a16(X), truth)
    torch.testing.assert_close(w8a16(X), truth)


@pytest.mark.parametrize("op", [row.layer_norm_quantize, gemm.a8_gemm, gemm.a16_gemm])
def test_the_fake_implementation_and_the_schema_hold(op):
    q, scale, _ = row.quantize_rows(X)
    arguments = {
        row.layer_norm_quantize: (X, X, None, None, 1e-5, True, True, True),
        gemm.a8_gemm: (q, scale, None, [CODES, SCALE, SUMS], [X[:1, :9].expand(6, 9)], "t0 = add(y0, full0)"),
        gemm.a16_gemm: (X, [W4, SCALE[None]], [], "", False, 4, 64, 16),
    }[op]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_without_triton_the_cpu_works_and_a_cuda_tensor_is_told_so():
    script = """
import sys
sys.modules["triton"] = None
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from fxquant.backend.triton import attention, gemm, row
from fxquant.backend.triton.language import KernelError
print(row.quantize_rows(torch.tensor([[-1.0, 0.5]]))[0].tolist())
try:
    with FakeTensorMode():
        row.quantize_rows(torch.empty(2, 3, device="cuda"))
except KernelError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "[[-127, 64]]" in run.stdout
    assert "triton is not installed here" in run.stdout
    assert not run.stderr
