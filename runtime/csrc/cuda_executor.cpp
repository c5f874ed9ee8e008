#include "cuda_executor.h"

#include <algorithm>

#include "errors.h"

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
    if (spec.ranks.size() != 1) {
        throw TargetError("This engine was built for " + std::to_string(spec.ranks.size()) +
                          " GPUs (--tensor-parallel-size); on CUDA this runtime serves with one. Build it for one.");
    }
    return spec;
}

}  // namespace

CudaExecutor::CudaExecutor(const ExecutorSpec& spec, std::vector<std::unique_ptr<CudaDevice>> devices)
    : spec_(checked(spec)),
      inputs_(spec_),
      pool_(pool_size(spec_)),
      launchers_(static_cast<int32_t>(spec_.ranks.size())) {
    const int64_t bytes = inputs_.place({spec_.max_tokens, spec_.max_rows, spec_.max_sequences, spec_.max_sequences,
                                         spec_.max_tokens, spec_.cuda.max_blocks});
    for (size_t rank = 0; rank < spec_.ranks.size(); ++rank) {
        ranks_.push_back(std::make_unique<CudaRank>(spec_, rank, inputs_, bytes, std::move(devices.at(rank)), pool_));
    }
    CudaDevice& first = ranks_.front()->device();
    first.make_current();
    inputs_host_ = first.allocate_pinned(bytes, "step inputs");
    const int64_t logits_bytes = spec_.max_rows * logits_stride() * static_cast<int64_t>(sizeof(float));
    logits_ = reinterpret_cast<float*>(first.allocate_pinned(logits_bytes, "logits"));
}

Variables CudaExecutor::padded(const Variables& variables) const {
    const int64_t sequences = value_of(variables, Variable::kSequences);
    const int64_t largest = std::min({spec_.max_tokens, spec_.max_rows, spec_.max_sequences});
    const int64_t size = std::min(graph_size(sequences), largest);
    return {size, size, size, size, 0, spec_.cuda.max_blocks};
}

void CudaExecutor::launch(const Step& step) {
    if (failed_) throw EngineryError("An earlier step failed on the GPU, which serves no more: restart the server.");
    if (step.num_tokens < 1 || step.num_tokens > spec_.max_tokens || step.num_rows > spec_.max_rows ||
        step.num_sequences > spec_.max_sequences) {
        throw EngineryError("A step of " + std::to_string(step.num_tokens) + " tokens is larger than planned.");
    }
    try {
        run_step(step);
    } catch (...) {
        failed_ = true;
        throw;
    }
}

void CudaExecutor::run_step(const Step& step) {
    Variables variables = inputs_.variables_of(step);
    const bool decodes = step.num_tokens == step.num_sequences && step.num_tokens == step.num_rows;
    if (decodes) variables = padded(variables);
    const int64_t bytes = inputs_.place(variables);
    inputs_.pack(step, variables, inputs_host_);
    launchers_.run([&](int32_t rank) {
        ranks_[static_cast<size_t>(rank)]->launch(inputs_, variables, inputs_host_, bytes, decodes);
    });
    if (step.num_rows == 0) return;
    ranks_.front()->device().make_current();
    ranks_.front()->copy_logits(logits_, step.num_rows);
}

void CudaExecutor::collect() {
    try {
        for (const auto& rank : ranks_) rank->wait();
    } catch (...) {
        failed_ = true;
        throw;
    }
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
