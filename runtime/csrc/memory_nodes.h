// Memory nodes (NUMA): which of them some CPUs belong to, and memory that lies on them. A rank's threads have CPUs of
// their own, so its memory lies where they are: on their node, or in turn on all of theirs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace enginery {

// In order, each once; none where the system does not say. root: where it says so.
std::vector<int> nodes_of_cpus(const std::vector<int>& cpus, const std::string& root = "/sys/devices/system/node");

// Pages of [data, data + bytes) that are touched from now on lie on these nodes while they have room. False where the
// system forbids it, as in many containers, or there are no nodes: then they lie anywhere, which is slower, not wrong.
bool place_on_nodes(void* data, int64_t bytes, const std::vector<int>& nodes);

}  // namespace enginery
