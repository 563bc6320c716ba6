// The pybind11 module fusedpo._C: with what and for which architectures the operators of libfusedpo.so were built. They
// are not in it: a module is for one Python, libfusedpo.so is for all.
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  auto words = [](const char* text) { return py::str(text).attr("split")(); };
  py::dict info;
  info["compiler"] = BUILD_COMPILER;
  info["flags"] = BUILD_FLAGS;
  info["torch"] = BUILD_TORCH;
  info["cpu_variants"] = words(BUILD_CPU_VARIANTS);
  info["cpu_capability"] = fusedpo::cpu_capability();
  info["cuda_compiler"] = BUILD_CUDA_COMPILER;
  info["cuda_architectures"] = words(BUILD_CUDA_ARCHITECTURES);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info,
             "What the operators were built with (compiler, flags, torch, cuda_compiler) and for (cpu_variants, "
             "cuda_architectures), and which of the CPU variants runs here (cpu_capability).");
}
