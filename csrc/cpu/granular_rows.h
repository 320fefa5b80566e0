// Rows of masks with fewer logits than weights, or in which n of every m inputs are kept.

namespace modmask::MODMASK_CAPABILITY {

inline double sum(const float* p, int64_t n);

inline bool has_blocks(const LogitLayout& l) {
  return l.rows > 0;
}

inline bool is_granular(const LogitLayout& l) {
  return l.rows > 0 || l.among > 0;
}

// Of one set, for a weight of `out` rows.
inline int64_t logit_count(const LogitLayout& l, int64_t out, int64_t in) {
  return has_blocks(l) ? out / l.rows * l.width : out * in;
}

inline const float* logits_of_set(
    const MaskSpec& spec, const float* logits, int64_t set, int64_t out, int64_t in) {
  return spec.shared ? logits : logits + set * logit_count(spec.layout, out, in);
}

// Masks and slopes of columns [i0, i0 + n) of one row of the weight after another: one value per
// weight in `values` and `slopes`, zeros from n up to padded(n).
template <bool kHard, bool kSlope>
class GranularRows {
 public:
  float* values;
  float* slopes;

  GranularRows(
      const MaskSpec& spec,
      const RowMasks& masks,
      const float* logits,  // of the set
      int64_t in,
      int64_t i0,
      int64_t n)
      : GranularRows(spec, masks, logits, in, i0, n, Part(spec.layout, i0, n)) {}

  void draw(int64_t o) {
    if (has_blocks(layout_)) {
      draw_block(o / layout_.rows);
    } else {
      draw_n_of_m(o);
    }
  }

 private:
  // The logits that columns [i0, i0 + n) need: columns of blocks, or whole groups of m.
  struct Part {
    int64_t first = 0;
    int64_t count = 0;
    int64_t margin = 0;  // how far a weight looks to either side

    Part(const LogitLayout& l, int64_t i0, int64_t n) {
      if (n <= 0) {
        return;
      }
      if (has_blocks(l)) {
        first = l.columns[i0];
        count = l.columns[i0 + n - 1] - first + 1;
      } else {
        margin = l.among * l.stride;
        first = i0 / margin * margin;
        count = ceil_div(i0 + n, margin) * margin - first;
      }
    }

    size_t need(int64_t n) const {
      return Scratch::need(words_needed(count)) + 4 * Scratch::need(padded(count)) +
             Scratch::need(padded(count) + 2 * margin) + 2 * Scratch::need(padded(n));
    }
  };

  GranularRows(
      const MaskSpec& spec,
      const RowMasks& masks,
      const float* logits,
      int64_t in,
      int64_t i0,
      int64_t n,
      const Part& part)
      : spec_(spec),
        layout_(spec.layout),
        masks_(masks),
        logits_(logits),
        in_(in),
        i0_(i0),
        n_(n),
        part_(part),
        lease_(scratch().reserve(part.need(n))) {
    values = scratch().floats(padded(n));
    slopes = scratch().floats(padded(n));
    std::fill(values + n, values + padded(n), 0.0f);
    std::fill(slopes + n, slopes + padded(n), 0.0f);
    words_ = scratch().words(words_needed(part.count));
    exps_ = scratch().floats(padded(part.count));
    drawn_ = scratch().floats(padded(part.count));
    drawn_slopes_ = scratch().floats(padded(part.count));
    places_ = scratch().floats(padded(part.count));
    scores_ = scratch().floats(padded(part.count) + 2 * part.margin) + part.margin;
    if (layout_.among > 0) {
      for (int64_t i = 0; i < part.count; ++i) {
        places_[i] = static_cast<float>(i / layout_.stride % layout_.among);
      }
    }
  }

  static Scratch& scratch() {
    thread_local Scratch s;
    return s;
  }

  // The noise of `part_` in one row of logits.
  RowNoise noise(int64_t row, int64_t width) {
    const int64_t element = row * width + part_.first;
    exp_minus_row(logits_ + element, part_.count, exps_);
    return masks_.row(
        spec_.element_offset + element, part_.count, exps_, logits_ + element, words_);
  }

  void draw_block(int64_t row) {
    if (row == row_ || n_ <= 0) {
      return;
    }
    row_ = row;
    float *drawn = drawn_, *drawn_slopes = drawn_slopes_;
    for_mask_vectors<kHard, kSlope>(
        noise(row, layout_.width), part_.count, spec_.tau, [=](int64_t i, auto& m) {
          store(drawn + i, m.values(m));
          store(drawn_slopes + i, m.soft.slope);
        });
    const int32_t* columns = layout_.columns + i0_;
    const int32_t first = static_cast<int32_t>(part_.first);
    for (int64_t i = 0; i < n_; ++i) {
      values[i] = drawn_[columns[i] - first];
    }
    for (int64_t i = 0; kSlope && i < n_; ++i) {
      slopes[i] = drawn_slopes_[columns[i] - first];
    }
  }

  void draw_n_of_m(int64_t o) {
    // by exp(logit + noise), or by the logit; NaN is the smallest
    const bool drawn = spec_.seeds != nullptr;
    float *scores = scores_, *drawn_slopes = drawn_slopes_;
    for_mask_vectors<true, kSlope>(noise(o, in_), part_.count, spec_.tau, [=](int64_t i, auto& m) {
      const vf score = drawn ? m.high / m.low : m.high;
      const vf least = splat(-__builtin_inff());
      store(scores + i, (vf)(((score == score) & (vi)score) | ((score != score) & (vi)least)));
      store(drawn_slopes + i, m.soft.slope);
    });
    const int64_t m = layout_.among, stride = layout_.stride;
    for (int64_t i = 0; i < part_.count; i += kLanes) {
      const vf score = load(scores_ + i), place = load(places_ + i);
      vi larger{};  // minus the number of weights that come before this one
      for (int64_t d = 1; d < m; ++d) {
        const vf before = load(scores_ + i - d * stride), after = load(scores_ + i + d * stride);
        larger += (before >= score) & (place >= splat(static_cast<float>(d)));
        larger += (after > score) & (place < splat(static_cast<float>(m - d)));
      }
      store(drawn_ + i, (vf)((-larger < static_cast<int32_t>(layout_.keep)) & (vi)splat(1.0f)));
    }
    const int64_t skip = i0_ - part_.first;
    std::copy(drawn_ + skip, drawn_ + skip + n_, values);
    std::copy(drawn_slopes_ + skip, drawn_slopes_ + skip + n_, slopes);
  }

  const MaskSpec& spec_;
  const LogitLayout& layout_;
  const RowMasks& masks_;
  const float* logits_;
  int64_t in_;
  int64_t i0_;
  int64_t n_;
  Part part_;
  Scratch::Lease lease_;
  int64_t row_ = -1;
  uint32_t* words_;
  float* exps_;
  float* drawn_;
  float* drawn_slopes_;
  float* places_;  // of each weight in its group of m
  float* scores_;
};

// Gradients of logits that cover blocks of weights: every tile leaves its own sums, and these are
// added up in a fixed order. How the weight is cut into tiles must not depend on the threads.
class BlockGradients {
 public:
  BlockGradients(const LogitLayout& layout, int64_t tiles, int64_t tile_rows, int64_t tile_columns)
      : layout_(layout),
        tiles_(has_blocks(layout) ? tiles : 0),
        columns_(layout.width < tile_columns ? layout.width : tile_columns),
        size_(has_blocks(layout) ? ((tile_rows - 1) / layout.rows + 2) * columns_ : 0),
        lease_(scratch().reserve(Scratch::need(tiles_ * size_) + Scratch::need(8 * tiles_))) {
    sums_ = scratch().floats(tiles_ * size_);
    places_ = scratch().integers(4 * tiles_);
  }

  // Adds up rows [o0, o0 + rows) and columns [i0, i0 + n) of a tile, `step` apart.
  void add(
      int64_t tile,
      const float* values,
      int64_t step,
      int64_t o0,
      int64_t rows,
      int64_t i0,
      int64_t n) const {
    int64_t* place = places_ + 4 * tile;
    if (n <= 0 || rows <= 0) {
      place[1] = 0;
      return;
    }
    const int32_t* columns = layout_.columns + i0;
    const int64_t row = o0 / layout_.rows, column = columns[0];
    place[0] = row;
    place[1] = (o0 + rows - 1) / layout_.rows - row + 1;
    place[2] = column;
    place[3] = columns[n - 1] - column + 1;
    float* sums = sums_ + tile * size_;
    thread_local Scratch total_scratch;
    const auto lease = total_scratch.reserve(Scratch::need(2 * columns_));
    double* totals = reinterpret_cast<double*>(total_scratch.integers(columns_));
    for (int64_t o = 0; o < rows;) {
      std::fill(totals, totals + place[3], 0.0);
      const int64_t of = (o0 + o) / layout_.rows;
      for (; o < rows && (o0 + o) / layout_.rows == of; ++o) {
        const float* from = values + o * step;
        for (int64_t i = 0; i < n;) {
          int64_t end = i + 1;
          while (end < n && columns[end] == columns[i]) {
            ++end;
          }
          totals[columns[i] - column] += end - i == 1 ? from[i] : sum(from + i, end - i);
          i = end;
        }
      }
      for (int64_t c = 0; c < place[3]; ++c) {
        sums[(of - row) * columns_ + c] = static_cast<float>(totals[c]);
      }
    }
  }

  // dlogits of one set after the other, each of `tiles_each` tiles.
  void finish(float* dlogits, int64_t count, int64_t tiles_each) const {
    if (tiles_ == 0) {
      return;
    }
    std::fill(dlogits, dlogits + tiles_ / tiles_each * count, 0.0f);
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t* place = places_ + 4 * tile;
      for (int64_t r = 0; r < place[1]; ++r) {
        const float* from = sums_ + tile * size_ + r * columns_;
        float* to = dlogits + tile / tiles_each * count + (place[0] + r) * layout_.width + place[2];
        for (int64_t c = 0; c < place[3]; ++c) {
          to[c] += from[c];
        }
      }
    }
  }

 private:
  static Scratch& scratch() {
    thread_local Scratch s;
    return s;
  }

  const LogitLayout& layout_;
  int64_t tiles_;
  int64_t columns_;  // most logits in a row of a tile
  int64_t size_;     // of the sums of a tile
  Scratch::Lease lease_;
  float* sums_;
  int64_t* places_;  // first row, rows, first column and columns of the logits of each tile
};

}  // namespace modmask::MODMASK_CAPABILITY
