"""What calibration found, as a value: static ranges and the maps of transforms, by site, in one file that cannot break."""

import difflib
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import PlanError, RecipeError
from .recipe import Recipe

VERSION = 1  # of the file; a change that old code would misread raises it
HEADER = "fxquant"  # the one key of the file's metadata: safetensors writes several in any order
SHOWN = 5  # sites of a list in an error
FEW = 64  # names that are compared letter by letter though they have no part in common

Shape = tuple[int, ...]
Ends = tuple[float | tuple[float, ...], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A recipe and the numbers it needs: ``torch.compile(model, backend="outlierq", options={"plan": plan})`` takes it.

    ``tensors``: float32, finite, on the CPU, copied. ``"low/<edge>"`` and ``"high/<edge>"``, [] or [channels], are the range of
    the edge ``"<site>:<role>"``; ``"<need>/<transform>/<site>"`` is what a transform writes into the graph at that site.
    ``sites``: the weights that calibration met, by dotted name, and their shapes. ``notes``: JSON values for people, such as
    the loss curve of a search. Plans are equal, and hash alike, where all of this is: they compare by ``digest``.
    Raises PlanError for tensors that are not numbers, keys of another form, and names that cannot be written.
    """

    recipe: Recipe
    tensors: Mapping[str, Tensor]
    sites: Mapping[str, Shape]
    notes: Mapping[str, Any]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, Recipe):
            raise PlanError(f"the recipe of a plan is {self.recipe!r}, a Recipe is needed")
        sites = {site: _shape(site, self.sites[site]) for site in sorted(self.sites, key=_site)}
        tensors = {key: _numbers(key, self.tensors[key], sites) for key in sorted(self.tensors, key=str)}
        for key in tensors:
            _check_range(key, tensors)
        for name, value in (("sites", sites), ("tensors", tensors), ("notes", _json(self.notes))):
            object.__setattr__(self, name, MappingProxyType(value))
        object.__setattr__(self, "digest", _digest(self))

    def maps(self, transform: str) -> dict[str, dict[str, Tensor]]:
        """What ``transform`` writes into the graph: need -> site -> tensor; empty if calibration left it nothing to do.

        >>> plan.maps("smooth")["scale"]["layers.0.up.weight"].shape        # doctest: +SKIP
        torch.Size([384])
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            need, *rest = key.split("/")
            if len(rest) == 2 and rest[0] == transform:
                found.setdefault(need, {})[rest[1]] = tensor
        return found

    def range(self, edge: str) -> Ends | None:
        """(low, high) of ``"<site>:<role>"``: numbers, or a tuple of one number per channel each; None if nothing was measured.

        >>> plan.range("layers.0.up.weight:input")                          # doctest: +SKIP
        (-3.0, 41.5)
        """
        if (low := self.tensors.get(f"low/{edge}")) is None:
            return None
        return tuple(tuple(t.tolist()) if t.ndim else t.item() for t in (low, self.tensors[f"high/{edge}"]))

    def check(self, sites: Mapping[str, Sequence[int]]) -> None:
        """Raise PlanError unless a model with these weights (name -> shape) has every site of this plan, in the same shape.

        The error lists what seems renamed, what is missing, and what has another shape. Weights that the plan does not know
        are none of its business.
        """
        there = {name: tuple(shape) for name, shape in sites.items()}
        changed = [name for name, shape in self.sites.items() if there.get(name, shape) != shape]
        absent = [name for name in self.sites if name not in there]
        renamed = _renamed({n: self.sites[n] for n in absent}, {n: s for n, s in there.items() if n not in self.sites})
        lists = {
            "renamed": [f"{name!r} is perhaps {renamed[name]!r} here" for name in absent if name in renamed],
            "missing": [repr(name) for name in absent if name not in renamed],
            "of another shape": [f"{n!r} is {_by(there[n])}, {_by(self.sites[n])} is needed" for n in changed],
        }
        if any(lists.values()):
            shown = "".join(f"\n  {what} ({len(names)}): {_shortened(names)}" for what, names in lists.items() if names)
            raise PlanError(
                f"the plan ({self.recipe.name!r}, {_count(len(self.sites), 'site')}) is not of this model:{shown}\n"
                "give it the model that was calibrated, or calibrate this one"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to ``path``, a .safetensors file: the same bytes for equal plans, and all of it or nothing.

        It is written beside the target and moved there once it is on the disk, so whatever interrupts it, the old file stays
        whole. Killed in between it leaves a ``.fxquant-*.tmp`` behind. Raises PlanError if ``path`` cannot be a file.
        """
        target = Path(os.path.realpath(path))  # a link stays a link
        if target.is_dir() or not target.parent.is_dir():
            what = "is a folder" if target.is_dir() else f"lies in {str(target.parent)!r}, which is no folder"
            raise PlanError(f"a plan is to be saved to {str(path)!r}, which {what}; name a file in a folder that exists")
        data = safetensors.torch.save(dict(self.tensors), metadata={HEADER: _header(self, **_writer())})
        scratch = target.parent / f".fxquant-{secrets.token_hex(8)}.tmp"
        try:
            with scratch.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)
        _sync_folder(target.parent)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """The plan that ``save`` wrote; raises PlanError for anything else, saying what the file is."""
        name = os.fspath(path)
        if not os.path.isfile(name):
            raise PlanError(f"there is no plan at {name!r}: {'it is no file' if os.path.exists(name) else 'nothing is there'}")
        # Read once: safe_open opens a file a second time for the numbers, and by then a saver may have put another there.
        data = Path(name).read_bytes()
        try:
            tensors = safetensors.torch.load(data)
        except SafetensorError as error:
            raise PlanError(f"{name!r} {_damage(data)} ({error})") from None
        header = _read_header(name, data)
        for key, tensor in tensors.items():
            if tensor.dtype is not torch.float32:
                raise PlanError(f"{name!r}: the tensor {key!r} is {_name(tensor.dtype)}, a plan holds float32")
        try:
            return Plan(Recipe.from_dict(header["recipe"]), tensors, header["sites"], header["notes"])
        except (PlanError, RecipeError) as error:
            raise PlanError(f"{name!r}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[type["Plan"], tuple[Any, ...]]:  # mapping proxies cannot be pickled
        return Plan, (self.recipe, dict(self.tensors), dict(self.sites), dict(self.notes))

    def __repr__(self) -> str:
        return f"<Plan {self.digest[:8]}: {self}>"

    def __str__(self) -> str:
        keys = [key.split("/") for key in self.tensors]
        ranges = sum(key[0] == "low" for key in keys if len(key) == 2)
        moved = Counter(transform for transform, _ in {(key[1], key[2]) for key in keys if len(key) == 3})
        maps = [f"{transform} at {_count(moved[transform], 'site')}" for transform in sorted(moved)]
        return ", ".join([f"recipe {self.recipe.name!r}", _count(len(self.sites), "site"), _count(ranges, "range"), *maps])


# Construction: what a plan may hold


def _site(site: object) -> str:
    """The name of a site, which must be one part of a key and go into a file."""
    if not isinstance(site, str) or not site:
        raise PlanError(f"a plan has the site {site!r}, the dotted name of a weight is needed")
    if "/" in site:
        raise PlanError(f"a plan has the site {site!r}; a slash divides the keys of a plan, and names of weights have none")
    if not _is_text(site):
        raise PlanError(f"a plan has the site {site!r}, which is no text that UTF-8 can write")
    return site


def _shape(site: str, shape: Sequence[int]) -> Shape:
    if not isinstance(shape, Sequence) or not all(type(size) is int and size >= 0 for size in shape):
        raise PlanError(f"the site {site!r} of a plan has the shape {shape!r}, a list of sizes is needed")
    return tuple(shape)


def _numbers(key: object, tensor: Any, sites: Mapping[str, Shape]) -> Tensor:
    """A copy of the tensor as a plan keeps it, once its key and its numbers are in order."""
    parts = key.split("/") if isinstance(key, str) and _is_text(key) else []
    is_range = len(parts) == 2 and parts[0] in ("low", "high") and ":" in parts[1]
    if not (is_range or len(parts) == 3) or not all(parts):
        forms = "'low/<site>:<role>', 'high/<site>:<role>' or '<need>/<transform>/<site>'"
        raise PlanError(f"a plan has the tensor {key!r}, a key of the form {forms} is needed")
    site = parts[1].rpartition(":")[0] if is_range else parts[2]
    if site not in sites:
        raise PlanError(f"the tensor {key!r} of a plan is of {site!r}, which is not among its {_count(len(sites), 'site')}")
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        what = f"of {_name(tensor.dtype)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise PlanError(f"the tensor {key!r} of a plan is {what}, a tensor of floating point numbers is needed")
    with torch.inference_mode(False), torch.no_grad():  # a plan made within inference_mode serves outside it
        copy = tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    if not copy.isfinite().all():
        lost = f"{int((~copy.isfinite()).sum())} of its {copy.numel()} numbers are not finite in float32"
        raise PlanError(f"the tensor {key!r} of a plan is broken: {lost}; a site that saw overflow cannot be calibrated")
    return copy


def _check_range(key: str, tensors: Mapping[str, Tensor]) -> None:
    """Both ends, of one shape, the low one not above the high one."""
    end, _, edge = key.partition("/")
    if "/" in edge:
        return
    if (other := f"{'high' if end == 'low' else 'low'}/{edge}") not in tensors:
        raise PlanError(f"a plan has the tensor {key!r} and no {other!r}; a range has two ends")
    low, high = tensors[f"low/{edge}"], tensors[f"high/{edge}"]
    if low.shape != high.shape or low.ndim > 1:
        shapes = f"{_by(low.shape)} and {_by(high.shape)}"
        raise PlanError(f"the ends of the range of {edge!r} have the shapes {shapes}, one shape [] or [channels] is needed")
    if (low > high).any():
        raise PlanError(f"the range of {edge!r} has a low end above its high end; swap them")


def _json(notes: Any) -> dict[str, Any]:
    """A copy, as it comes back from a file: tuples are lists."""
    try:
        copy = json.loads(json.dumps(dict(notes), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise PlanError(f"the notes of a plan are no JSON: {error}; use text, finite numbers, lists and dicts") from None
    return copy  # type: ignore[no-any-return]  # the JSON of a dict is a dict


def _is_text(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


# The file


def _writer() -> dict[str, str]:
    from . import __version__  # which is set only after this module is imported

    return {"written_by": f"fxquant {__version__}"}


def _header(plan: Plan, **more: Any) -> str:
    parts = {"version": VERSION, "recipe": plan.recipe.to_dict(), "sites": dict(plan.sites), "notes": dict(plan.notes)}
    return json.dumps(parts | more, allow_nan=False, sort_keys=True)


def _digest(plan: Plan) -> str:
    """SHA-256 of the content, whoever wrote it."""
    digest = hashlib.sha256(_header(plan).encode())
    for key, tensor in plan.tensors.items():
        digest.update(json.dumps([key, tensor.shape]).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Put the moved name on the disk too; only POSIX opens folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_header(path: str, data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")  # of the JSON that follows: how every safetensors file begins
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if HEADER not in metadata:
        raise PlanError(f"{path!r} is a safetensors file without the metadata of a plan; give a file that Plan.save wrote")
    try:
        header = json.loads(metadata[HEADER])
    except ValueError as error:
        raise PlanError(f"{path!r} has metadata of a plan that is no JSON: {error}") from None
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is int and version > VERSION:
        by = header.get("written_by", "a newer fxquant")
        raise PlanError(f"{path!r} has version {version}, written by {by}; this fxquant reads version {VERSION}; upgrade it")
    dicts = version == VERSION and all(isinstance(header.get(part), dict) for part in ("recipe", "sites", "notes"))
    if not dicts:
        raise PlanError(f"{path!r} has metadata that no fxquant wrote: a version and the dicts recipe, sites, notes are needed")
    return header  # type: ignore[no-any-return]  # a dict by now


def _damage(data: bytes) -> str:
    if data[8:9] == b"{":  # behind the length of the JSON
        return f"is damaged or cut short at {len(data)} bytes; copy it once more, or calibrate again"
    return f"is not a safetensors file ({len(data)} bytes); give a file that Plan.save wrote"


# Against a model


def _renamed(absent: Mapping[str, Shape], strangers: Mapping[str, Shape]) -> dict[str, str]:
    """One to one, names that are gone -> names of the same shape and most of the same parts that have come."""
    pairs = sorted(_likely(absent, strangers), key=lambda pair: (-pair[0], -pair[1]))
    found: dict[str, str] = {}
    taken: set[str] = set()
    for _, _, old, new in pairs:
        if old not in found and new not in taken:
            found[old] = new
            taken.add(new)
    return found


def _likely(absent: Mapping[str, Shape], strangers: Mapping[str, Shape]) -> Iterator[tuple[float, float, str, str]]:
    """(share of common parts, share of common letters, old, new): the candidates that share most parts, if any."""
    alike: dict[Shape, list[tuple[str, set[str]]]] = {}
    for new, shape in strangers.items():
        alike.setdefault(shape, []).append((new, _parts(new)))
    for old, shape in absent.items():
        mine = _parts(old)
        shares = [(2 * len(mine & parts) / max(1, len(mine) + len(parts)), new) for new, parts in alike.get(shape, ())]
        best = max((share for share, _ in shares), default=0.0)
        for share, new in shares if best or len(shares) <= FEW else ():
            if share == best:  # letters are slow to compare, and tell layers.0.up from layers.0.gate
                letters = difflib.SequenceMatcher(None, _stem(old), _stem(new)).ratio()
                if share >= 0.5 or letters >= 0.6:
                    yield share, letters, old, new


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def _parts(name: str) -> set[str]:
    return set(_stem(name).replace("_", ".").split("."))


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _by(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
