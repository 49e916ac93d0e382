"""Peers that run an exported graph: ONNX Runtime and OpenVINO, on both graph forms."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout

import torch
from torch import nn

from .base import Call, Task, Unavailable, need
from .torch_peers import folded_module

_INPUTS = {"decode": ("semantic_codes", "acoustic_codes"), "encode": ("audio", "features")}


def onnx_bytes(task: Task, form: str) -> bytes:
    """The folded model as float32 ONNX with fixed shapes, exported once per form."""
    key = f"onnx {task.kind} {form}"
    if key not in task.cache:
        need("onnx", "onnxscript")
        module = folded_module(task, form, torch.float32)
        # The exporter reports its progress, packages it does without, and deprecations inside it at length.
        exporter_log = logging.getLogger("torch.onnx")
        level = exporter_log.level
        exporter_log.setLevel(logging.ERROR)
        try:
            task.cache[key] = _export(task, module)
        finally:
            exporter_log.setLevel(level)
    return task.cache[key]


def _export(task: Task, module: nn.Module) -> bytes:
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, task.inputs, dynamo=True, input_names=_INPUTS[task.kind], verbose=False, optimize=True
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def onnxruntime(task: Task, form: str) -> Call:
    need("onnxruntime")
    import onnxruntime as ort

    if task.device != "cpu":
        raise Unavailable("runs on the CPU here")
    options = ort.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(onnx_bytes(task, form), options, providers=["CPUExecutionProvider"])
    feed = {name: x.numpy() for name, x in zip(_INPUTS[task.kind], task.inputs, strict=True)}

    def call() -> object:
        found = session.run(None, feed)
        return found[0] if len(found) == 1 else tuple(found)

    return call


def openvino(task: Task, form: str, dtype: torch.dtype) -> Call:
    need("openvino")
    import openvino as ov

    if task.device != "cpu":
        raise Unavailable("runs on the CPU here")
    core = ov.Core()
    if dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("this processor has no bf16 for OpenVINO")
    compiled = core.compile_model(
        core.read_model(model=onnx_bytes(task, form)),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": task.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        },
    )
    request = compiled.create_infer_request()
    feed = {name: x.numpy() for name, x in zip(_INPUTS[task.kind], task.inputs, strict=True)}

    def call() -> object:
        found = list(request.infer(feed, share_inputs=True, share_outputs=True).values())
        return found[0] if len(found) == 1 else tuple(found)

    return call
