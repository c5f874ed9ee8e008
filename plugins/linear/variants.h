// Which variant of `linear` a product takes: by what was measured.
#pragma once

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>
#include <vector>

#include "plugins/linear/tuning.h"
#include "plugins/simd.h"

namespace enginery::ENGINERY_ISA {

// The variants of a product, each with the most rows that it is for, in order.
using Variants = std::vector<std::pair<int64_t, Variant>>;

// Without an entry: rows that are multiplied as fast as their weights come are left to the processor's prefetching; and
// of more rows as many are multiplied together as registers hold.
inline constexpr Variant kOneRow = {4, true, false}, kTwoRows = {kLanes == 16 ? 4 : 2, true, false},
                         kManyRows = {kLanes == 16 ? 2 : 1, false, true};

#define ENGINERY_TEXT_OF(x) #x
#define ENGINERY_TEXT(x) ENGINERY_TEXT_OF(x)
inline constexpr std::string_view kIsa = ENGINERY_TEXT(ENGINERY_ISA);

inline bool is_of(const Tuned& entry, std::string_view isa, std::string_view layout) {
    return entry.isa == isa && layout.find(entry.layout) != layout.npos;
}

// The ISA whose entries count for a layout: this one, or where it has none the one that it extends, if that has some.
inline std::string_view measured_isa(std::string_view layout) {
    std::string_view isa = kIsa;
    while (std::none_of(std::begin(kTuned), std::end(kTuned), [&](auto& entry) { return is_of(entry, isa, layout); })) {
        if (isa.find('_') == isa.npos) return kIsa;
        isa = isa.substr(0, isa.rfind('_'));
    }
    return isa;
}

// columns: of the weight, K. panels: of 16 of its rows.
inline Variants find_variants(std::string_view layout, int64_t columns, int64_t panels) {
    const std::string_view isa = measured_isa(layout);
    Variants found;
    for (const Tuned& entry : kTuned) {
        const bool suits = is_of(entry, isa, layout) && columns <= entry.most_columns && panels <= entry.most_panels;
        // Entries of few rows come first, and of small weights among them: what suits first suits best.
        if (suits && (found.empty() || found.back().first < entry.most_rows)) {
            found.emplace_back(entry.most_rows, entry.variant);
        }
    }
    if (found.empty()) found = {{1, kOneRow}, {2, kTwoRows}};
    if (found.back().first < kAnyNumber) found.emplace_back(kAnyNumber, kManyRows);
    return found;
}

}  // namespace enginery::ENGINERY_ISA
