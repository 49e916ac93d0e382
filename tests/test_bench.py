"""The bench's machinery: counts, checks, order of timing, tables. No test here asserts how fast anything
is."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import correctness, registry, workload
from bench.peers import folded
from bench.program import build_program, chain_flops
from dualcodec_ext import DualCodecConfig, reference, testing

TINY = DualCodecConfig.from_dict(testing.TINY).to_dict()
VARIANTS = {
    "centred": {},
    "not_causal_convnext": {"is_causal": False},
    "causal": {"causal_decoder": True, "causal_encoder": True},
    "look_ahead": {"causal_decoder": True, "look_ahead": True},
}


def tiny_settings(**changes: object) -> dict:
    return DualCodecConfig.from_dict({**testing.TINY, **changes}).to_dict()


@pytest.fixture(autouse=True)
def one_thread():
    """Everything here is tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Counts


@pytest.mark.parametrize(("preset", "decode", "encode"), [("12hz_v1", 11.8, 5.7), ("25hz_v1", 42.5, 19.9)])
def test_flops_per_second_of_audio(preset, decode, encode):
    program = build_program(DualCodecConfig.preset(preset).to_dict())
    frames = program.frames(10.0)
    assert program.decode_flops(frames) / 1e10 == pytest.approx(decode, abs=0.05)
    assert program.encode_flops(frames) / 1e10 == pytest.approx(encode, abs=0.05)


@pytest.mark.parametrize("preset", ["12hz_v1", "25hz_v1"])
def test_flops_and_lengths_agree_with_torchs_own_count(preset):
    settings = DualCodecConfig.preset(preset).to_dict()
    program = build_program(settings)
    frames = 40
    with torch.device("meta"), torch.no_grad():
        model = reference.DualCodec(**settings).eval()
        parts = (
            (model.dac.decoder, program.decoder, torch.zeros(1, 1024, frames)),
            (model.dac.encoder, program.encoder, torch.zeros(1, 1, frames * program.hop_samples)),
            (model.convnext_encoder, program.semantic_encoder, torch.zeros(1, 1024, frames)),
            (model.convnext_decoder, program.semantic_decoder, torch.zeros(1, 768, frames)),
        )
        for module, layers, x in parts:
            with FlopCounterMode(display=False) as counter:
                y = module(x)
            # torch counts a transposed convolution's cropped ends too.
            assert chain_flops(layers, x.shape[-1]) == pytest.approx(counter.get_total_flops(), rel=0.01)
            steps = x.shape[-1]
            for layer in layers:
                steps = layer.out_length(steps)
            assert steps == y.shape[-1]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_weight_count_is_that_of_the_folded_model(changes):
    settings = tiny_settings(**changes)
    program = build_program(settings)
    state = testing.seeded_model(settings).state_dict()
    # What a decode does not read, and what is there twice for the sake of a graph.
    left_out = ("alpha", "reciprocal", "doubled", "square", "in_weight", "in_bias", "book")
    modules = {
        "decode": folded.FoldedDecoder(program, state, "1d"),
        "encode": folded.FoldedEncoder(program, state, "1d"),
    }
    for what, module in modules.items():
        left_out = left_out if what == "decode" else left_out[:4]
        counted = sum(p.numel() for n, p in module.named_parameters() if not any(s in n for s in left_out))
        assert {"decode": program.decode_weights, "encode": program.encode_weights}[what]() == counted


# The folded graphs


@pytest.mark.parametrize("form", ["1d", "2d"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_folded_graphs_are_the_model(changes, form):
    settings = tiny_settings(**changes)
    program = build_program(settings)
    model = testing.seeded_model(settings)
    state = model.state_dict()
    frames = 9
    task = workload.make_task("decode", settings, frames * program.hop_samples / program.sample_rate_hz, 1, "cpu")
    with torch.no_grad():
        wanted = model.double().decode_from_codes(*task.inputs)
        found = folded.finish(folded.FoldedDecoder(program, state, form), form, torch.float64)(*task.inputs)
        testing.assert_close(found, wanted, 1e-12)
        audio = testing.make_speech(frames * program.hop_samples).double()
        features = testing.make_features(frames, dim=program.semantic_dim).double()
        codes = folded.finish(folded.FoldedEncoder(program, state, form), form, torch.float64)(audio, features)
        for found, wanted in zip(codes, model.encode(audio, semantic_repr=features), strict=True):
            assert torch.equal(found, wanted)


# Verdicts


def wave_check(count=1000):
    wanted = torch.linspace(-1, 1, count, dtype=torch.float64)[None, None]
    plain = correctness.Error.of((wanted + 1e-5 * torch.sin(9 * wanted)).float(), wanted)
    return wanted, correctness.WaveCheck(wanted, plain)


def test_ours_is_held_to_twice_the_plain_error():
    wanted, check = wave_check()
    near, far = wanted + 1.9e-5 * torch.sin(9 * wanted), wanted + 2.1e-5 * torch.sin(9 * wanted)
    assert check(near, torch.float32, ours=True).ok
    assert not check(far, torch.float32, ours=True).ok
    assert check(far, torch.float32).ok  # a peer's rounding is its own business
    assert check(far, torch.float32, ours=True, fast=True).ok


def test_planted_errors_are_found():
    wanted, check = wave_check()
    one = wanted.clone()
    one[0, 0, 77] += 1e-3
    assert not check(one, torch.float32, ours=True).ok
    assert not check(one, torch.float32, ours=True, fast=True).ok
    assert check(one[..., 1:], torch.float32).text == "shape [1, 1, 999], not [1, 1, 1000]"
    one[0, 0, 77] = math.nan
    assert check(one, torch.float32).text == "not finite"


def codes_check():
    wanted = torch.arange(20).reshape(1, 2, 10)
    margins = torch.full((1, 2, 10), 0.5)
    margins[0, 0, 3] = 0.01
    bounds = torch.full((1, 2, 10), 0.1)
    one = wanted[:, :1].clone()
    return correctness.CodesCheck((one, wanted), (margins[:, :1], margins), (bounds[:, :1], bounds), reach=(0, 2))


def test_codes_may_differ_only_where_the_margin_is_small():
    check = codes_check()
    semantic, acoustic = (x.clone() for x in check.wanted)
    assert check((semantic, acoustic), torch.float32, ours=True).text == "100.00% same"
    semantic[0, 0, 3] += 1  # a near tie, and frames 3 to 5 of the next part hang on it
    acoustic[0, :, 3:6] += 1
    verdict = check((semantic, acoustic), torch.float32, ours=True)
    assert verdict.ok
    assert verdict.numbers["near_ties"] == 1
    acoustic[0, 1, 6] += 1
    verdict = check((semantic, acoustic), torch.float32, ours=True)
    assert not verdict.ok
    assert verdict.numbers["wrong"] == 1
    assert verdict.numbers["agreement"] == pytest.approx(22 / 30)


def test_later_stages_of_a_near_tie_are_excused():
    check = codes_check()
    semantic, acoustic = (x.clone() for x in check.wanted)
    acoustic[0, :, 3] += 1
    assert check((semantic, acoustic), torch.float32, ours=True).ok
    acoustic[0, 1, 4] += 1
    assert not check((semantic, acoustic), torch.float32, ours=True).ok


@pytest.mark.parametrize("kind", ["decode", "encode"])
def test_long_clips_are_compared_at_both_ends(kind):
    """What the two windows give must be what the whole clip gives there."""
    task = workload.make_task(kind, TINY, 0.25, 1, "cpu")
    frames = task.inputs[-1].shape[-1] if kind == "encode" else task.inputs[0].shape[-1]
    assert frames == 200
    make = (
        workload.encode_check
        if kind == "encode"
        else lambda t, limit_s: workload.decode_check(t, torch.float32, limit_s)
    )
    whole, ends = make(task, limit_s=9.0), make(task, limit_s=0.05)
    assert len(whole.spans) == 1
    assert len(ends.spans) == 2
    if kind == "decode":
        testing.assert_close(ends.wanted, correctness.cut(whole.wanted, ends.spans), 1e-12)
        assert ends(whole.wanted, torch.float32, ours=True).ok
    else:
        for part, full in zip(ends.wanted, whole.wanted, strict=True):
            assert torch.equal(part, correctness.cut(full, ends.spans))
        assert ends(whole.wanted, torch.float32, ours=True).ok


# Rows


@pytest.mark.parametrize("changes", [{}, VARIANTS["causal"]], ids=["centred", "causal"])
def test_rows_cover_every_op_and_their_graphs_agree(changes):
    settings = tiny_settings(**changes)
    made = list(registry.rows(build_program(settings), testing.seeded_model(settings), 0.005))
    assert {row.op for row in made} == set(registry.OPS)
    assert len({row.name for row in made}) == len(made)
    providers = {p.name: p for p in registry.PROVIDERS}
    for row in made:
        assert row.flops > 0
        assert row.touched_bytes(torch.float32) > row.touched_bytes(torch.bfloat16) > 0
        check = registry.make_check(row, torch.float32)
        for name in ("eager", "folded2d"):
            verdict = check(providers[name].build(row, torch.float32)(), torch.float32)
            assert verdict.ok, (row.name, name, verdict)
        wrong = replace(row, args=(row.args[0].flip(-1), *row.args[1:]))
        assert not check(providers["eager"].build(wrong, torch.float32)(), torch.float32).ok, row.name
