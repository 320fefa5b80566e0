// Channels scaled and shifted group by group, and the gradients.
#include "call.h"

#include "cuda/group_affine.cuh"

using namespace modmask::cuda;

namespace {

GroupAffine affine(const Call& call) {
  return {
      call.element_type("dtype"),
      call.integer("groups"),
      call.integer("rows"),
      call.integer("channels"),
      call.integer("inner"),
      call.pointer<const float>("scale"),
      call.pointer<const float>("shift")};
}

}  // namespace

KERNEL(group_affine) {
  const GroupAffineParams p =
      group_affine_params(affine(call), call.typed("dtype", "x"), call.typed("dtype", "y"));
  call.launch(group_affine_shape(p), [&] { group_affine(p); });
}

KERNEL(group_affine_backward) {
  GroupAffineBackwardParams p = group_affine_backward_params(
      affine(call), call.typed("dtype", "dy"), call.typed("dtype", "x"), call.typed("dtype", "dx"),
      nullptr);
  std::vector<float> partials(p.splits * 2 * p.affine.groups * p.affine.channels, NAN);
  call.device.buffer("partials", partials.data(), partials.size() * 4, 4);
  p.partials = partials.data();
  call.launch(group_affine_backward_shape(p), [&] {
    p.affine.inner > 1 ? group_affine_backward<true>(p) : group_affine_backward<false>(p);
  });
  const GroupAffineFinishParams finish = group_affine_finish_params(
      p, call.pointer<float>("dscale"), call.pointer<float>("dshift"));
  call.launch(group_affine_finish_shape(finish), [&] { group_affine_finish(finish); });
}
