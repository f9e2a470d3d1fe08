"""What does moving the outliers buy at 8 bits, without data? Output error of real models under W8A8, transform by transform.

    python benchmarks/transforms.py             # needs ../shared/assets
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import heading, progress, shared_assets, table, write
from torch import Tensor, nn

import fxquant

Case = tuple[str, nn.Module, dict[str, Any], Callable[[Any], Tensor]]

# The transforms of a recipe; the balance at other strengths than its own, too.
SIDES: dict[str, tuple[str, ...]] = {
    "none": (),
    "migrate_gain": ("migrate_gain",),
    "balance": ("balance",),
}
STRENGTHS = ((0.5, 0.25), (0.5, 1.0), (0.5, 3.0), (0.75, 0.5), (0.75, 1.0))
SIDES |= {f"balance {alpha}/{reach}": (f"balance({alpha=}, {reach=})",) for alpha, reach in STRENGTHS}


def cases(assets: Any) -> Iterator[Case]:
    """A post-norm encoder, a vision transformer, a causal model with massive activations; and what is compared."""
    model, tokenizer = assets.minilm()
    batch = tokenizer([row[0] for row in assets.stsb("test")[:64]], padding=True, return_tensors="pt")
    kept = batch["attention_mask"].bool()
    yield "MiniLM, last state", model, dict(batch), lambda out: out.last_hidden_state[kept]
    images, _ = assets.imagenet500()
    yield "ViT-Tiny, logits", assets.vit_tiny(), {"pixel_values": images[:32]}, lambda out: out.logits
    model, tokenizer = assets.smollm2()
    ids = tokenizer(assets.text("wikitext2/test.txt")[:6000], return_tensors="pt").input_ids[:, :512]
    yield "SmolLM2, logits", model, {"input_ids": ids, "use_cache": False}, lambda out: out.logits


def error(case: Case, reference: Tensor, transforms: tuple[str, ...]) -> float:
    """Relative error of the output, the lowered graph run without Inductor."""
    _, model, inputs, pick = case
    torch._dynamo.reset()
    recipe = fxquant.Recipe.preset("W8A8", transforms=transforms)
    compiled = torch.compile(model, backend="outlierq", options={"recipe": recipe.to_dict(), "inductor": False})
    with torch.no_grad():
        return float((pick(compiled(**inputs)) - reference).norm() / reference.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    assets = shared_assets()
    if assets is None:
        raise SystemExit("skipped: the models are read from ../shared/assets, which is not there (or set FXQUANT_ASSETS)")

    results: dict[str, dict[str, float]] = {name: {} for name in SIDES}
    for case in cases(assets):
        name, model, inputs, pick = case
        with torch.no_grad():
            reference = pick(model(**inputs))
        for side in progress(list(SIDES), name):
            results[side][name] = error(case, reference, SIDES[side])

    names = list(results["none"])
    rows: list[tuple[object, ...]] = [("W8A8, per token, error of", *names, "geometric mean")]
    for side, found in results.items():
        mean = math.exp(sum(map(math.log, found.values())) / len(found))
        rows.append((side, *(f"{found[n]:.4f}" for n in names), f"{mean:.4f}"))
    print(f"{heading()}\n\n{table(rows)}")
    write("transforms", {"errors": results}, args.json)


if __name__ == "__main__":
    main()
