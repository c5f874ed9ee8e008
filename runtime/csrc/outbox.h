// What the loop has produced and nobody has fetched yet: one Output for each request, however many steps it spans.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "request.h"

namespace enginery {

enum class FinishReason : uint8_t { kNone, kStop, kLength, kAbort, kError };
inline constexpr size_t kNumFinishReasons = 5;

// Fields as in _core.pyi; logprobs are empty unless asked for. Times are of the monotonic clock, 0 where not reached.
struct Output {
    int64_t request_id = 0;
    std::vector<int32_t> token_ids;
    bool has_logprobs = false;
    std::vector<std::vector<TokenLogprob>> logprobs;
    bool has_prompt_logprobs = false;
    std::vector<std::vector<TokenLogprob>> prompt_logprobs;  // of the second prompt token and on
    FinishReason finish_reason = FinishReason::kNone;
    int32_t stop_token_id = -1;
    std::string error;
    int32_t num_cached_tokens = 0;
    double arrival_time = 0;
    double first_scheduled_time = 0;
    double first_token_time = 0;
};

class Outbox {
  public:
    // Held by the loop while it writes; wake() follows when it has let go.
    class Writer {
      public:
        explicit Writer(Outbox& outbox) : outbox_(outbox), lock_(outbox.mutex_) {}
        // The output of `sequence` that nobody has fetched, made if there is none; valid until the next call.
        Output& output(Sequence& sequence) {
            outbox_.has_news_ = true;
            if (sequence.outbox_epoch != outbox_.epoch_) {
                sequence.outbox_epoch = outbox_.epoch_;
                sequence.outbox_index = outbox_.outputs_.size();
                outbox_.outputs_.emplace_back().request_id = sequence.id;
            }
            return outbox_.outputs_[sequence.outbox_index];
        }

      private:
        Outbox& outbox_;
        std::unique_lock<std::mutex> lock_;
    };

    // Wakes whoever waits, if something was written since the last call. The loop's; on a virtual machine this may take
    // longer than all else in a step.
    void wake() {
        if (!has_news_) return;
        has_news_ = false;
        arrived_.notify_all();
    }

    // All outputs; waits for one up to `timeout`, or until close().
    std::vector<Output> take(std::chrono::duration<double> timeout) {
        std::unique_lock lock(mutex_);
        arrived_.wait_for(lock, timeout, [this] { return !outputs_.empty() || closed_; });
        std::vector<Output> taken;
        taken.reserve(outputs_.capacity());
        taken.swap(outputs_);
        ++epoch_;
        return taken;
    }

    void close() {
        {
            const std::lock_guard lock(mutex_);
            closed_ = true;
        }
        arrived_.notify_all();
    }

  private:
    std::mutex mutex_;
    std::condition_variable arrived_;
    std::vector<Output> outputs_;
    int64_t epoch_ = 0;
    bool closed_ = false;
    bool has_news_ = false;  // the loop thread's
};

}  // namespace enginery
