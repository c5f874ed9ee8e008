#include "cuda_rank.h"

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "weight_upload.h"

namespace enginery {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kWeightAlignment = 64;

[[noreturn]] void refuse(const std::string& what) {
    throw EngineFormatError(what + ". The engine is damaged or was not made for this runtime: build it again.");
}

// Whether offset .. offset + bytes lies within 0 .. size, for any three numbers.
bool lies_within(int64_t offset, int64_t bytes, int64_t size) {
    return offset >= 0 && bytes >= 0 && size >= 0 && bytes <= size && offset <= size - bytes;
}

const std::string& checked(const std::string& name) {
    if (name.size() > 1000) refuse("A name of " + std::to_string(name.size()) + " characters");
    return name;
}

}  // namespace

CudaRank::CudaRank(const ExecutorSpec& spec, size_t rank, const StepInputs& inputs, int64_t inputs_bytes,
                   std::unique_ptr<CudaDevice> device, ThreadPool& pool)
    : spec_(spec), rank_(spec.ranks[rank]), number_(rank), device_(std::move(device)), inputs_bytes_(inputs_bytes) {
    device_->make_current();
    check_spec();
    std::vector<int32_t> kernels;
    for (const KernelSpec& kernel : spec_.cuda.kernels) kernels.push_back(device_->load_kernel(kernel));
    allocate(pool);
    add_regions(inputs);
    peers_.allocate(*device_, rank_, spec_.ranks.size());
    forward_ = bind_all(rank_.launches, inputs, kernels);
    sample_ = bind_all(rank_.sample, inputs, kernels);
    device_->synchronize();
}

void CudaRank::connect(const std::vector<std::unique_ptr<CudaRank>>& ranks) {
    std::vector<CudaDevice*> devices;
    for (const auto& rank : ranks) devices.push_back(rank->device_.get());
    device_->make_current();
    device_->connect(devices);
    peers_.fill(*device_, rank_, [&](size_t rank, const BufferSpec& like) { return ranks[rank]->address_of(like); });
}

bool CudaRank::sums() const {
    return std::any_of(forward_.begin(), forward_.end(),
                       [](const BoundLaunch& bound) { return bound.spec->sums.has_value(); });
}

void CudaRank::join(const nccl::Library& library, const nccl::UniqueId& id) {
    device_->make_current();
    const auto world_size = static_cast<int32_t>(spec_.ranks.size());
    communicator_ =
        std::make_unique<nccl::Communicator>(library, id, static_cast<int32_t>(number_), world_size, name());
}

void CudaRank::leave() {
    device_->make_current();
    communicator_.reset();
}

std::string CudaRank::name() const {
    return "Rank " + std::to_string(number_) + " of " + std::to_string(spec_.ranks.size()) + ", on GPU " +
           std::to_string(rank_.gpu);
}

Address CudaRank::address_of(const BufferSpec& like) const {
    for (const BufferSpec& buffer : rank_.buffers) {
        if (buffer.name == like.name && buffer.bytes == like.bytes) return arena_ + static_cast<Address>(buffer.offset);
    }
    refuse("Ranks share the buffer '" + checked(like.name) + "', which not all of them have in one size");
}

void CudaRank::check_spec() const {
    for (const BufferSpec& buffer : rank_.buffers) {
        if (buffer.per_thread || !lies_within(buffer.offset, buffer.bytes, rank_.arena_bytes) ||
            buffer.offset % kAlignment != 0) {
            refuse("Buffer '" + checked(buffer.name) + "' lies outside of the arena, or not on 256 bytes");
        }
    }
    constexpr int64_t kElement = sizeof(float);
    if (rank_.logits_stride < spec_.vocab_size || rank_.logits_stride > INT32_MAX ||
        !holds(rank_.logits_buffer, rank_.logits_stride * kElement)) {
        refuse("The logits of " + std::to_string(spec_.max_rows) + " rows do not fit their buffer");
    }
    const DrawsSpec& draws = rank_.draws;
    if (rank_.sample.empty()) return;
    if (draws.top < 1 || draws.edit_slots < 1 || !holds(draws.token, kElement) || !holds(draws.logprob, kElement) ||
        !holds(draws.rank, kElement) || !holds(draws.top_tokens, draws.top * kElement) ||
        !holds(draws.top_logprobs, draws.top * kElement)) {
        refuse("What is drawn for " + std::to_string(spec_.max_rows) + " rows does not fit its buffers");
    }
}

bool CudaRank::holds(int32_t buffer, int64_t row_bytes) const {
    const auto index = static_cast<size_t>(buffer);
    return buffer >= 0 && index < rank_.buffers.size() &&
           row_bytes <= rank_.buffers[index].bytes / std::max(spec_.max_rows, 1);
}

void CudaRank::allocate(ThreadPool& pool) {
    int64_t begin = rank_.weights_file_bytes, end = 0;
    for (const WeightSpec& weight : rank_.weights) {
        if (!lies_within(weight.offset, weight.bytes, rank_.weights_file_bytes) ||
            weight.offset % kWeightAlignment != 0) {
            refuse(rank_.weights_path + ": tensor '" + checked(weight.name) +
                   "' lies outside of the file or not on 64 bytes");
        }
        begin = std::min(begin, weight.offset / kAlignment * kAlignment);
        end = std::max(end, weight.offset + weight.bytes);
    }
    if (end <= begin) refuse(rank_.weights_path + ": no tensors");
    weights_begin_ = begin;
    weights_bytes_ = end - begin;
    weights_ = device_->allocate(weights_bytes_, "weights");
    arena_ = device_->allocate(rank_.arena_bytes, "activations");
    device_->fill_zero(arena_, rank_.arena_bytes);
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
    inputs_ = device_->allocate(inputs_bytes_, "step inputs");
    upload_weights(*device_, pool, rank_.weights_path, rank_.weights_file_bytes, begin, end, weights_);
}

void CudaRank::add_regions(const StepInputs& inputs) {
    for (const BufferSpec& buffer : rank_.buffers) {
        buffer_regions_.push_back(
            device_->add_region({OperandKind::kBuffer, buffer.name, -1, arena_ + static_cast<Address>(buffer.offset),
                                 buffer.bytes, buffer.zeroed || buffer.kept}));
    }
    for (const WeightSpec& weight : rank_.weights) {
        const Address address = weights_ + static_cast<Address>(weight.offset - weights_begin_);
        weight_regions_.push_back(
            device_->add_region({OperandKind::kWeight, weight.name, -1, address, weight.bytes, true}));
    }
    for (const StepInputs::Input& input : inputs.inputs()) {
        input_regions_.push_back(device_->add_region({OperandKind::kInput, input.name, input.group, 0, 0, false}));
    }
}

// The layer in every block: from its place in the first block to the end of all.
int32_t CudaRank::state_region(int32_t group, int32_t layer) {
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

std::vector<CudaRank::BoundLaunch> CudaRank::bind_all(const std::vector<LaunchSpec>& launches, const StepInputs& inputs,
                                                      const std::vector<int32_t>& kernels) {
    std::vector<BoundLaunch> bound;
    for (const LaunchSpec& launch : launches) {
        if (launch.kernel < 0 || static_cast<size_t>(launch.kernel) >= kernels.size()) {
            refuse("A launch of kernel " + std::to_string(launch.kernel) + ", which is not there");
        }
        bound.push_back(bind(launch, inputs));
        bound.back().device.kernel = kernels[static_cast<size_t>(launch.kernel)];
    }
    return bound;
}

CudaRank::BoundLaunch CudaRank::bind(const LaunchSpec& launch, const StepInputs& inputs) {
    BoundLaunch bound;
    bound.spec = bound.device.spec = &launch;
    for (const GuardRange& range : launch.guard) bound.guard.emplace_back(find_variable(range.variable), range);
    for (const ArgumentSpec& argument : launch.arguments) {
        bound.device.arguments.emplace_back();
        bound.inputs.push_back(kNoInput);
        if (argument.parameter == ParameterKind::kPointer) {
            bind_pointer(bound, argument, inputs);
        } else if (argument.parameter == ParameterKind::kF32) {
            std::memcpy(&bound.device.arguments.back().bits, &argument.real, sizeof(argument.real));
        }
    }
    if (launch.sums) {
        const ArgumentSpec& part = launch.arguments[launch.sums->part];
        bound.part = arena_ + static_cast<Address>(rank_.buffers[static_cast<size_t>(part.index)].offset + part.offset);
    }
    return bound;
}

void CudaRank::bind_pointer(BoundLaunch& bound, const ArgumentSpec& argument, const StepInputs& inputs) {
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
            pointer.bits = arena_ + static_cast<Address>(rank_.buffers[index].offset) + offset;
            break;
        case OperandKind::kWeight:
            require(weight_regions_.size());
            pointer.region = weight_regions_[index];
            pointer.bits = weights_ + static_cast<Address>(rank_.weights[index].offset - weights_begin_) + offset;
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
        case OperandKind::kPeers: {
            const PeerTables::Table& table = peers_.find(argument.index, argument.offset);
            pointer.region = table.region;
            pointer.bits = table.address;
            break;
        }
        case OperandKind::kInput: {
            const size_t input = inputs.find(argument.target, argument.index);
            bound.inputs.back() = input;
            pointer.region = input_regions_[input];
            break;
        }
    }
}

void CudaRank::place_inputs(const StepInputs& inputs) {
    for (size_t index = 0; index < input_regions_.size(); ++index) {
        const StepInputs::Input& input = inputs.inputs()[index];
        device_->move_region(input_regions_[index], inputs_ + static_cast<Address>(input.offset), input.bytes);
    }
}

void CudaRank::prepare(const StepInputs& inputs, const Work& work) {
    device_->make_current();
    place_inputs(inputs);
    graphs_.emplace(std::pair(work.variables, work.draws), capture(inputs, work));
}

void CudaRank::launch(const StepInputs& inputs, const Work& work, const std::byte* from, int64_t bytes) {
    device_->make_current();
    place_inputs(inputs);
    device_->begin_step(work.variables);
    device_->copy_to_device(inputs_, from, bytes);
    if (!work.recurs) return run(inputs, work);
    const std::pair key(work.variables, work.draws);
    auto found = graphs_.find(key);
    if (found == graphs_.end()) found = graphs_.emplace(key, capture(inputs, work)).first;
    device_->replay(found->second);
}

int32_t CudaRank::capture(const StepInputs& inputs, const Work& work) {
    device_->begin_capture();
    try {
        run(inputs, work);
    } catch (...) {
        device_->abandon_capture();
        throw;
    }
    return device_->end_capture();
}

void CudaRank::run(const StepInputs& inputs, const Work& work) {
    run_launches(forward_, inputs, work);
    if (work.draws) run_launches(sample_, inputs, work);
}

void CudaRank::run_launches(std::vector<BoundLaunch>& launches, const StepInputs& inputs, const Work& work) {
    for (BoundLaunch& bound : launches) {
        const bool holds = std::all_of(bound.guard.begin(), bound.guard.end(), [&](const auto& guard) {
            const int64_t value = value_of(work.variables, guard.first);
            return guard.second.min <= value && value <= guard.second.max;
        });
        if (!holds) continue;
        if (bound.spec->sums && communicator_ != nullptr && !work.recurs) {
            sum(bound, work.variables);
        } else {
            run_launch(bound, inputs, work.variables);
        }
    }
}

void CudaRank::sum(const BoundLaunch& bound, const Variables& variables) {
    constexpr int64_t kElement = 2;
    const int64_t bytes = bound.spec->arguments[bound.spec->sums->sum].extent.evaluate(variables);
    const Address sum = bound.device.arguments[bound.spec->sums->sum].bits;
    if (bytes > 0) communicator_->sum(bound.part, sum, static_cast<size_t>(bytes / kElement), device_->stream());
}

void CudaRank::run_launch(BoundLaunch& bound, const StepInputs& inputs, const Variables& variables) {
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
            const StepInputs::Input& input = inputs.inputs()[bound.inputs[index]];
            argument.bits = inputs_ + static_cast<Address>(input.offset);
            argument.extent = input.bytes;
        } else if (extents && spec.parameter == ParameterKind::kPointer && spec.kind != OperandKind::kState) {
            argument.extent = spec.extent.evaluate(variables);
        }
    }
    device_->launch(launch);
}

void CudaRank::copy_buffer(int32_t buffer, std::byte* to, int64_t bytes) {
    const int64_t offset = rank_.buffers[static_cast<size_t>(buffer)].offset;
    device_->copy_to_host(to, arena_ + static_cast<Address>(offset), bytes);
}

void CudaRank::mark(size_t number) { device_->mark(number); }

void CudaRank::wait(size_t number) {
    device_->make_current();
    device_->wait(number);
}

bool CudaRank::has_come(size_t number) {
    device_->make_current();
    return device_->has_come(number);
}

std::map<std::string, int64_t> CudaRank::memory() const {
    int64_t state = 0;
    for (size_t group = 0; group < state_.size(); ++group) {
        state += spec_.num_blocks[group] * spec_.groups[group].block_bytes;
    }
    return {{"weights", weights_bytes_}, {"activations", rank_.arena_bytes + inputs_bytes_}, {"state", state}};
}

}  // namespace enginery
