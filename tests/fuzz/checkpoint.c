/* Checkpoints, into a trainer and a sampler that fit some of them. A refused one changes nothing.
 */

enum { CHECKPOINT_TASKS = 2 };

static struct {
  moe_model *model;
  moe_trainer *trainer;
  int64_t rows[CHECKPOINT_TASKS], used[CHECKPOINT_TASKS];
  moe_sampler sampler;
} checkpoint;

/* What seeds.c has written its checkpoints from. */
static void checkpoint_begin(const moe_env *env) {
  moe_limits limits = {16, 2, 1, 0};
  moe_train_config config;
  moe_sampler_config drawing;
  moe_task task[FUZZ_TASKS];
  moe_config c = fuzz_config(task);
  moe_train_config_init(&config);
  config.steps = 100;
  memset(&drawing, 0, sizeof drawing);
  drawing.sampling = MOE_SAMPLING_NATURAL;
  drawing.seed = 1;
  checkpoint.rows[0] = checkpoint.rows[1] = 24;
  OUGHT(!moe_model_create(&checkpoint.model, &c, task, CHECKPOINT_TASKS, 1, env));
  OUGHT(!moe_model_set_vocab(checkpoint.model, fuzz_words_of, strlen(fuzz_words_of), env));
  OUGHT(!moe_trainer_create(&checkpoint.trainer, checkpoint.model, &limits, &config, env));
  OUGHT(!moe_sampler_init(&checkpoint.sampler, &drawing, checkpoint.rows, checkpoint.used,
                          CHECKPOINT_TASKS, env));
}

static void fuzz_checkpoint(const uint8_t *d, size_t n) {
  moe_env env = fuzz_env();
  moe_sampler *sampler = n % 3 ? &checkpoint.sampler : NULL;
  float *w = moe_model_weights(checkpoint.model), first = w[0];
  int64_t step = moe_trainer_steps_done(checkpoint.trainer), row;
  size_t bytes, length = 0, before = fuzz_live;
  unsigned char *file = fuzz_file(d, n, &bytes);
  char note[64];
  int32_t t;
  memset(note, 1, sizeof note);
  if (TRY(moe_checkpoint_read(checkpoint.trainer, sampler, file, bytes, &env))) {
    OUGHT(w[0] == first && moe_trainer_steps_done(checkpoint.trainer) == step);
  } else {
    size_t i;
    for (i = 0; i < moe_model_parameters(checkpoint.model); ++i) OUGHT(w[i] - w[i] == 0);
    OUGHT(moe_trainer_steps_done(checkpoint.trainer) >= 0);
  }
  moe_sampler_next(&checkpoint.sampler, &t, &row);
  OUGHT(t >= 0 && t < CHECKPOINT_TASKS && row >= 0 && row < checkpoint.rows[t]);
  if (!TRY(moe_checkpoint_note(note, sizeof note, &length, file, bytes, &env)))
    OUGHT(strlen(note) == (length < sizeof note ? length : sizeof note - 1));
  OUGHT(fuzz_live == before);
  free(file);
}
