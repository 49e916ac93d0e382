"""Is this package right on these weights? It is compared with the float64 reference and the PyPI package."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualcodec_ext import reference
from dualcodec_ext.errors import DualCodecError
from dualcodec_ext.peer import find_peer
from dualcodec_ext.testing import (
    assert_close_to_f64,
    compare_codes,
    rvq_margin_bound,
)

if TYPE_CHECKING:
    from dualcodec_ext._cli.options import ModelOptions
    from dualcodec_ext.model import DualCodec

MOST_SECONDS = 10.0  # of audio: the float64 reference takes seconds per second
# Plain PyTorch's own rounding, doubled, is what the engine may have; below this a difference is the search's own.
_LEAST_RELATIVE_ERROR = 2.0**-22


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        name: what was compared.
        passed: None where it could not be done.
        text: the numbers, or what went wrong, on one line.
    """

    name: str
    passed: bool | None
    text: str

    def __str__(self) -> str:
        word = {True: "ok", False: "FAIL", None: "skipped"}[self.passed]
        return f"{self.name + ':':<22}{word}, {self.text}"


@dataclass(frozen=True)
class Encoded:
    """What a reference model makes of one recording, path by path: semantic, then acoustic.

    Args:
        codes: [1, 1, F] and [1, Q, F].
        latents: [1, C, F] each, what the codebooks saw.
    """

    codes: tuple[Tensor, Tensor]
    latents: tuple[Tensor, Tensor]


@torch.no_grad()
def compare(fast: DualCodec, audio: Tensor, features: Tensor) -> list[Check]:
    """Compares a model with the reference that has its parameters: codes, margins and waveform.

    Args:
        fast: in eval mode, float32, on the CPU.
        audio: float32 [1, 1, S] at the model's rate.
        features: float32 [1, semantic_dim, F].
    Returns:
        One check per comparison.
    Numerics:
        The truth is the reference in float64. Codes may differ where its own margin is below what twice plain
        PyTorch's rounding error explains; the waveform, decoded from the same codes, may have twice plain PyTorch's
        error in RMS and in maximum, or one ulp of the largest sample.
    """
    plain, exact = (reference.DualCodec(**fast.settings).eval() for _ in range(2))
    for model in (plain, exact):
        model.load_state_dict(fast.state_dict())
    exact.double()
    semantic, acoustic = fast.encode(audio, sample_rate=None, semantic_repr=features)
    assert acoustic is not None
    # The acoustic path codes what the semantic one leaves over, so all three are given the same semantic codes.
    truth = _encode(exact, audio.double(), features.double(), semantic)
    rounded = _encode(plain, audio, features, semantic)

    checks = []
    stacks = (exact.semantic_vq, exact.dac.quantizer)
    for i, (name, codes) in enumerate((("semantic", semantic), ("acoustic", acoustic))):
        search = _Search(stacks[i], truth.latents[i], truth.codes[i])
        bound = search.bound(_rounding(rounded.latents[i], truth.latents[i]))
        compared = partial(compare_codes, codes, search.codes, search.margins, bound)
        checks.append(_checked(f"{name} codes", compared))
        checks.append(_checked(f"{name} margins", search.compare_op))

    wave, plain_wave, exact_wave = (m.decode_from_codes(semantic, truth.codes[1]) for m in (fast, plain, exact))
    checks.append(_checked("waveform", partial(assert_close_to_f64, wave, exact_wave, plain_wave, fewest=1)))
    return checks


@torch.no_grad()
def compare_with_peer(fast: DualCodec, audio: Tensor, features: Tensor) -> Check:
    """Compares the reference with the PyPI package's model, both in float64, on the same parameters.

    Args:
        fast: the model whose parameters are used.
        audio: float32 [1, 1, S] at the model's rate.
        features: float32 [1, semantic_dim, F].
    Returns:
        The check; skipped where the package is not installed or has no such model.
    """
    name = "PyPI package"
    peer_class, version = find_peer()
    if peer_class is None:
        return Check(name, None, version)
    known = inspect.signature(peer_class).parameters
    defaults = reference.DualCodec(**{k: v for k, v in fast.settings.items() if k in known}).settings
    foreign = sorted(k for k, v in fast.settings.items() if defaults[k] != v)
    if foreign:
        return Check(name, None, f"{version} has no {', '.join(foreign)}")
    peer = peer_class(**{k: v for k, v in fast.settings.items() if k in known}).eval()
    ours = reference.DualCodec(**fast.settings).eval()
    try:
        peer.load_state_dict(fast.state_dict(), strict=True)
    except RuntimeError as error:
        return Check(name, False, " ".join(str(error).split())[:300])
    ours.load_state_dict(fast.state_dict())
    audio, features = audio.double(), features.double()
    theirs = peer.double().encode(audio, sample_rate=fast.settings["sample_rate"], semantic_repr=features)
    mine = ours.double().encode(audio, sample_rate=None, semantic_repr=features)
    assert mine[1] is not None
    wrong = sum(int((a != b).sum()) for a, b in zip(mine, theirs, strict=True) if b is not None)
    total = mine[0].numel() + mine[1].numel()
    worst = float((ours.decode_from_codes(*mine) - peer.decode_from_codes(*mine)).abs().max())
    text = f"{version}, keys equal, {total - wrong} of {total} codes equal, waveform within {worst:.2g} in float64"
    # float64 against float64: what is left is the order of sums.
    return Check(name, wrong == 0 and worst < 1e-9, text)


def run_verify(options: ModelOptions, audio: Path | None, as_json: bool) -> int:
    """Compares on the weights that the command line names, and prints one verdict.

    Args:
        options: model, weights, semantic model and threads.
        audio: speech to compare on; None for generated vowels.
        as_json: print JSON.
    Returns:
        0 for PASS, 1 for FAIL.
    Raises:
        DualCodecError: a file is missing or unreadable.
    """
    from dualcodec_ext._cli.codec import configure_torch, file_digest, find_weights, load_config
    from dualcodec_ext._cli.report import one_line, print_json

    configure_torch(options)
    name, config = load_config(options.model or "12hz_v1")
    assert options.weights is not None
    path = find_weights(options.weights, name, config)
    samples, what = _speech(audio, config.sample_rate)
    facts = [f"model: {name}", f"weights: {one_line(path)} ({file_digest(path)})", f"audio: {one_line(what)}"]
    _need_safetensors(path)
    checks, more = _run_checks(path, options, config, samples)
    facts += more
    passed = all(check.passed is not False for check in checks)
    verdict = f"{'PASS' if passed else 'FAIL'}: {name} with {one_line(path)}"
    if as_json:
        rows = [{"name": c.name, "passed": c.passed, "text": c.text} for c in checks]
        print_json({"command": "verify", "ok": passed, "verdict": verdict, "facts": facts, "checks": rows})
    else:
        print("\n".join([*facts, *map(str, checks), verdict]))
    return 0 if passed else 1


def _need_safetensors(path: Path) -> None:
    """A file that can't be read is an error; a verdict is about what is in it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise DualCodecError(f"--weights: {path} must be a readable safetensors file: {error}") from error


def _run_checks(path: Path, options: ModelOptions, config: Any, samples: Tensor) -> tuple[list[Check], list[str]]:
    from dualcodec_ext._cli.features import features_for
    from dualcodec_ext.model import DualCodec

    model = DualCodec(**config.to_dict()).eval()
    try:
        model.load_checkpoint(path)
    except DualCodecError as error:
        return [Check("keys", False, str(error))], []
    checks = [Check("keys", True, f"{len(model.state_dict())} tensors, each of the right shape")]
    features = features_for(config, options, model, stand_in=True)
    feat = features(samples)[..., : -(-samples.shape[-1] // config.hop_length)]
    checks += compare(model, samples, feat)
    checks.append(compare_with_peer(model, samples, feat))
    return checks, [f"features: {features.name}"]


def _speech(audio: Path | None, rate_hz: int) -> tuple[Tensor, str]:
    from dualcodec_ext._cli.voice import vowels
    from dualcodec_ext.audio import read_audio, resample

    if audio is None:
        recording, what = vowels("aieouaiuoeai"), "generated vowels"
    else:
        recording, what = read_audio(audio), str(audio)
    samples = resample(recording.samples, recording.sample_rate_hz, rate_hz)
    most = int(MOST_SECONDS * rate_hz)
    if len(samples) > most:
        what += f", its first {MOST_SECONDS:g} s"
    return torch.from_numpy(samples[:most].copy()).reshape(1, 1, -1), what


def _encode(model: reference.DualCodec, audio: Tensor, features: Tensor, semantic: Tensor) -> Encoded:
    """Runs both paths of a reference model, the acoustic one behind the semantic codes given."""
    z = model.convnext_encoder(features)
    latent = model.semantic_vq.from_codes(semantic)[0]
    if model.decode_semantic_for_codec:
        latent = model.convnext_decoder(latent)
    seen: list[Tensor] = []
    hook = model.dac.quantizer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        acoustic = model.dac.encode(audio, None, None, latent)[1]
    finally:
        hook.remove()
    return Encoded((model.semantic_vq(z)[1], acoustic), (z, seen[0]))


def _rounding(plain: Tensor, exact: Tensor) -> float:
    """Twice the largest relative error per frame that plain PyTorch's float32 latent has."""
    error = (plain.double() - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-30)
    return max(2 * float(error.max()), _LEAST_RELATIVE_ERROR)


class _Search:
    """One quantiser on one float64 latent: the codes, and how sure each of them is."""

    def __init__(self, stack: reference.ResidualVectorQuantize, latent: Tensor, codes: Tensor) -> None:
        self._stack, self._latent, self.codes = stack, latent, codes
        self._tensors = stack.op_tensors(torch.float64)
        margins = reference.rvq_search_ref(latent, **self._tensors, return_margin=True)[2]
        assert margins is not None
        self.margins = margins

    def bound(self, relative_error: float) -> Tensor:
        return rvq_margin_bound(self._latent, **self._tensors, relative_error=relative_error)

    def compare_op(self) -> str:
        """Runs the compiled search alone on the latent rounded to float32; gives what it found in one line."""
        from dualcodec_ext import ops

        codes, _, margins = ops.rvq_search(
            self._latent.float(), **self._stack.op_tensors(torch.float32), return_margin=True
        )
        assert margins is not None
        bound = self.bound(_LEAST_RELATIVE_ERROR)
        report = compare_codes(codes, self.codes, self.margins, bound)
        same = torch.cumsum((codes != self.codes).int(), 1) == 0
        off = torch.where(same & self.margins.isfinite(), (margins.double() - self.margins).abs() / bound, 0.0)
        worst = float(off.max())
        if not worst <= 1:
            raise AssertionError(f"margins must be within the rounding bound, got {worst:.2g} times it")
        return f"{report}; within {worst:.2g} of the rounding bound, smallest {float(self.margins.min()):.2g}"


def _checked(name: str, outcome: Callable[[], object]) -> Check:
    try:
        return Check(name, True, str(outcome()))
    except AssertionError as error:
        return Check(name, False, " ".join(str(error).split()))
