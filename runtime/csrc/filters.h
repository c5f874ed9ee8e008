// Which tokens top_k and top_p leave, of a whole vocabulary, without sorting it.
#pragma once

#include <cstdint>
#include <vector>

namespace enginery {

struct FilterScratch {
    std::vector<int32_t> candidates;
    std::vector<int32_t> boundary;
    std::vector<double> mass;
};

// The `count` largest of row[0 .. size - 1], largest first, of equals the lower id first.
void find_largest(const float* row, int32_t size, int32_t count, std::vector<int32_t>& largest);

// Leaves in scratch.candidates the top_k likeliest tokens (0 = all), and of those the likeliest whose weights first
// reach top_p of their sum; returns the sum of what is left. weights [vocab_size] are in 0 .. 1 and sum up to `total`.
double keep_likeliest(const std::vector<float>& weights, double total, int32_t top_k, float top_p,
                      FilterScratch& scratch);

}  // namespace enginery
