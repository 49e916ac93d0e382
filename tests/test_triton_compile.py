"""Every Triton kernel of the `auto` table compiles for sm_80 and sm_90 as it ships, and spills no register.

No GPU is needed: Triton's own ptxas assembles, its cuobjdump tells registers, stack and shared memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualcodec_ext import build
from dualcodec_ext.ops import _choice

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if build.triton_interprets():
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

MOST_SHARED = 99 * 1024  # bytes a block may have on every GPU from sm_80 on; sm_86 and sm_89 have the least
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]


@dataclass(frozen=True)
class Launch:
    """What the host side would launch."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    local: int
    shared: int


def launch_of(monkeypatch: pytest.MonkeyPatch, op: str, *args: Any) -> Launch:
    """Run an op's host side on tensors of the CPU as far as its launch."""
    seen: list[Launch] = []
    host = importlib.import_module("dualcodec_ext.ops.triton._host")
    monkeypatch.setattr(host, "launch", lambda k, grid, device, *a, **c: seen.append(Launch(k, a, c)))
    getattr(importlib.import_module(f"dualcodec_ext.ops.triton.{op}"), op)(*args)
    return seen[0]


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile as the launch would: Triton makes ones and None constants, and knows multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in launch.constants.items() if name in OPTIONS}
    fixed = {name: value for name, value in launch.constants.items() if name not in OPTIONS}
    signature, attributes = dict.fromkeys(fixed, "constexpr"), {}
    names = [name for name in launch.kernel.arg_names if name not in fixed]
    for name, value in zip(names, launch.args, strict=True):
        if isinstance(value, torch.Tensor):
            signature[name], multiple = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], multiple = "fp32", False
        elif value is None or value == 1:
            signature[name], multiple, fixed[name] = "constexpr", False, value
        else:
            signature[name], multiple = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if multiple:
            attributes[(launch.kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    ordered = {name: signature[name] for name in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, ordered, fixed, attributes)
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


def check(launch: Launch, capability: int, folder: Path) -> None:
    used = usage(compile_launch(launch, capability), folder)
    assert (used.stack, used.local) == (0, 0), f"{launch.constants} spills: {used}"
    assert used.shared <= MOST_SHARED, f"{launch.constants}: {used}"


def signal(batch: int, channels: int, steps: int, dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    if channels_last:
        return torch.zeros(batch, steps, channels, dtype=dtype).transpose(1, 2)
    return torch.zeros(batch, channels, steps, dtype=dtype)


capabilities = pytest.mark.parametrize("capability", [80, 90], ids=lambda c: f"sm_{c}")
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
# Sizes of a batch of odd lengths, of one step of one clip (every one of them a constant), and contiguous channels.
LAYOUTS = {"batch": (3, 37, True), "one step": (1, 1, True), "channels first": (2, 48, False)}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())

# channels, taps, LayerNorm: the codec's blocks and the head's, and more channels than a block holds.
DWCONV = [(768, 7, True), (1024, 31, True), (768, 7, False), (1536, 31, True), (24, 7, True)]


def dwconv(
    monkeypatch: pytest.MonkeyPatch, channels: int, taps: int, norm: bool, dtype: torch.dtype, layout: Any
) -> Launch:
    batch, steps, last = layout
    vector = torch.ones(channels)
    lengths = torch.full((batch,), steps) if batch > 1 else None
    scale, shift = (vector, vector) if norm else (None, None)
    x = signal(batch, channels, steps, dtype, last)
    args = (x, torch.ones(channels, taps), vector, [taps - 1, 0], scale, shift, 1e-6, lengths)
    return launch_of(monkeypatch, "causal_dwconv1d", *args)


@capabilities
@dtypes
@pytest.mark.parametrize("channels, taps, norm", DWCONV)
def test_causal_dwconv1d(
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
    taps: int,
    norm: bool,
    dtype: torch.dtype,
    capability: int,
    tmp_path: Path,
) -> None:
    check(dwconv(monkeypatch, channels, taps, norm, dtype, LAYOUTS["batch"]), capability, tmp_path)


@layouts
def test_causal_dwconv1d_layouts(monkeypatch: pytest.MonkeyPatch, layout: Any, tmp_path: Path) -> None:
    check(dwconv(monkeypatch, 768, 7, True, torch.bfloat16, layout), 90, tmp_path)
    check(dwconv(monkeypatch, 768, 7, False, torch.float32, layout), 80, tmp_path)


def test_causal_dwconv1d_adds_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over more would follow the layout in registers, hence x's strides and alignment; two have no order."""
    for channels in (768, 1536):
        launch = dwconv(monkeypatch, channels, 7, True, torch.float32, LAYOUTS["batch"])
        shapes = re.findall(r"\(tensor<([\dx]+)xf32>\) -> tensor<", compile_launch(launch, 90).asm["ttir"])
        axes = re.findall(r'"tt.reduce".*axis = (\d)', compile_launch(launch, 90).asm["ttir"])
        assert shapes and {shape.split("x")[int(axis)] for shape, axis in zip(shapes, axes, strict=True)} == {"2"}


# mode, stride, Cin, Cout: the first and the last layer of the presets' decoders, and a layer of few channels.
UPSAMPLE = [("transposed", 2, 1536, 768), ("repeat", 4, 96, 48), ("transposed", 2, 8, 4)]
KINDS = {  # signal, weight, tf32
    "float32": (torch.float32, torch.float32, False),
    "tf32": (torch.float32, torch.float32, True),
    "bfloat16": (torch.bfloat16, torch.float32, False),
    "bfloat16 weights": (torch.bfloat16, torch.bfloat16, False),
    "float16": (torch.float16, torch.float32, False),
}


def upsample(
    monkeypatch: pytest.MonkeyPatch, mode: str, stride: int, cin: int, cout: int, kind: str, layout: Any
) -> Launch:
    dtype, weights, tf32 = KINDS[kind]
    batch, steps, last = layout
    weight = torch.ones(1).expand((cin, cout, 2 * stride) if mode == "transposed" else (cout, cin, 2 * stride))
    packed = torch.zeros((2 if mode == "transposed" else 3) * cin, stride * cout, dtype=weights)
    lengths = torch.full((batch,), steps) if batch > 1 else None
    x = signal(batch, cin, steps, dtype, last)
    padding = [1, 1] if mode == "transposed" else [2 * stride - 1, 0]
    args = (x, torch.ones(cin), weight, None, stride, mode, padding, lengths, packed)
    launch = launch_of(monkeypatch, "snake_upsample1d", *args)
    assert launch.constants["PRECISION"] == "ieee"
    return replace(launch, constants=launch.constants | {"PRECISION": "tf32" if tf32 else "ieee"})


@capabilities
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode, stride, cin, cout", UPSAMPLE)
def test_snake_upsample1d(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    stride: int,
    cin: int,
    cout: int,
    kind: str,
    capability: int,
    tmp_path: Path,
) -> None:
    check(upsample(monkeypatch, mode, stride, cin, cout, kind, LAYOUTS["batch"]), capability, tmp_path)


@layouts
def test_snake_upsample1d_layouts(monkeypatch: pytest.MonkeyPatch, layout: Any, tmp_path: Path) -> None:
    check(upsample(monkeypatch, "repeat", 8, 768, 384, "bfloat16", layout), 90, tmp_path)
    check(upsample(monkeypatch, "transposed", 5, 192, 96, "float32", layout), 80, tmp_path)


# stages, entries, dim, channels: both acoustic quantisers, the semantic one, and wide code spaces.
QUANTIZERS = [(7, 4096, 8, 1024), (11, 1024, 8, 1024), (1, 16384, 8, 768), (2, 1000, 16, 1024), (3, 65536, 64, 1024)]
quantizers = pytest.mark.parametrize("sizes", QUANTIZERS, ids=str)


def weights_of(stages: int, entries: int, dim: int, channels: int) -> tuple[list[Tensor], Tensor]:
    """Placeholders of a quantiser's weights, and a packed tensor of their size."""
    from dualcodec_ext.ops.triton import rvq

    shapes = (stages, dim, channels), (stages, dim), (stages, entries, dim), (stages, channels, dim), (stages, channels)
    packed = torch.zeros(1, rvq.total(rvq.shapes(stages, entries, dim, channels)))
    return [torch.zeros(1).expand(shape) for shape in shapes], packed


def search(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int, int], dtype: torch.dtype, everything: bool, layout: Any
) -> Launch:
    batch, frames, last = layout
    weights, packed = weights_of(*sizes)
    lengths = torch.full((batch,), frames) if everything else None
    z = signal(batch, sizes[3], frames, dtype, last)
    return launch_of(monkeypatch, "rvq_search", z, *weights, sizes[0], everything, everything, lengths, packed)


@capabilities
@pytest.mark.parametrize("everything", [True, False], ids=["everything", "codes alone"])
@quantizers
def test_rvq_search(
    monkeypatch: pytest.MonkeyPatch, sizes: Any, everything: bool, capability: int, tmp_path: Path
) -> None:
    check(search(monkeypatch, sizes, torch.float32, everything, LAYOUTS["batch"]), capability, tmp_path)


@layouts
def test_rvq_search_layouts(monkeypatch: pytest.MonkeyPatch, layout: Any, tmp_path: Path) -> None:
    check(search(monkeypatch, QUANTIZERS[0], torch.bfloat16, True, layout), 90, tmp_path)
    check(search(monkeypatch, QUANTIZERS[2], torch.float16, False, layout), 80, tmp_path)


def lookup(monkeypatch: pytest.MonkeyPatch, sizes: Any, dtype: torch.dtype, layout: Any) -> Launch:
    batch, frames, last = layout
    weights, packed = weights_of(*sizes)
    lengths = torch.full((batch,), frames) if batch > 1 else None
    codes = torch.zeros(batch, sizes[0], frames, dtype=torch.int64)
    addend = signal(batch, sizes[3], frames, dtype, last)
    return launch_of(monkeypatch, "rvq_lookup", codes, *weights[2:], addend, lengths, False, packed)


@capabilities
@dtypes
@quantizers
def test_rvq_lookup(
    monkeypatch: pytest.MonkeyPatch, sizes: Any, dtype: torch.dtype, capability: int, tmp_path: Path
) -> None:
    if dtype == torch.float32 or sizes == QUANTIZERS[0]:
        check(lookup(monkeypatch, sizes, dtype, LAYOUTS["batch"]), capability, tmp_path)


@layouts
def test_rvq_lookup_layouts(monkeypatch: pytest.MonkeyPatch, layout: Any, tmp_path: Path) -> None:
    check(lookup(monkeypatch, QUANTIZERS[0], torch.bfloat16, layout), 90, tmp_path)
    check(lookup(monkeypatch, QUANTIZERS[2], torch.float32, layout), 80, tmp_path)


def test_float32_uses_no_tensor_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor core has no float32: where float32 is asked for, not one tf32 instruction may appear."""
    found = {}
    for kind in ("float32", "tf32"):
        launch = upsample(monkeypatch, "repeat", 4, 96, 48, kind, LAYOUTS["batch"])
        for capability in (80, 90):
            found[kind, capability] = bool(re.search(r"mma\S*tf32", compile_launch(launch, capability).asm["ptx"]))
    assert found == {("float32", 80): False, ("float32", 90): False, ("tf32", 80): True, ("tf32", 90): True}
    launch = search(monkeypatch, QUANTIZERS[0], torch.float32, True, LAYOUTS["batch"])
    assert "mma" not in compile_launch(launch, 90).asm["ptx"]


def begins_at_zero(compiled: Any) -> list[bool]:
    """Of each product of tiles, in order, whether its sums begin at zero rather than go on with a loop's."""
    text = compiled.asm["ttgir"]
    begins = re.findall(r" = (?:tt\.dot|ttng\.warp_group_dot) %\S+, %\S+, (%\w+)", text)
    return [re.search(rf"{re.escape(name)} = arith\.constant dense<0\.0", text) is not None for name in begins]


@capabilities
def test_float32_sums_of_a_step_stand_apart(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """Triton folds acc + dot(a, b, 0) into one chain of all products, which loses twice what plain PyTorch does."""
    for kind in ("float32", "tf32"):
        compiled = compile_launch(upsample(monkeypatch, "transposed", 2, 1536, 768, kind, LAYOUTS["batch"]), capability)
        assert begins_at_zero(compiled) == [True]
        # 64 x 64 sums in 128 threads, each added to the step's in front and to the bias: the rest are products' fmas.
        assert len(re.findall(r"add(?:\.rn)?\.f32", compiled.asm["ptx"])) >= 64
    half = compile_launch(upsample(monkeypatch, "transposed", 2, 1536, 768, "bfloat16", LAYOUTS["batch"]), capability)
    assert not any(begins_at_zero(half)) and begins_at_zero(half)  # one chain, and so the above could fail
    found = compile_launch(search(monkeypatch, QUANTIZERS[0], torch.float32, True, LAYOUTS["batch"]), capability)
    assert begins_at_zero(found) == [True]


def test_half_precision_uses_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = upsample(monkeypatch, "transposed", 2, 1536, 768, "bfloat16", LAYOUTS["batch"])
    assert re.search(r"mma\.sync\S*bf16", compile_launch(launch, 80).asm["ptx"])
    assert re.search(r"wgmma\S*bf16", compile_launch(launch, 90).asm["ptx"])


def test_a_spill_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launch = dwconv(monkeypatch, 768, 7, True, torch.float32, LAYOUTS["batch"])
    starved = replace(launch, constants=launch.constants | {"maxnreg": 32})
    with pytest.raises(AssertionError, match="spills"):
        check(starved, 80, tmp_path)


def test_every_op_of_the_table_is_compiled_here() -> None:
    listed = {op for op, rows in _choice.AUTO.items() if any(row.backend == "triton" for row in rows)}
    assert listed == set(_choice.TRITON_OPS)
    assert {f"test_{op}" for op in listed} <= set(globals())
