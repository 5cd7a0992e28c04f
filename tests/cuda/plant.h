/* What faults planted by plant.py are made of (C++17). plant_on is the number of the fault that
   acts, or 0; plant_seen[n] says that the place of fault n was reached. */
#ifndef PLANT_H
#define PLANT_H
#include <stdint.h>
#include <stdlib.h>
#include <type_traits>
#include <utility>

enum { PLANT_MOST = 4000 };
extern int plant_on;
extern unsigned char plant_seen[PLANT_MOST];

inline bool plant_acts(int n) {
  plant_seen[n] = 1;
  return plant_on == n;
}

#define PLANT_INT(n, x) ((x) + (decltype(x))plant_acts(n))
#define PLANT_FLOAT(n, x) ((x) + (plant_acts(n) ? (x)*0.25f + 0.25f : 0.0f))
#define PLANT_NOT(n, condition) (bool(condition) != plant_acts(n))
#define PLANT_SKIP(n, ...) (plant_acts(n) ? (void)0 : (void)(__VA_ARGS__))
#define PLANT_SIGN(n) (plant_acts(n) ? -1 : 1)

/* a < PLANT(n) < b is a <= b where fault n acts: a < PLANT(n) makes a half of it. */
template <int n> struct plant_at {};
template <int n, class A> struct plant_half { A a; };
#define PLANT(n)                                                                                   \
  plant_at<n> {}

#define PLANT_OPERATOR(op, wrong)                                                                  \
  template <int n, class A> inline plant_half<n, A> operator op(A a, plant_at<n>) { return {a}; }  \
  template <int n, class A, class B>                                                               \
  inline auto operator op(plant_half<n, A> x, B b)->decltype(x.a op b) {                           \
    typedef decltype(x.a op b) T;                                                                  \
    if (!plant_acts(n)) return x.a op b;                                                           \
    if constexpr (std::is_pointer<A>::value && std::is_pointer<B>::value)                          \
      return (T)((uintptr_t)x.a wrong(uintptr_t) b);                                               \
    else                                                                                           \
      return (T)(x.a wrong b);                                                                     \
  }
PLANT_OPERATOR(<, <=)
PLANT_OPERATOR(<=, <)
PLANT_OPERATOR(>, >=)
PLANT_OPERATOR(>=, >)
PLANT_OPERATOR(==, !=)
PLANT_OPERATOR(!=, ==)
PLANT_OPERATOR(+, -)
PLANT_OPERATOR(-, +)
PLANT_OPERATOR(*, +)
PLANT_OPERATOR(/, *)
PLANT_OPERATOR(%, /)
PLANT_OPERATOR(<<, >>)
PLANT_OPERATOR(>>, <<)
PLANT_OPERATOR(&, |)
PLANT_OPERATOR(|, &)
#endif
