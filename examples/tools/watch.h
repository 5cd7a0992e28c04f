/* watch.h - training that can be watched: a line for each epoch, a CSV file with a row for each
   step, event files for TensorBoard */
#ifndef TOOLS_WATCH_H
#define TOOLS_WATCH_H
#include "score.h"
#include <time.h>
#ifdef _WIN32
#include <direct.h>
#else
#include <sys/stat.h>
#endif

static struct {
  const char *log, *tensorboard;
  int each_epoch;
  FILE *csv, *events;
  const char *run;
  const int *which; /* (n) tasks of the run */
  int n;
  float lr, norm, *loss, *rows; /* (n_tasks) of this step: sums of losses, rows; one block */
  float *dev;                   /* (n_tasks) metrics, */
  int looked;                   /* 1: of this step */
} watch;

static const option watch_options[] = {
    GROUP("watching"),
    FLAG("--watch", watch.each_epoch, "a line for each epoch: loss, the metrics on dev, the best"),
    STRING("--log", "FILE", watch.log, NULL,
           "CSV, a row for each step: loss, rate, norm of the gradient, tokens/s, each task's loss "
           "and, after an epoch, metric; --resume goes on in it, with the steps since the "
           "checkpoint again"),
    STRING("--tensorboard", "DIR", watch.tensorboard, NULL,
           "the same as event files, in a folder for each run"),
    END_OF_OPTIONS};

static inline int watching(void) { return watch.log || watch.tensorboard || watch.each_epoch; }

/* ---- event files: TensorBoard reads TFRecords of protocol buffers ---- */

static inline uint32_t crc32c(const char *bytes, size_t n) {
  uint32_t crc = 0xffffffffu;
  int k;
  for (; n; --n)
    for (crc ^= (unsigned char)*bytes++, k = 0; k < 8; ++k)
      crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  crc = ~crc;
  return (crc >> 15 | crc << 17) + 0xa282ead8u; /* masked, as TFRecords have it */
}

/* A number in little endian, of any machine. */
static inline void put_number(text *t, uint64_t v, int bytes) {
  for (; bytes--; v >>= 8) {
    char byte = (char)(v & 255);
    put_bytes(t, &byte, 1);
  }
}

/* The head of a field of a protocol buffer; kind 0: a number, 1: 8 bytes, 2: bytes, 5: 4 bytes. */
static inline void put_varint(text *t, uint64_t v) {
  for (; v > 127; v >>= 7) put_number(t, (v & 127) | 128, 1);
  put_number(t, v, 1);
}

static inline void put_block(text *t, int field, const text *inner) {
  put_varint(t, (uint64_t)(field << 3 | 2));
  put_varint(t, inner->bytes);
  put_bytes(t, inner->data, inner->bytes);
}

static inline uint64_t bits_of(const void *v, size_t bytes) {
  uint64_t wide = 0;
  uint32_t narrow;
  if (bytes == 8) return memcpy(&wide, v, 8), wide;
  return memcpy(&narrow, v, 4), narrow;
}

static inline void write_event(int64_t step, const text *inner, int field) {
  text event = {NULL, 0, 0}, record = {NULL, 0, 0};
  double now = (double)time(NULL);
  put_varint(&event, 1 << 3 | 1);
  put_number(&event, bits_of(&now, 8), 8);
  put_varint(&event, 2 << 3);
  put_varint(&event, (uint64_t)step);
  put_block(&event, field, inner);
  put_number(&record, event.bytes, 8);
  put_number(&record, crc32c(record.data, 8), 4);
  put_bytes(&record, event.data, event.bytes);
  put_number(&record, crc32c(event.data, event.bytes), 4);
  fwrite(record.data, 1, record.bytes, watch.events);
  free(event.data), free(record.data);
}

/* Adds a value to those of a step. */
static inline void put_scalar(text *values, const char *group, const char *tag, double v) {
  text value = {NULL, 0, 0}, name = {NULL, 0, 0};
  float narrow = (float)v;
  put(&name, "%s/%s", group, tag);
  put_block(&value, 1, &name);
  put_varint(&value, 2 << 3 | 5);
  put_number(&value, bits_of(&narrow, 4), 4);
  put_block(values, 1, &value);
  free(value.data), free(name.data);
}

static inline void make_folder(const char *path) {
#ifdef _WIN32
  int failed = _mkdir(path);
#else
  int failed = mkdir(path, 0777);
#endif
  if (failed && errno != EEXIST) die("--tensorboard: cannot make %s: %s", path, strerror(errno));
}

static inline void open_events(const char *run) {
  char *folder = printed("%s/%s", watch.tensorboard, run), *s;
  const char *path;
  text version = {NULL, 0, 0};
  for (s = folder + strlen(watch.tensorboard) + 1; *s; ++s)
    if (*s == ' ') *s = '-';
  make_folder(watch.tensorboard);
  make_folder(folder);
  path = printed("%s/events.out.tfevents.%lld.moe", folder, (long long)time(NULL));
  watch.events = fopen(path, "ab");
  if (!watch.events) die("--tensorboard: %s cannot be written: %s", path, strerror(errno));
  put(&version, "brain.Event:2");
  write_event(0, &version, 3);
  free(version.data);
}

/* ---- what is told ---- */

static inline void check_log(FILE *f, const char *name, const char *path) {
  if (f && (fflush(f) || ferror(f))) die("%s: %s cannot be written", name, path);
}

/* Drops the end of a log that a kill or a full disk has cut in a line; 0: nothing is left. */
static inline int whole_lines(const char *path) {
  text log = {NULL, 0, 0};
  void *file;
  size_t bytes, n;
  if (!exists(path)) return 0;
  need(moe_file_read(&file, &bytes, path, &env));
  for (n = bytes; n && ((const char *)file)[n - 1] != '\n'; --n) continue;
  put_bytes(&log, (const char *)file, n);
  moe_free(file);
  if (n < bytes)
    save_text(&log, path);
  else
    free(log.data);
  return n > 0;
}

static inline void begin_watch(const char *run, const int *which, int n, int goes_on) {
  int t;
  watch.run = run;
  watch.which = which;
  watch.n = n;
  if (!watching()) return;
  if (!watch.loss) {
    watch.loss = (float *)lasting(2 * (size_t)n_tasks, sizeof *watch.loss);
    watch.rows = watch.loss + n_tasks;
    watch.dev = (float *)lasting((size_t)n_tasks, sizeof *watch.dev);
  }
  if (my_rank) return; /* rank 0 writes */
  if (watch.log && !watch.csv) {
    int more = goes_on && whole_lines(watch.log);
    watch.csv = fopen(watch.log, more ? "ab" : "wb");
    if (!watch.csv) die("--log: %s cannot be written: %s", watch.log, strerror(errno));
    if (!more) {
      fprintf(watch.csv, "run,step,loss,lr,grad_norm,tokens_per_second");
      for (t = 0; t < n_tasks; ++t) fprintf(watch.csv, ",loss %s", tasks[t].task.name);
      for (t = 0; t < n_tasks; ++t) fprintf(watch.csv, ",dev %s", tasks[t].task.name);
      fprintf(watch.csv, "\n");
    }
  }
  if (watch.tensorboard) open_events(run);
}

/* The loss of a row of task t of the table. */
static inline void watch_loss(int t, float loss) {
  watch.loss[t] += loss;
  ++watch.rows[t];
}

static inline void watch_csv(int64_t step, double loss, double speed) {
  int t;
  fprintf(watch.csv, "%s,%lld,%.6g,%.6g,%.6g,%.0f", watch.run, (long long)step, loss,
          (double)watch.lr, (double)watch.norm, speed);
  for (t = 0; t < n_tasks; ++t)
    if (watch.rows[t] > 0)
      fprintf(watch.csv, ",%.6g", (double)(watch.loss[t] / watch.rows[t]));
    else
      fputc(',', watch.csv);
  for (t = 0; t < n_tasks; ++t) {
    int i, of = 0;
    for (i = 0; i < watch.n; ++i) of |= watch.which[i] == t;
    if (watch.looked && of)
      fprintf(watch.csv, ",%.6f", (double)watch.dev[t]);
    else
      fputc(',', watch.csv);
  }
  fputc('\n', watch.csv);
}

static inline void watch_events(int64_t step, double loss, double speed) {
  text values = {NULL, 0, 0};
  int i;
  put_scalar(&values, "train", "loss", loss);
  put_scalar(&values, "train", "lr", (double)watch.lr);
  put_scalar(&values, "train", "grad_norm", (double)watch.norm);
  put_scalar(&values, "train", "tokens_per_second", speed);
  for (i = 0; i < watch.n; ++i) {
    int t = watch.which[i];
    const char *name = tasks[t].task.name;
    if (watch.rows[t] > 0)
      put_scalar(&values, "loss", name, (double)(watch.loss[t] / watch.rows[t]));
    if (watch.looked) put_scalar(&values, "dev", name, (double)watch.dev[t]);
  }
  write_event(step, &values, 5);
  free(values.data);
}

/* Lines of 80 columns for an epoch. */
static inline void watch_epoch(const char *title, int64_t epoch, double loss, double mean,
                               const char *best) {
  int i, column = 80;
  clear_progress();
  fprintf(stderr, "%s epoch %lld: loss %.4f, mean %.4f%s", title, (long long)epoch, loss, mean,
          best);
  for (i = 0; i < watch.n && watch.n > 1; ++i) {
    const char *name = tasks[watch.which[i]].task.name;
    int width = (int)strlen(name) + 9;
    if (column + width > 79) column = fprintf(stderr, "\n ") - 1;
    column += fprintf(stderr, "  %s %.4f", name, (double)watch.dev[watch.which[i]]);
  }
  fprintf(stderr, "\n");
}

/* Ends a step. */
static inline void watch_step(int64_t step, double loss, double speed) {
  add_floats(watch.loss, 2 * (size_t)n_tasks);
  if (watch.csv) watch_csv(step, loss, speed);
  if (watch.events) watch_events(step, loss, speed);
  if (watch.looked) check_log(watch.csv, "--log", watch.log);
  if (watch.looked) check_log(watch.events, "--tensorboard", watch.tensorboard);
  memset(watch.loss, 0, 2 * (size_t)n_tasks * sizeof *watch.loss);
  watch.looked = 0;
}

static inline void end_watch(void) {
  check_log(watch.csv, "--log", watch.log);
  check_log(watch.events, "--tensorboard", watch.tensorboard);
  if (watch.events) fclose(watch.events);
  watch.events = NULL;
}
#endif
