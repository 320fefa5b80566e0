// Convolutions with one channel per group: too little work per value for panels of patches. A plane
// of x, zeros around it, stays in the first-level cache while the kernel passes over it; the lanes
// are neighbouring output pixels of a row. At stride s every s-th column of a plane lies together,
// so that they are neighbours in memory too.

namespace modmask::MODMASK_CAPABILITY {

inline bool is_depthwise(const ConvProblem& p) {
  return p.channels == p.conv_groups && p.outputs <= kConvFew * p.conv_groups &&
         p.kernel[0] * p.kernel[1] <= kSumDepth;
}

// A row of either image, in whole tiles.
inline int64_t widest(const ConvProblem& p) {
  return padded(p.size[1] > p.out_size[1] ? p.size[1] : p.out_size[1], kTileColumns);
}

// A plane of rows * columns values, at (h, w) the one of an image at (h - top, w - left), zero
// where there is none and after the columns for another tile.
struct PaddedPlane {
  int64_t rows;
  int64_t columns;
  int64_t top;
  int64_t left;
  int64_t stride;  // of the columns that lie together
  int64_t part;    // from one such part of a row to the next
  int64_t step;    // from row to row

  PaddedPlane(int64_t rows, int64_t columns, int64_t top, int64_t left, int64_t stride = 1)
      : rows(rows),
        columns(columns),
        top(top),
        left(left),
        stride(stride),
        part(padded(ceil_div(columns, stride) + kTileColumns)),
        step(stride * part) {}

  // What the kernel passes over, padding and all.
  static PaddedPlane of_input(const ConvProblem& p) {
    int64_t extent[2];
    for (int i = 0; i < 2; ++i) {
      extent[i] = (p.out_size[i] - 1) * p.stride[i] + (p.kernel[i] - 1) * p.dilation[i] + 1;
    }
    return {extent[0], extent[1], p.padding[0], p.padding[1], p.stride[1]};
  }

  int64_t size() const {
    return rows * step;
  }

  int64_t column(int64_t w) const {
    return w % stride * part + w / stride;
  }

  // Zeros everywhere; fill leaves those around the image.
  void clear(float* to) const {
    std::fill(to, to + size(), 0.0f);
  }

  // `row` must hold `width`, here and below. The image that will be wanted next, `ahead` values on,
  // is fetched meanwhile: it lies on other pages, where the hardware does not look ahead.
  template <typename T>
  void fill(
      const T* image, int64_t height, int64_t width, int64_t ahead, float* row, float* to) const {
    const int64_t count = left + width < columns ? width : columns - left;
    for (int64_t h = 0; h < height && h + top < rows && count > 0; ++h, image += width) {
      float* at = to + (h + top) * step;
      for (int64_t w = 0; w < count; w += 64 / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(image + ahead + w);
      }
      if (stride == 1) {
        widen_row(image, at + left, count);
      } else {
        widen_row(image, row, count);
        split(row, count, at);
      }
    }
  }

  // The other way round, into a whole image.
  template <typename T>
  void read(const float* values, int64_t height, int64_t width, float* row, T* image) const {
    const int64_t count = left + width < columns ? width : columns - left;
    std::fill(row, row + width, 0.0f);
    for (int64_t h = 0; h < height; ++h, image += width) {
      const float* at = values + (h + top) * step;
      if (h + top >= rows) {
        std::fill(row, row + width, 0.0f);
      } else if (stride == 1) {
        narrow_row(at + left, image, width);
        continue;
      } else if (count > 0) {
        join(at, count, row);
      }
      narrow_row(row, image, width);
    }
  }

  // row[i] to the place of column left + i, and back.
  void split(const float* __restrict__ row, int64_t n, float* __restrict__ at) const {
    int64_t done = 0;
    if (stride == 2) {  // a loop that the compiler makes vectors of
      float* __restrict__ one = at + column(left);
      float* __restrict__ other = at + column(left + 1);
      for (int64_t i = 0; i < n / 2; ++i) {
        one[i] = row[2 * i];
        other[i] = row[2 * i + 1];
      }
      done = n / 2 * 2;
    }
    for (int64_t phase = 0; phase < stride; ++phase) {
      float* place = at + column(left + phase) + done / stride;
      for (int64_t i = done + phase; i < n; i += stride) {
        *place++ = row[i];
      }
    }
  }

  void join(const float* __restrict__ at, int64_t n, float* __restrict__ row) const {
    int64_t done = 0;
    if (stride == 2) {
      const float* __restrict__ one = at + column(left);
      const float* __restrict__ other = at + column(left + 1);
      for (int64_t i = 0; i < n / 2; ++i) {
        row[2 * i] = one[i];
        row[2 * i + 1] = other[i];
      }
      done = n / 2 * 2;
    }
    for (int64_t phase = 0; phase < stride; ++phase) {
      const float* place = at + column(left + phase) + done / stride;
      for (int64_t i = done + phase; i < n; i += stride) {
        row[i] = *place++;
      }
    }
  }
};

// Where the values of a kernel lie in a plane.
inline void find_shifts(const ConvProblem& p, const PaddedPlane& plane, int64_t* shifts) {
  for (int64_t h = 0; h < p.kernel[0]; ++h) {
    for (int64_t w = 0; w < p.kernel[1]; ++w) {
      *shifts++ = h * p.dilation[0] * plane.step + plane.column(w * p.dilation[1]);
    }
  }
}

// f(h, w, tile) with the sums over k of weights[k] * plane[h][w] shifted by shifts[k], for all rows
// and for columns in whole tiles.
template <typename F>
MODMASK_INLINE void correlate(
    const float* plane,
    int64_t step,
    const int64_t* shifts,
    const float* weights,
    int64_t kernel,
    int64_t rows,
    int64_t columns,
    const F& f) {
  for (int64_t h = 0; h < rows; ++h) {
    for (int64_t w = 0; w < columns; w += kTileColumns) {
      const float* at = plane + h * step + w;
      vf c[1][2];
      clear(c);
      for (int64_t k = 0; k < kernel; ++k) {
        const vf weight = splat(weights[k]);
        c[0][0] = fma(weight, load(at + shifts[k]), c[0][0]);
        c[0][1] = fma(weight, load(at + shifts[k] + kLanes), c[0][1]);
      }
      f(h, w, c);
    }
  }
}

// sums[k][lane] = (first ? 0 : sums) + sum over pixels of dy * plane shifted by shifts[k].
inline void add_shifted_products(
    const float* plane,
    int64_t step,
    const int64_t* shifts,
    int64_t kernel,
    const float* dy,
    const PaddedPlane& dy_plane,
    float* sums,
    bool first) {
  constexpr int64_t kPanels = kConvSum / kTileColumns;
  const int64_t across = ceil_div(dy_plane.columns, kTileColumns);
  const int64_t panels = dy_plane.rows * across;
  for (int64_t from = 0; from < panels; from += kPanels) {
    const int64_t count = panels - from < kPanels ? panels - from : kPanels;
    for_even_tiles(kernel, [&](int64_t k, auto tile_rows) {
      constexpr int kRows = decltype(tile_rows)::value;
      vf c[kRows][2];
      clear(c);
      int64_t h = from / across, i = from % across;
      for (int64_t j = 0; j < count; ++j) {
        const float* d = dy + h * dy_plane.step + i * kTileColumns;
        const float* at = plane + h * step + i * kTileColumns;
        const vf d0 = load(d), d1 = load(d + kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          c[m][0] = fma(load(at + shifts[k + m]), d0, c[m][0]);
          c[m][1] = fma(load(at + shifts[k + m] + kLanes), d1, c[m][1]);
        }
        if (++i == across) {
          i = 0;
          ++h;
        }
      }
      float* to = sums + k * kTileColumns;
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v, to += kLanes) {
          store(to, first && from == 0 ? c[m][v] : c[m][v] + load(to));
        }
      }
    });
  }
}

// plane shifted by shifts[k] += weights[k] * dy, kernel value by kernel value: passes that touch
// nothing twice.
inline void add_scattered(
    const float* dy,
    const PaddedPlane& dy_plane,
    const float* weights,
    int64_t kernel,
    const int64_t* shifts,
    int64_t step,
    float* plane) {
  for (int64_t k = 0; k < kernel; ++k) {
    const vf weight = splat(weights[k]);
    for (int64_t h = 0; h < dy_plane.rows; ++h) {
      const float* d = dy + h * dy_plane.step;
      float* to = plane + h * step + shifts[k];
      for (int64_t w = 0; w < dy_plane.columns; w += kLanes) {
        store(to + w, fma(weight, load(d + w), load(to + w)));
      }
    }
  }
}

template <typename T, bool kHard>
void depthwise_forward(const ConvProblem& p, T* y, const Runner& runner) {
  const MaskSpec& spec = p.mask;
  const ConvShape s(p);
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  const PaddedPlane plane = PaddedPlane::of_input(p);
  const int64_t row_size = widest(p);
  const int64_t step = spread(padded(s.depth));

  // a task draws the masks of its channel once per sample and slice of the images
  int64_t slices = ceil_div(4 * runner.threads, spec.sets * p.conv_groups);
  slices = slices < p.images ? slices : p.images > 1 ? p.images : 1;
  const double cost = static_cast<double>(spec.sets * spec.samples * p.images * s.out_pixels) *
                      static_cast<double>(p.outputs * s.depth) / kLanes;
  run_tasks(runner, spec.sets * p.conv_groups * slices, cost, [&](int64_t task) {
    const int64_t slice = task % slices;
    const int64_t channel = task / slices % p.conv_groups;
    const int64_t set = task / slices / p.conv_groups;
    const int64_t o0 = channel * s.outputs;
    const float* logits = logits_of_set(spec, p.logits, set, p.outputs, s.depth);

    thread_local Scratch scratch;
    const auto lease = scratch.reserve(
        3 * Scratch::need(s.outputs * step) + Scratch::need(words_needed(step)) +
        2 * Scratch::need(kTileColumns) + Scratch::need(plane.size()) + Scratch::need(row_size) +
        Scratch::need(2 * s.depth));
    float* exps = scratch.floats(s.outputs * step);
    float* wide = scratch.floats(s.outputs * step);
    float* tile = scratch.floats(s.outputs * step);
    uint32_t* words = scratch.words(words_needed(step));
    float* bias_values = scratch.floats(kTileColumns);
    float* bias_exps = scratch.floats(kTileColumns);
    float* values = scratch.floats(plane.size());
    float* row = scratch.floats(row_size);
    int64_t* shifts = scratch.integers(s.depth);

    find_shifts(p, plane, shifts);
    plane.clear(values);
    load_tile(
        weight, has_blocks(spec.layout) ? nullptr : logits, s.depth, o0, s.outputs, 0, s.depth,
        step, wide, exps);
    for (int64_t k = 0; k < spec.samples; ++k) {
      masked_bias<T, kHard>(p, set, k, o0, s.outputs, bias_values, bias_exps, words);
      mask_rows<kHard>(
          spec, RowMasks(spec, set, k, spec.tensor_id), logits, s.depth, o0 * s.depth, s.outputs,
          s.depth, step, wide, exps, tile, words);
      const int64_t first_image = (set * spec.samples + k) * p.images;
      const int64_t end = first_image + (slice + 1) * p.images / slices;
      for (int64_t n = first_image + slice * p.images / slices; n < end; ++n) {
        plane.fill(
            x + (n * p.channels + channel) * p.size[0] * p.size[1], p.size[0], p.size[1],
            n + 1 < end ? p.channels * p.size[0] * p.size[1] : 0, row, values);
        for (int64_t o = 0; o < s.outputs; ++o) {
          T* to = y + (n * p.outputs + o0 + o) * s.out_pixels;
          const vf bias = splat(bias_values[o]);
          correlate(
              values, plane.step * p.stride[0], shifts, tile + o * step, s.depth, p.out_size[0],
              p.out_size[1], [&](int64_t h, int64_t w, const vf(&c)[1][2]) {
                store(row + w, c[0][0] + bias);
                store(row + w + kLanes, c[0][1] + bias);
                if (w + kTileColumns >= p.out_size[1]) {
                  narrow_row(row, to + h * p.out_size[1], p.out_size[1]);
                }
              });
        }
      }
    }
  });
}

template <typename T, bool kHard>
void depthwise_backward(const ConvProblem& p, const Gradients& d, const Runner& runner) {
  const MaskSpec& spec = p.mask;
  const ConvShape s(p);
  const T* x = static_cast<const T*>(p.x);
  const T* dy = static_cast<const T*>(d.dy);
  const T* weight = static_cast<const T*>(p.weight);
  T* dx = static_cast<T*>(d.dx);
  T* dweight = static_cast<T*>(d.dweight);
  const bool need_outer = d.dlogits != nullptr || dweight != nullptr;
  const bool blocks = has_blocks(spec.layout);
  const int64_t in_pixels = p.size[0] * p.size[1];
  const PaddedPlane plane = PaddedPlane::of_input(p);
  const PaddedPlane dy_plane(p.out_size[0], p.out_size[1], 0, 0);
  const int64_t row_step = plane.step * p.stride[0];  // from one output row to the next
  const int64_t step = spread(padded(s.depth));
  const int64_t tile_size = s.outputs * step;

  if (dx != nullptr || need_outer) {
    // all sets share one weight, so its gradient is summed within a task
    const int64_t set_tasks = dweight != nullptr ? 1 : spec.sets;
    const int64_t sets_each = spec.sets / set_tasks;
    const double cost = static_cast<double>(spec.sets * spec.samples * p.images * s.out_pixels) *
                        static_cast<double>(2 * p.outputs * s.depth) / kLanes;
    const BlockGradients block_sums(spec.layout, spec.sets * p.conv_groups, s.outputs, s.depth);
    run_tasks(runner, set_tasks * p.conv_groups, cost, [&](int64_t task) {
      const int64_t channel = task % p.conv_groups;
      const int64_t first_set = task / p.conv_groups * sets_each;
      const int64_t o0 = channel * s.outputs, element = o0 * s.depth;

      thread_local Scratch scratch;
      const auto lease = scratch.reserve(
          BackwardTile::need(tile_size) + Scratch::need(tile_size) +
          Scratch::need(words_needed(step)) + 2 * Scratch::need(plane.size()) +
          Scratch::need(dy_plane.size()) + Scratch::need(widest(p)) +
          Scratch::need(s.outputs * s.depth * kTileColumns) + Scratch::need(2 * s.depth));
      BackwardTile tile(scratch, s.depth, step, tile_size, dweight != nullptr);
      tile.o_count = s.outputs;
      float* products = scratch.floats(tile_size);
      uint32_t* words = scratch.words(words_needed(step));
      float* x_values = scratch.floats(plane.size());
      float* dx_values = scratch.floats(plane.size());
      float* dy_values = scratch.floats(dy_plane.size());
      float* row = scratch.floats(widest(p));
      float* lane_sums = scratch.floats(s.outputs * s.depth * kTileColumns);
      int64_t* shifts = scratch.integers(s.depth);

      find_shifts(p, plane, shifts);
      plane.clear(x_values);
      dy_plane.clear(dy_values);
      if (dweight != nullptr) {
        std::fill(tile.dweight, tile.dweight + tile_size, 0.0f);
      }
      for (int64_t set = first_set; set < first_set + sets_each; ++set) {
        const float* logits = logits_of_set(spec, p.logits, set, p.outputs, s.depth);
        load_tile(
            weight, blocks ? nullptr : logits, s.depth, o0, s.outputs, 0, s.depth, step, tile.wide,
            tile.exps);
        for (int64_t k = 0; k < spec.samples; ++k) {
          mask_tile<kHard>(
              tile, spec, RowMasks(spec, set, k, spec.tensor_id), logits, s.depth, element, words);
          const int64_t first_image = (set * spec.samples + k) * p.images;
          for (int64_t n = first_image; n < first_image + p.images; ++n) {
            const int64_t at = (n * p.channels + channel) * in_pixels;
            const bool last = n + 1 == first_image + p.images;
            if (need_outer) {
              plane.fill(
                  x + at, p.size[0], p.size[1], last ? 0 : p.channels * in_pixels, row, x_values);
            }
            if (dx != nullptr) {
              plane.clear(dx_values);
            }
            for (int64_t o = 0; o < s.outputs; ++o) {
              dy_plane.fill(
                  dy + (n * p.outputs + o0 + o) * s.out_pixels, p.out_size[0], p.out_size[1],
                  last ? 0 : p.outputs * s.out_pixels, row, dy_values);
              if (need_outer) {
                add_shifted_products(
                    x_values, row_step, shifts, s.depth, dy_values, dy_plane,
                    lane_sums + o * s.depth * kTileColumns, n == first_image);
              }
              if (dx != nullptr) {
                add_scattered(
                    dy_values, dy_plane, tile.masked + o * step, s.depth, shifts, row_step,
                    dx_values);
              }
            }
            if (dx != nullptr) {
              plane.read(dx_values, p.size[0], p.size[1], row, dx + at);
            }
          }
          if (need_outer) {
            for (int64_t o = 0; o < s.outputs; ++o) {
              add_lanes(lane_sums + o * s.depth * kTileColumns, s.depth, 1, products + o * step, 1);
            }
            add_sample(tile, products, d.dlogits != nullptr, k == 0);
          }
        }
        if (d.dlogits != nullptr && blocks) {
          add_blocks(block_sums, set * p.conv_groups + channel, tile, o0, 0);
        } else if (d.dlogits != nullptr) {
          write_dlogits(tile, 0, d.dlogits + set * p.outputs * s.depth + element, s.depth);
        }
      }
      for (int64_t o = 0; dweight != nullptr && o < s.outputs; ++o) {
        narrow_row(tile.dweight + o * step, dweight + element + o * s.depth, s.depth);
      }
    });
    if (d.dlogits != nullptr) {
      block_sums.finish(d.dlogits, logit_count(spec.layout, p.outputs, s.depth), p.conv_groups);
    }
  }
  conv_bias_gradients<T, kHard>(p, d, runner);
}

}  // namespace modmask::MODMASK_CAPABILITY
