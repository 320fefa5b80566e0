// Launches a kernel and checks that it was accepted.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace modmask::cuda {

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) {
    throw std::runtime_error(
        std::string("CUDA kernel ") + kernel + " was not launched: " + cudaGetErrorString(error));
  }
}

// Blocks of a kernel that takes `each` elements per block, in a loop where there are more.
inline dim3 blocks_for(int64_t count, int64_t each) {
  const int64_t blocks = (count + each - 1) / each, most = int64_t{1} << 20;
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

template <typename... Parameters, typename... Arguments>
void launch(
    const char* name,
    void (*kernel)(Parameters...),
    dim3 grid,
    dim3 block,
    size_t shared,
    cudaStream_t stream,
    Arguments&&... arguments) {
  if (shared > 48 * 1024) {  // more than this must be asked for
    check(
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace modmask::cuda
