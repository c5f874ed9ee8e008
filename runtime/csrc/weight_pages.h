// Where weights lie: in the pages of their file, or in huge pages that they are copied to while serving goes on.
//
// How fast a mapped file is read depends on how its pages lie in memory, which nobody decides: as fast as huge pages,
// or three quarters of that. So a sample is read from both, out of memory and not out of a cache, and tells.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "mapping.h"

namespace enginery {

enum class WeightPages : uint8_t { kAuto, kMapped, kHuge };

// A mapped file, and the CPUs that read it: a copy lies on their memory nodes (memory_nodes.h).
struct WeightFile {
    Mapping* mapping = nullptr;
    std::vector<int> cpus;
};

// Settles it for all mapped files together, and says in words what it found and did; "" for less than is worth it.
// Copying replaces one piece after the other under whoever reads it; it stops where others need the memory. May take
// seconds; ends early once `stop` says so. promised: bytes that others will touch yet, state and activations.
std::string settle_weights(const std::vector<WeightFile>& files, WeightPages wanted, int64_t promised,
                           const std::function<bool()>& stop);

}  // namespace enginery
