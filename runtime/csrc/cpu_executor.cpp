#include "cpu_executor.h"

#include <algorithm>
#include <cmath>

#include "call_reader.h"
#include "cpu_features.h"
#include "errors.h"
#include "memory_nodes.h"
#include "poison.h"

namespace enginery {

namespace {

constexpr int64_t kAlignment = 64;

[[noreturn]] void refuse(const std::string& what) {
    throw EngineFormatError(what + ". The engine is damaged or was not made for this runtime: build it again.");
}

// Whether offset .. offset + bytes lies within 0 .. size, for any three numbers.
bool lies_within(int64_t offset, int64_t bytes, int64_t size) {
    return offset >= 0 && bytes >= 0 && size >= 0 && bytes <= size && offset <= size - bytes;
}

// Threads for each rank: as even as can be, at least one.
std::vector<int32_t> deal_threads(int32_t num_threads, int32_t num_ranks) {
    std::vector<int32_t> threads;
    for (int32_t rank = 0; rank < num_ranks; ++rank) {
        const int32_t end = num_threads * (rank + 1) / num_ranks, begin = num_threads * rank / num_ranks;
        threads.push_back(std::max(1, end - begin));
    }
    return threads;
}

int32_t pool_size(const ExecutorSpec& spec) {
    const auto wanted = spec.num_threads > 0 ? spec.num_threads : static_cast<int32_t>(available_cpus().size());
    return std::max(wanted, static_cast<int32_t>(spec.ranks.size()));
}

bool is_collective(const CallSpec& call) { return call.op == "all_reduce" || call.op == "all_gather"; }

// Ranks read each other's buffers in collectives, and wait for each other: all must make the same ones.
void check_collectives(const ExecutorSpec& spec) {
    const auto same_guard = [](const GuardRange& a, const GuardRange& b) {
        return a.variable == b.variable && a.min == b.min && a.max == b.max;
    };
    std::vector<const CallSpec*> first;
    for (size_t rank = 0; rank < spec.ranks.size(); ++rank) {
        std::vector<const CallSpec*> own;
        for (const CallSpec& call : spec.ranks[rank].forward) {
            if (is_collective(call)) own.push_back(&call);
        }
        if (rank == 0) first = own;
        const bool same = std::equal(own.begin(), own.end(), first.begin(), first.end(), [&](auto* a, auto* b) {
            return a->op == b->op && a->attributes == b->attributes && a->max_tokens == b->max_tokens &&
                   a->max_rows == b->max_rows &&
                   std::equal(a->guard.begin(), a->guard.end(), b->guard.begin(), b->guard.end(), same_guard);
        });
        if (!same) refuse("The plans of rank 0 and rank " + std::to_string(rank) + " differ in their collectives");
    }
}

const KernelEntry& find_kernel(KernelTable kernels, const CallSpec& call) {
    std::string versions;
    for (const KernelEntry& entry : kernels) {
        if (call.op != entry.op) continue;
        if (call.version == entry.version) return entry;
        versions += (versions.empty() ? "" : ", ") + std::to_string(entry.version);
    }
    if (versions.empty()) refuse("This runtime has no CPU operator '" + call.op.substr(0, 100) + "'");
    refuse("This runtime has operator " + call.op + " in version " + versions + ", not " +
           std::to_string(call.version));
}

bool holds(const std::vector<GuardRange>& guard, const Step& step) {
    return std::all_of(guard.begin(), guard.end(), [&](const GuardRange& range) {
        const int64_t value = range.variable == "tokens" ? step.num_tokens
                              : range.variable == "rows" ? step.num_rows
                                                         : step.num_sequences;
        return range.min <= value && value <= range.max;
    });
}

// Operands are checked for max_tokens and so on: no larger step may reach the call.
void check_guard(const CallSpec& call, const ExecutorSpec& spec) {
    int64_t tokens = spec.max_tokens, rows = spec.max_rows;
    for (const GuardRange& range : call.guard) {
        if (range.variable == "tokens") tokens = std::min(tokens, range.max);
        if (range.variable == "rows") rows = std::min(rows, range.max);
        if (range.variable != "tokens" && range.variable != "rows" && range.variable != "sequences") {
            refuse("Operator " + call.op + ": a guard on '" + range.variable.substr(0, 100) +
                   "', which is no variable");
        }
    }
    if (call.max_tokens < tokens || call.max_rows < rows) {
        refuse("Operator " + call.op + ": planned for " + std::to_string(call.max_tokens) + " tokens and " +
               std::to_string(call.max_rows) + " rows, but steps of " + std::to_string(tokens) + " and " +
               std::to_string(rows) + " may reach it");
    }
}

}  // namespace

CpuExecutor::CpuExecutor(const ExecutorSpec& spec) : spec_(spec), pool_(pool_size(spec)) {
    const KernelTable kernels = find_best_kernels(spec_.isa);
    if (spec_.ranks.empty() || spec_.num_blocks.size() != spec_.groups.size()) {
        refuse("A plan without ranks, or state groups without blocks");
    }
    check_logits();
    const std::vector<int32_t> threads = deal_threads(pool_.num_threads(), static_cast<int32_t>(spec_.ranks.size()));
    collectives_ = std::make_unique<Collectives>(threads, should_spin(pool_.num_threads()));
    check_collectives(spec_);
    ranks_.resize(spec_.ranks.size());
    int32_t first_thread = 0;
    for (size_t index = 0; index < ranks_.size(); ++index) {
        Rank& rank = ranks_[index];
        rank.first_thread = first_thread;
        rank.num_threads = threads[index];
        first_thread += threads[index];
        rank.barrier = std::make_unique<Barrier>(rank.num_threads, should_spin(pool_.num_threads()),
                                                 "Rank " + std::to_string(index));
        map_rank(rank, index);
        place_rank(rank);
        bind_rank(rank, index, kernels);
        divide_shared_scratch(rank);
    }
    keeps_ = can_keep();
}

void CpuExecutor::check_logits() const {
    const RankSpec& first = spec_.ranks.front();
    const auto logits = static_cast<size_t>(first.logits_buffer);
    if (first.logits_buffer < 0 || logits >= first.buffers.size() || first.buffers[logits].per_thread ||
        first.logits_stride < spec_.vocab_size || first.logits_stride > kLargestColumns || spec_.max_rows < 0 ||
        first.buffers[logits].bytes < int64_t{spec_.max_rows} * first.logits_stride * 4) {
        refuse("The logits of " + std::to_string(spec_.max_rows) + " rows do not fit their buffer");
    }
}

// Whether whatever touches the logits keeps the largest where a step wants no more.
bool CpuExecutor::can_keep() const {
    const RankSpec& spec = spec_.ranks.front();
    bool keeps = false;
    for (size_t number = 0; number < spec.forward.size(); ++number) {
        const auto& operands = spec.forward[number].operands;
        const auto touches_logits = [&](const auto& named) {
            return named.second.kind == OperandKind::kBuffer && named.second.index == spec.logits_buffer;
        };
        if (std::none_of(operands.begin(), operands.end(), touches_logits)) continue;
        if (!ranks_.front().calls[number].kernel->keeps_largest()) return false;
        keeps = true;
    }
    return keeps;
}

void CpuExecutor::map_rank(Rank& rank, size_t index) const {
    const RankSpec& spec = spec_.ranks[index];
    rank.weights = Mapping::of_file(spec.weights_path, spec.weights_file_bytes);
    for (const WeightSpec& weight : spec.weights) {
        if (!lies_within(weight.offset, weight.bytes, rank.weights.bytes()) || weight.offset % kAlignment != 0) {
            refuse(spec.weights_path + ": tensor '" + weight.name + "' lies outside of the file or not on 64 bytes");
        }
    }
    rank.arena = Mapping::of_zeros(spec.arena_bytes, "activations");
    for (const BufferSpec& buffer : spec.buffers) {
        if (buffer.per_thread) {
            if (!lies_within(rank.thread_buffer_bytes, buffer.bytes, INT32_MAX)) refuse("A per-thread buffer of 2 GiB");
            rank.buffer_offsets.push_back(rank.thread_buffer_bytes);
            rank.thread_buffer_bytes += round_up(buffer.bytes, kAlignment);
        } else {
            if (!lies_within(buffer.offset, buffer.bytes, spec.arena_bytes)) {
                refuse("Buffer '" + buffer.name + "' lies outside of the arena");
            }
            rank.buffer_offsets.push_back(buffer.offset);
        }
    }
    rank.thread_buffers = Mapping::of_zeros(rank.thread_buffer_bytes * rank.num_threads, "activations");
    rank.scratch = Mapping::of_zeros(kThreadScratchBytes * rank.num_threads + kSharedScratchBytes, "scratch");
    for (size_t group = 0; group < spec_.groups.size(); ++group) {
        const int64_t block_bytes = spec_.groups[group].block_bytes, blocks = spec_.num_blocks[group];
        if (block_bytes < 1 || block_bytes > (int64_t{1} << 40) || blocks < 0) {
            refuse("State group '" + spec_.groups[group].name + "' has blocks of " + std::to_string(block_bytes) +
                   " bytes");
        }
        if (blocks > INT64_MAX / 2 / block_bytes) throw CapacityError("No memory for the state of sequences.");
        rank.state.push_back(Mapping::of_zeros(block_bytes * blocks, "the state of sequences"));
    }
}

// Puts what the rank writes where its threads are; but what one thread alone does lies where that touches it first. Its
// weights' file lies where it was read; a copy does as the rest.
void CpuExecutor::place_rank(Rank& rank) const {
    rank.cpus = available_cpus();
    if (should_spin(pool_.num_threads())) {
        const auto first = rank.cpus.begin() + rank.first_thread;
        rank.cpus = std::vector<int>(first, first + rank.num_threads);
    }
    const std::vector<int> nodes = nodes_of_cpus(rank.cpus);
    place_on_nodes(rank.arena.data(), rank.arena.bytes(), nodes);
    for (const Mapping& state : rank.state) place_on_nodes(state.data(), state.bytes(), nodes);
    if (nodes.size() > 1) return;
    place_on_nodes(rank.thread_buffers.data(), rank.thread_buffers.bytes(), nodes);
    place_on_nodes(rank.scratch.data(), rank.scratch.bytes(), nodes);
}

BoundOperand CpuExecutor::bind_operand(const Rank& rank, size_t index, const OperandSpec& operand) const {
    const RankSpec& spec = spec_.ranks[index];
    const auto number = static_cast<size_t>(operand.index);
    const auto within = [&](size_t count, const char* kind) {
        if (operand.index < 0 || number >= count) {
            refuse("Operand '" + operand.name + "': there is no " + kind + " " + std::to_string(operand.index));
        }
    };
    const auto check_extent = [&](int64_t size) {
        if (!lies_within(operand.offset, operand.bytes, size)) {
            refuse("Operand '" + operand.name + "': " + std::to_string(operand.bytes) + " bytes from " +
                   std::to_string(operand.offset) + " on reach beyond " + std::to_string(size));
        }
    };
    switch (operand.kind) {
        case OperandKind::kBuffer: {
            within(spec.buffers.size(), "buffer");
            const BufferSpec& buffer = spec.buffers[number];
            check_extent(buffer.bytes);
            const int64_t offset = rank.buffer_offsets[number] + operand.offset;
            if (buffer.per_thread) return {rank.thread_buffers.data() + offset, rank.thread_buffer_bytes};
            return {rank.arena.data() + offset, 0};
        }
        case OperandKind::kWeight: {
            within(spec.weights.size(), "weight");
            check_extent(spec.weights[number].bytes);
            return {rank.weights.data() + spec.weights[number].offset + operand.offset, 0};
        }
        case OperandKind::kState:
            within(spec_.groups.size(), "state group");
            return {rank.state[number].data(), 0};
        case OperandKind::kPeers:
        case OperandKind::kInput:
            break;
    }
    return {};
}

void CpuExecutor::bind_rank(Rank& rank, size_t index, KernelTable kernels) const {
    int32_t last_region = INT32_MIN;
    for (const CallSpec& call : spec_.ranks[index].forward) {
        if (call.region < last_region)
            refuse("Operator " + call.op + ": its region comes before that of the call before");
        last_region = call.region;
        check_guard(call, spec_);
        Binding binding;
        binding.groups = spec_.groups;
        binding.num_blocks = spec_.num_blocks;
        binding.rank = static_cast<int32_t>(index);
        binding.world_size = static_cast<int32_t>(ranks_.size());
        binding.num_threads = rank.num_threads;
        binding.collectives = collectives_.get();
        if (index == 0 && spec_.max_rows <= kMostKeptRows) {
            binding.logits = rank.arena.data() + rank.buffer_offsets[static_cast<size_t>(spec_.ranks[0].logits_buffer)];
            binding.vocab_size = spec_.vocab_size;
        }
        for (const auto& [name, operand] : call.operands) binding.operands[name] = bind_operand(rank, index, operand);
        BoundCall bound;
        bound.kernel = find_kernel(kernels, call).make(call, binding);
        bound.guard = call.guard;
        bound.region = call.region;
        bound.counter = std::make_unique<std::atomic<int64_t>>(0);
        rank.calls.push_back(std::move(bound));
    }
}

// Calls of one region may run at the same time, so each has a part of its own.
void CpuExecutor::divide_shared_scratch(Rank& rank) const {
    std::byte* shared = rank.scratch.data() + kThreadScratchBytes * rank.num_threads;
    const int64_t bytes = kSharedScratchBytes;
    for (auto begin = rank.calls.begin(); begin != rank.calls.end();) {
        const auto end =
            std::find_if(begin, rank.calls.end(), [&](auto& call) { return call.region != begin->region; });
        const int64_t parts =
            std::count_if(begin, end, [](const BoundCall& call) { return call.kernel->wants_shared_scratch(); });
        int64_t part = 0;
        for (; begin != end; ++begin) {
            if (!begin->kernel->wants_shared_scratch()) continue;
            begin->shared_scratch_bytes = bytes / parts / kAlignment * kAlignment;
            begin->shared_scratch = shared + part++ * begin->shared_scratch_bytes;
        }
    }
}

void CpuExecutor::launch(const Step& step) {
    if (failure_) throw EngineryError("An earlier step failed and left the ranks apart: restart the server.");
    if (step.num_tokens > spec_.max_tokens || step.num_rows > spec_.max_rows ||
        step.num_sequences > spec_.max_sequences) {
        throw EngineryError("A step of " + std::to_string(step.num_tokens) + " tokens is larger than planned.");
    }
    for (Rank& rank : ranks_) {
        for (BoundCall& call : rank.calls) call.counter->store(0, std::memory_order_relaxed);
    }
    if constexpr (kPoisons) poison(step);
    pool_.run([&](int32_t thread) { run_thread(step, thread); });
    if (failure_) std::rethrow_exception(failure_);
}

void CpuExecutor::run_thread(const Step& step, int32_t thread) {
    const auto of_thread = [&](const Rank& rank) { return thread < rank.first_thread + rank.num_threads; };
    const Rank& rank = *std::find_if(ranks_.begin(), ranks_.end(), of_thread);
    try {
        run_calls(step, rank, thread - rank.first_thread);
    } catch (...) {
        fail(std::current_exception());
    }
}

// Keeps what failed first, and lets nobody wait for the thread that did.
void CpuExecutor::fail(std::exception_ptr failure) {
    {
        const std::lock_guard lock(failure_mutex_);
        if (!failure_) failure_ = std::move(failure);
    }
    for (const Rank& rank : ranks_) rank.barrier->fail();
    collectives_->fail();
}

void CpuExecutor::run_calls(const Step& step, const Rank& rank, int32_t thread) const {
    Team team;
    team.thread = thread;
    team.num_threads = rank.num_threads;
    team.scratch = rank.scratch.data() + kThreadScratchBytes * thread;
    int32_t region = INT32_MIN;
    bool has_run = false;
    for (const BoundCall& call : rank.calls) {
        if (!holds(call.guard, step)) continue;
        if (call.region != region && has_run) rank.barrier->wait();
        region = call.region;
        has_run = true;
        team.shared_scratch = call.shared_scratch;
        team.shared_scratch_bytes = call.shared_scratch_bytes;
        team.counter = call.counter.get();
        call.kernel->run(step, team);
    }
}

float* CpuExecutor::logits(int32_t row) {
    const RankSpec& spec = spec_.ranks.front();
    const Rank& rank = ranks_.front();
    auto* logits =
        reinterpret_cast<float*>(rank.arena.data() + rank.buffer_offsets[static_cast<size_t>(spec.logits_buffer)]);
    return logits + row * spec.logits_stride;
}

bool CpuExecutor::kept(int32_t row, int32_t wanted, std::vector<KeptLogit>& largest) const {
    const Rank& rank = ranks_.front();
    largest.clear();
    bool is_finite = true;
    for (int32_t thread = 0; thread < rank.num_threads; ++thread) {
        const std::byte* scratch = rank.scratch.data() + kThreadScratchBytes * thread + kKeptOffset;
        const KeptRow& kept = reinterpret_cast<const KeptRow*>(scratch)[row];
        is_finite = is_finite && kept.is_finite == 1;
        // Other calls use the scratch too, and whether the head is run is up to the plan.
        const int32_t count = std::clamp(kept.count, 0, 2 * kMostKept);
        std::copy_if(kept.logits, kept.logits + count, std::back_inserter(largest), [&](const KeptLogit& it) {
            return it.token >= 0 && it.token < spec_.vocab_size && std::isfinite(it.logit);
        });
    }
    if (static_cast<size_t>(wanted) < largest.size()) {
        std::nth_element(largest.begin(), largest.begin() + wanted - 1, largest.end(), comes_before);
        largest.resize(static_cast<size_t>(wanted));
    }
    std::sort(largest.begin(), largest.end(), comes_before);
    return is_finite;
}

std::string CpuExecutor::settle_weights(const std::function<bool()>& stop) {
    std::vector<WeightFile> files;
    for (Rank& rank : ranks_) files.push_back({&rank.weights, rank.cpus});
    const auto bytes = memory();
    return enginery::settle_weights(files, spec_.weight_pages, bytes.at("activations") + bytes.at("state"), stop);
}

std::map<std::string, int64_t> CpuExecutor::memory() const {
    std::map<std::string, int64_t> bytes = {{"weights", 0}, {"activations", 0}, {"state", 0}};
    for (const Rank& rank : ranks_) {
        bytes["weights"] += rank.weights.bytes();
        bytes["activations"] += rank.arena.bytes() + rank.thread_buffers.bytes() + rank.scratch.bytes();
        for (const Mapping& state : rank.state) bytes["state"] += state.bytes();
    }
    return bytes;
}

std::unique_ptr<Executor> make_cpu_executor(const ExecutorSpec& spec) { return std::make_unique<CpuExecutor>(spec); }

}  // namespace enginery
