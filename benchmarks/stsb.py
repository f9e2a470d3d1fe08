"""Does a quantized sentence encoder still rank sentence pairs as people do? Spearman on the whole STS-B test set.

    python benchmarks/stsb.py --recipe W8A8
"""

import argparse
import copy
from pathlib import Path

import torch
from measure import heading, shared_assets, table, write
from minilm import embed, encoder, relative_error, tokenize
from scipy.stats import spearmanr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="a preset; may be given several times (default: W8A8)")
    parser.add_argument("--pairs", type=int, help="only the first so many pairs (half of the 1379 move by 0.01 by chance)")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    assets = shared_assets()
    if assets is None:
        raise SystemExit("skipped: STS-B is read from ../shared/assets, which is not there (or set FXQUANT_ASSETS)")

    model, tokenizer = encoder()
    pairs = assets.stsb("test")[: args.pairs]
    people = [score for _, _, score in pairs]
    batch = tokenize(tokenizer, [a for a, _, _ in pairs] + [b for _, b, _ in pairs], args.length)
    reference, reference_states = embed(model, batch, title="fp32")
    rows: list[tuple[object, ...]] = [("model", "Spearman", "points from fp32", "mean cosine", "relative error")]
    results = []
    for recipe in (None, *(args.recipe or ["W8A8"])):
        vectors, states = reference, reference_states
        if recipe:
            ours = copy.deepcopy(model)
            ours.compile(backend="outlierq", options={"recipe": recipe})
            vectors, states = embed(ours, batch, title=recipe)
            torch._dynamo.reset()
        cosines = (vectors[: len(pairs)] * vectors[len(pairs) :]).sum(1)
        result = {
            "model": f"outlierq {recipe}" if recipe else "fp32 eager",
            "spearman": float(spearmanr(cosines.numpy(), people).statistic),
            "mean_cosine": float((vectors * reference).sum(1).mean()),
            "relative_error": relative_error(states, reference_states, batch["attention_mask"]),
        }
        results.append(result)
        points = 100 * (result["spearman"] - results[0]["spearman"])
        accuracy = (f"{result['spearman']:.4f}", f"{points:+.2f}")
        rows.append((result["model"], *accuracy, f"{result['mean_cosine']:.5f}", f"{result['relative_error']:.4f}"))
    print(f"STS-B test, {len(pairs)} pairs, all-MiniLM-L6-v2, mean pooling\n{heading()}\n\n{table(rows)}")
    write("stsb", results, args.json)


if __name__ == "__main__":
    main()
