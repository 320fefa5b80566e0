// How Python calls a kernel: by name, with arguments by name.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "simt.h"

#include "cuda/element.h"

struct Argument {
  enum { kNone, kInteger, kNumber, kText, kArray } kind = kNone;
  int64_t integer = 0;
  double number = 0.0;
  std::string text;
  void* data = nullptr;
  int64_t count = 0;
  size_t item = 0;
};

class Call {
 public:
  Call(simt::Device& device, std::map<std::string, Argument> arguments)
      : device(device), arguments_(std::move(arguments)) {}

  simt::Device& device;

  // The memory of an array, from now on a buffer of the device; null for None or no argument.
  template <typename T>
  T* pointer(const std::string& name) const {
    const auto found = arguments_.find(name);
    if (found == arguments_.end() || found->second.kind == Argument::kNone) {
      return nullptr;
    }
    const Argument& a = get(name, Argument::kArray);
    if (a.item != sizeof(T)) {
      throw std::invalid_argument(
          name + ": expected items of " + std::to_string(sizeof(T)) + " bytes, got " +
          std::to_string(a.item));
    }
    device.buffer(name, a.data, static_cast<size_t>(a.count) * a.item, a.item);
    return static_cast<T*>(a.data);
  }
  int64_t size(const std::string& name) const {
    return get(name, Argument::kArray).count;
  }
  int64_t integer(const std::string& name) const {
    return get(name, Argument::kInteger).integer;
  }
  int64_t integer(const std::string& name, int64_t otherwise) const {
    return arguments_.count(name) != 0 ? integer(name) : otherwise;
  }
  double number(const std::string& name, double otherwise) const {
    if (arguments_.count(name) == 0) {
      return otherwise;
    }
    const Argument& a = arguments_.at(name);
    return a.kind == Argument::kInteger ? static_cast<double>(a.integer)
                                        : get(name, Argument::kNumber).number;
  }
  std::string text(const std::string& name) const {
    return get(name, Argument::kText).text;
  }

  // Calls f(T{}) with the storage type that argument `name` says.
  template <typename F>
  void with_dtype(const std::string& name, const F& f) const {
    const std::string dtype = text(name);
    if (dtype == "float32") {
      f(float{});
    } else if (dtype == "float16") {
      f(__half{});
    } else if (dtype == "bfloat16") {
      f(__nv_bfloat16{});
    } else {
      throw std::invalid_argument(name + ": " + dtype);
    }
  }

  modmask::cuda::ElementType element_type(const std::string& name) const {
    using modmask::cuda::ElementType;
    const std::string dtype = text(name);
    return dtype == "float32"   ? ElementType::kFloat32
           : dtype == "float16" ? ElementType::kFloat16
                                : ElementType::kBFloat16;
  }
  // The memory of an operand or result whose dtype argument `dtype` says.
  void* typed(const std::string& dtype, const std::string& name) const {
    void* found = nullptr;
    with_dtype(dtype, [&](auto t) { found = pointer<decltype(t)>(name); });
    return found;
  }

  // Runs a kernel; `Shape` is the launch shape of a .cuh file.
  template <typename Shape, typename F>
  void launch(const Shape& shape, const F& kernel, bool cooperative = false) const {
    device.launch({shape.grid, shape.block, shape.shared}, kernel, cooperative);
  }

 private:
  const Argument& get(const std::string& name, int kind) const {
    const auto found = arguments_.find(name);
    if (found == arguments_.end()) {
      throw std::invalid_argument("no argument " + name);
    }
    if (found->second.kind != kind) {
      throw std::invalid_argument(name + ": an argument of another kind");
    }
    return found->second;
  }

  std::map<std::string, Argument> arguments_;
};

using Runner = void (*)(const Call&);

// All kernels by name.
std::map<std::string, Runner>& kernels();

struct Registration {
  Registration(const char* name, Runner run) {
    kernels()[name] = run;
  }
};

// KERNEL(name) { ... } makes `call`.device run something under that name.
#define KERNEL(name)                                      \
  static void run_##name(const Call& call);               \
  static const Registration of_##name(#name, run_##name); \
  static void run_##name(const Call& call)
