/* predict.c - asks a trained model from the shell
     cc -O3 -o predict examples/tools/predict.c -lm -pthread
     ./predict MODEL TASK < lines                a label and its probability for each line
     ./predict MODEL TASK --score < dev.tsv      the metrics of the task */
#define MOE_IMPLEMENTATION
#include "score.h"

enum { BATCH = 32 };

static struct {
  const char *model, *task, *embed;
  int score, report, scores, json, top;
} opt;

static const option predict_options[] = {
    PLACE("MODEL", opt.model, "a trained model"),
    PLACE("TASK", opt.task, "one of its tasks"),
    GROUP("answers, a line for each line as soon as it is there [label, tab, probability]"),
    WHOLE("--top", opt.top, 1, MOE_MAX_CLASSES, NULL, "the N most probable labels, each so"),
    FLAG("--scores", opt.scores, "label, then the probabilities of all labels in their order"),
    FLAG("--json", opt.json, "an object: label, score and, with --scores or --top, scores"),
    STRING("--embed", "mean|cls", opt.embed, NULL,
           "in place of an answer the state of the last layer, all its numbers: the mean of the "
           "tokens, or [CLS]; a model without tasks takes any name as TASK"),
    GROUP("measuring"),
    FLAG("--score", opt.score,
         "the input is a file as for training (first line names of columns, a column label): print "
         "the metrics of the task"),
    FLAG("--report", opt.report,
         "the same with precision, recall and F1 of each label and the table of confusions"),
    END_OF_OPTIONS};
static const option *const all_options[] = {predict_options, machine_options, NULL};

/* Cuts a line at its tabs into fields, at most `most` + 1; returns their number. */
static int cut_line(char **field, int most, char *line) {
  int n = 0;
  for (; line && n <= most; line = strchr(line, '\t'), line = line ? (*line = 0, line + 1) : NULL)
    field[n++] = line;
  return n;
}

/* Lines that were read together. */
typedef struct questions {
  text line[BATCH];
  const char *a[BATCH], *b[BATCH];
  int32_t chars[4 * BATCH];
  int n, numbered;
} questions;

static void read_question(questions *q, const moe_task *task) {
  int spans = task->kind == MOE_KIND_SPAN, wanted = 1 + task->pair + 4 * spans, got, i;
  text *line = &q->line[q->n];
  char *field[8];
  read_from("stdin", ++q->numbered);
  if (strlen(line->data) != line->bytes) die("a zero byte");
  got = cut_line(field, wanted, line->data);
  if (got != wanted)
    die("%d column%s, expected %d: task %s takes %s%s", got, got == 1 ? "" : "s", wanted,
        task->name, task->pair ? "two texts" : "one text",
        spans ? " and start1 end1 start2 end2" : "");
  q->a[q->n] = field[0];
  q->b[q->n] = task->pair ? field[1] : NULL;
  for (i = 0; i < 4 * spans; ++i)
    q->chars[4 * q->n + i] = field_whole("offset", field[1 + task->pair + i]);
  ++q->n;
  read_from(NULL, 0);
}

/* The lines that are there, at least one, at most BATCH. 0: the input has ended. */
static int read_questions(questions *q, const moe_task *task) {
  q->n = 0;
  while (q->n < BATCH && read_line(&q->line[q->n], q->n == 0)) read_question(q, task);
  return q->n;
}

/* The classes by their scores, the lowest of equals first. */
static void rank(int *order, const float *score, int n) {
  int i, k;
  for (i = 0; i < n; ++i) {
    for (k = i; k > 0 && score[i] > score[order[k - 1]]; --k) order[k] = order[k - 1];
    order[k] = i;
  }
}

static void put_json_answer(text *out, const moe_task *task, const float *score, int best) {
  int order[MOE_MAX_CLASSES], all = opt.top ? opt.top : opt.scores ? task->classes : 0, i;
  if (!task->label) {
    put_json(out, "{'value': %.6f}\n", (double)*score);
    return;
  }
  put_json(out, "{'label': ");
  put_quoted(out, task->label[best]);
  put_json(out, ", 'score': %.6f", (double)score[best]);
  for (i = 0; i < task->classes; ++i) order[i] = i;
  if (opt.top) rank(order, score, task->classes);
  if (all > task->classes) all = task->classes;
  for (i = 0; i < all; ++i) {
    put_json(out, i ? ", " : ", 'scores': {");
    put_quoted(out, task->label[order[i]]);
    put(out, ": %.6f", (double)score[order[i]]);
  }
  put(out, all ? "}}\n" : "}\n");
}

static void put_answer(text *out, const moe_task *task, const float *score, int best) {
  int order[MOE_MAX_CLASSES], i;
  if (opt.json) {
    put_json_answer(out, task, score, best);
  } else if (!task->label) {
    put(out, "%.6f\n", (double)*score);
  } else if (opt.top) {
    rank(order, score, task->classes);
    for (i = 0; i < opt.top && i < task->classes; ++i)
      put(out, "%s%s\t%.6f", i ? "\t" : "", task->label[order[i]], (double)score[order[i]]);
    put(out, "\n");
  } else {
    put(out, "%s", task->label[best]);
    for (i = 0; i < (opt.scores ? task->classes : 1); ++i)
      put(out, "\t%.6f", (double)score[opt.scores ? i : best]);
    put(out, "\n");
  }
}

static void put_embedding(text *out, const float *v, int32_t H) {
  int32_t i;
  if (opt.json) put(out, "[");
  for (i = 0; i < H; ++i) put(out, "%s%.9g", !i ? "" : opt.json ? ", " : "\t", (double)v[i]);
  put(out, opt.json ? "]\n" : "\n");
}

/* Answers the lines of standard input. */
static void answer_lines(const moe_model *model, int32_t t) {
  static moe_task no_task; /* of a model without tasks, for embeddings */
  const moe_task *task = moe_model_tasks(model) ? moe_model_task(model, t) : &no_task;
  int32_t H = moe_model_config(model)->hidden, width = moe_model_max_classes(model), i;
  questions *q = (questions *)lasting(1, sizeof *q);
  float *to = (float *)lasting((size_t)(BATCH * (opt.embed ? H : width)), sizeof *to);
  text out = {NULL, 0, 0};
  int best[BATCH];
  moe_predictor *predictor;
  moe_pooling pooling = opt.embed && !strcmp(opt.embed, "cls") ? MOE_POOLING_CLS : MOE_POOLING_MEAN;
  need(moe_predictor_create(&predictor, model, BATCH, &env));
  while (read_questions(q, task)) {
    if (opt.embed)
      need(moe_predict_embed(predictor, t, pooling, q->a, q->b, q->n, to));
    else
      need(moe_predict_spans(predictor, t, q->a, q->b,
                             task->kind == MOE_KIND_SPAN ? q->chars : NULL, q->n, to, best));
    for (out.bytes = 0, i = 0; i < q->n; ++i)
      if (opt.embed)
        put_embedding(&out, to + i * H, H);
      else
        put_answer(&out, task, to + i * width, best[i]);
    fwrite(out.data, 1, out.bytes, stdout);
    if (fflush(stdout)) break; /* end_program says so */
  }
  for (i = 0; i < BATCH; ++i) free(q->line[i].data);
  free(out.data);
  moe_predictor_free(predictor);
}

/* Precision, recall and F1 of each label, and how often which was taken for which. */
static void print_report(const moe_task *task, const answers *a) {
  int C = task->classes, c, d, first;
  int64_t *count = (int64_t *)take((size_t)(C * C), sizeof *count), i;
  for (i = 0; i < a->n; ++i) ++count[(int)a->label[i] * C + (int)a->answer[i]];
  printf("\n%-28s %8s %9s %9s %9s\n", "label", "rows", "precision", "recall", "F1");
  for (c = 0; c < C; ++c) {
    double said = 0, is = 0, both = (double)count[c * C + c];
    for (d = 0; d < C; ++d) said += (double)count[d * C + c], is += (double)count[c * C + d];
    printf("%2d=%-25.25s %8.0f %9.4f %9.4f %9.4f\n", c, task->label[c], is,
           said > 0 ? both / said : 0, is > 0 ? both / is : 0,
           said + is > 0 ? 2 * both / (said + is) : 0);
  }
  for (first = 0; first < C; first += 8) {
    printf("\n%-15s", "is / said to be");
    for (d = first; d < C && d < first + 8; ++d) printf(" %7d", d);
    for (c = 0; c < C; ++c) {
      printf("\n%2d=%-12.12s", c, task->label[c]);
      for (d = first; d < C && d < first + 8; ++d) printf(" %7lld", (long long)count[c * C + d]);
    }
    printf("\n");
  }
  free(count);
}

static void print_metrics(moe_model *model, int32_t t) {
  const moe_task *task = moe_model_task(model, t);
  moe_context *context = make_context(model);
  char name[MOE_NAME_BYTES];
  encoder e;
  rows r;
  answers a;
  int i;
  encoder_of_model(&e, model, opt.model);
  read_rows(&r, task, NULL, &e, "-", 0, 0);
  a = score_rows(context, model, &r, t, NULL);
  for (i = 0; moe_metric_name(name, task, i); ++i) {
    int defined = 1;
    double v = metric_of(task, i, a.answer, a.label, a.n, &defined);
    printf("%s %.6f%s\n", name, v, defined ? "" : " (undefined)");
  }
  printf("n %lld\n", (long long)a.n);
  if (opt.report && !task->label) die("--report: task %s has no labels", task->name);
  if (opt.report) print_report(task, &a);
  free_answers(&a);
  free_rows(&r);
  moe_tokenizer_free(e.tokenizer);
  moe_context_free(context);
}

int main(int argc, char **argv) {
  moe_model *model;
  int32_t task;
  begin_program("predict", argc, argv);
  read_options(
      "MODEL TASK [options] < lines\nOne text a line, or two with a tab between; a task of "
      "kind span takes start1 end1 start2 end2 behind them, counted in characters. Prints "
      "label, tab and probability for each line, or the value of a regression. For example:\n"
      "echo 'what a film' | ./predict model.safetensors sentence_polarity --top 2",
      all_options);
  if (!opt.task) die("usage: predict MODEL TASK [options] < lines; --help lists the options");
  open_machine(1);
  moe_env_use_amx(&env); /* a model of 8 bits is quicker with it */
  need(moe_model_load(&model, opt.model, &env));
  task = opt.embed && !moe_model_tasks(model) ? 0 : find_model_task(model, opt.task, opt.model);
  if (opt.score || opt.report)
    print_metrics(model, task);
  else
    answer_lines(model, task);
  moe_model_free(model);
  return end_program(stderr);
}
