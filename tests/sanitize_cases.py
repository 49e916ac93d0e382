"""Small calls of every op on a GPU, one after another, to run under compute-sanitizer.

    export PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitize_cases.py

Each case is printed before it runs, so that an error has its name. Nothing is compared here.
Words behind the command choose the ops; DUALCODEC_EXT_TEST_DEVICE=cpu runs the cases on the CPU's kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import gpu
import opsuite as suite
import test_rvq_search as search
import torch
from gpu_cases import BUILDERS, MODULES, in_dtype

import dualcodec_ext as dx
from dualcodec_ext._code_look import CodeInput, CodeLook
from dualcodec_ext._stream_rows import copy_runs
from dualcodec_ext.ops import packing

# Every width of the residual units, more than one tile and a tail, the codec's taps, strides and dilations.
SHAPES: dict[str, list[dict[str, Any]]] = {
    "causal_dwconv1d": [{"channels": 768, "steps": 21}, {"channels": 96, "taps": 31, "steps": 40, "norm": False}],
    "residual_unit": [
        *({"channels": c, "steps": 330, "dilation": d} for c, d in ((48, 9), (96, 3), (192, 1))),
        {"channels": 192, "steps": 40, "dilation": 9},  # few rows
        {"channels": 384, "steps": 20, "dilation": 3, "causal": True},
        {"channels": 384, "steps": 150, "dilation": 9},
        {"channels": 33, "steps": 20},
    ],
    "rvq_lookup": [{"channels": 1024, "frames": 9, "stages": 7, "entries": 4096}, {"channels": 33, "dim": 5}],
    "rvq_search": [
        {"channels": 1024, "frames": 9, "stages": 7, "entries": 4096, "batch": 1},
        {"channels": 1024, "frames": 5, "stages": 11, "entries": 1024, "batch": 1},
        {"channels": 768, "frames": 3, "stages": 1, "entries": 16384, "batch": 1},
        {"channels": 1024, "frames": 310, "stages": 7, "entries": 4096, "batch": 1},  # tiles of 16
        {"channels": 40, "frames": 70, "stages": 2, "entries": 33, "dim": 5},
    ],
    "snake_conv1d": [
        {"cin": 1024, "cout": 96, "taps": 7, "padding": (3, 3), "snake": False, "steps": 9},
        {"cin": 48, "cout": 1, "taps": 7, "padding": (3, 3), "activation": "tanh", "steps": 300},
        {"cin": 1, "cout": 32, "taps": 7, "padding": (3, 3), "snake": False, "steps": 300},
        {"cin": 64, "cout": 128, "taps": 10, "stride": 5, "padding": (3, 3), "steps": 150},
        {"cin": 96, "cout": 200, "taps": 1, "activation": "gelu", "residual": True, "steps": 30},
        {"cin": 768, "cout": 48, "taps": 7, "dilation": 9, "padding": (54, 0), "steps": 6},  # few rows
        {"cin": 33, "cout": 19, "taps": 3, "dilation": 2, "steps": 30},
        # Clusters of 2, 3 and 8 blocks, and so many of 8 that each has one warpgroup.
        {"cin": 512, "cout": 96, "taps": 3, "steps": 150},
        {"cin": 192, "cout": 72, "taps": 11, "padding": (5, 5), "steps": 150},
        {"cin": 768, "cout": 200, "taps": 7, "padding": (3, 3), "steps": 150},
        {"cin": 1024, "cout": 600, "taps": 7, "padding": (3, 3), "steps": 150},
    ],
    "snake_upsample1d": [
        {"cin": 192, "cout": 96, "stride": 4, "steps": 40},
        {"cin": 96, "cout": 48, "stride": 5, "mode": "repeat", "steps": 40},
        {"cin": 33, "cout": 19, "stride": 3, "steps": 20},
        {"cin": 384, "cout": 192, "stride": 6, "steps": 2200},  # weights that stay
    ],
}
assert SHAPES.keys() == MODULES.keys()
PAIRS = ("residual_unit", "snake_upsample1d")


def signal_calls(op: str, shape: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    case = in_dtype(BUILDERS[op](**shape).to(gpu.DEVICE), dtype)
    yield "contiguous", lambda: case.call(case.op)
    cut = BUILDERS[op](**shape).to(gpu.DEVICE)
    cut.x = cut.x.transpose(1, 2).contiguous().transpose(1, 2)
    cut.lengths = torch.tensor([cut.x.shape[-1], 5], device=gpu.DEVICE)
    cut = in_dtype(cut, dtype)
    yield "channels-last, lengths", lambda: cut.call(cut.op)


def pair_calls(op: str, shape: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A layer's form of two results; a unit reads a pair's second one too."""
    case = in_dtype(BUILDERS[op](**shape).to(gpu.DEVICE), dtype)
    if op == "residual_unit" and dtype != torch.float32 and case.x.shape[1] <= 192:
        return
    x = case.x.transpose(1, 2).contiguous().transpose(1, 2)
    channels = case.call(case.op).shape[1]
    more: dict[str, Any] = {"out_alpha": torch.ones(channels, device=gpu.DEVICE)}
    more["lengths"] = torch.tensor([x.shape[-1], 5], device=gpu.DEVICE)
    if op == "residual_unit":
        more["snaked"] = x
    yield "a pair, lengths", lambda: getattr(dx.ops, f"{op}_pair")(x, **case.weights, **case.options, **more)


def search_calls(shape: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    q = search.make(**shape).to(gpu.DEVICE)
    z, packed = q.z.to(dtype), packing.pack_rvq(**q.weights)
    yield "codes", lambda: q.search(z, packed=packed)
    lengths = torch.tensor([2] * z.shape[0], device=gpu.DEVICE)
    last = z.transpose(1, 2).contiguous().transpose(1, 2)
    everything: dict[str, Any] = {"return_quantized": True, "return_margin": True, "lengths": lengths}
    yield "everything, lengths", lambda: q.search(last, packed=packed, **everything)


def take_codes() -> None:
    """Two parts with a tail, and a code out of range."""
    look = CodeLook(torch.empty(0, device=gpu.DEVICE).device)
    codes = [torch.randint(100, (21, 3, q), device=gpu.DEVICE).permute(1, 2, 0) for q in (1, 7)]
    inputs = [CodeInput(torch.zeros(3, c.shape[1], 24, dtype=torch.int64, device=gpu.DEVICE), 100) for c in codes]
    look.take(inputs, codes)
    assert look.fine()
    codes[1][2, 6, 20] = 100
    look.take(inputs, codes)
    assert not look.fine()


def stream_rows() -> None:
    """Runs of 16 bytes and of single elements, all rows and some of them."""
    source, to = torch.zeros(3, 800, device=gpu.DEVICE), torch.zeros(3, 900, device=gpu.DEVICE)
    error, kept = torch.zeros(1, dtype=torch.int64, device=gpu.DEVICE), torch.ones(3, device=gpu.DEVICE) > 0
    for at, begin, count in ((16, 32, 600), (3, 5, 777)):
        copy_runs(to, source, [at], [begin], [count], None, error)
        copy_runs(to, source, [at], [begin], [count], kept, error)


BESIDE = {"take_codes": take_codes, "stream_rows": stream_rows}


def main(wanted: list[str]) -> None:
    with torch.no_grad():
        for name in [name for name in BESIDE if not wanted or name in wanted]:
            print(name, flush=True)
            BESIDE[name]()
            gpu.synchronize()
        for op in [op for op in SHAPES if not wanted or op in wanted]:
            for family in gpu.families(op):
                for dtype in gpu.DTYPES:
                    for shape in SHAPES[op]:
                        with dx.backend(family):
                            calls = search_calls(shape, dtype) if op == "rvq_search" else signal_calls(op, shape, dtype)
                            pairs = pair_calls(op, shape, dtype) if family == "cuda" and op in PAIRS else ()
                            for how, call in chain(calls, pairs):
                                print(f"{family} {op} {dtype} {shape} {how}", flush=True)
                                call()
                                gpu.synchronize()
    print("all cases ran")


if __name__ == "__main__":
    suite.must_have_module()
    main(sys.argv[1:])
