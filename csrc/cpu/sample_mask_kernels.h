// Masks as values or packed bits, and the gradient of the values.

namespace modmask::MODMASK_CAPABILITY {

constexpr int64_t kSampleBlock = 4096;

// f(set, sample, first, n, noise) for every sample of every block of at most kSampleBlock logits;
// the samples of one block in order, on one thread.
template <typename F>
void for_sample_blocks(
    const MaskSpec& spec, const float* logits, int64_t count, const Runner& runner, const F& f) {
  const int64_t blocks = ceil_div(count, kSampleBlock);
  const double cost = 8.0 * static_cast<double>(spec.sets * spec.samples * count) / kLanes;
  run_tasks(runner, spec.sets * blocks, cost, [&](int64_t t) {
    const int64_t set = t / blocks, first = t % blocks * kSampleBlock;
    const int64_t n = count - first < kSampleBlock ? count - first : kSampleBlock;
    thread_local Scratch scratch;
    const auto lease =
        scratch.reserve(Scratch::need(kSampleBlock) + Scratch::need(words_needed(kSampleBlock)));
    float* exps = scratch.floats(kSampleBlock);
    uint32_t* words = scratch.words(words_needed(kSampleBlock));
    const float* from = logits + (spec.shared ? 0 : set * count) + first;
    exp_minus_row(from, n, exps);
    for (int64_t k = 0; k < spec.samples; ++k) {
      const RowMasks masks(spec, set, k, spec.tensor_id);
      f(set, k, first, n, masks.row(spec.element_offset + first, n, exps, from, words));
    }
  });
}

// f(set, sample, first, n, masks) likewise where n of every m logits are kept; blocks hold whole
// groups of m and whole bytes.
template <bool kSlope, typename F>
void for_n_of_m_blocks(
    const MaskSpec& spec, const float* logits, int64_t count, const Runner& runner, const F& f) {
  const int64_t unit = 8 * spec.layout.among * spec.layout.stride;
  const int64_t block = unit < kSampleBlock ? kSampleBlock / unit * unit : unit;
  const int64_t blocks = ceil_div(count, block);
  const double cost = 16.0 * static_cast<double>(spec.sets * spec.samples * count) / kLanes;
  run_tasks(runner, spec.sets * blocks, cost, [&](int64_t t) {
    const int64_t set = t / blocks, first = t % blocks * block;
    const int64_t n = count - first < block ? count - first : block;
    for (int64_t k = 0; k < spec.samples; ++k) {
      const RowMasks masks(spec, set, k, spec.tensor_id);
      GranularRows<true, kSlope> drawn(
          spec, masks, logits + (spec.shared ? 0 : set * count), count, first, n);
      drawn.draw(0);  // groups do not cross rows, so all of them are one
      f(set, k, first, n, drawn);
    }
  });
}

template <bool kHard>
void sample_values(
    const MaskSpec& spec, const float* logits, int64_t count, float* values, const Runner& runner) {
  if (is_granular(spec.layout)) {
    for_n_of_m_blocks<false>(
        spec, logits, count, runner,
        [&](int64_t set, int64_t k, int64_t first, int64_t n, const auto& drawn) {
          std::copy(drawn.values, drawn.values + n, values + (k * spec.sets + set) * count + first);
        });
    return;
  }
  for_sample_blocks(
      spec, logits, count, runner,
      [&](int64_t set, int64_t k, int64_t first, int64_t n, const RowNoise& noise) {
        float* to = values + (k * spec.sets + set) * count + first;
        for_mask_vectors<kHard, false>(noise, n, spec.tau, [=](int64_t i, auto& m) {
          store_part(to + i, m.values(m), n - i);
        });
      });
}

inline void sample_bits(
    const MaskSpec& spec, const float* logits, int64_t count, uint8_t* bits, const Runner& runner) {
  constexpr int64_t kStep = kLanes > 8 ? kLanes : 8;
  const int64_t bytes = ceil_div(count, 8);
  if (is_granular(spec.layout)) {
    for_n_of_m_blocks<false>(
        spec, logits, count, runner,
        [&](int64_t set, int64_t k, int64_t first, int64_t n, const auto& drawn) {
          uint8_t* to = bits + (k * spec.sets + set) * bytes + first / 8;
          std::fill(to, to + ceil_div(n, 8), static_cast<uint8_t>(0));
          for (int64_t i = 0; i < n; ++i) {
            to[i / 8] |= static_cast<uint8_t>((drawn.values[i] != 0.0f) << i % 8);
          }
        });
    return;
  }
  for_sample_blocks(
      spec, logits, count, runner,
      [&](int64_t set, int64_t k, int64_t first, int64_t n, const RowNoise& noise) {
        uint8_t* to = bits + (k * spec.sets + set) * bytes + first / 8;
        uint32_t kept = 0;
        for_mask_vectors<true, false>(noise, n, spec.tau, [&](int64_t i, auto& m) {
          const int64_t at = i % kStep, first_of = i - at, left = n - first_of;
          kept |= bits_less(m.low, m.high) << at;
          if (at + kLanes < kStep && at + kLanes < left) {
            return;
          }
          if (left < kStep) {
            kept &= (1u << left) - 1u;
          }
          for (int64_t j = 0; j < kStep && j < left; j += 8) {
            to[(first_of + j) / 8] = static_cast<uint8_t>(kept >> j);
          }
          kept = 0;
        });
      });
}

inline void sample_backward(
    const MaskSpec& spec,
    const float* logits,
    const float* dvalues,
    int64_t count,
    float* dlogits,
    const Runner& runner) {
  if (is_granular(spec.layout)) {
    for_n_of_m_blocks<true>(
        spec, logits, count, runner,
        [&](int64_t set, int64_t k, int64_t first, int64_t n, const auto& drawn) {
          float* to = dlogits + set * count + first;
          const float* d = dvalues + (k * spec.sets + set) * count + first;
          for (int64_t i = 0; i < n; ++i) {
            to[i] = (k == 0 ? 0.0f : to[i]) + drawn.slopes[i] * d[i];
          }
        });
    return;
  }
  for_sample_blocks(
      spec, logits, count, runner,
      [&](int64_t set, int64_t k, int64_t first, int64_t n, const RowNoise& noise) {
        float* to = dlogits + set * count + first;
        const float* d = dvalues + (k * spec.sets + set) * count + first;
        for_mask_vectors<true, true>(noise, n, spec.tau, [=](int64_t i, auto& m) {
          const vf g = m.soft.slope * load_part(d + i, n - i);
          store_part(to + i, k == 0 ? g : g + load_part(to + i, n - i), n - i);
        });
      });
}

}  // namespace modmask::MODMASK_CAPABILITY
