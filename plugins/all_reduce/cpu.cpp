// all_reduce: out [M, columns] = the sum over ranks of x [M, columns], added in the order of ranks.
#include <vector>

#include "plugins/operators.h"
#include "plugins/share.h"
#include "plugins/simd.h"
#include "runtime/csrc/call_reader.h"
#include "runtime/csrc/collectives.h"

namespace enginery::ENGINERY_ISA {

namespace {

class AllReduce : public Kernel {
  public:
    Domain domain = Domain::kTokens;
    BoundOperand x, out;
    int64_t columns = 0;
    int32_t rank = 0, world_size = 1;
    Collectives* collectives = nullptr;

    void run(const Step& step, const Team& team) override {
        if (team.thread == 0) collectives->publish(rank, x.data);
        collectives->meet(rank);
        const int64_t stride = row_stride(columns);
        const Range rows = share_of(team, domain_size(domain, step), false);
        float* to = out.at<float>(team);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            zero_padding(to + row * stride, columns);
            for (int64_t i = row * stride; i < row * stride + columns; i += kLanes) {
                const int count = lanes_left(row * stride + columns, i);
                VecF sum = load_part(reinterpret_cast<const float*>(collectives->published(0)) + i, count);
                for (int32_t other = 1; other < world_size; ++other) {
                    sum = sum + load_part(reinterpret_cast<const float*>(collectives->published(other)) + i, count);
                }
                store_part(to + i, sum, count);
            }
        }
        // No rank may write its x again before all have read it.
        collectives->meet(rank);
    }
};

}  // namespace

std::unique_ptr<Kernel> make_all_reduce(const CallSpec& call, const Binding& binding) {
    CallReader reader(call, binding);
    auto kernel = std::make_unique<AllReduce>();
    kernel->domain = reader.domain();
    kernel->columns = reader.integer("columns", 1, kLargestColumns);
    kernel->rank = binding.rank;
    kernel->world_size = binding.world_size;
    kernel->collectives = binding.collectives;
    const int64_t bytes = reader.largest(kernel->domain) * row_stride(kernel->columns) * 4;
    kernel->x = reader.required("x", {"f32"}, bytes);
    kernel->out = reader.required("out", {"f32"}, bytes);
    if (kernel->x.per_thread() || kernel->out.per_thread()) reader.fault("operands x and out cannot be per thread");
    reader.refuse_overlap("x", bytes, "out", bytes);
    reader.finish();
    return kernel;
}

}  // namespace enginery::ENGINERY_ISA
