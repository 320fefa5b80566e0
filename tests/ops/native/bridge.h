// The C interface of bridge.cpp; tests/ops/native_build.py mirrors it for ctypes.
#pragma once

#include <cstdint>

extern "C" {

struct Draw {
  const int64_t* seeds;  // [sets] or null
  int64_t sets;
  int64_t samples;
  int64_t sample_offset;
  int64_t element_offset;
  int64_t tensor_id;
  float tau;
  int32_t hard;
  int32_t estimator;  // as in the schemas, like what follows
  float low;
  float high;
  float clamp;
  int32_t antithetic;
};

struct Linear {
  int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int64_t rows;
  int64_t in;
  int64_t out;
  const void* x;
  const void* weight;
  const float* logits;
  const void* bias;
  const float* bias_logits;
};

struct Gradients {
  const void* dy;
  void* dx;
  void* dweight;
  float* dlogits;
  void* dbias;
  float* dbias_logits;
};

struct Conv {
  int64_t dtype;
  int64_t images;
  int64_t conv_groups;
  int64_t channels;
  int64_t outputs;
  int64_t size[2];
  int64_t out_size[2];
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];
  const void* x;
  const void* weight;
  const float* logits;
  const void* bias;
  const float* bias_logits;
};

struct Select {
  const uint8_t* masks;  // [sets, octets]
  const uint8_t* bias_masks;
  int64_t sets;
  int64_t octets;
  int64_t bias_octets;
  const int64_t* runs;  // set, first row and number of rows of each
  int64_t run_count;
  const int64_t* places;
};

struct Rnn {
  int64_t cell;  // 0 LSTM, 1 GRU
  int64_t steps;
  int64_t rows;
  int64_t in;
  int64_t hidden;
  int32_t reverse;
  const int64_t* lengths;
  const float* x;
  const float* h0;
  const float* c0;
  const float* weights[2];
  const float* logits[2];
  const float* biases[2];
  const float* bias_logits[2];
};

struct RnnGradients {
  const float* y;
  const float* saved;
  const float* dy;
  float* dx;
  float* dh0;
  float* dc0;
  float* dweights[2];
  float* dlogits[2];
  float* dbiases[2];
  float* dbias_logits[2];
};

int table_count();
const char* table_name(int table);
void linear_forward(int table, int threads, const Draw*, const Linear*, void* y);
void linear_backward(int table, int threads, const Draw*, const Linear*, const Gradients*);
void conv_forward(int table, int threads, const Draw*, const Conv*, void* y);
void conv_backward(int table, int threads, const Draw*, const Conv*, const Gradients*);
void select_linear(int table, int threads, const Linear*, const Select*, void* y);
void select_conv(int table, int threads, const Conv*, const Select*, void* y);
// of floats that the forward pass keeps
int64_t rnn_saved(int table, const Draw*, const Rnn*);
void rnn_forward(
    int table,
    int threads,
    const Draw*,
    const Rnn*,
    float* y,
    float* h_n,
    float* c_n,
    float* saved);
void rnn_backward(int table, int threads, const Draw*, const Rnn*, const RnnGradients*);
void sample_values(
    int table, int threads, const Draw*, const float* logits, int64_t count, float* values);
void sample_bits(
    int table, int threads, const Draw*, const float* logits, int64_t count, uint8_t* bits);
void sample_backward(
    int table,
    int threads,
    const Draw*,
    const float* logits,
    const float* dvalues,
    int64_t count,
    float* dlogits);
int top_k(
    int table,
    int threads,
    int64_t dtype,
    const void* const* scores,
    const int64_t* counts,
    int64_t tensors,
    int64_t k,
    int packed,
    uint8_t* const* masks);

}  // extern "C"
