// The serving loop: takes requests, makes steps, puts out tokens. A thread of its own, which knows nothing of Python.
//
// A step is a transaction: what goes wrong in it ends the requests it concerns, frees what they hold, and the loop goes
// on. Requests that end between two steps hold nothing in the next one.
//
// Where the executor draws tokens itself, a step is launched before the tokens of the one before are read: its
// sequences end in a token that only the executor knows. What turns out to have ended by then is computed once more for
// nothing.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "batch.h"
#include "block_manager.h"
#include "executor.h"
#include "outbox.h"
#include "request.h"
#include "sampler.h"
#include "scheduler.h"

namespace enginery {

struct LoopConfig {
    int32_t max_model_len = 0;           // tokens of prompt and output together
    int32_t max_num_seqs = 0;            // sequences that run at once
    int32_t max_num_batched_tokens = 0;  // tokens of a step
    int32_t mixed_prompt_tokens = 0;     // of them prompts' at most, where others decode (scheduler.h); 0 = all
    bool enable_prefix_caching = true;
    std::string capacity_scheduler_policy = "guaranteed_no_evict";  // or "max_utilization"
    int32_t expected_output_tokens = 256;  // of an open-ended request, until others like it have ended
    int32_t max_preemptions = 8;           // of one request, after which others give way first
    int32_t rope_threshold = 0;            // prompts longer than this share no state with shorter ones; 0 = all share
    bool rope_exact = false;               // and among themselves only those of one length
    bool manual_steps = false;             // no thread: step() makes the steps, for tests
};

struct GroupStats {
    std::string name;
    int32_t num_blocks = 0;
    int32_t used_blocks = 0;    // referenced by requests
    int32_t cached_blocks = 0;  // findable by their tokens, in use or not
};

struct LoopStats {
    int64_t steps = 0;
    int64_t num_running = 0;
    int64_t num_waiting = 0;
    int64_t num_preemptions = 0;
    int64_t prompt_tokens = 0;  // of requests that were scheduled, each once
    int64_t generation_tokens = 0;
    int64_t prefix_cache_queries = 0;  // prompt tokens looked up
    int64_t prefix_cache_hits = 0;     // of them found
    std::array<int64_t, kNumFinishReasons> finished{};
    double loop_seconds = 0;      // in steps, outside the executor
    double executor_seconds = 0;  // in launch and collect
    double wake_seconds = 0;      // waking who waits for outputs, after a step
    std::vector<GroupStats> groups;
    std::string internal_error;  // a broken invariant of the loop; empty if there was none
};

class Loop {
  public:
    Loop(const ExecutorSpec& spec, const LoopConfig& config, std::unique_ptr<Executor> executor);
    ~Loop() { close(); }
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;

    // From any thread. What they mean for the caller: _core.pyi.
    int64_t submit(Request request);
    void abort(int64_t id);
    std::vector<Output> wait(double timeout_s);
    LoopStats stats();
    std::map<std::string, int64_t> memory() const { return executor_->memory(); }
    std::string sums_by() const { return executor_->sums_by(); }
    void settle_weights();
    void stop_settling() { settling_stopped_ = true; }
    std::string weights_in();
    void fail(const std::string& reason);
    void close();

    // With manual_steps: one step on the caller's thread; false when there was nothing to do.
    bool step();

  private:
    struct Command {
        std::unique_ptr<Sequence> submitted;  // or, if null,
        int64_t aborted = -1;                 // or, if negative, everything ends
    };

    static double monotonic_seconds();
    void run();
    bool take_commands();
    bool make_step();
    void run_step();
    bool executor_draws();
    void drop_ended();
    template <typename Action>
    bool ask_executor(const Action& action, std::initializer_list<const Batch*> batches);
    void collect_in_flight(const Batch* next);
    void finish_all(FinishReason reason, const std::string& error);
    void break_down(std::string what);
    void publish_stats();

    // What becomes of a step: loop_outcome.cpp.
    void sample_rows(const Batch& batch);
    void sample_row(const SampleTask& task, int32_t num_kept, SampleResult& result);
    void take_draws(const Batch& batch);
    void advance(const Batch* drawing);
    void apply_rows(const Batch& batch);
    void apply_row(Outbox::Writer& writer, const SampleTask& task, SampleResult& result);
    void append_token(Outbox::Writer& writer, Sequence& sequence, SampleResult& result);
    void finish(Outbox::Writer& writer, Sequence& sequence, FinishReason reason, const std::string& error = "");

    LoopConfig config_;
    int32_t vocab_size_;
    std::unique_ptr<Executor> executor_;
    BlockManager blocks_;
    Scheduler scheduler_;
    RequestLimits limits_;

    // The loop thread's own.
    std::unordered_map<int64_t, std::unique_ptr<Sequence>> sequences_;
    EditSlots slots_;
    std::array<Batch, 2> batches_;                  // of this step and the one before
    const Batch* in_flight_ = nullptr;              // launched, and to be collected after the next is launched
    std::vector<std::unique_ptr<Sequence>> ended_;  // that the step in flight still speaks of
    std::vector<Chunk> chunks_;
    std::vector<SampleResult> results_;
    std::vector<Command> commands_;
    LoopStats counters_;
    double step_time_ = 0;

    std::mutex inbox_mutex_;  // guards what follows, up to stats_mutex_
    std::condition_variable inbox_changed_;
    std::vector<Command> inbox_;
    std::string failure_;  // why new requests are refused
    bool closing_ = false;
    int64_t next_id_ = 0;
    uint64_t next_seed_ = 0;

    std::mutex stats_mutex_;
    LoopStats stats_;  // as of the last step

    std::atomic<bool> settling_stopped_{false};
    std::mutex weights_mutex_;
    std::string weights_in_;

    Outbox outbox_;
    std::mutex close_mutex_;
    bool closed_ = false;
    std::thread thread_;
};

}  // namespace enginery
