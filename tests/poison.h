/* The poison backend: a DEVICE whose memory faults. Every allocation is pages that nobody may
   touch, except inside a slot, which opens them, lets the CPU compute, and closes them again. So a
   run that ends proves that moe.h never reads or writes what is resident; and the slots check that
   no op is given memory of the host where the device's belongs. It is also the shortest backend
   there is: the one to start from. Include it after moe.h, in the unit that has the implementation
   (the norm of the gradients is a private function, since its bits depend on how spans are cut). */
#ifndef POISON_H
#define POISON_H
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

enum { POISON_MOST = 64 };

/* State of the device, and what it counts. */
static struct {
  struct {
    unsigned char *p;
    size_t bytes, asked; /* whole pages; what was asked for */
  } block[POISON_MOST];
  int blocks, streams, calls, uploads, downloads;
  size_t downloaded; /* bytes */
  int strays;        /* pointers outside the device's memory */
  int fail_at;       /* 1: the next call of a slot fails, 2: the one after; 0: none */
  int lost;          /* after a failure every call fails */
} poison;

static void poison_protect(int how) {
  int i;
  for (i = 0; i < poison.blocks; ++i) mprotect(poison.block[i].p, poison.block[i].bytes, how);
}

/* Begins a call: 1 where it fails. */
static int poison_fails(void) {
  ++poison.calls;
  if (poison.fail_at > 0 && --poison.fail_at == 0) poison.lost = 1;
  return poison.lost;
}

static int poison_has(const void *p) {
  int i;
  for (i = 0; i < poison.blocks; ++i)
    if ((const unsigned char *)p >= poison.block[i].p &&
        (const unsigned char *)p < poison.block[i].p + poison.block[i].bytes)
      return 1;
  return 0;
}

/* Counts a pointer that is neither NULL nor the device's. */
static void poison_check(const void *p) { poison.strays += p && !poison_has(p); }

/* Counts bytes that are not all within what one allocation was asked for. */
static void poison_check_bytes(const void *p, size_t bytes) {
  const unsigned char *at = (const unsigned char *)p;
  int i, inside = 0;
  for (i = 0; i < poison.blocks; ++i)
    inside |= at >= poison.block[i].p && at + bytes <= poison.block[i].p + poison.block[i].asked;
  poison.strays += !inside;
}

static moe_status poison_failed(const moe_env *env) {
  if (env->log) env->log(env->log_user, MOE_E_IO, "poison: the device is lost");
  return MOE_E_IO;
}

/* The CPU that a slot computes with. */
static moe_env poison_cpu(const moe_env *env) {
  moe_env cpu = *env;
  cpu.backend = NULL;
  cpu.stream = NULL;
  cpu.profile = NULL;
  poison_protect(PROT_READ | PROT_WRITE);
  return cpu;
}

static moe_status poison_done(moe_status status) {
  poison_protect(PROT_NONE);
  return status;
}

static int32_t poison_supports(const moe_backend *b, const moe_env *env, const moe_config *config,
                               const moe_limits *limits) {
  (void)b, (void)env, (void)config;
  return limits->tokens <= 1 << 20;
}

static moe_status poison_open(const moe_backend *b, const moe_env *env, void **stream) {
  (void)b;
  if (poison_fails()) return poison_failed(env);
  ++poison.streams;
  *stream = malloc(1);
  return *stream ? MOE_OK : MOE_E_MEMORY;
}

static void poison_close(const moe_backend *b, void *stream) {
  (void)b;
  --poison.streams;
  free(stream);
}

static moe_status poison_alloc(const moe_backend *b, const moe_env *env, void **out, size_t bytes) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), asked = bytes;
  void *p;
  (void)b;
  if (poison_fails() || poison.blocks == POISON_MOST) return poison_failed(env);
  bytes = (bytes + page) / page * page;
  if (posix_memalign(&p, page, bytes)) return MOE_E_MEMORY;
  memset(p, 0xff, bytes); /* NaN: nothing may count on zeros */
  mprotect(p, bytes, PROT_NONE);
  poison.block[poison.blocks].p = (unsigned char *)p;
  poison.block[poison.blocks].asked = asked;
  poison.block[poison.blocks++].bytes = bytes;
  *out = p;
  return MOE_OK;
}

static void poison_release(const moe_backend *b, void *p) {
  int i;
  (void)b;
  for (i = 0; i < poison.blocks && poison.block[i].p != p;) ++i;
  poison.strays += i == poison.blocks;
  if (i == poison.blocks) return;
  mprotect(p, poison.block[i].bytes, PROT_READ | PROT_WRITE);
  free(p);
  poison.block[i] = poison.block[--poison.blocks];
}

static moe_status poison_upload(const moe_backend *b, const moe_env *env, void *to,
                                const void *host, size_t bytes) {
  (void)b;
  if (poison_fails()) return poison_failed(env);
  ++poison.uploads;
  poison_check_bytes(to, bytes);
  poison.strays += poison_has(host);
  poison_protect(PROT_READ | PROT_WRITE);
  memcpy(to, host, bytes);
  return poison_done(MOE_OK);
}

static moe_status poison_download(const moe_backend *b, const moe_env *env, void *host,
                                  const void *from, size_t bytes) {
  (void)b;
  if (poison_fails()) return poison_failed(env);
  ++poison.downloads;
  poison.downloaded += bytes;
  poison_check_bytes(from, bytes);
  poison.strays += poison_has(host);
  poison_protect(PROT_READ | PROT_WRITE);
  memcpy(host, from, bytes);
  return poison_done(MOE_OK);
}

static moe_status poison_clear(const moe_backend *b, const moe_env *env, void *p, size_t bytes) {
  (void)b;
  if (poison_fails()) return poison_failed(env);
  poison_check_bytes(p, bytes);
  poison_protect(PROT_READ | PROT_WRITE);
  memset(p, 0, bytes);
  return poison_done(MOE_OK);
}

static moe_status poison_sync(const moe_backend *b, const moe_env *env) {
  (void)b;
  return poison_fails() ? poison_failed(env) : MOE_OK;
}

static void poison_changed(const moe_backend *b, const moe_env *env, const float *w, size_t count) {
  (void)b, (void)env, (void)count;
  poison_check(w);
}

/* An op: its arrays are checked, then the CPU computes it. */
#define POISON_RUN(name)                                                                           \
  moe_env cpu;                                                                                     \
  (void)b;                                                                                         \
  if (poison_fails()) return poison_failed(env);                                                   \
  cpu = poison_cpu(env);                                                                           \
  return poison_done(back ? moe_##name##_backward(op, &cpu) : moe_##name##_forward(op, &cpu))

static moe_status poison_linear(const moe_backend *b, const moe_env *env, const moe_linear_op *op,
                                int back) {
  poison_check(op->y), poison_check(op->act), poison_check(op->x), poison_check(op->w.data);
  poison_check(op->b), poison_check(op->dx), poison_check(op->dw), poison_check(op->db);
  poison_check(op->dy);
  poison.strays += op->w.layout != MOE_LAYOUT_ROWS || op->w.type != MOE_TYPE_F32;
  POISON_RUN(linear);
}

static moe_status poison_layernorm(const moe_backend *b, const moe_env *env,
                                   const moe_layernorm_op *op, int back) {
  poison_check(op->y), poison_check(op->sum), poison_check(op->mean), poison_check(op->rstd);
  poison_check(op->x), poison_check(op->delta), poison_check(op->gamma), poison_check(op->beta);
  poison_check(op->keys), poison_check(op->seq_start), poison_check(op->dx);
  poison_check(op->ddelta), poison_check(op->dgamma), poison_check(op->dbeta);
  poison_check(op->dy);
  POISON_RUN(layernorm);
}

static moe_status poison_dropout(const moe_backend *b, const moe_env *env,
                                 const moe_dropout_op *op) {
  moe_env cpu;
  (void)b;
  poison_check(op->y), poison_check(op->x), poison_check(op->keys), poison_check(op->seq_start);
  if (poison_fails()) return poison_failed(env);
  cpu = poison_cpu(env);
  return poison_done(moe_dropout_forward(op, &cpu));
}

static moe_status poison_embed(const moe_backend *b, const moe_env *env, const moe_embed_op *op,
                               int back) {
  poison_check(op->x), poison_check(op->ids), poison_check(op->segments), poison_check(op->word);
  poison_check(op->position), poison_check(op->segment), poison_check(op->seq_start);
  poison_check(op->dword), poison_check(op->dposition), poison_check(op->dsegment);
  poison_check(op->dx);
  POISON_RUN(embed);
}

static moe_status poison_attention(const moe_backend *b, const moe_env *env,
                                   const moe_attention_op *op, int back) {
  poison_check(op->y), poison_check(op->stats), poison_check(op->qkv), poison_check(op->keys);
  poison_check(op->seq_start), poison_check(op->scratch), poison_check(op->dqkv);
  poison_check(op->dy);
  poison.strays += op->longest < 1;
  POISON_RUN(attention);
}

static moe_status poison_route(const moe_backend *b, const moe_env *env, const moe_route_op *op,
                               int back) {
  poison_check(op->routes->expert), poison_check(op->routes->weight);
  poison_check(op->routes->prob), poison_check(op->routes->order);
  poison_check(op->routes->start), poison_check(op->logits), poison_check(op->loss);
  poison_check(op->x), poison_check(op->gates), poison_check(op->gate_of);
  poison_check(op->seq_start), poison_check(op->options.keys);
  poison_check(op->options.forced), poison_check(op->options.masked);
  poison_check(op->options.pruned), poison_check(op->dx), poison_check(op->dgates);
  poison_check(op->dlogits), poison_check(op->dweight);
  POISON_RUN(route);
}

static moe_status poison_experts(const moe_backend *b, const moe_env *env, const moe_experts_op *op,
                                 int back) {
  int32_t i;
  poison_check(op->y), poison_check(op->pre), poison_check(op->e), poison_check(op->x);
  poison_check(op->scratch), poison_check(op->dx), poison_check(op->dweight), poison_check(op->dy);
  for (i = 0; i < op->N; ++i) {
    poison_check(op->in[i].data), poison_check(op->out[i].data);
    poison_check(op->b_in[i]), poison_check(op->b_out[i]);
    if (back) poison_check(op->d_in[i]), poison_check(op->d_out[i]), poison_check(op->w_in[i]);
  }
  POISON_RUN(experts);
}

static moe_status poison_heads(const moe_backend *b, const moe_env *env, const moe_heads_op *op,
                               int back) {
  poison_check(op->scores), poison_check(op->losses), poison_check(op->hidden);
  poison_check(op->w), poison_check(op->task), poison_check(op->label), poison_check(op->span);
  poison_check(op->seq_start), poison_check(op->keys), poison_check(op->scratch);
  poison_check(op->dhidden), poison_check(op->dw);
  POISON_RUN(heads);
}

/* The bits of the CPU's norm: its spans are stretches of one array. */
static moe_status poison_grad_norm(const moe_backend *b, const moe_env *env, double *norm,
                                   const moe_adam_op *spans, int32_t n) {
  moe__span *own = (moe__span *)calloc((size_t)n + 1, sizeof *own);
  moe_env cpu;
  int32_t i;
  (void)b;
  if (!own || poison_fails()) return free(own), poison_failed(env);
  for (i = 0; i < n; ++i) {
    poison_check(spans[i].g);
    own[i].offset = (size_t)(spans[i].g - spans[0].g);
    own[i].count = spans[i].count;
    own[i].tile = moe__spans_tiles(own, i);
    own[i].lr_scale = spans[i].lr_scale;
  }
  cpu = poison_cpu(env);
  *norm = moe__spans_norm(spans[0].g, own, n, &cpu);
  free(own);
  return poison_done(MOE_OK);
}

static moe_status poison_adam(const moe_backend *b, const moe_env *env, const moe_adam_op *spans,
                              int32_t n) {
  moe_status status = MOE_OK;
  moe_env cpu;
  int32_t i;
  (void)b;
  if (poison_fails()) return poison_failed(env);
  cpu = poison_cpu(env);
  for (i = 0; i < n && !status; ++i) {
    poison_check(spans[i].w), poison_check(spans[i].g);
    poison_check(spans[i].m), poison_check(spans[i].v);
    status = moe_adam_step(&spans[i], &cpu);
  }
  return poison_done(status);
}

/* The table; the device starts anew. */
static moe_backend poison_backend(void) {
  moe_backend b;
  memset(&poison, 0, sizeof poison);
  moe_backend_init(&b);
  b.memory = MOE_MEMORY_DEVICE;
  b.name = "poison";
  b.supports = poison_supports, b.open = poison_open, b.close = poison_close;
  b.alloc = poison_alloc, b.release = poison_release, b.upload = poison_upload;
  b.download = poison_download, b.clear = poison_clear, b.sync = poison_sync;
  b.changed = poison_changed, b.linear = poison_linear, b.layernorm = poison_layernorm;
  b.dropout = poison_dropout, b.embed = poison_embed, b.attention = poison_attention;
  b.route = poison_route, b.experts = poison_experts, b.heads = poison_heads;
  b.grad_norm = poison_grad_norm, b.adam = poison_adam;
  return b;
}
#endif
