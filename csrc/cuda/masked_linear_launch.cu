#include "launch.cuh"
#include "masked_linear.cuh"

namespace modmask::cuda {

namespace {

// Every row is a sample of one set.
LinearPlan plan_select(int64_t rows, int64_t in, int64_t out) {
  return plan_linear(in, out, 1, rows, 1, false, false);
}

template <typename T>
void select_linear(const SelectLinear& s, Stream stream) {
  LinearParams<T> p{};
  p.plan = plan_select(s.rows, s.in, s.out);
  p.mask.sets = 1;
  p.mask.samples = s.rows;
  p.rows = 1;
  p.in = s.in;
  p.out = s.out;
  p.from = static_cast<const T*>(s.x);
  p.weight = static_cast<const T*>(s.weight);
  p.bits = s.bits;
  p.row_sets = s.row_sets;
  p.partials = s.partials;
  launch(
      "masked_linear_forward", masked_linear_forward<T, MaskMode::kPacked, false, 1>, p.plan.shape,
      p, stream);
  FinishParams<T> f{};
  f.partials = s.partials;
  f.splits = p.plan.splits;
  f.batch = s.rows;
  f.columns = s.out;
  f.to = static_cast<T*>(s.y);
  f.bias = static_cast<const T*>(s.bias);
  f.mask = p.mask;
  f.rows = 1;
  f.bias_bits = s.bias_bits;
  f.row_sets = s.row_sets;
  launch("finish_linear", finish_linear<T, true>, finish_shape(f), f, stream);
}

}  // namespace

int64_t select_linear_partials(int64_t rows, int64_t in, int64_t out) {
  return plan_select(rows, in, out).splits * rows * out;
}

void launch_select_linear(const SelectLinear& s, Stream stream) {
  switch (s.type) {
    case ElementType::kFloat32:
      return select_linear<float>(s, stream);
    case ElementType::kBFloat16:
      return select_linear<__nv_bfloat16>(s, stream);
    case ElementType::kFloat16:
      return select_linear<__half>(s, stream);
  }
}

}  // namespace modmask::cuda
