// The function table of one capability. Included last by the translation unit of each.

namespace modmask::MODMASK_CAPABILITY {

// f(a value of the element type, whether masks are hard), both as compile-time constants.
template <typename F>
void with_type(DType dtype, bool hard, const F& f) {
  const auto with_hard = [&](auto element) {
    if (hard) {
      f(element, std::true_type{});
    } else {
      f(element, std::false_type{});
    }
  };
  switch (dtype) {
    case DType::kFloat32:
      return with_hard(float{});
    case DType::kBFloat16:
      return with_hard(BFloat16{});
    case DType::kFloat16:
      return with_hard(Float16{});
  }
}

inline void linear_forward_any(const LinearProblem& p, void* y, const Runner& runner) {
  with_type(p.dtype, p.mask.hard, [&](auto element, auto hard) {
    using T = decltype(element);
    linear_forward<T, decltype(hard)::value>(p, static_cast<T*>(y), runner);
  });
}

inline void linear_backward_any(const LinearProblem& p, const Gradients& d, const Runner& runner) {
  with_type(p.dtype, p.mask.hard, [&](auto element, auto hard) {
    linear_backward<decltype(element), decltype(hard)::value>(p, d, runner);
  });
}

inline void conv_forward_any(const ConvProblem& p, void* y, const Runner& runner) {
  with_type(p.dtype, p.mask.hard, [&](auto element, auto hard) {
    using T = decltype(element);
    const auto forward = is_depthwise(p) ? depthwise_forward<T, decltype(hard)::value>
                                         : conv_forward<T, decltype(hard)::value>;
    forward(p, static_cast<T*>(y), runner);
  });
}

inline void conv_backward_any(const ConvProblem& p, const Gradients& d, const Runner& runner) {
  with_type(p.dtype, p.mask.hard, [&](auto element, auto hard) {
    using T = decltype(element);
    const auto backward = is_depthwise(p) ? depthwise_backward<T, decltype(hard)::value>
                                          : conv_backward<T, decltype(hard)::value>;
    backward(p, d, runner);
  });
}

inline void select_linear_any(
    const LinearProblem& p, const Selection& selection, void* y, const Runner& runner) {
  with_type(p.dtype, true, [&](auto element, auto) {
    using T = decltype(element);
    select_linear<T>(p, selection, static_cast<T*>(y), runner);
  });
}

inline void select_conv_any(
    const ConvProblem& p, const Selection& selection, void* y, const Runner& runner) {
  with_type(p.dtype, true, [&](auto element, auto) {
    using T = decltype(element);
    select_conv<T>(p, selection, static_cast<T*>(y), runner);
  });
}

inline void rnn_forward_any(const RnnProblem& p, const RnnResults& results, const Runner& runner) {
  switch (p.cell) {
    case RnnCell::kLstm:
      return rnn_forward<Lstm>(p, results, runner);
    case RnnCell::kGru:
      return rnn_forward<Gru>(p, results, runner);
  }
}

inline void rnn_backward_any(const RnnProblem& p, const RnnGradients& d, const Runner& runner) {
  switch (p.cell) {
    case RnnCell::kLstm:
      return rnn_backward<Lstm>(p, d, runner);
    case RnnCell::kGru:
      return rnn_backward<Gru>(p, d, runner);
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

inline bool top_k_any(const TopKProblem& p, uint8_t* const* masks, const Runner& runner) {
  switch (p.dtype) {
    case DType::kFloat32:
      return top_k<float>(p, masks, runner);
    case DType::kBFloat16:
      return top_k<BFloat16>(p, masks, runner);
    case DType::kFloat16:
      return top_k<Float16>(p, masks, runner);
  }
  return false;
}

constexpr Kernels table(const char* name) {
  return {
      name,
      kLanes,
      linear_forward_any,
      linear_backward_any,
      conv_forward_any,
      conv_backward_any,
      select_linear_any,
      select_conv_any,
      rnn_forward_any,
      rnn_backward_any,
      values,
      sample_bits,
      sample_backward,
      top_k_any,
      top_k_cut,
  };
}

}  // namespace modmask::MODMASK_CAPABILITY
