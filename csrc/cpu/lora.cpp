// LoRA's products with weights that are drawn tile by tile. Compiled once per SIMD level.
//
// The weights have the same bits at every level. The sums of products are those of float32 in an order that depends on
// the level and the layer's shape only: neither on the number of tokens nor on the threads.
#include "lora.h"

#include <cstddef>

#include "simd.h"
#include "staging.h"

namespace ivon {
namespace IVON_ISA {
namespace {

// Registers beside each other in a block of kLoraTokens rows: the sums, one row of operands and a broadcast value have
// to fit into 16 registers; without fused multiply-adds a product needs one more.
#if IVON_VEC_BYTES == 16 && defined(__SSE2__)
constexpr int kWide = 2;
#else
constexpr int kWide = 3;
#endif
constexpr int64_t kPanel = kWide * kLanes;  // columns of y in a block
static_assert(kPanel <= kLoraPanel, "lora_tile() must have room for a panel");
constexpr int64_t kRanksSummed = 64;  // products added up before they go to y: keeps the error at high ranks small

using Four = float __attribute__((vector_size(4 * kLoraTokens)));

// The sums of the lanes of four registers.
IVON_FN Four add_lanes(VFloat x0, VFloat x1, VFloat x2, VFloat x3) {
  const VFloat a = zip_low32(x0, x1) + zip_high32(x0, x1), b = zip_low32(x2, x3) + zip_high32(x2, x3);
  const VFloat sums = zip_low64(a, b) + zip_high64(a, b);  // of each 128-bit group
  Four groups[kLanes / kLoraTokens];
  __builtin_memcpy(groups, &sums, sizeof sums);
  Four total = groups[0];
  for (int64_t i = 1; i < kLanes / kLoraTokens; ++i) total += groups[i];
  return total;
}

IVON_FN VFloat load_first(const float* p, int64_t n) {
  VFloat x{};
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * sizeof(float));
  return x;
}

// Adds the products of kLoraTokens rows of x with kRanks rows of A over n columns to `hidden`, [kRanks, kLoraTokens].
template <int kRanks>
void add_dots(float* hidden, const float* const* x, const float* a, int64_t pitch, int64_t n) {
  VFloat sums[kRanks][kLoraTokens];
  for (auto& of_rank : sums) {
    for (VFloat& sum : of_rank) sum = VFloat{};
  }
  const auto add_products = [&](auto get) __attribute__((always_inline)) {
    VFloat weights[kRanks];
    for (int k = 0; k < kRanks; ++k) weights[k] = get(a + k * pitch);
    for (int t = 0; t < kLoraTokens; ++t) {
      const VFloat value = get(x[t]);
      for (int k = 0; k < kRanks; ++k) sums[k][t] = multiply_add(value, weights[k], sums[k][t]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add_products([i](const float* row) { return load(row + i); });
  if (i < n) add_products([i, n](const float* row) { return load_first(row + i, n - i); });
  for (int k = 0; k < kRanks; ++k) {
    float* to = hidden + k * kLoraTokens;
    Four total;
    __builtin_memcpy(&total, to, sizeof total);
    total += add_lanes(sums[k][0], sums[k][1], sums[k][2], sums[k][3]);
    __builtin_memcpy(to, &total, sizeof total);
  }
}

// Rows `token` .. of x from `column` on, n columns, as float32; the last row stands in for those beyond the end.
void read_rows(const float** rows, float* buffer, const IvonLora& call, int64_t token, int64_t end, int64_t column,
               int64_t n) {
  for (int64_t t = 0; t < kLoraTokens; ++t) {
    const int64_t row = token + t < end ? token + t : end - 1;
    rows[t] = read_chunk(call.x, call.x_dtype, nullptr, nullptr, row * call.in_features + column, n,
                         buffer + t * kLoraColumns);
  }
}

// hidden <- x A^T for the rows begin .. end of x.
void project_down(const IvonLora& call, int64_t sample, int64_t begin, int64_t end, const LoraScratch& scratch) {
  const int64_t rank = call.rank, blocks = (end - begin + kLoraTokens - 1) / kLoraTokens;
  __builtin_memset(scratch.hidden, 0, static_cast<size_t>(blocks * rank * kLoraTokens) * sizeof(float));
  for (int64_t column = 0; column < call.in_features; column += kLoraColumns) {
    const int64_t left = call.in_features - column, n = left < kLoraColumns ? left : kLoraColumns;
    const int64_t height = kLoraTile / n / kWide * kWide;
    for (int64_t first = 0; first < rank; first += height) {
      const int64_t ranks = rank - first < height ? rank - first : height;
      if (n == call.in_features) {
        draw_weights(scratch.tile, call, call.a, sample, first * n, ranks * n);
      } else {
        for (int64_t k = 0; k < ranks; ++k) {
          draw_weights(scratch.tile + k * n, call, call.a, sample, (first + k) * call.in_features + column, n);
        }
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const float* rows[kLoraTokens];
        read_rows(rows, scratch.rows, call, begin + block * kLoraTokens, end, column, n);
        float* hidden = scratch.hidden + (block * rank + first) * kLoraTokens;
        int64_t k = 0;
        for (; k + kWide <= ranks; k += kWide) {
          add_dots<kWide>(hidden + k * kLoraTokens, rows, scratch.tile + k * n, n, n);
        }
        if (kWide > 2 && k + 2 == ranks) {
          add_dots<2>(hidden + k * kLoraTokens, rows, scratch.tile + k * n, n, n);
          k += 2;
        }
        if (k < ranks) add_dots<1>(hidden + k * kLoraTokens, rows, scratch.tile + k * n, n, n);
      }
    }
  }
}

// Drawn rows of B, [n, rank], to panels of kPanel rows, [rank, kPanel] each; the last one is filled up with zeros.
void pack_panels(float* panels, const float* tile, int64_t n, int64_t rank) {
  for (int64_t first = 0; first < n; first += kPanel, panels += kPanel * rank) {
    const int64_t rows = n - first < kPanel ? n - first : kPanel;
    const float* from = tile + first * rank;
    for (int64_t k = 0; k < rank; ++k) {
      if (rows == kPanel) {
        for (int64_t i = 0; i < kPanel; ++i) panels[k * kPanel + i] = from[i * rank + k];
      } else {
        for (int64_t i = 0; i < kPanel; ++i) panels[k * kPanel + i] = i < rows ? from[i * rank + k] : 0.0f;
      }
    }
  }
}

// y <- a block of `hidden` times one panel; the rows of y are kLoraColumns apart.
void multiply_panel(float* y, const float* hidden, const float* panel, int64_t rank) {
  for (int64_t first = 0; first < rank; first += kRanksSummed) {
    const int64_t end = rank - first < kRanksSummed ? rank : first + kRanksSummed;
    VFloat sums[kLoraTokens][kWide];
    for (auto& of_token : sums) {
      for (VFloat& sum : of_token) sum = VFloat{};
    }
    for (int64_t k = first; k < end; ++k) {
      VFloat weights[kWide];
      for (int i = 0; i < kWide; ++i) weights[i] = load(panel + k * kPanel + i * kLanes);
      for (int t = 0; t < kLoraTokens; ++t) {
        const VFloat value = Lane<VFloat>::splat(hidden[k * kLoraTokens + t]);
        for (int i = 0; i < kWide; ++i) sums[t][i] = multiply_add(value, weights[i], sums[t][i]);
      }
    }
    for (int t = 0; t < kLoraTokens; ++t) {
      for (int i = 0; i < kWide; ++i) {
        float* to = y + t * kLoraColumns + i * kLanes;
        store(to, first == 0 ? sums[t][i] : load(to) + sums[t][i]);
      }
    }
  }
}

template <int64_t kDtype>
void add_half(uint16_t* out, const float* y, float scaling, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float(to_float(out[i], kDtype) + scaling * y[i], kDtype);
}

// out[begin .. begin + n] += scaling y
void add_scaled(const IvonLora& call, int64_t begin, const float* y, int64_t n) {
  const float scaling = static_cast<float>(call.scaling);
  if (call.out_dtype == IVON_FLOAT32) {
    float* out = static_cast<float*>(call.out) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] += scaling * y[i];
  } else if (call.out_dtype == IVON_BFLOAT16) {
    add_half<IVON_BFLOAT16>(static_cast<uint16_t*>(call.out) + begin, y, scaling, n);
  } else {
    add_half<IVON_FLOAT16>(static_cast<uint16_t*>(call.out) + begin, y, scaling, n);
  }
}

// out += scaling hidden B^T for the rows begin .. end of out.
void project_up(const IvonLora& call, int64_t sample, int64_t begin, int64_t end, const LoraScratch& scratch) {
  const int64_t rank = call.rank, most = lora_tile(rank) / (rank * kPanel) * kPanel;
  const int64_t widest = kLoraColumns / kPanel * kPanel;
  const int64_t width = most < widest ? most : widest;
  for (int64_t column = 0; column < call.out_features; column += width) {
    const int64_t left = call.out_features - column, n = left < width ? left : width;
    draw_weights(scratch.tile, call, call.b, sample, column * rank, n * rank);
    pack_panels(scratch.panels, scratch.tile, n, rank);
    for (int64_t token = begin; token < end; token += kLoraTokens) {
      const float* hidden = scratch.hidden + (token - begin) * rank;
      for (int64_t i = 0; i < n; i += kPanel) {
        multiply_panel(scratch.rows + i, hidden, scratch.panels + i * rank, rank);
      }
      for (int64_t t = 0; t < kLoraTokens && token + t < end; ++t) {
        add_scaled(call, (token + t) * call.out_features + column, scratch.rows + t * kLoraColumns, n);
      }
    }
  }
}

}  // namespace

void lora(const IvonLora& call, int64_t position, int64_t begin, int64_t n, const LoraScratch& scratch) {
  const int64_t sample = call.samples[position], most = lora_block(call.rank), end = position * call.tokens + begin + n;
  for (int64_t row = end - n; row < end; row += most) {
    const int64_t row_end = end - row < most ? end : row + most;
    project_down(call, sample, row, row_end, scratch);
    project_up(call, sample, row, row_end, scratch);
  }
}

}  // namespace IVON_ISA
}  // namespace ivon
