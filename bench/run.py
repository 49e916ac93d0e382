"""The command line: `python -m bench decode|encode|ops|inference`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import long, lookahead, machine, probes, registry, report, serve, stream, windows
from .correctness import CodesCheck, WaveCheck
from .measure import Case, Side, Timing, describe, measure_case
from .ours import codec_call, missing_module, require_module
from .peers.base import Peer, Task
from .peers.catalog import CODEC_PEERS, select
from .program import build_program
from .speech import inference_case
from .workload import decode_check, encode_check, load_settings, make_task, seeded

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BACKENDS = {"cpu": ("cpu", "auto"), "cuda": ("cuda", "triton", "auto")}
SCHEMA = 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure dualcodec_ext beside what users would pick."
    )
    parser.add_argument("what", choices=("decode", "encode", "ops", "inference"))
    parser.add_argument("--preset", default="12hz_v1", help="one or several, separated by commas (12hz_v1)")
    parser.add_argument("--config", help="a JSON file with the settings of a codec, instead of a preset")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio (10); less than a frame is one frame")
    parser.add_argument("--batch", type=int, default=1, help="clips of that length at once (1)")
    parser.add_argument("--threads", type=int, help="cores to use (all that this process may)")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--peers", default="all", help="all, none, or names separated by commas")
    parser.add_argument("--rounds", type=int, help="samples per side (9; ops 15, inference 5; on a GPU 7)")
    parser.add_argument("--ops", default=",".join(registry.OPS), help="for ops: which, separated by commas")
    parser.add_argument("--every", action="store_true", help="for ops: every layer, equal shapes and all dilations too")
    parser.add_argument("--fast", action="store_true", help="for decode: also accelerate(fast=True)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--backends",
        help="ours by backend: for ops each of several (cpu; on a GPU cuda,triton), else one (the device's)",
    )
    parser.add_argument("--json", metavar="F", help="write everything, all samples included")
    parser.add_argument("--markdown", metavar="F", help="write the tables as Markdown")
    parser.add_argument("--list", action="store_true", help="list the peers and what they need, and stop")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error(f"--seconds must be positive, got {args.seconds}")
    for name in ("threads", "rounds", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.what == "inference" and (args.device, args.dtype, args.batch) != ("cpu", "float32", 1):
        parser.error("inference is measured on the CPU, in float32 and with bfloat16 features, one clip")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU and a CUDA build of torch")
    everything = "cuda,triton" if args.device == "cuda" and args.what == "ops" else args.device
    args.backends = tuple(name.strip() for name in (args.backends or everything).split(","))
    for name in args.backends:
        if name not in _BACKENDS[args.device]:
            known = ", ".join(_BACKENDS[args.device])
            parser.error(f"--backends must name some of {known} on {args.device}, got {name}")
    if args.what != "ops" and len(args.backends) > 1:
        parser.error(f"--backends must name one for {args.what}, got {','.join(args.backends)}")
    args.threads = args.threads or _cores()
    args.rounds = args.rounds or (7 if args.device == "cuda" else {"ops": 15, "inference": 5}.get(args.what, 9))
    args.ops = tuple(name.strip() for name in args.ops.split(","))
    for name in args.ops:
        if name not in registry.OPS:
            parser.error(f"--ops must name some of {', '.join(registry.OPS)}, got {name}")
    try:
        args.chosen = choose_peers(args)
        presets = [None] if args.config else args.preset.split(",")
        args.models = [load_settings(name or "", args.config) for name in presets]
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return args


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_peers(args: argparse.Namespace) -> list[Any]:
    """Codec peers, or for ops the providers, that --peers names."""
    if args.what == "inference":
        if args.peers not in ("all", "none", "pypi"):
            raise ValueError(f"--peers must be all, none or pypi for inference, got {args.peers}")
        return []
    if args.what != "ops":
        return list(select(args.peers, _DTYPES[args.dtype], device=args.device))
    known = {p.name: p for p in registry.PROVIDERS}
    if args.peers in ("all", "none"):
        return list(known.values()) if args.peers == "all" else []
    for name in args.peers.split(","):
        if name not in known:
            raise ValueError(f"--peers must name some of {', '.join(known)}, or be all or none, got {name}")
    return [known[name] for name in args.peers.split(",")]


def codec_case(args: argparse.Namespace, name: str, settings: dict[str, Any]) -> tuple[Case, list[Side]]:
    """Decode or encode of a whole clip."""
    dtype = _DTYPES[args.dtype]
    task = make_task(args.what, settings, args.seconds, args.threads, args.device, args.batch, family=args.backends[0])
    program = task.program
    frames = program.frames(args.seconds)
    decode = args.what == "decode"
    every = args.batch * frames
    samples = every * program.hop_samples
    weights = program.decode_weights() if decode else program.encode_weights()
    check: WaveCheck | CodesCheck = decode_check(task, dtype) if decode else encode_check(task)
    case = Case(
        name=f"{args.what} {name}" + (f" B={args.batch}" if args.batch > 1 else ""),
        flops=program.decode_flops(every) if decode else program.encode_flops(every),
        touched_bytes=lambda kind: float((weights + samples) * kind.itemsize),
        audio_s=samples / program.sample_rate_hz,
        frames=every,
        check=check,
        facts={"model": name, "batch": args.batch, "item_frames": frames},
    )
    build: Callable[..., Any] = partial(codec_call, task, dtype)
    sides = [Side("dualcodec_ext", "ours", dtype, partial(build, fast=False), ours=True)]
    if args.fast and decode:
        sides.append(
            Side("dualcodec_ext fast", "ours, Winograd", dtype, partial(build, fast=True), ours=True, fast=True)
        )
    return case, sides + [_codec_side(peer, task) for peer in args.chosen]


def _codec_side(peer: Peer, task: Task) -> Side:
    return Side(peer.name, peer.what, peer.dtype, lambda: peer.build(task))


def op_cases(args: argparse.Namespace, name: str, settings: dict[str, Any]) -> Iterator[tuple[Case, list[Side]]]:
    """Every op at the shapes that the model gives it."""
    dtype = _DTYPES[args.dtype]
    program, model = build_program(settings), seeded(settings)
    made = registry.rows(program, model, args.seconds, every=args.every, ops=args.ops, batch=args.batch)
    for row in (row.to(args.device) for row in made):
        facts = {"model": name, "batch": args.batch, "op": row.op, "where": row.where, "steps": row.steps}
        case = Case(
            name=f"{name} {row.name}",
            flops=row.flops,
            touched_bytes=row.touched_bytes,
            audio_s=row.frames * program.hop_samples / program.sample_rate_hz,
            frames=row.frames,
            check=registry.make_check(row, dtype),
            facts=facts,
        )
        sides = [
            Side(
                f"dualcodec_ext {family}",
                "ours",
                dtype,
                partial(_our_op, row, dtype, family),
                ours=True,
                counts=_search_counts if row.op == "rvq_search" and family == "cpu" else None,
            )
            for family in args.backends
            if registry.has_kernels(row.op, family)
        ]
        if len(sides) == 1:
            sides = [replace(sides[0], name="dualcodec_ext")]
        if registry.has_fast_form(row, dtype, args.backends[0]):
            build = partial(_our_op, row, dtype, "cpu", fast=True)
            sides.append(Side("dualcodec_ext fast", "ours, Winograd", dtype, build, ours=True, fast=True))
        sides += [
            Side(p.name, p.what, dtype, partial(p.build, row, dtype)) for p in args.chosen if _fits(p.name, row.op)
        ]
        yield case, sides


def _search_counts() -> dict[str, int]:
    """What rvq_search has counted since the last call."""
    from dualcodec_ext import ops

    return ops.rvq_search_stats(reset=True)._asdict()


def _fits(provider: str, op: str) -> bool:
    return provider != "faiss" or op == "rvq_search"


def _our_op(row: registry.Row, dtype: torch.dtype, family: str, fast: bool = False) -> Callable[[], object]:
    if family != "triton":
        require_module()
    return registry.our_call(row, dtype, family, fast)


def _ceilings(args: argparse.Namespace) -> dict[torch.dtype, probes.Ceilings]:
    if args.what == "inference":
        return {dtype: probes.measure(args.threads, dtype, args.device) for dtype in (torch.float32, torch.bfloat16)}
    dtypes = {_DTYPES[args.dtype]} | ({p.dtype for p in args.chosen} if args.what != "ops" else set())
    ordered = sorted(dtypes, key=lambda d: d != _DTYPES[args.dtype])
    return {dtype: probes.measure(args.threads, dtype, args.device) for dtype in ordered}


def _limits(
    args: argparse.Namespace, ceilings: dict[torch.dtype, probes.Ceilings]
) -> dict[torch.dtype, probes.Products]:
    if args.device != "cpu" or args.what == "ops":
        return {}
    return {dtype: probes.products(args.threads, dtype, found) for dtype, found in ceilings.items()}


def _timing(args: argparse.Namespace) -> Timing:
    per_op = args.what == "ops"
    if args.device == "cpu":
        return Timing(args.rounds, min_sample_s=0.005 if per_op else 0.0, memory=not per_op)
    # Nothing spins between samples there, and the second call of a shape records a graph.
    span = 0.0 if per_op else 0.02
    return Timing(args.rounds, 3, span, settle_s=0.0, memory=True, device=args.device, record=per_op)


def _write(args: argparse.Namespace, run: dict[str, Any]) -> None:
    """After every case: a run that is cut short leaves what it has."""
    if args.json:
        Path(args.json).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        Path(args.markdown).write_text(report.markdown(run), encoding="utf-8")


def list_peers() -> None:
    for peer in (*CODEC_PEERS, *registry.PROVIDERS):
        kind = "ops" if isinstance(peer, registry.Provider) else "codec"
        needs = f" (needs {', '.join(peer.packages)})" if peer.packages else ""
        print(f"{kind:<6} {peer.name:<16} {peer.what}{needs}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        argv: the arguments after `python -m bench`; None: of this process.

    Returns:
        0, or 1 where a side of ours was wrong, failed, or could not run. A wrong argument exits with 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    apart = {
        "stream": stream.main,
        "serve": serve.main,
        "long": long.main,
        "lookahead": lookahead.main,
        "windows": windows.main,
    }
    if argv[:1] and argv[0] in apart:
        return apart[argv[0]](argv[1:])
    args = parse(argv)
    if args.list:
        list_peers()
        return 0
    torch.set_num_threads(args.threads)
    ceilings = _ceilings(args)
    limits = _limits(args, ceilings)
    commit, dirty = machine.commit()
    run: dict[str, Any] = {
        "schema": SCHEMA,
        "command": "python -m bench " + shlex.join(argv),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "what": args.what,
        "seconds": args.seconds,
        "batch": args.batch,
        "backends": args.backends,
        "threads": args.threads,
        "dtype": args.dtype,
        "device": args.device,
        "rounds": args.rounds,
        "machine": machine.describe(args.device),
        "commit": commit,
        "dirty": dirty,
        "compiled_module": missing_module() or "present",
        "ceilings": {str(k).removeprefix("torch."): v.to_dict() for k, v in ceilings.items()},
        "cases": [],
    }
    for line in report.header_lines(run):
        print(line)
    if missing := missing_module():
        print(f"The compiled module is missing, so nothing of ours is measured: {missing}")
    print(flush=True)
    ours_ok = True
    per_op = args.what == "ops"
    timing = _timing(args)
    for name, settings in args.models:
        if args.what == "inference":
            cases = iter([inference_case(settings, name, args.seconds, args.peers)])
        else:
            cases = op_cases(args, name, settings) if per_op else iter([codec_case(args, name, settings)])
        for case, sides in cases:
            outcomes = measure_case(case, sides, timing, limits)
            # --fast needs float32 on a CPU; where it has neither that is said, and is not a failure.
            ours_ok &= all(
                o.status == "timed" or (o.side.fast and o.status == "unavailable") for o in outcomes if o.side.ours
            )
            run["cases"].append(describe(case, outcomes, ceilings))
            print("\n".join(report.table_lines(run["cases"][-1], per_op)), end="\n\n", flush=True)
            _write(args, run)
    print(report.LEGEND)
    _write(args, run)
    if not ours_ok:
        print("Ours was wrong, failed, or could not run: see its lines above.", file=sys.stderr)
    return 0 if ours_ok else 1
