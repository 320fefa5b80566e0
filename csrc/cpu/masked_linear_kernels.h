// y = x (W * M)^T and its gradients; a masked weight exists only as a tile per thread.
//
// Every product reads its masked operand in the weight's own layout, so a tile is made row by row
// and never transposed:
//   y[o][rows]   = W*M tile [o][i]    x  x transposed, packed once per call    (lanes: batch rows)
//   dx[row][i]   = dy[row][o]         x  W*M tile [o][i]                       (lanes: inputs)
//   D[o][i]      = dy[row][o]         x  x packed by strips of inputs          (lanes: inputs)
// with dlogits = sum over samples of D * W * slope and dweight = sum over groups of D * M.

namespace modmask::MODMASK_CAPABILITY {

constexpr int64_t kForwardRows = 24; // of the weight tile
constexpr int64_t kForwardDepth = 256;
constexpr int64_t kBackwardRows = 60;
constexpr int64_t kOutputTile = 16384; // floats of y kept per task

// ---- forward ----

// Panels of 2 * kLanes batch rows (the last of kLanes where that is enough), each [in][width].
template <typename T>
void pack_panel(const T* x, int64_t rows, int64_t in, int64_t width, float* panel) {
  constexpr int64_t kBlock = 64;
  for (int64_t i0 = 0; i0 < in; i0 += kBlock) {
    const int64_t i1 = i0 + kBlock < in ? i0 + kBlock : in;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = i0; i < i1; ++i) {
        panel[i * width + r] = widen(x[r * in + i]);
      }
    }
    for (int64_t r = rows; r < width; ++r) {
      for (int64_t i = i0; i < i1; ++i) {
        panel[i * width + r] = 0.0f;
      }
    }
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
    bool first) {
  for (int64_t o = 0; o < tile_rows; o += kTileRows) {
    with_rows(tile_rows - o, [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      vf c[kRows][kVectors];
      multiply<kRows, kVectors>(
          tile + o * tile_step, tile_step, 1, panel, kVectors * kLanes, depth, c);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        float* to = y + (o + m) * y_step;
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          store(to + v * kLanes, first ? c[m][v] : c[m][v] + load(to + v * kLanes));
        }
      }
    });
  }
}

template <typename T, bool kHard>
void linear_forward(const LinearProblem& p, T* y, const Runner& runner) {
  const MaskSpec& spec = p.mask;
  const int64_t groups = spec.sets * spec.samples;
  const int64_t in = p.in, out = p.out, rows = p.rows;
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);

  const int64_t padded_rows = padded(rows, kLanes);
  const int64_t panels = ceil_div(rows, kTileColumns);
  thread_local Scratch packed_scratch;
  packed_scratch.reserve(Scratch::need(groups * padded_rows * in));
  float* packed = packed_scratch.floats(groups * padded_rows * in);
  run_tasks(
      runner, groups * panels, static_cast<double>(groups * padded_rows * in) / 4, [&](int64_t t) {
        const int64_t g = t / panels, r = t % panels * kTileColumns;
        const int64_t count = rows - r < kTileColumns ? rows - r : kTileColumns;
        pack_panel(
            x + (g * rows + r) * in,
            count,
            in,
            padded(count, kLanes),
            packed + (g * padded_rows + r) * in);
      });

  // rows of every group handled per pass over the weight tile
  int64_t chunk = kOutputTile / (kForwardRows * spec.samples) / kTileColumns * kTileColumns;
  chunk = chunk > kTileColumns ? chunk : kTileColumns;
  chunk = chunk < padded_rows ? chunk : padded_rows;
  const int64_t tile_step = in < kForwardDepth ? padded(in) : kForwardDepth;
  const int64_t blocks = ceil_div(out, kForwardRows);
  const double cost =
      static_cast<double>(out * in) * static_cast<double>(groups * (padded_rows + 8)) / kLanes;

  run_tasks(runner, spec.sets * blocks, cost, [&](int64_t t) {
    const int64_t set = t / blocks, o0 = t % blocks * kForwardRows;
    const int64_t o_count = out - o0 < kForwardRows ? out - o0 : kForwardRows;
    const float* logits = p.logits + set * out * in;
    thread_local Scratch scratch;
    scratch.reserve(
        2 * Scratch::need(kForwardRows * tile_step) + Scratch::need(words_needed(tile_step)) +
        Scratch::need(spec.samples * kForwardRows * chunk) + 3 * Scratch::need(64));
    float* exps = scratch.floats(kForwardRows * tile_step);
    float* tile = scratch.floats(kForwardRows * tile_step);
    uint32_t* words = scratch.words(words_needed(tile_step));
    float* result = scratch.floats(spec.samples * kForwardRows * chunk);
    float* bias_values = scratch.floats(64);
    float* bias_exps = scratch.floats(64);

    for (int64_t r0 = 0; r0 < rows; r0 += chunk) {
      const int64_t r_count = padded_rows - r0 < chunk ? padded_rows - r0 : chunk;
      for (int64_t i0 = 0; i0 < in || i0 == 0; i0 += kForwardDepth) {
        const int64_t i_count = in - i0 < kForwardDepth ? in - i0 : kForwardDepth;
        for (int64_t o = 0; o < o_count; ++o) {
          exp_minus_row(logits + (o0 + o) * in + i0, i_count, exps + o * tile_step);
        }
        for (int64_t k = 0; k < spec.samples; ++k) {
          const RowMasks masks(spec, set, k, spec.tensor_id);
          for (int64_t o = 0; o < o_count; ++o) {
            const int64_t element = (o0 + o) * in + i0;
            const RowNoise noise = masks.row(
                spec.element_offset + element,
                i_count,
                exps + o * tile_step,
                logits + element,
                words);
            float* to = tile + o * tile_step;
            const T* w = weight + element;
            for_mask_vectors<kHard, false>(noise, i_count, spec.tau, [&](int64_t i, vf m, vf) {
              const vf wide = load_part(w + i, i_count - i);
              store(to + i, kHard ? where_less(vf{}, m, wide) : m * wide);
            });
          }
          const int64_t g = set * spec.samples + k;
          const float* panel = packed + (g * padded_rows + r0) * in;
          float* y_tile = result + k * kForwardRows * chunk;
          for (int64_t r = 0; r < r_count; r += kTileColumns) {
            if (r_count - r > kLanes) {
              forward_panel<2>(
                  tile, tile_step, o_count, panel + r * in + i0 * kTileColumns, i_count,
                  y_tile + r, chunk, i0 == 0);
            } else {
              forward_panel<1>(
                  tile, tile_step, o_count, panel + r * in + i0 * kLanes, i_count,
                  y_tile + r, chunk, i0 == 0);
            }
          }
        }
      }
      for (int64_t k = 0; k < spec.samples; ++k) {
        for (int64_t o = 0; o < o_count; ++o) {
          bias_values[o] = bias != nullptr ? widen(bias[o0 + o]) : 0.0f;
        }
        if (bias != nullptr && p.bias_logits != nullptr) {
          const float* b_logits = p.bias_logits + set * out + o0;
          exp_minus_row(b_logits, o_count, bias_exps);
          const RowNoise noise = RowMasks(spec, set, k, p.bias_tensor_id)
                                     .row(o0, o_count, bias_exps, b_logits, words);
          for_mask_vectors<kHard, false>(noise, o_count, spec.tau, [&](int64_t i, vf m, vf) {
            store(bias_values + i, m * load(bias_values + i));
          });
        }
        const float* y_tile = result + k * kForwardRows * chunk;
        const int64_t first_row = (set * spec.samples + k) * rows + r0;
        const int64_t count = rows - r0 < r_count ? rows - r0 : r_count;
        for (int64_t r = 0; r < count; ++r) {
          T* to = y + (first_row + r) * out + o0;
          for (int64_t o = 0; o < o_count; ++o) {
            narrow(y_tile[o * chunk + r] + bias_values[o], to[o]);
          }
        }
      }
    }
  });
}

// ---- backward ----

// D of one group and one strip of inputs, handed on tile by tile: f(o, vectors c[rows][2]).
template <typename F>
MODMASK_INLINE void outer_products(
    const float* dy,
    int64_t out,
    int64_t o_count,
    const float* strip,
    int64_t rows,
    const F& f) {
  for (int64_t o = 0; o < o_count; o += kTileRows) {
    with_rows(o_count - o, [&](auto tile_rows) {
      constexpr int kRows = decltype(tile_rows)::value;
      vf c[kRows][2];
      multiply<kRows, 2>(dy + o, 1, out, strip, kTileColumns, rows, c);
      f(o, c);
    });
  }
}

template <typename T, bool kHard>
void linear_backward(const LinearProblem& p, const LinearGradients& d, const Runner& runner) {
  const MaskSpec& spec = p.mask;
  const int64_t groups = spec.sets * spec.samples;
  const int64_t in = p.in, out = p.out, rows = p.rows;
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  T* dx = static_cast<T*>(d.dx);
  T* dweight = static_cast<T*>(d.dweight);
  const bool need_outer = d.dlogits != nullptr || dweight != nullptr;

  thread_local Scratch wide_scratch;
  const float* dy;
  if constexpr (__is_same(T, float)) {
    dy = static_cast<const float*>(d.dy);
  } else {
    wide_scratch.reserve(Scratch::need(groups * rows * out));
    float* wide = wide_scratch.floats(groups * rows * out);
    run_tasks(
        runner, groups, static_cast<double>(groups * rows * out) / kLanes, [&](int64_t g) {
          const int64_t at = g * rows * out;
          widen_row(static_cast<const T*>(d.dy) + at, wide + at, rows * out);
        });
    dy = wide;
  }

  if (dx != nullptr || need_outer) {
    // a task owns a block of inputs; without dx, whose sums run over all outputs, also of outputs
    const int64_t i_block = in <= 1024 ? 64 : 128;
    const int64_t width = in < i_block ? padded(in) : i_block;
    const int64_t i_blocks = ceil_div(in, i_block);
    const int64_t o_tasks = dx != nullptr ? 1 : ceil_div(out, kBackwardRows);
    // all sets share one weight, so its gradient is summed within a task
    const int64_t set_tasks = dweight != nullptr ? 1 : spec.sets;
    const int64_t sets_each = spec.sets / set_tasks;
    const int64_t rows_each = sets_each * spec.samples * rows;
    const double cost = static_cast<double>(out * in) *
        static_cast<double>(groups * (2 * rows + 12)) / kLanes;

    run_tasks(runner, set_tasks * i_blocks * o_tasks, cost, [&](int64_t t) {
      const int64_t o_task = t % o_tasks;
      const int64_t i0 = t / o_tasks % i_blocks * i_block;
      const int64_t first_set = t / o_tasks / i_blocks * sets_each;
      const int64_t i_count = in - i0 < i_block ? in - i0 : i_block;
      const int64_t first_row = first_set * spec.samples * rows;
      thread_local Scratch scratch;
      const int64_t tile_size = kBackwardRows * width;
      scratch.reserve(
          5 * Scratch::need(tile_size) + Scratch::need(words_needed(width)) +
          2 * Scratch::need(rows_each * width));
      float* exps = scratch.floats(tile_size);
      float* tile = scratch.floats(tile_size);
      float* slopes = scratch.floats(tile_size);
      float* values = scratch.floats(tile_size);
      float* dw_tile = scratch.floats(tile_size);
      uint32_t* words = scratch.words(words_needed(width));
      float* x_strips = scratch.floats(rows_each * width); // [strip][row][kTileColumns]
      float* dx_strips = scratch.floats(rows_each * width);

      if (need_outer) {
        for (int64_t r = 0; r < rows_each; ++r) {
          const T* from = x + (first_row + r) * in + i0;
          for (int64_t i = 0; i < width; i += kLanes) {
            float* to = x_strips + (i / kTileColumns * rows_each + r) * kTileColumns +
                i % kTileColumns;
            store(to, i < i_count ? load_part(from + i, i_count - i) : vf{});
          }
        }
      }
      for (int64_t o0 = o_task * kBackwardRows; o0 < out;
           o0 += dx != nullptr ? kBackwardRows : out) {
        const int64_t o_count = out - o0 < kBackwardRows ? out - o0 : kBackwardRows;
        if (dweight != nullptr) {
          std::fill(dw_tile, dw_tile + o_count * width, 0.0f);
        }
        for (int64_t set = first_set; set < first_set + sets_each; ++set) {
          const float* logits = p.logits + set * out * in;
          for (int64_t o = 0; o < o_count; ++o) {
            exp_minus_row(logits + (o0 + o) * in + i0, i_count, exps + o * width);
          }
          for (int64_t k = 0; k < spec.samples; ++k) {
            const RowMasks masks(spec, set, k, spec.tensor_id);
            for (int64_t o = 0; o < o_count; ++o) {
              const int64_t element = (o0 + o) * in + i0;
              const RowNoise noise = masks.row(
                  spec.element_offset + element, i_count, exps + o * width, logits + element,
                  words);
              const T* w = weight + element;
              const int64_t at = o * width;
              const auto fill = [&](auto keep_values) {
                for_mask_vectors<kHard, true>(
                    noise, i_count, spec.tau, [&](int64_t i, vf m, vf slope) {
                      const vf wide = load_part(w + i, i_count - i);
                      store(tile + at + i, kHard ? where_less(vf{}, m, wide) : m * wide);
                      store(slopes + at + i, slope * wide);
                      if constexpr (decltype(keep_values)::value) {
                        store(values + at + i, m);
                      }
                    });
              };
              if (dweight != nullptr) {
                fill(std::true_type{});
              } else {
                fill(std::false_type{});
              }
              // the part of the last strip beyond `in`
              for (int64_t i = padded(i_count, kLanes); i < padded(i_count); i += kLanes) {
                store(tile + at + i, vf{});
              }
            }
            const int64_t local = (set - first_set) * spec.samples + k;
            const float* group_dy = dy + ((set * spec.samples + k) * rows) * out + o0;
            for (int64_t strip = 0; strip * kTileColumns < i_count; ++strip) {
              const int64_t i = strip * kTileColumns;
              const int64_t columns = i_count - i < kTileColumns ? i_count - i : kTileColumns;
              const int64_t at = (strip * rows_each + local * rows) * kTileColumns;
              if (need_outer) {
                outer_products(
                    group_dy, out, o_count, x_strips + at, rows, [&](int64_t o, auto& c) {
                      constexpr int kRows = sizeof(c) / sizeof(c[0]);
#pragma GCC unroll 8
                      for (int m = 0; m < kRows; ++m) {
                        const int64_t from = (o + m) * width + i;
                        float* dl = d.dlogits + (set * out + o0 + o + m) * in + i0 + i;
#pragma GCC unroll 2
                        for (int v = 0; v < 2; ++v) {
                          const int64_t left = columns - v * kLanes;
                          if (d.dlogits != nullptr && left > 0) {
                            const vf g = c[m][v] * load(slopes + from + v * kLanes);
                            float* to = dl + v * kLanes;
                            store_part(to, k == 0 ? g : g + load_part(to, left), left);
                          }
                          if (dweight != nullptr && left > 0) {
                            float* to = dw_tile + from + v * kLanes;
                            store(to, fma(c[m][v], load(values + from + v * kLanes), load(to)));
                          }
                        }
                      }
                    });
              }
              if (dx != nullptr) {
                for (int64_t r = 0; r < rows; r += kTileRows) {
                  with_rows(rows - r, [&](auto tile_rows) {
                    constexpr int kRows = decltype(tile_rows)::value;
                    vf c[kRows][2];
                    multiply<kRows, 2>(group_dy + r * out, out, 1, tile + i, width, o_count, c);
                    float* to = dx_strips + at + r * kTileColumns;
#pragma GCC unroll 8
                    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
                      for (int v = 0; v < 2; ++v) {
                        float* part = to + m * kTileColumns + v * kLanes;
                        store(part, o0 == 0 ? c[m][v] : c[m][v] + load(part));
                      }
                    }
                  });
                }
              }
            }
          }
        }
        if (dweight != nullptr) {
          for (int64_t o = 0; o < o_count; ++o) {
            narrow_row(dw_tile + o * width, dweight + (o0 + o) * in + i0, i_count);
          }
        }
      }
      if (dx != nullptr) {
        for (int64_t r = 0; r < rows_each; ++r) {
          for (int64_t i = 0; i < i_count; i += kTileColumns) {
            const int64_t columns = i_count - i < kTileColumns ? i_count - i : kTileColumns;
            narrow_row(
                dx_strips + (i / kTileColumns * rows_each + r) * kTileColumns,
                dx + (first_row + r) * in + i0 + i,
                columns);
          }
        }
      }
    });
  }

  if (d.dbias != nullptr || d.dbias_logits != nullptr) {
    constexpr int64_t kBlock = 64;
    const T* bias = static_cast<const T*>(p.bias);
    T* dbias = static_cast<T*>(d.dbias);
    const double cost = static_cast<double>(groups * rows * out) / kLanes;
    run_tasks(runner, ceil_div(out, kBlock), cost, [&](int64_t t) {
      const int64_t o0 = t * kBlock;
      const int64_t count = out - o0 < kBlock ? out - o0 : kBlock;
      float total[kBlock] = {}, column[kBlock], exps[kBlock], d_logits[kBlock];
      uint32_t words[words_needed(kBlock)];
      for (int64_t set = 0; set < spec.sets; ++set) {
        std::fill(d_logits, d_logits + kBlock, 0.0f);
        for (int64_t k = 0; k < spec.samples; ++k) {
          std::fill(column, column + kBlock, 0.0f);
          const float* from = dy + (set * spec.samples + k) * rows * out + o0;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t o = 0; o < count; ++o) {
              column[o] += from[r * out + o];
            }
          }
          if (p.bias_logits == nullptr) {
            for (int64_t o = 0; o < count; ++o) {
              total[o] += column[o];
            }
            continue;
          }
          const float* b_logits = p.bias_logits + set * out + o0;
          exp_minus_row(b_logits, count, exps);
          const RowNoise noise =
              RowMasks(spec, set, k, p.bias_tensor_id).row(o0, count, exps, b_logits, words);
          for_mask_vectors<kHard, true>(noise, count, spec.tau, [&](int64_t i, vf m, vf slope) {
            const vf sum = load(column + i);
            const vf b = load_part(bias + o0 + i, count - i);
            store(total + i, fma(sum, m, load(total + i)));
            store(d_logits + i, fma(sum * b, slope, load(d_logits + i)));
          });
        }
        if (d.dbias_logits != nullptr) {
          std::copy(d_logits, d_logits + count, d.dbias_logits + set * out + o0);
        }
      }
      if (dbias != nullptr) {
        narrow_row(total, dbias + o0, count);
      }
    });
  }
}

} // namespace modmask::MODMASK_CAPABILITY
