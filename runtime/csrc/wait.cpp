#include "wait.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace enginery {

namespace {

constexpr std::chrono::microseconds kSpin{50};

using Clock = std::chrono::steady_clock;

void sleep_while(const std::atomic<uint32_t>& word, uint32_t value, std::chrono::nanoseconds most) {
    static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
    timespec limit{};
    limit.tv_sec = most.count() / 1'000'000'000;
    limit.tv_nsec = most.count() % 1'000'000'000;
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, &limit, nullptr, 0);
}

}  // namespace

void Signal::raise() {
    // Sequentially consistent, as is the waiter's pair below: one of the two sees the other.
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

bool Signal::wait_past(uint32_t old, bool spin, std::chrono::nanoseconds timeout) const {
    if (value() != old) return true;
    if (spin) {
        const auto spin_end = Clock::now() + kSpin;
        while (Clock::now() < spin_end) {
            for (int i = 0; i < 16; ++i) {
                if (value() != old) return true;
                _mm_pause();
            }
        }
    }
    const auto deadline = Clock::now() + timeout;
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    bool changed = value_.load(std::memory_order_seq_cst) != old;
    for (auto now = Clock::now(); !changed && now < deadline; now = Clock::now()) {
        sleep_while(value_, old, deadline - now);
        changed = value() != old;
    }
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    return changed;
}

}  // namespace enginery
