// Stands for the CUDA runtime: hands every launch to a function, as the driver would get it. No GPU, no CUDA needed.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace {

using Taker = int (*)(const char* kernel, uint32_t blocks, uint32_t threads, uint64_t shared, void** arguments);
Taker taker = nullptr;
std::map<const void*, std::string> kernels;

struct Dim {
  unsigned x, y, z;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void ptx_set_taker(Taker function) { taker = function; }

// What nvcc's host code calls when the library is loaded.
EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*,
                                   void*, int*) {
  kernels[host] = device;
}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT unsigned __cudaPushCallConfiguration(Dim, Dim, size_t, void*) { return 0; }
EXPORT int __cudaPopCallConfiguration(Dim*, Dim*, size_t*, void*) { return 0; }
EXPORT int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return 0;
}

// What launch.cu calls: one device, whose number is -1 like that of the CPU's tensors.
EXPORT int cudaGetDevice(int* device) {
  *device = -1;
  return 0;
}
EXPORT int cudaSetDevice(int) { return 0; }
EXPORT int cudaGetLastError() { return 0; }
EXPORT int cudaDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
EXPORT const char* cudaGetErrorString(int) { return "the launch was refused"; }
EXPORT int cudaFuncGetAttributes(void* attributes, const void* kernel) {
  std::memset(attributes, 0, 64);
  return kernels.count(kernel) != 0 ? 0 : 98;
}

EXPORT int cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared, void*) {
  const auto found = kernels.find(kernel);
  if (found == kernels.end() || taker == nullptr) return 98;  // cudaErrorInvalidDeviceFunction
  return taker(found->second.c_str(), grid.x, block.x, shared, arguments);
}
