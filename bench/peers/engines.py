"""Inference engines as peers: ONNX Runtime and OpenVINO, forward passes on the CPU.

A model of one operator is made for the tensors of a case when they are first seen, with as many
threads as torch has, and bound to their memory: what is timed is the engine's own run. Each peer
raises UnsupportedError for what the engine has no way to compute, and is imported only when called.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..measure.cases import dtype_text
from ..measure.inputs import AttentionInputs, Outputs
from .packages import UnsupportedError

Run = Callable[[], Tensor]


class Engine:
    """A peer that prepares a run once for each set of tensors; the last one is kept."""

    def __init__(self, name: str, prepare: Callable[[AttentionInputs], Run]) -> None:
        self._name, self._prepare = name, prepare
        self._tensors: list[Tensor | None] = []
        self._run: Run | None = None

    def __call__(self, inputs: AttentionInputs) -> Outputs:
        if torch.is_grad_enabled():
            raise UnsupportedError(f"{self._name} has no backward")
        if inputs.dropout_p > 0.0:
            raise UnsupportedError(f"{self._name}'s attention has no dropout")
        tensors = [inputs.q, inputs.k, inputs.v, inputs.bias, inputs.allowed]
        seen = zip(tensors, self._tensors, strict=False)
        if self._run is None or any(new is not old for new, old in seen):
            self._run, self._tensors = self._prepare(inputs), tensors
        return (self._run(),)


def onnx_runtime() -> Engine:
    return Engine("ONNX Runtime", _onnx_run)


def open_vino() -> Engine:
    return Engine("OpenVINO", _openvino_run)


def _score_mask(inputs: AttentionInputs) -> Tensor | None:
    """The mask or bias that the engines take: bool (B or 1, 1, Lq, Lk), or the bias."""
    if inputs.bias is not None:
        if inputs.allowed is None:
            return inputs.bias.detach()
        masked = inputs.bias.detach().masked_fill(~inputs.allowed, -torch.inf)
        return masked.contiguous()
    if inputs.allowed is None or inputs.causal:
        return None
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    return inputs.allowed.expand(-1, -1, queries, keys).contiguous()


# --- ONNX Runtime ---------------------------------------------------------------------------------


def _onnx_run(inputs: AttentionInputs) -> Run:
    """The quicker of the operators that can do it, found out by running both."""
    if inputs.q.dtype != torch.float32:
        raise UnsupportedError(f"ONNX Runtime has no {dtype_text(inputs.q.dtype)} attention here")
    runs = [_onnx_attention(inputs)]
    if inputs.allowed is None and inputs.bias is None and inputs.group == 1:
        runs.append(_onnx_multi_head_attention(inputs))
    return min(runs, key=_shortest)


def _shortest(run: Run) -> float:
    times = []
    for _ in range(4):
        started = perf_counter()
        run()
        times.append(perf_counter() - started)
    return min(times[1:])


def _onnx_attention(inputs: AttentionInputs) -> Run:
    """ONNX's own Attention, (B, H, L, D)."""
    mask = _score_mask(inputs)
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    if mask is not None:
        tensors["mask"] = mask
    return _onnx_bound("Attention", {"is_causal": int(inputs.causal)}, "", tensors)


def _onnx_multi_head_attention(inputs: AttentionInputs) -> Run:
    """ONNX Runtime's MultiHeadAttention, (B, L, H * D)."""
    heads = inputs.q.shape[1]
    tensors = {
        name: tensor.detach().transpose(1, 2).flatten(2).contiguous()
        for name, tensor in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))
    }
    run = _onnx_bound("MultiHeadAttention", {"num_heads": heads}, "com.microsoft", tensors)
    return lambda: run().unflatten(2, (heads, -1)).transpose(1, 2)


def _onnx_bound(
    operator: str, attributes: dict[str, Any], domain: str, tensors: dict[str, Tensor]
) -> Run:
    import onnx
    import onnxruntime

    types = {torch.float32: onnx.TensorProto.FLOAT, torch.bool: onnx.TensorProto.BOOL}

    def declared(name: str, tensor: Tensor) -> Any:
        return onnx.helper.make_tensor_value_info(name, types[tensor.dtype], list(tensor.shape))

    out = torch.empty_like(tensors["q"], requires_grad=False)
    node = onnx.helper.make_node(operator, list(tensors), ["out"], domain=domain, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        operator,
        [declared(name, tensor) for name, tensor in tensors.items()],
        [declared("out", out)],
    )
    versions = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised as well
    # its threads would go on spinning into the time of the next candidate
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, tensor in tensors.items():
        binding.bind_input(name, "cpu", 0, *_placed(tensor))
    binding.bind_output("out", "cpu", 0, *_placed(out))

    def run(_kept: dict[str, Tensor] = tensors) -> Tensor:
        session.run_with_iobinding(binding)
        return out

    return run


def _placed(tensor: Tensor) -> tuple[Any, list[int], int]:
    """Element type, shape and address, as a binding takes them."""
    flat = tensor.detach()
    return flat.numpy().dtype, list(flat.shape), flat.data_ptr()


# --- OpenVINO -------------------------------------------------------------------------------------


def _openvino_run(inputs: AttentionInputs) -> Run:
    """ScaledDotProductAttention, computing in the dtype of the tensors."""
    import openvino  # type: ignore[import-not-found, unused-ignore]
    from openvino import opset13  # type: ignore[import-not-found, unused-ignore]

    types = {
        torch.float32: openvino.Type.f32,
        torch.bfloat16: openvino.Type.bf16,
        torch.float16: openvino.Type.f16,
        torch.bool: openvino.Type.boolean,
    }
    q = inputs.q.detach()
    if q.dtype not in types:
        raise UnsupportedError(f"OpenVINO is not set up for {dtype_text(q.dtype)} here")
    mask = _score_mask(inputs)
    if inputs.group > 1:
        if q.shape[2] > 1 or mask is not None:
            raise UnsupportedError("OpenVINO's operator has no grouped heads")
        # one query a head and no mask: heads of a group are queries of its key head
        q = q.view(q.shape[0], inputs.k.shape[1], inputs.group, q.shape[3])
    tensors = [q, inputs.k.detach(), inputs.v.detach(), *(() if mask is None else (mask,))]
    places = [opset13.parameter(list(x.shape), dtype=types[x.dtype]) for x in tensors]
    node = opset13.scaled_dot_product_attention(*places, causal=inputs.causal)
    compiled = openvino.Core().compile_model(
        openvino.Model([node], places, "attention"),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": types[q.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_HYPER_THREADING": True,
            "ENABLE_CPU_PINNING": False,
        },
    )
    request = compiled.create_infer_request()
    out = torch.empty_like(q)

    def shared(tensor: Tensor) -> Any:
        """The same memory; NumPy knows no bfloat16, so it is handed over as bits."""
        bits = tensor.view(torch.int16) if tensor.element_size() == 2 else tensor
        return openvino.Tensor(bits.numpy(), list(tensor.shape), types[tensor.dtype])

    for index, tensor in enumerate(tensors):
        request.set_input_tensor(index, shared(tensor))
    request.set_output_tensor(0, shared(out))

    def run(_kept: list[Tensor] = tensors) -> Tensor:
        request.infer()
        return out.view(inputs.q.shape)

    return run
