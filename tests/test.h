/* The little that a test needs: RUN, CHECK, CHECK_NEAR, SKIP. A test program is one of the files
   beside this one: it includes moe.h with its implementation, the fixtures, and its parts.
   kernels/gemm.c, for example, is the part gemm of kernels.c, which says PART(gemm):

     static void test_gemm_is_exact(void) { CHECK(1 + 1 == 2, "sum is %d", 1 + 1); }
     static void run_gemm(void) {
       RUN(test_gemm_is_exact);
     }

   A test fails with its first failed CHECK, which returns from the function; the program then exits
   with 1. Arguments of the program: names of parts or tests; none: all. Run it in tests/. */
#ifndef TEST_H
#define TEST_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define TEST_UNUSED __attribute__((unused))
#else
#define TEST_UNUSED
#endif

static int test_passed, test_failures, test_skipped, test_state, test_argc;
static char **test_argv;
static const char *test_part_name;

static void test_begin(int argc, char **argv) {
  test_argc = argc;
  test_argv = argv;
}

static int test_is_argument(const char *name) {
  int i;
  for (i = 1; i < test_argc; ++i)
    if (!strcmp(test_argv[i], name)) return 1;
  return 0;
}

/* The tests of a part. It is entered for the name of a test, too, which may be in any part. */
static void test_part(void (*run)(void), const char *name) {
  int i, enter = test_argc < 2 || test_is_argument(name);
  for (i = 1; i < test_argc; ++i) enter |= !strncmp(test_argv[i], "test_", 5);
  test_part_name = name;
  if (enter) run();
}

static void test_run(void (*fn)(void), const char *name) {
  if (test_argc >= 2 && !test_is_argument(test_part_name) && !test_is_argument(name)) return;
  test_state = 0;
  fn();
  if (test_state == 0)
    ++test_passed, printf("  ok    %s\n", name);
  else if (test_state == 1)
    ++test_failures, printf("  FAIL  %s\n", name);
  else
    ++test_skipped, printf("  skip  %s\n", name);
  fflush(stdout);
}

static int test_end(void) {
  if (test_passed + test_failures + test_skipped == 0)
    ++test_failures, printf("  FAIL  no test has such a name\n");
  printf("%d passed, %d failed, %d skipped\n", test_passed, test_failures, test_skipped);
  return test_failures ? 1 : 0;
}

#define RUN(fn) test_run(fn, #fn)
#define PART(name) test_part(run_##name, #name)
/* The condition must hold; else a message (printf-like) with file and line, and the test ends. */
#define CHECK(cond, ...)                                                                           \
  do {                                                                                             \
    if (!(cond)) {                                                                                 \
      printf("        %s:%d: %s: ", __FILE__, __LINE__, #cond);                                    \
      printf(__VA_ARGS__);                                                                         \
      printf("\n");                                                                                \
      test_state = 1;                                                                              \
      return;                                                                                      \
    }                                                                                              \
  } while (0)
#define CHECK_NEAR(a, b, tolerance)                                                                \
  CHECK(fabs((double)(a) - (double)(b)) <= (double)(tolerance), "%.9g against %.9g", (double)(a),  \
        (double)(b))
/* Says why and ends the test, which counts as skipped. */
#define SKIP(...)                                                                                  \
  do {                                                                                             \
    printf("        skipped: ");                                                                   \
    printf(__VA_ARGS__);                                                                           \
    printf("\n");                                                                                  \
    test_state = 2;                                                                                \
    return;                                                                                        \
  } while (0)
/* Ends the test if a function called from it has failed or skipped. */
#define CHECK_STATE()                                                                              \
  do {                                                                                             \
    if (test_state) return;                                                                        \
  } while (0)

/* Where the working data is: ../../shared beside the project, or the environment's MOE_SHARED. NULL
   when it is absent. */
TEST_UNUSED static const char *test_shared(const char *file) {
  static char path[1024];
  const char *base = getenv("MOE_SHARED");
  FILE *f;
  snprintf(path, sizeof path, "%s/%s", base ? base : "../../shared", file);
  f = fopen(path, "rb");
  if (!f) return NULL;
  fclose(f);
  return path;
}

/* Numbers that every test program can make again: a 64-bit linear congruential generator, its upper
   24 bits as a float in [-1, 1). */
TEST_UNUSED static float test_random(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (float)(*state >> 40) / 8388608.0f - 1.0f;
}

/* n of them, in a block of that very size, so that a sanitizer sees what is read beyond. */
TEST_UNUSED static float *test_floats(size_t n, uint64_t *state) {
  float *x = (float *)malloc(n * sizeof *x + 1);
  size_t i;
  for (i = 0; i < n; ++i) x[i] = test_random(state);
  return x;
}
#endif
