"""Audio files: formats, rates and channels in; exact lengths and whole files out; one line for what can't be read."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from dualcodec_ext import _files, audio
from dualcodec_ext.errors import DualCodecError


def tone(seconds: float, rate: int, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


# Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "container", "subtype", "rate", "channels", "tolerance"),
    [
        ("a.wav", "WAV", "PCM_16", 24000, 1, 1e-4),
        ("a.wav", "WAV", "FLOAT", 44100, 2, 1e-7),
        ("a.wav", "WAV", "PCM_U8", 8000, 1, 1e-2),
        ("a.flac", "FLAC", "PCM_24", 48000, 2, 1e-6),
        ("a.ogg", "OGG", "VORBIS", 16000, 1, 5e-2),
        ("a.mp3", "MP3", "MPEG_LAYER_III", 44100, 2, 5e-2),
        ("a.aiff", "AIFF", "PCM_16", 22050, 1, 1e-4),
        ("a.au", "AU", "ULAW", 8000, 1, 3e-2),
        ("unnamed", "CAF", "PCM_16", 24000, 1, 1e-4),
    ],
    ids=lambda value: str(value),
)
def test_reads_what_libsndfile_reads(tmp_path, name, container, subtype, rate, channels, tolerance):
    wave = tone(0.5, rate)
    both = wave if channels == 1 else np.stack([wave * 1.5, wave * 0.5], axis=1)  # averages to wave
    soundfile.write(tmp_path / name, both, rate, format=container, subtype=subtype)
    got = audio.read_audio(tmp_path / name)
    assert (got.sample_rate_hz, got.channels, got.samples.dtype) == (rate, channels, np.float32)
    assert got.samples.shape == wave.shape
    middle = slice(rate // 10, -rate // 10)  # lossy codecs smear the ends
    np.testing.assert_allclose(got.samples[middle], wave[middle], atol=tolerance)


def test_reads_more_than_one_block(tmp_path, monkeypatch):
    wave = tone(0.5, 8000)
    soundfile.write(tmp_path / "a.wav", wave, 8000, subtype="FLOAT")
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 999)
    np.testing.assert_array_equal(audio.read_audio(tmp_path / "a.wav").samples, wave)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_reads_a_pipe(tmp_path):
    wave = tone(0.25, 8000)
    soundfile.write(tmp_path / "a.wav", wave, 8000, subtype="FLOAT")
    os.mkfifo(tmp_path / "pipe")
    feeder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import shutil, sys; shutil.copyfileobj(open(sys.argv[1], 'rb'), open(sys.argv[2], 'wb'))",
            str(tmp_path / "a.wav"),
            str(tmp_path / "pipe"),
        ]
    )
    np.testing.assert_array_equal(audio.read_audio(tmp_path / "pipe").samples, wave)
    assert feeder.wait(10) == 0


def test_a_header_that_promises_too_much_gives_what_is_there(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1, 8000), 8000, subtype="PCM_16")
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: 44 + 2 * 3000])
    assert audio.read_audio(tmp_path / "cut.wav").samples.shape == (3000,)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: None, r"cannot read .*a\.wav: no such file or directory"),
        (lambda p: p.mkdir(), r"cannot read .*a\.wav: is a directory"),
        (lambda p: p.write_bytes(b""), r"a\.wav: is an empty file"),
        (lambda p: p.write_text("not audio\n" * 100), r"a\.wav: is not audio that libsndfile reads"),
        (lambda p: soundfile.write(p, np.zeros(0), 8000), r"a\.wav: holds no audio samples"),
        (
            lambda p: soundfile.write(p, np.array([0, 1, np.nan]), 8000, subtype="FLOAT"),
            r"a\.wav: sample 2 is not a finite number",
        ),
    ],
    ids=["missing", "folder", "empty", "text", "no samples", "nan"],
)
def test_unreadable_files_get_one_line(tmp_path, make, text):
    make(tmp_path / "a.wav")
    with pytest.raises(DualCodecError, match=text) as error:
        audio.read_audio(tmp_path / "a.wav")
    assert "\n" not in str(error.value)


def test_a_damaged_flac_is_an_error_or_shorter_but_never_a_crash(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(1, 8000), 8000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    try:
        assert audio.read_audio(tmp_path / "a.flac").samples.size < 8000
    except DualCodecError as error:
        assert "breaks off or is damaged" in str(error)


def test_info_reads_the_header(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros((1234, 2)), 44100)
    info = audio.audio_info(tmp_path / "a.flac")
    assert (info.sample_rate_hz, info.channels, info.frames) == (44100, 2, 1234)
    assert "FLAC" in info.format


# Resampling -------------------------------------------------------------------------------------------------------


@given(samples=st.integers(0, 10**12), rates=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
def test_length_is_the_exact_rounding(samples, rates):
    rate_in, rate_out = rates
    length = audio.resampled_length(samples, rate_in, rate_out)
    assert abs(2 * (length * rate_in - samples * rate_out)) <= rate_in
    if samples < 10**6:
        assert length == round(samples * rate_out / rate_in)


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(0, 3000),
    rate_in=st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000, 192000]),
    rate_out=st.sampled_from([8000, 24000, 44100]),
)
def test_resampled_audio_has_that_length(samples, rate_in, rate_out):
    out = audio.resample(np.ones(samples, np.float32), rate_in, rate_out)
    assert out.shape == (audio.resampled_length(samples, rate_in, rate_out),)
    assert out.dtype == np.float32


@pytest.mark.parametrize(("rate_in", "rate_out"), [(8000, 24000), (44100, 24000), (24000, 48000)])
def test_resampling_keeps_a_tone_in_place(rate_in, rate_out):
    out = audio.resample(tone(1, rate_in), rate_in, rate_out)
    inner = slice(rate_out // 10, -rate_out // 10)
    np.testing.assert_allclose(out[inner], tone(1, rate_out)[inner], atol=1e-3)


@pytest.mark.parametrize("rates", [(0, 24000), (24000, 0), (24000, 10**7)])
def test_rates_out_of_range(rates):
    with pytest.raises(DualCodecError, match=r"resample: rate_(in|out) must be 1 to 1000000 Hz, got"):
        audio.resample(np.zeros(10, np.float32), *rates)


# Writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["wav", "flac", "ogg", "opus", "mp3", "aiff", "au", "caf", "w64", "rf64", "aif", "oga"]
)
def test_written_audio_has_its_exact_length(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    wave = tone(0.5, 24000)[:-7]
    audio.write_audio(path, wave, 24000, comment="untrained: not intelligible")
    got = audio.read_audio(path)
    assert got.samples.shape == wave.shape
    assert got.sample_rate_hz == 24000
    if kind in ("wav", "flac", "ogg", "mp3"):
        with soundfile.SoundFile(path) as file:
            assert file.comment == "untrained: not intelligible"


def test_a_long_ogg_is_written(tmp_path):
    wave = np.tile(tone(1, 8000), 300)
    audio.write_audio(tmp_path / "a.ogg", wave, 8000)
    assert audio.audio_info(tmp_path / "a.ogg").frames == len(wave)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.safetensors", "/dev/stdout"])
def test_unknown_endings_name_the_known_ones(name):
    with pytest.raises(DualCodecError, match=r"audio is written as one of wav, flac, ogg"):
        audio.audio_format(name)


def test_a_rate_that_the_format_cannot_hold(tmp_path):
    with pytest.raises(DualCodecError, match="cannot write opus at 24001 Hz"):
        audio.write_audio(tmp_path / "a.opus", tone(0.1, 24001), 24001)
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(DualCodecError, match="not finite"):
        audio.write_audio(tmp_path / "a.wav", np.array([0, np.inf], np.float32), 24000)
    assert not list(tmp_path.iterdir())


# Whole or not at all ----------------------------------------------------------------------------------------------


def test_atomic_write_replaces_and_keeps_permissions_and_links(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    _files.write_atomic(link, b"new")
    assert path.read_bytes() == b"new"
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "link"]


def test_a_new_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        _files.write_atomic(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("failing", ["write", "replace", "close"])
@pytest.mark.parametrize("existing", [b"old", None], ids=["existing", "new"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failing, existing):
    path = tmp_path / "a.wav"
    if existing is not None:
        path.write_bytes(existing)
    original = getattr(os, failing)

    def full(*arguments):
        if failing == "close":
            original(*arguments)  # as NFS does: the error comes when the file is closed
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(DualCodecError, match=r"cannot write .*a\.wav: no space left on device"):
            audio.write_audio(path, tone(0.1, 24000), 24000)
    assert [p.name for p in tmp_path.iterdir()] == (["a.wav"] if existing else [])
    assert not existing or path.read_bytes() == existing


def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        _files.write_atomic(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_is_written_to_and_not_replaced():
    with pytest.raises(DualCodecError, match="cannot write /dev/full: no space left on device"):
        _files.write_atomic("/dev/full", b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize(
    ("name", "text"),
    [("missing/a", "no such file or directory"), ("", "is a directory")],
    ids=["no folder", "a folder"],
)
def test_a_place_that_cannot_be_written(tmp_path, name, text):
    with pytest.raises(DualCodecError, match=f"cannot write .*: {text}"):
        _files.write_atomic(tmp_path / name, b"x")


# Piece by piece ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [(44100, 24000), (48000, 24000), (8000, 24000), (24000, 44100), (24000, 24000)])
@pytest.mark.parametrize("samples", [0, 1, 700, 50_003])
def test_resampling_in_pieces_has_the_bits_of_the_whole(rates, samples):
    wave = tone(2.5, 24000)[:samples]
    wanted = audio.resample(wave, *rates)
    for piece in (1000, 9999, 1 << 20):
        made = audio.Resampler(*rates)
        parts = [made.write(wave[at : at + piece]) for at in range(0, samples, piece)]
        np.testing.assert_array_equal(np.concatenate([*parts, made.finish()]), wanted)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "opus", "mp3", "au", "rf64"])
def test_written_in_pieces_it_is_the_same_file(tmp_path, kind):
    wave = tone(3, 24000)
    audio.write_audio(tmp_path / f"whole.{kind}", wave, 24000)
    with audio.AudioWriter(tmp_path / f"pieces.{kind}", 24000) as file:
        for at in range(0, len(wave), 9999):
            file.write(wave[at : at + 9999])
        assert not (tmp_path / f"pieces.{kind}").exists()
    whole, pieces = (audio.read_audio(tmp_path / f"{name}.{kind}") for name in ("whole", "pieces"))
    np.testing.assert_array_equal(whole.samples, pieces.samples)
    for samples in (1234, 1 << 16):
        with audio.AudioReader(tmp_path / f"whole.{kind}") as file:
            blocks = list(file.blocks(samples))
            assert file.samples == sum(map(len, blocks)) == whole.samples.size
        np.testing.assert_array_equal(np.concatenate(blocks), whole.samples)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError])
def test_what_breaks_off_leaves_nothing(tmp_path, monkeypatch, error):
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")
    original = os.write

    def failing(handle, data):
        if len(data) > 1000:
            raise error
        return original(handle, data)

    monkeypatch.setattr(os, "write", failing)
    wanted = DualCodecError if isinstance(error, OSError) else error
    with pytest.raises(wanted), audio.AudioWriter(path, 24000) as file:
        for _ in range(20):
            file.write(tone(0.1, 24000))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def told():
    """SIGTERM raises SystemExit, as on the command line."""

    def stop(*_):
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    yield
    assert signal.signal(signal.SIGTERM, before) is stop


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("callback", ["tell", "seek", "write"])
def test_a_signal_in_libsndfiles_callbacks_is_not_lost(tmp_path, monkeypatch, callback):
    original, path = getattr(audio.AtomicFile, callback), tmp_path / "a.wav"

    def interrupted(*given):
        signal.raise_signal(signal.SIGTERM)
        return original(*given)

    monkeypatch.setattr(audio.AtomicFile, callback, interrupted)
    with pytest.raises(SystemExit), audio.AudioWriter(path, 24000) as file:
        file.write(tone(1.0, 24000))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("told")
def test_a_signal_waits_for_the_end_of_a_read(tmp_path, monkeypatch):
    audio.write_audio(tmp_path / "a.wav", tone(0.1, 24000), 24000)
    with audio.AudioReader(tmp_path / "a.wav") as file:
        original, read = file._file.read, []

        def interrupted(*given, **options):
            signal.raise_signal(signal.SIGTERM)
            read.append(original(*given, **options))
            return read[-1]

        monkeypatch.setattr(file._file, "read", interrupted)
        with pytest.raises(SystemExit):
            file.whole()
        assert len(read) == 1


def test_a_pipe_gets_the_file_at_the_end(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    audio.write_audio(pipe, tone(0.1, 24000), 24000, "wav")
    reader.join()
    audio.write_audio(tmp_path / "a.wav", tone(0.1, 24000), 24000)
    assert got == [(tmp_path / "a.wav").read_bytes()] and stat.S_ISFIFO(pipe.stat().st_mode)


# Finding ----------------------------------------------------------------------------------------------------------


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    for name in (
        "b.wav",
        "a.FLAC",
        "sub/c.ogg",
        "sub/deep/d.wav",
        "notes.txt",
        ".hidden.wav",
        "odd.bin",
        "x[1].wav",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def found(*arguments):
        files, failed = _files.find_inputs(arguments, audio.AUDIO_SUFFIXES)
        return [str(f.path) for f in files], [str(f.relative) for f in files], failed

    everything = ["a.FLAC", "b.wav", "sub/c.ogg", "sub/deep/d.wav", "x[1].wav"]
    assert found(".")[:2] == (everything, everything)
    assert found("sub")[1] == ["c.ogg", "deep/d.wav"]
    assert found("sub/*.ogg")[1] == ["c.ogg"]
    assert found("**/*.wav")[1] == ["b.wav", "sub/deep/d.wav", "x[1].wav"]
    assert found("sub/**/*.wav")[1] == ["deep/d.wav"]
    assert found("odd.bin")[0] == ["odd.bin"]  # named outright
    assert found("x[1].wav")[0] == ["x[1].wav"]  # a name that looks like a pattern
    assert found("b.wav", ".", "./b.wav")[0] == ["b.wav", "a.FLAC", "sub/c.ogg", "sub/deep/d.wav", "x[1].wav"]
    assert found("gone.wav")[0] == ["gone.wav"]  # fails when it is read
    assert found("*.gone")[2] == [("*.gone", "no file matches this pattern")]
    (tmp_path / "empty").mkdir()
    assert found("empty")[2] == [("empty", "no file below this folder ends in .wav, .flac, .ogg, .oga, ...")]


def test_sixteen_bits_hold_the_nearest_step(tmp_path):
    steps = np.array([0, 0.25, 0.49, 0.51, 0.99, -0.25, -0.51, -7.5, 30000.4, 40000, -40000], np.float32)
    for name in ("a.wav", "a.flac"):
        audio.write_audio(tmp_path / name, steps / np.float32(32768), 24000)
        found = soundfile.read(tmp_path / name, dtype="int16")[0]
        assert found.tolist() == [0, 0, 0, 1, 1, 0, -1, -8, 30000, 32767, -32768]
        again = tmp_path / f"again-{name}"
        audio.write_audio(again, audio.read_audio(tmp_path / name).samples, 24000)
        assert np.array_equal(soundfile.read(again, dtype="int16")[0], found), "what was read is written as it was"
