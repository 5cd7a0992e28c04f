#!/usr/bin/env python3
"""ONNX Runtime and OpenVINO on a dense encoder of MiniLM's size (6 x 384, 12 heads, ffn 1536,
random weights).

  graph_peers.py --prepare DIR                                  writes DIR/minilm.onnx,
  DIR/fused.onnx (BERT fusions), DIR/minilm.xml
  graph_peers.py --serve ort|openvino --dir DIR [--threads N] [--precision fp32|bf16|int8]
      answers "SECONDS BATCHxLENGTH" (serve.py)
  graph_peers.py --first ort|openvino --dir DIR                 one answer for 1 x 16 tokens from a
  cold process, as run.py times it

The ONNX graph is the one of transformers' BertModel with written-out attention, which ONNX
Runtime's optimizer fuses whole (Attention,
EmbedLayerNormalization, SkipLayerNormalization, BiasGelu); OpenVINO gets the one with
scaled_dot_product_attention and fixed shapes.
"""

import argparse
import os
import sys

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def encoder(attention):
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    c = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        attn_implementation=attention,
    )

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = BertModel(c, add_pooling_layer=False).eval()

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state

    return Encoder().eval()


def prepare(folder):
    import torch

    ids = torch.randint(0, 30522, (2, 16))
    example = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    plain, fused = os.path.join(folder, "minilm.onnx"), os.path.join(folder, "fused.onnx")
    dynamic = {name: {0: "batch", 1: "length"} for name in INPUTS}
    try:
        torch.onnx.export(
            encoder("eager"),
            example,
            plain,
            input_names=list(INPUTS),
            output_names=["hidden"],
            dynamic_axes=dynamic,
            opset_version=17,
            dynamo=False,
        )
        from onnxruntime.transformers import optimizer

        model = optimizer.optimize_model(
            plain, model_type="bert", num_heads=12, hidden_size=384, opt_level=0, use_gpu=False
        )
        print(
            "fusions of ONNX Runtime:",
            {k: n for k, n in model.get_fused_operator_statistics().items() if n},
            file=sys.stderr,
        )
        model.save_model_to_file(fused)
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            fused,
            os.path.join(folder, "fused_int8.onnx"),
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"DefaultTensorType": 1},
        )  # 1: float, where shape inference does not know the fused nodes
    except ImportError as e:
        print(f"graph_peers.py: no ONNX Runtime: {e}", file=sys.stderr)
    try:
        import openvino

        openvino.save_model(
            openvino.convert_model(encoder("sdpa"), example_input=example),
            os.path.join(folder, "minilm.xml"),
            compress_to_fp16=False,
        )
    except ImportError as e:
        print(f"graph_peers.py: no OpenVINO: {e}", file=sys.stderr)


def feed(shape):
    import numpy

    ids = numpy.random.default_rng(1).integers(0, 30522, shape, dtype=numpy.int64)
    return {
        "input_ids": ids,
        "attention_mask": numpy.ones_like(ids),
        "token_type_ids": numpy.zeros_like(ids),
    }


def onnx_runtime(folder, threads, precision):
    """call(shape) -> a call without arguments"""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    cores = sorted(os.sched_getaffinity(0))
    if 1 < threads <= len(cores):  # a core for each thread, as for the other programs
        options.add_session_config_entry(
            "session.intra_op_thread_affinities", ";".join(str(c + 1) for c in cores[1:threads])
        )
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    name = "fused_int8.onnx" if precision == "int8" else "fused.onnx"
    session = onnxruntime.InferenceSession(
        os.path.join(folder, name), options, providers=["CPUExecutionProvider"]
    )
    if threads <= len(cores):
        os.sched_setaffinity(0, cores[:1])
    wanted = {i.name: i.type for i in session.get_inputs()}

    def call(shape):
        inputs = {
            n: v.astype("int32") if "int32" in wanted[n] else v
            for n, v in feed(shape).items()
            if n in wanted
        }
        return lambda: session.run(None, inputs)[0][:, 0].sum()

    return call, f"ONNX Runtime {onnxruntime.__version__}"


def openvino_runtime(folder, threads, precision):
    import openvino

    core = openvino.Core()
    model = core.read_model(os.path.join(folder, "minilm.xml"))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": True,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }

    def call(shape):
        inputs = feed(shape)
        fixed = model.clone()
        fixed.reshape({port: list(shape) for port in fixed.inputs})
        request = core.compile_model(fixed, "CPU", settings).create_infer_request()
        values = [
            openvino.Tensor(inputs[next(iter(port.names & set(INPUTS)), None) or INPUTS[i]])
            for i, port in enumerate(fixed.inputs)
        ]
        for i, v in enumerate(values):
            request.set_input_tensor(i, v)

        def once():
            request.infer()
            return request.get_output_tensor(0).data[:, 0].sum()

        return once

    return call, f"OpenVINO {openvino.__version__.split('-')[0]}"


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--prepare", metavar="DIR")
    p.add_argument("--serve", choices=["ort", "openvino"])
    p.add_argument("--first", choices=["ort", "openvino"])
    p.add_argument("--dir", default=".")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "int8"])
    a = p.parse_args()
    if a.prepare:
        return prepare(a.prepare)
    engine = onnx_runtime if "ort" in (a.serve, a.first) else openvino_runtime
    call, name = engine(a.dir, a.threads, a.precision)
    if a.first:
        print(call((1, 16))())
        return None
    from serve import serve

    made = {}

    def once(text):
        if text not in made:
            made[text] = call(tuple(int(n) for n in text.split("x")))
        made[text]()

    serve(once, {"peer": name, "what": "inference", "precision": a.precision, "threads": a.threads})
    return None


if __name__ == "__main__":
    main()
