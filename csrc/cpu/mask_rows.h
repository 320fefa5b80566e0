// One row segment of a masked weight, from noise words or from the threshold.

namespace modmask::MODMASK_CAPABILITY {

// Where a row of masks comes from; `words` is null in threshold mode.
struct RowNoise {
  const uint32_t* words;
  const float* exp_minus; // exp(-logit)
  const float* logits;
};

// f(i, value, slope) for every vector of the row: value is the mask (0/1 or soft), slope its
// surrogate derivative. kSlope = false leaves the slope uncomputed.
template <bool kHard, bool kSlope, typename F>
MODMASK_INLINE void for_mask_vectors(const RowNoise& row, int64_t n, float tau, const F& f) {
  const vf two24 = splat(kTwo24);
  const vf one = splat(1.0f);
  const float inverse_tau = 1.0f / tau;
  if (row.words == nullptr) {
    const vf half = splat(kTwo24 / 2);
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf logit = load_part(row.logits + i, n - i);
      Surrogate s{};
      if constexpr (kSlope || !kHard) {
        const vf ue = half * load(row.exp_minus + i);
        s = tau == 1.0f ? surrogate<true>(ue, half, 1.0f)
                        : surrogate<false>(ue, half, inverse_tau);
      }
      f(i, kHard ? where_less(vf{}, logit, one) : s.value, s.slope);
    }
    return;
  }
  const bool unit = tau == 1.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf u = noise_value(load(row.words + i));
    const vf ue = u * load(row.exp_minus + i);
    const vf rest = two24 - u;
    Surrogate s{};
    if constexpr (kSlope || !kHard) {
      s = unit ? surrogate<true>(ue, rest, 1.0f) : surrogate<false>(ue, rest, inverse_tau);
    }
    f(i, kHard ? where_less(ue, rest, one) : s.value, s.slope);
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

  // `words` must hold padded(n + 3) words and kLanes more.
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

constexpr int64_t words_needed(int64_t n) {
  return padded(n + 3) + kNoiseStep;
}

// exp(-logit) of a row, padded to whole vectors.
inline void exp_minus_row(const float* logits, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store(out + i, exp_minus(load_part(logits + i, n - i)));
  }
}

} // namespace modmask::MODMASK_CAPABILITY
