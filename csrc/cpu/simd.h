// SIMD registers as lane types, by GCC/Clang vector extensions; the few operations these lack come from intrinsics.
#pragma once

#include "../lane.h"

#if IVON_VEC_BYTES == 64 || IVON_VEC_BYTES == 32 || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#else
#error "no SIMD level for this target"
#endif

namespace ivon {
namespace IVON_ISA {

constexpr int kLanes = IVON_VEC_BYTES / 4;

using VFloat = float __attribute__((vector_size(IVON_VEC_BYTES)));
using VInt = int32_t __attribute__((vector_size(IVON_VEC_BYTES)));
using VUint = uint32_t __attribute__((vector_size(IVON_VEC_BYTES)));
using VWord = uint64_t __attribute__((vector_size(IVON_VEC_BYTES)));

#if IVON_VEC_BYTES == 64
#define IVON_MM(name) _mm512_##name
using MPs = __m512;
using MPd = __m512d;
using MInt = __m512i;
#elif IVON_VEC_BYTES == 32
#define IVON_MM(name) _mm256_##name
using MPs = __m256;
using MPd = __m256d;
using MInt = __m256i;
#elif defined(__SSE2__)
#define IVON_MM(name) _mm_##name
using MPs = __m128;
using MPd = __m128d;
using MInt = __m128i;
#endif

#if defined(IVON_MM)
IVON_FN VWord mul_wide_vec(VWord a, VWord b) { return (VWord)IVON_MM(mul_epu32)((MInt)a, (MInt)b); }
IVON_FN VFloat sqrt_vec(VFloat x) { return (VFloat)IVON_MM(sqrt_ps)((MPs)x); }
// Interleave the low (high) halves of a and b within each 128-bit group, in units of 32 or 64 bits.
IVON_FN VFloat zip_low32(VFloat a, VFloat b) { return (VFloat)IVON_MM(unpacklo_ps)((MPs)a, (MPs)b); }
IVON_FN VFloat zip_high32(VFloat a, VFloat b) { return (VFloat)IVON_MM(unpackhi_ps)((MPs)a, (MPs)b); }
IVON_FN VFloat zip_low64(VFloat a, VFloat b) { return (VFloat)IVON_MM(unpacklo_pd)((MPd)a, (MPd)b); }
IVON_FN VFloat zip_high64(VFloat a, VFloat b) { return (VFloat)IVON_MM(unpackhi_pd)((MPd)a, (MPd)b); }
// a b + c: one rounding where the level has the instruction, two at the baseline. For sums of products only: whatever
// must have the same bits everywhere uses plain operators.
IVON_FN VFloat multiply_add(VFloat a, VFloat b, VFloat c) {
#if IVON_VEC_BYTES == 64 || defined(__FMA__)
  return (VFloat)IVON_MM(fmadd_ps)((MPs)a, (MPs)b, (MPs)c);
#else
  return a * b + c;
#endif
}
#undef IVON_MM
#else
IVON_FN VWord mul_wide_vec(VWord a, VWord b) {
  return (VWord)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}
IVON_FN VFloat sqrt_vec(VFloat x) { return (VFloat)vsqrtq_f32((float32x4_t)x); }
IVON_FN VFloat zip_low32(VFloat a, VFloat b) { return (VFloat)vzip1q_f32((float32x4_t)a, (float32x4_t)b); }
IVON_FN VFloat zip_high32(VFloat a, VFloat b) { return (VFloat)vzip2q_f32((float32x4_t)a, (float32x4_t)b); }
IVON_FN VFloat zip_low64(VFloat a, VFloat b) { return (VFloat)vzip1q_f64((float64x2_t)a, (float64x2_t)b); }
IVON_FN VFloat zip_high64(VFloat a, VFloat b) { return (VFloat)vzip2q_f64((float64x2_t)a, (float64x2_t)b); }
IVON_FN VFloat multiply_add(VFloat a, VFloat b, VFloat c) {
  return (VFloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#endif

template <>
struct Lane<VFloat> {
  using Word = VWord;
  using Int = VInt;

  static IVON_FN Word mul_wide(Word word, uint32_t factor) { return mul_wide_vec(word, Word{} + factor); }
  static IVON_FN VFloat sqrt(VFloat x) { return sqrt_vec(x); }
  static IVON_FN Int bits(VFloat x) { return (Int)x; }
  static IVON_FN VFloat from_bits(Int x) { return (VFloat)x; }
  static IVON_FN VFloat convert(Int x) { return __builtin_convertvector(x, VFloat); }
  static IVON_FN Int shift_left(Int x, int by) { return (Int)((VUint)x << by); }
  static IVON_FN Int shift_right_logical(Int x, int by) { return (Int)((VUint)x >> by); }
  static IVON_FN VFloat splat(float x) { return x - VFloat{}; }  // -0 stays -0, so no addition is left of it
};

IVON_FN VFloat load(const float* p) {
  VFloat x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
IVON_FN void store(float* p, VFloat x) { __builtin_memcpy(p, &x, sizeof x); }

}  // namespace IVON_ISA
}  // namespace ivon
