// The Python module: a device, and the kernels of this folder by name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call.h"

namespace py = pybind11;

std::map<std::string, Runner>& kernels() {
  static std::map<std::string, Runner> all;
  return all;
}

namespace {

Argument argument(const std::string& name, const py::handle& value) {
  Argument a;
  if (value.is_none()) {
    return a;
  }
  if (py::isinstance<py::int_>(value)) {  // bool too
    a.kind = Argument::kInteger;
    a.integer = value.cast<int64_t>();
  } else if (py::isinstance<py::float_>(value)) {
    a.kind = Argument::kNumber;
    a.number = value.cast<double>();
  } else if (py::isinstance<py::str>(value)) {
    a.kind = Argument::kText;
    a.text = value.cast<std::string>();
  } else {
    const auto info = value.cast<py::buffer>().request();
    py::ssize_t step = info.itemsize;
    for (py::ssize_t d = info.ndim; d-- > 0; step *= info.shape[d]) {
      if (info.shape[d] > 1 && info.strides[d] != step) {
        throw py::type_error(name + ": expected a contiguous array");
      }
    }
    a.kind = Argument::kArray;
    a.data = info.ptr;
    a.count = info.size;
    a.item = static_cast<size_t>(info.itemsize);
  }
  return a;
}

void run(simt::Device& device, const std::string& name, const py::kwargs& kwargs) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) {
    throw py::key_error(name);
  }
  std::map<std::string, Argument> arguments;
  for (const auto& [key, value] : kwargs) {
    arguments[key.cast<std::string>()] = argument(key.cast<std::string>(), value);
  }
  found->second(Call(device, std::move(arguments)));
}

std::map<std::string, std::map<std::string, uint64_t>> traffic(const simt::Device& device) {
  std::map<std::string, std::map<std::string, uint64_t>> result;
  for (const auto& [name, t] : device.traffic()) {
    result[name] = {
        {"read_bytes", t.read_bytes},
        {"written_bytes", t.written_bytes},
        {"read_sectors", t.read_sectors},
        {"written_sectors", t.written_sectors},
        {"accesses", t.accesses}};
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(simt_kernels, m) {
  py::register_exception<simt::Error>(m, "Error", PyExc_RuntimeError);
  py::class_<simt::Device>(m, "Device")
      .def(py::init<uint64_t>(), py::arg("seed") = 0)
      .def("run", &run)
      .def("only_ends", &simt::Device::only_ends)
      .def("traffic", &traffic)
      .def("reset_traffic", &simt::Device::reset_traffic);
}
