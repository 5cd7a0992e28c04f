/* The kernels of moe_cuda.h, called through its slots, against the CPU's scalar ops: on random
   shapes, forward and backward, by the emulator or, as compiled PTX, by the interpreter.

     kernels emulator [CASES]      the code, compiled by this compiler
     kernels FILE.ptx [CASES]      what NVRTC made of it; the architecture is in its .target
     kernels WHERE CASES OP ...    only these ops
     kernels gpu [CASES]           compiled with -DKERNELS_GPU: on a real GPU, by driver and NVRTC

   Each case has its own order of blocks and threads and its own arrival of cp.async. The last line
   is "N passed, N failed, N skipped". */
#define MOE_CUDA_IMPLEMENTATION
#ifdef KERNELS_GPU
#include <fstream>
#include <sstream>
#include "../../moe_cuda.h"
static struct {
  int arch;
  bool interprets;
  std::string ptx;
} device; /* none: a real one */
static void device_order(int, unsigned) {}
#else
#define MOE__CUDA_CODE
#include "emulator.h"
#ifdef KERNELS_HEADER /* a copy of moe_cuda.h, with faults (plant.py) or with exact scratch */
#include KERNELS_HEADER
#else
#include "../../moe_cuda.h"
#endif
#include "device.h"
#endif
#include "cases.h"
#include "cases_rows.h"
#include "cases_route.h"
#include "cases_products.h"
#include "cases_refused.h"
#ifndef KERNELS_GPU
#include "cases_math.h"
#endif

#ifndef KERNELS_GPU
/* Not an op: the functions that kernels share, once. */
static void case_math(Case &c) {
  const char *fault = c.number ? nullptr : math_fault();
  if (fault) c.fail(fault);
}
#define OPS_MATH {"math", case_math, false},
#else
#define OPS_MATH
#endif

static const struct {
  const char *name;
  void (*run)(Case &);
  bool products; /* depends on the precision */
} ops[] = {OPS_MATH{"linear", case_linear, true},
           {"experts", case_experts, true},
           {"attention", case_attention, false},
           {"layernorm", case_layernorm, false},
           {"dropout", case_dropout, false},
           {"embed", case_embed, false},
           {"route", case_route, false},
           {"heads", case_heads, false},
           {"adam", case_adam, false},
           {"refused", case_refused, false}};

static bool wanted(int argc, char **argv, const char *name) {
  for (int i = 3; i < argc; ++i)
    if (!strcmp(argv[i], name)) return true;
  return argc <= 3;
}

static const char *mode_name() {
  if (cases_mode.cublas) return cases_mode.precision == MOE_TYPE_BF16 ? "blas_bf16" : "blas";
  if (cases_mode.precision == MOE_TYPE_BF16) return "bf16";
  return cases_mode.tf32 ? "tf32" : "fp32";
}

/* All cases of one op; false: one differs. */
static bool run_op(size_t op, int count) {
  for (int n = 0; n < count; ++n) {
    Case c(n, 1000 * (uint64_t)op + 17);
    c.what = ops[op].name;
    device_order(n, (unsigned)n + 1);
    ops[op].run(c);
    if (c.failure.empty()) continue;
    printf("  FAIL  cuda_%s_%s_%d case %d\n        %s\n", ops[op].name, mode_name(),
           cases_mode.arch, n, c.failure.c_str());
    return false;
  }
  printf("  ok    cuda_%s_%s_%d: %d cases\n", ops[op].name, mode_name(), cases_mode.arch, count);
  return true;
}

static bool open_device(const Mode &mode) {
  moe_cuda_options options;
  cases_mode = mode;
  moe_env_init(&cases_cpu, MOE_ISA_SCALAR);
  cases_cpu.log = cases_log;
  cases_cpu.precision = mode.precision; /* bf16 in plain C */
  cases_env = cases_cpu;
  cases_env.backend = &cases_gpu;
  device.arch = mode.arch;
  moe_cuda_options_init(&options);
#ifndef KERNELS_GPU
  options.driver = "", options.nvrtc = "";
#endif
  options.cublas = "", options.cache = getenv("MOE_CUDA_CACHE");
  options.tf32 = mode.tf32;
  options.maker = mode.cublas ? MOE_CUDA_MAKER_CUBLAS : MOE_CUDA_MAKER_OWN;
  return !moe_cuda_open(&cases_gpu, &options, &cases_env);
}

static const Mode modes[] = {
    {70, 0, MOE_TYPE_F32, 1e-5, 0}, {70, 0, MOE_TYPE_BF16, 5e-4, 0}, {80, 0, MOE_TYPE_F32, 1e-5, 0},
    {80, 1, MOE_TYPE_F32, 2e-3, 0}, {80, 0, MOE_TYPE_BF16, 5e-4, 0},
#ifndef KERNELS_GPU
    {80, 0, MOE_TYPE_F32, 1e-5, 1}, {80, 0, MOE_TYPE_BF16, 5e-4, 1},
#endif
};

#ifdef PLANTED
#include "planted.h"
#endif

int main(int argc, char **argv) {
  int count = argc > 2 ? atoi(argv[2]) : 200, passed = 0, failed = 0, arch = 0;
  const char *where = argc > 1 ? argv[1] : "emulator";
  setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
#ifdef PLANTED
  if (!strcmp(where, "plants")) return plants(count, argc - 3, argv + 3);
#endif
#ifdef KERNELS_GPU
  moe_cuda_counts counts;
  if (!open_device(modes[0])) return printf("0 passed, 1 failed, 0 skipped\n"), 1;
  printf("        %s\n", cases_gpu.name);
  moe_cuda_count(&cases_gpu, &counts);
  moe_cuda_close(&cases_gpu);
  arch = counts.arch;
#endif
  if (strcmp(where, "emulator") && !arch) {
    std::stringstream text;
    text << std::ifstream(where).rdbuf();
    device.ptx = text.str(), device.interprets = true;
    size_t target = device.ptx.find(".target sm_");
    arch = target == std::string::npos ? 0 : atoi(device.ptx.c_str() + target + 11);
    if (!arch) return printf("%s is no PTX\n0 passed, 1 failed, 0 skipped\n", where), 1;
  }
  for (const Mode &each : modes) {
    Mode mode = each;
    bool old = each.arch == 70, first = old && each.precision == MOE_TYPE_F32;
    if (arch && (arch < 80) != old) continue;
    if (arch) mode.arch = arch;
    if (!open_device(mode)) return printf("0 passed, 1 failed, 0 skipped\n"), 1;
    for (size_t op = 0; op < sizeof ops / sizeof *ops; ++op) {
      bool all = first || (arch && each.precision == MOE_TYPE_F32 && !each.tf32 && !each.cublas);
      if (each.cublas && ops[op].run != case_linear) continue;
      if ((!ops[op].products && !all) || !wanted(argc, argv, ops[op].name)) continue;
      run_op(op, count) ? ++passed : ++failed;
    }
    int32_t left = moe_cuda_close(&cases_gpu);
    if (left) printf("  FAIL  cuda_close: %d allocations or queues are left\n", left), ++failed;
  }
  printf("%d passed, %d failed, 0 skipped\n", passed, failed);
  return failed > 0;
}
