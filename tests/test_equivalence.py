"""The table of laws is proved and attacked; maps are moved, left over or refused, and nothing is changed by halves."""

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from random_graphs import TOLERANCE, Graph, Shape, Transformer, graph_of, pre_norm, relative_error

from fxquant.graph.equivalence import (
    LAWS,
    Applied,
    Centre,
    Effect,
    Explicit,
    Law,
    PositiveScale,
    Refusal,
    Region,
    Rotation,
    Scale,
    Shift,
    apply,
    constant,
    find,
    site_name,
    source_of,
    weight_algebra,
)
from fxquant.graph.fuel import Fuel
from fxquant.graph.identities import sides
from fxquant.patterns.migrate_gain import migrate_gain

aten = torch.ops.aten
LINEAR, LAYER_NORM, MUL = aten.linear.default, aten.layer_norm.default, aten.mul.Tensor

ROWS = [(law, op) for law in LAWS for op in law.ops]
OBEYED = [(law, op) for law, op in ROWS if law.effect is not Effect.STOPS]
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spoken(row: tuple[Law, object]) -> str:
    law, op = row
    return f"{op}: {law.kind.__name__}, {law.says}"


# ---- the table


PROVABLE = [law for law in LAWS if law.effect is not Effect.STOPS]


@pytest.mark.parametrize("law", PROVABLE, ids=lambda law: f"{law.kind.__name__}: {law.says}")
def test_sympy_proves_the_identity(law):
    for op, entries in law.identity().items():
        assert entries and all(entry == 0 for entry in entries), op


class Numbers:
    """As the symbols of a proof: random numbers for Hypothesis to attack with."""

    def __init__(self, seed: int, size: float) -> None:
        self._generator, self._size = torch.Generator().manual_seed(seed), size

    def __call__(self, *shape: int) -> torch.Tensor:
        return self._size * torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def positive(self, *shape: int) -> torch.Tensor:
        return self(*shape).exp().clamp(1e-3, 1e3)

    def rotation(self, size: int) -> torch.Tensor:
        return torch.linalg.qr(self(size, size))[0]

    def index(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows)


def run(op: object, given: list) -> torch.Tensor:
    if "grouped_mm" in str(op):  # CPUs have no kernel for float64: one group is one product
        return given[0] @ given[1][0]
    return op(*given)


@given(st.sampled_from(OBEYED), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 3.0]))
def test_the_real_op_obeys_its_row(row, seed, size):
    law, op = row
    left, right = sides(op, law, Numbers(seed, size), run)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("row", [row for row in ROWS if row[0].effect is Effect.STOPS], ids=spoken)
def test_a_row_that_stops_a_map_has_a_counterexample(row):
    law, op = row
    left, right = sides(op, law, Numbers(0, 1.0), run)
    assert (left - right).abs().max() > 1e-3


def test_a_negative_scale_does_not_pass_relu():
    x, s = torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -1.0])
    assert not torch.equal(F.relu(x / s), F.relu(x) / s)
    graph = graph_of(lambda p, x: F.linear(F.relu(F.linear(x, p("up", 6, 8))), p("down", 8, 6)), X)
    assert isinstance(find(graph.gm, graph.node(LINEAR), Scale, explicit=Explicit.NOWHERE), Refusal)
    assert isinstance(find(graph.gm, graph.node(LINEAR), PositiveScale, explicit=Explicit.NOWHERE), Region)


# ---- maps that are moved


def vector(graph: Graph, size: int, seed: int = 5) -> torch.fx.Node:
    """Random numbers away from zero, of both signs, as a constant of the graph."""
    s = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return constant(graph.gm, s + s.sign())


def positive(graph: Graph, size: int, seed: int = 5) -> torch.fx.Node:
    return weight_algebra(graph.gm, lambda s: s.abs(), vector(graph, size, seed))


def moved(graph: Graph, cut: torch.fx.Node, map, **arguments) -> Applied:
    """Apply and compare; what was applied."""
    before = graph.run()
    applied = apply(graph.gm, cut, map, **arguments)
    assert isinstance(applied, Applied), applied
    assert relative_error(before, graph.run()) < TOLERANCE
    return applied


def value_path(p, x):
    sizes = {"q": 16, "k": 8, "v": 8}
    q, k, v = (F.linear(x, p(n, m, 8), p(f"{n}.b", m)).view(2, 3, -1, 4).transpose(1, 2) for n, m in sizes.items())
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return F.linear(out.transpose(1, 2).reshape(2, 3, 16), p("o", 8, 16))


@pytest.mark.parametrize("kind", [Scale, Shift])
def test_a_map_goes_from_the_values_through_attention_to_the_output_projection(kind):
    graph = graph_of(value_path, X)
    applied = moved(graph, graph.node(LINEAR, 2), kind(vector(graph, 8)), explicit=Explicit.NOWHERE)
    assert [site_name(site.node) for site in applied.region.readers] == ["o"]
    assert not applied.explicit


def test_a_shift_stays_before_attention_under_a_mask_that_may_forbid_a_whole_row():
    def masked(p, x):
        v = F.linear(x, p("v", 8, 8)).view(2, 3, 2, 4).transpose(1, 2)
        out = F.scaled_dot_product_attention(v, v, v, attn_mask=x[:, None, :, :3] > 0)
        return F.linear(out.transpose(1, 2).reshape(2, 3, 8), p("o", 8, 8))

    graph = graph_of(masked, X)
    assert isinstance(find(graph.gm, graph.node(LINEAR), Shift), Refusal)


def test_the_values_of_a_fused_projection_are_scaled_and_the_rest_is_left_alone():
    transformer = Transformer(pre_norm, Shape(fused=True, groups=2))
    graph = transformer.graph()
    cut = source_of(graph.node(LINEAR, 1).args[0])
    assert cut.target is operator.getitem
    applied = moved(graph, cut, Scale(vector(graph, 8)), explicit=Explicit.NOWHERE)
    assert [site_name(s.node) for s in applied.region.producers] == ["attention.qkv.weight"]
    assert [site_name(s.node) for s in applied.region.readers] == ["attention.o.weight"]


def test_the_gate_of_a_gated_mlp_lets_the_scale_of_the_other_branch_pass():
    transformer = Transformer(pre_norm, Shape(gated=True, activation="silu"))
    graph = transformer.graph()
    down = next(n for n in graph.gm.graph.nodes if n.target is LINEAR and site_name(n) == "mlp.down.weight")
    cut = source_of(down.args[0])
    assert site_name(cut) == "mlp.up.weight"
    assert not moved(graph, cut, Scale(vector(graph, 16)), explicit=Explicit.NOWHERE).explicit


def test_behind_gelu_one_multiply_is_left_before_the_linear_and_other_readers_keep_the_value():
    graph = graph_of(lambda p, x: (F.linear(y := F.gelu(x), p("w", 5, 8)), y.tanh()), X)
    cut = graph.node(aten.gelu.default)
    assert isinstance(find(graph.gm, cut, Scale), Refusal)
    applied = moved(graph, cut, Scale(vector(graph, 8)), explicit=Explicit.SOURCE)
    (multiply,) = applied.explicit
    assert list(multiply.users) == [graph.node(LINEAR)]
    assert graph.node(aten.tanh.default).args == (cut,)


def test_a_post_norm_shortcut_keeps_one_explicit_multiply_for_all_that_cannot_absorb():
    def block(p, x):
        y = F.layer_norm(x, (8,), p("gain", 8), p("bias", 8))
        return y + F.linear(F.gelu(F.linear(y, p("up", 9, 8))), p("down", 8, 9)), y

    graph = graph_of(block, X)
    applied = moved(graph, graph.node(LAYER_NORM), Scale(vector(graph, 8)))
    assert len(applied.explicit) == 1 and len(applied.explicit[0].users) == 2


def test_the_residual_stream_of_rms_norms_without_gains_can_be_rotated():
    def decoder(p, x):
        ids = (x[..., 0] > 0).long()
        h = F.embedding(ids, p("table", 4, 8)) + p("positions", 3, 8)
        for i in range(2):
            h = h + F.linear(F.gelu(F.linear(F.rms_norm(h, (8,)), p(f"up{i}", 9, 8))), p(f"down{i}", 8, 9), p(f"b{i}", 8))
        return F.linear(F.rms_norm(h, (8,)), p("head", 4, 8))

    graph = graph_of(decoder, X)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    cut = graph.node(aten.add.Tensor, 1)
    applied = moved(graph, cut, Rotation(constant(graph.gm, rotation)), explicit=Explicit.NOWHERE)
    assert len(applied.region.readers) == 3  # up, up, head
    assert len(applied.region.producers) == 3 and len(applied.region.constants) == 1  # table, down, down; positions
    assert not applied.explicit


def test_a_rotation_is_refused_at_a_norm_with_a_gain():
    graph = graph_of(lambda p, x: F.linear(F.rms_norm(F.linear(x, p("a", 8, 8)), (8,), p("gain", 8)), p("b", 8, 8)), X)
    refusal = find(graph.gm, graph.node(LINEAR), Rotation, explicit=Explicit.NOWHERE)
    assert isinstance(refusal, Refusal) and "without a gain" in refusal.reason


def test_a_bfloat16_graph_stays_bfloat16():
    x = X.bfloat16()
    graph = graph_of(lambda p, x: F.linear(F.layer_norm(x, (8,), p("gain", 8), p("bias", 8)), p("w", 4, 8)) + 1, x)
    before = graph.run()
    assert [note.outcome for note in migrate_gain(graph.gm, Fuel())] == ["absorbed"]
    assert graph.node(LINEAR).args[1].op == "call_function"
    (after,) = graph.run()
    assert after.dtype is torch.bfloat16
    assert relative_error([before[0].float()], [after.float()]) < 0.05
    assert all(n.meta["val"].dtype is torch.bfloat16 for n in graph.gm.graph.nodes if n.target in (LINEAR, LAYER_NORM))


def test_a_float32_gain_does_not_widen_a_bfloat16_weight():
    def mixed(p, x):
        y = F.layer_norm(x.float(), (8,), p("gain", 8).float(), None).bfloat16()
        return F.linear(y, p("w", 4, 8))

    graph = graph_of(mixed, X.bfloat16())
    assert [note.outcome for note in migrate_gain(graph.gm, Fuel())] == ["absorbed"]
    assert graph.run()[0].dtype is torch.bfloat16


CONSTANTS = {
    "integers": lambda p: torch.arange(8),
    "a mask": lambda p: torch.arange(8) > 3,
    "float32": lambda p: torch.arange(8.0),
    "bfloat16": lambda p: p("c", 8).bfloat16(),
    "a number in a tensor": lambda p: torch.tensor(3),
}
WITH_A_CONSTANT = {
    "added": lambda w, y, c: w(y + c),
    "added to it": lambda w, y, c: w(c + y),
    "beside": lambda w, y, c: w(torch.cat([y, c.expand(2, 1, 8)], 1)),
    "multiplied": lambda w, y, c: w(y) + (y * c).tanh().sum(-1, keepdim=True),
    "multiplied by it": lambda w, y, c: w(y) + (c * y).tanh().sum(-1, keepdim=True),
}


@pytest.mark.parametrize("made", CONSTANTS)
@pytest.mark.parametrize("op", WITH_A_CONSTANT)
def test_an_operand_of_another_type_takes_the_map_in_the_type_of_the_result(op, made):
    def model(p, x):
        return WITH_A_CONSTANT[op](lambda y: F.linear(y, p("w", 4, 8)), gain(p, x), CONSTANTS[made](p))

    graph = graph_of(model, X)
    before = graph.run()
    has_channels = not (made == "a number in a tensor" and op.startswith("added"))
    assert [note.outcome for note in migrate_gain(graph.gm, Fuel())] == ["absorbed" if has_channels else "refused"]
    assert relative_error(before, graph.run()) < TOLERANCE


# ---- the group of maps


def norm_and_shortcut(p, x):
    y = F.layer_norm(x, (8,), p("gain", 8), p("bias", 8))
    return y + F.linear(F.relu(F.linear(y, p("up", 9, 8))), p("down", 8, 9))


seeds = st.integers(0, 2**16)


@given(seeds, seeds)
def test_one_map_after_another_is_their_product(first, second):
    both, once = graph_of(norm_and_shortcut, X), graph_of(norm_and_shortcut, X)
    for seed in (first, second):
        moved(both, both.node(LAYER_NORM), Scale(vector(both, 8, seed)))
    product = weight_algebra(once.gm, lambda s, t: s * t, vector(once, 8, first), vector(once, 8, second))
    moved(once, once.node(LAYER_NORM), Scale(product))
    assert values_of(both) == pytest.approx(values_of(once), rel=1e-12)


@given(seeds)
def test_a_map_and_its_inverse_restore_every_weight(seed):
    graph = graph_of(norm_and_shortcut, X)
    before = values_of(graph)
    s = vector(graph, 8, seed)
    moved(graph, graph.node(LAYER_NORM), Scale(s))
    moved(graph, graph.node(LAYER_NORM), Scale(weight_algebra(graph.gm, lambda s: 1 / s, s)))
    assert values_of(graph) == pytest.approx(before, rel=1e-12)


def values_of(graph: Graph) -> list[float]:
    """What the norm and the first linear work with, and the linear's input."""
    found = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.target in (LAYER_NORM, LINEAR):
                found[n] = [t for t in self.map_nodes_to_values(n.args, n) if isinstance(t, torch.Tensor)]
            return result

    Watch(graph.gm).run(*graph.inputs)
    return torch.cat([t.flatten() for tensors in found.values() for t in tensors]).tolist()


@given(seeds)
def test_the_shift_comes_before_the_scale_and_sees_the_unscaled_weight(seed):
    graph = graph_of(norm_and_shortcut, X)
    moved(graph, graph.node(LAYER_NORM), Shift(vector(graph, 8, seed)))
    moved(graph, graph.node(LAYER_NORM), Scale(vector(graph, 8, seed + 1)))


# ---- refusals


R = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
MAPS = {
    Scale: lambda graph, n: Scale(vector(graph, n)),
    Shift: lambda graph, n: Shift(vector(graph, n)),
    Rotation: lambda graph, n: Rotation(constant(graph.gm, R[:n, :n])),
}


def between(a, b, first=lambda x: x):
    """Two linears with ``a`` and ``b`` for their weights; the map is on what the first makes."""
    return lambda p, x: F.linear(first(F.linear(x, *a(p))), *b(p))


def plain(p):
    return p("b", 4, 8), p("bb", 4)


# What has no channels where the map needs them: the model, the kinds of map, their length.
CANNOT = {
    "a vector reads": (between(lambda p: [p("a", 8, 8)], lambda p: [p("v", 8)]), (Scale, Shift, Rotation), 8),
    "a vector makes": (lambda p, x: F.linear(F.linear(x, p("v", 8)), p("b", 4, 3)), (Scale, Shift), 3),
    "a matrix times a vector": (lambda p, x: F.linear(x, p("a", 8, 8)) @ p("v", 8), (Scale, Rotation), 8),
    "one channel, expanded": (between(lambda p: [p("a", 1, 8)], plain, lambda y: y.expand(2, 3, 8)), (Scale, Shift), 1),
    "one bias for all": (between(lambda p: [p("a", 8, 8), p("c", 1)], plain), (Rotation,), 8),
    "one constant for all": (between(lambda p: [p("a", 8, 8)], plain, lambda y: y + 3), (Rotation,), 8),
    "one parameter for all": (lambda p, x: F.linear(F.linear(x, p("a", 8, 8)) + p("c", 1), p("b", 4, 8)), (Rotation,), 8),
    "integers between": (between(lambda p: [p("a", 8, 8)], plain, lambda y: (10 * y).long().double()), (Scale, Shift), 8),
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds, _) in CANNOT.items() for kind in kinds])
def test_what_has_no_channels_where_the_map_needs_them_refuses_it(name, kind):
    model, _, size = CANNOT[name]
    graph = graph_of(model, X)
    cuts = [graph.node(LINEAR)] if name != "integers between" else [graph.node(LINEAR), graph.node(aten.to.dtype, -1)]
    for cut in cuts:
        before = graph.run()
        refusal = apply(graph.gm, cut, MAPS[kind](graph, size), explicit=Explicit.NOWHERE)
        assert isinstance(refusal, Refusal)
        assert relative_error(before, graph.run()) == 0


C = torch.eye(8, dtype=torch.float64) - 1 / 8
MAPS[Centre] = lambda graph, n: Centre(constant(graph.gm, C))
SCORES = {
    "along the wrong axis": lambda s: s.softmax(1),
    "not at all": lambda s: s,
    "and then cut": lambda s: s.softmax(-1)[:, :2, :] * 2,
    "and then cut short": lambda s: F.pad(s.softmax(-1)[..., :2], (0, 1)),
}


def attended(scores):
    return lambda p, y, x: scores(x @ x.mT) @ y


# For every condition of the table what does not meet it: the map on a linear's output, what is made of it, the kind of map.
UNMET = {
    **{("rows_sum_to_one", how): (Shift, attended(scores), 8) for how, scores in SCORES.items()},
    ("_unit_alpha", "added three times"): (Shift, lambda p, y, x: torch.add(x, y, alpha=3), 8),
    ("_unit_alpha", "to a constant three times"): (Shift, lambda p, y, x: torch.add(p("c", 8), y, alpha=3), 8),
    ("_unit_alpha", "a constant three times"): (Shift, lambda p, y, x: torch.add(y, p("c", 8), alpha=3), 8),
    ("_one_axis", "centred"): (Centre, lambda p, y, x: F.layer_norm(y, (3, 8)), 8),
    ("_one_axis", "made"): (Scale, lambda p, y, x: F.layer_norm(x, (3, 8)), 8),
    ("_one_axis", "made, rms"): (Scale, lambda p, y, x: F.rms_norm(x, (3, 8)), 8),
    ("_one_axis", "made, shifted"): (Shift, lambda p, y, x: F.layer_norm(x, (3, 8), p("g", 3, 8)), 8),
    ("no_gain", "a gain"): (Rotation, lambda p, y, x: F.rms_norm(y, (8,), p("g", 8)), 8),
    ("factor_per_row", "times one per channel"): (Rotation, lambda p, y, x: y * x, 8),
    ("factor_per_row", "over one per channel"): (Rotation, lambda p, y, x: y / p("c", 8), 8),
    ("factor_per_row_first", "one per channel times"): (Rotation, lambda p, y, x: x * y, 8),
    ("cat", "beside others"): (Scale, lambda p, y, x: torch.cat([y, p("c", 2, 3, 8)], -1), 16),
    ("cat", "beside itself, turned"): (Rotation, lambda p, y, x: torch.cat([y, p("c", 2, 3, 8)], -1), 16),
}


def test_every_condition_has_what_does_not_meet_it():
    here = {"has_matrix", "has_whole_bias"}  # of these CANNOT has it
    assert {law.only_if.__name__ for law in LAWS if law.only_if} <= {condition for condition, _ in UNMET} | here


@pytest.mark.parametrize("name", UNMET, ids=" ".join)
def test_where_a_condition_is_not_met_a_map_is_refused_or_goes_another_way(name):
    kind, made, size = UNMET[name]
    graph = graph_of(lambda p, x: F.linear(made(p, F.linear(x, p("a", 8, 8)), x), p("b", 4, size)), X)
    cut = next((n for n in graph.gm.graph.nodes if "norm" in str(n.target)), None) if "made" in name[1] else graph.node(LINEAR)
    before = graph.run()
    outcome = apply(graph.gm, cut, MAPS[kind](graph, 8), explicit=Explicit.NOWHERE)
    assert isinstance(outcome, Refusal) or name[1] == "a constant three times"
    assert name[0] != "cat" or "mixes the channels with another axis" in outcome.reason
    assert relative_error(before, graph.run()) < TOLERANCE


def test_a_gain_is_not_migrated_into_a_vector_but_past_it():
    graph = graph_of(lambda p, x: F.linear(y := gain(p, x), p("w", 4, 8)) + (y @ p("v", 8))[..., None], X)
    before = graph.run()
    (note,) = migrate_gain(graph.gm, Fuel())
    assert note.outcome == "explicit"
    assert relative_error(before, graph.run()) < TOLERANCE


def test_a_residual_stream_of_any_length_is_walked():
    def deep(p, x):
        h = F.linear(x, p("e", 8, 8))
        for i in range(400):
            h = h + F.linear(x, p(f"w{i % 2}", 8, 8))
        return F.linear(h, p("head", 4, 8))

    graph = graph_of(deep, X)
    region = find(graph.gm, graph.node(aten.add.Tensor, 399), Rotation, explicit=Explicit.NOWHERE)
    assert isinstance(region, Region) and len(region.producers) == 401


def test_where_channels_begin_is_found_at_once_in_products_of_products():
    def powers(p, x):
        for _ in range(200):
            x = F.relu(x) * x
        return F.linear(x, p("w", 4, 8))

    graph = graph_of(powers, X)
    product = graph.node(LINEAR).args[0]
    assert source_of(product) is product


def test_fuel_is_taken_and_nothing_changes_without_it():
    graph = graph_of(norm_and_shortcut, X)
    s = vector(graph, 8)
    before = str(graph.gm.graph)
    refusal = apply(graph.gm, graph.node(LAYER_NORM), Scale(s), fuel=Fuel(limit=0))
    assert isinstance(refusal, Refusal) and refusal.reason == "no fuel left"
    assert str(graph.gm.graph) == before


def gain(p, x):
    return F.layer_norm(x, (8,), p("gain", 8), p("bias", 8))


REFUSED = {
    "no linear that reads": lambda p, x: gain(p, x),
    "softmax": lambda p, x: gain(p, x).softmax(-1),
    "not homogeneous": lambda p, x: F.linear(F.gelu(gain(p, x)), p("w", 4, 8)),
    "statistics of a norm": lambda p, x: F.linear(F.layer_norm(gain(p, x), (8,)), p("w", 4, 8)),
    "in place": lambda p, x: (F.linear(y := gain(p, x), p("w", 4, 8)), y.view(-1).zero_()),
    "depends on an input": lambda p, x: F.linear(F.layer_norm(x, (8,), p("gain", 8) * x.mean()), p("w", 4, 8)),
    "has no weight to take it": lambda p, x: gain(p, x) @ x.transpose(1, 2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_says_why_and_changes_nothing(reason):
    graph = graph_of(REFUSED[reason], X)
    code = graph.gm.code
    (note,) = migrate_gain(graph.gm, Fuel())
    assert note.outcome == "refused" and reason in note.reason, note
    graph.gm.recompile()
    assert graph.gm.code == code


def test_a_region_that_leaves_nothing_over_is_refused_at_a_shortcut():
    graph = graph_of(norm_and_shortcut, X)
    refusal = find(graph.gm, graph.node(LAYER_NORM), Scale, explicit=Explicit.NOWHERE)
    assert isinstance(refusal, Refusal)


def test_a_symbolic_batch_adds_no_reader_and_no_guard():
    def reads_its_batch(p, x):
        y = gain(p, x)
        return F.linear(y, p("w", 4, 8)).view(y.shape[0] * 3, 4)

    graph = graph_of(reads_its_batch, X, symbolic=True)
    (note,) = migrate_gain(graph.gm, Fuel())
    assert note.outcome == "absorbed"
    assert not graph.gm.meta["fake_mode"].shape_env.guards


def test_a_weight_that_the_graph_writes_to_is_no_weight():
    def written(p, x):
        w = p("w", 4, 8)
        w.add_(x.sum())
        return F.linear(gain(p, x), w)

    graph = graph_of(written, X)
    (note,) = migrate_gain(graph.gm, Fuel())
    assert note.outcome == "refused"


def test_a_value_that_gates_itself_is_not_scaled_twice():
    graph = graph_of(lambda p, x: F.linear((y := F.linear(x, p("a", 8, 8))) * y, p("b", 4, 8)), X)
    assert isinstance(find(graph.gm, graph.node(LINEAR), Scale), Refusal)


def test_an_operand_broadcast_over_the_channels_makes_no_region():
    graph = graph_of(lambda p, x: F.linear(F.linear(x, p("a", 8, 8)) + F.linear(x, p("one", 1, 8)), p("b", 4, 8)), X)
    assert isinstance(find(graph.gm, graph.node(LINEAR), Scale, explicit=Explicit.NOWHERE), Refusal)


def test_two_summands_are_scaled_together_if_nothing_may_be_left_over():
    graph = graph_of(lambda p, x: F.linear(F.linear(x, p("a", 8, 8)) + F.linear(x, p("c", 8, 8)), p("b", 4, 8)), X)
    applied = moved(graph, graph.node(LINEAR), Scale(vector(graph, 8)), explicit=Explicit.NOWHERE)
    assert [site_name(site.node) for site in applied.region.producers] == ["a", "c"]
