/* bench.h - what the C programs of bench/ share: the clock, percentiles, and the protocol of
   bench/run.py. Served programs print one JSON line when they are ready; then each line on standard
   input is a number of seconds, a word that says what to measure, and the number of threads:
   "SECONDS [WORD [THREADS]]". The program repeats its call at least once and for that long, and
   answers with one line "median_seconds minimum calls [operations bytes tokens]", of which
   bench_step knows the last three. At the end of the input they print {"peak_mb": ...}. So run.py
   can let programs take turns without starting them again. */
#ifndef BENCH_H_INCLUDED
#define BENCH_H_INCLUDED
#if !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#define _GNU_SOURCE
#endif
#ifndef BENCH_LINKED /* the Makefile compiles moe.h once for all programs */
#define MOE_IMPLEMENTATION
#endif
#include "../moe.h"
#include "../tests/golden/golden.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#if defined(__linux__)
#include <dirent.h>
#include <sched.h>
#endif

#define BENCH_CALLS 4096

static inline double bench_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline double bench_peak_mb(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return (double)usage.ru_maxrss / 1024;
}

static inline int bench_by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

static inline void bench_log(void *user, moe_status status, const char *sentence) {
  (void)status;
  fprintf(stderr, "%s: %s\n", (const char *)user, sentence);
}

#if defined(__linux__)
/* The cores that this process was started on. */
static inline const cpu_set_t *bench_cores(void) {
  static cpu_set_t cores;
  static int known;
  if (!known) known = sched_getaffinity(0, sizeof cores, &cores) == 0;
  return &cores;
}
#endif

/* Lets the calling thread use all cores again, before it starts others: they inherit what it may
   use. */
static inline void bench_unpin(void) {
#if defined(__linux__)
  (void)sched_setaffinity(0, sizeof(cpu_set_t), bench_cores());
#endif
}

/* Keeps the calling thread on the core of that number; on any where there are not so many. */
static inline void bench_pin_self(int index) {
#if defined(__linux__)
  cpu_set_t one;
  int cpu;
  for (cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, bench_cores()) || index-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    (void)sched_setaffinity(0, sizeof one, &one);
    return;
  }
#else
  (void)index;
#endif
}

/* Gives each thread of this process a core of its own, as OMP_PROC_BIND does for the peers: on a
   machine that is not quite idle the system may put two that wake each other on one core. Does
   nothing where there are more threads than cores. */
static inline void bench_pin(int threads) {
#if defined(__linux__)
  cpu_set_t allowed = *bench_cores(), one;
  struct dirent *entry;
  DIR *tasks;
  int cpu = 0;
  if (threads > CPU_COUNT(&allowed)) return;
  tasks = opendir("/proc/self/task");
  while (tasks != NULL && (entry = readdir(tasks)) != NULL) {
    if (entry->d_name[0] == '.') continue;
    while (cpu < CPU_SETSIZE && !CPU_ISSET(cpu, &allowed)) ++cpu;
    if (cpu == CPU_SETSIZE) break;
    CPU_ZERO(&one);
    CPU_SET(cpu++, &one);
    (void)sched_setaffinity((pid_t)atoi(entry->d_name), sizeof one, &one);
  }
  if (tasks != NULL) closedir(tasks);
#else
  (void)threads;
#endif
}

/* Another number of threads for env: a pool, with a core for each thread; no more than there are
   cores. Returns 1 where the system refuses. */
static inline int bench_threads(moe_pool **pool, int threads, moe_env *env) {
  moe_pool_free(*pool);
  *pool = NULL;
  bench_unpin();
  if (moe_pool_create(pool, threads, env) != MOE_OK) return 1;
  bench_pin(env->threads);
  return 0;
}

/* Calls once(arg) for at least `seconds`; median and minimum of the calls. Returns their number, 0
   where once fails. */
static inline int bench_repeat(double *median, double *minimum, double seconds,
                               int (*once)(void *arg), void *arg) {
  static double times[BENCH_CALLS];
  double begin = bench_now(), last = begin;
  int n = 0;
  do {
    double t;
    if (once(arg) != 0) return 0;
    t = bench_now();
    times[n++] = t - last;
    last = t;
  } while (n < BENCH_CALLS && last - begin < seconds);
  qsort(times, (size_t)n, sizeof *times, bench_by_value);
  *median = n % 2 ? times[n / 2] : (times[n / 2 - 1] + times[n / 2]) / 2;
  *minimum = times[0];
  return n;
}

/* What answers the lines of standard input. */
typedef struct bench_server {
  void *arg;
  int (*once)(void *arg); /* the call that is measured; not 0: failed */
  int (*choose)(
      void *arg, const char *word,
      int threads); /* makes ready for another word or number of threads, first call and all */
  void (*count)(void *arg, double *operations, double *bytes,
                int *tokens); /* of a call; NULL: not told */
} bench_server;

/* Returns the exit status. */
static inline int bench_serve(const bench_server *server) {
  char line[128], word[64], last[64] = "";
  int threads = 1, before = 0;
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    double seconds = 0, median = 0, minimum = 0;
    int n = sscanf(line, "%lf %63s %d", &seconds, word, &threads);
    if (n >= 2 && (strcmp(word, last) != 0 || threads != before)) {
      if (server->choose(server->arg, word, threads) != 0)
        return fprintf(stderr, "cannot measure %s\n", word), 1;
      strcpy(last, word);
      before = threads;
    }
    n = bench_repeat(&median, &minimum, seconds, server->once, server->arg);
    if (n == 0) return 1;
    printf("%.9f %.9f %d", median, minimum, n);
    if (server->count != NULL) {
      double operations, bytes;
      int tokens;
      server->count(server->arg, &operations, &bytes, &tokens);
      printf(" %.0f %.0f %d", operations, bytes, tokens);
    }
    printf("\n");
    fflush(stdout);
  }
  printf("{\"peak_mb\": %.1f}\n", bench_peak_mb());
  return 0;
}
#endif
