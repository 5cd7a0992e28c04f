/* What the tools read: a byte that says which kind of file (t, c, j: TSV, CSV, JSONL), tasks.tsv, a
   byte of value 1, train, 1, dev of each task. */

static moe_tokenizer *data_tokenizer;

static void data_begin(const moe_env *e) {
  OUGHT(!TRY(moe_tokenizer_create(&data_tokenizer, fuzz_words_of, strlen(fuzz_words_of), 0, e)));
}

static void data_rows(const rows *r, const task_data *of) {
  int64_t i;
  int k;
  OUGHT(r->n >= 1 && r->groups >= 1 && r->groups <= r->n && r->row[0].start == 0);
  for (i = 0; i < r->n; ++i) {
    const row *x = &r->row[i];
    OUGHT(row_length(r, i) >= 2 && row_length(r, i) <= FUZZ_LENGTH);
    OUGHT(x->group >= 0 && x->group < r->groups);
    if (of->task.kind == MOE_KIND_REGRESSION)
      OUGHT(x->label >= of->task.low && x->label <= of->task.high);
    else
      OUGHT(x->label >= 0 && x->label < (float)of->task.classes);
    for (k = 0; k < 4 && of->task.kind == MOE_KIND_SPAN; k += 2)
      OUGHT(x->span[k] >= 0 && x->span[k] < x->span[k + 1] && x->span[k + 1] <= row_length(r, i));
  }
  OUGHT(r->row[r->n].start == r->tokens);
}

static void data_use(const encoder *e, int kind) {
  const char *ending = kind == 'c' ? "csv" : kind == 'j' ? "jsonl" : "tsv";
  moe_model *m = NULL;
  moe_task *task;
  rows some;
  int t;
  read_tasks(NULL);
  task = (moe_task *)take((size_t)n_tasks, sizeof *task);
  for (t = 0; t < n_tasks; ++t) {
    task_data *d = &tasks[t];
    fuzz_names[1] = printed("data/%s/train.%s", d->task.name, ending);
    fuzz_names[2] = printed("data/%s/dev.%s", d->task.name, ending);
    read_task_rows(d, e, t % 3);
    data_rows(&d->train, d);
    data_rows(&d->dev[0], d);
    some = draw_rows(&d->train, 2, 1);
    OUGHT(some.n >= 1 && some.n <= d->train.n);
    task[t] = d->task;
  }
  hold_out_rows(0.5, 0);
  if (n_tasks < 4) /* what the reader takes, the library takes too */
    if (!moe_model_create(&m, &e->config, task, n_tasks, 1, &env)) moe_model_free(m);
}

static void fuzz_data(const uint8_t *d, size_t n) {
  size_t before = fuzz_live;
  moe_task none[FUZZ_TASKS];
  encoder e;
  memset(&e, 0, sizeof e);
  env = fuzz_env();
  env.log = log_sentence;
  e.config = fuzz_config(none);
  e.tokenizer = data_tokenizer;
  fuzz_tools_begin();
  data.split = n % 2 ? 0.5 : 0;
  fuzz_cut(fuzz_files, 3, d + (n > 0), n - (n > 0));
  fuzz_names[0] = "data/tasks.tsv";
  data.folder = "data";
  if (!setjmp(fuzz_end)) data_use(&e, n ? d[0] : 0);
  fuzz_tools_end(before);
}
