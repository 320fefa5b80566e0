// One row segment of a masked weight, from noise words or from the threshold.

namespace modmask::MODMASK_CAPABILITY {

// Where a row of masks comes from; `words` is null in threshold mode.
struct RowNoise {
  const uint32_t* words;
  const float* exp_minus;  // exp(-logit)
  const float* logits;
};

// One vector of masks: a weight is kept where low < high.
template <bool kHard>
struct MaskVector {
  vf low;
  vf high;
  Surrogate soft;

  // v times the mask
  MODMASK_INLINE vf apply(const MaskVector& m, vf v) {
    return kHard ? where_less(m.low, m.high, v) : m.soft.value * v;
  }

  MODMASK_INLINE vf values(const MaskVector& m) {
    return kHard ? where_less(m.low, m.high, splat(1.0f)) : m.soft.value;
  }
};

template <bool kHard, bool kSlope, bool kUnitTau, typename F>
MODMASK_INLINE void for_mask_vectors_as(const RowNoise& row, int64_t n, float tau, const F& f) {
  const vf two24 = splat(kTwo24);
  const float inverse_tau = 1.0f / tau;
  if (row.words == nullptr) {  // logit > 0, with the surrogate of u = 1/2
    const vf half = splat(kTwo24 / 2);
    for (int64_t i = 0; i < n; i += kLanes) {
      MaskVector<kHard> m{vf{}, load_part(row.logits + i, n - i), {}};
      if constexpr (kSlope || !kHard) {
        if constexpr (kUnitTau) {
          m.soft = surrogate(half * load(row.exp_minus + i), half);
        } else {
          m.soft = surrogate(m.high, half, half, inverse_tau);
        }
      }
      f(i, m);
    }
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf u = noise_value(load(row.words + i));
    MaskVector<kHard> m{u * load(row.exp_minus + i), two24 - u, {}};
    if constexpr (kSlope || !kHard) {
      if constexpr (kUnitTau) {
        m.soft = surrogate(m.low, m.high);
      } else {
        m.soft = surrogate(load_part(row.logits + i, n - i), u, m.high, inverse_tau);
      }
    }
    f(i, m);
  }
}

// f(i, masks) for every vector of the row; kSlope = false leaves the slope uncomputed.
template <bool kHard, bool kSlope, typename F>
MODMASK_INLINE void for_mask_vectors(const RowNoise& row, int64_t n, float tau, const F& f) {
  if (tau == 1.0f || (kHard && !kSlope)) {
    for_mask_vectors_as<kHard, kSlope, true>(row, n, tau, f);
  } else {
    for_mask_vectors_as<kHard, kSlope, false>(row, n, tau, f);
  }
}

// The masks of one set and sample of one parameter.
class RowMasks {
 public:
  RowMasks(const MaskSpec& spec, int64_t set, int64_t sample, int64_t tensor_id)
      : threshold_(spec.seeds == nullptr),
        stream_(
            threshold_ ? 0 : static_cast<uint64_t>(spec.seeds[set * spec.seed_stride]),
            static_cast<uint32_t>(spec.sample_offset + sample),
            static_cast<uint32_t>(tensor_id)) {}

  // `words` must hold words_needed(n).
  RowNoise row(
      int64_t element,
      int64_t n,
      const float* exp_minus,
      const float* logits,
      uint32_t* words) const {
    const uint32_t* drawn =
        threshold_ ? nullptr : stream_.row(static_cast<uint64_t>(element), n, words);
    return {drawn, exp_minus, logits};
  }

 private:
  bool threshold_;
  NoiseStream stream_;
};

// exp(-logit) of a row, padded to whole vectors.
inline void exp_minus_row(const float* logits, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store(out + i, exp_minus(load_part(logits + i, n - i)));
  }
}

}  // namespace modmask::MODMASK_CAPABILITY
