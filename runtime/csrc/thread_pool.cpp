#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <utility>

#include "errors.h"

namespace enginery {

namespace {

constexpr auto kForever = std::chrono::hours(24);

void pin(std::thread& thread, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(static_cast<size_t>(cpu), &set);
    // Where the system forbids it, threads run unpinned: slower, not wrong.
    pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);
}

}  // namespace

std::vector<int> available_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    std::vector<int> cpus;
    if (sched_getaffinity(0, sizeof(set), &set) != 0) return {0};
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(static_cast<size_t>(cpu), &set)) cpus.push_back(cpu);
    }
    return cpus;
}

bool should_spin(int32_t num_threads) { return num_threads <= static_cast<int32_t>(available_cpus().size()); }

ThreadPool::ThreadPool(int32_t num_threads) : num_threads_(num_threads), spin_(should_spin(num_threads)) {
    const std::vector<int> cpus = available_cpus();
    try {
        for (int32_t thread = 1; thread < num_threads; ++thread) {
            workers_.emplace_back([this, thread] { work(thread); });
            if (spin_) pin(workers_.back(), cpus[static_cast<size_t>(thread)]);
        }
    } catch (const std::system_error& error) {
        stop();
        throw CapacityError("No thread of " + std::to_string(num_threads) + " could be started: " + error.what());
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    stopping_ = true;
    started_.raise();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::work(int32_t thread) {
    uint32_t seen = 0;
    while (true) {
        while (!started_.wait_past(seen, spin_, kForever)) {
        }
        ++seen;
        if (stopping_) return;
        run_task(thread);
        if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) finished_.raise();
    }
}

void ThreadPool::run_task(int32_t thread) {
    try {
        (*task_)(thread);
    } catch (...) {
        const std::lock_guard lock(failure_mutex_);
        if (!failure_) failure_ = std::current_exception();
    }
}

void ThreadPool::run(const std::function<void(int32_t)>& task) {
    task_ = &task;
    const uint32_t finished = finished_.value();
    if (!workers_.empty()) {
        running_.store(num_threads_ - 1, std::memory_order_relaxed);
        started_.raise();
    }
    run_task(0);
    if (!workers_.empty()) {
        while (!finished_.wait_past(finished, spin_, kForever)) {
        }
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void ThreadPool::run_each(int32_t count, const std::function<void(int32_t)>& task) {
    if (count <= 0) return;
    if (count == 1 || num_threads_ == 1) {
        for (int32_t i = 0; i < count; ++i) task(i);
        return;
    }
    std::atomic<int32_t> next{0};
    run([&](int32_t) {
        for (int32_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i);
    });
}

void Barrier::wait() {
    if (count_ == 1) return;
    const uint32_t passed = passed_.value();
    if (failed_.load(std::memory_order_acquire)) throw EngineryError(name_ + ": another thread of the step failed.");
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.raise();
        return;
    }
    if (!passed_.wait_past(passed, spin_, kWaitTimeout)) {
        fail();
        throw EngineryError(
            name_ + ": a thread did not come to a barrier within " + std::to_string(kWaitTimeout.count()) +
            " s. The machine is overloaded, or a CPU was taken " + "away: restart the server with fewer threads.");
    }
    if (failed_.load(std::memory_order_acquire)) throw EngineryError(name_ + ": another thread of the step failed.");
}

void Barrier::fail() {
    failed_.store(true, std::memory_order_release);
    passed_.raise();
}

}  // namespace enginery
