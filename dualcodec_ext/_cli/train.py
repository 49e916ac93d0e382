"""What `train` does: reads the recipe, trains, and shows how it goes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualcodec_ext._cli.report import one_line, print_json
from dualcodec_ext.errors import DualCodecError


def run_train(
    config: str,
    data: Path,
    out: Path,
    resume: bool,
    init: str | None,
    weights: str | None,
    w2v: str | None,
    steps: int | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> int:
    """Trains a model.

    Args:
        config: a recipe: JSON file, or the name of one in the package.
        data: folder with the speech.
        out: folder of the run.
        resume: go on from its checkpoint.
        init: preset whose weights to start from; None for none.
        weights: where those are; without `init`, a weights file to start from.
        w2v: folder or hub name of w2v-BERT 2.0, for models on its features.
        steps: in place of the recipe's.
        device: torch device.
        threads: CPU threads; None for torch's choice.
        as_json: print JSON.
    Returns:
        The exit code.
    Raises:
        DualCodecError: wrong settings, data or weights.
    """
    from dualcodec_ext._cli.codec import configure_torch
    from dualcodec_ext._cli.features import statistics_place
    from dualcodec_ext._cli.options import ModelOptions
    from dualcodec_ext.training import Recipe, train

    configure_torch(ModelOptions(device=device, threads=threads))
    recipe = Recipe.load(config, {} if steps is None else {"steps": steps})
    given, steps_before = weights_of(init, weights) if init or weights else (None, 0)
    # Numbers this small are silence, and a CPU takes a hundred times as long over each.
    flushed = not float(torch.tensor(2.0**-130) * 1.0)
    torch.set_flush_denormal(True)
    bar = _Bar(recipe.steps, not as_json and sys.stderr.isatty())
    try:
        scores = train(
            recipe,
            data,
            out,
            resume=resume,
            weights=given,
            steps_before=steps_before,
            w2v=w2v,
            statistics=None if w2v is None else statistics_place(w2v, weights),
            device=device,
            tell=bar.tell,
            progress=bar.show,
        )
    finally:
        torch.set_flush_denormal(flushed)
        bar.close()
    result = {"steps": recipe.steps, "output": str(out), "weights": str(out / "model.safetensors"), **scores}
    if as_json:
        print_json({"command": "train", "ok": True, **result})
    else:
        print(one_line(f"{out / 'model.safetensors'}: {json.dumps(scores)}"))
    return 0


def weights_of(init: str | None, weights: str | None) -> tuple[dict[str, Tensor], int]:
    """The weights, and for how many steps they say that they were trained."""
    from safetensors import SafetensorError, safe_open

    from dualcodec_ext._training.state import trained_steps
    from dualcodec_ext.hub import resolve_pretrained

    if init is None and weights is not None and Path(weights).is_file():
        path = Path(weights)
    else:
        path = resolve_pretrained(init or str(weights), weights if init else None)[1]
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, trained_steps(file.metadata())
    except (SafetensorError, OSError) as error:
        raise DualCodecError(f"--weights: {path} must be a readable safetensors file: {one_line(error)}") from error


class _Bar:
    """A progress bar on a terminal, else a line now and then, both on stderr."""

    _EVERY = 10  # of the log's lines, where there is no terminal

    def __init__(self, steps: int, on_terminal: bool) -> None:
        self._steps, self._shown = steps, 0
        self._bar: Any = None
        if on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, unit="step", file=sys.stderr, dynamic_ncols=True)

    def tell(self, line: str) -> None:
        if self._bar is None:
            print(one_line(line), file=sys.stderr, flush=True)
        else:
            self._bar.write(one_line(line), file=sys.stderr)

    def show(self, step: int, values: Mapping[str, float], speed: float) -> None:
        text = f"loss {values['loss']:.3f}, {speed:.1f} audio-h/h"
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(text)
        else:
            if self._shown % self._EVERY == 0:
                self.tell(f"step {step} of {self._steps}: {text}")
            self._shown += 1

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
