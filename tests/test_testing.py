"""The input makers and the comparers: what passes must pass, and a planted error must fail."""

import copy

import pytest
import torch

from dualcodec_ext import reference as R
from dualcodec_ext.testing import (
    TINY,
    assert_close,
    assert_close_to_f64,
    compare_codes,
    make_features,
    make_speech,
    one_ulp,
    poison_past_lengths,
    poisoned_memory,
    rvq_margin_bound,
    seed_model,
    seeded_model,
    strided_copies,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 50, 1100)


@pytest.mark.parametrize("name", ["12hz_v1", "25hz_v1"])
def test_seeded_weights_keep_activations_of_order_one_and_use_the_codebooks(preset_model, name):
    model = preset_model(name)
    frames = 24 if name == "12hz_v1" else 40
    audio, feat = make_speech(frames * model.dac.hop_length), make_features(frames)
    kinds = (R.Snake1d, R.WNConv1d, R.WNConvTranspose1d, R.ConvNeXtBlock, R.ResidualUnit)
    spread: dict[str, float] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, key=key: spread.update({key: float(out.std())}))
        for key, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.no_grad():
            semantic, acoustic = model.encode(audio, semantic_repr=feat)
            wav = model.decode_from_codes(semantic, acoustic)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(spread) > 150
    assert all(0.15 < value < 5 for value in spread.values()), {
        key: value for key, value in spread.items() if not 0.15 < value < 5
    }
    # The last residual is what few codebooks have seen; each stage still tells nearly all frames apart.
    for stage in (*semantic[0], *acoustic[0]):
        assert len(stage.unique()) > 0.8 * frames
    assert 0.05 < wav.std() < 0.6 and (wav.abs() > 0.95).float().mean() < 0.01
    # The acoustic codes are heard: another code is another sound.
    assert (model.decode_from_codes(semantic, (acoustic + 1) % 1024) - wav).std() > 0.05


def test_seeds_rule_the_parameters():
    a, b, c = seeded_model(), seeded_model(), seeded_model(seed=1)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert not torch.equal(x, z), name
    double = seeded_model().double()
    seed_model(double)
    assert all(torch.equal(x.double(), y) for x, y in zip(a.parameters(), double.parameters(), strict=True))
    other = seeded_model(TINY | {"look_ahead": True})
    assert torch.equal(other.semantic_vq.quantizers[0].codebook.weight, a.semantic_vq.quantizers[0].codebook.weight)


def test_inputs():
    audio = make_speech(24000, 2)
    assert audio.shape == (2, 1, 24000) and audio.dtype == torch.float32
    assert 0.05 < audio.std() < 0.2 and audio.abs().max() <= 0.9
    assert torch.equal(make_speech(24000), audio[:1]) and not torch.equal(audio[0], audio[1])
    assert not torch.equal(make_speech(500, seed=1), make_speech(500))
    spectrum = torch.fft.rfft(audio[0, 0]).abs().square()
    assert spectrum[:4000].sum() > 0.9 * spectrum.sum()
    assert make_speech(0).shape == (1, 1, 0) and make_speech(5, 0).shape == (0, 1, 5)
    feat = make_features(200, 2, 16)
    assert feat.shape == (2, 16, 200) and feat.std() == pytest.approx(1, abs=0.05)
    assert make_features(0).shape == (1, 1024, 0)


def noisy(exact, scale, seed=1):
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (exact + scale * noise).float()


def test_close_to_f64():
    exact = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    baseline = noisy(exact, 1e-5)
    report = assert_close_to_f64(noisy(exact, 1.5e-5, 2), exact, baseline)
    assert report.rms == pytest.approx(1.5e-5, rel=0.02) and report.baseline_rms == pytest.approx(1e-5, rel=0.02)
    assert_close_to_f64(baseline, exact, baseline)
    # Where the baseline is exact, one ulp of the largest output is allowed.
    rounded = exact.float().double()
    peak = int(rounded.abs().argmax())
    off = rounded.float()
    off.view(-1)[peak] = torch.nextafter(off.view(-1)[peak], torch.tensor(0.0))
    assert_close_to_f64(off, rounded, rounded.float())
    off.view(-1)[peak] += 3 * one_ulp(float(rounded.abs().max()), torch.float32)
    with pytest.raises(AssertionError, match="too large"):
        assert_close_to_f64(off, rounded, rounded.float())


@pytest.mark.parametrize(
    "spoil, text",
    [
        (lambda y: y.view(-1).__setitem__(777, y.view(-1)[777] + 2e-4), r"at \(0, 0, 777\)"),
        (lambda y: y.view(-1).__setitem__(5, torch.nan), r"NaN must be where .*\(0, 0, 5\)"),
        (lambda y: y.view(-1).__setitem__(5, torch.inf), "too large: rms inf"),
        (lambda y: y.mul_(1.0001), "too large"),
        (lambda y: y[:, :, ::7].add_(5e-5), "too large"),
    ],
    ids=["one element", "one NaN", "one infinity", "a scale", "a pattern"],
)
def test_planted_errors_are_found(spoil, text):
    exact = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    baseline, actual = noisy(exact, 1e-5), noisy(exact, 1e-5, 2)
    spoil(actual)
    with pytest.raises(AssertionError, match=text):
        assert_close_to_f64(actual, exact, baseline)
    with pytest.raises(AssertionError, match=r"NaN must be|must be within 7e-05: worst"):
        assert_close(actual, exact, 7e-5)


def test_comparers_refuse_what_they_cannot_judge():
    exact = torch.zeros(100, 1000, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least 100000 outputs, got 1000"):
        assert_close_to_f64(exact[0].float(), exact[0], exact[0].float())
    with pytest.raises(ValueError, match=r"reference_f64 must be float64, got torch.float32"):
        assert_close_to_f64(exact.float(), exact.float(), exact.float())
    with pytest.raises(AssertionError, match=r"shape must be \[100, 1000\], got \[1000, 100\]"):
        assert_close_to_f64(exact.float().T, exact, exact.float())
    with pytest.raises(AssertionError, match=r"dtype must be the baseline's torch.bfloat16, got torch.float32"):
        assert_close_to_f64(exact.float(), exact, exact.bfloat16())
    with pytest.raises(AssertionError, match="shape must be"):
        assert_close(exact[:1], exact, 1.0)
    assert assert_close(exact[:0], exact[:0], 0.0) == 0.0
    with_nan = torch.tensor([1.0, torch.nan, torch.inf])
    assert assert_close(with_nan, with_nan, 0.0) == 0.0
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0, torch.nan, -torch.inf]), with_nan, 1e9)


def test_one_ulp():
    assert one_ulp(1.0, torch.float32) == 2**-23 and one_ulp(1.99, torch.float32) == 2**-23
    assert one_ulp(4.0, torch.float16) == 2**-8
    assert one_ulp(0.0, torch.float32) > 0


def test_codes():
    codes = torch.randint(0, 50, (2, 4, 10), generator=torch.Generator().manual_seed(0))
    margins = torch.full((2, 4, 10), 0.1)
    margins[1, 2, 5] = margins[1, 3, 6] = 1e-7
    assert compare_codes(codes, codes, margins, 1e-6).equal == 80
    other = codes.clone()
    other[1, 2:, 5] += 1  # an unclear code, and one behind it
    report = compare_codes(other, codes, margins, 1e-6)
    assert (report.equal, report.excused, report.not_compared) == (78, 1, 1)
    assert "78 of 80 equal" in str(report)
    bound = torch.full_like(margins, 1e-9)
    with pytest.raises(AssertionError, match="1 are not, first at batch 1, stage 2, frame 5: expected"):
        compare_codes(other, codes, margins, bound)
    planted = codes.clone()
    planted[0, 3, 9] += 1
    with pytest.raises(AssertionError, match="first at batch 0, stage 3, frame 9"):
        compare_codes(planted, codes, margins, 1e-6)
    with pytest.raises(AssertionError, match="must be"):
        compare_codes(codes[:, :3], codes, margins, 1e-6)


def test_margin_bound_covers_float32_rounding():
    model = seeded_model()
    tensors = model.dac.quantizer.op_tensors(torch.float32)
    z = torch.randn(4, 64, 500, generator=torch.Generator().manual_seed(0))
    exact = {name: t.double() for name, t in tensors.items()}
    codes, _, margins = R.rvq_search_ref(z.double(), **exact, return_margin=True)
    got = R.rvq_search_ref(z, **tensors)[0]
    bound = rvq_margin_bound(z, **tensors)
    assert bound.shape == codes.shape and bound.max() < 1e-3
    report = compare_codes(got, codes, margins, bound)
    assert report.equal > 0.99 * report.total
    # A planted wrong choice with a clear margin is found.
    wrong = got.clone()
    b, q, f = (int(i) for i in (margins > 0.01).nonzero()[3])
    wrong[b, q, f] = (wrong[b, q, f] + 1) % 33
    with pytest.raises(AssertionError, match=f"batch {b}, stage {q}, frame {f}"):
        compare_codes(wrong, codes, margins, bound)


def test_poison():
    with poisoned_memory():
        assert torch.empty(3, 4).isnan().all()
        assert torch.empty(3, dtype=torch.float64).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
    x = torch.ones(2, 3, 4)
    y = poison_past_lengths(x, torch.tensor([4, 1]))
    assert torch.equal(y[0], x[0]) and torch.equal(y[1, :, :1], x[1, :, :1]) and y[1, :, 1:].isnan().all()


def test_strided_copies_hold_the_same_values():
    x = torch.randn(2, 3, 5)
    views = strided_copies(x)
    strides = {view.stride() for view in views.values()}
    assert len(strides) == len(views)
    for view in views.values():
        assert torch.equal(view, x)
    assert views["channels_last"].stride(1) == 1
    model = copy.deepcopy(seeded_model())
    audio = make_speech(90)
    for view in strided_copies(audio).values():
        assert_close(model.dac.encoder(view), model.dac.encoder(audio), 1e-6)
