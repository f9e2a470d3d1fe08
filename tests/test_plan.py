"""A plan is a value that travels through a file which nothing can break, and knows the model it was made for."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import recipes

import fxquant
from fxquant.errors import PlanError
from fxquant.plan import Plan
from fxquant.recipe import Recipe

W = "layers.0.up.weight"


def plan(**changes) -> Plan:
    """A small plan with a range per tensor, one per channel, and two maps."""
    parts = {
        "recipe": Recipe.preset("W8A8"),
        "tensors": {
            f"low/{W}:input": torch.tensor(-3.0),
            f"high/{W}:input": torch.tensor(4.5),
            f"low/{W}:query": torch.tensor([-1.0, -2.0]),
            f"high/{W}:query": torch.tensor([1.0, 0.5]),
            f"scale/osplus/{W}": torch.tensor([1.0, 2.0, 4.0]),
            f"shift/osplus/{W}": torch.zeros(3),
        },
        "sites": {W: (6, 3), "head.weight": (2, 6)},
        "notes": {"loss": [0.5, 0.25]},
    }
    return Plan(**(parts | changes))


# Names as nobody wants them: anything but a slash, which a key needs for itself, and half of a surrogate pair.
names = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=12)
words = st.sampled_from(["scale", "shift", "rotation", "low", "größe", "__metadata__", " ", "\n"])
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sites = draw(st.dictionaries(names, st.lists(st.integers(0, 2**40), max_size=3).map(tuple), max_size=4))
    tensors = {}
    for site in sites:
        for role in draw(st.lists(words, max_size=2)):
            ends = draw(st.lists(st.tuples(numbers, numbers).map(sorted), max_size=4) | st.tuples(numbers, numbers).map(sorted))
            low, high = torch.tensor(ends, dtype=torch.float32).reshape(-1, 2).unbind(1)
            whole = low.numel() == 1
            tensors[f"low/{site}:{role}"] = low.reshape([] if whole else [-1])
            tensors[f"high/{site}:{role}"] = high.reshape([] if whole else [-1])
        for need, transform in draw(st.lists(st.tuples(words, words), max_size=2)):
            shape = draw(st.sampled_from([(), (1,), (3,), (0,), (2, 2)]))
            values = draw(st.lists(numbers, min_size=torch.Size(shape).numel(), max_size=torch.Size(shape).numel()))
            tensors[f"{need}/{transform}/{site}"] = torch.tensor(values, dtype=torch.float32).reshape(shape)
    return Plan(draw(recipes), tensors, sites, draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3)))


def same(one: Plan, other: Plan) -> bool:
    """Equality spelled out, which the digest must agree with."""
    return (
        (one.recipe, one.sites, one.notes, one.tensors.keys()) == (other.recipe, other.sites, other.notes, other.tensors.keys())
        and all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
    )  # fmt: skip


# The value


@given(plans())
def test_a_plan_comes_back_from_its_file(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    found.save(path)
    back = Plan.load(path)
    assert back == found and same(back, found) and hash(back) == hash(found) and repr(back) == repr(found)


@given(plans())
def test_equal_plans_are_equal_bytes_whatever_the_order_they_were_found_in(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("plan")
    backwards = (dict(reversed(part.items())) for part in (found.tensors, found.sites, found.notes))
    twin = Plan(found.recipe, *backwards)
    found.save(folder / "one")
    twin.save(folder / "other")
    assert twin == found and (folder / "one").read_bytes() == (folder / "other").read_bytes()


@given(plans())
def test_a_plan_can_be_pickled_and_copied(found):
    assert pickle.loads(pickle.dumps(found)) == found == copy.deepcopy(found) == copy.copy(found)


@given(plans(), st.randoms(use_true_random=False))
def test_one_changed_number_makes_another_plan(found, random):
    full = [key for key, t in found.tensors.items() if t.numel() and len(key.split("/")) == 3]
    if not full:
        return
    key = random.choice(full)
    changed = found.tensors[key].clone()
    number = changed.flatten()[:1]
    changed.view(-1)[:1] = torch.where(number == 0, 1.0, number / 2)
    other = Plan(found.recipe, {**found.tensors, key: changed}, found.sites, found.notes)
    assert (other == found) is same(other, found)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": Recipe.preset("W8A16")},
        {"sites": {W: (6, 3), "head.weight": (2, 7)}},
        {"sites": {W: (6, 3)}},
        {"notes": {}},
        {"tensors": {}},
        {"tensors": {f"scale/osplus/{W}": torch.ones(3)}},
        {"tensors": {f"scale/osplus/{W}": torch.ones(1, 3)}},
        {"tensors": {f"scale/smooth/{W}": torch.ones(3)}},
    ],
)
def test_every_part_counts_for_equality(changes):
    others = [plan(), plan(tensors={f"scale/osplus/{W}": torch.ones(3, 1)})]
    assert plan(**changes) not in others and plan(**changes) == plan(**changes)


def test_a_plan_equals_no_stranger_and_answers_with_a_bool():
    assert (plan() == plan()) is True and (plan() == 3) is False and {plan(): 1}[plan()] == 1


def test_an_equal_plan_among_the_options_compiles_nothing_anew():
    graphs = []

    def backend(gm, example_inputs, options=None):
        graphs.append(options["plan"])
        return gm.forward

    model = torch.nn.Linear(3, 2)
    for notes in ({}, {}, {"loss": 1}):
        torch.compile(model, backend=backend, options={"plan": plan(notes=notes)})(torch.ones(1, 3))
    assert graphs == [plan(notes={}), plan(notes={"loss": 1})]


def test_what_happens_to_the_tensors_given_does_not_happen_to_the_plan():
    scale = torch.ones(3)
    found = plan(tensors={f"scale/osplus/{W}": scale})
    scale += 1
    assert found.tensors[f"scale/osplus/{W}"].tolist() == [1, 1, 1] and found == plan(tensors={f"scale/osplus/{W}": scale - 1})


def test_a_plan_is_frozen():
    found = plan()
    for change in (lambda: setattr(found, "notes", {}), lambda: found.tensors.update({}), lambda: found.sites.update({})):
        with pytest.raises(AttributeError):
            change()


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor([1.0, 2.0], dtype=d) for d in (torch.float16, torch.bfloat16, torch.float64)]
    + [torch.tensor([[1.0, 0.0], [2.0, 0.0]]).t()[0], torch.nn.Parameter(torch.tensor([1.0, 2.0]))],
)
def test_tensors_are_kept_as_plain_contiguous_float32(tensor):
    kept = plan(tensors={f"scale/osplus/{W}": tensor}).tensors[f"scale/osplus/{W}"]
    assert type(kept) is torch.Tensor and not kept.requires_grad and kept.is_contiguous()
    assert kept.dtype is torch.float32 and kept.tolist() == [1, 2]


def test_a_plan_made_in_inference_mode_serves_outside_it():
    with torch.inference_mode():
        found = plan(tensors={f"scale/osplus/{W}": torch.ones(3)})
    scale = found.tensors[f"scale/osplus/{W}"]
    weight = torch.ones(3, requires_grad=True)
    (weight * scale).sum().backward()
    assert not scale.is_inference() and weight.grad.tolist() == [1, 1, 1]


def test_maps_are_found_by_transform():
    maps = plan().maps("osplus")
    assert {need: {site: t.tolist() for site, t in found.items()} for need, found in maps.items()} == {
        "scale": {W: [1, 2, 4]},
        "shift": {W: [0, 0, 0]},
    }
    assert plan().maps("input") == plan().maps(f"{W}:input") == {}


def test_ranges_are_found_by_edge():
    assert plan().range(f"{W}:input") == (-3.0, 4.5)
    assert plan().range(f"{W}:query") == ((-1.0, -2.0), (1.0, 0.5))
    assert plan().range(f"{W}:key") is plan().range(W) is None


def test_a_plan_prints_what_it_has_and_no_numbers():
    assert str(plan()) == "recipe 'W8A8', 2 sites, 2 ranges, osplus at 1 site"
    assert repr(plan()) == f"<Plan {plan().digest[:8]}: {plan()}>"
    assert str(plan(tensors={}, sites={W: (6, 3)})) == "recipe 'W8A8', 1 site, 0 ranges"


# Refusals

ONE = {f"scale/osplus/{W}": torch.ones(3)}
WRONG = [
    ({"recipe": "W8A8"}, "the recipe of a plan is 'W8A8', a Recipe is needed"),
    ({"sites": {"a/b": (1,)}}, "has the site 'a/b'; a slash"),
    ({"sites": {"": (1,)}}, "has the site ''"),
    ({"sites": {3: (1,)}}, "has the site 3"),
    ({"sites": {"a\ud800": (1,)}}, "no text that UTF-8 can write"),
    ({"sites": {W: 3}}, "has the shape 3, a list of sizes"),
    ({"sites": {W: (2.0,)}}, r"has the shape \(2.0,\)"),
    ({"sites": {W: (-1,)}}, r"has the shape \(-1,\)"),
    ({"sites": {}}, "is of 'layers.0.up.weight', which is not among its 0 sites"),
    ({"tensors": {W: torch.ones(3)}}, "a key of the form 'low/"),
    ({"tensors": {f"low/{W}": torch.ones(())}}, "a key of the form 'low/"),
    ({"tensors": {f"middle/{W}:input": torch.ones(())}}, "a key of the form 'low/"),
    ({"tensors": {f"scale//{W}": torch.ones(3)}}, "a key of the form 'low/"),
    ({"tensors": {f"scale/a/b/{W}": torch.ones(3)}}, "a key of the form 'low/"),
    ({"tensors": {3: torch.ones(3)}}, "has the tensor 3"),
    ({"tensors": {f"scale/osplus/{W}": [1.0]}}, "is a list, a tensor of floating"),
    ({"tensors": {f"scale/osplus/{W}": torch.ones(3, dtype=torch.int64)}}, "is of int64, a tensor of floating"),
    ({"tensors": {f"scale/osplus/{W}": torch.tensor([1, float("nan"), 1e39], dtype=torch.float64)}}, "2 of its 3 numbers"),
    ({"tensors": {f"low/{W}:input": torch.ones(())}}, f"has the tensor 'low/{W}:input' and no 'high/{W}:input'"),
    ({"tensors": {f"high/{W}:input": torch.ones(())}}, f"has the tensor 'high/{W}:input' and no 'low/{W}:input'"),
    ({"tensors": {f"low/{W}:key": torch.ones(3), f"high/{W}:key": torch.ones(2)}}, r"shapes \[3\] and \[2\], one shape"),
    ({"tensors": {f"low/{W}:key": torch.ones(1, 2), f"high/{W}:key": torch.ones(1, 2)}}, r"shapes \[1, 2\] and \[1, 2\]"),
    ({"tensors": {f"low/{W}:key": torch.ones(()), f"high/{W}:key": torch.zeros(())}}, "a low end above its high end"),
    ({"notes": {"loss": float("nan")}}, "the notes of a plan are no JSON"),
    ({"notes": {"loss": torch.ones(2)}}, "the notes of a plan are no JSON"),
    ({"notes": 3}, "the notes of a plan are no JSON"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_what_is_no_plan_is_refused_with_a_sentence(changes, sentence):
    with pytest.raises(PlanError, match=sentence):
        plan(**changes)


def header(**changes) -> dict[str, str]:
    parts = {"version": 1, "recipe": plan().recipe.to_dict(), "sites": {W: [6, 3]}, "notes": {}, "written_by": "fxquant 9.9"}
    return {"fxquant": json.dumps(parts | changes)}


def file(tensors=ONE, metadata=None) -> bytes:
    return safetensors.torch.save(tensors, metadata=header() if metadata is None else metadata)


FILES = [
    (b"", r"is not a safetensors file \(0 bytes\)"),
    (b"PK\x03\x04" + bytes(100), "is not a safetensors file"),
    (struct.pack("<Q", 2**62) + b"{}", "is damaged or cut short at 10 bytes"),
    (file()[:-1], f"is damaged or cut short at {len(file()) - 1} bytes"),
    (file()[:40], "is damaged or cut short at 40 bytes"),
    (file() + b"more", "is damaged or cut short"),
    (file(metadata={}), "without the metadata of a plan"),
    (file(metadata={"format": "pt"}), "without the metadata of a plan"),
    (file(metadata={"fxquant": "{"}), "is no JSON"),
    (file(metadata={"fxquant": "3"}), "metadata that no fxquant wrote"),
    (file(metadata=header(version=2)), "has version 2, written by fxquant 9.9; this fxquant reads version 1; upgrade it"),
    (file(metadata=header(version="1")), "metadata that no fxquant wrote"),
    (file(metadata=header(sites=[W])), "metadata that no fxquant wrote"),
    (file(metadata=header(sites={W: "6x3"})), "has the shape '6x3'"),
    (file(metadata=header(recipe={"nam": "x"})), "a recipe has no field 'nam'"),
    (file({f"scale/osplus/{W}": torch.ones(3).half()}), f"the tensor 'scale/osplus/{W}' is float16, a plan holds float32"),
    (file({f"scale/osplus/{W}": torch.ones(3).int()}), f"the tensor 'scale/osplus/{W}' is int32, a plan holds float32"),
    (file({f"scale/osplus/{W}": torch.tensor([1.0, float("inf")])}), f"'scale/osplus/{W}' of a plan is broken: 1 of its 2"),
    (file({"weight": torch.ones(3)}), "has the tensor 'weight', a key of the form"),
]


@pytest.mark.parametrize(("data", "sentence"), FILES)
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path, data, sentence):
    path = tmp_path / "plan.safetensors"
    path.write_bytes(data)
    with pytest.raises(PlanError, match=sentence) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_the_files_of_this_test_are_plans_but_for_what_is_wrong_with_them(tmp_path):
    (tmp_path / "plan").write_bytes(file())
    assert Plan.load(tmp_path / "plan") == plan(tensors=ONE, sites={W: (6, 3)}, notes={})


@given(st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, data):
    whole = file()
    path = tmp_path_factory.mktemp("plan") / "plan"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(PlanError):
        Plan.load(path)


def test_a_path_without_a_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"no plan at '.*absent': nothing is there"):
        Plan.load(tmp_path / "absent")
    with pytest.raises(PlanError, match="it is no file"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="is a folder; name a file"):
        plan().save(tmp_path)
    with pytest.raises(PlanError, match="absent', which is no folder"):
        plan().save(tmp_path / "absent" / "plan")


# Saving


def test_any_reader_of_safetensors_can_open_a_plan(tmp_path):
    plan().save(tmp_path / "plan.safetensors")
    with safetensors.safe_open(tmp_path / "plan.safetensors", framework="pt") as opened:
        found = json.loads(opened.metadata()["fxquant"])
        assert set(opened.keys()) == set(plan().tensors)
    assert found["version"] == 1 and found["written_by"] == f"fxquant {fxquant.__version__}"
    assert Recipe.from_dict(found["recipe"]) == plan().recipe and found["notes"] == {"loss": [0.5, 0.25]}


def test_another_writer_makes_no_other_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(fxquant, "__version__", "0.0.1")
    plan().save(tmp_path / "plan")
    assert b"fxquant 0.0.1" in (tmp_path / "plan").read_bytes() and Plan.load(tmp_path / "plan") == plan()


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    plan().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and Plan.load(tmp_path / "real") == plan()


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    plan().save(tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    def fail(*args):
        raise error

    plan().save(tmp_path / "plan")
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(os, step, fail)
        plan(notes={}).save(tmp_path / "plan")
    assert [p.name for p in tmp_path.iterdir()] == ["plan"] and Plan.load(tmp_path / "plan") == plan()


# Runs in a process of its own: forks, and lets the forks die in the middle of a save, or save at once.
DRIVER = """
import os, resource, signal, sys
import torch
from fxquant.plan import Plan
from fxquant.recipe import Recipe

def plan(number):
    return Plan(Recipe(), {f"scale/a/{number}": torch.full((100_000,), float(number))}, {str(number): (1,)}, {})

def fork(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(3)
    return child

def die(*args):
    os._exit(9)

def in_write():
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the signal comes at byte 50,000
    plan(2).save(path)

def at(step):
    def work():
        setattr(os, step, die)
        plan(2).save(path)
    return work

path = sys.argv[1]
plan(1).save(path)
for work in (in_write, at("fsync"), at("replace")):
    status = os.waitpid(fork(work), 0)[1]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    assert code in (9, -signal.SIGXFSZ), code
    assert Plan.load(path) == plan(1)
print("killed: whole")

def often(number):
    def work():
        while not os.path.exists(path + ".stop.tmp"):
            plan(number).save(path)
        os._exit(0)
    return work

running = [fork(often(2)), fork(often(3))]
found = set()
while len(found & {plan(2), plan(3)}) < 2:  # until both have been met
    found.add(Plan.load(path))
open(path + ".stop.tmp", "w").close()
assert [os.waitpid(child, 0)[1] for child in running] == [0, 0]
found.add(Plan.load(path))
assert found <= {plan(1), plan(2), plan(3)}, found
print("at once: whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a process; this system has none")
def test_neither_a_kill_in_the_middle_nor_two_savers_at_once_break_the_file(tmp_path):
    root = Path(fxquant.__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "plan")],
        capture_output=True, text=True, timeout=300, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.stdout.split("\n")[:2] == ["killed: whole", "at once: whole"], ran.stderr
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".tmp"} == {"plan"}


# Against a model

PARTS = {"up": (8, 4), "gate": (8, 4), "down": (4, 8)}
SITES = {f"layers.{i}.{part}.weight": shape for i in range(12) for part, shape in PARTS.items()}


def met(sites, model) -> str | None:
    """What ``check`` says, None if nothing."""
    try:
        Plan(Recipe(name="mine"), {}, sites, {}).check(model)
    except PlanError as error:
        return str(error)
    return None


def test_a_model_with_all_sites_is_met_whatever_else_it_has():
    assert met(SITES, SITES) is met(SITES, SITES | {"new.weight": (1, 1)}) is met({}, SITES) is None


def test_shapes_may_be_of_any_sequence():
    assert met(SITES, {name: torch.Size(shape) for name, shape in SITES.items()}) is None


RENAMINGS = [
    lambda name: f"model.{name}",
    lambda name: name.replace("layers", "encoder.layer"),
    lambda name: name.replace(".weight", "_proj.weight"),
    lambda name: name.replace("layers", "blocks").replace("up", "up_proj"),
]


@pytest.mark.parametrize("rename", RENAMINGS)
@pytest.mark.parametrize("count", [1, 36])
def test_a_renamed_site_is_shown_with_its_new_name(rename, count):
    model = {rename(name) if i < count else name: shape for i, (name, shape) in enumerate(SITES.items())}
    said = met(SITES, model)
    gone = sorted(list(SITES)[:count])
    assert f"\n  renamed ({count}): '{gone[0]}' is perhaps '{rename(gone[0])}' here" in said
    assert all(f"'{name}' is perhaps '{rename(name)}' here" in said for name in gone[:5])
    assert said.count("perhaps") == min(5, count) and ("and 31 more" in said) == (count == 36)
    assert "missing" not in said and "another shape" not in said


def test_a_name_of_another_shape_is_no_renaming():
    assert "missing (1): 'up.weight'" in met({"up.weight": (8, 4)}, {"up_proj.weight": (4, 8)})
    assert "renamed (1): 'up.weight' is perhaps 'up_proj.weight' here" in met({"up.weight": (8, 4)}, {"up_proj.weight": (8, 4)})


def test_a_name_without_likeness_is_no_renaming():
    assert "missing (1): 'head.weight'" in met({"head.weight": (8, 4)}, {"classifier.weight": (8, 4)})


def test_two_sites_are_never_renamed_to_one():
    said = met({"a.up.weight": (2, 2), "a.gate.weight": (2, 2)}, {"a.gate_proj.weight": (2, 2)})
    assert "renamed (1): 'a.gate.weight' is perhaps 'a.gate_proj.weight' here\n" in said
    assert "missing (1): 'a.up.weight'" in said


def test_a_site_of_the_plan_that_is_still_here_is_nobodys_new_name():
    assert "missing (1): 'a.up.weight'" in met({"a.up.weight": (2, 2), "a.upp.weight": (2, 2)}, {"a.upp.weight": (2, 2)})


def test_each_list_says_how_long_it_is_and_shows_five():
    model = {name: shape for name, shape in SITES.items() if ".1" not in name} | {"layers.0.up.weight": (9, 4)}
    assert met(SITES, model).split("\n") == [
        "the plan ('mine', 36 sites) is not of this model:",
        "  missing (9): 'layers.1.down.weight', 'layers.1.gate.weight', 'layers.1.up.weight', 'layers.10.down.weight', "
        "'layers.10.gate.weight' and 4 more",
        "  of another shape (1): 'layers.0.up.weight' is [9, 4], [8, 4] is needed",
        "give it the model that was calibrated, or calibrate this one",
    ]


@given(st.dictionaries(names, st.just((2, 2)), max_size=6), st.dictionaries(names, st.sampled_from([(2, 2), (3,)]), max_size=6))
def test_a_plan_meets_exactly_the_models_that_have_its_sites(sites, model):
    assert (met(sites, model) is None) == all(model.get(name) == shape for name, shape in sites.items())
