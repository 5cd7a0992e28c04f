#!/usr/bin/env python3
"""Single ops in other libraries: the peers of bench_ops.c, served (serve.py). The word is NAME or
NAME:n:k:m.

  op_peers.py torch|openblas|blis|libblis|aocl      threads: torch as the line says, the others as
  their environment says

torch: PyTorch, whose products are oneDNN's, `packed` with weights reordered beforehand or, where
that is faster, the plain call. openblas: sgemm of the OpenBLAS inside NumPy.
blis: upstream BLIS inside PyPI's package blis. libblis, aocl: cblas_sgemm of Debian's libblis and
of AMD's AOCL-BLIS, through ctypes.
"""

import ctypes
import ctypes.util
import glob
import os
import sys

S, LENGTH, H, F, A, N, V = 32, 128, 384, 1536, 12, 4, 30522
M = S * LENGTH
MOST = M * 3072  # the largest operand


def gradient(forward, *inputs):
    """The backward pass alone: the graph is kept."""
    import torch

    leaves = [x.requires_grad_() for x in inputs]
    y = forward(*leaves)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def faster(*calls):
    """The fastest of several ways to the same result."""
    from serve import repeat

    return min(calls, key=lambda c: (repeat(c, 0.005), repeat(c, 0.01))[1][0])


def operands(n, k, m):
    """x (m, k), w (n, k) and dy (m, n), views of one array that is filled once: that takes longer
    than measuring."""
    import numpy

    if not hasattr(operands, "array"):
        operands.array = numpy.random.default_rng(1).random(3 * MOST, dtype=numpy.float32) * 2 - 1
    return (
        operands.array[i * MOST : i * MOST + a * b].reshape(a, b)
        for i, (a, b) in enumerate(((m, k), (n, k), (m, n)))
    )


def torch_product(name, n, k, m):
    import torch

    x, w, dy = (torch.from_numpy(a) for a in operands(n, k, m))
    b = torch.randn(n)
    if name == "packed":
        packed = torch.ops.mkldnn._reorder_linear_weight(w, m)
        reordered = lambda: torch.ops.mkldnn._linear_pointwise(
            x, packed, b, "none", [], ""
        )  # noqa: E731
        return faster(reordered, lambda: torch.nn.functional.linear(x, w, b))
    return {
        "plain": lambda: torch.nn.functional.linear(x, w, b),
        "dx": lambda: dy @ w,
        "dw": lambda: dy.t() @ x,
    }[name]


def torch_experts():
    """The layer of tests/golden/reference.py."""
    sys.path.insert(
        0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "golden")
    )
    import reference as ref
    import torch

    experts = torch.nn.ModuleList([ref.Expert(ref.Config([])) for _ in range(N)])
    choice = torch.randint(0, N, (M, 1))
    return (
        lambda x, weight: ref.dispatch(x, choice, weight, experts),
        [torch.randn(M, H), torch.rand(M, 1)],
        list(experts.parameters()),
    )


def torch_op(name):
    import torch
    import torch.nn.functional as f

    base = name.removesuffix("_back")
    if base == "experts":
        forward, inputs, parameters = torch_experts()
        if base == name:
            return lambda: forward(*inputs)
        leaves = [x.requires_grad_() for x in inputs]
        y = forward(*leaves)
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, leaves + parameters, dy, retain_graph=True)
    if base == "adam":
        w = torch.nn.Parameter(torch.randn(10000000))
        w.grad = torch.randn_like(w)
        return torch.optim.Adam([w], lr=1e-5, fused=True).step
    if base == "embed":
        ids = torch.randint(0, V, (M,))
        return (
            gradient(lambda t: f.embedding(ids, t), torch.randn(V, H))
            if base != name
            else lambda t=torch.randn(V, H): f.embedding(ids, t)
        )
    forward, inputs = {
        "gelu": (f.gelu, [torch.randn(M, F)]),
        "norm": (
            lambda x, g, b: f.layer_norm(x, (H,), g, b, 1e-12),
            [torch.randn(M, H), torch.randn(H), torch.randn(H)],
        ),
        "dropout": (lambda x: f.dropout(x, 0.1), [torch.randn(M, H)]),
        "attention": (
            f.scaled_dot_product_attention,
            [torch.randn(S, A, LENGTH, H // A) for _ in range(3)],
        ),
    }[base]
    return (lambda: forward(*inputs)) if base == name else gradient(forward, *inputs)


def openblas_product(name, n, k, m):
    import numpy

    x, w, dy = operands(n, k, m)
    wt = numpy.ascontiguousarray(w.T)
    a, b = {"packed": (x, wt), "plain": (x, w.T), "dx": (dy, w), "dw": (dy.T, x)}[name]
    out = numpy.empty((a.shape[0], b.shape[1]), dtype=numpy.float32)
    return lambda: numpy.dot(a, b, out=out)


def float_product(name, n, k, m):
    """What the libraries of C get: A, B and C of one product, with the weights transposed
    beforehand for `packed`."""
    import numpy

    x, w, dy = operands(n, k, m)
    a, b, flip_a, flip_b = {
        "packed": (x, numpy.ascontiguousarray(w.T), False, False),
        "plain": (x, w, False, True),
        "dx": (dy, w, False, False),
        "dw": (dy, x, True, False),
    }[name]
    return (
        a,
        b,
        numpy.empty(
            (a.shape[1 if flip_a else 0], b.shape[0 if flip_b else 1]), dtype=numpy.float32
        ),
        flip_a,
        flip_b,
    )


def blis_product(name, n, k, m):
    from blis.py import gemm

    a, b, out, flip_a, flip_b = float_product(name, n, k, m)
    return lambda: gemm(a, b, out=out, trans1=flip_a, trans2=flip_b)


AOCL = ["libaocl-blas-mt.so", "libaocl-blas.so", "libblis-mt.so", "libaoclblis.so"]


def c_library(name):
    """The shared object, or the end of this program with a sentence."""
    if name == "libblis":
        found = [ctypes.util.find_library("blis")]
    else:
        places = (
            [os.environ["AOCL_ROOT"]]
            if "AOCL_ROOT" in os.environ
            else glob.glob("/opt/AMD/aocl/*") + ["/usr/local"]
        )
        found = [
            path
            for place in places
            for file in AOCL
            for path in glob.glob(os.path.join(place, "**", file), recursive=True)
        ]
    if not found or not found[0]:
        sys.exit(
            {
                "libblis": "Debian's libblis is not installed (libblis-dev)",
                "aocl": (
                    "AOCL-BLIS is not installed (AMD's own download; AOCL_ROOT tells where it is)"
                ),
            }[name]
        )
    return ctypes.CDLL(found[0])


def cblas_product(library, name, n, k, m):
    a, b, out, flip_a, flip_b = float_product(name, n, k, m)
    p, i, f = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    arguments = (
        i(101),
        i(112 if flip_a else 111),
        i(112 if flip_b else 111),
        i(out.shape[0]),
        i(out.shape[1]),
        i(a.shape[0 if flip_a else 1]),
        f(1),
        p(a.ctypes.data),
        i(a.shape[1]),
        p(b.ctypes.data),
        i(b.shape[1]),
        f(0),
        p(out.ctypes.data),
        i(out.shape[1]),
    )
    library.cblas_sgemm.restype = None
    return lambda keep=(a, b, out): library.cblas_sgemm(*arguments)


def main():
    library = sys.argv[1]
    if library == "torch":
        import torch

        version = torch.__version__
        product = torch_product
    elif library == "openblas":
        import numpy

        version, product = numpy.__version__, openblas_product
    elif library == "blis":
        import blis

        version, product = blis.__version__ if hasattr(blis, "__version__") else "", blis_product
    else:
        shared = c_library(library)
        version, product = shared._name, lambda *word: cblas_product(shared, *word)
    made = {}

    def once(word, threads=None):
        if threads and int(threads) != torch.get_num_threads():
            torch.set_num_threads(int(threads))
            made.clear()  # the faster way may be another one
        if word not in made:
            made.clear()
            name, *sizes = word.split(":")
            if sizes:
                made[word] = product(name, *(int(s) for s in sizes))
            else:
                made[word] = torch_op(name)
        if "_back" in word or word == "adam":
            return made[word]()
        if library == "torch":
            with torch.inference_mode():
                return made[word]()
        return made[word]()

    from serve import serve

    serve(once, {"peer": library, "version": version})


if __name__ == "__main__":
    main()
