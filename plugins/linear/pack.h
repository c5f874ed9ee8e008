// The packer: rows of a checkpoint's tensor into a layout of engines/FORMAT.md, a few megabytes at a time.
// plugins/linear/layouts.py is the same in NumPy, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace enginery {

enum class SourceType : uint8_t { kF32, kBf16, kF16 };
enum class PackLayout : uint8_t {
    kRowsF32,
    kRowsBf16,
    kBf16P128,
    kFp8P128,
    kInt8P128,
    kF32K1N16,
    kBf16K2N16,
    kInt8K4N16,
    kCodesK8N16
};

inline constexpr int64_t kPanelRows = 16;

constexpr int64_t source_bytes(SourceType type) { return type == SourceType::kF32 ? 4 : 2; }

constexpr bool is_packed(PackLayout layout) { return layout >= PackLayout::kF32K1N16; }

constexpr bool has_scale(PackLayout layout) {
    return layout == PackLayout::kFp8P128 || layout == PackLayout::kInt8P128 || layout >= PackLayout::kInt8K4N16;
}

// Bytes of a panel; of a layout that is not packed, of its 16 rows.
constexpr int64_t panel_bytes(PackLayout layout, int64_t columns) {
    const int64_t padded = (columns + 63) / 64 * 64;
    const int64_t padded_128 = (columns + 127) / 128 * 128;
    switch (layout) {
        case PackLayout::kRowsF32:
            return kPanelRows * columns * 4;
        case PackLayout::kRowsBf16:
            return kPanelRows * columns * 2;
        case PackLayout::kBf16P128:
            return kPanelRows * padded_128 * 2;
        case PackLayout::kFp8P128:
        case PackLayout::kInt8P128:
            return kPanelRows * padded_128;
        case PackLayout::kF32K1N16:
            return kPanelRows * padded * 4;
        case PackLayout::kBf16K2N16:
            return kPanelRows * padded * 2;
        case PackLayout::kInt8K4N16:
            return kPanelRows * padded;
        case PackLayout::kCodesK8N16:
            return kPanelRows * padded / 2;
    }
    return 0;
}

constexpr int64_t num_groups(int64_t columns, int64_t group) { return ((columns + 63) / 64 * 64 + group - 1) / group; }

struct PackJob {
    const std::byte* source = nullptr;  // [rows, columns] of `type`, contiguous, at any alignment
    SourceType type = SourceType::kF32;
    int64_t rows = 0;  // the last panel is filled up with zeros
    int64_t columns = 0;
    PackLayout layout = PackLayout::kRowsF32;
    std::byte* out = nullptr;  // panel p at p * stride * panel_bytes; without panels row r at r * stride * its bytes
    float* scale = nullptr;    // [16] of panel p at p * stride * 16, or of row r at r * stride
    int32_t* sums = nullptr;   // of kInt8K4N16 alone, as scale
    // Of kCodesK8N16 alone: columns of a group, and the f16 scales and (null: all 8) zero points, [groups][16] of panel
    // p at p * stride * 16 * groups, where groups are as many as the padded columns make.
    int64_t group = 0;
    uint16_t* half_scale = nullptr;
    uint8_t* zeros = nullptr;
    float add = 0.0f;    // to every value, in f32, before it is rounded
    int64_t stride = 1;  // 2 interleaves two matrices
    int num_threads = 1;
};

// Packs, and returns the least row * columns + column whose value is not finite in the layout, or -1. Where there is
// one, what is written means nothing.
int64_t pack_rows(const PackJob& job);

}  // namespace enginery
