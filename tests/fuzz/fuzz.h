/* What the targets share: a counting allocator, sentences, files made of a header, and a reader of
   the tools that ends where the program would. To be included once, before the targets. */
#ifndef FUZZ_H
#define FUZZ_H
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char fuzz_said[1024]; /* the library's last sentence */
static int fuzz_sentences;

/* What must hold for any input: it names the place and ends the process. */
#define OUGHT(c)                                                                                   \
  do {                                                                                             \
    if (!(c)) {                                                                                    \
      fprintf(stdout, "%s:%d: %s (said: %s)\n", __FILE__, __LINE__, #c, fuzz_said);                \
      fflush(stdout);                                                                              \
      abort();                                                                                     \
    }                                                                                              \
  } while (0)

/* ---- memory: how much is in use, what is left at the end of an input ---- */

enum { FUZZ_MOST = 64 << 20 }; /* bytes of one block that a small input may ask for */

typedef struct fuzz_block {
  struct fuzz_block *next, *last;
  size_t bytes, unused;
} fuzz_block;

static fuzz_block fuzz_blocks = {&fuzz_blocks, &fuzz_blocks, 0, 0};
static size_t fuzz_live, fuzz_peak;

static void *fuzz_malloc(size_t bytes) {
  fuzz_block *b;
  OUGHT(bytes <= FUZZ_MOST);
  b = (fuzz_block *)malloc(sizeof *b + bytes);
  OUGHT(b);
  b->bytes = bytes;
  b->next = fuzz_blocks.next;
  b->last = &fuzz_blocks;
  b->next->last = b->last->next = b;
  fuzz_live += bytes;
  if (fuzz_live > fuzz_peak) fuzz_peak = fuzz_live;
  return b + 1;
}

static void fuzz_free(void *p) {
  fuzz_block *b;
  if (!p) return;
  b = (fuzz_block *)p - 1;
  fuzz_live -= b->bytes;
  b->next->last = b->last;
  b->last->next = b->next;
  free(b);
}

static void *fuzz_calloc(size_t count, size_t size) {
  void *p = fuzz_malloc(count * size);
  return memset(p, 0, count * size);
}

static void *fuzz_realloc(void *p, size_t bytes) {
  void *q = fuzz_malloc(bytes);
  size_t old = p ? ((fuzz_block *)p - 1)->bytes : 0;
  if (p) memcpy(q, p, old < bytes ? old : bytes);
  fuzz_free(p);
  return q;
}

/* Frees what came after `since` bytes were in use, newest first. */
static void fuzz_free_all(size_t since) {
  while (fuzz_live > since) fuzz_free(fuzz_blocks.next + 1);
}

#define MOE_MALLOC fuzz_malloc
#define MOE_FREE fuzz_free
#define MOE_IMPLEMENTATION
#include "../../moe.h"

/* ---- sentences ---- */

static void fuzz_log(void *user, moe_status status, const char *sentence) {
  size_t i;
  (void)user;
  OUGHT(status > MOE_OK && status < MOE_STATUS_COUNT);
  if (getenv("FUZZ_SAY")) puts(sentence);
  snprintf(fuzz_said, sizeof fuzz_said, "%s", sentence);
  ++fuzz_sentences;
  for (i = 0; sentence[i]; ++i) OUGHT((unsigned char)sentence[i] >= 32 && sentence[i] != 127);
  OUGHT(i > 5 && i < 600);
}

/* The same bits on every machine; and what a library's caller would have. */
static moe_env fuzz_env(void) {
  moe_env e;
  moe_env_init(&e, MOE_ISA_AUTO);
  e.log = fuzz_log;
  fuzz_said[0] = 0;
  fuzz_sentences = 0;
  return e;
}

static moe_status fuzz_status(moe_status status) {
  OUGHT(status ? fuzz_sentences == 1 : fuzz_sentences == 0);
  return status;
}

/* Calls; a failure has one sentence, a success none. */
#define TRY(call) (fuzz_sentences = 0, fuzz_said[0] = 0, fuzz_status(call))

/* ---- files ---- */

/* A copy of that very size, so that a sanitizer sees a byte too many. */
static void *fuzz_copy(const void *data, size_t bytes) {
  void *p = malloc(bytes ? bytes : 1);
  if (bytes) memcpy(p, data, bytes);
  return p;
}

/* A file of safetensors: the bytes as they are; or, where they begin with {, a header: its length
   is put before it, and as many bytes of tensors behind it as it claims. */
static unsigned char *fuzz_file(const uint8_t *d, size_t n, size_t *bytes) {
  static const char mark[] = "data_offsets\":[";
  size_t i, j, v, most = 0;
  unsigned char *f;
  *bytes = n;
  if (!n || d[0] != '{') return (unsigned char *)fuzz_copy(d, n);
  for (i = 0; i + sizeof mark < n; ++i) {
    if (memcmp(d + i, mark, sizeof mark - 1)) continue;
    for (j = i + sizeof mark - 1; j < n && d[j] != ',';) ++j;
    for (v = 0, ++j; j < n && d[j] >= '0' && d[j] <= '9' && v < 1u << 20; ++j)
      v = 10 * v + d[j] - '0';
    if (v > most && v <= 1u << 20) most = v;
  }
  f = (unsigned char *)malloc(*bytes = 8 + n + most);
  for (i = 0; i < 8; ++i) f[i] = (unsigned char)((uint64_t)n >> 8 * i);
  memcpy(f + 8, d, n);
  for (i = 0; i < most; ++i) /* floats around 0.04, and F16 and BF16 as well */
    f[8 + n + i] = (unsigned char)(i % 4 == 3 ? 0x3d : i % 4 == 2 ? i * 37 : 0);
  return f;
}

/* Parts of an input, cut at bytes of value 1; the last one is the rest. */
typedef struct fuzz_part {
  char *data;
  size_t bytes;
} fuzz_part;

static void fuzz_cut(fuzz_part *part, int n, const uint8_t *d, size_t bytes) {
  int i;
  for (i = 0; i < n; ++i) {
    const uint8_t *end = i < n - 1 && bytes ? (const uint8_t *)memchr(d, 1, bytes) : NULL;
    size_t length = end ? (size_t)(end - d) : bytes, used = length + (end != NULL);
    part[i].data = (char *)fuzz_copy(d, part[i].bytes = length);
    d += used;
    bytes -= used;
  }
}

static void fuzz_drop(fuzz_part *part, int n) {
  while (n--) free(part[n].data);
}

/* ---- models ---- */

enum { FUZZ_TASKS = 5, FUZZ_LENGTH = 8 };
static const char fuzz_words_of[] =
    "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\na\n##b\nis\n##ing\n.\n\xc3\xa9\n";

/* A task of each kind. */
static void fuzz_tasks(moe_task task[FUZZ_TASKS]) {
  static const char *const color[] = {"red", "green", "blue"};
  static const moe_kind kind[FUZZ_TASKS] = {MOE_KIND_CLASSIFICATION, MOE_KIND_CLASSIFICATION,
                                            MOE_KIND_REGRESSION, MOE_KIND_RANKING, MOE_KIND_SPAN};
  int i;
  memset(task, 0, FUZZ_TASKS * sizeof *task);
  for (i = 0; i < FUZZ_TASKS; ++i) {
    snprintf(task[i].name, sizeof task[i].name, "t%d", i);
    task[i].kind = kind[i];
    task[i].classes = i == 2 ? 1 : i == 1 ? 3 : 2;
    strcpy(task[i].metrics, i == 2 ? "spearman" : "accuracy");
  }
  task[1].label = color;
  task[2].high = 5;
}

/* One layer of three experts. */
static moe_config fuzz_config(moe_task task[FUZZ_TASKS]) {
  moe_config c;
  fuzz_tasks(task);
  moe_config_init(&c);
  c.layers = 1, c.hidden = 4, c.ffn = 4, c.heads = 2;
  c.vocab = 12, c.positions = c.max_len = FUZZ_LENGTH;
  c.router = MOE_ROUTER_TASK, c.experts = 3, c.top_k = 2;
  return c;
}

/* ---- the tools ---- */

enum { FUZZ_FILES = 4 };
static jmp_buf fuzz_end;
static FILE *fuzz_words, *fuzz_streams[16]; /* what the tools say, and have open */
static char fuzz_said_by_tools[1 << 16];
static fuzz_part fuzz_files[FUZZ_FILES];
static const char *fuzz_names[FUZZ_FILES];

/* A program that ends: status 1 with a sentence, of bytes that a terminal can show. */
__attribute__((noreturn)) static void fuzz_exit(int status) {
  char *s = fuzz_said_by_tools;
  fflush(fuzz_words);
  if (getenv("FUZZ_SAY")) puts(s);
  snprintf(fuzz_said, sizeof fuzz_said, "%.900s", s);
  OUGHT(status == 1 && strlen(s) > 10);
  for (; *s; ++s) OUGHT((unsigned char)*s >= 32 ? *s != 127 : *s == '\n');
  longjmp(fuzz_end, 1);
}

/* The files of the input; there are no others. */
static FILE *fuzz_fopen(const char *path, const char *mode) {
  int i, k = 0;
  while (fuzz_streams[k]) ++k;
  for (i = 0; i < FUZZ_FILES; ++i)
    if (fuzz_names[i] && !strcmp(fuzz_names[i], path) && fuzz_files[i].bytes)
      return fuzz_streams[k] = fmemopen(fuzz_files[i].data, fuzz_files[i].bytes, mode);
  errno = ENOENT;
  return NULL;
}

static int fuzz_fclose(FILE *f) {
  int k = 0;
  while (fuzz_streams[k] != f) ++k;
  fuzz_streams[k] = NULL;
  return fclose(f);
}

static void fuzz_tools_begin(void) {
  if (!fuzz_words) fuzz_words = fmemopen(fuzz_said_by_tools, sizeof fuzz_said_by_tools, "w");
  OUGHT(fuzz_words);
  rewind(fuzz_words);
  fuzz_said_by_tools[0] = 0;
}

/* Frees what the program would have left to the system. */
static void fuzz_tools_end(size_t before) {
  int i;
  for (i = 0; i < 16; ++i)
    if (fuzz_streams[i]) fuzz_fclose(fuzz_streams[i]);
  for (i = 0; i < FUZZ_FILES; ++i) {
    free(fuzz_files[i].data);
    fuzz_files[i].data = NULL;
    fuzz_names[i] = NULL;
  }
  fuzz_free_all(before);
}
#endif
