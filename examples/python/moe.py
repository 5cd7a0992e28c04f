"""Copy moe.h and this file into one folder: the first import compiles moe.h with cc. Needs NumPy.

    from moe import Model
    model = Model.load("model.safetensors")
    model.tasks                                    {"topic": ["food", "travel"], "rating": None}
    model.predict("topic", ["soup", "a train"])    [("food", 0.98), ("travel", 0.97)]
    model.predict_features("fault", [x, y])        the same for arrays (rows, feature_dim)
    model.embed(["soup", "a train"])               an array, a row for each text
    model = Model.create({"layers": 2, "hidden": 64}, {"topic": ["food", "travel"]}, vocab=words)
    batch = [("topic", "soup", "food"), ("topic", "a train", "travel")]    task, input, label
    model.train([batch] * 100, lr=1e-3)            the losses
    model.weights["heads.topic.bias"]              NumPy views; model.pack() after changing them
    model.save("copy.safetensors")

A pair of texts is a tuple. MOE_THREADS: number of threads (1). MOE_LIBRARY: a library built before.
From the shell: python3 moe.py MODEL TASK TEXT..."""
import ctypes as C
import hashlib, os, re, shutil, subprocess, sys
import numpy as np

HERE, BATCH, VERSION = os.path.dirname(os.path.abspath(__file__)), 64, 200  # BATCH: inputs at once
KINDS = dict(i=C.c_int32, f=C.c_float, p=C.c_void_p, q=C.c_int64, z=C.c_size_t, s=C.c_char_p,
             n=C.c_char * 64, N=C.c_char * 128, d=C.c_int32 * 3)

def _struct(name, text):  # text: "i: a b f: c", a kind and its fields
    return type(name, (C.Structure,), {"_fields_": [
        (field, KINDS[kind]) for kind, fields in re.findall(r"(\w): ([^:]*)(?: |$)", text)
        for field in fields.split()]})

STRUCTS = Config, Task, Batch, Limits, Train, Tensor, Tokens, Text = [_struct(*s) for s in (
    ("moe_config", "i: layers hidden ffn heads vocab positions segments feature_dim f: eps "
     "i: router experts top_k gate_scale_n renormalize rank max_len truncate cased unit selection "
     "task_dim f: temperature p: pruned"),
    ("moe_task", "n: name i: kind pair classes f: low high n: metrics i: max_len p: label"),
    ("moe_batch", "i: S p: seq_start ids features segments task label span index weight"),
    ("moe_limits", "i: tokens sequences training keep_layers"),
    ("moe_train_config", "f: lr warmup q: steps p: lr_schedule lr_user f: beta1 beta2 eps "
     "weight_decay clip_norm dropout balance z_loss jitter tau_start tau_end tau_rate q: seed "
     "p: groups i: n_groups p: share ready ready_user"),
    ("moe_tensor", "N: name i: dims d: shape i: type z: offset count"),
    ("moe_tokens", "p: ids segments begin end i: capacity count"),
    ("moe_text", "s: a b z: a_bytes b_bytes"))]

def _need(true, error, sentence):
    if not true:
        raise error(sentence)

PATH = os.environ.get("MOE_LIBRARY")
if not PATH:  # built from this moe.h unless it is there already
    header = next(filter(os.path.exists, [f"{HERE}/moe.h", f"{HERE}/../../moe.h"]), None)
    _need(header, ImportError, f"there is no {HERE}/moe.h: copy it there")
    source = b"#define MOE_IMPLEMENTATION\n" + open(header, "rb").read()
    PATH = f"{HERE}/libmoe-{hashlib.sha256(source).hexdigest()[:12]}.so"
    if not os.path.exists(PATH):
        cc, new = os.environ.get("CC", "cc"), f"{PATH}.{os.getpid()}"
        _need(shutil.which(cc), ImportError, f"no C compiler {cc}: install gcc or clang, or set CC")
        done = subprocess.run([cc, *"-O2 -shared -fPIC -DMOE_SHARED -x c - -lm -pthread -o".split(),
                               new], input=source, stderr=subprocess.PIPE)
        _need(not done.returncode, ImportError,
              f"{cc} does not compile {header}:\n{done.stderr.decode(errors='replace')[:2000]}")
        os.replace(new, PATH)
_lib, _env, R, PTR, _said = C.CDLL(PATH), C.c_void_p(), C.byref, C.c_void_p, ["it gave no reason"]
_lib.moe_abi.restype = C.c_size_t
for _name, _here in ((None, VERSION), *((s.__name__.encode(), C.sizeof(s)) for s in STRUCTS)):
    _need(_lib.moe_abi(_name) == _here, ImportError, f"{PATH} is of another version: "
          f"{(_name or b'its number').decode()} is {_lib.moe_abi(_name)}, moe.py expects {_here}")
for _name in "parameters task config vocab weights".split():  # sizes and addresses
    getattr(_lib, "moe_model_" + _name).restype = C.c_size_t
_lib.moe_trainer_gradients.restype = C.c_size_t
_log = C.CFUNCTYPE(None, PTR, C.c_int, C.c_char_p)(
    lambda user, status, sentence: _said.append(sentence.decode(errors="replace")))

def _check(status):
    _need(not status, RuntimeError, _said[-1])

_check(_lib.moe_env_create(R(_env), 0, int(os.environ.get("MOE_THREADS", 1)), _log, None))

def _array(what, values, dtype, *shape):  # -1: any; floats never become whole numbers silently
    a = np.asarray(values)
    _need(np.can_cast(a.dtype, dtype, "same_kind"), TypeError,
          f"{what} is {a.dtype}, expected {np.dtype(dtype)}")
    _need(a.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, a.shape)), ValueError,
          f"{what} has shape {a.shape}, expected {shape} (-1: any)")
    return np.ascontiguousarray(a, dtype)

def _index(what, name, names):
    _need(names and name in names, KeyError, f"no {what} {name} in {list(names or [])}")
    return list(names).index(name)

def _init(struct, init, **values):
    init(R(struct))
    for name, value in values.items():
        _need(hasattr(struct, name), TypeError, f"{type(struct).__name__} has no field {name}")
        setattr(struct, name, value)
    return struct

def _strings(texts):
    for x in texts:
        _need(isinstance(x, str), TypeError, f"{x!r:.40} is {type(x).__name__}, expected str")
    return (C.c_char_p * len(texts))(*(x.replace("\0", "").encode() for x in texts))

def _pairs(texts):  # a and b of moe_predict_texts
    texts = [x if isinstance(x, tuple) else (x,) for x in texts]
    _need({*map(len, texts)} in ({1}, {2}), ValueError, "either all inputs are pairs, or none")
    return [*map(_strings, zip(*texts)), None][:2]

class _Handle(PTR):  # owns an object of the library: freed with its last user, views too
    def __init__(self, kind, *needs):  # needs: handles that must outlive it
        self.needs, self.free = needs, getattr(_lib, f"moe_{kind}_free")

    def __del__(self):
        self.free(self)

class Model:
    def __init__(self, make, *arguments):
        self._m = _Handle("model")
        _check(make(R(self._m), *arguments, _env))
        self._p, self._t = _Handle("predictor", self._m), _Handle("tokenizer", self._m)
        self.config = Config.from_address(_lib.moe_model_config(self._m))
        self.config.handle = self._m
        self._of = [Task.from_address(_lib.moe_model_task(self._m, i))
                    for i in range(_lib.moe_model_tasks(self._m))]
        self.tasks = {t.name.decode(): t.label and [x.decode() for x in (
            C.c_char_p * t.classes).from_address(t.label)] for t in self._of}  # None: a number
        self.weights, self.gradients = self._views(_lib.moe_model_weights(self._m), self._m), {}

    @classmethod
    def load(cls, path):
        return cls(_lib.moe_model_load, os.fsencode(path))

    @classmethod
    def create(cls, config, tasks, seed=1, vocab=None):
        """config: fields of moe_config; tasks: {name: labels, or (low, high)}; vocab: bytes."""
        of, labels_of = (Task * len(tasks))(), []
        config = {"vocab": len(vocab.splitlines()) if vocab else 0, **config}
        c = _init(Config(), _lib.moe_config_init, **config)
        for t, (name, labels) in zip(of, tasks.items()):
            if isinstance(labels, tuple):
                t.kind, t.classes, (t.low, t.high) = 1, 1, labels
            else:
                labels_of.append(_strings(labels))
                t.classes, t.label = len(labels), C.addressof(labels_of[-1])
            t.name = _strings([name])[0]
        self = cls(_lib.moe_model_create, R(c), of, len(of), C.c_uint64(seed))
        if vocab:
            _check(_lib.moe_model_set_vocab(self._m, vocab, C.c_size_t(len(vocab)), _env))
        return self

    def _views(self, address, handle):  # they keep the handle alive
        views, t = {}, Tensor()
        if address:
            floats = (C.c_float * _lib.moe_model_parameters(self._m)).from_address(address)
            floats.handle, flat = handle, np.ctypeslib.as_array(floats)
        for i in range(_lib.moe_model_tensors(self._m) if address else 0):
            _check(_lib.moe_model_tensor(self._m, i, R(t)))
            views[t.name.decode()] = flat[t.offset:t.offset + t.count].reshape(t.shape[:t.dims])
        return views

    def pack(self):
        _check(_lib.moe_model_pack(self._m, None, _env))

    def save(self, path):
        _check(_lib.moe_model_save(self._m, os.fsencode(path), _env))

    def _features(self, inputs):  # the rows of all inputs, and how many each has
        rows = [_array("an input", x, "f", -1, self.config.feature_dim) for x in inputs]
        return np.concatenate(rows), np.array([len(x) for x in rows], "i")

    def _run(self, inputs, width, ask):  # ask(some inputs, where their rows go), all in turn
        _need(not isinstance(inputs, str), TypeError, "expected a list of inputs, not one text")
        if not self._p:
            _check(_lib.moe_predictor_create(R(self._p), self._m, BATCH, _env))
        out = np.empty((len(inputs), width), "f")
        for i in range(0, len(inputs), BATCH):
            _check(ask(inputs[i:i + BATCH], out[i:].ctypes))
        return out

    def predict(self, task, inputs):
        """(label, probability) for each text, or array (rows, feature_dim); or the number."""
        t, labels = _index("task", task, self.tasks), self.tasks[task]
        def ask(some, out):
            if not self.config.feature_dim:
                return _lib.moe_predict_texts(self._p, t, *_pairs(some), len(some), out, None)
            x, n = self._features(some)
            return _lib.moe_predict_features(self._p, t, x.ctypes, n.ctypes, len(n), out, None)
        rows = self._run(inputs, _lib.moe_model_max_classes(self._m), ask)
        return [(labels[y.argmax()], float(y.max())) if labels else float(y[0]) for y in rows]
    predict_features = predict

    def embed(self, texts, task=None):
        """The mean of the last layer's states of each text, with the gates of a task."""
        t = _index("task", task, self.tasks) if task else 0
        return self._run(texts, self.config.hidden, lambda some, out: _lib.moe_predict_embed(
            self._p, t, 0, *_pairs(some), len(some), out))

    def tokens(self, text, task):
        """The ids and segments of a text or a pair, as a task reads them."""
        if not self._t:
            n = C.c_size_t()
            vocab = PTR(_lib.moe_model_vocab(self._m, R(n)))
            _check(_lib.moe_tokenizer_create(R(self._t), vocab, n, self.config.cased, _env))
        n = self._of[_index("task", task, self.tasks)].max_len or self.config.max_len
        (a, b), ids, segments = _pairs([text]), np.empty(n, "i"), np.empty(n, "B")
        t = Tokens(ids.ctypes.data, segments.ctypes.data, None, None, n)
        pair = Text(a[0], b and b[0], len(a[0]), len(b[0]) if b else 0)
        _check(_lib.moe_encode(self._t, R(t), R(pair), n, self.config.truncate, _env))
        return ids[:t.count], segments[:t.count]

    def _batch(self, rows):
        _need(rows and all(isinstance(row, (tuple, list)) and len(row) == 3 for row in rows),
              ValueError, "a batch is a list of (task, input, label), one or more")
        tasks, inputs, _ = zip(*rows)
        of = {"task": np.array([_index("task", t, self.tasks) for t in tasks], "i")}
        ys = [_index("label", y, self.tasks[t]) if isinstance(y, str) else y for t, _, y in rows]
        of["label"] = _array("labels", ys, "f", -1)
        if self.config.feature_dim:
            of["features"], n = self._features(inputs)
        else:
            ids, segments = zip(*map(self.tokens, inputs, tasks))
            of.update(ids=np.concatenate(ids), segments=np.concatenate(segments))
            n = [len(x) for x in ids]
        of["seq_start"] = np.cumsum([0, *n], dtype="i")
        s = Batch(len(rows), **{name: a.ctypes.data for name, a in of.items()})
        s.arrays, s.tokens = of, sum(n)  # which keeps the arrays alive
        return s

    def train(self, batches, before_step=None, **config):
        """A step for each batch, a list of (task, input, label); returns the losses. config: fields
        of moe_train_config. before_step(model) may change model.gradients, views like weights."""
        trainer, loss, losses = _Handle("trainer", self._m), C.c_float(), []
        made = {id(b): self._batch(b) for b in batches}
        c = _init(Train(), _lib.moe_train_config_init, **{"steps": len(batches), **config})
        limits = Limits(*np.max([(1, 1), *((b.tokens, b.S) for b in made.values())], 0).tolist(), 1)
        _check(_lib.moe_trainer_create(R(trainer), self._m, R(limits), R(c), _env))
        self.gradients = self._views(_lib.moe_trainer_gradients(trainer), trainer)
        try:
            for b in batches:
                _check(_lib.moe_trainer_accumulate(trainer, R(made[id(b)]), 0, R(loss), None, _env))
                losses.append(loss.value)
                if before_step:
                    before_step(self)
                _check(_lib.moe_trainer_step(trainer, None, _env))
        finally:
            self.gradients = {}
        return losses

if __name__ == "__main__":
    _need(len(sys.argv) > 3, SystemExit, "usage: moe.py MODEL TASK TEXT...")
    for answer in Model.load(sys.argv[1]).predict(sys.argv[2], sys.argv[3:]):
        print(*answer if isinstance(answer, tuple) else [answer])
