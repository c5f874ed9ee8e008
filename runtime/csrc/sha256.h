// SHA-256 (FIPS 180-4): names the tokens of a block and all before it, so that equal names mean equal state.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace enginery {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
  public:
    void update(const void* data, size_t num_bytes);
    Digest finish();

  private:
    void compress(const uint8_t* block);

    std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<uint8_t, 64> pending_{};
    uint64_t num_bytes_ = 0;
};

// A digest's own bytes are as good as any hash of them.
struct DigestHash {
    size_t operator()(const Digest& digest) const {
        size_t value = 0;
        std::memcpy(&value, digest.data(), sizeof(value));
        return value;
    }
};

}  // namespace enginery
