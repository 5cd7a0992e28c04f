/* libc.h in C: memory.copy and memory.fill of WebAssembly, and blocks in sizes of powers of 2. */
#include "libc.h"

void *memcpy(void *to, const void *from, size_t n) { return __builtin_memcpy(to, from, n); }
void *memmove(void *to, const void *from, size_t n) { return __builtin_memmove(to, from, n); }
void *memset(void *p, int c, size_t n) { return __builtin_memset(p, c, n); }

int memcmp(const void *a, const void *b, size_t n) {
  const unsigned char *x = (const unsigned char *)a, *y = (const unsigned char *)b;
  for (; n; --n, ++x, ++y)
    if (*x != *y) return *x < *y ? -1 : 1;
  return 0;
}

void *memchr(const void *p, int c, size_t n) {
  const unsigned char *at = (const unsigned char *)p;
  for (; n; --n, ++at)
    if (*at == (unsigned char)c) return (void *)at;
  return NULL;
}

size_t strlen(const char *s) {
  const char *end = s;
  while (*end) ++end;
  return (size_t)(end - s);
}

int strcmp(const char *a, const char *b) {
  while (*a && *a == *b) ++a, ++b;
  return (unsigned char)*a - (unsigned char)*b;
}

int strncmp(const char *a, const char *b, size_t n) {
  for (; n && *a && *a == *b; --n) ++a, ++b;
  return n ? (unsigned char)*a - (unsigned char)*b : 0;
}

char *strchr(const char *s, int c) {
  for (; *s != (char)c; ++s)
    if (!*s) return NULL;
  return (char *)s;
}

size_t strcspn(const char *s, const char *set) {
  size_t n = 0;
  while (s[n] && !memchr(set, s[n], strlen(set))) ++n;
  return n;
}

char *strstr(const char *s, const char *what) {
  size_t n = strlen(what);
  for (; *s; ++s)
    if (!strncmp(s, what, n)) return (char *)s;
  return n ? NULL : (char *)s;
}

/* A block begins 64 bytes behind its header, which holds the number of its size; a freed block
   waits in the list of its size. */
enum { HEADER = 64, PAGE = 65536 };
typedef struct block {
  struct block *next;
  int size;
} block;
extern unsigned char __heap_base;
static block *waiting[32];
static size_t top;

void *malloc(size_t bytes) {
  block *b;
  int size = 7;
  while (size < 31 && ((size_t)1 << size) - HEADER < bytes) ++size;
  if (((size_t)1 << size) - HEADER < bytes) return NULL;
  b = waiting[size];
  if (b)
    waiting[size] = b->next;
  else {
    size_t begin = top ? top : ((size_t)&__heap_base + HEADER - 1) / HEADER * HEADER;
    size_t end = begin + ((size_t)1 << size), have = __builtin_wasm_memory_size(0) * PAGE;
    if (end < begin) return NULL;
    if (end > have && __builtin_wasm_memory_grow(0, (end - have + PAGE - 1) / PAGE) == (size_t)-1)
      return NULL;
    top = end;
    b = (block *)begin;
    b->size = size;
  }
  return (char *)b + HEADER;
}

void free(void *p) {
  block *b;
  if (!p) return;
  b = (block *)((char *)p - HEADER);
  b->next = waiting[b->size];
  waiting[b->size] = b;
}
