// Registers functions that take runs of arguments of a schema as structs, and keeps their types as
// the library was compiled with them: torch compares these with the schema when they are called.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace modmask {

// How a parameter of type T reads its arguments: itself, one argument. `at` is where they begin in
// the tuple `all` of all arguments of the schema.
template <typename T, typename = void>
struct Arguments {
  using Types = std::tuple<T>;

  template <size_t at, typename All>
  static T take(All& all) {
    return std::move(std::get<at>(all));
  }
};

// Arguments of several parameters, one after the other.
template <typename... Ts>
struct ArgumentList {
  using Types = decltype(std::tuple_cat(std::declval<typename Arguments<Ts>::Types>()...));

  static constexpr size_t before(size_t parameter) {
    constexpr size_t counts[] = {std::tuple_size_v<typename Arguments<Ts>::Types>...};
    size_t sum = 0;
    for (size_t i = 0; i < parameter; ++i) {
      sum += counts[i];
    }
    return sum;
  }
};

// A struct whose members, in their order, are arguments in the order of the schema says so by
// `Members`, the tuple of their types, which may be such structs again.
template <typename T>
struct Arguments<T, std::void_t<typename T::Members>> {
  template <typename Members>
  struct Of;

  template <typename... Ms>
  struct Of<std::tuple<Ms...>> {
    using List = ArgumentList<Ms...>;

    template <size_t at, typename All, size_t... i>
    static T take(All& all, std::index_sequence<i...>) {
      return T{Arguments<Ms>::template take<at + List::before(i)>(all)...};
    }
  };

  using Types = typename Of<typename T::Members>::List::Types;

  template <size_t at, typename All>
  static T take(All& all) {
    using Each = std::make_index_sequence<std::tuple_size_v<typename T::Members>>;
    return Of<typename T::Members>::template take<at>(all, Each{});
  }
};

template <auto function>
struct Unstructured;

// `function` with the arguments of the schema, each by itself.
template <typename Result, typename... Ps, Result (*function)(Ps...)>
struct Unstructured<function> {
  using List = ArgumentList<std::decay_t<Ps>...>;

  template <typename Types>
  struct Of;

  template <typename... Ts>
  struct Of<std::tuple<Ts...>> {
    static Result call(Ts... arguments) {
      std::tuple<Ts...> all(std::move(arguments)...);
      return with(all, std::index_sequence_for<Ps...>{});
    }

    template <size_t... i>
    static Result with(std::tuple<Ts...>& all, std::index_sequence<i...>) {
      return function(Arguments<std::decay_t<Ps>>::template take<List::before(i)>(all)...);
    }
  };

  using Call = Of<typename List::Types>;
};

// The name of a type in a schema.
template <typename T>
struct SchemaType;
template <>
struct SchemaType<torch::stable::Tensor> {
  static std::string name() {
    return "Tensor";
  }
};
template <>
struct SchemaType<int64_t> {
  static std::string name() {
    return "int";
  }
};
template <>
struct SchemaType<double> {
  static std::string name() {
    return "float";
  }
};
template <>
struct SchemaType<bool> {
  static std::string name() {
    return "bool";
  }
};
template <typename T>
struct SchemaType<std::optional<T>> {
  static std::string name() {
    return "Optional[" + SchemaType<T>::name() + "]";
  }
};
template <typename T>
struct SchemaType<std::vector<T>> {
  static std::string name() {
    return "List[" + SchemaType<T>::name() + "]";
  }
};
template <typename... Ts>
struct SchemaType<std::tuple<Ts...>> {
  static std::string name() {
    std::string all;
    (..., (all += (all.empty() ? "" : ", ") + SchemaType<Ts>::name()));
    return all;
  }
};

template <typename Result, typename... Ts>
std::string signature_of(Result (*)(Ts...)) {
  return "(" + SchemaType<std::tuple<std::decay_t<Ts>...>>::name() + ") -> (" +
         SchemaType<Result>::name() + ")";
}

// One line for every function that this library registered.
inline std::string& signatures() {
  static std::string lines;
  return lines;
}

}  // namespace modmask

// In STABLE_TORCH_LIBRARY_IMPL(..., m).
#define MODMASK_IMPL(m, name, function)                                  \
  m.impl(name, TORCH_BOX(&modmask::Unstructured<function>::Call::call)); \
  modmask::signatures() +=                                               \
      name + modmask::signature_of(&modmask::Unstructured<function>::Call::call) + "\n"
