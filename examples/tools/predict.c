/* predict.c - asks a trained model from the shell
     cc -O3 -o predict examples/tools/predict.c -lm -pthread
     ./predict MODEL TASK < lines                a label and its probability for each line
     ./predict MODEL TASK --score < dev.tsv      the metrics of the task */
#define MOE_IMPLEMENTATION
#include "score.h"

enum { BATCH = 32 };

static struct {
  const char *model, *task;
  int score;
} opt;

static const option predict_options[] = {
    PLACE("MODEL", opt.model, "a trained model"), PLACE("TASK", opt.task, "one of its tasks"),
    FLAG("--score", opt.score,
         "the input is a file as for training (first line names of columns, a column label): print "
         "the metrics of the task"),
    END_OF_OPTIONS};
static const option *const all_options[] = {predict_options, machine_options, NULL};

/* Cuts a line at its tabs into fields, at most `most` + 1; returns their number. */
static int cut_line(char **field, int most, char *line) {
  int n = 0;
  for (; line && n <= most; line = strchr(line, '\t'), line = line ? (*line = 0, line + 1) : NULL)
    field[n++] = line;
  return n;
}

/* Reads up to BATCH lines, asks, prints. 0: the input has ended. */
static int answer_lines(moe_predictor *predictor, const moe_model *model, int32_t t) {
  static text line[BATCH];
  static int number_of_line;
  static float scores[BATCH * MOE_MAX_CLASSES];
  const moe_task *task = moe_model_task(model, t);
  const char *a[BATCH], *b[BATCH];
  int spans = task->kind == MOE_KIND_SPAN, wanted = 1 + task->pair + 4 * spans, best[BATCH], n, i;
  int32_t chars[4 * BATCH];
  char *field[8];
  for (n = 0; n < BATCH && read_line(&line[n], stdin); ++n) {
    int got;
    read_from("stdin", ++number_of_line);
    if (strlen(line[n].data) != line[n].bytes) die("a zero byte");
    got = cut_line(field, wanted, line[n].data);
    if (got != wanted)
      die("%d column%s, expected %d: task %s takes %s%s", got, got == 1 ? "" : "s", wanted,
          task->name, task->pair ? "two texts" : "one text",
          spans ? " and start1 end1 start2 end2" : "");
    a[n] = field[0];
    b[n] = task->pair ? field[1] : NULL;
    for (i = 0; i < 4 * spans; ++i)
      chars[4 * n + i] = field_whole("offset", field[1 + task->pair + i]);
  }
  read_from(NULL, 0);
  if (ferror(stdin)) die("standard input cannot be read");
  need(moe_predict_spans(predictor, t, a, b, spans ? chars : NULL, n, scores, best));
  for (i = 0; i < n; ++i) {
    double score = (double)scores[i * moe_model_max_classes(model) + best[i]];
    if (task->label) printf("%s\t", task->label[best[i]]);
    printf("%.6f\n", score);
  }
  return n == BATCH;
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
  free_answers(&a);
  free_rows(&r);
  moe_tokenizer_free(e.tokenizer);
  moe_context_free(context);
}

int main(int argc, char **argv) {
  moe_model *model;
  moe_predictor *predictor;
  int32_t task;
  begin_program("predict", argc, argv);
  read_options(
      "MODEL TASK [options] < lines\nOne text a line, or two with a tab between; a task of "
      "kind span takes start1 end1 start2 end2 behind them, counted in characters. Prints "
      "label, tab and probability for each line, or the value of a regression.",
      all_options);
  if (!opt.task) die("usage: predict MODEL TASK [options] < lines; --help lists the options");
  open_machine(1);
  moe_env_use_amx(&env); /* a model of 8 bits is quicker with it */
  need(moe_model_load(&model, opt.model, &env));
  task = find_model_task(model, opt.task, opt.model);
  if (opt.score)
    print_metrics(model, task);
  else {
    need(moe_predictor_create(&predictor, model, BATCH, &env));
    while (answer_lines(predictor, model, task)) continue;
    moe_predictor_free(predictor);
  }
  moe_model_free(model);
  return end_program(stderr);
}
