"""`python -m bench.gpu_runs --results FOLDER`: what is measured on a GPU, the goals first, in one process.

Each run leaves its JSON and Markdown as soon as it has a case. A run that leaves the GPU unusable ends the process
with 3; the runs that were begun stand in --begun, so that a second process goes on behind it.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import probes, run

_EAGER = "pypi-fp16,folded-bf16,recorded-bf16"
# What the goals speak of, and peers that need seconds; peers that are compiled, which takes minutes; the rest.
GOALS: dict[str, str] = {
    "decode-12hz_v1-b1": f"decode --dtype bfloat16 --peers {_EAGER}",
    "decode-12hz_v1-b32": f"decode --dtype bfloat16 --batch 32 --peers {_EAGER}",
    "decode-12hz_v1-frame-b1": "decode --dtype bfloat16 --seconds 0.08 --peers pypi-fp16,recorded-bf16",
    "decode-12hz_v1-frame-b32": "decode --dtype bfloat16 --seconds 0.08 --batch 32 --peers pypi-fp16,recorded-bf16",
    "stream-12hz_causal-b1": "stream --preset 12hz_causal --dtype bfloat16",
    "stream-12hz_causal-b32": "stream --preset 12hz_causal --dtype bfloat16 --batch 32",
    "encode-12hz_v1-b32": "encode --dtype bfloat16 --batch 32 --peers pypi-fp16,folded-bf16",
    "rvq_search-12hz_v1-2000": "ops --ops rvq_search --seconds 160 --backends cuda --peers eager",
}
TUNED_B1: dict[str, str] = {"decode-12hz_v1-b1-tuned": "decode --dtype bfloat16 --peers autotune-bf16"}
TUNED_B32: dict[str, str] = {"decode-12hz_v1-b32-tuned": "decode --dtype bfloat16 --batch 32 --peers autotune-bf16"}
REST: dict[str, str] = {
    "ops-12hz_v1-frame": "ops --dtype bfloat16 --seconds 0.08 --backends cuda --peers none",
    "ops-12hz_v1-b1": "ops --dtype bfloat16 --peers none",
    "decode-25hz_v1-b1": f"decode --preset 25hz_v1 --dtype bfloat16 --peers {_EAGER}",
    "decode-12hz_v1-b1-fp32": "decode --peers pypi,folded",
    "ops-12hz_v1-b8": "ops --dtype bfloat16 --batch 8 --peers none",
    "ops-12hz_v1-b1-fp32": "ops --peers eager",
    "ops-12hz_v1-frame-fp32": "ops --seconds 0.08 --peers none",
    "rvq_search-12hz_v1-2000-compiled": "ops --ops rvq_search --seconds 160 --peers compile",
}
GROUPS = {"goals": GOALS, "tuned-b1": TUNED_B1, "rest": REST, "tuned-b32": TUNED_B32}
RUNS: dict[str, str] = {name: words for group in GROUPS.values() for name, words in group.items()}


def _watch(name: str, limit_s: float | None) -> threading.Timer:
    """End the process where a run takes too long: one that waits for a GPU can't be ended otherwise."""

    def end() -> None:
        print(f"{name} took more than {limit_s} s", flush=True)
        os._exit(4)

    watch = threading.Timer(threading.TIMEOUT_MAX if limit_s is None else limit_s, end)
    watch.daemon = True
    watch.start()
    return watch


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_runs", description="The runs of make gpu-check.")
    parser.add_argument("--results", default="bench/results", help="folder for JSON and Markdown")
    parser.add_argument("--begun", help="a file of names to pass over; each run that begins is added to it")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--group", choices=tuple(GROUPS), help="some of the runs")
    parser.add_argument("--limit", type=float, help="seconds of a run; one that takes longer ends the process with 4")
    parser.add_argument("--more", default="", help="options for every run")
    args = parser.parse_args(argv)
    folder, begun = Path(args.results), Path(args.begun) if args.begun else None
    folder.mkdir(parents=True, exist_ok=True)
    passed = set(begun.read_text().split()) if begun is not None and begun.exists() else set()
    chosen = args.only.split(",") if args.only else GROUPS[args.group] if args.group else RUNS
    wanted = [name for name in chosen if name not in passed]
    probes.measure = functools.cache(probes.measure)  # once for all runs
    wrong = 0
    for name in wanted:
        if begun is not None:
            with begun.open("a") as file:
                file.write(name + "\n")
        page, data = (str(folder / f"{args.device}-{name}.{kind}") for kind in ("md", "json"))
        words = [*RUNS[name].split(), "--device", args.device]
        words += args.more.split() if words[0] != "stream" else []
        print(f"== {name}: python -m bench {' '.join(words)}", flush=True)
        begun_s, watch = time.monotonic(), _watch(name, args.limit)
        try:
            wrong |= run.main([*words, "--json", data, "--markdown", page])
            print(f"== {name}: {time.monotonic() - begun_s:.1f} s", flush=True)
            if args.device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except torch.AcceleratorError as error:  # every later call in this process would raise it too
            print(f"{name} left the GPU unusable: {error}", flush=True)
            return 3
        except (RuntimeError, ValueError) as error:
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
            wrong = 1
        finally:
            watch.cancel()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
