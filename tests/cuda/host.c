/* The host side of moe_cuda.h on a double of the driver (double.h): ./host DOUBLE.so [TESTS...]
   On a real GPU, whole models only: ./host gpu */
#ifndef HOST_LINKED /* with moe.h, compiled elsewhere */
#define MOE_IMPLEMENTATION
#endif
#define MOE_CUDA_IMPLEMENTATION
#include "../../moe_cuda.h"
#include "../test.h"
#include <glob.h>
#include <sys/stat.h>
#include "../models.h"
#include "double.h"

static const char *double_path;
static double_control *control;
static double_reset_fn *double_reset;
static char host_cache[512];

/* Opens the double itself, to talk to it. 0: it is not there. */
static int host_load(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL), *symbol;
  double_get_fn *get;
  if (!library) return printf("        %s\n", dlerror()), 0;
  symbol = dlsym(library, "double_get");
  memcpy(&get, &symbol, sizeof get);
  symbol = dlsym(library, "double_reset");
  memcpy(&double_reset, &symbol, sizeof double_reset);
  control = get();
  double_path = path;
  return 1;
}

static void host_no_reset(void) {}

static moe_cuda_options host_options(void) {
  moe_cuda_options options;
  moe_cuda_options_init(&options);
  options.driver = options.nvrtc = double_path;
  if (!double_path) options.cache = getenv("MOE_CUDA_CACHE");
  options.cublas = "";
  options.maker = MOE_CUDA_MAKER_OWN;
  return options;
}

/* All sentences of a run, one a line. */
static void host_log(void *user, moe_status status, const char *sentence) {
  size_t used = strlen(said);
  (void)user, (void)status;
  ++sentences;
  if (used + strlen(sentence) + 2 < sizeof said) sprintf(said + used, "%s\n", sentence);
}

static moe_env host_env(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  env.log = host_log;
  return env;
}

/* Everything that was taken from the double was given back, and no call had wrong arguments. */
#define HOST_IS_CLEAN()                                                                            \
  CHECK(!control->refused && !control->used && !control->allocations && !control->pinned_blocks && \
            !control->streams && !control->events && !control->modules && !control->contexts &&    \
            !control->programs && !control->handles && !control->depth,                            \
        "refused %ld, left: %ld blocks, %ld pinned, %ld streams, %ld events, %ld modules, %ld "    \
        "contexts, %ld programs, %ld handles, %ld pushed",                                         \
        control->refused, control->allocations, control->pinned_blocks, control->streams,          \
        control->events, control->modules, control->contexts, control->programs, control->handles, \
        control->depth)

#include "open.c"
#include "memory.c"
#include "whole.c"
#include "faults.c"

int main(int argc, char **argv) {
  static double_control nothing;
  if (argc > 1 && !strcmp(argv[1], "gpu")) {
    control = &nothing, double_reset = host_no_reset;
    test_begin(argc - 1, argv + 1);
    test_argc = 1;
    PART(whole);
    return test_end();
  }
  if (argc < 2 || !host_load(argv[1])) return printf("usage: host DOUBLE.so [TESTS]\n"), 2;
  snprintf(host_cache, sizeof host_cache, "%s.cache", argv[1]);
  double_reset();
  test_begin(argc - 1, argv + 1);
  PART(open);
  PART(memory);
  PART(whole);
  PART(faults);
  return test_end();
}
