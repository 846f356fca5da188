// C ABI of the host library (loaded by ivon_kernels/backends/addresses.py through ctypes.PyDLL, which keeps the GIL).
//
// It reads where parameters and gradients are, at C speed: in Python that costs most of the GPU time of a LoRA step. It
// links neither torch nor Python. CPython's stable ABI is resolved when the interpreter loads the library; tensors are
// read through the table of functions that torch publishes (DLPack's C exchange API).
#pragma once

#include <cstdint>

#define IVON_HOST_ABI 3

#if defined(__GNUC__)
#define IVON_HOST_EXPORT __attribute__((visibility("default")))
#else
#define IVON_HOST_EXPORT
#endif

struct _object;  // CPython's PyObject, opaque

extern "C" {

// Flags of ivon_host_read_grads.
enum IvonGradFlags {
  IVON_GRADS_MISSING = 1,    // a gradient is None; its address is 0
  IVON_GRADS_IRREGULAR = 2,  // a gradient that only Python can judge; the arrays are undefined, no other flag is set
  IVON_GRADS_CHANGED = 4,    // an address or dtype is not what the arrays held before
};

// What was recorded about one parameter. `sizes`, `strides` and the strides that its gradient is expected to have
// follow, `dims` int64 each.
struct IvonHostRecord {
  int64_t type;  // address of the Python type
  int64_t address;
  int64_t device;
  int64_t dtype;  // of DLPack: code << 8 | bits
  int64_t requires_grad;
  int64_t dims;
  int64_t numel;
};

struct IvonHostList {
  _object* const* params;
  int64_t count;
  int64_t* records;       // one IvonHostRecord with its sizes and strides after the other
  int64_t capacity;       // of `records`, in int64
  _object* const* given;  // gradients to read in place of the parameters' own, or null
  int64_t* grads;
  int64_t* grad_dtypes;  // 0 float32, 1 bfloat16, 2 float16
};

// Objects that Python hands over once.
struct IvonHostObjects {
  _object* exchange_api;   // torch.Tensor.__dlpack_c_exchange_api__
  _object* tensor;         // torch.Tensor
  _object* grad;           // torch.Tensor.grad: the descriptor
  _object* requires_grad;  // torch.Tensor.requires_grad: likewise
  _object* version;        // torch.Tensor._version: likewise
  _object* is_neg;         // torch.Tensor.is_neg
  _object* none;
  _object* yes;  // True
};

IVON_HOST_EXPORT int ivon_host_abi(void);
// Null, or why tensors cannot be read.
IVON_HOST_EXPORT const char* ivon_host_init(const IvonHostObjects* objects);
// Fills the records; 0, or -1 where a parameter cannot be read or the records do not fit. The gradients' strides are
// left to the caller.
IVON_HOST_EXPORT int ivon_host_record(const IvonHostList* list);
// 1 where a parameter is no longer what was recorded, else 0. Whether it is trained is looked at only if asked for:
// that takes as long as all the rest.
IVON_HOST_EXPORT int ivon_host_moved(const IvonHostList* list, int trained);
// Reads `grad` of every parameter; IvonGradFlags.
IVON_HOST_EXPORT int ivon_host_read_grads(const IvonHostList* list);
// The sum of `_version` of the list's parameters, which has no records: another number once one of them was written.
IVON_HOST_EXPORT int64_t ivon_host_versions(const IvonHostList* list);

}  // extern "C"
