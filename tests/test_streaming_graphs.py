"""The passes that a GPU records: the CPU's samples, with a recorder that repeats what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu import gpu_alone, needs_device
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import settings_of
from test_streaming import alone, codes, model, run_session
from test_streaming_encode import KINDS, check
from test_streaming_encode import model as encoding_model
from tolerances import F32, TOLERANCE
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import dualcodec_ext as dx
from dualcodec_ext import _stream_rows, testing
from dualcodec_ext._code_look import CodeLook
from dualcodec_ext._stream_graph import GraphDecoder, GraphEncoder
from dualcodec_ext.semantic import LogMelFeatures
from dualcodec_ext.steps import ConvNeXtStep


class Repeat:
    """Runs once when recording, as CUDA graphs need it, and fills the same tensors at every replay."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, run: Callable[[], tuple[Any, ...]]) -> tuple[Callable[[], Any], tuple[Any, ...], int]:
        outputs = run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(outputs, run(), strict=True):
                old.copy_(new)

        return replay, outputs, 0


def on_graphs(decoder: dx.StreamingDecoder, recorder: Any) -> dx.StreamingDecoder:
    """Let a decoder's passes run as they would on a GPU."""
    before = len(decoder._engine.tiles.programs.semantic_decoder)
    layers, programs = decoder._layers, decoder._engine.tiles.programs
    decoder._run = GraphDecoder(
        programs, layers[:before], layers[before:], decoder.batch_size, torch.device("cpu"), recorder
    )
    return decoder


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Repeat:
    """Every StreamingDecoder that is made runs on graphs."""
    recorder, made = Repeat(), dx.StreamingDecoder.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        on_graphs(self, recorder)

    monkeypatch.setattr(dx.StreamingDecoder, "__init__", init)
    return recorder


@pytest.mark.parametrize("name", ["tiny", "look-ahead", "causal decoder", "centred blocks", "un-decoded", "rate 7"])
def test_any_cut_of_any_slots(name: str, graphs: Repeat, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(st.data())
    def draw(data: Any) -> None:
        heard.append(run_session(name, data, most_frames=5, most_slots=3, operations=8).clips)

    draw()
    monkeypatch.undo()
    for clips in heard:
        for semantic, acoustic, audio in clips:
            assert torch.equal(audio, alone(name, semantic, acoustic))


def test_a_step_is_one_replay() -> None:
    name, recorder = "causal decoder", Repeat()
    decoder = on_graphs(dx.StreamingDecoder(model(name), 2), recorder)
    semantic, acoustic = codes(name, 10, batch=2)
    for at in range(10):
        decoder.step(semantic[..., at : at + 1], acoustic[..., at : at + 1])
    assert (recorder.recorded, recorder.replayed) == (1, 10)
    with pytest.raises(ValueError, match="codes must be in"):
        decoder.step(semantic[..., :1] + 200, acoustic[..., :1])
    state = decoder.state_dict()["state"]
    again = dx.StreamingDecoder(model(name), 2)
    again.step(semantic, acoustic)
    assert torch.equal(again.state_dict()["state"], state), "a code out of range has changed nothing"


class Counted(TorchDispatchMode):
    """What is called that a GPU would start a kernel or a copy for, `copy_runs` as one; views and memory are not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removeprefix("dualcodec_ext::")
        same = isinstance(returned, torch.Tensor) and any(
            isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == returned.untyped_storage().data_ptr()
            for x in args
        )
        if not (same and not func._schema.is_mutable) and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return returned


def counted_copies(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts, with the two copies of a pass as one call each."""
    counted, copy_runs = Counted(), _stream_rows.copy_runs

    def once(*args: Any) -> None:
        counted.names.append("stream_rows")
        with _disable_current_modes():
            copy_runs(*args)

    monkeypatch.setattr(_stream_rows, "copy_runs", once)
    return counted


def launches(steps: Any) -> int:
    return sum(3 if isinstance(step, ConvNeXtStep) else 1 for step in steps)


class Outside(Repeat):
    """Replays that are not counted."""

    def record(self, run: Callable[[], tuple[Any, ...]]) -> tuple[Callable[[], Any], tuple[Any, ...], int]:
        replay, outputs, held = super().record(run)

        def uncounted() -> None:
            with _disable_current_modes():
                replay()

        return uncounted, outputs, held


@pytest.mark.parametrize(
    "name, more", [("causal decoder", 0), ("look-ahead", 0), ("un-decoded", 0), ("centred blocks", 1)]
)
def test_a_pass_is_its_layers_its_lookups_and_two_copies(name: str, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """more: what waits for semantic codes is added to them."""
    counted = counted_copies(monkeypatch)
    decoder = on_graphs(dx.StreamingDecoder(model(name), 3), None)
    frames = decoder.lookahead_frames + 2  # bounded at first
    semantic, acoustic = codes(name, frames, batch=3)
    for at in range(frames):
        decoder.step(semantic[..., at : at + 1], acoustic[..., at : at + 1])
    assert isinstance(decoder._run, GraphDecoder)
    made = decoder._run._recorded._made[1, acoustic.shape[1], False]
    counted.names.clear()
    with counted:
        made.replay()
    steps = [layer.step for layer in decoder._layers]
    assert counted.names.count("stream_rows") == 2 and counted.names.count("rvq_lookup") == 2, counted.names
    assert len(counted.names) == launches(steps) + 4 + more, counted.names


def test_a_step_starts_two_things_beside_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    name, counted = "causal decoder", Counted()

    def count(what: str) -> None:
        looked = getattr(CodeLook, what)

        def once(*args: Any) -> Any:
            counted.names.append(what)
            with _disable_current_modes():
                return looked(*args)

        monkeypatch.setattr(CodeLook, what, once)

    count("take")
    count("fine")
    decoder = on_graphs(dx.StreamingDecoder(model(name), 2), Outside())
    semantic, acoustic = codes(name, 10, batch=2)
    for at in range(10):
        counted.names.clear()
        with counted:
            decoder.step(semantic[..., at : at + 1], acoustic[..., at : at + 1], None if at < 9 else [True, True])
        if at == 8:
            # The codes, in, by one kernel; the audio, out; and the wait for that kernel, on the host. Without a CUDA
            # graph they are looked at before the replay, too.
            assert counted.names == ["take", "fine", "copy_", "fine"]
    # Elsewhere than the last step, with a mask: as at the first time.
    assert counted.names == ["take", "copy_", "fine"]


def test_a_pass_of_encode_is_its_layers_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, made = counted_copies(monkeypatch), encoding_model("causal everywhere")
    encoder = encode_on_graphs(dx.StreamingEncoder(made, 2), None)
    hop = made.dac.hop_length
    audio, features = testing.make_speech(hop, 2), testing.make_features(1, 2, made.settings["semantic_dim"])
    encoder.step(audio, features)
    assert isinstance(encoder._passes, GraphEncoder)
    (found,) = encoder._passes._recorded._made.values()
    counted.names.clear()
    with counted:
        found.replay()
    steps = [layer.step for chain in encoder._passes.chains for layer in chain.layers]
    # Two copies of contexts, two searches; the latent that the semantic decoder reads, and what is left of it.
    assert len(counted.names) == launches(steps) + 6, counted.names


@pytest.mark.parametrize("k", [0, 3])
def test_less_lookahead(k: int) -> None:
    semantic, acoustic = codes("tiny", 20)
    decoder = on_graphs(dx.StreamingDecoder(model("tiny"), lookahead=k), Repeat())
    audio = torch.cat([decoder.step(semantic, acoustic), decoder.flush()], -1)
    assert torch.equal(audio, alone("tiny", semantic, acoustic, lookahead=k))


def encode_on_graphs(encoder: dx.StreamingEncoder, recorder: Any) -> dx.StreamingEncoder:
    """Let an encoder's passes run as they would on a GPU."""
    passes = encoder._passes
    encoder._passes = GraphEncoder(
        encoder.name, passes.programs, encoder.batch_size, passes.stages, torch.device("cpu"), recorder
    )
    return encoder


@pytest.fixture
def encoder_graphs(monkeypatch: pytest.MonkeyPatch) -> Repeat:
    """Every StreamingEncoder that is made runs on graphs."""
    recorder, made = Repeat(), dx.StreamingEncoder.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        encode_on_graphs(self, recorder)

    monkeypatch.setattr(dx.StreamingEncoder, "__init__", init)
    return recorder


@pytest.mark.parametrize("name", [*KINDS, "log-mel"])
def test_any_cut_of_encode(name: str, encoder_graphs: Repeat) -> None:
    how = {"front_end": LogMelFeatures(1)} if name == "log-mel" else {}

    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(st.integers(1, 3), st.integers(0, 9), st.sampled_from([None, 1, 2]), st.data())
    def draw(batch: int, frames: int, quantizers: int | None, data: Any) -> None:
        check(name, batch, frames, data, num_quantizers=quantizers, **how)

    draw()
    assert encoder_graphs.replayed > encoder_graphs.recorded > 0


def test_a_frame_of_encode_is_one_replay() -> None:
    made, recorder = encoding_model("causal everywhere"), Repeat()
    encoder = encode_on_graphs(dx.StreamingEncoder(made, 2), recorder)
    hop = made.dac.hop_length
    audio, features = testing.make_speech(10 * hop, 2), testing.make_features(10, 2, made.settings["semantic_dim"])
    found = [
        encoder.step(audio[..., f * hop : (f + 1) * hop], features[..., f : f + 1], [True, f != 4]) for f in range(10)
    ]
    assert (recorder.recorded, recorder.replayed) == (1, 10)
    wanted = made.encode(audio[:1], semantic_repr=features[:1])
    for i in (0, 1):
        assert torch.equal(torch.cat([codes[i][:1] for codes in found], -1), wanted[i])  # type: ignore[index, misc]


@needs_device
@gpu_alone
@pytest.mark.parametrize("name", ["causal everywhere", "log-mel"])
def test_encode_on_a_gpu(name: str) -> None:
    """Graphs that are graphs: in any cut the codes of one step, and but for near ties the whole encode's."""
    moved = dx.accelerate(testing.seeded_model(encoding_model(name).settings).cuda())
    front_end = LogMelFeatures(1) if name == "log-mel" else None
    hop, frames = moved.dac.hop_length, 40
    audio = testing.make_speech(frames * hop, 2).cuda()
    features = testing.make_features(frames, 2, moved.settings["semantic_dim"]).cuda()
    if front_end is not None:
        features = front_end.cuda()(audio)
    one, many = (dx.StreamingEncoder(moved, 2, n, front_end=front_end) for n in (1, 3))
    parts = [
        one.step(audio[..., f * hop : (f + 1) * hop], None if front_end is not None else features[..., f : f + 1])
        for f in range(frames)
    ]
    at_once = many.step(audio, None if front_end is not None else features)
    whole = moved.encode(audio, semantic_repr=features)
    moved_state = one.state_dict()["state"]
    assert moved_state.device.type == "cpu" and bool(moved_state.any())
    for i in (0, 1):
        codes = torch.cat([part[i] for part in parts], -1)  # type: ignore[misc]
        assert torch.equal(codes, at_once[i]) and codes.is_cuda
        assert float((codes != whole[i]).float().mean()) <= 0.01


@needs_device
@gpu_alone
@pytest.mark.parametrize("name", ["causal decoder", "look-ahead", "tiny"])
def test_on_a_gpu(name: str) -> None:
    """Graphs that are graphs: in any cut the bits of one step, and the whole decode's values."""
    moved = dx.accelerate(testing.seeded_model(settings_of(name)).cuda())
    semantic, acoustic = (c.cuda() for c in codes(name, 20, batch=2))
    one, many = dx.StreamingDecoder(moved, 2), dx.StreamingDecoder(moved, 2, max_frames=3)
    parts = [one.step(semantic[..., at : at + 1], acoustic[..., at : at + 1]) for at in range(20)]
    audio = torch.cat([*parts, one.flush()], -1)
    assert torch.equal(audio, torch.cat([many.step(semantic, acoustic), many.flush()], -1))
    whole = moved.decode_from_codes(semantic, acoustic)
    assert audio.shape == whole.shape
    assert float((audio - whole).abs().max()) <= TOLERANCE["stream, decode", F32]
