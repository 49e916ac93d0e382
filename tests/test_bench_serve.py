"""The load test of the server: its playback, its numbers, and the README's table of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import readme, run, serve


def test_playback_counts_when_it_runs_empty() -> None:
    playback = serve.Playback(preroll=100, rate_hz=1000)
    playback.add(60, 0.0)
    playback.add(60, 1.0)  # before it plays nothing is late; it plays now, until 1.12
    assert playback.underruns == 0
    playback.add(10, 1.12)  # until 1.13
    assert playback.underruns == 0
    playback.add(50, 1.2)  # ran empty; fills up anew
    playback.add(40, 9.0)
    assert playback.underruns == 1
    playback.add(10, 9.5)  # 100 samples: plays until 9.6
    playback.add(10, 9.55)  # until 9.61
    playback.add(10, 9.61)
    assert playback.underruns == 1
    playback.add(10, 9.63)
    assert playback.underruns == 2


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "serve.json", tmp_path / "serve.md"
    options = ["--clients", "1", "3", "--seconds", "0.4", "--clip-s", "0.2", "--piece-ms", "40"]
    assert run.main(["serve", *options, "--json", str(out), "--markdown", str(page)]) == 0
    told = json.loads(out.read_text())
    assert told["what"] == "serve" and told["machine"]["cores"] and "commit" in told and told["piece_ms"] == 40
    assert [(case["task"], case["clients"]) for case in told["cases"]] == [
        (task, clients) for task in ("roundtrip", "decode") for clients in (1, 3)
    ]
    for case in told["cases"]:
        assert case["clips"] == 2 * case["clients"] == case["first_s"]["count"]
        assert case["audio_s"] == pytest.approx(0.4 * case["clients"])
        assert case["latency_s"]["count"] >= 10 * case["clients"] // 2
        for key in ("first_s", "latency_s"):
            assert 0 < case[key]["p50"] <= case[key]["p95"] <= case[key]["p99"] <= case[key]["worst"]
        assert case["server_cpus"] > 0 and serve.told(case) in capsys.readouterr().out + page.read_text()
    case = told["cases"][1]
    assert f"| roundtrip | 3 | {1e3 * case['first_s']['p50']:.0f} / " in readme.served(told)


def test_a_server_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = serve.make_clips

    def wrong(*args: Any) -> Any:
        messages, piece, codes = made(*args)
        return messages, piece, np.where(np.arange(codes.size).reshape(codes.shape) == 7, codes + 1, codes)

    monkeypatch.setattr(serve, "make_clips", wrong)
    with pytest.raises(RuntimeError, match="codes are not those of the whole clip"):
        serve.measure(serve.parse(["--clients", "1", "--seconds", "0.1", "--clip-s", "0.1"]))


@pytest.mark.parametrize("wrong", [["--clients", "0"], ["--seconds", "0"], ["--piece-ms", "-1"], ["--tasks", "sing"]])
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["serve", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_readme_table_of_the_results() -> None:
    root = Path(readme.__file__).parents[1]
    told = json.loads((root / "bench/results/serve-tiny.json").read_text())
    page = (root / "README.md").read_text(encoding="utf-8")
    assert {case["clients"] for case in told["cases"]} >= {1, 2, 4, 8, 16, 32}
    assert readme.served(told) in page, "run python -m bench.readme"
