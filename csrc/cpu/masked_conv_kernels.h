// y = conv(x, W * M) and its gradients, as products with the patches of x that an output pixel
// sees. Patches exist only as panels of kTileColumns pixels, a masked weight only as a tile per
// thread.
//
// The weight is a matrix [outputs][depth], depth = channels of a convolution group * kernel size:
//   y[o][pixel]        = W*M tile [o][k]          x  patches [k][pixel]     (lanes: pixels)
//   dpatches[k][pixel] = W*M tile, by columns     x  dy [o][pixel]          (lanes: pixels)
//   D[k][o]            = patches [k][pixel]       x  dy transposed          (lanes: outputs)
// with dlogits = sum over samples of D^T * W * slope and dweight = sum over groups of D^T * M.

namespace modmask::MODMASK_CAPABILITY {

constexpr int64_t kConvRows = 192;      // most rows of a weight tile
constexpr int64_t kConvTile = 1 << 16;  // most floats of a forward tile
constexpr int64_t kConvDepth = 256;     // patch values per panel, forward
constexpr int64_t kConvBackwardRows = 192;
constexpr int64_t kConvBackwardDepth = 144;
constexpr int64_t kConvPixels = 512;  // output pixels whose patches are read from one copy of x
constexpr int64_t kConvFew = 4;       // outputs per group for which pixels fill lanes better
constexpr int64_t kConvSum = 64;      // pixels summed in one go; the library's sums are short too
constexpr int64_t kConvSlice = 2048;  // pixels worth drawing the masks once more for a thread

// Sizes of a problem, per convolution group.
struct ConvShape {
  int64_t channels;
  int64_t outputs;
  int64_t kernel;  // values of one kernel
  int64_t depth;
  int64_t out_pixels;  // of an image
  int64_t width;       // of a padded row of x

  explicit ConvShape(const ConvProblem& p)
      : channels(p.channels / p.conv_groups),
        outputs(p.outputs / p.conv_groups),
        kernel(p.kernel[0] * p.kernel[1]),
        depth(channels * kernel),
        out_pixels(p.out_size[0] * p.out_size[1]),
        width((p.out_size[1] - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1) {}
};

// Output pixels that are handled together: whole images, or some rows of one image.
struct PixelBlock {
  int64_t image;  // within the group
  int64_t images;
  int64_t row;
  int64_t rows;

  int64_t pixels(const ConvProblem& p) const {
    return images * rows * p.out_size[1];
  }

  bool as_large_as(const PixelBlock& other) const {
    return images == other.images && rows == other.rows;
  }
};

class PixelBlocks {
 public:
  explicit PixelBlocks(const ConvProblem& p) : images_(p.images), rows_(p.out_size[0]) {
    const int64_t width = p.out_size[1];
    images_each_ = kConvPixels / (rows_ * width);
    images_each_ = images_each_ > 1 ? (images_each_ < images_ ? images_each_ : images_) : 1;
    rows_each_ = kConvPixels / width;
    rows_each_ = rows_each_ > 1 ? (rows_each_ < rows_ ? rows_each_ : rows_) : 1;
    // bands of nearly equal height
    rows_each_ = ceil_div(rows_, ceil_div(rows_, rows_each_));
    bands_ = ceil_div(rows_, rows_each_);
  }

  int64_t count() const {
    return ceil_div(images_, images_each_) * bands_;
  }

  PixelBlock block(int64_t i) const {
    const int64_t image = i / bands_ * images_each_, row = i % bands_ * rows_each_;
    return {
        image, images_ - image < images_each_ ? images_ - image : images_each_, row,
        rows_ - row < rows_each_ ? rows_ - row : rows_each_};
  }

  PixelBlock largest() const {
    return {0, images_each_, 0, rows_each_};
  }

 private:
  int64_t images_;
  int64_t rows_;
  int64_t images_each_;
  int64_t rows_each_;
  int64_t bands_;
};

// f(i, integral_constant<lanes>) for parts of kLanes, 4 and 1 that make up n; rows are short here.
template <typename F>
MODMASK_INLINE void for_parts(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    f(i, std::integral_constant<int, kLanes>{});
  }
  if constexpr (kLanes > 4) {
    for (; i + 4 <= n; i += 4) {
      f(i, std::integral_constant<int, 4>{});
    }
  }
  for (; i < n; ++i) {
    f(i, std::integral_constant<int, 1>{});
  }
}

MODMASK_INLINE void add4(float* to, const float* from) {
  using vf4 = float __attribute__((vector_size(16)));
  vf4 a, b;
  __builtin_memcpy(&a, to, 16);
  __builtin_memcpy(&b, from, 16);
  a += b;
  __builtin_memcpy(to, &a, 16);
}

// Part of x as float32 with its padding, [image][channel][row][column], as a block of pixels and a
// range of channels need it.
class Planes {
 public:
  Planes(const ConvProblem& p, const ConvShape& s, const PixelBlock& largest, int64_t channels)
      : p_(p),
        width_(s.width),
        plane_(rows_of(largest) * s.width),
        image_(channels * plane_),
        size_(largest.images * image_) {}

  int64_t size() const {
    return size_;
  }

  // Where the patch of each pixel starts.
  void find_pixels(const PixelBlock& block, int64_t* offsets) const {
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t r = 0; r < block.rows; ++r) {
        for (int64_t c = 0; c < p_.out_size[1]; ++c) {
          *offsets++ = n * image_ + r * p_.stride[0] * width_ + c * p_.stride[1];
        }
      }
    }
  }

  // Where each value of a patch lies, from its start.
  void find_values(int64_t channels, int64_t* offsets) const {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t h = 0; h < p_.kernel[0]; ++h) {
        for (int64_t w = 0; w < p_.kernel[1]; ++w) {
          *offsets++ = c * plane_ + h * p_.dilation[0] * width_ + w * p_.dilation[1];
        }
      }
    }
  }

  // `x` at the first image and channel.
  template <typename T>
  void fill(const T* x, const PixelBlock& block, int64_t channels, float* planes) const {
    std::fill(planes, planes + block.images * image_, 0.0f);
    for_rows(block, channels, [&](int64_t at, int64_t plane, int64_t row) {
      const T* from = x + (plane * p_.size[0] + row) * p_.size[1] + first() - p_.padding[1];
      float* to = planes + at + first();
      for_parts(end() - first(), [&](int64_t i, auto lanes) {
        if constexpr (decltype(lanes)::value == 1) {
          to[i] = widen(from[i]);
        } else if constexpr (decltype(lanes)::value == 4 && __is_same(T, float)) {
          __builtin_memcpy(to + i, from + i, 16);
        } else if constexpr (decltype(lanes)::value == 4) {
          for (int64_t j = i; j < i + 4; ++j) {
            to[j] = widen(from[j]);
          }
        } else {
          store(to + i, load_wide(from + i));
        }
      });
    });
  }

  // Adds to `sums`, which has the layout of x with `image_step` floats per image.
  void add_to(
      float* sums,
      int64_t image_step,
      const PixelBlock& block,
      int64_t channels,
      const float* planes) const {
    for_rows(block, channels, [&](int64_t at, int64_t plane, int64_t row) {
      const int64_t image = plane / p_.channels, channel = plane % p_.channels;
      const float* from = planes + at + first();
      float* to = sums + image * image_step + (channel * p_.size[0] + row) * p_.size[1] + first() -
                  p_.padding[1];
      for_parts(end() - first(), [&](int64_t i, auto lanes) {
        if constexpr (decltype(lanes)::value == 1) {
          to[i] += from[i];
        } else if constexpr (decltype(lanes)::value == 4) {
          add4(to + i, from + i);
        } else {
          store(to + i, load(to + i) + load(from + i));
        }
      });
    });
  }

 private:
  int64_t rows_of(const PixelBlock& block) const {
    return (block.rows - 1) * p_.stride[0] + (p_.kernel[0] - 1) * p_.dilation[0] + 1;
  }

  // Columns [first, end) of a padded row lie in x.
  int64_t first() const {
    return p_.padding[1] < width_ ? p_.padding[1] : width_;
  }

  int64_t end() const {
    const int64_t e = p_.padding[1] + p_.size[1] < width_ ? p_.padding[1] + p_.size[1] : width_;
    return e > first() ? e : first();
  }

  // f(place in the planes, plane of x counted from the first image and channel, row of x)
  template <typename F>
  void for_rows(const PixelBlock& block, int64_t channels, const F& f) const {
    const int64_t top = block.row * p_.stride[0] - p_.padding[0];  // row of x of the first one here
    const int64_t r0 = top < 0 ? -top : 0, rows = rows_of(block);
    const int64_t r1 = rows < p_.size[0] - top ? rows : p_.size[0] - top;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t r = r0; r < r1; ++r) {
          f(n * image_ + c * plane_ + r * width_, (block.image + n) * p_.channels + c, top + r);
        }
      }
    }
  }

  const ConvProblem& p_;
  int64_t width_;
  int64_t plane_;
  int64_t image_;
  int64_t size_;
};

// Where each pixel of a block lies in y, from the block's first pixel on.
inline void find_outputs(const ConvProblem& p, const PixelBlock& block, int64_t* offsets) {
  const int64_t pixels = p.out_size[0] * p.out_size[1];
  for (int64_t n = 0; n < block.images; ++n) {
    for (int64_t i = 0; i < block.rows * p.out_size[1]; ++i) {
      *offsets++ = n * p.outputs * pixels + i;
    }
  }
}

// How the pixels of a panel lie in memory.
enum class Run { kWhole, kQuads, kSingle };

inline Run run_of(const int64_t* pixels, int64_t lanes) {
  if (lanes < kTileColumns) {
    return Run::kSingle;
  }
  // offsets grow from pixel to pixel
  if (pixels[kTileColumns - 1] - pixels[0] == kTileColumns - 1) {
    return Run::kWhole;
  }
  for (int64_t i = 0; i < kTileColumns; i += 4) {
    if (pixels[i + 3] - pixels[i] != 3) {
      return Run::kSingle;
    }
  }
  return Run::kQuads;
}

// panel[v][lane] = from[values[v] + pixels[lane]], zero beyond `lanes`.
template <typename T>
void gather(
    const T* from,
    const int64_t* pixels,
    int64_t lanes,
    const int64_t* values,
    int64_t count,
    float* panel) {
  const Run run = run_of(pixels, lanes);
  if (run == Run::kWhole) {
    for (int64_t v = 0; v < count; ++v, panel += kTileColumns) {
      const T* p = from + values[v] + pixels[0];
      store(panel, load_wide(p));
      store(panel + kLanes, load_wide(p + kLanes));
    }
    return;
  }
  for (int64_t v = 0; v < count; ++v, panel += kTileColumns) {
    const T* p = from + values[v];
    if (run == Run::kQuads) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kTileColumns; i += 4) {
        if constexpr (__is_same(T, float)) {
          __builtin_memcpy(panel + i, p + pixels[i], 16);
        } else {
          for (int64_t j = i; j < i + 4; ++j) {
            panel[j] = widen(p[pixels[j]]);
          }
        }
      }
    } else {
      for (int64_t i = 0; i < lanes; ++i) {
        panel[i] = widen(p[pixels[i]]);
      }
      std::fill(panel + lanes, panel + kTileColumns, 0.0f);
    }
  }
}

// Adds panels of patches, `step` apart, to the planes they come from. The same value of all
// channels and panels comes before the next: neighbours in a kernel overlap, and a sum just stored
// would have to be waited for.
inline void scatter(
    const float* panels,
    int64_t step,
    const int64_t* pixels,
    int64_t count,
    const int64_t* values,
    int64_t channels,
    int64_t kernel,
    float* planes) {
  for (int64_t v0 = 0; v0 < kernel; ++v0) {
    for (int64_t v = v0; v < channels * kernel; v += kernel) {
      float* to = planes + values[v];
      const float* from = panels + v * kTileColumns;
      for (int64_t i = 0; i < count; i += kTileColumns, from += step) {
        const int64_t* at = pixels + i;
        const int64_t lanes = count - i < kTileColumns ? count - i : kTileColumns;
        const Run run = run_of(at, lanes);
        if (run == Run::kWhole) {
          float* p = to + at[0];
          store(p, load(p) + load(from));
          store(p + kLanes, load(p + kLanes) + load(from + kLanes));
        } else if (run == Run::kQuads) {
#pragma GCC unroll 4
          for (int64_t j = 0; j < kTileColumns; j += 4) {
            add4(to + at[j], from + j);
          }
        } else {
          for (int64_t j = 0; j < lanes; ++j) {
            to[at[j]] += from[j];
          }
        }
      }
    }
  }
}

// ---- forward ----

// The product of weight tiles with the patches of some blocks of pixels, kept until all channels
// are summed.
class PatchProduct {
 public:
  // `chunk` blocks at a time, of at most `rows` outputs
  PatchProduct(
      const ConvProblem& p,
      const ConvShape& s,
      const PixelBlocks& pixels,
      int64_t panel_channels,
      int64_t rows,
      int64_t chunk)
      : p_(p),
        s_(s),
        pixels_(pixels),
        channels_(panel_channels),
        planes_of_(p, s, pixels.largest(), panel_channels),
        block_pixels_(padded(pixels.largest().pixels(p), kTileColumns)),
        step_(spread(chunk * block_pixels_)),
        rows_(rows) {}

  size_t need() const {
    return Scratch::need(planes_of_.size()) + Scratch::need(channels_ * s_.kernel * kTileColumns) +
           Scratch::need(rows_ * step_) + Scratch::need(2 * block_pixels_) +
           Scratch::need(2 * channels_ * s_.kernel);
  }

  // The scratch has been reserved with `need`.
  void take(Scratch& scratch) {
    planes_ = scratch.floats(planes_of_.size());
    panel_ = scratch.floats(channels_ * s_.kernel * kTileColumns);
    result_ = scratch.floats(rows_ * step_);
    starts_ = scratch.integers(block_pixels_);
    values_ = scratch.integers(channels_ * s_.kernel);
    planes_of_.find_values(channels_, values_);
  }

  // Adds the channels [t0, t0 + t_count) of a convolution group, which the tile holds, of blocks
  // [b0, b1); x at the first image.
  template <typename T>
  void add(
      const T* x,
      int64_t conv_group,
      const float* tile,
      int64_t tile_step,
      int64_t o_count,
      int64_t t0,
      int64_t t_count,
      int64_t b0,
      int64_t b1) {
    TileAhead nothing_ahead{Lines(), Lines(), Lines(), 1};
    for (int64_t b = b0; b < b1; ++b) {
      const PixelBlock block = pixels_.block(b);
      const int64_t count = block.pixels(p_);
      if (!block.as_large_as(found_)) {
        planes_of_.find_pixels(block, starts_);
        found_ = block;
      }
      for (int64_t c0 = 0; c0 < t_count; c0 += channels_) {
        const int64_t c_count = t_count - c0 < channels_ ? t_count - c0 : channels_;
        const int64_t channel = conv_group * s_.channels + t0 + c0;
        planes_of_.fill(x + channel * p_.size[0] * p_.size[1], block, c_count, planes_);
        for (int64_t i = 0; i < count; i += kTileColumns) {
          const int64_t lanes = count - i < kTileColumns ? count - i : kTileColumns;
          gather(planes_, starts_ + i, lanes, values_, c_count * s_.kernel, panel_);
          forward_panel<2>(
              tile + c0 * s_.kernel, tile_step, o_count, panel_, c_count * s_.kernel,
              result_ + (b - b0) * block_pixels_ + i, step_, t0 == 0 && c0 == 0, nothing_ahead);
        }
      }
    }
  }

  // Adds the bias and writes the outputs [o0, o0 + o_count) of all channels; image(n) is the place
  // of the n-th image of y.
  template <typename Image>
  void write(
      const float* bias, int64_t o0, int64_t o_count, int64_t b0, int64_t b1, const Image& image) {
    for (int64_t b = b0; b < b1; ++b) {
      const PixelBlock block = pixels_.block(b);
      const int64_t each = block.rows * p_.out_size[1];
      for (int64_t n = 0; n < block.images; ++n) {
        auto* to = image(block.image + n);
        for (int64_t o = 0; o < o_count; ++o) {
          float* from = result_ + o * step_ + (b - b0) * block_pixels_ + n * each;
          for (int64_t i = 0; i < each; ++i) {
            from[i] += bias[o];
          }
          narrow_row(from, to + (o0 + o) * s_.out_pixels + block.row * p_.out_size[1], each);
        }
      }
    }
  }

 private:
  const ConvProblem& p_;
  const ConvShape& s_;
  const PixelBlocks& pixels_;
  int64_t channels_;
  Planes planes_of_;
  int64_t block_pixels_;
  int64_t step_;
  int64_t rows_;
  PixelBlock found_{};  // whose pixels `starts_` holds
  float* planes_ = nullptr;
  float* panel_ = nullptr;
  float* result_ = nullptr;
  int64_t* starts_ = nullptr;
  int64_t* values_ = nullptr;
};

// Channels of a weight tile and of a panel. The tile holds whole channels, and as many of them as
// possible; the cut decides where sums are rounded, so it must not depend on the threads.
struct ChannelCut {
  int64_t tile;
  int64_t panel;
  bool one_tile;
  int64_t step;  // from row to row of a tile

  explicit ChannelCut(const ConvShape& s) {
    const int64_t most_rows = s.outputs < kConvRows ? s.outputs : kConvRows;
    tile = kConvTile / (most_rows * s.kernel);
    tile = tile > 1 ? tile : 1;
    tile = ceil_div(s.channels, ceil_div(s.channels, tile));
    panel = kConvDepth / s.kernel;
    panel = panel > 1 ? panel : 1;
    panel = ceil_div(tile, ceil_div(tile, panel));
    one_tile = tile == s.channels;
    step = spread(padded(tile * s.kernel));
  }
};

template <typename T, bool kHard>
void conv_forward(const ConvProblem& p, T* y, const Runner& runner) {
  const MaskSpec& spec = p.mask;
  const ConvShape s(p);
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t groups = spec.sets * spec.samples;
  const PixelBlocks pixels(p);
  const int64_t block_pixels = padded(pixels.largest().pixels(p), kTileColumns);

  // a task draws the masks of its rows once per sample and slice of the pixels
  const int64_t others = spec.sets * p.conv_groups * ceil_div(s.outputs, kConvRows);
  int64_t slices = ceil_div(4 * runner.threads, others);
  const int64_t most = p.images * s.out_pixels / kConvSlice;
  slices = slices < most ? slices : most > 1 ? most : 1;
  slices = slices < pixels.count() ? slices : pixels.count();
  const Blocks rows(
      s.outputs, kConvRows, 2 * kTileRows, spec.sets * p.conv_groups * slices, runner.threads);
  const ChannelCut cut(s);
  // blocks of pixels whose results are kept while the masks change
  const int64_t chunk = cut.one_tile ? 1 : ceil_div(kConvSlice, block_pixels);

  const double cost = static_cast<double>(groups * p.images * s.out_pixels) *
                      static_cast<double>(p.outputs * s.depth) / kLanes;
  run_tasks(runner, spec.sets * p.conv_groups * rows.count * slices, cost, [&](int64_t task) {
    const int64_t slice = task % slices;
    const int64_t row_block = task / slices % rows.count;
    const int64_t conv_group = task / slices / rows.count % p.conv_groups;
    const int64_t set = task / slices / rows.count / p.conv_groups;
    const int64_t o0 = conv_group * s.outputs + rows.first(row_block);
    const int64_t o_count = rows.first(row_block + 1) - rows.first(row_block);
    const int64_t first_block = slice * pixels.count() / slices;
    const int64_t last_block = (slice + 1) * pixels.count() / slices;
    const float* logits = logits_of_set(spec, p.logits, set, p.outputs, s.depth);
    const float* each = has_blocks(spec.layout) ? nullptr : logits;  // one per weight

    thread_local Scratch scratch;
    const int64_t tile_size = rows.largest() * cut.step;
    const int64_t word_count = words_needed(cut.step > kConvRows ? cut.step : kConvRows);
    PatchProduct product(p, s, pixels, cut.panel, rows.largest(), chunk);
    const auto lease = scratch.reserve(
        3 * Scratch::need(tile_size) + Scratch::need(word_count) + 2 * Scratch::need(kConvRows) +
        product.need());
    float* exps = scratch.floats(tile_size);
    float* wide = scratch.floats(tile_size);
    float* tile = scratch.floats(tile_size);
    uint32_t* words = scratch.words(word_count);
    float* bias_values = scratch.floats(kConvRows);
    float* bias_exps = scratch.floats(kConvRows);
    product.take(scratch);

    for (int64_t k = 0; k < spec.samples; ++k) {
      const RowMasks masks(spec, set, k, spec.tensor_id);
      const int64_t first_image = (set * spec.samples + k) * p.images;
      masked_bias<T, kHard>(p, set, k, o0, o_count, bias_values, bias_exps, words);
      for (int64_t b0 = first_block; b0 < last_block; b0 += chunk) {
        const int64_t b1 = last_block - b0 < chunk ? last_block : b0 + chunk;
        for (int64_t t0 = 0; t0 < s.channels; t0 += cut.tile) {
          const int64_t t_count = s.channels - t0 < cut.tile ? s.channels - t0 : cut.tile;
          const int64_t depth = t_count * s.kernel;
          if (!cut.one_tile || (k == 0 && b0 == first_block)) {
            load_tile(
                weight, each, s.depth, o0, o_count, t0 * s.kernel, depth, cut.step, wide, exps);
          }
          if (!cut.one_tile || b0 == first_block) {
            mask_rows<kHard>(
                spec, masks, logits, s.depth, o0 * s.depth + t0 * s.kernel, o_count, depth,
                cut.step, wide, exps, tile, words);
          }
          product.add(
              x + first_image * p.channels * p.size[0] * p.size[1], conv_group, tile, cut.step,
              o_count, t0, t_count, b0, b1);
        }
        product.write(bias_values, o0, o_count, b0, b1, [&](int64_t n) {
          return y + (first_image + n) * p.outputs * s.out_pixels;
        });
      }
    }
  });
}

// ---- backward ----

// sums[k][o] = (first ? 0 : sums) + sum over pixels of patches[k] * dy[o]. Panels of patches lie
// `patch_step` apart, pixels of dy and rows of sums `step`.
inline void add_patch_products(
    const float* patches,
    int64_t patch_step,
    int64_t depth,
    const float* dy,
    int64_t step,
    int64_t outputs,
    int64_t panels,
    float* sums,
    bool first) {
  for (int64_t o = 0; o < outputs; o += kTileColumns) {
    for_even_tiles(depth, [&](int64_t k, auto tile_rows) {
      constexpr int kRows = decltype(tile_rows)::value;
      vf c[kRows][2];
      clear(c);
      for (int64_t i = 0; i < panels; ++i) {
        accumulate<kRows, 2>(
            patches + i * patch_step + k * kTileColumns, kTileColumns, 1,
            dy + i * kTileColumns * step + o, step, kTileColumns, c);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          float* to = sums + (k + m) * step + o + v * kLanes;
          store(to, first ? c[m][v] : c[m][v] + load(to));
        }
      }
    });
  }
}

// The same for a few outputs: pixels in the lanes, panels of dy as they are, `dy_step` apart, and
// sums [o][k][lane] that are still to be added up over the lanes.
inline void add_few_patch_products(
    const float* patches,
    int64_t patch_step,
    int64_t depth,
    const float* dy,
    int64_t dy_step,
    int64_t outputs,
    int64_t panels,
    float* sums,
    bool first) {
  for (int64_t o = 0; o < outputs; ++o) {
    for_even_tiles(depth, [&](int64_t k, auto tile_rows) {
      constexpr int kRows = decltype(tile_rows)::value;
      vf c[kRows][2];
      clear(c);
      for (int64_t i = 0; i < panels; ++i) {
        const float* d = dy + i * dy_step + o * kTileColumns;
        const float* x = patches + i * patch_step + k * kTileColumns;
        const vf d0 = load(d), d1 = load(d + kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          c[m][0] = fma(load(x + m * kTileColumns), d0, c[m][0]);
          c[m][1] = fma(load(x + m * kTileColumns + kLanes), d1, c[m][1]);
        }
      }
      float* to = sums + (o * depth + k) * kTileColumns;
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v, to += kLanes) {
          store(to, first ? c[m][v] : c[m][v] + load(to));
        }
      }
    });
  }
}

// products[k][o] = sum over lanes of sums[o][k][lane]
inline void add_lanes(
    const float* sums, int64_t depth, int64_t outputs, float* products, int64_t step) {
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t k = 0; k < depth; ++k, sums += kTileColumns) {
      float total = 0.0f;
      for (int64_t i = 0; i < kTileColumns; ++i) {
        total += sums[i];
      }
      products[k * step + o] = total;
    }
  }
}

// panel[k][lane] = sum over outputs of W*M [o][k] * dy[o][lane]
inline void multiply_columns(const BackwardTile& t, int64_t depth, const float* dy, float* panel) {
  for_even_tiles(depth, [&](int64_t k, auto tile_rows) {
    constexpr int kRows = decltype(tile_rows)::value;
    vf c[kRows][2];
    multiply<kRows, 2>(t.masked + k, 1, t.step, dy, kTileColumns, t.o_count, c);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        store(panel + (k + m) * kTileColumns + v * kLanes, c[m][v]);
      }
    }
  });
}

template <typename T, bool kHard>
void conv_bias_gradients(const ConvProblem& p, const Gradients& d, const Runner& runner) {
  const int64_t out_pixels = ConvShape(p).out_pixels;
  const T* dy = static_cast<const T*>(d.dy);
  const double cost =
      static_cast<double>(p.mask.sets * p.mask.samples * p.images * p.outputs * out_pixels) /
      kLanes;
  if (d.dbias != nullptr || d.dbias_logits != nullptr) {
    bias_gradients<T, kHard>(p, d, cost, runner, [&](int64_t o, int64_t group) {
      double total = 0.0;
      float part[kConvPixels];
      for (int64_t n = 0; n < p.images; ++n) {
        const T* from = dy + ((group * p.images + n) * p.outputs + o) * out_pixels;
        for (int64_t i = 0; i < out_pixels; i += kConvPixels) {
          const int64_t count = out_pixels - i < kConvPixels ? out_pixels - i : kConvPixels;
          widen_row(from + i, part, count);
          total += sum(part, count);
        }
      }
      return total;
    });
  }
}

template <typename T, bool kHard>
void conv_backward(const ConvProblem& p, const Gradients& d, const Runner& runner) {
  const MaskSpec& spec = p.mask;
  const ConvShape s(p);
  const T* x = static_cast<const T*>(p.x);
  const T* dy = static_cast<const T*>(d.dy);
  const T* weight = static_cast<const T*>(p.weight);
  T* dx = static_cast<T*>(d.dx);
  T* dweight = static_cast<T*>(d.dweight);
  const int64_t groups = spec.sets * spec.samples;
  const int64_t in_pixels = p.size[0] * p.size[1];
  const bool need_outer = d.dlogits != nullptr || dweight != nullptr;
  const bool blocks = has_blocks(spec.layout);

  if (dx != nullptr || need_outer) {
    const PixelBlocks pixels(p);
    const PixelBlock largest = pixels.largest();
    const int64_t block_pixels = padded(largest.pixels(p), kTileColumns);
    constexpr int64_t kPanels = kConvSum / kTileColumns;

    // blocks of outputs of whole panels
    const int64_t o_each =
        padded(ceil_div(s.outputs, ceil_div(s.outputs, kConvBackwardRows)), kTileColumns);
    const int64_t o_blocks = ceil_div(s.outputs, o_each);
    // a task owns some channels; without dx, whose sums run over all outputs, also of outputs
    const int64_t o_tasks = dx != nullptr ? 1 : o_blocks;
    // all sets share one weight, so its gradient is summed within a task
    const int64_t set_tasks = dweight != nullptr ? 1 : spec.sets;
    const int64_t sets_each = spec.sets / set_tasks;
    const int64_t widest = kConvBackwardDepth / s.kernel;
    const int64_t narrowest = kConvBackwardDepth / 6 / s.kernel;
    const Blocks channels(
        s.channels, widest > 1 ? widest : 1, narrowest > 1 ? narrowest : 1,
        set_tasks * p.conv_groups * o_tasks, blocks ? kBlockThreads : runner.threads);
    const int64_t most_depth = channels.largest() * s.kernel;
    const int64_t step = spread(padded(most_depth));
    const int64_t o_step = spread(o_each);
    const bool few = s.outputs <= kConvFew;
    const int64_t few_size = few ? s.outputs * most_depth * kTileColumns : 0;
    const int64_t dy_step = few ? s.outputs * kTileColumns : 0;  // from panel to panel
    const Planes planes_of(p, s, largest, channels.largest());
    // dx in float32 where that is not its type: the planes of a task's channels
    const bool own_sums = dx != nullptr && !__is_same(T, float);

    const double cost = static_cast<double>(groups * p.images * s.out_pixels) *
                        static_cast<double>(2 * p.outputs * s.depth) / kLanes;
    const int64_t tasks = set_tasks * p.conv_groups * channels.count * o_tasks;
    const int64_t tiles_each = p.conv_groups * o_blocks * channels.count;
    const BlockGradients block_sums(spec.layout, spec.sets * tiles_each, o_each, most_depth);
    run_tasks(runner, tasks, cost, [&](int64_t task) {
      const int64_t o_task = task % o_tasks;
      const int64_t channel_block = task / o_tasks % channels.count;
      const int64_t conv_group = task / o_tasks / channels.count % p.conv_groups;
      const int64_t first_set = task / o_tasks / channels.count / p.conv_groups * sets_each;
      const int64_t c0 = channels.first(channel_block);
      const int64_t c_count = channels.first(channel_block + 1) - c0;
      const int64_t depth = c_count * s.kernel;
      const int64_t channel = conv_group * s.channels + c0;
      const int64_t first_image = first_set * spec.samples * p.images;
      const int64_t images = sets_each * spec.samples * p.images;

      thread_local Scratch scratch;
      const int64_t tile_size = o_each * step;
      const int64_t sum_size = own_sums ? images * channels.largest() * in_pixels : 0;
      const auto lease = scratch.reserve(
          BackwardTile::need(tile_size) + Scratch::need(tile_size) +
          Scratch::need(words_needed(step)) + 2 * Scratch::need(planes_of.size()) +
          2 * Scratch::need(kPanels * most_depth * kTileColumns) +
          Scratch::need((few ? kPanels : 1) * o_each * kTileColumns) +
          Scratch::need(kConvSum * o_step) + Scratch::need(most_depth * o_step) +
          Scratch::need(few_size) + Scratch::need(sum_size) + 2 * Scratch::need(2 * block_pixels) +
          Scratch::need(2 * most_depth) + Scratch::need(2 * o_each));
      BackwardTile tile(scratch, depth, step, tile_size, dweight != nullptr);
      float* turned = scratch.floats(tile_size);  // D, turned to the layout of the weight
      uint32_t* words = scratch.words(words_needed(step));
      float* planes = scratch.floats(planes_of.size());
      float* dplanes = scratch.floats(planes_of.size());
      float* patches = scratch.floats(kPanels * most_depth * kTileColumns);
      float* dy_panels = scratch.floats((few ? kPanels : 1) * o_each * kTileColumns);
      float* dy_turned = scratch.floats(kConvSum * o_step);  // [pixel][o]
      float* products = scratch.floats(most_depth * o_step);
      float* lane_sums = scratch.floats(few_size);
      float* dpatches = scratch.floats(kPanels * most_depth * kTileColumns);
      float* sums = scratch.floats(sum_size);
      int64_t* starts = scratch.integers(block_pixels);
      int64_t* places = scratch.integers(block_pixels);
      int64_t* values = scratch.integers(most_depth);
      int64_t* outputs = scratch.integers(o_each);

      planes_of.find_values(c_count, values);
      PixelBlock found{};  // whose pixels `starts` and `places` hold
      for (int64_t o = 0; o < o_each; ++o) {
        outputs[o] = o * s.out_pixels;
      }
      std::fill(dy_turned, dy_turned + kConvSum * o_step, 0.0f);
      int64_t sums_step = c_count * in_pixels;  // from image to image
      if constexpr (__is_same(T, float)) {
        if (dx != nullptr) {
          sums = dx + (first_image * p.channels + channel) * in_pixels;
          sums_step = p.channels * in_pixels;
        }
      }
      for (int64_t n = 0; dx != nullptr && n < images; ++n) {
        std::fill(sums + n * sums_step, sums + n * sums_step + c_count * in_pixels, 0.0f);
      }

      const int64_t last_block = dx != nullptr ? o_blocks : o_task + 1;
      for (int64_t block_o = o_task; block_o < last_block; ++block_o) {
        const int64_t o_first = block_o * o_each;
        const int64_t o0 = conv_group * s.outputs + o_first;
        tile.o_count = s.outputs - o_first < o_each ? s.outputs - o_first : o_each;
        const int64_t element = o0 * s.depth + c0 * s.kernel;
        if (dweight != nullptr) {
          std::fill(tile.dweight, tile.dweight + tile.o_count * step, 0.0f);
        }
        for (int64_t set = first_set; set < first_set + sets_each; ++set) {
          const float* logits = logits_of_set(spec, p.logits, set, p.outputs, s.depth);
          load_tile(
              weight, blocks ? nullptr : logits, s.depth, o0, tile.o_count, c0 * s.kernel, depth,
              step, tile.wide, tile.exps);
          for (int64_t k = 0; k < spec.samples; ++k) {
            mask_tile<kHard>(
                tile, spec, RowMasks(spec, set, k, spec.tensor_id), logits, s.depth, element,
                words);
            const int64_t image = (set * spec.samples + k) * p.images;
            for (int64_t b = 0; b < pixels.count(); ++b) {
              const PixelBlock block = pixels.block(b);
              const int64_t count = block.pixels(p);
              if (!block.as_large_as(found)) {
                planes_of.find_pixels(block, starts);
                find_outputs(p, block, places);
                found = block;
              }
              if (need_outer) {
                planes_of.fill(
                    x + (image * p.channels + channel) * in_pixels, block, c_count, planes);
              }
              if (dx != nullptr) {
                std::fill(dplanes, dplanes + planes_of.size(), 0.0f);
              }
              const T* dy_block = dy + ((image + block.image) * p.outputs + o0) * s.out_pixels +
                                  block.row * p.out_size[1];
              for (int64_t i0 = 0; i0 < count; i0 += kConvSum) {
                const int64_t i_count = count - i0 < kConvSum ? count - i0 : kConvSum;
                const int64_t panels = ceil_div(i_count, kTileColumns);
                for (int64_t j = 0; j < panels; ++j) {
                  const int64_t i = i0 + j * kTileColumns;
                  const int64_t lanes = count - i < kTileColumns ? count - i : kTileColumns;
                  float* dy_panel = dy_panels + j * dy_step;
                  gather(dy_block, places + i, lanes, outputs, tile.o_count, dy_panel);
                  if (dx != nullptr) {
                    multiply_columns(
                        tile, depth, dy_panel, dpatches + j * most_depth * kTileColumns);
                  }
                  if (need_outer) {
                    gather(
                        planes, starts + i, lanes, values, depth,
                        patches + j * most_depth * kTileColumns);
                    if (!few) {
                      transpose(
                          dy_panel, kTileColumns, tile.o_count, kTileColumns,
                          dy_turned + j * kTileColumns * o_step, o_step);
                    }
                  }
                }
                if (dx != nullptr) {
                  scatter(
                      dpatches, most_depth * kTileColumns, starts + i0, i_count, values, c_count,
                      s.kernel, dplanes);
                }
                if (need_outer && few) {
                  add_few_patch_products(
                      patches, most_depth * kTileColumns, depth, dy_panels, dy_step, tile.o_count,
                      panels, lane_sums, b == 0 && i0 == 0);
                } else if (need_outer) {
                  add_patch_products(
                      patches, most_depth * kTileColumns, depth, dy_turned, o_step, tile.o_count,
                      panels, products, b == 0 && i0 == 0);
                }
              }
              if (dx != nullptr) {
                const int64_t from_first = image - first_image;
                planes_of.add_to(sums + from_first * sums_step, sums_step, block, c_count, dplanes);
              }
            }
            if (need_outer) {
              if (few) {
                add_lanes(lane_sums, depth, tile.o_count, products, o_step);
              }
              transpose(products, o_step, depth, tile.o_count, turned, step);
              add_sample(tile, turned, d.dlogits != nullptr, k == 0);
            }
          }
          if (d.dlogits != nullptr && blocks) {
            const int64_t at = (conv_group * o_blocks + block_o) * channels.count + channel_block;
            add_blocks(block_sums, set * tiles_each + at, tile, o0, c0 * s.kernel);
          } else if (d.dlogits != nullptr) {
            write_dlogits(tile, 0, d.dlogits + set * p.outputs * s.depth + element, s.depth);
          }
        }
        if (dweight != nullptr) {
          for (int64_t o = 0; o < tile.o_count; ++o) {
            narrow_row(tile.dweight + o * step, dweight + element + o * s.depth, depth);
          }
        }
      }
      if (own_sums) {
        for (int64_t n = 0; n < images; ++n) {
          narrow_row(
              sums + n * sums_step, dx + ((first_image + n) * p.channels + channel) * in_pixels,
              c_count * in_pixels);
        }
      }
    });
    if (d.dlogits != nullptr) {
      block_sums.finish(d.dlogits, logit_count(spec.layout, p.outputs, s.depth), tiles_each);
    }
  }

  conv_bias_gradients<T, kHard>(p, d, runner);
}

}  // namespace modmask::MODMASK_CAPABILITY
