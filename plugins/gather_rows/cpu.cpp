// gather_rows: out [rows, columns] f32 = the rows of x [tokens, columns] whose logits are wanted.
#include "plugins/operators.h"
#include "plugins/share.h"
#include "plugins/simd.h"
#include "runtime/csrc/call_reader.h"

namespace enginery::ENGINERY_ISA {

namespace {

class GatherRows : public Kernel {
  public:
    BoundOperand x, out;
    int64_t columns = 0;

    void run(const Step& step, const Team& team) override {
        const Range rows = share_of(team, step.num_rows, out.per_thread());
        const int64_t stride = row_stride(columns);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            float* to = out.at<float>(team) + row * stride;
            std::memcpy(to, x.at<const float>(team) + step.rows[row] * stride,
                        static_cast<size_t>(columns) * sizeof(float));
            zero_padding(to, columns);
        }
    }
};

}  // namespace

std::unique_ptr<Kernel> make_gather_rows(const CallSpec& call, const Binding& binding) {
    CallReader reader(call, binding);
    auto kernel = std::make_unique<GatherRows>();
    kernel->columns = reader.integer("columns", 1, kLargestColumns);
    const int64_t row_bytes = row_stride(kernel->columns) * 4;
    const int64_t x_bytes = reader.largest(Domain::kTokens) * row_bytes;
    const int64_t out_bytes = reader.largest(Domain::kRows) * row_bytes;
    reader.input("rows");
    kernel->x = reader.required("x", {"f32"}, x_bytes);
    kernel->out = reader.required("out", {"f32"}, out_bytes);
    reader.refuse_overlap("x", x_bytes, "out", out_bytes);
    reader.finish();
    return kernel;
}

}  // namespace enginery::ENGINERY_ISA
