// What the runtime says about the machine's GPUs. Compiled without nvcc: the CPU that stands in.
#include "device.h"

#include "launch.h"

namespace pad {
namespace cuda {

#if defined(__CUDACC__)

namespace {
__global__ void probe() {}
}  // namespace

std::string device_error(int device) {
  int count = 0, version = 0;
  cudaDriverGetVersion(&version);
  const cudaError_t found = version ? cudaGetDeviceCount(&count) : cudaErrorNoDevice;
  cudaGetLastError();
  if (version == 0) return "no NVIDIA driver";
  if (found != cudaSuccess) return std::string("no usable GPU: ") + cudaGetErrorString(found);
  if (device >= count) return "no GPU number " + std::to_string(device);
  int current = 0;
  cudaGetDevice(&current);
  cudaSetDevice(device);
  cudaFuncAttributes attributes;
  const cudaError_t loaded = cudaFuncGetAttributes(&attributes, probe);
  cudaGetLastError();
  cudaSetDevice(current);
  if (loaded != cudaSuccess)
    return std::string("not compiled for this GPU: ") + cudaGetErrorString(loaded);
  return "";
}

size_t shared_limit() {
  int device = 0, bytes = 0;
  PAD_ISA::check(cudaGetDevice(&device), "cudaGetDevice");
  PAD_ISA::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                 "cudaDeviceGetAttribute");
  return size_t(bytes);
}

#else

std::string device_error(int) { return ""; }
size_t shared_limit() { return 163 << 10; }  // of an A100

#endif

}  // namespace cuda
}  // namespace pad
