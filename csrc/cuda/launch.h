// What the bindings call of the CUDA code: neither torch nor CUDA headers, so that each side is
// compiled without the other's. All pointers are of the device of the stream, which must be the
// current one; nothing here allocates or waits. A launch that fails throws, naming the kernel.
#pragma once

#include <cstdint>

#include "element.h"
#include "group_affine.h"
#include "mask_params.h"
#include "masked_linear.h"
#include "masked_rnn.h"
#include "select.h"

struct CUstream_st;

namespace modmask::cuda {

using Stream = CUstream_st*;

// Of the toolkit that compiled this, as in CUDART_VERSION.
int toolkit_version();

// Why nothing can run on the current device, or null.
const char* problem();

// bits: [ceil(count / 8)]; mask: 0 or 1
void launch_pack_bits(const uint8_t* mask, int64_t count, uint8_t* bits, Stream stream);

// Bits of every set and sample where `to` says; logits: [sets, count], or [count] where the sets
// share them; not empty.
void launch_sample_bits(
    const MaskParams& mask, const float* logits, int64_t count, const MaskBits& to, Stream stream);

// Bits of a weight from those of logits that divide it in every dimension; sizes from the outermost
// dimension on, 1 for those that are missing.
struct BlockSizes {
  int64_t small[4];
  int64_t whole[4];
};
void launch_expand_bits(
    const BlockSizes& sizes,
    int64_t masks,
    const uint8_t* from,
    int64_t from_stride,
    uint8_t* to,
    int64_t to_stride,
    Stream stream);

// Values and their gradients are [samples, sets, count]; neither is empty.
void launch_sample_values(
    const MaskParams& mask,
    const float* logits,
    int64_t count,
    bool hard,
    float* values,
    Stream stream);
void launch_sample_backward(
    const MaskParams& mask,
    const float* logits,
    int64_t count,
    const float* dvalues,
    float* dlogits,
    Stream stream);

// How the time loop is cut on the current device; units = 0 where it cannot run in one launch.
RnnSizes plan_rnn_here(Cell cell, int64_t steps, int64_t rows, int64_t groups, int64_t hidden);

// Sizes as planned, none of them 0 but the steps.
void launch_rnn_forward(Cell cell, const RnnForward& p, Stream stream);
void launch_rnn_backward(Cell cell, const RnnBackward& p, Stream stream);

// The same step by step, of any sizes; `layer` is rnn_layer's and the parts of its product take
// masked_linear_partials values.
void launch_rnn_steps_forward(
    Cell cell, const RnnStepsForward& p, const MaskedLinear& layer, Stream stream);
void launch_rnn_steps_backward(
    Cell cell, const RnnStepsBackward& p, const MaskedLinear& layer, Stream stream);

// What launch_top_k needs of device memory, in bytes, and where in the workspace a word is left
// that is not 0 if a score is NaN.
constexpr int64_t kTopKNan = 24;
int64_t top_k_list_bytes(int64_t tensors);
int64_t top_k_workspace_bytes();

struct TopKScores {
  const void* scores;
  int64_t count;
  uint8_t* mask;  // [count] of 0 and 1, or bits
};

// Masks of the k largest, or smallest, of all scores; `tensors` in the memory of the host.
void launch_top_k(
    ElementType type,
    const TopKScores* tensors,
    int64_t count,
    int64_t k,
    bool largest,
    bool packed,
    void* list,
    void* workspace,
    Stream stream);

// Where the k largest logits of every set end; logits [sets, count], not empty, or [count] where
// the sets share them. `list` and `workspace` as for one tensor.
void launch_top_k_cuts(
    const float* logits,
    int64_t sets,
    bool shared,
    int64_t count,
    int64_t k,
    Cut* cuts,
    void* list,
    void* workspace,
    Stream stream);

// How many values `partials` needs for a product forward or, `backward`, to the input. No launch
// here is for an empty batch, input or output.
int64_t masked_linear_partials(const MaskedLinear& l, bool backward);
// The parts of a product, which are to be added up; returns how many there are.
int64_t launch_masked_linear_parts(
    const MaskedLinear& l, bool backward, const void* from, float* partials, Stream stream);
// y: [batch, out], from x [batch, in]
void launch_masked_linear(
    const MaskedLinear& l, const void* x, float* partials, void* y, Stream stream);
// dx: [batch, in], from dy [batch, out]
void launch_masked_linear_dx(
    const MaskedLinear& l, const void* dy, float* partials, void* dx, Stream stream);
// dlogits: [sets, out, in] or null; dweight: [out, in] or null, and of n of m from bits
void launch_masked_linear_gradients(
    const MaskedLinear& l,
    const void* x,
    const void* dy,
    float* dlogits,
    void* dweight,
    Stream stream);
// sums: dy [sets * samples, out], added up over the rows of each group; the results may be null
void launch_bias_gradients(
    const MaskedLinear& l, const float* sums, void* dbias, float* dbias_logits, Stream stream);

// y of x, or of dy as x the gradient of x; none of its sizes 0, as of all that follows.
void launch_group_affine(const GroupAffine& a, const void* x, void* y, Stream stream);
// How many values `partials` needs.
int64_t group_affine_partials(const GroupAffine& a);
// x may be null where dscale is; dx, dscale and dshift may be null.
void launch_group_affine_backward(
    const GroupAffine& a,
    const void* dy,
    const void* x,
    void* dx,
    float* partials,
    float* dscale,
    float* dshift,
    Stream stream);

// Neither the batch nor the outputs nor the places are none.
void launch_selected_product(const Selected& p, bool convolution, Stream stream);

}  // namespace modmask::cuda
