"""The choice of a backend: by context, by environment, and what happens where one can't run."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import dualcodec_ext as dx
from dualcodec_ext.ops import _common

X = torch.linspace(-1, 1, 24).reshape(1, 4, 6)
W = torch.linspace(-1, 1, 48).reshape(4, 4, 3)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )


def chosen(x: torch.Tensor = X) -> str:
    return _common.choose_backend(x.device, x.dtype, "snake_conv1d")


def test_auto_takes_the_compiled_ops() -> None:
    assert chosen() == "cpu"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert chosen(X.to(dtype)) == "cpu"


def test_context_nests_and_ends() -> None:
    with dx.backend("reference"):
        assert chosen() == "reference"
        with dx.backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"
    with pytest.raises(KeyError), dx.backend("reference"):
        raise KeyError
    assert chosen() == "cpu"


def test_a_thread_has_its_own() -> None:
    seen: list[str] = []
    with dx.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_one_asked_for_that_cannot_run_raises(name: str) -> None:
    with pytest.raises(dx.BackendError, match=f"backend '{name}' can't run here: "), dx.backend(name):
        pass


def test_no_such_backend() -> None:
    with (
        pytest.raises(dx.BackendError, match="backend must be one of auto, cpu, cuda, triton, reference, got 'gpu'"),
        dx.backend("gpu"),
    ):
        pass


def test_a_named_backend_refuses_other_devices_and_dtypes() -> None:
    with dx.backend("cpu"):
        with pytest.raises(dx.BackendError, match="backend 'cpu' needs tensors on cpu, got meta"):
            dx.ops.snake_conv1d(X.to("meta"), W.to("meta"))
        with pytest.raises(dx.BackendError, match=r"backend 'cpu' has no kernels for torch\.complex64"):
            dx.ops.snake_conv1d(X.to(torch.complex64), W)


def test_reference_and_cpu_agree_for_every_op() -> None:
    gen = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen)

    ones, codes = torch.ones(4), torch.randint(0, 9, (1, 2, 6), generator=gen)
    rvq = (noise(2, 3, 4), noise(2, 3), noise(2, 9, 3), noise(2, 4, 3), noise(2, 4))
    calls: dict[str, Any] = {
        "snake_conv1d": lambda: dx.ops.snake_conv1d(X, W, alpha=ones),
        "causal_dwconv1d": lambda: dx.ops.causal_dwconv1d(X, W[:, 0]),
        "snake_upsample1d": lambda: dx.ops.snake_upsample1d(X, ones, W[..., :2].contiguous(), stride=1),
        "residual_unit": lambda: dx.ops.residual_unit(
            X, ones, W.repeat(1, 1, 3)[..., :7], None, ones, W[..., :1], None
        ),
        "rvq_lookup": lambda: dx.ops.rvq_lookup(codes, *rvq[2:]),
        "rvq_search": lambda: dx.ops.rvq_search(X, *rvq, return_quantized=True)[1],
    }
    assert set(calls) == {name for name in dx.ops.__all__ if name != "backend"}
    for name, call in calls.items():
        with dx.backend("reference"):
            expected = call()
        torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_code_follows_the_context() -> None:
    """Traced code guards on the backend: a switch traces again instead of running the old choice."""
    torch._dynamo.reset()
    graphs: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(str(graph.code))
        return graph.forward

    compiled = torch.compile(lambda x: dx.ops.snake_conv1d(x, W), fullgraph=True, backend=note)
    compiled(X)
    with dx.backend("reference"):
        compiled(X)
    compiled(X)
    assert len(graphs) == 2
    assert "dualcodec_ext" in graphs[0] and "dualcodec_ext" not in graphs[1]


def test_compiled_code_in_a_thread_or_task_has_its_own() -> None:
    torch._dynamo.reset()
    seen: list[tuple[str, bool]] = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        kernels = "dualcodec_ext" in str(graph.code)
        return lambda *args: seen.append((asked.get(), kernels)) or graph.forward(*args)

    asked: contextvars.ContextVar[str] = contextvars.ContextVar("asked", default="auto")
    compiled = torch.compile(lambda x: dx.ops.snake_conv1d(x, W), fullgraph=True, backend=note)

    async def task(name: str) -> None:
        asked.set(name)
        with dx.backend(name):
            for _ in range(2):
                compiled(X)
                await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(task("reference"), task("cpu"))

    asyncio.run(both())
    with dx.backend("reference"):
        thread = threading.Thread(target=lambda: compiled(X))
        thread.start()
        thread.join()
    assert seen == [("reference", False), ("cpu", True)] * 2 + [("auto", True)]


def test_compiled_code_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(str(graph.code))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setenv("DUALCODEC_EXT_BACKEND", "reference")
    torch.compile(lambda x: dx.ops.snake_conv1d(x, W), fullgraph=True, backend=note)(X)
    assert len(graphs) == 1 and "dualcodec_ext" not in graphs[0]


def test_compiled_code_warns_and_refuses_as_any_other() -> None:
    code = """
import logging, os, torch
logging.basicConfig(format="%(levelname)s %(message)s")
import dualcodec_ext as dx
x, w = torch.ones(1, 2, 5), torch.ones(3, 2, 1)
compiled = torch.compile(lambda x: dx.ops.snake_conv1d(x, w), fullgraph=True, backend="eager")
print(compiled(x).sum().item())
os.environ["DUALCODEC_EXT_BACKEND"] = "cpu"
torch._dynamo.reset()
compiled(x)
"""
    done = run_python(code, DUALCODEC_EXT_BACKEND="", DUALCODEC_EXT_DISABLE_MODULE="1")
    assert done.stdout.split() == ["30.0"]
    assert done.stderr.count("WARNING the slow reference runs") == 1
    assert done.returncode and "BackendError: backend 'cpu' can't run here: " in done.stderr


def test_the_reference_refuses_packed_weights() -> None:
    """Of the weight beside a packed one the shape alone is good, so that its values must not be computed with."""
    packed = dx.ops.packing.pack_conv1d(W)
    with (
        dx.backend("reference"),
        pytest.raises(dx.DualCodecError, match="snake_conv1d: packed must be None where the reference runs"),
    ):
        dx.ops.snake_conv1d(X, torch.zeros(1).expand(W.shape), packed=packed)


def test_the_reference_mixes_dtypes_too() -> None:
    with dx.backend("reference"):
        plain = dx.ops.snake_conv1d(X.bfloat16(), W)
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(dx.ops.snake_conv1d(X.bfloat16(), W), plain, rtol=2e-2, atol=2e-2)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALCODEC_EXT_BACKEND", "reference")
    assert chosen() == "reference"
    with dx.backend("cpu"):
        assert chosen() == "cpu"
    monkeypatch.setenv("DUALCODEC_EXT_BACKEND", "")
    assert chosen() == "cpu"
    monkeypatch.setenv("DUALCODEC_EXT_BACKEND", "fastest")
    wrong = "^DUALCODEC_EXT_BACKEND must be one of auto, cpu, cuda, triton, reference, got 'fastest'$"
    with pytest.raises(dx.BackendError, match=wrong):
        dx.ops.snake_conv1d(X, W)


def test_auto_says_its_choice_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_common, "_told", set())
    with caplog.at_level(logging.INFO, logger="dualcodec_ext"):
        for _ in range(3):
            dx.ops.snake_conv1d(X, W)
    records = [r for r in caplog.records if r.name == "dualcodec_ext"]
    assert [r.levelname for r in records] == ["INFO"]


def test_without_the_module_the_reference_runs_with_one_warning() -> None:
    code = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
import dualcodec_ext as dx
x, w = torch.ones(1, 2, 5), torch.ones(3, 2, 1)
for _ in range(3):
    print(dx.ops.snake_conv1d(x, w).sum().item())
model = dx.DualCodec(**__import__("dualcodec_ext.testing").testing.TINY).eval()
print(model.semantic_quantize(torch.zeros(1, 20, 4)).shape)
try:
    with dx.backend("cpu"):
        pass
except dx.BackendError as error:
    print("refused:", error)
"""
    done = run_python(code, DUALCODEC_EXT_DISABLE_MODULE="1", DUALCODEC_EXT_BACKEND="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == ["30.0"] * 3
    assert "refused: backend 'cpu' can't run here: " in done.stdout
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1 and "the slow reference runs" in warnings[0]


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_isa_from_the_environment(name: str) -> None:
    features = dx.build.load_module().cpu_features()[name]
    if not (features["compiled"] and features["detected"]):
        pytest.skip(f"this machine has no {name}")
    done = run_python("import dualcodec_ext as dx; print(dx.build.load_module().active_isa())", DUALCODEC_EXT_ISA=name)
    assert done.stdout.strip() == name


def test_an_unknown_isa_is_told() -> None:
    code = "import dualcodec_ext as dx; print(dx.build.load_module().active_isa_error())"
    done = run_python(code, DUALCODEC_EXT_ISA="sse9")
    assert "must be generic, avx2, avx512, avx512_bf16 or amx_bf16, got sse9" in done.stdout
    assert re.fullmatch(r".*got sse9: (generic|avx2|avx512|avx512_bf16|amx_bf16) runs instead\n", done.stderr)


@pytest.mark.parametrize("name", ["nope", "cuda"])
def test_doctor_tells_of_a_backend_that_cannot_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dx.build_info()["backends"].get(name, "unknown"):
        pytest.skip(f"{name} can run here")
    monkeypatch.setenv("DUALCODEC_EXT_BACKEND", name)
    report = dx.doctor()
    assert f"PROBLEM: DUALCODEC_EXT_BACKEND={name} can't be met" in str(report) and not report.healthy


def test_brgemm_gives_the_same_within_rounding() -> None:
    module = dx.build.load_module()
    x, w = torch.randn(1, 64, 50, generator=torch.Generator().manual_seed(0)), torch.ones(96, 64, 7) / 64
    own = dx.ops.snake_conv1d(x, w)
    if not module.set_gemm("brgemm"):
        pytest.skip("this torch has no float brgemm")
    try:
        library = dx.ops.snake_conv1d(x, w)
    except RuntimeError as error:
        pytest.skip(f"torch's brgemm does not run on this CPU: {error}")
    finally:
        assert module.set_gemm("own")
    torch.testing.assert_close(library, own, rtol=1e-5, atol=1e-5)
    assert not module.set_gemm("no such")


# A filter that answers arch_prctl's requests for AMX with EPERM, as sandboxes may.
WITHOUT_AMX = """
import ctypes, struct
program = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023)]
program += [(0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *line) for line in program)
lines = ctypes.create_string_buffer(code)
filter = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(lines))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.create_string_buffer(filter), 0, 0) == 0
import dualcodec_ext as dx, torch
module = dx.build.load_module()
print(module.cpu_features()["amx_bf16"]["detected"], module.active_isa(), module.active_isa_error(), sep="|")
x = torch.ones(1, 32, 40, dtype=torch.bfloat16)
print(float(dx.ops.snake_conv1d(x, torch.ones(16, 32, 1, dtype=torch.bfloat16)).max()))
"""


@pytest.mark.parametrize("asked", ["", "amx_bf16"])
def test_amx_that_the_system_withholds(asked: str) -> None:
    if not dx.build.load_module().cpu_features()["amx_bf16"]["detected"]:
        pytest.skip("this machine has no AMX")
    done = run_python(WITHOUT_AMX, DUALCODEC_EXT_ISA=asked)
    assert done.returncode == 0, done.stderr
    # Intel's AVX512-BF16 is slower than its AVX-512, and AMX comes from nobody else.
    why = "DUALCODEC_EXT_ISA=amx_bf16 can't run: this machine lacks it" if asked else ""
    assert done.stdout.splitlines() == [f"False|avx512|{why}", "32.0"]
