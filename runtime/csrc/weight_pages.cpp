#include "weight_pages.h"

#include <emmintrin.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>

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
    explicit HugeMemory(int64_t bytes) : whole_bytes_(static_cast<size_t>(bytes + kHugePage)) {
        void* whole = mmap(nullptr, whole_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (whole == MAP_FAILED) return;
        whole_ = static_cast<std::byte*>(whole);
        const auto address = reinterpret_cast<uintptr_t>(whole);
        data_ = whole_ + (round_up_to(static_cast<int64_t>(address), kHugePage) - static_cast<int64_t>(address));
        madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);
    }
    ~HugeMemory() {
        if (whole_ != nullptr) munmap(whole_, whole_bytes_);
    }
    HugeMemory(const HugeMemory&) = delete;
    HugeMemory& operator=(const HugeMemory&) = delete;

    std::byte* data() const { return data_; }  // null where there is no memory

    // Puts the first `bytes` in the place of what is mapped at `place`, for reading.
    bool move_to(std::byte* place, size_t bytes) {
        if (mprotect(data_, bytes, PROT_READ) != 0) return false;
        return mremap(data_, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place;
    }

  private:
    size_t whole_bytes_;
    std::byte* whole_ = nullptr;
    std::byte* data_ = nullptr;
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

// Of pieces that lie evenly over the file; the best of some, in turn. Nothing is measured where there is no memory.
Rates measure(const Mapping& mapping, const std::function<bool()>& stop) {
    Rates rates;
    const HugeMemory memory(kSamplePieces * kHugePage);
    if (memory.data() == nullptr) return rates;
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

// Replaces the pages of the file piece by piece; the bytes that were.
int64_t copy_to_huge_pages(const MappedFile& file, const std::function<bool()>& stop) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = file.mapping->bytes();
    int64_t done = 0;
    while (done < bytes && !stop()) {
        const int64_t count = std::min(kPieceBytes, bytes - done);
        HugeMemory memory(round_up_to(count, kHugePage));
        if (memory.data() == nullptr) break;
        std::memcpy(memory.data(), file.mapping->data() + done, static_cast<size_t>(count));
        if (!memory.move_to(file.mapping->data() + done, static_cast<size_t>(round_up_to(count, page)))) break;
        done += count;
    }
    // The file's own pages are nobody's need now, unless others map them.
    if (const int descriptor = open(file.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); descriptor >= 0) {
        posix_fadvise(descriptor, 0, done, POSIX_FADV_DONTNEED);
        close(descriptor);
    }
    return done;
}

// "max", or what else is no number, is no limit.
int64_t read_bytes(const char* path) {
    int64_t bytes = INT64_MAX;
    std::ifstream file(path);
    return file >> bytes ? bytes : INT64_MAX;
}

// Bytes that could be had without anybody's loss: of the machine, and of the control group that a container is.
int64_t available_bytes() {
    int64_t kilobytes = 0;
    std::ifstream file("/proc/meminfo");
    for (std::string line; std::getline(file, line);) {
        if (std::sscanf(line.c_str(), "MemAvailable: %ld kB", &kilobytes) == 1) break;
    }
    const int64_t limit = read_bytes("/sys/fs/cgroup/memory.max"), used = read_bytes("/sys/fs/cgroup/memory.current");
    const int64_t left = limit == INT64_MAX || used == INT64_MAX ? INT64_MAX : limit - used;
    return std::min(kilobytes * 1024, left);
}

std::string in_words(const Rates& rates) {
    char text[96];
    std::snprintf(text, sizeof(text), " (read at %.1f GB/s, in huge pages at %.1f)", rates.mapped, rates.huge);
    return rates.mapped > 0 ? text : "";
}

}  // namespace

std::string settle_weights(const std::vector<MappedFile>& files, WeightPages wanted,
                           const std::function<bool()>& stop) {
    if (wanted == WeightPages::kMapped || files.empty()) return "";
    int64_t bytes = 0;
    for (const MappedFile& file : files) bytes += file.mapping->bytes();
    const auto largest = std::max_element(files.begin(), files.end(),
                                          [](auto& a, auto& b) { return a.mapping->bytes() < b.mapping->bytes(); });
    Rates rates;
    if (wanted == WeightPages::kAuto) {
        if (largest->mapping->bytes() < kLeastBytes) return "";
        rates = measure(*largest->mapping, stop);
        if (stop()) return "";
        if (rates.huge < kWorthIt * rates.mapped) return "left in the pages of their file" + in_words(rates);
    }
    if (available_bytes() < bytes + kReserve) {
        return "left in the pages of their file, as memory for a copy is missing" + in_words(rates);
    }
    int64_t copied = 0;
    for (const MappedFile& file : files) copied += copy_to_huge_pages(file, stop);
    if (copied == bytes) return "copied to huge pages" + in_words(rates);
    return std::to_string(copied >> 20) + " MiB of them copied to huge pages" + in_words(rates);
}

}  // namespace enginery
