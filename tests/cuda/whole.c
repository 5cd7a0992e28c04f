/* Whole models on the double. */
static void run_whole(void) {}
