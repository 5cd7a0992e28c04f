/* FILE.results and the notes of checkpoints: what train and tasklevel have written before. */

static void results_use(void) {
  int i, t;
  int64_t j;
  read_parts("data");
  for (i = 0; i < n_finished; ++i) {
    const part *p = finished[i];
    OUGHT(find_part(p->name) == p && p->task >= 0 && p->task < n_tasks);
    for (j = 0; j < dev_rows(&tasks[p->task]); ++j)
      if (tasks[p->task].task.kind != MOE_KIND_REGRESSION)
        OUGHT(p->answer[j] >= 0 && p->answer[j] < (float)tasks[p->task].task.classes);
  }
  for (t = 0; t < n_tasks; ++t) {
    double value[2], error;
    for (i = 0; i < n_finished; ++i) {
      const float *answer = finished[i]->answer;
      if (finished[i]->task == t) value[0] = 0, resample(value, &tasks[t], &answer, 1, 0);
    }
    OUGHT(chance(&tasks[t], &error) >= 0);
  }
}

static void fuzz_results(const uint8_t *d, size_t n) {
  static task_data of[3];
  static row row_of[3][5];
  size_t before = fuzz_live;
  moe_task task[FUZZ_TASKS];
  int t, i;
  fuzz_tasks(task);
  for (t = 0; t < 3; ++t) {
    of[t].task = task[t];
    of[t].n_dev = 1;
    of[t].dev[0].row = row_of[t];
    of[t].dev[0].n = of[t].dev[0].groups = 2 + t;
    for (i = 0; i < 2 + t; ++i) row_of[t][i].group = i, row_of[t][i].label = (float)(i & 1);
  }
  env = fuzz_env();
  env.log = log_sentence;
  fuzz_tools_begin();
  tasks = of, n_tasks = 3;
  finished = NULL, n_finished = 0;
  route_layers = 2, route_experts = 3;
  options_here = "lr=0.001 steps=10 tasks=two:4,";
  fuzz_cut(fuzz_files, 1, d, n);
  fuzz_names[0] = "data.results";
  if (!setjmp(fuzz_end)) results_use();
  fuzz_tools_end(before);
}
