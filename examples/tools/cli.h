/* cli.h - what all programs share: messages, memory, options, text, files that are replaced safely,
   the machine, progress and interruption

     #define MOE_IMPLEMENTATION
     #include "tools/cli.h"        first of all: it includes moe.h

     static const option options[] = {GROUP("data"), STRING("--data", ...), ..., END_OF_OPTIONS};
     static const option *const all_options[] = {options, machine_options, NULL};
     begin_program("train", argc, argv);
     read_options("[options]\nwhat it does", all_options);
     open_machine(0);
     ...
     return end_program();

   Whatever goes wrong ends the program with status 1 and one sentence (die). */
#ifndef TOOLS_CLI_H
#define TOOLS_CLI_H
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include "../../moe.h"
#ifdef TOOL_CUDA /* an NVIDIA GPU: cc -DTOOL_CUDA ... -ldl */
#define MOE_CUDA_IMPLEMENTATION
#include "../../moe_cuda.h"
#endif

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#define access _access
#define isatty _isatty
#define fileno _fileno
#define W_OK 2
#else
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#endif
#include "ranks.h"
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
  const char *file = reading.file ? reading.file : "";
  char line[16] = "";
  if (reading.file) snprintf(line, sizeof line, reading.line ? ":%d: " : ": ", reading.line);
  if (my_rank)
    snprintf(last_sentence, sizeof last_sentence, "%s%s%s\n", file, line, sentence);
  else
    fprintf(stderr, "%s: %s%s%s\n", program.name, file, line, sentence);
}

/* Ends the program in all ranks, which come here together. */
TOOLS_DIES static inline void leave(int status) {
  all_end = 1;
  exit(status);
}

TOOLS_DIES TOOLS_PRINTF(1) static inline void die(const char *format, ...) {
  char sentence[4096], *s;
  va_list args;
  va_start(args, format);
  vsnprintf(sentence, sizeof sentence, format, args);
  va_end(args);
  for (s = sentence; *s; ++s) /* from a file, perhaps: nothing that controls a terminal */
    if ((unsigned char)*s < 32 || *s == 127) *s = '?';
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

/* ---- memory and text ---- */

static inline void *grow(void *p, size_t count, size_t size) {
  p = count > SIZE_MAX / size ? NULL : realloc(p, (count ? count : 1) * size);
  if (!p) die("out of memory (%.0f bytes)", (double)count * (double)size);
  return p;
}

static inline void *take(size_t count, size_t size) {
  void *p = calloc(count ? count : 1, size);
  if (!p) die("out of memory (%.0f bytes)", (double)count * (double)size);
  return p;
}

/* Memory that is wanted to the end, 64-byte aligned, all of it linked. */
static inline void *lasting(size_t count, size_t size) {
  static void *blocks;
  void **b = (void **)take(count + 128 / size + 1, size);
  *b = blocks;
  blocks = b;
  return (char *)b + 128 - ((uintptr_t)b & 63);
}

/* A text that grows; zero at first. */
typedef struct text {
  char *data; /* with a zero behind it, or NULL */
  size_t bytes, room;
} text;

static inline void put_bytes(text *t, const char *data, size_t bytes) {
  if (t->room - t->bytes <= bytes)
    t->data = (char *)grow(t->data, t->room = 2 * t->room + bytes + 4096, 1);
  memcpy(t->data + t->bytes, data, bytes);
  t->data[t->bytes += bytes] = 0;
}

static inline void put_args(text *t, const char *format, va_list args) {
  va_list again;
  int n;
  va_copy(again, args);
  n = vsnprintf(t->data ? t->data + t->bytes : NULL, t->room - t->bytes, format, args);
  if (n >= 0 && (size_t)n >= t->room - t->bytes) {
    t->data = (char *)grow(t->data, t->room = 2 * t->room + (size_t)n + 256, 1);
    vsnprintf(t->data + t->bytes, t->room - t->bytes, format, again);
  }
  t->bytes += n < 0 ? 0 : (size_t)n;
  va_end(again);
}

TOOLS_PRINTF(2) static inline void put(text *t, const char *format, ...) {
  va_list args;
  va_start(args, format);
  put_args(t, format, args);
  va_end(args);
}

/* A lasting text. */
TOOLS_PRINTF(1) static inline char *printed(const char *format, ...) {
  text t = {NULL, 0, 0};
  va_list args;
  char *out;
  va_start(args, format);
  put_args(&t, format, args);
  va_end(args);
  out = (char *)memcpy(lasting(t.bytes + 1, 1), t.data, t.bytes);
  free(t.data);
  return out;
}

/* JSON: as put, but ' in the format is written as ". */
TOOLS_PRINTF(2) static inline void put_json(text *t, const char *format, ...) {
  char *quoted = printed("%s", format), *s = quoted;
  va_list args;
  while ((s = strchr(s, '\'')) != NULL) *s = '"';
  va_start(args, format);
  put_args(t, quoted, args);
  va_end(args);
}

/* A string with its quotes, for JSON. */
static inline void put_quoted(text *t, const char *s) {
  put(t, "\"");
  for (; *s; ++s)
    if ((unsigned char)*s < 32)
      put(t, "\\u%04x", (unsigned)*s);
    else
      put(t, *s == '"' || *s == '\\' ? "\\%c" : "%c", *s);
  put(t, "\"");
}

/* A text cut at a mark. */
typedef struct list {
  char **at; /* (n) lasting */
  int n;
} list;

static inline list split(const char *whole, char mark) {
  list out = {NULL, 1};
  char *s = printed("%s", whole);
  for (; *whole; ++whole) out.n += *whole == mark;
  out.at = (char **)lasting((size_t)out.n, sizeof *out.at);
  for (out.n = 0; s; s = strchr(s, mark), s = s ? (*s = 0, s + 1) : NULL) out.at[out.n++] = s;
  return out;
}

/* ---- options ---- */

static inline double number(const char *what, const char *word, double low, double high) {
  char *end;
  double v = strtod(word, &end);
  if (end == word || *end || !(v >= low && v <= high))
    die("%s takes a number from %g to %g, not \"%s\"", what, low, high, word);
  return v;
}

static inline int whole(const char *what, const char *word, double low, double high) {
  char *end;
  long long v = strtoll(word, &end, 10);
  if (end == word || *end || (double)v < low || (double)v > high)
    die("%s takes a whole number from %.0f to %.0f, not \"%s\"", what, low, high, word);
  return (int)v;
}

/* Where the value goes: one of string, whole and real. A whole number without an argument is a
   flag, an argument "a|b" means one of these words, a name without dashes is a place ("MODEL"), and
   one without help is the title of a group. */
typedef struct option {
  const char *name, *argument, *standard, *help; /* standard: the default, or NULL */
  const char **string;
  int *whole;
  double *real, low, high;
} option;

#define STRING(name, argument, to, standard, help)                                                 \
  { name, argument, standard, help, &(to), NULL, NULL, 0, 0 }
#define WHOLE(name, to, low, high, standard, help)                                                 \
  { name, "N", standard, help, NULL, &(to), NULL, low, high }
#define REAL(name, argument, to, low, high, standard, help)                                        \
  { name, argument, standard, help, NULL, NULL, &(to), low, high }
#define FLAG(name, to, help)                                                                       \
  { name, NULL, NULL, help, NULL, &(to), NULL, 0, 0 }
#define PLACE(name, to, help) STRING(name, NULL, to, NULL, help)
#define GROUP(title)                                                                               \
  { title, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0 }
#define END_OF_OPTIONS GROUP(NULL)

/* A text in lines of `width` columns, all but the first behind `indent` blanks; \n begins one. */
static inline void print_wrapped(const char *s, int indent, int width) {
  int column = indent, last = width - 1;
  while (*s) {
    int n = (int)strcspn(s, " \n");
    while (indent + n > last && n > 1 && memchr(s, ',', (size_t)n - 1)) /* a long list */
      for (--n; s[n - 1] != ',';) --n;
    if (column + n > last && column > indent) printf("\n%*s", column = indent, "");
    printf("%s%.*s", column > indent ? " " : "", n, s);
    column = s[n] == '\n' ? last : column + n + 1;
    s += n;
    s += *s == ' ' || *s == '\n';
  }
  printf("\n");
}

static inline void print_help(const char *usage, const option *const *tables) {
  const option *o;
  printf("usage: %s ", program.name);
  print_wrapped(usage, 0, 80);
  for (; *tables; ++tables)
    for (o = *tables; o->name; ++o) {
      int n = printf(o->help ? "  %s %s" : "\n%s\n", o->name, o->argument ? o->argument : "");
      if (!o->help) continue;
      printf("%s%*s", n > 25 ? "\n" : "", n > 25 ? 26 : 26 - n, "");
      print_wrapped(o->standard ? printed("%s [%s]", o->help, o->standard) : o->help, 26, 80);
    }
}

static inline void set_option(const option *o, const char *value) {
  const char *s = o->argument && strchr(o->argument, '|') ? o->argument : NULL;
  list words = split(s ? s : value, '|');
  while (words.n && s && strcmp(words.at[words.n - 1], value)) --words.n;
  if (!words.n) die("%s is %s, not \"%s\"", o->name, o->argument, value);
  if (o->string)
    *o->string = value;
  else if (o->whole)
    *o->whole = whole(o->name, value, o->low, o->high);
  else
    *o->real = number(o->name, value, o->low, o->high);
}

/* The option of that name; place > 0: the place of that number, from 1. NULL: there is none. */
static inline const option *find_option(const option *const *tables, const char *name, int place) {
  const option *o;
  for (; *tables; ++tables)
    for (o = *tables; o->name; ++o)
      if (o->help && (place ? *o->name != '-' && !--place : !strcmp(o->name, name))) return o;
  return NULL;
}

/* usage: what follows the program's name in --help. */
static inline void read_options(const char *usage, const option *const *tables) {
  const option *const *t, *o;
  int i, places = 0;
  for (t = tables; *t; ++t)
    for (o = *t; o->name; ++o)
      if (o->standard) set_option(o, o->standard);
  for (i = 1; i < program.argc; ++i) {
    const char *name = program.argv[i];
    if (!strcmp(name, "--help") || !strcmp(name, "-h")) {
      print_help(usage, tables);
      leave(0);
    }
    o = find_option(tables, name, *name == '-' ? 0 : ++places);
    if (!o && *name == '-') die("unknown option %s; --help lists the options", name);
    if (!o) die("\"%s\" is not an option; --help lists the options", name);
    if (!o->argument && o->string)
      *o->string = name;
    else if (!o->argument)
      *o->whole = 1;
    else if (++i == program.argc)
      die("%s needs a value, %s; --help lists the options", name, o->argument);
    else
      set_option(o, program.argv[i]);
  }
}

/* The command again, as a shell reads it, with --resume FILE. */
static inline void print_command(FILE *f, const char *resume) {
  static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-+=:"
                              ",./@%";
  int i;
  for (i = 0; i < program.argc + 2; ++i) {
    const char *s = i < program.argc ? program.argv[i] : i == program.argc ? "--resume" : resume;
    if (i < program.argc && !strcmp(s, "--resume") && ++i) continue;
    fputs(i ? " " : "", f);
    if (*s && strspn(s, plain) == strlen(s)) {
      fputs(s, f);
      continue;
    }
    fputc('\'', f);
    for (; *s; ++s) fprintf(f, *s == '\'' ? "'\\''" : "%c", *s);
    fputc('\'', f);
  }
  fputc('\n', f);
}

/* ---- files ---- */

/* The name of a file begins here, behind its folder. */
static inline const char *file_name(const char *path) {
#ifdef _WIN32
  const char *separators = "/\\:";
#else
  const char *separators = "/";
#endif
  const char *s = path + strlen(path);
  while (s > path && !strchr(separators, s[-1])) --s;
  return s;
}

/* FILE-SUFFIX with the ending kept. */
static inline char *with_suffix(const char *path, const char *suffix) {
  const char *name = file_name(path), *dot = strrchr(name, '.');
  int stem = (int)((dot && dot > name ? dot : name + strlen(name)) - path);
  return printed("%.*s-%s%s", stem, path, suffix, path + stem);
}

/* 0: there is no such file. One that is there but cannot be opened is not passed over in silence.
 */
static inline int exists(const char *path) {
  FILE *f = my_rank ? NULL : fopen(path, "rb");
  if (!my_rank && !f && errno != ENOENT && errno != ENOTDIR)
    die("cannot open %s: %s", path, strerror(errno));
  if (f) fclose(f);
  return agree(f != NULL);
}

static moe_env env;

/* For moe_writer: into a text. */
static inline int write_to_text(void *user, const void *bytes, size_t n) {
  put_bytes((text *)user, (const char *)bytes, n);
  return 0;
}

static inline moe_status write_text(void *user, const moe_writer *writer, const moe_env *e) {
  const text *t = (const text *)user;
  (void)e;
  return t->bytes && writer->write(writer->user, t->data, t->bytes) ? MOE_E_IO : MOE_OK;
}

/* How programs write files (models and checkpoints go the same way inside the library): the old
   file stays as it is until the new one is whole. The text is freed. */
static inline void save_text(text *t, const char *path) {
  if (!my_rank) need(moe_file_replace(path, write_text, t, &env));
  free(t->data);
  memset(t, 0, sizeof *t);
}

/* A name that cannot be written is better known before the work than after it. Nothing is created
   for that: a kill would leave an empty file, which would pass for a result. */
static inline void check_writable(const char *option_name, const char *path) {
  const char *name = path ? file_name(path) : NULL, *folder = ".";
  FILE *f = NULL;
  int bad;
  if (!path || my_rank) return;
  if (name > path) folder = printed("%.*s.", (int)(name - path), path);
  if (!access(path, 0))
    bad = !(f = fopen(path, "ab"));
  else
    bad = errno != ENOENT || !*name || access(folder, W_OK);
  if (bad) die("%s: %s cannot be written: %s", option_name, path, strerror(errno));
  if (f) fclose(f);
}

/* Bytes of standard input that are there, at least one; 0: it has ended. */
static inline size_t read_input(char *to, unsigned room) {
  long n;
#ifdef _WIN32
  static int binary; /* else the byte 0x1a would end it */
  if (!binary) binary = 1, _setmode(_fileno(stdin), _O_BINARY);
  n = _read(_fileno(stdin), to, room);
#else
  while ((n = (long)read(STDIN_FILENO, to, room)) < 0 && errno == EINTR) continue;
#endif
  if (n < 0) die("standard input cannot be read: %s", strerror(errno));
  return (size_t)n;
}

/* The next line of standard input without its end, \n or \r\n; 0: there is none. wait 0: none is
   there yet either. So a program can answer what it has before it waits for more. */
static inline int read_line(text *t, int wait) {
  static char buffer[1 << 16];
  static size_t at, end;
  static int ended;
  char *mark;
  t->bytes = 0;
  for (;;) {
    mark = (char *)memchr(buffer + at, '\n', end - at);
    if (!mark && !wait && !ended) return 0;
    put_bytes(t, buffer + at, mark ? (size_t)(mark - buffer) - at : end - at);
    at = mark ? (size_t)(mark - buffer) + 1 : end;
    if (mark || ended) break;
    at = 0;
    end = read_input(buffer, sizeof buffer);
    ended = !end;
  }
  if (!mark && !t->bytes) return 0;
  if (t->bytes && t->data[t->bytes - 1] == '\r') t->data[--t->bytes] = 0;
  return 1;
}

/* ---- the machine ---- */

static struct {
  const char *isa, *precision, *device, *kernels;
  int threads, profiled;
} machine;
#ifdef TOOL_CUDA
static moe_backend gpu; /* user NULL: not opened */
#endif
static moe_pool *pool;
static moe_profile profile;

static const option machine_options[] = {
    GROUP("machine"),
    WHOLE("--threads", machine.threads, 1, 256, NULL, "[to train: all processors, else 1]"),
    STRING("--isa", "auto|avx512|avx2|sse2|neon|rvv|scalar", machine.isa, "auto",
           "instruction set"),
    STRING("--precision", "fp32|bf16", machine.precision, "fp32",
           "bf16: products of the layers with operands of 8 bits of precision, weights and sums "
           "in fp32; needs AMX or AVX512-BF16, else goes on in fp32"),
    STRING("--device", "WHICH", machine.device, "cpu",
           "cpu, cuda, cuda:N or auto. cuda: an NVIDIA GPU, or a sentence and the CPU where there "
           "is none; auto: without the sentence. For programs compiled with -DTOOL_CUDA and -ldl"),
    STRING("--kernels", "FILE", machine.kernels, NULL,
           "keep the compiled kernels of the GPU in this file"),
    FLAG("--profile", machine.profiled, "say at the end where the time went"),
    END_OF_OPTIONS};

static inline void begin_program(const char *name, int argc, char **argv) {
  begin_ranks(&argc, &argv);
  program.name = name;
  program.argc = argc;
  program.argv = argv;
}

/* --device: opens the GPU, if there is one. */
static inline void open_device(void) {
  int number = 0, end = 0, automatic = !strcmp(machine.device, "auto");
  if (!strcmp(machine.device, "cpu")) return;
  if (ranks > 1) die("--device %s: several ranks compute on the CPU", machine.device);
  if (!automatic && strcmp(machine.device, "cuda") &&
      (sscanf(machine.device, "cuda:%d%n", &number, &end) != 1 || machine.device[end] ||
       number < 0))
    die("--device is cpu, cuda, cuda:N or auto, not \"%s\"", machine.device);
#ifdef TOOL_CUDA
  {
    moe_cuda_options options;
    moe_env quiet = env;
    moe_cuda_options_init(&options);
    options.device = number;
    options.cache = machine.kernels;
    if (automatic) quiet.log = NULL;
    if (!moe_cuda_open(&gpu, &options, &quiet)) env.backend = &gpu;
  }
#else
  if (!automatic)
    die("--device %s: %s was compiled without it: cc -DTOOL_CUDA ... -ldl", machine.device,
        program.name);
#endif
}

/* Processors for this rank: those that it may use, or its part of this machine's. */
static inline int processors(void) {
  int all = moe_processors(), mine = all;
#ifdef _SC_NPROCESSORS_ONLN
  mine = (int)sysconf(_SC_NPROCESSORS_ONLN) / ranks_here();
#endif
  return mine < 1 ? 1 : mine < all ? mine : all;
}

/* threads: as many where --threads says nothing; 0: all processors. */
static inline void open_machine(int threads) {
  if (moe_env_init(&env, moe_isa_from_name(machine.isa)))
    die("this machine or this build has no %s; --isa auto takes the best there is", machine.isa);
  env.log = log_sentence;
  open_device();
  if (!strcmp(machine.precision, "bf16")) {
    if (env.backend)
      env.precision = MOE_TYPE_BF16;
    else
      moe_env_set_precision(&env, MOE_TYPE_BF16); /* or a sentence, and fp32 */
  }
  moe_profile_init(&profile, NULL, NULL);
  if (machine.profiled) env.profile = &profile;
  overlap_ops(&env, &profile);
  if (machine.threads) threads = machine.threads;
  if (threads != 1) need(moe_pool_create(&pool, threads ? threads : processors(), &env));
}

/* ---- interruption, the end ---- */

static volatile sig_atomic_t interrupted; /* the signal's number */

/* A second one ends the program where it is. */
static inline void on_interrupt(int signal_number) {
  interrupted = signal_number;
  signal(signal_number, SIG_DFL);
}

/* From now on Ctrl-C and a plain kill set `interrupted`; then the program should end with status
   128 + interrupted. */
static inline void catch_interrupts(void) {
  signal(SIGINT, on_interrupt);
  signal(SIGTERM, on_interrupt);
}

/* From now on they end it at once: what was trained is on the disk, or printed. */
static inline void release_interrupts(void) {
  interrupted = highest(interrupted);
  if (interrupted) leave(128 + interrupted);
  signal(SIGINT, SIG_DFL);
  signal(SIGTERM, SIG_DFL);
}

/* Prints the profile and looks whether all could be printed; the exit status, also that of a Ctrl-C
   that found nothing left to stop. */
static inline int end_program(FILE *profile_to) {
  char table[2048];
  moe_profile_write(table, sizeof table, &profile);
  if (machine.profiled) fputs(table, profile_to);
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
#ifdef TOOL_CUDA
  moe_cuda_close(&gpu);
#endif
  moe_pool_free(pool);
  all_end = 1;
  return interrupted ? 128 + interrupted : 0;
}

/* The bits of bf16 on AMX are its own, and those of a GPU. */
static inline const char *precision_name(void) {
  if (env.backend) return env.precision == MOE_TYPE_BF16 ? "bf16-cuda" : "fp32-cuda";
  return env.precision != MOE_TYPE_BF16     ? "fp32"
         : env.cpu_flags & MOE_CPU_AMX_BF16 ? "bf16-AMX"
                                            : "bf16";
}

/* ---- progress ---- */

static inline double seconds_now(void) { return profile.clock(profile.user); }

/* Steps of a piece of work: where this process began, and when. */
typedef struct progress {
  const char *title;
  int64_t first, steps;
  double began, last;
} progress;

static inline progress begin_progress(const char *title, int64_t first, int64_t steps) {
  progress p = {title, first, steps, seconds_now(), seconds_now()};
  return p;
}

/* Columns of the terminal that a stream goes to; 0: it goes elsewhere. */
static inline int terminal_width(FILE *f) {
  int columns = 0;
  if (!isatty(fileno(f))) return 0;
#ifdef _WIN32
  {
    CONSOLE_SCREEN_BUFFER_INFO info;
    DWORD which = f == stdout ? STD_OUTPUT_HANDLE : STD_ERROR_HANDLE;
    if (GetConsoleScreenBufferInfo(GetStdHandle(which), &info))
      columns = info.srWindow.Right - info.srWindow.Left + 1;
  }
#elif defined(TIOCGWINSZ)
  {
    struct winsize size;
    if (!ioctl(fileno(f), TIOCGWINSZ, &size)) columns = size.ws_col;
  }
#endif
  return columns > 0 ? columns : 80;
}

/* A sentence: wrapped between words on a terminal, elsewhere one line. */
TOOLS_PRINTF(1) static inline void print_sentence(const char *format, ...) {
  char sentence[1024];
  int width = terminal_width(stdout);
  va_list args;
  va_start(args, format);
  vsnprintf(sentence, sizeof sentence, format, args);
  va_end(args);
  if (width)
    print_wrapped(sentence, 0, width);
  else
    printf("%s\n", sentence);
}

/* One line, redrawn in place on a terminal, with the title cut where it is too wide; elsewhere a
   line every half minute. end: the last one. */
static inline void show_progress(progress *p, int64_t step, double loss, double speed, int end) {
  int width = terminal_width(stderr);
  double now = seconds_now(), each = (now - p->began) / (double)(step - p->first);
  long long left = step > p->first ? (long long)(each * (double)(p->steps - step)) : 0;
  char line[128];
  int n, title = 34;
  if (!end && now - p->last < (width ? 0.2 : 30)) return;
  p->last = now;
  n = snprintf(line, sizeof line, " step %lld/%lld  loss %.4f  %.0f tokens/s  %lld:%02lld left",
               (long long)step, (long long)p->steps, loss, speed, left / 60, left % 60);
  if (!width) {
    fprintf(stderr, "%-34s%s \n", p->title, line);
    return;
  }
  if (title > width - 1 - n) title = n < width - 1 ? width - 1 - n : 0;
  n = width - 1 - title;
  fprintf(stderr, "\r%-*.*s%-*.*s%s", title, title, p->title, n, n, line, end ? "\n" : "");
}

/* Makes room for another line. */
static inline void clear_progress(void) {
  int width = terminal_width(stderr);
  if (width) fprintf(stderr, "\r%*s\r", width - 1, "");
}

/* Whether a column is blank in every line of a table. */
static inline int blank_column(const char *table, int column) {
  const char *end;
  for (; *table; table = end + 1) {
    end = strchr(table, '\n');
    if (end - table > column && table[column] != ' ') return 0;
  }
  return 1;
}

/* Prints a table whose lines are a title, cells of equal width and perhaps more. A table wider than
   the terminal is cut into blocks, each of which repeats the titles. */
static inline void print_blocks(const text *table, int title, int cell) {
  int width = terminal_width(stdout), from = title, to, widest = 0;
  const char *line, *end;
  for (line = table->data; *line; line = end + 1) {
    end = strchr(line, '\n');
    if ((int)(end - line) > widest) widest = (int)(end - line);
  }
  for (; from == title || from < widest; from = to) {
    int cells = (width - title) / cell;
    to = !width || widest - from + title <= width ? widest : from + (cells > 1 ? cells : 1) * cell;
    while (to < widest && to > from + 1 && !blank_column(table->data, to)) --to;
    if (from > title) printf("\n");
    for (line = table->data; *line; line = end + 1) {
      int bytes;
      end = strchr(line, '\n');
      bytes = (int)(end - line);
      if (from > title && bytes <= from) continue;
      printf("%.*s", bytes < title ? bytes : title, line);
      if (bytes > from) printf("%.*s", (bytes < to ? bytes : to) - from, line + from);
      printf("\n");
    }
  }
}
#endif
