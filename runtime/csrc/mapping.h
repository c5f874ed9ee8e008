// Memory by whole pages: files mapped for reading, and arenas that are zero and take no memory until they are touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace enginery {

class Mapping {
  public:
    Mapping() = default;
    ~Mapping();
    Mapping(Mapping&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)),
          bytes_(std::exchange(other.bytes_, 0)),
          whole_(std::exchange(other.whole_, nullptr)),
          whole_bytes_(std::exchange(other.whole_bytes_, 0)) {}
    Mapping& operator=(Mapping&& other) noexcept;
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    // The whole of a regular file of exactly `bytes`, read-only, on the boundary of a huge page. Throws
    // EngineFormatError.
    static Mapping of_file(const std::string& path, int64_t bytes);
    // Zeroed memory on a page's boundary, between two pages that nobody may touch: what reads or writes before it, or a
    // page behind it, faults. Under AddressSanitizer it ends where its last page does instead, but for less than 64
    // bytes: then the next vector faults. Throws CapacityError naming `purpose`.
    static Mapping of_zeros(int64_t bytes, const std::string& purpose);

    std::byte* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

  private:
    Mapping(void* whole, size_t whole_bytes, void* data, int64_t bytes)
        : data_(static_cast<std::byte*>(data)), bytes_(bytes), whole_(whole), whole_bytes_(whole_bytes) {}

    std::byte* data_ = nullptr;
    int64_t bytes_ = 0;
    void* whole_ = nullptr;  // with what lies around the data
    size_t whole_bytes_ = 0;
};

}  // namespace enginery
