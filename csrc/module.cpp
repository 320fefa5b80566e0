// The Python module: importing it registers the kernels; its functions tell and set the capability.

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "cpu/bindings.h"

namespace {

PyObject* capability(PyObject*, PyObject*) {
  return PyUnicode_FromString(modmask::active_kernels().capability);
}

PyObject* capabilities(PyObject*, PyObject*) {
  int count = 0;
  const char* const* names = modmask::supported_capabilities(count);
  PyObject* list = PyList_New(count);
  for (int i = 0; list != nullptr && i < count; ++i) {
    PyList_SetItem(list, i, PyUnicode_FromString(names[i]));
  }
  return list;
}

PyObject* set_capability(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) {
    return nullptr;
  }
  const bool known = modmask::choose_capability(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  if (!known) {
    PyErr_Format(PyExc_ValueError, "this CPU has no capability %R; see capabilities()", name);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* signatures(PyObject*, PyObject*) {
  return PyUnicode_FromString(modmask::signatures().c_str());
}

PyMethodDef methods[] = {
    {"capability", capability, METH_NOARGS, "The CPU capability in use."},
    {"capabilities", capabilities, METH_NOARGS, "The CPU capabilities supported here, best first."},
    {"set_capability", set_capability, METH_O, "Use another supported CPU capability."},
    {"signatures", signatures, METH_NOARGS, "The types of all kernels, as compiled, a line each."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "CPU kernels of modmask_kernels.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
