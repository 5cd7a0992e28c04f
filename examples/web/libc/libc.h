/* The few functions of the C library that moe.h and engine.c need in WebAssembly: math.h, stdlib.h
   and string.h beside this file include it. */
#ifndef WEB_LIBC_H
#define WEB_LIBC_H
#include <stddef.h>
#define HUGE_VAL __builtin_huge_val()
#define HUGE_VALF __builtin_huge_valf()
/* instructions of WebAssembly, given -fno-math-errno */
double sqrt(double x);
float sqrtf(float x);
double fabs(double x);
float fabsf(float x);
double floor(double x);
void *malloc(size_t bytes);
void free(void *p);
void *memchr(const void *p, int c, size_t n);
int memcmp(const void *a, const void *b, size_t n);
void *memcpy(void *to, const void *from, size_t n);
void *memmove(void *to, const void *from, size_t n);
void *memset(void *p, int c, size_t n);
char *strchr(const char *s, int c);
int strcmp(const char *a, const char *b);
size_t strcspn(const char *s, const char *set);
size_t strlen(const char *s);
int strncmp(const char *a, const char *b, size_t n);
char *strstr(const char *s, const char *what);
#endif
