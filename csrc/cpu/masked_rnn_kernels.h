// Recurrent layers whose two matrices carry one mask per sequence: one direction of one layer, the
// whole time loop in one call.
//
// A task owns some sequences of one group. It draws the masks of that group once, multiplies all
// its inputs, and then steps through time with the masked hidden matrix in its own scratch, so
// threads never wait for each other. States lie as [unit][sequence], lanes over sequences.
//
// Saved for the backward pass: [group][step][kSaved * hidden][padded sequences], first the values
// of the gates, then what the cell adds.

namespace modmask::MODMASK_CAPABILITY {

constexpr int64_t kRnnVectors = 8;  // vectors of sequences of a task

// v where keep, else other; keep is all ones or zeros in every lane.
MODMASK_INLINE vf blend(vi keep, vf v, vf other) {
  return (vf)((keep & (vi)v) | (~keep & (vi)other));
}

// ---- activations; NaN stays NaN ----

// e^-x = scale * (1 + q) for x >= 0.
struct Decay {
  vf scale;  // 2^n
  vf q;      // 2^f - 1, |f| <= 1/2

  MODMASK_INLINE vf value(const Decay& d) {
    return fma(d.scale, d.q, d.scale);
  }
};

MODMASK_INLINE Decay decay(vf x) {
  // this order of operands lets a NaN pass
  const vf bounded = minimum(splat(80.0f), x);
  const vf round = splat(kRoundToInteger);
  const vf shifted = fma(bounded, splat(kMinusLog2E), round);
  // log2(e) in two parts
  const vf rough = fma(bounded, splat(kMinusLog2E), -(shifted - round));
  const vf f = fma(bounded, splat(-1.925963033500e-8f), rough);
  vf p = splat(kExp2[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kExp2Degree; ++i) {
    p = fma(p, f, splat(kExp2[i]));
  }
  return {(vf)(((vu)shifted << 23) + 0x3F800000u), p * f};
}

MODMASK_INLINE vf absolute(vf x) {
  return (vf)((vi)x & 0x7FFFFFFF);
}

// Near 1 as one minus a small number, so that s (1 - s) keeps its digits.
MODMASK_INLINE vf sigmoid(vf x) {
  const vf e = Decay::value(decay(absolute(x)));
  const vf small = e / (1.0f + e);
  return blend(x > vf{}, 1.0f - small, small);
}

// (1 - e) / (1 + e) with e = exp(-2 |x|), near 1 as one minus a small number, too.
MODMASK_INLINE vf tanh(vf x) {
  const vf magnitude = absolute(x);
  const Decay d = decay(magnitude + magnitude);
  const vf e = Decay::value(d);
  const vi near_0 = magnitude < splat(0.5f);
  const vf rest = -fma(d.scale, d.q, d.scale - 1.0f);  // 1 - e
  const vf part = blend(near_0, rest, e + e) / (1.0f + e);
  const vf result = blend(near_0, part, 1.0f - part);
  return (vf)((vi)result | ((vi)x & static_cast<int32_t>(0x80000000u)));
}

// ---- cells: one unit of one vector of sequences ----

// i, f, g, o of one step and the gradients with respect to their arguments.
struct Lstm {
  static constexpr int kGates = 4;
  static constexpr int kSaved = 5;  // and the cell state
  static constexpr bool kHasCell = true;
  static constexpr bool kSameGates = true;

  // The new h, from input and hidden parts of the gates' arguments. `saved` has `stride` floats
  // between gates.
  MODMASK_INLINE vf
  forward(const vf (&x)[kGates], const vf (&h)[kGates], vf, vf& c, float* saved, int64_t stride) {
    const vf i = sigmoid(x[0] + h[0]), f = sigmoid(x[1] + h[1]);
    const vf g = tanh(x[2] + h[2]), o = sigmoid(x[3] + h[3]);
    c = fma(f, c, i * g);
    store(saved, i);
    store(saved + stride, f);
    store(saved + 2 * stride, g);
    store(saved + 3 * stride, o);
    return o * tanh(c);
  }

  // `dx` and `dh`: gradients of the arguments' input and hidden parts, which are the same here.
  // Returns the part of dh_previous that does not come through the hidden matrix.
  MODMASK_INLINE vf backward(
      const float* saved,
      int64_t stride,
      vf c_previous,
      vf,
      vf dh,
      vf& dc,
      vf (&dx)[kGates],
      vf (&)[kGates]) {
    const vf i = load(saved), f = load(saved + stride), g = load(saved + 2 * stride);
    const vf o = load(saved + 3 * stride), tc = tanh(load(saved + 4 * stride));
    const vf dc_all = dc + dh * o * (1.0f - tc * tc);
    dx[0] = dc_all * g * i * (1.0f - i);
    dx[1] = dc_all * c_previous * f * (1.0f - f);
    dx[2] = dc_all * i * (1.0f - g * g);
    dx[3] = dh * tc * o * (1.0f - o);
    dc = dc_all * f;
    return vf{};
  }
};

// r, z, n; n = tanh(x_n + r * h_n).
struct Gru {
  static constexpr int kGates = 3;
  static constexpr int kSaved = 4;  // and h_n
  static constexpr bool kHasCell = false;
  static constexpr bool kSameGates = false;

  MODMASK_INLINE vf forward(
      const vf (&x)[kGates],
      const vf (&h)[kGates],
      vf previous,
      vf&,
      float* saved,
      int64_t stride) {
    const vf r = sigmoid(x[0] + h[0]), z = sigmoid(x[1] + h[1]);
    const vf n = tanh(fma(r, h[2], x[2]));
    store(saved, r);
    store(saved + stride, z);
    store(saved + 2 * stride, n);
    store(saved + 3 * stride, h[2]);
    return fma(z, previous - n, n);
  }

  MODMASK_INLINE vf backward(
      const float* saved,
      int64_t stride,
      vf,
      vf previous,
      vf dh,
      vf&,
      vf (&dx)[kGates],
      vf (&d_hidden)[kGates]) {
    const vf r = load(saved), z = load(saved + stride), n = load(saved + 2 * stride);
    const vf h_n = load(saved + 3 * stride);
    dx[2] = dh * (1.0f - z) * (1.0f - n * n);
    dx[0] = dx[2] * h_n * r * (1.0f - r);
    dx[1] = dh * (previous - n) * z * (1.0f - z);
    d_hidden[0] = dx[0];
    d_hidden[1] = dx[1];
    d_hidden[2] = dx[2] * r;
    return dh * z;
  }
};

// ---- what both directions share ----

// The product of input (0) or hidden (1) matrix; x and rows are those of the whole sequence.
inline LinearProblem linear_of(const RnnProblem& p, int matrix, const void* x) {
  LinearProblem linear{};
  linear.mask = p.mask;
  linear.mask.tensor_id = p.tensor_ids[matrix];
  linear.bias_tensor_id = p.tensor_ids[2 + matrix];
  linear.dtype = DType::kFloat32;
  linear.rows = p.steps * p.rows;
  linear.in = matrix == 0 ? p.in : p.hidden;
  linear.out = p.gates * p.hidden;
  linear.steps = p.steps;
  linear.x = x;
  linear.weight = p.weights[matrix];
  linear.logits = p.logits[matrix];
  linear.bias = p.biases[matrix];
  linear.bias_logits = p.bias_logits[matrix];
  return linear;
}

// The sequences of one task.
struct Sequences {
  int64_t group, set, sample;
  int64_t first;  // of the group
  int64_t width;  // whole vectors
  int64_t count;  // of which this many are sequences
  int64_t row;    // of the batch
};

struct RnnTasks {
  const RnnProblem& p;
  int64_t groups;
  int64_t padded_rows;
  Blocks blocks;

  RnnTasks(const RnnProblem& p, int threads)
      : p(p),
        groups(p.mask.sets * p.mask.samples),
        padded_rows(padded(p.rows, kLanes)),
        blocks(padded_rows / kLanes, kRnnVectors, 1, groups, threads) {}

  int64_t count() const {
    return groups * blocks.count;
  }

  int64_t widest() const {
    return blocks.largest() * kLanes;
  }

  int64_t batch() const {
    return groups * p.rows;
  }

  Sequences operator[](int64_t task) const {
    Sequences s;
    const int64_t block = task % blocks.count;
    s.group = task / blocks.count;
    s.set = s.group / p.mask.samples;
    s.sample = s.group % p.mask.samples;
    s.first = blocks.first(block) * kLanes;
    s.width = blocks.first(block + 1) * kLanes - s.first;
    s.count = p.rows - s.first < s.width ? p.rows - s.first : s.width;
    s.row = s.group * p.rows + s.first;
    return s;
  }

  // Where the saved values of one step lie.
  int64_t saved_at(const Sequences& s, int64_t t, int64_t units) const {
    return (s.group * p.steps + t) * units * padded_rows + s.first;
  }

  double cost() const {
    return static_cast<double>(p.steps * groups * padded_rows) *
           static_cast<double>(p.gates * p.hidden * (p.in + p.hidden + 16)) / kLanes;
  }
};

// [unit][width] of [sequence][units], or zeros where there is none.
inline void load_state(const float* from, const Sequences& s, int64_t units, float* to) {
  std::fill(to, to + units * s.width, 0.0f);
  if (from != nullptr) {
    transpose(from + s.row * units, units, s.count, units, to, s.width);
  }
}

inline void store_state(const float* from, const Sequences& s, int64_t units, float* to) {
  transpose(from, s.width, units, s.count, to + s.row * units, units);
}

// Lanes of sequences that are running at step t; padding runs along.
inline void running(const RnnProblem& p, const Sequences& s, int64_t t, int32_t* keep) {
  for (int64_t r = 0; r < s.width; ++r) {
    keep[r] = r >= s.count || t < p.lengths[s.row + r] ? -1 : 0;
  }
}

MODMASK_INLINE vi load_mask(const int32_t* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Scratch for the rows of a masked matrix, in tiles of kForwardRows rows.
class MaskedRows {
 public:
  MaskedRows(const LinearProblem& p, const Sequences& s, int64_t most)
      : p_(p), s_(s), masks_(p.mask, s.set, s.sample, p.mask.tensor_id), step_(width(most)) {}

  static size_t need(int64_t most) {
    return 3 * Scratch::need(kForwardRows * width(most)) + Scratch::need(word_count(most)) +
           2 * Scratch::need(kBiasBlock);
  }

  void take(Scratch& scratch) {
    exps_ = scratch.floats(kForwardRows * step_);
    wide_ = scratch.floats(kForwardRows * step_);
    tile_ = scratch.floats(kForwardRows * step_);
    words_ = scratch.words(word_count(step_));
    bias_ = scratch.floats(kBiasBlock);
    bias_exps_ = scratch.floats(kBiasBlock);
  }

  int64_t step() const {
    return step_;
  }

  // Rows [o0, o0 + rows) of columns [i0, i0 + n).
  const float* rows(int64_t o0, int64_t rows, int64_t i0, int64_t n) {
    const float* logits = p_.logits + s_.set * p_.out * p_.in;
    load_tile(
        static_cast<const float*>(p_.weight), logits, p_.in, o0, rows, i0, n, step_, wide_, exps_);
    const auto mask = p_.mask.hard ? mask_rows<true> : mask_rows<false>;
    mask(
        p_.mask, masks_, logits, p_.in, o0 * p_.in + i0, rows, n, step_, wide_, exps_, tile_,
        words_);
    return tile_;
  }

  void bias(float* out) {
    const auto bias_of = p_.mask.hard ? masked_bias<float, true, LinearProblem>
                                      : masked_bias<float, false, LinearProblem>;
    for (int64_t o = 0; o < p_.out; o += kBiasBlock) {
      const int64_t n = p_.out - o < kBiasBlock ? p_.out - o : kBiasBlock;
      bias_of(p_, s_.set, s_.sample, o, n, bias_, bias_exps_, words_);
      std::copy(bias_, bias_ + n, out + o);
    }
  }

 private:
  static constexpr int64_t kBiasBlock = 64;

  static int64_t width(int64_t most) {
    return spread(padded(most));
  }

  // of a row of the matrix, or of the bias
  static int64_t word_count(int64_t most) {
    return words_needed(width(most) > kBiasBlock ? width(most) : kBiasBlock);
  }

  const LinearProblem& p_;
  const Sequences& s_;
  RowMasks masks_;
  int64_t step_;
  float *exps_ = nullptr, *wide_ = nullptr, *tile_ = nullptr;
  float *bias_ = nullptr, *bias_exps_ = nullptr;
  uint32_t* words_ = nullptr;
};

// to[m][width] = sum over k of a[m * a_step + k] * b[k][width], in parts that keep the rounding
// error of plain products.
template <int kRows, int kVectors>
MODMASK_INLINE void multiply_in_parts(
    const float* a, int64_t a_step, const float* b, int64_t depth, float* to, int64_t width) {
  vf total[kRows][kVectors];
  clear(total);
  for (int64_t k = 0; k < depth; k += kSumDepth) {
    vf c[kRows][kVectors];
    multiply<kRows, kVectors>(
        a + k, a_step, 1, b + k * width, width, depth - k < kSumDepth ? depth - k : kSumDepth, c);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        total[m][v] += c[m][v];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      store(to + m * width + v * kLanes, total[m][v]);
    }
  }
}

// The same for up to kTileRows rows and any number of vectors.
__attribute__((noinline)) inline void multiply_rows(
    int64_t rows,
    const float* a,
    int64_t a_step,
    const float* b,
    int64_t depth,
    float* to,
    int64_t width) {
  with_rows(rows, [&](auto tile_rows) {
    constexpr int kRows = decltype(tile_rows)::value;
    int64_t r = 0;
    for (; r + kTileColumns <= width; r += kTileColumns) {
      multiply_in_parts<kRows, 2>(a, a_step, b + r, depth, to + r, width);
    }
    if (r < width) {
      multiply_in_parts<kRows, 1>(a, a_step, b + r, depth, to + r, width);
    }
  });
}

// ---- forward ----

// The input part of the gates' arguments of all steps, without bias.
inline void multiply_inputs(
    const RnnTasks& tasks,
    const Sequences& s,
    int64_t saved_units,
    MaskedRows& matrix,
    float* packed,
    float* saved) {
  const RnnProblem& p = tasks.p;
  const int64_t in = p.in, out = p.gates * p.hidden;
  for (int64_t t = 0; t < p.steps; ++t) {
    for (int64_t r = 0; r < s.width; r += kTileColumns) {
      const int64_t width = s.width - r < kTileColumns ? s.width - r : kTileColumns;
      const int64_t left = s.count - r;
      pack_panel(
          p.x + (t * tasks.batch() + s.row + r) * in, left < width ? left : width, in, width,
          packed + (t * s.width + r) * in);
    }
  }
  TileAhead nothing(Lines(), Lines(), Lines(), 1);
  for (int64_t o0 = 0; o0 < out; o0 += kForwardRows) {
    const int64_t o_count = out - o0 < kForwardRows ? out - o0 : kForwardRows;
    for (int64_t i0 = 0; i0 < in || i0 == 0; i0 += kForwardDepth) {
      const int64_t i_count = in - i0 < kForwardDepth ? in - i0 : kForwardDepth;
      const float* tile = matrix.rows(o0, o_count, i0, i_count);
      for (int64_t t = 0; t < p.steps; ++t) {
        float* to = saved + tasks.saved_at(s, t, saved_units) + o0 * tasks.padded_rows;
        for (int64_t r = 0; r < s.width; r += kTileColumns) {
          const float* panel = packed + (t * s.width + r) * in;
          if (s.width - r >= kTileColumns) {
            forward_panel<2>(
                tile, matrix.step(), o_count, panel + i0 * kTileColumns, i_count, to + r,
                tasks.padded_rows, i0 == 0, nothing);
          } else {
            forward_panel<1>(
                tile, matrix.step(), o_count, panel + i0 * kLanes, i_count, to + r,
                tasks.padded_rows, i0 == 0, nothing);
          }
        }
      }
    }
  }
}

template <typename Cell>
void rnn_forward(const RnnProblem& p, const RnnResults& results, const Runner& runner) {
  constexpr int kGates = Cell::kGates;
  const int64_t in = p.in, hidden = p.hidden, out = kGates * hidden;
  const RnnTasks tasks(p, runner.threads);
  const int64_t widest = tasks.widest();
  run_tasks(runner, tasks.count(), tasks.cost(), [&](int64_t task) {
    const Sequences s = tasks[task];
    const int64_t width = s.width, stride = hidden * tasks.padded_rows;
    const LinearProblem problems[2] = {linear_of(p, 0, p.x), linear_of(p, 1, nullptr)};
    const int64_t depth = in < kForwardDepth ? in : kForwardDepth;
    const int64_t hidden_step = spread(hidden);
    thread_local Scratch scratch;
    const auto lease = scratch.reserve(
        MaskedRows::need(depth) + MaskedRows::need(hidden) + Scratch::need(p.steps * widest * in) +
        Scratch::need(out * hidden_step) + 2 * Scratch::need(out) +
        3 * Scratch::need(hidden * widest) + Scratch::need(kGates * kTileRows * widest) +
        Scratch::need(widest));
    MaskedRows inputs(problems[0], s, depth), recurrent(problems[1], s, hidden);
    inputs.take(scratch);
    recurrent.take(scratch);
    float* packed = scratch.floats(p.steps * widest * in);
    float* masked = scratch.floats(out * hidden_step);
    float* input_bias = scratch.floats(out);
    float* hidden_bias = scratch.floats(out);
    float* h = scratch.floats(hidden * widest);
    float* h_next = scratch.floats(hidden * widest);
    float* c = scratch.floats(hidden * widest);
    float* products = scratch.floats(kGates * kTileRows * widest);
    int32_t* keep = reinterpret_cast<int32_t*>(scratch.words(widest));

    multiply_inputs(tasks, s, Cell::kSaved * hidden, inputs, packed, results.saved);
    inputs.bias(input_bias);
    recurrent.bias(hidden_bias);
    for (int64_t o0 = 0; o0 < out; o0 += kForwardRows) {
      const int64_t o_count = out - o0 < kForwardRows ? out - o0 : kForwardRows;
      const float* tile = recurrent.rows(o0, o_count, 0, hidden);
      for (int64_t o = 0; o < o_count; ++o) {
        std::copy(
            tile + o * recurrent.step(), tile + o * recurrent.step() + hidden,
            masked + (o0 + o) * hidden_step);
      }
    }
    load_state(p.h0, s, hidden, h);
    load_state(p.c0, s, hidden, c);

    for (int64_t step = 0; step < p.steps; ++step) {
      const int64_t t = p.reverse ? p.steps - 1 - step : step;
      float* saved = results.saved + tasks.saved_at(s, t, Cell::kSaved * hidden);
      if (p.lengths != nullptr) {
        running(p, s, t, keep);
      }
      for (int64_t first = 0; first < hidden; first += kTileRows) {
        const int64_t rows = hidden - first < kTileRows ? hidden - first : kTileRows;
        for (int gate = 0; gate < kGates; ++gate) {
          multiply_rows(
              rows, masked + (gate * hidden + first) * hidden_step, hidden_step, h, hidden,
              products + gate * kTileRows * widest, width);
        }
        for (int64_t j = 0; j < rows; ++j) {
          for (int64_t r = 0; r < width; r += kLanes) {
            const int64_t unit = first + j, at = unit * width + r;
            float* place = saved + unit * tasks.padded_rows + r;
            vf x_part[kGates], h_part[kGates];
#pragma GCC unroll 4
            for (int gate = 0; gate < kGates; ++gate) {
              x_part[gate] = load(place + gate * stride) + splat(input_bias[gate * hidden + unit]);
              h_part[gate] = load(products + gate * kTileRows * widest + j * width + r) +
                             splat(hidden_bias[gate * hidden + unit]);
            }
            const vf h_before = load(h + at), c_before = load(c + at);
            vf c_new = c_before;
            vf h_new = Cell::forward(x_part, h_part, h_before, c_new, place, stride);
            if (p.lengths != nullptr) {
              const vi lanes = load_mask(keep + r);
              h_new = blend(lanes, h_new, h_before);
              c_new = blend(lanes, c_new, c_before);
            }
            store(h_next + at, h_new);
            if constexpr (Cell::kHasCell) {
              store(c + at, c_new);
              store(place + kGates * stride, c_new);
            }
          }
        }
      }
      std::swap(h, h_next);
      float* y = results.y + t * tasks.batch() * hidden;
      store_state(h, s, hidden, y);
      for (int64_t r = 0; p.lengths != nullptr && r < s.count; ++r) {
        if (keep[r] == 0) {
          std::fill(y + (s.row + r) * hidden, y + (s.row + r + 1) * hidden, 0.0f);
        }
      }
    }
    store_state(h, s, hidden, results.h_n);
    if constexpr (Cell::kHasCell) {
      store_state(c, s, hidden, results.c_n);
    }
  });
}

// ---- backward ----

// The hidden state before every step, [steps][batch][hidden].
inline void previous_states(
    const RnnProblem& p, const float* y, int64_t batch, float* out, const Runner& runner) {
  const int64_t hidden = p.hidden;
  const double cost = static_cast<double>(p.steps * batch * hidden) / kLanes;
  run_tasks(runner, p.steps, cost, [&](int64_t t) {
    const int64_t before = p.reverse ? t + 1 : t - 1;
    float* to = out + t * batch * hidden;
    const bool inside = before >= 0 && before < p.steps;
    const float* from = inside ? y + before * batch * hidden : p.h0;
    if (from != nullptr) {
      std::copy(from, from + batch * hidden, to);
    } else {
      std::fill(to, to + batch * hidden, 0.0f);
    }
    // a reversed sequence that is shorter than the others starts here
    for (int64_t r = 0; inside && p.reverse && p.lengths != nullptr && r < batch; ++r) {
      if (before >= p.lengths[r]) {
        const float* start = p.h0 != nullptr ? p.h0 + r * hidden : nullptr;
        for (int64_t i = 0; i < hidden; ++i) {
          to[r * hidden + i] = start != nullptr ? start[i] : 0.0f;
        }
      }
    }
  });
}

// The gradients of the gates' arguments, transposed: [gate][dy_step], rows in group-major order.
struct GateGradients {
  float* inputs;
  float* recurrent;  // the same where a cell adds both parts
  int64_t step;
};

template <typename Cell>
void rnn_time_loop_backward(
    const RnnProblem& p,
    const RnnGradients& d,
    const float* previous,
    const GateGradients& gates,
    const Runner& runner) {
  constexpr int kGates = Cell::kGates;
  const int64_t hidden = p.hidden, out = kGates * hidden;
  const RnnTasks tasks(p, runner.threads);
  const int64_t widest = tasks.widest();
  run_tasks(runner, tasks.count(), tasks.cost() / 2, [&](int64_t task) {
    const Sequences s = tasks[task];
    const int64_t width = s.width, stride = hidden * tasks.padded_rows;
    const LinearProblem problem = linear_of(p, 1, nullptr);
    const int64_t masked_step = spread(out);
    thread_local Scratch scratch;
    const auto lease = scratch.reserve(
        MaskedRows::need(hidden) + Scratch::need(hidden * masked_step) +
        7 * Scratch::need(hidden * widest) + Scratch::need(out * widest) + Scratch::need(widest));
    MaskedRows recurrent(problem, s, hidden);
    recurrent.take(scratch);
    float* masked = scratch.floats(hidden * masked_step);  // transposed
    float* dh = scratch.floats(hidden * widest);
    float* dc = scratch.floats(hidden * widest);
    float* dy = scratch.floats(hidden * widest);
    float* beside = scratch.floats(hidden * widest);  // dh_previous not through the matrix
    float* h_before = scratch.floats(hidden * widest);
    float* c0 = scratch.floats(hidden * widest);
    float* products = scratch.floats(hidden * widest);
    float* d_gates = scratch.floats(out * widest);
    int32_t* keep = reinterpret_cast<int32_t*>(scratch.words(widest));

    for (int64_t o0 = 0; o0 < out; o0 += kForwardRows) {
      const int64_t o_count = out - o0 < kForwardRows ? out - o0 : kForwardRows;
      const float* tile = recurrent.rows(o0, o_count, 0, hidden);
      transpose(tile, recurrent.step(), o_count, hidden, masked + o0, masked_step);
    }
    load_state(d.dh_n, s, hidden, dh);
    load_state(d.dc_n, s, hidden, dc);
    load_state(p.c0, s, hidden, c0);

    for (int64_t step = p.steps - 1; step >= 0; --step) {
      const int64_t t = p.reverse ? p.steps - 1 - step : step;
      const int64_t before = p.reverse ? t + 1 : t - 1;
      const float* saved = d.saved + tasks.saved_at(s, t, Cell::kSaved * hidden);
      const float* c_before = c0;
      int64_t c_step = width;
      if (Cell::kHasCell && step > 0) {
        c_before = d.saved + tasks.saved_at(s, before, Cell::kSaved * hidden) + kGates * stride;
        c_step = tasks.padded_rows;
      }
      if (p.lengths != nullptr) {
        running(p, s, t, keep);
      }
      load_state(d.dy != nullptr ? d.dy + t * tasks.batch() * hidden : nullptr, s, hidden, dy);
      if (!Cell::kHasCell) {
        load_state(previous + t * tasks.batch() * hidden, s, hidden, h_before);
      }
      const int64_t row = (s.group * p.steps + t) * p.rows + s.first;
      for (int64_t unit = 0; unit < hidden; ++unit) {
        for (int64_t r = 0; r < width; r += kLanes) {
          const int64_t at = unit * width + r;
          const vf dh_all = load(dh + at) + load(dy + at);
          vf dc_new = load(dc + at), dx[kGates], d_hidden[kGates];
          vf rest = Cell::backward(
              saved + unit * tasks.padded_rows + r, stride, load(c_before + unit * c_step + r),
              load(h_before + at), dh_all, dc_new, dx, d_hidden);
          if (p.lengths != nullptr) {
            const vi lanes = load_mask(keep + r);
            rest = blend(lanes, rest, load(dh + at));
            dc_new = blend(lanes, dc_new, load(dc + at));
#pragma GCC unroll 4
            for (int gate = 0; gate < kGates; ++gate) {
              dx[gate] = blend(lanes, dx[gate], vf{});
              d_hidden[gate] = blend(lanes, d_hidden[gate], vf{});
            }
          }
          store(dc + at, dc_new);
          store(beside + at, rest);
#pragma GCC unroll 4
          for (int gate = 0; gate < kGates; ++gate) {
            const int64_t o = gate * hidden + unit;
            store_part(gates.inputs + o * gates.step + row + r, dx[gate], s.count - r);
            if constexpr (Cell::kSameGates) {
              store(d_gates + o * width + r, dx[gate]);
            } else {
              store_part(gates.recurrent + o * gates.step + row + r, d_hidden[gate], s.count - r);
              store(d_gates + o * width + r, d_hidden[gate]);
            }
          }
        }
      }
      for (int64_t first = 0; first < hidden; first += kTileRows) {
        const int64_t rows = hidden - first < kTileRows ? hidden - first : kTileRows;
        multiply_rows(
            rows, masked + first * masked_step, masked_step, d_gates, out, products + first * width,
            width);
      }
      for (int64_t at = 0; at < hidden * width; at += kLanes) {
        store(dh + at, load(products + at) + load(beside + at));
      }
    }
    if (d.dh0 != nullptr) {
      store_state(dh, s, hidden, d.dh0);
    }
    if (d.dc0 != nullptr) {
      store_state(dc, s, hidden, d.dc0);
    }
  });
}

template <typename Cell>
void rnn_backward(const RnnProblem& p, const RnnGradients& d, const Runner& runner) {
  const RnnTasks tasks(p, runner.threads);
  const int64_t rows = p.steps * tasks.batch(), out = Cell::kGates * p.hidden;
  const int64_t step = spread(rows);
  thread_local Scratch scratch;
  const auto lease = scratch.reserve(
      (Cell::kSameGates ? 1 : 2) * Scratch::need(out * step) + Scratch::need(rows * p.hidden));
  GateGradients gates{scratch.floats(out * step), nullptr, step};
  gates.recurrent = Cell::kSameGates ? gates.inputs : scratch.floats(out * step);
  float* previous = scratch.floats(rows * p.hidden);
  previous_states(p, d.y, tasks.batch(), previous, runner);
  rnn_time_loop_backward<Cell>(p, d, previous, gates, runner);
  const float* gradients[2] = {gates.inputs, gates.recurrent};
  const void* inputs[2] = {p.x, previous};
  const auto linear = p.mask.hard ? linear_gradients<float, true> : linear_gradients<float, false>;
  for (int matrix = 0; matrix < 2; ++matrix) {
    Gradients of{};
    of.dx = matrix == 0 ? d.dx : nullptr;
    of.dweight = d.dweights[matrix];
    of.dlogits = d.dlogits[matrix];
    of.dbias = d.dbiases[matrix];
    of.dbias_logits = d.dbias_logits[matrix];
    linear(linear_of(p, matrix, inputs[matrix]), of, gradients[matrix], step, runner);
  }
}

}  // namespace modmask::MODMASK_CAPABILITY
