/* Compiles the kernels of moe_cuda.h with NVRTC, which needs no GPU, for every architecture that
   it knows among 70 75 80 86 89 90 100 120: no warnings, and no spills in kernels of products. Two
   processes share the work.

     compile NVRTC FOLDER          NVRTC: its library. Writes FOLDER/kernels.txt: registers, shared
                                   memory and spills of each kernel
     compile NVRTC FOLDER few      the same for 70, 90 and 120 only
     compile NVRTC FOLDER ptx      writes FOLDER/kernels_70.ptx (or 75), kernels_80.ptx
     compile source ARCH           prints the source, for nvcc

   Tests are named compile_sm_70 and so on; the last line is "N passed, N failed, N skipped". */
#if !defined(_GNU_SOURCE) && defined(__linux__)
#define _GNU_SOURCE
#endif
#define MOE_CUDA_IMPLEMENTATION
#include "../../moe_cuda.h"
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static const int archs[] = {70, 75, 80, 86, 89, 90, 100, 120};
enum { ARCHS = sizeof archs / sizeof *archs };
static int few; /* of the architectures */

#define COMPILE_ROW(kernel, least) {"moe_k_" #kernel, least},
static const struct {
  const char *name;
  int min_arch;
} kernels[] = {MOE__CUDA_KERNELS(COMPILE_ROW){NULL, 0}};
static const struct {
  const char *name;
  int min_arch;
} products[] = {MOE__CUDA_KERNELS_PRODUCTS(COMPILE_ROW){NULL, 0}};

/* What the two processes find out, in memory that both have. */
typedef struct kernel_facts {
  int known, registers, shared, stack, spills;
} kernel_facts;
static struct facts {
  kernel_facts kernel[MOE__K_COUNT + 1][ARCHS];
  int result[ARCHS]; /* 1: it passes, 0: it fails, -1: this NVRTC does not know it */
} * found;

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
      found->kernel[row][a].stack = atoi(number);
      sscanf(frame, " bytes stack frame, %d bytes spill stores, %d bytes spill loads",
             &spill_stores, &spill_loads);
      found->kernel[row][a].spills = spill_stores + spill_loads;
    }
    if (used && row >= 0) {
      char *shared = strstr(used, " bytes smem");
      found->kernel[row][a].known = 1;
      found->kernel[row][a].registers = atoi(used + 5);
      while (shared && shared > used && shared[-1] != ' ') --shared;
      found->kernel[row][a].shared = shared ? atoi(shared) : 0;
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
    if (kernels[i].min_arch <= archs[a] && !found->kernel[i][a].known) {
      snprintf(text, sizeof text, "%s is missing", kernels[i].name);
      return text;
    }
  for (i = 0; products[i].name; ++i) {
    int row = row_of(products[i].name, strlen(products[i].name));
    if (found->kernel[row][a].spills == 0) continue;
    snprintf(text, sizeof text, "%s spills %d bytes", products[i].name,
             found->kernel[row][a].spills);
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
  for (a = 0; a < ARCHS; ++a) {
    char name[16];
    snprintf(name, sizeof name, "sm_%d", archs[a]);
    fprintf(file, " %13s", name);
  }
  for (i = 0; kernels[i].name; ++i) {
    fprintf(file, "\n%-26s", kernels[i].name);
    for (a = 0; a < ARCHS; ++a) {
      char text[64] = "-", more[32] = "";
      if (found->kernel[i][a].known) {
        if (found->kernel[i][a].stack)
          snprintf(more, sizeof more, "+%d", found->kernel[i][a].stack);
        if (found->kernel[i][a].spills)
          snprintf(more, sizeof more, "!%d", found->kernel[i][a].spills);
        snprintf(text, sizeof text, "%d %d%s", found->kernel[i][a].registers,
                 found->kernel[i][a].shared, more);
      }
      fprintf(file, " %13s", text);
    }
  }
  fprintf(file, "\n");
}

/* Whether this NVRTC compiles for it. */
static int knows(int arch) {
  int count = 0, known[64], i, yes = 0;
  if (!rtc.nvrtcGetNumSupportedArchs(&count) && count <= 64 && !rtc.nvrtcGetSupportedArchs(known))
    for (i = 0; i < count; ++i) yes |= known[i] == arch;
  return yes;
}

static int is_left_out(int a) { return few && archs[a] != 70 && archs[a] != 90 && archs[a] != 120; }

static int test_arch(int a) {
  char name[64], *log = NULL, *out = NULL;
  const char *why = NULL;
  size_t bytes = 0;
  int error;
  if (!knows(archs[a])) return -1;
  snprintf(name, sizeof name, "sm_%d", archs[a]);
  error = compile(name, archs[a], &log, &out, &bytes);
  if (error) printf("%.3000s\n", log ? log : "no log");
  why = error ? "it does not compile" : read_log(log, a);
  if (!why) why = complaint(a);
  free(log), free(out);
  if (why) printf("        %s: %s\n", name, why);
  fflush(stdout);
  return !why;
}

/* PTX of an architecture into the folder; 0: it works. */
static int write_ptx(int arch, const char *folder) {
  char name[64], *log = NULL, *out = NULL;
  size_t bytes = 0;
  int error;
  snprintf(name, sizeof name, "compute_%d", arch);
  error = compile(name, arch, &log, &out, &bytes);
  if (error) printf("%.3000s\n", log ? log : "no log");
  snprintf(name, sizeof name, "kernels_%d.ptx", arch);
  error = error || !write_file(folder, name, out);
  free(log), free(out);
  return error;
}

/* All architectures; a child takes every second one. */
static int test_all(const char *folder, int major, int minor) {
  int a, count[3] = {0, 0, 0};
  char path[1024];
  FILE *file;
  pid_t child = fork();
  for (a = child == 0; a < ARCHS; a += 2)
    if (!is_left_out(a)) found->result[a] = test_arch(a);
  if (child == 0) _exit(0);
  if (child < 0 || waitpid(child, NULL, 0) != child) return 1;
  for (a = 0; a < ARCHS; ++a) {
    int result = found->result[a];
    if (is_left_out(a)) continue;
    printf("  %s  compile_sm_%d\n", result > 0 ? "ok  " : result ? "skip" : "FAIL", archs[a]);
    if (result < 0) printf("        skipped: NVRTC %d.%d does not know it\n", major, minor);
    ++count[result + 1];
  }
  snprintf(path, sizeof path, "%s/kernels.txt", folder);
  file = fopen(path, "w");
  if (file) write_table(file, major, minor), fclose(file);
  write_table(stdout, major, minor);
  printf("%d passed, %d failed, %d skipped\n", count[2], count[1], count[0]);
  return count[1] > 0;
}

int main(int argc, char **argv) {
  int major = 0, minor = 0;
  void *library;
  if (argc == 3 && !strcmp(argv[1], "source"))
    return fputs(moe__cuda_source(atoi(argv[2])), stdout) < 0;
  if (argc != 3 && argc != 4) return fprintf(stderr, "compile NVRTC FOLDER [ptx|few]\n"), 2;
  library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library || moe__cuda_symbols(library, moe__cuda_nvrtc_names, &rtc))
    return printf("  FAIL  %s is no NVRTC\n0 passed, 1 failed, 0 skipped\n", argv[1]), 1;
  rtc.nvrtcVersion(&major, &minor);
  few = argc == 4 && !strcmp(argv[3], "few");
  if (argc == 4 && !few) return write_ptx(knows(70) ? 70 : 75, argv[2]) | write_ptx(80, argv[2]);
  found = (struct facts *)mmap(NULL, sizeof *found, PROT_READ | PROT_WRITE,
                               MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return found == MAP_FAILED || test_all(argv[2], major, minor);
}
