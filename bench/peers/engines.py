"""Inference engines as peers: ONNX Runtime and OpenVINO, forward passes on the CPU.

A model of one operator is made for the tensors of a case when they are first seen, with as many
threads as torch has, and bound to their memory: what is timed is the engine's own run. Each peer
raises UnsupportedError for what the engine has no way to compute, and is imported only when called.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..measure.cases import dtype_text
from ..measure.inputs import AttentionInputs, Outputs
from .packages import UnsupportedError


class Run(NamedTuple):
    """A prepared model: `run` computes, `bind` hands it the tensors that it reads from then on."""

    run: Callable[[], Tensor]
    bind: Callable[[AttentionInputs], object]


class Engine:
    """A peer that prepares a run once for tensors of the same shapes.

    It reads the tensors that it was bound to: `rebind` is for who changes them or their values, and
    so is not timed. Tensors that it has not seen are bound, or prepared for, when it is called.
    """

    def __init__(self, name: str, prepare: Callable[[AttentionInputs], Run]) -> None:
        self._name, self._prepare = name, prepare
        self._shapes: list[object] = []
        self._bound: list[object] = []
        self._run: Run | None = None

    def __call__(self, inputs: AttentionInputs) -> Outputs:
        if torch.is_grad_enabled():
            raise UnsupportedError(f"{self._name} has no backward")
        if inputs.dropout_p > 0.0:
            raise UnsupportedError(f"{self._name}'s attention has no dropout")
        if self._run is None or self._bound != _versions(inputs):
            self.rebind(inputs)
        assert self._run is not None  # which has just been prepared
        return (self._run.run(),)

    def rebind(self, inputs: AttentionInputs) -> None:
        shapes: list[object] = [inputs.causal]
        shapes += [None if t is None else (t.shape, t.dtype) for t in _tensors(inputs)]
        if self._run is None or shapes != self._shapes:
            self._run, self._shapes = self._prepare(inputs), shapes
        else:
            self._run.bind(inputs)
        self._bound = _versions(inputs)


def _tensors(inputs: AttentionInputs) -> list[Tensor | None]:
    return [inputs.q, inputs.k, inputs.v, inputs.bias, inputs.allowed]


def _versions(inputs: AttentionInputs) -> list[object]:
    """They are others where a tensor is another one, or its values have changed."""
    return [None if t is None else (t.data_ptr(), t._version) for t in _tensors(inputs)]


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
        run.run()
        times.append(perf_counter() - started)
    return min(times[1:])


def _onnx_attention(inputs: AttentionInputs) -> Run:
    """ONNX's own Attention, (B, H, L, D)."""

    def tensors(inputs: AttentionInputs) -> dict[str, Tensor]:
        mask = _score_mask(inputs)
        found = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
        return found if mask is None else {**found, "mask": mask}

    return _onnx_bound("Attention", {"is_causal": int(inputs.causal)}, "", tensors, inputs)


def _onnx_multi_head_attention(inputs: AttentionInputs) -> Run:
    """ONNX Runtime's MultiHeadAttention, (B, L, H * D)."""
    heads = inputs.q.shape[1]

    def tensors(inputs: AttentionInputs) -> dict[str, Tensor]:
        return {
            name: tensor.detach().transpose(1, 2).flatten(2).contiguous()
            for name, tensor in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))
        }

    options = {"num_heads": heads}
    bound = _onnx_bound("MultiHeadAttention", options, "com.microsoft", tensors, inputs)
    return Run(lambda: bound.run().unflatten(2, (heads, -1)).transpose(1, 2), bound.bind)


def _onnx_bound(
    operator: str,
    attributes: dict[str, Any],
    domain: str,
    tensors_of: Callable[[AttentionInputs], dict[str, Tensor]],
    inputs: AttentionInputs,
) -> Run:
    import onnx
    import onnxruntime

    types = {torch.float32: onnx.TensorProto.FLOAT, torch.bool: onnx.TensorProto.BOOL}

    def declared(name: str, tensor: Tensor) -> Any:
        return onnx.helper.make_tensor_value_info(name, types[tensor.dtype], list(tensor.shape))

    tensors = tensors_of(inputs)
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
    binding.bind_output("out", "cpu", 0, *_placed(out))
    kept: dict[str, Tensor] = {}  # what it reads must stay alive

    def bind(inputs: AttentionInputs) -> None:
        kept.update(tensors_of(inputs))
        for name, tensor in kept.items():
            binding.bind_input(name, "cpu", 0, *_placed(tensor))

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return out

    bind(inputs)
    return Run(run, bind)


def _placed(tensor: Tensor) -> tuple[Any, list[int], int]:
    """Element type, shape and address, as a binding takes them."""
    flat = tensor.detach()
    return flat.numpy().dtype, list(flat.shape), flat.data_ptr()


# --- OpenVINO -------------------------------------------------------------------------------------


def _openvino_run(inputs: AttentionInputs) -> Run:
    """ScaledDotProductAttention, computing in the dtype of the tensors."""
    import openvino
    from openvino import opset13

    types = {
        torch.float32: openvino.Type.f32,
        torch.bfloat16: openvino.Type.bf16,
        torch.float16: openvino.Type.f16,
        torch.bool: openvino.Type.boolean,
    }
    if inputs.q.dtype not in types:
        raise UnsupportedError(f"OpenVINO is not set up for {dtype_text(inputs.q.dtype)} here")
    grouped = inputs.group > 1
    if grouped and (inputs.q.shape[2] > 1 or _score_mask(inputs) is not None):
        raise UnsupportedError("OpenVINO's operator has no grouped heads")

    def tensors_of(inputs: AttentionInputs) -> list[Tensor]:
        q, mask = inputs.q.detach(), _score_mask(inputs)
        if grouped:
            # one query a head and no mask: heads of a group are queries of its key head
            q = q.view(q.shape[0], inputs.k.shape[1], inputs.group, q.shape[3])
        return [q, inputs.k.detach(), inputs.v.detach(), *(() if mask is None else (mask,))]

    tensors = tensors_of(inputs)
    places = [opset13.parameter(list(x.shape), dtype=types[x.dtype]) for x in tensors]
    node = opset13.scaled_dot_product_attention(*places, causal=inputs.causal)
    compiled = openvino.Core().compile_model(
        openvino.Model([node], places, "attention"),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": types[inputs.q.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_HYPER_THREADING": True,
            "ENABLE_CPU_PINNING": False,
        },
    )
    request = compiled.create_infer_request()
    out = torch.empty_like(tensors[0])
    kept: list[Tensor] = []  # what it reads must stay alive

    def shared(tensor: Tensor) -> Any:
        """The same memory; NumPy knows no bfloat16, so it is handed over as bits."""
        bits = tensor.view(torch.int16) if tensor.element_size() == 2 else tensor
        return openvino.Tensor(bits.numpy(), list(tensor.shape), types[tensor.dtype])

    def bind(inputs: AttentionInputs) -> None:
        kept[:] = tensors_of(inputs)
        for index, tensor in enumerate(kept):
            request.set_input_tensor(index, shared(tensor))

    bind(inputs)
    request.set_output_tensor(0, shared(out))
    shape = inputs.q.shape

    def run() -> Tensor:
        request.infer()
        return out.view(shape)

    return Run(run, bind)
