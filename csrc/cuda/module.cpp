// The Python module: importing it registers the kernels; its functions tell of the toolkit and of
// the current device.

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "../boxing.h"
#include "launch.h"

namespace {

PyObject* toolkit_version(PyObject*, PyObject*) {
  return PyLong_FromLong(modmask::cuda::toolkit_version());
}

PyObject* problem(PyObject*, PyObject*) {
  const char* text = modmask::cuda::problem();
  if (text == nullptr) {
    Py_RETURN_NONE;
  }
  return PyUnicode_FromString(text);
}

PyObject* rnn_fits(PyObject*, PyObject* arguments) {
  int cell;
  long long steps, rows, groups, hidden;
  if (!PyArg_ParseTuple(arguments, "iLLLL", &cell, &steps, &rows, &groups, &hidden)) {
    return nullptr;
  }
  const auto plan = modmask::cuda::plan_rnn_here(
      static_cast<modmask::cuda::Cell>(cell), steps, rows, groups, hidden);
  return PyBool_FromLong(plan.units > 0);
}

PyObject* signatures(PyObject*, PyObject*) {
  return PyUnicode_FromString(modmask::signatures().c_str());
}

PyMethodDef methods[] = {
    {"toolkit_version", toolkit_version, METH_NOARGS, "CUDART_VERSION of the compiling toolkit."},
    {"problem", problem, METH_NOARGS, "Why the current device runs no kernel, or None."},
    {"rnn_fits", rnn_fits, METH_VARARGS,
     "Whether a time loop (cell, steps, rows, groups, hidden) runs in one launch here."},
    {"signatures", signatures, METH_NOARGS, "The types of all kernels, as compiled, a line each."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_cuda",
    "CUDA kernels of modmask_kernels.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() {
  return PyModule_Create(&module);
}
