// all_gather: out [M, columns] of every rank = the ranks' x side by side; rank r's begins at column starts[r].
#include <charconv>
#include <vector>

#include "plugins/operators.h"
#include "plugins/share.h"
#include "plugins/simd.h"
#include "runtime/csrc/call_reader.h"
#include "runtime/csrc/collectives.h"

namespace enginery::ENGINERY_ISA {

namespace {

class AllGather : public Kernel {
  public:
    Domain domain = Domain::kTokens;
    BoundOperand x, out;
    std::vector<int64_t> starts;  // of each rank, and the end
    int32_t rank = 0;
    Collectives* collectives = nullptr;

    void run(const Step& step, const Team& team) override {
        if (team.thread == 0) collectives->publish(rank, x.data);
        collectives->meet(rank);
        const Range rows = share_of(team, domain_size(domain, step), false);
        const int64_t stride = row_stride(starts.back());
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            zero_padding(out.at<float>(team) + row * stride, starts.back());
            for (size_t other = 0; other + 1 < starts.size(); ++other) {
                const int64_t columns = starts[other + 1] - starts[other];
                const auto* from = reinterpret_cast<const float*>(collectives->published(static_cast<int32_t>(other)));
                std::memcpy(out.at<float>(team) + row * stride + starts[other], from + row * row_stride(columns),
                            static_cast<size_t>(columns) * sizeof(float));
            }
        }
        // No rank may write its x again before all have read it.
        collectives->meet(rank);
    }
};

// "0,500,1000" and the number of columns, as rising integers from 0 on; empty where they are not.
std::vector<int64_t> read_starts(const std::string& text, int64_t columns) {
    std::vector<int64_t> starts;
    const char* at = text.data();
    const char* end = at + text.size();
    while (at != end) {
        int64_t start = -1;
        const auto [next, error] = std::from_chars(at, end, start);
        if (error != std::errc() || (next != end && (*next != ',' || next + 1 == end))) return {};
        starts.push_back(start);
        at = next == end ? end : next + 1;
    }
    starts.push_back(columns);
    if (starts.front() != 0) return {};
    for (size_t i = 0; i + 1 < starts.size(); ++i) {
        if (starts[i] < 0 || starts[i] >= starts[i + 1]) return {};
    }
    return starts;
}

}  // namespace

std::unique_ptr<Kernel> make_all_gather(const CallSpec& call, const Binding& binding) {
    CallReader reader(call, binding);
    auto kernel = std::make_unique<AllGather>();
    kernel->domain = reader.domain();
    const int64_t columns = reader.integer("columns", 1, kLargestColumns);
    const std::string text = reader.text("starts");
    kernel->starts = read_starts(text, columns);
    kernel->rank = binding.rank;
    kernel->collectives = binding.collectives;
    if (static_cast<int64_t>(kernel->starts.size()) != binding.world_size + 1) {
        reader.fault("attribute starts: wanted " + std::to_string(binding.world_size) + " rising columns below " +
                     std::to_string(columns) + " from 0 on, got '" + text.substr(0, 100) + "'");
        kernel->starts.assign(static_cast<size_t>(binding.world_size) + 1, 0);
    }
    const auto rank = static_cast<size_t>(binding.rank);
    const int64_t own = kernel->starts[rank + 1] - kernel->starts[rank];
    const int64_t most = reader.largest(kernel->domain);
    kernel->x = reader.required("x", {"f32"}, most * row_stride(own) * 4);
    kernel->out = reader.required("out", {"f32"}, most * row_stride(columns) * 4);
    if (kernel->x.per_thread() || kernel->out.per_thread()) reader.fault("operands x and out cannot be per thread");
    reader.refuse_overlap("x", most * row_stride(own) * 4, "out", most * row_stride(columns) * 4);
    reader.finish();
    return kernel;
}

}  // namespace enginery::ENGINERY_ISA
