/* moe.h - v0.2 - task-aware sparse mixture-of-experts encoders in one C header: train and run
   them with nothing but libm

   DO THIS
     #define MOE_IMPLEMENTATION
     #include "moe.h"
   in exactly one C or C++ file, and plain #include "moe.h" in every other file that uses it. Link
   with -lm (and -pthread where the system needs it). `cc -O2` is enough: the fast kernels are
   chosen at run time.

   EXAMPLE: two tasks on points of a plane, trained together (other programs: examples/)
     #include <stdio.h>
     #include <string.h>
     #define MOE_IMPLEMENTATION
     #include "moe.h"
     enum { T = 2, S = 256, D = 2, STEPS = 300 }; // tasks, points, numbers of a point
     static float x[S * D], label[S], score[S * MOE_MAX_CLASSES];
     static int32_t start[S + 1], task[S];
     static void say(void *user, moe_status status, const char *sentence) {
       (void)user, (void)status;
       fprintf(stderr, "%s\n", sentence);
     }
     int main(void) {
       moe_limits limits = {S, S, 1, 0}; // tokens and sequences of a batch; training
       moe_env env;
       moe_config config;
       moe_train_config train;
       moe_task tasks[T];
       moe_batch batch;
       moe_model *model;
       moe_trainer *trainer;
       float loss = 0;
       int i, step, right = 0;
       memset(tasks, 0, sizeof tasks);
       memset(&batch, 0, sizeof batch);
       strcpy(tasks[0].name, "upper"), tasks[0].classes = 2; // is the point above the middle?
       strcpy(tasks[1].name, "cross"), tasks[1].classes = 2; // are both signs the same?
       for (i = 0; i < S; ++i) {
         x[2 * i] = (float)(i % 16) / 8 - 0.9f, x[2 * i + 1] = (float)(i / 16) / 8 - 0.9f;
         task[i] = i % T, start[i + 1] = i + 1; // a sequence of one token
         label[i] = task[i] ? x[2 * i] * x[2 * i + 1] > 0 : x[2 * i + 1] > 0;
       }
       batch.S = S, batch.seq_start = start, batch.features = x;
       batch.task = task, batch.label = label;
       moe_env_init(&env, MOE_ISA_AUTO);
       env.log = say;
       moe_config_init(&config); // MT-TaG: four experts in a layer, a gate for each task
       config.layers = 2, config.hidden = 16, config.ffn = 32, config.heads = 2, config.vocab = 0;
       config.feature_dim = D, config.positions = config.max_len = 1;
       if (moe_model_create(&model, &config, tasks, T, 1, &env)) return 1;
       moe_train_config_init(&train);
       train.lr = 1e-2f, train.steps = STEPS;
       if (moe_trainer_create(&trainer, model, &limits, &train, &env)) return 1;
       for (step = 0; step < STEPS; ++step) {
         if (moe_trainer_accumulate(trainer, &batch, 0, &loss, NULL, &env)) return 1;
         if (moe_trainer_step(trainer, NULL, &env)) return 1;
       }
       if (moe_forward(moe_trainer_context(trainer), score, &batch, &env)) return 1;
       for (i = 0; i < S; ++i) right += (score[2 * i + 1] > score[2 * i]) == (label[i] > 0);
       printf("loss %.3f, %d of %d points right\n", (double)loss, right, S);
       moe_trainer_free(trainer);
       moe_model_free(model);
       return 0;
     }

   WHAT IT COMPUTES
     [TaG] "Sparsely Activated Mixture-of-Experts are Robust Multi-Task Learners" (MT-TaG)
       a BERT-like encoder (post-LN) whose feed-forward layers are N expert FFNs; one gate per task
       and layer sends each token to its top-1 (or top-k) expert; a head per task reads [CLS]; all
       tasks are trained together.
     [TL] "Eliciting and Understanding Cross-task Skills with Task-level Mixture-of-Experts"
       the experts are whole transformer blocks, and a router sends each task, not each token, to
       blocks of every layer.

   LEVELS, each usable without the ones below it in this list
     ops    pure functions on float arrays, forward and backward
            moe_linear_ moe_layernorm_ moe_attention_ ...
     layer  gate and experts on float arrays
            moe_route_ moe_experts_
     model  weights and tasks; context: activations; trainer: gradients
            moe_model_ moe_context_ moe_trainer_
     text   WordPiece, metrics, text in and label out
            moe_tokenizer_ moe_encode moe_predict_text

   SHAPES  arrays are row-major; one letter a dimension
     M tokens of a batch   S sequences   H hidden size (the paper's d)   F inner size of an expert
     N experts   k experts a token   T tasks   C classes   L layers   A attention heads
     D = H/A size of a head   V vocabulary   P positions   G gates   m blocks of a layer [TL]

   CONFIGURATION MACROS  (defined before the include that has MOE_IMPLEMENTATION; they never change
   a public struct)
     MOE_STATIC            every function is static: for use in one file
     MOE_API               prefix of every public declaration (default: extern "C" in C++)
     MOE_SHARED            the functions are those of a shared library: exported by the file that
                           has MOE_IMPLEMENTATION, imported by the others (on Windows: dllexport,
                           dllimport). cc -shared -fPIC -fvisibility=hidden, -DMOE_SHARED
     MOE_MALLOC, MOE_FREE  the allocator of the _create and _load functions; define both or neither
     MOE_ASSERT(x)         checks for mistakes in moe.h itself (default: nothing)
     MOE_NO_STDIO          no FILE: the functions that take a path are left out
     MOE_NO_THREADS        no built-in pool; the caller's parallel_for still works
     MOE_NO_TRAIN          no gradients, optimizer, sampler, trainer
     MOE_NO_TEXT           no tokenizer, no text functions
     MOE_NO_BF16           no products with bf16 operands
     MOE_NO_INT8           no int8 weights
     MOE_NO_TASK_ROUTER    no blocks as experts, no task-level router
     MOE_NO_SENTENCES      env.log receives "moe.h:N", the line that failed, in place of a sentence
     MOE_NO_SIMD           scalar code only, no intrinsics
     MOE_PLAIN_MULTIPLY_ADD  scalar code multiplies and adds apart: several times faster where the
                           processor has no fused multiply-add, with other bits than all other
                           builds; moe_isa_name is then "scalar, plain". Implies MOE_NO_SIMD
     MOE_SMALL             for microcontrollers: MOE_NO_SIMD, _STDIO, _THREADS, _TEXT, _BF16,
                           _TASK_ROUTER and _SENTENCES; env.profile and env.backend are ignored, and
                           with MOE_NO_TRAIN so are the losses of gates (tests/small.sh: what each
                           saves)
     MOE_USE_BLIS          float products through BLIS (link -lblis; no header needed) where its
                           kernels are faster

   MEMORY   model, context, trainer, tokenizer and predictor have _size and _init in a block of the
            caller, and _create and _free on the heap. Forward, backward and update allocate
            nothing.
   STACK    with MOE_NO_SIMD on a Cortex-M4 or M7 (gcc -Os): inference 4.5 KB, training 5.5 KB, and
            no function has more than 2 KB. With SIMD kernels copy blocks of operands: moe_forward
            and a training step take 185 KB, moe_forward with MOE_NO_BF16 82 KB. Threads of the
            built-in pool have at least 1 MB. tests/stack.sh counts it.
   THREADS  objects are not locked; a context belongs to one thread at a time; a model that is not
            being trained can be shared. Inside a call env.parallel_for spreads the work: the
            caller's, or the built-in pool (moe_pool_create).
   ERRORS   functions that can fail return moe_status. Results come through pointers and stay
            untouched on failure. A sentence that says what was found and what was expected goes to
            env.log. The library never prints, exits or aborts.
   BITS     fp32 results are the same bits for any number of threads, whatever else is in the batch,
            and on AVX-512, AVX2+FMA, NEON, SSE2, WebAssembly, RISC-V vectors and plain C (but not
            with MOE_PLAIN_MULTIPLY_ADD): see "one definition of every sum" at >>simd and >>gemm.
            Where the processor has no fused multiply-add this costs time (bench/fma.sh: how much).
            Only clang -ffp-contract=fast breaks this: it fuses products and sums even where a
            pragma forbids it. moe_env_init detects this and sets MOE_CPU_CONTRACTED.

   PAPER MAP
     [TaG] 2, 3.1 >>block; Eq. 1, 2, 6 >>experts; Eq. 3-5 >>route; Eq. 7, 8, A.3.1 >>heads; Eq. 9,
       10 and the division by log C >>heads, >>kinds; 3.3, A.1.2 sampling >>sampler; 4.3 >>import;
       4.4 >>initial; 4.4, A.3.2 >>optimizer, >>text; 4.5 >>metrics; 5.2, A.1.1 >>adapt; A.4
       >>task_gates.
     [TL] 2, 4 >>task_router, >>blocks; 4, batches and two speeds >>sampler, >>optimizer; 6
       >>routes.
     Where the code departs from a paper, a comment with PAPER-DIFF: gives the reason.

   CONTENTS (search for >>tag)
     >>api_base      statuses, environment, threads
     >>api_ops       ops on float arrays
     >>api_layer     gate, routes, experts
     >>api_model     configuration, tasks, batch, model
     >>api_context   activations, forward
     >>api_backend   computing elsewhere: other libraries, devices
     >>api_train     trainer, optimizer, sampler
     >>api_text      tokenizer, metrics, prediction from text
     >>api_bindings  for other programming languages
     >>platform      includes, compiler differences, processor detection
     >>base          statuses, log, small helpers
     >>random        counter-based random numbers
     >>parallel      tiles, the built-in pool
     >>profile       where the time goes
     >>simd          vectors: the order of a sum, elementary functions in plain C
     >>simd_128      vectors of 16 floats: NEON, SSE2, WebAssembly, RISC-V
     >>simd_x86      vectors of 16 floats: AVX-512, AVX2
     >>rows          exp of vectors; sums of rows
     >>gemm          matrix products: what they are, plain C
     >>gemm_simd     kernels of products for each instruction set
     >>gemm_blocks   a product in tiles and blocks; few outputs
     >>gemm_gradient  gradients of weights
     >>gemm_run      products over threads; packed weights
     >>backend       products by another library, BLIS
     >>amx           tiles of AMX: who may use them, what their kernels share
     >>int8          products with int8 weights: what they are, plain C
     >>int8_x86      kernels with int8 weights: what they share, AVX2, AVX-512, VNNI, AMX
     >>int8_128      kernels with int8 weights: NEON, SSE2, WebAssembly
     >>int8_run      products with int8 weights over threads; packing, quantising
     >>bf16          products with bf16 operands: what they are, plain C
     >>bf16_x86      kernels with bf16 operands: AVX-512, vdpbf16ps, AMX
     >>bf16_run      products with bf16 operands over threads
     >>bf16_pack     packing weights in bf16; the precision of products
     >>linear        linear layers and GELU
     >>ops_simd      kernels of LayerNorm and dropout
     >>ops           LayerNorm, dropout, embeddings, losses
     >>softmax       the softmax of attention
     >>attention_parts  attention: scratch, prefetching, products
     >>attention     self-attention over packed sequences
     >>route         gates, top-k, dispatch
     >>route_back    their gradients
     >>experts       expert feed-forward networks
     >>experts_back  their gradients
    >>kinds         kinds of tasks: heads, losses
    >>config        configuration, tasks
    >>tensors       the table of tensors, places of the weights
    >>model         a model: its block, its tasks
    >>names         tensors by number and by name
    >>initial       initial values
    >>packing       packed weights, int8 weights
    >>adapt         add a task, extract tasks
    >>batch         checks of what comes in
     >>arena         activations: what a context holds, and where
     >>context       a context: its sizes, its block
     >>begin         before a pass: checks, keys of random numbers
     >>pass          a pass: forward and backward of a batch
     >>embeddings    embeddings
     >>block         a transformer block: attention, add & norm, experts, add & norm
     >>block_experts gate, dispatch, experts and combine of a block
     >>task_gates    gates made of task vectors
     >>heads         heads and losses
     >>schedule      which thread computes which rows
     >>task_router   task-level routing: scores of a task, selection, their gradients
     >>blocks        transformer blocks as experts
     >>routes        what a pass chose, what it may choose
     >>optimizer     Adam, schedule, clipping
     >>sampler       which row of which task comes next
     >>trainer       accumulate, update, gradient check
     >>json          reading the little JSON that the files need
     >>out           writing text, numbers and JSON
    >>safetensors   the container of files: its header
    >>values        the values of its tensors; writing it
    >>files         writing model files
    >>metadata      reading model files: configuration, tasks
    >>load          reading model files: weights
    >>os            files of the operating system
    >>replace       reading files whole, replacing them safely
    >>encoder       a published encoder in a file
    >>import        its weights into a model
      >>checkpoint    checkpoints
     >>unicode       what becomes of characters before words are cut
     >>reader        a text as a stream of characters, tokens that stay whole
     >>text          WordPiece
     >>vocabulary    reading its vocabulary, added tokens
     >>metrics       accuracy, F1, Matthews, Pearson, Spearman
     >>answers       from logits to answers: classes, values, rankings
     >>predict       text in, label out
     >>bindings      for other programming languages

   Public domain or MIT-0, at your choice: see the end of the file. */
#if defined(MOE_IMPLEMENTATION) && defined(_WIN32)
/* Whole, so that a later #include <windows.h> misses nothing; but without winsock.h, which would
   keep winsock2.h out, and the macros min, max, near and far stay as the program has them. */
#pragma push_macro("NOMINMAX")
#pragma push_macro("_WINSOCKAPI_")
#pragma push_macro("near")
#pragma push_macro("far")
#undef NOMINMAX
#define NOMINMAX
#undef _WINSOCKAPI_
#define _WINSOCKAPI_
#include <windows.h>
#undef NEAR /* else near and far again, for Windows' own headers */
#undef FAR
#define NEAR
#define FAR
#pragma pop_macro("far")
#pragma pop_macro("near")
#pragma pop_macro("_WINSOCKAPI_")
#pragma pop_macro("NOMINMAX")
#endif

/* Names used below that a program, <tgmath.h> or <windows.h> may have as macros. The end of this
   file gives them back. */
#pragma push_macro("A")
#pragma push_macro("C")
#pragma push_macro("D")
#pragma push_macro("F")
#pragma push_macro("G")
#pragma push_macro("H")
#pragma push_macro("L")
#pragma push_macro("M")
#pragma push_macro("N")
#pragma push_macro("P")
#pragma push_macro("S")
#pragma push_macro("T")
#pragma push_macro("V")
#pragma push_macro("W")
#pragma push_macro("Z")
#pragma push_macro("begin")
#pragma push_macro("end")
#pragma push_macro("small")
#pragma push_macro("max")
#pragma push_macro("exp")
#pragma push_macro("fabs")
#pragma push_macro("log")
#pragma push_macro("sqrt")
#undef A
#undef C
#undef D
#undef F
#undef G
#undef H
#undef L
#undef M
#undef N
#undef P
#undef S
#undef T
#undef V
#undef W
#undef Z
#undef begin
#undef end
#undef small
#undef max
#undef exp
#undef fabs
#undef log
#undef sqrt

#ifndef MOE_H_INCLUDED
#define MOE_H_INCLUDED

#include <stddef.h>
#include <stdint.h>

#ifdef MOE_SMALL
#undef MOE_NO_SIMD /* they may be defined already, to another value */
#undef MOE_NO_STDIO
#undef MOE_NO_THREADS
#undef MOE_NO_TEXT
#undef MOE_NO_BF16
#undef MOE_NO_TASK_ROUTER
#undef MOE_NO_SENTENCES
#define MOE_NO_SIMD
#define MOE_NO_STDIO
#define MOE_NO_THREADS
#define MOE_NO_TEXT
#define MOE_NO_BF16
#define MOE_NO_TASK_ROUTER
#define MOE_NO_SENTENCES
#endif

#if defined(MOE_PLAIN_MULTIPLY_ADD) && !defined(MOE_NO_SIMD)
#define MOE_NO_SIMD
#endif

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) ||           \
    defined(__ASSOCIATIVE_MATH__)
#error "moe.h needs IEEE arithmetic: compile without -ffast-math"
#endif

#ifndef MOE_API
#if defined(MOE_STATIC) && defined(__GNUC__)
#define MOE_API static __attribute__((unused))
#elif defined(MOE_STATIC)
#define MOE_API static
#else
#if defined(MOE_SHARED) && defined(_WIN32) && defined(MOE_IMPLEMENTATION)
#define MOE__EXPORT __declspec(dllexport)
#elif defined(MOE_SHARED) && defined(_WIN32)
#define MOE__EXPORT __declspec(dllimport)
#elif defined(MOE_SHARED) && defined(__GNUC__)
#define MOE__EXPORT __attribute__((visibility("default")))
#else
#define MOE__EXPORT
#endif
#if defined(__cplusplus)
#define MOE_API extern "C" MOE__EXPORT
#else
#define MOE_API extern MOE__EXPORT
#endif
#endif
#endif

#define MOE_VERSION 200 /* 0.2.0 as 10000 major + 100 minor + patch */

/* ---- statuses, environment, threads ---- >>api_base */

#define MOE_STATUSES(X)                                                                            \
  X(MOE_OK, "ok")                                                                                  \
  X(MOE_E_ARGUMENT, "an argument is outside its range")                                            \
  X(MOE_E_MEMORY, "out of memory, or the caller's block is too small")                             \
  X(MOE_E_FORMAT, "damaged, incomplete or foreign data")                                           \
  X(MOE_E_IO, "reading or writing failed")                                                         \
  X(MOE_E_UNSUPPORTED, "this processor or this build cannot do it")                                \
  X(MOE_E_NONFINITE, "a weight, score, loss or gradient is not a finite number")

typedef enum moe_status {
#define MOE_STATUS_ENUM(name, text) name,
  MOE_STATUSES(MOE_STATUS_ENUM)
#undef MOE_STATUS_ENUM
      MOE_STATUS_COUNT
} moe_status;

/* The general meaning of a status, a constant string; "unknown status" for any other number. */
MOE_API const char *moe_status_text(moe_status status);

/* Instruction sets. The bits of a result do not depend on it (fp32). */
typedef enum moe_isa {
  MOE_ISA_AUTO,
  MOE_ISA_SCALAR,
  MOE_ISA_V128, /* "sse2", "simd128" (WebAssembly), or "simd128, relaxed" where that is fused;
                   "rvv" (RISC-V vectors), where compiled for them: -march=rv64gcv */
  MOE_ISA_NEON,
  MOE_ISA_AVX2,
  MOE_ISA_AVX512,
  MOE_ISA_COUNT
} moe_isa;

/* Name in lower case ("avx512"), a constant string. */
MOE_API const char *moe_isa_name(moe_isa isa);
/* The instruction set of that name, or MOE_ISA_COUNT for an unknown name. */
MOE_API moe_isa moe_isa_from_name(const char *name);
/* 1 where this build and this processor (and its operating system) can run it, else 0. */
MOE_API int moe_isa_available(moe_isa isa);

/* What a processor has beyond its instruction set, for products of low precision; and one warning.
 */
enum {
  MOE_CPU_AVX_VNNI = 1,
  MOE_CPU_AVX512_VNNI = 2,
  MOE_CPU_AVX512_BF16 = 4,
  MOE_CPU_NEON_DOT = 8,
  MOE_CPU_SLOW_BF16 = 16, /* FMAs are faster than vdpbf16ps, with the same bits */
  MOE_CPU_AMX_BF16 = 32,  /* moe_env_use_amx sets these two: a process must ask for them */
  MOE_CPU_AMX_INT8 = 64,
  MOE_CPU_CONTRACTED = 128 /* set by the compiler, not the processor: it fuses products and sums
                              where this file forbids it (clang -ffp-contract=fast overrules
                              pragmas). Results are right, but other builds give other bits */
};

typedef enum moe_type { MOE_TYPE_F32, MOE_TYPE_BF16, MOE_TYPE_I8 } moe_type;

/* What computes in place of the CPU: another library's matrix products, or a device that holds
   weights and activations. See >>api_backend. */
typedef struct moe_backend moe_backend;

/* Where the time of moe_forward, moe_trainer_accumulate, moe_trainer_step and moe_predict_ goes: a
   table of the caller's. Every moment of such a call belongs to one section, so that the sections
   add up to the whole. A table serves one call at a time. Where several threads take parts of a
   batch through the layers side by side, only the first thread is measured: the table holds its
   wall time, not a sum over all threads. The time that it waits for the others counts towards its
   next section. */
#define MOE_PROFILE_SECTIONS(X)                                                                    \
  X(TEXT, "text to ids")                                                                           \
  X(EMBEDDINGS, "embeddings")                                                                      \
  X(PROJECTIONS, "attention, linear layers")                                                       \
  X(ATTENTION, "attention")                                                                        \
  X(NORMS, "residuals, LayerNorms")                                                                \
  X(GATES, "gates, routes")                                                                        \
  X(EXPERTS, "experts")                                                                            \
  X(HEADS, "heads")                                                                                \
  X(LOSSES, "losses")                                                                              \
  X(HEADS_BACK, "heads, backward")                                                                 \
  X(EXPERTS_BACK, "experts, backward")                                                             \
  X(GATES_BACK, "gates, routes, backward")                                                         \
  X(NORMS_BACK, "residuals, LayerNorms, backward")                                                 \
  X(ATTENTION_BACK, "attention, backward")                                                         \
  X(PROJECTIONS_BACK, "attention, linear layers, backward")                                        \
  X(EMBEDDINGS_BACK, "embeddings, backward")                                                       \
  X(OPTIMIZER, "optimizer")                                                                        \
  X(PACKING, "packing of weights")
typedef enum moe_profile_section {
#define MOE_PROFILE_ENUM(name, text) MOE_PROFILE_##name,
  MOE_PROFILE_SECTIONS(MOE_PROFILE_ENUM)
#undef MOE_PROFILE_ENUM
      MOE_PROFILE_COUNT
} moe_profile_section;

typedef struct moe_profile {
  double (*clock)(void *user); /* seconds since any fixed moment */
  void *user;
  double last;                       /* when the present section began */
  double seconds[MOE_PROFILE_COUNT]; /* by moe_profile_section */
  int64_t times[MOE_PROFILE_COUNT];  /* how often a section ended */
} moe_profile;

/* An empty table; env.profile = &table switches it on. now NULL: the built-in clock. It is
   monotonic where the C library declares such a clock (with -std=c99 it needs _POSIX_C_SOURCE
   200112L or more), else the time of day. With both MOE_NO_THREADS and MOE_NO_STDIO it is always
   zero: pass a clock there. */
MOE_API void moe_profile_init(moe_profile *profile, double (*now)(void *user), void *user);
/* The sections that were used, slowest first, as lines of text: share, milliseconds, times, name;
   then the sum. At most capacity bytes with the ending zero go to `out`; returns the bytes that the
   whole text needs, without the zero, as snprintf does. */
MOE_API size_t moe_profile_write(char *out, size_t capacity, const moe_profile *profile);
/* The name of a section in words, a constant string; "unknown" for any other number. */
MOE_API const char *moe_profile_text(moe_profile_section section);

/* Everything a call needs to know of its surroundings. A plain struct, which may be copied, for
   example for each thread. */
typedef struct moe_env {
  moe_isa isa; /* resolved by moe_env_init, never MOE_ISA_AUTO afterwards. The processor is not
                  asked again: an instruction set or a bit of `cpu_flags` set by hand that the
                  processor lacks ends in an illegal instruction */
  uint32_t cpu_flags; /* MOE_CPU_ bits that this machine has, set by moe_env_init and
                        moe_env_use_amx. A bit may be cleared; int8 results stay the same */
  moe_type precision; /* MOE_TYPE_F32, or MOE_TYPE_BF16: see moe_env_set_precision */
  int32_t threads;    /* most bodies of parallel_for at once, 1 or more: decides the size of
                         scratch */
  /* Runs body(arg, i) for i = 0 .. count-1, in any order, at most `threads` at once, and returns
     when all are done. NULL: a plain loop. Results never depend on it. */
  void (*parallel_for)(void *user, int32_t count, void (*body)(void *arg, int32_t index),
                       void *arg);
  void *parallel_user;
  /* Receives one sentence for each failure: which file, tensor or line, what was found, what was
     expected. NULL: no messages. */
  void (*log)(void *user, moe_status status, const char *sentence);
  void *log_user;
  const moe_backend *backend; /* computes in place of the CPU (>>api_backend); NULL: the CPU */
  void *stream;               /* a device's queue: set by contexts; NULL: the device's own */
  moe_profile *profile; /* receives the times; NULL: no clock is read. It does not change results */
} moe_env;

/* Fills *env: the best instruction set of this machine (MOE_ISA_AUTO) or the given one, one thread,
   no log. MOE_E_UNSUPPORTED: this machine lacks the given one; *env is then set for
   MOE_ISA_AUTO. */
MOE_API moe_status moe_env_init(moe_env *env, moe_isa isa);
/* Asks the system for the tiles of AMX, once for the whole process, and sets MOE_CPU_AMX_BF16 and
   _AMX_INT8 in env->cpu_flags as far as processor and build have them. env.isa must be AVX-512.
   Products with int8 weights then use the tiles where these are faster, with the same results.
   Linux refuses if a thread has too small a stack for signals (sigaltstack), and after a grant it
   refuses such stacks: therefore the program decides when to ask. moe_env_set_precision asks by
   itself for bf16. Returns 1 if granted, 0 if nothing has changed. */
MOE_API int32_t moe_env_use_amx(moe_env *env);
/* MOE_TYPE_BF16: the products of moe_linear_ and moe_experts_ functions, and so those of a model's
   layers in forward and backward, round their operands to bf16 and add up in fp32 (>>bf16), where
   the processor has AMX tiles or AVX512-BF16. This is the mixed precision of [TaG] 4.4, which does
   not say what stays fp32. Here weights, gradients and everything else stay fp32, also a model's
   gates, routers, heads and feature inputs. Set it before a model is packed (loaded): the packed
   weights then take half the bytes. MOE_TYPE_F32: back to fp32. MOE_E_UNSUPPORTED, with a sentence
   to the log: this machine lacks the units, or env.isa is not AVX-512; products stay fp32. If
   env.precision is set by hand there, plain C computes bf16, slowly. */
MOE_API moe_status moe_env_set_precision(moe_env *env, moe_type precision);

#ifdef MOE_USE_BLIS
/* Connects *env with BLIS. moe_env_init does this with always = 0: BLIS gets the products at which
   it is faster, provided that it has more than its `generic` kernels for this processor. These are
   all products if env->isa is scalar; with AVX2 those whose weights are not packed, gradients
   included (with BLIS's zen kernels those of 64 tokens at most); none with AVX-512 or NEON. With
   always = 1 it gets every large product, whatever its kernels. From then on BLIS computes with one
   thread in this process (bli_thread_set_num_threads), since env.parallel_for spreads the work.
   MOE_E_UNSUPPORTED: integers of this BLIS differ in size from pointers; *env is unchanged. */
MOE_API moe_status moe_blis_use(moe_env *env, int32_t always);
/* The kernels that BLIS has chosen for this processor ("skx", "zen3", "generic"), a constant
   string. */
MOE_API const char *moe_blis_kernels(void);
#endif

#ifndef MOE_NO_THREADS
/* The built-in pool: the calling thread and helpers, which sleep between calls. It serves one call
   at a time, also through copies of the env that share it. Threads that call at the same time need
   a pool each, or env.parallel_for NULL. */
typedef struct moe_pool moe_pool;
/* Starts the helpers and connects *env with them. `threads` (1 .. 256) is the most that may run.
   The pool has no more threads than this process may use processors, since more would only wait for
   each other; env->threads receives their number. MOE_E_MEMORY; MOE_E_UNSUPPORTED: the system
   starts no thread. */
MOE_API moe_status moe_pool_create(moe_pool **out, int32_t threads, moe_env *env);
/* The same with exactly `threads` threads, for any number of processors: to test that results do
   not depend on it. */
MOE_API moe_status moe_pool_create_exact(moe_pool **out, int32_t threads, moe_env *env);
/* Ends the helpers. No call may be running; a connected env must not be used for parallel calls
   afterwards. Accepts NULL. */
MOE_API void moe_pool_free(moe_pool *pool);
/* Number of processors that the calling thread may use, as its affinity says (Linux on 64-bit x86
   and ARM, Windows; elsewhere those of the machine): 1 .. 256, and 1 where the system does not
   tell. */
MOE_API int32_t moe_processors(void);
#endif

/* ---- ops on float arrays ---- >>api_ops
   An op is a struct of arrays and sizes and two functions that read it:
     moe_linear_op op;
     moe_linear_op_init(&op);
     op.y = y, op.x = x, op.w = moe_mat_rows(w, rows, cols), op.M = M;
     status = moe_linear_forward(&op, &env);
     op.dx = dx, op.dy = dy;
     status = moe_linear_backward(&op, &env);
   Forward writes the outputs, the first fields of a struct. Backward reads the same struct, with
   the outputs as forward left them, and adds to the gradients. Call _init first: it sets every
   field, most of them to zero.
     Gradients  d and a name is the gradient of that array. Gradients accumulate: clear them before
                the first backward. The comment of a field says where one is overwritten instead.
     NULL       A gradient that is NULL is not computed. Other arrays may be NULL where the comment
                of the field says so.
     seq_start  (S+1) sequence s is rows seq_start[s] to seq_start[s+1] - 1 of M; seq_start[0] is 0
                and seq_start[S] is M.
     keys       (S) a key of moe_key for each sequence, which decides what its dropout takes. NULL:
                no dropout. Backward needs the same keys.
     Sums       Sums over tokens run in the order of the tokens: micro-batches give the bits of one
                batch.
     Status     MOE_OK, or MOE_E_ARGUMENT with a sentence to env.log where a size, an option, or an
                element of seq_start, gate_of or `forced` is outside its range; nothing is written
                then. Ids and segments are not checked (moe_batch_check does it for a model).
   Sizes may be 0. Arrays need only the alignment of a float. They must not overlap unless a comment
   allows it. Nothing is allocated. */

typedef enum moe_layout {
  MOE_LAYOUT_ROWS,  /* (rows, cols) row-major, as in files */
  MOE_LAYOUT_PANELS /* panels of 16 rows: element (j, p) is at ((j/16)*cols + p)*16 + j%16; zeros
                       fill the missing rows of the last panel */
} moe_layout;

/* A view of the weights of a product: `rows` outputs, `cols` inputs. It holds pointers only. */
typedef struct moe_mat {
  const void *data;
  const float *scale; /* one for each row (int8), else NULL */
  int32_t rows, cols;
  moe_type type;
  moe_layout layout;
} moe_mat;

/* A view of float weights (rows, cols), as in a file. */
MOE_API moe_mat moe_mat_rows(const float *w, int32_t rows, int32_t cols);
/* A view of weights packed by moe_pack. */
MOE_API moe_mat moe_mat_panels(const float *panels, int32_t rows, int32_t cols);
/* Floats that moe_pack writes: rows rounded up to 16, times cols. */
MOE_API size_t moe_pack_floats(int32_t rows, int32_t cols);
/* Packs w (rows, cols) into panels, the fastest layout for products. */
MOE_API void moe_pack(float *panels, const float *w, int32_t rows, int32_t cols,
                      const moe_env *env);

/* int8 weights: w = scale q. Each row has a scale, max |w| / 127, and integers q from -127 to 127,
   rounded to the nearest. A row with an infinity or NaN gets the scale NaN; a row whose elements
   are all below 1e-36 gets the scale 0; their integers are 0. q (rows, cols), scale (rows). cols is
   at most MOE_INT8_COLS. */
#define MOE_INT8_COLS 65536
#ifndef MOE_NO_INT8
MOE_API void moe_quantize(int8_t *q, float *scale, const float *w, int32_t rows, int32_t cols,
                          const moe_env *env);
/* Views of int8 weights, for forward only: rows as in a file, or panels packed by moe_pack_int8.
   Each row of x is quantised in the same way on its way in, and the sums are integers: the bits of
   a result depend neither on the layout nor on the instruction set. */
MOE_API moe_mat moe_mat_rows_int8(const int8_t *w, const float *scale, int32_t rows, int32_t cols);
MOE_API moe_mat moe_mat_panels_int8(const void *panels, const float *scale, int32_t rows,
                                    int32_t cols);
/* Bytes that moe_pack_int8 writes. The layout depends on the machine: do not store it. */
MOE_API size_t moe_pack_int8_bytes(int32_t rows, int32_t cols);
MOE_API void moe_pack_int8(void *panels, const int8_t *w, int32_t rows, int32_t cols,
                           const moe_env *env);
#endif

#ifndef MOE_NO_BF16
/* bf16 weights, for forward only: float weights (rows, cols) rounded and packed. Where
   env.precision is MOE_TYPE_BF16, float weights give the same bits, but each call rounds them
   again. */
MOE_API moe_mat moe_mat_panels_bf16(const void *panels, int32_t rows, int32_t cols);
/* Bytes that moe_pack_bf16 writes. The layout depends on the machine: do not store it. */
MOE_API size_t moe_pack_bf16_bytes(int32_t rows, int32_t cols);
MOE_API void moe_pack_bf16(void *panels, const float *w, int32_t rows, int32_t cols,
                           const moe_env *env);
#endif

/* Linear layer: y = x W^T + b, act = GELU(y), the inner half of an expert [TaG] Eq. 1.
   Backward, where dy is the gradient of y (moe_gelu_backward makes it from that of act):
     dx += dy W, dw += dy^T x, db += the sum of the rows of dy. */
typedef struct moe_linear_op {
  float *y, *act; /* (M, w.rows) either may be NULL, not both */
  const float *x; /* (M, w.cols) */
  moe_mat w;      /* any view in forward; backward needs float weights in rows layout for dx */
  const float *b; /* (w.rows), or NULL */
  int32_t M;
  float *dx, *dw, *db; /* like x, (w.rows, w.cols), (w.rows) */
  const float *dy;     /* (M, w.rows) */
  int32_t overwrite;   /* 1: dx is overwritten */
  moe_mat w_back;      /* for the library's own use: w packed for dx in bf16; data NULL: none */
} moe_linear_op;
MOE_API void moe_linear_op_init(moe_linear_op *op);
MOE_API moe_status moe_linear_forward(const moe_linear_op *op, const moe_env *env);
#ifndef MOE_NO_TRAIN
MOE_API moe_status moe_linear_backward(const moe_linear_op *op, const moe_env *env);
#endif

/* Exact GELU: y = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2. */
MOE_API void moe_gelu_forward(float *y, const float *x, size_t n, const moe_env *env);
#ifndef MOE_NO_TRAIN
/* dx += dy (Phi(x) + x phi(x)), phi the density of the normal distribution. x: the input of
   forward. */
MOE_API void moe_gelu_backward(float *dx, const float *dy, const float *x, size_t n,
                               const moe_env *env);
#endif

/* Residual connection and LayerNorm [TaG] 2, with the mean and the variance of each row of sum:
     sum = x + dropout(delta),  h = (sum - mean) rstd,  rstd = 1 / sqrt(variance + eps),
     y = h gamma + beta.
   Without delta the sum is x itself: a plain LayerNorm.
   Backward, with g = dy gamma:
     dsum = rstd (g - mean of g - h (mean of g h)),  dx += dsum,  ddelta = dropout(dsum),
     dgamma += sum of dy h,  dbeta += sum of dy. */
typedef struct moe_layernorm_op {
  float *y;                  /* (M, H), may be x or delta where no backward follows */
  float *sum;                /* (M, H) kept for backward; NULL: backward reads x instead */
  float *mean, *rstd;        /* (M) kept for backward; both or neither NULL */
  const float *x;            /* (M, H) */
  const float *delta;        /* (M, H) output of a branch, or NULL */
  const float *gamma, *beta; /* (H) */
  float eps;                 /* above 0; _init: 1e-12, as in BERT */
  float dropout;             /* of delta, 0 to below 1; element (i, j) of a sequence is at position
                                i H + j of its key */
  const uint64_t *keys;
  const int32_t *seq_start; /* with S: needed for dropout only */
  int32_t S, M, H;
  float *dx;             /* (M, H) */
  float *ddelta;         /* (M, H) overwritten; may be dx if that is overwritten */
  float *dgamma, *dbeta; /* (H) */
  const float *dy;       /* (M, H) */
  int32_t overwrite;     /* 1: dx is overwritten, and may be dy */
} moe_layernorm_op;
MOE_API void moe_layernorm_op_init(moe_layernorm_op *op);
MOE_API moe_status moe_layernorm_forward(const moe_layernorm_op *op, const moe_env *env);
#ifndef MOE_NO_TRAIN
MOE_API moe_status moe_layernorm_backward(const moe_layernorm_op *op, const moe_env *env);
#endif

/* Random numbers are functions of a key and a position. This is the key of a place in the network.
 */
MOE_API uint64_t moe_key(uint64_t seed, uint64_t step, uint64_t sequence, uint32_t layer,
                         uint32_t site);
/* Inverted dropout: y[i] is 0 with probability p, else x[i] / (1 - p); the key and i modulo 2^32
   decide which. 0 <= p < 1. x and y may be the same. Its backward is the same function on dy. */
MOE_API void moe_dropout(float *y, const float *x, size_t n, float p, uint64_t key,
                         const moe_env *env);

/* Dropout of packed sequences, with the keys and positions of moe_layernorm_op: y = dropout(x). Its
   backward is the same function with x = dy and y = dx, which is overwritten. */
typedef struct moe_dropout_op {
  float *y;       /* (M, H), may be x */
  const float *x; /* (M, H) */
  float dropout;  /* 0 to below 1 */
  const uint64_t *keys;
  const int32_t *seq_start;
  int32_t S, M, H;
} moe_dropout_op;
MOE_API void moe_dropout_op_init(moe_dropout_op *op);
MOE_API moe_status moe_dropout_forward(const moe_dropout_op *op, const moe_env *env);

/* Embeddings: x = word[id] + position[place in its sequence] + segment[segment id].
   Backward: dx is added to the gradients of the rows that were used. */
typedef struct moe_embed_op {
  float *x;                /* (M, H) */
  const int32_t *ids;      /* (M) 0 to V - 1, not read if word is NULL */
  const uint8_t *segments; /* (M) 0 or 1; NULL: all 0 */
  const float *word;       /* (V, H); NULL: x holds that term already (feature inputs) */
  const float *position;   /* (P, H), P at least the longest sequence; NULL: not added */
  const float *segment;    /* (2, H); NULL: not added */
  const int32_t *seq_start;
  int32_t S, M, H;
  float *dword, *dposition, *dsegment; /* like word, position, segment */
  const float *dx;                     /* (M, H) */
} moe_embed_op;
MOE_API void moe_embed_op_init(moe_embed_op *op);
MOE_API moe_status moe_embed_forward(const moe_embed_op *op, const moe_env *env);
#ifndef MOE_NO_TRAIN
MOE_API moe_status moe_embed_backward(const moe_embed_op *op, const moe_env *env);
#endif

/* Multi-head self-attention inside each packed sequence. For each of A heads of D = H / A columns:
     P = softmax(q k^T / sqrt D),  y = dropout(P) v.
   Backward computes P again from stats; nothing of size length^2 is kept. With
   dP = dropout(dy v^T) and dS = P (dP - dy . y) / sqrt D:
     dv += dropout(P)^T dy,  dq += dS k,  dk += dS^T q. */
typedef struct moe_attention_op {
  float *y;     /* (M, H) */
  float *stats; /* (M, A, 2) kept for backward: the largest exponent (to base 2) and 1 / sum of each
                   row of the softmax; or NULL */
  const float *qkv; /* (M, 3H) query, key and value side by side */
  float dropout;    /* of P, 0 to below 1; element (head a, query i, key j) is at position
                       (a length + i) length + j modulo 2^32 of the sequence's key */
  const uint64_t *keys;
  const int32_t *seq_start;
  int32_t S, M, H, A; /* A divides H */
  int32_t longest;    /* tokens of the longest sequence, or more; 0: found from seq_start */
  float *scratch;     /* moe_attention_scratch floats */
  float *dqkv;        /* (M, 3H) */
  const float *dy;    /* (M, H) */
  int32_t overwrite;  /* 1: dqkv is overwritten */
} moe_attention_op;
MOE_API void moe_attention_op_init(moe_attention_op *op);
MOE_API moe_status moe_attention_forward(const moe_attention_op *op, const moe_env *env);
#ifndef MOE_NO_TRAIN
MOE_API moe_status moe_attention_backward(const moe_attention_op *op, const moe_env *env);
#endif
/* Floats of scratch for sequences of at most `longest` tokens, in forward (training 0) or in both
   directions (1). 0 if a size is below 1, SIZE_MAX if the number overflows. */
MOE_API size_t moe_attention_scratch(int32_t longest, int32_t H, int32_t A, int training,
                                     const moe_env *env);

/* prob = softmax(logits) [TaG] Eq. 7: what makes probabilities of the C logits of a classification
   that moe_forward returns. prob (C) may be logits itself. C >= 1, finite logits. */
MOE_API void moe_softmax(float *prob, const float *logits, int32_t C);
/* Returns the cross-entropy -log prob[label] of C logits, prob = softmax(logits) [TaG] Eq. 7 and 9.
   prob (C) may be NULL, or logits itself. C >= 1, 0 <= label < C; there is no label for "ignore".
 */
MOE_API float moe_cross_entropy_forward(float *prob, const float *logits, int32_t label, int32_t C);
#ifndef MOE_NO_TRAIN
/* dlogits += scale (prob - onehot(label)). */
MOE_API void moe_cross_entropy_backward(float *dlogits, const float *prob, int32_t label,
                                        float scale, int32_t C);
#endif

/* ---- gate, routes, experts: the MoE layer on float arrays ---- >>api_layer */

#define MOE_MAX_EXPERTS 256

/* Where M tokens go: arrays of the caller, which forward fills. A slot is one choice of one token:
   slot = token k + choice. */
typedef struct moe_routes {
  int32_t M, N, k; /* 1 <= k <= N <= MOE_MAX_EXPERTS; M k at most INT32_MAX */
  int32_t *expert; /* (M, k) experts of each token, most probable first [TaG] Eq. 5 */
  float *weight;   /* (M, k) factor of each expert's output: g* [TaG] Eq. 5 and 6, scaled or
                      renormalised if asked */
  float *prob;     /* (M, N) softmax over the experts [TaG] Eq. 4 */
  int32_t *order;  /* (M k) slots sorted by expert; tokens in order within an expert */
  int32_t *start;  /* (N+1) the slots of expert i are order[start[i]] to order[start[i+1] - 1] */
} moe_routes;

typedef struct moe_route_options {
  float scale;         /* weight = scale * probability, above 0. 1 (_init): the paper's g*; N/k:
                          gate scale "n" (PAPER-DIFF) */
  int32_t renormalize; /* 1: the k chosen probabilities are divided by their sum; scale is ignored
                          (PAPER-DIFF) */
  float balance;       /* coefficient of the load-balance loss of Switch, N sum_i f_i P_i; 0 = off,
                          as in the paper. f_i: share of the choices that went to expert i; P_i:
                          mean probability of i over the M tokens */
  float z_loss;        /* coefficient of the router z-loss, the mean over the tokens of (log sum exp
                          logits)^2; 0 = off */
  float jitter;        /* in training, gate inputs are multiplied by uniform noise from 1 - jitter
                          to 1 + jitter; 0 = off. Ignored with MOE_NO_TRAIN */
  const uint64_t *keys;  /* (S) key of the jitter of each sequence; NULL: no jitter */
  const int32_t *forced; /* (M, k) experts to take instead of the most probable ones; NULL: none */
  const uint8_t *masked; /* (N) 1: the gate ignores this expert. Its logit counts as minus infinity,
                            its probability is 0. At least k experts must remain. Not read if
                            `forced` is given. NULL: none */
  const uint8_t *pruned; /* (N) 1: this expert is removed. It keeps its probability, but is never
                            chosen: the next best takes its place. At least k experts must be
                            neither pruned nor masked. `forced` must avoid pruned experts. NULL:
                            none */
} moe_route_options;
/* All zero, scale 1. */
MOE_API void moe_route_options_init(moe_route_options *options);

/* The gate of a layer [TaG] Eq. 3-5: for each token x of a sequence with gate W_g
     logits = x W_g^T,  prob = softmax(logits),  the k experts of the largest logits.
   Of equal logits the lowest index comes first. N = 1 is the dense layer: the probability is 1,
   there is no loss, and x, gates, gate_of and logits are not read.
   Backward: through the weights of the chosen experts, and through the two losses, into all logits:
     dlogit_i = prob_i (dprob_i - sum_j prob_j dprob_j),  dx += dlogits W_g,
     dW_g += dlogits^T x over the tokens of its sequences. N = 1: nothing to do. */
typedef struct moe_route_op {
  moe_routes *routes;     /* sizes M, N, k in, routes out */
  float *logits;          /* (M, N) kept for backward */
  float *loss;            /* one number: balance loss + z-loss, coefficients applied; or NULL */
  const float *x;         /* (M, H) */
  const float *gates;     /* (G, N, H) */
  const int32_t *gate_of; /* (S) the gate of each sequence, 0 to G - 1 */
  const int32_t *seq_start;
  int32_t S, H, G;
  moe_route_options options;
  float *dx;            /* (M, H) */
  float *dgates;        /* (G, N, H) */
  float *dlogits;       /* (M, N) overwritten; always needed */
  const float *dweight; /* (M, k) from moe_experts_backward */
  float loss_scale;     /* factor of the gradients of the two losses; _init: 1 */
} moe_route_op;
MOE_API void moe_route_op_init(moe_route_op *op);
MOE_API moe_status moe_route_forward(const moe_route_op *op, const moe_env *env);
#ifndef MOE_NO_TRAIN
MOE_API moe_status moe_route_backward(const moe_route_op *op, const moe_env *env);
#endif

/* The experts of a layer [TaG] Eq. 1, 2, 6:
     E_i(x) = W_out GELU(W_in x + b_in) + b_out,  y = sum over the token's experts of weight E_i(x).
   PAPER-DIFF: Eq. 1 has no biases; BERT's weights have them. An expert without tokens costs
   nothing. N = 1 with weight 1 is the dense feed-forward network, bit for bit; e is then not used.
   Backward: dweight = dy . E_i(x); weight dy goes through expert i into dx and its gradients. With
   N = 1 and weight 1, dweight is 0, since the weight is constant. */
typedef struct moe_experts_op {
  float *y;       /* (M, H) */
  float *pre, *e; /* kept for backward, or both NULL; rows in the order of routes->order: (M k, F)
                     input of GELU, (M k, H) output of the experts */
  const float *x; /* (M, H) */
  const moe_routes *routes;                /* NULL: N = 1, and M tokens go to it with weight 1 */
  int32_t M;                               /* read where routes is NULL */
  const moe_mat *in, *out;                 /* (N) weights (F, H) and (H, F), any view */
  const float *const *b_in, *const *b_out; /* (N) biases (F) and (H); an array or an element of it
                                              may be NULL */
  int32_t N, H, F;                         /* N as in routes */
  float *scratch;                          /* moe_experts_scratch floats */
  float *dx;                               /* (M, H) */
  float *dweight;                          /* (M, k) overwritten */
  float *const *d_in, *const *d_b_in;   /* (N) gradients of in and b_in; an array or an element */
  float *const *d_out, *const *d_b_out; /* of it may be NULL. The same of out and b_out */
  const float *dy;                      /* (M, H) */
  const float *const *w_in, *const *w_out; /* (N) float weights in rows layout, for backward; NULL:
                                              in and out are in rows layout themselves */
  const moe_mat *in_back, *out_back; /* for the library's own use: (N) as w_back of moe_linear_op;
                                        NULL: none */
} moe_experts_op;
MOE_API void moe_experts_op_init(moe_experts_op *op);
MOE_API moe_status moe_experts_forward(const moe_experts_op *op, const moe_env *env);
#ifndef MOE_NO_TRAIN
MOE_API moe_status moe_experts_backward(const moe_experts_op *op, const moe_env *env);
#endif
/* Floats of scratch for M tokens with k experts each, in forward (training 0) or in both directions
   (1); SIZE_MAX where the number overflows. */
MOE_API size_t moe_experts_scratch(int32_t M, int32_t k, int32_t H, int32_t F, int training);

/* ---- configuration, tasks, batch, model ---- >>api_model */

#define MOE_MAX_CLASSES 256
#define MOE_MAX_TASKS 4096
#define MOE_NAME_BYTES 64 /* of a task's or label's name, with the zero at its end */

typedef enum moe_router {
  MOE_ROUTER_DENSE,      /* N = 1, no gate: Single-Task and MT-Dense */
  MOE_ROUTER_SHARED,     /* one gate a layer for all tasks: MT-Switch */
  MOE_ROUTER_TASK,       /* one gate a layer and task: MT-TaG [TaG] 3.1 */
  MOE_ROUTER_TASK_LEVEL, /* one small network a layer, with 64 inner units, chooses blocks for a
                            whole task from the task's vector [TL] 2 */
  MOE_ROUTER_EMBEDDING   /* the gate of a task is made of shared matrices, W_{g,t} = sum_j z_{t,j}
                            B_j, and its vector z_t   [TaG] A.4 */
} moe_router;

/* The name of a router in files, "dense", "shared", "task", "level" or "embedding"; NULL if the
   number is out of range. */
MOE_API const char *moe_router_name(moe_router router);
/* Sets *router to the router of that name and returns 1; returns 0 for an unknown name. */
MOE_API int moe_router_from_name(moe_router *router, const char *name);

/* What an expert is. */
typedef enum moe_unit {
  MOE_UNIT_FFN,  /* a feed-forward network [TaG] */
  MOE_UNIT_BLOCK /* a whole transformer block [TL]: with MOE_ROUTER_TASK_LEVEL, or without a router
                    (MOE_ROUTER_DENSE: the mean of the blocks, or the routes of
                    moe_context_task_router) */
} moe_unit;

/* How MOE_ROUTER_TASK_LEVEL turns scores z of the m blocks into their weights [TL] 4. */
typedef enum moe_selection {
  MOE_SELECT_SOFTMAX, /* softmax(z / tau): all blocks take part */
  MOE_SELECT_GUMBEL,  /* training: softmax((z + noise) / tau), noise drawn for each sequence and
                         layer; else the most probable block */
  MOE_SELECT_STRAIGHT /* training: the largest of those weights counts as 1, the others as 0, with
                         the gradient of the weights (straight-through); else the most probable
                         block */
} moe_selection;

typedef enum moe_truncate {
  MOE_TRUNCATE_LONGEST, /* a pair: tokens are removed from the end of the longer text, one by one.
                           PAPER-DIFF: [TaG] A.3.2 truncates "on the right". Read as
                           MOE_TRUNCATE_RIGHT, this would lose the second text of most long pairs */
  MOE_TRUNCATE_RIGHT    /* the whole input is truncated on the right */
} moe_truncate;
/* As moe_router_name and moe_router_from_name: "longest", "right". */
MOE_API const char *moe_truncate_name(moe_truncate truncate);
MOE_API int moe_truncate_from_name(moe_truncate *truncate, const char *name);

/* How text becomes tokens (moe_tokenizer_init); 0: as in bert-base-uncased. */
typedef enum moe_text_flags {
  MOE_TEXT_CASED = 1,   /* text is not lower-cased, and keeps its accents */
  MOE_TEXT_ACCENTS = 2, /* the other way: accents stay in lower-cased text, go from cased text */
  MOE_TEXT_WHOLE_IDEOGRAPHS = 4, /* ideographs are not words of their own */
  MOE_TEXT_ADDED = 8 /* lines of the vocabulary that end with a tab, "+" and any of the letters
                        lnorsw are added tokens, which stay whole in a text, the longest first: n,
                        in the normalised text; o, only where no character of a word precedes or
                        follows; w, also a word as other lines. l, r and s are for other programs:
                        they change no id */
} moe_text_flags;
/* The configuration that a model file holds. moe_config_init sets MiniLM's shape and the paper's
   defaults. */
typedef struct moe_config {
  int32_t layers, hidden, ffn, heads; /* L, H, F, A; H a multiple of A */
  int32_t vocab, positions, segments; /* V, P, kinds of segments (2); vocab 0 with feature inputs */
  int32_t feature_dim; /* width of a feature vector; 0: token ids. With features vocab is 0, and the
                          first vector of a sequence has the place of [CLS]: heads read its state */
  float eps;           /* of LayerNorm, 1e-12 in BERT */
  moe_router router;
  int32_t experts, top_k; /* N, k; 1 and 1 when dense */
  int32_t gate_scale_n; /* 0: weight g* (the paper). 1: g* N/k, PAPER-DIFF: an upcycled model starts
                           as its parent */
  int32_t renormalize;  /* 1: top-k weights sum to 1; not together with gate_scale_n */
  int32_t rank;         /* r: length of a task's vector, for MOE_ROUTER_EMBEDDING; 8 */
  int32_t max_len;      /* longest input in tokens, at most `positions` */
  moe_truncate truncate;
  int32_t cased;           /* moe_text_flags; 1: text is not lower-cased */
  moe_unit unit;           /* MOE_UNIT_BLOCK: `experts` counts the blocks of a layer, m in [TL] */
  moe_selection selection; /* the following are for MOE_ROUTER_TASK_LEVEL */
  int32_t task_dim;        /* width of a task's vector (64) */
  float temperature; /* tau of MOE_SELECT_SOFTMAX outside training; 0.1, the final tau of training
                        (moe_train_tau decides during training) */
  const uint8_t
      *pruned; /* (L, N) 1: the model lacks this expert (moe_route_options.pruned): it has no
                  tensors except its rows in the gates. At least k of a layer must stay. Owned by
                  the caller (a model copies it); NULL: none is pruned */
} moe_config;
MOE_API void moe_config_init(moe_config *config);
/* MOE_E_ARGUMENT with a sentence for any field outside its range. */
MOE_API moe_status moe_config_check(const moe_config *config, const moe_env *env);

typedef enum moe_kind {
  /* Heads have a bias, zero at first. PAPER-DIFF: Eq. 7 and 8 have none. */
  MOE_KIND_CLASSIFICATION, /* head (C, H) on [CLS], cross-entropy / log C [TaG] Eq. 7, 9, 3.3 */
  MOE_KIND_REGRESSION,     /* head (1, H) on [CLS], squared error [TaG] Eq. 8, 10 */
  MOE_KIND_RANKING, /* classification of each choice; in a group the largest logit of class 1 wins
                       [TaG] A.3.1 */
  MOE_KIND_SPAN /* classification on [CLS; span 1; span 2], head (C, 3H), a span is the mean of its
                   tokens [TaG] A.3.1 */
} moe_kind;
/* The name of a kind in files, "classification", "regression", "ranking" or "span"; NULL if the
   number is out of range. */
MOE_API const char *moe_kind_name(moe_kind kind);
/* Sets *kind to the kind of that name and returns 1; returns 0 for an unknown name. */
MOE_API int moe_kind_from_name(moe_kind *kind, const char *name);

typedef struct moe_task {
  char name[MOE_NAME_BYTES]; /* letters, digits and -_+ ; unique in a model */
  moe_kind kind;
  int32_t pair;                 /* 1: two texts */
  int32_t classes;              /* C >= 2; regression: 1 */
  float low, high;              /* range of a regression's labels */
  char metrics[MOE_NAME_BYTES]; /* names separated by commas, the first one counts: accuracy f1
                                   macro_f1 matthews pearson spearman; only the last two for a
                                   regression */
  int32_t max_len; /* longest input in tokens where that is less than the model's; 0: the model's */
  const char *const
      *label; /* (C) label names, owned by the caller (a model copies them); NULL: "0", "1", ...,
                 which a model spells out. A regression has none: NULL in a model */
} moe_task;

/* S sequences of M tokens, packed without padding. */
typedef struct moe_batch {
  int32_t S;
  const int32_t *seq_start; /* (S+1), from 0 to M, every sequence has 1 .. positions tokens */
  const int32_t *ids;       /* (M) in [0, V), or NULL with features */
  const float *features;    /* (M, features), or NULL with ids */
  const uint8_t *segments;  /* (M) in [0, segments), NULL: all 0 */
  const int32_t *task;      /* (S) in [0, T); ignored in a model without tasks */
  const float *label;       /* (S) class number or score; only training reads it */
  const int32_t *span;      /* (S, 4) tokens [b1, e1) and [b2, e2) within the sequence, for
                               MOE_KIND_SPAN; else NULL */
  const int64_t *index; /* (S) number of each sequence within the whole batch, for random numbers;
                           NULL: 0 .. S-1 */
  const float *weight;  /* (S) factors of the losses, 0 or more; NULL: 1 */
} moe_batch;

/* The heads of T tasks and their losses [TaG] Eq. 7-10. The head of a task is a linear layer on
   [CLS], the first token of a sequence, or on [CLS; span 1; span 2] (MOE_KIND_SPAN), after dropout:
     scores = W feature + b,
     loss = -log softmax(scores)[label] / log C, or (score - label)^2 (MOE_KIND_REGRESSION).
   times the weight of the sequence. Backward: gradients of the sum of the losses / batch_size. */
typedef struct moe_heads_op {
  float *scores;         /* (S, max_classes) the C scores of a sequence's task, then zeros; kept for
                            backward */
  float *losses;         /* (S) NULL: not wanted, and labels are not read */
  const float *hidden;   /* (M, H) */
  const float *w;        /* head t is at w + head[t]: W (C, H) or (C, 3H), then b (C) */
  const size_t *head;    /* (T) */
  const moe_task *tasks; /* (T) */
  const int32_t *task;   /* (S), and the next four: see moe_batch */
  const float *label;
  const int32_t *span;
  const int32_t *seq_start;
  float dropout; /* of what a head reads, 0 to below 1; element j at position j of the key */
  const uint64_t *keys;
  int32_t S, M, H, T, max_classes;
  float *scratch;      /* moe_heads_scratch floats */
  float *dhidden;      /* (M, H) */
  float *dw;           /* like w */
  int32_t batch_size;  /* at least S; backward */
  int32_t overwrite;   /* 1: dhidden is overwritten; rows that no head reads become 0 */
  const float *weight; /* (S) see moe_batch */
} moe_heads_op;
MOE_API void moe_heads_op_init(moe_heads_op *op);
MOE_API moe_status moe_heads_forward(const moe_heads_op *op, const moe_env *env);
#ifndef MOE_NO_TRAIN
MOE_API moe_status moe_heads_backward(const moe_heads_op *op, const moe_env *env);
#endif
MOE_API size_t moe_heads_scratch(int32_t H);

typedef struct moe_model moe_model;

/* Exact bytes of moe_model_init's block. T 0 (tasks NULL): an encoder for embeddings, with router
   dense or shared and unit FFN. moe_forward then ignores batch.task and writes no scores; a trainer
   and answers of a predictor are refused; moe_model_adapt adds tasks. */
MOE_API moe_status moe_model_size(const moe_config *config, const moe_task *tasks, int32_t T,
                                  size_t *bytes, const moe_env *env);
/* A model with random weights in the caller's block (64-byte aligned): matrices N(0, 0.02), gates
   N(0, 0.001), LayerNorm 1, biases 0 [TaG] 4.4. Same seed, same bits. */
MOE_API moe_status moe_model_init(moe_model **out, void *block, size_t bytes,
                                  const moe_config *config, const moe_task *tasks, int32_t T,
                                  uint64_t seed, const moe_env *env);
/* The same on the heap. */
MOE_API moe_status moe_model_create(moe_model **out, const moe_config *config,
                                    const moe_task *tasks, int32_t T, uint64_t seed,
                                    const moe_env *env);
/* Frees what _create, _load, _pack and _set_vocab allocated; not the caller's block. NULL is fine.
   */
MOE_API void moe_model_free(moe_model *model);

/* The model's own configuration, and task 0 .. T-1 (else NULL): copies that live as long as the
   model. */
MOE_API const moe_config *moe_model_config(const moe_model *model);
MOE_API int32_t moe_model_tasks(const moe_model *model);
MOE_API const moe_task *moe_model_task(const moe_model *model, int32_t task);
/* Index of the task of that name, or -1. */
MOE_API int32_t moe_model_find_task(const moe_model *model, const char *name);
/* Largest number of scores of a task: the row length of moe_forward's output. */
MOE_API int32_t moe_model_max_classes(const moe_model *model);
/* Copies the vocabulary that text functions need, one word a line. MOE_E_MEMORY. */
MOE_API moe_status moe_model_set_vocab(moe_model *model, const char *vocab, size_t bytes,
                                       const moe_env *env);
/* The vocabulary text and its length, or NULL. */
MOE_API const char *moe_model_vocab(const moe_model *model, size_t *bytes);

/* Weights: one flat array of `moe_model_parameters` floats and a table of named tensors in it, in
   the order of a file. */
typedef struct moe_tensor {
  char name[128]; /* as on the Hugging Face hub: encoder.layer.0.attention.self.query.weight */
  int32_t dims, shape[3];
  moe_type type;        /* MOE_TYPE_F32, or MOE_TYPE_I8 in a quantised model */
  size_t offset, count; /* in elements: of the flat array, or of the int8 weights that follow it */
} moe_tensor;
MOE_API size_t moe_model_parameters(const moe_model *model);
MOE_API float *moe_model_weights(moe_model *model); /* NULL where they stay in a file's bytes
                                                       (moe_model_open), or are int8 */
MOE_API int32_t moe_model_tensors(const moe_model *model);
/* Tensor 0 .. moe_model_tensors - 1; else MOE_E_ARGUMENT. */
MOE_API moe_status moe_model_tensor(const moe_model *model, int32_t index, moe_tensor *out);
/* Index of the tensor of that name, or -1. */
MOE_API int32_t moe_model_find_tensor(const moe_model *model, const char *name);

/* Packs the weights for fast products into memory of the model's own: the heap (block NULL;
   MOE_E_MEMORY), or the caller's block (64-byte aligned) of moe_model_pack_size bytes (where
   env.precision asks for bf16: moe_model_pack_size_bf16, half of that but for odd sizes). Call it
   again after changing weights by hand; the trainer packs after each step itself, in the precision
   of this call. A pass of the other precision gives the same bits as without packing, but is
   slower. */
MOE_API size_t moe_model_pack_size(const moe_model *model);
MOE_API size_t moe_model_pack_size_bf16(const moe_model *model);
MOE_API moe_status moe_model_pack(moe_model *model, void *block, const moe_env *env);

/* A copy of a model for inference, on the heap and packed, about a quarter of the bytes: int8
   instead of floats for the word embeddings, the matrices of attention and those of the experts,
   each with a scale for each row (tensors NAME, int8, and NAME.scale). Gates, LayerNorms, biases,
   heads and the other embeddings stay as they are, since a quantised gate routes differently. It is
   written, read and opened like any model, and moe_forward takes it; it cannot be trained, imported
   into or quantised again (MOE_E_UNSUPPORTED). MOE_E_NONFINITE with the tensor's name where a
   weight is not finite; MOE_E_UNSUPPORTED where a matrix is wider than MOE_INT8_COLS. */
#ifndef MOE_NO_INT8
MOE_API moe_status moe_model_quantize(moe_model **out, const moe_model *model, const moe_env *env);
#endif
/* MOE_TYPE_I8 for such a model, else MOE_TYPE_F32. */
MOE_API moe_type moe_model_type(const moe_model *model);

/* Files: safetensors, with configuration, tasks and vocabulary inside. */
typedef struct moe_writer {
  int (*write)(void *user, const void *data, size_t bytes); /* 0 = written */
  void *user;
} moe_writer;
/* Writes the whole model, in large portions; the same model gives the same bytes. MOE_E_IO if
   the writer fails. MOE_E_NONFINITE with the tensor's name if a weight is not finite, which reading
   would refuse: then nothing is written, and moe_model_save leaves the old file as it is. */
MOE_API moe_status moe_model_write(const moe_model *model, const moe_writer *writer,
                                   const moe_env *env);
/* A model on the heap from the bytes of a file, packed and ready to train or to run. The tensors
   may have any order. MOE_E_FORMAT with the tensor's name: the file is not one of moe.h or is
   damaged (NaN or infinity in the weights counts as damage). */
MOE_API moe_status moe_model_read(moe_model **out, const void *file, size_t file_bytes,
                                  const moe_env *env);
/* Bytes of a block for moe_model_open. */
MOE_API moe_status moe_model_open_size(const void *file, size_t file_bytes, size_t *bytes,
                                       const moe_env *env);
/* A model whose weights stay in the file's bytes (mapped, or in flash), which must outlive it and
   are never written to. Such a model cannot be trained. MOE_E_FORMAT with the tensor's name: the
   file is not one of moe.h, is damaged, or has another order of tensors; the weights themselves are
   not checked. If another program truncates a mapped file in place, the next read raises SIGBUS. If
   a program replaces the file, as moe_file_replace does, the mapping keeps the old content. If
   truncation is possible, use moe_file_read instead of a mapping. */
MOE_API moe_status moe_model_open(moe_model **out, const void *file, size_t file_bytes, void *block,
                                  size_t bytes, const moe_env *env);

/* A model as constants of a program, without a file: what `convert MODEL --c-array NAME` writes for
   devices that keep it in flash. */
typedef struct moe_view {
  int32_t version; /* MOE_VERSION of the moe.h that wrote it */
  moe_config config;
  const moe_task *tasks; /* (T) */
  int32_t T;
  const float *floats; /* the flat array of moe_model_weights, `count` floats */
  size_t count;
  const int8_t *int8; /* the matrices of an int8 model, int8_count bytes; else NULL */
  size_t int8_count;
} moe_view;
/* As moe_model_open_size and moe_model_open, with less code: no JSON, no names. MOE_E_FORMAT: the
   arrays have another length than configuration and tasks need, or another version wrote them. */
MOE_API moe_status moe_model_view_size(const moe_view *view, size_t *bytes, const moe_env *env);
MOE_API moe_status moe_model_view(moe_model **out, const moe_view *view, void *block, size_t bytes,
                                  const moe_env *env);
/* The other way round: pointers into the model, which live as long as it does. */
MOE_API moe_status moe_view_of(moe_view *out, const moe_model *model, const moe_env *env);

typedef struct moe_import_options {
  float noise; /* standard deviation of noise on copies of experts or blocks; 0: none, as in [TaG]
                  4.3. [TL]'s authors take 1e-8 */
  uint64_t seed;
} moe_import_options;
/* Reads layers, hidden, ffn, vocab, positions and segments from a BERT-like safetensors file into
   *config (no such file holds heads and eps) and sets feature_dim to 0. max_len stays, but is
   lowered to the positions where it exceeds them. Names may begin with "bert."; LayerNorms are
   gamma/beta or weight/bias. MOE_E_FORMAT with a sentence for other kinds of encoders: RoBERTa,
   DistilBERT, ALBERT, ModernBERT and any file with tensors that BERT does not have. */
MOE_API moe_status moe_import_sizes(moe_config *config, const void *file, size_t file_bytes,
                                    const moe_env *env);
/* Reads num_attention_heads (required) and layer_norm_eps from the text of a config.json, with or
   without a byte order mark. MOE_E_UNSUPPORTED if hidden_act is not "gelu",
   position_embedding_type not "absolute", is_decoder not false, embedding_size not hidden_size, or
   model_type none of "bert", "electra", "ernie", "splinter" and "dpr", whose encoders are BERT's;
   each may be absent. */
MOE_API moe_status moe_import_config_json(moe_config *config, const char *json, size_t bytes,
                                          const moe_env *env);
/* Both: the sizes from the weights, heads and eps from config.json. MOE_E_FORMAT, with key and both
   values, if config.json gives other sizes than the weights have. */
MOE_API moe_status moe_import_encoder(moe_config *config, const void *file, size_t file_bytes,
                                      const char *json, size_t json_bytes, const moe_env *env);
/* Fills embeddings, attention, LayerNorms and every expert (N copies of each FFN [TaG] 4.3, or m of
   each block [TL]) from the file: F32, F16, BF16 or F64. Model and file must have the same number
   of layers and the same sizes. Gates, task vectors, routers and heads keep their values.
   MOE_E_FORMAT with a sentence for each tensor that is missing, misshapen or not finite (16 at
   most); nothing is changed then. options NULL: no noise. MOE_E_UNSUPPORTED for int8 models and
   those with pruned experts. Allocates 24 bytes for each tensor of a layer meanwhile: MOE_E_MEMORY.
 */
MOE_API moe_status moe_model_import(moe_model *model, const void *file, size_t file_bytes,
                                    const moe_import_options *options, const moe_env *env);

/* Where the gates of a new task come from [TaG] 5.2, Tables 2 and 6, if not from one of the model's
   tasks. */
enum { MOE_GATE_RANDOM = -1, MOE_GATE_MEAN = -2 };
/* Makes a model on the heap, packed, with one more task, the last one; everything else has the same
   bits. The new task's gate in every layer (or its task vector) is a copy of that of task
   gate_from, the mean over all tasks (MOE_GATE_MEAN), or random from `seed`, as its head is. Models
   without gates of each task's own (dense, shared) take only MOE_GATE_RANDOM. MOE_E_ARGUMENT: the
   model has a task of that name, or no task gate_from. MOE_E_UNSUPPORTED: the model is int8. */
MOE_API moe_status moe_model_adapt(moe_model **out, const moe_model *model, const moe_task *task,
                                   int32_t gate_from, uint64_t seed, const moe_env *env);

/* Makes a model on the heap, packed, with n of the tasks, in the order given, and without the
   experts marked 1 in drop (L, N); NULL drops none. Names and numbers of the others stay. A token
   whose expert is dropped goes to the best remaining one of the layer, with that one's own
   probability; all other tokens are computed as before, bit for bit (moe_config.pruned). The new
   model can do all that others can, training included. MOE_E_ARGUMENT: a task out of range or
   listed twice; a layer would keep fewer than k experts; drop without gates or with blocks as
   experts. MOE_E_UNSUPPORTED: the model is int8. */
MOE_API moe_status moe_model_extract(moe_model **out, const moe_model *model, const int32_t *tasks,
                                     int32_t n, const uint8_t *drop, const moe_env *env);

#ifndef MOE_NO_STDIO
/* Reads a whole file or pipe: *data, which moe_free frees, and *bytes. A zero byte follows the data
   and is not counted. MOE_E_IO, MOE_E_MEMORY. */
MOE_API moe_status moe_file_read(void **data, size_t *bytes, const char *path, const moe_env *env);
/* Frees the data of moe_file_read. NULL is fine. */
MOE_API void moe_free(void *data);
/* Replaces the file at `path` by what `write` writes: first into a temporary file beside it
   (PATH.tmp, or PATH.tmp1 to PATH.tmp15 while others write the same path), which is flushed to the
   disk and then renamed. A crash or a full disk never costs the old file, and of several writers
   the last one to end wins. The next writer removes temporary files of writers that were killed.
   A symbolic link is replaced, not followed; a pipe, a device and what the program has open
   (/dev/stdout, /dev/fd/N) are written to directly. */
MOE_API moe_status moe_file_replace(const char *path,
                                    moe_status (*write)(void *user, const moe_writer *writer,
                                                        const moe_env *env),
                                    void *user, const moe_env *env);
/* Keeps a second program, or a second thread, from working on the same file: a training run holds
   the lock of its checkpoint, since two runs that replace it in turn lose each other's steps. The
   lock is the empty file PATH.lock; moe_file_unlock removes it, and that of a program that was
   killed is no obstacle. Nobody is kept from reading or replacing PATH itself. MOE_E_IO: somebody
   holds it, or PATH.lock cannot be created. A pipe or a device has no lock: MOE_OK. */
typedef struct moe_lock moe_lock;
MOE_API moe_status moe_file_lock(moe_lock **out, const char *path, const moe_env *env);
/* Gives the lock back. Accepts NULL. */
MOE_API void moe_file_unlock(moe_lock *lock);
/* Loads a model file onto the heap, packed and ready to train or to run. The model keeps the bytes
   read: weights and packed weights are all that it takes. Other files than moe_model_write's, and
   checkpoints, take room for a copy meanwhile. */
MOE_API moe_status moe_model_load(moe_model **out, const char *path, const moe_env *env);
/* Opens a model file in place: the system maps it and reads what a pass needs, once for all
   programs. Weights are not checked, cannot be trained and are not packed: the first answer comes
   sooner, many tokens take longer (moe_model_pack). A file that is replaced (moe_file_replace)
   keeps its old content here. If a program cuts it short in place, the next pass raises SIGBUS;
   Windows prevents this. What cannot be mapped or used in place (a pipe, another order of tensors,
   a big-endian machine) is loaded by moe_model_load. */
MOE_API moe_status moe_model_map(moe_model **out, const char *path, const moe_env *env);
/* Saves it, replacing the old file safely. */
MOE_API moe_status moe_model_save(const moe_model *model, const char *path, const moe_env *env);
#endif

/* ---- activations and the forward pass ---- >>api_context */

/* The activations and scratch of one pass at a time, for batches within `limits`. The model must
   outlive it. */
typedef struct moe_context moe_context;

/* Set it to zeros first: later versions may add fields. */
typedef struct moe_limits {
  int32_t tokens, sequences; /* the largest batch */
  int32_t training;          /* 1: keep what backward needs */
  int32_t keep_layers;       /* 1: keep what moe_context_layer and moe_context_gate_logits return;
                                training keeps it anyway */
} moe_limits;

/* Exact bytes of the block, for passes with at most env->threads threads. */
MOE_API moe_status moe_context_size(const moe_model *model, const moe_limits *limits, size_t *bytes,
                                    const moe_env *env);
/* A context in a block of the caller's (64-byte aligned). */
MOE_API moe_status moe_context_init(moe_context **out, void *block, size_t bytes,
                                    const moe_model *model, const moe_limits *limits,
                                    const moe_env *env);
/* The same on the heap. */
MOE_API moe_status moe_context_create(moe_context **out, const moe_model *model,
                                      const moe_limits *limits, const moe_env *env);
/* Accepts NULL, and a context in a block of the caller's. */
MOE_API void moe_context_free(moe_context *context);

/* Checks a batch: MOE_OK, or MOE_E_ARGUMENT and a sentence that names the wrong sequence or token.
   with_labels 1: labels are checked too; the label of a regression must be between low and high of
   its task. Every pass calls it. */
MOE_API moe_status moe_batch_check(const moe_model *model, const moe_batch *batch, int with_labels,
                                   const moe_env *env);

/* Scores of every sequence: scores (S, moe_model_max_classes); a row holds the C logits of its task
   (regression: one value), then zeros. No dropout, no jitter. Weights are not checked for NaN or
   infinity: a bad weight gives bad scores and MOE_OK. Functions that read files and
   moe_trainer_step reject such weights, and moe_predict_ functions check the scores. */
MOE_API moe_status moe_forward(moe_context *context, float *scores, const moe_batch *batch,
                               const moe_env *env);
/* Final hidden states (M, H) of the last pass. */
MOE_API const float *moe_context_hidden(const moe_context *context);
/* Hidden states (M, H) of the last pass after layer 0 .. L-1, or after the embeddings (-1). NULL:
   no such layer, or not kept (moe_limits.keep_layers; the last layer is always kept). */
MOE_API const float *moe_context_layer(const moe_context *context, int32_t layer);
/* Logits (M, N) of the gate of a layer in the last pass [TaG] Eq. 3; those of masked experts
   (moe_context_mask) are -3.4e38. NULL: no such layer, no gates, one expert only, or not kept
   (moe_limits.keep_layers). */
MOE_API const float *moe_context_gate_logits(const moe_context *context, int32_t layer);
/* The routes of the last pass in a layer: pointers into the context. Dense: k = 1, all tokens go to
   expert 0. Blocks as experts: k = 1, the block of the largest weight; `weight` holds that weight,
   `prob` the weights of all blocks. MOE_E_ARGUMENT: no such layer. */
MOE_API moe_status moe_context_routes(const moe_context *context, int32_t layer, moe_routes *out);
/* The following passes use these experts in every layer: (L, M, k), an array that the caller keeps;
   NULL: the gates decide again. A pass returns MOE_E_ARGUMENT if a token has an expert that does
   not exist, or the same expert twice. Models without gates ignore it. */
MOE_API void moe_context_force(moe_context *context, const int32_t *experts);
/* The following passes ignore the experts marked 1: (L, N), an array that the caller keeps; NULL:
   all experts take part again. The softmax of a gate then runs over the others
   (moe_route_options.masked), so that their weights sum to 1. A pass returns MOE_E_ARGUMENT if a
   layer keeps fewer than k. Routes that are forced, or fixed by moe_context_task_router, ignore it.
   It also works on blocks as experts. */
MOE_API void moe_context_mask(moe_context *context, const uint8_t *experts);

/* Where the tokens of each task went: sums over any number of passes. The caller provides the
   arrays and clears them first. Counting costs time only in moe_route_count. */
typedef struct moe_route_sums {
  int64_t *tokens; /* (T) tokens of a task */
  int64_t *chosen; /* (T, L, N) choices of an expert: over N they sum to k tokens. chosen / (k
                      tokens) is the expert's share */
  double *gate;    /* (T, L, N) sum of the probability of an expert over the tokens that chose it:
                      gate / chosen is its mean g* [TaG] Eq. 5, before any gate scale. NULL: not
                      counted */
  double *prob;    /* (T, L, N) sum of the probability of an expert over all tokens [TaG] Eq. 4.
                      NULL: not counted */
} moe_route_sums;
/* Adds the routes of the context's last pass, which must have run on this batch. MOE_E_ARGUMENT:
   the batch does not fit that pass. */
MOE_API moe_status moe_route_count(moe_route_sums *sums, const moe_context *context,
                                   const moe_batch *batch, const moe_env *env);

/* Task-level routing by the caller [TL]. The arrays must outlive the passes and may change between
   them. */
typedef struct moe_task_router {
  const float *routes; /* (T, L, m) fixed weights of the blocks, 0 to 1e6, at least one above 0 for
                          each task and layer. No router takes part; blocks of weight 0 are not
                          computed. NULL: a router decides */
  const float *scores; /* (T, L, m) scores of a router of the caller's (an LSTM, for example) in
                          place of the model's own; NULL: the model's */
  float *dscores;      /* (T, L, m) moe_trainer_accumulate adds the gradients of `scores`; the
                          caller clears it. NULL: not computed */
  const float *gumbel; /* (S, L, m) noise G of MOE_SELECT_GUMBEL and MOE_SELECT_STRAIGHT in
                          training, for each sequence of the batch; NULL: drawn from the trainer's
                          seed */
} moe_task_router;
#ifndef MOE_NO_TASK_ROUTER
/* The following passes use these; NULL: the model's own again. MOE_E_ARGUMENT for a model whose
   experts are not blocks. Every pass checks the values. */
MOE_API moe_status moe_context_task_router(moe_context *context, const moe_task_router *router,
                                           const moe_env *env);
/* The choice of the model's own router: routes (T, L, m) is softmax(z / tau), or with tau 0 the
   most probable block (1, the others 0). MOE_E_ARGUMENT for a model without MOE_ROUTER_TASK_LEVEL,
   or tau below 0. */
MOE_API moe_status moe_task_router_routes(float *routes, const moe_model *model, float tau,
                                          const moe_env *env);
/* out = (1 - share) / m + share routes, for `rows` rows of m: from the average (share 0) to the
   routes (1), [TL]'s second stage. out may be routes. */
MOE_API void moe_task_router_blend(float *out, const float *routes, float share, size_t rows,
                                   int32_t m);
#endif

/* ---- computing elsewhere ---- >>api_backend */

typedef enum moe_memory { MOE_MEMORY_HOST, MOE_MEMORY_DEVICE } moe_memory;

/* A table of functions (slots) that compute in place of the CPU: env.backend. There are two kinds:

     HOST    Pointers are host memory. Any slot may be NULL, or return MOE_E_UNSUPPORTED: the CPU
             then does that call. A slot is called from env.threads threads at once and should
             start no threads. A BLAS fills only sgemm (examples/blas.c).
     DEVICE  Arrays are device memory, allocated by `alloc`. moe.h never reads or writes them, but
             moves them by upload and download. `supports` is called once for a context and accepts
             all ops or none, so that nothing is copied back and forth. Every slot except sgemm,
             takes and changed must be set.

   On a DEVICE:
     Structs    An op is a struct in host memory. So are moe_routes, moe_route_options, the arrays
                of moe_experts_op that hold pointers or moe_mat, and tasks and head of moe_heads_op.
                Every other array they point to is device memory. Matrices are float rows.
     Weights    moe_model_pack uploads them: call it before creating a context (loading a model and
                moe_trainer_create pack by themselves). After a trainer's first step the device has
                the newer weights. Functions that read a model's weights (saving, checkpoints,
                quantize, adapt, extract, moe_model_weights) download them first, and so does
                moe_trainer_free.
     Traffic    A pass uploads one block (ids, seq_start, tasks, keys) and downloads scores or
                losses; a step downloads one double. moe_context_hidden and similar functions
                download what they return.
     Order      Calls of one context run in order on its stream. Only download, sync and grad_norm
                wait.
     Errors     A slot returns errors that it detects at once. A failure of the device is sticky:
                the next call that waits returns it, with a sentence to env.log. The context can
                then only be freed; the host's weights are those of the last download, whole, and
                a trainer's sentence says after which step that was. Once the trainer is freed,
                training can go on from them, on the CPU too.
     Refused    Blocks as experts, gates made of task vectors and int8 models: the CPU alone
                computes them. Gradients stay on the device: moe_trainer_gradients returns NULL.
   The backend determines the bits of a result. They do not depend on the number of threads if each
   slot gives the same result each time. */
#define MOE_BACKEND_ABI 2

/* C (m, n) = A (m, k) B (k, n), or C += A B where accumulate is 1. (i, p) of A = a[i a_row + p
   a_col], (p, j) of B = b[p b_row + j b_col], (i, j) of C = c[i c_row + j]; one stride of A is 1,
   and one of B. */
typedef struct moe_sgemm {
  int32_t m, n, k;
  const float *a;
  size_t a_row, a_col;
  const float *b;
  size_t b_row, b_col;
  int32_t accumulate;
  float *c;
  size_t c_row;
} moe_sgemm;

struct moe_heads_op;
struct moe_adam_op;
struct moe_backend {
  uint32_t abi;      /* MOE_BACKEND_ABI; a table with another number is not used */
  uint32_t bytes;    /* sizeof(moe_backend): slots beyond it count as NULL */
  moe_memory memory; /* the kind */
  const char *name;  /* for moe_backend_name: "blis", "cuda:0 (...)" */
  void *user;
  /* HOST. A product of float matrices. The built-in kernels keep attention and products with int8
     weights, with fewer than 16 outputs, with a side under 8, or with fewer than 2^18
     multiply-adds. */
  void (*sgemm)(void *user, const moe_sgemm *product);
  /* HOST. 1: the backend takes a whole product of this size. 0: the built-in kernels take it, with
     packed weights if packed is 1. NULL: always 1. */
  int32_t (*takes)(void *user, int32_t m, int32_t n, int32_t k, int32_t packed);
  /* DEVICE. 1: contexts of this model and these limits work on this device, in env.precision. 0:
     they do not, and a sentence to env.log says why. */
  int32_t (*supports)(const moe_backend *b, const moe_env *env, const moe_config *config,
                      const moe_limits *limits);
  moe_status (*open)(const moe_backend *b, const moe_env *env, void **stream); /* of a context */
  void (*close)(const moe_backend *b, void *stream);
  moe_status (*alloc)(const moe_backend *b, const moe_env *env, void **out, size_t bytes);
  void (*release)(const moe_backend *b, void *p);
  moe_status (*upload)(const moe_backend *b, const moe_env *env, void *to, const void *host,
                       size_t bytes); /* `host` may change after the call */
  /* Waits. On failure `host` is unchanged: all or nothing is copied. */
  moe_status (*download)(const moe_backend *b, const moe_env *env, void *host, const void *from,
                         size_t bytes);
  moe_status (*clear)(const moe_backend *b, const moe_env *env, void *p, size_t bytes); /* zeros */
  moe_status (*sync)(const moe_backend *b, const moe_env *env);                         /* waits */
  /* These weights have changed: updates copies that the backend keeps, packed or of lower
     precision. */
  void (*changed)(const moe_backend *b, const moe_env *env, const float *w, size_t count);
  /* Ops: env.stream is the queue, env.precision that of products. back 1: backward. */
  moe_status (*linear)(const moe_backend *b, const moe_env *env, const moe_linear_op *op, int back);
  moe_status (*layernorm)(const moe_backend *b, const moe_env *env, const moe_layernorm_op *op,
                          int back);
  moe_status (*dropout)(const moe_backend *b, const moe_env *env, const moe_dropout_op *op);
  moe_status (*embed)(const moe_backend *b, const moe_env *env, const moe_embed_op *op, int back);
  moe_status (*attention)(const moe_backend *b, const moe_env *env, const moe_attention_op *op,
                          int back);
  moe_status (*route)(const moe_backend *b, const moe_env *env, const moe_route_op *op, int back);
  moe_status (*experts)(const moe_backend *b, const moe_env *env, const moe_experts_op *op,
                        int back);
  moe_status (*heads)(const moe_backend *b, const moe_env *env, const struct moe_heads_op *op,
                      int back);
  /* Norm of the gradients g of all n spans, without those of lr_scale 0 (frozen). Waits. */
  moe_status (*grad_norm)(const moe_backend *b, const moe_env *env, double *norm,
                          const struct moe_adam_op *spans, int32_t n);
  /* A step of Adam on each of n spans (lr_scale 0: w stays); sets g to zero. */
  moe_status (*adam)(const moe_backend *b, const moe_env *env, const struct moe_adam_op *spans,
                     int32_t n);
  /* DEVICE. Trainers download the weights after every n-th step, so that a failure of the device
     costs n steps at most. 0: weights are downloaded only when the host reads them. */
  int32_t mirror;
};
/* An empty table of kind HOST: abi, bytes and memory are set, every slot is NULL. */
MOE_API void moe_backend_init(moe_backend *backend);
/* Name of the backend that computes large matrix products, or everything: env->backend->name, or
   "built-in". */
MOE_API const char *moe_backend_name(const moe_env *env);

#ifndef MOE_NO_TRAIN
/* ---- trainer, optimizer, sampler ---- >>api_train */

/* Scales the learning rate and the decay of the tensors whose name contains `match`. If several
   groups match, the last one counts. */
typedef struct moe_param_group {
  const char *match;
  float lr_scale;    /* factor of the learning rate; 0 freezes the tensors, and the norm excludes
                        their gradients */
  float decay_scale; /* factor of the weight decay */
} moe_param_group;

/* For several processes that train one model, each on parts of every batch: a process keeps the
   moments of a range of the weights and steps that alone [ZeRO, Rajbhandari et al. 2020, stage 1].
   The ranges of all processes make up the whole. Before moe_trainer_step the caller adds up the
   gradients, as far as the range needs them. Then all call it, and moe_checkpoint_write, at the
   same points, where these functions exchange what is needed; their failures are the caller's. */
typedef struct moe_share {
  size_t first, count;                    /* floats, in the layout of the weights */
  void *user;                             /* first argument of: */
  double (*sum)(void *user, double mine); /* over all processes, the same bits in each */
  /* Fetches into weights (n) what the others have stepped; the own range is new. */
  void (*weights)(void *user, float *weights, size_t n);
  /* Gathers a moment from the ranges of all, mine (count), into all (n) of the process that writes;
     NULL in the others. */
  void (*moments)(void *user, const float *mine, float *all, size_t n);
} moe_share;

typedef struct moe_train_config {
  float lr;      /* peak learning rate, usually below 1e-3 */
  float warmup;  /* fraction of `steps`, 0 .. 1: W = floor(warmup steps); the rate of step t (from
                    1) is lr t/W up to step W, then lr (steps-t+1)/(steps-W) */
  int64_t steps; /* after the last one moe_trainer_step returns MOE_E_ARGUMENT */
  /* The rate of step t (from 1), 0 or more, in place of lr and warmup; NULL: lr and warmup. The
     same t must always give the same rate; otherwise use moe_trainer_set_lr. */
  float (*lr_schedule)(void *user, int64_t t);
  void *lr_user;           /* first argument of lr_schedule */
  float beta1, beta2, eps; /* of Adam: 0.9, 0.999, 1e-8 [TaG] A.3.2 */
  float weight_decay;      /* decoupled, of matrices (not of biases and LayerNorms); 0 = off */
  float clip_norm;         /* gradients times min(1, clip_norm / (norm + 1e-6)); 0 = off */
  float dropout;           /* 0.1 [TaG] 4.4 */
  /* See moe_route_options; 0 = off. PAPER-DIFF where on: [TaG] A.3.2 found balance loss and jitter
     to hurt, and has no z-loss. */
  float balance, z_loss, jitter;
  /* Temperature of MOE_ROUTER_TASK_LEVEL: max(tau_end, tau_start exp(-tau_rate step)). 2 and 0.1 as
     in the code of [TL]'s authors, where tau_rate is 0.0003; 0 (default): the rate that reaches
     tau_end with the last step. */
  float tau_start, tau_end, tau_rate;
  uint64_t seed;
  const moe_param_group *groups; /* must outlive the trainer */
  int32_t n_groups;
  const moe_share *share; /* NULL: this process steps all weights; must outlive the trainer */
  /* moe_trainer_accumulate calls it each time backward is done with a range of the gradients (in
     floats): the layers, from the last to the first, then all that precedes them, then all that
     follows them. Each call of moe_trainer_accumulate, even for an empty batch, reports every
     gradient once, in the same ranges and order, so that several processes can add up a layer's
     gradients while backward goes on. NULL: no calls. Not on a DEVICE. */
  void (*ready)(void *user, size_t first, size_t count);
  void *ready_user; /* first argument of ready */
} moe_train_config;
/* [TaG]'s values (4.4, A.3.2); from its grids lr 5e-5 and warmup 0.1. The caller sets `steps`. */
MOE_API void moe_train_config_init(moe_train_config *config);

typedef struct moe_trainer moe_trainer;
/* A trainer holds gradients and moments (3 x parameters) and a training context. The model must
   outlive it. _create also packs the model (moe_model_pack) if it is not packed, and packs a bf16
   model a second time for gradients; _init leaves packing to the caller. */
MOE_API moe_status moe_trainer_size(const moe_model *model, const moe_limits *limits,
                                    const moe_train_config *config, size_t *bytes,
                                    const moe_env *env);
MOE_API moe_status moe_trainer_init(moe_trainer **out, void *block, size_t bytes, moe_model *model,
                                    const moe_limits *limits, const moe_train_config *config,
                                    const moe_env *env);
MOE_API moe_status moe_trainer_create(moe_trainer **out, moe_model *model, const moe_limits *limits,
                                      const moe_train_config *config, const moe_env *env);
MOE_API void moe_trainer_free(moe_trainer *trainer);

/* Forward and backward of a micro-batch: gradients += d(sum of the losses / batch_size)/dw, where
   batch_size is the number of sequences of the whole batch, of all its micro-batches together (0:
   batch->S, one micro-batch). PAPER-DIFF: a mean, where Eq. 9 and 10 are sums. *loss (may be NULL)
   receives the sum of the losses / batch_size, auxiliary losses included; losses (S, may be NULL)
   the scaled loss of each sequence. MOE_E_NONFINITE: a loss was not finite; the gradients are then
   cleared.
   A batch may be divided into micro-batches, in order and with the sequences' numbers in
   batch->index. The division changes no bit of the gradients, with two exceptions. Balance loss and
   z-loss are means over the tokens of a micro-batch, weighted by its share of the sequences,
   S / batch_size: they depend on the division. The gradients of task vectors and gate matrices of
   MOE_ROUTER_EMBEDDING differ in their last bits, since each micro-batch adds a finished sum. */
MOE_API moe_status moe_trainer_accumulate(moe_trainer *trainer, const moe_batch *batch,
                                          int32_t batch_size, float *loss, float *losses,
                                          const moe_env *env);
/* Clips, takes one step of Adam, clears the gradients and packs the weights again. *norm (may be
   NULL): the gradient's norm before clipping. MOE_E_NONFINITE: weights and moments are unchanged,
   the gradients are cleared. MOE_E_ARGUMENT: all steps are done, or lr_schedule returned a negative
   rate or NaN; nothing is changed. */
MOE_API moe_status moe_trainer_step(moe_trainer *trainer, float *norm, const moe_env *env);
/* Learning rate that the configuration gives step t, counted from 1. */
MOE_API float moe_train_lr(const moe_train_config *config, int64_t t);
/* Sets the learning rate of the next step and of those after it, until it is set again; below 0:
   the configuration's rates again. Checkpoints keep it. MOE_E_ARGUMENT: not a finite number. */
MOE_API moe_status moe_trainer_set_lr(moe_trainer *trainer, float lr, const moe_env *env);
/* The learning rate of the next step. */
MOE_API float moe_trainer_lr(const moe_trainer *trainer);
/* Temperature of task-level routing after t steps. */
MOE_API float moe_train_tau(const moe_train_config *config, int64_t t);
/* The gradients accumulated since the last step: moe_model_parameters floats, in the layout of the
   weights. */
MOE_API float *moe_trainer_gradients(moe_trainer *trainer);
/* The context of its passes, to read hidden states and routes of the last one or to force routes.
 */
MOE_API moe_context *moe_trainer_context(moe_trainer *trainer);
/* Steps so far. */
MOE_API int64_t moe_trainer_steps_done(const moe_trainer *trainer);
/* Largest error of `samples` (1 or more) gradients against central differences (fourth order, steps
   of 1/128), relative to the norm of the tensor's gradient or, if larger, a hundredth of the whole
   gradient's norm. Samples alternate between tensors; each tensor's largest gradient comes first.
   Routes and dropout are fixed during the check, and all is fp32, whatever env.precision says. A
   debugging tool: slow, allocates memory for the routes, and as exact as float allows (about 1e-3
   where the loss is smooth). Afterwards the weights are as before and the gradients cleared.
   MOE_SELECT_STRAIGHT cannot be checked: by design its gradient is not the slope of its loss. */
MOE_API moe_status moe_gradcheck(moe_trainer *trainer, const moe_batch *batch, int32_t samples,
                                 float *error, const moe_env *env);

/* The optimizer by itself, for arrays of your own. */

/* The 2-norm of n gradients; infinity or NaN if one is infinite, NaN or above 1e18. */
MOE_API double moe_gradient_norm(const float *g, size_t n, const moe_env *env);
/* One step of Adam [TaG] 4.4 on weights that share their settings. With d = factor g and
   rate = lr lr_scale:
     m = beta1 m + (1 - beta1) d,  m' = m / (1 - beta1^t),
     v = beta2 v + (1 - beta2) d^2,  v' = v / (1 - beta2^t),
     w = (1 - rate weight_decay) w - rate m' / (sqrt(v') + eps),  g = 0. */
typedef struct moe_adam_op {
  float *w, *g, *m, *v; /* (count) weights, gradients, moments; m and v are 0 before step 1 */
  size_t count;
  int64_t t;              /* number of the step, from 1 */
  float lr, weight_decay; /* _init: 5e-5 and 0 */
  float lr_scale;         /* as in moe_param_group; 0: only g is cleared; _init: 1 */
  float factor;           /* of the gradients, for clipping; _init: 1 */
  float beta1, beta2;     /* decimals of at most 7 digits; _init: 0.9 and 0.999 */
  float eps;              /* _init: 1e-8 */
} moe_adam_op;
MOE_API void moe_adam_op_init(moe_adam_op *op);
/* MOE_E_ARGUMENT: t is below 1, or a beta is not from 0 to below 1. */
MOE_API moe_status moe_adam_step(const moe_adam_op *op, const moe_env *env);

/* Which row of which task comes next [TaG] 3.3, A.1.2. */
typedef enum moe_sampling {
  MOE_SAMPLING_NATURAL, /* p_t ~ rows of t: every row once an epoch, the rows of all tasks shuffled
                           together. PAPER-DIFF: [TaG] 3.3 draws batches of a task and joins them,
                           here each row is drawn */
  MOE_SAMPLING_UNIFORM, /* p_t the same for every task */
  MOE_SAMPLING_TEMPERATURE,    /* p_t ~ rows^(1/tau) */
  MOE_SAMPLING_UNIFORM_NATURAL /* uniform in the first half of the draws, then natural */
} moe_sampling;
typedef struct moe_sampler_config {
  moe_sampling sampling;
  float tau;        /* > 0, for MOE_SAMPLING_TEMPERATURE */
  int32_t in_order; /* 1: rows in file order, task after task, not shuffled (natural only) */
  uint64_t seed;
  int64_t draws; /* number of draws of the whole run, for MOE_SAMPLING_UNIFORM_NATURAL */
  /* 0: each draw chooses its own task (heterogeneous batches). B > 0: B draws in a row are from one
     task (homogeneous batches of B [TL] 4). Natural sampling then draws a task by its size, and
     draws each of its rows once before any row again. */
  int32_t run;
} moe_sampler_config;
/* The whole state of sampling, which may be copied or saved as it is. */
typedef struct moe_sampler {
  moe_sampler_config config;
  int32_t T;
  const int64_t *rows; /* (T) rows of each task, an array of the caller */
  int64_t total, drawn;
  int64_t *used; /* (T) rows drawn of each task so far, an array of the caller */
} moe_sampler;
/* Tasks with 0 rows are never drawn; MOE_E_ARGUMENT if all are empty. */
MOE_API moe_status moe_sampler_init(moe_sampler *sampler, const moe_sampler_config *config,
                                    const int64_t *rows, int64_t *used, int32_t T,
                                    const moe_env *env);
/* The next (task, row). */
MOE_API void moe_sampler_next(moe_sampler *sampler, int32_t *task, int64_t *row);

/* Writes a checkpoint: the model file plus moments, step, the rate of moe_trainer_set_lr, the
   sampler's state (sampler may be NULL), and `note`, a text of the caller's (for example its
   options; NULL: none). Write it between steps: it does not hold accumulated gradients. After _read
   the next step has the same bits as without the interruption. MOE_E_IO; MOE_E_NONFINITE as for a
   model. Of several processes (moe_share) one has a writer, which needs memory for all moments; the
   others call this with writer NULL. The file is that of a process alone. */
MOE_API moe_status moe_checkpoint_write(const moe_trainer *trainer, const moe_sampler *sampler,
                                        const char *note, const moe_writer *writer,
                                        const moe_env *env);
/* Restores weights, moments, step, rate and sampler. The trainer must have the same configuration,
   tasks and vocabulary, the sampler the same settings and rows (NULL: its state is skipped).
   Gradients are cleared. MOE_E_FORMAT with a sentence that says what differs; nothing is then
   changed. The file does not hold the training configuration (including lr_schedule): the caller
   sets it as before, for example from the note. */
MOE_API moe_status moe_checkpoint_read(moe_trainer *trainer, moe_sampler *sampler, const void *file,
                                       size_t bytes, const moe_env *env);
/* Copies the note into text (capacity bytes, zero-terminated); *length is its full length. With
   capacity 0 only the length is returned. */
MOE_API moe_status moe_checkpoint_note(char *text, size_t capacity, size_t *length,
                                       const void *file, size_t bytes, const moe_env *env);
#ifndef MOE_NO_STDIO
/* The same to and from a file. _save replaces it safely (moe_file_replace). */
MOE_API moe_status moe_checkpoint_save(const moe_trainer *trainer, const moe_sampler *sampler,
                                       const char *note, const char *path, const moe_env *env);
MOE_API moe_status moe_checkpoint_load(moe_trainer *trainer, moe_sampler *sampler, const char *path,
                                       const moe_env *env);
#endif
#endif /* MOE_NO_TRAIN */

/* ---- tokenizer, metrics, prediction from text ---- >>api_text */

typedef struct moe_tokenizer moe_tokenizer;
#ifndef MOE_NO_TEXT
/* BERT's WordPiece, cased or not. It gives the same ids as Hugging Face `tokenizers` (>>text). */
/* Exact bytes of the block. vocab: one word a line, UTF-8. The id is the number of the line, from
   0. White space at the end of a line is stripped; of equal lines the last one counts.
   MOE_E_FORMAT: more than 2^24 - 2 lines or 2^32 - 1 bytes. */
MOE_API moe_status moe_tokenizer_size(const char *vocab, size_t vocab_bytes, size_t *bytes,
                                      const moe_env *env);
/* A tokenizer in a block (64-byte aligned) of at least that size. It keeps a pointer to vocab,
   which must outlive it. flags: moe_text_flags; 0 is bert-base-uncased, 1 (MOE_TEXT_CASED)
   bert-base-cased. The time is at most n log n in the bytes of vocab, for any content.
   MOE_E_FORMAT: [UNK], [CLS] or [SEP] is missing, or a line is not UTF-8 or has unknown marks. */
MOE_API moe_status moe_tokenizer_init(moe_tokenizer **out, void *block, size_t bytes,
                                      const char *vocab, size_t vocab_bytes, int flags,
                                      const moe_env *env);
/* The same on the heap. */
MOE_API moe_status moe_tokenizer_create(moe_tokenizer **out, const char *vocab, size_t vocab_bytes,
                                        int flags, const moe_env *env);
/* Accepts NULL, and a tokenizer in a block of the caller's. */
MOE_API void moe_tokenizer_free(moe_tokenizer *tokenizer);
/* Number of lines of the vocabulary; every id is less than that. */
MOE_API int32_t moe_tokenizer_words(const moe_tokenizer *tokenizer);

/* Where moe_encode writes: arrays of the caller, `capacity` long; segments, begin and end may be
   NULL. */
typedef struct moe_tokens {
  int32_t *ids;
  uint8_t *segments;    /* 0: [CLS] a [SEP]; 1: b [SEP] */
  int32_t *begin, *end; /* half-open range of a piece in its text, in code points from 0; -1 for the
                           [CLS] and [SEP] that moe_encode adds */
  int32_t capacity, count;
} moe_tokens;
/* One text (b NULL) or a pair. Any bytes are allowed. */
typedef struct moe_text {
  const char *a, *b;
  size_t a_bytes, b_bytes;
} moe_text;
/* A moe_text of zero-terminated strings; b may be NULL. */
MOE_API moe_text moe_text_of(const char *a, const char *b);
/* Writes [CLS] a [SEP], or [CLS] a [SEP] b [SEP], in at most max_len tokens (at least 2 or 3, at
   most out->capacity). A text may have any length (at most 2^31 - 1 bytes if begin or end is
   given). Invalid UTF-8 becomes U+FFFD and is not an error. Special tokens written in a text
   ("[MASK]", in capitals) become those tokens. Nothing is allocated; memory (3 KB of stack) does
   not grow with the text.
   Longer inputs are truncated to R = max_len - 2 or - 3 tokens of text. A single text keeps its
   first R. MOE_TRUNCATE_LONGEST shortens the longer text of a pair until the pair fits or both are
   equally long, then both: each keeps R/2 tokens, and an odd token goes to the longer text, or to b
   if they are equally long (Hugging Face's longest_first; BERT's own code gives the odd one to a).
   MOE_TRUNCATE_RIGHT keeps the first R tokens of a followed by b, and all three special tokens. */
MOE_API moe_status moe_encode(const moe_tokenizer *tokenizer, moe_tokens *out, const moe_text *text,
                              int32_t max_len, moe_truncate how, const moe_env *env);
#endif

/* From logits to answers: the rules that every program shares. Logits must be finite; row i begins
   at logits + i stride (moe_forward: stride is moe_model_max_classes). */
/* The winner among n choices of one question: the choice with the largest logit of class 1, the
   first of equals [TaG] A.3.1; -1 if n is 0. */
MOE_API int32_t moe_rank_best(const float *logits, int32_t stride, int32_t n);
/* answer (n): the class with the largest logit, the lowest of equals; the value of a regression; in
   a ranking 1 for the row that wins its group by the rule of moe_rank_best, and 0 for the others.
   group and winner are for rankings only, else NULL: group (n) numbers the question of each row,
   0 .. n-1, in any order; winner (n) receives the row that wins each group, -1 if a group has no
   row. MOE_E_ARGUMENT: a group is out of range, or a ranking has group or winner NULL. */
MOE_API moe_status moe_answers(float *answer, const moe_task *task, const float *logits,
                               int32_t stride, int32_t n, const int32_t *group, int32_t *winner,
                               const moe_env *env);

/* Metrics [TaG] 4.5, A.3.1 over n rows, as scikit-learn and scipy compute them. *defined (may be
   NULL) is 1, or 0 if the metric is undefined (no rows, one class only, constant input, NaN): the
   function then returns 0. Classes are 0 .. classes-1; a number outside counts as wrong and belongs
   to none of them. The time grows with n times classes. */
/* Share of the rows whose prediction is right. */
MOE_API double moe_metric_accuracy(const int32_t *predicted, const int32_t *label, size_t n,
                                   int *defined);
/* F1 of class 1 against all others. Undefined: class 1 is never predicted and never right. */
MOE_API double moe_metric_f1(const int32_t *predicted, const int32_t *label, size_t n,
                             int *defined);
/* Mean F1 of the classes that are predicted or right in some row. */
MOE_API double moe_metric_macro_f1(const int32_t *predicted, const int32_t *label, size_t n,
                                   int32_t classes, int *defined);
/* Matthews' correlation coefficient; for more than two classes R_K. Undefined: all predictions are
   one class, or all labels are. */
MOE_API double moe_metric_matthews(const int32_t *predicted, const int32_t *label, size_t n,
                                   int32_t classes, int *defined);
/* Correlation. Undefined: constant, infinite or NaN on either side. */
MOE_API double moe_metric_pearson(const float *predicted, const float *label, size_t n,
                                  int *defined);
/* Correlation of the ranks; ties get their mean rank. scratch: 2n floats. Infinities are ranked
   like other values. */
MOE_API double moe_metric_spearman(const float *predicted, const float *label, size_t n,
                                   float *scratch, int *defined);
/* Accuracy of a ranking: the share of the groups whose winner is right. answer comes from
   moe_answers; label is 1 for the right choice of a group. Undefined: no row has won. */
MOE_API double moe_metric_ranking(const float *answer, const float *label, size_t n, int *defined);

/* Writes the name of a task's metric number `index` (from 0) to name and returns 1, or returns 0 if
   its list is shorter. Number 0 is the main metric. An empty list means accuracy, or
   pearson,spearman. */
MOE_API int moe_metric_name(char name[MOE_NAME_BYTES], const moe_task *task, int32_t index);
/* The metric of that name over n answers (moe_answers) and labels; accuracy of a ranking is
   moe_metric_ranking. scratch: 2n floats for spearman, else it may be NULL. Also undefined if the
   task's kind has no metric of that name. */
MOE_API double moe_metric(const char *name, const moe_task *task, const float *answer,
                          const float *label, size_t n, float *scratch, int *defined);
/* The mean of the metrics value (T) over tasks with at most most_rows training rows (T); rows NULL:
   over all tasks. The paper's "small" tasks have at most MOE_SMALL_ROWS [TaG] 4.5. Undefined: there
   is no such task. */
#define MOE_SMALL_ROWS 10000
MOE_API double moe_metric_average(const double *value, const int64_t *rows, int64_t most_rows,
                                  int32_t T, int *defined);

#if !defined(MOE_NO_TEXT)
/* For moe_batch.span: the tokens [span[0], span[1]) of an encoded input that overlap the characters
   (code points) [begin, end) of its first (text 0) or second text (1). tokens must have begin, end
   and, for a second text, segments. MOE_E_ARGUMENT: no token overlaps them. */
MOE_API moe_status moe_tokens_span(int32_t span[2], const moe_tokens *tokens, int32_t text,
                                   int32_t begin, int32_t end, const moe_env *env);
#endif

/* A model with a context and, unless it reads features, its tokenizer: texts or features in, scores
   or embeddings out. The model and its vocabulary must outlive it. */
typedef struct moe_predictor moe_predictor;
/* Exact bytes for `batch` inputs at once. MOE_E_FORMAT if the model reads texts and has no
   vocabulary; MOE_E_UNSUPPORTED if it reads texts and this build has MOE_NO_TEXT. */
MOE_API moe_status moe_predictor_size(const moe_model *model, int32_t batch, size_t *bytes,
                                      const moe_env *env);
/* A predictor in a block of the caller's (64-byte aligned). *env is copied. MOE_E_FORMAT: the
   vocabulary has more words than the model has embeddings, or cannot be read. */
MOE_API moe_status moe_predictor_init(moe_predictor **out, void *block, size_t bytes,
                                      const moe_model *model, int32_t batch, const moe_env *env);
/* The same on the heap. */
MOE_API moe_status moe_predictor_create(moe_predictor **out, const moe_model *model, int32_t batch,
                                        const moe_env *env);
/* Accepts NULL, and a predictor in a block of the caller's. */
MOE_API void moe_predictor_free(moe_predictor *predictor);
/* What moe_predict_ functions return as scores. */
typedef enum moe_output {
  MOE_OUTPUT_PROBABILITIES, /* softmax of the logits [TaG] Eq. 7 (default) */
  MOE_OUTPUT_LOGITS         /* as moe_forward; moe_rank_best and moe_answers take these */
} moe_output;
MOE_API void moe_predictor_set_output(moe_predictor *predictor, moe_output output);
#ifndef MOE_NO_TEXT
/* Scores one text (b NULL) or a pair, zero-terminated, truncated to the task's max_len. scores (C):
   probabilities or logits (one for each class; ranking: wrong, right), or the value (regression).
   *best (may be NULL): the most probable class, the lowest of equals; 0 in regression.
   MOE_E_NONFINITE: a score is NaN or infinite, because a weight is. */
MOE_API moe_status moe_predict_text(moe_predictor *predictor, int32_t task, const char *a,
                                    const char *b, float *scores, int *best);
/* The same for n <= batch texts at once: a[i], b[i] (b NULL: none); scores (n,
   moe_model_max_classes), best (n) or NULL. Nothing is allocated, and the other texts of the batch
   change no bit. MOE_E_ARGUMENT for a task of kind span. */
MOE_API moe_status moe_predict_texts(moe_predictor *predictor, int32_t task, const char *const *a,
                                     const char *const *b, int32_t n, float *scores, int *best);
/* The same for a task of kind span: chars (n, 4), code points [b1, e1) in the first and [b2, e2) in
   the second text (one text: both in it). MOE_E_ARGUMENT if no token overlaps them, for example
   because the text was truncated. */
MOE_API moe_status moe_predict_spans(moe_predictor *predictor, int32_t task, const char *const *a,
                                     const char *const *b, const int32_t *chars, int32_t n,
                                     float *scores, int *best);
/* Embeddings of n <= batch texts (b NULL or b[i] NULL) or pairs: out (n, H), from the hidden states
   of the last layer, not normalised. The task's gates route the tokens, and its max_len limits the
   text; its kind and number of texts do not matter. A model without tasks ignores `task` and takes
   the max_len of its configuration. MOE_E_NONFINITE as above. */
typedef enum moe_pooling {
  MOE_POOLING_MEAN, /* mean over all tokens, [CLS] and [SEP] included: mean pooling of
                       sentence-transformers */
  MOE_POOLING_CLS   /* the state of [CLS], which heads read */
} moe_pooling;
MOE_API moe_status moe_predict_embed(moe_predictor *predictor, int32_t task, moe_pooling pooling,
                                     const char *const *a, const char *const *b, int32_t n,
                                     float *out);
/* The same for one text (b NULL) or a pair: out (H). */
MOE_API moe_status moe_embed_text(moe_predictor *predictor, int32_t task, moe_pooling pooling,
                                  const char *a, const char *b, float *out);
#endif
/* As moe_predict_texts for a model that reads features (moe_config.feature_dim), also in a build
   with MOE_NO_TEXT: features (sum of the lengths, feature_dim); lengths (n) from 1 to the task's
   max_len, or NULL where each input is one vector. MOE_E_ARGUMENT: a feature is not finite, or the
   task is of kind span (moe_forward). */
MOE_API moe_status moe_predict_features(moe_predictor *predictor, int32_t task,
                                        const float *features, const int32_t *lengths, int32_t n,
                                        float *scores, int *best);

/* ---- for other programming languages ---- >>api_bindings
   A shared library (MOE_SHARED) and a program in another language meet at run time: the program
   should ask moe_abi before it passes the first struct (examples/python/moe.py). */

/* Bytes of the public struct of that name ("moe_batch") in this library, 0 for an unknown one (the
   structs of single ops are not known); of NULL: MOE_VERSION. */
MOE_API size_t moe_abi(const char *name);
/* An env on the heap, for programs that do not know the struct: moe_env_init, then, with more than
   one thread, moe_pool_create. log (NULL: no messages) and log_user as in moe_env. MOE_E_MEMORY;
   MOE_E_UNSUPPORTED: this machine lacks the instruction set or, with MOE_NO_THREADS, threads. */
MOE_API moe_status moe_env_create(moe_env **out, moe_isa isa, int32_t threads,
                                  void (*log)(void *user, moe_status status, const char *sentence),
                                  void *log_user);
/* Frees it and its threads. Only for an env of moe_env_create; NULL is fine. */
MOE_API void moe_env_free(moe_env *env);

#endif /* MOE_H_INCLUDED */

#ifdef MOE_IMPLEMENTATION
#ifndef MOE_IMPLEMENTATION_DONE
#define MOE_IMPLEMENTATION_DONE

/* ---- includes, compiler differences, processor detection ---- >>platform */

#include <math.h>
#include <stdarg.h>
#include <string.h>
#ifndef MOE_NO_STDIO
#include <stdio.h>
#ifndef _WIN32
#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#endif
#endif
#if !defined(MOE_MALLOC) != !defined(MOE_FREE)
#error "define both MOE_MALLOC and MOE_FREE, or neither"
#endif
#ifndef MOE_MALLOC
#include <stdlib.h>
#define MOE_MALLOC(n) malloc(n)
#define MOE_FREE(p) free(p)
#endif
#ifndef MOE_ASSERT
#define MOE_ASSERT(x) ((void)0)
#endif
#if !defined(_WIN32) && (!defined(MOE_NO_THREADS) || !defined(MOE_NO_STDIO))
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#if !defined(MOE_NO_STDIO) && defined(_POSIX_MAPPED_FILES) && !defined(__wasi__)
#include <sys/mman.h>
#endif
#endif
#if !defined(MOE_NO_THREADS) && !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#endif
#if !defined(MOE_NO_SIMD) && (defined(__x86_64__) || defined(_M_X64)) && !defined(__TINYC__)
#define MOE__X86 1
#include <immintrin.h>
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif !defined(MOE_NO_SIMD) &&                                                                     \
    ((defined(__aarch64__) && !defined(__AARCH64EB__)) || defined(_M_ARM64))
#define MOE__NEON 1 /* part of every 64-bit ARM */
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif
#if !defined(MOE_NO_SIMD) && defined(__wasm_simd128__)
#define MOE__WASM 1
#include <wasm_simd128.h>
#endif
#if !defined(MOE_NO_SIMD) && defined(__riscv_v) && __riscv_v_intrinsic >= 11000
#define MOE__RVV 1
#include <riscv_vector.h>
#endif
#if defined(MOE__X86) || defined(MOE__NEON) || defined(MOE__WASM) || defined(MOE__RVV)
#define MOE__SIMD 1
#endif
/* A fused multiply-add is one instruction, which fmaf becomes. clang does not say so everywhere. */
#if defined(FP_FAST_FMAF) || defined(__FP_FAST_FMAF) || defined(__FMA__) ||                        \
    defined(__aarch64__) || defined(_M_ARM64) || defined(__ARM_FEATURE_FMA) ||                     \
    (defined(__riscv_flen) && __riscv_flen >= 32) || defined(__s390x__) ||                         \
    (defined(__powerpc__) && !defined(_SOFT_FLOAT) && !defined(__NO_FPRS__)) ||                    \
    defined(__loongarch_hard_float) ||                                                             \
    (defined(__mips_isa_rev) && __mips_isa_rev >= 6 && defined(__mips_hard_float))
#define MOE__FUSED 1
#endif
/* On x86 plain C looks for it when it runs, for its products. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE__FUSED) &&                            \
    !defined(MOE_PLAIN_MULTIPLY_ADD) && !defined(MOE__NO_FMA)
#define MOE__FINDS_FMA 1
#endif
#ifdef MOE_NO_TRAIN
#define MOE__TRAINS 0
#define MOE__OF_TRAINING(fn) NULL /* a kernel of plain C that is left out of its table */
#else
#define MOE__TRAINS 1
#define MOE__OF_TRAINING(fn) fn
#endif

/* A compiler must not fuse products and sums on its own, which would change the bits. See
   moe__contracted. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#ifdef __NVCC_DIAG_PRAGMA_SUPPORT__ /* nvcc passes to gcc what it does not know */
#pragma nv_diagnostic push
#pragma nv_diag_suppress 550, 1217, 1675 /* 550: what only some kernels of a macro use */
#endif
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
/* gcc's AVX-512 header starts some results from an undefined register, and g++ warns about it */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__GNUC__) || defined(__clang__)
#define MOE__TARGET(x) __attribute__((target(x)))
#define MOE__INLINE static inline __attribute__((always_inline))
#define MOE__NOINLINE __attribute__((noinline)) /* what takes much of the stack */
#define MOE__UNUSED __attribute__((unused))     /* what MOE_NO_TRAIN leaves without a caller */
#define MOE__PREFETCH(p) __builtin_prefetch(p, 0, 2)
#define MOE__PREFETCH_NEAR(p) __builtin_prefetch(p, 0, 3) /* into the first-level cache */
#if defined(__clang__)
#define MOE__PRINTF(f, a) __attribute__((format(printf, f, a)))
#else /* moe__vformat takes %zu and %lld everywhere; older C libraries of Windows do not */
#define MOE__PRINTF(f, a) __attribute__((format(gnu_printf, f, a)))
#endif
#elif defined(_MSC_VER)
#define MOE__TARGET(x)
#define MOE__INLINE static __forceinline
#define MOE__NOINLINE __declspec(noinline)
#define MOE__UNUSED
#define MOE__PREFETCH(p) ((void)(p))
#define MOE__PREFETCH_NEAR(p) ((void)(p))
#define MOE__PRINTF(f, a)
#else
#define MOE__TARGET(x)
#define MOE__INLINE static inline
#define MOE__NOINLINE
#define MOE__UNUSED
#define MOE__PREFETCH(p) ((void)(p))
#define MOE__PREFETCH_NEAR(p) ((void)(p))
#define MOE__PRINTF(f, a)
#endif

#ifdef MOE__X86
static void moe__cpuid(uint32_t leaf, uint32_t sub, uint32_t r[4]) {
#ifdef _MSC_VER
  int v[4];
  __cpuidex(v, (int)leaf, (int)sub);
  r[0] = (uint32_t)v[0];
  r[1] = (uint32_t)v[1];
  r[2] = (uint32_t)v[2];
  r[3] = (uint32_t)v[3];
#else
  r[0] = r[1] = r[2] = r[3] = 0;
  __get_cpuid_count(leaf, sub, &r[0], &r[1], &r[2], &r[3]);
#endif
}

/* What the operating system saves on a context switch: without it an instruction set must not be
   used, whatever CPUID says. */
static uint64_t moe__xgetbv(void) {
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
#endif
}
#endif

MOE_API int moe_isa_available(moe_isa isa) {
#ifdef MOE__X86
  uint32_t r[4], one[4];
  uint64_t saved;
  int avx2, avx512;
  if (isa == MOE_ISA_AVX2 || isa == MOE_ISA_AVX512) {
    moe__cpuid(0, 0, r);
    if (r[0] < 7) return 0;
    moe__cpuid(1, 0, one);
    if (!(one[2] >> 27 & 1)) return 0; /* OSXSAVE */
    saved = moe__xgetbv();
    moe__cpuid(7, 0, r);
    avx2 = (saved & 6) == 6 && (one[2] >> 28 & 1) && (one[2] >> 12 & 1) &&
           (r[1] >> 5 & 1); /* AVX, FMA, AVX2 */
    avx512 = avx2 && (saved & 0xe6) == 0xe6 && (r[1] >> 16 & 1) && (r[1] >> 17 & 1) && /* F, DQ */
             (r[1] >> 30 & 1) && (r[1] >> 31 & 1);                                     /* BW, VL */
    return isa == MOE_ISA_AVX2 ? avx2 : avx512;
  }
#endif
#ifdef MOE__NEON
  if (isa == MOE_ISA_NEON) return 1;
#elif defined(MOE__WASM) && defined(__wasm_relaxed_simd__)
  if (isa == MOE_ISA_V128) { /* fused or not, as the engine likes; here it must be */
    volatile float x = 1.000244140625f, y = -1.0f; /* as in moe__contracted */
    v128_t square = wasm_f32x4_splat(x), sum = wasm_f32x4_splat(y);
    sum = wasm_f32x4_relaxed_madd(square, square, sum);
    return wasm_f32x4_extract_lane(sum, 3) != 4.8828125e-4f;
  }
#elif defined(MOE__SIMD)
  if (isa == MOE_ISA_V128) return 1;
#endif
  return isa == MOE_ISA_AUTO || isa == MOE_ISA_SCALAR;
}

/* Kernels that this compiler can make. */
#if defined(MOE__X86) && ((defined(__clang__) && __clang_major__ >= 12) ||                         \
                          (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define MOE__AVX512_VNNI 1
#define MOE__AVX_VNNI 1
#define MOE__AVX512_BF16 1
#if defined(__linux__) && !defined(__ILP32__)
#define MOE__AMX 1 /* only Linux's way of asking for its tiles is known here */
#endif
#endif
#if defined(MOE__NEON) &&                                                                          \
    (defined(__ARM_FEATURE_DOTPROD) || (defined(__clang__) && __clang_major__ >= 17) ||            \
     (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 8) || defined(_MSC_VER))
#define MOE__NEON_DOT 1
#endif

#ifdef MOE__NEON
/* Whether the processor has dot products of bytes (FEAT_DotProd). Only the operating system can
   tell. */
static int moe__neon_has_dot(void) {
#if defined(__ARM_FEATURE_DOTPROD)
  return 1; /* the compiler uses it anyway, as Apple's does for every Mac */
#elif defined(__linux__)
  return (int)(getauxval(AT_HWCAP) >> 20 & 1);
#elif defined(_WIN32)
  return IsProcessorFeaturePresent(43) !=
         0; /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE, which older headers lack */
#else
  return 0;
#endif
}
#endif

/* The MOE_CPU_ bits of this machine. */
static uint32_t moe__cpu_flags(void) {
  uint32_t features = 0;
#ifdef MOE__X86
  uint32_t r[4], one[4];
  if (!moe_isa_available(MOE_ISA_AVX2)) return 0;
  moe__cpuid(7, 0, r);
  if (r[0] >= 1)
    moe__cpuid(7, 1, one);
  else
    memset(one, 0, sizeof one);
  if (one[0] >> 4 & 1) features |= MOE_CPU_AVX_VNNI;
  if (!moe_isa_available(MOE_ISA_AVX512)) return features;
  if (r[2] >> 11 & 1) features |= MOE_CPU_AVX512_VNNI;
  if (one[0] >> 5 & 1) features |= MOE_CPU_AVX512_BF16;
  moe__cpuid(0, 0, r);
  if (r[1] == 0x756e6547u)
    features |= MOE_CPU_SLOW_BF16; /* "Genu"ineIntel: half the speed of FMAs; twice on Zen */
#endif
#ifdef MOE__NEON
  if (moe__neon_has_dot()) features |= MOE_CPU_NEON_DOT;
#endif
  return features;
}

/* 1 where the compiler fuses a product and a sum into one operation that rounds once, although the
   pragmas above forbid it. x = 1 + 2^-12, -1: rounded twice, x0 x0 + x1 is 2^-11. */
MOE__INLINE int moe__fuses(const volatile float *x) { return x[0] * x[0] + x[1] != 4.8828125e-4f; }
#ifdef MOE__X86
MOE__TARGET("avx2,fma") static int moe__fuses_in_kernels(const volatile float *x) {
  return moe__fuses(x);
}
#endif

static int moe__contracted(void) {
  volatile float x[2]; /* volatile: to be computed when it runs */
  x[0] = 1.000244140625f;
  x[1] = -1.0f;
#ifdef MOE__X86
  if (moe_isa_available(MOE_ISA_AVX2) && moe__fuses_in_kernels(x)) return 1;
#endif
  return moe__fuses(x);
}

/* ---- statuses, log, small helpers ---- >>base */

MOE_API const char *moe_status_text(moe_status status) {
  static const char *const text[] = {
#define MOE__STATUS_TEXT(name, text) text,
      MOE_STATUSES(MOE__STATUS_TEXT)
#undef MOE__STATUS_TEXT
  };
  return (unsigned)status < MOE_STATUS_COUNT ? text[status] : "unknown status";
}

#ifdef MOE_PLAIN_MULTIPLY_ADD
#define MOE__SCALAR_NAME "scalar, plain"
#else
#define MOE__SCALAR_NAME "scalar"
#endif
#if defined(MOE__WASM) && defined(__wasm_relaxed_simd__)
#define MOE__V128_NAME "simd128, relaxed"
#elif defined(MOE__WASM)
#define MOE__V128_NAME "simd128"
#elif defined(MOE__RVV)
#define MOE__V128_NAME "rvv"
#else
#define MOE__V128_NAME "sse2"
#endif
static const char *const moe__isa_names[MOE_ISA_COUNT] = {"auto", MOE__SCALAR_NAME, MOE__V128_NAME,
                                                          "neon", "avx2",           "avx512"};

MOE_API const char *moe_isa_name(moe_isa isa) {
  return (unsigned)isa < MOE_ISA_COUNT ? moe__isa_names[isa] : "unknown";
}

MOE_API moe_isa moe_isa_from_name(const char *name) {
  int i;
  if (!strcmp(name, "scalar")) return MOE_ISA_SCALAR;
  for (i = 0; i < MOE_ISA_COUNT; ++i)
    if (!strcmp(name, moe__isa_names[i])) return (moe_isa)i;
  return MOE_ISA_COUNT;
}

MOE_API moe_status moe_env_init(moe_env *env, moe_isa isa) {
  int i;
  memset(env, 0, sizeof *env);
  env->threads = 1;
  env->isa = MOE_ISA_SCALAR;
  env->cpu_flags = moe__cpu_flags() | (moe__contracted() ? (uint32_t)MOE_CPU_CONTRACTED : 0u);
  for (i = MOE_ISA_COUNT - 1; i > MOE_ISA_SCALAR; --i)
    if (moe_isa_available((moe_isa)i)) {
      env->isa = (moe_isa)i;
      break;
    }
  if (isa != MOE_ISA_AUTO && moe_isa_available(isa)) env->isa = isa;
#ifdef MOE_USE_BLIS
  (void)moe_blis_use(env, 0);
#endif
  return moe_isa_available(isa) ? MOE_OK : MOE_E_UNSUPPORTED;
}

/* A small snprintf, so that messages need no stdio: %s %c %g %% and %d %u with l, ll or (%u only)
   z; %g has six digits. capacity is at least 1; what does not fit is cut, and a zero always ends
   the text. */
static char *moe__put_text(char *at, char *end, const char *s) {
  while (*s && at < end) *at++ = *s++;
  return at;
}

static char *moe__put_number(char *at, char *end, uint64_t v, int negative) {
  char digits[24];
  int n = 0, shift;
  do { /* v / 10 in steps of 16 bits: division of 64 bits is code of its own on small machines */
    uint32_t rest = 0;
    uint64_t tenth = 0;
    for (shift = 48; shift >= 0; shift -= 16) {
      rest = rest << 16 | (uint32_t)(v >> shift & 0xffffu);
      tenth |= (uint64_t)(rest / 10) << shift;
      rest %= 10;
    }
    digits[n++] = (char)('0' + rest);
    v = tenth;
  } while (v);
  if (negative && at < end) *at++ = '-';
  while (n && at < end) *at++ = digits[--n];
  return at;
}

#ifndef MOE_NO_SENTENCES
static char *moe__put_float(char *at, char *end, double v) {
  int exponent = 0, i, last;
  char digits[8];
  uint64_t scaled;
  if (v != v) return moe__put_text(at, end, "nan");
  if (v < 0) {
    if (at < end) *at++ = '-';
    v = -v;
  }
  if (v > 1.7e308) return moe__put_text(at, end, "inf");
  if (v == 0) return moe__put_text(at, end, "0");
  while (v >= 1e6) v /= 10, ++exponent;
  while (v < 1e5) v *= 10, --exponent;
  scaled = (uint64_t)(v + 0.5); /* six digits, value scaled * 10^exponent */
  if (scaled == 1000000) scaled = 100000, ++exponent;
  for (i = 5; i >= 0; --i, scaled /= 10) digits[i] = (char)('0' + scaled % 10);
  last = 5;
  while (last > 0 && digits[last] == '0') --last;
  exponent += 5; /* of the first digit */
  if (exponent >= -4 && exponent < 6) {
    if (exponent < 0) at = moe__put_text(at, end, "0.");
    for (i = -1; i > exponent; --i)
      if (at < end) *at++ = '0';
    for (i = 0; (i <= last || i <= exponent) && at < end; ++i) {
      if (i == exponent + 1 && exponent >= 0) *at++ = '.';
      if (at < end) *at++ = digits[i];
    }
    return at;
  }
  if (at < end) *at++ = digits[0];
  if (last && at < end) *at++ = '.';
  for (i = 1; i <= last && at < end; ++i) *at++ = digits[i];
  if (at < end) *at++ = 'e';
  return moe__put_number(at, end, (uint64_t)(exponent < 0 ? -exponent : exponent), exponent < 0);
}
#endif

static void moe__vformat(char *out, size_t capacity, const char *format, va_list args) {
  char *at = out, *end = out + capacity - 1;
  for (; *format && at < end; ++format) {
    int longs = 0, size = 0;
    if (*format != '%') {
      *at++ = *format;
      continue;
    }
    for (++format; *format == 'l' || *format == 'z'; ++format) {
      if (*format == 'z')
        size = 1;
      else
        ++longs;
    }
    if (*format == 's') at = moe__put_text(at, end, va_arg(args, const char *));
#ifndef MOE_NO_SENTENCES
    else if (*format == 'g')
      at = moe__put_float(at, end, va_arg(args, double));
#endif
    else if (*format == 'd') {
      int64_t v = longs == 2 ? (int64_t)va_arg(args, long long)
                  : longs    ? (int64_t)va_arg(args, long)
                             : (int64_t)va_arg(args, int);
      at = moe__put_number(at, end, v < 0 ? 0 - (uint64_t)v : (uint64_t)v, v < 0);
    } else if (*format == 'u') {
      uint64_t v = size         ? (uint64_t)va_arg(args, size_t)
                   : longs == 2 ? (uint64_t)va_arg(args, unsigned long long)
                   : longs      ? (uint64_t)va_arg(args, unsigned long)
                                : (uint64_t)va_arg(args, unsigned);
      at = moe__put_number(at, end, v, 0);
    } else if (*format == 'c')
      *at++ = (char)va_arg(args, int);
    else if (*format == '%')
      *at++ = '%';
    else
      break;
  }
  *at = 0;
}

static void moe__format(char *out, size_t capacity, const char *format, ...) MOE__PRINTF(3, 4);
static void moe__format(char *out, size_t capacity, const char *format, ...) {
  va_list args;
  va_start(args, format);
  moe__vformat(out, capacity, format, args);
  va_end(args);
}

/* Replaces by '?' each byte that a terminal would obey, since names and labels come from files: the
   control characters U+0000 to U+001F, U+007F and U+0080 to U+009F, in UTF-8 or as stray bytes. */
static void moe__disarm(char *text) {
  int follow = 0; /* bytes that the present character still needs */
  for (; *text; ++text) {
    unsigned c = (unsigned char)*text;
    if (c >= 0x80 && c < 0xc0 && follow > 0) {
      --follow;
      continue;
    }
    follow = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : c >= 0xc3 ? 1 : 0; /* 0xc2 begins U+0080 to U+00BF */
    if (c < 0x20 || (c >= 0x7f && c < 0xa0)) *text = '?';
  }
}

/* Logs what went wrong and returns the status: failing functions end with `return moe__fail(...)`.
   env may be NULL. */
static moe_status moe__fail(const moe_env *env, moe_status status, const char *format, ...)
    MOE__PRINTF(3, 4);
static moe_status moe__fail(const moe_env *env, moe_status status, const char *format, ...) {
  char sentence[512];
  va_list args;
  if (!env || !env->log) return status;
  va_start(args, format);
  moe__vformat(sentence, sizeof sentence, format, args);
  va_end(args);
  moe__disarm(sentence);
  env->log(env->log_user, status, sentence);
  return status;
}
#ifdef MOE_NO_SENTENCES
/* The line in place of the sentence, whose text and arguments the compiler then leaves out. */
MOE__NOINLINE static moe_status moe__fail_line(const moe_env *env, moe_status status, int line) {
  char text[16];
  if (!env || !env->log) return status;
  moe__format(text, sizeof text, "moe.h:%d", line);
  env->log(env->log_user, status, text);
  return status;
}
#define moe__fail(env, status, ...)                                                                \
  (0 ? moe__fail(env, status, __VA_ARGS__) : moe__fail_line(env, status, __LINE__))
#endif

/* Sums and products of sizes that remember an overflow: *bad is set and stays set. */
static size_t moe__add(size_t a, size_t b, int *bad) {
  if (a > SIZE_MAX - b) *bad = 1;
  return a + b;
}

static size_t moe__mul(size_t a, size_t b, int *bad) {
  if (b && a > SIZE_MAX / b) *bad = 1;
  return a * b;
}

/* Carves arrays out of a block, each 64-byte aligned: once with base NULL for the size, then with
   the block for the pointers. */
typedef struct moe__layout {
  unsigned char *base;
  size_t used;
  int bad;
} moe__layout;

static void *moe__carve(moe__layout *layout, size_t count, size_t size) {
  size_t at = moe__add(layout->used, 63, &layout->bad) & ~(size_t)63;
  layout->used = moe__add(at, moe__mul(count, size, &layout->bad), &layout->bad);
  return layout->base ? (void *)(layout->base + at) : NULL;
}

/* A heap block that starts at a multiple of 64. The pointer to free is stored right before it. */
static void *moe__alloc(size_t bytes) {
  unsigned char *raw, *block;
  if (bytes > SIZE_MAX - 128) return NULL;
  raw = (unsigned char *)MOE_MALLOC(bytes + 64 + sizeof(void *));
  if (!raw) return NULL;
  block = raw + sizeof(void *);
  block += (64 - ((uintptr_t)block & 63)) & 63;
  memcpy(block - sizeof(void *), &raw, sizeof raw);
  return block;
}

static void moe__release(void *block) {
  void *raw;
  if (!block) return;
  memcpy(&raw, (unsigned char *)block - sizeof(void *), sizeof raw);
  MOE_FREE(raw);
}

#define MOE__COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

/* Sorts n items: heapsort, which takes no memory and n log n steps at most. */
static void moe__sort(void *items, size_t n, int (*less)(const void *items, size_t i, size_t j),
                      void (*swap)(void *items, size_t i, size_t j)) {
  size_t begin = n / 2, end = n, i, child;
  while (end > 1) {
    if (begin)
      --begin;
    else
      swap(items, 0, --end);
    for (i = begin; (child = 2 * i + 1) < end; i = child) {
      if (child + 1 < end && less(items, child, child + 1)) ++child;
      if (!less(items, i, child)) break;
      swap(items, i, child);
    }
  }
}

/* Multiply-adds of a product, to compare; exact where it is small. */
static float moe__work_of(int32_t m, int32_t n, int32_t k) {
  return (float)m * (float)n * (float)k;
}

/* What macros leave out; the compiler then drops what only this reaches. */
#ifdef MOE_NO_INT8
#define MOE__INT8(x) ((void)(x), 0)
#else
#define MOE__INT8(x) (x)
#endif
#ifdef MOE_NO_TASK_ROUTER
#define MOE__BLOCKS(config) 0
#else
#define MOE__BLOCKS(config) ((config)->unit == MOE_UNIT_BLOCK)
#endif
#ifdef MOE_SMALL
#define MOE__BACKEND(env) ((const moe_backend *)NULL)
#define MOE__PROFILE(env) ((moe_profile *)NULL)
#else
#define MOE__BACKEND(env) ((env)->backend)
#define MOE__PROFILE(env) ((env)->profile)
#endif
#if defined(MOE_SMALL) && defined(MOE_NO_TRAIN)
#define MOE__GATE_LOSSES 0
#else
#define MOE__GATE_LOSSES 1
#endif

/* Whether large products take bf16 operands (>>bf16). */
static int moe__wants_bf16(const moe_env *env) {
#ifdef MOE_NO_BF16
  (void)env;
  return 0;
#else
  return env->precision == MOE_TYPE_BF16;
#endif
}

static int32_t moe__min(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t moe__max(int32_t a, int32_t b) { return a > b ? a : b; }

/* all * share / shares, rounded down, where all * share may not fit. */
static int32_t moe__share_of(int32_t all, int32_t share, int32_t shares) {
  size_t rest = (size_t)(all % shares) * (size_t)share / (size_t)shares;
  return all / shares * share + (int32_t)rest;
}

/* ---- counter-based random numbers ---- >>random
   Nothing is stored: a number is a hash of where it is used, so threads, micro-batches and restarts
   do not change it. */

/* Sites of random numbers, the last argument of moe_key. */
/* clang-format off */
enum { MOE__SITE_WEIGHTS, MOE__SITE_EMBEDDING, MOE__SITE_ATTENTION, MOE__SITE_ATTENTION_OUT,
       MOE__SITE_FFN_OUT, MOE__SITE_HEAD, MOE__SITE_JITTER, MOE__SITE_NOISE, MOE__SITE_GUMBEL };
/* clang-format on */

/* The finaliser of SplitMix64: every bit of the input reaches every bit of the output. */
static uint64_t moe__mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

MOE_API uint64_t moe_key(uint64_t seed, uint64_t step, uint64_t sequence, uint32_t layer,
                         uint32_t site) {
  uint64_t h = moe__mix64(seed);
  h = moe__mix64(h ^ step);
  h = moe__mix64(h ^ sequence);
  return moe__mix64(h ^ ((uint64_t)layer << 32 | site));
}

/* 32 random bits at a position: two rounds of multiply and shift over the position and the two
   halves of the key. Vector kernels (>>ops_simd) compute the same. */
MOE__INLINE uint32_t moe__hash32(uint64_t key, uint32_t position) {
  uint32_t x = position * 0x9e3779b1u + (uint32_t)key;
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x ^= (uint32_t)(key >> 32);
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

/* Uniform in (0, 1), 53 bits. */
static double moe__uniform(uint64_t key, uint64_t position) {
  return ((double)(moe__mix64(key ^ moe__mix64(position)) >> 11) + 0.5) *
         (1.0 / 9007199254740992.0);
}

/* Natural logarithm of a positive normal double by an atanh series. It uses only + - * /, so its
   bits are the same everywhere. */
static double moe__log_double(double x) {
  uint64_t bits;
  int e;
  double f, s, s2, sum = 0;
  int i;
  memcpy(&bits, &x, sizeof bits);
  e = (int)(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffu) | (uint64_t)1023 << 52;
  memcpy(&f, &bits, sizeof f);
  if (f > 1.4142135623730951) f *= 0.5, ++e;
  s = (f - 1) / (f + 1);
  s2 = s * s;
  for (i = 21; i >= 1; i -= 2) sum = sum * s2 + 1.0 / i;
  return 2 * s * sum + e * 0.69314718055994530942;
}

/* Standard normal by Marsaglia's polar method, which needs only log and sqrt; with our own log,
   weights do not depend on the C library. */
static float moe__normal(uint64_t key, uint64_t position) {
  uint64_t try_ = 0;
  for (;; try_ += 2) {
    double u = 2 * moe__uniform(key + try_, position) - 1,
           v = 2 * moe__uniform(key + try_ + 1, position) - 1, s = u * u + v * v;
    if (s > 0 && s < 1) return (float)(u * sqrt(-2 * moe__log_double(s) / s));
  }
}

/* A random permutation of 0 .. n-1 that needs no memory: a Feistel network over the next power of
   four, applied until the result is below n. */
MOE__UNUSED static uint64_t moe__permute(uint64_t key, uint64_t i, uint64_t n) {
  unsigned half = 1;
  uint64_t mask;
  if (n < 2) return 0;
  while (half < 32 && ((uint64_t)1 << (2 * half)) < n) ++half;
  mask = ((uint64_t)1 << half) - 1;
  do {
    uint64_t left = i >> half, right = i & mask;
    int round;
    for (round = 0; round < 6; ++round) {
      uint64_t next = left ^ (moe__mix64(key ^ (right << 8 | (uint64_t)round)) & mask);
      left = right;
      right = next;
    }
    i = left << half | right;
  } while (i >= n);
  return i;
}

/* ---- tiles, the built-in pool ---- >>parallel
   Work is a list of tiles, and threads only decide who runs which tile. Where the shape of tiles
   depends on the number of threads (>>gemm_blocks, >>int8_run, >>bf16_run, >>schedule), it changes
   no bit. So results do not depend on the number of threads. */

#if defined(MOE_NO_THREADS) && !defined(MOE__SIMD)
/* none: a small processor may lack them */
#elif defined(__GNUC__) || defined(__clang__)
#define MOE__FETCH_ADD(p, v) __atomic_fetch_add(p, v, __ATOMIC_RELAXED)
#define MOE__LOAD(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
#define MOE__STORE(p, v) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)
#define MOE__ADD(p, v) ((void)__atomic_fetch_add(p, v, __ATOMIC_SEQ_CST))
#define MOE__SWAP_IF(p, from, to)                                                                  \
  __atomic_compare_exchange_n(p, &(from), to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#elif defined(_MSC_VER)
#define MOE__FETCH_ADD(p, v) _InterlockedExchangeAdd((volatile long *)(p), v)
#define MOE__LOAD(p) _InterlockedOr((volatile long *)(p), 0)
#define MOE__STORE(p, v) ((void)_InterlockedExchange((volatile long *)(p), (long)(v)))
#define MOE__ADD(p, v) ((void)_InterlockedExchangeAdd((volatile long *)(p), (long)(v)))
#define MOE__SWAP_IF(p, from, to)                                                                  \
  (_InterlockedCompareExchange((volatile long *)(p), (long)(to), (long)(from)) == (long)(from))
#elif !defined(MOE_NO_THREADS)
#error "moe.h needs atomic operations: gcc, clang or MSVC; or define MOE_NO_THREADS"
#endif

typedef void (*moe__tile_fn)(void *arg, int32_t tile, int32_t slot);

typedef struct moe__tiles {
  moe__tile_fn fn;
  void *arg;
  int32_t count, workers, next;
} moe__tiles;

/* The tile that a worker takes after `tile`: the next one that no worker has taken. Without atomic
   operations of the compiler every worker has its own fixed tiles. */
static int32_t moe__tiles_next(moe__tiles *tiles, int32_t tile) {
#ifdef MOE__FETCH_ADD
  (void)tile;
  return (int32_t)MOE__FETCH_ADD(&tiles->next, 1);
#else
  return tile + tiles->workers;
#endif
}

/* One worker: takes tiles until none is left. Its number selects its slot of scratch. */
static void moe__tiles_worker(void *arg, int32_t slot) {
  moe__tiles *tiles = (moe__tiles *)arg;
  const moe__tile_fn fn = tiles->fn; /* read once: other threads write to `next`, on the same cache
                                        line */
  void *const fn_arg = tiles->arg;
  const int32_t count = tiles->count;
  int32_t tile = slot; /* the first is known */
  for (; tile < count; tile = moe__tiles_next(tiles, tile)) fn(fn_arg, tile, slot);
}

/* Runs fn(arg, tile, slot) for tile = 0 .. count-1. slot is below env->threads, and no two tiles
   run in the same slot at a time. */
static void moe__parallel(const moe_env *env, int32_t count, moe__tile_fn fn, void *arg) {
  int32_t workers = env->parallel_for ? moe__min(env->threads, count) : 1, i;
  moe__tiles tiles;
  if (workers <= 1) {
    for (i = 0; i < count; ++i) fn(arg, i, 0);
    return;
  }
  tiles.fn = fn;
  tiles.arg = arg;
  tiles.count = count;
  tiles.workers = tiles.next = workers;
  env->parallel_for(env->parallel_user, workers, moe__tiles_worker, &tiles);
}

#ifndef MOE_NO_THREADS
#ifdef _WIN32
typedef CRITICAL_SECTION moe__mutex;
typedef CONDITION_VARIABLE moe__cond;
typedef HANDLE moe__thread;
#define MOE__LOCK(m) EnterCriticalSection(m)
#define MOE__UNLOCK(m) LeaveCriticalSection(m)
#define MOE__WAIT(c, m) SleepConditionVariableCS(c, m, INFINITE)
#define MOE__WAKE_ALL(c) WakeAllConditionVariable(c)
#define MOE__YIELD() ((void)SwitchToThread())
#else
typedef pthread_mutex_t moe__mutex;
typedef pthread_cond_t moe__cond;
typedef pthread_t moe__thread;
#define MOE__LOCK(m) pthread_mutex_lock(m)
#define MOE__UNLOCK(m) pthread_mutex_unlock(m)
#define MOE__WAIT(c, m) pthread_cond_wait(c, m)
#define MOE__WAKE_ALL(c) pthread_cond_broadcast(c)
#define MOE__YIELD() ((void)sched_yield())
#endif
#if defined(MOE__X86)
#define MOE__PAUSE() _mm_pause()
#elif defined(MOE__NEON) && defined(__GNUC__)
#define MOE__PAUSE() __asm__ volatile("yield")
#else
#define MOE__PAUSE() ((void)0)
#endif

/* A new ticket at the gate announces a job. Helpers watch the gate for a while, since a layer has
   many short jobs, then sleep. The caller works too, and shuts the gate when no body is left to
   run. It waits only for helpers that are inside by then, so a helper that the system has suspended
   (more threads than processors, a busy machine) costs nothing. A waiting thread spins for some
   microseconds, then yields the processor. */
enum {
  MOE__GATE_INSIDE = 1,    /* the lowest bits of the gate: helpers inside */
  MOE__GATE_OPEN = 1 << 9, /* 1: helpers may come in */
  MOE__GATE_TICKET =
      1 << 10,            /* from this bit on: the job's number. When it wraps, a helper misses a
                                 job at worst */
  MOE__POOL_SPINS = 300,  /* looks at the gate at full speed */
  MOE__POOL_YIELDS = 2000 /* looks that yield in between: a millisecond or so, then sleep */
};

struct moe_pool {
  uint32_t gate; /* atomic; on one cache line with what a helper reads inside */
  int32_t count;
  void (*body)(void *arg, int32_t index);
  void *arg;
  char line1[64];
  int32_t next; /* the body to be run next; atomic */
  char line2[64];
  int32_t sleeping; /* atomic; changed under the mutex */
  int32_t quit;     /* atomic; set under the mutex */
  int32_t helpers;
  moe__mutex mutex;
  moe__cond wake;
  moe__thread thread[256];
};

static void moe__pool_work(moe_pool *pool) {
  int32_t count = pool->count;
  for (;;) {
    int32_t i = (int32_t)MOE__FETCH_ADD(&pool->next, 1);
    if (i >= count) return;
    pool->body(pool->arg, i);
  }
}

static void moe__pool_pause(int32_t waited) {
  if (waited < MOE__POOL_SPINS)
    MOE__PAUSE();
  else
    MOE__YIELD();
}

/* Waits for a job other than number `seen`. Returns 0 when the pool ends. */
static int moe__pool_wait(moe_pool *pool, uint32_t seen) {
  int32_t i;
  int quit;
  for (i = 0; i < MOE__POOL_SPINS + MOE__POOL_YIELDS; ++i) {
    if ((uint32_t)MOE__LOAD(&pool->gate) / MOE__GATE_TICKET != seen) return !MOE__LOAD(&pool->quit);
    moe__pool_pause(i);
  }
  MOE__LOCK(&pool->mutex);
  /* first count as sleeping, then look at the gate; the caller opens the gate, then looks at who
     sleeps */
  MOE__ADD(&pool->sleeping, 1);
  while (!MOE__LOAD(&pool->quit) && (uint32_t)MOE__LOAD(&pool->gate) / MOE__GATE_TICKET == seen)
    MOE__WAIT(&pool->wake, &pool->mutex);
  MOE__ADD(&pool->sleeping, -1);
  quit = (int)MOE__LOAD(&pool->quit);
  MOE__UNLOCK(&pool->mutex);
  return !quit;
}

static void moe__pool_loop(moe_pool *pool) {
  uint32_t seen = 0;
  while (moe__pool_wait(pool, seen)) {
    uint32_t gate = (uint32_t)MOE__LOAD(&pool->gate);
    while ((gate & MOE__GATE_OPEN) && !MOE__SWAP_IF(&pool->gate, gate, gate + MOE__GATE_INSIDE))
      gate = (uint32_t)MOE__LOAD(&pool->gate);
    seen = gate / MOE__GATE_TICKET;
    if (!(gate & MOE__GATE_OPEN)) continue;
    moe__pool_work(pool);
    MOE__ADD(&pool->gate, (uint32_t)0 - MOE__GATE_INSIDE);
  }
}

#ifdef _WIN32
static DWORD WINAPI moe__pool_main(LPVOID arg) {
  moe__pool_loop((moe_pool *)arg);
  return 0;
}
#else
static void *moe__pool_main(void *arg) {
  moe__pool_loop((moe_pool *)arg);
  return NULL;
}

/* Some C libraries give a thread 128 KB of stack; kernels that copy operands need more (STACK). */
static int moe__pool_start(moe__thread *thread, moe_pool *pool) {
  pthread_attr_t attr;
  size_t size;
  int failed;
  if (pthread_attr_init(&attr)) return 1;
  if (!pthread_attr_getstacksize(&attr, &size) && size < (size_t)1 << 20)
    (void)pthread_attr_setstacksize(&attr, (size_t)1 << 20);
  failed = pthread_create(thread, &attr, moe__pool_main, pool);
  (void)pthread_attr_destroy(&attr);
  return failed;
}
#endif

static void moe__pool_run(void *user, int32_t count, void (*body)(void *arg, int32_t index),
                          void *arg) {
  moe_pool *pool = (moe_pool *)user;
  uint32_t ticket = (uint32_t)MOE__LOAD(&pool->gate) / MOE__GATE_TICKET + 1;
  int32_t waited = 0;
  pool->body = body; /* the gate is shut and no helper inside, so these fields may be written */
  pool->arg = arg;
  pool->count = count;
  pool->next = 0;
  MOE__STORE(&pool->gate, ticket * MOE__GATE_TICKET + MOE__GATE_OPEN);
  if (MOE__LOAD(&pool->sleeping)) {
    MOE__LOCK(&pool->mutex);
    MOE__WAKE_ALL(&pool->wake);
    MOE__UNLOCK(&pool->mutex);
  }
  moe__pool_work(pool);
  MOE__ADD(&pool->gate, (uint32_t)0 - MOE__GATE_OPEN);
  for (; (uint32_t)MOE__LOAD(&pool->gate) % MOE__GATE_OPEN; waited += waited < MOE__POOL_SPINS)
    moe__pool_pause(waited);
}

#if defined(__linux__) && defined(__GNUC__) && defined(__LP64__) &&                                \
    (defined(__x86_64__) || defined(__aarch64__))
/* sched_getaffinity of the calling thread, which the C library declares only with _GNU_SOURCE.
   Returns the number of bytes that Linux has written, or less than 0. */
static long moe__affinity(uint64_t *mask, size_t bytes) {
#ifdef __x86_64__
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "0"(204L), "D"(0L), "S"(bytes), "d"(mask)
                   : "rcx", "r11", "memory");
  return result;
#else
  register long number __asm__("x8") = 122;
  register long result __asm__("x0") = 0;
  register size_t size __asm__("x1") = bytes;
  register uint64_t *to __asm__("x2") = mask;
  __asm__ volatile("svc 0" : "+r"(result) : "r"(number), "r"(size), "r"(to) : "memory");
  return result;
#endif
}
#define MOE__AFFINITY 1
#endif

/* Number of processors that this process may use, or 0 where that is not known. */
static int32_t moe__processors(void) {
#if defined(_WIN32)
  DWORD_PTR mine = 0, all = 0;
  SYSTEM_INFO info;
  int32_t n = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &mine, &all))
    for (; mine; mine &= mine - 1) ++n;
  if (n) return n;
  GetSystemInfo(&info); /* the process is in several groups of processors */
  return (int32_t)info.dwNumberOfProcessors;
#else
#ifdef MOE__AFFINITY
  uint64_t mask[128]; /* for 8192 processors */
  int32_t n = 0;
  size_t i;
  memset(mask, 0, sizeof mask);
  if (moe__affinity(mask, sizeof mask) > 0) {
    for (i = 0; i < sizeof mask / sizeof *mask; ++i)
      for (; mask[i]; mask[i] &= mask[i] - 1) ++n;
    return n;
  }
#endif
#ifdef _SC_NPROCESSORS_ONLN
  return (int32_t)sysconf(_SC_NPROCESSORS_ONLN);
#else
  return 0;
#endif
#endif
}

MOE_API int32_t moe_processors(void) {
  int32_t n = moe__processors();
  return n < 1 ? 1 : n > 256 ? 256 : n;
}

MOE_API void moe_pool_free(moe_pool *pool) {
  int32_t i;
  if (!pool) return;
  MOE__LOCK(&pool->mutex);
  MOE__STORE(&pool->quit, 1);
  MOE__ADD(&pool->gate, MOE__GATE_TICKET);
  MOE__WAKE_ALL(&pool->wake);
  MOE__UNLOCK(&pool->mutex);
  for (i = 0; i < pool->helpers; ++i) {
#ifdef _WIN32
    WaitForSingleObject(pool->thread[i], INFINITE);
    CloseHandle(pool->thread[i]);
#else
    pthread_join(pool->thread[i], NULL);
#endif
  }
#ifdef _WIN32
  DeleteCriticalSection(&pool->mutex);
#else
  pthread_mutex_destroy(&pool->mutex);
  pthread_cond_destroy(&pool->wake);
#endif
  moe__release(pool);
}

MOE_API moe_status moe_pool_create_exact(moe_pool **out, int32_t threads, moe_env *env) {
  moe_pool *pool;
  int32_t started;
  if (threads < 1 || threads > 256)
    return moe__fail(env, MOE_E_ARGUMENT, "a pool has 1 to 256 threads, not %d", (int)threads);
  pool = (moe_pool *)moe__alloc(sizeof *pool);
  if (!pool) return moe__fail(env, MOE_E_MEMORY, "no memory for a pool of threads");
  memset(pool, 0, sizeof *pool);
#ifdef _WIN32
  InitializeCriticalSection(&pool->mutex);
  InitializeConditionVariable(&pool->wake);
#else
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->wake, NULL);
#endif
  for (; pool->helpers < threads - 1; ++pool->helpers) {
    moe__thread *thread = &pool->thread[pool->helpers];
#ifdef _WIN32
    *thread = CreateThread(NULL, 0, moe__pool_main, pool, 0, NULL);
    if (*thread) continue;
#else
    if (!moe__pool_start(thread, pool)) continue;
#endif
    started = pool->helpers + 1; /* with the caller's own */
    moe_pool_free(pool);
    return moe__fail(env, MOE_E_UNSUPPORTED, "the system refused to start thread %d of %d",
                     (int)started + 1, (int)threads);
  }
  env->threads = threads;
  env->parallel_for = moe__pool_run;
  env->parallel_user = pool;
  *out = pool;
  return MOE_OK;
}

MOE_API moe_status moe_pool_create(moe_pool **out, int32_t threads, moe_env *env) {
  int32_t processors = moe__processors();
  if (threads >= 1 && threads <= 256 && processors >= 1) threads = moe__min(threads, processors);
  return moe_pool_create_exact(out, threads, env);
}
#endif /* MOE_NO_THREADS */

/* ---- where the time goes ---- >>profile
   The clock is read once at the end of each section; the time since the reading before belongs to
   it. */

static double moe__seconds(void *user) {
#if defined(_WIN32)
  LARGE_INTEGER count, rate;
  (void)user;
  QueryPerformanceCounter(&count);
  QueryPerformanceFrequency(&rate);
  return (double)count.QuadPart / (double)rate.QuadPart;
#elif defined(MOE_NO_THREADS) && defined(MOE_NO_STDIO)
  (void)user;
  return 0;
#elif defined(CLOCK_MONOTONIC)
  struct timespec t;
  (void)user;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
  struct timeval t;
  (void)user;
  gettimeofday(&t, NULL);
  return (double)t.tv_sec + 1e-6 * (double)t.tv_usec;
#endif
}

MOE_API void moe_profile_init(moe_profile *profile, double (*now)(void *user), void *user) {
  memset(profile, 0, sizeof *profile);
  profile->clock = now ? now : moe__seconds;
  profile->user = user;
}

/* The first section of a call begins. */
static void moe__profile_begin(const moe_env *env) {
  if (MOE__PROFILE(env)) env->profile->last = env->profile->clock(env->profile->user);
}

/* A section ends, and the next begins. */
static void moe__profile_end(const moe_env *env, moe_profile_section section) {
  moe_profile *profile = env->profile;
  double now;
  if (!MOE__PROFILE(env)) return;
  now = profile->clock(profile->user);
  profile->seconds[section] += now - profile->last;
  ++profile->times[section];
  profile->last = now;
}

MOE_API const char *moe_profile_text(moe_profile_section section) {
  static const char *const text[] = {
#define MOE__PROFILE_TEXT(name, text) text,
      MOE_PROFILE_SECTIONS(MOE__PROFILE_TEXT)
#undef MOE__PROFILE_TEXT
  };
  return (unsigned)section < MOE_PROFILE_COUNT ? text[section] : "unknown";
}

/* A line of the table, numbers right-aligned. Returns its full length; the text is cut to what is
   left of `out`. */
static size_t moe__profile_line(char *out, size_t capacity, double share, double seconds,
                                int64_t times, const char *text) {
  const double value[3] = {share * 1000, seconds * 1e4, (double)times};
  static const int width[3] = {6, 12, 9};
  char line[128], number[32];
  size_t length = 0, i;
  int column;
  for (column = 0; column < 3; ++column) {
    uint64_t tenths = value[column] > 0 ? (uint64_t)(value[column] + 0.5) : 0;
    if (column < 2)
      moe__format(number, sizeof number, "%llu.%d", (unsigned long long)(tenths / 10),
                  (int)(tenths % 10));
    else
      moe__format(number, sizeof number, "%llu", (unsigned long long)tenths);
    for (i = strlen(number); i < (size_t)width[column]; ++i) line[length++] = ' ';
    memcpy(line + length, number, strlen(number));
    length += strlen(number);
  }
  moe__format(line + length, sizeof line - length, "  %s\n", text);
  length = strlen(line);
  for (i = 0; i < length && i + 1 < capacity; ++i) out[i] = line[i];
  if (capacity) out[i] = 0;
  return length;
}

MOE_API size_t moe_profile_write(char *out, size_t capacity, const moe_profile *profile) {
  static const char head[] = "     %          ms    times  section\n";
  int32_t order[MOE_PROFILE_COUNT], n = 0, i, j;
  size_t length = 0;
  double total = 0;
  int64_t times = 0;
  for (i = 0; i < MOE_PROFILE_COUNT; ++i) {
    if (!profile->times[i]) continue;
    for (j = n++; j > 0 && profile->seconds[order[j - 1]] < profile->seconds[i]; --j)
      order[j] = order[j - 1];
    order[j] = i;
    total += profile->seconds[i];
    times += profile->times[i];
  }
  for (; length < sizeof head - 1 && length + 1 < capacity; ++length) out[length] = head[length];
  if (capacity) out[length] = 0;
  length = sizeof head - 1;
  for (i = 0; i <= n; ++i) {
    int32_t k = i < n ? order[i] : 0;
    double seconds = i < n ? profile->seconds[k] : total;
    size_t left = length < capacity ? capacity - length : 0;
    length += moe__profile_line(left ? out + length : NULL, left, total > 0 ? seconds / total : 0,
                                seconds, i < n ? profile->times[k] : times,
                                i < n ? moe_profile_text((moe_profile_section)k) : "all");
  }
  return length;
}

/* ---- vectors: the order of a sum, elementary functions in plain C ---- >>simd */

/* Whatever the width of the machine's registers, kernels are written for vectors of 16 floats: one
   register of AVX-512, two of AVX2, four of NEON, SSE2, WebAssembly or RISC-V. A kernel is written
   once, as the body of a macro BODY(S, T): S is the prefix of the instruction set (moe__avx512,
   moe__avx2, moe__v128) and T the attribute that lets the compiler use it in one function. Vectors
   of RISC-V cannot be elements of arrays or members of structs.

     #define MOE__SCALE_KERNELS(S, T)                                                \
     T static void S##_scale_row(float *y, const float *x, float a, size_t n) {      \
       size_t i = 0;                                                                 \
       for (; i + 16 <= n; i += 16)                                                  \
         S##_store(y + i, S##_mul(S##_set(a), S##_load(x + i)));                     \
       if (i < n)                                                                    \
         S##_storen(y + i, S##_mul(S##_set(a), S##_loadn(x + i, n - i)), n - i);     \
     }                                                                               \
     static const moe__scale_kernels S##_scale = { S##_scale_row };
     MOE__V_STAMP(MOE__SCALE_KERNELS)
     static const moe__scale_kernels moe__scalar_scale = { moe__scalar_scale_row };

   and MOE__V_PICK(isa, scale) is the address of the table for that instruction set. The scalar
   version, plain C, is the definition: it gives the same bits, because every operation here rounds
   once, as IEEE 754 says, and the order of sums is fixed: lane l takes the elements l, l + 16, l +
   32, ... (a short last vector is filled up with zeros), and the lanes are added as a tree: l and l
   + 8, then + 4, + 2, + 1.

   Vectors S##_f (16 floats), S##_i (16 unsigned 32-bit integers), S##_m (16 flags):
     load(p) store(p, v) loadn(p, n) storen(p, v, n)   0 <= n <= 16; loadn fills up with zeros
     set(a) add sub mul div sqrt
     fma(a, b, c) = a * b + c   fnma(a, b, c) = c - a * b   (rounded once; chain: fma, inline)
     max(a, b) = a > b ? a : b  min(a, b) = a < b ? a : b   (so b where one of them is not a number)
     abs(a)
     lt(a, b) gives flags; sel(m, a, b) = m ? a : b
     sum(v) max16(v) reduce to a float by the tree
     exp   same bits as moe__expf
     iset(u) iiota(u) = u, u + 1, ...  iload(p)  iadd isub imul iand ixor
     ishl(a, bits) ishr(a, bits) isar(a, bits) (arithmetic)  ult(a, b) unsigned comparison
     bits(f) floats(i) reinterpret; cvt(i) signed integer to float */

MOE__INLINE uint32_t moe__bits(float a) {
  uint32_t u;
  memcpy(&u, &a, sizeof u);
  return u;
}

MOE__INLINE float moe__floats(uint32_t u) {
  float a;
  memcpy(&a, &u, sizeof a);
  return a;
}

MOE__INLINE float moe__maxf(float a, float b) { return a > b ? a : b; }
MOE__INLINE float moe__minf(float a, float b) { return a < b ? a : b; }

/* a * b + c, rounded once. fmaf is used only where it is one instruction (MOE__FUSED), since
   some C libraries have a wrong one. Otherwise in double: the product is exact, and the sum,
   which rounds, gives the right float unless it lies half-way between two floats, where what it
   lost decides, or is subnormal as a float, where floats have fewer bits. A test of its bits
   finds both, and moe__fma_odd then rounds the sum to odd (an inexact sum gets an odd last bit,
   so it is no midpoint of two floats). Where double itself is software, moe__fma_whole computes
   with integers. MOE_PLAIN_MULTIPLY_ADD rounds twice. */
MOE__NOINLINE MOE__UNUSED static float moe__fma_odd(float a, float b, float c) {
  double p = (double)a * (double)b, d = (double)c;
  double s = p + d;
  double t = s - p;
  double err = (p - (s - t)) + (d - t); /* s + err is exact; NaN where s is not finite */
  if (err < 0.0 || err > 0.0) {
    uint64_t u;
    memcpy(&u, &s, sizeof u);
    if ((u & 1) == 0) {
      u = (err > 0.0) == (s > 0.0) ? u + 1 : u - 1;
      memcpy(&s, &u, sizeof s);
    }
  }
  return (float)s;
}

/* 1 where a double sum may round to the wrong float: bits 1000...0 below a float's, or 0 < |s| <
   2^-126 */
MOE__INLINE int moe__fma_doubt(double s) {
  uint64_t u;
  memcpy(&u, &s, sizeof u);
  return ((uint32_t)u & 0x1fffffffu) == 0x10000000u || (u << 1) - 1 < ((uint64_t)0x381 << 53) - 1;
}

#if defined(__SOFTFP__) && !defined(MOE__FUSED)
/* With integers: numbers are whole multiples of a power of two, in 64 bits. */
static float moe__fma_whole(float a, float b, float c) {
  uint32_t x = moe__bits(a), y = moe__bits(b), z = moe__bits(c);
  int32_t ex = (int32_t)(x >> 23 & 255), ey = (int32_t)(y >> 23 & 255),
          ez = (int32_t)(z >> 23 & 255), e, shift;
  uint32_t sign = (x ^ y) & 0x80000000u, other = z & 0x80000000u, low;
  uint64_t p, q;
  if ((uint32_t)ex - 1 > 253 || (uint32_t)ey - 1 > 253 || ez == 255 || (ez == 0 && z << 1)) {
    if (ex == 255 || ey == 255) return a * b + c;
    if (ez == 255) return c + c;
    if (x << 1 == 0 || y << 1 == 0) return z << 1 ? c : a * b + c;
    return moe__fma_odd(a, b, c); /* subnormal operands */
  }
  /* p 2^(e - 300), of 62 bits; q in the same unit */
  p = (uint64_t)((x & 0x7fffffu) | 0x800000u) * ((y & 0x7fffffu) | 0x800000u) << 14;
  e = ex + ey - 14;
  q = ez ? (uint64_t)((z & 0x7fffffu) | 0x800000u) << 38 : 0;
  shift = e - (ez + 112); /* q 2^(ez - 150 - 38) */
  if (shift > 0)          /* the smaller one loses bits, of which one that is always set remains */
    q = shift > 63 ? q != 0 : q >> shift | ((q & (((uint64_t)1 << shift) - 1)) != 0);
  else if (shift < 0 && q) {
    shift = -shift;
    p = shift > 63 ? 1 : p >> shift | ((p & (((uint64_t)1 << shift) - 1)) != 0);
    e += shift;
  }
  if (sign == other)
    p += q;
  else if (p >= q)
    p -= q;
  else {
    p = q - p;
    sign = other;
  }
  if (p == 0) return 0.0f;
  while (!(p >> 56)) p <<= 8, e -= 8;
  while (!(p >> 63)) p <<= 1, --e;
  e -= 110; /* the exponent of a float whose 24 bits are the highest of p */
  if (e < 1) return moe__fma_odd(a, b, c);
  low = (uint32_t)(p >> 8) | ((p & 255) != 0);
  x = (uint32_t)(p >> 40) + (low > 0x80000000u || (low == 0x80000000u && (p >> 40 & 1)));
  if (x >> 24) x >>= 1, ++e;
  if (e > 254) return moe__floats(sign | 0x7f800000u);
  return moe__floats(sign | (uint32_t)e << 23 | (x & 0x7fffffu));
}
#endif

MOE__INLINE float moe__fmaf(float a, float b, float c) {
#if defined(MOE_PLAIN_MULTIPLY_ADD)
  float product = a * b;
  return product + c;
#elif defined(MOE__FUSED)
  return fmaf(a, b, c);
#elif defined(__SOFTFP__)
  return moe__fma_whole(a, b, c);
#else
  double s = (double)a * (double)b + (double)c;
  return moe__fma_doubt(s) ? moe__fma_odd(a, b, c) : (float)s;
#endif
}

/* Adds 16 lanes as the vector kernels do; clobbers them. */
MOE__INLINE float moe__tree16(float *lane) {
  int width, l;
  for (width = 8; width > 0; width /= 2)
    for (l = 0; l < width; ++l) lane[l] = lane[l] + lane[l + width];
  return lane[0];
}

/* The polynomials below are minimax fits made for this file, with coefficients rounded one after
   the other. The scalar and the vector functions do the same operations in the same order. */
#define MOE__LOG2E 1.44269502f
#define MOE__LN2_HI 0.693145752f /* its 9 low bits are 0: an exact product with any exponent */
#define MOE__LN2_LO 1.42860677e-6f
#define MOE__ROUND                                                                                 \
  12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
#define MOE__ROUND_BITS 0x4b400000u
#define MOE__EXP6 1.393953804e-03f
#define MOE__EXP5 8.368821815e-03f
#define MOE__EXP4 4.166641459e-02f
#define MOE__EXP3 1.666651964e-01f
#define MOE__LOG8 6.749556214e-02f
#define MOE__LOG7 -1.167019233e-01f
#define MOE__LOG6 1.188347042e-01f
#define MOE__LOG5 -1.240620762e-01f
#define MOE__LOG4 1.422036290e-01f
#define MOE__LOG3 -1.666799039e-01f
#define MOE__LOG2 2.000207156e-01f
#define MOE__LOG1 -2.500000894e-01f
#define MOE__LOG0 3.333331347e-01f

/* exp(x) = 2^k exp(r), k the nearest integer to x / log 2. Gives exp(r); *magic holds k in its low
   bits. */
MOE__INLINE float moe__exp_split(float x, float *magic) {
  float t = moe__fmaf(x, MOE__LOG2E, MOE__ROUND);
  float k = t - MOE__ROUND;
  float r = moe__fmaf(-k, MOE__LN2_HI, x);
  float p;
  r = moe__fmaf(-k, MOE__LN2_LO, r);
  p = moe__fmaf(MOE__EXP6, r, MOE__EXP5);
  p = moe__fmaf(p, r, MOE__EXP4);
  p = moe__fmaf(p, r, MOE__EXP3);
  p = moe__fmaf(p, r, 0.5f);
  p = moe__fmaf(p, r, 1.0f);
  *magic = t;
  return moe__fmaf(p, r, 1.0f);
}

/* exp for every x, with correct zeros, denormals, infinities and NaN; error below 1 ulp */
static float moe__expf(float x) {
  float t, p;
  uint32_t k, half;
  x = moe__minf(89.0f, moe__maxf(-104.0f, x));
  p = moe__exp_split(x, &t);
  k = moe__bits(t) - MOE__ROUND_BITS;
  half = (k >> 1) | (k & 0x80000000u);             /* arithmetic shift */
  p = p * moe__floats((half << 23) + 0x3f800000u); /* exact; the second factor rounds, once */
  return p * moe__floats(((k - half) << 23) + 0x3f800000u);
}

/* Natural logarithm: -infinity at 0, NaN below; error below 1 ulp */
static float moe__logf(float x) {
  float scaled = x < 1.17549435e-38f ? x * 8388608.0f : x;
  float e0 = x < 1.17549435e-38f ? -23.0f : 0.0f;
  uint32_t u = moe__bits(scaled);
  uint32_t above = u - 0x3f3504f3u; /* m = scaled / 2^k lies in [sqrt(1/2), sqrt(2)) */
  uint32_t k = (above >> 23) | (above & 0x80000000u ? 0xfffffe00u : 0u);
  float f = moe__floats(u - (k << 23)) - 1.0f;
  float e = (float)(int32_t)k + e0;
  float p, s = f * f;
  p = moe__fmaf(MOE__LOG8, f, MOE__LOG7);
  p = moe__fmaf(p, f, MOE__LOG6);
  p = moe__fmaf(p, f, MOE__LOG5);
  p = moe__fmaf(p, f, MOE__LOG4);
  p = moe__fmaf(p, f, MOE__LOG3);
  p = moe__fmaf(p, f, MOE__LOG2);
  p = moe__fmaf(p, f, MOE__LOG1);
  p = moe__fmaf(p, f, MOE__LOG0);
  p = moe__fmaf(p, f, -0.5f);
  p = moe__fmaf(p, s, e * MOE__LN2_LO) + f;
  p = moe__fmaf(e, MOE__LN2_HI, p);
  if (!(x < moe__floats(0x7f800000u))) p = x;
  if (x <= 0.0f) p = moe__floats(x < 0.0f ? 0x7fc00000u : 0xff800000u);
  return p;
}

/* p 2^k for magic = MOE__ROUND + k, in two factors, as in moe__expf */
#define MOE__V_SCALE2(S, T)                                                                        \
  T MOE__INLINE S##_f S##_scale2(S##_f p, S##_f magic) {                                           \
    S##_i one = S##_iset(0x3f800000u), k = S##_isub(S##_bits(magic), S##_iset(MOE__ROUND_BITS));   \
    S##_i half = S##_isar(k, 1), rest = S##_isub(k, half);                                         \
    p = S##_mul(p, S##_floats(S##_iadd(S##_ishl(half, 23), one)));                                 \
    return S##_mul(p, S##_floats(S##_iadd(S##_ishl(rest, 23), one)));                              \
  }

/* ---- vectors of 16 floats: NEON, SSE2, WebAssembly, RISC-V ---- >>simd_128 */

#if defined(MOE__SIMD) && !defined(MOE__RVV)
/* Four registers, on machines with and without a fused multiply-add. MOE__Q chooses what one
   machine calls an operation. */
#define MOE__T_V128
#if defined(MOE__NEON)
#define MOE__Q(neon, sse2, wasm) neon
typedef float32x4_t moe__q;
typedef uint32x4_t moe__qi;
#define MOE__Q_LOAD(p) vld1q_f32(p)
#define MOE__Q_LOAD_BITS(p) vld1q_u32((const uint32_t *)(p))
#define MOE__Q_LANE(x, i) vgetq_lane_f32(x, i)
#define MOE__Q_SHL(x, n) vshlq_u32(x, vdupq_n_s32(n))
#define MOE__Q_SHR(x, n) vshlq_u32(x, vdupq_n_s32(-(n)))
#define MOE__Q_SAR(x, n)                                                                           \
  vreinterpretq_u32_s32(vshlq_s32(vreinterpretq_s32_u32(x), vdupq_n_s32(-(n))))
#define MOE__Q_FLOATS(x) vreinterpretq_f32_u32(x)
#define MOE__Q_BITS(x) vreinterpretq_u32_f32(x)
#define MOE__Q_CVT(x) vcvtq_f32_s32(vreinterpretq_s32_u32(x))
#define MOE__Q_LT(x, y) vcltq_f32(x, y)
#define MOE__Q_ULT(x, y) vcltq_u32(x, y)
#define MOE__Q_MAX(x, y) vbslq_f32(vcgtq_f32(x, y), x, y) /* NEON's own propagate NaN */
#define MOE__Q_MIN(x, y) vbslq_f32(vcltq_f32(x, y), x, y)
#define MOE__Q_SEL(m, x, y) vbslq_f32(m, x, y)
#define MOE__Q_IMUL(x, y) vmulq_u32(x, y)
#define MOE__Q_FMA(x, y, z) vfmaq_f32(z, x, y)
#define MOE__Q_FNMA(x, y, z) vfmsq_f32(z, x, y)
#elif defined(MOE__WASM)
#define MOE__Q(neon, sse2, wasm) wasm
typedef v128_t moe__q, moe__qi, moe__qd;
#define MOE__Q_LOAD(p) wasm_v128_load(p)
#define MOE__Q_LOAD_BITS(p) wasm_v128_load(p)
#define MOE__Q_LANE(x, i) wasm_f32x4_extract_lane(x, i)
#define MOE__Q_SHL(x, n) wasm_i32x4_shl(x, (uint32_t)(n))
#define MOE__Q_SHR(x, n) wasm_u32x4_shr(x, (uint32_t)(n))
#define MOE__Q_SAR(x, n) wasm_i32x4_shr(x, (uint32_t)(n))
#define MOE__Q_FLOATS(x) (x)
#define MOE__Q_BITS(x) (x)
#define MOE__Q_CVT(x) wasm_f32x4_convert_i32x4(x)
#define MOE__Q_LT(x, y) wasm_f32x4_lt(x, y)
#define MOE__Q_ULT(x, y) wasm_u32x4_lt(x, y)
#define MOE__Q_MAX(x, y) wasm_f32x4_pmax(y, x)
#define MOE__Q_MIN(x, y) wasm_f32x4_pmin(y, x)
#define MOE__Q_SEL(m, x, y) wasm_v128_bitselect(x, y, m)
#define MOE__Q_IMUL(x, y) wasm_i32x4_mul(x, y)
#ifdef __wasm_relaxed_simd__
#define MOE__Q_FMA(x, y, z) wasm_f32x4_relaxed_madd(x, y, z)
#define MOE__Q_FNMA(x, y, z) wasm_f32x4_relaxed_nmadd(x, y, z)
#endif
#define MOE__Q_WIDE(x) wasm_f64x2_promote_low_f32x4(x)
#define MOE__Q_HIGH(x) wasm_i32x4_shuffle(x, x, 2, 3, 2, 3)
#define MOE__Q_NARROW(low, high)                                                                   \
  wasm_i32x4_shuffle(wasm_f32x4_demote_f64x2_zero(low), wasm_f32x4_demote_f64x2_zero(high), 0, 1,  \
                     4, 5)
#define MOE__Q_INTS(x) (x)
#define MOE__Q_ANY(x) wasm_v128_any_true(x)
#else
#define MOE__Q(neon, sse2, wasm) sse2
typedef __m128 moe__q;
typedef __m128i moe__qi;
typedef __m128d moe__qd;
#define MOE__Q_LOAD(p) _mm_loadu_ps(p)
#define MOE__Q_LOAD_BITS(p) _mm_loadu_si128((const __m128i *)(p))
#define MOE__Q_LANE(x, i) _mm_cvtss_f32(_mm_shuffle_ps(x, x, i))
#define MOE__Q_SHL(x, n) _mm_sll_epi32(x, _mm_cvtsi32_si128(n))
#define MOE__Q_SHR(x, n) _mm_srl_epi32(x, _mm_cvtsi32_si128(n))
#define MOE__Q_SAR(x, n) _mm_sra_epi32(x, _mm_cvtsi32_si128(n))
#define MOE__Q_FLOATS(x) _mm_castsi128_ps(x)
#define MOE__Q_BITS(x) _mm_castps_si128(x)
#define MOE__Q_CVT(x) _mm_cvtepi32_ps(x)
#define MOE__Q_LT(x, y) _mm_castps_si128(_mm_cmplt_ps(x, y))
#define MOE__Q_TOP(x) _mm_xor_si128(x, _mm_set1_epi32((int)0x80000000u))
#define MOE__Q_ULT(x, y) _mm_cmplt_epi32(MOE__Q_TOP(x), MOE__Q_TOP(y))
#define MOE__Q_MAX(x, y) _mm_max_ps(x, y)
#define MOE__Q_MIN(x, y) _mm_min_ps(x, y)
#define MOE__Q_SEL(m, x, y)                                                                        \
  _mm_or_ps(_mm_and_ps(MOE__Q_FLOATS(m), x), _mm_andnot_ps(MOE__Q_FLOATS(m), y))
#define MOE__Q_EVEN(x, y) /* products of lanes 0 and 2 */ _mm_shuffle_epi32(_mm_mul_epu32(x, y), 8)
#define MOE__Q_IMUL(x, y)                                                                          \
  _mm_unpacklo_epi32(MOE__Q_EVEN(x, y), MOE__Q_EVEN(_mm_srli_epi64(x, 32), _mm_srli_epi64(y, 32)))
#define MOE__Q_WIDE(x) _mm_cvtps_pd(x)
#define MOE__Q_HIGH(x) _mm_movehl_ps(x, x)
#define MOE__Q_NARROW(low, high) _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high))
#define MOE__Q_INTS(x) _mm_castpd_si128(x)
#define MOE__Q_ANY(x) _mm_movemask_epi8(x)
#endif
typedef struct moe__v128_f {
  moe__q a, b, c, d;
} moe__v128_f;
typedef struct moe__v128_i {
  moe__qi a, b, c, d;
} moe__v128_i;
typedef moe__v128_i moe__v128_m;
#define MOE__V(ret, name) MOE__INLINE ret moe__v128_##name
#define MOE__F moe__v128_f
#define MOE__I moe__v128_i
#define MOE__M moe__v128_m

MOE__V(MOE__F, four)(moe__q a, moe__q b, moe__q c, moe__q d) {
  MOE__F v = {a, b, c, d};
  return v;
}

MOE__V(MOE__I, ifour)(moe__qi a, moe__qi b, moe__qi c, moe__qi d) {
  MOE__I v = {a, b, c, d};
  return v;
}
#define MOE__FOUR1(op) moe__v128_four(op(x.a), op(x.b), op(x.c), op(x.d))
#define MOE__FOUR2(op) moe__v128_four(op(x.a, y.a), op(x.b, y.b), op(x.c, y.c), op(x.d, y.d))
#define MOE__FOUR3(op)                                                                             \
  moe__v128_four(op(x.a, y.a, z.a), op(x.b, y.b, z.b), op(x.c, y.c, z.c), op(x.d, y.d, z.d))
#define MOE__IFOUR1(op) moe__v128_ifour(op(x.a), op(x.b), op(x.c), op(x.d))
#define MOE__IFOUR2(op) moe__v128_ifour(op(x.a, y.a), op(x.b, y.b), op(x.c, y.c), op(x.d, y.d))
#define MOE__IFOURN(op) moe__v128_ifour(op(x.a, n), op(x.b, n), op(x.c, n), op(x.d, n))

MOE__V(MOE__F, load)(const float *p) {
  return moe__v128_four(MOE__Q_LOAD(p), MOE__Q_LOAD(p + 4), MOE__Q_LOAD(p + 8),
                        MOE__Q_LOAD(p + 12));
}

MOE__V(MOE__I, iload)(const void *p) {
  const char *at = (const char *)p;
  return moe__v128_ifour(MOE__Q_LOAD_BITS(at), MOE__Q_LOAD_BITS(at + 16), MOE__Q_LOAD_BITS(at + 32),
                         MOE__Q_LOAD_BITS(at + 48));
}

#define MOE__Q_STORE MOE__Q(vst1q_f32, _mm_storeu_ps, wasm_v128_store)
MOE__V(void, store)(float *p, MOE__F v) {
  MOE__Q_STORE(p, v.a);
  MOE__Q_STORE(p + 4, v.b);
  MOE__Q_STORE(p + 8, v.c);
  MOE__Q_STORE(p + 12, v.d);
}

/* There are no masked loads and stores, so a quarter that is not full goes lane by lane. loadn and
   storen are long and come last in a row, so they are not forced inline as the others are. */
MOE__V(moe__q, loadn4)(const float *p, size_t n) {
  float room[4] = {0};
  if (n == 0 || n >= 4) return MOE__Q_LOAD(n ? p : room);
  room[0] = p[0];
  if (n > 1) room[1] = p[1];
  if (n > 2) room[2] = p[2];
  return MOE__Q_LOAD(room);
}

MOE__V(void, storen4)(float *p, moe__q v, size_t n) {
  if (n >= 4) {
    MOE__Q_STORE(p, v);
    return;
  }
  if (n > 0) p[0] = MOE__Q_LANE(v, 0);
  if (n > 1) p[1] = MOE__Q_LANE(v, 1);
  if (n > 2) p[2] = MOE__Q_LANE(v, 2);
}

static MOE__F moe__v128_loadn(const float *p, size_t n) {
  MOE__F v = {moe__v128_loadn4(p, n), moe__v128_loadn4(p + 4, n > 4 ? n - 4 : 0),
              moe__v128_loadn4(p + 8, n > 8 ? n - 8 : 0),
              moe__v128_loadn4(p + 12, n > 12 ? n - 12 : 0)};
  return v;
}

static void moe__v128_storen(float *p, MOE__F v, size_t n) {
  moe__v128_storen4(p, v.a, n);
  moe__v128_storen4(p + 4, v.b, n > 4 ? n - 4 : 0);
  moe__v128_storen4(p + 8, v.c, n > 8 ? n - 8 : 0);
  moe__v128_storen4(p + 12, v.d, n > 12 ? n - 12 : 0);
}

MOE__V(MOE__F, set)(float a) {
  moe__q v = MOE__Q(vdupq_n_f32, _mm_set1_ps, wasm_f32x4_splat)(a);
  return moe__v128_four(v, v, v, v);
}

MOE__V(MOE__I, iset)(uint32_t u) {
  moe__qi v = MOE__Q(vdupq_n_u32(u), _mm_set1_epi32((int)u), wasm_u32x4_splat(u));
  return moe__v128_ifour(v, v, v, v);
}
#define MOE__FLOATS2(name, neon, sse2, wasm)                                                       \
  MOE__V(MOE__F, name)(MOE__F x, MOE__F y) { return MOE__FOUR2(MOE__Q(neon, sse2, wasm)); }
#define MOE__INTS2(name, neon, sse2, wasm)                                                         \
  MOE__V(MOE__I, name)(MOE__I x, MOE__I y) { return MOE__IFOUR2(MOE__Q(neon, sse2, wasm)); }
MOE__FLOATS2(add, vaddq_f32, _mm_add_ps, wasm_f32x4_add)
MOE__FLOATS2(sub, vsubq_f32, _mm_sub_ps, wasm_f32x4_sub)
MOE__FLOATS2(mul, vmulq_f32, _mm_mul_ps, wasm_f32x4_mul)
MOE__FLOATS2(div, vdivq_f32, _mm_div_ps, wasm_f32x4_div)
MOE__INTS2(iadd, vaddq_u32, _mm_add_epi32, wasm_i32x4_add)
MOE__INTS2(isub, vsubq_u32, _mm_sub_epi32, wasm_i32x4_sub)
MOE__INTS2(iand, vandq_u32, _mm_and_si128, wasm_v128_and)
MOE__INTS2(ixor, veorq_u32, _mm_xor_si128, wasm_v128_xor)
#define MOE__Q_SQRT(x) MOE__Q(vsqrtq_f32, _mm_sqrt_ps, wasm_f32x4_sqrt)(x)
MOE__V(MOE__F, sqrt)(MOE__F x) { return MOE__FOUR1(MOE__Q_SQRT); }
MOE__V(MOE__I, imul)(MOE__I x, MOE__I y) { return MOE__IFOUR2(MOE__Q_IMUL); }
MOE__V(MOE__I, ishl)(MOE__I x, int n) { return MOE__IFOURN(MOE__Q_SHL); }
MOE__V(MOE__I, ishr)(MOE__I x, int n) { return MOE__IFOURN(MOE__Q_SHR); }
MOE__V(MOE__I, isar)(MOE__I x, int n) { return MOE__IFOURN(MOE__Q_SAR); }
MOE__V(MOE__F, max)(MOE__F x, MOE__F y) { return MOE__FOUR2(MOE__Q_MAX); }
MOE__V(MOE__F, min)(MOE__F x, MOE__F y) { return MOE__FOUR2(MOE__Q_MIN); }
MOE__V(MOE__M, lt)(MOE__F x, MOE__F y) { return MOE__IFOUR2(MOE__Q_LT); }
MOE__V(MOE__M, ult)(MOE__I x, MOE__I y) { return MOE__IFOUR2(MOE__Q_ULT); }
MOE__V(MOE__I, bits)(MOE__F x) { return MOE__IFOUR1(MOE__Q_BITS); }
MOE__V(MOE__F, floats)(MOE__I x) { return MOE__FOUR1(MOE__Q_FLOATS); }
MOE__V(MOE__F, cvt)(MOE__I x) { return MOE__FOUR1(MOE__Q_CVT); }
MOE__V(MOE__F, sel)(MOE__M x, MOE__F y, MOE__F z) { return MOE__FOUR3(MOE__Q_SEL); }

#ifdef MOE__Q_FMA
MOE__V(MOE__F, fma)(MOE__F x, MOE__F y, MOE__F z) { return MOE__FOUR3(MOE__Q_FMA); }
MOE__V(MOE__F, fnma)(MOE__F x, MOE__F y, MOE__F z) { return MOE__FOUR3(MOE__Q_FNMA); }
#else
/* x y + z in double, as in moe__fmaf. *doubt is below MOE__Q_SURE in a lane of 16 bits where
   moe__fma_doubt may hold: it keeps the smallest of bits 16 to 28 of sums, which are 1000... there
   (a false alarm in 8192 is cheaper than looking at all of them), and of twice the highest 15 less
   1, for which 0 is the largest. */
#define MOE__Q_SHORTS(a, b, c, d) MOE__Q(, _mm_setr_epi16, wasm_i16x8_make)(a, b, c, d, a, b, c, d)
#define MOE__Q_SCALES MOE__Q_SHORTS(0, 8, 0, 2)
#define MOE__Q_OFFSETS MOE__Q_SHORTS(0x7fff, 0, 0x7fff, 0x7fff)
#define MOE__Q_SURE MOE__Q_SHORTS(-0x8000, -0x7fff, -0x8000, -0x0fe1)
#define MOE__Q_DOUBT(sum, doubt)                                                                   \
  MOE__Q(, _mm_min_epi16, wasm_i16x8_min)                                                          \
  (doubt, MOE__Q(, _mm_add_epi16, wasm_i16x8_add)(                                                 \
              MOE__Q(, _mm_mullo_epi16, wasm_i16x8_mul)(MOE__Q_INTS(sum), MOE__Q_SCALES),          \
              MOE__Q_OFFSETS))
#define MOE__Q_DOUBTED(doubt)                                                                      \
  MOE__Q_ANY(MOE__Q(, _mm_cmplt_epi16, wasm_i16x8_lt)(doubt, MOE__Q_SURE))
MOE__V(moe__qd, sum2)(moe__qd x, moe__qd y, moe__qd z) {
  return MOE__Q(, _mm_add_pd, wasm_f64x2_add)(MOE__Q(, _mm_mul_pd, wasm_f64x2_mul)(x, y), z);
}
MOE__V(moe__q, fma4)(moe__q x, moe__q y, moe__q z, moe__qi *doubt) {
  moe__qd low = moe__v128_sum2(MOE__Q_WIDE(x), MOE__Q_WIDE(y), MOE__Q_WIDE(z));
  moe__qd high = moe__v128_sum2(MOE__Q_WIDE(MOE__Q_HIGH(x)), MOE__Q_WIDE(MOE__Q_HIGH(y)),
                                MOE__Q_WIDE(MOE__Q_HIGH(z)));
  *doubt = MOE__Q_DOUBT(low, *doubt);
  *doubt = MOE__Q_DOUBT(high, *doubt);
  return MOE__Q_NARROW(low, high);
}
/* of copies, so that the operands themselves stay in registers */
MOE__NOINLINE static void moe__v128_fma_slow(float *r, MOE__F x, MOE__F y, MOE__F z) {
  float a[16], b[16], c[16];
  int i;
  moe__v128_store(a, x);
  moe__v128_store(b, y);
  moe__v128_store(c, z);
  for (i = 0; i < 16; ++i) r[i] = moe__fmaf(a[i], b[i], c[i]);
}
MOE__V(MOE__F, chain)(MOE__F x, MOE__F y, MOE__F z) {
  moe__qi doubt = MOE__Q_OFFSETS;
  MOE__F r;
  r.a = moe__v128_fma4(x.a, y.a, z.a, &doubt);
  r.b = moe__v128_fma4(x.b, y.b, z.b, &doubt);
  r.c = moe__v128_fma4(x.c, y.c, z.c, &doubt);
  r.d = moe__v128_fma4(x.d, y.d, z.d, &doubt);
  if (MOE__Q_DOUBTED(doubt)) {
    float out[16];
    moe__v128_fma_slow(out, x, y, z);
    r = moe__v128_load(out);
  }
  return r;
}
/* a hundred instructions: a function of their own, but in the kernels of products */
MOE__NOINLINE static void moe__v128_fma_at(MOE__F *x, const MOE__F *y, const MOE__F *z) {
  *x = moe__v128_chain(*x, *y, *z);
}
MOE__V(MOE__F, fma)(MOE__F x, MOE__F y, MOE__F z) {
  moe__v128_fma_at(&x, &y, &z);
  return x;
}
MOE__V(MOE__F, fnma)(MOE__F x, MOE__F y, MOE__F z) {
  MOE__I sign = moe__v128_iset(0x80000000u);
  return moe__v128_fma(moe__v128_floats(moe__v128_ixor(moe__v128_bits(x), sign)), y, z);
}
#endif

MOE__V(MOE__I, iiota)(uint32_t u) {
  static const uint32_t first[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return moe__v128_iadd(moe__v128_iset(u), moe__v128_iload(first));
}

#define MOE__Q_SUM(x, y) MOE__Q(vaddq_f32, _mm_add_ps, wasm_f32x4_add)(x, y)
MOE__V(float, sum)(MOE__F v) {
  moe__q q = MOE__Q_SUM(MOE__Q_SUM(v.a, v.c), MOE__Q_SUM(v.b, v.d));
  return (MOE__Q_LANE(q, 0) + MOE__Q_LANE(q, 2)) + (MOE__Q_LANE(q, 1) + MOE__Q_LANE(q, 3));
}

MOE__V(float, max16)(MOE__F v) {
  moe__q ac = MOE__Q_MAX(v.a, v.c), bd = MOE__Q_MAX(v.b, v.d), q = MOE__Q_MAX(ac, bd);
  return moe__maxf(moe__maxf(MOE__Q_LANE(q, 0), MOE__Q_LANE(q, 2)),
                   moe__maxf(MOE__Q_LANE(q, 1), MOE__Q_LANE(q, 3)));
}

MOE__V_SCALE2(moe__v128, MOE__T_V128)
#undef MOE__FOUR1
#undef MOE__FOUR2
#undef MOE__FOUR3
#undef MOE__IFOUR1
#undef MOE__IFOUR2
#undef MOE__IFOURN
#undef MOE__FLOATS2
#undef MOE__INTS2
#undef MOE__V
#undef MOE__F
#undef MOE__I
#undef MOE__M
#endif

#ifdef MOE__RVV
/* A vector is a group of four registers, which hold 16 floats if they have 128 bits. Of longer ones
   the first 16 lanes are used. */
#define MOE__T_V128
#define MOE__Q_FMA
typedef vfloat32m4_t moe__v128_f;
typedef vuint32m4_t moe__v128_i;
typedef vbool8_t moe__v128_m;
#define MOE__V(ret, name) MOE__INLINE ret moe__v128_##name
#define MOE__F moe__v128_f
#define MOE__I moe__v128_i
#define MOE__M moe__v128_m
MOE__V(MOE__F, load)(const float *p) { return __riscv_vle32_v_f32m4(p, 16); }
MOE__V(void, store)(float *p, MOE__F v) { __riscv_vse32_v_f32m4(p, v, 16); }
MOE__V(void, storen)(float *p, MOE__F v, size_t n) { __riscv_vse32_v_f32m4(p, v, n); }
MOE__V(MOE__F, set)(float a) { return __riscv_vfmv_v_f_f32m4(a, 16); }
MOE__V(MOE__F, loadn)(const float *p, size_t n) {
  return __riscv_vle32_v_f32m4_tu(moe__v128_set(0.0f), p, n);
}
MOE__V(MOE__F, add)(MOE__F a, MOE__F b) { return __riscv_vfadd_vv_f32m4(a, b, 16); }
MOE__V(MOE__F, sub)(MOE__F a, MOE__F b) { return __riscv_vfsub_vv_f32m4(a, b, 16); }
MOE__V(MOE__F, mul)(MOE__F a, MOE__F b) { return __riscv_vfmul_vv_f32m4(a, b, 16); }
MOE__V(MOE__F, div)(MOE__F a, MOE__F b) { return __riscv_vfdiv_vv_f32m4(a, b, 16); }
MOE__V(MOE__F, sqrt)(MOE__F a) { return __riscv_vfsqrt_v_f32m4(a, 16); }
MOE__V(MOE__F, fma)(MOE__F a, MOE__F b, MOE__F c) { return __riscv_vfmacc_vv_f32m4(c, a, b, 16); }
MOE__V(MOE__F, fnma)(MOE__F a, MOE__F b, MOE__F c) { return __riscv_vfnmsac_vv_f32m4(c, a, b, 16); }
MOE__V(MOE__M, lt)(MOE__F a, MOE__F b) { return __riscv_vmflt_vv_f32m4_b8(a, b, 16); }
MOE__V(MOE__F, sel)(MOE__M m, MOE__F a, MOE__F b) { return __riscv_vmerge_vvm_f32m4(b, a, m, 16); }
MOE__V(MOE__F, max)(MOE__F a, MOE__F b) { return moe__v128_sel(moe__v128_lt(b, a), a, b); }
MOE__V(MOE__F, min)(MOE__F a, MOE__F b) { return moe__v128_sel(moe__v128_lt(a, b), a, b); }
MOE__V(MOE__I, iset)(uint32_t u) { return __riscv_vmv_v_x_u32m4(u, 16); }
MOE__V(MOE__I, iload)(const void *p) { return __riscv_vle32_v_u32m4((const uint32_t *)p, 16); }
MOE__V(MOE__I, iiota)(uint32_t u) { return __riscv_vadd_vx_u32m4(__riscv_vid_v_u32m4(16), u, 16); }
MOE__V(MOE__I, iadd)(MOE__I a, MOE__I b) { return __riscv_vadd_vv_u32m4(a, b, 16); }
MOE__V(MOE__I, isub)(MOE__I a, MOE__I b) { return __riscv_vsub_vv_u32m4(a, b, 16); }
MOE__V(MOE__I, imul)(MOE__I a, MOE__I b) { return __riscv_vmul_vv_u32m4(a, b, 16); }
MOE__V(MOE__I, iand)(MOE__I a, MOE__I b) { return __riscv_vand_vv_u32m4(a, b, 16); }
MOE__V(MOE__I, ixor)(MOE__I a, MOE__I b) { return __riscv_vxor_vv_u32m4(a, b, 16); }
MOE__V(MOE__I, ishl)(MOE__I a, size_t n) { return __riscv_vsll_vx_u32m4(a, n, 16); }
MOE__V(MOE__I, ishr)(MOE__I a, size_t n) { return __riscv_vsrl_vx_u32m4(a, n, 16); }
#define MOE__SIGNED(a) __riscv_vreinterpret_v_u32m4_i32m4(a)
MOE__V(MOE__I, isar)(MOE__I a, size_t n) {
  return __riscv_vreinterpret_v_i32m4_u32m4(__riscv_vsra_vx_i32m4(MOE__SIGNED(a), n, 16));
}
MOE__V(MOE__M, ult)(MOE__I a, MOE__I b) { return __riscv_vmsltu_vv_u32m4_b8(a, b, 16); }
MOE__V(MOE__I, bits)(MOE__F a) { return __riscv_vreinterpret_v_f32m4_u32m4(a); }
MOE__V(MOE__F, floats)(MOE__I a) { return __riscv_vreinterpret_v_u32m4_f32m4(a); }
MOE__V(MOE__F, cvt)(MOE__I a) { return __riscv_vfcvt_f_x_v_f32m4(MOE__SIGNED(a), 16); }
MOE__V(float, sum)(MOE__F v) {
  size_t width = 8;
  for (; width > 0; width /= 2) v = moe__v128_add(v, __riscv_vslidedown_vx_f32m4(v, width, 16));
  return __riscv_vfmv_f_s_f32m4_f32(v);
}
MOE__V(float, max16)(MOE__F v) {
  size_t width = 8;
  for (; width > 0; width /= 2) v = moe__v128_max(v, __riscv_vslidedown_vx_f32m4(v, width, 16));
  return __riscv_vfmv_f_s_f32m4_f32(v);
}
MOE__V_SCALE2(moe__v128, MOE__T_V128)
#undef MOE__SIGNED
#undef MOE__V
#undef MOE__F
#undef MOE__I
#undef MOE__M
#endif

/* ---- vectors of 16 floats: AVX-512, AVX2 ---- >>simd_x86 */

#ifdef MOE__X86
#define MOE__T_AVX2 MOE__TARGET("avx2,fma")
#define MOE__T_AVX512 MOE__TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")

/* The tree from 8 lanes on */
MOE__T_AVX2 MOE__INLINE float moe__sum8(__m256 h) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
MOE__T_AVX2 MOE__INLINE float moe__max8(__m256 h) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

/* AVX-512: one register */
typedef __m512 moe__avx512_f;
typedef __m512i moe__avx512_i;
typedef __mmask16 moe__avx512_m;
#define MOE__V(ret, name) MOE__T_AVX512 MOE__INLINE ret moe__avx512_##name
#define MOE__F moe__avx512_f
#define MOE__I moe__avx512_i
#define MOE__M moe__avx512_m
MOE__INLINE moe__avx512_m moe__avx512_first(size_t n) { return (moe__avx512_m)((1u << n) - 1u); }
MOE__V(MOE__F, load)(const float *p) { return _mm512_loadu_ps(p); }
MOE__V(void, store)(float *p, MOE__F v) { _mm512_storeu_ps(p, v); }
MOE__V(MOE__F, loadn)(const float *p, size_t n) {
  return _mm512_maskz_loadu_ps(moe__avx512_first(n), p);
}
MOE__V(void, storen)(float *p, MOE__F v, size_t n) {
  _mm512_mask_storeu_ps(p, moe__avx512_first(n), v);
}
MOE__V(MOE__F, set)(float a) { return _mm512_set1_ps(a); }
MOE__V(MOE__F, add)(MOE__F a, MOE__F b) { return _mm512_add_ps(a, b); }
MOE__V(MOE__F, sub)(MOE__F a, MOE__F b) { return _mm512_sub_ps(a, b); }
MOE__V(MOE__F, mul)(MOE__F a, MOE__F b) { return _mm512_mul_ps(a, b); }
MOE__V(MOE__F, div)(MOE__F a, MOE__F b) { return _mm512_div_ps(a, b); }
MOE__V(MOE__F, sqrt)(MOE__F a) { return _mm512_sqrt_ps(a); }
MOE__V(MOE__F, fma)(MOE__F a, MOE__F b, MOE__F c) { return _mm512_fmadd_ps(a, b, c); }
MOE__V(MOE__F, fnma)(MOE__F a, MOE__F b, MOE__F c) { return _mm512_fnmadd_ps(a, b, c); }
MOE__V(MOE__F, max)(MOE__F a, MOE__F b) { return _mm512_max_ps(a, b); }
MOE__V(MOE__F, min)(MOE__F a, MOE__F b) { return _mm512_min_ps(a, b); }
MOE__V(MOE__M, lt)(MOE__F a, MOE__F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
MOE__V(MOE__F, sel)(MOE__M m, MOE__F a, MOE__F b) { return _mm512_mask_blend_ps(m, b, a); }
MOE__V(MOE__I, iset)(uint32_t u) { return _mm512_set1_epi32((int)u); }
MOE__V(MOE__I, iload)(const void *p) { return _mm512_loadu_si512(p); }
MOE__V(MOE__I, iadd)(MOE__I a, MOE__I b) { return _mm512_add_epi32(a, b); }
MOE__V(MOE__I, isub)(MOE__I a, MOE__I b) { return _mm512_sub_epi32(a, b); }
MOE__V(MOE__I, imul)(MOE__I a, MOE__I b) { return _mm512_mullo_epi32(a, b); }
MOE__V(MOE__I, iand)(MOE__I a, MOE__I b) { return _mm512_and_si512(a, b); }
MOE__V(MOE__I, ixor)(MOE__I a, MOE__I b) { return _mm512_xor_si512(a, b); }
MOE__V(MOE__I, ishl)(MOE__I a, int n) { return _mm512_sllv_epi32(a, _mm512_set1_epi32(n)); }
MOE__V(MOE__I, ishr)(MOE__I a, int n) { return _mm512_srlv_epi32(a, _mm512_set1_epi32(n)); }
MOE__V(MOE__I, isar)(MOE__I a, int n) { return _mm512_srav_epi32(a, _mm512_set1_epi32(n)); }
MOE__V(MOE__M, ult)(MOE__I a, MOE__I b) { return _mm512_cmp_epu32_mask(a, b, _MM_CMPINT_LT); }
MOE__V(MOE__I, bits)(MOE__F a) { return _mm512_castps_si512(a); }
MOE__V(MOE__F, floats)(MOE__I a) { return _mm512_castsi512_ps(a); }
MOE__V(MOE__F, cvt)(MOE__I a) { return _mm512_cvtepi32_ps(a); }

MOE__V(MOE__I, iiota)(uint32_t u) {
  return _mm512_add_epi32(_mm512_set1_epi32((int)u),
                          _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
}

MOE__V(float, sum)(MOE__F v) {
  return moe__sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
MOE__V(float, max16)(MOE__F v) {
  return moe__max8(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}

/* p * 2^k, rounded once, for magic = MOE__ROUND + k */
MOE__V(MOE__F, scale2)(MOE__F p, MOE__F magic) {
  return _mm512_scalef_ps(p, _mm512_sub_ps(magic, _mm512_set1_ps(MOE__ROUND)));
}
#undef MOE__V
#undef MOE__F
#undef MOE__I
#undef MOE__M

/* AVX2 with FMA: two registers */
typedef struct moe__avx2_f {
  __m256 a, b;
} moe__avx2_f;
typedef struct moe__avx2_i {
  __m256i a, b;
} moe__avx2_i;
typedef moe__avx2_f moe__avx2_m;
#define MOE__V(ret, name) MOE__T_AVX2 MOE__INLINE ret moe__avx2_##name
#define MOE__F moe__avx2_f
#define MOE__I moe__avx2_i
#define MOE__M moe__avx2_m

MOE__V(MOE__F, two)(__m256 a, __m256 b) {
  MOE__F v = {a, b};
  return v;
}

MOE__V(MOE__I, itwo)(__m256i a, __m256i b) {
  MOE__I v = {a, b};
  return v;
}
#define MOE__TWO1(op) moe__avx2_two(op(x.a), op(x.b))
#define MOE__TWO2(op) moe__avx2_two(op(x.a, y.a), op(x.b, y.b))
#define MOE__TWO3(op) moe__avx2_two(op(x.a, y.a, z.a), op(x.b, y.b, z.b))
#define MOE__CMP2(c) moe__avx2_two(_mm256_cmp_ps(x.a, y.a, c), _mm256_cmp_ps(x.b, y.b, c))
#define MOE__ITWO2(op) moe__avx2_itwo(op(x.a, y.a), op(x.b, y.b))

/* flags of the first n lanes */
MOE__V(MOE__I, first)(size_t n) {
  __m256i count = _mm256_set1_epi32((int)n);
  return moe__avx2_itwo(_mm256_cmpgt_epi32(count, _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0)),
                        _mm256_cmpgt_epi32(count, _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8)));
}

MOE__V(MOE__F, loadn)(const float *p, size_t n) {
  MOE__I m = moe__avx2_first(n);
  return moe__avx2_two(_mm256_maskload_ps(p, m.a), _mm256_maskload_ps(p + 8, m.b));
}

MOE__V(void, storen)(float *p, MOE__F v, size_t n) {
  MOE__I m = moe__avx2_first(n);
  _mm256_maskstore_ps(p, m.a, v.a);
  _mm256_maskstore_ps(p + 8, m.b, v.b);
}

MOE__V(void, store)(float *p, MOE__F v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}

MOE__V(MOE__I, iload)(const void *p) {
  return moe__avx2_itwo(_mm256_loadu_si256((const __m256i *)p),
                        _mm256_loadu_si256((const __m256i *)p + 1));
}
MOE__V(MOE__F, load)(const float *p) {
  return moe__avx2_two(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}
MOE__V(MOE__F, set)(float a) { return moe__avx2_two(_mm256_set1_ps(a), _mm256_set1_ps(a)); }
MOE__V(MOE__F, add)(MOE__F x, MOE__F y) { return MOE__TWO2(_mm256_add_ps); }
MOE__V(MOE__F, sub)(MOE__F x, MOE__F y) { return MOE__TWO2(_mm256_sub_ps); }
MOE__V(MOE__F, mul)(MOE__F x, MOE__F y) { return MOE__TWO2(_mm256_mul_ps); }
MOE__V(MOE__F, div)(MOE__F x, MOE__F y) { return MOE__TWO2(_mm256_div_ps); }
MOE__V(MOE__F, sqrt)(MOE__F x) { return MOE__TWO1(_mm256_sqrt_ps); }
MOE__V(MOE__F, fma)(MOE__F x, MOE__F y, MOE__F z) { return MOE__TWO3(_mm256_fmadd_ps); }
MOE__V(MOE__F, fnma)(MOE__F x, MOE__F y, MOE__F z) { return MOE__TWO3(_mm256_fnmadd_ps); }
MOE__V(MOE__F, max)(MOE__F x, MOE__F y) { return MOE__TWO2(_mm256_max_ps); }
MOE__V(MOE__F, min)(MOE__F x, MOE__F y) { return MOE__TWO2(_mm256_min_ps); }
MOE__V(MOE__M, lt)(MOE__F x, MOE__F y) { return MOE__CMP2(_CMP_LT_OQ); }
MOE__V(MOE__F, sel)(MOE__M z, MOE__F y, MOE__F x) { return MOE__TWO3(_mm256_blendv_ps); }
MOE__V(MOE__I, iset)(uint32_t u) {
  return moe__avx2_itwo(_mm256_set1_epi32((int)u), _mm256_set1_epi32((int)u));
}
MOE__V(MOE__I, iadd)(MOE__I x, MOE__I y) { return MOE__ITWO2(_mm256_add_epi32); }
MOE__V(MOE__I, isub)(MOE__I x, MOE__I y) { return MOE__ITWO2(_mm256_sub_epi32); }
MOE__V(MOE__I, imul)(MOE__I x, MOE__I y) { return MOE__ITWO2(_mm256_mullo_epi32); }
MOE__V(MOE__I, iand)(MOE__I x, MOE__I y) { return MOE__ITWO2(_mm256_and_si256); }
MOE__V(MOE__I, ixor)(MOE__I x, MOE__I y) { return MOE__ITWO2(_mm256_xor_si256); }
MOE__V(MOE__I, ishl)(MOE__I x, int n) {
  return moe__avx2_itwo(_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n));
}
MOE__V(MOE__I, ishr)(MOE__I x, int n) {
  return moe__avx2_itwo(_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n));
}
MOE__V(MOE__I, isar)(MOE__I x, int n) {
  return moe__avx2_itwo(_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n));
}
MOE__V(MOE__I, bits)(MOE__F x) {
  return moe__avx2_itwo(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
}
MOE__V(MOE__F, floats)(MOE__I x) { return MOE__TWO1(_mm256_castsi256_ps); }
MOE__V(MOE__F, cvt)(MOE__I x) { return MOE__TWO1(_mm256_cvtepi32_ps); }

MOE__V(MOE__M, ult)(MOE__I x, MOE__I y) { /* there is a signed comparison only: shift the range */
  MOE__I top = moe__avx2_iset(0x80000000u);
  x = moe__avx2_ixor(x, top);
  y = moe__avx2_ixor(y, top);
  return moe__avx2_floats(
      moe__avx2_itwo(_mm256_cmpgt_epi32(y.a, x.a), _mm256_cmpgt_epi32(y.b, x.b)));
}

MOE__V(MOE__I, iiota)(uint32_t u) {
  return moe__avx2_iadd(moe__avx2_iset(u),
                        moe__avx2_itwo(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0),
                                       _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8)));
}

MOE__V(float, sum)(MOE__F v) { return moe__sum8(_mm256_add_ps(v.a, v.b)); }
MOE__V(float, max16)(MOE__F v) { return moe__max8(_mm256_max_ps(v.a, v.b)); }
MOE__V_SCALE2(moe__avx2, MOE__T_AVX2)
#undef MOE__TWO1
#undef MOE__TWO2
#undef MOE__TWO3
#undef MOE__CMP2
#undef MOE__ITWO2
#undef MOE__V
#undef MOE__F
#undef MOE__I
#undef MOE__M

#endif
#undef MOE__V_SCALE2

#if defined(MOE__X86)
#define MOE__V_STAMP(body)                                                                         \
  body(moe__v128, MOE__T_V128) body(moe__avx2, MOE__T_AVX2) body(moe__avx512, MOE__T_AVX512)
#define MOE__V_PICK(isa, table)                                                                    \
  ((isa) == MOE_ISA_AVX512 ? &moe__avx512_##table                                                  \
   : (isa) == MOE_ISA_AVX2 ? &moe__avx2_##table                                                    \
   : (isa) == MOE_ISA_V128 ? &moe__v128_##table                                                    \
                           : &moe__scalar_##table)
#elif defined(MOE__SIMD)
#define MOE__V_STAMP(body) body(moe__v128, MOE__T_V128)
#define MOE__V_PICK(isa, table)                                                                    \
  ((isa) == MOE_ISA_SCALAR ? &moe__scalar_##table : &moe__v128_##table)
#else
#define MOE__V_STAMP(body)
#define MOE__V_PICK(isa, table) ((void)(isa), &moe__scalar_##table)
#endif

/* ---- exp of vectors; sums of rows ---- >>rows */

/* The functions of >>simd for vectors; see there. */
#define MOE__V_EXP(S, T)                                                                           \
  T MOE__INLINE S##_f S##_abs(S##_f x) {                                                           \
    return S##_floats(S##_iand(S##_bits(x), S##_iset(0x7fffffffu)));                               \
  }                                                                                                \
  T MOE__INLINE S##_f S##_exp_split(S##_f x, S##_f *magic) {                                       \
    S##_f t = S##_fma(x, S##_set(MOE__LOG2E), S##_set(MOE__ROUND));                                \
    S##_f k = S##_sub(t, S##_set(MOE__ROUND));                                                     \
    S##_f r = S##_fnma(k, S##_set(MOE__LN2_HI), x);                                                \
    S##_f p;                                                                                       \
    r = S##_fnma(k, S##_set(MOE__LN2_LO), r);                                                      \
    p = S##_fma(S##_set(MOE__EXP6), r, S##_set(MOE__EXP5));                                        \
    p = S##_fma(p, r, S##_set(MOE__EXP4));                                                         \
    p = S##_fma(p, r, S##_set(MOE__EXP3));                                                         \
    p = S##_fma(p, r, S##_set(0.5f));                                                              \
    p = S##_fma(p, r, S##_set(1.0f));                                                              \
    *magic = t;                                                                                    \
    return S##_fma(p, r, S##_set(1.0f));                                                           \
  }                                                                                                \
  T MOE__INLINE S##_f S##_exp(S##_f x) {                                                           \
    S##_f t, p;                                                                                    \
    x = S##_min(S##_set(89.0f), S##_max(S##_set(-104.0f), x));                                     \
    p = S##_exp_split(x, &t);                                                                      \
    return S##_scale2(p, t);                                                                       \
  }

MOE__V_STAMP(MOE__V_EXP)
#undef MOE__V_EXP

/* Row reductions and maps. x, y: n floats; n = 0 gives 0. */
typedef struct moe__row_kernels {
  float (*sum)(const float *x, size_t n);
  float (*dot)(const float *x, const float *y, size_t n);
  void (*exp)(float *y, const float *x, size_t n); /* y may be x */
} moe__row_kernels;

static float moe__scalar_row_sum(const float *x, size_t n) {
  float lane[16] = {0};
  size_t i, padded = (n + 15) / 16 * 16;
  for (i = 0; i < padded; ++i) lane[i % 16] += i < n ? x[i] : 0.0f;
  return moe__tree16(lane);
}

static float moe__scalar_row_dot(const float *x, const float *y, size_t n) {
  float lane[16] = {0};
  size_t i, padded = (n + 15) / 16 * 16;
  for (i = 0; i < padded; ++i)
    lane[i % 16] = moe__fmaf(i < n ? x[i] : 0.0f, i < n ? y[i] : 0.0f, lane[i % 16]);
  return moe__tree16(lane);
}

static void moe__scalar_row_exp(float *y, const float *x, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) y[i] = moe__expf(x[i]);
}

static const moe__row_kernels moe__scalar_rows = {moe__scalar_row_sum, moe__scalar_row_dot,
                                                  moe__scalar_row_exp};

#define MOE__V_ROWS(S, T)                                                                          \
  T static float S##_row_sum(const float *x, size_t n) {                                           \
    S##_f s = S##_set(0.0f);                                                                       \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16) s = S##_add(s, S##_load(x + i));                                  \
    if (i < n) s = S##_add(s, S##_loadn(x + i, n - i));                                            \
    return S##_sum(s);                                                                             \
  }                                                                                                \
  T static float S##_row_dot(const float *x, const float *y, size_t n) {                           \
    S##_f s = S##_set(0.0f);                                                                       \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16) s = S##_fma(S##_load(x + i), S##_load(y + i), s);                 \
    if (i < n) s = S##_fma(S##_loadn(x + i, n - i), S##_loadn(y + i, n - i), s);                   \
    return S##_sum(s);                                                                             \
  }                                                                                                \
  T static void S##_row_exp(float *y, const float *x, size_t n) {                                  \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16) S##_store(y + i, S##_exp(S##_load(x + i)));                       \
    if (i < n) S##_storen(y + i, S##_exp(S##_loadn(x + i, n - i)), n - i);                         \
  }                                                                                                \
  static const moe__row_kernels S##_rows = {S##_row_sum, S##_row_dot, S##_row_exp};
MOE__V_STAMP(MOE__V_ROWS)
#undef MOE__V_ROWS

/* ---- matrix products: what they are, plain C ---- >>gemm */

/* One definition of every product. An element of C is one chain of fused multiply-adds over k, in
   ascending order, that begins with the bias, with what C holds (accumulate) or with 0. Kernels
   vectorise over columns and loop over rows, never over k, and a block of k begins by loading what
   the block before has stored. So instruction sets, blocks, tiles and threads change no bit.
   Weights with fewer than 16 outputs (gates, heads) are the exception, since vectors over columns
   would be nearly empty: there an element is the 16-lane dot product of >>simd, plus the bias. Only
   the shape of the weight decides. */

typedef enum moe__b_layout {
  MOE__B_PANELS, /* panels of moe_pack: n outputs, k inputs */
  MOE__B_PAIRS,  /* panels of moe_pack_bf16 (>>bf16) */
  MOE__B_ROWS,   /* (p, j) = b[p b_row + j] */
  MOE__B_COLS    /* (p, j) = b[j b_row + p]: weights (outputs, inputs) as files have them */
} moe__b_layout;

/* C (m, n) = A (m, k) B (k, n). No array may overlap C. Any size may be 0. */
typedef struct moe__gemm {
  int32_t m, n, k;
  int narrow; /* the weight has fewer than 16 outputs: 16-lane sums; set by moe__gemm_weight */
  const moe_mat *quantized; /* int8 weights instead of b (>>int8), or NULL; of a list all or none */
  const float *a;
  size_t a_row, a_col; /* (i, p) = a[i a_row + p a_col] */
  const float *b;
  size_t b_row; /* not read for panels */
  moe__b_layout b_layout;
  int accumulate; /* begin with what C holds; bias is NULL then */
  float *c;
  size_t c_row;
  const float *bias; /* (n) or NULL */
  float *gelu;       /* not NULL: GELU(C) goes there, rows c_row apart; may be c itself */
  float *a_sum; /* (m) not NULL: += the sum over p of (i, p), in order: the gradient of a bias */
} moe__gemm;

/* The B side of the product x W^T. */
static void moe__gemm_weight(moe__gemm *g, const moe_mat *w) {
  g->n = w->rows;
  g->k = w->cols;
  g->narrow = w->rows < 16;
  g->b = (const float *)w->data;
  g->b_row = (size_t)w->cols;
  g->b_layout = w->type == MOE_TYPE_BF16         ? MOE__B_PAIRS
                : w->layout == MOE_LAYOUT_PANELS ? MOE__B_PANELS
                                                 : MOE__B_COLS;
}

/* The largest kernel of any instruction set in rows and panels of 16 columns, and how many panels
   of B are packed at a time. */
#ifdef MOE__SIMD
enum { MOE__GEMM_ROWS = 8, MOE__GEMM_PANELS = 6, MOE__GEMM_PACKED = 3 };
#else
enum { MOE__GEMM_ROWS = 1, MOE__GEMM_PANELS = 1 };
#endif
enum { MOE__GEMM_SMALL = 1 << 18 }; /* multiply-adds below which threads cost more than they save */

static const float moe__gemm_zeros[16 * MOE__GEMM_PANELS] = {0};

/* Cache lines that a kernel call prefetches for later calls; moe__gemm_stripe and
   moe__gemm_gradient show which. A core can wait for ten or twenty lines at a time, and beyond that
   the kernel's own loads queue behind them. So prefetches are spread over the steps of a call. A
   step of 0 prefetches the same line again, which costs next to nothing. */
typedef struct moe__prefetch {
  const float *b; /* one line at each step of k, b_step floats apart: of a panel of the next
                     stripe */
  size_t b_step;
  const float *b2; /* two lines at every fourth step of packed operands, 4 b2_step floats apart */
  size_t b2_step;
  size_t bursts;  /* k is cut into so many equal parts; each begins with */
  const float *c; /* a row of the next block of C, into the first-level cache */
  size_t c_row;
  const float *later; /* and as many lines of what is needed later, into the second-level cache */
  size_t later_row;
} moe__prefetch;

/* The operands of a kernel: c(i, j) = start(i, j) + sum over p of a(i, p) b(p, j), for a fixed
   number of rows and of panels. Vector v of B at step p is at b + v b_panel + p b_step. */
typedef struct moe__gemm_block {
  float *c;
  size_t c_row;
  const float *start; /* what the sums begin with; may be c */
  size_t start_row;   /* 0: the same for every row */
  const float *a;
  size_t a_row, a_col;
  const float *b;
  size_t b_panel, b_step;
  size_t k;
  moe__prefetch next;
} moe__gemm_block;

typedef void (*moe__gemm_fn)(const moe__gemm_block *block);

typedef struct moe__gemm_kernels {
  moe__gemm_fn fn[MOE__GEMM_PANELS + 1]
                 [MOE__GEMM_ROWS + 1]; /* [panels][rows], NULL where there is none */
  int rows[MOE__GEMM_PANELS + 1];      /* most rows for so many panels */
  int panels;                          /* panels to take when there are many rows */
  /* panel[p * 16 + j] = src[j * ld + p] for j < width, else 0 */
  void (*pack_cols)(float *panel, const float *src, size_t ld, size_t width, size_t k);
  /* the same from src[p * ld + j], for up to 3 panels: width columns, panels 16 k floats apart */
  void (*pack_rows)(float *panel, const float *src, size_t ld, size_t width, size_t k);
  /* k rows of width floats; NULL in plain C */
  void (*copy_rows)(float *dst, size_t dst_ld, const float *src, size_t ld, size_t width, size_t k);
  /* y[j] = dot(x, w + j ld) + bias[j], 16-lane sums */
  void (*narrow)(float *y, const float *x, const float *w, size_t ld, size_t n, size_t k,
                 const float *bias);
  void (*narrow_panel)(float *y, const float *x, const float *panel, size_t n, size_t k,
                       const float *bias); /* the same, w packed */
  void (*gelu)(float *y, const float *x, size_t ld, size_t m,
               size_t n); /* m rows of n, both ld apart; y may be x */
  void (*gelu_backward)(float *dx, const float *dy, const float *x, size_t n);
  /* sum[j] += x[j], then x[ld + j], ... for k rows of n */
  void (*add_rows)(float *sum, const float *x, size_t ld, size_t n, size_t k);
} moe__gemm_kernels;

/* GELU by the upper tail of the normal distribution, for t = |x|: Q(t) = 1 - Phi(t) = e R(t), where
   e = exp(-t^2 / 2), so that the density is e / sqrt(2 pi), and R is a polynomial, fitted as those
   of >>simd:
     x Phi(x) = max(x, 0) - t Q(t)    slope: Phi(x) + x phi(x) = E(t) for x < 0, else 1 - E(t), E(t)
   = Q(t) - t phi(t) The largest errors are 1.1e-7 and 1.3e-7. Beyond t = 12 all is as at 12, where
   what is left is below 1e-25. */
#define MOE__GELU_END 12.0f
#define MOE__GELU_EXPONENT -0.721347511f /* -log2(e) / 2 */
#define MOE__GELU_DENSITY 0.398942292f   /* 1 / sqrt(2 pi) */
#define MOE__GELU11 -3.245913263e-07f
#define MOE__GELU10 7.894786904e-06f
#define MOE__GELU9 -8.640217857e-05f
#define MOE__GELU8 5.716482410e-04f
#define MOE__GELU7 -2.614206634e-03f
#define MOE__GELU6 9.050293826e-03f
#define MOE__GELU5 -2.552919649e-02f
#define MOE__GELU4 6.196843088e-02f
#define MOE__GELU3 -1.328263581e-01f
#define MOE__GELU2 2.499777079e-01f
#define MOE__GELU1 -3.989411592e-01f
#define MOE__POW6 1.546287967e-04f
#define MOE__POW5 1.339099486e-03f
#define MOE__POW4 9.618062526e-03f
#define MOE__POW3 5.550359562e-02f
#define MOE__POW2 2.402265072e-01f
#define MOE__POW1 6.931471825e-01f

/* 2^x for -126 <= x <= 127 */
static float moe__pow2f(float x) {
  float t = x + MOE__ROUND;
  float r = x - (t - MOE__ROUND);
  float p = moe__fmaf(MOE__POW6, r, MOE__POW5);
  p = moe__fmaf(p, r, MOE__POW4);
  p = moe__fmaf(p, r, MOE__POW3);
  p = moe__fmaf(p, r, MOE__POW2);
  p = moe__fmaf(p, r, MOE__POW1);
  p = moe__fmaf(p, r, 1.0f);
  return p * moe__floats((moe__bits(t) << 23) + 0x3f800000u);
}

/* GELU(x), and its slope unless slope is NULL */
static float moe__geluf(float x, float *slope) {
  float t = moe__minf(MOE__GELU_END, moe__floats(moe__bits(x) & 0x7fffffffu));
  float e = moe__pow2f((MOE__GELU_EXPONENT * t) * t);
  float r = moe__fmaf(MOE__GELU11, t, MOE__GELU10);
  r = moe__fmaf(r, t, MOE__GELU9);
  r = moe__fmaf(r, t, MOE__GELU8);
  r = moe__fmaf(r, t, MOE__GELU7);
  r = moe__fmaf(r, t, MOE__GELU6);
  r = moe__fmaf(r, t, MOE__GELU5);
  r = moe__fmaf(r, t, MOE__GELU4);
  r = moe__fmaf(r, t, MOE__GELU3);
  r = moe__fmaf(r, t, MOE__GELU2);
  r = moe__fmaf(r, t, MOE__GELU1);
  r = moe__fmaf(r, t, 0.5f);
  if (slope) {
    float lower = e * moe__fmaf(-t, MOE__GELU_DENSITY, r);
    *slope = x < 0.0f ? lower : 1.0f - lower;
  }
  return moe__fmaf(-t, e * r, moe__maxf(0.0f, x));
}

static void moe__scalar_pack_cols(float *panel, const float *src, size_t ld, size_t width,
                                  size_t k) {
  size_t p, j;
  for (p = 0; p < k; ++p)
    for (j = 0; j < 16; ++j) panel[p * 16 + j] = j < width ? src[j * ld + p] : 0.0f;
}

static void moe__scalar_pack_rows(float *panel, const float *src, size_t ld, size_t width,
                                  size_t k) {
  size_t p, j;
  for (p = 0; p < k; ++p)
    for (j = 0; j < (width + 15) / 16 * 16; ++j)
      panel[j / 16 * 16 * k + p * 16 + j % 16] = j < width ? src[p * ld + j] : 0.0f;
}

static void moe__scalar_narrow(float *y, const float *x, const float *w, size_t ld, size_t n,
                               size_t k, const float *bias) {
  size_t j;
  for (j = 0; j < n; ++j) {
    float sum = moe__scalar_row_dot(x, w + j * ld, k);
    y[j] = bias ? sum + bias[j] : sum;
  }
}

static void moe__scalar_narrow_panel(float *y, const float *x, const float *panel, size_t n,
                                     size_t k, const float *bias) {
  size_t j, p, padded = (k + 15) / 16 * 16;
  for (j = 0; j < n; ++j) {
    float lane[16] = {0}, sum;
    for (p = 0; p < padded; ++p)
      lane[p % 16] = moe__fmaf(p < k ? x[p] : 0.0f, p < k ? panel[p * 16 + j] : 0.0f, lane[p % 16]);
    sum = moe__tree16(lane);
    y[j] = bias ? sum + bias[j] : sum;
  }
}

static void moe__scalar_gelu(float *y, const float *x, size_t ld, size_t m, size_t n) {
  size_t i, j;
  for (i = 0; i < m; ++i)
    for (j = 0; j < n; ++j) y[i * ld + j] = moe__geluf(x[i * ld + j], NULL);
}

#ifndef MOE_NO_TRAIN
static void moe__scalar_gelu_backward(float *dx, const float *dy, const float *x, size_t n) {
  float slope;
  size_t i;
  for (i = 0; i < n; ++i) {
    moe__geluf(x[i], &slope);
    dx[i] = moe__fmaf(dy[i], slope, dx[i]);
  }
}

static void moe__scalar_add_rows(float *sum, const float *x, size_t ld, size_t n, size_t k) {
  size_t p, j;
  for (p = 0; p < k; ++p)
    for (j = 0; j < n; ++j) sum[j] += x[p * ld + j];
}
#endif

/* The definition, in plain C: one row and up to 16 columns, whose chains run side by side. Element
   j of B at step p lies at b[p b_step + j b_col]. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 8 && defined(MOE__FUSED)
#define MOE__UNROLL _Pragma("GCC unroll 16") /* sums in registers; clang does so by itself */
#else
#define MOE__UNROLL
#endif
#define MOE__CHAINS(name, fma)                                                                     \
  static void name(float *c, const float *start, const float *a, size_t a_col, const float *b,     \
                   size_t b_step, size_t b_col, size_t k, size_t columns) {                        \
    float sum[16];                                                                                 \
    size_t j, p;                                                                                   \
    if (columns == 16 && b_col == 1) {                                                             \
      float s[16];                                                                                 \
      MOE__UNROLL for (j = 0; j < 16; ++j) s[j] = start[j];                                        \
      for (p = 0; p < k; ++p, a += a_col, b += b_step) {                                           \
        float factor = *a;                                                                         \
        MOE__UNROLL for (j = 0; j < 16; ++j) s[j] = fma(factor, b[j], s[j]);                       \
      }                                                                                            \
      MOE__UNROLL for (j = 0; j < 16; ++j) c[j] = s[j];                                            \
      return;                                                                                      \
    }                                                                                              \
    for (j = 0; j < columns; ++j) sum[j] = start[j];                                               \
    for (p = 0; p < k; ++p)                                                                        \
      for (j = 0; j < columns; ++j) sum[j] = fma(a[p * a_col], b[p * b_step + j * b_col], sum[j]); \
    for (j = 0; j < columns; ++j) c[j] = sum[j];                                                   \
  }
#ifdef MOE__FINDS_FMA
MOE__CHAINS(moe__exact_chains, moe__fmaf)
MOE__TARGET("fma")
MOE__CHAINS(moe__fused_chains, __builtin_fmaf)
static void moe__plain_chains(float *c, const float *start, const float *a, size_t a_col,
                              const float *b, size_t b_step, size_t b_col, size_t k,
                              size_t columns) {
  (__builtin_cpu_supports("fma") ? moe__fused_chains : moe__exact_chains)(
      c, start, a, a_col, b, b_step, b_col, k, columns);
}
#else
MOE__CHAINS(moe__plain_chains, moe__fmaf)
#endif
#undef MOE__CHAINS

/* Address of B at step 0 and column j, a multiple of 16, and its strides as above. */
static const float *moe__plain_b(const moe__gemm *g, size_t j, size_t *b_step, size_t *b_col) {
  *b_step = g->b_layout == MOE__B_COLS ? 1 : g->b_layout == MOE__B_ROWS ? g->b_row : 16;
  *b_col = g->b_layout == MOE__B_COLS ? g->b_row : 1;
  return g->b + j * (g->b_layout == MOE__B_PANELS ? (size_t)g->k : *b_col);
}

/* Rows i0 .. i1-1 and columns j0 .. j1-1 of a product, j0 a multiple of 16: in plain C nothing
   needs to be packed or copied. */
static void moe__plain_gemm(const moe__gemm *g, size_t i0, size_t i1, size_t j0, size_t j1) {
  size_t i, j, columns, b_step, b_col;
  for (j = j0; j < j1; j += columns) {
    const float *b = moe__plain_b(g, j, &b_step, &b_col);
    columns = j1 - j < 16 ? j1 - j : 16;
    for (i = i0; i < i1; ++i) {
      float *c = g->c + i * g->c_row + j;
      const float *start = g->accumulate ? c : g->bias ? g->bias + j : moe__gemm_zeros;
      moe__plain_chains(c, start, g->a + i * g->a_row, g->a_col, b, b_step, b_col, (size_t)g->k,
                        columns);
      if (g->gelu) moe__scalar_gelu(g->gelu + i * g->c_row + j, c, g->c_row, 1, columns);
    }
  }
}

/* The same as a kernel of one row and one panel, for attention's blocks. */
static void moe__scalar_gemm_1x1(const moe__gemm_block *x) {
  moe__plain_chains(x->c, x->start, x->a, x->a_col, x->b, x->b_step, 1, x->k, 16);
}

/* clang-format off */
static const moe__gemm_kernels moe__scalar_gemms = {
    {{NULL}, {NULL, moe__scalar_gemm_1x1}}, {0, 1}, 1, moe__scalar_pack_cols, moe__scalar_pack_rows,
    NULL, moe__scalar_narrow, moe__scalar_narrow_panel, moe__scalar_gelu,
    MOE__OF_TRAINING(moe__scalar_gelu_backward), MOE__OF_TRAINING(moe__scalar_add_rows)};
/* clang-format on */

/* ---- kernels of products for each instruction set ---- >>gemm_simd */

#ifdef MOE__SIMD
/* A kernel of R rows and P panels holds R P vectors of C in registers, as moe__plain_chains holds
   16 sums; each step of k loads P vectors of B and broadcasts R elements of A. Two pointers each
   reach all rows and panels, which suits the addressing modes: row 4 is a4[0]. */
#define MOE__A0 a[0]
#define MOE__A1 a[a_row]
#define MOE__A2 a[a_row * 2]
#define MOE__A3 a[a_row3]
#define MOE__A4 a4[0]
#define MOE__A5 a4[a_row]
#define MOE__A6 a4[a_row * 2]
#define MOE__A7 a4[a_row3]
#define MOE__B0 b
#define MOE__B1 b + b_panel
#define MOE__B2 b + b_panel * 2
#define MOE__B3 b3
#define MOE__B4 b3 + b_panel
#define MOE__B5 b3 + b_panel * 2
/* X(S, P, i) for each row i, X(S, i, v) for each panel v */
#define MOE__EACH_ROW1(X, S, P) X(S, P, 0)
#define MOE__EACH_ROW2(X, S, P) MOE__EACH_ROW1(X, S, P) X(S, P, 1)
#define MOE__EACH_ROW3(X, S, P) MOE__EACH_ROW2(X, S, P) X(S, P, 2)
#define MOE__EACH_ROW4(X, S, P) MOE__EACH_ROW3(X, S, P) X(S, P, 3)
#define MOE__EACH_ROW5(X, S, P) MOE__EACH_ROW4(X, S, P) X(S, P, 4)
#define MOE__EACH_ROW6(X, S, P) MOE__EACH_ROW5(X, S, P) X(S, P, 5)
#define MOE__EACH_ROW7(X, S, P) MOE__EACH_ROW6(X, S, P) X(S, P, 6)
#define MOE__EACH_ROW8(X, S, P) MOE__EACH_ROW7(X, S, P) X(S, P, 7)
#define MOE__EACH_PANEL1(X, S, i) X(S, i, 0)
#define MOE__EACH_PANEL2(X, S, i) MOE__EACH_PANEL1(X, S, i) X(S, i, 1)
#define MOE__EACH_PANEL3(X, S, i) MOE__EACH_PANEL2(X, S, i) X(S, i, 2)
#define MOE__EACH_PANEL4(X, S, i) MOE__EACH_PANEL3(X, S, i) X(S, i, 3)
#define MOE__EACH_PANEL5(X, S, i) MOE__EACH_PANEL4(X, S, i) X(S, i, 4)
#define MOE__EACH_PANEL6(X, S, i) MOE__EACH_PANEL5(X, S, i) X(S, i, 5)

/* The kernels of P panels with 1, 2, ... rows: their definitions by the macro K, and their names
   for a table. */
#define MOE__KERNELS2(K, S, T, P) K(S, T, 1, P) K(S, T, 2, P)
#define MOE__KERNELS4(K, S, T, P) MOE__KERNELS2(K, S, T, P) K(S, T, 3, P) K(S, T, 4, P)
#define MOE__KERNELS6(K, S, T, P) MOE__KERNELS4(K, S, T, P) K(S, T, 5, P) K(S, T, 6, P)
#define MOE__KERNELS8(K, S, T, P) MOE__KERNELS6(K, S, T, P) K(S, T, 7, P) K(S, T, 8, P)
#define MOE__NAMES2(N, P) N##_1x##P, N##_2x##P
#define MOE__NAMES4(N, P) MOE__NAMES2(N, P), N##_3x##P, N##_4x##P
#define MOE__NAMES6(N, P) MOE__NAMES4(N, P), N##_5x##P, N##_6x##P
#define MOE__NAMES8(N, P) MOE__NAMES6(N, P), N##_7x##P, N##_8x##P

#define MOE__C_START(S, i, v) S##_f c##i##v = S##_load(start + i * start_row + 16 * v);
#define MOE__C_STEP(S, i, v) c##i##v = MOE__CHAIN_##S(s, row##v, c##i##v);
#define MOE__CHAIN_moe__avx2 moe__avx2_fma
#define MOE__CHAIN_moe__avx512 moe__avx512_fma
#ifdef MOE__RVV /* its multiply-add takes a scalar, so s needs no registers */
#define MOE__CHAIN_moe__v128(s, row, c) ((void)(s), __riscv_vfmacc_vf_f32m4(c, element, row, 16))
#elif defined(MOE__Q_FMA)
#define MOE__CHAIN_moe__v128 moe__v128_fma
#else
#define MOE__CHAIN_moe__v128 moe__v128_chain
#endif
#define MOE__C_STORE(S, i, v) S##_store(c + i * c_row + 16 * v, c##i##v);
#define MOE__B_LOAD(S, i, v) S##_f row##v = S##_load(MOE__B##v + of_b);
#define MOE__ROW_START(S, P, i) MOE__EACH_PANEL##P(MOE__C_START, S, i)
#define MOE__ROW_STORE(S, P, i) MOE__EACH_PANEL##P(MOE__C_STORE, S, i)
#define MOE__ROW_STEP(S, P, i)                                                                     \
  {                                                                                                \
    const float element = (&MOE__A##i)[of_a];                                                      \
    S##_f s = S##_set(element);                                                                    \
    MOE__EACH_PANEL##P(MOE__C_STEP, S, i)                                                          \
  }
#define MOE__GEMM_STEP(S, R, P, ahead_a, ahead_b, at)                                              \
  {                                                                                                \
    const size_t of_a = ahead_a, of_b = ahead_b;                                                   \
    MOE__EACH_PANEL##P(MOE__B_LOAD, S, 0) MOE__PREFETCH(at);                                       \
    MOE__EACH_ROW##R(MOE__ROW_STEP, S, P)                                                          \
  }
#define MOE__PREFETCH_BURST(P)                                                                     \
  MOE__PREFETCH_NEAR(next_c);                                                                      \
  if (P > 1) MOE__PREFETCH_NEAR(next_c + 16);                                                      \
  if (P > 2) MOE__PREFETCH_NEAR(next_c + 32);                                                      \
  MOE__PREFETCH(later);                                                                            \
  if (P > 1) MOE__PREFETCH(later + 16);                                                            \
  if (P > 2) MOE__PREFETCH(later + 32);                                                            \
  next_c += x->next.c_row;                                                                         \
  later += x->next.later_row;
#define MOE__GEMM_KERNEL(S, T, R, P)                                                               \
  T static void S##_gemm_##R##x##P(const moe__gemm_block *x) {                                     \
    float *c = x->c;                                                                               \
    const float *start = x->start, *a = x->a, *b = x->b, *next_b = x->next.b;                      \
    const float *next_b2 = x->next.b2, *next_c = x->next.c, *later = x->next.later;                \
    size_t c_row = x->c_row, start_row = x->start_row, a_row = x->a_row, a_row3 = 3 * a_row;       \
    size_t a_col = x->a_col, b_panel = x->b_panel, b_step = x->b_step, k = x->k, burst, steps;     \
    size_t next_step = x->next.b_step, next_step2 = x->next.b2_step;                               \
    const float *a4 = R > 4 ? a + 4 * a_row : a, *b3 = P > 3 ? b + 3 * b_panel : b;                \
    MOE__EACH_ROW##R(MOE__ROW_START, S, P) for (burst = x->next.bursts; burst > 0; --burst) {      \
      MOE__PREFETCH_BURST(P)                                                                       \
      steps = burst > 1 ? k / burst & ~(size_t)3 : k;                                              \
      k -= steps;                                                                                  \
      if (b_step == 16 && a_col == 1) /* packed: constants instead of additions spare loads */     \
        for (; steps >= 4; steps -= 4) {                                                           \
          MOE__GEMM_STEP(S, R, P, 0, 0, next_b)                                                    \
          MOE__GEMM_STEP(S, R, P, 1, 16, next_b + next_step)                                       \
          MOE__GEMM_STEP(S, R, P, 2, 32, next_b + 2 * next_step)                                   \
          MOE__GEMM_STEP(S, R, P, 3, 48, next_b + 3 * next_step)                                   \
          MOE__PREFETCH(next_b2);                                                                  \
          MOE__PREFETCH(next_b2 + 16);                                                             \
          a += 4;                                                                                  \
          a4 += 4;                                                                                 \
          b += 64;                                                                                 \
          b3 += 64;                                                                                \
          next_b += 4 * next_step;                                                                 \
          next_b2 += 4 * next_step2;                                                               \
        }                                                                                          \
      for (; steps > 0; --steps) {                                                                 \
        MOE__GEMM_STEP(S, R, P, 0, 0, next_b)                                                      \
        a += a_col;                                                                                \
        a4 += a_col;                                                                               \
        b += b_step;                                                                               \
        b3 += b_step;                                                                              \
        next_b += next_step;                                                                       \
      }                                                                                            \
    }                                                                                              \
    MOE__EACH_ROW##R(MOE__ROW_STORE, S, P)(void) c_row, (void)start_row, (void)a_row3, (void)a4,   \
        (void)b3, (void)b_panel;                                                                   \
  }

#ifdef MOE__X86
/* 8 rows of 8 floats to 8 columns, for pack_cols; rows from `width` on count as zeros. */
#define MOE__LOAD_ROW(j)                                                                           \
  (first + j < width ? _mm256_loadu_ps(src + (first + j) * ld + p) : _mm256_setzero_ps())
MOE__T_AVX2 static void moe__avx2_transpose8(float *panel, const float *src, size_t ld,
                                             size_t first, size_t width, size_t p) {
  __m256 r0 = MOE__LOAD_ROW(0), r1 = MOE__LOAD_ROW(1), r2 = MOE__LOAD_ROW(2), r3 = MOE__LOAD_ROW(3);
  __m256 r4 = MOE__LOAD_ROW(4), r5 = MOE__LOAD_ROW(5), r6 = MOE__LOAD_ROW(6), r7 = MOE__LOAD_ROW(7);
  __m256 s0 = _mm256_unpacklo_ps(r0, r1), s1 = _mm256_unpackhi_ps(r0, r1);
  __m256 s2 = _mm256_unpacklo_ps(r2, r3), s3 = _mm256_unpackhi_ps(r2, r3);
  __m256 s4 = _mm256_unpacklo_ps(r4, r5), s5 = _mm256_unpackhi_ps(r4, r5);
  __m256 s6 = _mm256_unpacklo_ps(r6, r7), s7 = _mm256_unpackhi_ps(r6, r7);
  float *d = panel + p * 16 + first;
  r0 = _mm256_shuffle_ps(s0, s2, 0x44);
  r1 = _mm256_shuffle_ps(s0, s2, 0xee);
  r2 = _mm256_shuffle_ps(s1, s3, 0x44);
  r3 = _mm256_shuffle_ps(s1, s3, 0xee);
  r4 = _mm256_shuffle_ps(s4, s6, 0x44);
  r5 = _mm256_shuffle_ps(s4, s6, 0xee);
  r6 = _mm256_shuffle_ps(s5, s7, 0x44);
  r7 = _mm256_shuffle_ps(s5, s7, 0xee);
  _mm256_storeu_ps(d, _mm256_permute2f128_ps(r0, r4, 0x20));
  _mm256_storeu_ps(d + 16, _mm256_permute2f128_ps(r1, r5, 0x20));
  _mm256_storeu_ps(d + 32, _mm256_permute2f128_ps(r2, r6, 0x20));
  _mm256_storeu_ps(d + 48, _mm256_permute2f128_ps(r3, r7, 0x20));
  _mm256_storeu_ps(d + 64, _mm256_permute2f128_ps(r0, r4, 0x31));
  _mm256_storeu_ps(d + 80, _mm256_permute2f128_ps(r1, r5, 0x31));
  _mm256_storeu_ps(d + 96, _mm256_permute2f128_ps(r2, r6, 0x31));
  _mm256_storeu_ps(d + 112, _mm256_permute2f128_ps(r3, r7, 0x31));
}
#undef MOE__LOAD_ROW

MOE__T_AVX2 static void moe__avx2_pack_cols(float *panel, const float *src, size_t ld, size_t width,
                                            size_t k) {
  size_t p;
  for (p = 0; p + 8 <= k; p += 8) {
    moe__avx2_transpose8(panel, src, ld, 0, width, p);
    moe__avx2_transpose8(panel, src, ld, 8, width, p);
  }
  moe__scalar_pack_cols(panel + p * 16, src + p, ld, width, k - p);
}
#endif

#ifdef MOE__Q
/* 4 rows of 4 floats to 4 columns, for pack_cols; rows from `width` on count as zeros. */
#if defined(MOE__WASM)
#define MOE__Q_ZIP1(x, y) wasm_i32x4_shuffle(x, y, 0, 4, 1, 5)
#define MOE__Q_ZIP2(x, y) wasm_i32x4_shuffle(x, y, 2, 6, 3, 7)
#else
#define MOE__Q_ZIP1 MOE__Q(vzip1q_f32, _mm_unpacklo_ps, )
#define MOE__Q_ZIP2 MOE__Q(vzip2q_f32, _mm_unpackhi_ps, )
#endif
#define MOE__LOAD_ROW(j) MOE__Q_LOAD(first + j < width ? src + (first + j) * ld + p : zeros)
static void moe__v128_transpose4(float *panel, const float *src, size_t ld, size_t first,
                                 size_t width, size_t p) {
  static const float zeros[4] = {0};
  moe__q r0 = MOE__LOAD_ROW(0), r1 = MOE__LOAD_ROW(1), r2 = MOE__LOAD_ROW(2), r3 = MOE__LOAD_ROW(3);
  moe__q even02 = MOE__Q_ZIP1(r0, r2), odd02 = MOE__Q_ZIP2(r0, r2); /* 00 20 01 21, 02 22 03 23 */
  moe__q even13 = MOE__Q_ZIP1(r1, r3), odd13 = MOE__Q_ZIP2(r1, r3);
  float *d = panel + p * 16 + first;
  MOE__Q_STORE(d, MOE__Q_ZIP1(even02, even13));
  MOE__Q_STORE(d + 16, MOE__Q_ZIP2(even02, even13));
  MOE__Q_STORE(d + 32, MOE__Q_ZIP1(odd02, odd13));
  MOE__Q_STORE(d + 48, MOE__Q_ZIP2(odd02, odd13));
}
#undef MOE__LOAD_ROW

static void moe__v128_pack_cols(float *panel, const float *src, size_t ld, size_t width, size_t k) {
  size_t p, first;
  for (p = 0; p + 4 <= k; p += 4)
    for (first = 0; first < 16; first += 4) moe__v128_transpose4(panel, src, ld, first, width, p);
  moe__scalar_pack_cols(panel + p * 16, src + p, ld, width, k - p);
}
#elif defined(MOE__RVV)
static void moe__v128_pack_cols(float *panel, const float *src, size_t ld, size_t width, size_t k) {
  for (; k > 0; --k, ++src, panel += 16)
    moe__v128_store(panel, __riscv_vlse32_v_f32m4_tu(moe__v128_set(0.0f), src,
                                                     (ptrdiff_t)(ld * sizeof *src), width));
}
#endif

#ifdef MOE__RVV /* no arrays of its vectors */
static void moe__v128_narrow_panel(float *y, const float *x, const float *panel, size_t n, size_t k,
                                   const float *bias) {
  moe__scalar_narrow_panel(y, x, panel, n, k, bias);
}
#else
#define MOE__NARROW_PANEL(S, T)                                                                    \
  T static void S##_narrow_panel(float *y, const float *x, const float *panel, size_t n, size_t k, \
                                 const float *bias) {                                              \
    S##_f lane[16]; /* vectors over the outputs, one for each lane of the sum */                   \
    size_t l, p;                                                                                   \
    for (l = 0; l < 16; ++l) lane[l] = S##_set(0.0f);                                              \
    for (p = 0; p < k; p += 16)                                                                    \
      for (l = 0; l < 16; ++l)                                                                     \
        lane[l] = p + l < k ? S##_fma(S##_set(x[p + l]), S##_load(panel + (p + l) * 16), lane[l])  \
                            : S##_fma(S##_set(0.0f), S##_set(0.0f), lane[l]);                      \
    for (p = 8; p > 0; p /= 2)                                                                     \
      for (l = 0; l < p; ++l) lane[l] = S##_add(lane[l], lane[l + p]);                             \
    if (bias) lane[0] = S##_add(lane[0], S##_loadn(bias, n));                                      \
    S##_storen(y, lane[0], n);                                                                     \
  }
MOE__V_STAMP(MOE__NARROW_PANEL)
#undef MOE__NARROW_PANEL
#endif

#define MOE__GEMM_HELPERS(S, T)                                                                    \
  T static void S##_pack_rows(float *panel, const float *src, size_t ld, size_t width, size_t k) { \
    float *second = panel + 16 * k, *third = second + 16 * k;                                      \
    size_t p, v;                                                                                   \
    if (width == 48)                                                                               \
      for (p = 0; p < k; ++p, src += ld) {                                                         \
        S##_store(panel + p * 16, S##_load(src));                                                  \
        S##_store(second + p * 16, S##_load(src + 16));                                            \
        S##_store(third + p * 16, S##_load(src + 32));                                             \
      }                                                                                            \
    else                                                                                           \
      for (v = 0; v < width; v += 16)                                                              \
        for (p = 0; p < k; ++p)                                                                    \
          S##_store(panel + v * k + p * 16,                                                        \
                    S##_loadn(src + p * ld + v, width - v < 16 ? width - v : 16));                 \
  }                                                                                                \
  T static void S##_copy_rows(float *dst, size_t dst_ld, const float *src, size_t ld,              \
                              size_t width, size_t k) {                                            \
    for (; k > 0; --k, dst += dst_ld, src += ld) {                                                 \
      size_t j = 0;                                                                                \
      for (; j + 16 <= width; j += 16) S##_store(dst + j, S##_load(src + j));                      \
      if (j < width) S##_storen(dst + j, S##_loadn(src + j, width - j), width - j);                \
    }                                                                                              \
  }                                                                                                \
  T static void S##_narrow(float *y, const float *x, const float *w, size_t ld, size_t n,          \
                           size_t k, const float *bias) {                                          \
    size_t j = 0, p, i;                                                                            \
    for (; j + 4 <= n; j += 4) {                                                                   \
      const float *w0 = w + j * ld, *w1 = w0 + ld, *w2 = w1 + ld, *w3 = w2 + ld;                   \
      S##_f s0 = S##_set(0.0f), s1 = s0, s2 = s0, s3 = s0;                                         \
      for (p = 0; p + 16 <= k; p += 16) {                                                          \
        S##_f v = S##_load(x + p);                                                                 \
        s0 = S##_fma(v, S##_load(w0 + p), s0);                                                     \
        s1 = S##_fma(v, S##_load(w1 + p), s1);                                                     \
        s2 = S##_fma(v, S##_load(w2 + p), s2);                                                     \
        s3 = S##_fma(v, S##_load(w3 + p), s3);                                                     \
      }                                                                                            \
      if (p < k) {                                                                                 \
        S##_f v = S##_loadn(x + p, k - p);                                                         \
        s0 = S##_fma(v, S##_loadn(w0 + p, k - p), s0);                                             \
        s1 = S##_fma(v, S##_loadn(w1 + p, k - p), s1);                                             \
        s2 = S##_fma(v, S##_loadn(w2 + p, k - p), s2);                                             \
        s3 = S##_fma(v, S##_loadn(w3 + p, k - p), s3);                                             \
      }                                                                                            \
      y[j] = S##_sum(s0);                                                                          \
      y[j + 1] = S##_sum(s1);                                                                      \
      y[j + 2] = S##_sum(s2);                                                                      \
      y[j + 3] = S##_sum(s3);                                                                      \
    }                                                                                              \
    for (; j < n; ++j) y[j] = S##_row_dot(x, w + j * ld, k);                                       \
    if (bias)                                                                                      \
      for (i = 0; i < n; ++i) y[i] = y[i] + bias[i];                                               \
  }                                                                                                \
  T MOE__INLINE S##_f S##_pow2(S##_f x) {                                                          \
    S##_f t = S##_add(x, S##_set(MOE__ROUND));                                                     \
    S##_f r = S##_sub(x, S##_sub(t, S##_set(MOE__ROUND)));                                         \
    S##_f p = S##_fma(S##_set(MOE__POW6), r, S##_set(MOE__POW5));                                  \
    p = S##_fma(p, r, S##_set(MOE__POW4));                                                         \
    p = S##_fma(p, r, S##_set(MOE__POW3));                                                         \
    p = S##_fma(p, r, S##_set(MOE__POW2));                                                         \
    p = S##_fma(p, r, S##_set(MOE__POW1));                                                         \
    p = S##_fma(p, r, S##_set(1.0f));                                                              \
    return S##_mul(p, S##_floats(S##_iadd(S##_ishl(S##_bits(t), 23), S##_iset(0x3f800000u))));     \
  }                                                                                                \
  T MOE__INLINE S##_f S##_gelu16(S##_f x, S##_f *slope) {                                          \
    S##_f t = S##_min(S##_set(MOE__GELU_END), S##_abs(x));                                         \
    S##_f e = S##_pow2(S##_mul(S##_mul(S##_set(MOE__GELU_EXPONENT), t), t));                       \
    S##_f r = S##_fma(S##_set(MOE__GELU11), t, S##_set(MOE__GELU10));                              \
    r = S##_fma(r, t, S##_set(MOE__GELU9));                                                        \
    r = S##_fma(r, t, S##_set(MOE__GELU8));                                                        \
    r = S##_fma(r, t, S##_set(MOE__GELU7));                                                        \
    r = S##_fma(r, t, S##_set(MOE__GELU6));                                                        \
    r = S##_fma(r, t, S##_set(MOE__GELU5));                                                        \
    r = S##_fma(r, t, S##_set(MOE__GELU4));                                                        \
    r = S##_fma(r, t, S##_set(MOE__GELU3));                                                        \
    r = S##_fma(r, t, S##_set(MOE__GELU2));                                                        \
    r = S##_fma(r, t, S##_set(MOE__GELU1));                                                        \
    r = S##_fma(r, t, S##_set(0.5f));                                                              \
    if (slope) {                                                                                   \
      S##_f lower = S##_mul(e, S##_fnma(t, S##_set(MOE__GELU_DENSITY), r));                        \
      *slope = S##_sel(S##_lt(x, S##_set(0.0f)), lower, S##_sub(S##_set(1.0f), lower));            \
    }                                                                                              \
    return S##_fnma(t, S##_mul(e, r), S##_max(S##_set(0.0f), x));                                  \
  }                                                                                                \
  T static void S##_gelu(float *y, const float *x, size_t ld, size_t m, size_t n) {                \
    for (; m > 0; --m, x += ld, y += ld) {                                                         \
      size_t i = 0;                                                                                \
      for (; i + 16 <= n; i += 16) S##_store(y + i, S##_gelu16(S##_load(x + i), NULL));            \
      if (i < n) S##_storen(y + i, S##_gelu16(S##_loadn(x + i, n - i), NULL), n - i);              \
    }                                                                                              \
  }                                                                                                \
  T static void S##_gelu_backward(float *dx, const float *dy, const float *x, size_t n) {          \
    S##_f slope;                                                                                   \
    size_t i = 0, r;                                                                               \
    for (; i + 16 <= n; i += 16) {                                                                 \
      S##_gelu16(S##_load(x + i), &slope);                                                         \
      S##_store(dx + i, S##_fma(S##_load(dy + i), slope, S##_load(dx + i)));                       \
    }                                                                                              \
    r = n - i;                                                                                     \
    if (r == 0) return;                                                                            \
    S##_gelu16(S##_loadn(x + i, r), &slope);                                                       \
    S##_storen(dx + i, S##_fma(S##_loadn(dy + i, r), slope, S##_loadn(dx + i, r)), r);             \
  }                                                                                                \
  T static void S##_add_rows(float *sum, const float *x, size_t ld, size_t n, size_t k) {          \
    size_t j = 0, p;                                                                               \
    for (; j + 64 <= n; j += 64) {                                                                 \
      S##_f s0 = S##_load(sum + j), s1 = S##_load(sum + j + 16), s2 = S##_load(sum + j + 32),      \
            s3 = S##_load(sum + j + 48);                                                           \
      const float *row = x + j;                                                                    \
      for (p = 0; p < k; ++p, row += ld) {                                                         \
        s0 = S##_add(s0, S##_load(row));                                                           \
        s1 = S##_add(s1, S##_load(row + 16));                                                      \
        s2 = S##_add(s2, S##_load(row + 32));                                                      \
        s3 = S##_add(s3, S##_load(row + 48));                                                      \
      }                                                                                            \
      S##_store(sum + j, s0);                                                                      \
      S##_store(sum + j + 16, s1);                                                                 \
      S##_store(sum + j + 32, s2);                                                                 \
      S##_store(sum + j + 48, s3);                                                                 \
    }                                                                                              \
    for (; j < n; j += 16) {                                                                       \
      size_t width = n - j < 16 ? n - j : 16;                                                      \
      S##_f s = S##_loadn(sum + j, width);                                                         \
      for (p = 0; p < k; ++p) s = S##_add(s, S##_loadn(x + p * ld + j, width));                    \
      S##_storen(sum + j, s, width);                                                               \
    }                                                                                              \
  }
MOE__V_STAMP(MOE__GEMM_HELPERS)
#undef MOE__GEMM_HELPERS

#ifdef MOE__X86
/* 32 registers: 8 x 48, or 4 x 96 for few rows, where the chains of three panels would be too few
   to keep the units busy */
MOE__KERNELS8(MOE__GEMM_KERNEL, moe__avx512, MOE__T_AVX512, 1)
MOE__KERNELS8(MOE__GEMM_KERNEL, moe__avx512, MOE__T_AVX512, 2)
MOE__KERNELS8(MOE__GEMM_KERNEL, moe__avx512, MOE__T_AVX512, 3)
MOE__KERNELS4(MOE__GEMM_KERNEL, moe__avx512, MOE__T_AVX512, 6)
/* 16 registers: 6 x 16 (two registers a panel), 3 x 32, 2 x 48 */
MOE__KERNELS6(MOE__GEMM_KERNEL, moe__avx2, MOE__T_AVX2, 1)
MOE__KERNELS2(MOE__GEMM_KERNEL, moe__avx2, MOE__T_AVX2, 2)
MOE__GEMM_KERNEL(moe__avx2, MOE__T_AVX2, 3, 2)
MOE__KERNELS2(MOE__GEMM_KERNEL, moe__avx2, MOE__T_AVX2, 3)

/* clang-format off */
static const moe__gemm_kernels moe__avx512_gemms = {
    {{NULL}, {NULL, MOE__NAMES8(moe__avx512_gemm, 1)}, {NULL, MOE__NAMES8(moe__avx512_gemm, 2)},
    {NULL, MOE__NAMES8(moe__avx512_gemm, 3)}, {NULL}, {NULL},
    {NULL, MOE__NAMES4(moe__avx512_gemm, 6)}}, {0, 8, 8, 8, 0, 0, 4}, 3, moe__avx2_pack_cols,
    moe__avx512_pack_rows, moe__avx512_copy_rows, moe__avx512_narrow, moe__avx512_narrow_panel,
    moe__avx512_gelu, moe__avx512_gelu_backward, moe__avx512_add_rows};
static const moe__gemm_kernels moe__avx2_gemms = {
    {{NULL}, {NULL, MOE__NAMES6(moe__avx2_gemm, 1)},
    {NULL, MOE__NAMES2(moe__avx2_gemm, 2), moe__avx2_gemm_3x2},
    {NULL, MOE__NAMES2(moe__avx2_gemm, 3)}, {NULL}, {NULL}, {NULL}}, {0, 6, 3, 2, 0, 0, 0}, 1,
    moe__avx2_pack_cols, moe__avx2_pack_rows, moe__avx2_copy_rows, moe__avx2_narrow,
    moe__avx2_narrow_panel, moe__avx2_gelu, moe__avx2_gelu_backward, moe__avx2_add_rows};
/* clang-format on */
#endif

#ifdef MOE__Q_FMA
/* 32 registers, four a panel: 6 x 16, and for 1 or 2 rows 1 x 48 and 2 x 32 */
MOE__KERNELS6(MOE__GEMM_KERNEL, moe__v128, MOE__T_V128, 1)
MOE__KERNELS2(MOE__GEMM_KERNEL, moe__v128, MOE__T_V128, 2)
MOE__GEMM_KERNEL(moe__v128, MOE__T_V128, 1, 3)
#define MOE__V128_GEMMS                                                                            \
  {{NULL},                                                                                         \
   {NULL, MOE__NAMES6(moe__v128_gemm, 1)},                                                         \
   {NULL, MOE__NAMES2(moe__v128_gemm, 2)},                                                         \
   {NULL, moe__v128_gemm_1x3}},                                                                    \
  {                                                                                                \
    0, 6, 2, 1                                                                                     \
  }
#else
MOE__KERNELS2(MOE__GEMM_KERNEL, moe__v128, MOE__T_V128, 1)
#define MOE__V128_GEMMS                                                                            \
  {{NULL}, {NULL, MOE__NAMES2(moe__v128_gemm, 1)}}, { 0, 2 }
#endif
static const moe__gemm_kernels moe__v128_gemms = {MOE__V128_GEMMS,         1,
                                                  moe__v128_pack_cols,     moe__v128_pack_rows,
                                                  moe__v128_copy_rows,     moe__v128_narrow,
                                                  moe__v128_narrow_panel,  moe__v128_gelu,
                                                  moe__v128_gelu_backward, moe__v128_add_rows};
#undef MOE__GEMM_KERNEL
#undef MOE__PREFETCH_BURST
#endif

/* ---- a product in tiles and blocks; few outputs ---- >>gemm_blocks */

/* How many of the `left` panels the next kernels take, in a tile of m rows; `most` at most. */
static int moe__gemm_width(const moe__gemm_kernels *kernels, int32_t m, int32_t left, int most) {
  int width = MOE__GEMM_PANELS;
  while (width > kernels->panels && kernels->rows[width] < m)
    --width; /* few rows: wider, for enough chains */
  if (width > most) width = most;
  if (width > left) width = (int)left;
  while (!kernels->rows[width]) --width;
  return width == 3 && left == 4 ? 2 : width;
}

/* Prefetches nothing but the line at `at`, again and again. */
static moe__prefetch moe__prefetch_none(const float *at) {
  moe__prefetch next;
  next.b = next.b2 = next.c = at;
  next.later = moe__gemm_zeros;
  next.b_step = next.b2_step = next.c_row = next.later_row = 0;
  next.bursts = 1;
  return next;
}

/* A block of C at the right edge, whose last panel is not full: computed in a buffer, so that
   nothing beyond the edge is read or written. */
static void moe__gemm_edge(moe__gemm_fn fn, const moe__gemm_block *block, size_t rows,
                           size_t columns, int width) {
  float edge[MOE__GEMM_ROWS * 16 * MOE__GEMM_PANELS];
  moe__gemm_block inner = *block;
  size_t row = 16 * (size_t)width, i;
  memset(edge, 0, sizeof(float) * rows * row);
  for (i = 0; i < rows; ++i)
    memcpy(edge + i * row, block->start + i * block->start_row, sizeof(float) * columns);
  inner.c = edge;
  inner.start = edge;
  inner.c_row = inner.start_row = row;
  fn(&inner);
  for (i = 0; i < rows; ++i)
    memcpy(block->c + i * block->c_row, edge + i * row, sizeof(float) * columns);
}

/* A product with a weight of fewer than 16 outputs. */
static void moe__gemm_narrow(const moe__gemm *g, const moe__gemm_kernels *kernels, size_t i0,
                             size_t i1) {
  size_t n = (size_t)g->n, k = (size_t)g->k, i;
  MOE_ASSERT(g->a_col == 1 && !g->accumulate && g->b_layout != MOE__B_ROWS);
  for (i = i0; i < i1; ++i) {
    float *c = g->c + i * g->c_row;
    const float *a = g->a + i * g->a_row;
    if (g->b_layout == MOE__B_PANELS)
      kernels->narrow_panel(c, a, g->b, n, k, g->bias);
    else
      kernels->narrow(c, a, g->b, g->b_row, n, k, g->bias);
    if (g->gelu) kernels->gelu(g->gelu + i * g->c_row, c, g->c_row, 1, n);
  }
}

/* a_sum += the sums of A over k, in order. */
static void moe__gemm_sum_a(const moe__gemm *g, const moe__gemm_kernels *kernels, size_t i0,
                            size_t i1) {
  size_t i, p;
  if (g->a_row == 1)
    kernels->add_rows(g->a_sum + i0, g->a + i0, g->a_col, i1 - i0, (size_t)g->k);
  else
    for (i = i0; i < i1; ++i)
      for (p = 0; p < (size_t)g->k; ++p) g->a_sum[i] += g->a[i * g->a_row + p * g->a_col];
}

/* Of moe__gemm_gradient: most rows of a tile, most tokens of a block of k, and floats from one
   token to the next in its copy of A, an odd number of cache lines, so that they spread over the
   sets of the cache. */
enum { MOE__GRADIENT_ROWS = 256, MOE__GRADIENT_STEPS = 128, MOE__GRADIENT_LD = 256 + 16 };

/* How a product is cut into tiles of m rows and n columns, each walked in blocks of k. The shape of
   the product decides, and for large tiles the number of threads. No cut changes a bit. */
typedef struct moe__gemm_cut {
  int32_t m, n, k;
  int32_t across, down; /* number of tiles */
  int gradient; /* A stored transposed, B in rows, accumulated: moe__gemm_gradient, not plain C */
  int pack_b;   /* pack B (not in panels) block by block, since it is read many times */
} moe__gemm_cut;

/* A list of products and the kernels for them. */
typedef struct moe__gemm_work {
  const moe__gemm *list;
  const moe__gemm_kernels *kernels;
  int32_t threads; /* also the distance from a thread's tile to its next one */
} moe__gemm_work;

/* The tiles of a weight gradient: the copy of A and the C of a stripe fit the second-level cache,
   and there is a tile for each thread, two at least. */
static void moe__gradient_plan(moe__gemm_cut *cut, const moe__gemm *g, int32_t threads) {
  int32_t each;
  cut->m = MOE__GRADIENT_ROWS;
  cut->n = 1536;
  cut->k = MOE__GRADIENT_STEPS;
  each = (int32_t)((int64_t)g->m * ((g->n + cut->n - 1) / cut->n) / moe__max(threads, 2));
  if (cut->m > each) cut->m = moe__min(cut->m, moe__max((each + 7) / 8 * 8, 32));
}

static moe__gemm_cut moe__gemm_plan(const moe__gemm *g, const moe__gemm_work *work) {
  moe__gemm_cut cut;
  int32_t threads = work->threads;
  int aligned = ((uintptr_t)g->b | (g->b_row * sizeof(float))) % 64 ==
                0; /* else every vector of B touches two cache lines */
  cut.gradient = MOE__TRAINS && work->kernels != &moe__scalar_gemms && g->a_row == 1 &&
                 g->a_col != 1 && g->m >= 8 && g->n >= 48 && g->accumulate &&
                 g->b_layout == MOE__B_ROWS;
  cut.pack_b = g->b_layout == MOE__B_COLS ||
               (g->b_layout == MOE__B_ROWS && !aligned && g->m >= 64 && !cut.gradient);
  cut.n = 96;
  if (cut.gradient)
    moe__gradient_plan(&cut, g, threads);
  else if (g->b_layout != MOE__B_PANELS) {
    cut.m = 192;
    /* each tile reads A from the third-level cache: wide tiles where rows are many, as long as
       there are enough tiles for the threads */
    if (g->m >= 512 && (int64_t)(g->m / cut.m) * ((g->n + 383) / 384) >= 8 * (int64_t)(threads - 1))
      cut.n = 384;
    /* rows that are a multiple of 4 KB apart share few sets of the cache, and the buffer of packed
       panels is small: shorter blocks for both */
    cut.k = !cut.pack_b && g->n % 16 == 0 && g->b_row % 1024 != 0 ? 384 : 128;
  } else { /* every 8 rows read the panels from the second-level cache, every tile from the third;
              threads need more and so smaller tiles. Long blocks of k save loads of C */
    cut.m = threads > 1 ? 64 : 128;
    cut.k = 384;
  }
  cut.down = (g->m + cut.m - 1) / cut.m;
  if (cut.down > 1) cut.m = ((g->m + cut.down - 1) / cut.down + 7) / 8 * 8; /* as even as can be */
  cut.across = g->n ? (g->n + cut.n - 1) / cut.n : g->a_sum != NULL;
  return cut;
}

#ifdef MOE__SIMD
enum { MOE__GEMM_BUFFER = 128 * 16 * MOE__GEMM_PACKED }; /* floats of packed panels: 24 KB */

/* A tile: rows i0 .. i1-1 and columns j0 .. j1-1, and the present block of k. */
typedef struct moe__gemm_tile {
  const moe__gemm *g;
  const moe__gemm_cut *cut;
  const moe__gemm_kernels *kernels;
  size_t i0, i1, j0, j1;
  size_t p0, depth;
  int32_t following; /* the tile that this thread probably takes next */
  float *buffer;     /* for packed panels */
} moe__gemm_tile;

/* Sets the B of a kernel call to `width` panels from column j on, in the present block of k. Panels
   and rows are read in place, at any stride; columns are packed, and so are rows whose last panel
   is not full. */
static void moe__gemm_find_b(moe__gemm_block *block, const moe__gemm_tile *t, size_t j, int width) {
  const moe__gemm *g = t->g;
  size_t columns = (size_t)g->n - j, full = 16 * (size_t)width, v;
  if (g->b_layout == MOE__B_PANELS) {
    block->b_panel = 16 * (size_t)g->k;
    block->b_step = 16;
    block->b = g->b + j / 16 * block->b_panel + 16 * t->p0;
    return;
  }
  if (!t->cut->pack_b && columns >= full) {
    block->b_panel = 16;
    block->b_step = g->b_row;
    block->b = g->b + t->p0 * g->b_row + j;
    return;
  }
  if (columns > full) columns = full;
  if (g->b_layout == MOE__B_ROWS)
    t->kernels->pack_rows(t->buffer, g->b + t->p0 * g->b_row + j, g->b_row, columns, t->depth);
  else
    for (v = 0; v < columns; v += 16)
      t->kernels->pack_cols(t->buffer + v * t->depth, g->b + (j + v) * g->b_row + t->p0, g->b_row,
                            columns - v < 16 ? columns - v : 16, t->depth);
  block->b_panel = 16 * t->depth;
  block->b_step = 16;
  block->b = t->buffer;
}

/* Address in B of the stripe that follows the one that ends at column j: in this block of k, in the
   next one, or, if B is in panels, in the next tile. NULL: there is none, or B is packed. */
static const float *moe__gemm_next_b(const moe__gemm_tile *t, size_t j) {
  const moe__gemm *g = t->g;
  size_t p0 = t->p0;
  if (j >= t->j1) {
    j = t->j0;
    p0 += t->depth;
    if (p0 >= (size_t)g->k) {
      if (g->b_layout != MOE__B_PANELS) return NULL;
      j = (size_t)(t->following % t->cut->across * t->cut->n);
      p0 = 0;
    }
  }
  if (g->b_layout == MOE__B_PANELS)
    return j < (size_t)g->n ? g->b + j * (size_t)g->k + 16 * p0 : NULL;
  return g->b_layout == MOE__B_ROWS ? g->b + p0 * g->b_row + j : NULL;
}

/* Sets what call number `call` of the `calls` of a stripe prefetches of the next stripe of B, which
   begins at `from`. */
static void moe__prefetch_b(moe__prefetch *next, const moe__gemm_tile *t, const float *from,
                            size_t b_panel, size_t call, size_t calls, size_t width) {
  size_t each = calls > width ? calls / width : 1; /* calls that share a panel */
  if (!from) return;
  if (t->g->b_layout == MOE__B_ROWS) { /* a column of cache lines for each call */
    if (call >= width) return;
    next->b = from + 16 * call;
    next->b_step = t->g->b_row;
    return;
  }
  if (calls == 1 || call >= each * width) return; /* a single call has no time to spare */
  next->b = from + call / each * b_panel + call % each * (16 * t->depth / each);
  next->b_step = (16 + each - 1) / each;
  if (calls == 2 && width == 3) { /* half of the third panel each */
    next->b2 = from + 2 * b_panel + call * 8 * t->depth;
    next->b2_step = 8;
  }
}

/* Sets what the call for `rows` rows from i on prefetches of C: the block below it in the stripe of
   columns j .. right-1, or the one at the top of the next stripe. */
static void moe__prefetch_c(moe__prefetch *next, const moe__gemm_tile *t, size_t i, size_t rows,
                            size_t j, size_t right) {
  const moe__gemm *g = t->g;
  next->bursts = rows;
  if (i + rows >= t->i1 && right >= t->j1) return;
  next->c_row = g->c_row;
  next->c = i + rows < t->i1 ? g->c + (i + rows) * g->c_row + j : g->c + t->i0 * g->c_row + right;
}

/* All rows of a tile by `width` panels of columns from j on, for one block of k.

        columns j0        j        right    j1
   rows i0 +--------------+--------+--------+     Call 0 computes the rows from i0 on, call 1 those
           |              | call 0 |        |     below, and so on. While a call runs, it prefetches
           |   stripes    | call 1 |  next  |    next.c  the block of C of the next call, a row at
           |   done       |  ...   | stripe |               the beginning of each burst
           |              | last   |        |    next.b  its part of B for the next stripe, a line
        i1 +--------------+--------+--------+               at each step (next.b2: one part more)

   bench/limits.md says what each brought. */
static void moe__gemm_stripe(const moe__gemm_tile *t, size_t j, int width) {
  const moe__gemm *g = t->g;
  const moe__gemm_kernels *kernels = t->kernels;
  size_t full = 16 * (size_t)width, columns = (size_t)g->n - j < full ? (size_t)g->n - j : full;
  size_t most = (size_t)kernels->rows[width], calls = (t->i1 - t->i0 + most - 1) / most, call;
  size_t i = t->i0, rows;
  const float *next_b = moe__gemm_next_b(t, j + full);
  /* with blocks of one panel, a store that misses the caches costs nothing, but a load does */
  int ask_c = kernels->panels > 1 ? calls > 1 || g->b_layout == MOE__B_PANELS
                                  : g->accumulate && g->m >= 512;
  moe__gemm_block block;
  block.c_row = g->c_row;
  block.a_row = g->a_row;
  block.a_col = g->a_col;
  block.k = t->depth;
  moe__gemm_find_b(&block, t, j, width);
  for (call = 0; call < calls; ++call, i += rows) {
    moe__gemm_fn fn;
    rows = (t->i1 - i + calls - call - 1) / (calls - call); /* as even as can be: 9 are 5 and 4 */
    fn = kernels->fn[width][rows];
    block.c = g->c + i * g->c_row + j;
    block.a = g->a + i * g->a_row + t->p0 * g->a_col;
    block.start = g->bias ? g->bias + j : moe__gemm_zeros;
    block.start_row = 0;
    if (t->p0 > 0 || g->accumulate) block.start = block.c, block.start_row = g->c_row;
    block.next = moe__prefetch_none(block.b);
    if (ask_c) moe__prefetch_c(&block.next, t, i, rows, j, j + columns);
    moe__prefetch_b(&block.next, t, next_b, block.b_panel, call, calls, (size_t)width);
    if (columns == full)
      fn(&block);
    else
      moe__gemm_edge(fn, &block, rows, columns, width);
    if (g->gelu && t->p0 + t->depth == (size_t)g->k)
      kernels->gelu(g->gelu + i * g->c_row + j, block.c, g->c_row, rows, columns);
  }
}
#endif

/* ---- gradients of weights ---- >>gemm_gradient */

#ifdef MOE__SIMD
/* dW += dY^T X in tiles of C and blocks of k (tokens). Both operands are stored token by token: in
   place, a kernel would step from page to page and use few sets of the cache. So both are copied.

             X, a block of tokens
             |  stripe  |  stripe  | ...        The copy of A (dY) serves a whole block of k and
          +--+----------+----------+----        stays in the second-level cache, 136 KB of the
          |  | call 0   |          |            stack; the panels of B (X) serve a stripe and stay
    dY,   |  | call 1   |          |            in the first-level cache. While a call runs, next.c
    the   |  |  ...     |          |            is as in moe__gemm_stripe, and next.later is B of
    same  |  | call n   |          |            the next stripe in the first calls (a token for each
    block |  |  ...     |          |            of their rows), then A of the next block (`token`
          +--+----------+----------+----        and `column` say how far that is). */
typedef struct moe__gradient {
  moe__gemm_tile t;
  const float *b;       /* at the present block of k, column 0 */
  const float *next_a;  /* A of the following block, in this tile or the next one, at its row i0 */
  const float *next_b;  /* B of it, at its column j0; both NULL: there is none */
  size_t token, column; /* of next_a, to be prefetched next */
  float a[(int)MOE__GRADIENT_LD * (int)MOE__GRADIENT_STEPS + 16];
} moe__gradient;

/* What the call for `rows` rows from i on prefetches, in the stripe of `width` panels from column j
   on. */
static moe__prefetch moe__gradient_prefetch(moe__gradient *d, size_t i, size_t j, size_t rows,
                                            int width) {
  const moe__gemm_tile *t = &d->t;
  moe__prefetch next = moe__prefetch_none(t->buffer);
  size_t row = i - t->i0, right = j + 16 * (size_t)width;
  const float *b = right < t->j1 ? d->b + right : d->next_b;
  moe__prefetch_c(&next, t, i, rows, j, right);
  if (row + rows <= t->depth) {
    if (!b) return next;
    next.later = b + row * t->g->b_row;
    next.later_row = t->g->b_row;
  } else if (d->next_a && d->column < t->i1 - t->i0) {
    if (d->token + rows > t->depth) {
      d->token = 0;
      d->column += 16 * (size_t)width;
      return next;
    }
    next.later = d->next_a + d->token * t->g->a_col + d->column;
    next.later_row = t->g->a_col;
    d->token += rows;
  }
  return next;
}

/* All rows of the tile for `width` panels of columns from j on; a: the copy of A. */
static void moe__gradient_stripe(moe__gradient *d, const float *a, size_t j, int width) {
  const moe__gemm_tile *t = &d->t;
  const moe__gemm *g = t->g;
  const moe__gemm_kernels *kernels = t->kernels;
  size_t full = 16 * (size_t)width, columns = t->j1 - j < full ? t->j1 - j : full, rows, i = t->i0;
  size_t most = (size_t)kernels->rows[width], calls = (t->i1 - t->i0 + most - 1) / most;
  moe__gemm_block block;
  block.c_row = block.start_row = g->c_row;
  block.a_row = 1;
  block.a_col = MOE__GRADIENT_LD;
  block.b = t->buffer;
  block.b_panel = 16 * t->depth;
  block.b_step = 16;
  block.k = t->depth;
  kernels->pack_rows(t->buffer, d->b + j, g->b_row, columns, t->depth);
  for (; calls > 0; --calls, i += rows) {
    moe__gemm_fn fn;
    rows = (t->i1 - i + calls - 1) / calls; /* as even as can be */
    fn = kernels->fn[width][rows];
    block.start = block.c = g->c + i * g->c_row + j;
    block.a = a + i - t->i0;
    block.next = moe__gradient_prefetch(d, i, j, rows, width);
    if (columns == full)
      fn(&block);
    else
      moe__gemm_edge(fn, &block, rows, columns, width);
  }
}

/* A tile of the gradient of a weight; tile->p0 and depth are not set. */
MOE__NOINLINE static void moe__gemm_gradient(const moe__gemm_tile *tile) {
  const moe__gemm *g = tile->g;
  const moe__gemm_cut *cut = tile->cut;
  size_t k = (size_t)g->k, blocks = (k + (size_t)cut->k - 1) / (size_t)cut->k, j, depth;
  moe__gradient d;
  moe__gemm_tile *t = &d.t;
  float *a = d.a + (64 - (uintptr_t)d.a % 64) / sizeof(float);
  d.t = *tile;
  for (t->p0 = 0; blocks > 0; --blocks, t->p0 += depth) {
    const float *from = g->a + t->p0 * g->a_col + t->i0;
    t->depth = depth = (k - t->p0 + blocks - 1) / blocks;
    d.b = g->b + t->p0 * g->b_row;
    d.token = d.column = 0;
    d.next_a = d.next_b = NULL;
    if (blocks > 1) {
      d.next_a = from + depth * g->a_col;
      d.next_b = d.b + depth * g->b_row + t->j0;
    } else if (t->following < cut->across * cut->down) {
      d.next_a = g->a + t->following / cut->across * cut->m;
      d.next_b = g->b + t->following % cut->across * cut->n;
    }
    t->kernels->copy_rows(a, MOE__GRADIENT_LD, from, g->a_col, t->i1 - t->i0, depth);
    if (g->a_sum && t->j0 == 0)
      t->kernels->add_rows(g->a_sum + t->i0, a, MOE__GRADIENT_LD, t->i1 - t->i0, depth);
    for (j = t->j0; j < t->j1;) {
      int width = moe__gemm_width(t->kernels, MOE__GEMM_ROWS, (int32_t)((t->j1 - j + 15) / 16),
                                  MOE__GEMM_PACKED);
      moe__gradient_stripe(&d, a, j, width);
      j += 16 * (size_t)width;
    }
  }
}
#endif

/* ---- products over threads; packed weights ---- >>gemm_run */

#ifdef MOE__SIMD
/* A tile by blocks of k and stripes of columns. tile->p0 and depth are not set. */
MOE__NOINLINE static void moe__gemm_blocks(moe__gemm_tile *t) {
  float space[MOE__GEMM_BUFFER + 16];
  size_t k = (size_t)t->g->k, j;
  size_t blocks = k ? (k + (size_t)t->cut->k - 1) / (size_t)t->cut->k
                    : 1; /* one even if k is 0: C gets its start */
  int most = t->g->b_layout == MOE__B_PANELS ? MOE__GEMM_PANELS : MOE__GEMM_PACKED;
  t->buffer = space + (64 - (uintptr_t)space % 64) / sizeof(float); /* vectors on cache lines */
  if (MOE__TRAINS && t->cut->gradient) {
    moe__gemm_gradient(t);
    return;
  }
  for (t->p0 = 0; blocks > 0; --blocks, t->p0 += t->depth) {
    t->depth = (k - t->p0 + blocks - 1) / blocks;
    for (j = t->j0; j < t->j1;) {
      int width = moe__gemm_width(t->kernels, (int32_t)(t->i1 - t->i0),
                                  (int32_t)((t->j1 - j + 15) / 16), most);
      moe__gemm_stripe(t, j, width);
      j += 16 * (size_t)width;
    }
  }
}
#endif

/* Tile number `tile` of one product. */
static void moe__gemm_tile_run(const moe__gemm_work *work, const moe__gemm *g,
                               const moe__gemm_cut *cut, int32_t tile) {
  int32_t i0 = tile / cut->across * cut->m, i1 = moe__min(i0 + cut->m, g->m);
  int32_t j0 = tile % cut->across * cut->n, j1 = moe__min(j0 + cut->n, g->n);
  if (i0 >= i1) return; /* tiles have a multiple of 8 rows, so the last may have none */
  if (MOE__TRAINS && g->a_sum && j0 == 0 && !cut->gradient)
    moe__gemm_sum_a(g, work->kernels, (size_t)i0, (size_t)i1);
  if (g->narrow) {
    moe__gemm_narrow(g, work->kernels, (size_t)i0, (size_t)i1);
    return;
  }
#ifdef MOE__SIMD
  if (work->kernels != &moe__scalar_gemms) {
    moe__gemm_tile t;
    memset(&t, 0, sizeof t);
    t.g = g;
    t.cut = cut;
    t.kernels = work->kernels;
    t.i0 = (size_t)i0;
    t.i1 = (size_t)i1;
    t.j0 = (size_t)j0;
    t.j1 = (size_t)j1;
    t.following = tile + work->threads;
    moe__gemm_blocks(&t);
    return;
  }
#endif
  moe__plain_gemm(g, (size_t)i0, (size_t)i1, (size_t)j0, (size_t)j1);
}

static void moe__gemm_work_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__gemm_work *work = (const moe__gemm_work *)arg;
  const moe__gemm *g = work->list;
  moe__gemm_cut cut = moe__gemm_plan(g, work);
  (void)slot;
  while (tile >= cut.across * cut.down) {
    tile -= cut.across * cut.down;
    cut = moe__gemm_plan(++g, work);
  }
  moe__gemm_tile_run(work, g, &cut, tile);
}

static void moe__int8_run(const moe__gemm *list, int32_t count, const moe_env *env); /* >>int8 */
#ifndef MOE_NO_BF16
static void moe__bf16_run(const moe__gemm *list, int32_t count, const moe_env *env); /* >>bf16 */
#endif
static int moe__backend_run(const moe__gemm *list, int32_t count,
                            const moe_env *env); /* >>backend */

/* Computes independent products (the experts of a layer, the gradients of a weight and of its
   input) on all threads. */
static void moe__gemm_run(const moe__gemm *list, int32_t count, const moe_env *env) {
  moe__gemm_work work;
  int32_t tiles = 0, i;
  float size = 0;
  if (count && MOE__INT8(list->quantized)) {
    moe__int8_run(list, count, env);
    return;
  }
#ifndef MOE_NO_BF16
  if (count && (moe__wants_bf16(env) || list->b_layout == MOE__B_PAIRS)) {
    moe__bf16_run(list, count, env);
    return;
  }
#endif
  if (MOE__BACKEND(env) && moe__backend_run(list, count, env)) return;
  work.list = list;
  work.kernels = MOE__V_PICK(env->isa, gemms);
  work.threads = env->parallel_for ? env->threads : 1;
  for (i = 0; i < count; ++i) {
    moe__gemm_cut cut = moe__gemm_plan(&list[i], &work);
    tiles += cut.across * cut.down;
    size += moe__work_of(list[i].m, list[i].n, list[i].k);
  }
  if (size >= (float)MOE__GEMM_SMALL)
    moe__parallel(env, tiles, moe__gemm_work_tile, &work);
  else
    for (i = 0; i < tiles; ++i) moe__gemm_work_tile(&work, i, 0);
}

MOE_API moe_mat moe_mat_rows(const float *w, int32_t rows, int32_t cols) {
  moe_mat mat;
  mat.data = w;
  mat.scale = NULL;
  mat.rows = rows;
  mat.cols = cols;
  mat.type = MOE_TYPE_F32;
  mat.layout = MOE_LAYOUT_ROWS;
  return mat;
}

MOE_API moe_mat moe_mat_panels(const float *panels, int32_t rows, int32_t cols) {
  moe_mat mat = moe_mat_rows(panels, rows, cols);
  mat.layout = MOE_LAYOUT_PANELS;
  return mat;
}

MOE_API size_t moe_pack_floats(int32_t rows, int32_t cols) {
  return ((size_t)rows + 15) / 16 * 16 * (size_t)cols;
}

typedef struct moe__pack_work {
  float *panels;
  const float *w;
  size_t rows, cols;
  const moe__gemm_kernels *kernels;
} moe__pack_work;

static void moe__pack_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__pack_work *work = (const moe__pack_work *)arg;
  size_t row = (size_t)tile * 16, width = work->rows - row < 16 ? work->rows - row : 16;
  (void)slot;
  work->kernels->pack_cols(work->panels + row * work->cols, work->w + row * work->cols, work->cols,
                           width, work->cols);
}

MOE_API void moe_pack(float *panels, const float *w, int32_t rows, int32_t cols,
                      const moe_env *env) {
  moe__pack_work work;
  work.panels = panels;
  work.w = w;
  work.rows = (size_t)rows;
  work.cols = (size_t)cols;
  work.kernels = MOE__V_PICK(env->isa, gemms);
  moe__parallel(env, (rows + 15) / 16, moe__pack_tile, &work);
}

/* ---- products by another library, BLIS ---- >>backend
   A product goes to the library in parts of a fixed shape, one thread each, so that here too the
   number of threads changes no bit. The bias is put into C before; GELU and the sums of A are the
   built-in kernels'. */

enum {
  MOE__BACKEND_ROWS =
      256, /* of a part: a library packs A and B for each, which must not cost much */
  MOE__BACKEND_COLUMNS = 512,
  MOE__BACKEND_SIDE = 8 /* the least m, n and k that are worth a call */
};

/* Whether a table has a slot, and is one to be used at all. */
#define MOE__HAS(env, slot)                                                                        \
  (MOE__BACKEND(env) && (env)->backend->abi == MOE_BACKEND_ABI &&                                  \
   (env)->backend->bytes >= offsetof(moe_backend, slot) + sizeof(env)->backend->slot &&            \
   (env)->backend->slot)

static int moe__on_device(const moe_env *env) {
  return MOE__HAS(env, memory) && env->backend->memory == MOE_MEMORY_DEVICE;
}

/* At the beginning of an op: offers it to the backend, whose answer is the op's, unless a HOST
   backend leaves the call to the CPU. */
#define MOE__OFFER(env, slot, arguments)                                                           \
  if (MOE__HAS(env, slot)) {                                                                       \
    moe_status offered = (env)->backend->slot arguments;                                           \
    if (offered != MOE_E_UNSUPPORTED || moe__on_device(env)) return offered;                       \
  }

/* Whether a product of this size is for the library; packed: the built-in kernels would have packed
   weights. */
static int moe__backend_wants(const moe_env *env, int32_t m, int32_t n, int32_t k, int packed) {
  const moe_backend *backend = env->backend;
  if (!MOE__HAS(env, sgemm) || backend->memory != MOE_MEMORY_HOST) return 0;
  if (moe__min(moe__min(m, n), k) < MOE__BACKEND_SIDE ||
      moe__work_of(m, n, k) < (float)MOE__GEMM_SMALL)
    return 0;
  return !backend->takes || backend->takes(backend->user, m, n, k, packed);
}

static int moe__backend_takes(const moe__gemm *g, const moe_env *env) {
  return !g->narrow && !g->quantized &&
         (g->b_layout == MOE__B_ROWS || g->b_layout == MOE__B_COLS) &&
         moe__backend_wants(env, g->m, g->n, g->k, 0);
}

/* Number of parts of a product, 0 where the library does not take it; *across: how many side by
   side. */
static int32_t moe__backend_parts(const moe__gemm *g, const moe_env *env, int32_t *across) {
  *across = (g->n + MOE__BACKEND_COLUMNS - 1) / MOE__BACKEND_COLUMNS;
  return moe__backend_takes(g, env) ? *across * ((g->m + MOE__BACKEND_ROWS - 1) / MOE__BACKEND_ROWS)
                                    : 0;
}

/* Rows from i on and columns from j on, as a product of its own. */
static moe__gemm moe__backend_part(const moe__gemm *g, int32_t i, int32_t j) {
  moe__gemm part = *g;
  size_t at = (size_t)i * g->c_row + (size_t)j;
  part.m = moe__min(g->m - i, MOE__BACKEND_ROWS);
  part.n = moe__min(g->n - j, MOE__BACKEND_COLUMNS);
  part.a = g->a + (size_t)i * g->a_row;
  part.b = g->b + (size_t)j * (g->b_layout == MOE__B_ROWS ? 1 : g->b_row);
  part.c = g->c + at;
  if (g->bias) part.bias = g->bias + j;
  if (g->gelu) part.gelu = g->gelu + at;
  if (g->a_sum) part.a_sum = j ? NULL : g->a_sum + i;
  return part;
}

typedef struct moe__backend_work {
  const moe__gemm *list;
  const moe_env *env;
} moe__backend_work;

static void moe__backend_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__backend_work *work = (const moe__backend_work *)arg;
  const moe_backend *backend = work->env->backend;
  const moe__gemm_kernels *kernels = MOE__V_PICK(work->env->isa, gemms);
  const moe__gemm *g = work->list;
  moe__gemm part;
  moe_sgemm product;
  int32_t across, parts = moe__backend_parts(g, work->env, &across), i;
  int rows;
  (void)slot;
  while (tile >= parts) {
    tile -= parts;
    parts = moe__backend_parts(++g, work->env, &across);
  }
  part =
      moe__backend_part(g, tile / across * MOE__BACKEND_ROWS, tile % across * MOE__BACKEND_COLUMNS);
  for (i = 0; part.bias && i < part.m; ++i)
    memcpy(part.c + (size_t)i * part.c_row, part.bias, (size_t)part.n * sizeof(float));
  rows = part.b_layout == MOE__B_ROWS;
  product.m = part.m;
  product.n = part.n;
  product.k = part.k;
  product.a = part.a;
  product.a_row = part.a_row;
  product.a_col = part.a_col;
  product.b = part.b;
  product.b_row = rows ? part.b_row : 1;
  product.b_col = rows ? 1 : part.b_row;
  product.accumulate = part.accumulate || part.bias;
  product.c = part.c;
  product.c_row = part.c_row;
  backend->sgemm(backend->user, &product);
  if (part.a_sum) moe__gemm_sum_a(&part, kernels, 0, (size_t)part.m);
  if (part.gelu) kernels->gelu(part.gelu, part.c, part.c_row, (size_t)part.m, (size_t)part.n);
}

/* The list of moe__gemm_run; 0 where none of it is for the library. */
static int moe__backend_run(const moe__gemm *list, int32_t count, const moe_env *env) {
  moe__backend_work work;
  moe_env plain = *env;
  int32_t total = 0, across, i;
  for (i = 0; i < count; ++i) total += moe__backend_parts(&list[i], env, &across);
  if (!total) return 0;
  work.list = list;
  work.env = env;
  moe__parallel(env, total, moe__backend_tile, &work);
  plain.backend = NULL;
  for (i = 0; i < count; ++i)
    if (!moe__backend_takes(&list[i], env)) moe__gemm_run(&list[i], 1, &plain);
  return 1;
}

MOE_API void moe_backend_init(moe_backend *backend) {
  memset(backend, 0, sizeof *backend);
  backend->abi = MOE_BACKEND_ABI;
  backend->bytes = (uint32_t)sizeof *backend;
}

MOE_API const char *moe_backend_name(const moe_env *env) {
  return moe__on_device(env) || MOE__HAS(env, sgemm) ? env->backend->name : "built-in";
}

#ifdef MOE_USE_BLIS
#ifndef BLIS_H /* else this unit has included blis.h before */
/* The few functions that are needed, the same since 0.5, so that a library without its header will
   do. dim_t and inc_t are as wide as a pointer unless BLIS was configured otherwise, which
   moe_blis_use checks. */
#ifdef __cplusplus
extern "C" {
#endif
void bli_sgemm(int trans_a, int trans_b, intptr_t m, intptr_t n, intptr_t k, float *alpha, float *a,
               intptr_t a_row, intptr_t a_col, float *b, intptr_t b_row, intptr_t b_col,
               float *beta, float *c, intptr_t c_row, intptr_t c_col);
void bli_init(void);
void bli_thread_set_num_threads(intptr_t threads);
intptr_t bli_info_get_int_type_size(void);
int bli_arch_query_id(void);
const char *bli_arch_string(int id);
const char *bli_info_get_version_str(void);
#ifdef __cplusplus
}
#endif
#define MOE__BLIS_PLAIN 0
#else
#define MOE__BLIS_PLAIN BLIS_NO_TRANSPOSE
#endif

/* One thread, said before each call: the number belongs to the process, or in some versions to the
   calling thread, and anybody may have changed it. BLIS's own threads at small products are far
   slower than one. */
static void moe__blis_sgemm(void *user, const moe_sgemm *p) {
  float one = 1, beta = p->accumulate ? 1.0f : 0.0f;
  (void)user;
  bli_thread_set_num_threads(1);
  bli_sgemm(MOE__BLIS_PLAIN, MOE__BLIS_PLAIN, p->m, p->n, p->k, &one, (float *)(uintptr_t)p->a,
            (intptr_t)p->a_row, (intptr_t)p->a_col, (float *)(uintptr_t)p->b, (intptr_t)p->b_row,
            (intptr_t)p->b_col, &beta, p->c, (intptr_t)p->c_row, 1);
}

/* Measured with BLIS 0.9 beside the AVX2 kernels of this file (bench/bench_blis.c): BLIS reads
   operands where they lie, which is 1.1 to 1.7 times as fast as packing them for 8 to 32 tokens.
   With more of them its haswell kernels are within 6 % of these, a little ahead in the mean, and
   zen3's are slower for the gradient of a weight. Against packed weights neither is faster. */
static int32_t moe__blis_takes_unpacked(void *user, int32_t m, int32_t n, int32_t k,
                                        int32_t packed) {
  (void)user, (void)m, (void)n, (void)k;
  return !packed;
}

static int32_t moe__blis_takes_few(void *user, int32_t m, int32_t n, int32_t k, int32_t packed) {
  (void)user, (void)n;
  return !packed && moe__min(m, k) <= 64; /* tokens are m, or k in the gradient of a weight */
}

#define MOE__BLIS_TABLE(takes)                                                                     \
  {                                                                                                \
    MOE_BACKEND_ABI, (uint32_t)sizeof(moe_backend), MOE_MEMORY_HOST, "blis", NULL,                 \
        moe__blis_sgemm, takes, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,  \
        NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0                                    \
  }
static const moe_backend moe__blis_all = MOE__BLIS_TABLE(NULL);
static const moe_backend moe__blis_unpacked = MOE__BLIS_TABLE(moe__blis_takes_unpacked);
static const moe_backend moe__blis_few = MOE__BLIS_TABLE(moe__blis_takes_few);

/* What BLIS is better at here, or NULL: nothing. The BLIS of PyPI's blis calls itself 0.7 and packs
   always. */
static const moe_backend *moe__blis_best(const moe_env *env) {
  const char *kernels = moe_blis_kernels(), *version = bli_info_get_version_str();
  if (!strcmp(kernels, "generic")) return NULL;
  if (env->isa == MOE_ISA_SCALAR) return &moe__blis_all;
  if (env->isa != MOE_ISA_AVX2 || (!strncmp(version, "0.", 2) && version[2] < '9')) return NULL;
  if (!strcmp(kernels, "haswell")) return &moe__blis_unpacked;
  return !strncmp(kernels, "zen", 3) ? &moe__blis_few : NULL;
}

MOE_API const char *moe_blis_kernels(void) {
  bli_init(); /* without it 0.9 aborts here when BLIS_ARCH_TYPE is set */
  return bli_arch_string(bli_arch_query_id());
}

MOE_API moe_status moe_blis_use(moe_env *env, int32_t always) {
  if ((size_t)bli_info_get_int_type_size() != 8 * sizeof(intptr_t))
    return moe__fail(env, MOE_E_UNSUPPORTED, "BLIS has integers of %d bits, expected %d bits",
                     (int)bli_info_get_int_type_size(), (int)(8 * sizeof(intptr_t)));
  env->backend = always ? &moe__blis_all : moe__blis_best(env);
  return MOE_OK;
}
#undef MOE__BLIS_PLAIN
#endif

/* ---- tiles of AMX: who may use them, what their kernels share ---- >>amx */

/* The MOE_CPU_AMX_ bits that this process may use. Linux saves tiles on a context switch only for
   processes that have asked, and refuses while a thread's signal stack is too small for them. */
static uint32_t moe__amx_allowed(void) {
#ifdef MOE__AMX
  uint32_t r[4], units = 0;
  long refused = -1;
  if (!moe_isa_available(MOE_ISA_AVX512) || (moe__xgetbv() & 0x60000) != 0x60000) return 0;
  moe__cpuid(7, 0, r);
  /* its kernels round with AVX512-BF16 */
  if ((r[3] >> 22 & 1) && (moe__cpu_flags() & MOE_CPU_AVX512_BF16)) units |= MOE_CPU_AMX_BF16;
  if (r[3] >> 25 & 1) units |= MOE_CPU_AMX_INT8;
  if (!units || !(r[3] >> 24 & 1)) return 0; /* AMX-TILE */
  moe__cpuid(0x1d, 1, r);                    /* these kernels need 8 tiles of 16 rows of 64 bytes */
  if (r[0] >> 16 < 1024 || (r[1] & 0xffff) < 64 || r[1] >> 16 < 8 || (r[2] & 0xffff) < 16) return 0;
  /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) */
  __asm__ volatile("syscall"
                   : "=a"(refused)
                   : "0"(158L), "D"(0x1023L), "S"(18L)
                   : "rcx", "r11", "memory");
  return refused == 0 ? units : 0;
#else
  return 0;
#endif
}

MOE_API int32_t moe_env_use_amx(moe_env *env) {
  uint32_t units = env->isa == MOE_ISA_AVX512 ? moe__amx_allowed() : 0;
  env->cpu_flags |= units;
  return units != 0;
}

#ifdef MOE__AMX
/* Eight tiles of 16 rows of 64 bytes. The instructions are inline assembly, since gcc's intrinsics
   do not declare the memory they touch, and stores before them get lost: volatile keeps their
   order, and "memory" says that they read or write it. */
#define MOE__CLOBBER_MEMORY "memory"
#define MOE__TILE_CONFIG(p) __asm__ volatile("ldtilecfg (%0)" : : "r"(p) : "memory")
#define MOE__TILE_RELEASE() __asm__ volatile("tilerelease" : : : "memory")
#define MOE__TILE_LOAD(t, p, stride)                                                               \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(p), "r"((size_t)(stride)) : "memory")
#define MOE__TILE_STORE(t, p, stride)                                                              \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)"                                             \
                   :                                                                               \
                   : "r"(p), "r"((size_t)(stride))                                                 \
                   : MOE__CLOBBER_MEMORY)
#define MOE__TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t : :)
/* c += a b */
#define MOE__TILE_BF16(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define MOE__TILE_INT8(c, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

/* Configures the tiles. Up to 16 rows: tiles 0 to 3 are C, 4 is A, 5 to 7 are B. More: 0 and 1 are
   C of the first 16 rows, 2 and 3 of the others, 4 and 5 are A, 6 and 7 are B. Every row has 64
   bytes. *shape is the number of rows that this thread has configured them for, or 0. It takes a
   hundred cycles, so once for a tile of work. */
static void moe__amx_shape(size_t *shape, size_t rows) {
  unsigned char config[64] = {0};
  unsigned char first = (unsigned char)(rows < 16 ? rows : 16),
                second = (unsigned char)(rows > 16 ? rows - 16 : 0);
  int t;
  if (*shape == rows) return;
  config[0] = 1; /* the palette */
  for (t = 0; t < 8; ++t) {
    config[16 + 2 * t] = 64; /* bytes of a row */
    config[48 + t] = 16;     /* rows */
  }
  config[48] = config[49] = config[52] = first;
  config[50] = config[51] = second ? second : first;
  if (second) config[53] = second;
  MOE__TILE_CONFIG(config);
  *shape = rows;
}

static void moe__amx_leave(void) { MOE__TILE_RELEASE(); }

/* A step of k of a kernel: X(D, panel, tile of B[, second tile of C]) for each panel. w is the
   first panel, they are b_panel apart, and D is the instruction. */
#define MOE__AMX_EACH1(X, D) X(D, 0, 5)
#define MOE__AMX_EACH2(X, D) MOE__AMX_EACH1(X, D) X(D, 1, 6)
#define MOE__AMX_EACH4(X, D) MOE__AMX_EACH2(X, D) X(D, 2, 7) X(D, 3, 5)
#define MOE__AMX_STEP(D, v, t)                                                                     \
  MOE__TILE_LOAD(t, w + v * b_panel, 64);                                                          \
  D(v, 4, t);
/* with more than 16 rows, up to 32 */
#define MOE__AMX_TWICE1(X, D) X(D, 0, 6, 2)
#define MOE__AMX_TWICE2(X, D) MOE__AMX_TWICE1(X, D) X(D, 1, 7, 3)
#define MOE__AMX_STEP2(D, v, t, u)                                                                 \
  MOE__TILE_LOAD(t, w + v * b_panel, 64);                                                          \
  D(v, 4, t);                                                                                      \
  D(u, 5, t);
/* X(name, panels, for each of them, start, step, store, 32 rows?) */
#define MOE__AMX_KERNELS(X, N, S)                                                                  \
  X(N##_16x1, 1, MOE__AMX_EACH1, S##_START, MOE__AMX_STEP, S##_STORE, 0)                           \
  X(N##_16x2, 2, MOE__AMX_EACH2, S##_START, MOE__AMX_STEP, S##_STORE, 0)                           \
  X(N##_16x4, 4, MOE__AMX_EACH4, S##_START, MOE__AMX_STEP, S##_STORE, 0)                           \
  X(N##_32x1, 1, MOE__AMX_TWICE1, S##_START2, MOE__AMX_STEP2, S##_STORE2, 1)                       \
  X(N##_32x2, 2, MOE__AMX_TWICE2, S##_START2, MOE__AMX_STEP2, S##_STORE2, 1)
#define MOE__AMX_LIST(f)                                                                           \
  { NULL, f, f, f, f, f, f, f, f }
#endif

/* ---- products with int8 weights: what they are, plain C ---- >>int8 */

/* y = x W^T + b with 8-bit integers on both sides. W is quantised once, with a scale for each
   output, x row by row in each call. The scale of a row is max |x| / 127, its integers are
   x (127 / max |x|), rounded to the nearest, ties to even. With S the sum over p of q_x q_w, a
   32-bit integer, an output is fma(S, s_x s_w, b), S rounded to float. Sums of integers do not
   depend on their order, and the rest is one formula: the bits are the same for every layout, tile
   and instruction set. Columns are at most 65536, which keeps S below 2^31. A row whose elements
   are all below 1e-36 is a row of zeros; one with an infinity or NaN gives NaN in all its outputs.

   Panels: 16 outputs side by side, in steps of 4 inputs: 16 x 4 bytes, one register of AVX-512 and
   one row of a tile of AMX. After the steps come 16 integers, -128 times the sums of the weights:
   VNNI multiplies unsigned with signed bytes, so 128 is added to x, and the sums begin with the
   opposite of what that adds. */

enum {
  MOE__INT8_ROWS = 8, /* most rows (but on tiles: 32) and panels that a kernel takes */
  MOE__INT8_PANELS = 4,
  MOE__INT8_MC = 32 /* rows of a tile: quantised, they stay in the first-level cache while the
                       panels stream by */
};

/* The operands of a kernel: rows x (x_row bytes apart) times a few panels, for `columns`
   outputs. */
typedef struct moe__int8_block {
  float *c;
  size_t c_row;
  const unsigned char *x;
  size_t x_row;
  const float *x_scale; /* of each row */
  const signed char *panels;
  size_t panel; /* bytes of one */
  size_t steps;
  const float *scale, *bias; /* of each output; bias may be NULL */
  size_t columns;
  size_t rows;   /* for AMX kernels, which take any number */
  size_t *shape; /* see moe__amx_shape */
} moe__int8_block;

typedef void (*moe__int8_fn)(const moe__int8_block *b);

typedef struct moe__int8_kernels {
  moe__int8_fn fn[MOE__INT8_PANELS + 1][MOE__INT8_ROWS + 1]; /* [panels][rows, 8 for all above] */
  int rows[MOE__INT8_PANELS + 1]; /* most rows for so many panels, 0: none, as in plain C */
  unsigned flip;                  /* 0x80 where x is unsigned: 128 is added */
  /* q[i] = x[i] as an integer, ^ flip; returns the scale */
  float (*quantize)(unsigned char *q, const float *x, size_t n, unsigned flip);
  /* sum[v] = x w[v ld ..] for v = 0 .. 3, both signed; NULL in plain C */
  void (*dot4)(int32_t sum[4], const unsigned char *x, const signed char *w, size_t ld, size_t k);
  /* of AMX kernels, at the end of a tile; else NULL. Such kernels need the rows of
     moe__int8_lines */
  void (*leave)(void);
} moe__int8_kernels;

static size_t moe__int8_steps(size_t cols) { return (cols + 3) / 4; }
static size_t moe__int8_panel(size_t cols) { return moe__int8_steps(cols) * 64 + 64; }

#define MOE__INT8_TINY 1e-36f

/* The scale of a row from the bits of max |x|; *factor is what x is multiplied with, 0 where all
   integers are 0. */
static float moe__int8_scale(uint32_t top, float *factor) {
  float most = moe__floats(top);
  *factor = 0;
  if (top >= 0x7f800000u) return moe__floats(0x7fc00000u);
  if (most < MOE__INT8_TINY) return 0;
  *factor = 127.0f / most;
  return most / 127.0f;
}

/* The bits of max |x|; infinities and NaN are the largest. */
static uint32_t moe__scalar_int8_top(const float *x, size_t n) {
  uint32_t top = 0, u;
  size_t i;
  for (i = 0; i < n; ++i) {
    u = moe__bits(x[i]) & 0x7fffffffu;
    if (u > top) top = u;
  }
  return top;
}

/* q[i] = x[i] factor as an integer, ^ flip; all 0 where the factor is. */
static void moe__scalar_int8_round(unsigned char *q, const float *x, size_t n, float factor,
                                   unsigned flip) {
  size_t i;
  if (!(factor > 0)) {
    memset(q, (int)flip, n);
    return;
  }
  for (i = 0; i < n; ++i) {
    float t = x[i] * factor;
    q[i] = (unsigned char)(((moe__bits(t + MOE__ROUND) - MOE__ROUND_BITS) ^ flip) & 255u);
  }
}

static float moe__scalar_int8_quantize(unsigned char *q, const float *x, size_t n, unsigned flip) {
  float factor, scale = moe__int8_scale(moe__scalar_int8_top(x, n), &factor);
  moe__scalar_int8_round(q, x, n, factor, flip);
  return scale;
}

#define MOE__INT8_PLAIN                                                                            \
  { {{NULL}}, {0}, 0, moe__scalar_int8_quantize, NULL, NULL }
static const moe__int8_kernels moe__scalar_int8 = MOE__INT8_PLAIN;

/* The weights of output j from input p on, a multiple of 4. Four are neighbours, the next four are
   `step` bytes further. */
static const signed char *moe__plain_int8_w(const moe_mat *w, size_t j, size_t p, size_t *step) {
  const signed char *data = (const signed char *)w->data;
  size_t k = (size_t)w->cols;
  *step = w->layout == MOE_LAYOUT_PANELS ? 64 : 4;
  return w->layout == MOE_LAYOUT_PANELS ? data + j / 16 * moe__int8_panel(k) + p * 16 + j % 16 * 4
                                        : data + j * k + p;
}

/* A part of S for one output: the sum over n inputs. */
static int32_t moe__plain_int8_sum(const unsigned char *x, const signed char *w, size_t step,
                                   size_t n) {
  const signed char *q = (const signed char *)(const void *)x;
  int32_t sum = 0;
  size_t p;
  for (; n >= 4; n -= 4, q += 4, w += step)
    sum += q[0] * w[0] + q[1] * w[1] + q[2] * w[2] + q[3] * w[3];
  for (p = 0; p < n; ++p) sum += q[p] * w[p];
  return sum;
}

enum { MOE__INT8_CHUNK = 512 }; /* inputs that plain C quantises at a time, on the stack */

/* The definition, in plain C: rows i0 .. i1-1 and columns j0 .. j1-1. To save stack x is quantised
   chunk by chunk, a row of several chunks again for every 64 outputs. */
static void moe__plain_int8(const moe__gemm *g, size_t i0, size_t i1, size_t j0, size_t j1) {
  const moe_mat *w = g->quantized;
  unsigned char q[MOE__INT8_CHUNK];
  int32_t sum[64];
  size_t k = (size_t)g->k, i, j, p, v, n, depth, step;
  for (i = i0; i < i1; ++i) {
    const float *x = g->a + i * g->a_row;
    float factor, scale = moe__int8_scale(moe__scalar_int8_top(x, k), &factor);
    for (j = j0; j < j1; j += n) {
      float *c = g->c + i * g->c_row + j;
      n = j1 - j < 64 ? j1 - j : 64;
      memset(sum, 0, sizeof sum);
      for (p = 0; p < k; p += depth) {
        depth = k - p < MOE__INT8_CHUNK ? k - p : (size_t)MOE__INT8_CHUNK;
        if (j == j0 || k > MOE__INT8_CHUNK) moe__scalar_int8_round(q, x + p, depth, factor, 0);
        for (v = 0; v < n; ++v) {
          const signed char *from = moe__plain_int8_w(w, j + v, p, &step);
          sum[v] += moe__plain_int8_sum(q, from, step, depth);
        }
      }
      for (v = 0; v < n; ++v)
        c[v] = moe__fmaf((float)sum[v], scale * w->scale[j + v], g->bias ? g->bias[j + v] : 0.0f);
      if (g->gelu) moe__scalar_gelu(g->gelu + i * g->c_row + j, c, g->c_row, 1, n);
    }
  }
}

/* ---- kernels with int8 weights: what they share, AVX2, AVX-512, VNNI, AMX ---- >>int8_x86 */

#ifdef MOE__Q
/* 4 bytes of a row of x, to be broadcast; and the end of a row: the outputs of panel v from their
   sums, as moe__plain_int8 ends. */
MOE__INLINE int moe__int8_step(const unsigned char *x) {
  int four;
  memcpy(&four, x, 4);
  return four;
}

#define MOE__INT8_END(S, i, v, sums)                                                               \
  {                                                                                                \
    size_t n = b->columns - 16 * v < 16 ? b->columns - 16 * v : 16;                                \
    S##_f scales = S##_mul(S##_set(b->x_scale[i]), S##_loadn(b->scale + 16 * v, n));               \
    S##_f start = b->bias ? S##_loadn(b->bias + 16 * v, n) : S##_set(0.0f);                        \
    S##_storen(b->c + i * b->c_row + 16 * v, S##_fma(S##_cvt(sums), scales, start), n);            \
  }

/* A kernel that keeps R P vectors of sums in registers. Each instruction set defines their start
   (MOE__INT8_SUM), what a step loads (MOE__INT8_LOAD) and adds (MOE__INT8_STEP), and the end
   (MOE__INT8_OUT). */
#define MOE__INT8_KERNEL_START(S, P, i) MOE__EACH_PANEL##P(MOE__INT8_SUM, S, i)
#define MOE__INT8_KERNEL_STORE(S, P, i) MOE__EACH_PANEL##P(MOE__INT8_OUT, S, i)
#define MOE__INT8_KERNEL(S, T, R, P)                                                               \
  T static void S##_int8_##R##x##P(const moe__int8_block *b) {                                     \
    const signed char *w = b->panels;                                                              \
    const unsigned char *x = b->x;                                                                 \
    size_t step;                                                                                   \
    MOE__EACH_ROW##R(MOE__INT8_KERNEL_START, S, P) for (step = 0; step < b->steps;                 \
                                                        ++step, w += 64, x += 4){                  \
        MOE__EACH_PANEL##P(MOE__INT8_LOAD, S, 0)                                                   \
            MOE__EACH_ROW##R(MOE__INT8_STEP, S, P)} MOE__EACH_ROW##R(MOE__INT8_KERNEL_STORE, S, P) \
  }

/* The kernels that fit where a panel takes several registers: 6 rows by 1 panel, 2 by 2, 1 by 3. */
#define MOE__INT8_SMALL(S, T)                                                                      \
  MOE__KERNELS6(MOE__INT8_KERNEL, S, T, 1)                                                         \
  MOE__KERNELS2(MOE__INT8_KERNEL, S, T, 2) MOE__INT8_KERNEL(S, T, 1, 3)
#define MOE__INT8_SMALL_TABLE(S)                                                                   \
  {{NULL},                                                                                         \
   {NULL, MOE__NAMES6(S##_int8, 1)},                                                               \
   {NULL, MOE__NAMES2(S##_int8, 2)},                                                               \
   {NULL, S##_int8_1x3}},                                                                          \
  {                                                                                                \
    0, 6, 2, 1                                                                                     \
  }

/* As in plain C, 16 at a time: bits of max |x|, and S##_bytes stores the low bytes of integers. */
#define MOE__INT8_QUANTIZE(S, T)                                                                   \
  T static float S##_int8_quantize(unsigned char *q, const float *x, size_t n, unsigned flip) {    \
    S##_f most = S##_set(0.0f), t;                                                                 \
    float lane[16], scale, factor;                                                                 \
    uint32_t top, rest;                                                                            \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16) {                                                                 \
      t = S##_abs(S##_load(x + i));                                                                \
      most = S##_sel(S##_ult(S##_bits(most), S##_bits(t)), t, most);                               \
    }                                                                                              \
    S##_store(lane, most);                                                                         \
    top = moe__scalar_int8_top(lane, 16);                                                          \
    rest = moe__scalar_int8_top(x + i, n - i);                                                     \
    scale = moe__int8_scale(top > rest ? top : rest, &factor);                                     \
    for (i = 0; factor > 0 && i + 16 <= n; i += 16) {                                              \
      t = S##_add(S##_mul(S##_load(x + i), S##_set(factor)), S##_set(MOE__ROUND));                 \
      S##_bytes(q + i, S##_ixor(S##_iand(S##_bits(t), S##_iset(255)), S##_iset(flip)));            \
    }                                                                                              \
    moe__scalar_int8_round(q + i, x + i, n - i, factor, flip);                                     \
    return scale;                                                                                  \
  }

/* Ends a dot4: its inputs p .. k-1. */
static void moe__int8_dot4_rest(int32_t sum[4], const unsigned char *x, const signed char *w,
                                size_t ld, size_t p, size_t k) {
  for (; p < k; ++p) {
    int32_t v = (signed char)x[p], i;
    for (i = 0; i < 4; ++i) sum[i] += v * w[(size_t)i * ld + p];
  }
}
#endif

#ifdef MOE__X86
MOE__T_AVX2 MOE__INLINE void moe__avx2_bytes(unsigned char *q, moe__avx2_i x) {
  __m128i a = _mm_packs_epi32(_mm256_castsi256_si128(x.a), _mm256_extracti128_si256(x.a, 1));
  __m128i b = _mm_packs_epi32(_mm256_castsi256_si128(x.b), _mm256_extracti128_si256(x.b, 1));
  _mm_storeu_si128((__m128i *)(void *)q, _mm_packus_epi16(a, b));
}
MOE__INT8_QUANTIZE(moe__avx2, MOE__T_AVX2)
MOE__T_AVX512 MOE__INLINE void moe__avx512_bytes(unsigned char *q, __m512i x) {
  _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtepi32_epi8(x));
}
MOE__INT8_QUANTIZE(moe__avx512, MOE__T_AVX512)

/* Sums of 16 products of bytes that were widened to 16 bits: nothing saturates, unlike with
   vpmaddubsw. */
MOE__T_AVX2 static void moe__avx2_int8_dot4(int32_t sum[4], const unsigned char *x,
                                            const signed char *w, size_t ld, size_t k) {
  const signed char *w1 = w + ld, *w2 = w1 + ld, *w3 = w2 + ld;
  __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
  __m128i t;
  size_t p = 0;
#define MOE__WIDE(at) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(at)))
  for (; p + 16 <= k; p += 16) {
    __m256i v = MOE__WIDE(x + p);
    s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(v, MOE__WIDE(w + p)));
    s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(v, MOE__WIDE(w1 + p)));
    s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(v, MOE__WIDE(w2 + p)));
    s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(v, MOE__WIDE(w3 + p)));
  }
  s0 = _mm256_hadd_epi32(_mm256_hadd_epi32(s0, s1), _mm256_hadd_epi32(s2, s3));
  t = _mm_add_epi32(_mm256_castsi256_si128(s0), _mm256_extracti128_si256(s0, 1));
  _mm_storeu_si128((__m128i *)(void *)sum, t);
  moe__int8_dot4_rest(sum, x, w, ld, p, k);
}

/* AVX2 without VNNI: 4 outputs x 4 inputs of a step, widened to 16 bits, times the step of x. Two
   sums for each output, added at the end. */
#define MOE__INT8_SUM(S, i, v)                                                                     \
  __m256i c##i##0 = _mm256_setzero_si256(), c##i##1 = c##i##0, c##i##2 = c##i##0, c##i##3 = c##i##0;
#define MOE__INT8_LOAD(S, i, v)                                                                    \
  __m256i w0 = MOE__WIDE(w), w1 = MOE__WIDE(w + 16), w2 = MOE__WIDE(w + 32), w3 = MOE__WIDE(w + 48);
#define MOE__INT8_STEP(S, P, i)                                                                    \
  {                                                                                                \
    __m256i v = _mm256_cvtepi8_epi16(_mm_set1_epi32(moe__int8_step(x + i * b->x_row)));            \
    c##i##0 = _mm256_add_epi32(c##i##0, _mm256_madd_epi16(v, w0));                                 \
    c##i##1 = _mm256_add_epi32(c##i##1, _mm256_madd_epi16(v, w1));                                 \
    c##i##2 = _mm256_add_epi32(c##i##2, _mm256_madd_epi16(v, w2));                                 \
    c##i##3 = _mm256_add_epi32(c##i##3, _mm256_madd_epi16(v, w3));                                 \
  }
#define MOE__INT8_OUT(S, i, v)                                                                     \
  {                                                                                                \
    __m256i low = _mm256_permute4x64_epi64(_mm256_hadd_epi32(c##i##0, c##i##1), 0xd8);             \
    __m256i high = _mm256_permute4x64_epi64(_mm256_hadd_epi32(c##i##2, c##i##3), 0xd8);            \
    MOE__INT8_END(moe__avx2, i, 0, moe__avx2_itwo(low, high))                                      \
  }
MOE__KERNELS2(MOE__INT8_KERNEL, moe__avx2, MOE__T_AVX2, 1)
static const moe__int8_kernels moe__avx2_int8 = {
    {{NULL}, {NULL, MOE__NAMES2(moe__avx2_int8, 1)}, {NULL}, {NULL}},
    {0, 2, 0, 0},
    0,
    moe__avx2_int8_quantize,
    moe__avx2_int8_dot4,
    NULL};
/* The few processors with AVX-512 but no VNNI: they quantise faster and multiply as above. */
static const moe__int8_kernels moe__avx512_int8 = {
    {{NULL}, {NULL, MOE__NAMES2(moe__avx2_int8, 1)}, {NULL}, {NULL}},
    {0, 2, 0, 0},
    0,
    moe__avx512_int8_quantize,
    moe__avx2_int8_dot4,
    NULL};
#undef MOE__INT8_SUM
#undef MOE__INT8_LOAD
#undef MOE__INT8_STEP
#undef MOE__INT8_OUT
#undef MOE__WIDE

#ifdef MOE__AVX_VNNI
/* AVX-VNNI: two registers to a panel */
#define MOE__T_AVX_VNNI MOE__TARGET("avx2,fma,avxvnni")
#define MOE__INT8_SUM(S, i, v)                                                                     \
  moe__avx2_i c##i##v = moe__avx2_iload(b->panels + v * b->panel + 64 * b->steps);
#define MOE__INT8_LOAD(S, i, v) moe__avx2_i w##v = moe__avx2_iload(w + v * b->panel);
#define MOE__INT8_ADD(S, i, v)                                                                     \
  c##i##v.a = _mm256_dpbusd_avx_epi32(c##i##v.a, s, w##v.a);                                       \
  c##i##v.b = _mm256_dpbusd_avx_epi32(c##i##v.b, s, w##v.b);
#define MOE__INT8_OUT(S, i, v) MOE__INT8_END(moe__avx2, i, v, c##i##v)
#define MOE__INT8_STEP(S, P, i)                                                                    \
  {                                                                                                \
    __m256i s = _mm256_set1_epi32(moe__int8_step(x + i * b->x_row));                               \
    MOE__EACH_PANEL##P(MOE__INT8_ADD, S, i)                                                        \
  }
MOE__INT8_SMALL(moe__avx_vnni, MOE__T_AVX_VNNI)
static const moe__int8_kernels moe__avx_vnni_int8 = {
    MOE__INT8_SMALL_TABLE(moe__avx_vnni), 0x80, moe__avx2_int8_quantize, moe__avx2_int8_dot4, NULL};
#undef MOE__INT8_SUM
#undef MOE__INT8_LOAD
#undef MOE__INT8_ADD
#undef MOE__INT8_STEP
#undef MOE__INT8_OUT
#endif

#ifdef MOE__AVX512_VNNI
/* AVX512-VNNI: up to 8 rows by 3 panels, 24 of the 32 registers */
#define MOE__T_AVX512_VNNI MOE__TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma")
/* c + x w. Inline assembly, since gcc 12 copies the sums around its intrinsic and stores them all
   in every step, at half the speed. */
MOE__T_AVX512_VNNI MOE__INLINE __m512i moe__vnni_add(__m512i c, __m512i x, __m512i w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(x), "v"(w));
  return c;
}
#define MOE__INT8_SUM(S, i, v)                                                                     \
  __m512i c##i##v = _mm512_loadu_si512(b->panels + v * b->panel + 64 * b->steps);
#define MOE__INT8_LOAD(S, i, v) __m512i w##v = _mm512_loadu_si512(w + v * b->panel);
#define MOE__INT8_ADD(S, i, v) c##i##v = moe__vnni_add(c##i##v, s, w##v);
#define MOE__INT8_OUT(S, i, v) MOE__INT8_END(moe__avx512, i, v, c##i##v)
#define MOE__INT8_STEP(S, P, i)                                                                    \
  {                                                                                                \
    __m512i s = _mm512_set1_epi32(moe__int8_step(x + i * b->x_row));                               \
    MOE__EACH_PANEL##P(MOE__INT8_ADD, S, i)                                                        \
  }
MOE__KERNELS8(MOE__INT8_KERNEL, moe__vnni, MOE__T_AVX512_VNNI, 1)
MOE__KERNELS8(MOE__INT8_KERNEL, moe__vnni, MOE__T_AVX512_VNNI, 2)
MOE__KERNELS8(MOE__INT8_KERNEL, moe__vnni, MOE__T_AVX512_VNNI, 3)
/* clang-format off */
static const moe__int8_kernels moe__vnni_int8 = {
    {{NULL}, {NULL, MOE__NAMES8(moe__vnni_int8, 1)}, {NULL, MOE__NAMES8(moe__vnni_int8, 2)},
    {NULL, MOE__NAMES8(moe__vnni_int8, 3)}}, {0, 8, 8, 8}, 0x80, moe__avx512_int8_quantize,
    moe__avx2_int8_dot4, NULL};
/* clang-format on */
#undef MOE__INT8_SUM
#undef MOE__INT8_LOAD
#undef MOE__INT8_ADD
#undef MOE__INT8_STEP
#undef MOE__INT8_OUT
#endif
#ifdef MOE__AMX
/* AMX: up to 32 rows by 2 panels or 16 by 4, signed times signed, for k of 61 or more. The last
   step reads the last 16 steps of a panel; x has zeros for those that were added before
   (moe__int8_lines), so panels need no padding. */
MOE__T_AVX512 static void moe__amx_int8_end(const moe__int8_block *b, const int32_t *sums,
                                            size_t panels) {
  size_t v, i;
  for (v = 0; v < panels && 16 * v < b->columns; ++v) {
    size_t n = b->columns - 16 * v < 16 ? b->columns - 16 * v : 16;
    __m512 scales = moe__avx512_loadn(b->scale + 16 * v, n);
    __m512 start = b->bias ? moe__avx512_loadn(b->bias + 16 * v, n) : _mm512_setzero_ps();
    for (i = 0; i < b->rows; ++i) {
      __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + (i * panels + v) * 16));
      __m512 y = _mm512_fmadd_ps(sum, _mm512_mul_ps(_mm512_set1_ps(b->x_scale[i]), scales), start);
      moe__avx512_storen(b->c + i * b->c_row + 16 * v, y, n);
    }
  }
}

#define MOE__AMX_INT8_START(D, v, t) MOE__TILE_ZERO(v);
#define MOE__AMX_INT8_STORE(D, v, t) MOE__TILE_STORE(v, sums + 16 * v, row);
#define MOE__AMX_INT8_START2(D, v, t, u)                                                           \
  MOE__TILE_ZERO(v);                                                                               \
  MOE__TILE_ZERO(u);
#define MOE__AMX_INT8_STORE2(D, v, t, u)                                                           \
  MOE__TILE_STORE(v, sums + 16 * v, row);                                                          \
  MOE__TILE_STORE(u, sums + 4 * row + 16 * v, row);
#define MOE__AMX_INT8_KERNEL(NAME, P, EACH, START, STEP, STORE, SECOND)                            \
  MOE__T_AVX512 static void NAME(const moe__int8_block *b) {                                       \
    int32_t space[256 * P * (SECOND + 1) + 16];                                                    \
    int32_t *sums = space + (64 - (uintptr_t)space % 64) / sizeof *space;                          \
    const size_t row = 64 * P, x_row = b->x_row, below = 16 * x_row, b_panel = b->panel;           \
    const unsigned char *x = b->x;                                                                 \
    const signed char *w = b->panels;                                                              \
    size_t left = b->steps;                                                                        \
    moe__amx_shape(b->shape, b->rows);                                                             \
    EACH(START, 0)                                                                                 \
    for (;;) {                                                                                     \
      MOE__TILE_LOAD(4, x, x_row);                                                                 \
      if (SECOND) MOE__TILE_LOAD(5, x + below, x_row);                                             \
      EACH(STEP, MOE__TILE_INT8)                                                                   \
      if (left <= 16) break;                                                                       \
      left -= 16;                                                                                  \
      x += 64;                                                                                     \
      w += left < 16 ? 64 * left : 1024;                                                           \
    }                                                                                              \
    EACH(STORE, 0)                                                                                 \
    moe__amx_int8_end(b, sums, P);                                                                 \
  }
MOE__AMX_KERNELS(MOE__AMX_INT8_KERNEL, moe__amx_int8, MOE__AMX_INT8)

static void moe__amx_int8_1(const moe__int8_block *b) {
  if (b->rows > 16)
    moe__amx_int8_32x1(b);
  else
    moe__amx_int8_16x1(b);
}
static void moe__amx_int8_2(const moe__int8_block *b) {
  if (b->rows > 16)
    moe__amx_int8_32x2(b);
  else
    moe__amx_int8_16x2(b);
}
/* clang-format off */
static const moe__int8_kernels moe__amx_int8 = {
    {{NULL}, MOE__AMX_LIST(moe__amx_int8_1), MOE__AMX_LIST(moe__amx_int8_2), {NULL},
    MOE__AMX_LIST(moe__amx_int8_16x4)}, {0, 32, 32, 0, 16}, 0, moe__avx512_int8_quantize,
    moe__avx2_int8_dot4, moe__amx_leave};
/* clang-format on */
#undef MOE__AMX_INT8_KERNEL
#undef MOE__AMX_INT8_STORE2
#undef MOE__AMX_INT8_STORE
#undef MOE__AMX_INT8_START2
#undef MOE__AMX_INT8_START
#endif
#endif /* MOE__X86 */

/* ---- kernels with int8 weights: NEON, SSE2, WebAssembly ---- >>int8_128 */

#ifdef MOE__Q
/* moe__q8: 16 bytes; moe__h8: half of them, as bytes (NEON) or widened to 16 bits. ADD(c, x, w)
   multiplies two halves, and adds each two neighbouring products to one 32-bit integer of c; DOT
   adds all the products of 16 bytes. PAIRS adds neighbours: two sums from x, then two from y.
   SHORTS and BYTES narrow the integers of x, then those of y, to half their bits. */
#if defined(MOE__NEON)
typedef int8x16_t moe__q8;
typedef int8x8_t moe__h8;
#define MOE__Q8_LOAD(p) vld1q_s8((const int8_t *)(p))
#define MOE__Q8_SET(u) vreinterpretq_s8_s32(vdupq_n_s32(u))
#define MOE__Q8_LOW(x) vget_low_s8(x)
#define MOE__Q8_HIGH(x) vget_high_s8(x)
#define MOE__Q8_PRODUCTS(c, p) vreinterpretq_u32_s32(vpadalq_s16(vreinterpretq_s32_u32(c), p))
#define MOE__Q8_ADD(c, x, w) MOE__Q8_PRODUCTS(c, vmull_s8(x, w))
/* x is never -128, so two products add up to less than 2^15: they are widened after that */
#define MOE__Q8_DOT(c, x, w)                                                                       \
  MOE__Q8_PRODUCTS(                                                                                \
      c, vmlal_s8(vmull_s8(MOE__Q8_LOW(x), MOE__Q8_LOW(w)), MOE__Q8_HIGH(x), MOE__Q8_HIGH(w)))
#define MOE__Q8_PAIRS(x, y) vpaddq_u32(x, y)
#define MOE__Q8_SHORTS(x, y) vcombine_u16(vmovn_u32(x), vmovn_u32(y))
#define MOE__Q8_BYTES(x, y) vcombine_u8(vmovn_u16(x), vmovn_u16(y))
#define MOE__Q8_STORE(p, x) vst1q_u8(p, x)
#else
typedef moe__qi moe__q8, moe__h8;
#define MOE__Q8_LOAD(p) MOE__Q_LOAD_BITS((const void *)(p))
#define MOE__Q8_DOT(c, x, w)                                                                       \
  MOE__Q8_ADD(MOE__Q8_ADD(c, MOE__Q8_LOW(x), MOE__Q8_LOW(w)), MOE__Q8_HIGH(x), MOE__Q8_HIGH(w))
#ifdef MOE__WASM
#define MOE__Q8_SET(u) wasm_i32x4_splat(u)
#define MOE__Q8_LOW(x) wasm_i16x8_extend_low_i8x16(x)
#define MOE__Q8_HIGH(x) wasm_i16x8_extend_high_i8x16(x)
#define MOE__Q8_ADD(c, x, w) wasm_i32x4_add(c, wasm_i32x4_dot_i16x8(x, w))
#define MOE__Q8_PAIRS(x, y)                                                                        \
  wasm_i32x4_add(wasm_i32x4_shuffle(x, y, 0, 2, 4, 6), wasm_i32x4_shuffle(x, y, 1, 3, 5, 7))
#define MOE__Q8_SHORTS(x, y) wasm_i16x8_narrow_i32x4(x, y)
#define MOE__Q8_BYTES(x, y) wasm_u8x16_narrow_i16x8(x, y)
#define MOE__Q8_STORE(p, x) wasm_v128_store(p, x)
#else
#define MOE__Q8_SET(u) _mm_set1_epi32(u)
#define MOE__Q8_LOW(x) _mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8)
#define MOE__Q8_HIGH(x) _mm_srai_epi16(_mm_unpackhi_epi8(x, x), 8)
#define MOE__Q8_ADD(c, x, w) _mm_add_epi32(c, _mm_madd_epi16(x, w))
#define MOE__Q8_PICK(x, y, lanes)                                                                  \
  _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(x), _mm_castsi128_ps(y), lanes))
#define MOE__Q8_PAIRS(x, y) _mm_add_epi32(MOE__Q8_PICK(x, y, 0x88), MOE__Q8_PICK(x, y, 0xdd))
#define MOE__Q8_SHORTS(x, y) _mm_packs_epi32(x, y)
#define MOE__Q8_BYTES(x, y) _mm_packus_epi16(x, y)
#define MOE__Q8_STORE(p, x) _mm_storeu_si128((__m128i *)(void *)(p), x)
#endif
#endif

MOE__INLINE void moe__v128_bytes(unsigned char *q, moe__v128_i x) {
  MOE__Q8_STORE(q, MOE__Q8_BYTES(MOE__Q8_SHORTS(x.a, x.b), MOE__Q8_SHORTS(x.c, x.d)));
}
MOE__INT8_QUANTIZE(moe__v128, MOE__T_V128)

#define MOE__INT8_DOT4(NAME, T, DOT)                                                               \
  T static void NAME(int32_t sum[4], const unsigned char *x, const signed char *w, size_t ld,      \
                     size_t k) {                                                                   \
    const signed char *w1 = w + ld, *w2 = w1 + ld, *w3 = w2 + ld;                                  \
    moe__qi s0 = moe__v128_iset(0).a, s1 = s0, s2 = s0, s3 = s0;                                   \
    size_t p = 0;                                                                                  \
    for (; p + 16 <= k; p += 16) {                                                                 \
      moe__q8 v = MOE__Q8_LOAD(x + p);                                                             \
      s0 = DOT(s0, v, MOE__Q8_LOAD(w + p));                                                        \
      s1 = DOT(s1, v, MOE__Q8_LOAD(w1 + p));                                                       \
      s2 = DOT(s2, v, MOE__Q8_LOAD(w2 + p));                                                       \
      s3 = DOT(s3, v, MOE__Q8_LOAD(w3 + p));                                                       \
    }                                                                                              \
    s0 = MOE__Q8_PAIRS(MOE__Q8_PAIRS(s0, s1), MOE__Q8_PAIRS(s2, s3));                              \
    memcpy(sum, &s0, sizeof s0);                                                                   \
    moe__int8_dot4_rest(sum, x, w, ld, p, k);                                                      \
  }
MOE__INT8_DOT4(moe__v128_int8_dot4, MOE__T_V128, MOE__Q8_DOT)

/* 2 outputs x 4 inputs of a step are 8 products, added by pairs: two sums for each output. */
#define MOE__INT8_SUM(S, i, v)                                                                     \
  moe__qi c##i##0 = moe__v128_iset(0).a, c##i##1 = c##i##0, c##i##2 = c##i##0, c##i##3 = c##i##0;  \
  moe__qi c##i##0h = c##i##0, c##i##1h = c##i##0, c##i##2h = c##i##0, c##i##3h = c##i##0;
#define MOE__INT8_LOAD(S, i, v)                                                                    \
  moe__q8 w##v##0 = MOE__Q8_LOAD(w + v * b->panel), w##v##1 = MOE__Q8_LOAD(w + v * b->panel + 16); \
  moe__q8 w##v##2 = MOE__Q8_LOAD(w + v * b->panel + 32);                                           \
  moe__q8 w##v##3 = MOE__Q8_LOAD(w + v * b->panel + 48);
#define MOE__INT8_HALVES(i, v, w)                                                                  \
  c##i##v = MOE__Q8_ADD(c##i##v, s, MOE__Q8_LOW(w));                                               \
  c##i##v##h = MOE__Q8_ADD(c##i##v##h, s, MOE__Q8_HIGH(w));
#define MOE__INT8_STEP(S, P, i)                                                                    \
  {                                                                                                \
    moe__h8 s = MOE__Q8_LOW(MOE__Q8_SET(moe__int8_step(x + i * b->x_row)));                        \
    MOE__INT8_HALVES(i, 0, w00)                                                                    \
    MOE__INT8_HALVES(i, 1, w01)                                                                    \
    MOE__INT8_HALVES(i, 2, w02)                                                                    \
    MOE__INT8_HALVES(i, 3, w03)                                                                    \
  }
#define MOE__INT8_FOUR(i, v) MOE__Q8_PAIRS(c##i##v, c##i##v##h)
#define MOE__INT8_OUT(S, i, v)                                                                     \
  MOE__INT8_END(S, i, 0,                                                                           \
                moe__v128_ifour(MOE__INT8_FOUR(i, 0), MOE__INT8_FOUR(i, 1), MOE__INT8_FOUR(i, 2),  \
                                MOE__INT8_FOUR(i, 3)))
MOE__KERNELS2(MOE__INT8_KERNEL, moe__v128, MOE__T_V128, 1)
static const moe__int8_kernels moe__v128_int8 = {
    {{NULL}, {NULL, MOE__NAMES2(moe__v128_int8, 1)}, {NULL}, {NULL}},
    {0, 2, 0, 0},
    0,
    moe__v128_int8_quantize,
    moe__v128_int8_dot4,
    NULL};
#undef MOE__INT8_SUM
#undef MOE__INT8_HALVES
#undef MOE__INT8_STEP
#undef MOE__INT8_FOUR
#undef MOE__INT8_OUT

#ifdef MOE__NEON_DOT
/* With dot products: four outputs to a register, as with VNNI, but signed times signed */
#if defined(__ARM_FEATURE_DOTPROD) || defined(_MSC_VER)
#define MOE__T_NEON_DOT
#elif defined(__clang__)
#define MOE__T_NEON_DOT MOE__TARGET("dotprod")
#else
#define MOE__T_NEON_DOT MOE__TARGET("arch=armv8.2-a+dotprod")
#endif
#define MOE__NEON_DOT4(c, x, w) vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(c), x, w))
MOE__INT8_DOT4(moe__neon_dot_int8_dot4, MOE__T_NEON_DOT, MOE__NEON_DOT4)

#define MOE__INT8_SUM(S, i, v)                                                                     \
  moe__qi c##i##v##0 = moe__v128_iset(0).a, c##i##v##1 = c##i##v##0, c##i##v##2 = c##i##v##0,      \
          c##i##v##3 = c##i##v##0;
#define MOE__INT8_ADD(S, i, v)                                                                     \
  c##i##v##0 = MOE__NEON_DOT4(c##i##v##0, s, w##v##0);                                             \
  c##i##v##1 = MOE__NEON_DOT4(c##i##v##1, s, w##v##1);                                             \
  c##i##v##2 = MOE__NEON_DOT4(c##i##v##2, s, w##v##2);                                             \
  c##i##v##3 = MOE__NEON_DOT4(c##i##v##3, s, w##v##3);
#define MOE__INT8_STEP(S, P, i)                                                                    \
  {                                                                                                \
    moe__q8 s = MOE__Q8_SET(moe__int8_step(x + i * b->x_row));                                     \
    MOE__EACH_PANEL##P(MOE__INT8_ADD, S, i)                                                        \
  }
#define MOE__INT8_OUT(S, i, v)                                                                     \
  MOE__INT8_END(moe__v128, i, v, moe__v128_ifour(c##i##v##0, c##i##v##1, c##i##v##2, c##i##v##3))
MOE__INT8_SMALL(moe__neon_dot, MOE__T_NEON_DOT)
static const moe__int8_kernels moe__neon_dot_int8 = {MOE__INT8_SMALL_TABLE(moe__neon_dot), 0,
                                                     moe__v128_int8_quantize,
                                                     moe__neon_dot_int8_dot4, NULL};
#undef MOE__INT8_SUM
#undef MOE__INT8_ADD
#undef MOE__INT8_STEP
#undef MOE__INT8_OUT
#endif
#undef MOE__INT8_LOAD
#undef MOE__INT8_DOT4
#undef MOE__INT8_KERNEL
#undef MOE__INT8_SMALL
#undef MOE__INT8_SMALL_TABLE
#undef MOE__INT8_KERNEL_START
#undef MOE__INT8_KERNEL_STORE
#undef MOE__INT8_END
#undef MOE__INT8_QUANTIZE
#endif

#ifdef MOE__RVV
static const moe__int8_kernels moe__v128_int8 = MOE__INT8_PLAIN;
#endif

/* ---- products with int8 weights over threads; packing, quantising ---- >>int8_run */

#ifdef MOE__SIMD
/* Bytes of quantised rows; fewer than MOE__INT8_MC rows fit if they are long. */
enum { MOE__INT8_BUFFER = 1 << 16 };

/* Rows of x for AMX: the bytes from one to the next, an odd number of cache lines, so that rows do
   not evict each other; and their last line, whose steps are moved to its end, after zeros. */
static size_t moe__int8_tiled_row(size_t k) { return ((moe__int8_steps(k) + 15) / 16 | 1) * 64; }

static void moe__int8_lines(unsigned char *x, size_t k) {
  size_t steps = moe__int8_steps(k), used = 4 * ((steps - 1) % 16 + 1);
  unsigned char *last = x + 4 * steps - used;
  if (used == 64) return;
  memmove(last + 64 - used, last, used);
  memset(last, 0, 64 - used);
}
#endif

#ifdef MOE__AMX
/* Whether AMX pays for so many rows: a step takes 16 cycles for 1 to 16 rows, VNNI takes 8 for
   each. Shorter rows would not fill a tile. */
static int moe__int8_tiles_pay(const moe_env *env, size_t rows, size_t k) {
  size_t most = MOE__INT8_BUFFER / moe__int8_tiled_row(k);
  if (rows > most) rows = most;
  return k > 60 && rows > (env->cpu_flags & MOE_CPU_AVX512_VNNI ? 2u : 0u);
}
#endif

/* The kernels for tiles of so many rows and weights in panels. */
MOE__UNUSED static const moe__int8_kernels *moe__int8_pick(const moe_env *env, size_t rows,
                                                           size_t k) {
#ifdef MOE__AMX
  if (env->isa == MOE_ISA_AVX512 && (env->cpu_flags & MOE_CPU_AMX_INT8) &&
      moe__int8_tiles_pay(env, rows, k))
    return &moe__amx_int8;
#endif
#ifdef MOE__AVX512_VNNI
  if (env->isa == MOE_ISA_AVX512 && (env->cpu_flags & MOE_CPU_AVX512_VNNI)) return &moe__vnni_int8;
#endif
#ifdef MOE__AVX_VNNI
  if ((env->isa == MOE_ISA_AVX2 || env->isa == MOE_ISA_AVX512) &&
      (env->cpu_flags & MOE_CPU_AVX_VNNI))
    return &moe__avx_vnni_int8;
#endif
#ifdef MOE__NEON_DOT
  if (env->isa == MOE_ISA_NEON && (env->cpu_flags & MOE_CPU_NEON_DOT)) return &moe__neon_dot_int8;
#endif
  (void)rows, (void)k;
  return MOE__V_PICK(env->isa, int8);
}

#ifdef MOE__SIMD
/* A tile: `rows` quantised rows of x from `row` on, times columns j0 .. j1-1. */
typedef struct moe__int8_tile {
  const moe__gemm *g;
  const moe__int8_kernels *kernels;
  const moe__gemm_kernels *elements;
  size_t j0, j1, row, rows;
  const unsigned char *x; /* its rows are x_row bytes apart */
  size_t x_row;
  const float *x_scale;
  size_t shape; /* see moe__amx_shape */
} moe__int8_tile;

/* How many of the `left` panels the next kernel takes. Wide kernels take few rows, so only few rows
   take them. */
static size_t moe__int8_width(const moe__int8_kernels *kernels, size_t rows, size_t left) {
  size_t width = left < MOE__INT8_PANELS ? left : (size_t)MOE__INT8_PANELS;
  while (!kernels->rows[width] || (width > 1 && (size_t)kernels->rows[width] < rows &&
                                   kernels->rows[width] < kernels->rows[1]))
    --width;
  return width;
}

/* With weights in panels. */
static void moe__int8_panels(moe__int8_tile *t) {
  const moe__gemm *g = t->g;
  const moe_mat *w = g->quantized;
  moe__int8_block b;
  size_t j, i, width, most;
  memset(&b, 0, sizeof b);
  b.c_row = g->c_row;
  b.x_row = t->x_row;
  b.panel = moe__int8_panel((size_t)g->k);
  b.steps = moe__int8_steps((size_t)g->k);
  b.shape = &t->shape;
  for (j = t->j0; j < t->j1; j += 16 * width) {
    float *c = g->c + t->row * g->c_row + j;
    width = moe__int8_width(t->kernels, t->rows, (t->j1 - j + 15) / 16);
    most = (size_t)t->kernels->rows[width];
    b.panels = (const signed char *)w->data + j / 16 * b.panel;
    b.scale = w->scale + j;
    b.bias = g->bias ? g->bias + j : NULL;
    b.columns = t->j1 - j < 16 * width ? t->j1 - j : 16 * width;
    for (i = 0; i < t->rows; i += most) {
      size_t take = t->rows - i < most ? t->rows - i : most;
      b.c = c + i * g->c_row;
      b.x = t->x + i * t->x_row;
      b.x_scale = t->x_scale + i;
      b.rows = take;
      t->kernels->fn[width][take < MOE__INT8_ROWS ? take : (size_t)MOE__INT8_ROWS](&b);
    }
    if (g->gelu)
      t->elements->gelu(g->gelu + t->row * g->c_row + j, c, g->c_row, t->rows, b.columns);
  }
}

/* With weights in rows, as files have them: dot products. */
static void moe__int8_rows(const moe__int8_tile *t) {
  const moe__gemm *g = t->g;
  const moe_mat *w = g->quantized;
  size_t k = (size_t)g->k, i, j, v;
  for (j = t->j0; j < t->j1; j += 4) {
    size_t n = t->j1 - j < 4 ? t->j1 - j : 4;
    const signed char *from = (const signed char *)w->data + j * k;
    for (i = 0; i < t->rows; ++i) {
      float *c = g->c + (t->row + i) * g->c_row + j;
      const unsigned char *x = t->x + i * t->x_row;
      int32_t sum[4] = {0, 0, 0, 0};
      if (n == 4)
        t->kernels->dot4(sum, x, from, k, k);
      else
        for (v = 0; v < n; ++v) {
          int32_t same[4]; /* one weight four times, at the right edge only */
          t->kernels->dot4(same, x, from + v * k, 0, k);
          sum[v] = same[0];
        }
      for (v = 0; v < n; ++v)
        c[v] = moe__fmaf((float)sum[v], t->x_scale[i] * w->scale[j + v],
                         g->bias ? g->bias[j + v] : 0.0f);
    }
  }
  if (g->gelu)
    t->elements->gelu(g->gelu + t->row * g->c_row + t->j0, g->c + t->row * g->c_row + t->j0,
                      g->c_row, t->rows, t->j1 - t->j0);
}

/* Rows i0 .. i1-1 of the columns of a tile. */
MOE__NOINLINE static void moe__int8_blocks(moe__int8_tile *t, size_t i0, size_t i1) {
  unsigned char space[MOE__INT8_BUFFER + 64], *x = space + (64 - (uintptr_t)space % 64);
  float x_scale[MOE__INT8_MC];
  const moe__gemm *g = t->g;
  int in_panels = g->quantized->layout == MOE_LAYOUT_PANELS,
      tiles = in_panels && t->kernels->leave != NULL;
  size_t k = (size_t)g->k, bytes = 4 * moe__int8_steps(k), most = MOE__INT8_MC, r;
  unsigned flip = in_panels ? t->kernels->flip : 0;
  t->x = x;
  t->x_row = tiles ? moe__int8_tiled_row(k) : bytes;
  t->x_scale = x_scale;
  MOE_ASSERT(g->a_col == 1 && !g->accumulate && !g->a_sum && t->x_row <= MOE__INT8_BUFFER);
  if (t->x_row * most > MOE__INT8_BUFFER) most = MOE__INT8_BUFFER / t->x_row;
  if (tiles && most > 16 && most < 32) most = 16; /* 17 rows take as long as 32 */
  for (t->row = i0; t->row < i1; t->row += t->rows) {
    t->rows = i1 - t->row < most ? i1 - t->row : most;
    for (r = 0; r < t->rows; ++r) {
      unsigned char *to = x + r * t->x_row;
      x_scale[r] = t->kernels->quantize(to, g->a + (t->row + r) * g->a_row, k, flip);
      memset(to + k, (int)flip, bytes - k);
      if (tiles) moe__int8_lines(to, k);
    }
    if (in_panels)
      moe__int8_panels(t);
    else
      moe__int8_rows(t);
  }
  if (t->shape) t->kernels->leave();
}
#endif

typedef struct moe__int8_work {
  const moe__gemm *list;
  const moe_env *env;
  int32_t across;  /* column blocks of a product, each of which quantises x again */
  int32_t columns; /* columns of a block are a multiple of this, so kernels of any width fill it */
} moe__int8_work;

static int32_t moe__int8_down(const moe__gemm *g) {
  return (g->m + MOE__INT8_MC - 1) / MOE__INT8_MC;
}

static void moe__int8_tile_run(const moe__int8_work *work, const moe__gemm *g, int32_t i0,
                               int32_t i1, int32_t j0, int32_t j1) {
#ifdef MOE__SIMD
  const moe__int8_kernels *kernels = moe__int8_pick(work->env, (size_t)(i1 - i0), (size_t)g->k);
  if (kernels->dot4) {
    moe__int8_tile t;
    memset(&t, 0, sizeof t);
    t.g = g;
    t.kernels = kernels;
    t.elements = MOE__V_PICK(work->env->isa, gemms);
    t.j0 = (size_t)j0;
    t.j1 = (size_t)j1;
    moe__int8_blocks(&t, (size_t)i0, (size_t)i1);
    return;
  }
#endif
  (void)work;
  moe__plain_int8(g, (size_t)i0, (size_t)i1, (size_t)j0, (size_t)j1);
}

static void moe__int8_work_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__int8_work *work = (const moe__int8_work *)arg;
  const moe__gemm *g = work->list;
  int32_t wide, i, j, end;
  (void)slot;
  for (; tile >= moe__int8_down(g) * work->across; ++g) tile -= moe__int8_down(g) * work->across;
  wide = (g->n + work->across - 1) / work->across;
  wide = (wide + work->columns - 1) / work->columns * work->columns;
  i = tile / work->across * MOE__INT8_MC;
  j = tile % work->across * wide;
  end = moe__min(i + MOE__INT8_MC, g->m);
  if (j < g->n) moe__int8_tile_run(work, g, i, end, j, moe__min(j + wide, g->n));
}

/* Computes independent products with int8 weights. Tiles may depend on the number of threads, since
   sums of integers are exact. */
static void moe__int8_run(const moe__gemm *list, int32_t count, const moe_env *env) {
  moe__int8_work work;
  int32_t tiles = 0, i;
  float size = 0;
  for (i = 0; i < count; ++i) {
    tiles += moe__int8_down(&list[i]);
    size += moe__work_of(list[i].m, list[i].n, list[i].k);
  }
  if (tiles == 0) return;
  work.list = list;
  work.env = env;
  work.across = 1;
  work.columns = env->cpu_flags & MOE_CPU_AMX_INT8 ? 96 : 48;
  if (size >= 4 * (float)MOE__GEMM_SMALL && env->parallel_for && env->threads > 1) {
    work.across = moe__min((2 * env->threads + tiles - 1) / tiles, 16);
    moe__parallel(env, tiles * work.across, moe__int8_work_tile, &work);
  } else
    for (i = 0; i < tiles; ++i) moe__int8_work_tile(&work, i, 0);
}

MOE_API moe_mat moe_mat_rows_int8(const int8_t *w, const float *scale, int32_t rows, int32_t cols) {
  moe_mat mat = moe_mat_rows(NULL, rows, cols);
  mat.data = w;
  mat.scale = scale;
  mat.type = MOE_TYPE_I8;
  return mat;
}

MOE_API moe_mat moe_mat_panels_int8(const void *panels, const float *scale, int32_t rows,
                                    int32_t cols) {
  moe_mat mat = moe_mat_rows_int8(NULL, scale, rows, cols);
  mat.data = panels;
  mat.layout = MOE_LAYOUT_PANELS;
  return mat;
}

MOE_API size_t moe_pack_int8_bytes(int32_t rows, int32_t cols) {
  return ((size_t)rows + 15) / 16 * moe__int8_panel((size_t)cols);
}

#ifndef MOE_NO_INT8
typedef struct moe__int8_pack {
  signed char *panels;
  const int8_t *w;
  int8_t *q;
  float *scale;
  const float *from;
  size_t rows, cols;
  const moe__int8_kernels *kernels;
} moe__int8_pack;

static void moe__int8_pack_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__int8_pack *job = (const moe__int8_pack *)arg;
  size_t row = (size_t)tile * 16, width = job->rows - row < 16 ? job->rows - row : 16,
         bytes = moe__int8_panel(job->cols), j, p;
  signed char *panel = job->panels + (size_t)tile * bytes;
  int32_t sum[16] = {0};
  (void)slot;
  memset(panel, 0, bytes);
  for (j = 0; j < width; ++j) {
    const int8_t *w = job->w + (row + j) * job->cols;
    signed char *to = panel + 4 * j;
    for (p = 0; p + 4 <= job->cols; p += 4) memcpy(to + p * 16, w + p, 4);
    if (p < job->cols) memcpy(to + p * 16, w + p, job->cols - p);
    for (p = 0; p < job->cols; ++p) sum[j] += w[p];
    sum[j] *= -128;
  }
  memcpy(panel + bytes - 64, sum, 64);
}

MOE_API void moe_pack_int8(void *panels, const int8_t *w, int32_t rows, int32_t cols,
                           const moe_env *env) {
  moe__int8_pack job;
  memset(&job, 0, sizeof job);
  job.panels = (signed char *)panels;
  job.w = w;
  job.rows = (size_t)rows;
  job.cols = (size_t)cols;
  moe__parallel(env, (rows + 15) / 16, moe__int8_pack_tile, &job);
}

static void moe__int8_quantize_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__int8_pack *job = (const moe__int8_pack *)arg;
  size_t row = (size_t)tile * 16, end = row + 16 < job->rows ? row + 16 : job->rows;
  (void)slot;
  for (; row < end; ++row)
    job->scale[row] = job->kernels->quantize((unsigned char *)(void *)(job->q + row * job->cols),
                                             job->from + row * job->cols, job->cols, 0);
}

MOE_API void moe_quantize(int8_t *q, float *scale, const float *w, int32_t rows, int32_t cols,
                          const moe_env *env) {
  moe__int8_pack job;
  memset(&job, 0, sizeof job);
  job.q = q;
  job.scale = scale;
  job.from = w;
  job.rows = (size_t)rows;
  job.cols = (size_t)cols;
  job.kernels = moe__int8_pick(env, 0, 0); /* all give the same integers */
  moe__parallel(env, (rows + 15) / 16, moe__int8_quantize_tile, &job);
}
#endif

/* ---- products with bf16 operands: what they are, plain C ---- >>bf16 */

/* C = A B with the elements of A and B rounded to bf16 (8 bits of significand, the exponent of a
   float) and sums in fp32. Only copies are rounded: weights, activations and gradients stay fp32 in
   memory.

   Rounding: to nearest, ties to even; denormals become zero, NaN stays NaN.

   One definition of every sum, for plain C, AVX-512 and AVX512-BF16: an element of C is one chain
   of fused multiply-adds that begins as in >>gemm. It takes the elements of k by pairs (0 and 1, 2
   and 3, ...; zeros complete the last pair of an odd k), of each pair first the second, then the
   first element. Denormals, in C too, count as zeros, and a denormal result of a step becomes zero.
   vdpbf16ps does exactly this; FMAs do the same when the processor flushes denormals. AVX2 and NEON
   run the plain C. The bits of a row do not depend on the other rows, the layout of the weights,
   blocks, tiles or threads.
   AMX has its own bits: tdpbf16ps takes 16 pairs at a time, adds up their first and their second
   elements in two chains that begin with 0, and adds the sum of the two to C. They do not depend on
   rows, layout or threads either.
   In both, a sum over tokens (the gradient of a weight) pairs the tokens of one call, so micro-
   batches give other bits than one batch. Results differ from fp32: each operand has a relative
   error of up to 2^-8.

   Panels of weights: 16 outputs side by side, in steps of 2 inputs. Word j of step t is the pair
   (2t, 2t+1) of output j, the first in the low half: 64 bytes, one register of AVX-512 and one row
   of a tile of AMX. The last step of an odd k has zeros in its high halves. */

#ifndef MOE_NO_BF16
/* x rounded to bf16, as the bits of a float. */
static uint32_t moe__bf16_round(float x) {
  uint32_t u = moe__bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    u |= 0x00400000u;
  else if (!(u & 0x7f800000u))
    u &= 0x80000000u;
  else
    u += 0x7fffu + (u >> 16 & 1);
  return u & 0xffff0000u;
}

/* A step of the chain: a b + c, where only c may be denormal. A result is flushed where it is below
   2^-126 when rounded to 24 bits; the midpoint between 2^-126 and the number before rounds up. Near
   there the sum in double is exact. */
static float moe__bf16_fma(float a, float b, float c) {
  double exact;
  float r;
  if (!(moe__bits(c) & 0x7f800000u)) c = moe__floats(moe__bits(c) & 0x80000000u);
  r = moe__fmaf(a, b, c);
  if (!(moe__floats(moe__bits(r) & 0x7fffffffu) < 2.4e-38f)) return r;
  exact = (double)a * (double)b + (double)c;
  if (exact < 0) exact = -exact;
  return exact < 1.1754943508222875e-38 * (1 - 1.0 / 33554432)
             ? moe__floats(moe__bits(r) & 0x80000000u)
             : r;
}

/* The pair of elements 2t and 2t + 1 of column j of B, rounded, the first in the low half. */
static uint32_t moe__plain_bf16_pair(const moe__gemm *g, size_t t, size_t j) {
  size_t k = (size_t)g->k, b_step, b_col;
  const float *b = moe__plain_b(g, j / 16 * 16, &b_step, &b_col);
  uint32_t low, high;
  if (g->b_layout == MOE__B_PAIRS)
    return ((const uint32_t *)(const void *)g->b)[(j / 16 * ((k + 1) / 2) + t) * 16 + j % 16];
  b += j % 16 * b_col;
  low = moe__bf16_round(b[2 * t * b_step]) >> 16;
  high = 2 * t + 1 < k ? moe__bf16_round(b[(2 * t + 1) * b_step]) : 0u;
  return low | high;
}

/* The definition, in plain C: rows i0 .. i1-1 and columns j0 .. j1-1, j0 a multiple of 16. */
static void moe__plain_bf16(const moe__gemm *g, size_t i0, size_t i1, size_t j0, size_t j1) {
  size_t k = (size_t)g->k, i, j, t, v, n;
  float sum[16];
  for (j = j0; j < j1; j += n)
    for (n = j1 - j < 16 ? j1 - j : 16, i = i0; i < i1; ++i) {
      const float *a = g->a + i * g->a_row;
      float *c = g->c + i * g->c_row + j;
      for (v = 0; v < n; ++v) sum[v] = g->accumulate ? c[v] : g->bias ? g->bias[j + v] : 0.0f;
      for (t = 0; 2 * t < k; ++t) {
        float first = moe__floats(moe__bf16_round(a[2 * t * g->a_col])), second = 0;
        if (2 * t + 1 < k) second = moe__floats(moe__bf16_round(a[(2 * t + 1) * g->a_col]));
        for (v = 0; v < n; ++v) {
          uint32_t w = moe__plain_bf16_pair(g, t, j + v);
          sum[v] = moe__bf16_fma(second, moe__floats(w & 0xffff0000u), sum[v]);
          sum[v] = moe__bf16_fma(first, moe__floats(w << 16), sum[v]);
        }
      }
      for (v = 0; v < n; ++v) c[v] = sum[v];
      if (g->gelu) moe__scalar_gelu(g->gelu + i * g->c_row + j, c, g->c_row, 1, n);
    }
}

/* The panel of the 16 columns of B from j on. */
static void moe__plain_bf16_pack(uint32_t *panel, const moe__gemm *g, size_t j) {
  size_t t, v;
  for (t = 0; 2 * t < (size_t)g->k; ++t)
    for (v = 0; v < 16; ++v)
      *panel++ = j + v < (size_t)g->n ? moe__plain_bf16_pair(g, t, j + v) : 0u;
}
#endif

/* ---- kernels with bf16 operands: AVX-512, vdpbf16ps, AMX ---- >>bf16_x86 */

#if defined(MOE__X86) && !defined(MOE_NO_BF16)
/* Blocks of A are copied: as pairs for vdpbf16ps and AMX, as rounded floats for FMAs. */
enum {
  MOE__BF16_WIDE = 6,          /* most panels that a kernel takes */
  MOE__BF16_EDGE = 32 * 2 * 16 /* floats of the largest block of C */
};

/* The operands of a kernel. A word of A is the bits of a float, or a pair. */
typedef struct moe__bf16_block {
  float *c;
  size_t c_row;
  const float *start; /* what the sums begin with */
  size_t start_row;   /* 0: the same for every row */
  const uint32_t *a;
  size_t a_row, a_col; /* in words */
  const uint32_t *b;   /* panels, b_panel words apart */
  size_t b_panel;
  size_t steps;   /* pairs of k */
  size_t columns; /* outputs that there are */
  size_t *shape;  /* see moe__amx_shape */
} moe__bf16_block;

/* c(i, j) = start(i, j) + sum over the pairs, for all columns of some panels. AMX takes any number
   of rows. */
typedef void (*moe__bf16_fn)(const moe__bf16_block *b, size_t rows);

typedef struct moe__bf16_kernels {
  moe__bf16_fn fn[MOE__BF16_WIDE + 1][9]; /* [panels][rows, 8 for all above] */
  int rows[MOE__BF16_WIDE + 1];           /* most rows for so many panels, 0: no such kernel */
  int few, many, usual; /* panels to take: `many` where there are at most `few` rows */
  int pairs;            /* A as pairs, else as floats */
  int turned; /* the pairs of a row of A side by side, even where A is stored column by column; 16
                 at a time */
  unsigned (*begin)(
      void); /* before kernels run, after, and at the end of a tile; NULL: nothing to do */
  void (*end)(unsigned saved);
  void (*leave)(void);
  /* to[l to_ld + x] = rounded from[l ld + x], as bits of floats; a zero is appended to an odd
     line */
  void (*floats)(uint32_t *to, size_t to_ld, const float *from, size_t ld, size_t lines,
                 size_t length);
  /* to[l to_ld + t] = the pair (2t, 2t + 1) of line l; lines are padded with zeros to a multiple of
     16 words */
  void (*along)(uint32_t *to, size_t to_ld, const float *from, size_t ld, size_t lines,
                size_t length);
  /* to[t to_ld + x / 16 panel + x % 16] = element x of lines 2t and 2t + 1, padded in the same
     way */
  void (*across)(uint32_t *to, size_t to_ld, size_t panel, const float *from, size_t ld,
                 size_t lines, size_t length);
  /* to[x to_ld + y] = block[y 16 + x], 16 by 16 */
  void (*turn)(uint32_t *to, size_t to_ld, const uint32_t *block);
} moe__bf16_kernels;

MOE__T_AVX512 MOE__INLINE __m512i moe__avx512_bf16_round(__m512 x) {
  __m512i u = _mm512_castps_si512(x);
  __m512i up = _mm512_add_epi32(_mm512_set1_epi32(0x7fff),
                                _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1)));
  __mmask16 normal = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x7f800000)),
            strange = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  __m512i r = _mm512_mask_add_epi32(_mm512_and_si512(u, _mm512_set1_epi32((int)0x80000000u)),
                                    normal, u, up);
  r = _mm512_mask_or_epi32(r, strange, u, _mm512_set1_epi32(0x00400000));
  return _mm512_and_si512(r, _mm512_set1_epi32((int)0xffff0000u));
}

MOE__T_AVX512 static void moe__avx512_bf16_floats(uint32_t *to, size_t to_ld, const float *from,
                                                  size_t ld, size_t lines, size_t length) {
  for (; lines > 0; --lines, to += to_ld, from += ld) {
    size_t x = 0;
    for (; x + 16 <= length; x += 16)
      _mm512_storeu_si512(to + x, moe__avx512_bf16_round(_mm512_loadu_ps(from + x)));
    if (x < length) {
      __m512i last = moe__avx512_bf16_round(moe__avx512_loadn(from + x, length - x));
      _mm512_mask_storeu_epi32(to + x, moe__avx512_first((length - x + 1) / 2 * 2), last);
    }
  }
}

/* The high halves of 16 words */
#define MOE__BF16_HALVES(v) _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16))

MOE__T_AVX512 static void moe__avx512_bf16_along(uint32_t *to, size_t to_ld, const float *from,
                                                 size_t ld, size_t lines, size_t length) {
  for (; lines > 0; --lines, to += to_ld, from += ld) {
    size_t x;
    for (x = 0; x < length; x += 32) {
      size_t left = length - x;
      __m512 low = left >= 16 ? _mm512_loadu_ps(from + x) : moe__avx512_loadn(from + x, left),
             high = _mm512_setzero_ps();
      if (left >= 32)
        high = _mm512_loadu_ps(from + x + 16);
      else if (left > 16)
        high = moe__avx512_loadn(from + x + 16, left - 16);
      _mm512_storeu_si512(
          to + x / 2,
          _mm512_inserti64x4(_mm512_castsi256_si512(MOE__BF16_HALVES(moe__avx512_bf16_round(low))),
                             MOE__BF16_HALVES(moe__avx512_bf16_round(high)), 1));
    }
  }
}

MOE__T_AVX512 static void moe__avx512_bf16_across(uint32_t *to, size_t to_ld, size_t panel,
                                                  const float *from, size_t ld, size_t lines,
                                                  size_t length) {
  size_t l, x;
  for (l = 0; l < lines; l += 2, to += to_ld, from += 2 * ld)
    for (x = 0; x < length; x += 16) {
      size_t left = length - x < 16 ? length - x : 16;
      __m512 high = l + 1 < lines ? moe__avx512_loadn(from + ld + x, left) : _mm512_setzero_ps();
      __m512i low =
          _mm512_srli_epi32(moe__avx512_bf16_round(moe__avx512_loadn(from + x, left)), 16);
      _mm512_storeu_si512(to + x / 16 * panel, _mm512_or_si512(low, moe__avx512_bf16_round(high)));
    }
}

/* 16 rows of 16 words to columns, in four rounds: of words, of pairs of words, of quarters of a
   register twice. */
MOE__T_AVX512 static void moe__avx512_bf16_turn(uint32_t *to, size_t to_ld, const uint32_t *block) {
  __m512i r[16], s[16];
  int i;
  for (i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(block + 16 * i);
  for (i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
  for (i = 0; i < 4; ++i) { /* r[4 g + i]: column 4 q + i of the rows 4 g .. 4 g + 3 in quarter q */
    s[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    s[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    s[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    s[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + (size_t)i * to_ld, _mm512_shuffle_i32x4(s[i], s[8 + i], 0x88));
    _mm512_storeu_si512(to + (size_t)(8 + i) * to_ld, _mm512_shuffle_i32x4(s[i], s[8 + i], 0xdd));
    _mm512_storeu_si512(to + (size_t)(4 + i) * to_ld,
                        _mm512_shuffle_i32x4(s[4 + i], s[12 + i], 0x88));
    _mm512_storeu_si512(to + (size_t)(12 + i) * to_ld,
                        _mm512_shuffle_i32x4(s[4 + i], s[12 + i], 0xdd));
  }
}
#undef MOE__BF16_HALVES

/* Denormal inputs and results are zeros, nothing traps, rounding to nearest. */
static unsigned moe__x86_flush(void) {
  unsigned saved = _mm_getcsr();
  _mm_setcsr(0x9fc0u);
  return saved;
}
static void moe__x86_unflush(unsigned saved) { _mm_setcsr(saved); }

/* FMAs, as in >>gemm: up to 8 rows by 3 panels or 4 by 6. Panels are widened to floats once for all
   rows. A processor without vdpbf16ps, or with a slow one, multiplies as fast as in fp32 and reads
   half the bytes of the weights. */
#define MOE__BF16_WORD(p) _mm512_castsi512_ps(_mm512_set1_epi32((int)(p)))
#define MOE__BF16_START(S, i, v)                                                                   \
  __m512 c##i##v = _mm512_loadu_ps(b->start + i * b->start_row + 16 * v);
#define MOE__BF16_STORE(S, i, v) _mm512_storeu_ps(b->c + i * b->c_row + 16 * v, c##i##v);
#define MOE__BF16_HIGH(S, i, v)                                                                    \
  __m512 w##v = _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(w + v * b_panel), halves));
#define MOE__BF16_LOW(S, i, v)                                                                     \
  __m512 w##v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(w + v * b_panel), 16));
#define MOE__BF16_ADD(S, i, v) c##i##v = _mm512_fmadd_ps(s, w##v, c##i##v);
#define MOE__BF16_ROW_START(S, P, i) MOE__EACH_PANEL##P(MOE__BF16_START, S, i)
#define MOE__BF16_ROW_STORE(S, P, i) MOE__EACH_PANEL##P(MOE__BF16_STORE, S, i)
#define MOE__BF16_ROW_STEP(S, P, i)                                                                \
  {                                                                                                \
    __m512 s = MOE__BF16_WORD(MOE__A##i);                                                          \
    MOE__EACH_PANEL##P(MOE__BF16_ADD, S, i)                                                        \
  }
#define MOE__BF16_FMA(S, T, R, P)                                                                  \
  T static void S##_bf16_##R##x##P(const moe__bf16_block *b, size_t rows) {                        \
    const uint32_t *x = b->a, *w = b->b;                                                           \
    size_t a_row = b->a_row, a_row3 = 3 * a_row, a_col = b->a_col, b_panel = b->b_panel,           \
           steps = b->steps;                                                                       \
    __m512i halves = _mm512_set1_epi32((int)0xffff0000u);                                          \
    MOE__EACH_ROW##R(MOE__BF16_ROW_START, S, P) for (; steps > 0;                                  \
                                                     --steps, x += 2 * a_col, w += 16) {           \
      {                                                                                            \
        const uint32_t *a = x + a_col, *a4 = R > 4 ? a + 4 * a_row : a;                            \
        MOE__EACH_PANEL##P(MOE__BF16_HIGH, S, 0) MOE__EACH_ROW##R(MOE__BF16_ROW_STEP, S, P)(void)  \
            a4;                                                                                    \
      }                                                                                            \
      {                                                                                            \
        const uint32_t *a = x, *a4 = R > 4 ? a + 4 * a_row : a;                                    \
        MOE__EACH_PANEL##P(MOE__BF16_LOW, S, 0) MOE__EACH_ROW##R(MOE__BF16_ROW_STEP, S, P)(void)   \
            a4;                                                                                    \
      }                                                                                            \
    }                                                                                              \
    MOE__EACH_ROW##R(MOE__BF16_ROW_STORE, S, P)(void) rows, (void)a_row3, (void)b_panel;           \
  }
MOE__KERNELS8(MOE__BF16_FMA, moe__avx512, MOE__T_AVX512, 1)
MOE__KERNELS8(MOE__BF16_FMA, moe__avx512, MOE__T_AVX512, 2)
MOE__KERNELS8(MOE__BF16_FMA, moe__avx512, MOE__T_AVX512, 3)
MOE__KERNELS4(MOE__BF16_FMA, moe__avx512, MOE__T_AVX512, 6)
/* clang-format off */
static const moe__bf16_kernels moe__avx512_bf16 = {
    {{NULL}, {NULL, MOE__NAMES8(moe__avx512_bf16, 1)}, {NULL, MOE__NAMES8(moe__avx512_bf16, 2)},
    {NULL, MOE__NAMES8(moe__avx512_bf16, 3)}, {NULL}, {NULL},
    {NULL, MOE__NAMES4(moe__avx512_bf16, 6)}}, {0, 8, 8, 8, 0, 0, 4}, 4, 6, 3, 0, 0, moe__x86_flush,
    moe__x86_unflush, NULL, moe__avx512_bf16_floats, moe__avx512_bf16_along,
    moe__avx512_bf16_across, moe__avx512_bf16_turn};
/* clang-format on */

#ifdef MOE__AVX512_BF16
/* The same with vdpbf16ps, in inline assembly for the reason given at moe__vnni_add; so no compiler
   needs to know it by name. vcvtne2ps2bf16 rounds 16 floats each to the low and the high half of a
   register, with a fifth of the instructions of moe__avx512_bf16_round. */
MOE__T_AVX512 MOE__INLINE __m512i moe__bf16_halves(__m512 low, __m512 high) {
  __m512i r;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(r) : "v"(low), "v"(high));
  return r;
}

MOE__T_AVX512 static void moe__dp_bf16_along(uint32_t *to, size_t to_ld, const float *from,
                                             size_t ld, size_t lines, size_t length) {
  for (; lines > 0; --lines, to += to_ld, from += ld) {
    size_t x = 0, left;
    for (; x + 32 <= length; x += 32)
      _mm512_storeu_si512(
          to + x / 2, moe__bf16_halves(_mm512_loadu_ps(from + x), _mm512_loadu_ps(from + x + 16)));
    left = length - x;
    if (left > 16)
      _mm512_storeu_si512(
          to + x / 2,
          moe__bf16_halves(_mm512_loadu_ps(from + x), moe__avx512_loadn(from + x + 16, left - 16)));
    else if (left > 0)
      _mm512_storeu_si512(to + x / 2,
                          moe__bf16_halves(moe__avx512_loadn(from + x, left), _mm512_setzero_ps()));
  }
}

MOE__T_AVX512 static void moe__dp_bf16_across(uint32_t *to, size_t to_ld, size_t panel,
                                              const float *from, size_t ld, size_t lines,
                                              size_t length) {
  __m512i pairs =
      _mm512_or_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                      _mm512_set1_epi32(16 << 16));
  size_t l, x;
  pairs = _mm512_add_epi32(pairs, _mm512_slli_epi32(_mm512_and_si512(pairs, _mm512_set1_epi32(15)),
                                                    16)); /* word j: j, 16 + j */
  for (l = 0; l < lines; l += 2, to += to_ld, from += 2 * ld)
    for (x = 0; x < length; x += 16) {
      __mmask16 mask = length - x < 16 ? moe__avx512_first(length - x) : (__mmask16)0xffff;
      __m512 low = _mm512_maskz_loadu_ps(mask, from + x), high = _mm512_setzero_ps();
      if (l + 1 < lines) high = _mm512_maskz_loadu_ps(mask, from + ld + x);
      _mm512_storeu_si512(to + x / 16 * panel,
                          _mm512_permutexvar_epi16(pairs, moe__bf16_halves(low, high)));
    }
}

MOE__T_AVX512 MOE__INLINE __m512 moe__bf16_dot(__m512 c, __m512i x, __m512i w) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(x), "v"(w));
  return c;
}
#define MOE__BF16_PAIR(S, i, v) __m512i w##v = _mm512_loadu_si512(w + v * b_panel);
#define MOE__BF16_DOT(S, i, v) c##i##v = moe__bf16_dot(c##i##v, s, w##v);
#define MOE__BF16_ROW_DOT(S, P, i)                                                                 \
  {                                                                                                \
    __m512i s = _mm512_set1_epi32((int)MOE__A##i);                                                 \
    MOE__EACH_PANEL##P(MOE__BF16_DOT, S, i)                                                        \
  }
#define MOE__BF16_DP(S, T, R, P)                                                                   \
  T static void S##_bf16_##R##x##P(const moe__bf16_block *b, size_t rows) {                        \
    const uint32_t *a = b->a, *w = b->b;                                                           \
    size_t a_row = b->a_row, a_row3 = 3 * a_row, a_col = b->a_col, b_panel = b->b_panel,           \
           steps = b->steps;                                                                       \
    MOE__EACH_ROW##R(MOE__BF16_ROW_START, S, P) for (; steps > 0; --steps, a += a_col, w += 16) {  \
      const uint32_t *a4 = R > 4 ? a + 4 * a_row : a;                                              \
      MOE__EACH_PANEL##P(MOE__BF16_PAIR, S, 0) MOE__EACH_ROW##R(MOE__BF16_ROW_DOT, S, P)(void) a4; \
    }                                                                                              \
    MOE__EACH_ROW##R(MOE__BF16_ROW_STORE, S, P)(void) rows, (void)a_row3, (void)b_panel;           \
  }
MOE__KERNELS8(MOE__BF16_DP, moe__dp, MOE__T_AVX512, 1)
MOE__KERNELS8(MOE__BF16_DP, moe__dp, MOE__T_AVX512, 2)
MOE__KERNELS8(MOE__BF16_DP, moe__dp, MOE__T_AVX512, 3)
MOE__KERNELS4(MOE__BF16_DP, moe__dp, MOE__T_AVX512, 6)
/* clang-format off */
static const moe__bf16_kernels moe__dp_bf16 = {
    {{NULL}, {NULL, MOE__NAMES8(moe__dp_bf16, 1)}, {NULL, MOE__NAMES8(moe__dp_bf16, 2)},
    {NULL, MOE__NAMES8(moe__dp_bf16, 3)}, {NULL}, {NULL}, {NULL, MOE__NAMES4(moe__dp_bf16, 6)}},
    {0, 8, 8, 8, 0, 0, 4}, 4, 6, 3, 1, 0, NULL, NULL, NULL, moe__avx512_bf16_floats,
    moe__dp_bf16_along, moe__dp_bf16_across, moe__avx512_bf16_turn};
/* clang-format on */
#undef MOE__BF16_PAIR
#undef MOE__BF16_DOT
#undef MOE__BF16_ROW_DOT
#undef MOE__BF16_DP
#endif
#undef MOE__BF16_WORD
#undef MOE__BF16_START
#undef MOE__BF16_STORE
#undef MOE__BF16_HIGH
#undef MOE__BF16_LOW
#undef MOE__BF16_ADD
#undef MOE__BF16_ROW_START
#undef MOE__BF16_ROW_STORE
#undef MOE__BF16_ROW_STEP
#undef MOE__BF16_FMA

#ifdef MOE__AMX
/* AMX. The last steps, fewer than 16, of some panels, padded with zeros: what follows a panel in
   memory must not be multiplied, not even by zeros. */
static void moe__amx_tail(uint32_t *tail, const uint32_t *w, size_t b_panel, size_t steps,
                          size_t panels) {
  memset(tail, 0, panels * 256 * sizeof *tail);
  for (; panels > 0; --panels, tail += 256, w += b_panel)
    memcpy(tail, w, steps * 16 * sizeof *tail);
}

#define MOE__AMX_BF16_START(D, v, t)                                                               \
  MOE__TILE_LOAD(v, b->start + 16 * v, b->start_row * sizeof(float));
#define MOE__AMX_BF16_STORE(D, v, t) MOE__TILE_STORE(v, b->c + 16 * v, b->c_row * sizeof(float));
#define MOE__AMX_BF16_START2(D, v, t, u)                                                           \
  MOE__TILE_LOAD(v, b->start + 16 * v, b->start_row * sizeof(float));                              \
  MOE__TILE_LOAD(u, b->start + 16 * b->start_row + 16 * v, b->start_row * sizeof(float));
#define MOE__AMX_BF16_STORE2(D, v, t, u)                                                           \
  MOE__TILE_STORE(v, b->c + 16 * v, b->c_row * sizeof(float));                                     \
  MOE__TILE_STORE(u, b->c + 16 * b->c_row + 16 * v, b->c_row * sizeof(float));
/* A is padded with zeros to whole tiles */
#define MOE__AMX_BF16_KERNEL(NAME, P, EACH, START, STEP, STORE, SECOND)                            \
  MOE__T_AVX512 static void NAME(const moe__bf16_block *b, size_t rows) {                          \
    uint32_t tail[256 * P];                                                                        \
    const uint32_t *a = b->a, *w = b->b;                                                           \
    size_t b_panel = b->b_panel, left = b->steps, a_bytes = b->a_row * sizeof *a,                  \
           below = 16 * b->a_row;                                                                  \
    moe__amx_shape(b->shape, rows);                                                                \
    EACH(START, 0)                                                                                 \
    for (; left > 0; left -= left < 16 ? left : 16, a += 16, w += 256) {                           \
      if (left < 16) {                                                                             \
        moe__amx_tail(tail, w, b_panel, left, P);                                                  \
        w = tail;                                                                                  \
        b_panel = 256;                                                                             \
      }                                                                                            \
      MOE__TILE_LOAD(4, a, a_bytes);                                                               \
      if (SECOND) MOE__TILE_LOAD(5, a + below, a_bytes);                                           \
      EACH(STEP, MOE__TILE_BF16)                                                                   \
    }                                                                                              \
    EACH(STORE, 0)                                                                                 \
  }
MOE__AMX_KERNELS(MOE__AMX_BF16_KERNEL, moe__amx_bf16, MOE__AMX_BF16)

static void moe__amx_bf16_1(const moe__bf16_block *b, size_t rows) {
  if (rows > 16)
    moe__amx_bf16_32x1(b, rows);
  else
    moe__amx_bf16_16x1(b, rows);
}
static void moe__amx_bf16_2(const moe__bf16_block *b, size_t rows) {
  if (rows > 16)
    moe__amx_bf16_32x2(b, rows);
  else
    moe__amx_bf16_16x2(b, rows);
}
/* clang-format off */
static const moe__bf16_kernels moe__amx_bf16 = {
    {{NULL}, MOE__AMX_LIST(moe__amx_bf16_1), MOE__AMX_LIST(moe__amx_bf16_2), {NULL},
    MOE__AMX_LIST(moe__amx_bf16_16x4), {NULL}, {NULL}}, {0, 32, 32, 0, 16, 0, 0}, 16, 4, 2, 1, 1,
    NULL, NULL, moe__amx_leave, moe__avx512_bf16_floats, moe__dp_bf16_along, moe__dp_bf16_across,
    moe__avx512_bf16_turn};
/* clang-format on */
#undef MOE__AMX_BF16_KERNEL
#undef MOE__AMX_BF16_STORE2
#undef MOE__AMX_BF16_STORE
#undef MOE__AMX_BF16_START2
#undef MOE__AMX_BF16_START
#endif
#endif /* MOE__X86 and no MOE_NO_BF16 */
#ifdef MOE__AMX
#undef MOE__AMX_LIST
#undef MOE__AMX_KERNELS
#undef MOE__AMX_STEP2
#undef MOE__AMX_STEP
#undef MOE__AMX_TWICE2
#undef MOE__AMX_TWICE1
#undef MOE__AMX_EACH4
#undef MOE__AMX_EACH2
#undef MOE__AMX_EACH1
#undef MOE__TILE_INT8
#undef MOE__TILE_BF16
#undef MOE__TILE_ZERO
#undef MOE__TILE_STORE
#undef MOE__TILE_LOAD
#undef MOE__TILE_RELEASE
#undef MOE__TILE_CONFIG
#endif

/* ---- products with bf16 operands over threads ---- >>bf16_run */

#ifndef MOE_NO_BF16
enum {
  MOE__BF16_ROWS = 32,   /* rows of a tile of work where the weights are packed: they stay near, the
                            panels stream by, */
  MOE__BF16_DEPTH = 384, /* and so many words of each row are copied at a time */
  MOE__BF16_TALL = 256,  /* the same where B is packed on the way, for each so many rows again */
  MOE__BF16_SHALLOW = 128,
  MOE__BF16_CHUNK =
      512,              /* then all rows take so many elements of k and columns of B, while these */
  MOE__BF16_PART = 384, /* are in the second-level cache */
  MOE__BF16_PAD = 16,   /* words between rows: they go to different sets of the cache */
  MOE__BF16_PACKED = 3, /* most panels that are packed at a time */
  MOE__BF16_A = MOE__BF16_SHALLOW * (MOE__BF16_TALL + MOE__BF16_PAD), /* words of A: 136 KB */
  MOE__BF16_B = MOE__BF16_SHALLOW * 16 * MOE__BF16_PACKED             /* words of packed B: 24 KB */
};

#ifdef MOE__X86
/* The kernels for tiles of so many rows; NULL: plain C. With one or two rows, reading the weights
   dominates, and even a slow vdpbf16ps wins. */
static const moe__bf16_kernels *moe__bf16_pick(const moe_env *env, size_t rows) {
#ifdef MOE__AMX
  if (env->isa == MOE_ISA_AVX512 && (env->cpu_flags & MOE_CPU_AMX_BF16)) return &moe__amx_bf16;
#endif
#ifdef MOE__AVX512_BF16
  if (env->isa == MOE_ISA_AVX512 && (env->cpu_flags & MOE_CPU_AVX512_BF16) &&
      (rows <= 2 || !(env->cpu_flags & MOE_CPU_SLOW_BF16)))
    return &moe__dp_bf16;
#endif
  (void)rows;
  return env->isa == MOE_ISA_AVX512 ? &moe__avx512_bf16 : NULL;
}

/* Packs `width` outputs (at most 16), lines of `depth` elements, into a panel: in blocks of 16 by
   16 words. */
static void moe__bf16_panel(const moe__bf16_kernels *kernels, uint32_t *panel, const float *from,
                            size_t ld, size_t width, size_t depth) {
  uint32_t block[256], out[256];
  size_t p;
  memset(block, 0, sizeof block);
  for (p = 0; p < depth; p += 32, panel += 256) {
    size_t left = depth - p < 32 ? depth - p : 32;
    kernels->along(block, 16, from + p, ld, width, left);
    if (left > 30)
      kernels->turn(panel, 16, block);
    else { /* fewer than 16 steps: there is no room for the whole block */
      kernels->turn(out, 16, block);
      memcpy(panel, out, (left + 1) / 2 * 16 * sizeof *panel);
    }
  }
}

/* Rows of pairs from a block of A that is stored column by column, in blocks of 16 by 16, too. */
static void moe__bf16_turned(const moe__bf16_kernels *kernels, uint32_t *to, size_t to_ld,
                             const float *from, size_t ld, size_t rows, size_t depth) {
  uint32_t block[256], out[256];
  size_t i, p, r;
  for (i = 0; i < rows; i += 16)
    for (p = 0; p < depth; p += 32) {
      size_t width = rows - i < 16 ? rows - i : 16, left = depth - p < 32 ? depth - p : 32;
      if (left < 32) memset(block, 0, sizeof block);
      kernels->across(block, 16, 16, from + p * ld + i, ld, left, width);
      if (width == 16)
        kernels->turn(to + i * to_ld + p / 2, to_ld, block);
      else {
        kernels->turn(out, 16, block);
        for (r = 0; r < width; ++r)
          memcpy(to + (i + r) * to_ld + p / 2, out + 16 * r, 16 * sizeof *to);
      }
    }
}

/* Copies rows i0 .. i0+rows-1 of A, for a block of k, and sets where kernels find them. */
static void moe__bf16_copy_a(moe__bf16_block *b, uint32_t *to, const moe__gemm *g,
                             const moe__bf16_kernels *kernels, size_t i0, size_t rows, size_t p0,
                             size_t depth) {
  const float *from = g->a + i0 * g->a_row + p0 * g->a_col;
  size_t ld = (kernels->pairs ? (depth + 31) / 32 * 16 : (depth + 15) / 16 * 16) + MOE__BF16_PAD,
         high = MOE__BF16_TALL + MOE__BF16_PAD;
  b->a = to;
  b->a_row = ld;
  b->a_col = 1;
  if (g->a_col == 1) {
    if (kernels->pairs)
      kernels->along(to, ld, from, g->a_row, rows, depth);
    else
      kernels->floats(to, ld, from, g->a_row, rows, depth);
    return;
  }
  MOE_ASSERT(g->a_row == 1 && g->b_layout != MOE__B_PAIRS);
  if (kernels->turned) {
    moe__bf16_turned(kernels, to, ld, from, g->a_col, rows, depth);
    return;
  }
  b->a_row = 1;
  b->a_col = high;
  if (kernels->pairs)
    kernels->across(to, high, 16, from, g->a_col, depth, rows);
  else {
    kernels->floats(to, high, from, g->a_col, depth, rows);
    if (depth % 2) memset(to + depth * high, 0, rows * sizeof *to);
  }
}

/* Sets the panels of columns j .. j+columns-1 for the same block of k, in place or packed into
   `to`, and their number of steps. */
static void moe__bf16_find_b(moe__bf16_block *b, uint32_t *to, const moe__gemm *g,
                             const moe__bf16_kernels *kernels, size_t j, size_t p0, size_t depth) {
  size_t steps = (depth + 1) / 2, v;
  b->steps = steps;
  if (g->b_layout == MOE__B_PAIRS) {
    b->b_panel = ((size_t)g->k + 1) / 2 * 16;
    b->b = (const uint32_t *)(const void *)g->b + j / 16 * b->b_panel + p0 * 8;
    return;
  }
  b->b = to;
  if (kernels->turned)
    b->steps = (b->steps + 15) / 16 * 16; /* whole tiles, padded with zeros as A is */
  b->b_panel = b->steps * 16;
  if (g->b_layout == MOE__B_ROWS)
    kernels->across(to, 16, b->b_panel, g->b + p0 * g->b_row + j, g->b_row, depth, b->columns);
  for (v = 0; v < b->columns; v += 16, to += b->b_panel) {
    size_t width = b->columns - v < 16 ? b->columns - v : 16;
    if (g->b_layout == MOE__B_COLS)
      moe__bf16_panel(kernels, to, g->b + (j + v) * g->b_row + p0, g->b_row, width, depth);
    else if (g->b_layout == MOE__B_PANELS)
      kernels->across(to, 16, 16, g->b + (j + v) * (size_t)g->k + p0 * 16, 16, depth, 16);
    memset(to + steps * 16, 0, (b->steps - steps) * 16 * sizeof *to);
  }
}

/* A block of C whose last panel is not full: computed in a buffer, so that nothing beyond the edge
   is read or written. */
static void moe__bf16_edge(const moe__bf16_block *b, moe__bf16_fn fn, size_t rows, size_t width) {
  float edge[MOE__BF16_EDGE];
  moe__bf16_block inner = *b;
  size_t row = 16 * width, i;
  memset(edge, 0, rows * row * sizeof *edge);
  for (i = 0; i < rows; ++i)
    memcpy(edge + i * row, b->start + i * b->start_row, b->columns * sizeof *edge);
  inner.c = edge;
  inner.start = edge;
  inner.c_row = inner.start_row = row;
  fn(&inner, rows);
  for (i = 0; i < rows; ++i) memcpy(b->c + i * b->c_row, edge + i * row, b->columns * sizeof *edge);
}

/* All rows of a tile by `width` panels. It moves c and start of *b instead of a copy: reading a
   fresh copy with vectors would wait for all stores of the last kernel. */
static void moe__bf16_stripe(moe__bf16_block *b, const moe__bf16_kernels *kernels, size_t rows,
                             size_t width) {
  const uint32_t *a = b->a;
  size_t most = (size_t)kernels->rows[width], blocks = (rows + most - 1) / most, block;
  unsigned saved = kernels->begin ? kernels->begin() : 0;
  for (block = 0; block < blocks; ++block) { /* as even as can be */
    size_t take = (rows + blocks - block - 1) / (blocks - block);
    moe__bf16_fn fn = kernels->fn[width][take < 8 ? take : 8];
    if (b->columns == 16 * width)
      fn(b, take);
    else
      moe__bf16_edge(b, fn, take, width);
    b->c += take * b->c_row;
    b->start += take * b->start_row;
    b->a += take * b->a_row;
    rows -= take;
  }
  b->a = a;
  if (kernels->end) kernels->end(saved);
}

static size_t moe__bf16_width(const moe__bf16_kernels *kernels, size_t rows, size_t left,
                              int packed) {
  size_t width = (size_t)(rows <= (size_t)kernels->few ? kernels->many : kernels->usual);
  if (!packed && width > MOE__BF16_PACKED) width = MOE__BF16_PACKED;
  if (width > left) width = left;
  while (!kernels->rows[width]) --width;
  return width;
}

/* Rows i0 .. i1-1 and columns j0 .. j1-1, j0 a multiple of 16. */
MOE__NOINLINE static void moe__bf16_blocks(const moe__gemm *g, const moe__bf16_kernels *kernels,
                                           const moe__gemm_kernels *elements, size_t i0, size_t i1,
                                           size_t j0, size_t j1) {
  uint32_t space[MOE__BF16_A + MOE__BF16_B + 16];
  uint32_t *copy = space + (64 - (uintptr_t)space % 64) / sizeof *space,
           *panels = copy + MOE__BF16_A; /* on cache lines */
  size_t k = (size_t)g->k, rows = i1 - i0, p0 = 0, shape = 0, depth, j, width;
  int packed = g->b_layout == MOE__B_PAIRS;
  size_t most = (size_t)(packed ? MOE__BF16_DEPTH : MOE__BF16_SHALLOW) * (kernels->pairs ? 2 : 1),
         blocks = (k + most - 1) / most;
  if (blocks) most = ((k + blocks - 1) / blocks + 31) / 32 * 32; /* even blocks, of whole tiles */
  do {
    moe__bf16_block b;
    memset(&b, 0, sizeof b);
    depth = k - p0 < most ? k - p0 : most;
    moe__bf16_copy_a(&b, copy, g, kernels, i0, rows, p0, depth);
    b.shape = &shape;
    b.c_row = g->c_row;
    for (j = j0; j < j1; j += 16 * width) {
      width = moe__bf16_width(kernels, rows, (j1 - j + 15) / 16, packed);
      b.columns = j1 - j < 16 * width ? j1 - j : 16 * width;
      b.c = g->c + i0 * g->c_row + j;
      b.start = g->bias ? g->bias + j : moe__gemm_zeros;
      b.start_row = 0;
      if (p0 > 0 || g->accumulate) {
        b.start = b.c;
        b.start_row = b.c_row;
      }
      moe__bf16_find_b(&b, panels, g, kernels, j, p0, depth);
      moe__bf16_stripe(&b, kernels, rows, width);
      if (g->gelu && p0 + depth == k)
        elements->gelu(g->gelu + i0 * g->c_row + j, g->c + i0 * g->c_row + j, g->c_row, rows,
                       b.columns);
    }
    p0 += depth;
  } while (p0 < k);
  if (shape) kernels->leave();
}

#endif

typedef struct moe__bf16_work {
  const moe__gemm *list;
  const moe_env *env;
  const moe__gemm_kernels *elements;
  int32_t across; /* column blocks of a product: each of them copies A again */
  int32_t chunk;  /* of k, whose turn it is */
} moe__bf16_work;

static int32_t moe__bf16_rows(const moe__gemm *g) {
  return g->b_layout == MOE__B_PAIRS ? MOE__BF16_ROWS : MOE__BF16_TALL;
}
static int32_t moe__bf16_down(const moe__gemm *g) {
  return (g->m + moe__bf16_rows(g) - 1) / moe__bf16_rows(g);
}

/* Chunks of k: gradients of weights have a long k (their tokens) and many rows, and every tile
   packs all of B. */
static int32_t moe__bf16_chunks(const moe__gemm *g) {
  return g->b_layout == MOE__B_ROWS && g->k > MOE__BF16_CHUNK && !g->gelu
             ? (g->k + MOE__BF16_CHUNK - 1) / MOE__BF16_CHUNK
             : 1;
}

/* *out = chunk number `chunk` of the sums of a product. Chunks are multiples of 32 elements of k,
   so no bit changes. Returns 0 where there is no such chunk. */
static int moe__bf16_chunk(moe__gemm *out, const moe__gemm *g, int32_t chunk) {
  int32_t chunks = moe__bf16_chunks(g), deep = ((g->k + chunks - 1) / chunks + 31) / 32 * 32,
          p = chunk * deep;
  *out = *g;
  if (chunk == 0 && chunks == 1) return 1;
  if (chunk >= chunks || p >= g->k) return 0;
  out->k = moe__min(deep, g->k - p);
  out->a += (size_t)p * g->a_col;
  out->b += (size_t)p * g->b_row;
  if (p > 0) out->accumulate = 1, out->bias = NULL;
  return 1;
}

static void moe__bf16_tile_run(const moe__bf16_work *work, const moe__gemm *g, int32_t i0,
                               int32_t i1, int32_t j0, int32_t j1) {
#ifdef MOE__X86
  const moe__bf16_kernels *kernels = moe__bf16_pick(work->env, (size_t)(i1 - i0));
  if (kernels) {
    moe__bf16_blocks(g, kernels, work->elements, (size_t)i0, (size_t)i1, (size_t)j0, (size_t)j1);
    return;
  }
#endif
  (void)work;
  moe__plain_bf16(g, (size_t)i0, (size_t)i1, (size_t)j0, (size_t)j1);
}

static void moe__bf16_work_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__bf16_work *work = (const moe__bf16_work *)arg;
  const moe__gemm *g = work->list;
  moe__gemm sums;
  int32_t wide, tall, i, j, down;
  (void)slot;
  for (; tile >= moe__bf16_down(g) * work->across; ++g) tile -= moe__bf16_down(g) * work->across;
  down = moe__bf16_down(g);
  wide = ((g->n + work->across - 1) / work->across + 95) / 96 *
         96;                       /* a multiple of the width of every kernel */
  tall = (g->m + down - 1) / down; /* rows as even as can be */
  i = tall * (tile % down);
  j = tile / down * wide;
  tall = moe__min(tall, g->m - i);
  if (tall <= 0) return;
  if (MOE__TRAINS && g->a_sum && j == 0 && work->chunk == 0)
    moe__gemm_sum_a(g, work->elements, (size_t)i, (size_t)(i + tall)); /* in fp32 */
  if (j < g->n && moe__bf16_chunk(&sums, g, work->chunk))
    moe__bf16_tile_run(work, &sums, i, i + tall, j, moe__min(j + wide, g->n));
}

/* Computes independent products with bf16 operands. Tiles may depend on the number of threads,
   since no bit depends on tiles. */
static void moe__bf16_run(const moe__gemm *list, int32_t count, const moe_env *env) {
  moe__bf16_work work;
  int32_t tiles = 0, chunks = 1, i;
  float size = 0;
  work.across = 1;
  for (i = 0; i < count; ++i) {
    tiles += moe__bf16_down(&list[i]);
    size += moe__work_of(list[i].m, list[i].n, list[i].k);
    if (moe__bf16_chunks(&list[i]) == 1) continue;
    chunks = moe__max(chunks, moe__bf16_chunks(&list[i]));
    if (moe__bf16_down(&list[i]) > 1)
      work.across = moe__max(work.across, (list[i].n + MOE__BF16_PART - 1) / MOE__BF16_PART);
  }
  if (tiles == 0) return;
  work.list = list;
  work.env = env;
  work.elements = MOE__V_PICK(env->isa, gemms);
  if (size >= 2 * (float)MOE__GEMM_SMALL && env->parallel_for && env->threads > 1) {
    if (tiles < 4 * env->threads)
      work.across = moe__max(work.across, moe__min((4 * env->threads + tiles - 1) / tiles, 8));
    for (work.chunk = 0; work.chunk < chunks; ++work.chunk)
      moe__parallel(env, tiles * work.across, moe__bf16_work_tile, &work);
  } else
    for (work.chunk = 0; work.chunk < chunks; ++work.chunk)
      for (i = 0; i < tiles * work.across; ++i) moe__bf16_work_tile(&work, i, 0);
}

#endif /* MOE_NO_BF16 */

/* ---- packing weights in bf16; the precision of products ---- >>bf16_pack */

static moe_mat moe__mat_bf16(const void *panels, int32_t rows, int32_t cols) {
  moe_mat mat = moe_mat_rows(NULL, rows, cols);
  mat.data = panels;
  mat.type = MOE_TYPE_BF16;
  mat.layout = MOE_LAYOUT_PANELS;
  return mat;
}

#ifndef MOE_NO_BF16
typedef struct moe__bf16_pack {
  uint32_t *panels;
  moe__gemm g; /* its B is to be packed: rows or columns of floats */
  const moe_env *env;
} moe__bf16_pack;

static void moe__bf16_pack_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__bf16_pack *work = (const moe__bf16_pack *)arg;
  const moe__gemm *g = &work->g;
  size_t j = (size_t)tile * 16;
  uint32_t *panel = work->panels + j * (((size_t)g->k + 1) / 2);
#ifdef MOE__X86
  const moe__bf16_kernels *kernels = moe__bf16_pick(work->env, 16); /* the panels are the same */
  size_t width = (size_t)g->n - j < 16 ? (size_t)g->n - j : 16;
  if (kernels) {
    if (g->b_layout == MOE__B_COLS)
      moe__bf16_panel(kernels, panel, g->b + j * g->b_row, g->b_row, width, (size_t)g->k);
    else
      kernels->across(panel, 16, 16, g->b + j, g->b_row, (size_t)g->k, width);
    return;
  }
#endif
  (void)slot;
  moe__plain_bf16_pack(panel, g, j);
}

/* B (n, k) stored column by column, or (k, n) row by row. */
static void moe__bf16_pack_run(void *panels, const float *b, moe__b_layout layout, int32_t n,
                               int32_t k, const moe_env *env) {
  moe__bf16_pack work;
  memset(&work, 0, sizeof work);
  work.panels = (uint32_t *)panels;
  work.g.n = n;
  work.g.k = k;
  work.g.b = b;
  work.g.b_row = (size_t)(layout == MOE__B_COLS ? k : n);
  work.g.b_layout = layout;
  work.env = env;
  moe__parallel(env, (n + 15) / 16, moe__bf16_pack_tile, &work);
}

MOE_API void moe_pack_bf16(void *panels, const float *w, int32_t rows, int32_t cols,
                           const moe_env *env) {
  moe__bf16_pack_run(panels, w, MOE__B_COLS, rows, cols, env);
}

/* The same weights for the gradient of inputs, dx = dy w: panels of 16 inputs, pairs of outputs.
   moe_pack_bf16_bytes(cols, rows) bytes. */
static void moe__pack_bf16_back(void *panels, const float *w, int32_t rows, int32_t cols,
                                const moe_env *env) {
  moe__bf16_pack_run(panels, w, MOE__B_ROWS, cols, rows, env);
}

MOE_API moe_mat moe_mat_panels_bf16(const void *panels, int32_t rows, int32_t cols) {
  return moe__mat_bf16(panels, rows, cols);
}

MOE_API size_t moe_pack_bf16_bytes(int32_t rows, int32_t cols) {
  return ((size_t)rows + 15) / 16 * (((size_t)cols + 1) / 2) * 64;
}

#endif /* MOE_NO_BF16 */

MOE_API moe_status moe_env_set_precision(moe_env *env, moe_type precision) {
  if (precision == MOE_TYPE_F32) {
    env->precision = precision;
    return MOE_OK;
  }
  if (precision != MOE_TYPE_BF16)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "precision is neither fp32 nor bf16: for int8 weights call moe_model_quantize");
#ifdef MOE_NO_BF16
  return moe__fail(env, MOE_E_UNSUPPORTED,
                   "this build has no bf16 (MOE_NO_BF16): products stay fp32");
#else
  if (env->isa == MOE_ISA_AVX512) {
    (void)moe_env_use_amx(env);
    if (env->cpu_flags & (MOE_CPU_AMX_BF16 | MOE_CPU_AVX512_BF16)) {
      env->precision = precision;
      return MOE_OK;
    }
  }
  return moe__fail(env, MOE_E_UNSUPPORTED,
                   "bf16 needs isa avx512 (here: %s) and a processor with AMX-BF16 or "
                   "AVX512-BF16: products stay fp32",
                   moe_isa_name(env->isa));
#endif
}

/* ---- linear layers and GELU ---- >>linear
   Each function below that returns a moe__gemm describes one product for moe__gemm_run
   (>>gemm_run), so that independent products can run together. */

/* y (M, rows) = x W^T + b */
static moe__gemm moe__linear_product(float *y, const float *x, const moe_mat *w, const float *b,
                                     int32_t M) {
  moe__gemm g;
  memset(&g, 0, sizeof g);
  moe__gemm_weight(&g, w);
  if (MOE__INT8(w->type == MOE_TYPE_I8)) g.quantized = w;
  g.m = M;
  g.a = x;
  g.a_row = (size_t)w->cols;
  g.a_col = 1;
  g.c = y;
  g.c_row = (size_t)w->rows;
  g.bias = b;
  return g;
}

MOE_API void moe_linear_op_init(moe_linear_op *op) { memset(op, 0, sizeof *op); }

static moe_status moe__linear_check(const moe_linear_op *op, const moe_env *env) {
  if (op->M < 0 || op->w.rows < 0 || op->w.cols < 0)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "linear: M is %d, w is (%d, %d), expected no size below 0", (int)op->M,
                     (int)op->w.rows, (int)op->w.cols);
  if (op->w.type == MOE_TYPE_I8 && !MOE__INT8(1))
    return moe__fail(env, MOE_E_UNSUPPORTED, "this build has no int8 weights (MOE_NO_INT8)");
  if (op->w.type == MOE_TYPE_I8 && op->w.cols > MOE_INT8_COLS)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "linear: int8 weights have %d columns, expected at most %d", (int)op->w.cols,
                     MOE_INT8_COLS);
  return MOE_OK;
}

/* The CPU's body. The product writes y if that is wanted; GELU then reads it. */
static void moe__cpu_linear_forward(const moe_linear_op *op, const moe_env *env) {
  moe__gemm g = moe__linear_product(op->y ? op->y : op->act, op->x, &op->w, op->b, op->M);
  g.gelu = op->act;
  moe__gemm_run(&g, 1, env);
}

MOE_API moe_status moe_linear_forward(const moe_linear_op *op, const moe_env *env) {
  MOE__OFFER(env, linear, (env->backend, env, op, 0))
  moe_status status = moe__linear_check(op, env);
  if (status) return status;
  if (!op->y && !op->act && op->M > 0 && op->w.rows > 0)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "linear: y and act are both NULL, expected at least one output");
  moe__cpu_linear_forward(op, env);
  return MOE_OK;
}

#ifndef MOE_NO_TRAIN
/* dx (M, cols) += dy (M, rows) W. back: W packed for this product (moe__pack_bf16_back), or NULL or
   without data; then the product packs W itself. */
static moe__gemm moe__linear_input_gradient(float *dx, const float *dy, const float *w,
                                            const moe_mat *back, int32_t rows, int32_t cols,
                                            int32_t M) {
  moe__gemm g;
  memset(&g, 0, sizeof g);
  g.m = M;
  g.n = cols;
  g.k = rows;
  g.a = dy;
  g.a_row = (size_t)rows;
  g.a_col = 1;
  g.b = w;
  g.b_row = (size_t)cols;
  g.b_layout = MOE__B_ROWS;
  if (back && back->data) {
    g.b = (const float *)back->data;
    g.b_layout = MOE__B_PAIRS;
  }
  g.accumulate = 1;
  g.c = dx;
  g.c_row = (size_t)cols;
  return g;
}

/* dw (rows, cols) += dy^T x, db (rows) += the sum of the rows of dy. Each element is a sum over the
   M tokens in their order. dw or db may be NULL. */
static moe__gemm moe__linear_weight_gradient(float *dw, float *db, const float *dy, const float *x,
                                             int32_t rows, int32_t cols, int32_t M) {
  moe__gemm g;
  memset(&g, 0, sizeof g);
  g.m = rows;
  g.n = dw ? cols : 0;
  g.k = M;
  g.a = dy;
  g.a_row = 1;
  g.a_col = (size_t)rows;
  g.b = x;
  g.b_row = (size_t)cols;
  g.b_layout = MOE__B_ROWS;
  g.accumulate = 1;
  g.c = dw;
  g.c_row = (size_t)cols;
  g.a_sum = db;
  return g;
}

static void moe__cpu_linear_backward(const moe_linear_op *op, const moe_env *env) {
  const moe_mat *w = &op->w;
  moe__gemm list[2];
  int32_t count = 0;
  if (op->dx) {
    list[count] = moe__linear_input_gradient(op->dx, op->dy, (const float *)w->data, &op->w_back,
                                             w->rows, w->cols, op->M);
    list[count++].accumulate = !op->overwrite;
  }
  if (op->dw || op->db)
    list[count++] =
        moe__linear_weight_gradient(op->dw, op->db, op->dy, op->x, w->rows, w->cols, op->M);
  moe__gemm_run(list, count, env);
}

MOE_API moe_status moe_linear_backward(const moe_linear_op *op, const moe_env *env) {
  MOE__OFFER(env, linear, (env->backend, env, op, 1))
  moe_status status = moe__linear_check(op, env);
  if (status) return status;
  if (op->dx && (op->w.type != MOE_TYPE_F32 || op->w.layout != MOE_LAYOUT_ROWS))
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "linear: w is int8, bf16 or packed, expected float weights in rows layout for dx");
  moe__cpu_linear_backward(op, env);
  return MOE_OK;
}

#endif

/* GELU of arrays, cut into tiles. dy NULL: forward, else y is dx. */
enum { MOE__GELU_TILE = 16384 }; /* elements */

typedef struct moe__gelu_job {
  const moe__gemm_kernels *kernels;
  float *y;
  const float *dy, *x;
  size_t n;
} moe__gelu_job;

static void moe__gelu_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__gelu_job *job = (const moe__gelu_job *)arg;
  size_t at = (size_t)tile * MOE__GELU_TILE, count = job->n - at;
  (void)slot;
  if (count > MOE__GELU_TILE) count = MOE__GELU_TILE;
  if (job->dy)
    job->kernels->gelu_backward(job->y + at, job->dy + at, job->x + at, count);
  else
    job->kernels->gelu(job->y + at, job->x + at, count, 1, count);
}

static void moe__gelu_run(float *y, const float *dy, const float *x, size_t n, const moe_env *env) {
  moe__gelu_job job;
  job.kernels = MOE__V_PICK(env->isa, gemms);
  job.y = y;
  job.dy = dy;
  job.x = x;
  job.n = n;
  moe__parallel(env, (int32_t)((n + MOE__GELU_TILE - 1) / MOE__GELU_TILE), moe__gelu_tile, &job);
}

MOE_API void moe_gelu_forward(float *y, const float *x, size_t n, const moe_env *env) {
  moe__gelu_run(y, NULL, x, n, env);
}

#ifndef MOE_NO_TRAIN
MOE_API void moe_gelu_backward(float *dx, const float *dy, const float *x, size_t n,
                               const moe_env *env) {
  moe__gelu_run(dx, dy, x, n, env);
}
#endif

/* ---- kernels of LayerNorm and dropout ---- >>ops_simd
   Rows do not depend on each other. A sum over a row has 16 lanes and a fixed tree (>>simd). A sum
   over tokens (for gamma, beta and the embedding tables) is a chain in the order of the tokens, and
   only its columns are spread over tiles. */

/* Dropout, for every op that has it. An element becomes 0 where its hash is below the threshold;
   the others are multiplied by scale = 1 / (1 - p). */
typedef struct moe__drop {
  uint32_t threshold; /* 0: no dropout */
  float scale;
} moe__drop;

static moe__drop moe__drop_of(float p, int wanted) {
  moe__drop drop = {0, 1.0f};
  if (!wanted || !(p > 0)) return drop;
  drop.threshold = (uint32_t)(p * 4294967296.0f); /* exact; p < 1, so it fits */
  drop.scale = 1.0f / (1.0f - p);
  return drop;
}

typedef struct moe__ops_kernels {
  /* y = a + b. y may be a. */
  void (*add)(float *y, const float *a, const float *b, size_t n);
  /* y = dropout(x). The elements are at positions first, first + 1, ... of the key. y may be x. */
  void (*drop)(float *y, const float *x, size_t n, moe__drop drop, uint64_t key, uint32_t first);
  /* y = x + dropout(delta). y may be x or delta. */
  void (*residual)(float *y, const float *x, const float *delta, size_t n, moe__drop drop,
                   uint64_t key, uint32_t first);
  /* LayerNorm of 1 to 4 adjacent rows. y may be x. */
  void (*norm)(float *y, float *mean, float *rstd, const float *x, const float *gamma,
               const float *beta, float eps, size_t rows, size_t n);
  /* dx = the gradient of one row, or += with `more`. dx may be dy. */
  void (*norm_back)(float *dx, const float *dy, const float *x, float mean, float rstd,
                    const float *gamma, int more, size_t n);
  /* dgamma, dbeta += sums over `rows` rows that are `stride` apart, for n = 1 .. 32 columns. */
  void (*norm_columns)(float *dgamma, float *dbeta, const float *dy, const float *x,
                       const float *mean, const float *rstd, size_t rows, size_t stride, size_t n);
} moe__ops_kernels;

static void moe__scalar_add_row(float *y, const float *a, const float *b, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) y[i] = a[i] + b[i];
}

static void moe__scalar_drop_row(float *y, const float *x, size_t n, moe__drop drop, uint64_t key,
                                 uint32_t first) {
  size_t i;
  for (i = 0; i < n; ++i)
    y[i] = moe__hash32(key, first + (uint32_t)i) < drop.threshold ? 0.0f : x[i] * drop.scale;
}

static void moe__scalar_residual_row(float *y, const float *x, const float *delta, size_t n,
                                     moe__drop drop, uint64_t key, uint32_t first) {
  size_t i;
  for (i = 0; i < n; ++i)
    y[i] = x[i] +
           (moe__hash32(key, first + (uint32_t)i) < drop.threshold ? 0.0f : delta[i] * drop.scale);
}

static void moe__scalar_norm_rows(float *y, float *mean, float *rstd, const float *x,
                                  const float *gamma, const float *beta, float eps, size_t rows,
                                  size_t n) {
  size_t r, i;
  for (r = 0; r < rows; ++r, x += n, y += n) {
    float sum[16] = {0}, square[16] = {0}, m, s;
    for (i = 0; i < n; ++i) sum[i % 16] += x[i];
    m = moe__tree16(sum) / (float)n;
    for (i = 0; i < n; ++i) square[i % 16] = moe__fmaf(x[i] - m, x[i] - m, square[i % 16]);
    s = 1.0f / sqrtf(moe__tree16(square) / (float)n + eps);
    for (i = 0; i < n; ++i) y[i] = moe__fmaf((x[i] - m) * s, gamma[i], beta[i]);
    mean[r] = m;
    rstd[r] = s;
  }
}

#ifndef MOE_NO_TRAIN
/* h = (x - mean) rstd, g = dy gamma, dx = rstd (g - mean(g) - h mean(g h)) */
static void moe__scalar_norm_back_row(float *dx, const float *dy, const float *x, float mean,
                                      float rstd, const float *gamma, int more, size_t n) {
  float sum[16] = {0}, product[16] = {0}, a, b;
  size_t i;
  for (i = 0; i < n; ++i) {
    float g = dy[i] * gamma[i];
    sum[i % 16] += g;
    product[i % 16] = moe__fmaf(g, (x[i] - mean) * rstd, product[i % 16]);
  }
  a = moe__tree16(sum) / (float)n;
  b = moe__tree16(product) / (float)n;
  for (i = 0; i < n; ++i) {
    float d = moe__fmaf(-b, (x[i] - mean) * rstd, dy[i] * gamma[i] - a);
    dx[i] = more ? moe__fmaf(d, rstd, dx[i]) : d * rstd;
  }
}

static void moe__scalar_norm_columns(float *dgamma, float *dbeta, const float *dy, const float *x,
                                     const float *mean, const float *rstd, size_t rows,
                                     size_t stride, size_t n) {
  size_t r, i;
  for (r = 0; r < rows; ++r, dy += stride, x += stride)
    for (i = 0; i < n; ++i) {
      dgamma[i] = moe__fmaf(dy[i], (x[i] - mean[r]) * rstd[r], dgamma[i]);
      dbeta[i] += dy[i];
    }
}
#endif

static const moe__ops_kernels moe__scalar_ops = {moe__scalar_add_row,
                                                 moe__scalar_drop_row,
                                                 moe__scalar_residual_row,
                                                 moe__scalar_norm_rows,
                                                 MOE__OF_TRAINING(moe__scalar_norm_back_row),
                                                 MOE__OF_TRAINING(moe__scalar_norm_columns)};

/* The same for vectors. A step of a loop is a function of w, its number of elements: 16, or fewer
   in the last step. */
#define MOE__OPS_STEPS(S, T)                                                                       \
  T MOE__INLINE S##_f S##_get(const float *p, size_t w) {                                          \
    return w == 16 ? S##_load(p) : S##_loadn(p, w);                                                \
  }                                                                                                \
  T MOE__INLINE void S##_put(float *p, S##_f v, size_t w) {                                        \
    if (w == 16)                                                                                   \
      S##_store(p, v);                                                                             \
    else                                                                                           \
      S##_storen(p, v, w);                                                                         \
  }                                                                                                \
  T MOE__INLINE S##_f S##_head(S##_f v, size_t w) { /* lanes from w on become 0 */                 \
    return w == 16 ? v : S##_sel(S##_ult(S##_iiota(0), S##_iset((uint32_t)w)), v, S##_set(0.0f));  \
  }                                                                                                \
  /* which of 16 elements fall; x: position * 0x9e3779b1 + low half of the key, as moe__hash32 */  \
  T MOE__INLINE S##_m S##_falls(S##_i x, uint64_t key, moe__drop drop) {                           \
    x = S##_imul(S##_ixor(x, S##_ishr(x, 16)), S##_iset(0x85ebca6bu));                             \
    x = S##_ixor(x, S##_iset((uint32_t)(key >> 32)));                                              \
    x = S##_imul(S##_ixor(x, S##_ishr(x, 13)), S##_iset(0xc2b2ae35u));                             \
    return S##_ult(S##_ixor(x, S##_ishr(x, 16)), S##_iset(drop.threshold));                        \
  }                                                                                                \
  T MOE__INLINE S##_i S##_falls_first(uint64_t key, uint32_t first) {                              \
    return S##_iadd(S##_imul(S##_iiota(first), S##_iset(0x9e3779b1u)), S##_iset((uint32_t)key));   \
  }                                                                                                \
  T MOE__INLINE S##_i S##_falls_next(S##_i x) { return S##_iadd(x, S##_iset(16u * 0x9e3779b1u)); } \
  T MOE__INLINE S##_f S##_dropped(S##_f v, S##_i x, uint64_t key, moe__drop drop) {                \
    return S##_sel(S##_falls(x, key, drop), S##_set(0.0f), S##_mul(v, S##_set(drop.scale)));       \
  }
MOE__V_STAMP(MOE__OPS_STEPS)
#undef MOE__OPS_STEPS

#define MOE__OPS_ROWS(S, T)                                                                        \
  T static void S##_add_row(float *y, const float *a, const float *b, size_t n) {                  \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16) S##_store(y + i, S##_add(S##_load(a + i), S##_load(b + i)));      \
    if (i < n)                                                                                     \
      S##_storen(y + i, S##_add(S##_loadn(a + i, n - i), S##_loadn(b + i, n - i)), n - i);         \
  }                                                                                                \
  T static void S##_drop_row(float *y, const float *x, size_t n, moe__drop drop, uint64_t key,     \
                             uint32_t first) {                                                     \
    S##_i at = S##_falls_first(key, first);                                                        \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16, at = S##_falls_next(at))                                          \
      S##_store(y + i, S##_dropped(S##_load(x + i), at, key, drop));                               \
    if (i < n) S##_storen(y + i, S##_dropped(S##_loadn(x + i, n - i), at, key, drop), n - i);      \
  }                                                                                                \
  T static void S##_residual_row(float *y, const float *x, const float *delta, size_t n,           \
                                 moe__drop drop, uint64_t key, uint32_t first) {                   \
    S##_i at = S##_falls_first(key, first);                                                        \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16, at = S##_falls_next(at))                                          \
      S##_store(y + i, S##_add(S##_load(x + i), S##_dropped(S##_load(delta + i), at, key, drop))); \
    if (i < n)                                                                                     \
      S##_storen(y + i,                                                                            \
                 S##_add(S##_loadn(x + i, n - i),                                                  \
                         S##_dropped(S##_loadn(delta + i, n - i), at, key, drop)),                 \
                 n - i);                                                                           \
  }
MOE__V_STAMP(MOE__OPS_ROWS)
#undef MOE__OPS_ROWS

/* Four rows at once hide the latency of the sums. With fewer rows the last one is computed and
   written several times. */
#define MOE__NORM_SUM(S, r) s##r = S##_add(s##r, S##_get(x##r + i, w))
#define MOE__NORM_SQUARE(S, r)                                                                     \
  d = S##_head(S##_sub(S##_get(x##r + i, w), S##_set(m##r)), w);                                   \
  s##r = S##_fma(d, d, s##r)
#define MOE__NORM_VALUE(S, r)                                                                      \
  S##_fma(S##_mul(S##_sub(S##_get(x##r + i, w), S##_set(m##r)), S##_set(q##r)), g, b)
#define MOE__NORM_FOUR(S, T)                                                                       \
  T static void S##_norm_rows(float *y, float *mean, float *rstd, const float *x0,                 \
                              const float *gamma, const float *beta, float eps, size_t rows,       \
                              size_t n) {                                                          \
    size_t o1 = rows > 1 ? n : 0, o2 = rows > 2 ? 2 * n : o1, o3 = rows > 3 ? 3 * n : o2, i, w;    \
    const float *x1 = x0 + o1, *x2 = x0 + o2, *x3 = x0 + o3;                                       \
    S##_f s0 = S##_set(0.0f), s1 = s0, s2 = s0, s3 = s0, d;                                        \
    float m0, m1, m2, m3, q0, q1, q2, q3;                                                          \
    for (i = 0, w = 16; i + 16 <= n; i += 16) {                                                    \
      MOE__NORM_SUM(S, 0), MOE__NORM_SUM(S, 1), MOE__NORM_SUM(S, 2), MOE__NORM_SUM(S, 3);          \
    }                                                                                              \
    if ((w = n - i) > 0) {                                                                         \
      MOE__NORM_SUM(S, 0), MOE__NORM_SUM(S, 1), MOE__NORM_SUM(S, 2), MOE__NORM_SUM(S, 3);          \
    }                                                                                              \
    m0 = S##_sum(s0) / (float)n, m1 = S##_sum(s1) / (float)n, m2 = S##_sum(s2) / (float)n,         \
    m3 = S##_sum(s3) / (float)n;                                                                   \
    s0 = s1 = s2 = s3 = S##_set(0.0f);                                                             \
    for (i = 0, w = 16; i + 16 <= n; i += 16) {                                                    \
      MOE__NORM_SQUARE(S, 0), MOE__NORM_SQUARE(S, 1), MOE__NORM_SQUARE(S, 2),                      \
          MOE__NORM_SQUARE(S, 3);                                                                  \
    }                                                                                              \
    if ((w = n - i) > 0) {                                                                         \
      MOE__NORM_SQUARE(S, 0), MOE__NORM_SQUARE(S, 1), MOE__NORM_SQUARE(S, 2),                      \
          MOE__NORM_SQUARE(S, 3);                                                                  \
    }                                                                                              \
    q0 = 1.0f / sqrtf(S##_sum(s0) / (float)n + eps),                                               \
    q1 = 1.0f / sqrtf(S##_sum(s1) / (float)n + eps);                                               \
    q2 = 1.0f / sqrtf(S##_sum(s2) / (float)n + eps),                                               \
    q3 = 1.0f / sqrtf(S##_sum(s3) / (float)n + eps);                                               \
    for (i = 0; i < n; i += 16) {                                                                  \
      S##_f g, b, y0, y1, y2, y3;                                                                  \
      w = n - i < 16 ? n - i : 16;                                                                 \
      g = S##_get(gamma + i, w), b = S##_get(beta + i, w);                                         \
      y0 = MOE__NORM_VALUE(S, 0), y1 = MOE__NORM_VALUE(S, 1), y2 = MOE__NORM_VALUE(S, 2),          \
      y3 = MOE__NORM_VALUE(S, 3);                                                                  \
      S##_put(y + i, y0, w), S##_put(y + o1 + i, y1, w), S##_put(y + o2 + i, y2, w),               \
          S##_put(y + o3 + i, y3, w);                                                              \
    }                                                                                              \
    mean[0] = m0, rstd[0] = q0;                                                                    \
    if (rows > 1) mean[1] = m1, rstd[1] = q1;                                                      \
    if (rows > 2) mean[2] = m2, rstd[2] = q2;                                                      \
    if (rows > 3) mean[3] = m3, rstd[3] = q3;                                                      \
  }
MOE__V_STAMP(MOE__NORM_FOUR)
#undef MOE__NORM_SUM
#undef MOE__NORM_SQUARE
#undef MOE__NORM_VALUE
#undef MOE__NORM_FOUR

#define MOE__NORM_BACK(S, T)                                                                       \
  T static void S##_norm_back_row(float *dx, const float *dy, const float *x, float mean,          \
                                  float rstd, const float *gamma, int more, size_t n) {            \
    S##_f m = S##_set(mean), q = S##_set(rstd), sum = S##_set(0.0f), product = sum, a, b;          \
    size_t i, w;                                                                                   \
    for (i = 0; i < n; i += 16) {                                                                  \
      S##_f g, h;                                                                                  \
      w = n - i < 16 ? n - i : 16;                                                                 \
      g = S##_mul(S##_get(dy + i, w), S##_get(gamma + i, w));                                      \
      h = S##_mul(S##_sub(S##_get(x + i, w), m), q);                                               \
      sum = S##_add(sum, g);                                                                       \
      product = S##_fma(g, h, product);                                                            \
    }                                                                                              \
    a = S##_set(S##_sum(sum) / (float)n);                                                          \
    b = S##_set(S##_sum(product) / (float)n);                                                      \
    for (i = 0; i < n; i += 16) {                                                                  \
      S##_f d, h;                                                                                  \
      w = n - i < 16 ? n - i : 16;                                                                 \
      h = S##_mul(S##_sub(S##_get(x + i, w), m), q);                                               \
      d = S##_fnma(b, h, S##_sub(S##_mul(S##_get(dy + i, w), S##_get(gamma + i, w)), a));          \
      S##_put(dx + i, more ? S##_fma(d, q, S##_get(dx + i, w)) : S##_mul(d, q), w);                \
    }                                                                                              \
  }                                                                                                \
  T static void S##_norm_columns(float *dgamma, float *dbeta, const float *dy, const float *x,     \
                                 const float *mean, const float *rstd, size_t rows, size_t stride, \
                                 size_t n) {                                                       \
    size_t w0 = n < 16 ? n : 16, w1 = n - w0, r;                                                   \
    S##_f g0 = S##_loadn(dgamma, w0), g1 = S##_loadn(dgamma + w0, w1);                             \
    S##_f b0 = S##_loadn(dbeta, w0), b1 = S##_loadn(dbeta + w0, w1);                               \
    for (r = 0; r < rows; ++r, dy += stride, x += stride) {                                        \
      S##_f m = S##_set(mean[r]), q = S##_set(rstd[r]), d0 = S##_loadn(dy, w0),                    \
            d1 = S##_loadn(dy + w0, w1);                                                           \
      g0 = S##_fma(d0, S##_mul(S##_sub(S##_loadn(x, w0), m), q), g0);                              \
      g1 = S##_fma(d1, S##_mul(S##_sub(S##_loadn(x + w0, w1), m), q), g1);                         \
      b0 = S##_add(b0, d0);                                                                        \
      b1 = S##_add(b1, d1);                                                                        \
    }                                                                                              \
    S##_storen(dgamma, g0, w0);                                                                    \
    S##_storen(dgamma + w0, g1, w1);                                                               \
    S##_storen(dbeta, b0, w0);                                                                     \
    S##_storen(dbeta + w0, b1, w1);                                                                \
  }                                                                                                \
  static const moe__ops_kernels S##_ops = {S##_add_row,   S##_drop_row,      S##_residual_row,     \
                                           S##_norm_rows, S##_norm_back_row, S##_norm_columns};
MOE__V_STAMP(MOE__NORM_BACK)
#undef MOE__NORM_BACK

/* ---- LayerNorm, dropout, embeddings, losses ---- >>ops */

/* Rows of a tile: about 8192 elements, in fours. */
static size_t moe__tile_rows(int32_t H) {
  size_t rows = H > 0 ? 8192 / (size_t)H / 4 * 4 : 4;
  return rows < 4 ? 4 : rows;
}

static int32_t moe__tiles_of(size_t count, size_t tile) {
  return (int32_t)((count + tile - 1) / tile);
}

/* The sequence that holds a row (an empty sequence holds none). */
static int32_t moe__sequence_at(const int32_t *seq_start, int32_t S, size_t row) {
  int32_t low = 0, high = S - 1;
  while (low < high) {
    int32_t middle = low + (high - low + 1) / 2;
    if ((size_t)seq_start[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

/* M rows in S packed sequences. */
static moe_status moe__sequences_check(const char *op, const int32_t *seq_start, int32_t S,
                                       int32_t M, const moe_env *env) {
  int32_t end = S > 0 ? seq_start[S] : 0, s;
  if (S < 0 || M < 0)
    return moe__fail(env, MOE_E_ARGUMENT, "%s: S is %d and M is %d, expected 0 or more", op, (int)S,
                     (int)M);
  for (s = 0; s < S; ++s)
    if (seq_start[s] > seq_start[s + 1] || seq_start[0] != 0)
      return moe__fail(
          env, MOE_E_ARGUMENT,
          "%s: seq_start is %d and %d at sequence %d, expected values that rise from 0", op,
          (int)seq_start[s], (int)seq_start[s + 1], (int)s);
  if (M != end)
    return moe__fail(env, MOE_E_ARGUMENT, "%s: M is %d, expected %d, the end of the last sequence",
                     op, (int)M, (int)end);
  return MOE_OK;
}

static moe_status moe__dropout_check(const char *op, float dropout, const moe_env *env) {
  if (dropout >= 0 && dropout < 1) return MOE_OK;
  return moe__fail(env, MOE_E_ARGUMENT, "%s: dropout is %g, expected 0 to below 1", op,
                   (double)dropout);
}

/* Dropout of rows of packed sequences. Each sequence has a key; column c of its row r is at
   position r H + c of that key. */
typedef struct moe__row_drop {
  const moe__ops_kernels *kernels;
  moe__drop drop;
  const uint64_t *keys;
  const int32_t *seq_start;
  int32_t S;
  size_t H;
} moe__row_drop;

static moe__row_drop moe__row_drop_make(float dropout, const uint64_t *keys,
                                        const int32_t *seq_start, int32_t S, int32_t H,
                                        const moe_env *env) {
  moe__row_drop d;
  d.kernels = MOE__V_PICK(env->isa, ops);
  d.drop = moe__drop_of(dropout, keys != NULL);
  d.keys = keys;
  d.seq_start = seq_start;
  d.S = S;
  d.H = (size_t)H;
  return d;
}

/* Where a tile that begins at this row starts to look for its sequences. */
static int32_t moe__row_drop_sequence(const moe__row_drop *d, size_t row) {
  return d->drop.threshold ? moe__sequence_at(d->seq_start, d->S, row) : 0;
}

/* y = x + dropout(delta) of one row, or dropout(delta) if x is NULL. *s: the sequence of this row
   or of an earlier one; it becomes that of this row. */
static void moe__row_drop_run(const moe__row_drop *d, float *y, const float *x, const float *delta,
                              size_t row, int32_t *s) {
  uint32_t at;
  if (!d->drop.threshold) {
    if (x)
      d->kernels->add(y, x, delta, d->H);
    else if (y != delta)
      memcpy(y, delta, d->H * sizeof *y);
    return;
  }
  while ((size_t)d->seq_start[*s + 1] <= row) ++*s;
  at = (uint32_t)((row - (size_t)d->seq_start[*s]) * d->H);
  if (x)
    d->kernels->residual(y, x, delta, d->H, d->drop, d->keys[*s], at);
  else
    d->kernels->drop(y, delta, d->H, d->drop, d->keys[*s], at);
}

typedef struct moe__layernorm_job {
  const moe_layernorm_op *op;
  moe__row_drop drop;
  size_t first, end; /* the rows of this call */
} moe__layernorm_job;

static moe__layernorm_job moe__layernorm_job_make(const moe_layernorm_op *op, const moe_env *env) {
  moe__layernorm_job job;
  job.op = op;
  job.drop = moe__row_drop_make(op->dropout, op->keys, op->seq_start, op->S, op->H, env);
  job.first = 0;
  job.end = (size_t)op->M;
  return job;
}

/* A tile of rows, four at a time. The sum stays in y where nothing keeps it. */
static void moe__layernorm_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__layernorm_job *job = (const moe__layernorm_job *)arg;
  const moe_layernorm_op *op = job->op;
  size_t H = (size_t)op->H, size = moe__tile_rows(op->H), row = (size_t)tile * size,
         end = row + size, rows, i;
  int32_t s = moe__row_drop_sequence(&job->drop, row);
  (void)slot;
  if (end > job->end) end = job->end;
  for (; row < end; row += rows) {
    const float *x = op->x + row * H;
    float mean[4], rstd[4];
    rows = end - row < 4 ? end - row : 4;
    if (op->delta) {
      float *sum = (op->sum ? op->sum : op->y) + row * H;
      for (i = 0; i < rows; ++i)
        moe__row_drop_run(&job->drop, sum + i * H, x + i * H, op->delta + (row + i) * H, row + i,
                          &s);
      x = sum;
    } else if (op->sum && op->sum != op->x)
      memcpy(op->sum + row * H, x, rows * H * sizeof *x);
    job->drop.kernels->norm(op->y + row * H, mean, rstd, x, op->gamma, op->beta, op->eps, rows, H);
    for (i = 0; op->mean && i < rows; ++i) {
      op->mean[row + i] = mean[i];
      op->rstd[row + i] = rstd[i];
    }
  }
}

MOE_API void moe_layernorm_op_init(moe_layernorm_op *op) {
  memset(op, 0, sizeof *op);
  op->eps = 1e-12f;
}

static moe_status moe__layernorm_check(const moe_layernorm_op *op, const moe_env *env) {
  moe_status status = moe__dropout_check("layernorm", op->dropout, env);
  if (status) return status;
  if (op->M < 0 || op->H < 0)
    return moe__fail(env, MOE_E_ARGUMENT, "layernorm: M is %d and H is %d, expected 0 or more",
                     (int)op->M, (int)op->H);
  if (!(op->eps > 0))
    return moe__fail(env, MOE_E_ARGUMENT, "layernorm: eps is %g, expected more than 0",
                     (double)op->eps);
  if (!op->mean != !op->rstd)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "layernorm: one of mean and rstd is NULL, expected both or neither");
  if (op->keys && op->dropout > 0)
    return moe__sequences_check("layernorm", op->seq_start, op->S, op->M, env);
  return MOE_OK;
}

static void moe__cpu_layernorm_forward(const moe_layernorm_op *op, const moe_env *env) {
  moe__layernorm_job job = moe__layernorm_job_make(op, env);
  if (op->H > 0)
    moe__parallel(env, moe__tiles_of(job.end, moe__tile_rows(op->H)), moe__layernorm_tile, &job);
}

MOE_API moe_status moe_layernorm_forward(const moe_layernorm_op *op, const moe_env *env) {
  MOE__OFFER(env, layernorm, (env->backend, env, op, 0))
  moe_status status = moe__layernorm_check(op, env);
  if (!status) moe__cpu_layernorm_forward(op, env);
  return status;
}

#ifndef MOE_NO_TRAIN
/* dx and ddelta of a tile of rows. dx holds dsum if it is overwritten; else ddelta does, until it
   is dropped out. */
static void moe__layernorm_back_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__layernorm_job *job = (const moe__layernorm_job *)arg;
  const moe_layernorm_op *op = job->op;
  const float *sum = op->sum ? op->sum : op->x;
  size_t H = (size_t)op->H, size = moe__tile_rows(op->H), row = job->first + (size_t)tile * size,
         end = row + size;
  int apart = op->ddelta && !(op->dx && op->overwrite);
  int32_t s = moe__row_drop_sequence(&job->drop, row);
  (void)slot;
  if (end > job->end) end = job->end;
  for (; row < end; ++row) {
    float *dx = op->dx ? op->dx + row * H : NULL,
          *ddelta = op->ddelta ? op->ddelta + row * H : NULL, *dsum = apart ? ddelta : dx;
    job->drop.kernels->norm_back(dsum, op->dy + row * H, sum + row * H, op->mean[row],
                                 op->rstd[row], op->gamma, !apart && !op->overwrite, H);
    if (apart && dx) job->drop.kernels->add(dx, dx, dsum, H);
    if (ddelta) moe__row_drop_run(&job->drop, ddelta, NULL, dsum, row, &s);
  }
}

/* dgamma and dbeta: 32 columns of all rows of the call. */
static void moe__layernorm_columns_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__layernorm_job *job = (const moe__layernorm_job *)arg;
  const moe_layernorm_op *op = job->op;
  size_t H = (size_t)op->H, c = (size_t)tile * 32, n = H - c < 32 ? H - c : 32,
         at = job->first * H + c;
  float unwanted[32] = {0};
  (void)slot;
  job->drop.kernels->norm_columns(op->dgamma ? op->dgamma + c : unwanted,
                                  op->dbeta ? op->dbeta + c : unwanted, op->dy + at,
                                  (op->sum ? op->sum : op->x) + at, op->mean + job->first,
                                  op->rstd + job->first, job->end - job->first, H, n);
}

/* Eight tiles of rows at a time: they stay in the second-level cache between the two passes. The
   columns come first, since dx may be dy. */
static void moe__cpu_layernorm_backward(const moe_layernorm_op *op, const moe_env *env) {
  moe__layernorm_job job = moe__layernorm_job_make(op, env);
  size_t tile = moe__tile_rows(op->H), M = (size_t)op->M;
  if (op->H < 1) return;
  for (; job.first < M; job.first = job.end) {
    job.end = job.first + 8 * tile < M ? job.first + 8 * tile : M;
    if (op->dgamma || op->dbeta)
      moe__parallel(env, moe__tiles_of((size_t)op->H, 32), moe__layernorm_columns_tile, &job);
    if (op->dx || op->ddelta)
      moe__parallel(env, moe__tiles_of(job.end - job.first, tile), moe__layernorm_back_tile, &job);
  }
}

MOE_API moe_status moe_layernorm_backward(const moe_layernorm_op *op, const moe_env *env) {
  MOE__OFFER(env, layernorm, (env->backend, env, op, 1))
  moe_status status = moe__layernorm_check(op, env);
  if (status) return status;
  if (!op->mean && op->M > 0)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "layernorm: mean and rstd are NULL, expected those of forward");
  moe__cpu_layernorm_backward(op, env);
  return MOE_OK;
}
#endif

typedef struct moe__dropout_job {
  const moe_dropout_op *op;
  moe__row_drop drop;
} moe__dropout_job;

static void moe__dropout_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__dropout_job *job = (const moe__dropout_job *)arg;
  const moe_dropout_op *op = job->op;
  size_t H = (size_t)op->H, size = moe__tile_rows(op->H), row = (size_t)tile * size,
         end = row + size;
  int32_t s = moe__row_drop_sequence(&job->drop, row);
  (void)slot;
  if (end > (size_t)op->M) end = (size_t)op->M;
  for (; row < end; ++row)
    moe__row_drop_run(&job->drop, op->y + row * H, NULL, op->x + row * H, row, &s);
}

static void moe__cpu_dropout_forward(const moe_dropout_op *op, const moe_env *env) {
  moe__dropout_job job;
  if (op->H < 1) return;
  job.op = op;
  job.drop = moe__row_drop_make(op->dropout, op->keys, op->seq_start, op->S, op->H, env);
  moe__parallel(env, moe__tiles_of((size_t)op->M, moe__tile_rows(op->H)), moe__dropout_tile, &job);
}

MOE_API void moe_dropout_op_init(moe_dropout_op *op) { memset(op, 0, sizeof *op); }

MOE_API moe_status moe_dropout_forward(const moe_dropout_op *op, const moe_env *env) {
  MOE__OFFER(env, dropout, (env->backend, env, op))
  moe_status status = moe__dropout_check("dropout", op->dropout, env);
  if (!status) status = moe__sequences_check("dropout", op->seq_start, op->S, op->M, env);
  if (status) return status;
  if (op->H < 0)
    return moe__fail(env, MOE_E_ARGUMENT, "dropout: H is %d, expected 0 or more", (int)op->H);
  moe__cpu_dropout_forward(op, env);
  return MOE_OK;
}

/* moe_dropout: one key for the whole array. */
typedef struct moe__drop_job {
  const moe__ops_kernels *kernels;
  float *y;
  const float *x;
  size_t n, tile;
  moe__drop drop;
  uint64_t key;
} moe__drop_job;

static void moe__drop_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__drop_job *job = (const moe__drop_job *)arg;
  size_t i = (size_t)tile * job->tile, n = job->n - i < job->tile ? job->n - i : job->tile;
  (void)slot;
  job->kernels->drop(job->y + i, job->x + i, n, job->drop, job->key, (uint32_t)i);
}

MOE_API void moe_dropout(float *y, const float *x, size_t n, float p, uint64_t key,
                         const moe_env *env) {
  moe__drop_job job;
  job.drop = moe__drop_of(p, 1);
  if (!job.drop.threshold) {
    if (y != x && n) memcpy(y, x, n * sizeof *y);
    return;
  }
  job.kernels = MOE__V_PICK(env->isa, ops);
  job.y = y;
  job.x = x;
  job.n = n;
  job.key = key;
  for (job.tile = 8192; n / job.tile >= 0x10000; job.tile *= 2) {
  } /* the number of tiles is 32 bits */
  moe__parallel(env, moe__tiles_of(n, job.tile), moe__drop_tile, &job);
}

typedef struct moe__embed_job {
  const moe_embed_op *op;
  const moe__ops_kernels *kernels;
} moe__embed_job;

static void moe__embed_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__embed_job *job = (const moe__embed_job *)arg;
  const moe_embed_op *op = job->op;
  size_t H = (size_t)op->H, size = moe__tile_rows(op->H), row = (size_t)tile * size,
         end = row + size;
  int32_t s = moe__sequence_at(op->seq_start, op->S, row);
  (void)slot;
  if (end > (size_t)op->M) end = (size_t)op->M;
  for (; row < end; ++row) {
    float *x = op->x + row * H;
    const float *word = op->word ? op->word + (size_t)op->ids[row] * H : x;
    while ((size_t)op->seq_start[s + 1] <= row) ++s;
    if (op->position)
      job->kernels->add(x, word, op->position + (row - (size_t)op->seq_start[s]) * H, H);
    else if (word != x)
      memcpy(x, word, H * sizeof *x);
    if (op->segment)
      job->kernels->add(x, x, op->segment + (op->segments ? op->segments[row] : 0u) * H, H);
  }
}

static void moe__cpu_embed_forward(const moe_embed_op *op, const moe_env *env) {
  moe__embed_job job;
  if (op->H < 1) return;
  job.op = op;
  job.kernels = MOE__V_PICK(env->isa, ops);
  moe__parallel(env, moe__tiles_of((size_t)op->M, moe__tile_rows(op->H)), moe__embed_tile, &job);
}

MOE_API void moe_embed_op_init(moe_embed_op *op) { memset(op, 0, sizeof *op); }

static moe_status moe__embed_check(const moe_embed_op *op, const moe_env *env) {
  if (op->H < 0)
    return moe__fail(env, MOE_E_ARGUMENT, "embed: H is %d, expected 0 or more", (int)op->H);
  return moe__sequences_check("embed", op->seq_start, op->S, op->M, env);
}

MOE_API moe_status moe_embed_forward(const moe_embed_op *op, const moe_env *env) {
  MOE__OFFER(env, embed, (env->backend, env, op, 0))
  moe_status status = moe__embed_check(op, env);
  if (!status) moe__cpu_embed_forward(op, env);
  return status;
}

#ifndef MOE_NO_TRAIN
/* 64 columns of all tokens: each element of a table has one writer, however often its row is used.
 */
static void moe__embed_back_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__embed_job *job = (const moe__embed_job *)arg;
  const moe_embed_op *op = job->op;
  size_t H = (size_t)op->H, c = (size_t)tile * 64, n = H - c < 64 ? H - c : 64, r;
  int32_t s;
  (void)slot;
  for (s = 0; s < op->S; ++s)
    for (r = (size_t)op->seq_start[s]; r < (size_t)op->seq_start[s + 1]; ++r) {
      const float *dx = op->dx + r * H + c;
      size_t place = (r - (size_t)op->seq_start[s]) * H + c,
             kind = (op->segments ? op->segments[r] : 0u) * H + c;
      float *word = op->dword ? op->dword + (size_t)op->ids[r] * H + c : NULL;
      if (word) job->kernels->add(word, word, dx, n);
      if (op->dposition) job->kernels->add(op->dposition + place, op->dposition + place, dx, n);
      if (op->dsegment) job->kernels->add(op->dsegment + kind, op->dsegment + kind, dx, n);
    }
}

static void moe__cpu_embed_backward(const moe_embed_op *op, const moe_env *env) {
  moe__embed_job job;
  job.op = op;
  job.kernels = MOE__V_PICK(env->isa, ops);
  moe__parallel(env, moe__tiles_of((size_t)op->H, 64), moe__embed_back_tile, &job);
}

MOE_API moe_status moe_embed_backward(const moe_embed_op *op, const moe_env *env) {
  MOE__OFFER(env, embed, (env->backend, env, op, 1))
  moe_status status = moe__embed_check(op, env);
  if (!status) moe__cpu_embed_backward(op, env);
  return status;
}
#endif

/* A few numbers: the plain C body serves every instruction set. */
MOE_API float moe_cross_entropy_forward(float *prob, const float *logits, int32_t label,
                                        int32_t C) {
  float lane[16] = {0}, max = logits[0], sum, inverse, margin;
  int32_t i;
  for (i = 1; i < C; ++i) max = moe__maxf(logits[i], max);
  margin = logits[label] - max;
  for (i = 0; i < C; ++i) lane[i % 16] += moe__expf(logits[i] - max);
  sum = moe__tree16(lane);
  inverse = 1.0f / sum;
  for (i = 0; prob && i < C; ++i) prob[i] = moe__expf(logits[i] - max) * inverse;
  return moe__logf(sum) - margin;
}

MOE_API void moe_softmax(float *prob, const float *logits, int32_t C) {
  moe_cross_entropy_forward(prob, logits, 0, C);
}

#ifndef MOE_NO_TRAIN
MOE_API void moe_cross_entropy_backward(float *dlogits, const float *prob, int32_t label,
                                        float scale, int32_t C) {
  int32_t i;
  for (i = 0; i < C; ++i)
    dlogits[i] = moe__fmaf(scale, prob[i] - (i == label ? 1.0f : 0.0f), dlogits[i]);
}
#endif

/* ---- the softmax of attention ---- >>softmax
   Works on a block of rows, one for each query; s = q k^T holds the products of a row with n keys.
     p = e / sum of e,  e = 2^(c s - top),  c = log2(e) / sqrt D,  top = c times the largest s
   Forward multiplies e by v and divides the D results, not the n elements of e. */
typedef struct moe__softmax {
  float *s, *ds;      /* (rows, n), `stride` apart, with room up to the next multiple of 16 */
  float *stats;       /* top and 1 / sum of each row, `stats_stride` apart */
  const float *delta; /* (rows) dy . y, for backward */
  size_t rows, n, stride, stats_stride;
  float scale, exponent; /* 1 / sqrt D, c */
  moe__drop drop;
  uint64_t key;
  uint32_t first; /* position of the first row's first probability; the next row is n further */
} moe__softmax;

typedef struct moe__softmax_kernels {
  /* Writes stats; s becomes e, or 0 where dropout takes it. */
  void (*forward)(const moe__softmax *b);
  /* y (rows, D): the products e v become dropout(p) v. */
  void (*finish)(float *y, size_t ld, size_t D, const moe__softmax *b);
  /* s becomes dropout(p); ds, from the gradient of dropout(p), that of s. */
  void (*backward)(const moe__softmax *b);
} moe__softmax_kernels;

/* 2^x for x <= 0. Below -126 the result stays 1e-38, which is lost beside a sum of at least 1. */
static float moe__softmax_pow2(float x) { return moe__pow2f(moe__maxf(-126.0f, x)); }

static void moe__scalar_softmax_forward(const moe__softmax *b) {
  size_t r, i;
  for (r = 0; r < b->rows; ++r) {
    float *s = b->s + r * b->stride, *stat = b->stats + r * b->stats_stride, lane[16] = {0},
          max = s[0];
    uint32_t first = b->first + (uint32_t)(r * b->n);
    for (i = 1; i < b->n; ++i) max = moe__maxf(s[i], max);
    stat[0] = max * b->exponent + 0.0f; /* never -0: the order decides which zero is the largest */
    for (i = 0; i < b->n; ++i) {
      float e = moe__softmax_pow2(moe__fmaf(s[i], b->exponent, -stat[0]));
      lane[i % 16] += e;
      s[i] = moe__hash32(b->key, first + (uint32_t)i) < b->drop.threshold ? 0.0f : e;
    }
    stat[1] = 1.0f / moe__tree16(lane);
  }
}

static void moe__scalar_softmax_finish(float *y, size_t ld, size_t D, const moe__softmax *b) {
  size_t r, d;
  for (r = 0; r < b->rows; ++r)
    for (d = 0; d < D; ++d)
      y[r * ld + d] = y[r * ld + d] * (b->stats[r * b->stats_stride + 1] * b->drop.scale);
}

#ifndef MOE_NO_TRAIN
static void moe__scalar_softmax_backward(const moe__softmax *b) {
  size_t r, i;
  for (r = 0; r < b->rows; ++r) {
    float *s = b->s + r * b->stride, *ds = b->ds + r * b->stride,
          *stat = b->stats + r * b->stats_stride;
    uint32_t first = b->first + (uint32_t)(r * b->n);
    for (i = 0; i < b->n; ++i) {
      int falls = moe__hash32(b->key, first + (uint32_t)i) < b->drop.threshold;
      float e = moe__softmax_pow2(moe__fmaf(s[i], b->exponent, -stat[0]));
      float d = falls ? -b->delta[r] : moe__fmaf(ds[i], b->drop.scale, -b->delta[r]);
      s[i] = falls ? 0.0f : e * (stat[1] * b->drop.scale);
      ds[i] = (e * (stat[1] * b->scale)) * d;
    }
  }
}
#endif

static const moe__softmax_kernels moe__scalar_softmax = {
    moe__scalar_softmax_forward, moe__scalar_softmax_finish,
    MOE__OF_TRAINING(moe__scalar_softmax_backward)};

/* Each step goes over all rows before the next one begins: the processor overlaps rows instead of
   waiting for the sum of one. */
#define MOE__SOFTMAX_FORWARD(S, T)                                                                 \
  T MOE__INLINE S##_f S##_softmax_pow2(S##_f x) { return S##_pow2(S##_max(S##_set(-126.0f), x)); } \
  T static void S##_softmax_forward(const moe__softmax *b) {                                       \
    S##_f exponent = S##_set(b->exponent), zero = S##_set(0.0f);                                   \
    S##_m tail = S##_ult(S##_iiota(0), S##_iset((uint32_t)(b->n % 16)));                           \
    moe__drop drop = b->drop;                                                                      \
    uint64_t key = b->key;                                                                         \
    size_t n = b->n, r, i;                                                                         \
    for (r = 0; r < b->rows; ++r) {                                                                \
      const float *s = b->s + r * b->stride;                                                       \
      S##_f max = S##_set(s[0]);                                                                   \
      for (i = 0; i + 16 <= n; i += 16) max = S##_max(S##_load(s + i), max);                       \
      if (i < n) max = S##_sel(tail, S##_max(S##_load(s + i), max), max);                          \
      b->stats[r * b->stats_stride] = S##_max16(max) * b->exponent + 0.0f;                         \
    }                                                                                              \
    for (r = 0; r < b->rows; ++r) {                                                                \
      float *s = b->s + r * b->stride, *stat = b->stats + r * b->stats_stride;                     \
      S##_f top = S##_set(-stat[0]), sum = zero, e;                                                \
      S##_i at = S##_falls_first(key, b->first + (uint32_t)(r * n));                               \
      if (drop.threshold)                                                                          \
        for (i = 0; i + 16 <= n; i += 16, at = S##_falls_next(at)) {                               \
          e = S##_softmax_pow2(S##_fma(S##_load(s + i), exponent, top));                           \
          S##_store(s + i, S##_sel(S##_falls(at, key, drop), zero, e));                            \
          sum = S##_add(sum, e);                                                                   \
        }                                                                                          \
      else                                                                                         \
        for (i = 0; i + 16 <= n; i += 16) {                                                        \
          e = S##_softmax_pow2(S##_fma(S##_load(s + i), exponent, top));                           \
          S##_store(s + i, e);                                                                     \
          sum = S##_add(sum, e);                                                                   \
        }                                                                                          \
      if (i < n) {                                                                                 \
        e = S##_sel(tail, S##_softmax_pow2(S##_fma(S##_load(s + i), exponent, top)), zero);        \
        S##_store(s + i, drop.threshold ? S##_sel(S##_falls(at, key, drop), zero, e) : e);         \
        sum = S##_add(sum, e);                                                                     \
      }                                                                                            \
      stat[1] = 1.0f / S##_sum(sum);                                                               \
    }                                                                                              \
  }                                                                                                \
  T static void S##_softmax_finish(float *y, size_t ld, size_t D, const moe__softmax *b) {         \
    size_t r, d;                                                                                   \
    for (r = 0; r < b->rows; ++r, y += ld) {                                                       \
      S##_f factor = S##_set(b->stats[r * b->stats_stride + 1] * b->drop.scale);                   \
      for (d = 0; d + 16 <= D; d += 16) S##_store(y + d, S##_mul(S##_load(y + d), factor));        \
      if (d < D) S##_storen(y + d, S##_mul(S##_loadn(y + d, D - d), factor), D - d);               \
    }                                                                                              \
  }
MOE__V_STAMP(MOE__SOFTMAX_FORWARD)
#undef MOE__SOFTMAX_FORWARD

#define MOE__SOFTMAX_BACKWARD(S, T)                                                                \
  T static void S##_softmax_backward(const moe__softmax *b) {                                      \
    S##_f exponent = S##_set(b->exponent), grow = S##_set(b->drop.scale), zero = S##_set(0.0f);    \
    moe__drop drop = b->drop;                                                                      \
    uint64_t key = b->key;                                                                         \
    size_t n = b->n, r, i;                                                                         \
    for (r = 0; r < b->rows; ++r) {                                                                \
      float *s = b->s + r * b->stride, *ds = b->ds + r * b->stride;                                \
      const float *stat = b->stats + r * b->stats_stride;                                          \
      S##_f top = S##_set(-stat[0]), delta = S##_set(-b->delta[r]);                                \
      S##_f keep = S##_set(stat[1] * drop.scale), back = S##_set(stat[1] * b->scale);              \
      S##_i at = S##_falls_first(key, b->first + (uint32_t)(r * n));                               \
      for (i = 0; i < n; i += 16, at = S##_falls_next(at)) {                                       \
        S##_f e = S##_softmax_pow2(S##_fma(S##_load(s + i), exponent, top));                       \
        S##_f kept = S##_mul(e, keep), d = S##_fma(S##_load(ds + i), grow, delta);                 \
        if (drop.threshold) {                                                                      \
          S##_m falls = S##_falls(at, key, drop);                                                  \
          kept = S##_sel(falls, zero, kept);                                                       \
          d = S##_sel(falls, delta, d);                                                            \
        }                                                                                          \
        S##_store(s + i, kept);                                                                    \
        S##_store(ds + i, S##_mul(S##_mul(e, back), d));                                           \
      }                                                                                            \
    }                                                                                              \
  }                                                                                                \
  static const moe__softmax_kernels S##_softmax = {S##_softmax_forward, S##_softmax_finish,        \
                                                   S##_softmax_backward};
MOE__V_STAMP(MOE__SOFTMAX_BACKWARD)
#undef MOE__SOFTMAX_BACKWARD

/* ---- attention: scratch, prefetching, products ---- >>attention_parts
   A tile of work (>>attention) is some heads of one sequence. What a thread needs for one head is
   here: a place in scratch, the cache lines of the next head, and products of small matrices. */

enum {
  MOE__ATTENTION_QUERIES = 512, /* most queries of a forward tile */
  MOE__ATTENTION_ROWS = 64      /* most queries of a block */
};

/* The rows that the next head reads and writes are far apart, one or two cache lines in each, and
   no processor predicts them. While one head is computed, its products prefetch the lines of the
   next one: a row at each step of k. */
typedef struct moe__attention_prefetch {
  const float *at[8]; /* row 0 of each array, at the columns of the next head */
  size_t ld[8];
  size_t arrays, lines;    /* lines: of a row of a head */
  size_t from, to, end;    /* rows of the next head; rows of the batch */
  size_t array, line, row; /* the next line to prefetch */
} moe__attention_prefetch;

typedef struct moe__attention_job {
  const moe_attention_op *op;
  const moe__softmax_kernels *softmax;
  const moe__gemm_kernels *gemms;
  const moe__row_kernels *rows;
  size_t H, A, D, wide; /* wide: D rounded up to 16 */
  size_t longest;       /* tokens of the longest sequence */
  size_t group, blocks; /* heads of a tile; tiles along the queries of a sequence */
  size_t slot_floats;   /* scratch of a thread */
  int back;
  float scale; /* 1 / sqrt D */
  moe__drop drop;
} moe__attention_job;

/* One head of one sequence. q, dy, y, dq: its first row; keys and values are H and 2 H after q. */
typedef struct moe__attention_head {
  const moe__attention_job *job;
  const float *q, *dy, *kept_y;
  float *y, *stats, *dq;
  float *scratch;
  size_t length, from, to; /* queries [from, to) */
  uint64_t key;
  size_t first; /* position of the first probability */
  moe__attention_prefetch prefetch;
} moe__attention_head;

static size_t moe__round16(size_t n) { return (n + 15) / 16 * 16; }

/* Queries of a block: as many as keep their probabilities in the caches. With fewer, backward would
   load and store its sums of dk and dv more often. */
static size_t moe__attention_block(size_t length) {
  size_t rows = 8192 / length / 8 * 8, most = MOE__ATTENTION_ROWS;
  return rows < 16 ? 16 : rows > most ? most : rows;
}

/* Floats from one row of a block to the next. A power of two would map all rows to the same sets of
   the cache. */
static size_t moe__attention_stride(size_t length) { return moe__round16(length) + 16; }

/* Floats of the probabilities of a block, for any length up to this one. Longer sequences have
   blocks of 8192 / length rows: with their padding at most 160 floats for each of 64 rows. Beyond
   512 tokens a block has 16 rows. */
static size_t moe__attention_block_floats(size_t longest) {
  size_t stride = moe__attention_stride(longest), most = MOE__ATTENTION_ROWS * 160;
  if (longest <= 128) return (longest < 64 ? longest : 64) * stride;
  return 16 * stride > most ? 16 * stride : most;
}

/* Floats of the packed queries of a block. */
static size_t moe__attention_query_floats(size_t longest, size_t wide) {
  return (longest < MOE__ATTENTION_ROWS ? longest : (size_t)MOE__ATTENTION_ROWS) * wide;
}

/* Floats of scratch of one thread; *bad is set where the number overflows. */
static size_t moe__attention_slot(size_t longest, size_t wide, int training, int *bad) {
  size_t head = moe__mul(moe__round16(longest), wide, bad),
         block = moe__attention_block_floats(longest);
  if (!training) return moe__add(moe__mul(2, head, bad), block, bad);
  return moe__add(moe__mul(5, head, bad), 2 * (block + moe__attention_query_floats(longest, wide)),
                  bad);
}

MOE_API size_t moe_attention_scratch(int32_t longest, int32_t H, int32_t A, int training,
                                     const moe_env *env) {
  int bad = 0;
  size_t slot, floats;
  if (longest < 1 || H < 1 || A < 1) return 0;
  slot = moe__attention_slot((size_t)longest, moe__round16((size_t)(H / A)), training, &bad);
  floats = moe__mul((size_t)moe__max(env->threads, 1), slot, &bad); /* one slot for the caller */
  return bad ? SIZE_MAX : floats;
}

/* x (rows, D), its rows ld apart, as panels of 16 rows: the B of a product over D. Rows that are
   missing become zeros. */
static void moe__attention_pack_rows(const moe__attention_job *job, float *panels, const float *x,
                                     size_t ld, size_t rows) {
  size_t i;
  for (i = 0; i < rows; i += 16)
    job->gemms->pack_cols(panels + i * job->D, x + i * ld, ld, rows - i < 16 ? rows - i : 16,
                          job->D);
}

/* The same as panels of 16 columns: the B of a product over rows. */
static void moe__attention_pack_columns(const moe__attention_job *job, float *panels,
                                        const float *x, size_t ld, size_t rows) {
  size_t d;
  for (d = 0; d < job->D; d += 16)
    job->gemms->pack_rows(panels + d * rows, x + d, ld, job->D - d < 16 ? job->D - d : 16, rows);
}

static void moe__attention_prefetch_add(moe__attention_prefetch *next, const float *at, size_t ld) {
  next->at[next->arrays] = at;
  next->ld[next->arrays++] = ld;
}

/* Plans the lines of the head after head a of a sequence: the next columns, or head 0 of the
   sequence behind. */
static void moe__attention_prefetch_plan(moe__attention_head *head, size_t begin, size_t a) {
  const moe__attention_job *job = head->job;
  const moe_attention_op *op = job->op;
  moe__attention_prefetch *next = &head->prefetch;
  size_t H = job->H, i;
  int same = a + 1 < job->A;
  memset(next, 0, sizeof *next);
  next->end = (size_t)op->M;
  next->from = same ? begin : begin + head->length;
  next->to = next->from + head->length;
  if (next->to > next->end) next->to = next->end;
  if (next->from >= next->to) return;
  a = same ? (a + 1) * job->D : 0;
  next->row = next->from;
  next->lines = (job->D + 15) / 16;
  for (i = 0; i < 3; ++i) moe__attention_prefetch_add(next, op->qkv + i * H + a, 3 * H);
  if (job->back) moe__attention_prefetch_add(next, op->dy + a, H);
  moe__attention_prefetch_add(next, op->y + a, H);
  for (i = 0; i < 3 && job->back; ++i)
    moe__attention_prefetch_add(next, op->dqkv + i * H + a, 3 * H);
}

/* Lets a kernel of k steps prefetch as many rows. */
static void moe__attention_prefetch_take(moe__attention_prefetch *next, size_t k,
                                         moe__prefetch *ask) {
  size_t row = next->row;
  ask->b_step = 0;
  if (next->array >= next->arrays || k > next->end) return;
  if (row + k > next->end) row = next->end - k;
  ask->b = next->at[next->array] + row * next->ld[next->array] + 16 * next->line;
  ask->b_step = next->ld[next->array];
  next->row += k;
  if (next->row < next->to) return;
  next->row = next->from;
  if (++next->line < next->lines) return;
  next->line = 0;
  ++next->array;
}

/* A matrix whose element (i, p) is at[i row + p column]. */
typedef struct moe__strided {
  const float *at;
  size_t row, column;
} moe__strided;

static moe__strided moe__strided_make(const float *at, size_t row, size_t column) {
  moe__strided x;
  x.at = at;
  x.row = row;
  x.column = column;
  return x;
}

/* c (m, n) = start + a (m, k) b (k, n), with b in panels of 16 columns. start.at NULL counts as 0.
   This is moe__gemm_blocks without what larger products need. */
static void moe__attention_product(moe__attention_head *head, float *c, size_t c_row,
                                   moe__strided start, moe__strided a, const float *b, size_t k,
                                   size_t m, size_t n) {
  const moe__gemm_kernels *kernels = head->job->gemms;
  size_t blocks = (k + 383) / 384, p, i, j, rows, columns;
  moe__gemm_block block;
  block.c_row = c_row;
  block.a_row = a.row;
  block.a_col = a.column;
  block.b_panel = 16 * k;
  block.b_step = 16;
  block.next = moe__prefetch_none(b);
  for (p = 0; p < k; p += block.k, start = moe__strided_make(c, c_row, 1)) {
    block.k = (k - p + blocks - 1) / blocks;
    block.start_row = start.at ? start.row : 0;
    --blocks;
    for (j = 0; j < n; j += columns) {
      int width =
          moe__gemm_width(kernels, (int32_t)m, (int32_t)((n - j + 15) / 16), MOE__GEMM_PANELS);
      size_t most = (size_t)kernels->rows[width], calls = (m + most - 1) / most;
      columns = n - j < 16 * (size_t)width ? n - j : 16 * (size_t)width;
      block.b = b + j * k + 16 * p;
      for (i = 0; i < m; i += rows, --calls) {
        moe__gemm_fn fn;
        rows = (m - i + calls - 1) / calls; /* as even as can be */
        fn = kernels->fn[width][rows];
        block.c = c + i * c_row + j;
        block.start = start.at ? start.at + i * start.row + j : moe__gemm_zeros;
        block.a = a.at + i * a.row + p * a.column;
        moe__attention_prefetch_take(&head->prefetch, block.k, &block.next);
        if (columns == 16 * (size_t)width)
          fn(&block);
        else
          moe__gemm_edge(fn, &block, rows, columns, width);
      }
    }
  }
}

/* ---- self-attention over packed sequences ---- >>attention
   A tile of work is some heads of one sequence (and, in forward, at most 512 of its queries). For
   each head, keys and values are packed into scratch. Blocks of query rows then go through

     forward   s = q k^T     p = softmax(s / sqrt D)     y = dropout(p) v
     backward  s = q k^T     p from s and the stats that forward kept
               dp = dropout(dy v^T)     ds = p (dp - dy . y) / sqrt D
               dv += dropout(p)^T dy    dq += ds k    dk += ds^T q

   An element of a product is one chain of FMAs in ascending order (>>gemm), so the size of a block
   changes no bit. */

static moe__softmax moe__attention_softmax(const moe__attention_head *head) {
  moe__softmax b;
  memset(&b, 0, sizeof b);
  b.n = head->length;
  b.stride = moe__attention_stride(head->length);
  b.scale = head->job->scale;
  b.exponent = head->job->scale * MOE__LOG2E;
  b.drop = head->job->drop;
  b.key = head->key;
  return b;
}

static void moe__attention_head_forward(moe__attention_head *head) {
  const moe__attention_job *job = head->job;
  size_t H = job->H, D = job->D, ld = 3 * H, length = head->length, padded = moe__round16(length),
         block = moe__attention_block(length), i;
  float *k = head->scratch, *v = k + padded * job->wide, unwanted[2 * MOE__ATTENTION_ROWS];
  moe__strided zero = moe__strided_make(NULL, 0, 0);
  moe__softmax b = moe__attention_softmax(head);
  b.s = v + padded * job->wide;
  moe__attention_pack_rows(job, k, head->q + H, ld, length);
  moe__attention_pack_columns(job, v, head->q + 2 * H, ld, length);
  for (i = head->from; i < head->to; i += block) {
    float *y = head->y + i * H;
    b.rows = head->to - i < block ? head->to - i : block;
    b.stats = head->stats ? head->stats + i * job->A * 2 : unwanted;
    b.stats_stride = head->stats ? job->A * 2 : 2;
    b.first = (uint32_t)(head->first + i * length);
    moe__attention_product(head, b.s, b.stride, zero, moe__strided_make(head->q + i * ld, ld, 1), k,
                           D, b.rows, padded);
    job->softmax->forward(&b);
    moe__attention_product(head, y, H, zero, moe__strided_make(b.s, b.stride, 1), v, length, b.rows,
                           D);
    job->softmax->finish(y, H, D, &b);
  }
}

#ifndef MOE_NO_TRAIN
/* Scratch of one head in backward. k, q, dy: packed as columns; k_rows, v_rows: as rows; dk, dv
   (length, wide): sums over the blocks so far. */
typedef struct moe__attention_back {
  float *k_rows, *v_rows, *k, *q, *dy, *dk, *dv;
} moe__attention_back;

/* Queries [i, i + b->rows). The sums dk and dv begin with what dqkv holds (or 0) in the first
   block, and the last block writes them to dqkv. */
static void moe__attention_block_backward(moe__attention_head *head, const moe__attention_back *t,
                                          moe__softmax *b, size_t i) {
  const moe__attention_job *job = head->job;
  size_t H = job->H, D = job->D, ld = 3 * H, length = head->length, padded = moe__round16(length),
         r;
  int first = i == 0, last = i + b->rows >= length, more = !job->op->overwrite;
  const float *q = head->q + i * ld, *dy = head->dy + i * H, *y = head->kept_y + i * H;
  float *dq = head->dq + i * ld, *dk = head->dq + H, *dv = head->dq + 2 * H,
        delta[MOE__ATTENTION_ROWS];
  size_t to_row = last ? ld : job->wide;
  moe__strided zero = moe__strided_make(NULL, 0, 0),
               dk_from = moe__strided_make(first ? dk : t->dk, first ? ld : job->wide, 1),
               dv_from = moe__strided_make(first ? dv : t->dv, first ? ld : job->wide, 1);
  if (first && !more) dk_from = dv_from = zero;
  b->delta = delta;
  moe__attention_pack_columns(job, t->q, q, ld, b->rows);
  moe__attention_pack_columns(job, t->dy, dy, H, b->rows);
  moe__attention_product(head, b->s, b->stride, zero, moe__strided_make(q, ld, 1), t->k_rows, D,
                         b->rows, padded);
  moe__attention_product(head, b->ds, b->stride, zero, moe__strided_make(dy, H, 1), t->v_rows, D,
                         b->rows, padded);
  for (r = 0; r < b->rows; ++r) delta[r] = job->rows->dot(dy + r * H, y + r * H, D);
  job->softmax->backward(b);
  moe__attention_product(head, last ? dv : t->dv, to_row, dv_from,
                         moe__strided_make(b->s, 1, b->stride), t->dy, b->rows, length, D);
  moe__attention_product(head, dq, ld, more ? moe__strided_make(dq, ld, 1) : zero,
                         moe__strided_make(b->ds, b->stride, 1), t->k, length, b->rows, D);
  moe__attention_product(head, last ? dk : t->dk, to_row, dk_from,
                         moe__strided_make(b->ds, 1, b->stride), t->q, b->rows, length, D);
}

static void moe__attention_head_backward(moe__attention_head *head) {
  const moe__attention_job *job = head->job;
  size_t H = job->H, wide = job->wide, ld = 3 * H, length = head->length,
         floats = moe__round16(length) * wide, block = moe__attention_block(length), i;
  moe__attention_back t;
  moe__softmax b = moe__attention_softmax(head);
  t.k = head->scratch;
  t.k_rows = t.k + floats;
  t.v_rows = t.k_rows + floats;
  t.q = t.v_rows + floats;
  t.dy = t.q + moe__attention_query_floats(job->longest, wide);
  t.dk = t.dy + moe__attention_query_floats(job->longest, wide);
  t.dv = t.dk + floats;
  b.s = t.dv + floats;
  b.ds = b.s + moe__attention_block_floats(job->longest);
  b.stats_stride = job->A * 2;
  moe__attention_pack_rows(job, t.k_rows, head->q + H, ld, length);
  moe__attention_pack_rows(job, t.v_rows, head->q + 2 * H, ld, length);
  moe__attention_pack_columns(job, t.k, head->q + H, ld, length);
  for (i = 0; i < length; i += block) {
    b.rows = length - i < block ? length - i : block;
    b.stats = head->stats + i * job->A * 2;
    b.first = (uint32_t)(head->first + i * length);
    moe__attention_block_backward(head, &t, &b, i);
  }
}
#endif

/* Head a of sequence s, all queries. */
static moe__attention_head moe__attention_head_make(const moe__attention_job *job, size_t s,
                                                    size_t a, size_t slot) {
  const moe_attention_op *op = job->op;
  size_t begin = (size_t)op->seq_start[s], row = begin * job->H + a * job->D;
  moe__attention_head head;
  memset(&head, 0, sizeof head);
  head.job = job;
  head.length = (size_t)op->seq_start[s + 1] - begin;
  head.to = head.length;
  head.q = op->qkv + 3 * begin * job->H + a * job->D;
  head.stats = op->stats ? op->stats + (begin * job->A + a) * 2 : NULL;
  head.scratch = op->scratch + slot * job->slot_floats;
  head.key = job->drop.threshold ? op->keys[s] : 0;
  head.first = a * head.length * head.length;
  head.y = op->y + row;
  if (!job->back) return head;
  head.kept_y = op->y + row;
  head.dy = op->dy + row;
  head.dq = op->dqkv + 3 * begin * job->H + a * job->D;
  return head;
}

/* Number of a tile -> sequence, group of heads, queries; the last runs fastest. */
static void moe__attention_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__attention_job *job = (const moe__attention_job *)arg;
  size_t groups = (job->A + job->group - 1) / job->group, block = (size_t)tile % job->blocks,
         s = (size_t)tile / job->blocks / groups,
         a = (size_t)tile / job->blocks % groups * job->group, end = a + job->group;
  if (end > job->A) end = job->A;
  for (; a < end; ++a) {
    moe__attention_head head = moe__attention_head_make(job, s, a, (size_t)slot);
    head.from = block * MOE__ATTENTION_QUERIES;
    if (head.from >= head.length) return;
    if (job->blocks > 1 && head.length - head.from > MOE__ATTENTION_QUERIES)
      head.to = head.from + MOE__ATTENTION_QUERIES;
    moe__attention_prefetch_plan(&head, (size_t)job->op->seq_start[s], a);
#ifndef MOE_NO_TRAIN
    if (job->back) {
      moe__attention_head_backward(&head);
      continue;
    }
#endif
    moe__attention_head_forward(&head);
  }
}

static size_t moe__attention_longest(const moe_attention_op *op) {
  int32_t longest = 1, s;
  for (s = 0; s < op->S; ++s) longest = moe__max(longest, op->seq_start[s + 1] - op->seq_start[s]);
  return (size_t)longest;
}

static moe__attention_job moe__attention_job_make(const moe_attention_op *op, int back,
                                                  const moe_env *env) {
  moe__attention_job job;
  int bad = 0; /* the caller has allocated the scratch, so its size was no overflow */
  memset(&job, 0, sizeof job);
  job.op = op;
  job.softmax = MOE__V_PICK(env->isa, softmax);
  job.gemms = MOE__V_PICK(env->isa, gemms);
  job.rows = MOE__V_PICK(env->isa, rows);
  job.H = (size_t)op->H;
  job.A = (size_t)op->A;
  job.D = job.H / job.A;
  job.wide = moe__round16(job.D);
  job.longest = moe__attention_longest(op);
  job.slot_floats = moe__attention_slot(job.longest, job.wide, back, &bad);
  job.back = back;
  job.scale = 1.0f / sqrtf((float)job.D);
  job.drop = moe__drop_of(op->dropout, op->keys != NULL);
  return job;
}

/* The CPU's body of both directions, over threads. Backward has no tiles along the queries: dk and
   dv are sums over all of them, in order. */
static void moe__cpu_attention(const moe_attention_op *op, int back, const moe_env *env) {
  moe__attention_job job;
  size_t S = (size_t)op->S, pairs, few, longest;
  if (op->S < 1 || op->H < 1) return;
  job = moe__attention_job_make(op, back, env);
  pairs = S * job.A;
  longest = job.longest;
  few = longest > 64 ? 0 : 4096 / (longest * longest); /* 65536^2 is 0 in a size_t of 32 bits */
  /* heads of a tile: enough work for a tile, and no more tiles than a large machine needs */
  job.group = pairs / 64 > few ? pairs / 64 : few;
  job.group = job.group < 1 ? 1 : job.group > job.A ? job.A : job.group;
  job.blocks = back ? 1 : (longest + MOE__ATTENTION_QUERIES - 1) / MOE__ATTENTION_QUERIES;
  moe__parallel(env, (int32_t)(S * ((job.A + job.group - 1) / job.group) * job.blocks),
                moe__attention_tile, &job);
}

/* Forward of the queries of rows [from, to) alone, by the calling thread, without dropout and
   statistics. Keys and values of their whole sequences must be there. */
static void moe__cpu_attention_rows(const moe_attention_op *op, int32_t from, int32_t to,
                                    const moe_env *env) {
  moe__attention_job job = moe__attention_job_make(op, 0, env);
  int32_t s;
  size_t a;
  for (s = 0; s < op->S; ++s) {
    int32_t begin = op->seq_start[s], end = op->seq_start[s + 1];
    if (end <= from || begin >= to) continue;
    for (a = 0; a < job.A; ++a) {
      moe__attention_head head = moe__attention_head_make(&job, (size_t)s, a, 0);
      head.from = (size_t)moe__max(from - begin, 0);
      head.to = (size_t)(moe__min(to, end) - begin);
      moe__attention_head_forward(&head);
    }
  }
}

MOE_API void moe_attention_op_init(moe_attention_op *op) { memset(op, 0, sizeof *op); }

static moe_status moe__attention_check(const moe_attention_op *op, const moe_env *env) {
  moe_status status = moe__sequences_check("attention", op->seq_start, op->S, op->M, env);
  if (!status) status = moe__dropout_check("attention", op->dropout, env);
  if (status) return status;
  if (op->H < 0 || (op->H > 0 && (op->A < 1 || op->H % op->A)))
    return moe__fail(env, MOE_E_ARGUMENT, "attention: A is %d, expected a divisor of H, %d",
                     (int)op->A, (int)op->H);
  if (op->longest && (size_t)op->longest < moe__attention_longest(op))
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "attention: longest is %d, expected at least %d, the tokens of the longest sequence",
        (int)op->longest, (int)moe__attention_longest(op));
  return MOE_OK;
}

MOE_API moe_status moe_attention_forward(const moe_attention_op *op, const moe_env *env) {
  MOE__OFFER(env, attention, (env->backend, env, op, 0))
  moe_status status = moe__attention_check(op, env);
  if (!status) moe__cpu_attention(op, 0, env);
  return status;
}

#ifndef MOE_NO_TRAIN
MOE_API moe_status moe_attention_backward(const moe_attention_op *op, const moe_env *env) {
  MOE__OFFER(env, attention, (env->backend, env, op, 1))
  moe_status status = moe__attention_check(op, env);
  if (status) return status;
  if (!op->stats && op->M > 0)
    return moe__fail(env, MOE_E_ARGUMENT, "attention: stats is NULL, expected that of forward");
  moe__cpu_attention(op, 1, env);
  return MOE_OK;
}
#endif

/* ---- gates, top-k, dispatch ---- >>route
   A token's logits are dot products of its row with the N rows of its gate (16 lanes, >>simd).
   Tokens are cut into tiles of 64. */

enum { MOE__ROUTE_TILE = 64, MOE__ROUTE_BLOCK = 1024, MOE__GATE_COLUMNS = 128 };

/* y = a x and y += a x, rounded once per element: sums of rows times weights. */
typedef struct moe__mix_kernels {
  void (*scale)(float *y, float a, const float *x, size_t n);
  void (*axpy)(float *y, float a, const float *x, size_t n);
} moe__mix_kernels;

static void moe__scalar_mix_scale(float *y, float a, const float *x, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) y[i] = a * x[i];
}

static void moe__scalar_mix_axpy(float *y, float a, const float *x, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) y[i] = moe__fmaf(a, x[i], y[i]);
}

static const moe__mix_kernels moe__scalar_mix = {moe__scalar_mix_scale, moe__scalar_mix_axpy};

#define MOE__MIX_KERNELS(S, T)                                                                     \
  T static void S##_mix_scale(float *y, float a, const float *x, size_t n) {                       \
    S##_f f = S##_set(a);                                                                          \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16) S##_store(y + i, S##_mul(f, S##_load(x + i)));                    \
    if (i < n) S##_storen(y + i, S##_mul(f, S##_loadn(x + i, n - i)), n - i);                      \
  }                                                                                                \
  T static void S##_mix_axpy(float *y, float a, const float *x, size_t n) {                        \
    S##_f f = S##_set(a);                                                                          \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16) S##_store(y + i, S##_fma(f, S##_load(x + i), S##_load(y + i)));   \
    if (i < n)                                                                                     \
      S##_storen(y + i, S##_fma(f, S##_loadn(x + i, n - i), S##_loadn(y + i, n - i)), n - i);      \
  }                                                                                                \
  static const moe__mix_kernels S##_mix = {S##_mix_scale, S##_mix_axpy};
MOE__V_STAMP(MOE__MIX_KERNELS)
#undef MOE__MIX_KERNELS

/* What both directions read. */
typedef struct moe__route_job {
  const moe_route_op *op;
  const moe__row_kernels *rows;
  const moe__mix_kernels *mix;
  int jitters;
} moe__route_job;

static moe__route_job moe__route_job_make(const moe_route_op *op, const moe_env *env) {
  moe__route_job job;
  job.op = op;
  job.rows = MOE__V_PICK(env->isa, rows);
  job.mix = MOE__V_PICK(env->isa, mix);
  job.jitters = op->options.keys && op->options.jitter > 0; /* MOE_NO_TRAIN ignores it */
  return job;
}

/* The gate of a sequence: (N, H). */
static const float *moe__route_gate(const moe_route_op *op, int32_t sequence) {
  return op->gates + (size_t)op->gate_of[sequence] * (size_t)op->routes->N * (size_t)op->H;
}

#ifndef MOE_NO_TRAIN
/* y = x times noise in [1 - jitter, 1 + jitter], for n elements. The noise is a function of the
   sequence's key and of the element's place in the sequence, so that backward can compute it
   again. */
static void moe__route_jitter(float *y, const float *x, size_t n, uint64_t key, size_t place,
                              float jitter) {
  size_t i;
  for (i = 0; i < n; ++i) {
    float u = (float)(moe__hash32(key, (uint32_t)(place + i)) >> 8) * (2.0f / 16777216.0f) - 1.0f;
    y[i] = x[i] * (1.0f + jitter * u);
  }
}

/* The same for n columns, from column c on, of a token's row. */
static void moe__route_jitter_token(const moe_route_op *op, float *y, const float *x, size_t n,
                                    int32_t token, int32_t sequence, size_t c) {
  moe__route_jitter(y, x, n, op->options.keys[sequence],
                    (size_t)(token - op->seq_start[sequence]) * (size_t)op->H + c,
                    op->options.jitter);
}

/* Logits of one token with jitter: rows longer than 1024 are summed block by block. */
#ifdef MOE__SIMD
static void moe__route_logits_jittered(const moe__route_job *job, float *logits, int32_t token,
                                       int32_t sequence) {
  const moe_route_op *op = job->op;
  size_t H = (size_t)op->H, N = (size_t)op->routes->N, i, c;
  const float *x = op->x + (size_t)token * H, *gate = moe__route_gate(op, sequence);
  float block[MOE__ROUTE_BLOCK];
  for (c = 0; c < H; c += MOE__ROUTE_BLOCK) {
    size_t n = H - c < MOE__ROUTE_BLOCK ? H - c : (size_t)MOE__ROUTE_BLOCK;
    moe__route_jitter_token(op, block, x + c, n, token, sequence, c);
    for (i = 0; i < N; ++i) {
      float sum = job->rows->dot(block, gate + i * H + c, n);
      logits[i] = c ? logits[i] + sum : sum;
    }
  }
}
#else
/* The same sums without 4 KB of the stack: 16 elements at a time, whose noise every expert needs
   again. */
static void moe__route_logits_jittered(const moe__route_job *job, float *logits, int32_t token,
                                       int32_t sequence) {
  const moe_route_op *op = job->op;
  size_t H = (size_t)op->H, N = (size_t)op->routes->N, i, p, l;
  const float *x = op->x + (size_t)token * H, *gate = moe__route_gate(op, sequence);
  float lane[16], y[16], sum;
  for (i = 0; i < N; ++i, gate += H)
    for (p = 0; p < H; p += 16) {
      size_t n = H - p < 16 ? H - p : 16;
      int first = p % MOE__ROUTE_BLOCK == 0;
      moe__route_jitter_token(op, y, x + p, n, token, sequence, p);
      for (l = 0; l < 16; ++l)
        lane[l] = moe__fmaf(l < n ? y[l] : 0.0f, l < n ? gate[p + l] : 0.0f, first ? 0 : lane[l]);
      if (p + 16 < H && (p + 16) % MOE__ROUTE_BLOCK != 0) continue;
      sum = moe__tree16(lane);
      logits[i] = p < MOE__ROUTE_BLOCK ? sum : logits[i] + sum;
    }
}
#endif
#endif

/* logits = x W_g^T of one token [TaG] Eq. 3. */
static void moe__route_logits(const moe__route_job *job, float *logits, int32_t token,
                              int32_t sequence) {
  const moe_route_op *op = job->op;
  size_t H = (size_t)op->H, N = (size_t)op->routes->N, i;
  const float *x = op->x + (size_t)token * H, *gate = moe__route_gate(op, sequence);
#ifndef MOE_NO_TRAIN
  if (job->jitters) {
    moe__route_logits_jittered(job, logits, token, sequence);
    return;
  }
#endif
  for (i = 0; i < N; ++i) logits[i] = job->rows->dot(x, gate + i * H, H);
}

/* prob = softmax(logits) [TaG] Eq. 4. */
static void moe__route_softmax(float *prob, const float *logits, int32_t N,
                               const moe__row_kernels *rows) {
  float most = logits[0], sum;
  int32_t i;
  for (i = 1; i < N; ++i) most = moe__maxf(most, logits[i]);
  for (i = 0; i < N; ++i) prob[i] = logits[i] - most;
  rows->exp(prob, prob, (size_t)N);
  sum = rows->sum(prob, (size_t)N);
  for (i = 0; i < N; ++i) prob[i] /= sum;
}

/* The k most probable experts [TaG] Eq. 5. Logits are compared, not probabilities: the order is the
   same, and logits still differ if probabilities are all 0 or round to the same float. Of equal
   logits the lowest index comes first. Masked and pruned experts are never taken; either array may
   be NULL. The result is in range even if a logit is NaN. */
static void moe__route_top(int32_t *expert, const float *logits, const uint8_t *masked,
                           const uint8_t *pruned, int32_t N, int32_t k) {
  uint8_t taken[MOE_MAX_EXPERTS];
  int32_t i, j;
  for (i = 0; i < N; ++i) taken[i] = (masked && masked[i]) || (pruned && pruned[i]);
  for (j = 0; j < k; ++j) {
    int32_t best = -1;
    for (i = 0; i < N; ++i)
      if (!taken[i] && (best < 0 || logits[i] > logits[best])) best = i;
    MOE_ASSERT(best >= 0); /* moe__route_check has counted: k experts are left */
    taken[best] = 1;
    expert[j] = best;
  }
}

/* Weights of the chosen experts: g* [TaG] Eq. 5. If all their probabilities underflow to 0,
   renormalised weights are equal. */
static void moe__route_weights(float *weight, const float *prob, const int32_t *expert, int32_t k,
                               const moe_route_options *options) {
  float sum = 0;
  int32_t j;
  for (j = 0; j < k; ++j) sum += prob[expert[j]];
  for (j = 0; j < k; ++j) {
    if (!options->renormalize)
      weight[j] = options->scale * prob[expert[j]];
    else
      weight[j] = sum <= 0 ? 1.0f / (float)k : prob[expert[j]] / sum;
  }
}

/* Low enough that exp gives exactly 0, and still finite: no gradient turns into NaN. */
static void moe__route_mask(float *logits, const uint8_t *masked, int32_t N) {
  int32_t i;
  for (i = 0; i < N; ++i)
    if (masked[i]) logits[i] = -3.4e38f;
}

/* Eq. 3, 4 and 5 for a tile of tokens. */
static void moe__route_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__route_job *job = (const moe__route_job *)arg;
  const moe_route_op *op = job->op;
  const moe_route_options *o = &op->options;
  const moe_routes *r = op->routes;
  int32_t token = tile * MOE__ROUTE_TILE, end = moe__min(token + MOE__ROUTE_TILE, r->M);
  int32_t sequence = moe__sequence_at(op->seq_start, op->S, (size_t)token);
  const uint8_t *masked = o->forced ? NULL : o->masked;
  (void)slot;
  for (; token < end; ++token) {
    size_t choice = (size_t)token * (size_t)r->k;
    float *logits = op->logits + (size_t)token * (size_t)r->N,
          *prob = r->prob + (size_t)token * (size_t)r->N;
    int32_t *expert = r->expert + choice;
    while (op->seq_start[sequence + 1] <= token) ++sequence;
    moe__route_logits(job, logits, token, sequence);
    if (masked) moe__route_mask(logits, masked, r->N);
    moe__route_softmax(prob, logits, r->N, job->rows);
    if (o->forced)
      memcpy(expert, o->forced + choice, (size_t)r->k * sizeof *expert);
    else
      moe__route_top(expert, logits, masked, o->pruned, r->N, r->k);
    moe__route_weights(r->weight + choice, prob, expert, r->k, o);
  }
}

/* Sorts the slots by expert: counts, then places. Slots stay in order within an expert. */
static void moe__route_dispatch(moe_routes *r) {
  size_t slots = (size_t)r->M * (size_t)r->k, s;
  int32_t next[MOE_MAX_EXPERTS], i;
  memset(r->start, 0, ((size_t)r->N + 1) * sizeof *r->start);
  for (s = 0; s < slots; ++s) ++r->start[r->expert[s] + 1];
  for (i = 0; i < r->N; ++i) {
    next[i] = r->start[i];
    r->start[i + 1] += r->start[i];
  }
  for (s = 0; s < slots; ++s) r->order[next[r->expert[s]]++] = (int32_t)s;
}

/* log of the sum of exp(logits). The probability of the most probable expert is at least 1/N, and
   it is exp(logit - log sum). */
static float moe__route_log_sum(const float *logits, const float *prob, int32_t N) {
  int32_t best = 0, i;
  for (i = 1; i < N; ++i)
    if (prob[i] > prob[best]) best = i;
  return logits[best] - moe__logf(prob[best]);
}

/* Share of the choices that went to expert i: the f_i of the balance loss. */
static float moe__route_share(const moe_routes *r, int32_t i) {
  return (float)(r->start[i + 1] - r->start[i]) / ((float)r->M * (float)r->k);
}

/* balance N sum_i f_i P_i + z_loss mean(log sum^2), with P_i the mean of prob i over the tokens.
   Sums over tokens run in order, in double. */
static float moe__route_loss(const moe_routes *r, const float *logits,
                             const moe_route_options *options) {
  double balance = 0, square = 0;
  int32_t i, t;
  if (r->M == 0) return 0;
  if (options->balance > 0)
    for (i = 0; i < r->N; ++i) {
      double sum = 0;
      for (t = 0; t < r->M; ++t) sum += (double)r->prob[(size_t)t * (size_t)r->N + (size_t)i];
      balance += (double)moe__route_share(r, i) * sum / r->M;
    }
  if (options->z_loss > 0)
    for (t = 0; t < r->M; ++t) {
      size_t at = (size_t)t * (size_t)r->N;
      double z = (double)moe__route_log_sum(logits + at, r->prob + at, r->N);
      square += z * z;
    }
  return (float)((double)options->balance * r->N * balance +
                 (double)options->z_loss * square / r->M);
}

/* One expert: nothing to choose and nothing to balance. */
static void moe__route_only_one(const moe_route_op *op) {
  int32_t t;
  for (t = 0; t < op->routes->M; ++t) {
    op->routes->expert[t] = 0;
    op->routes->prob[t] = 1;
    op->routes->weight[t] = op->options.renormalize ? 1 : op->options.scale;
  }
}

/* The CPU's body. */
static void moe__cpu_route_forward(const moe_route_op *op, const moe_env *env) {
  moe_routes *r = op->routes;
  moe__route_job job = moe__route_job_make(op, env);
  if (r->N == 1)
    moe__route_only_one(op);
  else
    moe__parallel(env, moe__tiles_of((size_t)r->M, MOE__ROUTE_TILE), moe__route_tile, &job);
  moe__route_dispatch(r);
  if (op->loss)
    *op->loss = !MOE__GATE_LOSSES || r->N == 1 ? 0 : moe__route_loss(r, op->logits, &op->options);
}

MOE_API void moe_route_options_init(moe_route_options *options) {
  memset(options, 0, sizeof *options);
  options->scale = 1;
}

MOE_API void moe_route_op_init(moe_route_op *op) {
  memset(op, 0, sizeof *op);
  moe_route_options_init(&op->options);
  op->loss_scale = 1;
}

/* The sizes of routes. */
static moe_status moe__routes_check(const char *op, const moe_routes *r, const moe_env *env) {
  if (r->N < 1 || r->N > MOE_MAX_EXPERTS)
    return moe__fail(env, MOE_E_ARGUMENT, "%s: N is %d, expected 1 to %d experts", op, (int)r->N,
                     MOE_MAX_EXPERTS);
  if (r->k < 1 || r->k > r->N)
    return moe__fail(env, MOE_E_ARGUMENT, "%s: k is %d, expected 1 to N, %d", op, (int)r->k,
                     (int)r->N);
  if (r->M < 0 || r->M > INT32_MAX / r->k)
    return moe__fail(env, MOE_E_ARGUMENT, "%s: M is %d, expected 0 to %d tokens with k = %d", op,
                     (int)r->M, (int)(INT32_MAX / r->k), (int)r->k);
  return MOE_OK;
}

/* gate_of and forced, by which arrays are indexed. */
static moe_status moe__route_check_arrays(const moe_route_op *op, const moe_env *env) {
  const moe_routes *r = op->routes;
  size_t slots = (size_t)r->M * (size_t)r->k, i;
  int32_t s;
  if (r->N == 1) return MOE_OK; /* neither is read */
  for (s = 0; s < op->S; ++s)
    if (op->gate_of[s] < 0 || op->gate_of[s] >= op->G)
      return moe__fail(env, MOE_E_ARGUMENT,
                       "route: sequence %d has gate %d, the number of gates is %d", (int)s,
                       (int)op->gate_of[s], (int)op->G);
  for (i = 0; op->options.forced && i < slots; ++i) {
    int32_t expert = op->options.forced[i];
    if (expert < 0 || expert >= r->N)
      return moe__fail(env, MOE_E_ARGUMENT,
                       "route: token %d is forced to expert %d, the number of experts is %d",
                       (int)(i / (size_t)r->k), (int)expert, (int)r->N);
  }
  return MOE_OK;
}

static moe_status moe__route_check(const moe_route_op *op, const moe_env *env) {
  const moe_routes *r = op->routes;
  const moe_route_options *o = &op->options;
  int32_t i, left = 0;
  moe_status status = moe__routes_check("route", r, env);
  if (!status) status = moe__sequences_check("route", op->seq_start, op->S, r->M, env);
  if (status) return status;
  if (op->H < 0)
    return moe__fail(env, MOE_E_ARGUMENT, "route: H is %d, expected 0 or more", (int)op->H);
  if (!o->renormalize && !(o->scale > 0))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "route: scale is %g, expected more than 0 (moe_route_op_init sets 1)",
                     (double)o->scale);
  if (o->forced) return moe__route_check_arrays(op, env);
  for (i = 0; i < r->N; ++i) left += !(o->masked && o->masked[i]) && !(o->pruned && o->pruned[i]);
  if (left < r->k)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "route: %d of %d experts are neither masked nor pruned, expected at least k = %d",
        (int)left, (int)r->N, (int)r->k);
  return moe__route_check_arrays(op, env);
}

MOE_API moe_status moe_route_forward(const moe_route_op *op, const moe_env *env) {
  MOE__OFFER(env, route, (env->backend, env, op, 0))
  moe_status status = moe__route_check(op, env);
  if (!status) moe__cpu_route_forward(op, env);
  return status;
}

/* ---- gradients of gates ---- >>route_back
   Tokens are cut into tiles as in forward. The gradient of a gate is cut into blocks of columns,
   and one thread takes a block through all tokens in their order: micro-batches one after the other
   give the bits of one batch. */

#ifndef MOE_NO_TRAIN
/* dlogits of one token. dprob_i is the gradient of prob i: that of the weight if expert i was
   chosen, and N f_i / M from the balance loss, in which f counts as a constant.
     softmax   dlogit_i = prob_i (dprob_i - sum_j prob_j dprob_j)
     z-loss    dlogit_i += 2 log sum prob_i / M
   Renormalised weights w = prob / sum have dprob_j = (dw_j - sum w dw) / sum. Forced experts may
   have a sum so small that this overflows; then w_j (dw_j - sum w dw) goes to the logits directly.
 */
static void moe__route_dlogits(const moe__route_job *job, int32_t token) {
  const moe_route_op *op = job->op;
  const moe_route_options *o = &op->options;
  const moe_routes *r = op->routes;
  size_t at = (size_t)token * (size_t)r->N, choice = (size_t)token * (size_t)r->k;
  const float *prob = r->prob + at, *weight = r->weight + choice, *dweight = op->dweight + choice;
  const int32_t *expert = r->expert + choice;
  float *dlogits = op->dlogits + at;
  float balance = op->loss_scale * o->balance * (float)r->N / (float)r->M;
  float z = 2 * op->loss_scale * o->z_loss / (float)r->M;
  float dprob[MOE_MAX_EXPERTS], sum = 0, mean = 0, weighted = 0;
  int32_t i, j, tiny;
  for (i = 0; i < r->N; ++i) dprob[i] = o->balance > 0 ? balance * moe__route_share(r, i) : 0;
  for (j = 0; j < r->k; ++j) {
    sum += prob[expert[j]];
    weighted += dweight[j] * weight[j];
  }
  tiny = o->renormalize && sum > 0 && sum < 1e-20f;
  for (j = 0; j < r->k; ++j) {
    if (!o->renormalize)
      dprob[expert[j]] += o->scale * dweight[j];
    else if (!(sum <= 0) && !tiny)
      dprob[expert[j]] += (dweight[j] - weighted) / sum;
  }
  for (i = 0; i < r->N; ++i) mean += prob[i] * dprob[i];
  for (i = 0; i < r->N; ++i) dlogits[i] = prob[i] * (dprob[i] - mean);
  for (j = 0; j < r->k && tiny; ++j) dlogits[expert[j]] += weight[j] * (dweight[j] - weighted);
  if (!(o->z_loss > 0)) return;
  z *= moe__route_log_sum(op->logits + at, prob, r->N);
  for (i = 0; i < r->N; ++i) dlogits[i] += z * prob[i];
}

/* dx of one token += dlogits W_g. With jitter, W_g's part is multiplied by the noise of forward. */
static void moe__route_dx(const moe__route_job *job, int32_t token, int32_t sequence) {
  const moe_route_op *op = job->op;
  size_t H = (size_t)op->H, N = (size_t)op->routes->N, i, c, p;
  const float *dlogits = op->dlogits + (size_t)token * N, *gate = moe__route_gate(op, sequence);
  float *dx = op->dx + (size_t)token * H, block[MOE__GATE_COLUMNS];
  if (!job->jitters) {
    for (i = 0; i < N; ++i) job->mix->axpy(dx, dlogits[i], gate + i * H, H);
    return;
  }
  for (c = 0; c < H; c += MOE__GATE_COLUMNS) {
    size_t n = H - c < MOE__GATE_COLUMNS ? H - c : (size_t)MOE__GATE_COLUMNS;
    job->mix->scale(block, dlogits[0], gate + c, n);
    for (i = 1; i < N; ++i) job->mix->axpy(block, dlogits[i], gate + i * H + c, n);
    moe__route_jitter_token(op, block, block, n, token, sequence, c);
    for (p = 0; p < n; ++p) dx[c + p] += block[p];
  }
}

static void moe__route_back_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__route_job *job = (const moe__route_job *)arg;
  const moe_route_op *op = job->op;
  int32_t token = tile * MOE__ROUTE_TILE, end = moe__min(token + MOE__ROUTE_TILE, op->routes->M);
  int32_t sequence = moe__sequence_at(op->seq_start, op->S, (size_t)token);
  (void)slot;
  for (; token < end; ++token) {
    while (op->seq_start[sequence + 1] <= token) ++sequence;
    moe__route_dlogits(job, token);
    if (op->dx) moe__route_dx(job, token, sequence);
  }
}

/* A block of columns of one gate: dgate += dlogits^T x over the tokens of its sequences, in order.
 */
static void moe__route_gate_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__route_job *job = (const moe__route_job *)arg;
  const moe_route_op *op = job->op;
  size_t H = (size_t)op->H, N = (size_t)op->routes->N, i;
  int32_t blocks = moe__tiles_of(H, MOE__GATE_COLUMNS), gate = tile / blocks, s, t;
  size_t c = (size_t)(tile % blocks) * MOE__GATE_COLUMNS,
         n = H - c < MOE__GATE_COLUMNS ? H - c : (size_t)MOE__GATE_COLUMNS;
  float *dgate = op->dgates + (size_t)gate * N * H + c, block[MOE__GATE_COLUMNS];
  (void)slot;
  for (s = 0; s < op->S; ++s) {
    if (op->gate_of[s] != gate) continue;
    for (t = op->seq_start[s]; t < op->seq_start[s + 1]; ++t) {
      const float *x = op->x + (size_t)t * H + c, *dlogits = op->dlogits + (size_t)t * N;
      if (job->jitters) {
        moe__route_jitter_token(op, block, x, n, t, s, c);
        x = block;
      }
      for (i = 0; i < N; ++i) job->mix->axpy(dgate + i * H, dlogits[i], x, n);
    }
  }
}

static void moe__cpu_route_backward(const moe_route_op *op, const moe_env *env) {
  moe__route_job job = moe__route_job_make(op, env);
  int32_t used = 0, s;
  if (op->routes->N == 1) return; /* the probability is always 1 */
  moe__parallel(env, moe__tiles_of((size_t)op->routes->M, MOE__ROUTE_TILE), moe__route_back_tile,
                &job);
  if (!op->dgates) return;
  for (s = 0; s < op->S; ++s) used = moe__max(used, op->gate_of[s] + 1);
  moe__parallel(env, used * moe__tiles_of((size_t)op->H, MOE__GATE_COLUMNS), moe__route_gate_tile,
                &job);
}

MOE_API moe_status moe_route_backward(const moe_route_op *op, const moe_env *env) {
  MOE__OFFER(env, route, (env->backend, env, op, 1))
  moe_status status = moe__route_check(op, env);
  if (!status) moe__cpu_route_backward(op, env);
  return status;
}
#endif

/* ---- expert feed-forward networks ---- >>experts
   Copies of the tokens' rows are gathered expert by expert (routes->order). The products of each
   expert run on its own rows. Then the outputs of a token's choices are summed in their order, so
   that neither the batch nor the threads change a sum. One expert whose weights are all 1 is the
   dense layer: nothing is gathered, and nothing is multiplied by a weight. */

enum { MOE__EXPERTS_TILE = 64 }; /* rows or tokens that are moved together */

/* Independent products of many experts, run when the list is full and at the end. The list is on
   the stack, and builds without SIMD are for machines with little of it. */
#ifdef MOE_NO_SIMD
enum { MOE__EXPERTS_LIST = 8 };
#else
enum { MOE__EXPERTS_LIST = 64 };
#endif

typedef struct moe__products {
  moe__gemm item[MOE__EXPERTS_LIST];
  int32_t count;
  const moe_env *env;
} moe__products;

static void moe__products_run(moe__products *list) {
  moe__gemm_run(list->item, list->count, list->env);
  list->count = 0;
}

static void moe__products_add(moe__products *list, const moe__gemm *product) {
  if (list->count == MOE__EXPERTS_LIST) moe__products_run(list);
  list->item[list->count++] = *product;
}

/* Scratch of R = M k rows, sorted by expert: place (R) the row of each slot; x (R, H); e (R, H) the
   experts' outputs, in backward weight dy and then dx; a and d (R, F) the output of GELU and the
   gradient of its input. Dense: tokens are rows, and x and dy are read where they are. */
typedef struct moe__experts_job {
  const moe_experts_op *op;
  float *place, *x, *e, *a, *d;
  const float *rows_x; /* (R, H) x of the rows */
  float *out;          /* (R, H) the experts' outputs in forward */
  size_t H, F;
  int32_t rows;  /* R */
  int dense;     /* one expert, every weight exactly 1 */
  moe_env alone; /* of a thread that works by itself */
  int32_t shares;
  const moe__row_kernels *row_kernels;
  const moe__mix_kernels *mix;
} moe__experts_job;

MOE_API size_t moe_experts_scratch(int32_t M, int32_t k, int32_t H, int32_t F, int training) {
  int bad = 0;
  size_t rows = moe__mul((size_t)M, (size_t)k, &bad);
  size_t of_H = moe__mul(2, (size_t)H, &bad), of_F = moe__mul(training ? 2 : 1, (size_t)F, &bad);
  size_t floats = moe__mul(rows, moe__add(1, moe__add(of_H, of_F, &bad), &bad), &bad);
  return bad ? SIZE_MAX : floats;
}

/* Whether this is the dense layer: one expert, every weight exactly 1. */
static int moe__experts_dense(const moe_routes *routes) {
  int32_t t;
  if (routes->N != 1) return 0;
  if (!routes->weight) return 1;
  for (t = 0; t < routes->M; ++t)
    if (routes->weight[t] < 1 || !(routes->weight[t] <= 1)) return 0;
  return 1;
}

static moe__experts_job moe__experts_job_make(const moe_experts_op *op, const moe_env *env) {
  const moe_routes *r = op->routes;
  size_t rows = (size_t)r->M * (size_t)r->k;
  moe__experts_job job;
  memset(&job, 0, sizeof job);
  job.op = op;
  job.H = (size_t)op->H;
  job.F = (size_t)op->F;
  job.rows = (int32_t)rows;
  job.place = op->scratch;
  job.x = job.place + rows;
  job.e = job.x + rows * job.H;
  job.a = job.e + rows * job.H;
  job.d = job.a + rows * job.F;
  job.dense = moe__experts_dense(r);
  job.rows_x = job.dense ? op->x : job.x;
  job.alone = *env;
  job.alone.threads = 1;
  job.alone.parallel_for = NULL;
  job.row_kernels = MOE__V_PICK(env->isa, rows);
  job.mix = MOE__V_PICK(env->isa, mix);
  return job;
}

/* The row of a slot. C does not allow reading the scratch of floats through another type, so row
   numbers are copied in and out. */
static size_t moe__experts_row(const moe__experts_job *job, size_t slot) {
  int32_t row;
  memcpy(&row, job->place + slot, sizeof row);
  return (size_t)row;
}

/* Rows [row, end): their places, and copies of their tokens' x. */
static void moe__experts_gather(const moe__experts_job *job, int32_t row, int32_t end) {
  const moe_routes *r = job->op->routes;
  size_t H = job->H;
  for (; row < end; ++row) {
    size_t slot = (size_t)r->order[row], token = slot / (size_t)r->k;
    memcpy(job->place + slot, &row, sizeof row);
    memcpy(job->x + (size_t)row * H, job->op->x + token * H, H * sizeof(float));
  }
}

static void moe__experts_gather_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__experts_job *job = (const moe__experts_job *)arg;
  int32_t row = tile * MOE__EXPERTS_TILE;
  (void)slot;
  moe__experts_gather(job, row, moe__min(row + MOE__EXPERTS_TILE, job->rows));
}

/* y of a tile of tokens: the sum over a token's choices, in order, of weight e [TaG] Eq. 2, 6. */
static void moe__experts_combine_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__experts_job *job = (const moe__experts_job *)arg;
  const moe_routes *r = job->op->routes;
  int32_t token = tile * MOE__EXPERTS_TILE, end = moe__min(token + MOE__EXPERTS_TILE, r->M), j;
  (void)slot;
  for (; token < end; ++token) {
    float *y = job->op->y + (size_t)token * job->H;
    size_t first = (size_t)token * (size_t)r->k, at;
    job->mix->scale(y, r->weight[first], job->out + moe__experts_row(job, first) * job->H, job->H);
    for (j = 1; j < r->k; ++j) {
      at = first + (size_t)j;
      job->mix->axpy(y, r->weight[at], job->out + moe__experts_row(job, at) * job->H, job->H);
    }
  }
}

/* Rows [at, at + rows) of expert i through its first layer: a = GELU(W_in x + b_in). a may point
   anywhere. */
static moe__gemm moe__experts_in(const moe__experts_job *job, int32_t i, float *a, int32_t at,
                                 int32_t rows) {
  const moe_experts_op *op = job->op;
  float *pre = op->pre ? op->pre + (size_t)at * job->F : a;
  moe__gemm g = moe__linear_product(pre, job->rows_x + (size_t)at * job->H, &op->in[i],
                                    op->b_in ? op->b_in[i] : NULL, rows);
  g.gelu = a;
  return g;
}

/* The same rows through its second layer: e = W_out a + b_out. */
static moe__gemm moe__experts_out(const moe__experts_job *job, int32_t i, const float *a,
                                  int32_t at, int32_t rows) {
  const moe_experts_op *op = job->op;
  return moe__linear_product(job->out + (size_t)at * job->H, a, &op->out[i],
                             op->b_out ? op->b_out[i] : NULL, rows);
}

/* The products of forward. The rows, sorted by expert, are divided into equal shares, regardless of
   where experts begin and end. A thread takes a share, gathers its rows and runs them, in blocks of
   one expert, through both layers: the inner activations of a block stay in its second-level cache.

     experts  |         0         |    1    |             2             |  3  |
     shares   |       0       |       1       |       2       |       3       |
     blocks   |       |       |   |    |    | |       |       |    |    |     |

   With fewer than 256 rows for each thread, every thread would wait for the weights of most
   experts; then all threads work on one product after the other (moe__experts_spread). On a Xeon
   with two threads, shares make 4 x 128 tokens 2 % faster and 8 x 128 4 %, and would make 8 x 32
   2 % slower. Another library (env.backend) gets products that are as large as possible. */
enum {
  MOE__EXPERTS_SHARE = 256, /* fewest rows of a share */
  MOE__EXPERTS_SHARES = 4,  /* most shares of a thread: others take those of a slow thread */
  MOE__EXPERTS_BLOCK = 128  /* most rows of a block */
};

/* The rows of a block, when `rows` are cut as evenly as can be: a multiple of 8. */
static int32_t moe__experts_block_rows(int32_t rows) {
  int32_t blocks = moe__tiles_of((size_t)rows, MOE__EXPERTS_BLOCK);
  return blocks ? ((rows + blocks - 1) / blocks + 7) / 8 * 8 : 0;
}

static void moe__experts_share_tile(void *arg, int32_t share, int32_t slot) {
  const moe__experts_job *job = (const moe__experts_job *)arg;
  const int32_t *start = job->op->routes->start;
  int32_t first = moe__share_of(job->rows, share, job->shares),
          last = moe__share_of(job->rows, share + 1, job->shares), i;
  float *a = job->a + (size_t)slot * MOE__EXPERTS_BLOCK * job->F;
  if (!job->dense) moe__experts_gather(job, first, last);
  for (i = 0; i < job->op->N; ++i) {
    int32_t row = moe__max(start[i], first), end = moe__min(start[i + 1], last),
            size = row < end ? moe__experts_block_rows(end - row) : 0, rows;
    for (; row < end; row += rows) {
      moe__gemm g;
      rows = moe__min(end - row, size);
      g = moe__experts_in(job, i, a, row, rows);
      moe__gemm_run(&g, 1, &job->alone);
      g = moe__experts_out(job, i, a, row, rows);
      moe__gemm_run(&g, 1, &job->alone);
    }
  }
}

/* One product after the other, each spread over all threads. */
static void moe__experts_spread(moe__experts_job *job, const moe_env *env) {
  const int32_t *start = job->op->routes->start;
  moe__products list;
  int32_t i, layer;
  list.count = 0;
  list.env = env;
  if (!job->dense)
    moe__parallel(env, moe__tiles_of((size_t)job->rows, MOE__EXPERTS_TILE),
                  moe__experts_gather_tile, job);
  for (layer = 0; layer < 2; ++layer) {
    for (i = 0; i < job->op->N; ++i) {
      int32_t rows = start[i + 1] - start[i];
      float *a = job->a + (size_t)start[i] * job->F;
      moe__gemm g = layer ? moe__experts_out(job, i, a, start[i], rows)
                          : moe__experts_in(job, i, a, start[i], rows);
      if (rows > 0) moe__products_add(&list, &g);
    }
    moe__products_run(&list);
  }
}

/* The CPU's body. */
static void moe__cpu_experts_forward(const moe_experts_op *op, const moe_env *env) {
  moe__experts_job job = moe__experts_job_make(op, env);
  int32_t threads = env->parallel_for ? moe__max(env->threads, 1) : 1,
          each = job.rows / threads / MOE__EXPERTS_SHARE; /* shares of a thread */
  job.out = job.dense ? op->y : op->e ? op->e : job.e;
  if (!MOE__BACKEND(env) && (threads == 1 || each > 0)) {
    job.shares = threads == 1 ? 1 : threads * moe__min(each, MOE__EXPERTS_SHARES);
    moe__parallel(env, job.shares, moe__experts_share_tile, &job);
  } else
    moe__experts_spread(&job, env);
  if (job.dense) return;
  moe__parallel(env, moe__tiles_of((size_t)op->routes->M, MOE__EXPERTS_TILE),
                moe__experts_combine_tile, &job);
}

MOE_API void moe_experts_op_init(moe_experts_op *op) { memset(op, 0, sizeof *op); }

/* The op with routes: if it has none, those of a dense layer, built in *dense and start. */
static moe_experts_op moe__experts_routed(const moe_experts_op *op, moe_routes *dense,
                                          int32_t start[2]) {
  moe_experts_op routed = *op;
  if (op->routes) return routed;
  memset(dense, 0, sizeof *dense);
  dense->M = start[1] = op->M;
  dense->N = dense->k = 1;
  dense->start = start;
  start[0] = 0;
  routed.routes = dense;
  return routed;
}

/* The weights (rows, cols) of an expert. */
static moe_status moe__experts_check_weights(const moe_mat *w, const char *name, int32_t i,
                                             int32_t rows, int32_t cols, const moe_env *env) {
  if (w->rows != rows || w->cols != cols || (!w->data && rows && cols))
    return moe__fail(
        env, MOE_E_ARGUMENT, "experts: `%s` of expert %d is (%d, %d)%s, expected (%d, %d)", name,
        (int)i, (int)w->rows, (int)w->cols, w->data ? "" : " without data", (int)rows, (int)cols);
  if (w->type == MOE_TYPE_I8 && cols > MOE_INT8_COLS)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "experts: `%s` of expert %d has int8 weights of %d columns, expected at most %d", name,
        (int)i, (int)cols, MOE_INT8_COLS);
  return MOE_OK;
}

static moe_status moe__experts_check(const moe_experts_op *op, const moe_env *env) {
  int32_t i;
  moe_status status = moe__routes_check("experts", op->routes, env);
  if (status) return status;
  if (op->N != op->routes->N)
    return moe__fail(env, MOE_E_ARGUMENT, "experts: N is %d, expected %d, the N of the routes",
                     (int)op->N, (int)op->routes->N);
  if (op->H < 0 || op->F < 0)
    return moe__fail(env, MOE_E_ARGUMENT, "experts: H is %d and F is %d, expected 0 or more",
                     (int)op->H, (int)op->F);
  for (i = 0; i < op->N && !status; ++i)
    if (op->routes->start[i] < op->routes->start[i + 1]) { /* others may be pruned */
      status = moe__experts_check_weights(&op->in[i], "in", i, op->F, op->H, env);
      if (!status) status = moe__experts_check_weights(&op->out[i], "out", i, op->H, op->F, env);
    }
  return status;
}

MOE_API moe_status moe_experts_forward(const moe_experts_op *op, const moe_env *env) {
  MOE__OFFER(env, experts, (env->backend, env, op, 0))
  moe_routes dense;
  int32_t start[2];
  moe_experts_op routed = moe__experts_routed(op, &dense, start);
  moe_status status = moe__experts_check(&routed, env);
  if (!status) moe__cpu_experts_forward(&routed, env);
  return status;
}

/* ---- gradients of experts ---- >>experts_back
   The way back through >>experts, step by step: dy times the weight of a choice, W_out, GELU, W_in,
   and the sum over the choices of a token. */

#ifndef MOE_NO_TRAIN
/* a = GELU(x) and d = d GELU'(x) in one pass, bit for bit as moe_gelu_forward and
   moe_gelu_backward. */
typedef struct moe__expert_kernels {
  void (*gelu_both)(float *a, float *d, const float *x, size_t n);
} moe__expert_kernels;

static void moe__scalar_gelu_both(float *a, float *d, const float *x, size_t n) {
  float slope;
  size_t i;
  for (i = 0; i < n; ++i) {
    a[i] = moe__geluf(x[i], &slope);
    d[i] = d[i] * slope;
  }
}
static const moe__expert_kernels moe__scalar_experts = {moe__scalar_gelu_both};

#define MOE__EXPERT_KERNELS(S, T)                                                                  \
  T static void S##_gelu_both(float *a, float *d, const float *x, size_t n) {                      \
    S##_f slope;                                                                                   \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16) {                                                                 \
      S##_store(a + i, S##_gelu16(S##_load(x + i), &slope));                                       \
      S##_store(d + i, S##_mul(S##_load(d + i), slope));                                           \
    }                                                                                              \
    if (i == n) return;                                                                            \
    S##_storen(a + i, S##_gelu16(S##_loadn(x + i, n - i), &slope), n - i);                         \
    S##_storen(d + i, S##_mul(S##_loadn(d + i, n - i), slope), n - i);                             \
  }                                                                                                \
  static const moe__expert_kernels S##_experts = {S##_gelu_both};
MOE__V_STAMP(MOE__EXPERT_KERNELS)
#undef MOE__EXPERT_KERNELS

static const float *moe__experts_weight(const float *const *w, const moe_mat *mat, int32_t i) {
  return w ? w[i] : (const float *)mat[i].data;
}

/* A tile of rows: places, x, dweight = dy . e, weight dy. */
static void moe__experts_back_gather_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__experts_job *job = (const moe__experts_job *)arg;
  const moe_experts_op *op = job->op;
  const moe_routes *r = op->routes;
  int32_t row = tile * MOE__EXPERTS_TILE, end = moe__min(row + MOE__EXPERTS_TILE, job->rows);
  size_t H = job->H;
  (void)slot;
  moe__experts_gather(job, row, end);
  for (; row < end; ++row) {
    size_t from = (size_t)r->order[row], at = (size_t)row * H;
    const float *dy = op->dy + from / (size_t)r->k * H;
    if (op->dweight) op->dweight[from] = job->row_kernels->dot(dy, op->e + at, H);
    job->mix->scale(job->e + at, r->weight[from], dy, H);
  }
}

/* dx of a tile of tokens += the rows of its choices, in order. */
static void moe__experts_scatter_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__experts_job *job = (const moe__experts_job *)arg;
  const moe_routes *r = job->op->routes;
  int32_t token = tile * MOE__EXPERTS_TILE, end = moe__min(token + MOE__EXPERTS_TILE, r->M), j;
  (void)slot;
  for (; token < end; ++token)
    for (j = 0; j < r->k; ++j) {
      size_t row = moe__experts_row(job, (size_t)token * (size_t)r->k + (size_t)j);
      job->mix->axpy(job->op->dx + (size_t)token * job->H, 1, job->e + row * job->H, job->H);
    }
}

/* For a tile of rows, from pre: the output of GELU again, and the gradient of its input. */
static void moe__experts_gelu_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__experts_job *job = (const moe__experts_job *)arg;
  int32_t first = tile * MOE__EXPERTS_TILE, end = moe__min(first + MOE__EXPERTS_TILE, job->rows);
  size_t at = (size_t)first * job->F, n = (size_t)(end - first) * job->F;
  (void)slot;
  MOE__V_PICK(job->alone.isa, experts)->gelu_both(job->a + at, job->d + at, job->op->pre + at, n);
}

/* d = de W_out of every expert: the gradient of the output of GELU. de: weight dy of the rows. */
static void moe__experts_back_out(const moe__experts_job *job, const float *de,
                                  moe__products *list) {
  const moe_experts_op *op = job->op;
  const int32_t *start = op->routes->start;
  int32_t i;
  for (i = 0; i < op->N; ++i) {
    int32_t rows = start[i + 1] - start[i];
    moe__gemm g;
    if (!rows) continue;
    g = moe__linear_input_gradient(job->d + (size_t)start[i] * job->F,
                                   de + (size_t)start[i] * job->H,
                                   moe__experts_weight(op->w_out, op->out, i),
                                   op->out_back ? &op->out_back[i] : NULL, op->H, op->F, rows);
    g.accumulate = 0;
    moe__products_add(list, &g);
  }
  moe__products_run(list);
}

/* Gradients of the weights and biases of every expert, sums over its rows in order. */
static void moe__experts_back_weights(const moe__experts_job *job, const float *de,
                                      moe__products *list) {
  const moe_experts_op *op = job->op;
  const int32_t *start = op->routes->start;
  int32_t i;
  for (i = 0; i < op->N; ++i) {
    int32_t rows = start[i + 1] - start[i];
    size_t h = (size_t)start[i] * job->H, f = (size_t)start[i] * job->F;
    moe__gemm g;
    if (!rows) continue;
    g = moe__linear_weight_gradient(op->d_out ? op->d_out[i] : NULL,
                                    op->d_b_out ? op->d_b_out[i] : NULL, de + h, job->a + f, op->H,
                                    op->F, rows);
    moe__products_add(list, &g);
    g = moe__linear_weight_gradient(op->d_in ? op->d_in[i] : NULL,
                                    op->d_b_in ? op->d_b_in[i] : NULL, job->d + f, job->rows_x + h,
                                    op->F, op->H, rows);
    moe__products_add(list, &g);
  }
}

/* dx of the rows of every expert: dense, straight into the caller's dx; else into e. */
static void moe__experts_back_in(const moe__experts_job *job, moe__products *list) {
  const moe_experts_op *op = job->op;
  const int32_t *start = op->routes->start;
  float *dx = job->dense ? op->dx : job->e;
  int32_t i;
  for (i = 0; i < op->N; ++i) {
    int32_t rows = start[i + 1] - start[i];
    moe__gemm g;
    if (!rows) continue;
    g = moe__linear_input_gradient(dx + (size_t)start[i] * job->H,
                                   job->d + (size_t)start[i] * job->F,
                                   moe__experts_weight(op->w_in, op->in, i),
                                   op->in_back ? &op->in_back[i] : NULL, op->F, op->H, rows);
    g.accumulate = job->dense;
    moe__products_add(list, &g);
  }
  moe__products_run(list);
}

/* dy -> weight dy -> through W_out -> through GELU -> gradients of the weights -> through W_in ->
   dx. The gradients of the weights read e before the rows of dx overwrite it. */
static void moe__cpu_experts_backward(const moe_experts_op *op, const moe_env *env) {
  moe__experts_job job = moe__experts_job_make(op, env);
  const float *de = job.dense ? op->dy : job.e;
  int32_t tiles = moe__tiles_of((size_t)job.rows, MOE__EXPERTS_TILE);
  moe__products list;
  list.count = 0;
  list.env = env;
  if (!job.dense)
    moe__parallel(env, tiles, moe__experts_back_gather_tile, &job);
  else if (op->dweight)
    memset(op->dweight, 0, (size_t)op->routes->M * sizeof *op->dweight);
  moe__experts_back_out(&job, de, &list);
  moe__parallel(env, tiles, moe__experts_gelu_tile, &job);
  moe__experts_back_weights(&job, de, &list);
  if (!job.dense || !op->dx) moe__products_run(&list);
  if (!op->dx) return;
  moe__experts_back_in(&job, &list);
  if (!job.dense)
    moe__parallel(env, moe__tiles_of((size_t)op->routes->M, MOE__EXPERTS_TILE),
                  moe__experts_scatter_tile, &job);
}

MOE_API moe_status moe_experts_backward(const moe_experts_op *op, const moe_env *env) {
  MOE__OFFER(env, experts, (env->backend, env, op, 1))
  moe_routes dense;
  int32_t i, start[2];
  moe_experts_op routed = moe__experts_routed(op, &dense, start);
  moe_status status = moe__experts_check(&routed, env);
  if (status) return status;
  for (i = 0; i < op->N && (!op->w_in || !op->w_out); ++i) {
    const moe_mat *in = &op->in[i], *out = &op->out[i];
    if (in->type != MOE_TYPE_F32 || in->layout != MOE_LAYOUT_ROWS || out->type != MOE_TYPE_F32 ||
        out->layout != MOE_LAYOUT_ROWS)
      return moe__fail(env, MOE_E_ARGUMENT,
                       "experts: w_in or w_out is NULL, but in or out of expert %d is not float "
                       "weights in rows layout: set both",
                       (int)i);
  }
  if (routed.routes->M > 0 &&
      (!op->pre || (!op->e && op->dweight && !moe__experts_dense(routed.routes))))
    return moe__fail(env, MOE_E_ARGUMENT, "experts: pre or e is NULL, expected those of forward");
  moe__cpu_experts_backward(&routed, env);
  return MOE_OK;
}
#endif

/* ---- kinds of tasks: heads, losses ---- >>kinds
   Everything that distinguishes one kind of task from another is in this table. A new kind is a
   value of moe_kind, a row, and a function for its loss if none of those here fits. */

/* The loss of one sequence, and its gradient. Forward (dscore NULL): returns the loss and turns the
   row of `classes` scores into what the gradient needs. Backward: takes that row and writes the
   gradient of loss / batch_size to dscore (classes), which is 0 before. */
typedef float (*moe__loss)(float *dscore, float *row, float label, int32_t classes,
                           int32_t batch_size);

typedef struct moe__kind {
  const char *name;    /* in files */
  int32_t least, most; /* number of classes; most 1: the task has no classes but one score, with a
                          range in place of label names */
  int32_t spans;       /* the head reads [CLS] and the means of this many spans, 0 or 2 */
  int ranked; /* 1: a row is one choice of a group, where the largest logit of class 1 wins;
                          0: each row is a separate question */
  moe__loss loss;
} moe__kind;

#ifndef MOE_NO_TRAIN
/* Cross-entropy / log C [TaG] Eq. 9, 3.3; the row becomes its probabilities. */
static float moe__loss_classes(float *dscore, float *row, float label, int32_t classes,
                               int32_t batch_size) {
  double log_classes = moe__log_double((double)classes);
  if (!dscore)
    return (float)(1 / log_classes) * moe_cross_entropy_forward(row, row, (int32_t)label, classes);
  moe_cross_entropy_backward(dscore, row, (int32_t)label, (float)(1 / (log_classes * batch_size)),
                             classes);
  return 0;
}

/* Squared error [TaG] Eq. 10; the row becomes score - label. */
static float moe__loss_square(float *dscore, float *row, float label, int32_t classes,
                              int32_t batch_size) {
  (void)classes;
  if (dscore) return dscore[0] = 2 * row[0] / (float)batch_size, 0.0f;
  row[0] -= label;
  return row[0] * row[0];
}
#define MOE__LOSS(function) function
#else
#define MOE__LOSS(function) NULL
#endif

/* In the order of moe_kind. MOE__KINDS_MORE is for a test, which adds a row of its own. */
static const moe__kind moe__kinds[] = {
    {"classification", 2, MOE_MAX_CLASSES, 0, 0, MOE__LOSS(moe__loss_classes)},
    {"regression", 1, 1, 0, 0, MOE__LOSS(moe__loss_square)},
    {"ranking", 2, 2, 0, 1, MOE__LOSS(moe__loss_classes)},
    {"span", 2, MOE_MAX_CLASSES, 2, 0, MOE__LOSS(moe__loss_classes)},
#ifdef MOE__KINDS_MORE
    MOE__KINDS_MORE
#endif
};

static const moe__kind *moe__kind_of(const moe_task *task) { return &moe__kinds[task->kind]; }

/* Whether a task answers with one of its classes; else with a score. */
static int moe__has_classes(const moe_task *task) { return moe__kind_of(task)->most > 1; }

/* Width of what a task's head reads. */
static size_t moe__head_width(const moe_config *config, const moe_task *task) {
  return (size_t)config->hidden * (size_t)(1 + moe__kind_of(task)->spans);
}

MOE_API const char *moe_kind_name(moe_kind kind) {
  return (unsigned)kind < (unsigned)MOE__COUNT(moe__kinds) ? moe__kinds[kind].name : NULL;
}

MOE_API int moe_kind_from_name(moe_kind *kind, const char *name) {
  int k = 0;
  while (k < MOE__COUNT(moe__kinds) && strcmp(moe__kinds[k].name, name)) ++k;
  if (k < MOE__COUNT(moe__kinds)) *kind = (moe_kind)k;
  return k < MOE__COUNT(moe__kinds);
}

/* ---- configuration, tasks ---- >>config */

enum { MOE__TEXT_FLAGS = 15 }; /* all of moe_text_flags */

/* The names of enums in files. */
static const char *const moe__router_names[] = {"dense", "shared", "task", "level", "embedding"};
static const char *const moe__unit_names[] = {"ffn", "block"};
static const char *const moe__selection_names[] = {"softmax", "gumbel", "straight-through"};
static const char *const moe__truncate_names[] = {"longest", "right"};

/* The place of a name in a list, or -1. */
static int moe__find_name(const char *const *names, int count, const char *name) {
  int i = 0;
  while (i < count && strcmp(names[i], name)) ++i;
  return i < count ? i : -1;
}

MOE_API const char *moe_router_name(moe_router router) {
  return (unsigned)router < (unsigned)MOE__COUNT(moe__router_names) ? moe__router_names[router]
                                                                    : NULL;
}

MOE_API int moe_router_from_name(moe_router *router, const char *name) {
  int i = moe__find_name(moe__router_names, MOE__COUNT(moe__router_names), name);
  if (i >= 0) *router = (moe_router)i;
  return i >= 0;
}

MOE_API const char *moe_truncate_name(moe_truncate truncate) {
  return (unsigned)truncate < (unsigned)MOE__COUNT(moe__truncate_names)
             ? moe__truncate_names[truncate]
             : NULL;
}

MOE_API int moe_truncate_from_name(moe_truncate *truncate, const char *name) {
  int i = moe__find_name(moe__truncate_names, MOE__COUNT(moe__truncate_names), name);
  if (i >= 0) *truncate = (moe_truncate)i;
  return i >= 0;
}

MOE_API void moe_config_init(moe_config *config) {
  memset(config, 0, sizeof *config);
  config->layers = 6;
  config->hidden = 384;
  config->ffn = 1536;
  config->heads = 12;
  config->vocab = 30522;
  config->positions = 512;
  config->segments = 2;
  config->eps = 1e-12f;
  config->router = MOE_ROUTER_TASK;
  config->experts = 4;
  config->top_k = 1;
  config->rank = 8;
  config->max_len = 128;
  config->task_dim = 64;
  config->temperature = 0.1f;
}

/* Blocks that a layer chooses from; 1 where the experts are feed-forward networks. */
static int32_t moe__layer_blocks(const moe_config *config) {
  return MOE__BLOCKS(config) ? config->experts : 1;
}
/* All blocks of the model: its layers, times the blocks of each. */
static int32_t moe__block_count(const moe_config *config) {
  return config->layers * moe__layer_blocks(config);
}
/* Feed-forward networks of a block. */
static int32_t moe__block_experts(const moe_config *config) {
  return MOE__BLOCKS(config) ? 1 : config->experts;
}
/* Whether gates send tokens to feed-forward networks. */
static int moe__has_gates(const moe_config *config) {
  return !MOE__BLOCKS(config) && config->router != MOE_ROUTER_DENSE;
}

/* The limits keep every size of a layer within int32_t; published encoders are far below. */
static moe_status moe__check_range(const char *what, int32_t value, int32_t low, int32_t high,
                                   const moe_env *env) {
  if (value >= low && value <= high) return MOE_OK;
  return moe__fail(env, MOE_E_ARGUMENT, "configuration: %s is %d, expected %d to %d", what,
                   (int)value, (int)low, (int)high);
}

static moe_status moe__check_sizes(const moe_config *c, const moe_env *env) {
  moe_status status = MOE_OK;
  if (!status) status = moe__check_range("layers", c->layers, 1, 1024, env);
  if (!status) status = moe__check_range("hidden", c->hidden, 1, 65536, env);
  if (!status) status = moe__check_range("ffn", c->ffn, 1, 1 << 20, env);
  if (!status) status = moe__check_range("heads", c->heads, 1, c->hidden, env);
  if (!status) status = moe__check_range("feature_dim", c->feature_dim, 0, 1 << 20, env);
  if (!status && c->feature_dim && c->vocab)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "configuration: vocab is %d, expected 0, since the inputs are features",
                     (int)c->vocab);
  if (!status && !c->feature_dim) status = moe__check_range("vocab", c->vocab, 1, 1 << 24, env);
  if (!status) status = moe__check_range("positions", c->positions, 1, 1 << 20, env);
  if (!status) status = moe__check_range("segments", c->segments, 1, 256, env);
  if (!status) status = moe__check_range("max_len", c->max_len, 1, c->positions, env);
  if (!status && c->hidden % c->heads)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "configuration: hidden is %d, expected a multiple of heads (%d)",
                     (int)c->hidden, (int)c->heads);
  if (!status && !(c->eps > 0 && c->eps < 1))
    return moe__fail(env, MOE_E_ARGUMENT, "configuration: eps is %g, expected above 0 and below 1",
                     (double)c->eps);
  return status;
}

/* Blocks as experts and the task-level router. */
static moe_status moe__check_task_router(const moe_config *c, const moe_env *env) {
  int level = c->router == MOE_ROUTER_TASK_LEVEL, block = c->unit == MOE_UNIT_BLOCK;
  moe_status status = moe__check_range("unit", (int32_t)c->unit, MOE_UNIT_FFN, MOE_UNIT_BLOCK, env);
  if (!status)
    status = moe__check_range("selection", (int32_t)c->selection, MOE_SELECT_SOFTMAX,
                              MOE_SELECT_STRAIGHT, env);
  if (status) return status;
  if (block && !MOE__BLOCKS(c))
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "this build has no blocks as experts (MOE_NO_TASK_ROUTER)");
  if (block && !level && c->router != MOE_ROUTER_DENSE)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "configuration: router is %s, expected level or dense where the experts are blocks",
        moe_router_name(c->router));
  if (level && !block)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "configuration: unit is ffn, expected block with the task-level router");
  if (level && c->experts < 2)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "configuration: experts is %d, expected at least 2 with the task-level router",
                     (int)c->experts);
  if (block && (c->top_k != 1 || c->gate_scale_n || c->renormalize))
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "configuration: top_k is %d, gate_scale_n %d, renormalize %d, expected 1, 0, 0 where the "
        "experts are blocks",
        (int)c->top_k, (int)c->gate_scale_n, (int)c->renormalize);
  if (block && (int64_t)c->layers * c->experts > 4096)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "configuration: %d layers of %d blocks, expected at most 4096 blocks in all",
                     (int)c->layers, (int)c->experts);
  if (block && !(c->temperature > 0 && c->temperature <= 1e6f))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "configuration: temperature is %g, expected above 0 and at most 1e6",
                     (double)c->temperature);
  if (!level) return MOE_OK;
  return moe__check_range("task_dim", c->task_dim, 1, 65536, env);
}

/* Each layer keeps at least k experts. */
static moe_status moe__check_pruned(const moe_config *c, const moe_env *env) {
  int32_t l, i;
  if (!c->pruned) return MOE_OK;
  if (!moe__has_gates(c))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "configuration: experts are pruned, expected none in a model without gates");
  for (l = 0; l < c->layers; ++l) {
    int32_t left = 0;
    for (i = 0; i < c->experts; ++i) left += !c->pruned[(size_t)l * (size_t)c->experts + (size_t)i];
    if (left < c->top_k)
      return moe__fail(
          env, MOE_E_ARGUMENT,
          "configuration: layer %d keeps %d of %d experts, expected at least top_k (%d)", (int)l,
          (int)left, (int)c->experts, (int)c->top_k);
  }
  return MOE_OK;
}

MOE_API moe_status moe_config_check(const moe_config *config, const moe_env *env) {
  const moe_config *c = config;
  moe_status status = moe__check_sizes(c, env);
  if (!status)
    status =
        moe__check_range("router", (int32_t)c->router, MOE_ROUTER_DENSE, MOE_ROUTER_EMBEDDING, env);
  if (!status) status = moe__check_range("experts", c->experts, 1, MOE_MAX_EXPERTS, env);
  if (!status) status = moe__check_task_router(c, env);
  if (!status && c->router == MOE_ROUTER_DENSE && c->unit == MOE_UNIT_FFN)
    status = moe__check_range("experts of a dense model", c->experts, 1, 1, env);
  if (!status) status = moe__check_range("top_k", c->top_k, 1, c->experts, env);
  if (!status) status = moe__check_range("gate_scale_n", c->gate_scale_n, 0, 1, env);
  if (!status) status = moe__check_range("renormalize", c->renormalize, 0, 1, env);
  if (!status && c->router == MOE_ROUTER_EMBEDDING)
    status = moe__check_range("rank", c->rank, 1, 4096, env);
  if (!status)
    status = moe__check_range("truncate", (int32_t)c->truncate, MOE_TRUNCATE_LONGEST,
                              MOE_TRUNCATE_RIGHT, env);
  if (!status) status = moe__check_range("cased", c->cased, 0, MOE__TEXT_FLAGS, env);
  if (!status && c->gate_scale_n && c->renormalize)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "configuration: gate_scale_n and renormalize are both 1, expected at most one of them");
  return status ? status : moe__check_pruned(c, env);
}

/* Length of a string that must end within `capacity` bytes, or `capacity`. */
static size_t moe__bounded(const char *s, size_t capacity) {
  size_t n = 0;
  while (n < capacity && s[n]) ++n;
  return n;
}

static int moe__name_char(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
         c == '_' || c == '+';
}

/* Names are parts of tensor names and command lines: no dots, no blanks. */
static moe_status moe__check_task_name(const moe_task *tasks, int32_t t, const moe_env *env) {
  size_t length = moe__bounded(tasks[t].name, MOE_NAME_BYTES), i;
  int32_t other;
  if (length == 0) return moe__fail(env, MOE_E_ARGUMENT, "task %d: its name is empty", (int)t);
  if (length == MOE_NAME_BYTES)
    return moe__fail(env, MOE_E_ARGUMENT, "task %d: its name is longer than %d bytes", (int)t,
                     MOE_NAME_BYTES - 1);
  for (i = 0; i < length; ++i)
    if (!moe__name_char(tasks[t].name[i]))
      return moe__fail(
          env, MOE_E_ARGUMENT,
          "task '%s': its name has other characters than letters, digits, '-', '_' and '+'",
          tasks[t].name);
  for (other = 0; other < t; ++other)
    if (!strcmp(tasks[other].name, tasks[t].name))
      return moe__fail(env, MOE_E_ARGUMENT, "task '%s' is listed twice, as number %d and %d",
                       tasks[t].name, (int)other, (int)t);
  return MOE_OK;
}

/* The first of these metrics compare classes, which a regression does not have. */
#define MOE__METRICS_OF_CLASSES 4
static const char *const moe__metric_names[] = {"accuracy", "f1",      "macro_f1",
                                                "matthews", "pearson", "spearman"};

/* A list of known names, separated by commas; empty: none. */
static moe_status moe__check_task_metrics(const moe_task *task, const moe_env *env) {
  size_t length = moe__bounded(task->metrics, MOE_NAME_BYTES), begin = 0, end, i;
  if (length == MOE_NAME_BYTES)
    return moe__fail(env, MOE_E_ARGUMENT, "task '%s': the list of metrics is longer than %d bytes",
                     task->name, MOE_NAME_BYTES - 1);
  for (; begin < length; begin = end + 1) {
    int known = 0;
    for (end = begin; end < length && task->metrics[end] != ',';) ++end;
    for (i = 0; i < sizeof moe__metric_names / sizeof *moe__metric_names; ++i)
      if (strlen(moe__metric_names[i]) == end - begin &&
          !memcmp(moe__metric_names[i], task->metrics + begin, end - begin))
        known = i < MOE__METRICS_OF_CLASSES ? 1 : 2;
    if (known == 1 && !moe__has_classes(task))
      return moe__fail(env, MOE_E_ARGUMENT,
                       "task '%s': metrics '%s', expected pearson or spearman for kind %s",
                       task->name, task->metrics, moe__kind_of(task)->name);
    if (!known)
      return moe__fail(
          env, MOE_E_ARGUMENT,
          "task '%s': metrics '%s', expected accuracy f1 macro_f1 matthews pearson spearman",
          task->name, task->metrics);
  }
  return MOE_OK;
}

static moe_status moe__check_task_labels(const moe_task *task, const moe_env *env) {
  int32_t i, j;
  if (!task->label || !moe__has_classes(task)) return MOE_OK;
  for (i = 0; i < task->classes; ++i) {
    size_t length = task->label[i] ? moe__bounded(task->label[i], MOE_NAME_BYTES) : 0;
    if (length == 0 || length == MOE_NAME_BYTES)
      return moe__fail(env, MOE_E_ARGUMENT, "task '%s': label %d has %d bytes, expected 1 to %d",
                       task->name, (int)i, (int)length, MOE_NAME_BYTES - 1);
    for (j = 0; j < i; ++j)
      if (!strcmp(task->label[i], task->label[j]))
        return moe__fail(env, MOE_E_ARGUMENT, "task '%s': label '%s' is listed twice", task->name,
                         task->label[i]);
  }
  return MOE_OK;
}

static moe_status moe__check_task_classes(const moe_task *task, const moe_env *env) {
  const moe__kind *kind = moe__kind_of(task);
  if (task->classes < kind->least || task->classes > kind->most) {
    if (kind->least == kind->most)
      return moe__fail(env, MOE_E_ARGUMENT, "task '%s': classes is %d, expected %d for kind %s",
                       task->name, (int)task->classes, (int)kind->most, kind->name);
    return moe__fail(env, MOE_E_ARGUMENT, "task '%s': classes is %d, expected %d to %d for kind %s",
                     task->name, (int)task->classes, (int)kind->least, (int)kind->most, kind->name);
  }
  if (moe__has_classes(task)) return moe__check_task_labels(task, env);
  if (!(task->low < task->high) || !(task->high - task->low <= 3e38f))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "task '%s': low is %g and high %g, expected low below high", task->name,
                     (double)task->low, (double)task->high);
  return MOE_OK;
}

static moe_status moe__check_task(const moe_config *config, const moe_task *tasks, int32_t t,
                                  const moe_env *env) {
  const moe_task *task = &tasks[t];
  moe_status status = moe__check_task_name(tasks, t, env);
  if (status) return status;
  if (!moe_kind_name(task->kind))
    return moe__fail(env, MOE_E_ARGUMENT, "task '%s': unknown kind %d", task->name,
                     (int)task->kind);
  if (task->pair != 0 && task->pair != 1)
    return moe__fail(env, MOE_E_ARGUMENT, "task '%s': pair is %d, expected 0 or 1", task->name,
                     (int)task->pair);
  if (task->max_len < 0 || task->max_len > config->positions)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "task '%s': max_len is %d, expected 0 (the model's) to %d (its positions)",
                     task->name, (int)task->max_len, (int)config->positions);
  status = moe__check_task_metrics(task, env);
  return status ? status : moe__check_task_classes(task, env);
}

static moe_status moe__check_tasks(const moe_config *config, const moe_task *tasks, int32_t T,
                                   const moe_env *env) {
  int32_t t;
  moe_status status = MOE_OK;
  if (T < 0 || T > MOE_MAX_TASKS)
    return moe__fail(env, MOE_E_ARGUMENT, "%d tasks, expected 0 to %d", (int)T, MOE_MAX_TASKS);
  if (!T && (config->unit != MOE_UNIT_FFN || config->router > MOE_ROUTER_SHARED))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "0 tasks: expected router dense or shared and unit ffn, since tasks route");
  for (t = 0; t < T && !status; ++t) status = moe__check_task(config, tasks, t, env);
  return status;
}

/* ---- the table of tensors, places of the weights ---- >>tensors
   All code that depends on which tensors a model has walks this table: names, shapes, offsets,
   initial values, packing, quantising, import and files. The flat array of weights and a file have
   the order of the table: EMBED, then for each layer LAYER, its GATEs, its EXPERTs and TAIL, then
   TASKS, the ROUTERs and the HEADs, without gaps. The weights of query, key and value are adjacent,
   so that (3H, H) is one product; the gates of all tasks are one array (T, N, H). If the experts
   are whole blocks, a layer in this table is one block: block i of layer l has number l m + i and
   one EXPERT.

   scope   one for each           names in files begin with
   EMBED   model                  embeddings.
   LAYER   layer                  encoder.layer.0. or encoder.layer.0.blocks.0.
   GATE    task of a layer        encoder.layer.0.gate.TASK.
   EXPERT  expert of a layer      as LAYER, behind gates encoder.layer.0.experts.0.
   TAIL    layer                  as LAYER
   TASKS   model                  tasks.
   ROUTER  layer                  router.0.
   HEAD    task                   heads.TASK.

   if      the models that have it
   shape   beside the letters of SHAPES: G segments, I feature_dim, R rank, Z width of a task's
           vector, W inner width of a router, K width of a head's input
   first   initial values: moe__initial_spread
   int8    1: int8 in a quantised model, with a scale for each row
   pack    number of matrices, from this one on, that are packed as one matrix
   bert    1: published encoders have it, under this name */

#define MOE__TASK_ROUTER_HIDDEN 64 /* inner width of the task-level router: the authors' */

/* clang-format off */
#define MOE__TENSORS(X)                                                                            \
  /* id          scope   if         shape    first   int8 pack bert  name */                       \
  X(FEATURE_W,    EMBED,  FEATURES,  H, I, 0, MATRIX, 0, 0, 0, "features.weight")                  \
  X(FEATURE_B,    EMBED,  FEATURES,  H, 0, 0, ZERO,   0, 0, 0, "features.bias")                    \
  X(WORD,         EMBED,  IDS,       V, H, 0, MATRIX, 1, 0, 1, "word_embeddings.weight")           \
  X(POSITION,     EMBED,  ANY,       P, H, 0, MATRIX, 0, 0, 1, "position_embeddings.weight")       \
  X(SEGMENT,      EMBED,  ANY,       G, H, 0, MATRIX, 0, 0, 1, "token_type_embeddings.weight")     \
  X(NORM0_W,      EMBED,  ANY,       H, 0, 0, ONE,    0, 0, 1, "LayerNorm.weight")                 \
  X(NORM0_B,      EMBED,  ANY,       H, 0, 0, ZERO,   0, 0, 1, "LayerNorm.bias")                   \
  X(QUERY_W,      LAYER,  ANY,       H, H, 0, MATRIX, 1, 3, 1, "attention.self.query.weight")      \
  X(KEY_W,        LAYER,  ANY,       H, H, 0, MATRIX, 1, 0, 1, "attention.self.key.weight")        \
  X(VALUE_W,      LAYER,  ANY,       H, H, 0, MATRIX, 1, 0, 1, "attention.self.value.weight")      \
  X(QUERY_B,      LAYER,  ANY,       H, 0, 0, ZERO,   0, 0, 1, "attention.self.query.bias")        \
  X(KEY_B,        LAYER,  ANY,       H, 0, 0, ZERO,   0, 0, 1, "attention.self.key.bias")          \
  X(VALUE_B,      LAYER,  ANY,       H, 0, 0, ZERO,   0, 0, 1, "attention.self.value.bias")        \
  X(ATTENTION_W,  LAYER,  ANY,       H, H, 0, MATRIX, 1, 1, 1, "attention.output.dense.weight")    \
  X(ATTENTION_B,  LAYER,  ANY,       H, 0, 0, ZERO,   0, 0, 1, "attention.output.dense.bias")      \
  X(NORM1_W,      LAYER,  ANY,       H, 0, 0, ONE,    0, 0, 1, "attention.output.LayerNorm.weight")\
  X(NORM1_B,      LAYER,  ANY,       H, 0, 0, ZERO,   0, 0, 1, "attention.output.LayerNorm.bias")  \
  X(GATE_SHARED,  LAYER,  SHARED,    N, H, 0, GATE,   0, 0, 0, "gate.weight")                      \
  X(GATE_BASIS,   LAYER,  EMBEDDING, R, N, H, BASIS,  0, 0, 0, "gate.basis")                       \
  X(GATE_TASK,    GATE,   TASK,      N, H, 0, GATE,   0, 0, 0, "weight")                           \
  X(IN_W,         EXPERT, ANY,       F, H, 0, MATRIX, 1, 1, 1, "intermediate.dense.weight")        \
  X(IN_B,         EXPERT, ANY,       F, 0, 0, ZERO,   0, 0, 1, "intermediate.dense.bias")          \
  X(OUT_W,        EXPERT, ANY,       H, F, 0, MATRIX, 1, 1, 1, "output.dense.weight")              \
  X(OUT_B,        EXPERT, ANY,       H, 0, 0, ZERO,   0, 0, 1, "output.dense.bias")                \
  X(NORM2_W,      TAIL,   ANY,       H, 0, 0, ONE,    0, 0, 1, "output.LayerNorm.weight")          \
  X(NORM2_B,      TAIL,   ANY,       H, 0, 0, ZERO,   0, 0, 1, "output.LayerNorm.bias")            \
  X(TASK_VECTORS, TASKS,  VECTORS,   T, Z, 0, VECTOR, 0, 0, 0, "vectors")                          \
  X(ROUTER_IN_W,  ROUTER, LEVEL,     W, Z, 0, ROUTER, 0, 0, 0, "0.weight")                         \
  X(ROUTER_IN_B,  ROUTER, LEVEL,     W, 0, 0, ZERO,   0, 0, 0, "0.bias")                           \
  X(ROUTER_OUT_W, ROUTER, LEVEL,     N, W, 0, ROUTER, 0, 0, 0, "1.weight")                         \
  X(ROUTER_OUT_B, ROUTER, LEVEL,     N, 0, 0, ZERO,   0, 0, 0, "1.bias")                           \
  X(HEAD_W,       HEAD,   ANY,       C, K, 0, MATRIX, 0, 0, 0, "weight")                           \
  X(HEAD_B,       HEAD,   ANY,       C, 0, 0, ZERO,   0, 0, 0, "bias")
/* clang-format on */

typedef struct moe__tensor_row {
  const char *name;
  uint8_t scope, condition, shape[3], first, int8, pack, bert;
} moe__tensor_row;

#define MOE__TENSOR_ID(id, scope, condition, a, b, c, first, int8, pack, bert, name) MOE__##id,
#define MOE__TENSOR_ROW(id, scope, condition, a, b, c, first, int8, pack, bert, name)              \
  {name,                                                                                           \
   MOE__IN_##scope,                                                                                \
   MOE__IF_##condition,                                                                            \
   {MOE__DIM_##a, MOE__DIM_##b, MOE__DIM_##c},                                                     \
   MOE__FIRST_##first,                                                                             \
   int8,                                                                                           \
   pack,                                                                                           \
   bert},

enum { MOE__TENSORS(MOE__TENSOR_ID) MOE__ROWS };
enum { MOE__GATES = MOE__GATE_SHARED }; /* where the gates of a layer begin, for every router */
/* clang-format off */
enum { MOE__IN_EMBED, MOE__IN_LAYER, MOE__IN_GATE, MOE__IN_EXPERT, MOE__IN_TAIL, MOE__IN_TASKS,
       MOE__IN_ROUTER, MOE__IN_HEAD, MOE__SCOPES };
enum { MOE__IF_ANY, MOE__IF_FEATURES, MOE__IF_IDS, MOE__IF_SHARED, MOE__IF_TASK, MOE__IF_EMBEDDING,
       MOE__IF_VECTORS, MOE__IF_LEVEL };
enum { MOE__DIM_0, MOE__DIM_H, MOE__DIM_F, MOE__DIM_N, MOE__DIM_T, MOE__DIM_V, MOE__DIM_P,
       MOE__DIM_C, MOE__DIM_G, MOE__DIM_I, MOE__DIM_R, MOE__DIM_Z, MOE__DIM_W, MOE__DIM_K };
enum { MOE__FIRST_ZERO, MOE__FIRST_ONE, MOE__FIRST_MATRIX, MOE__FIRST_GATE, MOE__FIRST_BASIS,
       MOE__FIRST_VECTOR, MOE__FIRST_ROUTER };
/* clang-format on */
static const moe__tensor_row moe__tensor_rows[MOE__ROWS] = {MOE__TENSORS(MOE__TENSOR_ROW)};

/* Numbers in the vector of a task. */
static int32_t moe__vector_width(const moe_config *config) {
  return config->router == MOE_ROUTER_TASK_LEVEL  ? config->task_dim
         : config->router == MOE_ROUTER_EMBEDDING ? config->rank
                                                  : 0;
}

/* Whether a model has the tensors of a row. */
static int moe__row_exists(const moe_config *c, const moe__tensor_row *row) {
  switch (row->condition) {
    case MOE__IF_FEATURES: return c->feature_dim > 0;
    case MOE__IF_IDS: return !c->feature_dim;
    case MOE__IF_SHARED: return c->router == MOE_ROUTER_SHARED;
    case MOE__IF_TASK: return c->router == MOE_ROUTER_TASK;
    case MOE__IF_EMBEDDING: return c->router == MOE_ROUTER_EMBEDDING;
    case MOE__IF_VECTORS: return moe__vector_width(c) > 0;
    case MOE__IF_LEVEL: return c->router == MOE_ROUTER_TASK_LEVEL;
    default: return 1;
  }
}

/* A letter of the table as a number. task: of a head. */
static int32_t moe__row_dim(const moe_config *c, int32_t T, const moe_task *task, int dim) {
  switch (dim) {
    case MOE__DIM_H: return c->hidden;
    case MOE__DIM_F: return c->ffn;
    case MOE__DIM_N: return c->experts;
    case MOE__DIM_T: return T;
    case MOE__DIM_V: return c->vocab;
    case MOE__DIM_P: return c->positions;
    case MOE__DIM_C: return task->classes;
    case MOE__DIM_G: return c->segments;
    case MOE__DIM_I: return c->feature_dim;
    case MOE__DIM_R: return c->rank;
    case MOE__DIM_Z: return moe__vector_width(c);
    case MOE__DIM_W: return MOE__TASK_ROUTER_HIDDEN;
    case MOE__DIM_K: return (int32_t)moe__head_width(c, task);
    default: return 1;
  }
}

/* The arrays in which each tensor has a place, all in the order of the table: the list of tensors,
   that of int8 tensors, the flat array of floats (scales in place of an int8 matrix), the bytes of
   the int8 matrices, the packed copies (floats; bytes of int8 ones). */
/* clang-format off */
typedef enum moe__measure { MOE__TENSORS_ALL, MOE__TENSORS_INT8, MOE__FLOATS_ALL, MOE__BYTES_INT8,
                            MOE__PACKED, MOE__MEASURES } moe__measure;
/* clang-format on */

/* Where the tensors begin in one such array. */
typedef struct moe__map {
  size_t row[MOE__ROWS];    /* within EMBED, LAYER, ...: where the tensor of a row begins */
  size_t unit[MOE__SCOPES]; /* size of one EMBED, LAYER, ... */
  size_t layer;             /* of a layer without its experts: LAYER, T GATEs, TAIL */
  size_t layers, tasks, routers, heads, total; /* where those begin, and the end */
} moe__map;

typedef struct moe__plan {
  int quantized;
  size_t parameters;     /* floats before they were quantised */
  size_t total, total_q; /* floats; bytes of int8 matrices */
  moe__map in[MOE__MEASURES];
} moe__plan;

/* Size of the tensor of a row. */
static size_t moe__row_size(const moe__plan *p, moe__measure measure, const moe__tensor_row *row,
                            const moe_config *c, int32_t T, const moe_task *task, int *bad) {
  int32_t rows, cols;
  int int8 = MOE__INT8(p->quantized) && row->int8;
  if (!moe__row_exists(c, row)) return 0;
  rows = moe__row_dim(c, T, task, row->shape[0]);
  cols = moe__row_dim(c, T, task, row->shape[1]);
  switch (measure) {
    case MOE__TENSORS_ALL: return 1;
    case MOE__TENSORS_INT8: return (size_t)int8;
    case MOE__PACKED:
      if (!row->pack) return 0;
      return MOE__INT8(p->quantized) ? moe_pack_int8_bytes(row->pack * rows, cols)
                                     : moe_pack_floats(row->pack * rows, cols);
    case MOE__BYTES_INT8: return int8 ? moe__mul((size_t)rows, (size_t)cols, bad) : 0;
    default: break;
  }
  if (int8) return (size_t)rows;
  return moe__mul(moe__mul((size_t)rows, (size_t)cols, bad),
                  (size_t)moe__row_dim(c, T, task, row->shape[2]), bad);
}

/* Experts of all layers, without the pruned ones. */
static size_t moe__expert_count(const moe_config *config) {
  size_t cells = (size_t)moe__block_count(config) * (size_t)moe__block_experts(config),
         count = cells, i;
  for (i = 0; config->pruned && i < cells; ++i) count -= config->pruned[i] != 0;
  return count;
}

/* Lays out one of the arrays. */
static void moe__map_fill(moe__plan *p, moe__measure measure, const moe_config *c,
                          const moe_task *tasks, int32_t T, int *bad) {
  moe__map *s = &p->in[measure];
  size_t at, blocks = (size_t)moe__block_count(c);
  int32_t t;
  int row, scope;
  memset(s, 0, sizeof *s);
  for (row = 0; row < MOE__ROWS; ++row) {
    scope = moe__tensor_rows[row].scope;
    s->row[row] = s->unit[scope];
    if (!T && scope == MOE__IN_HEAD) continue;
    at = moe__row_size(p, measure, &moe__tensor_rows[row], c, T, tasks, bad);
    s->unit[scope] = moe__add(s->unit[scope], at, bad);
  }
  s->layer = moe__add(s->unit[MOE__IN_LAYER], s->unit[MOE__IN_TAIL], bad);
  s->layer = moe__add(s->layer, moe__mul((size_t)T, s->unit[MOE__IN_GATE], bad), bad);
  s->layers = s->unit[MOE__IN_EMBED];
  s->tasks = moe__add(s->layers, moe__mul(blocks, s->layer, bad), bad);
  at = moe__mul(moe__expert_count(c), s->unit[MOE__IN_EXPERT], bad);
  s->tasks = moe__add(s->tasks, at, bad);
  s->routers = moe__add(s->tasks, s->unit[MOE__IN_TASKS], bad);
  at = moe__mul((size_t)c->layers, s->unit[MOE__IN_ROUTER], bad);
  s->heads = s->total = moe__add(s->routers, at, bad);
  for (t = 0; t < T; ++t) /* heads are of different sizes: unit and row are those of task 0 */
    for (row = MOE__HEAD_W; row <= MOE__HEAD_B; ++row) {
      at = moe__row_size(p, measure, &moe__tensor_rows[row], c, T, &tasks[t], bad);
      s->total = moe__add(s->total, at, bad);
    }
}

/* Lays out a model. Configuration and tasks have been checked. */
static moe_status moe__plan_make(moe__plan *p, const moe_config *c, const moe_task *tasks,
                                 int32_t T, int quantized, const moe_env *env) {
  int bad = 0, measure;
  if (quantized && !MOE__INT8(1))
    return moe__fail(env, MOE_E_UNSUPPORTED, "this build has no int8 weights (MOE_NO_INT8)");
  if (quantized && moe__max(c->hidden, c->ffn) > MOE_INT8_COLS)
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "int8 matrices have at most %d columns, a matrix of this model has %d",
                     MOE_INT8_COLS, (int)moe__max(c->hidden, c->ffn));
  p->quantized = 0;
  moe__map_fill(p, MOE__FLOATS_ALL, c, tasks, T, &bad);
  p->parameters = p->in[MOE__FLOATS_ALL].total;
  p->quantized = quantized;
  for (measure = 0; measure < MOE__MEASURES; ++measure)
    moe__map_fill(p, (moe__measure)measure, c, tasks, T, &bad);
  p->total = p->in[MOE__FLOATS_ALL].total;
  p->total_q = p->in[MOE__BYTES_INT8].total;
  moe__mul(p->parameters, sizeof(float), &bad);
  moe__mul(p->in[MOE__PACKED].total, sizeof(float), &bad);
  if (bad)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "configuration: the weights exceed the address space of this machine");
  return MOE_OK;
}

/* ---- a model: its block, its tasks ---- >>model */

struct moe_model {
  moe_config config;
  int32_t T, max_classes;
  int32_t tensors, floats; /* tensors, and those of the flat array; int8 ones come after them */
  moe_task *tasks;         /* (T) with copies of the label names */
  size_t *head;            /* (T) offset of each head in the weights */
  int32_t *by_name;        /* (T) tasks in the order of their names */
  moe__plan plan;
  int32_t *before;      /* (L N + 1) unpruned experts of the whole model before expert i of layer l;
                      NULL: none is pruned */
  const float *weights; /* the flat array: in the block, or in the bytes of a file */
  float *writable;      /* the same; NULL if the weights are in the bytes of a file */
  float
      *panels; /* packed weights, or NULL; bytes of a quantised model, words of pairs where bf16 */
  int bf16;    /* they are of moe_pack_bf16, at half the offsets (moe__pair_units) */
  uint32_t *back; /* the same weights for the gradients of inputs, at the same places; NULL: none
                     (moe__model_pack_back) */
  const int8_t
      *bytes; /* the matrices of a quantised model, behind the flat array in file and block */
  const char *vocab;
  size_t vocab_bytes;
  void *file; /* the bytes that the weights stay in, if the model owns them: mapped (`mapped` of */
  size_t mapped; /* them), or on the heap (0) */
  int owns_block, owns_panels, owns_vocab;
  moe_env
      device; /* where moe_model_pack put the weights, if that is a DEVICE (backend not NULL), */
  float *resident; /* its copy of the flat array, */
  int newer;       /* and 1: a trainer has changed it since the last download */
};

/* Unpruned experts of the whole model before expert i of a layer; i = 0 of layer L: all. */
static size_t moe__before(const moe_model *m, int32_t layer, int32_t i) {
  size_t at = (size_t)layer * (size_t)moe__block_experts(&m->config) + (size_t)i;
  return m->before ? (size_t)m->before[at] : at;
}

static int moe__is_pruned(const moe_model *m, int32_t layer, int32_t i) {
  return m->before && m->config.pruned[(size_t)layer * (size_t)m->config.experts + (size_t)i];
}

/* Where a unit of a scope begins in an array: that of a layer, or of its expert or task i. Not for
   heads in the flat array, which differ in size: moe__at. */
static size_t moe__unit_at(const moe_model *m, moe__measure measure, int scope, int32_t layer,
                           int32_t i) {
  const moe__map *s = &m->plan.in[measure];
  size_t at = s->layers + (size_t)layer * s->layer, gates = at + s->unit[MOE__IN_LAYER],
         experts = gates + (size_t)m->T * s->unit[MOE__IN_GATE];
  switch (scope) {
    case MOE__IN_LAYER: return at + moe__before(m, layer, 0) * s->unit[MOE__IN_EXPERT];
    case MOE__IN_GATE:
      return gates + moe__before(m, layer, 0) * s->unit[MOE__IN_EXPERT] +
             (size_t)i * s->unit[MOE__IN_GATE];
    case MOE__IN_EXPERT: return experts + moe__before(m, layer, i) * s->unit[MOE__IN_EXPERT];
    case MOE__IN_TAIL: return experts + moe__before(m, layer + 1, 0) * s->unit[MOE__IN_EXPERT];
    case MOE__IN_TASKS: return s->tasks;
    case MOE__IN_ROUTER: return s->routers + (size_t)layer * s->unit[MOE__IN_ROUTER];
    case MOE__IN_HEAD: return s->heads + (size_t)i * s->unit[MOE__IN_HEAD];
    default: return 0;
  }
}

/* Where a tensor begins in an array. id: its row, MOE__QUERY_W, ...; i: the expert or task. */
static size_t moe__place(const moe_model *m, moe__measure measure, int id, int32_t layer,
                         int32_t i) {
  return moe__unit_at(m, measure, moe__tensor_rows[id].scope, layer, i) +
         m->plan.in[measure].row[id];
}

/* The same in the flat array. */
static size_t moe__at(const moe_model *m, int id, int32_t layer, int32_t i) {
  if (id == MOE__HEAD_W) return m->head[i];
  if (id == MOE__HEAD_B)
    return m->head[i] + (size_t)m->tasks[i].classes * moe__head_width(&m->config, &m->tasks[i]);
  return moe__place(m, MOE__FLOATS_ALL, id, layer, i);
}

/* The arrays in a model's block. */
typedef struct moe__model_block {
  moe_model *model;
  moe_task *tasks;
  size_t *head;
  int32_t *by_name, *before;
  uint8_t *pruned;
  const char **label;
  char *text;
  float *weights;
  int8_t *bytes;
} moe__model_block;

/* Label i of a task as text: the given name, or its number. Returns the length. */
static size_t moe__label_text(char out[MOE_NAME_BYTES], const moe_task *task, int32_t i) {
  moe__format(out, MOE_NAME_BYTES, "%s", task->label ? task->label[i] : "");
  if (!task->label) moe__format(out, MOE_NAME_BYTES, "%d", (int)i);
  return strlen(out);
}

/* Label names of all tasks: how many, and their bytes with the ending zeros. */
static void moe__count_labels(size_t *labels, size_t *bytes, const moe_task *tasks, int32_t T) {
  char text[MOE_NAME_BYTES];
  int32_t t, i;
  *labels = *bytes = 0;
  for (t = 0; t < T; ++t) {
    if (!moe__has_classes(&tasks[t])) continue;
    *labels += (size_t)tasks[t].classes;
    for (i = 0; i < tasks[t].classes; ++i) *bytes += moe__label_text(text, &tasks[t], i) + 1;
  }
}

/* Size of `pruned` of a configuration, or 0 if it is NULL. */
static size_t moe__pruned_cells(const moe_config *config) {
  return config->pruned ? (size_t)config->layers * (size_t)config->experts : 0;
}

/* cells: of moe__pruned_cells. plan: of the weights in the block; NULL when they are elsewhere. */
static void moe__model_carve(moe__layout *layout, moe__model_block *block, size_t T, size_t labels,
                             size_t label_bytes, size_t cells, const moe__plan *plan) {
  block->model = (moe_model *)moe__carve(layout, 1, sizeof(moe_model));
  block->tasks = (moe_task *)moe__carve(layout, T, sizeof(moe_task));
  block->head = (size_t *)moe__carve(layout, T, sizeof(size_t));
  block->by_name = (int32_t *)moe__carve(layout, T, sizeof(int32_t));
  block->before = cells ? (int32_t *)moe__carve(layout, cells + 1, sizeof(int32_t)) : NULL;
  block->pruned = cells ? (uint8_t *)moe__carve(layout, cells, 1) : NULL;
  block->label = (const char **)moe__carve(layout, labels, sizeof(char *));
  block->text = (char *)moe__carve(layout, label_bytes, 1);
  block->weights =
      plan ? (float *)moe__carve(layout, plan->in[MOE__FLOATS_ALL].total, sizeof(float)) : NULL;
  block->bytes = plan && plan->quantized
                     ? (int8_t *)moe__carve(layout, plan->in[MOE__BYTES_INT8].total, 1)
                     : NULL;
}

/* Bytes of a model's block; in_place: the weights are elsewhere. */
static moe_status moe__model_bytes(size_t *bytes, const moe_config *config, const moe_task *tasks,
                                   int32_t T, int quantized, int in_place, const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe__model_block parts;
  moe__plan plan;
  size_t labels, label_bytes;
  moe_status status = moe_config_check(config, env);
  if (!status) status = moe__check_tasks(config, tasks, T, env);
  if (!status) status = moe__plan_make(&plan, config, tasks, T, quantized, env);
  if (status) return status;
  moe__count_labels(&labels, &label_bytes, tasks, T);
  moe__model_carve(&layout, &parts, (size_t)T, labels, label_bytes, moe__pruned_cells(config),
                   in_place ? NULL : &plan);
  if (layout.bad)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "configuration: the weights exceed the address space of this machine");
  *bytes = layout.used;
  return MOE_OK;
}

static void moe__copy_tasks(moe__model_block *parts, const moe_task *tasks, int32_t T) {
  char text[MOE_NAME_BYTES];
  int32_t t, i;
  for (t = 0; t < T; ++t) {
    moe_task *task = &parts->tasks[t];
    *task = tasks[t];
    task->label = NULL;
    if (!moe__has_classes(task)) continue;
    task->label = parts->label;
    for (i = 0; i < task->classes; ++i) {
      size_t bytes = moe__label_text(text, &tasks[t], i) + 1;
      memcpy(parts->text, text, bytes);
      *parts->label++ = parts->text;
      parts->text += bytes;
    }
  }
}

/* Checks a block of the caller's. */
static moe_status moe__check_block(const char *what, const void *block, size_t bytes, size_t need,
                                   const moe_env *env) {
  if (!block || ((uintptr_t)block & 63))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "the block of %s is misaligned: expected an address that is a multiple of 64",
                     what);
  if (bytes < need)
    return moe__fail(env, MOE_E_MEMORY, "the block of %s has %zu bytes, expected %zu", what, bytes,
                     need);
  return MOE_OK;
}

static void moe__copy_pruned(moe_model *model, const moe__model_block *parts,
                             const moe_config *config) {
  size_t cells = moe__pruned_cells(config), i;
  if (!cells) return;
  memcpy(parts->pruned, config->pruned, cells);
  model->config.pruned = parts->pruned;
  model->before = parts->before;
  for (model->before[0] = 0, i = 0; i < cells; ++i)
    model->before[i + 1] = model->before[i] + !parts->pruned[i];
}

static int moe__name_less(const void *items, size_t i, size_t j) {
  const moe_model *m = (const moe_model *)items;
  return strcmp(m->tasks[m->by_name[i]].name, m->tasks[m->by_name[j]].name) < 0;
}

static void moe__name_swap(void *items, size_t i, size_t j) {
  int32_t *by_name = ((moe_model *)items)->by_name, t = by_name[i];
  by_name[i] = by_name[j];
  by_name[j] = t;
}

/* A model in a block of moe__model_bytes: with `weights` elsewhere, or (NULL) in the block and not
   yet set. */
static moe_status moe__model_place(moe_model **out, void *block, size_t bytes,
                                   const moe_config *config, const moe_task *tasks, int32_t T,
                                   int quantized, const float *weights, const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe__model_block parts;
  moe_model *model = (moe_model *)block; /* the first of its arrays; the plan would fill a stack */
  size_t need = 0, at, labels, label_bytes;
  int32_t t;
  moe_status status = moe__model_bytes(&need, config, tasks, T, quantized, weights != NULL, env);
  if (!status) status = moe__check_block("a model", block, bytes, need, env);
  if (status) return status;
  memset(model, 0, sizeof *model);
  status = moe__plan_make(&model->plan, config, tasks, T, quantized, env);
  if (status) return status;
  layout.base = (unsigned char *)block;
  moe__count_labels(&labels, &label_bytes, tasks, T);
  moe__model_carve(&layout, &parts, (size_t)T, labels, label_bytes, moe__pruned_cells(config),
                   weights ? NULL : &model->plan);
  model->config = *config;
  model->T = T;
  model->tasks = parts.tasks;
  model->head = parts.head;
  model->by_name = parts.by_name;
  model->writable = quantized ? NULL : parts.weights;
  model->bytes = parts.bytes;
  model->weights = weights ? weights : parts.weights;
  moe__copy_pruned(model, &parts, config);
  model->floats = (int32_t)model->plan.in[MOE__TENSORS_ALL].total;
  model->tensors = model->floats + (int32_t)model->plan.in[MOE__TENSORS_INT8].total;
  moe__copy_tasks(&parts, tasks, T);
  for (t = 0, at = model->plan.in[MOE__FLOATS_ALL].heads; t < T; ++t) {
    model->head[t] = at;
    at += (size_t)tasks[t].classes * (moe__head_width(config, &tasks[t]) + 1);
    model->max_classes = moe__max(model->max_classes, tasks[t].classes);
    model->by_name[t] = t;
  }
  moe__sort(model, (size_t)T, moe__name_less, moe__name_swap);
  *out = model;
  return MOE_OK;
}

MOE_API moe_status moe_model_size(const moe_config *config, const moe_task *tasks, int32_t T,
                                  size_t *bytes, const moe_env *env) {
  return moe__model_bytes(bytes, config, tasks, T, 0, 0, env);
}

MOE_API moe_status moe_model_view_size(const moe_view *view, size_t *bytes, const moe_env *env) {
  return moe__model_bytes(bytes, &view->config, view->tasks, view->T, view->int8 != NULL, 1, env);
}

MOE_API moe_status moe_model_view(moe_model **out, const moe_view *view, void *block, size_t bytes,
                                  const moe_env *env) {
  moe_model *model;
  moe_status status;
  if (view->version / 100 != MOE_VERSION / 100)
    return moe__fail(env, MOE_E_FORMAT,
                     "the view is of version %d, this is moe.h %d: convert the model again",
                     (int)view->version, MOE_VERSION);
  if (!view->floats || (uintptr_t)view->floats % sizeof(float))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "the view's floats are misaligned: expected a multiple of %d as address",
                     (int)sizeof(float));
  status = moe__model_place(&model, block, bytes, &view->config, view->tasks, view->T,
                            view->int8 != NULL, view->floats, env);
  if (status) return status;
  if (view->count != model->plan.total || (view->int8 && view->int8_count != model->plan.total_q))
    return moe__fail(env, MOE_E_FORMAT,
                     "the view has %zu floats and %zu bytes, its configuration needs %zu and %zu",
                     view->count, view->int8_count, model->plan.total, model->plan.total_q);
  model->bytes = view->int8;
  *out = model;
  return MOE_OK;
}

static moe_status moe__model_fetch(const moe_model *model, const moe_env *env);

MOE_API moe_status moe_view_of(moe_view *out, const moe_model *model, const moe_env *env) {
  moe_status status = moe__model_fetch(model, env);
  if (status) return status;
  out->version = MOE_VERSION;
  out->config = model->config;
  out->tasks = model->tasks;
  out->T = model->T;
  out->floats = model->weights;
  out->count = model->plan.total;
  out->int8 = MOE__INT8(model->plan.quantized) ? model->bytes : NULL;
  out->int8_count = model->plan.total_q;
  return MOE_OK;
}

static void moe__model_drop_panels(moe_model *model) {
  if (model->owns_panels) moe__release(model->panels);
  moe__release(model->back);
  model->back = NULL;
  model->panels = NULL;
  model->owns_panels = 0;
}

static void moe__model_drop_vocab(moe_model *model) {
  if (model->owns_vocab) moe__release((void *)(uintptr_t)model->vocab);
  model->vocab = NULL;
  model->vocab_bytes = 0;
  model->owns_vocab = 0;
}

/* Before the host reads the weights: downloads them where a device has newer ones. */
static moe_status moe__model_fetch(const moe_model *model, const moe_env *env) {
  moe_env on = model->device;
  moe_status status;
  if (!MOE__BACKEND(&on) || !model->newer) return MOE_OK;
  if (env) on.log = env->log, on.log_user = env->log_user;
  status = on.backend->download(on.backend, &on, model->writable, model->resident,
                                model->plan.total * sizeof(float));
  if (!status) ((moe_model *)(uintptr_t)model)->newer = 0;
  return status;
}

static void moe__model_leave_device(moe_model *model) {
  if (MOE__BACKEND(&model->device) && model->resident)
    model->device.backend->release(model->device.backend, model->resident);
  model->resident = NULL;
  model->newer = 0;
  memset(&model->device, 0, sizeof model->device);
}

/* Checks that the table of a device has every slot that a pass needs. */
static moe_status moe__device_slots(const moe_env *env, int training) {
  const moe_backend *b = env->backend;
  if (MOE__HAS(env, heads) && b->supports && b->open && b->close && b->alloc && b->release &&
      b->upload && b->download && b->clear && b->sync && b->linear && b->layernorm && b->dropout &&
      b->embed && b->attention && b->route && b->experts &&
      (!training || (MOE__HAS(env, adam) && b->grad_norm)))
    return MOE_OK;
  return moe__fail(env, MOE_E_UNSUPPORTED,
                   "%s: a slot of the device's moe_backend that the pass needs is NULL", b->name);
}

/* Uploads the weights, into the device's present memory if it has some already. */
static moe_status moe__model_upload(moe_model *model, const moe_env *env) {
  const moe_backend *b = env->backend;
  size_t bytes = model->plan.total * sizeof(float);
  moe_status status = moe__device_slots(env, 0);
  if (status) return status;
  if (model->device.backend != b) {
    void *to = NULL;
    moe__model_leave_device(model);
    status = b->alloc(b, env, &to, bytes);
    if (status) return status;
    model->resident = (float *)to;
  }
  model->device = *env;
  model->device.stream = NULL;
  status = b->upload(b, &model->device, model->resident, model->weights, bytes);
  if (!status) status = b->sync(b, &model->device);
  if (status) return status;
  model->newer = 0;
  if (b->changed) b->changed(b, &model->device, model->resident, model->plan.total);
  model->device.log = NULL; /* it may end before the model does */
  return MOE_OK;
}

/* Frees the bytes of a file: `mapped` of a mapping, or (0) of the heap. */
static void moe__file_drop(void *file, size_t mapped) {
#ifdef _WIN32
  if (mapped) UnmapViewOfFile(file);
#elif defined(MAP_FAILED)
  if (mapped) munmap(file, mapped);
#endif
  if (!mapped) moe__release(file);
}

MOE_API void moe_model_free(moe_model *model) {
  if (!model) return;
  moe__model_leave_device(model);
  moe__model_drop_panels(model);
  moe__model_drop_vocab(model);
  moe__file_drop(model->file, model->mapped);
  if (model->owns_block) moe__release(model);
}

/* Hands out a new model, or frees it after a failure. */
static moe_status moe__model_deliver(moe_model **out, moe_model *model, moe_status status) {
  if (status)
    moe_model_free(model);
  else
    *out = model;
  return status;
}

MOE_API const moe_config *moe_model_config(const moe_model *model) { return &model->config; }
MOE_API int32_t moe_model_tasks(const moe_model *model) { return model->T; }
MOE_API int32_t moe_model_max_classes(const moe_model *model) { return model->max_classes; }
MOE_API size_t moe_model_parameters(const moe_model *model) { return model->plan.parameters; }
MOE_API float *moe_model_weights(moe_model *model) {
  return moe__model_fetch(model, NULL) ? NULL : model->writable;
}
MOE_API int32_t moe_model_tensors(const moe_model *model) { return model->tensors; }
MOE_API moe_type moe_model_type(const moe_model *model) {
  return MOE__INT8(model->plan.quantized) ? MOE_TYPE_I8 : MOE_TYPE_F32;
}

MOE_API const moe_task *moe_model_task(const moe_model *model, int32_t task) {
  return task >= 0 && task < model->T ? &model->tasks[task] : NULL;
}

MOE_API int32_t moe_model_find_task(const moe_model *model, const char *name) {
  int32_t low = 0, high = model->T;
  while (low < high) {
    int32_t middle = low + (high - low) / 2, task = model->by_name[middle],
            order = (int32_t)strcmp(model->tasks[task].name, name);
    if (order == 0) return task;
    if (order < 0)
      low = middle + 1;
    else
      high = middle;
  }
  return -1;
}

MOE_API moe_status moe_model_set_vocab(moe_model *model, const char *vocab, size_t bytes,
                                       const moe_env *env) {
  char *copy = NULL;
  if (bytes) {
    copy = (char *)moe__alloc(bytes);
    if (!copy)
      return moe__fail(env, MOE_E_MEMORY, "no memory for a vocabulary of %zu bytes", bytes);
    memcpy(copy, vocab, bytes);
  }
  moe__model_drop_vocab(model);
  model->vocab = copy;
  model->vocab_bytes = bytes;
  model->owns_vocab = 1;
  return MOE_OK;
}

MOE_API const char *moe_model_vocab(const moe_model *model, size_t *bytes) {
  if (bytes) *bytes = model->vocab_bytes;
  return model->vocab;
}

/* ---- tensors by number and by name ---- >>names */

/* A tensor: its row in the table, and of which layer and which task or expert it is. */
typedef struct moe__spot {
  int id;
  int32_t layer, i;
} moe__spot;

static const moe__tensor_row *moe__row_of(const moe__spot *spot) {
  return &moe__tensor_rows[spot->id];
}

/* The last layer whose tensors begin at `index` or before. */
static int32_t moe__layer_of(const moe_model *m, moe__measure measure, size_t index) {
  int32_t low = 0, high = moe__block_count(&m->config);
  while (high - low > 1) {
    int32_t middle = low + (high - low) / 2;
    if (moe__unit_at(m, measure, MOE__IN_LAYER, middle, 0) <= index)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/* The number of the expert at `place` among the unpruned ones of a layer. */
static int32_t moe__expert_number(const moe_model *m, int32_t layer, size_t place) {
  int32_t i = 0;
  while (moe__is_pruned(m, layer, i) || place-- > 0) ++i;
  return i;
}

/* Tensor `index` of a layer: finds its scope, and the index within that scope. */
static int moe__layer_scope(const moe_model *m, moe__measure measure, moe__spot *spot,
                            size_t *index) {
  const size_t *unit = m->plan.in[measure].unit;
  size_t at = *index - moe__unit_at(m, measure, MOE__IN_LAYER, spot->layer, 0);
  size_t gates = (size_t)m->T * unit[MOE__IN_GATE], experts;
  *index = at;
  if (at < unit[MOE__IN_LAYER]) return MOE__IN_LAYER;
  at -= unit[MOE__IN_LAYER];
  if (at < gates) {
    spot->i = (int32_t)(at / unit[MOE__IN_GATE]);
    *index = at % unit[MOE__IN_GATE];
    return MOE__IN_GATE;
  }
  at -= gates;
  experts = moe__before(m, spot->layer + 1, 0) - moe__before(m, spot->layer, 0);
  if (at < experts * unit[MOE__IN_EXPERT]) {
    spot->i = moe__expert_number(m, spot->layer, at / unit[MOE__IN_EXPERT]);
    *index = at % unit[MOE__IN_EXPERT];
    return MOE__IN_EXPERT;
  }
  *index = at - experts * unit[MOE__IN_EXPERT];
  return MOE__IN_TAIL;
}

/* Tensor `index` of all tensors, or of the int8 tensors. */
static moe__spot moe__spot_at(const moe_model *m, moe__measure measure, size_t index) {
  const moe__map *s = &m->plan.in[measure];
  moe__spot spot = {0, 0, 0};
  int scope, id;
  if (index >= s->heads) {
    scope = MOE__IN_HEAD;
    spot.i = (int32_t)((index - s->heads) / s->unit[scope]);
    index = (index - s->heads) % s->unit[scope];
  } else if (index >= s->routers) {
    scope = MOE__IN_ROUTER;
    spot.layer = (int32_t)((index - s->routers) / s->unit[scope]);
    index = (index - s->routers) % s->unit[scope];
  } else if (index >= s->tasks) {
    scope = MOE__IN_TASKS;
    index -= s->tasks;
  } else if (index >= s->layers) {
    spot.layer = moe__layer_of(m, measure, index);
    scope = moe__layer_scope(m, measure, &spot, &index);
  } else
    scope = MOE__IN_EMBED;
  for (id = 0; id < MOE__ROWS; ++id) /* a row that the model lacks begins where the next one does */
    if (moe__tensor_rows[id].scope == scope && s->row[id] <= index) spot.id = id;
  return spot;
}

/* What the name of a tensor begins with. Dense models have BERT's own names, so that other tools
   open them. */
static void moe__unit_prefix(char out[128], const moe_model *m, const moe__spot *spot) {
  const moe_config *c = &m->config;
  int32_t blocks = moe__layer_blocks(c);
  char layer[48];
  moe__format(layer, sizeof layer, "encoder.layer.%d.", (int)(spot->layer / blocks));
  if (MOE__BLOCKS(c))
    moe__format(layer, sizeof layer, "encoder.layer.%d.blocks.%d.", (int)(spot->layer / blocks),
                (int)(spot->layer % blocks));
  switch (moe__row_of(spot)->scope) {
    case MOE__IN_EMBED: moe__format(out, 128, "embeddings."); break;
    case MOE__IN_GATE: moe__format(out, 128, "%sgate.%s.", layer, m->tasks[spot->i].name); break;
    case MOE__IN_EXPERT:
      moe__format(out, 128, "%s", layer);
      if (moe__has_gates(c)) moe__format(out, 128, "%sexperts.%d.", layer, (int)spot->i);
      break;
    case MOE__IN_TASKS: moe__format(out, 128, "tasks."); break;
    case MOE__IN_ROUTER: moe__format(out, 128, "router.%d.", (int)spot->layer); break;
    case MOE__IN_HEAD: moe__format(out, 128, "heads.%s.", m->tasks[spot->i].name); break;
    default: moe__format(out, 128, "%s", layer); break;
  }
}

/* Describes the part of a tensor in the flat array: all of it, or the scales of an int8 matrix. */
static void moe__spot_tensor(const moe_model *m, const moe__spot *spot, moe_tensor *out) {
  const moe__tensor_row *row = moe__row_of(spot);
  const moe_task *task = row->scope == MOE__IN_HEAD ? &m->tasks[spot->i] : NULL;
  int scales = MOE__INT8(m->plan.quantized) && row->int8, k;
  char unit[128];
  memset(out, 0, sizeof *out);
  moe__unit_prefix(unit, m, spot);
  moe__format(out->name, sizeof out->name, "%s%s%s", unit, row->name, scales ? ".scale" : "");
  out->offset = moe__at(m, spot->id, spot->layer, spot->i);
  out->count = 1;
  for (k = 0; k < (scales ? 1 : 3) && row->shape[k]; ++k) {
    out->shape[k] = moe__row_dim(&m->config, m->T, task, row->shape[k]);
    out->count *= (size_t)out->shape[k];
  }
  out->dims = k;
}

/* Describes an int8 matrix of a quantised model, in the array of bytes. */
static void moe__spot_int8(const moe_model *m, const moe__spot *spot, moe_tensor *out) {
  const moe__tensor_row *row = moe__row_of(spot);
  moe__spot_tensor(m, spot, out);
  out->name[strlen(out->name) - strlen(".scale")] = 0;
  out->dims = 2;
  out->shape[1] = moe__row_dim(&m->config, m->T, NULL, row->shape[1]);
  out->type = MOE_TYPE_I8;
  out->offset = moe__place(m, MOE__BYTES_INT8, spot->id, spot->layer, spot->i);
  out->count = (size_t)out->shape[0] * (size_t)out->shape[1];
}

/* Tensor `index`, from 0 to tensors - 1. */
static moe__spot moe__tensor_get(const moe_model *m, int32_t index, moe_tensor *out) {
  moe__spot spot;
  if (index < m->floats) {
    spot = moe__spot_at(m, MOE__TENSORS_ALL, (size_t)index);
    moe__spot_tensor(m, &spot, out);
  } else {
    spot = moe__spot_at(m, MOE__TENSORS_INT8, (size_t)(index - m->floats));
    moe__spot_int8(m, &spot, out);
  }
  return spot;
}

MOE_API moe_status moe_model_tensor(const moe_model *model, int32_t index, moe_tensor *out) {
  if (index < 0 || index >= model->tensors) return MOE_E_ARGUMENT;
  moe__tensor_get(model, index, out);
  return MOE_OK;
}

/* If *name begins with `word`, moves it past that. */
static int moe__skip(const char **name, const char *word) {
  size_t length = strlen(word);
  if (strncmp(*name, word, length)) return 0;
  *name += length;
  return 1;
}

/* Moves *name past a number below `end` and a point. Returns the number, or -1. */
static int32_t moe__skip_number(const char **name, int32_t end) {
  const char *p = *name;
  int32_t v = 0;
  if (*p == '0' && p[1] != '.') return -1;
  if (*p == '.') return -1;
  for (; *p >= '0' && *p <= '9' && v < end; ++p) v = v * 10 + (*p - '0');
  if (*p != '.' || v >= end) return -1;
  *name = p + 1;
  return v;
}

/* Moves *name past the name of a task and a point. Returns the task, or -1. */
static int32_t moe__skip_task(const char **name, const moe_model *m) {
  char task[MOE_NAME_BYTES];
  size_t length = strcspn(*name, ".");
  if (length >= sizeof task || (*name)[length] != '.') return -1;
  memcpy(task, *name, length);
  task[length] = 0;
  *name += length + 1;
  return moe_model_find_task(m, task);
}

/* Parses the unit that a name begins with. Returns its scope, sets *spot and moves *name past it;
   -1: unknown unit. */
static int moe__parse_unit(const moe_model *m, moe__spot *spot, const char **name) {
  const moe_config *c = &m->config;
  int32_t blocks = moe__layer_blocks(c), block = 0;
  spot->layer = spot->i = 0;
  if (moe__skip(name, "embeddings.")) return MOE__IN_EMBED;
  if (moe__skip(name, "tasks.")) return MOE__IN_TASKS;
  if (moe__skip(name, "heads.")) return (spot->i = moe__skip_task(name, m)) < 0 ? -1 : MOE__IN_HEAD;
  if (moe__skip(name, "router."))
    return (spot->layer = moe__skip_number(name, c->layers)) < 0 ? -1 : MOE__IN_ROUTER;
  if (!moe__skip(name, "encoder.layer.")) return -1;
  spot->layer = moe__skip_number(name, c->layers);
  if (MOE__BLOCKS(c)) block = moe__skip(name, "blocks.") ? moe__skip_number(name, blocks) : -1;
  if (spot->layer < 0 || block < 0) return -1;
  spot->layer = spot->layer * blocks + block;
  if (c->router == MOE_ROUTER_TASK && moe__skip(name, "gate."))
    return (spot->i = moe__skip_task(name, m)) < 0 ? -1 : MOE__IN_GATE;
  if (!moe__has_gates(c) || !moe__skip(name, "experts.")) return MOE__IN_LAYER;
  spot->i = moe__skip_number(name, c->experts);
  return spot->i < 0 || moe__is_pruned(m, spot->layer, spot->i) ? -1 : MOE__IN_EXPERT;
}

MOE_API int32_t moe_model_find_tensor(const moe_model *model, const char *name) {
  const moe_model *m = model;
  moe__spot spot;
  int scope = moe__parse_unit(m, &spot, &name), dense = !moe__has_gates(&m->config);
  for (spot.id = 0; spot.id < MOE__ROWS && scope >= 0; ++spot.id) {
    const moe__tensor_row *row = &moe__tensor_rows[spot.id];
    int of = row->scope, int8 = MOE__INT8(m->plan.quantized) && row->int8;
    const char *rest = name;
    if (scope == MOE__IN_LAYER && (of == MOE__IN_TAIL || (of == MOE__IN_EXPERT && dense)))
      of = MOE__IN_LAYER; /* their names begin alike */
    if (of != scope || !moe__row_exists(&m->config, row) || !moe__skip(&rest, row->name)) continue;
    if (int8 && !*rest)
      return m->floats + (int32_t)moe__place(m, MOE__TENSORS_INT8, spot.id, spot.layer, spot.i);
    if (!strcmp(rest, int8 ? ".scale" : ""))
      return (int32_t)moe__place(m, MOE__TENSORS_ALL, spot.id, spot.layer, spot.i);
  }
  return -1;
}

/* ---- initial values ---- >>initial */

/* The first values of a tensor depend on its name only, not on the rest of the model; expert 0 of a
   layer begins as a dense model's FFN, block 0 as its block. */
static uint64_t moe__name_hash(const char *name) {
  static const char skip[] = "experts.0.", skip_block[] = "blocks.0.";
  uint64_t h = 0xcbf29ce484222325u;
  while (*name) {
    if (!strncmp(name, skip, sizeof skip - 1))
      name += sizeof skip - 1;
    else if (!strncmp(name, skip_block, sizeof skip_block - 1))
      name += sizeof skip_block - 1;
    h = (h ^ (unsigned char)*name++) * 0x100000001b3u;
  }
  return h;
}

typedef struct moe__fill {
  float *w;
  size_t count;
  float sd;
  uint64_t key;
} moe__fill;

#define MOE__FILL_TILE 16384

static void moe__fill_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__fill *fill = (const moe__fill *)arg;
  size_t i = (size_t)tile * MOE__FILL_TILE,
         end = i + MOE__FILL_TILE < fill->count ? i + MOE__FILL_TILE : fill->count;
  (void)slot;
  for (; i < end; ++i) fill->w[i] = fill->sd * moe__normal(fill->key, i);
}

/* Standard deviation of the initial values of a matrix [TaG] 4.4. With 0.02 the task-level router
   would hardly distinguish tasks: its matrices have the spread of PyTorch's, 1 / sqrt(3 columns),
   and its vectors 1. Gates made of a basis and the task's vector are N(0, 0.001), too. */
static float moe__initial_spread(const moe_config *config, int first, int32_t columns) {
  if (first == MOE__FIRST_VECTOR)
    first = config->router == MOE_ROUTER_EMBEDDING ? MOE__FIRST_BASIS : MOE__FIRST_ONE;
  switch (first) {
    case MOE__FIRST_ONE: return 1;
    case MOE__FIRST_GATE: return 0.001f;
    case MOE__FIRST_BASIS: return sqrtf(0.001f / sqrtf((float)config->rank));
    case MOE__FIRST_ROUTER: return 1.0f / sqrtf(3.0f * (float)columns);
    default: return 0.02f;
  }
}

/* Sets the initial values of a tensor. */
static void moe__tensor_random(moe_model *model, const moe__spot *spot, const moe_tensor *t,
                               uint64_t seed, const moe_env *env) {
  int first = moe__row_of(spot)->first;
  moe__fill fill;
  size_t j;
  fill.w = model->writable + t->offset;
  fill.count = t->count;
  fill.sd = moe__initial_spread(&model->config, first, t->shape[1]);
  fill.key = moe_key(seed, 0, moe__name_hash(t->name), 0, MOE__SITE_WEIGHTS);
  if (t->dims > 1)
    moe__parallel(env, (int32_t)((t->count + MOE__FILL_TILE - 1) / MOE__FILL_TILE), moe__fill_tile,
                  &fill);
  else
    for (j = 0; j < t->count; ++j) fill.w[j] = first == MOE__FIRST_ONE;
}

static void moe__model_random(moe_model *model, uint64_t seed, const moe_env *env) {
  int32_t i;
  moe_tensor t;
  for (i = 0; i < model->tensors; ++i) {
    moe__spot spot = moe__tensor_get(model, i, &t);
    moe__tensor_random(model, &spot, &t, seed, env);
  }
}

MOE_API moe_status moe_model_init(moe_model **out, void *block, size_t bytes,
                                  const moe_config *config, const moe_task *tasks, int32_t T,
                                  uint64_t seed, const moe_env *env) {
  moe_model *model;
  moe_status status = moe__model_place(&model, block, bytes, config, tasks, T, 0, NULL, env);
  if (status) return status;
  moe__model_random(model, seed, env);
  *out = model;
  return MOE_OK;
}

/* A model on the heap whose weights are not yet set. */
static moe_status moe__model_create_raw(moe_model **out, const moe_config *config,
                                        const moe_task *tasks, int32_t T, int quantized,
                                        const moe_env *env) {
  size_t bytes = 0;
  void *block;
  moe_status status = moe__model_bytes(&bytes, config, tasks, T, quantized, 0, env);
  if (status) return status;
  block = moe__alloc(bytes);
  if (!block) return moe__fail(env, MOE_E_MEMORY, "no memory for a model of %zu bytes", bytes);
  status = moe__model_place(out, block, bytes, config, tasks, T, quantized, NULL, env);
  if (status)
    moe__release(block);
  else
    (*out)->owns_block = 1;
  return status;
}

MOE_API moe_status moe_model_create(moe_model **out, const moe_config *config,
                                    const moe_task *tasks, int32_t T, uint64_t seed,
                                    const moe_env *env) {
  moe_model *model = NULL;
  moe_status status = moe__model_create_raw(&model, config, tasks, T, 0, env);
  if (status) return status;
  moe__model_random(model, seed, env);
  *out = model;
  return MOE_OK;
}

/* ---- packed weights, int8 weights ---- >>packing */

/* Packed weights of bf16 are at half the places of packed floats: returns 2; or at the same places,
   1, where odd sizes have no half. */
static size_t moe__pair_units(const moe_model *model) {
  return model->config.hidden % 2 || model->config.ffn % 2 ? 1 : 2;
}

static void *moe__panel_at(const moe_model *model, size_t at) {
  return model->panels + (model->bf16 ? at / moe__pair_units(model) : at);
}

/* Packs a matrix of floats to `at` of the packed weights. */
static void moe__model_pack_one(moe_model *model, size_t at, const float *w, int32_t rows,
                                int32_t cols, const moe_env *env) {
#ifndef MOE_NO_BF16
  if (model->back) moe__pack_bf16_back(model->back + at / 2, w, rows, cols, env);
  if (model->bf16) {
    moe_pack_bf16(moe__panel_at(model, at), w, rows, cols, env);
    return;
  }
#endif
  moe_pack(model->panels + at, w, rows, cols, env);
}

/* Shape of what is packed from a row of the table on. */
static void moe__packed_shape(const moe_model *m, int id, int32_t *rows, int32_t *cols) {
  const moe__tensor_row *row = &moe__tensor_rows[id];
  *rows = row->pack * moe__row_dim(&m->config, m->T, NULL, row->shape[0]);
  *cols = moe__row_dim(&m->config, m->T, NULL, row->shape[1]);
}

/* Packs the matrices of a layer (MOE__IN_LAYER) or of an expert. */
static void moe__unit_pack(moe_model *model, int scope, int32_t layer, int32_t i,
                           const moe_env *env) {
  int id;
  for (id = 0; id < MOE__ROWS; ++id) {
    const moe__tensor_row *row = &moe__tensor_rows[id];
    size_t to = moe__place(model, MOE__PACKED, id, layer, i);
    int32_t rows, cols;
    if (row->scope != scope || !row->pack) continue;
    moe__packed_shape(model, id, &rows, &cols);
#ifndef MOE_NO_INT8
    if (model->plan.quantized)
      moe_pack_int8((signed char *)model->panels + to,
                    model->bytes + moe__place(model, MOE__BYTES_INT8, id, layer, i), rows, cols,
                    env);
    else
#endif
      moe__model_pack_one(model, to, model->weights + moe__at(model, id, layer, i), rows, cols,
                          env);
  }
}

/* Packs every matrix of the layers again; embeddings, gates and heads are used as they are. */
static void moe__model_repack(moe_model *model, const moe_env *env) {
  int32_t l, i;
  for (l = 0; l < moe__block_count(&model->config); ++l) {
    moe__unit_pack(model, MOE__IN_LAYER, l, 0, env);
    for (i = 0; i < moe__block_experts(&model->config); ++i)
      if (!moe__is_pruned(model, l, i)) moe__unit_pack(model, MOE__IN_EXPERT, l, i, env);
  }
}

MOE_API size_t moe_model_pack_size(const moe_model *model) {
  return model->plan.in[MOE__PACKED].total * (MOE__INT8(model->plan.quantized) ? 1 : sizeof(float));
}

MOE_API size_t moe_model_pack_size_bf16(const moe_model *model) {
  return MOE__INT8(model->plan.quantized) ? moe_model_pack_size(model)
                                          : moe_model_pack_size(model) / moe__pair_units(model);
}

MOE_API moe_status moe_model_pack(moe_model *model, void *block, const moe_env *env) {
  int bf16 = moe__wants_bf16(env) && !MOE__INT8(model->plan.quantized);
  size_t bytes = bf16 ? moe_model_pack_size_bf16(model) : moe_model_pack_size(model);
  float *panels = (float *)block;
  if (moe__on_device(env) && !MOE__INT8(model->plan.quantized))
    return moe__model_upload(model, env);
  if (block) {
    moe_status status = moe__check_block("packed weights", block, bytes, bytes, env);
    if (status) return status;
  } else if (!model->owns_panels || model->bf16 != bf16) {
    panels = (float *)moe__alloc(bytes);
    if (!panels)
      return moe__fail(env, MOE_E_MEMORY, "no memory for packed weights of %zu bytes", bytes);
  }
  if (panels) { /* else the model's own ones stay */
    moe__model_drop_panels(model);
    model->panels = panels;
    model->owns_panels = !block;
    model->bf16 = bf16;
  }
  moe__model_repack(model, env);
  return MOE_OK;
}

/* For training in bf16: the weights packed once more, transposed; both copies together have the
   bytes of one in fp32. With sizes that are not multiples of 16 there is no such copy, and
   gradients pack on the way. */
MOE__UNUSED static moe_status moe__model_pack_back(moe_model *model, const moe_env *env) {
  size_t bytes = moe_model_pack_size_bf16(model);
  if (!model->bf16 || model->back || model->config.hidden % 16 || model->config.ffn % 16)
    return MOE_OK;
  model->back = (uint32_t *)moe__alloc(bytes);
  if (!model->back)
    return moe__fail(env, MOE_E_MEMORY, "no memory for packed weights of %zu bytes", bytes);
  moe__model_repack(model, env);
  return MOE_OK;
}

/* A packed matrix (outputs, inputs) as w_back of moe_linear_op. id: MOE__QUERY_W (of query, key and
   value together), MOE__ATTENTION_W, MOE__IN_W or MOE__OUT_W; layer; i: the expert. */
MOE__UNUSED static moe_mat moe__mat_back(const moe_model *m, int id, int32_t layer, int32_t i,
                                         const moe_env *env) {
  int32_t rows, cols;
  int there = m->back && moe__wants_bf16(env) && !moe__on_device(env);
  moe__packed_shape(m, id, &rows, &cols);
  return moe__mat_bf16(there ? m->back + moe__place(m, MOE__PACKED, id, layer, i) / 2 : NULL, cols,
                       rows);
}

/* The same for forward of about M rows: the packed copy if there is one of this precision, and
   unless another library takes the product and reads the weights unpacked. */
static moe_mat moe__mat(const moe_model *m, int id, int32_t layer, int32_t i, int32_t M,
                        const moe_env *env) {
  const float *w = m->weights + moe__at(m, id, layer, i); /* int8: the scales */
  size_t panel = moe__place(m, MOE__PACKED, id, layer, i);
  int bf16 = moe__wants_bf16(env);
  int32_t rows, cols;
  moe__packed_shape(m, id, &rows, &cols);
  if (moe__on_device(env)) return moe_mat_rows(m->resident + moe__at(m, id, layer, i), rows, cols);
  if (MOE__INT8(m->plan.quantized) && m->panels)
    return moe_mat_panels_int8((const signed char *)m->panels + panel, w, rows, cols);
  if (MOE__INT8(m->plan.quantized))
    return moe_mat_rows_int8(m->bytes + moe__place(m, MOE__BYTES_INT8, id, layer, i), w, rows,
                             cols);
  if (m->panels && m->bf16 && bf16) return moe__mat_bf16(moe__panel_at(m, panel), rows, cols);
  if (!bf16 && MOE__BACKEND(env) && moe__backend_wants(env, M, rows, cols, 1))
    return moe_mat_rows(w, rows, cols);
  return m->panels && !m->bf16 ? moe_mat_panels(m->panels + panel, rows, cols)
                               : moe_mat_rows(w, rows, cols);
}

/* Gives a new model, unless it has failed, vocabulary and packed weights, and hands it out. */
static moe_status moe__model_finish(moe_model **out, moe_model *to, const moe_model *from,
                                    moe_status status, const moe_env *env) {
  if (!status && from->vocab) status = moe_model_set_vocab(to, from->vocab, from->vocab_bytes, env);
  if (!status) status = moe_model_pack(to, NULL, env);
  return moe__model_deliver(out, to, status);
}

#ifndef MOE_NO_INT8
/* Copies the tensors of a model into its quantised twin. */
static moe_status moe__quantize_tensors(moe_model *to, float *weights, int8_t *bytes,
                                        const moe_model *from, const moe_env *env) {
  moe_tensor t, scale;
  int32_t i;
  size_t k;
  for (i = 0; i < to->floats; ++i) { /* the flat arrays hold the same tensors in the same order */
    const float *w;
    moe_model_tensor(from, i, &t);
    w = from->weights + t.offset;
    for (k = 0; k < t.count; ++k)
      if (!(w[k] - w[k] == 0))
        return moe__fail(env, MOE_E_NONFINITE, "tensor %s: element %zu is not a finite number",
                         t.name, k);
    moe_model_tensor(to, i, &scale);
    if (scale.count == t.count && scale.dims == t.dims)
      memcpy(weights + scale.offset, w, t.count * sizeof(float));
  }
  for (i = 0; i < to->tensors - to->floats; ++i) {
    moe__spot spot = moe__tensor_get(to, to->floats + i, &t);
    moe_tensor source;
    moe__spot_tensor(from, &spot, &source);
    moe__spot_tensor(to, &spot, &scale);
    moe_quantize(bytes + t.offset, weights + scale.offset, from->weights + source.offset,
                 t.shape[0], t.shape[1], env);
  }
  return MOE_OK;
}

MOE_API moe_status moe_model_quantize(moe_model **out, const moe_model *model, const moe_env *env) {
  moe_model *to = NULL;
  moe_status status;
  if (model->plan.quantized) return moe__fail(env, MOE_E_UNSUPPORTED, "the model is already int8");
  status = moe__model_fetch(model, env);
  if (status) return status;
  status = moe__model_create_raw(&to, &model->config, model->tasks, model->T, 1, env);
  /* into its own block: `weights` and `bytes` are const only for later readers */
  if (!status)
    status = moe__quantize_tensors(to, (float *)(uintptr_t)to->weights,
                                   (int8_t *)(uintptr_t)to->bytes, model, env);
  return moe__model_finish(out, to, model, status, env);
}
#endif

/* ---- add a task, extract tasks ---- >>adapt
   Both make a new model and copy into it tensor by tensor: what two models share has the same name
   in both. */

/* The row `to` (width) of the new task: a copy of row gate_from, the mean of all T rows
   (MOE_GATE_MEAN), or left as it is, random (MOE_GATE_RANDOM). Rows are `stride` apart. */
static void moe__adapt_row(float *to, const float *rows, size_t stride, size_t width, int32_t T,
                           int32_t gate_from) {
  size_t i;
  int32_t t;
  if (gate_from >= 0) memcpy(to, rows + (size_t)gate_from * stride, width * sizeof *to);
  for (i = 0; gate_from == MOE_GATE_MEAN && i < width; ++i) {
    double sum = 0;
    for (t = 0; t < T; ++t) sum += (double)rows[(size_t)t * stride + i];
    to[i] = (float)(sum / T);
  }
}

/* The new model has every tensor of the old one; the new task's own begin with random values. The
   new row of the table of task vectors is the last one. */
static void moe__adapt_fill(moe_model *to, const moe_model *from, int32_t gate_from, uint64_t seed,
                            const moe_env *env) {
  int32_t i, at, l;
  moe_tensor t, old;
  for (i = 0; i < to->tensors; ++i) {
    moe__spot spot = moe__tensor_get(to, i, &t);
    at = moe_model_find_tensor(from, t.name);
    if (at < 0 || moe_model_tensor(from, at, &old)) {
      moe__tensor_random(to, &spot, &t, seed, env);
      continue;
    }
    if (old.count < t.count) moe__tensor_random(to, &spot, &t, seed, env);
    memcpy(to->writable + t.offset, from->weights + old.offset, old.count * sizeof(float));
    if (old.count < t.count) /* the table of task vectors */
      moe__adapt_row(to->writable + t.offset + old.count, from->weights + old.offset,
                     t.count - old.count, t.count - old.count, from->T, gate_from);
  }
  if (from->config.router != MOE_ROUTER_TASK) return;
  for (l = 0; l < from->config.layers; ++l) {
    size_t gate = (size_t)from->config.experts * (size_t)from->config.hidden;
    moe__adapt_row(to->writable + moe__at(to, MOE__GATE_TASK, l, from->T),
                   from->weights + moe__at(from, MOE__GATE_TASK, l, 0), gate, gate, from->T,
                   gate_from);
  }
}

/* Whether each task has routing of its own. */
static int moe__own_gates(const moe_config *config) {
  return config->router != MOE_ROUTER_DENSE && config->router != MOE_ROUTER_SHARED;
}

MOE_API moe_status moe_model_adapt(moe_model **out, const moe_model *model, const moe_task *task,
                                   int32_t gate_from, uint64_t seed, const moe_env *env) {
  moe_task *tasks;
  moe_model *to = NULL;
  moe_status status;
  if (MOE__INT8(model->plan.quantized))
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "task '%s' cannot be added to an int8 model: add it first, then quantise",
                     task->name);
  if (gate_from < MOE_GATE_MEAN || gate_from >= model->T)
    return moe__fail(env, MOE_E_ARGUMENT, "gate_from is %d, expected -2 to %d", (int)gate_from,
                     (int)model->T - 1);
  if (gate_from != MOE_GATE_RANDOM && !moe__own_gates(&model->config))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "task '%s': gate_from is %d, expected MOE_GATE_RANDOM, since the model has %s",
                     task->name, (int)gate_from,
                     model->config.router == MOE_ROUTER_DENSE ? "no gates"
                                                              : "one gate for all tasks");
  status = moe__model_fetch(model, env);
  if (status) return status;
  tasks = (moe_task *)moe__alloc(((size_t)model->T + 1) * sizeof *tasks);
  if (!tasks) return moe__fail(env, MOE_E_MEMORY, "no memory for %d tasks", (int)model->T + 1);
  memcpy(tasks, model->tasks, (size_t)model->T * sizeof *tasks);
  tasks[model->T] = *task;
  status = moe__model_create_raw(&to, &model->config, tasks, model->T + 1, 0, env);
  moe__release(tasks);
  if (status) return status;
  moe__adapt_fill(to, model, gate_from, seed, env);
  return moe__model_finish(out, to, model, MOE_OK, env);
}

/* Copies the old model's tensor of each name; of the table of task vectors only the rows of the
   tasks. */
static void moe__extract_fill(moe_model *to, const moe_model *from, const int32_t *tasks) {
  int32_t i, t;
  moe_tensor tensor, old;
  for (i = 0; i < to->tensors; ++i) {
    size_t width;
    moe__spot spot = moe__tensor_get(to, i, &tensor);
    moe_model_tensor(from, moe_model_find_tensor(from, tensor.name), &old);
    width = (size_t)tensor.shape[1];
    if (spot.id != MOE__TASK_VECTORS)
      memcpy(to->writable + tensor.offset, from->weights + old.offset,
             tensor.count * sizeof(float));
    else
      for (t = 0; t < to->T; ++t)
        memcpy(to->writable + tensor.offset + (size_t)t * width,
               from->weights + old.offset + (size_t)tasks[t] * width, width * sizeof(float));
  }
}

/* The pruned experts of the new model: the old one's, and those to drop. */
static void moe__extract_pruned(moe_config *config, uint8_t *pruned, const uint8_t *drop) {
  size_t cells = (size_t)config->layers * (size_t)config->experts, i;
  int any = 0;
  for (i = 0; i < cells; ++i) any |= pruned[i] = (config->pruned && config->pruned[i]) || drop[i];
  config->pruned = any ? pruned : NULL;
}

MOE_API moe_status moe_model_extract(moe_model **out, const moe_model *model, const int32_t *tasks,
                                     int32_t n, const uint8_t *drop, const moe_env *env) {
  size_t cells = drop ? (size_t)model->config.layers * (size_t)model->config.experts : 0;
  moe_task *list;
  moe_model *to = NULL;
  moe_config config = model->config;
  moe_status status = moe__model_fetch(model, env);
  int32_t i;
  if (status) return status;
  if (drop && !moe__has_gates(&config))
    return moe__fail(env, MOE_E_ARGUMENT, "drop is given, expected NULL for a model without gates");
  if (MOE__INT8(model->plan.quantized))
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "tasks cannot be extracted from an int8 model: extract first, then quantise");
  if (n < 0 || n > model->T)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "extract: %d tasks, expected 0 to %d, the tasks of the model", (int)n,
                     (int)model->T);
  list = (moe_task *)moe__alloc((size_t)n * sizeof *list + cells);
  if (!list) return moe__fail(env, MOE_E_MEMORY, "no memory for %d tasks", (int)n);
  if (drop) moe__extract_pruned(&config, (uint8_t *)(list + n), drop);
  for (i = 0; i < n && !status; ++i) {
    if (tasks[i] < 0 || tasks[i] >= model->T)
      status = moe__fail(env, MOE_E_ARGUMENT, "extract: task %d, the model has %d tasks",
                         (int)tasks[i], (int)model->T);
    else
      list[i] = model->tasks[tasks[i]];
  }
  if (!status)
    status = moe__model_create_raw(&to, &config, list, n, 0,
                                   env); /* which also finds a task listed twice */
  moe__release(list);
  if (status) return status;
  moe__extract_fill(to, model, tasks);
  return moe__model_finish(out, to, model, MOE_OK, env);
}

/* ---- checks of what comes in ---- >>batch */

static int moe__is_finite(float x) { return x - x == 0; } /* false for infinities and NaN */

/* Checks all lengths before any token is read: with a wrong length, tokens may lie outside the
   arrays. */
static moe_status moe__check_batch_arrays(const moe_model *model, const moe_batch *b,
                                          int with_labels, const moe_env *env) {
  int features = model->config.feature_dim > 0;
  int32_t s;
  if (!b->seq_start) return moe__fail(env, MOE_E_ARGUMENT, "batch: seq_start is NULL");
  if (!b->task && model->T)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "batch: task is NULL, expected the task of each sequence");
  if (features && (!b->features || b->ids))
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "batch: this model reads feature vectors of %d numbers: expected features, and ids NULL",
        (int)model->config.feature_dim);
  if (!features && (!b->ids || b->features))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "batch: this model reads token ids: expected ids, and features NULL");
  if (with_labels && !b->label)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "batch: label is NULL, expected the label of each sequence");
  if (b->seq_start[0] != 0)
    return moe__fail(env, MOE_E_ARGUMENT, "batch: seq_start[0] is %d, expected 0",
                     (int)b->seq_start[0]);
  for (s = 0; s < b->S; ++s) {
    int64_t length = (int64_t)b->seq_start[s + 1] - b->seq_start[s];
    if (length < 1 || length > model->config.positions)
      return moe__fail(
          env, MOE_E_ARGUMENT,
          "batch: sequence %d has %lld tokens, expected 1 to %d (the model's positions)", (int)s,
          (long long)length, (int)model->config.positions);
  }
  return MOE_OK;
}

static moe_status moe__check_label(const moe_model *model, const moe_batch *b, int32_t s,
                                   const moe_env *env) {
  const moe_task *task = &model->tasks[b->task[s]];
  float label = b->label[s];
  if (!moe__is_finite(label))
    return moe__fail(env, MOE_E_ARGUMENT, "batch: the label of sequence %d is not a finite number",
                     (int)s);
  if (b->weight && !(moe__is_finite(b->weight[s]) && b->weight[s] >= 0))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "batch: the weight of sequence %d is %g, expected a finite number, 0 or more",
                     (int)s, (double)b->weight[s]);
  if (!moe__has_classes(task)) {
    if (task->low < task->high && (label < task->low || label > task->high))
      return moe__fail(env, MOE_E_ARGUMENT,
                       "batch: the label of sequence %d is %g, task '%s' expects %g to %g", (int)s,
                       (double)label, task->name, (double)task->low, (double)task->high);
    return MOE_OK;
  }
  if (label < 0 || label >= (float)task->classes || (float)(int32_t)label != label)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "batch: the label of sequence %d is %g, task '%s' expects a class from 0 to %d", (int)s,
        (double)label, task->name, (int)task->classes - 1);
  return MOE_OK;
}

static moe_status moe__check_span(const moe_batch *b, int32_t s, int32_t length, const char *task,
                                  const moe_env *env) {
  int i;
  if (!b->span)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "batch: spans is NULL, but sequence %d belongs to task '%s', which needs spans", (int)s,
        task);
  for (i = 0; i < 4; i += 2) {
    int32_t begin = b->span[4 * (size_t)s + (size_t)i],
            end = b->span[4 * (size_t)s + (size_t)i + 1];
    if (begin < 0 || begin >= end || end > length)
      return moe__fail(
          env, MOE_E_ARGUMENT,
          "batch: span %d of sequence %d is tokens %d to %d, the sequence has %d tokens", i / 2 + 1,
          (int)s, (int)begin, (int)end, (int)length);
  }
  return MOE_OK;
}

static moe_status moe__check_tokens(const moe_model *model, const moe_batch *b, int32_t s,
                                    const moe_env *env) {
  const moe_config *c = &model->config;
  int32_t i, begin = b->seq_start[s], end = b->seq_start[s + 1];
  for (i = begin; i < end; ++i) {
    if (b->ids && (b->ids[i] < 0 || b->ids[i] >= c->vocab))
      return moe__fail(env, MOE_E_ARGUMENT,
                       "batch: token %d of sequence %d has id %d, the vocabulary has %d words",
                       (int)(i - begin), (int)s, (int)b->ids[i], (int)c->vocab);
    if (b->segments && b->segments[i] >= c->segments)
      return moe__fail(env, MOE_E_ARGUMENT,
                       "batch: token %d of sequence %d is in segment %d, the model has %d segments",
                       (int)(i - begin), (int)s, (int)b->segments[i], (int)c->segments);
  }
  if (b->features) {
    size_t j, width = (size_t)c->feature_dim, first = (size_t)begin * width,
              last = (size_t)end * width;
    for (j = first; j < last; ++j)
      if (!moe__is_finite(b->features[j]))
        return moe__fail(env, MOE_E_ARGUMENT,
                         "batch: feature %d of token %d of sequence %d is not a finite number",
                         (int)(j % width), (int)(j / width) - (int)begin, (int)s);
  }
  return MOE_OK;
}

MOE_API moe_status moe_batch_check(const moe_model *model, const moe_batch *batch, int with_labels,
                                   const moe_env *env) {
  int32_t s;
  moe_status status;
  if (batch->S < 0)
    return moe__fail(env, MOE_E_ARGUMENT, "batch: S is %d, expected 0 or more", (int)batch->S);
  if (batch->S == 0) return MOE_OK;
  status = moe__check_batch_arrays(model, batch, with_labels, env);
  for (s = 0; s < batch->S && !status; ++s) {
    int32_t length = batch->seq_start[s + 1] - batch->seq_start[s];
    if (model->T && (batch->task[s] < 0 || batch->task[s] >= model->T))
      return moe__fail(env, MOE_E_ARGUMENT,
                       "batch: sequence %d has task %d, the model has %d tasks", (int)s,
                       (int)batch->task[s], (int)model->T);
    status = moe__check_tokens(model, batch, s, env);
    if (!model->T) continue;
    if (!status && with_labels) status = moe__check_label(model, batch, s, env);
    if (!status && moe__kind_of(&model->tasks[batch->task[s]])->spans)
      status = moe__check_span(batch, s, length, model->tasks[batch->task[s]].name, env);
  }
  return status;
}

/* ---- activations: what a context holds, and where ---- >>arena
   A context has two parts. The host's part holds this struct, tables of pointers, keys of random
   numbers, and how a batch is divided. The arena holds everything that ops read and write in a
   pass: one stretch of memory whose layout is a function of model and limits. The host itself reads
   nothing of the arena in a pass, except for blocks as experts and gates made of task vectors. */

/* What a block leaves in the arena. In training every block has its own arrays, for backward. In
   inference all blocks share one set, and arrays that only backward reads are NULL; the residual
   sums then overwrite the branch that was added. */
typedef struct moe__acts {
  float *x;                    /* (M, H) input of the block */
  float *qkv, *att, *stats;    /* (M, 3H), (M, H), (M, A, 2) */
  float *sum1, *mean1, *rstd1; /* (M, H), (M), (M): x + attention */
  float *y1;                   /* (M, H) its LayerNorm, input of gate and experts */
  float *logits;               /* (M, N) of the gate */
  float *pre, *e;              /* (M k, F), (M k, H) kept by the experts; no e where N = 1 */
  float *sum2, *mean2, *rstd2; /* y1 + experts */
} moe__acts;

/* What blocks as experts need in addition [TL]; see >>task_router and >>blocks. Inference keeps two
   inputs of layers and one output of a block. */
typedef struct moe__task_router {
  moe_task_router given;
  float **x;       /* (L+1) input of each layer, the last: the network's output; (M, H) each */
  float **y;       /* (L m) output of each block for its sequences; (M, H) each */
  float *gathered; /* (M, H) the input of a block that does not compute all sequences */
  int32_t *sequence,
      *start;       /* (S), (S+1) sequences that a block computes, and where each begins among its
                       rows */
  uint64_t *keys;   /* (3, S) their keys at the sites of a block; training */
  float *weight;    /* (L, S, m) of each block's output */
  float *prob;      /* (L, S, m) softmax that the gradient goes through */
  float *pre, *act; /* (L, S, 64) of the router: before and after GELU */
  float *dweight, *dy, *dx; /* (L, S, m), (M, H), (M, H): gradients of the weights, of a layer's
                               output and of its input */
} moe__task_router;

/* The experts of all blocks as moe_experts_op takes them, filled in for each pass, and the
   gradients of one block's (N). */
typedef struct moe__experts_tables {
  moe_mat *in, *out; /* (L N) */
  const float **b_in, **b_out;
  const float **w_in, **w_out; /* (N) */
  moe_mat *in_back, *out_back;
  float **d_in, **d_b_in, **d_out, **d_b_out;
} moe__experts_tables;

/* What a context on a DEVICE has in addition. */
typedef struct moe__on {
  moe_env env; /* of its creation, with the queue; backend NULL: the context is not on a device */
  void *arena; /* memory of the device */
  unsigned char *stage, *staged;   /* what a pass uploads: on the host, and in the arena */
  float *hidden, *logits, *losses; /* the host's copies of what it was last asked for: (M, H), */
  moe_routes routes;               /* (M, N), those of a pass, of a layer */
} moe__on;

struct moe_context {
  const moe_model *model;
  const float *w; /* the model's flat array, on the device where the context is */
  moe_limits limits;
  int owns_block;
  moe__on device;
  const int32_t *forced; /* (L, M, k) or NULL */
  const uint8_t *masked; /* (L, N) or NULL */
  /* of the host */
  int32_t M;          /* tokens of the last pass */
  moe__acts *acts;    /* (L) for each block of the model */
  moe_routes *routes; /* (L); a dense model's are all the same */
  uint64_t *keys;     /* (sites, S) see moe__key_row; training */
  int32_t *gate_of;   /* (S) */
  uint8_t *has_gate;  /* (T) 1: a task of the batch, where gates are made of task vectors */
  int32_t *cut_first; /* (S+1) micro-batches, see >>schedule: the first sequence of each, */
  int32_t *cut_start; /* (2S) and where its sequences begin among its rows */
  int32_t longest;    /* tokens of the longest sequence that attention's scratch is made for */
  size_t attention_floats;
  moe__experts_tables experts;
  moe__task_router router;
  /* of the arena, beside acts and routes */
  float *sum0, *mean0, *rstd0; /* embeddings before their LayerNorm; training */
  float *last;                 /* (M, H) output of the last layer */
  float *branch;               /* (M, H) output of a sublayer */
  float *gates, *dgates; /* (T, N, H) gates made of task vectors, of one layer, and their gradients;
                            else NULL */
  float *scores;         /* (S, classes) training */
  float *losses, *aux;   /* (S), (L) of sequences, and of the gates of each layer; training */
  float *experts_scratch, *attention_scratch, *heads_scratch;
  float *g, *gsum, *gatt, *gqkv, *gweight, *glogits; /* gradients; training */
};

#define MOE__FLOATS(layout, count) ((float *)moe__carve(layout, count, sizeof(float)))

/* The keys of the random numbers of a pass (moe_key) are made before it begins: a row of S keys for
   each site. Two sites of the whole network come first, then four of each block, then one of each
   layer [TL]. */
static size_t moe__key_row(const moe_config *config, uint32_t site, int32_t layer) {
  size_t l = (size_t)layer;
  switch (site) {
    case MOE__SITE_EMBEDDING: return 0;
    case MOE__SITE_HEAD: return 1;
    case MOE__SITE_ATTENTION: return 2 + 4 * l;
    case MOE__SITE_ATTENTION_OUT: return 3 + 4 * l;
    case MOE__SITE_FFN_OUT: return 4 + 4 * l;
    case MOE__SITE_JITTER: return 5 + 4 * l;
    default: return 2 + 4 * (size_t)moe__block_count(config) + l; /* MOE__SITE_GUMBEL */
  }
}

static size_t moe__key_rows(const moe_config *config) {
  return moe__key_row(config, MOE__SITE_GUMBEL, MOE__BLOCKS(config) ? config->layers : 0);
}

/* Sizes that the parts of a context share. */
typedef struct moe__dims {
  size_t M, S, H, F, A, N, k, Mk; /* N counts the feed-forward networks of a block */
  size_t L, m, blocks; /* layers, blocks of a layer that are its experts (else 0), all blocks */
  int training, keep;  /* keep: states and logits of every layer */
} moe__dims;

static moe__dims moe__dims_of(const moe_context *c) {
  const moe_config *config = &c->model->config;
  moe__dims d;
  d.M = (size_t)c->limits.tokens;
  d.S = (size_t)c->limits.sequences;
  d.H = (size_t)config->hidden;
  d.F = (size_t)config->ffn;
  d.A = (size_t)config->heads;
  d.N = (size_t)moe__block_experts(config);
  d.k = (size_t)config->top_k;
  d.Mk = d.M * d.k;
  d.L = (size_t)config->layers;
  d.m = MOE__BLOCKS(config) ? (size_t)config->experts : 0;
  d.blocks = (size_t)moe__block_count(config);
  d.training = c->limits.training;
  d.keep = d.training || c->limits.keep_layers;
  return d;
}

static void moe__carve_acts(moe__layout *arena, moe__acts *a, const moe__dims *d) {
  if (!d->m) a->x = MOE__FLOATS(arena, d->M * d->H); /* else the blocks of a layer share theirs */
  a->qkv = MOE__FLOATS(arena, moe__mul(d->M, 3 * d->H, &arena->bad));
  a->att = MOE__FLOATS(arena, d->M * d->H);
  a->y1 = MOE__FLOATS(arena, d->M * d->H);
  a->logits = MOE__FLOATS(arena, d->M * d->N);
  if (!d->training) return;
  a->stats = MOE__FLOATS(arena, moe__mul(d->M, 2 * d->A, &arena->bad));
  a->sum1 = MOE__FLOATS(arena, d->M * d->H);
  a->mean1 = MOE__FLOATS(arena, d->M);
  a->rstd1 = MOE__FLOATS(arena, d->M);
  a->pre = MOE__FLOATS(arena, moe__mul(d->Mk, d->F, &arena->bad));
  if (d->N > 1) a->e = MOE__FLOATS(arena, moe__mul(d->Mk, d->H, &arena->bad));
  a->sum2 = MOE__FLOATS(arena, d->M * d->H);
  a->mean2 = MOE__FLOATS(arena, d->M);
  a->rstd2 = MOE__FLOATS(arena, d->M);
}

/* Routes of a layer with N experts. */
static void moe__carve_routes(moe__layout *layout, moe_routes *r, const moe__dims *d, size_t N) {
  r->N = (int32_t)N;
  r->k = (int32_t)d->k;
  r->expert = (int32_t *)moe__carve(layout, d->Mk, sizeof(int32_t));
  r->weight = MOE__FLOATS(layout, d->Mk);
  r->prob = MOE__FLOATS(layout, moe__mul(d->M, N, &layout->bad));
  r->order = (int32_t *)moe__carve(layout, d->Mk, sizeof(int32_t));
  r->start = (int32_t *)moe__carve(layout, N + 1, sizeof(int32_t));
}

/* Activations of the blocks and routes of the layers. When only the size is computed there is no
   memory yet: `acts` and `routes` then hold what c->acts and c->routes would. Only gates write
   routes in a pass; other routes belong to the host. */
static void moe__carve_blocks(moe__layout *host, moe__layout *arena, moe_context *c,
                              const moe__dims *d) {
  int gates = moe__has_gates(&c->model->config);
  moe__acts acts;
  moe_routes routes;
  size_t l;
  c->acts = (moe__acts *)moe__carve(host, d->blocks, sizeof(moe__acts));
  c->routes = (moe_routes *)moe__carve(host, d->L, sizeof(moe_routes));
  memset(&acts, 0, sizeof acts);
  memset(&routes, 0, sizeof routes);
  for (l = 0; l < d->blocks; ++l) {
    if (l == 0 || d->training)
      moe__carve_acts(arena, &acts, d);
    else if (d->keep && !d->m) {
      acts.x = MOE__FLOATS(arena, d->M * d->H);
      acts.logits = MOE__FLOATS(arena, d->M * d->N);
    }
    if (host->base) c->acts[l] = acts;
  }
  for (l = 0; l < d->L; ++l) {
    if (l == 0 || gates || d->m)
      moe__carve_routes(gates ? arena : host, &routes, d, d->m ? d->m : d->N);
    if (host->base) c->routes[l] = routes;
  }
  if (!d->m) c->last = d->keep ? MOE__FLOATS(arena, d->M * d->H) : acts.x;
}

static void moe__carve_task_router(moe__layout *host, moe__layout *arena, moe_context *c,
                                   const moe__dims *d) {
  moe__task_router *r = &c->router;
  size_t l,
      choices = moe__mul(moe__mul(d->L, d->S, &host->bad), d->m, &host->bad),
      hidden = moe__mul(moe__mul(d->L, d->S, &host->bad), MOE__TASK_ROUTER_HIDDEN, &host->bad);
  float *x[2] = {NULL, NULL}, *y = NULL;
  r->x = (float **)moe__carve(host, d->L + 1, sizeof(float *));
  r->y = (float **)moe__carve(host, d->blocks, sizeof(float *));
  for (l = 0; l <= d->L; ++l) {
    if (l < 2 || d->keep) x[l & 1] = MOE__FLOATS(arena, d->M * d->H);
    if (host->base) r->x[l] = x[l & 1];
  }
  for (l = 0; l < d->blocks; ++l) {
    if (l == 0 || d->training) y = MOE__FLOATS(arena, d->M * d->H);
    if (host->base) r->y[l] = y;
  }
  c->last = x[d->L & 1];
  r->gathered = MOE__FLOATS(arena, d->M * d->H);
  r->sequence = (int32_t *)moe__carve(host, d->S, sizeof(int32_t));
  r->start = (int32_t *)moe__carve(host, d->S + 1, sizeof(int32_t));
  r->weight = MOE__FLOATS(host, choices);
  r->prob = MOE__FLOATS(host, choices);
  r->pre = MOE__FLOATS(host, hidden);
  r->act = MOE__FLOATS(host, hidden);
  if (!d->training) return;
  r->keys = (uint64_t *)moe__carve(host, moe__mul(3, d->S, &host->bad), sizeof(uint64_t));
  r->dweight = MOE__FLOATS(host, choices);
  r->dy = MOE__FLOATS(arena, d->M * d->H);
  r->dx = MOE__FLOATS(arena, d->M * d->H);
}

static void moe__carve_experts(moe__layout *host, moe__experts_tables *t, const moe__dims *d) {
  size_t all = moe__mul(d->blocks, d->N, &host->bad);
  t->in = (moe_mat *)moe__carve(host, all, sizeof(moe_mat));
  t->out = (moe_mat *)moe__carve(host, all, sizeof(moe_mat));
  t->b_in = (const float **)moe__carve(host, all, sizeof(float *));
  t->b_out = (const float **)moe__carve(host, all, sizeof(float *));
  if (!d->training) return;
  t->w_in = (const float **)moe__carve(host, d->N, sizeof(float *));
  t->w_out = (const float **)moe__carve(host, d->N, sizeof(float *));
  t->in_back = (moe_mat *)moe__carve(host, d->N, sizeof(moe_mat));
  t->out_back = (moe_mat *)moe__carve(host, d->N, sizeof(moe_mat));
  t->d_in = (float **)moe__carve(host, d->N, sizeof(float *));
  t->d_b_in = (float **)moe__carve(host, d->N, sizeof(float *));
  t->d_out = (float **)moe__carve(host, d->N, sizeof(float *));
  t->d_b_out = (float **)moe__carve(host, d->N, sizeof(float *));
}

/* What a training pass writes besides the blocks' activations. */
static void moe__carve_training(moe__layout *host, moe__layout *arena, moe_context *c,
                                const moe__dims *d) {
  c->keys = (uint64_t *)moe__carve(
      host, moe__mul(moe__key_rows(&c->model->config), d->S, &host->bad), sizeof(uint64_t));
  c->sum0 = MOE__FLOATS(arena, d->M * d->H);
  c->mean0 = MOE__FLOATS(arena, d->M);
  c->rstd0 = MOE__FLOATS(arena, d->M);
  c->scores = MOE__FLOATS(arena, moe__mul(d->S, (size_t)c->model->max_classes, &arena->bad));
  c->losses = MOE__FLOATS(arena, d->S + d->L);
  c->aux = c->losses ? c->losses + d->S : NULL; /* side by side: one read gets both */
  c->g = MOE__FLOATS(arena, d->M * d->H);
  c->gsum = MOE__FLOATS(arena, d->M * d->H);
  c->gatt = MOE__FLOATS(arena, d->M * d->H);
  c->gqkv = MOE__FLOATS(arena, moe__mul(d->M, 3 * d->H, &arena->bad));
  c->gweight = MOE__FLOATS(arena, d->Mk);
  c->glogits = MOE__FLOATS(arena, d->M * d->N);
}

/* Most bytes that a pass uploads: each array begins at a multiple of 64. */
static size_t moe__stage_bytes(const moe_context *c, const moe__dims *d, int *bad) {
  const moe_config *config = &c->model->config;
  size_t n = 16 * 64;                                    /* for rounding up 16 arrays */
  n = moe__add(n, moe__mul(d->S, 10 * 4 + 4, bad), bad); /* starts, tasks, gates, labels, weights,
                                                            spans */
  n = moe__add(n, moe__mul(moe__key_rows(config), moe__mul(d->S, 8, bad), bad), bad);
  n = moe__add(n, moe__mul(d->M, moe__mul((size_t)moe__max(config->feature_dim, 1), 4, bad), bad),
               bad);
  n = moe__add(n, d->M, bad);                                           /* segments */
  n = moe__add(n, moe__mul(moe__mul(d->Mk, d->L, bad), 4, bad), bad);   /* forced experts */
  return moe__add(n, moe__mul(2, moe__mul(d->L, d->N, bad), bad), bad); /* masked, pruned */
}

static void moe__carve_device(moe__layout *host, moe__layout *arena, moe_context *c,
                              const moe__dims *d) {
  size_t bytes = moe__stage_bytes(c, d, &host->bad);
  moe__on *on = &c->device;
  on->stage = (unsigned char *)moe__carve(host, bytes, 1);
  on->staged = (unsigned char *)moe__carve(arena, bytes, 1);
  on->hidden = MOE__FLOATS(host, d->M * d->H);
  on->logits = MOE__FLOATS(host, d->M * d->N);
  on->losses = MOE__FLOATS(host, d->S + d->L);
  moe__carve_routes(host, &on->routes, d, d->N);
  if (!d->training)
    c->scores = MOE__FLOATS(arena, moe__mul(d->S, (size_t)c->model->max_classes, &arena->bad));
}

/* Sets every pointer of *c, whose model and limits are set. */
static void moe__context_carve(moe__layout *host, moe__layout *arena, moe_context *c,
                               const moe_env *env) {
  const moe_config *config = &c->model->config;
  moe__dims d = moe__dims_of(c);
  moe__mul(moe__mul(d.M, d.H > d.N ? d.H : d.N, &arena->bad), sizeof(float),
           &arena->bad); /* the plain products above are no larger */
  moe__carve_blocks(host, arena, c, &d);
  if (d.m) moe__carve_task_router(host, arena, c, &d);
  moe__carve_experts(host, &c->experts, &d);
  c->gate_of = (int32_t *)moe__carve(host, d.S, sizeof(int32_t));
  c->cut_first = (int32_t *)moe__carve(host, d.S + 1, sizeof(int32_t));
  c->cut_start = (int32_t *)moe__carve(host, moe__mul(2, d.S, &host->bad), sizeof(int32_t));
  c->branch = MOE__FLOATS(arena, d.M * d.H);
  if (config->router == MOE_ROUTER_EMBEDDING) {
    size_t gates = moe__mul((size_t)c->model->T, moe__mul(d.N, d.H, &arena->bad), &arena->bad);
    c->gates = MOE__FLOATS(arena, gates);
    c->dgates = d.training ? MOE__FLOATS(arena, gates) : NULL;
    c->has_gate = (uint8_t *)moe__carve(host, (size_t)c->model->T, 1);
  }
  c->experts_scratch =
      MOE__FLOATS(arena, moe_experts_scratch(c->limits.tokens, config->top_k, config->hidden,
                                             config->ffn, d.training));
  c->longest = moe__min(c->limits.tokens, config->positions);
  c->attention_floats =
      moe_attention_scratch(c->longest, config->hidden, config->heads, d.training, env);
  c->attention_scratch = MOE__FLOATS(arena, c->attention_floats);
  c->heads_scratch = MOE__FLOATS(arena, moe_heads_scratch(config->hidden));
  if (d.training) moe__carve_training(host, arena, c, &d);
  if (moe__on_device(env)) moe__carve_device(host, arena, c, &d);
}

/* ---- a context: its sizes, its block ---- >>context */

/* Slots (tokens times k) are counted in int32_t, and so is the end of a tile of them, before it is
   cut. */
static moe_status moe__limits_check(const moe_model *model, const moe_limits *limits,
                                    const moe_env *env) {
  int32_t most = (INT32_MAX - 1024) / moe__max(model->config.top_k, 4);
  if (limits->tokens < 1 || limits->tokens > most)
    return moe__fail(env, MOE_E_ARGUMENT, "limits: tokens is %d, expected 1 to %d",
                     (int)limits->tokens, (int)most);
  if (limits->sequences < 1 || limits->sequences > limits->tokens)
    return moe__fail(env, MOE_E_ARGUMENT, "limits: sequences is %d, expected 1 to %d (tokens)",
                     (int)limits->sequences, (int)limits->tokens);
  if (limits->training != 0 && limits->training != 1)
    return moe__fail(env, MOE_E_ARGUMENT, "limits: training is %d, expected 0 or 1",
                     (int)limits->training);
  if (limits->keep_layers != 0 && limits->keep_layers != 1)
    return moe__fail(env, MOE_E_ARGUMENT, "limits: keep_layers is %d, expected 0 or 1",
                     (int)limits->keep_layers);
  if (limits->training && MOE__INT8(model->plan.quantized))
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "an int8 model cannot be trained: train the float model, then quantise it");
#ifdef MOE_NO_TRAIN
  if (limits->training)
    return moe__fail(env, MOE_E_UNSUPPORTED, "limits: this build cannot train (MOE_NO_TRAIN)");
#endif
  return MOE_OK;
}

/* Bytes of the two parts. */
static moe_status moe__context_bytes(size_t *host_bytes, size_t *arena_bytes,
                                     const moe_model *model, const moe_limits *limits,
                                     const moe_env *env) {
  moe__layout host = {NULL, 0, 0}, arena = {NULL, 0, 0};
  moe_context c;
  moe_status status = moe__limits_check(model, limits, env);
  if (status) return status;
  memset(&c, 0, sizeof c);
  c.model = model;
  c.limits = *limits;
  moe__carve(&host, 1, sizeof c);
  moe__context_carve(&host, &arena, &c, env);
  *host_bytes = moe__add(host.used, 63, &host.bad) & ~(size_t)63;
  *arena_bytes = arena.used;
  moe__add(*host_bytes, *arena_bytes, &host.bad);
  if (host.bad || arena.bad)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "limits: a context of %d tokens exceeds the address space of this machine",
                     (int)limits->tokens);
  return MOE_OK;
}

MOE_API moe_status moe_context_size(const moe_model *model, const moe_limits *limits, size_t *bytes,
                                    const moe_env *env) {
  size_t host, arena;
  moe_status status = moe__context_bytes(&host, &arena, model, limits, env);
  if (!status) *bytes = moe__on_device(env) ? host : host + arena;
  return status;
}

/* Routes that no pass writes: all tokens of a dense model in order at expert 0, with weight 1. */
static void moe__routes_dense(moe_routes *r, int32_t M) {
  int32_t i;
  for (i = 0; i < M; ++i) {
    r->expert[i] = 0;
    r->order[i] = i;
    r->weight[i] = r->prob[i] = 1.0f;
  }
}

/* Empty routes: before the first pass, and after a pass of no sequences. Routes on a device are
   cleared when the caller asks for them. */
static void moe__routes_clear(moe_context *c) {
  int there = MOE__BACKEND(&c->device.env) && moe__has_gates(&c->model->config);
  int32_t l;
  for (l = 0; l < c->model->config.layers; ++l) {
    c->routes[l].M = 0;
    if (!there) memset(c->routes[l].start, 0, ((size_t)c->routes[l].N + 1) * sizeof(int32_t));
  }
}

/* Checks that the device can hold a context of this model and has its weights. */
static moe_status moe__device_check(const moe_model *model, const moe_limits *limits,
                                    const moe_env *env) {
  const moe_backend *b = env->backend;
  const char *what = MOE__INT8(model->plan.quantized)               ? "int8 models"
                     : model->config.unit == MOE_UNIT_BLOCK         ? "blocks as experts"
                     : model->config.router == MOE_ROUTER_EMBEDDING ? "gates made of task vectors"
                                                                    : NULL;
  moe_status status;
  if (what)
    return moe__fail(env, MOE_E_UNSUPPORTED, "%s: %s are computed on the CPU only", b->name, what);
  status = moe__device_slots(env, limits->training);
  if (status) return status;
  if (!b->supports(b, env, &model->config, limits)) return MOE_E_UNSUPPORTED;
  if (model->device.backend != b)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "%s: the model's weights are not on this device: call moe_model_pack first",
                     b->name);
  return MOE_OK;
}

/* The device's part of a context: a queue and the arena. */
static moe_status moe__device_open(moe_context *c, size_t arena_bytes, const moe_env *env) {
  const moe_backend *b = env->backend;
  moe_status status;
  c->device.env = *env;
  status = b->open(b, env, &c->device.env.stream);
  if (status) {
    c->device.env.backend = NULL;
    return status;
  }
  status = b->alloc(b, &c->device.env, &c->device.arena, arena_bytes);
  if (status) {
    b->close(b, c->device.env.stream);
    c->device.env.backend = NULL;
  }
  return status;
}

MOE_API moe_status moe_context_init(moe_context **out, void *block, size_t bytes,
                                    const moe_model *model, const moe_limits *limits,
                                    const moe_env *env) {
  moe__layout host = {NULL, 0, 0}, arena = {NULL, 0, 0};
  moe_context *c;
  size_t host_bytes = 0, arena_bytes = 0;
  int device = moe__on_device(env);
  moe_status status = moe__context_bytes(&host_bytes, &arena_bytes, model, limits, env);
  if (!status)
    status =
        moe__check_block("a context", block, bytes, host_bytes + (device ? 0 : arena_bytes), env);
  if (!status && device) status = moe__device_check(model, limits, env);
  if (status) return status;
  host.base = (unsigned char *)block;
  c = (moe_context *)moe__carve(&host, 1, sizeof *c);
  memset(c, 0, sizeof *c);
  c->model = model;
  c->limits = *limits;
  c->w = device ? model->resident : model->weights;
  if (device) status = moe__device_open(c, arena_bytes, env);
  if (status) return status;
  arena.base = device ? (unsigned char *)c->device.arena : host.base + host_bytes;
  moe__context_carve(&host, &arena, c, env);
  if (!MOE__BLOCKS(&model->config) && !moe__has_gates(&model->config))
    moe__routes_dense(&c->routes[0], limits->tokens);
  moe__routes_clear(c);
  *out = c;
  return MOE_OK;
}

MOE_API moe_status moe_context_create(moe_context **out, const moe_model *model,
                                      const moe_limits *limits, const moe_env *env) {
  size_t bytes = 0;
  void *block;
  moe_status status = moe_context_size(model, limits, &bytes, env);
  if (status) return status;
  block = moe__alloc(bytes);
  if (!block) return moe__fail(env, MOE_E_MEMORY, "no memory for a context of %zu bytes", bytes);
  status = moe_context_init(out, block, bytes, model, limits, env);
  if (status)
    moe__release(block);
  else
    (*out)->owns_block = 1;
  return status;
}

MOE_API void moe_context_free(moe_context *context) {
  if (!context) return;
  if (MOE__BACKEND(&context->device.env)) {
    const moe_backend *b = context->device.env.backend;
    b->release(b, context->device.arena);
    b->close(b, context->device.env.stream);
    context->device.env.backend = NULL;
  }
  if (context->owns_block) moe__release(context);
}

/* ---- before a pass: checks, keys of random numbers ---- >>begin */

/* What forward and backward of a pass share. */
typedef struct moe__pass {
  const moe_batch *batch;
  const moe_env *env;
  int32_t M, S;
  float dropout, jitter; /* 0 when not training */
  float balance, z_loss;
  uint64_t seed, step;
  float tau;          /* temperature of task-level routing; 0 when not training */
  int32_t batch_size; /* sequences of the whole batch, of which this one may be a micro-batch */
  int32_t longest;    /* tokens of its longest sequence */
#ifndef MOE_NO_TRAIN
  const moe_train_config *train; /* whose `ready` is called; NULL: none */
#endif
  /* The same as ops see it: these arrays are the host's, or the device's copies. */
  moe_batch seen;
  const int32_t *gate_of; /* (S) */
  const uint64_t *keys;   /* (sites, S) */
  const int32_t *forced;  /* (L, M, k) or NULL */
  const uint8_t *masked;  /* (L, N) or NULL */
  const uint8_t *pruned;  /* (L, N) or NULL */
} moe__pass;

/* For gates, routers, heads and feature inputs, which stay fp32 in every precision. */
static moe_env moe__in_fp32(const moe_env *env) {
  moe_env fp32 = *env;
  fp32.precision = MOE_TYPE_F32;
  return fp32;
}

static moe_env moe__one_thread(const moe_env *env) {
  moe_env one = moe__in_fp32(env);
  one.threads = 1;
  one.parallel_for = NULL;
  return one;
}

/* Forced experts come from the caller: a number outside [0, N), or the same one twice for a token,
   would break the dispatch. */
static moe_status moe__check_forced(const moe_context *c, int32_t M, const moe_env *env) {
  const moe_config *config = &c->model->config;
  size_t k = (size_t)config->top_k, slots = (size_t)config->layers * (size_t)M, i, a, b;
  if (!c->forced || !moe__has_gates(config)) return MOE_OK;
  for (i = 0; i < slots; ++i)
    for (a = 0; a < k; ++a) {
      int32_t expert = c->forced[i * k + a];
      if (expert < 0 || expert >= config->experts)
        return moe__fail(
            env, MOE_E_ARGUMENT,
            "forced routes: token %d of layer %d goes to expert %d, the layer has %d experts",
            (int)(i % (size_t)M), (int)(i / (size_t)M), (int)expert, (int)config->experts);
      if (moe__is_pruned(c->model, (int32_t)(i / (size_t)M), expert))
        return moe__fail(env, MOE_E_ARGUMENT,
                         "forced routes: token %d of layer %d goes to expert %d, which is pruned",
                         (int)(i % (size_t)M), (int)(i / (size_t)M), (int)expert);
      for (b = 0; b < a; ++b)
        if (c->forced[i * k + b] == expert)
          return moe__fail(env, MOE_E_ARGUMENT,
                           "forced routes: token %d of layer %d goes to expert %d twice",
                           (int)(i % (size_t)M), (int)(i / (size_t)M), (int)expert);
    }
  return MOE_OK;
}

/* Each layer must keep k experts to choose from. Routes that are given (forced experts, fixed
   blocks) need no choice, and masks are not checked. */
static moe_status moe__check_masked(const moe_context *c, const moe_env *env) {
  const moe_config *config = &c->model->config;
  int32_t l, i;
  if (!c->masked ||
      (config->unit == MOE_UNIT_FFN ? c->forced != NULL : c->router.given.routes != NULL))
    return MOE_OK;
  for (l = 0; l < config->layers; ++l) {
    int32_t left = 0;
    for (i = 0; i < config->experts; ++i)
      left += !c->masked[(size_t)l * (size_t)config->experts + (size_t)i] &&
              !moe__is_pruned(c->model, l, i);
    if (left < config->top_k)
      return moe__fail(
          env, MOE_E_ARGUMENT,
          "masked experts: layer %d keeps %d of %d experts, expected at least top_k (%d)", (int)l,
          (int)left, (int)config->experts, (int)config->top_k);
  }
  return MOE_OK;
}

/* Checks the caller's weights, scores and noise for blocks as experts. */
static moe_status moe__check_given(const moe_context *c, int32_t S, const moe_env *env) {
  const moe_config *config = &c->model->config;
  const moe_task_router *given = &c->router.given;
  size_t m = (size_t)config->experts, L = (size_t)config->layers, rows = (size_t)c->model->T * L,
         row, i;
  for (row = 0; given->routes && row < rows; ++row) {
    const float *w = given->routes + row * m;
    float sum = 0;
    for (i = 0; i < m; ++i) {
      if (!(w[i] >= 0 && w[i] <= 1e6f))
        return moe__fail(
            env, MOE_E_ARGUMENT,
            "fixed routes: task '%s', layer %d, block %d has weight %g, expected 0 to 1e6",
            c->model->tasks[row / L].name, (int)(row % L), (int)i, (double)w[i]);
      sum += w[i];
    }
    if (!(sum > 0))
      return moe__fail(
          env, MOE_E_ARGUMENT,
          "fixed routes: task '%s' has only zero weights in layer %d, expected one above 0",
          c->model->tasks[row / L].name, (int)(row % L));
  }
  for (i = 0; given->scores && !given->routes && i < rows * m; ++i)
    if (!moe__is_finite(given->scores[i]))
      return moe__fail(env, MOE_E_ARGUMENT,
                       "scores of the blocks: task '%s', layer %d, block %d is not a finite number",
                       c->model->tasks[i / (L * m)].name, (int)(i / m % L), (int)(i % m));
  for (i = 0; given->gumbel && i < (size_t)S * L * m; ++i)
    if (!moe__is_finite(given->gumbel[i]))
      return moe__fail(env, MOE_E_ARGUMENT,
                       "Gumbel noise: sequence %d, layer %d, block %d is not a finite number",
                       (int)(i / (L * m)), (int)(i / m % L), (int)(i % m));
  return MOE_OK;
}

/* Finds every error of a pass before anything is written. */
static moe_status moe__pass_check(const moe_context *c, const moe_batch *batch, int with_labels,
                                  const moe_env *env) {
  const moe_config *config = &c->model->config;
  int32_t M;
  moe_status status = moe_batch_check(c->model, batch, with_labels, env);
  if (status || batch->S == 0) return status;
  M = batch->seq_start[batch->S];
  if (batch->S > c->limits.sequences)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "batch: %d sequences, the context was made for at most %d", (int)batch->S,
                     (int)c->limits.sequences);
  if (M > c->limits.tokens)
    return moe__fail(env, MOE_E_ARGUMENT, "batch: %d tokens, the context was made for at most %d",
                     (int)M, (int)c->limits.tokens);
  if (moe_attention_scratch(c->longest, config->hidden, config->heads, c->limits.training, env) >
      c->attention_floats)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "this call uses %d threads, the context was made for fewer: use the same env.threads",
        (int)env->threads);
  if (MOE__BACKEND(&c->device.env) ? env->backend != c->device.env.backend : moe__on_device(env))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "the context was made for %s, the pass is for %s: use the same env.backend",
                     c->device.env.backend ? c->device.env.backend->name : "the CPU",
                     moe_backend_name(env));
  status = moe__check_masked(c, env);
  if (!status) status = moe__check_given(c, batch->S, env);
  return status ? status : moe__check_forced(c, M, env);
}

/* A pass of inference; a trainer sets the rest. */
static void moe__pass_begin(moe_context *c, moe__pass *pass, const moe_batch *batch,
                            const moe_env *env) {
  moe__profile_begin(env);
  memset(pass, 0, sizeof *pass);
  pass->batch = batch;
  pass->env = env;
  pass->S = batch->S;
  pass->M = batch->S ? batch->seq_start[batch->S] : 0;
  pass->batch_size = moe__max(pass->S, 1);
  c->M = pass->M;
  if (!MOE__BACKEND(&c->device.env)) return;
  c->device.env.log = env->log, c->device.env.log_user = env->log_user;
  c->device.env.profile = env->profile;
  c->device.env.precision = env->precision;
  pass->env = &c->device.env;
}

/* Makes the keys of a site (moe__key_row). */
static void moe__keys_make(moe_context *c, const moe__pass *pass, uint32_t site, int32_t layer) {
  const int64_t *index = pass->batch->index;
  uint64_t *keys = c->keys + moe__key_row(&c->model->config, site, layer) * (size_t)pass->S;
  int32_t s;
  for (s = 0; s < pass->S; ++s)
    keys[s] =
        moe_key(pass->seed, pass->step, (uint64_t)(index ? index[s] : s), (uint32_t)layer, site);
}

/* The experts of all blocks, for moe_experts_op. A pruned expert has no weights and gets no
   tokens. */
static void moe__experts_tables_make(moe_context *c, const moe__pass *pass) {
  const moe_model *m = c->model;
  const moe_config *config = &m->config;
  moe__experts_tables *t = &c->experts;
  int32_t l, i, N = moe__block_experts(config),
                rows = pass->M * config->top_k / N; /* even shares; see moe__limits_check */
  size_t at = 0;
  for (l = 0; l < moe__block_count(config); ++l)
    for (i = 0; i < N; ++i, ++at) {
      if (moe__is_pruned(m, l, i)) {
        t->in[at] = t->out[at] = moe_mat_rows(NULL, 0, 0);
        t->b_in[at] = t->b_out[at] = NULL;
        continue;
      }
      t->in[at] = moe__mat(m, MOE__IN_W, l, i, rows, pass->env);
      t->out[at] = moe__mat(m, MOE__OUT_W, l, i, rows, pass->env);
      t->b_in[at] = c->w + moe__at(m, MOE__IN_B, l, i);
      t->b_out[at] = c->w + moe__at(m, MOE__OUT_B, l, i);
    }
}

/* What ops read besides weights and activations, as arrays of the host. */
static void moe__pass_see(const moe_context *c, moe__pass *pass) {
  int32_t s;
  pass->seen = *pass->batch;
  pass->gate_of = c->gate_of;
  pass->keys = c->keys;
  pass->forced = c->forced;
  pass->masked = c->masked;
  pass->pruned = c->model->config.pruned;
  for (s = 0; s < pass->S; ++s)
    pass->longest =
        moe__max(pass->longest, pass->batch->seq_start[s + 1] - pass->batch->seq_start[s]);
}

/* A copy of an array in what will be uploaded; returns where it will be. */
static const void *moe__stage(const moe__on *on, size_t *used, const void *data, size_t count,
                              size_t size) {
  size_t at = *used;
  if (!data) return NULL;
  memcpy(on->stage + at, data, count * size);
  *used = (at + count * size + 63) & ~(size_t)63;
  return on->staged + at;
}

/* The same arrays on the device: one upload. */
static moe_status moe__pass_upload(const moe_context *c, moe__pass *pass) {
  const moe__on *on = &c->device;
  const moe_config *config = &c->model->config;
  const moe_backend *b = on->env.backend;
  moe_batch *seen = &pass->seen;
  size_t used = 0, S = (size_t)pass->S, M = (size_t)pass->M,
         cells = (size_t)config->layers * (size_t)config->experts,
         slots = (size_t)config->layers * M * (size_t)config->top_k,
         width = (size_t)config->feature_dim;
  int keys = pass->dropout > 0 || pass->jitter > 0, gates = moe__has_gates(config);
  seen->seq_start = (const int32_t *)moe__stage(on, &used, seen->seq_start, S + 1, 4);
  seen->ids = (const int32_t *)moe__stage(on, &used, seen->ids, M, 4);
  seen->features = (const float *)moe__stage(on, &used, seen->features, M * width, 4);
  seen->segments = (const uint8_t *)moe__stage(on, &used, seen->segments, M, 1);
  seen->task = (const int32_t *)moe__stage(on, &used, seen->task, S, 4);
  seen->label = (const float *)moe__stage(on, &used, c->limits.training ? seen->label : NULL, S, 4);
  seen->weight =
      (const float *)moe__stage(on, &used, c->limits.training ? seen->weight : NULL, S, 4);
  seen->span = (const int32_t *)moe__stage(on, &used, seen->span, 4 * S, 4);
  seen->index = NULL;
  pass->gate_of = (const int32_t *)moe__stage(on, &used, pass->gate_of, S, 4);
  pass->keys = (const uint64_t *)moe__stage(on, &used, keys ? pass->keys : NULL,
                                            moe__key_rows(config) * S, 8);
  pass->forced = (const int32_t *)moe__stage(on, &used, gates ? pass->forced : NULL, slots, 4);
  pass->masked = (const uint8_t *)moe__stage(on, &used, gates ? pass->masked : NULL, cells, 1);
  pass->pruned = (const uint8_t *)moe__stage(on, &used, gates ? pass->pruned : NULL, cells, 1);
  if (c->model->newer && c->model->device.stream != on->env.stream) {
    moe_status status = b->sync(b, &c->model->device); /* a step of a trainer on another queue */
    if (status) return status;
  }
  return b->upload(b, &on->env, on->staged, on->stage, used);
}

/* Everything that ops read besides weights and activations. */
static moe_status moe__pass_prepare(moe_context *c, moe__pass *pass) {
  const moe_config *config = &c->model->config;
  const int32_t *task = pass->batch->task;
  int32_t s, l, own = config->router == MOE_ROUTER_TASK || config->router == MOE_ROUTER_EMBEDDING;
  for (s = 0; s < pass->S; ++s) c->gate_of[s] = own ? task[s] : 0;
  for (l = 0; l < config->layers; ++l) c->routes[l].M = pass->M;
  if (config->unit == MOE_UNIT_FFN && !moe__has_gates(config))
    for (l = 0; l < config->layers; ++l) c->routes[l].start[1] = pass->M;
  if (c->has_gate) {
    memset(c->has_gate, 0, (size_t)c->model->T);
    for (s = 0; s < pass->S; ++s) c->has_gate[task[s]] = 1;
  }
  moe__experts_tables_make(c, pass);
  if (pass->dropout > 0) {
    moe__keys_make(c, pass, MOE__SITE_EMBEDDING, 0);
    moe__keys_make(c, pass, MOE__SITE_HEAD, 0);
  }
  for (l = 0; l < moe__block_count(config); ++l) {
    if (pass->dropout > 0) {
      moe__keys_make(c, pass, MOE__SITE_ATTENTION, l);
      moe__keys_make(c, pass, MOE__SITE_ATTENTION_OUT, l);
      moe__keys_make(c, pass, MOE__SITE_FFN_OUT, l);
    }
    if (pass->jitter > 0) moe__keys_make(c, pass, MOE__SITE_JITTER, l);
  }
  for (l = 0; l < config->layers && MOE__BLOCKS(config) && pass->tau > 0; ++l)
    moe__keys_make(c, pass, MOE__SITE_GUMBEL, l);
  moe__pass_see(c, pass);
  return MOE__BACKEND(&c->device.env) ? moe__pass_upload(c, pass) : MOE_OK;
}

/* Zeros in the arena. */
MOE__UNUSED static void moe__arena_clear(const moe_context *c, void *p, size_t bytes) {
  const moe_backend *b = c->device.env.backend;
  if (b)
    b->clear(b, &c->device.env, p, bytes);
  else
    memset(p, 0, bytes);
}

/* ---- a pass: forward and backward of a batch ---- >>pass
   The sections from here on have the order of the paper: embeddings, the L blocks (attention,
   add & norm, experts, add & norm), heads, losses. Each backward function follows its forward
   function: context->g holds the gradient of what forward wrote and becomes the gradient of what
   forward read. The gradients of the weights are added to `dw`, which mirrors the flat array of
   weights. Only >>schedule decides which thread computes which rows.
   Ops return a status, which a pass ignores: sizes were checked before it began, and a device
   reports its failures when the host next waits for it. */

/* The rows that a step works on: all of a batch, a micro-batch (some of its sequences), or a row
   range (regardless of where sequences begin and end; S and seq_start are then those of the
   batch). */
typedef struct moe__view {
  const moe__pass *pass;
  moe_env env;
  const int32_t *seq_start; /* (S+1) */
  int32_t S, M;             /* sequences, rows */
  size_t row;               /* the first of the rows, in arrays with a row for each token */
  size_t work;              /* and in those that views may overwrite for each other */
  int range;                /* 1: a row range */
  const uint64_t *keys;     /* of the first sequence at site key_row; key_stride to the next site */
  size_t key_row, key_stride;
  float *attention_scratch;
} moe__view;

static moe__view moe__view_all(const moe_context *c, const moe__pass *pass) {
  moe__view v;
  memset(&v, 0, sizeof v);
  v.pass = pass;
  v.env = *pass->env;
  v.seq_start = pass->seen.seq_start;
  v.S = pass->S;
  v.M = pass->M;
  v.keys = pass->keys;
  v.key_stride = (size_t)pass->S;
  v.attention_scratch = c->attention_scratch;
  return v;
}

/* Keys of the random numbers of each sequence at a site; NULL if p is 0, which needs no keys. */
static const uint64_t *moe__view_keys(const moe_context *c, const moe__view *v, float p,
                                      uint32_t site, int32_t layer) {
  size_t row = moe__key_row(&c->model->config, site, layer);
  return p > 0 ? v->keys + (row - v->key_row) * v->key_stride : NULL;
}

/* The steps of a block, in their order. */
enum {
  MOE__STEP_QKV = 1,         /* 1. attention: queries, keys and values, */
  MOE__STEP_ATTENTION = 2,   /*    which attention reads across rows */
  MOE__STEP_ADD_NORM_1 = 4,  /* 2. add & norm */
  MOE__STEP_GATE = 8,        /* 3. experts: gate and dispatch, which read all rows of the batch, */
  MOE__STEP_EXPERTS = 16,    /*    experts and combine */
  MOE__STEP_ADD_NORM_2 = 32, /* 4. add & norm */
  MOE__STEPS_BEFORE_GATE = MOE__STEP_QKV | MOE__STEP_ATTENTION | MOE__STEP_ADD_NORM_1,
  MOE__STEPS_FROM_GATE = MOE__STEP_GATE | MOE__STEP_EXPERTS | MOE__STEP_ADD_NORM_2,
  MOE__STEPS = MOE__STEPS_BEFORE_GATE | MOE__STEPS_FROM_GATE
};

/* The parts, in the order of the file. */
static void moe__embeddings_forward(moe_context *c, const moe__view *v);
static void moe__block_forward(moe_context *c, const moe__view *v, int32_t layer, int steps);
static void moe__heads_forward(moe_context *c, const moe__pass *pass, float *scores, float *losses);
static void moe__schedule_layers(moe_context *c, const moe__view *all);
static void moe__task_router_forward(moe_context *c, const moe__pass *pass);
static void moe__blocks_forward(moe_context *c, const moe__view *all, int32_t layer);

/* Scores of every sequence, and their losses unless NULL. */
static moe_status moe__forward(moe_context *c, moe__pass *pass, float *scores, float *losses) {
  moe__view all;
  moe_status status;
  int32_t l;
  if (pass->S == 0) {
    moe__routes_clear(c);
    return MOE_OK;
  }
  status = moe__pass_prepare(c, pass);
  if (status) return status;
  all = moe__view_all(c, pass);
  moe__embeddings_forward(c, &all);
  if (!MOE__BLOCKS(&c->model->config))
    moe__schedule_layers(c, &all); /* runs moe__block_forward for every layer */
  else {
    moe__task_router_forward(c, pass);
    for (l = 0; l < c->model->config.layers; ++l) moe__blocks_forward(c, &all, l);
  }
  moe__heads_forward(c, pass, scores, losses);
  return MOE_OK;
}

#ifndef MOE_NO_TRAIN
static void moe__embeddings_backward(moe_context *c, const moe__view *v, float *dw);
static void moe__block_backward(moe_context *c, const moe__view *v, float *dw, int32_t layer);
static void moe__heads_backward(moe_context *c, const moe__pass *pass, float *dw);
static void moe__task_router_backward(moe_context *c, const moe__pass *pass, float *dw);
static void moe__blocks_backward(moe_context *c, const moe__view *all, float *dw, int32_t layer);

static void moe__layer_backward(moe_context *c, const moe__view *all, float *dw, int32_t l) {
  if (!MOE__BLOCKS(&c->model->config))
    moe__block_backward(c, all, dw, l);
  else
    moe__blocks_backward(c, all, dw, l);
}

/* Tells the caller that the gradients of a layer are complete; layer -1: all the others. */
static void moe__backward_ready(const moe_context *c, const moe__pass *pass, int32_t layer) {
  const moe_model *m = c->model;
  const moe_train_config *train = pass->train;
  size_t begin = m->plan.in[MOE__FLOATS_ALL].layers, end = m->plan.in[MOE__FLOATS_ALL].tasks;
  int32_t blocks = moe__layer_blocks(&m->config);
  if (!train || !train->ready) return;
  if (layer < 0) {
    train->ready(train->ready_user, 0, begin);
    if (m->plan.total > end) train->ready(train->ready_user, end, m->plan.total - end);
    return;
  }
  begin = moe__at(m, MOE__QUERY_W, layer * blocks, 0);
  if (layer + 1 < m->config.layers) end = moe__at(m, MOE__QUERY_W, (layer + 1) * blocks, 0);
  train->ready(train->ready_user, begin, end - begin);
}

/* Adds the gradients of the sum of the losses / batch_size to dw. */
static void moe__backward(moe_context *c, const moe__pass *pass, float *dw) {
  moe__view all = moe__view_all(c, pass);
  int empty = pass->S == 0;
  int32_t l;
  if (!empty) moe__heads_backward(c, pass, dw);
  for (l = c->model->config.layers - 1; l >= 0; --l) {
    if (!empty) moe__layer_backward(c, &all, dw, l);
    moe__backward_ready(c, pass, l);
  }
  if (MOE__BLOCKS(&c->model->config) && !empty) moe__task_router_backward(c, pass, dw);
  if (!empty) moe__embeddings_backward(c, &all, dw);
  moe__backward_ready(c, pass, -1);
}
#endif

MOE_API moe_status moe_forward(moe_context *context, float *scores, const moe_batch *batch,
                               const moe_env *env) {
  moe__pass pass;
  moe_status status = moe__pass_check(context, batch, 0, env);
  if (status) return status;
  moe__pass_begin(context, &pass, batch, env);
  if (!MOE__BACKEND(&context->device.env)) return moe__forward(context, &pass, scores, NULL);
  status = moe__forward(context, &pass, context->scores, NULL);
  if (status || pass.S == 0 || !context->model->T) return status;
  return pass.env->backend->download(pass.env->backend, pass.env, scores, context->scores,
                                     (size_t)pass.S * (size_t)context->model->max_classes *
                                         sizeof(float));
}

/* ---- embeddings ---- >>embeddings */

/* int8 word embeddings: dequantises the row of each token; a tile is 64 tokens. */
typedef struct moe__words {
  float *y;
  const int8_t *bytes;
  const float *scale;
  const int32_t *ids;
  size_t M, H;
} moe__words;

static void moe__words_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__words *words = (const moe__words *)arg;
  size_t i = (size_t)tile * 64, end = i + 64 < words->M ? i + 64 : words->M, j;
  (void)slot;
  for (; i < end; ++i) {
    size_t id = (size_t)words->ids[i];
    const int8_t *q = words->bytes + id * words->H;
    float *y = words->y + i * words->H, scale = words->scale[id];
    for (j = 0; j < words->H; ++j) y[j] = scale * (float)q[j];
  }
}

static void moe__words_dequantize(float *y, const moe_model *m, const int32_t *ids, int32_t M,
                                  const moe_env *env) {
  moe__words words;
  words.y = y;
  words.bytes = m->bytes + moe__place(m, MOE__BYTES_INT8, MOE__WORD, 0, 0);
  words.scale = m->weights + moe__at(m, MOE__WORD, 0, 0);
  words.ids = ids;
  words.M = (size_t)M;
  words.H = (size_t)m->config.hidden;
  moe__parallel(env, (M + 63) / 64, moe__words_tile, &words);
}

/* Input of the first layer. */
static float *moe__first_input(const moe_context *c) {
  return MOE__BLOCKS(&c->model->config) ? c->router.x[0] : c->acts[0].x;
}

/* The ops of both directions: sum of the embeddings, their LayerNorm, dropout. */
static moe_embed_op moe__embed_op(const moe_context *c, const moe__view *v) {
  const moe_model *m = c->model;
  const moe_batch *b = &v->pass->seen;
  moe_embed_op op;
  moe_embed_op_init(&op);
  op.x = c->limits.training ? c->sum0 : c->branch;
  op.ids = b->ids;
  op.segments = b->segments;
  if (!m->config.feature_dim && !MOE__INT8(m->plan.quantized))
    op.word = c->w + moe__at(m, MOE__WORD, 0, 0);
  op.position = c->w + moe__at(m, MOE__POSITION, 0, 0);
  op.segment = c->w + moe__at(m, MOE__SEGMENT, 0, 0);
  op.seq_start = v->seq_start;
  op.S = v->S;
  op.M = v->M;
  op.H = m->config.hidden;
  return op;
}

static moe_layernorm_op moe__embed_norm_op(const moe_context *c, const moe__view *v) {
  moe_layernorm_op op;
  moe_layernorm_op_init(&op);
  op.y = moe__first_input(c);
  op.mean = c->mean0;
  op.rstd = c->rstd0;
  op.x = c->limits.training ? c->sum0 : c->branch;
  op.gamma = c->w + moe__at(c->model, MOE__NORM0_W, 0, 0);
  op.beta = c->w + moe__at(c->model, MOE__NORM0_B, 0, 0);
  op.eps = c->model->config.eps;
  op.M = v->M;
  op.H = c->model->config.hidden;
  return op;
}

static moe_dropout_op moe__embed_dropout_op(const moe_context *c, const moe__view *v, float *x) {
  moe_dropout_op op;
  moe_dropout_op_init(&op);
  op.x = op.y = x;
  op.dropout = v->pass->dropout;
  op.keys = moe__view_keys(c, v, op.dropout, MOE__SITE_EMBEDDING, 0);
  op.seq_start = v->seq_start;
  op.S = v->S;
  op.M = v->M;
  op.H = c->model->config.hidden;
  return op;
}

/* The linear layer of feature inputs, in place of word embeddings. */
static moe_linear_op moe__features_op(const moe_context *c, const moe__view *v) {
  const moe_config *config = &c->model->config;
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.y = c->limits.training ? c->sum0 : c->branch;
  op.x = v->pass->seen.features;
  op.w = moe_mat_rows(c->w + moe__at(c->model, MOE__FEATURE_W, 0, 0), config->hidden,
                      config->feature_dim);
  op.b = c->w + moe__at(c->model, MOE__FEATURE_B, 0, 0);
  op.M = v->M;
  return op;
}

/* x = dropout(LayerNorm(word or feature + position + segment)). */
static void moe__embeddings_forward(moe_context *c, const moe__view *v) {
  moe_embed_op embed = moe__embed_op(c, v);
  moe_layernorm_op norm = moe__embed_norm_op(c, v);
  if (c->model->config.feature_dim) {
    moe_linear_op linear = moe__features_op(c, v);
    moe_env fp32 = moe__in_fp32(&v->env);
    moe_linear_forward(&linear, &fp32);
  } else if (MOE__INT8(c->model->plan.quantized))
    moe__words_dequantize(embed.x, c->model, embed.ids, v->M, &v->env);
  moe_embed_forward(&embed, &v->env);
  moe_layernorm_forward(&norm, &v->env);
  if (v->pass->dropout > 0) {
    moe_dropout_op drop = moe__embed_dropout_op(c, v, norm.y);
    moe_dropout_forward(&drop, &v->env);
  }
  moe__profile_end(&v->env, MOE_PROFILE_EMBEDDINGS);
}

#ifndef MOE_NO_TRAIN
static void moe__embeddings_backward(moe_context *c, const moe__view *v, float *dw) {
  const moe_model *m = c->model;
  moe_embed_op embed = moe__embed_op(c, v);
  moe_layernorm_op norm = moe__embed_norm_op(c, v);
  if (v->pass->dropout > 0) {
    moe_dropout_op drop = moe__embed_dropout_op(c, v, c->g);
    moe_dropout_forward(&drop, &v->env);
  }
  norm.dx = c->gsum;
  norm.dgamma = dw + moe__at(m, MOE__NORM0_W, 0, 0);
  norm.dbeta = dw + moe__at(m, MOE__NORM0_B, 0, 0);
  norm.dy = c->g;
  norm.overwrite = 1;
  moe_layernorm_backward(&norm, &v->env);
  if (m->config.feature_dim) {
    moe_linear_op linear = moe__features_op(c, v);
    moe_env fp32 = moe__in_fp32(&v->env);
    linear.dw = dw + moe__at(m, MOE__FEATURE_W, 0, 0);
    linear.db = dw + moe__at(m, MOE__FEATURE_B, 0, 0);
    linear.dy = c->gsum;
    moe_linear_backward(&linear, &fp32);
  }
  embed.dword = m->config.feature_dim ? NULL : dw + moe__at(m, MOE__WORD, 0, 0);
  embed.dposition = dw + moe__at(m, MOE__POSITION, 0, 0);
  embed.dsegment = dw + moe__at(m, MOE__SEGMENT, 0, 0);
  embed.dx = c->gsum;
  moe_embed_backward(&embed, &v->env);
  moe__profile_end(&v->env, MOE_PROFILE_EMBEDDINGS_BACK);
}
#endif

/* ---- a transformer block ---- >>block
   [TaG] 2, 3.1: post-LN, as in BERT, with the feed-forward network of BERT as one of N experts.
     y1 = LayerNorm(x + dropout(attention(x)))
     y  = LayerNorm(y1 + dropout(sum over the chosen experts i of g_i E_i(y1)))
   A dense model has one expert and no gate. */

/* A block and its arrays during a pass. */
typedef struct moe__block {
  moe_context *c;
  const moe__view *v;
  int32_t layer; /* its number among all blocks of the model */
  moe__acts a;   /* its activations, from the view's first row on */
  float *y;      /* (M, H) its output */
  float *branch; /* (M, H) output of attention or experts */
  float *dw;     /* gradients of the flat array; backward */
} moe__block;

/* A weight of the block, MOE__QUERY_W, ..., and its gradient. */
static const float *moe__w(const moe__block *b, int id) {
  return b->c->w + moe__at(b->c->model, id, b->layer, 0);
}
MOE__UNUSED static float *moe__dw(const moe__block *b, int id) {
  return b->dw + moe__at(b->c->model, id, b->layer, 0);
}

/* Output of a block: the input of the next layer's, or that of an expert [TL]. */
static float *moe__block_output(const moe_context *c, int32_t layer) {
  if (MOE__BLOCKS(&c->model->config)) return c->router.y[layer];
  return layer + 1 < c->model->config.layers ? c->acts[layer + 1].x : c->last;
}

static moe__block moe__block_make(moe_context *c, const moe__view *v, int32_t layer, float *dw) {
  const moe_config *config = &c->model->config;
  size_t H = (size_t)config->hidden, row = v->row;
  moe__block b;
  b.c = c;
  b.v = v;
  b.layer = layer;
  b.dw = dw;
  b.y = moe__block_output(c, layer) + row * H;
  b.branch = c->branch + v->work * H;
  b.a = c->acts[layer];
  b.a.x += row * H;
  b.a.qkv += v->work * 3 * H;
  b.a.att += v->work * H;
  b.a.y1 += (moe__has_gates(config) ? row : v->work) * H; /* gates read the rows of all views */
  if (!c->limits.training) return b;
  b.a.stats += row * 2 * (size_t)config->heads;
  b.a.sum1 += row * H;
  b.a.mean1 += row;
  b.a.rstd1 += row;
  b.a.pre += row * (size_t)config->ffn; /* of a dense block, which has as many rows as tokens */
  b.a.sum2 += row * H;
  b.a.mean2 += row;
  b.a.rstd2 += row;
  return b;
}

static void moe__qkv_forward(const moe__block *b);
static void moe__attention_step_forward(const moe__block *b);
static void moe__add_norm_forward(const moe__block *b, int second);
static void moe__gate_forward(const moe__block *b);
static void moe__experts_step_forward(const moe__block *b);

/* The given steps of a block (MOE__STEP_), for the rows of a view. */
static void moe__block_forward(moe_context *c, const moe__view *v, int32_t layer, int steps) {
  moe__block b = moe__block_make(c, v, layer, NULL);
  /* 1. attention */
  if (steps & MOE__STEP_QKV) moe__qkv_forward(&b);
  if (steps & MOE__STEP_ATTENTION) moe__attention_step_forward(&b);
  /* 2. add & norm */
  if (steps & MOE__STEP_ADD_NORM_1) moe__add_norm_forward(&b, 0);
  /* 3. gate, dispatch, experts, combine */
  if (steps & MOE__STEP_GATE) moe__gate_forward(&b);
  if (steps & MOE__STEP_EXPERTS) moe__experts_step_forward(&b);
  /* 4. add & norm */
  if (steps & MOE__STEP_ADD_NORM_2) moe__add_norm_forward(&b, 1);
}

#ifndef MOE_NO_TRAIN
static void moe__qkv_backward(const moe__block *b);
static void moe__attention_step_backward(const moe__block *b);
static void moe__add_norm_backward(const moe__block *b, int second);
static void moe__gate_backward(const moe__block *b);
static void moe__experts_step_backward(const moe__block *b);

/* All steps for all rows: context->g, the gradient of the output, becomes that of the input. After
   add & norm, context->g is the gradient of the residual input and context->gsum that of the
   branch. */
static void moe__block_backward(moe_context *c, const moe__view *v, float *dw, int32_t layer) {
  moe__block b = moe__block_make(c, v, layer, dw);
  /* 4. add & norm */
  moe__add_norm_backward(&b, 1);
  /* 3. combine, experts, dispatch, gate */
  moe__experts_step_backward(&b);
  moe__gate_backward(&b);
  /* 2. add & norm */
  moe__add_norm_backward(&b, 0);
  /* 1. attention */
  moe__attention_step_backward(&b);
  moe__qkv_backward(&b);
}
#endif

/* 1. Attention */

/* Queries, keys and values side by side: qkv = x W_qkv^T + b_qkv, W_qkv (3H, H). */
static moe_linear_op moe__qkv_op(const moe__block *b) {
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.y = b->a.qkv;
  op.x = b->a.x;
  op.b = moe__w(b, MOE__QUERY_B);
  op.M = b->v->M;
  return op;
}

static void moe__qkv_forward(const moe__block *b) {
  moe_linear_op op = moe__qkv_op(b);
  op.w = moe__mat(b->c->model, MOE__QUERY_W, b->layer, 0, b->v->M, &b->v->env);
  moe_linear_forward(&op, &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_PROJECTIONS);
}

#ifndef MOE_NO_TRAIN
static void moe__qkv_backward(const moe__block *b) {
  int32_t H = b->c->model->config.hidden;
  moe_linear_op op = moe__qkv_op(b);
  op.w = moe_mat_rows(moe__w(b, MOE__QUERY_W), 3 * H, H);
  op.w_back = moe__mat_back(b->c->model, MOE__QUERY_W, b->layer, 0, &b->v->env);
  op.dx = b->c->g;
  op.dw = moe__dw(b, MOE__QUERY_W);
  op.db = moe__dw(b, MOE__QUERY_B);
  op.dy = b->c->gqkv;
  moe_linear_backward(&op, &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_PROJECTIONS_BACK);
}
#endif

/* att = attention of each sequence, branch = att W_att^T + b_att. A row range reads keys and values
   of other ranges: its op covers all rows, but computes only its own. */
static moe_attention_op moe__attention_op(const moe__block *b) {
  const moe__view *v = b->v;
  const moe__acts *all = &b->c->acts[b->layer];
  moe_attention_op op;
  moe_attention_op_init(&op);
  op.y = v->range ? all->att : b->a.att;
  op.stats = b->a.stats;
  op.qkv = v->range ? all->qkv : b->a.qkv;
  op.dropout = v->pass->dropout;
  op.keys = moe__view_keys(b->c, v, op.dropout, MOE__SITE_ATTENTION, b->layer);
  op.seq_start = v->seq_start;
  op.S = v->S;
  op.M = v->range ? v->pass->M : v->M;
  op.H = b->c->model->config.hidden;
  op.A = b->c->model->config.heads;
  if (MOE__BACKEND(&b->c->device.env)) op.longest = v->pass->longest;
  op.scratch = v->attention_scratch;
  return op;
}

static moe_linear_op moe__attention_out_op(const moe__block *b) {
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.y = b->branch;
  op.x = b->a.att;
  op.b = moe__w(b, MOE__ATTENTION_B);
  op.M = b->v->M;
  return op;
}

static void moe__attention_step_forward(const moe__block *b) {
  const moe__view *v = b->v;
  moe_attention_op attention = moe__attention_op(b);
  moe_linear_op out = moe__attention_out_op(b);
  if (v->range)
    moe__cpu_attention_rows(&attention, (int32_t)v->row, (int32_t)v->row + v->M, &v->env);
  else
    moe_attention_forward(&attention, &v->env);
  moe__profile_end(&v->env, MOE_PROFILE_ATTENTION);
  out.w = moe__mat(b->c->model, MOE__ATTENTION_W, b->layer, 0, v->M, &v->env);
  moe_linear_forward(&out, &v->env);
  moe__profile_end(&v->env, MOE_PROFILE_PROJECTIONS);
}

#ifndef MOE_NO_TRAIN
static void moe__attention_step_backward(const moe__block *b) {
  int32_t H = b->c->model->config.hidden;
  moe_attention_op attention = moe__attention_op(b);
  moe_linear_op out = moe__attention_out_op(b);
  out.w = moe_mat_rows(moe__w(b, MOE__ATTENTION_W), H, H);
  out.w_back = moe__mat_back(b->c->model, MOE__ATTENTION_W, b->layer, 0, &b->v->env);
  out.dx = b->c->gatt;
  out.dw = moe__dw(b, MOE__ATTENTION_W);
  out.db = moe__dw(b, MOE__ATTENTION_B);
  out.dy = b->c->gsum;
  out.overwrite = 1;
  moe_linear_backward(&out, &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_PROJECTIONS_BACK);
  attention.dqkv = b->c->gqkv;
  attention.dy = b->c->gatt;
  attention.overwrite = 1;
  moe_attention_backward(&attention, &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_ATTENTION_BACK);
}
#endif

/* 2. and 4. Add & norm */

/* sum = x + dropout(branch), y = LayerNorm(sum): after attention (second 0), after the experts. */
static moe_layernorm_op moe__add_norm_op(const moe__block *b, int second) {
  const moe_model *m = b->c->model;
  const moe__view *v = b->v;
  moe_layernorm_op op;
  moe_layernorm_op_init(&op);
  op.y = second ? b->y : b->a.y1;
  op.sum = second ? b->a.sum2 : b->a.sum1;
  op.mean = second ? b->a.mean2 : b->a.mean1;
  op.rstd = second ? b->a.rstd2 : b->a.rstd1;
  op.x = second ? b->a.y1 : b->a.x;
  op.delta = b->branch;
  op.gamma = moe__w(b, second ? MOE__NORM2_W : MOE__NORM1_W);
  op.beta = moe__w(b, second ? MOE__NORM2_B : MOE__NORM1_B);
  op.eps = m->config.eps;
  op.dropout = v->pass->dropout;
  op.keys = moe__view_keys(b->c, v, op.dropout,
                           second ? MOE__SITE_FFN_OUT : MOE__SITE_ATTENTION_OUT, b->layer);
  op.seq_start = v->seq_start;
  op.S = v->S;
  op.M = v->M;
  op.H = m->config.hidden;
  return op;
}

static void moe__add_norm_forward(const moe__block *b, int second) {
  moe_layernorm_op op = moe__add_norm_op(b, second);
  moe_layernorm_forward(&op, &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_NORMS);
}

#ifndef MOE_NO_TRAIN
static void moe__add_norm_backward(const moe__block *b, int second) {
  moe_layernorm_op op = moe__add_norm_op(b, second);
  op.dx = b->c->g;
  op.ddelta = b->c->gsum;
  op.dgamma = moe__dw(b, second ? MOE__NORM2_W : MOE__NORM1_W);
  op.dbeta = moe__dw(b, second ? MOE__NORM2_B : MOE__NORM1_B);
  op.dy = b->c->g;
  op.overwrite = 1;
  moe_layernorm_backward(&op, &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_NORMS_BACK);
}
#endif

/* ---- 3. of a block: gate, dispatch, experts, combine ---- >>block_experts */

static moe_route_options moe__gate_options(const moe__block *b) {
  const moe_config *config = &b->c->model->config;
  const moe__pass *pass = b->v->pass;
  size_t layer = (size_t)b->layer, N = (size_t)config->experts;
  moe_route_options o;
  moe_route_options_init(&o);
  if (config->gate_scale_n) o.scale = (float)config->experts / (float)config->top_k;
  o.renormalize = config->renormalize;
  o.balance = pass->balance;
  o.z_loss = pass->z_loss;
  o.jitter = pass->jitter;
  o.keys = moe__view_keys(b->c, b->v, pass->jitter, MOE__SITE_JITTER, b->layer);
  if (pass->forced) o.forced = pass->forced + layer * (size_t)pass->M * (size_t)config->top_k;
  if (pass->masked) o.masked = pass->masked + layer * N;
  if (pass->pruned) o.pruned = pass->pruned + layer * N;
  return o;
}

static const float *moe__gates_forward(moe_context *c, const float *basis,
                                       const moe_env *env); /* >>task_gates */

/* Gate and dispatch [TaG] Eq. 3-5: a gate for each task, or one for all. */
static moe_route_op moe__gate_op(const moe__block *b) {
  const moe_model *m = b->c->model;
  moe_route_op op;
  moe_route_op_init(&op);
  op.routes = &b->c->routes[b->layer];
  op.logits = b->a.logits;
  op.loss = b->c->aux ? b->c->aux + b->layer : NULL;
  op.x = b->a.y1;
  op.gates = moe__gates_forward(b->c, moe__w(b, MOE__GATES), &b->v->env);
  op.gate_of = b->v->pass->gate_of;
  op.seq_start = b->v->seq_start;
  op.S = b->v->S;
  op.H = m->config.hidden;
  op.G = m->config.router == MOE_ROUTER_SHARED ? 1 : m->T;
  op.options = moe__gate_options(b);
  return op;
}

static void moe__gate_forward(const moe__block *b) {
  moe_route_op op;
  if (!moe__has_gates(&b->c->model->config)) return;
  op = moe__gate_op(b);
  moe_route_forward(&op, &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_GATES);
}

#ifndef MOE_NO_TRAIN
static float *moe__gates_gradient(moe_context *c, float *own);
static void moe__gates_backward(moe_context *c, float *dvectors, float *dbasis, const float *basis,
                                const moe_env *env);

/* The losses of the gates count as moe__losses_sum says. */
static void moe__gate_backward(const moe__block *b) {
  const moe_model *m = b->c->model;
  const moe__pass *pass = b->v->pass;
  float *dgates;
  moe_route_op op;
  if (!moe__has_gates(&m->config)) return;
  op = moe__gate_op(b);
  dgates = moe__dw(b, MOE__GATES);
  op.dx = b->c->g;
  op.dgates = moe__gates_gradient(b->c, dgates);
  op.dlogits = b->c->glogits;
  op.dweight = b->c->gweight;
  op.loss_scale = (float)pass->S / (float)pass->batch_size;
  moe_route_backward(&op, &b->v->env);
  if (op.dgates != dgates)
    moe__gates_backward(b->c, moe__dw(b, MOE__TASK_VECTORS), dgates, moe__w(b, MOE__GATES),
                        &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_GATES_BACK);
}
#endif

/* Experts and combine [TaG] Eq. 1, 2, 6. Without a gate every token goes to the only expert, and no
   routes are needed. */
static moe_experts_op moe__experts_op(const moe__block *b) {
  const moe_config *config = &b->c->model->config;
  const moe__experts_tables *t = &b->c->experts;
  size_t first = (size_t)b->layer * (size_t)moe__block_experts(config);
  moe_experts_op op;
  moe_experts_op_init(&op);
  op.y = b->branch;
  op.pre = b->a.pre;
  op.e = b->a.e;
  op.x = b->a.y1;
  op.routes = moe__has_gates(config) ? &b->c->routes[b->layer] : NULL;
  op.M = b->v->M;
  op.in = t->in + first;
  op.out = t->out + first;
  op.b_in = t->b_in + first;
  op.b_out = t->b_out + first;
  op.N = moe__block_experts(config);
  op.H = config->hidden;
  op.F = config->ffn;
  op.scratch = b->c->experts_scratch +
               b->v->work * moe_experts_scratch(1, 1, op.H, op.F, b->c->limits.training);
  return op;
}

static void moe__experts_step_forward(const moe__block *b) {
  moe_experts_op op = moe__experts_op(b);
  moe_experts_forward(&op, &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_EXPERTS);
}

#ifndef MOE_NO_TRAIN
/* Weights and gradients of a block's experts; a pruned one has neither. */
static void moe__experts_tables_back(const moe__block *b) {
  const moe_model *m = b->c->model;
  moe__experts_tables *t = &b->c->experts;
  int32_t i, l = b->layer;
  for (i = 0; i < moe__block_experts(&m->config); ++i) {
    size_t in = moe__at(m, MOE__IN_W, l, i), out = moe__at(m, MOE__OUT_W, l, i);
    if (moe__is_pruned(m, l, i)) {
      t->in_back[i] = t->out_back[i] = moe_mat_rows(NULL, 0, 0);
      t->w_in[i] = t->w_out[i] = NULL;
      t->d_in[i] = t->d_b_in[i] = t->d_out[i] = t->d_b_out[i] = NULL;
      continue;
    }
    t->in_back[i] = moe__mat_back(m, MOE__IN_W, l, i, &b->v->env);
    t->out_back[i] = moe__mat_back(m, MOE__OUT_W, l, i, &b->v->env);
    t->w_in[i] = b->c->w + in;
    t->w_out[i] = b->c->w + out;
    t->d_in[i] = b->dw + in;
    t->d_b_in[i] = b->dw + moe__at(m, MOE__IN_B, l, i);
    t->d_out[i] = b->dw + out;
    t->d_b_out[i] = b->dw + moe__at(m, MOE__OUT_B, l, i);
  }
}

static void moe__experts_step_backward(const moe__block *b) {
  const moe__experts_tables *t = &b->c->experts;
  moe_experts_op op = moe__experts_op(b);
  moe__experts_tables_back(b);
  op.dx = b->c->g;
  op.dweight = b->c->gweight;
  op.d_in = t->d_in;
  op.d_b_in = t->d_b_in;
  op.d_out = t->d_out;
  op.d_b_out = t->d_b_out;
  op.dy = b->c->gsum;
  op.w_in = t->w_in;
  op.w_out = t->w_out;
  op.in_back = t->in_back;
  op.out_back = t->out_back;
  moe_experts_backward(&op, &b->v->env);
  moe__profile_end(&b->v->env, MOE_PROFILE_EXPERTS_BACK);
}
#endif

/* ---- gates made of task vectors ---- >>task_gates
   [TaG] A.4 leaves routing that related tasks share through learned task embeddings as future work;
   here it is W_{g,t} = sum_j z_{t,j} B_j, with a basis B (r, N, H) in each layer and one vector z_t
   (r) for a task: T r + L r N H numbers instead of L T N H. Each pass computes the gates of a layer
   again, only for the tasks of the batch: r N H multiplications a task, far fewer than the
   attention of a single token. The gradients of the gates are summed over a pass before those of z
   and B are computed from them. So micro-batches differ from one batch in the last bits; no other
   router does so in fp32. */

/* The gates (T, N, H) of a layer from its tensor: the tensor itself, or gates computed from it.
   Forward and backward use the same. */
static const float *moe__gates_forward(moe_context *c, const float *basis, const moe_env *env) {
  const moe_model *m = c->model;
  const moe__mix_kernels *mix = MOE__V_PICK(env->isa, mix);
  size_t gate = (size_t)m->config.experts * (size_t)m->config.hidden, r = (size_t)m->config.rank, j;
  int32_t t;
  if (!c->gates) return basis;
  for (t = 0; t < m->T; ++t) {
    const float *z = m->weights + moe__at(m, MOE__TASK_VECTORS, 0, 0) + (size_t)t * r;
    float *to = c->gates + (size_t)t * gate;
    if (!c->has_gate[t]) continue;
    mix->scale(to, z[0], basis, gate);
    for (j = 1; j < r; ++j) mix->axpy(to, z[j], basis + j * gate, gate);
  }
  return c->gates;
}

#ifndef MOE_NO_TRAIN
/* Where the gradients of the gates are summed: in the tensor's own, or in scratch for
   moe__gates_backward. */
static float *moe__gates_gradient(moe_context *c, float *own) {
  size_t gate = (size_t)c->model->config.experts * (size_t)c->model->config.hidden;
  int32_t t;
  if (!c->dgates) return own;
  for (t = 0; t < c->model->T; ++t)
    if (c->has_gate[t]) memset(c->dgates + (size_t)t * gate, 0, gate * sizeof(float));
  return c->dgates;
}

/* dz_{t,j} += <dW_t, B_j>, dB_j += sum_t z_{t,j} dW_t. */
static void moe__gates_backward(moe_context *c, float *dvectors, float *dbasis, const float *basis,
                                const moe_env *env) {
  const moe_model *m = c->model;
  const moe__mix_kernels *mix = MOE__V_PICK(env->isa, mix);
  const moe__row_kernels *rows = MOE__V_PICK(env->isa, rows);
  size_t gate = (size_t)m->config.experts * (size_t)m->config.hidden, r = (size_t)m->config.rank, j;
  int32_t t;
  for (t = 0; t < m->T; ++t) {
    const float *z = m->weights + moe__at(m, MOE__TASK_VECTORS, 0, 0) + (size_t)t * r,
                *d = c->dgates + (size_t)t * gate;
    if (!c->has_gate[t]) continue;
    for (j = 0; j < r; ++j) {
      dvectors[(size_t)t * r + j] += rows->dot(d, basis + j * gate, gate);
      mix->axpy(dbasis + j * gate, z[j], d, gate);
    }
  }
}
#endif

/* ---- heads and losses ---- >>heads
   The head of a task reads [CLS], the first token of its sequences, or [CLS; span 1; span 2], where
   a span is the mean of its tokens [TaG] Eq. 7 and 8, A.3.1. The softmax of Eq. 7 is in the losses
   (>>kinds), and in moe_predict_ for probabilities. One thread computes all sequences in order, so
   that a score does not depend on what else is in the batch. */

MOE_API void moe_heads_op_init(moe_heads_op *op) { memset(op, 0, sizeof *op); }

MOE_API size_t moe_heads_scratch(int32_t H) { return 6 * (size_t)moe__max(H, 0); }

/* Mean of the rows of the tokens [begin, end). */
static void moe__span_mean(float *out, const float *rows, int32_t begin, int32_t end, size_t H) {
  float scale = 1.0f / (float)(end - begin);
  size_t j;
  int32_t i;
  for (j = 0; j < H; ++j) {
    float sum = 0;
    for (i = begin; i < end; ++i) sum += rows[(size_t)i * H + j];
    out[j] = sum * scale;
  }
}

/* What the head of sequence s reads. Returns its width. */
static size_t moe__head_feature(const moe_heads_op *op, float *feature, int32_t s,
                                const moe_env *one) {
  int spans = moe__kind_of(&op->tasks[op->task[s]])->spans, i;
  size_t H = (size_t)op->H, width = H * (size_t)(1 + spans);
  const float *rows = op->hidden + (size_t)op->seq_start[s] * H;
  memcpy(feature, rows, H * sizeof(float));
  for (i = 0; i < spans; ++i) {
    const int32_t *span = op->span + 4 * (size_t)s + 2 * i;
    moe__span_mean(feature + (size_t)(i + 1) * H, rows, span[0], span[1], H);
  }
  if (op->keys && op->dropout > 0)
    moe_dropout(feature, feature, width, op->dropout, op->keys[s], one);
  return width;
}

/* The linear layer of the head of sequence s. */
static moe_linear_op moe__head_op(const moe_heads_op *op, const float *feature, size_t width,
                                  int32_t s) {
  const moe_task *task = &op->tasks[op->task[s]];
  const float *w = op->w + op->head[op->task[s]];
  moe_linear_op linear;
  moe_linear_op_init(&linear);
  linear.y = op->scores + (size_t)s * (size_t)op->max_classes;
  linear.x = feature;
  linear.w = moe_mat_rows(w, task->classes, (int32_t)width);
  linear.b = w + (size_t)task->classes * width;
  linear.M = 1;
  return linear;
}

#ifndef MOE_NO_TRAIN
/* The loss of sequence s from its row of scores, which stays. */
static float moe__head_loss(const moe_heads_op *op, int32_t s, const float *scores) {
  const moe_task *task = &op->tasks[op->task[s]];
  float row[MOE_MAX_CLASSES];
  memcpy(row, scores, (size_t)task->classes * sizeof(float));
  return (op->weight ? op->weight[s] : 1) *
         moe__kind_of(task)->loss(NULL, row, op->label[s], task->classes, 1);
}
#endif

MOE_API moe_status moe_heads_forward(const moe_heads_op *op, const moe_env *env) {
  MOE__OFFER(env, heads, (env->backend, env, op, 0))
  moe_env one = moe__one_thread(env);
  int32_t s;
#ifdef MOE_NO_TRAIN
  if (op->losses)
    return moe__fail(env, MOE_E_UNSUPPORTED, "heads: this build has no losses (MOE_NO_TRAIN)");
#endif
  for (s = 0; s < op->S; ++s) {
    size_t width = moe__head_feature(op, op->scratch, s, &one);
    moe_linear_op linear = moe__head_op(op, op->scratch, width, s);
    memset(linear.y, 0, (size_t)op->max_classes * sizeof(float));
    moe_linear_forward(&linear, &one);
#ifndef MOE_NO_TRAIN
    if (op->losses) op->losses[s] = moe__head_loss(op, s, linear.y);
#endif
  }
  return MOE_OK;
}

#ifndef MOE_NO_TRAIN
/* Adds the gradient of what the head read to the rows it came from: dhidden += dfeature. */
static void moe__head_scatter(const moe_heads_op *op, const float *dfeature, int32_t s) {
  int spans = moe__kind_of(&op->tasks[op->task[s]])->spans, k;
  size_t H = (size_t)op->H, j;
  float *rows = op->dhidden + (size_t)op->seq_start[s] * H;
  for (j = 0; j < H; ++j) rows[j] += dfeature[j];
  for (k = 0; k < spans; ++k) {
    const float *d = dfeature + (size_t)(k + 1) * H;
    const int32_t *span = op->span + 4 * (size_t)s + 2 * k;
    float scale = 1.0f / (float)(span[1] - span[0]);
    int32_t i;
    for (i = span[0]; i < span[1]; ++i)
      for (j = 0; j < H; ++j) rows[(size_t)i * H + j] += scale * d[j];
  }
}

/* dscore (classes) of sequence s, whose scores are y. */
MOE__NOINLINE static void moe__head_dscore(const moe_heads_op *op, float *dscore, const float *y,
                                           int32_t s) {
  const moe_task *task = &op->tasks[op->task[s]];
  moe__loss loss = moe__kind_of(task)->loss;
  float row[MOE_MAX_CLASSES];
  int32_t c;
  memcpy(row, y, (size_t)task->classes * sizeof(float));
  memset(dscore, 0, (size_t)task->classes * sizeof(float));
  loss(NULL, row, op->label[s], task->classes, op->batch_size);
  loss(dscore, row, op->label[s], task->classes, op->batch_size);
  for (c = 0; op->weight && c < task->classes; ++c) dscore[c] *= op->weight[s];
}

MOE_API moe_status moe_heads_backward(const moe_heads_op *op, const moe_env *env) {
  MOE__OFFER(env, heads, (env->backend, env, op, 1))
  moe_env one = moe__one_thread(env);
  float *dfeature = op->scratch + 3 * (size_t)op->H, dscore[MOE_MAX_CLASSES];
  int32_t s;
  if (op->dhidden && op->overwrite)
    memset(op->dhidden, 0, (size_t)op->M * (size_t)op->H * sizeof(float));
  for (s = 0; s < op->S; ++s) {
    size_t width = moe__head_feature(op, op->scratch, s, &one);
    moe_linear_op linear = moe__head_op(op, op->scratch, width, s);
    moe__head_dscore(op, dscore, linear.y, s);
    linear.dx = op->dhidden ? dfeature : NULL;
    linear.dw = op->dw ? op->dw + ((const float *)linear.w.data - op->w) : NULL;
    linear.db = op->dw ? op->dw + (linear.b - op->w) : NULL;
    linear.dy = dscore;
    linear.overwrite = 1;
    moe_linear_backward(&linear, &one);
    if (!op->dhidden) continue;
    if (op->keys && op->dropout > 0)
      moe_dropout(dfeature, dfeature, width, op->dropout, op->keys[s], &one);
    moe__head_scatter(op, dfeature, s);
  }
  return MOE_OK;
}
#endif

/* The heads of a model. */
static moe_heads_op moe__heads_op(const moe_context *c, const moe__pass *pass, float *scores) {
  const moe_model *m = c->model;
  const moe_batch *b = &pass->seen;
  moe_heads_op op;
  moe_heads_op_init(&op);
  op.scores = scores;
  op.hidden = c->last;
  op.w = c->w;
  op.head = m->head;
  op.tasks = m->tasks;
  op.task = b->task;
  op.label = b->label;
  op.weight = b->weight;
  op.span = b->span;
  op.seq_start = b->seq_start;
  op.dropout = pass->dropout;
  if (pass->dropout > 0)
    op.keys = pass->keys + moe__key_row(&m->config, MOE__SITE_HEAD, 0) * (size_t)pass->S;
  op.S = pass->S;
  op.M = pass->M;
  op.H = m->config.hidden;
  op.T = m->T;
  op.max_classes = m->max_classes;
  op.scratch = c->heads_scratch;
  op.batch_size = pass->batch_size;
  return op;
}

static void moe__heads_forward(moe_context *c, const moe__pass *pass, float *scores,
                               float *losses) {
  moe_heads_op op = moe__heads_op(c, pass, scores);
  op.losses = losses;
  if (op.T) moe_heads_forward(&op, pass->env);
  moe__profile_end(pass->env, MOE_PROFILE_HEADS);
}

#ifndef MOE_NO_TRAIN
static void moe__heads_backward(moe_context *c, const moe__pass *pass, float *dw) {
  moe_heads_op op = moe__heads_op(c, pass, c->scores);
  op.dhidden = c->g;
  op.dw = dw;
  op.overwrite = 1;
  moe_heads_backward(&op, pass->env);
  moe__profile_end(pass->env, MOE_PROFILE_HEADS_BACK);
}

/* The losses of the last pass where the host can read them, those of the gates behind. */
static const float *moe__losses_read(const moe_context *c) {
  return MOE__BACKEND(&c->device.env) ? c->device.losses : c->losses;
}

/* The losses of the gates of all layers, balance and z-loss. */
static float moe__losses_aux(const moe_context *c, const moe__pass *pass) {
  const float *aux = moe__losses_read(c) + c->limits.sequences;
  float sum = 0;
  int32_t l;
  if (!moe__has_gates(&c->model->config) || pass->S == 0) return 0;
  for (l = 0; l < c->model->config.layers; ++l) sum += aux[l];
  return sum;
}

/* The first sequence whose loss is not finite, S if that is true of the gates' losses, or -1. */
static int32_t moe__losses_check(const moe_context *c, const moe__pass *pass) {
  int32_t s;
  for (s = 0; s < pass->S; ++s)
    if (!moe__is_finite(moe__losses_read(c)[s])) return s;
  return moe__is_finite(moe__losses_aux(c, pass)) ? -1 : pass->S;
}

/* What a micro-batch adds to the loss of the whole batch: the sum of its losses / batch_size, and
   the losses of its gates, which are means over its tokens, by its share S / batch_size of the
   sequences. Dividing a batch does not change the first, but changes the second: the balance loss
   counts choices within a micro-batch, and a mean of means depends on the division. */
static double moe__losses_sum(const moe_context *c, const moe__pass *pass) {
  double sum = 0;
  int32_t s;
  for (s = 0; s < pass->S; ++s) sum += (double)moe__losses_read(c)[s];
  return (sum + (double)moe__losses_aux(c, pass) * pass->S) / pass->batch_size;
}
#endif

/* ---- which thread computes which rows ---- >>schedule
   Nothing here changes a result. A model of feed-forward experts runs the blocks of all layers over
   the rows of a batch in one of three ways:

     MICRO-BATCHES  whole sequences, about 128 tokens each: the output of one product is still in
                    the second-level cache when the next one reads it. With several threads, each
                    takes its own micro-batches and runs without synchronising until the end. A
                    micro-batch runs through all steps that do not need the other micro-batches: all
                    layers of a dense model, and in an MoE layer the steps before the gate. On a
                    Xeon, 32 x 128: 5 % faster with one thread, 15 % with two.
     ROW RANGES     inference with too few sequences for the threads: each thread has an equal range
                    of the rows, regardless of where sequences begin and end. Only attention reads
                    rows of other ranges, and waits for them twice in a layer. Every core then reads
                    all weights, but no longer reads half of each product's input from the cache of
                    another core, which takes longer per byte. On a Xeon with two threads 1 x 32 is
                    6 % faster than with every product spread, 1 x 128 15 %; with int8 weights
                    1 x 16 is 16 % faster, 1 x 32 27 %.
     ALL ROWS       all other cases, and products by another library: all threads share every
                    product.

                      layer 0           layer 1           layer 2
     micro-batches    thread 0  ------------------------------------->   one after the other
                      thread 1  ------------------------------------->
     row ranges       thread 0  qkv | rest    qkv | rest    qkv | rest   | all wait for all
                      thread 1  qkv | rest    qkv | rest    qkv | rest */
enum {
  MOE__MICRO_BATCH = 128,      /* tokens */
  MOE__MICRO_BATCH_LEAST = 64, /* fewer are not worth a separate thread */
  MOE__ROW_RANGE_LEAST = 16,   /* with fewer rows each thread waits for weights, */
  MOE__ROW_RANGE_LEAST_I8 = 4  /* less so where they are bytes */
};

typedef struct moe__schedule {
  moe_context *c;
  const moe__view *all;
  int32_t count,
      most;       /* number of micro-batches or row ranges, tokens of the longest micro-batch */
  int ranges;     /* 1: row ranges */
  int alone;      /* 1: a thread takes each by itself; 0: all threads work on one at a time */
  int own_rows;   /* 1: each has its own rows in all arrays; 0: it uses its thread's, if not kept */
  size_t scratch; /* floats of attention's scratch of a thread */
  int32_t layer, end; /* what to run: the layers [layer, end), */
  int steps;          /* and these steps of each */
} moe__schedule;

/* Divides the batch into shares of `goal` tokens: sequence s goes to the micro-batch whose share
   holds the middle of the sequence. */
static void moe__schedule_cut(moe__schedule *schedule, int32_t goal) {
  const moe__view *all = schedule->all;
  int32_t *cut = schedule->c->cut_first, *start = schedule->c->cut_start, s, last = -1, n = 0;
  schedule->most = 0;
  for (s = 0; s < all->S; ++s) {
    int32_t share = (int32_t)(((uint32_t)all->seq_start[s] + (uint32_t)all->seq_start[s + 1]) / 2 /
                              (uint32_t)goal);
    if (s == 0 || share != last) {
      cut[n++] = s;
      *start++ = 0;
    }
    last = share;
    *start = all->seq_start[s + 1] - all->seq_start[cut[n - 1]];
    schedule->most = moe__max(schedule->most, *start++);
  }
  cut[n] = all->S;
  schedule->count = n;
}

/* Decides between the three ways. Micro-batches go to threads if there are enough of similar
   length, or if the longest is so short that it makes no difference. */
static void moe__schedule_make(moe__schedule *schedule, moe_context *c, const moe__view *all) {
  int32_t threads = all->env.parallel_for ? moe__max(all->env.threads, 1) : 1, M = all->M, count,
          goal,
          least =
              MOE__INT8(c->model->plan.quantized) ? MOE__ROW_RANGE_LEAST_I8 : MOE__ROW_RANGE_LEAST;
  int even;
  memset(schedule, 0, sizeof *schedule);
  schedule->c = c;
  schedule->all = all;
  count = moe__max((M + MOE__MICRO_BATCH - 1) / MOE__MICRO_BATCH, 1);
  if (threads > 1) count = (count + threads - 1) / threads * threads;
  goal = moe__max((M + count - 1) / count, 1);
  moe__schedule_cut(schedule, goal);
  even = schedule->count % threads == 0 && schedule->most <= goal + goal / 8;
  if (threads > 1 && !MOE__BACKEND(&all->env)) {
    schedule->alone = goal >= MOE__MICRO_BATCH_LEAST && schedule->count >= threads &&
                      (even || (int64_t)schedule->most * (threads - 1) <= M / 8);
    schedule->ranges = !schedule->alone && !c->limits.training && M / threads >= least;
  }
  if (schedule->ranges) {
    schedule->alone = 1;
    schedule->count = count;
  } else if ((threads > 1 && !schedule->alone) || MOE__BACKEND(&all->env))
    moe__schedule_cut(schedule, moe__max(M, 1)); /* all rows */
  schedule->own_rows = c->limits.training || schedule->ranges ||
                       (schedule->alone && (int64_t)schedule->most * threads > c->limits.tokens);
  if (schedule->alone) {
    moe_env one = all->env;
    one.threads = 1;
    schedule->scratch = moe_attention_scratch(c->longest, c->model->config.hidden,
                                              c->model->config.heads, c->limits.training, &one);
  }
}

/* Micro-batch or row range number i, for the thread of that slot. */
static moe__view moe__schedule_view(const moe__schedule *schedule, int32_t i, int32_t slot) {
  const moe_context *c = schedule->c;
  moe__view v = *schedule->all;
  if (schedule->ranges) {
    int32_t M = v.M, from = moe__share_of(M, i, schedule->count);
    v.range = 1;
    v.row = v.work = (size_t)from;
    v.M = moe__share_of(M, i + 1, schedule->count) - from;
  } else {
    int32_t first = c->cut_first[i];
    v.row = (size_t)v.seq_start[first];
    v.seq_start = c->cut_start + first + i;
    v.S = c->cut_first[i + 1] - first;
    v.M = v.seq_start[v.S];
    v.work = schedule->own_rows ? v.row : (size_t)slot * (size_t)schedule->most;
    if (v.keys) v.keys += first;
  }
  if (!schedule->alone) return v;
  v.env.threads = 1;
  v.env.parallel_for = NULL;
  if (slot > 0) v.env.profile = NULL; /* the table shows the time of one thread */
  v.attention_scratch += (size_t)slot * schedule->scratch;
  return v;
}

static void moe__schedule_tile(void *arg, int32_t i, int32_t slot) {
  const moe__schedule *schedule = (const moe__schedule *)arg;
  moe__view v = moe__schedule_view(schedule, i, slot);
  int32_t l;
  for (l = schedule->layer; l < schedule->end; ++l)
    moe__block_forward(schedule->c, &v, l, schedule->steps);
}

/* Runs steps of the layers [layer, end) for all rows. */
static void moe__schedule_run(moe__schedule *schedule, int32_t layer, int32_t end, int steps) {
  int32_t i;
  schedule->layer = layer;
  schedule->end = end;
  schedule->steps = steps;
  if (schedule->alone)
    moe__parallel(&schedule->all->env, schedule->count, moe__schedule_tile, schedule);
  else
    for (i = 0; i < schedule->count; ++i) moe__schedule_tile(schedule, i, 0);
}

/* All layers: those of a dense model at once; with gates, each layer up to its gate, which needs
   all rows. */
static void moe__schedule_layers(moe_context *c, const moe__view *all) {
  int gates = moe__has_gates(&c->model->config);
  int32_t l, L = c->model->config.layers;
  int steps = gates ? MOE__STEPS_BEFORE_GATE : MOE__STEPS;
  moe__schedule schedule;
  if (MOE__BACKEND(&c->device.env)) { /* rows are the device's business */
    for (l = 0; l < L; ++l) moe__block_forward(c, all, l, MOE__STEPS);
    return;
  }
  moe__schedule_make(&schedule, c, all);
  if (!gates && !schedule.ranges) {
    moe__schedule_run(&schedule, 0, L, steps);
    return;
  }
  for (l = 0; l < L; ++l) {
    if (schedule.ranges) moe__schedule_run(&schedule, l, l + 1, MOE__STEP_QKV);
    moe__schedule_run(&schedule, l, l + 1, schedule.ranges ? steps & ~(int)MOE__STEP_QKV : steps);
    if (gates) moe__block_forward(c, all, l, MOE__STEPS_FROM_GATE);
  }
}

/* ---- task-level routing: scores of a task, selection, their gradients ---- >>task_router
   [TL] 2: the router of a layer is a small network with 64 inner units, from the task's vector to a
   score z for each of its m blocks,
     z = W1 GELU(W0 vector + b0) + b1,
   and the selection turns scores into weights w of the blocks' outputs. With tau the temperature
   and G = -log(-log U), U uniform in (0, 1):
     softmax           p = softmax(z / tau),        w = p
     Gumbel-softmax    p = softmax((z + G) / tau),  w = p in training; else 1 at the largest z and 0
                                                    elsewhere
     straight-through  p = softmax((z + G) / tau),  w = 1 at the largest p and 0 elsewhere; backward
                                                    takes dp = dw
   Backward: dz_i = p_i (dw_i - sum_j p_j dw_j) / tau, dw_i = the product of the layer's output
   gradient and the output of block i. Each sequence is computed separately, in order, so that
   neither the batch nor its division into micro-batches changes a bit.
   PAPER-DIFF: the authors draw G in evaluation as well. */

/* The two linear layers of the router of a layer, for one task. dw and the outputs of forward are
   set only where they are needed. */
static moe_linear_op moe__task_router_in_op(const moe_model *model, int32_t task, int32_t layer) {
  int32_t dim = model->config.task_dim;
  const float *w = model->weights;
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.x = w + moe__at(model, MOE__TASK_VECTORS, 0, 0) + (size_t)task * (size_t)dim;
  op.w = moe_mat_rows(w + moe__at(model, MOE__ROUTER_IN_W, layer, 0), MOE__TASK_ROUTER_HIDDEN, dim);
  op.b = w + moe__at(model, MOE__ROUTER_IN_B, layer, 0);
  op.M = 1;
  return op;
}

static moe_linear_op moe__task_router_out_op(const moe_model *model, const float *act,
                                             int32_t layer) {
  const float *w = model->weights;
  moe_linear_op op;
  moe_linear_op_init(&op);
  op.x = act;
  op.w = moe_mat_rows(w + moe__at(model, MOE__ROUTER_OUT_W, layer, 0), model->config.experts,
                      MOE__TASK_ROUTER_HIDDEN);
  op.b = w + moe__at(model, MOE__ROUTER_OUT_B, layer, 0);
  op.M = 1;
  return op;
}

/* z (m) of a task in a layer; pre and act (64) are kept for backward. */
static void moe__task_router_scores(float *z, float *pre, float *act, const moe_model *model,
                                    int32_t task, int32_t layer, const moe_env *env) {
  moe_linear_op in = moe__task_router_in_op(model, task, layer),
                out = moe__task_router_out_op(model, act, layer);
  in.y = pre;
  in.act = act;
  out.y = z;
  moe_linear_forward(&in, env);
  moe_linear_forward(&out, env);
}

/* w = 1 at the largest of n values, the lowest of equals, and 0 elsewhere. */
static void moe__task_router_largest(float *w, const float *value, int32_t n) {
  int32_t i, best = 0;
  for (i = 1; i < n; ++i)
    if (value[i] > value[best]) best = i;
  for (i = 0; i < n; ++i) w[i] = i == best ? 1.0f : 0.0f;
}

/* prob (m) = softmax(z / tau). The maximum is subtracted before the division, so that a small tau
   gives no infinity. */
static void moe__task_router_softmax(float *prob, const float *z, float tau, int32_t m) {
  float max = z[0];
  int32_t i;
  for (i = 1; i < m; ++i) max = moe__maxf(max, z[i]);
  for (i = 0; i < m; ++i) prob[i] = (z[i] - max) / tau;
  moe_softmax(prob, prob, m);
}

/* Gumbel noise G (m) of a sequence in a layer. */
static void moe__task_router_noise(float *noise, uint64_t key, int32_t m) {
  int32_t i;
  for (i = 0; i < m; ++i)
    noise[i] = -(float)moe__log_double(-moe__log_double(moe__uniform(key, (uint64_t)i)));
}

/* w and prob (m) from the scores of a sequence's task and its noise (m), or NULL; z may be prob and
   noise w. masked (m) or NULL: blocks marked 1 take no part. If a score is NaN, so are all weights
   and the scores of the pass. */
static void moe__task_router_select(float *w, float *prob, const float *z, const float *noise,
                                    const uint8_t *masked, const moe_config *config,
                                    const moe__pass *pass) {
  float noisy[MOE_MAX_EXPERTS];
  int32_t i, m = config->experts, training = pass->tau > 0, soft;
  for (i = 0; i < m; ++i) noisy[i] = noise ? z[i] + noise[i] : z[i];
  for (i = 0; i < m && masked; ++i)
    if (masked[i]) noisy[i] = (float)-HUGE_VAL; /* below any score of the caller's */
  moe__task_router_softmax(prob, noisy, training ? pass->tau : config->temperature, m);
  soft = config->selection == MOE_SELECT_SOFTMAX ||
         (training && config->selection == MOE_SELECT_GUMBEL) || !moe__is_finite(prob[0]);
  for (i = 0; i < m && masked; ++i)
    if (masked[i]) prob[i] = 0;
  if (soft)
    memcpy(w, prob, (size_t)m * sizeof(float));
  else
    moe__task_router_largest(w, noisy, m);
}

/* The mean of the blocks that take part. */
static void moe__task_router_mean(float *w, const uint8_t *masked, size_t m) {
  float left = 0;
  size_t i;
  for (i = 0; i < m; ++i) left += masked && masked[i] ? 0.0f : 1.0f;
  for (i = 0; i < m; ++i) w[i] = masked && masked[i] ? 0.0f : 1.0f / left;
}

/* Weights of the blocks of every layer for sequence s. */
static void moe__task_router_sequence(moe_context *c, const moe__pass *pass, int32_t s,
                                      const moe_env *one) {
  const moe_config *config = &c->model->config;
  moe__task_router *r = &c->router;
  size_t m = (size_t)config->experts, L = (size_t)config->layers, S = (size_t)pass->S, l;
  int32_t task = pass->batch->task[s];
  int noisy = pass->tau > 0 && config->selection != MOE_SELECT_SOFTMAX;
  for (l = 0; l < L; ++l) {
    size_t at = l * S + (size_t)s, given = ((size_t)task * L + l) * m;
    float *w = r->weight + at * m, *prob = r->prob + at * m;
    const uint8_t *masked = c->masked ? c->masked + l * m : NULL;
    const float *noise = noisy ? w : NULL; /* w and prob hold noise and scores at first */
    if (noisy && r->given.gumbel)
      noise = r->given.gumbel + ((size_t)s * L + l) * m;
    else if (noisy) {
      size_t row = moe__key_row(config, MOE__SITE_GUMBEL, (int32_t)l);
      moe__task_router_noise(w, c->keys[row * S + (size_t)s], config->experts);
    }
    if (r->given.routes)
      memcpy(w, r->given.routes + given, m * sizeof(float));
    else if (r->given.scores)
      moe__task_router_select(w, prob, r->given.scores + given, noise, masked, config, pass);
    else if (config->router == MOE_ROUTER_TASK_LEVEL) {
      moe__task_router_scores(prob, r->pre + at * MOE__TASK_ROUTER_HIDDEN,
                              r->act + at * MOE__TASK_ROUTER_HIDDEN, c->model, task, (int32_t)l,
                              one);
      moe__task_router_select(w, prob, prob, noise, masked, config, pass);
    } else
      moe__task_router_mean(w, masked, m);
  }
}

/* The routes of a layer for moe_context_routes: each token goes to the block of the largest weight
   for its sequence. */
static void moe__task_router_show(moe_context *c, const moe__pass *pass, int32_t layer) {
  moe_routes *r = &c->routes[layer];
  size_t m = (size_t)c->model->config.experts, i;
  int32_t s, t, at = 0, expert;
  for (s = 0; s < pass->S; ++s) {
    const float *w = c->router.weight + ((size_t)layer * (size_t)pass->S + (size_t)s) * m;
    int32_t best = 0;
    for (i = 1; i < m; ++i)
      if (w[i] > w[best]) best = (int32_t)i;
    for (t = pass->batch->seq_start[s]; t < pass->batch->seq_start[s + 1]; ++t) {
      r->expert[t] = best;
      r->weight[t] = w[best];
      memcpy(r->prob + (size_t)t * m, w, m * sizeof(float));
    }
  }
  for (expert = 0; expert < (int32_t)m; ++expert) {
    r->start[expert] = at;
    for (t = 0; t < pass->M; ++t)
      if (r->expert[t] == expert) r->order[at++] = t;
  }
  r->start[m] = at;
}

/* Runs before the first layer: the choice does not depend on the tokens. */
static void moe__task_router_forward(moe_context *c, const moe__pass *pass) {
  moe_env one = moe__one_thread(pass->env);
  int32_t s, l;
  for (s = 0; s < pass->S; ++s) moe__task_router_sequence(c, pass, s, &one);
  for (l = 0; l < c->model->config.layers; ++l) moe__task_router_show(c, pass, l);
  moe__profile_end(pass->env, MOE_PROFILE_GATES);
}

/* Whether backward of this pass needs the gradients of the weights: then every block is computed,
   chosen or not. */
static int moe__task_router_learns(const moe_context *c, const moe__pass *pass) {
  const moe_task_router *given = &c->router.given;
  if (!(pass->tau > 0) || given->routes) return 0;
  return given->scores ? given->dscores != NULL : c->model->config.router == MOE_ROUTER_TASK_LEVEL;
}

#ifndef MOE_NO_TRAIN
/* dz (m) from dw: the softmax's gradient, over tau. */
static void moe__task_router_dscores(float *dz, const float *dw, const float *prob, float tau,
                                     size_t m) {
  float mean = 0;
  size_t i;
  for (i = 0; i < m; ++i) mean = moe__fmaf(prob[i], dw[i], mean);
  for (i = 0; i < m; ++i) dz[i] = prob[i] * (dw[i] - mean) / tau;
}

/* Gradients of a router from those of its scores; at: the row of pre and act. */
static void moe__task_router_scores_backward(const moe_context *c, float *dw, const float *dz,
                                             size_t at, int32_t task, int32_t layer,
                                             const moe_env *env) {
  const moe_model *model = c->model;
  const float *w = model->weights, *pre = c->router.pre + at * MOE__TASK_ROUTER_HIDDEN;
  float dact[MOE__TASK_ROUTER_HIDDEN], dpre[MOE__TASK_ROUTER_HIDDEN];
  moe_linear_op in = moe__task_router_in_op(model, task, layer),
                out = moe__task_router_out_op(model, c->router.act + at * MOE__TASK_ROUTER_HIDDEN,
                                              layer);
  memset(dact, 0, sizeof dact);
  memset(dpre, 0, sizeof dpre);
  out.dx = dact;
  out.dw = dw + ((const float *)out.w.data - w);
  out.db = dw + (out.b - w);
  out.dy = dz;
  moe_linear_backward(&out, env);
  moe_gelu_backward(dpre, dact, pre, MOE__TASK_ROUTER_HIDDEN, env);
  in.dx = dw + (in.x - w); /* the gradient of the task's vector */
  in.dw = dw + ((const float *)in.w.data - w);
  in.db = dw + (in.b - w);
  in.dy = dpre;
  moe_linear_backward(&in, env);
}

/* Runs after the backward of layer 0, when dweight of all layers is complete. */
static void moe__task_router_backward(moe_context *c, const moe__pass *pass, float *dw) {
  const moe_config *config = &c->model->config;
  moe__task_router *r = &c->router;
  moe_env one = moe__one_thread(pass->env);
  size_t m = (size_t)config->experts, L = (size_t)config->layers, S = (size_t)pass->S, s, l, i;
  float dz[MOE_MAX_EXPERTS];
  if (!moe__task_router_learns(c, pass)) return;
  for (s = 0; s < S; ++s)
    for (l = 0; l < L; ++l) {
      size_t at = l * S + s, task = (size_t)pass->batch->task[s];
      moe__task_router_dscores(dz, r->dweight + at * m, r->prob + at * m, pass->tau, m);
      if (r->given.scores)
        for (i = 0; i < m; ++i) r->given.dscores[(task * L + l) * m + i] += dz[i];
      else
        moe__task_router_scores_backward(c, dw, dz, at, (int32_t)task, (int32_t)l, &one);
    }
  moe__profile_end(pass->env, MOE_PROFILE_GATES_BACK);
}
#endif

#ifndef MOE_NO_TASK_ROUTER
MOE_API moe_status moe_context_task_router(moe_context *context, const moe_task_router *router,
                                           const moe_env *env) {
  moe_task_router none = {NULL, NULL, NULL, NULL};
  if (context->model->config.unit != MOE_UNIT_BLOCK)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "task-level routes: expected a model whose experts are blocks (unit is ffn)");
  context->router.given = router ? *router : none;
  return MOE_OK;
}

MOE_API moe_status moe_task_router_routes(float *routes, const moe_model *model, float tau,
                                          const moe_env *env) {
  const moe_config *config = &model->config;
  size_t m = (size_t)config->experts;
  float pre[MOE__TASK_ROUTER_HIDDEN], act[MOE__TASK_ROUTER_HIDDEN], z[MOE_MAX_EXPERTS];
  moe_env one = moe__one_thread(env);
  int32_t t, l;
  if (config->router != MOE_ROUTER_TASK_LEVEL)
    return moe__fail(env, MOE_E_ARGUMENT, "this model has no task-level router");
  if (!(tau >= 0 && tau <= 1e6f))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "temperature of routes is %g, expected 0 (the most probable block) to 1e6",
                     (double)tau);
  for (t = 0; t < model->T; ++t)
    for (l = 0; l < config->layers; ++l, routes += m) {
      moe__task_router_scores(z, pre, act, model, t, l, &one);
      if (tau > 0)
        moe__task_router_softmax(routes, z, tau, config->experts);
      else
        moe__task_router_largest(routes, z, config->experts);
    }
  return MOE_OK;
}

MOE_API void moe_task_router_blend(float *out, const float *routes, float share, size_t rows,
                                   int32_t m) {
  size_t i;
  for (i = 0; i < rows * (size_t)m; ++i)
    out[i] = moe__fmaf(share, routes[i], (1.0f - share) / (float)m);
}
#endif

/* ---- transformer blocks as experts ---- >>blocks
   [TL] 2: a layer has m blocks, each with its own attention and feed-forward network. The output of
   the layer for sequence s is
     y_s = sum over i of w_{s,i} B_i(x_s).
   A block computes the sequences whose weight for it is not 0, packed, by the same steps as a layer
   of a dense model (moe__block_forward). If the router is trained, a block computes all sequences,
   since dw_{s,i} = dy_s . B_i(x_s) needs outputs that straight-through selection leaves out. */

/* Keys of the sequences of a block at its three sites with dropout. */
static void moe__blocks_keys(moe_context *c, const moe__view *all, moe__view *v, int32_t block) {
  static const uint32_t site[3] = {MOE__SITE_ATTENTION, MOE__SITE_ATTENTION_OUT, MOE__SITE_FFN_OUT};
  int32_t i, n;
  v->keys = c->router.keys;
  v->key_row = moe__key_row(&c->model->config, site[0], block);
  v->key_stride = (size_t)c->limits.sequences;
  for (i = 0; i < 3 && v->pass->dropout > 0; ++i) {
    const uint64_t *from = moe__view_keys(c, all, v->pass->dropout, site[i], block);
    for (n = 0; n < v->S; ++n)
      c->router.keys[(size_t)i * v->key_stride + (size_t)n] = from[c->router.sequence[n]];
  }
}

/* The sequences that a block computes, packed; S is 0 when there are none. */
static moe__view moe__blocks_view(moe_context *c, const moe__view *all, int32_t block) {
  moe__task_router *r = &c->router;
  const moe__pass *pass = all->pass;
  int32_t m = c->model->config.experts, layer = block / m, s, n = 0,
          learns = moe__task_router_learns(c, pass);
  moe__view v = *all;
  r->start[0] = 0;
  for (s = 0; s < all->S; ++s) {
    float w =
        r->weight[((size_t)layer * (size_t)all->S + (size_t)s) * (size_t)m + (size_t)(block % m)];
    if (!learns && w == 0) continue; /* NaN takes part: it has to reach the loss */
    r->sequence[n] = s;
    r->start[n + 1] = r->start[n] + all->seq_start[s + 1] - all->seq_start[s];
    ++n;
  }
  v.seq_start = r->start;
  v.S = n;
  v.M = r->start[n];
  moe__blocks_keys(c, all, &v, block);
  return v;
}

/* The block's input: that of the layer if all sequences take part, else a copy of their rows. */
static void moe__blocks_gather(moe_context *c, const moe__view *all, const moe__view *v,
                               int32_t block) {
  moe__task_router *r = &c->router;
  size_t H = (size_t)c->model->config.hidden;
  float *x = r->x[block / c->model->config.experts];
  int32_t n;
  c->acts[block].x = v->S == all->S ? x : r->gathered;
  for (n = 0; n < v->S && v->S < all->S; ++n)
    memcpy(r->gathered + (size_t)r->start[n] * H, x + (size_t)all->seq_start[r->sequence[n]] * H,
           (size_t)(r->start[n + 1] - r->start[n]) * H * sizeof(float));
}

/* y_s += w B(x_s), or = for the first block of a sequence; a weight of 0 leaves y alone. */
static void moe__blocks_combine(moe_context *c, const moe__view *all, const moe__view *v,
                                int32_t block) {
  const moe__mix_kernels *mix = MOE__V_PICK(v->env.isa, mix);
  moe__task_router *r = &c->router;
  size_t H = (size_t)c->model->config.hidden, m = (size_t)c->model->config.experts,
         layer = (size_t)block / m, own = (size_t)block % m, i;
  int32_t n;
  for (n = 0; n < v->S; ++n) {
    size_t s = (size_t)r->sequence[n], floats = (size_t)(r->start[n + 1] - r->start[n]) * H;
    const float *w = r->weight + (layer * (size_t)all->S + s) * m;
    const float *from = r->y[block] + (size_t)r->start[n] * H;
    float *to = r->x[layer + 1] + (size_t)all->seq_start[s] * H;
    for (i = 0; i < own && w[i] == 0;) ++i;
    if (w[own] == 0) continue;
    if (i < own)
      mix->axpy(to, w[own], from, floats);
    else
      mix->scale(to, w[own], from, floats);
  }
}

static void moe__blocks_forward(moe_context *c, const moe__view *all, int32_t layer) {
  int32_t m = c->model->config.experts, block;
  for (block = layer * m; block < (layer + 1) * m; ++block) {
    moe__view v = moe__blocks_view(c, all, block);
    if (v.S == 0) continue;
    moe__blocks_gather(c, all, &v, block);
    moe__profile_end(&all->env, MOE_PROFILE_GATES);
    moe__block_forward(c, &v, block, MOE__STEPS);
    moe__blocks_combine(c, all, &v, block);
    moe__profile_end(&all->env, MOE_PROFILE_GATES);
  }
}

#ifndef MOE_NO_TRAIN
/* The gradient of the block's output, w dy, packed into c->g; its product with the output, the
   gradient of w. Returns 0 if every weight is 0: the block then gets no gradient. */
static int moe__blocks_scatter(moe_context *c, const moe__view *all, const moe__view *v,
                               int32_t block) {
  const moe__mix_kernels *mix = MOE__V_PICK(v->env.isa, mix);
  const moe__row_kernels *rows = MOE__V_PICK(v->env.isa, rows);
  moe__task_router *r = &c->router;
  size_t H = (size_t)c->model->config.hidden, m = (size_t)c->model->config.experts;
  int32_t n, i, used = 0, learns = moe__task_router_learns(c, v->pass);
  for (n = 0; n < v->S; ++n) {
    size_t s = (size_t)r->sequence[n],
           choice = ((size_t)block / m * (size_t)all->S + s) * m + (size_t)block % m;
    size_t at = (size_t)r->start[n] * H;
    const float *dy = r->dy + (size_t)all->seq_start[s] * H;
    int32_t length = r->start[n + 1] - r->start[n];
    double sum = 0;
    mix->scale(c->g + at, r->weight[choice], dy, (size_t)length * H);
    used |= r->weight[choice] != 0;
    for (i = 0; i < length && learns; ++i)
      sum += (double)rows->dot(dy + (size_t)i * H, r->y[block] + at + (size_t)i * H, H);
    r->dweight[choice] = (float)sum;
  }
  return used;
}

static void moe__blocks_backward(moe_context *c, const moe__view *all, float *dw, int32_t layer) {
  const moe__mix_kernels *mix = MOE__V_PICK(all->env.isa, mix);
  moe__task_router *r = &c->router;
  int32_t m = c->model->config.experts, block, n;
  size_t H = (size_t)c->model->config.hidden, bytes = (size_t)all->M * H * sizeof(float);
  memcpy(r->dy, c->g, bytes);
  memset(r->dx, 0, bytes);
  for (block = layer * m; block < (layer + 1) * m; ++block) {
    moe__view v = moe__blocks_view(c, all, block);
    if (v.S == 0 || !moe__blocks_scatter(c, all, &v, block)) continue;
    moe__blocks_gather(c, all, &v, block);
    moe__profile_end(&all->env, MOE_PROFILE_GATES_BACK);
    moe__block_backward(c, &v, dw, block);
    for (n = 0; n < v.S; ++n)
      mix->axpy(r->dx + (size_t)all->seq_start[r->sequence[n]] * H, 1.0f,
                c->g + (size_t)r->start[n] * H, (size_t)(r->start[n + 1] - r->start[n]) * H);
  }
  memcpy(c->g, r->dx, bytes);
  moe__profile_end(&all->env, MOE_PROFILE_GATES_BACK);
}
#endif

/* ---- what a pass chose, what it may choose ---- >>routes */

/* `count` floats of the arena where the host can read them: in place, or in a downloaded copy.
   NULL: the device has failed. */
static const float *moe__arena_read(const moe_context *c, float *copy, const float *from,
                                    size_t count) {
  const moe_backend *b = c->device.env.backend;
  if (!b) return from;
  return b->download(b, &c->device.env, copy, from, count * sizeof(float)) ? NULL : copy;
}

MOE_API const float *moe_context_hidden(const moe_context *context) {
  return moe_context_layer(context, context->model->config.layers - 1);
}

MOE_API const float *moe_context_layer(const moe_context *context, int32_t layer) {
  const moe_config *config = &context->model->config;
  int kept = context->limits.training || context->limits.keep_layers;
  const float *x = context->last;
  if (layer < -1 || layer >= config->layers) return NULL;
  if (layer < config->layers - 1) {
    if (!kept) return NULL;
    x = MOE__BLOCKS(config) ? context->router.x[layer + 1] : context->acts[layer + 1].x;
  }
  return moe__arena_read(context, context->device.hidden, x,
                         (size_t)context->M * (size_t)config->hidden);
}

MOE_API const float *moe_context_gate_logits(const moe_context *context, int32_t layer) {
  const moe_config *config = &context->model->config;
  int kept = context->limits.training || context->limits.keep_layers;
  if (layer < 0 || layer >= config->layers || !moe__has_gates(config) || config->experts < 2 ||
      !kept)
    return NULL;
  return moe__arena_read(context, context->device.logits, context->acts[layer].logits,
                         (size_t)context->M * (size_t)config->experts);
}

/* Routes of the arena in the host's copy of them. */
static moe_status moe__routes_read(const moe_context *c, const moe_routes *from, moe_routes *out) {
  const moe_env *env = &c->device.env;
  const moe_backend *b = env->backend;
  size_t slots = (size_t)from->M * (size_t)from->k, N = (size_t)from->N;
  moe_status status;
  *out = c->device.routes;
  out->M = from->M;
  memset(out->start, 0, (N + 1) * sizeof(int32_t));
  if (from->M == 0) return MOE_OK;
  status = b->download(b, env, out->expert, from->expert, slots * 4);
  if (!status) status = b->download(b, env, out->weight, from->weight, slots * 4);
  if (!status) status = b->download(b, env, out->prob, from->prob, (size_t)from->M * N * 4);
  if (!status) status = b->download(b, env, out->order, from->order, slots * 4);
  return status ? status : b->download(b, env, out->start, from->start, (N + 1) * 4);
}

MOE_API moe_status moe_context_routes(const moe_context *context, int32_t layer, moe_routes *out) {
  const moe_config *config = &context->model->config;
  if (layer < 0 || layer >= config->layers) return MOE_E_ARGUMENT;
  if (MOE__BACKEND(&context->device.env) && moe__has_gates(config))
    return moe__routes_read(context, &context->routes[layer], out);
  *out = context->routes[layer];
  return MOE_OK;
}

MOE_API void moe_context_force(moe_context *context, const int32_t *experts) {
  context->forced = experts;
}

MOE_API void moe_context_mask(moe_context *context, const uint8_t *experts) {
  context->masked = experts;
}

/* Adds the tokens [first, end) of a layer to the sums (N) of their task. */
static void moe__route_count_tokens(int64_t *chosen, double *gate, double *prob,
                                    const moe_routes *r, int32_t first, int32_t end) {
  int32_t t, i;
  for (t = first; t < end; ++t) {
    const float *p = r->prob + (size_t)t * (size_t)r->N;
    const int32_t *expert = r->expert + (size_t)t * (size_t)r->k;
    for (i = 0; i < r->k; ++i) {
      ++chosen[expert[i]];
      if (gate) gate[expert[i]] += (double)p[expert[i]];
    }
    for (i = 0; i < r->N && prob; ++i) prob[i] += (double)p[i];
  }
}

MOE_API moe_status moe_route_count(moe_route_sums *sums, const moe_context *context,
                                   const moe_batch *batch, const moe_env *env) {
  const moe_config *config = &context->model->config;
  size_t L = (size_t)config->layers, N = (size_t)config->experts, l;
  int32_t s, M = batch->S > 0 ? batch->seq_start[batch->S] : 0;
  if (!context->model->T)
    return moe__fail(env, MOE_E_ARGUMENT, "counting routes: the model has no tasks");
  if (M != context->M)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "counting routes: the batch has %d tokens, the last pass had %d", (int)M,
                     (int)context->M);
  for (s = 0; s < batch->S; ++s) {
    int32_t first = batch->seq_start[s], end = batch->seq_start[s + 1];
    if ((s == 0 && first != 0) || first >= end || end > M)
      return moe__fail(
          env, MOE_E_ARGUMENT,
          "counting routes: sequence %d begins at row %d and ends at %d, the batch has %d tokens",
          (int)s, (int)first, (int)end, (int)M);
    if (batch->task[s] < 0 || batch->task[s] >= context->model->T)
      return moe__fail(env, MOE_E_ARGUMENT,
                       "counting routes: sequence %d has task %d, the model has %d tasks", (int)s,
                       (int)batch->task[s], (int)context->model->T);
  }
  for (s = 0; s < batch->S; ++s)
    sums->tokens[batch->task[s]] += batch->seq_start[s + 1] - batch->seq_start[s];
  for (l = 0; l < L; ++l) {
    moe_routes r;
    moe_status status = moe_context_routes(context, (int32_t)l, &r);
    if (status) return status;
    for (s = 0; s < batch->S; ++s) {
      size_t at = ((size_t)batch->task[s] * L + l) * N;
      moe__route_count_tokens(sums->chosen + at, sums->gate ? sums->gate + at : NULL,
                              sums->prob ? sums->prob + at : NULL, &r, batch->seq_start[s],
                              batch->seq_start[s + 1]);
    }
  }
  return MOE_OK;
}

#ifndef MOE_NO_TRAIN
/* ---- Adam, schedule, clipping ---- >>optimizer */

/* The decimal literal that a float from 0 to 1 was rounded from, to seven digits. 0.999f is
   0.99900001287..., so 1 - 0.999f has a relative error of 1e-5. */
static double moe__decimal(float x) { return (double)(int64_t)((double)x * 1e7 + 0.5) / 1e7; }

MOE_API void moe_train_config_init(moe_train_config *config) {
  memset(config, 0, sizeof *config);
  config->lr = 5e-5f;
  config->warmup = 0.1f;
  config->beta1 = 0.9f;
  config->beta2 = 0.999f;
  config->eps = 1e-8f;
  config->clip_norm = 1;
  config->dropout = 0.1f;
  config->tau_start = 2;
  config->tau_end = 0.1f;
}

/* Whether low <= x <= high; false for NaN. */
static int moe__within(float x, float low, float high) { return x >= low && x <= high; }

static int moe__is_beta(float x) { return moe__within(x, 0, 0.9999999f); }

#define MOE__HUGE 1e30f

/* Checks the learning rate and the other settings of the optimizer. */
static moe_status moe__check_optimizer(const moe_train_config *c, const moe_env *env) {
  if (!(c->lr > 0 && c->lr <= MOE__HUGE))
    return moe__fail(env, MOE_E_ARGUMENT, "lr is %g, expected above 0", (double)c->lr);
  if (!moe__within(c->warmup, 0, 1))
    return moe__fail(env, MOE_E_ARGUMENT, "warmup is %g, expected 0 to 1 (a fraction of the steps)",
                     (double)c->warmup);
  if (c->steps < 1 || c->steps > 100000000000)
    return moe__fail(env, MOE_E_ARGUMENT, "steps is %lld, expected 1 to 1e11", (long long)c->steps);
  if (!moe__is_beta(c->beta1) || !moe__is_beta(c->beta2))
    return moe__fail(env, MOE_E_ARGUMENT, "beta1 is %g and beta2 is %g, expected 0 to below 1",
                     (double)c->beta1, (double)c->beta2);
  if (!(c->eps > 0 && c->eps <= MOE__HUGE))
    return moe__fail(env, MOE_E_ARGUMENT, "Adam's eps is %g, expected above 0", (double)c->eps);
  if (!moe__within(c->weight_decay, 0, MOE__HUGE))
    return moe__fail(env, MOE_E_ARGUMENT, "weight_decay is %g, expected 0 or more",
                     (double)c->weight_decay);
  if (!moe__within(c->clip_norm, 0, MOE__HUGE))
    return moe__fail(env, MOE_E_ARGUMENT, "clip_norm is %g, expected 0 (off) or more",
                     (double)c->clip_norm);
  return MOE_OK;
}

static moe_status moe__check_groups(const moe_train_config *c, const moe_env *env) {
  int32_t i;
  if (c->n_groups < 0 || (c->n_groups > 0 && !c->groups))
    return moe__fail(env, MOE_E_ARGUMENT, "n_groups is %d, but groups is %s", (int)c->n_groups,
                     c->groups ? "an array" : "NULL");
  for (i = 0; i < c->n_groups; ++i) {
    const moe_param_group *group = &c->groups[i];
    if (!group->match) return moe__fail(env, MOE_E_ARGUMENT, "group %d: match is NULL", (int)i);
    if (!moe__within(group->lr_scale, 0, MOE__HUGE) ||
        !moe__within(group->decay_scale, 0, MOE__HUGE))
      return moe__fail(env, MOE_E_ARGUMENT,
                       "group \"%s\": lr_scale is %g and decay_scale is %g, expected 0 or more",
                       group->match, (double)group->lr_scale, (double)group->decay_scale);
  }
  return MOE_OK;
}

/* MOE_E_ARGUMENT and a sentence for the first field outside its range. */
static moe_status moe__train_config_check(const moe_train_config *c, const moe_env *env) {
  moe_status status = moe__check_optimizer(c, env);
  if (status) return status;
  if (!moe__within(c->dropout, 0, 0.9999999f))
    return moe__fail(env, MOE_E_ARGUMENT, "dropout is %g, expected 0 to below 1",
                     (double)c->dropout);
  if (!moe__within(c->balance, 0, MOE__HUGE) || !moe__within(c->z_loss, 0, MOE__HUGE))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "balance is %g and z_loss is %g, expected 0 (off) or more", (double)c->balance,
                     (double)c->z_loss);
  if (!moe__within(c->jitter, 0, 0.9999999f))
    return moe__fail(env, MOE_E_ARGUMENT, "jitter is %g, expected 0 (off) to below 1",
                     (double)c->jitter);
  if (!(c->tau_end > 0 && c->tau_start >= c->tau_end && c->tau_start <= 1e6f) ||
      !moe__within(c->tau_rate, 0, MOE__HUGE))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "tau_start is %g, tau_end %g, tau_rate %g, expected 1e6 >= tau_start >= "
                     "tau_end > 0 and tau_rate >= 0",
                     (double)c->tau_start, (double)c->tau_end, (double)c->tau_rate);
  return moe__check_groups(c, env);
}

/* Warm-up and linear decay [TaG] 4.4. PAPER-DIFF: to 0 one step after the last, so that the last
   step still learns. */
MOE_API float moe_train_lr(const moe_train_config *config, int64_t t) {
  int64_t T = config->steps, W;
  double share;
  if (t < 1 || t > T) return 0;
  if (config->lr_schedule) return config->lr_schedule(config->lr_user, t);
  W = (int64_t)(moe__decimal(config->warmup) * 1e7 + 0.5) * T /
      10000000; /* in whole numbers: 0.29 of 100 is 29 */
  if (t <= W)
    share = (double)t / (double)W;
  else
    share = (double)(T - t + 1) / (double)(T - W);
  return (float)((double)config->lr * share);
}

static double moe__exp_double(double x); /* >>sampler */

/* PAPER-DIFF: [TL]'s authors use a fixed tau_rate; by default the decay covers all steps of the
   run. */
MOE_API float moe_train_tau(const moe_train_config *config, int64_t t) {
  double first = (double)config->tau_start, last = (double)config->tau_end,
         rate = (double)config->tau_rate, tau;
  if (!(config->tau_rate > 0))
    rate = config->steps > 1 ? moe__log_double(first / last) / (double)(config->steps - 1) : 0;
  tau = first * moe__exp_double(-rate * (double)t);
  return (float)(tau > last ? tau : last);
}

/* A range of the flat array of parameters with one learning rate and decay: adjacent tensors with
   the same factors share a span. It is divided into tiles, which are numbered through all spans. */
enum { MOE__ADAM_TILE = 16384, MOE__NORM_BLOCK = 4096, MOE__NORM_PARTS = 256 };
typedef struct moe__span {
  size_t offset, count;
  int32_t tile;                 /* number of its first tile */
  float lr_scale, weight_decay; /* lr_scale 0: frozen */
} moe__span;

static int32_t moe__span_tiles(const moe__span *span) {
  return (int32_t)((span->count + MOE__ADAM_TILE - 1) / MOE__ADAM_TILE);
}

static int32_t moe__spans_tiles(const moe__span *spans, int32_t n) {
  return n ? spans[n - 1].tile + moe__span_tiles(&spans[n - 1]) : 0;
}

/* Adds a tensor to n spans and returns their new number, at most n + 1. Tensors are added in the
   order of their offsets. */
static int32_t moe__spans_add(moe__span *spans, int32_t n, const moe_tensor *tensor,
                              const moe_train_config *config) {
  float lr_scale = 1, decay = tensor->dims > 1 ? config->weight_decay : 0; /* of matrices only */
  moe__span *span = &spans[n];
  int32_t i;
  for (i = config->n_groups - 1; i >= 0; --i) {
    if (!strstr(tensor->name, config->groups[i].match)) continue;
    lr_scale = config->groups[i].lr_scale;
    decay *= config->groups[i].decay_scale;
    break;
  }
  if (n) {
    moe__span *last = &spans[n - 1];
    int alike = !(last->lr_scale < lr_scale || last->lr_scale > lr_scale ||
                  last->weight_decay < decay || last->weight_decay > decay);
    if (alike && last->offset + last->count == tensor->offset) {
      last->count += tensor->count;
      return n;
    }
  }
  span->offset = tensor->offset;
  span->count = tensor->count;
  span->tile = moe__spans_tiles(spans, n);
  span->lr_scale = lr_scale;
  span->weight_decay = decay;
  return n + 1;
}

/* The span that a tile belongs to: the last one that starts at or before it and is not empty. */
static const moe__span *moe__span_find(const moe__span *spans, int32_t n, int32_t tile) {
  int32_t low = 0, high = n - 1;
  while (low < high) {
    int32_t middle = low + (high - low + 1) / 2;
    if (spans[middle].tile <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return &spans[low];
}

/* Norm of a gradient: squares are added in float within a block of 4096 (16 lanes and their tree),
   blocks in double, in order within each of 256 parts, then the parts. The order of this sum
   depends on the spans alone. Frozen spans do not count. A gradient that is infinite, NaN or above
   1e18 makes the norm infinite or NaN. */
typedef struct moe__norm_job {
  const float *g;
  const moe__span *spans;
  int32_t n, tiles, first; /* first: the part that part[0] is */
  const moe__row_kernels *kernels;
  double part[MOE__NORM_PARTS / 2];
} moe__norm_job;

static void moe__norm_part(void *arg, int32_t index, int32_t slot) {
  moe__norm_job *job = (moe__norm_job *)arg;
  int32_t part = job->first + index;
  int32_t first = moe__share_of(job->tiles, part, MOE__NORM_PARTS);
  int32_t end = moe__share_of(job->tiles, part + 1, MOE__NORM_PARTS), tile;
  double sum = 0;
  (void)slot;
  for (tile = first; tile < end; ++tile) {
    const moe__span *span = moe__span_find(job->spans, job->n, tile);
    size_t at = (size_t)(tile - span->tile) * MOE__ADAM_TILE, stop = at + MOE__ADAM_TILE;
    if (!(span->lr_scale > 0)) continue;
    if (stop > span->count) stop = span->count;
    for (; at < stop; at += MOE__NORM_BLOCK) {
      size_t count = stop - at < MOE__NORM_BLOCK ? stop - at : (size_t)MOE__NORM_BLOCK;
      const float *x = job->g + span->offset + at;
      sum += (double)job->kernels->dot(x, x, count);
    }
  }
  job->part[index] = sum;
}

static double moe__spans_norm(const float *g, const moe__span *spans, int32_t n,
                              const moe_env *env) {
  moe__norm_job job;
  double sum = 0;
  int32_t i;
  job.g = g;
  job.spans = spans;
  job.n = n;
  job.tiles = moe__spans_tiles(spans, n);
  job.kernels = MOE__V_PICK(env->isa, rows);
  for (job.first = 0; job.first < MOE__NORM_PARTS; job.first += MOE__NORM_PARTS / 2) {
    moe__parallel(env, MOE__NORM_PARTS / 2, moe__norm_part, &job); /* twice, for half the stack */
    for (i = 0; i < MOE__NORM_PARTS / 2; ++i) sum += job.part[i];
  }
  return sqrt(sum);
}

/* Whether the gradients that gave this norm are finite. */
static int moe__finite(double norm) { return norm <= 1.7e308; }

/* The factor that scales gradients to a norm of at most `clip` (0: no clipping). */
static float moe__clip_factor(double norm, float clip) {
  double factor = (double)clip / (norm + 1e-6);
  return clip > 0 && factor < 1 ? (float)factor : 1.0f;
}

/* One step of Adam, in the order of PyTorch's AdamW, every operation rounded once:
     d = factor g,  w = (1 - rate decay) w,  m += (1 - beta1) (d - m),
     v = beta2 v + (1 - beta2) d^2,
     w -= rate / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps),  g = 0.
   The moments of a row without gradients (a rare word) shrink with every step. Below 1e-30 and
   1e-37 they become 0: numbers below 1.2e-38 slow some processors down a hundred times, and moments
   this small change no weight. */
#define MOE__M_TINY 1e-30f
#define MOE__V_TINY 1e-37f
typedef struct moe__adam {
  float factor, keep, one_beta1, beta2, one_beta2, step, root, eps;
} moe__adam;

/* x^t for t >= 0 by squaring: the same bits everywhere. */
static double moe__power(double x, int64_t t) {
  double y = 1;
  for (; t; t >>= 1, x *= x)
    if (t & 1) y *= x;
  return y;
}

static moe__adam moe__adam_make(const moe_adam_op *op) {
  moe__adam a;
  double b1 = moe__decimal(op->beta1), b2 = moe__decimal(op->beta2);
  double rate = (double)op->lr * (double)op->lr_scale;
  a.factor = op->factor;
  a.keep = (float)(1 - rate * (double)op->weight_decay);
  a.one_beta1 = (float)(1 - b1);
  a.beta2 = (float)b2;
  a.one_beta2 = (float)(1 - b2);
  a.step = (float)(rate / (1 - moe__power(b1, op->t)));
  a.root = (float)(1 / sqrt(1 - moe__power(b2, op->t)));
  a.eps = op->eps;
  return a;
}

static void moe__scalar_adam_run(float *w, float *g, float *m, float *v, size_t n,
                                 const moe__adam *a) {
  size_t i;
  for (i = 0; i < n; ++i) {
    float d = a->factor * g[i];
    float mi = moe__fmaf(a->one_beta1, d - m[i], m[i]);
    float vi = moe__fmaf(a->one_beta2, d * d, a->beta2 * v[i]);
    mi = moe__maxf(mi, -mi) < MOE__M_TINY ? 0.0f : mi;
    vi = vi < MOE__V_TINY ? 0.0f : vi;
    m[i] = mi;
    v[i] = vi;
    w[i] = moe__fmaf(-a->step, mi / moe__fmaf(sqrtf(vi), a->root, a->eps), a->keep * w[i]);
    g[i] = 0;
  }
}

/* The step of 16 elements; the moments go back through m and v. */
#define MOE__ADAM_KERNELS(S, T)                                                                    \
  T MOE__INLINE S##_f S##_adam16(S##_f w, S##_f g, S##_f *m, S##_f *v, const moe__adam *a) {       \
    S##_f d = S##_mul(S##_set(a->factor), g), zero = S##_set(0.0f), mi, vi, q;                     \
    mi = S##_fma(S##_set(a->one_beta1), S##_sub(d, *m), *m);                                       \
    vi = S##_fma(S##_set(a->one_beta2), S##_mul(d, d), S##_mul(S##_set(a->beta2), *v));            \
    mi = S##_sel(S##_lt(S##_abs(mi), S##_set(MOE__M_TINY)), zero, mi);                             \
    vi = S##_sel(S##_lt(vi, S##_set(MOE__V_TINY)), zero, vi);                                      \
    *m = mi;                                                                                       \
    *v = vi;                                                                                       \
    q = S##_div(mi, S##_fma(S##_sqrt(vi), S##_set(a->root), S##_set(a->eps)));                     \
    return S##_fnma(S##_set(a->step), q, S##_mul(S##_set(a->keep), w));                            \
  }                                                                                                \
  T static void S##_adam_run(float *w, float *g, float *m, float *v, size_t n,                     \
                             const moe__adam *a) {                                                 \
    S##_f mi, vi, wi;                                                                              \
    size_t i = 0;                                                                                  \
    for (; i + 16 <= n; i += 16) {                                                                 \
      mi = S##_load(m + i);                                                                        \
      vi = S##_load(v + i);                                                                        \
      wi = S##_adam16(S##_load(w + i), S##_load(g + i), &mi, &vi, a);                              \
      S##_store(m + i, mi);                                                                        \
      S##_store(v + i, vi);                                                                        \
      S##_store(w + i, wi);                                                                        \
      S##_store(g + i, S##_set(0.0f));                                                             \
    }                                                                                              \
    if (i == n) return;                                                                            \
    mi = S##_loadn(m + i, n - i);                                                                  \
    vi = S##_loadn(v + i, n - i);                                                                  \
    wi = S##_adam16(S##_loadn(w + i, n - i), S##_loadn(g + i, n - i), &mi, &vi, a);                \
    S##_storen(m + i, mi, n - i);                                                                  \
    S##_storen(v + i, vi, n - i);                                                                  \
    S##_storen(w + i, wi, n - i);                                                                  \
    S##_storen(g + i, S##_set(0.0f), n - i);                                                       \
  }                                                                                                \
  static const moe__adam_kernels S##_adam = {S##_adam_run};
typedef struct moe__adam_kernels {
  void (*run)(float *w, float *g, float *m, float *v, size_t n, const moe__adam *a);
} moe__adam_kernels;
static const moe__adam_kernels moe__scalar_adam = {moe__scalar_adam_run};
MOE__V_STAMP(MOE__ADAM_KERNELS)
#undef MOE__ADAM_KERNELS

/* The step of one span, where `all` describes the whole flat arrays. */
static moe_adam_op moe__span_op(const moe_adam_op *all, const moe__span *span) {
  moe_adam_op op = *all;
  op.w += span->offset;
  op.g += span->offset;
  op.m += span->offset;
  op.v += span->offset;
  op.count = span->count;
  op.lr_scale = span->lr_scale;
  op.weight_decay = span->weight_decay;
  return op;
}

typedef struct moe__adam_job {
  const moe_adam_op *all;
  const moe__span *spans;
  int32_t n;
  const moe__adam_kernels *kernels;
} moe__adam_job;

static void moe__adam_tile(void *arg, int32_t tile, int32_t slot) {
  const moe__adam_job *job = (const moe__adam_job *)arg;
  const moe__span *span = moe__span_find(job->spans, job->n, tile);
  moe_adam_op op = moe__span_op(job->all, span);
  size_t at = (size_t)(tile - span->tile) * MOE__ADAM_TILE;
  size_t count = op.count - at < MOE__ADAM_TILE ? op.count - at : (size_t)MOE__ADAM_TILE;
  moe__adam a;
  (void)slot;
  if (!(op.lr_scale > 0)) {
    memset(op.g + at, 0, count * sizeof *op.g);
    return;
  }
  a = moe__adam_make(&op);
  job->kernels->run(op.w + at, op.g + at, op.m + at, op.v + at, count, &a);
}

/* The step on every span of the flat arrays that `all` describes. */
static void moe__spans_adam(const moe_adam_op *all, const moe__span *spans, int32_t n,
                            const moe_env *env) {
  moe__adam_job job;
  job.all = all;
  job.spans = spans;
  job.n = n;
  job.kernels = MOE__V_PICK(env->isa, adam);
  moe__parallel(env, moe__spans_tiles(spans, n), moe__adam_tile, &job);
}

MOE_API void moe_adam_op_init(moe_adam_op *op) {
  memset(op, 0, sizeof *op);
  op->lr = 5e-5f;
  op->lr_scale = 1;
  op->factor = 1;
  op->beta1 = 0.9f;
  op->beta2 = 0.999f;
  op->eps = 1e-8f;
}

MOE_API moe_status moe_adam_step(const moe_adam_op *op, const moe_env *env) {
  moe__span all;
  if (op->t < 1)
    return moe__fail(env, MOE_E_ARGUMENT, "Adam: t is %lld, expected 1 or more", (long long)op->t);
  if (!moe__is_beta(op->beta1) || !moe__is_beta(op->beta2))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "Adam: beta1 is %g and beta2 is %g, expected 0 to below 1", (double)op->beta1,
                     (double)op->beta2);
  all.offset = 0;
  all.count = op->count;
  all.tile = 0;
  all.lr_scale = op->lr_scale;
  all.weight_decay = op->weight_decay;
  moe__spans_adam(op, &all, 1, env);
  return MOE_OK;
}

MOE_API double moe_gradient_norm(const float *g, size_t n, const moe_env *env) {
  moe__span span;
  memset(&span, 0, sizeof span);
  span.count = n;
  span.lr_scale = 1;
  return moe__spans_norm(g, &span, 1, env);
}

/* ---- which row of which task comes next ---- >>sampler
   The state is the number of draws: a draw is a function of (seed, drawn) and, if a task is drawn
   first and then one of its rows, of how often that task was drawn. A run that continues from a
   copy of these numbers draws the same rows as an uninterrupted one. */

/* What a random number is for: the last part of its key. */
enum { MOE__SAMPLER_ALL = 0, MOE__SAMPLER_TASK = 1, MOE__SAMPLER_ROW = 2 };

/* exp(x) of a double x <= 0: x = e log 2 + r, the series of exp(r), |r| <= log(2) / 2. Plain
   arithmetic only: the same bits everywhere. */
static double moe__exp_double(double x) {
  uint64_t bits;
  double power, r, sum = 1;
  int e, i;
  if (!(x > -700)) return 0;
  e = (int)(x * 1.4426950408889634 - 0.5);
  r = x - e * 0.69314718055994530942;
  for (i = 16; i >= 1; --i) sum = 1 + sum * r / i;
  bits = (uint64_t)(e + 1023) << 52;
  memcpy(&power, &bits, sizeof power);
  return sum * power;
}

MOE_API moe_status moe_sampler_init(moe_sampler *sampler, const moe_sampler_config *config,
                                    const int64_t *rows, int64_t *used, int32_t T,
                                    const moe_env *env) {
  int64_t total = 0;
  int32_t t;
  if (T < 1 || T > MOE_MAX_TASKS)
    return moe__fail(env, MOE_E_ARGUMENT, "sampler: T is %d, expected 1 to %d tasks", (int)T,
                     MOE_MAX_TASKS);
  if ((unsigned)config->sampling > MOE_SAMPLING_UNIFORM_NATURAL)
    return moe__fail(env, MOE_E_ARGUMENT, "sampler: unknown sampling mode %d",
                     (int)config->sampling);
  if (config->sampling == MOE_SAMPLING_TEMPERATURE && !(config->tau > 0 && config->tau < 1e9f))
    return moe__fail(env, MOE_E_ARGUMENT, "sampler: tau is %g, expected above 0 and below 1e9",
                     (double)config->tau);
  if (config->sampling == MOE_SAMPLING_UNIFORM_NATURAL && config->draws < 1)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "sampler: draws is %lld, but uniform-natural sampling needs the number of "
                     "draws of the whole run",
                     (long long)config->draws);
  if (config->in_order && (config->sampling != MOE_SAMPLING_NATURAL || config->run))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "sampler: in_order is 1, expected 0 unless sampling is natural and run is 0");
  if (config->run < 0)
    return moe__fail(env, MOE_E_ARGUMENT, "sampler: run is %d, expected 0 or more",
                     (int)config->run);
  for (t = 0; t < T; ++t) {
    if (rows[t] < 0 || rows[t] > INT64_MAX - total)
      return moe__fail(env, MOE_E_ARGUMENT,
                       "sampler: rows[%d] is %lld, expected 0 or more, and below 2^63 in all",
                       (int)t, (long long)rows[t]);
    total += rows[t];
  }
  if (total == 0)
    return moe__fail(env, MOE_E_ARGUMENT, "sampler: none of the %d tasks has a row", (int)T);
  sampler->config = *config;
  sampler->T = T;
  sampler->rows = rows;
  sampler->total = total;
  sampler->drawn = 0;
  sampler->used = used;
  memset(used, 0, (size_t)T * sizeof *used);
  return MOE_OK;
}

/* Draw number i of natural sampling: epochs over all rows of all tasks, each in a new random
   order. */
static void moe__sample_natural(const moe_sampler *sampler, int64_t i, int32_t *task,
                                int64_t *row) {
  uint64_t total = (uint64_t)sampler->total, at = (uint64_t)i % total;
  int32_t t = 0;
  if (!sampler->config.in_order)
    at = moe__permute(moe_key(sampler->config.seed, (uint64_t)i / total, 0, 0, MOE__SAMPLER_ALL),
                      at, total);
  for (; at >= (uint64_t)sampler->rows[t]; ++t) at -= (uint64_t)sampler->rows[t];
  *task = t;
  *row = (int64_t)at;
}

/* The draw that decides on the task: with homogeneous batches the first of its run. */
static int64_t moe__sample_first(const moe_sampler *sampler) {
  int32_t run = sampler->config.run;
  return run ? sampler->drawn / run * run : sampler->drawn;
}

/* Whether draw number i, of a task and then of one of its rows, draws the task by its size. */
static int moe__sample_by_size(const moe_sampler_config *config, int64_t i) {
  return config->sampling == MOE_SAMPLING_NATURAL ||
         (config->sampling == MOE_SAMPLING_UNIFORM_NATURAL && i >= config->draws / 2);
}

/* Share of a task before all shares are divided by their sum: 1, its rows, or rows^(1/tau) relative
   to the task with most rows; 0 without rows. */
static double moe__sample_share(const moe_sampler *sampler, int32_t t, double log_most) {
  if (sampler->rows[t] == 0) return 0;
  if (moe__sample_by_size(&sampler->config, moe__sample_first(sampler)))
    return (double)sampler->rows[t];
  if (sampler->config.sampling != MOE_SAMPLING_TEMPERATURE) return 1;
  return moe__exp_double((moe__log_double((double)sampler->rows[t]) - log_most) /
                         (double)sampler->config.tau);
}

/* Chooses a task by its share, from the random number of this draw. The last task with a share also
   gets the remainder that rounding leaves. */
static int32_t moe__sample_task(const moe_sampler *sampler) {
  uint64_t key = moe_key(sampler->config.seed, 0, 0, 0, MOE__SAMPLER_TASK);
  double sum = 0, log_most, left;
  int64_t most = 0;
  int32_t t, last = 0;
  for (t = 0; t < sampler->T; ++t)
    if (sampler->rows[t] > most) most = sampler->rows[t];
  log_most = moe__log_double((double)most);
  for (t = 0; t < sampler->T; ++t) sum += moe__sample_share(sampler, t, log_most);
  left = sum * moe__uniform(key, (uint64_t)moe__sample_first(sampler));
  for (t = 0; t < sampler->T; ++t) {
    double share = moe__sample_share(sampler, t, log_most);
    if (share > 0) last = t;
    if (left < share) return t;
    left -= share;
  }
  return last;
}

MOE_API void moe_sampler_next(moe_sampler *sampler, int32_t *task, int64_t *row) {
  int64_t uniform = 0; /* draws before natural sampling begins */
  int32_t t;
  if (sampler->config.sampling == MOE_SAMPLING_UNIFORM_NATURAL)
    uniform = sampler->config.draws / 2;
  else if (sampler->config.sampling != MOE_SAMPLING_NATURAL)
    uniform = INT64_MAX;
  if (sampler->config.run)
    uniform = INT64_MAX; /* a run is of one task: the task is drawn first, then its rows */
  if (sampler->drawn >= uniform) {
    moe__sample_natural(sampler, sampler->drawn - uniform, &t, row);
  } else {
    uint64_t n, i;
    t = moe__sample_task(sampler);
    n = (uint64_t)sampler->rows[t];
    i = (uint64_t)sampler->used[t];
    *row = (int64_t)moe__permute(
        moe_key(sampler->config.seed, i / n, (uint64_t)t, 0, MOE__SAMPLER_ROW), i % n, n);
  }
  ++sampler->used[t];
  ++sampler->drawn;
  *task = t;
}

/* ---- accumulate, update, gradient check ---- >>trainer */

struct moe_trainer {
  moe_model *model;
  moe_context *context;
  moe_train_config config;
  int64_t step;        /* steps so far */
  float lr;            /* of moe_trainer_set_lr, -1: the configuration's */
  size_t first, owned; /* the range of the weights that is stepped here: all, or a share */
  float *g, *m, *v;    /* gradients in the layout of the weights, moments (owned) */
  moe__span *spans;    /* ranges with one learning rate and decay, counted from `first` */
  int32_t n_spans;
  moe_adam_op *ops; /* (n_spans) on a DEVICE, where g, m and v are one array of it */
  int64_t fetched;  /* on a DEVICE: steps in the host's weights, where those of it are newer */
  int owns_block;
};

static moe_status moe__trainer_carve(moe__layout *layout, moe_trainer *t, void **context,
                                     size_t *context_bytes, const moe_model *model,
                                     const moe_limits *limits, const moe_env *env) {
  size_t n = moe_model_parameters(model);
  const moe_share *share = t->config.share;
  moe_limits training = *limits;
  moe_status status;
  training.training = 1;
  status = moe_context_size(model, &training, context_bytes, env);
  if (status) return status;
  t->first = share ? share->first : 0;
  t->owned = share ? share->count : n;
  if (t->first > n || t->owned > n - t->first)
    return moe__fail(env, MOE_E_ARGUMENT, "trainer: its share is %zu weights from %zu of %zu",
                     t->owned, t->first, n);
  if (share && moe__on_device(env))
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "trainer: a share of the weights is stepped on the "
                     "CPU alone, not by %s",
                     env->backend->name);
  if (t->config.ready && moe__on_device(env))
    return moe__fail(env, MOE_E_UNSUPPORTED, "trainer: ready is called on the CPU alone, not by %s",
                     env->backend->name);
  if (moe__on_device(env))
    t->ops = (moe_adam_op *)moe__carve(layout, (size_t)model->tensors, sizeof(moe_adam_op));
  else {
    t->g = MOE__FLOATS(layout, n);
    t->m = MOE__FLOATS(layout, t->owned);
    t->v = MOE__FLOATS(layout, t->owned);
  }
  t->spans = (moe__span *)moe__carve(layout, (size_t)model->tensors, sizeof(moe__span));
  *context = moe__carve(layout, *context_bytes, 1);
  return MOE_OK;
}

MOE_API moe_status moe_trainer_size(const moe_model *model, const moe_limits *limits,
                                    const moe_train_config *config, size_t *bytes,
                                    const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe_trainer t;
  void *context;
  size_t context_bytes = 0;
  moe_status status = moe__train_config_check(config, env);
  memset(&t, 0, sizeof t);
  t.config = *config;
  moe__carve(&layout, 1, sizeof t);
  if (!status)
    status = moe__trainer_carve(&layout, &t, &context, &context_bytes, model, limits, env);
  if (!status && !model->T)
    status = moe__fail(env, MOE_E_ARGUMENT,
                       "trainer: the model has no tasks to learn: moe_model_adapt adds one");
  if (status) return status;
  if (layout.bad)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "trainer: gradients and moments exceed the address space of this machine");
  *bytes = layout.used;
  return MOE_OK;
}

/* Releases what is not in the trainer's block. */
static void moe__trainer_leave(moe_trainer *t) {
  const moe_backend *b = t->context->device.env.backend;
  if (b) {
    if (moe__model_fetch(t->model, NULL)) t->model->newer = 0; /* the host's are the newest left */
    if (t->model->device.stream == t->context->device.env.stream) t->model->device.stream = NULL;
    if (t->g) b->release(b, t->g);
  }
  moe_context_free(t->context);
}

/* Gradients and moments: those of the host are in the trainer's block. All are zero. */
static moe_status moe__trainer_clear_all(moe_trainer *t) {
  const moe_env *on = &t->context->device.env;
  size_t n = t->model->plan.total, bytes = n * sizeof(float);
  void *flat = NULL;
  moe_status status;
  if (!on->backend) {
    memset(t->g, 0, bytes);
    memset(t->m, 0, t->owned * sizeof(float));
    memset(t->v, 0, t->owned * sizeof(float));
    return MOE_OK;
  }
  status = on->backend->alloc(on->backend, on, &flat, 3 * bytes);
  if (status) return status;
  t->g = (float *)flat;
  t->m = t->g + n;
  t->v = t->m + n;
  return on->backend->clear(on->backend, on, flat, 3 * bytes);
}

/* Cuts a tensor to what is stepped here, counted from there; 0: nothing of it. */
static int moe__trainer_owns(const moe_trainer *t, moe_tensor *tensor) {
  size_t end = tensor->offset + tensor->count, last = t->first + t->owned;
  size_t begin = tensor->offset > t->first ? tensor->offset : t->first;
  if (end > last) end = last;
  if (begin >= end) return 0;
  tensor->offset = begin - t->first;
  tensor->count = end - begin;
  return 1;
}

MOE_API moe_status moe_trainer_init(moe_trainer **out, void *block, size_t bytes, moe_model *model,
                                    const moe_limits *limits, const moe_train_config *config,
                                    const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe_limits training = *limits;
  moe_trainer *t;
  moe_tensor tensor;
  void *context;
  size_t need = 0, context_bytes = 0;
  int32_t i;
  moe_status status = moe_trainer_size(model, limits, config, &need, env);
  if (!status) status = moe__check_block("a trainer", block, bytes, need, env);
  if (!status && !model->writable)
    status = moe__fail(
        env, MOE_E_ARGUMENT,
        "a model opened in place cannot be trained: read it with moe_model_read or moe_model_load");
  if (status) return status;
  layout.base = (unsigned char *)block;
  t = (moe_trainer *)moe__carve(&layout, 1, sizeof *t);
  memset(t, 0, sizeof *t);
  t->config = *config;
  status = moe__trainer_carve(&layout, t, &context, &context_bytes, model, limits, env);
  if (status) return status;
  training.training = 1;
  status = moe_context_init(&t->context, context, context_bytes, model, &training, env);
  if (status) return status;
  t->model = model;
  t->lr = -1;
  for (i = 0; i < model->tensors; ++i) {
    moe_model_tensor(model, i, &tensor);
    if (moe__trainer_owns(t, &tensor))
      t->n_spans = moe__spans_add(t->spans, t->n_spans, &tensor, config);
  }
  status = moe__trainer_clear_all(t);
  if (status) {
    moe__trainer_leave(t);
    return status;
  }
  *out = t;
  return MOE_OK;
}

MOE_API moe_status moe_trainer_create(moe_trainer **out, moe_model *model, const moe_limits *limits,
                                      const moe_train_config *config, const moe_env *env) {
  size_t bytes = 0;
  void *block;
  moe_status status = moe_trainer_size(model, limits, config, &bytes, env);
  if (status) return status;
  /* forward is faster with packed weights, and every step packs them again */
  if (moe__on_device(env) ? model->device.backend != env->backend : !model->panels)
    status = moe_model_pack(model, NULL, env);
  if (!status && !moe__on_device(env)) status = moe__model_pack_back(model, env);
  if (status) return status;
  block = moe__alloc(bytes);
  if (!block) return moe__fail(env, MOE_E_MEMORY, "no memory for a trainer of %zu bytes", bytes);
  status = moe_trainer_init(out, block, bytes, model, limits, config, env);
  if (status)
    moe__release(block);
  else
    (*out)->owns_block = 1;
  return status;
}

MOE_API void moe_trainer_free(moe_trainer *trainer) {
  if (!trainer) return;
  moe__trainer_leave(trainer);
  if (trainer->owns_block) moe__release(trainer);
}

MOE_API float *moe_trainer_gradients(moe_trainer *trainer) {
  return trainer->context->device.env.backend ? NULL : trainer->g;
}
MOE_API moe_context *moe_trainer_context(moe_trainer *trainer) { return trainer->context; }
MOE_API int64_t moe_trainer_steps_done(const moe_trainer *trainer) { return trainer->step; }

static void moe__trainer_clear(moe_trainer *t) {
  moe__arena_clear(t->context, t->g, t->model->plan.total * sizeof(float));
}

/* Where a device failed: says what is left. */
static moe_status moe__trainer_failed(const moe_trainer *t, moe_status status, const moe_env *env) {
  const moe_env *on = &t->context->device.env;
  if (!on->backend) return status;
  return moe__fail(env, status, "step %lld: %s failed; the host has the weights after step %lld",
                   (long long)t->step + 1, on->backend->name,
                   (long long)(t->model->newer ? t->fetched : t->step));
}

/* Forward and losses of a training pass. */
static moe_status moe__trainer_forward(moe_trainer *t, moe__pass *pass, const moe_batch *batch,
                                       const moe_env *env) {
  moe_context *c = t->context;
  int32_t bad;
  moe_status status;
  moe__pass_begin(c, pass, batch, env);
  pass->dropout = t->config.dropout;
  pass->balance = t->config.balance;
  pass->z_loss = t->config.z_loss;
  pass->jitter = t->config.jitter;
  pass->tau = moe_train_tau(&t->config, t->step);
  pass->seed = t->config.seed;
  pass->step = (uint64_t)t->step;
  status = moe__forward(c, pass, c->scores, c->losses);
  if (!status && pass->S > 0 &&
      !moe__arena_read(c, c->device.losses, c->losses,
                       (size_t)c->limits.sequences + (size_t)t->model->config.layers))
    status = MOE_E_IO;
  if (status) return moe__trainer_failed(t, status, env);
  bad = moe__losses_check(c, pass);
  moe__profile_end(env, MOE_PROFILE_LOSSES);
  if (bad >= 0 && bad < pass->S)
    return moe__fail(env, MOE_E_NONFINITE,
                     "step %lld: the loss of sequence %d (task '%s') is not finite",
                     (long long)t->step + 1, (int)bad, t->model->tasks[batch->task[bad]].name);
  if (bad >= 0)
    return moe__fail(env, MOE_E_NONFINITE, "step %lld: the router's auxiliary loss is not finite",
                     (long long)t->step + 1);
  return MOE_OK;
}

MOE_API moe_status moe_trainer_accumulate(moe_trainer *trainer, const moe_batch *batch,
                                          int32_t batch_size, float *loss, float *losses,
                                          const moe_env *env) {
  moe_context *c = trainer->context;
  moe__pass pass;
  moe_status status = moe__pass_check(c, batch, 1, env);
  if (status) return status;
  if (batch_size == 0) batch_size = moe__max(batch->S, 1);
  if (batch_size < batch->S)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "batch_size is %d, expected at least %d, the sequences of this micro-batch",
                     (int)batch_size, (int)batch->S);
  status = moe__trainer_forward(trainer, &pass, batch, env);
  if (status) {
    moe__trainer_clear(trainer);
    return status;
  }
  pass.batch_size = batch_size;
  pass.train = &trainer->config;
  moe__backward(c, &pass, trainer->g);
  if (loss) *loss = (float)moe__losses_sum(c, &pass);
  if (losses) memcpy(losses, moe__losses_read(c), (size_t)pass.S * sizeof(float));
  return MOE_OK;
}

MOE_API moe_status moe_trainer_set_lr(moe_trainer *trainer, float lr, const moe_env *env) {
  if (!(lr <= MOE__HUGE))
    return moe__fail(env, MOE_E_ARGUMENT, "lr is %g, expected 0 or more (below 0: the schedule's)",
                     (double)lr);
  trainer->lr = lr < 0 ? -1 : lr;
  return MOE_OK;
}

MOE_API float moe_trainer_lr(const moe_trainer *trainer) {
  return trainer->lr < 0 ? moe_train_lr(&trainer->config, trainer->step + 1) : trainer->lr;
}

/* The next step of Adam on all that is stepped here; the caller sets factor and lr. */
static moe_adam_op moe__trainer_op(const moe_trainer *t) {
  moe_adam_op op;
  moe_adam_op_init(&op);
  op.w = (t->ops ? t->model->resident : t->model->writable) + t->first;
  op.g = t->g + t->first;
  op.m = t->m;
  op.v = t->v;
  op.count = t->owned;
  op.t = t->step + 1;
  op.beta1 = t->config.beta1;
  op.beta2 = t->config.beta2;
  op.eps = t->config.eps;
  return op;
}

/* Norm of all gradients, and the step itself; on a device span by span. */
static moe_status moe__trainer_norm(moe_trainer *t, const moe_adam_op *op, double *norm,
                                    const moe_env *env) {
  const moe_env *on = &t->context->device.env;
  const moe_share *share = t->config.share;
  int32_t i;
  if (!on->backend) {
    *norm = moe__spans_norm(op->g, t->spans, t->n_spans, env);
    if (share) *norm = sqrt(share->sum(share->user, *norm * *norm));
    return MOE_OK;
  }
  for (i = 0; i < t->n_spans; ++i) t->ops[i] = moe__span_op(op, &t->spans[i]);
  return on->backend->grad_norm(on->backend, on, norm, t->ops, t->n_spans);
}

static moe_status moe__trainer_adam(moe_trainer *t, const moe_adam_op *op, const moe_env *env) {
  const moe_env *on = &t->context->device.env;
  const moe_backend *b = on->backend;
  moe_model *model = t->model;
  moe_status status;
  int32_t i;
  if (!b) {
    const moe_share *share = t->config.share;
    moe__spans_adam(op, t->spans, t->n_spans, env);
    if (share) moe__trainer_clear(t); /* what others step, too */
    if (share) share->weights(share->user, model->writable, model->plan.total);
    return MOE_OK;
  }
  for (i = 0; i < t->n_spans; ++i) t->ops[i] = moe__span_op(op, &t->spans[i]);
  if (!model->newer) t->fetched = t->step;
  model->newer = 1; /* even if it fails half-way: then the next download says so */
  model->device.stream = on->stream;
  status = b->adam(b, on, t->ops, t->n_spans);
  if (!status && b->changed) b->changed(b, on, model->resident, model->plan.total);
  return status;
}

/* After a step on a device whose table asks for it: downloads the weights. */
static moe_status moe__trainer_mirror(const moe_trainer *t, const moe_env *env) {
  const moe_env *on = &t->context->device.env;
  if (!MOE__BACKEND(on) || !MOE__HAS(on, mirror) || on->backend->mirror < 1) return MOE_OK;
  return t->step % on->backend->mirror ? MOE_OK : moe__model_fetch(t->model, env);
}

MOE_API moe_status moe_trainer_step(moe_trainer *trainer, float *norm, const moe_env *env) {
  moe_model *model = trainer->model;
  moe_adam_op op = moe__trainer_op(trainer);
  double length = 0;
  moe_status status;
  if (trainer->step >= trainer->config.steps)
    return moe__fail(env, MOE_E_ARGUMENT, "all %lld steps of the schedule are done",
                     (long long)trainer->config.steps);
  op.lr = moe_trainer_lr(trainer);
  if (!moe__within(op.lr, 0, MOE__HUGE))
    return moe__fail(env, MOE_E_ARGUMENT, "step %lld: lr_schedule returned %g, expected 0 or more",
                     (long long)op.t, (double)op.lr);
  moe__profile_begin(env);
  status = moe__trainer_norm(trainer, &op, &length, env);
  if (status) return moe__trainer_failed(trainer, status, env);
  if (!moe__finite(length)) {
    moe__trainer_clear(trainer);
    return moe__fail(env, MOE_E_NONFINITE,
                     "step %lld: the gradient is not finite; the weights are unchanged",
                     (long long)op.t);
  }
  op.factor = moe__clip_factor(length, trainer->config.clip_norm);
  status = moe__trainer_adam(trainer, &op, env);
  if (status) return moe__trainer_failed(trainer, status, env);
  ++trainer->step;
  status = moe__trainer_mirror(trainer, env);
  if (status) return moe__trainer_failed(trainer, status, env);
  moe__profile_end(env, MOE_PROFILE_OPTIMIZER);
  if (model->panels && !trainer->ops) {
    moe__model_repack(model, env);
    moe__profile_end(env, MOE_PROFILE_PACKING);
  }
  if (norm) *norm = (float)length;
  return MOE_OK;
}

/* Sets a weight in the array that passes read. */
static moe_status moe__move_weight(moe_trainer *t, float *weight, float value) {
  const moe_env *on = &t->context->device.env;
  *weight = value;
  if (!on->backend) return MOE_OK;
  return on->backend->upload(on->backend, on, t->model->resident + (weight - t->model->writable),
                             weight, sizeof value);
}

/* The loss with one weight changed by h. */
static moe_status moe__moved_loss(moe_trainer *t, const moe_batch *batch, float *weight, float h,
                                  double *loss, const moe_env *env) {
  moe__pass pass;
  float old = *weight;
  moe_status status = moe__move_weight(t, weight, old + h), back;
  if (!status) status = moe__trainer_forward(t, &pass, batch, env);
  back = moe__move_weight(t, weight, old);
  if (!status) status = back;
  if (!status) *loss = moe__losses_sum(t->context, &pass);
  return status;
}

/* Error of one gradient against central differences of fourth order. */
static moe_status moe__check_gradient(moe_trainer *t, const moe_batch *batch, size_t index,
                                      double floor_, double *error, const moe_env *env) {
  const float h = 1.0f / 128;
  double f[4] = {0, 0, 0, 0}, slope;
  int i;
  for (i = 0; i < 4; ++i) {
    float step = (float)(i - (i < 2 ? 2 : 1)) * h;
    moe_status status = moe__moved_loss(t, batch, &t->model->writable[index], step, &f[i], env);
    if (status) return status;
  }
  slope = (8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * (double)h);
  *error = fabs(slope - (double)t->g[index]) / floor_;
  return MOE_OK;
}

/* The first sample of a tensor is its largest gradient; the others are random. */
static size_t moe__check_element(const moe_trainer *t, const moe_tensor *tensor, int32_t round) {
  const float *g = t->g + tensor->offset;
  size_t i, best = 0;
  if (round > 0)
    return tensor->offset +
           (size_t)(moe_key(t->config.seed, (uint64_t)round, tensor->offset, 0, 0) % tensor->count);
  for (i = 1; i < tensor->count; ++i)
    if (fabsf(g[i]) > fabsf(g[best])) best = i;
  return tensor->offset + best;
}

/* The comparison itself, with gradients computed and routes fixed. */
static moe_status moe__check_samples(moe_trainer *t, const moe_batch *batch, int32_t samples,
                                     double *worst, const moe_env *env) {
  int32_t i, n = t->model->tensors;
  double whole = moe_gradient_norm(t->g, t->model->plan.total, env);
  for (i = 0; i < samples; ++i) {
    moe_tensor tensor;
    double norm, error = 0;
    moe_status status;
    moe_model_tensor(t->model, samples < n ? (int32_t)((int64_t)i * n / samples) : i % n, &tensor);
    norm = moe_gradient_norm(t->g + tensor.offset, tensor.count, env);
    if (norm < 0.01 * whole) norm = 0.01 * whole;
    if (norm == 0) norm = 1;
    status =
        moe__check_gradient(t, batch, moe__check_element(t, &tensor, i / n), norm, &error, env);
    if (status) return status;
    if (*worst == *worst && !(error <= *worst)) *worst = error; /* NaN is the worst, and stays */
  }
  return MOE_OK;
}

/* A copy of the routes of the last pass (L, M, k), which the caller frees. A check fixes the
   routes, since a changed choice makes the loss jump. */
static moe_status moe__check_routes(int32_t **out, const moe_context *c, const moe_env *env) {
  const moe_config *config = &c->model->config;
  size_t slots = (size_t)c->M * (size_t)config->top_k;
  int32_t l, *experts = (int32_t *)moe__alloc((size_t)config->layers * slots * sizeof *experts);
  moe_status status = MOE_OK;
  if (!experts) return moe__fail(env, MOE_E_MEMORY, "gradient check: no memory for the routes");
  for (l = 0; l < config->layers && !status; ++l) {
    moe_routes r;
    status = moe_context_routes(c, l, &r);
    if (!status) memcpy(experts + (size_t)l * slots, r.expert, slots * sizeof *experts);
  }
  *out = experts;
  return status;
}

/* The gradients where the host can read them: in place, or in a copy that the caller frees. */
static moe_status moe__check_gradients(float **copy, const moe_trainer *t, const moe_env *env) {
  const moe_env *on = &t->context->device.env;
  size_t bytes = t->model->plan.total * sizeof(float);
  moe_status status = moe__model_fetch(t->model, env);
  if (status || !on->backend) return status;
  *copy = (float *)moe__alloc(bytes);
  if (!*copy)
    return moe__fail(env, MOE_E_MEMORY, "gradient check: no memory for a copy of the gradients");
  return on->backend->download(on->backend, on, *copy, t->g, bytes);
}

MOE_API moe_status moe_gradcheck(moe_trainer *trainer, const moe_batch *batch, int32_t samples,
                                 float *error, const moe_env *of_caller) {
  moe_env fp32 = moe__in_fp32(of_caller), *env = &fp32; /* bf16 would round the slopes away */
  moe_context *c = trainer->context;
  const int32_t *forced = c->forced;
  float *panels = trainer->model->panels, *g = trainer->g, *copy = NULL;
  int32_t *experts = NULL;
  double worst = 0;
  moe_status status;
  if (samples < 1)
    return moe__fail(env, MOE_E_ARGUMENT, "gradient check: samples is %d, expected 1 or more",
                     (int)samples);
  moe__trainer_clear(trainer);
  status = moe_trainer_accumulate(trainer, batch, 0, NULL, NULL, env);
  if (!status && batch->S == 0) *error = 0; /* nothing to compare */
  if (status || batch->S == 0) return status;
  if (!forced && moe__has_gates(&trainer->model->config))
    status = moe__check_routes(&experts, c, env);
  if (!status) status = moe__check_gradients(&copy, trainer, env);
  if (!status) {
    if (experts) c->forced = experts;
    if (copy) trainer->g = copy;
    trainer->model->panels = NULL; /* packed copies would not follow the weight */
    status = moe__check_samples(trainer, batch, samples, &worst, env);
    trainer->model->panels = panels;
    trainer->g = g;
    c->forced = forced;
  }
  moe__release(experts);
  moe__release(copy);
  moe__trainer_clear(trainer);
  if (!status) *error = (float)worst;
  return status;
}

#endif /* MOE_NO_TRAIN */
/* ---- reading the little JSON that the files need ---- >>json
   A strict pull parser (RFC 8259) over a range of bytes: the caller asks for what it expects,
   nothing is allocated, and a text that is not JSON is an error. */

#define MOE__JSON_DEPTH 64 /* deepest nesting of a value that is skipped */

/* A cursor in a JSON text. `nested`: the text is itself the content of a JSON string, like the
   values of a safetensors header; reading then removes one level of escapes. A copy of a cursor
   allows going back. */
typedef struct moe__json {
  const char *at, *end;
  const char
      *error; /* the first error, a constant string; NULL: none. Nothing is read after an error */
  int nested, first;  /* first: no member of the present object or array was read yet */
  int waiting, count; /* bytes of an escape of the outer level that wait to be read */
  unsigned char wait[4];
} moe__json;

/* The content of a string, with its escapes: from `begin` up to the closing quote. */
typedef struct moe__json_text {
  moe__json begin;
  const char *end; /* of a text that is not nested: its closing quote */
} moe__json_text;

static void moe__json_init(moe__json *j, const char *text, size_t bytes, int nested) {
  memset(j, 0, sizeof *j);
  j->at = text;
  j->end = text + bytes;
  j->nested = nested;
}

static int moe__json_fail(moe__json *j, const char *error) {
  if (!j->error) j->error = error;
  return 0;
}

/* Bytes of the UTF-8 character at p, or 0 where there is none: no overlong forms, no surrogates,
   nothing above U+10FFFF. */
static int moe__utf8_bytes(const unsigned char *p, const unsigned char *end) {
  int n = *p < 0x80 ? 1 : *p < 0xc2 ? 0 : *p < 0xe0 ? 2 : *p < 0xf0 ? 3 : *p < 0xf5 ? 4 : 0, i;
  if (n > end - p) return 0;
  for (i = 1; i < n; ++i)
    if ((p[i] & 0xc0) != 0x80) return 0;
  if (n == 3 && ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f))) return 0;
  if (n == 4 && ((p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f))) return 0;
  return n;
}

static int moe__utf8_put(unsigned char out[4], uint32_t c) {
  if (c < 0x80) return out[0] = (unsigned char)c, 1;
  if (c < 0x800)
    return out[0] = (unsigned char)(0xc0 | c >> 6), out[1] = (unsigned char)(0x80 | (c & 63)), 2;
  if (c < 0x10000) {
    out[0] = (unsigned char)(0xe0 | c >> 12);
    out[1] = (unsigned char)(0x80 | (c >> 6 & 63));
    out[2] = (unsigned char)(0x80 | (c & 63));
    return 3;
  }
  out[0] = (unsigned char)(0xf0 | c >> 18);
  out[1] = (unsigned char)(0x80 | (c >> 12 & 63));
  out[2] = (unsigned char)(0x80 | (c >> 6 & 63));
  out[3] = (unsigned char)(0x80 | (c & 63));
  return 4;
}

static int moe__json_escape(moe__json *j, unsigned char out[4]);

/* The next byte, or -1 at the end and after an error. */
static int moe__json_peek(moe__json *j) {
  moe__json outer;
  if (j->error) return -1;
  if (j->waiting < j->count) return j->wait[j->waiting];
  if (j->at >= j->end) return -1;
  if (!j->nested || *j->at != '\\') return (unsigned char)*j->at;
  moe__json_init(&outer, j->at + 1, (size_t)(j->end - j->at) - 1, 0);
  j->count = moe__json_escape(&outer, j->wait);
  j->waiting = 0;
  j->at = outer.at;
  if (j->count) return j->wait[0];
  moe__json_fail(j, outer.error);
  return -1;
}

static int moe__json_get(moe__json *j) {
  int c = moe__json_peek(j);
  if (c < 0) return c;
  if (j->waiting < j->count)
    ++j->waiting;
  else
    ++j->at;
  return c;
}

static int moe__json_hex4(moe__json *j, uint32_t *out) {
  int i;
  *out = 0;
  for (i = 0; i < 4; ++i) {
    int c = moe__json_get(j);
    int digit = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
    if (digit < 0) return moe__json_fail(j, "expected four hexadecimal digits after \\u");
    *out = *out << 4 | (uint32_t)digit;
  }
  return 1;
}

/* What follows a backslash, as UTF-8: the number of bytes, 0 on an error. A lone \udc80 .. \udcff
   is the byte 80 .. ff: the writer stores bytes that are not UTF-8 so, as Python's
   "surrogateescape" does, and names come back byte for byte. */
static int moe__json_escape(moe__json *j, unsigned char out[4]) {
  static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
  uint32_t high, low;
  int c = moe__json_get(j);
  const char *known = c > 0 ? strchr(from, c) : NULL;
  if (known) return out[0] = (unsigned char)to[known - from], 1;
  if (c != 'u') return moe__json_fail(j, "unknown escape in a string");
  if (!moe__json_hex4(j, &high)) return 0;
  if (high < 0xd800 || high > 0xdfff) return moe__utf8_put(out, high);
  if (high >= 0xdc80 && high <= 0xdcff) return out[0] = (unsigned char)(high & 0xff), 1;
  if (high > 0xdbff || moe__json_get(j) != '\\' || moe__json_get(j) != 'u')
    return moe__json_fail(j, "an unpaired surrogate");
  if (!moe__json_hex4(j, &low)) return 0;
  if (low < 0xdc00 || low > 0xdfff) return moe__json_fail(j, "an unpaired surrogate");
  return moe__utf8_put(out, 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00));
}

/* The byte that the next value starts with: { [ " t f n - or a digit; -1 at the end. */
static int moe__json_kind(moe__json *j) {
  int c;
  while ((c = moe__json_peek(j)) == ' ' || c == '\n' || c == '\r' || c == '\t') moe__json_get(j);
  return c;
}

static int moe__json_expect(moe__json *j, int c, const char *error) {
  if (moe__json_kind(j) != c) return moe__json_fail(j, error);
  return moe__json_get(j), 1;
}

/* Enters an object ('{') or array ('['). */
static int moe__json_enter(moe__json *j, int open) {
  if (!moe__json_expect(j, open, open == '{' ? "expected an object { }" : "expected an array [ ]"))
    return 0;
  return j->first = 1;
}

/* 1: another member follows; 0: the end, or an error. */
static int moe__json_more(moe__json *j, int close) {
  int c = moe__json_kind(j), first = j->first;
  j->first = 0;
  if (c == close) return moe__json_get(j), 0;
  if (first && c >= 0) return 1;
  if (c != ',') return moe__json_fail(j, c < 0 ? "unexpected end of the text" : "expected a comma");
  moe__json_get(j);
  return 1;
}

/* Reads a string. */
static int moe__json_string(moe__json *j, moe__json_text *out) {
  unsigned char bytes[4];
  int c;
  if (!moe__json_expect(j, '"', "expected a string")) return 0;
  out->begin = *j;
  while ((c = moe__json_get(j)) != '"') {
    if (c < 0) return moe__json_fail(j, "a string has no closing quote");
    if (c < 0x20) return moe__json_fail(j, "a control character in a string");
    if (c == '\\' && !moe__json_escape(j, bytes)) return 0;
  }
  out->end = j->at - 1;
  return 1;
}

/* Reads the name of a member and its colon. */
static int moe__json_key(moe__json *j, moe__json_text *out) {
  return moe__json_string(j, out) && moe__json_expect(j, ':', "expected a colon");
}

/* Writes the string, escapes resolved, cut to `capacity` bytes with the zero at its end; returns
   its full length without the zero. out may be NULL. */
static size_t moe__json_copy(char *out, size_t capacity, const moe__json_text *text) {
  moe__json j = text->begin;
  size_t n = 0;
  int c;
  while ((c = moe__json_get(&j)) != '"' && c >= 0) {
    unsigned char bytes[4];
    int i, count = 1;
    bytes[0] = (unsigned char)c;
    if (c == '\\') count = moe__json_escape(&j, bytes);
    for (i = 0; i < count; ++i, ++n)
      if (out && n + 1 < capacity) out[n] = (char)bytes[i];
  }
  if (out && capacity) out[n < capacity ? n : capacity - 1] = 0;
  return n;
}

static int moe__json_is(const moe__json_text *text, const char *word) {
  moe__json j = text->begin;
  int c;
  for (; (c = moe__json_get(&j)) != '"' && c >= 0; ++word) {
    unsigned char bytes[4];
    int i, count = 1;
    bytes[0] = (unsigned char)c;
    if (c == '\\') count = moe__json_escape(&j, bytes);
    for (i = 0; i < count; ++i)
      if ((unsigned char)word[i] != bytes[i] || !word[i]) return 0;
    word += count - 1;
  }
  return !*word;
}

/* Whether a string contains a zero byte, at which C would end it. */
static int moe__json_has_zero(const moe__json_text *text) {
  moe__json j = text->begin;
  unsigned char bytes[4];
  int c;
  while ((c = moe__json_get(&j)) != '"' && c >= 0)
    if (c == '\\' && moe__json_escape(&j, bytes) && !bytes[0]) return 1;
  return 0;
}

/* digits 10^exponent, to a few units of the 16th digit: far below half a unit of a float. */
static double moe__scale10(uint64_t digits, int exponent) {
  double power = 1, p = 10, v = (double)digits;
  int e = exponent < 0 ? -exponent : exponent;
  if (!digits || exponent < -400) return 0;
  if (exponent > 400) return HUGE_VAL;
  if (exponent < -300) return moe__scale10(digits, -300) / moe__scale10(1, -300 - exponent);
  for (; e; e >>= 1) {
    if (e & 1) power *= p;
    if (e > 1) p *= p;
  }
  return exponent < 0 ? v / power : v * power;
}

typedef struct moe__json_number {
  double value;
  uint64_t magnitude; /* of an integer */
  int negative, integer;
} moe__json_number;

/* Appends a digit to *digits while there is room; *dropped counts the others. */
static void moe__json_digit(uint64_t *digits, int *dropped, int c) {
  uint64_t d = (uint64_t)(c - '0');
  if (!*dropped && *digits <= (UINT64_MAX - d) / 10)
    *digits = *digits * 10 + d;
  else if (*dropped < 100000)
    ++*dropped;
}

static int moe__json_is_digit(moe__json *j) {
  int c = moe__json_peek(j);
  return c >= '0' && c <= '9';
}

/* Reads a number. integer: it has neither point nor exponent and `magnitude` holds it exactly. */
static int moe__json_read_number(moe__json *j, moe__json_number *out) {
  uint64_t digits = 0;
  int after_point = 0, dropped = 0, e = 0, minus = 0;
  memset(out, 0, sizeof *out);
  out->integer = 1;
  if (moe__json_kind(j) == '-') moe__json_get(j), out->negative = 1;
  if (!moe__json_is_digit(j)) return moe__json_fail(j, "expected a number");
  if (moe__json_peek(j) == '0') {
    moe__json_get(j);
    if (moe__json_is_digit(j)) return moe__json_fail(j, "a number has a leading 0");
  }
  while (moe__json_is_digit(j)) moe__json_digit(&digits, &dropped, moe__json_get(j));
  if (moe__json_peek(j) == '.') {
    moe__json_get(j), out->integer = 0;
    if (!moe__json_is_digit(j)) return moe__json_fail(j, "expected a digit after the point");
    for (; moe__json_is_digit(j); after_point += after_point < 100000)
      moe__json_digit(&digits, &dropped, moe__json_get(j));
  }
  if (moe__json_peek(j) == 'e' || moe__json_peek(j) == 'E') {
    moe__json_get(j), out->integer = 0;
    if (moe__json_peek(j) == '-' || moe__json_peek(j) == '+') minus = moe__json_get(j) == '-';
    if (!moe__json_is_digit(j)) return moe__json_fail(j, "expected a digit in the exponent");
    while (moe__json_is_digit(j)) {
      int c = moe__json_get(j);
      if (e < 100000) e = e * 10 + (c - '0');
    }
  }
  out->value = moe__scale10(digits, dropped - after_point + (minus ? -e : e));
  if (!(out->value < 1.7e308)) return moe__json_fail(j, "a number is too large");
  if (out->negative) out->value = -out->value;
  out->magnitude = digits;
  if (dropped) out->integer = 0;
  return 1;
}

/* Reads an integer of low .. high. */
static int moe__json_integer(moe__json *j, int64_t low, int64_t high, int64_t *out) {
  moe__json_number number;
  int64_t v;
  if (!moe__json_read_number(j, &number)) return 0;
  if (!number.integer) return moe__json_fail(j, "expected an integer");
  if (number.magnitude > (uint64_t)INT64_MAX) return moe__json_fail(j, "a number is out of range");
  v = number.negative ? -(int64_t)number.magnitude : (int64_t)number.magnitude;
  if (v < low || v > high) return moe__json_fail(j, "a number is out of range");
  *out = v;
  return 1;
}

static int moe__json_float(moe__json *j, float *out) {
  moe__json_number number;
  if (!moe__json_read_number(j, &number)) return 0;
  if (fabs(number.value) > 3.4028235e38) return moe__json_fail(j, "a number is too large");
  *out = (float)number.value;
  return 1;
}

static int moe__json_word(moe__json *j, const char *word) {
  moe__json_kind(j);
  for (; *word; ++word)
    if (moe__json_get(j) != (unsigned char)*word) return moe__json_fail(j, "expected a value");
  return 1;
}

/* Skips a value of any kind, at most MOE__JSON_DEPTH deep. Without recursion, to
   spare the stack. */
static int moe__json_skip(moe__json *j) {
  moe__json_text text;
  moe__json_number number;
  uint64_t objects = 0; /* the lowest bit: the innermost open value is an object, else a list; and
                           so on outwards */
  int depth = 0;        /* open values */
  do {
    int c = moe__json_kind(j), ok = 1;
    if (depth >= MOE__JSON_DEPTH) return moe__json_fail(j, "nested too deeply");
    if (c == '{' || c == '[') {
      moe__json_enter(j, c);
      objects = objects << 1 | (c == '{');
      ++depth;
    } else
      ok = c == '"'   ? moe__json_string(j, &text)
           : c == 't' ? moe__json_word(j, "true")
           : c == 'f' ? moe__json_word(j, "false")
           : c == 'n' ? moe__json_word(j, "null")
                      : moe__json_read_number(j, &number);
    while (ok && depth > 0 && !j->error && !moe__json_more(j, objects & 1 ? '}' : ']')) {
      objects >>= 1;
      --depth;
    }
    if (!ok || j->error || (depth > 0 && (objects & 1) && !moe__json_key(j, &text))) return 0;
  } while (depth > 0);
  return 1;
}

/* Only blanks may follow. */
static int moe__json_finish(moe__json *j) {
  if (!j->error && moe__json_kind(j) >= 0)
    return moe__json_fail(j, "unexpected text after the end");
  return !j->error;
}

/* ---- writing text, numbers and JSON ---- >>out */

/* Bytes for a moe_writer, buffered in portions. Without a writer they are only counted. */
typedef struct moe__out {
  const moe_writer *writer;
  uint64_t total;
  size_t used;
  int failed, nested; /* nested: one more backslash before quotes and backslashes, for JSON within
                         a JSON string */
  char buffer[1024];
} moe__out;

static void moe__out_init(moe__out *out, const moe_writer *writer) {
  out->writer = writer;
  out->total = 0;
  out->used = 0;
  out->failed = out->nested = 0;
}

static void moe__out_flush(moe__out *out) {
  if (out->used && out->writer && !out->failed &&
      out->writer->write(out->writer->user, out->buffer, out->used))
    out->failed = 1;
  out->used = 0;
}

static void moe__out_byte(moe__out *out, char c) {
  if (out->used == sizeof out->buffer) moe__out_flush(out);
  out->buffer[out->used++] = c;
  ++out->total;
}

static void moe__out_text(moe__out *out, const char *text) {
  for (; *text; ++text) {
    if (out->nested && (*text == '"' || *text == '\\')) moe__out_byte(out, '\\');
    moe__out_byte(out, *text);
  }
}

static void moe__out_int(moe__out *out, int64_t v) {
  char text[32];
  moe__format(text, sizeof text, "%lld", (long long)v);
  moe__out_text(out, text);
}

static void moe__out_uint(moe__out *out, uint64_t v) {
  char text[32];
  moe__format(text, sizeof text, "%llu", (unsigned long long)v);
  moe__out_text(out, text);
}

/* The shortest decimal that reads back as the same float: at most 9 digits.
   Infinities and NaN, which JSON lacks, become null. */
static void moe__out_float(moe__out *out, float f) {
  double v = fabs((double)f), scaled;
  int exponent = 0, n;
  uint64_t digits = 0;
  if (!(v <= 3.4028235e38)) {
    moe__out_text(out, "null");
    return;
  }
  if (v > 0) {
    while (v >= moe__scale10(10, exponent)) ++exponent;
    while (v < moe__scale10(1, exponent)) --exponent; /* now 10^exponent <= v < 10^(exponent + 1) */
  }
  for (n = 1; n <= 9; ++n) {
    scaled = exponent - n + 1 > 0 ? v / moe__scale10(1, exponent - n + 1)
                                  : v * moe__scale10(1, n - 1 - exponent);
    digits = (uint64_t)(scaled + 0.5);
    if ((float)moe__scale10(digits, exponent - n + 1) == (float)v) break;
  }
  if (n > 9) n = 9;
  exponent -= n - 1;
  if (f < 0) moe__out_text(out, "-");
  if (exponent < 0 && exponent >= -8 && digits) { /* 0.1, 2.5: with a point, as people write them */
    uint64_t unit = (uint64_t)moe__scale10(1, -exponent);
    char fraction[16];
    moe__out_uint(out, digits / unit);
    moe__format(fraction, sizeof fraction, "%llu", (unsigned long long)(digits % unit + unit));
    fraction[0] = '.';
    moe__out_text(out, fraction);
    return;
  }
  moe__out_uint(out, digits);
  if (exponent && digits) {
    moe__out_text(out, "e");
    moe__out_int(out, exponent);
  }
}

/* A JSON string with its quotes. Bytes that are not UTF-8 become \udc80 .. \udcff, see
   moe__json_escape. */
static void moe__out_string(moe__out *out, const char *text, size_t bytes) {
  const unsigned char *p = (const unsigned char *)text, *end = p + bytes;
  static const char hex[] = "0123456789abcdef";
  moe__out_text(out, "\"");
  while (p < end) {
    int n = moe__utf8_bytes(p, end);
    char escape[7];
    if (n > 1) {
      for (; n; --n) moe__out_byte(out, (char)*p++);
      continue;
    }
    escape[0] = '\\', escape[1] = 'u', escape[2] = n ? '0' : 'd', escape[3] = n ? '0' : 'c';
    escape[4] = hex[*p >> 4], escape[5] = hex[*p & 15], escape[6] = 0;
    if (n && *p >= 0x20) {
      escape[0] = (*p == '"' || *p == '\\') ? '\\' : (char)*p;
      escape[1] = escape[0] == '\\' ? (char)*p : (char)0;
      escape[2] = 0;
    }
    moe__out_text(out, escape);
    ++p;
  }
  moe__out_text(out, "\"");
}

/* ---- the container of files: its header ---- >>safetensors
   A safetensors file: the length of the header (8 bytes, little-endian), the header (JSON: a member
   for each tensor with its dtype, shape and range of bytes, and "__metadata__", texts by name), the
   bytes of the tensors. No number of the file is trusted. */

#define MOE__ST_HEADER_MAX 100000000u /* as in the reference implementation */
#define MOE__ST_DIMS 8

/* clang-format off */
typedef enum moe__dtype { MOE__F32, MOE__F16, MOE__BF16, MOE__U8, MOE__I8, MOE__BOOL, MOE__F8_E4M3,
                          MOE__F8_E5M2, MOE__I16, MOE__U16, MOE__I32, MOE__U32, MOE__I64, MOE__U64,
                          MOE__F64, MOE__DTYPES } moe__dtype;
/* clang-format on */

static const char *const moe__dtype_name[MOE__DTYPES + 1] = {
    "F32", "F16", "BF16", "U8",  "I8",  "BOOL", "F8_E4M3", "F8_E5M2",
    "I16", "U16", "I32",  "U32", "I64", "U64",  "F64",     "an unknown dtype"};
static const unsigned char moe__dtype_bytes[MOE__DTYPES] = {4, 2, 2, 1, 1, 1, 1, 1,
                                                            2, 2, 4, 4, 8, 8, 8};

typedef struct moe__st {
  const char *header;
  size_t header_bytes;
  const unsigned char *data;
  size_t data_bytes, tensors;
  int in_order;       /* the tensors are listed in the order of their bytes */
  moe__json metadata; /* before the object; at NULL: there is none */
} moe__st;

typedef struct moe__st_tensor {
  moe__json_text key;
  char name[128]; /* printable, perhaps cut: for messages */
  moe__dtype dtype;
  int dims;
  size_t shape[MOE__ST_DIMS], count; /* count: elements */
  size_t begin, end;                 /* bytes within the data */
} moe__st_tensor;

/* Text of a file, cut, without bytes that control a terminal. */
static void moe__printable(char *out, size_t capacity, const moe__json_text *text) {
  moe__json_copy(out, capacity, text);
  moe__disarm(out);
}

/* "(384, 1536)"; "()" of a scalar. */
static void moe__shape_text(char *out, size_t capacity, const size_t *shape, int dims) {
  size_t used = 0;
  int i;
  moe__format(out, capacity, "(");
  for (i = 0; i < dims; ++i) {
    used = strlen(out);
    moe__format(out + used, capacity - used, i ? ", %zu" : "%zu", shape[i]);
  }
  used = strlen(out);
  moe__format(out + used, capacity - used, ")");
}

static moe_status moe__st_complain(const moe__st *st, const moe__json *j, const moe_env *env) {
  return moe__fail(env, MOE_E_FORMAT, "safetensors header, byte %zu of %zu: %s",
                   (size_t)(j->at - st->header), st->header_bytes, j->error);
}

/* Reads an array of at most `most` sizes. Returns how many, or -1. */
static int moe__st_sizes(moe__json *j, size_t *out, int most) {
  int n = 0;
  moe__json_enter(j, '[');
  while (moe__json_more(j, ']')) {
    moe__json_number number;
    if (!moe__json_read_number(j, &number)) return -1;
    if (!number.integer || number.negative || number.magnitude > SIZE_MAX)
      return moe__json_fail(j, "expected a size") - 1;
    if (n == most) return moe__json_fail(j, "too many numbers in an array") - 1;
    out[n++] = (size_t)number.magnitude;
  }
  return j->error ? -1 : n;
}

/* Reads the value of a tensor's member. */
static int moe__st_value(moe__json *j, moe__st_tensor *t) {
  moe__json_text key, dtype;
  size_t range[2];
  int seen[3] = {0, 0, 0}, i;
  moe__json_enter(j, '{');
  while (moe__json_more(j, '}')) {
    if (!moe__json_key(j, &key)) return 0;
    if (moe__json_is(&key, "dtype")) {
      ++seen[0];
      if (!moe__json_string(j, &dtype)) return 0;
      for (i = 0; i < MOE__DTYPES && !moe__json_is(&dtype, moe__dtype_name[i]); ++i) continue;
      t->dtype = (moe__dtype)i;
    } else if (moe__json_is(&key, "shape")) {
      ++seen[1];
      t->dims = moe__st_sizes(j, t->shape, MOE__ST_DIMS);
      if (t->dims < 0) return 0;
    } else if (moe__json_is(&key, "data_offsets")) {
      ++seen[2];
      if (moe__st_sizes(j, range, 2) != 2)
        return moe__json_fail(j, "expected two numbers in data_offsets");
      t->begin = range[0];
      t->end = range[1];
    } else if (!moe__json_skip(j))
      return 0;
  }
  if (j->error) return 0;
  if (seen[0] != 1 || seen[1] != 1 || seen[2] != 1)
    return moe__json_fail(j, "expected dtype, shape and data_offsets, once each");
  return 1;
}

/* Shape, dtype and range of a tensor must agree, and the range must be within the file. */
static moe_status moe__st_check(const moe__st *st, moe__st_tensor *t, const moe_env *env) {
  size_t bytes;
  int bad = 0, i, empty = 0;
  char shape[200];
  moe__shape_text(shape, sizeof shape, t->shape, t->dims);
  for (i = 0; i < t->dims; ++i) empty |= !t->shape[i];
  t->count = !empty;
  for (i = 0; i < t->dims && !empty; ++i) t->count = moe__mul(t->count, t->shape[i], &bad);
  bytes = t->dtype == MOE__DTYPES ? t->end - t->begin
                                  : moe__mul(t->count, moe__dtype_bytes[t->dtype], &bad);
  if (bad)
    return moe__fail(env, MOE_E_FORMAT,
                     "tensor %s: its shape %s exceeds the address space of this machine", t->name,
                     shape);
  if (t->begin > t->end || t->end > st->data_bytes)
    return moe__fail(
        env, MOE_E_FORMAT,
        "tensor %s: bytes %zu to %zu, the file has %zu after its header: damaged or truncated",
        t->name, t->begin, t->end, st->data_bytes);
  if (t->end - t->begin != bytes)
    return moe__fail(env, MOE_E_FORMAT, "tensor %s: %s of %s needs %zu bytes, its range has %zu",
                     t->name, moe__dtype_name[t->dtype], shape, bytes, t->end - t->begin);
  return MOE_OK;
}

static void moe__st_begin(const moe__st *st, moe__json *j) {
  moe__json_init(j, st->header, st->header_bytes, 0);
  moe__json_enter(j, '{');
}

/* The next tensor of a file that moe__st_open has accepted: 1, or 0 at the end. */
static int moe__st_next(const moe__st *st, moe__json *j, moe__st_tensor *t) {
  while (moe__json_more(j, '}')) {
    if (!moe__json_key(j, &t->key)) return 0;
    if (moe__json_is(&t->key, "__metadata__")) {
      if (!moe__json_skip(j)) return 0;
      continue;
    }
    moe__printable(t->name, sizeof t->name, &t->key);
    return moe__st_value(j, t) && !moe__st_check(st, t, NULL);
  }
  return 0;
}

/* The bytes of a tensor. */
typedef struct moe__range {
  size_t begin, end;
} moe__range;

static int moe__range_less(const void *items, size_t i, size_t j) {
  const moe__range *r = (const moe__range *)items;
  return r[i].begin < r[j].begin || (r[i].begin == r[j].begin && r[i].end < r[j].end);
}

static void moe__range_swap(void *items, size_t i, size_t j) {
  moe__range *r = (moe__range *)items, t = r[i];
  r[i] = r[j];
  r[j] = t;
}

/* Reports that the tensor of this range does not begin where the previous one ends. */
static moe_status moe__st_gap(const moe__st *st, moe__range range, size_t expected,
                              const moe_env *env) {
  moe__json j;
  moe__st_tensor t;
  moe__st_begin(st, &j);
  while (moe__st_next(st, &j, &t))
    if (t.begin == range.begin && t.end == range.end) break;
  return moe__fail(env, MOE_E_FORMAT,
                   "tensor %s begins at byte %zu of the data, expected %zu: a gap or an overlap",
                   t.name, range.begin, expected);
}

/* Whether tensors listed in any order cover the data without holes and overlaps. */
static moe_status moe__st_cover(const moe__st *st, const moe_env *env) {
  moe__json j;
  moe__st_tensor t;
  size_t n = 0, i, at = 0;
  moe__range *range = (moe__range *)moe__alloc((st->tensors + 1) * sizeof *range);
  moe_status status = MOE_OK;
  if (!range)
    return moe__fail(env, MOE_E_MEMORY, "no memory for the list of %zu tensors", st->tensors);
  moe__st_begin(st, &j);
  for (; n < st->tensors && moe__st_next(st, &j, &t); ++n) {
    range[n].begin = t.begin;
    range[n].end = t.end;
  }
  moe__sort(range, n, moe__range_less, moe__range_swap);
  for (i = 0; i < n && range[i].begin == at; ++i) at = range[i].end;
  if (i < n)
    status = moe__st_gap(st, range[i], at, env);
  else if (at != st->data_bytes)
    status = moe__fail(env, MOE_E_FORMAT,
                       "the tensors end at byte %zu of the data, which has %zu: truncated, or "
                       "something was appended",
                       at, st->data_bytes);
  moe__release(range);
  return status;
}

/* Checks "__metadata__": texts by name. */
static int moe__st_metadata(moe__st *st, moe__json *j) {
  moe__json_text text;
  if (st->metadata.at) return moe__json_fail(j, "__metadata__ is listed twice");
  st->metadata = *j;
  moe__json_enter(j, '{');
  while (moe__json_more(j, '}'))
    if (!moe__json_key(j, &text) || !moe__json_string(j, &text)) return 0;
  return !j->error;
}

/* Checks all members of the header. */
static moe_status moe__st_walk(moe__st *st, const moe_env *env) {
  moe__json j;
  size_t at = 0;
  st->in_order = 1;
  moe__st_begin(st, &j);
  while (moe__json_more(&j, '}')) {
    moe__st_tensor t;
    moe_status status;
    if (!moe__json_key(&j, &t.key)) break;
    if (moe__json_is(&t.key, "__metadata__")) {
      if (!moe__st_metadata(st, &j)) break;
      continue;
    }
    moe__printable(t.name, sizeof t.name, &t.key);
    if (moe__json_has_zero(&t.key))
      return moe__fail(env, MOE_E_FORMAT, "tensor %s...: a zero byte (\\u0000) in its name",
                       t.name);
    if (!moe__st_value(&j, &t))
      return moe__fail(env, MOE_E_FORMAT, "tensor %s: %s (safetensors header, byte %zu)", t.name,
                       j.error, (size_t)(j.at - st->header));
    status = moe__st_check(st, &t, env);
    if (status) return status;
    st->in_order &= t.begin == at;
    at = t.end;
    ++st->tensors;
  }
  moe__json_finish(&j);
  if (j.error) return moe__st_complain(st, &j, env);
  st->in_order &= at == st->data_bytes;
  return MOE_OK;
}

/* Names a file that is often mistaken for safetensors, by its first bytes; else NULL. */
static const char *moe__st_other(const unsigned char *p, size_t bytes) {
  static const struct {
    const char *begin, *what;
  } known[] = {{"PK\3\4", "a zip archive, such as PyTorch's pytorch_model.bin"},
               {"\x80\2", "a Python pickle, such as PyTorch's old pytorch_model.bin"},
               {"GGUF", "a GGUF file of llama.cpp"},
               {"\x89HDF", "an HDF5 file, such as TensorFlow's tf_model.h5"},
               {"\x1f\x8b", "a gzip archive: unpack it first"},
               {"version https://git-lfs",
                "a Git LFS pointer in place of the file: \"git lfs pull\" fetches it"},
               {"{", "a JSON text, such as the index of weights in several files "
                     "(model-00001-of-...): join them into one file first"},
               {"<", "an HTML or XML page: download the file itself"}};
  size_t i;
  for (i = 0; i < sizeof known / sizeof *known; ++i) {
    size_t length = strlen(known[i].begin);
    if (bytes >= length && !memcmp(p, known[i].begin, length)) return known[i].what;
  }
  return NULL;
}

/* Checks the header of a file in memory and fills *out. If out->in_order is 1, the tensors cover
   the data without holes and overlaps; else moe__st_cover has to check that. */
static moe_status moe__st_scan(moe__st *out, const void *file, size_t bytes, const moe_env *env) {
  const unsigned char *p = (const unsigned char *)file;
  const char *other;
  moe__st st;
  uint64_t length = 0;
  size_t i;
  moe_status status;
  if (bytes < 8)
    return moe__fail(env, MOE_E_FORMAT, "not a safetensors file: %zu bytes, at least 8 expected",
                     bytes);
  for (i = 8; i-- > 0;) length = length << 8 | p[i];
  if (length > bytes - 8 || length > MOE__ST_HEADER_MAX) {
    other = moe__st_other(p, bytes);
    if (other)
      return moe__fail(env, MOE_E_FORMAT, "not a safetensors file (model.safetensors), but %s",
                       other);
    return moe__fail(env, MOE_E_FORMAT,
                     "the first 8 bytes give a header of %llu bytes, but %zu bytes follow "
                     "(expected at most %u): truncated, or not a safetensors file",
                     (unsigned long long)length, bytes - 8, MOE__ST_HEADER_MAX);
  }
  memset(&st, 0, sizeof st);
  st.header = (const char *)p + 8;
  st.header_bytes = (size_t)length;
  st.data = p + 8 + st.header_bytes;
  st.data_bytes = bytes - 8 - st.header_bytes;
  if (!length || *st.header != '{')
    return moe__fail(env, MOE_E_FORMAT, "not a safetensors file: its header does not begin with {");
  for (i = 0; i < st.header_bytes;) {
    int n = moe__utf8_bytes(p + 8 + i, p + 8 + st.header_bytes);
    if (!n) return moe__fail(env, MOE_E_FORMAT, "safetensors header, byte %zu: not UTF-8", i);
    i += (size_t)n;
  }
  status = moe__st_walk(&st, env);
  if (!status) *out = st;
  return status;
}

/* The same for tensors in any order, which takes memory. */
static moe_status moe__st_open(moe__st *out, const void *file, size_t bytes, const moe_env *env) {
  moe__st st;
  moe_status status = moe__st_scan(&st, file, bytes, env);
  if (!status && !st.in_order) status = moe__st_cover(&st, env);
  if (!status) *out = st;
  return status;
}

/* The JSON text of that name in the metadata. MOE_E_FORMAT if it is missing or listed twice. */
static moe_status moe__st_text(const moe__st *st, const char *name, moe__json *out,
                               const moe_env *env) {
  moe__json j = st->metadata;
  moe__json_text key, value;
  int found = 0;
  if (j.at) moe__json_enter(&j, '{');
  while (j.at && moe__json_more(&j, '}')) {
    if (!moe__json_key(&j, &key) || !moe__json_string(&j, &value)) break;
    if (!moe__json_is(&key, name)) continue;
    moe__json_init(out, value.begin.at, (size_t)(value.end - value.begin.at), 1);
    ++found;
  }
  if (found == 1) return MOE_OK;
  return moe__fail(env, MOE_E_FORMAT,
                   found ? "metadata: \"%s\" is listed twice" : "metadata: \"%s\" is missing",
                   name);
}

/* Finds a tensor by its prefix and name. The search begins at *hint, behind the last one found. */
static int moe__st_find(const moe__st *st, moe__json *hint, const char *prefix, const char *name,
                        moe__st_tensor *out) {
  char full[256];
  moe__st_tensor t;
  size_t i;
  moe__format(full, sizeof full, "%s%s", prefix, name);
  for (i = 0; i <= st->tensors; ++i) {
    if (!hint->at || !moe__st_next(st, hint, &t)) {
      moe__st_begin(st, hint);
      continue;
    }
    if (!moe__json_is(&t.key, full)) continue;
    *out = t;
    return 1;
  }
  return 0;
}

/* ---- the values of its tensors; writing it ---- >>values */

/* 1 on little-endian machines, as the files are. */
static int moe__little_endian(void) {
  uint16_t one = 1;
  unsigned char low;
  memcpy(&low, &one, 1);
  return low;
}

static float moe__float_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

static uint32_t moe__bits_of_float(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

/* IEEE half to float, exactly. */
static float moe__float_of_half(uint32_t h) {
  uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return moe__float_of_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent) return moe__float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  return moe__float_of_bits(
      sign |
      moe__bits_of_float((float)fraction * 5.9604644775390625e-8f)); /* subnormal: fraction 2^-24 */
}

static float moe__float_of_double(const unsigned char *in) {
  uint64_t bits = 0;
  double v;
  int i;
  for (i = 0; i < 8; ++i) bits |= (uint64_t)in[i] << 8 * i;
  memcpy(&v, &bits, sizeof v);
  if (v > 3.4028235677973364e38 || v < -3.4028235677973364e38) return HUGE_VALF; /* or would be */
  return (float)v;
}

/* n elements of a tensor as floats; dtype F32, F16, BF16 or F64. in may have any alignment. */
static void moe__st_floats(float *out, const unsigned char *in, size_t n, moe__dtype dtype) {
  size_t i;
  if (dtype == MOE__F32 && moe__little_endian())
    memcpy(out, in, n * 4);
  else if (dtype == MOE__F32) {
    for (i = 0; i < n; ++i, in += 4)
      out[i] = moe__float_of_bits((uint32_t)in[0] | (uint32_t)in[1] << 8 | (uint32_t)in[2] << 16 |
                                  (uint32_t)in[3] << 24);
  } else if (dtype == MOE__F64) {
    for (i = 0; i < n; ++i, in += 8) out[i] = moe__float_of_double(in);
  } else {
    for (i = 0; i < n; ++i, in += 2) {
      uint32_t bits = (uint32_t)in[0] | (uint32_t)in[1] << 8;
      out[i] = dtype == MOE__BF16 ? moe__float_of_bits(bits << 16) : moe__float_of_half(bits);
    }
  }
}

/* Index of the first element of F32 that is below 0, or n. */
static size_t moe__st_positive(const unsigned char *in, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) {
    const unsigned char *f = in + 4 * i;
    if (f[3] > 0x7f && (f[0] | f[1] | f[2] | (f[3] & 0x7f))) return i; /* -0 is not below 0 */
  }
  return n;
}

/* Index of the first element that is not finite as a float, or n. */
static size_t moe__st_finite(const unsigned char *in, size_t n, moe__dtype dtype) {
  size_t i, width = moe__dtype_bytes[dtype];
  for (i = 0; i < n && dtype == MOE__F64; ++i)
    if (!moe__is_finite(moe__float_of_double(in + 8 * i))) return i;
  for (i = 0; i < n && dtype != MOE__F64; ++i) {
    const unsigned char *high =
        in + i * width + width -
        2; /* the upper 16 bits hold sign, exponent and some of the fraction */
    unsigned bits = high[0] | (unsigned)high[1] << 8,
             exponent = dtype == MOE__F16 ? 0x7c00u : 0x7f80u;
    if ((bits & exponent) == exponent) return i;
  }
  return n;
}

/* A member of the header; advances *at, the place of the next tensor. */
static void moe__st_put_tensor(moe__out *out, const char *name, moe__dtype dtype,
                               const size_t *shape, int dims, uint64_t *at) {
  uint64_t bytes = moe__dtype_bytes[dtype];
  int i;
  moe__out_text(out, ",");
  moe__out_string(out, name, strlen(name));
  moe__out_text(out, ":{\"dtype\":\"");
  moe__out_text(out, moe__dtype_name[dtype]);
  moe__out_text(out, "\",\"shape\":[");
  for (i = 0; i < dims; ++i) {
    if (i) moe__out_text(out, ",");
    moe__out_uint(out, shape[i]);
    bytes *= shape[i];
  }
  moe__out_text(out, "],\"data_offsets\":[");
  moe__out_uint(out, *at);
  moe__out_text(out, ",");
  *at += bytes;
  moe__out_uint(out, *at);
  moe__out_text(out, "]}");
}

/* Floats, low byte first. */
static void moe__st_put_floats(moe__out *out, const float *data, size_t n) {
  size_t i;
  moe__out_flush(out);
  if (moe__little_endian()) {
    if (n && !out->failed && out->writer->write(out->writer->user, data, n * 4)) out->failed = 1;
    return;
  }
  for (i = 0; i < n; ++i) {
    uint32_t bits = moe__bits_of_float(data[i]);
    moe__out_byte(out, (char)(bits & 255));
    moe__out_byte(out, (char)(bits >> 8 & 255));
    moe__out_byte(out, (char)(bits >> 16 & 255));
    moe__out_byte(out, (char)(bits >> 24));
  }
}

/* The length of the header, and the header that `put` writes, with blanks at its end so that the
   data begin at a multiple of 64. */
MOE__NOINLINE static void
moe__st_put_header(moe__out *out, void (*put)(moe__out *out, const void *user), const void *user) {
  moe__out count;
  uint64_t length, i;
  moe__out_init(&count, NULL);
  put(&count, user);
  length = ((count.total + 8 + 63) & ~(uint64_t)63) - 8;
  for (i = 0; i < 8; ++i) moe__out_byte(out, (char)(length >> (8 * i) & 255));
  put(out, user);
  for (i = count.total; i < length; ++i) moe__out_byte(out, ' ');
  moe__out_flush(out);
}

/* ---- writing model files ---- >>files
   A model is a safetensors file. "__metadata__" holds moe.version, moe.config (JSON, an object) and
   moe.tasks (JSON, an array); the tensors follow in the order of the flat array, the vocabulary
   (U8) last. Other tools expect "format": "pt". */

#define MOE__FILE_VERSION 1

/* The integers of a configuration by name. Its other members are router, truncate and eps; with
   blocks as experts unit, selection, temperature and vector; with pruned experts "absent", a list
   of their numbers for each layer. */
static const struct {
  const char *name;
  size_t offset;
} moe__config_field[] = {{"layers", offsetof(moe_config, layers)},
                         {"hidden", offsetof(moe_config, hidden)},
                         {"ffn", offsetof(moe_config, ffn)},
                         {"heads", offsetof(moe_config, heads)},
                         {"vocab", offsetof(moe_config, vocab)},
                         {"positions", offsetof(moe_config, positions)},
                         {"segments", offsetof(moe_config, segments)},
                         {"features", offsetof(moe_config, feature_dim)},
                         {"experts", offsetof(moe_config, experts)},
                         {"top_k", offsetof(moe_config, top_k)},
                         {"gate_scale_n", offsetof(moe_config, gate_scale_n)},
                         {"renormalize", offsetof(moe_config, renormalize)},
                         {"max_len", offsetof(moe_config, max_len)},
                         {"cased", offsetof(moe_config, cased)}};
#define MOE__CONFIG_FIELDS (sizeof moe__config_field / sizeof *moe__config_field)

static int32_t moe__config_get(const moe_config *config, size_t field) {
  int32_t v;
  memcpy(&v, (const char *)config + moe__config_field[field].offset, sizeof v);
  return v;
}

static void moe__out_member(moe__out *out, const char *before, const char *name) {
  moe__out_text(out, before);
  moe__out_string(out, name, strlen(name));
  moe__out_text(out, ":");
}

static void moe__pruned_put(moe__out *out, const moe_config *config) {
  int32_t l, i;
  moe__out_member(out, ",", "absent");
  for (l = 0; l < config->layers; ++l) {
    const uint8_t *pruned = config->pruned + (size_t)l * (size_t)config->experts;
    int some = 0;
    moe__out_text(out, l ? ",[" : "[[");
    for (i = 0; i < config->experts; ++i) {
      if (!pruned[i]) continue;
      if (some++) moe__out_text(out, ",");
      moe__out_int(out, i);
    }
    moe__out_text(out, "]");
  }
  moe__out_text(out, "]");
}

static void moe__config_put(moe__out *out, const moe_config *config) {
  size_t i;
  for (i = 0; i < MOE__CONFIG_FIELDS; ++i) {
    moe__out_member(out, i ? "," : "{", moe__config_field[i].name);
    moe__out_int(out, moe__config_get(config, i));
  }
  moe__out_member(out, ",", "eps");
  moe__out_float(out, config->eps);
  moe__out_member(out, ",", "router");
  moe__out_string(out, moe__router_names[config->router],
                  strlen(moe__router_names[config->router]));
  if (config->router == MOE_ROUTER_EMBEDDING) {
    moe__out_member(out, ",", "rank");
    moe__out_int(out, config->rank);
  }
  moe__out_member(out, ",", "truncate");
  moe__out_string(out, moe__truncate_names[config->truncate],
                  strlen(moe__truncate_names[config->truncate]));
  if (config->unit == MOE_UNIT_BLOCK) {
    moe__out_member(out, ",", "unit");
    moe__out_string(out, moe__unit_names[config->unit], strlen(moe__unit_names[config->unit]));
    moe__out_member(out, ",", "selection");
    moe__out_string(out, moe__selection_names[config->selection],
                    strlen(moe__selection_names[config->selection]));
    moe__out_member(out, ",", "temperature");
    moe__out_float(out, config->temperature);
    moe__out_member(out, ",", "vector");
    moe__out_int(out, config->task_dim);
  }
  if (config->pruned) moe__pruned_put(out, config);
  moe__out_text(out, "}");
}

static void moe__task_put(moe__out *out, const moe_task *task) {
  int32_t i;
  moe__out_member(out, "{", "name");
  moe__out_string(out, task->name, strlen(task->name));
  moe__out_member(out, ",", "kind");
  moe__out_string(out, moe__kind_of(task)->name, strlen(moe__kind_of(task)->name));
  moe__out_member(out, ",", "pair");
  moe__out_int(out, task->pair);
  if (!moe__has_classes(task)) {
    moe__out_member(out, ",", "low");
    moe__out_float(out, task->low);
    moe__out_member(out, ",", "high");
    moe__out_float(out, task->high);
  } else {
    moe__out_member(out, ",", "labels");
    for (i = 0; i < task->classes; ++i) {
      moe__out_text(out, i ? "," : "[");
      moe__out_string(out, task->label[i], strlen(task->label[i]));
    }
    moe__out_text(out, "]");
  }
  moe__out_member(out, ",", "metrics");
  moe__out_string(out, task->metrics, strlen(task->metrics));
  moe__out_member(out, ",", "max_len");
  moe__out_int(out, task->max_len);
  moe__out_text(out, "}");
}

/* What goes into a file: a model, and for a checkpoint the moments and a JSON text. */
typedef struct moe__save {
  const moe_model *model;
  const float *moment[2]; /* NULL: only a model */
  void (*put_state)(moe__out *out, const void *state);
  const void *state;
} moe__save;

static const char *const moe__moment_prefix[] = {"adam.m.", "adam.v."};

/* The tensors of the flat array, with a prefix before their names. */
static void moe__put_tensors(moe__out *out, const moe_model *model, const char *prefix,
                             uint64_t *at) {
  int32_t i;
  int k;
  for (i = 0; i < moe_model_tensors(model); ++i) {
    moe_tensor t;
    char name[sizeof t.name + 16];
    size_t shape[3];
    moe_model_tensor(model, i, &t);
    moe__format(name, sizeof name, "%s%s", prefix, t.name);
    for (k = 0; k < t.dims; ++k) shape[k] = (size_t)t.shape[k];
    moe__st_put_tensor(out, name, t.type == MOE_TYPE_I8 ? MOE__I8 : MOE__F32, shape, t.dims, at);
  }
}

static void moe__save_header(moe__out *out, const void *user) {
  const moe__save *save = (const moe__save *)user;
  const moe_model *model = save->model;
  uint64_t at = 0;
  int32_t t;
  int i;
  moe__out_text(out, "{\"__metadata__\":{\"format\":\"pt\",\"moe.version\":\"");
  moe__out_int(out, MOE__FILE_VERSION);
  moe__out_text(out, "\",\"moe.config\":\"");
  out->nested = 1;
  moe__config_put(out, &model->config);
  out->nested = 0;
  moe__out_text(out, "\",\"moe.tasks\":\"[");
  out->nested = 1;
  for (t = 0; t < model->T; ++t) {
    if (t) moe__out_text(out, ",");
    moe__task_put(out, &model->tasks[t]);
  }
  out->nested = 0;
  if (save->put_state) {
    moe__out_text(out, "]\",\"moe.checkpoint\":\"");
    out->nested = 1;
    save->put_state(out, save->state);
    out->nested = 0;
    moe__out_text(out, "\"}");
  } else
    moe__out_text(out, "]\"}");
  moe__put_tensors(out, model, "", &at);
  for (i = 0; i < 2; ++i)
    if (save->moment[i]) moe__put_tensors(out, model, moe__moment_prefix[i], &at);
  if (model->vocab)
    moe__st_put_tensor(out, "tokenizer.vocab", MOE__U8, &model->vocab_bytes, 1, &at);
  moe__out_text(out, "}");
}

/* Refuses what reading would refuse: a diverged training must not replace the last good file. */
static moe_status moe__save_check(const moe__save *save, const moe_env *env) {
  const moe_model *model = save->model;
  const float *part[3];
  int32_t i;
  size_t k;
  int p;
  part[0] = model->weights, part[1] = save->moment[0], part[2] = save->moment[1];
  for (p = 0; p < 3; ++p)
    for (i = 0; part[p] && i < model->floats; ++i) {
      moe_tensor t;
      const char *prefix = p ? moe__moment_prefix[p - 1] : "";
      const float *v;
      moe_model_tensor(model, i, &t);
      v = part[p] + t.offset;
      for (k = 0; k < t.count; ++k)
        if (!(v[k] - v[k] == 0) || (p == 2 && v[k] < 0))
          return moe__fail(
              env, MOE_E_NONFINITE,
              "tensor %s%s: element %zu is %g, which could not be read back: nothing is written",
              prefix, t.name, k, (double)v[k]);
    }
  return MOE_OK;
}

static moe_status moe__save_write(const moe__save *save, const moe_writer *writer,
                                  const moe_env *env) {
  const moe_model *model = save->model;
  moe__out out;
  int i;
  moe_status status = moe__model_fetch(model, env);
  if (!status) status = moe__save_check(save, env);
  if (status) return status;
  moe__out_init(&out, writer);
  moe__st_put_header(&out, moe__save_header, save);
  moe__st_put_floats(&out, model->weights, model->plan.total);
  for (i = 0; i < 2; ++i)
    if (save->moment[i]) moe__st_put_floats(&out, save->moment[i], model->plan.total);
  moe__out_flush(&out);
  if (model->plan.total_q && !out.failed)
    out.failed = writer->write(writer->user, model->bytes, model->plan.total_q) != 0;
  if (model->vocab_bytes && !out.failed)
    out.failed = writer->write(writer->user, model->vocab, model->vocab_bytes) != 0;
  return out.failed ? moe__fail(env, MOE_E_IO, "writing the model failed") : MOE_OK;
}

MOE_API moe_status moe_model_write(const moe_model *model, const moe_writer *writer,
                                   const moe_env *env) {
  moe__save save;
  memset(&save, 0, sizeof save);
  save.model = model;
  return moe__save_write(&save, writer, env);
}

/* ---- reading model files: configuration, tasks ---- >>metadata
   Nothing is allocated here: the tasks are read twice, first to be counted. */

/* One of a list of names. */
static int moe__json_choice(moe__json *j, const char *const *names, int count, int *out) {
  moe__json_text text;
  int i;
  if (!moe__json_string(j, &text)) return 0;
  for (i = 0; i < count; ++i)
    if (moe__json_is(&text, names[i])) return *out = i, 1;
  return moe__json_fail(j, "unknown name: written by a newer moe.h?");
}

/* A text of 0 to MOE_NAME_BYTES - 1 bytes without zeros. */
static int moe__json_name(moe__json *j, char out[MOE_NAME_BYTES]) {
  moe__json_text text;
  size_t length;
  if (!moe__json_string(j, &text)) return 0;
  length = moe__json_copy(out, MOE_NAME_BYTES, &text);
  if (length >= MOE_NAME_BYTES || strlen(out) != length)
    return moe__json_fail(j, "a text is too long, or contains a zero byte");
  return 1;
}

/* Members of a configuration that are not integers, or not in every file. */
static const char *const moe__config_other[] = {
    "eps", "router", "truncate", "unit", "selection", "temperature", "vector", "rank", "absent"};
enum { MOE__SEEN_ALWAYS = 7, MOE__SEEN_BLOCKS = 0x78, MOE__SEEN_RANK = 0x80 };
enum { MOE__SEEN_PRUNED = 0x100, MOE__CONFIG_OTHERS = 9 };

static int moe__config_other_read(moe__json *j, int member, moe_config *c, moe__json *pruned) {
  int choice = 0, ok;
  int64_t v = 0;
  switch (member) {
    case 0: return moe__json_float(j, &c->eps);
    case 1:
      ok = moe__json_choice(j, moe__router_names, MOE__COUNT(moe__router_names), &choice),
      c->router = (moe_router)choice;
      return ok;
    case 2:
      ok = moe__json_choice(j, moe__truncate_names, MOE__COUNT(moe__truncate_names), &choice),
      c->truncate = (moe_truncate)choice;
      return ok;
    case 3:
      ok = moe__json_choice(j, moe__unit_names, MOE__COUNT(moe__unit_names), &choice),
      c->unit = (moe_unit)choice;
      return ok;
    case 4:
      ok = moe__json_choice(j, moe__selection_names, MOE__COUNT(moe__selection_names), &choice),
      c->selection = (moe_selection)choice;
      return ok;
    case 5: return moe__json_float(j, &c->temperature);
    case 6: ok = moe__json_integer(j, 0, INT32_MAX, &v), c->task_dim = (int32_t)v; return ok;
    case 7: ok = moe__json_integer(j, 1, INT32_MAX, &v), c->rank = (int32_t)v; return ok;
    default: *pruned = *j; return moe__json_skip(j);
  }
}

/* Every member must be known and listed once: what a newer version adds must not be ignored.
   *pruned is where the list of pruned experts begins, if *has_absent. */
static int moe__config_read(moe__json *j, moe_config *config, moe__json *pruned, int *has_absent) {
  moe_config c;
  unsigned seen = 0, seen_other = 0, want = MOE__SEEN_ALWAYS;
  moe_config_init(&c);
  moe__json_enter(j, '{');
  while (moe__json_more(j, '}')) {
    moe__json_text key;
    size_t i = 0;
    int k = 0, twice;
    if (!moe__json_key(j, &key)) return 0;
    while (i < MOE__CONFIG_FIELDS && !moe__json_is(&key, moe__config_field[i].name)) ++i;
    if (i < MOE__CONFIG_FIELDS) {
      int64_t v;
      int32_t narrow;
      if (!moe__json_integer(j, INT32_MIN, INT32_MAX, &v)) return 0;
      narrow = (int32_t)v;
      memcpy((char *)&c + moe__config_field[i].offset, &narrow, sizeof narrow);
      twice = (int)(seen >> i & 1);
      seen |= 1u << i;
    } else {
      while (k < MOE__CONFIG_OTHERS && !moe__json_is(&key, moe__config_other[k])) ++k;
      if (k == MOE__CONFIG_OTHERS)
        return moe__json_fail(j, "unknown member: written by a newer moe.h?");
      if (!moe__config_other_read(j, k, &c, pruned)) return 0;
      twice = (int)(seen_other >> k & 1);
      seen_other |= 1u << k;
    }
    if (twice) return moe__json_fail(j, "a member is listed twice");
  }
  if (!moe__json_finish(j)) return 0;
  *has_absent = (seen_other & MOE__SEEN_PRUNED) != 0;
  if (c.unit == MOE_UNIT_BLOCK) want |= MOE__SEEN_BLOCKS;
  if (c.router == MOE_ROUTER_EMBEDDING) want |= MOE__SEEN_RANK;
  if (*has_absent) want |= MOE__SEEN_PRUNED;
  if (seen != (1u << MOE__CONFIG_FIELDS) - 1 || seen_other != want)
    return moe__json_fail(j, "a member is missing, or does not belong to this kind of model");
  *config = c;
  return 1;
}

/* The numbers of the pruned experts of each layer, in rising order: marks them in `to` (L, N),
   which is zero before, unless it is NULL. */
static int moe__pruned_read(moe__json *j, uint8_t *to, const moe_config *config) {
  int32_t l = 0;
  moe__json_enter(j, '[');
  while (moe__json_more(j, ']')) {
    int64_t i = -1;
    if (l == config->layers) return moe__json_fail(j, "pruned has more layers than the model");
    moe__json_enter(j, '[');
    while (moe__json_more(j, ']')) {
      if (!moe__json_integer(j, i + 1, config->experts - 1, &i)) return 0;
      if (to) to[(size_t)l * (size_t)config->experts + (size_t)i] = 1;
    }
    ++l;
  }
  if (!j->error && l < config->layers) moe__json_fail(j, "pruned has fewer layers than the model");
  return !j->error;
}

/* Tasks and marks of pruned experts as they are read; with NULL for arrays, they are only counted.
   */
typedef struct moe__tasks {
  uint8_t *pruned; /* of moe_config, or NULL */
  moe_task *task;
  const char **label;
  char *text;
  size_t T, labels, bytes; /* bytes: of the label names with their ending zeros */
} moe__tasks;

static int moe__labels_read(moe__json *j, moe__tasks *to, moe_task *task) {
  task->classes = 0;
  if (to->label) task->label = to->label + to->labels;
  moe__json_enter(j, '[');
  while (moe__json_more(j, ']')) {
    char name[MOE_NAME_BYTES];
    if (!moe__json_name(j, name)) return 0;
    if (task->classes++ == MOE_MAX_CLASSES) return moe__json_fail(j, "too many labels");
    if (to->label) {
      to->label[to->labels] = to->text + to->bytes;
      memcpy(to->text + to->bytes, name, strlen(name) + 1);
    }
    ++to->labels;
    to->bytes += strlen(name) + 1;
  }
  return !j->error;
}

static int moe__task_read(moe__json *j, moe__tasks *to) {
  static const char *const keys[] = {"name",    "kind",   "pair", "metrics",
                                     "max_len", "labels", "low",  "high"};
  moe_task task;
  unsigned seen = 0;
  int regression;
  memset(&task, 0, sizeof task);
  moe__json_enter(j, '{');
  while (moe__json_more(j, '}')) {
    moe__json_text key;
    int64_t v = 0;
    char kind[MOE_NAME_BYTES];
    int k = 0, ok = 0;
    if (!moe__json_key(j, &key)) return 0;
    while (k < 8 && !moe__json_is(&key, keys[k])) ++k;
    if (k == 8) return moe__json_fail(j, "unknown member: written by a newer moe.h?");
    if (seen >> k & 1) return moe__json_fail(j, "a member is listed twice");
    seen |= 1u << k;
    switch (k) {
      case 0: ok = moe__json_name(j, task.name); break;
      case 1:
        ok = moe__json_name(j, kind) &&
             (moe_kind_from_name(&task.kind, kind) ||
              moe__json_fail(j, "unknown kind: written by a newer moe.h?"));
        break;
      case 2: ok = moe__json_integer(j, 0, 1, &v), task.pair = (int32_t)v; break;
      case 3: ok = moe__json_name(j, task.metrics); break;
      case 4: ok = moe__json_integer(j, 0, INT32_MAX, &v), task.max_len = (int32_t)v; break;
      case 5: ok = moe__labels_read(j, to, &task); break;
      case 6: ok = moe__json_float(j, &task.low); break;
      default: ok = moe__json_float(j, &task.high); break;
    }
    if (!ok) return 0;
  }
  if (j->error) return 0;
  regression = !moe__has_classes(&task);
  if (seen != (regression ? 0xdfu : 0x3fu))
    return moe__json_fail(j, "a member is missing, or does not belong to this kind of task");
  if (regression) task.classes = 1;
  if (to->T == MOE_MAX_TASKS) return moe__json_fail(j, "too many tasks");
  if (to->task) to->task[to->T] = task;
  ++to->T;
  return 1;
}

/* What the metadata of a file says, before anything is allocated. */
typedef struct moe__header {
  moe__st st;
  int quantized;
  moe_config config; /* without pruned, which moe__tasks_read reads */
  int has_absent;
  moe__json pruned, tasks;
  size_t T, labels, bytes;
} moe__header;

static moe_status moe__tasks_read(const moe__header *header, moe__tasks *to, const moe_env *env) {
  moe__json j = header->pruned;
  if (header->has_absent && !moe__pruned_read(&j, to->pruned, &header->config))
    return moe__fail(env, MOE_E_FORMAT, "moe.config: %s", j.error);
  j = header->tasks;
  to->T = to->labels = to->bytes = 0;
  moe__json_enter(&j, '[');
  while (moe__json_more(&j, ']'))
    if (!moe__task_read(&j, to)) break;
  moe__json_finish(&j);
  return j.error ? moe__fail(env, MOE_E_FORMAT, "moe.tasks, task %zu: %s", to->T, j.error) : MOE_OK;
}

/* in_place: nothing is allocated, and the tensors must be listed in the order of their bytes. */
static moe_status moe__header_read(moe__header *header, const void *file, size_t bytes,
                                   int in_place, const moe_env *env) {
  moe__json j, hint;
  moe__st_tensor query;
  moe__tasks count;
  int64_t version = 0;
  moe_status status = in_place ? moe__st_scan(&header->st, file, bytes, env)
                               : moe__st_open(&header->st, file, bytes, env);
  if (status) return status;
  if (!header->st.in_order && in_place)
    return moe__fail(env, MOE_E_FORMAT,
                     "the tensors are not listed in the order of their data: load the file with "
                     "moe_model_load and save it again");
  if (moe__st_text(&header->st, "moe.version", &j, NULL))
    return moe__fail(
        env, MOE_E_FORMAT,
        "a safetensors file, but not a model of moe.h: \"moe.version\" is missing in its metadata "
        "(moe_model_import reads published encoders)");
  if (!moe__json_integer(&j, 1, INT32_MAX, &version) || !moe__json_finish(&j))
    return moe__fail(env, MOE_E_FORMAT, "moe.version: %s", j.error);
  if (version > MOE__FILE_VERSION)
    return moe__fail(env, MOE_E_FORMAT,
                     "moe.version is %lld, this moe.h reads up to %d: use a newer moe.h",
                     (long long)version, MOE__FILE_VERSION);
  memset(&hint, 0, sizeof hint); /* a matrix that every model has shows whether it is int8 */
  header->quantized = (moe__st_find(&header->st, &hint, "encoder.layer.0.",
                                    "attention.self.query.weight", &query) ||
                       moe__st_find(&header->st, &hint, "encoder.layer.0.blocks.0.",
                                    "attention.self.query.weight", &query)) &&
                      query.dtype == MOE__I8;
  status = moe__st_text(&header->st, "moe.config", &j, env);
  if (status) return status;
  if (!moe__config_read(&j, &header->config, &header->pruned, &header->has_absent))
    return moe__fail(env, MOE_E_FORMAT, "moe.config: %s", j.error);
  if (header->has_absent && moe_config_check(&header->config, env))
    return MOE_E_FORMAT; /* else the list could have any size */
  status = moe__st_text(&header->st, "moe.tasks", &header->tasks, env);
  memset(&count, 0, sizeof count);
  if (!status) status = moe__tasks_read(header, &count, env);
  header->T = count.T;
  header->labels = count.labels;
  header->bytes = count.bytes;
  return status;
}

/* Marks of pruned experts in a file's configuration. */
static size_t moe__header_cells(const moe__header *header) {
  return header->has_absent ? (size_t)header->config.layers * (size_t)header->config.experts : 0;
}

static void moe__tasks_carve(moe__layout *layout, moe__tasks *tasks, const moe__header *header) {
  memset(tasks, 0, sizeof *tasks);
  if (header->has_absent)
    tasks->pruned = (uint8_t *)moe__carve(layout, moe__header_cells(header), 1);
  if (tasks->pruned && layout->base) memset(tasks->pruned, 0, moe__header_cells(header));
  tasks->task = (moe_task *)moe__carve(layout, header->T, sizeof(moe_task));
  tasks->label = (const char **)moe__carve(layout, header->labels, sizeof(char *));
  tasks->text = (char *)moe__carve(layout, header->bytes, 1);
}

/* ---- reading model files: weights ---- >>load
   Tensors are found by name, and copied (moe_model_read) or left in place (moe_model_open). Memory
   is allocated only after the file is known to hold as much. */

static moe_status moe__wrong_shape(const moe__st_tensor *found, const moe_tensor *want,
                                   const char *dtypes, const moe_env *env) {
  char a[200], b[80];
  size_t shape[3];
  int k;
  for (k = 0; k < want->dims; ++k) shape[k] = (size_t)want->shape[k];
  moe__shape_text(a, sizeof a, found->shape, found->dims);
  moe__shape_text(b, sizeof b, shape, want->dims);
  return moe__fail(env, MOE_E_FORMAT, "tensor %s: expected %s of %s, found %s of %s", found->name,
                   dtypes, b, moe__dtype_name[found->dtype], a);
}

static int moe__same_shape(const moe__st_tensor *found, const moe_tensor *want) {
  int k, same = found->dims == want->dims;
  for (k = 0; k < want->dims && same; ++k) same = found->shape[k] == (size_t)want->shape[k];
  return same;
}

/* A walk over the tensors of a file that belong to a model. */
typedef struct moe__reading {
  const moe__st *st;
  const moe_model *model;
  const char *prefix; /* of their names: "", or a moment's */
  float *to;          /* where to copy them; NULL: they are only checked */
  int8_t *to_bytes;   /* and where the matrices of a quantised model */
  uint8_t *seen; /* (tensors bits) for the check that each is there once; NULL: it has been done */
  int in_place;  /* they stay in the file and must have the model's order */
  size_t first;  /* in_place: the byte of the data at which the flat array begins */
} moe__reading;

static size_t moe__seen_bytes(int32_t tensors) { return ((size_t)tensors + 7) / 8; }

/* The number of the model's tensor with a name in the file, or -1. Most files have the model's
   order, so `next` is tried first. */
static int32_t moe__reading_find(const moe__reading *r, const char *name, int32_t next,
                                 moe_tensor *want) {
  int32_t i = next;
  if (moe_model_tensor(r->model, i, want) || strcmp(want->name, name)) {
    i = moe_model_find_tensor(r->model, name);
    if (i >= 0) moe_model_tensor(r->model, i, want);
  }
  return i;
}

/* Checks the values of a tensor in the file. */
static moe_status moe__reading_values(const moe__reading *r, const moe__st_tensor *found,
                                      const moe_env *env) {
  const unsigned char *data = r->st->data + found->begin;
  size_t bad;
  if (r->in_place || found->dtype == MOE__I8) return MOE_OK;
  bad = moe__st_finite(data, found->count, MOE__F32);
  if (bad < found->count)
    return moe__fail(env, MOE_E_FORMAT, "tensor %s: element %zu is not a finite number",
                     found->name, bad);
  if (r->prefix != moe__moment_prefix[1]) return MOE_OK;
  bad = moe__st_positive(data, found->count); /* Adam takes its root */
  if (bad < found->count)
    return moe__fail(env, MOE_E_FORMAT, "tensor %s: element %zu is below 0", found->name, bad);
  return MOE_OK;
}

/* in_place: the tensor must have the offset that the model's order gives it, relative to the first
   one read. */
static moe_status moe__reading_place(moe__reading *r, const moe__st_tensor *found,
                                     const moe_tensor *want, int is_first, const moe_env *env) {
  size_t place = want->type == MOE_TYPE_I8
                     ? r->model->plan.in[MOE__FLOATS_ALL].total * sizeof(float) + want->offset
                     : want->offset * sizeof(float);
  if (!r->in_place) return MOE_OK;
  if (is_first && found->begin >= place) r->first = found->begin - place;
  if (found->begin == r->first + place) return MOE_OK;
  return moe__fail(env, MOE_E_FORMAT,
                   "tensor %s begins at byte %zu of the data, expected %zu: load the file with "
                   "moe_model_load and save it again",
                   found->name, found->begin, r->first + place);
}

/* Checks and copies tensor i of the model. */
static moe_status moe__reading_take(moe__reading *r, const moe__st_tensor *found,
                                    const moe_tensor *want, int32_t i, const moe_env *env) {
  moe__dtype dtype = want->type == MOE_TYPE_I8 ? MOE__I8 : MOE__F32;
  moe_status status;
  if (!moe__same_shape(found, want) || found->dtype != dtype)
    return moe__wrong_shape(found, want, moe__dtype_name[dtype], env);
  if (r->seen && r->seen[i / 8] >> (i % 8) & 1)
    return moe__fail(env, MOE_E_FORMAT, "tensor %s is listed twice", found->name);
  if (r->seen) r->seen[i / 8] = (uint8_t)(r->seen[i / 8] | 1 << (i % 8));
  status = moe__reading_values(r, found, env);
  if (status || !r->to) return status;
  if (dtype == MOE__I8)
    memcpy(r->to_bytes + want->offset, r->st->data + found->begin, found->count);
  else
    moe__st_floats(r->to + want->offset, r->st->data + found->begin, found->count, MOE__F32);
  return MOE_OK;
}

/* Reads all tensors of the model: each must appear once, with its shape. */
static moe_status moe__tensors_read(moe__reading *r, const moe_env *env) {
  moe__json j;
  moe__st_tensor found;
  moe_tensor want;
  size_t length = strlen(r->prefix);
  int32_t i = -1, count = 0, vocabularies = 0;
  if (r->seen) memset(r->seen, 0, moe__seen_bytes(r->model->tensors));
  moe__st_begin(r->st, &j);
  while (moe__st_next(r->st, &j, &found)) {
    moe_status status;
    if (moe__json_is(&found.key, "tokenizer.vocab")) {
      if (vocabularies++)
        return moe__fail(env, MOE_E_FORMAT, "tensor tokenizer.vocab is listed twice");
      continue;
    }
    if (strncmp(found.name, r->prefix, length)) continue;
    if (!length && !strncmp(found.name, "adam.", 5)) continue;
    i = moe__reading_find(r, found.name + length, i + 1, &want);
    if (i < 0)
      return moe__fail(env, MOE_E_FORMAT,
                       "tensor %s does not belong to the configuration and tasks of this file",
                       found.name);
    status = moe__reading_place(r, &found, &want, !count, env);
    if (!status) status = moe__reading_take(r, &found, &want, i, env);
    if (status) return status;
    ++count;
  }
  if (!r->seen || count == r->model->tensors) return MOE_OK;
  for (i = 0; r->seen[i / 8] >> (i % 8) & 1;) ++i;
  moe_model_tensor(r->model, i, &want);
  return moe__fail(env, MOE_E_FORMAT, "tensor %s%s is missing", r->prefix, want.name);
}

/* Checks the tensors of a model under a prefix, and copies them where `to` is not NULL. */
static moe_status moe__tensors_load(float *to, int8_t *to_bytes, const moe__st *st,
                                    const moe_model *model, const char *prefix,
                                    const moe_env *env) {
  moe__reading r;
  moe_status status;
  memset(&r, 0, sizeof r);
  r.st = st;
  r.model = model;
  r.prefix = prefix;
  r.to = to;
  r.to_bytes = to_bytes;
  r.seen = (uint8_t *)moe__alloc(moe__seen_bytes(model->tensors));
  if (!r.seen)
    return moe__fail(env, MOE_E_MEMORY, "no memory for marks of %d tensors", (int)model->tensors);
  status = moe__tensors_read(&r, env);
  moe__release(r.seen);
  return status;
}

/* Copies tensors that moe__tensors_load has checked: this cannot fail. */
MOE__UNUSED static void moe__tensors_copy(float *to, const moe__st *st, const moe_model *model,
                                          const char *prefix) {
  moe__reading r;
  memset(&r, 0, sizeof r);
  r.st = st;
  r.model = model;
  r.prefix = prefix;
  r.to = to;
  moe__tensors_read(&r, NULL);
}

/* The vocabulary in the file, or NULL. */
static moe_status moe__vocab_find(const char **vocab, size_t *bytes, const moe__st *st,
                                  const moe_env *env) {
  moe__json hint;
  moe__st_tensor t;
  memset(&hint, 0, sizeof hint);
  *vocab = NULL;
  *bytes = 0;
  if (!moe__st_find(st, &hint, "", "tokenizer.vocab", &t)) return MOE_OK;
  if (t.dtype != MOE__U8 || t.dims != 1)
    return moe__fail(env, MOE_E_FORMAT, "tensor tokenizer.vocab: expected U8 of one dimension");
  *vocab = (const char *)st->data + t.begin;
  *bytes = t.count;
  return MOE_OK;
}

/* A model with the configuration and tasks of the file; its weights are not yet set. */
static moe_status moe__model_prepare(moe_model **out, const moe__header *header,
                                     const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe__tasks tasks;
  moe__plan plan;
  moe_config config = header->config;
  void *scratch;
  moe_status status;
  moe__tasks_carve(&layout, &tasks, header);
  scratch = layout.bad ? NULL : moe__alloc(layout.used);
  if (!scratch) return moe__fail(env, MOE_E_MEMORY, "no memory for %zu tasks", header->T);
  layout.base = (unsigned char *)scratch;
  layout.used = 0;
  moe__tasks_carve(&layout, &tasks, header);
  config.pruned = tasks.pruned;
  status = moe__tasks_read(header, &tasks, env);
  if (!status) status = moe_config_check(&config, env);
  if (!status) status = moe__check_tasks(&config, tasks.task, (int32_t)tasks.T, env);
  if (!status)
    status = moe__plan_make(&plan, &config, tasks.task, (int32_t)tasks.T, header->quantized, env);
  /* before memory is asked for */
  if (!status &&
      (plan.total > header->st.data_bytes / sizeof(float) || plan.total_q > header->st.data_bytes))
    status = moe__fail(env, MOE_E_FORMAT,
                       "the configuration needs %zu weights, the file has %zu bytes of data",
                       plan.parameters, header->st.data_bytes);
  if (!status)
    status =
        moe__model_create_raw(out, &config, tasks.task, (int32_t)tasks.T, header->quantized, env);
  moe__release(scratch);
  return status == MOE_E_ARGUMENT ? MOE_E_FORMAT : status;
}

MOE_API moe_status moe_model_read(moe_model **out, const void *file, size_t file_bytes,
                                  const moe_env *env) {
  moe__header header;
  moe_model *model = NULL;
  const char *vocab;
  size_t vocab_bytes;
  moe_status status = moe__header_read(&header, file, file_bytes, 0, env);
  if (!status) status = moe__model_prepare(&model, &header, env);
  if (!status) /* into the model's own block, which is const only for later readers */
    status = moe__tensors_load((float *)(uintptr_t)model->weights,
                               (int8_t *)(uintptr_t)model->bytes, &header.st, model, "", env);
  if (!status) status = moe__vocab_find(&vocab, &vocab_bytes, &header.st, env);
  if (!status && vocab) status = moe_model_set_vocab(model, vocab, vocab_bytes, env);
  if (!status) status = moe_model_pack(model, NULL, env);
  return moe__model_deliver(out, model, status);
}

/* The block of moe_model_open: a model without weights, then the arrays needed during reading: its
   tasks, and a mark for each tensor. */
static void moe__open_carve(moe__layout *layout, moe__tasks *tasks, uint8_t **seen,
                            const moe__header *header) {
  moe__model_block parts;
  moe__model_carve(layout, &parts, header->T, header->labels, header->bytes,
                   moe__header_cells(header), NULL);
  moe__tasks_carve(layout, tasks, header);
  *seen = (uint8_t *)moe__carve(layout, header->st.tensors / 8 + 1, 1);
}

MOE_API moe_status moe_model_open_size(const void *file, size_t file_bytes, size_t *bytes,
                                       const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe__header header;
  moe__tasks tasks;
  uint8_t *seen;
  moe_status status = moe__header_read(&header, file, file_bytes, 1, env);
  if (status) return status;
  moe__open_carve(&layout, &tasks, &seen, &header);
  if (layout.bad)
    return moe__fail(env, MOE_E_FORMAT, "%zu tasks exceed the address space of this machine",
                     header.T);
  *bytes = layout.used;
  return MOE_OK;
}

MOE_API moe_status moe_model_open(moe_model **out, const void *file, size_t file_bytes, void *block,
                                  size_t bytes, const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe__header header;
  moe__tasks tasks;
  moe__reading r;
  moe_model *model;
  const unsigned char *weights;
  uint8_t *seen;
  moe_status status = moe__header_read(&header, file, file_bytes, 1, env);
  if (status) return status;
  if (!moe__little_endian())
    return moe__fail(
        env, MOE_E_UNSUPPORTED,
        "this machine is big-endian and cannot use a file in place: use moe_model_read");
  moe__open_carve(&layout, &tasks, &seen, &header);
  status = moe__check_block("an opened model", block, bytes, layout.used, env);
  if (status) return status;
  layout.base = (unsigned char *)block;
  layout.used = 0;
  moe__open_carve(&layout, &tasks, &seen, &header);
  status = moe__tasks_read(&header, &tasks, env);
  header.config.pruned = tasks.pruned;
  /* any address for the weights keeps them out of the block; nothing reads them before the walk
     over the tensors has found where they begin in the file */
  if (!status)
    status = moe__model_place(&model, block, bytes, &header.config, tasks.task, (int32_t)tasks.T,
                              header.quantized, (const float *)block, env);
  if (status) return status == MOE_E_ARGUMENT ? MOE_E_FORMAT : status;
  if ((size_t)model->tensors > header.st.tensors)
    return moe__fail(env, MOE_E_FORMAT, "the configuration needs %d tensors, the file has %zu",
                     (int)model->tensors, header.st.tensors);
  memset(&r, 0, sizeof r);
  r.st = &header.st;
  r.model = model;
  r.prefix = "";
  r.seen = seen;
  r.in_place = 1;
  status = moe__tensors_read(&r, env);
  if (status) return status;
  weights = header.st.data + r.first;
  if ((uintptr_t)weights % sizeof(float))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "the weights are misaligned: expected the bytes of the file at an address "
                     "that is a multiple of 64");
  status = moe__vocab_find(&model->vocab, &model->vocab_bytes, &header.st, env);
  if (status) return status;
  model->weights = (const float *)(const void *)weights;
  if (header.quantized)
    model->bytes = (const int8_t *)weights + model->plan.in[MOE__FLOATS_ALL].total * sizeof(float);
  *out = model;
  return MOE_OK;
}

/* ---- files of the operating system ---- >>os */

#ifndef MOE_NO_STDIO
/* An environment that puts a name before every sentence, and reports wrong arguments in a file as
   damaged data. */
typedef struct moe__named {
  moe_env env;
  const moe_env *outer;
  const char *name;
} moe__named;

static void moe__named_log(void *user, moe_status status, const char *sentence) {
  const moe__named *named = (const moe__named *)user;
  moe__fail(named->outer, status == MOE_E_ARGUMENT ? MOE_E_FORMAT : status, "%s: %s", named->name,
            sentence);
}

static const moe_env *moe__name_env(moe__named *named, const char *name, const moe_env *env) {
  memset(named, 0, sizeof *named);
  if (env)
    named->env = *env;
  else
    moe_env_init(&named->env, MOE_ISA_AUTO);
  named->outer = env;
  named->name = name;
  named->env.log = moe__named_log;
  named->env.log_user = named;
  return &named->env;
}

#ifdef _WIN32
typedef HANDLE moe__fd;
#define MOE__FD_NONE INVALID_HANDLE_VALUE
#else
typedef int moe__fd;
#define MOE__FD_NONE (-1)
#endif
#define MOE__IO_MOST ((size_t)1 << 24) /* bytes of one call: some hosts refuse many at once */

/* The kind of file that a path leads to. */
/* clang-format off */
typedef enum moe__path_kind { MOE__PATH_NONE, MOE__PATH_FILE, MOE__PATH_STREAM, MOE__PATH_DEVICE,
                              MOE__PATH_FOLDER } moe__path_kind;
/* clang-format on */

/* The system's reason for the last failure, in words. */
static const char *moe__reason(char *out, size_t capacity) {
#ifdef _WIN32
  moe__format(out, capacity, "system error %llu", (unsigned long long)GetLastError());
#else
  moe__format(out, capacity, "%s", strerror(errno));
#endif
  return out;
}

#ifdef _WIN32
static moe__path_kind moe__path(const char *path, size_t *bytes, unsigned *mode) {
  WIN32_FILE_ATTRIBUTE_DATA data;
  *bytes = 0;
  *mode = 0;
  if (!GetFileAttributesExA(path, GetFileExInfoStandard, &data)) return MOE__PATH_NONE;
  if (data.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) return MOE__PATH_FOLDER;
  *bytes = sizeof(size_t) > 4 ? (size_t)((uint64_t)data.nFileSizeHigh << 32 | data.nFileSizeLow)
                              : (size_t)data.nFileSizeLow;
  return MOE__PATH_FILE;
}

static moe__fd moe__open_read(const char *path) {
  return CreateFileA(path, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING,
                     FILE_ATTRIBUTE_NORMAL, NULL);
}

static moe__fd moe__open_write(const char *path) {
  return CreateFileA(path, GENERIC_WRITE, 0, NULL, CREATE_ALWAYS, FILE_ATTRIBUTE_NORMAL, NULL);
}

/* Creates a file. Nobody can open, rename or delete it until it is closed. */
static moe__fd moe__create(const char *path, unsigned mode) {
  (void)mode;
  return CreateFileA(path, GENERIC_WRITE, 0, NULL, CREATE_NEW, FILE_ATTRIBUTE_NORMAL, NULL);
}

static int moe__already_there(void) {
  return GetLastError() == ERROR_FILE_EXISTS || GetLastError() == ERROR_SHARING_VIOLATION;
}
static int moe__remove_stale(const char *path) { return DeleteFileA(path) != 0; }

static int moe__read_some(moe__fd fd, void *to, size_t most, size_t *got) {
  DWORD n = 0;
  int bad = !ReadFile(fd, to, (DWORD)(most < MOE__IO_MOST ? most : MOE__IO_MOST), &n, NULL);
  *got = n;
  return bad;
}

static int moe__write_some(moe__fd fd, const void *from, size_t most, size_t *got) {
  DWORD n = 0;
  int bad = !WriteFile(fd, from, (DWORD)(most < MOE__IO_MOST ? most : MOE__IO_MOST), &n, NULL);
  *got = n;
  return bad;
}

static int moe__sync(moe__fd fd) { return !FlushFileBuffers(fd); }
static int moe__close(moe__fd fd) { return !CloseHandle(fd); }
/* Closes a file of moe__create, and removes it or gives it its name. */
static void moe__discard(moe__fd fd, const char *path) {
  CloseHandle(fd);
  DeleteFileA(path);
}
static int moe__publish(moe__fd fd, const char *from, const char *to) {
  int bad = !CloseHandle(fd) ||
            !MoveFileExA(from, to, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
  DWORD why = GetLastError();
  if (bad) DeleteFileA(from);
  SetLastError(why);
  return bad;
}
static void moe__sync_folder(char *path) { (void)path; }
#else
static moe__path_kind moe__path(const char *path, size_t *bytes, unsigned *mode) {
  /* links to what the program has open: they must stay, even if that is a file */
  static const char *const open_files[] = {"/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/fd/",
                                           "/proc/self/fd/"};
  struct stat s;
  size_t i;
  *bytes = 0;
  *mode = 0666;
  for (i = 0; i < sizeof open_files / sizeof *open_files; ++i)
    if (!strncmp(path, open_files[i], strlen(open_files[i]))) return MOE__PATH_STREAM;
  if (stat(path, &s)) return MOE__PATH_NONE;
  if (S_ISDIR(s.st_mode)) return MOE__PATH_FOLDER;
  if (S_ISFIFO(s.st_mode)) return MOE__PATH_STREAM;
  if (!S_ISREG(s.st_mode)) return MOE__PATH_DEVICE;
  *mode = (unsigned)s.st_mode & 0777u;
  *bytes = s.st_size > 0 && (uint64_t)s.st_size < SIZE_MAX ? (size_t)s.st_size : 0;
  return MOE__PATH_FILE;
}

static moe__fd moe__open_read(const char *path) { return open(path, O_RDONLY); }

static moe__fd moe__open_write(const char *path) {
  return open(path, O_WRONLY | O_CREAT | O_TRUNC, (mode_t)0666);
}

/* Takes the lock of an open file: 1, or 0 if somebody else has it or the file system has no locks.
   The system releases the locks of a process that ends or is killed. */
static int moe__lock(int fd) {
#ifdef LOCK_EX
  return !flock(fd, LOCK_EX | LOCK_NB);
#else
  (void)fd;
  return 1;
#endif
}

/* Describes the path itself if it is a symbolic link. glibc hides lstat from strict C (-std=c99
   without _POSIX_C_SOURCE): it then describes what the link points to. */
static int moe__stat_path(const char *path, struct stat *s) {
#if defined(__GLIBC__) && !defined(__USE_XOPEN2K) && !defined(__USE_XOPEN_EXTENDED)
  return stat(path, s);
#else
  return lstat(path, s);
#endif
}

/* Whether the file that is open still has this name. */
static int moe__is_same(int fd, const char *path) {
  struct stat a, b;
  return !fstat(fd, &a) && !moe__stat_path(path, &b) && a.st_dev == b.st_dev &&
         a.st_ino == b.st_ino;
}

/* Creates a file and takes its lock, which keeps other writers from removing it. Fails if the name
   exists, as a link, too. */
static moe__fd moe__create(const char *path, unsigned mode) {
  int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, (mode_t)mode);
  if (fd < 0) return fd;
  if ((moe__lock(fd) || errno != EWOULDBLOCK) && moe__is_same(fd, path)) return fd;
  close(fd); /* another writer took it for a stale one, and removes it */
  errno = EEXIST;
  return MOE__FD_NONE;
}

static int moe__already_there(void) { return errno == EEXIST; }

/* Removes a temporary file whose writer has ended, or anything of that name that is not a file.
   1: removed. */
static int moe__remove_stale(const char *path) {
  struct stat s;
  int fd, gone = 0;
  if (moe__stat_path(path, &s)) return errno == ENOENT;
  if (!S_ISREG(s.st_mode)) return !unlink(path);
  fd = open(path, O_RDONLY | O_NONBLOCK);
  if (fd < 0) return 0;
  if (moe__lock(fd) && moe__is_same(fd, path)) gone = !unlink(path);
  close(fd);
  return gone;
}

/* 0 or an error; *got is 0 at the end of the file. */
static int moe__read_some(moe__fd fd, void *to, size_t most, size_t *got) {
  ssize_t n;
  do n = read(fd, to, most < MOE__IO_MOST ? most : MOE__IO_MOST);
  while (n < 0 && errno == EINTR);
  *got = n < 0 ? 0 : (size_t)n;
  return n < 0;
}

static int moe__write_some(moe__fd fd, const void *from, size_t most, size_t *got) {
  ssize_t n;
  do n = write(fd, from, most < MOE__IO_MOST ? most : MOE__IO_MOST);
  while (n < 0 && errno == EINTR);
  *got = n < 0 ? 0 : (size_t)n;
  return n < 0;
}

static int moe__sync(moe__fd fd) { return fsync(fd) && errno != EINVAL && errno != EROFS; }
static int moe__close(moe__fd fd) { return close(fd); }
/* Removes a file of moe__create or gives it its name, and closes it: until then it has its lock. */
static void moe__discard(moe__fd fd, const char *path) {
  unlink(path);
  close(fd);
}
static int moe__publish(moe__fd fd, const char *from, const char *to) {
  int bad = rename(from, to), why = errno;
  if (bad) unlink(from);
  close(fd);
  errno = why;
  return bad;
}

/* The new name must reach the disk, too, on systems that can sync a folder. */
static void moe__sync_folder(char *path) {
  char *slash = strrchr(path, '/');
  int fd;
  if (slash) slash[slash == path] = 0;
  fd = open(slash ? path : ".", O_RDONLY);
  if (fd < 0) return;
  (void)!fsync(fd);
  close(fd);
}
#endif

/* The bytes of a file, for reading only; NULL where it cannot be mapped. */
static void *moe__map_file(moe__fd fd, size_t bytes) {
#ifdef _WIN32
  HANDLE mapping = CreateFileMappingA(fd, NULL, PAGE_READONLY, 0, 0, NULL);
  void *at = mapping ? MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, bytes) : NULL;
  if (mapping) CloseHandle(mapping);
  return at;
#elif defined(MAP_FAILED)
  void *at = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  return at == MAP_FAILED ? NULL : at;
#else
  return (void)fd, (void)bytes, (void *)0;
#endif
}
#endif /* MOE_NO_STDIO */

/* ---- reading files whole, replacing them safely ---- >>replace */

#ifndef MOE_NO_STDIO
/* Reads to the end into a block that grows as needed; the size that the system reports is only a
   hint. */
static moe_status moe__read_all(void **data, size_t *bytes, moe__fd fd, size_t hint,
                                const char *path, const moe_env *env) {
  size_t capacity = hint < SIZE_MAX / 2 ? hint + 2 : hint, used = 0,
         got = 0; /* room for a zero, and to see that nothing follows */
  char reason[128];
  unsigned char *block;
  if (capacity < 4096) capacity = 4096;
  block = (unsigned char *)moe__alloc(capacity);
  while (block) {
    if (used + 1 >= capacity) { /* one byte is kept for the ending zero */
      size_t more = capacity < SIZE_MAX / 2 ? 2 * capacity : 0;
      unsigned char *larger = more ? (unsigned char *)moe__alloc(more) : NULL;
      if (larger) memcpy(larger, block, used);
      moe__release(block);
      block = larger;
      capacity = more;
      continue;
    }
    if (moe__read_some(fd, block + used, capacity - 1 - used, &got)) {
      moe__reason(reason, sizeof reason);
      moe__release(block);
      return moe__fail(env, MOE_E_IO, "%s: reading failed after %zu bytes: %s", path, used, reason);
    }
    used += got;
    if (got) continue;
    block[used] = 0;
    *data = block;
    *bytes = used;
    return MOE_OK;
  }
  return moe__fail(env, MOE_E_MEMORY, "%s: out of memory after reading %zu bytes", path, used);
}

MOE_API moe_status moe_file_read(void **data, size_t *bytes, const char *path, const moe_env *env) {
  char reason[128];
  size_t hint;
  unsigned mode;
  moe_status status;
  moe__fd fd;
  moe__path_kind kind = moe__path(path, &hint, &mode);
  if (kind == MOE__PATH_FOLDER) return moe__fail(env, MOE_E_IO, "%s: a folder, not a file", path);
  if (kind == MOE__PATH_DEVICE) return moe__fail(env, MOE_E_IO, "%s: a device, not a file", path);
  fd = moe__open_read(path);
  if (fd == MOE__FD_NONE)
    return moe__fail(env, MOE_E_IO, "%s: cannot be opened: %s", path,
                     moe__reason(reason, sizeof reason));
  status = moe__read_all(data, bytes, fd, hint, path, env);
  moe__close(fd);
  return status;
}

MOE_API void moe_free(void *data) { moe__release(data); }

typedef struct moe__file_sink {
  moe__fd fd;
  uint64_t written;
  int failed;
  char reason[128];
  const moe_env *outer;
} moe__file_sink;

/* After a failure of the file, only one sentence is logged, with its name and the system's reason;
   the writing function knows neither. */
static void moe__file_sink_log(void *user, moe_status status, const char *sentence) {
  const moe__file_sink *sink = (const moe__file_sink *)user;
  if (!sink->failed) moe__fail(sink->outer, status, "%s", sentence);
}

static int moe__file_sink_write(void *user, const void *data, size_t bytes) {
  moe__file_sink *sink = (moe__file_sink *)user;
  const unsigned char *from = (const unsigned char *)data;
  while (bytes && !sink->failed) {
    size_t got;
    if (moe__write_some(sink->fd, from, bytes, &got) || !got) {
      moe__reason(sink->reason, sizeof sink->reason);
      sink->failed = 1;
      break;
    }
    from += got;
    bytes -= got;
    sink->written += got;
  }
  return sink->failed;
}

/* Lets `write` fill an open file, and flushes it to the disk if sync is 1. */
static moe_status moe__fill_file(moe__fd fd, const char *name, int sync,
                                 moe_status (*write_fn)(void *, const moe_writer *,
                                                        const moe_env *),
                                 void *user, const moe_env *env) {
  moe__file_sink sink;
  moe_writer writer;
  moe_env inner;
  moe_status status;
  memset(&sink, 0, sizeof sink);
  memset(&inner, 0, sizeof inner);
  sink.fd = fd;
  sink.outer = env;
  if (env) {
    inner = *env;
    inner.log = moe__file_sink_log;
    inner.log_user = &sink;
  }
  writer.write = moe__file_sink_write;
  writer.user = &sink;
  status = write_fn(user, &writer, env ? &inner : NULL);
  if (!sink.failed && !status && sync && moe__sync(fd))
    sink.failed = 1, moe__reason(sink.reason, sizeof sink.reason);
  if (sink.failed)
    return moe__fail(env, MOE_E_IO, "%s: writing failed after %llu bytes: %s", name,
                     (unsigned long long)sink.written, sink.reason);
  return status;
}

/* Writes to a pipe, a device or an open file directly. */
static moe_status moe__write_stream(const char *path,
                                    moe_status (*write_fn)(void *, const moe_writer *,
                                                           const moe_env *),
                                    void *user, const moe_env *env) {
  char reason[128];
  moe_status status;
  moe__fd fd = moe__open_write(path);
  if (fd == MOE__FD_NONE)
    return moe__fail(env, MOE_E_IO, "%s: cannot be written: %s", path,
                     moe__reason(reason, sizeof reason));
  status = moe__fill_file(fd, path, 0, write_fn, user, env);
  if (moe__close(fd) && !status)
    status = moe__fail(env, MOE_E_IO, "%s: closing failed: %s", path,
                       moe__reason(reason, sizeof reason));
  return status;
}

/* Programs and threads that can write the same path at one time, each to a temporary file of its
   own: PATH.tmp, PATH.tmp1, ... */
#define MOE__WRITERS 16

static void moe__temporary_name(char *name, const char *path, int number) {
  size_t capacity = strlen(path) + sizeof ".tmp00";
  if (number)
    moe__format(name, capacity, "%s.tmp%d", path, number);
  else
    moe__format(name, capacity, "%s.tmp", path);
}

/* Creates a temporary file with the first free name, and removes those of writers that were killed.
 */
static moe__fd moe__temporary(char *name, const char *path, unsigned mode, const moe_env *env) {
  char reason[128];
  moe__fd fd = MOE__FD_NONE;
  int i, own = -1, there = 0;
  for (i = 0; i < MOE__WRITERS && own < 0; ++i) {
    int round;
    moe__temporary_name(name, path, i);
    for (round = 0; round < 2 && own < 0; ++round) {
      fd = moe__create(name, mode);
      if (fd != MOE__FD_NONE) own = i;
      there = fd == MOE__FD_NONE && moe__already_there();
      if (there && !moe__remove_stale(name)) break;
    }
    if (own < 0 && !there) {
      moe__fail(env, MOE_E_IO, "%s: cannot be written: %s", name,
                moe__reason(reason, sizeof reason));
      return fd;
    }
  }
  for (; i < MOE__WRITERS; ++i) {
    moe__temporary_name(name, path, i);
    (void)moe__remove_stale(name);
  }
  if (own < 0)
    moe__fail(env, MOE_E_IO,
              "%s: %d writers have temporary files (%s, ...): remove them if no program writes it",
              path, MOE__WRITERS, name);
  else
    moe__temporary_name(name, path, own);
  return fd;
}

MOE_API moe_status moe_file_replace(const char *path,
                                    moe_status (*write)(void *user, const moe_writer *writer,
                                                        const moe_env *env),
                                    void *user, const moe_env *env) {
  char reason[128], *temporary;
  size_t bytes, length = strlen(path);
  unsigned mode;
  moe_status status;
  moe__fd fd;
  moe__path_kind kind = moe__path(path, &bytes, &mode);
  if (kind == MOE__PATH_FOLDER) return moe__fail(env, MOE_E_IO, "%s: a folder, not a file", path);
  if (kind == MOE__PATH_DEVICE || kind == MOE__PATH_STREAM)
    return moe__write_stream(path, write, user, env);
  temporary = (char *)moe__alloc(length + sizeof ".tmp00");
  if (!temporary)
    return moe__fail(env, MOE_E_MEMORY, "%s: no memory for the name of a temporary file", path);
  fd = moe__temporary(temporary, path, mode, env);
  if (fd == MOE__FD_NONE) {
    moe__release(temporary);
    return MOE_E_IO;
  }
  status = moe__fill_file(fd, temporary, 1, write, user, env);
  if (status)
    moe__discard(fd, temporary);
  else if (moe__publish(fd, temporary, path))
    status = moe__fail(env, MOE_E_IO, "%s: cannot be renamed to %s: %s", temporary, path,
                       moe__reason(reason, sizeof reason));
  else
    moe__sync_folder(temporary);
  moe__release(temporary);
  return status;
}

struct moe_lock {
  moe__fd fd;
  char *path; /* of the lock, behind this struct */
};

/* Creates the file of a lock, or takes the place of one whose holder has ended. */
static moe_status moe__lock_take(moe_lock *lock, const char *path, const moe_env *env) {
  char reason[128];
  size_t bytes;
  unsigned mode;
  int i, there = 0;
  for (i = 0; i < 4; ++i) {
    lock->fd = moe__create(lock->path, 0666);
    if (lock->fd != MOE__FD_NONE) return MOE_OK;
    there = moe__already_there();
    moe__reason(reason, sizeof reason);
    /* a file with something in it is not a lock */
    if (!there || (moe__path(lock->path, &bytes, &mode) == MOE__PATH_FILE && bytes) ||
        !moe__remove_stale(lock->path))
      break;
  }
  if (there)
    return moe__fail(env, MOE_E_IO, "%s: another program works on it; if none does, remove %s",
                     path, lock->path);
  return moe__fail(env, MOE_E_IO, "%s: cannot be written: %s", lock->path, reason);
}

MOE_API moe_status moe_file_lock(moe_lock **out, const char *path, const moe_env *env) {
  size_t bytes, capacity = strlen(path) + sizeof ".lock";
  unsigned mode;
  moe__path_kind kind = moe__path(path, &bytes, &mode);
  moe_status status = MOE_OK;
  moe_lock *lock;
  if (kind == MOE__PATH_FOLDER) return moe__fail(env, MOE_E_IO, "%s: a folder, not a file", path);
  lock = (moe_lock *)moe__alloc(sizeof *lock + capacity);
  if (!lock) return moe__fail(env, MOE_E_MEMORY, "%s: no memory for the name of its lock", path);
  lock->fd = MOE__FD_NONE;
  lock->path = (char *)(lock + 1);
  moe__format(lock->path, capacity, "%s.lock", path);
  if (kind == MOE__PATH_NONE || kind == MOE__PATH_FILE) status = moe__lock_take(lock, path, env);
  if (status)
    moe__release(lock);
  else
    *out = lock;
  return status;
}

MOE_API void moe_file_unlock(moe_lock *lock) {
  if (lock && lock->fd != MOE__FD_NONE) moe__discard(lock->fd, lock->path);
  moe__release(lock);
}

/* A model on the heap whose weights stay in the bytes of a file, which it owns from then on:
   `mapped` bytes of a mapping, or (0) those of moe_file_read, checked and trainable. NULL, without
   a sentence, if they cannot stay there, or most of them are something else (moments): then
   moe_model_read copies the weights, or says what is wrong. */
static moe_model *moe__model_keep(void *file, size_t bytes, size_t mapped) {
  moe_model *m = NULL;
  size_t need = 0;
  void *block = moe_model_open_size(file, bytes, &need, NULL) ? NULL : moe__alloc(need);
  if (!block) return NULL;
  if (moe_model_open(&m, file, bytes, block, need, NULL) ||
      (!mapped && (m->plan.total * sizeof(float) + m->plan.total_q + m->vocab_bytes < bytes / 2 ||
                   moe__st_finite((const unsigned char *)m->weights, m->plan.total, MOE__F32) <
                       m->plan.total)))
    return moe__release(block), (moe_model *)NULL;
  m->writable = mapped || m->plan.quantized ? NULL : (float *)(uintptr_t)m->weights;
  m->owns_block = 1;
  m->file = file;
  m->mapped = mapped;
  return m;
}

MOE_API moe_status moe_model_load(moe_model **out, const char *path, const moe_env *env) {
  moe__named named;
  moe_model *kept;
  void *file;
  size_t bytes;
  moe_status status = moe_file_read(&file, &bytes, path, env);
  if (status) return status;
  kept = moe__model_keep(file, bytes, 0);
  if (kept) return moe__model_deliver(out, kept, moe_model_pack(kept, NULL, env));
  status = moe_model_read(out, file, bytes, moe__name_env(&named, path, env));
  moe_free(file);
  return status;
}

MOE_API moe_status moe_model_map(moe_model **out, const char *path, const moe_env *env) {
  size_t bytes;
  unsigned mode;
  moe__fd fd =
      moe__path(path, &bytes, &mode) == MOE__PATH_FILE ? moe__open_read(path) : MOE__FD_NONE;
  void *file = fd == MOE__FD_NONE ? NULL : moe__map_file(fd, bytes);
  moe_model *kept = file ? moe__model_keep(file, bytes, bytes) : NULL;
  if (fd != MOE__FD_NONE) moe__close(fd);
  if (file && !kept) moe__file_drop(file, bytes);
  if (!kept) return moe_model_load(out, path, env);
  *out = kept;
  return MOE_OK;
}

static moe_status moe__model_write_to(void *user, const moe_writer *writer, const moe_env *env) {
  return moe_model_write((const moe_model *)user, writer, env);
}

MOE_API moe_status moe_model_save(const moe_model *model, const char *path, const moe_env *env) {
  return moe_file_replace(path, moe__model_write_to, (void *)(uintptr_t)model, env);
}
#endif /* MOE_NO_STDIO */

/* ---- a published encoder in a file ---- >>encoder
   A BERT-like file of the Hugging Face hub: BERT's names (those of the table of tensors) behind any
   prefix ("bert.", "model."), LayerNorms as weight/bias or gamma/beta, F32, F16, BF16 or F64.
   Tensors outside the encoder (pooler, cls, position_ids) are skipped, of whatever dtype. A tensor
   within it that BERT does not have is an error, since such an encoder computes something else. */

/* Complains about a tensor that only well-known encoders of other kinds have: among those of the
   encoder behind the prefix, or among all (prefix NULL: no encoder was found). */
static moe_status moe__import_other(const moe__st *st, const char *prefix, const moe_env *env) {
  static const struct {
    const char *mark, *what;
  } known[] = {
      {".q_lin.", "DistilBERT, which has no segments and other names"},
      {".albert_layer_groups.", "ALBERT, whose layers share their weights"},
      {"embeddings_project.", "ELECTRA with word vectors narrower than its layers"},
      {".Wqkv.",
       "ModernBERT, Nomic BERT or the like, with rotary positions and gated feed-forward networks"},
      {"rel_embeddings.", "DeBERTa, with relative positions"},
      {"relative_attention_bias.", "MPNet, T5 or the like, with relative positions"},
      {".distance_embedding.", "a BERT with relative positions"},
      {".gated_layers", "JinaBERT, with gated feed-forward networks"},
      {".bottleneck.", "MobileBERT, whose layers have bottlenecks"},
      {".experts.", "a mixture of experts (moe_model_load reads those of moe.h)"},
      {".blocks.", "an encoder with several blocks in a layer (moe_model_load reads those of "
                   "moe.h)"},
      {".lora_", "an adapter (LoRA), to be merged into the weights of its encoder first"}};
  char name[256];
  moe__json j;
  moe__st_tensor t;
  size_t length = prefix ? strlen(prefix) : 0, i;
  moe__st_begin(st, &j);
  while (moe__st_next(st, &j, &t)) {
    moe__json_copy(name, sizeof name, &t.key);
    if (prefix && (strncmp(name, prefix, length) || (strncmp(name + length, "embeddings", 10) &&
                                                     strncmp(name + length, "encoder.", 8) &&
                                                     strncmp(name + length, "transformer.", 12))))
      continue;
    for (i = 0; i < sizeof known / sizeof *known; ++i)
      if (strstr(name + length, known[i].mark))
        return moe__fail(env, MOE_E_FORMAT,
                         "tensor %s: this is %s; only encoders like BERT can be imported", t.name,
                         known[i].what);
  }
  return MOE_OK;
}

/* An encoder in a file. */
typedef struct moe__encoder {
  moe__st st;
  char prefix[128]; /* the text before "embeddings.word_embeddings.weight" */
  int32_t layers;   /* 1 + the highest number of a layer */
} moe__encoder;

/* Finds the prefix. */
static moe_status moe__import_prefix(char *prefix, size_t capacity, const moe__st *st,
                                     const moe_env *env) {
  static const char wanted[] = "embeddings.word_embeddings.weight";
  moe__json j;
  moe__st_tensor t;
  int found = 0;
  moe__st_begin(st, &j);
  while (moe__st_next(st, &j, &t)) {
    size_t length = strlen(t.name), tail = sizeof wanted - 1;
    if (length < tail || strcmp(t.name + length - tail, wanted) ||
        (length > tail && t.name[length - tail - 1] != '.'))
      continue;
    if (found++)
      return moe__fail(env, MOE_E_FORMAT, "two encoders in the file: %s%s and %s", prefix, wanted,
                       t.name);
    if (length - tail >= capacity)
      return moe__fail(env, MOE_E_FORMAT, "tensor %s: its prefix is too long", t.name);
    memcpy(prefix, t.name, length - tail);
    prefix[length - tail] = 0;
  }
  if (found) return MOE_OK;
  if (moe__import_other(st, NULL, env)) return MOE_E_FORMAT;
  return moe__fail(env, MOE_E_FORMAT,
                   "not an encoder like BERT, or only a part of one (model-00002-of-...): none of "
                   "the %zu tensors is %s",
                   st->tensors, wanted);
}

/* Whether a name is that of a row of the table; a LayerNorm's may be the old one. */
static int moe__import_same(const char *name, const moe__tensor_row *row) {
  size_t length = strlen(row->name), norm = length - strlen("weight");
  if (!strcmp(name, row->name)) return 1;
  if (!strstr(row->name, "LayerNorm.")) return 0;
  if (row->first != MOE__FIRST_ONE) norm = length - strlen("bias");
  return !strncmp(name, row->name, norm) &&
         !strcmp(name + norm, row->first == MOE__FIRST_ONE ? "gamma" : "beta");
}

/* Parses a name after the prefix. 1: a tensor of BERT, its row and layer in *spot; -1: outside the
   encoder; 0: within the encoder, but not a tensor of BERT. */
static int moe__import_parse(const char *name, moe__spot *spot) {
  int in_layer;
  spot->layer = spot->i = 0;
  if (!strcmp(name, "embeddings.position_ids") || !strcmp(name, "embeddings.token_type_ids"))
    return -1;
  in_layer = moe__skip(&name, "encoder.layer.");
  if (!in_layer && !moe__skip(&name, "embeddings.")) return strncmp(name, "encoder.", 8) ? -1 : 0;
  if (in_layer) spot->layer = moe__skip_number(&name, 10000);
  for (spot->id = 0; spot->id < MOE__ROWS && spot->layer >= 0; ++spot->id) {
    const moe__tensor_row *row = moe__row_of(spot);
    if (row->bert && in_layer == (row->scope != MOE__IN_EMBED) && moe__import_same(name, row))
      return 1;
  }
  return 0;
}

/* RoBERTa has BERT's names, but its positions begin at row 2 of the table: row 1 is 0 in all of its
   models, row 2 is not, and there are 2 rows more than some power of two, which alone is evidence
   only where nothing says that it is BERT (guess 1). */
static moe_status moe__import_positions(const moe__st *st, const char *prefix, int guess,
                                        const moe_env *env) {
  moe__json hint;
  moe__st_tensor t;
  size_t rows, row, i;
  int zero = 1, next_zero = 1, two_more;
  memset(&hint, 0, sizeof hint);
  if (!moe__st_find(st, &hint, prefix, "embeddings.position_embeddings.weight", &t))
    return MOE_OK; /* reported as missing later */
  if (t.dims != 2 || t.shape[0] < 3 || !t.shape[1]) return MOE_OK;
  rows = t.shape[0];
  row = (t.end - t.begin) / rows;
  for (i = 0; i < row && zero; ++i) zero = !st->data[t.begin + row + i];
  for (i = 0; i < row && next_zero; ++i) next_zero = !st->data[t.begin + 2 * row + i];
  two_more = guess && rows >= 66 && !((rows - 2) & (rows - 3));
  if (!(zero && !next_zero) && !two_more && !strstr(prefix, "roberta")) return MOE_OK;
  return moe__fail(
      env, MOE_E_FORMAT,
      "tensor %s: %zu rows, as in RoBERTa, which counts positions from 2; only encoders like "
      "BERT can be imported",
      t.name, rows);
}

/* Finds the encoder in a file's bytes; all of its tensors are BERT's. guess: see above. */
static moe_status moe__import_open(moe__encoder *out, const void *file, size_t bytes, int guess,
                                   const moe_env *env) {
  const moe__st *st = &out->st;
  char name[256];
  moe__json j;
  moe__st_tensor t;
  moe__spot spot;
  size_t length;
  moe_status status = moe__st_open(&out->st, file, bytes, env);
  if (!status) status = moe__import_prefix(out->prefix, sizeof out->prefix, st, env);
  if (!status) status = moe__import_other(st, out->prefix, env);
  if (!status) status = moe__import_positions(st, out->prefix, guess, env);
  if (status) return status;
  out->layers = 0;
  length = strlen(out->prefix);
  moe__st_begin(st, &j);
  while (moe__st_next(st, &j, &t)) {
    int known;
    moe__json_copy(name, sizeof name, &t.key);
    if (strncmp(name, out->prefix, length)) continue;
    known = moe__import_parse(name + length, &spot);
    if (!known)
      return moe__fail(
          env, MOE_E_FORMAT,
          "tensor %s: BERT has no such tensor; only encoders like BERT can be imported", t.name);
    if (known > 0 && moe__row_of(&spot)->scope != MOE__IN_EMBED)
      out->layers = moe__max(out->layers, spot.layer + 1);
  }
  return MOE_OK;
}

/* A matrix of the file, for its sizes. */
static moe_status moe__import_matrix(const moe__encoder *from, const char *name, int32_t *rows,
                                     int32_t *cols, const moe_env *env) {
  moe__json hint;
  moe__st_tensor t;
  char shape[200];
  memset(&hint, 0, sizeof hint);
  if (!moe__st_find(&from->st, &hint, from->prefix, name, &t))
    return moe__fail(env, MOE_E_FORMAT, "tensor %s%s is missing", from->prefix, name);
  moe__shape_text(shape, sizeof shape, t.shape, t.dims);
  if (t.dims != 2 || !t.shape[0] || !t.shape[1] || t.shape[0] > INT32_MAX || t.shape[1] > INT32_MAX)
    return moe__fail(env, MOE_E_FORMAT, "tensor %s: expected a matrix, found %s", t.name, shape);
  *rows = (int32_t)t.shape[0];
  *cols = (int32_t)t.shape[1];
  return MOE_OK;
}

/* guess: see moe__import_positions. */
static moe_status moe__import_sizes(moe_config *config, const void *file, size_t file_bytes,
                                    int guess, const moe_env *env) {
  moe__encoder from;
  moe_config c = *config;
  int32_t cols;
  moe_status status = moe__import_open(&from, file, file_bytes, guess, env);
  if (!status)
    status =
        moe__import_matrix(&from, "embeddings.word_embeddings.weight", &c.vocab, &c.hidden, env);
  if (!status)
    status = moe__import_matrix(&from, "embeddings.position_embeddings.weight", &c.positions, &cols,
                                env);
  if (!status)
    status = moe__import_matrix(&from, "embeddings.token_type_embeddings.weight", &c.segments,
                                &cols, env);
  if (!status)
    status =
        moe__import_matrix(&from, "encoder.layer.0.intermediate.dense.weight", &c.ffn, &cols, env);
  if (status) return status;
  c.layers = from.layers;
  c.feature_dim = 0;
  if (c.max_len > c.positions) c.max_len = c.positions;
  *config = c;
  return MOE_OK;
}

MOE_API moe_status moe_import_sizes(moe_config *config, const void *file, size_t file_bytes,
                                    const moe_env *env) {
  return moe__import_sizes(config, file, file_bytes, 1, env);
}

/* What config.json says of an encoder; numbers that it does not name are 0. */
typedef struct moe__import_json {
  int64_t number[8]; /* as in moe__import_keys */
  float eps;
  int has_eps, typed; /* typed 1: model_type is one of those whose encoder is BERT's */
} moe__import_json;
enum { MOE__IMPORT_HIDDEN = 1, MOE__IMPORT_EMBEDDING = 7 };
static const struct {
  const char *key, *tensor; /* tensor: where the weights have it */
} moe__import_keys[8] = {
    {"num_attention_heads", NULL},
    {"hidden_size", "embeddings.word_embeddings.weight"},
    {"num_hidden_layers", "the tensors of encoder.layer"},
    {"intermediate_size", "encoder.layer.0.intermediate.dense.weight"},
    {"vocab_size", "embeddings.word_embeddings.weight"},
    {"max_position_embeddings", "embeddings.position_embeddings.weight"},
    {"type_vocab_size", "embeddings.token_type_embeddings.weight"},
    {"embedding_size", "embeddings.word_embeddings.weight"},
};

/* A member whose value must be one of these words. */
static moe_status moe__import_word(moe__import_json *out, moe__json *j, const moe__json_text *key,
                                   int *mine, const moe_env *env) {
  static const char *const words[][2] = {
      {"hidden_act", "gelu"},    {"position_embedding_type", "absolute"},
      {"model_type", "bert"},    {"model_type", "electra"},
      {"model_type", "ernie"},   {"model_type", "dpr"},
      {"model_type", "splinter"}};
  moe__json_text value;
  char text[64];
  size_t i, n = sizeof words / sizeof *words, at;
  for (at = 0; at < n && !moe__json_is(key, words[at][0]); ++at) continue;
  *mine = at < n;
  if (!*mine || !moe__json_string(j, &value)) return MOE_OK;
  for (i = at; i < n; ++i)
    if (!strcmp(words[i][0], words[at][0]) && moe__json_is(&value, words[i][1])) break;
  moe__printable(text, sizeof text, &value);
  if (i == n)
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "config.json: %s is \"%s\", expected \"%s\" or an encoder that computes the "
                     "same",
                     words[at][0], text, words[at][1]);
  if (i > 1) out->typed = 1;
  return MOE_OK;
}

/* A member of config.json. */
static moe_status moe__import_member(moe__import_json *out, moe__json *j, const moe_env *env) {
  moe__json_text key;
  char name[64];
  int mine, i, kind;
  moe_status status;
  if (!moe__json_key(j, &key)) return MOE_OK;
  status = moe__import_word(out, j, &key, &mine, env);
  if (status || mine) return status;
  kind = moe__json_kind(j);
  if (moe__json_is(&key, "is_decoder") && kind == 't')
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "config.json: is_decoder is true, expected an encoder");
  for (i = 0; i < 8 && !moe__json_is(&key, moe__import_keys[i].key); ++i) continue;
  if (i == 8 && !moe__json_is(&key, "layer_norm_eps")) {
    moe__json_skip(j);
    return MOE_OK;
  }
  moe__json_copy(name, sizeof name, &key);
  if (kind != '-' && (kind < '0' || kind > '9'))
    return moe__fail(env, MOE_E_FORMAT, "config.json: %s is no number%s", name,
                     kind == '"' ? ", but a text in quotes" : "");
  if (i == 8)
    out->has_eps = moe__json_float(j, &out->eps);
  else if (!moe__json_integer(j, 1, i ? INT32_MAX : 65536, &out->number[i]) && j->error)
    return moe__fail(env, MOE_E_FORMAT, "config.json: %s is out of range", name);
  return MOE_OK;
}

static moe_status moe__import_read_json(moe__import_json *out, const char *json, size_t bytes,
                                        const moe_env *env) {
  const size_t mark = bytes > 2 && !memcmp(json, "\xef\xbb\xbf", 3) ? 3 : 0;
  moe__json j;
  memset(out, 0, sizeof *out);
  moe__json_init(&j, json + mark, bytes - mark, 0);
  moe__json_enter(&j, '{');
  while (moe__json_more(&j, '}')) {
    moe_status status = moe__import_member(out, &j, env);
    if (status) return status;
  }
  moe__json_finish(&j);
  if (j.error)
    return moe__fail(env, MOE_E_FORMAT, "config.json, byte %zu of %zu: %s", (size_t)(j.at - json),
                     bytes, j.error);
  if (!out->number[0])
    return moe__fail(env, MOE_E_FORMAT, "config.json: num_attention_heads is missing");
  if (out->number[MOE__IMPORT_EMBEDDING] && out->number[MOE__IMPORT_HIDDEN] &&
      out->number[MOE__IMPORT_EMBEDDING] != out->number[MOE__IMPORT_HIDDEN])
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "config.json: embedding_size is %d and hidden_size %d, expected the same",
                     (int)out->number[MOE__IMPORT_EMBEDDING], (int)out->number[MOE__IMPORT_HIDDEN]);
  return MOE_OK;
}

/* Takes heads and eps. */
static moe_status moe__import_take(moe_config *config, const moe__import_json *said,
                                   const moe_env *env) {
  float eps = said->has_eps ? said->eps : config->eps;
  if (!(eps > 0 && eps < 1))
    return moe__fail(env, MOE_E_FORMAT,
                     "config.json: layer_norm_eps is %g, expected above 0 and below 1",
                     (double)eps);
  config->heads = (int32_t)said->number[0];
  config->eps = eps;
  return MOE_OK;
}

MOE_API moe_status moe_import_config_json(moe_config *config, const char *json, size_t bytes,
                                          const moe_env *env) {
  moe__import_json said;
  moe_status status = moe__import_read_json(&said, json, bytes, env);
  return status ? status : moe__import_take(config, &said, env);
}

MOE_API moe_status moe_import_encoder(moe_config *config, const void *file, size_t file_bytes,
                                      const char *json, size_t json_bytes, const moe_env *env) {
  moe__import_json said;
  moe_config c = *config;
  int32_t found[8];
  int i;
  moe_status status = moe__import_read_json(&said, json, json_bytes, env);
  if (!status) status = moe__import_sizes(&c, file, file_bytes, !said.typed, env);
  if (!status) status = moe__import_take(&c, &said, env);
  if (status) return status;
  found[0] = c.heads, found[1] = c.hidden, found[2] = c.layers, found[3] = c.ffn;
  found[4] = c.vocab, found[5] = c.positions, found[6] = c.segments, found[7] = c.hidden;
  for (i = 1; i < 8; ++i)
    if (said.number[i] && said.number[i] != found[i])
      return moe__fail(env, MOE_E_FORMAT,
                       "config.json: %s is %d, but the weights have %d (%s): are these two files "
                       "of one model?",
                       moe__import_keys[i].key, (int)said.number[i], (int)found[i],
                       moe__import_keys[i].tensor);
  *config = c;
  return MOE_OK;
}

/* ---- its weights into a model ---- >>import */

/* Where a tensor of the encoder is in the file. */
typedef struct moe__source {
  int found;
  moe__dtype dtype;
  size_t begin;
} moe__source;

/* Sentences about one file at most. */
#define MOE__IMPORT_COMPLAINTS 16

/* What an import works on. */
typedef struct moe__import {
  moe__encoder from;
  moe_model *model;
  moe__source *source; /* (1 + layers, MOE__ROWS): of the embeddings, of each layer */
  int complaints;
} moe__import;

/* The source in the file of a tensor of the model; NULL: published encoders do not have it. */
static moe__source *moe__import_source(const moe__import *import, const moe__spot *spot) {
  int32_t layer = spot->layer / moe__layer_blocks(&import->model->config);
  if (!moe__row_of(spot)->bert) return NULL;
  if (moe__row_of(spot)->scope == MOE__IN_EMBED) layer = -1;
  return &import->source[(layer + 1) * MOE__ROWS + spot->id];
}

/* The number of this copy among several copies of one tensor of the file; -1: the only one. */
static int32_t moe__import_copy(const moe_config *c, const moe__spot *spot) {
  int scope = moe__row_of(spot)->scope;
  if (MOE__BLOCKS(c) && scope >= MOE__IN_LAYER && scope <= MOE__IN_TAIL)
    return spot->layer % c->experts;
  return scope == MOE__IN_EXPERT && moe__has_gates(c) ? spot->i : -1;
}

/* The log for one more complaint; NULL after MOE__IMPORT_COMPLAINTS. */
static const moe_env *moe__import_complain(moe__import *import, const moe_env *env) {
  return import->complaints++ < MOE__IMPORT_COMPLAINTS ? env : NULL;
}

/* Checks a tensor of the file against the model, and notes where it is. */
static moe_status moe__import_note(moe__import *import, const moe__spot *spot,
                                   const moe__st_tensor *found, const moe_env *env) {
  moe__source *source = moe__import_source(import, spot);
  moe_tensor want;
  size_t bad;
  if (!moe__row_exists(&import->model->config, moe__row_of(spot))) return MOE_OK;
  if (source->found)
    return moe__fail(env, MOE_E_FORMAT,
                     "tensor %s is listed twice, maybe once under its old name (gamma, beta)",
                     found->name);
  source->found = 1;
  source->dtype = found->dtype;
  source->begin = found->begin;
  moe__spot_tensor(import->model, spot, &want);
  if (!moe__same_shape(found, &want) || (found->dtype > MOE__BF16 && found->dtype != MOE__F64)) {
    moe__wrong_shape(found, &want, "F32, F16, BF16 or F64", moe__import_complain(import, env));
    return MOE_OK;
  }
  bad = moe__st_finite(import->from.st.data + found->begin, found->count, found->dtype);
  if (bad < found->count)
    moe__fail(moe__import_complain(import, env), MOE_E_FORMAT,
              "tensor %s: element %zu is not a finite number", found->name, bad);
  return MOE_OK;
}

/* Goes through the tensors of the file. */
static moe_status moe__import_list(moe__import *import, const moe_env *env) {
  const moe__encoder *from = &import->from;
  const moe_config *config = &import->model->config;
  moe__json j;
  moe__st_tensor t;
  moe__spot spot;
  size_t length = strlen(from->prefix);
  char name[256];
  moe_status status = MOE_OK;
  if (from->layers > config->layers)
    moe__fail(moe__import_complain(import, env), MOE_E_FORMAT,
              "the model has %d layers, the file has %d", (int)config->layers, (int)from->layers);
  moe__st_begin(&from->st, &j);
  while (!status && moe__st_next(&from->st, &j, &t)) {
    moe__json_copy(name, sizeof name, &t.key);
    if (strncmp(name, from->prefix, length) || moe__import_parse(name + length, &spot) <= 0 ||
        spot.layer >= config->layers)
      continue;
    spot.layer *= moe__layer_blocks(config); /* the first represents all blocks and experts */
    status = moe__import_note(import, &spot, &t, env);
  }
  return status;
}

/* Reports a tensor that the file lacks. */
static void moe__import_missing(moe__import *import, const moe__spot *spot, const moe_tensor *want,
                                const moe_env *env) {
  const moe__tensor_row *row = moe__row_of(spot);
  char shape[80], layer[48];
  size_t dims[3];
  int k;
  for (k = 0; k < want->dims; ++k) dims[k] = (size_t)want->shape[k];
  moe__shape_text(shape, sizeof shape, dims, want->dims);
  moe__format(layer, sizeof layer, "encoder.layer.%d.",
              (int)(spot->layer / moe__layer_blocks(&import->model->config)));
  moe__fail(moe__import_complain(import, env), MOE_E_FORMAT,
            "tensor %s%s%s is missing: expected F32, F16, BF16 or F64 of %s", import->from.prefix,
            row->scope == MOE__IN_EMBED ? "embeddings." : layer, row->name, shape);
}

/* Checks that the file has every tensor that the model needs, before anything is changed. */
static moe_status moe__import_survey(moe__import *import, const moe_env *env) {
  const moe_model *model = import->model;
  int32_t i;
  moe_tensor t;
  moe_status status = moe__import_list(import, env);
  for (i = 0; i < model->tensors && !status; ++i) {
    moe__spot spot = moe__tensor_get(model, i, &t);
    const moe__source *source = moe__import_source(import, &spot);
    if (source && !source->found && moe__import_copy(&model->config, &spot) <= 0)
      moe__import_missing(import, &spot, &t, env);
  }
  if (import->complaints > MOE__IMPORT_COMPLAINTS)
    moe__fail(env, MOE_E_FORMAT, "and %d more tensors are missing or wrong",
              import->complaints - MOE__IMPORT_COMPLAINTS);
  return status || import->complaints ? MOE_E_FORMAT : MOE_OK;
}

/* Copies the file's tensors into the model, and adds noise to copies of the same one. */
static void moe__import_fill(const moe__import *import, const moe_import_options *options) {
  moe_model *model = import->model;
  float noise = options ? options->noise : 0;
  int32_t i;
  moe_tensor t;
  size_t k;
  for (i = 0; i < model->tensors; ++i) {
    moe__spot spot = moe__tensor_get(model, i, &t);
    const moe__source *source = moe__import_source(import, &spot);
    float *to = model->writable + t.offset;
    if (!source) continue;
    moe__st_floats(to, import->from.st.data + source->begin, t.count, source->dtype);
    if (noise > 0 && moe__import_copy(&model->config, &spot) >= 0) {
      uint64_t key = moe_key(options->seed, 0, moe__name_hash(t.name), 0, MOE__SITE_NOISE);
      for (k = 0; k < t.count; ++k) to[k] += noise * moe__normal(key, k);
    }
  }
}

MOE_API moe_status moe_model_import(moe_model *model, const void *file, size_t file_bytes,
                                    const moe_import_options *options, const moe_env *env) {
  moe__import import;
  size_t bytes = (size_t)(model->config.layers + 1) * MOE__ROWS * sizeof(moe__source);
  moe_status status;
  if (MOE__INT8(model->plan.quantized))
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "cannot import into an int8 model: import first, then quantise");
  if (!model->writable)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "cannot import into a model opened in place: read it with moe_model_read or "
                     "moe_model_load");
  if (model->config.pruned)
    return moe__fail(env, MOE_E_UNSUPPORTED,
                     "cannot import into a model with pruned experts: import first, then prune");
  if (options && !(options->noise >= 0 && options->noise < 1))
    return moe__fail(env, MOE_E_ARGUMENT, "noise on copied experts is %g, expected 0 to below 1",
                     (double)options->noise);
  memset(&import, 0, sizeof import);
  import.model = model;
  status = moe__import_open(&import.from, file, file_bytes, 0, env);
  if (status) return status;
  import.source = (moe__source *)moe__alloc(bytes);
  if (!import.source)
    return moe__fail(env, MOE_E_MEMORY, "no memory for the places of the file's tensors");
  memset(import.source, 0, bytes);
  status = moe__import_survey(&import, env);
  if (!status) status = moe__model_fetch(model, env);
  if (!status) moe__import_fill(&import, options);
  moe__release(import.source);
  if (status) return status;
  if (model->panels) moe__model_repack(model, env);
  return model->resident ? moe__model_upload(model, &model->device) : MOE_OK;
}

#ifndef MOE_NO_TRAIN
/* ---- checkpoints ---- >>checkpoint
   A model file with the moments as tensors adam.m.NAME and adam.v.NAME, and "moe.checkpoint" in the
   metadata: step, the rate of moe_trainer_set_lr (if one is set), the sampler's state, the caller's
   note. moe_model_load and _open read it as a model. */

typedef struct moe__state {
  const moe_trainer *trainer;
  const moe_sampler *sampler;
  const char *note;
} moe__state;

static const char *const moe__sampling_name[] = {"natural", "uniform", "temperature",
                                                 "uniform-natural"};

static void moe__out_counts(moe__out *out, const char *name, const int64_t *counts, int32_t n) {
  int32_t i;
  moe__out_member(out, ",", name);
  moe__out_text(out, "[");
  for (i = 0; i < n; ++i) {
    if (i) moe__out_text(out, ",");
    moe__out_int(out, counts[i]);
  }
  moe__out_text(out, "]");
}

static void moe__sampler_put(moe__out *out, const moe_sampler *s) {
  moe__out_member(out, "{", "sampling");
  moe__out_string(out, moe__sampling_name[s->config.sampling],
                  strlen(moe__sampling_name[s->config.sampling]));
  moe__out_member(out, ",", "tau");
  moe__out_float(out, s->config.tau);
  moe__out_member(out, ",", "in_order");
  moe__out_int(out, s->config.in_order);
  moe__out_member(out, ",", "seed");
  moe__out_uint(out, s->config.seed);
  moe__out_member(out, ",", "draws");
  moe__out_int(out, s->config.draws);
  if (s->config.run) {
    moe__out_member(out, ",", "run");
    moe__out_int(out, s->config.run);
  }
  moe__out_member(out, ",", "drawn");
  moe__out_int(out, s->drawn);
  moe__out_counts(out, "rows", s->rows, s->T);
  moe__out_counts(out, "used", s->used, s->T);
  moe__out_text(out, "}");
}

static void moe__state_put(moe__out *out, const void *user) {
  const moe__state *state = (const moe__state *)user;
  moe__out_member(out, "{", "step");
  moe__out_int(out, state->trainer->step);
  if (state->trainer->lr >= 0) {
    moe__out_member(out, ",", "lr");
    moe__out_float(out, state->trainer->lr);
  }
  if (state->sampler) {
    moe__out_member(out, ",", "sampler");
    moe__sampler_put(out, state->sampler);
  }
  if (state->note) {
    moe__out_member(out, ",", "note");
    moe__out_string(out, state->note, strlen(state->note));
  }
  moe__out_text(out, "}");
}

/* Both moments of all weights where the host can read and write them, m before v at out[0] and
   out[1]: the trainer's, or of a device or a share a copy that the caller frees
   (moe__moments_drop). */
static moe_status moe__moments_take(float *out[2], const moe_trainer *trainer, const moe_env *env) {
  size_t n = trainer->model->plan.total;
  out[0] = trainer->m, out[1] = trainer->v;
  if (!trainer->ops && !trainer->config.share) return MOE_OK;
  out[0] = (float *)moe__alloc(2 * n * sizeof(float));
  if (!out[0]) return moe__fail(env, MOE_E_MEMORY, "no memory for the moments of a checkpoint");
  out[1] = out[0] + n;
  return MOE_OK;
}

static void moe__moments_drop(float *moments[2], const moe_trainer *trainer) {
  if (moments[0] != trainer->m) moe__release(moments[0]);
}

/* Fills the copy of one that writes; with `moments` NULL only gives others what they need. */
static moe_status moe__moments_gather(float *const *moments, const moe_trainer *trainer) {
  const moe_env *on = &trainer->context->device.env;
  const moe_share *share = trainer->config.share;
  size_t n = trainer->model->plan.total;
  if (on->backend)
    return on->backend->download(on->backend, on, moments[0], trainer->m, 2 * n * sizeof(float));
  if (!share) return MOE_OK;
  share->moments(share->user, trainer->m, moments ? moments[0] : NULL, n);
  share->moments(share->user, trainer->v, moments ? moments[1] : NULL, n);
  return MOE_OK;
}

MOE_API moe_status moe_checkpoint_write(const moe_trainer *trainer, const moe_sampler *sampler,
                                        const char *note, const moe_writer *writer,
                                        const moe_env *env) {
  moe__save save;
  moe__state state;
  float *moments[2];
  moe_status status;
  if (!writer) return moe__moments_gather(NULL, trainer);
  state.trainer = trainer;
  state.sampler = sampler;
  state.note = note;
  save.model = trainer->model;
  save.put_state = moe__state_put;
  save.state = &state;
  status = moe__moments_take(moments, trainer, env);
  if (status) return status;
  status = moe__moments_gather(moments, trainer);
  save.moment[0] = moments[0];
  save.moment[1] = moments[1];
  if (!status) status = moe__save_write(&save, writer, env);
  moe__moments_drop(moments, trainer);
  return status;
}

/* The file must have the configuration and tasks of the model; if not, says which field differs. */
static moe_status moe__same_config(const moe_config *file, const moe_config *model,
                                   const moe_env *env) {
  size_t i;
  for (i = 0; i < MOE__CONFIG_FIELDS; ++i)
    if (moe__config_get(file, i) != moe__config_get(model, i))
      return moe__fail(
          env, MOE_E_FORMAT, "the checkpoint's configuration has %s %d, the model has %d",
          moe__config_field[i].name, (int)moe__config_get(file, i), (int)moe__config_get(model, i));
  if (file->eps < model->eps || file->eps > model->eps)
    return moe__fail(env, MOE_E_FORMAT,
                     "the checkpoint's configuration has eps %g, the model has %g",
                     (double)file->eps, (double)model->eps);
  if (file->router != model->router)
    return moe__fail(env, MOE_E_FORMAT,
                     "the checkpoint's configuration has router %s, the model has %s",
                     moe__router_names[file->router], moe__router_names[model->router]);
  if (file->unit != model->unit ||
      (file->unit == MOE_UNIT_BLOCK &&
       (file->selection != model->selection || file->task_dim != model->task_dim ||
        file->temperature < model->temperature || file->temperature > model->temperature)))
    return moe__fail(env, MOE_E_FORMAT,
                     "the checkpoint's configuration has unit %s, selection %s, temperature %g, "
                     "task_dim %d, the model has %s, %s, %g, %d",
                     moe__unit_names[file->unit], moe__selection_names[file->selection],
                     (double)file->temperature, (int)file->task_dim, moe__unit_names[model->unit],
                     moe__selection_names[model->selection], (double)model->temperature,
                     (int)model->task_dim);
  if (model->router == MOE_ROUTER_EMBEDDING && file->rank != model->rank)
    return moe__fail(env, MOE_E_FORMAT,
                     "the checkpoint's configuration has rank %d, the model has %d",
                     (int)file->rank, (int)model->rank);
  if (file->truncate != model->truncate)
    return moe__fail(env, MOE_E_FORMAT,
                     "the checkpoint's configuration has truncate %s, the model has %s",
                     moe__truncate_names[file->truncate], moe__truncate_names[model->truncate]);
  return MOE_OK;
}

static const char *moe__task_difference(const moe_task *a, const moe_task *b) {
  int32_t i;
  if (strcmp(a->name, b->name)) return "name";
  if (a->kind != b->kind) return "kind";
  if (a->pair != b->pair) return "pair";
  if (a->max_len != b->max_len) return "max_len";
  if (a->classes != b->classes) return "number of classes";
  if (!moe__has_classes(a))
    return a->low < b->low || a->low > b->low || a->high < b->high || a->high > b->high ? "range"
                                                                                        : NULL;
  for (i = 0; i < a->classes; ++i)
    if (strcmp(a->label[i], b->label[i])) return "label names";
  return NULL;
}

static moe_status moe__same_tasks(const moe__tasks *file, const moe_model *model,
                                  const moe_env *env) {
  int32_t t;
  if (file->T != (size_t)model->T)
    return moe__fail(env, MOE_E_FORMAT, "the checkpoint has %zu tasks, the model has %d", file->T,
                     (int)model->T);
  for (t = 0; t < model->T; ++t) {
    const char *differs = moe__task_difference(&file->task[t], &model->tasks[t]);
    if (differs)
      return moe__fail(env, MOE_E_FORMAT,
                       "task %d: '%s' of the checkpoint and '%s' of the model differ: %s", (int)t,
                       file->task[t].name, model->tasks[t].name, differs);
  }
  return MOE_OK;
}

/* Largest number of steps or rows that a file may hold; it leaves room to count on. */
#define MOE__MOST ((int64_t)1 << 62)

/* Reads (T) counts into out, and compares them with `same`; either may be NULL. */
static int moe__counts_read(moe__json *j, int64_t *out, const int64_t *same, int32_t T) {
  int32_t n = 0;
  moe__json_enter(j, '[');
  while (moe__json_more(j, ']')) {
    int64_t v;
    if (n == T) return moe__json_fail(j, "the checkpoint has more tasks than the sampler");
    if (!moe__json_integer(j, 0, same ? INT64_MAX : MOE__MOST, &v)) return 0;
    if (same && same[n] != v)
      return moe__json_fail(j, "the number of rows of a task differs from the checkpoint's");
    if (out) out[n] = v;
    ++n;
  }
  if (j->error) return 0;
  return n == T ? 1 : moe__json_fail(j, "the checkpoint has fewer tasks than the sampler");
}

/* A setting of the sampler's, number k of moe__sampler_key; *same: it has the value of `config`. */
static int moe__sampler_setting(moe__json *j, int k, const moe_sampler_config *config, int *same) {
  moe__json_number number;
  int64_t v = 0;
  float tau = 0;
  int choice = 0, ok;
  switch (k) {
    case 0:
      ok = moe__json_choice(j, moe__sampling_name, 4, &choice);
      *same = choice == (int)config->sampling;
      break;
    case 1:
      ok = moe__json_float(j, &tau);
      *same = !(tau < config->tau || tau > config->tau);
      break;
    case 2:
      ok = moe__json_integer(j, INT32_MIN, INT32_MAX, &v);
      *same = v == config->in_order;
      break;
    case 3:
      ok = moe__json_read_number(j, &number);
      *same = ok && number.integer && !number.negative && number.magnitude == config->seed;
      break;
    case 4:
      ok = moe__json_integer(j, INT64_MIN, INT64_MAX, &v);
      *same = v == config->draws;
      break;
    default: /* a file without it means 0 */
      ok = moe__json_integer(j, 1, INT32_MAX, &v);
      *same = v == config->run;
  }
  return ok;
}

/* Reads the state of a sampler that must have the settings of *sampler, which receives the state if
   `apply` is set. */
static int moe__sampler_read(moe__json *j, moe_sampler *sampler, int apply) {
  enum { SETTINGS = 6, DRAWN = SETTINGS, ROWS, USED, KEYS };
  static const char *const keys[] = {"sampling", "tau",   "in_order", "seed", "draws",
                                     "run",      "drawn", "rows",     "used"};
  const unsigned all = (1u << KEYS) - 1, run = 1u << (SETTINGS - 1);
  unsigned seen = 0;
  moe__json_enter(j, '{');
  while (moe__json_more(j, '}')) {
    moe__json_text key;
    int64_t v = 0;
    int k = 0, ok, same = 1;
    if (!moe__json_key(j, &key)) return 0;
    while (k < KEYS && !moe__json_is(&key, keys[k])) ++k;
    if (k == KEYS) return moe__json_fail(j, "unknown member of the sampler");
    if (seen >> k & 1) return moe__json_fail(j, "a member of the sampler is listed twice");
    seen |= 1u << k;
    if (k < SETTINGS) {
      ok = moe__sampler_setting(j, k, &sampler->config, &same);
    } else if (k == DRAWN) {
      ok = moe__json_integer(j, 0, MOE__MOST, &v);
      if (ok && apply) sampler->drawn = v;
    } else {
      ok = moe__counts_read(j, k == USED && apply ? sampler->used : NULL,
                            k == ROWS ? sampler->rows : NULL, sampler->T);
    }
    if (!ok) return 0;
    if (!same)
      return moe__json_fail(j, "the sampler's settings (sampling, tau, in_order, seed, draws, run) "
                               "differ from the checkpoint's");
  }
  if (j->error) return 0;
  if (!sampler->config.run) seen |= run;
  return seen == all ? 1 : moe__json_fail(j, "a member of the sampler is missing");
}

/* The trainer's state in moe.checkpoint, and the caller's note. */
typedef struct moe__progress {
  int64_t step;
  float lr; /* set by moe_trainer_set_lr; -1: none is set (files of v0.1 never have one) */
  moe__json_text note;
  int has_note;
} moe__progress;

static void moe__progress_lr(moe__json *j, float *lr) {
  if (moe__json_float(j, lr) && !moe__within(*lr, 0, MOE__HUGE))
    moe__json_fail(j, "lr is out of range, expected 0 to 1e30");
}

/* Reads moe.checkpoint. sampler may be NULL: its state is skipped. */
static moe_status moe__progress_read(const moe__st *st, moe__progress *p, moe_sampler *sampler,
                                     int apply, const moe_env *env) {
  enum { STEP, LR, NOTE, SAMPLER, KEYS };
  static const char *const keys[] = {"step", "lr", "note", "sampler"};
  moe__json j;
  unsigned seen = 0;
  moe_status status = moe__st_text(st, "moe.checkpoint", &j, NULL);
  if (status)
    return moe__fail(
        env, status,
        "not a checkpoint: expected \"moe.checkpoint\" once in the metadata (is it a model file?)");
  p->lr = -1;
  moe__json_enter(&j, '{');
  while (moe__json_more(&j, '}')) {
    moe__json_text key;
    int k = 0;
    if (!moe__json_key(&j, &key)) break;
    while (k < KEYS && !moe__json_is(&key, keys[k])) ++k;
    if (k == KEYS || seen >> k & 1) {
      moe__json_fail(&j, k == KEYS ? "unknown member" : "a member is listed twice");
      break;
    }
    seen |= 1u << k;
    if (k == STEP)
      moe__json_integer(&j, 0, MOE__MOST, &p->step);
    else if (k == LR)
      moe__progress_lr(&j, &p->lr);
    else if (k == NOTE)
      moe__json_string(&j, &p->note);
    else if (sampler)
      moe__sampler_read(&j, sampler, apply);
    else
      moe__json_skip(&j);
  }
  moe__json_finish(&j);
  if (!j.error && !(seen >> STEP & 1)) moe__json_fail(&j, "step is missing");
  if (!j.error && sampler && !(seen >> SAMPLER & 1))
    moe__json_fail(&j, "the checkpoint was written without a sampler");
  p->has_note = (int)(seen >> NOTE & 1);
  return j.error ? moe__fail(env, MOE_E_FORMAT, "moe.checkpoint: %s", j.error) : MOE_OK;
}

/* Runs every check that can fail, before anything is changed. */
static moe_status moe__checkpoint_check(const moe__header *header, const moe_model *model,
                                        const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe__tasks tasks;
  void *scratch;
  const char *vocab;
  size_t vocab_bytes;
  int i;
  moe_status status = moe__same_config(&header->config, &model->config, env);
  if (status) return status;
  moe__tasks_carve(&layout, &tasks, header);
  scratch = layout.bad ? NULL : moe__alloc(layout.used);
  if (!scratch) return moe__fail(env, MOE_E_MEMORY, "no memory for %zu tasks", header->T);
  layout.base = (unsigned char *)scratch;
  layout.used = 0;
  moe__tasks_carve(&layout, &tasks, header);
  status = moe__tasks_read(header, &tasks, env);
  if (!status && (!tasks.pruned != !model->config.pruned ||
                  (tasks.pruned &&
                   memcmp(tasks.pruned, model->config.pruned, moe__pruned_cells(&model->config)))))
    status =
        moe__fail(env, MOE_E_FORMAT, "the checkpoint and the model differ in their pruned experts");
  if (!status) status = moe__same_tasks(&tasks, model, env);
  moe__release(scratch);
  if (!status) status = moe__vocab_find(&vocab, &vocab_bytes, &header->st, env);
  if (!status && (vocab_bytes != model->vocab_bytes ||
                  (vocab_bytes && memcmp(vocab, model->vocab, vocab_bytes))))
    status =
        moe__fail(env, MOE_E_FORMAT,
                  "the checkpoint's vocabulary (%zu bytes) differs from the model's (%zu bytes)",
                  vocab_bytes, model->vocab_bytes);
  if (!status) status = moe__tensors_load(NULL, NULL, &header->st, model, "", env);
  for (i = 0; i < 2 && !status; ++i)
    status = moe__tensors_load(NULL, NULL, &header->st, model, moe__moment_prefix[i], env);
  return status;
}

/* From the copy to where the trainer has them, and on a device the weights too. */
static moe_status moe__moments_give(moe_trainer *trainer, float *const *moments) {
  const moe_env *on = &trainer->context->device.env;
  size_t bytes = trainer->owned * sizeof(float);
  moe_status status;
  if (!on->backend) {
    memmove(trainer->m, moments[0] + trainer->first, bytes);
    memmove(trainer->v, moments[1] + trainer->first, bytes);
    return MOE_OK;
  }
  status = on->backend->upload(on->backend, on, trainer->m, moments[0], 2 * bytes);
  return status ? status : moe__model_upload(trainer->model, on);
}

MOE_API moe_status moe_checkpoint_read(moe_trainer *trainer, moe_sampler *sampler, const void *file,
                                       size_t bytes, const moe_env *env) {
  moe__header header;
  moe_model *model = trainer->model;
  moe__progress progress;
  float *moments[2];
  moe_status status = moe__header_read(&header, file, bytes, 0, env);
  if (!status) status = moe__progress_read(&header.st, &progress, sampler, 0, env);
  if (!status) status = moe__checkpoint_check(&header, model, env);
  if (status) return status;
  status = moe__moments_take(moments, trainer, env);
  if (status) return status;
  moe__progress_read(&header.st, &progress, sampler, 1, env);
  trainer->step = progress.step;
  trainer->lr = progress.lr;
  moe__tensors_copy(model->writable, &header.st, model, "");
  moe__tensors_copy(moments[0], &header.st, model, moe__moment_prefix[0]);
  moe__tensors_copy(moments[1], &header.st, model, moe__moment_prefix[1]);
  moe__trainer_clear(trainer);
  status = moe__moments_give(trainer, moments);
  moe__moments_drop(moments, trainer);
  if (model->panels && !trainer->ops) moe__model_repack(model, env);
  return status;
}

MOE_API moe_status moe_checkpoint_note(char *text, size_t capacity, size_t *length,
                                       const void *file, size_t bytes, const moe_env *env) {
  moe__st st;
  moe__progress progress;
  moe_status status = moe__st_open(&st, file, bytes, env);
  if (!status) status = moe__progress_read(&st, &progress, NULL, 0, env);
  if (status) return status;
  if (progress.has_note)
    *length = moe__json_copy(text, capacity, &progress.note);
  else {
    *length = 0;
    if (capacity) *text = 0;
  }
  return MOE_OK;
}

#ifndef MOE_NO_STDIO
static moe_status moe__checkpoint_write_to(void *user, const moe_writer *writer,
                                           const moe_env *env) {
  const moe__state *state = (const moe__state *)user;
  return moe_checkpoint_write(state->trainer, state->sampler, state->note, writer, env);
}

MOE_API moe_status moe_checkpoint_save(const moe_trainer *trainer, const moe_sampler *sampler,
                                       const char *note, const char *path, const moe_env *env) {
  moe__state state;
  state.trainer = trainer;
  state.sampler = sampler;
  state.note = note;
  return moe_file_replace(path, moe__checkpoint_write_to, &state, env);
}

MOE_API moe_status moe_checkpoint_load(moe_trainer *trainer, moe_sampler *sampler, const char *path,
                                       const moe_env *env) {
  moe__named named;
  void *file;
  size_t bytes;
  moe_status status = moe_file_read(&file, &bytes, path, env);
  if (status) return status;
  status = moe_checkpoint_read(trainer, sampler, file, bytes, moe__name_env(&named, path, env));
  moe_free(file);
  return status;
}
#endif
#endif /* MOE_NO_TRAIN */

/* ---- what becomes of characters before words are cut ---- >>unicode
   BERT's tokens, exact to the id with Hugging Face `tokenizers` (BertNormalizer, BertPreTokenizer,
   WordPiece). A text is
     1. decoded from UTF-8; each maximal part of a damaged sequence becomes one U+FFFD, as the
        Unicode standard recommends;
     2. searched for special tokens written out, such as [MASK], and other added tokens, which stay
        whole;
     3. cleaned: control, format and private-use characters are dropped, white space becomes a
        blank, ideographs get blanks around them;
     4. (where accents are stripped) decomposed (NFD, marks in canonical order) and stripped of
        non-spacing marks, then (uncased) lower-cased, and searched for added tokens that are
        normalised too;
     5. split at blanks and around every punctuation character;
     6. (>>text) cut, word by word, into the longest pieces of the vocabulary; a word of more than
        100 characters, or with a part that is not a piece, is one [UNK].
   The text is read as a stream: memory does not grow with it. */
#ifndef MOE_NO_TEXT

/* What the tables say of a character: its class (below), and what it becomes in step 4.
   moe__text_classes lists runs of code points: distance of the first from that of the run before,
   then (length - 1) * MOE__TEXT_KINDS + class. moe__text_strips (without accents) and
   moe__text_lowers (in lower case) list runs as well: distance, then (length - 1) * 4 + kind of
   mapping, then for MOE__FOLD_CONST (all map to one target) and
   MOE__FOLD_SLOPE (consecutive targets) the target of the first minus the first, as a signed
   number. In a run of MOE__FOLD_PAIRS every second code point, from the first on, maps to its
   successor; the targets of MOE__FOLD_LIST are in moe__text_ideographs, three digits each. A code
   point with several targets has as many runs. moe__text_words lists where runs of characters of
   a word, in the sense of single_word, begin and end: each as its distance from the one before.
   A number is written in digits of 5 bits, lowest first, 32 added to all but the last; signed:
   twice the value, or -1 - 2 * value. Digits are 0-9, A-Z, a-z, + and -. Hangul syllables are
   computed. */
enum {
  MOE__TEXT_LETTER, /* everything else */
  MOE__TEXT_DROP,   /* dropped */
  MOE__TEXT_BLANK,
  MOE__TEXT_PUNCTUATION,
  MOE__TEXT_IDEOGRAPH,
  MOE__TEXT_STRIP,         /* non-spacing mark: sorted among other marks, then stripped */
  MOE__TEXT_STRIP_STARTER, /* the same of combining class 0: marks are not sorted across it */
  MOE__TEXT_MARK,          /* to MOE__TEXT_KINDS - 1: a mark that is sorted and kept, by the rank of
                              its combining class */
  MOE__TEXT_SPECIAL = 16,  /* not a class: a special or added token */
  MOE__TEXT_END            /* not a class: the end of the text */
};
enum { MOE__FOLD_CONST, MOE__FOLD_SLOPE, MOE__FOLD_PAIRS, MOE__FOLD_LIST };

/* tables made by tests/golden/unicode.py: do not edit */
/* clang-format off */
enum { MOE__TEXT_KINDS = 13 };
enum { MOE__TEXT_BOUNDS = 935, MOE__TEXT_STRIPS = 829, MOE__TEXT_LOWERS = 188 };
static const char moe__text_classes[] =
  "0f39F2E221+6I21v5Pn2X1a2W1g14XDX12136343219G5343XIxVl261uCk1393y7v1t6a2l1G8XIj1315131I231I2315"
  "i1GDY29G3G4d4B3112Gj1f8Vg165a332p2712c28I3i1Mi5F125VtAs3e4b2j3CTVi15j3AV4v17v5f1V53s3r5FnBTW1w"
  "16255X3C54i14W1DJ2GC3H6x155j1C5LJVJx155J6J4J2546VJ56CJx155w16J65LJE3H6x15362j1C596CJW16+16D5p1"
  "6+1W18W14W1358IDJV6x1536766615LJV6W2j1C5LJe358W146U3z163j14VF61i14W133BGt263j14I3JDi14Ju1v5G34"
  "IT525251g1t1v15j14i1462v1531I7e4CjEj15At19Gq2j15w1552I4JDa2EJ6W1Jj1H63J85G6+23YJV3h3W53jJGJ2RG"
  "m2Td1J25UJ251GTJW1JY2J3q2F63k395161T4T55Z1b4BW131x45t3W17JB67VBGp6I463Gu162q285263X3EJ2W3A5X1n"
  "28a28k5m2j1q152w1666628Mn2Hj3LJY1j16J28151Jw152J562W13LAg1m1X3A6154t1Z2GY2+2GV331X5Ep2B5754Ie6"
  "sLx1C1i1aGa4Br15k9OF2r1521w7L-4Eo4C21r16s3NGGGZ2X5H54q4ZHg1X1G-X1i5z2GX1u3zCq8r2g1a1GpNVAg15Go"
  "33F5X3uCW1vIm1j7mE21T7u3Co4Mi14N23D3y2I73x23bOtrp2Wm6tlg8+tLGl8TY35431w3A3W1Io2I2a2m864556QJl2"
  "g1m25AGIY7OT43g1w15V3GPe4C8C3X1W1p153j166481-4TG76a2d28J4JE696Gg1W16q152V5I7I35TGEJ4G65l763633"
  "25pWDqdn2We6tl6+G5WHGY6f6Gu3Ge6GzDa1i5F3532Gr412T4a27g1EG5GST43S3232n2w4R41Z8Tz75Z75s4v1f13n13"
  "-C3eN3e63W13Y6W14J76151615f1V75Hh3l13c3IBn2f2n2W3g1eZ16t1l5E51n2u151Jp1j16I2G211g1Y2Vd1w16d26I"
  "Dg1p151GCJs1k3A85t1551J23E32To2W1561815161a2n33s164d26INJy1546D8Pp2Av1o6847j3d2765J3I43i7j1AJ3"
  "I2X9RJt2X3A625161Tg36263d26815c3W15j15j145HTZe18nX2t1+lHGY4v153x1p27t1D3hY1j1keJ615131e1bc5M2V"
  "6B1z15y28W3Ap2b1i1u4V+z1aMx1ZKw16F63t1Kw16y5-g1w28y6Jw28P3W2gb2p2q3j267sr5tg+GWuf1tqt1Wn4dYc2W"
  "tFty6XWYM1Vqc1W7fX3Wu-1w+-PWWW2w+-P";
static const char moe__text_strips[] =
  "W6Kz771d81Cb84Cb855b82Cd86Cd841d83Kz771d81Cb84Cb855b82Cd86Cd841d821h811zB11-911XC11ZA11bC11dA1"
  "1bC11dA11fC11hA11jC11lA11nC11pA11pC11rA31vC11xA11zC11-A11XD11ZB11bD11dB11fD11hB11fD11hB11jD11l"
  "B11nD11pB11rD11tB11tD11vB31zD11-B11XE11ZC11bE11dC11fE11hC11jE41pE11rC11rE11tC21vE11xC11zE11-C1"
  "1XF11ZD51fF11hD11jF11lD11nF11pD41vF11xD11zF11-D11XG11ZE31ZG11bE11dG11fE11hG11jE11jG11lE11nG11p"
  "E11rG11tE11vG11xE11xG11zE11-G11XF31bH11dF11fH11hF11jH11lF11nH11pF11rH11tF11vH11xF11vH11xF11vH1"
  "1xF15zH21-F11XI11ZG11bI11dGY11XL11ZJE1pL11rJT1tO11vM11hO11jM11ZO11bM11xN11zL11-N11XM11ZO11bM11"
  "dO11fM11hO11jM21vP11xN11zP11-N11tH11vF31zP11-N11vP11xN11rP11tN11vP11xN11j311cA11hO41vQ11xO31pQ"
  "11rO11nR11pP11hJ11jH11hI11jG11zR11-P11XS11ZQ11zR11-P11XS11ZQ11zR11-P11XS11ZQ11vR11xP11zR11-P11"
  "xR11zP11-R11XQ11zR11-P11XS11ZQ11fS11hQ11hS11jQ31hT11jR71fU11hS11bU11dS11rT11tR11vT11xR11zT11-R"
  "11XU11ZS11nT11pRXA1rBA1bq171vj111M11-i111Q11S11U21c121k111q111o2Q1X111B11A11G11I11K11g1Q1X111B"
  "11P11F119541j14g131W141151S11M11g1B11W111N4r131-141151Z211f211r1O53h21rA11t8E1-B11XA11ZC11bA31"
  "XC11ZA35321hC11jA11jC11lA31pC11rA11tC11vA11lC11nA35321zB11-911rC11tA11vC11xA11zC11-A11vC11xA31"
  "vC11xAf94A21e211411e2w41g1211H11sI11811311a19b431z315r321b311-2i30700P10900MG5r331-2q211314Z15"
  "b421z331b3g71130700P10900MG5r3u10300c4s10700N10700P10B00Mq71g175S31F10H00K-30700N10700P10B00Mk"
  "41120500P10700R109002bB11A11511511511D1n2z511Wt20100+220100w220100s220100o220100k240100c2f11B2"
  "1F30300L10300N21RzL1zxE11-vE11-xE11XwE11ZyE11bwE11dyE11fwE11fyE11hwE11hyE11jwE11lyE11nwE11pyE1"
  "1rwE11tyE11vwE11xyE11zwE11zyE11-wE11XzE11ZxE11bzE11dxE11fzE11hxE11jzE11lxE11lzE11nxE11nzE11pxE"
  "11pzE11rxE11tzE11vxE11xzE11zxE11-zE11XyE11Z+E11byE11b+E11dyE11f+E11hyE11f+E11hyE11j+E11lyE11n+"
  "E11pyE11p+E11ryE11t+E11vyE11x+E11zyE11-+E11XzE11X-E11ZzE11b-E11dzE11f-E11hzE11h-E11jzE11l-E11n"
  "zE11p-E11rzE11t-E11vzE11v-E11xzE11z-E11-zE11XWF11Z+E11bWF11d+E11dWF11f+E11hWF11j+E11hWF11j+E11"
  "lWF11n+E11pWF11r+E11tWF11v+E11vWF11x+E11zWF11-+E11XXF11Z-E11bXF11d-E11fXF11h-E11hXF11j-E11lXF1"
  "1n-E11pXF11r-E11tXF11v-E11vXF11x-E11zXF11--E11XYF11ZWF11bYF11dWF11fYF11hWF11hYF11jWF11lYF11nWF"
  "11nYF11pWF11rYF11tWF11vYF11xWF11zYF11-WF11XZF11ZXF11ZZF11bXF11dZF11fXF11fZF11hXF11hZF11jXF11lZ"
  "F11nXF11pZF11rXF11xYF11bYF11XYF11-XF21tnE51zbF11-ZF11XcF11ZaF11bcF11daF11fcF11haF11jcF11laF11n"
  "cF11paF11rcF11taF11vcF11xaF11zcF11-aF11XdF11ZbF11bdF11dbF11fdF11hbF11bdF11dbF11fdF11hbF11jdF11"
  "lbF11ndF11pbF11rdF11tbF11vdF11xbF11zdF11-bF11XeF11ZcF11zdF11-bF11XeF11ZcF11vdF11xbF11zdF11-bF1"
  "1XeF11ZcF11beF11dcF11feF11hcF11jeF11lcF11neF11pcF11reF11tcF11veF11xcF11zeF11-cF11XfF11ZdF11bfF"
  "11ddF11zeF11-cF11XfF11ZdF11bfF11ddF11ffF11hdF11jfF11ldF11nfF11pdF11rfF11tdF11nfF11pdF11rfF11td"
  "F11vfF11xdF11zfF11-dF7SzqD8SjtD8KrrD8KbuD8SnsD8SXvD8SjtD8SzvD8KXuD8KnwD8SruD91dxD21hxD21lxD21p"
  "xD1SjvD8SzxD84zxD24vxD24vxD24vxD24nxD24fxD24bxD4SzyD8Sj-D8SnzD8SXWE8SjzD8Sz-D8Gz-D64fWE2GjYE61"
  "fWE31nnF18rWE44zWE24bZE28bZE38R3CjXE64vXE2CzZE58Y23CrXE44bYE24XYE2CbaE41raE14fqF21zuF38nYE44vY"
  "E24nbE28XbE31nqFf91vtE41zjG11pkGl31J11HJ1p1V1611C116r111511311O11211R19311313211N1bYH211B1-111"
  "ZZH11XZH15N45345385B453453a11J159217n15d625X58Dl3-15+j6pz12mh111211211211211211211211211211211"
  "211311211211741341341341341O1x4A11E11211211211211211211211211211211211311211211741341341341341"
  "O1x43DF711YWo1tX1m83233d1B323375l8c2dDj51dqw321vow3BCXqw348xrw33L-rw37H-rw361-rw325-rw335-rw33"
  "H-rw351htw311rtw311Ztw311psw3ig511211F1BWL0700P10900MlB1310500N209001y70300L10300NZzk10D00E10D"
  "00C10F00A00S10H00800S10J00600S10L00400S10N00200St20300h510300j510700l500z410700n500-410B00p500"
  "-410B00r500X5Wof2tZ2";
static const char moe__text_lowers[] =
  "X2b3W2-3v2W2OPW2e1w5m10jC00kT2I7w1Ho5k11n71I81aD1A41yC1225wC2231+411qC11sC1221wC11+C21cD11YD12"
  "41cD11gD21iD1I61qD1221qD3221qD1225oD2A41sD12428443443443w1HY2J443221X611l31w4e11Z82Y2O1sYL1221"
  "bA11mYL3221bC11g411k41Y1g9A6291e771i229g241W425+33X2W2IX1W2i11G9w2S1t33221D1239Z83z1W5Gz3W2m2Y"
  "4g1o6s11U1o1FwBX3r4W3lx2r4WcEd11WcE61WcEpMz9Wzh2m2LGva227f5-x5j19-x5ZAoI+41zxE2wBe3TFGLFGTFGTF"
  "GLFH1F21F21F21F9TFW1TFGTFGTFG5F25p421HCDh541HC5F25d6E5F25-621DC5-725x721Hg91vrE41zhG11haG71u1k"
  "1z1W1Z12pPb3q1gw1z5W3W3221j-K11hk711j+K3I61tXL11v-K11zXL11xXL223295zZL2gCh3A72kgUo5W2g3Y5o1Go7"
  "d2A41dWb21Y1D221loo23A6g2K1dqo211zqo211rqo211Xqo211dqo221Zno211poo211fno211Ww11w1G1-211bqo211l"
  "Zb21A41jso21w1G1Xap2P2ivLb3W2-c1z4m2m5j4m2W6f1k2Cv1k2GPk285k2it1f6W4m6r2W2mw2z3W2WjLz3W2W3X3s1"
  "WpUb4a2";
static const char moe__text_ideographs[] =
  "8n86Rq8xA8p86xH4uo5Fb9+S9+S5bH97H5M75b867s7Pf7+58O-8Uw8Zu92F6e26qR73P7FU8Gz95g9dn4w25Dr6i478R8"
  "Oj9uU5rG6-h8ND8ba6B987O8WV5xA6SN6rg7By93E4+656t5BU6J46hJ78G7Rd8018O68PS8tl9So9jl9tw7YC7b-7sW8F"
  "99C49v-8hM5ZV5y47nW81+79Y7ZA8p29Rt5ZO5nY6eJ6tQ6yF7ql7ut9PB5BI82B57S57C7eS7s+8Fn9Pr8k06BF6e28h+"
  "4uv5ld60I7E77Lm5CN7Zx4+-5+f4uD6pC6Lu7qY5F35XU7S18H98gg6kw8+m6o86B+8Bb6EW7Lb4wk55f5796Y17pd89l8"
  "hI97F5Br5H25bp5xi6N56-+7ag9Mj9fg9wN9xE5AR6R66jt8zY5vq66G6806IQ6yZ7597I97dA7tq81l8yc8Jk90Z9DA58"
  "N5AZ5Iz7388Z28gg5x95-r6Dx6kk7m+7Dr4xa5Rv5ld5sw60S7Eo7Hf7+Q81698q9Rs9T89WO4+B7ck96q9Qu63X4w653Q"
  "5lk5m-6MP6e277E7P28Jy91y9+D6Q89Ok5A96Tx6Vp6r16wS7G97LP7Xh7qG9XU55j68k9Pu50h5qP6tg8yg5+B6546WN7"
  "E79Q658f5GF5nb6OJ6TE6Ye6pb7G67NY7zv8ZF8ZX97C9RY5C-6ww5GT77G7IO8Nw9QZ9nN9wV6UN6tB87e7hB7iW7oI7B"
  "072P8jO4x08Cs58w5875wc6BJ7pM5k56qU6Qq8yx8XC9PD8cB5xJ5505N05XQ6Pq57U7Cg7RA7ay7bU7bb7cF9TM7o+7+z"
  "8OI8hu90u93z9Zl9Zy9ae9sq93U9Qt4+k53d55D5B95Ba5DH5MT5O65Pe5X05Ye5na5nk62K65e66E67o6LF6NY6QH6Y56"
  "rt6uQ6yY75k78h7GY7YH7a+7b97b87bG7bM7bT7cD7cE7f07g17l07tq7u97v17zo80587j89v89v8HN8aG8cM8i18iv8p"
  "J8q88+s90u9RZ9V-9Wx61raBk88O4uc56r55e4+05555605B75Bw5MT5LL5MP5NY5XQ5Yp5b45bK5fY5ie5xI5xP5zf5+j"
  "63O65E64866E65W67o68q6F46GS6HI6LM6Pq6SN6SR6TM6jv6kw6r16xR6xB6yY70U75k7Ud78r7Al7Cg7Hn7K67Kx7OT7"
  "OV7RA7RR7Rq7TA7T07ZC7gn7l07nx7rR7tq7y+8058DI8Fl8Tv8b18c68cM8g-8hu8hB8i18h+8hj8iv8kA8q88yu91o96"
  "P99s9Py9RZ9TM9VR9V-9WB9Wx9iI9+SYXAYX4ZFL3kT40O40vb99bpGdxJ9z39+E4uz4uu4v1W4Y4zW4+k4+x50251w52P"
  "53d53F3IUWOw55D55K55a55tWKS3Iv55d56DWLB56N56a4xC56i56rf7V57r5833JV58x59659o59t3KL5B75B95Ba5Bw5"
  "C55C65CN5D95DH5DQ5Dp5Dz5D-5D-5D-Wei71m5FA5FVWjZ5Fh5Fn5G65IU5Gu5H85He5IY5Js5KG5LJ5LZ5M45M45MP5M"
  "h5Mp5N25SM5O65SN5PH5Pq5875Zk5VE5Vq5WD5UB5Wo5Wn5YiXJa5Zo5Zt5a65aQ5aY5bYXQeXRg5di5eR5ed5dO5fc3Rk"
  "3Ry5i85i+5i+Xd85l35lO5ld5lpXiO5l-5m65zJ5mY3U15nW5nk5p05oDXta5r3Xtc5rk5rh5ry5tX5tY3Wl5tz5ue5uz5"
  "vf3XYY633Xy5wm5wp5ws5xAgEI5x+YCnYCn8815yY5yY3Z7ZAuc7Q5zY5zh3ZZ5+Q5-D5-N5-v6213aw3aS62KYRK63765"
  "865C65E65C65w66E66o66a66l67U67o67s68G68R69T6An6BK6DGYiC6Cz6By6De6E36FaYln6GY6F56Ef3ek6Hf6H+6IT"
  "6Ht3fi6LF6LiZ0A6NZ6Ru6P93iP6QH3i83ha56I56L6S06QS82j4FP6SN6SR6SX6TU6TJZF33j96Vw6U56XI6Y5ZHj6YE6"
  "WV6aK3kT6b26cZ6dg6geZQZ6hR3mO6iXZYd6jK3nE6jo6kV6kw6kxZgDXqBZhw6nEZoy6o-6pD6nd6qM6q+6rt6r16rf6r"
  "u6s5ZqU6qq6ul6vk3qp6xB6x7ZxH6tv6zkZzUZ+E6-670v70U70R3sM71A71z71t72jWKb755a9Z76SaEh78e78r79GaO8"
  "7A07ALaSraWK7Dw7EB3wi7Eb3wu3wu7H77HS7Hn7I57JA3yR7Kaams7K+aoI7LmY6V7OGa+Xa+ub143-y4087Rqb3pb3ob"
  "4Pb4p7SU7SV7SV7TA40v7UB41642MbGT7XE7YC7ZC43ZbOc7bMbQQbR57cF7dh44l7f07fA7fFbbybgdbgd7hk482bkh7l"
  "67l948dbo07pI4AW7pe7pZ7q0b+67rZ4C17t77u27v54Cqc8ec974DPcBP7zwcC+7+L7-w805cJQcKZ81WcMe81mZDV4FL"
  "82o8434GB84+5grcUdcUrZEJZES8818848+U4Hh8AH8AB8AT5Ap8An8Ap8Az8Bcciy8Bb8CT8DZ8Ej8CZ8Ez8Fd8HN8DJ8"
  "FA8FC8FScmscrhcpL4Kh8Jn8Jp8KMdFA8Lacyi4LT4LXc+nd3I4Lh8PG8PS8Pd8Pf8Qf8Q88SE8RY8Tv8Se8Th8U64NN8V"
  "X8W14Nv8XW8XZdPd8ZN8ZU4Or8Zw3IxdYkdbc4Q+4R78gW8hj8kA8nLdoe8oh8p18qR8rtdylWW48tB8sy8tmWZU8xK8yu"
  "eNIeNj92K93n94HeSk94R98u9BN9BO99y9Fv9GLelw9MB4cL9Mtert4dc9R35so9SZf55f8Q4fk4fs9VWfGA4gofIM9WB9"
  "WB9WffMs9ZY4ip9af9cd9d29d+4lEfim9iI9n09pz4pE4pj9rdg3E4pug45g8EgAH9wx4rM9xv9x+9y59yF9yM9yxgO0";
static const char moe__text_words[] =
  "m1A7Q411Ql11A1415N1V1gE4CE57111Hr31224116113111K1p21h41j51c1216f18j1111212118R44TB5g24c3182A1J"
  "21Gx12b3Es141212k1IS4B5O168h21X42A1J18222M1711342922248142152CA1112316422M17121212211542233174"
  "117GB319131M1712152A131321F42A971318222M1712152922237342152A11G216331432111232333C4533142161EA"
  "GD131N1G291314721321242AG418131N1A152913147262142A13CD131p1131554752AA6131I3O191127314611186A2"
  "2Dw15F1Ad1211151O111N2511171A24W11N26AB111114A1a14K1I1a191v1g26k22c111512h11jA142711142f1142X1"
  "142711142F1v1142Z223W1GGs2263iJ2H1Q5h23B7M9MBKCD1312Cq231422AX131B6v27h15c2AV1C4CAe125Bi14Q6Ac"
  "1S4-11T2B6AD18Vn1j23AH9Cq3Cu18A3n12B5h123G31d15sG262c126281111111V2r11711331734264D5317F2n12J1"
  "S1D1GDp1X1H1412A1135611111141B245541Hf1jPq1su1b769Cc111512u171FO97171717171717171W1l11rE3PF152"
  "54s222231w2145h11+2HW1m1GWGWk6W2jqLZ2k12j83SKp11A1p3b192d32Z2221118Ls141Jq1Cc2AA6O311n12a1CT3X"
  "2EB6V1t19E2A6N3f2O32G25A6262697171h11E6x3122A6azACN4n1ae8kB2g3c17C55C1D151112121i3X1hBIW22s1e1"
  "C4GGG32O3W151d4JA7Q411QBv236262623Z1C1Q1J121F2EY1x3b2r1e41Y4T3n1F1VW1DU5h15U2a14815g1+42A6a14a"
  "14e18q1CB1F17121B1F17123q1Ct99MA8O61g119b26211i112312NAN9VX2J12AMAQc2u162W241258131T2341W1T3TZ"
  "181UPs1AMAJDIk3f2t1p1Dp1De18A6c1351Nw7g11232G3t1X1A18X1VMg1LRN9d2VG9y171DP7A6r11A448a1219b2441"
  "D11Z1I1b164+1711141F1A7x15A6418222M1712151A22232161572735BA11211c11A11211418D2Th25A44Uc2118Ac5"
  "s129N6Y1X231BAc1v17A6KSR2F4A67v5x1b3g2L82128121U1229CAc282k12812R-1818g231If2d6X1FA691j119FAOU"
  "2M1Ef27121i13112198A66121b112167As9N9H1f135DBr21l2wSc3l3Ha6io2X3FmX1GMAxy35dIvr6w1cs1vH7V1A6l2"
  "1A6U25Bt194CA9L5JmDj13Ac6W2W4h24v17HW2212B2Eu-58sc1f1Adt8417121Z9F1T321E48iCae2h35D397A32nY4Ac"
  "Gk12N+G5368827U4q43xDr21d2122122241C11171X21428171S141511371qA2P1P1V1P1V1P1V1P1V1P182o1WGt14o1"
  "81E1M51FmY1V66r671H2712155+1X11m3j13E2A41XAVHw1sEg1s6h1bF714121F1b6B7f1i24Acb141R1211211A14111"
  "1614111111312112111111111121124171414111A1H53151HqJQ6Q6Qcp2AcW1Wtf1W1wX46+62Yq5Enf7FkJYj2+GYl1"
  "hw45WZ4mgtLm7";
/* clang-format on */
/* end of the tables */
enum { MOE__SPECIALS = 5 };

typedef struct moe__fold {
  int32_t first, last, target; /* of MOE__FOLD_LIST: index of the first target */
  int32_t kind;
} moe__fold;

/* A token that is searched for in a text, raw or normalised. */
typedef struct moe__added {
  const char *text;
  uint16_t length, single; /* single 1: not inside a word */
  int32_t id;
} moe__added;

struct moe_tokenizer {
  const char *vocab;
  uint32_t *start;  /* (words) where each word begins in vocab */
  uint16_t *length; /* (words) its bytes; 0: can never match */
  uint32_t *bucket; /* (mask + 2) the words of hash bucket b are entry[bucket[b]] to
                       entry[bucket[b + 1] - 1] */
  uint32_t *entry;  /* (words) id in the lower 24 bits, 8 bits of the hash above; a bucket is sorted
                       by length, bytes, and from the last line to the first */
  uint32_t *bounds; /* (MOE__TEXT_BOUNDS) first code point * 16 + class, up to the next */
  moe__fold *strips, *lowers; /* (MOE__TEXT_STRIPS), (MOE__TEXT_LOWERS) */
  moe__added *added[2];       /* raw, normalised; both sorted by their bytes */
  char *normal;               /* the text of those that are normalised */
  size_t normal_bytes;
  int32_t count[2];            /* of added */
  uint32_t mask;               /* number of buckets - 1, a power of two - 1 */
  int32_t words, longest;      /* longest: bytes of the longest word that can match */
  int32_t flags, strip, lower; /* moe_text_flags, and whether step 4 strips and lower-cases */
  int32_t owns_block;
  int32_t special[MOE__SPECIALS]; /* ids, -1: not in the vocabulary */
  uint8_t ascii[128];             /* classes */
  uint8_t begins[256];            /* 1: a token of added[0] begins with this byte */
};

/* [UNK], [CLS] and [SEP] must be in the vocabulary; the others are recognised in a text where they
   are. */
enum { MOE__UNK, MOE__CLS, MOE__SEP };
static const char *const moe__special_names[MOE__SPECIALS] = {"[UNK]", "[CLS]", "[SEP]", "[PAD]",
                                                              "[MASK]"};

/* Reads a number of a table. */
static int32_t moe__text_digit(char c) {
  if (c >= 'a') return c - 'a' + 36;
  if (c >= 'A') return c - 'A' + 10;
  if (c >= '0') return c - '0';
  return c == '+' ? 62 : 63;
}

static int32_t moe__text_number(const char **at) {
  int32_t value = 0, digit;
  int shift = 0;
  do {
    digit = moe__text_digit(*(*at)++);
    value |= (digit & 31) << shift;
    shift += 5;
  } while (digit & 32);
  return value;
}

static void moe__text_unpack_classes(uint32_t *bounds) {
  const char *at = moe__text_classes;
  int32_t first = 0, end = -1;
  while (*at) {
    int32_t info;
    first += moe__text_number(&at);
    info = moe__text_number(&at);
    if (end >= 0 && end != first) *bounds++ = (uint32_t)end << 4 | MOE__TEXT_LETTER;
    *bounds++ = (uint32_t)first << 4 | (uint32_t)(info % MOE__TEXT_KINDS);
    end = first + info / MOE__TEXT_KINDS + 1;
  }
  *bounds = (uint32_t)end << 4 | MOE__TEXT_LETTER;
}

/* Whether a character is one of a word: a letter, mark, digit or connector. Only asked about the
   neighbours of tokens that must not be inside a word, which is seldom: the table stays packed. */
static int moe__text_of_word(int32_t c) {
  const char *at = moe__text_words;
  int32_t bound = 0;
  int inside = 0;
  for (; *at; inside = !inside) {
    bound += moe__text_number(&at);
    if (c < bound) break;
  }
  return inside;
}

static void moe__text_unpack_folds(moe__fold *fold, const char *at) {
  int32_t first = 0, listed = 0;
  for (; *at; ++fold) {
    int32_t info, delta;
    first += moe__text_number(&at);
    info = moe__text_number(&at);
    fold->first = first;
    fold->last = first + info / 4;
    fold->kind = info % 4;
    fold->target = 0;
    if (fold->kind <= MOE__FOLD_SLOPE) {
      delta = moe__text_number(&at);
      fold->target = first + (delta & 1 ? -1 - delta / 2 : delta / 2);
    } else if (fold->kind == MOE__FOLD_LIST) {
      fold->target = listed;
      listed += info / 4 + 1;
    }
  }
}

/* Class of a code point: that of the last bound at or below it. The first bound is 0. */
static int moe__text_search(const uint32_t *bounds, int32_t c) {
  int32_t low = 0, high = MOE__TEXT_BOUNDS;
  while (high - low > 1) {
    int32_t middle = (low + high) / 2;
    if ((int32_t)(bounds[middle] >> 4) <= c)
      low = middle;
    else
      high = middle;
  }
  return (int)(bounds[low] & 15);
}

static int moe__text_class(const moe_tokenizer *t, int32_t c) {
  int kind = c < 128 ? t->ascii[c] : moe__text_search(t->bounds, c);
  if (kind == MOE__TEXT_IDEOGRAPH && t->flags & MOE_TEXT_WHOLE_IDEOGRAPHS) return MOE__TEXT_LETTER;
  return !t->strip && kind >= MOE__TEXT_STRIP ? MOE__TEXT_LETTER : kind;
}

/* What a character becomes by one of the tables: writes at most three code points and returns how
   many. */
static int moe__text_map(int32_t out[3], const moe__fold *folds, int32_t count, int32_t c) {
  int32_t low = 0, high = count;
  int n = 0;
  out[0] = c;
  while (low < high) { /* the first run that ends at c or later */
    int32_t middle = (low + high) / 2;
    if (folds[middle].last < c)
      low = middle + 1;
    else
      high = middle;
  }
  for (; low < count && folds[low].first <= c && n < 3; ++low) {
    const moe__fold *fold = folds + low;
    if (fold->kind == MOE__FOLD_CONST)
      out[n++] = fold->target;
    else if (fold->kind == MOE__FOLD_SLOPE)
      out[n++] = fold->target + (c - fold->first);
    else if (fold->kind == MOE__FOLD_PAIRS)
      out[n++] = c + ((c - fold->first) % 2 == 0);
    else {
      const char *digit = moe__text_ideographs + 3 * (fold->target + (c - fold->first));
      out[n++] = moe__text_digit(digit[0]) << 12 | moe__text_digit(digit[1]) << 6 |
                 moe__text_digit(digit[2]);
    }
  }
  return n ? n : 1;
}

/* What a character of a text becomes in step 4: writes at most three code points and returns how
   many. `kind` is its class. What is left of a stripped character has one code point in lower case
   for each (golden/unicode.py sees to that). */
static int moe__text_fold(const moe_tokenizer *t, int32_t out[3], int32_t c, int kind) {
  int n = 1, i;
  out[0] = c;
  if (c < 128) {
    if (t->lower && c >= 'A' && c <= 'Z') out[0] = c + 32;
    return 1;
  }
  if (t->strip) {
    if (kind == MOE__TEXT_STRIP || kind == MOE__TEXT_STRIP_STARTER) return 0;
    if (c >= 0xac00 && c < 0xac00 + 11172) {
      /* Unicode standard, 3.12: syllable = (lead * 21 + vowel) * 28 + tail */
      i = c - 0xac00;
      out[0] = 0x1100 + i / 588;
      out[1] = 0x1161 + i % 588 / 28;
      out[2] = 0x11a7 + i % 28;
      return i % 28 ? 3 : 2;
    }
    n = moe__text_map(out, t->strips, MOE__TEXT_STRIPS, c);
  }
  if (t->lower && n == 1) return moe__text_map(out, t->lowers, MOE__TEXT_LOWERS, out[0]);
  for (i = 0; i < n && t->lower; ++i) {
    int32_t small[3];
    moe__text_map(small, t->lowers, MOE__TEXT_LOWERS, out[i]);
    out[i] = small[0];
  }
  return n;
}

/* One code point of n > 0 bytes; returns the bytes it took. A damaged sequence gives U+FFFD and
   takes the bytes that could have begun a character, at least one. */
static size_t moe__utf8_read(int32_t *c, const unsigned char *s, size_t n) {
  int32_t low = 0x80, high = 0xbf, value;
  size_t more, i;
  if (s[0] < 0x80) {
    *c = s[0];
    return 1;
  }
  *c = 0xfffd;
  if (s[0] < 0xc2 || s[0] > 0xf4) return 1;
  more = s[0] < 0xe0 ? 1 : s[0] < 0xf0 ? 2 : 3;
  value = s[0] & (0x3f >> more);
  if (s[0] == 0xe0) low = 0xa0;  /* what would be too long a form, */
  if (s[0] == 0xed) high = 0x9f; /* a surrogate, */
  if (s[0] == 0xf0) low = 0x90;
  if (s[0] == 0xf4) high = 0x8f; /* or above U+10FFFF */
  for (i = 1; i <= more; ++i) {
    if (i >= n || s[i] < low || s[i] > high) return i;
    value = value << 6 | (s[i] & 0x3f);
    low = 0x80;
    high = 0xbf;
  }
  *c = value;
  return more + 1;
}

/* Writes a code point; returns its bytes, 1 .. 4. */
static size_t moe__utf8_write(unsigned char *s, int32_t c) {
  size_t more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3, i;
  for (i = more; i > 0; --i, c >>= 6) s[i] = (unsigned char)(0x80 | (c & 0x3f));
  s[0] = (unsigned char)(more ? (0xff00 >> (more + 1) & 0xff) | c : c);
  return more + 1;
}

/* ---- the characters of a text, and tokens that stay whole ---- >>reader
   Steps 1 to 4 as a stream of characters. */
typedef struct moe__reader {
  const moe_tokenizer *t;
  const unsigned char *s;
  size_t bytes, at, index; /* at: next byte; index: the number of its code point */
  int32_t c, ready[3]; /* the character found; what the last code point became and is still to be
                          given out */
  int count, next, raw_kind;
  size_t from, raw_at; /* number and first byte of the code point that c comes from */
  size_t begin, end;   /* of a token that stays whole: the code points that it stands for */
  int rank;            /* in a run of marks: the rank that this pass gives out; else 0 */
  size_t run_at, run_index, run_end;
  /* Where a token was refused because it is inside a word, no other begins: in its bytes of the raw
     text, or in the next `skip` characters of the normalised one, whose last one was `before` (0:
     none). */
  size_t refused[2], run_refused[2], skip;
  int32_t before;
} moe__reader;

/* Narrows a range of a sorted list, whose tokens begin with the same k bytes, to those whose next
   byte is c. */
static void moe__added_narrow(const moe__added *list, int32_t *low, int32_t *high, size_t k,
                              int c) {
  int32_t at[2];
  int i;
  for (i = 0; i < 2; ++i) { /* the first of c or more, the first of more than c */
    int32_t a = *low, b = *high;
    while (a < b) {
      int32_t middle = a + (b - a) / 2;
      int found = list[middle].length > k ? (unsigned char)list[middle].text[k] : -1;
      if (found < c + i)
        a = middle + 1;
      else
        b = middle;
    }
    at[i] = a;
  }
  *low = at[0];
  *high = at[1];
}

/* Whether characters of a word surround bytes of the text. */
static int moe__reader_in_word(const moe__reader *r, size_t begin, size_t end) {
  size_t at = begin;
  int32_t c;
  while (at && begin - at < 4 && (r->s[--at] & 0xc0) == 0x80) continue;
  if (at < begin && moe__utf8_read(&c, r->s + at, begin - at) == begin - at && moe__text_of_word(c))
    return 1;
  if (end == r->bytes) return 0;
  moe__utf8_read(&c, r->s + end, r->bytes - end);
  return moe__text_of_word(c);
}

/* The longest raw token that the bytes at `at` begin with, or NULL. */
static const moe__added *moe__reader_raw(moe__reader *r, size_t at) {
  const moe__added *list = r->t->added[0], *found = NULL;
  int32_t low = 0, high = r->t->count[0];
  size_t k;
  if (!r->t->begins[r->s[at]] || (at > r->refused[0] && at < r->refused[1])) return NULL;
  for (k = 0; at + k < r->bytes && low < high; ++k) {
    moe__added_narrow(list, &low, &high, k, r->s[at + k]);
    if (low < high && list[low].length == k + 1) found = &list[low];
  }
  if (!found || !found->single || !moe__reader_in_word(r, at, at + found->length)) return found;
  r->refused[0] = at;
  r->refused[1] = at + found->length;
  return NULL;
}

/* NFD sorts the marks between two starters by their combining class. A run with marks that are kept
   is read once for each rank, so it may have any length. This finds its end: the first code point
   that begins with a starter. */
static size_t moe__reader_run_end(moe__reader *r) {
  size_t at = r->at;
  while (at < r->bytes) {
    int32_t c, out[3];
    size_t taken = moe__utf8_read(&c, r->s + at, r->bytes - at);
    int kind = moe__text_class(r->t, c);
    if (kind == MOE__TEXT_BLANK || kind == MOE__TEXT_STRIP_STARTER || kind == MOE__TEXT_IDEOGRAPH)
      break;
    if (moe__reader_raw(r, at)) break;
    at += taken;
    if (kind == MOE__TEXT_DROP || !moe__text_fold(r->t, out, c, kind)) continue;
    if (moe__text_class(r->t, out[0]) < MOE__TEXT_MARK) return at - taken;
  }
  return at;
}

/* The class of the next character that the last code point became, -1 if there are no more. */
static int moe__reader_ready(moe__reader *r) {
  while (r->next < r->count) {
    int kind;
    r->c = r->ready[r->next++];
    kind = r->raw_kind == MOE__TEXT_IDEOGRAPH ? r->raw_kind : moe__text_class(r->t, r->c);
    if (!r->rank &&
        kind >= MOE__TEXT_MARK) { /* a run begins: read this code point again in each pass */
      memcpy(r->run_refused, r->refused, sizeof r->refused);
      r->run_end = moe__reader_run_end(r);
      memcpy(r->refused, r->run_refused, sizeof r->refused);
      r->run_at = r->raw_at;
      r->run_index = r->from;
      r->rank = 1;
      r->at = r->run_at;
      r->index = r->run_index;
      r->count = 0;
      return -1;
    }
    if (!r->rank || kind == MOE__TEXT_MARK + r->rank - 1)
      return kind < MOE__TEXT_MARK ? kind : MOE__TEXT_LETTER;
  }
  return -1;
}

/* The class of the next character (r->c, from code point r->from): letter, blank, punctuation or
   ideograph; or MOE__TEXT_SPECIAL (r->c: its id) or MOE__TEXT_END. */
static int moe__reader_character(moe__reader *r) {
  for (;;) {
    const moe__added *token;
    int kind = moe__reader_ready(r);
    if (kind >= 0) return kind;
    if (r->rank && r->at >= r->run_end) {
      if (++r->rank > (int)MOE__TEXT_KINDS - (int)MOE__TEXT_MARK) {
        r->rank = 0;
      } else {
        r->at = r->run_at;
        r->index = r->run_index;
        memcpy(r->refused, r->run_refused, sizeof r->refused);
      }
      continue;
    }
    if (r->at >= r->bytes) return MOE__TEXT_END;
    r->from = r->index;
    r->raw_at = r->at;
    token = moe__reader_raw(r, r->at);
    if (token) {
      r->begin = r->index;
      for (r->at += token->length; r->raw_at < r->at; ++r->raw_at)
        r->index += (r->s[r->raw_at] & 0xc0) != 0x80;
      r->end = r->index;
      r->c = token->id;
      return MOE__TEXT_SPECIAL;
    }
    r->at += moe__utf8_read(&r->c, r->s + r->at, r->bytes - r->at);
    ++r->index;
    r->raw_kind = moe__text_class(r->t, r->c);
    if (r->raw_kind == MOE__TEXT_DROP) continue;
    if (r->raw_kind == MOE__TEXT_BLANK) return MOE__TEXT_BLANK;
    r->count = moe__text_fold(r->t, r->ready, r->c, r->raw_kind);
    r->next = 0;
  }
}

/* What a character of that class is in the normalised text. */
static size_t moe__reader_write(unsigned char out[6], int kind, int32_t c) {
  size_t n = kind == MOE__TEXT_IDEOGRAPH || kind == MOE__TEXT_BLANK;
  out[0] = ' ';
  if (kind != MOE__TEXT_BLANK) n += moe__utf8_write(out + n, c);
  if (kind == MOE__TEXT_IDEOGRAPH) out[n++] = ' ';
  return n;
}

/* The last character of what moe__reader_write makes; 0: of nothing. */
static int32_t moe__reader_last(int kind, int32_t c) {
  if (kind >= MOE__TEXT_SPECIAL) return 0;
  return kind == MOE__TEXT_IDEOGRAPH || kind == MOE__TEXT_BLANK ? ' ' : c;
}

/* The longest added token of the normalised list that begins here, or NULL. *behind: the reader
   after it, and *characters: how many it has. */
static const moe__added *moe__reader_normal(const moe__reader *r, moe__reader *behind,
                                            size_t *characters) {
  const moe__added *list = r->t->added[1], *found = NULL;
  moe__reader ahead = *r;
  unsigned char s[6];
  int32_t low = 0, high = r->t->count[1];
  size_t k = 0, i, n, count, begin = SIZE_MAX, end = 0;
  for (count = 1; low < high; ++count) {
    int kind = moe__reader_character(&ahead);
    if (kind >= MOE__TEXT_SPECIAL) break;
    n = moe__reader_write(s, kind, ahead.c);
    for (i = 0; i < n; ++i, ++k) moe__added_narrow(list, &low, &high, k, s[i]);
    if (ahead.from < begin) begin = ahead.from;
    if (ahead.from >= end) end = ahead.from + 1;
    if (low == high || list[low].length != k) continue;
    found = &list[low];
    *characters = count;
    *behind = ahead;
    behind->begin = begin;
    behind->end = end;
    behind->before = moe__reader_last(kind, ahead.c);
    behind->c = found->id;
  }
  return found;
}

/* Whether characters of a word surround what lies between two readers. */
static int moe__reader_splits_word(const moe__reader *r, const moe__reader *behind) {
  moe__reader next = *behind;
  int kind;
  if (r->before && moe__text_of_word(r->before)) return 1;
  kind = moe__reader_character(&next);
  return (kind == MOE__TEXT_LETTER || kind == MOE__TEXT_PUNCTUATION) && moe__text_of_word(next.c);
}

/* The same after step 4: the longest added token of the normalised list that begins here, or the
   next character. */
static int moe__reader_next(moe__reader *r) {
  const moe__added *found = NULL;
  moe__reader behind;
  size_t characters = 0;
  int kind;
  if (!r->t->count[1]) return moe__reader_character(r);
  if (r->skip)
    --r->skip;
  else
    found = moe__reader_normal(r, &behind, &characters);
  if (found && (!found->single || !moe__reader_splits_word(r, &behind))) {
    *r = behind;
    return MOE__TEXT_SPECIAL;
  }
  if (found) r->skip = characters - 1;
  kind = moe__reader_character(r);
  r->before = moe__reader_last(kind, r->c);
  return kind;
}

/* ---- WordPiece ---- >>text
   Words are cut greedily, the longest piece first, by a hash table over the vocabulary. */

enum { MOE__WORD_CHARACTERS = 100 };

/* FNV-1a. A piece inside a word hashes as if written with its "##". Words of one hash are easily
   made, so one bucket may hold all words: it is sorted, and a search takes log2(words) steps. */
static uint32_t moe__piece_hash(uint32_t h, const unsigned char *s, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) h = (h ^ s[i]) * 16777619u;
  return h;
}

enum { MOE__ENTRY_ID = 0xffffff, MOE__ENTRY_TAG_SHIFT = 24, MOE__BUCKET_SCAN = 8 };
static const uint32_t moe__hash_seed = 2166136261u;

static uint32_t moe__piece_bucket(const moe_tokenizer *t, uint32_t h) {
  return (h ^ h >> 15) & t->mask;
}

/* The order of a bucket: below 0 where word `id` comes before prefix + s (n bytes), 0: equal. */
static int moe__piece_compare(const moe_tokenizer *t, uint32_t id, size_t prefix,
                              const unsigned char *s, size_t n) {
  const char *word = t->vocab + t->start[id];
  size_t length = t->length[id];
  int order;
  if (length != prefix + n) return length < prefix + n ? -1 : 1;
  order = memcmp(word, "##", prefix);
  return order ? order : memcmp(word + prefix, s, n);
}

/* The id of prefix + s (n bytes) whose hash is h, or -1. Of equal words the first entry counts: the
   last line. */
static int32_t moe__piece_find(const moe_tokenizer *t, uint32_t h, size_t prefix,
                               const unsigned char *s, size_t n) {
  uint32_t b = moe__piece_bucket(t, h), first = t->bucket[b], end = t->bucket[b + 1];
  while (end - first > MOE__BUCKET_SCAN) {
    uint32_t middle = first + (end - first) / 2;
    if (moe__piece_compare(t, t->entry[middle] & MOE__ENTRY_ID, prefix, s, n) < 0)
      first = middle + 1;
    else
      end = middle + 1;
  }
  for (; first < end; ++first) {
    uint32_t id = t->entry[first] & MOE__ENTRY_ID;
    if (t->entry[first] >> MOE__ENTRY_TAG_SHIFT != h >> MOE__ENTRY_TAG_SHIFT) continue;
    if (t->length[id] == prefix + n && !moe__piece_compare(t, id, prefix, s, n)) return (int32_t)id;
  }
  return -1;
}

/* Where tokens go. All are counted, those below `room` are written. */
typedef struct moe__sink {
  const moe_tokenizer *t;
  moe_tokens *out;
  size_t at, room, count; /* at: index in out of the first token */
  uint8_t segment;
} moe__sink;

static void moe__sink_put(moe__sink *sink, int32_t id, int32_t begin, int32_t end) {
  if (sink->count < sink->room) {
    size_t i = sink->at + sink->count;
    sink->out->ids[i] = id;
    if (sink->out->segments) sink->out->segments[i] = sink->segment;
    if (sink->out->begin) sink->out->begin[i] = begin;
    if (sink->out->end) sink->out->end[i] = end;
  }
  ++sink->count;
}

/* The word being read: characters as UTF-8, and the code points they come from. */
typedef struct moe__word {
  unsigned char text[4 * MOE__WORD_CHARACTERS];
  size_t byte[MOE__WORD_CHARACTERS + 1]; /* where each character begins, and the end */
  size_t from[MOE__WORD_CHARACTERS];
  size_t first, last; /* least and greatest code point of all characters, also beyond 100 */
  int count;          /* characters; at most 101 */
} moe__word;

static void moe__word_add(moe__word *w, int32_t c, size_t from) {
  if (!w->count || from < w->first) w->first = from;
  if (!w->count || from > w->last) w->last = from;
  if (w->count < MOE__WORD_CHARACTERS) {
    w->from[w->count] = from;
    w->byte[w->count + 1] = w->byte[w->count] + moe__utf8_write(w->text + w->byte[w->count], c);
  }
  if (w->count <= MOE__WORD_CHARACTERS) ++w->count;
}

/* The longest piece of the vocabulary at character i. Returns its id, or -1 if there is none, and
   sets *end to the character after it. */
static int32_t moe__word_piece(const moe_tokenizer *t, const moe__word *w, int i, int *end) {
  uint32_t hash[MOE__WORD_CHARACTERS + 1];
  size_t prefix = i ? 2 : 0, start = w->byte[i];
  int last = i;
  hash[i] = moe__piece_hash(moe__hash_seed, (const unsigned char *)"##", prefix);
  for (; last < w->count && w->byte[last + 1] - start + prefix <= (size_t)t->longest; ++last)
    hash[last + 1] =
        moe__piece_hash(hash[last], w->text + w->byte[last], w->byte[last + 1] - w->byte[last]);
  for (; last > i; --last) {
    int32_t id = moe__piece_find(t, hash[last], prefix, w->text + start, w->byte[last] - start);
    *end = last;
    if (id >= 0) return id;
  }
  return -1;
}

/* Step 6: adds the pieces of the word to the sink, then empties the word. */
static void moe__word_flush(moe__word *w, moe__sink *sink) {
  int32_t ids[MOE__WORD_CHARACTERS];
  int ends[MOE__WORD_CHARACTERS], i = 0, pieces = 0, k;
  if (!w->count) return;
  if (w->count <= MOE__WORD_CHARACTERS) {
    for (; i < w->count; i = ends[pieces++]) {
      ids[pieces] = moe__word_piece(sink->t, w, i, &ends[pieces]);
      if (ids[pieces] < 0) break;
    }
  }
  if (i < w->count) { /* too long, or with an unknown part */
    moe__sink_put(sink, sink->t->special[MOE__UNK], (int32_t)w->first, (int32_t)(w->last + 1));
  } else {
    for (i = 0, k = 0; k < pieces; ++k) {
      size_t first = w->from[i], last = first; /* sorted marks may have changed their order */
      for (; i < ends[k]; ++i) {
        if (w->from[i] < first) first = w->from[i];
        if (w->from[i] > last) last = w->from[i];
      }
      moe__sink_put(sink, ids[k], (int32_t)first, (int32_t)(last + 1));
    }
  }
  w->count = 0;
}

/* Puts the tokens of a text into the sink until `enough` are counted or the text ends. */
static void moe__text_tokens(moe__sink *sink, const char *s, size_t bytes, size_t enough) {
  moe__reader r;
  moe__word w;
  int kind = MOE__TEXT_BLANK;
  memset(&r, 0, sizeof r);
  r.t = sink->t;
  r.s = (const unsigned char *)s;
  r.bytes = bytes;
  w.count = 0;
  w.byte[0] = 0;
  w.first = w.last = 0;
  while (sink->count < enough && kind != MOE__TEXT_END) {
    kind = moe__reader_next(&r);
    if (kind == MOE__TEXT_LETTER) {
      moe__word_add(&w, r.c, r.from);
      continue;
    }
    moe__word_flush(&w, sink);
    if (kind == MOE__TEXT_SPECIAL) {
      moe__sink_put(sink, r.c, (int32_t)r.begin, (int32_t)r.end);
    } else if (kind == MOE__TEXT_PUNCTUATION || kind == MOE__TEXT_IDEOGRAPH) {
      moe__word_add(&w, r.c, r.from);
      moe__word_flush(&w, sink);
    }
  }
}

/* How many of na and nb tokens of two texts are kept if there is room for `room`. */
static void moe__text_cut(size_t *ka, size_t *kb, size_t na, size_t nb, size_t room,
                          moe_truncate how) {
  size_t shorter = na <= nb ? na : nb, keep = shorter;
  if (how == MOE_TRUNCATE_RIGHT || na + nb <= room) {
    *ka = na < room ? na : room;
    *kb = nb < room - *ka ? nb : room - *ka;
    return;
  }
  if (keep > room / 2) keep = room / 2;
  *ka = na <= nb ? keep : room - keep;
  *kb = room - *ka;
}

MOE_API moe_text moe_text_of(const char *a, const char *b) {
  moe_text text;
  text.a = a;
  text.b = b;
  text.a_bytes = a ? strlen(a) : 0;
  text.b_bytes = b ? strlen(b) : 0;
  return text;
}

static moe_status moe__encode_check(const moe_tokenizer *tokenizer, const moe_tokens *out,
                                    const moe_text *text, int32_t max_len, moe_truncate how,
                                    const moe_env *env) {
  int least = text && text->b ? 3 : 2;
  if (!tokenizer || !text || (!text->a && text->a_bytes) || !out || !out->ids)
    return moe__fail(env, MOE_E_ARGUMENT, "moe_encode: a pointer is NULL");
  if (how != MOE_TRUNCATE_LONGEST && how != MOE_TRUNCATE_RIGHT)
    return moe__fail(env, MOE_E_ARGUMENT, "moe_encode: unknown way to truncate (%d)", (int)how);
  if (max_len < least)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "moe_encode: max_len is %d, expected at least %d for the special tokens",
                     (int)max_len, least);
  if (out->capacity < max_len)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "moe_encode: capacity is %d, expected at least max_len, %d",
                     (int)out->capacity, (int)max_len);
  if ((out->begin || out->end) &&
      (text->a_bytes > INT32_MAX || (text->b && text->b_bytes > INT32_MAX)))
    return moe__fail(env, MOE_E_ARGUMENT,
                     "moe_encode: a text is too long, expected at most 2^31 - 1 bytes where begin "
                     "or end is given");
  return MOE_OK;
}

/* A special token at index `at`. */
static void moe__sink_special(moe__sink *sink, int which, size_t at) {
  sink->at = at;
  sink->room = 1;
  sink->count = 0;
  moe__sink_put(sink, sink->t->special[which], -1, -1);
}

MOE_API moe_status moe_encode(const moe_tokenizer *tokenizer, moe_tokens *out, const moe_text *text,
                              int32_t max_len, moe_truncate how, const moe_env *env) {
  const char *a, *b;
  size_t room, na, ka, kb = 0;
  moe__sink sink;
  moe_status status = moe__encode_check(tokenizer, out, text, max_len, how, env);
  if (status) return status;
  a = text->a, b = text->b;
  room = (size_t)max_len - (b ? 3 : 2);
  memset(&sink, 0, sizeof sink);
  sink.t = tokenizer;
  sink.out = out;
  moe__sink_special(&sink, MOE__CLS, 0);
  sink.at = 1;
  sink.room = room;
  sink.count = 0;
  /* Longest-first depends on both lengths, so a is read to its end; else only as far as needed. */
  moe__text_tokens(&sink, a, text->a_bytes, b && how == MOE_TRUNCATE_LONGEST ? SIZE_MAX : room);
  na = sink.count;
  ka = na < room ? na : room;
  if (b) {
    sink.segment = 1;
    sink.at = ka + 2;
    sink.room = room - ka;
    sink.count = 0;
    moe__text_tokens(&sink, b, text->b_bytes, how == MOE_TRUNCATE_LONGEST ? SIZE_MAX : sink.room);
    moe__text_cut(&ka, &kb, na, sink.count, room, how);
    if (ka + 2 != sink.at) { /* a is cut: b once more, at its right place */
      sink.at = ka + 2;
      sink.room = kb;
      sink.count = 0;
      moe__text_tokens(&sink, b, text->b_bytes, kb);
    }
    moe__sink_special(&sink, MOE__SEP, ka + 2 + kb);
    sink.segment = 0;
  }
  moe__sink_special(&sink, MOE__SEP, ka + 1);
  out->count = (int32_t)(ka + kb) + (b ? 3 : 2);
  return MOE_OK;
}

/* ---- its vocabulary, and tokens that are added ---- >>vocabulary */

/* Bytes of a line without trailing white space, which Hugging Face's reader strips, too. */
static size_t moe__vocab_trim(const uint32_t *bounds, const unsigned char *line, size_t n) {
  while (n) {
    size_t at = n - 1;
    int32_t c;
    while (at && n - at < 4 && (line[at] & 0xc0) == 0x80) --at;
    moe__utf8_read(&c, line + at, n - at);
    if (!(c >= 9 && c <= 13) && c != 0x85 && moe__text_search(bounds, c) != MOE__TEXT_BLANK) break;
    n = at;
  }
  return n;
}

/* Number of lines; the last one need not end in a line feed. Of those that may be added tokens
   their number and bytes. */
static size_t moe__vocab_lines(const char *vocab, size_t bytes, size_t *marked,
                               size_t *marked_bytes) {
  size_t i, lines = 0, begin = 0;
  int mark = 0;
  *marked = *marked_bytes = 0;
  for (i = 0; i < bytes; ++i) {
    if (vocab[i] == '+' && i && vocab[i - 1] == '\t') mark = 1;
    if (vocab[i] != '\n' && i + 1 < bytes) continue;
    if (mark) ++*marked, *marked_bytes += i + 1 - begin;
    ++lines;
    begin = i + 1;
    mark = 0;
  }
  return lines;
}

/* The layout of the block. Without layout->base only the size is counted, and *out becomes NULL. */
static moe_status moe__tokenizer_layout(moe_tokenizer **out, moe__layout *layout, const char *vocab,
                                        size_t bytes, const moe_env *env) {
  size_t lines, marked, marked_bytes, buckets = 16;
  moe_tokenizer *t;
  moe_tokenizer it;
  if (!vocab && bytes) return moe__fail(env, MOE_E_ARGUMENT, "vocabulary: the pointer is NULL");
#if SIZE_MAX > UINT32_MAX
  if (bytes > UINT32_MAX)
    return moe__fail(env, MOE_E_FORMAT, "vocabulary: %zu bytes, expected at most 4294967295",
                     bytes);
#endif
  lines = moe__vocab_lines(vocab, bytes, &marked, &marked_bytes);
  if (lines >= 0xffffff)
    return moe__fail(env, MOE_E_FORMAT, "vocabulary: %zu lines, expected at most 16777214", lines);
  while (buckets < lines) buckets *= 2;
  t = (moe_tokenizer *)moe__carve(layout, 1, sizeof *t);
  memset(&it, 0, sizeof it);
  it.start = (uint32_t *)moe__carve(layout, lines, sizeof *it.start);
  it.length = (uint16_t *)moe__carve(layout, lines, sizeof *it.length);
  it.bucket = (uint32_t *)moe__carve(layout, buckets + 1, sizeof *it.bucket);
  it.entry = (uint32_t *)moe__carve(layout, lines, sizeof *it.entry);
  it.bounds = (uint32_t *)moe__carve(layout, MOE__TEXT_BOUNDS, sizeof *it.bounds);
  it.strips = (moe__fold *)moe__carve(layout, MOE__TEXT_STRIPS, sizeof *it.strips);
  it.lowers = (moe__fold *)moe__carve(layout, MOE__TEXT_LOWERS, sizeof *it.lowers);
  it.added[0] = (moe__added *)moe__carve(layout, marked + MOE__SPECIALS, sizeof *it.added[0]);
  it.added[1] = (moe__added *)moe__carve(layout, marked, sizeof *it.added[1]);
  it.normal_bytes = 3 * marked_bytes;
  it.normal = (char *)moe__carve(layout, marked_bytes, 3);
  it.vocab = vocab;
  it.words = (int32_t)lines;
  it.mask = (uint32_t)(buckets - 1);
  if (layout->bad)
    return moe__fail(env, MOE_E_MEMORY,
                     "vocabulary: %zu lines exceed the address space of this machine", lines);
  if (t) *t = it;
  *out = t;
  return MOE_OK;
}

MOE_API moe_status moe_tokenizer_size(const char *vocab, size_t vocab_bytes, size_t *bytes,
                                      const moe_env *env) {
  moe__layout layout;
  moe_tokenizer *none;
  moe_status status;
  memset(&layout, 0, sizeof layout);
  status = moe__tokenizer_layout(&none, &layout, vocab, vocab_bytes, env);
  if (!status) *bytes = layout.used;
  return status;
}

/* Notes the added token that line `id` may be: of its *n bytes `line` the marks, a tab, "+" and
   letters (moe_text_flags), are cut off. *n becomes 0 where the token is not a word too. */
static moe_status moe__tokenizer_mark(moe_tokenizer *t, int32_t id, const char *line, size_t *n,
                                      const moe_env *env) {
  size_t at = *n, i;
  int normal = 0, word = 0, single = 0;
  moe__added *a;
  while (at && line[at - 1] != '\t') --at;
  if (!at || at == *n || line[at] != '+') return MOE_OK;
  for (i = at + 1; i < *n; ++i) {
    normal |= line[i] == 'n';
    word |= line[i] == 'w';
    single |= line[i] == 'o';
    if (!line[i] || !strchr("lnorsw", line[i]))
      return moe__fail(env, MOE_E_FORMAT,
                       "vocabulary: line %d has an unknown mark behind its tab: written by a newer "
                       "moe.h?",
                       (int)id + 1);
  }
  if (at < 2 || at - 1 > 4 * MOE__WORD_CHARACTERS + 2)
    return moe__fail(env, MOE_E_FORMAT,
                     "vocabulary: line %d is an added token of %zu bytes, expected 1 to %d",
                     (int)id + 1, at - 1, 4 * MOE__WORD_CHARACTERS + 2);
  a = &t->added[normal][t->count[normal]++];
  a->text = line;
  a->length = (uint16_t)(at - 1);
  a->single = (uint16_t)single;
  a->id = id;
  *n = word ? at - 1 : 0;
  return MOE_OK;
}

/* Finds the words, one a line. */
static moe_status moe__tokenizer_words(moe_tokenizer *t, size_t bytes, const moe_env *env) {
  const unsigned char *vocab = (const unsigned char *)t->vocab;
  size_t at = 0, next, n;
  int32_t id, c;
  for (id = 0; id < t->words; ++id, at = next + 1) {
    for (next = at; next < bytes && vocab[next] != '\n';) {
      size_t taken = moe__utf8_read(&c, vocab + next, bytes - next);
      if (c == 0xfffd && !(taken == 3 && vocab[next] == 0xef)) /* which is U+FFFD itself */
        return moe__fail(env, MOE_E_FORMAT, "vocabulary: line %d is not UTF-8", (int)id + 1);
      next += taken;
    }
    n = moe__vocab_trim(t->bounds, vocab + at, next - at);
    if (t->flags & MOE_TEXT_ADDED && moe__tokenizer_mark(t, id, (const char *)vocab + at, &n, env))
      return MOE_E_FORMAT;
    if (n > 4 * MOE__WORD_CHARACTERS + 2) n = 0; /* longer than any word: it can never match */
    t->start[id] = (uint32_t)at;
    t->length[id] = (uint16_t)n;
    if ((int32_t)n > t->longest) t->longest = (int32_t)n;
  }
  return MOE_OK;
}

static uint32_t moe__word_hash(const moe_tokenizer *t, int32_t id) {
  return moe__piece_hash(moe__hash_seed, (const unsigned char *)t->vocab + t->start[id],
                         t->length[id]);
}

/* Whether entry a comes before entry b in a bucket. Of equal words the last line comes first: that
   line counts, as in Hugging Face's reader. */
static int moe__entry_before(const moe_tokenizer *t, uint32_t a, uint32_t b) {
  uint32_t id = b & MOE__ENTRY_ID;
  int order = moe__piece_compare(t, a & MOE__ENTRY_ID, 0,
                                 (const unsigned char *)t->vocab + t->start[id], t->length[id]);
  return order ? order < 0 : (a & MOE__ENTRY_ID) > id;
}

/* Heapsort: n log n steps for any words. */
static void moe__bucket_sort(const moe_tokenizer *t, uint32_t *v, uint32_t n) {
  uint32_t begin = n / 2, end = n;
  while (end > 1) {
    uint32_t i, child, x;
    if (begin) {
      x = v[--begin];
    } else {
      x = v[--end];
      v[end] = v[0];
    }
    for (i = begin; (child = 2 * i + 1) < end; i = child) {
      if (child + 1 < end && moe__entry_before(t, v[child], v[child + 1])) ++child;
      if (!moe__entry_before(t, x, v[child])) break;
      v[i] = v[child];
    }
    v[i] = x;
  }
}

/* Counts the words of each bucket, then puts them in, from the end of each. */
static void moe__tokenizer_hash(moe_tokenizer *t) {
  uint32_t b, total = 0;
  int32_t id;
  memset(t->bucket, 0, ((size_t)t->mask + 2) * sizeof *t->bucket);
  for (id = 0; id < t->words; ++id)
    if (t->length[id]) ++t->bucket[moe__piece_bucket(t, moe__word_hash(t, id))];
  for (b = 0; b <= t->mask; ++b) t->bucket[b] = total += t->bucket[b];
  t->bucket[t->mask + 1] = total;
  for (id = 0; id < t->words; ++id) {
    uint32_t h = moe__word_hash(t, id);
    if (t->length[id])
      t->entry[--t->bucket[moe__piece_bucket(t, h)]] =
          (uint32_t)id | h >> MOE__ENTRY_TAG_SHIFT << MOE__ENTRY_TAG_SHIFT;
  }
  for (b = 0; b <= t->mask; ++b)
    moe__bucket_sort(t, t->entry + t->bucket[b], t->bucket[b + 1] - t->bucket[b]);
}

static moe_status moe__tokenizer_specials(moe_tokenizer *t, const moe_env *env) {
  int i;
  for (i = 0; i < MOE__SPECIALS; ++i) {
    const unsigned char *name = (const unsigned char *)moe__special_names[i];
    size_t n = strlen(moe__special_names[i]);
    moe__added *a = &t->added[0][t->count[0]];
    t->special[i] = moe__piece_find(t, moe__piece_hash(moe__hash_seed, name, n), 0, name, n);
    if (t->special[i] < 0 && i <= MOE__SEP)
      return moe__fail(env, MOE_E_FORMAT, "vocabulary: none of its %d lines is %s", (int)t->words,
                       moe__special_names[i]);
    a->text = moe__special_names[i];
    a->length = (uint16_t)n;
    a->single = 0;
    a->id = t->special[i];
    if (a->id >= 0) ++t->count[0];
  }
  return MOE_OK;
}

/* By bytes; what another begins with comes first, of equal ones the last line; of one line what its
   marks say. */
static int moe__added_before(const moe__added *a, const moe__added *b) {
  int order = memcmp(a->text, b->text, a->length < b->length ? a->length : b->length);
  if (order) return order < 0;
  if (a->length != b->length) return a->length < b->length;
  return a->id != b->id ? a->id > b->id : a->single > b->single;
}

/* Heapsort. */
static void moe__added_sort(moe__added *v, int32_t n) {
  int32_t begin = n / 2, end = n;
  while (end > 1) {
    int32_t i, child;
    moe__added x;
    if (begin) {
      x = v[--begin];
    } else {
      x = v[--end];
      v[end] = v[0];
    }
    for (i = begin; (child = 2 * i + 1) < end; i = child) {
      if (child + 1 < end && moe__added_before(&v[child], &v[child + 1])) ++child;
      if (!moe__added_before(&x, &v[child])) break;
      v[i] = v[child];
    }
    v[i] = x;
  }
}

/* Puts the normalised text of an added token at *used of t->normal. */
static moe_status moe__added_normalise(moe_tokenizer *t, moe__added *a, size_t *used,
                                       const moe_env *env) {
  moe__reader r;
  unsigned char *to = (unsigned char *)t->normal + *used;
  size_t n = 0;
  int kind, blank = 1;
  memset(&r, 0, sizeof r);
  r.t = t;
  r.s = (const unsigned char *)a->text;
  r.bytes = a->length;
  while (t->normal_bytes - *used - n >= 6) {
    kind = moe__reader_character(&r);
    if (kind == MOE__TEXT_END || (!n && kind == MOE__TEXT_BLANK)) break;
    n += moe__reader_write(to + n, kind, r.c);
    blank = kind == MOE__TEXT_BLANK;
  }
  if (blank)
    return moe__fail(env, MOE_E_FORMAT,
                     "vocabulary: line %d is an added token that is empty when normalised, or "
                     "begins or ends with a blank",
                     (int)a->id + 1);
  a->text = (const char *)to;
  a->length = (uint16_t)n;
  *used += n;
  return MOE_OK;
}

/* Makes the lists of tokens that stay whole. */
static moe_status moe__tokenizer_added(moe_tokenizer *t, const moe_env *env) {
  size_t used = 0;
  int32_t i;
  for (i = 0; i < t->count[1]; ++i)
    if (moe__added_normalise(t, &t->added[1][i], &used, env)) return MOE_E_FORMAT;
  moe__added_sort(t->added[0], t->count[0]);
  moe__added_sort(t->added[1], t->count[1]);
  for (i = 0; i < t->count[0]; ++i) t->begins[(unsigned char)t->added[0][i].text[0]] = 1;
  return MOE_OK;
}

MOE_API moe_status moe_tokenizer_init(moe_tokenizer **out, void *block, size_t bytes,
                                      const char *vocab, size_t vocab_bytes, int flags,
                                      const moe_env *env) {
  moe__layout layout;
  moe_tokenizer *t;
  size_t need = 0;
  int32_t c;
  moe_status status = moe_tokenizer_size(vocab, vocab_bytes, &need, env);
  if (status) return status;
  if (flags & ~MOE__TEXT_FLAGS)
    return moe__fail(env, MOE_E_ARGUMENT, "tokenizer: flags are %d, expected 0 to %d", flags,
                     MOE__TEXT_FLAGS);
  if (!block || (uintptr_t)block % 64)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "the block of a tokenizer is misaligned: expected an address that is a multiple of 64");
  if (bytes < need)
    return moe__fail(env, MOE_E_MEMORY, "the block of a tokenizer has %zu bytes, expected %zu",
                     bytes, need);
  memset(&layout, 0, sizeof layout);
  layout.base = (unsigned char *)block;
  status = moe__tokenizer_layout(&t, &layout, vocab, vocab_bytes, env);
  if (status) return status;
  t->flags = flags;
  t->lower = !(flags & MOE_TEXT_CASED);
  t->strip = t->lower == !(flags & MOE_TEXT_ACCENTS);
  moe__text_unpack_classes(t->bounds);
  moe__text_unpack_folds(t->strips, moe__text_strips);
  moe__text_unpack_folds(t->lowers, moe__text_lowers);
  for (c = 0; c < 128; ++c) t->ascii[c] = (uint8_t)moe__text_search(t->bounds, c);
  status = moe__tokenizer_words(t, vocab_bytes, env);
  if (status) return status;
  moe__tokenizer_hash(t);
  status = moe__tokenizer_specials(t, env);
  if (!status) status = moe__tokenizer_added(t, env);
  if (!status) *out = t;
  return status;
}

MOE_API moe_status moe_tokenizer_create(moe_tokenizer **out, const char *vocab, size_t vocab_bytes,
                                        int flags, const moe_env *env) {
  size_t bytes;
  void *block;
  moe_status status = moe_tokenizer_size(vocab, vocab_bytes, &bytes, env);
  if (status) return status;
  block = moe__alloc(bytes);
  if (!block) return moe__fail(env, MOE_E_MEMORY, "no memory for a tokenizer of %zu bytes", bytes);
  status = moe_tokenizer_init(out, block, bytes, vocab, vocab_bytes, flags, env);
  if (status)
    moe__release(block);
  else
    (*out)->owns_block = 1;
  return status;
}

MOE_API void moe_tokenizer_free(moe_tokenizer *tokenizer) {
  if (tokenizer && tokenizer->owns_block) moe__release(tokenizer);
}

MOE_API int32_t moe_tokenizer_words(const moe_tokenizer *tokenizer) { return tokenizer->words; }
#endif

/* ---- accuracy, F1, Matthews, Pearson, Spearman ---- >>metrics
   Counts are exact; sums are in double. Nothing is allocated: each class is counted in a separate
   pass. */

static double moe__metric(double value, int is_defined, int *defined) {
  if (defined) *defined = is_defined;
  return is_defined ? value : 0;
}

/* Answers and labels of n rows: classes as integers or, if answer is not NULL, as floats. */
typedef struct moe__rows {
  const int32_t *predicted, *label;
  const float *answer, *truth;
  size_t n;
} moe__rows;

static moe__rows moe__rows_of(const int32_t *predicted, const int32_t *label, size_t n) {
  moe__rows r = {NULL, NULL, NULL, NULL, 0};
  r.predicted = predicted;
  r.label = label;
  r.n = n;
  return r;
}

/* How often a class was predicted, is the label, and both. */
static void moe__metric_count(const moe__rows *r, int32_t c, double *p, double *l, double *both) {
  const float class_c = (float)c;
  size_t i, np = 0, nl = 0, nb = 0;
  for (i = 0; i < r->n; ++i) {
    int is_p = r->answer ? r->answer[i] == class_c : r->predicted[i] == c;
    int is_l = r->answer ? r->truth[i] == class_c : r->label[i] == c;
    np += (size_t)is_p;
    nl += (size_t)is_l;
    nb += (size_t)(is_p & is_l);
  }
  *p = (double)np;
  *l = (double)nl;
  *both = (double)nb;
}

static double moe__metric_accuracy(const moe__rows *r, int *defined) {
  size_t i, right = 0;
  for (i = 0; i < r->n; ++i)
    right += r->answer ? r->answer[i] == r->truth[i] : r->predicted[i] == r->label[i];
  return moe__metric(r->n ? (double)right / (double)r->n : 0, r->n > 0, defined);
}

/* F1 = 2 precision recall / (precision + recall) = 2 both / (predicted + labelled). */
static double moe__metric_f1(const moe__rows *r, int *defined) {
  double p, l, both;
  moe__metric_count(r, 1, &p, &l, &both);
  return moe__metric(p + l > 0 ? 2 * both / (p + l) : 0, p + l > 0, defined);
}

static double moe__metric_macro_f1(const moe__rows *r, int32_t classes, int *defined) {
  double p, l, both, sum = 0;
  int32_t c, seen = 0;
  for (c = 0; c < classes; ++c) {
    moe__metric_count(r, c, &p, &l, &both);
    if (p + l == 0) continue;
    sum += 2 * both / (p + l);
    ++seen;
  }
  return moe__metric(seen ? sum / seen : 0, seen > 0, defined);
}

/* R_K of Gorodkin (2004), for two classes Matthews' coefficient: the covariance of prediction and
   label over the root of their variances, all times n^2. */
static double moe__metric_matthews(const moe__rows *r, int32_t classes, int *defined) {
  double p, l, both, cross = 0, pp = 0, ll = 0, right = 0, all = (double)r->n, variance;
  int32_t c;
  for (c = 0; c < classes; ++c) {
    moe__metric_count(r, c, &p, &l, &both);
    right += both;
    cross += p * l;
    pp += p * p;
    ll += l * l;
  }
  variance = (all * all - pp) * (all * all - ll);
  return moe__metric(variance > 0 ? (right * all - cross) / sqrt(variance) : 0, variance > 0,
                     defined);
}

MOE_API double moe_metric_accuracy(const int32_t *predicted, const int32_t *label, size_t n,
                                   int *defined) {
  moe__rows r = moe__rows_of(predicted, label, n);
  return moe__metric_accuracy(&r, defined);
}

MOE_API double moe_metric_f1(const int32_t *predicted, const int32_t *label, size_t n,
                             int *defined) {
  moe__rows r = moe__rows_of(predicted, label, n);
  return moe__metric_f1(&r, defined);
}

MOE_API double moe_metric_macro_f1(const int32_t *predicted, const int32_t *label, size_t n,
                                   int32_t classes, int *defined) {
  moe__rows r = moe__rows_of(predicted, label, n);
  return moe__metric_macro_f1(&r, classes, defined);
}

MOE_API double moe_metric_matthews(const int32_t *predicted, const int32_t *label, size_t n,
                                   int32_t classes, int *defined) {
  moe__rows r = moe__rows_of(predicted, label, n);
  return moe__metric_matthews(&r, classes, defined);
}

static double moe__metric_pearson_of(double xy, double xx, double yy, int is_defined,
                                     int *defined) {
  double r;
  if (!(xx > 0 && yy > 0)) is_defined = 0;
  r = is_defined ? xy / (sqrt(xx) * sqrt(yy)) : 0;
  if (r > 1) r = 1;
  if (r < -1) r = -1;
  return moe__metric(r, is_defined, defined);
}

/* Two passes: the means, then the moments about them. A constant array is found by comparison,
   since its rounded mean may differ from it. */
MOE_API double moe_metric_pearson(const float *predicted, const float *label, size_t n,
                                  int *defined) {
  double mx = 0, my = 0, xy = 0, xx = 0, yy = 0;
  int vary_x = 0, vary_y = 0;
  size_t i;
  for (i = 0; i < n; ++i) {
    mx += (double)predicted[i];
    my += (double)label[i];
    vary_x |= predicted[i] != predicted[0];
    vary_y |= label[i] != label[0];
  }
  if (!(mx - mx == 0 && my - my == 0))
    return moe__metric(0, 0, defined); /* infinite or not a number */
  mx /= n ? (double)n : 1;
  my /= n ? (double)n : 1;
  for (i = 0; i < n; ++i) {
    double x = (double)predicted[i] - mx, y = (double)label[i] - my;
    xy += x * y;
    xx += x * x;
    yy += y * y;
  }
  return moe__metric_pearson_of(xy, xx, yy, vary_x && vary_y, defined);
}

/* Sorts in ascending order. Heapsort needs no memory and has no slow inputs. */
static void moe__metric_sort(float *v, size_t n) {
  size_t begin = n / 2, end = n;
  while (end > 1) {
    size_t i, child;
    float x;
    if (begin) {
      x = v[--begin];
    } else {
      x = v[--end];
      v[end] = v[0];
    }
    for (i = begin; (child = 2 * i + 1) < end; i = child) {
      if (child + 1 < end && v[child] < v[child + 1]) ++child;
      if (v[child] <= x) break;
      v[i] = v[child];
    }
    v[i] = x;
  }
}

/* Twice the mean rank (from 0) of x in a sorted array that holds it: first + last place, a whole
   number. */
static double moe__metric_rank(const float *sorted, size_t n, float x) {
  size_t low = 0, high = n, first;
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    if (sorted[middle] < x)
      low = middle + 1;
    else
      high = middle;
  }
  first = low;
  high = n;
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    if (sorted[middle] <= x)
      low = middle + 1;
    else
      high = middle;
  }
  return (double)first + (double)(low - 1);
}

/* Pearson's coefficient of the ranks, whose mean is always (n - 1) / 2. */
MOE_API double moe_metric_spearman(const float *predicted, const float *label, size_t n,
                                   float *scratch, int *defined) {
  double xy = 0, xx = 0, yy = 0;
  float *sx = scratch, *sy = scratch + n;
  size_t i;
  for (i = 0; i < n; ++i) {
    if (predicted[i] != predicted[i] || label[i] != label[i]) return moe__metric(0, 0, defined);
    sx[i] = predicted[i];
    sy[i] = label[i];
  }
  moe__metric_sort(sx, n);
  moe__metric_sort(sy, n);
  for (i = 0; i < n; ++i) {
    double x = moe__metric_rank(sx, n, predicted[i]) - (double)(n - 1);
    double y = moe__metric_rank(sy, n, label[i]) - (double)(n - 1);
    xy += x * y;
    xx += x * x;
    yy += y * y;
  }
  return moe__metric_pearson_of(xy, xx, yy, n > 1, defined);
}

/* Each group has one winning row, so groups are counted by their winners. */
MOE_API double moe_metric_ranking(const float *answer, const float *label, size_t n, int *defined) {
  size_t i, groups = 0, right = 0;
  for (i = 0; i < n; ++i) {
    groups += answer[i] == 1;
    right += answer[i] == 1 && label[i] == 1;
  }
  return moe__metric(groups ? (double)right / (double)groups : 0, groups > 0, defined);
}

MOE_API int moe_metric_name(char name[MOE_NAME_BYTES], const moe_task *task, int32_t index) {
  const char *list = task->metrics;
  size_t begin = 0, end;
  if (!list[0]) list = moe__has_classes(task) ? "accuracy" : "pearson,spearman";
  for (;; begin = end + 1) {
    for (end = begin; end < MOE_NAME_BYTES - 1 && list[end] && list[end] != ',';) ++end;
    if (index-- == 0) break;
    if (end >= MOE_NAME_BYTES - 1 || !list[end]) return 0;
  }
  memcpy(name, list + begin, end - begin);
  name[end - begin] = 0;
  return 1;
}

MOE_API double moe_metric(const char *name, const moe_task *task, const float *answer,
                          const float *label, size_t n, float *scratch, int *defined) {
  moe__rows r = {NULL, NULL, NULL, NULL, 0};
  r.answer = answer;
  r.truth = label;
  r.n = n;
  if (!strcmp(name, "pearson")) return moe_metric_pearson(answer, label, n, defined);
  if (!strcmp(name, "spearman") && scratch)
    return moe_metric_spearman(answer, label, n, scratch, defined);
  if (!moe__has_classes(task)) return moe__metric(0, 0, defined);
  if (!strcmp(name, "accuracy"))
    return moe__kind_of(task)->ranked ? moe_metric_ranking(answer, label, n, defined)
                                      : moe__metric_accuracy(&r, defined);
  if (!strcmp(name, "f1")) return moe__metric_f1(&r, defined);
  if (!strcmp(name, "macro_f1")) return moe__metric_macro_f1(&r, task->classes, defined);
  if (!strcmp(name, "matthews")) return moe__metric_matthews(&r, task->classes, defined);
  return moe__metric(0, 0, defined);
}

MOE_API double moe_metric_average(const double *value, const int64_t *rows, int64_t most_rows,
                                  int32_t T, int *defined) {
  double sum = 0;
  int32_t t, tasks = 0;
  for (t = 0; t < T; ++t) {
    if (rows && rows[t] > most_rows) continue;
    sum += value[t];
    ++tasks;
  }
  return moe__metric(tasks ? sum / tasks : 0, tasks > 0, defined);
}

/* ---- from logits to answers ---- >>answers */

/* The rule of a ranking [TaG] A.3.1: whether a choice with these logits beats the best so far. */
static int moe__rank_beats(const float *logits, const float *best) { return logits[1] > best[1]; }

MOE_API int32_t moe_rank_best(const float *logits, int32_t stride, int32_t n) {
  int32_t i, best = n > 0 ? 0 : -1;
  for (i = 1; i < n; ++i)
    if (moe__rank_beats(logits + (size_t)i * (size_t)stride,
                        logits + (size_t)best * (size_t)stride))
      best = i;
  return best;
}

/* The class with the largest logit, the lowest of equals; 0 in a regression. */
static int32_t moe__best_class(const float *logits, const moe_task *task) {
  int32_t c, best = 0;
  for (c = 1; c < task->classes; ++c)
    if (logits[c] > logits[best]) best = c;
  return best;
}

static moe_status moe__rank_groups(float *answer, const float *logits, int32_t stride, int32_t n,
                                   const int32_t *group, int32_t *winner, const moe_env *env) {
  int32_t i;
  if (!group || !winner)
    return moe__fail(env, MOE_E_ARGUMENT, "ranking: group or winner is NULL, expected both");
  for (i = 0; i < n; ++i)
    if (group[i] < 0 || group[i] >= n)
      return moe__fail(env, MOE_E_ARGUMENT, "row %d: group %d, expected 0 to %d", (int)i,
                       (int)group[i], (int)(n - 1));
  for (i = 0; i < n; ++i) winner[i] = -1;
  for (i = 0; i < n; ++i) {
    int32_t *best = winner + group[i];
    if (*best < 0 || moe__rank_beats(logits + (size_t)i * (size_t)stride,
                                     logits + (size_t)*best * (size_t)stride))
      *best = i;
  }
  for (i = 0; i < n; ++i) answer[i] = winner[group[i]] == i;
  return MOE_OK;
}

MOE_API moe_status moe_answers(float *answer, const moe_task *task, const float *logits,
                               int32_t stride, int32_t n, const int32_t *group, int32_t *winner,
                               const moe_env *env) {
  int32_t i;
  if (moe__kind_of(task)->ranked)
    return moe__rank_groups(answer, logits, stride, n, group, winner, env);
  for (i = 0; i < n; ++i) {
    const float *row = logits + (size_t)i * (size_t)stride;
    answer[i] = moe__has_classes(task) ? (float)moe__best_class(row, task) : row[0];
  }
  return MOE_OK;
}

/* ---- text in, label out ---- >>predict */

struct moe_predictor {
  const moe_model *model;
  moe_env env;
  moe_tokenizer *tokenizer; /* NULL where the model reads features */
  moe_context *context;
  int32_t batch, longest; /* most inputs at once, most tokens of one */
  int32_t *ids, *begin, *end, *seq_start, *task, *span;
  uint8_t *segments;
  float *scores; /* (batch, classes) */
  moe_output output;
  int owns_block;
};

/* Most tokens of an input of the task. */
static int32_t moe__task_longest(const moe_model *model, int32_t task) {
  int32_t own = model->T ? model->tasks[task].max_len : 0;
  return own ? moe__min(own, model->config.max_len) : model->config.max_len;
}

/* The parts of a predictor's block that other _init functions fill. */
typedef struct moe__predictor_parts {
  moe_limits limits;
  size_t tokenizer_bytes, context_bytes;
  void *tokenizer, *context;
} moe__predictor_parts;

/* The tokenizer of a model that reads texts: its bytes (block NULL), or itself in such a block. */
static moe_status moe__predictor_text(moe_predictor *p, void *block, size_t *bytes,
                                      const moe_env *env) {
  const moe_model *m = p->model;
  moe_status status = MOE_OK;
  if (m->config.feature_dim) return MOE_OK;
#ifdef MOE_NO_TEXT
  (void)block, (void)bytes;
  status = moe__fail(env, MOE_E_UNSUPPORTED, "predictor: this build reads no texts (MOE_NO_TEXT)");
#else
  if (!m->vocab) return moe__fail(env, MOE_E_FORMAT, "predictor: the model has no vocabulary");
  if (!block) return moe_tokenizer_size(m->vocab, m->vocab_bytes, bytes, env);
  status = moe_tokenizer_init(&p->tokenizer, block, *bytes, m->vocab, m->vocab_bytes,
                              m->config.cased, env);
  if (!status && moe_tokenizer_words(p->tokenizer) > m->config.vocab)
    status = moe__fail(env, MOE_E_FORMAT,
                       "the vocabulary has %d words, expected at most %d (vocab of the model)",
                       (int)moe_tokenizer_words(p->tokenizer), (int)m->config.vocab);
#endif
  return status;
}

/* Sets the pointers of *p into the block, *parts too (layout->base NULL: only counts). */
static moe_status moe__predictor_carve(moe__layout *layout, moe_predictor *p,
                                       moe__predictor_parts *parts, const moe_env *env) {
  const moe_model *model = p->model;
  size_t tokens, S = (size_t)p->batch;
  int32_t t;
  moe_status status;
  for (p->longest = model->T ? 0 : model->config.max_len, t = 0; t < model->T; ++t)
    p->longest = moe__max(p->longest, moe__task_longest(model, t));
  if (p->batch < 1 || p->batch > INT32_MAX / p->longest)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "predictor: batch is %d, expected 1 to %d for inputs of %d tokens",
                     (int)p->batch, (int)(INT32_MAX / p->longest), (int)p->longest);
  memset(parts, 0, sizeof *parts);
  parts->limits.tokens = p->batch * p->longest;
  parts->limits.sequences = p->batch;
  status = moe__predictor_text(p, NULL, &parts->tokenizer_bytes, env);
  if (!status) status = moe_context_size(model, &parts->limits, &parts->context_bytes, env);
  if (status) return status;
  tokens = model->config.feature_dim ? 0 : (size_t)parts->limits.tokens;
  moe__carve(layout, 1, sizeof *p);
  parts->tokenizer = moe__carve(layout, parts->tokenizer_bytes, 1);
  parts->context = moe__carve(layout, parts->context_bytes, 1);
  p->ids = (int32_t *)moe__carve(layout, tokens, sizeof(int32_t));
  p->begin = (int32_t *)moe__carve(layout, tokens, sizeof(int32_t));
  p->end = (int32_t *)moe__carve(layout, tokens, sizeof(int32_t));
  p->segments = (uint8_t *)moe__carve(layout, tokens, 1);
  p->seq_start = (int32_t *)moe__carve(layout, S + 1, sizeof(int32_t));
  p->task = (int32_t *)moe__carve(layout, S, sizeof(int32_t));
  p->span = (int32_t *)moe__carve(layout, 4 * S, sizeof(int32_t));
  p->scores = (float *)moe__carve(layout, S * (size_t)model->max_classes, sizeof(float));
  return layout->bad
             ? moe__fail(env, MOE_E_ARGUMENT,
                         "predictor: %d inputs at once exceed the address space of this machine",
                         (int)p->batch)
             : MOE_OK;
}

MOE_API moe_status moe_predictor_size(const moe_model *model, int32_t batch, size_t *bytes,
                                      const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe__predictor_parts parts;
  moe_predictor p;
  moe_status status;
  p.model = model;
  p.batch = batch;
  status = moe__predictor_carve(&layout, &p, &parts, env);
  if (!status) *bytes = layout.used;
  return status;
}

MOE_API moe_status moe_predictor_init(moe_predictor **out, void *block, size_t bytes,
                                      const moe_model *model, int32_t batch, const moe_env *env) {
  moe__layout layout = {NULL, 0, 0};
  moe__predictor_parts parts;
  moe_predictor p;
  size_t need;
  moe_status status = moe_predictor_size(model, batch, &need, env);
  if (!status) status = moe__check_block("a predictor", block, bytes, need, env);
  if (status) return status;
  memset(&p, 0, sizeof p);
  p.model = model;
  p.batch = batch;
  p.env = *env;
  layout.base = (unsigned char *)block;
  moe__predictor_carve(&layout, &p, &parts, env);
  status = moe__predictor_text(&p, parts.tokenizer, &parts.tokenizer_bytes, env);
  if (!status)
    status =
        moe_context_init(&p.context, parts.context, parts.context_bytes, model, &parts.limits, env);
  if (status) return status;
  *out = (moe_predictor *)block;
  **out = p;
  return MOE_OK;
}

MOE_API moe_status moe_predictor_create(moe_predictor **out, const moe_model *model, int32_t batch,
                                        const moe_env *env) {
  size_t bytes;
  void *block;
  moe_status status = moe_predictor_size(model, batch, &bytes, env);
  if (status) return status;
  block = moe__alloc(bytes);
  if (!block) return moe__fail(env, MOE_E_MEMORY, "no memory for a predictor of %zu bytes", bytes);
  status = moe_predictor_init(out, block, bytes, model, batch, env);
  if (status)
    moe__release(block);
  else
    (*out)->owns_block = 1;
  return status;
}

MOE_API void moe_predictor_free(moe_predictor *predictor) {
  if (!predictor) return;
  moe_context_free(predictor->context);
  if (predictor->owns_block) moe__release(predictor);
}

MOE_API void moe_predictor_set_output(moe_predictor *predictor, moe_output output) {
  predictor->output = output;
}

/* labels 1: answers of the task are asked for. */
static moe_status moe__predict_check(const moe_predictor *p, int32_t task, int32_t n, int labels) {
  if (!p->model->T && labels)
    return moe__fail(&p->env, MOE_E_ARGUMENT,
                     "the model has no tasks: it gives embeddings, not answers");
  if (p->model->T && (task < 0 || task >= p->model->T))
    return moe__fail(&p->env, MOE_E_ARGUMENT, "task is %d, the model has tasks 0 to %d", (int)task,
                     (int)(p->model->T - 1));
  if (n < 0 || n > p->batch)
    return moe__fail(&p->env, MOE_E_ARGUMENT,
                     "%d inputs at once, the predictor was made for at most %d", (int)n,
                     (int)p->batch);
  return MOE_OK;
}

/* The rows of p->scores after a pass over n inputs of a task, in the chosen output. */
static moe_status moe__predict_scores(moe_predictor *p, const moe_task *task, int32_t n,
                                      float *scores, int *best) {
  size_t width = (size_t)p->model->max_classes, i, c;
  for (i = 0; i < (size_t)n; ++i)
    for (c = 0; c < (size_t)task->classes; ++c)
      if (!moe__is_finite(p->scores[i * width + c]))
        return moe__fail(&p->env, MOE_E_NONFINITE,
                         "input %zu: score %zu of task '%s' is not finite", i, c, task->name);
  for (i = 0; i < (size_t)n; ++i) {
    float *row = p->scores + i * width;
    if (best) best[i] = (int)moe__best_class(row, task);
    if (moe__has_classes(task) && p->output == MOE_OUTPUT_PROBABILITIES)
      moe_softmax(row, row, task->classes);
  }
  if (scores != p->scores) memcpy(scores, p->scores, (size_t)n * width * sizeof(float));
  return MOE_OK;
}

MOE_API moe_status moe_predict_features(moe_predictor *predictor, int32_t task,
                                        const float *features, const int32_t *lengths, int32_t n,
                                        float *scores, int *best) {
  moe_predictor *p = predictor;
  moe_batch batch;
  int32_t i;
  moe_status status = moe__predict_check(p, task, n, 1);
  if (!status && !p->model->config.feature_dim)
    status = moe__fail(&p->env, MOE_E_ARGUMENT, "the model reads texts: use moe_predict_texts");
  if (status) return status;
  for (p->seq_start[0] = 0, i = 0; i < n; ++i) {
    int32_t length = lengths ? lengths[i] : 1, most = moe__task_longest(p->model, task);
    if (length < 1 || length > most)
      return moe__fail(&p->env, MOE_E_ARGUMENT, "input %d has %d vectors, task '%s' takes 1 to %d",
                       (int)i, (int)length, p->model->tasks[task].name, (int)most);
    p->seq_start[i + 1] = p->seq_start[i] + length;
    p->task[i] = task;
  }
  memset(&batch, 0, sizeof batch);
  batch.S = n;
  batch.seq_start = p->seq_start;
  batch.features = features;
  batch.task = p->task;
  status = moe_forward(p->context, p->scores, &batch, &p->env);
  return status ? status : moe__predict_scores(p, &p->model->tasks[task], n, scores, best);
}

#ifndef MOE_NO_TEXT
MOE_API moe_status moe_tokens_span(int32_t span[2], const moe_tokens *tokens, int32_t text,
                                   int32_t begin, int32_t end, const moe_env *env) {
  int32_t i, first = -1, last = -1;
  if (!tokens->begin || !tokens->end || (text && !tokens->segments) || text < 0 || text > 1)
    return moe__fail(env, MOE_E_ARGUMENT,
                     "span: expected begin, end and segments of the tokens, and text 0 or 1");
  for (i = 0; i < tokens->count; ++i) {
    if (tokens->begin[i] < 0 || (tokens->segments && tokens->segments[i] != text)) continue;
    if (tokens->begin[i] >= end || tokens->end[i] <= begin) continue;
    if (first < 0) first = i;
    last = i;
  }
  if (first < 0)
    return moe__fail(
        env, MOE_E_ARGUMENT,
        "text %d has no token at characters %d to %d: the text is shorter, or was truncated",
        (int)text + 1, (int)begin, (int)end);
  span[0] = first;
  span[1] = last + 1;
  return MOE_OK;
}

/* Inputs of a task: texts and, for span tasks, characters. */
typedef struct moe__inputs {
  const char *const *a, *const *b;
  const int32_t *chars; /* (n, 4), or NULL */
  int32_t task, n;
} moe__inputs;

/* Appends the ids of input i to those of the inputs before it. */
static moe_status moe__predict_encode(moe_predictor *p, const moe__inputs *in, int32_t i) {
  const int32_t *chars = in->chars ? in->chars + 4 * (size_t)i : NULL;
  int32_t *span = p->span + 4 * (size_t)i;
  size_t at = (size_t)p->seq_start[i];
  moe_text text = moe_text_of(in->a[i], in->b ? in->b[i] : NULL);
  moe_tokens tokens;
  moe_status status;
  if (!text.a) return moe__fail(&p->env, MOE_E_ARGUMENT, "text %d is NULL", (int)i);
  tokens.ids = p->ids + at;
  tokens.segments = p->segments + at;
  tokens.begin = chars ? p->begin + at : NULL;
  tokens.end = chars ? p->end + at : NULL;
  tokens.capacity = p->longest;
  tokens.count = 0;
  status = moe_encode(p->tokenizer, &tokens, &text, moe__task_longest(p->model, in->task),
                      p->model->config.truncate, &p->env);
  span[0] = span[2] = 0; /* [CLS], where no words are given: for embeddings */
  span[1] = span[3] = 1;
  if (!status && chars) status = moe_tokens_span(span, &tokens, 0, chars[0], chars[1], &p->env);
  if (!status && chars)
    status = moe_tokens_span(span + 2, &tokens, p->model->tasks[in->task].pair, chars[2], chars[3],
                             &p->env);
  p->seq_start[i + 1] = p->seq_start[i] + tokens.count;
  p->task[i] = in->task;
  return status;
}

/* Encodes the inputs and runs the model; p->scores then holds logits. */
static moe_status moe__predict_run(moe_predictor *p, const moe__inputs *in) {
  moe_batch batch;
  int32_t i;
  if (!p->tokenizer)
    return moe__fail(&p->env, MOE_E_ARGUMENT, "the model reads features: use moe_predict_features");
  p->seq_start[0] = 0;
  moe__profile_begin(&p->env);
  for (i = 0; i < in->n; ++i) {
    moe_status status = moe__predict_encode(p, in, i);
    if (status) return status;
  }
  moe__profile_end(&p->env, MOE_PROFILE_TEXT);
  memset(&batch, 0, sizeof batch);
  batch.S = in->n;
  batch.seq_start = p->seq_start;
  batch.ids = p->ids;
  batch.segments = p->model->config.segments > 1 ? p->segments : NULL;
  batch.task = p->task;
  batch.span = p->model->T && moe__kind_of(&p->model->tasks[in->task])->spans ? p->span : NULL;
  return moe_forward(p->context, p->scores, &batch, &p->env);
}

MOE_API moe_status moe_predict_spans(moe_predictor *predictor, int32_t task, const char *const *a,
                                     const char *const *b, const int32_t *chars, int32_t n,
                                     float *scores, int *best) {
  moe_predictor *p = predictor;
  const moe_task *kind;
  moe__inputs in;
  size_t i;
  moe_status status = moe__predict_check(p, task, n, 1);
  if (status) return status;
  kind = &p->model->tasks[task];
  if (!chars != !moe__kind_of(kind)->spans)
    return moe__fail(&p->env, MOE_E_ARGUMENT, "task '%s' %s", kind->name,
                     chars ? "takes no spans"
                           : "needs two spans with each input: moe_predict_spans");
  for (i = 0; i < (size_t)n; ++i)
    if (!(b && b[i]) != !kind->pair)
      return moe__fail(&p->env, MOE_E_ARGUMENT, "text %zu: task '%s' takes %s", i, kind->name,
                       kind->pair ? "two texts" : "one text");
  in.a = a;
  in.b = b;
  in.chars = chars;
  in.task = task;
  in.n = n;
  status = moe__predict_run(p, &in);
  return status ? status : moe__predict_scores(p, kind, n, scores, best);
}

MOE_API moe_status moe_predict_texts(moe_predictor *predictor, int32_t task, const char *const *a,
                                     const char *const *b, int32_t n, float *scores, int *best) {
  return moe_predict_spans(predictor, task, a, b, NULL, n, scores, best);
}

MOE_API moe_status moe_predict_text(moe_predictor *predictor, int32_t task, const char *a,
                                    const char *b, float *scores, int *best) {
  float *row = predictor->scores; /* its rows are longer than those of a task with few classes */
  moe_status status = moe_predict_spans(predictor, task, &a, &b, NULL, 1, row, best);
  if (!status) memcpy(scores, row, (size_t)predictor->model->tasks[task].classes * sizeof(float));
  return status;
}

/* Mean over the tokens [begin, end) in double, in their order. */
static void moe__embed_mean(float *out, const float *hidden, int32_t begin, int32_t end, size_t H) {
  size_t j;
  for (j = 0; j < H; ++j) {
    double sum = 0;
    int32_t i;
    for (i = begin; i < end; ++i) sum += (double)hidden[(size_t)i * H + j];
    out[j] = (float)(sum / (end - begin));
  }
}

MOE_API moe_status moe_predict_embed(moe_predictor *predictor, int32_t task, moe_pooling pooling,
                                     const char *const *a, const char *const *b, int32_t n,
                                     float *out) {
  moe_predictor *p = predictor;
  moe__inputs in;
  size_t H = (size_t)p->model->config.hidden, k, count;
  const float *hidden;
  int32_t i;
  moe_status status = moe__predict_check(p, task, n, 0);
  if (!status && pooling != MOE_POOLING_MEAN && pooling != MOE_POOLING_CLS)
    status = moe__fail(&p->env, MOE_E_ARGUMENT, "unknown pooling (%d)", (int)pooling);
  if (status) return status;
  in.a = a;
  in.b = b;
  in.chars = NULL;
  in.task = task;
  in.n = n;
  status = moe__predict_run(p, &in);
  if (status) return status;
  if (!n) return MOE_OK;
  hidden = moe_context_hidden(p->context);
  if (!hidden)
    return moe__fail(&p->env, MOE_E_IO, "embedding: %s failed", moe_backend_name(&p->env));
  count = (size_t)p->seq_start[n] * H;
  for (k = 0; k < count; ++k)
    if (!moe__is_finite(hidden[k]))
      return moe__fail(&p->env, MOE_E_NONFINITE, "token %zu: a hidden state is not finite", k / H);
  for (i = 0; i < n; ++i)
    if (pooling == MOE_POOLING_MEAN)
      moe__embed_mean(out + (size_t)i * H, hidden, p->seq_start[i], p->seq_start[i + 1], H);
    else
      memcpy(out + (size_t)i * H, hidden + (size_t)p->seq_start[i] * H, H * sizeof(float));
  return MOE_OK;
}

MOE_API moe_status moe_embed_text(moe_predictor *predictor, int32_t task, moe_pooling pooling,
                                  const char *a, const char *b, float *out) {
  return moe_predict_embed(predictor, task, pooling, &a, &b, 1, out);
}
#endif /* MOE_NO_TEXT */

/* ---- for other programming languages ---- >>bindings */

MOE_API size_t moe_abi(const char *name) {
#define MOE__BYTES(type) (strcmp(name, #type) ? 0 : sizeof(type))
  size_t bytes;
  if (!name) return MOE_VERSION;
  bytes = MOE__BYTES(moe_env) + MOE__BYTES(moe_profile) + MOE__BYTES(moe_backend) +
          MOE__BYTES(moe_mat) + MOE__BYTES(moe_routes) + MOE__BYTES(moe_route_options) +
          MOE__BYTES(moe_config) + MOE__BYTES(moe_task) + MOE__BYTES(moe_batch) +
          MOE__BYTES(moe_tensor) + MOE__BYTES(moe_writer) + MOE__BYTES(moe_view) +
          MOE__BYTES(moe_import_options) + MOE__BYTES(moe_limits) + MOE__BYTES(moe_route_sums) +
          MOE__BYTES(moe_task_router);
#ifndef MOE_NO_TRAIN
  bytes += MOE__BYTES(moe_param_group) + MOE__BYTES(moe_train_config) + MOE__BYTES(moe_share) +
           MOE__BYTES(moe_sampler_config) + MOE__BYTES(moe_sampler);
#endif
#ifndef MOE_NO_TEXT
  bytes += MOE__BYTES(moe_tokens) + MOE__BYTES(moe_text);
#endif
#undef MOE__BYTES
  return bytes;
}

/* What moe_env_create hands out: the env is its first field. */
typedef struct moe__own_env {
  moe_env env;
#ifndef MOE_NO_THREADS
  moe_pool *pool;
#endif
} moe__own_env;

MOE_API moe_status moe_env_create(moe_env **out, moe_isa isa, int32_t threads,
                                  void (*log)(void *user, moe_status status, const char *sentence),
                                  void *log_user) {
  moe__own_env *own = (moe__own_env *)moe__alloc(sizeof *own);
  moe_status status;
  if (!own) return MOE_E_MEMORY;
  memset(own, 0, sizeof *own);
  status = moe_env_init(&own->env, isa);
  own->env.log = log;
  own->env.log_user = log_user;
  if (status != MOE_OK)
    status = moe__fail(&own->env, status, "this machine cannot run %s", moe_isa_name(isa));
  else if (threads < 1 || threads > 256)
    status = moe__fail(&own->env, MOE_E_ARGUMENT, "%d threads, expected 1 to 256", (int)threads);
  else if (threads > 1)
#ifdef MOE_NO_THREADS
    status = moe__fail(&own->env, MOE_E_UNSUPPORTED, "built without threads: expected 1");
#else
    status = moe_pool_create(&own->pool, threads, &own->env);
#endif
  if (status != MOE_OK)
    moe_env_free(&own->env);
  else
    *out = &own->env;
  return status;
}

MOE_API void moe_env_free(moe_env *env) {
  moe__own_env *own = (moe__own_env *)(void *)env;
  if (!own) return;
#ifndef MOE_NO_THREADS
  moe_pool_free(own->pool);
#endif
  moe__release(own);
}

#if !defined(__clang__) && defined(__GNUC__)
#pragma GCC diagnostic pop
#pragma GCC pop_options
#ifdef __NVCC_DIAG_PRAGMA_SUPPORT__
#pragma nv_diagnostic pop
#endif
#endif
#endif /* MOE_IMPLEMENTATION_DONE */
#endif /* MOE_IMPLEMENTATION */

#pragma pop_macro("sqrt")
#pragma pop_macro("log")
#pragma pop_macro("fabs")
#pragma pop_macro("exp")
#pragma pop_macro("max")
#pragma pop_macro("small")
#pragma pop_macro("end")
#pragma pop_macro("begin")
#pragma pop_macro("Z")
#pragma pop_macro("W")
#pragma pop_macro("V")
#pragma pop_macro("T")
#pragma pop_macro("S")
#pragma pop_macro("P")
#pragma pop_macro("N")
#pragma pop_macro("M")
#pragma pop_macro("L")
#pragma pop_macro("H")
#pragma pop_macro("G")
#pragma pop_macro("F")
#pragma pop_macro("D")
#pragma pop_macro("C")
#pragma pop_macro("A")

/* LICENCE

   moe.h, moe_cuda.h and every file of this project that does not say otherwise are
   available under two licences: choose the one you prefer.

   ------------------------------------------------------------------------------
   ALTERNATIVE A - Public Domain (Unlicense, https://unlicense.org)

   This is free and unencumbered software released into the public domain.

   Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
   software, either in source code form or as a compiled binary, for any purpose,
   commercial or non-commercial, and by any means.

   In jurisdictions that recognize copyright laws, the author or authors of this
   software dedicate any and all copyright interest in the software to the public
   domain. We make this dedication for the benefit of the public at large and to
   the detriment of our heirs and successors. We intend this dedication to be an
   overt act of relinquishment in perpetuity of all present and future rights to
   this software under copyright law.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS
   FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS BE
   LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
   CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
   SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

   ------------------------------------------------------------------------------
   ALTERNATIVE B - MIT No Attribution (MIT-0)

   Copyright (c) 2026 the moe.h authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of
   this software and associated documentation files (the "Software"), to deal in
   the Software without restriction, including without limitation the rights to
   use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of
   the Software, and to permit persons to whom the Software is furnished to do so.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS
   FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
   COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER
   IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
   CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

   The data sets in examples/data have licences of their own: examples/data/README.md names them. */
