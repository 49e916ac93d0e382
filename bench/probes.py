"""What this machine can do at best, measured in the same run: small-matrix GEMM rate and copy and read
bandwidth."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .correctness import exact_math
from .gpu_timing import repeated

# The k=7 convolution of a residual unit as one GEMM, [rows x 7C] times [7C x C], on a tile of rows that stays
# in L2. 70 % # of a decode's FLOPs are of this shape, and these are its channels.
_CPU_ROWS = 256
_CPU_WIDTHS = (48, 96, 192, 384)
_CUDA_SQUARES = (4096, 8192)
_CUDA_ROWS = 1 << 16
_CUDA_COPY_BYTES = (1 << 24, 1 << 30)  # within a GPU's L2 and far beyond it
_COPY_BYTES = (1 << 20, 1 << 24, 1 << 28)


@dataclass(frozen=True)
class Ceilings:
    """Rates are of all threads together."""

    gemm_gflops: float  # harmonic mean over the codec's widths of the fastest kernel at each: the direct limit
    gemm_peak_gflops: float  # the fastest kernel at its best width
    gemm_by_kernel: dict[str, float]
    copy_gbs: dict[int, float]  # buffer bytes -> bytes read and written per second / 1e9
    read_gbs: float

    def copy_for(self, touched_bytes: float) -> float:
        """The copy rate of the smallest probed buffer pair that a working set fits in, so that one that lives
        in cache is held against the cache."""
        for size in sorted(self.copy_gbs):
            if touched_bytes <= 2 * size:
                return self.copy_gbs[size]
        return self.copy_gbs[max(self.copy_gbs)]

    def limit_s(self, flops: float, touched_bytes: float, gemm_gflops: float | None = None) -> float:
        """The shortest time for a direct computation: arithmetic, at this rate or another, and traffic overlap in
        full."""
        rate = gemm_gflops or self.gemm_gflops
        return max(flops / (rate * 1e9), touched_bytes / (self.copy_for(touched_bytes) * 1e9))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"copy_gbs": {str(k): v for k, v in self.copy_gbs.items()}}


def _rate(work: Callable[[], float], threads: int, seconds: float) -> float:
    """Work units per second of `threads` Python threads that each call `work` (which returns its units) over
    and over.

    Each thread runs its own GEMMs on one core: what a tiled kernel does, and free of a library's threading
    overhead.
    """
    units = [0.0] * threads
    spans = [0.0] * threads
    gate = threading.Barrier(threads)

    def run(i: int) -> None:
        torch.set_num_threads(1)  # per thread where torch runs on OpenMP
        with torch.inference_mode():
            work()
            gate.wait()
            start = time.perf_counter()
            while (span := time.perf_counter() - start) < seconds:
                units[i] += work()
            spans[i] = span

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(u / max(s, 1e-9) for u, s in zip(units, spans, strict=True))


def _gemm_kernels(width: int, dtype: torch.dtype, loops: int = 8) -> dict[str, Callable[[], Callable[[], float]]]:
    """The GEMMs that can be had for one width; which is the fastest depends on the processor and the
    dtype."""
    generator = torch.Generator().manual_seed(0)
    depth = 7 * width
    flops = 2.0 * _CPU_ROWS * depth * width * loops

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def mm() -> Callable[[], float]:
        a, b, c = made(_CPU_ROWS, depth), made(depth, width), torch.empty(_CPU_ROWS, width, dtype=dtype)

        def work() -> float:
            for _ in range(loops):
                torch.mm(a, b, out=c)
            return flops

        return work

    def onednn_linear() -> Callable[[], float]:
        a = made(_CPU_ROWS, depth)
        packed = torch.ops.mkldnn._reorder_linear_weight(made(width, depth), _CPU_ROWS)

        def work() -> float:
            for _ in range(loops):
                torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
            return flops

        return work

    def own_conv() -> Callable[[], float]:
        from dualcodec_ext import ops

        weight = made(width, width, 7)
        packed = torch.ops.dualcodec_ext.pack_conv1d(weight)
        a = made(1, _CPU_ROWS, width).transpose(1, 2)

        def work() -> float:
            for _ in range(loops):
                ops.snake_conv1d(a, weight, padding=(3, 3), packed=packed)
            return flops

        return work

    return {"mm": mm, "onednn_linear": onednn_linear, "own_conv": own_conv}


def _gemm_rates(threads: int, dtype: torch.dtype, seconds: float) -> dict[str, dict[int, float]]:
    """GFLOP/s per kernel and width."""
    rates: dict[str, dict[int, float]] = {}
    for width in _CPU_WIDTHS:
        for name, make in _gemm_kernels(width, dtype).items():
            try:
                make()()
            except (RuntimeError, AttributeError, ImportError, TypeError):
                continue  # a kernel that this build lacks
            works = threading.local()

            def work(make: Callable[[], Callable[[], float]] = make, works: Any = works) -> float:
                # Each thread multiplies its own matrices, so that they sit in its own core's cache.
                if not hasattr(works, "call"):
                    works.call = make()
                return works.call()

            rates.setdefault(name, {})[width] = _rate(work, threads, seconds) / 1e9
    return rates


@dataclass(frozen=True)
class Products:
    """The direct limit's products as a call that is timed in turn with the sides, since a shared machine's rate is
    rarely the same for a minute."""

    call: Callable[[], object]
    flops: float  # of one call


def products(threads: int, dtype: torch.dtype, ceilings: Ceilings, seconds: float = 0.25) -> Products:
    """Make a call of products at the codec's widths, by the kernel that `ceilings` found the fastest at each.

    Args:
        threads: that share them; whoever is done with one takes the next.
        dtype: of the operands.
        ceilings: what `measure` found on the CPU.
        seconds: that a call is to take at the rate of `ceilings`.

    Returns:
        The call, with the same FLOPs at every width: its rate is the harmonic mean that `gemm_gflops` is.
    """
    rates = ceilings.gemm_by_kernel

    def fastest(width: int) -> str:
        known = (name for name in _gemm_kernels(width, dtype) if f"{name} C={width}" in rates)
        return max(known, key=lambda name: rates[f"{name} C={width}"], default="mm")

    kernels = [_gemm_kernels(width, dtype, loops=1)[fastest(width)] for width in _CPU_WIDTHS]
    share = ceilings.gemm_gflops * 1e9 * seconds / len(_CPU_WIDTHS)
    each = [2.0 * _CPU_ROWS * 7 * width * width for width in _CPU_WIDTHS]
    items = [index for index, flops in enumerate(each) for _ in range(max(threads, round(share / flops)))]
    items.reverse()  # the longest ones first, so that threads end together
    pool, there, own = ThreadPoolExecutor(threads), threading.Barrier(threads), threading.local()

    def start(_: int) -> None:
        torch.set_num_threads(1)  # per thread where torch runs on OpenMP
        there.wait()  # so that every thread of the pool comes by
        with torch.inference_mode():
            own.calls = [make() for make in kernels]

    before = torch.get_num_threads()
    list(pool.map(start, range(threads)))
    torch.set_num_threads(before)  # for threads that are started later

    def run(taken: itertools.count[int]) -> float:
        done = 0.0
        with torch.inference_mode():
            while (item := next(taken)) < len(items):
                done += own.calls[items[item]]()
        return done

    def call() -> float:
        return sum(pool.map(run, [itertools.count()] * threads))

    return Products(call, sum(each[index] for index in items))


def _copy_rate(size: int, threads: int, seconds: float) -> float:
    """Bytes read plus bytes written per second; the buffers together are `size` on either side, split over
    the threads."""
    works = threading.local()

    def work() -> float:
        if not hasattr(works, "pair"):
            count = size // threads // 4
            works.pair = torch.ones(count), torch.ones(count)
        source, target = works.pair
        loops = max(1, (1 << 22) // source.nbytes)
        for _ in range(loops):
            target.copy_(source)
        return 2.0 * source.nbytes * loops

    return _rate(work, threads, seconds) / 1e9


def _read_rate(size: int, threads: int, seconds: float) -> float:
    works = threading.local()

    def work() -> float:
        if not hasattr(works, "source"):
            works.source = torch.ones(size // threads // 4)
        works.source.sum()
        return float(works.source.nbytes)

    return _rate(work, threads, seconds) / 1e9


def _device_rate(work: Callable[[], float], device: str, seconds: float) -> float:
    """Work units per second / 1e9, from a recording on a GPU, where a small call would be bound by its launch."""
    call = repeated(work, device, *(() if device != "cpu" else (lambda once, count: once,)))
    each = work() * call.calls
    call()
    units, start = 0.0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or not units:
        call()
        units += each
    return units / spent / 1e9


def _measure_device(
    dtype: torch.dtype,
    device: str,
    seconds: float,
    squares: tuple[int, ...] = _CUDA_SQUARES,
    rows: int = _CUDA_ROWS,
    copies: tuple[int, ...] = _CUDA_COPY_BYTES,
) -> Ceilings:
    """The direct limit is the rate of large square products; those of the codec's widths stand beside it."""
    rates: dict[str, float] = {}
    shapes = [(f"mm {n}x{n}x{n}", n, n, n) for n in squares]
    shapes += [(f"mm {rows}x{7 * c}x{c}", rows, 7 * c, c) for c in _CPU_WIDTHS]
    for name, m, k, n in shapes:
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(k, n, device=device).to(dtype)

        def gemm(a: torch.Tensor = a, b: torch.Tensor = b) -> float:
            torch.mm(a, b)
            return 2.0 * a.shape[0] * b.shape[0] * b.shape[1]

        with exact_math():
            rates[name] = _device_rate(gemm, device, seconds)
    copied, read_gbs = {}, 0.0
    for size in copies:
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)

        def copy(source: torch.Tensor = source, target: torch.Tensor = target) -> float:
            target.copy_(source)
            return 2.0 * source.nbytes

        def read(source: torch.Tensor = source) -> float:
            source.sum()
            return float(source.nbytes)

        copied[size] = _device_rate(copy, device, seconds)
        read_gbs = _device_rate(read, device, seconds)  # of the largest, which comes last
    peak = max(rates.values())
    return Ceilings(peak, peak, rates, copied, read_gbs)


def measure(threads: int, dtype: torch.dtype, device: str = "cpu", seconds: float = 0.15) -> Ceilings:
    """Measure the ceilings.

    Args:
        threads: cores to use at once.
        dtype: of the GEMM's operands.
        device: "cpu" or "cuda".
        seconds: spent on each of about 16 probes.

    Returns:
        The best rate of each kind.
    """
    if device != "cpu":
        return _measure_device(dtype, device, seconds / 3)  # nothing else runs there
    before = torch.get_num_threads()
    try:
        rates = _gemm_rates(threads, dtype, seconds)
        copied = {size: _copy_rate(size, threads, seconds) for size in _COPY_BYTES}
        read = _read_rate(_COPY_BYTES[-1], threads, seconds)
    finally:
        torch.set_num_threads(before)
    best = [max(found[width] for found in rates.values() if width in found) for width in _CPU_WIDTHS]
    named = {f"{name} C={width}": rate for name, found in rates.items() for width, rate in found.items()}
    return Ceilings(statistics.harmonic_mean(best), max(best), named, copied, read)
