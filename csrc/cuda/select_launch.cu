#include "launch.cuh"
#include "select.cuh"

namespace modmask::cuda {

void launch_selected_product(const Selected& p, bool convolution, Stream stream) {
  launch(
      "selected_product", convolution ? selected_product<true> : selected_product<false>,
      selected_shape(p), p, stream);
}

}  // namespace modmask::cuda
