/* Compiles the kernels of moe_cuda.h with NVRTC, which needs no GPU, for every architecture that
   it knows among 70 75 80 86 89 90 100 120: no warnings, and no spills in kernels of products.

     compile NVRTC FOLDER          NVRTC: its library. Writes FOLDER/kernels.txt, the registers, the
                                   shared memory and the spills of each kernel, and
                                   FOLDER/kernels_ARCH.ptx
     compile source ARCH           prints the source, for nvcc

   Tests are named compile_sm_70 and so on; the last line is "N passed, N failed, N skipped". */
#if !defined(_GNU_SOURCE) && defined(__linux__)
#define _GNU_SOURCE
#endif
#define MOE_IMPLEMENTATION
#define MOE_CUDA_IMPLEMENTATION
#include "../../moe_cuda.h"

static const int archs[] = {70, 75, 80, 86, 89, 90, 100, 120};
enum { ARCHS = sizeof archs / sizeof *archs };

#define COMPILE_ROW(kernel, least) {"moe_k_" #kernel, least},
static const struct {
  const char *name;
  int min_arch;
} kernels[] = {MOE__CUDA_KERNELS(COMPILE_ROW){NULL, 0}};
static const struct {
  const char *name;
  int min_arch;
} products[] = {MOE__CUDA_KERNELS_PRODUCTS(COMPILE_ROW)
                    MOE__CUDA_KERNELS_EXPERTS(COMPILE_ROW){NULL, 0}};

static struct { int known, registers, shared, stack, spills; } table[MOE__K_COUNT + 1][ARCHS];

static moe__cuda_nvrtc rtc;

/* Compiles for an architecture, "sm_80"; *log and *out are to be freed. 0: it works. */
static int compile(const char *arch, int number, char **log, char **out, size_t *bytes) {
  char option[64];
  const char *options[3];
  char *source = moe__cuda_source(number);
  void *program = NULL;
  int error, is_ptx = !strncmp(arch, "compute", 7);
  snprintf(option, sizeof option, "--gpu-architecture=%s", arch);
  options[0] = option, options[1] = "--std=c++11", options[2] = "--ptxas-options=-v";
  *log = *out = NULL;
  if (!source || rtc.nvrtcCreateProgram(&program, source, "moe_cuda.cu", 0, NULL, NULL)) return 1;
  error = rtc.nvrtcCompileProgram(program, is_ptx ? 2 : 3, options);
  if (!rtc.nvrtcGetProgramLogSize(program, bytes)) {
    *log = (char *)calloc(*bytes + 1, 1);
    if (rtc.nvrtcGetProgramLog(program, *log)) error = 1;
  }
  if (!error)
    error = is_ptx ? rtc.nvrtcGetPTXSize(program, bytes) : rtc.nvrtcGetCUBINSize(program, bytes);
  if (!error) {
    *out = (char *)calloc(*bytes + 1, 1);
    error = is_ptx ? rtc.nvrtcGetPTX(program, *out) : rtc.nvrtcGetCUBIN(program, *out);
  }
  rtc.nvrtcDestroyProgram(&program);
  free(source);
  return error;
}

static int row_of(const char *name, size_t length) {
  int i;
  for (i = 0; kernels[i].name; ++i)
    if (strlen(kernels[i].name) == length && !strncmp(kernels[i].name, name, length)) return i;
  return -1;
}

/* What ptxas says of each kernel. Returns a line that is a warning, or NULL. */
static const char *read_log(char *log, int a) {
  static char warning[400];
  int row = -1;
  char *line, *next;
  warning[0] = 0;
  for (line = log; line && *line; line = next) {
    char *name, *used, *frame;
    next = strchr(line, '\n');
    if (next) *next++ = 0;
    name = strstr(line, "entry function '"), used = strstr(line, "Used ");
    frame = strstr(line, " bytes stack frame");
    if (name) row = row_of(name + 16, strcspn(name + 16, "'"));
    if (frame && row >= 0) {
      char *number = frame;
      int spill_stores = 0, spill_loads = 0;
      while (number > line && number[-1] != ' ') --number;
      table[row][a].stack = atoi(number);
      sscanf(frame, " bytes stack frame, %d bytes spill stores, %d bytes spill loads",
             &spill_stores, &spill_loads);
      table[row][a].spills = spill_stores + spill_loads;
    }
    if (used && row >= 0) {
      char *shared = strstr(used, " bytes smem");
      table[row][a].known = 1;
      table[row][a].registers = atoi(used + 5);
      while (shared && shared > used && shared[-1] != ' ') --shared;
      table[row][a].shared = shared ? atoi(shared) : 0;
    }
    if (strstr(line, "warning") && !strstr(line, "are deprecated and may be removed"))
      snprintf(warning, sizeof warning, "%.399s", line);
  }
  return warning[0] ? warning : NULL;
}

/* A kernel of products that spills, or a kernel that is missing; NULL: none. */
static const char *complaint(int a) {
  static char text[200];
  int i;
  for (i = 0; kernels[i].name; ++i)
    if (kernels[i].min_arch <= archs[a] && !table[i][a].known) {
      snprintf(text, sizeof text, "%s is missing", kernels[i].name);
      return text;
    }
  for (i = 0; products[i].name; ++i) {
    int row = row_of(products[i].name, strlen(products[i].name));
    if (table[row][a].spills == 0) continue;
    snprintf(text, sizeof text, "%s spills %d bytes", products[i].name, table[row][a].spills);
    return text;
  }
  return NULL;
}

static int write_file(const char *folder, const char *name, const char *text) {
  char path[1024];
  FILE *file;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  file = fopen(path, "w");
  if (!file) return 0;
  fputs(text, file);
  return !fclose(file);
}

/* Registers, shared memory, stack and spills of all kernels. */
static void write_table(FILE *file, int major, int minor) {
  int i, a;
  fprintf(
      file,
      "NVRTC %d.%d: registers, bytes of shared memory, +bytes of stack, !bytes of spills\n%-26s",
      major, minor, "kernel");
  for (a = 0; a < ARCHS; ++a) fprintf(file, " %13s%d", archs[a] < 100 ? "sm_" : "sm_", archs[a]);
  for (i = 0; kernels[i].name; ++i) {
    fprintf(file, "\n%-26s", kernels[i].name);
    for (a = 0; a < ARCHS; ++a) {
      char text[64] = "-", more[32] = "";
      if (table[i][a].known) {
        if (table[i][a].stack) snprintf(more, sizeof more, "+%d", table[i][a].stack);
        if (table[i][a].spills) snprintf(more, sizeof more, "!%d", table[i][a].spills);
        snprintf(text, sizeof text, "%d %d%s", table[i][a].registers, table[i][a].shared, more);
      }
      fprintf(file, " %15s", text);
    }
  }
  fprintf(file, "\n");
}

/* One architecture; 1: it passes, 0: it fails, -1: this NVRTC does not know it. */
static int test_arch(int a, const char *folder) {
  char name[64], *log = NULL, *out = NULL;
  const char *why = NULL;
  size_t bytes = 0;
  int count = 0, known[64], i, found = 0, error;
  if (!rtc.nvrtcGetNumSupportedArchs(&count) && count <= 64 && !rtc.nvrtcGetSupportedArchs(known))
    for (i = 0; i < count; ++i) found |= known[i] == archs[a];
  if (!found) return -1;
  snprintf(name, sizeof name, "sm_%d", archs[a]);
  error = compile(name, archs[a], &log, &out, &bytes);
  if (error) printf("%.3000s\n", log ? log : "no log");
  why = error ? "it does not compile" : read_log(log, a);
  if (!why) why = complaint(a);
  free(log), free(out);
  log = out = NULL;
  if (!why && (archs[a] <= 80 || archs[a] == 90)) {
    snprintf(name, sizeof name, "compute_%d", archs[a]);
    error = compile(name, archs[a], &log, &out, &bytes);
    snprintf(name, sizeof name, "kernels_%d.ptx", archs[a]);
    if (error || !write_file(folder, name, out)) why = "there is no PTX";
    free(log), free(out);
  }
  if (why) printf("        %s\n", why);
  return !why;
}

int main(int argc, char **argv) {
  int a, passed = 0, failed = 0, skipped = 0, major = 0, minor = 0;
  char path[1024];
  void *library;
  FILE *file;
  if (argc == 3 && !strcmp(argv[1], "source"))
    return fputs(moe__cuda_source(atoi(argv[2])), stdout) < 0;
  if (argc != 3) return fprintf(stderr, "compile NVRTC FOLDER\n"), 2;
  library = moe__cuda_dlopen(argv[1]);
  if (!library || moe__cuda_symbols(library, moe__cuda_nvrtc_names, &rtc))
    return printf("  FAIL  %s is no NVRTC\n0 passed, 1 failed, 0 skipped\n", argv[1]), 1;
  rtc.nvrtcVersion(&major, &minor);
  for (a = 0; a < ARCHS; ++a) {
    int result = test_arch(a, argv[2]);
    printf("  %s  compile_sm_%d\n", result > 0 ? "ok  " : result ? "skip" : "FAIL", archs[a]);
    if (result < 0) printf("        skipped: NVRTC %d.%d does not know it\n", major, minor);
    ++*(result > 0 ? &passed : result ? &skipped : &failed);
    fflush(stdout);
  }
  snprintf(path, sizeof path, "%s/kernels.txt", argv[2]);
  file = fopen(path, "w");
  if (file) write_table(file, major, minor), fclose(file);
  write_table(stdout, major, minor);
  printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return failed > 0;
}
