"""Fine-tune MiniLM on the GLUE sets of the accuracy figures; tasks.py reads what this leaves in build/models.

    python benchmarks/finetune.py mrpc cola stsb          # some minutes each on two cores; needs ../shared/assets
"""

import argparse
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import heading, table, write
from safetensors.torch import save_file
from tasks import TASKS, Examples, classifier, collate, outputs, saved
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Training:
    """AdamW with linear warm-up and decay; nothing is chosen by the test set, the last step is what is kept.

    ``classes`` 1 is a regression on labels 0 to 5. ``length``: longer texts are cut, in training only.
    """

    classes: int
    epochs: int
    rate: float = 1e-4
    size: int = 32
    length: int = 64
    warmup: float = 0.1
    decay: float = 0.01
    seed: int = 0

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.classes == 1:
            return nn.functional.mse_loss(logits.squeeze(-1), labels.float())
        return nn.functional.cross_entropy(logits, labels)


TRAININGS = {"mrpc": Training(2, epochs=4), "cola": Training(2, epochs=4), "stsb": Training(1, epochs=3)}


def rounds(lengths: Sequence[int], training: Training) -> Iterator[list[int]]:
    """The example numbers of each step of all epochs: shuffled, but similar lengths together, so that little is padded."""
    draw = random.Random(training.seed)
    pool_size = 16 * training.size
    for _ in range(training.epochs):
        order = draw.sample(range(len(lengths)), len(lengths))
        pools = [sorted(order[i : i + pool_size], key=lengths.__getitem__) for i in range(0, len(order), pool_size)]
        steps = [pool[i : i + training.size] for pool in pools for i in range(0, len(pool), training.size)]
        yield from draw.sample(steps, len(steps))


def finetune(examples: Examples, training: Training, title: str) -> nn.Module:
    """MiniLM with a new head, trained in float32 with bfloat16 products; the embeddings are left as they are."""
    torch.manual_seed(training.seed)
    model = classifier(training.classes).train()
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": training.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.rate, fused=True)
    inputs = [{name: column[: training.length] for name, column in example.items()} for example in examples.inputs]
    steps = list(rounds([len(example["input_ids"]) for example in inputs], training))
    warmup = training.warmup * len(steps)
    slope = lambda step: min((step + 1) / warmup, (len(steps) - step) / (len(steps) - warmup))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, slope)
    bar = tqdm(steps, desc=title)
    smooth = None
    for step in bar:
        (batch,) = collate([inputs[i] for i in step], len(step))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch).logits
        loss = training.loss(logits.float(), examples.labels[step])
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *vectors], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
    return model.eval()


def save(name: str, model: nn.Module) -> Path:
    """The trained parameters alone (the rest is in the package that the model comes from); never half a file."""
    path = saved(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({key: value.detach().contiguous() for key, value in model.named_parameters() if value.requires_grad}, str(part))
    os.replace(part, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TRAININGS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[tuple[object, ...]] = [("model, data", "score", "minutes of training")]
    results = {}
    for name in args.tasks:
        start = time.perf_counter()
        task, training = TASKS[name], TRAININGS[name]
        model = finetune(task.examples("train"), training, task.title)
        minutes = (time.perf_counter() - start) / 60
        path = save(name, model)
        scores = task.scores(outputs(task, model), task.examples("test").labels)
        results[name] = scores | {"minutes": minutes, "training": str(training), "file": str(path)}
        rows.append((task.title, ", ".join(f"{k} {v:.2f}" for k, v in scores.items()), f"{minutes:.1f}"))
    print(f"{heading()}\n\n{table(rows)}")
    write("finetune", results, args.json)


if __name__ == "__main__":
    main()
