"""``generate`` on a compiled model: the tokens of the same quantized weights run op by op, and no more graphs than others."""

import pytest
import torch
import transformers as T
from torch._dynamo.testing import CompileCounterWithBackend

from fxquant.backend import pipeline
from fxquant.backend.kernels import KERNELS, SimulatedLinear


def gpt2() -> torch.nn.Module:
    config = T.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=96,
    )  # fmt: skip
    return T.GPT2LMHeadModel(config)


def llama() -> torch.nn.Module:
    config = T.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=97,
        bos_token_id=1, eos_token_id=96,
    )  # fmt: skip
    return T.LlamaForCausalLM(config)


def opt() -> torch.nn.Module:
    config = T.OPTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, vocab_size=97, max_position_embeddings=64,
        word_embed_proj_dim=64, bos_token_id=1, eos_token_id=96, pad_token_id=0,
    )  # fmt: skip
    return T.OPTForCausalLM(config)


MODELS = pytest.mark.parametrize("build", [gpt2, llama, opt])
CACHES = pytest.mark.parametrize("cache", ["dynamic", "static"])


def tokens(
    build: object, backend: object, options: dict[str, object] | None, cache: str, lengths: tuple[int, ...] = (5,)
) -> list[list[int]]:
    """Greedy continuations of prompts of these lengths, by a model seeded alike each time."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model = build().eval()
    for p in model.parameters():
        p.data.mul_(3)  # far from the uniform logits of a fresh model
    model.compile(backend=backend, options=options)
    prompts = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        ids = torch.randint(2, 90, (2, length), generator=prompts)
        out = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation=cache, pad_token_id=0)
        found.append(out.tolist())
    return found


@pytest.mark.parametrize(("build", "cache"), [(gpt2, "dynamic"), (llama, "static")])
def test_tokens_are_those_of_the_same_quantized_weights_run_op_by_op(
    build: object, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = tokens(build, "outlierq", {"inductor": False}, cache)
    monkeypatch.setattr(pipeline, "KERNELS", (SimulatedLinear(),))
    assert lowered == tokens(build, "outlierq", {"inductor": False}, cache)
    assert KERNELS != pipeline.KERNELS


@pytest.mark.slow
@MODELS
@CACHES
def test_tokens_under_inductor_are_those_of_the_same_quantized_weights(
    build: object, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = tokens(build, "outlierq", None, cache)
    monkeypatch.setattr(pipeline, "KERNELS", (SimulatedLinear(),))
    assert compiled == tokens(build, "outlierq", {"inductor": False}, cache)


def graphs(build: object, backend: str, options: dict[str, object] | None, cache: str) -> int:
    counter = CompileCounterWithBackend(backend)
    if options:
        inner = torch._dynamo.lookup_backend(backend)
        counter.backend = backend

        def call(gm: torch.fx.GraphModule, inputs: object) -> object:
            counter.frame_count += 1
            return inner(gm, inputs, options=options)

        tokens(build, call, None, cache, lengths=(5, 9, 3))
        return counter.frame_count
    tokens(build, counter, None, cache, lengths=(5, 9, 3))
    return counter.frame_count


@pytest.mark.parametrize(("build", "cache"), [(opt, "dynamic"), (gpt2, "static")])
def test_new_lengths_cost_no_more_graphs_than_without_quantization(build: object, cache: str) -> None:
    assert graphs(build, "outlierq", {"inductor": False}, cache) <= graphs(build, "eager", None, cache)


@pytest.mark.slow
@MODELS
@CACHES
def test_new_lengths_cost_no_more_graphs_than_inductor(build: object, cache: str) -> None:
    assert graphs(build, "outlierq", None, cache) <= graphs(build, "inductor", None, cache)
