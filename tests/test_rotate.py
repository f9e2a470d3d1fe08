"""Rotations: orthogonal, of any size, fast; the same function on every stream; refused where they would not be."""

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from exactness import captured, copy_of
from graphs import distance, in_double
from hypothesis import given
from hypothesis import strategies as st
from models import ZOO, by_name
from random_graphs import TOLERANCE, Graph, Shape, Transformer, graph_of, graphs, post_norm, pre_norm, relative_error

from fxquant.errors import RecipeError
from fxquant.graph.blocks import Blocks
from fxquant.graph.equivalence import Explicit, Note, Refusal, Rotation, find
from fxquant.graph.fuel import Fuel
from fxquant.numerics.hadamard import WILLIAMSON, Hadamard, hadamard, multiply
from fxquant.patterns.canonical import canonicalize
from fxquant.patterns.rotate import rotate

aten = torch.ops.aten
ONLINE = ("qk", "down")
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
sizes = st.one_of(st.integers(1, 200), st.sampled_from([428, 576, 768, 1536]))


# ---- matrices


@given(sizes, st.integers(0, 9))
def test_a_rotation_of_any_size_is_orthogonal(n, seed):
    matrix = Hadamard.of(n, seed).matrix()
    assert float((matrix.T @ matrix - torch.eye(n)).abs().max()) < 1e-10


@given(sizes, st.integers(0, 9))
def test_the_fast_application_is_the_product_and_keeps_the_norm(n, seed):
    rotation = Hadamard.of(n, seed)
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fast = multiply(x * rotation.signs, rotation.factors)
    torch.testing.assert_close(fast, x @ rotation.matrix(), rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


ORDERS = [n for n in range(1, 260) if hadamard(n) is not None]


def test_hadamard_matrices_are_known_for_nearly_all_multiples_of_four():
    assert [n for n in range(4, 260, 4) if n not in ORDERS] == [188, 236, 244]


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 40, 60, 108, 140, *(4 * t for t in WILLIAMSON)])
def test_a_hadamard_matrix_has_entries_of_one_and_orthogonal_rows(n):
    matrix = hadamard(n)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(("n", "expected"), [(4096, [64, 64]), (11008, [172, 64]), (14336, [28, 16, 32]), (576, [36, 16])])
def test_the_widths_of_well_known_models_are_a_few_small_factors(n, expected):
    assert sorted(map(len, Hadamard.of(n).factors)) == sorted(expected)


def test_the_same_seed_is_the_same_rotation_and_another_is_another():
    assert torch.equal(Hadamard.of(24, 1).matrix(), Hadamard.of(24, 1).matrix())
    assert not torch.equal(Hadamard.of(24, 1).matrix(), Hadamard.of(24, 2).matrix())


def test_an_outlier_channel_is_spread_over_all_channels():
    x = torch.randn(64, 768, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 5] *= 40

    def kurtosis(x):
        return float((x**4).mean() / (x**2).mean() ** 2)

    rotated = x @ Hadamard.of(768).matrix()
    assert kurtosis(x) > 100 and kurtosis(rotated) < 4
    assert rotated.abs().max() < x.abs().max() / 5


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 99))
def test_blocks_multiply_as_the_matrix_that_they_stand_for(runs, seed):
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    blocks = Blocks(m, tuple(runs))
    dense = torch.block_diag(*[m if mapped else torch.ones(1, 1, dtype=torch.float64) for mapped in runs])
    x = torch.randn(2, 2, len(dense), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(blocks.dense(), dense)
    torch.testing.assert_close(x @ blocks, x @ dense)
    torch.testing.assert_close(blocks.T @ x.mT, dense.T @ x.mT)


# ---- random graphs


@given(graphs, st.sampled_from([True, False, ONLINE]))
def test_the_rotated_graph_computes_the_same_function(graph, online):
    before = graph.run()
    rotate(graph.gm, Fuel(), online=online)
    assert relative_error(before, graph.run()) < TOLERANCE


@given(graphs)
def test_a_second_run_changes_nothing(graph):
    rotate(graph.gm, Fuel(), online=ONLINE)
    code = graph.gm.code
    assert {note.outcome for note in rotate(graph.gm, Fuel(), online=ONLINE)} <= {"refused"}
    assert graph.gm.code == code


@given(graphs, st.integers(0, 4))
def test_fuel_of_n_rotates_n_places(graph, n):
    before, fuel = graph.run(), Fuel(limit=n)
    applied = [note for note in rotate(graph.gm, fuel, online=ONLINE) if note.outcome != "refused"]
    assert len(applied) == len(fuel.log) <= n
    assert relative_error(before, graph.run()) < TOLERANCE


def done(notes: list[Note], what: str) -> list[Note]:
    return [note for note in notes if what in note.reason and note.outcome != "refused"]


RMS = Shape(heads=1, groups=2, rms=True, gated=True, activation="silu")
LAYER = Shape(heads=2)
FUSED = Shape(fused=True, transposed=True)


@pytest.mark.parametrize("shape", [RMS, LAYER, FUSED], ids=["rms", "layer norm", "fused"])
@pytest.mark.parametrize("gain", ["negative", "mostly zero"])
def test_stream_values_and_the_input_of_down_are_rotated_in_a_pre_norm_block(shape, gain):
    graph = Transformer(pre_norm, shape).graph(gain=gain)
    before = graph.run()
    notes = rotate(graph.gm, Fuel(), online=ONLINE)
    assert relative_error(before, graph.run()) < TOLERANCE
    assert [len(done(notes, what)) for what in ("residual stream", "values", "queries", "behind")] == [1, 1, 1, 1]
    assert graph.count(aten.layer_norm.default) == 0 and graph.count(aten.rms_norm.default) == 3
    norms = graph.gm.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    assert all(len(norm.args) < 3 or norm.args[2] is None for norm in norms)


def test_offline_rotations_leave_only_the_entry_of_the_stream_in_the_graph():
    graph = Transformer(pre_norm, LAYER).graph()
    products = graph.count(aten.matmul.default)
    graph.gm.graph.eliminate_dead_code()
    rotate(graph.gm, Fuel(), online=False)
    late = [n for n in graph.gm.graph.nodes if n.target is aten.matmul.default and n.meta.get("rotated")]
    assert products == 0 and len(late) == 1 and late[0].args[0].op == "placeholder"


def decoder(norm):
    """Two layers on an embedding with positions and a class token; a tied head."""

    def model(p, x):
        table = p("table", 5, 16)
        h = F.embedding((x[..., 0] > 0).long(), table) + p("positions", 3, 16)
        h = torch.cat([p("class", 1, 1, 16).expand(x.shape[0], -1, -1), h], 1)
        for i in range(2):
            y = F.linear(norm(p, h, f"{i}"), p(f"up{i}", 32, 16))
            h = h + 0.5 * F.linear(F.gelu(y), p(f"down{i}", 16, 32), p(f"b{i}", 16))
        return F.linear(norm(p, h, "last"), table)

    return model


def layer(p, x, name):
    return F.layer_norm(x, (16,), p(f"{name}.gain", 16), p(f"{name}.bias", 16))


def rms(p, x, name):
    return F.rms_norm(x, (16,), p(f"{name}.gain", 16))


@pytest.mark.parametrize("norm", [layer, rms])
def test_positions_class_token_and_tied_table_are_writers(norm):
    graph = graph_of(decoder(norm), X, gain="negative", symbolic=True)
    before = graph.run()
    (note,) = rotate(graph.gm, Fuel(), online=False)
    assert note.outcome == "absorbed" and "5 writers" in note.reason  # table, positions, class token, two linears
    assert relative_error(before, graph.run()) < TOLERANCE


def test_an_rms_stream_keeps_its_mean_and_a_layer_norm_stream_loses_it():
    """The bug of the peers: taking the mean off the writers of an RMSNorm model changes it."""
    for norm, is_zero in ((layer, True), (rms, False)):
        graph = graph_of(decoder(norm), X)
        rotate(graph.gm, Fuel(), online=False)
        rotation = Hadamard.of(16).matrix()
        (added,) = [n for n in graph.gm.graph.find_nodes(op="call_function", target=aten.cat.default) if "rotated" in n.meta]
        graph.gm.graph.output_node().args = (added,)
        (stream,) = graph.run()
        assert bool(((stream @ rotation.T).mean(-1).abs() < 1e-12).all()) is is_zero


def test_the_stream_has_lost_its_outlier():
    def model(p, x):
        h = F.linear(x, p("in", 64, 8)) * 1.0
        for i in range(2):
            y = F.linear(F.rms_norm(h, (64,), p(f"{i}.gain", 64)), p(f"up{i}", 64, 64))
            h = h + F.linear(F.relu(y), p(f"down{i}", 64, 64))
        return F.linear(F.rms_norm(h, (64,), p("gain", 64)), p("head", 4, 64))

    graph = graph_of(model, X)
    graph.inputs[0][7] *= 1000  # one row of "in": one channel of the stream
    found = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            if n.target is aten.rms_norm.default:
                x = self.env[n.args[0]]
                found.append(float((x**4).mean() / (x**2).mean() ** 2))
            return super().run_node(n)

    Watch(graph.gm).run(*graph.inputs)
    before = found.copy()
    rotate(graph.gm, Fuel(), online=False)
    found.clear()
    Watch(graph.gm).run(*graph.inputs)
    assert len(found) == len(before) == 3 and all(b < a / 4 for a, b in zip(before, found, strict=True))


def test_weights_in_float32_are_rotated_in_float64():
    graph = graph_of(decoder(rms), X.float())
    (before,) = graph.run()
    rotate(graph.gm, Fuel(), online=False)
    (after,) = graph.run()
    assert after.dtype is torch.float32
    assert relative_error([before], [after]) < 3e-6
    linears = graph.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert linears and all(linear.meta["val"].dtype is torch.float32 for linear in linears)


# ---- refusals


def refused(graph: Graph, what: str, **arguments: object) -> str:
    before = graph.run()
    notes = rotate(graph.gm, Fuel(), **arguments)
    assert not done(notes, what)
    assert relative_error(before, graph.run()) < TOLERANCE
    return " ".join(note.reason for note in notes if note.outcome == "refused")


def test_a_post_norm_stream_is_refused():
    assert "post-norm" in refused(Transformer(post_norm).graph(), "residual stream", online=False)


def test_a_layer_norm_stream_whose_mean_is_read_is_refused():
    def model(p, x):
        h = F.embedding((x[..., 0] > 0).long(), p("table", 5, 16))
        for i in range(4):
            h = h + F.linear(F.gelu(F.linear(layer(p, h, f"{i}"), p(f"up{i}", 32, 16))), p(f"down{i}", 16, 32))
        return F.linear(h, p("head", 4, 16))

    assert "with its mean" in refused(graph_of(model, X), "residual stream", online=False)


def test_values_that_leave_the_graph_are_refused():
    def cached(p, x):
        q, k, v = (F.linear(x, p(n, 8, 8)).view(2, 3, 2, 4).transpose(1, 2) for n in "qkv")
        out = F.scaled_dot_product_attention(q, k, v)
        return F.linear(out.transpose(1, 2).reshape(2, 3, 8), p("o", 8, 8)), v

    assert "output of the graph" in refused(graph_of(cached, X), "values", online=False)


def test_a_rotation_does_not_pass_a_cut_through_its_channels():
    graph = graph_of(lambda p, x: F.linear(F.linear(x, p("a", 8, 8))[..., :4], p("b", 3, 4)), X)
    assert isinstance(find(graph.gm, graph.node(aten.linear.default), Rotation, explicit=Explicit.NOWHERE), Refusal)


def test_an_unknown_place_is_refused():
    with pytest.raises(RecipeError, match="not at 'up'"):
        rotate(graph_of(lambda p, x: x, X).gm, Fuel(), online=("up",))


def test_a_factor_of_every_row_passes_and_a_factor_of_every_channel_does_not():
    def model(factor):
        return lambda p, x: F.linear(F.linear(x, p("a", 8, 8)) * factor(x), p("b", 3, 8))

    for factor, kind in ((lambda x: x[..., :1], True), (lambda x: x, False)):
        graph = graph_of(model(factor), X)
        region = find(graph.gm, graph.node(aten.linear.default), Rotation, explicit=Explicit.NOWHERE)
        assert isinstance(region, Refusal) is not kind


# ---- real architectures


ROTATED = ("llama", "gpt2", "vit", "t5")  # stream and values; the rest of the zoo is a slow test
ALSO = ("opt", "qwen3", "gemma", "mixtral", "bloom", "llama-tied", "whisper")


@pytest.mark.parametrize(
    "name", [*ROTATED, *(pytest.param(a.name, marks=pytest.mark.slow) for a in ZOO if a.name in ALSO), "bert"]
)
def test_an_architecture_is_rotated_and_computes_what_was_captured(name):
    streams = values = 0
    for gm, inputs in captured(by_name(name)):
        plain = canonicalize(copy_of(gm), Fuel())
        graph = canonicalize(copy_of(gm), Fuel())
        notes = rotate(graph, Fuel(), online=ONLINE)
        assert distance(in_double(plain, inputs), in_double(graph, inputs)) < 1e-10
        streams, values = streams + len(done(notes, "residual stream")), values + len(done(notes, "values"))
    assert values >= 2
    assert streams == (0 if name == "bert" else 2 if name in ("t5", "whisper") else 1)


def test_generation_with_a_cache_is_right_where_queries_and_keys_are_rotated():
    config = T.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=97,
        bos_token_id=1, eos_token_id=96,
    )  # fmt: skip
    rotated = []

    def backend(gm, inputs):
        from fxquant.graph.capture import capture

        graph = canonicalize(capture(gm), Fuel())
        rotated.append(rotate(graph, Fuel(), online=ONLINE))
        return graph.forward

    def tokens(compiled):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model = T.LlamaForCausalLM(config).eval().double()
        for p in model.parameters():
            p.data.mul_(3)
        if compiled:
            model.compile(backend=backend)
        ids = torch.randint(2, 90, (2, 5), generator=torch.Generator().manual_seed(0))
        return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()

    assert tokens(True) == tokens(False)
    assert len(rotated) >= 2 and all(len(done(notes, "queries")) == 2 for notes in rotated)
    assert all(done(notes, "residual stream") for notes in rotated)


def test_a_constant_rotation_is_one_buffer_however_many_places_it_turns():
    graph = Transformer(pre_norm, LAYER).graph()
    before = len(dict(graph.gm.named_buffers()))
    rotate(graph.gm, Fuel(), online=ONLINE)
    sizes_met = {8, 4, 16}
    assert len(dict(graph.gm.named_buffers())) - before == 2 * len(sizes_met) + 1  # signs, factor; the centring
