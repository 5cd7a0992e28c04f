/* cli.h - what all programs share: messages, memory, options, text, JSON, paths, files that are
   replaced safely, the machine, progress and interruption

     #define MOE_IMPLEMENTATION
     #include "tools/cli.h"        first of all: it includes moe.h

     static const option options[] = {OPTION_GROUP("data"), OPTION_TEXT("--data", ...), OPTION_END};
     static const option *const all_options[] = {options, machine_options, NULL};
     begin_program("train", argc, argv);
     read_options("[options]", "what it does", all_options);
     open_machine(0);
     ...
     return end_program();

   Whatever goes wrong ends the program with status 1 and one sentence (die). Functions are static
   inline so that a program may leave some of them unused. */
#ifndef TOOLS_CLI_H
#define TOOLS_CLI_H
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include "../../moe.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#define isatty _isatty
#define fileno _fileno
#else
#include <unistd.h>
#endif
#ifdef __GNUC__
#define TOOLS_PRINTF(n) __attribute__((format(printf, n, n + 1)))
#define TOOLS_DIES __attribute__((noreturn))
#else
#define TOOLS_PRINTF(n)
#define TOOLS_DIES
#endif

/* ---- messages ---- */

static struct {
  const char *name;
  int argc;
  char **argv;
} program;

/* What is being read: sentences, those of the library too, begin with it. Line 0: no line. */
static struct {
  const char *file;
  int line;
} reading;

static inline void read_from(const char *file, int line) {
  reading.file = file;
  reading.line = line;
}

static inline void say(const char *sentence) {
  fprintf(stderr, "%s: ", program.name);
  if (reading.file && reading.line) fprintf(stderr, "%s:%d: ", reading.file, reading.line);
  if (reading.file && !reading.line) fprintf(stderr, "%s: ", reading.file);
  fprintf(stderr, "%s\n", sentence);
}

TOOLS_DIES TOOLS_PRINTF(1) static inline void die(const char *format, ...) {
  char sentence[4096];
  va_list args;
  va_start(args, format);
  vsnprintf(sentence, sizeof sentence, format, args);
  va_end(args);
  say(sentence);
  exit(1);
}

static inline void log_sentence(void *user, moe_status status, const char *sentence) {
  (void)user, (void)status;
  say(sentence);
}

/* For calls of the library: the log has said what was wrong. */
static inline void need(moe_status status) {
  if (status) exit(1);
}

/* ---- memory ---- */

static inline void *grow(void *p, size_t count, size_t size) {
  p = size && count > SIZE_MAX / size ? NULL : realloc(p, (count ? count : 1) * size);
  if (!p) die("out of memory (%zu x %zu bytes)", count, size);
  return p;
}

static inline void *take(size_t count, size_t size) {
  void *p = calloc(count ? count : 1, size);
  if (!p) die("out of memory (%zu x %zu bytes)", count, size);
  return p;
}

/* Memory that is wanted to the end, 64-byte aligned. */
static struct lasting_block { struct lasting_block *next; } * lasting_blocks;

static inline void *lasting(size_t count, size_t size) {
  size_t bytes = count > (SIZE_MAX - 192) / (size ? size : 1) ? SIZE_MAX : count * size + 128;
  struct lasting_block *b = (struct lasting_block *)take(bytes, 1);
  b->next = lasting_blocks;
  lasting_blocks = b;
  return (char *)b + 128 - ((uintptr_t)b & 63);
}

/* A text of any length, lasting. */
TOOLS_PRINTF(1) static inline char *printed(const char *format, ...) {
  va_list args;
  char *out;
  int n;
  va_start(args, format);
  n = vsnprintf(NULL, 0, format, args);
  va_end(args);
  if (n < 0) die("a text of too many bytes");
  out = (char *)lasting((size_t)n + 1, 1);
  va_start(args, format);
  vsnprintf(out, (size_t)n + 1, format, args);
  va_end(args);
  return out;
}

/* ---- numbers and lists ---- */

static inline double number(const char *what, const char *text, double low, double high) {
  char *end;
  double v = strtod(text, &end);
  if (end == text || *end || !(v >= low && v <= high))
    die("%s takes a number from %g to %g, not \"%s\"", what, low, high, text);
  return v;
}

static inline int whole(const char *what, const char *text, double low, double high) {
  char *end;
  long long v = strtoll(text, &end, 10);
  if (end == text || *end || (double)v < low || (double)v > high)
    die("%s takes a whole number from %.0f to %.0f, not \"%s\"", what, low, high, text);
  return (int)v;
}

/* `word` is one of "a|b|c". */
static inline int is_one_of(const char *list, const char *word) {
  size_t n = strlen(word);
  for (; list; list = strchr(list, '|') ? strchr(list, '|') + 1 : NULL)
    if (!strncmp(list, word, n) && (!list[n] || list[n] == '|')) return 1;
  return 0;
}

/* A text cut at a mark. */
typedef struct list {
  char **at; /* (n) lasting */
  int n;
} list;

static inline list split(const char *text, char mark) {
  list out;
  char *copy = printed("%s", text), *s;
  out.n = 1;
  for (s = copy; (s = strchr(s, mark)) != NULL; ++s) ++out.n;
  out.at = (char **)lasting((size_t)out.n, sizeof *out.at);
  out.n = 0;
  for (s = copy; s; s = strchr(s, mark), s = s ? (*s = 0, s + 1) : NULL) out.at[out.n++] = s;
  return out;
}

/* ---- options ---- */

/* Where the value goes: one of text, number and real. A number without an argument is a switch,
   an argument "a|b" means one of these words, a name without dashes is a place ("MODEL"), and one
   without help the title of a group. */
typedef struct option {
  const char *name, *argument, *standard, *help; /* standard: the default, or NULL */
  const char **text;
  int *number;
  double *real;
  double low, high;
} option;

#define OPTION_GROUP(title)                                                                        \
  { title, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0 }
#define OPTION_TEXT(name, argument, to, standard, help)                                            \
  { name, argument, standard, help, &(to), NULL, NULL, 0, 0 }
#define OPTION_NUMBER(name, to, low, high, standard, help)                                         \
  { name, "N", standard, help, NULL, &(to), NULL, low, high }
#define OPTION_REAL(name, argument, to, low, high, standard, help)                                 \
  { name, argument, standard, help, NULL, NULL, &(to), low, high }
#define OPTION_SWITCH(name, to, help)                                                              \
  { name, NULL, NULL, help, NULL, &(to), NULL, 0, 0 }
#define OPTION_PLACE(name, to, help)                                                               \
  { name, NULL, NULL, help, &(to), NULL, NULL, 0, 0 }
#define OPTION_END                                                                                 \
  { NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0 }

/* Words of a text, wrapped at `width` columns behind `indent` blanks. */
static inline void print_wrapped(const char *text, int indent, int width) {
  int column = indent, n;
  for (; *text; text += n + (text[n] != 0)) {
    n = (int)strcspn(text, " ");
    if (column + n > width && column > indent) printf("\n%*s", column = indent, "");
    printf("%.*s ", n, text);
    column += n + 1;
  }
  printf("\n");
}

static inline void print_help(const char *usage, const char *about, const option *const *tables) {
  char left[64];
  const option *o;
  printf("usage: %s %s\n", program.name, usage);
  print_wrapped(about, 0, 80);
  for (; *tables; ++tables)
    for (o = *tables; o->name; ++o) {
      if (!o->help) {
        printf("\n%s\n", o->name);
        continue;
      }
      snprintf(left, sizeof left, "  %s %s", o->name, o->argument ? o->argument : "");
      printf("%-26s", left);
      if (strlen(left) > 25) printf("\n%26s", "");
      print_wrapped(o->standard ? printed("%s [%s]", o->help, o->standard) : o->help, 26, 80);
    }
}

static inline void set_option(const option *o, const char *value) {
  if (o->argument && strchr(o->argument, '|') && !is_one_of(o->argument, value))
    die("%s is %s, not \"%s\"", o->name, o->argument, value);
  if (o->text)
    *o->text = value;
  else if (o->number)
    *o->number = whole(o->name, value, o->low, o->high);
  else
    *o->real = number(o->name, value, o->low, o->high);
}

/* The option of that name; place > 0: the place of that number, from 1. NULL: there is none. */
static inline const option *find_option(const option *const *tables, const char *name, int place) {
  const option *o;
  for (; *tables; ++tables)
    for (o = *tables; o->name; ++o)
      if (!o->help || (*o->name != '-') != (place > 0))
        continue;
      else if (place ? !--place : !strcmp(o->name, name))
        return o;
  return NULL;
}

/* usage: what follows the program's name in the first line of --help. */
static inline void read_options(const char *usage, const char *about, const option *const *tables) {
  const option *const *t, *o;
  int i, places = 0;
  for (t = tables; *t; ++t)
    for (o = *t; o->name; ++o)
      if (o->standard && o->help) set_option(o, o->standard);
  for (i = 1; i < program.argc; ++i) {
    const char *name = program.argv[i];
    if (!strcmp(name, "--help") || !strcmp(name, "-h")) {
      print_help(usage, about, tables);
      exit(0);
    }
    o = find_option(tables, name, *name == '-' ? 0 : ++places);
    if (!o && *name == '-') die("unknown option %s; --help lists the options", name);
    if (!o) die("\"%s\" is not an option; --help lists the options", name);
    if (o->text && !o->argument)
      *o->text = name;
    else if (!o->argument)
      *o->number = 1;
    else if (++i == program.argc)
      die("%s needs a value, %s; --help lists the options", name, o->argument);
    else
      set_option(o, program.argv[i]);
  }
}

/* One argument as a shell reads it again. */
static inline void print_argument(FILE *f, const char *s) {
  static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
                              "_-+=:,./@%";
  if (*s && strspn(s, plain) == strlen(s)) {
    fprintf(f, " %s", s);
    return;
  }
  fputs(" '", f);
  for (; *s; ++s)
    if (*s == '\'')
      fputs("'\\''", f);
    else
      fputc(*s, f);
  fputc('\'', f);
}

/* The command again, with --resume FILE. */
static inline void print_command(FILE *f, const char *resume) {
  int i;
  for (i = 0; i < program.argc; ++i)
    if (strcmp(program.argv[i], "--resume"))
      print_argument(f, program.argv[i]);
    else
      ++i;
  fputs(" --resume", f);
  print_argument(f, resume);
  fputc('\n', f);
}

/* ---- text and JSON ---- */

/* A text that grows; zero at first. */
typedef struct text {
  char *data; /* with a zero behind it, or NULL */
  size_t bytes, room;
  int depth; /* of JSON */
} text;

static inline void put_bytes(text *t, const char *data, size_t bytes) {
  if (t->room - t->bytes <= bytes)
    t->data = (char *)grow(t->data, t->room = 2 * t->room + bytes + 4096, 1);
  memcpy(t->data + t->bytes, data, bytes);
  t->data[t->bytes += bytes] = 0;
}

TOOLS_PRINTF(2) static inline void put(text *t, const char *format, ...) {
  char part[512];
  va_list args;
  int n;
  va_start(args, format);
  n = vsnprintf(part, sizeof part, format, args);
  va_end(args);
  if (n < (int)sizeof part) {
    put_bytes(t, part, n < 0 ? 0 : (size_t)n);
    return;
  }
  if (t->room - t->bytes <= (size_t)n)
    t->data = (char *)grow(t->data, t->room = 2 * t->room + (size_t)n + 4096, 1);
  va_start(args, format);
  vsnprintf(t->data + t->bytes, (size_t)n + 1, format, args);
  va_end(args);
  t->bytes += (size_t)n;
}

/* JSON: what stands before a value, in an object its key (else NULL). */
static inline void json_key(text *t, const char *key) {
  char last = t->bytes ? t->data[t->bytes - 1] : '[';
  if (!strchr("[{ ", last)) put(t, ", ");
  if (key) put(t, "\"%s\": ", key);
}

static inline void json_string(text *t, const char *key, const char *s) {
  json_key(t, key);
  put(t, "\"");
  for (; *s; ++s)
    if (*s == '"' || *s == '\\')
      put(t, "\\%c", *s);
    else if ((unsigned char)*s < 32)
      put(t, "\\u%04x", (unsigned)(unsigned char)*s);
    else
      put_bytes(t, s, 1);
  put(t, "\"");
}

/* As the format says, "%.9g" or "%.0f"; NaN becomes null. */
static inline void json_number(text *t, const char *key, const char *format, double v) {
  char part[64];
  json_key(t, key);
  snprintf(part, sizeof part, format, v);
  put(t, "%s", v == v ? part : "null");
}

/* The next value begins a line. */
static inline void json_line(text *t) {
  json_key(t, NULL);
  if (t->bytes && t->data[t->bytes - 1] == ' ') --t->bytes;
  put(t, "\n%*s", t->depth, "");
}

static inline void json_open(text *t, const char *key, char bracket) {
  json_key(t, key);
  put(t, "%c", bracket);
  ++t->depth;
}

static inline void json_close(text *t, char bracket) {
  --t->depth;
  put(t, "%c", bracket);
}

/* ---- paths and files ---- */

/* Where the name of the file begins, behind its folder. */
static inline const char *file_name(const char *path) {
  const char *name = path, *s;
  for (s = path; *s; ++s) {
    if (*s == '/') name = s + 1;
#ifdef _WIN32
    if (*s == '\\' || *s == ':') name = s + 1;
#endif
  }
  return name;
}

/* A file in the folder where `path` is. */
static inline char *path_beside(const char *path, const char *name) {
  return printed("%.*s%s", (int)(file_name(path) - path), path, name);
}

/* FILE-SUFFIX with the ending kept. */
static inline char *path_with_suffix(const char *path, const char *suffix) {
  const char *name = file_name(path), *dot = strrchr(name, '.');
  int stem = (int)((dot && dot > name ? dot : name + strlen(name)) - path);
  return printed("%.*s-%s%s", stem, path, suffix, path + stem);
}

static inline int exists(const char *path) {
  FILE *f = fopen(path, "rb");
  if (f) fclose(f);
  return f != NULL;
}

static inline moe_status write_text(void *user, const moe_writer *writer, const moe_env *e) {
  const text *t = (const text *)user;
  (void)e;
  return t->bytes && writer->write(writer->user, t->data, t->bytes) ? MOE_E_IO : MOE_OK;
}

static moe_env env;

/* The one way in which programs write files (models and checkpoints go it inside the library): the
   old file stays as it is until the new one is whole. The text is freed. */
static inline void save_text(text *t, const char *path) {
  need(moe_file_replace(path, write_text, t, &env));
  free(t->data);
  memset(t, 0, sizeof *t);
}

/* A name that cannot be written is better known before the work than after it. */
static inline void check_writable(const char *option_name, const char *path) {
  FILE *f = path ? fopen(path, "rb+") : NULL;
  if (!path) return;
  if (!f) { /* a new file, most likely: moe_file_replace will begin with this name */
    const char *temporary = printed("%s.tmp", path);
    f = errno == EISDIR ? NULL : fopen(temporary, "wb");
    if (!f) die("%s: %s cannot be written: %s", option_name, path, strerror(errno));
    remove(temporary);
  }
  fclose(f);
}

/* The next line of a stream without its end, which may be \r\n; 0: there is none. */
static inline int read_line(text *t, FILE *f) {
  int c = getc(f);
  t->bytes = 0;
  if (c == EOF) return 0;
  put_bytes(t, "", 0);
  for (; c != EOF && c != '\n'; c = getc(f)) {
    char byte = (char)c;
    put_bytes(t, &byte, 1);
  }
  if (t->bytes && t->data[t->bytes - 1] == '\r') t->data[--t->bytes] = 0;
  return 1;
}

/* ---- the machine ---- */

static struct {
  const char *isa, *precision;
  int threads, profiled;
} machine;
static moe_pool *pool;
static moe_profile profile;

static const option machine_options[] = {
    OPTION_GROUP("machine"),
    OPTION_NUMBER("--threads", machine.threads, 1, 256, NULL,
                  "[training: all processors; other programs: 1]"),
    OPTION_TEXT("--isa", "auto|avx512|avx2|neon|scalar", machine.isa, "auto", "instruction set"),
    OPTION_TEXT("--precision", "fp32|bf16", machine.precision, "fp32",
                "bf16: products of the layers with operands of 8 bits of precision, weights and "
                "sums in fp32; needs AMX or AVX512-BF16, else goes on in fp32"),
    OPTION_SWITCH("--profile", machine.profiled, "say at the end where the time went"),
    OPTION_END};

static inline void begin_program(const char *name, int argc, char **argv) {
  program.name = name;
  program.argc = argc;
  program.argv = argv;
}

/* threads: as many where --threads says nothing; 0: all processors. */
static inline void open_machine(int threads) {
  if (moe_env_init(&env, moe_isa_from_name(machine.isa)) != MOE_OK)
    die("this machine or this build has no %s; --isa auto takes the best there is", machine.isa);
  env.log = log_sentence;
  if (!strcmp(machine.precision, "bf16"))
    moe_env_set_precision(&env, MOE_TYPE_BF16); /* or a sentence, and fp32 */
  moe_profile_init(&profile, NULL, NULL);
  if (machine.profiled) env.profile = &profile;
  if (machine.threads) threads = machine.threads;
  if (threads != 1) need(moe_pool_create(&pool, threads ? threads : moe_processors(), &env));
}

/* Prints the profile and looks whether all could be printed; the exit status. */
static inline int end_program(FILE *profile_to) {
  char table[2048];
  moe_profile_write(table, sizeof table, &profile);
  if (machine.profiled) fputs(table, profile_to);
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
  moe_pool_free(pool);
  return 0;
}

/* The bits of bf16 on AMX are its own. */
static inline const char *precision_name(void) {
  if (env.precision != MOE_TYPE_BF16) return "fp32";
  return env.cpu_flags & MOE_CPU_AMX_BF16 ? "bf16 on AMX" : "bf16";
}

/* ---- progress and interruption ---- */

static volatile sig_atomic_t interrupted; /* the signal's number */

static inline void on_interrupt(int signal_number) { interrupted = signal_number; }

/* From now on Ctrl-C and a plain kill set `interrupted`; the program should end with status
   128 + interrupted. */
static inline void catch_interrupts(void) {
  signal(SIGINT, on_interrupt);
  signal(SIGTERM, on_interrupt);
}

static inline double seconds_now(void) {
#if defined(CLOCK_MONOTONIC)
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
  return (double)clock() / CLOCKS_PER_SEC;
#endif
}

typedef struct progress {
  double began, last;
  int64_t first; /* step at which this process began */
} progress;

static inline progress begin_progress(int64_t first) {
  progress p;
  p.began = p.last = seconds_now();
  p.first = first;
  return p;
}

/* One line that moves on a terminal; elsewhere a line each half a minute. end: the last one. */
static inline void show_progress(progress *p, const char *title, int64_t step, int64_t steps,
                                 const char *state, int end) {
  int moving = isatty(fileno(stderr));
  double t = seconds_now(), passed = t - p->began;
  int64_t done = step - p->first, left = 0;
  if (!end && t - p->last < (moving ? 0.2 : 30)) return;
  p->last = t;
  if (done > 0) left = (int64_t)(passed / (double)done * (double)(steps - step));
  fprintf(stderr, "%s%-34s step %lld/%lld  %s  %lld:%02lld left %s", moving ? "\r" : "", title,
          (long long)step, (long long)steps, state, (long long)(left / 60), (long long)(left % 60),
          moving && !end ? "  " : "\n");
}
#endif
