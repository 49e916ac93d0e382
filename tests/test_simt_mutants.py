"""Planted bugs in the convolutions' CUDA kernels are caught on the CPU; without them the same cases pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import simt_cases
import simt_mutants
import torch
from simt_inputs import (
    NO_ERROR,
    SimtCase,
    conv_case,
    dwconv_case,
    stream_rows_case,
    take_codes_case,
    upsample_case,
    worst,
)
from simt_mutants import Mutant
from tolerances import TOLERANCE

pytestmark = pytest.mark.usefixtures("one_thread")
CONV, TILE, DWCONV = "common/conv_gemm.cuh", "common/gemm_tile.cuh", "causal_dwconv1d/causal_dwconv1d.cuh"
STREAM = "stream_rows/stream_rows.cuh"
TAKE = "take_codes/take_codes.cuh"
FINISH, WGMMA, FEW = "common/conv_finish.cuh", "common/conv_wgmma.cuh", "common/conv_few.cuh"
FEW_FINISH, RESIDENT = "common/conv_few_finish.cuh", "common/conv_resident.cuh"
NARROW, SLIDING = "snake_conv1d/snake_conv1d.cuh", "snake_conv1d/sliding_conv.cuh"
TAPS = "snake_conv1d/tap_columns_conv.cuh"
F32, BF16 = torch.float32, torch.bfloat16

MUTANTS: dict[str, dict[str, Mutant]] = {
    "snake_conv1d": {
        "missing barrier: rows are multiplied before all are there": Mutant(
            CONV, "      sync_threads();\n      issue(step + kStages - 1);", "      issue(step + kStages - 1);"
        ),
        "missing barrier: the last block's flag is read early": Mutant(
            FINISH, "static_cast<uint32_t>(p.ranges - 1));\n  sync_threads();", "static_cast<uint32_t>(p.ranges - 1));"
        ),
        "missing barrier: few outputs": Mutant(
            NARROW, "      sync_threads();\n      for (int64_t j", "      for (int64_t j"
        ),
        "out of bounds, shared memory: one stage of weights too few": Mutant(
            CONV, "+ kStages * kDepth * kWeightLd;", "+ (kStages - 1) * kDepth * kWeightLd;"
        ),
        "out of bounds, global memory: weights past the last column": Mutant(
            CONV, "const bool valid = n < left;", "const bool valid = left > 0;"
        ),
        "wrong tap": Mutant(CONV, "static_cast<int>(tap * p.dilation) * kRowLd", "static_cast<int>(tap) * kRowLd"),
        "dropped tail: the channels past whole steps": Mutant(
            CONV,
            "p.channels_padded / kDepth);\n    const int range = ",
            "p.channels / kDepth);\n    const int range = ",
        ),
        "dropped tail: the last channels of a step": Mutant(
            TILE, "for (int k = 0; k < kDepth; k += 4)", "for (int k = 0; k < kDepth - 4; k += 4)"
        ),
        "missing cp.async wait": Mutant(CONV, "      cp_async_wait<kStages - 2>();\n", ""),
        "the counters are left as they are": Mutant(
            FINISH,
            "atomic_count(p.counters + block_x(), static_cast<uint32_t>(p.ranges - 1))",
            "atomic_add(p.counters + block_x(), 1)",
        ),
        "one output of float32, missing barrier": Mutant(SLIDING, "    sync_threads();\n", ""),
        "one output of float32, wrong tap": Mutant(SLIDING, "(k - j + kTaps) % kTaps", "(k + j) % kTaps"),
        "one output, missing barrier: taps are added early": Mutant(
            TAPS, "b, q0, products);\n      sync_threads();", "b, q0, products);"
        ),
        "one output, missing barrier: the next tile's products come early": Mutant(
            TAPS, "out_steps, products);\n      sync_threads();", "out_steps, products);"
        ),
        "one output, wrong tap": Mutant(TAPS, "products[j * (pitch(p) + 1) + i]", "products[j * pitch(p) + i]"),
        "one output, a row past the clip's end": Mutant(TAPS, "first + kTiles * 16 <= end", "first < end"),
        "one output, dropped tail: the last channels": Mutant(
            TAPS, "there = c < p.channels;", "there = c + 4 < p.channels;"
        ),
        "one output, out of bounds, shared memory: no place for the last tap": Mutant(
            TAPS, "int64_t{kTaps} * pitch(p)", "int64_t{kTaps - 1} * pitch(p)"
        ),
        "warpgroups, missing barrier": Mutant(
            WGMMA, "          sync_part(0, kThreads);  // both roles", "          ;  // both roles"
        ),
        "warpgroups, missing cp.async wait": Mutant(WGMMA, "cp_async_wait<kAhead - 1>();", "cp_async_wait<8>();"),
        "warpgroups, products are not waited for": Mutant(WGMMA, "            wgmma_wait<1>();\n", ""),
        "warpgroups, wrong tap": Mutant(WGMMA, "now.tap * tap_bytes", "now.tap * kPanelRowBytes"),
        "warpgroups, dropped tail: the channels past whole chunks": Mutant(
            WGMMA,
            "static_cast<int>(p.channels_padded) + kChunk - 1) / kChunk",
            "static_cast<int>(p.channels) / kChunk)",
        ),
        "warpgroups, out of bounds, global memory: weights past the last channel": Mutant(
            WGMMA, "i * kWeightRows < own.left);", "own.left > -kChunk);"
        ),
        "warpgroups, out of bounds, shared memory: one stage of weights too few": Mutant(
            WGMMA, "tiles = p.stages * int64_t{kStageBytes}", "tiles = (p.stages - 1) * int64_t{kStageBytes}"
        ),
        "warpgroups, rows stay where they are from chunk to chunk": Mutant(WGMMA, "    own.from += kChunk;\n", ""),
        "warpgroups, out of bounds, global memory: rows past the last channel": Mutant(
            WGMMA, "there && static_cast<unsigned>(t)", "static_cast<unsigned>(t)"
        ),
        "a cluster, missing barrier: sums are added up early": Mutant(
            WGMMA, "        cluster_sync();\n        const int share", "        const int share"
        ),
        "a cluster, missing barrier: a block ends while others read its sums": Mutant(
            WGMMA, "    if (spread) cluster_wait();", "    "
        ),
        "a cluster, missing barrier: rows are finished early": Mutant(
            WGMMA, "    sync_threads();\n    if (spread)", "    if (spread)"
        ),
        "a cluster, the last range is left out": Mutant(
            FINISH, "if (range < ranges) parts[range]", "if (range == 0 || range < ranges - 1) parts[range]"
        ),
        "a cluster, dropped tail: the last rows": Mutant(
            WGMMA, "end = kTileRows * (share + 1) / p.ranges", "end = first + kTileRows / p.ranges / 2"
        ),
        "few rows, missing barrier: multiplied before all are there": Mutant(
            FEW, "wait_pending(issued - turn - 1);\n      sync_threads();\n", "wait_pending(issued - turn - 1);\n"
        ),
        "few rows, missing barrier: which rows they are is read early": Mutant(
            FEW, "    sync_threads();  // slots\n", ""
        ),
        "few rows, missing barrier: sums are read early": Mutant(FEW, "    sync_threads();  // sums\n", ""),
        "few rows, missing cp.async wait": Mutant(FEW, "      wait_pending(issued - turn - 1);\n", ""),
        "few rows, weights are overwritten while read": Mutant(
            FEW, "if (turn > 0 && issued < turns) issue();", "if (issued < turns) issue();"
        ),
        "few rows, the last range is left out": Mutant(
            FEW_FINISH, "if (range < p.ranges) {", "if (range == 0 || range < p.ranges - 1) {"
        ),
        "few rows, wrong tap": Mutant(
            FEW, "filled_rows : static_cast<int>(p.dilation)) * bytes;", "filled_rows : 1) * bytes;"
        ),
        "few rows, wrong chunk": Mutant(FEW, "inner_left > 0 ? inner_bytes : outer_bytes;", "inner_bytes;"),
        "few rows, the second half of the rows": Mutant(FEW_FINISH, "pass < kPasses; ++pass,", "pass < 1; ++pass,"),
        "few rows, the residual of the rows before": Mutant(
            FEW_FINISH, "pass == 0 ? own.more[0] :", "pass >= 0 ? own.more[0] :"
        ),
        "few rows, Snake of the cells before": Mutant(FEW, "        own.take_alpha(p, cell);\n", ""),
        "few rows, missing cp.async wait: rows": Mutant(FEW, "    cp_async_wait<0>();  // rows\n", ""),
        "few rows, dropped tail: the last half of the last chunk": Mutant(
            FEW, "all * kChunk > deep;", "all * kChunk >= deep;"
        ),
        "few rows, out of bounds, global memory: weights past the last channel": Mutant(
            FEW, " || chunk * kChunk + k >= deep) continue;", ") continue;"
        ),
        "few rows, out of bounds, global memory: rows past the clip's end": Mutant(
            FEW, "if (t >= 0 && t < own.steps) from", "if (t >= 0) from"
        ),
        "few rows, out of bounds, shared memory: a row too few": Mutant(
            FEW, "int64_t{slots(p, taps)} * (pitch(p)", "int64_t{slots(p, taps) - 1} * (pitch(p)"
        ),
    },
    "snake_upsample1d": {
        "weights that stay, missing barrier: multiplied before all rows are there": Mutant(
            RESIDENT, "        sync_part(group, 128);\n", ""
        ),
        "weights that stay, missing cp.async wait": Mutant(RESIDENT, "        cp_async_wait<kAhead - 1>();\n", ""),
        "weights that stay, sums are read early": Mutant(RESIDENT, "          wgmma_wait<0>();\n", "          ;\n"),
        "weights that stay, the other run's rows": Mutant(
            RESIDENT, "buffer * kRowBytes + shift[i]", "buffer * kRowBytes"
        ),
        "weights that stay, the row behind the tile": Mutant(
            RESIDENT, "if (kTileRows + own.row < count)", "if (false)"
        ),
        "weights that stay, the clip behind": Mutant(RESIDENT, "at >= row_tiles ? 1 : 0", "at > row_tiles ? 1 : 0"),
        "weights that stay, dropped tail: the last columns share a panel": Mutant(
            RESIDENT, "cell + tap * 4 : cell;", "cell : cell;"
        ),
        "weights that stay, out of bounds, global memory: past the clip's end": Mutant(
            RESIDENT, "kWhole || phase + half * down < at.there", "true"
        ),
        "weights that stay, outputs past the clip's length": Mutant(
            RESIDENT, "kWhole || phase + half * down < at.counting", "true"
        ),
        "a pair, the snaked rows are a row off": Mutant(
            FINISH,
            "reinterpret_cast<char*>(to) + p.snaked)",
            "reinterpret_cast<char*>(to) + (p.snaked != 0 ? p.snaked + p.y.stride_t * int64_t{sizeof(T)} : 0))",
        ),
        "a pair, no plain rows": Mutant(FINISH, "      if (p.snaked != 0) store(p, out, counts, to);\n", ""),
        "a pair, plain rows past the clip's length": Mutant(
            FINISH, "if (p.snaked != 0) store(p, out, counts, to);", "if (p.snaked != 0) store(p, out, true, to);"
        ),
        "a pair, snaked rows past the clip's length": Mutant(
            FINISH, "store(p, out, counts, snaked_of(p, to));", "store(p, out, true, snaked_of(p, to));"
        ),
        "a pair, few rows, no plain rows": Mutant(
            FEW_FINISH, "        if (p.snaked != 0) store(p, counts ? out : 0, both, to);\n", ""
        ),
        "a pair, few rows, snaked rows past the clip's length": Mutant(
            FEW_FINISH, "store(p, counts ? out : 0, both, snaked_of(p, to));", "store(p, out, both, snaked_of(p, to));"
        ),
        "a pair, few rows, Snake of what is not rounded": Mutant(
            FEW_FINISH, "snake_as<T>(value_of<T>(words, 0),", "snake_as<T>(values[0],"
        ),
        "weights that stay, out of bounds, shared memory: a buffer too few": Mutant(
            RESIDENT,
            "return kTogether * kUnitPanels * kPanelBytes + kGroups * kBuffers",
            "return kTogether * kUnitPanels * kPanelBytes + (kGroups * kBuffers - 1)",
        ),
    },
    "causal_dwconv1d": {
        "missing barrier: statistics of a row that is not there": Mutant(
            DWCONV, "      sync_threads();\n      take_statistics(", "      take_statistics("
        ),
        "missing barrier: statistics are read early": Mutant(
            DWCONV,
            "take_statistics(p, rows, statistics);\n      sync_threads();",
            "take_statistics(p, rows, statistics);",
        ),
        "missing barrier: the weights are not there": Mutant(
            DWCONV, "          cp_async_wait<0>();\n          sync_threads();", "          cp_async_wait<0>();"
        ),
        "missing barrier: weights are overwritten while read": Mutant(
            DWCONV, "          sync_threads();  // the pass before has read its weights\n", ""
        ),
        "out of bounds, shared memory: no place for the statistics": Mutant(
            DWCONV, "int64_t{p.row_pitch} + kStatistics + weights)", "int64_t{p.row_pitch} + weights)"
        ),
        "out of bounds, global memory: rows past the clip": Mutant(
            DWCONV, "at.active && i >= first && i < last, at.both", "at.active && i >= first, at.both"
        ),
        "wrong tap": Mutant(DWCONV, "late[k0 + u];", "late[k0 + u > 0 ? k0 + u - 1 : 0];"),
        "dropped tail: the weights past whole copies": Mutant(
            DWCONV, "i = whole + thread_index(); i < count;", "i = whole + thread_index(); i < whole;"
        ),
        "missing cp.async wait": Mutant(DWCONV, "          cp_async_wait<0>();\n", ""),
    },
    "stream_rows": {
        "rows that are not kept": Mutant(STREAM, "!p.kept[row] || ", ""),
        "a code out of range is passed over": Mutant(STREAM, "*p.error != kNoWrongCode)", "*p.error < 0)"),
        "the error is left as it is": Mutant(STREAM, "*p.error = kNoWrongCode", "*p.error += 0"),
        "the next run's block": Mutant(STREAM, "block >= p.runs[at + 1].block", "block > p.runs[at + 1].block"),
        "dropped tail: the last block of a run": Mutant(STREAM, "ceil_div(run.count, int64_t{K::kBlockUnits})", "1"),
        "out of bounds, global memory: past a run's end": Mutant(
            STREAM, "if (first + k * kThreads < run.count) values", "values"
        ),
    },
    "take_codes": {
        "a code below zero": Mutant(TAKE, "codes[k] < 0 || ", ""),
        "one entry too many": Mutant(TAKE, "codes[k] >= part.entries", "codes[k] > part.entries"),
        "the first part's entries": Mutant(TAKE, "codes[k] >= part.entries", "codes[k] >= p.parts[0].entries"),
        "the last code alone is looked at": Mutant(TAKE, "wrong |= ", "wrong = "),
        "rows without what is behind the frames": Mutant(TAKE, "row * part.to_frames", "row * frames"),
        "dropped tail: the last block": Mutant(
            TAKE, "ceil_div(all, int64_t{TakeCodes::kBlockCodes})", "all / TakeCodes::kBlockCodes"
        ),
        "out of bounds, global memory: past the last code": Mutant(TAKE, "if (i >= all) continue;", ""),
    },
}
CASES: dict[str, list[SimtCase]] = {
    "snake_conv1d": [
        conv_case(40, 72, steps=20, dilation=3, residual=True, wgmma=0),
        conv_case(160, 24, steps=3, batch=2, padding=(6, 0), multiprocessors=1000, wgmma=0),
        conv_case(72, 40, steps=70, dilation=3, residual=True, wgmma=1),
        conv_case(160, 24, steps=3, batch=40, padding=(6, 0), multiprocessors=3, wgmma=1),
        conv_case(328, 72, steps=70, multiprocessors=1000, wgmma=1, shared_bytes=227 << 10),
        conv_case(160, 136, steps=3, batch=40, padding=(6, 0), multiprocessors=30, wgmma=1, shared_bytes=227 << 10),
        conv_case(72, 24, steps=5, batch=2, dilation=3, residual=True, wgmma=1),
        conv_case(480, 19, steps=5, wgmma=1),
        conv_case(64, 16, taps=1, steps=40, residual=True, wgmma=1),
        conv_case(2120, 16, taps=1, steps=2, wgmma=1),
        conv_case(40, 24, taps=3, steps=20, dtype=F32),
        conv_case(40, 2, taps=3, steps=20),
        conv_case(48, 1, steps=200, batch=2, lengths=[200, 101], multiprocessors=1000, dtype=F32),
        conv_case(48, 1, steps=1300, batch=2, lengths=[1300, 1101], multiprocessors=1),
    ],
    "snake_upsample1d": [
        upsample_case(96, 48, 4, "transposed", (2, 2), steps=270, batch=2, lengths=[270, 70], shared_bytes=227 << 10),
        *(
            upsample_case(
                40, 24, 3, "transposed", (2, 1), steps=steps, batch=2, lengths=[steps, 4], shared_bytes=227 << 10
            ).with_(out_alpha=torch.linspace(0.2, 3, 24))
            for steps in (40, 9)
        ),
    ],
    "causal_dwconv1d": [
        dwconv_case(301, steps=11, batch=2, dtype=F32),
        dwconv_case(66, taps=31, steps=9, lengths=[7]),
        dwconv_case(150, taps=31, steps=9, dtype=F32, shared_bytes=14000),
    ],
}
CASES["stream_rows"] = [
    stream_rows_case([(0, 8, 16), (24, 32, 4968)], error=7),
    stream_rows_case([(3, 5, 1), (11, 0, 777)], kept=[1, 0, 1], error=NO_ERROR),
    stream_rows_case([(8, 0, 800)], kept=[1, 1, 1], error=7),
]
CASES["take_codes"] = [
    take_codes_case(width=24),
    take_codes_case(frames=24, wrong=(0, 1, 0, 3), value=-1),
    take_codes_case(frames=24, wrong=(1, 0, 6, 20), value=4096),
    take_codes_case(batch=8, frames=24, wrong=(1, 0, 0, 5), value=4096),
]
CONTROLS = {
    "snake_conv1d": CONV,
    "snake_upsample1d": RESIDENT,
    "causal_dwconv1d": DWCONV,
    "stream_rows": STREAM,
    "take_codes": TAKE,
}
NAMES = [(op, name) for op, mutants in MUTANTS.items() for name in mutants]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What the sources as they are make of the cases."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        op: simt_mutants.outputs(simt_cases.program(op), folder, [case.tensors for case in cases])
        for op, cases in CASES.items()
    }


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Path]]:
    made = {}
    for op, mutants in MUTANTS.items():
        control = {"control": Mutant(CONTROLS[op], "#pragma once", "#pragma once")}
        found = simt_mutants.build(op, control | mutants, tmp_path_factory.mktemp(op))
        made |= {(op, name): program for name, program in found.items()}
    yield made


@pytest.mark.parametrize("op", CASES)
def test_without_a_bug_the_cases_pass(
    op: str,
    programs: dict[tuple[str, str], Path],
    expected: dict[str, list[dict[str, torch.Tensor]]],
    tmp_path: Path,
) -> None:
    for case, made in zip(CASES[op], expected[op], strict=True):
        assert worst(made["y"], case.expected) <= TOLERANCE.get((op, made["y"].dtype), 0)
    tensors = [case.tensors for case in CASES[op]]
    assert simt_mutants.caught_by(programs[op, "control"], tmp_path, tensors, expected[op]) is None


@pytest.mark.parametrize(("op", "name"), NAMES, ids=[f"{op}, {name}" for op, name in NAMES])
def test_a_planted_bug_is_caught(
    op: str,
    name: str,
    programs: dict[tuple[str, str], Path],
    expected: dict[str, list[dict[str, torch.Tensor]]],
    tmp_path: Path,
) -> None:
    tensors = [case.tensors for case in CASES[op]]
    found = simt_mutants.caught_by(programs[op, name], tmp_path, tensors, expected[op])
    assert found is not None
    if "out of bounds" in name:
        assert "AddressSanitizer" in found, found


def test_a_mutant_needs_its_line_once(tmp_path: Path) -> None:
    for old in ("no such line", "sync_threads();"):
        with pytest.raises(ValueError, match=r"must hold .* once, got"):
            simt_mutants.plant(Mutant(CONV, old, ""), tmp_path)
