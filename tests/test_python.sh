#!/bin/sh
# Python's safetensors opens a model file, and what it saves (tensors sorted by name) is a model of
# the same bits. MOE_PYTHON: the python to take; it needs the packages safetensors and numpy.
. ./lib.sh
python=${MOE_PYTHON:-python3}
if ! "$python" -c 'import safetensors, numpy' 2>/dev/null; then
  skip test_python_opens_a_model "$python with the packages safetensors and numpy is not here"
  skip test_python_saves_a_model_anew "$python with the packages safetensors and numpy is not here"
  finish
fi
cat > "$tmp/make.c" <<'END'
#include <stdio.h>
#include <string.h>
#define MOE_IMPLEMENTATION
#include "moe.h"
static void show(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  printf("%s\n", sentence);
}
int main(int argc, char **argv) { /* make FILE; or make FILE ANEW: are they the same? */
  static const char *const label[] = {"\"yes\"", "n\\o\n", "\xc3\xa9\xff"};
  moe_env env;
  moe_config config;
  moe_task task[2];
  moe_model *a, *b;
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = show;
  moe_config_init(&config);
  config.layers = 12, config.hidden = 8, config.ffn = 12, config.heads = 2, config.vocab = 5;
  config.positions = config.max_len = 16, config.experts = 11;
  memset(task, 0, sizeof task);
  strcpy(task[0].name, "ask"), task[0].classes = 3, task[0].label = label;
  strcpy(task[1].name, "rate"), task[1].kind = MOE_KIND_REGRESSION, task[1].classes = 1;
  task[1].low = -0.1f, task[1].high = 1;
  if (moe_model_create(&a, &config, task, 2, 1, &env) ||
      moe_model_set_vocab(a, "[UNK]\n[CLS]\n[SEP]\na\nb", 21, &env))
    return 1;
  if (argc == 2) return moe_model_save(a, argv[1], &env) != MOE_OK;
  if (moe_model_load(&b, argv[2], &env)) return 1;
  if (memcmp(moe_model_weights(a), moe_model_weights(b), moe_model_parameters(a) * sizeof(float)))
    return printf("weights differ\n"), 1;
  if (memcmp(moe_model_vocab(a, NULL), moe_model_vocab(b, NULL), 21))
    return printf("vocabularies differ\n"), 1;
  if (strcmp(moe_model_task(b, 0)->label[2], label[2])) return printf("labels differ\n"), 1;
  return 0;
}
END
if ! ${CC:-cc} -std=c99 -D_POSIX_C_SOURCE=200809L -O1 -I.. -o "$tmp/make" \
    "$tmp/make.c" -lm -pthread || ! "$tmp/make" "$tmp/model"; then
  fail test_python_opens_a_model "there is no model"
  finish
fi
cat > "$tmp/open.py" <<'END'
import json, sys
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
with safe_open(sys.argv[1], framework="numpy") as f:
    about = f.metadata()
    assert about["format"] == "pt" and about["moe.version"] == "1", about
    config, tasks = json.loads(about["moe.config"]), json.loads(about["moe.tasks"])
    assert config["layers"] == 12 and config["eps"] == 1e-12 and config["router"] == "task", config
    assert [t["name"] for t in tasks] == ["ask", "rate"], tasks
    assert tasks[0]["labels"][:2] == ['"yes"', "n\\o\n"], tasks
    assert tasks[1]["low"] == -0.1 and tasks[1]["kind"] == "regression", tasks
    assert f.get_tensor("embeddings.word_embeddings.weight").shape == (5, 8)
    assert f.get_tensor("encoder.layer.11.experts.10.output.dense.weight").shape == (8, 12)
    assert f.get_tensor("encoder.layer.0.gate.rate.weight").shape == (11, 8)
    assert f.get_tensor("heads.ask.bias").shape == (3,)
    assert bytes(f.get_tensor("tokenizer.vocab")) == b"[UNK]\n[CLS]\n[SEP]\na\nb"
    tensors = {name: f.get_tensor(name) for name in f.keys()}
assert len(tensors) == 5 + 12 * (12 + 2 + 4 * 11) + 4 + 1, len(tensors)
save_file(tensors, sys.argv[2], metadata=about)
END
if "$python" "$tmp/open.py" "$tmp/model" "$tmp/anew" 2> "$tmp/log"; then
  ok test_python_opens_a_model
else
  fail test_python_opens_a_model "$(tail -n 3 "$tmp/log")"
fi
if "$tmp/make" "$tmp/model" "$tmp/anew" > "$tmp/log"; then ok test_python_saves_a_model_anew
else fail test_python_saves_a_model_anew "$(cat "$tmp/log")"; fi
finish
