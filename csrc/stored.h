// The types that logits are stored in, and how a number gets in and out of them.
#pragma once

#include "pad.h"

namespace pad {
namespace PAD_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class Z>
struct Accumulator {
  using type = Z;
};
template <>
struct Accumulator<bfloat16> {
  using type = float;
};
template <>
struct Accumulator<float16> {
  using type = float;
};

PAD_HD float load(float z) { return z; }
PAD_HD double load(double z) { return z; }
PAD_HD float load(bfloat16 z) { return bits_as<float>(uint32_t(z.bits) << 16); }

template <class Z>
Z store(typename Accumulator<Z>::type value);
template <>
PAD_HD float store<float>(float value) {
  return value;
}
template <>
PAD_HD double store<double>(double value) {
  return value;
}
// Round to nearest, ties to even; a NaN stays one (rounding could carry it to infinity).
template <>
PAD_HD bfloat16 store<bfloat16>(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(value != value ? 0x7fc0u : rounded)};
}

// float16 is for GPUs, which have instructions for it; without them, by its bits: a power of two
// moves the exponent, subnormal numbers included.
PAD_HD float load(float16 z) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(z.bits));
  return value;
#else
  const uint32_t sign = uint32_t(z.bits & 0x8000u) << 16, rest = uint32_t(z.bits & 0x7fffu) << 13;
  const bool finite = rest < 0x7c00u << 13;
  const float size = finite ? bits_as<float>(rest) * 0x1p112f : bits_as<float>(rest | 0x7f800000u);
  return bits_as<float>(bits_as<uint32_t>(size) | sign);
#endif
}
template <>
PAD_HD float16 store<float16>(float value) {
#if defined(__CUDA_ARCH__)
  float16 stored;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored.bits) : "f"(value));
  return stored;
#else
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000u;
  const float size = bits_as<float>(bits & 0x7fffffffu);
  if (size != size) return {uint16_t(sign | 0x7e00u)};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00u)};
  if (size < 0x1p-14f)  // a subnormal number: adding this rounds to a multiple of 2^-24
    return {uint16_t(sign | (bits_as<uint32_t>(size + 0.5f) - bits_as<uint32_t>(0.5f)))};
  const uint32_t moved = (bits & 0x7fffffffu) - (112u << 23);
  return {uint16_t(sign | ((moved + 0xfffu + ((moved >> 13) & 1u)) >> 13))};
#endif
}

}  // namespace PAD_ISA
}  // namespace pad
