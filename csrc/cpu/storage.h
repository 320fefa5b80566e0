// Element types, rows as float32, per-thread scratch and the distribution of tasks.

namespace modmask::MODMASK_CAPABILITY {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

using vh = uint16_t __attribute__((vector_size(kLanes * 2)));

inline float widen(float x) {
  return x;
}

inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  uint32_t bits;
  if (magnitude >= 0x7C00u) {  // infinity, NaN
    bits = 0x7F800000u | (magnitude & 0x3FFu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {  // zero, subnormal: a multiple of 2^-24
    const float f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &f, sizeof bits);
  }
  bits |= sign;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

inline void narrow(float f, float& out) {
  out = f;
}

// Round to nearest, ties to even.
inline void narrow(float f, BFloat16& out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    out.bits = 0x7FC0;
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline void narrow(float f, Float16& out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    out.bits = sign | 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // rounds to 65536 or more
    out.bits = sign | 0x7C00u;
  } else if (magnitude >= 0x38800000u) {
    const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
    out.bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  } else {  // subnormal: adding 1/2 rounds to a multiple of 2^-24
    float g;
    __builtin_memcpy(&g, &magnitude, sizeof g);
    g += 0.5f;
    uint32_t rounded;
    __builtin_memcpy(&rounded, &g, sizeof rounded);
    out.bits = static_cast<uint16_t>(sign | (rounded - 0x3F000000u));
  }
}

MODMASK_INLINE vf load_wide(const float* p) {
  return load(p);
}

MODMASK_INLINE vf load_wide(const BFloat16* p) {
  vh half;
  __builtin_memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

MODMASK_INLINE vf load_wide(const Float16* p) {
#if defined(MODMASK_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(MODMASK_AVX2)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = widen(p[i]);
  }
  return v;
#endif
}

// The first `count` of a vector, the rest 0.
template <typename T>
__attribute__((noinline, cold)) void load_tail(const T* p, int64_t count, float* out) {
  for (int64_t i = 0; i < kLanes; ++i) {
    out[i] = i < count ? widen(p[i]) : 0.0f;
  }
}

__attribute__((noinline, cold)) inline void store_tail(float* p, const float* v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    p[i] = v[i];
  }
}

template <typename T>
MODMASK_INLINE vf load_part(const T* p, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) {
    return load_wide(p);
  }
  float part[kLanes];
  load_tail(p, count, part);
  return load(part);
}

MODMASK_INLINE void store_part(float* p, vf v, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) {
    store(p, v);
  } else {
    float part[kLanes];
    store(part, v);
    store_tail(p, part, count);
  }
}

template <typename T>
inline void narrow_row(const float* from, T* to, int64_t n) {
  if constexpr (__is_same(T, float)) {
    for (int64_t i = 0; i < n; i += kLanes) {
      store_part(to + i, load_part(from + i, n - i), n - i);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      narrow(from[i], to[i]);
    }
  }
}

template <typename T>
inline void widen_row(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store_part(to + i, load_part(from + i, n - i), n - i);
  }
}

// to[c * to_step + r] = from[r * from_step + c] as float32, for r < rows and c < columns.
template <typename T>
void transpose(
    const T* from, int64_t from_step, int64_t rows, int64_t columns, float* to, int64_t to_step) {
  using vf4 = float __attribute__((vector_size(16)));
  constexpr int64_t kBlock = 64, kAhead = 16;
  const int64_t whole_rows = rows / 4 * 4;
  for (int64_t c0 = 0; c0 < columns; c0 += kBlock) {
    const int64_t count = columns - c0 < kBlock ? columns - c0 : kBlock;
    for (int64_t r = 0; r < whole_rows; r += 4) {
      const T* block = from + r * from_step + c0;
      // rows lie on different pages, where the hardware does not look ahead
      for (int64_t i = 0; i < 4 && r + kAhead + i < rows; ++i) {
        for (int64_t c = 0; c < count; c += 64 / static_cast<int64_t>(sizeof(T))) {
          __builtin_prefetch(block + (kAhead + i) * from_step + c);
        }
      }
      float* out = to + c0 * to_step + r;
      float wide[4 * kBlock];
      const float* read;
      int64_t step;
      if constexpr (__is_same(T, float)) {
        read = block;
        step = from_step;
      } else {
        for (int64_t i = 0; i < 4; ++i) {
          widen_row(block + i * from_step, wide + i * kBlock, count);
        }
        read = wide;
        step = kBlock;
      }
      int64_t c = 0;
      for (; c + 4 <= count; c += 4) {
        vf4 row[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __builtin_memcpy(&row[i], read + i * step + c, sizeof row[i]);
        }
        const vf4 a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
        const vf4 b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
        const vf4 d = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
        const vf4 e = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
        const vf4 column[4] = {
            __builtin_shufflevector(a, b, 0, 1, 4, 5),
            __builtin_shufflevector(a, b, 2, 3, 6, 7),
            __builtin_shufflevector(d, e, 0, 1, 4, 5),
            __builtin_shufflevector(d, e, 2, 3, 6, 7),
        };
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __builtin_memcpy(out + (c + i) * to_step, &column[i], sizeof column[i]);
        }
      }
      for (int64_t rest = count % 4; rest > 0; --rest, ++c) {
        for (int64_t i = 0; i < 4; ++i) {
          out[c * to_step + i] = read[i * step + c];
        }
      }
    }
    for (int64_t r = whole_rows; r < rows; ++r) {
      for (int64_t c = c0; c < c0 + count; ++c) {
        to[c * to_step + r] = widen(from[r * from_step + c]);
      }
    }
  }
}

// AddressSanitizer sees an overrun from one part of a scratch into the next.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#define MODMASK_RED_ZONE 64
#define MODMASK_POISON(p, bytes) __asan_poison_memory_region((p), (bytes))
#define MODMASK_UNPOISON(p, bytes) __asan_unpoison_memory_region((p), (bytes))
#else
#define MODMASK_RED_ZONE 0
#define MODMASK_POISON(p, bytes)
#define MODMASK_UNPOISON(p, bytes)
#endif

// Scratch of one thread, kept between calls so that small layers do not pay for page faults. What
// is larger than kKeptBytes goes back when the lease on it ends, or when the thread has no more
// tasks of the same call, which would take it again.
class Scratch {
 public:
  // A thread is at work on tasks.
  class Tasks {
   public:
    Tasks() {
      at_work_ = true;
    }
    Tasks(const Tasks&) = delete;
    Tasks& operator=(const Tasks&) = delete;
    ~Tasks() {
      at_work_ = false;
      for (; large_ != nullptr; large_ = large_->next_large_) {
        large_->allocate(0);
      }
    }
  };

  class Lease {
   public:
    explicit Lease(Scratch& scratch) : scratch_(scratch) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() {
      if (scratch_.capacity_ <= kKeptBytes) {
        return;
      }
      if (!at_work_) {
        scratch_.allocate(0);
      } else if (!scratch_.listed()) {
        scratch_.next_large_ = large_;
        large_ = &scratch_;
      }
    }

   private:
    Scratch& scratch_;
  };

  ~Scratch() {
    std::free(data_);
  }

  [[nodiscard]] Lease reserve(size_t bytes) {
    used_ = 0;
    if (bytes > capacity_) {
      allocate((bytes + 4095) / 4096 * 4096);
    }
    MODMASK_POISON(data_, capacity_);
    return Lease(*this);
  }

  // 64-byte aligned; `reserve` must have asked for the sum of `need(count)`.
  float* floats(int64_t count) {
    float* p = reinterpret_cast<float*>(data_ + used_);
    used_ += need(count);
    MODMASK_UNPOISON(p, static_cast<size_t>(count) * sizeof *p);
    return p;
  }

  uint32_t* words(int64_t count) {
    return reinterpret_cast<uint32_t*>(floats(count));
  }

  // takes the room of twice as many floats
  int64_t* integers(int64_t count) {
    return reinterpret_cast<int64_t*>(floats(2 * count));
  }

  static size_t need(int64_t count) {
    return (static_cast<size_t>(count) * 4 + kRedZone + 63) / 64 * 64;
  }

 private:
  static constexpr size_t kKeptBytes = size_t{4} << 20;
  static constexpr size_t kRedZone = MODMASK_RED_ZONE;

  bool listed() const {
    for (const Scratch* s = large_; s != nullptr; s = s->next_large_) {
      if (s == this) {
        return true;
      }
    }
    return false;
  }

  void allocate(size_t bytes) {
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    if (bytes > 0) {
      data_ = static_cast<char*>(std::aligned_alloc(4096, bytes));
      if (data_ == nullptr) {
        throw std::bad_alloc();
      }
      capacity_ = bytes;
    }
  }

  static inline thread_local bool at_work_ = false;
  static inline thread_local Scratch* large_ = nullptr;  // to be freed when the tasks are done

  char* data_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
  Scratch* next_large_ = nullptr;
};

// Runs `task(i)` for every i in [0, count), handed out one by one to as many threads as `cost`
// (elementary vector operations in all) is worth. What a task computes does not depend on the
// thread, so the result does not either.
template <typename Task>
void run_tasks(const Runner& runner, int64_t count, double cost, const Task& task) {
  constexpr double kWorthAThread = 2e4;  // about 5 us
  int64_t threads = runner.threads;
  threads = threads < count ? threads : count;
  const int64_t worth = static_cast<int64_t>(cost / kWorthAThread) + 1;
  threads = threads < worth ? threads : worth;
  if (threads <= 1) {
    const Scratch::Tasks at_work;
    for (int64_t i = 0; i < count; ++i) {
      task(i);
    }
    return;
  }
  struct Shared {
    const Task& task;
    int64_t count;
    std::atomic<int64_t> next;
  } shared{task, count, {0}};
  runner.run(
      static_cast<int>(threads),
      [](void* context) {
        Shared& s = *static_cast<Shared*>(context);
        const Scratch::Tasks at_work;
        for (int64_t i = s.next++; i < s.count; i = s.next++) {
          s.task(i);
        }
      },
      &shared);
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace modmask::MODMASK_CAPABILITY
