// The k largest of many scores without sorting or copying them: three passes count digits of the
// scores' keys, which gives the k-th key exactly, and a last pass writes the masks.

namespace modmask::MODMASK_CAPABILITY {

constexpr int64_t kTopKUnit = 64;    // scores of one tensor that stay together, whole bytes of bits
constexpr int64_t kTopKBlock = 512;  // keys held at once
constexpr int64_t kTopKRanges = 1024;  // at most
constexpr int kDigitBits = 11;
constexpr int64_t kDigits = 1 << kDigitBits;

// Unsigned numbers in the order of the floats, or in the opposite one; -0 and 0 have the same.
MODMASK_INLINE vu key_of(vf score, vu turn) {
  const vu bits = (vu)(score + 0.0f);
  return (bits ^ ((vu)((vi)bits >> 31) | 0x80000000u)) ^ turn;
}

// The scores in units of kTopKUnit, cut into ranges for threads.
class TopKRanges {
 public:
  TopKRanges(const TopKProblem& p, int threads) : p_(p) {
    for (int64_t t = 0; t < p.tensors; ++t) {
      units_ += ceil_div(p.counts[t], kTopKUnit);
    }
    constexpr int64_t kLeast = 1024;  // units that are worth a table of digits
    count_ = ceil_div(units_, kLeast);
    count_ = count_ < 4 * threads ? count_ : 4 * threads;
    count_ = count_ < kTopKRanges ? count_ : kTopKRanges;
  }

  int64_t count() const {
    return count_;
  }

  int64_t units() const {
    return units_;
  }

  // f(tensor, first, n) for the parts of a range, in order.
  template <typename F>
  void for_parts_of(int64_t range, const F& f) const {
    int64_t unit = range * units_ / count_;
    const int64_t end = (range + 1) * units_ / count_;
    int64_t before = 0;  // units of the tensors passed
    for (int64_t t = 0; t < p_.tensors && unit < end; ++t) {
      const int64_t here = ceil_div(p_.counts[t], kTopKUnit);
      if (unit < before + here) {
        const int64_t last = end < before + here ? end : before + here;
        const int64_t first = (unit - before) * kTopKUnit;
        const int64_t stop = (last - before) * kTopKUnit;
        f(t, first, (stop < p_.counts[t] ? stop : p_.counts[t]) - first);
        unit = last;
      }
      before += here;
    }
  }

 private:
  const TopKProblem& p_;
  int64_t units_ = 0;
  int64_t count_ = 0;
};

// f(keys, tensor, first, n) for blocks of at most kTopKBlock scores of a range, in order.
template <typename T, typename F>
void for_keys(const TopKProblem& p, const TopKRanges& ranges, int64_t range, const F& f) {
  const vu turn = (p.largest ? 0u : ~0u) - vu{};
  ranges.for_parts_of(range, [&](int64_t tensor, int64_t first, int64_t n) {
    const T* scores = static_cast<const T*>(p.scores[tensor]) + first;
    uint32_t keys[kTopKBlock];
    for (int64_t i = 0; i < n; i += kTopKBlock) {
      const int64_t count = n - i < kTopKBlock ? n - i : kTopKBlock;
      for (int64_t j = 0; j < count; j += kLanes) {
        store(keys + j, key_of(load_part(scores + i + j, count - j), turn));
      }
      f(keys, tensor, first + i, count);
    }
  });
}

// Counts the digits of `bits` bits at `shift` of all keys that agree with `prefix` above them.
template <typename T>
void count_digits(
    const TopKProblem& p,
    const TopKRanges& ranges,
    int shift,
    int bits,
    uint32_t prefix,
    std::atomic<int64_t>* totals,
    const Runner& runner) {
  const double cost = static_cast<double>(ranges.units() * kTopKUnit);
  const uint32_t last = (1u << bits) - 1u;
  const uint32_t above = shift + bits < 32 ? ~0u << (shift + bits) : 0u;
  run_tasks(runner, ranges.count(), cost, [&](int64_t range) {
    // two tables, since equal digits in a row would wait for each other
    uint32_t digits[2][kDigits] = {};
    for_keys<T>(p, ranges, range, [&](const uint32_t* keys, int64_t, int64_t, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        if ((keys[i] & above) == prefix) {
          ++digits[i & 1][(keys[i] >> shift) & last];
        }
      }
    });
    for (int64_t d = 0; d < kDigits; ++d) {
      const int64_t count = static_cast<int64_t>(digits[0][d]) + digits[1][d];
      if (count > 0) {
        totals[d] += count;
      }
    }
  });
}

template <typename T>
bool any_nan(const TopKProblem& p, const TopKRanges& ranges, const Runner& runner) {
  std::atomic<bool> found{false};
  run_tasks(
      runner, ranges.count(), static_cast<double>(ranges.units() * kTopKUnit) / 4,
      [&](int64_t range) {
        ranges.for_parts_of(range, [&](int64_t tensor, int64_t first, int64_t n) {
          const T* scores = static_cast<const T*>(p.scores[tensor]) + first;
          vi nan{};
          for (int64_t i = 0; i < n; i += kLanes) {
            const vf v = load_part(scores + i, n - i);
            nan |= v != v;
          }
          for (int i = 0; i < kLanes; ++i) {
            if (nan[i] != 0) {
              found = true;
            }
          }
        });
      });
  return found;
}

// The k-th largest key, how many keys equal it, and how many of these are kept.
struct KthKey {
  uint32_t threshold;
  int64_t left;
  int64_t equal;
};

// Digit by digit from the top.
template <typename T>
KthKey select_key(const TopKProblem& p, const TopKRanges& ranges, const Runner& runner) {
  uint32_t threshold = 0;
  int64_t left = p.k;
  int64_t equal = 0;
  for (int shift = 32; p.k > 0 && shift > 0;) {
    const int bits = shift < kDigitBits ? shift : kDigitBits;
    shift -= bits;
    std::atomic<int64_t> totals[kDigits] = {};
    count_digits<T>(p, ranges, shift, bits, threshold, totals, runner);
    int64_t digit = (int64_t{1} << bits) - 1;
    for (; totals[digit] < left; --digit) {
      left -= totals[digit];
    }
    threshold |= static_cast<uint32_t>(digit) << shift;
    equal = totals[digit];
  }
  return {threshold, left, equal};
}

// Where the k largest of one tensor end. Returns false where a score is NaN.
inline bool top_k_cut(
    const float* scores, int64_t count, int64_t k, Cut* cut, const Runner& runner) {
  const void* tensors[] = {scores};
  const TopKProblem p{tensors, &count, 1, DType::kFloat32, k, true, false};
  const TopKRanges ranges(p, runner.threads);
  if (any_nan<float>(p, ranges, runner)) {
    return false;
  }
  if (k == 0) {
    *cut = {__builtin_inff(), 0};
    return true;
  }
  KthKey found = select_key<float>(p, ranges, runner);
  const uint32_t top = 0x80000000u;
  const uint32_t bits = (found.threshold & top) != 0 ? found.threshold ^ top : ~found.threshold;
  __builtin_memcpy(&cut->value, &bits, sizeof bits);
  cut->ties = count;
  if (found.left < found.equal) {
    for (cut->ties = 0; found.left > 0; ++cut->ties) {
      found.left -= scores[cut->ties] == cut->value;
    }
  }
  return true;
}

// Masks as bytes, or as bits. Returns false, with nothing written, where a score is NaN.
template <typename T>
bool top_k(const TopKProblem& p, uint8_t* const* masks, const Runner& runner) {
  const TopKRanges ranges(p, runner.threads);
  if (any_nan<T>(p, ranges, runner)) {
    return false;
  }
  const KthKey found = select_key<T>(p, ranges, runner);
  const uint32_t threshold = found.threshold;
  const int64_t left = found.left;
  // where only some of the equal keys are kept, they are the first ones
  int64_t equal_before[kTopKRanges] = {};
  const bool rationed = left < found.equal;
  if (rationed) {
    run_tasks(
        runner, ranges.count(), static_cast<double>(ranges.units() * kTopKUnit) / 4,
        [&](int64_t range) {
          int64_t count = 0;
          for_keys<T>(p, ranges, range, [&](const uint32_t* keys, int64_t, int64_t, int64_t n) {
            for (int64_t i = 0; i < n; ++i) {
              count += keys[i] == threshold;
            }
          });
          equal_before[range] = count;
        });
    int64_t sum = 0;
    for (int64_t r = 0; r < ranges.count(); ++r) {
      const int64_t count = equal_before[r];
      equal_before[r] = sum;
      sum += count;
    }
  }
  run_tasks(
      runner, ranges.count(), static_cast<double>(ranges.units() * kTopKUnit) / 4,
      [&](int64_t range) {
        int64_t rank = equal_before[range];
        for_keys<T>(
            p, ranges, range, [&](const uint32_t* keys, int64_t tensor, int64_t first, int64_t n) {
              uint8_t kept[kTopKBlock];
              if (p.k == 0) {
                std::fill(kept, kept + n, uint8_t{0});
              } else if (rationed) {
                for (int64_t i = 0; i < n; ++i) {
                  const bool equals = keys[i] == threshold;
                  kept[i] = keys[i] > threshold || (equals && rank < left);
                  rank += equals;
                }
              } else {
                for (int64_t i = 0; i < n; ++i) {
                  kept[i] = keys[i] >= threshold;
                }
              }
              if (!p.packed) {
                std::copy(kept, kept + n, masks[tensor] + first);
                return;
              }
              std::fill(kept + n, kept + (n + 7) / 8 * 8, uint8_t{0});
              for (int64_t i = 0; i < n; i += 8) {
                uint8_t bits = 0;
                for (int j = 0; j < 8; ++j) {
                  bits = static_cast<uint8_t>(bits | kept[i + j] << j);
                }
                masks[tensor][(first + i) / 8] = bits;
              }
            });
      });
  return true;
}

}  // namespace modmask::MODMASK_CAPABILITY
