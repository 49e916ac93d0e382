"""What the tests on a GPU share: the device, the families of kernels there, and plain PyTorch in exact float32.

DUALCODEC_EXT_TEST_DEVICE=cpu runs the same tests on the CPU's kernels: what keeps them in order where there is no GPU.
With DUALCODEC_EXT_TEST_DEVICE=cuda they fail without one, where they would be skipped.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch

from dualcodec_ext import DualCodecConfig, build, reference, testing
from dualcodec_ext.ops import _choice

ASKED = os.environ.get("DUALCODEC_EXT_TEST_DEVICE", "")
DEVICE = ASKED or "cuda"
assert DEVICE in ("cuda", "cpu"), f"DUALCODEC_EXT_TEST_DEVICE must be cuda or cpu, got {DEVICE}"
ON_GPU = DEVICE == "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

needs_device = pytest.mark.skipif(
    not ASKED and not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gpu_alone = pytest.mark.skipif(not ON_GPU, reason="of GPUs alone")


def families(op: str) -> list[str]:
    """The backends that have kernels for an op on DEVICE; on the CPU Triton's with TRITON_INTERPRET=1."""
    has_triton = op in _choice.TRITON_OPS and importlib.util.find_spec("triton") is not None
    return [DEVICE, "triton"] if has_triton and (ON_GPU or build.triton_interprets()) else [DEVICE]


def pairs(*ops: str) -> list[Any]:
    """(family, op) as test parameters."""
    return [pytest.param(family, op, id=f"{family}-{op}") for op in ops for family in families(op)]


def namespace(family: str) -> str:
    """Where torch.ops keeps a family's ops."""
    return "dualcodec_ext_triton" if family == "triton" else "dualcodec_ext"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Plain PyTorch without TF32 and without algorithms that add in a random order."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory of torch's allocator during a call beyond what was allocated before it, the result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = call()
    torch.cuda.synchronize()
    del found
    return torch.cuda.max_memory_allocated() - before


@lru_cache(maxsize=3)
def preset_model(name: str) -> reference.DualCodec:
    """The seeded reference model of a preset on the CPU, not to be changed."""
    return testing.seeded_model(DualCodecConfig.preset(name).to_dict())
