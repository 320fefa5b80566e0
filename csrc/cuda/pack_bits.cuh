// One bit per element of a bool mask, the lowest bit first.
#pragma once

#include "../common/philox.h"
#include "device.cuh"

namespace modmask::cuda {

constexpr int kPackThreads = 256;
constexpr int kPackEach = 16;  // elements that a thread loads at once
constexpr int64_t kPackBlocks = 1 << 20;

struct PackBits {
  const uint8_t* mask;  // [count], 0 or 1, on 16 bytes
  int64_t count;
  uint8_t* bits;  // [ceil(count / 8)], on 2 bytes
};

inline LaunchShape pack_bits_shape(int64_t count) {
  const int64_t each = kPackThreads * kPackEach, blocks = (count + each - 1) / each;
  return {
      dim3(static_cast<unsigned>(blocks < kPackBlocks ? blocks : kPackBlocks)), dim3(kPackThreads)};
}

// Eight bytes of 0 or 1, the first one lowest, to the bits of one byte.
MODMASK_DEVICE uint32_t gather_bits(uint64_t bytes) {
  return static_cast<uint32_t>(bytes * 0x0102040810204080ull >> 56);
}

__global__ void __launch_bounds__(kPackThreads) pack_bits(PackBits p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPackThreads * kPackEach;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) * kPackEach;
  for (; i < p.count; i += step) {
    if (i + kPackEach <= p.count) {
      const auto bytes = load_vector<2>(reinterpret_cast<const uint64_t*>(p.mask + i));
      store(
          reinterpret_cast<uint16_t*>(p.bits + i / 8),
          static_cast<uint16_t>(gather_bits(bytes.v[0]) | gather_bits(bytes.v[1]) << 8));
      continue;
    }
    for (int64_t first = i; first < p.count; first += 8) {
      uint32_t byte = 0;
#pragma unroll 1
      for (int k = 0; k < 8 && first + k < p.count; ++k) {
        byte |= static_cast<uint32_t>(load(p.mask + first + k)) << k;
      }
      store(p.bits + first / 8, static_cast<uint8_t>(byte));
    }
  }
}

}  // namespace modmask::cuda
