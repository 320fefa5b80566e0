// One row segment of a masked weight, from noise words or from the threshold.

namespace modmask::MODMASK_CAPABILITY {

// Where a row of masks comes from; `words` is null where there is no noise.
struct RowNoise {
  const uint32_t* words;
  const float* exp_minus;  // exp(-logit)
  const float* logits;
  const MaskSpec* special = nullptr;  // of estimators other than the (Gumbel-)sigmoid
  Cut cut{};                          // their cut, ties counted from the row's start
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

template <bool kHard, bool kSlope, bool kUnitTau, bool kSilent, typename F>
MODMASK_INLINE void for_mask_vectors_as(const RowNoise& row, int64_t n, float tau, const F& f) {
  constexpr bool kSoft = kSlope || !kHard;
  const vf two24 = splat(kTwo24);
  const float inverse_tau = 1.0f / tau;
  for_chains<kSoft && kUnitTau ? kChains : 1>(n, [&](int64_t i, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    vf u[kVectors], ue[kVectors], rest[kVectors];
    Surrogate soft[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = i + j * kLanes;
      u[j] = kSilent ? splat(kTwo24 / 2) : noise_value(load(row.words + at));
      ue[j] = kSilent && !kSoft ? vf{} : u[j] * load(row.exp_minus + at);
      rest[j] = two24 - u[j];
    }
    if constexpr (kSoft && kUnitTau) {
      surrogate(ue, rest, soft);
    } else if constexpr (kSoft) {
      soft[0] = surrogate(load_part(row.logits + i, n - i), u[0], rest[0], inverse_tau);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = i + j * kLanes;
      MaskVector<kHard> m{ue[j], rest[j], soft[j]};
      if constexpr (kSilent) {  // logit > 0, with the surrogate of u = 1/2
        m.low = vf{};
        m.high = load_part(row.logits + at, n - at);
      }
      f(at, m);
    }
  });
}

constexpr int64_t kMaskBlock = 128;

struct MaskBlock {
  float low[kMaskBlock];
  float high[kMaskBlock];
  float value[kMaskBlock];
  float slope[kMaskBlock];
};

// Masks from a cut through the logits; the gradient passes as if they were the logits.
inline void cut_masks(const RowNoise& row, int64_t first, int64_t n, MaskBlock& to) {
  vi lane;
  for (int j = 0; j < kLanes; ++j) {
    lane[j] = j;
  }
  const vf cut = splat(row.cut.value);
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf logit = load_part(row.logits + first + i, n - i);
    const int64_t ties = row.cut.ties - first - i;
    const int32_t before = static_cast<int32_t>(ties < 0 ? 0 : ties < kLanes ? ties : kLanes);
    const vi kept = (logit > cut) | ((logit == cut) & (lane < before));
    const vf value = (vf)(kept & (vi)splat(1.0f));
    store(to.low + i, vf{});
    store(to.high + i, value);
    store(to.value + i, value);
    store(to.slope + i, splat(1.0f));
  }
}

// Hard concrete: the soft mask stretched to (low, high) and cut off at 0 and 1. A hard mask is
// kept where the soft mask is above 1/2 before it is stretched.
inline void stretched_masks(
    const RowNoise& row, int64_t first, int64_t n, float tau, MaskBlock& to) {
  const MaskSpec& spec = *row.special;
  const vf two24 = splat(kTwo24), one = splat(1.0f), width = splat(spec.high - spec.low);
  const float inverse_tau = 1.0f / tau;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf logit = load_part(row.logits + first + i, n - i);
    vf u = splat(kTwo24 / 2), low{}, high = logit;
    if (row.words != nullptr) {
      u = noise_value(load(row.words + first + i));
      u = maximum(minimum(u, splat(spec.most_u * kTwo24)), splat(spec.least_u * kTwo24));
      low = u * load(row.exp_minus + first + i);
      high = two24 - u;
    }
    const Surrogate soft = surrogate(logit, u, two24 - u, inverse_tau);
    const vf stretched = fma(soft.value, width, splat(spec.low));
    const vi inside = (stretched >= vf{}) & (stretched <= one);
    store(to.low + i, low);
    store(to.high + i, high);
    store(to.value + i, maximum(minimum(stretched, one), vf{}));
    store(to.slope + i, (vf)(inside & (vi)(soft.slope * width)));
  }
}

// Not inlined: beside it the loops of the fast path would get fewer registers. Callers there
// capture by copy, so that this call leaves their variables in registers too.
template <bool kHard, typename F>
__attribute__((noinline)) void for_special_masks(const RowNoise& row, int64_t n, float tau, F f) {
  MaskBlock block;
  for (int64_t first = 0; first < n; first += kMaskBlock) {
    const int64_t count = n - first < kMaskBlock ? n - first : kMaskBlock;
    if (row.special->estimator == Estimator::kHardConcrete) {
      stretched_masks(row, first, count, tau, block);
    } else {
      cut_masks(row, first, count, block);
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      MaskVector<kHard> m{
          load(block.low + i),
          load(block.high + i),
          {load(block.value + i), load(block.slope + i)}};
      f(first + i, m);
    }
  }
}

// f(i, masks) for every vector of the row; kSlope = false leaves the slope uncomputed.
template <bool kHard, bool kSlope, typename F>
MODMASK_INLINE void for_mask_vectors(const RowNoise& row, int64_t n, float tau, const F& f) {
  const bool silent = row.words == nullptr, unit_tau = tau == 1.0f || (kHard && !kSlope);
  if (row.special != nullptr) {
    for_special_masks<kHard>(row, n, tau, f);
  } else if (silent && unit_tau) {
    for_mask_vectors_as<kHard, kSlope, true, true>(row, n, tau, f);
  } else if (silent) {
    for_mask_vectors_as<kHard, kSlope, false, true>(row, n, tau, f);
  } else if (unit_tau) {
    for_mask_vectors_as<kHard, kSlope, true, false>(row, n, tau, f);
  } else {
    for_mask_vectors_as<kHard, kSlope, false, false>(row, n, tau, f);
  }
}

// 1 - u of a word is u of its complement.
inline __attribute__((cold, noinline)) void flip(uint32_t* words, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store(words + i, ~load(words + i));
  }
}

// The masks of one set and sample of one parameter.
class RowMasks {
 public:
  RowMasks(const MaskSpec& spec, int64_t set, int64_t sample, int64_t tensor_id)
      : silent_(
            spec.seeds == nullptr || (spec.estimator != Estimator::kGumbelSigmoid &&
                                      spec.estimator != Estimator::kHardConcrete)),
        draw_(spec.draws > 1 ? sample * spec.draws / spec.samples : 0),
        sample_(spec.sample_offset + sample - draw_ * (spec.samples / spec.draws)),
        flipped_(!silent_ && spec.antithetic && (sample_ & 1) != 0),
        stream_(
            silent_ ? 0 : static_cast<uint64_t>(spec.seeds[set * spec.seed_stride + draw_]),
            static_cast<uint32_t>(sample_ >> (spec.antithetic ? 1 : 0)),
            static_cast<uint32_t>(tensor_id)) {
    switch (spec.estimator) {
      case Estimator::kGumbelSigmoid:
      case Estimator::kSigmoid:
        return;
      case Estimator::kHardConcrete:
        break;
      case Estimator::kThreshold:
        cut_ = {spec.low, spec.high != 0.0f ? INT64_MAX : 0};
        break;
      case Estimator::kTopK:
        for (int64_t i = 0; i < spec.cut_count; ++i) {
          if (spec.cuts[i].tensor_id == tensor_id) {
            cut_ = spec.cuts[i].of_set[set];
          }
        }
        break;
    }
    special_ = &spec;
  }

  // `words` must hold words_needed(n).
  RowNoise row(
      int64_t element,
      int64_t n,
      const float* exp_minus,
      const float* logits,
      uint32_t* words) const {
    const uint32_t* drawn =
        silent_ ? nullptr : stream_.row(static_cast<uint64_t>(element), n, words);
    if (flipped_) {
      flip(words, words_needed(n));
    }
    return {drawn, exp_minus, logits, special_, {cut_.value, cut_.ties - element}};
  }

 private:
  bool silent_;
  int64_t draw_;
  int64_t sample_;
  bool flipped_;
  const MaskSpec* special_ = nullptr;
  Cut cut_{};
  NoiseStream stream_;
};

// exp(-logit) of a row, padded to whole vectors.
inline void exp_minus_row(const float* logits, int64_t n, float* out) {
  for_chains(n, [&](int64_t i, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    vf v[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      // a group of vectors is whole; asking of each whether it is keeps their chains apart
      const float* from = logits + i + j * kLanes;
      v[j] = kVectors > 1 ? load(from) : load_part(from, n - i);
    }
    exp_minus(v);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      store(out + i + j * kLanes, v[j]);
    }
  });
}

}  // namespace modmask::MODMASK_CAPABILITY
