// The machine as C calls it: from Python (tests/ptx/__init__.py), and from the drivers of tests/cuda_on_cpu.
#pragma once

#include <cstdint>

extern "C" {

// Memory that a kernel may access. `written`: a byte for every byte, not 0 where something was; null if all of it was.
struct PtxRegion {
  uint64_t begin, bytes;
  uint8_t* written;
};

struct PtxOptions {
  int races;        // find them
  int noise;        // approximate instructions are off by up to so many units in the last place
  int late_copies;  // bulk copies arrive when somebody waits for them
  int seed;         // not 0: warps take turns at random
};

enum PtxCounter {
  kPtxInstructions,  // of warps
  kPtxThreadInstructions,
  kPtxBarriers,      // of blocks and of clusters
  kPtxLoadRequests,  // of global memory, by warps; likewise what follows
  kPtxLoadBytes,
  kPtxLoadSectors,        // of 32 bytes
  kPtxUniqueLoadSectors,  // of the whole launch
  kPtxStoreRequests,
  kPtxStoreBytes,
  kPtxStoreSectors,
  kPtxUniqueStoreSectors,
  kPtxSharedRequests,
  kPtxSharedWaves,  // one per request where there are no bank conflicts
  kPtxBulkBytes,
  kPtxDivergentBranches,
  kPtxExponentials,  // ex2, of threads
  kPtxSpecial,       // those and other approximate instructions, of threads
  kPtxShuffles,      // shfl, of warps
  kPtxRaces,
  kPtxUnwritten,
  kPtxMixedBarriers,
  kPtxNumCounters
};

struct PtxLaunch {
  uint32_t grid[3], block[3], cluster, dynamic_shared;
  const uint8_t* parameters;
  uint32_t num_regions;
  const PtxRegion* regions;
  PtxOptions options;
  uint64_t counters[kPtxNumCounters];
};

struct PtxModule;

PtxModule* ptx_load(const char* text);  // see ptx_error
void ptx_free(PtxModule*);
const char* ptx_error(const PtxModule*);  // of the last call; empty if there was none

// The number of parameters, -1 if there is no such kernel; where each is in the parameter space, and its size.
int ptx_parameters(PtxModule*, const char* kernel, int* offsets, int* bytes);

// 0, or 1 if something is wrong: see ptx_error.
int ptx_launch(PtxModule*, const char* kernel, PtxLaunch*);

const char* ptx_counter_name(int);  // null behind the last

}  // extern "C"
