#include "launch.cuh"
#include "pack_bits.cuh"

namespace modmask::cuda {

void launch_pack_bits(const uint8_t* mask, int64_t count, uint8_t* bits, Stream stream) {
  launch(
      "pack_bits", pack_bits_kernel, blocks_for(count, kPackThreads * kPackEach), kPackThreads, 0,
      stream, mask, count, bits);
}

int toolkit_version() {
  return CUDART_VERSION;
}

const char* problem() {
  cudaFuncAttributes attributes;  // asks for the code of the current device
  const cudaError_t error = cudaFuncGetAttributes(&attributes, pack_bits_kernel);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace modmask::cuda
