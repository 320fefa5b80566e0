// Masks as values or packed bits, and the gradient of the values.

namespace modmask::MODMASK_CAPABILITY {

constexpr int64_t kSampleBlock = 4096;

template <typename Task>
void for_sample_blocks(const MaskSpec& spec, int64_t count, const Runner& runner, const Task& f) {
  const int64_t blocks = ceil_div(count, kSampleBlock);
  const double cost = 8.0 * static_cast<double>(spec.sets * spec.samples * count) / kLanes;
  run_tasks(runner, spec.sets * blocks, cost, [&](int64_t t) {
    const int64_t set = t / blocks, begin = t % blocks * kSampleBlock;
    const int64_t n = count - begin < kSampleBlock ? count - begin : kSampleBlock;
    thread_local Scratch scratch;
    scratch.reserve(Scratch::need(kSampleBlock) + Scratch::need(words_needed(kSampleBlock)));
    f(set, begin, n, scratch);
  });
}

template <bool kHard>
void sample_values(
    const MaskSpec& spec, const float* logits, int64_t count, float* values, const Runner& runner) {
  for_sample_blocks(
      spec, count, runner, [&](int64_t set, int64_t begin, int64_t n, Scratch& scratch) {
        float* exps = scratch.floats(kSampleBlock);
        uint32_t* words = scratch.words(words_needed(kSampleBlock));
        const float* from = logits + set * count + begin;
        exp_minus_row(from, n, exps);
        for (int64_t k = 0; k < spec.samples; ++k) {
          const RowNoise noise = RowMasks(spec, set, k, spec.tensor_id)
                                     .row(spec.element_offset + begin, n, exps, from, words);
          float* to = values + (k * spec.sets + set) * count + begin;
          for_mask_vectors<kHard, false>(noise, n, spec.tau, [&](int64_t i, auto& m) {
            store_part(to + i, m.values(m), n - i);
          });
        }
      });
}

inline void sample_bits(
    const MaskSpec& spec, const float* logits, int64_t count, uint8_t* bits, const Runner& runner) {
  const int64_t bytes = ceil_div(count, 8);
  for_sample_blocks(
      spec, count, runner, [&](int64_t set, int64_t begin, int64_t n, Scratch& scratch) {
        float* exps = scratch.floats(kSampleBlock);
        uint32_t* words = scratch.words(words_needed(kSampleBlock));
        const float* from = logits + set * count + begin;
        exp_minus_row(from, n, exps);
        const vf two24 = splat(kTwo24);
        for (int64_t k = 0; k < spec.samples; ++k) {
          const RowNoise noise = RowMasks(spec, set, k, spec.tensor_id)
                                     .row(spec.element_offset + begin, n, exps, from, words);
          uint8_t* to = bits + (k * spec.sets + set) * bytes + begin / 8;
          for (int64_t i = 0; i < n; i += 8) {
            uint32_t byte = 0;
            if constexpr (kLanes >= 8) {
              // a vector of 16 lanes makes two bytes
              if (i % kLanes != 0) {
                continue;
              }
            }
            for (int64_t j = 0; j < (kLanes >= 8 ? kLanes : 8); j += kLanes) {
              const vf u = noise_value(load(noise.words + i + j));
              byte |= bits_less(u * load(exps + i + j), two24 - u) << j;
            }
            const int64_t left = n - i;
            for (int64_t j = 0; j < (kLanes > 8 ? kLanes / 8 : 1) && j * 8 < left; ++j) {
              const int64_t valid = left - j * 8;
              const uint32_t part = byte >> (8 * j) & 0xFFu;
              to[i / 8 + j] = static_cast<uint8_t>(valid >= 8 ? part : part & ((1u << valid) - 1u));
            }
          }
        }
      });
}

inline void sample_backward(
    const MaskSpec& spec,
    const float* logits,
    const float* dvalues,
    int64_t count,
    float* dlogits,
    const Runner& runner) {
  for_sample_blocks(
      spec, count, runner, [&](int64_t set, int64_t begin, int64_t n, Scratch& scratch) {
        float* exps = scratch.floats(kSampleBlock);
        uint32_t* words = scratch.words(words_needed(kSampleBlock));
        const float* from = logits + set * count + begin;
        exp_minus_row(from, n, exps);
        float* to = dlogits + set * count + begin;
        for (int64_t k = 0; k < spec.samples; ++k) {
          const RowNoise noise = RowMasks(spec, set, k, spec.tensor_id)
                                     .row(spec.element_offset + begin, n, exps, from, words);
          const float* d = dvalues + (k * spec.sets + set) * count + begin;
          for_mask_vectors<true, true>(noise, n, spec.tau, [&](int64_t i, auto& m) {
            const vf g = m.soft.slope * load_part(d + i, n - i);
            store_part(to + i, k == 0 ? g : g + load_part(to + i, n - i), n - i);
          });
        }
      });
}

}  // namespace modmask::MODMASK_CAPABILITY
