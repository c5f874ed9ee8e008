#include "cuda_executor.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <set>
#include <thread>
#include <utility>

#include "errors.h"
#include "nccl.h"

namespace enginery {
namespace {

// They sample, and read weights: more would only wake each other.
constexpr size_t kMostThreads = 32;

[[noreturn]] void refuse(const std::string& what) {
    throw EngineFormatError(what + ". The engine is damaged or was not made for this runtime: build it again.");
}

int32_t pool_size(const ExecutorSpec& spec) {
    if (spec.num_threads > 0) return spec.num_threads;
    return static_cast<int32_t>(std::clamp<size_t>(available_cpus().size(), 1, kMostThreads));
}

// Graphs are made for some numbers of sequences, and steps padded to them: many for few, where padding would cost most.
int64_t graph_size(int64_t sequences) {
    int64_t size = 1;
    while (size < sequences && size < 8) size *= 2;
    while (size < sequences) size += size < 32 ? 8 : size < 128 ? 16 : 32;
    return size;
}

const ExecutorSpec& checked(const ExecutorSpec& spec) {
    if (spec.num_blocks.size() != spec.groups.size() || spec.groups.empty()) {
        refuse("A plan without state groups, or state groups without blocks");
    }
    if (spec.cuda.max_blocks < 1 || spec.max_tokens < 1 || spec.max_rows < 1 || spec.max_sequences < 1) {
        refuse("A plan for steps of nothing");
    }
    if (spec.ranks.empty()) refuse("A plan of no rank");
    return spec;
}

}  // namespace

CudaExecutor::CudaExecutor(const ExecutorSpec& spec, std::vector<std::unique_ptr<CudaDevice>> devices)
    : spec_(checked(spec)),
      inputs_(spec_),
      pool_(pool_size(spec_)),
      launchers_(static_cast<int32_t>(spec_.ranks.size())) {
    const int64_t rows = spec_.max_rows;
    const int64_t bytes =
        inputs_.place({spec_.max_tokens, rows, spec_.max_sequences, spec_.max_sequences, spec_.max_tokens,
                       spec_.cuda.max_blocks, rows, rows, rows, rows, spec_.cuda.max_edits});
    for (size_t rank = 0; rank < spec_.ranks.size(); ++rank) {
        ranks_.push_back(std::make_unique<CudaRank>(spec_, rank, inputs_, bytes, std::move(devices.at(rank)), pool_));
    }
    for (const auto& rank : ranks_) rank->connect(ranks_);
    allocate_pinned(bytes);
    prepare_graphs();
    join_library();
}

// After graphs are made: then all memory is taken that others count on.
void CudaExecutor::join_library() {
    if (ranks_.size() == 1 || !ranks_.front()->sums()) return;
    sums_by_ = "kernels";
    if (ranks_.front()->device().stream() == nullptr) return;
    if (share_gpus()) {
        sums_by_ += ", as ranks share a GPU";
        return;
    }
    const nccl::Library& library = nccl::Library::get();
    if (!library.fault().empty()) {
        sums_by_ += ", as " + library.fault();
        return;
    }
    const nccl::UniqueId id = library.make_id();
    has_joined_ = true;
    try {
        launchers_.run([&](int32_t rank) { ranks_[static_cast<size_t>(rank)]->join(library, id); });
    } catch (...) {
        fail();
        throw;
    }
    sums_by_ = library.name();
}

bool CudaExecutor::share_gpus() const {
    std::set<int32_t> gpus;
    for (const RankSpec& rank : spec_.ranks) gpus.insert(rank.gpu);
    return gpus.size() < spec_.ranks.size();
}

// Ends sums that wait for ranks which will not come.
void CudaExecutor::leave_library() {
    if (!std::exchange(has_joined_, false)) return;
    try {
        launchers_.run([&](int32_t rank) { ranks_[static_cast<size_t>(rank)]->leave(); });
    } catch (const EngineryError&) {  // of a GPU that has failed
    }
}

CudaExecutor::~CudaExecutor() {
    for (const auto& rank : ranks_) {
        try {
            rank->device().make_current();
            rank->device().synchronize();
        } catch (const EngineryError&) {  // it has failed: then nothing runs
        }
    }
    leave_library();
}

void CudaExecutor::allocate_pinned(int64_t inputs_bytes) {
    CudaDevice& device = ranks_.front()->device();
    device.make_current();
    const RankSpec& rank = spec_.ranks.front();
    constexpr int64_t kElement = sizeof(float);
    const auto allocate = [&]<typename T>(T*& memory, int64_t elements, const char* purpose) {
        memory = reinterpret_cast<T*>(device.allocate_pinned(elements * kElement, purpose));
    };
    allocate(logits_, spec_.max_rows * rank.logits_stride, "logits");
    for (Exchange& exchange : exchanges_) {
        exchange.inputs = device.allocate_pinned(inputs_bytes, "step inputs");
        if (!draws()) continue;
        allocate(exchange.token, spec_.max_rows, "tokens");
        allocate(exchange.logprob, spec_.max_rows, "logprobs");
        allocate(exchange.rank, spec_.max_rows, "ranks");
        allocate(exchange.top_tokens, spec_.max_rows * rank.draws.top, "tokens");
        allocate(exchange.top_logprobs, spec_.max_rows * rank.draws.top, "logprobs");
    }
}

// Of every size: those of steps whose rows are all likeliest, and those that draw some at random.
void CudaExecutor::prepare_graphs() {
    const int64_t largest = largest_graph();
    for (int64_t size = 1; size > 0; size = size < largest ? std::min(graph_size(size + 1), largest) : 0) {
        for (const int64_t drawn : draws() ? std::vector<int64_t>{0, size} : std::vector<int64_t>{0}) {
            Variables variables{size, size, size, size, 0, spec_.cuda.max_blocks};
            value_of(variables, Variable::kDrawn) = drawn;
            inputs_.place(variables);
            launchers_.run(
                [&](int32_t rank) { ranks_[static_cast<size_t>(rank)]->prepare(inputs_, {variables, draws(), true}); });
        }
    }
}

int64_t CudaExecutor::largest_graph() const {
    return std::min({spec_.max_tokens, spec_.max_rows, spec_.max_sequences});
}

// Of a step in which every sequence decodes one token: as large as a graph.
Variables CudaExecutor::padded(Variables variables) const {
    const int64_t size = std::min(graph_size(value_of(variables, Variable::kSequences)), largest_graph());
    for (const Variable variable : {Variable::kTokens, Variable::kRows, Variable::kSequences, Variable::kDecodes,
                                    Variable::kDrawn, Variable::kEdited, Variable::kRanked, Variable::kListed}) {
        int64_t& value = value_of(variables, variable);
        if (value > 0) value = size;
    }
    return variables;
}

DrawLimits CudaExecutor::draw_limits() const {
    if (!draws()) return {};
    const DrawsSpec& spec = spec_.ranks.front().draws;
    return {true, std::min(spec.edit_slots, spec_.max_sequences), spec_.cuda.max_edits, spec.top, spec_.vocab_size};
}

void CudaExecutor::launch(const Step& step) {
    if (failed_) throw EngineryError("An earlier step failed on the GPU, which serves no more: restart the server.");
    if (step.num_tokens < 1 || step.num_tokens > spec_.max_tokens || step.num_rows > spec_.max_rows ||
        step.num_sequences > spec_.max_sequences || step.num_edits > spec_.cuda.max_edits) {
        throw EngineryError("A step of " + std::to_string(step.num_tokens) + " tokens is larger than planned.");
    }
    try {
        run_step(step);
    } catch (...) {
        fail();
        throw;
    }
}

void CudaExecutor::fail() {
    failed_ = true;
    leave_library();
}

void CudaExecutor::run_step(const Step& step) {
    const size_t mark = next_mark_;
    Exchange& exchange = exchanges_[mark];
    CudaRank::Work work{inputs_.variables_of(step), step.draws != nullptr, false};
    if (step.num_tokens == step.num_sequences && step.num_tokens == step.num_rows) {
        work.variables = padded(work.variables);
        work.recurs = step.num_edits == 0;
    }
    const int64_t bytes = inputs_.place(work.variables);
    // Before any rank's launches: one that is captured while others wait for it on their GPU may not get there.
    if (work.recurs && ranks_.size() > 1 && !ranks_.front()->is_prepared(work)) {
        launchers_.run([&](int32_t rank) { ranks_[static_cast<size_t>(rank)]->prepare(inputs_, work); });
    }
    inputs_.pack(step, work.variables, exchange.inputs);
    launchers_.run([&](int32_t index) {
        CudaRank& rank = *ranks_[static_cast<size_t>(index)];
        rank.launch(inputs_, work, exchange.inputs, bytes);
        if (index == 0) copy_results(step, work.variables, exchange);
        rank.mark(mark);
    });
    launched_.push_back(mark);
    next_mark_ = (mark + 1) % CudaDevice::kMarks;
}

void CudaExecutor::copy_results(const Step& step, const Variables& variables, Exchange& exchange) {
    if (step.num_rows == 0) return;
    const RankSpec& rank = spec_.ranks.front();
    const auto copy = [&](int32_t buffer, auto* to, int64_t columns) {
        ranks_.front()->copy_buffer(buffer, reinterpret_cast<std::byte*>(to),
                                    step.num_rows * columns * static_cast<int64_t>(sizeof(*to)));
    };
    if (step.draws == nullptr) return copy(rank.logits_buffer, logits_, rank.logits_stride);
    copy(rank.draws.token, exchange.token, 1);
    if (value_of(variables, Variable::kRanked) > 0) {
        copy(rank.draws.logprob, exchange.logprob, 1);
        copy(rank.draws.rank, exchange.rank, 1);
    }
    if (value_of(variables, Variable::kListed) > 0) {
        copy(rank.draws.top_tokens, exchange.top_tokens, rank.draws.top);
        copy(rank.draws.top_logprobs, exchange.top_logprobs, rank.draws.top);
    }
}

void CudaExecutor::collect() {
    try {
        collected_ = launched_.front();
        launched_.pop_front();
        wait_for_all();
    } catch (...) {
        fail();
        throw;
    }
}

// In order, unless a library sums: then a rank may wait for ever for one that has failed, which must be heard first.
void CudaExecutor::wait_for_all() {
    const auto deadline = std::chrono::steady_clock::now() + kWaitTimeout;
    std::vector<size_t> waiting(ranks_.size());
    std::iota(waiting.begin(), waiting.end(), 0);
    while (!waiting.empty()) {
        const auto ended = std::find_if(waiting.begin(), waiting.end(), [this](size_t rank) {
            return !has_joined_ || ranks_[rank]->has_come(collected_);
        });
        if (ended != waiting.end()) {
            wait_for(*ended);
            waiting.erase(ended);
        } else if (std::chrono::steady_clock::now() > deadline) {
            throw EngineryError(ranks_[waiting.front()]->name() + ": has not come to the end of the step in " +
                                std::to_string(kWaitTimeout.count()) + " s.");
        } else {
            std::this_thread::yield();
        }
    }
}

// A rank that waits in vain for another fails (plugins/all_reduce/triton_meeting.py): tells which has not come.
void CudaExecutor::wait_for(size_t rank) {
    try {
        ranks_[rank]->wait(collected_);
    } catch (const EngineryError& error) {
        if (ranks_.size() == 1) throw;
        std::string late;
        for (size_t other = 0; other < ranks_.size(); ++other) {
            if (other != rank && !ranks_[other]->has_come(collected_))
                late += " Rank " + std::to_string(other) + ", on GPU " + std::to_string(spec_.ranks[other].gpu) +
                        ", has not come to the end of the step.";
        }
        throw EngineryError(ranks_[rank]->name() + ": " + error.what() + late);
    }
}

DrawnRow CudaExecutor::drawn(int32_t row) const {
    const Exchange& exchange = exchanges_[collected_];
    const int32_t first = row * spec_.ranks.front().draws.top;
    return {exchange.token[row], exchange.logprob[row], exchange.rank[row], exchange.top_tokens + first,
            exchange.top_logprobs + first};
}

std::map<std::string, int64_t> CudaExecutor::memory() const {
    std::map<std::string, int64_t> total;
    for (const auto& rank : ranks_) {
        for (const auto& [purpose, bytes] : rank->memory()) total[purpose] += bytes;
    }
    return total;
}

std::unique_ptr<Executor> make_cuda_executor(const ExecutorSpec& spec,
                                             std::vector<std::unique_ptr<CudaDevice>> devices) {
    return std::make_unique<CudaExecutor>(spec, std::move(devices));
}

}  // namespace enginery
