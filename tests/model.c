/* Whole models: tensors and sizes, kinds of tasks, scores against PyTorch, routers of every kind,
   tasks taken out and added, models without any, what the papers ask for. */
#include <stdint.h>

/* A kind of tasks beside those of the library: model/kinds.c. */
static float kinds_absolute_loss(float *dscore, float *row, float label, int32_t classes,
                                 int32_t batch_size);
#define MOE__KINDS_MORE {"absolute", 1, 1, 0, 0, kinds_absolute_loss},

#include "alloc.h"
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "models.h"

#include "model/model.c"
#include "model/kinds.c"
#include "model/level.c"
#include "model/extract.c"
#include "model/adapt.c"
#include "model/paper.c"
#include "model/embedding.c"
#include "model/view.c"
#include "model/no_tasks.c"
#ifndef _WIN32 /* memory that faults is a matter of POSIX here */
#include "model/poison.c"
#endif
#include "model/limits.c"

int main(int argc, char **argv) {
  test_begin(argc, argv);
  PART(model);
  PART(kinds);
  PART(level);
  PART(extract);
  PART(adapt);
  PART(paper);
  PART(embedding);
  PART(view);
  PART(no_tasks);
#ifndef _WIN32
  PART(poison);
#endif
  PART(limits);
  return test_end();
}
