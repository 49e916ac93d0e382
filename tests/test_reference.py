"""The reference model: the anchors of the causal decoders, what each call gives, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch

from dualcodec_ext import reference as R
from dualcodec_ext.testing import (
    TINY,
    assert_close,
    make_features,
    make_inputs,
    make_speech,
    seeded_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ANCHORS = {
    False: (
        [0.013834, 0.295480, 0.527827, 0.675085, 0.840300, 0.882571],
        [0.942652, 0.990224, 0.994488],
    ),
    True: (
        [0.761050, 0.946124, 0.959250, 0.963606, 0.973972, 0.987913],
        [0.487941, 0.006718, -0.405775],
    ),
}


@pytest.mark.parametrize("look_ahead", ANCHORS)
def test_causal_decoder_anchor(look_ahead):
    decoder = R.Decoder(3, 8, [2, 3], causal=True, look_ahead=look_ahead).double()
    state = decoder.state_dict()
    for k, name in enumerate(sorted(state)):
        index = torch.arange(state[name].numel(), dtype=torch.float64).reshape(state[name].shape)
        value = 0.3 * torch.sin(0.7 * index + k)
        state[name].copy_(value + 1 if name.endswith(("alpha", "weight_g")) else value)
    time, channel = torch.arange(6, dtype=torch.float64), torch.arange(3, dtype=torch.float64)
    y = decoder(torch.cos(0.5 * time + channel[:, None])[None])
    assert y.shape == (1, 1, 36)
    first, later = ANCHORS[look_ahead]
    assert_close(y[0, 0, :6], torch.tensor(first, dtype=torch.float64), 1e-6)
    assert_close(y[0, 0, 12:15], torch.tensor(later, dtype=torch.float64), 1e-6)


def test_names_of_causal_parameters():
    keys = set(R.DualCodec(**TINY, causal_decoder=True, causal_encoder=True).state_dict())
    for name in (
        "dac.decoder.model.0.conv.weight_g",
        "dac.decoder.model.1.block.1.conv.conv.weight_v",
        "dac.decoder.model.1.block.2.block.1.conv.bias",
        "dac.decoder.model.3.block.4.block.3.conv.weight_g",
        "dac.decoder.model.5.conv.bias",
        "dac.encoder.block.0.conv.weight_v",
        "dac.encoder.block.1.block.0.block.1.conv.bias",
        "dac.encoder.block.1.block.4.conv.weight_g",
        "dac.encoder.block.5.conv.weight_g",
    ):
        assert name in keys
    ahead = set(R.DualCodec(**TINY, look_ahead=True).state_dict())
    assert "dac.decoder.model.1.block.1.conv.weight_v" in ahead
    assert "dac.decoder.model.1.block.2.block.1.conv.bias" in ahead
    assert "dac.encoder.block.0.weight_v" in ahead


@pytest.mark.parametrize("look_ahead, future_frames", [(False, 0), (True, 2)])
def test_causal_decoder_sees_a_bounded_future(look_ahead, future_frames):
    model = seeded_model(TINY | {"causal_decoder": True, "look_ahead": look_ahead})
    hop = model.dac.hop_length
    semantic, acoustic = torch.randint(130, (1, 1, 12)), torch.randint(33, (1, 3, 12))
    whole = model.decode_from_codes(semantic, acoustic)
    assert whole.shape == (1, 1, 12 * hop)
    changed = acoustic.clone()
    changed[..., 7:] = (changed[..., 7:] + 1) % 33
    other = model.decode_from_codes(semantic, changed)
    start = (7 - future_frames) * hop
    assert_close(other[..., :start], whole[..., :start], 1e-6)
    assert (other[..., start : start + 2 * hop] - whole[..., start : start + 2 * hop]).abs().max() > 1e-4


def test_causal_encoder_sees_no_future():
    model = seeded_model(TINY | {"causal_encoder": True})
    hop = model.dac.hop_length
    audio = make_speech(8 * hop)
    changed = audio.clone()
    changed[..., 5 * hop :] += 0.1
    z, other = (model.dac.encoder(x) for x in (audio, changed))
    assert z.shape[-1] == 8
    assert_close(z[..., :5], other[..., :5], 1e-6)
    assert (z[..., 5] - other[..., 5]).abs().max() > 1e-4


def test_is_causal_reaches_the_convnext_blocks_alone():
    causal, centred = (seeded_model(TINY | {"is_causal": flag}) for flag in (True, False))
    assert causal.state_dict().keys() == centred.state_dict().keys()
    z = torch.randn(1, 64, 6)
    assert torch.equal(causal.dac.decoder(z), centred.dac.decoder(z))
    feat = make_features(8, dim=20)
    changed = feat.clone()
    changed[..., 5:] *= -1
    for model, same in ((causal, True), (centred, False)):
        with torch.no_grad():
            a, b = model.convnext_encoder(feat), model.convnext_encoder(changed)
        assert (float((a - b)[..., :5].abs().max()) < 1e-6) == same


VARIANTS = {
    "centred": {},
    "causal": {"causal_decoder": True, "causal_encoder": True},
    "look-ahead": {"look_ahead": True},
    "un-decoded": {"decode_semantic_for_codec": False, "convnext_dim": 64, "is_causal": False},
    "distill": {"distill": True, "distill_projection_out_dim": 12, "latent_dim": 48},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_shapes_and_prefixes(variant):
    model = seeded_model(TINY | variant)
    audio, feat = make_inputs(model, short=2)
    semantic, acoustic = model.encode(audio, semantic_repr=feat)
    assert semantic.shape == (2, 1, 7) and acoustic.shape == (2, 3, 7)
    assert semantic.dtype == acoustic.dtype == torch.int64
    for q in range(4):
        wav = model.decode_from_codes(semantic, acoustic[:, :q])
        assert wav.shape == (2, 1, model.output_samples(7))
    assert torch.equal(model.decode_from_codes(semantic, None), model.decode_from_codes(semantic, acoustic[:, :0]))
    assert torch.equal(model.semantic_quantize(feat), semantic[:, 0])
    assert model.encode(audio, 99, semantic_repr=feat)[1].shape == (2, 3, 7)
    two = model.encode(audio, 3, semantic_repr=feat, sample_rate=None)[1]
    assert torch.equal(two, acoustic[:, :2])
    # int32, as other tools store codes, is as good as int64
    assert torch.equal(model.decode_from_codes(semantic.int(), acoustic.int()), wav)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_lengths_give_each_clip_what_it_gets_alone(variant):
    model = seeded_model(TINY | variant)
    hop = model.dac.hop_length
    audio, feat = make_inputs(model, batch=4)
    lengths = torch.tensor([9 * hop - 3, 5 * hop, 3 * hop + 1, 0])
    frames = [9, 5, 4, 0]
    semantic, acoustic = model.encode(audio, semantic_repr=feat, lengths=lengths)
    only_semantic, none = model.encode(audio, 1, semantic_repr=feat, lengths=lengths)
    assert none is None and torch.equal(only_semantic, semantic)
    counts = torch.tensor(frames)
    assert torch.equal(model.semantic_quantize(feat, counts), semantic[:, 0])
    wav = model.decode_from_codes(semantic, acoustic, lengths=counts)
    assert wav.shape == (4, 1, model.output_samples(9))
    for i, n in enumerate(frames):
        sem, ac = model.encode(audio[i : i + 1, :, : lengths[i]], semantic_repr=feat[i : i + 1, :, :n])
        assert torch.equal(semantic[i : i + 1, :, :n], sem) and torch.equal(acoustic[i : i + 1, :, :n], ac)
        assert not semantic[i, :, n:].any() and not acoustic[i, :, n:].any()
        alone = model.decode_from_codes(sem, ac)
        assert alone.shape[-1] == model.output_samples(n)
        assert torch.equal(wav[i : i + 1, :, : alone.shape[-1]], alone)
        assert not wav[i, :, alone.shape[-1] :].any()
    # What lies past a length is not read: NaN in audio, a code out of range.
    poisoned, wrong = audio.clone(), acoustic.clone()
    poisoned[1, :, 5 * hop :] = torch.nan
    wrong[1, :, 5:] = -1
    assert torch.equal(model.encode(poisoned, semantic_repr=feat, lengths=lengths)[1], acoustic)
    assert torch.equal(model.decode_from_codes(semantic, wrong, lengths=counts), wav)


@pytest.mark.parametrize("batch, frames", [(0, 4), (2, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("variant", [VARIANTS["centred"], VARIANTS["causal"]], ids=["centred", "causal"])
def test_empty_calls(variant, batch, frames):
    model = seeded_model(TINY | variant)
    hop = model.dac.hop_length
    audio, feat = torch.zeros(batch, 1, frames * hop), torch.zeros(batch, 20, frames)
    semantic, acoustic = model.encode(audio, semantic_repr=feat)
    assert semantic.shape == (batch, 1, frames) and acoustic.shape == (batch, 3, frames)
    assert model.semantic_quantize(feat).shape == (batch, frames)
    assert model.decode_from_codes(semantic, acoustic).shape == (batch, 1, model.output_samples(frames))
    lengths = torch.zeros(batch, dtype=torch.int64)
    assert model.encode(audio, semantic_repr=feat, lengths=lengths)[1].shape == (batch, 3, frames)
    assert not model.decode_from_codes(semantic, None, lengths=lengths).any()


def test_nan_audio_gives_code_zero_where_it_reaches():
    model = seeded_model(TINY | {"causal_encoder": True})
    audio, feat = make_inputs(model, frames=6, batch=1)
    clean = model.encode(audio, semantic_repr=feat)
    audio[..., 4 * model.dac.hop_length] = torch.nan
    semantic, acoustic = model.encode(audio, semantic_repr=feat)
    assert torch.equal(semantic, clean[0]) and torch.equal(acoustic[..., :4], clean[1][..., :4])
    assert not acoustic[..., 4:].any()


def test_training_forward_and_its_head():
    model = seeded_model(TINY | VARIANTS["distill"]).train()
    audio, feat = make_inputs(model, frames=4, batch=3)
    acoustic, semantic = model(audio, semantic_repr=feat, bypass_quantize_rate=0.0)
    assert list(acoustic) == [
        "x",
        "z",
        "codes",
        "latents",
        "penalty",
        "vq/codebook_loss",
        "metrics",
        "first_layer_quantized",
    ]
    assert acoustic["x"] is acoustic.x and hasattr(acoustic, "vq/codebook_loss")
    assert acoustic.x.shape == audio.shape and acoustic.z.shape == (3, 48, 4)
    assert acoustic.first_layer_quantized.shape == (3, 1024, 4)
    assert acoustic.latents.shape == (3, 8 + 5 + 8, 4) and semantic.x.shape == (3, 48, 4)
    assert semantic.bypassed_quantize is False
    (acoustic.first_layer_quantized.square().mean() + acoustic.penalty).backward()
    assert model.dac.convnext[5].weight_g.grad.any() and model.dac.convnext[0].dwconv.weight.grad.any()
    assert model.dac.quantizer.quantizers[0].in_proj.weight_v.grad.any()
    acoustic, semantic = model(audio, semantic_repr=feat, n_quantizers=1)
    assert semantic.bypassed_quantize is True and acoustic.codes is None
    assert acoustic.first_layer_quantized is None and acoustic.penalty == 0.0
    with pytest.raises(AttributeError, match="no output named 'audio'"):
        _ = acoustic.audio
    semantic.x = semantic.x.detach()
    again = pickle.loads(pickle.dumps(copy.deepcopy(R.OutputDict(x=semantic.x))))
    again.extra = 1
    assert again["extra"] == 1 and torch.equal(again.x, semantic.x)


def test_quantizer_dropout_works_per_item_on_the_acoustic_quantizer():
    model = seeded_model(TINY | {"quantizer_dropout": 0.5})
    assert model.semantic_vq.quantizer_dropout == 0.0 and model.dac.quantizer.quantizer_dropout == 0.5
    rvq = model.dac.quantizer.train()
    z = torch.randn(4, 64, 3)
    torch.manual_seed(0)
    counts = torch.randint(1, 4, (4,))
    assert (counts[:2] < 3).any()
    torch.manual_seed(0)
    z_q, codes = rvq(z)[:2]
    assert codes.shape == (4, 3, 3)  # all stages run, some are left out of the sum
    for i in range(4):
        used = int(counts[i]) if i < 2 else 3
        assert_close(z_q[i : i + 1], rvq.from_codes(codes[i : i + 1, :used])[0], 1e-5)


def test_modules_survive_copies_and_inference_mode():
    with torch.inference_mode():
        model = seeded_model()
        audio, feat = make_inputs(model)
        semantic, acoustic = model.encode(audio, semantic_repr=feat)
        wav = model.decode_from_codes(semantic, acoustic)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.decode_from_codes(semantic, acoustic), wav)
    trained = seeded_model().train()
    tiny_out = trained(*make_inputs(trained)[:1], semantic_repr=make_inputs(trained)[1])[0].x
    copy.deepcopy(trained)  # after a forward, where torch's weight_norm leaves a tensor that can't be copied
    tiny_out.sum().backward()
    buffer = io.BytesIO()
    torch.save(trained, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))
    assert R.DualCodec(**trained.settings).settings == trained.settings


def test_folded_weight_is_folded_in_float64():
    conv = R.WNConv1d(7, 5, 3)
    g, v = conv.weight_g.double(), conv.weight_v.double()
    exact = g * v / v.square().sum((1, 2), keepdim=True).sqrt()
    assert torch.equal(conv.folded_weight(), exact.float())
    assert_close(conv.folded_weight(torch.float64), exact, 1e-15)
    assert_close(conv.weight(), exact, 1e-6)
    assert R.CausalConv1d(7, 5, 3).folded_weight(torch.bfloat16).dtype == torch.bfloat16
    assert R.CausalUpsample(6, 4, 3).folded_weight().shape == (4, 6, 6)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"semantic_repr": None}, r"DualCodec.encode: semantic_repr must be \[B, 20, F\], got None"),
        (
            {"semantic_repr": torch.zeros(2, 21, 9)},
            r"semantic_repr must be \[B, 20, F\] float, got \[2, 21, 9\]",
        ),
        ({"audio_data": torch.zeros(2, 270)}, r"audio_data must be \[2, 1, S\] float, got \[2, 270\]"),
        ({"audio_data": torch.zeros(1, 1, 270)}, r"audio_data must be \[2, 1, S\] float, got \[1, 1, 270\]"),
        ({"audio_data": torch.zeros(2, 1, 270).int()}, r"audio_data must be .* float, got .*int32"),
        ({"audio_data": None}, "audio_data must be .* float, got NoneType"),
        ({"sample_rate": 16000}, "sample_rate must be the model's 24000 Hz, got 16000"),
        ({"num_quantizers": 0}, "num_quantizers must be at least 1, got 0"),
        ({"num_quantizers": 2.0}, "num_quantizers must be an integer, got 2.0"),
        ({"semantic_repr": [[0.0]]}, r"semantic_repr must be \[B, 20, F\], got list"),
        ({"audio_data": torch.zeros(2, 1, 240)}, r"ceil\(240 / 30\) = 8 frames or up to 2 fewer, got 9"),
        ({"audio_data": torch.zeros(2, 1, 331)}, r"ceil\(331 / 30\) = 12 frames or up to 2 fewer, got 9"),
        ({"lengths": torch.tensor([3, 400])}, r"lengths must be in \[0, 270\], got \[3, 400\]"),
        ({"lengths": torch.tensor([3.0, 4.0])}, r"lengths must be \[2\] int64, got \[2\] torch.float32"),
        ({"lengths": [3, 4]}, r"lengths must be \[2\] int64, got list"),
    ],
)
def test_encode_refuses_in_one_line(arguments, text):
    model = seeded_model()
    call = {"audio_data": torch.zeros(2, 1, 270), "semantic_repr": torch.zeros(2, 20, 9)} | arguments
    with pytest.raises(ValueError, match=text) as error:
        model.encode(**call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "semantic, acoustic, text",
    [
        ((2, 7), None, r"semantic_codes must be \[B, 1, F\] integers, got \[2, 7\]"),
        ((2, 2, 7), None, r"semantic_codes must be \[B, 1, F\] integers, got \[2, 2, 7\]"),
        ((2, 1, 7), (2, 4, 7), r"acoustic_codes must be \[B, 0 to 3, F\] integers, got \[2, 4, 7\]"),
        ((2, 1, 7), (2, 3, 6), r"batch and frames of semantic_codes \[2, 1, 7\], got \[2, 3, 6\]"),
    ],
)
def test_decode_refuses_wrong_shapes(semantic, acoustic, text):
    codes = torch.zeros(semantic, dtype=torch.int64)
    with pytest.raises(ValueError, match=text):
        seeded_model().decode_from_codes(codes, None if acoustic is None else torch.zeros(acoustic).long())


def test_decode_names_the_code_that_is_out_of_range():
    model = seeded_model()
    semantic, acoustic = torch.zeros(2, 1, 5).long(), torch.zeros(2, 3, 5).long()
    acoustic[1, 2, 3] = 33
    with pytest.raises(ValueError, match=r"in \[0, 33\), got 33 at batch 1, stage 2, frame 3"):
        model.decode_from_codes(semantic, acoustic)
    semantic[0, 0, 4] = -1
    with pytest.raises(ValueError, match=r"in \[0, 130\), got -1 at batch 0, stage 0, frame 4"):
        model.decode_from_codes(semantic)
    with pytest.raises(ValueError, match=r"integers, got \[2, 1, 5\] torch.float32"):
        model.decode_from_codes(semantic.float())


def test_encode_needs_eval_mode():
    model = seeded_model().train()
    audio, feat = make_inputs(model)
    with pytest.raises(RuntimeError, match=r"must be in eval mode, got training mode: call .eval\(\)"):
        model.encode(audio, semantic_repr=feat)
    with pytest.raises(ValueError, match="look_ahead=True needs causal=True"):
        R.Decoder(3, 8, [2], look_ahead=True)
