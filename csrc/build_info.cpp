// What the GPU build was made with, as the Python module lilora_kernels._build_info; the operations need no pybind11.

#include <cxxabi.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "build_facts.h"

namespace py = pybind11;

namespace {

std::string demangled(const std::string& name) {
  int status = 0;
  std::unique_ptr<char, decltype(&std::free)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status),
                                                   &std::free);
  return status == 0 ? text.get() : name;
}

py::dict build_info() {
  py::dict facts = py::module_::import("json").attr("loads")(kFacts);
  for (py::handle row : facts["kernels"]) row["kernel"] = demangled(py::cast<std::string>(row["kernel"]));
  return facts;
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  module.def("build_info", &build_info, "Versions, architectures and flags of the build, and what each kernel takes.");
}
