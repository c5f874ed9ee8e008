// The largest logits of a row, kept while the head's product is made: what greedy and top_k rows need of a vocabulary.
// Each thread keeps those of the columns that it computes, so that nobody writes the others, or reads them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace enginery {

struct KeptLogit {
    float logit;
    int32_t token;
};

// Larger first, of equals the lower token.
inline bool comes_before(const KeptLogit& a, const KeptLogit& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

inline constexpr int32_t kMostKept = 65;

// What one thread keeps of one row; it lies in the thread's scratch, and begins with every step.
struct alignas(64) KeptRow {
    float least;  // logits below this are not among the largest
    int32_t count;
    int32_t is_finite;  // 1 if all were that it has seen
    KeptLogit logits[2 * kMostKept];

    void begin() {
        least = -std::numeric_limits<float>::infinity();
        count = 0;
        is_finite = 1;
    }

    // wanted: 1 .. kMostKept. When there are twice as many, the others go.
    void add(KeptLogit logit, int32_t wanted) {
        logits[count++] = logit;
        if (count < std::max(2 * wanted, 8)) return;
        std::nth_element(logits, logits + wanted - 1, logits + count, comes_before);
        least = logits[wanted - 1].logit;
        count = wanted;
    }
};

}  // namespace enginery
