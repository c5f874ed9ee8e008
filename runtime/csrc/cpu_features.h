// What this machine's CPU can do, and which build of the kernels it runs.
#pragma once

#include <string>
#include <vector>

#include "plugins/kernel.h"

namespace enginery {

// The ISA features that targets ask for, under the names that engines/targets.py uses.
std::vector<std::string> cpu_features();

// The kernels built for `isa` ("avx2", "avx2-vnni", "avx512", "avx512-vnni"; "avx512-vnni-bf16" is the build that
// find_best_kernels takes where it can). Throws TargetError naming what this machine lacks.
KernelTable find_kernels(const std::string& isa);

// The fastest build that reads the layouts of engines for `isa` on this machine.
KernelTable find_best_kernels(const std::string& isa);

}  // namespace enginery
