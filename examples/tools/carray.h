/* A model as constants of a C program, for devices that keep it in flash: moe_view in moe.h. */
#ifndef TOOLS_CARRAY_H
#define TOOLS_CARRAY_H

/* A string of a task as a C string: whatever could end it or mean something else is written as a
   number. */
static void carray_string(const char *s) {
  putchar('"');
  for (; *s; ++s) {
    unsigned char c = (unsigned char)*s;
    if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
        strchr(" _-+,.", c))
      putchar(c);
    else
      printf("\\%03o", (unsigned)c);
  }
  putchar('"');
}

static void carray_floats(const char *name, const float *x, size_t n) {
  size_t i, column = 2;
  char digits[40];
  printf("static const float %s_floats[%lu] = {\n ", name, (unsigned long)n);
  for (i = 0; i < n; ++i) { /* nine digits say which float it is */
    int length = snprintf(digits, sizeof digits, "%.9g", (double)x[i]);
    length += snprintf(digits + length, sizeof digits - (size_t)length, "%s%s",
                       strpbrk(digits, ".e") ? "f" : ".0f", i + 1 < n ? "," : "");
    if (column + (size_t)length + 1 > 100) printf("\n "), column = 2;
    printf(" %s", digits);
    column += (size_t)length + 1;
  }
  printf("};\n");
}

static void carray_bytes(const char *type, const char *name, const char *what, const void *bytes,
                         size_t n) {
  const signed char *x = (const signed char *)bytes;
  size_t i;
  printf("static const %s %s_%s[%lu] = {", type, name, what, (unsigned long)n);
  for (i = 0; i < n; ++i) printf("%s%d%s", i % 20 ? " " : "\n  ", (int)x[i], i + 1 < n ? "," : "");
  printf("};\n");
}

static void carray_tasks(const char *name, const moe_model *model) {
  static const char *const kinds[] = {"CLASSIFICATION", "REGRESSION", "RANKING", "SPAN"};
  int32_t T = moe_model_tasks(model), t, i;
  for (t = 0; t < T; ++t) {
    const moe_task *task = moe_model_task(model, t);
    if (!task->label) continue;
    printf("static const char *const %s_labels_%d[%d] = {", name, (int)t, (int)task->classes);
    for (i = 0; i < task->classes; ++i)
      printf("%s", i ? ",\n  " : "\n  "), carray_string(task->label[i]);
    printf("};\n");
  }
  if (T) printf("static const moe_task %s_tasks[%d] = {\n", name, (int)T);
  for (t = 0; t < T; ++t) {
    const moe_task *task = moe_model_task(model, t);
    printf("  {"), carray_string(task->name);
    printf(", MOE_KIND_%s, %d, %d, (float)%.9g, (float)%.9g, ", kinds[task->kind], (int)task->pair,
           (int)task->classes, (double)task->low, (double)task->high);
    carray_string(task->metrics);
    printf(", %d, ", (int)task->max_len);
    if (task->label)
      printf("%s_labels_%d", name, (int)t);
    else
      printf("0");
    printf("}%s\n", t + 1 < T ? "," : "};");
  }
}

static void carray_view(const char *name, const moe_view *v) {
  static const char *const routers[] = {"DENSE", "SHARED", "TASK", "TASK_LEVEL", "EMBEDDING"};
  static const char *const selections[] = {"SOFTMAX", "GUMBEL", "STRAIGHT"};
  const moe_config *c = &v->config;
  printf("static const moe_view %s = {\n  %d,\n", name, (int)v->version);
  printf("  {%d, %d, %d, %d, %d, %d, %d, %d, (float)%.9g, MOE_ROUTER_%s,\n", (int)c->layers,
         (int)c->hidden, (int)c->ffn, (int)c->heads, (int)c->vocab, (int)c->positions,
         (int)c->segments, (int)c->feature_dim, (double)c->eps, routers[c->router]);
  printf("   %d, %d, %d, %d, %d, %d, %s, %d, %s,\n", (int)c->experts, (int)c->top_k,
         (int)c->gate_scale_n, (int)c->renormalize, (int)c->rank, (int)c->max_len,
         c->truncate == MOE_TRUNCATE_RIGHT ? "MOE_TRUNCATE_RIGHT" : "MOE_TRUNCATE_LONGEST",
         (int)c->cased, c->unit == MOE_UNIT_BLOCK ? "MOE_UNIT_BLOCK" : "MOE_UNIT_FFN");
  printf("   MOE_SELECT_%s, %d, (float)%.9g, ", selections[c->selection], (int)c->task_dim,
         (double)c->temperature);
  if (c->pruned)
    printf("%s_pruned},\n", name);
  else
    printf("0},\n");
  if (v->T)
    printf("  %s_tasks, %d, ", name, (int)v->T);
  else
    printf("  0, 0, ");
  printf("%s_floats, %lu, ", name, (unsigned long)v->count);
  if (v->int8)
    printf("%s_int8, %lu};\n", name, (unsigned long)v->int8_count);
  else
    printf("0, 0};\n");
}

/* Writes NAME, the moe_view, and what it points to; then the bytes that it needs at run time. */
static void carray_write(const char *name, const moe_model *model, const moe_limits *limits) {
  moe_env scalar;
  moe_view v;
  size_t block, context;
  const char *c = name;
  if (!*c ||
      strspn(c, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789") != strlen(c) ||
      (*c >= '0' && *c <= '9'))
    die("%s cannot be a name in C", name);
  moe_env_init(&scalar, MOE_ISA_SCALAR);
  scalar.log = env.log;
  need(moe_view_of(&v, model, &scalar));
  need(moe_model_view_size(&v, &block, &scalar));
  need(moe_context_size(model, limits, &context, &scalar));
  printf(
      "/* Made by convert --c-array %s: moe_model_view(&model, &%s, ...). Include it after moe.h. "
      "*/\n",
      name, name);
  carray_floats(name, v.floats, v.count);
  if (v.int8) carray_bytes("int8_t", name, "int8", v.int8, v.int8_count);
  if (v.config.pruned)
    carray_bytes("uint8_t", name, "pruned", v.config.pruned,
                 (size_t)(v.config.layers * v.config.experts));
  carray_tasks(name, model);
  carray_view(name, &v);
  printf(
      "/* Bytes of the blocks of the model and of a context of %d tokens in %d sequences, where\n"
      "   pointers have 64 bits; with pointers of 32 bits somewhat less is enough. The stack: 4.5 "
      "KB on a\n   Cortex-M (STACK in moe.h). */\n",
      (int)limits->tokens, (int)limits->sequences);
  printf("enum { %s_MODEL_BYTES = %lu, %s_CONTEXT_BYTES = %lu };\n", name, (unsigned long)block,
         name, (unsigned long)context);
}
#endif
