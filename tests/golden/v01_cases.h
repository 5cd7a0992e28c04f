/* v01_cases.h - what the maker of the v0.1 files (v01/make.c, compiled with v0.1's moe.h) and their
   test (../test_v01.c, compiled with today's) both need: rows, sentences, numbers of a training.
   Of moe.h only moe_batch is used here, so that its names may change. Include moe.h first. */
#ifndef V01_CASES_H_INCLUDED
#define V01_CASES_H_INCLUDED
#include <stdint.h>
#include <string.h>

/* The model: S and M are the most of a batch. */
enum {
  V01_S = 12,
  V01_LONGEST = 13,
  V01_M = V01_S * V01_LONGEST,
  V01_LAYERS = 2,
  V01_HIDDEN = 18,
  V01_FFN = 17,
  V01_HEADS = 3,
  V01_POSITIONS = 15,
  V01_MAX_LEN = 14,
  V01_EXPERTS = 3,
  V01_FEATURES = 5,
  V01_TASKS = 4,
  V01_STEPS = 12, /* of a training */
  V01_SAVED = 4,  /* steps before the checkpoint */
  V01_MORE = 3    /* steps after a file was read */
};

/* Of a training; the other settings are in make.c and test_v01.c. */
#define V01_LR 1e-2f
#define V01_WARMUP 0.25f
#define V01_DECAY 0.01f
#define V01_CLIP 1.0f
#define V01_DROPOUT 0.1f
#define V01_BALANCE 0.01f
#define V01_Z_LOSS 0.001f
#define V01_JITTER 0.02f
#define V01_SEED 0x123456789abcdefu
#define V01_SAMPLER_SEED (UINT64_MAX - 3)
#define V01_TAU 2.0f
#define V01_NOTE "--lr 1e-2 \"quoted\" \\ \n\t \xc3\xa9 end"

static const char v01_vocab[] =
    "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n.\n,\n?\n!\nthe\na\nis\nwas\nnot\nand\nof\nto\nin\nit\nI\n"
    "team\nplays\ngame\nwon\nlost\ngoal\nvote\nlaw\nparty\nstate\nelect\n##ion\n##s\n##ed\n##ing\n"
    "paint\nsong\ncolor\nmusic\nopera\ncaf\xc3\xa9\ncafe\nbank\nriver\nmoney\nboat\nrain\nsun\n"
    "warm\ncold\nwhy\nhow\nwhat\nbecause\nso\nred\nblue\nA\n\xe4\xb8\xad\n\xe6\x96\x87\n";
enum { V01_VOCAB = 60 };

static const int64_t v01_task_rows[V01_TASKS] = {17, 5, 40, 9};

/* Two inputs of each task: single texts of topic, pairs of the others. */
static const char *const v01_text[V01_TASKS][2][2] = {
    {{"The team won a game, and it was a goal!", NULL},
     {"Elections: I vote in A Caf\xc3\xa9", NULL}},
    {{"the sun is warm", "it was cold"}, {"opera is music", "\xe4\xb8\xad\xe6\x96\x87 songs"}},
    {{"why is it cold? what of the rain and the sun", "because of the rain"}, {"how", "so"}},
    {{"the bank of the river", "money in a bank"}, {"a boat", "boats is painted"}}};
/* For the last task: characters [b1, e1) of the first text and [b2, e2) of the second. */
static const int32_t v01_chars[2][4] = {{4, 8, 11, 15}, {2, 6, 0, 5}};

/* Rows of a batch, with the arrays they need. */
typedef struct v01_rows {
  int32_t S, start[V01_S + 1], ids[V01_M], task[V01_S], span[4 * V01_S];
  uint8_t segments[V01_M];
  float label[V01_S], features[V01_M * V01_FEATURES];
} v01_rows;

static uint32_t v01_random(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(*state >> 40);
}

/* Appends a row of task `kind` (0 .. 3, as in v01_text), which has number `task` in the model: a
   function of kind and row alone. */
static void v01_add(v01_rows *r, int32_t kind, int32_t task, int64_t row) {
  static const int32_t classes[V01_TASKS] = {3, 1, 2, 2};
  uint64_t state = (uint64_t)kind * 1000 + (uint64_t)row * 77 + 5;
  int32_t length = 3 + (int32_t)(v01_random(&state) % (V01_LONGEST - 2)), s = r->S++, i, j;
  int32_t *ids = r->ids + r->start[s], *span = r->span + 4 * s;
  r->start[s + 1] = r->start[s] + length;
  r->task[s] = task;
  r->label[s] = kind == 1 ? (float)(row % 11) * 0.5f : (float)(row % classes[kind]);
  for (i = 0; i < length; ++i) {
    ids[i] = (int32_t)(v01_random(&state) % V01_VOCAB);
    r->segments[r->start[s] + i] = (uint8_t)(i > length / 2);
    for (j = 0; j < V01_FEATURES; ++j)
      r->features[(r->start[s] + i) * V01_FEATURES + j] =
          (float)(int32_t)(v01_random(&state) % 4096 - 2048) / 1024.0f;
  }
  span[0] = length / 3;
  span[1] = span[0] + 1;
  span[2] = length / 2;
  span[3] = length;
}

/* The batch of these rows, with feature vectors or ids. */
static moe_batch v01_batch(const v01_rows *r, int features) {
  moe_batch b;
  memset(&b, 0, sizeof b);
  b.S = r->S;
  b.seq_start = r->start;
  if (features)
    b.features = r->features;
  else
    b.ids = r->ids;
  b.segments = r->segments;
  b.task = r->task;
  b.label = r->label;
  b.span = r->span;
  return b;
}

/* Batch number `step` of a model with T tasks, whose kinds are `kind`. */
static void v01_fill(v01_rows *r, const int32_t *kind, int32_t T, int32_t step) {
  int32_t s;
  memset(r, 0, sizeof *r);
  for (s = 0; s < V01_S; ++s) v01_add(r, kind[s % T], s % T, 100 * step + s);
}

static uint32_t v01_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

/* FNV-1a of a name and n floats, low byte first. The sum over the tensors of a model is its hash,
   which does not depend on their order. */
static uint64_t v01_hash(const char *name, const float *w, size_t n) {
  uint64_t h = 0xcbf29ce484222325u;
  size_t i;
  int k;
  for (; *name; ++name) h = (h ^ (unsigned char)*name) * 0x100000001b3u;
  for (i = 0; i < n; ++i) {
    uint32_t bits = v01_bits(w[i]);
    for (k = 0; k < 32; k += 8) h = (h ^ (bits >> k & 255)) * 0x100000001b3u;
  }
  return h;
}

/* What v0.1 says of one of its files. */
typedef struct v01_answer {
  const char *file;
  const uint32_t *scores; /* (S, C) bits of moe_forward's for v01_fill(step 0) */
  int32_t n_scores;
  const uint32_t *said; /* bits of the scores of v01_text, task by task; n_said 0: no vocabulary */
  int32_t n_said;
  uint64_t read;           /* hash of the weights in the file; 0: of 8 bits */
  uint32_t loss[V01_MORE]; /* bits, of V01_MORE more steps */
  uint32_t norm[V01_MORE];
  uint64_t trained; /* hash of the weights after them */
} v01_answer;
#endif
