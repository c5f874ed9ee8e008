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

#define ENGINERY_TEXT_OF(x) #x
#define ENGINERY_TEXT(x) ENGINERY_TEXT_OF(x)
inline constexpr std::string_view kIsa = ENGINERY_TEXT(ENGINERY_ISA);

constexpr bool is_of(const Tuned& entry, std::string_view isa, std::string_view layout) {
    return entry.isa == isa && layout.find(entry.layout) != layout.npos;
}

// The ISA whose entries count for a layout: this one, or where it has none the one that it extends.
constexpr std::string_view measured_isa(std::string_view layout) {
    std::string_view isa = kIsa;
    const auto suits = [&](const Tuned& entry) { return is_of(entry, isa, layout); };
    while (std::none_of(std::begin(kTuned), std::end(kTuned), suits) && isa.find('_') != isa.npos) {
        isa = isa.substr(0, isa.rfind('_'));
    }
    return isa;
}

// Whether any number of rows and any weight have an entry.
constexpr bool is_measured(std::string_view layout) {
    const std::string_view isa = measured_isa(layout);
    return std::any_of(std::begin(kTuned), std::end(kTuned), [&](const Tuned& entry) {
        return is_of(entry, isa, layout) &&
               std::min({entry.most_rows, entry.most_columns, entry.most_panels}) == kAnyNumber;
    });
}
static_assert(is_measured("f32_k1n16") && is_measured("bf16_k2n16") && is_measured("int8_k4n16") &&
                  is_measured("int4_k8n16"),
              "benchmarks/tune_linear.py --isa ... --write measures them");

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
    return found;
}

}  // namespace enginery::ENGINERY_ISA
