"""Every Triton kernel of the `auto` table compiles for sm_80 and sm_90 as it ships, and spills no register.

No GPU is needed: Triton's own ptxas assembles, its cuobjdump tells registers, stack and shared memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dualcodec_ext import build
from dualcodec_ext.ops import _choice

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if build.triton_interprets():
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

MOST_SHARED = 99 * 1024  # bytes a block may have on every GPU from sm_80 on; sm_86 and sm_89 have the least
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
FLOATS = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16"}


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    local: int
    shared: int


def kernel_module(op: str) -> Any:
    return importlib.import_module(f"dualcodec_ext.kernels.{op}.{op}_triton")


def compile_kernel(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    """Compile as a launch with aligned tensors and general sizes and strides would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in OPTIONS if name in constants}
    fixed = {name: value for name, value in constants.items() if name not in OPTIONS}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = pointers[name]
            if pointers[name].startswith("*"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if "stride" in name else "i32"
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(compiled: Any, folder: Path) -> Usage:
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    told = subprocess.run([str(tool), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told.stdout)
    assert found is not None, told.stdout
    return Usage(int(found[1]), int(found[2]), int(found[3]), int(compiled.metadata.shared))


def check(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int, folder: Path) -> Usage:
    used = usage(compile_kernel(kernel, pointers, constants, capability), folder)
    assert (used.stack, used.local) == (0, 0), f"{constants} spills: {used}"
    assert used.shared <= MOST_SHARED, f"{constants}: {used}"
    return used


capabilities = pytest.mark.parametrize("capability", [80, 90], ids=lambda c: f"sm_{c}")
dtypes = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())

# channels, taps, LayerNorm: the codec's blocks and the head's, and more channels than a block holds.
DWCONV = [(768, 7, True), (1024, 31, True), (768, 7, False), (1536, 31, True), (24, 7, True)]


@capabilities
@dtypes
@pytest.mark.parametrize("channels, taps, norm", DWCONV)
def test_causal_dwconv1d(channels: int, taps: int, norm: bool, dtype: str, capability: int, tmp_path: Path) -> None:
    module = kernel_module("causal_dwconv1d")
    weights = dict.fromkeys(("weight", "bias", "ln_weight", "ln_bias"), "*fp32")
    pointers = {"x": dtype, "y": dtype, **weights, "lengths": "*i64", "eps": "fp32"}
    flags = {"HAS_BIAS": True, "HAS_LN_BIAS": norm, "HAS_LENGTHS": True}
    check(module.causal_dwconv1d_kernel, pointers, module.constants(channels, taps, norm) | flags, capability, tmp_path)


# mode, stride, Cin, Cout: the first and the last layer of the presets' decoders, and a layer of few channels.
UPSAMPLE = [("transposed", 2, 1536, 768), ("repeat", 4, 96, 48), ("transposed", 2, 8, 4)]
# signal, weight, precision
KINDS = [
    ("*fp32", "*fp32", "ieee"),
    ("*fp32", "*fp32", "tf32"),
    ("*bf16", "*fp32", "ieee"),
    ("*bf16", "*bf16", "ieee"),
    ("*fp16", "*fp32", "ieee"),
]


@capabilities
@pytest.mark.parametrize("dtype, weight, precision", KINDS)
@pytest.mark.parametrize("mode, stride, cin, cout", UPSAMPLE)
def test_snake_upsample1d(
    mode: str,
    stride: int,
    cin: int,
    cout: int,
    dtype: str,
    weight: str,
    precision: str,
    capability: int,
    tmp_path: Path,
) -> None:
    module = kernel_module("snake_upsample1d")
    vectors = dict.fromkeys(("bias", "alpha", "inverse"), "*fp32")
    pointers = {"x": dtype, "y": dtype, "weight": weight, **vectors, "lengths": "*i64"}
    flags = {"HAS_LENGTHS": True, "PRECISION": precision}
    constants = module.constants(mode, stride, cin, cout, dtype == "*fp32") | flags
    check(module.snake_upsample1d_kernel, pointers, constants, capability, tmp_path)


# stages, entries, dim, channels: both acoustic quantisers, the semantic one, and wide code spaces.
QUANTIZERS = [(7, 4096, 8, 1024), (11, 1024, 8, 1024), (1, 16384, 8, 768), (2, 1000, 16, 1024), (16, 65536, 64, 1024)]


@capabilities
@pytest.mark.parametrize("everything", [True, False], ids=["everything", "codes alone"])
@pytest.mark.parametrize("sizes", QUANTIZERS, ids=str)
def test_rvq_search(sizes: tuple[int, int, int, int], everything: bool, capability: int, tmp_path: Path) -> None:
    module = kernel_module("rvq_search")
    names = ("in_weight", "in_bias", "cross", "book", "squares", "rows", "out_weight", "out_bias", "margin")
    flags = dict.fromkeys(("HAS_QUANTIZED", "HAS_MARGIN", "HAS_LENGTHS"), everything)
    for dtype in FLOATS.values() if sizes == QUANTIZERS[0] else ("*fp32",):
        pointers = {**dict.fromkeys(names, "*fp32"), "z": dtype, "quantized": dtype, "codes": "*i64", "lengths": "*i64"}
        check(module.rvq_search_kernel, pointers, module.constants(*sizes) | flags, capability, tmp_path)


@capabilities
@dtypes
@pytest.mark.parametrize("sizes", [QUANTIZERS[0], QUANTIZERS[-1]], ids=str)
def test_rvq_lookup(sizes: tuple[int, int, int, int], dtype: str, capability: int, tmp_path: Path) -> None:
    module = kernel_module("rvq_lookup")
    parts = dict.fromkeys(("rows", "out_weight", "out_bias"), "*fp32")
    pointers = {"codes": "*i64", **parts, "addend": dtype, "y": dtype, "lengths": "*i64", "error": "*i64"}
    flags = {"HAS_ADDEND": True, "HAS_LENGTHS": True}
    check(module.rvq_lookup_kernel, pointers, module.constants(*sizes) | flags, capability, tmp_path)


def test_float32_uses_no_tensor_core(tmp_path: Path) -> None:
    """A tensor core has no float32: where float32 is asked for, not one tf32 instruction may appear."""
    module = kernel_module("snake_upsample1d")
    vectors = dict.fromkeys(("weight", "bias", "alpha", "inverse", "x", "y"), "*fp32")
    found = {}
    for precision in ("ieee", "tf32"):
        constants = module.constants("transposed", 4, 96, 48, True) | {"HAS_LENGTHS": False, "PRECISION": precision}
        for capability in (80, 90):
            compiled = compile_kernel(module.snake_upsample1d_kernel, vectors, constants, capability)
            found[precision, capability] = bool(re.search(r"(mma|wgmma)\S*tf32", compiled.asm["ptx"]))
    assert found == {("ieee", 80): False, ("ieee", 90): False, ("tf32", 80): True, ("tf32", 90): True}
    search = kernel_module("rvq_search")
    names = ("z", "in_weight", "in_bias", "cross", "book", "squares", "rows", "out_weight", "out_bias", "margin")
    pointers = {**dict.fromkeys((*names, "quantized"), "*fp32"), "codes": "*i64", "lengths": "*i64"}
    flags = dict.fromkeys(("HAS_QUANTIZED", "HAS_MARGIN", "HAS_LENGTHS"), True)
    compiled = compile_kernel(search.rvq_search_kernel, pointers, search.constants(*QUANTIZERS[0]) | flags, 90)
    assert "mma" not in compiled.asm["ptx"]


def test_a_spill_is_seen(tmp_path: Path) -> None:
    module = kernel_module("causal_dwconv1d")
    weights = dict.fromkeys(("x", "y", "weight", "bias", "ln_weight", "ln_bias"), "*fp32")
    constants = module.constants(768, 7, True) | {"HAS_BIAS": True, "HAS_LN_BIAS": True, "HAS_LENGTHS": True}
    with pytest.raises(AssertionError, match="spills"):
        check(
            module.causal_dwconv1d_kernel,
            {**weights, "lengths": "*i64", "eps": "fp32"},
            constants | {"maxnreg": 32},
            80,
            tmp_path,
        )


def test_every_op_of_the_table_is_compiled_here() -> None:
    listed = {op for op, rows in _choice.AUTO.items() if any(row.backend == "triton" for row in rows)}
    assert listed == set(_choice.TRITON_OPS)
    assert {f"test_{op}" for op in listed} <= set(globals())
