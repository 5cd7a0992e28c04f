/* web.c - the plane of examples/web in a native program: web POINTS ROUTER STEPS prints the bits of
   the weights. POINTS: 400 points, then three rows of 400 labels, as floats. */
#include <stdio.h>
#include "../examples/web/engine.c"

int main(int argc, char **argv) {
  FILE *f = argc == 4 ? fopen(argv[1], "rb") : NULL;
  int i, n;
  if (!f || fread(plane_points, sizeof plane_points, 1, f) != 1 ||
      fread(plane_labels, sizeof plane_labels, 1, f) != 1)
    return 1;
  fclose(f);
  web_begin();
  if (plane_reset(argv[2][0] - '0', 4, 1, 1, 0.02f, 1, 2)) return printf("%s\n", web_said()), 1;
  for (i = 0; argv[3][i]; ++i) continue;
  for (n = 0, i = 0; argv[3][i]; ++i) n = 10 * n + argv[3][i] - '0';
  if (plane_steps(n) || plane_adapt(argv[2][0] == '2' ? 0 : -1) || plane_steps(20))
    return printf("%s\n", web_said()), 1;
  for (i = 0; i < plane_parameters(); ++i) {
    uint32_t bits;
    memcpy(&bits, plane_weights() + i, sizeof bits);
    printf("%08x\n", (unsigned)bits);
  }
  return 0;
}
