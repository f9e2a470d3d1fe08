"""What this CPU can do, asked of PyTorch in one place."""

import torch


def has_vnni() -> bool:
    """Products of u8 and s8 are summed in 32 bits by one instruction (AVX512-VNNI)."""
    return bool(torch.cpu._is_vnni_supported())


def has_avx512() -> bool:
    """AVX512 with bytes and words, as the C++ kernels are compiled for."""
    return bool(torch.cpu._is_avx512_supported())
