// The C ABI: picks the SIMD level, spreads the chunks of all tensors over the threads.
#include <cstring>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../rows.h"
#include "kernels.h"
#include "lora.h"

namespace ivon {
namespace {

bool cpu_has(const char* level) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (std::strcmp(level, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }
  if (std::strcmp(level, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return std::strcmp(level, "baseline") == 0 || std::strcmp(level, "neon") == 0;
}

// Widest first.
const Kernels* const kLevels[] = {
#if defined(IVON_HAVE_AVX512)
    &avx512::kKernels,
#endif
#if defined(IVON_HAVE_AVX2)
    &avx2::kKernels,
#endif
#if defined(IVON_HAVE_BASELINE)
    &baseline::kKernels,
#endif
#if defined(IVON_HAVE_NEON)
    &neon::kKernels,
#endif
};

const Kernels* widest() {
  for (const Kernels* kernels : kLevels) {
    if (cpu_has(kernels->name)) return kernels;
  }
  return kLevels[sizeof kLevels / sizeof kLevels[0] - 1];
}

const Kernels*& current() {
  static const Kernels* kernels = widest();
  return kernels;
}

// Calls use(row, begin, n) for every chunk of every tensor, each thread taking one contiguous share of the whole list.
template <class Use>
void for_each_chunk(const IvonTensor* tensors, int64_t count, int64_t threads, Use use) {
  std::vector<int64_t> first(static_cast<size_t>(count) + 1, 0);  // number of the first chunk of each tensor
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + (tensors[i].numel + kChunk - 1) / kChunk;
  const int64_t total = first[count];
  if (total == 0) return;
  threads = threads < 1 ? 1 : threads > total ? total : threads;
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
#endif
  {
#if defined(_OPENMP)
    const int64_t rank = omp_get_thread_num(), ranks = omp_get_num_threads();
#else
    const int64_t rank = 0, ranks = 1;
#endif
    int64_t chunk = total * rank / ranks;
    const int64_t end = total * (rank + 1) / ranks;
    int64_t row = 0, high = count;
    while (high - row > 1) {  // the last tensor whose first chunk is at or before `chunk`
      const int64_t middle = (row + high) / 2;
      if (first[middle] <= chunk) {
        row = middle;
      } else {
        high = middle;
      }
    }
    for (; chunk < end; ++chunk) {
      while (chunk >= first[row + 1]) ++row;
      const int64_t begin = (chunk - first[row]) * kChunk;
      const int64_t left = tensors[row].numel - begin;
      use(row, begin, left < kChunk ? left : kChunk);
    }
  }
}

// Completes the tensor table from the call's columns, and resolves the scalars of its parameters.
void prepare(IvonCall* call) {
  static thread_local std::vector<scalar::StepScalars> scalars;
  scalars.clear();
  const auto* rows = static_cast<const scalar::GroupRow*>(call->rows);
  for (int64_t i = 0; i < call->count; ++i) {
    IvonTensor& t = call->tensors[i];
    t.param = reinterpret_cast<void*>(call->params[i]);
    t.grad = reinterpret_cast<const void*>(call->grads[i]);
    t.layout = reinterpret_cast<const IvonLayout*>(call->layouts[i]);
    t.grad_dtype = call->grad_dtypes[i];
    t.step = *t.step_count;
    if (rows == nullptr) continue;
    if (i == 0 || t.row != call->tensors[i - 1].row || t.step != call->tensors[i - 1].step) {
      scalars.push_back(scalar::resolve(rows[t.row], t.step, nullptr));
    }
    t.scalars = static_cast<int64_t>(scalars.size()) - 1;
  }
  call->scalars = scalars.data();
}

// Says what the kept noise is from now on; no thread may still be reading the tags.
void tag_noise(const IvonCall* call, int64_t steps_ahead, int64_t sample) {
  for (int64_t row = 0; row < call->count; ++row) {
    const IvonTensor& t = call->tensors[row];
    if (keeps_noise(t, *call)) *t.noise_tag = noise_tag(*call, t.step + steps_ahead, sample);
  }
}

template <class Use>
void for_each_chunk(const IvonCall* call, Use use) {
  for_each_chunk(call->tensors, call->count, call->threads, use);
}

// How the tokens of a LoRA call are spread: each sample's are cut into `parts`, and each thread takes as many
// neighbouring parts as any other.
struct LoraShares {
  int64_t threads;
  int64_t parts;
  int64_t part;  // tokens in one
};

// A thread draws the weights once for all its tokens of a sample. Cutting a sample balances the threads, but its
// weights are then drawn by each of them: the number of parts is the one that lets the last thread finish first.
LoraShares share_tokens(const IvonLora& call) {
  constexpr int64_t kDraw = 48;            // tokens whose products take as long as drawing the weights
  constexpr int64_t kLeastWork = 1 << 18;  // of a thread, in weights times tokens: some ten microseconds
  const auto divide_up = [](int64_t x, int64_t by) { return (x + by - 1) / by; };
  const int64_t weights = call.rank * (call.in_features + call.out_features);
  const int64_t useful = 1 + weights * call.sample_count * (kDraw + call.tokens) / kLeastWork;
  const int64_t threads = call.threads < useful ? (call.threads < 1 ? 1 : call.threads) : useful;
  LoraShares best{};
  int64_t least = INT64_MAX;
  for (int64_t parts = 1; parts <= threads; ++parts) {
    const int64_t part = divide_up(divide_up(call.tokens, parts), kLoraTokens) * kLoraTokens;
    const int64_t of_thread = divide_up(call.sample_count * parts, threads);
    const int64_t samples = parts == 1 ? of_thread : divide_up(of_thread - 1, parts) + 1;
    const int64_t cost = samples * kDraw + of_thread * part;
    if (cost < least) least = cost, best = {threads, parts, part};
  }
  return best;
}

// This thread's scratch, kept for the next call.
LoraScratch lora_scratch(int64_t rank) {
  static thread_local std::vector<float> memory;
  constexpr int64_t kAlign = 64 / sizeof(float);
  const int64_t hidden = lora_block(rank) * rank, tile = lora_tile(rank), rows = kLoraTokens * kLoraColumns;
  const size_t size = static_cast<size_t>(hidden + 2 * tile + rows + kAlign);
  if (memory.size() < size) memory.resize(size);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  float* aligned = reinterpret_cast<float*>((address + 63) / 64 * 64);
  return {aligned, aligned + hidden, aligned + hidden + tile, aligned + hidden + 2 * tile};
}

// This thread's share of the samples' parts, those of one sample together.
void run_lora_share(const IvonLora& call, const LoraShares& shares, int64_t rank, int64_t ranks) {
  const LoraScratch scratch = lora_scratch(call.rank);
  const int64_t total = call.sample_count * shares.parts, end = total * (rank + 1) / ranks;
  for (int64_t part = total * rank / ranks; part < end;) {
    const int64_t position = part / shares.parts, next = (position + 1) * shares.parts;
    const int64_t last = next < end ? next : end;
    const int64_t begin = (part - position * shares.parts) * shares.part;
    const int64_t stop = (last - position * shares.parts) * shares.part;
    const int64_t n = (stop < call.tokens ? stop : call.tokens) - begin;
    if (n > 0) current()->lora(call, position, begin, n, scratch);
    part = last;
  }
}

}  // namespace
}  // namespace ivon

using ivon::current;
using ivon::for_each_chunk;

extern "C" {

int ivon_cpu_abi(void) { return IVON_CPU_ABI; }

const char* ivon_cpu_simd(void) { return current()->name; }

int ivon_cpu_set_simd(const char* level) {
  for (const ivon::Kernels* kernels : ivon::kLevels) {
    if (std::strcmp(kernels->name, level) == 0 && ivon::cpu_has(level)) {
      current() = kernels;
      return 0;
    }
  }
  return -1;
}

int ivon_cpu_has_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

void ivon_cpu_normals(float* out, int64_t numel, uint64_t seed, int64_t step, int64_t sample, int64_t replica,
                      int64_t param, int64_t start, int64_t threads) {
  IvonTensor whole{};
  whole.numel = numel;
  IvonCall call{};
  call.seed = seed, call.step_override = -1, call.sample = sample, call.replica = replica;
  for_each_chunk(&whole, 1, threads, [&](int64_t, int64_t begin, int64_t n) {
    current()->normals(out + begin, n, call, step, param, start + begin);
  });
}

void ivon_cpu_sample(IvonCall* call) {
  ivon::prepare(call);
  for_each_chunk(
      call, [call](int64_t row, int64_t begin, int64_t n) { current()->sample(call->tensors[row], *call, begin, n); });
  ivon::tag_noise(call, 0, call->sample);
}

void ivon_cpu_restore(IvonCall* call) {
  ivon::prepare(call);
  for_each_chunk(call,
                 [call](int64_t row, int64_t begin, int64_t n) { current()->restore(call->tensors[row], begin, n); });
}

void ivon_cpu_accumulate(IvonCall* call) {
  ivon::prepare(call);
  for_each_chunk(call, [call](int64_t row, int64_t begin, int64_t n) {
    current()->accumulate(call->tensors[row], *call, begin, n);
  });
}

int64_t ivon_cpu_find_nonfinite(IvonCall* call) {
  ivon::prepare(call);
  int64_t found = INT64_MAX;
  for_each_chunk(call, [call, &found](int64_t row, int64_t begin, int64_t n) {
    if (!current()->nonfinite(call->tensors[row], begin, n)) return;
#if defined(_OPENMP)
#pragma omp critical(ivon_cpu_found)
#endif
    if (row < found) found = row;
  });
  return found == INT64_MAX ? -1 : found;
}

void ivon_cpu_step(IvonCall* call) {
  ivon::prepare(call);
  for_each_chunk(
      call, [call](int64_t row, int64_t begin, int64_t n) { current()->step(call->tensors[row], *call, begin, n); });
  if (call->draw_next) ivon::tag_noise(call, 1, 0);
  for (int64_t row = 0; row < call->count; ++row) ++*call->tensors[row].step_count;
}

void ivon_cpu_lora(const IvonLora* call) {
  if (call->rank == 0 || call->in_features == 0 || call->out_features == 0) return;
  if (call->tokens == 0 || call->sample_count == 0) return;
  const ivon::LoraShares shares = ivon::share_tokens(*call);
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(shares.threads)) if (shares.threads > 1)
  ivon::run_lora_share(*call, shares, omp_get_thread_num(), omp_get_num_threads());
#else
  ivon::run_lora_share(*call, shares, 0, 1);
#endif
}

}  // extern "C"
