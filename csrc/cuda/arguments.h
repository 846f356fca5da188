// What one launch is told: everything by value, in the kernel's arguments.
#pragma once

#include "../cpu/staging.h"
#include "../rows.h"

namespace ivon {
namespace IVON_ISA {

enum Operation { kSample, kRestore, kCheck, kAccumulate, kStep };

constexpr uint32_t kThreads = 256;
// Quads of 4 elements that a thread does, one after the other. What a block finds out first takes about a microsecond:
// launches with more blocks than the device holds at a time many times over give each block more of them.
constexpr uint32_t kFewestQuads = 2, kMostQuads = 8;
constexpr int64_t kManyBlocks = 4096;
// With fewer registers per thread the step would spill; 24 warps per multiprocessor hide the latency of its loads.
constexpr uint32_t kResidentBlocks = 3;
constexpr uint32_t kLargestChunk = kThreads * kMostQuads * 4;  // elements per block
constexpr int64_t kNothingBad = int64_t{1} << 62;              // as NOTHING_BAD of ivon_kernels/backends/device.py

enum ControlWord { kBad, kDone, kSkipped };

enum TensorFlag : uint32_t {
  kParamVector = 1u << 4,  // contiguous and aligned: four elements in one access
  kGradVector = 1u << 5,
  kSummed = 1u << 6,
  kCounted = 1u << 7,  // the launch that holds the tensor's last chunk counts its step
};

// One tensor, or as many of its chunks as one launch can hold.
struct TensorRecord {
  void* param;
  const void* grad;
  const IvonLayout* layout;
  int64_t offset;
  int64_t numel;
  int64_t start;  // index of the first element in the unsharded tensor; a multiple of 4 but in GatheredArguments
  uint32_t word;  // flags: parameter dtype (2 bits), gradient dtype (2 bits), TensorFlag; above them the 24-bit index
  uint32_t position;
  uint32_t row;
  uint32_t first_chunk;  // of the tensor: at most 2^42 elements are at most 2^31 chunks

  IVON_FN int64_t param_dtype() const { return word & 3; }
  IVON_FN int64_t grad_dtype() const { return word >> 2 & 3; }
  IVON_FN bool has(TensorFlag flag) const { return (word & flag) != 0; }
  IVON_FN uint32_t index() const { return word >> 8; }
};

// The round keys from the constant bank: an instruction takes them as operands without loading them.
struct KeyTable {
  uint32_t keys[2 * kPhiloxRounds];
  IVON_FN uint64_t first(int round) const { return keys[2 * round]; }
  IVON_FN uint64_t second(int round) const { return keys[2 * round + 1]; }
};

struct CallHeader {
  float *mean, *momentum, *hess, *grad_sum, *second_sum;
  int64_t* steps;
  int64_t* control;
  int64_t* mailbox;
  const float* found_inf;
  const float* grad_scale;
  int64_t step_override;
  KeyTable keys;
  uint64_t sample_replica;
  uint32_t count;   // tensors
  uint32_t blocks;  // chunks of all of them
  uint32_t quads;   // per thread
  bool adopt, draw_next, final, report;

  IVON_FN uint32_t chunk() const { return kThreads * 4 * quads; }  // elements of a block
};

struct BlockContext;
struct GatheredContext;

template <int kTensorCapacity, int kRowCapacity>
struct Arguments {
  using Context = BlockContext;
  static constexpr int kTensors = kTensorCapacity, kRows = kRowCapacity;
  CallHeader call;
  uint32_t first_block[kTensors];  // of each tensor, ascending
  TensorRecord tensors[kTensors];
  GroupRow rows[kRows];
};

// Arguments are copied whole at every launch: few tensors should not pay for many. 4096 bytes are the limit before CUDA
// 12.1, 32764 since.
using SmallArguments = Arguments<50, 5>;
using MediumArguments = Arguments<160, 8>;
using LargeArguments = Arguments<456, 16>;

// For shards whose elements are not all neighbours in the unsharded tensor, or do not begin at a multiple of 4 there.
// These are kernels of their own, so that the others stay as lean as they are; in one size, which every driver takes.
struct Runs {
  int64_t run, pitch;
};
struct GatheredArguments : Arguments<40, 5> {
  using Context = GatheredContext;
  Runs runs[kTensors];
};
static_assert(sizeof(SmallArguments) <= 4096, "the limit before CUDA 12.1");
static_assert(sizeof(GatheredArguments) <= 4096, "the limit before CUDA 12.1");
static_assert(sizeof(LargeArguments) <= 32764, "the limit since CUDA 12.1");

}  // namespace IVON_ISA
}  // namespace ivon
