#include "weight_upload.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "errors.h"

namespace enginery {
namespace {

constexpr int64_t kPieceBytes = 32 << 20;
constexpr int64_t kSliceBytes = 2 << 20;  // that a thread reads at a time

class File {
  public:
    // O_NONBLOCK: a FIFO in the file's place must not hold the loader up.
    File(const std::string& path, int64_t bytes)
        : path_(path), number_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
        if (number_ < 0) throw EngineFormatError(path_ + ": cannot be opened: " + std::strerror(errno) + ".");
        struct stat status{};
        const bool regular = fstat(number_, &status) == 0 && S_ISREG(status.st_mode);
        if (regular && status.st_size == bytes) return;
        close(number_);
        throw EngineFormatError(path_ + ": wanted a file of " + std::to_string(bytes) + " bytes, found " +
                                (regular ? std::to_string(status.st_size) : "no regular file") +
                                ". Copy or build the engine again.");
    }
    ~File() { close(number_); }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    void read(std::byte* to, int64_t offset, int64_t bytes) const {
        while (bytes > 0) {
            const ssize_t count = pread(number_, to, static_cast<size_t>(bytes), offset);
            if (count < 0 && errno == EINTR) continue;
            if (count <= 0) {
                throw EngineFormatError(path_ + ": cannot be read at byte " + std::to_string(offset) + ": " +
                                        (count == 0 ? "it ends there" : std::strerror(errno)) +
                                        ". Copy or build the engine again.");
            }
            to += count;
            offset += count;
            bytes -= count;
        }
    }

  private:
    std::string path_;
    int number_;
};

class Staging {
  public:
    Staging(CudaDevice& device, int64_t bytes)
        : device_(device), memory_(device.allocate_pinned(bytes, "loading weights")) {}
    ~Staging() { device_.free_pinned(memory_); }
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;

    std::byte* memory() const { return memory_; }

  private:
    CudaDevice& device_;
    std::byte* memory_;
};

}  // namespace

void upload_weights(CudaDevice& device, ThreadPool& pool, const std::string& path, int64_t file_bytes, int64_t begin,
                    int64_t end, Address to) {
    const File file(path, file_bytes);
    const int64_t piece_bytes = std::min(kPieceBytes, end - begin);
    const Staging even(device, piece_bytes), odd(device, piece_bytes);
    const std::array<std::byte*, 2> pieces = {even.memory(), odd.memory()};
    size_t turn = 0;
    try {
        for (int64_t offset = begin; offset < end; offset += piece_bytes, turn ^= 1) {
            const int64_t bytes = std::min(piece_bytes, end - offset);
            // The piece before, which lies in the other memory, is copied meanwhile.
            pool.run_each(static_cast<int32_t>((bytes + kSliceBytes - 1) / kSliceBytes), [&](int32_t slice) {
                const int64_t start = slice * kSliceBytes;
                file.read(pieces[turn] + start, offset + start, std::min(kSliceBytes, bytes - start));
            });
            device.synchronize();
            device.copy_to_device(to + static_cast<Address>(offset - begin), pieces[turn], bytes);
        }
    } catch (...) {
        device.synchronize();
        throw;
    }
    device.synchronize();
}

}  // namespace enginery
