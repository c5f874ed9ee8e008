// Which tokens of which sequences make the next step, and who holds blocks for them.
//
// Decode tokens come first, one of each sequence, then chunks of prompts in order of arrival. While a prompt waits,
// decode leaves it a quarter of the step; while decode runs, prompts are cut into chunks of like size, and of no more
// than mixed_prompt_tokens, so that the streams that run see steady steps. Admission is first come, first served, and
// nobody overtakes, so nobody starves.
//
// A request is expected to take its max_tokens; one that is open-ended, as many as others like it took lately. If that
// is exceeded and blocks run out, the youngest gives way, under either policy.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "block_manager.h"
#include "request.h"

namespace enginery {

enum class CapacityPolicy : uint8_t {
    kGuaranteedNoEvict,  // admits what can run to its expected end beside all that run
    kMaxUtilization,     // admits while blocks last; the youngest gives way and is computed again later
};

struct SchedulerSettings {
    int32_t max_num_seqs = 0;
    int32_t max_num_batched_tokens = 0;
    // Prompt tokens of a step in which sequences decode, or twice as many as decode; 0: all that the step has room for.
    int32_t mixed_prompt_tokens = 0;
    int32_t max_rows = 0;
    CapacityPolicy policy = CapacityPolicy::kGuaranteedNoEvict;
    int32_t expected_output_tokens = 256;  // of an open-ended request; learned from then on
    int32_t max_preemptions = 8;           // of one request; then it gives way only when nothing else could run
};

// The next num_tokens tokens of a sequence.
struct Chunk {
    Sequence* sequence;
    int32_t num_tokens;
};

// Rows (tokens whose logits are wanted) of the next num_tokens tokens of a sequence: prompt positions whose logprobs
// are still owed, and the last known token.
struct RowRange {
    int32_t first_prompt;  // positions first_prompt .. end_prompt - 1
    int32_t end_prompt;
    bool last_token;

    int32_t count() const { return end_prompt - first_prompt + (last_token ? 1 : 0); }
};
RowRange rows_of(const Sequence& sequence, int32_t num_tokens);

class Scheduler {
  public:
    Scheduler(const SchedulerSettings& settings, BlockManager& blocks) : settings_(settings), blocks_(blocks) {}

    // Queues a sequence, which must outlive its stay and fit when alone.
    void add(Sequence* sequence) { waiting_.push_back(sequence); }

    // Takes a sequence out, whatever its state, and frees its blocks.
    void remove(Sequence* sequence);

    // Learns from a sequence that came to its end how long open-ended ones become.
    void learn_length(const Sequence& sequence);

    // Forgets everything, blocks included: after a broken invariant.
    void clear();

    // The next step, blocks allocated; valid until the next call. Empty only when there is nothing to do before the
    // step in flight has ended.
    const std::vector<Chunk>& schedule();

    size_t num_running() const { return running_.size(); }
    size_t num_waiting() const { return waiting_.size(); }
    int64_t num_preemptions() const { return num_preemptions_; }

  private:
    void fill_step();
    void schedule_decodes(int32_t token_limit, int32_t row_limit);
    void schedule_prefills();
    void admit_waiting();
    bool can_admit(Sequence& candidate, int32_t num_cached_tokens);
    int32_t planned_length(const Sequence& sequence) const;
    int64_t pending_prefill_tokens(int64_t enough) const;
    bool schedule_chunk(Sequence* sequence, int32_t max_tokens);
    bool is_scheduled(const Sequence& sequence) const { return sequence.last_scheduled_step == step_; }
    bool preempt_younger(const Sequence& sequence);
    void preempt(size_t index);
    void preempt_any();

    SchedulerSettings settings_;
    BlockManager& blocks_;
    std::deque<Sequence*> waiting_;
    std::vector<Sequence*> running_;  // by arrival
    std::vector<Chunk> chunks_;
    std::vector<Sequence*> decodes_;  // scratch
    std::vector<int32_t> lengths_;    // scratch
    int32_t tokens_left_ = 0;
    int32_t rows_left_ = 0;
    int32_t prefill_left_ = 0;  // prompt tokens that this step still takes
    bool preempted_ = false;    // in this step
    int64_t next_turn_ = 0;     // id of the decode that comes first when not all fit
    int64_t step_ = 0;
    int64_t num_preemptions_ = 0;
};

}  // namespace enginery
