#include "cpu_features.h"

#include <algorithm>

#include "errors.h"

namespace enginery {

namespace {

struct Build {
    const char* isa;
    std::vector<std::string> features;
    KernelTable (*kernels)();
};

// The features are those that CMakeLists.txt compiles each build with.
const std::vector<Build>& builds() {
    static const std::vector<Build> all = [] {
        const std::vector<std::string> avx2 = {"avx2", "fma", "f16c", "bmi2"};
        const auto with = [](std::vector<std::string> features, std::initializer_list<const char*> more) {
            features.insert(features.end(), more.begin(), more.end());
            return features;
        };
        const auto avx512 = with(avx2, {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"});
        return std::vector<Build>{
            {"avx2", avx2, avx2::kernels},
            {"avx2-vnni", with(avx2, {"avxvnni"}), avx2_vnni::kernels},
            {"avx512", avx512, avx512::kernels},
            {"avx512-vnni", with(avx512, {"avx512vnni"}), avx512_vnni::kernels},
            {"avx512-vnni-bf16", with(avx512, {"avx512vnni", "avx512bf16"}), avx512_vnni_bf16::kernels},
        };
    }();
    return all;
}

bool contains(const std::vector<std::string>& words, const std::string& word) {
    return std::find(words.begin(), words.end(), word) != words.end();
}

}  // namespace

std::vector<std::string> cpu_features() {
    __builtin_cpu_init();
    std::vector<std::string> found;
    const auto add = [&](const char* name, int supported) {
        if (supported != 0) found.emplace_back(name);
    };
    add("avx2", __builtin_cpu_supports("avx2"));
    add("fma", __builtin_cpu_supports("fma"));
    add("f16c", __builtin_cpu_supports("f16c"));
    add("bmi2", __builtin_cpu_supports("bmi2"));
    add("avxvnni", __builtin_cpu_supports("avxvnni"));
    add("avx512f", __builtin_cpu_supports("avx512f"));
    add("avx512bw", __builtin_cpu_supports("avx512bw"));
    add("avx512dq", __builtin_cpu_supports("avx512dq"));
    add("avx512vl", __builtin_cpu_supports("avx512vl"));
    add("avx512cd", __builtin_cpu_supports("avx512cd"));
    add("avx512vnni", __builtin_cpu_supports("avx512vnni"));
    add("avx512bf16", __builtin_cpu_supports("avx512bf16"));
    return found;
}

KernelTable find_kernels(const std::string& isa) {
    const auto build = std::find_if(builds().begin(), builds().end(), [&](const Build& b) { return isa == b.isa; });
    if (build == builds().end()) {
        throw TargetError("This runtime has no CPU kernels for '" + isa.substr(0, 100) +
                          "'. Build the engine again with a target that `build-engine --help` names.");
    }
    const std::vector<std::string> features = cpu_features();
    std::string lacking;
    for (const auto& feature : build->features) {
        if (!contains(features, feature)) lacking += (lacking.empty() ? "" : ", ") + feature;
    }
    if (lacking.empty()) return build->kernels();
    throw TargetError("The engine was built for cpu-" + isa + "; this machine's CPU lacks " + lacking +
                      ". Build one for this machine: build-engine MODEL --target cpu");
}

KernelTable find_best_kernels(const std::string& isa) {
    if (isa == "avx512-vnni" && contains(cpu_features(), "avx512bf16")) return find_kernels("avx512-vnni-bf16");
    return find_kernels(isa);
}

}  // namespace enginery
