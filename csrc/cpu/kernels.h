// What the kernels of every CPU capability offer to the bindings. No torch: the same sources are
// also compiled on their own by the tests.
#pragma once

#include <cstdint>

#include "../common/estimator.h"

namespace modmask {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Calls `body(context)` on `threads` threads at once and returns when all have returned.
struct Runner {
  int threads;
  void (*run)(int threads, void (*body)(void*), void* context);
};

// The cuts of one parameter, one per set.
struct Cuts {
  int64_t tensor_id;
  const Cut* of_set;
};

// Which weights a logit stands for, where it is not one of one weight by itself.
struct LogitLayout {
  int64_t rows;            // of the weight that share a row of logits; 0: one logit per weight
  int64_t width;           // logits in a row
  const int32_t* columns;  // the logit of each weight of a row
  // The n largest of every m weights that lie `stride` apart are kept; m = 0: each by itself.
  int64_t keep;
  int64_t among;
  int64_t stride;
};

// How the masks of one parameter are drawn. Group g = set * samples + sample.
struct MaskSpec {
  const int64_t* seeds;  // [sets, draws], or one with seed_stride 0, or null: threshold logit > 0
  int64_t seed_stride;
  int64_t sets;
  int64_t samples;  // of all draws of a set
  int64_t sample_offset;
  int64_t element_offset;
  int64_t tensor_id;
  float tau;
  bool hard;
  Estimator estimator;
  float low;  // kHardConcrete: the stretch; kThreshold: the cut, and whether ties are kept
  float high;
  float least_u;  // kHardConcrete: bounds of the uniform number
  float most_u;
  bool antithetic;   // samples 2j and 2j + 1 share the noise of sample j, the second as 1 - u
  const Cuts* cuts;  // kTopK: of every parameter
  int64_t cut_count;
  LogitLayout layout;
  int64_t draws = 1;    // seeds of each set, which share its samples equally, one after the other
  bool shared = false;  // all sets have the logits of the first one
};

struct LinearProblem {
  MaskSpec mask;
  int64_t bias_tensor_id;
  DType dtype;   // of x, weight, bias, y and their gradients
  int64_t rows;  // of each group
  int64_t in;
  int64_t out;
  int64_t steps = 1;         // gradients only: x is [steps, groups * rows / steps, in]
  const void* x;             // [groups * rows, in], contiguous, as everything here
  const void* weight;        // [out, in]
  const float* logits;       // [sets, out, in]
  const void* bias;          // [out] or null
  const float* bias_logits;  // [sets, out] or null
};

// Of two spatial dimensions; one-dimensional convolutions have a height of 1.
struct ConvProblem {
  MaskSpec mask;
  int64_t bias_tensor_id;
  DType dtype;
  int64_t images;  // of each group
  int64_t conv_groups;
  int64_t channels;  // of x, in all
  int64_t outputs;   // channels of y, in all
  int64_t size[2];
  int64_t out_size[2];
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];  // zeros before the first row and column
  int64_t dilation[2];
  const void* x;             // [groups * images, channels, size], contiguous
  const void* weight;        // [outputs, channels / conv_groups, kernel]
  const float* logits;       // [sets, *weight]
  const void* bias;          // [outputs] or null
  const float* bias_logits;  // [sets, outputs] or null
};

inline int64_t outputs_of(const LinearProblem& p) {
  return p.out;
}

inline int64_t outputs_of(const ConvProblem& p) {
  return p.outputs;
}

// Outputs that are null are not computed; shapes are those of x, y and the parameters.
struct Gradients {
  const void* dy;
  void* dx;
  void* dweight;
  float* dlogits;
  void* dbias;
  float* dbias_logits;
};

enum class RnnCell { kLstm, kGru };

// One direction of one recurrent layer, in float32. Of two parameters the first is that of the
// input, the second that of the hidden state.
struct RnnProblem {
  MaskSpec mask;          // its tensor_id is of no use here
  int64_t tensor_ids[4];  // of both weights, then of both biases
  RnnCell cell;
  int64_t steps;
  int64_t rows;  // sequences of each group
  int64_t in;
  int64_t hidden;
  int64_t gates;
  bool reverse;
  const int64_t* lengths;       // [groups * rows], or null where all sequences have all steps
  const float* x;               // [steps, groups * rows, in], contiguous
  const float* h0;              // [groups * rows, hidden] or null for zeros
  const float* c0;              // the same, where the cell has such a state
  const float* weights[2];      // [gates * hidden, in or hidden]
  const float* logits[2];       // [sets, *weight]
  const float* biases[2];       // [gates * hidden] or null
  const float* bias_logits[2];  // [sets, gates * hidden] or null
};

struct RnnResults {
  float* y;      // [steps, groups * rows, hidden]
  float* h_n;    // [groups * rows, hidden]
  float* c_n;    // the same, or null
  float* saved;  // steps * saved_values(...)
};

// Outputs that are null are not computed.
struct RnnGradients {
  const float* y;      // of the forward pass
  const float* saved;  // likewise
  const float* dy;     // or null for zeros, as the next two
  const float* dh_n;
  const float* dc_n;
  float* dx;
  float* dh0;
  float* dc0;
  float* dweights[2];
  float* dlogits[2];
  float* dbiases[2];
  float* dbias_logits[2];
};

struct TopKProblem {
  const void* const* scores;  // [tensors], each of counts[t] values
  const int64_t* counts;
  int64_t tensors;
  DType dtype;
  int64_t k;  // in [0, sum of counts]
  bool largest;
  bool packed;  // masks of one bit per score instead of one byte
};

// Masks of one parameter, a bit per element in row-major order, the lowest bit first.
struct SetBits {
  const uint8_t* bits;  // [sets, bytes] or null
  int64_t sets;
  int64_t bytes;
};

// Consecutive rows, or images, that see the masks of one set.
struct SetRun {
  int64_t set;
  int64_t first;
  int64_t count;  // at most kMostOfRun
};

constexpr int64_t kMostOfRun = 256;

// Which masks the rows of a batch see. The other operands are those of a masked product, with all
// rows in one group and no logits.
struct Selection {
  SetBits masks;
  SetBits bias_masks;
  const SetRun* runs;  // cover all rows of x
  int64_t run_count;
  const int64_t* places;  // the row of y for each row of x
};

struct Kernels {
  const char* capability;
  int lanes;  // floats of a vector
  void (*linear_forward)(const LinearProblem&, void* y, const Runner&);
  void (*linear_backward)(const LinearProblem&, const Gradients&, const Runner&);
  void (*conv_forward)(const ConvProblem&, void* y, const Runner&);
  void (*conv_backward)(const ConvProblem&, const Gradients&, const Runner&);
  void (*select_linear)(const LinearProblem&, const Selection&, void* y, const Runner&);
  void (*select_conv)(const ConvProblem&, const Selection&, void* y, const Runner&);
  void (*rnn_forward)(const RnnProblem&, const RnnResults&, const Runner&);
  void (*rnn_backward)(const RnnProblem&, const RnnGradients&, const Runner&);
  // values: [samples, sets, count]
  void (*sample_values)(const MaskSpec&, const float* logits, int64_t count, float*, const Runner&);
  // bits: [samples, sets, ceil(count / 8)]
  void (*sample_bits)(const MaskSpec&, const float* logits, int64_t count, uint8_t*, const Runner&);
  // dvalues: [samples, sets, count], dlogits: [sets, count]
  void (*sample_backward)(
      const MaskSpec&,
      const float* logits,
      const float* dvalues,
      int64_t count,
      float* dlogits,
      const Runner&);
  // false, with nothing written, where a score is NaN
  bool (*top_k)(const TopKProblem&, uint8_t* const* masks, const Runner&);
  // where the k largest of `count` scores end; false where a score is NaN
  bool (*top_k_cut)(const float* scores, int64_t count, int64_t k, Cut*, const Runner&);
};

extern const Kernels kKernelsPlain;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace modmask
