// TORCH_BOX for functions that take runs of arguments of a schema as structs.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

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

}  // namespace modmask

#define MODMASK_BOX(function) TORCH_BOX(&Unstructured<function>::Call::call)
