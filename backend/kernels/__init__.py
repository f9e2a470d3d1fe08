"""The kernels, first one that supports a site wins: the order of the tuple is the policy."""

from .dequantize import DequantizedLinear
from .int8_cpu import Int8CpuLinear
from .int8_onednn import Int8Linear
from .int8_triton import Int8TritonLinear
from .kernel import Kernel
from .low_bit_cpu import LowBitFloatLinear, LowBitLinear
from .low_bit_triton import LowBitTritonLinear
from .simulated import SimulatedLinear
from .weight_only_triton import WeightOnlyTritonLinear

KERNELS: tuple[Kernel, ...] = (
    LowBitTritonLinear(),
    Int8TritonLinear(),
    WeightOnlyTritonLinear(),
    Int8CpuLinear(),
    Int8Linear(),
    LowBitLinear(),
    LowBitFloatLinear(),
    DequantizedLinear(),
    SimulatedLinear(),
)
