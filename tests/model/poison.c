/* Whole models on a DEVICE (poison.h): no host access to what is resident, and the CPU's bits. */
#include "poison.h"

enum { POISON_ROUTERS = 3, POISON_STEPS = 6, POISON_WIDTH = 40 * 3 };
static const moe_router poison_routers[POISON_ROUTERS] = {MOE_ROUTER_DENSE, MOE_ROUTER_SHARED,
                                                          MOE_ROUTER_TASK};

static moe_model *poison_model(moe_router router, int features, const moe_env *env) {
  moe_task tasks[MODELS_TASKS];
  moe_config config =
      models_config(router, router == MOE_ROUTER_DENSE ? 1 : 4, router == MOE_ROUTER_DENSE ? 1 : 2);
  if (features) config.feature_dim = MODELS_WIDTH, config.vocab = 0;
  models_tasks(tasks);
  return models_create(&config, tasks, MODELS_TASKS, env);
}

static moe_train_config poison_train(void) {
  static const moe_param_group groups[] = {{"gate", 3, 1}, {"embeddings.position", 0, 1}};
  moe_train_config tc;
  moe_train_config_init(&tc);
  tc.steps = POISON_STEPS;
  tc.lr = 1e-2f;
  tc.weight_decay = 0.01f;
  tc.balance = 0.01f, tc.z_loss = 0.001f, tc.jitter = 0.02f;
  tc.groups = groups, tc.n_groups = 2;
  return tc;
}

/* Nothing of the device is left, and nothing of the host's was taken for it. */
#define POISON_IS_CLEAN()                                                                          \
  CHECK(!poison.strays && !poison.blocks && !poison.streams,                                       \
        "%d stray pointers, %d blocks and %d streams left", poison.strays, poison.blocks,          \
        poison.streams)

static sigjmp_buf poison_jump;
static void poison_fault(int signal_number) { siglongjmp(poison_jump, signal_number); }

/* The control: without a slot around it, the device's memory does fault. */
static void test_poison_memory_faults(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_backend b = poison_backend();
  struct sigaction action, before;
  void *p = NULL;
  volatile int faulted = 0;
  env.backend = &b;
  CHECK(!poison_alloc(&b, &env, &p, 100), "no memory");
  memset(&action, 0, sizeof action);
  action.sa_handler = poison_fault;
  sigaction(SIGSEGV, &action, &before);
  if (sigsetjmp(poison_jump, 1))
    faulted = 1;
  else
    *(volatile unsigned char *)p = 1;
  sigaction(SIGSEGV, &before, NULL);
  poison_release(&b, p);
  CHECK(faulted, "a write to the device's memory went through");
  POISON_IS_CLEAN();
}

/* Scores, states, logits and routes of one context. */
typedef struct poison_seen {
  float scores[POISON_WIDTH], hidden[MODELS_M * 20], layer[MODELS_M * 20], logits[MODELS_M * 4];
  float weight[MODELS_M * 2], prob[MODELS_M * 4];
  int32_t expert[MODELS_M * 2], order[MODELS_M * 2], start[5];
  int64_t tokens[MODELS_TASKS], chosen[MODELS_TASKS * 2 * 4];
} poison_seen;

static void poison_look(poison_seen *to, const moe_model *model, const models_batch *batch,
                        const int32_t *forced, const uint8_t *masked, const moe_env *env) {
  moe_limits limits = {MODELS_M, MODELS_S, 0, 1};
  moe_context *c = NULL;
  moe_route_sums sums;
  moe_routes r;
  size_t M = (size_t)batch->start[batch->b.S];
  const float *x;
  memset(to, 0, sizeof *to);
  memset(&sums, 0, sizeof sums);
  sums.tokens = to->tokens, sums.chosen = to->chosen;
  CHECK(!moe_context_create(&c, model, &limits, env), "%s", said);
  moe_context_force(c, forced);
  moe_context_mask(c, masked);
  CHECK(!moe_forward(c, to->scores, &batch->b, env), "%s", said);
  if ((x = moe_context_hidden(c)) != NULL) memcpy(to->hidden, x, M * 20 * sizeof *x);
  if ((x = moe_context_layer(c, 0)) != NULL) memcpy(to->layer, x, M * 20 * sizeof *x);
  if ((x = moe_context_gate_logits(c, 1)) != NULL) memcpy(to->logits, x, M * 4 * sizeof *x);
  CHECK(!moe_context_routes(c, 1, &r), "routes");
  memcpy(to->expert, r.expert, M * (size_t)r.k * sizeof *r.expert);
  memcpy(to->weight, r.weight, M * (size_t)r.k * sizeof *r.weight);
  memcpy(to->prob, r.prob, M * (size_t)r.N * sizeof *r.prob);
  memcpy(to->order, r.order, M * (size_t)r.k * sizeof *r.order);
  memcpy(to->start, r.start, ((size_t)r.N + 1) * sizeof *r.start);
  CHECK(!moe_route_count(&sums, c, &batch->b, env), "%s", said);
  moe_context_free(c);
}

static models_batch poison_batch;

static void poison_compare(moe_router router, int features, int given) {
  static poison_seen sides[2];
  static int32_t forced[2 * MODELS_M * 2];
  static const uint8_t masked[8] = {0, 1, 0, 0, 0, 0, 0, 1};
  moe_env env = models_env(MOE_ISA_AUTO), on = env;
  moe_backend b = poison_backend();
  moe_model *model = poison_model(router, features, &env);
  int i;
  CHECK(model != NULL, "%s", said);
  models_random_batch(&poison_batch, model, 30, 19, 5);
  for (i = 0; i < 2 * poison_batch.start[30]; ++i)
    forced[2 * i] = i % 4, forced[2 * i + 1] = (i + 1) % 4;
  on.backend = &b;
  CHECK(!moe_model_pack(model, NULL, &on), "%s", said);
  poison_look(&sides[0], model, &poison_batch, given == 1 ? forced : NULL,
              given == 2 ? masked : NULL, &env);
  CHECK_STATE();
  poison_look(&sides[1], model, &poison_batch, given == 1 ? forced : NULL,
              given == 2 ? masked : NULL, &on);
  CHECK_STATE();
  CHECK(!memcmp(&sides[0], &sides[1], sizeof sides[0]), "router %d, features %d, given %d",
        (int)router, features, given);
  moe_model_free(model);
  POISON_IS_CLEAN();
}

static void test_poison_inference_has_the_bits_of_the_cpu(void) {
  int r, features, given;
  for (r = 0; r < POISON_ROUTERS; ++r)
    for (features = 0; features < 2; ++features)
      for (given = 0; given < (r ? 3 : 1); ++given) {
        poison_compare(poison_routers[r], features, given);
        CHECK_STATE();
      }
}

/* Traffic: a pass is one upload and one download of the scores; a step brings losses and a norm;
   routes are downloaded when they are asked for, and nothing beside them. */
static void test_poison_a_pass_is_one_upload_and_one_download(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_backend b = poison_backend();
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_train_config tc = poison_train();
  moe_model *model = poison_model(MOE_ROUTER_TASK, 0, &env);
  moe_trainer *trainer = NULL;
  moe_routes r;
  float scores[POISON_WIDTH], norm;
  size_t M;
  int up, down;
  models_random_batch(&poison_batch, model, 30, 19, 5);
  env.backend = &b;
  CHECK(!moe_trainer_create(&trainer, model, &limits, &tc, &env), "%s", said);
  up = poison.uploads, down = poison.downloads;
  CHECK(!moe_forward(moe_trainer_context(trainer), scores, &poison_batch.b, &env), "%s", said);
  CHECK(poison.uploads == up + 1 && poison.downloads == down + 1, "%d up, %d down",
        poison.uploads - up, poison.downloads - down);
  CHECK(!moe_trainer_accumulate(trainer, &poison_batch.b, 0, NULL, NULL, &env) &&
            !moe_trainer_step(trainer, &norm, &env),
        "%s", said);
  CHECK(poison.uploads == up + 2 && poison.downloads == down + 2, "%d up, %d down",
        poison.uploads - up, poison.downloads - down);
  poison.downloaded = 0;
  CHECK(!moe_context_routes(moe_trainer_context(trainer), 1, &r), "%s", said);
  M = (size_t)poison_batch.start[30];
  CHECK(poison.downloaded == 4 * (3 * M * (size_t)r.k + M * (size_t)r.N + (size_t)r.N + 1),
        "%zu bytes of routes", poison.downloaded);
  moe_trainer_free(trainer);
  moe_model_free(model);
  POISON_IS_CLEAN();
}

/* A step with every array that a caller can pass, in a trainer exactly as large as its batch. */
static void poison_step_exactly(float result[2], const moe_env *env) {
  static const int32_t forced[2 * MODELS_M * 2];
  static const uint8_t masked[8] = {0, 0, 1, 0, 0, 0, 1, 0}, pruned[8] = {0, 0, 0, 1, 0, 0, 0, 1};
  static const float weight[3] = {1, 0.5f, 2};
  moe_env cpu = *env;
  moe_limits limits = {0, 3, 1, 0};
  moe_train_config tc = poison_train();
  moe_config config = models_config(MOE_ROUTER_TASK, 4, 1);
  moe_task tasks[MODELS_TASKS];
  moe_model *model;
  moe_trainer *t = NULL;
  cpu.backend = NULL;
  config.pruned = pruned;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &cpu);
  CHECK(model, "%s", said);
  models_random_batch(&poison_batch, model, 3, 3, 5);
  poison_batch.b.weight = weight;
  limits.tokens = poison_batch.start[3];
  CHECK(!moe_trainer_create(&t, model, &limits, &tc, env), "%s", said);
  moe_context_force(moe_trainer_context(t), forced);
  moe_context_mask(moe_trainer_context(t), masked);
  CHECK(!moe_trainer_accumulate(t, &poison_batch.b, 0, &result[0], NULL, env) &&
            !moe_trainer_step(t, &result[1], env),
        "%s", said);
  moe_trainer_free(t);
  moe_model_free(model);
}

/* Many small arrays: they fit with their padding, too. */
static void test_poison_uploads_fit_in_a_trainer_of_the_batches_size(void) {
  moe_env env = models_env(MOE_ISA_AUTO), on = env;
  moe_backend b = poison_backend();
  float result[2][2];
  on.backend = &b;
  poison_step_exactly(result[0], &env);
  CHECK_STATE();
  poison_step_exactly(result[1], &on);
  CHECK_STATE();
  CHECK(!memcmp(result[0], result[1], sizeof result[0]), "loss %g against %g, norm %g against %g",
        (double)result[0][0], (double)result[1][0], (double)result[0][1], (double)result[1][1]);
  POISON_IS_CLEAN();
}

/* What a run of training leaves. */
typedef struct poison_run {
  float loss[POISON_STEPS], losses[MODELS_S], norm[POISON_STEPS], error;
  uint64_t model, checkpoint;
} poison_run;

static uint64_t poison_hash_free(models_file file) {
  uint64_t hash = models_hash(file.data, file.used);
  free(file.data);
  return hash;
}

/* Trains in micro-batches, writes model and checkpoint; `resume`: half-way into a new trainer. */
static void poison_fit(poison_run *run, moe_router router, int resume, const moe_env *env) {
  moe_env cpu = *env;
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_train_config tc = poison_train();
  moe_model *model;
  moe_trainer *t = NULL;
  int i;
  cpu.backend = NULL;
  if (router == MOE_ROUTER_DENSE) tc.jitter = 0; /* dropout alone */
  memset(run, 0, sizeof *run);
  model = poison_model(router, 0, &cpu);
  CHECK(model && !moe_trainer_create(&t, model, &limits, &tc, env), "%s", said);
  for (i = 0; i < POISON_STEPS; ++i) {
    models_file file;
    moe_writer writer;
    float part;
    writer = models_writer(&file);
    models_random_batch(&poison_batch, model, 20, 19, (uint64_t)i);
    CHECK(!moe_trainer_accumulate(t, &poison_batch.b, 35, &run->loss[i], run->losses, env), "%s",
          said);
    models_random_batch(&poison_batch, model, 15, 19, (uint64_t)i + 100);
    CHECK(!moe_trainer_accumulate(t, &poison_batch.b, 35, &part, NULL, env), "%s", said);
    run->loss[i] += part;
    CHECK(!moe_trainer_step(t, &run->norm[i], env), "%s", said);
    if (i != 2) continue;
    CHECK(!moe_checkpoint_write(t, NULL, "note", &writer, env), "%s", said);
    run->checkpoint = models_hash(file.data, file.used);
    if (resume) {
      moe_trainer_free(t);
      moe_model_free(model);
      model = poison_model(router, 0, &cpu);
      CHECK(!moe_trainer_create(&t, model, &limits, &tc, env), "%s", said);
      CHECK(!moe_checkpoint_read(t, NULL, file.data, file.used, env), "%s", said);
    }
    free(file.data);
  }
  run->model = poison_hash_free(models_written(model, env));
  CHECK(!moe_gradcheck(t, &poison_batch.b, 30, &run->error, env), "%s", said);
  moe_trainer_free(t);
  moe_model_free(model);
}

static void test_poison_training_has_the_bits_of_the_cpu(void) {
  static poison_run run[3];
  moe_env env = models_env(MOE_ISA_AUTO), on = env;
  moe_backend b = poison_backend();
  int r, i, blocks = blocks_in_use;
  on.backend = &b;
  for (r = 0; r < POISON_ROUTERS; ++r) {
    for (i = 0; i < 3; ++i) {
      poison_fit(&run[i], poison_routers[r], i == 2, i ? &on : &env);
      CHECK_STATE();
    }
    for (i = 1; i < 3; ++i)
      CHECK(!memcmp(&run[0], &run[i], sizeof run[0]), "router %d, %s: loss %g against %g", r,
            i == 2 ? "resumed" : "at once", (double)run[0].loss[POISON_STEPS - 1],
            (double)run[i].loss[POISON_STEPS - 1]);
    CHECK(run[1].error < 1e-2f, "gradients against differences: %g", (double)run[1].error);
    CHECK(blocks_in_use == blocks, "%d blocks of the host are left", blocks_in_use - blocks);
    POISON_IS_CLEAN();
  }
}

/* The check copies gradients from the device; without memory for that it says so. */
static void test_poison_gradcheck_survives_every_failed_allocation(void) {
  moe_env env = models_env(MOE_ISA_AUTO), on = env;
  moe_backend b = poison_backend();
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_train_config tc = poison_train();
  moe_model *model = poison_model(MOE_ROUTER_TASK, 0, &env);
  moe_trainer *t = NULL;
  float error = 7;
  int n, done = 0, blocks;
  on.backend = &b;
  CHECK(model && !moe_trainer_create(&t, model, &limits, &tc, &on), "%s", said);
  models_random_batch(&poison_batch, model, 5, 9, 3);
  blocks = blocks_in_use;
  for (n = 0; n < 10 && !done; ++n) {
    moe_status status;
    fail_at = allocations + n;
    status = moe_gradcheck(t, &poison_batch.b, 2, &error, &on);
    done = allocations <= fail_at;
    fail_at = -1;
    CHECK(status == (done ? MOE_OK : MOE_E_MEMORY) && blocks_in_use == blocks,
          "allocation %d: status %d, %d blocks left", n, (int)status, blocks_in_use - blocks);
  }
  CHECK(done && n == 3 && error < 1e-2f, "%d allocations, error %g", n - 1, (double)error);
  moe_trainer_free(t);
  moe_model_free(model);
  POISON_IS_CLEAN();
}

/* Whatever reads the weights of a model that was trained on the device sees the newest. */
static void test_poison_trained_weights_are_downloaded_for_whoever_reads_them(void) {
  static const int32_t keep[] = {3, 0};
  uint64_t hash[2][5];
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_backend b = poison_backend();
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_train_config tc = poison_train();
  int side, what;
  for (side = 0; side < 2; ++side)
    for (what = 0; what < 5; ++what) {
      moe_model *model = poison_model(MOE_ROUTER_TASK, 0, &env), *out = NULL;
      moe_env at = env;
      moe_trainer *t = NULL;
      moe_task task = *moe_model_task(model, 0);
      if (side) at.backend = &b;
      strcpy(task.name, "joins");
      models_random_batch(&poison_batch, model, 20, 19, 9);
      CHECK(!moe_trainer_create(&t, model, &limits, &tc, &at), "%s", said);
      CHECK(!moe_trainer_accumulate(t, &poison_batch.b, 0, NULL, NULL, &at) &&
                !moe_trainer_step(t, NULL, &at),
            "%s", said);
      if (what == 0) CHECK(!moe_model_quantize(&out, model, &at), "%s", said);
      if (what == 1) CHECK(!moe_model_adapt(&out, model, &task, 1, 7, &at), "%s", said);
      if (what == 2) CHECK(!moe_model_extract(&out, model, keep, 2, NULL, &at), "%s", said);
      if (what == 3)
        hash[side][3] =
            models_hash(moe_model_weights(model), moe_model_parameters(model) * sizeof(float));
      if (what == 4) { /* the end of the trainer */
        moe_trainer_free(t), t = NULL;
        hash[side][4] = models_hash(model->weights, moe_model_parameters(model) * sizeof(float));
      }
      if (out) hash[side][what] = poison_hash_free(models_written(out, &at));
      moe_model_free(out);
      moe_trainer_free(t);
      moe_model_free(model);
      POISON_IS_CLEAN();
    }
  CHECK(!memcmp(hash[0], hash[1], sizeof hash[0]), "quantised, adapted, extracted, read or freed");
}

/* A block of moe_context_size bytes is enough on a device, too; one byte less is not. */
static void test_poison_contexts_in_blocks_of_the_exact_size(void) {
  moe_env env = models_env(MOE_ISA_AUTO), on = env;
  moe_backend b = poison_backend();
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_model *model = poison_model(MOE_ROUTER_TASK, 0, &env);
  moe_context *c = NULL;
  float scores[2][POISON_WIDTH];
  size_t bytes = 0;
  void *raw, *block;
  on.backend = &b;
  memset(scores, 0, sizeof scores);
  models_random_batch(&poison_batch, model, 30, 19, 5);
  CHECK(!moe_context_create(&c, model, &limits, &env) &&
            !moe_forward(c, scores[0], &poison_batch.b, &env),
        "%s", said);
  moe_context_free(c);
  c = NULL;
  CHECK(!moe_model_pack(model, NULL, &on), "%s", said);
  CHECK(!moe_context_size(model, &limits, &bytes, &on), "%s", said);
  block = models_block(&raw, bytes);
  CHECK(moe_context_init(&c, block, bytes - 1, model, &limits, &on) == MOE_E_MEMORY && !c, "%s",
        said);
  CHECK(!moe_context_init(&c, block, bytes, model, &limits, &on), "%s", said);
  CHECK(!moe_forward(c, scores[1], &poison_batch.b, &on), "%s", said);
  CHECK(!memcmp(scores[0], scores[1], sizeof scores[0]), "other scores");
  moe_context_free(c);
  free(raw);
  moe_model_free(model);
  POISON_IS_CLEAN();
}

/* A predictor on the device: text in, the CPU's probabilities and embeddings out. */
static void test_poison_predicts_as_the_cpu(void) {
  moe_env env = models_env(MOE_ISA_AUTO), on = env;
  moe_backend b = poison_backend();
  moe_model *model = poison_model(MOE_ROUTER_TASK, 0, &env);
  moe_predictor *p = NULL;
  char vocab[1024] = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n";
  const char *text = "word7 word9 what word30";
  float scores[2][MOE_MAX_CLASSES], embedding[2][20];
  int i, best[2];
  for (i = 4; i < 50; ++i) snprintf(vocab + strlen(vocab), 20, "word%d\n", i);
  on.backend = &b;
  CHECK(!moe_model_set_vocab(model, vocab, strlen(vocab), &env), "%s", said);
  CHECK(!moe_model_pack(model, NULL, &on), "%s", said);
  memset(scores, 0, sizeof scores);
  for (i = 0; i < 2; ++i) {
    CHECK(!moe_predictor_create(&p, model, 3, i ? &on : &env), "%s", said);
    CHECK(!moe_predict_text(p, 1, text, NULL, scores[i], &best[i]), "%s", said);
    CHECK(!moe_predict_embed(p, 1, MOE_POOLING_MEAN, &text, NULL, 1, embedding[i]), "%s", said);
    moe_predictor_free(p);
  }
  CHECK(!memcmp(scores[0], scores[1], sizeof scores[0]) && best[0] == best[1], "%g against %g",
        (double)scores[0][0], (double)scores[1][0]);
  CHECK(!memcmp(embedding[0], embedding[1], sizeof embedding[0]), "embeddings");
  moe_model_free(model);
  POISON_IS_CLEAN();
}

static void test_poison_refuses_what_only_the_cpu_computes(void) {
  moe_env env = models_env(MOE_ISA_AUTO), on = env;
  moe_backend b = poison_backend();
  moe_limits limits = {MODELS_M, MODELS_S, 0, 0};
  moe_task tasks[MODELS_TASKS];
  moe_config config = models_config(MOE_ROUTER_EMBEDDING, 4, 2);
  moe_model *model, *small = NULL;
  moe_context *c = NULL;
  float scores[POISON_WIDTH];
  on.backend = &b;
  models_tasks(tasks);
  model = models_create(&config, tasks, MODELS_TASKS, &env);
  CHECK(!moe_model_pack(model, NULL, &on) &&
            moe_context_create(&c, model, &limits, &on) == MOE_E_UNSUPPORTED &&
            strstr(said, "task vectors"),
        "%s", said);
  moe_model_free(model);
  model = poison_model(MOE_ROUTER_TASK, 0, &env);
  CHECK(moe_context_create(&c, model, &limits, &on) == MOE_E_ARGUMENT &&
            strstr(said, "moe_model_pack"),
        "%s", said);
  CHECK(!moe_model_quantize(&small, model, &on) &&
            moe_context_create(&c, small, &limits, &on) == MOE_E_UNSUPPORTED &&
            strstr(said, "int8"),
        "%s", said);
  CHECK(!moe_model_pack(model, NULL, &on), "%s", said);
  b.route = NULL;
  CHECK(moe_context_create(&c, model, &limits, &on) == MOE_E_UNSUPPORTED && strstr(said, "slot"),
        "%s", said);
  b.route = poison_route;
  b.bytes = (uint32_t)offsetof(moe_backend, heads); /* a table of a shorter kind */
  CHECK(moe_context_create(&c, model, &limits, &on) == MOE_E_UNSUPPORTED, "%s", said);
  b.bytes = (uint32_t)sizeof b;
  limits.tokens = (1 << 20) + 1;
  CHECK(moe_context_create(&c, model, &limits, &on) == MOE_E_UNSUPPORTED, "supports() is asked");
  limits.tokens = MODELS_M;
  CHECK(!moe_context_create(&c, model, &limits, &on), "%s", said);
  models_random_batch(&poison_batch, model, 10, 19, 5);
  CHECK(moe_forward(c, scores, &poison_batch.b, &env) == MOE_E_ARGUMENT && strstr(said, "poison"),
        "a pass on the CPU with a context of the device: %s", said);
  moe_context_free(c);
  CHECK(!moe_context_create(&c, model, &limits, &env), "%s", said);
  CHECK(moe_forward(c, scores, &poison_batch.b, &on) == MOE_E_ARGUMENT && strstr(said, "poison"),
        "a pass on the device with a context of the CPU: %s", said);
  moe_context_free(c);
  moe_model_free(small);
  moe_model_free(model);
  POISON_IS_CLEAN();
}

static void poison_ready(void *user, size_t first, size_t count) {
  (void)user, (void)first, (void)count;
}

/* Processes exchange what is in the host's memory, so a device refuses both ways to do so. */
static void test_poison_refuses_what_processes_share(void) {
  moe_env env = models_env(MOE_ISA_AUTO), on = env;
  moe_backend b = poison_backend();
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_train_config tc = poison_train();
  moe_model *model = poison_model(MOE_ROUTER_TASK, 0, &env);
  moe_trainer *t = NULL;
  moe_share share;
  on.backend = &b;
  memset(&share, 0, sizeof share);
  CHECK(!moe_model_pack(model, NULL, &on), "%s", said);
  tc.ready = poison_ready;
  CHECK(moe_trainer_create(&t, model, &limits, &tc, &on) == MOE_E_UNSUPPORTED && !t &&
            strstr(said, "ready is called on the CPU alone, not by poison"),
        "%s", said);
  tc.ready = NULL;
  tc.share = &share;
  CHECK(moe_trainer_create(&t, model, &limits, &tc, &on) == MOE_E_UNSUPPORTED && !t &&
            strstr(said, "stepped on the CPU alone, not by poison"),
        "%s", said);
  moe_model_free(model);
  POISON_IS_CLEAN();
}

enum { POISON_LOSE = 3 }; /* steps of a run that fails */

/* One run that fails at call number `at`, then a step on the CPU. */
typedef struct poison_lost {
  int done, named; /* steps; the step that the sentence names, -1: there was none */
  moe_status on_cpu;
  uint64_t host[POISON_LOSE + 1]; /* weights before each step, and what is left */
} poison_lost;

static void poison_lose(poison_lost *run, int at, const moe_env *env) {
  moe_env cpu = *env;
  moe_limits limits = {MODELS_M, MODELS_S, 1, 0};
  moe_train_config tc = poison_train();
  moe_model *model;
  moe_trainer *t = NULL;
  moe_status status;
  size_t bytes;
  cpu.backend = NULL;
  model = poison_model(MOE_ROUTER_TASK, 0, &cpu);
  bytes = moe_model_parameters(model) * sizeof(float);
  models_random_batch(&poison_batch, model, 12, 19, 9);
  poison.fail_at = at;
  run->named = -1;
  status = moe_trainer_create(&t, model, &limits, &tc, env);
  for (run->done = 0; run->done < POISON_LOSE && !status;) {
    run->host[run->done] = models_hash(model->weights, bytes);
    status = moe_trainer_accumulate(t, &poison_batch.b, 0, NULL, NULL, env);
    if (!status) status = moe_trainer_step(t, NULL, env);
    run->done = (int)moe_trainer_steps_done(t);
    if (status && strstr(said, "after step")) run->named = atoi(strstr(said, "after step") + 10);
  }
  moe_trainer_free(t);
  run->host[POISON_LOSE] = models_hash(model->weights, bytes);
  run->on_cpu = moe_trainer_create(&t, model, &limits, &tc, &cpu);
  if (!run->on_cpu) run->on_cpu = moe_trainer_accumulate(t, &poison_batch.b, 0, NULL, NULL, &cpu);
  if (!run->on_cpu) run->on_cpu = moe_trainer_step(t, NULL, &cpu);
  moe_trainer_free(t);
  moe_model_free(model);
  poison.fail_at = poison.lost = 0;
}

/* Every call of a slot failing in turn: a status, no crash, nothing left, and the host's weights
   are whole: those of the last mirrored step, which the sentence names, or those at the end. The
   CPU trains on from them. */
static void test_poison_a_lost_device_costs_steps_but_no_weights(void) {
  static const int32_t every[] = {0, 1, 2};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_backend b = poison_backend();
  poison_lost right, now;
  int at, i;
  env.backend = &b;
  b.mirror = 1;
  poison_lose(&right, 0, &env);
  CHECK(right.done == POISON_LOSE && right.host[POISON_LOSE] != right.host[0], "%s", said);
  for (i = 0; i < 3; ++i) {
    int ended = 0;
    b.mirror = every[i];
    for (at = 1; !ended && at < 10000; ++at) {
      int step;
      poison_lose(&now, at, &env);
      step = every[i] ? now.done / every[i] * every[i] : 0;
      if (now.named < 0) step = now.done == POISON_LOSE && now.host[3] == right.host[3] ? 3 : step;
      CHECK(now.host[3] == right.host[now.named < 0 ? step : now.named],
            "every %d, call %d, step %d: other weights", (int)every[i], at, now.done);
      CHECK(now.named < 0 || now.named == step || now.named == step - every[i],
            "every %d, call %d, step %d: weights of step %d", (int)every[i], at, now.done,
            now.named);
      CHECK(!now.on_cpu, "call %d: on the CPU: %s", at, said);
      ended = now.named < 0 && step == POISON_LOSE;
      POISON_IS_CLEAN();
    }
    CHECK(ended && at > 90, "%d calls", at);
  }
}

static void run_poison(void) {
  RUN(test_poison_memory_faults);
  RUN(test_poison_inference_has_the_bits_of_the_cpu);
  RUN(test_poison_a_pass_is_one_upload_and_one_download);
  RUN(test_poison_uploads_fit_in_a_trainer_of_the_batches_size);
  RUN(test_poison_training_has_the_bits_of_the_cpu);
  RUN(test_poison_gradcheck_survives_every_failed_allocation);
  RUN(test_poison_trained_weights_are_downloaded_for_whoever_reads_them);
  RUN(test_poison_contexts_in_blocks_of_the_exact_size);
  RUN(test_poison_predicts_as_the_cpu);
  RUN(test_poison_refuses_what_only_the_cpu_computes);
  RUN(test_poison_refuses_what_processes_share);
  RUN(test_poison_a_lost_device_costs_steps_but_no_weights);
}
