"""Whether a model's parameters are what they were: every change that PyTorch counts is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualcodec_ext import build, testing
from dualcodec_ext._snapshot import PlainSnapshot, snapshot_of


@pytest.fixture(params=["compiled", "plain"])
def take(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Any]:
    if request.param == "plain":
        monkeypatch.setattr(build, "load_module", lambda: None)
    elif build.load_module() is None:
        pytest.skip("no compiled module")

    def taken(model: nn.Module) -> Any:
        snapshot = snapshot_of(model)
        assert isinstance(snapshot, PlainSnapshot) == (request.param == "plain")
        return snapshot

    return taken


def replace_parameter(model: Any) -> None:
    block = model.dac.decoder.model[0]
    name, old = next(iter(block.named_parameters()))
    owner, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(owner), leaf, nn.Parameter(old.detach().clone()))


def replace_table_entry(model: Any) -> None:
    """As torch.func.functional_call does it."""
    table = next(m._parameters for m in model.modules() if m._parameters)
    name = next(iter(table))
    table[name] = nn.Parameter(table[name].detach())  # the same memory


def replace_submodule(model: Any) -> None:
    model.convnext_decoder[0] = testing.seeded_model().convnext_decoder[0]


def add_submodule(model: Any) -> None:
    model.convnext_decoder.append(nn.Identity())


def remove_submodule(model: Any) -> None:
    del model.convnext_decoder[-1]


def edit_last(model: Any) -> None:
    with torch.no_grad():
        list(model.parameters())[-1].add_(0)


def edit_through_a_view(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1)[:1].zero_()


def point_elsewhere(model: Any) -> None:
    parameter = next(model.parameters())
    parameter.data = parameter.data.clone()


def reinterpret(model: Any) -> None:
    parameter = next(model.parameters())
    parameter.data = parameter.data.view(torch.int32).view(torch.bfloat16)


def free(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def load(model: Any) -> None:
    model.load_state_dict(testing.seeded_model().state_dict())


def assign(model: Any) -> None:
    model.load_state_dict(testing.seeded_model().state_dict(), assign=True)


def step(model: Any) -> None:
    parameter = next(model.parameters())
    parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


CHANGES = [
    replace_parameter, replace_table_entry, replace_submodule, add_submodule, remove_submodule, edit_last,
    edit_through_a_view, point_elsewhere, reinterpret, free, load, assign, step, lambda model: model.double(),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(take: Callable[[nn.Module], Any], change: Callable[[Any], None]) -> None:
    model = testing.seeded_model()
    snapshot = take(model)
    assert snapshot.holds()
    change(model)
    assert not snapshot.holds()
    assert take(model).holds()


def test_looking_is_no_change(take: Callable[[nn.Module], Any]) -> None:
    model = testing.seeded_model()
    snapshot = take(model)
    model.train().eval()
    model.state_dict()
    for parameter in model.parameters():
        parameter.requires_grad_(False).sum()
        parameter.grad = torch.zeros_like(parameter)
    model.to(torch.float32)
    model.dac.new_attribute = 3
    assert snapshot.holds()


def test_inference_tensors_have_no_count(take: Callable[[nn.Module], Any]) -> None:
    with torch.inference_mode():
        model = testing.seeded_model()
        snapshot = take(model)
        next(model.parameters()).add_(0)
        assert snapshot.holds()
    replace_parameter(model)
    assert not snapshot.holds()


def test_of_a_parameter_that_becomes_an_inference_tensor(take: Callable[[nn.Module], Any]) -> None:
    model = testing.seeded_model()
    snapshot = take(model)
    parameter: Tensor = next(model.parameters())
    with torch.inference_mode():
        parameter.data = parameter.detach().clone()
    assert not snapshot.holds()
