"""``make demo``: quantize a real sentence encoder with one line, and see what it costs and what it gives on film reviews."""

import argparse
import copy
from pathlib import Path

import torch
from measure import Time, heading, in_turn, table, working_memory, write
from minilm import Batch, embed, encoder, relative_error, reviews, sides, tokenize
from torch import Tensor, nn

import fxquant

SHAPES = ((32, 128), (1, 32))


def nearest(vectors: Tensor, count: int) -> Tensor:
    """[n, width] unit vectors -> [n, count] indices of the most similar others, best first."""
    similarity = vectors @ vectors.T
    return similarity.fill_diagonal_(-2).topk(count).indices


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean share of the neighbours [n, count] of ``a`` that are among those of ``b``, in whatever order."""
    return float((a[:, :, None] == b[:, None, :]).any(-1).float().mean())


def megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f} MiB"


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def closeness(model: nn.Module, batch: Batch) -> dict[str, float]:
    """How near the quantized embeddings stay to those of float32."""
    ours = copy.deepcopy(model)
    ours.compile(backend="outlierq")
    ours_vectors, ours_states = embed(ours, batch, title="embedding, outlierq")
    print(fxquant.explain(ours))
    vectors, states = embed(model, batch, title="embedding, fp32")
    return {
        "mean_cosine": float((vectors * ours_vectors).sum(1).mean()),
        "lowest_cosine": float((vectors * ours_vectors).sum(1).min()),
        "relative_error": relative_error(ours_states, states, batch["attention_mask"]),
        "same_nearest": overlap(nearest(vectors, 1), nearest(ours_vectors, 1)),
        "top10_overlap": overlap(nearest(vectors, 10), nearest(ours_vectors, 10)),
    }


def race(model: nn.Module, batch: Batch, rounds: int) -> dict[str, dict[str, object]]:
    """Times of every side on every shape, in turn, and the memory of one call."""
    torch._dynamo.reset()
    compiled = sides(model, "W8A8")
    results: dict[str, dict[str, object]] = {name: {"parameters": parameter_bytes(m)} for name, m in compiled.items()}
    for size, length in SHAPES:
        part = {name: tensor[:size, :length].contiguous() for name, tensor in batch.items()}
        calls = {name: (lambda m=m, part=part: m(**part)) for name, m in compiled.items()}
        with torch.no_grad():
            for name, taken in in_turn(calls, rounds, f"{size} x {length}").items():
                results[name][f"{size}x{length}"] = taken
            for name, call in calls.items():
                results[name][f"working {size}x{length}"] = working_memory(call)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=512, help="reviews to embed")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model, tokenizer = encoder()
    batch = tokenize(tokenizer, reviews(args.texts), SHAPES[0][1])
    print(f"all-MiniLM-L6-v2 on {args.texts} film reviews, model.compile(backend=\"outlierq\")\n{heading()}\n")
    close = closeness(model, batch)
    print("\nembeddings against fp32\n")
    print(table([
        ("measure", "value"),
        ("mean cosine", f"{close['mean_cosine']:.5f} (lowest {close['lowest_cosine']:.5f})"),
        ("relative error of last_hidden_state", f"{close['relative_error']:.4f}"),
        ("same nearest neighbour", f"{100 * close['same_nearest']:.1f}%"),
        ("overlap of the ten nearest", f"{100 * close['top10_overlap']:.1f}%"),
    ]))  # fmt: skip

    results = race(model, batch, args.rounds)
    ours = list(results)[-1]
    first, second = (f"{size}x{length}" for size, length in SHAPES)
    rows: list[tuple[object, ...]] = [("side", first, "ours", second, "ours", "parameters", f"working memory {first}")]
    for name, side in results.items():
        cells: list[object] = [name]
        for shape in (first, second):
            mine, theirs = results[ours][shape], side[shape]
            assert isinstance(mine, Time) and isinstance(theirs, Time)
            cells += [theirs, f"{theirs.median / mine.median:.2f}x"]
        parameters, working = side["parameters"], side[f"working {first}"]
        assert isinstance(parameters, int) and isinstance(working, int | None)
        rows.append((*cells, megabytes(parameters), megabytes(working)))
    print(f"\nspeed and memory, {args.rounds} rounds in turn, median (fastest to slowest)\n\n{table(rows)}")
    print("\nparameters: as the model object holds them; outlierq keeps its packed low-bit copy beside the float ones.")
    write("demo", {"closeness": close, "sides": results}, args.json)


if __name__ == "__main__":
    main()
