"""What do we and others lose on the same models, data and bits? torchao, ONNX Runtime, NNCF with OpenVINO, Brevitas and HQQ.

    pip install ...                          # its own environment: see peers-requirements.txt
    python benchmarks/peers.py               # everything, which takes hours; --task, --peer and --scheme choose
    python benchmarks/peers.py --task sst2 --peer torchao
    python benchmarks/peers.py --table --markdown docs/results/peers.md

Every side quantizes the linears of the blocks and leaves the head (and attention's own products, embeddings, convolutions)
alone, and calibrates on ``Task.calibration(0)``. Results are merged into build/benchmarks/peers.json, one row per
setting; what is there already is not measured again, so a run can be broken off and taken up.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import ROOT, heading, markdown_table, progress, table, write
from tasks import FIXED, HEADS, TASKS, Batch, Task, collate, outputs, sqnr
from torch import Tensor, nn

Forward = Callable[..., Any]
# Fixed shapes where the data allow them (500 = 25 * 20 images, 1 window), so that every export is the simplest there is.
SIZES = {"sst2": 32, "vit": 20, "smollm2": 1}


@dataclass(frozen=True)
class Peer:
    """One way of one peer: ``quantize(task, model, calibration)`` returns what is called in the model's place."""

    name: str
    scheme: str
    setting: str
    quantize: Callable[[Task, nn.Module, list[Batch]], Forward]
    only: tuple[str, ...] = ("sst2", "vit", "smollm2")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that are quantized, by path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in HEADS}


@torch.no_grad()
def run(model: Forward, batches: list[Batch], title: str = "calibrating") -> None:
    for batch in progress(batches, title):
        model(**batch)


def equal_lengths(batches: list[Batch]) -> list[Batch]:
    """Padded to one length, for observers that put batches side by side, and so see padding (of text; the rest has none)."""
    rows, size = [row for batch in batches for row in unbatched(batch)], count(batches[0])
    (whole,) = collate(rows, len(rows))
    return [{name: column[i : i + size] for name, column in whole.items()} for i in range(0, len(rows), size)]


def singles(batches: list[Batch]) -> list[Batch]:
    """One example per batch and no padding, for tools whose observers cannot leave padding out."""
    return [{name: column[None] for name, column in row.items()} for batch in batches for row in unbatched(batch)]


def unbatched(batch: Batch) -> list[Batch]:
    """The examples as they were before they were padded."""
    lengths = batch["attention_mask"].sum(1).tolist() if "attention_mask" in batch else [None] * count(batch)
    return [{name: column[i][:n] for name, column in batch.items()} for i, n in enumerate(lengths)]


def count(batch: Batch) -> int:
    return len(next(iter(batch.values())))


# ---- torchao ------------------------------------------------------------------------------------------------------------
def _ours(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and path not in HEADS


def torchao_dynamic(task: Task, model: nn.Module, calibration: list[Batch], mapping: str = "SYMMETRIC") -> Forward:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, MappingType, quantize_

    config = Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType[mapping], set_inductor_config=False)
    quantize_(model, config, filter_fn=_ours)
    return model


def torchao_smooth(task: Task, model: nn.Module, calibration: list[Batch], static: bool, alpha: float | None = 0.5) -> Forward:
    """prototype/smoothquant; the observer keeps every input, so a language model is calibrated on four windows."""
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerRow, PerTensor, quantize_
    from torchao.quantization.quant_api import Int8StaticActivationInt8WeightConfig

    if static:
        base = Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()], set_inductor_config=False)
    else:
        base = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(model, SmoothQuantConfig(base, step="prepare", alpha=alpha), filter_fn=_ours)
    run(model, equal_lengths(calibration)[: 4 if task.lower_is_better else None])
    observed = lambda module, path: hasattr(module, "obs")  # noqa: E731
    quantize_(model, SmoothQuantConfig(base, step="convert", alpha=alpha), filter_fn=observed)
    return model


def torchao_pt2e(task: Task, model: nn.Module, calibration: list[Batch], dynamic: bool = False) -> Forward:
    """torch.export and X86InductorQuantizer, told to annotate linears alone (by default it also takes masks and positions)."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    batch = calibration[0]
    program = torch.export.export(Bare(model), (), dict(batch), dynamic_shapes=_dynamic_shapes(batch), strict=False)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_module_type_qconfig(nn.Linear, x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    for head in HEADS:
        quantizer.set_module_name_qconfig(f"model.{head}", None)
    prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
    run(prepared, singles(calibration))
    converted = convert_pt2e(prepared)
    return lambda **batch: SimpleNamespace(logits=converted(**batch))


def torchao_int4(task: Task, model: nn.Module, calibration: list[Batch], group: int, hqq_scales: bool = False) -> Forward:
    """Groups must divide the width (576 here, so 128 cannot be had; other configs silently skip such a linear)."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
    from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm

    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(group),
        mapping_type=MappingType.SYMMETRIC if hqq_scales else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm["HQQ_SCALE_ONLY" if hqq_scales else "AFFINE"],
    )
    quantize_(model, config, filter_fn=_ours)
    return model


# ---- ONNX: the file that ONNX Runtime and OpenVINO start from -----------------------------------------------------------
class Bare(nn.Module):
    """The logits alone: what an exporter likes best."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        names = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
        given = zip(names, (input_ids, attention_mask, token_type_ids, pixel_values), strict=True)
        return self.model(**{name: column for name, column in given if column is not None}).logits


def _dynamic_shapes(batch: Batch) -> dict[str, Any] | None:
    """Text varies in both dimensions; images and windows are as they are."""
    if "attention_mask" not in batch:
        return None
    any_ = torch.export.Dim.DYNAMIC
    return {name: {0: any_, 1: any_} for name in batch}


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="peers-"))


def onnx_file(task: Task, model: nn.Module, calibration: list[Batch]) -> Path:
    """The float model as ONNX, with weights as initializers of the products; exported once per task."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = _folder() / f"{task.name}.onnx"
    if not path.exists():
        raw = _folder() / f"{task.name}-raw.onnx"
        batch = calibration[0]
        with contextlib.redirect_stdout(io.StringIO()):
            dynamic = {"dynamo": True, "dynamic_shapes": _dynamic_shapes(batch)}
            torch.onnx.export(Bare(model), (), raw, kwargs=dict(batch), external_data=False, **dynamic)
        quant_pre_process(str(raw), str(path), skip_symbolic_shape=True)
        found = onnx.load(str(path))
        del found.graph.value_info[:]  # the shapes of before weights were folded: the quantizers trip over them
        onnx.save(found, str(path))
    return path


def products(path: Path) -> tuple[list[str], list[str]]:
    """Names of the products with a weight, without the head, and of all other products."""
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {tensor.name for tensor in graph.initializer}
    all_ = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    weighted = [node.name for node in all_ if node.input[1] in constants]
    return weighted[:-1], [node.name for node in all_ if node.name not in weighted[:-1]]


def session(path: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {i.name for i in found.get_inputs()}

    def forward(**batch: Tensor) -> Any:
        (logits,) = found.run(None, {name: column.numpy() for name, column in batch.items() if name in names})
        return SimpleNamespace(logits=torch.from_numpy(logits))

    return forward


def ort_float(task: Task, model: nn.Module, calibration: list[Batch]) -> Forward:
    return session(onnx_file(task, model, calibration))


def ort_dynamic(task: Task, model: nn.Module, calibration: list[Batch]) -> Forward:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path, out = onnx_file(task, model, calibration), _folder() / "dynamic.onnx"
    quantize_dynamic(path, out, per_channel=True, weight_type=QuantType.QInt8, nodes_to_quantize=products(path)[0])
    return session(out)


def ort_static(task: Task, model: nn.Module, calibration: list[Batch], method: str) -> Forward:
    import onnxruntime.quantization as q

    path, out = onnx_file(task, model, calibration), _folder() / "static.onnx"
    q.quantize_static(
        path,
        out,
        # histograms want all batches at once, and so padded to one length; minima and maxima do not
        Reader(path, singles(calibration) if method == "MinMax" else equal_lengths(calibration)),
        quant_format=q.QuantFormat.QDQ,
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        nodes_to_quantize=products(path)[0],
        calibrate_method=q.CalibrationMethod[method],
        extra_options={"CalibPercentile": 99.99} if method == "Percentile" else {},
    )
    return session(out)


class Reader:
    """What ``quantize_static`` asks for: the next input, or None."""

    def __init__(self, path: Path, batches: list[Batch]) -> None:
        import onnx

        self.names = {i.name for i in onnx.load(str(path)).graph.input}
        self.batches = batches
        self.rest = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.rest, None)
        return batch and {name: column.numpy() for name, column in batch.items() if name in self.names}

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.rest = iter(self.batches[start_index:end_index])


def ort_int4(task: Task, model: nn.Module, calibration: list[Batch], group: int, algorithm: str) -> Forward:
    """accuracy_level 1: activations are float32 (by default they may become int8)."""
    import onnx
    import onnxruntime.quantization.matmul_nbits_quantizer as n

    path, out = onnx_file(task, model, calibration), _folder() / "int4.onnx"
    if algorithm == "HQQ":
        config = n.HQQWeightOnlyQuantConfig(block_size=group, bits=4)
    else:
        config = n.DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=False, accuracy_level=1)
    left = products(path)[1]
    quantizer = n.MatMulNBitsQuantizer(onnx.load(str(path)), block_size=group, nodes_to_exclude=left, algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))
    return session(out)


# ---- NNCF and OpenVINO --------------------------------------------------------------------------------------------------
def _openvino(task: Task, model: nn.Module, calibration: list[Batch]) -> tuple[Any, Any, Any]:
    """The float model, a dataset, and what NNCF leaves alone: all but products with a weight, and the head."""
    import nncf
    import openvino

    found = openvino.convert_model(onnx_file(task, model, calibration))
    names = {name for port in found.inputs for name in port.names}
    batches = singles(calibration) if "attention_mask" in calibration[0] else calibration
    rows = [{name: column.numpy() for name, column in batch.items() if name in names} for batch in batches]
    matmuls = [op for op in found.get_ordered_ops() if op.get_type_name() == "MatMul"]
    weighted = [op for op in matmuls if _is_constant(op.input_value(1).get_node())]
    others = [op.get_friendly_name() for op in matmuls if op not in weighted[:-1]]
    others += [op.get_friendly_name() for op in found.get_ordered_ops() if op.get_type_name() in ("Convolution", "Gather")]
    return found, nncf.Dataset(rows), nncf.IgnoredScope(names=others)


def _is_constant(node: Any) -> bool:
    kind = node.get_type_name()
    return kind == "Constant" or (kind in ("Convert", "Transpose", "Reshape") and _is_constant(node.input_value(0).get_node()))


def _compiled(model: Any) -> Forward:
    """On the CPU in float32: by default it would be bfloat16, and activations of compressed products would become int8."""
    import openvino

    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    found = openvino.Core().compile_model(model, "CPU", config)
    names = {name for port in found.inputs for name in port.names}

    def forward(**batch: Tensor) -> Any:
        result = found({name: column.numpy() for name, column in batch.items() if name in names})
        return SimpleNamespace(logits=torch.from_numpy(result[0].copy()))

    return forward


def nncf_float(task: Task, model: nn.Module, calibration: list[Batch]) -> Forward:
    return _compiled(_openvino(task, model, calibration)[0])


def nncf_static(task: Task, model: nn.Module, calibration: list[Batch], smooth: float = 0.95) -> Forward:
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

    found, data, ignored = _openvino(task, model, calibration)
    quantized = nncf.quantize(
        found,
        data,
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=data.get_length(),
        ignored_scope=ignored,
        advanced_parameters=AdvancedQuantizationParameters(smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=smooth)),
    )
    return _compiled(quantized)


def nncf_int4(task: Task, model: nn.Module, calibration: list[Batch], group: int, awq: bool) -> Forward:
    import nncf

    found, data, ignored = _openvino(task, model, calibration)
    compressed = nncf.compress_weights(
        found,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=group,
        ratio=1.0,
        all_layers=True,
        backup_mode=nncf.BackupMode.NONE,
        ignored_scope=ignored,
        dataset=data if awq else None,
        awq=awq or None,
        scale_estimation=awq or None,
    )
    return _compiled(compressed)


# ---- Brevitas (simulated) and HQQ ---------------------------------------------------------------------------------------
def brevitas(
    task: Task, model: nn.Module, calibration: list[Batch], bits: int, mse: bool = False, alpha: float | None = None
) -> Forward:
    """Static per tensor, asymmetric; weights per channel; bias correction. ``alpha``: SmoothQuant at every linear."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.equalize import activation_equalization_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloat, Int8WeightPerChannelFloatMSE
    from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat, ShiftedUint8ActPerTensorFloatMSE

    # similar lengths together: padding is seen
    rows = sorted((row for batch in calibration for row in unbatched(batch)), key=count)
    batches = collate(rows, task.size)
    heads = [name for name in HEADS if hasattr(model, name)]
    if alpha is not None:
        with activation_equalization_mode(model, alpha, layerwise=True, blacklist_layers=heads):
            run(model, batches, "equalizing")
    activation = ShiftedUint8ActPerTensorFloatMSE if mse else ShiftedUint8ActPerTensorFloat
    weight = Int8WeightPerChannelFloatMSE if mse else Int8WeightPerChannelFloat
    quantizers = {
        "input_quant": activation.let(bit_width=bits),
        "weight_quant": weight.let(bit_width=bits, scaling_impl_type="parameter_from_stats"),
    }
    layers = {nn.Linear: (qnn.QuantLinear, quantizers | {"return_quant_tensor": False})}
    model = layerwise_quantize(model, layers, name_blacklist=heads)
    run(model, batches[:1], "weights")
    with torch.no_grad(), calibration_mode(model):
        run(model, batches)
    with torch.no_grad(), bias_correction_mode(model, skip_if_no_bias=True):
        run(model, batches, "bias correction")
    return model.eval()


def hqq(task: Task, model: nn.Module, calibration: list[Batch], group: int) -> Forward:
    """Groups run through the flattened weight, so any size that divides the number of weights will do."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    config = BaseQuantizeConfig(nbits=4, group_size=group, axis=1)
    for path, linear in progress(list(linears(model).items()), "HQQ"):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))
    return model


# ---- ours ---------------------------------------------------------------------------------------------------------------
def ours(
    task: Task, model: nn.Module, calibration: list[Batch], scope: str, method: str, weights: int, activations: int
) -> Forward:
    """A row of accuracy.py, heads and convolutions left alone as everywhere here."""
    from accuracy import ALL, SCOPES

    import fxquant

    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    recipe = ALL[method](SCOPES[scope], weights, activations).replace(ignore=[*HEADS, *convolutions])
    plan = fxquant.calibrate(model, calibration, recipe)
    torch._dynamo.reset()
    model.compile(backend="outlierq", options={"plan": plan, "inductor": False}, dynamic=task.name not in FIXED)
    return model


def _with(function: Callable[..., Forward], **arguments: Any) -> Callable[[Task, nn.Module, list[Batch]], Forward]:
    return functools.partial(function, **arguments)


LM = ("smollm2",)
SMALL = ("sst2", "vit")  # where all activations of the calibration set fit into memory at once
tokens8 = functools.partial(_with, ours, scope="tokens", weights=8, activations=8)
static8 = functools.partial(_with, ours, scope="linears", weights=8, activations=8)
static6 = functools.partial(_with, ours, scope="linears", weights=6, activations=6)
groups4 = functools.partial(_with, ours, scope="groups", weights=4, activations=16)
PEERS = (
    Peer("fxquant", "W8A8 dynamic", "per token, asymmetric", tokens8(method="none")),
    Peer("fxquant", "W8A8 dynamic", "per token, balance", tokens8(method="balance")),
    Peer("fxquant", "W8A8 dynamic", "per token, rotations", tokens8(method="rotations")),
    Peer("fxquant", "W8A8 static", "averaged min-max", static8(method="min/max")),
    Peer("fxquant", "W8A8 static", "OS+", static8(method="OS+")),
    Peer("fxquant", "W8A8 static", "splitting, OS+", static8(method="splitting, OS+")),
    Peer("fxquant", "W6A6 static", "averaged min-max", static6(method="min/max")),
    Peer("fxquant", "W6A6 static", "MSE", static6(method="MSE")),
    Peer("fxquant", "W6A6 static", "OS+", static6(method="OS+")),
    Peer("fxquant", "W4A16", "groups of 96, min-max", groups4(method="none"), LM),
    Peer("fxquant", "W4A16", "groups of 96, AWQ", groups4(method="AWQ"), LM),
    Peer("fxquant", "W4A16", "groups of 96, AWQ, ranges of outputs", groups4(method="AWQ, ranges"), LM),
    Peer("onnxruntime", "float", "the export itself", ort_float),
    Peer("openvino", "float", "the export itself", nncf_float),
    Peer("torchao", "W8A8 dynamic", "per token, symmetric", torchao_dynamic),
    Peer("torchao", "W8A8 dynamic", "per token, asymmetric", _with(torchao_dynamic, mapping="ASYMMETRIC")),
    Peer("torchao", "W8A8 dynamic", "per token, SmoothQuant 0.5", _with(torchao_smooth, static=False)),
    Peer("torchao", "W8A8 dynamic", "PT2E, per tensor, asymmetric", _with(torchao_pt2e, dynamic=True)),
    Peer("onnxruntime", "W8A8 dynamic", "per tensor, asymmetric", ort_dynamic),
    Peer("torchao", "W8A8 static", "min-max, symmetric", _with(torchao_smooth, static=True, alpha=None)),
    Peer("torchao", "W8A8 static", "SmoothQuant 0.5, symmetric", _with(torchao_smooth, static=True)),
    Peer("torchao", "W8A8 static", "PT2E, histogram, asymmetric", torchao_pt2e),
    Peer("onnxruntime", "W8A8 static", "min-max", _with(ort_static, method="MinMax")),
    Peer("onnxruntime", "W8A8 static", "percentile 99.99", _with(ort_static, method="Percentile"), SMALL),
    Peer("onnxruntime", "W8A8 static", "entropy", _with(ort_static, method="Entropy"), SMALL),
    Peer("nncf", "W8A8 static", "SmoothQuant 0.95, bias correction", nncf_static),
    Peer("nncf", "W8A8 static", "SmoothQuant 0.5, bias correction", _with(nncf_static, smooth=0.5)),
    Peer("brevitas", "W8A8 static", "percentile", _with(brevitas, bits=8)),
    Peer("brevitas", "W8A8 static", "percentile, equalized 0.5", _with(brevitas, bits=8, alpha=0.5)),
    Peer("brevitas", "W6A6 static", "percentile", _with(brevitas, bits=6)),
    Peer("brevitas", "W6A6 static", "percentile, equalized 0.5", _with(brevitas, bits=6, alpha=0.5)),
    Peer("brevitas", "W6A6 static", "MSE", _with(brevitas, bits=6, mse=True)),
    Peer("brevitas", "W6A6 static", "MSE, equalized 0.5", _with(brevitas, bits=6, mse=True, alpha=0.5)),
    Peer("torchao", "W4A16", "groups of 96, min-max", _with(torchao_int4, group=96), LM),
    Peer("torchao", "W4A16", "groups of 96, HQQ scales", _with(torchao_int4, group=96, hqq_scales=True), LM),
    Peer("hqq", "W4A16", "groups of 128", _with(hqq, group=128), LM),
    Peer("hqq", "W4A16", "groups of 64", _with(hqq, group=64), LM),
    Peer("onnxruntime", "W4A16", "groups of 128, min-max", _with(ort_int4, group=128, algorithm="RTN"), LM),
    Peer("onnxruntime", "W4A16", "groups of 128, HQQ", _with(ort_int4, group=128, algorithm="HQQ"), LM),
    Peer("nncf", "W4A16", "groups of 96, min-max", _with(nncf_int4, group=96, awq=False), LM),
    Peer("nncf", "W4A16", "groups of 96, AWQ, scale estimation", _with(nncf_int4, group=96, awq=True), LM),
)


def measure_one(peer: Peer, task: Task, reference: Tensor) -> dict[str, Any]:
    """One row: the score, what it lost, SQNR of the logits [dB], seconds; or under "error" why there is none."""
    row: dict[str, Any] = {"task": task.name, "peer": peer.name, "scheme": peer.scheme, "setting": peer.setting}
    start = time.perf_counter()
    labels = task.examples("test").labels
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = peer.quantize(task, task.model(), task.calibration(0))
            ready = time.perf_counter()
            found = outputs(task, model, title=f"{task.name}, {peer.name} {peer.setting}")
    except Exception as error:  # a peer that cannot do it is a result, too
        return row | {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"[:300]}
    score, before = task.score(found, labels), task.score(reference, labels)
    times = {"seconds to quantize": ready - start, "seconds to score": time.perf_counter() - ready}
    return row | {"score": score, "float": before, "lost": task.worse_by(score, before), "sqnr": sqnr(found, reference)} | times


def merged(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows of ``path`` with these in the place of older ones, in the order of ``PEERS``."""
    old = json.loads(path.read_text())["results"] if path.exists() else []
    order = {(name, p.scheme, p.name, p.setting): i for i, (name, p) in enumerate((n, p) for n in SIZES for p in PEERS)}
    both: Mapping[Any, dict[str, Any]] = {_key(row): row for row in [*old, *rows] if _key(row) in order}
    return sorted(both.values(), key=lambda row: order[_key(row)])


def _key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["task"], row["scheme"], row["peer"], row["setting"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=SIZES, help="default: all")
    parser.add_argument("--peer", action="append", choices=sorted({p.name for p in PEERS}), help="default: all")
    parser.add_argument("--scheme", action="append", choices=sorted({p.scheme for p in PEERS}), help="default: all")
    parser.add_argument("--setting", action="append", help="default: all")
    parser.add_argument("--again", action="store_true", help="measure what the file already has, too")
    parser.add_argument("--table", action="store_true", help="run nothing: print what is in the file")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables there, too")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "benchmarks" / "peers.json")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    known = {_key(row) for row in merged([], args.json) if "error" not in row} if not args.again else set()
    for name in [] if args.table else args.task or SIZES:
        task = dataclasses.replace(TASKS[name], size=SIZES[name])
        chosen = [
            p
            for p in PEERS
            if name in p.only
            and p.name in (args.peer or [p.name])
            and p.scheme in (args.scheme or [p.scheme])
            and p.setting in (args.setting or [p.setting])
            and (name, p.scheme, p.name, p.setting) not in known
        ]
        if not chosen:
            continue
        reference = outputs(task, task.model(), title=f"{name}, float")
        for peer in chosen:
            rows.append(measure_one(peer, task, reference))
            print(json.dumps(rows[-1]), flush=True)
            with contextlib.redirect_stdout(io.StringIO()):  # after each: a peer may end the process
                write("peers", merged(rows, args.json), args.json)
    found = merged([], args.json)
    if args.markdown:
        args.markdown.write_text(markdown(found, args.json))
    print(f"{heading()}\nlost: points, or percent of perplexity\n\n{table(cells(found, 'task', 'scheme'))}")


def cells(rows: list[dict[str, Any]], *first: str) -> list[tuple[str, ...]]:
    """The rows of a table, a heading before them; ``first``: the fields in front."""
    fields, body = (*first, "peer", "setting"), list[tuple[str, ...]]()
    for row in rows:
        figures = (row.get("error", "")[:60], "", "")
        if "error" not in row:
            figures = (f"{row['score']:.2f}", f"{row['lost']:+.2f}", f"{row['sqnr']:.1f}")
        body.append((*(row[field] for field in fields), *figures))
    return [(*fields, "score", "lost", "SQNR [dB]"), *body]


def markdown(rows: list[dict[str, Any]], path: Path) -> str:
    """A section per task and scheme, the least loss first; the machine is the one of the last row measured."""
    m = json.loads(path.read_text())["machine"]
    blocks = [
        "# Against others",
        "    python benchmarks/peers.py --markdown docs/results/peers.md",
        f"{m['processor']}, {m['threads']} threads; torch {m['torch']}, transformers {m['transformers']}, "
        f"fxquant {m['fxquant']}; versions of the others in benchmarks/peers-requirements.txt",
        "Same models, same data to calibrate on (seed 0), heads in floating point on all sides. Lost: points, or percent of\n"
        "perplexity. SQNR of the logits; where it is that of the float export, nothing was quantized. The least loss first.\n"
        "What could not be run says why.",
    ]
    for name in SIZES:
        of_task = [row for row in rows if row["task"] == name]
        for scheme in dict.fromkeys(row["scheme"] for row in of_task):
            some = sorted((r for r in of_task if r["scheme"] == scheme), key=lambda r: ("error" in r, r.get("lost", 0.0)))
            before = next((f", float {row['float']:.2f}" for row in some if "float" in row), "")
            title = f"## {TASKS[name].title}, {scheme}: {TASKS[name].metric}{before}"
            blocks.append(f"{title}\n\n{markdown_table(cells(some))}")
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    main()
