"""The codec as the command line sees it: samples at any rate to a code file's contents, and back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dualcodec_ext._cli.features import Features, features_for
from dualcodec_ext._cli.long import finite, tensors
from dualcodec_ext._cli.options import DEFAULT_MODEL, ModelOptions
from dualcodec_ext._files import reason
from dualcodec_ext.audio import fit_length, resample, resampled_length
from dualcodec_ext.codes import CodeFile, is_seeded
from dualcodec_ext.config import DualCodecConfig
from dualcodec_ext.errors import DualCodecError
from dualcodec_ext.hub import BUNDLED, HubName, bundled_checkpoint
from dualcodec_ext.reference.checks import MOST_SHORT_FRAMES

if TYPE_CHECKING:
    from dualcodec_ext.audio import Samples
    from dualcodec_ext.model import DualCodec


class Codec:
    """A model with its weights and its semantic features.

    Args:
        name: of the model, for code files.
        config: the model's settings.
        model: in eval mode, on its device, in its dtype.
        weights: `sha256:...` or `seeded:...`, for code files.
        features: gives the semantic features; None where only decoding is wanted.
    """

    def __init__(
        self,
        name: str,
        config: DualCodecConfig,
        model: DualCodec,
        weights: str,
        features: Features | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.model = model
        self.weights = weights
        self.features = features

    @property
    def untrained(self) -> bool:
        """Whether the weights are random numbers."""
        return is_seeded(self.weights)

    @torch.no_grad()
    def encode(self, samples: Samples, rate_hz: int, quantizers: int | None = None) -> CodeFile:
        """Turns a recording into codes.

        Args:
            samples: float32 [T], T >= 1.
            rate_hz: sample rate of the recording.
            quantizers: codebooks to use, the semantic one among them; None for all.
        Returns:
            The codes: ceil(T' / hop) frames for T' samples at the model's rate.
        Raises:
            DualCodecError: the features don't fit the recording.
        """
        if self.features is None:
            raise DualCodecError("this codec was opened for decoding alone")
        # A recording too short for one sample at the model's rate is one sample of silence to the model.
        at_model_rate = resample(samples, rate_hz, self.config.sample_rate)
        at_model_rate = fit_length(at_model_rate, max(1, len(at_model_rate)))
        frames = -(-len(at_model_rate) // self.config.hop_length)
        audio = torch.from_numpy(at_model_rate).reshape(1, 1, -1)
        features, repeated = self._fit(self.features(audio), audio, frames)
        parameter = next(self.model.parameters())
        semantic, acoustic = self.model.encode(
            audio.to(parameter),
            num_quantizers=quantizers,
            sample_rate=self.config.sample_rate,
            semantic_repr=features.to(parameter),
        )
        kept = to_uint16(semantic), None if acoustic is None else to_uint16(acoustic)
        return self.code_file(*kept, len(samples), rate_hz, repeated)

    def code_file(self, semantic: Any, acoustic: Any | None, samples: int, rate_hz: int, repeated: int) -> CodeFile:
        """The contents of a code file.

        Args:
            semantic, acoustic: uint16 [1, F] and [Q, F] or None.
            samples: of the recording.
            rate_hz: sample rate of the recording.
            repeated: frames of features that repeat the last one.
        """
        assert self.features is not None
        return CodeFile(
            semantic=semantic,
            acoustic=acoustic,
            model=self.name,
            config=self.config,
            weights=self.weights,
            source_samples=samples,
            source_rate_hz=rate_hz,
            repeated_frames=repeated,
            features=self.features.name,
        )

    @torch.no_grad()
    def decode(self, codes: CodeFile, rate_hz: int | None = None) -> tuple[Samples, int]:
        """Turns codes into audio of the recording's exact length.

        Args:
            codes: made by this model.
            rate_hz: sample rate wanted; None for the model's.
        Returns:
            float32 [round(source_samples * rate / source_rate)] and the rate.
        Raises:
            DualCodecError: the model's output is not finite.
        """
        samples = finite(self.model.decode_from_codes(*tensors(self, codes)))
        rate_hz = rate_hz or self.config.sample_rate
        samples = resample(fit_length(samples, max(1, codes.model_samples)), self.config.sample_rate, rate_hz)
        return fit_length(samples, resampled_length(codes.source_samples, codes.source_rate_hz, rate_hz)), rate_hz

    def _fit(self, features: Tensor, audio: Tensor, frames: int) -> tuple[Tensor, int]:
        """The features with exactly `frames` frames, and how many of them repeat the last one."""
        if features.shape[-1] == 0:
            features = self.features_of_little(audio)
        return fitted(features, frames)

    def features_of_little(self, audio: Tensor) -> Tensor:
        """Features of [1, 1, S] that is shorter than their window: silence behind it makes a first frame."""
        assert self.features is not None
        return self.features(torch.nn.functional.pad(audio, (0, 2 * self.config.hop_length)))


def fitted(features: Tensor, frames: int) -> tuple[Tensor, int]:
    """Cuts features, or repeats the last frame, as w2v-BERT's framing needs.

    Args:
        features: [1, C, F].
        frames: wanted.
    Returns:
        [1, C, frames], and how many of them repeat the last one.
    Raises:
        DualCodecError: more are missing than w2v-BERT leaves out.
    """
    features = features[..., :frames]
    missing = frames - features.shape[-1]
    if missing > MOST_SHORT_FRAMES or (missing and features.shape[-1] == 0):
        raise DualCodecError(f"{frames} more feature frames are needed, got {features.shape[-1]}")
    return torch.cat([features, features[..., -1:].expand(-1, -1, missing)], dim=-1), missing


class CodecCache:
    """Opens the codec that a code file asks for, and keeps it for the next one.

    Args:
        options: what the command line asks for; None in `model` and `seed` leaves them to the file.
        any_weights: take codes that other weights made.
    """

    def __init__(self, options: ModelOptions, any_weights: bool) -> None:
        self._options = options
        self._any_weights = any_weights
        self._key: object = None
        self._codec: Codec | None = None
        self._wanted = None if options.model is None else load_config(options.model)
        configure_torch(options)
        if options.weights is not None:  # a missing file is one error, not one per code file
            if self._wanted is not None:
                find_weights(options.weights, *self._wanted)
            elif not Path(options.weights).expanduser().exists() and HubName.parse(options.weights) is None:
                raise DualCodecError(f"--weights: {options.weights}: no such file or folder")

    def for_codes(self, codes: CodeFile) -> Codec:
        """Gives the codec for these codes.

        Args:
            codes: a code file's contents.
        Returns:
            The codec, opened for decoding.
        Raises:
            DualCodecError: the codes are another model's, or were made with other weights.
        """
        if self._wanted is not None and self._wanted[1] != codes.config:
            raise DualCodecError(f"its codes are of the model {codes.model}, not of {self._wanted[0]}")
        seed = _seed_of(codes.weights) if self._options.seed is None else self._options.seed
        own = self._options.weights is None and bundled(codes.model, codes.config) is not None
        if self._options.weights is None and not codes.untrained and not self._any_weights and not own:
            raise DualCodecError(f"its codes were made with {_short(codes.weights)}: say where they are with --weights")
        key = (codes.config, seed)
        if self._codec is None or key != self._key:
            self._codec = None  # the old model goes before the new one comes
            self._codec = open_model(codes.model, codes.config, self._options, seed)
            self._key = key
        if codes.weights != self._codec.weights and not self._any_weights:
            mine, theirs = _short(self._codec.weights), _short(codes.weights)
            raise DualCodecError(
                f"its codes were made with {theirs}, not with {mine} (--any-weights decodes them anyway)"
            )
        return self._codec


def open_codec(options: ModelOptions, quantizers: int | None) -> Codec:
    """Opens the codec that the command line asks for, for encoding and decoding.

    Args:
        options: which model, and how it runs.
        quantizers: codebooks that will be asked for, to be checked before the model loads.
    Returns:
        The codec.
    Raises:
        DualCodecError: no such model, weights or device, weights of another model, or no semantic model.
    """
    configure_torch(options)
    name, config = load_config(options.model or DEFAULT_MODEL)
    if quantizers is not None and not 1 <= quantizers <= config.n_codebooks + 1:
        raise DualCodecError(f"--quantizers must be 1 to {config.n_codebooks + 1} for {name}, got {quantizers}")
    codec = open_model(name, config, options, options.seed or 0)
    codec.features = features_for(config, options, codec.model)
    return codec


def open_model(name: str, config: DualCodecConfig, options: ModelOptions, seed: int) -> Codec:
    """Builds a model and gives it its weights.

    Args:
        name: of the model.
        config: its settings.
        options: weights, dtype, device and whether decode is the fast one.
        seed: of the random weights where there are no others.
    Returns:
        A codec without features.
    Raises:
        DualCodecError: the weights are missing or another model's.
    """
    from dualcodec_ext.model import DualCodec

    path = bundled(name, config) if options.weights is None else find_weights(options.weights, name, config)
    model = DualCodec(**config.to_dict())
    if path is None:
        from dualcodec_ext.testing import seed_model

        seed_model(model, seed)
        weights = f"seeded:{seed}"
    else:
        model.load_checkpoint(path)
        weights = file_digest(path)
    model = model.to(device=options.device, dtype=getattr(torch, options.dtype)).eval()
    model.set_fast(options.fast)
    model.prepare()  # now, or the first file's speed would be that of packing
    return Codec(name, config, model, weights)


def bundled(name: str, config: DualCodecConfig) -> Path | None:
    """Finds the weights that the package brings for a model.

    Args:
        name: of the model.
        config: its settings.
    Returns:
        The file; None where the package has none for such a model.
    """
    if name in BUNDLED and config == DualCodecConfig.preset(name):
        return bundled_checkpoint(name)
    return None


def configure_torch(options: ModelOptions) -> None:
    """Sets the number of threads and checks the device.

    Args:
        options: threads and device.
    Raises:
        DualCodecError: no such device here.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise DualCodecError(f"--device must be cpu, cuda or cuda:N, got {options.device}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DualCodecError(f"--device {options.device}: this torch ({torch.__version__}) finds no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DualCodecError(f"--device {options.device}: there are {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise DualCodecError(f"--device must be cpu, cuda or cuda:N, got {options.device}")


def load_config(model: str) -> tuple[str, DualCodecConfig]:
    """Gives a model's name and settings.

    Args:
        model: a preset's name, or the path of a JSON file of settings.
    Returns:
        The name (the file's stem for a JSON file) and the settings.
    Raises:
        DualCodecError: no such preset or file, or wrong settings.
    """
    if not model.endswith(".json"):
        if model not in DualCodecConfig.presets():
            names = ", ".join(DualCodecConfig.presets())
            raise DualCodecError(f"--model must be one of {names}, or a file of settings, NAME.json, got {model}")
        return model, DualCodecConfig.preset(model)
    try:
        return Path(model).stem, DualCodecConfig.from_json(Path(model))
    except OSError as error:
        raise DualCodecError(f"--model: cannot read {model}: {reason(error)}") from error
    except (TypeError, ValueError) as error:
        raise DualCodecError(f"--model: {model}: {error}") from error


def find_weights(weights: str, name: str, config: DualCodecConfig) -> Path:
    """Finds the weights file that the command line means.

    Args:
        weights: a safetensors file, a folder that holds one, or a hub name.
        name: of the model.
        config: its settings.
    Returns:
        The file; one that a hub name stands for is downloaded first.
    Raises:
        DualCodecError: there is none.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if name in DualCodecConfig.presets() and config == DualCodecConfig.preset(name):
        from dualcodec_ext.hub import resolve_pretrained

        try:
            return Path(resolve_pretrained(name, weights)[1])
        except DualCodecError as error:
            raise DualCodecError(f"--weights: {str(error).removeprefix('checkpoint: ')}") from error
    if not path.is_dir():
        raise DualCodecError(f"--weights: {weights}: no such file or folder")
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise DualCodecError(f"--weights: {weights} must hold one safetensors file, got {len(files)}")
    return files[0]


def file_digest(path: Path) -> str:
    """Identifies a weights file by its contents.

    Args:
        path: the file.
    Returns:
        `sha256:` and 64 hexadecimal digits, as `sha256sum` prints them.
    Raises:
        DualCodecError: it can't be read.
    """
    try:
        with open(path, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise DualCodecError(f"cannot read {path}: {reason(error)}") from error


def _seed_of(weights: str) -> int:
    digits = weights.removeprefix("seeded:")
    return int(digits) if is_seeded(weights) and digits.isdecimal() else 0


def _short(weights: str) -> str:
    if is_seeded(weights):
        return f"random weights of seed {weights.removeprefix('seeded:')}"
    return f"the weights {weights[:19]}..."


def to_uint16(codes: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint16]]:
    """Codes [1, q, F] as code files hold them, [q, F]."""
    if codes.numel() and int(codes.max()) > 0xFFFF:
        raise DualCodecError(f"code files hold codes up to 65535, got {int(codes.max())}")
    return codes[0].cpu().numpy().astype(np.uint16)
