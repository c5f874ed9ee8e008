// How threads divide the work of a call.
#pragma once

#include <algorithm>
#include <cstring>

#include "plugins/kernel.h"
#include "runtime/csrc/call_reader.h"

namespace enginery::ENGINERY_ISA {

struct Range {
    int64_t begin, end;
};

// Buffers share memory with others that lived before, so whoever writes a row also writes the zeros of its padding.
template <class T>
static inline void zero_padding(T* row, int64_t columns) {
    std::memset(row + columns, 0, static_cast<size_t>(row_stride(columns) - columns) * sizeof(T));
}

// A thread's part of `count` rows of equal work; all of them where the result is the thread's own.
static inline Range share_of(const Team& team, int64_t count, bool per_thread) {
    if (per_thread) return {0, count};
    return {count * team.thread / team.num_threads, count * (team.thread + 1) / team.num_threads};
}

// Items 0 .. count - 1, each given to one thread: first three quarters in equal contiguous parts, so that a thread
// reads its weights in order; then the rest one by one from the shared counter, for cores that are slower or disturbed.
class Shares {
  public:
    Shares(const Team& team, int64_t count) : team_(team), count_(count) {
        const int64_t own = team.num_threads == 1 ? count : count * 3 / 4 / team.num_threads;
        next_ = own * team.thread;
        own_end_ = next_ + own;
        shared_begin_ = own * team.num_threads;
    }

    // The next item, or -1 when none is left.
    int64_t next() {
        if (next_ < own_end_) return next_++;
        if (shared_begin_ >= count_) return -1;
        const int64_t item = shared_begin_ + team_.counter->fetch_add(1, std::memory_order_relaxed);
        return item < count_ ? item : -1;
    }

  private:
    const Team& team_;
    int64_t count_, next_, own_end_, shared_begin_;
};

}  // namespace enginery::ENGINERY_ISA
