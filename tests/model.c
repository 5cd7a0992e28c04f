/* Whole models: tensors and sizes, scores against PyTorch, routers of every kind, tasks taken out and
   added, what the papers ask for. */
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "models.h"

#include "model/model.c"
#include "model/level.c"
#include "model/extract.c"
#include "model/adapt.c"
#include "model/paper.c"
#include "model/embedding.c"
#ifndef _WIN32 /* memory that faults is a matter of POSIX here */
#include "model/poison.c"
#endif

int main(int argc, char **argv) {
  test_begin(argc, argv);
  PART(model);
  PART(level);
  PART(extract);
  PART(adapt);
  PART(paper);
  PART(embedding);
#ifndef _WIN32
  PART(poison);
#endif
  return test_end();
}
