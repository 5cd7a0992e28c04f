/* Memory, copies, scratch, failures: what the queues of >>cuda_memory promise. */

/* A backend on the double and its own queue. */
typedef struct memory_case {
  moe_backend b;
  moe_env env;
  moe__cuda *cuda;
  moe__cuda_queue *own;
} memory_case;

static moe_status memory_open(memory_case *m) {
  moe_cuda_options options = host_options();
  moe_status status;
  memset(m, 0, sizeof *m);
  double_reset();
  m->env = host_env();
  status = moe_cuda_open(&m->b, &options, &m->env);
  if (status) return status;
  m->cuda = (moe__cuda *)m->b.user;
  m->own = m->cuda->own;
  return MOE_OK;
}

static void test_memory_says_what_to_do_about_each_error(void) {
  memory_case m;
  size_t i, n = sizeof moe__cuda_advice / sizeof *moe__cuda_advice;
  CHECK(!memory_open(&m), "%s", said);
  for (i = 0; i < n; ++i) {
    int error = moe__cuda_advice[i].error ? moe__cuda_advice[i].error : 12345;
    char what[40];
    said[0] = 0;
    CHECK(moe__cuda_driver_fail(&m.cuda->driver, &m.env, 3, "cuX", error) ==
              moe__cuda_advice[i].status,
          "error %d", error);
    snprintf(what, sizeof what, " (%d): %.20s", error, moe__cuda_advice[i].advice);
    CHECK(strstr(said, "cuda:3: cuX: ") && strstr(said, what), "%s", said);
  }
  said[0] = 0;
  CHECK(!moe_cuda_close(&m.b), "left");
  HOST_IS_CLEAN();
}

static void test_memory_knows_which_errors_lose_the_gpu(void) {
  static const int error[] = {4, 201, 214, 700, 710, 720, 999},
                   other[] = {1, 2, 3, 5, 200, 202, 213, 215, 699, 721, 998, 1000};
  memory_case m;
  size_t i;
  CHECK(!memory_open(&m), "%s", said);
  CHECK(!moe__cuda_lost(m.cuda, 0), "nothing happened");
  for (i = 0; i < sizeof other / sizeof *other; ++i)
    CHECK(!moe__cuda_lost(m.cuda, other[i]), "error %d", other[i]);
  for (i = 0; i < sizeof error / sizeof *error; ++i) {
    m.cuda->lost = 0;
    CHECK(moe__cuda_lost(m.cuda, error[i]) == error[i], "error %d", error[i]);
    CHECK(moe__cuda_lost(m.cuda, 0) == error[i] && moe__cuda_lost(m.cuda, 719) == error[i],
          "the first one stays");
  }
  m.cuda->lost = 0;
  CHECK(!moe_cuda_close(&m.b), "left");
  HOST_IS_CLEAN();
}

/* Pieces are aligned and apart; blocks grow, are joined, and are limited in number. */
static void test_memory_deals_scratch(void) {
  memory_case m;
  char *a, *b, *c, *d;
  size_t used = 0, large = 3 * (size_t)MOE__CUDA_SCRATCH;
  int i, turn;
  CHECK(!memory_open(&m), "%s", said);
  CHECK(!moe__cuda_begin(m.own, &m.env, 1), "%s", said);
  a = (char *)moe__cuda_scratch(m.own, 0), b = (char *)moe__cuda_scratch(m.own, 1);
  c = (char *)moe__cuda_scratch(m.own, 255), d = (char *)moe__cuda_scratch(m.own, 256);
  CHECK(a && b == a + 256 && c == b + 256 && d == c + 256, "pieces");
  CHECK((char *)moe__cuda_scratch(m.own, 1) == d + 512, "256 bytes and a little");
  CHECK(m.own->scratch_blocks == 1 && m.own->scratch[0].bytes == MOE__CUDA_SCRATCH, "a block");
  for (turn = 0; turn < 2; ++turn) {
    for (i = 0; i < 2; ++i) CHECK(moe__cuda_scratch(m.own, large), "%s", said);
    CHECK(m.own->scratch_blocks == 3 - turn, "%d blocks", m.own->scratch_blocks);
    for (used = 0, i = 0; i < m.own->scratch_blocks; ++i) used += m.own->scratch[i].bytes;
    moe__cuda_scratch_reset(m.own);
    CHECK(m.own->scratch_blocks == 1 && m.own->scratch[0].bytes == used && !m.own->scratch[0].used,
          "joined: %zu bytes, not %zu", m.own->scratch[0].bytes, used);
    large = used / 2 + 1000; /* the first piece fits into the joined block */
  }
  moe__cuda_scratch_free(m.own);
  for (i = 0; i < 32; ++i) CHECK(moe__cuda_scratch(m.own, MOE__CUDA_SCRATCH), "block %d", i);
  CHECK(!moe__cuda_scratch(m.own, MOE__CUDA_SCRATCH) && m.own->status == MOE_E_MEMORY, "33");
  CHECK(strstr(said, "too many blocks of scratch"), "%s", said);
  said[0] = 0;
  CHECK(moe__cuda_end(m.own, MOE_OK) == MOE_E_MEMORY, "the call has failed");
  CHECK(!moe_cuda_close(&m.b), "left");
  HOST_IS_CLEAN();
}

/* Uploads wait in the pinned buffer, as many as it holds. */
static void test_memory_stages_uploads(void) {
  static const size_t sizes[] = {1, 64, 65, 700000, 300000, 1 << 20, 1 << 19, 1 << 19, 100};
  static const size_t used[] = {64, 128, 256, 700288, 1000320, 1 << 20, 1 << 19, 1 << 20, 128};
  static unsigned char data[1 << 20], back[1 << 20];
  void *p[9];
  memory_case m;
  size_t i, j;
  CHECK(!memory_open(&m), "%s", said);
  for (i = 0; i < 9; ++i) {
    CHECK(!m.b.alloc(&m.b, &m.env, &p[i], sizes[i]), "%s", said);
    memset(data, (int)i + 1, sizes[i]);
    CHECK(!m.b.upload(&m.b, &m.env, p[i], data, sizes[i]), "%s", said);
    CHECK(m.own->staging_used == used[i], "upload %zu: %zu", i, m.own->staging_used);
  }
  for (i = 0; i < 9; ++i) {
    CHECK(!m.b.download(&m.b, &m.env, back, p[i], sizes[i]), "%s", said);
    for (j = 0; j < sizes[i] && back[j] == i + 1;) ++j;
    CHECK(j == sizes[i], "upload %zu, byte %zu", i, j);
    CHECK(!m.own->staging_used, "the buffer is free");
  }
  CHECK(!m.b.clear(&m.b, &m.env, p[3], 700000) && !m.b.clear(&m.b, &m.env, p[4], 0), "%s", said);
  CHECK(!m.b.download(&m.b, &m.env, back, p[3], 700000), "%s", said);
  for (j = 0; j < 700000 && !back[j];) ++j;
  CHECK(j == 700000, "byte %zu is not 0", j);
  for (i = 0; i < 9; ++i) m.b.release(&m.b, p[i]);
  CHECK(!moe_cuda_close(&m.b), "left");
  HOST_IS_CLEAN();
}

static moe_status memory_clear_fails(memory_case *m, void *p, int error) {
  snprintf(control->name, sizeof control->name, "cuMemsetD8Async");
  control->fail_at = 1, control->error = error;
  return m->b.clear(&m->b, &m->env, p, 100);
}

/* The first failure of a context's queue stays, that of the backend's own does not. */
static void test_memory_keeps_the_failure_of_a_context(void) {
  memory_case m;
  void *p = NULL, *stream = NULL, *more = NULL;
  CHECK(!memory_open(&m), "%s", said);
  CHECK(!m.b.alloc(&m.b, &m.env, &p, 100) && !m.b.open(&m.b, &m.env, &stream), "%s", said);
  CHECK(memory_clear_fails(&m, p, 1) == MOE_E_IO, "%s", said);
  CHECK(!m.b.clear(&m.b, &m.env, p, 100) && !m.b.sync(&m.b, &m.env), "%s", said);
  m.env.stream = stream;
  CHECK(memory_clear_fails(&m, p, 2) == MOE_E_MEMORY, "%s", said);
  said[0] = 0;
  CHECK(m.b.clear(&m.b, &m.env, p, 100) == MOE_E_MEMORY && !said[0], "it is said once: %s", said);
  CHECK(m.b.sync(&m.b, &m.env) == MOE_E_MEMORY && strstr(said, "it can only be freed"), "%s", said);
  CHECK(m.b.alloc(&m.b, &m.env, &more, 100) == MOE_E_MEMORY && !more, "%s", said);
  m.env.stream = NULL;
  CHECK(!m.b.clear(&m.b, &m.env, p, 100), "%s", said);
  m.b.close(&m.b, stream);
  m.b.release(&m.b, p), m.b.release(&m.b, p), m.b.release(&m.b, NULL);
  CHECK(memory_clear_fails(&m, p, 700) == MOE_E_IO, "%s", said);
  control->fail_at = 0;
  CHECK(m.b.sync(&m.b, &m.env) == MOE_E_IO && m.b.open(&m.b, &m.env, &stream) == MOE_E_IO &&
            strstr(said, "after the GPU was lost"),
        "%s", said);
  moe_cuda_close(&m.b);
}

/* What is free is said where the driver knows it; a failing call counts nothing. */
static void test_memory_counts_what_it_holds(void) {
  memory_case m;
  moe_cuda_counts counts;
  void *p[3] = {NULL, NULL, NULL}, *none = NULL, *stream[2];
  int i;
  CHECK(!memory_open(&m), "%s", said);
  for (i = 0; i < 3; ++i) CHECK(!m.b.alloc(&m.b, &m.env, &p[i], 100 + (size_t)i), "%s", said);
  for (i = 0; i < 2; ++i) CHECK(!m.b.open(&m.b, &m.env, &stream[i]), "%s", said);
  m.env.stream = stream[0]; /* which has work left when it is closed */
  CHECK(!m.b.upload(&m.b, &m.env, p[0], "abc", 3), "%s", said);
  m.env.stream = NULL;
  m.b.close(&m.b, stream[0]), m.b.release(&m.b, p[1]);
  moe_cuda_count(&m.b, &counts);
  CHECK(counts.allocations == 2 && counts.bytes == 202 && counts.queues == 1, "%d, %ld, %d",
        (int)counts.allocations, (long)counts.bytes, (int)counts.queues);
  control->memory = control->used;
  snprintf(control->name, sizeof control->name, "cuMemGetInfo_v2");
  control->fail_at = 1, control->error = 1;
  CHECK(m.b.alloc(&m.b, &m.env, &none, 100) == MOE_E_MEMORY && !none &&
            strstr(said, "100 bytes, 0 of 0 are free"),
        "%s", said);
  snprintf(control->name, sizeof control->name, "cuMemAlloc_v2");
  control->fail_at = 1, control->error = 1;
  CHECK(m.b.alloc(&m.b, &m.env, &none, 100) == MOE_E_IO && !none, "%s", said);
  moe_cuda_count(&m.b, &counts);
  CHECK(counts.allocations == 2 && counts.bytes == 202, "failures are counted");
  m.b.release(&m.b, p[0]), m.b.release(&m.b, p[2]), m.b.close(&m.b, stream[1]);
  CHECK(!moe_cuda_close(&m.b), "left");
  HOST_IS_CLEAN();
}

/* TF32 is for cards that have it. */
static void test_memory_uses_tf32_on_request(void) {
  static const int arch[] = {75, 80, 90};
  int i, on;
  for (on = 0; on < 2; ++on)
    for (i = 0; i < 3; ++i) {
      moe_cuda_options options = host_options();
      moe_backend b;
      double_reset();
      control->arch = arch[i], options.tf32 = on;
      CHECK(!open_one(&b, &options), "%s", said);
      CHECK(moe__cuda_tf32(((moe__cuda *)b.user)->own) == (on && i > 0), "sm_%d", arch[i]);
      CHECK(!strstr(b.name, "TF32") == !(on && i > 0), "%s", b.name);
      moe_cuda_close(&b);
    }
}

static void run_memory(void) {
  RUN(test_memory_says_what_to_do_about_each_error);
  RUN(test_memory_knows_which_errors_lose_the_gpu);
  RUN(test_memory_deals_scratch);
  RUN(test_memory_stages_uploads);
  RUN(test_memory_keeps_the_failure_of_a_context);
  RUN(test_memory_counts_what_it_holds);
  RUN(test_memory_uses_tf32_on_request);
}
