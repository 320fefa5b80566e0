#include "group_affine.cuh"
#include "launch.cuh"

namespace modmask::cuda {

void launch_group_affine(const GroupAffine& a, const void* x, void* y, Stream stream) {
  const GroupAffineParams p = group_affine_params(a, x, y);
  launch("group_affine", group_affine, group_affine_shape(p), p, stream);
}

int64_t group_affine_partials(const GroupAffine& a) {
  const auto p = group_affine_backward_params(a, nullptr, nullptr, nullptr, nullptr);
  return p.splits * 2 * a.groups * a.channels;
}

void launch_group_affine_backward(
    const GroupAffine& a,
    const void* dy,
    const void* x,
    void* dx,
    float* partials,
    float* dscale,
    float* dshift,
    Stream stream) {
  const GroupAffineBackwardParams p = group_affine_backward_params(a, dy, x, dx, partials);
  const auto kernel = a.inner > 1 ? group_affine_backward<true> : group_affine_backward<false>;
  launch("group_affine_backward", kernel, group_affine_backward_shape(p), p, stream);
  const GroupAffineFinishParams finish = group_affine_finish_params(p, dscale, dshift);
  launch(
      "group_affine_finish", group_affine_finish, group_affine_finish_shape(finish), finish,
      stream);
}

}  // namespace modmask::cuda
