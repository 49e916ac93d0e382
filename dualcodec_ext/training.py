"""Train a DualCodec from scratch, from a checkpoint, or from where a run stopped: `train`, and what it takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import reason, write_atomic
from ._training.codebooks import start_acoustic, start_scales, start_semantic
from ._training.data import Batches, Voice, hours, load_voices, long_enough, stretches
from ._training.discriminators import Discriminators
from ._training.forward import Forward, Output, allow_recompiling, compile_snake
from ._training.losses import discriminator_loss, feature_loss, generator_loss
from ._training.perception import Comparison
from ._training.plots import can_draw, draw_curves, draw_spectrograms
from ._training.recipe import Recipe
from ._training.scores import SHORTEST_S, missing_scorers
from ._training.state import NOTHING_TAKEN, State, Taken, take_over
from .errors import DualCodecError
from .model import FEATURES, DualCodec
from .semantic import CODEC_RATE_HZ, LogMelFeatures, W2vBertFeatures

__all__ = ["Recipe", "Trainer", "train"]

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
_STATISTICS_BATCHES = 20
_SEMANTIC_ALONE = 0.2  # of the items before start_steps
_START_SEED = 1 << 20  # batches before the first step are none of the steps'


class Trainer:
    """A run in memory: `step` by step, without files.

    Args:
        recipe: its settings.
        voices: what it is trained on.
        device: where it runs.
        weights: to start from (`take_over`), with the log-mel front end's statistics if they hold them; None to start
            from nothing. Parts and codebooks that they do not fit start as from nothing.
        front_end: gives features [B, C, F] of audio [B, 1, S]; None for the log-mel front end.

    Attributes:
        left: what of `weights` did not fit, one line each.

    Raises:
        DualCodecError: settings that do not go together, or weights that fit neither the encoder nor the decoder.
    """

    def __init__(
        self,
        recipe: Recipe,
        voices: list[Voice],
        device: str | torch.device = "cpu",
        weights: dict[str, Tensor] | None = None,
        front_end: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.state = State(recipe, self.device)
        config = recipe.model_config()
        if front_end is None and config.semantic_dim != self.state.features.channels:
            raise DualCodecError(
                f"train: a model on features other than log-mel needs them (--w2v), its semantic_dim is"
                f" {config.semantic_dim}"
            )
        mel = self.state.features
        if front_end is None and (config.sample_rate, config.hop_length) != (CODEC_RATE_HZ, mel.hop_samples):
            raise DualCodecError(
                f"train: a model on log-mel features must have sample_rate={CODEC_RATE_HZ} and a hop of"
                f" {mel.hop_samples}, got {config.sample_rate} and {config.hop_length}"
            )
        self.front_end = front_end or mel
        self.hop_samples = config.hop_length
        self.samples = recipe.segment_frames * config.hop_length
        self.batches = Batches(voices, recipe.batch, self.samples, recipe.seed, recipe.augment)
        self.compare = Comparison(recipe, config.sample_rate).to(device)
        self._taken, self._statistics_given = NOTHING_TAKEN, False
        if weights is not None:
            weights = dict(weights)
            names = [FEATURES + name for name in ("mean", "variance")]
            if front_end is None and all(name in weights for name in names):
                mel.set_statistics(*(weights.pop(name) for name in names))
                self._statistics_given = True
            self._taken = take_over(self.state.model, weights)
            _check_taken(self._taken, self.state.model, len(weights))
        self.left = self._taken.left
        self._semantic_given, *self._acoustic_given = self._taken.stages(self.state.model)
        self.state.from_weights = any(self._acoustic_given)
        self.forward = Forward(self.state.model, recipe.way, recipe.bypass, recipe.count_odds)
        if recipe.workers > 1:
            torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(recipe.workers, initializer=_one_thread if recipe.workers > 1 else None)
        if self.forward.way == "channels_last":
            compile_snake()

    @torch.no_grad()
    def start(self) -> None:
        """Set the features' statistics and the codebooks; what a run from nothing does before its first step."""
        torch.manual_seed(self.recipe.seed + 2)
        first = [self.batches.at(_START_SEED + i) for i in range(max(_STATISTICS_BATCHES, self.recipe.start_batches))]
        mel = self.state.features
        if self.front_end is mel and not self._statistics_given:
            rows = torch.cat([mel(audio.to(self.device)).transpose(1, 2).flatten(0, 1) for audio in first])
            rows = rows * mel.variance.sqrt() + mel.mean
            mel.set_statistics(rows.mean(0), rows.var(0).clamp(min=1e-3))

        model = self.state.model
        new = {part: not self._taken.part(model, f"dac.{part}.") for part in ("encoder", "decoder")}
        if any(new.values()):
            start_scales(model, first[0].to(self.device), **new)
        if not self._semantic_given:
            start_semantic(model, self._pairs())
        if self._quantized() and not all(self._acoustic_given):
            start_acoustic(model, self._pairs(), given=self._acoustic_given)
        self.state.average = {name: value.clone() for name, value in self.state.model.state_dict().items()}

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(self.recipe.start_batches):
            audio = self.batches.at(_START_SEED + i).to(self.device)
            yield audio, self.front_end(audio).to(self.device)

    def _start_acoustic(self) -> None:
        """End the steps without acoustic codebooks."""
        state = self.state
        start_acoustic(state.model, self._pairs())
        for name, value in state.model.state_dict().items():
            if name.startswith("dac.quantizer."):
                state.average[name].copy_(value)

    def step(self) -> dict[str, float]:
        """Train one step.

        Returns:
            The losses and what else is logged.

        Raises:
            DualCodecError: the loss is not finite.
        """
        state, recipe = self.state, self.recipe
        # What a step draws depends on the seed and on its number alone, so that a resumed run draws the same.
        torch.manual_seed(recipe.seed * 1_000_003 + state.step)
        audio = self.batches.at(state.step).to(self.device)
        with torch.no_grad():
            features = self.front_end(audio).to(self.device)
        # w2v-BERT's features may come a frame short.
        audio = audio[..., : features.shape[-1] * self.hop_samples]
        counts = self.forward.draw(len(audio)).to(self.device)
        if not self._quantized():
            counts = (torch.rand(len(audio)) > _SEMANTIC_ALONE).to(counts)
        elif state.step == recipe.start_steps > 0 and not state.from_weights:
            self._start_acoustic()
        for optimizer in state.optimizers():
            for group in optimizer.param_groups:
                group["lr"] = state.learning_rate()
        judges = self._judges()
        if judges is not None:
            judges.requires_grad_(False)
        state.model.zero_grad(set_to_none=True)
        shards = zip(
            audio.chunk(recipe.workers), features.chunk(recipe.workers), counts.chunk(recipe.workers), strict=True
        )
        done = self._each(lambda shard: self._shard(*shard), list(shards))
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip or float("inf"))
        if not bool(torch.isfinite(norm)):
            raise DualCodecError(f"train: the gradient is not finite at step {state.step}: lower the learning rate")
        for optimizer in state.optimizers():
            optimizer.step()
        outputs = [output for output, _ in done]
        codes = [torch.cat(own) for own in zip(*(output.codes for output in outputs), strict=True)]
        latents = [torch.cat(own) for own in zip(*(output.latents for output in outputs), strict=True)]
        state.care.update(codes, latents, state.optimizer)
        logged = {name: sum(float(parts[name]) for _, parts in done) / len(done) for name in done[0][1]}
        if judges is not None:
            logged["discriminator"] = self._train_judges(audio, [output.x.detach() for output in outputs])
        state.step += 1
        state.average_weights()
        used = [float((usage > recipe.fewest).float().mean()) for usage in state.care.usage]
        restarted = float(state.care.restarted)
        return {**logged, "gradient_norm": float(norm), "restarted": restarted, "entries_in_use": min(used)}

    def _quantized(self) -> bool:
        """Whether the acoustic latent goes through its codebooks; where weights brought some it does from the start."""
        return self.state.from_weights or self.state.step >= self.recipe.start_steps

    def _shard(self, audio: Tensor, features: Tensor, counts: Tensor) -> tuple[Output, dict[str, Tensor]]:
        """Forward and backward of a part of the batch; the losses come back without their graph."""
        recipe, judges = self.recipe, self._judges()
        output = self.forward(audio, features, counts, self._quantized())
        parts = self.compare(output.x, audio)
        parts |= {"commitment": output.commitment, "codebook": output.codebook}
        if judges is not None:
            with torch.no_grad():
                wanted = judges(audio)[1]
            scores, found = judges(output.x)
            parts |= {"adversarial": generator_loss(scores), "feature": feature_loss(wanted, found)}
        loss = torch.stack([recipe.losses[name] * value for name, value in parts.items()]).sum()
        (loss / recipe.workers).backward()
        return output, {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}

    def _judges(self) -> Discriminators | None:
        first = self.recipe.adversary_from
        return None if first is None or self.state.step < first else self.state.discriminators

    def _train_judges(self, audio: Tensor, made: list[Tensor]) -> float:
        """One step of the discriminators on the batch and on what the model made of it; returns their loss."""
        judges, optimizer = self.state.discriminators, self.state.adversary_optimizer
        assert judges is not None and optimizer is not None
        judges.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)

        def shard(pair: tuple[Tensor, Tensor]) -> Tensor:
            loss = discriminator_loss(judges(pair[0])[0], judges(pair[1])[0])
            (loss / self.recipe.workers).backward()
            return loss.detach()

        losses = self._each(shard, list(zip(audio.chunk(self.recipe.workers), made, strict=True)))
        torch.nn.utils.clip_grad_norm_(judges.parameters(), 10.0)
        optimizer.step()
        return sum(float(loss) for loss in losses) / len(losses)

    def _each(self, call: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """Run a call on every part of the batch, side by side.

        Threads of whole passes meet once per step; an op's own threads meet at every op, and on a machine that others
        use too each meeting may wait for a time slice. Two parts' gradients add up to the same bits in either order.
        """
        if len(items) == 1:
            return [call(items[0])]
        return list(self._pool.map(call, items))


def _check_taken(taken: Taken, model: DualCodec, given: int) -> None:
    if not any(taken.part(model, f"dac.{part}.") for part in ("encoder", "decoder")):
        own = len(model.state_dict())
        raise DualCodecError(
            f"train: the weights must fit the encoder or the decoder of the recipe's model, got {given} tensors that"
            f" set {len(taken.names)} of its {own}; the first that is lacking: {taken.left[0]}"
        )


def _one_thread() -> None:
    torch.set_num_threads(1)
    allow_recompiling()


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    weights: dict[str, Tensor] | None = None,
    steps_before: int = 0,
    w2v: str | None = None,
    statistics: str | None = None,
    device: str = "cpu",
    tell: Callable[[str], None] = print,
    progress: Callable[[int, Mapping[str, float], float], None] | None = None,
) -> dict[str, Any]:
    """Train a model, with its files.

    Args:
        recipe: the run's settings.
        data: folder with train/ and validation/, one folder per speaker in each; without validation/, or with
            speakers alone, the last speaker is held out.
        out: folder of the run: checkpoint.pt, log.jsonl, model.safetensors, config.json, curves.png, ...
        resume: go on from out/checkpoint.pt, if it is there; without it no checkpoint may be there.
        weights: a checkpoint to start from instead of nothing.
        steps_before: that they were trained for; the run's own count from there in what its weights say of themselves.
        w2v: folder or hub name of w2v-BERT 2.0, for a model on its features.
        statistics: folder or hub name where the mean and variance of its features are; None: in `w2v`.
        device: where it runs.
        tell: takes a line about the run.
        progress: takes the step, its losses and audio-hours per hour.

    Returns:
        The last validation.

    Raises:
        DualCodecError: wrong settings, data or files.
    """
    checkpoint, log = out / CHECKPOINT, Log(out / LOG)
    if checkpoint.exists() and not resume:
        raise DualCodecError(f"train: {out} holds a run: --resume goes on with it, another --out begins a new one")
    rate_hz = recipe.model_config().sample_rate
    voices, held_out = _voices(data, rate_hz, recipe)
    held_out, brief = long_enough(held_out, int(SHORTEST_S * rate_hz))
    if not held_out:
        raise DualCodecError(f"train: a voice of the validation must last {SHORTEST_S} s to be scored, none does")
    tell(f"train: {hours(voices, rate_hz):.2f} h of {len(voices)} voices; validation: {hours(held_out, rate_hz):.2f} h")
    for start in recipe.voices:
        if not any(voice.name.startswith(start) for voice in voices):
            tell(f"recipe: voices: no speaker's name begins with {start}")
    for name in brief:
        tell(f"validation: {name} is left out: shorter than {SHORTEST_S} s")
    trainer = Trainer(recipe, voices, device, weights, _front_end(recipe, w2v, statistics, device))
    for name in trainer.batches.too_short:
        tell(f"train: {name} is left out: shorter than a segment")
    for line in trainer.left:
        tell(f"not taken over: {line}")
    missing = missing_scorers()
    if missing:
        tell(f"validation goes without {' and '.join(missing)}: pip install 'dualcodec-ext[train]'")
    if not can_draw():
        tell("the run ends without pictures, matplotlib is missing: pip install 'dualcodec-ext[train]'")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DualCodecError(f"cannot make the folder {out}: {reason(error)}") from error
    state = trainer.state
    if checkpoint.exists():
        _go_on(state, checkpoint, tell)
    else:
        if resume:
            tell(f"{out} holds no checkpoint to go on from: beginning anew")
        state.steps_before = steps_before
        trainer.start()
    log.cut(state.step)
    started, first, saved = time.monotonic(), state.step, time.monotonic()
    scores: dict[str, Any] = next((line["validation"] for line in log.lines()[::-1] if "validation" in line), {})
    sums: dict[str, float] = {}
    while state.step < recipe.steps:
        for name, value in trainer.step().items():
            sums[name] = sums.get(name, 0.0) + value
        if state.step % recipe.log_every == 0:
            means = {name: value / recipe.log_every for name, value in sums.items()}
            sums = {}
            heard_h = (state.step - first) * recipe.batch * trainer.samples / rate_hz / 3600
            speed = heard_h / ((time.monotonic() - started) / 3600)
            log.add({"step": state.step, **means})
            if progress is not None:
                progress(state.step, means, speed)
        if state.step % recipe.validate_every == 0 or state.step == recipe.steps:
            scores = validate(trainer, held_out)
            log.add({"step": state.step, "validation": scores})
            tell(f"step {state.step}: {json.dumps(scores)}")
            state.export(out)
        # Only between log lines, so that a resumed run's means are over the same steps.
        due = time.monotonic() - saved > recipe.checkpoint_every_s and not sums
        if due or state.step == recipe.steps:
            state.save(checkpoint)
            saved = time.monotonic()
    finish(trainer, held_out, out, log)
    return scores


def _go_on(state: State, checkpoint: Path, tell: Callable[[str], None]) -> None:
    """Load a checkpoint, and say what differs from the run that saved it."""
    before, recipe = state.load(checkpoint), state.recipe
    if state.step > recipe.steps:
        raise DualCodecError(f"train: steps must be at least the checkpoint's {state.step}, got {recipe.steps}")
    tell(f"going on from step {state.step}" + (": the last one" if state.step == recipe.steps else ""))
    now = recipe.to_dict()
    # What has come since the checkpoint was written had its default.
    before = Recipe.from_dict({name: value for name, value in before.items() if name in now}).to_dict()
    for name, value in before.items():
        if now[name] != value:
            tell(f"recipe: {name} was {json.dumps(value)} before, and is {json.dumps(now[name])}")


def validate(trainer: Trainer, voices: list[Voice]) -> dict[str, Any]:
    """Score the averaged weights on held-out voices; see `scores.score`."""
    from ._training.scores import score

    state, config = trainer.state, trainer.recipe.model_config()
    clips = [clip for _, clip in stretches(voices, 4 * config.sample_rate, 12)]
    return score(state.averaged_model(), trainer.front_end, clips)


def finish(trainer: Trainer, voices: list[Voice], out: Path, log: Log) -> None:
    """Write the weights and, where matplotlib is there, the pictures of the run."""
    trainer.state.export(out)
    if not can_draw():
        return
    config = trainer.recipe.model_config()
    clip = next(clip for _, clip in stretches(voices, 3 * config.sample_rate, 1)).to(trainer.device)
    draw_curves(log.lines(), out / "curves.png")
    model = trainer.state.averaged_model()
    with torch.no_grad():
        codes = model.encode(clip, sample_rate=config.sample_rate, semantic_repr=trainer.front_end(clip).to(clip))
        decoded = model.decode_from_codes(*codes)
    draw_spectrograms(clip[0, 0], decoded[0, 0], config.sample_rate, out / "spectrograms.png")


def _front_end(
    recipe: Recipe, w2v: str | None, statistics: str | None, device: str
) -> Callable[[Tensor], Tensor] | None:
    config = recipe.model_config()
    if config.semantic_dim == LogMelFeatures.channels and w2v is None:
        return None
    if w2v is None:
        raise DualCodecError(f"train: semantic_dim={config.semantic_dim} needs w2v-BERT's features: give --w2v")
    if config.sample_rate != CODEC_RATE_HZ:
        raise DualCodecError(
            f"train: a model on w2v-BERT's features must have sample_rate={CODEC_RATE_HZ}, got {config.sample_rate}"
        )
    return W2vBertFeatures(w2v, statistics or w2v, downsample_factor=config.semantic_downsample_factor, device=device)


class Log:
    """One JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> list[dict[str, Any]]:
        """Return what was logged; a last line that was cut off is left out."""
        if not self._path.exists():
            return []
        found = []
        texts = self._path.read_text(encoding="utf-8").splitlines()
        for i, text in enumerate(texts):
            try:
                found.append(json.loads(text))
            except ValueError as error:
                if i < len(texts) - 1:
                    raise DualCodecError(f"train: {self._path} must hold JSON in line {i + 1}, got: {error}") from None
        return found

    def add(self, values: dict[str, Any]) -> None:
        """Add a line."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def cut(self, step: int) -> None:
        """Drop what lies past a step: a resumed run goes through it again."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step] if step else []
        write_atomic(self._path, "".join(kept).encode())


def _voices(data: Path, rate_hz: int, recipe: Recipe) -> tuple[list[Voice], list[Voice]]:
    if (data / "train").is_dir():
        voices = load_voices(data / "train", rate_hz, recipe.voices)
        if (data / "validation").is_dir():
            return voices, load_voices(data / "validation", rate_hz)
    else:
        voices = load_voices(data, rate_hz, recipe.voices)
    if len(voices) < 2:
        raise DualCodecError(f"train: {data} must hold train/ and validation/, or folders of two speakers")
    return voices[:-1], voices[-1:]
