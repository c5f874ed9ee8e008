#include "mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "errors.h"

namespace enginery {

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kEndsOnPage = true;
#else
constexpr bool kEndsOnPage = false;
#endif
constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;

// Closes a descriptor when a scope ends, however it ends.
struct Descriptor {
    int number;
    ~Descriptor() {
        if (number >= 0) close(number);
    }
};

}  // namespace

Mapping::~Mapping() {
    if (whole_ != nullptr) munmap(whole_, whole_bytes_);
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(whole_, other.whole_);
    std::swap(whole_bytes_, other.whole_bytes_);
    return *this;
}

Mapping Mapping::of_file(const std::string& path, int64_t bytes) {
    // O_NONBLOCK: a FIFO in the file's place must not hold the loader up.
    const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    if (file.number < 0) throw EngineFormatError(path + ": cannot be opened: " + std::strerror(errno) + ".");
    struct stat status{};
    if (fstat(file.number, &status) != 0) throw EngineFormatError(path + ": " + std::strerror(errno) + ".");
    if (!S_ISREG(status.st_mode)) throw EngineFormatError(path + ": is not a regular file.");
    if (status.st_size != bytes || bytes <= 0) {
        throw EngineFormatError(path + ": wanted " + std::to_string(bytes) + " bytes, found " +
                                std::to_string(status.st_size) + ". Copy or build the engine again.");
    }
    const auto whole_bytes = static_cast<size_t>(bytes + kHugePage);
    void* whole = mmap(nullptr, whole_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole == MAP_FAILED) throw CapacityError(path + ": cannot be mapped: " + std::strerror(errno) + ".");
    const auto address = (reinterpret_cast<uintptr_t>(whole) + kHugePage - 1) / kHugePage * kHugePage;
    Mapping mapping(whole, whole_bytes, reinterpret_cast<void*>(address), bytes);
    if (mmap(mapping.data(), static_cast<size_t>(bytes), PROT_READ, MAP_PRIVATE | MAP_FIXED, file.number, 0) ==
        MAP_FAILED) {
        throw CapacityError(path + ": cannot be mapped: " + std::strerror(errno) + ".");
    }
    // What is not in memory yet comes in huge pages, where the file system has them.
    madvise(mapping.data(), static_cast<size_t>(bytes), MADV_HUGEPAGE);
    madvise(mapping.data(), static_cast<size_t>(bytes), MADV_WILLNEED);
    return mapping;
}

Mapping Mapping::of_zeros(int64_t bytes, const std::string& purpose) {
    if (bytes == 0) return {};
    const auto refuse = [&]() -> CapacityError {
        return CapacityError("No memory for " + purpose + ": " + std::to_string(bytes) +
                             " bytes. Lower --max-num-batched-tokens or --kv-cache-memory-bytes.");
    };
    const int64_t page = sysconf(_SC_PAGESIZE);
    if (bytes < 0 || bytes > INT64_MAX - 3 * page) throw refuse();
    const int64_t inner = (bytes + page - 1) / page * page;
    const auto whole_bytes = static_cast<size_t>(inner + 2 * page);
    void* whole = mmap(nullptr, whole_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole == MAP_FAILED) throw refuse();
    std::byte* data = static_cast<std::byte*>(whole) + page;
    Mapping mapping(whole, whole_bytes, data + (kEndsOnPage ? (inner - bytes) / kAlignment * kAlignment : 0), bytes);
    if (mprotect(data, static_cast<size_t>(inner), PROT_READ | PROT_WRITE) != 0) throw refuse();
    return mapping;
}

}  // namespace enginery
