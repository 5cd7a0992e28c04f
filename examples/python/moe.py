"""Copy moe.h and this file into one folder: the first import compiles moe.h with cc. Needs NumPy.

    from moe import Model
    model = Model.load("model.safetensors")
    model.tasks                                    {"topic": ["food", "travel"], "rating": None}
    model.predict("topic", ["soup", "a train"])    [("food", 0.98), ("travel", 0.97)]
    model.predict_features("fault", [x, y])        the same for arrays (rows, feature_dim)
    model.embed(["soup", "a train"])               an array, a row for each text
    model = Model.create({"layers": 2, "hidden": 64}, {"topic": ["food", "travel"]}, vocab=words)
    model.train([model.batch("topic", ["soup", "a train"], [0, 1])] * 100, lr=1e-3)    losses
    model.weights["heads.topic.bias"]              NumPy views; model.pack() after changing them
    model.save("copy.safetensors")

A pair of texts is a tuple. MOE_THREADS: number of threads (1). MOE_LIBRARY: a library built before.
From the shell: python3 moe.py MODEL TASK TEXT..."""
import ctypes as C
import hashlib, os, shutil, subprocess, sys
import numpy as np

HERE, BATCH, VERSION = os.path.dirname(os.path.abspath(__file__)), 64, 200  # BATCH: texts at once
KINDS = dict(i=C.c_int32, f=C.c_float, p=C.c_void_p, q=C.c_int64, z=C.c_size_t, n=C.c_char * 64,
             N=C.c_char * 128, d=C.c_int32 * 3)


def _struct(name, fields):  # "i: a b f: c": a kind, its fields
    of, kind = [], None
    for word in fields.split():
        if word[1:] == ":":
            kind = KINDS[word[0]]
        else:
            of.append((word, kind))
    return type(name, (C.Structure,), {"_fields_": of})


Config = _struct("moe_config", "i: layers hidden ffn heads vocab positions segments feature_dim "
                 "f: eps i: router experts top_k gate_scale_n renormalize rank max_len truncate "
                 "cased unit selection task_dim f: temperature p: pruned")
Task = _struct("moe_task", "n: name i: kind pair classes f: low high n: metrics i: max_len "
               "p: label")
Batch = _struct("moe_batch", "i: S p: seq_start ids features segments task label span index")
Limits = _struct("moe_limits", "i: tokens sequences training keep_layers")
Train = _struct("moe_train_config", "f: lr warmup q: steps p: lr_schedule lr_user f: beta1 beta2 "
                "eps weight_decay clip_norm dropout balance z_loss jitter tau_start tau_end "
                "tau_rate q: seed p: groups i: n_groups")
Tensor = _struct("moe_tensor", "N: name i: dims d: shape i: type z: offset count")
Tokens = _struct("moe_tokens", "p: ids segments begin end i: capacity count")
Text = _struct("moe_text", "p: a b z: a_bytes b_bytes")


def _library():
    header = next(filter(os.path.exists, [f"{HERE}/moe.h", f"{HERE}/../../moe.h"]), None)
    path = os.environ.get("MOE_LIBRARY")
    if not (header or path):
        raise ImportError(f"there is no {HERE}/moe.h: copy it there")
    if not path:
        source = b"#define MOE_IMPLEMENTATION\n" + open(header, "rb").read()
        path = f"{HERE}/libmoe-{hashlib.sha256(source).hexdigest()[:12]}.so"
    if not os.path.exists(path):
        cc, new = os.environ.get("CC", "cc"), f"{path}.{os.getpid()}"
        if not shutil.which(cc):
            raise ImportError(f"there is no C compiler {cc}: install gcc or clang, or set CC")
        done = subprocess.run([cc, "-O2", "-shared", "-fPIC", "-DMOE_SHARED", "-o", new, "-x", "c",
                               "-", "-lm", "-pthread"], input=source, stderr=subprocess.PIPE)
        if done.returncode:
            raise ImportError(f"{cc} does not compile {header}:\n{done.stderr.decode()[:2000]}")
        os.replace(new, path)
    lib = C.CDLL(path)
    lib.moe_abi.restype = C.c_size_t
    for name, here in ((None, VERSION), *((s.__name__.encode(), C.sizeof(s)) for s in (
            Config, Task, Batch, Limits, Train, Tensor, Tokens, Text))):
        if lib.moe_abi(name) != here:
            raise ImportError(f"{path} is of another version: {name or 'its number'} is "
                              f"{lib.moe_abi(name)}, moe.py expects {here}")
    for kind, names in ((C.c_size_t, "model_parameters"),
                        (C.c_void_p, "model_task model_config model_vocab model_weights "
                         "trainer_gradients")):
        for name in names.split():
            getattr(lib, "moe_" + name).restype = kind
    return lib


_said = ["it gave no reason"]  # sentences of the library
_log = C.CFUNCTYPE(None, C.c_void_p, C.c_int, C.c_char_p)(
    lambda user, status, sentence: _said.append(sentence.decode(errors="replace")))
_lib, _env, R = _library(), C.c_void_p(), C.byref


def _check(status):
    if status:
        raise RuntimeError(_said[-1])


_check(_lib.moe_env_create(R(_env), 0, int(os.environ.get("MOE_THREADS", 1)), _log, None))


def _array(what, values, dtype, *shape):  # -1: any; floats never become whole numbers silently
    a = np.asarray(values)
    if not np.can_cast(a.dtype, dtype, "same_kind"):
        raise TypeError(f"{what} is {a.dtype}, expected {np.dtype(dtype)}")
    if a.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, a.shape)):
        raise ValueError(f"{what} has shape {a.shape}, expected {shape} (-1: any)")
    return np.ascontiguousarray(a, dtype)


def _fill(struct, values):
    for name, value in values.items():
        if not hasattr(struct, name):
            raise TypeError(f"{type(struct).__name__} has no field {name}")
        setattr(struct, name, value)
    return struct


def _strings(texts):
    return (C.c_char_p * len(texts))(*(t.encode() for t in texts))


class Model:
    def __init__(self, make, *arguments):
        self._m, self._p, self._t = C.c_void_p(), C.c_void_p(), C.c_void_p()
        _check(make(R(self._m), *arguments, _env))
        self.config = Config.from_address(_lib.moe_model_config(self._m))
        self.tasks, self._of = {}, []  # name: labels, or None where the answer is a number
        for i in range(_lib.moe_model_tasks(self._m)):
            t = Task.from_address(_lib.moe_model_task(self._m, i))
            labels = (C.c_char_p * t.classes).from_address(t.label) if t.classes > 1 else None
            self.tasks[t.name.decode()] = labels and [x.decode() for x in labels]
            self._of.append(t)
        self._width = _lib.moe_model_max_classes(self._m)
        self.weights, self.gradients = self._views(_lib.moe_model_weights(self._m)), {}

    @classmethod
    def load(cls, path):
        return cls(_lib.moe_model_load, os.fsencode(path))

    @classmethod
    def create(cls, config, tasks, seed=1, vocab=None):
        """config: fields of moe_config; tasks: {name: labels, or (low, high)}; vocab: bytes."""
        c, of, keep = Config(), (Task * len(tasks))(), []
        _lib.moe_config_init(R(c))
        _fill(c, {"vocab": len(vocab.splitlines()) if vocab else 0, **config})
        for t, (name, labels) in zip(of, tasks.items()):
            value = isinstance(labels, tuple)
            keep.append(None if value else _strings(labels))
            _fill(t, dict(name=name.encode(), kind=int(value), classes=1 if value else len(labels),
                          label=C.cast(keep[-1], C.c_void_p)))
            t.low, t.high = labels if value else (0, 0)
        self = cls(_lib.moe_model_create, R(c), of, len(of), C.c_uint64(seed))
        if vocab:
            _check(_lib.moe_model_set_vocab(self._m, vocab, C.c_size_t(len(vocab)), _env))
        return self

    def __del__(self):
        for what, of in (("predictor", self._p), ("tokenizer", self._t), ("model", self._m)):
            getattr(_lib, f"moe_{what}_free")(of)

    def _views(self, address):
        views, t, n = {}, Tensor(), _lib.moe_model_parameters(self._m)
        flat = address and np.ctypeslib.as_array((C.c_float * n).from_address(address))
        for i in range(_lib.moe_model_tensors(self._m) if address else 0):
            _check(_lib.moe_model_tensor(self._m, i, R(t)))
            views[t.name.decode()] = flat[t.offset:t.offset + t.count].reshape(t.shape[:t.dims])
        return views

    def pack(self):
        _check(_lib.moe_model_pack(self._m, None, _env))

    def save(self, path):
        _check(_lib.moe_model_save(self._m, os.fsencode(path), _env))

    def _task(self, task):
        if task not in self.tasks:
            raise KeyError(f"no task {task}, but {', '.join(self.tasks)}")
        return list(self.tasks).index(task)

    def _answers(self, task, rows):
        labels = self.tasks[task]
        if labels is None:
            return [float(row[0]) for row in rows]
        return [max(zip(labels, row.tolist()), key=lambda pair: pair[1]) for row in rows]

    def predict(self, task, texts):
        """(label, probability) for each text, or the number."""
        return self._answers(task, self._run(_lib.moe_predict_texts, (self._task(task),), texts,
                                             self._width, (None,)))

    def embed(self, texts, task=None):
        """The mean of the last layer's states of each text, with the gates of a task."""
        t = self._task(task) if task else 0
        return self._run(_lib.moe_predict_embed, (t, 0), texts, self.config.hidden)

    def _run(self, function, before, texts, width, behind=()):
        if not self._p:
            _check(_lib.moe_predictor_create(R(self._p), self._m, BATCH, _env))
        out = np.empty((len(texts), width), np.float32)
        for i in range(0, len(texts), BATCH):
            part = [x if isinstance(x, tuple) else (x,) for x in texts[i:i + BATCH]]
            if len({len(x) for x in part}) > 1:
                raise ValueError("either all inputs are pairs, or none")
            a, b = ([x[k] for x in part if k < len(x)] for k in (0, 1))
            _check(function(self._p, *before, _strings(a), _strings(b) if b else None, len(a),
                            C.c_void_p(out[i:].ctypes.data), *behind))
        return out

    def predict_features(self, task, inputs):
        """The same as predict for arrays (rows, feature_dim), a sequence of rows each."""
        b, scores = self._batch(self.batch(task, inputs)), np.empty((len(inputs), self._width), "f")
        limits, context = Limits(b.tokens, b.S), C.c_void_p()
        _check(_lib.moe_context_create(R(context), self._m, R(limits), _env))
        status = _lib.moe_forward(context, C.c_void_p(scores.ctypes.data), R(b), _env)
        _lib.moe_context_free(context)
        _check(status)
        if self.tasks[task]:
            scores = np.exp(scores - scores.max(1, keepdims=True))[:, :len(self.tasks[task])]
            scores /= scores.sum(1, keepdims=True)
        return self._answers(task, scores)

    def batch(self, task, inputs, labels=None):
        """For train, of one task: texts, or arrays (rows, feature_dim). A dict of arrays."""
        t, dim = self._task(task), self.config.feature_dim
        rows = [_array("an input", x, "f", -1, dim) if dim else self._encode(x, t) for x in inputs]
        b = {"task": [t] * len(rows), "features" if dim else "ids": np.concatenate(
            rows if dim else [ids for ids, _ in rows])}
        b["lengths"] = [len(x) if dim else len(x[0]) for x in rows]
        if not dim:
            b["segments"] = np.concatenate([segments for _, segments in rows])
        return b if labels is None else {**b, "label": labels}

    def _encode(self, text, task):
        if not self._t:
            n = C.c_size_t()
            vocab = C.c_void_p(_lib.moe_model_vocab(self._m, R(n)))
            _check(_lib.moe_tokenizer_create(R(self._t), vocab, n, self.config.cased, _env))
        a, b = ((*text, None) if isinstance(text, tuple) else (text, None))[:2]
        a, b, n = a.encode(), b and b.encode(), self._of[task].max_len or self.config.max_len
        ids, segments = np.empty(n, "i"), np.empty(n, np.uint8)
        t = Tokens(ids.ctypes.data, segments.ctypes.data, None, None, n, 0)
        pair = Text(C.cast(a, C.c_void_p), C.cast(b, C.c_void_p), len(a), len(b or b""))
        _check(_lib.moe_encode(self._t, R(t), R(pair), n, self.config.truncate, _env))
        return ids[:t.count], segments[:t.count]

    def _batch(self, b):
        lengths = _array("lengths", b["lengths"], "i", -1)
        S, M, s = len(lengths), int(lengths.sum()), Batch()
        of = dict(seq_start=("i", S + 1), ids=("i", M), segments=("B", M), task=("i", S),
                  label=("f", S), features=("f", M, self.config.feature_dim))
        for name, values in {**b, "seq_start": [0, *np.cumsum(lengths)]}.items():
            if name != "lengths" and name not in of:
                raise KeyError(f"a batch has no {name}, but lengths, {', '.join(of)}")
            if name != "lengths":
                a = _array(name, values, *of[name])
                setattr(s, name, a.ctypes.data), setattr(s, "_" + name, a)  # which keeps it alive
        s.S, s.tokens = S, M
        return s

    def train(self, batches, before_step=None, **config):
        """A step for each batch; config: fields of moe_train_config. before_step(model) may read
        and change model.gradients, views as model.weights. Returns the losses."""
        batches, c, trainer, losses = [self._batch(b) for b in batches], Train(), C.c_void_p(), []
        _lib.moe_train_config_init(R(c))
        _fill(c, {"steps": len(batches), **config})
        if not batches:
            return losses
        limits = Limits(max(b.tokens for b in batches), max(b.S for b in batches), 1)
        loss = C.c_float()
        _check(_lib.moe_trainer_create(R(trainer), self._m, R(limits), R(c), _env))
        self.gradients = self._views(_lib.moe_trainer_gradients(trainer))
        try:
            for b in batches:
                _check(_lib.moe_trainer_accumulate(trainer, R(b), 0, R(loss), None, _env))
                losses.append(loss.value)
                if before_step:
                    before_step(self)
                _check(_lib.moe_trainer_step(trainer, None, _env))
        finally:
            self.gradients = {}
            _lib.moe_trainer_free(trainer)
        return losses


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: moe.py MODEL TASK TEXT...")
    for answer in Model.load(sys.argv[1]).predict(sys.argv[2], sys.argv[3:]):
        print(*answer if isinstance(answer, tuple) else [answer])
