/* Single operations of a network, forward and backward: against their formulas in double, against
   PyTorch, and bit for bit on every instruction set. */
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "models.h"
#include "ops.h"

#include "ops/ops.c"
#include "ops/linear.c"
#include "ops/attention.c"
#include "ops/route.c"
#include "ops/experts.c"
#include "ops/heads.c"
#include "ops/guard.c"

int main(int argc, char **argv) {
  test_begin(argc, argv);
  PART(ops);
  PART(linear);
  PART(attention);
  PART(route);
  PART(experts);
  PART(heads);
  PART(guard);
  return test_end();
}
