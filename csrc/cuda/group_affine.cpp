// modmask::group_affine_cuda and its gradient. The schemas live in Python.

#include <tuple>

#include "bindings.h"

namespace modmask::cuda {

namespace {

// x: [groups, rows, channels, inner]
GroupAffine of_tensor(const Tensor& x, const Tensor& scale, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be [groups, rows, channels, inner]");
  check_float32(scale, "scale");
  STD_TORCH_CHECK(
      scale.dim() == 2 && scale.size(0) == x.size(0) && scale.size(1) == x.size(2),
      "scale must be [", x.size(0), ", ", x.size(2), "]");
  GroupAffine a{};
  a.type = element_type(x, name);
  a.groups = x.size(0);
  a.rows = x.size(1);
  a.channels = x.size(2);
  a.inner = x.size(3);
  return a;
}

Tensor affine(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& shift) {
  const Place place(x);
  GroupAffine a = of_tensor(x, scale, "x");
  const Operand x_data(place, x, "x"), scale_data(place, scale, "scale"),
      shift_data(place, shift, "shift");
  if (shift.has_value()) {
    check_float32(*shift, "shift");
    STD_TORCH_CHECK(
        shift->dim() == 2 && shift->size(0) == a.groups && shift->size(1) == a.channels,
        "shift must have the shape of scale");
  }
  a.scale = scale_data.data<float>();
  a.shift = shift_data.data<float>();
  Tensor y = empty_like(x, x.sizes());
  if (y.numel() > 0) {
    launch_group_affine(a, x_data.data<void>(), results<void>(y), place.stream());
  }
  return y;
}

// (dx, dscale, dshift), of size 0 where it is not needed
std::tuple<Tensor, Tensor, Tensor> affine_backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& scale,
    bool need_x,
    bool need_scale,
    bool need_shift) {
  const Place place(dy);
  GroupAffine a = of_tensor(dy, scale, "dy");
  check_same_type(x, dy, "x");
  STD_TORCH_CHECK(x.numel() == dy.numel(), "x must have the shape of dy");
  const Operand dy_data(place, dy, "dy"), scale_data(place, scale, "scale");
  const Operand x_data(place, need_scale ? std::optional<Tensor>(x) : std::nullopt, "x");
  a.scale = scale_data.data<float>();
  const int64_t none[] = {0};
  const torch::headeronly::IntHeaderOnlyArrayRef nothing(none, 1);
  Tensor dx = empty_like(dy, need_x ? dy.sizes() : nothing);
  Tensor dscale = empty_like(scale, need_scale ? scale.sizes() : nothing);
  Tensor dshift = empty_like(scale, need_shift ? scale.sizes() : nothing);
  if (dy.numel() == 0) {
    torch::stable::zero_(dscale);
    torch::stable::zero_(dshift);
  } else if (need_scale || need_shift) {
    Tensor partials = torch::stable::new_empty(scale, {group_affine_partials(a)});
    launch_group_affine_backward(
        a, dy_data.data<void>(), x_data.data<void>(), need_x ? results<void>(dx) : nullptr,
        results<float>(partials), need_scale ? results<float>(dscale) : nullptr,
        need_shift ? results<float>(dshift) : nullptr, place.stream());
  } else if (need_x) {
    launch_group_affine(a, dy_data.data<void>(), results<void>(dx), place.stream());
  }
  return {dx, dscale, dshift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(modmask, CUDA, m) {
  MODMASK_IMPL(m, "group_affine_cuda", affine);
  MODMASK_IMPL(m, "group_affine_backward_cuda", affine_backward);
}

}  // namespace modmask::cuda
