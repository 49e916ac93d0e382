"""The built CUDA code, without a GPU: it imports and registers, its kernels keep their budgets, its fakes fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dualcodec_ext as dx
from dualcodec_ext import build, testing
from dualcodec_ext.ops import _common

MODULE = build.load_module()
BUILT = (build.build_record() or {}).get("cuda")
pytestmark = pytest.mark.skipif(MODULE is None or BUILT is None, reason="the compiled module has no CUDA code")

OPS = ("rvq_search", "rvq_lookup", "causal_dwconv1d", "snake_conv1d", "snake_upsample1d", "residual_unit")
PACKERS = ("pack_conv1d", "pack_residual_unit", "pack_rvq", "pack_upsample1d")
# Registers per thread: 65,536 are shared by a multiprocessor's threads, and a thread has 255 at most. A kernel that
# outgrows its row would run with fewer blocks at a time than its launch bounds promise, or spill.
REGISTERS = (
    (r"ConvGemm<dcx::HalfTile<dcx::b?f16, 128, 128.*true", 240),  # 256 threads, one block
    (r"ConvGemm<dcx::HalfTile<dcx::b?f16, 128, 128", 184),
    (r"ConvGemm<dcx::HalfTile<dcx::b?f16, 128, 96", 160),
    (r"FusedUnit<dcx::b?f16, 192, 128", 184),
    (r"ConvWgmma<dcx::b?f16, 2, 192, 6", 252),  # one block of 256 threads, which may have 255
    (r"ConvWgmma<dcx::b?f16, 2, 128, 6", 232),
    (r"ConvWgmma<dcx::b?f16, 2, (96|128, 3),", 128),  # two blocks of 256 threads
    (r"ConvWgmma<dcx::b?f16, 1, 64, 8, true, 2, 1>", 128),
    (r"ConvResident<dcx::b?f16, (192|384),", 208),  # one block of 256 threads
    (r"TapColumnsConv<dcx::b?f16, 6>", 240),  # two blocks of 128 threads
    (r"ConvFew<dcx::b?f16, 1>", 80),  # three blocks of 256 threads, so that the next kernels' come up beside
    (r"ConvFew<", 128),  # two
    (r"WgmmaHalves<dcx::b?f16, 192, 2,", 128),  # one block of 512
    (r"WgmmaUnit<dcx::b?f16, 96, 1,", 208),
    (r"", 168),  # three blocks of 128 threads
)


class Usage(NamedTuple):
    arch: str
    kernel: str
    registers: int
    stack: int
    local: int


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or of triton's wheel."""
    found = shutil.which(name)
    if found is None:
        nvcc = shutil.which("nvcc")
        told = (
            subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True) if nvcc else None
        )
        top = re.search(r"\bTOP=(\S+)", told.stdout + told.stderr) if told else None
        found = shutil.which(str(Path(top[1], "bin", name))) if top else None
    if found is None:
        for folder in sys.path:
            found = found or shutil.which(str(Path(folder, "triton/backends/nvidia/bin", name)))
    return found


@pytest.fixture(scope="module")
def usage() -> list[Usage]:
    tool = cuda_tool("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump was not found")
    assert MODULE is not None and MODULE.__file__ is not None
    text = subprocess.run(
        [tool, "--dump-resource-usage", MODULE.__file__], capture_output=True, text=True, check=True
    ).stdout
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    found, arch, kernel = [], "", ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (.*):$", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.append(Usage(arch, kernel, *map(int, match.groups())))
    return [u for u in found if "run_kernel" in u.kernel]


def test_kernels_keep_their_budgets(usage: list[Usage]) -> None:
    assert len({u.kernel for u in usage}) >= 20
    for used in usage:
        limit = next(limit for pattern, limit in REGISTERS if re.search(pattern, used.kernel))
        assert used.registers <= limit, used
        assert used.stack == 0 and used.local == 0, f"spills: {used}"


def test_every_architecture_is_there(usage: list[Usage]) -> None:
    record = build.build_record()
    assert record is not None
    wanted = {"sm_" + arch.partition("+")[0].replace(".", "") for arch in record["cuda_archs"]}
    assert {u.arch for u in usage} == wanted
    kernels = {arch: {u.kernel for u in usage if u.arch == arch} for arch in wanted}
    assert all(names == next(iter(kernels.values())) for names in kernels.values())


OUTS = [f"{op}.out" for op in OPS if op != "rvq_search"]
PAIRS = ("residual_unit_pair", "snake_upsample1d_pair")


@pytest.mark.parametrize("op", [*OPS, *PACKERS, *OUTS, *PAIRS, "stream_rows", "take_codes"])
def test_ops_are_registered_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dualcodec_ext::{op}", "CUDA")


def test_importing_touches_no_gpu(tmp_path: Path) -> None:
    code = "import torch, dualcodec_ext as dx; dx.ops; "
    code += "print(dx.build.load_module() is not None, torch.cuda.is_initialized(), "
    # What the driver says, whoever made it use the GPU.
    code += "any(map(torch._C._cuda_hasPrimaryContext, range(torch.cuda.device_count()))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["True", "False", "False"]


def test_doctor_tells_of_the_cuda_code() -> None:
    text = str(dx.doctor())
    record = build.build_record()
    assert record is not None and f"CUDA code: {record['cuda']} for {', '.join(record['cuda_archs'])}" in text
    if "7.5" in record["cuda_archs"]:
        assert "7.5: float32 and float16 kernels alone" in text
    if not torch.cuda.is_available():
        assert "backend cuda: no, torch finds no CUDA device" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"causal_decoder": True, "causal_encoder": True}, {"encoder_dim": 104, "latent_dim": 24, "decoder_dim": 448}],
    ids=["centred", "causal", "wide units"],
)
def test_the_engine_fits_its_ops_fakes(
    dtype: torch.dtype, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing, encode and decode on fake CUDA tensors: every argument's device, dtype and shape, without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dualcodec_ext.engine import Engine

    monkeypatch.setattr(_common, "unavailable", lambda name: "")  # as on a machine with a GPU
    settings = {**testing.TINY, **changes}
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        model = dx.reference.DualCodec(**settings).eval()
        engine = Engine(model, dtype)
        audio = torch.zeros(2, 1, 12 * engine.hop_samples)
        features = torch.zeros(2, settings["semantic_dim"], 12)
        semantic, acoustic = engine.encode(audio, features, None, None)
        assert acoustic is not None and semantic.device.type == acoustic.device.type == "cuda"
        assert semantic.shape == (2, 1, 12) and acoustic.shape == (2, settings["n_codebooks"], 12)
        y = engine.decode(semantic, acoustic, None)
        assert y.dtype == dtype and y.shape == (2, 1, model.output_samples(12))


class Fitting(TorchDispatchMode):
    """Every overload `out` is given what the plain op would return, and rows that vectors can be moved of."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "dualcodec_ext" and func._overloadname == "out":
            self.calls += 1
            out, first = kwargs["out"], kwargs.get("first", 0)
            made = func.overloadpacket.default(*args)
            if "first" in kwargs:
                assert first % args[4] == 0, "a stretch of an upsampling begins on its stride"
                made = made[:, :, first : first + out.shape[2]]
            assert (out.shape, out.dtype, out.device) == (made.shape, made.dtype, made.device)
            for rows in (out, *(x for x in args[:1] if x.is_floating_point())):
                if rows.shape[1] % 8 == 0:
                    places = (rows.stride(0), rows.stride(2), rows.storage_offset())
                    assert rows.stride(1) == 1 and all(n * rows.element_size() % 16 == 0 for n in places)
        return func(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "12hz_causal", "12hz_v1", "12hz_lookahead"])
def test_a_streams_pass_fits_its_ops_fakes(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors, also of upsamplings whose rows begin between strides."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dualcodec_ext import _stream_rows
    from dualcodec_ext._stream_graph import GraphDecoder
    from dualcodec_ext._stream_plan import make_layers
    from dualcodec_ext.engine import Engine

    monkeypatch.setattr(_common, "unavailable", lambda name: "")  # as on a machine with a GPU
    copied = []
    monkeypatch.setattr(_stream_rows, "copy_runs", lambda *args: copied.append(args))
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        model = dx.reference.DualCodec(**dx.DualCodecConfig.preset(name).to_dict()).eval()
        engine = Engine(model, dtype)
        programs = engine.tiles.programs
        layers = make_layers([*programs.semantic_decoder, *programs.decoder])
        before = len(programs.semantic_decoder)
        passes = GraphDecoder(programs, layers[:before], layers[before:], 3, torch.device("cuda:0"))
        for stages, bounded, frames in ((2, False, 1), (2, True, 2), (0, False, 3), (None, True, 2)):
            inputs = {"active": torch.zeros(3, dtype=torch.bool), "error": torch.zeros(1, dtype=torch.int64)}
            with Fitting() as fitting:
                (audio,) = passes._pass(inputs | passes._inputs(frames, stages, bounded), frames)
            assert audio.shape == (3, 1, frames * engine.hop_samples) and fitting.calls > len(layers)
            for to, source, *places, kept, _ in copied[-2:]:
                assert to.is_cuda and source.is_cuda and (kept is None) == (source is passes.state)
                assert name == "tiny" or all(n * to.element_size() % 16 == 0 for runs in places for n in runs)
