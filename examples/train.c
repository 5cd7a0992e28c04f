/* train.c - trains Single-Task, MT-Dense, MT-Switch and MT-TaG on a folder of tasks and prints a
   table like Table 1 of the MT-TaG paper.

     cc -O3 -o train examples/train.c -lm -pthread
     ./train                      the bundled tasks, four systems
     ./train --help               the options

   Without --init a dense parent is trained on all tasks first, and every multi-task system goes on
   from it, as the paper's go on from a published encoder; --from-scratch trains each by itself.
   Single-Task never sees other tasks: it trains from scratch, for as many steps on its task as the
   parent and a system together. From top to bottom: options, one training, the first stage, the
   second stage, tasks that join, main. What is shared with other programs is in tools/. */
#define MOE_IMPLEMENTATION
#include "tools/training.h"

/* ---- options ---- */

/* TUNED + system: after the second stage. */
enum { SINGLE, PARENT, DENSE, SWITCH, TAG, EMBED, SYSTEMS, TUNED = SYSTEMS };
static const line systems[2 * SYSTEMS] = {{"single", "Single-Task", 0},
                                          {"parent", "Dense parent", -1},
                                          {"dense", "MT-Dense", 0},
                                          {"switch", "MT-Switch", 0},
                                          {"tag", "MT-TaG", 0},
                                          {"embed", "MT-Embed", 0},
                                          {"single-tuned", "Single tuned", 1},
                                          {"parent-tuned", "Parent tuned", -1},
                                          {"dense-tuned", "Dense tuned", 1},
                                          {"switch-tuned", "Switch tuned", 1},
                                          {"tag-tuned", "TaG tuned", 1},
                                          {"embed-tuned", "Embed tuned", 1}};

static struct {
  const char *truncate, *systems, *gate_scale, *seeds, *sampling, *order, *grid, *from, *adapt;
  const char *gate_from, *few, *save, *json, *predictions;
  int dedup, hold_most, rank, experts, top_k, renormalize, from_scratch, epochs, steps, batch;
  int micro_batch, fine_tune, fine_batch, fine_epoch, patience, early_stop, keep, tidy, report;
  double hold_out, noise, parent, tokens, rate, warmup, gate_rate, decay, clip, dropout, balance;
  double z_loss, jitter;
} opt;

static const option train_options[] = {
    GROUP("rows"),
    STRING("--truncate", "longest|right", opt.truncate, "longest",
           "what to cut from a longer input"),
    REAL("--hold-out", "FRACTION", opt.hold_out, 0, 0.9, "0",
         "part of train that chooses the best epoch; 0: the last one"),
    WHOLE("--hold-most", opt.hold_most, 1, 1000000000, NULL,
          "but about N rows of a task at most [no limit]"),
    FLAG("--dedup", opt.dedup, "drop training rows whose text occurs in another task's dev set"),
    GROUP("model"),
    WHOLE("--layers", source.layers, 1, 1000, "2", "without --init: from scratch"),
    WHOLE("--hidden", source.hidden, 1, 65536, "128", "likewise"),
    WHOLE("--ffn", source.ffn, 1, 1 << 20, "512", "likewise"),
    STRING("--systems", "LIST", opt.systems, "single,dense,switch,tag",
           "of these, and embed (gates made of a vector for each task)"),
    WHOLE("--rank", opt.rank, 1, 4096, "8", "length of embed's task vectors"),
    WHOLE("--experts", opt.experts, 1, MOE_MAX_EXPERTS, "4", "experts in a layer"),
    WHOLE("--top-k", opt.top_k, 1, MOE_MAX_EXPERTS, "1", "experts of a token"),
    STRING("--gate-scale", "paper|n", opt.gate_scale, "n",
           "weight of an expert: g* (the paper) or g* N/k (n: a sparse model then starts as "
           "its dense parent; with the paper's g* every FFN starts at a quarter)"),
    FLAG("--renormalize", opt.renormalize, "top-k weights sum to 1 (with --gate-scale paper)"),
    REAL("--noise", "S", opt.noise, 0, 10, "0", "standard deviation of noise on copied experts"),
    GROUP("training"),
    WHOLE("--epochs", opt.epochs, 1, 1000000, NULL,
          "length, the parent included; Single-Task gets a task's share of the steps [3 "
          "with --init, else 10]"),
    WHOLE("--steps", opt.steps, 1, 1000000000, NULL, "length in steps"),
    REAL("--tokens", "N", opt.tokens, 1, 1e15, NULL, "length in tokens, about"),
    REAL("--parent", "F", opt.parent, 0.01, 0.99, NULL,
         "part of the length that trains the dense parent of all multi-task systems [0.6, "
         "with --init none]"),
    FLAG("--from-scratch", opt.from_scratch, "no parent: each system by itself"),
    WHOLE("--batch", opt.batch, 1, 65536, "32", "sequences of a step"),
    WHOLE("--micro-batch", opt.micro_batch, 1, 1 << 24, "4096",
          "most tokens at once: more memory, the same results (but with --balance and "
          "--z-loss, whose losses are means over a micro-batch)"),
    WHOLE("--early-stop", opt.early_stop, 1, 100000, NULL,
          "with --hold-out: end the first stage after N epochs that are no better [never]"),
    REAL("--lr", "R", opt.rate, 1e-12, 1e6, NULL,
         "peak learning rate [5e-5 with --init, else 1e-3]"),
    REAL("--warmup", "F", opt.warmup, 0, 1, "0.1", "fraction of the steps to reach it"),
    REAL("--gate-lr", "F", opt.gate_rate, 0, 1e6, "1",
         "factor of the learning rate for gates and task vectors"),
    REAL("--decay", "D", opt.decay, 0, 1e6, "0", "weight decay"),
    REAL("--clip", "C", opt.clip, 0, 1e30, "1", "largest gradient norm"),
    REAL("--dropout", "P", opt.dropout, 0, 0.99, "0.1", "of hidden states and attention"),
    STRING("--seeds", "1,2,3", opt.seeds, "1",
           "a run for each; the table then shows mean and deviation"),
    STRING("--sampling", "HOW", opt.sampling, "natural",
           "natural, uniform, temperature:T or uniform-natural"),
    STRING("--order", "shuffle|file", opt.order, "shuffle", "of the training rows"),
    REAL("--balance", "A", opt.balance, 0, 1e6, "0",
         "load-balance loss; the paper argues against this and the next two"),
    REAL("--z-loss", "A", opt.z_loss, 0, 1e6, "0", "router z-loss"),
    REAL("--jitter", "A", opt.jitter, 0, 0.99, "0", "noise on what the gates read"),
    FLAG("--shard", sharding,
         "with MPI: each rank keeps the moments of its range of the weights and steps these"),
    FLAG("--overlap", overlapping,
         "with MPI: add up a layer's gradients while backward goes on; pays on slow networks"),
    GROUP("second stage"),
    WHOLE("--fine-tune", opt.fine_tune, 1, 100000, NULL,
          "then each task alone, for N epochs at most (Single-Task, which has no first "
          "stage, for more, by the task's share of it); keeps the best epoch, chosen on "
          "dev.tsv or, as it should be, on --hold-out rows"),
    WHOLE("--fine-batch", opt.fine_batch, 1, 65536, "32", "its batch"),
    WHOLE("--fine-epoch", opt.fine_epoch, 1, 1000000000, NULL,
          "an epoch of it ends after N steps at the latest [all rows]"),
    WHOLE("--patience", opt.patience, 1, 100000, "3", "it ends after N epochs that are no better"),
    STRING("--grid", "RATES[:WARMUPS]", opt.grid, NULL,
           "tries every pair, 2e-5,5e-5:0.1,0.2 say, keeps the best [--lr and --warmup]"),
    STRING("--from", "MODEL", opt.from, NULL, "a trained model instead of the first stage"),
    STRING("--adapt", "TASK", opt.adapt, NULL,
           "a task that the model of --from does not know joins it; without --from: the "
           "Single-Task model that it has to beat"),
    STRING("--gate-from", "LIST", opt.gate_from, "random",
           "where its gates come from: random, mean or a task"),
    STRING("--rows", "LIST", opt.few, NULL,
           "its training rows, 100 or 10% say, drawn anew for each seed [100%]"),
    GROUP("files"),
    STRING("--save", "FILE", opt.save, NULL,
           "the trained model; with several runs FILE gets -SYSTEM-SEED"),
    WHOLE("--keep", opt.keep, 1, 1000, NULL,
          "keep the model at N steps of the first stage, as CHECKPOINT-stepSTEP, for "
          "routes"),
    FLAG("--tidy", opt.tidy, "remove the checkpoint of a run when its results are kept"),
    FLAG("--report", opt.report, "train nothing, show what --resume has finished"),
    STRING("--json", "FILE", opt.json, NULL, "all results"),
    STRING("--predictions", "FILE", opt.predictions, NULL,
           "answers to each dev row; names as with --save"),
    WHOLE("--resamples", resamples, 0, 100000, "1000",
          "of the dev rows, to compare systems by; 0: none"),
    END_OF_OPTIONS};
static const option *const all_options[] = {data_options,  encoder_options, train_options,
                                            state_options, watch_options,   machine_options,
                                            NULL};
/* Those that decide results, but for those that name a part of them. */
static const char deciding[] =
    "epochs steps parent batch lr warmup decay clip dropout sampling order balance z-loss jitter "
    "max-len truncate hold-out gate-lr layers hidden ffn heads eps cased rank experts top-k "
    "gate-scale renormalize noise fine-tune fine-batch fine-epoch patience early-stop adapt";

/* Pairs of --grid, or --lr and --warmup alone. */
static list grid_rates, grid_warmups;

static void read_grid(void) {
  list half = split(opt.grid ? opt.grid : printed("%.9g", opt.rate), ':');
  int i;
  if (half.n > 2) die("--grid is RATES or RATES:WARMUPS, not \"%s\"", opt.grid);
  grid_rates = split(half.at[0], ',');
  grid_warmups = split(half.n == 2 ? half.at[1] : printed("%.9g", opt.warmup), ',');
  for (i = 0; i < grid_rates.n; ++i) number("--grid", grid_rates.at[i], 1e-12, 1e6);
  for (i = 0; i < grid_warmups.n; ++i) number("--grid", grid_warmups.at[i], 0, 1);
}

/* What does not go together, and defaults that depend on other options. */
static void check_options(void) {
  if (opt.from && source.init)
    die("--from goes on from a trained model, --init from a published encoder: give one of them");
  if (opt.few && !opt.adapt) die("--rows is for --adapt");
  if ((opt.from || opt.adapt) && !opt.fine_tune) opt.fine_tune = 10;
  if (opt.grid && !opt.fine_tune)
    die("--grid tries rates and warm-ups in the second stage: give --fine-tune too");
  if ((opt.epochs != 0) + (opt.steps != 0) + (opt.tokens > 0) > 1)
    die("give --epochs or --steps or --tokens, not two of them");
  if (sharding && overlapping) die("--overlap adds up whole gradients: it excludes --shard");
  if (opt.from_scratch && opt.parent > 0) die("--from-scratch and --parent exclude each other");
  if (opt.keep && !state.checkpoint) die("--keep makes its names from --checkpoint: give both");
  if (opt.report && !state.resume) die("--report shows what --resume FILE has finished: give both");
  if (opt.top_k > opt.experts) die("--top-k %d is more than --experts %d", opt.top_k, opt.experts);
  if (opt.renormalize && !strcmp(opt.gate_scale, "n")) opt.gate_scale = "paper";
  if (!opt.epochs && !opt.steps && !(opt.tokens > 0)) opt.epochs = source.init ? 3 : 10;
  if (opt.from_scratch || opt.from || opt.adapt)
    opt.parent = 0;
  else if (!(opt.parent > 0) && !source.init)
    opt.parent = 0.6;
  if (!(opt.rate > 0)) opt.rate = source.init || opt.from ? 5e-5 : 1e-3;
  read_grid();
  if (opt.early_stop && !(opt.hold_out > 0))
    die("--early-stop needs --hold-out, the rows that it judges by");
  check_writable("--save", opt.save);
  check_writable("--checkpoint", state.checkpoint);
  check_writable("--json", opt.json);
  check_writable("--log", watch.log);
  check_writable("--predictions", opt.predictions);
}

static encoder base;
static moe_model *from_model;
static list seed_list;
static int n_runs; /* of one run --save FILE has that very name */

/* FILE, or with several runs FILE-SYSTEM-SEED with the ending kept; a run of one task adds the
   task. */
static char *run_path(const char *file, int system, int seed, const char *task) {
  const char *suffix =
      printed("%s-%d%s%s", systems[system].name, seed, task ? "-" : "", task ? task : "");
  int alone = n_runs <= 1 && !(task && n_tasks > 1) && system != PARENT;
  return alone ? printed("%s", file) : with_suffix(file, suffix);
}

/* 1 where the file of this option, asked for, is missing: then a part is done again although its
   results are there. */
static int file_missing(const char *file, int system, int seed, const char *task) {
  return file && !opt.report && system != PARENT && !exists(run_path(file, system, seed, task));
}

/* ---- the first stage ---- */

/* A training of n tasks as the options say, without its length; the rest is zero. */
static job new_job(const char *name, const char *title, int seed, const int *which, int n) {
  static moe_param_group gates[2] = {{".gate.", 1, 1}, {"tasks.vectors", 1, 1}};
  static const char *const samplings = "natural|uniform|temperature|uniform-natural";
  list how = split(opt.sampling, ':'), word = split(samplings, '|');
  moe_train_config *tc;
  job j;
  memset(&j, 0, sizeof j);
  j.name = name;
  j.title = title;
  j.which = which;
  j.n = n;
  j.micro_batch = opt.micro_batch;
  j.sampling.seed = (uint64_t)seed;
  j.sampling.in_order = !strcmp(opt.order, "file");
  j.sampling.tau = 1;
  while (word.n && strcmp(word.at[word.n - 1], how.at[0])) --word.n;
  j.sampling.sampling = (moe_sampling)(word.n - 1);
  if (!word.n || how.n != 1 + (j.sampling.sampling == MOE_SAMPLING_TEMPERATURE))
    die("--sampling is natural, uniform, temperature:T or uniform-natural, not \"%s\"",
        opt.sampling);
  if (how.n == 2) j.sampling.tau = (float)number("--sampling temperature:T", how.at[1], 1e-3, 1e6);
  tc = &j.config;
  moe_train_config_init(tc);
  tc->lr = (float)opt.rate;
  tc->warmup = (float)opt.warmup;
  tc->weight_decay = (float)opt.decay;
  tc->clip_norm = (float)opt.clip;
  tc->dropout = (float)opt.dropout;
  tc->balance = (float)opt.balance;
  tc->z_loss = (float)opt.z_loss;
  tc->jitter = (float)opt.jitter;
  tc->seed = (uint64_t)seed;
  gates[0].lr_scale = gates[1].lr_scale = (float)opt.gate_rate;
  tc->groups = gates;
  tc->n_groups = opt.gate_rate < 1 || opt.gate_rate > 1 ? 2 : 0;
  return j;
}

static void set_length(job *j, int64_t steps, int64_t epoch, int batch) {
  j->batch = batch;
  j->epoch = epoch;
  j->config.steps = steps;
  j->sampling.draws = steps * batch;
}

/* --keep: the model on its way, for a picture of how routes develop. */
static void keep_on_the_way(const job *j, const moe_model *model, int64_t step) {
  int64_t k, steps = j->config.steps;
  for (k = 1; k <= opt.keep; ++k)
    if (step == (steps * k + opt.keep - 1) / opt.keep) break;
  if (k <= opt.keep) write_model(model, with_suffix(j->path, printed("step%lld", (long long)step)));
}

/* Steps of a whole first stage, parent included, on n_rows of of_rows rows. */
static int64_t steps_for(int64_t n_rows, int64_t of_rows) {
  int64_t steps = opt.epochs ? (n_rows * opt.epochs + opt.batch - 1) / opt.batch
                             : (opt.steps * n_rows + of_rows - 1) / of_rows;
  return steps < 1 ? 1 : steps;
}

static int64_t all_rows(const int *which, int n) {
  int64_t sum = 0;
  int i;
  for (i = 0; i < n; ++i) sum += tasks[which ? which[i] : i].train.n;
  return sum;
}

static int has_parent(int system) { return opt.parent > 0 && system > PARENT; }

/* Encoder and heads of the parent; experts are copies of its FFNs. */
static void go_on_from_parent(moe_model *model, moe_model *parent,
                              const moe_import_options *options) {
  text file = {NULL, 0, 0};
  moe_writer writer;
  int32_t i;
  writer.write = write_to_text;
  writer.user = &file;
  need(moe_model_write(parent, &writer, &env));
  need(moe_model_import(model, file.data, file.bytes, options, &env));
  free(file.data);
  for (i = 0; i < moe_model_tensors(parent); ++i) {
    moe_tensor from, to;
    moe_model_tensor(parent, i, &from);
    if (strncmp(from.name, "heads.", 6)) continue;
    moe_model_tensor(model, moe_model_find_tensor(model, from.name), &to);
    memcpy(moe_model_weights(model) + to.offset, moe_model_weights(parent) + from.offset,
           from.count * sizeof(float));
  }
}

static moe_model *model_of(int system, int seed);

static moe_model *make_model(int system, int seed, const int *which, int n) {
  moe_task *of = (moe_task *)take((size_t)n, sizeof *of);
  moe_import_options import;
  moe_config c = base.config;
  moe_model *model;
  int i, sparse = system >= SWITCH;
  for (i = 0; i < n; ++i) of[i] = tasks[which[i]].task;
  c.router = system == TAG     ? MOE_ROUTER_TASK
             : system == EMBED ? MOE_ROUTER_EMBEDDING
             : sparse          ? MOE_ROUTER_SHARED
                               : MOE_ROUTER_DENSE;
  c.experts = sparse ? opt.experts : 1;
  c.top_k = sparse ? opt.top_k : 1;
  c.gate_scale_n = sparse && !strcmp(opt.gate_scale, "n");
  c.renormalize = sparse && opt.renormalize;
  if (sparse) c.rank = opt.rank;
  need(moe_model_create(&model, &c, of, n, (uint64_t)seed, &env));
  need(moe_model_set_vocab(model, base.vocab, base.vocab_bytes, &env));
  memset(&import, 0, sizeof import);
  import.noise = (float)opt.noise;
  import.seed = (uint64_t)seed;
  read_from(source.init, 0);
  if (has_parent(system))
    go_on_from_parent(model, model_of(PARENT, seed), &import);
  else if (base.file)
    need(moe_model_import(model, base.file, base.file_bytes, &import, &env));
  read_from(NULL, 0);
  free(of);
  return model;
}

/* The vectors that MT-Embed has learned, a line for each task. */
static void print_vectors(moe_model *model, int seed) {
  moe_tensor t;
  int i, j;
  moe_model_tensor(model, moe_model_find_tensor(model, "tasks.vectors"), &t);
  printf("\nTask vectors of MT-Embed (seed %d)\n", seed);
  for (i = 0; i < t.shape[0]; ++i) {
    printf("%-15.15s", moe_model_task(model, i)->name);
    for (j = 0; j < t.shape[1]; ++j)
      printf(" %8.4f", (double)moe_model_weights(model)[t.offset + (size_t)(i * t.shape[1] + j)]);
    printf("\n");
  }
}

static char *run_name(int system, int seed) { return printed("%s %d", systems[system].name, seed); }

static char *part_name(int system, int seed, int t) {
  return printed("%s %d %s", systems[system].name, seed, tasks[t].task.name);
}

/* The model is asked about the dev rows of task t; its answers go to `lines_of` too, unless NULL.
   */
static part *evaluate_part(const char *name, const moe_model *model, int32_t model_task, int t,
                           int routes, text *lines_of) {
  const task_data *d = &tasks[t];
  const moe_config *c = moe_model_config(model);
  size_t T = (size_t)moe_model_tasks(model), cells = (size_t)(c->layers * c->experts);
  moe_context *context = make_context(model);
  moe_route_sums sums;
  part *p = new_part(name, t);
  int64_t at = 0;
  int k;
  memset(&sums, 0, sizeof sums);
  sums.tokens = (int64_t *)take(T, sizeof *sums.tokens);
  sums.chosen = (int64_t *)take(T * cells, sizeof *sums.chosen);
  for (k = 0; k < d->n_dev; at += d->dev[k++].n) {
    answers a = score_rows(context, model, &d->dev[k], model_task, &sums);
    p->value += metric_of(&d->task, 0, a.answer, a.label, a.n, &p->defined) / d->n_dev;
    if (lines_of) write_answers(lines_of, &d->task, k + 1, &d->dev[k], &a);
    memcpy(p->answer + at, a.answer, (size_t)a.n * sizeof *a.answer);
    free_answers(&a);
  }
  if (routes && c->experts > 1)
    memcpy(p->routes = new_routes(), sums.chosen + (size_t)model_task * cells,
           cells * sizeof *p->routes);
  free(sums.tokens), free(sums.chosen);
  moe_context_free(context);
  return p;
}

static void set_cost(part *p, const job *j, const moe_model *model, int64_t steps) {
  p->score = j->score;
  p->tokens = j->tokens;
  p->seconds = j->seconds;
  p->steps = (double)steps;
  p->parameters = (double)moe_model_parameters(model);
}

/* Trains one model on n tasks and keeps the parts of those tasks. The model is the caller's. */
static moe_model *train_run(int system, int seed, const int *which, int n, const char *alone) {
  moe_model *model = make_model(system, seed, which, n);
  text lines_of_answers = {NULL, 0, 0};
  int i, files = system != PARENT;
  int64_t n_rows = all_rows(which, n), steps = steps_for(n_rows, all_rows(NULL, n_tasks));
  int64_t parents = (int64_t)ceil(opt.parent * (double)steps);
  part **done = (part **)take((size_t)n, sizeof *done);
  job j = new_job(alone ? part_name(system, seed, *which) : run_name(system, seed),
                  printed("%s%s%.40s seed %d", systems[system].title, alone ? " " : "",
                          alone ? alone : "", seed),
                  seed, which, n);
  if (has_parent(system)) steps = steps > parents ? steps - parents : 1;
  if (system == PARENT) steps = parents;
  set_length(&j, steps, (n_rows + opt.batch - 1) / opt.batch, opt.batch);
  j.choose = opt.hold_out > 0;
  j.patience = opt.early_stop ? opt.early_stop : INT64_MAX;
  if (opt.keep && files) j.after = keep_on_the_way;
  j.path = run_path(checkpoint_name(), system, seed, alone);
  if (state.resume) j.from = run_path(state.resume, system, seed, alone);
  if (j.from && system == PARENT && n_runs == 1 && !n_finished && !exists(j.from))
    j.from = state.resume; /* which is not there either, and that is said now */
  train_model(&j, model);
  put(&lines_of_answers, "task\tset\tline\tlabel\tprediction\tscores\n");
  for (i = 0; i < n; ++i)
    done[i] = evaluate_part(part_name(system, seed, which[i]), model, i, which[i], 1,
                            opt.predictions ? &lines_of_answers : NULL);
  if (opt.predictions && files)
    save_text(&lines_of_answers, run_path(opt.predictions, system, seed, alone));
  if (opt.save && files) write_model(model, run_path(opt.save, system, seed, alone));
  set_cost(done[0], &j, model, steps);
  for (i = 0; i < n; ++i) join_part(done[i]);
  if (state.checkpoint) write_parts(state.checkpoint);
  free(done), free(lines_of_answers.data);
  if (system == EMBED) print_vectors(model, seed);
  if (opt.tidy && state.checkpoint && !opt.fine_tune && files) remove_checkpoint(j.path);
  return model;
}

/* Where an interrupted program leaves the model of a first stage, and where an earlier one has. */
static char *kept_path(const char *file, int system, int seed) {
  char *path = run_path(file, system, seed, NULL);
  return opt.hold_out > 0 ? best_path(path) : path;
}

static moe_model *train_all(int system, int seed) {
  int *all = (int *)lasting((size_t)n_tasks, sizeof *all), t;
  moe_model *model;
  for (t = 0; t < n_tasks; ++t) all[t] = t;
  model = train_run(system, seed, all, n_tasks, NULL);
  keep_model(kept_path(checkpoint_name(), system, seed), model, system != PARENT);
  return model;
}

/* The model of a first stage: just trained, or that of an earlier process, or trained again. */
static moe_model *model_of(int system, int seed) {
  const char *path = kept_path(checkpoint_name(), system, seed), *old;
  const kept_model *k;
  moe_model *model;
  if (from_model) return from_model;
  for (k = kept_models; k; k = k->next)
    if (!strcmp(k->path, path)) return k->model;
  old = state.resume ? kept_path(state.resume, system, seed) : NULL;
  if (!old || !find_part(part_name(system, seed, 0)) || !exists(old))
    return train_all(system, seed);
  need(moe_model_load(&model, old, &env));
  keep_model(path, model, system != PARENT);
  return model;
}

/* The first stage of one system and seed, or what is missing of it. */
static void run_first(result *r) {
  int t, missing = file_missing(opt.save, r->line, r->seed, NULL) ||
                   file_missing(opt.predictions, r->line, r->seed, NULL);
  for (t = 0; t < n_tasks; ++t) {
    const char *name = tasks[t].task.name;
    int lost = !find_part(part_name(r->line, r->seed, t));
    missing |= lost;
    if (r->line == SINGLE && !opt.report &&
        (lost || file_missing(opt.save, SINGLE, r->seed, name) ||
         file_missing(opt.predictions, SINGLE, r->seed, name)))
      moe_model_free(train_run(SINGLE, r->seed, &t, 1, name));
  }
  if (missing && r->line != SINGLE && !opt.report) train_all(r->line, r->seed);
  for (t = 0; t < n_tasks; ++t) {
    r->part[t] = find_part(part_name(r->line, r->seed, t));
    if (!r->part[t]) continue;
    r->tokens += r->part[t]->tokens;
    r->seconds += r->part[t]->seconds;
    r->steps += r->part[t]->steps;
    r->parameters += r->part[t]->parameters;
  }
}

/* ---- the second stage ---- */

/* Where a second stage begins: a model of one task, made when a part is missing. */
typedef struct beginning {
  const result *run; /* tuning a task of it, or */
  int32_t gate;      /* --adapt */
  int seed, task;
  moe_model *model;
} beginning;

static const moe_model *begin_with(beginning *b) {
  const moe_model *whole_model;
  moe_model *more = NULL;
  int32_t at;
  if (b->model) return b->model;
  if (b->run ? b->run->line == TUNED + SINGLE : !from_model)
    return b->model = make_model(SINGLE, b->seed, &b->task, 1);
  if (b->run) {
    whole_model = model_of(b->run->line - TUNED, b->seed);
    at = moe_model_find_task(whole_model, tasks[b->task].task.name);
  } else {
    need(
        moe_model_adapt(&more, from_model, &tasks[b->task].task, b->gate, (uint64_t)b->seed, &env));
    whole_model = more;
    at = moe_model_tasks(from_model);
  }
  need(moe_model_extract(&b->model, whole_model, &at, 1, NULL, &env));
  moe_model_free(more);
  return b->model;
}

/* Epochs of the second stage at most. Single-Task has no other: it gets what the others train on
   its task in both stages together. */
static int64_t second_epochs(const beginning *b, int64_t epoch) {
  int64_t first, length = epoch * opt.fine_batch;
  if (!b->run || b->run->line != TUNED + SINGLE) return opt.fine_tune;
  first = steps_for(tasks[b->task].train.n, all_rows(NULL, n_tasks)) * opt.batch;
  return opt.fine_tune + (first + length - 1) / length;
}

/* Trains a copy of a model of one task on that task's rows; keeps the best epoch, ends after
   --patience epochs that are no better [TaG] 4.5, A.3.2. One pair of the grid; the model goes to
   `save` if its score is above `least`. */
static part *tune_pair(const char *name, const char *title, beginning *b, const char *rate,
                       const char *warmup, const char *save, double least) {
  moe_model *model = copy_model(begin_with(b));
  int64_t epoch = (tasks[b->task].train.n + opt.fine_batch - 1) / opt.fine_batch;
  job j = new_job(name, title, b->seed, &b->task, 1);
  part *p;
  if (opt.fine_epoch && opt.fine_epoch < epoch) epoch = opt.fine_epoch;
  set_length(&j, epoch * second_epochs(b, epoch), epoch, opt.fine_batch);
  j.one_of_many = 1;
  j.choose = opt.hold_out > 0 ? 1 : 2;
  j.patience = opt.patience;
  j.config.lr = (float)number("--grid", rate, 1e-12, 1e6);
  j.config.warmup = (float)number("--grid", warmup, 0, 1);
  j.path = with_suffix(checkpoint_name(), "tuning");
  if (state.resume) j.from = with_suffix(state.resume, "tuning");
  train_model(&j, model);
  p = evaluate_part(name, model, 0, b->task, 0, NULL);
  set_cost(p, &j, model, j.best_step);
  if (save && p->score > least) write_model(model, save);
  moe_model_free(model);
  join_part(p);
  if (state.checkpoint) write_parts(state.checkpoint);
  if (state.checkpoint) remove_checkpoint(j.path);
  return find_part(name);
}

/* Tries the whole grid for one task; the best by its score. `prefix` names the parts, their costs
   go to r, `save` is the file for the best model, or NULL. NULL with --report, where a part is
   missing. */
static const part *tune(result *r, const char *prefix, const char *title, beginning *b,
                        const char *save) {
  const part *best = NULL;
  int i, k, again = save && !opt.report && !exists(save), missing = 0;
  for (i = 0; i < grid_rates.n; ++i)
    for (k = 0; k < grid_warmups.n; ++k) {
      const char *rate = grid_rates.at[i], *warmup = grid_warmups.at[k];
      const char *name = printed("%s %s %s", prefix, rate, warmup);
      const part *p = find_part(name);
      missing |= !p;
      if ((!p || again) && !opt.report)
        p = tune_pair(name, title, b, rate, warmup, save, best ? best->score : -HUGE_VAL);
      if (!p) continue;
      if (opt.grid)
        printf("%s: rate %s, warm-up %s: %.4f to choose by, %.4f on dev\n", title, rate, warmup,
               p->score, p->value);
      r->tokens += p->tokens;
      r->seconds += p->seconds;
      if (!best || p->score > best->score) best = p;
    }
  if (best) {
    r->steps += best->steps;
    r->parameters += best->parameters;
  }
  moe_model_free(b->model);
  b->model = NULL;
  return missing && opt.report ? NULL : best;
}

/* Fine-tunes every task of the table, each by itself. */
static void run_second(result *r) {
  int t;
  for (t = 0; t < n_tasks; ++t) {
    const char *task = tasks[t].task.name;
    beginning b;
    memset(&b, 0, sizeof b);
    b.run = r;
    b.task = t;
    b.seed = r->seed;
    r->part[t] = tune(r, part_name(r->line, r->seed, t),
                      printed("%s %.40s seed %d", systems[r->line].title, task, r->seed), &b,
                      opt.save ? run_path(opt.save, r->line, r->seed, task) : NULL);
  }
  if (opt.tidy && state.checkpoint && !opt.from && r->line != TUNED + SINGLE)
    remove_checkpoint(run_path(state.checkpoint, r->line - TUNED, r->seed, NULL));
}

/* ---- tasks that join a model ---- */

/* What --gate-from names: a task of the model, or one of moe_model_adapt's words. */
static int32_t gate_number(const char *name) {
  int32_t t = from_model ? moe_model_find_task(from_model, name) : -1;
  if (t >= 0) return t;
  if (!strcmp(name, "random")) return MOE_GATE_RANDOM;
  if (!strcmp(name, "mean") && from_model) return MOE_GATE_MEAN;
  if (!from_model)
    die("--gate-from: without --from there is no model to take the gates of \"%s\" from", name);
  die("--gate-from: \"%s\" is neither random nor mean nor a task of %s", name, opt.from);
}

/* "100" or "10%" of n rows. */
static int64_t few_rows(const char *wanted, int64_t n) {
  char *end;
  double v = strtod(wanted, &end);
  if (end != wanted && !strcmp(end, "%"))
    v = ceil(v / 100 * (double)n);
  else if (*end || end == wanted)
    v = 0;
  if (!(v >= 1 && v <= (double)n))
    die("--rows: \"%s\" is neither a number from 1 to %lld nor a share such as 10%%", wanted,
        (long long)n);
  return (int64_t)v;
}

/* Adds a run; dies where it was there already. */
static result *add_result(int of, int seed) {
  result *r = &results[n_results++];
  int i;
  for (i = 0; i < n_results - 1; ++i)
    if (results[i].line == of && results[i].seed == seed)
      die("%s with seed %d is listed twice", lines[of].name, seed);
  r->line = of;
  r->seed = seed;
  r->part = (const part **)lasting((size_t)n_tasks, sizeof *r->part);
  return r;
}

/* One gate, one number of rows, one seed. */
static void adapt_once(result *r, int64_t wanted, const rows *all, int several) {
  const char *gate = lines[r->line].name, *save = opt.save;
  long long n = wanted;
  beginning b;
  memset(&b, 0, sizeof b);
  b.gate = gate_number(gate);
  b.seed = r->seed;
  if (save && several) save = with_suffix(save, printed("%s-%lld-%d", gate, n, r->seed));
  tasks[0].train = draw_rows(all, wanted, r->seed);
  r->part[0] = tune(r, printed("adapt %d %s %s %lld", r->seed, tasks[0].task.name, gate, n),
                    printed("%.30s, %lld rows, seed %d", gate, n, r->seed), &b, save);
  free_rows(&tasks[0].train);
}

/* A line of the table, and of the JSON. */
static void adapt_line(int s, int64_t n, text *json) {
  const char *gate = lines[s].name, *comma = "";
  summary of = summarize(s, 0);
  const result *r;
  if (!of.n) {
    printf("%-16.16s %8lld %8s %12s %8s\n", gate, (long long)n, "-", "-", "-");
    return;
  }
  printf("%-16.16s %8lld %8.1f %12s %8.1f\n", gate, (long long)n, 100 * of.most,
         printed("%.1f+-%.1f", 100 * of.mean, 100 * of.deviation), of.seconds / of.n);
  fflush(stdout);
  put_json(json, "%s\n  {'gate': '%s', 'rows': %lld, 'maximum': %.9g, 'mean': %.9g, ",
           json->data[json->bytes - 1] == '}' ? "," : "", gate, (long long)n, of.most, of.mean);
  put_json(json, "'deviation': %.9g, 'seeds': [", of.deviation);
  for (r = results; r < results + n_results; ++r) {
    if (r->line != s || !r->part[0]) continue;
    put_json(json, "%s{'seed': %d, 'value': %.9g, 'steps': %.0f}", comma, r->seed,
             r->part[0]->value, r->steps);
    comma = ", ";
  }
  put(json, "]}");
}

/* --adapt: a task that the model does not know, from each gate, on each number of rows (a stage of
   the table), with each seed [TaG] Tables 2 and 6. */
static void run_adapt(void) {
  list gate = split(opt.gate_from, ','), few = split(opt.few ? opt.few : "100%", ',');
  int i, k, stages = few.n;
  line *of = (line *)lasting((size_t)(gate.n * stages), sizeof *of);
  rows all = tasks[0].train;
  text json = {NULL, 0, 0};
  for (i = 0; i < gate.n; ++i) gate_number(gate.at[i]); /* better known before the first run */
  for (i = 0; i < stages; ++i) few_rows(few.at[i], all.n);
  lines = of;
  n_lines = gate.n * stages;
  results = (result *)lasting((size_t)(n_lines * seed_list.n), sizeof *results);
  put_json(&json, "{'adapt': '%s', 'runs': [", tasks[0].task.name);
  printf("\n%-16s %8s %8s %12s %8s\n", from_model ? "gates from" : "Single-Task", "rows", "maximum",
         "mean", "seconds");
  for (i = 0; i < n_lines; ++i) {
    int64_t wanted = few_rows(few.at[i / gate.n], all.n);
    of[i].name = of[i].title = gate.at[i % gate.n];
    of[i].stage = i / gate.n;
    for (k = 0; k < seed_list.n; ++k)
      adapt_once(add_result(i, atoi(seed_list.at[k])), wanted, &all, n_lines * seed_list.n > 1);
    adapt_line(i, wanted, &json);
    if (i % gate.n == gate.n - 1) compare_lines(of[i].stage);
  }
  tasks[0].train = all;
  print_comparisons();
  put(&json, "\n ]}\n");
  if (opt.json) save_text(&json, opt.json);
}

/* ---- main ---- */

/* The runs that were asked for, in the order in which they are trained; with --from only second
   stages. */
static void make_results(void) {
  static const int system_of[] = {DENSE, SWITCH, TAG, DENSE, EMBED};
  list name = split(from_model ? systems[system_of[base.config.router]].name : opt.systems, ',');
  int i, j, system, parents = 0;
  lines = systems;
  n_lines = 2 * SYSTEMS;
  results = (result *)lasting((size_t)(3 * name.n * seed_list.n), sizeof *results);
  for (i = 0; i < name.n; ++i) {
    for (system = SYSTEMS - 1; system >= 0 && strcmp(systems[system].name, name.at[i]); --system)
      continue;
    if (system < 0 || system == PARENT)
      die("--systems: \"%s\" is not one of single, dense, switch, tag, embed", name.at[i]);
    for (j = 0; j < seed_list.n && has_parent(system) && !parents; ++j)
      add_result(PARENT, atoi(seed_list.at[j]));
    parents |= has_parent(system);
    for (j = 0; j < seed_list.n; ++j) {
      int seed = atoi(seed_list.at[j]), second = opt.fine_tune > 0;
      n_runs += 1 + (second && system != SINGLE && !from_model);
      if (!second || (system != SINGLE && !from_model)) add_result(system, seed);
      if (second) add_result(TUNED + system, seed); /* Single-Task has this stage alone */
    }
  }
}

static void run_all(void) {
  int i, all = n_results;
  for (n_results = 1; n_results <= all; ++n_results) {
    result *r = &results[n_results - 1];
    if (r->line >= TUNED)
      run_second(r);
    else
      run_first(r);
    if (n_results == all || results[n_results].line < TUNED) drop_kept();
    if (opt.json) write_json(opt.json, NULL); /* what is finished is kept, whatever happens */
  }
  n_results = all;
  for (i = 0; i < all && opt.tidy && state.checkpoint; ++i)
    if (results[i].line == PARENT)
      remove_checkpoint(run_path(state.checkpoint, PARENT, results[i].seed, NULL));
  print_table();
  if (opt.parent > 0) {
    print_sentence("Dense parent: the first %.0f %% of the steps, on all tasks; every multi-task "
                   "system continues from it for the rest (its seconds are not counted).",
                   100 * opt.parent);
    print_sentence("Single-Task: each task from scratch, for its share of all steps.");
  }
  release_interrupts();
  compare_lines(0);
  compare_lines(1);
  print_comparisons();
  if (opt.json) write_json(opt.json, NULL);
  print_routes();
}

/* --from: configuration, vocabulary and tasks are the model's. */
static void open_from(void) {
  int t;
  need(moe_model_load(&from_model, opt.from, &env));
  encoder_of_model(&base, from_model, opt.from);
  opt.experts = base.config.experts;
  if (base.config.unit == MOE_UNIT_BLOCK)
    die("%s has blocks as experts, which the second stage does not know", opt.from);
  for (t = 0; t < n_tasks; ++t) {
    const moe_task *task = &tasks[t].task, *old;
    int at = moe_model_find_task(from_model, task->name);
    if (opt.adapt && at >= 0)
      die("%s knows the task %s already: leave --adapt away to fine-tune it", opt.from, task->name);
    if (opt.adapt) continue;
    if (at < 0)
      die("%s does not know the task %s: --tasks chooses others, --adapt lets it join", opt.from,
          task->name);
    old = moe_model_task(from_model, at);
    if (old->kind != task->kind || old->classes != task->classes)
      die("%s knows the task %s with %d outputs; tasks.tsv has another kind or number of labels",
          opt.from, task->name, (int)old->classes);
  }
}

static void read_all_rows(void) {
  double n = 0, tokens = 0;
  int t;
  for (t = 0; t < n_tasks; ++t) read_task_rows(&tasks[t], &base, 0);
  if (opt.dedup) remove_overlaps();
  if (opt.hold_out > 0) hold_out_rows(opt.hold_out, opt.hold_most);
  for (t = 0; t < n_tasks; ++t)
    n += (double)tasks[t].train.n, tokens += (double)tasks[t].train.tokens;
  if (!(opt.tokens > 0)) return;
  tokens = ceil(opt.tokens / (tokens / n * opt.batch));
  if (tokens > 1e9)
    die("--tokens %.0f are %.0f steps, 1000000000 are the most", opt.tokens, tokens);
  opt.steps = (int)tokens;
}

/* The options as they turned out to be decide the results. */
static void settle_options(void) {
  const moe_config *c = &base.config;
  source.layers = c->layers;
  source.hidden = c->hidden;
  source.ffn = c->ffn;
  source.heads = c->heads;
  source.eps = (double)c->eps;
  source.cased = c->cased;
  source.max_len = c->max_len;
  route_layers = c->layers;
  route_experts = opt.experts;
  note_options(all_options, deciding, &base, from_model);
}

int main(int argc, char **argv) {
  int i;
  begin_program("train", argc, argv);
  read_options(
      "[options]\nTrains several systems on a folder of tasks and prints one table. For "
      "example:\n./train --data my_tasks --init MiniLM/model.safetensors --systems dense,tag "
      "--save tag.safetensors",
      all_options);
  check_options();
  open_machine(0);
  seed_list = split(opt.seeds, ',');
  for (i = 0; i < seed_list.n; ++i) whole("--seeds", seed_list.at[i], 0, 2147483647);
  if (opt.adapt && strchr(opt.adapt, ',')) die("--adapt takes one task");
  read_tasks(opt.adapt ? opt.adapt : data.names);
  if (opt.from)
    open_from();
  else
    open_task_encoder(&base);
  if (!opt.from)
    base.config.truncate =
        !strcmp(opt.truncate, "right") ? MOE_TRUNCATE_RIGHT : MOE_TRUNCATE_LONGEST;
  if (!opt.adapt) make_results();
  read_all_rows();
  settle_options();
  printf("%d task%s, %d layers x %d, %s, %d thread%s, %s%s%s%s%s\n", n_tasks,
         n_tasks == 1 ? "" : "s", (int)base.config.layers, (int)base.config.hidden,
         opt.from      ? opt.from
         : source.init ? source.init
                       : "from scratch",
         (int)env.threads, env.threads == 1 ? "" : "s", moe_isa_name(env.isa),
         env.precision == MOE_TYPE_BF16 ? ", " : "",
         env.precision == MOE_TYPE_BF16 ? precision_name() : "", env.backend ? ", " : "",
         env.backend ? moe_backend_name(&env) : "");
  fflush(stdout);
  lock_checkpoint();
  if (state.resume) read_parts(state.resume);
  catch_interrupts();
  if (opt.adapt)
    run_adapt();
  else
    run_all();
  return end_program(stdout);
}
