"""The corpus of `tiny`: who is held out, what is read and kept, and that a run which is stopped leaves whole files."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dualcodec_ext import speech_data
from dualcodec_ext._files import find_inputs
from dualcodec_ext._training.data import load_voices
from dualcodec_ext.errors import DualCodecError
from dualcodec_ext.speech_data import ESPEAK_VOICES, FLITE_VOICES, VALIDATION, _place, _sentences, _whole, prepare

TEXT = """; a comment: which nobody says
agent-alreadyon: That agent is already logged on.
beep: [this is a simple beep tone]
activated: Activated.
ascending: ascending <tone> of some length
no colon stands in this line of text
time:  The time is: now a quarter past.
"""


@pytest.mark.parametrize("speaker", [*VALIDATION, "en_US_f_Allison", "flite-slt", "espeak-de+m5"])
def test_held_out_speakers_have_a_place_of_their_own(tmp_path: Path, speaker: str) -> None:
    split, folder = _place(tmp_path, speaker)
    assert split == ("validation" if speaker in ("ru_RU_f_IvrvoiceRU", "flite-awb") else "train")
    assert folder == tmp_path / split / speaker and folder.is_dir()
    assert _place(tmp_path, speaker) == (split, folder)  # again, where it is there


def test_sentences_are_what_is_said(tmp_path: Path) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(TEXT.encode() + b"bytes: of another \xe9ncoding\n"))
    assert _sentences(path) == [
        "That agent is already logged on.",
        "The time is: now a quarter past.",
        "of another \ufffdncoding",
    ]


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    one, two = tmp_path / "one.wav", tmp_path / "two.wav"
    with pytest.raises(KeyboardInterrupt), _whole(one, two) as making:
        assert [path.suffix for path in making] == [".wav", ".wav"]  # by which a program knows the format
        making[0].write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with _whole(one, two) as making:
        for path in making:
            path.write_text(path.name)
        assert not one.exists() and not two.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.wav", "two.wav"]


class Programs:
    """Stands in for ffmpeg, flite and espeak-ng: writes a second of sound under every name that is asked for."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.fails_at: int | None = None
        self.texts: list[str] = []

    def __call__(self, command: Sequence[str], folder: Path | None = None, text: str | None = None) -> None:
        self.commands.append(list(command))
        if command[0] == "ffmpeg":
            names = [b for a, b in itertools.pairwise(command) if a == "1"]
        else:
            names = [command[-1]]
            self.texts.append(text or command[command.index("-t") + 1])
        assert names
        for name in names:
            if len(self.commands) == self.fails_at:
                Path(name).write_bytes(b"RIFF, cut short")
                raise DualCodecError(f"{command[0]} failed")
            soundfile.write(name, np.full(16000, 0.1), 16000)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """With packages of two speakers, of whose prompts one is silence and one is empty."""
    root, found = tmp_path / "root", Programs()
    text = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    text.parent.mkdir(parents=True)
    text.write_bytes(gzip.compress("".join(f"{i}: Sentence number {i}.\n" for i in range(30)).encode()))
    (root / "usr/share/doc/asterisk-core-sounds-en-g722").mkdir()
    (root / "usr/share/doc/asterisk-core-sounds-en-g722/copyright").write_text("CC-BY-SA")
    for speaker in ("en_US_f_Allison", VALIDATION[0]):
        for name, size in (("hello", 4000), ("digits/1", 2000), ("empty", 100), ("silence/1", 8000)):
            path = root / f"usr/share/asterisk/sounds/{speaker}/{name}.g722"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(size))
    monkeypatch.setattr(speech_data, "_run", found)
    monkeypatch.setattr(speech_data, "_unpack", lambda packages, work: root)
    monkeypatch.setattr(speech_data.shutil, "which", lambda program: f"/usr/bin/{program}")
    return found


def test_the_corpus(programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speech"
    assert speech_data.main([str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    clips = manifest["clips"]
    assert {clip["source"] for clip in clips} == manifest["licences"].keys() == {"recorded", "flite", "espeak"}
    made = {str(path.relative_to(out)) for split in ("train", "validation") for path in (out / split).rglob("*.*")}
    assert made == {clip["file"] for clip in clips} and len(made) == len(clips)
    assert all(clip["file"].startswith(f"{clip['split']}/{clip['speaker']}/") for clip in clips)
    recorded = [clip["file"] for clip in clips if clip["source"] == "recorded"]
    assert recorded[:2] == ["train/en_US_f_Allison/digits_1.flac", "train/en_US_f_Allison/hello.flac"]
    assert {clip["speaker"] for clip in clips if clip["split"] == "validation"} == set(VALIDATION)
    assert {voice.name for voice in load_voices(out / "validation", 24000)} == set(VALIDATION)
    assert len(load_voices(out / "train", 24000)) == 1 + len(FLITE_VOICES) - 1 + len(ESPEAK_VOICES)
    assert (out / "COPYRIGHT.asterisk-core-sounds").read_text() == "CC-BY-SA"
    # Every voice says every sentence; 30 of them are three files.
    assert len(programs.texts) == 3 * (len(FLITE_VOICES) + len(ESPEAK_VOICES))
    assert all(sum(f"number {i}." in text for text in programs.texts) == 12 for i in range(30))
    assert "validation: 5 files of 2 voices" in capsys.readouterr().out


@pytest.mark.parametrize("fails_at", [1, 3, 20], ids=["ffmpeg", "flite", "espeak"])
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_a_run_that_ends_early_goes_on(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, killed: bool
) -> None:
    out = tmp_path / "speech"
    programs.fails_at = fails_at
    with monkeypatch.context() as patch:
        if killed:  # nothing cleans up
            patch.setattr(speech_data, "remove_if_there", lambda path: None)
        with pytest.raises(DualCodecError, match="failed"):
            prepare(out)
    assert len(list(out.rglob(".*.*"))) == killed
    kept = read_files(out)
    programs.fails_at = None
    prepare(out)
    found, count = read_files(out), len(programs.commands)
    assert len(found) == 4 + 3 * (len(FLITE_VOICES) + len(ESPEAK_VOICES)) and kept.items() <= found.items()
    assert not list(out.rglob(".*.*"))
    prepare(out)
    assert len(programs.commands) == count  # nothing is made twice


def read_files(out: Path) -> dict[Path, bytes]:
    """What training would read, which must be whole."""
    found = find_inputs([str(out)], (".wav", ".flac"))[0]
    assert all(soundfile.info(file.path).frames == 16000 for file in found)
    return {file.relative: file.path.read_bytes() for file in found}
