// Stands for the CUDA runtime: hands every launch to a function, as the driver would get it. No GPU, no CUDA needed.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace {

using Taker = int (*)(const char* kernel, uint32_t blocks, uint32_t threads, uint64_t shared, void** arguments);
Taker taker = nullptr;

// Of each host function the kernel. Made when it is first needed: by initializers, in any order.
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> known;
  return known;
}

struct Dim {
  unsigned x, y, z;
};

}  // namespace

// Linked into the library itself and hidden in it: another CUDA runtime in this process stays what it is.
extern "C" __attribute__((visibility("default"))) void ptx_set_taker(Taker function) { taker = function; }

// What nvcc's host code calls when the library is loaded.
extern "C" void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
extern "C" void __cudaRegisterFatBinaryEnd(void**) {}
extern "C" void __cudaUnregisterFatBinary(void**) {}
extern "C" void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*,
                                       void*, int*) {
  kernels()[host] = device;
}
extern "C" void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
extern "C" char __cudaInitModule(void**) { return 1; }
extern "C" unsigned __cudaPushCallConfiguration(Dim, Dim, size_t, void*) { return 0; }
extern "C" int __cudaPopCallConfiguration(Dim*, Dim*, size_t*, void*) { return 0; }
extern "C" int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return 0;
}

// What launch.cu calls. There is one device, whose number is -1 like that of the CPU's tensors.
extern "C" int cudaSetDevice(int) { return 0; }
extern "C" int cudaGetLastError() { return 0; }
extern "C" int cudaDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
extern "C" const char* cudaGetErrorString(int) { return "the launch was refused"; }
extern "C" int cudaFuncGetAttributes(void* attributes, const void* kernel) {
  std::memset(attributes, 0, 64);
  return kernels().count(kernel) != 0 ? 0 : 98;
}

extern "C" int cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared, void*) {
  const auto found = kernels().find(kernel);
  if (found == kernels().end() || taker == nullptr) return 98;  // cudaErrorInvalidDeviceFunction
  return taker(found->second.c_str(), grid.x, block.x, shared, arguments);
}

// From the host functions that nvcc makes of kernels, which launch.cu does not call.
extern "C" int __cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared,
                                  void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
