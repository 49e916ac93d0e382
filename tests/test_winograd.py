"""residual_unit's Winograd forms, and the exact and the fast decode that run on them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import opsuite as suite
import pytest
import torch
from test_model import decoded, inputs, tiny
from test_residual_unit import case
from tolerances import TOLERANCE
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import ops, testing
from dualcodec_ext.engine import Engine
from dualcodec_ext.forms import Form, unit_outputs
from dualcodec_ext.ops import packing
from dualcodec_ext.steps import ResidualUnitStep, UpsampleStep

FORMS = (10, 13, 22)
SHAPES = {
    "C=32": {"channels": 32, "steps": 77},
    "C=48, dilation 9": {"channels": 48, "steps": 300, "dilation": 9},
    "C=64, causal": {"channels": 64, "steps": 50, "dilation": 3, "causal": True},
    "C=96, causal, dilation 9": {"channels": 96, "steps": 41, "dilation": 9, "causal": True},
    "C=192": {"channels": 192, "steps": 61, "dilation": 3},
    "C=384": {"channels": 384, "steps": 40, "batch": 1},
    "odd channels": {"channels": 17, "dilation": 2},
    "no padding": {"channels": 33, "padding": (0, 0), "bias": False},
    "lopsided padding": {"padding": (10, 1), "dilation": 2},
}


def check(made: suite.Case, winograd: int, dtype: torch.dtype = torch.float32) -> float:
    made.options["winograd"] = winograd
    return testing.assert_close(
        made.actual(dtype), expected(made, dtype), TOLERANCE[f"residual_unit, {winograd} products", dtype]
    )


def expected(made: suite.Case, dtype: torch.dtype = torch.float32) -> Tensor:
    direct = {k: v for k, v in made.options.items() if k != "winograd"}
    return replace(made, options=direct).expected(dtype)


@pytest.mark.parametrize("winograd", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_forward(shape: dict[str, Any], isa: str, winograd: int) -> None:
    with suite.instruction_set(isa):
        check(case(**shape), winograd)


@pytest.mark.parametrize("winograd", FORMS)
@pytest.mark.parametrize(
    "channels, steps, dilation", [(768, 140, 1), (384, 300, 9), (192, 600, 3), (96, 1100, 9), (48, 2100, 9)]
)
def test_decoder_shapes(channels: int, steps: int, dilation: int, winograd: int) -> None:
    check(case(channels, steps, batch=1, dilation=dilation), winograd)


@pytest.mark.parametrize("channels", [32, 48, 56, 64, 96, 128, 192, 256, 384, 768, 1008])
@pytest.mark.parametrize("dilation, causal", [(1, False), (9, True)])
def test_thirteen_products_keep_the_exact_rule_with_room(channels: int, dilation: int, causal: bool) -> None:
    """At most twice plain PyTorch's error is allowed. The RMS is steady; the largest of 100,000 errors is a draw."""
    made = case(channels, -(-100_000 // channels), batch=1, dilation=dilation, causal=causal)
    with torch.no_grad():
        baseline = made.call(made.ref)
    made.options["winograd"] = 13
    report = testing.assert_close_to_f64(made.actual(), expected(made), baseline)
    assert report.rms <= 1.75 * report.baseline_rms


@pytest.mark.parametrize("channels", [16, 32, 48, 96, 192, 384])
def test_points_on_the_circle_keep_the_error_low(channels: int) -> None:
    """22 products: well below the 5 times plain PyTorch's error that 10 products have."""
    made = case(channels, -(-100_000 // channels), batch=1, dilation=3)
    with torch.no_grad():
        baseline = made.call(made.ref).double()
    made.options["winograd"] = 22
    wanted = expected(made)
    rms = [float((y.double() - wanted).square().mean().sqrt()) for y in (made.actual(), baseline)]
    assert rms[0] <= 2.75 * rms[1]


@pytest.mark.parametrize("winograd", FORMS)
def test_far_arguments_of_the_second_snake(winograd: int) -> None:
    """Beyond |alpha x| = 1e4 the sine is libm's, in the rows of the group alone that has such a value."""
    made = case(32, 200, dilation=3, winograd=winograd)
    made.weights["alpha2"] = torch.full((32,), 3e5)
    error = (made.actual().double() - expected(made)).abs().max()
    near = made.actual()
    made.x[0, :, 100] *= 1e3
    far = made.actual()
    assert float(error) < 1e-3 and bool(far.isfinite().all()) and not torch.equal(near, far)


@pytest.mark.parametrize("winograd", FORMS)
@pytest.mark.parametrize("isa", suite.instruction_sets())
def test_float64(isa: str, winograd: int) -> None:
    """Rounding apart, the forms are the convolution itself."""
    with suite.instruction_set(isa):
        check(case(33, dilation=3), winograd, torch.float64)


@pytest.mark.parametrize("winograd", FORMS)
@pytest.mark.parametrize("tap", range(7))
def test_a_wrong_tap_is_seen(tap: int, winograd: int) -> None:
    made = case(16)
    wrong = made.weights["weight1"].clone()  # type: ignore[union-attr]
    wrong[3, 5, tap] += 0.05
    made.options["winograd"] = winograd
    other = replace(made, weights={**made.weights, "weight1": wrong})
    with pytest.raises(AssertionError):
        testing.assert_close(
            made.actual(), expected(other), TOLERANCE[f"residual_unit, {winograd} products", torch.float32]
        )


@pytest.mark.parametrize("winograd", FORMS)
def test_packed_gives_the_same_bits_and_reads_the_shapes_alone(winograd: int) -> None:
    made = case(30, winograd=winograd)
    weights = dict(made.weights)
    packed = packing.pack_residual_unit(weights["weight1"], weights["weight2"], winograd)
    assert packed.numel() == (winograd + 1) * 30 * 32
    for name in ("weight1", "weight2"):
        weights[name] = torch.zeros(1).expand(weights[name].shape)
    assert torch.equal(ops.residual_unit(made.x, **weights, packed=packed, winograd=winograd), made.actual())


@pytest.mark.parametrize("winograd", FORMS)
def test_strides_and_slices(winograd: int) -> None:
    suite.check_layouts(case(19, dilation=3, winograd=winograd))
    suite.check_layouts(case(32, dilation=3, winograd=winograd))  # rows that need no tile


@pytest.mark.parametrize("winograd", FORMS)
@pytest.mark.parametrize("steps", suite.EDGE_STEPS)
def test_edge_sizes(steps: int, winograd: int) -> None:
    check(case(steps=steps, dilation=9), winograd)
    check(case(16, steps=steps, causal=True), winograd)
    check(case(steps=steps, padding=(0, 0)), winograd)
    check(case(steps=steps, batch=0), winograd)


@pytest.mark.parametrize("winograd", FORMS)
def test_lengths(winograd: int) -> None:
    suite.check_lengths(case(20, batch=4, dilation=3, winograd=winograd), [40, 0, 1, 17])
    suite.check_lengths(case(16, batch=8, causal=True, winograd=winograd), [40, 8, 3, 0, 1, 2, 39, 4])
    last = case(48, 700, batch=8, dilation=9, winograd=winograd)
    last.x = last.x.transpose(1, 2).contiguous().transpose(1, 2)
    suite.check_lengths(last, [700, 36, 35, 37, 0, 1, 699, 360])


@pytest.mark.parametrize("winograd", FORMS)
def test_determinism(winograd: int) -> None:
    big = case(96, 5000, dilation=9, winograd=winograd)
    suite.check_threads(big)
    suite.check_alone(big)


@pytest.mark.parametrize("winograd", FORMS)
@pytest.mark.parametrize("dilation", [1, 9])
def test_few_rows_have_the_bits_of_many(dilation: int, winograd: int) -> None:
    """A call of at most 64 rows over all clips is split by columns, a longer one by time."""
    clips = case(100, 50, batch=3, dilation=dilation, winograd=winograd)
    suite.check_alone(clips)
    suite.check_threads(replace(clips, x=clips.x[:1]))
    short = case(100, 2, batch=70, dilation=dilation, winograd=winograd)  # whose first 30 clips are few rows
    assert torch.equal(replace(short, x=short.x[:30]).actual(), short.actual()[:30])
    suite.check_lengths(case(40, 12, batch=4, dilation=dilation, causal=True, winograd=winograd), [12, 0, 5, 1])


@pytest.mark.parametrize("winograd", FORMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pieces", [[36, 72, 288, 0, 304], [612, 88]], ids=str)
def test_a_cut_between_groups_gives_the_same_bits(pieces: list[int], causal: bool, winograd: int) -> None:
    whole = case(48, 700, dilation=3, causal=causal, padding=(18, 0), winograd=winograd)
    parts, context = [], torch.zeros(2, 48, 18)
    for piece in whole.x.split(pieces, dim=-1):
        x = torch.cat([context, piece], dim=-1)
        options = {"dilation": 3, "causal": causal, "padding": (0, 0), "winograd": winograd}
        parts.append(ops.residual_unit(x, **whole.weights, **options))
        context = x[..., -18:]
    assert torch.equal(torch.cat(parts, -1), whole.actual())


@pytest.mark.parametrize("winograd", FORMS)
def test_nan_reaches_every_sample_that_it_should(winograd: int) -> None:
    made = case(steps=120, dilation=3, winograd=winograd)
    made.x[1, 2, 30] = torch.nan
    y = made.actual()
    assert y[1][:, [30 + 3 * k for k in range(-3, 4)]].isnan().all() and not y[0].isnan().any()
    size = 3 * unit_outputs(winograd)
    groups = [t for t in range(120) if abs(t // size - 30 // size) > 1]  # one holds it, the ones beside may read it
    assert groups and not y[1][:, groups].isnan().any()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"winograd": 4}, r"winograd must be 0 \(direct\), 10, 13 or 22, got 4"),
        ({"winograd": 10.0}, "winograd must be an integer, got 10.0"),
        ({"winograd": 10, "packed": torch.zeros(640)}, "packed must be a contiguous Float tensor of 880 elements"),
        ({"winograd": 10, "x": torch.zeros(2, 5, 40).bfloat16()}, "winograd must be 0 unless x is float32 or float64"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "".join(v),
)
def test_errors(change: dict[str, Any], text: str) -> None:
    made = case()
    with pytest.raises(ValueError, match="residual_unit: " + text) as raised:
        ops.residual_unit(**{"x": made.x, **made.weights, **change})
    assert "\n" not in str(raised.value)


def test_pack_errors() -> None:
    made = case()
    with pytest.raises(ValueError, match=r"pack_residual_unit: winograd must be 0 \(direct\), 10, 13 or 22, got 3"):
        packing.pack_residual_unit(made.weights["weight1"], made.weights["weight2"], 3)


def test_gradient_is_the_direct_one() -> None:
    made, found = case(3, 15), []
    for winograd in (0, 10):
        x = made.x.clone().requires_grad_()
        ops.residual_unit(x, **made.weights, winograd=winograd).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    packed = packing.pack_residual_unit(made.weights["weight1"], made.weights["weight2"], 10)
    with pytest.raises(RuntimeError, match="residual_unit: packed must be None when the input needs a gradient"):
        ops.residual_unit(made.x.clone().requires_grad_(), **made.weights, packed=packed, winograd=10)


def test_opcheck() -> None:
    made = case(steps=20)
    w = [t.detach() for t in made.weights.values()]  # type: ignore[union-attr]
    packed = packing.pack_residual_unit(w[1], w[4], 13)
    suite.check_opcheck("residual_unit", made.x, *w, 1, [3, 3], False, torch.tensor([20, 9]), packed, 13)
    suite.check_opcheck("pack_residual_unit", w[1], w[4], 10)


@pytest.mark.parametrize("winograd", FORMS)
def test_compiles(winograd: int) -> None:
    suite.check_compiles(case(dilation=3, winograd=winograd))
    suite.check_compiles_dynamic(case(padding=(1, 0), winograd=winograd))


def test_the_reference_backend_takes_no_notice() -> None:
    made = case(winograd=10)
    with dx.backend("reference"), torch.no_grad():
        y = made.call(ops.residual_unit)
        assert torch.equal(y, replace(made, options={}).call(ops.residual_unit))


# Decoders -------------------------------------------------------------------------------------------------------------


def forms_of(model: dx.reference.DualCodec) -> dict[Form, Engine]:
    forms: tuple[Form, ...] = ("direct", "exact", "fast")
    return {form: Engine(model, torch.float32, form=form) for form in forms}


@pytest.mark.parametrize(
    "preset, changes",
    [("12hz_v1", {}), ("25hz_v1", {}), ("12hz_causal", {}), ("12hz_lookahead", {"decoder_dim": 256})],
    ids=["12hz_v1", "25hz_v1", "12hz_causal", "narrow"],
)
def test_decoders_are_within_their_errors(preset: str, changes: dict[str, Any]) -> None:
    """Exact: at most twice plain PyTorch's error; fast: 1e-4 of full scale. Weights: 1.6 times the direct ones."""
    model = testing.seeded_model({**dx.DualCodecConfig.preset(preset).to_dict(), **changes})
    generator, frames = torch.Generator().manual_seed(0), -(-100_000 // model.dac.hop_length) + 1
    semantic, acoustic = (torch.randint(n, (1, q, frames), generator=generator) for n, q in ((16384, 1), (1024, 7)))
    engines = forms_of(model)
    with torch.inference_mode():
        found = {form: engine.decode_clips(semantic, acoustic, None) for form, engine in engines.items()}
        plain = model.decode_from_codes(semantic, acoustic)
        wanted = model.double().decode_from_codes(semantic, acoustic)
    assert not any(torch.equal(found["exact"], found[form]) for form in ("direct", "fast")), "each form must have run"
    for form in ("direct", "exact"):
        testing.assert_close_to_f64(found[form], wanted, plain)
    assert float((found["fast"] - wanted).abs().max()) <= 1e-4
    for form in ("exact", "fast"):
        assert 1 < engines[form].weight_bytes() / engines["direct"].weight_bytes() <= 1.6


def test_codes_do_not_depend_on_the_form() -> None:
    model, exact = tiny(decoder_dim=64)
    audio, feat = inputs(model, 30)
    codes = exact.encode(audio, semantic_repr=feat)
    for engine in forms_of(model).values():
        found = engine.encode_clips(audio, feat, None, None, None)
        assert all(torch.equal(a, b) for a, b in zip(codes, found, strict=True))


def test_which_form_a_layer_takes() -> None:
    model, _ = tiny(decoder_dim=64)  # residual units of 32, 16 and 8 channels

    def products(engine: Engine) -> list[int]:
        return [step.winograd for step in engine._decoder if isinstance(step, ResidualUnitStep | UpsampleStep)]

    found = {form: products(engine) for form, engine in forms_of(model).items()}
    assert found == {
        "direct": [0] * 12,
        "exact": [4, 13, 13, 13, 0, 0, 0, 0, 0, 0, 0, 0],
        "fast": [4, 22, 22, 22, 4, 22, 22, 22, 0, 0, 0, 0],
    }
    assert products(Engine(model, torch.float32)) == found["exact"]
    assert products(Engine(model, torch.float32, fast=True)) == found["fast"]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert products(Engine(model, dtype)) == found["direct"]
    encoder = Engine(model, torch.float32)._acoustic_encoder
    assert not any(step.winograd for step in encoder if isinstance(step, ResidualUnitStep))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_decode_has_the_same_bits_in_a_batch(fast: bool, causal: bool) -> None:
    model, _ = tiny(decoder_dim=64, causal_decoder=causal)
    ours = dx.accelerate(model, fast=fast)
    semantic = torch.randint(8, (3, 1, 50), generator=torch.Generator().manual_seed(1))
    acoustic = semantic.expand(-1, 3, -1)
    lengths = torch.tensor([50, 7, 31])
    whole = ours.decode_from_codes(semantic, acoustic, lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = ours.decode_from_codes(semantic[i : i + 1, :, :n], acoustic[i : i + 1, :, :n])
        assert torch.equal(whole[i : i + 1, :, : alone.shape[2]], alone)


def test_set_fast() -> None:
    _, model = tiny(decoder_dim=64)
    exact = decoded(model)
    assert not model.fast and model.set_fast() is model and model.fast
    fast = decoded(model)
    assert not torch.equal(fast, exact)
    torch.testing.assert_close(fast, exact, rtol=0, atol=1e-4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.fast and torch.equal(decoded(other), fast)
    assert torch.equal(decoded(model.set_fast(False)), exact)
    other = dx.DualCodec(**model.settings).eval().set_fast(True)
    other.load_state_dict(model.state_dict())
    assert other.fast and torch.equal(decoded(other), fast)
    slim = dx.accelerate(model, fast=True, release=True)
    assert slim.fast and torch.equal(decoded(slim.set_fast(True)), fast)
    with pytest.raises(dx.DualCodecError, match="set_fast: must come before release=True"):
        slim.set_fast(False)


def test_fast_needs_float32() -> None:
    model, ours = tiny()
    text = "DualCodec: fast needs float32 on the CPU, got bfloat16 on cpu"
    with pytest.raises(dx.DualCodecError, match=text):
        dx.accelerate(model, dtype=torch.bfloat16, fast=True)
    ours = copy.deepcopy(ours).set_fast(True).bfloat16()
    for call in (lambda: decoded(ours), ours.prepare, ours.set_fast):
        with pytest.raises(dx.DualCodecError, match=text):
            call()
    assert not decoded(ours.set_fast(False)).isnan().any()
