// How threads wait for each other: they watch a word for a moment, then sleep in the kernel until it is changed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace enginery {

inline constexpr std::chrono::seconds kWaitTimeout{60};

// A counter that threads wait on. It only ever rises.
class Signal {
  public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    // Raises the value and wakes everybody who waits.
    void raise();

    // Waits until the value is no longer `old`; false where that takes longer than `timeout`.
    bool wait_past(uint32_t old, bool spin, std::chrono::nanoseconds timeout) const;

  private:
    alignas(64) std::atomic<uint32_t> value_{0};
    mutable std::atomic<uint32_t> sleepers_{0};
};

}  // namespace enginery
