"""Attention whose queries and keys are int8 codes, as an op: scores on the integer tensor cores, values in 16-bit floats.

    y[l]  =  sum_t p[l, t] v[t],   p  =  softmax over t of  scale scale_q[l] scale_k[t] (q[l] . k[t])  +  mask[l, t]

One pass over the keys with a running maximum (FlashAttention, Dao et al. 2022; with codes for queries and keys, as in
SageAttention, Zhang et al. 2024). Scores are exact integers, softmax and sums are float32; probabilities are rounded to the
dtype of the values for the second product, and the result once. The kernel is written for the case at hand (``source.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import launch
from .gemm import call
from .gpus import Device
from .language import ceil_div, define, launches, power_of_two, rows
from .refuse import check_attention
from .source import function
from .tile import Tile

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionForm:
    """What is known of an attention when its kernel is written.

    ``mask`` is "", "bool" or "float"; ``mask_alike``: it has one row for all queries. ``tensor_q``, ``tensor_k``: one scale for
    all. ``even_m``, ``even_n``: tiles divide the numbers of queries and of keys; ``even_d``, ``even_e``: the widths of keys and
    of values fill theirs.
    """

    mask: str = ""
    mask_alike: bool = False
    causal: bool = False
    tensor_q: bool = False
    tensor_k: bool = False
    even_m: bool = False
    even_n: bool = False
    even_d: bool = True
    even_e: bool = True

    @property
    def name(self) -> str:
        """A name for people, which profilers show."""
        return "int8_attention" + ("_causal" if self.causal else "") + (f"_{self.mask}_mask" if self.mask else "")


def write_attention(form: AttentionForm) -> str:
    """The kernel: BM queries of one head against all keys that they may see."""
    names = ["q", "k", "v", "scale_q", "scale_k", *(["mask"] if form.mask else []), "out"]
    sizes = ["factor", "L", "T", "D", "DV", "heads", "per", "stride_qb", "stride_qh", "stride_ql"]
    sizes += ["stride_kb", "stride_kh", "stride_kt", "stride_vb", "stride_vh", "stride_vt"]
    sizes += ["stride_mb", "stride_mh", "stride_mt"] if form.mask else []
    sizes += ["stride_ml"] if form.mask and not form.mask_alike else []
    rows_of_scale = "tl.load(scale_q + (batch * heads + head) * L + m_in)[:, None]"
    tile = "tl.program_id(0) % tiles"
    body = [
        "tiles = tl.cdiv(L, BM)",
        *(["# The last queries see the most keys, and begin first."] if form.causal else []),
        f"tile = tiles - 1 - {tile}" if form.causal else f"tile = {tile}",
        "head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)",
        "batch = (tl.program_id(0) // tiles // heads).to(tl.int64)",
        "group = head // per",
        "m = tile * BM + tl.arange(0, BM)",
        "n = tl.arange(0, BN)",
        "d = tl.arange(0, WIDTH)",
        "e = tl.arange(0, WIDTH_V)",
        *([] if form.even_m else ["# Rows beyond the edge read the last row: what they compute is not stored."]),
        "m_in = m" if form.even_m else "m_in = tl.minimum(m, L - 1)",
        "q_rows = q + batch * stride_qb + head * stride_qh + m_in.to(tl.int64)[:, None] * stride_ql + d[None, :]",
        f"q_tile = tl.load(q_rows{_masked(*_width('d', form.even_d))})",
        f"left = {'tl.load(scale_q)' if form.tensor_q else rows_of_scale} * factor",
        *(["left *= tl.load(scale_k)"] if form.tensor_k else ["k_scales = scale_k + (batch * (heads // per) + group) * T + n"]),
        "k_rows = k + batch * stride_kb + group * stride_kh + n.to(tl.int64)[:, None] * stride_kt + d[None, :]",
        "v_rows = v + batch * stride_vb + group * stride_vh + n.to(tl.int64)[:, None] * stride_vt + e[None, :]",
        *_mask_pointers(form),
        'peak = tl.full((BM,), float("-inf"), dtype=tl.float32)',
        "total = tl.zeros((BM,), dtype=tl.float32)",
        "acc = tl.zeros((BM, WIDTH_V), dtype=tl.float32)",
        *_loops(form),
        "# A query that sees no key has a sum of zero, and gets zeros.",
        "acc *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]",
        "there = out + ((batch * L + m)[:, None] * heads + head) * DV + e[None, :]",
        f"tl.store(there, acc.to(out.dtype.element_ty){_masked(*_rows('m', 'L', form.even_m), *_width('e', form.even_e))})",
    ]
    return function(form.name, names, sizes, ["BM", "BN", "WIDTH", "WIDTH_V"], body)


def _masked(*tests: str, other: str = "") -> str:
    return f", mask={' & '.join(tests)}{other}" if tests else ""


def _width(name: str, even: bool) -> list[str]:
    return [] if even else [f"({name} < {'D' if name == 'd' else 'DV'})[None, :]"]


def _rows(name: str, size: str, even: bool) -> list[str]:
    return [] if even else [f"({name} < {size})[:, None]"]


def _mask_pointers(form: AttentionForm) -> Iterator[str]:
    """A pointer, and offsets of 32 bits: pointers to all entries of a block would fill the registers."""
    if form.mask:
        yield "here = mask + batch * stride_mb + head * stride_mh"
        if form.mask_alike:
            yield "entries = n * stride_mt"
        else:
            yield "here += tile.to(tl.int64) * BM * stride_ml"
            yield "first = ((m_in - tile * BM) * stride_ml)[:, None]"


def _loops(form: AttentionForm) -> Iterator[str]:
    """Blocks of keys that all queries see, without a test; then those on the diagonal or at the end. Under a mask all alike."""
    if form.even_n and not form.causal:
        yield "for start in range(0, T, BN):"
        yield from ("    " + line for line in _step(form, edge=False))
        return
    last = "tl.minimum(tile * BM + BM, T)" if form.causal else "T"
    if form.mask:  # another loop with tests of its own would be too many registers
        yield f"for start in range(0, {last}, BN):"
        yield from ("    " + line for line in _step(form, edge=True))
        return
    yield f"whole = {'tl.minimum(tile * BM, T)' if form.causal else 'T'} // BN * BN"
    yield "for start in range(0, whole, BN):"
    yield from ("    " + line for line in _step(form, edge=False))
    yield f"for start in range(whole, {last}, BN):"
    yield from ("    " + line for line in _step(form, edge=True))


def _step(form: AttentionForm, edge: bool) -> Iterator[str]:
    """One block of keys: scores, the running maximum and sum, and what its values add."""
    ends = edge and not form.even_n
    if ends:
        yield "inside = start + n < T"
    widths = _width("d", form.even_d), _width("e", form.even_e)
    k_mask, v_mask = (_masked(*(["inside[:, None]"] if ends else []), *tests, other=", other=0") for tests in widths)
    column = _masked("inside", other=", other=0") if ends else ""
    yield f"k_tile = tl.load(k_rows{k_mask})"
    yield "x = tl.dot(q_tile, tl.trans(k_tile), out_dtype=tl.int32).to(tl.float32) * left"
    if not form.tensor_k:
        yield f"x *= tl.load(k_scales{column})[None, :]"
    if form.mask:
        tall = column if form.mask_alike else column.replace("inside", "inside[None, :]")
        entries = "entries" if form.mask_alike else "(first + ((start + n) * stride_mt)[None, :])"
        within = f"tl.load(here + {entries}{tall})" + ("[None, :]" if form.mask_alike else "")
        yield f'x = tl.where({within} != 0, x, float("-inf"))' if form.mask == "bool" else f"x += {within}.to(tl.float32)"
    seen = [*(["inside[None, :]"] if ends else []), *(["((start + n)[None, :] <= m[:, None])"] if edge and form.causal else [])]
    if seen:
        yield f'x = tl.where({" & ".join(seen)}, x, float("-inf"))'
    yield "higher = tl.maximum(peak, tl.max(x, 1))"
    top = "higher"
    if form.mask:  # elsewhere the first block holds a key that each query sees
        yield 'shown = tl.where(higher == float("-inf"), 0.0, higher)'
        top = "shown"
    # Under a mask that is added, base 2 comes last: times log2(e) the lowest number of a float would be no number.
    base = f" * {LOG2E!r}" if form.mask == "float" else ""
    yield f"p = tl.exp2((x - {top}[:, None]){base})"
    yield f"less = tl.exp2((peak - {top}){base})"
    yield "peak = higher"
    yield "total = total * less + tl.sum(p, 1)"
    yield f"v_tile = tl.load(v_rows{v_mask})"
    yield "acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * less[:, None])"
    yield "k_rows += BN * stride_kt"
    yield "v_rows += BN * stride_vt"
    if not form.tensor_k:
        yield "k_scales += BN"
    if form.mask_alike:
        yield "here += BN * stride_mt"


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The truth, in float32, which holds every sum of codes exactly; a query that sees no key gets zeros."""
    per = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(per, 1) for t in (k.float(), v.float()))
    right = scale_k if scale_k.dim() == 0 else scale_k.repeat_interleave(per, 1)[:, :, None]
    left = scale_q if scale_q.dim() == 0 else scale_q[..., None]
    scores = q.float() @ keys.mT * (left * scale) * right
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    probabilities: Tensor = torch.ops.aten._safe_softmax(scores, -1)
    return (probabilities @ values).to(v.dtype)


def _int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``softmax(scale (scale_q q) (scale_k k)^T + mask) v``: [B, H, L, Dv] in the dtype of v, which lies as [B, L, H, Dv].

    q: int8 [B, H, L, D]; k: int8 [B, G, T, D]; v: float16 or bfloat16 [B, G, T, Dv]. G divides H, and the heads of a group read
    its keys where they lie; D and Dv are multiples of 16 up to 256. scale_q: float32 [B, H, L] or []; scale_k: [B, G, T] or [].
    mask: boolean (True is seen) or floating point (added), broadcast to [B, H, L, T]. ``is_causal``: query i sees keys up to i.
    ``scale``: 1 / sqrt(D) by default. A query that sees no key gets zeros, as ``aten._safe_softmax`` has it.
    Raises KernelError for other shapes or dtypes.
    """
    check_attention(q, k, v, scale_q, scale_k, mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not launches(q):
        y = reference_attention(q, k, v, scale_q, scale_k, mask, is_causal, scale)
        return y.transpose(1, 2).contiguous().transpose(1, 2)
    tile = tile_for(q.shape[3], v.shape[3], q.shape[2], mask, launch.device(q.device.index))
    return launch_attention(q, k, v, scale_q, scale_k, mask, is_causal, scale, tile)


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor,
    scale_k: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    tile: Tile,
) -> Tensor:
    """Launch with ``tile`` (bm queries, bn keys); everything else as in ``int8_attention``."""
    q, k, v = rows(q), rows(k), rows(v)
    (B, H, L, D), (_, G, T, E) = q.shape, v.shape
    values: dict[str, Any] = {
        "q": q, "k": k, "v": v, "scale_q": scale_q.contiguous(), "scale_k": scale_k.contiguous(),
        "L": L, "T": T, "D": D, "DV": E, "heads": H, "per": H // G, "factor": scale * LOG2E,
        "BM": tile.bm, "BN": tile.bn, "WIDTH": padded(D, 32), "WIDTH_V": padded(E, 16),
    }  # fmt: skip
    for name, tensor, axes in (("q", q, "bhl"), ("k", k, "bht"), ("v", v, "bht")):
        values |= {f"stride_{name}{axis}": tensor.stride(i) for i, axis in enumerate(axes)}
    kind, alike = "", False
    if mask is not None:
        mask = mask.expand(B, H, L, T)
        kind = "bool" if mask.dtype == torch.bool else "float"
        alike = isinstance(mask.stride(2), int) and mask.stride(2) == 0
        values |= {"mask": mask, **{f"stride_m{axis}": mask.stride(i) for i, axis in enumerate("bhlt")}}
        values["factor"] = scale if kind == "float" else scale * LOG2E
    form = AttentionForm(
        kind, alike, is_causal, scale_q.dim() == 0, scale_k.dim() == 0,
        even_m=isinstance(L, int) and L % tile.bm == 0, even_n=isinstance(T, int) and T % tile.bn == 0,
        even_d=padded(D, 32) == D, even_e=padded(E, 16) == E,
    )  # fmt: skip
    values["out"] = out = v.new_empty((B, L, H, E))
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    call(write_attention(form), (ceil_div(L, tile.bm) * B * H,), values, options)
    return out.transpose(1, 2)


def padded(width: int, least: int) -> int:
    """The power of two that a head of ``width`` takes in a tile; ``least``: what one step of a product takes."""
    return max(power_of_two(width), least)


def bounds(arguments: dict[str, Any], on: Device) -> dict[str, float]:
    """Microseconds at the published peaks of ``on``: of both products, and of exponentials, 16 in a clock of a processor."""
    a = arguments
    pairs = a["q"].shape[0] * a["heads"] * a["L"] * a["T"] * (0.5 if "_causal" in a["kernel"] else 1)
    products = 2 * pairs * (a["D"] / on.integers + a["DV"] / on.floats) / 1e6
    return {"product": products, "exponentials": pairs / 16 / on.processors / on.clock / 1e3}


FEW = tuple(Tile(16, bn, 0, 4, stages) for bn in (64, 32) for stages in (3, 2))
LOW = tuple(Tile(64, bn, 0, warps, stages) for bn, warps in ((64, 4), (64, 8), (32, 8)) for stages in (3, 2))
MANY = (*(Tile(128, 64, 0, 8, stages) for stages in (3, 2)), *LOW)
"""Tiles for up to 16 queries, the least that a product takes; for up to 64; and for more, the best first.

A tall tile reads keys and values for more queries at a time, so of 128 queries the L2 cache sees half the traffic of 64. Eight
warps of it are one program of a processor, and four of 64 queries are two: as many warps hide what each waits for.
"""
MOST_SUMS, MOST_TESTED = 96, 80
"""Scores and sums that a thread may hold; before Hopper, where operands in flight are in registers too, fewer under a mask or
where heads do not fill their tile. Of more, registers were seen to spill."""
MOST_ENTRIES = {4: 4, 8: 8}
"""Entries of a mask that a thread of so many warps may load, where queries have rows of their own: one by one, if T is odd."""


def tile_for(width: int, width_v: int, queries: Any, mask: Tensor | None, on: Device) -> Tile:
    """The tile for heads of ``width`` (values: ``width_v``) and so many queries on the device ``on``: the first that fits.

    A symbolic number of queries is taken for many.
    """
    D, E, entry = padded(width, 32), padded(width_v, 16), bytes_for_each(mask)
    known = queries if isinstance(queries, int) else 1 << 30
    plain = mask is None and (width, width_v) == (D, E)
    most = MOST_SUMS if plain or on.capability >= 90 else MOST_TESTED
    for tile in FEW if known <= 16 else LOW if known <= 64 else MANY:
        sums, entries = (tile.bm * columns / 32 / tile.warps for columns in (tile.bn + E, tile.bn))
        in_registers = sums <= most and (not entry or entries <= MOST_ENTRIES[tile.warps])
        if in_registers and shared(tile, D, E, entry, on) <= on.shared:
            return tile
    raise AssertionError("the last tile fits every head")


def bytes_for_each(mask: Tensor | None) -> int:
    """Bytes of a mask for each query and key; none, if it has one row for all queries."""
    return mask.element_size() if mask is not None and mask.dim() > 1 and mask.shape[-2] != 1 else 0


def shared(tile: Tile, D: int, E: int, entry: int, on: Device) -> int:
    """The most bytes of shared memory, for padded widths and ``entry`` bytes of a mask: the compiler does not check that.

    Queries; keys, values and mask for each stage; probabilities, where warps exchange them; and what they reduce rows by.
    """
    buffers = tile.stages if on.capability >= 90 else tile.stages - 1
    return tile.bm * D + buffers * tile.bn * (D + 2 * E + tile.bm * entry) + 2 * tile.bm * tile.bn + 32 * tile.bm


int8_attention = define("int8_attention", _int8_attention)
