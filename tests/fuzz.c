/* fuzz.c - hostile input for whatever reads what others wrote: the targets in fuzz/

     clang -g -O1 -fsanitize=fuzzer,address,undefined -DFUZZ_LIBFUZZER -o fuzz fuzz.c -lm
     FUZZ=model ./fuzz -max_total_time=60 fuzz/seeds/model       libFuzzer, which finds new inputs
     cc -g -O1 -I. -o test_fuzz fuzz.c -lm && ./test_fuzz   the seeds and simple changes of them
     FUZZ=model FUZZ_SAY=1 ./test_fuzz FILE                      one input, and what is said of it
     ./test_fuzz --seeds                                         writes fuzz/seeds again

   A target gets bytes and must return; OUGHT and the sanitizers say what must never happen. */
#if !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include "fuzz/fuzz.h"

#include "fuzz/batch.c"
#include "fuzz/checkpoint.c"
#include "fuzz/import.c"
#include "fuzz/json.c"
#include "fuzz/model.c"
#include "fuzz/text.c"

/* the tools, with files of the input and an end that comes back */
#define calloc fuzz_calloc
#define realloc fuzz_realloc
#define free fuzz_free
#define exit fuzz_exit
#define fopen fuzz_fopen
#define fclose fuzz_fclose
#define main fuzz_main_of_routes
#undef stderr
#define stderr fuzz_words
#include "../examples/tools/results.h"
#define put_cell routes_put_cell /* the one name that both have */
#include "../examples/tools/routes.c"
#undef put_cell
#undef calloc
#undef realloc
#undef free
#undef exit
#undef fopen
#undef fclose
#undef main
#include "fuzz/data.c"
#include "fuzz/results.c"
#include "fuzz/routes.c"
#include "fuzz/shards.c"
#include "fuzz/tokenizer.c"

typedef struct fuzz_target {
  const char *name;
  void (*run)(const uint8_t *data, size_t bytes);
  void (*begin)(const moe_env *env);
  int header; /* 1: its numbers are decimal digits, which are changed whole */
} fuzz_target;

static const fuzz_target fuzz_targets[] = {
    {"batch", fuzz_batch, batch_begin, 0}, {"checkpoint", fuzz_checkpoint, checkpoint_begin, 1},
    {"data", fuzz_data, data_begin, 1},    {"import", fuzz_import, NULL, 1},
    {"json", fuzz_json, NULL, 0},          {"model", fuzz_model, NULL, 1},
    {"results", fuzz_results, NULL, 1},    {"routes", fuzz_routes, routes_begin, 1},
    {"shards", fuzz_shards, NULL, 1},      {"text", fuzz_text, NULL, 0},
    {"tokenizer", fuzz_tokenizer, NULL, 1}};
enum { FUZZ_TARGETS = sizeof fuzz_targets / sizeof *fuzz_targets };
static const fuzz_target *fuzz_target_now;

static void fuzz_begin(const fuzz_target *target) {
  moe_env e = fuzz_env();
  begin_program("fuzz", 0, NULL);
  fuzz_target_now = target;
  if (target->begin) target->begin(&e);
}

static void fuzz_once(const uint8_t *d, size_t n) {
  size_t before = fuzz_live;
  read_from(NULL, 0);
  fuzz_target_now->run(d, n);
  OUGHT(fuzz_live == before);
}

static uint32_t fuzz_next(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(*state >> 33);
}

/* Puts another number in the place of one in d; the new length, 0: there is none, or no room. */
static size_t fuzz_number(uint8_t *d, size_t n, size_t most, uint64_t *state) {
  static const char *const numbers_of[] = {"0",
                                           "1",
                                           "2",
                                           "3",
                                           "7",
                                           "8",
                                           "64",
                                           "127",
                                           "128",
                                           "255",
                                           "256",
                                           "257",
                                           "4096",
                                           "4097",
                                           "65536",
                                           "16777216",
                                           "2147483647",
                                           "2147483648",
                                           "4294967295",
                                           "4294967296",
                                           "0.5",
                                           "1e9",
                                           "1e300",
                                           "-1",
                                           "-0",
                                           "1e-45",
                                           "3.5e38",
                                           "1e-320",
                                           "nan",
                                           "inf",
                                           "-1e999",
                                           "1000000000",
                                           "9223372036854775807",
                                           "18446744073709551615",
                                           "18446744073709551616"};
  size_t at = fuzz_next(state) % n, end, length;
  const char *s = numbers_of[fuzz_next(state) % (sizeof numbers_of / sizeof *numbers_of)];
  while (at < n && !(d[at] >= '0' && d[at] <= '9')) ++at;
  if (at == n) return 0;
  while (at && d[at - 1] >= '0' && d[at - 1] <= '9') --at;
  for (end = at; end < n && d[end] >= '0' && d[end] <= '9';) ++end;
  length = strlen(s);
  if (n - (end - at) + length > most) return 0;
  memmove(d + at + length, d + end, n - end);
  memcpy(d + at, s, length);
  return n - (end - at) + length;
}

#ifdef FUZZ_LIBFUZZER
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *d, size_t n);
size_t LLVMFuzzerMutate(uint8_t *d, size_t n, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *d, size_t n, size_t most, unsigned number_of);

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  const char *name = getenv("FUZZ");
  int i;
  (void)argc, (void)argv;
  for (i = 0; i < FUZZ_TARGETS; ++i)
    if (name && !strcmp(fuzz_targets[i].name, name)) fuzz_begin(&fuzz_targets[i]);
  OUGHT(fuzz_target_now); /* FUZZ=model, for example */
  return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *d, size_t n) {
  fuzz_once(d, n);
  return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *d, size_t n, size_t most, unsigned number_of) {
  uint64_t state = number_of;
  size_t changed = 0, tries;
  if (fuzz_target_now->header && n && fuzz_next(&state) % 3)
    for (tries = 0; tries < 8 && !changed; ++tries) changed = fuzz_number(d, n, most, &state);
  return changed ? changed : LLVMFuzzerMutate(d, n, most);
}
#else
#include "test.h"
#include "fuzz/seeds.c"

/* Every seed, and changes of it that need no coverage: cuts, bytes, numbers. */
static void fuzz_replay(const char *name) {
  size_t n, m;
  int i, seeds = 0, change;
  char path[512];
  for (i = 0; strcmp(fuzz_targets[i].name, name);) ++i;
  fuzz_begin(&fuzz_targets[i]);
  for (i = 0; fuzz_seed_name(path, sizeof path, name, i); ++i) {
    uint8_t *seed = fuzz_seed(path, &n), *d;
    uint64_t state = (uint64_t)i;
    CHECK(seed, "%s cannot be read", path);
    ++seeds;
    fuzz_once(seed, n);
    for (change = 0; change < 300; ++change) {
      d = (uint8_t *)malloc(n + 64);
      memcpy(d, seed, m = n);
      if (change % 3 == 0) m = fuzz_number(d, n, n + 64, &state);
      if (change % 3 == 1) m = fuzz_next(&state) % (n + 1);
      if (m && change % 3 > 0) d[fuzz_next(&state) % m] = (uint8_t)fuzz_next(&state);
      fuzz_once(d, m);
      free(d);
    }
    free(seed);
  }
  CHECK(seeds > 0, "fuzz/seeds/%s is empty", name);
}
#define FUZZ_TEST(target)                                                                          \
  static void test_fuzz_##target##_takes_its_seeds(void) { fuzz_replay(#target); }
FUZZ_TEST(batch)
FUZZ_TEST(checkpoint)
FUZZ_TEST(data)
FUZZ_TEST(import)
FUZZ_TEST(json)
FUZZ_TEST(model)
FUZZ_TEST(results)
FUZZ_TEST(routes)
FUZZ_TEST(shards)
FUZZ_TEST(text)
FUZZ_TEST(tokenizer)

static void run_seeds(void) {
  RUN(test_fuzz_batch_takes_its_seeds);
  RUN(test_fuzz_checkpoint_takes_its_seeds);
  RUN(test_fuzz_data_takes_its_seeds);
  RUN(test_fuzz_import_takes_its_seeds);
  RUN(test_fuzz_json_takes_its_seeds);
  RUN(test_fuzz_model_takes_its_seeds);
  RUN(test_fuzz_results_takes_its_seeds);
  RUN(test_fuzz_routes_takes_its_seeds);
  RUN(test_fuzz_shards_takes_its_seeds);
  RUN(test_fuzz_text_takes_its_seeds);
  RUN(test_fuzz_tokenizer_takes_its_seeds);
}

int main(int argc, char **argv) {
  const char *name = getenv("FUZZ");
  int i;
  if (argc == 2 && !strcmp(argv[1], "--seeds")) return fuzz_write_seeds();
  for (i = 0; i < FUZZ_TARGETS && name; ++i)
    if (!strcmp(fuzz_targets[i].name, name)) fuzz_begin(&fuzz_targets[i]);
  for (i = 1; i < argc && fuzz_target_now; ++i) {
    size_t n;
    uint8_t *d = fuzz_seed(argv[i], &n);
    if (!d) return 1;
    fuzz_once(d, n);
    free(d);
  }
  if (fuzz_target_now) return 0;
  test_begin(argc, argv);
  PART(seeds);
  return test_end();
}
#endif
