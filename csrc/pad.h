// What every source of csrc/ shares: the host/device macro, the namespace of one instruction set,
// and reading the bits of a number.
#pragma once

#include <stdint.h>
#include <string.h>

// PAD_HD is for the formulas. On a CPU they are always inlined: a loop that calls one is not
// vectorised, and compilers stop inlining when a file grows.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define PAD_HD __host__ __device__ inline
#elif defined(__GNUC__)
#define PAD_HD inline __attribute__((always_inline))
#else
#define PAD_HD inline
#endif

// Loops over a few numbers that a GPU keeps in registers, and loops whose copies would need too
// many of those.
#if defined(__CUDACC__)
#define PAD_UNROLL _Pragma("unroll")
#define PAD_NO_UNROLL _Pragma("unroll 1")
#else
#define PAD_UNROLL
#define PAD_NO_UNROLL
#endif

// The row pass is compiled once per instruction set. Formulas live in pad::PAD_ISA, so that each
// copy has names of its own: a linker that merges equal inline functions can then never hand
// AVX-512 code to a machine without it.
#ifndef PAD_ISA
#define PAD_ISA portable
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define PAD_SIMD
#define PAD_SIMD_SUM(...)
#define PAD_SIMD_MAX(...)
#else
#define PAD_PRAGMA(text) _Pragma(#text)
#define PAD_SIMD PAD_PRAGMA(omp simd)
#define PAD_SIMD_SUM(...) PAD_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define PAD_SIMD_MAX(...) PAD_PRAGMA(omp simd reduction(max : __VA_ARGS__))
#endif

namespace pad {
namespace PAD_ISA {

// The bits of `from` as a `To` of the same size.
template <class To, class From>
PAD_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace PAD_ISA
}  // namespace pad
