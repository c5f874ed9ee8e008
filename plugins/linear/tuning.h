// What was measured of `linear`'s variants. Written by `python benchmarks/tune_linear.py`.
#pragma once

#include <cstdint>
#include <string_view>

namespace enginery {

// A unit is the panels of 16 columns of the output: one, or one of gates and one of ups.
struct Variant {
    int units;   // that are multiplied together
    bool apart;  // they lie far apart, and each follows the one before in the weight; otherwise side by side
    bool ahead;  // while a block is multiplied, the next is brought to the L2 cache
};

inline constexpr int64_t kAnyNumber = INT64_MAX;

struct Tuned {
    std::string_view isa, layout;  // its name, or what those of several have in common
    int64_t most_rows, most_columns, most_panels;
    Variant variant;
};

inline constexpr Tuned kTuned[] = {
    {"", "", 0, 0, 0, {}},
};

}  // namespace enginery
