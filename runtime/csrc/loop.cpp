#include "loop.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "errors.h"

namespace enginery {
namespace {

SchedulerSettings scheduler_settings(const ExecutorSpec& spec, const LoopConfig& config) {
    SchedulerSettings settings;
    std::string faults;
    const auto check = [&faults](const std::string& name, int32_t value, int32_t most) {
        if (value >= 1 && value <= most) return;
        faults += (faults.empty() ? "" : "; ") + name + " is " + std::to_string(value) + ", wanted 1 to " +
                  std::to_string(most);
    };
    check("max_model_len", config.max_model_len, INT32_MAX - 1);
    check("max_num_seqs", config.max_num_seqs, spec.max_sequences);
    check("max_num_batched_tokens", config.max_num_batched_tokens, spec.max_tokens);
    check("max_rows", spec.max_rows, INT32_MAX);
    check("vocab_size", spec.vocab_size, INT32_MAX);
    if (config.capacity_scheduler_policy == "max_utilization") {
        settings.policy = CapacityPolicy::kMaxUtilization;
    } else if (config.capacity_scheduler_policy != "guaranteed_no_evict") {
        faults += (faults.empty() ? "" : "; ") + ("capacity_scheduler_policy is '" + config.capacity_scheduler_policy) +
                  "', wanted 'guaranteed_no_evict' or 'max_utilization'";
    }
    if (!faults.empty()) throw EngineryError("the serving loop cannot start: " + faults);
    settings.max_num_seqs = config.max_num_seqs;
    settings.max_num_batched_tokens = config.max_num_batched_tokens;
    settings.mixed_prompt_tokens = config.mixed_prompt_tokens;
    settings.max_rows = spec.max_rows;
    settings.expected_output_tokens = config.expected_output_tokens;
    settings.max_preemptions = config.max_preemptions;
    return settings;
}

}  // namespace

double Loop::monotonic_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Loop::Loop(const ExecutorSpec& spec, const LoopConfig& config, std::unique_ptr<Executor> executor)
    : config_(config),
      vocab_size_(spec.vocab_size),
      executor_(std::move(executor)),
      blocks_(spec.groups, spec.num_blocks, {config.enable_prefix_caching, config.rope_threshold, config.rope_exact}),
      scheduler_(scheduler_settings(spec, config), blocks_),
      limits_{spec.vocab_size, config.max_model_len, blocks_.capacity_tokens()},
      slots_(executor_->draw_limits()),
      batches_{Batch(spec.groups.size()), Batch(spec.groups.size())} {
    std::random_device entropy;
    next_seed_ = static_cast<uint64_t>(entropy()) << 32 | entropy();
    publish_stats();
    if (!config_.manual_steps) thread_ = std::thread([this] { run(); });
}

int64_t Loop::submit(Request request) {
    check_request(request, limits_);
    auto sequence = std::make_unique<Sequence>();
    sequence->token_ids = std::move(request.prompt_token_ids);
    sequence->num_prompt_tokens = sequence->num_known_tokens();
    // The state of the last token is never needed, so one more than the cache holds can be known.
    sequence->max_length = static_cast<int32_t>(
        std::min({int64_t{sequence->num_prompt_tokens} + request.max_tokens, int64_t{config_.max_model_len},
                  std::min<int64_t>(limits_.capacity_tokens, INT32_MAX - 1) + 1}));
    sequence->block_tables.resize(blocks_.num_groups());
    if (request.has_penalties()) {
        for (const int32_t token : sequence->token_ids) sequence->token_counts.try_emplace(token, 0);
    }
    sequence->request = std::move(request);
    sequence->arrival_time = monotonic_seconds();

    const std::lock_guard lock(inbox_mutex_);
    if (closing_) throw EngineryError("the engine is closed and takes no requests");
    if (!failure_.empty()) throw EngineryError("the engine takes no requests: " + failure_);
    const int64_t id = next_id_++;
    sequence->id = id;
    sequence->seed = sequence->request.seed.value_or(next_seed_++);
    inbox_.push_back({std::move(sequence), -1});
    inbox_changed_.notify_one();
    return id;
}

void Loop::abort(int64_t id) {
    if (id < 0) return;
    const std::lock_guard lock(inbox_mutex_);
    inbox_.push_back({nullptr, id});
    inbox_changed_.notify_one();
}

void Loop::fail(const std::string& reason) {
    const std::lock_guard lock(inbox_mutex_);
    if (failure_.empty()) failure_ = reason.empty() ? "no reason was given" : reason;
    inbox_.push_back({nullptr, -1});
    inbox_changed_.notify_one();
}

std::vector<Output> Loop::wait(double timeout_s) {
    constexpr double kLongest = 1e6;  // a clock's nanoseconds hold no infinity
    return outbox_.take(std::chrono::duration<double>(std::clamp(timeout_s, 0.0, kLongest)));
}

void Loop::close() {
    const std::lock_guard only_one(close_mutex_);
    if (closed_) return;
    {
        const std::lock_guard lock(inbox_mutex_);
        closing_ = true;
        inbox_changed_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
    take_commands();
    finish_all(FinishReason::kAbort, "");
    collect_in_flight(nullptr);  // what it reads is the loop's
    outbox_.close();
    closed_ = true;
}

bool Loop::step() {
    if (!config_.manual_steps) throw EngineryError("step() is for a loop with manual_steps; this one has its thread");
    take_commands();
    return make_step();
}

void Loop::run() {
    while (take_commands()) {
        if (make_step()) continue;
        std::unique_lock lock(inbox_mutex_);
        inbox_changed_.wait(lock, [this] { return !inbox_.empty() || closing_; });
    }
}

// False when the loop is to end.
bool Loop::take_commands() {
    std::string failure;
    bool goes_on = true;
    {
        const std::lock_guard lock(inbox_mutex_);
        goes_on = !closing_;
        commands_.swap(inbox_);
        if (!commands_.empty()) failure = failure_;
    }
    for (Command& command : commands_) {
        if (command.submitted != nullptr) {
            Sequence* sequence = command.submitted.get();
            sequences_.emplace(sequence->id, std::move(command.submitted));
            scheduler_.add(sequence);
        } else if (command.aborted < 0) {
            finish_all(FinishReason::kError, failure);
        } else if (const auto found = sequences_.find(command.aborted); found != sequences_.end()) {
            Outbox::Writer writer(outbox_);
            finish(writer, *found->second, FinishReason::kAbort);
            publish_stats();
        }
    }
    commands_.clear();
    outbox_.wake();
    return goes_on;
}

// One step; false when no sequence is left.
bool Loop::make_step() {
    if (!counters_.internal_error.empty()) {
        break_down(counters_.internal_error);
        outbox_.wake();
        return false;
    }
    step_time_ = monotonic_seconds();
    const double executor_before = counters_.executor_seconds;
    try {
        if (sequences_.empty() && in_flight_ == nullptr) {
            ended_.clear();
            blocks_.check_idle();
            publish_stats();
            return false;
        }
        run_step();
    } catch (const std::exception& error) {
        break_down(error.what());
    }
    const double ended = monotonic_seconds();
    counters_.loop_seconds += ended - step_time_ - (counters_.executor_seconds - executor_before);
    outbox_.wake();
    counters_.wake_seconds += monotonic_seconds() - ended;
    return true;
}

void Loop::run_step() {
    chunks_ = scheduler_.schedule();
    if (chunks_.empty() && in_flight_ == nullptr) {
        throw EngineryError("internal error: requests wait, and none of them can run");
    }
    const bool draws = !chunks_.empty() && executor_draws();
    if (!draws) {
        collect_in_flight(nullptr);
        drop_ended();
        ended_.clear();  // no step speaks of them
    }
    if (chunks_.empty()) return;
    Batch& batch = batches_[in_flight_ == batches_.data() ? 1 : 0];
    const size_t num_ended = ended_.size();
    batch.build(chunks_, blocks_.block_size(), draws ? &slots_ : nullptr, executor_->most_kept(), vocab_size_);
    ++counters_.steps;
    if (!ask_executor([&] { executor_->launch(batch.step()); }, {&batch})) return;
    if (draws) {
        collect_in_flight(&batch);
        drop_ended();
        advance(&batch);
        in_flight_ = &batch;
        ended_.erase(ended_.begin(), ended_.begin() + static_cast<std::ptrdiff_t>(num_ended));
    } else if (ask_executor([&] { executor_->collect(); }, {&batch})) {
        sample_rows(batch);
        advance(nullptr);
        apply_rows(batch);
    }
}

// Whether the executor can draw all tokens of this step; sequences have their slots then.
bool Loop::executor_draws() {
    slots_.begin_step();
    return slots_.are_there() && std::all_of(chunks_.begin(), chunks_.end(), [this](const Chunk& chunk) {
               const RowRange rows = rows_of(*chunk.sequence, chunk.num_tokens);
               return rows.first_prompt == rows.end_prompt && (!rows.last_token || slots_.reserve(*chunk.sequence));
           });
}

void Loop::drop_ended() {
    std::erase_if(chunks_, [](const Chunk& chunk) { return chunk.sequence->ended; });
}

// False after an error, which ends the requests of these steps and only those.
template <typename Action>
bool Loop::ask_executor(const Action& action, std::initializer_list<const Batch*> batches) {
    const double started = monotonic_seconds();
    std::string error;
    bool succeeded = false;
    try {
        action();
        succeeded = true;
    } catch (const std::exception& exception) {
        error = exception.what();
    }
    counters_.executor_seconds += monotonic_seconds() - started;
    if (succeeded) return true;
    Outbox::Writer writer(outbox_);
    for (const Batch* batch : batches) {
        for (Sequence* sequence : batch->sequences()) {
            if (sequence->ended) continue;
            finish(writer, *sequence, FinishReason::kError, "the step that this request was part of failed: " + error);
        }
    }
    publish_stats();
    return false;
}

// next: launched since, whose sequences end too if this one has failed.
void Loop::collect_in_flight(const Batch* next) {
    if (in_flight_ == nullptr) return;
    const Batch& batch = *std::exchange(in_flight_, nullptr);
    const auto collect = [&] {
        executor_->collect();
        take_draws(batch);
    };
    const bool collected = next != nullptr ? ask_executor(collect, {&batch, next}) : ask_executor(collect, {&batch});
    if (collected) apply_rows(batch);
}

void Loop::settle_weights() {
    std::string told = executor_->settle_weights([this] { return settling_stopped_.load(); });
    const std::lock_guard lock(weights_mutex_);
    weights_in_ = std::move(told);
}

std::string Loop::weights_in() {
    const std::lock_guard lock(weights_mutex_);
    return weights_in_;
}

void Loop::finish_all(FinishReason reason, const std::string& error) {
    Outbox::Writer writer(outbox_);
    std::vector<int64_t> ids;
    for (const auto& [id, sequence] : sequences_) ids.push_back(id);
    std::sort(ids.begin(), ids.end());
    for (const int64_t id : ids) finish(writer, *sequences_.at(id), reason, error);
    publish_stats();
}

// A broken invariant is our own mistake: nothing that runs can be trusted, and nothing new is taken.
void Loop::break_down(std::string what) {
    counters_.internal_error = what;
    {
        const std::lock_guard lock(inbox_mutex_);
        if (failure_.empty()) failure_ = what;
    }
    Outbox::Writer writer(outbox_);
    for (auto& [id, sequence] : sequences_) {
        Output& output = writer.output(*sequence);
        output.finish_reason = FinishReason::kError;
        output.error = what;
        ++counters_.finished[static_cast<size_t>(FinishReason::kError)];
    }
    scheduler_.clear();
    in_flight_ = nullptr;
    ended_.clear();
    sequences_.clear();
    publish_stats();
}

// Before the outputs of a step can be fetched, so that whoever has them finds them counted.
void Loop::publish_stats() {
    counters_.num_running = static_cast<int64_t>(scheduler_.num_running());
    counters_.num_waiting = static_cast<int64_t>(scheduler_.num_waiting());
    counters_.num_preemptions = scheduler_.num_preemptions();
    counters_.groups.resize(blocks_.num_groups());
    for (size_t g = 0; g < blocks_.num_groups(); ++g) {
        const BlockPool& pool = blocks_.pool(g);
        counters_.groups[g] = {blocks_.name(g), pool.num_blocks(), pool.num_blocks() - pool.num_free(),
                               pool.num_cached()};
    }
    const std::lock_guard lock(stats_mutex_);
    stats_ = counters_;
}

LoopStats Loop::stats() {
    size_t num_queued = 0;
    {
        const std::lock_guard lock(inbox_mutex_);
        for (const Command& command : inbox_) num_queued += command.submitted != nullptr;
    }
    const std::lock_guard lock(stats_mutex_);
    LoopStats stats = stats_;
    stats.num_waiting += static_cast<int64_t>(num_queued);
    return stats;
}

}  // namespace enginery
