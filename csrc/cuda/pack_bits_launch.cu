#include "launch.cuh"
#include "pack_bits.cuh"

namespace modmask::cuda {

void launch_pack_bits(const uint8_t* mask, int64_t count, uint8_t* bits, Stream stream) {
  launch<PackBits>("pack_bits", pack_bits, pack_bits_shape(count), {mask, count, bits}, stream);
}

void launch_expand_bits(
    const BlockSizes& sizes,
    int64_t masks,
    const uint8_t* from,
    int64_t from_stride,
    uint8_t* to,
    int64_t to_stride,
    Stream stream) {
  const ExpandBits p = expand_params(sizes, from, from_stride, to, to_stride);
  launch("expand_bits", expand_bits, expand_shape(p, masks), p, stream);
}

int toolkit_version() {
  return CUDART_VERSION;
}

const char* problem() {
  cudaFuncAttributes attributes;  // asks for the code of the current device
  const cudaError_t error = cudaFuncGetAttributes(&attributes, pack_bits);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace modmask::cuda
