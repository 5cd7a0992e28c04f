/* Sizes at their limits: what fits works, one more is a status and a sentence, and nothing
   overflows on the way. The sanitizers run this part as well. */

/* Slots of tokens and choices are numbered by int32_t. */
static void test_limits_of_tokens_times_choices(void) {
  static int32_t start[2], gate_of[1];
  moe_env env = models_env(MOE_ISA_AUTO);
  int32_t k;
  for (k = 1; k <= 256; k *= 4) {
    moe_routes r;
    moe_route_op op;
    char says[80];
    memset(&r, 0, sizeof r);
    moe_route_op_init(&op);
    r.N = 256, r.k = k;
    op.routes = &r, op.seq_start = start, op.gate_of = gate_of, op.S = 1, op.G = 1, op.H = 1;
    CHECK(!moe__routes_check("route", &r, &env), "no token: %s", said);
    r.M = INT32_MAX / k;
    CHECK(!moe__routes_check("route", &r, &env), "k %d: %s", (int)k, said);
    if (k == 1) continue;
    start[1] = ++r.M;
    snprintf(says, sizeof says, "M is %d, expected 0 to %d tokens with k = %d", (int)r.M,
             (int)(INT32_MAX / k), (int)k);
    CHECK(moe_route_forward(&op, &env) == MOE_E_ARGUMENT && strstr(said, says), "%s", said);
    CHECK(moe_route_backward(&op, &env) == MOE_E_ARGUMENT && strstr(said, says), "%s", said);
    r.M = INT32_MAX;
    CHECK(moe_route_forward(&op, &env) == MOE_E_ARGUMENT, "M %d", (int)r.M);
    r.M = -1;
    CHECK(moe_route_forward(&op, &env) == MOE_E_ARGUMENT && strstr(said, "M is -1"), "%s", said);
  }
}

/* Floats of scratch: a number, or SIZE_MAX. */
static void test_limits_of_scratch(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  size_t n = moe_experts_scratch(INT32_MAX, 256, INT32_MAX, INT32_MAX, 1);
  CHECK(n == SIZE_MAX, "experts: %zu", n);
  n = moe_experts_scratch(1, 1, 1, 1, 1);
  CHECK(n > 0 && n < 10000, "experts: %zu", n);
  n = moe_attention_scratch(INT32_MAX, INT32_MAX, 1, 1, &env);
  CHECK(n > 1000000 || n == SIZE_MAX, "attention: %zu", n);
  CHECK(moe_attention_scratch(0, 8, 2, 1, &env) == 0, "no token");
  CHECK(moe_attention_scratch(-1, 8, 2, 1, &env) == 0, "fewer than none");
  CHECK(moe_heads_scratch(INT32_MAX) == 6 * (size_t)INT32_MAX, "heads");
  CHECK(moe_heads_scratch(-1) == 0, "heads of no width");
}

/* A model of the most tasks: made, written, read, and asked for the first and the last. */
static void test_limits_of_tasks(void) {
  static moe_task task[MOE_MAX_TASKS + 1];
  static int32_t ids[] = {1, 2, 3, 4}, start[] = {0, 1, 3, 4}, of[] = {0, MOE_MAX_TASKS - 1, 7};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 2, 1);
  moe_limits limits = {8, 4, 0, 0};
  moe_model *model = NULL, *back = NULL;
  moe_context *context;
  moe_batch b;
  models_file file;
  float score[2][6];
  int i;
  c.layers = 1, c.hidden = 4, c.heads = 1, c.ffn = 4;
  for (i = 0; i <= MOE_MAX_TASKS; ++i) {
    snprintf(task[i].name, sizeof task[i].name, "task_%d", i);
    task[i].classes = 2;
  }
  CHECK(moe_model_create(&model, &c, task, MOE_MAX_TASKS + 1, 1, &env) == MOE_E_ARGUMENT &&
            !model && strstr(said, "4097 tasks, expected 0 to 4096"),
        "%s", said);
  CHECK(!moe_model_create(&model, &c, task, MOE_MAX_TASKS, 1, &env), "%s", said);
  CHECK(moe_model_find_task(model, "task_4095") == 4095, "the last task");
  file = models_written(model, &env);
  CHECK(file.used && !moe_model_read(&back, file.data, file.used, &env), "%s", said);
  memset(&b, 0, sizeof b);
  b.S = 3, b.seq_start = start, b.ids = ids, b.task = of;
  for (i = 0; i < 2; ++i) {
    CHECK(!moe_context_create(&context, i ? back : model, &limits, &env), "%s", said);
    CHECK(!moe_forward(context, score[i], &b, &env), "%s", said);
    moe_context_free(context);
  }
  CHECK(!memcmp(score[0], score[1], sizeof score[0]), "the file's model");
  of[1] = MOE_MAX_TASKS;
  CHECK(moe_batch_check(model, &b, 0, &env) == MOE_E_ARGUMENT &&
            strstr(said, "has task 4096, the model has 4096"),
        "%s", said);
  of[1] = MOE_MAX_TASKS - 1;
  CHECK(moe_model_adapt(&back, model, &task[MOE_MAX_TASKS], 0, 1, &env) == MOE_E_ARGUMENT, "adapt");
  free(file.data);
  moe_model_free(back);
  moe_model_free(model);
}

/* A layer of the most experts, of which a token takes all or one; the most classes. */
static void test_limits_of_experts_and_classes(void) {
  static float score[2][2 * MOE_MAX_CLASSES];
  static int32_t ids[] = {1, 2, 3}, start[] = {0, 1, 3}, of[] = {0, 0};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, MOE_MAX_EXPERTS, 1);
  moe_limits limits = {8, 4, 0, 0};
  moe_task task;
  moe_batch b;
  int i;
  memset(&task, 0, sizeof task);
  strcpy(task.name, "wide");
  task.classes = MOE_MAX_CLASSES;
  c.layers = 1, c.hidden = 4, c.heads = 1, c.ffn = 3;
  memset(&b, 0, sizeof b);
  b.S = 2, b.seq_start = start, b.ids = ids, b.task = of;
  for (i = 0; i < 2; ++i) {
    moe_model *model = NULL;
    moe_context *context;
    moe_routes r;
    int32_t j, chosen = 0;
    c.top_k = i ? MOE_MAX_EXPERTS : 1;
    CHECK(!moe_model_create(&model, &c, &task, 1, 1, &env), "%s", said);
    models_fill(model, 0);
    CHECK(!moe_context_create(&context, model, &limits, &env), "%s", said);
    CHECK(!moe_forward(context, score[i], &b, &env) && !moe_context_routes(context, 0, &r), "%s",
          said);
    for (j = 0; j < r.N; ++j) chosen += r.start[j + 1] - r.start[j];
    CHECK(r.N == 256 && chosen == 3 * c.top_k, "%d choices", (int)chosen);
    for (j = 0; j < 2 * MOE_MAX_CLASSES; ++j)
      CHECK(moe__is_finite(score[i][j]), "score %d", (int)j);
    moe_context_free(context);
    moe_model_free(model);
  }
  c.top_k = MOE_MAX_EXPERTS + 1;
  CHECK(moe_config_check(&c, &env) == MOE_E_ARGUMENT && strstr(said, "top_k is 257"), "%s", said);
  c.top_k = 1, c.experts = MOE_MAX_EXPERTS + 1;
  CHECK(moe_config_check(&c, &env) == MOE_E_ARGUMENT && strstr(said, "experts is 257"), "%s", said);
}

/* Configurations whose products do not fit: a sentence, on 32 and on 64 bits. */
static void test_limits_of_configurations(void) {
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_task tasks[MODELS_TASKS];
  int i;
  models_tasks(tasks);
  for (i = 0; i < 6; ++i) {
    moe_config c = models_config(MOE_ROUTER_TASK, 256, 256);
    moe_model *model = NULL;
    moe_status status;
    size_t bytes = 0;
    if (i != 0) c.layers = INT32_MAX;
    if (i != 1) c.hidden = INT32_MAX - 3, c.heads = 2;
    if (i != 2) c.ffn = INT32_MAX;
    if (i != 3) c.vocab = INT32_MAX;
    if (i != 4) c.positions = c.max_len = INT32_MAX;
    if (i == 5) c.router = MOE_ROUTER_EMBEDDING, c.rank = INT32_MAX;
    said[0] = 0;
    status = moe_model_size(&c, tasks, MODELS_TASKS, &bytes, &env);
    CHECK(status == MOE_E_ARGUMENT && strlen(said) > 20 && !bytes, "%d: %d, %s", i, (int)status,
          said);
    CHECK(moe_model_create(&model, &c, tasks, MODELS_TASKS, 1, &env) == MOE_E_ARGUMENT && !model,
          "%d: %s", i, said);
  }
}

/* Contexts and trainers of more tokens than numbers of 32 bits can name. */
static void test_limits_of_batches(void) {
  static const int32_t tokens[] = {INT32_MAX, INT32_MAX / 2, INT32_MAX / 4, INT32_MAX / 4 - 256};
  moe_env env = models_env(MOE_ISA_AUTO);
  moe_config c = models_config(MOE_ROUTER_TASK, 4, 4);
  moe_task tasks[MODELS_TASKS];
  moe_train_config tc;
  moe_model *model = NULL;
  moe_batch b;
  size_t i, bytes;
  models_tasks(tasks);
  moe_train_config_init(&tc);
  tc.steps = 1;
  CHECK(!moe_model_create(&model, &c, tasks, MODELS_TASKS, 1, &env), "%s", said);
  for (i = 0; i < 4; ++i) {
    moe_limits limits = {0, 1, 0, 0};
    moe_status status;
    limits.tokens = tokens[i];
    said[0] = 0;
    bytes = 0;
    status = moe_context_size(model, &limits, &bytes, &env);
    CHECK(i == 3 && sizeof bytes > 4 ? status == MOE_OK && bytes > (size_t)tokens[i]
                                     : status == MOE_E_ARGUMENT && strlen(said) > 20,
          "%d tokens: status %d, %s", (int)tokens[i], (int)status, said);
    limits.sequences = limits.tokens;
    limits.training = 1;
    status = moe_trainer_size(model, &limits, &tc, &bytes, &env);
    CHECK(status == MOE_OK ? bytes > (size_t)tokens[i] : strlen(said) > 20, "%d tokens: %s",
          (int)tokens[i], said);
  }
  memset(&b, 0, sizeof b);
  b.S = INT32_MIN;
  CHECK(moe_batch_check(model, &b, 0, &env) == MOE_E_ARGUMENT, "S %d", (int)b.S);
  moe_model_free(model);
}

/* Texts of more than 2^31 bytes: read as far as the tokens go, refused where their places would
   not fit. Behind the first page nobody may read. */
static void test_limits_of_texts(void) {
#if !defined(_WIN32) && SIZE_MAX > UINT32_MAX
  static const char vocab[] = "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n";
  moe_env env = models_env(MOE_ISA_AUTO);
  size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = ((size_t)1 << 31) + 17, i;
  void *raw = NULL;
  char *text;
  moe_tokenizer *tokenizer = NULL;
  int32_t ids[16], begin[16];
  moe_tokens out;
  moe_text in;
  CHECK(!posix_memalign(&raw, page, 2 * page), "memory");
  text = (char *)raw;
  for (i = 0; i < page; ++i) text[i] = i % 2 ? ' ' : 'a';
  CHECK(!mprotect(text + page, page, PROT_NONE), "a page that nobody may read");
  CHECK(!moe_tokenizer_create(&tokenizer, vocab, sizeof vocab - 1, 0, &env), "%s", said);
  memset(&out, 0, sizeof out);
  memset(&in, 0, sizeof in);
  out.ids = ids;
  out.capacity = 16;
  in.a = text;
  in.a_bytes = bytes;
  CHECK(!moe_encode(tokenizer, &out, &in, 16, MOE_TRUNCATE_RIGHT, &env), "%s", said);
  CHECK(out.count == 16 && ids[0] == 2 && ids[1] == 4 && ids[14] == 4 && ids[15] == 3, "%d tokens",
        (int)out.count);
  out.begin = begin;
  CHECK(moe_encode(tokenizer, &out, &in, 16, MOE_TRUNCATE_RIGHT, &env) == MOE_E_ARGUMENT &&
            strstr(said, "expected at most 2^31 - 1 bytes"),
        "begin: %s", said);
  out.end = begin;
  out.begin = NULL;
  said[0] = 0;
  CHECK(moe_encode(tokenizer, &out, &in, 16, MOE_TRUNCATE_RIGHT, &env) == MOE_E_ARGUMENT &&
            strstr(said, "expected at most 2^31 - 1 bytes"),
        "end: %s", said);
  in.a_bytes = 3;
  in.b = text;
  in.b_bytes = bytes;
  CHECK(moe_encode(tokenizer, &out, &in, 16, MOE_TRUNCATE_RIGHT, &env) == MOE_E_ARGUMENT, "b");
  in.b_bytes = INT32_MAX;
  out.begin = begin;
  CHECK(!moe_encode(tokenizer, &out, &in, 16, MOE_TRUNCATE_RIGHT, &env), "the most: %s", said);
  moe_tokenizer_free(tokenizer);
  mprotect(text + page, page, PROT_READ | PROT_WRITE);
  free(raw);
#else
  SKIP("no pages to protect, or no texts of that size, here");
#endif
}

static void run_limits(void) {
  RUN(test_limits_of_tokens_times_choices);
  RUN(test_limits_of_scratch);
  RUN(test_limits_of_tasks);
  RUN(test_limits_of_experts_and_classes);
  RUN(test_limits_of_configurations);
  RUN(test_limits_of_batches);
  RUN(test_limits_of_texts);
}
