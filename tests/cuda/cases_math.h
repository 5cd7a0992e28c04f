/* Device functions by themselves: random bits against moe.h's dropout, GELU in double precision. */
#ifndef CASES_MATH_H
#define CASES_MATH_H

/* Whether dropout takes the same of a million numbers; p decides which bits of a number count. */
static bool math_same_bits(float p, uint64_t key) {
  size_t n = 1 << 20;
  std::vector<float> x(n, 1.0f), y(n);
  float scale = 0;
  unsigned threshold = moe__cuda_drop(&scale, p, &key);
  moe_dropout(y.data(), x.data(), n, p, key, &cases_cpu);
  for (size_t i = 0; i < n; ++i)
    if ((moe__d_hash32(key, (unsigned)i) < threshold) != (y[i] == 0)) return false;
  return true;
}

/* The largest error of f on n numbers from `low` to `high`, relative to |f| + floor. */
static double math_error(float (*f)(float), double (*exact)(double), float low, float high,
                         double floor) {
  double most = 0;
  for (int i = 0; i <= 100000; ++i) {
    float x = low + (high - low) * (float)i / 100000.0f;
    double want = exact((double)x), error = fabs((double)f(x) - want) / (fabs(want) + floor);
    if (!(error <= most)) most = error;
  }
  return most;
}

static float math_gelu(float x) {
  float slope;
  return moe__d_gelu(x, &slope);
}

static float math_slope(float x) {
  float slope;
  moe__d_gelu(x, &slope);
  return slope;
}

static double exact_gelu(double x) { return x * 0.5 * erfc(-x * sqrt(0.5)); }

static double exact_slope(double x) {
  return 0.5 * erfc(-x * sqrt(0.5)) + x * exp(-0.5 * x * x) * 0.3989422804014327;
}

/* What is wrong, or NULL. */
static const char *math_fault() {
  if (!math_same_bits(0.3f, 0x123456789abcdefu) || !math_same_bits(0.0007f, 77u << 20) ||
      !math_same_bits(0.9001f, ~0ull))
    return "random bits are not moe.h's";
  if (!(moe__d_bf16(INFINITY) >= INFINITY) || moe__d_bf16(NAN) == moe__d_bf16(NAN) ||
      moe__d_bf16(1e-40f) != 0 || moe__d_bf16(1.00390625f) != 1 ||
      moe__d_bf16(1.01171875f) != 1.015625f)
    return "bf16";
  if (math_error(math_gelu, exact_gelu, -6, 6, 1e-2) > 2e-5 ||
      math_error(math_slope, exact_slope, -6, 6, 1e-2) > 2e-5 ||
      math_error(math_gelu, exact_gelu, -40, 40, 1e-2) > 2e-5)
    return "GELU";
  return nullptr;
}
#endif
