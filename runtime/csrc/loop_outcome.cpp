// What becomes of a step: its rows become tokens, tokens are put out, and requests end.
#include <algorithm>

#include "errors.h"
#include "loop.h"

namespace enginery {
namespace {

// Below so many logits a step's rows are sampled where the loop runs: waking threads would take longer.
constexpr int64_t kParallelLogits = 1 << 16;

}  // namespace

void Loop::sample_rows(const Batch& batch) {
    const size_t num_rows = batch.tasks().size();
    if (results_.size() < num_rows) results_.resize(num_rows);
    const auto num_kept = [&](const SampleTask& task) {
        return batch.step().keep == nullptr ? 0 : batch.step().keep[task.row];
    };
    const auto sample_one = [&](int32_t index) {
        const SampleTask& task = batch.tasks()[static_cast<size_t>(index)];
        sample_row(task, num_kept(task), results_[static_cast<size_t>(index)]);
    };
    int64_t num_logits = 0;
    for (const SampleTask& task : batch.tasks()) num_logits += num_kept(task) > 0 ? num_kept(task) : vocab_size_;
    if (num_rows > 1 && num_logits >= kParallelLogits) {
        executor_->parallel_for(static_cast<int32_t>(num_rows), sample_one);
    } else {
        for (size_t index = 0; index < num_rows; ++index) sample_one(static_cast<int32_t>(index));
    }
}

// num_kept: of the row's logits; 0: all are there.
void Loop::sample_row(const SampleTask& task, int32_t num_kept, SampleResult& result) {
    thread_local SamplerScratch scratch;
    const Sequence& sequence = *task.sequence;
    const SampleInputs inputs{sequence.request, sequence.token_counts, sequence.seed, sequence.num_generated_tokens()};
    if (num_kept > 0) {
        if (!executor_->kept(task.row, num_kept, scratch.largest)) scratch.largest.clear();
        sample_largest(scratch.largest, inputs, scratch, result);
        return;
    }
    const float* logits = executor_->logits(task.row);
    if (task.prompt_token_id >= 0) {
        take_logprobs(logits, vocab_size_, task.prompt_token_id, sequence.request.prompt_logprobs, scratch, result);
    } else {
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

}  // namespace enginery
