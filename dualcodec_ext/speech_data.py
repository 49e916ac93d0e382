"""The speech that preset `tiny` is trained on, made from Debian's packages: `python -m dualcodec_ext.speech_data OUT`.

Recorded prompts of five speakers (asterisk-core-sounds-*, g722 at 16 kHz) and synthetic speech of flite and espeak-ng.
Needs a Debian system: apt-get, dpkg-deb, ffmpeg, and the packages flite and espeak-ng.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ._files import reason, remove_if_there, write_atomic
from .errors import DualCodecError

LANGUAGES = ("en", "es", "fr", "it", "ru")
# Never trained on: a speaker and a language that nothing else holds, and a synthetic voice. They choose the settings.
VALIDATION = ("ru_RU_f_IvrvoiceRU", "flite-awb")
FLITE_VOICES = ("awb", "kal16", "rms", "slt")
# Language, variant, and the sentences read: one voice each of several languages and larynxes.
ESPEAK_VOICES = ("en-us+m3", "en-gb+f2", "de+m5", "pt-br+f4", "pl+m1", "fi+f5", "cmn+f3", "hi+m7")
_PROGRAMS = {"apt-get": "apt", "dpkg-deb": "dpkg", "ffmpeg": "ffmpeg", "flite": "flite", "espeak-ng": "espeak-ng"}
# Shorter than 0.2 s at 64 kbit/s: an empty prompt.
_FEWEST_BYTES = 1600
_TEXT = "asterisk-core-sounds-en"
_FILES_PER_CALL = 40
_SENTENCES_PER_FILE = 12
_ESPEAK_FILES = 12
_LICENCES = {
    "recorded": "CC-BY-SA-3.0 (it, ru: CC-BY-3.0); Debian packages asterisk-core-sounds-{en,es,fr,it,ru}-g722",
    "flite": "speech made by flite (BSD-like licence; voices by Carnegie Mellon University) from the English prompts'"
    " text (CC-BY-SA-3.0)",
    "espeak": "speech made by espeak-ng (GPL-3.0-or-later, which does not reach its output) from the English prompts'"
    " text (CC-BY-SA-3.0)",
}


@dataclass(frozen=True)
class Clip:
    """One file of the corpus, for its manifest."""

    file: str
    split: str
    speaker: str
    source: str  # a key of the manifest's licences


def main(argv: list[str] | None = None) -> int:
    """Make the corpus.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0, or 2 with one line on stderr.
    """
    parser = argparse.ArgumentParser(prog="python -m dualcodec_ext.speech_data", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to make: OUT/train, OUT/validation, OUT/manifest.json")
    parser.add_argument(
        "--packages", type=Path, help="folder that holds the .deb files already (else apt-get download)"
    )
    options = parser.parse_args(argv)
    try:
        clips = prepare(options.out, options.packages)
    except (DualCodecError, OSError, subprocess.SubprocessError) as error:
        print(f"speech_data: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for split in ("train", "validation"):
        own = [clip for clip in clips if clip.split == split]
        print(f"{split}: {len(own)} files of {len({clip.speaker for clip in own})} voices")
    return 0


def prepare(out: Path, packages: Path | None = None) -> list[Clip]:
    """Make the corpus below `out`.

    Args:
        out: made if missing; files that are there already are kept, all of them whole: a run that was stopped, by
            whatever, goes on.
        packages: folder with the .deb files; None fetches them with apt-get.

    Returns:
        What was made, the manifest's content.

    Raises:
        DualCodecError: a program is missing, or the packages can't be had.
    """
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise DualCodecError(f"{program} is needed: apt-get install {package}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DualCodecError(f"cannot make the folder {out}: {reason(error)}") from error
    with tempfile.TemporaryDirectory() as temporary:
        root = _unpack(packages, Path(temporary))
        sentences = _sentences(root / f"usr/share/doc/{_TEXT}/core-sounds-en.txt.gz")
        clips = [*_recorded(root, out), *_flite(sentences, out), *_espeak(sentences, out)]
        for licence in sorted((root / "usr/share/doc").glob("*-g722/copyright"))[:1]:
            shutil.copy(licence, out / "COPYRIGHT.asterisk-core-sounds")
    manifest = {"licences": _LICENCES, "validation": list(VALIDATION), "clips": [asdict(clip) for clip in clips]}
    write_atomic(out / "manifest.json", json.dumps(manifest, indent=1).encode())
    return clips


def _unpack(packages: Path | None, work: Path) -> Path:
    names = [f"asterisk-core-sounds-{language}-g722" for language in LANGUAGES] + [_TEXT]
    if packages is None:
        # Debian's own signatures are checked by apt-get.
        packages = work
        _run(["apt-get", "download", "-q", *names], work)
    root = work / "root"
    for name in names:
        found = sorted(packages.glob(f"{name}_*.deb"))
        if not found:
            raise DualCodecError(f"{packages} must hold {name}_*.deb, it does not")
        _run(["dpkg-deb", "-x", str(found[-1].resolve()), str(root)], work)
    return root


def _run(command: Sequence[str], folder: Path | None = None, text: str | None = None) -> None:
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DualCodecError(f"{command[0]} failed with exit code {done.returncode}: {last}")


def _sentences(path: Path) -> list[str]:
    """The English prompts' words, one a line; what stands in brackets is a sound."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines()
    texts = [line.partition(":")[2].strip() for line in lines if ":" in line and not line.startswith(";")]
    return [text for text in texts if len(text) > 12 and not re.search(r"[\[\]<>]", text)]


@contextlib.contextmanager
def _whole(*paths: Path) -> Iterator[list[Path]]:
    """Give names for programs to write to, of the same ending; the files take their own when the block ends.

    They are hidden: whoever reads the folder's audio passes over what a killed run left.
    """
    making = [path.with_name(f".{path.name}") for path in paths]
    try:
        yield making
        for temporary, path in zip(making, paths, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in making:
            remove_if_there(str(temporary))


def _place(out: Path, speaker: str) -> tuple[str, Path]:
    split = "validation" if speaker in VALIDATION else "train"
    folder = out / split / speaker
    folder.mkdir(parents=True, exist_ok=True)
    return split, folder


def _recorded(root: Path, out: Path) -> Iterator[Clip]:
    """Decode the prompts to FLAC at their own 16 kHz, some files per call of ffmpeg."""
    for folder in sorted((root / "usr/share/asterisk/sounds").iterdir()):
        split, target = _place(out, folder.name)
        jobs = []
        for source in sorted(folder.rglob("*.g722")):
            relative = source.relative_to(folder)
            if relative.parts[0] == "silence" or source.stat().st_size < _FEWEST_BYTES:
                continue
            jobs.append((source, target / ("_".join(relative.parts).removesuffix(".g722") + ".flac")))
        for some in _batches([job for job in jobs if not job[1].exists()], _FILES_PER_CALL):
            inputs = itertools.chain.from_iterable(("-f", "g722", "-i", str(source)) for source, _ in some)
            with _whole(*(flac for _, flac in some)) as making:
                outputs = itertools.chain.from_iterable(
                    ("-map", f"{i}:a", "-ar", "16000", "-ac", "1", str(flac)) for i, flac in enumerate(making)
                )
                _run(["ffmpeg", "-nostdin", "-v", "error", "-y", *inputs, *outputs])
        for _, flac in jobs:
            yield Clip(str(flac.relative_to(out)), split, folder.name, "recorded")


def _batches(items: list[tuple[Path, Path]], size: int) -> Iterator[list[tuple[Path, Path]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _passages(sentences: Sequence[str], first: int) -> Iterator[str]:
    """The sentences from the `first` on, a few to a file."""
    turned = [*sentences[first:], *sentences[:first]]
    for start in range(0, len(turned), _SENTENCES_PER_FILE):
        yield "\n".join(turned[start : start + _SENTENCES_PER_FILE])


def _flite(sentences: Sequence[str], out: Path) -> Iterator[Clip]:
    for voice in FLITE_VOICES:
        speaker = f"flite-{voice}"
        split, target = _place(out, speaker)
        for i, text in enumerate(_passages(sentences, 0)):
            path = target / f"{i:03}.wav"
            if not path.exists():
                with _whole(path) as (making,):
                    _run(["flite", "-voice", voice, "-t", text.replace("\n", " "), "-o", str(making)])
            yield Clip(str(path.relative_to(out)), split, speaker, "flite")


def _espeak(sentences: Sequence[str], out: Path) -> Iterator[Clip]:
    for k, voice in enumerate(ESPEAK_VOICES):
        speaker = f"espeak-{voice}"
        split, target = _place(out, speaker)
        passages: Iterable[str] = itertools.islice(_passages(sentences, 37 * k), _ESPEAK_FILES)
        for i, text in enumerate(passages):
            path = target / f"{i:03}.wav"
            if not path.exists():
                speed = str(140 + 12 * (i % 5))
                with _whole(path) as (making,):
                    _run(["espeak-ng", "-v", voice, "-s", speed, "--stdin", "-w", str(making)], text=text)
            yield Clip(str(path.relative_to(out)), split, speaker, "espeak")


if __name__ == "__main__":
    sys.exit(main())
