/* Part of kernels.cpp where it is built with planted faults (plant.py): `kernels plants CASES
   [N ...]` runs the emulated cases with each fault, or with those named, each in a process of its
   own, and only the ops that reach its place (of those that PLANT_OPS names, if it is set). A line
   for each: "12 caught linear", "13 survived", "14 unreached". MOE_PLANT=N and other arguments: as
   without faults, but with this one. */
#ifndef PLANTED_H
#define PLANTED_H
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

int plant_on = getenv("MOE_PLANT") ? atoi(getenv("MOE_PLANT")) : 0;
unsigned char plant_seen[PLANT_MOST];

struct Task { /* an op in a mode, and the places that it reaches */
  size_t op;
  const Mode *mode;
  std::vector<unsigned char> seen;
};

static bool plant_run(const Task &task, int count) {
  bool good = open_device(*task.mode);
  good = good && run_op(task.op, count);
  return good && !moe_cuda_close(&cases_gpu);
}

/* Whether a process with fault n fails; it may compute for six seconds. */
static bool plant_caught(const Task &task, int count, int n) {
  pid_t child = fork();
  int status = 1;
  if (child == 0) {
    rlimit limit = {6, 6};
    setrlimit(RLIMIT_CPU, &limit);
    if (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr)) _exit(2);
    plant_on = n;
    _exit(plant_run(task, count) ? 0 : 1);
  }
  waitpid(child, &status, 0);
  return status != 0;
}

static int plants(int count, int named, char **names) {
  std::vector<Task> tasks;
  const char *only = getenv("PLANT_OPS");
  for (size_t op = sizeof ops / sizeof *ops; op-- > 0;)
    for (const Mode &mode : modes) {
      if (!ops[op].products && &mode != modes) continue;
      if (mode.cublas && ops[op].run != case_linear) continue;
      if (only && !strstr(only, ops[op].name)) continue;
      Task task = {op, &mode, {}};
      memset(plant_seen, 0, sizeof plant_seen);
      if (!plant_run(task, count)) return 1;
      task.seen.assign(plant_seen, plant_seen + PLANT_MOST);
      tasks.push_back(task);
    }
  for (int i = 0; i < (named ? named : PLANT_MOST - 1); ++i) {
    int n = named ? atoi(names[i]) : i + 1;
    const char *by = nullptr;
    bool reached = false;
    for (const Task &task : tasks) {
      if (!task.seen[(size_t)n] || by) continue;
      reached = true;
      if (plant_caught(task, count, n)) by = ops[task.op].name;
    }
    if (by)
      printf("%d caught %s\n", n, by);
    else if (reached || named)
      printf("%d %s\n", n, reached ? "survived" : "unreached");
  }
  return 0;
}
#endif
