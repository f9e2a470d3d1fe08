"""What no kernel of ours claims goes to Inductor, as a graph whose weights are ordinary inputs of static shape."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from fxquant.graph.tidy import value

from .triton import tables


@lru_cache(1)
def _cpu_ops() -> str:
    """A hash of what the ops of the CPU say that they return."""
    folder = Path(__file__).parent / "cpu"
    return sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:12]


# Inductor asserts of every op's result, in every call, what tests of ours ask of our ops once: a tenth of decoding a token.
QUIET = {"size_asserts": "TORCHINDUCTOR_SIZE_ASSERTS", "alignment_asserts": "TORCHINDUCTOR_ALIGNMENT_ASSERTS"}


def compile_runtime(gm: fx.GraphModule, patches: dict[str, Any] | Literal[False]) -> Callable[..., Sequence[Any]]:
    """Compile the runtime graph for inference; takes its placeholders' values, returns the tuple of its outputs.

    ``patches`` are Inductor's config; False runs the graph as it is, which tells a fault of ours from one of Inductor's. The
    placeholders' own fake values are handed over: their symbolic sizes are Dynamo's, so Inductor's guards are the same.
    Assertions of sizes and alignment are off unless ``patches`` or Inductor's own environment variables ask for them.
    """
    if patches is False:
        return gm
    from torch._inductor.compile_fx import compile_fx

    # What Inductor keeps on disk is keyed by the graph, which shows neither generated kernels nor what an op of ours is today.
    tag = f"{torch.compiler.config.cache_key_tag} fxquant {_cpu_ops()} {tables.state()}"
    inputs = [value(node) for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad(), torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]  # of every config
        quiet = {key: False for key, variable in QUIET.items() if variable not in os.environ}
        compiled = compile_fx(gm, inputs, config_patches=quiet | patches or None)
    assert callable(compiled)  # the file names that its type allows for are AOTInductor's
    return compiled
