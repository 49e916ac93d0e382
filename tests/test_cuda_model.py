"""The codec on a GPU against float64 on the CPU, and the same bits alone, in batches and in graphs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import gpu
import pytest
import test_model
import torch
from gpu import DEVICE, gpu_alone
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import reference, testing

pytestmark = gpu.needs_device
PRESETS = ["12hz_v1", "25hz_v1", "12hz_causal", "12hz_lookahead", "12hz_stream"]
FRAMES = 12
by_preset = pytest.mark.parametrize("preset", PRESETS)
by_dtype = pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
every_path = pytest.mark.parametrize("preset", ["12hz_v1", "12hz_stream"])


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """On the device's own kernels, by name, so that the reference can't stand in for them."""
    with gpu.exact_float32(), dx.backend(DEVICE):
        yield


@lru_cache(maxsize=1)
def plain(preset: str) -> reference.DualCodec:
    """The reference on the device."""
    return copy.deepcopy(gpu.preset_model(preset)).to(DEVICE)


@lru_cache(maxsize=3)
def fast(preset: str, dtype: torch.dtype = torch.float32) -> dx.DualCodec:
    model = dx.accelerate(plain(preset), dtype=dtype)
    model.prepare()
    assert model._engine_state is not None, "the engine must run here"
    return model


@lru_cache(maxsize=1)
def waveform(preset: str) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Codes of 100,000 samples and more, and float64's audio: seconds of work, the same for every dtype."""
    model = gpu.preset_model(preset)
    codes = codes_for(preset, -(-100_000 // model.dac.hop_length) + 1)
    with torch.no_grad():
        return codes, copy.deepcopy(model).double().decode_from_codes(*(c.cpu() for c in codes))


def inputs(preset: str, frames: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    audio, feat = test_model.inputs(gpu.preset_model(preset), frames, batch)
    return audio.to(DEVICE), feat.to(DEVICE)


def codes_for(preset: str, frames: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    s, g = gpu.preset_model(preset).settings, torch.Generator().manual_seed(seed)
    semantic = torch.randint(s["semantic_codebook_size"], (batch, 1, frames), generator=g)
    return (
        semantic.to(DEVICE),
        torch.randint(s["codebook_size"], (batch, s["n_codebooks"], frames), generator=g).to(DEVICE),
    )


# Against float64


@by_preset
def test_codes(preset: str) -> None:
    """As float64's on the CPU, but where its own margin is below what rounding can move."""
    model, exact = fast(preset), copy.deepcopy(gpu.preset_model(preset)).double()
    audio, feat = inputs(preset, FRAMES)
    semantic, acoustic = model.encode(audio, semantic_repr=feat)
    assert semantic.device.type == acoustic.device.type == DEVICE
    assert torch.equal(model.semantic_quantize(feat), semantic[:, 0])
    feat, audio, codes = feat.cpu().double(), audio.cpu().double(), semantic.cpu()
    with torch.no_grad():
        test_model.check_codes(codes, exact.convnext_encoder(feat), exact.semantic_vq)
        z = exact.dac.encoder(exact.dac.preprocess(audio, None))[..., :FRAMES]
        subtracted = exact.convnext_decoder(exact.semantic_vq.from_codes(codes)[0])
        test_model.check_codes(acoustic.cpu(), z - subtracted, exact.dac.quantizer)


@by_dtype
@by_preset
def test_waveform(preset: str, dtype: torch.dtype) -> None:
    """At most twice the error of plain PyTorch in the same dtype on the same device."""
    (semantic, acoustic), expected = waveform(preset)
    with torch.no_grad():
        baseline = copy.deepcopy(plain(preset)).to(dtype).decode_from_codes(semantic, acoustic)
    found = fast(preset, dtype).decode_from_codes(semantic, acoustic)
    assert found.dtype == dtype and found.device.type == DEVICE
    testing.assert_close_to_f64(found.cpu(), expected, baseline.cpu())


@pytest.mark.parametrize("dtype", gpu.DTYPES[1:], ids=str)
def test_half_precision_codes_mostly_agree(dtype: torch.dtype) -> None:
    audio, feat = inputs("12hz_v1", 40)
    exact = fast("12hz_v1").encode(audio, semantic_repr=feat)[0]
    assert (fast("12hz_v1", dtype).encode(audio, semantic_repr=feat)[0] == exact).float().mean() >= 0.8


# The same bits


@by_dtype
@every_path
def test_decode_alone_in_a_batch_and_with_lengths(preset: str, dtype: torch.dtype) -> None:
    model = fast(preset, dtype)
    lengths = torch.tensor([20, 1, 0, 7, 19, 20, 13, 2])
    semantic, acoustic = codes_for(preset, 20, batch=8)
    padded = model.decode_from_codes(semantic, acoustic, lengths=lengths)
    assert torch.equal(padded, model.decode_from_codes(semantic, acoustic, lengths=lengths.to(DEVICE)))
    whole = model.decode_from_codes(semantic, acoustic)
    for i, n in enumerate(lengths.tolist()):
        alone = model.decode_from_codes(semantic[i : i + 1], acoustic[i : i + 1])
        assert torch.equal(whole[i : i + 1], alone), f"item {i} of the batch"
        cut = model.decode_from_codes(semantic[i : i + 1, :, :n], acoustic[i : i + 1, :, :n])
        assert torch.equal(padded[i : i + 1, :, : cut.shape[-1]], cut), f"item {i} of length {n}"
        assert not padded[i, :, cut.shape[-1] :].any(), f"item {i}: zeros past its end"


@by_dtype
@every_path
def test_encode_alone_in_a_batch_and_with_lengths(preset: str, dtype: torch.dtype) -> None:
    model, hop, frames = fast(preset, dtype), gpu.preset_model(preset).dac.hop_length, 9
    audio, feat = inputs(preset, frames, batch=4)
    samples = torch.tensor([audio.shape[-1], 3 * hop + 1, 0, hop])
    counts = -(-samples // hop)
    poisoned = testing.poison_past_lengths(audio, samples), testing.poison_past_lengths(feat, counts)
    padded = model.encode(poisoned[0], semantic_repr=poisoned[1], lengths=samples.to(DEVICE))
    whole = model.encode(audio, semantic_repr=feat)
    for i, (length, n) in enumerate(zip(samples.tolist(), counts.tolist(), strict=True)):
        alone = model.encode(audio[i : i + 1], semantic_repr=feat[i : i + 1])
        cut = model.encode(audio[i : i + 1, :, :length], semantic_repr=feat[i : i + 1, :, :n])
        for part in (0, 1):
            assert torch.equal(whole[part][i : i + 1], alone[part]), f"item {i} of the batch"
            assert torch.equal(padded[part][i : i + 1, :, :n], cut[part]), f"item {i} of length {n}"
            assert not padded[part][i, :, n:].any()


@by_dtype
@every_path
def test_graphs_have_the_eager_bits(preset: str, dtype: torch.dtype) -> None:
    """The first call of a bucket runs eagerly, the second records, later ones replay."""
    model = fast(preset, dtype)
    graphs = model._engine_state[1]
    for batch, frames in ((1, 1), (1, 2), (3, 30), (1, 127), (1, 125)):
        codes = codes_for(preset, frames, batch, seed=frames)
        audio, feat = inputs(preset, frames, batch)
        wanted = graphs.engine.decode(*codes, None)
        for _ in range(7):
            assert torch.equal(model.decode_from_codes(*codes), wanted)
        wanted = model.encode(audio, semantic_repr=feat)
        for _ in range(7):
            assert all(map(torch.equal, model.encode(audio, semantic_repr=feat), wanted))
    if DEVICE == "cuda":
        assert 0 < graphs.held_bytes() <= graphs.cap_bytes


@gpu_alone
def test_streams_and_threads_have_the_same_bits() -> None:
    model, results = fast("12hz_v1"), {}
    codes = {seed: codes_for("12hz_v1", 20, seed=seed) for seed in range(4)}
    wanted = {seed: model.decode_from_codes(*pair) for seed, pair in codes.items()}
    torch.cuda.synchronize()

    def work(seed: int) -> None:
        with dx.backend(DEVICE), torch.cuda.stream(torch.cuda.Stream()):
            results[seed] = [model.decode_from_codes(*codes[seed]) for _ in range(5)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in codes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, found in results.items():
        assert len(found) == 5 and all(torch.equal(x, wanted[seed]) for x in found)
    assert len(results) == 4


@gpu_alone
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_index() -> None:
    model = dx.accelerate(copy.deepcopy(gpu.preset_model("12hz_v1")).to("cuda:1"))
    codes = codes_for("12hz_v1", 20)
    for _ in range(3):
        found = model.decode_from_codes(*(c.to("cuda:1") for c in codes))
        assert found.device == torch.device("cuda:1")
        assert torch.equal(found.to("cuda:0"), fast("12hz_v1").decode_from_codes(*codes))


# Arguments


def test_codes_out_of_range_raise_in_one_line_each_time() -> None:
    model = fast("12hz_v1")
    for part, limit in ((0, 16384), (1, 4096)):
        codes = codes_for("12hz_v1", 5)
        wrong = [c.clone() for c in codes]
        wrong[part][0, -1, 3] = limit
        for _ in range(4):
            with pytest.raises(ValueError, match=rf"codes must be in \[0, {limit}\), got {limit}") as raised:
                model.decode_from_codes(*wrong)
            assert "\n" not in str(raised.value)
        model.decode_from_codes(*codes)


def test_inputs_on_the_cpu_are_taken() -> None:
    model, (audio, feat) = fast("12hz_v1"), inputs("12hz_v1", 9)
    codes = codes_for("12hz_v1", 9)
    for _ in range(3):
        assert torch.equal(model.decode_from_codes(*(c.cpu() for c in codes)), model.decode_from_codes(*codes))
        ours = model.encode(audio.cpu(), semantic_repr=feat.cpu())
        assert all(map(torch.equal, ours, model.encode(audio, semantic_repr=feat)))


@pytest.mark.parametrize("batch, frames", [(0, 3), (2, 0)])
def test_nothing_to_do(batch: int, frames: int) -> None:
    model = fast("12hz_v1")
    codes = torch.zeros(batch, 1, frames, dtype=torch.int64, device=DEVICE)
    found = model.decode_from_codes(codes, codes.expand(-1, 7, -1))
    assert found.shape == (batch, 1, gpu.preset_model("12hz_v1").output_samples(frames))


@gpu_alone
def test_float64_models_run_the_reference() -> None:
    model = dx.accelerate(testing.seeded_model().cuda(), dtype=torch.float64)
    codes = torch.arange(6, device=DEVICE).reshape(1, 1, 6)
    with dx.backend("auto"):
        found = model.decode_from_codes(codes, codes.expand(-1, 3, -1))
    assert found.is_cuda and model._engine_state is None


# Memory


@gpu_alone
def test_peak_memory_holds_no_distance_matrix() -> None:
    """Beyond weights a call needs activations: a few of the largest, far from frames x entries of any stage."""
    model, batch, frames = fast("12hz_v1", torch.bfloat16), 8, 125
    graphs = model._engine_state[1]
    audio, feat = inputs("12hz_v1", frames, batch)
    engine, hop = graphs.engine, gpu.preset_model("12hz_v1").dac.hop_length
    padded = torch.nn.functional.pad(audio, (0, frames * hop - audio.shape[-1]))
    largest = batch * frames * hop * 32 * 2  # bytes of 32 channels at the sample rate, in bfloat16
    with torch.no_grad():
        engine.encode(padded, feat, None, None)
        used = gpu.peak_bytes(lambda: engine.encode(padded, feat, None, None))
    assert used < 5 * largest, f"{used} bytes, the largest activation has {largest}"
    codes: Any = codes_for("12hz_v1", frames, batch)
    largest = batch * frames * hop * 48 * 2
    with torch.no_grad():
        engine.decode(*codes, None)
        used = gpu.peak_bytes(lambda: engine.decode(*codes, None))
    assert used < 5 * largest, f"{used} bytes, the largest activation has {largest}"
