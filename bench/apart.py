"""What the measurements with a command of their own (`stream`, `long`, `windows`, `lookahead`) have in common."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine
from .ours import missing_module


def refuse() -> bool:
    """Say so where there is no compiled module, of which nothing could be measured."""
    if missing := missing_module():
        print(f"The compiled module is missing, so nothing of ours is measured: {missing}")
    return bool(missing)


def begun(what: str, argv: Sequence[str]) -> dict[str, Any]:
    """Return what every run says first: its command and when it began."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"command": shlex.join(["python", "-m", "bench", what, *argv]), "started": started, "what": what}


def finish(run: dict[str, Any], path: str | None) -> dict[str, Any]:
    """Return a run with the machine and the commit, and write it to a JSON file where one is wanted."""
    commit, dirty = machine.commit()
    run = run | {"machine": machine.describe(run.get("device", "cpu")), "commit": commit, "dirty": dirty}
    if path:
        Path(path).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return run
