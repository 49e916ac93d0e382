"""Every op on a GPU, in each family of kernels, against its reference in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gpu
import opsuite as suite
import pytest
import test_rvq_lookup as lookup
import test_rvq_search as search
import torch
from gpu import DEVICE, by_dtype, families, gpu_alone, pairs
from gpu_cases import BUILDERS, CASE_OPS, MODULES, SIGNAL_OPS, in_dtype, typical
from opsuite import Case
from tolerances import TOLERANCE
from torch import Tensor

import dualcodec_ext as dx
from bench import registry
from bench.program import build_program
from dualcodec_ext import ops, testing
from dualcodec_ext.ops import packing

pytestmark = gpu.needs_device
HALF = torch.bfloat16
by_case_op = pytest.mark.parametrize("family, op", pairs(*CASE_OPS))
by_signal_op = pytest.mark.parametrize("family, op", pairs(*SIGNAL_OPS))
by_op = pytest.mark.parametrize("family, op", pairs(*MODULES))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with gpu.exact_float32():
        yield


# Forward


@by_dtype
@by_signal_op
def test_forward(family: str, op: str, dtype: torch.dtype) -> None:
    """The shapes that the CPU's kernels are tried with: every option, every odd size."""
    with dx.backend(family):
        for name, shape in MODULES[op].SHAPES.items():
            try:
                suite.check(BUILDERS[op](**shape).to(DEVICE), dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@by_dtype
@by_case_op
def test_several_tiles(family: str, op: str, dtype: torch.dtype) -> None:
    with dx.backend(family):
        suite.check(typical(op), dtype)
        suite.check(typical(op, batch=1, steps=1), dtype)


@by_dtype
@pytest.mark.parametrize("preset", ["12hz_v1", "25hz_v1", "12hz_stream"])
@by_op
def test_codec_shapes(family: str, op: str, preset: str, dtype: torch.dtype) -> None:
    """Every layer of a codec, packed and channels-last as the engine has it, at twice plain PyTorch's error."""
    model = gpu.preset_model(preset)
    rows = registry.rows(build_program(model.settings), model, 0.5, every=True, ops=(op,))
    wrong = []
    for row in {row.name: row.to(DEVICE) for row in rows}.values():
        found = registry.our_call(row, dtype, family)()
        verdict = registry.make_check(row, dtype)(found, dtype, ours=True)
        wrong += [] if verdict.ok else [f"{row.name}: {verdict}"]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("steps", suite.EDGE_STEPS)
@by_case_op
def test_edge_sizes(family: str, op: str, steps: int) -> None:
    with dx.backend(family):
        for dtype in (torch.float32, HALF):
            suite.check(typical(op, steps), dtype)
            assert typical(op, steps, batch=0).actual(dtype).shape[0] == 0


# Gradients


@by_case_op
def test_gradient(family: str, op: str) -> None:
    with dx.backend(family):
        suite.check_same_gradients(typical(op, 40))
        suite.check_frozen_weights(typical(op, 40))


# Layouts


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@by_case_op
def test_strides_slices_and_alignment(family: str, op: str, dtype: torch.dtype) -> None:
    odd = {"cin": 19} if op.startswith("snake") else {"channels": 19}
    with dx.backend(family):
        for case in (typical(op), typical(op, 50, **odd)):
            suite.check_layouts(case, dtype)
            expected = case.actual(dtype)
            for shift in (1, 2, 3):  # elements away from what a vector load needs
                room = torch.full((case.x.numel() + shift,), torch.nan, dtype=dtype, device=DEVICE)
                x = room[shift:].view(case.x.shape)
                x.copy_(case.x)
                assert torch.equal(in_dtype(replace(case, x=x), dtype).actual(dtype), expected), shift


# Lengths


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@by_case_op
def test_lengths(family: str, op: str, dtype: torch.dtype) -> None:
    with dx.backend(family):
        case = typical(op, 150, batch=5)
        suite.check_lengths(case, [150, 0, 1, 37, 64], dtype)
        own = torch.tensor([150, 0, 1, 37, 64])
        cases = [replace(case, lengths=lengths).actual(dtype) for lengths in (own, own.to(DEVICE))]
        assert torch.equal(*cases), "lengths on the CPU and on the device"


# NaN


@by_case_op
def test_nan_reaches_its_samples_alone(family: str, op: str) -> None:
    with dx.backend(family):
        for dtype in (torch.float32, HALF):
            case = typical(op)
            case.x[1, 5, 77] = torch.nan
            suite.check(case, dtype)


# Errors


def error_cases() -> list[Any]:
    """The wrong calls of each op's own test file, without those that no backend takes for its dtype."""
    found = []
    for op, module in MODULES.items():
        marks = [m for m in module.test_errors.pytestmark if m.name == "parametrize"]
        for change, text in marks[0].args[1]:
            name, value = next(iter(change.items()))
            if name in ("x", "z") and isinstance(value, Tensor) and not value.is_floating_point():
                continue
            if name == "packed":
                text = "packed must be"
            found += [pytest.param(f, op, change, text, id=f"{f}-{op}-{name}") for f in families(op)]
    return found


@pytest.mark.parametrize("family, op, change, text", error_cases())
def test_errors(family: str, op: str, change: dict[str, Any], text: str) -> None:
    if op == "rvq_lookup":
        codes, weights, _ = lookup.make()
        arguments = {"codes": codes, **weights}
    elif op == "rvq_search":
        made = search.make()
        arguments = {"z": made.z, **made.weights}
    else:
        case = BUILDERS[op]()
        arguments = {"x": case.x, **case.weights, **case.options}
    # Lengths stay on the CPU: values that lie on a GPU are not read back.
    change = {k: v if k == "lengths" else suite.moved(v, DEVICE) for k, v in change.items()}
    with dx.backend(family), pytest.raises(ValueError, match=f"{op}: .*({text})") as raised:
        getattr(ops, op)(**{**suite.moved(arguments, DEVICE), **change})
    assert "\n" not in str(raised.value)


@gpu_alone
@by_case_op
def test_float64_is_refused_by_name_and_served_by_the_reference(family: str, op: str) -> None:
    case = typical(op, 40)
    with dx.backend(family), pytest.raises((dx.BackendError, ValueError), match=r"float64|Double") as raised:
        case.call(case.op, torch.float64)
    assert "\n" not in str(raised.value)
    with torch.no_grad():
        assert torch.equal(case.call(case.op, torch.float64), case.call(case.ref, torch.float64))


@by_case_op
def test_auto_is_one_of_the_families(family: str, op: str) -> None:
    case = typical(op)
    results = []
    for name in families(op):
        with dx.backend(name):
            results.append(case.actual())
    assert any(torch.equal(case.actual(), result) for result in results)


# torch's own rules


def schema_args(op: str, case: Any) -> tuple[Any, ...]:
    """The arguments of the registered op, in its schema's order."""
    lengths = torch.tensor([case.x.shape[-1], 9], device=DEVICE)
    w, o = list(case.weights.values()), case.options
    if op == "causal_dwconv1d":
        return (case.x, *w[:2], [6, 0], *w[2:], 1e-6, lengths)
    if op == "residual_unit":
        return (case.x, *w, 3, [9, 9], False, lengths, None)
    if op == "snake_conv1d":
        return (case.x, *w, 1, 1, [3, 3], "none", None, lengths, None)
    if op == "snake_upsample1d":
        return (case.x, *w, o["stride"], o["mode"], list(o["padding"]), lengths, None)
    return (o["codes"], *w, case.x, lengths, False, None)


@by_case_op
def test_opcheck(family: str, op: str) -> None:
    args = schema_args(op, typical(op, 40))
    grad = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    suite.check_opcheck(op, *grad, namespace=gpu.namespace(family))


@by_case_op
def test_compiles(family: str, op: str) -> None:
    with dx.backend(family):
        suite.check_compiles(typical(op))


# Determinism


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@by_case_op
def test_repeats_and_batches_have_the_same_bits(family: str, op: str, dtype: torch.dtype) -> None:
    with dx.backend(family):
        for steps in (1, 40, 700):
            case = typical(op, steps, batch=4)
            first = case.actual(dtype)
            assert all(torch.equal(case.actual(dtype), first) for _ in range(5))
            suite.check_alone(case, dtype)


@gpu_alone
@by_op
def test_runs_on_the_current_stream(family: str, op: str) -> None:
    """Its input is written late on a side stream: a kernel on another one would read NaN."""
    with dx.backend(family):
        call, x = call_of(op)
        expected = call(x)
        late, side = torch.full_like(x, torch.nan), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            found = call(late)
        side.synchronize()
    assert torch.equal(found, expected)


@gpu_alone
@by_op
def test_a_graph_has_the_eager_bits(family: str, op: str) -> None:
    with dx.backend(family):
        call, x = call_of(op)
        expected = call(x)
        held = torch.zeros_like(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(held)
    held.copy_(x)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@gpu_alone
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@by_case_op
def test_another_device_index(family: str, op: str) -> None:
    case = typical(op)
    with dx.backend(family):
        there = case.to("cuda:1").actual()
        assert there.device == torch.device("cuda:1") and torch.equal(there.to(DEVICE), case.actual())


def call_of(op: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """An op as a function of its signal alone; rvq_search's sum, which hangs on its codes. Packed, as in an engine."""
    q = search.make(channels=200, frames=330, stages=7, entries=50).to(DEVICE)
    packed = packing.pack_rvq(**q.weights)
    if op == "rvq_search":
        return lambda z: q.search(z, return_quantized=True, packed=packed)[1], q.z  # type: ignore[return-value]
    case = typical(op)
    if op == "rvq_lookup":
        tables = {name: q.weights[name] for name in case.weights}
        case = replace(case, weights=tables, options={**case.options, "packed": packed})

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return case.call(case.op, x=x)

    return call, case.x


def test_calls_of_a_signal_alone() -> None:
    for op in MODULES:
        call, x = call_of(op)
        assert torch.equal(call(x), call(x.clone()))


# Precision flags


@by_case_op
def test_tf32_only_where_it_is_allowed(family: str, op: str) -> None:
    case = typical(op)
    with dx.backend(family):
        suite.check(case)
        exact = case.actual()
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            testing.assert_close(case.actual().cpu(), case.expected(), 2 * TOLERANCE[op, torch.float16])
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        assert torch.equal(case.actual(), exact)


# Packed weights


def packed_case(op: str, case: Case) -> Case:
    w, o = dict(case.weights), dict(case.options)
    if op == "snake_conv1d":
        names, o["packed"] = ("weight",), packing.pack_conv1d(w["weight"])
    elif op == "snake_upsample1d":
        names = ("weight",)
        o["packed"] = packing.pack_upsample1d(w["weight"], o["stride"], o["mode"], o["padding"])
    else:
        names, o["packed"] = ("weight1", "weight2"), packing.pack_residual_unit(w["weight1"], w["weight2"])
    w |= {name: torch.zeros(1, dtype=w[name].dtype, device=DEVICE).expand(w[name].shape) for name in names}
    return replace(case, weights=w, options=o)


@by_dtype
@pytest.mark.parametrize("family, op", pairs("residual_unit", "snake_conv1d", "snake_upsample1d"))
def test_packed_gives_the_same_bits(family: str, op: str, dtype: torch.dtype) -> None:
    case = in_dtype(typical(op), dtype)
    with dx.backend(family):
        assert torch.equal(packed_case(op, case).actual(dtype), case.actual(dtype))


@pytest.mark.parametrize("channels", [32, 48, 64, 96, 128, 192, 384])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_residual_unit_hands_a_snake_on(channels: int, dtype: torch.dtype) -> None:
    """Bit for bit the next convolution's own."""
    alpha = torch.linspace(0.2, 3, channels, device=DEVICE)
    taps = torch.eye(channels, device=DEVICE, dtype=dtype)[..., None]
    for steps in (40, 5000):
        made = in_dtype(BUILDERS["residual_unit"](channels, steps).to(DEVICE), dtype)
        for x in (made.x, made.x.transpose(1, 2).contiguous().transpose(1, 2)):
            with dx.backend("cuda"):
                y = ops.residual_unit(x, **made.weights, **made.options)
                handed = ops.residual_unit(x, **made.weights, **made.options, out_alpha=alpha)
                assert torch.equal(handed, ops.snake_conv1d(y, taps, None, alpha))


@gpu_alone
@pytest.mark.parametrize("channels", [200, 384, 768])
@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_pairs_have_the_bits_of_each(channels: int, dtype: torch.dtype) -> None:
    """An upsampling and a unit, whose second result the unit behind takes for what its own first Snake makes."""
    alpha = torch.linspace(0.2, 3, channels, device=DEVICE)
    upsample = in_dtype(BUILDERS["snake_upsample1d"](256, channels, stride=2, steps=1000).to(DEVICE), dtype)
    unit = in_dtype(BUILDERS["residual_unit"](channels, 5, dilation=3).to(DEVICE), dtype)
    behind = {**unit.weights, "alpha1": alpha}
    for steps in (8, 30, 1000):  # rows: few, a small tile's, many
        x = upsample.x[:, :, :steps].transpose(1, 2).contiguous().transpose(1, 2)
        for lengths in (None, torch.tensor([steps, steps // 2], device=DEVICE)):
            y = ops.snake_upsample1d(x, **upsample.weights, **upsample.options, lengths=lengths)
            pair = ops.snake_upsample1d_pair(
                x, **upsample.weights, **upsample.options, lengths=lengths, out_alpha=alpha
            )
            options = {"dilation": 3, "lengths": None if lengths is None else 2 * lengths}
            assert torch.equal(pair[0], y)
            z = ops.residual_unit(y, **behind, **options)
            assert torch.equal(ops.residual_unit(y, **behind, **options, snaked=pair[1]), z)
            handed = ops.residual_unit(y, **behind, **options, out_alpha=alpha)
            for snaked in (None, pair[1]):
                again = ops.residual_unit_pair(y, **behind, **options, out_alpha=alpha, snaked=snaked)
                assert torch.equal(again[0], z) and torch.equal(again[1], handed)


@gpu_alone
def test_a_unit_of_one_kernel_takes_no_pair() -> None:
    made = in_dtype(BUILDERS["residual_unit"](96, 50).to(DEVICE), HALF)
    with pytest.raises(ValueError, match=r"residual_unit: snaked must be None where one kernel .* got \[2, 96, 50\]"):
        ops.residual_unit(made.x, **made.weights, snaked=made.x)
    with pytest.raises(ValueError, match=r"residual_unit_pair: x must be float32 or have more than 192 channels, got"):
        ops.residual_unit_pair(made.x, **made.weights, out_alpha=made.weights["alpha1"])
    wide = in_dtype(BUILDERS["residual_unit"](200, 50).to(DEVICE), HALF)
    for snaked, text in ((wide.x[..., 1:], r"must be as x = \[2, 200, 50\]"), (wide.x.float(), "must be BFloat16")):
        with pytest.raises(ValueError, match=f"residual_unit: snaked {text}"):
            ops.residual_unit(wide.x, **wide.weights, snaked=snaked)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize(("channels", "stride", "steps"), [(384, 6, 2_200), (192, 5, 10_300), (96, 4, 38_500)])
def test_an_upsampling_of_many_rows_has_the_bits_of_few(channels: int, stride: int, steps: int, cut: bool) -> None:
    """On Hopper weights that stay in shared memory take the many; a stretch is left to tiles that bring theirs."""
    made = BUILDERS["snake_upsample1d"](channels, channels // 2, stride=stride, steps=steps).to(DEVICE)
    made = in_dtype(made, HALF)
    x = made.x.transpose(1, 2).contiguous().transpose(1, 2)
    lengths = torch.tensor([steps, steps - 1000], device=DEVICE) if cut else None
    weights = {**made.weights, "alpha": None}
    with dx.backend(DEVICE):
        whole = ops.snake_upsample1d(x, **weights, **made.options, lengths=lengths)
        for begin in (0, 700, steps - 1200):
            part = ops.snake_upsample1d(x[:, :, begin : begin + 150].contiguous(), **weights, **made.options)
            inside = slice(4 * stride, 146 * stride)
            assert torch.equal(whole[:, :, begin * stride :][:, :, inside], part[:, :, inside])
    if cut:
        assert not whole[1, :, (steps - 998) * stride :].any()
