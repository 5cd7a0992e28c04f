/* insn.c - a plugin of qemu's user emulation that counts the instructions of a program and says
   them on standard error. Declared here, since Debian has no header of it.
     cc -shared -fPIC -o insn.so insn.c; qemu-riscv64 -plugin ./insn.so -d plugin PROGRAM */
#include <stdint.h>
#include <stdio.h>
typedef uint64_t id;
struct tb;
int qemu_plugin_version = 1;
void qemu_plugin_register_vcpu_tb_trans_cb(id plugin, void (*fn)(id, struct tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct tb *tb, int op, void *count, uint64_t by);
void qemu_plugin_register_atexit_cb(id plugin, void (*fn)(id, void *), void *data);
size_t qemu_plugin_tb_n_insns(const struct tb *tb);

static uint64_t count;
static void translated(id plugin, struct tb *tb) {
  (void)plugin;
  qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &count, qemu_plugin_tb_n_insns(tb));
}
static void ended(id plugin, void *data) {
  (void)plugin, (void)data;
  fprintf(stderr, "instructions %llu\n", (unsigned long long)count);
}
int qemu_plugin_install(id plugin, const void *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(plugin, translated);
  qemu_plugin_register_atexit_cb(plugin, ended, NULL);
  return 0;
}
