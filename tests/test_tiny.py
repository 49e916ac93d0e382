"""The trained model in the package: it loads, codes and decodes alone, and real codebooks keep the promises too."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dualcodec_ext as dx
from bench.quality import against_float64
from dualcodec_ext import cli, reference, testing
from dualcodec_ext._cli.voice import vowels
from dualcodec_ext.audio import read_audio, write_audio
from dualcodec_ext.codes import read_codes
from dualcodec_ext.hub import BUNDLED

CODEBOOKS = 10
DECODE_ROUNDING = 2e-6  # of full scale; a 16-bit step is 3e-5


@pytest.fixture(scope="module")
def model() -> dx.DualCodec:
    return dx.DualCodec.from_pretrained("tiny")


@pytest.fixture(scope="module")
def speech() -> Tensor:
    """Four seconds of voice whose level and colour change, [1, 1, S]."""
    samples = torch.from_numpy(vowels("aieouaeiou").samples)
    loudness = torch.linspace(0.05, 1.0, samples.numel())
    return (samples * loudness + 0.002 * torch.randn(samples.shape, generator=torch.Generator().manual_seed(0)))[
        None, None
    ]


def test_the_file(model: dx.DualCodec) -> None:
    assert BUNDLED["tiny"].stat().st_size <= 6_000_000
    config = dx.DualCodecConfig.preset("tiny")
    assert model.settings == dx.DualCodec(**config.to_dict()).settings
    assert config.hop_length == 480 and 6 <= 1 + config.n_codebooks <= 10
    assert config.is_causal and config.causal_encoder and config.decoder_is_causal
    card = (BUNDLED["tiny"].parent / "README.md").read_text(encoding="utf-8")
    assert "CC-BY-SA" in card and "asterisk-core-sounds" in card


@pytest.mark.parametrize("samples", [0, 1, 479, 480, 481, 24000])
def test_lengths(samples: int, model: dx.DualCodec, speech: Tensor) -> None:
    frames = -(-samples // 480)
    semantic, acoustic = model.encode(speech[..., :samples])
    assert acoustic is not None
    assert semantic.shape == (1, 1, frames) and acoustic.shape == (1, CODEBOOKS - 1, frames)
    assert model.decode_from_codes(semantic, acoustic).shape == (1, 1, 480 * frames)


def test_accelerated_it_codes_alone_too(model: dx.DualCodec, speech: Tensor) -> None:
    for ours, theirs in zip(dx.accelerate(model).encode(speech), model.encode(speech), strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_it_streams_on_audio_alone(model: dx.DualCodec, speech: Tensor) -> None:
    encoder, decoder = dx.StreamingEncoder(model), dx.StreamingDecoder(model)
    audio = speech[..., :20011]
    found = [encoder.step(piece) for piece in audio.split(777, -1)] + [encoder.flush()]
    wanted = model.encode(audio)
    assert wanted[1] is not None and torch.equal(torch.cat([c[0] for c in found], -1), wanted[0])
    assert torch.equal(torch.cat([c[1] for c in found if c[1] is not None], -1), wanted[1])
    decoded = torch.cat([decoder.step(*codes) for codes in found] + [decoder.flush()], -1)
    torch.testing.assert_close(decoded, model.decode_from_codes(*wanted), rtol=0, atol=DECODE_ROUNDING)


def test_what_comes_back_follows_what_went_in(model: dx.DualCodec, speech: Tensor) -> None:
    semantic, acoustic = model.encode(speech)
    decoded = model.decode_from_codes(semantic, acoustic)
    levels = [x.reshape(-1, 2400).square().mean(1).log10() for x in (speech, decoded)]
    assert float(torch.corrcoef(torch.stack(levels))[0, 1]) > 0.8


def test_a_padded_batch_gives_each_clip_its_own(model: dx.DualCodec, speech: Tensor) -> None:
    lengths = torch.tensor([30001, 17])
    batch = torch.cat([speech[..., :40000], speech[..., 40000:80000]])
    semantic, acoustic = model.encode(batch, lengths=lengths)
    assert acoustic is not None
    for i, length in enumerate(lengths.tolist()):
        alone = model.encode(batch[i : i + 1, :, :length])
        frames = alone[0].shape[-1]
        assert torch.equal(semantic[i : i + 1, :, :frames], alone[0])
        assert alone[1] is not None and torch.equal(acoustic[i : i + 1, :, :frames], alone[1])
        assert not semantic[i, :, frames:].any() and not acoustic[i, :, frames:].any()


def test_wrong_calls_name_what_the_caller_gave(model: dx.DualCodec, speech: Tensor) -> None:
    batch = speech[..., :4800].expand(2, 1, -1)
    semantic, acoustic = model.encode(batch)
    assert acoustic is not None
    wrong: dict[str, Tensor] = {"semantic": semantic.clone(), "acoustic": acoustic.clone()}
    wrong["semantic"][1, 0, 3], wrong["acoustic"][1, 2, 4] = 2048, 1024
    listed: Any = [4800, 480]
    ranged = {
        "semantic": r"semantic_codes must be in \[0, 2048\), got 2048 at batch 1, stage 0, frame 3$",
        "acoustic": r"acoustic_codes must be in \[0, 1024\), got 1024 at batch 1, stage 2, frame 4$",
    }
    wave = r"audio_data must be \[B, 1, S\] float, got"
    for call, text in [
        (lambda: model.encode(batch, lengths=listed), r"encode: lengths must be \[2\] int64, got list$"),
        (
            lambda: model.encode(batch, lengths=torch.tensor([4800, 480]), feature_lengths=listed),
            r"encode: feature_lengths must be \[2\] int64, got list$",
        ),
        (lambda: model.semantic_features(batch, listed), r"semantic_features: lengths must be \[2\] int64, got list$"),
        (
            lambda: model.decode_from_codes(semantic, acoustic, listed),
            r"decode_from_codes: lengths must be .*, got list$",
        ),
        (lambda: model.encode(batch[:, 0]), rf"encode: {wave} \[2, 4800\] torch\.float32$"),
        (lambda: model.encode(batch.long()), rf"encode: {wave} \[2, 1, 4800\] torch\.int64$"),
        (lambda: model.encode(listed), rf"encode: {wave} list$"),
        (lambda: model.decode_from_codes(wrong["semantic"], acoustic), f"decode_from_codes: {ranged['semantic']}"),
        (lambda: model.decode_from_codes(semantic, wrong["acoustic"]), f"decode_from_codes: {ranged['acoustic']}"),
        (
            lambda: model.decode_from_codes(semantic, wrong["acoustic"], chunk_frames=3),
            f"decode_from_codes: {ranged['acoustic']}",
        ),
        (lambda: list(model.decode_pieces(wrong["semantic"], None, 3)), f"decode_pieces: {ranged['semantic']}"),
        (lambda: model.decode_span(wrong["semantic"], None, 0, 4800), f"decode_span: {ranged['semantic']}"),
        (lambda: dx.StreamingDecoder(model, 2).step(wrong["semantic"][..., :4]), rf"step: {ranged['semantic']}"),
    ]:
        for name in ("auto", "reference"):
            if name == "reference" and "step" in text:
                continue  # streams run on compiled kernels alone
            with dx.backend(name), pytest.raises(ValueError, match=text) as raised:
                call()
            assert "\n" not in str(raised.value) and "rvq_lookup" not in str(raised.value)


def test_nothing_depends_on_the_future(model: dx.DualCodec, speech: Tensor) -> None:
    cut = 480 * 60
    whole, start = model.encode(speech), model.encode(speech[..., :cut])
    assert whole[1] is not None and start[1] is not None
    assert torch.equal(whole[0][..., :60], start[0]) and torch.equal(whole[1][..., :60], start[1])
    # The products of a group of outputs hold later inputs too, which cancel but for rounding.
    torch.testing.assert_close(
        model.decode_from_codes(*whole)[..., :cut], model.decode_from_codes(*start), rtol=0, atol=DECODE_ROUNDING
    )


def test_parity_on_trained_codebooks(model: dx.DualCodec, speech: Tensor, record_property: Any) -> None:
    """As float64's codes but for frames whose margin rounding can turn; the share of those is reported."""
    exact = reference.DualCodec(**dx.DualCodecConfig.preset("tiny").to_dict()).eval()
    exact.load_state_dict(model.state_dict())
    plain, exact = copy.deepcopy(exact), exact.double()
    unclear = total = 0
    for report, below in against_float64(model, speech):
        assert report.equal >= 0.98 * report.total, str(report)
        unclear, total = unclear + int(below.sum()), total + below.numel()
    record_property("share_of_codes_below_the_margin_bound", unclear / total)
    print(f"{unclear} of {total} codes are below the margin bound")
    semantic, acoustic = model.encode(speech)
    with torch.no_grad():
        wanted, baseline = (m.decode_from_codes(semantic, acoustic) for m in (exact, plain))
    testing.assert_close_to_f64(model.decode_from_codes(semantic, acoustic), wanted, baseline, fewest=90_000)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_line_takes_it_by_default(tmp_path: Path, speech: Tensor, capsys: Any) -> None:
    source, target, codes = tmp_path / "in.wav", tmp_path / "out.wav", tmp_path / "in.codes.safetensors"
    write_audio(source, speech[0, 0, :44321].numpy(), 22050)
    code, out, err = run(capsys, "roundtrip", source, target, "--codes", codes)
    assert code == 0 and "untrained" not in out + err and "tiny" in out
    assert "model: tiny, the default, with the package's weights (--model takes another)" in err
    assert round(read_audio(target).samples.size * 22050 / 24000) == 44321
    assert read_codes(codes).model == "tiny" and read_codes(codes).features == "log-mel"
    assert run(capsys, "encode", source, "-o", tmp_path / "codes")[0] == 0
    assert (tmp_path / "codes/in.codes.safetensors").read_bytes() == codes.read_bytes()
    assert run(capsys, "decode", codes, "-o", tmp_path / "decoded")[0] == 0
    assert (tmp_path / "decoded/in.wav").read_bytes() == target.read_bytes()
    code, out, _ = run(capsys, "info", codes, "--json")
    facts = json.loads(out)
    assert facts["bitrate_bps"] == 50 * (11 + 9 * 10) and facts["frame_rate_hz"] == 50
    assert len(facts["entropy_bits"]) == len(facts["codebook_use"]) == CODEBOOKS
    assert all(0 < bits <= 11 for bits in facts["entropy_bits"])
    code, out, _ = run(capsys, "info")
    assert code == 0 and "model: tiny, the default" in out and "fits models: tiny" in out and "bitrate bps: 5050" in out


def test_plot(tmp_path: Path, speech: Tensor, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    write_audio(tmp_path / "in.wav", speech[0, 0, :24000].numpy(), 24000)
    code, _, err = run(capsys, "roundtrip", tmp_path / "in.wav", tmp_path / "out.wav", "--plot", tmp_path / "both.png")
    assert code == 0, err
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_no_network_is_asked(tmp_path: Path, speech: Tensor) -> None:
    write_audio(tmp_path / "in.wav", speech[0, 0, :24000].numpy(), 24000)
    program = (
        "import socket, sys\n"
        "def refuse(*_):\n    raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "from dualcodec_ext.cli import main\n"
        f"sys.exit(main(['roundtrip', {str(tmp_path / 'in.wav')!r}, {str(tmp_path / 'out.wav')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_audio(tmp_path / "out.wav").samples.size == 24000
