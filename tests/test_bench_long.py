"""The benches of long recordings: what they run, what they say and write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import long, machine, readme, run, windows

CONFIG = Path(long.__file__).with_name("narrow.json")


def test_long(tmp_path: Path, capsys: Any) -> None:
    if machine.memory_of() is None:
        pytest.skip("resident memory can't be read here")
    out = tmp_path / "long.json"
    arguments = ["long", "--config", str(CONFIG), "--minutes", "0.05", "--threads", "1", "--interval", "0.05"]
    assert run.main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "narrow encode 0.05 min: peak" in printed and "narrow decode 0.05 min: peak" in printed
    document = json.loads(out.read_text())
    assert document["machine"]["cores"] and "commit" in document
    base = document["base"]["peak_bytes"]
    assert f"torch and the package alone: peak {base / 2**20:.0f} MiB" in printed and base > 50 * 2**20
    for name in ("encode", "decode"):
        case = document["cases"][0][name]
        held = [b for _, b in case["seconds_and_bytes"]]
        assert 0 < max(held) <= case["peak_bytes"] and len(held) > 5 and case["times_real_time"] > 0
        assert case["beyond_weights_bytes"] == case["peak_bytes"] - sum(document["weight_bytes"].values())
        assert case["own_bytes"] == case["beyond_weights_bytes"] - base
    pytest.importorskip("matplotlib")
    long.draw(document, str(tmp_path / "long.png"))
    assert (tmp_path / "long.png").read_bytes().startswith(b"\x89PNG")


def test_three_hours_stay_below_300_mb_beyond_the_weights_and_the_readme_says_so() -> None:
    root = Path(readme.__file__).parents[1]
    results = json.loads((root / "bench/results/long-tiny.json").read_text(encoding="utf-8"))
    assert [case["minutes"] for case in results["cases"]] == [2, 20, 180] and results["model"] == "tiny"
    for case in results["cases"]:
        for name in ("encode", "decode"):
            assert 0 < case[name]["own_bytes"] < case[name]["beyond_weights_bytes"] < 300e6, (name, case["minutes"])
    page = (root / "README.md").read_text(encoding="utf-8")
    assert readme.of_hours(results) in page, "run python -m bench.readme"


def test_a_command_that_fails_is_no_result() -> None:
    with pytest.raises(RuntimeError, match="ended with 3: some text"):
        long.watch([sys.executable, "-c", "print('some text'); raise SystemExit(3)"], 0.01)


def test_the_peak_is_that_of_the_process() -> None:
    if machine.memory_of() is None:
        pytest.skip("resident memory can't be read here")
    code = "import time; x = bytearray(100 << 20); time.sleep(0.3); del x; time.sleep(0.3); print('{\"results\": 1}')"
    found = long.watch([sys.executable, "-c", code], 0.05)
    held = [b for _, b in found["seconds_and_bytes"]]
    assert found["printed"] == 1 and found["peak_bytes"] > 100 << 20 > held[-1]


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--threads", "0"], ["--preset", "13hz"]])
def test_wrong_arguments_of_long(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        long.parse(arguments)


def test_windows(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "windows.json"
    assert run.main(["windows", "--small", "--seconds", "70", "--threads", "1", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert "random weights" in capsys.readouterr().out and "random" in document["weights"]
    assert 0 < document["semantic_codes_equal"] <= 1 and 0 < document["acoustic_codes_equal"] <= 1
    assert len(document["feature_error_rms_by_frame"]) >= 873
    with pytest.raises(SystemExit):
        windows.parse(["--seconds", "60"])
