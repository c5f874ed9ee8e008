#include "scheduler.h"

#include <algorithm>

#include "errors.h"

namespace enginery {

RowRange rows_of(const Sequence& sequence, int32_t num_tokens) {
    const int32_t end = sequence.num_computed_tokens + num_tokens;
    RowRange rows{0, 0, end == sequence.num_known_tokens()};
    if (sequence.request.prompt_logprobs >= 0) {
        rows.first_prompt = std::max(sequence.num_computed_tokens, sequence.num_prompt_logprobs);
        rows.end_prompt = std::max(rows.first_prompt, std::min(end, sequence.num_prompt_tokens - 1));
    }
    return rows;
}

void Scheduler::remove(Sequence* sequence) {
    blocks_.free(*sequence);
    if (sequence->running) {
        running_.erase(std::find(running_.begin(), running_.end(), sequence));
        sequence->running = false;
    } else {
        const auto found = std::find(waiting_.begin(), waiting_.end(), sequence);
        if (found != waiting_.end()) waiting_.erase(found);
    }
}

// A long one raises the estimate at once, short ones lower it by an eighth each.
void Scheduler::learn_length(const Sequence& sequence) {
    if (!sequence.request.open_ended) return;
    int32_t& expected = settings_.expected_output_tokens;
    expected = std::max(sequence.num_generated_tokens(), expected - expected / 8);
}

void Scheduler::clear() {
    waiting_.clear();
    running_.clear();
    chunks_.clear();
}

const std::vector<Chunk>& Scheduler::schedule() {
    ++step_;
    preempted_ = false;
    fill_step();
    // Everyone who runs may hold blocks and lack one more: then one of them gives way, until the oldest can go on.
    // But for those whose last token is on its way, and who will hold none soon.
    const auto is_drawing = [](const Sequence* sequence) { return sequence->drawn_row >= 0; };
    while (chunks_.empty() && !running_.empty() && std::none_of(running_.begin(), running_.end(), is_drawing)) {
        preempt_any();
        fill_step();
    }
    return chunks_;
}

void Scheduler::fill_step() {
    chunks_.clear();
    tokens_left_ = settings_.max_num_batched_tokens;
    rows_left_ = settings_.max_rows;

    const auto can_join = static_cast<int32_t>(running_.size()) < settings_.max_num_seqs;
    const bool prefill_waits =
        (can_join && !waiting_.empty()) ||
        std::any_of(running_.begin(), running_.end(), [](const Sequence* s) { return s->num_pending_tokens() > 1; });
    if (prefill_waits) {
        schedule_decodes(std::max(1, tokens_left_ - std::max(1, tokens_left_ / 4)), std::max(1, rows_left_ - 1));
    } else {
        schedule_decodes(tokens_left_, rows_left_);
    }

    prefill_left_ = tokens_left_;
    if (!chunks_.empty() && tokens_left_ > 0) {
        int64_t most = tokens_left_;
        if (settings_.mixed_prompt_tokens > 0) {
            const auto num_decodes = static_cast<int64_t>(chunks_.size());
            most = std::min(most, std::max<int64_t>(settings_.mixed_prompt_tokens, 2 * num_decodes));
        }
        const int64_t pending = pending_prefill_tokens(8 * most);
        const int64_t num_steps = std::max<int64_t>(1, (pending + most - 1) / most);
        prefill_left_ = static_cast<int32_t>(std::min(most, (pending + num_steps - 1) / num_steps));
    }
    schedule_prefills();
    admit_waiting();
    if (prefill_waits) schedule_decodes(tokens_left_, rows_left_);  // what the prompts could not use
}

// If not all fit they take turns, by arrival and round again.
void Scheduler::schedule_decodes(int32_t token_limit, int32_t row_limit) {
    const auto by_arrival = [](const Sequence* a, const Sequence* b) { return a->id < b->id; };
    decodes_.clear();
    for (Sequence* sequence : running_) {
        if (sequence->num_pending_tokens() == 1 && !is_scheduled(*sequence)) decodes_.push_back(sequence);
    }
    const auto limit = static_cast<size_t>(std::min(token_limit, row_limit));
    if (decodes_.size() > limit) {
        const auto turn = std::find_if(decodes_.begin(), decodes_.end(),
                                       [this](const Sequence* sequence) { return sequence->id >= next_turn_; });
        std::rotate(decodes_.begin(), turn, decodes_.end());
        next_turn_ = decodes_[limit]->id;
        decodes_.resize(limit);
        std::sort(decodes_.begin(), decodes_.end(), by_arrival);
    }
    for (Sequence* sequence : decodes_) {
        if (sequence->running) schedule_chunk(sequence, 1);  // an older one may have preempted it
    }
}

void Scheduler::schedule_prefills() {
    for (size_t i = 0; i < running_.size() && prefill_left_ > 0; ++i) {
        Sequence* sequence = running_[i];
        if (sequence->num_pending_tokens() <= 1) continue;
        const size_t before = chunks_.size();
        schedule_chunk(sequence, prefill_left_);
        if (chunks_.size() > before) prefill_left_ -= chunks_.back().num_tokens;
    }
}

void Scheduler::admit_waiting() {
    while (!waiting_.empty() && prefill_left_ > 0 && rows_left_ > 0 && !preempted_ &&
           static_cast<int32_t>(running_.size()) < settings_.max_num_seqs) {
        Sequence* sequence = waiting_.front();
        // Prompt logprobs need the logits of every position, so nothing is taken from the cache.
        const int32_t num_cached = sequence->request.prompt_logprobs >= 0 ? 0 : blocks_.find_prefix(*sequence);
        if (!can_admit(*sequence, num_cached)) return;
        waiting_.pop_front();
        blocks_.share_prefix(*sequence, num_cached);
        running_.insert(std::upper_bound(running_.begin(), running_.end(), sequence,
                                         [](const Sequence* a, const Sequence* b) { return a->id < b->id; }),
                        sequence);
        sequence->running = true;
        if (sequence->num_preemptions == 0)
            sequence->num_cached_tokens = std::min(num_cached, sequence->num_prompt_tokens);
        if (!schedule_chunk(sequence, prefill_left_)) return;
        prefill_left_ -= chunks_.back().num_tokens;
    }
}

// Tokens whose state a running sequence is promised room for.
int32_t Scheduler::planned_length(const Sequence& sequence) const {
    const int32_t longest = sequence.max_length - 1;  // the last token's state is never needed
    const int32_t next = std::min(longest, sequence.num_known_tokens() + 1);
    if (settings_.policy == CapacityPolicy::kMaxUtilization) return next;
    if (!sequence.request.open_ended) return longest;
    return std::max(next, std::min(longest, sequence.num_prompt_tokens + settings_.expected_output_tokens));
}

bool Scheduler::can_admit(Sequence& candidate, int32_t num_cached_tokens) {
    lengths_.clear();
    for (const Sequence* sequence : running_) lengths_.push_back(planned_length(*sequence));
    return blocks_.can_admit(running_, lengths_, candidate, planned_length(candidate), num_cached_tokens,
                             settings_.max_num_batched_tokens);
}

// Prompt tokens that wait, counted up to `enough`.
int64_t Scheduler::pending_prefill_tokens(int64_t enough) const {
    int64_t pending = 0;
    for (const Sequence* sequence : running_) {
        if (sequence->num_pending_tokens() > 1) pending += sequence->num_pending_tokens();
    }
    for (const Sequence* sequence : waiting_) {
        if (pending >= enough) break;
        pending += sequence->num_pending_tokens();
    }
    return pending;
}

// Puts up to max_tokens of a running sequence into the step, as rows and blocks allow; false if not one.
bool Scheduler::schedule_chunk(Sequence* sequence, int32_t max_tokens) {
    int32_t num_tokens = std::min(max_tokens, sequence->num_pending_tokens());
    while (num_tokens > 0 && rows_of(*sequence, num_tokens).count() > rows_left_) {
        num_tokens -= rows_of(*sequence, num_tokens).count() - rows_left_;
    }
    if (num_tokens <= 0) return false;
    while (blocks_.allocatable_tokens(*sequence) < 1) {
        if (!preempt_younger(*sequence)) return false;
    }
    num_tokens = std::min(num_tokens, blocks_.allocatable_tokens(*sequence));
    blocks_.allocate(*sequence, num_tokens);
    chunks_.push_back({sequence, num_tokens});
    tokens_left_ -= num_tokens;
    rows_left_ -= rows_of(*sequence, num_tokens).count();
    sequence->last_scheduled_step = step_;
    return true;
}

// The youngest that came after `sequence`, is not yet in this step and has not given way too often.
bool Scheduler::preempt_younger(const Sequence& sequence) {
    for (size_t i = running_.size(); i-- > 0 && running_[i]->id > sequence.id;) {
        if (is_scheduled(*running_[i]) || running_[i]->num_preemptions >= settings_.max_preemptions) continue;
        preempt(i);
        return true;
    }
    return false;
}

// No step can be made as it is: anybody but the oldest gives way, if possible one that has not too often.
void Scheduler::preempt_any() {
    if (running_.size() < 2) throw EngineryError("internal error: a sequence that runs alone cannot go on");
    size_t victim = running_.size() - 1;
    for (size_t i = running_.size() - 1; i > 0; --i) {
        if (running_[i]->num_preemptions >= settings_.max_preemptions) continue;
        victim = i;
        break;
    }
    preempt(victim);
}

void Scheduler::preempt(size_t index) {
    if (settings_.policy == CapacityPolicy::kGuaranteedNoEvict &&
        std::none_of(running_.begin(), running_.end(), [](const Sequence* s) { return s->request.open_ended; })) {
        throw EngineryError("internal error: a sequence that was admitted to run to its end lacks a block");
    }
    Sequence* sequence = running_[index];
    blocks_.free(*sequence);
    running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(index));
    sequence->running = false;
    ++sequence->num_preemptions;
    ++num_preemptions_;
    preempted_ = true;
    waiting_.insert(std::upper_bound(waiting_.begin(), waiting_.end(), sequence,
                                     [](const Sequence* a, const Sequence* b) { return a->id < b->id; }),
                    sequence);
}

}  // namespace enginery
