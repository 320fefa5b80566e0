// One bit per element of a bool mask, the lowest bit first.
#pragma once

#include <cstdint>
#if !defined(__CUDACC__)
#include "simt.h"
#endif

namespace modmask::cuda {

constexpr int kPackThreads = 256;
constexpr int64_t kPackEach = 16;  // elements of a thread: one load of 16 bytes

// Eight bytes of 0 or 1, the first one lowest, to the bits of one byte.
__device__ inline uint32_t gather_bits(uint64_t bytes) {
  return static_cast<uint32_t>(bytes * 0x0102040810204080ull >> 56);
}

// mask: 16-byte aligned; bits: 2-byte aligned, [ceil(count / 8)]
__global__ void __launch_bounds__(kPackThreads)
    pack_bits_kernel(const uint8_t* mask, int64_t count, uint8_t* bits) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPackThreads * kPackEach;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) * kPackEach;
  for (; i < count; i += step) {
    if (i + kPackEach <= count) {
      const ulonglong2 b = *reinterpret_cast<const ulonglong2*>(mask + i);
      *reinterpret_cast<uint16_t*>(bits + i / 8) =
          static_cast<uint16_t>(gather_bits(b.x) | gather_bits(b.y) << 8);
      continue;
    }
    for (int64_t first = i; first < count; first += 8) {
      uint32_t byte = 0;
      for (int k = 0; k < 8 && first + k < count; ++k) {
        byte |= static_cast<uint32_t>(mask[first + k]) << k;
      }
      bits[first / 8] = static_cast<uint8_t>(byte);
    }
  }
}

}  // namespace modmask::cuda
