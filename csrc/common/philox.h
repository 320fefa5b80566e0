// Philox4x32 with 7 rounds (Salmon et al., SC 2011) and the layout of noise version 1.
// Host and device; no torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MODMASK_HOST_DEVICE __host__ __device__ inline
#else
#define MODMASK_HOST_DEVICE inline
#endif

namespace modmask {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

struct PhiloxWords {
  uint32_t w[4];
};

MODMASK_HOST_DEVICE PhiloxWords
philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The 32-bit word of one element: counter (lo32(e>>2), sample, tensor_id, hi32(e>>2)), word e&3.
MODMASK_HOST_DEVICE uint32_t
noise_word(uint64_t element, uint32_t sample, uint32_t tensor_id, uint64_t key) {
  const uint64_t quad = element >> 2;
  const PhiloxWords words = philox(
      static_cast<uint32_t>(quad), sample, tensor_id, static_cast<uint32_t>(quad >> 32), key);
  return words.w[element & 3];
}

}  // namespace modmask
