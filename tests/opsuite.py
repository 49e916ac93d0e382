"""What every op's test file does in the same way: run a case on the op and on its reference, and compare."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tolerances import TOLERANCE
from torch import Tensor

from dualcodec_ext import build, testing

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EDGE_STEPS = [0, 1, 2, 6, 7, 63, 1000]


@dataclass
class Case:
    """One call: the op, its reference, the signal first among the tensors, and the other arguments by name."""

    op: Callable[..., Any]
    ref: Callable[..., Any]
    x: Tensor
    weights: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    lengths: Tensor | None = None

    @property
    def name(self) -> str:
        return self.op.__name__

    def to(self, device: str) -> Case:
        return moved(self, device)

    def call(self, f: Callable[..., Any], dtype: torch.dtype | None = None, x: Tensor | None = None) -> Any:
        cast = (lambda t: t) if dtype is None else (lambda t: None if t is None else t.to(dtype))
        weights = {k: cast(v) for k, v in self.weights.items()}
        return f(cast(self.x if x is None else x), **weights, **self.options, lengths=self.lengths)

    def actual(self, dtype: torch.dtype = torch.float32) -> Tensor:
        with testing.poisoned_memory(), torch.no_grad():
            return self.call(self.op, dtype)

    def expected(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """In float64, of the values that the dtype holds."""
        rounded = replace(
            self.to("cpu"),
            x=self.x.cpu().to(dtype).double(),
            weights={k: None if v is None else v.cpu().to(dtype).double() for k, v in self.weights.items()},
        )
        return rounded.call(self.ref)


def moved(value: Any, device: str) -> Any:
    """A case, or tensors in dicts, lists and tuples, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Case):
        names = ("x", "weights", "options", "lengths")
        return replace(value, **{name: moved(getattr(value, name), device) for name in names})
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    return type(value)(moved(v, device) for v in value) if isinstance(value, list | tuple) else value


def check(case: Case, dtype: torch.dtype = torch.float32) -> float:
    actual, expected = case.actual(dtype).cpu(), case.expected(dtype)
    assert actual.dtype == dtype
    return testing.assert_close(actual, expected, TOLERANCE[case.name, dtype])


def check_2x(case: Case, dtype: torch.dtype) -> None:
    """The project's rule: at most twice plain PyTorch's error in the same dtype."""
    with torch.no_grad():
        baseline = case.call(case.ref, dtype)
    testing.assert_close_to_f64(case.actual(dtype).cpu(), case.expected(dtype), baseline.cpu())


def check_layouts(case: Case, dtype: torch.dtype = torch.float32) -> None:
    expected = case.actual(dtype)
    if dtype != torch.float32:
        weights = {k: None if v is None else v.to(dtype) for k, v in case.weights.items()}
        case = replace(case, x=case.x.to(dtype), weights=weights)
    for name, x in testing.strided_copies(case.x).items():
        with torch.no_grad():
            y = case.call(case.op, x=x)
        assert torch.equal(y, expected), name
        if x.stride(1) == 1 and x.shape[1] > 1:
            assert y.stride(1) == 1, f"{name}: channels-last in must be channels-last out"
        else:
            assert y.is_contiguous(), f"{name}: must be contiguous"


def check_gradients(case: Case) -> None:
    """Gradcheck in float64, and the same gradients as the reference in float32."""
    names = [k for k, v in case.weights.items() if v is not None]

    def of(f: Callable[..., Any], x: Tensor, *values: Tensor) -> Tensor:
        weights = {**case.weights, **dict(zip(names, values, strict=True))}
        return f(x, **weights, **case.options, lengths=case.lengths)

    doubles = [t.double().requires_grad_() for t in [case.x, *[case.weights[n] for n in names]]]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(functools.partial(of, case.op), doubles, fast_mode=True)
    assert torch.autograd.gradgradcheck(functools.partial(of, case.op), doubles, fast_mode=True)
    check_same_gradients(case)


def check_same_gradients(case: Case) -> None:
    """The reference's gradients, in float32."""
    names = [k for k, v in case.weights.items() if v is not None]
    grads = []
    for f in (case.op, case.ref):
        leaves = [t.clone().requires_grad_() for t in [case.x, *[case.weights[n] for n in names]]]  # type: ignore[union-attr]
        weights = {**case.weights, **dict(zip(names, leaves[1:], strict=True))}
        y = f(leaves[0], **weights, **case.options, lengths=case.lengths)
        y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape))
        grads.append([t.grad for t in leaves])
    for name, ours, theirs in zip(["x", *names], *grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def check_frozen_weights(case: Case) -> None:
    """Only what asks for a gradient gets one."""
    x = case.x.clone().requires_grad_()
    case.call(case.op, x=x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def check_mixed_gradients(case: Case) -> None:
    """A half-precision signal on float32 weights: gradients in each one's dtype, taken in float32."""
    x = case.x.bfloat16().requires_grad_()
    weights = {k: None if v is None else v.clone().requires_grad_() for k, v in case.weights.items()}
    y = case.op(x, **weights, **case.options, lengths=case.lengths)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    wide = x.detach().float().requires_grad_()
    same = {k: None if v is None else v.detach().clone().requires_grad_() for k, v in weights.items()}
    case.ref(wide, **same, **case.options, lengths=case.lengths).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad, wide.grad.bfloat16())  # type: ignore[union-attr]
    for name, weight in weights.items():
        if weight is not None:
            torch.testing.assert_close(weight.grad, same[name].grad, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[union-attr]


def check_lengths(case: Case, lengths: list[int], dtype: torch.dtype = torch.float32) -> None:
    """A padded batch gives each item, bit for bit, what it gets alone, and zeros behind it; padding may hold NaN."""
    values = torch.tensor(lengths, device=case.x.device)
    padded = replace(case, x=testing.poison_past_lengths(case.x, values), lengths=values)
    y = padded.actual(dtype)
    for i, n in enumerate(lengths):
        options = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in case.options.items()}
        if options.get("residual") is not None:
            options["residual"] = options["residual"][
                ...,
                : replace(case, x=case.x[i : i + 1, :, :n], options={**options, "residual": None})
                .actual(dtype)
                .shape[-1],
            ]
        alone = replace(case, x=case.x[i : i + 1, :, :n], options=options).actual(dtype)
        own = alone.shape[-1]
        assert torch.equal(y[i : i + 1, ..., :own], alone), f"item {i} of length {n}"
        assert not y[i, ..., own:].any(), f"item {i}: samples past {own} must be zero"
    assert not y.isnan().any()


def check_threads(case: Case, dtype: torch.dtype = torch.float32) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.actual(dtype))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def check_alone(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Every item of a batch has the bits that it has alone."""
    whole = case.actual(dtype)
    for i in range(case.x.shape[0]):
        options = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in case.options.items()}
        assert torch.equal(replace(case, x=case.x[i : i + 1], options=options).actual(dtype), whole[i : i + 1])


def check_few_rows(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """A batch of clips of a few steps: split by columns while it is small, by time when not, with the same bits."""
    small = replace(case, x=case.x[:2])
    check_threads(small, dtype)
    check_alone(small, dtype)
    assert torch.equal(case.actual(dtype)[:2], small.actual(dtype))
    expected = small.expected(dtype)
    testing.assert_close(small.actual(dtype).cpu(), expected, TOLERANCE[case.name, dtype])


def check_compiles(case: Case) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: case.op(x, **w, **case.options, lengths=case.lengths),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        assert torch.equal(compiled(case.x, case.weights), case.call(case.op))


def check_compiles_dynamic(case: Case, steps: tuple[int, ...] = (40, 3, 0, 1, 9, 2)) -> None:
    """One traced function over any length; where nothing comes out, the fake must know it."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: case.op(x, **case.weights, **case.options) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with torch.no_grad():
        for n in steps:
            for x in (case.x[..., :n].contiguous(), case.x[..., :n].transpose(1, 2).contiguous().transpose(1, 2)):
                y, expected = compiled(x), case.call(case.op, x=x) * 2
                assert torch.equal(y, expected) and y.stride() == expected.stride(), n


def check_opcheck(op: str, *args: Any, namespace: str = "dualcodec_ext") -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), op).default, args, test_utils=tests)


def instruction_sets() -> list[Any]:
    """The sets as parameters; those that this machine lacks are skipped with the reason."""
    module = build.load_module()
    features = module.cpu_features() if module is not None else {}
    return [
        pytest.param(name, marks=pytest.mark.skipif(not facts["detected"], reason=f"this CPU has no {name}"))
        for name, facts in features.items()
        if facts["compiled"]
    ]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    module = build.load_module()
    assert module is not None
    before = module.active_isa()
    assert module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)


def must_have_module() -> None:
    """The suite tests compiled code: without it nothing here would be tested, so that is a failure and not a skip."""
    if os.environ.get("DUALCODEC_EXT_BACKEND", "auto") in ("auto", "cpu"):
        assert build.load_module() is not None, build.unavailable_reason()


must_have_module()
