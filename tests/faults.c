/* faults.c - runs a program again and again with shim.c: each of its calls fails in turn, and it is
   killed at each of them and at random moments. test_faults.sh says which programs.
     ./faults NAME [SETTING=VALUE ...] -- ../PROGRAM ARGUMENTS
       older=DIR         the folder that a run begins with; the program runs in a copy, NAME.run
       in=FILE           its standard input; pipe=1: through a pipe
       out="FILES"       what it writes
       says=TEXT         what begins a line of its sentences ["PROGRAM: "]
       calls="CALLS"     of these each one fails; malloc+: it and all behind it
       kills="SIGNALS"   at every call of the system
       moments=N         SIGKILL at so many random moments; seed=N
       most=N, stops=N   at most so many calls of a kind, and so many kills of a kind
       resume=1          afterwards it goes on with --resume ck, where that is there
   A run must end with status 0 and the same output as without the failure, or with status 1, a
   sentence, and every older file as it was or whole and new; the same command then ends as if
   nothing had been. Needs shim.so and convert in the current folder. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 64, PATH_BYTES = 1024, LIMIT = 60 /* seconds of one run */ };
static const int kill_again = 3; /* a call with so many failures is not tried any more */

static struct {
  const char *name, *older, *in, *says, *program;
  char *out[WORDS], *calls[WORDS], *kills[WORDS], *argv[WORDS + 3];
  long most, stops, moments, seed, microseconds;
  int argc, resume, pipe;
} job;
static char here[PATH_BYTES / 4], good[PATH_BYTES / 2], run[PATH_BYTES / 2];
static char why[4096];
static int status, passed, failed, failing_calls, killed_runs;
static volatile sig_atomic_t child, late;

/* Adds to what is wrong with a run. */
static void wrong(const char *format, ...) {
  size_t n = strlen(why);
  va_list args;
  va_start(args, format);
  if (n) n += (size_t)snprintf(why + n, sizeof why - n, "; ");
  if (n < sizeof why) vsnprintf(why + n, sizeof why - n, format, args);
  va_end(args);
}

static void stop(const char *what) {
  printf("  FAIL  test_faults_%s\n        %s: %s\n0 passed, 1 failed, 0 skipped\n", job.name, what,
         strerror(errno));
  exit(1);
}

static const char *in_folder(const char *folder, const char *file) {
  static char path[4][PATH_BYTES];
  static int next;
  char *p = path[next = (next + 1) % 4];
  if (snprintf(p, PATH_BYTES, "%s/%s", folder, file) >= PATH_BYTES) stop("a long path");
  return p;
}

/* ---- files ---- */

typedef struct text {
  char *data; /* NULL: there is no such file */
  size_t n;
} text;

static text read_file(const char *path) {
  text t = {NULL, 0};
  struct stat s;
  int fd = open(path, O_RDONLY);
  ssize_t got = 0;
  if (fd < 0) return t;
  if (fstat(fd, &s) || !(t.data = (char *)malloc((size_t)s.st_size + 1))) stop(path);
  while (t.n < (size_t)s.st_size && (got = read(fd, t.data + t.n, (size_t)s.st_size - t.n)) > 0)
    t.n += (size_t)got;
  if (got < 0) stop(path);
  t.data[t.n] = 0;
  close(fd);
  return t;
}

static void write_file(const char *path, text t) {
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  if (fd < 0 || write(fd, t.data, t.n) != (ssize_t)t.n) stop(path);
  close(fd);
}

/* Calls `each` with every file below a folder, and with the folders behind what is in them. */
static void walk(const char *folder, const char *to, void (*each)(const char *, const char *)) {
  DIR *d = opendir(folder);
  struct dirent *e;
  if (!d) return;
  while ((e = readdir(d)) != NULL) {
    char from[PATH_BYTES], into[PATH_BYTES];
    if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
    strcpy(from, in_folder(folder, e->d_name));
    strcpy(into, in_folder(to, e->d_name));
    if (e->d_type == DT_DIR) walk(from, into, each);
    each(from, into);
  }
  closedir(d);
}

static void remove_one(const char *path, const char *to) {
  (void)to;
  if (remove(path)) stop(path);
}

static void remove_folder(const char *path) {
  walk(path, path, remove_one);
  rmdir(path);
}

static void copy_one(const char *from, const char *to) {
  text t;
  char folder[PATH_BYTES], *s;
  struct stat is;
  if (stat(from, &is) || S_ISDIR(is.st_mode)) return;
  strcpy(folder, to);
  for (s = folder + strlen(run); (s = strchr(s + 1, '/')) != NULL; *s = '/') {
    *s = 0;
    mkdir(folder, 0777);
  }
  t = read_file(from);
  write_file(to, t);
  free(t.data);
}

static void make_folder(const char *path) {
  remove_folder(path);
  if (mkdir(path, 0777)) stop(path);
  walk(job.older, path, copy_one);
}

static int temporaries;
static void count_temporary(const char *path, const char *to) {
  (void)to;
  temporaries += strstr(path, ".tmp") != NULL;
}

static void left_behind(const char *when) {
  temporaries = 0;
  walk(run, run, count_temporary);
  if (temporaries) wrong("%s%d temporary files are left", when, temporaries);
}

/* ---- comparing ---- */

static int ends_with(const char *s, const char *end) {
  size_t n = strlen(s), m = strlen(end);
  return n >= m && !strcmp(s + n - m, end);
}

/* Takes out what no two runs have in common: seconds, and --resume. */
static void normalise(text *t, const char *name) {
  static const struct {
    const char *of, *pattern;
    int group; /* of the pattern: what goes */
  } odd[] = {{".json", "\"(seconds|tokens_per_second)\": [0-9.e+-]+", 0},
             {".json", ", \"--resume\", \"ck\"", 0},
             {"out", " +[0-9]+\\.[0-9]$", 0},
             {".results", "^([^\t\n]+\t){6}([0-9.]+)", 2},
             {"log.csv", "^([^,\n]*,){5}([0-9]+)", 2}};
  static regex_t ready[sizeof odd / sizeof *odd];
  static int made;
  regmatch_t m[3];
  size_t i, at;
  if (!t->data || memchr(t->data, 0, t->n)) return;
  for (i = 0; !made && i < sizeof odd / sizeof *odd; ++i)
    if (regcomp(&ready[i], odd[i].pattern, REG_EXTENDED | REG_NEWLINE)) stop(odd[i].pattern);
  made = 1;
  for (i = 0; i < sizeof odd / sizeof *odd; ++i)
    for (at = 0; ends_with(name, odd[i].of) &&
                 !regexec(&ready[i], t->data + at, 3, m, at ? REG_NOTBOL : 0);) {
      size_t from = at + (size_t)m[odd[i].group].rm_so, to = at + (size_t)m[odd[i].group].rm_eo;
      memmove(t->data + from, t->data + to, t->n - to + 1);
      t->n -= to - from;
      at = from;
    }
}

static int is_there(const char *folder, const char *name) {
  return !access(in_folder(folder, name), F_OK);
}

/* The same file in two folders, but for seconds. */
static int same(const char *a, const char *b, const char *name) {
  text x = read_file(in_folder(a, name)), y = read_file(in_folder(b, name));
  int equal = 0;
  if (x.data && y.data && !(equal = x.n == y.n && !memcmp(x.data, y.data, x.n))) {
    normalise(&x, name);
    normalise(&y, name);
    equal = x.n == y.n && !memcmp(x.data, y.data, x.n);
  }
  free(x.data), free(y.data);
  return equal;
}

/* Every line but a last one without an end has so many columns; 0: as many as the first. */
static int is_table(const char *s, int columns, char separator) {
  const char *end;
  for (; (end = strchr(s, '\n')) != NULL; s = end + 1) {
    int n = 1;
    for (; s < end; ++s) n += *s == separator;
    if (!columns) columns = n;
    if (n != columns) return 0;
  }
  return 1;
}

static int start(const char *fail, char *const *argv, const char *out, const char *err);

/* Whether an output is complete, if it is neither the older one nor that of a good run. */
static int complete(const char *name) {
  char path[PATH_BYTES], *argv[3] = {NULL, path, NULL}, program[] = "../convert";
  text t = read_file(in_folder(run, name));
  int yes = 0;
  argv[0] = program;
  strcpy(path, name);
  if (ends_with(name, ".results"))
    yes = !t.data || (strchr(t.data, '\n') && is_table(strchr(t.data, '\n') + 1, 12, '\t'));
  else if (!strncmp(name, "ck", 2)) {
    int ended = status;
    yes = !t.data || !start(NULL, argv, "/dev/null", "/dev/null");
    status = ended;
  } else if (ends_with(name, ".json"))
    yes = t.data && t.n > 3 && *t.data == '{' && !strcmp(t.data + t.n - 3, "]}\n");
  else if (ends_with(name, ".csv"))
    yes = t.data && is_table(t.data, 0, ',');
  free(t.data);
  return yes;
}

static void check_whole(void) {
  int i;
  for (i = 0; job.out[i]; ++i)
    if (!same(run, job.older, job.out[i]) && !same(run, good, job.out[i]) &&
        (is_there(run, job.out[i]) || is_there(job.older, job.out[i])) && !complete(job.out[i]))
      wrong("status %d: %s is neither the older one nor complete", status, job.out[i]);
}

/* ---- running ---- */

static void on_alarm(int signal_number) {
  (void)signal_number;
  late = 1;
  if (child > 0) kill((pid_t)child, SIGKILL);
}

/* In the child: the shim's settings, "SHIM_FAIL=write:3 SHIM_SIGNAL=9". */
static void set_shim(const char *settings) {
  char shim[PATH_BYTES], copy[PATH_BYTES], *word;
  snprintf(shim, sizeof shim, "%s/shim.so", here);
  setenv("LD_PRELOAD", shim, 1);
  snprintf(copy, sizeof copy, "%s", settings);
  for (word = strtok(copy, " "); word; word = strtok(NULL, " ")) {
    char *value = strchr(word, '=');
    *value = 0;
    setenv(word, value + 1, 1);
  }
}

/* The end of a pipe that gives the job's input. */
static int piped(void) {
  text t = read_file(in_folder(good, job.in));
  int ends[2];
  if (!t.data || pipe(ends) || write(ends[1], t.data, t.n) != (ssize_t)t.n) stop(job.in);
  close(ends[1]);
  free(t.data);
  return ends[0];
}

/* Runs a program in the folder `run`, with the shim or without it; its status. */
static int start(const char *settings, char *const *argv, const char *out, const char *err) {
  int in = job.pipe ? piped() : -1, ended;
  pid_t pid = fork();
  if (pid < 0) stop("fork");
  if (!pid) {
    if (chdir(run)) _exit(126);
    if (in < 0) in = open(job.in, O_RDONLY);
    dup2(in, 0);
    dup2(open(out, O_WRONLY | O_CREAT | O_TRUNC, 0666), 1);
    dup2(open(err, O_WRONLY | O_CREAT | O_TRUNC, 0666), 2);
    if (settings) set_shim(settings);
    execv(argv[0], argv);
    _exit(127);
  }
  if (in >= 0) close(in);
  child = pid, late = 0;
  alarm(LIMIT);
  while (waitpid(pid, &ended, 0) < 0 && errno == EINTR) {
  }
  alarm(0);
  child = 0;
  if (late) wrong("no end after %d seconds", LIMIT);
  return status = WIFEXITED(ended) ? WEXITSTATUS(ended) : 128 + WTERMSIG(ended);
}

static const char *last_words(void) {
  static char words[400];
  text t = read_file(in_folder(run, "err"));
  snprintf(words, sizeof words, "%s", t.data ? t.data + (t.n > 300 ? t.n - 300 : 0) : "");
  free(t.data);
  return words;
}

static int has_sentence(void) {
  text t = read_file(in_folder(run, "err"));
  const char *s = t.data;
  int yes = 0;
  for (; s && !yes; s = strchr(s, '\n'), s = s ? s + 1 : NULL)
    yes = *s && !strncmp(s, job.says, strlen(job.says));
  free(t.data);
  return yes;
}

static void run_once(const char *settings) {
  make_folder(run);
  *why = 0;
  start(settings, job.argv, "out", "err");
}

/* What holds after a call has failed. */
static void check_run(int may_leave) {
  int i;
  if (status == 0) {
    if (!same(run, good, "out")) wrong("status 0, but another output");
    for (i = 0; job.out[i]; ++i)
      if (!same(run, good, job.out[i]))
        wrong("status 0, but %s differs from a good run", job.out[i]);
  } else if (status != 1)
    wrong("status %d: %s", status, last_words());
  else if (!has_sentence())
    wrong("status 1 without a sentence: %s", last_words());
  check_whole();
  if (!may_leave) left_behind("");
}

static int checkpoints;
static void count_checkpoint(const char *path, const char *to) {
  (void)to;
  path = strrchr(path, '/') + 1;
  checkpoints += !strncmp(path, "ck", 2) && !strstr(path, ".tmp") && !ends_with(path, ".lock");
}

/* The same command, with --resume where a checkpoint is there, ends as if nothing had been. */
static void check_again(void) {
  char resume[] = "--resume", ck[] = "ck";
  int i, ended = status;
  checkpoints = 0;
  if (job.resume) walk(run, run, count_checkpoint);
  if (checkpoints) job.argv[job.argc] = resume, job.argv[job.argc + 1] = ck;
  if (start(NULL, job.argv, "out", "err")) wrong("afterwards status %d: %s", status, last_words());
  job.argv[job.argc] = NULL;
  for (i = 0; job.out[i]; ++i)
    if (!(checkpoints && ends_with(job.out[i], "log.csv")) && !same(run, good, job.out[i]))
      wrong("afterwards %s differs", job.out[i]);
    else if (ends_with(job.out[i], "log.csv") && !complete(job.out[i]))
      wrong("afterwards %s has rows of other lengths", job.out[i]);
  left_behind("afterwards ");
  status = ended;
}

/* ---- what is tried ---- */

static void report(const char *what, const char *bad) {
  printf(*bad ? "  FAIL  test_faults_%s_%s\n        %s\n" : "  ok    test_faults_%s_%s\n", job.name,
         what, bad);
  fflush(stdout);
  if (*bad)
    ++failed;
  else
    ++passed;
}

/* Adds what was wrong with a run to what is said of its kind; returns how many that are. */
static int add_wrong(char *bad, size_t room, const char *settings, int found) {
  size_t n = strlen(bad);
  if (!*why) return found;
  snprintf(bad + n, room - n, "%s%s: %s", n ? "\n        " : "", settings, why);
  return found + 1;
}

static void fail_calls(const char *call, long n) {
  char name[64], settings[128], bad[8192] = "";
  int on = ends_with(call, "+"), found = 0;
  long most = strcmp(call, "rename") || job.most > 40 ? job.most : 40, i;
  if (most > n) most = n;
  for (i = 0; i < most && found < kill_again; ++i, ++failing_calls) {
    snprintf(settings, sizeof settings, "SHIM_FAIL=%.*s:%ld%s", (int)strlen(call) - on, call,
             1 + i * n / most, on ? "+" : "");
    run_once(settings);
    check_run(!strncmp(call, "unlink", 6));
    if (!*why && status) check_again();
    found = add_wrong(bad, sizeof bad, settings, found);
  }
  snprintf(name, sizeof name, "%.*s%s", (int)strlen(call) - on, call, on ? "_on" : "");
  if (n) report(name, bad);
}

/* A run that is killed; it may have ended before. */
static void kill_once(const char *settings, int expected, int may_end) {
  run_once(settings);
  ++killed_runs;
  if (status != expected && !(may_end && !status))
    wrong("status %d, expected %d", status, expected);
  check_whole();
  check_again();
}

static void kill_calls(const char *signal_number, long n) {
  char name[64], settings[128], bad[8192] = "";
  long most = n < job.stops ? n : job.stops, i;
  int found = 0;
  for (i = 0; i < most && found < kill_again; ++i) {
    snprintf(settings, sizeof settings, "SHIM_FAIL=kill:%ld SHIM_SIGNAL=%s", 1 + i * n / most,
             signal_number);
    kill_once(settings, 128 + atoi(signal_number), 0);
    found = add_wrong(bad, sizeof bad, settings, found);
  }
  snprintf(name, sizeof name, "signal_%s_at_any_call", signal_number);
  report(name, bad);
}

static void kill_moments(void) {
  char settings[128], bad[8192] = "";
  unsigned long long state = (unsigned long long)job.seed;
  long i;
  int found = 0;
  for (i = 0; i < job.moments && found < kill_again; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    snprintf(settings, sizeof settings, "SHIM_AFTER=%ld",
             1 + (long)((state >> 33) % (unsigned long long)job.microseconds));
    kill_once(settings, 137, 1);
    found = add_wrong(bad, sizeof bad, settings, found);
  }
  if (job.moments) report("killed_at_any_moment", bad);
}

/* ---- settings ---- */

static void cut_words(char **words, char *s) {
  int n = 0;
  for (s = strtok(s, " "); s && n < WORDS - 1; s = strtok(NULL, " ")) words[n++] = s;
  words[n] = NULL;
}

static int set(char *word) {
  char *value = strchr(word, '=');
  if (!value) return 0;
  *value++ = 0;
#define TEXT(key, to) (!strcmp(word, key) && ((to) = value, 1))
#define NUMBER(key, to) (!strcmp(word, key) && ((to) = atol(value), 1))
#define LIST(key, to) (!strcmp(word, key) && (cut_words(to, value), 1))
  return TEXT("older", job.older) || TEXT("in", job.in) || TEXT("says", job.says) ||
         LIST("out", job.out) || LIST("calls", job.calls) || LIST("kills", job.kills) ||
         NUMBER("most", job.most) || NUMBER("stops", job.stops) || NUMBER("seed", job.seed) ||
         NUMBER("moments", job.moments) ||
         (!strcmp(word, "resume") && (job.resume = *value == '1', 1)) ||
         (!strcmp(word, "pipe") && (job.pipe = *value == '1', 1));
}

static void read_settings(int argc, char **argv) {
  static char says[PATH_BYTES];
  int i = 2;
  if (argc > 1) job.name = argv[1];
  job.in = "/dev/null", job.older = "older";
  job.most = job.stops = 1000000, job.seed = 1;
  for (; i < argc && strcmp(argv[i], "--"); ++i)
    if (!set(argv[i])) stop(argv[i]);
  for (++i; i < argc && job.argc < WORDS; ++i) job.argv[job.argc++] = argv[i];
  if (!job.argc) stop("usage: faults NAME [SETTING=VALUE ...] -- ../PROGRAM ARGUMENTS");
  job.program = strrchr(job.argv[0], '/') ? strrchr(job.argv[0], '/') + 1 : job.argv[0];
  snprintf(says, sizeof says, "%s: ", job.program);
  if (!job.says) job.says = says;
}

/* Once without a failure: what is expected, how often the program calls what. */
static text good_run(void) {
  char settings[PATH_BYTES], counts[PATH_BYTES / 2];
  struct timespec a, b;
  int i;
  text t;
  snprintf(counts, sizeof counts, "%s/%s.counts", here, job.name);
  snprintf(settings, sizeof settings, "SHIM_COUNT=%s", counts);
  make_folder(good); /* piped() reads there */
  clock_gettime(CLOCK_MONOTONIC, &a);
  run_once(settings);
  clock_gettime(CLOCK_MONOTONIC, &b);
  job.microseconds = (b.tv_sec - a.tv_sec) * 1000000 + (b.tv_nsec - a.tv_nsec) / 1000 + 1;
  if (status) printf("%s\n", last_words()), stop("the run without a failure");
  for (i = 0; job.out[i]; ++i)
    if (same(run, job.older, job.out[i])) stop(job.out[i]);
  remove_folder(good);
  if (rename(run, good)) stop(good);
  t = read_file(counts);
  if (!t.data) stop(counts);
  return t;
}

static long count_of(text counts, const char *call) {
  size_t n = strcspn(call, "+");
  const char *s = counts.data;
  for (; s && *s; s = strchr(s, '\n') + 1)
    if (!strncmp(s, call, n) && s[n] == ' ') return atol(s + n);
  stop(call);
  return 0;
}

int main(int argc, char **argv) {
  struct sigaction act;
  text counts;
  time_t began = time(NULL);
  int i;
  read_settings(argc, argv);
  memset(&act, 0, sizeof act);
  act.sa_handler = on_alarm;
  sigaction(SIGALRM, &act, NULL);
  if (!getcwd(here, sizeof here)) stop("getcwd");
  snprintf(run, sizeof run, "%s/%s.run", here, job.name);
  snprintf(good, sizeof good, "%s/%s.good", here, job.name);
  counts = good_run();
  for (i = 0; job.calls[i]; ++i) fail_calls(job.calls[i], count_of(counts, job.calls[i]));
  for (i = 0; job.kills[i]; ++i) kill_calls(job.kills[i], count_of(counts, "kill"));
  kill_moments();
  free(counts.data);
  remove_folder(run);
  printf("        %s: %d calls failed, %d kills, %ld s\n%d passed, %d failed, 0 skipped\n",
         job.name, failing_calls, killed_runs, (long)(time(NULL) - began), passed, failed);
  return failed > 0;
}
