"""What this CPU can do, asked of PyTorch in one place."""

import torch


def has_avx2() -> bool:
    """Eight floats or integers at a time, with FMA and F16C; an older torch does not tell the last two, which few lack."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    return bool(torch.cpu._is_avx2_supported()) and (tell is None or (tell()["fma3"] and tell()["f16c"]))


def has_vnni() -> bool:
    """Products of u8 and s8 are summed in 32 bits by one instruction (AVX512-VNNI)."""
    return bool(torch.cpu._is_vnni_supported())


def has_avx512() -> bool:
    """AVX512 with bytes and words, as the C++ kernels are compiled for."""
    return bool(torch.cpu._is_avx512_supported())


def has_bf16() -> bool:
    """Products of bfloat16 are summed in float32 by one instruction (AVX512-BF16)."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def has_amx() -> bool:
    """Tiles of u8 and s8, and of bfloat16, are multiplied by one instruction (AMX), and the operating system keeps them."""
    return bool(torch.cpu._is_amx_tile_supported())
