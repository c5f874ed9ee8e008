#include "collectives.h"

#include <string>

#include "errors.h"

namespace enginery {

Collectives::Collectives(std::vector<int32_t> threads_of_rank, bool spin)
    : ranks_(threads_of_rank.size()), spin_(spin) {
    for (size_t rank = 0; rank < threads_of_rank.size(); ++rank) {
        ranks_[rank].threads = threads_of_rank[rank];
        num_threads_ += threads_of_rank[rank];
    }
}

void Collectives::meet(int32_t rank) {
    if (num_threads_ == 1) return;
    const uint32_t met = met_.value();
    if (failed_.load(std::memory_order_acquire)) throw EngineryError("Another rank of the step failed.");
    ranks_[static_cast<size_t>(rank)].arrived.fetch_add(1, std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
        for (auto& other : ranks_) other.arrived.store(0, std::memory_order_relaxed);
        arrived_.store(0, std::memory_order_relaxed);
        met_.raise();
        return;
    }
    if (!met_.wait_past(met, spin_, kWaitTimeout)) {
        const int32_t missing = find_missing_rank();
        fail();
        throw EngineryError("Rank " + std::to_string(rank) + " waited " + std::to_string(kWaitTimeout.count()) +
                            " s in vain for rank " + std::to_string(missing) +
                            ". The machine is overloaded: restart the server with fewer threads.");
    }
    if (failed_.load(std::memory_order_acquire)) throw EngineryError("Another rank of the step failed.");
}

int32_t Collectives::find_missing_rank() const {
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
        if (ranks_[rank].arrived.load(std::memory_order_relaxed) < ranks_[rank].threads)
            return static_cast<int32_t>(rank);
    }
    return -1;
}

void Collectives::fail() {
    failed_.store(true, std::memory_order_release);
    met_.raise();
}

}  // namespace enginery
