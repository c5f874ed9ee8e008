// The operators that engines may call, by name and version.
#include "plugins/operators.h"

namespace enginery::ENGINERY_ISA {

namespace {

constexpr KernelEntry kKernels[] = {
    {"embedding", 0, make_embedding},   {"rotary_table", 0, make_rotary_table},
    {"rms_norm", 0, make_rms_norm},     {"gather_rows", 0, make_gather_rows},
    {"linear", 0, make_linear},         {"kv_write", 0, make_kv_write},
    {"attention", 0, make_attention},   {"all_reduce", 0, make_all_reduce},
    {"all_gather", 0, make_all_gather},
};

}  // namespace

KernelTable kernels() { return kKernels; }

}  // namespace enginery::ENGINERY_ISA
