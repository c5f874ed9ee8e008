#include "filters.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace enginery {
namespace {

constexpr int32_t kSmallNucleus = 256;
constexpr int32_t kHeapLimit = 1024;  // beyond it a selection is faster than a heap
// Weights by the upper half of their bits, which orders them: sign 0, exponent, 7 bits of the mantissa.
constexpr uint32_t kBucketShift = 16;
constexpr size_t kNumBuckets = (std::bit_cast<uint32_t>(1.0F) >> kBucketShift) + 1;

size_t bucket_of(float weight) { return std::bit_cast<uint32_t>(weight) >> kBucketShift; }

// A nucleus of any size: whole buckets from the top, and of the last one the likeliest.
double keep_wide_nucleus(const std::vector<float>& weights, double target, FilterScratch& scratch) {
    auto& [candidates, boundary, mass] = scratch;
    mass.assign(kNumBuckets, 0.0);
    for (const float weight : weights) mass[bucket_of(weight)] += static_cast<double>(weight);
    size_t last = kNumBuckets - 1;
    double sum = 0;
    while (last > 0 && sum + mass[last] < target) sum += mass[last--];

    candidates.clear();
    boundary.clear();
    for (size_t token = 0; token < weights.size(); ++token) {
        const size_t bucket = bucket_of(weights[token]);
        if (bucket > last) candidates.push_back(static_cast<int32_t>(token));
        if (bucket == last) boundary.push_back(static_cast<int32_t>(token));
    }
    std::stable_sort(boundary.begin(), boundary.end(), [&weights](int32_t a, int32_t b) {
        return weights[static_cast<size_t>(a)] > weights[static_cast<size_t>(b)];
    });
    for (const int32_t token : boundary) {
        if (sum >= target) break;
        sum += static_cast<double>(weights[static_cast<size_t>(token)]);
        candidates.push_back(token);
    }
    return sum;
}

}  // namespace

void find_largest(const float* row, int32_t size, int32_t count, std::vector<int32_t>& largest) {
    const auto before = [row](int32_t a, int32_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); };
    count = std::min(count, size);
    largest.clear();
    if (count <= 0) return;
    if (count > kHeapLimit) {
        largest.resize(static_cast<size_t>(size));
        std::iota(largest.begin(), largest.end(), 0);
        std::nth_element(largest.begin(), largest.begin() + count - 1, largest.end(), before);
        largest.resize(static_cast<size_t>(count));
        std::sort(largest.begin(), largest.end(), before);
        return;
    }
    int32_t token = 0;
    for (; token < count; ++token) largest.push_back(token);
    std::make_heap(largest.begin(), largest.end(), before);
    for (; token < size; ++token) {
        if (!(row[token] > row[largest.front()])) continue;
        std::pop_heap(largest.begin(), largest.end(), before);
        largest.back() = token;
        std::push_heap(largest.begin(), largest.end(), before);
    }
    std::sort_heap(largest.begin(), largest.end(), before);
}

double keep_likeliest(const std::vector<float>& weights, double total, int32_t top_k, float top_p,
                      FilterScratch& scratch) {
    const auto vocab_size = static_cast<int32_t>(weights.size());
    auto& candidates = scratch.candidates;
    const bool all = top_k == 0 || top_k >= vocab_size;
    find_largest(weights.data(), vocab_size, all ? kSmallNucleus : top_k, candidates);
    double sum = 0;
    if (!all) {
        for (const int32_t token : candidates) sum += static_cast<double>(weights[static_cast<size_t>(token)]);
        if (top_p >= 1.0F) return sum;
    }
    const double target = static_cast<double>(top_p) * (all ? total : sum);
    sum = 0;
    size_t kept = 0;
    while (kept < candidates.size() && (kept == 0 || sum < target)) {
        sum += static_cast<double>(weights[static_cast<size_t>(candidates[kept])]);
        ++kept;
    }
    if (all && sum < target && vocab_size > kSmallNucleus) return keep_wide_nucleus(weights, target, scratch);
    candidates.resize(kept);
    return sum;
}

}  // namespace enginery
