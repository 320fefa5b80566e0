// y = x (W * M)^T and its gradients; a masked weight exists only as a tile per thread.
//
// Every product reads its masked operand in the weight's own layout, so a tile is made row by row
// and never transposed:
//   y[o][rows]   = W*M tile [o][i]    x  x transposed, packed once per call    (lanes: batch rows)
//   dx[row][i]   = dy[row][o]         x  W*M tile [o][i]                       (lanes: inputs)
//   D[o][i]      = dy[row][o]         x  x packed by strips of inputs          (lanes: inputs)
// with dlogits = sum over samples of D * W * slope and dweight = sum over groups of D * M.

namespace modmask::MODMASK_CAPABILITY {

constexpr int64_t kForwardRows = 24;  // of the weight tile
constexpr int64_t kForwardDepth = 256;
constexpr int64_t kBackwardRows = 48;
constexpr int64_t kBackwardColumns = 128;
constexpr int64_t kFewRows = 16;  // of x, up to which a tile has twice the columns
// Products longer than this are summed in parts, which keeps the rounding error of plain products.
constexpr int64_t kSumDepth = 128;
constexpr int64_t kOutputTile = 16384;  // floats of y kept per task
constexpr int64_t kBlockThreads = 8;    // for which the sums of blocks of logits are cut
constexpr int64_t kStreamed = 1 << 19;  // floats of a gradient from which it goes past the caches

// At least n floats in an odd number of cache lines: rows at this distance spread over all sets of
// the first-level cache.
constexpr int64_t spread(int64_t n) {
  return (n + 15) / 16 * 16 | 16;
}

// `units` cut into blocks, equal to within one unit, of at most `most`; so many of them that
// `threads` threads share blocks * others evenly, unless they would get smaller than `least`. How a
// matrix is cut changes no sum.
struct Blocks {
  int64_t units;
  int64_t count;

  Blocks(int64_t units, int64_t most, int64_t least, int64_t others, int64_t threads)
      : units(units), count(ceil_div(units, most)) {
    while (count * others % threads != 0 && (count + 1) * least <= units) {
      ++count;
    }
  }

  int64_t first(int64_t block) const {
    return block * units / count;
  }

  int64_t largest() const {
    return ceil_div(units, count);
  }
};

// Weights as float32 and, with one logit for each, exp(-logit) of rows [o0, o0 + rows) and columns
// [i0, i0 + n), each row `step` apart and padded with zeros (exp: with anything) to kTileColumns.
template <typename T>
void load_tile(
    const T* weight,
    const float* logits,
    int64_t in,
    int64_t o0,
    int64_t rows,
    int64_t i0,
    int64_t n,
    int64_t step,
    float* wide,
    float* exps) {
  for (int64_t o = 0; o < rows; ++o) {
    const int64_t element = (o0 + o) * in + i0;
    if (logits != nullptr) {
      exp_minus_row(logits + element, n, exps + o * step);
    }
    const T* from = weight + element;
    float* to = wide + o * step;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      store(to + i, load_wide(from + i));
    }
    for (; i < padded(n); i += kLanes) {
      store(to + i, load_part(from + i, n - i));
    }
  }
}

// weights * masks, where a mask of 0 removes whatever the weight is
template <bool kHard>
MODMASK_INLINE vf times_mask(const float* masks, const float* weights) {
  const vf m = load(masks), w = load(weights);
  return kHard ? where_less(vf{}, m, w) : m * w;
}

// W * M of a tile that `load_tile` has read, from the weight's `first_element` on.
template <bool kHard>
void mask_rows(
    const MaskSpec& spec,
    const RowMasks& masks,
    const float* logits,
    int64_t in,
    int64_t first_element,
    int64_t rows,
    int64_t n,
    int64_t step,
    const float* wide,
    const float* exps,
    float* tile,
    uint32_t* words) {
  if (is_granular(spec.layout)) {
    GranularRows<kHard, false> drawn(spec, masks, logits, in, first_element % in, n);
    for (int64_t o = 0; o < rows; ++o) {
      drawn.draw(first_element / in + o);
      for (int64_t i = 0; i < n; i += kLanes) {
        store(tile + o * step + i, times_mask<kHard>(drawn.values + i, wide + o * step + i));
      }
    }
    return;
  }
  for (int64_t o = 0; o < rows; ++o) {
    const int64_t element = first_element + o * in;
    const RowNoise noise =
        masks.row(spec.element_offset + element, n, exps + o * step, logits + element, words);
    float* to = tile + o * step;
    const float* w = wide + o * step;
    for_mask_vectors<kHard, false>(
        noise, n, spec.tau, [=](int64_t i, auto& m) { store(to + i, m.apply(m, load(w + i))); });
  }
}

// A block of rows in memory, fetched line by line.
class Lines {
 public:
  Lines() = default;

  template <typename T>
  Lines(const T* first, int64_t step, int64_t rows, int64_t n)
      : line_(reinterpret_cast<const char*>(first)),
        row_bytes_(n * static_cast<int64_t>(sizeof(T))),
        row_step_(step * static_cast<int64_t>(sizeof(T))),
        rows_(first != nullptr && rows > 0 ? rows : 0) {}

  int64_t count() const {
    return rows_ * (row_bytes_ / 64 + 1);
  }

  MODMASK_INLINE void fetch(Lines& lines, int64_t n) {
    while (n > 0 && lines.rows_ > 0) {
      for (; n > 0 && lines.at_ < lines.row_bytes_; --n, lines.at_ += 64) {
        __builtin_prefetch(lines.line_ + lines.at_, 0, 2);
      }
      if (lines.at_ >= lines.row_bytes_) {
        lines.at_ = 0;
        lines.line_ += lines.row_step_;
        --lines.rows_;
      }
    }
  }

 private:
  const char* line_ = nullptr;
  int64_t row_bytes_ = 0;
  int64_t row_step_ = 0;
  int64_t rows_ = 0;
  int64_t at_ = 0;
};

// Fetches the weights and logits of the next tile, and the place of this one's result, while the
// products run: the rows of a tile lie on different pages, where the hardware does not look ahead.
class TileAhead {
 public:
  TileAhead(const Lines& weight, const Lines& logits, const Lines& result, int64_t calls)
      : lines_{weight, logits, result} {
    for (int i = 0; i < 3; ++i) {
      each_[i] = ceil_div(lines_[i].count(), calls > 0 ? calls : 1);
    }
  }

  // To be called about `calls` times.
  MODMASK_INLINE void some(TileAhead& ahead) {
    for (int i = 0; i < 3; ++i) {
      Lines::fetch(ahead.lines_[i], ahead.each_[i]);
    }
  }

 private:
  Lines lines_[3];
  int64_t each_[3];
};

// ---- bias ----

// The bias of outputs [o0, o0 + n) as one group sees it, zeros where there is none. `exps` must
// hold whole vectors, `words` words_needed(n).
template <typename T, bool kHard, typename Problem>
void masked_bias(
    const Problem& p,
    int64_t set,
    int64_t sample,
    int64_t o0,
    int64_t n,
    float* values,
    float* exps,
    uint32_t* words) {
  if (p.bias == nullptr) {
    std::fill(values, values + n, 0.0f);
    return;
  }
  widen_row(static_cast<const T*>(p.bias) + o0, values, n);
  if (p.bias_logits == nullptr) {
    return;
  }
  const MaskSpec& spec = p.mask;
  const float* logits = p.bias_logits + set * outputs_of(p) + o0;
  exp_minus_row(logits, n, exps);
  const RowNoise noise =
      RowMasks(spec, set, sample, p.bias_tensor_id).row(o0, n, exps, logits, words);
  for_mask_vectors<kHard, false>(noise, n, spec.tau, [=](int64_t i, auto& m) {
    store(values + i, m.apply(m, load(values + i)));
  });
}

inline double sum(const float* p, int64_t n) {
  constexpr int kParts = 8;
  double part[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts) {
    for (int j = 0; j < kParts; ++j) {
      part[j] += p[i + j];
    }
  }
  for (int j = 0; i < n; ++i, ++j) {
    part[j] += p[i];
  }
  double total = 0.0;
  for (int j = 0; j < kParts; ++j) {
    total += part[j];
  }
  return total;
}

// Gradients of the bias and its logits; column(o, group) is the sum of dy over a group. One long
// sum per output: in double, it costs nothing.
template <typename T, bool kHard, typename Problem, typename Column>
void bias_gradients(
    const Problem& p,
    const Gradients& d,
    double cost,
    const Runner& runner,
    const Column& column_sum) {
  constexpr int64_t kBlock = 64;
  const MaskSpec& spec = p.mask;
  const int64_t out = outputs_of(p);
  const T* bias = static_cast<const T*>(p.bias);
  T* dbias = static_cast<T*>(d.dbias);
  run_tasks(runner, ceil_div(out, kBlock), cost, [&](int64_t t) {
    const int64_t o0 = t * kBlock;
    const int64_t count = out - o0 < kBlock ? out - o0 : kBlock;
    double total[kBlock] = {}, d_logits[kBlock], column[kBlock];
    float exps[kBlock], values[kBlock], slopes[kBlock], narrowed[kBlock];
    uint32_t words[words_needed(kBlock)];
    for (int64_t set = 0; set < spec.sets; ++set) {
      std::fill(d_logits, d_logits + kBlock, 0.0);
      for (int64_t k = 0; k < spec.samples; ++k) {
        for (int64_t o = 0; o < count; ++o) {
          column[o] = column_sum(o0 + o, set * spec.samples + k);
        }
        if (p.bias_logits == nullptr) {
          for (int64_t o = 0; o < count; ++o) {
            total[o] += column[o];
          }
          continue;
        }
        const float* logits = p.bias_logits + set * out + o0;
        exp_minus_row(logits, count, exps);
        const RowNoise noise =
            RowMasks(spec, set, k, p.bias_tensor_id).row(o0, count, exps, logits, words);
        for_mask_vectors<kHard, true>(noise, count, spec.tau, [&](int64_t i, auto& m) {
          store(values + i, m.values(m));
          store(slopes + i, m.soft.slope);
        });
        for (int64_t o = 0; o < count; ++o) {
          total[o] += column[o] * values[o];
          d_logits[o] += column[o] * widen(bias[o0 + o]) * slopes[o];
        }
      }
      if (d.dbias_logits != nullptr) {
        for (int64_t o = 0; o < count; ++o) {
          d.dbias_logits[set * out + o0 + o] = static_cast<float>(d_logits[o]);
        }
      }
    }
    if (dbias != nullptr) {
      for (int64_t o = 0; o < count; ++o) {
        narrowed[o] = static_cast<float>(total[o]);
      }
      narrow_row(narrowed, dbias + o0, count);
    }
  });
}

// ---- forward ----

// Panels of 2 * kLanes batch rows (the last of kLanes where that is enough), each [in][width].
template <typename T>
void pack_panel(const T* x, int64_t rows, int64_t in, int64_t width, float* panel) {
  transpose(x, in, rows, in, panel, width);
  for (int64_t i = 0; i < in; ++i) {
    std::fill(panel + i * width + rows, panel + (i + 1) * width, 0.0f);
  }
}

template <int kVectors>
MODMASK_INLINE void forward_panel(
    const float* tile,
    int64_t tile_step,
    int64_t tile_rows,
    const float* panel,
    int64_t depth,
    float* y,
    int64_t y_step,
    bool first,
    TileAhead& ahead) {
  constexpr int64_t kWidth = kVectors * kLanes;
  for (int64_t k = 0; k < depth || k == 0; k += kSumDepth) {  // depth 0 still writes zeros
    const int64_t k_count = depth - k < kSumDepth ? depth - k : kSumDepth;
    for_even_tiles(tile_rows, [&](int64_t o, auto rows) {
      TileAhead::some(ahead);
      constexpr int kRows = decltype(rows)::value;
      vf c[kRows][kVectors];
      multiply<kRows, kVectors>(
          tile + o * tile_step + k, tile_step, 1, panel + k * kWidth, kWidth, k_count, c);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        float* to = y + (o + m) * y_step;
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          store(to + v * kLanes, first && k == 0 ? c[m][v] : c[m][v] + load(to + v * kLanes));
        }
      }
    });
  }
}

// Rows of y from a tile [outputs][tile_step], which gets its bias here.
template <typename T>
void write_outputs(
    float* tile,
    int64_t tile_step,
    int64_t outputs,
    int64_t rows,
    const float* bias,
    T* y,
    int64_t y_step) {
  for (int64_t o = 0; o < outputs; ++o) {
    const vf b = splat(bias[o]);
    for (int64_t r = 0; r < rows; r += kLanes) {
      store(tile + o * tile_step + r, load(tile + o * tile_step + r) + b);
    }
  }
  if constexpr (__is_same(T, float)) {
    transpose(tile, tile_step, outputs, rows, y, y_step);
  } else {
    constexpr int64_t kBlock = 64;
    float turned[kBlock * kForwardRows];
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t count = rows - r < kBlock ? rows - r : kBlock;
      transpose(tile + r, tile_step, outputs, count, turned, kForwardRows);
      for (int64_t i = 0; i < count; ++i) {
        narrow_row(turned + i * kForwardRows, y + (r + i) * y_step, outputs);
      }
    }
  }
}

template <typename T, bool kHard>
void linear_forward(const LinearProblem& p, T* y, const Runner& runner) {
  const MaskSpec& spec = p.mask;
  const int64_t groups = spec.sets * spec.samples;
  const int64_t in = p.in, out = p.out, rows = p.rows;
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);

  const int64_t padded_rows = padded(rows, kLanes);
  const int64_t panels = ceil_div(rows, kTileColumns);
  thread_local Scratch packed_scratch;
  const auto lease = packed_scratch.reserve(Scratch::need(groups * padded_rows * in));
  float* packed = packed_scratch.floats(groups * padded_rows * in);
  run_tasks(
      runner, groups * panels, static_cast<double>(groups * padded_rows * in) / 4, [&](int64_t t) {
        const int64_t g = t / panels, r = t % panels * kTileColumns;
        const int64_t count = rows - r < kTileColumns ? rows - r : kTileColumns;
        pack_panel(
            x + (g * rows + r) * in, count, in, padded(count, kLanes),
            packed + (g * padded_rows + r) * in);
      });

  // rows of every group handled per pass over the weight tile
  int64_t chunk = kOutputTile / (kForwardRows * spec.samples) / kTileColumns * kTileColumns;
  chunk = chunk > kTileColumns ? chunk : kTileColumns;
  chunk = chunk < padded_rows ? chunk : padded_rows;
  const int64_t tile_step = spread(padded(in < kForwardDepth ? in : kForwardDepth));
  // of a row of the weight, or of the bias
  const int64_t word_count = words_needed(tile_step > kForwardRows ? tile_step : kForwardRows);
  const Blocks blocks(out, kForwardRows, 2 * kTileRows, spec.sets, runner.threads);
  const double cost =
      static_cast<double>(out * in) * static_cast<double>(groups * (padded_rows + 8)) / kLanes;

  run_tasks(runner, spec.sets * blocks.count, cost, [&](int64_t t) {
    const int64_t set = t / blocks.count, block = t % blocks.count;
    const int64_t o0 = blocks.first(block), o_count = blocks.first(block + 1) - o0;
    const float* logits = logits_of_set(spec, p.logits, set, out, in);
    const float* each = has_blocks(spec.layout) ? nullptr : logits;  // one per weight
    thread_local Scratch scratch;
    const auto lease = scratch.reserve(
        3 * Scratch::need(kForwardRows * tile_step) + Scratch::need(word_count) +
        Scratch::need(spec.samples * kForwardRows * chunk) + 3 * Scratch::need(64));
    float* exps = scratch.floats(kForwardRows * tile_step);
    float* wide = scratch.floats(kForwardRows * tile_step);
    float* tile = scratch.floats(kForwardRows * tile_step);
    uint32_t* words = scratch.words(word_count);
    float* result = scratch.floats(spec.samples * kForwardRows * chunk);
    float* bias_values = scratch.floats(64);
    float* bias_exps = scratch.floats(64);

    for (int64_t r0 = 0; r0 < rows; r0 += chunk) {
      const int64_t r_count = padded_rows - r0 < chunk ? padded_rows - r0 : chunk;
      for (int64_t i0 = 0; i0 < in || i0 == 0; i0 += kForwardDepth) {
        const int64_t i_count = in - i0 < kForwardDepth ? in - i0 : kForwardDepth;
        load_tile(weight, each, in, o0, o_count, i0, i_count, tile_step, wide, exps);
        // the next block of inputs, or the first one of the task that probably comes next
        const bool last = i0 + kForwardDepth >= in;
        const int64_t next_i = last ? 0 : i0 + kForwardDepth;
        const int64_t next_o = last ? o0 + runner.threads * blocks.largest() : o0;
        const int64_t next_rows = out - next_o < kForwardRows ? out - next_o : kForwardRows;
        const int64_t next_columns = in - next_i < kForwardDepth ? in - next_i : kForwardDepth;
        const int64_t next = next_o * in + next_i;
        TileAhead ahead(
            Lines(weight + next, in, next_rows, next_columns),
            each != nullptr ? Lines(each + next, in, next_rows, next_columns) : Lines(), Lines(),
            spec.samples * ceil_div(r_count, kTileColumns) * ceil_div(o_count, kTileRows) *
                ceil_div(i_count, kSumDepth));
        for (int64_t k = 0; k < spec.samples; ++k) {
          const RowMasks masks(spec, set, k, spec.tensor_id);
          mask_rows<kHard>(
              spec, masks, logits, in, o0 * in + i0, o_count, i_count, tile_step, wide, exps, tile,
              words);
          const int64_t g = set * spec.samples + k;
          const float* panel = packed + (g * padded_rows + r0) * in;
          float* y_tile = result + k * kForwardRows * chunk;
          for (int64_t r = 0; r < r_count; r += kTileColumns) {
            if (r_count - r > kLanes) {
              forward_panel<2>(
                  tile, tile_step, o_count, panel + r * in + i0 * kTileColumns, i_count, y_tile + r,
                  chunk, i0 == 0, ahead);
            } else {
              forward_panel<1>(
                  tile, tile_step, o_count, panel + r * in + i0 * kLanes, i_count, y_tile + r,
                  chunk, i0 == 0, ahead);
            }
          }
        }
      }
      for (int64_t k = 0; k < spec.samples; ++k) {
        masked_bias<T, kHard>(p, set, k, o0, o_count, bias_values, bias_exps, words);
        const int64_t first_row = (set * spec.samples + k) * rows + r0;
        write_outputs(
            result + k * kForwardRows * chunk, chunk, o_count,
            rows - r0 < r_count ? rows - r0 : r_count, bias_values, y + first_row * out + o0, out);
      }
    }
  });
}

// ---- backward ----

// The tile of one task: outputs by inputs, rows `step` apart.
struct BackwardTile {
  int64_t o_count;
  int64_t i_count;
  int64_t step;
  float* wide;     // W
  float* exps;     // exp(-logit)
  float* masked;   // W * M
  float* slopes;   // of the surrogate
  float* values;   // M, where dweight is wanted
  float* dlogits;  // D * slope, summed over samples
  float* dweight;  // summed over groups, or null

  static size_t need(int64_t size) {
    return 7 * Scratch::need(size);
  }

  // From a scratch that has `need(size)` left.
  BackwardTile(Scratch& scratch, int64_t i_count, int64_t step, int64_t size, bool need_weight)
      : o_count(0),
        i_count(i_count),
        step(step),
        wide(scratch.floats(size)),
        exps(scratch.floats(size)),
        masked(scratch.floats(size)),
        slopes(scratch.floats(size)),
        values(scratch.floats(size)),
        dlogits(scratch.floats(size)),
        dweight(need_weight ? scratch.floats(size) : nullptr) {}
};

template <bool kHard>
void mask_tile(
    const BackwardTile& t,
    const MaskSpec& spec,
    const RowMasks& masks,
    const float* logits,
    int64_t in,
    int64_t first_element,
    uint32_t* words) {
  if (is_granular(spec.layout)) {
    GranularRows<kHard, true> drawn(spec, masks, logits, in, first_element % in, t.i_count);
    for (int64_t o = 0; o < t.o_count; ++o) {
      drawn.draw(first_element / in + o);
      for (int64_t i = 0; i < padded(t.i_count); i += kLanes) {
        const int64_t at = o * t.step + i;
        store(t.masked + at, times_mask<kHard>(drawn.values + i, t.wide + at));
        store(t.slopes + at, load(drawn.slopes + i));
        store(t.values + at, load(drawn.values + i));
      }
    }
    return;
  }
  for (int64_t o = 0; o < t.o_count; ++o) {
    const int64_t at = o * t.step;
    const int64_t element = first_element + o * in;
    const RowNoise noise =
        masks.row(spec.element_offset + element, t.i_count, t.exps + at, logits + element, words);
    const float* wide = t.wide + at;
    float *masked = t.masked + at, *slopes = t.slopes + at, *values = t.values + at;
    const auto fill = [&](auto keep_values) {
      for_mask_vectors<kHard, true>(noise, t.i_count, spec.tau, [=](int64_t i, auto& m) {
        const vf w = load(wide + i);
        store(masked + i, m.apply(m, w));
        store(slopes + i, m.soft.slope);
        if constexpr (decltype(keep_values)::value) {
          store(values + i, m.values(m));
        }
      });
    };
    if (t.dweight != nullptr) {
      fill(std::true_type{});
    } else {
      fill(std::false_type{});
    }
    // the part of the last strip beyond `in`
    for (int64_t i = padded(t.i_count, kLanes); i < padded(t.i_count); i += kLanes) {
      store(masked + i, vf{});
      store(slopes + i, vf{});
      store(values + i, vf{});
    }
  }
}

// Where the sums of dlogits go, times W, once they are complete; null while they are not.
struct Completed {
  float* to;
  int64_t step;
  bool streamed;
};

// Adds D * slopes and D * values of one strip of inputs, starting at column i of the tile.
template <bool kLogits, bool kWeight, bool kComplete>
void add_outer(
    const BackwardTile& t,
    int64_t i,
    const float* dy,
    int64_t dy_step,
    const float* x_strip,
    int64_t rows,
    bool first,
    const Completed& done,
    TileAhead& ahead) {
  // stores may change anything that the compiler does not keep in registers
  const int64_t step = t.step, o_count = t.o_count, to_step = done.step;
  const bool streamed = done.streamed;
  const float* wide = t.wide + i;
  const float* slopes = t.slopes + i;
  const float* values = t.values + i;
  float* dlogits = t.dlogits + i;
  float* dweight = t.dweight + i;
  float* to = kComplete ? done.to + i : nullptr;
  for (int64_t o = 0; o < o_count; o += kTileRows) {
    TileAhead::some(ahead);
    with_rows(o_count - o, [&](auto tile_rows) {
      constexpr int kRows = decltype(tile_rows)::value;
      vf c[kRows][2];
      multiply<kRows, 2>(dy, dy_step, 1, x_strip, kTileColumns, rows, c);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int64_t at = m * step + v * kLanes;
          if constexpr (kLogits) {
            const vf before = first ? vf{} : load(dlogits + at);
            const vf sum = fma(c[m][v], load(slopes + at), before);
            if constexpr (kComplete) {
              float* result = to + m * to_step + v * kLanes;
              if (streamed) {
                stream(result, sum * load(wide + at));
              } else {
                store(result, sum * load(wide + at));
              }
            } else {
              store(dlogits + at, sum);
            }
          }
          if constexpr (kWeight) {
            store(dweight + at, fma(c[m][v], load(values + at), load(dweight + at)));
          }
        }
      }
    });
    dy += kTileRows * dy_step;
    wide += kTileRows * step;
    slopes += kTileRows * step;
    values += kTileRows * step;
    dlogits += kTileRows * step;
    dweight += kTileRows * step;
    to += kComplete ? kTileRows * to_step : 0;
  }
}

// Adds dy (W * M) of one strip of inputs to dx, [row][kTileColumns].
inline void add_dx(
    const BackwardTile& t,
    int64_t i,
    const float* dy,
    int64_t dy_step,
    int64_t rows,
    float* dx_strip,
    bool first,
    TileAhead& ahead) {
  const int64_t step = t.step, o_count = t.o_count;
  const float* masked = t.masked + i;
  for_even_tiles(rows, [&](int64_t r, auto tile_rows) {
    TileAhead::some(ahead);
    constexpr int kRows = decltype(tile_rows)::value;
    vf c[kRows][2];
    multiply<kRows, 2>(dy + r, 1, dy_step, masked, step, o_count, c);
    float* to = dx_strip + r * kTileColumns;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* part = to + m * kTileColumns + v * kLanes;
        store(part, first ? c[m][v] : c[m][v] + load(part));
      }
    }
  });
}

// dlogits = W * (the sums of D * slope), from column i on.
inline void write_dlogits(const BackwardTile& t, int64_t i, float* to, int64_t in) {
  for (int64_t o = 0; o < t.o_count; ++o, to += in) {
    const float* sums = t.dlogits + o * t.step;
    const float* wide = t.wide + o * t.step;
    for (int64_t at = i; at < t.i_count; at += kLanes) {
      store_part(to + at, load(sums + at) * load(wide + at), t.i_count - at);
    }
  }
}

// The same for logits that cover blocks, from weight row o0 and column i0 on.
inline void add_blocks(
    const BlockGradients& sums, int64_t at, const BackwardTile& t, int64_t o0, int64_t i0) {
  for (int64_t o = 0; o < t.o_count; ++o) {
    float* row = t.dlogits + o * t.step;
    for (int64_t i = 0; i < t.i_count; i += kLanes) {
      store(row + i, load(row + i) * load(t.wide + o * t.step + i));
    }
  }
  sums.add(at, t.dlogits, t.step, o0, t.o_count, i0, t.i_count);
}

// dlogits += D * slope and dweight += D * M of one sample, with D in the layout of the tile.
inline void add_sample(const BackwardTile& t, const float* products, bool dlogits, bool first) {
  for (int64_t o = 0; o < t.o_count; ++o) {
    const int64_t row = o * t.step;
    for (int64_t at = row; at < row + t.i_count; at += kLanes) {
      const vf product = load(products + at);
      if (dlogits) {
        const vf before = first ? vf{} : load(t.dlogits + at);
        store(t.dlogits + at, fma(product, load(t.slopes + at), before));
      }
      if (t.dweight != nullptr) {
        store(t.dweight + at, fma(product, load(t.values + at), load(t.dweight + at)));
      }
    }
  }
}

// The gradients from dy as float32 and transposed, [out][dy_step], its rows in group-major order.
template <typename T, bool kHard>
void linear_gradients(
    const LinearProblem& p,
    const Gradients& d,
    const float* dy,
    int64_t dy_step,
    const Runner& runner) {
  const MaskSpec& spec = p.mask;
  const int64_t groups = spec.sets * spec.samples;
  const int64_t in = p.in, out = p.out, rows = p.rows;
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  T* dx = static_cast<T*>(d.dx);
  T* dweight = static_cast<T*>(d.dweight);
  const bool need_outer = d.dlogits != nullptr || dweight != nullptr;
  // whole cache lines only
  const bool blocks = has_blocks(spec.layout);
  const bool streamed = !blocks && spec.sets * out * in >= kStreamed && in % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(d.dlogits) % 64 == 0;
  // Long sums over the batch are cut into equal parts, shorter ones where rows of many steps, large
  // and small, follow each other.
  const int64_t longest = p.steps == 1 ? kSumDepth : kSumDepth / 4;
  const int64_t depth = ceil_div(rows, ceil_div(rows, longest));
  const int64_t o_blocks = ceil_div(out, kBackwardRows);
  // where a row of the group-major order lies in x and dx
  const int64_t rows_at_once = rows / p.steps;
  const auto place = [&](int64_t row) {
    if (p.steps == 1) {
      return row;
    }
    const int64_t group = row / rows, step = row % rows / rows_at_once;
    return (step * groups + group) * rows_at_once + row % rows_at_once;
  };

  if (dx != nullptr || need_outer) {
    // a task owns a block of inputs; without dx, whose sums run over all outputs, also of outputs
    const int64_t o_tasks = dx != nullptr ? 1 : o_blocks;
    // all sets share one weight, so its gradient is summed within a task
    const int64_t set_tasks = dweight != nullptr ? 1 : spec.sets;
    const int64_t sets_each = spec.sets / set_tasks;
    const int64_t rows_each = sets_each * spec.samples * rows;
    // longer rows are fetched faster; shorter ones leave the caches to more rows of x and dx
    const int64_t widest = rows_each > kFewRows ? kBackwardColumns : 2 * kBackwardColumns;
    // narrower than two strips, a task has more to fetch than to do
    const Blocks columns(
        ceil_div(in, kTileColumns), widest / kTileColumns, 2, set_tasks * o_tasks,
        blocks ? kBlockThreads : runner.threads);
    const int64_t width = columns.largest() * kTileColumns;
    const int64_t step = spread(width);
    const double cost =
        static_cast<double>(out * in) * static_cast<double>(groups * (2 * rows + 12)) / kLanes;
    const BlockGradients block_sums(
        spec.layout, spec.sets * o_blocks * columns.count, kBackwardRows, width);

    run_tasks(runner, set_tasks * columns.count * o_tasks, cost, [&](int64_t task) {
      const int64_t o_task = task % o_tasks;
      const int64_t i_block = task / o_tasks % columns.count;
      const int64_t i0 = columns.first(i_block) * kTileColumns;
      const int64_t i1 = columns.first(i_block + 1) * kTileColumns;
      const int64_t first_set = task / o_tasks / columns.count * sets_each;
      const int64_t first_row = first_set * spec.samples * rows;
      thread_local Scratch scratch;
      const int64_t tile_size = kBackwardRows * step;
      const auto lease = scratch.reserve(
          BackwardTile::need(tile_size) + Scratch::need(words_needed(width)) +
          2 * Scratch::need(rows_each * width));
      BackwardTile tile(scratch, (in < i1 ? in : i1) - i0, step, tile_size, dweight != nullptr);
      uint32_t* words = scratch.words(words_needed(width));
      float* x_strips = scratch.floats(rows_each * width);  // [strip][row][kTileColumns]
      float* dx_strips = scratch.floats(rows_each * width);
      const auto strip_at = [&](int64_t i, int64_t row) {
        return i * rows_each + row * kTileColumns;
      };

      if (need_outer) {
        for (int64_t r = 0; r < rows_each; ++r) {
          const T* from = x + place(first_row + r) * in + i0;
          for (int64_t i = 0; i < padded(tile.i_count); i += kLanes) {
            store(
                x_strips + strip_at(i / kTileColumns * kTileColumns, r) + i % kTileColumns,
                load_part(from + i, tile.i_count - i));
          }
        }
      }
      const int64_t last_block = dx != nullptr ? o_blocks : o_task + 1;
      for (int64_t block = o_task; block < last_block; ++block) {
        const int64_t o0 = block * kBackwardRows;
        tile.o_count = out - o0 < kBackwardRows ? out - o0 : kBackwardRows;
        if (dweight != nullptr) {
          std::fill(tile.dweight, tile.dweight + tile.o_count * step, 0.0f);
        }
        for (int64_t set = first_set; set < first_set + sets_each; ++set) {
          const float* logits = logits_of_set(spec, p.logits, set, out, in);
          const float* each = blocks ? nullptr : logits;  // one per weight
          load_tile(
              weight, each, in, o0, tile.o_count, i0, tile.i_count, step, tile.wide, tile.exps);
          const int64_t next_o = block + 1 < last_block ? o0 + kBackwardRows : out;
          const int64_t next_rows = out - next_o < kBackwardRows ? out - next_o : kBackwardRows;
          const int64_t next = next_o * in + i0, here = (set * out + o0) * in + i0;
          TileAhead ahead(
              Lines(weight + next, in, next_rows, tile.i_count),
              blocks ? Lines() : Lines(logits + next, in, next_rows, tile.i_count),
              d.dlogits != nullptr && !streamed && !blocks
                  ? Lines(d.dlogits + here, in, tile.o_count, tile.i_count)
                  : Lines(),
              spec.samples * ceil_div(tile.i_count, kTileColumns) *
                  (ceil_div(tile.o_count, kTileRows) +
                   (dx != nullptr ? ceil_div(rows, kTileRows) : 0)));
          const bool direct = d.dlogits != nullptr && !blocks;
          const Completed done{direct ? d.dlogits + here : nullptr, in, streamed};
          // columns of strips that go straight to their place
          const int64_t whole = blocks ? 0 : tile.i_count / kTileColumns * kTileColumns;
          for (int64_t k = 0; k < spec.samples; ++k) {
            mask_tile<kHard>(
                tile, spec, RowMasks(spec, set, k, spec.tensor_id), logits, in, o0 * in + i0,
                words);
            const int64_t row = (set * spec.samples + k) * rows;  // first of the group
            for (int64_t i = 0; i < tile.i_count; i += kTileColumns) {
              for (int64_t r = 0; need_outer && r < rows; r += depth) {
                const int64_t count = rows - r < depth ? rows - r : depth;
                const float* dy_rows = dy + o0 * dy_step + row + r;
                const float* x_rows = x_strips + strip_at(i, row + r - first_row);
                const bool first = k == 0 && r == 0;
                const bool complete =
                    i + kTileColumns <= whole && k + 1 == spec.samples && r + count == rows;
                const auto add = [&](auto logits, auto weights, auto last) {
                  add_outer<
                      decltype(logits)::value, decltype(weights)::value, decltype(last)::value>(
                      tile, i, dy_rows, dy_step, x_rows, count, first, done, ahead);
                };
                constexpr std::true_type yes;
                constexpr std::false_type no;
                if (d.dlogits == nullptr) {
                  add(no, yes, no);
                } else if (dweight == nullptr) {
                  complete ? add(yes, no, yes) : add(yes, no, no);
                } else {
                  complete ? add(yes, yes, yes) : add(yes, yes, no);
                }
              }
              if (dx != nullptr) {
                float* dx_strip = dx_strips + strip_at(i, row - first_row);
                add_dx(
                    tile, i, dy + o0 * dy_step + row, dy_step, rows, dx_strip, block == 0, ahead);
              }
            }
          }
          if (d.dlogits != nullptr && blocks) {
            const int64_t at = (set * o_blocks + block) * columns.count + i_block;
            add_blocks(block_sums, at, tile, o0, i0);
          } else if (d.dlogits != nullptr) {
            write_dlogits(tile, whole, done.to, in);
          }
        }
        if (dweight != nullptr) {
          for (int64_t o = 0; o < tile.o_count; ++o) {
            narrow_row(tile.dweight + o * step, dweight + (o0 + o) * in + i0, tile.i_count);
          }
        }
      }
      if (streamed) {
        finish_streams();
      }
      if (dx != nullptr) {
        for (int64_t r = 0; r < rows_each; ++r) {
          for (int64_t i = 0; i < tile.i_count; i += kTileColumns) {
            const int64_t left = tile.i_count - i;
            narrow_row(
                dx_strips + strip_at(i, r), dx + place(first_row + r) * in + i0 + i,
                left < kTileColumns ? left : kTileColumns);
          }
        }
      }
    });
    if (d.dlogits != nullptr) {
      block_sums.finish(d.dlogits, logit_count(spec.layout, out, in), o_blocks * columns.count);
    }
  }

  if (d.dbias != nullptr || d.dbias_logits != nullptr) {
    bias_gradients<T, kHard>(
        p, d, static_cast<double>(groups * rows * out) / kLanes, runner,
        [&](int64_t o, int64_t group) { return sum(dy + o * dy_step + group * rows, rows); });
  }
}

template <typename T, bool kHard>
void linear_backward(const LinearProblem& p, const Gradients& d, const Runner& runner) {
  const int64_t out = p.out, all_rows = p.mask.sets * p.mask.samples * p.rows;
  // the rows of dy are too far apart to be read as they are
  const int64_t dy_step = spread(all_rows);
  thread_local Scratch shared_scratch;
  const auto lease = shared_scratch.reserve(Scratch::need(out * dy_step));
  float* dy = shared_scratch.floats(out * dy_step);
  run_tasks(
      runner, ceil_div(out, kBackwardRows), static_cast<double>(all_rows * out) / 2,
      [&](int64_t t) {
        const int64_t o0 = t * kBackwardRows;
        const int64_t o_count = out - o0 < kBackwardRows ? out - o0 : kBackwardRows;
        transpose(
            static_cast<const T*>(d.dy) + o0, out, all_rows, o_count, dy + o0 * dy_step, dy_step);
      });
  linear_gradients<T, kHard>(p, d, dy, dy_step, runner);
}

}  // namespace modmask::MODMASK_CAPABILITY
