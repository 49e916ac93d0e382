"""Long clips on a GPU: stretches with the frames around them that layers reach have the bits of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gpu
import pytest
import torch
from gpu import DEVICE, needs_device
from test_cuda_model import codes_for, every_path, exact, fast, inputs

import dualcodec_ext as dx
from dualcodec_ext.reference import spans

__all__ = ["exact"]  # a fixture
pytestmark = needs_device
FRAMES, CHUNK = 60, 13


def stretches(preset: str) -> Iterator[tuple[int, int]]:
    """First and last sample of some parts: from the beginning, to the end, within a frame, across frames, nothing."""
    hop, samples = gpu.preset_model(preset).dac.hop_length, gpu.preset_model(preset).output_samples(FRAMES)
    yield from ((0, 5 * hop), (samples - hop // 3, samples), (31 * hop + 1, 31 * hop + 9))
    yield from ((28 * hop + 7, 33 * hop + 1), (9, 9))


@gpu.by_dtype
@every_path
def test_decode_in_chunks(preset: str, dtype: torch.dtype) -> None:
    model, (semantic, acoustic) = fast(preset, dtype), codes_for(preset, FRAMES, batch=2)
    whole = model.decode_from_codes(semantic, acoustic)
    for chunk in (CHUNK, FRAMES - 1):
        found = model.decode_from_codes(semantic, acoustic, chunk_frames=chunk)
        assert found.device.type == DEVICE and torch.equal(found, whole), f"chunks of {chunk}"
    lengths = torch.tensor([FRAMES - 3, CHUNK + 2])
    found = model.decode_from_codes(semantic, acoustic, lengths=lengths, chunk_frames=CHUNK)
    assert torch.equal(found, model.decode_from_codes(semantic, acoustic, lengths=lengths))
    pieces = list(model.decode_pieces(semantic[:1].to(torch.int32), acoustic[:1].to(torch.int32), CHUNK))
    assert torch.equal(torch.cat(pieces, -1), whole[:1])
    alone = model.decode_from_codes(semantic, None, chunk_frames=CHUNK)
    assert torch.equal(alone, model.decode_from_codes(semantic, None))


@gpu.by_dtype
@every_path
def test_decode_of_a_span(preset: str, dtype: torch.dtype) -> None:
    model, (semantic, acoustic) = fast(preset, dtype), codes_for(preset, FRAMES)
    whole = model.decode_from_codes(semantic, acoustic)
    for begin, end in stretches(preset):
        assert torch.equal(model.decode_span(semantic, acoustic, begin, end), whole[..., begin:end]), (begin, end)


@gpu.by_dtype
@every_path
def test_encode_in_chunks(preset: str, dtype: torch.dtype) -> None:
    model, (audio, feat) = fast(preset, dtype), inputs(preset, FRAMES, batch=2)
    feat = feat[..., : FRAMES - 1]  # one short, as w2v-BERT's may be
    whole = model.encode(audio, semantic_repr=feat)
    found = model.encode(audio, semantic_repr=feat, chunk_frames=CHUNK)
    assert found[0].device.type == DEVICE and all(map(torch.equal, found, whole))
    assert torch.equal(model.encode(audio, 1, semantic_repr=feat, chunk_frames=CHUNK)[0], whole[0])
    lengths = torch.tensor([audio.shape[-1], audio.shape[-1] // 3], device=DEVICE)
    wanted = model.encode(audio, semantic_repr=feat, lengths=lengths)
    assert all(map(torch.equal, model.encode(audio, semantic_repr=feat, lengths=lengths, chunk_frames=CHUNK), wanted))
    arriving = zip(audio.tensor_split(4, -1), feat.tensor_split(4, -1), strict=True)
    joined = (torch.cat(part, -1) for part in zip(*model.encode_pieces(arriving, None, CHUNK), strict=True))
    assert all(map(torch.equal, joined, whole))


def test_a_span_decodes_the_frames_that_it_needs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the whole clip, which would give the same samples."""
    count = 300  # a frame needs 78 in front of it
    model, (semantic, acoustic) = fast("12hz_stream"), codes_for("12hz_stream", count)
    frames: list[int] = []
    decode = spans.decode_span

    def told(codec: spans.Codec, run: spans.Decode, *rest: object) -> torch.Tensor:
        def counted(semantic: torch.Tensor, *more: torch.Tensor | None) -> torch.Tensor:
            frames.append(semantic.shape[-1])
            return run(semantic, *more)

        return decode(codec, counted, *rest)

    monkeypatch.setattr(spans, "decode_span", told)
    hop = gpu.preset_model("12hz_stream").dac.hop_length
    model.decode_span(semantic, acoustic, 200 * hop, 201 * hop)
    if gpu.ON_GPU:  # a CPU goes on from chunk to chunk without them
        model.decode_from_codes(semantic, acoustic, chunk_frames=CHUNK)
        assert len(frames) == 1 + -(-count // CHUNK)
    assert frames and max(frames) < count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_on_a_device(dtype: str, tmp_path: Path) -> None:
    """What the command line does with a long recording, and with a part of a code file: the bits of the whole."""
    pytest.importorskip("soundfile")  # it reads the recording
    pytest.importorskip("typer")  # the command line
    import numpy as np

    from dualcodec_ext._cli import long
    from dualcodec_ext._cli.codec import open_codec
    from dualcodec_ext._cli.options import ModelOptions
    from dualcodec_ext._cli.voice import vowels
    from dualcodec_ext.audio import AudioReader, read_audio, write_audio
    from dualcodec_ext.codes import SUFFIX, map_codes, write_codes

    source, file = tmp_path / "speech.wav", tmp_path / f"speech{SUFFIX}"
    write_audio(source, vowels("aieou").samples[:47111], 24000)
    codec = open_codec(ModelOptions(model="tiny", dtype=dtype, device=DEVICE), None)
    with dx.backend(DEVICE):
        codes = codec.encode(read_audio(source).samples, 24000)
        with AudioReader(source) as reader:
            write_codes(file, long.encode_long(codec, reader, None, CHUNK, lambda done_s: None))
        mapped = map_codes(file)
        np.testing.assert_array_equal(mapped.semantic, codes.semantic)
        np.testing.assert_array_equal(mapped.acoustic, codes.acoustic)
        whole, rate_hz = codec.decode(codes)
        assert len(whole) == 47111
        pieces = long.decode_long(codec, map_codes(file, check=True), None, CHUNK, lambda done_s: None)
        np.testing.assert_array_equal(np.concatenate(list(pieces)), whole)
        for begin_s, end_s in ((0.0, 0.01), (0.5, 0.75), (1.3, None)):
            part = long.decode_span(codec, map_codes(file), begin_s, end_s, None)
            end = None if end_s is None else round(end_s * rate_hz)
            np.testing.assert_array_equal(part, whole[round(begin_s * rate_hz) : end])
