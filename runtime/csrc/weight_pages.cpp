#include "weight_pages.h"

#include <emmintrin.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "memory_nodes.h"

namespace enginery {

namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kLeastBytes = int64_t{64} << 20;  // less is in caches half of the time
constexpr int64_t kPieceBytes = int64_t{32} << 20;
constexpr int64_t kSamplePieces = 8;  // of a huge page each
constexpr int kRepeats = 5;
constexpr double kWorthIt = 1.1;
constexpr int64_t kReserve = int64_t{256} << 20;  // what is left to others

int64_t round_up_to(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Memory in huge pages, as far as there are any, on the boundary of one.
class HugeMemory {
  public:
    HugeMemory(int64_t bytes, const std::vector<int>& nodes) {
        const int64_t whole_bytes = bytes + kHugePage;
        void* whole =
            mmap(nullptr, static_cast<size_t>(whole_bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (whole == MAP_FAILED) return;
        const auto address = reinterpret_cast<uintptr_t>(whole);
        const auto before = round_up_to(static_cast<int64_t>(address), kHugePage) - static_cast<int64_t>(address);
        data_ = static_cast<std::byte*>(whole) + before;
        bytes_ = static_cast<size_t>(bytes);
        munmap_if_any(static_cast<std::byte*>(whole), static_cast<size_t>(before));
        munmap_if_any(data_ + bytes, static_cast<size_t>(kHugePage - before));
        madvise(data_, bytes_, MADV_HUGEPAGE);
        is_placed_ = place_on_nodes(data_, bytes, nodes);
    }
    ~HugeMemory() { munmap_if_any(data_, bytes_); }
    HugeMemory(const HugeMemory&) = delete;
    HugeMemory& operator=(const HugeMemory&) = delete;

    std::byte* data() const { return data_; }  // null where there is no memory
    bool is_placed() const { return is_placed_; }

    // Puts the first `bytes` in the place of what is mapped at `place`, for reading. Where they were is anybody's then.
    bool move_to(std::byte* place, size_t bytes) {
        if (mprotect(data_, bytes, PROT_READ) != 0) return false;
        if (mremap(data_, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place) != place) return false;
        data_ += bytes;
        bytes_ -= bytes;
        return true;
    }

  private:
    static void munmap_if_any(std::byte* data, size_t bytes) {
        if (data != nullptr && bytes > 0) munmap(data, bytes);
    }

    std::byte* data_ = nullptr;
    size_t bytes_ = 0;
    bool is_placed_ = false;
};

// While it lives, this thread runs on some CPUs alone, if it may.
class RunningOn {
  public:
    explicit RunningOn(const std::vector<int>& cpus) {
        cpu_set_t set;
        CPU_ZERO(&set);
        for (const int cpu : cpus) CPU_SET(static_cast<size_t>(cpu), &set);
        changed_ = sched_getaffinity(0, sizeof(before_), &before_) == 0 && sched_setaffinity(0, sizeof(set), &set) == 0;
    }
    ~RunningOn() {
        if (changed_) sched_setaffinity(0, sizeof(before_), &before_);
    }
    RunningOn(const RunningOn&) = delete;
    RunningOn& operator=(const RunningOn&) = delete;

  private:
    cpu_set_t before_;
    bool changed_ = false;
};

using Pieces = std::vector<const std::byte*>;

// GB/s of reading the pieces from memory: they are thrown out of the caches first.
double read_rate(const Pieces& pieces) {
    for (const std::byte* piece : pieces) {
        for (int64_t i = 0; i < kHugePage; i += 64) _mm_clflush(piece + i);
    }
    _mm_mfence();
    const auto started = std::chrono::steady_clock::now();
    __m128i sums[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
    for (const std::byte* piece : pieces) {
        constexpr int64_t kStream = kHugePage / 4;
        for (int64_t i = 0; i < kStream; i += 64) {
            for (int64_t stream = 0; stream < 4; ++stream) {
                for (int64_t part = 0; part < 64; part += 16) {
                    const auto* from = reinterpret_cast<const __m128i*>(piece + stream * kStream + i + part);
                    sums[stream] = _mm_add_epi64(sums[stream], _mm_load_si128(from));
                }
            }
        }
    }
    const __m128i sum = _mm_add_epi64(_mm_add_epi64(sums[0], sums[1]), _mm_add_epi64(sums[2], sums[3]));
    asm volatile("" : : "x"(sum));  // whoever adds up wants the sum
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - started;
    return static_cast<double>(pieces.size()) * static_cast<double>(kHugePage) / passed.count() / 1e9;
}

struct Rates {
    double mapped = 0, huge = 0;
};

bool has_several_memory_nodes() { return access("/sys/devices/system/node/node1", F_OK) == 0; }

// Of pieces that lie evenly over the file, read from where it is served; the best of some, in turn. Nothing is measured
// where there is no memory, or where of several nodes none can be chosen.
Rates measure(const WeightFile& file, const std::function<bool()>& stop) {
    Rates rates;
    const Mapping& mapping = *file.mapping;
    const RunningOn running(file.cpus);
    const HugeMemory memory(kSamplePieces * kHugePage, nodes_of_cpus(file.cpus));
    if (memory.data() == nullptr || (has_several_memory_nodes() && !memory.is_placed())) return rates;
    Pieces mapped, huge;
    const int64_t places = mapping.bytes() / kHugePage;
    for (int64_t piece = 0; piece < kSamplePieces; ++piece) {
        mapped.push_back(mapping.data() + places * piece / kSamplePieces * kHugePage);
        huge.push_back(memory.data() + piece * kHugePage);
        std::memcpy(memory.data() + piece * kHugePage, mapped.back(), static_cast<size_t>(kHugePage));
    }
    for (int repeat = 0; repeat < kRepeats && !stop(); ++repeat) {
        rates.mapped = std::max(rates.mapped, read_rate(mapped));
        rates.huge = std::max(rates.huge, read_rate(huge));
    }
    return rates;
}

// A number in a file; what is no number, as "max", or no file, is no limit.
int64_t read_bytes(const std::string& path) {
    int64_t bytes = INT64_MAX;
    std::ifstream file(path);
    return file >> bytes ? bytes : INT64_MAX;
}

// What a control group and those above it leave: `root` with `group`, whose files are called so.
int64_t left_in_groups(const std::string& root, std::string group, const char* limit, const char* used) {
    int64_t left = INT64_MAX;
    while (true) {
        const std::string directory = root + group + "/";
        const int64_t most = read_bytes(directory + limit), taken = read_bytes(directory + used);
        if (most != INT64_MAX && taken != INT64_MAX) left = std::min(left, most - taken);
        const size_t slash = group.rfind('/');
        if (slash == std::string::npos || group.empty()) return left;
        group.resize(slash);
    }
}

// Bytes that could be had without anybody's loss: of the machine, and of the control groups that a container is.
int64_t available_bytes() {
    int64_t kilobytes = 0;
    std::ifstream machine("/proc/meminfo");
    for (std::string line; std::getline(machine, line);) {
        if (std::sscanf(line.c_str(), "MemAvailable: %ld kB", &kilobytes) == 1) break;
    }
    int64_t left = kilobytes * 1024;
    std::ifstream groups("/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1), group = line.substr(second + 1);
        if (controllers.empty()) {
            left = std::min(left, left_in_groups("/sys/fs/cgroup", group, "memory.max", "memory.current"));
        } else if (controllers.find("memory") != std::string::npos) {
            left = std::min(
                left, left_in_groups("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes", "memory.usage_in_bytes"));
        }
    }
    return left;
}

// Replaces the pages of the file piece by piece, as long as `needed` bytes beside are there; the bytes that were.
int64_t copy_to_huge_pages(const WeightFile& file, int64_t needed, const std::function<bool()>& stop) {
    const Mapping& mapping = *file.mapping;
    const std::vector<int> nodes = nodes_of_cpus(file.cpus);
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = mapping.bytes();
    int64_t done = 0;
    while (done < bytes && !stop() && available_bytes() >= needed + kPieceBytes) {
        const int64_t count = std::min(kPieceBytes, bytes - done);
        HugeMemory memory(round_up_to(count, kHugePage), nodes);
        if (memory.data() == nullptr) break;
        std::memcpy(memory.data(), mapping.data() + done, static_cast<size_t>(count));
        if (!memory.move_to(mapping.data() + done, static_cast<size_t>(round_up_to(count, page)))) break;
        done += count;
    }
    return done;
}

std::string in_words(const Rates& rates) {
    char text[96];
    std::snprintf(text, sizeof(text), " (read at %.1f GB/s, in huge pages at %.1f)", rates.mapped, rates.huge);
    return rates.mapped > 0 ? text : "";
}

}  // namespace

std::string settle_weights(const std::vector<WeightFile>& files, WeightPages wanted, int64_t promised,
                           const std::function<bool()>& stop) {
    if (wanted == WeightPages::kMapped || files.empty()) return "";
    int64_t bytes = 0;
    for (const WeightFile& file : files) bytes += file.mapping->bytes();
    const WeightFile& largest = *std::max_element(files.begin(), files.end(), [](const auto& a, const auto& b) {
        return a.mapping->bytes() < b.mapping->bytes();
    });
    const std::string left = "left in the pages of their file";
    Rates rates;
    if (wanted == WeightPages::kAuto) {
        if (largest.mapping->bytes() < kLeastBytes) return "";
        if (nodes_of_cpus(largest.cpus).size() > 1) return left + ", as their readers are on several memory nodes";
        rates = measure(largest, stop);
        if (stop()) return "";
        if (rates.huge <= 0 || rates.huge < kWorthIt * rates.mapped) return left + in_words(rates);
    }
    const int64_t needed = promised + kReserve;
    if (available_bytes() < bytes + needed) return left + ", as memory for a copy is missing" + in_words(rates);
    int64_t copied = 0;
    for (const WeightFile& file : files) copied += copy_to_huge_pages(file, needed, stop);
    if (copied == bytes) return "copied to huge pages" + in_words(rates);
    return std::to_string(copied >> 20) + " MiB of them copied to huge pages" + in_words(rates);
}

}  // namespace enginery
