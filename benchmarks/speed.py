"""How fast is a quantized sentence encoder? ours against Inductor in float32 and bfloat16, in turn, in one run.

    python benchmarks/speed.py --batch 32 --length 128
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
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = encoder()
    batch = tokenize(tokenizer, reviews(args.batch), args.length)
    with torch.no_grad():
        reference = model(**batch).last_hidden_state
        compiled = sides(model, args.recipe)
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
