// Masks as values or packed bits, and the gradient of the values. Every kernel reads the logits
// once, whatever the number of samples, and no noise from memory.
#pragma once

#include "mask.cuh"

namespace modmask::cuda {

// A thread has eight consecutive weights: one byte of bits, two draws of four.
constexpr int kOctet = 8;
constexpr int kSampleThreads = 256;

struct SampleParams {
  MaskParams mask;
  const float* logits;  // [sets, count], or [count] where the sets share them
  int64_t count;
  MaskBits packed;
  float* values;         // [samples, sets, count]
  const float* dvalues;  // likewise
  float* dlogits;        // [sets, count]
};

inline int64_t sample_blocks(int64_t count) {
  const int64_t octets = (count + kOctet - 1) / kOctet;
  return (octets + kSampleThreads - 1) / kSampleThreads;
}

// Of every kernel here; for count > 0 and sets > 0.
inline LaunchShape sample_shape(const SampleParams& p) {
  return {
      dim3(static_cast<unsigned>(p.mask.sets * sample_blocks(p.count))), dim3(kSampleThreads), 0};
}

// Where a thread's weights are.
struct Octet {
  int64_t set;
  int64_t i;     // its first weight
  int64_t left;  // weights from there on, none where it is 0 or less

  MODMASK_DEVICE explicit Octet(const SampleParams& p) {
    const int64_t octets = (p.count + kOctet - 1) / kOctet;
    const unsigned blocks = static_cast<unsigned>((octets + kSampleThreads - 1) / kSampleThreads);
    set = blockIdx.x / blocks;
    i = (static_cast<int64_t>(blockIdx.x % blocks) * kSampleThreads + threadIdx.x) * kOctet;
    left = p.count - i;
  }
};

// f(sample, kept, values, slopes) for every sample of an octet, in order: `kept` has one bit per
// weight, the others are there with kSoft.
template <MaskMode kMode, bool kSoft, typename F>
MODMASK_DEVICE void for_samples(const SampleParams& params, const Octet& octet, const F& f) {
  const MaskParams& p = params.mask;
  const float* of_set = params.logits + (p.shared ? 0 : octet.set * params.count);
  const bool noisy = kMode == MaskMode::kPlain || has_noise(p);
  float logits[kOctet], e[kOctet], values[kOctet], slopes[kOctet];
  load_part(of_set + octet.i, octet.left, logits);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    e[j] = exp_minus(logits[j]);
  }
  const Cut cut = kMode == MaskMode::kGeneral ? cut_of(p, octet.set) : Cut{0.0f, 0};
  uint32_t words[kOctet] = {};
  for (int64_t k = 0; k < p.samples; ++k) {
    const Draws d = draws_of(p, octet.set, k);
    if (noisy) {
      words_from(p, d, static_cast<uint64_t>(p.element_offset + octet.i), words);
    }
    uint32_t kept = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const MaskValue m = mask_value<kMode, kSoft>(p, cut, logits[j], e[j], words[j], octet.i + j);
      kept |= static_cast<uint32_t>(m.kept) << j;
      values[j] = m.value;
      slopes[j] = m.slope;
    }
    if (kMode == MaskMode::kGroups) {
      float scores[kOctet];
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        scores[j] = score_of(p, logits[j], e[j], words[j]);
      }
      kept = kept_in_groups(p, d, of_set, octet.i, params.count, scores);
    }
    f(k, kept, values, slopes);
  }
}

template <MaskMode kMode>
__global__ void __launch_bounds__(kSampleThreads) sample_bits(SampleParams p) {
  const Octet octet(p);
  if (octet.left <= 0) {
    return;
  }
  uint8_t* byte = p.packed.bits + octet.set * p.packed.set_stride + octet.i / kOctet;
  const uint32_t inside = octet.left < kOctet ? (1u << octet.left) - 1u : 0xFFu;
  for_samples<kMode, false>(
      p, octet, [&](int64_t k, uint32_t kept, const float (&)[kOctet], const float (&)[kOctet]) {
        store(byte + k * p.packed.sample_stride, static_cast<uint8_t>(kept & inside));
      });
}

template <MaskMode kMode, bool kHard>
__global__ void __launch_bounds__(kSampleThreads) sample_values(SampleParams p) {
  const Octet octet(p);
  if (octet.left <= 0) {
    return;
  }
  for_samples<kMode, !kHard>(
      p, octet,
      [&](int64_t k, uint32_t kept, const float (&values)[kOctet], const float (&)[kOctet]) {
        float to[kOctet];
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          to[j] = !kHard ? values[j] : (kept >> j & 1u) != 0 ? 1.0f : 0.0f;
        }
        store_part(p.values + (k * p.mask.sets + octet.set) * p.count + octet.i, octet.left, to);
      });
}

// dlogits from dvalues, summed over the samples in their order.
template <MaskMode kMode>
__global__ void __launch_bounds__(kSampleThreads) sample_backward(SampleParams p) {
  const Octet octet(p);
  if (octet.left <= 0) {
    return;
  }
  // n of m has the slopes of masks that decide each weight by itself
  constexpr MaskMode kSlopes = kMode == MaskMode::kGroups ? MaskMode::kGeneral : kMode;
  float sums[kOctet] = {};
  for_samples<kSlopes, true>(
      p, octet, [&](int64_t k, uint32_t, const float (&)[kOctet], const float (&slopes)[kOctet]) {
        float d[kOctet];
        load_part(p.dvalues + (k * p.mask.sets + octet.set) * p.count + octet.i, octet.left, d);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          sums[j] += slopes[j] * d[j];
        }
      });
  store_part(p.dlogits + octet.set * p.count + octet.i, octet.left, sums);
}

}  // namespace modmask::cuda
