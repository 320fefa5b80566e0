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
  spec.estimator = static_cast<modmask::Estimator>(d.estimator);
  spec.low = d.low;
  spec.high = d.high;
  spec.least_u = d.clamp;
  spec.most_u = 1.0f - d.clamp;
  spec.antithetic = d.antithetic != 0;
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

// The cuts of top_k masks over a weight and its bias, for as long as the spec is used.
class TopKCuts {
 public:
  TopKCuts(int table, const Draw& d, modmask::MaskSpec& spec)
      : table_(table), draw_(d), spec_(spec) {}

  void add(int64_t tensor_id, const float* logits, int64_t count) {
    if (spec_.estimator != modmask::Estimator::kTopK || logits == nullptr) {
      return;
    }
    const auto k = static_cast<int64_t>(draw_.low * static_cast<float>(count));
    std::vector<modmask::Cut>& cuts = cuts_[spec_.cut_count];
    cuts.resize(static_cast<size_t>(spec_.sets));
    for (int64_t set = 0; set < spec_.sets; ++set) {
      kTables[table_]->top_k_cut(
          logits + set * count, count, k, &cuts[static_cast<size_t>(set)], {2, run_threads});
    }
    of_tensor_[spec_.cut_count++] = {tensor_id, cuts.data()};
    spec_.cuts = of_tensor_;
  }

 private:
  int table_;
  const Draw& draw_;
  modmask::MaskSpec& spec_;
  std::vector<modmask::Cut> cuts_[2];
  modmask::Cuts of_tensor_[2];
};

modmask::Gradients gradients_of(const Gradients& given) {
  modmask::Gradients d{};
  d.dy = given.dy;
  d.dx = given.dx;
  d.dweight = given.dweight;
  d.dlogits = given.dlogits;
  d.dbias = given.dbias;
  d.dbias_logits = given.dbias_logits;
  return d;
}

modmask::LinearProblem problem_of(const Draw& draw, const Linear& l) {
  modmask::LinearProblem p{};
  p.mask = spec_of(draw);
  p.bias_tensor_id = draw.tensor_id + 1;
  p.dtype = static_cast<modmask::DType>(l.dtype);
  p.rows = l.rows;
  p.in = l.in;
  p.out = l.out;
  p.x = l.x;
  p.weight = l.weight;
  p.logits = l.logits;
  p.bias = l.bias;
  p.bias_logits = l.bias_logits;
  return p;
}

modmask::ConvProblem problem_of(const Draw& draw, const Conv& c) {
  modmask::ConvProblem p{};
  p.mask = spec_of(draw);
  p.bias_tensor_id = draw.tensor_id + 1;
  p.dtype = static_cast<modmask::DType>(c.dtype);
  p.images = c.images;
  p.conv_groups = c.conv_groups;
  p.channels = c.channels;
  p.outputs = c.outputs;
  for (int i = 0; i < 2; ++i) {
    p.size[i] = c.size[i];
    p.out_size[i] = c.out_size[i];
    p.kernel[i] = c.kernel[i];
    p.stride[i] = c.stride[i];
    p.padding[i] = c.padding[i];
    p.dilation[i] = c.dilation[i];
  }
  p.x = c.x;
  p.weight = c.weight;
  p.logits = c.logits;
  p.bias = c.bias;
  p.bias_logits = c.bias_logits;
  return p;
}

modmask::Selection selection_of(const Select& s) {
  static_assert(sizeof(modmask::SetRun) == 3 * sizeof(int64_t));
  return {
      {s.masks, s.sets, s.octets},
      {s.bias_masks, s.sets, s.bias_octets},
      reinterpret_cast<const modmask::SetRun*>(s.runs),
      s.run_count,
      s.places};
}

modmask::RnnProblem problem_of(const Draw& draw, const Rnn& r) {
  modmask::RnnProblem p{};
  p.mask = spec_of(draw);
  for (int i = 0; i < 4; ++i) {
    p.tensor_ids[i] = draw.tensor_id + i;
  }
  p.cell = static_cast<modmask::RnnCell>(r.cell);
  p.steps = r.steps;
  p.rows = r.rows;
  p.in = r.in;
  p.hidden = r.hidden;
  p.gates = r.cell == 0 ? 4 : 3;
  p.reverse = r.reverse != 0;
  p.lengths = r.lengths;
  p.x = r.x;
  p.h0 = r.h0;
  p.c0 = r.c0;
  for (int i = 0; i < 2; ++i) {
    p.weights[i] = r.weights[i];
    p.logits[i] = r.logits[i];
    p.biases[i] = r.biases[i];
    p.bias_logits[i] = r.bias_logits[i];
  }
  return p;
}

int64_t weights_of(const Conv& c) {
  return c.outputs * (c.channels / c.conv_groups) * c.kernel[0] * c.kernel[1];
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
  modmask::LinearProblem p = problem_of(*draw, *l);
  TopKCuts cuts(table, *draw, p.mask);
  cuts.add(draw->tensor_id, l->logits, l->in * l->out);
  cuts.add(draw->tensor_id + 1, l->bias_logits, l->out);
  kTables[table]->linear_forward(p, y, {threads, run_threads});
}

void linear_backward(
    int table, int threads, const Draw* draw, const Linear* l, const Gradients* given) {
  modmask::LinearProblem p = problem_of(*draw, *l);
  TopKCuts cuts(table, *draw, p.mask);
  cuts.add(draw->tensor_id, l->logits, l->in * l->out);
  cuts.add(draw->tensor_id + 1, l->bias_logits, l->out);
  kTables[table]->linear_backward(p, gradients_of(*given), {threads, run_threads});
}

void select_linear(int table, int threads, const Linear* l, const Select* s, void* y) {
  kTables[table]->select_linear(problem_of({}, *l), selection_of(*s), y, {threads, run_threads});
}

void select_conv(int table, int threads, const Conv* c, const Select* s, void* y) {
  kTables[table]->select_conv(problem_of({}, *c), selection_of(*s), y, {threads, run_threads});
}

void conv_forward(int table, int threads, const Draw* draw, const Conv* c, void* y) {
  modmask::ConvProblem p = problem_of(*draw, *c);
  TopKCuts cuts(table, *draw, p.mask);
  cuts.add(draw->tensor_id, c->logits, weights_of(*c));
  cuts.add(draw->tensor_id + 1, c->bias_logits, c->outputs);
  kTables[table]->conv_forward(p, y, {threads, run_threads});
}

void conv_backward(
    int table, int threads, const Draw* draw, const Conv* c, const Gradients* given) {
  modmask::ConvProblem p = problem_of(*draw, *c);
  TopKCuts cuts(table, *draw, p.mask);
  cuts.add(draw->tensor_id, c->logits, weights_of(*c));
  cuts.add(draw->tensor_id + 1, c->bias_logits, c->outputs);
  kTables[table]->conv_backward(p, gradients_of(*given), {threads, run_threads});
}

int64_t rnn_saved(int table, const Draw* draw, const Rnn* r) {
  const int64_t lanes = kTables[table]->lanes;
  return draw->sets * draw->samples * r->steps * (r->cell == 0 ? 5 : 4) * r->hidden *
         ((r->rows + lanes - 1) / lanes * lanes);
}

void rnn_forward(
    int table,
    int threads,
    const Draw* draw,
    const Rnn* r,
    float* y,
    float* h_n,
    float* c_n,
    float* saved) {
  kTables[table]->rnn_forward(problem_of(*draw, *r), {y, h_n, c_n, saved}, {threads, run_threads});
}

void rnn_backward(
    int table, int threads, const Draw* draw, const Rnn* r, const RnnGradients* given) {
  modmask::RnnGradients d{};
  d.y = given->y;
  d.saved = given->saved;
  d.dy = given->dy;
  d.dx = given->dx;
  d.dh0 = given->dh0;
  d.dc0 = given->dc0;
  for (int i = 0; i < 2; ++i) {
    d.dweights[i] = given->dweights[i];
    d.dlogits[i] = given->dlogits[i];
    d.dbiases[i] = given->dbiases[i];
    d.dbias_logits[i] = given->dbias_logits[i];
  }
  kTables[table]->rnn_backward(problem_of(*draw, *r), d, {threads, run_threads});
}

int top_k(
    int table,
    int threads,
    int64_t dtype,
    const void* const* scores,
    const int64_t* counts,
    int64_t tensors,
    int64_t k,
    int packed,
    uint8_t* const* masks) {
  const modmask::TopKProblem p{scores, counts, tensors,    static_cast<modmask::DType>(dtype),
                               k,      true,   packed != 0};
  return kTables[table]->top_k(p, masks, {threads, run_threads});
}

void sample_values(
    int table, int threads, const Draw* draw, const float* logits, int64_t count, float* values) {
  modmask::MaskSpec spec = spec_of(*draw);
  TopKCuts cuts(table, *draw, spec);
  cuts.add(draw->tensor_id, logits, count);
  kTables[table]->sample_values(spec, logits, count, values, {threads, run_threads});
}

void sample_bits(
    int table, int threads, const Draw* draw, const float* logits, int64_t count, uint8_t* bits) {
  modmask::MaskSpec spec = spec_of(*draw);
  TopKCuts cuts(table, *draw, spec);
  cuts.add(draw->tensor_id, logits, count);
  kTables[table]->sample_bits(spec, logits, count, bits, {threads, run_threads});
}

void sample_backward(
    int table,
    int threads,
    const Draw* draw,
    const float* logits,
    const float* dvalues,
    int64_t count,
    float* dlogits) {
  modmask::MaskSpec spec = spec_of(*draw);
  TopKCuts cuts(table, *draw, spec);
  cuts.add(draw->tensor_id, logits, count);
  kTables[table]->sample_backward(spec, logits, dvalues, count, dlogits, {threads, run_threads});
}

}  // extern "C"
