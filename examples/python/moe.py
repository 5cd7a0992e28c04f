"""Copy moe.h and this file into one folder: the first import compiles moe.h with cc. No packages.

    from moe import Model
    model = Model.load("model.safetensors")
    model.tasks                                    {"topic": ["food", "travel"], "rating": None}
    model.predict("topic", ["soup", "a train"])    [("food", 0.98), ("travel", 0.97)]
    model.predict("rating", ["a fine film"])       [4.2]
    model.embed(["soup", "a train"])               a list of numbers for each text
    model.save("copy.safetensors")

A pair of texts is a tuple. A model of feature inputs takes, for a text, a list of rows of numbers.
MOE_THREADS: number of threads (1). From the shell: python3 moe.py MODEL TASK TEXT..."""
import ctypes as C
import hashlib
import itertools
import os
import shutil
import subprocess
import sys

HERE, BATCH = os.path.dirname(os.path.abspath(__file__)), 64  # BATCH: texts at once
GLUE = r"""/* what Python need not know of the structs of moe.h */
moe_env *py_env(int threads, void (*log)(void *, moe_status, const char *)) {
  static moe_env env; /* for all models */
  moe_pool *pool;
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = log;
  if (threads > 1) moe_pool_create(&pool, threads, &env);
  return &env;
}
const char *py_task(const moe_model *m, int t) { return moe_model_task(m, t)->name; }
const char *py_label(const moe_model *m, int t, int c) { return moe_model_task(m, t)->label[c]; }
int py_classes(const moe_model *m, int t) { return moe_model_task(m, t)->classes; } /* value: 1 */
int py_hidden(const moe_model *m) { return moe_model_config(m)->hidden; }
int py_feature_dim(const moe_model *m) { return moe_model_config(m)->feature_dim; }
int py_forward(const moe_model *m, const int *task, int S, const int *start, const float *features,
               float *scores, const moe_env *env) {
  moe_limits limits = {start[S], S, 0, 0};
  moe_batch batch = {S, start, NULL, features, NULL, task, NULL, NULL, NULL};
  moe_context *context;
  moe_status status = moe_context_create(&context, m, &limits, env);
  int s, C = py_classes(m, task[0]);
  if (status) return status;
  status = moe_forward(context, scores, &batch, env);
  for (s = 0; s < S && C > 1; ++s, scores += moe_model_max_classes(m))
    moe_cross_entropy_forward(scores, scores, 0, C); /* softmax */
  moe_context_free(context);
  return status;
}
"""


def _library():
    header = next(filter(os.path.exists, [f"{HERE}/moe.h", f"{HERE}/../../moe.h"]), None)
    if not header:
        raise ImportError(f"there is no {HERE}/moe.h: copy it there")
    with open(header, "rb") as f:
        source = b"#define MOE_IMPLEMENTATION\n" + f.read() + GLUE.encode()
    path = f"{HERE}/libmoe-{hashlib.sha256(source).hexdigest()[:12]}.so"
    if not os.path.exists(path):
        cc, new = os.environ.get("CC", "cc"), f"{path}.{os.getpid()}"
        if not shutil.which(cc):
            raise ImportError(f"there is no C compiler {cc}: install gcc or clang, or set CC")
        done = subprocess.run([cc, "-O2", "-shared", "-fPIC", "-o", new, "-x", "c", "-", "-lm",
                               "-pthread"], input=source, stderr=subprocess.PIPE)
        if done.returncode:
            raise ImportError(f"{cc} does not compile {header}:\n{done.stderr.decode()[:2000]}")
        os.replace(new, path)
    return C.CDLL(path)


_said = []  # sentences of the library
_log = C.CFUNCTYPE(None, C.c_void_p, C.c_int, C.c_char_p)(
    lambda user, status, sentence: _said.append(sentence.decode(errors="replace")))
_lib = _library()
_lib.py_env.restype = C.c_void_p
_lib.py_task.restype = _lib.py_label.restype = C.c_char_p
_env = C.c_void_p(_lib.py_env(int(os.environ.get("MOE_THREADS", 1)), _log))


def _check(status):
    if status:
        raise RuntimeError(_said[-1])


class Model:
    @classmethod
    def load(cls, path):
        self = cls()
        self._m, self._predictor = C.c_void_p(), C.c_void_p()
        _check(_lib.moe_model_load(C.byref(self._m), os.fsencode(path), _env))
        self.tasks = {}  # name: labels, or None where the answer is a number
        for t in range(_lib.moe_model_tasks(self._m)):
            n = _lib.py_classes(self._m, t)
            labels = [_lib.py_label(self._m, t, c).decode() for c in range(n)] if n > 1 else None
            self.tasks[_lib.py_task(self._m, t).decode()] = labels
        return self

    def __del__(self):
        _lib.moe_predictor_free(self._predictor)
        _lib.moe_model_free(self._m)

    def save(self, path):
        _check(_lib.moe_model_save(self._m, os.fsencode(path), _env))

    def predict(self, task, inputs):
        """(label, probability) for each input, or the number."""
        t, labels = list(self.tasks).index(task), self.tasks[task]
        width = _lib.moe_model_max_classes(self._m)
        rows = (self._forward(t, inputs, width) if _lib.py_feature_dim(self._m) else
                self._run(_lib.moe_predict_texts, (t,), inputs, width, (None,)))
        if labels is None:
            return [row[0] for row in rows]
        return [max(zip(labels, row), key=lambda pair: pair[1]) for row in rows]

    def embed(self, texts, task=None):
        """The mean of the last layer's states of each text, with the gates of a task."""
        t = list(self.tasks).index(task) if task else 0
        return self._run(_lib.moe_predict_embed, (t, 0), texts, _lib.py_hidden(self._m))

    def _run(self, function, before, texts, width, behind=()):
        if not self._predictor:
            _check(_lib.moe_predictor_create(C.byref(self._predictor), self._m, BATCH, _env))
        rows, out = [], (C.c_float * (BATCH * width))()
        for i in range(0, len(texts), BATCH):
            part = [x if isinstance(x, tuple) else (x,) for x in texts[i:i + BATCH]]
            a, b = ([x[k].encode() for x in part if k < len(x)] for k in (0, 1))
            if len(b) not in (0, len(a)):
                raise ValueError("either all inputs are pairs, or none")
            _check(function(self._predictor, *before, (C.c_char_p * len(a))(*a),
                            (C.c_char_p * len(b))(*b) if b else None, len(a), out, *behind))
            rows += [out[j * width:(j + 1) * width] for j in range(len(a))]
        return rows

    def _forward(self, t, inputs, width):
        n, start = len(inputs), [0, *itertools.accumulate(map(len, inputs))]
        numbers = [x for rows in inputs for row in rows for x in row]
        if len(numbers) != start[-1] * _lib.py_feature_dim(self._m):
            raise ValueError(f"a row should have {_lib.py_feature_dim(self._m)} numbers")
        scores = (C.c_float * (n * width))()
        _check(_lib.py_forward(self._m, (C.c_int32 * n)(*[t] * n), n, (C.c_int32 * (n + 1))(*start),
                               (C.c_float * len(numbers))(*numbers), scores, _env))
        return [scores[i * width:(i + 1) * width] for i in range(n)]


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: moe.py MODEL TASK TEXT...")
    for answer in Model.load(sys.argv[1]).predict(sys.argv[2], sys.argv[3:]):
        print(*answer if isinstance(answer, tuple) else [answer])
