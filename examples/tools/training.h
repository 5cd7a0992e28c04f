/* training.h - one training of one model: steps in micro-batches, progress, the best epoch, the
   checkpoint to go on from after Ctrl-C or a kill, bit for bit */
#ifndef TOOLS_TRAINING_H
#define TOOLS_TRAINING_H
#include "results.h"
#include "watch.h"

static struct {
  const char *checkpoint, *resume;
  int every;
} state;

static const option state_options[] = {
    GROUP("state"),
    STRING("--checkpoint", "FILE", state.checkpoint, NULL,
           "state to go on from; names as with --save; what is finished is in FILE.results; "
           "FILE.lock keeps a second run out"),
    WHOLE("--every", state.every, 1, 1000000000, "500",
          "steps from one checkpoint to the next; the last step has one too"),
    STRING("--resume", "FILE", state.resume, NULL,
           "go on from there, bit for bit; give the same options again"),
    END_OF_OPTIONS};

static inline const char *checkpoint_name(void) {
  return state.checkpoint ? state.checkpoint : "checkpoint.safetensors";
}

static moe_lock *checkpoint_lock;

static inline void unlock_checkpoint(void) {
  moe_file_unlock(checkpoint_lock);
  checkpoint_lock = NULL;
}

/* A second run on one checkpoint would replace this one's steps by its own. */
static inline void lock_checkpoint(void) {
  if (!state.checkpoint || my_rank) return;
  need(moe_file_lock(&checkpoint_lock, state.checkpoint, &env));
  atexit(unlock_checkpoint);
}

/* A training of one model: what it is given (zero: not wanted), then how it went. */
typedef struct job {
  const char *name;  /* of the part or the run: a checkpoint of another is not gone on from */
  const char *title; /* shown */
  const char *path;  /* the checkpoint, written with --checkpoint or when interrupted */
  const char *from;  /* the one to go on from */
  const int *which;  /* (n) tasks of the table */
  int n, batch, micro_batch, one_of_many; /* 1: nobody waits for its last checkpoint */
  int choose;              /* 1: keep the best epoch by the rows held out, 2: by dev */
  int64_t epoch, patience; /* steps; epochs that are no better until it ends */
  moe_train_config config;
  moe_sampler_config sampling;
  void (*begin)(const struct job *j); /* before the first step of this process */
  void (*after)(const struct job *j, const moe_model *model, int64_t step); /* each step */
  void (*put_state)(text *to);         /* a line of what the program keeps outside of the model, */
  void (*get_state)(const char *line); /* and back */

  moe_trainer *trainer;
  size_t parameters; /* with several ranks */
  moe_sampler sampler;
  moe_model *best; /* of the epochs so far, NULL: none has ended */
  int64_t best_step;
  double score, tokens, seconds, first_tokens; /* tokens of earlier processes */
  int best_unsaved;
} job;

/* Finished models that later work begins with; an interrupted program leaves them at `path`. */
typedef struct kept_model {
  const char *path;
  moe_model *model;
  int passing; /* 1: drop_kept forgets it */
  struct kept_model *next;
} kept_model;
static kept_model *kept_models;

static inline void keep_model(const char *path, moe_model *model, int passing) {
  kept_model *k = (kept_model *)lasting(1, sizeof *k);
  k->path = path;
  k->model = model;
  k->passing = passing;
  k->next = kept_models;
  kept_models = k;
}

static inline void drop_kept(void) {
  for (; kept_models && kept_models->passing; kept_models = kept_models->next)
    moe_model_free(kept_models->model);
}

static inline char *best_path(const char *checkpoint) { return printed("%s.best", checkpoint); }

static inline void write_model(const moe_model *model, const char *path) {
  if (!my_rank) need(moe_model_save(model, path, &env));
}

static inline void remove_file(const char *path) {
  if (!my_rank) remove(path);
}

static inline void remove_checkpoint(const char *path) {
  remove_file(best_path(path));
  remove_file(path);
}

/* A row of a batch. */
typedef struct drawn {
  int32_t task;
  int64_t row;
  float weight;
} drawn;

/* Draws a batch. With class weights the loss of a task is the weighted mean over its rows in the
   batch, as that of PyTorch's CrossEntropyLoss(weight=...); how much a task counts is as without.
   1: some task has class weights. */
static inline int draw_batch(job *j, drawn *d) {
  double *sum = (double *)take(2 * (size_t)j->n, sizeof *sum), *count = sum + j->n;
  int i, weighted = 0;
  for (i = 0; i < j->batch; ++i) {
    const task_data *t;
    moe_sampler_next(&j->sampler, &d[i].task, &d[i].row);
    t = &tasks[j->which[d[i].task]];
    d[i].weight = t->class_weight ? t->class_weight[(int)t->train.row[d[i].row].label] : 1;
    weighted |= t->class_weight != NULL;
    sum[d[i].task] += (double)d[i].weight;
    count[d[i].task] += 1;
  }
  for (i = 0; i < j->batch; ++i)
    if (tasks[j->which[d[i].task]].class_weight && sum[d[i].task] > 0)
      d[i].weight = (float)((double)d[i].weight * count[d[i].task] / sum[d[i].task]);
  free(sum);
  return weighted;
}

/* One optimizer step: draws a batch and runs this rank's rows of it in micro-batches of at most
   `room` tokens. The loss is that of the whole batch. */
static inline float train_step(job *j, batch_buffer *b, int32_t room) {
  long long step = moe_trainer_steps_done(j->trainer) + 1;
  float loss, *losses = NULL;
  double whole[2] = {0, 0}; /* loss, tokens */
  drawn *d = (drawn *)take((size_t)j->batch + 1, sizeof *d);
  int i, k, overlap = j->config.ready != NULL;
  if (watching()) losses = (float *)take((size_t)j->batch, sizeof *losses);
  b->batch.weight = draw_batch(j, d) ? b->weight : NULL;
  clear_batch(b);
  for (i = 0; i <= j->batch; ++i) {
    const rows *r = i < j->batch ? &tasks[j->which[d[i].task]].train : NULL;
    if (r && i % ranks != my_rank) continue;
    /* a rank without rows takes part as well */
    if ((b->batch.S || (!r && overlap)) && (!r || b->tokens + row_length(r, d[i].row) > room)) {
      moe_status s;
      if (!r && overlap) begin_overlap(moe_trainer_gradients(j->trainer));
      s = moe_trainer_accumulate(j->trainer, &b->batch, j->batch, &loss, losses, &env);
      if (s)
        die("training stopped in step %lld (%s); try a smaller --lr", step, moe_status_text(s));
      for (k = 0; k < b->batch.S && losses; ++k) watch_loss(j->which[b->task[k]], losses[k]);
      whole[0] = (double)((float)whole[0] + loss);
      whole[1] += b->tokens;
      clear_batch(b);
    }
    if (r) b->weight[b->batch.S] = d[i].weight;
    if (r) add_row(b, r, d[i].row, d[i].task, i);
  }
  free(losses), free(d);
  add_gradients(moe_trainer_gradients(j->trainer), j->parameters);
  add_doubles(whole, 2);
  j->tokens += whole[1];
  watch.lr = moe_trainer_lr(j->trainer);
  if (moe_trainer_step(j->trainer, &watch.norm, &env))
    die("training stopped in step %lld; try a smaller --lr", step);
  return (float)whole[0];
}

static inline void copy_weights(moe_model *to, moe_model *from) {
  memcpy(moe_model_weights(to), moe_model_weights(from),
         moe_model_parameters(from) * sizeof(float));
}

static inline moe_model *copy_model(const moe_model *model) {
  int32_t n = moe_model_tasks(model), *all = (int32_t *)take((size_t)n, sizeof *all), i;
  moe_model *out;
  for (i = 0; i < n; ++i) all[i] = i;
  need(moe_model_extract(&out, model, all, n, NULL, &env));
  free(all);
  return out;
}

/* The mean of the tasks' metrics on what the best epoch is chosen by, else on dev. */
static inline double look(const job *j, moe_context *context, const moe_model *model) {
  double score = 0;
  int i;
  for (i = 0; i < j->n; ++i) {
    const task_data *d = &tasks[j->which[i]];
    int sets = j->choose == 1 ? 1 : d->n_dev, k;
    double value = 0;
    for (k = 0; k < sets; ++k) {
      answers a = score_rows(context, model, j->choose == 1 ? &d->held : &d->dev[k], i, NULL);
      double v = metric_of(&d->task, 0, a.answer, a.label, a.n, NULL);
      score += v / sets / j->n;
      value += v / sets;
      free_answers(&a);
    }
    if (watching()) watch.dev[j->which[i]] = (float)value;
  }
  watch.looked = 1;
  return score;
}

/* Takes the weights if they score better than those that are kept. */
static inline void offer_best(job *j, moe_model *model, double score) {
  if (j->best && !(score > j->score)) return;
  if (!j->best)
    j->best = copy_model(model);
  else
    copy_weights(j->best, model);
  j->score = score;
  j->best_step = moe_trainer_steps_done(j->trainer);
  j->best_unsaved = 1;
}

/* After an epoch: its score, which may be the best so far. */
static inline void end_epoch(job *j, moe_context *context, moe_model *model, double loss) {
  int64_t step = moe_trainer_steps_done(j->trainer), epoch = (step + j->epoch - 1) / j->epoch;
  double score = look(j, context, model);
  int64_t best;
  if (j->choose) offer_best(j, model, score);
  best = (j->best_step + j->epoch - 1) / j->epoch;
  if (watch.each_epoch)
    watch_epoch(j->title, epoch, loss, score,
                !j->choose      ? ""
                : best == epoch ? ", the best so far"
                                : printed(", best %.4f in epoch %lld", j->score, (long long)best));
}

/* The best epoch's weights are kept beside the checkpoint, written before it: killed between the
   two, that file is ahead, but the epoch that it is of comes again and takes its place with the
   same weights. The note of a checkpoint has three lines: whose it is, the options, and how far it
   has come. */
static inline void write_state(job *j) {
  const char *best = best_path(j->path);
  text note = {NULL, 0, 0};
  if (j->choose && !j->best) remove_file(best); /* of another run */
  if (j->best_unsaved) write_model(j->best, best);
  j->best_unsaved = 0;
  put(&note, "%s\n%s\nbest %.17g at %lld, tokens %.0f", j->name, options_here, j->score,
      (long long)j->best_step, j->tokens);
  if (j->put_state) put(&note, "\n"), j->put_state(&note);
  if (!my_rank)
    need(moe_checkpoint_save(j->trainer, &j->sampler, note.data, j->path, &env));
  else
    need(moe_checkpoint_write(j->trainer, NULL, NULL, NULL, &env));
  free(note.data);
}

/* The note of a checkpoint, as lines. */
static inline list read_note(const void *file, size_t bytes) {
  size_t length;
  char *note;
  need(moe_checkpoint_note(NULL, 0, &length, file, bytes, &env));
  note = (char *)lasting(length + 1, 1);
  need(moe_checkpoint_note(note, length + 1, &length, file, bytes, &env));
  return split(note, '\n');
}

/* Goes on from a checkpoint, if there is one of this job. */
static inline void go_on(job *j) {
  list note;
  void *file;
  size_t bytes;
  long long at;
  if (!j->from) return;
  if (!exists(j->from)) { /* of several runs some have not begun */
    if (!n_finished && !strcmp(j->from, state.resume))
      die("cannot open %s: %s", j->from, strerror(errno));
    if (!j->one_of_many) fprintf(stderr, "there is no %s: %s starts anew\n", j->from, j->title);
    return;
  }
  need(moe_file_read(&file, &bytes, j->from, &env));
  read_from(j->from, 0);
  note = read_note(file, bytes);
  if (note.n < 3) die("made with other options: it has no note of this program");
  if (!strcmp(note.at[0], j->name)) {
    check_same_options(j->from, note.at[1]);
    read_from(j->from, 0);
    need(moe_checkpoint_read(j->trainer, &j->sampler, file, bytes, &env));
    if (sscanf(note.at[2], "best %lf at %lld, tokens %lf", &j->score, &at, &j->first_tokens) != 3)
      die("its note is damaged: \"%s\"", note.at[2]);
    if (j->get_state) j->get_state(note.at[note.n - 1]);
    j->best_step = at;

    j->best_unsaved = at != 0;
    j->tokens = j->first_tokens;
    fprintf(stderr, "going on from %s at step %lld\n", j->from,
            (long long)moe_trainer_steps_done(j->trainer));
    read_from(NULL, 0);
    if (at) need(moe_model_load(&j->best, best_path(j->from), &env));
  } else if (!j->one_of_many)
    die("made with other options: it is of \"%s\", not \"%s\"", note.at[0], j->name);
  read_from(NULL, 0);
  moe_free(file);
}

/* After Ctrl-C or a plain kill: says where the state is and how to go on. */
static inline void stop_here(job *j) {
  const kept_model *k;
  write_state(j);
  if (n_finished) write_parts(checkpoint_name());
  for (k = kept_models; k; k = k->next)
    if (!state.checkpoint || !exists(k->path)) write_model(k->model, k->path);
  fprintf(stderr, "\ninterrupted after step %lld; the state is in %s. To go on:\n  ",
          (long long)moe_trainer_steps_done(j->trainer), j->path);
  print_command(stderr, checkpoint_name());
  leave(128 + interrupted);
}

static inline void train_loop(job *j, moe_model *model, moe_context *context, int32_t room) {
  batch_buffer b = make_batch(room, j->batch < room ? j->batch : room);
  int64_t step = moe_trainer_steps_done(j->trainer), steps = j->config.steps;
  progress p = begin_progress(j->title, step, steps);
  int end = j->best && (step - j->best_step) / j->epoch >= j->patience;
  while (step < steps && !end) {
    float loss = train_step(j, &b, room);
    double speed = (j->tokens - j->first_tokens) / (seconds_now() - p.began + 1e-9);
    end = ++step == steps;
    if ((j->choose || watching()) && (step % j->epoch == 0 || end))
      end_epoch(j, context, model, (double)loss);
    end |= j->best && (step - j->best_step) / j->epoch >= j->patience;
    show_progress(&p, step, (double)loss, speed, end);
    if (watching()) watch_step(step, (double)loss, speed);
    if (j->after) j->after(j, model, step);
    interrupted = highest(interrupted);
    if (interrupted) stop_here(j);
    if (state.checkpoint && (step % state.every == 0 || (end && !j->one_of_many))) write_state(j);
  }
  j->seconds = seconds_now() - p.began;
  /* of a run that went on: as if the steps before had been as fast */
  if (j->tokens > j->first_tokens) j->seconds *= j->tokens / (j->tokens - j->first_tokens);
}

/* Trains the model to the end, or to its best epoch. */
static inline void train_model(job *j, moe_model *model) {
  int64_t *n_rows = (int64_t *)take(2 * (size_t)j->n, sizeof *n_rows), all;
  int32_t longest = moe_model_config(model)->max_len, room = j->micro_batch;
  moe_context *context;
  moe_limits limits;
  int i;
  if (env.backend) need(moe_model_pack(model, NULL, &env));
  context = j->choose || watching() ? make_context(model) : NULL;
  all = (int64_t)j->batch * longest;
  if (room < longest) room = longest;
  if (all < room) room = (int32_t)all;
  for (i = 0; i < j->n; ++i) n_rows[i] = tasks[j->which[i]].train.n;
  for (i = 0; i < j->n; ++i) balance_classes(&tasks[j->which[i]]);
  memset(&limits, 0, sizeof limits);
  limits.tokens = room;
  limits.sequences = j->batch < room ? j->batch : room;
  limits.training = 1;
  j->parameters = moe_model_parameters(model);
  divide_training(&j->config, j->parameters);
  need(moe_trainer_create(&j->trainer, model, &limits, &j->config, &env));
  need(moe_sampler_init(&j->sampler, &j->sampling, n_rows, n_rows + j->n, j->n, &env));
  go_on(j);
  if (j->begin) j->begin(j);
  begin_watch(j->name, j->which, j->n, state.resume != NULL);
  train_loop(j, model, context, room);
  end_watch();
  if (watch.each_epoch && j->best)
    fprintf(stderr, "%s: the weights of step %lld are kept\n", j->title, (long long)j->best_step);
  moe_trainer_free(j->trainer);
  if (j->best) {
    copy_weights(model, j->best);
    need(moe_model_pack(model, NULL, &env));
    moe_model_free(j->best);
  }
  moe_context_free(context);
  free(n_rows);
}
#endif
