"""Tensors of an ONNX graph under the names that the exported torch module had."""

import math
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from minigpt4_jax.errors import CheckpointError


def read(path: Path) -> dict[str, np.ndarray]:
    """Tensors by torch name, linear weights as torch has them: [out, in].

    Torch's exporter folds the transpose of a linear weight into the file and calls the
    result `onnx::MatMul_1966`; the MatMul node that reads it still carries the module's
    name (`/encoder/layer.0/mlp/fc1/MatMul` -> `encoder.layer.0.mlp.fc1.weight`).
    """
    try:
        graph = onnx.load(str(path)).graph
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable ONNX file: {error}") from error
    stored = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer
    }
    folded = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            module = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            folded[f"{module}.weight"] = stored.pop(node.input[1]).T
    positions = _positions(graph, stored)
    return {**stored, **folded, **positions}


def _positions(
    graph: onnx.GraphProto, stored: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Joins the class row and the grid that the exporter stored apart, if there are two.

    A model that resizes its position embeddings slices them before; the exporter folds
    the slices into `onnx::Concat_*` [1, 1, D] and `onnx::Reshape_*` [1, P, D].
    """
    reshaped = {
        node.input[0]
        for node in graph.node
        if node.op_type == "Reshape" and node.input[0] in stored
    }
    joined = {
        node.input[0]
        for node in graph.node
        if node.op_type == "Concat" and node.input[0] in stored
    }
    if len(reshaped) != 1 or len(joined) != 1:
        return {}
    grid, first = stored.pop(reshaped.pop()), stored.pop(joined.pop())
    side = math.isqrt(grid.shape[1])
    if side * side != grid.shape[1] or first.shape != (1, 1, grid.shape[2]):
        raise CheckpointError(
            f"position embeddings {list(first.shape)} and {list(grid.shape)} in the ONNX "
            "graph are not one class row and a square grid"
        )
    name = "backbone.embeddings.position_embeddings"
    return {name: np.concatenate([first, grid], axis=1)}
