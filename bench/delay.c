/* delay.c - a switch that delivers every frame late, for kernels without netem. Linux, root.
     cc -O2 -o delay bench/delay.c && ./delay 1000 space0 space1
   Microseconds, then network namespaces: each gets a device eth0, a TAP, and what it sends reaches
   the others after that time, until this program is killed. It says "ready" when they are there. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 16, QUEUE = 8192, BYTES = 9216 }; /* namespaces, frames in flight, of a frame */

static struct frame {
  double due;
  int from;
  ssize_t bytes;
  unsigned char data[BYTES];
} queue[QUEUE]; /* in the order of their arrival, which is that of their delivery */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void need(int failed, const char *what) {
  if (!failed) return;
  perror(what);
  exit(1);
}

/* The TAP of a namespace, which this process enters. */
static int open_tap(const char *space) {
  char path[256];
  struct ifreq request;
  int at, tap;
  snprintf(path, sizeof path, "/var/run/netns/%s", space);
  at = open(path, O_RDONLY);
  need(at < 0 || setns(at, CLONE_NEWNET), path);
  close(at);
  memset(&request, 0, sizeof request);
  strcpy(request.ifr_name, "eth0");
  request.ifr_flags = IFF_TAP | IFF_NO_PI;
  tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
  need(tap < 0 || ioctl(tap, TUNSETIFF, &request), "/dev/net/tun");
  return tap;
}

int main(int argc, char **argv) {
  struct pollfd tap[MOST];
  int n = argc - 2, i;
  unsigned first = 0, end = 0; /* frames delivered, frames that came */
  if (n < 2 || n > MOST) return fprintf(stderr, "delay: see its first lines\n"), 2;
  for (i = 0; i < n; ++i) tap[i].fd = open_tap(argv[i + 2]), tap[i].events = POLLIN;
  puts("ready");
  fflush(stdout);
  for (;;) {
    struct timespec wait = {1, 0};
    for (; first != end && queue[first % QUEUE].due <= now(); ++first) {
      const struct frame *f = &queue[first % QUEUE];
      for (i = 0; i < n; ++i) /* a full device loses it, as any would */
        if (i != f->from && write(tap[i].fd, f->data, (size_t)f->bytes) < 0) continue;
    }
    if (first != end) {
      double left = queue[first % QUEUE].due - now();
      wait.tv_sec = 0, wait.tv_nsec = left > 0 ? (long)(1e9 * left) : 0;
    }
    need(ppoll(tap, (nfds_t)n, &wait, NULL) < 0, "ppoll");
    for (i = 0; i < n; ++i)
      while (tap[i].revents & POLLIN && end - first < QUEUE) {
        struct frame *f = &queue[end % QUEUE];
        f->bytes = read(tap[i].fd, f->data, BYTES);
        if (f->bytes < 0) break; /* no more of them now */
        f->from = i;
        f->due = now() + 1e-6 * atof(argv[1]);
        ++end;
      }
  }
}
