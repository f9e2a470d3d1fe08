"""A Hugging Face model is used as ever: attentions, embeddings given, regional compile, half types."""

import pytest
import torch
import transformers as T

import fxquant
from fxquant.backend.cpu.features import has_vnni

OPTIONS = {"inductor": False}


def bert(**changes: object) -> T.BertModel:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = T.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=97, **changes
    )  # fmt: skip
    return T.BertModel(config).eval()


ids = torch.arange(14).view(2, 7) + 3
mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@torch.no_grad()
def test_attentions_and_hidden_states_are_returned_as_ever() -> None:
    model = bert(attn_implementation="eager")
    asked = {"input_ids": ids, "attention_mask": mask, "output_attentions": True, "output_hidden_states": True}
    expected = model(**asked)
    model.compile(backend="outlierq", options=OPTIONS)
    got = model(**asked)
    assert type(got) is type(expected)
    assert len(got.attentions) == 2 and len(got.hidden_states) == 3
    for a, b in zip([*got.attentions, *got.hidden_states], [*expected.attentions, *expected.hidden_states], strict=True):
        assert a.shape == b.shape and error(a, b) < 0.02
    assert fxquant.explain(model).coverage == 1


@torch.no_grad()
def test_every_weight_is_a_site_of_its_own_though_one_scale_is_made_of_three() -> None:
    model = bert()
    model.compile(backend="outlierq", options=OPTIONS)
    model(ids)
    found = sorted(site.name for site in fxquant.explain(model).sites if site.counted)
    linears = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert found == sorted(linears)


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_tokens() -> None:
    model = bert()
    embeddings = model.embeddings.word_embeddings(ids)
    expected = model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
    model.compile(backend="outlierq", options=OPTIONS)
    assert error(model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state, expected) < 0.02


def test_a_gradient_through_given_embeddings_is_refused() -> None:
    model = bert()
    embeddings = model.embeddings.word_embeddings(ids).detach().requires_grad_()
    model.compile(backend="outlierq", options=OPTIONS)
    with pytest.raises(fxquant.GradientError):
        model(inputs_embeds=embeddings).last_hidden_state.sum().backward()


@torch.no_grad()
def test_the_names_of_a_regional_compile_are_those_of_the_model() -> None:
    model = bert()
    expected = model(ids, attention_mask=mask).last_hidden_state
    for layer in model.encoder.layer:
        layer.compile(backend="outlierq", options=OPTIONS)
    got = model(ids, attention_mask=mask).last_hidden_state
    assert error(got, expected) < 0.02
    names = {site.name for site in fxquant.explain(model).sites}
    assert {"encoder.layer.0.output.dense.weight", "encoder.layer.1.attention.self.query.weight"} <= names
    assert len(names) == 12


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_half_types(dtype: torch.dtype) -> None:
    model = bert().to(dtype)
    expected = model(ids, attention_mask=mask).last_hidden_state
    model.compile(backend="outlierq", options=OPTIONS)
    got = model(ids, attention_mask=mask).last_hidden_state
    assert got.dtype == dtype
    assert error(got, expected) < 0.03
    if has_vnni():
        assert all("simulated" not in site.kernel for site in fxquant.explain(model).sites)


@torch.no_grad()
def test_a_wrapped_model_is_explained_too() -> None:
    model = bert()
    wrapped = torch.compile(model, backend="outlierq", options=OPTIONS)
    wrapped(ids)
    assert str(fxquant.explain(wrapped)) == str(fxquant.explain(model))
    assert "encoder.layer.*.output.dense.weight (2)" in str(fxquant.explain(wrapped))
    assert fxquant.explain(wrapped).unmet == ()


@torch.no_grad()
def test_inference_mode_is_as_good_as_no_grad() -> None:
    model = bert()
    expected = model(ids).last_hidden_state
    model.compile(backend="outlierq", options=OPTIONS)
    with torch.inference_mode():
        for _ in range(2):
            assert error(model(ids).last_hidden_state, expected) < 0.02


@torch.no_grad()
def test_autocast_gives_the_types_that_it_gives_without_us() -> None:
    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.up(x)
            return h, self.down(torch.nn.functional.gelu(h))

    model, x = Mlp(), torch.randn(5, 32)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        model.compile(backend="outlierq", options=OPTIONS)
        got = model(x)
    assert [t.dtype for t in got] == [t.dtype for t in expected] == [torch.bfloat16] * 2
    assert all(error(a, b) < 0.02 for a, b in zip(got, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("rule", ["lm_head", "lm_head.weight", "transformer.wte", "re:lm_head"])
def test_a_tied_head_goes_by_both_of_its_names(rule: str) -> None:
    torch._dynamo.reset()
    config = T.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97, bos_token_id=1, eos_token_id=2)
    model = T.GPT2LMHeadModel(config).eval()
    model.compile(backend="outlierq", options={**OPTIONS, "ignore": [rule]})
    model(ids)
    (head,) = (site for site in fxquant.explain(model).sites if site.name == "transformer.wte.weight" and site.counted)
    assert head.reason == f"ignored by {rule!r}"


@torch.no_grad()
def test_a_product_goes_by_the_name_of_its_module_after_rewriting() -> None:
    torch._dynamo.reset()
    config = T.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, bos_token_id=1, eos_token_id=2)
    model = T.GPT2LMHeadModel(config).eval()
    model.compile(backend="outlierq", options={**OPTIONS, "ignore": ["h.1.mlp"]})
    model(ids)
    skipped = {site.name for site in fxquant.explain(model).sites if site.counted and site.status == "skipped"}
    assert skipped == {"transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"}
    assert "transformer.h.0.mlp.c_fc.weight" in str(fxquant.explain(model))  # alone in its row, so by its full name
