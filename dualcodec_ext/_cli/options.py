"""The options that several commands share, each written once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

# The package brings its weights, so that it needs no network.
DEFAULT_MODEL = "tiny"


class Dtype(StrEnum):
    """Number format of the model's weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Pcm(StrEnum):
    """Raw samples, one channel, little-endian: 16-bit integers, or floats of full scale 1."""

    s16le = "s16le"
    f32le = "f32le"


@dataclass(frozen=True)
class ModelOptions:
    """Which model runs, and how.

    Args:
        model: preset name or path of a JSON file of settings; None where a code file says it.
        weights: safetensors file, folder that holds one, or hub name; None for the package's own where it has them,
            else for seeded random weights.
        w2v: folder or hub name of the w2v-BERT 2.0 model; None for the default.
        dtype: float32, bfloat16 or float16.
        device: torch device.
        threads: CPU threads; None for torch's choice.
        seed: of the random weights; None for 0, or for what a code file says.
        fast: decode on the faster, less exact path.
        whole_features: compute w2v-BERT's features of a long recording in one piece.
    """

    model: str | None = DEFAULT_MODEL
    weights: str | None = None
    w2v: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    seed: int | None = None
    fast: bool = False
    whole_features: bool = False


Model = Annotated[
    str, typer.Option("--model", "-m", help="Preset (tiny, 12hz_v1, 25hz_v1, ...) or a JSON file of settings.")
]
DecodeModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Refuse code files of another model.", show_default="what each file says"),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        help="Safetensors file, a folder that holds it, or a hub name (amphion/dualcodec). "
        "Without it tiny has the package's own; the weights of any other model are then seeded random numbers, "
        "and the result is not intelligible.",
    ),
]
W2v = Annotated[
    str | None,
    typer.Option(
        "--w2v",
        help="Folder or hub name of the w2v-BERT 2.0 model that gives the semantic features; tiny needs none. With "
        "--weights the default is facebook/w2v-bert-2.0; without either, log-mel features through a seeded matrix take "
        "its place.",
    ),
]
Quantizers = Annotated[
    int | None,
    typer.Option(
        "--quantizers", "-q", min=1, help="Codebooks to use, the semantic one among them.", show_default="all"
    ),
]
Codebooks = Annotated[
    int | None,
    typer.Option("--codebooks", "-q", min=1, help="Codebooks to use, the semantic one among them.", show_default="all"),
]
PcmFormat = Annotated[Pcm, typer.Option("--format", "-f", help="Of raw PCM, in and out: 16-bit integers or floats.")]
Lookahead = Annotated[
    int | None,
    typer.Option(
        "--lookahead",
        min=0,
        help="Frames that the output may run behind; fewer than the model needs is an approximation.",
        show_default="as many as it needs",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Number format of the model.")]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1, ...")]
Fast = Annotated[
    bool,
    typer.Option("--fast", help="Decode faster, to within 1e-4 of full scale; float32 on the CPU alone."),
]
ChunkFrames = Annotated[
    int | None,
    typer.Option(
        "--chunk-frames",
        min=0,
        help="Frames that are worked on at a time, which changes no result; 0 takes recordings whole.",
        show_default="1500 past one minute, else 0",
    ),
]
WholeFeatures = Annotated[
    bool,
    typer.Option(
        "--whole-features",
        help="Compute w2v-BERT's features in one piece past one minute too, rather than in windows of 30 s, an "
        "approximation; time then grows with the square of the length, and on a GPU memory.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="torch's choice")]
# Steps of few frames are short, and threads that wait for each other lose more than they win on a busy machine.
LiveThreads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of a step of the model.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random weights where --weights is not given.")]
DecodeSeed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed of the random weights.", show_default="what each file says"),
]
Rate = Annotated[
    int | None,
    typer.Option(
        "--rate", "-r", min=1, max=1_000_000, help="Sample rate of the output in Hz.", show_default="the model's"
    ),
]
Format = Annotated[str | None, typer.Option("--format", "-f", help="wav, flac, ogg, opus, mp3, aiff, au, caf, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text, and no progress bar.")]
SkipExisting = Annotated[bool, typer.Option("--skip-existing", help="Leave out inputs whose output is there already.")]
Inputs = Annotated[
    list[str],
    typer.Argument(metavar="IN...", help="Files, folders (searched to the bottom) and patterns such as 'a/**/*.flac'."),
]
OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results; made if it is missing.")
]
