// Masks of consecutive weights on the device: noise, decision, surrogate, for every estimator.
#pragma once

#include "../common/surrogate.h"
#include "device.cuh"
#include "element.h"
#include "mask_params.h"

namespace modmask::cuda {

// The noise of one set and sample.
struct Draws {
  uint64_t key;
  uint32_t sample;
  uint32_t flip;  // all bits set: 1 - u
};

MODMASK_DEVICE Draws draws_of(const MaskParams& p, int64_t set, int64_t sample) {
  if (!has_noise(p)) {
    return {0, 0, 0};
  }
  int64_t draw = 0, of_draw = sample;
  if (p.draws > 1) {
    const int64_t each = p.samples / p.draws;
    draw = sample / each;
    of_draw = sample - draw * each;
  }
  const int64_t at = p.sample_offset + of_draw;
  return {
      static_cast<uint64_t>(load(p.seeds + set * p.seed_stride + draw)),
      static_cast<uint32_t>(at >> (p.antithetic ? 1 : 0)),
      p.antithetic && (at & 1) != 0 ? ~0u : 0u};
}

MODMASK_DEVICE PhiloxWords words_of(const MaskParams& p, const Draws& d, uint64_t quad) {
  PhiloxWords r = philox(
      static_cast<uint32_t>(quad), d.sample, static_cast<uint32_t>(p.tensor_id),
      static_cast<uint32_t>(quad >> 32), d.key);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    r.w[j] ^= d.flip;
  }
  return r;
}

// The words of kCount consecutive elements from `element` on, kCount a multiple of 4.
template <int kCount>
MODMASK_DEVICE void words_from(
    const MaskParams& p, const Draws& d, uint64_t element, uint32_t (&to)[kCount]) {
  const uint64_t quad = element >> 2;
  const uint32_t skip = static_cast<uint32_t>(element & 3);  // the same for all threads of a launch
  PhiloxWords now = words_of(p, d, quad);
#pragma unroll
  for (int q = 0; q < kCount / 4; ++q) {
    if (skip == 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to[4 * q + j] = now.w[j];
      }
      if (q + 1 < kCount / 4) {
        now = words_of(p, d, quad + q + 1);
      }
    } else {
      const PhiloxWords next = words_of(p, d, quad + q + 1);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // indices that are known when compiled stay in registers
        const uint32_t one = j + 1 < 4 ? now.w[(j + 1) & 3] : next.w[(j + 1) & 3];
        const uint32_t two = j + 2 < 4 ? now.w[(j + 2) & 3] : next.w[(j + 2) & 3];
        const uint32_t three = j + 3 < 4 ? now.w[(j + 3) & 3] : next.w[(j + 3) & 3];
        to[4 * q + j] = skip == 1 ? one : skip == 2 ? two : three;
      }
      now = next;
    }
  }
}

MODMASK_DEVICE Cut cut_of(const MaskParams& p, int64_t set) {
  if (p.estimator == Estimator::kTopK) {
    return {load(&p.cuts[set].value), load(&p.cuts[set].ties)};
  }
  return {p.low, p.high != 0.0f ? INT64_MAX : 0};
}

// Of one weight. Where masks are hard its value is 1 or 0 by `kept`; the slope is that of the soft
// mask all the same.
struct MaskValue {
  bool kept;
  float value;
  float slope;
};

// `e` is exp_minus(logit), `i` the weight's index in its tensor; value and slope only with kSoft.
template <MaskMode kMode, bool kSoft>
MODMASK_DEVICE MaskValue
mask_value(const MaskParams& p, const Cut& cut, float logit, float e, uint32_t word, int64_t i) {
  if (kMode != MaskMode::kPlain &&
      (p.estimator == Estimator::kThreshold || p.estimator == Estimator::kTopK)) {
    const bool kept = logit > cut.value || (logit == cut.value && i < cut.ties);
    return {kept, kept ? 1.0f : 0.0f, 1.0f};
  }
  const bool drawn = kMode == MaskMode::kPlain || has_noise(p);
  const bool stretched = kMode != MaskMode::kPlain && p.estimator == Estimator::kHardConcrete;
  float u = drawn ? noise_value(word) : kTwo24 / 2;
  if (stretched && drawn) {
    u = clamped(u, p.least_u * kTwo24, p.most_u * kTwo24);
  }
  const float ue = MODMASK_MUL(u, e), rest = MODMASK_ADD(kTwo24, -u);
  const bool kept = drawn ? ue < rest : logit > 0.0f;
  if (!kSoft) {
    return {kept, 0.0f, 0.0f};
  }
  const Surrogate s = p.tau == 1.0f ? surrogate(ue, rest) : surrogate(logit, u, rest, 1.0f / p.tau);
  if (!stretched) {
    return {kept, s.value, s.slope};
  }
  const float width = p.high - p.low, v = fmaf(s.value, width, p.low);
  return {kept, clamped(v, 0.0f, 1.0f), v >= 0.0f && v <= 1.0f ? s.slope * width : 0.0f};
}

// By what n:m masks rank: exp(logit + noise), or the logit; NaN is the smallest.
MODMASK_DEVICE float score_of(const MaskParams& p, float logit, float e, uint32_t word) {
  float score = logit;
  if (has_noise(p)) {
    const float u = noise_value(word);
    score = MODMASK_ADD(kTwo24, -u) / MODMASK_MUL(u, e);
  }
  return score == score ? score : -INFINITY;
}

// The word of one weight; 0 without noise.
MODMASK_DEVICE uint32_t word_at(const MaskParams& p, const Draws& d, int64_t i) {
  const uint64_t element = static_cast<uint64_t>(p.element_offset + i);
  const PhiloxWords words = has_noise(p) ? words_of(p, d, element >> 2) : PhiloxWords{};
  const uint32_t at = element & 3;
  return at == 0 ? words.w[0] : at == 1 ? words.w[1] : at == 2 ? words.w[2] : words.w[3];
}

// The score of one weight, from the start.
MODMASK_DEVICE float score_at(const MaskParams& p, const Draws& d, const float* logits, int64_t i) {
  const float logit = load(logits + i);
  return score_of(p, logit, exp_minus(logit), word_at(p, d, i));
}

// Which of kCount weights from `i` on are kept in their groups of n of m. Their scores serve where
// the groups lie among them, else the others are drawn too.
template <int kCount>
MODMASK_DEVICE uint32_t kept_in_groups(
    const MaskParams& p,
    const Draws& d,
    const float* logits,
    int64_t i,
    int64_t count,
    const float (&scores)[kCount]) {
  uint32_t kept = 0;
  const bool inside = p.stride == 1 && kCount % p.among == 0 && i % p.among == 0;
  if (inside) {
    const uint32_t m = static_cast<uint32_t>(p.among);
#pragma unroll
    for (uint32_t j = 0; j < kCount; ++j) {
      int before = 0;
#pragma unroll
      for (uint32_t o = 0; o < kCount; ++o) {
        // 2, 4, 8 ...: kCount is a power of 2
        const bool together = ((j ^ o) & ~(m - 1)) == 0;
        before += o != j && together && (o < j ? scores[o] >= scores[j] : scores[o] > scores[j]);
      }
      kept |= static_cast<uint32_t>(before < p.keep) << j;
    }
    return kept;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (i + j < count) {
      const int64_t place = (i + j) / p.stride % p.among;
      int64_t before = 0;
      for (int64_t o = 0; o < p.among; ++o) {
        if (o != place) {
          const float other = score_at(p, d, logits, i + j + (o - place) * p.stride);
          before += o < place ? other >= scores[j] : other > scores[j];
        }
      }
      kept |= static_cast<uint32_t>(before < p.keep) << j;
    }
  }
  return kept;
}

// kCount elements of a row that ends after `left` of them, as float; zeros beyond. By 16 bytes
// where the address allows it.
template <int kCount, typename T>
MODMASK_DEVICE void load_part(const T* from, int64_t left, float (&to)[kCount]) {
  constexpr int kWide = kCount * sizeof(T) < 16 ? kCount : 16 / sizeof(T);
  if (left >= kCount && reinterpret_cast<uintptr_t>(from) % (kWide * sizeof(T)) == 0) {
#pragma unroll
    for (int j = 0; j < kCount; j += kWide) {
      const Vector<T, kWide> v = load_vector<kWide>(from + j);
#pragma unroll
      for (int l = 0; l < kWide; ++l) {
        to[j + l] = to_float(v.v[l]);
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    to[j] = j < left ? to_float(load(from + j)) : 0.0f;
  }
}

// The first `left` of kCount elements, rounded.
template <int kCount, typename T>
MODMASK_DEVICE void store_part(T* to, int64_t left, const float (&from)[kCount]) {
  constexpr int kWide = kCount * sizeof(T) < 16 ? kCount : 16 / sizeof(T);
  if (left >= kCount && reinterpret_cast<uintptr_t>(to) % (kWide * sizeof(T)) == 0) {
#pragma unroll
    for (int j = 0; j < kCount; j += kWide) {
      Vector<T, kWide> v;
#pragma unroll
      for (int l = 0; l < kWide; ++l) {
        v.v[l] = from_float<T>(from[j + l]);
      }
      store_vector<kWide>(to + j, v);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (j < left) {
      store(to + j, from_float<T>(from[j]));
    }
  }
}

// The same at index `at` of operands whose dtype is known when the kernel runs.
template <int kCount>
MODMASK_DEVICE void load_part(
    ElementType type, const void* from, int64_t at, int64_t left, float (&to)[kCount]) {
  if (type == ElementType::kFloat32) {
    load_part(static_cast<const float*>(from) + at, left, to);
  } else if (type == ElementType::kBFloat16) {
    load_part(static_cast<const __nv_bfloat16*>(from) + at, left, to);
  } else {
    load_part(static_cast<const __half*>(from) + at, left, to);
  }
}

template <int kCount>
MODMASK_DEVICE void store_part(
    ElementType type, void* to, int64_t at, int64_t left, const float (&from)[kCount]) {
  if (type == ElementType::kFloat32) {
    store_part(static_cast<float*>(to) + at, left, from);
  } else if (type == ElementType::kBFloat16) {
    store_part(static_cast<__nv_bfloat16*>(to) + at, left, from);
  } else {
    store_part(static_cast<__half*>(to) + at, left, from);
  }
}

}  // namespace modmask::cuda
