"""Peers that run on torch: the PyPI package, the reference, folded weights, torch.compile in its forms,
zentorch."""

from __future__ import annotations

import inspect
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .base import Call, Task, Unavailable, need, with_state
from .folded import FoldedDecoder, FoldedEncoder, finish


def _codec_call(model: Any, task: Task, dtype: torch.dtype) -> Call:
    """A call of a model that has the PyPI package's methods."""
    first, second = task.cast_inputs(dtype)

    @torch.inference_mode()
    def call() -> object:
        if task.kind == "decode":
            return model.decode_from_codes(first, second)
        return model.encode(first, semantic_repr=second)

    return call


def pypi_autocast(task: Task) -> Call:
    """As its own Inference runs it on a GPU."""
    plain = pypi(task)

    def call() -> object:
        with torch.autocast(task.device, torch.float16):
            return plain()

    return call


def pypi_model(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The PyPI package's model with a checkpoint, in eval mode; Unavailable where it cannot be had."""
    from dualcodec_ext.peer import find_peer

    cls, found = find_peer()
    if cls is None:
        raise Unavailable(found)
    known = inspect.signature(cls.__init__).parameters
    chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its weight norm is torch's deprecated one
        try:
            return with_state(lambda: cls(**chosen), state)
        except RuntimeError:
            raise Unavailable("the PyPI package has no such model") from None


def pypi(task: Task) -> Call:
    model = pypi_model(task.settings, task.state)
    return _codec_call(model.to(task.device), task, torch.float32)


def reference(task: Task, dtype: torch.dtype) -> Call:
    from dualcodec_ext.reference import DualCodec

    model = with_state(lambda: DualCodec(**task.settings), task.state)
    return _codec_call(model.to(device=task.device, dtype=dtype), task, dtype)


def folded_module(task: Task, form: str, dtype: torch.dtype) -> nn.Module:
    cls = FoldedDecoder if task.kind == "decode" else FoldedEncoder
    with torch.device("meta"):  # its parameters come from the state, wherever that is
        made = cls(task.program, task.state, form)
    return finish(made, form, dtype, task.device)


def folded(task: Task, form: str, dtype: torch.dtype) -> Call:
    return module_call(folded_module(task, form, dtype), task.cast_inputs(dtype))


def module_call(module: Callable[..., object], inputs: tuple[torch.Tensor, ...]) -> Call:
    def call() -> object:
        # Not inference_mode: compiled modules guard on it, and freezing asks for no_grad.
        with torch.no_grad():
            return module(*inputs)

    return call


def compiled_call(
    module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    *,
    freeze: bool = False,
    backend: str = "inductor",
    mode: str | None = None,
) -> Call:
    """The module compiled for these very inputs; the compilation happens here."""
    if inputs[0].device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise Unavailable("torch.compile needs a C++ compiler")
    import torch._dynamo
    import torch._inductor.config as inductor

    # Every peer is a shape of its own; the default limit would send the later ones back to eager without a
    # word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 512)
    call = module_call(torch.compile(module, dynamic=False, fullgraph=True, backend=backend, mode=mode), inputs)
    patched: AbstractContextManager[Any] = inductor.patch(freezing=True) if freeze else nullcontext()
    with patched:
        call()
        call()
    return call


def compiled(task: Task, form: str, dtype: torch.dtype, freeze: bool) -> Call:
    return compiled_call(folded_module(task, form, dtype), task.cast_inputs(dtype), freeze=freeze)


def autotuned(task: Task, form: str, dtype: torch.dtype, mode: str = "max-autotune") -> Call:
    """torch.compile at its best on a GPU: tuned kernels, replayed from a CUDA graph."""
    if task.device == "cpu" and mode == "max-autotune":
        raise Unavailable("needs a GPU")
    return compiled_call(folded_module(task, form, dtype), task.cast_inputs(dtype), mode=mode)


def recorded(task: Task, form: str, dtype: torch.dtype) -> Call:
    """PyTorch's own kernels without the time that starting them takes."""
    if task.device == "cpu":
        raise Unavailable("needs a GPU")
    eager, side, found = folded(task, form, dtype), torch.cuda.Stream(), list[object]()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # what first calls set up may not happen inside a recording
            eager()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.append(eager())

    held = (eager, graph, found)  # the recording reads the module's weights where they lie: they must outlive it

    def call() -> object:
        held[1].replay()
        return held[2][0]

    return call


def zentorch(task: Task, form: str, dtype: torch.dtype) -> Call:
    need("zentorch")
    try:
        import zentorch as _  # noqa: F401  registers the backend
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"zentorch can't be imported: {' '.join(str(error).split())[:80]}") from None
    return compiled_call(folded_module(task, form, dtype), task.cast_inputs(dtype), freeze=True, backend="zentorch")


def of_dtype(build: Callable[..., Call], *args: Any) -> Callable[[Task], Call]:
    """A builder with everything but the task filled in."""

    def filled(task: Task) -> Call:
        return build(task, *args)

    return filled
