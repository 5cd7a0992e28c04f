/* ranks.h - several processes, on one machine or many, that train one model with MPI:
   mpicc -DTRAIN_MPI -O3 -o train_mpi examples/train.c -lm -pthread && mpirun -n 4 ./train_mpi ...

   All run the same program on the same files, in a folder that all see. Each computes its rows of
   every batch and of every evaluation, then gradients and answers are added up, so that all hold
   the same numbers and decide the same. Rank 0 alone writes and speaks. Compiled without TRAIN_MPI
   there is one rank, and nothing here does anything. */
#ifndef TOOLS_RANKS_H
#define TOOLS_RANKS_H

static int my_rank, ranks = 1;
static int all_end;              /* 1: the program ends here, in all ranks */
static char last_sentence[4352]; /* of a rank other than 0 */
static int sharding;             /* --shard: each rank steps its range of the weights */
static int overlapping;          /* --overlap: gradients are added up while backward goes on */

#ifndef TRAIN_MPI
static inline void begin_ranks(int *argc, char ***argv) { (void)argc, (void)argv; }
static inline int ranks_here(void) { return 1; }
static inline int agree(int mine) { return mine; }
static inline int highest(int mine) { return mine; }
static inline void add_floats(float *x, size_t n) { (void)x, (void)n; }
static inline void add_doubles(double *x, int n) { (void)x, (void)n; }
static inline void divide_training(moe_train_config *config, size_t n) {
  (void)config, (void)n, (void)sharding, (void)overlapping;
}
static inline void begin_overlap(float *g) { (void)g; }
static inline void add_gradients(float *g, size_t n) { (void)g, (void)n; }
static inline void overlap_ops(moe_env *e, moe_profile *times) { (void)e, (void)times; }
#else
#include <mpi.h>
#ifdef _WIN32
#define NOWHERE "NUL"
#else
#define NOWHERE "/dev/null"
#endif
static FILE *complaints; /* standard error of a rank other than 0 */

/* At the end of the program. A rank that ends alone ends all: the others would wait for it. What is
   wrong with all is said by rank 0, which the others let speak first. */
static inline void end_ranks(void) {
  struct timespec moment = {0, my_rank ? 500000000 : 200000000};
  if (all_end) {
    MPI_Finalize();
    return;
  }
  fflush(stderr);
  nanosleep(&moment, NULL); /* MPICH drops what it has not passed on when a rank ends all */
  if (my_rank && *last_sentence) {
    fprintf(complaints, "rank %d: %s", my_rank, last_sentence);
    fflush(complaints);
    nanosleep(&moment, NULL);
  }
  MPI_Abort(MPI_COMM_WORLD, 1);
}

static inline void say(const char *sentence);

/* What MPI cannot do ends the program with its sentence. */
static inline void mpi_failed(MPI_Comm *comm, int *code, ...) {
  char sentence[MPI_MAX_ERROR_STRING + 8] = "MPI: ";
  int n;
  (void)comm;
  MPI_Error_string(*code, sentence + 5, &n);
  say(sentence);
  exit(1);
}

static inline void begin_ranks(int *argc, char ***argv) {
  MPI_Errhandler handler;
  int provided;
  MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &my_rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  MPI_Comm_create_errhandler(mpi_failed, &handler);
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, handler);
  if (my_rank) {
    complaints = fdopen(dup(2), "w");
    if (!complaints || !freopen(NOWHERE, "w", stdout) || !freopen(NOWHERE, "w", stderr))
      MPI_Abort(MPI_COMM_WORLD, 1);
  }
  atexit(end_ranks);
}

/* Ranks on this machine, which share its processors. */
static inline int ranks_here(void) {
  MPI_Comm here;
  int n;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
  MPI_Comm_size(here, &n);
  MPI_Comm_free(&here);
  return n;
}

/* What rank 0 says. */
static inline int agree(int mine) {
  MPI_Bcast(&mine, 1, MPI_INT, 0, MPI_COMM_WORLD);
  return mine;
}

static inline int highest(int mine) {
  MPI_Allreduce(MPI_IN_PLACE, &mine, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  return mine;
}

/* Element by element over all ranks; in parts, since MPI counts in int. */
static inline void add_floats(float *x, size_t n) {
  const size_t most = (size_t)1 << 26;
  size_t i, part;
  for (i = 0; i < n; i += part) {
    part = n - i < most ? n - i : most;
    MPI_Allreduce(MPI_IN_PLACE, x + i, (int)part, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  }
}

static inline void add_doubles(double *x, int n) {
  MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

/* ---- --shard: moments and steps divided among the ranks, whole vectors of 16 ---- */

static struct {
  int *count, *first; /* (ranks) floats */
  float *own;         /* (count of this rank) */
} ranges;

static inline double add_norms(void *user, double mine) {
  (void)user;
  add_doubles(&mine, 1);
  return mine;
}

static inline void fetch_weights(void *user, float *weights, size_t n) {
  (void)user, (void)n;
  MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_FLOAT, weights, ranges.count, ranges.first, MPI_FLOAT,
                 MPI_COMM_WORLD);
}

static inline void gather_moments(void *user, const float *mine, float *all, size_t n) {
  (void)user, (void)n;
  MPI_Gatherv(mine, ranges.count[my_rank], MPI_FLOAT, all, ranges.count, ranges.first, MPI_FLOAT, 0,
              MPI_COMM_WORLD);
}

/* ---- --overlap: a layer's gradients are added up while backward goes on with the next ---- */

enum { MOVING = 1024 };
static struct {
  float *g; /* NULL: more is still to be added to the gradients */
  int n;
  MPI_Request request[MOVING];
} moving;

static inline void begin_overlap(float *g) { moving.g = sharding || ranks == 1 ? NULL : g; }

static inline void finish_overlap(void) {
  MPI_Waitall(moving.n, moving.request, MPI_STATUSES_IGNORE);
  moving.n = 0;
}

/* moe_train_config.ready */
static inline void add_range(void *user, size_t first, size_t count) {
  const size_t most = (size_t)1 << 26;
  size_t part;
  (void)user;
  for (; moving.g && count; first += part, count -= part) {
    part = count < most ? count : most;
    if (moving.n == MOVING) finish_overlap();
    MPI_Iallreduce(MPI_IN_PLACE, moving.g + first, (int)part, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD,
                   &moving.request[moving.n++]);
  }
}

/* Most MPIs move messages only within their own calls. moe.h reads the clock of a profile after
   each op, so this clock makes such a call. */
static inline double time_of_op(void *user) {
  int done;
  (void)user;
  if (moving.n) MPI_Testall(moving.n, moving.request, &done, MPI_STATUSES_IGNORE);
  return MPI_Wtime();
}

static inline void overlap_ops(moe_env *e, moe_profile *times) {
  if (!overlapping || ranks == 1) return;
  moe_profile_init(times, time_of_op, NULL);
  e->profile = times;
}

/* Sets this rank's range of n weights, unless it steps all, and who is told of ready gradients. */
static inline void divide_training(moe_train_config *config, size_t n) {
  static moe_share share;
  int r;
  config->share = NULL;
  config->ready = overlapping && !sharding && ranks > 1 ? add_range : NULL;
  if (!sharding || ranks == 1) return;
  free(ranges.count), free(ranges.own);
  ranges.count = (int *)calloc(2 * (size_t)ranks, sizeof(int));
  if (!ranges.count || n > 2147483647) MPI_Abort(MPI_COMM_WORLD, 1); /* MPI counts in int */
  ranges.first = ranges.count + ranks;
  for (r = 0; r < ranks; ++r) ranges.first[r] = (int)(n / 16 * (size_t)r / (size_t)ranks * 16);
  for (r = 0; r < ranks; ++r)
    ranges.count[r] = (r + 1 < ranks ? ranges.first[r + 1] : (int)n) - ranges.first[r];
  share.first = (size_t)ranges.first[my_rank];
  share.count = (size_t)ranges.count[my_rank];
  ranges.own = (float *)calloc(share.count + 1, sizeof(float));
  if (!ranges.own) MPI_Abort(MPI_COMM_WORLD, 1);
  share.sum = add_norms;
  share.weights = fetch_weights;
  share.moments = gather_moments;
  config->share = &share;
}

/* Before a step: the gradients of the whole batch, as far as this rank needs them. */
static inline void add_gradients(float *g, size_t n) {
  if (moving.g) { /* they are added up, or on their way */
    finish_overlap();
    moving.g = NULL;
    return;
  }
  if (!sharding || ranks == 1) {
    add_floats(g, n);
    return;
  }
  /* not in place: MPICH 5.0 then copies within the array, and fails */
  MPI_Reduce_scatter(g, ranges.own, ranges.count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  memcpy(g + ranges.first[my_rank], ranges.own, (size_t)ranges.count[my_rank] * sizeof *g);
}
#endif
#endif
