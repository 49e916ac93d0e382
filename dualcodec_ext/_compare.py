"""The rules of closeness: errors against float64, absolute tolerances, and codes with their margins."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def one_ulp(largest: float, dtype: torch.dtype) -> float:
    """Return the distance between neighbouring numbers of `dtype` at magnitude `largest`."""
    if largest == 0 or not math.isfinite(largest):
        return torch.finfo(dtype).tiny
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)))


@dataclass(frozen=True)
class ErrorReport:
    """Errors against float64: ours, the baseline's, and what was allowed."""

    rms: float
    worst: float
    baseline_rms: float
    baseline_worst: float
    allowed_rms: float
    allowed_worst: float
    at: tuple[int, ...]  # where ours is worst

    def __str__(self) -> str:
        return (
            f"rms {self.rms:.3g} (baseline {self.baseline_rms:.3g}, allowed {self.allowed_rms:.3g}), max"
            f" {self.worst:.3g} (baseline {self.baseline_worst:.3g}, allowed {self.allowed_worst:.3g})"
            f" at {self.at}"
        )


def _check_same_kind(actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"shape must be {list(expected.shape)}, got {list(actual.shape)}")
    wrong = (actual.isnan() != expected.isnan()).nonzero()
    if wrong.numel():
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"NaN must be where it is expected: {len(wrong)} differ, first at {at}: expected"
            f" {float(expected[at])}, got {float(actual[at])}"
        )


def assert_close_to_f64(
    actual: Tensor, reference_f64: Tensor, baseline: Tensor, factor: float = 2.0, fewest: int = 100_000
) -> ErrorReport:
    """Assert that an error against float64 is at most `factor` times plain PyTorch's, in RMS and in maximum.

    Args:
        actual: what is tested.
        reference_f64: the same in float64.
        baseline: the same from plain PyTorch in actual's dtype.
        factor: how much larger the error may be; one ulp of the largest output is always allowed.
        fewest: outputs needed for a maximum to mean something; fewer raise ValueError (`assert_close` is for
            those).

    Raises:
        AssertionError: too large an error, another shape, another dtype, or NaN in other places.
    """
    if reference_f64.dtype != torch.float64:
        raise ValueError(f"assert_close_to_f64: reference_f64 must be float64, got {reference_f64.dtype}")
    if actual.numel() < fewest:
        raise ValueError(f"assert_close_to_f64: actual must have at least {fewest} outputs, got {actual.numel()}")
    if actual.dtype != baseline.dtype:
        raise AssertionError(f"dtype must be the baseline's {baseline.dtype}, got {actual.dtype}")
    _check_same_kind(actual, reference_f64)
    _check_same_kind(baseline, reference_f64)
    ours = (actual.detach().double() - reference_f64).abs().nan_to_num(nan=0.0, posinf=math.inf)
    theirs = (baseline.detach().double() - reference_f64).abs().nan_to_num(nan=0.0, posinf=math.inf)
    floor = one_ulp(float(reference_f64.nan_to_num().abs().max()), actual.dtype)
    at = torch.unravel_index(ours.argmax(), ours.shape)
    report = ErrorReport(
        rms=float(ours.square().mean().sqrt()),
        worst=float(ours.max()),
        baseline_rms=float(theirs.square().mean().sqrt()),
        baseline_worst=float(theirs.max()),
        allowed_rms=max(factor * float(theirs.square().mean().sqrt()), floor),
        allowed_worst=max(factor * float(theirs.max()), floor),
        at=tuple(int(i) for i in at),
    )
    if not (report.rms <= report.allowed_rms and report.worst <= report.allowed_worst):
        raise AssertionError(f"error against float64 too large: {report}")
    return report


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Assert that no element differs by more than `tolerance`, and that NaN is where it is expected; returns
    the worst."""
    _check_same_kind(actual, expected)
    if actual.numel() == 0:
        return 0.0
    error = (actual.detach().double() - expected.detach().double()).abs()
    error = torch.where(actual.isnan() | (actual == expected), 0.0, error).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = float(error.max())
    if worst > tolerance:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"must be within {tolerance:.3g}: worst {worst:.3g} at {at}, expected {float(expected[at])}, got"
            f" {float(actual[at])}; {int((error > tolerance).sum())} of {error.numel()} are out"
        )
    return worst


@dataclass(frozen=True)
class CodeReport:
    """How two sets of codes [B, Q, F] compare."""

    total: int
    equal: int
    excused: int  # differ, and the reference's own margin is below the bound
    not_compared: int  # behind an excused code of the same frame, where the residual is another one

    def __str__(self) -> str:
        return (
            f"{self.equal} of {self.total} equal, {self.excused} below the margin bound, {self.not_compared}"
            " behind those"
        )


def compare_codes(codes: Tensor, expected: Tensor, margins: Tensor, bound: float | Tensor) -> CodeReport:
    """Assert that codes equal the reference's wherever its choice was clear.

    Args:
        codes: [B, Q, F], what is tested.
        expected: [B, Q, F], the reference's.
        margins: [B, Q, F], the reference's own.
        bound: a difference is excused where the margin is below it; a number or [B, Q, F].

    Returns:
        The counts.

    Raises:
        AssertionError: another shape, or a code that differs though its margin is not below the bound.
    """
    if codes.shape != expected.shape or margins.shape != expected.shape:
        raise AssertionError(
            f"codes and margins must be {list(expected.shape)}, got {list(codes.shape)} and {list(margins.shape)}"
        )
    differ = codes != expected
    behind = torch.cumsum(differ.int(), 1) - differ.int() > 0  # an earlier stage of the frame differs
    unclear = margins < bound
    first = differ & ~behind
    wrong = (first & ~unclear).nonzero()
    if wrong.numel():
        b, q, f = (int(i) for i in wrong[0])
        limit = float(bound[b, q, f]) if isinstance(bound, Tensor) else bound
        raise AssertionError(
            f"codes must be equal where the margin is clear: {len(wrong)} are not, first at batch {b},"
            f" stage {q}, frame {f}: expected {int(expected[b, q, f])}, got {int(codes[b, q, f])}, margin"
            f" {float(margins[b, q, f]):.3g}, bound {limit:.3g}"
        )
    return CodeReport(
        total=differ.numel(),
        equal=int((~differ & ~behind).sum()),
        excused=int(first.sum()),
        not_compared=int(behind.sum()),
    )
