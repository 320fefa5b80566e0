// One bit per element of a mask, the lowest bit first: of a bool mask, or of a smaller mask.
#pragma once

#include "../common/philox.h"
#include "device.cuh"
#include "launch.h"

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

constexpr int kExpandEach = 32;  // bits of a thread

struct ExpandBits {
  BlockSizes sizes;
  const uint8_t* from;  // [masks, from_stride]
  int64_t from_stride;
  uint8_t* to;  // [masks, to_stride], on 4 bytes
  int64_t to_stride;
  int64_t count;  // of a whole mask
};

inline ExpandBits expand_params(
    const BlockSizes& sizes,
    const uint8_t* from,
    int64_t from_stride,
    uint8_t* to,
    int64_t to_stride) {
  const int64_t (&n)[4] = sizes.whole;
  return {sizes, from, from_stride, to, to_stride, n[0] * n[1] * n[2] * n[3]};
}

MODMASK_HOST_DEVICE int64_t expand_blocks(int64_t count) {
  const int64_t each = static_cast<int64_t>(kPackThreads) * kExpandEach;
  return (count + each - 1) / each;
}

inline LaunchShape expand_shape(const ExpandBits& p, int64_t masks) {
  return {dim3(static_cast<unsigned>(masks * expand_blocks(p.count))), dim3(kPackThreads)};
}

// Every bit from its block. A thread walks through 32 weights, knowing for every dimension the
// block and the place within it.
__global__ void __launch_bounds__(kPackThreads) expand_bits(ExpandBits p) {
  const unsigned blocks = static_cast<unsigned>(expand_blocks(p.count));
  const int64_t mask = blockIdx.x / blocks;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x % blocks) * kPackThreads + threadIdx.x) * kExpandEach;
  if (first >= p.count) {
    return;
  }
  int64_t block[4], within[4], length[4], rest = first;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    const int64_t at = rest % p.sizes.whole[d];
    rest /= p.sizes.whole[d];
    length[d] = p.sizes.whole[d] / p.sizes.small[d];
    block[d] = at / length[d];
    within[d] = at - block[d] * length[d];
  }
  const uint8_t* bits = p.from + mask * p.from_stride;
  const int count = static_cast<int>(p.count - first < kExpandEach ? p.count - first : kExpandEach);
  uint32_t word = 0;
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    int64_t at = block[0];
#pragma unroll
    for (int d = 1; d < 4; ++d) {
      at = at * p.sizes.small[d] + block[d];
    }
    word |= (static_cast<uint32_t>(load(bits + at / 8)) >> (at % 8) & 1u) << j;
    bool carry = true;
#pragma unroll
    for (int d = 3; d >= 0; --d) {
      within[d] += carry ? 1 : 0;
      const bool next = within[d] == length[d];
      within[d] = next ? 0 : within[d];
      block[d] += next ? 1 : 0;
      carry = block[d] == p.sizes.small[d];
      block[d] = carry ? 0 : block[d];
    }
  }
  store(reinterpret_cast<uint32_t*>(p.to + mask * p.to_stride) + first / 32, word);
}

}  // namespace modmask::cuda
