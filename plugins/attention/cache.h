// Where keys and values of one KV head lie in a block (plugins/README.md): T = block size, d = head_dim, dv = d padded
// to 16. Keys are panels of 16 that a query multiplies like weights; values are panels of 16 columns.
#pragma once

#include "plugins/simd.h"
#include "runtime/csrc/call_reader.h"

namespace enginery::ENGINERY_ISA {

inline constexpr int64_t kMostHeadDim = 256;

enum class CacheType : uint8_t { kF32, kBf16, kI8 };

struct HeadCache {
    CacheType type = CacheType::kF32;
    int64_t block_size = 0;
    int64_t head_dim = 0;
    int64_t value_dim = 0;
    int64_t element_bytes = 4;

    static HeadCache of(const LayerState& state, int64_t head_dim) {
        HeadCache cache;
        cache.block_size = state.block_size;
        cache.head_dim = head_dim;
        cache.value_dim = round_up(head_dim, 16);
        if (state.dtype == "bf16") cache.type = CacheType::kBf16;
        if (state.dtype == "i8") cache.type = CacheType::kI8;
        cache.element_bytes = state.dtype == "f32" ? 4 : state.dtype == "bf16" ? 2 : 1;
        return cache;
    }

    // Elements that one step of a panel takes from each key: pairs, but for float32.
    int64_t packed() const { return type == CacheType::kF32 ? 1 : 2; }

    // Bytes of that.
    int64_t step_bytes() const { return packed() * element_bytes; }

    // Element indices of a token at `offset` in its block.
    int64_t key_index(int64_t offset, int64_t i) const {
        return offset / 16 * 16 * head_dim + i / packed() * 16 * packed() + offset % 16 * packed() + i % packed();
    }
    int64_t value_index(int64_t offset, int64_t i) const {
        return (offset / packed() * value_dim + i) * packed() + offset % packed();
    }
    int64_t values_begin() const { return block_size * head_dim * element_bytes; }
    int64_t scales_begin() const { return values_begin() + block_size * value_dim * element_bytes; }
    uint16_t* key_scales(std::byte* head) const { return reinterpret_cast<uint16_t*>(head + scales_begin()); }
    uint16_t* value_scales(std::byte* head) const { return key_scales(head) + block_size; }
    const uint16_t* key_scales(const std::byte* head) const {
        return reinterpret_cast<const uint16_t*>(head + scales_begin());
    }
    const uint16_t* value_scales(const std::byte* head) const { return key_scales(head) + block_size; }
};

}  // namespace enginery::ENGINERY_ISA
