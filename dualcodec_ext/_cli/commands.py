"""What `roundtrip`, `encode` and `decode` do with files."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualcodec_ext._cli.codec import Codec, CodecCache, open_codec
from dualcodec_ext._cli.long import chunk_for, decode_long, decode_span, encode_long, write_pieces
from dualcodec_ext._cli.options import DEFAULT_MODEL, ModelOptions
from dualcodec_ext._cli.outputs import (
    file_keys,
    files_of,
    need_folder_of,
    refuse_as_folder,
    refuse_clashes,
    refuse_picture,
)
from dualcodec_ext._cli.report import Report
from dualcodec_ext._files import Found, find_inputs, reason
from dualcodec_ext.audio import AUDIO_SUFFIXES, AudioReader, audio_format, read_audio, resample, write_audio
from dualcodec_ext.codes import SUFFIX, UNTRAINED, CodeFile, map_codes, write_codes
from dualcodec_ext.errors import DualCodecError


def run_roundtrip(
    source: Path,
    target: Path,
    options: ModelOptions,
    quantizers: int | None,
    rate: int | None,
    kind: str | None,
    codes_file: Path | None,
    plot: Path | None,
    chunk_frames: int | None,
    as_json: bool,
) -> int:
    """Encodes one audio file and decodes it again.

    Args:
        source: audio to read.
        target: audio to write.
        options: which model, and how it runs.
        quantizers: codebooks to use; None for all.
        rate: sample rate of the output in Hz; None for the model's.
        kind: format of the output; None for what the ending of `target` says.
        codes_file: where the codes go; None to keep them.
        plot: picture for the spectrograms of both; None for none.
        chunk_frames: frames that are worked on at a time, see `chunk_for`.
        as_json: print JSON.
    Returns:
        The exit code.
    Raises:
        DualCodecError: anything that keeps the output from being written, or two of the files are the same.
        MissingExtraError: a picture is wanted and matplotlib is not installed.
    """
    report = Report("roundtrip", as_json)
    kind = audio_format(kind or os.fspath(target))
    outputs = {name: path for name, path in (("OUT", target), ("--codes", codes_file), ("--plot", plot)) if path}
    refuse_clashes(outputs, {"the input": source, **files_of(options)})
    for wanted in outputs.values():
        need_folder_of(wanted)
    if plot is not None:
        refuse_picture(plot)
    with AudioReader(source) as reader:
        recording = _short(reader, chunk_frames)  # before the model, which takes longer to load
        codec = _opened(options, report, quantizers)
        start = time.perf_counter()
        codes = _encode(codec, reader, recording, quantizers, chunk_frames, report)
    encoded = time.perf_counter()
    rate_hz = rate or codec.config.sample_rate
    samples = _decode(codec, codes, target, rate_hz, kind, chunk_frames, report)
    decoded = time.perf_counter()
    if codes_file is not None:
        write_codes(codes_file, codes)
    if plot is not None:
        _draw(read_audio(source).samples if recording is None else recording, codes.source_rate_hz, target, plot)
    result = {
        "input": str(source),
        "output": str(target),
        **_code_facts(codes),
        "output_rate_hz": rate_hz,
        "output_samples": samples,
        "encode_s": encoded - start,
        "decode_s": decoded - encoded,
    }
    speeds = f"encode {_speed(codes, encoded - start)}, decode {_speed(codes, decoded - encoded)}"
    report.done(result, f"{source} -> {target}: {_code_line(codes)}; {samples} samples at {rate_hz} Hz; {speeds}")
    return report.finish()


def run_encode(
    inputs: Sequence[str],
    folder: Path,
    options: ModelOptions,
    quantizers: int | None,
    chunk_frames: int | None,
    skip_existing: bool,
    as_json: bool,
) -> int:
    """Encodes audio files into code files.

    Args:
        inputs: files, folders and patterns.
        folder: where the code files go.
        options: which model, and how it runs.
        quantizers: codebooks to use; None for all.
        chunk_frames: frames that are worked on at a time, see `chunk_for`.
        skip_existing: leave out inputs whose code file exists.
        as_json: print JSON.
    Returns:
        The exit code.
    Raises:
        DualCodecError: the model can't be opened, or the folder can't be made.
    """
    report = Report("encode", as_json)
    jobs = _jobs(inputs, AUDIO_SUFFIXES, folder, SUFFIX, skip_existing, report)
    if not jobs:
        return report.finish()
    refuse_as_folder(folder)
    codec = _opened(options, report, quantizers)
    fresh = not folder.exists()
    _make(folder)

    def work(job: tuple[Found, Path]) -> tuple[dict[str, Any], str]:
        found, target = job
        with AudioReader(found.path) as reader:
            recording = _short(reader, chunk_frames)
            start = time.perf_counter()
            codes = _encode(codec, reader, recording, quantizers, chunk_frames, report)
        elapsed_s = time.perf_counter() - start
        _make(target.parent)
        write_codes(target, codes)
        result = {
            "input": str(found.path),
            "output": str(target),
            **_code_facts(codes),
            "encode_s": elapsed_s,
        }
        return result, f"{found.path} -> {target}: {_code_line(codes)}; {_speed(codes, elapsed_s)}"

    report.each(jobs, lambda job: str(job[0].path), work)
    if fresh:
        _remove_empty(folder)
    return report.finish()


def run_decode(
    inputs: Sequence[str],
    folder: Path,
    options: ModelOptions,
    quantizers: int | None,
    rate: int | None,
    kind: str,
    span_s: tuple[float | None, float | None],
    chunk_frames: int | None,
    any_weights: bool,
    skip_existing: bool,
    as_json: bool,
) -> int:
    """Decodes code files into audio files.

    Args:
        inputs: files, folders and patterns.
        folder: where the audio goes.
        options: how the model runs; its name, weights and seed only as far as they are asked for.
        quantizers: codebooks to use of those in each file; None for all.
        rate: sample rate of the output in Hz; None for the model's.
        kind: format of the audio.
        span_s: the part of each recording that is wanted, from and to; None for its beginning or end.
        chunk_frames: frames that are worked on at a time, see `chunk_for`.
        any_weights: decode codes that other weights made.
        skip_existing: leave out inputs whose audio exists.
        as_json: print JSON.
    Returns:
        The exit code.
    Raises:
        DualCodecError: weights that were asked for can't be had, or the folder can't be made.
    """
    report = Report("decode", as_json)
    kind = audio_format(kind)
    jobs = _jobs(inputs, (SUFFIX,), folder, f".{kind}", skip_existing, report)
    if not jobs:
        return report.finish()
    refuse_as_folder(folder)
    part = span_s != (None, None)
    codecs = CodecCache(options, any_weights)
    fresh = not folder.exists()
    _make(folder)

    def work(job: tuple[Found, Path]) -> tuple[dict[str, Any], str]:
        found, target = job
        codes = map_codes(found.path, check=not part).first(quantizers)
        codec = codecs.for_codes(codes)
        _tell_untrained(codes.untrained or codec.untrained, report)
        rate_hz = rate or codec.config.sample_rate
        start = time.perf_counter()
        _make(target.parent)
        if part:
            begin_s = span_s[0] or 0.0
            wave = decode_span(codec, codes, begin_s, span_s[1], rate)
            write_audio(target, wave, rate_hz, kind, _comment(codes, codec))
            samples = len(wave)
        else:
            samples = _decode(codec, codes, target, rate_hz, kind, chunk_frames, report)
        elapsed_s = time.perf_counter() - start
        result = {
            "input": str(found.path),
            "output": str(target),
            **_code_facts(codes),
            "output_rate_hz": rate_hz,
            "output_samples": samples,
            "decode_s": elapsed_s,
        }
        line = f"{found.path} -> {target}: {_code_line(codes)}; {samples} samples at {rate_hz} Hz"
        if part:
            return result, f"{line}, from {begin_s:g} s"
        return result, f"{line}; {_speed(codes, elapsed_s)}"

    report.each(jobs, lambda job: str(job[0].path), work)
    if fresh:
        _remove_empty(folder)
    return report.finish()


def _draw(recording: Any, source_rate_hz: int, target: Path, path: Path) -> None:
    import torch

    from dualcodec_ext._training.plots import draw_spectrograms

    after = read_audio(target)
    before = resample(recording, source_rate_hz, after.sample_rate_hz)
    draw_spectrograms(torch.from_numpy(before), torch.from_numpy(after.samples), after.sample_rate_hz, path)


def _opened(options: ModelOptions, report: Report, quantizers: int | None) -> Codec:
    codec = open_codec(options, quantizers)
    if options.model == DEFAULT_MODEL and options.weights is None:
        report.note(f"model: {DEFAULT_MODEL}, the default, with the package's weights (--model takes another)")
    _tell_untrained(codec.untrained, report)
    return codec


def _tell_untrained(untrained: bool, report: Report) -> None:
    report.facts["untrained"] = report.facts.get("untrained", False) or untrained
    if untrained:
        report.facts["note"] = UNTRAINED
        report.note(f"{UNTRAINED} (the weights are random numbers; --weights gives real ones)")


def _jobs(
    inputs: Sequence[str],
    suffixes: tuple[str, ...],
    folder: Path,
    ending: str,
    skip_existing: bool,
    report: Report,
) -> list[tuple[Found, Path]]:
    """Pairs of input and output; inputs that give nothing, and outputs that are an input or another's, are failures."""
    found, failed = find_inputs(inputs, suffixes)
    for argument, why in failed:
        report.fail(argument, why)
    taken: dict[str, Path] = {}
    read = file_keys(file.path for file in found)
    jobs = []
    for file in found:
        target = folder / file.relative.parent / (_stem(file.relative.name) + ending)
        key = os.path.realpath(target)  # two names may be links to one file
        if key in taken:
            report.fail(str(file.path), f"its output {target} is that of {taken[key]} too")
            continue
        taken[key] = file.path
        if file_keys([target]) & read:
            report.fail(str(file.path), f"its output {target} is an input as well")
            continue
        if skip_existing and target.exists():
            report.done(
                {"input": str(file.path), "output": str(target), "skipped": True},
                f"{file.path} -> {target}: is there already",
            )
            continue
        jobs.append((file, target))
    return jobs


def _stem(name: str) -> str:
    return name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else Path(name).stem


def _short(reader: AudioReader, chunk_frames: int | None) -> Any:
    """A recording that is to be encoded whole, read; None for one that is read as it is encoded."""
    return reader.whole() if chunk_for(reader.promised_s, chunk_frames) is None else None


def _encode(
    codec: Codec, reader: AudioReader, recording: Any, quantizers: int | None, chunk_frames: int | None, report: Report
) -> CodeFile:
    chunk = chunk_for(reader.promised_s, chunk_frames)
    if chunk is None:
        return codec.encode(recording, reader.sample_rate_hz, quantizers)
    with report.bar("encode", reader.promised_s) as advance:
        return encode_long(codec, reader, quantizers, chunk, advance)


def _decode(
    codec: Codec, codes: CodeFile, target: Path, rate_hz: int, kind: str, chunk_frames: int | None, report: Report
) -> int:
    """Decodes into a file, and returns the number of samples."""
    comment = _comment(codes, codec)
    chunk = chunk_for(codes.duration_s, chunk_frames)
    if chunk is None:
        samples, _ = codec.decode(codes, rate_hz)
        write_audio(target, samples, rate_hz, kind, comment)
        return len(samples)
    with report.bar("decode", codes.duration_s) as advance:
        return write_pieces(target, decode_long(codec, codes, rate_hz, chunk, advance), rate_hz, kind, comment)


def _comment(codes: CodeFile, codec: Codec) -> str | None:
    return UNTRAINED if codes.untrained or codec.untrained else None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DualCodecError(f"cannot make the folder {folder}: {reason(error)}") from error


def _remove_empty(folder: Path) -> None:
    """Takes back what a batch made for outputs that never came; a folder with something in it stays."""
    for path in [*sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True), folder]:
        with contextlib.suppress(OSError):
            path.rmdir()


def _code_facts(codes: CodeFile) -> dict[str, Any]:
    facts = codes.metadata()
    del facts["config"], facts["format_version"]
    return {**facts, "duration_s": codes.duration_s, "bitrate_bps": codes.bitrate_bps}


def _code_line(codes: CodeFile) -> str:
    rate = f"{codes.bitrate_bps / 1000:.3g} kbit/s"
    books = f"{codes.codebooks} codebook{'s' if codes.codebooks > 1 else ''}"
    note = f", {UNTRAINED}" if codes.untrained else ""
    return f"{codes.model}, {codes.duration_s:.2f} s, {codes.frames} frames of {books}, {rate}{note}"


def _speed(codes: CodeFile, elapsed_s: float) -> str:
    return f"{codes.duration_s / max(elapsed_s, 1e-9):.3g}x real time"
