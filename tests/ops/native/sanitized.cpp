// Runs every table over awkward shapes under the address and undefined-behaviour sanitizers. Every
// buffer ends where its allocation ends, starts off alignment behind a guard element, and every
// element of a result must have been written. Results must not depend on the number of threads,
// nor hard masks on the table.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
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

// Largest difference of two results in float32, relative to the largest entry.
float difference(const std::string& a, const std::string& b) {
  float most = 0.0f, largest = 1e-6f;
  for (size_t i = 0; i + 4 <= a.size(); i += 4) {
    float p, q;
    std::memcpy(&p, a.data() + i, 4);
    std::memcpy(&q, b.data() + i, 4);
    most = std::fmax(most, std::fabs(p - q));
    largest = std::fmax(largest, std::fabs(p));
  }
  return most / largest;
}

// The tables cut and lay out the work differently, and must agree up to rounding.
void run_conv(Conv c, const Draw& draw, int biases, int needs) {
  const size_t size = size_of(c.dtype);
  const int64_t all = draw.sets * draw.samples * c.images;
  int64_t patch = c.channels / c.conv_groups;
  int64_t x_count = all * c.channels, y_count = all * c.outputs;
  for (int i = 0; i < 2; ++i) {
    patch *= c.kernel[i];
    x_count *= c.size[i];
    y_count *= c.out_size[i];
  }
  const int64_t w_count = c.outputs * patch;
  Buffer x(x_count, size), weight(w_count, size), bias(c.outputs, size), dy(y_count, size);
  Buffer logits(draw.sets * w_count, 4), bias_logits(draw.sets * c.outputs, 4);
  fill(x, x_count, c.dtype);
  fill(weight, w_count, c.dtype);
  fill(bias, c.outputs, c.dtype);
  fill(dy, y_count, c.dtype);
  fill(logits, draw.sets * w_count, 0);
  fill(bias_logits, draw.sets * c.outputs, 0);
  c.x = x.data();
  c.weight = weight.data();
  c.logits = logits.floats();
  c.bias = biases > 0 ? bias.data() : nullptr;
  c.bias_logits = biases > 1 ? bias_logits.floats() : nullptr;

  std::vector<std::string> of_first_table;
  for (int table = 0; table < table_count(); ++table) {
    std::vector<std::string> of_one_thread;
    for (const int threads : {1, 3}) {
      const std::string name = std::string(table_name(table)) + " convolution, channels " +
                               std::to_string(c.channels) + " to " + std::to_string(c.outputs) +
                               ", size " + std::to_string(c.size[0]) + "x" +
                               std::to_string(c.size[1]) + ", dtype " + std::to_string(c.dtype) +
                               ", threads " + std::to_string(threads);
      Buffer y(y_count, size), dx(x_count, size), dweight(w_count, size), dbias(c.outputs, size);
      Buffer dlogits(draw.sets * w_count, 4), dbias_logits(draw.sets * c.outputs, 4);
      const Gradients gradients{
          dy.data(),
          needs & 1 ? dx.data() : nullptr,
          needs & 2 ? dweight.data() : nullptr,
          needs & 4 ? dlogits.floats() : nullptr,
          biases > 0 ? dbias.data() : nullptr,
          biases > 1 ? dbias_logits.floats() : nullptr};
      conv_forward(table, threads, &draw, &c, y.data());
      conv_backward(table, threads, &draw, &c, &gradients);
      std::vector<std::string> results;
      const auto check = [&](const void* wanted, const Buffer& b, const char* what) {
        expect(b.guarded(), std::string(what) + " of " + name);
        if (wanted != nullptr) {
          expect(b.written(), std::string(what) + " of " + name);
          results.push_back(b.bits());
        }
      };
      check(y.data(), y, "y");
      check(gradients.dx, dx, "dx");
      check(gradients.dweight, dweight, "dweight");
      check(gradients.dlogits, dlogits, "dlogits");
      check(gradients.dbias, dbias, "dbias");
      check(gradients.dbias_logits, dbias_logits, "dbias_logits");
      if (threads == 1) {
        of_one_thread = results;
      }
      expect(results == of_one_thread, "threads change " + name);
      if (table == 0) {
        of_first_table = results;
      }
      for (size_t i = 0; c.dtype == 0 && i < results.size(); ++i) {
        expect(
            difference(of_first_table[i], results[i]) < 1e-5f,
            "result " + std::to_string(i) + " differs from the first table's: " + name);
      }
    }
  }
}

void run_top_k(int64_t dtype) {
  const int64_t counts[] = {700, 0, 65, 70001};
  const size_t size = size_of(dtype);
  Buffer a(counts[0], size), b(counts[1], size), c(counts[2], size), d(counts[3], size);
  Buffer* scores[] = {&a, &b, &c, &d};
  const void* data[4];
  int64_t total = 0;
  for (int t = 0; t < 4; ++t) {
    fill(*scores[t], counts[t], dtype);
    data[t] = scores[t]->data();
    total += counts[t];
  }
  for (const int64_t k : {int64_t{0}, int64_t{1}, total / 3, total}) {
    for (const int packed : {0, 1}) {
      std::string first;
      for (int table = 0; table < table_count(); ++table) {
        for (const int threads : {1, 3}) {
          uint8_t* masks[4];
          std::vector<Buffer*> kept;
          for (int t = 0; t < 4; ++t) {
            kept.push_back(new Buffer(packed ? (counts[t] + 7) / 8 : counts[t], 1));
            masks[t] = static_cast<uint8_t*>(kept.back()->data());
          }
          const std::string name = std::string(table_name(table)) + " top " + std::to_string(k);
          expect(
              top_k(table, threads, dtype, data, counts, 4, k, packed, masks) == 1,
              "no NaN: " + name);
          std::string bits;
          for (Buffer* mask : kept) {
            expect(mask->guarded(), name);
            bits += mask->bits();
            delete mask;
          }
          first = first.empty() ? bits : first;
          expect(bits == first, "other masks: " + name);
        }
      }
    }
  }
}

// `rows` of three sets, the second of which has none; the bits end where their allocation ends.
template <typename Problem, typename Call>
void run_select(
    Problem p,
    int64_t rows,
    int64_t x_each,
    int64_t outputs,
    int64_t w_count,
    int64_t y_each,
    bool bias_masked,
    const Call& call) {
  const size_t size = size_of(p.dtype);
  const int64_t octets = (w_count + 7) / 8, bias_octets = (outputs + 7) / 8;
  Buffer x(rows * x_each, size), weight(w_count, size), bias(outputs, size);
  Buffer masks(3 * octets, 1), bias_masks(3 * bias_octets, 1);
  fill(x, rows * x_each, p.dtype);
  fill(weight, w_count, p.dtype);
  fill(bias, outputs, p.dtype);
  for (Buffer* b : {&masks, &bias_masks}) {
    for (int64_t i = 0; i < (b == &masks ? 3 * octets : 3 * bias_octets); ++i) {
      static_cast<uint8_t*>(b->data())[i] = static_cast<uint8_t>(random_value() * 1e4f);
    }
  }
  p.x = x.data();
  p.weight = weight.data();
  p.bias = bias.data();
  const int64_t few = rows > 1 ? rows / 3 + 1 : 0;
  const std::vector<int64_t> runs = {0, 0, few, 2, few, rows - few};
  std::vector<int64_t> places;
  for (int64_t i = 0; i < rows; ++i) {
    places.push_back(rows - 1 - i);
  }
  const int64_t first = few > 0 ? 0 : 3;
  const Select select{
      static_cast<uint8_t*>(masks.data()),
      bias_masked ? static_cast<uint8_t*>(bias_masks.data()) : nullptr,
      3,
      octets,
      bias_octets,
      runs.data() + first,
      few > 0 ? 2 : 1,
      places.data()};
  std::string of_first_table;
  for (int table = 0; table < table_count(); ++table) {
    std::string of_one_thread;
    for (const int threads : {1, 3}) {
      const std::string name = std::string(table_name(table)) + " selection, rows " +
                               std::to_string(rows) + ", weights " + std::to_string(w_count) +
                               ", dtype " + std::to_string(p.dtype);
      Buffer y(rows * y_each, size);
      call(table, threads, &p, &select, y.data());
      expect(y.guarded() && y.written(), "y of " + name);
      of_one_thread = threads == 1 ? y.bits() : of_one_thread;
      expect(y.bits() == of_one_thread, "threads change " + name);
    }
    of_first_table = table == 0 ? of_one_thread : of_first_table;
    expect(
        p.dtype != 0 || difference(of_first_table, of_one_thread) < 1e-4f,
        "tables differ in a selection of " + std::to_string(rows) + " rows");
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

// As for convolutions: the tables must agree up to rounding, threads change nothing.
void run_rnn(Rnn r, const Draw& draw, bool cut, bool all) {
  const int64_t batch = draw.sets * draw.samples * r.rows, out = (r.cell == 0 ? 4 : 3) * r.hidden;
  const int64_t columns[2] = {r.in, r.hidden};
  const int64_t x_count = r.steps * batch * r.in, y_count = r.steps * batch * r.hidden;
  const int64_t h_count = batch * r.hidden;
  Buffer x(x_count, 4), h0(h_count, 4), c0(h_count, 4), dy(y_count, 4);
  fill(x, x_count, 0);
  fill(h0, h_count, 0);
  fill(c0, h_count, 0);
  fill(dy, y_count, 0);
  r.x = x.floats();
  r.h0 = all ? h0.floats() : nullptr;
  r.c0 = all && r.cell == 0 ? c0.floats() : nullptr;
  std::vector<std::unique_ptr<Buffer>> kept;
  const auto random = [&](int64_t count) {
    kept.push_back(std::make_unique<Buffer>(count, 4));
    fill(*kept.back(), count, 0);
    return kept.back()->floats();
  };
  for (int i = 0; i < 2; ++i) {
    r.weights[i] = random(out * columns[i]);
    r.logits[i] = random(draw.sets * out * columns[i]);
    r.biases[i] = all ? random(out) : nullptr;
    r.bias_logits[i] = all && i == 1 ? random(draw.sets * out) : nullptr;
  }
  std::vector<int64_t> lengths;
  for (int64_t b = 0; b < batch; ++b) {
    lengths.push_back((b * 5 + 3) % (r.steps + 1));
  }
  r.lengths = cut ? lengths.data() : nullptr;

  std::vector<std::string> of_first_table;
  for (int table = 0; table < table_count(); ++table) {
    std::vector<std::string> of_one_thread;
    for (const int threads : {1, 3}) {
      const std::string name = std::string(table_name(table)) + " recurrent layer, cell " +
                               std::to_string(r.cell) + ", rows " + std::to_string(r.rows) +
                               ", in " + std::to_string(r.in) + ", hidden " +
                               std::to_string(r.hidden) + ", threads " + std::to_string(threads);
      std::vector<std::unique_ptr<Buffer>> results;
      const auto result = [&](int64_t count, bool wanted) -> float* {
        if (!wanted || count == 0) {
          return nullptr;
        }
        results.push_back(std::make_unique<Buffer>(count, 4));
        return results.back()->floats();
      };
      const bool lstm = r.cell == 0;
      float* y = result(y_count, true);
      float* h_n = result(h_count, true);
      float* c_n = result(h_count, lstm);
      Buffer saved(rnn_saved(table, &draw, &r), 4);
      rnn_forward(table, threads, &draw, &r, y, h_n, c_n, saved.floats());
      expect(saved.guarded() && saved.written(), "saved values of " + name);
      RnnGradients d{};
      d.y = y;
      d.saved = saved.floats();
      d.dy = dy.floats();
      d.dx = result(x_count, true);
      d.dh0 = result(h_count, all);
      d.dc0 = result(h_count, all && lstm);
      for (int i = 0; i < 2; ++i) {
        d.dweights[i] = result(out * columns[i], all);
        d.dlogits[i] = result(draw.sets * out * columns[i], true);
        d.dbiases[i] = result(out, all);
        d.dbias_logits[i] = result(draw.sets * out, all && i == 1);
      }
      rnn_backward(table, threads, &draw, &r, &d);
      std::vector<std::string> bits;
      for (const auto& b : results) {
        expect(b->guarded() && b->written(), "results of " + name);
        bits.push_back(b->bits());
      }
      if (threads == 1) {
        of_one_thread = bits;
      }
      expect(bits == of_one_thread, "threads change " + name);
      if (table == 0) {
        of_first_table = bits;
      }
      for (size_t i = 0; i < bits.size(); ++i) {
        expect(difference(of_first_table[i], bits[i]) < 1e-4f, "other results: " + name);
      }
    }
  }
}

// The draw with one estimator after the other, numbers that keep and drop some of everything.
Draw with_estimator(Draw draw, int variant) {
  draw.estimator = variant % 5;
  draw.low = draw.estimator == 1 ? -0.2f : 0.4f;
  draw.high = draw.estimator == 1 ? 1.3f : 0.0f;
  draw.clamp = draw.estimator == 1 ? 1e-3f : 0.0f;
  draw.antithetic = variant / 5 % 2;
  return draw;
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
        run_linear(s, dtype, with_estimator(draw, variant), variant % 3, 7);
        Linear linear{};
        linear.dtype = dtype;
        linear.rows = s.rows;
        linear.in = s.in;
        linear.out = s.out;
        run_select(linear, s.rows, s.in, s.out, s.out * s.in, s.out, threshold, select_linear);
        ++variant;
      }
    }
  }
  const Conv convolutions[] = {
      // dtype, images, groups, channels, outputs, size, out_size, kernel, stride, padding, dilation
      {0, 1, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
      {0, 3, 1, 5, 9, {4, 4}, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {0, 1, 2, 6, 8, {7, 20}, {4, 20}, {3, 3}, {2, 1}, {1, 1}, {1, 1}},
      {0, 2, 3, 3, 3, {6, 33}, {6, 33}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {0, 2, 2, 2, 4, {11, 20}, {4, 6}, {3, 4}, {3, 3}, {1, 2}, {1, 2}},
      {0, 2, 1, 17, 40, {5, 9}, {3, 7}, {2, 2}, {1, 1}, {0, 0}, {2, 2}},
      {0, 1, 1, 3, 5, {18, 40}, {9, 14}, {5, 4}, {2, 3}, {2, 3}, {1, 1}},
      {0, 1, 1, 30, 200, {3, 3}, {3, 3}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
  };
  for (const Conv& c : convolutions) {
    for (int64_t dtype = 0; dtype < 3; ++dtype) {
      Conv typed = c;
      typed.dtype = dtype;
      const bool hard = variant % 3 != 0;
      const Draw draw{variant % 4 == 3 ? nullptr : seeds, 2,   2, 1, variant % 7, 2,
                      variant % 2 ? 1.0f : 0.7f,          hard};
      run_conv(typed, draw, variant % 3, variant % 2 ? 7 : 5);
      run_conv(typed, with_estimator(draw, variant), variant % 3, variant % 2 ? 7 : 5);
      const int64_t kernel = c.kernel[0] * c.kernel[1];
      run_select(
          typed, c.images, c.channels * c.size[0] * c.size[1], c.outputs,
          c.outputs * (c.channels / c.conv_groups) * kernel,
          c.outputs * c.out_size[0] * c.out_size[1], variant % 2 == 0, select_conv);
      ++variant;
    }
    run_conv(c, {seeds, 1, 1, 0, 0, 1, 1.0f, 1}, 0, 4);
  }
  const Rnn layers[] = {
      // cell, steps, rows, in, hidden, reverse
      {0, 1, 1, 1, 1, 0},
      {0, 3, 5, 9, 7, 1},
      {0, 2, 40, 3, 26, 0},
      {0, 2, 9, 270, 5, 0},
  };
  for (Rnn r : layers) {
    for (r.cell = 0; r.cell < 2; ++r.cell) {
      const Draw draw{variant % 4 == 3 ? nullptr : seeds,
                      2,
                      2,
                      1,
                      0,
                      2,
                      variant % 2 ? 1.0f : 0.7f,
                      variant % 3 != 0};
      run_rnn(r, draw, variant % 2 == 0, variant % 3 != 1);
      ++variant;
    }
  }
  for (int64_t dtype = 0; dtype < 3; ++dtype) {
    run_top_k(dtype);
  }
  for (const int64_t count : {1, 3, 7, 8, 9, 15, 17, 31, 33, 65, 4095, 4096, 4097}) {
    for (const int hard : {1, 0}) {
      const Draw draw{seeds, 2, 2, 0, count % 5, 1, hard ? 1.0f : 1.5f, hard};
      run_sampling(count, draw);
      for (int estimator = 0; estimator < 10; ++estimator) {
        run_sampling(count, with_estimator(draw, estimator));
      }
    }
  }
  for (int table = 0; table < table_count(); ++table) {
    std::printf("checked %s\n", table_name(table));
  }
  return failures == 0 ? 0 : 1;
}
