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
#if defined(__linux__)
/* The fsync of this program: the C library's is not asked. */
#include <errno.h>
#define HAVE_FSYNC 1
static int fsync_fails, fsync_calls; /* errno of each call, 0: success */
int fsync(int fd) {
  (void)fd;
  ++fsync_calls;
  errno = fsync_fails;
  return fsync_fails ? -1 : 0;
}
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
