"""`python -m bench.cpu_runs`: what the README quotes of a CPU, piece by piece, each in a process of its own.

Each piece leaves its JSON and Markdown in the folder; a piece that fails is told, and the others go on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_LIMIT_S = 600
_F32 = "pypi,reference,folded,folded2d,compile,frozen2d,ort1d,ort2d,openvino1d,openvino2d,zentorch2d"
_BF16 = "pypi,folded-bf16,folded2d-bf16,compile-bf16,frozen2d-bf16,openvino2d-bf16,zentorch2d-bf16"
# 25hz_v1 takes four times as long: the peers that are never the fastest stay out.
RUNS: dict[str, str] = {
    "decode-12hz_v1": f"decode --fast --rounds 7 --peers {_F32}",
    "decode-25hz_v1": "decode --preset 25hz_v1 --fast --rounds 5 --peers pypi,frozen2d,ort1d,openvino2d,zentorch2d",
    "decode-12hz_v1-bf16": f"decode --dtype bfloat16 --rounds 7 --peers {_BF16}",
    "decode-25hz_v1-bf16": "decode --preset 25hz_v1 --dtype bfloat16 --rounds 5"
    " --peers pypi,folded-bf16,frozen2d-bf16,openvino2d-bf16,zentorch2d-bf16",
    "encode-12hz_v1": "encode --rounds 7 --peers pypi,reference,frozen2d,ort2d,zentorch2d",
    "encode-25hz_v1": "encode --preset 25hz_v1 --rounds 5 --peers pypi,frozen2d,ort2d,zentorch2d",
    "decode-tiny": "decode --preset tiny --fast --rounds 9 --peers reference,folded,frozen2d",
    "rvq_search-12hz_v1": "ops --ops rvq_search --rounds 9 --peers all",
    "stream-12hz_causal": "stream --preset 12hz_causal",
    "stream-12hz_causal-16": "stream --preset 12hz_causal --batch 16",
    "inference-12hz_v1": "inference --rounds 5 --peers all",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_runs", description="The runs of make bench-cpu.")
    parser.add_argument("--results", default="bench/results", help="folder for JSON and Markdown")
    parser.add_argument("--only", help=f"some of {', '.join(RUNS)}, separated by commas")
    parser.add_argument("--kind", default="cpu", help="what the files' names begin with: avx2 where that is all")
    parser.add_argument("--more", default="", help="options for every run, such as --threads=2")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else list(RUNS)
    for name in wanted:
        if name not in RUNS:
            parser.error(f"--only must name some of {', '.join(RUNS)}, got {name}")
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in wanted:
        page, data = (str(folder / f"{args.kind}-{name}.{end}") for end in ("md", "json"))
        words = [*RUNS[name].split(), *args.more.split(), "--json", data, "--markdown", page]
        print(f"== {name}: python -m bench {' '.join(words)}", flush=True)
        start = time.monotonic()
        try:
            code = subprocess.run([sys.executable, "-m", "bench", *words], timeout=_LIMIT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
            print(f"{name} took more than {_LIMIT_S} s and was stopped", flush=True)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
        failed += [name] if code else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
