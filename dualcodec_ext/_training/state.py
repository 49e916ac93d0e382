"""What a run keeps: model, averaged weights, optimisers, codebook counts; saved whole or not at all."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._files import write_atomic
from ..errors import DualCodecError
from ..model import FEATURES, DualCodec
from ..semantic import LogMelFeatures
from .codebooks import CodebookCare, stages_of
from .discriminators import Discriminators
from .muon import Muon
from .recipe import Recipe


class State:
    """Everything that changes from step to step.

    Args:
        recipe: the run's settings.
        device: where it runs.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        config = recipe.model_config()
        self.recipe, self.device, self.step = recipe, device, 0
        self.steps_before = 0  # that the weights which it began with were trained for
        self.from_weights = False  # whether acoustic codebooks began as a checkpoint's, and are used from the start
        self.model = DualCodec(**config.to_dict()).to(device).train()
        self.features = LogMelFeatures(config.semantic_downsample_factor).to(device)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        averaged = {f"{name}.codebook.weight" for name, part in self.model.named_modules() if hasattr(part, "codebook")}
        named = dict(self.model.named_parameters())
        if recipe.codebooks == "average":
            for name in averaged:  # a gradient that nothing takes would still count in the clipped norm
                named.pop(name).requires_grad_(False)
        # A weight norm's length, a bias, an alpha or a codebook must not be drawn to zero.
        decayed = [p for name, p in named.items() if name.endswith(("weight_v", "pwconv1.weight", "pwconv2.weight"))]
        ids = {id(p) for p in decayed}
        kept = [p for p in named.values() if id(p) not in ids]
        self.matrix_optimizer: Muon | None = None
        groups = [{"params": kept, "weight_decay": 0.0}]
        if recipe.optimizer == "muon":
            self.matrix_optimizer = Muon(decayed, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        else:
            groups.append({"params": decayed, "weight_decay": recipe.weight_decay})
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
        self.care = CodebookCare(self.model, recipe.memory_steps, recipe.fewest, recipe.codebooks == "average")
        self.discriminators: Discriminators | None = None
        self.adversary_optimizer: torch.optim.Optimizer | None = None
        if recipe.adversary_from is not None:
            self.add_adversary()

    def add_adversary(self) -> None:
        """Make the discriminators and their optimiser."""
        torch.manual_seed(self.recipe.seed + 1)
        settings = {name: value for name, value in self.recipe.adversary.items() if name != "learning_rate"}
        self.discriminators = Discriminators(**settings).to(self.device)
        rate = self.recipe.adversary.get("learning_rate", self.recipe.learning_rate)
        self.adversary_optimizer = torch.optim.AdamW(
            self.discriminators.parameters(), lr=rate, betas=self.recipe.betas, weight_decay=self.recipe.weight_decay
        )

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the model's own, one or two."""
        return [self.optimizer] if self.matrix_optimizer is None else [self.optimizer, self.matrix_optimizer]

    def learning_rate(self) -> float:
        """Return the model's rate at this step: a linear warm-up, then a cosine."""
        recipe = self.recipe
        if self.step < recipe.warmup_steps:
            return recipe.learning_rate * (self.step + 1) / recipe.warmup_steps
        done = min(1.0, (self.step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps))
        reach = recipe.learning_rate - recipe.final_learning_rate
        return recipe.final_learning_rate + reach * 0.5 * (1 + math.cos(math.pi * done))

    @torch.no_grad()
    def average_weights(self) -> None:
        """Move the averaged weights a little towards the model's; early on, more."""
        keep = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)

    def averaged_model(self) -> DualCodec:
        """Return a model in eval mode with the averaged weights."""
        model = DualCodec(**self.recipe.model_config().to_dict()).to(self.device)
        model.load_state_dict(self.average)
        return model.eval()

    def save(self, path: Path) -> None:
        """Write a checkpoint that `load` goes on from."""
        state: dict[str, Any] = {
            "step": self.step,
            "steps_before": self.steps_before,
            "from_weights": self.from_weights,
            "recipe": self.recipe.to_dict(),
            "model": self.model.state_dict(),
            "average": self.average,
            "features": self.features.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "codebooks": self.care.state(),
        }
        if self.matrix_optimizer is not None:
            state["matrix_optimizer"] = self.matrix_optimizer.state_dict()
        if self.discriminators is not None and self.adversary_optimizer is not None:
            state["discriminators"] = self.discriminators.state_dict()
            state["adversary_optimizer"] = self.adversary_optimizer.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(path, buffer.getvalue())

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; discriminators that it lacks start afresh.

        Returns:
            The settings of the recipe that it was saved by.

        Raises:
            DualCodecError: no such file, or one of another model.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.features.load_state_dict(state["features"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.matrix_optimizer is not None:
                self.matrix_optimizer.load_state_dict(state["matrix_optimizer"])
            self.average = dict(state["average"])
            self.care.load(state["codebooks"])
            self.step, self.from_weights = int(state["step"]), bool(state.get("from_weights", False))
            self.steps_before = int(state.get("steps_before", 0))
            if self.discriminators is not None and self.adversary_optimizer is not None and "discriminators" in state:
                self.discriminators.load_state_dict(state["discriminators"])
                self.adversary_optimizer.load_state_dict(state["adversary_optimizer"])
            return dict(state["recipe"])
        except FileNotFoundError:
            raise DualCodecError(f"train: {path} must be a checkpoint to go on from, it does not exist") from None
        except (RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
            raise DualCodecError(f"train: {path} must be a checkpoint of this recipe's model: {reason}") from None

    def export(self, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write the averaged weights and the features' statistics as FOLDER/model.safetensors, and config.json.

        The weights' metadata says for how many steps they were trained, `steps_before` among them.

        Returns:
            The weights file.
        """
        from safetensors.torch import save

        tensors = {name: value.detach().to(dtype).contiguous().cpu() for name, value in self.average.items()}
        for name, value in self.features.state_dict().items():
            tensors[FEATURES + name] = value.to(torch.float32).contiguous().cpu()
        path = folder / "model.safetensors"
        write_atomic(path, save(tensors, {"format": "pt", "step": str(self.steps_before + self.step)}))
        write_atomic(folder / "config.json", self.recipe.model_config().to_json().encode())
        return path


def trained_steps(metadata: Mapping[str, str] | None) -> int:
    """For how many steps weights were trained, by the metadata that `State.export` or `bench.quality` gave them."""
    said = metadata or {}
    steps = said.get("step", said.get("trained_steps", ""))
    return int(steps) if steps.isdecimal() else 0


class Taken(NamedTuple):
    """What became of a checkpoint's weights."""

    names: frozenset[str]  # of the model's tensors that they set
    left: list[str]  # a line per tensor that they did not, and per weight without a place

    def part(self, model: reference.DualCodec, prefix: str) -> bool:
        """Whether the part of a model whose tensors' names begin so was taken over: at least half of its tensors."""
        own = [name for name in model.state_dict() if name.startswith(prefix)]
        return 2 * sum(name in self.names for name in own) >= len(own)

    def stages(self, model: reference.DualCodec) -> list[bool]:
        """Whether each codebook was taken over, with both of its projections; the semantic one first."""
        known = {id(stage): f"{name}." for name, stage in model.named_modules()}
        names = [known[id(stage)] for stage in stages_of(model)]
        return [all(own in self.names for own in model.state_dict() if own.startswith(name)) for name in names]


NOTHING_TAKEN = Taken(frozenset(), [])


def take_over(model: reference.DualCodec, weights: dict[str, Tensor]) -> Taken:
    """Copy the weights whose name and shape the model has; names of centred layers also fit causal ones."""
    own = model.state_dict()
    left, used, names = [], set(), set()
    for name, value in own.items():
        # A causal layer wraps the convolution: `.conv.weight_v` there, `.weight_v` in a centred one.
        plain = name
        while plain not in weights and ".conv." in plain:
            plain = ".".join(plain.rsplit(".conv.", 1))
        if plain not in weights:
            left.append(f"{name}: not in the weights")
        elif weights[plain].shape != value.shape:
            left.append(f"{name}: {list(weights[plain].shape)} there, {list(value.shape)} needed")
            used.add(plain)
        else:
            with torch.no_grad():
                value.copy_(weights[plain])
            used.add(plain)
            names.add(name)
    left += [f"{name}: has no place in the model" for name in sorted(weights.keys() - used)]
    return Taken(frozenset(names), left)
