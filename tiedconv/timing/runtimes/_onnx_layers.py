"""A few layers as an ONNX graph, made without tracing: it takes no time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def layer_graph(layers: nn.Sequential, x: Tensor) -> bytes:
    """An ONNX model of linear layers or convolutions, one after the other.

    Args:
        layers: `nn.Linear` and `nn.Conv2d` alone.
        x: their input.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    held: list[Any] = []

    def stored(name: str, tensor: Tensor) -> str:
        held.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), name))
        return name

    last = "x"
    for i, layer in enumerate(layers):
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        bias = None if layer.bias is None else stored(f"b{i}", layer.bias)
        out = f"y{i}"
        if isinstance(layer, nn.Conv2d):
            weight = stored(f"w{i}", layer.weight)
            assert not isinstance(layer.padding, str)
            (top, left), kernel = layer.padding, list(layer.kernel_size)
            how = {
                "strides": list(layer.stride),
                "dilations": list(layer.dilation),
                "pads": [top, left, top, left],
                "kernel_shape": kernel,
                "group": layer.groups,
            }
            inputs = [last, weight, *([bias] if bias else [])]
            nodes.append(helper.make_node("Conv", inputs, [out], **how))
        else:
            weight = stored(f"w{i}", layer.weight.t())
            product = f"p{i}" if bias else out
            nodes.append(helper.make_node("MatMul", [last, weight], [product]))
            if bias:
                nodes.append(helper.make_node("Add", [product, bias], [out]))
        last = out
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))
    found = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layers", [given], [found], held)
    opsets = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())
