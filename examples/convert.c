/* convert.c - look into a model file, and make a smaller one of it
   cc -O3 -o convert examples/convert.c -lm -pthread
   ./convert IN                 what is in a file: configuration, tasks, tensors, bytes
   ./convert IN OUT --int8      a quarter of the bytes, for inference: matrices as integers of 8 bits
   ./predict takes the result as it takes any model. Options: --tensors lists every tensor, --threads N, --isa NAME. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define MOE_IMPLEMENTATION
#include "../moe.h"

static void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "convert: ");
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(1);
}

static void show(void *user, moe_status status, const char *sentence) {
  (void)user;
  (void)status;
  fprintf(stderr, "convert: %s\n", sentence);
}

typedef struct options {
  const char *in, *out;
  int int8, tensors, threads;
  moe_isa isa;
} options;

static options parse(int argc, char **argv) {
  options o = {NULL, NULL, 0, 0, 1, MOE_ISA_AUTO};
  int i;
  for (i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--int8")) o.int8 = 1;
    else if (!strcmp(argv[i], "--tensors")) o.tensors = 1;
    else if (!strcmp(argv[i], "--threads") && i + 1 < argc) o.threads = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--isa") && i + 1 < argc) o.isa = moe_isa_from_name(argv[++i]);
    else if (argv[i][0] == '-') die("unknown option %s, or a value is missing", argv[i]);
    else if (!o.in) o.in = argv[i];
    else if (!o.out) o.out = argv[i];
    else die("%s: a third file", argv[i]);
  }
  if (!o.in) die("usage: convert IN [OUT --int8] [--tensors] [--threads N] [--isa auto|avx512|avx2|neon|scalar]");
  if (o.out && !o.int8) die("what should become of %s? --int8 makes a smaller copy", o.in);
  if (o.int8 && !o.out) die("--int8 wants a second file, to write to");
  if (o.out && !strcmp(o.in, o.out)) die("the model would be replaced by its copy: give OUT another name");
  if (o.threads < 1 || o.threads > 256) die("--threads must be 1 to 256");
  return o;
}

/* Bytes of the tensors of a type, and how many there are. */
static double tensor_bytes(const moe_model *model, moe_type type, int *count) {
  double bytes = 0;
  int32_t i;
  *count = 0;
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    moe_model_tensor(model, i, &t);
    if (t.type != type) continue;
    bytes += (double)t.count * (type == MOE_TYPE_I8 ? 1 : 4);
    ++*count;
  }
  return bytes;
}

static void print_tasks(const moe_model *model) {
  static const char *const kind[] = {"classification", "regression", "ranking", "span"};
  int32_t t, i;
  printf("tasks %d\n", (int)moe_model_tasks(model));
  for (t = 0; t < moe_model_tasks(model); ++t) {
    const moe_task *task = moe_model_task(model, t);
    printf("  %-24s %s of %s", task->name, kind[task->kind], task->pair ? "two texts" : "one text");
    if (task->kind == MOE_KIND_REGRESSION) printf(", %g to %g", (double)task->low, (double)task->high);
    else {
      printf(", %d classes:", (int)task->classes);
      for (i = 0; i < task->classes && i < 8; ++i) printf(" %s", task->label[i]);
      if (i < task->classes) printf(" ...");
    }
    if (task->max_len) printf(", at most %d tokens", (int)task->max_len);
    printf("\n");
  }
}

static void print_model(const moe_model *model, double file_bytes, int tensors) {
  static const char *const router[] = {"dense", "a gate for all tasks", "a gate for each task", "tasks choose blocks", "gates of task vectors"};
  const moe_config *c = moe_model_config(model);
  size_t vocab = 0;
  int floats, integers;
  double float_bytes = tensor_bytes(model, MOE_TYPE_F32, &floats), int_bytes = tensor_bytes(model, MOE_TYPE_I8, &integers);
  int32_t i;
  int k;
  moe_model_vocab(model, &vocab);
  printf("layers %d, hidden %d, ffn %d, heads %d, eps %g\n", (int)c->layers, (int)c->hidden, (int)c->ffn, (int)c->heads, (double)c->eps);
  if (c->features) printf("features %d", (int)c->features);
  else printf("vocab %d (%s)", (int)c->vocab, c->cased ? "cased" : "uncased");
  printf(", positions %d, segments %d, inputs of at most %d tokens, cut %s\n", (int)c->positions, (int)c->segments, (int)c->max_len,
         c->truncate == MOE_TRUNCATE_LONGEST ? "at the longer text" : "on the right");
  printf("router: %s, %s %d, top-k %d%s%s\n", router[c->router], c->unit == MOE_UNIT_BLOCK ? "blocks" : "experts", (int)c->experts, (int)c->top_k, c->gate_scale_n ? ", gate scale N/k" : "",
         c->renormalize ? ", renormalised" : "");
  print_tasks(model);
  printf("parameters %lu\n", (unsigned long)moe_model_parameters(model));
  printf("floats   %12.0f bytes in %d tensors\n", float_bytes, floats);
  if (integers) printf("int8     %12.0f bytes in %d tensors\n", int_bytes, integers);
  printf("words    %12.0f bytes of vocabulary\n", (double)vocab);
  printf("file     %12.0f bytes\n", file_bytes);
  for (i = 0; tensors && i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    moe_model_tensor(model, i, &t);
    printf("  %s %s (", t.type == MOE_TYPE_I8 ? "I8 " : "F32", t.name);
    for (k = 0; k < t.dims; ++k) printf(k ? ", %d" : "%d", (int)t.shape[k]);
    printf(")\n");
  }
}

/* Norm of what quantisation adds to the matrices, relative to theirs; the library did the same to them. */
static double weight_error(moe_model *model, const moe_model *small, const moe_env *env) {
  double error = 0, norm = 0;
  int32_t i, j, k;
  for (i = 0; i < moe_model_tensors(small); ++i) {
    moe_tensor t, from;
    const float *w;
    int8_t *q;
    float *scale;
    moe_model_tensor(small, i, &t);
    if (t.type != MOE_TYPE_I8) continue;
    moe_model_tensor(model, moe_model_find_tensor(model, t.name), &from);
    w = moe_model_weights(model) + from.offset;
    q = (int8_t *)malloc(t.count);
    scale = (float *)malloc((size_t)t.shape[0] * sizeof *scale);
    if (!q || !scale) die("out of memory");
    moe_quantize(q, scale, w, t.shape[0], t.shape[1], env);
    for (j = 0; j < t.shape[0]; ++j)
      for (k = 0; k < t.shape[1]; ++k) {
        size_t at = (size_t)j * (size_t)t.shape[1] + (size_t)k;
        double d = (double)scale[j] * q[at] - (double)w[at];
        error += d * d;
        norm += (double)w[at] * (double)w[at];
      }
    free(q);
    free(scale);
  }
  return norm > 0 ? sqrt(error / norm) : 0;
}

static moe_model *load(const char *path, double *bytes, const moe_env *env) {
  moe_model *model;
  void *file;
  size_t size;
  if (moe_file_read(&file, &size, path, env) || moe_model_read(&model, file, size, env)) exit(1);
  moe_free(file);
  *bytes = (double)size;
  return model;
}

int main(int argc, char **argv) {
  options o = parse(argc, argv);
  moe_env env;
  moe_pool *pool = NULL;
  moe_model *model;
  double before, after, error;
  if (o.isa == MOE_ISA_COUNT || moe_env_init(&env, o.isa)) die("this machine has no instruction set of that name");
  env.log = show;
  if (o.threads > 1 && moe_pool_create(&pool, o.threads, &env)) return 1;
  model = load(o.in, &before, &env);
  if (o.int8) {
    moe_model *small;
    if (moe_model_quantize(&small, model, &env)) return 1;
    error = weight_error(model, small, &env);
    moe_model_free(model);
    if (moe_model_save(small, o.out, &env)) return 1;
    moe_model_free(small);
    model = load(o.out, &after, &env); /* what is printed is what stands in the file */
    print_model(model, after, o.tensors);
    printf("error    %12.5f of the norm of the matrices; what it costs in scores: ./predict FILE TASK --score, for both\n", error);
    printf("saved    %12.0f bytes of %.0f (%.1f %%)\n", before - after, before, 100 * (before - after) / before);
  } else print_model(model, before, o.tensors);
  moe_model_free(model);
  moe_pool_free(pool);
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
  return 0;
}
