// The function table of one capability. Included last by the translation unit of each.

namespace modmask::MODMASK_CAPABILITY {

template <typename T>
void forward_as(const LinearProblem& p, void* y, const Runner& runner) {
  if (p.mask.hard) {
    linear_forward<T, true>(p, static_cast<T*>(y), runner);
  } else {
    linear_forward<T, false>(p, static_cast<T*>(y), runner);
  }
}

template <typename T>
void backward_as(const LinearProblem& p, const LinearGradients& d, const Runner& runner) {
  if (p.mask.hard) {
    linear_backward<T, true>(p, d, runner);
  } else {
    linear_backward<T, false>(p, d, runner);
  }
}

inline void forward(const LinearProblem& p, void* y, const Runner& runner) {
  switch (p.dtype) {
    case DType::kFloat32:
      return forward_as<float>(p, y, runner);
    case DType::kBFloat16:
      return forward_as<BFloat16>(p, y, runner);
    case DType::kFloat16:
      return forward_as<Float16>(p, y, runner);
  }
}

inline void backward(const LinearProblem& p, const LinearGradients& d, const Runner& runner) {
  switch (p.dtype) {
    case DType::kFloat32:
      return backward_as<float>(p, d, runner);
    case DType::kBFloat16:
      return backward_as<BFloat16>(p, d, runner);
    case DType::kFloat16:
      return backward_as<Float16>(p, d, runner);
  }
}

inline void values(
    const MaskSpec& spec, const float* logits, int64_t count, float* out, const Runner& runner) {
  if (spec.hard) {
    sample_values<true>(spec, logits, count, out, runner);
  } else {
    sample_values<false>(spec, logits, count, out, runner);
  }
}

}  // namespace modmask::MODMASK_CAPABILITY
