/* What comes from outside and goes there: JSON, safetensors, model files, published encoders,
   checkpoints. */
#include "alloc.h"
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "models.h"
#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define HAVE_POSIX 1
#endif
#if defined(__linux__)
/* fsync, read and write of this program, before those of the C library: they fail on request. */
#include <errno.h>
#include <sys/syscall.h>
#define HAVE_FSYNC 1
extern long syscall(long number, ...);
static int fsync_fails, fsync_calls; /* errno of each call, 0: success */
static size_t io_most;               /* bytes of a call of read or write; 0: all */
static int io_fails;                 /* errno of the third call, and of each third one behind it */
static unsigned io_calls;
static size_t io_largest; /* bytes that a call asked for */

int fsync(int fd) {
  (void)fd;
  ++fsync_calls;
  errno = fsync_fails;
  return fsync_fails ? -1 : 0;
}

/* 1: this call fails, errno says how. */
static int io_stops(size_t *bytes) {
  if (*bytes > io_largest) io_largest = *bytes;
  if (!io_most) return 0;
  if (*bytes > io_most) *bytes = io_most;
  if (++io_calls % 3) return 0;
  errno = io_fails ? io_fails : EINTR;
  return 1;
}

ssize_t read(int fd, void *to, size_t bytes) {
  return io_stops(&bytes) ? -1 : (ssize_t)syscall(SYS_read, fd, to, bytes);
}

ssize_t write(int fd, const void *from, size_t bytes) {
  return io_stops(&bytes) ? -1 : (ssize_t)syscall(SYS_write, fd, from, bytes);
}
#endif

#include "files/files.c"
#include "files/json.c"
#include "files/import.c"
#include "files/checkpoint.c"
#include "files/v01.c"
#include "files/threads.c"

int main(int argc, char **argv) {
  test_begin(argc, argv);
  PART(files);
  PART(json);
  PART(import);
  PART(checkpoint);
  PART(v01);
  PART(threads);
  if (test_is_argument("race")) PART(race);
  return test_end();
}
