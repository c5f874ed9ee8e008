// How the ranks of one process meet: every thread of every rank, over memory that all can read.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "wait.h"

namespace enginery {

class Collectives {
  public:
    // threads_of_rank: threads that each rank brings to every meeting.
    Collectives(std::vector<int32_t> threads_of_rank, bool spin);

    // One thread of each rank shows the others where the rank's data lie, before they meet.
    void publish(int32_t rank, const std::byte* data) { ranks_[static_cast<size_t>(rank)].data = data; }
    const std::byte* published(int32_t rank) const { return ranks_[static_cast<size_t>(rank)].data; }

    // Returns when all threads of all ranks have come. Throws EngineryError naming a rank that has not within
    // kWaitTimeout, or when fail() was called.
    void meet(int32_t rank);

    // Makes every meeting, now and later, fail: a rank will not come.
    void fail();

  private:
    struct alignas(64) Rank {
        const std::byte* data = nullptr;
        int32_t threads = 0;
        std::atomic<int32_t> arrived{0};
    };

    int32_t find_missing_rank() const;

    std::vector<Rank> ranks_;
    int32_t num_threads_ = 0;
    bool spin_;
    std::atomic<bool> failed_{false};
    alignas(64) std::atomic<int32_t> arrived_{0};
    Signal met_;
};

}  // namespace enginery
