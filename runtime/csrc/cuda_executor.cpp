#include "cuda_executor.h"

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "weight_upload.h"

namespace enginery {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kWeightAlignment = 64;
// They sample, and read weights: more would only wake each other.
constexpr size_t kMostThreads = 32;

[[noreturn]] void refuse(const std::string& what) {
    throw EngineFormatError(what + ". The engine is damaged or was not made for this runtime: build it again.");
}

// Whether offset .. offset + bytes lies within 0 .. size, for any three numbers.
bool lies_within(int64_t offset, int64_t bytes, int64_t size) {
    return offset >= 0 && bytes >= 0 && size >= 0 && bytes <= size && offset <= size - bytes;
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

const std::string& checked(const std::string& name) {
    if (name.size() > 1000) refuse("A name of " + std::to_string(name.size()) + " characters");
    return name;
}

}  // namespace

CudaExecutor::CudaExecutor(const ExecutorSpec& spec, std::unique_ptr<CudaDevice> device)
    : spec_(spec), device_(std::move(device)), inputs_(spec_), pool_(pool_size(spec)) {
    device_->make_current();
    check_spec();
    largest_ = {spec_.max_tokens,    spec_.max_rows,   spec_.max_sequences,
                spec_.max_sequences, spec_.max_tokens, spec_.cuda.max_blocks};
    std::vector<int32_t> kernels;
    for (const KernelSpec& kernel : spec_.cuda.kernels) kernels.push_back(device_->load_kernel(kernel));
    allocate();
    add_regions();
    for (const LaunchSpec& launch : spec_.cuda.launches) {
        if (launch.kernel < 0 || static_cast<size_t>(launch.kernel) >= kernels.size()) {
            refuse("A launch of kernel " + std::to_string(launch.kernel) + ", which is not there");
        }
        bind(launch);
        launches_.back().device.kernel = kernels[static_cast<size_t>(launch.kernel)];
    }
    device_->synchronize();
}

void CudaExecutor::check_spec() const {
    if (spec_.ranks.size() != 1) {
        throw TargetError("This engine was built for " + std::to_string(spec_.ranks.size()) +
                          " GPUs (--tensor-parallel-size); on CUDA this runtime serves with one. Build it for one.");
    }
    if (spec_.num_blocks.size() != spec_.groups.size() || spec_.groups.empty()) {
        refuse("A plan without state groups, or state groups without blocks");
    }
    if (spec_.cuda.max_blocks < 1 || spec_.max_tokens < 1 || spec_.max_rows < 1 || spec_.max_sequences < 1) {
        refuse("A plan for steps of nothing");
    }
    for (const BufferSpec& buffer : rank().buffers) {
        if (buffer.per_thread || !lies_within(buffer.offset, buffer.bytes, rank().arena_bytes) ||
            buffer.offset % kAlignment != 0) {
            refuse("Buffer '" + checked(buffer.name) + "' lies outside of the arena, or not on 256 bytes");
        }
    }
    const auto logits = static_cast<size_t>(rank().logits_buffer);
    if (rank().logits_buffer < 0 || logits >= rank().buffers.size() || rank().logits_stride < spec_.vocab_size ||
        rank().logits_stride > INT32_MAX ||
        rank().buffers[logits].bytes < spec_.max_rows * rank().logits_stride * static_cast<int64_t>(sizeof(float))) {
        refuse("The logits of " + std::to_string(spec_.max_rows) + " rows do not fit their buffer");
    }
}

void CudaExecutor::allocate() {
    int64_t begin = rank().weights_file_bytes, end = 0;
    for (const WeightSpec& weight : rank().weights) {
        if (!lies_within(weight.offset, weight.bytes, rank().weights_file_bytes) ||
            weight.offset % kWeightAlignment != 0) {
            refuse(rank().weights_path + ": tensor '" + checked(weight.name) +
                   "' lies outside of the file or not on 64 bytes");
        }
        begin = std::min(begin, weight.offset / kAlignment * kAlignment);
        end = std::max(end, weight.offset + weight.bytes);
    }
    if (end <= begin) refuse(rank().weights_path + ": no tensors");
    weights_begin_ = begin;
    weights_bytes_ = end - begin;
    weights_ = device_->allocate(weights_bytes_, "weights");
    arena_ = device_->allocate(rank().arena_bytes, "activations");
    device_->fill_zero(arena_, rank().arena_bytes);
    for (size_t group = 0; group < spec_.groups.size(); ++group) {
        const int64_t block_bytes = spec_.groups[group].block_bytes, blocks = spec_.num_blocks[group];
        if (block_bytes < 1 || block_bytes > (int64_t{1} << 40) || blocks < 1) {
            refuse("State group '" + checked(spec_.groups[group].name) + "' has " + std::to_string(blocks) +
                   " blocks of " + std::to_string(block_bytes) + " bytes");
        }
        if (blocks > INT64_MAX / 2 / block_bytes) throw CapacityError("No memory for the state of sequences.");
        state_.push_back(device_->allocate(blocks * block_bytes, "the state of sequences"));
        device_->fill_zero(state_.back(), blocks * block_bytes);
    }
    inputs_bytes_ = inputs_.place(largest_);
    inputs_address_ = device_->allocate(inputs_bytes_, "step inputs");
    inputs_host_ = device_->allocate_pinned(inputs_bytes_, "step inputs");
    const int64_t logits_bytes = spec_.max_rows * rank().logits_stride * static_cast<int64_t>(sizeof(float));
    logits_ = reinterpret_cast<float*>(device_->allocate_pinned(logits_bytes, "logits"));
    upload_weights(*device_, pool_, rank().weights_path, rank().weights_file_bytes, begin, end, weights_);
}

void CudaExecutor::add_regions() {
    for (const BufferSpec& buffer : rank().buffers) {
        buffer_regions_.push_back(
            device_->add_region({OperandKind::kBuffer, buffer.name, -1, arena_ + static_cast<Address>(buffer.offset),
                                 buffer.bytes, buffer.zeroed}));
    }
    for (const WeightSpec& weight : rank().weights) {
        const Address address = weights_ + static_cast<Address>(weight.offset - weights_begin_);
        weight_regions_.push_back(
            device_->add_region({OperandKind::kWeight, weight.name, -1, address, weight.bytes, true}));
    }
    for (const StepInputs::Input& input : inputs_.inputs()) {
        input_regions_.push_back(device_->add_region({OperandKind::kInput, input.name, input.group, 0, 0, false}));
    }
}

// The layer in every block: from its place in the first block to the end of all.
int32_t CudaExecutor::state_region(int32_t group, int32_t layer) {
    const auto index = static_cast<size_t>(group);
    if (group < 0 || index >= spec_.groups.size() || layer < 0 || layer >= spec_.groups[index].num_layers) {
        refuse("State of layer " + std::to_string(layer) + " of group " + std::to_string(group) + " is not there");
    }
    const auto found = state_regions_.find({group, layer});
    if (found != state_regions_.end()) return found->second;
    const StateGroupSpec& spec = spec_.groups[index];
    const int64_t offset = spec.block_bytes / spec.num_layers * layer;
    const Region region{OperandKind::kState,
                        spec.name,
                        group,
                        state_[index] + static_cast<Address>(offset),
                        spec_.num_blocks[index] * spec.block_bytes - offset,
                        true};
    return state_regions_.emplace(std::pair(group, layer), device_->add_region(region)).first->second;
}

void CudaExecutor::bind(const LaunchSpec& launch) {
    BoundLaunch bound;
    bound.spec = bound.device.spec = &launch;
    for (const GuardRange& range : launch.guard) bound.guard.emplace_back(find_variable(range.variable), range);
    for (const ArgumentSpec& argument : launch.arguments) {
        bound.device.arguments.emplace_back();
        bound.inputs.push_back(kNoInput);
        if (argument.parameter == ParameterKind::kPointer) {
            bind_pointer(bound, argument);
        } else if (argument.parameter == ParameterKind::kF32) {
            std::memcpy(&bound.device.arguments.back().bits, &argument.real, sizeof(argument.real));
        }
    }
    launches_.push_back(std::move(bound));
}

void CudaExecutor::bind_pointer(BoundLaunch& bound, const ArgumentSpec& argument) {
    LaunchArgument& pointer = bound.device.arguments.back();
    const auto index = static_cast<size_t>(argument.index);
    const auto require = [&](size_t count) {
        if (argument.index >= 0 && index < count) return;
        refuse("Argument '" + checked(argument.name) + "': '" + checked(argument.target) + "' is not there");
    };
    const auto offset = static_cast<Address>(argument.offset);
    switch (argument.kind) {
        case OperandKind::kBuffer:
            require(buffer_regions_.size());
            pointer.region = buffer_regions_[index];
            pointer.bits = arena_ + static_cast<Address>(rank().buffers[index].offset) + offset;
            break;
        case OperandKind::kWeight:
            require(weight_regions_.size());
            pointer.region = weight_regions_[index];
            pointer.bits = weights_ + static_cast<Address>(rank().weights[index].offset - weights_begin_) + offset;
            break;
        case OperandKind::kState: {
            require(spec_.groups.size());
            pointer.region = state_region(argument.index, argument.layer);
            const StateGroupSpec& group = spec_.groups[index];
            const int64_t layer = group.block_bytes / group.num_layers * argument.layer;
            pointer.bits = state_[index] + static_cast<Address>(layer);
            pointer.extent = spec_.num_blocks[index] * group.block_bytes - layer;
            break;
        }
        case OperandKind::kInput: {
            const size_t input = inputs_.find(argument.target, argument.index);
            bound.inputs.back() = input;
            pointer.region = input_regions_[input];
            break;
        }
    }
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
    device_->make_current();
    Variables variables = inputs_.variables_of(step);
    const bool decodes = step.num_tokens == step.num_sequences && step.num_tokens == step.num_rows;
    if (decodes) variables = padded(variables);
    const int64_t bytes = inputs_.place(variables);
    inputs_.pack(step, variables, inputs_host_);
    for (size_t index = 0; index < input_regions_.size(); ++index) {
        const StepInputs::Input& input = inputs_.inputs()[index];
        device_->move_region(input_regions_[index], inputs_address_ + static_cast<Address>(input.offset), input.bytes);
    }
    device_->begin_step(variables);
    device_->copy_to_device(inputs_address_, inputs_host_, bytes);
    if (decodes) {
        const int64_t tokens = value_of(variables, Variable::kTokens);
        const auto found = graphs_.find(tokens);
        device_->replay(found != graphs_.end() ? found->second
                                               : graphs_.emplace(tokens, capture(variables)).first->second);
    } else {
        run_launches(variables);
    }
    if (step.num_rows == 0) return;
    const auto logits = static_cast<size_t>(rank().logits_buffer);
    device_->copy_to_host(reinterpret_cast<std::byte*>(logits_),
                          arena_ + static_cast<Address>(rank().buffers[logits].offset),
                          step.num_rows * rank().logits_stride * static_cast<int64_t>(sizeof(float)));
}

int32_t CudaExecutor::capture(const Variables& variables) {
    device_->begin_capture();
    try {
        run_launches(variables);
    } catch (...) {
        device_->abandon_capture();
        throw;
    }
    return device_->end_capture();
}

void CudaExecutor::run_launches(const Variables& variables) {
    for (BoundLaunch& bound : launches_) {
        const bool holds = std::all_of(bound.guard.begin(), bound.guard.end(), [&](const auto& guard) {
            const int64_t value = value_of(variables, guard.first);
            return guard.second.min <= value && value <= guard.second.max;
        });
        if (holds) run_launch(bound, variables);
    }
}

void CudaExecutor::run_launch(BoundLaunch& bound, const Variables& variables) {
    DeviceLaunch& launch = bound.device;
    bool empty = false;  // of a step without rows, or without decodes
    for (size_t axis = 0; axis < launch.grid.size(); ++axis) {
        launch.grid[axis] = bound.spec->grid[axis].evaluate(variables);
        empty = empty || launch.grid[axis] == 0;
    }
    if (empty) return;
    const bool extents = device_->wants_extents();
    for (size_t index = 0; index < launch.arguments.size(); ++index) {
        LaunchArgument& argument = launch.arguments[index];
        const ArgumentSpec& spec = bound.spec->arguments[index];
        if (spec.parameter == ParameterKind::kI32) {
            argument.bits = static_cast<uint64_t>(spec.integer.evaluate(variables));
        } else if (bound.inputs[index] != kNoInput) {
            const StepInputs::Input& input = inputs_.inputs()[bound.inputs[index]];
            argument.bits = inputs_address_ + static_cast<Address>(input.offset);
            argument.extent = input.bytes;
        } else if (extents && spec.parameter == ParameterKind::kPointer && spec.kind != OperandKind::kState) {
            argument.extent = spec.extent.evaluate(variables);
        }
    }
    device_->launch(launch);
}

void CudaExecutor::collect() {
    device_->make_current();
    try {
        device_->synchronize();
    } catch (...) {
        failed_ = true;
        throw;
    }
}

std::map<std::string, int64_t> CudaExecutor::memory() const {
    int64_t state = 0;
    for (size_t group = 0; group < state_.size(); ++group) {
        state += spec_.num_blocks[group] * spec_.groups[group].block_bytes;
    }
    return {{"weights", weights_bytes_}, {"activations", rank().arena_bytes + inputs_bytes_}, {"state", state}};
}

std::unique_ptr<Executor> make_cuda_executor(const ExecutorSpec& spec, std::unique_ptr<CudaDevice> device) {
    return std::make_unique<CudaExecutor>(spec, std::move(device));
}

}  // namespace enginery
