"""``report.source`` and ``report.kernels``: the texts of generated kernels, by site, for graphs that were lowered for a GPU."""

import pytest
import torch
from blocks import data, on_gpu, post_ln, pre_rms, quantized
from torch import nn
from torch.nn import functional as F

import fxquant
from fxquant.backend.fuse_norms import fuse_norms
from fxquant.backend.kernels import KERNELS
from fxquant.backend.kernels.attention_triton import lower_int8_attention
from fxquant.backend.lower import lower
from fxquant.backend.triton.fuse_epilogue import fuse_epilogues
from fxquant.backend.triton.written import KernelCall, written
from fxquant.errors import SiteError
from fxquant.graph.capture import Parameter
from fxquant.graph.fuel import Fuel
from fxquant.recipe import Recipe
from fxquant.report import Artifact, GraphSite, register

triton = pytest.importorskip("triton")


class Holder(nn.Module):
    """Two layers with parameters of the names that a block's have, as modules."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names}) for _ in range(2))


BLOCKS = {"pre_rms": pre_rms, "post_ln": post_ln}


def calls_of(block: str, recipe: str, *, device: str = "cuda", dynamic: bool = True) -> tuple[KernelCall, ...]:
    gm = quantized(BLOCKS[block], device, torch.bfloat16, recipe, dynamic=dynamic)
    outcome = lower(gm, KERNELS, Fuel())
    fuse_epilogues(gm, Fuel())
    fuse_norms(gm, Fuel())
    return written(gm, {key: key.split(":")[1] for key in outcome})


def reported(calls: tuple[KernelCall, ...], names: list[str]) -> tuple[fxquant.Report, Holder, list[Artifact]]:
    """The report on a model each of whose two layers runs the graph of ``calls``."""
    model, artifacts = Holder(names), []
    sites = tuple(GraphSite(name, "linear", i, 4, kernel="Triton") for i, name in enumerate(names))
    artifact = Artifact(Recipe.preset("W8A8"), sites, (), range(len(names)), None, calls)
    register(artifact)
    for layer in model.layers:
        artifact.meet([layer[name].weight for name in names])
    return fxquant.explain(model), model, [*artifacts, artifact]


def test_the_kernels_of_a_block_are_those_of_its_sites():
    calls = calls_of("pre_rms", "W8A8")
    assert [call.sites for call in calls] == [("WO",), ("WO",), ("WG", "WU"), ("WG", "WU"), ("WD",), ("WD",)]
    names = [[source.split("(")[0].removeprefix("def ") for _, source in call.texts()] for call in calls]
    assert [n[0] for n in names[::2]] == ["row_kernel"] * 3
    assert names[3] == ["w8a8_pair"] or names[3][0].startswith("w8a8_pair")
    pair = calls[3].texts()[0]
    assert "t0 = y0 / (1.0 + tl.exp(-y0))" in pair[1] and "W8A8 pair" in pair[0] and "H200" in pair[0]


def test_a_site_has_the_source_of_its_kernels_in_their_order():
    report, _, _ = reported(calls_of("pre_rms", "W8A8"), ["WO", "WG", "WU", "WD"])
    source = report.source("layers.1.WG")
    assert source == report.source("layers.1.WG.weight") == report.source("layers.0.WU")
    assert source.index("def row_kernel") < source.index("def w8a8_pair")
    assert source.startswith("# row_kernel: ")
    assert (
        "def w8a8_pair" not in report.source("layers.0.WD")
        and "residual" not in report.source("layers.0.WD").split("def w8a8")[1]
    )


def test_the_source_is_python_and_is_what_the_golden_texts_are():
    report, _, _ = reported(calls_of("pre_rms", "W4A16"), ["WO", "WG", "WU", "WD"])
    source = report.source("layers.0.WG")
    compile(source, "kernel", "exec")
    assert "tl.inline_asm_elementwise" in source and "def w4a16_pair" in source


def test_the_source_for_other_tokens_is_another_kernel():
    report, _, _ = reported(calls_of("pre_rms", "W8A8"), ["WO", "WG", "WU", "WD"])
    few, many = report.source("layers.0.WD", tokens=1), report.source("layers.0.WD", tokens=4096)
    assert ", 1 x 128 x 256, tile" in few and ", 4096 x 128 x 256, tile" in many
    assert "m < M" in few and "m < M" not in many  # what follows from the number


def test_a_symbol_has_the_kernel_of_its_bucket_with_its_masks():
    calls = calls_of("post_ln", "W8A8")
    ((title, source), *_) = calls[0].texts() if "gemm" in str(calls[0].target) else calls[1].texts()
    assert "16 x 128 x" in title and "m < M" in source
    assert "m < M" not in calls[1].texts(16)[0][1]


def test_all_kernels_are_printed_once_with_the_sites_of_all_layers():
    report, _, _ = reported(calls_of("pre_rms", "W8A8"), ["WO", "WG", "WU", "WD"])
    text = str(report.kernels)
    assert len(report.kernels) == 2 * 6
    assert text.count("def w8a8_pair") == 1
    assert "# for layers.*.WG.weight (2), layers.*.WU.weight (2)" in text


def attends(x, WQ, WK, WV, WO):
    q, k, v = (F.linear(x, w).unflatten(-1, (4, 32)).transpose(1, 2) for w in (WQ, WK, WV))
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), WO)


@pytest.mark.parametrize("dynamic", [True, False])
def test_attention_of_codes_is_for_the_sites_that_it_reads(dynamic: bool) -> None:
    gm = on_gpu(quantized(attends, "cpu", torch.float16, "attention", dynamic=dynamic))
    lower_int8_attention(gm, Fuel())
    outcome = lower(gm, KERNELS, Fuel())
    calls = written(gm, {key: key.split(":")[1] for key in outcome})
    (call,) = [call for call in calls if "int8_attention" in str(call.target)]
    assert call.sites == ("WQ", "WK", "WV")
    report, _, _ = reported(calls, ["WQ", "WK", "WV", "WO"])
    source = report.source("layers.0.WK")
    assert source.index("def row_kernel") < source.index("def w8a8") < source.index("def int8_attention_causal")
    assert "4 heads, 5 queries and 5 keys of 32, values of 32, tile 16 x 64" in source
    assert "int8_attention" not in report.source("layers.0.WO")
    compile(source, "kernel", "exec")
    many = report.source("layers.0.WQ", tokens=4096)
    assert "1 x 4 heads, 4096 queries and 4096 keys" in many and "m < L" not in many and "m < L" in source
    assert str(report.kernels).count("def int8_attention_causal") == 1


def test_a_name_that_is_no_site_is_told_the_nearest():
    report, _, _ = reported(calls_of("pre_rms", "W8A8"), ["WO", "WG", "WU", "WD"])
    with pytest.raises(SiteError, match=r"there is no site 'layers\.0\.WX'; did you mean 'layers\.0\.W"):
        report.source("layers.0.WX")
    with pytest.raises(SiteError, match="tokens is 0"):
        report.source("layers.0.WO", tokens=0)


def test_on_a_cpu_no_kernel_is_generated_and_the_site_says_what_it_runs():
    report, _, _ = reported(calls_of("pre_rms", "W8A8", device="cpu"), ["WO"])
    assert not report.kernels and "no kernel of this model was generated" in str(report.kernels)
    with pytest.raises(SiteError, match=r"site 'layers\.0\.WO\.weight' runs 'Triton', which is not generated"):
        report.source("layers.0.WO")
    with pytest.raises(SiteError, match="nothing of this model has run compiled"):
        fxquant.explain(Holder(["a"])).source("layers.0.a")


def test_a_site_in_floating_point_says_why():
    model = Holder(["WO"])
    artifact = Artifact(Recipe.preset("W8A8"), (GraphSite("WO", "linear", 0, 4, reason="ignored"),), (), [0])
    register(artifact)
    artifact.meet([model.layers[0]["WO"].weight])
    with pytest.raises(SiteError, match=r"stays in floating point \(ignored\)"):
        fxquant.explain(model).source("layers.0.WO")


def test_parameters_and_data_are_no_part_of_what_is_kept():
    gm = quantized(pre_rms, "cuda", torch.bfloat16)
    assert all(p.meta.get("parameter") is None or isinstance(p.meta["parameter"], Parameter) for p in gm.graph.nodes)
    assert len(data(gm)) == len(gm.graph.find_nodes(op="placeholder"))
    for call in calls_of("pre_rms", "W8A8"):
        tensors = [t for t in torch.utils._pytree.tree_leaves(call.given) if isinstance(t, torch.Tensor)]
        assert all(type(t).__name__ == "FakeTensor" for t in tensors)
