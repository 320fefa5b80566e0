// Runs every table over awkward shapes under the address and undefined-behaviour sanitizers. Every
// buffer ends where its allocation ends, starts off alignment behind a guard element, and every
// element of a result must have been written. Results must not depend on the number of threads,
// nor hard masks on the table.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "bridge.h"

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (!ok) {
    std::printf("FAILED: %s\n", what.c_str());
    ++failures;
  }
}

constexpr unsigned char kGuard = 0xA5;

// `count` elements of `size` bytes behind one guard element.
class Buffer {
 public:
  Buffer(int64_t count, size_t size, unsigned char fill = 0xFF)
      : bytes_(static_cast<size_t>(count) * size),
        size_(size),
        data_(static_cast<unsigned char*>(std::malloc(bytes_ + size))) {
    std::memset(data_, kGuard, size_);
    std::memset(data_ + size_, fill, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    std::free(data_);
  }

  void* data() {
    return data_ + size_;
  }
  float* floats() {
    return static_cast<float*>(data());
  }

  bool guarded() const {
    for (size_t i = 0; i < size_; ++i) {
      if (data_[i] != kGuard) {
        return false;
      }
    }
    return true;
  }

  // No element holds the bits that it was filled with, which are NaN in every dtype.
  bool written() const {
    for (size_t at = size_; at < size_ + bytes_; at += size_) {
      bool untouched = true;
      for (size_t i = 0; i < size_; ++i) {
        untouched = untouched && data_[at + i] == 0xFF;
      }
      if (untouched) {
        return false;
      }
    }
    return true;
  }

  std::string bits() const {
    return std::string(reinterpret_cast<const char*>(data_) + size_, bytes_);
  }

 private:
  size_t bytes_;
  size_t size_;
  unsigned char* data_;
};

uint32_t state = 12345;

float random_value() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 16777216.0f * 4.0f - 2.0f;
}

size_t size_of(int64_t dtype) {
  return dtype == 0 ? 4 : 2;
}

void fill(Buffer& b, int64_t count, int64_t dtype) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = random_value();
    if (dtype == 0) {
      b.floats()[i] = value;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      // bfloat16 by truncation; in float16 the same bits are some finite number below 2
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (dtype == 2) {
        half = static_cast<uint16_t>((half & 0x8000u) | (half % 0x3C00u));
      }
      static_cast<uint16_t*>(b.data())[i] = half;
    }
  }
}

struct Shape {
  int64_t sets, samples, rows, in, out;
};

void run_linear(const Shape& s, int64_t dtype, const Draw& draw, int biases, int needs) {
  const size_t size = size_of(dtype);
  const int64_t all_rows = s.sets * s.samples * s.rows;
  Buffer x(all_rows * s.in, size), weight(s.out * s.in, size), bias(s.out, size);
  Buffer logits(s.sets * s.out * s.in, 4), bias_logits(s.sets * s.out, 4),
      dy(all_rows * s.out, size);
  fill(x, all_rows * s.in, dtype);
  fill(weight, s.out * s.in, dtype);
  fill(bias, s.out, dtype);
  fill(dy, all_rows * s.out, dtype);
  fill(logits, s.sets * s.out * s.in, 0);
  fill(bias_logits, s.sets * s.out, 0);
  const Linear linear{
      dtype,
      s.rows,
      s.in,
      s.out,
      x.data(),
      weight.data(),
      logits.floats(),
      biases > 0 ? bias.data() : nullptr,
      biases > 1 ? bias_logits.floats() : nullptr};

  for (int table = 0; table < table_count(); ++table) {
    std::string first;
    for (const int threads : {1, 3}) {
      const std::string name = std::string(table_name(table)) + " sets=" + std::to_string(s.sets) +
                               " samples=" + std::to_string(s.samples) +
                               " rows=" + std::to_string(s.rows) + " in=" + std::to_string(s.in) +
                               " out=" + std::to_string(s.out) + " dtype=" + std::to_string(dtype) +
                               " threads=" + std::to_string(threads);
      Buffer y(all_rows * s.out, size);
      linear_forward(table, threads, &draw, &linear, y.data());
      expect(y.guarded() && y.written(), "y of " + name);

      Buffer dx(all_rows * s.in, size), dweight(s.out * s.in, size), dbias(s.out, size);
      Buffer dlogits(s.sets * s.out * s.in, 4), dbias_logits(s.sets * s.out, 4);
      const bool any = s.in > 0;  // gradients of no elements are not asked for
      const Gradients gradients{
          dy.data(),
          any && (needs & 1) ? dx.data() : nullptr,
          any && (needs & 2) ? dweight.data() : nullptr,
          any && (needs & 4) ? dlogits.floats() : nullptr,
          biases > 0 ? dbias.data() : nullptr,
          biases > 1 ? dbias_logits.floats() : nullptr};
      linear_backward(table, threads, &draw, &linear, &gradients);
      std::string bits = y.bits();
      const auto check = [&](const void* wanted, const Buffer& b, const char* what) {
        expect(b.guarded(), std::string(what) + " of " + name);
        if (wanted != nullptr) {
          expect(b.written(), std::string(what) + " of " + name);
          bits += b.bits();
        }
      };
      check(gradients.dx, dx, "dx");
      check(gradients.dweight, dweight, "dweight");
      check(gradients.dlogits, dlogits, "dlogits");
      check(gradients.dbias, dbias, "dbias");
      check(gradients.dbias_logits, dbias_logits, "dbias_logits");
      if (threads == 1) {
        first = bits;
      }
      expect(bits == first, "threads change " + name);
    }
  }
}

void run_sampling(int64_t count, const Draw& draw) {
  const int64_t all = draw.sets * draw.samples * count, octets = (count + 7) / 8;
  Buffer logits(draw.sets * count, 4), dvalues(all, 4);
  fill(logits, draw.sets * count, 0);
  fill(dvalues, all, 0);
  std::string masks, packed;
  for (int table = 0; table < table_count(); ++table) {
    const std::string name =
        std::string(table_name(table)) + " sampling " + std::to_string(count) + " elements";
    Buffer values(all, 4), dlogits(draw.sets * count, 4);
    Buffer bits(draw.sets * draw.samples * octets, 1, 0);
    sample_values(table, 3, &draw, logits.floats(), count, values.floats());
    sample_bits(table, 3, &draw, logits.floats(), count, static_cast<uint8_t*>(bits.data()));
    sample_backward(table, 3, &draw, logits.floats(), dvalues.floats(), count, dlogits.floats());
    expect(values.guarded() && values.written(), "values of " + name);
    expect(dlogits.guarded() && dlogits.written(), "gradient of " + name);
    expect(bits.guarded(), "bits of " + name);
    if (table == 0) {
      masks = values.bits();
      packed = bits.bits();
    }
    expect(!draw.hard || values.bits() == masks, "other masks: " + name);
    expect(bits.bits() == packed, "other bits: " + name);
  }
}

}  // namespace

int main() {
  const int64_t seeds[] = {3, -8};
  const Shape shapes[] = {
      {1, 1, 1, 1, 1},  {2, 2, 1, 3, 2},   {1, 2, 7, 9, 25},  {2, 1, 17, 33, 7}, {1, 1, 33, 17, 49},
      {1, 3, 2, 70, 5}, {2, 2, 5, 8, 30},  {1, 1, 3, 0, 26},  {1, 1, 4, 257, 3}, {1, 2, 65, 5, 6},
      {2, 1, 1, 31, 1}, {1, 1, 6, 16, 24}, {1, 1, 1, 530, 2},
  };
  int variant = 0;
  for (const Shape& s : shapes) {
    for (int64_t dtype = 0; dtype < 3; ++dtype) {
      for (const bool threshold : {false, true}) {
        const bool hard = variant % 3 != 0;
        const Draw draw{threshold ? nullptr : seeds, s.sets, s.samples, 1, variant % 7, 2,
                        variant % 2 ? 1.0f : 0.7f,   hard};
        run_linear(s, dtype, draw, variant % 3, 7);
        run_linear(s, dtype, draw, (variant + 2) % 3, 1 + variant % 6);
        ++variant;
      }
    }
  }
  for (const int64_t count : {1, 3, 7, 8, 9, 15, 17, 31, 33, 65, 4095, 4096, 4097}) {
    for (const int hard : {1, 0}) {
      run_sampling(count, {seeds, 2, 2, 0, count % 5, 1, hard ? 1.0f : 1.5f, hard});
    }
  }
  for (int table = 0; table < table_count(); ++table) {
    std::printf("checked %s\n", table_name(table));
  }
  return failures == 0 ? 0 : 1;
}
