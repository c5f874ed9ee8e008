#include "memory_nodes.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <fstream>

namespace enginery {

namespace {

constexpr int kMostNodes = 1024;  // as many as Linux knows
constexpr int kWordBits = 8 * sizeof(unsigned long);

// Whether a list such as "0-3,8,10-11" names the number.
bool list_has(const std::string& list, int number) {
    const char* at = list.data();
    const char* end = at + list.size();
    while (at < end) {
        int first = -1;
        const auto parsed = std::from_chars(at, end, first);
        int last = first;
        at = parsed.ptr;
        if (at < end && *at == '-') at = std::from_chars(at + 1, end, last).ptr;
        if (parsed.ec == std::errc() && first <= number && number <= last) return true;
        while (at < end && *at != ',') ++at;
        ++at;
    }
    return false;
}

std::string first_line(const std::string& path) {
    std::string line;
    std::ifstream file(path);
    std::getline(file, line);
    return line;
}

}  // namespace

std::vector<int> nodes_of_cpus(const std::vector<int>& cpus, const std::string& root) {
    const std::string online = first_line(root + "/online");
    std::vector<int> nodes;
    for (int node = 0; node < kMostNodes; ++node) {
        if (!list_has(online, node)) continue;
        const std::string list = first_line(root + "/node" + std::to_string(node) + "/cpulist");
        if (std::any_of(cpus.begin(), cpus.end(), [&](int cpu) { return list_has(list, cpu); })) nodes.push_back(node);
    }
    return nodes;
}

bool place_on_nodes(void* data, int64_t bytes, const std::vector<int>& nodes) {
    if (nodes.empty() || bytes <= 0) return false;
    unsigned long mask[kMostNodes / kWordBits] = {};
    for (const int node : nodes) mask[node / kWordBits] |= 1UL << (node % kWordBits);
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
    const auto end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
    const long policy = nodes.size() == 1 ? MPOL_PREFERRED : MPOL_INTERLEAVE;
    return syscall(SYS_mbind, begin, end - begin, policy, mask, kMostNodes + 1, 0) == 0;
}

}  // namespace enginery
