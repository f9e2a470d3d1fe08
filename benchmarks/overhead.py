"""What does a call cost beyond the arithmetic? Our check of the folded weights, and a tiny forward against Inductor's.

    python benchmarks/overhead.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import heading, progress, table, write
from transformers import BertConfig, BertModel

from fxquant.backend import pipeline
from fxquant.graph.fold import FoldedWeights


def microseconds(call: Callable[[], object], repeat: int = 200) -> float:
    """The time of one call, averaged over ``repeat``."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return 1e6 * (time.perf_counter() - start) / repeat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    checks: list[tuple[FoldedWeights, tuple[Any, ...]]] = []

    class Kept(FoldedWeights):
        def __call__(self, args: Any) -> list[torch.Tensor]:
            checks.append((self, args))
            return super().__call__(args)

    pipeline.FoldedWeights = Kept  # type: ignore[misc]  # to see the arguments of a call
    config = BertConfig(hidden_size=32, num_hidden_layers=9, num_attention_heads=2, intermediate_size=64, vocab_size=97)
    sides = {"inductor": BertModel(config).eval(), "outlierq": BertModel(config).eval()}
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        for backend, model in sides.items():
            model.compile(backend=backend)
            for _ in range(3):
                model(ids)
        weights, arguments = checks[-1]
        check: list[float] = []
        forward: dict[str, list[float]] = {backend: [] for backend in sides}
        for _ in progress(range(args.rounds), "rounds"):
            check.append(microseconds(lambda: FoldedWeights.__call__(weights, arguments)))
            for backend, model in sides.items():
                forward[backend].append(microseconds(lambda model=model: model(ids), 20))  # type: ignore[misc]

    count = len(list(sides["outlierq"].parameters()))
    watched = len(weights._pick(arguments))
    median = {backend: statistics.median(times) for backend, times in forward.items()}
    rows: list[tuple[object, ...]] = [
        ("", "median", "least"),
        (f"check of {count} parameters ({watched} watched)", f"{statistics.median(check):.1f} us", f"{min(check):.1f} us"),
        *((f"forward, {b}", f"{median[b]:.0f} us", f"{min(t):.0f} us") for b, t in forward.items()),
    ]
    print(f"BertModel of 9 layers of 32 channels, batch 1 x 8\n{heading()}\n\n{table(rows)}")
    write("overhead", {"parameters": count, "watched": watched, "check": check, "forward": forward}, args.json)


if __name__ == "__main__":
    main()
