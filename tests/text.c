/* From text to answers: the tokenizer, metrics, the predictor, a published model. */
#include "alloc.h"
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "models.h"

#include "text/text.c"
#include "text/settings.c"
#include "text/metrics.c"
#include "text/predictor.c"
#include "text/minilm.c"

int main(int argc, char **argv) {
  test_begin(argc, argv);
  PART(text);
  PART(settings);
  PART(metrics);
  PART(predictor);
  PART(minilm);
  return test_end();
}
