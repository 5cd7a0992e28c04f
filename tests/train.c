/* Training: the optimizer, the order of rows, the trainer, routers in place of gates. */
#include "alloc.h"
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "models.h"

#include "train/optimizer.c"
#include "train/sampler.c"
#include "train/trainer.c"
#include "train/routers.c"

int main(int argc, char **argv) {
  test_begin(argc, argv);
  PART(optimizer);
  PART(sampler);
  PART(trainer);
  PART(routers);
  return test_end();
}
