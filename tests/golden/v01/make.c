/* make.c - makes the files in this folder and their answers, ../v01.h, with v0.1 of moe.h.

   It is written for v0.1's interface (version 100) and cannot be compiled with any later one: the
   point of these files is that v0.1 has written them. With a checkout of v0.1 in V01, in here:
     cc -O2 -o make -I V01 make.c -lm -pthread && ./make && rm make */
#define MOE_IMPLEMENTATION
#include "moe.h"
#include "../v01_cases.h"

#if MOE_VERSION != 100
#error "this program needs v0.1 of moe.h"
#endif

/* The files that are trained from scratch; the others are made of them. */
typedef struct recipe {
  const char *file;
  moe_router router;
  moe_unit unit;
  moe_selection selection;
  int32_t experts, top_k, gate_scale_n, renormalize, features, cased, right;
} recipe;

static const recipe recipes[] = {
    {"dense.model", MOE_ROUTER_DENSE, MOE_UNIT_FFN, MOE_SELECT_SOFTMAX, 1, 1, 0, 0, 0, 1, 1},
    {"switch.model", MOE_ROUTER_SHARED, MOE_UNIT_FFN, MOE_SELECT_SOFTMAX, 2, 1, 1, 0, 0, 0, 0},
    {"tag.model", MOE_ROUTER_TASK, MOE_UNIT_FFN, MOE_SELECT_SOFTMAX, V01_EXPERTS, 2, 0, 1, 0, 0, 0},
    {"embed.model", MOE_ROUTER_EMBEDDING, MOE_UNIT_FFN, MOE_SELECT_SOFTMAX, 2, 1, 0, 0, 0, 0, 0},
    {"features.model", MOE_ROUTER_DENSE, MOE_UNIT_FFN, MOE_SELECT_SOFTMAX, 1, 1, 0, 0, 1, 0, 0},
    {"blocks.model", MOE_ROUTER_LEVEL, MOE_UNIT_BLOCK, MOE_SELECT_GUMBEL, 2, 1, 0, 0, 0, 0, 0}};
enum { RECIPES = sizeof recipes / sizeof *recipes };

static const int32_t all_kinds[V01_TASKS] = {0, 1, 2, 3}, two_kinds[2] = {2, 0};
static const uint8_t dropped[V01_LAYERS * V01_EXPERTS] = {0, 1, 0, 1, 0, 0};
static moe_env env;
static FILE *header, *table;

static void show(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, "make: %s\n", sentence);
}

static void need(moe_status status) {
  if (status) exit(1);
}

static void make_tasks(moe_task *task) {
  static const char *const topics[] = {"sport", "politics", "art \"\\ \xc3\xa9"};
  static const char *const choices[] = {"wrong", "right"};
  memset(task, 0, V01_TASKS * sizeof *task);
  strcpy(task[0].name, "topic");
  task[0].classes = 3;
  task[0].label = topics;
  task[0].max_len = 12;
  strcpy(task[0].metrics, "accuracy,macro_f1");
  strcpy(task[1].name, "similar");
  task[1].kind = MOE_KIND_REGRESSION;
  task[1].pair = 1;
  task[1].classes = 1;
  task[1].high = 5;
  strcpy(task[1].metrics, "spearman,pearson");
  strcpy(task[2].name, "choose");
  task[2].kind = MOE_KIND_RANKING;
  task[2].pair = 1;
  task[2].classes = 2;
  task[2].label = choices;
  strcpy(task[2].metrics, "accuracy");
  strcpy(task[3].name, "sense_+-1");
  task[3].kind = MOE_KIND_SPAN;
  task[3].pair = 1;
  task[3].classes = 2;
  strcpy(task[3].metrics, "accuracy,f1,matthews");
}

/* Initial values are so small that scores hardly depend on the input: larger ones, exactly. */
static void enlarge(moe_model *model) {
  moe_tensor t;
  int32_t i;
  size_t j;
  for (i = 0; i < moe_model_tensors(model); ++i) {
    float *w;
    need(moe_model_tensor(model, i, &t));
    w = moe_model_weights(model) + t.offset;
    for (j = 0; t.dims > 1 && j < t.count; ++j) w[j] *= strstr(t.name, "gate") ? 512.0f : 16.0f;
  }
  need(moe_model_pack(model, NULL, &env));
}

static moe_model *make_model(const recipe *r) {
  moe_config config;
  moe_task task[V01_TASKS];
  moe_model *model;
  make_tasks(task);
  moe_config_init(&config);
  config.layers = V01_LAYERS;
  config.hidden = V01_HIDDEN;
  config.ffn = V01_FFN;
  config.heads = V01_HEADS;
  config.vocab = r->features ? 0 : V01_VOCAB;
  config.features = r->features ? V01_FEATURES : 0;
  config.positions = V01_POSITIONS;
  config.max_len = V01_MAX_LEN;
  config.router = r->router;
  config.unit = r->unit;
  config.selection = r->selection;
  config.experts = r->experts;
  config.top_k = r->top_k;
  config.gate_scale_n = r->gate_scale_n;
  config.renormalize = r->renormalize;
  config.rank = 3;
  config.vector = 7;
  config.temperature = 0.25f;
  config.cased = r->cased;
  config.truncate = r->right ? MOE_TRUNCATE_RIGHT : MOE_TRUNCATE_LONGEST;
  need(moe_model_create(&model, &config, task, V01_TASKS, 1, &env));
  if (!r->features) need(moe_model_set_vocab(model, v01_vocab, sizeof v01_vocab - 1, &env));
  enlarge(model);
  return model;
}

static moe_trainer *make_trainer(moe_model *model) {
  int gates = moe_model_config(model)->router != MOE_ROUTER_DENSE &&
              moe_model_config(model)->unit == MOE_UNIT_FFN;
  moe_train_config train;
  moe_limits limits;
  moe_trainer *trainer;
  moe_train_config_init(&train);
  train.rate = V01_LR;
  train.steps = V01_STEPS;
  train.warmup = V01_WARMUP;
  train.decay = V01_DECAY;
  train.clip = V01_CLIP;
  train.dropout = V01_DROPOUT;
  train.balance = gates ? V01_BALANCE : 0;
  train.z_loss = gates ? V01_Z_LOSS : 0;
  train.jitter = gates ? V01_JITTER : 0;
  train.seed = V01_SEED;
  limits.tokens = V01_M;
  limits.sequences = V01_S;
  limits.training = 1;
  need(moe_trainer_create(&trainer, model, &limits, &train, &env));
  return trainer;
}

static int has_features(const moe_model *model) { return moe_model_config(model)->features > 0; }

static const int32_t *kinds_of(const moe_model *model) {
  return moe_model_tasks(model) == 2 ? two_kinds : all_kinds;
}

static void train_step(moe_trainer *trainer, const v01_rows *rows, int features, float *loss,
                       float *norm) {
  moe_batch batch = v01_batch(rows, features);
  need(moe_accumulate(trainer, &batch, 0, loss, NULL, &env));
  need(moe_update(trainer, norm, &env));
}

static uint64_t hash_of(moe_model *model) {
  const float *w = moe_model_weights(model);
  uint64_t sum = 0;
  moe_tensor t;
  int32_t i;
  for (i = 0; w && i < moe_model_tensors(model); ++i) {
    need(moe_model_tensor(model, i, &t));
    sum += v01_hash(t.name, w + t.offset, t.count);
  }
  return sum;
}

/* ---- the header ---- */

static int printed; /* numbers in the array so far */

static void print_float(float x) {
  fprintf(header, "%s0x%08xu",
          !printed      ? "\n    "
          : printed % 7 ? ", "
                        : ",\n    ",
          (unsigned)v01_bits(x));
  ++printed;
}

static void print_begin(const char *name, const char *what) {
  fprintf(header, "static const uint32_t v01_%s_%s[] = {", name, what);
  printed = 0;
}

static int print_end(void) {
  fprintf(header, "};\n");
  return printed;
}

static int print_scores(const moe_model *model) {
  int32_t i, C = moe_model_max_classes(model);
  float scores[V01_S * 3];
  moe_limits limits;
  moe_context *context;
  moe_batch batch;
  v01_rows rows;
  limits.tokens = V01_M;
  limits.sequences = V01_S;
  limits.training = 0;
  v01_fill(&rows, kinds_of(model), moe_model_tasks(model), 0);
  batch = v01_batch(&rows, has_features(model));
  need(moe_context_create(&context, model, &limits, &env));
  need(moe_forward(context, scores, &batch, &env));
  for (i = 0; i < V01_S * C; ++i) print_float(scores[i]);
  moe_context_free(context);
  return print_end();
}

static int print_said(const moe_model *model) {
  moe_predictor *p;
  int32_t t, i, c;
  need(moe_predictor_create(&p, model, 1, &env));
  for (t = 0; t < moe_model_tasks(model); ++t)
    for (i = 0; i < 2; ++i) {
      int32_t kind = kinds_of(model)[t];
      const char *const *text = v01_text[kind][i];
      float score[3];
      need(kind == 3 ? moe_predict_spans(p, t, &text[0], &text[1], v01_chars[i], 1, score, NULL)
                     : moe_predict_text(p, t, text[0], text[1], score, NULL));
      for (c = 0; c < moe_model_task(model, t)->classes; ++c) print_float(score[c]);
    }
  moe_predictor_free(p);
  return print_end();
}

static void print_row(const char *file, const char *name, int scores, int said, uint64_t read,
                      const float *loss, const float *norm, uint64_t trained) {
  int i;
  fprintf(table, "    {\"%s\",\n     v01_%s_scores,\n     %d,\n", file, name, scores);
  if (said)
    fprintf(table, "     v01_%s_said,\n     %d,\n", name, said);
  else
    fprintf(table, "     NULL,\n     0,\n");
  fprintf(table, "     0x%016llxu,\n     {", (unsigned long long)read);
  for (i = 0; i < V01_MORE; ++i) fprintf(table, "%s0x%08xu", i ? ", " : "", v01_bits(loss[i]));
  fprintf(table, "},\n     {");
  for (i = 0; i < V01_MORE; ++i) fprintf(table, "%s0x%08xu", i ? ", " : "", v01_bits(norm[i]));
  fprintf(table, "},\n     0x%016llxu},\n", (unsigned long long)trained);
}

/* ---- the answers ---- */

/* What v0.1 says of a file that it has written: it is read again for that. */
static void answer(const char *file) {
  char name[64];
  moe_model *model;
  uint64_t read, trained = 0;
  float loss[V01_MORE] = {0}, norm[V01_MORE] = {0};
  int scores, said = 0, i;
  snprintf(name, sizeof name, "%.*s", (int)strcspn(file, "."), file);
  need(moe_model_load(&model, file, &env));
  read = hash_of(model);
  print_begin(name, "scores");
  scores = print_scores(model);
  if (!has_features(model)) {
    print_begin(name, "said");
    said = print_said(model);
  }
  if (read) {
    moe_trainer *trainer = make_trainer(model);
    for (i = 0; i < V01_MORE; ++i) {
      v01_rows rows;
      v01_fill(&rows, kinds_of(model), moe_model_tasks(model), 50 + i);
      train_step(trainer, &rows, has_features(model), &loss[i], &norm[i]);
    }
    trained = hash_of(model);
    moe_trainer_free(trainer);
  }
  print_row(file, name, scores, said, read, loss, norm, trained);
  moe_model_free(model);
}

/* A training that is saved in the middle, with the sampler that draws its rows. */
static void checkpoint(const char *file) {
  static const recipe tag = {
      "", MOE_ROUTER_TASK, MOE_UNIT_FFN, MOE_SELECT_SOFTMAX, 2, 1, 1, 0, 0, 0, 0};
  moe_model *model = make_model(&tag);
  moe_trainer *trainer = make_trainer(model);
  moe_sampler sampler;
  moe_sampler_config config;
  int64_t used[V01_TASKS], row;
  float loss[V01_STEPS], norm[V01_STEPS];
  uint64_t read = 0;
  int i, s, t, scores = 0, said = 0;
  memset(&config, 0, sizeof config);
  config.sampling = MOE_SAMPLING_TEMPERATURE;
  config.tau = V01_TAU;
  config.seed = V01_SAMPLER_SEED;
  config.draws = V01_STEPS * V01_S;
  need(moe_sampler_init(&sampler, &config, v01_task_rows, used, V01_TASKS, &env));
  for (i = 0; i < V01_SAVED + V01_MORE; ++i) {
    v01_rows rows;
    if (i == V01_SAVED) {
      need(moe_checkpoint_save(trainer, &sampler, V01_NOTE, file, &env));
      read = hash_of(model);
      print_begin("tag_checkpoint", "scores");
      scores = print_scores(model);
      print_begin("tag_checkpoint", "said");
      said = print_said(model);
    }
    memset(&rows, 0, sizeof rows);
    for (s = 0; s < V01_S; ++s) {
      moe_sample(&sampler, &t, &row);
      v01_add(&rows, t, t, row);
    }
    train_step(trainer, &rows, 0, &loss[i], &norm[i]);
  }
  print_row(file, "tag_checkpoint", scores, said, read, loss + V01_SAVED, norm + V01_SAVED,
            hash_of(model));
  fprintf(header, "static const int64_t v01_used[] = {");
  for (i = 0; i < V01_TASKS; ++i) fprintf(header, "%s%lld", i ? ", " : "", (long long)used[i]);
  fprintf(header, "}; /* rows drawn of each task in the end */\n");
  moe_trainer_free(trainer);
  moe_model_free(model);
}

int main(void) {
  moe_model *model, *small, *eight;
  char line[256];
  int i, step;
  need(moe_env_init(&env, MOE_ISA_AUTO));
  env.log = show;
  header = fopen("../v01.h", "w");
  table = tmpfile();
  if (!header || !table) return fprintf(stderr, "make: ../v01.h cannot be written\n"), 1;
  fprintf(header, "/* v01.h - what v0.1 says of the files in v01/; made by v01/make.c */\n");
  fprintf(header, "/* clang-format off */\n");
  fprintf(header, "#ifndef V01_H_INCLUDED\n#define V01_H_INCLUDED\n#include \"v01_cases.h\"\n\n");
  for (i = 0; i < RECIPES; ++i) {
    moe_trainer *trainer;
    v01_rows rows;
    model = make_model(&recipes[i]);
    trainer = make_trainer(model);
    for (step = 0; step < V01_STEPS; ++step) {
      v01_fill(&rows, all_kinds, V01_TASKS, step);
      train_step(trainer, &rows, recipes[i].features, NULL, NULL);
    }
    moe_trainer_free(trainer);
    need(moe_model_save(model, recipes[i].file, &env));
    moe_model_free(model);
    answer(recipes[i].file);
  }
  need(moe_model_load(&model, "tag.model", &env));
  need(moe_model_extract(&small, model, two_kinds, 2, dropped, &env));
  need(moe_model_save(small, "extracted.model", &env));
  answer("extracted.model");
  need(moe_model_quantize(&eight, model, &env));
  need(moe_model_save(eight, "int8.model", &env));
  answer("int8.model");
  checkpoint("tag.checkpoint");
  fprintf(header, "\nstatic const v01_answer v01_answers[] = {\n");
  rewind(table);
  while (fgets(line, sizeof line, table)) fputs(line, header);
  fprintf(header, "};\nenum { V01_ANSWERS = sizeof v01_answers / sizeof *v01_answers };\n#endif\n");
  moe_model_free(small), moe_model_free(eight), moe_model_free(model);
  return fclose(header) != 0;
}
