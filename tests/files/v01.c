/* Files that v0.1 has written (golden/v01, made by golden/v01/make.c): they open, answer and train
   on with v0.1's bits, on every instruction set of this machine and with one thread and three. */
#include "golden/v01.h"

/* What a file says of itself, beside what all of them share. */
typedef struct profile {
  const char *file;
  moe_router router;
  moe_unit unit;
  moe_type type;
  int32_t experts, top_k, gate_scale_n, renormalize, feature_dim, cased, tasks;
} profile;

static const profile profiles[V01_ANSWERS] = {
    {"dense.model", MOE_ROUTER_DENSE, MOE_UNIT_FFN, MOE_TYPE_F32, 1, 1, 0, 0, 0, 1, 4},
    {"switch.model", MOE_ROUTER_SHARED, MOE_UNIT_FFN, MOE_TYPE_F32, 2, 1, 1, 0, 0, 0, 4},
    {"tag.model", MOE_ROUTER_TASK, MOE_UNIT_FFN, MOE_TYPE_F32, V01_EXPERTS, 2, 0, 1, 0, 0, 4},
    {"embed.model", MOE_ROUTER_EMBEDDING, MOE_UNIT_FFN, MOE_TYPE_F32, 2, 1, 0, 0, 0, 0, 4},
    {"features.model", MOE_ROUTER_DENSE, MOE_UNIT_FFN, MOE_TYPE_F32, 1, 1, 0, 0, V01_FEATURES, 0,
     4},
    {"blocks.model", MOE_ROUTER_TASK_LEVEL, MOE_UNIT_BLOCK, MOE_TYPE_F32, 2, 1, 0, 0, 0, 0, 4},
    {"extracted.model", MOE_ROUTER_TASK, MOE_UNIT_FFN, MOE_TYPE_F32, V01_EXPERTS, 2, 0, 1, 0, 0, 2},
    {"int8.model", MOE_ROUTER_TASK, MOE_UNIT_FFN, MOE_TYPE_I8, V01_EXPERTS, 2, 0, 1, 0, 0, 4},
    {"tag.checkpoint", MOE_ROUTER_TASK, MOE_UNIT_FFN, MOE_TYPE_F32, 2, 1, 1, 0, 0, 0, 4}};

/* Which of the four tasks those of a model with two and with four are. */
static const int32_t kinds[5][V01_TASKS] = {{0}, {0}, {2, 0}, {0}, {0, 1, 2, 3}};

/* ---- every file, on every instruction set, with one thread and three ---- */

/* One file in memory, and what to compare with. */
typedef struct subject {
  moe_env env;
  const v01_answer *answer;
  const int32_t *kind;
  int32_t T, feature_dim;
  void *file;
  size_t bytes;
  char where[128]; /* for messages */
} subject;

static void each_file(subject *s, void (*test)(subject *s)) {
  int32_t i;
  for (i = 0; i < V01_ANSWERS; ++i) {
    char path[128];
    s->answer = &v01_answers[i];
    s->T = profiles[i].tasks;
    s->kind = kinds[s->T];
    s->feature_dim = profiles[i].feature_dim;
    snprintf(path, sizeof path, "golden/v01/%s", s->answer->file);
    snprintf(s->where, sizeof s->where, "%s, %s, threads %d", s->answer->file,
             moe_isa_name(s->env.isa), (int)s->env.threads);
    said[0] = 0;
    CHECK(!strcmp(profiles[i].file, s->answer->file), "profiles and answers differ in order");
    CHECK(moe_file_read(&s->file, &s->bytes, path, &s->env) == MOE_OK, "%s", said);
    test(s);
    moe_free(s->file);
    CHECK_STATE();
    CHECK(!said[0], "%s: %s", s->where, said);
  }
}

static void each_machine(void (*test)(subject *s)) {
  int isa, threads;
  for (isa = MOE_ISA_SCALAR; isa < MOE_ISA_COUNT; ++isa)
    for (threads = 1; threads <= 3; threads += 2) {
      subject s;
      moe_pool *pool = NULL;
      memset(&s, 0, sizeof s);
      if (moe_env_init(&s.env, (moe_isa)isa)) continue;
      s.env.log = models_log;
      CHECK(moe_pool_create_exact(&pool, threads, &s.env) == MOE_OK, "%s", said);
      each_file(&s, test);
      moe_pool_free(pool);
      CHECK_STATE();
    }
}

/* Sum over the tensors, whatever their order; 0 for weights of 8 bits. */
static uint64_t hash_of(moe_model *model) {
  const float *w = moe_model_weights(model);
  uint64_t sum = 0;
  int32_t i;
  for (i = 0; w && i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    if (moe_model_tensor(model, i, &t)) return 0;
    sum += v01_hash(t.name, w + t.offset, t.count);
  }
  return sum;
}

/* ---- what a file says of itself ---- */

static void check_sizes(const moe_config *c, const profile *p) {
  CHECK(c->layers == V01_LAYERS && c->hidden == V01_HIDDEN && c->ffn == V01_FFN &&
            c->heads == V01_HEADS,
        "%s: sizes", p->file);
  CHECK(c->vocab == (p->feature_dim ? 0 : V01_VOCAB) && c->positions == V01_POSITIONS &&
            c->segments == 2 && c->max_len == V01_MAX_LEN && c->feature_dim == p->feature_dim,
        "%s: input", p->file);
  CHECK(c->router == p->router && c->unit == p->unit && c->experts == p->experts &&
            c->top_k == p->top_k && c->gate_scale_n == p->gate_scale_n &&
            c->renormalize == p->renormalize && c->cased == p->cased,
        "%s: router", p->file);
  CHECK(c->truncate == (p->cased ? MOE_TRUNCATE_RIGHT : MOE_TRUNCATE_LONGEST), "%s", p->file);
  if (p->router == MOE_ROUTER_EMBEDDING) CHECK(c->rank == 3, "%s: rank", p->file);
  if (p->unit == MOE_UNIT_BLOCK)
    CHECK(c->selection == MOE_SELECT_GUMBEL && c->task_dim == 7 &&
              v01_bits(c->temperature) == v01_bits(0.25f),
          "%s: task-level router", p->file);
}

static void check_task(const moe_task *t, int32_t kind, const char *file) {
  static const char *const name[] = {"topic", "similar", "choose", "sense_+-1"};
  static const char *const metrics[] = {"accuracy,macro_f1", "spearman,pearson", "accuracy",
                                        "accuracy,f1,matthews"};
  static const char *const label[][3] = {
      {"sport", "politics", "art \"\\ \xc3\xa9"}, {NULL}, {"wrong", "right"}, {"0", "1"}};
  static const moe_kind is[] = {MOE_KIND_CLASSIFICATION, MOE_KIND_REGRESSION, MOE_KIND_RANKING,
                                MOE_KIND_SPAN};
  int32_t c;
  CHECK(!strcmp(t->name, name[kind]) && !strcmp(t->metrics, metrics[kind]), "%s: %s has metrics %s",
        file, t->name, t->metrics);
  CHECK(t->kind == is[kind] && t->pair == (kind > 0) && t->max_len == (kind == 0 ? 12 : 0) &&
            t->classes == (kind == 0   ? 3
                           : kind == 1 ? 1
                                       : 2),
        "%s: %s", file, t->name);
  CHECK(v01_bits(t->low) == 0 && v01_bits(t->high) == v01_bits(kind == 1 ? 5.0f : 0.0f),
        "%s: %s is from %g to %g", file, t->name, (double)t->low, (double)t->high);
  CHECK(!t->label == (kind == 1), "%s: labels of %s", file, t->name);
  for (c = 0; t->label && c < t->classes; ++c)
    CHECK(!strcmp(t->label[c], label[kind][c]), "%s: %s has label %s", file, t->name, t->label[c]);
}

static void check_profile(subject *s) {
  const profile *p = &profiles[s->answer - v01_answers];
  static const uint8_t pruned[V01_LAYERS * V01_EXPERTS] = {0, 1, 0, 1, 0, 0};
  moe_model *model = NULL;
  const char *vocab;
  size_t bytes = 0;
  int32_t t;
  CHECK(moe_model_read(&model, s->file, s->bytes, &s->env) == MOE_OK, "%s: %s", s->where, said);
  check_sizes(moe_model_config(model), p);
  CHECK_STATE();
  CHECK(moe_model_type(model) == p->type && moe_model_tasks(model) == p->tasks, "%s", p->file);
  for (t = 0; t < s->T; ++t) {
    check_task(moe_model_task(model, t), s->kind[t], p->file);
    CHECK_STATE();
  }
  vocab = moe_model_vocab(model, &bytes);
  CHECK(!vocab == (p->feature_dim > 0), "%s: vocabulary", p->file);
  if (vocab)
    CHECK(bytes == sizeof v01_vocab - 1 && !memcmp(vocab, v01_vocab, bytes), "%s: vocabulary",
          p->file);
  CHECK(!moe_model_config(model)->pruned == (p->tasks == 4), "%s: pruned experts", p->file);
  if (p->tasks == 2)
    CHECK(!memcmp(moe_model_config(model)->pruned, pruned, sizeof pruned), "%s: pruned", p->file);
  CHECK(hash_of(model) == s->answer->read, "%s: weights", s->where);
  moe_model_free(model);
}

static void test_v01_files_say_what_they_are(void) {
  subject s;
  memset(&s, 0, sizeof s);
  moe_env_init(&s.env, MOE_ISA_AUTO);
  s.env.log = models_log;
  each_file(&s, check_profile);
}

/* ---- scores and answers ---- */

static void check_scores(const subject *s, const moe_model *model) {
  int32_t C = moe_model_max_classes(model), i;
  float scores[V01_S * 3];
  moe_context *context = NULL;
  moe_limits limits;
  moe_batch batch;
  v01_rows rows;
  memset(&limits, 0, sizeof limits);
  limits.tokens = V01_M;
  limits.sequences = V01_S;
  v01_fill(&rows, s->kind, s->T, 0);
  batch = v01_batch(&rows, s->feature_dim);
  CHECK(V01_S * C == s->answer->n_scores, "%s: %d classes", s->where, (int)C);
  CHECK(moe_context_create(&context, model, &limits, &s->env) == MOE_OK, "%s: %s", s->where, said);
  CHECK(moe_forward(context, scores, &batch, &s->env) == MOE_OK, "%s: %s", s->where, said);
  for (i = 0; i < s->answer->n_scores; ++i)
    CHECK(v01_bits(scores[i]) == s->answer->scores[i], "%s: score %d is %08x, not %08x", s->where,
          (int)i, (unsigned)v01_bits(scores[i]), (unsigned)s->answer->scores[i]);
  moe_context_free(context);
}

static void check_said(const subject *s, const moe_model *model) {
  moe_predictor *p = NULL;
  int32_t t, i, c, n = 0;
  CHECK(moe_predictor_create(&p, model, 1, &s->env) == MOE_OK, "%s: %s", s->where, said);
  for (t = 0; t < s->T; ++t)
    for (i = 0; i < 2; ++i) {
      const char *const *text = v01_text[s->kind[t]][i];
      float score[3];
      moe_status status = s->kind[t] == 3 ? moe_predict_spans(p, t, &text[0], &text[1],
                                                              v01_chars[i], 1, score, NULL)
                                          : moe_predict_text(p, t, text[0], text[1], score, NULL);
      CHECK(status == MOE_OK, "%s: %s", s->where, said);
      for (c = 0; c < moe_model_task(model, t)->classes; ++c, ++n)
        CHECK(n < s->answer->n_said && v01_bits(score[c]) == s->answer->said[n],
              "%s: task %d, text %d, class %d is %08x", s->where, (int)t, (int)i, (int)c,
              (unsigned)v01_bits(score[c]));
    }
  CHECK(n == s->answer->n_said, "%s: %d numbers", s->where, (int)n);
  moe_predictor_free(p);
}

static void read_and_answer(subject *s) {
  moe_model *model = NULL;
  CHECK(moe_model_read(&model, s->file, s->bytes, &s->env) == MOE_OK, "%s: %s", s->where, said);
  check_scores(s, model);
  CHECK_STATE();
  if (s->answer->n_said) check_said(s, model);
  moe_model_free(model);
}

static void test_v01_models_give_the_same_answers(void) { each_machine(read_and_answer); }

/* The file stays where it is, in flash say. */
static void open_and_answer(subject *s) {
  moe_model *model = NULL;
  size_t bytes = 0;
  unsigned char *raw, *block, *file;
  CHECK(moe_model_open_size(s->file, s->bytes, &bytes, &s->env) == MOE_OK, "%s: %s", s->where,
        said);
  raw = (unsigned char *)malloc(bytes + s->bytes + 192);
  CHECK(raw, "memory");
  block = raw + (64 - (uintptr_t)raw % 64);
  file = block + (bytes + 63) / 64 * 64;
  memcpy(file, s->file, s->bytes);
  CHECK(moe_model_open(&model, file, s->bytes, block, bytes, &s->env) == MOE_OK, "%s: %s", s->where,
        said);
  check_scores(s, model);
  CHECK_STATE();
  if (s->answer->n_said) check_said(s, model);
  moe_model_free(model);
  free(raw);
}

static void test_v01_models_give_the_same_answers_in_place(void) { each_machine(open_and_answer); }

/* ---- written again ---- */

static void write_and_read(subject *s) {
  moe_model *model = NULL, *again = NULL;
  models_file to;
  moe_writer writer = models_writer(&to);
  CHECK(moe_model_read(&model, s->file, s->bytes, &s->env) == MOE_OK, "%s: %s", s->where, said);
  CHECK(moe_model_write(model, &writer, &s->env) == MOE_OK, "%s: %s", s->where, said);
  CHECK(moe_model_read(&again, to.data, to.used, &s->env) == MOE_OK, "%s: %s", s->where, said);
  CHECK(hash_of(again) == s->answer->read, "%s: weights", s->where);
  check_scores(s, again);
  CHECK_STATE();
  moe_model_free(model);
  moe_model_free(again);
  free(to.data);
}

static void test_v01_models_can_be_written_again(void) {
  subject s;
  memset(&s, 0, sizeof s);
  moe_env_init(&s.env, MOE_ISA_AUTO);
  s.env.log = models_log;
  each_file(&s, write_and_read);
}

/* ---- training goes on ---- */

static moe_trainer *make_trainer(const subject *s, moe_model *model) {
  const moe_config *config = moe_model_config(model);
  int gates = config->router != MOE_ROUTER_DENSE && config->unit == MOE_UNIT_FFN;
  moe_train_config train;
  moe_limits limits;
  moe_trainer *trainer = NULL;
  moe_train_config_init(&train);
  train.lr = V01_LR;
  train.steps = V01_STEPS;
  train.warmup = V01_WARMUP;
  train.weight_decay = V01_DECAY;
  train.clip_norm = V01_CLIP;
  train.dropout = V01_DROPOUT;
  train.balance = gates ? V01_BALANCE : 0;
  train.z_loss = gates ? V01_Z_LOSS : 0;
  train.jitter = gates ? V01_JITTER : 0;
  train.seed = V01_SEED;
  memset(&limits, 0, sizeof limits);
  limits.tokens = V01_M;
  limits.sequences = V01_S;
  limits.training = 1;
  return moe_trainer_create(&trainer, model, &limits, &train, &s->env) ? NULL : trainer;
}

/* A step whose loss and norm are to be those of number i. */
static void check_step(const subject *s, moe_trainer *trainer, const v01_rows *rows, int i) {
  moe_batch batch = v01_batch(rows, s->feature_dim);
  float loss = 0, norm = 0;
  CHECK(moe_trainer_accumulate(trainer, &batch, 0, &loss, NULL, &s->env) == MOE_OK, "%s: %s",
        s->where, said);
  CHECK(moe_trainer_step(trainer, &norm, &s->env) == MOE_OK, "%s: %s", s->where, said);
  CHECK(v01_bits(loss) == s->answer->loss[i] && v01_bits(norm) == s->answer->norm[i],
        "%s: step %d has loss %08x, not %08x, and norm %08x, not %08x", s->where, i,
        (unsigned)v01_bits(loss), (unsigned)s->answer->loss[i], (unsigned)v01_bits(norm),
        (unsigned)s->answer->norm[i]);
}

static void train_on(subject *s) {
  moe_model *model = NULL;
  moe_trainer *trainer;
  int i;
  if (!s->answer->read || strstr(s->answer->file, "checkpoint")) return;
  CHECK(moe_model_read(&model, s->file, s->bytes, &s->env) == MOE_OK, "%s: %s", s->where, said);
  trainer = make_trainer(s, model);
  CHECK(trainer, "%s: %s", s->where, said);
  for (i = 0; i < V01_MORE; ++i) {
    v01_rows rows;
    v01_fill(&rows, s->kind, s->T, 50 + i);
    check_step(s, trainer, &rows, i);
    CHECK_STATE();
  }
  CHECK(hash_of(model) == s->answer->trained, "%s: weights", s->where);
  moe_trainer_free(trainer);
  moe_model_free(model);
}

static void test_v01_models_train_on_with_the_same_bits(void) { each_machine(train_on); }

/* A model of the same shape as `like`, with other weights. */
static moe_model *other_model(const subject *s, const moe_model *like) {
  moe_task task[V01_TASKS];
  moe_model *model = NULL;
  size_t bytes = 0;
  const char *vocab = moe_model_vocab(like, &bytes);
  int32_t t;
  for (t = 0; t < V01_TASKS; ++t) task[t] = *moe_model_task(like, t);
  if (moe_model_create(&model, moe_model_config(like), task, V01_TASKS, 77, &s->env)) return NULL;
  if (moe_model_set_vocab(model, vocab, bytes, &s->env)) return NULL;
  return model;
}

static int start_sampler(const subject *s, moe_sampler *sampler, int64_t *used) {
  moe_sampler_config config;
  memset(&config, 0, sizeof config);
  config.sampling = MOE_SAMPLING_TEMPERATURE;
  config.tau = V01_TAU;
  config.seed = V01_SAMPLER_SEED;
  config.draws = V01_STEPS * V01_S;
  return moe_sampler_init(sampler, &config, v01_task_rows, used, V01_TASKS, &s->env) == MOE_OK;
}

static void check_resumed(const subject *s, moe_trainer *trainer, moe_sampler *sampler) {
  int32_t i, j, task;
  int64_t row;
  CHECK(moe_trainer_steps_done(trainer) == V01_SAVED && sampler->drawn == V01_SAVED * V01_S,
        "%s: steps and draws", s->where);
  for (i = 0; i < V01_MORE; ++i) {
    v01_rows rows;
    memset(&rows, 0, sizeof rows);
    for (j = 0; j < V01_S; ++j) {
      moe_sampler_next(sampler, &task, &row);
      v01_add(&rows, task, task, row);
    }
    check_step(s, trainer, &rows, i);
    CHECK_STATE();
  }
}

static void resume(subject *s) {
  moe_model *like = NULL, *model;
  moe_trainer *trainer;
  moe_sampler sampler;
  int64_t used[V01_TASKS];
  char note[sizeof V01_NOTE];
  size_t length = 0;
  if (!strstr(s->answer->file, "checkpoint")) return;
  CHECK(moe_model_read(&like, s->file, s->bytes, &s->env) == MOE_OK, "%s: %s", s->where, said);
  model = other_model(s, like);
  CHECK(model, "%s: %s", s->where, said);
  trainer = make_trainer(s, model);
  CHECK(trainer && start_sampler(s, &sampler, used), "%s: %s", s->where, said);
  CHECK(moe_checkpoint_note(note, sizeof note, &length, s->file, s->bytes, &s->env) == MOE_OK &&
            length == sizeof note - 1 && !strcmp(note, V01_NOTE),
        "%s: note", s->where);
  CHECK(moe_checkpoint_read(trainer, &sampler, s->file, s->bytes, &s->env) == MOE_OK, "%s: %s",
        s->where, said);
  CHECK(hash_of(model) == s->answer->read, "%s: weights that were read", s->where);
  check_resumed(s, trainer, &sampler);
  CHECK_STATE();
  CHECK(hash_of(model) == s->answer->trained, "%s: weights after more steps", s->where);
  CHECK(!memcmp(used, v01_used, sizeof used), "%s: rows drawn", s->where);
  moe_trainer_free(trainer);
  moe_model_free(model);
  moe_model_free(like);
}

static void test_v01_checkpoint_resumes_with_the_same_bits(void) { each_machine(resume); }

static void run_v01(void) {
  RUN(test_v01_files_say_what_they_are);
  RUN(test_v01_models_give_the_same_answers);
  RUN(test_v01_models_give_the_same_answers_in_place);
  RUN(test_v01_models_can_be_written_again);
  RUN(test_v01_models_train_on_with_the_same_bits);
  RUN(test_v01_checkpoint_resumes_with_the_same_bits);
}
