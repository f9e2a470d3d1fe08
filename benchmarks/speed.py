"""How fast is a quantized sentence encoder? ours against Inductor in float32 and bfloat16, in turn, in one run.

    python benchmarks/speed.py --batch 32 --length 128
    python benchmarks/speed.py --recipe OS-W6A6 --samples 64      # a recipe that needs data
"""

import argparse
from pathlib import Path

import torch
from measure import heading, in_turn, table, write
from minilm import encoder, relative_error, reviews, sides, tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--recipe", default="W8A8")
    parser.add_argument("--samples", type=int, default=0, help="calibrate on so many reviews behind those that are timed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = encoder()
    texts = reviews(args.batch + args.samples)
    batch = tokenize(tokenizer, texts[: args.batch], args.length)
    others = [texts[i : i + args.batch] for i in range(args.batch, len(texts), args.batch)]
    with torch.no_grad():
        reference = model(**batch).last_hidden_state
        compiled = sides(model, args.recipe, [tokenize(tokenizer, some, args.length) for some in others])
        states = {n: m(**batch).last_hidden_state.float() for n, m in compiled.items()}
        errors = {n: relative_error(s, reference, batch["attention_mask"]) for n, s in states.items()}
        times = in_turn({n: (lambda m=m: m(**batch)) for n, m in compiled.items()}, args.rounds)

    ours = times[list(compiled)[-1]].median
    rows: list[tuple[object, ...]] = [("side", "median (spread)", "ours is faster by", "relative error")]
    rows += [(n, t, f"{t.median / ours:.2f}x", f"{errors[n]:.4f}") for n, t in times.items()]
    print(f"MiniLM-L6, batch {args.batch}, length {args.length}, {args.rounds} rounds in turn\n{heading()}\n\n{table(rows)}")
    results = {n: {"seconds": t, "speedup_of_ours": t.median / ours, "relative_error": errors[n]} for n, t in times.items()}
    write("speed", {"arguments": vars(args), "sides": results}, args.json)


if __name__ == "__main__":
    main()
