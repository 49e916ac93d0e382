"""What `info`, `doctor` and `bench` do."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualcodec_ext._cli.report import FAILED, one_line, print_json
from dualcodec_ext._files import reason
from dualcodec_ext.errors import DualCodecError

if TYPE_CHECKING:
    pass

# What a weights file may say about itself in its metadata, as JSON: see `python -m bench.quality --publish`.
SCORES = ("codebook_use", "entropy_bits", "trained_steps")


def run_info(path: Path | None, as_json: bool) -> int:
    """Prints what a file holds.

    Args:
        path: a code file, a weights file or an audio file; None for the weights that the package brings.
        as_json: print JSON.
    Returns:
        The exit code.
    Raises:
        DualCodecError: none of the three, or damaged.
    """
    default: dict[str, Any] = {}
    if path is None:
        from dualcodec_ext._cli.options import DEFAULT_MODEL
        from dualcodec_ext.hub import bundled_checkpoint

        path, default = bundled_checkpoint(DEFAULT_MODEL), {"model": f"{DEFAULT_MODEL}, the default"}
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise DualCodecError(f"cannot read {path}: {reason(error)}") from error
    if not start:
        raise DualCodecError(f"{path}: is an empty file")
    # A safetensors file opens with the length of its JSON header, 8 bytes.
    if start[8:9] == b"{":
        facts = default | _safetensors_info(path)
    elif path.name.endswith(".safetensors"):
        raise DualCodecError(f"{path}: is not a safetensors file")
    else:
        facts = _audio_info(path)
    if as_json:
        print_json({"command": "info", "ok": True, "file": one_line(path), **facts})
    else:
        print(one_line(path))
        for name, value in facts.items():
            print(f"  {name.replace('_', ' ')}: {_shown(value)}")
    return 0


def run_doctor(as_json: bool) -> int:
    """Prints what was built and what can run here.

    Args:
        as_json: print the build record as JSON.
    Returns:
        The exit code: 0, since a missing piece is what this command is there to tell.
    """
    from dualcodec_ext import build

    if as_json:
        print_json(
            {
                "command": "doctor",
                "ok": True,
                "build": _plain(build.build_info()),
                "doctor": str(build.doctor()),
            }
        )
    else:
        print(build.doctor())
    return 0


def run_bench(arguments: Sequence[str]) -> int:
    """Runs the repository's benchmarks in a process of their own.

    Args:
        arguments: for `python -m bench`.
    Returns:
        The exit code of that process.
    Raises:
        DualCodecError: this is no checkout of the repository.
    """
    # A folder named bench could be anyone's: ours has a module of timings.
    roots = [root for root in (Path.cwd(), Path(__file__).resolve().parents[2]) if (root / "bench/timing.py").is_file()]
    if not roots:
        raise DualCodecError(
            "bench: the benchmarks are in the repository, not in the installed package: run it in a checkout"
        )
    paths = [str(roots[0]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    sys.stdout.flush()
    code = subprocess.run([sys.executable, "-m", "bench", *arguments], env=environment, check=False).returncode
    return code if code >= 0 else FAILED


def _audio_info(path: Path) -> dict[str, Any]:
    from dualcodec_ext.audio import audio_info

    info = audio_info(path)
    return {
        "kind": "audio",
        "format": info.format,
        "sample_rate_hz": info.sample_rate_hz,
        "channels": info.channels,
        "samples": info.frames,
        "duration_s": info.frames / info.sample_rate_hz,
    }


def _safetensors_info(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    from dualcodec_ext.code_use import codebook_use
    from dualcodec_ext.codes import is_code_file, read_codes

    if is_code_file(path):
        codes = read_codes(path)
        facts = codes.metadata()
        config = facts.pop("config")
        sizes = [config["semantic_codebook_size"]] + [config["codebook_size"]] * (codes.codebooks - 1)
        return {
            "kind": "codes",
            **facts,
            "codebook_sizes": sizes,
            "frame_rate_hz": codes.config.frame_rate_hz,
            "bitrate_bps": codes.bitrate_bps,
            "duration_s": codes.duration_s,
            **codebook_use([*codes.semantic, *([] if codes.acoustic is None else codes.acoustic)], sizes),
            "file_bytes": path.stat().st_size,
        }
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {name: list(part.get_shape()) for name, part in slices.items()}
            dtypes = sorted({str(part.get_dtype()) for part in slices.values()})
            said = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DualCodecError(f"{path}: is cut short or damaged ({one_line(error)})") from error
    if not any(name.startswith("dac.") for name in shapes):
        raise DualCodecError(f"{path}: is safetensors, but neither a code file nor the weights of a DualCodec model")
    from dualcodec_ext._cli.codec import file_digest
    from dualcodec_ext.model import FEATURES

    sizes = [_product(shape) for shape in shapes.values()]
    fitting = _fitting_presets({name: shape for name, shape in shapes.items() if not name.startswith(FEATURES)})
    return {
        "kind": "weights",
        "fits_models": fitting,
        **_model_facts(fitting),
        **{name: json.loads(text) for name, text in said.items() if name in SCORES},
        "tensors": len(shapes),
        "parameters": sum(sizes),
        "dtypes": dtypes,
        "file_bytes": path.stat().st_size,
        "weights": file_digest(path),
    }


def _fitting_presets(shapes: dict[str, list[int]]) -> list[str]:
    import torch

    from dualcodec_ext.config import DualCodecConfig
    from dualcodec_ext.reference import DualCodec

    fitting = []
    for name in DualCodecConfig.presets():
        with torch.device("meta"):  # shapes alone, no memory
            model = DualCodec(**DualCodecConfig.preset(name).to_dict())
        if {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes:
            fitting.append(name)
    return fitting


def _model_facts(presets: Sequence[str]) -> dict[str, Any]:
    """The rates of the first of the presets."""
    from dualcodec_ext.config import DualCodecConfig

    for name in presets[:1]:
        config = DualCodecConfig.preset(name)
        sizes = [config.semantic_codebook_size] + [config.codebook_size] * config.n_codebooks
        return {
            "frame_rate_hz": config.frame_rate_hz,
            "codebook_sizes": sizes,
            "bitrate_bps": config.frame_rate_hz * sum(math.log2(size) for size in sizes),
        }
    return {}


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return one_line(value)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
