// The dtypes of operands; neither torch nor CUDA.
#pragma once

namespace modmask::cuda {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

}  // namespace modmask::cuda
