// Products in which every row of the batch sees the masks of its own set, read as bits. The rows
// come in runs of one set; a masked weight exists only as a tile per thread, or in registers.

namespace modmask::MODMASK_CAPABILITY {

constexpr int64_t kDotRows = kLanes / 2;  // up to which dot products beat a panel of rows
constexpr int64_t kDotDepth = 1024;       // summed in one go
constexpr int kDotOutputs = 4;
constexpr int64_t kDotWords = kDotDepth / 32;

// The bits of one set.
class BitRows {
 public:
  BitRows(const SetBits& masks, int64_t set)
      : first_(masks.bits + set * masks.bytes), end_(masks.bits + masks.sets * masks.bytes) {}

  // The bits of n elements, from the lowest of words[0] on; beyond them the words hold anything.
  void read(int64_t element, int64_t n, uint32_t* words) const {
    const uint8_t* p = first_ + element / 8;
    const int shift = static_cast<int>(element % 8);
    for (int64_t i = 0; i < n; i += 32, p += 4) {
      uint64_t eight = 0;
      if (__builtin_expect(end_ - p >= 8, 1)) {
        __builtin_memcpy(&eight, p, 8);
      } else {
        for (int64_t byte = 0; byte < end_ - p; ++byte) {
          eight |= static_cast<uint64_t>(p[byte]) << (8 * byte);
        }
      }
      words[i / 32] = static_cast<uint32_t>(eight >> shift);
    }
  }

 private:
  const uint8_t* first_;
  const uint8_t* end_;
};

MODMASK_INLINE uint32_t bits_at(const uint32_t* words, int64_t i) {
  return words[i / 32] >> (i % 32);
}

// W * M of rows [o0, o0 + rows) and columns [i0, i0 + n) as float32, padded with zeros.
template <typename T>
void select_tile(
    const T* weight,
    const BitRows& masks,
    int64_t in,
    int64_t o0,
    int64_t rows,
    int64_t i0,
    int64_t n,
    int64_t step,
    float* tile,
    uint32_t* words) {
  for (int64_t o = 0; o < rows; ++o) {
    const int64_t element = (o0 + o) * in + i0;
    masks.read(element, n, words);
    float* to = tile + o * step;
    for (int64_t i = 0; i < padded(n); i += kLanes) {
      store(to + i, where_bits(bits_at(words, i), load_part(weight + element + i, n - i)));
    }
  }
}

// The bias of outputs [o0, o0 + n) under the masks of a set, zeros where there is none.
template <typename T>
void select_bias(
    const void* bias, const SetBits& masks, int64_t set, int64_t o0, int64_t n, float* values) {
  if (bias == nullptr) {
    std::fill(values, values + n, 0.0f);
    return;
  }
  widen_row(static_cast<const T*>(bias) + o0, values, n);
  if (masks.bits != nullptr) {
    const uint8_t* bits = masks.bits + set * masks.bytes;
    for (int64_t o = 0; o < n; ++o) {
      values[o] = (bits[(o0 + o) / 8] >> ((o0 + o) % 8) & 1) != 0 ? values[o] : 0.0f;
    }
  }
}

MODMASK_INLINE float sum_lanes(vf v) {
  float part[kLanes];
  store(part, v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      part[i] += part[i + half];
    }
  }
  return part[0];
}

// sums[o][row] += W*M [o] . x [row] over n <= kDotDepth inputs; the words of output o are at
// o * kDotWords.
template <typename T, int kRows>
MODMASK_INLINE void add_dots(
    const T* weight,
    int64_t in,
    int64_t outputs,
    const uint32_t* words,
    const float* x,
    int64_t x_step,
    int64_t n,
    float (&sums)[kDotOutputs][2]) {
  vf c[kDotOutputs][kRows];
  clear(c);
  // outputs that are not there repeat the last one
  const T* rows[kDotOutputs];
  const uint32_t* bits[kDotOutputs];
#pragma GCC unroll 4
  for (int o = 0; o < kDotOutputs; ++o) {
    const int64_t there = o < outputs ? o : outputs - 1;
    rows[o] = weight + there * in;
    bits[o] = words + there * kDotWords;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    vf values[kRows];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      values[r] = load(x + r * x_step + i);
    }
#pragma GCC unroll 4
    for (int o = 0; o < kDotOutputs; ++o) {
      const vf w = where_bits(bits_at(bits[o], i), load_part(rows[o] + i, n - i));
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        c[o][r] = fma(w, values[r], c[o][r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < kDotOutputs; ++o) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      sums[o][r] += sum_lanes(c[o][r]);
    }
  }
}

// A run of a few rows: x as float32 rows `x_step` apart, padded with zeros.
template <typename T>
void select_dots(
    const T* weight,
    const BitRows& masks,
    int64_t in,
    int64_t o0,
    int64_t o_count,
    const float* x,
    int64_t x_step,
    int64_t rows,
    const float* bias,
    const int64_t* places,
    T* y,
    int64_t y_step) {
  uint32_t words[kDotOutputs * kDotWords];
  for (int64_t o = 0; o < o_count; o += kDotOutputs) {
    const int64_t outputs = o_count - o < kDotOutputs ? o_count - o : kDotOutputs;
    float sums[kDotRows][kDotOutputs][2] = {};
    for (int64_t i = 0; i < in; i += kDotDepth) {
      const int64_t n = in - i < kDotDepth ? in - i : kDotDepth;
      const int64_t element = (o0 + o) * in + i;
      for (int64_t j = 0; j < outputs; ++j) {
        masks.read(element + j * in, n, words + j * kDotWords);
      }
      for (int64_t r = 0; r < rows; r += 2) {
        const float* values = x + r * x_step + i;
        if (rows - r > 1) {
          add_dots<T, 2>(weight + element, in, outputs, words, values, x_step, n, sums[r / 2]);
        } else {
          add_dots<T, 1>(weight + element, in, outputs, words, values, x_step, n, sums[r / 2]);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < outputs; ++j) {
        narrow(sums[r / 2][j][r % 2] + bias[o + j], y[places[r] * y_step + o0 + o + j]);
      }
    }
  }
}

template <typename T>
void select_linear(const LinearProblem& p, const Selection& s, T* y, const Runner& runner) {
  const int64_t in = p.in, out = p.out;
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);

  // x as float32: panels of many rows, or a few rows as they are
  const int64_t x_step = padded(in, kLanes);
  int64_t packed_rows = 0;
  for (int64_t i = 0; i < s.run_count; ++i) {
    packed_rows += s.runs[i].count > kDotRows ? padded(s.runs[i].count, kLanes) : s.runs[i].count;
  }
  thread_local Scratch packed_scratch;
  const auto lease =
      packed_scratch.reserve(Scratch::need(packed_rows * x_step) + Scratch::need(2 * s.run_count));
  float* packed = packed_scratch.floats(packed_rows * x_step);
  int64_t* starts = packed_scratch.integers(s.run_count);
  for (int64_t i = 0, start = 0; i < s.run_count; ++i) {
    starts[i] = start;
    start +=
        (s.runs[i].count > kDotRows ? padded(s.runs[i].count, kLanes) : s.runs[i].count) * x_step;
  }
  run_tasks(runner, s.run_count, static_cast<double>(packed_rows * in) / 4, [&](int64_t t) {
    const SetRun& run = s.runs[t];
    const T* from = x + run.first * in;
    float* to = packed + starts[t];
    if (run.count > kDotRows) {
      for (int64_t r = 0; r < run.count; r += kTileColumns) {
        const int64_t count = run.count - r < kTileColumns ? run.count - r : kTileColumns;
        pack_panel(from + r * in, count, in, padded(count, kLanes), to + r * in);
      }
      return;
    }
    for (int64_t r = 0; r < run.count; ++r) {
      widen_row(from + r * in, to + r * x_step, in);
      std::fill(to + r * x_step + in, to + (r + 1) * x_step, 0.0f);
    }
  });

  const int64_t tile_step = spread(padded(in < kForwardDepth ? in : kForwardDepth));
  const Blocks blocks(out, kForwardRows, 2 * kTileRows, s.run_count, runner.threads);
  // the weights of a task are read once per run, from the second-level cache
  int64_t slices = ceil_div(2 * runner.threads, blocks.count);
  slices = slices < s.run_count ? slices : s.run_count;
  const double cost =
      static_cast<double>(out * in) * static_cast<double>(packed_rows + 8 * s.run_count) / kLanes;
  run_tasks(runner, blocks.count * slices, cost, [&](int64_t t) {
    const int64_t block = t / slices, slice = t % slices;
    const int64_t o0 = blocks.first(block), o_count = blocks.first(block + 1) - o0;
    thread_local Scratch scratch;
    const auto task_lease = scratch.reserve(
        Scratch::need(kForwardRows * tile_step) + Scratch::need(kForwardRows * kMostOfRun) +
        Scratch::need(tile_step) + Scratch::need(2 * kForwardRows));
    float* tile = scratch.floats(kForwardRows * tile_step);
    float* result = scratch.floats(kForwardRows * kMostOfRun);
    uint32_t* words = scratch.words(tile_step);
    float* bias = scratch.floats(2 * kForwardRows);
    TileAhead nothing_ahead{Lines(), Lines(), Lines(), 1};

    const int64_t last = (slice + 1) * s.run_count / slices;
    for (int64_t i = slice * s.run_count / slices; i < last; ++i) {
      const SetRun& run = s.runs[i];
      const BitRows masks(s.masks, run.set);
      const float* values = packed + starts[i];
      const int64_t* places = s.places + run.first;
      select_bias<T>(p.bias, s.bias_masks, run.set, o0, o_count, bias);
      if (run.count <= kDotRows) {
        select_dots(
            weight, masks, in, o0, o_count, values, x_step, run.count, bias, places, y, out);
        continue;
      }
      for (int64_t i0 = 0; i0 < in || i0 == 0; i0 += kForwardDepth) {
        const int64_t n = in - i0 < kForwardDepth ? in - i0 : kForwardDepth;
        select_tile(weight, masks, in, o0, o_count, i0, n, tile_step, tile, words);
        for (int64_t r = 0; r < run.count; r += kTileColumns) {
          if (run.count - r > kLanes) {
            forward_panel<2>(
                tile, tile_step, o_count, values + r * in + i0 * kTileColumns, n, result + r,
                kMostOfRun, i0 == 0, nothing_ahead);
          } else {
            forward_panel<1>(
                tile, tile_step, o_count, values + r * in + i0 * kLanes, n, result + r, kMostOfRun,
                i0 == 0, nothing_ahead);
          }
        }
      }
      for (int64_t r = 0; r < run.count; ++r) {
        T* to = y + places[r] * out + o0;
        for (int64_t o = 0; o < o_count; ++o) {
          narrow(result[o * kMostOfRun + r] + bias[o], to[o]);
        }
      }
    }
  });
}

template <typename T>
void select_conv(const ConvProblem& all, const Selection& selection, T* y, const Runner& runner) {
  const ConvShape s(all);
  const T* x = static_cast<const T*>(all.x);
  const T* weight = static_cast<const T*>(all.weight);
  const ChannelCut cut(s);
  const int64_t others = selection.run_count * all.conv_groups * ceil_div(s.outputs, kConvRows);
  const int64_t slices = ceil_div(4 * runner.threads, others);
  const Blocks rows(
      s.outputs, kConvRows, 2 * kTileRows, selection.run_count * all.conv_groups * slices,
      runner.threads);

  const double cost = static_cast<double>(all.images * s.out_pixels) *
                      static_cast<double>(all.outputs * s.depth) / kLanes;
  const int64_t tasks = selection.run_count * all.conv_groups * rows.count * slices;
  run_tasks(runner, tasks, cost, [&](int64_t task) {
    const int64_t slice = task % slices;
    const int64_t row_block = task / slices % rows.count;
    const int64_t conv_group = task / slices / rows.count % all.conv_groups;
    const SetRun& run = selection.runs[task / slices / rows.count / all.conv_groups];
    const int64_t o0 = conv_group * s.outputs + rows.first(row_block);
    const int64_t o_count = rows.first(row_block + 1) - rows.first(row_block);
    ConvProblem p = all;
    p.images = run.count;
    const PixelBlocks pixels(p);
    const int64_t first_block = slice * pixels.count() / slices;
    const int64_t last_block = (slice + 1) * pixels.count() / slices;
    const int64_t block_pixels = padded(pixels.largest().pixels(p), kTileColumns);
    const int64_t chunk = cut.one_tile ? 1 : ceil_div(kConvSlice, block_pixels);

    thread_local Scratch scratch;
    PatchProduct product(p, s, pixels, cut.panel, rows.largest(), chunk);
    const auto lease = scratch.reserve(
        Scratch::need(rows.largest() * cut.step) + Scratch::need(cut.step) +
        Scratch::need(kConvRows + kLanes) + product.need());
    float* tile = scratch.floats(rows.largest() * cut.step);
    uint32_t* words = scratch.words(cut.step);
    float* bias = scratch.floats(kConvRows + kLanes);
    product.take(scratch);

    const BitRows masks(selection.masks, run.set);
    select_bias<T>(p.bias, selection.bias_masks, run.set, o0, o_count, bias);
    for (int64_t b0 = first_block; b0 < last_block; b0 += chunk) {
      const int64_t b1 = last_block - b0 < chunk ? last_block : b0 + chunk;
      for (int64_t t0 = 0; t0 < s.channels; t0 += cut.tile) {
        const int64_t t_count = s.channels - t0 < cut.tile ? s.channels - t0 : cut.tile;
        if (!cut.one_tile || b0 == first_block) {
          select_tile(
              weight, masks, s.depth, o0, o_count, t0 * s.kernel, t_count * s.kernel, cut.step,
              tile, words);
        }
        product.add(
            x + run.first * p.channels * p.size[0] * p.size[1], conv_group, tile, cut.step, o_count,
            t0, t_count, b0, b1);
      }
      product.write(bias, o0, o_count, b0, b1, [&](int64_t n) {
        return y + selection.places[run.first + n] * p.outputs * s.out_pixels;
      });
    }
  });
}

}  // namespace modmask::MODMASK_CAPABILITY
