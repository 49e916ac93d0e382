"""The command `dualcodec-ext`: what it is called, what it takes, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dualcodec_ext._cli import options as opt
from dualcodec_ext._cli.report import FAILED, PROGRAM, debugging, explain, fatal_json, say_error

# Nothing else of the package is imported here: each command imports what it needs, so that --help answers at once.

app = typer.Typer(
    name=PROGRAM,
    help="DualCodec, a neural speech codec: speech to codes and back.",
    epilog="Exit codes: 0 all went well, 1 verify found a difference, 2 something failed (one line on stderr says "
    "what), 130 Ctrl-C, 141 the reader of a pipe has gone, as head does, 143 SIGTERM. "
    "DUALCODEC_EXT_DEBUG=1 shows errors in full.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"{PROGRAM} {version('dualcodec-ext')}")
        except PackageNotFoundError:
            print(f"{PROGRAM} (not installed)")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    pass


@app.command()
def roundtrip(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Audio file: any format that libsndfile reads, any rate.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Audio file to write; its ending gives the format.")],
    model: opt.Model = opt.DEFAULT_MODEL,
    weights: opt.Weights = None,
    w2v: opt.W2v = None,
    quantizers: opt.Quantizers = None,
    rate: opt.Rate = None,
    kind: opt.Format = None,
    codes: Annotated[Path | None, typer.Option("--codes", metavar="FILE", help="Write the codes too.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw the spectrograms of both: .png, .pdf, ... (needs matplotlib)."
        ),
    ] = None,
    dtype: opt.DtypeOption = opt.Dtype.float32,
    fast: opt.Fast = False,
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    seed: opt.Seed = 0,
    chunk_frames: opt.ChunkFrames = None,
    whole_features: opt.WholeFeatures = False,
    as_json: opt.Json = False,
) -> None:
    """Encode an audio file, decode the codes, and write what comes back.

    Stereo is averaged. The output has the model's sample rate, or --rate, and the input's exact length.
    """
    from dualcodec_ext._cli.commands import run_roundtrip

    settings = opt.ModelOptions(model, weights, w2v, dtype.value, device, threads, seed, fast, whole_features)
    also = (codes, plot, chunk_frames, as_json)
    raise typer.Exit(run_roundtrip(source, target, settings, quantizers, rate, kind, *also))


@app.command()
def encode(
    inputs: opt.Inputs,
    folder: opt.OutputFolder,
    model: opt.Model = opt.DEFAULT_MODEL,
    weights: opt.Weights = None,
    w2v: opt.W2v = None,
    quantizers: opt.Quantizers = None,
    dtype: opt.DtypeOption = opt.Dtype.float32,
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    seed: opt.Seed = 0,
    chunk_frames: opt.ChunkFrames = None,
    whole_features: opt.WholeFeatures = False,
    skip_existing: opt.SkipExisting = False,
    as_json: opt.Json = False,
) -> None:
    """Turn audio files into code files: DIR/NAME.codes.safetensors.

    Folders keep their structure below DIR. A file that fails is listed at the end, and the others go on.
    """
    from dualcodec_ext._cli.commands import run_encode

    settings = opt.ModelOptions(model, weights, w2v, dtype.value, device, threads, seed, whole_features=whole_features)
    raise typer.Exit(run_encode(inputs, folder, settings, quantizers, chunk_frames, skip_existing, as_json))


@app.command()
def decode(
    inputs: opt.Inputs,
    folder: opt.OutputFolder,
    model: opt.DecodeModel = None,
    weights: opt.Weights = None,
    quantizers: opt.Quantizers = None,
    rate: opt.Rate = None,
    kind: opt.Format = None,
    dtype: opt.DtypeOption = opt.Dtype.float32,
    fast: opt.Fast = False,
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    seed: opt.DecodeSeed = None,
    begin_s: Annotated[
        float | None, typer.Option("--from", min=0, help="Decode from this second on.", show_default="the beginning")
    ] = None,
    end_s: Annotated[
        float | None, typer.Option("--to", min=0, help="Decode up to this second.", show_default="the end")
    ] = None,
    chunk_frames: opt.ChunkFrames = None,
    any_weights: Annotated[
        bool, typer.Option("--any-weights", help="Decode even where the codes were made with other weights.")
    ] = False,
    skip_existing: opt.SkipExisting = False,
    as_json: opt.Json = False,
) -> None:
    """Turn code files back into audio files: DIR/NAME.wav.

    Each code file says which model made it. The audio has the model's sample rate, or --rate, and the exact length of
    the recording that was encoded. --from and --to decode a part of it, as it is in the whole, and nothing else.
    """
    from dualcodec_ext._cli.commands import run_decode

    settings = opt.ModelOptions(model, weights, None, dtype.value, device, threads, seed, fast)
    chosen = (quantizers, rate, kind or "wav", (begin_s, end_s), chunk_frames, any_weights, skip_existing)
    raise typer.Exit(run_decode(inputs, folder, settings, *chosen, as_json))


@app.command()
def stream(
    source: Annotated[
        str,
        typer.Option("--in", metavar="FILE|-", help="Audio file, or raw mono PCM at the model's rate: - or FILE.raw."),
    ],
    target: Annotated[
        str, typer.Option("--out", metavar="FILE|-", help="Raw PCM goes to - and to FILE.raw, audio to FILE.wav, ...")
    ],
    model: opt.Model = opt.DEFAULT_MODEL,
    weights: opt.Weights = None,
    quantizers: opt.Codebooks = None,
    sample_format: opt.PcmFormat = opt.Pcm.s16le,
    piece_ms: Annotated[float, typer.Option("--piece-ms", help="Audio that is taken in at a time.")] = 20.0,
    paced: Annotated[bool, typer.Option("--paced", help="Take it in as fast as it was spoken, not faster.")] = False,
    lookahead: opt.Lookahead = None,
    dtype: opt.DtypeOption = opt.Dtype.float32,
    threads: opt.LiveThreads = 1,
    seed: opt.Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, on stderr too.")] = False,
) -> None:
    """Send audio through encoder and decoder piece by piece as it comes, and say how long each frame took.

    Needs a model with a causal encoder and features of its own, such as tiny. The latency of a frame is the time from
    its last sample in to its last sample out; percentiles are printed on stderr at the end.

    Ctrl-C is the end of a pipe's or a device's audio: the output is completed, and a second one gives up. Where the
    input is a file, Ctrl-C gives up at once, as SIGTERM always does; a file is then not written.
    """
    from dualcodec_ext._cli.interrupt import telling

    settings = opt.ModelOptions(model, weights, None, dtype.value, "cpu", threads, seed)
    how = (quantizers, sample_format.value, piece_ms, paced, lookahead, as_json)
    with telling(target):
        from dualcodec_ext._cli.live import run_stream

        code = run_stream(source, target, settings, *how)
    raise typer.Exit(code)


@app.command()
def serve(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 127.0.0.1 is reached from this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8765,
    model: opt.Model = opt.DEFAULT_MODEL,
    weights: opt.Weights = None,
    streams: Annotated[
        int, typer.Option("--streams", min=1, max=1024, help="At a time; further ones are refused.")
    ] = 32,
    message_bytes: Annotated[
        int, typer.Option("--message-bytes", min=16, max=1 << 30, help="The longest message that a client may send.")
    ] = 1 << 20,
    ahead_s: Annotated[
        float, typer.Option("--ahead-s", help="Seconds of audio in a stream's queues; who sends faster waits.")
    ] = 10.0,
    idle_s: Annotated[
        float, typer.Option("--idle-s", help="A client that sends nothing for so long is dropped.")
    ] = 60.0,
    stall_s: Annotated[
        float, typer.Option("--stall-s", help="A client that reads nothing for so long is dropped.")
    ] = 10.0,
    origins: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", help="Pages of this site, https://example.org, may open streams too."),
    ] = None,
    lookahead: opt.Lookahead = None,
    dtype: opt.DtypeOption = opt.Dtype.float32,
    fast: opt.Fast = False,
    device: opt.Device = "cpu",
    threads: opt.LiveThreads = 1,
    seed: opt.Seed = 0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say on stderr when a stream opens, and why it ends.")
    ] = False,
) -> None:
    """Serve streams over WebSockets: audio in and codes out, codes in and audio out, or both.

    A page to try it is at /, metrics are at /metrics; docs/serving.md describes the protocol. On SIGTERM and Ctrl-C
    what clients have sent is still served, and they are told.
    """
    from dualcodec_ext._cli.live import run_serve
    from dualcodec_ext.serving import ServeOptions

    limits = ServeOptions(
        host=host,
        port=port,
        streams=streams,
        message_bytes=message_bytes,
        ahead_s=ahead_s,
        idle_s=idle_s,
        stall_s=stall_s,
        lookahead=lookahead,
        origins=tuple(origins or ()),
    )
    settings = opt.ModelOptions(model, weights, None, dtype.value, device, threads, seed, fast)
    raise typer.Exit(run_serve(settings, limits, verbose))


@app.command()
def info(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="A code file, a weights file or an audio file.", show_default="tiny's weights"
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Say what a code file, a weights file or an audio file holds."""
    from dualcodec_ext._cli.inspect import run_info

    raise typer.Exit(run_info(file, as_json))


@app.command()
def doctor(as_json: opt.Json = False) -> None:
    """Say what was built, what can run here, and how to mend what can't."""
    from dualcodec_ext._cli.inspect import run_doctor

    raise typer.Exit(run_doctor(as_json))


@app.command()
def verify(
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="Safetensors file, a folder that holds it, or a hub name.")
    ],
    audio: Annotated[
        Path | None,
        typer.Option("--audio", help="Speech to compare on.", show_default="a generated vowel sequence"),
    ] = None,
    w2v: opt.W2v = None,
    model: opt.Model = "12hz_v1",
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Compare this package with the plain PyTorch reference on real weights: keys, codes, margins and waveform.

    Also with the PyPI package `dualcodec` where it is installed. Prints one verdict; exit code 0 for PASS, 1 for FAIL.
    """
    from dualcodec_ext.verify import run_verify

    settings = opt.ModelOptions(model, weights, w2v, "float32", "cpu", threads, 0)
    raise typer.Exit(run_verify(settings, audio, as_json))


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Option("--data", metavar="DIR", help="Speech: DIR/train and DIR/validation, one folder per speaker."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Checkpoints, weights, log and pictures.")],
    config: Annotated[
        str, typer.Option("--config", help="Recipe: a JSON file, or the name of one in the package (tiny).")
    ] = "tiny",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    init: Annotated[
        str | None,
        typer.Option("--init", metavar="PRESET", help="Start from this model's weights, as far as they fit."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", "-w", help="Where the weights to start from are.", show_default="the hub")
    ] = None,
    w2v: Annotated[
        str | None,
        typer.Option(
            "--w2v", help="Folder or hub name of the w2v-BERT 2.0 model, for models on its features; tiny's need none."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="In place of the recipe's.")] = None,
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    as_json: opt.Json = False,
) -> None:
    """Train a model: from nothing, from a checkpoint (--init), or from where a run stopped (--resume).

    Writes checkpoint.pt, model.safetensors, config.json, log.jsonl, curves.png and spectrograms.png.
    """
    from dualcodec_ext._cli.train import run_train

    raise typer.Exit(run_train(config, data, out, resume, init, weights, w2v, steps, device, threads, as_json))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Run `python -m bench` with the arguments given, from a checkout of the repository."""
    from dualcodec_ext._cli.inspect import run_bench

    raise typer.Exit(run_bench(context.args))


def _drop_stdout() -> None:
    # What is still buffered must not be tried again when Python exits: that would be a second, longer message.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_gone() -> int:
    # It has seen what it wanted: quiet, and with the exit code that a shell gives a program which SIGPIPE ended.
    _drop_stdout()
    return 128 + 13


def _stop(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; None for those of the process.
    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        signal.signal(signal.SIGTERM, _stop)  # like Ctrl-C, it leaves no half-written file behind
    try:
        code = app(arguments or ["--help"], prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as error:
        # The argument parser turns a BrokenPipeError into exit code 1, which verify's FAIL has.
        if isinstance(error.__context__, BrokenPipeError):
            return _reader_gone()
        raise
    except Exception as error:
        if isinstance(error, OSError):
            _drop_stdout()
        if type(error).__name__ == "Abort":  # Ctrl-C, in the words of older releases of typer
            return 130
        if debugging() and not hasattr(error, "format_message"):
            raise
        say_error(explain(error))
        if "--json" in arguments:
            fatal_json(explain(error))
        return FAILED
