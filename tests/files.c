/* What comes from outside and goes there: JSON, safetensors, model files, published encoders,
   checkpoints. */
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "models.h"
#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define HAVE_POSIX 1
#endif

#include "files/files.c"
#include "files/json.c"
#include "files/import.c"
#include "files/checkpoint.c"
#include "files/v01.c"

int main(int argc, char **argv) {
  test_begin(argc, argv);
  PART(files);
  PART(json);
  PART(import);
  PART(checkpoint);
  PART(v01);
  return test_end();
}
