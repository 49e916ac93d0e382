"""pytest-benchmark micro-benchmarks: every op beside plain PyTorch, at both presets' shapes.

As tests they run on one frame, once. With 10 s of audio and 20 rounds:
    DUALCODEC_EXT_BENCH_SECONDS=10 python -m pytest tests/test_benchmark_ops.py --benchmark-enable
Timing in turn, ceilings and all shapes are in `python -m bench ops`.
"""

import os
from functools import cache

import pytest
import torch

from bench import registry
from bench.ours import missing_module
from bench.program import build_program
from dualcodec_ext import DualCodecConfig, testing

pytest.importorskip("pytest_benchmark")

SECONDS = float(os.environ.get("DUALCODEC_EXT_BENCH_SECONDS", "0"))


@cache
def largest_rows(preset: str) -> dict[str, registry.Row]:
    """The row of each op that has most to compute."""
    settings = DualCodecConfig.preset(preset).to_dict()
    largest: dict[str, registry.Row] = {}
    for row in registry.rows(build_program(settings), testing.seeded_model(settings), SECONDS):
        if row.op not in largest or row.flops > largest[row.op].flops:
            largest[row.op] = row
    return largest


@pytest.mark.parametrize("preset", ["12hz_v1", "25hz_v1"])
@pytest.mark.parametrize("op", registry.OPS)
@pytest.mark.parametrize("who", ["ours", "plain"])
def test_op(benchmark, preset, op, who):
    row = largest_rows(preset)[op]
    if who == "ours" and (missing := missing_module()):
        pytest.skip(f"no compiled module: {missing}")
    call = (registry.our_call if who == "ours" else registry.reference_call)(row, torch.float32)
    verdict = registry.make_check(row, torch.float32)(call(), torch.float32, ours=who == "ours")
    assert verdict.ok, verdict.text
    benchmark.group = f"{preset} {row.name}"
    benchmark.extra_info.update(gflop=row.flops / 1e9, threads=torch.get_num_threads())
    benchmark.pedantic(call, rounds=20 if SECONDS else 2, iterations=1, warmup_rounds=1)
