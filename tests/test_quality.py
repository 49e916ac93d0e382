"""The scores in the repository: those of the weights in the package, good enough, and how bench.quality makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from test_training import SMALL, recipe
from torch import Tensor

from bench import quality
from dualcodec_ext import cli
from dualcodec_ext._cli.voice import vowels
from dualcodec_ext._training.state import State
from dualcodec_ext.hub import BUNDLED

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
SEMANTIC_ENTRIES = 2048


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads((ROOT / "bench/results/quality_tiny.json").read_text(encoding="utf-8"))


def test_the_scores_are_of_the_packages_weights(results: dict[str, Any]) -> None:
    assert results["weights_sha256"] == quality.weights_sha256(BUNDLED["tiny"]), "run python -m bench.quality"


def test_speech_comes_back_well_enough(results: dict[str, Any]) -> None:
    rows = [results["scores"][str(count)] for count in range(1, 11)]
    assert len(results["scores"]) == len(rows)
    assert rows[-1]["stoi"] >= 0.85 and rows[-1]["pesq"] >= 1.4
    assert rows[0]["stoi"] >= 0.6  # the semantic codes alone
    for name in ("stoi", "pesq"):
        heard = [row[name] for row in rows]
        assert heard == sorted(heard), name  # quality rises with each codebook
    assert len(results["clips"]) == 6 and "cards" in results["clips"]


def test_codebooks_are_used(results: dict[str, Any]) -> None:
    assert results["frames"] >= 20 * SEMANTIC_ENTRIES
    assert len(results["codebook_use"]) == len(results["entropy_bits"]) == 10
    assert min(results["codebook_use"]) >= 0.7


def test_info_tells_use_and_entropy(results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for name in ("codebook_use", "entropy_bits", "trained_steps"):
        assert facts[name] == results[name], name
    assert facts["bitrate_bps"] == 5050 and facts["frame_rate_hz"] == 50


def test_frames_whose_margin_is_small_are_told(results: dict[str, Any]) -> None:
    found = results["against_float64"]
    assert found["equal"] == found["codes"] == 10 * found["frames"]
    assert found["below_margin_bound"] / 10 <= found["frames_below_margin_bound"] <= found["below_margin_bound"]


def test_parity_is_not_renewed_beside_other_weights_scores(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scores.json"
    text = json.dumps(results | {"weights_sha256": "0"})
    path.write_text(text)
    assert quality.main(["--against-float64", "--output", str(path)]) == 1
    assert "scores.json must be of the package's weights" in capsys.readouterr().out and path.read_text() == text


def test_any_change_shows_in_the_digest(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.float16)}

    def digest(changes: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
        save_file(tensors | changes, path, metadata)
        return quality.weights_sha256(path)

    plain = digest({})
    assert plain == digest({}, {"step": "7"})  # what is said beside the tensors is no part of them
    value = tensors["b"].clone()
    value[4] = 1e-3
    others = [{"b": value}, {"a": torch.zeros(3, 2)}, {"b": torch.zeros(5, dtype=torch.int16)}, {"c": torch.zeros(0)}]
    assert len({plain, *map(digest, others)}) == 1 + len(others)


def test_a_run_is_scored_and_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small model whose weights were drawn, on a second of speech; what it is scored by is tested elsewhere."""
    pytest.importorskip("pystoi")
    pytest.importorskip("pesq")
    for name, text in (
        ("test/usr/share/pocketsphinx/test/data/librivox/austen", "ai"),
        ("test/usr/share/pocketsphinx/test/data/cards/001", "o"),
        ("test/usr/share/pocketsphinx/test/data/cards/002", "u"),
        ("speech/validation/maria/one", "aeiou"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(f"{tmp_path / name}.wav", vowels(text).samples[:24000], 24000)
    run, published = tmp_path / "run", tmp_path / "package/tiny.safetensors"
    run.mkdir()
    state = State(recipe(), torch.device("cpu"))
    state.step = 123
    weights = state.export(run)
    monkeypatch.setitem(BUNDLED, "tiny", published)
    heard = {"stoi": 0.5, "pesq": 1.5}
    monkeypatch.setattr(quality, "speech_scores", lambda clean, decoded, rate_hz: heard)
    words = ["--data", tmp_path / "speech", "--test", tmp_path / "test", "--weights", run, "--publish"]
    assert quality.main([str(word) for word in [*words, "--output", tmp_path / "scores.json"]]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["scores"] == found["validation"]["scores"] == dict.fromkeys(("1", "2", "3"), heard)
    assert list(found["clips"]) == ["austen", "cards"]
    assert found["weights_sha256"] == quality.weights_sha256(weights) == quality.weights_sha256(published)
    assert found["commit"] is None or len(found["commit"]) == 40
    assert found["trained_steps"] == 123 and len(found["codebook_use"]) == 1 + SMALL["n_codebooks"]
    given, taken = load_file(weights), load_file(published)
    assert given.keys() == taken.keys() and all(torch.equal(given[name], taken[name]) for name in given)
    capsys.readouterr()
    assert cli.main(["info", str(published), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for name in ("codebook_use", "entropy_bits", "trained_steps"):
        assert facts[name] == found[name], name
