// Vectors of MODMASK_LANES floats in the namespace of one CPU capability. Included by the
// translation unit of each capability, after it has set its target.
//
// GCC vector extensions carry the arithmetic; intrinsics appear only where the compiler does not
// find the instruction by itself.

namespace modmask::MODMASK_CAPABILITY {

constexpr int kLanes = MODMASK_LANES;

using vf = float __attribute__((vector_size(kLanes * 4)));
using vi = int32_t __attribute__((vector_size(kLanes * 4)));
using vu = uint32_t __attribute__((vector_size(kLanes * 4)));
using vq = uint64_t __attribute__((vector_size(kLanes * 4)));

#define MODMASK_INLINE static inline __attribute__((always_inline))

MODMASK_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

MODMASK_INLINE vu load(const uint32_t* p) {
  vu v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

MODMASK_INLINE void store(float* p, vf v) {
  __builtin_memcpy(p, &v, sizeof v);
}

MODMASK_INLINE void store(uint32_t* p, vu v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// To an address that sizeof(vf) divides, past the caches: for results larger than they are. Other
// threads see it after finish_streams.
MODMASK_INLINE void stream(float* p, vf v) {
#if defined(MODMASK_AVX512)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(MODMASK_AVX2)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

MODMASK_INLINE void finish_streams() {
#if defined(MODMASK_AVX512) || defined(MODMASK_AVX2)
  _mm_sfence();
#endif
}

MODMASK_INLINE vf splat(float x) {
  return x - vf{};
}

// a < b ? a : b, so that a NaN in `a` gives b.
MODMASK_INLINE vf minimum(vf a, vf b) {
#if defined(MODMASK_AVX512)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(MODMASK_AVX2)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

MODMASK_INLINE vf maximum(vf a, vf b) {
#if defined(MODMASK_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(MODMASK_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// a * b + c, fused where the hardware has it. Never used in the decision.
MODMASK_INLINE vf fma(vf a, vf b, vf c) {
#if defined(MODMASK_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MODMASK_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#if defined(MODMASK_AVX512) || defined(MODMASK_AVX2)
// to 11 bits
MODMASK_INLINE vf approximate_reciprocal(vf a) {
#if defined(MODMASK_AVX512)
  return (vf)_mm512_rcp14_ps((__m512)a);
#else
  return (vf)_mm256_rcp_ps((__m256)a);
#endif
}
#endif

// 1 / a to about one unit in the last place, for positive, normal a below 2^125.
template <int kVectors>
MODMASK_INLINE void reciprocal(vf (&a)[kVectors]) {
#if defined(MODMASK_AVX512) || defined(MODMASK_AVX2)
  vf r[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    r[j] = approximate_reciprocal(a[j]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    a[j] = fma(-a[j], r[j], splat(1.0f));
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    a[j] = fma(a[j], r[j], r[j]);
  }
#else
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    a[j] = 1.0f / a[j];
  }
#endif
}

// 64-bit products of the low halves of 64-bit lanes; the high halves are ignored.
MODMASK_INLINE vq mul_low32(vq a, vq b) {
#if defined(MODMASK_AVX512)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(MODMASK_AVX2)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif MODMASK_LANES == 4 && defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// v where a < b, else 0.
MODMASK_INLINE vf where_less(vf a, vf b, vf v) {
#if defined(MODMASK_AVX512)
  return (vf)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ), (__m512)v);
#else
  return (vf)((a < b) & (vi)v);
#endif
}

// v in the lanes whose bit is set, else 0; the lowest bit is lane 0.
MODMASK_INLINE vf where_bits(uint32_t bits, vf v) {
#if defined(MODMASK_AVX512)
  return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#else
  static constexpr uint32_t kLaneBits[16] = {
      1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const vu lane = load(kLaneBits);
  return (vf)((((bits - vu{}) & lane) == lane) & (vi)v);
#endif
}

// Bit i set iff a[i] < b[i].
MODMASK_INLINE uint32_t bits_less(vf a, vf b) {
#if defined(MODMASK_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
#elif defined(MODMASK_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(a < b)));
#else
  const vi less = a < b;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) {
    bits |= (static_cast<uint32_t>(less[i]) & 1u) << i;
  }
  return bits;
#endif
}

// Integers below 2^24 as floats, exactly.
MODMASK_INLINE vf to_float(vu v) {
  return __builtin_convertvector((vi)v, vf);
}

// Low half of each 64-bit lane of `low`, then the low half of the same lane of `high`.
MODMASK_INLINE vq join_low32(vq low, vq high) {
  const vu a = (vu)low;
  const vu b = (vu)(high << 32);
#if MODMASK_LANES == 16
  return (vq)__builtin_shufflevector(
      a, b, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31);
#elif MODMASK_LANES == 8
  return (vq)__builtin_shufflevector(a, b, 0, 9, 2, 11, 4, 13, 6, 15);
#else
  return (vq)__builtin_shufflevector(a, b, 0, 5, 2, 7);
#endif
}

// Even (odd) lanes of a and b, alternating.
MODMASK_INLINE vu zip_even(vq a, vq b) {
#if MODMASK_LANES == 16
  return (vu)__builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
#elif MODMASK_LANES == 8
  return (vu)__builtin_shufflevector(a, b, 0, 4, 2, 6);
#else
  return (vu)__builtin_shufflevector(a, b, 0, 2);
#endif
}

MODMASK_INLINE vu zip_odd(vq a, vq b) {
#if MODMASK_LANES == 16
  return (vu)__builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#elif MODMASK_LANES == 8
  return (vu)__builtin_shufflevector(a, b, 1, 5, 3, 7);
#else
  return (vu)__builtin_shufflevector(a, b, 1, 3);
#endif
}

}  // namespace modmask::MODMASK_CAPABILITY
