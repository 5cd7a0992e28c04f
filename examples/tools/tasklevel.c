/* tasklevel.c - whole transformer blocks as experts, chosen by the task: the systems of "Task-level
   Mixture-of-Experts" [TL], side by side
     cc -O3 -o tasklevel examples/tools/tasklevel.c -lm -pthread
     ./tasklevel                  the bundled tasks, seven systems, one table

   multi: one block a layer for all tasks; random1 and random2: every task takes one or two blocks
   of each layer, drawn once; average: the mean of all blocks; softmax, gumbel and straight learn
   their routes. From top to bottom: options, models, task vectors, routes, one training, a task
   never seen, saving, results, main. */
#define MOE_IMPLEMENTATION
#include "training.h"

#include "routers.h"

/* ---- options ---- */

enum { MULTI, RANDOM1, RANDOM2, AVERAGE, SOFTMAX, GUMBEL, STRAIGHT, SYSTEMS };
static const char *const system_name[SYSTEMS] = {"multi",   "random1", "random2", "average",
                                                 "softmax", "gumbel",  "straight"};
static const char system_list[] = "multi,random1,random2,average,softmax,gumbel,straight";

static struct {
  const char *systems, *router, *vectors, *seeds, *grid, *unseen, *shots, *learns, *vector_from;
  const char *head_from, *save, *json, *csv;
  double lr, router_rate, warmup, decay, clip, dropout, adapt_lr;
  int rows, blocks, freeze, epochs, steps, batch, homogeneous, two_stage, adapt_steps, looks;
} opt;

static const option level_options[] = {
    WHOLE("--rows", opt.rows, 1, 1000000000, NULL, "training rows of a task, the first ones [all]"),
    GROUP("model"),
    WHOLE("--layers", source.layers, 1, 1000, "3", "without --init: from scratch"),
    WHOLE("--hidden", source.hidden, 1, 65536, "64", "likewise"),
    WHOLE("--blocks", opt.blocks, 1, MOE_MAX_EXPERTS, "3", "blocks of a layer"),
    STRING("--systems", "LIST", opt.systems, system_list, "what is compared"),
    STRING("--router", "mlp|lstm|transformer", opt.router, "mlp", "from a task's vector to scores"),
    STRING("--vectors", "random|text|description|fisher", opt.vectors, "random",
           "the tasks' vectors: random; the encoder's mean output over training sentences, or over "
           "the column description of tasks.tsv; from Fisher information"),
    FLAG("--freeze", opt.freeze, "the vectors do not learn"),
    GROUP("training"),
    WHOLE("--epochs", opt.epochs, 1, 1000000, "4", "length of a stage"),
    WHOLE("--steps", opt.steps, 1, 1000000000, NULL, "the same in steps"),
    WHOLE("--batch", opt.batch, 1, 65536, "16", "sequences of a step"),
    FLAG("--homogeneous", opt.homogeneous, "all rows of a step are of one task"),
    REAL("--lr", "R", opt.lr, 1e-12, 1e6, NULL, "learning rate [1e-3, with --init 5e-5]"),
    REAL("--router-rate", "F", opt.router_rate, 0, 1e6, "10", "router and vectors: so much faster"),
    REAL("--warmup", "F", opt.warmup, 0, 1, "0.1", "fraction of the steps to reach the rate"),
    REAL("--decay", "D", opt.decay, 0, 1e6, "0.01", "weight decay"),
    REAL("--clip", "C", opt.clip, 0, 1e30, "1", "largest gradient norm"),
    REAL("--dropout", "P", opt.dropout, 0, 0.99, "0.1", "of hidden states and attention"),
    FLAG("--two-stage", opt.two_stage,
         "then the experts again from their first weights, under routes that go from the average "
         "to the learned ones; both stages get a line"),
    STRING("--grid", "RATES", opt.grid, NULL,
           "each system with steps of any tasks and of one, and with each router rate, 1,10 say"),
    STRING("--seeds", "1,2,3", opt.seeds, "1", "a run for each"),
    GROUP("a task never seen"),
    STRING("--unseen", "TASK", opt.unseen, NULL,
           "not trained on; then it joins each trained model"),
    STRING("--shots", "LIST", opt.shots, "0,16,64", "on so many of its training rows"),
    STRING("--learns", "vector|all", opt.learns, "vector", "its vector and head, or everything"),
    WHOLE("--adapt-steps", opt.adapt_steps, 1, 1000000000, "100", "for how long"),
    REAL("--adapt-lr", "R", opt.adapt_lr, 1e-12, 1e6, NULL, "how fast [1e-2, for all --lr]"),
    STRING("--vector-from", "random, mean, text or TASK", opt.vector_from, NULL,
           "its vector at first [text where --vectors is, else mean]"),
    STRING("--head-from", "TASK", opt.head_from, NULL,
           "its head at first [with 0 rows a task with the same labels, where there is one]"),
    GROUP("files"),
    STRING("--save", "FILE", opt.save, NULL,
           "the trained model with its routes; with several runs FILE gets -LINE-SEED"),
    STRING("--json", "FILE", opt.json, NULL, "all results"),
    STRING("--csv", "FILE", opt.csv, NULL, "the routes during training, for routes --history"),
    WHOLE("--looks", opt.looks, 2, 1000, "5", "so many times"),
    END_OF_OPTIONS};
static const option *const all_options[] = {data_options,  encoder_options, level_options,
                                            state_options, machine_options, NULL};
static const char deciding[] =
    "rows layers hidden heads eps cased max-len blocks systems router vectors freeze epochs steps "
    "batch homogeneous lr router-rate warmup decay clip dropout two-stage grid unseen shots learns "
    "adapt-steps adapt-lr vector-from head-from looks";

static int text_vectors(void) { return *opt.vectors == 't' || *opt.vectors == 'd'; }

/* What does not go together, and defaults that depend on other options. */
static void check_options(void) {
  if (!opt.vector_from) opt.vector_from = text_vectors() ? "text" : "mean";
  if (opt.unseen && !strcmp(opt.vector_from, "text") && !text_vectors())
    die("--vector-from text goes with --vectors text or description, which the other tasks have "
        "then, too");
  if (!(opt.lr > 0)) opt.lr = source.init ? 5e-5 : 1e-3;
  if (!(opt.adapt_lr > 0)) opt.adapt_lr = *opt.learns == 'v' ? 1e-2 : opt.lr;
  source.ffn = 4 * source.hidden;
  check_writable("--save", opt.save);
  check_writable("--checkpoint", state.checkpoint);
  check_writable("--json", opt.json);
  check_writable("--csv", opt.csv);
}

/* A line of the table. */
typedef struct setting {
  int system, one_task, stage; /* one_task: homogeneous */
  double rate;                 /* of the router */
} setting;

static setting *settings; /* (n_lines) */
static encoder base;
static list seeds, shots;
static int T, L, m;       /* tasks that are trained, layers, blocks */
static task_data *unseen; /* behind them, or NULL */

static int learns_routes(int system) { return system >= SOFTMAX; }
static size_t choices(void) { return (size_t)(T * L * m); }

/* ---- models ---- */

static float *tensor_of(moe_model *model, const char *name, size_t *count) {
  moe_tensor t;
  need(moe_model_tensor(model, moe_model_find_tensor(model, name), &t));
  if (count) *count = t.count;
  return moe_model_weights(model) + t.offset;
}

static void copy_tensor(moe_model *to, const char *to_name, moe_model *from, const char *name) {
  size_t n;
  float *w = tensor_of(to, to_name, &n);
  memcpy(w, tensor_of(from, name, NULL), n * sizeof *w);
}

static moe_model *create_model(const moe_config *c, int seed) {
  moe_task *of = (moe_task *)take((size_t)T, sizeof *of);
  moe_model *model;
  int t;
  for (t = 0; t < T; ++t) of[t] = tasks[t].task;
  need(moe_model_create(&model, c, of, T, (uint64_t)seed, &env));
  need(moe_model_set_vocab(model, base.vocab, base.vocab_bytes, &env));
  free(of);
  return model;
}

static moe_model *make_model(const setting *s, int seed) {
  moe_config c = base.config;
  moe_model *model;
  moe_import_options noise = {1e-8f, 1};
  moe_tensor t;
  int32_t i;
  c.unit = MOE_UNIT_BLOCK;
  c.router = learns_routes(s->system) ? MOE_ROUTER_TASK_LEVEL : MOE_ROUTER_DENSE;
  c.selection = (moe_selection)(learns_routes(s->system) ? s->system - SOFTMAX : 0);
  c.experts = s->system == MULTI ? 1 : m;
  if (*opt.vectors != 'r') c.task_dim = c.hidden;
  model = create_model(&c, seed);
  read_from(source.init, 0);
  if (base.file) need(moe_model_import(model, base.file, base.file_bytes, &noise, &env));
  read_from(NULL, 0);
  for (i = 0; i < moe_model_tensors(model) && !base.file; ++i) {
    char *block; /* from scratch, too, the blocks of a layer start as copies of one [TL] 2 */
    moe_model_tensor(model, i, &t);
    block = strstr(t.name, ".blocks.");
    if (block && block[8] != '0')
      copy_tensor(model, t.name, model,
                  printed("%.*s0%s", (int)(block + 8 - t.name), t.name, strchr(block + 8, '.')));
  }
  return model;
}

static task_router *make_router(const moe_model *model, int n, int seed) {
  task_router *r = router_create(*opt.router == 'l' ? ROUTER_LSTM : ROUTER_TRANSFORMER, n, L, m,
                                 moe_model_config(model)->task_dim, (uint64_t)seed, &env);
  if (!r) die("out of memory");
  return r;
}

/* ---- task vectors ---- */

/* Every column gets mean 0 and deviation 1 over the tasks that are trained: what they have in
   common does not tell them apart. */
static void standardize(float *v, int n, int32_t width) {
  int32_t i;
  int t;
  for (i = 0; i < width; ++i) {
    double mean = 0, square = 0;
    for (t = 0; t < T; ++t) mean += (double)v[t * width + i] / T;
    for (t = 0; t < T; ++t) square += pow((double)v[t * width + i] - mean, 2) / T;
    for (t = 0; t < n; ++t)
      v[t * width + i] = (float)(((double)v[t * width + i] - mean) / (sqrt(square) + 1e-6));
  }
}

/* The row of a description. */
static rows describe(const task_data *d) {
  moe_tokens out = make_tokens(base.config.max_len);
  moe_text words = moe_text_of(d->description, NULL);
  rows r;
  row x;
  if (!d->description)
    die("--vectors description: task %s has none, tasks.tsv should have a column description",
        d->task.name);
  memset(&r, 0, sizeof r);
  memset(&x, 0, sizeof x);
  need(moe_encode(base.tokenizer, &out, &words, base.config.max_len, MOE_TRUNCATE_LONGEST, &env));
  append_row(&r, &x, out.ids, out.segments, out.count);
  return r;
}

/* Adds the mean over a row's tokens of the encoder's output, or the squared gradients of the bias
   behind the last layer's feed-forward network, to v (H), which is the mean of n rows. */
static void add_vector(float *v, moe_trainer *trainer, const moe_model *model, batch_buffer *b,
                       int64_t n) {
  float *scores = (float *)take((size_t)moe_model_max_classes(model), sizeof *scores), *g;
  const float *hidden;
  int32_t H = base.config.hidden, i, k;
  moe_tensor bias;
  if (*opt.vectors == 'f') {
    moe_model_tensor(
        model,
        moe_model_find_tensor(model, printed("encoder.layer.%d.blocks.0.output.dense.bias", L - 1)),
        &bias);
    need(moe_trainer_accumulate(trainer, &b->batch, 0, NULL, NULL, &env));
    g = moe_trainer_gradients(trainer) + bias.offset;
    for (i = 0; i < H; ++i) v[i] += g[i] * g[i] / (float)n;
    memset(moe_trainer_gradients(trainer), 0, moe_model_parameters(model) * sizeof *g);
  } else {
    need(moe_forward(moe_trainer_context(trainer), scores, &b->batch, &env));
    hidden = moe_context_hidden(moe_trainer_context(trainer));
    for (k = 0; k < b->tokens; ++k)
      for (i = 0; i < H; ++i) v[i] += hidden[k * H + i] / (float)(b->tokens * n);
  }
  free(scores);
}

/* Vectors (T, H) from outside, from an untrained model, and behind them the unseen task's: fisher
   is the logarithm of the mean squared gradients (the diagonal of the empirical Fisher
   information), of which the unseen task, without a head, gets the mean. NULL: they are random. */
static float *make_vectors(moe_model *model) {
  int32_t H = base.config.hidden, i, longest = moe_model_config(model)->max_len;
  int t, fisher = *opt.vectors == 'f', all = T + (unseen && !fisher);
  float *vectors = (float *)take((size_t)((T + 1) * H), sizeof *vectors);
  batch_buffer b = make_batch(longest, 1);
  moe_limits limits = {longest, 1, 1, 0};
  moe_train_config c;
  moe_trainer *trainer;
  moe_train_config_init(&c);
  c.steps = 1;
  c.dropout = 0;
  need(moe_trainer_create(&trainer, model, &limits, &c, &env));
  for (t = 0; t < all; ++t) {
    rows own, *r = &tasks[t].train;
    int64_t k, n;
    if (*opt.vectors == 'd') own = describe(&tasks[t]), r = &own;
    n = r->n < 64 ? r->n : 64;
    for (k = 0; k < n; ++k) {
      clear_batch(&b);
      add_row(&b, r, k, t < T ? t : 0, 0); /* the encoder does not know of tasks yet */
      add_vector(vectors + t * H, trainer, model, &b, n);
    }
    for (i = 0; i < H && fisher; ++i) vectors[t * H + i] = logf(vectors[t * H + i] + 1e-20f);
    if (r == &own) free_rows(&own);
  }
  moe_trainer_free(trainer);
  standardize(vectors, all, H);
  return vectors;
}

/* ---- routes ---- */

/* What is being trained, and where its passes take their routes from. */
static struct {
  const setting *of;
  int seed;
  moe_model *model;
  task_router *router; /* one of routers.h, or NULL: the model's own */
  const float *target; /* (T, L, m) fixed routes, or NULL */
  float *given;        /* the same; in stage 2 on their way there from the average */
  moe_task_router level;
  int run; /* its number, from 1 */
} now;

/* --csv: a line for each probability, run by run. */
static text history;

static int learning(void) { return learns_routes(now.of->system) && now.of->stage < 2; }

/* Routes that are drawn once: `count` of the blocks for each of n tasks and layer, of equal weight,
   each with the chance that makes all choices alike. */
static void draw_routes(float *routes, int n, int count, int seed) {
  int t, l, i, taken;
  for (t = 0; t < n; ++t)
    for (l = 0; l < L; ++l, routes += m)
      for (i = taken = 0; i < m; ++i) {
        uint64_t key = moe_key((uint64_t)seed, 0, (uint64_t)t, (uint32_t)l, (uint32_t)i);
        int chosen = (int)(key % (uint64_t)(m - i)) < count - taken;
        taken += chosen;
        routes[i] = chosen ? 1.0f / (float)count : 0.0f;
      }
}

/* The routes of the router in charge at a temperature, or with tau 0 the largest. */
static void learned_routes(float *routes, float tau) {
  int k, i;
  if (!now.router) need(moe_task_router_routes(routes, now.model, tau, &env));
  for (k = 0; k < T * L && now.router; ++k, routes += m) {
    const float *z = now.router->scores + k * m;
    int best = 0;
    for (i = 1; i < m; ++i) best = z[i] > z[best] ? i : best;
    for (i = 0; i < m; ++i) routes[i] = tau > 0 ? (z[i] - z[best]) / tau : i == best ? 1.0f : 0.0f;
    if (tau > 0) moe_cross_entropy_forward(routes, routes, 0, m);
  }
}

/* Adds the routes of this moment to the history, and prints how discrete they are. */
static void look_at_routes(int64_t step, int64_t steps, double tau) {
  float *routes = (float *)take(choices(), sizeof *routes), *p = routes;
  const setting *s = now.of;
  text shown = {NULL, 0, 0};
  double most = 0;
  int t, l, b, best;
  learned_routes(routes, (float)tau);
  for (t = 0; t < T; ++t) {
    put(&shown, "    %-24s", tasks[t].task.name);
    for (l = 0; l < L; ++l, p += m) {
      for (best = b = 0; b < m; ++b) {
        best = p[b] > p[best] ? b : best;
        put(&history, "%d,%s,%s,%g,%d,%lld,%.6g,%s,%d,%d,%.6g\n", now.run, system_name[s->system],
            s->one_task ? "homogeneous" : "heterogeneous", s->rate, now.seed, (long long)step, tau,
            tasks[t].task.name, l + 1, b + 1, (double)p[b]);
      }
      most += (double)p[best] / (T * L);
      put(&shown, "  %c %3.0f", 'A' + best % 26, 100 * (double)p[best]);
    }
    put(&shown, "\n");
  }
  printf("  after %3.0f %% of the steps, temperature %.2f: the largest weight of a block is %.0f "
         "%% on average\n%s",
         100.0 * (double)step / (double)steps, tau, 100 * most, step == steps ? shown.data : "");
  fflush(stdout);
  free(routes), free(shown.data);
  if (opt.csv) need(moe_file_replace(opt.csv, write_text, &history, &env));
}

/* Keeps what comes before this run, and its looks up to a step that it goes on from. */
static void cut_history(int64_t step) {
  text all = history;
  list old = split(all.data ? all.data : "", '\n'), field;
  int i, run;
  memset(&history, 0, sizeof history);
  put(&history, "run,system,batching,router_rate,seed,step,temperature,task,layer,block,"
                "probability\n");
  for (i = 1; i < old.n; ++i) {
    field = split(old.at[i], ',');
    run = field.n == 11 ? atoi(field.at[0]) : now.run + 1;
    if (run < now.run || (run == now.run && step && atoll(field.at[5]) <= step))
      put(&history, "%s\n", old.at[i]);
  }
  free(all.data);
}

/* Makes the passes of a context use the routes of `now`. */
static void connect(moe_context *context) {
  memset(&now.level, 0, sizeof now.level);
  if (now.target)
    now.level.routes = now.given;
  else if (now.router) {
    now.level.scores = now.router->scores;
    now.level.dscores = now.router->dscores;
    router_forward(now.router, &env);
  }
  if (now.target || now.router) need(moe_context_task_router(context, &now.level, &env));
}

/* ---- one training ---- */

/* From the average to the learned routes in the first half of stage 2; elsewhere as they are. */
static void blend_routes(int64_t step, int64_t steps) {
  float share = now.of->stage == 2 ? 2 * (float)step / (float)steps : 1;
  if (now.target)
    moe_task_router_blend(now.given, now.target, share < 1 ? share : 1, choices() / (size_t)m, m);
}

static void begin_training(const job *j) {
  int64_t step = moe_trainer_steps_done(j->trainer);
  blend_routes(step, j->config.steps);
  connect(moe_trainer_context(j->trainer));
  if (!learning()) return;
  cut_history(step);
  if (!step) look_at_routes(0, j->config.steps, (double)moe_train_tau(&j->config, 0));
}

/* One step of the router outside of the model. */
static void update_router(task_router *r, const moe_train_config *c, int64_t step,
                          float vector_factor, float factor) {
  float rate = moe_train_lr(c, step);
  router_backward(r, &env);
  if (router_update(r, vector_factor * rate, factor * rate, c->weight_decay, c->clip_norm, &env))
    die("a gradient of the router is not a finite number; try a smaller --lr");
  router_forward(r, &env);
}

static void after_step(const job *j, const moe_model *model, int64_t step) {
  int64_t steps = j->config.steps;
  float rate = (float)now.of->rate;
  (void)model;
  blend_routes(step, steps);
  if (!learning()) return;
  if (now.router) update_router(now.router, &j->config, step, opt.freeze ? 0 : rate, rate);
  if (step * (opt.looks - 1) / steps > (step - 1) * (opt.looks - 1) / steps)
    look_at_routes(step, steps, (double)moe_train_tau(&j->config, step));
}

/* The router outside of the model: weights, gradients (zeros), moments. */
static void put_state(text *to) {
  size_t i;
  put(to, "%lld", (long long)now.router->step);
  for (i = 0; i < 4 * now.router->n; ++i) put(to, " %.9g", (double)now.router->w[i]);
}

static void get_state(const char *s) {
  char *end;
  size_t i;
  now.router->step = strtoll(s, &end, 10);
  for (i = 0; i < 4 * now.router->n; ++i) now.router->w[i] = strtof(s = end, &end);
  if (end == s) die("its note is damaged");
}

/* param (3): the first two are of router and vectors. */
static void set_training(moe_train_config *c, moe_param_group *param, int seed) {
  int64_t total = 0;
  int t;
  for (t = 0; t < T; ++t) total += tasks[t].train.n;
  moe_train_config_init(c);
  c->lr = (float)opt.lr;
  c->steps = opt.steps ? opt.steps : (total * opt.epochs + opt.batch - 1) / opt.batch;
  c->warmup = (float)opt.warmup;
  c->weight_decay = (float)opt.decay;
  c->clip_norm = (float)opt.clip;
  c->dropout = (float)opt.dropout;
  c->seed = (uint64_t)seed;
  param[0].match = "router.";
  param[1].match = "tasks.vectors";
  param[0].lr_scale = param[1].lr_scale = (float)now.of->rate;
  param[0].decay_scale = param[1].decay_scale = 1;
  c->groups = param;
  c->n_groups = 2;
}

static char *run_name(int at) { return printed("%s %d", lines[at].name, now.seed); }

/* FILE, or of several runs FILE-LINE-SEED. */
static char *run_path(const char *file, int at) {
  int i, runs = 0;
  for (i = 0; i < n_lines; ++i) runs += seeds.n * (settings[i].stage != 1);
  return n_lines * seeds.n == 1 || (runs == 1 && file == opt.save)
             ? printed("%s", file)
             : with_suffix(file, printed("%s-%d", lines[at].name, now.seed));
}

static job train(int at) {
  static moe_param_group param[2];
  int *all = (int *)lasting((size_t)T, sizeof *all), t;
  job j;
  memset(&j, 0, sizeof j);
  for (t = 0; t < T; ++t) all[t] = t;
  j.name = run_name(at);
  j.title = printed("%s, seed %d", lines[at].title, now.seed);
  j.path = run_path(checkpoint_name(), at);
  if (state.resume) j.from = run_path(state.resume, at);
  j.which = all;
  j.n = T;
  j.batch = opt.batch;
  j.micro_batch = 4096;
  set_training(&j.config, param, now.seed);
  if (opt.freeze) param[1].lr_scale = 0;
  if (!learning() || now.router) param[0].lr_scale = param[1].lr_scale = 0;
  j.sampling.seed = (uint64_t)now.seed;
  j.sampling.run = now.of->one_task ? opt.batch : 0;
  j.begin = begin_training;
  j.after = after_step;
  if (now.router) j.put_state = put_state, j.get_state = get_state;
  train_model(&j, now.model);
  return j;
}

/* The metric on the dev rows of a task, number t of the model; answers go to p, unless NULL. */
static double ask(moe_context *context, const moe_model *model, int32_t t, const task_data *d,
                  part *p) {
  double value = 0;
  int64_t at = 0;
  int k;
  for (k = 0; k < d->n_dev; at += d->dev[k++].n) {
    answers a = score_rows(context, model, &d->dev[k], t, NULL);
    value += metric_of(&d->task, 0, a.answer, a.label, a.n, p ? &p->defined : NULL) / d->n_dev;
    if (p) memcpy(p->answer + at, a.answer, (size_t)a.n * sizeof *a.answer);
    free_answers(&a);
  }
  return value;
}

/* ---- a task never seen [TL] 5 ---- */

static int trained_task(const char *what, const char *name) {
  int t = find_task(tasks, T, name);
  if (t < 0) die("%s: there is no task \"%s\" among those that are trained", what, name);
  return t;
}

/* The task whose head the unseen one takes over; -1: none. */
static int head_donor(int n) {
  int t;
  if (opt.head_from) {
    t = trained_task("--head-from", opt.head_from);
    if (tasks[t].task.kind != unseen->task.kind || tasks[t].task.classes != unseen->task.classes)
      die("--head-from: %s has other labels than %s", tasks[t].task.name, unseen->task.name);
    return t;
  }
  for (t = 0; t < T && !n; ++t)
    if (tasks[t].task.kind == unseen->task.kind && !strcmp(tasks[t].labels, unseen->labels))
      return t;
  return -1;
}

/* Where the unseen task's vector comes from. */
static int vector_donor(void) {
  return !strcmp(opt.vector_from, "text") || !strcmp(opt.vector_from, "random") ? MOE_GATE_RANDOM
         : !strcmp(opt.vector_from, "mean")                                     ? MOE_GATE_MEAN
                                            : trained_task("--vector-from", opt.vector_from);
}

/* The router with one task more. */
static task_router *router_with_task(const moe_model *model, const float *vector) {
  const task_router *from = now.router;
  task_router *r = make_router(model, T + 1, now.seed);
  size_t V = (size_t)r->V, old = (size_t)T * V, i;
  int donor = vector_donor(), t;
  float *to = r->w + old;
  memcpy(r->w, from->w, old * sizeof *r->w);
  memcpy(to + V, from->w + old, (from->n - old) * sizeof *r->w);
  if (vector) memcpy(to, vector, V * sizeof *to);
  if (donor >= 0) memcpy(to, from->w + (size_t)donor * V, V * sizeof *to);
  for (i = 0; i < V && donor == MOE_GATE_MEAN; ++i)
    for (to[i] = 0, t = 0; t < T; ++t) to[i] += from->w[(size_t)t * V + i] / (float)T;
  return r;
}

/* The trained model with the unseen task in it, its vector and its head as they begin. */
static moe_model *join(const float *vector, int donor) {
  int level = moe_model_config(now.model)->router == MOE_ROUTER_TASK_LEVEL;
  const char *name = unseen->task.name;
  moe_model *more;
  need(moe_model_adapt(&more, now.model, &unseen->task, level ? vector_donor() : MOE_GATE_RANDOM,
                       (uint64_t)now.seed, &env));
  if (level && vector)
    memcpy(tensor_of(more, "tasks.vectors", NULL) + T * base.config.hidden, vector,
           (size_t)base.config.hidden * sizeof *vector);
  if (donor >= 0) {
    const char *from = tasks[donor].task.name;
    copy_tensor(more, printed("heads.%s.weight", name), more, printed("heads.%s.weight", from));
    copy_tensor(more, printed("heads.%s.bias", name), more, printed("heads.%s.bias", from));
  }
  return more;
}

/* n rows of the unseen task, again and again. Blocks, router and all other tasks stay as they are
   unless --learns all. */
static void learn_unseen(moe_model *more, int n) {
  static moe_param_group param[3];
  int64_t *n_rows = (int64_t *)take(2 * (size_t)T + 2, sizeof *n_rows), step;
  int *which = (int *)take((size_t)T + 1, sizeof *which);
  rows all = unseen->train;
  moe_limits limits = {0, 0, 1, 0};
  batch_buffer b;
  job j;
  memset(&j, 0, sizeof j);
  set_training(&j.config, param, now.seed);
  if (*opt.learns == 'v') /* all is frozen but what follows */
    param[0].match = "", param[0].lr_scale = 0, param[1].lr_scale = 1;
  param[1].decay_scale = 0;
  param[2].match = printed("heads.%s.", unseen->task.name);
  param[2].lr_scale = param[2].decay_scale = 1;
  j.config.n_groups = 3;
  j.config.lr = (float)opt.adapt_lr;
  j.config.steps = opt.adapt_steps;
  j.sampling.seed = (uint64_t)now.seed;
  j.batch = n < opt.batch ? n : opt.batch;
  limits.tokens = j.batch * base.config.max_len;
  limits.sequences = j.batch;
  unseen->train = draw_rows(&all, n, now.seed);
  which[T] = T;
  n_rows[T] = unseen->train.n;
  j.which = which;
  j.n = T + 1;
  need(moe_trainer_create(&j.trainer, more, &limits, &j.config, &env));
  need(moe_sampler_init(&j.sampler, &j.sampling, n_rows, n_rows + T + 1, T + 1, &env));
  connect(moe_trainer_context(j.trainer));
  b = make_batch(limits.tokens, limits.sequences);
  for (step = 1; step <= opt.adapt_steps && !interrupted; ++step) {
    train_step(&j, &b, limits.tokens);
    if (now.router)
      update_router(now.router, &j.config, step, param[1].lr_scale, param[0].lr_scale);
  }
  moe_trainer_free(j.trainer);
  free_rows(&unseen->train), free(which), free(n_rows);
  unseen->train = all;
}

/* The unseen task's metric after n rows of it. NaN: with 0 rows and no head. */
static double adapt(const float *vector, int n) {
  int donor = head_donor(n), random = now.of->system == RANDOM1 || now.of->system == RANDOM2;
  task_router *router = now.router;
  const float *target = now.target;
  float *given = now.given;
  moe_context *context;
  moe_model *more;
  double value;
  if (!n && donor < 0) return (double)NAN;
  if (strcmp(opt.vector_from, "text")) vector = NULL;
  more = join(vector, donor);
  if (router) now.router = router_with_task(more, vector);
  if (!random) now.target = NULL;
  now.given = (float *)take((size_t)((T + 1) * L * m), sizeof *now.given);
  if (random) draw_routes(now.given, T + 1, now.of->system, now.seed);
  if (n) learn_unseen(more, n);
  context = make_context(more);
  connect(context);
  value = ask(context, more, T, unseen, NULL);
  moe_context_free(context);
  moe_model_free(more);
  if (router) router_free(now.router);
  free(now.given);
  now.router = router, now.target = target, now.given = given;
  return value;
}

/* ---- saving ---- */

/* A model file knows of the MLP router only. Any table of scores z (T, L, m) is one, though:
   vectors that are 6 at the task's place and 0 elsewhere, a first matrix that passes them on, and a
   second one of z / GELU(6). */
static moe_model *model_with_table(const float *z, moe_selection selection) {
  enum { INNER = 64 }; /* units of the router */
  moe_config c = *moe_model_config(now.model);
  moe_model *to;
  moe_tensor tensor;
  float six = 6, gelu, *w;
  int32_t i, l, t;
  if (T > INNER) die("--save: a model file can hold such routes of at most %d tasks", INNER);
  c.router = MOE_ROUTER_TASK_LEVEL;
  c.selection = selection;
  c.task_dim = INNER;
  moe_gelu_forward(&gelu, &six, 1, &env);
  to = create_model(&c, 1);
  for (i = 0; i < moe_model_tensors(to); ++i) {
    moe_model_tensor(to, i, &tensor);
    if (!strncmp(tensor.name, "router.", 7) || !strcmp(tensor.name, "tasks.vectors"))
      memset(moe_model_weights(to) + tensor.offset, 0, tensor.count * sizeof *w);
    else
      copy_tensor(to, tensor.name, now.model, tensor.name);
  }
  for (w = tensor_of(to, "tasks.vectors", NULL), t = 0; t < T; ++t) w[t * INNER + t] = six;
  for (l = 0; l < L; ++l) {
    w = tensor_of(to, printed("router.%d.0.weight", (int)l), NULL);
    for (i = 0; i < INNER; ++i) w[i * INNER + i] = 1;
    w = tensor_of(to, printed("router.%d.1.weight", (int)l), NULL);
    for (i = 0; i < m; ++i)
      for (t = 0; t < T; ++t) w[i * INNER + t] = z[(t * L + l) * m + i] / gelu;
  }
  return to;
}

static void save_model(const char *path) {
  moe_model *copy = NULL;
  float *z = (float *)take(choices(), sizeof *z);
  size_t i;
  if (now.target && !learns_routes(now.of->system)) {
    /* softmax at the temperature of inference gives them back */
    for (i = 0; i < choices(); ++i) z[i] = now.target[i] > 0 ? 0 : -100;
    copy = model_with_table(z, MOE_SELECT_SOFTMAX);
  } else if (now.router)
    copy = model_with_table(now.router->scores, moe_model_config(now.model)->selection);
  need(moe_model_save(copy ? copy : now.model, path, &env));
  moe_model_free(copy);
  free(z);
}

/* ---- results ---- */

static char *part_name(int at, int t) { return printed("%s %s", run_name(at), tasks[t].task.name); }

/* The unseen task's metric with shot number k, kept with the first part of a run; NaN: none. */
static double unseen_value(const result *r, int k) {
  list v = split(r->part[0]->more, ' ');
  return k < v.n && *v.at[k] ? strtod(v.at[k], NULL) : (double)NAN;
}

static void json_extra(text *to, const result *r) {
  const setting *s = &settings[r->line];
  const char *comma = "";
  char name[MOE_NAME_BYTES];
  int k;
  put_json(to, ",\n   'title': '%s', 'batching': '%s', 'router_rate': %g, 'stage': %d, 'unseen': [",
           lines[r->line].title, s->one_task ? "homogeneous" : "heterogeneous", s->rate,
           s->stage ? s->stage : 1);
  for (k = 0; k < shots.n; ++k) {
    if (isnan(unseen_value(r, k))) continue;
    moe_metric_name(name, &unseen->task, 0);
    put_json(to, "%s\n    {'name': '%s', 'rows': %s, 'metric': '%s', 'value': %.6f, 'n': %lld}",
             comma, unseen->task.name, shots.at[k], name, unseen_value(r, k),
             (long long)dev_rows(unseen));
    comma = ",";
  }
  put(to, "]");
}

static void print_unseen(void) {
  int s, i, k, n;
  if (!unseen) return;
  printf("\n%s, never seen, x 100 after so many of its rows; %s\n%-*s", unseen->task.name,
         *opt.learns == 'v' ? "its vector and head learn, nothing else" : "everything learns",
         title_width, "");
  for (k = 0; k < shots.n; ++k) printf(" %8s", shots.at[k]);
  for (s = 0; s < n_lines; ++s) {
    if (settings[s].stage == 1) continue;
    printf("\n%-*s", title_width, lines[s].title);
    for (k = 0; k < shots.n; ++k) {
      double sum = 0;
      for (i = n = 0; i < n_results; ++i)
        if (results[i].line == s && results[i].part[0]) sum += unseen_value(&results[i], k), ++n;
      printf(" %8s", n && !isnan(sum) ? printed("%.1f", 100 * sum / n) : "-");
    }
  }
  printf("\n");
}

/* ---- one line of the table after the other ---- */

/* Takes what is finished into a result. */
static void collect(result *r) {
  const part *p;
  int t;
  for (t = 0; t < T; ++t) r->part[t] = find_part(part_name(r->line, t));
  if ((p = r->part[0]) != NULL)
    r->seconds = p->seconds, r->tokens = p->tokens, r->steps = p->steps,
    r->parameters = p->parameters;
  if (opt.json) write_json(opt.json, json_extra); /* what is finished is kept */
}

/* Asks about the dev rows, of the unseen task as well; vector: that task's, or NULL. The model goes
   to `save` (or NULL) before the results say that the run is finished: killed between the two, it
   is saved again. */
static void finish(int at, const job *j, const float *vector, const char *save) {
  moe_context *context = make_context(now.model);
  part **done = (part **)take((size_t)T, sizeof *done);
  text more = {NULL, 0, 0};
  int t, k;
  connect(context);
  for (t = 0; t < T; ++t) {
    done[t] = new_part(part_name(at, t), t);
    done[t]->value = ask(context, now.model, t, &tasks[t], done[t]);
  }
  moe_context_free(context);
  for (k = 0; k < shots.n && now.of->stage != 1; ++k)
    put(&more, k ? " %.17g" : "%.17g", adapt(vector, atoi(shots.at[k])));
  if (interrupted) exit(128 + interrupted); /* the training's last checkpoint is there */
  if (more.data) done[0]->more = more.data;
  done[0]->tokens = j->tokens, done[0]->seconds = j->seconds;
  done[0]->steps = (double)j->config.steps;

  done[0]->parameters = (double)moe_model_parameters(now.model);
  if (save) save_model(save);
  for (t = 0; t < T; ++t) join_part(done[t]);
  if (state.checkpoint) write_parts(state.checkpoint);
  free(done);
}

/* A run, and the second stage that may follow it. */
static void run(result *r) {
  int two = settings[r->line].stage == 1, t;
  const char *save = opt.save ? run_path(opt.save, r[two].line) : NULL;
  size_t H = (size_t)base.config.hidden;
  float *vectors = NULL, *routes = (float *)take(choices(), sizeof *routes);
  moe_model *first = NULL;
  moe_tensor tensor;
  now.of = &settings[r->line];
  now.target = NULL;
  now.run = (int)(r - results) + 1;
  for (t = 0; t <= two; ++t) collect(r + t);
  if (r[two].part[0] && !(save && !exists(save))) return;
  now.model = make_model(now.of, now.seed);
  now.router = learning() && *opt.router != 'm' ? make_router(now.model, T, now.seed) : NULL;
  if (learning() && *opt.vectors != 'r') {
    vectors = make_vectors(now.model);
    memcpy(tensor_of(now.model, "tasks.vectors", NULL), vectors, (size_t)T * H * sizeof *vectors);
    if (now.router) memcpy(now.router->w, vectors, (size_t)T * H * sizeof *vectors);
  }
  if (now.of->system == RANDOM1 || now.of->system == RANDOM2) {
    draw_routes(routes, T, now.of->system, now.seed);
    now.target = routes;
  }
  for (;; ++r) {
    job j = train(r->line);
    const char *to = settings[r->line].stage == 1 ? NULL : save;
    if (!r->part[0])
      finish(r->line, &j, vectors ? vectors + (size_t)T * H : NULL, to);
    else if (to)
      save_model(to);
    collect(r);
    if (settings[r->line].stage != 1) break;
    learned_routes(routes, now.of->system == SOFTMAX ? base.config.temperature : 0);
    first = now.model;
    now.of = &settings[r->line + 1];
    now.model = make_model(now.of, now.seed);
    now.target = routes;
    for (t = 0; t < moe_model_tensors(first); ++t) {
      moe_model_tensor(first, t, &tensor);
      if (!strncmp(tensor.name, "router.", 7) || !strcmp(tensor.name, "tasks.vectors"))
        copy_tensor(now.model, tensor.name, first, tensor.name);
    }
  }
  moe_model_free(first), moe_model_free(now.model);
  router_free(now.router);
  free(routes), free(vectors);
}

static void add_line(int system, int one_task, double rate, int stage) {
  static line *all;
  setting s = {system, one_task, stage, rate};
  text name = {NULL, 0, 0}, title = {NULL, 0, 0};
  all = (line *)grow(all, (size_t)n_lines + 1, sizeof *all);
  settings = (setting *)grow(settings, (size_t)n_lines + 1, sizeof *settings);
  put(&name, "%s", system_name[system]);
  put(&title, "%s", system_name[system]);
  if (opt.grid)
    put(&name, one_task ? "-one" : "-any"), put(&title, one_task ? ", one task" : ", any tasks");
  if (opt.grid && learns_routes(system)) put(&name, "-%g", rate), put(&title, ", x%g", rate);
  if (stage) put(&name, "-%d", stage), put(&title, ", stage %d", stage);
  settings[n_lines] = s;
  all[n_lines].name = name.data;
  all[n_lines].title = title.data;
  all[n_lines++].stage = 0;
  if ((int)title.bytes > title_width) title_width = (int)title.bytes;
  lines = all;
}

static void make_lines(void) {
  list name = split(opt.systems, ','),
       rate = split(opt.grid ? opt.grid : printed("%g", opt.router_rate), ',');
  int s, h, k, i, listed[SYSTEMS] = {0};
  for (i = 0; i < name.n; ++i) {
    for (s = 0; s < SYSTEMS && strcmp(name.at[i], system_name[s]); ++s) continue;
    if (s == SYSTEMS)
      die("--systems: \"%s\" is none of %s", name.at[i],
          "multi, random1, random2, average, softmax, gumbel, straight");
    listed[s] = 1;
  }
  if (listed[RANDOM2] && m < 2) die("random2 takes two blocks, --blocks is %d", m);
  for (s = 0; s < SYSTEMS; ++s)
    for (h = 0; h < 2; ++h)
      for (k = 0; k < rate.n && (k == 0 || learns_routes(s)); ++k) {
        double r = number("--grid", rate.at[k], 0, 1e6);
        if (!listed[s] || (!opt.grid && h != opt.homogeneous)) continue;
        add_line(s, h, r, opt.two_stage && learns_routes(s) ? 1 : 0);
        if (opt.two_stage && learns_routes(s)) add_line(s, h, r, 2);
      }
}

/* The tasks that are trained, and the unseen one behind them. */
static void open_tasks(void) {
  const char *path = data.names;
  int t, k;
  if (opt.unseen && path) {
    list names = split(path, ',');
    for (k = 0; k < names.n; ++k)
      if (!strcmp(names.at[k], opt.unseen)) die("--unseen %s is in --tasks, too", opt.unseen);
    path = printed("%s,%s", path, opt.unseen);
  }
  read_tasks(path);
  if (opt.unseen) {
    task_data d;
    t = find_task(tasks, n_tasks, opt.unseen);
    if (t < 0) die("--unseen: there is no task \"%s\" in %s/tasks.tsv", opt.unseen, data.folder);
    d = tasks[t];
    memmove(tasks + t, tasks + t + 1, (size_t)(n_tasks - 1 - t) * sizeof *tasks);
    unseen = &tasks[--n_tasks];
    *unseen = d;
  }
  T = n_tasks;
  if (!T) die("there is no task to train");
  open_task_encoder(&base);
  L = base.config.layers;
  m = opt.blocks;
  for (t = 0; t < T; ++t) read_task_rows(&tasks[t], &base, opt.rows);
  if (!unseen) return;
  read_task_rows(unseen, &base, 0);
  shots = split(opt.shots, ',');
  vector_donor();
  for (k = 0; k < shots.n; ++k)
    if (whole("--shots", shots.at[k], 0, 1e9) > unseen->train.n)
      die("--shots: %s has %lld training rows, not %s", opt.unseen, (long long)unseen->train.n,
          shots.at[k]);
  if (head_donor(0) < 0)
    fprintf(stderr,
            "no task has the labels of %s, so with 0 rows it has no head; --head-from can "
            "name one\n",
            opt.unseen);
}

int main(int argc, char **argv) {
  void *file;
  size_t bytes;
  int i, k;
  begin_program("tasklevel", argc, argv);
  read_options("[options]\nTrains systems whose experts are whole blocks, chosen by the task, and "
               "prints one table. For example:\n./tasklevel --data my_tasks --epochs 3 --save "
               "level.safetensors",
               all_options);
  check_options();
  open_machine(0);
  seeds = split(opt.seeds, ',');
  open_tasks();
  make_lines();
  source.layers = L;
  source.hidden = base.config.hidden;
  source.heads = base.config.heads;
  source.max_len = base.config.max_len;
  note_options(all_options, deciding, &base, NULL);
  results = (result *)lasting((size_t)(n_lines * seeds.n), sizeof *results);
  now.given = (float *)lasting(choices(), sizeof *now.given);
  for (k = 0; k < seeds.n; ++k)
    for (i = 0; i < n_lines; ++i) {
      result *r = &results[n_results++];
      r->line = i;
      r->seed = whole("--seeds", seeds.at[k], 0, 2147483647);
      r->part = (const part **)lasting((size_t)T, sizeof *r->part);
    }
  lock_checkpoint();
  if (state.resume) read_parts(state.resume);
  if (state.resume && opt.csv && exists(opt.csv)) {
    need(moe_file_read(&file, &bytes, opt.csv, &env));
    put_bytes(&history, (char *)file, bytes);
    moe_free(file);
  }

  catch_interrupts();
  for (i = 0; i < n_results; ++i) {
    now.seed = results[i].seed;
    if (settings[results[i].line].stage < 2) run(&results[i]);
  }

  release_interrupts();
  print_table();
  print_unseen();
  return end_program(stdout);
}
