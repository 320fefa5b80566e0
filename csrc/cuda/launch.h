// What the bindings call of the CUDA code: neither torch nor CUDA headers, so that each side is
// compiled without the other's. All pointers are of the device of the stream, which must be the
// current one; nothing here allocates or waits. A launch that fails throws, naming the kernel.
#pragma once

#include <cstdint>

#include "mask_params.h"
#include "masked_rnn.h"

struct CUstream_st;

namespace modmask::cuda {

using Stream = CUstream_st*;

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

// Of the toolkit that compiled this, as in CUDART_VERSION.
int toolkit_version();

// Why nothing can run on the current device, or null.
const char* problem();

// bits: [ceil(count / 8)]; mask: 0 or 1
void launch_pack_bits(const uint8_t* mask, int64_t count, uint8_t* bits, Stream stream);

// logits: [sets, count], or [count] where the sets share them. Values and their gradients are
// [samples, sets, count], bits [samples, sets, ceil(count / 8)]; neither is empty.
void launch_sample_bits(
    const MaskParams& mask, const float* logits, int64_t count, uint8_t* bits, Stream stream);
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

// A linear layer whose rows have masks of their own.
struct SelectLinear {
  ElementType type;  // of x, weight, bias and y
  int64_t rows;
  int64_t in;
  int64_t out;
  const void* x;             // [rows, in]
  const void* weight;        // [out, in]
  const uint8_t* bits;       // [sets, ceil(out * in / 8)]
  const int64_t* row_sets;   // [rows]
  const void* bias;          // [out] or null
  const uint8_t* bias_bits;  // [sets, ceil(out / 8)] or null
  float* partials;           // as many as select_linear_partials says
  void* y;                   // [rows, out], not empty
};

int64_t select_linear_partials(int64_t rows, int64_t in, int64_t out);
void launch_select_linear(const SelectLinear& s, Stream stream);

}  // namespace modmask::cuda
