"""How speech comes back from a model: STOI and PESQ by number of codebooks, and how its codebooks are used.

    python -m bench.quality --data SPEECH                       # the weights that the package brings
    python -m bench.quality --data SPEECH --weights RUN         # a run's, before they are taken into the package
    python -m bench.quality --data SPEECH --weights RUN --publish
    python -m bench.quality --against-float64                   # that part of the results alone, of the same weights

The scores are over recordings that no setting was chosen by: LibriVox's five clips and the five `cards` clips (joined
into one) of Debian's pocketsphinx-testdata, which apt-get fetches. The use of the codebooks is over the corpus's
validation split (`dualcodec_ext.speech_data`), of at least 20 frames per entry. Needs pystoi and pesq.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import reference, testing
from dualcodec_ext._training.data import load_voices, stretches
from dualcodec_ext._training.scores import missing_scorers, speech_scores
from dualcodec_ext._training.state import trained_steps
from dualcodec_ext.audio import read_audio, resample
from dualcodec_ext.code_use import codebook_use
from dualcodec_ext.hub import BUNDLED

from .machine import commit

PACKAGE = "pocketsphinx-testdata"
FRAMES_PER_ENTRY = 20
VALIDATION_CLIPS, VALIDATION_S = 20, 5


def main(argv: list[str] | None = None) -> int:
    """Print the table as Markdown and JSON; with --publish put the weights into the package."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the corpus, for its validation split")
    parser.add_argument("--against-float64", action="store_true", help="renew that part of --output; needs no corpus")
    parser.add_argument("--weights", type=Path, help="a run's folder [default: the package's weights]")
    parser.add_argument("--test", type=Path, help="pocketsphinx-testdata, unpacked [default: apt-get download]")
    parser.add_argument("--publish", action="store_true", help="copy the weights into the package, with their scores")
    parser.add_argument("--output", type=Path, default=Path("bench/results/quality_tiny.json"))
    options = parser.parse_args(argv)
    if options.against_float64:
        return renew_parity(options)
    if options.data is None:
        parser.error("--data must name the corpus")
    missing = missing_scorers()
    if missing:
        parser.error(f"{' and '.join(missing)} must be installed: pip install '.[train]'")
    model = dx.DualCodec.from_pretrained(options.weights or "tiny")
    model.prepare()
    with tempfile.TemporaryDirectory() as temporary:
        clips = test_clips(options.test or fetch(Path(temporary)))
    results: dict[str, Any] = {"clips": {name: round(clip.numel() / 24000, 2) for name, clip in clips.items()}}
    results["scores"] = scores(model, clips)
    results["validation"] = {"clips": VALIDATION_CLIPS, "seconds": VALIDATION_S}
    results["validation"]["scores"] = scores(model, validation_clips(options.data / "validation"))
    results |= use(model, options.data / "validation")
    results["against_float64"] = parity(model, clips.values())
    path = options.weights / "model.safetensors" if options.weights else BUNDLED["tiny"]
    with safe_open(str(path), framework="numpy") as file:
        results["trained_steps"] = trained_steps(file.metadata())
    results["weights_sha256"] = weights_sha256(path)
    results["commit"], results["dirty"] = commit()
    print("| codebooks | STOI | PESQ (wide band) |\n|---|---|---|")
    for count, row in results["scores"].items():
        print(f"| {count} | {row['stoi']:.3f} | {row['pesq']:.2f} |")
    print(json.dumps(results))
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    if options.publish:
        publish(options.weights, results)
    return 0


def fetch(folder: Path) -> Path:
    """Download and unpack the test recordings."""
    subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=folder, check=True, capture_output=True)
    deb = next(folder.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "root")], check=True)
    return folder / "root"


def test_clips(root: Path) -> dict[str, Tensor]:
    """Read the recordings, [1, 1, S] at 24 kHz each; the short `cards` ones are one clip."""
    folder = root / "usr/share/pocketsphinx/test/data"
    clips = {}
    for path in sorted((folder / "librivox").glob("*.wav")):
        clips[path.stem] = [path]
    clips["cards"] = sorted((folder / "cards").glob("*.wav"))
    read = {}
    for name, paths in clips.items():
        parts = [read_audio(path) for path in paths]
        samples = [resample(part.samples, part.sample_rate_hz, 24000) for part in parts]
        read[name] = torch.from_numpy(np.concatenate(samples))[None, None]
    return read


def validation_clips(folder: Path) -> dict[str, Tensor]:
    """Cut evenly spaced stretches out of the validation split's voices, [1, 1, S] at 24 kHz each."""
    cuts = stretches(load_voices(folder, 24000), VALIDATION_S * 24000, VALIDATION_CLIPS)
    return {f"{name} {i}": clip for i, (name, clip) in enumerate(cuts)}


@torch.no_grad()
def scores(model: dx.DualCodec, clips: dict[str, Tensor]) -> dict[int, dict[str, float]]:
    """Means over the clips, by number of codebooks."""
    table: dict[int, dict[str, list[float]]] = {}
    for clip in clips.values():
        semantic, acoustic = model.encode(clip)
        assert acoustic is not None
        for count in range(1, 2 + acoustic.shape[1]):
            wave = model.decode_from_codes(semantic, acoustic[:, : count - 1] if count > 1 else None)
            row = table.setdefault(count, {})
            for name, value in speech_scores(clip[0, 0], wave[0, 0, : clip.shape[-1]], 24000).items():
                row.setdefault(name, []).append(value)
    return {
        count: {name: round(float(np.mean(values)), 4) for name, values in row.items()} for count, row in table.items()
    }


@torch.no_grad()
def use(model: dx.DualCodec, folder: Path) -> dict[str, Any]:
    """Share of each codebook's entries that occur, and entropies, over held-out speech of the training's domain."""
    voices = load_voices(folder, 24000)
    sizes = [model.settings["semantic_codebook_size"]] + [model.dac.codebook_size] * model.dac.n_codebooks
    wanted = FRAMES_PER_ENTRY * max(sizes)
    seconds = 10
    most = -(-wanted // (seconds * 24000 // model.dac.hop_length))
    rows: list[Tensor] = []
    for _, clip in stretches(voices, seconds * 24000, most + len(voices)):
        semantic, acoustic = model.encode(clip)
        assert acoustic is not None
        rows.append(torch.cat([semantic, acoustic], 1)[0])
    codes = torch.cat(rows, 1)
    return {**codebook_use(codes, sizes), "frames": codes.shape[1]}


@torch.no_grad()
def against_float64(model: dx.DualCodec, audio: Tensor) -> Iterator[tuple[testing.CodeReport, Tensor]]:
    """Search again in float64 what [B, 1, S] is coded as: how the codes compare, and whose margins are unclear.

    Unclear are those that the rounding of a float32 latent may turn, with 2**-16 of its size for the latent's error.
    The semantic codes come first.
    """
    exact = reference.DualCodec(**model.settings).eval()
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    semantic, acoustic = model.encode(audio)
    assert acoustic is not None
    subtracted = exact.convnext_decoder(exact.semantic_vq.from_codes(semantic)[0])
    latent = exact.dac.encoder(exact.dac.preprocess(audio.double(), None)) - subtracted
    features = model.semantic_features(audio).double()
    for codes, z, rvq in (
        (semantic, exact.convnext_encoder(features), exact.semantic_vq),
        (acoustic, latent, exact.dac.quantizer),
    ):
        tensors = rvq.op_tensors(torch.float64)
        expected, _, margins = reference.rvq_search_ref(z, **tensors, return_margin=True)
        bound = testing.rvq_margin_bound(z, **tensors, relative_error=2.0**-16)
        yield testing.compare_codes(codes, expected, margins, bound), margins < bound


def parity(model: dx.DualCodec, clips: Iterable[Tensor]) -> dict[str, Any]:
    """Codes of clips beside float64's: how many there are, are equal, and lie below the margin that decides them; and
    how many frames there are, and hold a code below it."""
    codes = equal = unclear = frames = unclear_frames = 0
    for clip in clips:
        of_frames = []
        for report, below in against_float64(model, clip):
            codes, equal, unclear = codes + report.total, equal + report.equal, unclear + int(below.sum())
            of_frames.append(below.any(1))
        frames += of_frames[0].numel()
        unclear_frames += int(torch.stack(of_frames).any(0).sum())
    found = {"codes": codes, "equal": equal, "below_margin_bound": unclear}
    return found | {"frames": frames, "frames_below_margin_bound": unclear_frames}


def renew_parity(options: argparse.Namespace) -> int:
    """Compare the package's weights with float64 again, and put what comes of it into the results."""
    results = json.loads(options.output.read_text())
    path = BUNDLED["tiny"]
    if weights_sha256(path) != results["weights_sha256"]:
        print(f"{options.output} must be of the package's weights: without --against-float64 all is scored again")
        return 1
    model = dx.DualCodec.from_pretrained("tiny")
    with tempfile.TemporaryDirectory() as temporary:
        clips = test_clips(options.test or fetch(Path(temporary)))
    results["against_float64"] = parity(model, clips.values()) | dict(zip(("commit", "dirty"), commit(), strict=True))
    print(json.dumps(results["against_float64"]))
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def weights_sha256(path: Path) -> str:
    """Digest of a file's tensors: names, dtypes, shapes and values, whatever the file says about itself beside them."""
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, values in sorted(load_file(str(path)).items()):
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def publish(run: Path, results: dict[str, Any]) -> None:
    """Put a run's weights into the package."""
    from safetensors.torch import load_file, save_file

    facts = {name: json.dumps(results[name]) for name in ("codebook_use", "entropy_bits", "trained_steps")}
    BUNDLED["tiny"].parent.mkdir(exist_ok=True)
    save_file(load_file(str(run / "model.safetensors")), str(BUNDLED["tiny"]), {"format": "pt", **facts})


if __name__ == "__main__":
    sys.exit(main())
