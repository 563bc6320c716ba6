// The interface of ptx.h.
#include "ptx.h"

#include <cstring>

#include "machine.h"

struct PtxModule {
  ptx::Program program;
  std::string error;
};

extern "C" {

PtxModule* ptx_load(const char* text) {
  PtxModule* module = new PtxModule;
  try {
    module->program = ptx::parse(text);
  } catch (const std::exception& e) {
    module->error = e.what();
  }
  return module;
}

void ptx_free(PtxModule* module) { delete module; }

const char* ptx_error(const PtxModule* module) { return module->error.c_str(); }

int ptx_parameters(PtxModule* module, const char* kernel, int* offsets, int* bytes) {
  const auto found = module->program.kernels.find(kernel);
  if (found == module->program.kernels.end()) return -1;
  for (const ptx::Parameter& p : found->second.parameters) *offsets++ = p.offset, *bytes++ = p.bytes;
  return (int)found->second.parameters.size();
}

int ptx_launch(PtxModule* module, const char* kernel, PtxLaunch* launch) {
  module->error.clear();
  memset(launch->counters, 0, sizeof launch->counters);
  try {
    const auto found = module->program.kernels.find(kernel);
    if (found == module->program.kernels.end()) throw ptx::Error(std::string("no kernel ") + kernel);
    ptx::Machine machine(module->program, found->second, *launch);
    machine.run();
    module->error = machine.findings;
  } catch (const std::exception& e) {
    module->error = e.what();
  }
  return !module->error.empty();
}

const char* ptx_counter_name(int i) {
  static const char* names[kPtxNumCounters] = {
      "instructions",
      "thread_instructions",
      "barriers",
      "load_requests",
      "load_bytes",
      "load_sectors",
      "unique_load_sectors",
      "store_requests",
      "store_bytes",
      "store_sectors",
      "unique_store_sectors",
      "shared_requests",
      "shared_waves",
      "bulk_bytes",
      "divergent_branches",
      "exponentials",
      "special",
      "shuffles",
      "races",
      "unwritten",
      "mixed_barriers",
  };
  return i < kPtxNumCounters ? names[i] : nullptr;
}

}  // extern "C"
