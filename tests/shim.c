/* shim.c - makes the n-th call of a function fail in any program, or kills the program there
     cc -shared -fPIC -o shim.so tests/shim.c -ldl
     LD_PRELOAD=./shim.so SHIM_COUNT=counts ./train ...          counts the calls, "write 12" ...
     LD_PRELOAD=./shim.so SHIM_FAIL=write:3 ./train ...          the third write fails, once
     LD_PRELOAD=./shim.so SHIM_FAIL=malloc:100+ ./train ...      so do the 100th and all after it
     LD_PRELOAD=./shim.so SHIM_FAIL=kill:7 ./train ...           SIGKILL before the 7th call of any
                                                                 but malloc; half of a write is done
     LD_PRELOAD=./shim.so SHIM_AFTER=1500 ./train ...            SIGKILL after so many microseconds
     ... SHIM_SIGNAL=15 ...                                      that signal in place of SIGKILL
   For glibc on Linux. Streams of stdio go through open, read, write and close here, too; stderr and
   what the C library does by itself (memory from the system, say) are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);

/* what may fail, and how */
#define CALLS(X)                                                                                   \
  X(malloc, ENOMEM)                                                                                \
  X(write, ENOSPC)                                                                                 \
  X(short, 0) /* a write of half of the bytes */                                                   \
  X(read, EIO)                                                                                     \
  X(open, EACCES)                                                                                  \
  X(close, EIO)                                                                                    \
  X(fsync, EIO)                                                                                    \
  X(rename, EACCES)                                                                                \
  X(unlink, EACCES)                                                                                \
  X(stat, EIO)                                                                                     \
  X(ftruncate, EIO)                                                                                \
  X(flock, ENOLCK)                                                                                 \
  X(mmap, ENOMEM)                                                                                  \
  X(thread, EAGAIN)                                                                                \
  X(kill, 0)
enum {
#define CALL_ENUM(name, error) CALL_##name,
  CALLS(CALL_ENUM) CALL_COUNT
};
static const struct {
  const char *name;
  int error;
} calls[] = {
#define CALL_ROW(name, error) {#name, error},
    CALLS(CALL_ROW)};

static long count[CALL_COUNT], when; /* calls so far; the one that fails, 0: none */
static int which = -1, from_then_on, armed, signal_sent = SIGKILL;

#define REAL(name)                                                                                 \
  static int (*real)();                                                                            \
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, name)

static int hit(int call) {
  long n = __sync_add_and_fetch(&count[call], 1);
  return armed && which == call && when && (from_then_on ? n >= when : n == when);
}

/* Whether this call fails; the program may end here. */
static int fails(int call) {
  if (!armed) return 0;
  if (call != CALL_malloc && hit(CALL_kill)) kill(getpid(), signal_sent);
  if (!hit(call)) return 0;
  errno = calls[call].error;
  return 1;
}

/* ---- memory ---- */

void *malloc(size_t n) { return fails(CALL_malloc) ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return fails(CALL_malloc) ? NULL : __libc_calloc(n, size); }
void *realloc(void *p, size_t n) { return fails(CALL_malloc) ? NULL : __libc_realloc(p, n); }
void *aligned_alloc(size_t at, size_t n) {
  return fails(CALL_malloc) ? NULL : __libc_memalign(at, n);
}
int posix_memalign(void **p, size_t at, size_t n) {
  void *q = aligned_alloc(at, n);
  if (q) *p = q;
  return q ? 0 : ENOMEM;
}

/* ---- files ---- */

ssize_t write(int fd, const void *data, size_t n) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "write");
  if (armed && hit(CALL_kill)) {
    if (signal_sent == SIGKILL && real(fd, data, n / 2) < 0) return -1;
    kill(getpid(), signal_sent);
  }
  if (armed && hit(CALL_write)) return errno = ENOSPC, -1;
  if (armed && hit(CALL_short)) n -= n / 2;
  return real(fd, data, n);
}

ssize_t read(int fd, void *data, size_t n) {
  static ssize_t (*real)(int, void *, size_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "read");
  return fails(CALL_read) ? -1 : real(fd, data, n);
}

int open(const char *path, int flags, ...) {
  static int (*real)(const char *, int, ...);
  va_list args;
  int mode = 0;
  va_start(args, flags);
  if (flags & O_CREAT) mode = va_arg(args, int);
  va_end(args);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "open");
  return fails(CALL_open) ? -1 : real(path, flags, mode);
}

/* A file is closed even if that fails, as on Linux. */
int close(int fd) {
  REAL("close");
  if (!fails(CALL_close)) return real(fd);
  real(fd);
  return errno = EIO, -1;
}

/* Nothing is flushed: no test here cuts the power, and it takes most of the time. */
int fsync(int fd) {
  (void)fd;
  return fails(CALL_fsync) ? -1 : 0;
}

int rename(const char *from, const char *to) {
  REAL("rename");
  return fails(CALL_rename) ? -1 : real(from, to);
}

int unlink(const char *path) {
  REAL("unlink");
  return fails(CALL_unlink) ? -1 : real(path);
}

int remove(const char *path) {
  REAL("remove");
  return fails(CALL_unlink) ? -1 : real(path);
}

int stat(const char *path, struct stat *s) {
  REAL("stat");
  return fails(CALL_stat) ? -1 : real(path, s);
}

int lstat(const char *path, struct stat *s) {
  REAL("lstat");
  return fails(CALL_stat) ? -1 : real(path, s);
}

int fstat(int fd, struct stat *s) {
  REAL("fstat");
  return fails(CALL_stat) ? -1 : real(fd, s);
}

int ftruncate(int fd, off_t n) {
  static int (*real)(int, off_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "ftruncate");
  return fails(CALL_ftruncate) ? -1 : real(fd, n);
}

int flock(int fd, int how) {
  REAL("flock");
  return fails(CALL_flock) ? -1 : real(fd, how);
}

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) {
  static void *(*real)(void *, size_t, int, int, int, off_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "mmap");
  return fails(CALL_mmap) ? MAP_FAILED : real(at, n, protection, flags, fd, offset);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *arg) {
  static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
  return fails(CALL_thread) ? EAGAIN : real(thread, how, run, arg);
}

/* ---- streams, made of the calls above ---- */

static ssize_t stream_read(void *fd, char *data, size_t n) { return read(*(int *)fd, data, n); }
static ssize_t stream_write(void *fd, const char *data, size_t n) {
  ssize_t got = write(*(int *)fd, data, n);
  return got < 0 ? 0 : got; /* what stdio takes for an error */
}
static int stream_close(void *fd) {
  int bad = close(*(int *)fd);
  free(fd);
  return bad;
}

static FILE *stream(int fd, const char *mode) {
  cookie_io_functions_t with = {stream_read, stream_write, NULL, stream_close};
  int *cookie = (int *)malloc(sizeof *cookie);
  FILE *f = NULL;
  if (cookie) *cookie = fd, f = fopencookie(cookie, mode, with);
  if (!f) free(cookie), close(fd);
  return f;
}

FILE *fopen(const char *path, const char *mode) {
  int flags = *mode == 'r'   ? O_RDONLY
              : *mode == 'w' ? O_WRONLY | O_CREAT | O_TRUNC
                             : O_WRONLY | O_CREAT | O_APPEND;
  int fd = open(path, flags, 0666);
  return fd < 0 ? NULL : stream(fd, mode);
}

/* ---- begin and end ---- */

static void on_alarm(int signal_number) {
  (void)signal_number;
  kill(getpid(), signal_sent);
}

__attribute__((constructor)) static void begin(void) {
  const char *fail = getenv("SHIM_FAIL"), *after = getenv("SHIM_AFTER"), *n;
  struct itimerval timer = {{0, 0}, {0, 0}};
  FILE *in = stream(0, "r"), *out = stream(1, "w");
  if (in) stdin = in;
  if (out) stdout = out;
  if (fail && (n = strchr(fail, ':')) != NULL) {
    for (which = CALL_COUNT - 1; which >= 0; --which)
      if (!strncmp(calls[which].name, fail, (size_t)(n - fail)) &&
          strlen(calls[which].name) == (size_t)(n - fail))
        break;
    when = atol(n + 1);
    from_then_on = strchr(n, '+') != NULL;
  }
  if (getenv("SHIM_SIGNAL")) {
    signal_sent = atoi(getenv("SHIM_SIGNAL"));
    signal(signal_sent, SIG_DFL); /* a shell ignores SIGINT in the background */
  }
  if (after) {
    timer.it_value.tv_sec = atol(after) / 1000000;
    timer.it_value.tv_usec = atol(after) % 1000000;
    signal(SIGALRM, on_alarm);
    setitimer(ITIMER_REAL, &timer, NULL);
  }
  armed = 1;
}

__attribute__((destructor)) static void end(void) {
  const char *path = getenv("SHIM_COUNT");
  char table[512];
  int i, n = 0, fd;
  fflush(stdout);
  armed = 0;
  if (!path || (fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666)) < 0) return;
  for (i = 0; i < CALL_COUNT; ++i)
    n += snprintf(table + n, sizeof table - (size_t)n, "%s %ld\n", calls[i].name, count[i]);
  if (write(fd, table, (size_t)n) < 0) n = 0;
  close(fd);
}
