// The register tile of every matrix product here.

namespace modmask::MODMASK_CAPABILITY {

constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 operands and a broadcast fill 16 registers
constexpr int kTileColumns = 2 * kLanes;

template <int kRows, int kVectors>
MODMASK_INLINE void clear(vf (&c)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      c[m][v] = vf{};
    }
  }
}

// c[m][lane] += sum over k of a[m * a_row + k * a_step] * b[k * b_step + lane]
template <int kRows, int kVectors>
MODMASK_INLINE void accumulate(
    const float* a,
    int64_t a_row,
    int64_t a_step,
    const float* b,
    int64_t b_step,
    int64_t depth,
    vf (&c)[kRows][kVectors]) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    vf row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      row[v] = load(b + v * kLanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const vf x = splat(a[m * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        c[m][v] = fma(x, row[v], c[m][v]);
      }
    }
    a += a_step;
    b += b_step;
  }
}

// `accumulate` from zero.
template <int kRows, int kVectors>
MODMASK_INLINE void multiply(
    const float* a,
    int64_t a_row,
    int64_t a_step,
    const float* b,
    int64_t b_step,
    int64_t depth,
    vf (&c)[kRows][kVectors]) {
  clear(c);
  accumulate<kRows, kVectors>(a, a_row, a_step, b, b_step, depth, c);
}

// Calls f(integral_constant<rows>) for a tile of 1..kTileRows rows.
template <typename F>
MODMASK_INLINE void with_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    default:
      return f(std::integral_constant<int, 6>{});
  }
}

// Cuts rows into as few tiles as possible, of nearly equal height: f(first row, height). A last
// tile of one or two rows would wait for its own sums.
template <typename F>
MODMASK_INLINE void for_even_tiles(int64_t rows, const F& f) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    const int64_t tiles = (left + kTileRows - 1) / kTileRows;
    const int64_t height = (left + tiles - 1) / tiles;
    with_rows(height, [&](auto tile_rows) { f(r, tile_rows); });
    r += height;
  }
}

}  // namespace modmask::MODMASK_CAPABILITY
