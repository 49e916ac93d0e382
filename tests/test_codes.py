"""The code file: what goes in comes out, and whatever is wrong with one is said in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from dualcodec_ext import codes
from dualcodec_ext.codes import CodeFile
from dualcodec_ext.config import DualCodecConfig
from dualcodec_ext.errors import DualCodecError

PRESET = DualCodecConfig.preset("12hz_v1")
RATE, SAMPLES = 16000, 16000 * 2 + 5  # 48008 samples at 24 kHz: 26 frames of 1920


def example(quantizers: int = 8, **changes) -> CodeFile:
    rng = np.random.default_rng(0)
    made = CodeFile(
        semantic=rng.integers(0, 16384, (1, 26)).astype(np.uint16),
        acoustic=rng.integers(0, 4096, (quantizers - 1, 26)).astype(np.uint16) if quantizers > 1 else None,
        model="12hz_v1",
        config=PRESET,
        weights="sha256:" + "0" * 64,
        source_samples=SAMPLES,
        source_rate_hz=RATE,
        repeated_frames=1,
    )
    return replace(made, **changes)


@pytest.mark.parametrize("quantizers", [1, 2, 8])
def test_what_goes_in_comes_out(tmp_path, quantizers):
    path = tmp_path / "a.codes.safetensors"
    made = example(quantizers)
    codes.write_codes(path, made)
    got = codes.read_codes(path)
    np.testing.assert_array_equal(got.semantic, made.semantic)
    assert (got.acoustic is None) == (quantizers == 1)
    if quantizers > 1:
        np.testing.assert_array_equal(got.acoustic, made.acoustic)
    assert got.metadata() == made.metadata()
    assert got.config == PRESET
    assert codes.is_code_file(path)


def test_it_is_plain_safetensors_with_json(tmp_path):
    path = tmp_path / "a.codes.safetensors"
    codes.write_codes(path, example(weights="seeded:3"))
    tensors = load_file(path)  # with the library alone
    assert {name: (t.dtype.name, t.shape) for name, t in tensors.items()} == {
        "semantic": ("uint16", (1, 26)),
        "acoustic": ("uint16", (7, 26)),
    }
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = json.loads(header["__metadata__"]["dualcodec_ext"])
    assert facts["model"] == "12hz_v1"
    assert facts["config"]["n_codebooks"] == 7
    assert facts["weights"] == "seeded:3"
    assert (facts["untrained"], facts["note"]) == (True, "untrained: not intelligible")
    assert (facts["source_samples"], facts["source_rate_hz"], facts["sample_rate_hz"]) == (
        SAMPLES,
        RATE,
        24000,
    )
    assert (facts["format_version"], facts["last_semantic_frame_repeated"]) == (1, 1)
    assert "note" not in example().metadata()


def test_the_bytes_depend_on_the_contents_alone():
    assert example().to_bytes() == example().to_bytes()


@pytest.mark.parametrize("quantizers", [1, 3, 8])
def test_the_bytes_are_those_of_safetensors_itself(quantizers):
    made = example(quantizers, weights='seeded:"odd" \u00e9')
    tensors = {"semantic": made.semantic}
    if made.acoustic is not None:
        tensors["acoustic"] = made.acoustic
    facts = json.dumps(made.metadata(), sort_keys=True)
    assert made.to_bytes() == save(tensors, metadata={"dualcodec_ext": facts})


@pytest.mark.parametrize("quantizers", [1, 8])
def test_a_span_of_a_mapped_file(tmp_path, quantizers):
    path = tmp_path / "a.codes.safetensors"
    made = example(quantizers)
    codes.write_codes(path, made)
    got = codes.map_codes(path)
    assert got.metadata() == made.metadata() and isinstance(got.semantic, np.memmap)
    semantic, acoustic = got.span(5, 9)
    np.testing.assert_array_equal(semantic, made.semantic[:, 5:9])
    assert type(semantic) is np.ndarray and (acoustic is None) == (quantizers == 1)
    if acoustic is not None:
        np.testing.assert_array_equal(acoustic, made.acoustic[:, 5:9])
    assert got.first(1).span(5, 9)[1] is None


def test_of_a_mapped_file_the_codes_that_are_read_are_checked(tmp_path):
    path = tmp_path / "a.codes.safetensors"
    made = example()
    data = bytearray(made.to_bytes())
    frame = len(data) - 2 * (made.frames - 20)  # of the semantic codes, which come last
    data[frame : frame + 2] = (60000).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(DualCodecError, match="semantic code 60000 at codebook 0, frame 20 is not below 16384"):
        codes.read_codes(path)
    with pytest.raises(DualCodecError, match="semantic code 60000 at codebook 0, frame 20 is not below 16384"):
        codes.map_codes(path, check=True)
    got = codes.map_codes(path)
    assert got.span(0, 20)[0].shape == (1, 20)
    with pytest.raises(DualCodecError, match="semantic code 60000 at codebook 0, frame 20 is not below 16384"):
        got.span(15, 26)


def test_mapped_codes_are_looked_at_and_written_stretch_by_stretch(tmp_path, monkeypatch):
    made = example()
    monkeypatch.setattr(codes, "_STRETCH", 7)
    let_go = []
    monkeypatch.setattr(
        codes.CodeFile, "let_go", lambda self, real=codes.CodeFile.let_go: (let_go.append(1), real(self))
    )
    codes.write_codes(tmp_path / "a", made)
    assert (tmp_path / "a").read_bytes() == made.to_bytes() and len(let_go) >= 2 * 8 * 4
    got = codes.map_codes(tmp_path / "a", check=True)
    got.let_go()
    np.testing.assert_array_equal(got.acoustic, made.acoustic)
    assert got.to_bytes() == made.to_bytes()
    worst = bytearray(made.to_bytes())
    worst[-2:] = (60000).to_bytes(2, "little")
    (tmp_path / "b").write_bytes(worst)
    with pytest.raises(DualCodecError, match=f"at codebook 0, frame {made.frames - 1} is not below"):
        codes.map_codes(tmp_path / "b", check=True)


def test_facts():
    made = example()
    assert (made.frames, made.codebooks, made.model_samples) == (26, 8, 48008)
    assert made.duration_s == SAMPLES / RATE
    assert made.bitrate_bps == 12.5 * (14 + 7 * 12)


def test_65536_entries_fit():
    config = DualCodecConfig.from_dict({**PRESET.to_dict(), "semantic_codebook_size": 65536})
    top = np.full((1, 26), 65535, np.uint16)
    assert CodeFile(top, None, "big", config, "seeded:0", SAMPLES, RATE).to_bytes()


@pytest.mark.parametrize(("keep", "left"), [(None, 8), (8, 8), (3, 3), (1, 1)])
def test_fewer_codebooks(keep, left):
    assert example().first(keep).codebooks == left


@pytest.mark.parametrize("keep", [0, 9])
def test_more_codebooks_than_there_are(keep):
    with pytest.raises(DualCodecError, match=rf"quantizers must be 1 to 8, the codebooks here, got {keep}"):
        example().first(keep)


BAD_CODES = {
    "dtype": ({"semantic": np.zeros((1, 26), np.int64)}, "semantic codes must be uint16, got int64"),
    "rank": ({"semantic": np.zeros(26, np.uint16)}, r"semantic codes must be \[1, F\], got \[26\]"),
    "semantic rows": (
        {"semantic": np.zeros((2, 26), np.uint16)},
        r"semantic codes must be \[1, F\], got \[2, 26\]",
    ),
    "codebooks": (
        {"acoustic": np.zeros((8, 26), np.uint16)},
        r"acoustic codes must be \[1 to 7, F\], got \[8, 26\]",
    ),
    "no codebook": (
        {"acoustic": np.zeros((0, 26), np.uint16)},
        r"acoustic codes must be \[1 to 7, F\], got \[0, 26\]",
    ),
    "frames": ({"acoustic": np.zeros((7, 25), np.uint16)}, "acoustic codes must have 26 frames, got 25"),
    "no frames": (
        {"semantic": np.zeros((1, 0), np.uint16)},
        "semantic codes must have at least 1 frames, got 0",
    ),
    "range": (
        {"semantic": np.full((1, 26), 16384, np.uint16)},
        "semantic code 16384 at codebook 0, frame 0 is not below 16384",
    ),
    "length": ({"source_samples": 16000 * 9}, "216000 samples need 113 frames, got 26"),
    "no samples": ({"source_samples": 0}, "the recording must have samples and a rate, got 0 at 16000 Hz"),
    "no rate": ({"source_rate_hz": 0}, "the recording must have samples and a rate"),
    "repeats": ({"repeated_frames": 27}, "repeated frames must be 0 to 26, got 27"),
}


@pytest.mark.parametrize(("changes", "text"), BAD_CODES.values(), ids=BAD_CODES.keys())
def test_codes_that_do_not_fit_are_not_written(tmp_path, changes, text):
    with pytest.raises(DualCodecError, match=f"code file: {text}"):
        codes.write_codes(tmp_path / "a", example(**changes))
    assert not list(tmp_path.iterdir())


def test_a_code_out_of_range_is_found_where_it_is(tmp_path):
    acoustic = example().acoustic.copy()
    acoustic[3, 17] = 5000
    with pytest.raises(DualCodecError, match="acoustic code 5000 at codebook 3, frame 17 is not below 4096"):
        example(acoustic=acoustic).to_bytes()


def with_facts(change) -> bytes:
    made = example()
    facts = made.metadata()
    facts = change(facts) or facts
    text = facts if isinstance(facts, str) else json.dumps(facts)
    return save({"semantic": made.semantic, "acoustic": made.acoustic}, metadata={"dualcodec_ext": text})


def with_tensors(**tensors) -> bytes:
    made = example()
    tensors = {"semantic": made.semantic, "acoustic": made.acoustic, **tensors}
    kept = {name: t for name, t in tensors.items() if t is not None}
    return save(kept, metadata={"dualcodec_ext": json.dumps(made.metadata())})


BAD_FILES = {
    "empty": (b"", "is an empty file"),
    "text": (b"what is this\n" * 99, "is not a safetensors file"),
    "pickle": (b"\x80\x04\x95" + bytes(500), "is not a safetensors file"),
    "one byte": (b"\x01", "is not a safetensors file"),
    "other safetensors": (save({"x": np.zeros(3)}), "is safetensors, but no code file of dualcodec_ext"),
    "not json": (with_facts(lambda f: "{"), "its metadata is no JSON"),
    "no mapping": (with_facts(lambda f: "[1]"), "its metadata must be a mapping, got list"),
    "newer": (
        with_facts(lambda f: f | {"format_version": 2}),
        r"was written in a newer format \(version 2; this program reads 1\)",
    ),
    "older": (
        with_facts(lambda f: f | {"format_version": 0}),
        r"was written in an unknown format \(version 0",
    ),
    "no version": (
        with_facts(lambda f: f.pop("format_version") and None),
        "its metadata lacks format_version",
    ),
    "no model": (with_facts(lambda f: f.pop("model") and None), "its metadata lacks model"),
    "no weights": (with_facts(lambda f: f.pop("weights") and None), "its metadata lacks weights"),
    "type": (
        with_facts(lambda f: f | {"source_samples": "9"}),
        "source_samples in its metadata must be int, got '9'",
    ),
    "bool": (
        with_facts(lambda f: f | {"source_samples": True}),
        "source_samples in its metadata must be int, got True",
    ),
    "settings": (
        with_facts(lambda f: f["config"].update(n_codebooks=0)),
        "its model settings are wrong: .*n_codebooks",
    ),
    "setting": (
        with_facts(lambda f: f["config"].update(nonsense=1)),
        "its model settings are wrong: .*nonsense",
    ),
    "frames": (with_facts(lambda f: f | {"frames": 25}), "frames in its metadata must be 26, got 25"),
    "rate": (
        with_facts(lambda f: f | {"sample_rate_hz": 16000}),
        "sample_rate_hz in its metadata must be 24000, got 16000",
    ),
    "untrained": (
        with_facts(lambda f: f | {"untrained": True}),
        "untrained in its metadata must be False, got True",
    ),
    "no semantic": (with_tensors(semantic=None), "has no semantic codes"),
    "codes": (
        with_tensors(acoustic=np.full((7, 26), 4096, np.uint16)),
        "acoustic code 4096 at codebook 0, frame 0 is not below 4096",
    ),
    "dtype": (
        with_tensors(semantic=np.zeros((1, 26), np.float32)),
        "semantic codes must be uint16, got float32",
    ),
}


@pytest.mark.parametrize(("data", "text"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files_get_one_line(tmp_path, data, text):
    path = tmp_path / "a.codes.safetensors"
    path.write_bytes(data)
    for read in (codes.read_codes, codes.map_codes):
        if read is codes.map_codes and "is not below" in text:
            continue
        with pytest.raises(DualCodecError, match=rf"a\.codes\.safetensors: {text}") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [4, 8, 9, 100, 800, -100, -1])
def test_a_file_cut_short_anywhere(tmp_path, kept):
    path = tmp_path / "a.codes.safetensors"
    path.write_bytes(example().to_bytes()[:kept])
    with pytest.raises(DualCodecError, match=r"is cut short or damaged|is not a safetensors file"):
        codes.read_codes(path)
    assert codes.is_code_file(path) is False


def test_no_file(tmp_path):
    with pytest.raises(DualCodecError, match=r"cannot read .*gone: no such file or directory"):
        codes.read_codes(tmp_path / "gone")
    with pytest.raises(DualCodecError, match="is a directory"):
        codes.read_codes(tmp_path)
    assert codes.is_code_file(tmp_path) is False
