/* Copy moe.h, this file and vocab.txt. mpicc -O2 -I. -o train_mpi examples/train_mpi.c -lm -pthread
   mpirun -n 4 ./train_mpi examples/data/vocab.txt
   Trains one model on several machines, or in several processes: every rank computes its share of
   each batch, one all-reduce adds up the gradients, and all take the same step. Dropout follows a
   row's place in the whole batch, so the losses are those of one rank, to rounding. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define MOE_IMPLEMENTATION
#include "moe.h"

enum { SENTIMENT, TOPIC, TASKS };
enum { LENGTH = 16, STEPS = 60 }; /* tokens of a text at most; steps of training */

static const char *const feelings[] = {"negative", "positive"}, *const topics[] = {"food",
                                                                                   "travel"};
static const moe_task tasks[TASKS] = {
    /* name, kind, pair, classes, low, high, metrics, max_len, labels */
    {"sentiment", MOE_KIND_CLASSIFICATION, 0, 2, 0, 0, "accuracy", 0, feelings},
    {"topic", MOE_KIND_CLASSIFICATION, 0, 2, 0, 0, "accuracy", 0, topics}};

static const struct row {
  int task, label;
  const char *text;
} rows[] = {{SENTIMENT, 1, "a wonderful book"},      {SENTIMENT, 0, "the film was boring"},
            {SENTIMENT, 1, "i loved this phone"},    {SENTIMENT, 0, "i hated every minute"},
            {SENTIMENT, 1, "great sound"},           {SENTIMENT, 0, "a boring story"},
            {TOPIC, 0, "a bowl of soup and bread"},  {TOPIC, 1, "the train leaves at noon"},
            {TOPIC, 0, "fish with rice and wine"},   {TOPIC, 1, "we missed our flight"},
            {TOPIC, 0, "fresh cheese and tomatoes"}, {TOPIC, 1, "a hotel near the airport"}};
enum { ROWS = sizeof rows / sizeof *rows };

static moe_env env;
static int rank, ranks;

static void say(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  fprintf(stderr, "rank %d: %s\n", rank, sentence);
}

/* A rank that cannot go on ends all: the others would wait for it. */
static void need(moe_status status) {
  if (status != MOE_OK) MPI_Abort(MPI_COMM_WORLD, 1); /* the log has said why */
}

/* This rank's rows of the whole batch, with their places in it. */
static moe_batch make_batch(const moe_tokenizer *tokenizer) {
  static int32_t ids[ROWS * LENGTH], start[ROWS + 1], task[ROWS];
  static int64_t place[ROWS];
  static float label[ROWS];
  moe_batch batch;
  moe_tokens tokens;
  int s, n = 0;
  memset(&tokens, 0, sizeof tokens);
  tokens.capacity = LENGTH;
  for (s = rank; s < ROWS; s += ranks, ++n) {
    moe_text text = moe_text_of(rows[s].text, NULL);
    tokens.ids = ids + start[n];
    need(moe_encode(tokenizer, &tokens, &text, LENGTH, MOE_TRUNCATE_LONGEST, &env));
    start[n + 1] = start[n] + tokens.count;
    task[n] = rows[s].task;
    label[n] = (float)rows[s].label;
    place[n] = s;
  }
  memset(&batch, 0, sizeof batch);
  batch.S = n, batch.seq_start = start, batch.index = place;
  batch.ids = ids, batch.task = task, batch.label = label;
  return batch;
}

/* Adds up the gradients of all ranks, in parts, since MPI counts in int. */
static void add_gradients(moe_trainer *trainer, size_t n) {
  float *g = moe_trainer_gradients(trainer);
  const size_t most = (size_t)1 << 26;
  size_t i, part;
  for (i = 0; i < n; i += part) {
    part = n - i < most ? n - i : most;
    MPI_Allreduce(MPI_IN_PLACE, g + i, (int)part, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  }
}

static void train(moe_model *model, const moe_batch *batch) {
  moe_train_config config;
  moe_limits limits = {ROWS * LENGTH, ROWS, 1, 0}; /* tokens, sequences; training */
  moe_trainer *trainer;
  int step;
  moe_train_config_init(&config);
  config.lr = 2e-3f, config.steps = STEPS;
  need(moe_trainer_create(&trainer, model, &limits, &config, &env));
  for (step = 1; step <= STEPS; ++step) {
    float mine = 0, loss;
    if (batch->S) /* the mean over all ROWS, of which these are some */
      need(moe_trainer_accumulate(trainer, batch, ROWS, &mine, NULL, &env));
    add_gradients(trainer, moe_model_parameters(model));
    MPI_Allreduce(&mine, &loss, 1, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    need(moe_trainer_step(trainer, NULL, &env));
    if (rank == 0 && step % 20 == 0) printf("step %d  loss %.6f\n", step, (double)loss);
  }
  moe_trainer_free(trainer);
}

static void ask(const moe_model *model, int32_t task, const char *text) {
  moe_predictor *predictor;
  float score[MOE_MAX_CLASSES];
  int best;
  need(moe_predictor_create(&predictor, model, 1, &env));
  need(moe_predict_text(predictor, task, text, NULL, score, &best));
  printf("%s: %s %.2f\n", text, tasks[task].label[best], (double)score[best]);
  moe_predictor_free(predictor);
}

int main(int argc, char **argv) {
  moe_config config;
  moe_model *model;
  moe_tokenizer *tokenizer;
  moe_batch batch;
  void *vocab;
  size_t bytes;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  if (argc != 2) {
    if (rank == 0) fprintf(stderr, "usage: mpirun -n RANKS %s VOCABULARY\n", argv[0]);
    return MPI_Finalize(), 1;
  }
  moe_env_init(&env, MOE_ISA_AUTO);
  env.log = say;
  need(moe_file_read(&vocab, &bytes, argv[1], &env));
  need(moe_tokenizer_create(&tokenizer, (char *)vocab, bytes, 0, &env));
  moe_config_init(&config); /* MT-TaG: four experts in a layer, a gate for each task */
  config.layers = 2, config.hidden = 64, config.ffn = 128, config.heads = 4;
  config.vocab = moe_tokenizer_words(tokenizer);
  config.positions = config.max_len = LENGTH;
  need(moe_model_create(&model, &config, tasks, TASKS, 1, &env));
  need(moe_model_set_vocab(model, (char *)vocab, bytes, &env)); /* goes into its file */
  batch = make_batch(tokenizer);
  train(model, &batch);
  if (rank == 0) { /* all have the same weights */
    need(moe_model_save(model, "two_tasks.safetensors", &env));
    ask(model, SENTIMENT, "a boring phone");
    ask(model, TOPIC, "wine and cheese on the train");
    if (fflush(stdout)) perror("rank 0: stdout"), need(MOE_E_IO);
  }
  moe_model_free(model);
  moe_tokenizer_free(tokenizer);
  moe_free(vocab);
  return MPI_Finalize(), 0;
}
