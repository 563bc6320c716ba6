// Prints how many basic blocks the advantages of a row take that has as many tokens as steps, whose values are all
// missing but the first, for two such numbers. Built with -fsanitize-coverage=trace-pc.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/token_advantages.h"

static volatile unsigned long long blocks = 0;  // the calls come after the optimiser
extern "C" __attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc() { blocks = blocks + 1; }

using namespace fusedpo::advantages;

int main(int, char** argv) {
  for (int i = 1; i <= 2; ++i) {
    const int64_t n = std::atoll(argv[i]);
    std::vector<double> values(n + 1, NAN), rewards(n, 1), of_steps(n), advantages(n);
    std::vector<int64_t> ids(n);
    for (int64_t t = 0; t < n; ++t) ids[t] = t % 2;
    values[0] = 0;
    const Array v{values.data(), DType::kFloat64}, r{rewards.data(), DType::kFloat64};
    const Steps steps{v, r, {ids.data(), true}, n, n};
    OneThread team;
    blocks = 0;
    step_advantages(team, steps, 0, of_steps.data(), {advantages.data(), true});
    std::printf("%llu %g\n", (unsigned long long)blocks, advantages[0]);
  }
}
