#include "loop.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "errors.h"

namespace enginery {
namespace {

// Below so many logits a step's rows are sampled where the loop runs: waking threads would take longer.
constexpr int64_t kParallelLogits = 1 << 16;

double monotonic_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

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
    settings.max_rows = spec.max_rows;
    settings.expected_output_tokens = config.expected_output_tokens;
    settings.max_preemptions = config.max_preemptions;
    return settings;
}

}  // namespace

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
    batch.build(chunks_, blocks_.block_size(), draws ? &slots_ : nullptr);
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

void Loop::sample_rows(const Batch& batch) {
    const size_t num_rows = batch.tasks().size();
    if (results_.size() < num_rows) results_.resize(num_rows);
    const auto sample_one = [&](int32_t index) {
        sample_row(batch.tasks()[static_cast<size_t>(index)], results_[static_cast<size_t>(index)]);
    };
    if (num_rows > 1 && static_cast<int64_t>(num_rows) * vocab_size_ >= kParallelLogits) {
        executor_->parallel_for(static_cast<int32_t>(num_rows), sample_one);
    } else {
        for (size_t index = 0; index < num_rows; ++index) sample_one(static_cast<int32_t>(index));
    }
}

void Loop::sample_row(const SampleTask& task, SampleResult& result) {
    thread_local SamplerScratch scratch;
    const Sequence& sequence = *task.sequence;
    const float* logits = executor_->logits(task.row);
    if (task.prompt_token_id >= 0) {
        take_logprobs(logits, vocab_size_, task.prompt_token_id, sequence.request.prompt_logprobs, scratch, result);
    } else {
        const SampleInputs inputs{sequence.request, sequence.token_counts, sequence.seed,
                                  sequence.num_generated_tokens()};
        sample(logits, vocab_size_, inputs, scratch, result);
    }
}

// As the sampler would have left them. A device is not believed: tokens are indices into the host's memory.
void Loop::take_draws(const Batch& batch) {
    const auto check = [this](int32_t token, int32_t least) {
        if (token >= least && token < vocab_size_) return;
        throw EngineryError("token " + std::to_string(token) + " was drawn of a vocabulary of " +
                            std::to_string(vocab_size_) + ": the engine is damaged; build it again");
    };
    const size_t num_rows = batch.tasks().size();
    if (results_.size() < num_rows) results_.resize(num_rows);
    for (size_t index = 0; index < num_rows; ++index) {
        const SampleTask& task = batch.tasks()[index];
        const DrawnRow row = executor_->drawn(task.row);
        SampleResult& result = results_[index];
        check(row.token, -2);
        result.token_id = row.token;
        result.fault = row.token >= 0    ? SampleResult::Fault::kNone
                       : row.token == -1 ? SampleResult::Fault::kNonFinite
                                         : SampleResult::Fault::kNothingAllowed;
        result.logprobs.clear();
        const int32_t num_logprobs = std::min(task.sequence->request.logprobs, vocab_size_);
        if (num_logprobs < 0 || row.token < 0) continue;
        result.logprobs.push_back({row.token, row.logprob, row.rank});
        for (int32_t place = 0; place < num_logprobs; ++place) {
            check(row.top_tokens[place], 0);
            result.logprobs.push_back({row.top_tokens[place], row.top_logprobs[place], place + 1});
        }
    }
}

// The state of the step's tokens is in the blocks, or will be before any later step. drawing: the step, if its executor
// draws tokens, which sequences end in from now on.
void Loop::advance(const Batch* drawing) {
    for (const Chunk& chunk : chunks_) {
        Sequence& sequence = *chunk.sequence;
        if (sequence.first_scheduled_time == 0) {
            sequence.first_scheduled_time = step_time_;
            counters_.prompt_tokens += sequence.num_prompt_tokens;
            if (config_.enable_prefix_caching) counters_.prefix_cache_queries += sequence.num_prompt_tokens;
            counters_.prefix_cache_hits += sequence.num_cached_tokens;
        }
        sequence.num_computed_tokens += chunk.num_tokens;
        blocks_.advance(sequence);
    }
    if (drawing == nullptr) return;
    for (const SampleTask& task : drawing->tasks()) {
        if (task.sequence->ended) continue;
        task.sequence->drawn_row = task.row;
        task.sequence->token_ids.push_back(-1);
    }
}

void Loop::apply_rows(const Batch& batch) {
    Outbox::Writer writer(outbox_);
    for (size_t index = 0; index < batch.tasks().size(); ++index) {
        const SampleTask& task = batch.tasks()[index];
        if (!task.sequence->ended) apply_row(writer, task, results_[index]);
    }
    publish_stats();
}

void Loop::apply_row(Outbox::Writer& writer, const SampleTask& task, SampleResult& result) {
    Sequence& sequence = *task.sequence;
    if (result.fault == SampleResult::Fault::kNonFinite) {
        const int32_t num_tokens = task.prompt_token_id >= 0 ? sequence.num_prompt_logprobs + 1
                                   : sequence.drawn_row >= 0 ? sequence.num_known_tokens() - 1
                                                             : sequence.num_known_tokens();
        finish(
            writer, sequence, FinishReason::kError,
            "the model's logits after " + std::to_string(num_tokens) +
                " tokens are not finite (infinite or not a number); check the engine with `enginery verify`, or build "
                "it with a higher precision");
        return;
    }
    if (result.fault == SampleResult::Fault::kNothingAllowed) {
        finish(writer, sequence, FinishReason::kError,
               "no token is allowed: every token of the vocabulary is a stop token and min_tokens is not reached");
        return;
    }
    if (task.prompt_token_id >= 0) {
        sequence.prompt_logprobs.push_back(result.logprobs);
        ++sequence.num_prompt_logprobs;
        return;
    }
    append_token(writer, sequence, result);
    const auto& stops = sequence.request.stop_token_ids;
    if (std::find(stops.begin(), stops.end(), result.token_id) != stops.end()) {
        writer.output(sequence).stop_token_id = result.token_id;
        finish(writer, sequence, FinishReason::kStop);
        return;
    }
    if (sequence.num_known_tokens() >= sequence.max_length) {
        finish(writer, sequence, FinishReason::kLength);
        return;
    }
}

void Loop::append_token(Outbox::Writer& writer, Sequence& sequence, SampleResult& result) {
    Output& output = writer.output(sequence);
    if (sequence.first_token_time == 0) {
        sequence.first_token_time = monotonic_seconds();
        output.has_prompt_logprobs = sequence.request.prompt_logprobs >= 0;
        output.prompt_logprobs = std::move(sequence.prompt_logprobs);
    }
    if (sequence.drawn_row < 0) {
        sequence.token_ids.push_back(result.token_id);
        EditSlots::invalidate(sequence);
    } else {
        sequence.token_ids.back() = result.token_id;
        sequence.drawn_row = -1;
    }
    if (sequence.request.has_penalties()) ++sequence.token_counts[result.token_id];
    ++counters_.generation_tokens;

    output.token_ids.push_back(result.token_id);
    output.has_logprobs = sequence.request.logprobs >= 0;
    if (output.has_logprobs) output.logprobs.push_back(result.logprobs);
    output.num_cached_tokens = sequence.num_cached_tokens;
    output.arrival_time = sequence.arrival_time;
    output.first_scheduled_time = sequence.first_scheduled_time;
    output.first_token_time = sequence.first_token_time;
}

void Loop::finish(Outbox::Writer& writer, Sequence& sequence, FinishReason reason, const std::string& error) {
    Output& output = writer.output(sequence);
    output.finish_reason = reason;
    output.error = error;
    output.has_logprobs = sequence.request.logprobs >= 0;
    output.num_cached_tokens = sequence.num_cached_tokens;
    output.arrival_time = sequence.arrival_time;
    output.first_scheduled_time = sequence.first_scheduled_time;
    output.first_token_time = sequence.first_token_time;
    ++counters_.finished[static_cast<size_t>(reason)];
    if (reason == FinishReason::kError) blocks_.forget(sequence);
    if (reason == FinishReason::kStop || reason == FinishReason::kLength) scheduler_.learn_length(sequence);
    scheduler_.remove(&sequence);
    slots_.release(sequence);
    sequence.ended = true;
    ended_.push_back(std::move(sequences_.extract(sequence.id).mapped()));
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
