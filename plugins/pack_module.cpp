// The extension `_pack`: the packers of plugins/*/pack.cpp for the compiler. Arguments are checked here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <map>
#include <stdexcept>
#include <string>

#include "plugins/linear/pack.h"

namespace nb = nanobind;

namespace enginery {

namespace {

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

const std::map<std::string, SourceType> kSourceTypes = {
    {"f32", SourceType::kF32}, {"bf16", SourceType::kBf16}, {"f16", SourceType::kF16}};

const std::map<std::string, PackLayout> kLayouts = {
    {"rows_f32.v0", PackLayout::kRowsF32},     {"rows_bf16.v0", PackLayout::kRowsBf16},
    {"bf16_p128.v0", PackLayout::kBf16P128},   {"fp8_p128.v0", PackLayout::kFp8P128},
    {"int8_p128.v0", PackLayout::kInt8P128},   {"f32_k1n16.v0", PackLayout::kF32K1N16},
    {"bf16_k2n16.v0", PackLayout::kBf16K2N16}, {"int8_k4n16.v0", PackLayout::kInt8K4N16}};

struct Codes {
    int64_t group;
    bool zero_points;
};

const std::map<std::string, Codes> kCodes = {{"int4_k8n16g32.v0", {32, false}},   {"int4_k8n16g64.v0", {64, false}},
                                             {"int4_k8n16g128.v0", {128, false}}, {"uint4_k8n16g32.v0", {32, true}},
                                             {"uint4_k8n16g64.v0", {64, true}},   {"uint4_k8n16g128.v0", {128, true}}};

template <class T>
T find(const std::map<std::string, T>& known, const std::string& name, const char* what) {
    const auto found = known.find(name);
    if (found != known.end()) return found->second;
    std::string message = std::string("pack_rows: unknown ") + what + " '" + name + "'; known are";
    for (const auto& entry : known) message += " " + entry.first;
    throw std::invalid_argument(message);
}

void check_size(const char* what, size_t got, int64_t wanted, bool exactly) {
    const auto least = static_cast<size_t>(wanted);
    if (exactly ? got == least : got >= least) return;
    throw std::invalid_argument(std::string("pack_rows: ") + what + " has " + std::to_string(got) +
                                " elements, wanted " + (exactly ? "" : "at least ") + std::to_string(wanted));
}

int64_t bind_pack_rows(Array<const uint8_t> source, const std::string& source_dtype, int64_t n, int64_t k,
                       const std::string& layout, Array<uint8_t> out, nb::object scale, nb::object sums,
                       nb::object zeros, double add, int64_t stride, int num_threads) {
    constexpr int64_t kLargest = int64_t{1} << 31;  // so that no product of sizes leaves int64
    if (n < 1 || k < 1 || n > kLargest || k > kLargest / 64 || stride < 1 || stride > 64) {
        throw std::invalid_argument("pack_rows: n, k and stride must be positive and of sane size");
    }
    PackJob job;
    job.type = find(kSourceTypes, source_dtype, "source_dtype");
    const auto codes = kCodes.find(layout);
    job.layout = codes == kCodes.end() ? find(kLayouts, layout, "layout") : PackLayout::kCodesK8N16;
    const bool in_panels = is_packed(job.layout);
    const int64_t panels = ((n + kPanelRows - 1) / kPanelRows - 1) * stride + 1;
    const int64_t rows = in_panels ? panels * kPanelRows : (n - 1) * stride + 1;
    check_size("source", source.size(), n * k * source_bytes(job.type), true);
    check_size("out", out.size(), panel_bytes(job.layout, k) / kPanelRows * rows, false);
    job.source = reinterpret_cast<const std::byte*>(source.data());
    job.rows = n;
    job.columns = k;
    job.out = reinterpret_cast<std::byte*>(out.data());
    job.add = static_cast<float>(add);
    job.stride = stride;
    job.num_threads = num_threads;

    const bool has_sums = job.layout == PackLayout::kInt8K4N16;
    const bool has_zeros = codes != kCodes.end() && codes->second.zero_points;
    if (scale.is_none() == has_scale(job.layout) || sums.is_none() == has_sums || zeros.is_none() == has_zeros) {
        throw std::invalid_argument(
            "pack_rows: scale belongs to int8, fp8 and int4 layouts, sums to int8_k4n16.v0, zeros to uint4, alone");
    }
    Array<float> scales;
    Array<int32_t> row_sums;
    Array<uint16_t> half_scales;
    Array<uint8_t> zero_points;
    if (codes != kCodes.end()) {
        job.group = codes->second.group;
        half_scales = nb::cast<Array<uint16_t>>(scale, false);
        check_size("scale", half_scales.size(), rows * num_groups(k, job.group), false);
        job.half_scale = half_scales.data();
        if (has_zeros) {
            zero_points = nb::cast<Array<uint8_t>>(zeros, false);
            check_size("zeros", zero_points.size(), rows * num_groups(k, job.group), false);
            job.zeros = zero_points.data();
        }
    } else if (has_scale(job.layout)) {
        scales = nb::cast<Array<float>>(scale, false);
        check_size("scale", scales.size(), rows, false);
        job.scale = scales.data();
    }
    if (has_sums) {
        row_sums = nb::cast<Array<int32_t>>(sums, false);
        check_size("sums", row_sums.size(), rows, false);
        job.sums = row_sums.data();
    }
    nb::gil_scoped_release released;
    return pack_rows(job);
}

}  // namespace

NB_MODULE(_pack, module) {
    module.def("pack_rows", &bind_pack_rows, nb::arg("source").noconvert(), nb::arg("source_dtype"), nb::arg("n"),
               nb::arg("k"), nb::arg("layout"), nb::arg("out").noconvert(), nb::arg("scale") = nb::none(),
               nb::arg("sums") = nb::none(), nb::arg("zeros") = nb::none(), nb::arg("add") = 0.0, nb::arg("stride") = 1,
               nb::arg("num_threads") = 1);
}

}  // namespace enginery
