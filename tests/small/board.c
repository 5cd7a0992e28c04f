/* One forward pass of MODEL, or with TRAIN three training steps, on a board or on this machine.
   Says the bits of the result; on a board also the instructions (SysTick under qemu -icount,
   calibrated by a loop of known length), the bytes of stack that were painted and are gone, and
   those of the blocks. */
#define MOE_IMPLEMENTATION
#include "moe.h"
#include <stdio.h>
#ifdef __arm__
#define REGISTER(address) (*(volatile uint32_t *)(address))
extern char __heap_start[];
/* 24 bits: 100 million instructions at 168 MHz, 670 million at 25 MHz */
static uint32_t ticks(void) { return REGISTER(0xe000e018); }
static uint32_t since(uint32_t from) { return 0xffffff & (from - ticks()); }
static uint32_t loop(void) { /* 20000 instructions, and a few */
  uint32_t n = 10000, from;
  while (ticks() == 0) {
  } /* it begins to count */
  from = ticks();
  __asm__ volatile(".syntax unified\n1: subs %0, #1\n bne 1b" : "+l"(n) : : "cc");
  return since(from);
}
static char *paint(void) {
  char *p, *top;
  __asm__ volatile("mov %0, sp" : "=r"(top));
  for (p = __heap_start; p < top - 64; ++p) *p = (char)0xa5;
  return top;
}
static unsigned painted(const char *top) {
  const char *p = __heap_start;
  while (*p == (char)0xa5) ++p;
  return (unsigned)(top - p);
}
static void begin(void) {
  REGISTER(0xe000ed14) |= 8; /* words that are not aligned trap, as on a Cortex-M0+ */
  REGISTER(0xe000e014) = 0xffffff;
  REGISTER(0xe000e018) = 0;
  REGISTER(0xe000e010) = 5;
}
#else
static uint32_t ticks(void) { return 0; }
static uint32_t since(uint32_t from) { return from; }
static uint32_t loop(void) { return 1; }
static char *paint(void) { return NULL; }
static unsigned painted(const char *top) { return (void)top, 0; }
static void begin(void) {}
#endif
static uint32_t sum = 2166136261u;
static void add(const void *data, size_t bytes) { /* FNV-1a, low byte first */
  const uint32_t *word = (const uint32_t *)data;
  for (; bytes >= 4; bytes -= 4) sum = (sum ^ *word++) * 16777619u;
}
static float number(uint32_t i) {
  return (float)(int32_t)((i * 2654435761u >> 20) & 1023) / 512 - 1;
}

#ifdef TRAIN
enum { STEPS = 3, S = 4, LENGTH = 8, DIM = 3, BLOCK = 26 * 1024 + 140 * 1024 };
static unsigned char room[BLOCK] __attribute__((aligned(64)));
static float x[S * LENGTH * DIM], label[S] = {0, 1, 1, 0};
static moe_status run(unsigned *stack, uint64_t *count, unsigned *blocks) {
  static const int32_t start[] = {0, 8, 16, 24, 32}, task[] = {0, 1, 0, 1};
  moe_limits limits = {S * LENGTH, S, 1, 0};
  moe_env env;
  moe_config config;
  moe_task tasks[2];
  moe_train_config train;
  moe_batch batch;
  moe_model *model;
  moe_trainer *trainer;
  size_t bytes = 0, more = 0;
  float loss = 0, norm = 0;
  char *top;
  int i, step;
  memset(&batch, 0, sizeof batch), memset(tasks, 0, sizeof tasks);
  for (i = 0; i < S * LENGTH * DIM; ++i) x[i] = number((uint32_t)i);
  tasks[0].name[0] = 'a', tasks[1].name[0] = 'b';
  tasks[0].classes = tasks[1].classes = 2;
  batch.S = S, batch.seq_start = start, batch.features = x, batch.task = task, batch.label = label;
  moe_env_init(&env, MOE_ISA_AUTO);
  moe_config_init(&config);
  config.layers = 1, config.hidden = 16, config.ffn = 32, config.heads = 2, config.vocab = 0;
  config.positions = config.max_len = LENGTH, config.feature_dim = DIM;
  moe_train_config_init(&train);
  train.lr = 1e-2f, train.steps = STEPS;
  if (moe_model_size(&config, tasks, 2, &bytes, &env)) return MOE_E_ARGUMENT;
  bytes = (bytes + 63) / 64 * 64;
  if (moe_model_init(&model, room, bytes, &config, tasks, 2, 1, &env)) return MOE_E_MEMORY;
  if (moe_trainer_size(model, &limits, &train, &more, &env)) return MOE_E_ARGUMENT;
  *blocks = (unsigned)more; /* of the trainer alone */
#ifdef __arm__              /* with pointers of 64 bits it is a little more */
  if (bytes + more > sizeof room) return MOE_E_MEMORY;
  if (moe_trainer_init(&trainer, room + bytes, more, model, &limits, &train, &env))
#else
  if (moe_trainer_create(&trainer, model, &limits, &train, &env))
#endif
    return MOE_E_MEMORY;
  top = paint();
  for (step = 0; step < STEPS; ++step) {
    uint32_t from = ticks();
    if (moe_trainer_accumulate(trainer, &batch, 0, &loss, NULL, &env)) return MOE_E_NONFINITE;
    if (moe_trainer_step(trainer, &norm, &env)) return MOE_E_NONFINITE;
    *count += since(from);
  }
  *stack = painted(top);
  add(&loss, 4), add(&norm, 4);
  add(moe_model_weights(model), moe_model_parameters(model) * sizeof(float));
  return MOE_OK;
}
#else
#include MODEL
enum { LENGTH = 16, DIM = 6 };
static unsigned char model_block[machine_MODEL_BYTES] __attribute__((aligned(64)));
static unsigned char context_block[machine_CONTEXT_BYTES] __attribute__((aligned(64)));
static moe_status run(unsigned *stack, uint64_t *count, unsigned *blocks) {
  static const int32_t start[] = {0, LENGTH};
  static float x[LENGTH * DIM], scores[8];
  moe_limits limits = {LENGTH, 1, 0, 0};
  moe_env env;
  moe_model *model;
  moe_context *context;
  moe_batch batch;
  moe_status status;
  int32_t task, i;
  size_t a = 0, b = 0;
  char *top = paint();
  *count = 0;
  memset(&batch, 0, sizeof batch);
  for (i = 0; i < LENGTH * DIM; ++i) x[i] = number((uint32_t)i);
  batch.S = 1, batch.seq_start = start, batch.features = x, batch.task = &task;
  moe_env_init(&env, MOE_ISA_AUTO);
  status = moe_model_view(&model, &machine, model_block, sizeof model_block, &env);
#ifdef __arm__
  if (!status)
    status = moe_context_init(&context, context_block, sizeof context_block, model, &limits, &env);
#else
  (void)context_block;
  if (!status) status = moe_context_create(&context, model, &limits, &env);
#endif
  if (status) return status;
  for (task = 0; task < moe_model_tasks(model); ++task) {
    uint32_t from = ticks();
    status = moe_forward(context, scores, &batch, &env);
    if (task == 0) *count = since(from);
    if (status) return status;
    add(scores, sizeof(float) * (size_t)moe_model_max_classes(model));
  }
  *stack = painted(top);
  if (moe_model_view_size(&machine, &a, &env)) return MOE_E_ARGUMENT;
  if (moe_context_size(model, &limits, &b, &env)) return MOE_E_ARGUMENT;
  *blocks = (unsigned)(a + b);
  return MOE_OK;
}
#endif

int main(void) {
  unsigned stack = 0, blocks = 0;
  uint64_t count = 0;
  uint32_t unit;
  moe_status status;
  begin();
  unit = loop();
  status = run(&stack, &count, &blocks);
  if (status) return printf("failed: %d\n", (int)status), 1;
  printf("bits %08lx stack %u blocks %u thousands %lu\n", (unsigned long)sum, stack, blocks,
         (unsigned long)(count * 20 / unit));
  return 0;
}
