"""`python -m bench.gpu_kernels --json FILE`: how long a replayed call takes on a GPU, and its kernels.

Random weights in bfloat16; of 12hz_v1 `d32` is a decode of 32 x 10 s, `e` encodes without the semantic model, `f`
decodes one frame; `s` is a step of StreamingDecoder, of 12hz_causal. Kernels come up before the one in front has ended
and wait for it, so that their times (`us`) hold some waiting and add up to more than the call; `later_us`, how much
later each ends than all in front, adds up to it. Nothing is compared with peers here: `python -m bench` does that.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dualcodec_ext as dx

from .machine import commit
from .ours import require_module

CALLS = {"d1": (1, 125), "d32": (32, 125), "f1": (1, 1), "f32": (32, 1), "e1": (1, 125), "e32": (32, 125)}
CALLS |= {"s1": (1, 1), "s32": (32, 1)}
_REPEATS, _SAMPLES = 8, 5


def kernels(events: Sequence[Mapping[str, Any]], calls: int) -> list[dict[str, Any]]:
    """The kernels of one call, in order, from the profiler's trace of several; close ones of one name and grid are
    one row."""
    ran = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    found: list[dict[str, Any]] = []
    own = ran[len(ran) - len(ran) // calls :]
    ended = own[0]["ts"] if own else 0.0
    for event in own:
        name = re.sub(r"\(.*", "", event["name"].replace("void ", "").replace("dcx::", ""))
        end = event["ts"] + event["dur"]
        later, ended = max(0.0, end - ended), max(ended, end)
        row = {"kernel": name, "grid": event["args"]["grid"], "count": 1, "us": event["dur"], "later_us": later}
        same = next((r for r in found[-3:] if (r["kernel"], r["grid"]) == (row["kernel"], row["grid"])), None)
        if same is None:
            found.append(row)
        else:
            same["count"] += 1
            same["us"] += row["us"]
            same["later_us"] += row["later_us"]
    return found


def _call(model: dx.DualCodec, config: dx.DualCodecConfig, name: str) -> Callable[[], object]:
    batch, frames = CALLS[name]
    cuda = {"device": "cuda"}
    if name[0] != "e":
        semantic = torch.randint(config.semantic_codebook_size, (batch, 1, frames), **cuda)
        acoustic = torch.randint(config.codebook_size, (batch, config.n_codebooks, frames), **cuda)
        if name[0] == "s":
            decoder = dx.StreamingDecoder(model, batch)
            return lambda: decoder.step(semantic, acoustic)
        return lambda: model.decode_from_codes(semantic, acoustic)
    audio = 0.1 * torch.randn(batch, 1, frames * config.hop_length, dtype=torch.bfloat16, **cuda)
    features = torch.randn(batch, config.semantic_dim, frames, dtype=torch.bfloat16, **cuda)
    return lambda: model.encode(audio, semantic_repr=features)


def measure(model: dx.DualCodec, config: dx.DualCodecConfig, name: str) -> dict[str, Any]:
    """Best and median milliseconds of a replayed call, and its kernels."""
    call, samples = _call(model, config, name), []
    for _ in range(4):
        call()
    torch.cuda.synchronize()
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        for _ in range(_REPEATS):
            call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / _REPEATS * 1e3)
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {"best_ms": min(samples), "median_ms": sorted(samples)[_SAMPLES // 2], "kernels": kernels(events, 3)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kernels", description="A call's kernels on a GPU.")
    parser.add_argument("--calls", default=",".join(CALLS), help="some of " + ",".join(CALLS))
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    names = args.calls.split(",")
    for name in names:
        if name not in CALLS:
            parser.error(f"--calls must name some of {', '.join(CALLS)}, got {name}")
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU")
    require_module()

    @functools.cache
    def model(preset: str) -> dx.DualCodec:
        reference = dx.reference.DualCodec(**dx.DualCodecConfig.preset(preset).to_dict()).cuda().eval()
        return dx.accelerate(reference, dtype=torch.bfloat16)

    run = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit()[0],
        "calls": {},
    }
    with torch.inference_mode(), dx.backend("cuda"):
        for name in names:
            preset = "12hz_causal" if name[0] == "s" else "12hz_v1"
            run["calls"][name] = found = measure(model(preset), dx.DualCodecConfig.preset(preset), name)
            print(f"{name}: {found['median_ms']:.3f} ms, best {found['best_ms']:.3f} ms")
            for row in found["kernels"]:
                each, later = (row[what] / row["count"] for what in ("us", "later_us"))
                print(f"  {row['count']:3d} x {each:9.1f} us, {later:7.1f} later  {row['grid']} {row['kernel']}")
    if args.json:
        Path(args.json).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
