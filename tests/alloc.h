/* An allocator that counts, and fails at the allocation with the number `fail_at`. Include it
   before moe.h. */
#ifndef ALLOC_H
#define ALLOC_H
#include <stdlib.h>
static int allocations, blocks_in_use, fail_at = -1;
static void *counted_malloc(size_t bytes) {
  void *p;
  if (allocations++ == fail_at) return NULL;
  p = malloc(bytes);
  if (p) ++blocks_in_use;
  return p;
}
static void counted_free(void *p) {
  if (p) --blocks_in_use;
  free(p);
}
#define MOE_MALLOC(n) counted_malloc(n)
#define MOE_FREE(p) counted_free(p)
#endif
