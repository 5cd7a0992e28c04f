/* convert.c - look into a model file, and make a smaller one of it
   cc -O3 -o convert examples/convert.c -lm -pthread
   ./convert IN                 what is in a file: configuration, tasks, tensors, bytes
   ./convert IN OUT --int8      a quarter of the bytes, for inference: matrices as integers of 8 bits
   ./convert IN OUT --task T [--drop-below SHARE --rows TSV]   one task alone; experts that got a smaller share of the tokens of
                                TSV (a train.tsv of the task) in every layer are left out; may go with --int8
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
  const char *in, *out, *task, *rows;
  double drop;
  int int8, tensors, threads;
  moe_isa isa;
} options;

static options parse(int argc, char **argv) {
  options o = {NULL, NULL, NULL, NULL, 0, 0, 0, 1, MOE_ISA_AUTO};
  int i;
  for (i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--int8")) o.int8 = 1;
    else if (!strcmp(argv[i], "--task") && i + 1 < argc) o.task = argv[++i];
    else if (!strcmp(argv[i], "--rows") && i + 1 < argc) o.rows = argv[++i];
    else if (!strcmp(argv[i], "--drop-below") && i + 1 < argc) o.drop = atof(argv[++i]);
    else if (!strcmp(argv[i], "--tensors")) o.tensors = 1;
    else if (!strcmp(argv[i], "--threads") && i + 1 < argc) o.threads = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--isa") && i + 1 < argc) o.isa = moe_isa_from_name(argv[++i]);
    else if (argv[i][0] == '-') die("unknown option %s, or a value is missing", argv[i]);
    else if (!o.in) o.in = argv[i];
    else if (!o.out) o.out = argv[i];
    else die("%s: a third file", argv[i]);
  }
  if (!o.in) die("usage: convert IN [OUT [--int8] [--task T [--drop-below SHARE --rows TSV]]] [--tensors] [--threads N] [--isa auto|avx512|avx2|neon|scalar]");
  if (o.out && !o.int8 && !o.task) die("what should become of %s? --int8 makes a smaller copy, --task takes one task", o.in);
  if (o.task && !o.out) die("--task wants a second file, to write to");
  if (o.drop < 0 || o.drop >= 1) die("--drop-below is a share from 0 to 1");
  if ((o.drop > 0) != (o.rows != NULL) || (o.rows && !o.task)) die("--task T --drop-below SHARE --rows TSV go together");
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

/* Where the tokens of a task's rows went: choices, and the sum of the probability of the chosen expert, (L, N) each. With `keep` (L, N) the
   probabilities are those of a softmax over the kept experts alone. */
static void count_rows(double *chosen, double *prob, const moe_model *model, int32_t task, char *text, const unsigned char *keep,
                       const moe_env *env) {
  const moe_config *c = moe_model_config(model);
  moe_limits limits = {c->max_len, 1, 0};
  moe_context *context;
  moe_tokenizer *tokenizer;
  moe_tokens tokens;
  moe_batch batch;
  int32_t start[2] = {0, 0}, span[4] = {0, 1, 0, 1}, l, i, a_at = -1, b_at = -1, line_number = 0;
  size_t bytes, vocab_bytes;
  const char *vocab = moe_model_vocab(model, &vocab_bytes);
  float *scores = (float *)malloc((size_t)moe_model_max_classes(model) * sizeof *scores);
  unsigned char *raw;
  if (!vocab) die("the model holds no vocabulary");
  if (moe_tokenizer_size(vocab, vocab_bytes, &bytes, env) || moe_context_create(&context, model, &limits, env)) exit(1);
  raw = (unsigned char *)malloc(bytes + 64);
  memset(&tokens, 0, sizeof tokens);
  tokens.capacity = c->max_len;
  tokens.ids = (int32_t *)malloc((size_t)c->max_len * sizeof *tokens.ids);
  tokens.segments = (uint8_t *)malloc((size_t)c->max_len);
  if (!raw || !scores || !tokens.ids || !tokens.segments) die("out of memory");
  if (moe_tokenizer_init(&tokenizer, raw + (64 - ((size_t)raw & 63)), bytes, vocab, vocab_bytes, c->cased, env)) exit(1);
  memset(&batch, 0, sizeof batch);
  batch.S = 1;
  batch.seq_start = start;
  batch.ids = tokens.ids;
  batch.segments = tokens.segments;
  batch.task = &task;
  batch.span = span; /* routes do not depend on it */
  for (; *text; ++line_number) {
    char *field[16], *end = text + strcspn(text, "\n"), *next = *end ? end + 1 : end;
    int fields = 0;
    *end = 0;
    for (; fields < 16; ++fields) {
      field[fields] = text;
      text += strcspn(text, "\t");
      if (!*text) { ++fields; break; }
      *text++ = 0;
    }
    text = next;
    for (i = 0; i < fields && !line_number; ++i) {
      if (!strcmp(field[i], "sentence1")) a_at = i;
      if (!strcmp(field[i], "sentence2") && moe_model_task(model, task)->pair) b_at = i;
    }
    if (a_at < 0) die("--rows: the first line names no column sentence1");
    if (!line_number || a_at >= fields || b_at >= fields) continue;
    if (moe_encode(tokenizer, field[a_at], strlen(field[a_at]), b_at >= 0 ? field[b_at] : NULL, b_at >= 0 ? strlen(field[b_at]) : 0,
                   c->max_len, c->truncate, &tokens, env))
      exit(1);
    start[1] = tokens.count;
    if (moe_forward(context, scores, &batch, env)) exit(1);
    for (l = 0; l < c->layers; ++l) {
      moe_routes r;
      if (moe_context_routes(context, l, &r)) exit(1);
      for (i = 0; i < r.M * r.k; ++i) {
        size_t at = (size_t)(l * r.N + r.expert[i]);
        double sum = keep ? 0 : 1;
        int32_t e;
        for (e = 0; keep && e < r.N; ++e) sum += keep[l * r.N + e] ? (double)r.prob[i / r.k * r.N + e] : 0;
        chosen[at] += 1;
        prob[at] += (double)r.prob[i / r.k * r.N + r.expert[i]] / sum;
      }
    }
  }
  free(raw);
  free(scores);
  free(tokens.ids);
  free(tokens.segments);
  moe_context_free(context);
}

/* The model with one task alone; --drop-below leaves experts out. */
static moe_model *take_task(const moe_model *model, const options *o, const moe_env *env) {
  const moe_config *c = moe_model_config(model);
  int32_t task = moe_model_find_task(model, o->task), L = c->layers, N = c->experts, most = c->top_k, l, e, j, *list;
  size_t cells = (size_t)L * (size_t)N, bytes;
  moe_extract_options extract;
  moe_model *out;
  double *chosen, *before, *again, *after;
  unsigned char *keep;
  float *factor;
  void *file, *copy;
  if (task < 0) die("%s has no task \"%s\"", o->in, o->task);
  if (!o->rows) {
    if (moe_model_extract(&out, model, &task, 1, NULL, env)) exit(1);
    return out;
  }
  if (c->router == MOE_ROUTER_DENSE || c->unit == MOE_UNIT_BLOCK) die("%s has no experts behind gates that could be left out", o->in);
  chosen = (double *)calloc(cells * 4, sizeof *chosen);
  before = chosen + cells;
  again = before + cells;
  after = again + cells;
  keep = (unsigned char *)calloc(cells, 1);
  factor = (float *)calloc(cells, sizeof *factor);
  list = (int32_t *)calloc(cells, sizeof *list);
  if (moe_file_read(&file, &bytes, o->rows, env)) exit(1);
  copy = malloc(bytes + 1);
  if (!chosen || !keep || !factor || !list || !copy) die("out of memory");
  memcpy(copy, file, bytes + 1);
  count_rows(chosen, before, model, task, (char *)file, NULL, env);
  for (l = 0; l < L; ++l) {
    double sum = 0;
    int32_t used = 0;
    for (e = 0; e < N; ++e) sum += chosen[l * N + e];
    for (e = 0; e < N; ++e) used += chosen[l * N + e] >= o->drop * sum && chosen[l * N + e] > 0;
    if (used > most) most = used;
  }
  for (l = 0; l < L; ++l) /* every layer keeps as many, the most used */
    for (j = 0; j < most; ++j) {
      int32_t best = -1;
      for (e = 0; e < N; ++e)
        if (!keep[l * N + e] && (best < 0 || chosen[l * N + e] > chosen[l * N + best])) best = e;
      keep[l * N + best] = 1;
    }
  count_rows(again, after, model, task, (char *)copy, keep, env);
  for (l = 0; l < L; ++l)
    for (e = j = 0; e < N; ++e) {
      double scale = c->gate_scale_n ? (double)N / most : 1;
      if (!keep[l * N + e]) continue;
      list[l * most + j] = e;
      factor[l * most + j++] = c->renormalize || !(after[l * N + e] > 0) ? 1.0f : (float)(scale * before[l * N + e] / after[l * N + e]);
    }
  extract.experts = most;
  extract.keep = list;
  extract.factor = factor;
  if (moe_model_extract(&out, model, &task, 1, &extract, env)) exit(1);
  printf("experts  %12d of %d in each layer are kept\n", (int)most, (int)N);
  moe_free(file);
  free(copy);
  free(chosen);
  free(keep);
  free(factor);
  free(list);
  return out;
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
  if (o.task) {
    moe_model *alone = take_task(model, &o, &env);
    moe_model_free(model);
    model = alone;
  }
  if (o.task && !o.int8) {
    if (moe_model_save(model, o.out, &env)) return 1;
    moe_model_free(model);
    model = load(o.out, &after, &env);
    print_model(model, after, o.tensors);
    printf("saved    %12.0f bytes of %.0f (%.1f %%); what it costs in scores: ./predict FILE TASK --score, for both\n", before - after, before,
           100 * (before - after) / before);
  } else if (o.int8) {
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
