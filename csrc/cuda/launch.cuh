// Launches a kernel and checks that it was accepted.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.cuh"
#include "launch.h"

namespace modmask::cuda {

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) {
    throw std::runtime_error(
        std::string("CUDA kernel ") + kernel + " was not launched: " + cudaGetErrorString(error));
  }
}

// `cooperative`: all blocks must run at once, or there is an error.
template <typename Parameters>
void launch(
    const char* name,
    void (*kernel)(Parameters),
    const LaunchShape& shape,
    const Parameters& p,
    Stream stream,
    bool cooperative = false) {
  if (shape.shared > 48 * 1024) {  // more than this must be asked for
    check(
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared)),
        name);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, p), name);
}

// Calls f(integral_constant<MaskMode>) with the mode of these masks.
template <typename F>
void with_mode(const MaskParams& p, const F& f) {
  switch (mode_of(p)) {
    case MaskMode::kPlain:
      return f(std::integral_constant<MaskMode, MaskMode::kPlain>{});
    case MaskMode::kGeneral:
      return f(std::integral_constant<MaskMode, MaskMode::kGeneral>{});
    default:
      return f(std::integral_constant<MaskMode, MaskMode::kGroups>{});
  }
}

}  // namespace modmask::cuda
