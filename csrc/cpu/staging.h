// Moves chunks between parameters or gradients of any dtype and stride and float32 buffers in the L1 cache.
#pragma once

#include <cstddef>

#include "../lane.h"
#include "ivon_cpu.h"

namespace ivon {
namespace IVON_ISA {

IVON_FN float bfloat16_to_float(uint16_t x) { return Lane<float>::from_bits(static_cast<int32_t>(uint32_t{x} << 16)); }

// Round to nearest even, NaN to the quiet NaN 0x7fc0, as torch does.
IVON_FN uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = static_cast<uint32_t>(Lane<float>::bits(x));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Without multiplications by or of subnormals, which flush-to-zero modes would change.
IVON_FN float float16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t{x} << 16 & 0x80000000u, exponent = x & 0x7c00u;
  const uint32_t magnitude = (x & 0x7fffu) << 13;
  const float subnormal = Lane<float>::from_bits(static_cast<int32_t>(magnitude + (113u << 23))) - 0x1p-14f;
  const uint32_t normal = magnitude + ((exponent == 0x7c00u ? 224u : 112u) << 23);
  const uint32_t bits = exponent == 0 ? static_cast<uint32_t>(Lane<float>::bits(subnormal)) : normal;
  return Lane<float>::from_bits(static_cast<int32_t>(bits | sign));
}

// Round to nearest even; overflow to infinity; NaN to a quiet NaN.
IVON_FN uint16_t float_to_float16(float x) {
  const uint32_t bits = static_cast<uint32_t>(Lane<float>::bits(x));
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const float shifted = Lane<float>::from_bits(static_cast<int32_t>(magnitude)) + 0.5f;
  const uint32_t subnormal = static_cast<uint32_t>(Lane<float>::bits(shifted)) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  return static_cast<uint16_t>(half | sign);
}

IVON_FN float to_float(uint16_t x, int64_t dtype) {
  return dtype == IVON_BFLOAT16 ? bfloat16_to_float(x) : float16_to_float(x);
}
IVON_FN uint16_t from_float(float x, int64_t dtype) {
  return dtype == IVON_BFLOAT16 ? float_to_bfloat16(x) : float_to_float16(x);
}

// x as it reads back from a parameter of this dtype.
IVON_FN float round_trip(float x, int64_t dtype) {
  return dtype == IVON_FLOAT32 ? x : to_float(from_float(x, dtype), dtype);
}

// Whether all have the bits of the values, rounded. Integers alone: compilers do many at a time.
template <int64_t kDtype>
inline bool holds_rounded(const uint16_t* weights, int64_t n, const float* values) {
  int32_t changed = 0;
  for (int64_t i = 0; i < n; ++i) changed |= weights[i] ^ from_float(values[i], kDtype);
  return changed == 0;
}

// Walks elements begin, begin + 1, ... in row-major order and yields their storage offsets.
class Odometer {
 public:
  Odometer(const IvonLayout& layout, const int64_t* strides, int64_t begin) : layout_(layout), strides_(strides) {
    for (int64_t d = layout.dims - 1; d >= 0; --d) {
      position_[d] = begin % layout.sizes[d];
      begin /= layout.sizes[d];
      offset_ += position_[d] * strides[d];
    }
  }
  int64_t offset() const { return offset_; }
  void advance() {
    for (int64_t d = layout_.dims - 1; d >= 0; --d) {
      offset_ += strides_[d];
      if (++position_[d] < layout_.sizes[d]) return;
      offset_ -= position_[d] * strides_[d];
      position_[d] = 0;
    }
  }

 private:
  const IvonLayout& layout_;
  const int64_t* strides_;
  int64_t position_[IVON_CPU_MAX_DIMS];
  int64_t offset_ = 0;
};

template <class T, class Use>
inline void for_each_offset(const IvonLayout* layout, const int64_t* strides, T* base, int64_t begin, int64_t n,
                            Use use) {
  if (layout == nullptr) {
    for (int64_t i = 0; i < n; ++i) use(base[begin + i], i);
  } else {
    Odometer odometer(*layout, strides, begin);
    for (int64_t i = 0; i < n; ++i, odometer.advance()) use(base[odometer.offset()], i);
  }
}

// Elements begin .. begin + n as float32: in place when they already are, else through `buffer`.
inline const float* read_chunk(const void* base, int64_t dtype, const IvonLayout* layout, const int64_t* strides,
                               int64_t begin, int64_t n, float* buffer) {
  if (dtype == IVON_FLOAT32) {
    const float* p = static_cast<const float*>(base);
    if (layout == nullptr) return p + begin;
    for_each_offset(layout, strides, p, begin, n, [&](const float& x, int64_t i) { buffer[i] = x; });
  } else if (dtype == IVON_BFLOAT16) {
    for_each_offset(layout, strides, static_cast<const uint16_t*>(base), begin, n,
                    [&](const uint16_t& x, int64_t i) { buffer[i] = bfloat16_to_float(x); });
  } else {
    for_each_offset(layout, strides, static_cast<const uint16_t*>(base), begin, n,
                    [&](const uint16_t& x, int64_t i) { buffer[i] = float16_to_float(x); });
  }
  return buffer;
}

inline const float* read_grad(const IvonTensor& t, int64_t begin, int64_t n, float* buffer) {
  if (t.grad == nullptr) {  // the sums hold all there is
    __builtin_memset(buffer, 0, static_cast<size_t>(n) * sizeof(float));
    return buffer;
  }
  return read_chunk(t.grad, t.grad_dtype, t.layout, t.layout ? t.layout->grad_strides : nullptr, begin, n, buffer);
}

inline const float* read_param(const IvonTensor& t, int64_t begin, int64_t n, float* buffer) {
  return read_chunk(t.param, t.param_dtype, t.layout, t.layout ? t.layout->param_strides : nullptr, begin, n, buffer);
}

// Whether the parameter can be computed in place.
inline bool is_plain_float(const IvonTensor& t) { return t.param_dtype == IVON_FLOAT32 && t.layout == nullptr; }

// Whether the elements of a contiguous parameter have the bits of `values`, rounded to its dtype.
inline bool holds_rounded(const IvonTensor& t, int64_t begin, int64_t n, const float* values) {
  if (t.param_dtype == IVON_FLOAT32) {
    const float* weights = static_cast<const float*>(t.param) + begin;
    return __builtin_memcmp(weights, values, static_cast<size_t>(n) * sizeof(float)) == 0;
  }
  const uint16_t* weights = static_cast<const uint16_t*>(t.param) + begin;
  return t.param_dtype == IVON_BFLOAT16 ? holds_rounded<IVON_BFLOAT16>(weights, n, values)
                                        : holds_rounded<IVON_FLOAT16>(weights, n, values);
}

// Where to compute a chunk of the parameter: in place for contiguous float32, else in `buffer` (then write_param).
inline float* param_target(const IvonTensor& t, int64_t begin, float* buffer) {
  return is_plain_float(t) ? static_cast<float*>(t.param) + begin : buffer;
}

inline void write_param(const IvonTensor& t, int64_t begin, int64_t n, const float* values) {
  const int64_t* strides = t.layout ? t.layout->param_strides : nullptr;
  if (t.param_dtype == IVON_FLOAT32) {
    if (param_target(t, begin, nullptr) == values) return;
    for_each_offset(t.layout, strides, static_cast<float*>(t.param), begin, n,
                    [&](float& x, int64_t i) { x = values[i]; });
  } else if (t.param_dtype == IVON_BFLOAT16) {
    for_each_offset(t.layout, strides, static_cast<uint16_t*>(t.param), begin, n,
                    [&](uint16_t& x, int64_t i) { x = float_to_bfloat16(values[i]); });
  } else {
    for_each_offset(t.layout, strides, static_cast<uint16_t*>(t.param), begin, n,
                    [&](uint16_t& x, int64_t i) { x = float_to_float16(values[i]); });
  }
}

}  // namespace IVON_ISA
}  // namespace ivon
