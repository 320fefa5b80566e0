// Rows of noise, exp(-logit), masks and surrogate slopes, vectorised.

namespace modmask::MODMASK_CAPABILITY {

// Elements made by one step of the generator; row buffers are padded to it.
constexpr int64_t kNoiseStep = 2 * kLanes;

constexpr int64_t padded(int64_t n, int64_t multiple = kNoiseStep) {
  return (n + multiple - 1) / multiple * multiple;
}

constexpr int64_t words_needed(int64_t n) {
  return padded(n + 3);
}

// Round keys and the constant parts of the first two rounds: only the counter word e>>2 varies
// within a stream, so one of the two products of each of these rounds is a constant.
struct NoiseStream {
  vq k0[kPhiloxRounds];
  vq k1[kPhiloxRounds];
  vq round1_c2;  // k1 of round 1, before the high counter word is mixed in
  vq round2_c0;  // c1 ^ k0 of round 2
  vq round2_c2;  // high product ^ k1 of round 2
  vq round3_c2;  // c3 ^ k1 of round 3

  NoiseStream(uint64_t key, uint32_t sample, uint32_t tensor_id) {
    uint32_t a = static_cast<uint32_t>(key);
    uint32_t b = static_cast<uint32_t>(key >> 32);
    for (int r = 0; r < kPhiloxRounds; ++r) {
      k0[r] = static_cast<uint64_t>(a) - vq{};
      k1[r] = static_cast<uint64_t>(b) - vq{};
      a += kPhiloxW0;
      b += kPhiloxW1;
    }
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * tensor_id;
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ sample ^ static_cast<uint32_t>(k0[0][0]);
    const uint32_t c1 = static_cast<uint32_t>(p1);
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    round1_c2 = k1[0];
    round2_c0 = (k0[1][0] ^ c1) - vq{};
    round2_c2 = (k1[1][0] ^ (p0 >> 32)) - vq{};
    round3_c2 = (k1[2][0] ^ (p0 & 0xFFFFFFFFu)) - vq{};
  }

  // Words of kSteps times kNoiseStep elements from 4 * quads[0] on, `advance` quads a step; two
  // independent steps at once keep the core busier than one. Words live in the low halves of
  // 64-bit lanes; the products ignore what the high halves hold.
  template <int kSteps>
  MODMASK_INLINE void step(const NoiseStream& s, vq quads, vq advance, uint32_t* out) {
    const vq m0 = static_cast<uint64_t>(kPhiloxM0) - vq{};
    const vq m1 = static_cast<uint64_t>(kPhiloxM1) - vq{};
    vq c0[kSteps], c1[kSteps], c2[kSteps], c3[kSteps];
#pragma GCC unroll 2
    for (int i = 0; i < kSteps; ++i, quads += advance) {
      const vq p0 = mul_low32(quads, m0);
      c2[i] = (p0 >> 32) ^ (quads >> 32) ^ s.round1_c2;
      c3[i] = p0;
    }
#pragma GCC unroll 2
    for (int i = 0; i < kSteps; ++i) {
      const vq p1 = mul_low32(c2[i], m1);
      c0[i] = (p1 >> 32) ^ s.round2_c0;
      c1[i] = p1;
      c2[i] = c3[i] ^ s.round2_c2;
    }
#pragma GCC unroll 8
    for (int r = 2; r < kPhiloxRounds; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < kSteps; ++i) {
        const vq p0 = mul_low32(c0[i], m0);
        const vq p1 = mul_low32(c2[i], m1);
        c0[i] = (p1 >> 32) ^ (c1[i] ^ s.k0[r]);
        c2[i] = (p0 >> 32) ^ (r == 2 ? s.round3_c2 : c3[i] ^ s.k1[r]);
        c1[i] = p1;
        c3[i] = p0;
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kSteps; ++i) {
      const vq a = join_low32(c0[i], c1[i]);
      const vq b = join_low32(c2[i], c3[i]);
      store(out + i * kNoiseStep, zip_even(a, b));
      store(out + i * kNoiseStep + kLanes, zip_odd(a, b));
    }
  }

  // Writes the words of elements element&~3 .. and returns where `element` itself lies in `out`,
  // which must hold words_needed(n).
  const uint32_t* row(uint64_t element, int64_t n, uint32_t* out) const {
    const int64_t skip = static_cast<int64_t>(element & 3);
    vq quads;
    for (int j = 0; j < kLanes / 2; ++j) {
      quads[j] = (element >> 2) + static_cast<uint64_t>(j / 2 + (j & 1) * (kLanes / 4));
    }
    const vq advance = static_cast<uint64_t>(kLanes / 2) - vq{};
    int64_t i = 0;
    for (; i + kNoiseStep < n + skip; i += 2 * kNoiseStep) {
      step<2>(*this, quads, advance, out + i);
      quads += advance + advance;
    }
    if (i < n + skip) {
      step<1>(*this, quads, advance, out + i);
    }
    return out + skip;
  }
};

// Vectors taken at once where each is one long chain of operations: the core looks ahead over about
// three such chains and would otherwise wait for them.
constexpr int kChains = 4;

// f(i, integral_constant<vectors>) for all vectors of n elements, kAtOnce or 1 of them at a time.
template <int kAtOnce = kChains, typename F>
MODMASK_INLINE void for_chains(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= n; i += kAtOnce * kLanes) {
    f(i, std::integral_constant<int, kAtOnce>{});
  }
  for (; i < n; i += kLanes) {
    f(i, std::integral_constant<int, 1>{});
  }
}

// modmask::exp_minus on vectors of logits, bit for bit.
template <int kVectors>
MODMASK_INLINE void exp_minus(vf (&v)[kVectors]) {
  const vf limit = splat(kExponentLimit);
  vf shifted[kVectors], p[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    v[j] = maximum(minimum(v[j] * splat(kMinusLog2E), limit), -limit);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    shifted[j] = v[j] + splat(kRoundToInteger);
    v[j] = v[j] - (shifted[j] - splat(kRoundToInteger));
    p[j] = splat(kExp2[0]);
  }
#pragma GCC unroll 8
  for (int i = 1; i <= kExp2Degree; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      p[j] = p[j] * v[j] + splat(kExp2[i]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    v[j] = (vf)((vu)p[j] + ((vu)shifted[j] << 23));  // p is near 1, its exponent far from the ends
  }
}

MODMASK_INLINE vf noise_value(vu word) {
  return to_float((word >> 8) | 1u);
}

// A number as integer + fraction, which keeps the digits that one float32 would lose.
struct Split {
  vf integer;
  vf fraction;
};

// log2 of positive, normal numbers; absolute error 1e-7.
MODMASK_INLINE Split log2_positive(vf x) {
  // mantissa in [sqrt(1/2), sqrt(2))
  const vi bits = (vi)x - 0x3F3504F3;
  const vi exponent = bits >> 23;
  const vf m = (vf)((bits & 0x007FFFFF) + 0x3F3504F3);
  const vf t = (m - 1.0f) / (m + 1.0f);
  const vf t2 = t * t;
  vf p = splat(2.0f / 11.0f);
  p = fma(p, t2, splat(2.0f / 9.0f));
  p = fma(p, t2, splat(2.0f / 7.0f));
  p = fma(p, t2, splat(2.0f / 5.0f));
  p = fma(p, t2, splat(2.0f / 3.0f));
  p = fma(p, t2, splat(2.0f));
  return {__builtin_convertvector(exponent, vf), p * t * splat(1.44269504f)};
}

// logit * log2(e); ln 2 in two parts makes the reduction exact.
MODMASK_INLINE Split log2_of_exp(vf logit) {
  const vf limit = splat(80.0f);
  const vf l = maximum(minimum(logit, limit), -limit);
  const vf round = splat(kRoundToInteger);
  const vf n = (l * splat(-kMinusLog2E) + round) - round;
  const vf rest = (l - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  return {n, rest * splat(-kMinusLog2E)};
}

// s = sigmoid((logit + log((1-u)/u)) / tau) and its derivative s (1 - s) / tau with respect to the
// logit.
struct Surrogate {
  vf value;
  vf slope;
};

// With s = 1 / (1 + U e / (2^24 - U)) at tau = 1.
template <int kVectors>
MODMASK_INLINE void surrogate(
    const vf (&ue)[kVectors], const vf (&rest)[kVectors], Surrogate (&to)[kVectors]) {
  vf inverse[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    inverse[j] = ue[j] + rest[j];
  }
  reciprocal(inverse);
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    to[j].value = rest[j] * inverse[j];
    to[j].slope = to[j].value * (ue[j] * inverse[j]);
  }
}

// At any temperature; `u` is U, `rest` 2^24 - U.
MODMASK_INLINE Surrogate surrogate(vf logit, vf u, vf rest, float inverse_tau) {
  const Split l = log2_of_exp(logit);
  const Split odds = log2_positive(u / rest);
  // log2 of (U e / rest)^(1/tau), again as integer and fraction
  const vf scale = splat(inverse_tau);
  const vf whole = (odds.integer - l.integer) * scale;
  const vf lost = fma(odds.integer - l.integer, scale, -whole);
  const vf part = (odds.fraction - l.fraction) * scale + lost;
  const vf limit = splat(kExponentLimit);
  const vf bounded = maximum(minimum(whole + part, limit), -limit);
  const vf round = splat(kRoundToInteger);
  const vf shifted = bounded + round;
  vf f = (whole - (shifted - round)) + part;
  f = maximum(minimum(f, splat(1.0f)), splat(-1.0f));  // beyond the limit, at low temperatures
  vf p = splat(kExp2[0]);
#pragma GCC unroll 8
  for (int i = 1; i <= kExp2Degree; ++i) {
    p = fma(p, f, splat(kExp2[i]));
  }
  const vf ratio = p * (vf)(((vu)shifted << 23) + 0x3F800000u);
  const vf inverse = 1.0f / (1.0f + ratio);
  return {inverse, inverse * (ratio * inverse) * inverse_tau};
}

}  // namespace modmask::MODMASK_CAPABILITY
