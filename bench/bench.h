/* bench.h - what the C programs of bench/ share: the clock, percentiles, and the protocol of bench/run.py.
   Served programs print one JSON line when they are ready; then each line on standard input is a number of seconds, and for some programs a
   word that says what to measure: the program repeats its call at least once and for that long, and answers with one line "median_seconds
   minimum calls". At the end of the input they print {"peak_mb": ...}. So run.py can let programs take turns without starting them again. */
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

/* Gives each thread of this process a core of its own, as OMP_PROC_BIND does for the peers: on a machine that is not quite idle the system
   may put two that wake each other on one core. Does nothing where there are more threads than cores. */
static inline void bench_pin(int threads) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  struct dirent *entry;
  DIR *tasks;
  int cpu = 0;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || threads < 2 || threads > CPU_COUNT(&allowed)) return;
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

/* Calls once(arg) for at least `seconds`; median and minimum of the calls. Returns their number, 0 where once fails. */
static inline int bench_repeat(double *median, double *minimum, double seconds, int (*once)(void *arg), void *arg) {
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

/* Answers the lines of standard input. choose(arg, word) makes ready for another word and calls it once; NULL: no words. Returns the exit
   status. */
static inline int bench_serve(int (*once)(void *arg), int (*choose)(void *arg, const char *word), void *arg) {
  char line[128], word[64], last[64] = "";
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    double seconds = 0, median = 0, minimum = 0;
    int n = sscanf(line, "%lf %63s", &seconds, word);
    if (n == 2 && choose != NULL && strcmp(word, last) != 0) {
      if (choose(arg, word) != 0) return fprintf(stderr, "cannot measure %s\n", word), 1;
      strcpy(last, word);
    }
    n = bench_repeat(&median, &minimum, seconds, once, arg);
    if (n == 0) return 1;
    printf("%.9f %.9f %d\n", median, minimum, n);
    fflush(stdout);
  }
  printf("{\"peak_mb\": %.1f}\n", bench_peak_mb());
  return 0;
}
#endif
