"""The few ops that the graph needs beyond ATen: a value rounded to what its Spec can hold."""

from functools import lru_cache

import torch
from torch import Tensor

from ..recipe import Spec

_library = torch.library.Library("fxquant", "FRAGMENT")
_library.define("fake_quantize(Tensor x, str spec) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@lru_cache(512)
def read_spec(text: str) -> Spec:
    """The Spec that an op's ``spec`` argument spells (its JSON)."""
    return Spec.from_json(text)


def _fake_quantize(x: Tensor, spec: str) -> Tensor:
    """``decode(encode(x))``: shape, dtype and device of ``x``."""
    return read_spec(spec).fake_quantize(x)


_library.impl("fake_quantize", _fake_quantize, "CompositeExplicitAutograd")
torch.library.register_fake("fxquant::fake_quantize", lambda x, spec: torch.empty_like(x), lib=_library)

fake_quantize = torch.ops.fxquant.fake_quantize.default
