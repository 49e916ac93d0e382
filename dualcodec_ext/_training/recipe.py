"""The settings of a training run, read from JSON; the recipe of preset `tiny` is in the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import DualCodecConfig
from ..errors import DualCodecError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_LOSSES = {"mel": 15.0, "magnitude": 1.0, "waveform": 1.0, "commitment": 0.25, "codebook": 1.0}
_HEARING = {"disturbance": 0.0, "envelope": 0.0}  # see `perception`
ENVELOPE_S = 0.4  # a stretch of the envelope loss
_ADVERSARY = {"adversarial": 1.0, "feature": 2.0}

# What a setting must be: its type, the least value and the largest, None: none.
_Range = tuple[type, float, float | None]
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(("steps", "batch", "workers", "segment_frames", "log_every", "validate_every"), (int, 1, None)),
    **dict.fromkeys(("start_batches", "memory_steps"), (int, 1, None)),
    **dict.fromkeys(("seed", "warmup_steps", "start_steps"), (int, 0, None)),
    **dict.fromkeys(("learning_rate", "final_learning_rate", "weight_decay", "clip"), (float, 0, None)),
    **dict.fromkeys(("fewest", "checkpoint_every_s"), (float, 0, None)),
    **dict.fromkeys(("ema_decay", "quantizer_dropout", "bypass"), (float, 0, 1)),
}
_LISTS: dict[str, _Range] = {
    "betas": (float, 0, 1),
    "windows": (int, 4, None),
    "bands": (int, 1, None),
    "count_odds": (float, 0, None),
}
_ADVERSARY_RANGES: dict[str, _Range] = {"width": (int, 1, None), "learning_rate": (float, 0, None)}
_ADVERSARY_LISTS: dict[str, _Range] = {"periods": (int, 1, None), "windows": (int, 4, None)}


def _check(name: str, value: object, kind: type, least: float, most: float | None) -> None:
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or value != value or value < least or (most is not None and value > most):  # type: ignore[operator]
        what = "an integer" if kind is int else "a number"
        limits = f"from {least:g}" + ("" if most is None else f" to {most:g}")
        raise DualCodecError(f"recipe: {name} must be {what} {limits}, got {value!r}")


def _check_list(name: str, values: object, kind: type, least: float, most: float | None, empty: bool = False) -> None:
    if not isinstance(values, (list, tuple)) or not (values or empty):
        raise DualCodecError(f"recipe: {name} must be a list of numbers, got {values!r}")
    for value in values:
        _check(f"each of {name}", value, kind, least, most)


def _check_adversary(settings: Mapping[str, object], samples: int) -> None:
    known = [*_ADVERSARY_LISTS, *_ADVERSARY_RANGES]
    for name, value in settings.items():
        if name in _ADVERSARY_RANGES:
            _check(f"adversary: {name}", value, *_ADVERSARY_RANGES[name])
        elif name in _ADVERSARY_LISTS:
            kind, least, most = _ADVERSARY_LISTS[name]
            # A period fills up its last row with what a segment mirrors.
            _check_list(f"adversary: {name}", value, kind, least, samples if name == "periods" else most, empty=True)
        else:
            raise DualCodecError(f"recipe: adversary must be among {', '.join(known)}, got {name}")
    if not any(settings.get(name, True) for name in _ADVERSARY_LISTS):
        raise DualCodecError("recipe: adversary must have periods or windows, got neither")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Args:
        model: a preset's name, or the settings of a model.
        seed: of everything drawn.
        steps: in all; the learning rate ends its cosine there.
        batch: items per step.
        workers: parts that the batch is cut into, each on a thread of its own; it divides `batch`.
        segment_frames: frames per item.
        learning_rate, final_learning_rate: the cosine's ends.
        warmup_steps: steps until the learning rate is reached.
        betas, weight_decay: AdamW's.
        clip: largest norm of the gradient; 0 for none.
        ema_decay: of the averaged weights, which are what is saved.
        losses: a factor per part; those left out keep their default. "disturbance" and "envelope" are 0 unless given:
            they follow what PESQ and STOI measure.
        windows, bands: of the spectral loss.
        highest_hz: upper end of its mel bands; None for the Nyquist frequency.
        optimizer: of the matrices and convolutions: adamw, muon. Everything else is AdamW's.
        quantizer_dropout: fraction of a batch whose number of acoustic codebooks is drawn, from none to all.
        count_odds: odds of 0, 1, 2, ... acoustic codebooks where that number is drawn, one for each number that the
            model can have; empty: all alike.
        bypass: fraction of steps without acoustic codebooks.
        start_steps: steps with an acoustic latent that is not quantised; its codebooks then start from it.
        start_batches: how many batches k-means sees.
        codebooks: "average": entries are running means of what chose them; "gradient": the codebook loss moves them.
        memory_steps, fewest: of `CodebookCare`.
        adversary_from: step from which the discriminators train and judge; None for never.
        adversary: periods, windows, width and learning_rate of the discriminators.
        voices: by the beginning of a speaker's name, a factor on how often it is drawn.
        augment: vary speed, loudness, colour and noise.
        way: of the forward: auto, reference, ops, channels_last.
        log_every, validate_every: in steps.
        checkpoint_every_s: seconds between checkpoints.

    Raises:
        DualCodecError: a setting of the wrong type or out of range.
    """

    model: str | dict[str, Any] = "tiny"
    seed: int = 0
    steps: int = 20000
    batch: int = 6
    workers: int = 1
    segment_frames: int = 40
    learning_rate: float = 1e-3
    final_learning_rate: float = 2e-5
    warmup_steps: int = 200
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 1e-3
    optimizer: str = "adamw"
    clip: float = 5.0
    ema_decay: float = 0.999
    losses: dict[str, float] = field(default_factory=dict)
    windows: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    bands: tuple[int, ...] = (8, 16, 32, 64, 96)
    highest_hz: float | None = None
    quantizer_dropout: float = 0.5
    count_odds: tuple[float, ...] = ()
    bypass: float = 0.0
    start_steps: int = 0
    start_batches: int = 30
    codebooks: str = "average"
    memory_steps: int = 60
    fewest: float = 0.1
    adversary_from: int | None = None
    adversary: dict[str, Any] = field(default_factory=dict)
    voices: dict[str, float] = field(default_factory=dict)
    augment: bool = True
    way: str = "auto"
    log_every: int = 20
    validate_every: int = 1000
    checkpoint_every_s: float = 180.0

    def __post_init__(self) -> None:
        for name, (kind, least, most) in _RANGES.items():
            _check(name, getattr(self, name), kind, least, most)
        for name, (kind, least, most) in _LISTS.items():
            _check_list(name, getattr(self, name), kind, least, most, empty=name == "count_odds")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.betas) != 2:
            raise DualCodecError(f"recipe: betas must hold two numbers, got {len(self.betas)}")
        for name in ("losses", "voices", "adversary"):
            settings = getattr(self, name)
            if not isinstance(settings, dict):
                raise DualCodecError(f"recipe: {name} must be an object, got {settings!r}")
            for key, value in settings.items() if name != "adversary" else ():
                _check(f"{name}: {key}", value, float, 0, None)
        for name in ("highest_hz", "adversary_from"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), float if name == "highest_hz" else int, 0, None)
        if not isinstance(self.augment, bool):
            raise DualCodecError(f"recipe: augment must be true or false, got {self.augment!r}")
        if not isinstance(self.model, (str, dict)):
            raise DualCodecError(f"recipe: model must be a preset's name or an object, got {self.model!r}")
        factors = _LOSSES | _HEARING | _ADVERSARY
        unknown = sorted(set(self.losses) - set(factors))
        if unknown:
            raise DualCodecError(f"recipe: losses must be among {', '.join(factors)}, got {unknown[0]}")
        object.__setattr__(self, "losses", factors | self.losses)
        if self.batch % self.workers or self.workers > 2:
            raise DualCodecError(f"recipe: workers must be 1 or 2 and divide batch={self.batch}, got {self.workers}")
        if len(self.windows) != len(self.bands):
            raise DualCodecError(f"recipe: bands must hold one number per window, got {len(self.bands)}")
        if self.codebooks not in ("average", "gradient"):
            raise DualCodecError(f"recipe: codebooks must be average or gradient, got {self.codebooks!r}")
        from .forward import WAYS

        if self.optimizer not in ("adamw", "muon"):
            raise DualCodecError(f"recipe: optimizer must be adamw or muon, got {self.optimizer!r}")
        if self.way not in WAYS:
            raise DualCodecError(f"recipe: way must be one of {', '.join(WAYS)}, got {self.way!r}")
        counts = self.model_config().n_codebooks + 1
        if self.count_odds and (len(self.count_odds) != counts or not 0 < sum(self.count_odds) < float("inf")):
            raise DualCodecError(
                f"recipe: count_odds must hold {counts} numbers, not all of them 0, got {list(self.count_odds)}"
            )
        config = self.model_config()
        _check_adversary(self.adversary, self.segment_frames * config.hop_length)
        # Features may come a frame short, and the audio is cut to them.
        surely_s = (self.segment_frames - 1) * config.hop_length / config.sample_rate
        if self.losses["envelope"] and surely_s < ENVELOPE_S:
            raise DualCodecError(
                f"recipe: segment_frames less one must make {ENVELOPE_S} s or more for the envelope loss, got"
                f" {self.segment_frames} - 1 ({surely_s:g} s)"
            )

    def model_config(self) -> DualCodecConfig:
        """Return the model's settings, with the recipe's quantizer_dropout."""
        try:
            if isinstance(self.model, str):
                config = DualCodecConfig.preset(self.model)
            else:
                config = DualCodecConfig.from_dict(self.model)
            return DualCodecConfig.from_dict(config.to_dict() | {"quantizer_dropout": self.quantizer_dropout})
        except (TypeError, ValueError) as error:
            raise DualCodecError(f"recipe: model: {error}") from None

    @classmethod
    def load(cls, source: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """Read a recipe.

        Args:
            source: a JSON file, or the name of a recipe in the package, such as "tiny".
            changes: settings that replace those of the file.
        """
        path = RECIPES / f"{source}.json" if "/" not in str(source) and Path(source).suffix == "" else Path(source)
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.json")))
            raise DualCodecError(f"recipe: source must be a JSON file or one of {known}, got {source}") from None
        except ValueError as error:
            raise DualCodecError(f"recipe: {source} must be JSON, got: {error}") from None
        if not isinstance(settings, dict):
            raise DualCodecError(f"recipe: {source} must be an object, got {type(settings).__name__}")
        return cls.from_dict(settings | dict(changes or {}))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Recipe:
        """Make a recipe from a mapping; names left out keep their defaults."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise DualCodecError(f"recipe: settings must be among {', '.join(known)}, got {unknown[0]}")
        try:
            return cls(**settings)
        except TypeError as error:
            raise DualCodecError(f"recipe: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as `from_dict` takes them."""
        return asdict(self)
