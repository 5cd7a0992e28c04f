/* Opening a GPU, compiling, the cache file, memory, queues. */

/* Opens the double as it was set up; the sentences are in `said`. */
static moe_status open_one(moe_backend *b, const moe_cuda_options *options) {
  moe_env env = host_env();
  memset(b, 0, sizeof *b);
  return moe_cuda_open(b, options, &env);
}

static void test_open_names_the_gpu_and_gives_everything_back(void) {
  moe_cuda_options options = host_options();
  moe_cuda_counts counts;
  moe_backend b;
  double_reset();
  CHECK(!open_one(&b, &options), "%s", said);
  CHECK(!strcmp(b.name, "cuda:0 (Double 0, sm_80; linear layers by our own kernels)"), "%s",
        b.name);
  moe_cuda_count(&b, &counts);
  CHECK(counts.arch == 80 && !counts.allocations && !counts.queues && !counts.bytes, "counts");
  CHECK(!said[0], "%s", said);
  CHECK(!moe_cuda_close(&b) && !b.user && !moe_cuda_close(&b), "closing");
  HOST_IS_CLEAN();
}

/* What is missing, and the sentence that says so. */
static void test_open_says_what_is_missing(void) {
  static const struct {
    const char *what, *says;
    moe_status status;
  } row[] = {{"driver", "install the NVIDIA driver", MOE_E_UNSUPPORTED},
             {"not a driver", "the driver has no cuInit", MOE_E_UNSUPPORTED},
             {"no gpu", "no GPU is visible", MOE_E_UNSUPPORTED},
             {"index", "there are GPUs 0 to 0", MOE_E_ARGUMENT},
             {"negative", "there are GPUs 0 to 0", MOE_E_ARGUMENT},
             {"old gpu", "at least 7.0 is needed", MOE_E_UNSUPPORTED},
             {"nvrtc", "pip install nvidia-cuda-nvrtc-cu12", MOE_E_UNSUPPORTED},
             {"not nvrtc", "install NVRTC of CUDA 11.2 or later", MOE_E_UNSUPPORTED},
             {"nvrtc too new", "does not compile for this GPU", MOE_E_UNSUPPORTED},
             {"maker", "maker is 3", MOE_E_ARGUMENT},
             {"mirror", "mirror is -1", MOE_E_ARGUMENT},
             {"cublas", "install cuBLAS 11 or later", MOE_E_UNSUPPORTED}};
  size_t i;
  for (i = 0; i < sizeof row / sizeof *row; ++i) {
    moe_cuda_options options = host_options();
    const char *what = row[i].what;
    moe_backend b;
    moe_status status;
    double_reset();
    if (!strcmp(what, "driver")) options.driver = "/nowhere/libcuda.so.1";
    if (!strcmp(what, "not a driver")) options.driver = "libm.so.6";
    if (!strcmp(what, "no gpu")) control->devices = 0;
    if (!strcmp(what, "index")) options.device = 1;
    if (!strcmp(what, "negative")) options.device = -1;
    if (!strcmp(what, "old gpu")) control->arch = 61;
    if (!strcmp(what, "nvrtc")) options.nvrtc = "/nowhere/libnvrtc.so";
    if (!strcmp(what, "not nvrtc")) options.nvrtc = "libm.so.6";
    if (!strcmp(what, "nvrtc too new")) control->nvrtc_newest = 60;
    if (!strcmp(what, "maker")) options.maker = (moe_cuda_maker)3;
    if (!strcmp(what, "mirror")) options.mirror = -1;
    if (!strcmp(what, "cublas"))
      options.maker = MOE_CUDA_MAKER_CUBLAS, options.cublas = "/nowhere/libcublas.so";
    status = open_one(&b, &options);
    CHECK(status == row[i].status && strstr(said, row[i].says), "%s: status %d: %s", what,
          (int)status, said);
    CHECK(!b.user && !b.name, "%s: the table has changed", what);
    HOST_IS_CLEAN();
  }
}

static void test_open_takes_the_second_gpu(void) {
  moe_cuda_options options = host_options();
  moe_backend b, two;
  double_reset();
  control->devices = 2;
  options.device = 1;
  CHECK(!open_one(&b, &options) && strstr(b.name, "cuda:1 (Double 1"), "%s %s", b.name, said);
  options.device = 0;
  CHECK(!open_one(&two, &options) && strstr(two.name, "cuda:0 (Double 0"), "%s", said);
  CHECK(!moe_cuda_close(&two) && !moe_cuda_close(&b), "left");
  HOST_IS_CLEAN();
}

/* A CUBIN for the very card; PTX where NVRTC is older than it, or on request. */
static void test_open_compiles_for_the_card(void) {
  static const int card[] = {70, 75, 80, 86, 89, 90, 100, 120};
  moe_cuda_options options = host_options();
  moe_cuda_counts counts;
  moe_backend b;
  size_t i;
  for (i = 0; i < sizeof card / sizeof *card; ++i) {
    double_reset();
    control->arch = card[i];
    control->nvrtc_newest = 90;
    CHECK(!open_one(&b, &options), "%s", said);
    moe_cuda_count(&b, &counts);
    CHECK(counts.arch == (card[i] < 90 ? card[i] : 90), "%d: %d", card[i], (int)counts.arch);
    moe_cuda_close(&b);
  }
  options.ptx = 1;
  double_reset();
  CHECK(!open_one(&b, &options), "%s", said);
  for (i = 0; i < (size_t)control->names && strcmp(control->called[i], "nvrtcGetPTX");) ++i;
  CHECK(i < (size_t)control->names, "PTX was not asked for");
  moe_cuda_close(&b);
  HOST_IS_CLEAN();
}

static long open_compiled(moe_cuda_options *options) {
  moe_backend b;
  long i, times = 0;
  for (i = 0; i < control->names; ++i) control->times[i] = 0;
  options->cache = host_cache;
  if (open_one(&b, options)) return -1;
  moe_cuda_close(&b);
  for (i = 0; i < control->names; ++i)
    if (!strcmp(control->called[i], "nvrtcCompileProgram")) times = control->times[i];
  return times;
}

/* Byte `at` of the cache file is changed, or the file ends there (cut 1). */
static int open_damage(long at, int cut) {
  static char data[1 << 16];
  FILE *file = fopen(host_cache, "rb");
  size_t bytes = file ? fread(data, 1, sizeof data, file) : 0;
  if (!file) return 0;
  fclose(file);
  if (at < 0) at += (long)bytes;
  if (!cut) data[at] = (char)(data[at] ^ 1);
  file = fopen(host_cache, "wb");
  if (!file) return 0;
  fwrite(data, 1, cut ? (size_t)at : bytes, file);
  return !fclose(file);
}

static void test_open_keeps_kernels_in_the_cache_file(void) {
  static const long at[] = {0, 8, 16, 24, 32, 40, 500, -1};
  moe_cuda_options options = host_options();
  size_t i;
  int cut;
  double_reset();
  remove(host_cache);
  CHECK(open_compiled(&options) == 1, "first: %s", said);
  CHECK(open_compiled(&options) == 0, "again: %s", said);
  for (cut = 0; cut < 2; ++cut)
    for (i = 0; i < sizeof at / sizeof *at; ++i) {
      CHECK(open_damage(at[i], cut), "no cache file");
      CHECK(open_compiled(&options) == 1, "byte %ld, cut %d: %s", at[i], cut, said);
      CHECK(open_compiled(&options) == 0, "not replaced: %s", said);
      CHECK(!said[0], "%s", said);
    }
  control->arch = 86;
  CHECK(open_compiled(&options) == 1 && open_compiled(&options) == 0, "another card: %s", said);
  options.ptx = 1;
  CHECK(open_compiled(&options) == 1 && open_compiled(&options) == 0, "PTX: %s", said);
  remove(host_cache);
  snprintf(host_cache + strlen(host_cache), 20, "/nowhere/x");
  CHECK(open_compiled(&options) == 1 && strstr(said, "cannot be written"), "%s", said);
  host_cache[strlen(host_cache) - 10] = 0;
  HOST_IS_CLEAN();
}

/* Copies of any size, at once and through the pinned buffer, with and without pinned memory. */
static void test_open_copies_what_it_is_given(void) {
  static const size_t sizes[] = {1, 63, 4096, 700000, 1 << 20, (1 << 20) + 1, 3000000};
  moe_env env = host_env();
  moe_cuda_options options = host_options();
  unsigned char *from = (unsigned char *)malloc(3000000), *to = (unsigned char *)malloc(3000000);
  int pinned, s;
  size_t i, j;
  for (pinned = 0; pinned < 2; ++pinned) {
    moe_backend b;
    void *stream = NULL;
    double_reset();
    control->pinned = pinned;
    CHECK(!moe_cuda_open(&b, &options, &env), "%s", said);
    CHECK(!b.open(&b, &env, &stream), "%s", said);
    for (s = 0; s < 2; ++s)
      for (i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
        void *p = NULL;
        env.stream = s ? stream : NULL;
        for (j = 0; j < sizes[i]; ++j) from[j] = (unsigned char)(j * 7 + i);
        CHECK(!b.alloc(&b, &env, &p, sizes[i]), "%s", said);
        CHECK(!b.clear(&b, &env, p, sizes[i]), "%s", said);
        CHECK(!b.upload(&b, &env, p, from, sizes[i]), "%s", said);
        memset(from, 0, sizes[i]); /* it may change */
        CHECK(!b.download(&b, &env, to, p, sizes[i]) && !b.sync(&b, &env), "%s", said);
        for (j = 0; j < sizes[i] && to[j] == (unsigned char)(j * 7 + i);) ++j;
        CHECK(j == sizes[i], "%zu bytes: byte %zu", sizes[i], j);
        b.release(&b, p);
      }
    env.stream = NULL;
    b.close(&b, stream);
    CHECK(!moe_cuda_close(&b), "something was left");
    HOST_IS_CLEAN();
  }
  free(from), free(to);
}

static void test_open_releases_what_was_forgotten(void) {
  moe_env env = host_env();
  moe_cuda_options options = host_options();
  moe_cuda_counts counts;
  moe_backend b;
  void *p, *stream;
  double_reset();
  CHECK(!moe_cuda_open(&b, &options, &env), "%s", said);
  CHECK(!b.alloc(&b, &env, &p, 1000) && !b.alloc(&b, &env, &p, 2000), "%s", said);
  CHECK(!b.open(&b, &env, &stream), "%s", said);
  moe_cuda_count(&b, &counts);
  CHECK(counts.allocations == 2 && counts.queues == 1 && counts.bytes == 3000, "%d, %d, %ld",
        (int)counts.allocations, (int)counts.queues, (long)counts.bytes);
  CHECK(moe_cuda_close(&b) == 3, "three things were left");
  HOST_IS_CLEAN();
}

static void test_open_says_how_much_memory_is_missing(void) {
  moe_env env = host_env();
  moe_cuda_options options = host_options();
  moe_backend b;
  void *p = NULL;
  double_reset();
  control->memory = 1000000;
  CHECK(!moe_cuda_open(&b, &options, &env), "%s", said);
  CHECK(b.alloc(&b, &env, &p, 2000000) == MOE_E_MEMORY && !p, "%s", said);
  CHECK(strstr(said, "no memory for 2000000 bytes, 1000000 of 1000000 are free"), "%s", said);
  CHECK(!b.alloc(&b, &env, &p, 1000), "afterwards: %s", said);
  b.release(&b, p);
  CHECK(!moe_cuda_close(&b), "left");
  HOST_IS_CLEAN();
}

/* Versions of libraries: the driver's own, older ones, newer ones; a given path alone. */
static void test_open_looks_for_libraries_by_version(void) {
  static const struct {
    int driver;
    const char *order;
  } row[] = {{12080, "12 11 13 14 "},
             {13000, "13 12 11 14 "},
             {10020, "11 12 13 14 "},
             {14000, "14 13 12 11 "},
             {99000, "14 13 12 11 "}};
  static moe__cuda cuda;
  char pattern[600], path[512], made[5][600], seen[64];
  const char *paths[3] = {"/nowhere/lib%d.so", pattern, NULL};
  size_t i;
  int major, at;
  void *library;
  snprintf(pattern, sizeof pattern, "%s_lib.%%d", host_cache);
  for (major = 10; major < 15; ++major) {
    snprintf(made[major - 10], sizeof made[0], "%s_lib.%d", host_cache, major);
    remove(made[major - 10]);
    CHECK(!symlink(double_path[0] == '/' ? double_path : strrchr(double_path, '/') + 1,
                   made[major - 10]),
          "no link");
  }
  for (i = 0; i < sizeof row / sizeof *row; ++i) {
    cuda.driver_version = row[i].driver;
    for (at = 0, seen[0] = 0; (library = moe__cuda_find(paths, NULL, &cuda, &at, path)) != NULL;) {
      dlclose(library);
      snprintf(seen + strlen(seen), 8, "%s ", strrchr(path, '.') + 1);
    }
    CHECK(!strcmp(seen, row[i].order), "driver %d: %s", row[i].driver, seen);
  }
  for (i = 0; i < 5; ++i) remove(made[i]);
  at = 0;
  library = moe__cuda_find(paths, double_path, &cuda, &at, path);
  CHECK(library && !strcmp(path, double_path), "%s", path);
  dlclose(library);
  CHECK(!moe__cuda_find(paths, double_path, &cuda, &at, path), "a given path is tried once");
}

/* What the cache file's key is made of. */
static void test_open_knows_what_the_cache_is_of(void) {
  moe_cuda_options options = host_options();
  moe__cuda_image image;
  const moe__cuda *cuda;
  moe_backend b;
  uint64_t key;
  char *source;
  FILE *file;
  CHECK(moe__cuda_hash(0xcbf29ce484222325u, "a", 1) == 0xaf63dc4c8601ec8cu, "not FNV-1a");
  double_reset();
  remove(host_cache);
  options.cache = host_cache;
  CHECK(!open_one(&b, &options), "%s", said);
  cuda = (const moe__cuda *)b.user;
  source = moe__cuda_source(cuda->card_arch);
  key = moe__cuda_hash(0xcbf29ce484222325u, source, strlen(source));
  key = moe__cuda_hash(key, &cuda->card_arch, sizeof cuda->card_arch);
  key = moe__cuda_hash(key, &cuda->options.ptx, sizeof cuda->options.ptx);
  key = moe__cuda_hash(key, cuda->card, sizeof cuda->card);
  free(source);
  file = fopen(host_cache, "rb");
  CHECK(file && fread(&image, offsetof(moe__cuda_image, data), 1, file) == 1, "no cache file");
  fclose(file);
  CHECK(image.key == key && image.arch == 80 && !memcmp(image.magic, "MOECUDA1", 8), "the key");
  CHECK(!moe_cuda_close(&b), "left");
}

/* Where the file cannot be moved to its place, nothing is left beside it. */
static void test_open_leaves_no_half_of_a_cache_file(void) {
  moe_cuda_options options = host_options();
  char pattern[600];
  glob_t found;
  double_reset();
  remove(host_cache); /* a file or a folder that another run has left */
  CHECK(!mkdir(host_cache, 0777), "no folder");
  CHECK(open_compiled(&options) == 1 && strstr(said, "cannot be written"), "%s", said);
  snprintf(pattern, sizeof pattern, "%s.*", host_cache);
  rmdir(host_cache);
  CHECK(glob(pattern, 0, NULL, &found) == GLOB_NOMATCH, "%s is left", found.gl_pathv[0]);
  globfree(&found);
  options.cache = NULL;
  HOST_IS_CLEAN();
}

/* What NVRTC says goes to the log; a cached module that does not load is compiled again, silently;
   a cuBLAS that does not work is not used. */
static void test_open_goes_on_where_it_can(void) {
  moe_cuda_options options = host_options();
  moe_backend b;
  double_reset();
  snprintf(control->name, sizeof control->name, "nvrtcCompileProgram");
  control->fail_at = 1, control->error = 6;
  CHECK(open_one(&b, &options) == MOE_E_UNSUPPORTED && strstr(said, "line 1: a mistake"), "%s",
        said);
  HOST_IS_CLEAN();
  double_reset();
  said[0] = 0;
  remove(host_cache);
  CHECK(open_compiled(&options) == 1 && open_compiled(&options) == 0, "%s", said);
  snprintf(control->name, sizeof control->name, "cuModuleLoadData");
  control->fail_at = 1, control->error = 200;
  CHECK(open_compiled(&options) == 1 && !said[0], "%s", said);
  remove(host_cache);
  double_reset();
  snprintf(control->name, sizeof control->name, "cublasCreate_v2");
  control->fail_at = 1, control->error = 1;
  options.maker = MOE_CUDA_MAKER_AUTO, options.cublas = double_path, options.cache = NULL;
  CHECK(!open_one(&b, &options) && strstr(b.name, "by our own kernels") && !control->handles,
        "%s %s", b.name, said);
  CHECK(!moe_cuda_close(&b), "left");
  options.maker = MOE_CUDA_MAKER_CUBLAS;
  control->fail_at = 1;
  CHECK(open_one(&b, &options) && strstr(said, "MOE_CUDA_MAKER_OWN"), "%s", said);
  HOST_IS_CLEAN();
}

/* The maker of the same layer whose number of tokens was nearest, by ratio. */
static void test_open_chooses_the_nearest_measured_maker(void) {
  static const moe__cuda_choice measured[] = {{0, 0, 100, 64, 32, 1}, {0, 0, 1000, 64, 32, 0},
                                              {1, 0, 300, 64, 32, 1}, {0, 1, 300, 64, 32, 1},
                                              {0, 0, 300, 65, 32, 1}, {0, 0, 300, 64, 33, 1}};
  static const struct {
    int m, blas;
    double ratio;
  } row[] = {{100, 1, 1}, {50, 1, 0.5}, {200, 1, 0.5}, {400, 0, 0.4}, {2000, 0, 0.5}};
  moe__cuda cuda;
  size_t i;
  memset(&cuda, 0, sizeof cuda);
  MOE__CUDA_MUTEX_INIT(&cuda.mutex);
  memcpy(cuda.choice, measured, sizeof measured);
  cuda.choices = sizeof measured / sizeof *measured;
  for (i = 0; i < sizeof row / sizeof *row; ++i) {
    moe__cuda_choice want = {0, 0, row[i].m, 64, 32, -1};
    double ratio = moe__cuda_choose(&cuda, &want);
    CHECK(fabs(ratio - row[i].ratio) < 1e-9 && want.blas == row[i].blas, "%d tokens: %g, %d",
          row[i].m, ratio, (int)want.blas);
    want.n = 0;
    CHECK(moe__cuda_choose(&cuda, &want) >= ratio, "%d tokens of any layer", row[i].m);
    want.form = 2;
    CHECK(moe__cuda_choose(&cuda, &want) <= 0, "another form");
  }
  MOE__CUDA_MUTEX_FREE(&cuda.mutex);
}

static void run_open(void) {
  RUN(test_open_names_the_gpu_and_gives_everything_back);
  RUN(test_open_says_what_is_missing);
  RUN(test_open_takes_the_second_gpu);
  RUN(test_open_compiles_for_the_card);
  RUN(test_open_keeps_kernels_in_the_cache_file);
  RUN(test_open_copies_what_it_is_given);
  RUN(test_open_releases_what_was_forgotten);
  RUN(test_open_says_how_much_memory_is_missing);
  RUN(test_open_looks_for_libraries_by_version);
  RUN(test_open_knows_what_the_cache_is_of);
  RUN(test_open_leaves_no_half_of_a_cache_file);
  RUN(test_open_goes_on_where_it_can);
  RUN(test_open_chooses_the_nearest_measured_maker);
}
