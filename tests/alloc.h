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
static void *counted_malloc(size_t bytes) {
  unsigned char *p;
  if (allocations++ == fail_at || bytes > SIZE_MAX - COUNTED_HEAD) return NULL;
  p = (unsigned char *)malloc(bytes + COUNTED_HEAD);
  if (!p) return NULL;
  memcpy(p, &bytes, sizeof bytes);
  ++blocks_in_use;
  bytes_in_use += bytes;
  if (bytes_in_use > bytes_most) bytes_most = bytes_in_use;
  return p + COUNTED_HEAD;
}
static void counted_free(void *block) {
  size_t bytes;
  if (!block) return;
  memcpy(&bytes, (unsigned char *)block - COUNTED_HEAD, sizeof bytes);
  --blocks_in_use;
  bytes_in_use -= bytes;
  free((unsigned char *)block - COUNTED_HEAD);
}
#define MOE_MALLOC(n) counted_malloc(n)
#define MOE_FREE(p) counted_free(p)
#endif
