// LoRA layers with a weight sample of their own for each part of the batch.
#pragma once

#include <cstdint>

#include "ivon_cpu.h"

namespace ivon {

constexpr int64_t kLoraTokens = 4;        // rows of x in one register block
constexpr int64_t kLoraPanel = 48;        // columns of y in the widest register block
constexpr int64_t kLoraColumns = 1024;    // columns of A drawn at a time
constexpr int64_t kLoraTile = 3 << 13;    // weights drawn at a time: they stay in the L2 cache
constexpr int64_t kLoraHidden = 1 << 17;  // values of x A^T kept at a time: tokens * rank

// What one thread works in: 0.75 MB (kLoraHidden + 2 kLoraTile + kLoraTokens kLoraColumns floats) whatever the layer
// and the batch; beyond rank 512 at most 100 floats more for each further rank.
struct LoraScratch {
  float* hidden;  // x A^T in blocks of kLoraTokens rows: [blocks, rank, kLoraTokens]
  float* tile;    // drawn weights
  float* panels;  // the same weights of B in the order of their use
  float* rows;    // rows of x as float32, or of y
};

// Tokens that one thread takes at a time; the weights are drawn once for all of them.
inline int64_t lora_block(int64_t rank) {
  const int64_t blocks = kLoraHidden / (rank * kLoraTokens);
  return kLoraTokens * (blocks < 1 ? 1 : blocks);
}

// Weights of B drawn at a time: at least one panel.
inline int64_t lora_tile(int64_t rank) {
  const int64_t panel = kLoraPanel * rank;
  return panel > kLoraTile ? panel : kLoraTile;
}

#if defined(IVON_VEC_BYTES)
namespace IVON_ISA {

// The weights begin .. begin + n of `factor` in a sample, counted in row-major order (kernels.cpp).
void draw_weights(float* out, const IvonLora& call, const IvonFactor& factor, int64_t sample, int64_t begin, int64_t n);

// Tokens begin .. begin + n of the sample at `position` of the batch (lora.cpp).
void lora(const IvonLora& call, int64_t position, int64_t begin, int64_t n, const LoraScratch& scratch);

}  // namespace IVON_ISA
#endif

}  // namespace ivon
