// Kernels as nvcc compiled them, PTX, executed by the machine of tests/ptx. The text and what to do with it are in the
// environment: PTX_FILE; PTX_NOISE, PTX_LATE_COPIES and PTX_SEED, as in PtxOptions; PTX_COUNTERS, a file to which each
// launch adds a line, the name of its kernel and its counters.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <type_traits>

#include "../ptx/machine/ptx.h"
#include "memory.h"

namespace cuda_on_cpu {

[[noreturn]] inline void fail(const char* message) {
  fprintf(stderr, "%s\n", message);
  exit(1);
}

inline int option(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}

inline PtxModule* module() {
  static PtxModule* module = [] {
    std::stringstream text;
    text << std::ifstream(getenv("PTX_FILE")).rdbuf();
    PtxModule* loaded = ptx_load(text.str().c_str());
    if (*ptx_error(loaded)) fail(ptx_error(loaded));
    return loaded;
  }();
  return module;
}

// Host and device code agree on the names of functions, but not on that of the type of float16.
inline std::string name_of(void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) fail("a kernel without a name");
  std::string name = info.dli_sname;
  if (const size_t at = name.find("DF16_"); at != std::string::npos) name.replace(at, 5, "6__half");
  return name;
}

template <class T>
void pack(std::string& bytes, const T& value) {
  while (bytes.size() % alignof(T)) bytes.push_back(0);
  bytes.append((const char*)&value, sizeof value);
}

template <class... Parameters>
void launch_compiled(void (*kernel)(Parameters...), const auto& grid,
                     const std::type_identity_t<Parameters>&... values) {
  std::string parameters;
  (pack(parameters, values), ...);
  std::vector<PtxRegion> accessible;
  for (const auto& [begin, bytes] : regions) accessible.push_back({begin, bytes, nullptr});
  PtxLaunch l{};
  l.grid[0] = grid.blocks, l.block[0] = grid.threads;
  l.grid[1] = l.grid[2] = l.block[1] = l.block[2] = 1;
  l.cluster = grid.cluster, l.dynamic_shared = (uint32_t)grid.shared_bytes;
  l.parameters = (const uint8_t*)parameters.data();
  l.num_regions = (uint32_t)accessible.size(), l.regions = accessible.data();
  l.options = {1, option("PTX_NOISE", 0), option("PTX_LATE_COPIES", 1), option("PTX_SEED", 0)};
  const std::string name = name_of((void*)kernel);
  const bool failed = ptx_launch(module(), name.c_str(), &l);
  if (const char* path = getenv("PTX_COUNTERS")) {
    std::ofstream out(path, std::ios::app);
    out << name;
    for (const uint64_t counter : l.counters) out << ' ' << counter;
    out << '\n';
  }
  if (failed) fail(ptx_error(module()));
}

}  // namespace cuda_on_cpu
