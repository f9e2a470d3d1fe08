"""Which tile a product gets: what the model of the cost says, what was timed before it, and what becomes of a damaged table."""

import itertools
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from graphs import graph_of
from hypothesis import given
from hypothesis import strategies as st

from fxquant.backend.triton import attention, launch, tables
from fxquant.backend.triton.cost import ASKED_BEFORE, LATENCY, cost, least
from fxquant.backend.triton.gpus import A100, H200, KNOWN, L40S, RTX4090, described
from fxquant.backend.triton.refuse import WIDTHS
from fxquant.backend.triton.tile import BUCKETS, LONG, MAX_PARTS, MOST, Choice, Problem, Tile, bucket, candidates

W4A8 = Problem(16, 4096, 4096, 4, width=128, group_size=128)
FORMS = (
    dict(bits=8), dict(bits=8, words=False), dict(bits=4, width=128, group_size=128), dict(bits=3, width=64, group_size=128),
    dict(bits=2, width=128), dict(bits=4, floats=True, width=64, group_size=128), dict(bits=8, floats=True, width=64),
    dict(bits=4, floats=True, shifted=True, width=64, group_size=128),
    dict(bits=4, floats=True, codebook=True, width=64, group_size=64),
)  # fmt: skip


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    form = {"group_size": (K := 128 * draw(st.integers(1, 128))), **draw(st.sampled_from(FORMS))}
    M = draw(st.sampled_from([1, 2, *BUCKETS, MOST]))
    return Problem(M, draw(st.integers(1, 20000)), K, products=draw(st.sampled_from([1, 2])), **form)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    return tmp_path


# ---- what the model says ---------------------------------------------------------------------------------------------
@given(problems(), st.sampled_from(KNOWN))
def test_every_product_has_a_tile_that_fits_and_no_other(problem, on):
    ranked = launch.ranked(problem, on)
    assert ranked and len(set(ranked)) == len(ranked)
    for tile, parts in ranked:
        assert problem.shared(tile) <= on.shared
        assert parts & (parts - 1) == 0 and parts <= MAX_PARTS
        assert parts == 1 or 2 * parts <= -(-problem.K // problem.block(tile))


@given(problems(), st.sampled_from(KNOWN))
def test_no_tile_is_faster_than_the_roofline(problem, on):
    costs = [cost(problem, choice, on).total for choice in launch.ranked(problem, on)]
    assert costs == sorted(costs)
    assert all(least(problem, on) < c for c in costs)


@given(problems(), st.sampled_from(KNOWN))
def test_more_tokens_never_cost_less_with_one_tile(problem, on):
    for choice in candidates(replace(problem, tokens=64), on):
        few, many = (cost(replace(problem, tokens=M), choice, on) for M in (64, 1024))
        assert few.total <= many.total


def test_few_outputs_split_k_and_many_do_not():
    wide = replace(W4A8, N=65536)
    assert launch.ranked(replace(W4A8, N=512, K=16384), H200)[0].parts > 1
    assert launch.ranked(wide, H200)[0].parts == 1


def test_a_faster_memory_makes_a_decode_faster_and_faster_products_a_prefill():
    decode, prefill = replace(W4A8, N=28672, K=8192), replace(W4A8, tokens=MOST, N=28672, K=8192)
    slower = {"memory": replace(H200, bandwidth=1200), "products": replace(H200, integers=495)}

    def time(problem, on):
        return cost(problem, launch.ranked(problem, on)[0], on).total

    assert time(decode, slower["memory"]) > 2 * time(decode, H200) and time(decode, slower["products"]) < 1.1 * time(
        decode, H200
    )
    assert time(prefill, slower["products"]) > 2 * time(prefill, H200)
    assert time(prefill, slower["memory"]) < 1.1 * time(prefill, H200)


@given(problems(), st.sampled_from(KNOWN))
def test_persistent_programs_are_for_many_tiles_of_int8_products_and_never_where_they_are_predicted_to_be_slower(problem, on):
    ranked = launch.ranked(problem, on)
    for choice in (c for c in ranked if c.tile.persistent):
        tile = choice.tile
        assert problem.codes is None and not problem.floats and problem.tokens >= LONG and choice.parts == 1
        tiles, programs = -(-problem.tokens // tile.bm) * -(-problem.N // tile.bn), tile.persistent * on.processors
        assert tiles >= 2 * programs
        assert tile.persistent * problem.shared(tile) <= on.shared_all
        alone = Choice(replace(tile, persistent=0))
        assert alone in ranked  # a plain one beside each
        if choice == ranked[0]:
            assert cost(problem, choice, on).total <= cost(problem, alone, on).total


def test_what_persistent_programs_save_is_the_wait_at_the_beginning_of_all_tiles_but_the_first():
    problem, tile = Problem(MOST, 4096, 4096, 8), Tile(128, 128, 128, 8, 4)
    each, walking = (cost(problem, Choice(replace(tile, persistent=n)), H200) for n in (0, 1))
    tiles = -(-32 * 32 // H200.processors)  # of the processor that has most
    assert each.start == pytest.approx(LATENCY * tiles)
    assert walking.start == pytest.approx(LATENCY * (1 + (tiles - 1) * (1 - ASKED_BEFORE)))
    assert (walking.memory, walking.cache, walking.product) == (each.memory, each.cache, each.product)
    assert walking.issue > each.issue and walking.registers > each.registers
    assert walking.total < each.total and launch.ranked(problem, H200)[0].tile == replace(tile, persistent=1)
    assert launch.chosen(problem, H200).tile == tile  # before it was timed
    few = replace(problem, N=256)  # 64 tiles for 132 processors
    assert not any(c.tile.persistent for c in candidates(few, H200))


def test_one_token_is_multiplied_by_dp4a_where_rows_are_whole_words():
    one = Problem(1, 4096, 4096, 8)
    assert any(c.tile.bm == 1 for c in candidates(one, A100))
    assert not any(c.tile.bm == 1 for c in candidates(replace(one, words=False), A100))
    assert not any(c.tile.bm < 8 for c in candidates(replace(one, tokens=8), A100))


def test_a_tile_that_was_seen_to_spill_is_not_to_be_had():
    pair = Problem(64, 4096, 4096, 4, width=128, group_size=128, products=2)
    spills = (64, 64, 8)  # on an A100
    assert spills not in [(c.tile.bm, c.tile.bn, c.tile.warps) for c in candidates(pair, A100)]
    assert spills in [(c.tile.bm, c.tile.bn, c.tile.warps) for c in candidates(pair, H200)]


def test_a_bucket_is_the_least_that_holds_the_tokens():
    assert [bucket(M) for M in (0, 1, 2, 3, 8, 9, 16, 17, 100, 2048, 2049, 10**6)] == [
        8,
        1,
        2,
        8,
        8,
        16,
        16,
        32,
        128,
        2048,
        MOST,
        MOST,
    ]


def test_a_gpu_is_told_by_its_name_and_an_unknown_one_by_what_is_not_newer():
    def properties(name, major, minor, processors, **more):
        return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=processors, **more)

    assert replace(described(properties("NVIDIA H200", 9, 0, 132)), name=H200.name) == H200
    assert replace(described(properties("NVIDIA GeForce RTX 4090", 8, 9, 128)), name=RTX4090.name) == RTX4090
    cut = described(properties("NVIDIA H200", 9, 0, 66))  # half of one
    assert (cut.integers, cut.shared) == (H200.integers / 2, H200.shared)
    newer = described(properties("NVIDIA B300", 10, 3, 160, memory_clock_rate=4_000_000, memory_bus_width=8192))
    assert newer.capability == 90 and newer.bandwidth == 8192 and newer.name == "NVIDIA B300"
    older = described(properties("NVIDIA T4", 7, 5, 40))
    assert older.capability == A100.capability


# ---- what was timed --------------------------------------------------------------------------------------------------
def slowest(problem=W4A8, on=H200) -> Choice:
    return launch.ranked(problem, on)[-1]


def test_what_was_timed_goes_before_the_model(folder):
    assert launch.choose(W4A8, H200) == launch.ranked(W4A8, H200)[0] != slowest()
    path = tables.keep({W4A8: (slowest(), 12.5)}, H200)
    assert path.parent == folder and json.loads(path.read_text())["gpu"] == "H200"
    assert launch.choose(W4A8, H200) == slowest()
    assert launch.choose(replace(W4A8, N=4097), H200) == launch.ranked(replace(W4A8, N=4097), H200)[0]
    assert launch.choose(W4A8, L40S) == launch.ranked(W4A8, L40S)[0]  # another GPU


def test_a_table_names_persistent_tiles_and_one_from_before_them_means_plain_ones(folder):
    problem = Problem(MOST, 4096, 4096, 8)
    persistent = Choice(Tile(128, 64, 128, 8, 3, persistent=2))
    path = tables.keep({problem: (persistent, 100.0)}, H200)
    found = json.loads(path.read_text())
    assert found["choices"][str(problem)]["tile"]["persistent"] == 2
    assert launch.choose(problem, H200) == persistent
    del found["choices"][str(problem)]["tile"]["persistent"]
    path.write_text(json.dumps(found))
    assert launch.choose(problem, H200) == Choice(replace(persistent.tile, persistent=0))
    found["choices"][str(problem)]["tile"]["persistent"] = 3
    path.write_text(json.dumps(found))
    with pytest.warns(UserWarning, match="no tile that the kernel may run with"):
        assert launch.choose(problem, H200) == launch.untimed(problem, H200)


def test_what_is_added_leaves_what_was_there_and_replaces_the_same(folder):
    wide = replace(W4A8, N=8192)
    tables.keep({W4A8: (slowest(), 12.5)}, H200)
    tables.keep({wide: (slowest(wide), 20.0)}, H200)
    tables.keep({W4A8: (launch.ranked(W4A8, H200)[1], 11.0)}, H200)
    assert launch.choose(W4A8, H200) == launch.ranked(W4A8, H200)[1]
    assert launch.choose(wide, H200) == slowest(wide)
    assert [p.suffix for p in sorted(folder.iterdir())] == [".json", ".lock"]


def test_other_kernels_do_not_find_it(folder, monkeypatch):
    tables.keep({W4A8: (slowest(), 12.5)}, H200)
    monkeypatch.setattr(tables, "version", lambda: "another")
    assert launch.choose(W4A8, H200) == launch.ranked(W4A8, H200)[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"choices": 3}', '{"choice": {}}', "\xff\xfe"])
def test_a_damaged_table_is_ignored_with_one_warning_and_written_anew(folder, text):
    (folder / tables.file_name(H200)).write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="is ignored where it is wrong: it cannot be read"):
        assert launch.choose(W4A8, H200) == launch.ranked(W4A8, H200)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.choose(W4A8, H200) == launch.ranked(W4A8, H200)[0]
        tables.keep({W4A8: (slowest(), 1.0)}, H200)
        assert launch.choose(W4A8, H200) == slowest()


@pytest.mark.parametrize("tile", [3, {}, {"tile": {"bm": 48}, "parts": 1}, {"tile": 5, "parts": 1}])
def test_a_tile_that_the_kernel_may_not_have_is_ignored_with_a_warning(folder, tile):
    (folder / tables.file_name(H200)).write_text(json.dumps({"gpu": "H200", "choices": {str(W4A8): tile}}))
    with pytest.warns(UserWarning, match="no tile that the kernel may run with"):
        assert launch.choose(W4A8, H200) == launch.ranked(W4A8, H200)[0]


def test_processes_that_write_at_once_lose_nothing(folder):
    script = """
import sys
from fxquant.backend.triton import attention, launch, tables
from fxquant.backend.triton.gpus import H200
from fxquant.backend.triton.tile import Problem
for N in range(64):
    problem = Problem(16, 1 + 64 * int(sys.argv[1]) + N, 4096, 8)
    tables.keep({problem: (launch.ranked(problem, H200)[0], 1.0)}, H200)
"""
    running = [subprocess.Popen([sys.executable, "-c", script, str(i)]) for i in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(json.loads((folder / tables.file_name(H200)).read_text())["choices"]) == 3 * 64


def test_a_user_without_a_home_has_no_table(monkeypatch):
    monkeypatch.setattr(tables, "user_file", lambda on: None)
    assert tables.keep({W4A8: (slowest(), 1.0)}, H200) is None
    assert launch.choose(W4A8, H200) == launch.ranked(W4A8, H200)[0]


def test_what_inductor_keeps_on_disk_is_not_found_for_other_kernels_or_tables(folder, monkeypatch):
    from fxquant.backend.inductor import compile_runtime

    seen = []

    def compiler(gm, inputs, config_patches):
        seen.append(torch.compiler.config.cache_key_tag)
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiler)
    graph = graph_of(lambda x: x + 1, (3,))
    with torch.compiler.config.patch(cache_key_tag="mine"):
        for change in (lambda: None, lambda: tables.keep({W4A8: (slowest(), 1.0)}, H200), lambda: None):
            change()
            compile_runtime(graph, {})
        monkeypatch.setattr(tables, "_sources", lambda: "others")
        compile_runtime(graph, {})
        assert torch.compiler.config.cache_key_tag == "mine"
    assert all(tag.startswith("mine fxquant ") for tag in seen)
    assert seen[0] != seen[1] == seen[2] != seen[3]


def test_a_table_that_ships_is_of_these_kernels():
    shipped = list(tables.FOLDER.glob("tiles-*.json"))
    assert all(path.stem.endswith(tables.version()) for path in shipped)  # else it is never found: time anew, or delete it


def test_two_questions_are_not_one():
    names = [str(Problem(16, 256, 512, **{"group_size": 512, **form}, products=p)) for form in FORMS for p in (1, 2)]
    assert len(set(names)) == len(names)
    assert Tile(16, 64, 0, 4, 4) != Tile(16, 64, 0, 4, 3)


@pytest.mark.parametrize("on", KNOWN, ids=lambda on: on.name)
def test_every_attention_has_a_tile_that_fits_and_is_no_taller_than_its_queries_need(on):
    masks = [None, *(torch.empty(rows, 7, dtype=t, device="meta") for rows in (1, 5) for t in (torch.bool, torch.float32))]
    for width, width_v, mask in itertools.product(WIDTHS, WIDTHS, masks):
        for queries, tallest in ((1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (10**6, 128)):
            tile = attention.tile_for(width, width_v, queries, mask, on)
            wide, entry = (attention.padded(width, 32), attention.padded(width_v, 16)), attention.bytes_for_each(mask)
            assert attention.shared(tile, *wide, entry, on) <= on.shared
            assert min(tallest, 64) <= tile.bm <= tallest
