/* convert.c - looks into a model file, and makes a smaller one of it
     cc -O3 -o convert examples/tools/convert.c -lm -pthread
     ./convert IN                          what is in a file
     ./convert IN OUT --int8               a quarter of the bytes, for inference
     ./convert IN OUT --task T [--rows train.tsv [--drop-below SHARE]]      one task alone
     ./convert IN --c-array NAME [--int8] > model.h      constants of a C program, for a device
     ./convert IN --hf DIR                 a folder that transformers opens */
#define MOE_IMPLEMENTATION
#include "score.h"
#include "carray.h"
#include "folder.h"

static struct {
  const char *in, *out, *task, *rows, *score, *c_array, *hf, *mttag;
  double drop;
  int int8, tensors, tokens, sequences;
} opt;

static const option convert_options[] = {
    PLACE("IN", opt.in, "a trained model"),
    PLACE("OUT", opt.out, "the model to be written"),
    FLAG("--int8", opt.int8, "matrices as integers of 8 bits: a quarter of the bytes"),
    STRING("--task", "T", opt.task, NULL, "this task alone"),
    STRING("--rows", "TSV", opt.rows, NULL,
           "without the experts that none of this file's tokens goes to (train.tsv, say)"),
    REAL("--drop-below", "SHARE", opt.drop, 0, 1, "0",
         "or fewer than this share of them, from 0 to 1"),
    STRING("--score", "TSV", opt.score, NULL, "the task's metrics before and after (dev.tsv, say)"),
    FLAG("--tensors", opt.tensors, "list every tensor"),
    STRING("--c-array", "NAME", opt.c_array, NULL, "write constants of a C program to stdout"),
    WHOLE("--tokens", opt.tokens, 0, 1 << 20, "0", "of its context; 0: the longest input"),
    WHOLE("--sequences", opt.sequences, 1, 1 << 20, "1", "of its context"),
    STRING("--hf", "DIR", opt.hf, NULL,
           "write a folder that transformers opens: a dense model as BERT, another with mttag.py"),
    STRING("--mttag", "FILE", opt.mttag, "examples/python/mttag.py",
           "what --hf copies into the folder"),
    END_OF_OPTIONS};
static const option *const all_options[] = {convert_options, machine_options, NULL};

static void check_options(void) {
  if (!opt.in) die("usage: convert IN [OUT] [options]; --help lists the options");
  if (opt.out && opt.hf) die("--hf writes the model of IN as it is: without OUT");
  if (opt.out && opt.c_array) die("--c-array writes to stdout: no OUT");
  if (opt.out && !opt.int8 && !opt.task)
    die("what should become of %s? --int8 makes a smaller copy, --task takes one task", opt.in);
  if (!opt.out && !opt.c_array && (opt.task || opt.int8)) die("give a second file, to write to");
  if (opt.drop > 0 && !opt.rows) die("--drop-below needs --rows TSV, whose tokens are counted");
  if ((opt.rows || opt.score) && !opt.task) die("--rows and --score are of one task: give --task");
  if (opt.out && !strcmp(opt.in, opt.out))
    die("the model would be replaced by its copy: give OUT another name");
}

static moe_model *load(const char *path, double *bytes) {
  moe_model *model;
  void *file;
  size_t n;
  need(moe_file_read(&file, &n, path, &env));
  read_from(path, 0);
  need(moe_model_read(&model, file, n, &env));
  read_from(NULL, 0);
  moe_free(file);
  *bytes = (double)n;
  return model;
}

/* ---- what is in a file ---- */

static void print_tasks(const moe_model *model) {
  int32_t t, i;
  printf("tasks %d\n", (int)moe_model_tasks(model));
  for (t = 0; t < moe_model_tasks(model); ++t) {
    const moe_task *task = moe_model_task(model, t);
    printf("  %-24s %s of %s", task->name, moe_kind_name(task->kind),
           task->pair ? "two texts" : "one text");
    if (!task->label) printf(", %g to %g", (double)task->low, (double)task->high);
    if (task->label) printf(", %d classes:", (int)task->classes);
    for (i = 0; task->label && i < task->classes && i < 8; ++i) printf(" %s", task->label[i]);
    printf("%s", i < task->classes && task->label ? " ..." : "");
    if (task->max_len) printf(", at most %d tokens", (int)task->max_len);
    printf("\n");
  }
}

/* Bytes and number of the tensors of a type, which are listed with --tensors. */
static double tensor_bytes(const moe_model *model, moe_type type, int *count, int list_them) {
  double bytes = 0;
  int32_t i, k;
  moe_tensor t;
  for (*count = i = 0; i < moe_model_tensors(model); ++i) {
    moe_model_tensor(model, i, &t);
    if (t.type != type) continue;
    bytes += (double)t.count * (type == MOE_TYPE_I8 ? 1 : 4);
    ++*count;
    if (!list_them) continue;
    printf("  %s %s (", type == MOE_TYPE_I8 ? "I8 " : "F32", t.name);
    for (k = 0; k < t.dims; ++k) printf(k ? ", %d" : "%d", (int)t.shape[k]);
    printf(")\n");
  }
  return bytes;
}

static void print_model(const moe_model *model, double file_bytes) {
  static const char *const routers[] = {"dense", "a gate for all tasks", "a gate for each task",
                                        "tasks choose blocks", "gates of task vectors"};
  const moe_config *c = moe_model_config(model);
  double floats, integers;
  size_t vocab = 0;
  int32_t i;
  int n_floats, n_integers;
  moe_model_vocab(model, &vocab);
  printf("layers %d, hidden %d, ffn %d, heads %d, eps %g\n", (int)c->layers, (int)c->hidden,
         (int)c->ffn, (int)c->heads, (double)c->eps);
  if (c->feature_dim) printf("features %d", (int)c->feature_dim);
  if (c->vocab)
    printf("vocab %d (%s)", (int)c->vocab, c->cased & MOE_TEXT_CASED ? "cased" : "uncased");
  printf(", positions %d, segments %d, inputs of at most %d tokens, cut %s\n", (int)c->positions,
         (int)c->segments, (int)c->max_len,
         c->truncate == MOE_TRUNCATE_LONGEST ? "at the longer text" : "on the right");
  printf("router: %s, %s %d, top-k %d%s%s\n", routers[c->router],
         c->unit == MOE_UNIT_BLOCK ? "blocks" : "experts", (int)c->experts, (int)c->top_k,
         c->gate_scale_n ? ", gate scale N/k" : "", c->renormalize ? ", renormalised" : "");
  for (i = 0; c->pruned && i < c->layers * c->experts; ++i) {
    if (!i) printf("experts that are there, layer by layer:");
    if (i && i % c->experts == 0) printf(" |");
    if (!c->pruned[i]) printf(" %d", (int)(i % c->experts));
  }
  if (c->pruned) printf("\n");
  print_tasks(model);
  floats = tensor_bytes(model, MOE_TYPE_F32, &n_floats, opt.tensors);
  integers = tensor_bytes(model, MOE_TYPE_I8, &n_integers, opt.tensors);
  printf("parameters %lu\n", (unsigned long)moe_model_parameters(model));
  printf("floats   %12.0f bytes in %d tensors\n", floats, n_floats);
  if (n_integers) printf("int8     %12.0f bytes in %d tensors\n", integers, n_integers);
  printf("words    %12.0f bytes of vocabulary\nfile     %12.0f bytes\n", (double)vocab, file_bytes);
}

/* ---- a smaller one ---- */

/* Norm of what quantisation adds to the matrices, relative to theirs. */
static double weight_error(moe_model *model, const moe_model *small) {
  double error = 0, norm = 0;
  moe_tensor t, from;
  int32_t i;
  size_t k;
  for (i = 0; i < moe_model_tensors(small); ++i) {
    const float *w;
    float *scale;
    int8_t *q;
    moe_model_tensor(small, i, &t);
    if (t.type != MOE_TYPE_I8) continue;
    moe_model_tensor(model, moe_model_find_tensor(model, t.name), &from);
    w = moe_model_weights(model) + from.offset;
    q = (int8_t *)take(t.count, 1);
    scale = (float *)take((size_t)t.shape[0], sizeof *scale);
    moe_quantize(q, scale, w, t.shape[0], t.shape[1], &env);
    for (k = 0; k < t.count; ++k) {
      double d = (double)scale[k / (size_t)t.shape[1]] * q[k] - (double)w[k];
      error += d * d;
      norm += (double)w[k] * (double)w[k];
    }
    free(q), free(scale);
  }
  return norm > 0 ? sqrt(error / norm) : 0;
}

/* What the model answers to the rows of a file; routes are added to sums unless it is NULL. */
static answers ask(const moe_model *model, const char *path, moe_route_sums *sums) {
  int32_t t = find_model_task(model, opt.task, opt.in);
  moe_context *context = make_context(model);
  encoder e;
  rows r;
  answers a;
  encoder_of_model(&e, model, opt.in);
  read_rows(&r, moe_model_task(model, t), NULL, &e, path, 0, 0);
  a = score_rows(context, model, &r, t, sums);
  free_rows(&r);
  moe_tokenizer_free(e.tokenizer);
  moe_context_free(context);
  return a;
}

/* The experts to be left out: those with no token or fewer than the share, but for the k most
   used. */
static void choose(unsigned char *drop, const int64_t *chosen, const moe_config *c) {
  int32_t l, e, kept, best;
  for (l = 0; l < c->layers; ++l, chosen += c->experts, drop += c->experts) {
    double sum = 0;
    for (e = 0; e < c->experts; ++e) sum += (double)chosen[e];
    for (e = kept = 0; e < c->experts; ++e) {
      drop[e] = !chosen[e] || (double)chosen[e] < opt.drop * sum;
      kept += !drop[e];
    }
    for (; kept < c->top_k; ++kept) {
      for (e = 0, best = -1; e < c->experts; ++e)
        if (drop[e] && (best < 0 || chosen[e] > chosen[best]) &&
            !(c->pruned && c->pruned[l * c->experts + e]))
          best = e;
      drop[best] = 0;
    }
  }
}

static moe_model *take_task(const moe_model *model) {
  const moe_config *c = moe_model_config(model);
  int32_t task = find_model_task(model, opt.task, opt.in);
  size_t cells = (size_t)(c->layers * c->experts), T = (size_t)moe_model_tasks(model);
  unsigned char *drop = (unsigned char *)take(cells, 1);
  moe_route_sums sums = {NULL, NULL, NULL, NULL};
  moe_model *out;
  answers a;
  if (opt.rows && (c->router == MOE_ROUTER_DENSE || c->unit == MOE_UNIT_BLOCK))
    die("%s has no experts behind gates that could be left out", opt.in);
  if (opt.rows) {
    sums.tokens = (int64_t *)take(T, sizeof *sums.tokens);
    sums.chosen = (int64_t *)take(T * cells, sizeof *sums.chosen);
    a = ask(model, opt.rows, &sums);
    free_answers(&a);
    choose(drop, sums.chosen + (size_t)task * cells, c);
    free(sums.tokens), free(sums.chosen);
  }
  need(moe_model_extract(&out, model, &task, 1, opt.rows ? drop : NULL, &env));
  free(drop);
  return out;
}

static void print_scores(const moe_task *task, const answers *before, const answers *after) {
  char name[MOE_NAME_BYTES];
  int i;
  for (i = 0; moe_metric_name(name, task, i); ++i) {
    int defined = 1;
    double was = metric_of(task, i, before->answer, before->label, before->n, &defined);
    double is = metric_of(task, i, after->answer, after->label, after->n, &defined);
    printf("%-8s %12.6f before, %.6f after, over %lld rows%s\n", name, was, is, (long long)after->n,
           defined ? "" : " (undefined)");
  }
}

/* Writes OUT and tells of what is in it. */
static void convert(moe_model *model, double bytes) {
  moe_model *last = model, *next;
  answers before, after;
  double error = 0, now;
  if (opt.score) before = ask(model, opt.score, NULL);
  if (opt.task) last = take_task(model);
  if (opt.int8) {
    need(moe_model_quantize(&next, last, &env));
    error = weight_error(last, next);
    if (last != model) moe_model_free(last);
    last = next;
  }
  need(moe_model_save(last, opt.out, &env));
  moe_model_free(last);
  last = load(opt.out, &now);
  print_model(last, now);
  if (opt.int8) printf("error    %12.5f of the norm of the matrices\n", error);
  printf("saved    %12.0f bytes of %.0f (%.1f %%)%s\n", bytes - now, bytes,
         100 * (bytes - now) / bytes,
         opt.score ? "" : "; what it costs in scores: ./predict FILE TASK --score, for both");
  if (opt.score) {
    after = ask(last, opt.score, NULL);
    print_scores(moe_model_task(last, find_model_task(last, opt.task, opt.out)), &before, &after);
    free_answers(&before), free_answers(&after);
  }
  moe_model_free(last);
}

/* Writes it as constants, after --task and --int8. */
static void write_constants(moe_model *model) {
  moe_limits limits = {0, 0, 0, 0};
  moe_model *last = model, *next;
  limits.sequences = opt.sequences;
  limits.tokens = opt.tokens ? opt.tokens : opt.sequences * (int)moe_model_config(model)->max_len;
  if (opt.task) last = take_task(model);
  if (opt.int8) {
    need(moe_model_quantize(&next, last, &env));
    if (last != model) moe_model_free(last);
    last = next;
  }
  carray_write(opt.c_array, last, &limits);
  if (last != model) moe_model_free(last);
}

int main(int argc, char **argv) {
  moe_model *model;
  double bytes;
  begin_program("convert", argc, argv);
  read_options("IN [OUT] [options]\nLooks into a model file, and makes a smaller one of it: for "
               "inference (--int8), of one task (--task), without the experts that the task hardly "
               "uses (--rows). ./predict takes the result like any model. For example:\n"
               "./convert model.safetensors small.safetensors --task topic --int8",
               all_options);
  check_options();
  open_machine(1);
  model = load(opt.in, &bytes);
  if (opt.task) find_model_task(model, opt.task, opt.in);
  if (opt.hf)
    write_folder(opt.hf, model, opt.mttag);
  else if (opt.c_array)
    write_constants(model);
  else if (opt.out)
    convert(model, bytes);
  else
    print_model(model, bytes);
  moe_model_free(model);
  return end_program(stderr);
}
