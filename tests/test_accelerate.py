"""What becomes of the engine when parameters change, are shared, copied or freed; accelerate."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_model import decoded, inputs, tiny
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext import testing


def test_repacks_when_parameters_change() -> None:
    _, fast = tiny()
    first = decoded(fast)
    engine = fast._engine_state
    assert torch.equal(decoded(fast), first) and fast._engine_state is engine, (
        "nothing changed: nothing is packed again"
    )
    with torch.no_grad():
        next(fast.dac.decoder.parameters()).add_(1.0)  # in place, by whatever way
    assert not torch.equal(decoded(fast), first)
    other = testing.seeded_model(seed=7)
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(decoded(fast), decoded(other), rtol=0, atol=2e-5)
    fast.double()
    assert decoded(fast).dtype == torch.float64
    fast.float()
    second = decoded(fast)
    next(fast.dac.decoder.parameters()).data.add_(1.0)
    assert torch.equal(decoded(fast), second), "edits through .data are not seen, as the docstring says"
    fast.repack()
    assert not torch.equal(decoded(fast), second)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimiser_step_is_seen(fused: bool) -> None:
    _, fast = tiny()
    first = decoded(fast)
    audio, feat = inputs(fast, 4)
    optimiser = torch.optim.SGD(fast.parameters(), lr=0.1, fused=fused)
    fast.train()
    fast(audio, semantic_repr=feat, bypass_quantize_rate=0.0)[0].x.square().mean().backward()
    optimiser.step()
    fast.eval()
    assert not torch.equal(decoded(fast), first)


def test_shares_the_parameters() -> None:
    model, fast = tiny()
    assert all(a is b for a, b in zip(model.parameters(), fast.parameters(), strict=True))
    decoded(fast)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    torch.testing.assert_close(decoded(fast), decoded(model), rtol=0, atol=2e-5)


def test_keeps_requires_grad_and_mode() -> None:
    model = testing.seeded_model()
    model.convnext_encoder.requires_grad_(False)
    fast = dx.accelerate(model.train())
    assert fast.training and not any(p.requires_grad for p in fast.convnext_encoder.parameters())


def test_copies_and_pickles() -> None:
    _, fast = tiny()
    expected = decoded(fast)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(decoded(other), expected)
        with torch.no_grad():
            next(other.dac.decoder.parameters()).add_(1.0)
        assert not torch.equal(decoded(other), expected) and torch.equal(decoded(fast), expected)


def test_inference_mode() -> None:
    with torch.inference_mode():
        model = dx.DualCodec(**testing.TINY).eval()
        testing.seed_model(model)
        inside = decoded(model)
    assert torch.equal(decoded(model), inside)
    assert torch.equal(decoded(tiny()[1]), inside)
    other = testing.seeded_model(seed=7)
    with torch.inference_mode():
        torch.nn.ModuleList([model]).load_state_dict({f"0.{k}": v for k, v in other.state_dict().items()})
        torch.testing.assert_close(decoded(model), decoded(other), rtol=0, atol=2e-5)


def test_threads_that_meet_at_the_first_call_pack_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualcodec_ext import engine

    _, fast = tiny()
    made, meet = [], threading.Barrier(4)

    class Slow(engine.Engine):
        def __init__(self, *args: Any) -> None:
            made.append(self)
            time.sleep(0.05 * len(made))
            super().__init__(*args)

    def first_call() -> Tensor:
        meet.wait()
        return decoded(fast)

    monkeypatch.setattr(engine, "Engine", Slow)
    with ThreadPoolExecutor(4) as pool:
        results = [task.result() for task in [pool.submit(first_call) for _ in range(4)]]
    assert len(made) == 1
    assert all(torch.equal(result, decoded(tiny()[1])) for result in results)


def test_release_frees_the_parameters() -> None:
    model, fast = tiny()
    expected = decoded(fast)
    slim = dx.accelerate(model, release=True)
    assert sum(p.numel() for p in model.parameters()) == 0
    assert torch.equal(decoded(slim), expected)
    audio, feat = inputs(slim, 5)
    assert slim.encode(audio, semantic_repr=feat)[1].shape == (1, 3, 5)
    calls = (
        slim.state_dict,
        lambda: copy.deepcopy(slim),
        lambda: pickle.dumps(slim),
        lambda: slim(audio, semantic_repr=feat),
        slim.train,
        lambda: slim.load_state_dict(fast.state_dict()),
        lambda: dx.accelerate(slim),
    )
    for call in calls:
        with pytest.raises(dx.DualCodecError, match=r"released|release=True"):
            call()
    with dx.backend("reference"), pytest.raises(dx.DualCodecError, match="release=True has freed"):
        decoded(slim)


def test_release_of_a_drop_in() -> None:
    model = dx.accelerate(testing.seeded_model())
    expected = decoded(model)
    slim = dx.accelerate(model, release=True)
    assert torch.equal(decoded(slim), expected)
    assert model._engine_state is None
    audio, feat = inputs(slim, 5)
    for call in (lambda: decoded(model), lambda: model(audio, semantic_repr=feat), model.state_dict):
        with pytest.raises(dx.DualCodecError, match="release=True has freed"):
            call()


@pytest.mark.parametrize("changes", [{}, {"decode_semantic_for_codec": False}, {"codebook_dim": [8, 4, 6]}], ids=str)
def test_accelerates_the_pypi_package(changes: dict[str, Any]) -> None:
    from dualcodec_ext.peer import find_peer

    peer_class, why = find_peer()
    if peer_class is None:
        pytest.skip(why)
    ours = {
        "encoder_dim": 16,
        "encoder_rates": [2, 3],
        "decoder_rates": [3, 2],
        "decoder_dim": 32,
        "n_codebooks": 3,
    }
    ours |= {"codebook_size": 33, "semantic_codebook_size": 50, "convnext_dim": 1024, "latent_dim": 1024}
    peer = peer_class(**ours, convnext_layers=1, sample_rate=24000, **changes).eval()
    testing.seed_model(peer)
    fast = dx.accelerate(peer)
    audio, feat = testing.make_speech(60), testing.make_features(10)
    with torch.no_grad():
        theirs = peer.encode(audio, semantic_repr=feat)
        mine = fast.encode(audio, semantic_repr=feat)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    torch.testing.assert_close(fast.decode_from_codes(*mine), peer.decode_from_codes(*theirs), rtol=0, atol=2e-5)
    expected = fast.decode_from_codes(*mine)
    slim = dx.accelerate(peer, release=True)
    assert torch.equal(slim.decode_from_codes(*mine), expected)
    with pytest.raises(dx.DualCodecError, match="release=True has freed"):
        fast.decode_from_codes(*mine)
    left = [name for name, module in peer.named_modules() if getattr(module, "weight", None) is not None]
    assert all(peer.get_submodule(name).weight.numel() == 0 for name in left), "weight_norm's products are freed too"


def test_accelerate_errors() -> None:
    model, _ = tiny()
    for call, text in (
        (lambda: dx.accelerate(torch.nn.Linear(2, 2)), "model must be a DualCodec .* got Linear"),
        (
            lambda: dx.accelerate(model, dtype=torch.int8),
            "dtype must be float32, float64, bfloat16 or float16",
        ),
        (lambda: dx.accelerate(copy.deepcopy(model).train(), release=True), "must be in eval mode"),
    ):
        with pytest.raises(dx.DualCodecError, match=text):
            call()
