/* shards.h - weights in several files: model.safetensors.index.json names the file of each tensor

     shards s = begin_shards();
     read_index(&s, json, bytes);
     for (i = 0; i < s.files.n; ++i) add_shard(&s, i, file, file_bytes);
     whole = end_shards(&s);        the bytes of one safetensors file

   Reading JSON and safetensors is moe.h's, which cli.h includes whole. */
#ifndef TOOLS_SHARDS_H
#define TOOLS_SHARDS_H
#include "cli.h"

typedef struct shards {
  list files;        /* their names */
  int *wanted, room; /* how many tensors the index names in each */
  text header, data; /* of the whole file */
} shards;

static inline shards begin_shards(void) {
  shards s;
  memset(&s, 0, sizeof s);
  return s;
}

/* The number of a file, which joins if it is new. */
static inline int shard_number(shards *s, const char *name) {
  int i = s->files.n;
  while (i-- > 0)
    if (!strcmp(s->files.at[i], name)) return i;
  if (!*name || strpbrk(name, "/\\:")) die("weight_map: \"%s\" is not a file beside it", name);
  if (s->files.n == s->room) {
    s->room = 2 * s->room + 16;
    s->files.at = (char **)grow(s->files.at, (size_t)s->room, sizeof *s->files.at);
    s->wanted = (int *)grow(s->wanted, (size_t)s->room, sizeof *s->wanted);
  }
  s->files.at[s->files.n] = printed("%s", name);
  s->wanted[s->files.n] = 0;
  return s->files.n++;
}

/* The index: {"weight_map": {"tensor": "file", ...}, ...}. */
static inline void read_index(shards *s, const char *json, size_t bytes) {
  moe__json j;
  moe__json_text key, value;
  char name[256];
  int i;
  moe__json_init(&j, json, bytes, 0);
  moe__json_enter(&j, '{');
  while (moe__json_more(&j, '}') && moe__json_key(&j, &key))
    if (!moe__json_is(&key, "weight_map"))
      moe__json_skip(&j);
    else if (moe__json_enter(&j, '{'))
      while (moe__json_more(&j, '}') && moe__json_key(&j, &key) && moe__json_string(&j, &value)) {
        if (moe__json_copy(name, sizeof name, &value) >= sizeof name)
          die("weight_map: a name of 256 bytes or more");
        i = shard_number(s, name); /* which may move s->wanted */
        ++s->wanted[i];
      }
  if (!moe__json_finish(&j)) die("byte %lld: %s", (long long)(j.at - json) + 1, j.error);
  if (!s->files.n) die("there is no weight_map");
}

/* The tensors of file i: as many as the index names. */
static inline void add_shard(shards *s, int i, const void *file, size_t bytes) {
  moe__st st;
  moe__json j;
  moe__st_tensor t;
  int n = 0, k;
  need(moe__st_open(&st, file, bytes, &env));
  moe__st_begin(&st, &j);
  for (; moe__st_next(&st, &j, &t); ++n) {
    put(&s->header, "%s\"", s->header.bytes ? "," : "{");
    put_bytes(&s->header, t.key.begin.at, (size_t)(t.key.end - t.key.begin.at));
    put(&s->header, "\":{\"dtype\":\"%s\",\"shape\":[",
        t.dtype == MOE__DTYPES ? "unknown" : moe__dtype_name[t.dtype]);
    for (k = 0; k < t.dims; ++k) put(&s->header, k ? ",%zu" : "%zu", t.shape[k]);
    put(&s->header, "],\"data_offsets\":[%zu,%zu]}", s->data.bytes + t.begin,
        s->data.bytes + t.end);
  }
  if (n != s->wanted[i])
    die("%d tensors, but the index names %d in it: are these files of one model?", n, s->wanted[i]);
  put_bytes(&s->data, (const char *)st.data, st.data_bytes);
}

/* The whole file, to be freed. */
static inline text end_shards(shards *s) {
  text out = {NULL, 0, 0};
  char length[8];
  uint64_t n;
  int i;
  put(&s->header, "%s", s->header.bytes ? "}" : "{}");
  n = s->header.bytes;
  for (i = 0; i < 8; ++i) length[i] = (char)(n >> 8 * i);
  put_bytes(&out, length, 8);
  put_bytes(&out, s->header.data, s->header.bytes);
  put_bytes(&out, s->data.data ? s->data.data : "", s->data.bytes);
  free(s->header.data), free(s->data.data), free(s->files.at), free(s->wanted);
  return out;
}

/* Reads the files that an index names, beside it. */
static inline text read_shards(const char *path) {
  shards s = begin_shards();
  size_t bytes;
  void *file;
  int i;
  need(moe_file_read(&file, &bytes, path, &env));
  read_from(path, 0);
  read_index(&s, (char *)file, bytes);
  moe_free(file);
  for (i = 0; i < s.files.n; ++i) {
    const char *part = printed("%.*s%s", (int)(file_name(path) - path), path, s.files.at[i]);
    read_from(NULL, 0);
    need(moe_file_read(&file, &bytes, part, &env));
    read_from(part, 0);
    add_shard(&s, i, file, bytes);
    moe_free(file);
  }
  read_from(NULL, 0);
  return end_shards(&s);
}
#endif
