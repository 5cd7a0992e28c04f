/* An allocator that counts blocks and bytes, and fails at the allocation with the number `fail_at`.
   Include it before moe.h. */
#ifndef ALLOC_H
#define ALLOC_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
enum { COUNTED_HEAD = 64 }; /* bytes before a block, which hold its size */
static int allocations, blocks_in_use, fail_at = -1;
static size_t bytes_in_use, bytes_most;
/* threads may allocate, too */
#ifdef __GNUC__
#define COUNTED_ADD(what, n) __atomic_fetch_add(&what, n, __ATOMIC_RELAXED)
#else
#define COUNTED_ADD(what, n) ((what += (n)) - (n))
#endif
static void *counted_malloc(size_t bytes) {
  unsigned char *p;
  size_t now, most;
  if (COUNTED_ADD(allocations, 1) == fail_at || bytes > SIZE_MAX - COUNTED_HEAD) return NULL;
  p = (unsigned char *)malloc(bytes + COUNTED_HEAD);
  if (!p) return NULL;
  memcpy(p, &bytes, sizeof bytes);
  COUNTED_ADD(blocks_in_use, 1);
  now = COUNTED_ADD(bytes_in_use, bytes) + bytes;
  most = COUNTED_ADD(bytes_most, 0);
  if (now > most) COUNTED_ADD(bytes_most, now - most);
  return p + COUNTED_HEAD;
}
static void counted_free(void *block) {
  size_t bytes;
  if (!block) return;
  memcpy(&bytes, (unsigned char *)block - COUNTED_HEAD, sizeof bytes);
  COUNTED_ADD(blocks_in_use, -1);
  COUNTED_ADD(bytes_in_use, 0 - bytes);
  free((unsigned char *)block - COUNTED_HEAD);
}
#define MOE_MALLOC(n) counted_malloc(n)
#define MOE_FREE(p) counted_free(p)
#endif
