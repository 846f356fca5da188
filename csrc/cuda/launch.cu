// The C ABI: packs tensors into the arguments of as few launches as hold them.
#include <atomic>
#include <cstring>
#include <type_traits>

#include "ivon_cuda.h"
#include "kernels.h"

namespace ivon {
namespace scalar {
namespace {

struct Limits {
  int64_t tensors, rows, blocks;
};

// Whether an operation takes noise, and with it the rows.
template <Operation kOperation>
constexpr bool kDraws = kOperation != kRestore && kOperation != kCheck;

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // CUDA's limit for a grid's first dimension

// Whether the compiler takes kernels with more than 4096 bytes of arguments.
#if defined(IVON_EMULATE) || CUDART_VERSION >= 12010
constexpr bool kLargeArguments = true;
#else
constexpr bool kLargeArguments = false;
#endif

Limits lowered{0, 0, 0};  // by tests; 0: the device's own
bool stub = false;
std::atomic<int64_t> launches{0};

// Whether a launch may have more than 4096 bytes of arguments.
bool large_arguments() {
#if defined(IVON_EMULATE)
  return true;
#else
  static const bool large = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  return kLargeArguments && (large || stub);
#endif
}

int64_t lower(int64_t own, int64_t wish) { return wish > 0 && wish < own ? wish : own; }

// Of a launch with the largest arguments that the driver takes, where `Full` is the largest there are.
template <class Full>
Limits limits() {
  const bool small = sizeof(Full) > 4096 && !large_arguments();
  return {lower(small ? SmallArguments::kTensors : Full::kTensors, lowered.tensors),
          lower(small ? SmallArguments::kRows : Full::kRows, lowered.rows), lower(kMaxBlocks, lowered.blocks)};
}

// Makes a device the current one of this library's CUDA runtime. It stays that: making the one before current again
// would give a device that nobody may use a context. The caller switches torch's, where it is another, and back.
cudaError_t use_device(int64_t device) {
#if defined(IVON_EMULATE)
  static_cast<void>(device);
  return cudaSuccess;
#else
  return stub ? cudaSuccess : cudaSetDevice(static_cast<int>(device));
#endif
}

KeyTable key_table(uint64_t seed) {
  const RoundKeys keys{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  KeyTable table;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    table.keys[2 * round] = static_cast<uint32_t>(keys.first(round));
    table.keys[2 * round + 1] = static_cast<uint32_t>(keys.second(round));
  }
  return table;
}

CallHeader make_header(const IvonCudaCall& call) {
  return {call.mean,
          call.momentum,
          call.hess,
          call.grad_sum,
          call.second_sum,
          call.steps,
          call.control,
          call.mailbox,
          call.found_inf,
          call.grad_scale,
          call.step_override,
          key_table(call.seed),
          noise_of(call.sample, call.replica),
          0,
          0,
          0,
          call.adopt != 0,
          call.draw_next != 0,
          false,
          call.report != 0};
}

bool aligned(int64_t address, int64_t dtype) { return address % (dtype == IVON_FLOAT32 ? 16 : 8) == 0; }

// Collects the tensors of a call, and launches whenever the arguments are full.
template <Operation kOperation, bool kGathered>
class Packer {
 public:
  Packer(const IvonCudaCall& call, uint32_t quads) : call_(call), limits_(limits<Full>()), table_(call.rows) {
    full_.call = make_header(call);
    full_.call.quads = quads;
  }

  cudaError_t add(const IvonCudaTensor& t) {
    const int64_t chunk = full_.call.chunk(), chunks = (t.numel + chunk - 1) / chunk;
    TensorRecord record = make_record(t);
    int64_t done = 0;
    do {
      int64_t row = find_row(t.row);
      if (tensors_ == limits_.tensors || row == limits_.rows || (blocks_ == limits_.blocks && chunks != 0)) {
        const cudaError_t error = flush(false);
        if (error != cudaSuccess) return error;
        row = 0;
      }
      if (kReadsRows && row == rows_) {
        std::memcpy(&full_.rows[rows_], static_cast<const GroupRow*>(table_) + t.row, sizeof(GroupRow));
        row_numbers_[rows_++] = t.row;
      }
      const int64_t room = limits_.blocks - blocks_, take = chunks - done < room ? chunks - done : room;
      record.row = static_cast<uint32_t>(row);
      record.first_chunk = static_cast<uint32_t>(done);
      full_.first_block[tensors_] = static_cast<uint32_t>(blocks_);
      blocks_ += take, done += take;
      if (done == chunks) record.word |= kCounted;
      if constexpr (kGathered) full_.runs[tensors_] = {t.run, t.pitch};
      full_.tensors[tensors_++] = record;
    } while (done < chunks);
    return cudaSuccess;
  }

  cudaError_t flush(bool final) {
    if (tensors_ == 0) return cudaSuccess;
    full_.call.final = final;
    cudaError_t error = cudaSuccess;
    if constexpr (kGathered) {
      error = launch(full_);
    } else if (fits<SmallArguments>()) {
      error = launch<SmallArguments>();
    } else if constexpr (kLargeArguments) {
      error = fits<MediumArguments>() ? launch<MediumArguments>() : launch(full_);
    }
    tensors_ = rows_ = blocks_ = 0;
    return error;
  }

 private:
  using Full = std::conditional_t<kGathered, GatheredArguments, LargeArguments>;
  static constexpr bool kReadsRows = kDraws<kOperation>;

  TensorRecord make_record(const IvonCudaTensor& t) const {
    const bool uses_grad = kOperation != kSample && kOperation != kRestore;
    const int64_t param = call_.params[t.slot], grad = uses_grad ? call_.grads[t.slot] : 0;
    const int64_t grad_dtype = uses_grad ? call_.grad_dtypes[t.slot] : 0, layout = call_.layouts[t.slot];
    uint32_t word = static_cast<uint32_t>(t.param_dtype | grad_dtype << 2 | t.index << 8);
    if (layout == 0 && aligned(param, t.param_dtype)) word |= kParamVector;
    if (layout == 0 && aligned(grad, grad_dtype)) word |= kGradVector;
    if (kOperation == kStep && call_.summed != nullptr && call_.summed[t.slot] != 0) word |= kSummed;
    return {reinterpret_cast<void*>(param),
            reinterpret_cast<const void*>(grad),
            reinterpret_cast<const IvonLayout*>(layout),
            t.offset,
            t.numel,
            t.start,
            word,
            static_cast<uint32_t>(t.position),
            0,
            0};
  }

  // Place of a group's row among those of the next launch, where it may still have to be put.
  int64_t find_row(int64_t number) const {
    if constexpr (kReadsRows) {
      for (int64_t row = rows_ - 1; row >= 0; --row) {
        if (row_numbers_[row] == number) return row;
      }
      return rows_;
    } else {
      static_cast<void>(number);
      return 0;
    }
  }

  template <class Args>
  bool fits() const {
    return tensors_ <= Args::kTensors && rows_ <= Args::kRows;
  }

  template <class Args>
  cudaError_t launch() {
    Args args;
    std::memcpy(&args.call, &full_.call, sizeof args.call);
    std::memcpy(args.first_block, full_.first_block, static_cast<size_t>(tensors_) * sizeof args.first_block[0]);
    std::memcpy(args.tensors, full_.tensors, static_cast<size_t>(tensors_) * sizeof args.tensors[0]);
    std::memcpy(args.rows, full_.rows, static_cast<size_t>(rows_) * sizeof args.rows[0]);
    return launch(args);
  }

  template <class Args>
  cudaError_t launch(Args& args) {
    args.call.count = static_cast<uint32_t>(tensors_);
    args.call.blocks = static_cast<uint32_t>(blocks_);
    launches.fetch_add(1, std::memory_order_relaxed);
    if (stub) return cudaSuccess;
    // Tensors without elements have steps to count too.
    const uint32_t blocks = blocks_ == 0 ? 1 : static_cast<uint32_t>(blocks_);
    return launch_operation<kOperation>(args, blocks, static_cast<cudaStream_t>(call_.stream));
  }

  const IvonCudaCall& call_;
  const Limits limits_;
  const void* table_;
  int64_t tensors_ = 0, rows_ = 0, blocks_ = 0;
  int64_t row_numbers_[Full::kRows];
  Full full_;
};

// Whether a tensor is a shard for GatheredArguments.
bool is_gathered(const IvonCudaTensor& t) { return t.numel != 0 && (t.run < t.numel || t.start % 4 != 0); }

// How much a thread does: more where there are many elements, and all that it can where it only looks at them.
template <Operation kOperation>
uint32_t quads_for(const IvonCudaCall& call) {
  if (kOperation == kCheck) return kMostQuads;
  const int64_t many = lower(kManyBlocks, lowered.blocks);
  int64_t elements = 0;
  for (int64_t i = 0; i < call.count; ++i) elements += call.tensors[i].numel;
  uint32_t quads = kFewestQuads;
  while (quads < kMostQuads && elements > 2 * many * quads * kThreads * 4) quads *= 2;
  return quads;
}

// Launches an operation on the tensors of one kind.
template <Operation kOperation, bool kGathered>
cudaError_t run(const IvonCudaCall& call, bool final) {
  Packer<kOperation, kGathered> packer(call, quads_for<kOperation>(call));
  for (int64_t i = 0; i < call.count; ++i) {
    const IvonCudaTensor& t = call.tensors[i];
    if (kDraws<kOperation> && is_gathered(t) != kGathered) continue;
    if (kOperation != kStep && t.numel == 0) continue;
    if ((kOperation == kCheck || kOperation == kAccumulate) && call.grads[t.slot] == 0) continue;
    const cudaError_t error = packer.add(t);
    if (error != cudaSuccess) return error;
  }
  return packer.flush(final);
}

template <Operation kOperation>
int run(const IvonCudaCall& call) {
  const cudaError_t unusable = use_device(call.device);
  if (unusable != cudaSuccess) return static_cast<int>(unusable);
  if constexpr (kDraws<kOperation>) {
    int64_t gathered = 0;
    for (int64_t i = 0; i < call.count; ++i) gathered += is_gathered(call.tensors[i]);
    if (gathered != 0) {
      const bool all = gathered == call.count;
      const cudaError_t error = run<kOperation, true>(call, all && call.final != 0);
      if (all || error != cudaSuccess) return static_cast<int>(error);
    }
  }
  return static_cast<int>(run<kOperation, false>(call, call.final != 0));
}

#if !defined(IVON_EMULATE)
template <Operation kOperation, class Args>
cudaError_t load_kernel() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel<kOperation, Args>));
}

template <Operation kOperation>
cudaError_t load_kernels() {
  cudaError_t error = load_kernel<kOperation, SmallArguments>();
  if constexpr (kDraws<kOperation>) {
    if (error == cudaSuccess) error = load_kernel<kOperation, GatheredArguments>();
  }
  if constexpr (kLargeArguments) {
    if (!large_arguments()) return error;
    if (error == cudaSuccess) error = load_kernel<kOperation, MediumArguments>();
    if (error == cudaSuccess) error = load_kernel<kOperation, LargeArguments>();
  }
  return error;
}
#endif

}  // namespace
}  // namespace scalar
}  // namespace ivon

using namespace ivon::scalar;

extern "C" {

int ivon_cuda_abi(void) { return IVON_CUDA_ABI; }

int ivon_cuda_emulated(void) {
#if defined(IVON_EMULATE)
  return 1;
#else
  return 0;
#endif
}

void ivon_cuda_versions(int64_t* library, int64_t* driver) {
  *library = *driver = 0;
#if !defined(IVON_EMULATE)
  int version = 0;
  *library = CUDART_VERSION;
  if (cudaDriverGetVersion(&version) == cudaSuccess) *driver = version;
#endif
}

const char* ivon_cuda_error_string(int code) {
#if defined(IVON_EMULATE)
  return code == 0 ? "no error" : "an error of the emulator";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

int ivon_cuda_load(int64_t device) {
#if defined(IVON_EMULATE)
  static_cast<void>(device);
  return 0;
#else
  if (stub) return 0;
  const cudaError_t unusable = use_device(device);
  if (unusable != cudaSuccess) return static_cast<int>(unusable);
  for (const auto load : {load_kernels<kSample>, load_kernels<kRestore>, load_kernels<kCheck>,
                          load_kernels<kAccumulate>, load_kernels<kStep>}) {
    const cudaError_t error = load();
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  return 0;
#endif
}

int ivon_cuda_sample(const IvonCudaCall* call) { return run<kSample>(*call); }
int ivon_cuda_restore(const IvonCudaCall* call) { return run<kRestore>(*call); }
int ivon_cuda_check(const IvonCudaCall* call) { return run<kCheck>(*call); }
int ivon_cuda_accumulate(const IvonCudaCall* call) { return run<kAccumulate>(*call); }
int ivon_cuda_step(const IvonCudaCall* call) { return run<kStep>(*call); }

int ivon_cuda_normals(float* out, int64_t numel, uint64_t seed, int64_t step, int64_t sample, int64_t replica,
                      int64_t param, int64_t start, int64_t device, void* stream) {
  if (numel == 0) return 0;
  const cudaError_t unusable = use_device(device);
  if (unusable != cudaSuccess) return static_cast<int>(unusable);
  const KeyTable keys = key_table(seed);
  uint32_t step_word = static_cast<uint32_t>(step), param_word = static_cast<uint32_t>(param);
  uint64_t sample_word = noise_of(sample, replica);
#if defined(IVON_EMULATE)
  static_cast<void>(stream);
  for (int64_t block = start / 4; block * 4 < start + numel; ++block) {
    Quad eps;
    normal_quad(static_cast<uint64_t>(block), keys, param_word, step_word, sample_word, eps);
    for (int i = 0; i < 4; ++i) {
      const int64_t element = block * 4 + i - start;
      if (element >= 0 && element < numel) out[element] = eps.v[i];
    }
  }
  return 0;
#else
  const int64_t blocks = numel / (4 * kThreads) + 1;
  void* arguments[] = {&out, &numel, const_cast<KeyTable*>(&keys), &step_word, &sample_word, &param_word, &start};
  return static_cast<int>(launch_kernel(reinterpret_cast<const void*>(normals_kernel),
                                        static_cast<uint32_t>(blocks < 65536 ? blocks : 65536), arguments,
                                        static_cast<cudaStream_t>(stream)));
#endif
}

void ivon_cuda_set_limits(int64_t tensors, int64_t rows, int64_t blocks) { lowered = {tensors, rows, blocks}; }
void ivon_cuda_set_stub(int on) { stub = on != 0; }
int64_t ivon_cuda_launches(void) { return launches.load(std::memory_order_relaxed); }

#if defined(IVON_EMULATE)
void ivon_cuda_record(int on) {
  if (on != 0) recorder.launches.clear();
  recorder.on = on != 0;
}
void ivon_cuda_replay(void) {
  for (const auto& launch : recorder.launches) launch();
}
#endif

}  // extern "C"
