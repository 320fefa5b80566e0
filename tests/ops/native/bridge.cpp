// The kernel tables behind plain functions, without torch. MODMASK_TEST_TABLES names the tables,
// as TABLE(Plain) TABLE(Avx2).

#include "bridge.h"

#include <cstring>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace modmask {
extern const Kernels kKernelsLanes16;
}

namespace {

#define TABLE(name) &modmask::kKernels##name,
const modmask::Kernels* const kTables[] = {MODMASK_TEST_TABLES};
#undef TABLE

void run_threads(int threads, void (*body)(void*), void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    others.emplace_back(body, context);
  }
  body(context);
  for (std::thread& t : others) {
    t.join();
  }
}

modmask::MaskSpec spec_of(const Draw& d) {
  modmask::MaskSpec spec{};
  spec.seeds = d.seeds;
  spec.seed_stride = 1;
  spec.sets = d.sets;
  spec.samples = d.samples;
  spec.sample_offset = d.sample_offset;
  spec.element_offset = d.element_offset;
  spec.tensor_id = d.tensor_id;
  spec.tau = d.tau;
  spec.hard = d.hard != 0;
  return spec;
}

}  // namespace

extern "C" {

int table_count() {
  return static_cast<int>(sizeof kTables / sizeof kTables[0]);
}

const char* table_name(int table) {
  return kTables[table]->capability;
}

void linear_forward(int table, int threads, const Draw* draw, const Linear* l, void* y) {
  modmask::LinearProblem p{};
  p.mask = spec_of(*draw);
  p.bias_tensor_id = draw->tensor_id + 1;
  p.dtype = static_cast<modmask::DType>(l->dtype);
  p.rows = l->rows;
  p.in = l->in;
  p.out = l->out;
  p.x = l->x;
  p.weight = l->weight;
  p.logits = l->logits;
  p.bias = l->bias;
  p.bias_logits = l->bias_logits;
  kTables[table]->linear_forward(p, y, {threads, run_threads});
}

void linear_backward(
    int table, int threads, const Draw* draw, const Linear* l, const Gradients* given) {
  modmask::LinearProblem p{};
  p.mask = spec_of(*draw);
  p.bias_tensor_id = draw->tensor_id + 1;
  p.dtype = static_cast<modmask::DType>(l->dtype);
  p.rows = l->rows;
  p.in = l->in;
  p.out = l->out;
  p.x = l->x;
  p.weight = l->weight;
  p.logits = l->logits;
  p.bias = l->bias;
  p.bias_logits = l->bias_logits;
  modmask::Gradients d{};
  d.dy = given->dy;
  d.dx = given->dx;
  d.dweight = given->dweight;
  d.dlogits = given->dlogits;
  d.dbias = given->dbias;
  d.dbias_logits = given->dbias_logits;
  kTables[table]->linear_backward(p, d, {threads, run_threads});
}

void sample_values(
    int table, int threads, const Draw* draw, const float* logits, int64_t count, float* values) {
  kTables[table]->sample_values(spec_of(*draw), logits, count, values, {threads, run_threads});
}

void sample_bits(
    int table, int threads, const Draw* draw, const float* logits, int64_t count, uint8_t* bits) {
  kTables[table]->sample_bits(spec_of(*draw), logits, count, bits, {threads, run_threads});
}

void sample_backward(
    int table,
    int threads,
    const Draw* draw,
    const float* logits,
    const float* dvalues,
    int64_t count,
    float* dlogits) {
  kTables[table]->sample_backward(
      spec_of(*draw), logits, dvalues, count, dlogits, {threads, run_threads});
}

}  // extern "C"
