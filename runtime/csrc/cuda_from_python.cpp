#include "cuda_from_python.h"

#include <algorithm>
#include <optional>

#include "from_python.h"

namespace enginery {
namespace {

// The place of `name` among names, as an enumeration.
template <typename Enum, size_t kCount>
Enum choose(const Fields& fields, const char* field, const std::array<const char*, kCount>& names,
            const std::string& name) {
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) throw fields.wrong(std::string("'") + field + "' is '" + name + "', which it cannot be");
    return static_cast<Enum>(found - names.begin());
}

ParameterKind parameter_kind(const Fields& fields, const std::string& name) {
    return choose<ParameterKind>(fields, "parameter", std::array{"pointer", "i32", "fp32"}, name);
}

void push(Expression& expression, nb::handle value, size_t depth, const Fields& fields) {
    if (nb::isinstance<nb::str>(value)) return expression.push_variable(find_variable(nb::cast<std::string>(value)));
    if (nb::isinstance<nb::int_>(value)) return expression.push_constant(nb::cast<int64_t>(value));
    if (!nb::isinstance<nb::list>(value) || nb::len(value) != 3 || depth > Expression::kDeepest) {
        throw fields.wrong("neither a number, nor a variable, nor [operator, left, right]");
    }
    push(expression, value[1], depth + 1, fields);
    push(expression, value[2], depth + 1, fields);
    expression.push_operator(nb::cast<std::string>(value[0]));
}

Expression read_expression(nb::handle value, const Fields& fields) {
    Expression expression;
    push(expression, value, 0, fields);
    expression.finish();
    return expression;
}

KernelSpec read_kernel(Fields& fields) {
    KernelSpec kernel;
    fields.required("name", kernel.name);
    fields.required("symbol", kernel.symbol);
    const nb::object cubin = fields.take("cubin");
    if (!cubin.is_valid() || !nb::isinstance<nb::bytes>(cubin)) throw fields.wrong("'cubin' is not bytes");
    const auto code = nb::borrow<nb::bytes>(cubin);
    kernel.cubin.assign(code.c_str(), code.size());
    fields.required("num_warps", kernel.num_warps);
    fields.required("shared_bytes", kernel.shared_bytes);
    std::vector<std::string> parameters;
    fields.required("parameters", parameters);
    for (const std::string& name : parameters) kernel.parameters.push_back(parameter_kind(fields, name));
    fields.required("hidden", kernel.hidden);
    fields.required("pdl", kernel.pdl);
    return kernel;
}

void read_pointer(Fields& fields, ArgumentSpec& argument) {
    std::string kind, access;
    fields.required("kind", kind);
    argument.kind =
        choose<OperandKind>(fields, "kind", std::array{"buffer", "weight", "input", "state", "peers"}, kind);
    fields.required("index", argument.index);
    fields.required("target", argument.target);
    fields.required("offset", argument.offset);
    argument.extent = read_expression(fields.take("extent"), fields);
    fields.required("access", access);
    argument.access = choose<Access>(fields, "access", std::array{"r", "w", "rw"}, access);
    fields.required("layer", argument.layer);
}

ArgumentSpec read_argument(Fields& fields) {
    ArgumentSpec argument;
    std::string parameter;
    fields.required("name", argument.name);
    fields.required("parameter", parameter);
    argument.parameter = parameter_kind(fields, parameter);
    if (argument.parameter == ParameterKind::kPointer) {
        read_pointer(fields, argument);
    } else if (argument.parameter == ParameterKind::kF32) {
        fields.required("value", argument.real);
    } else {
        argument.integer = read_expression(fields.take("value"), fields);
    }
    return argument;
}

SumSpec read_sums(nb::handle values, const std::vector<ArgumentSpec>& arguments) {
    Fields fields(values, "sums");
    SumSpec sums;
    fields.required("part", sums.part);
    fields.required("sum", sums.sum);
    fields.finish();
    const auto is = [&](size_t place, OperandKind kind) {
        return place < arguments.size() && arguments[place].parameter == ParameterKind::kPointer &&
               arguments[place].kind == kind;
    };
    if (is(sums.part, OperandKind::kPeers) && is(sums.sum, OperandKind::kBuffer)) return sums;
    throw fields.wrong("no argument of peers and one of a buffer");
}

LaunchSpec read_launch(Fields& fields) {
    LaunchSpec launch;
    fields.required("kernel", launch.kernel);
    fields.required("region", launch.region);
    const nb::object grid = fields.take("grid");
    if (!grid.is_valid() || nb::len(grid) != launch.grid.size()) throw fields.wrong("'grid' is not three expressions");
    for (size_t axis = 0; axis < launch.grid.size(); ++axis) launch.grid[axis] = read_expression(grid[axis], fields);
    fields.each("arguments", [&](Fields& entry) { launch.arguments.push_back(read_argument(entry)); });
    launch.guard = read_guard(fields, "a launch");
    if (fields.has("sums")) launch.sums = read_sums(fields.take("sums"), launch.arguments);
    return launch;
}

}  // namespace

std::vector<LaunchSpec> read_launches(Fields& fields, const char* name) {
    std::vector<LaunchSpec> launches;
    if (!fields.has(name)) return launches;
    fields.each(name, [&](Fields& entry) { launches.push_back(read_launch(entry)); });
    return launches;
}

CudaSpec read_cuda_spec(Fields& fields) {
    CudaSpec spec;
    fields.required("arch", spec.arch);
    fields.required("shared_bytes", spec.shared_bytes);
    fields.required("tile_tokens", spec.tile_tokens);
    fields.required("max_blocks", spec.max_blocks);
    fields.required("max_edits", spec.max_edits);
    fields.each("kernels", [&](Fields& entry) { spec.kernels.push_back(read_kernel(entry)); });
    return spec;
}

}  // namespace enginery
