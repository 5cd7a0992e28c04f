/* The routes that tasklevel --csv has looked at, as routes --history reads them. */

static moe_model *routes_model;

static void routes_begin(const moe_env *e) {
  moe_task task[FUZZ_TASKS];
  moe_config c = fuzz_config(task);
  OUGHT(!TRY(moe_model_create(&routes_model, &c, task, 2, 1, e)));
}

static void fuzz_routes(const uint8_t *d, size_t n) {
  size_t before = fuzz_live, c;
  int m;
  env = fuzz_env();
  env.log = log_sentence;
  fuzz_tools_begin();
  T = 2, L = 2, N = 3, blocks = 1;
  moments = NULL, n_moments = n_history = 0;
  opt.history = "looks.csv";
  opt.run = n && d[0] == '1' ? 1 : 0;
  fuzz_cut(fuzz_files, 1, d + (n > 0), n - (n > 0));
  fuzz_names[0] = opt.history;
  if (!setjmp(fuzz_end)) {
    read_history(routes_model);
    OUGHT(n_moments >= 1);
    for (m = 0; m < n_moments; ++m)
      for (c = 0; c < at(T, 0, 0); ++c) OUGHT(moments[m].share[c] >= 0 && moments[m].share[c] <= 1);
  }
  fuzz_tools_end(before);
}
