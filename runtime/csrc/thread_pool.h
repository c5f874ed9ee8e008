// Threads that do the same thing at the same time: a pool whose caller takes part, and a barrier between them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "wait.h"

namespace enginery {

// CPUs that this process may run on.
std::vector<int> available_cpus();

// Threads beside each other need a CPU each to watch for each other; with fewer, they sleep at once.
bool should_spin(int32_t num_threads);

// Threads 1 .. num_threads - 1 live as long as the pool, each on a CPU of its own where there are enough; whoever calls
// run() is thread 0. Between runs the others sleep.
class ThreadPool {
  public:
    explicit ThreadPool(int32_t num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int32_t num_threads() const { return num_threads_; }

    // Runs task(0) .. task(num_threads - 1), each on its thread; returns when all have, and throws what the first of
    // them to fail has thrown. One caller at a time.
    void run(const std::function<void(int32_t)>& task);

    // Runs task(0) .. task(count - 1), each once, on whichever thread is free.
    void run_each(int32_t count, const std::function<void(int32_t)>& task);

  private:
    void work(int32_t thread);
    void run_task(int32_t thread);
    void stop();

    int32_t num_threads_;
    bool spin_;
    bool stopping_ = false;
    const std::function<void(int32_t)>* task_ = nullptr;
    Signal started_;
    Signal finished_;
    alignas(64) std::atomic<int32_t> running_{0};
    std::mutex failure_mutex_;
    std::exception_ptr failure_;
    std::vector<std::thread> workers_;
};

// Where `count` threads wait for each other, as often as they like.
class Barrier {
  public:
    // name: in the message of a wait that ends without the others, e.g. "rank 1".
    Barrier(int32_t count, bool spin, std::string name) : count_(count), spin_(spin), name_(std::move(name)) {}

    // Returns when all have come. Throws EngineryError where one has not within kWaitTimeout, or fail() was called.
    void wait();

    // Makes everybody's wait, now and later, fail: one of the threads will not come.
    void fail();

  private:
    const int32_t count_;
    const bool spin_;
    const std::string name_;
    std::atomic<bool> failed_{false};
    alignas(64) std::atomic<int32_t> arrived_{0};
    Signal passed_;
};

}  // namespace enginery
