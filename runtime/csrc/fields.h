// Reads a Python dict into a struct: each entry by its name, and none that has no name there.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

namespace enginery {

namespace nb = nanobind;

// Faults raise TypeError, as calling a function with wrong arguments does: whoever made the dict is at fault.
class Fields {
  public:
    Fields(nb::handle values, std::string what) : what_(std::move(what)) {
        if (!nb::isinstance<nb::dict>(values)) throw wrong("wanted a dict, got " + type_name(values));
        values_ = nb::borrow<nb::dict>(values);
    }

    template <typename T>
    void required(const char* name, T& value) {
        if (!optional(name, value)) throw wrong("'" + std::string(name) + "' is missing");
    }

    // Leaves `value` as it is where there is no such entry, and returns false.
    template <typename T>
    bool optional(const char* name, T& value) {
        const nb::object entry = take(name);
        if (!entry.is_valid()) return false;
        if (!nb::try_cast<T>(entry, value)) {
            throw wrong("'" + std::string(name) + "' is " + nb::cast<std::string>(nb::repr(entry)).substr(0, 80) +
                        " (" + type_name(entry) + "), which it cannot be");
        }
        return true;
    }

    // Entries that are structs themselves: read(Fields) is called for each.
    template <typename Read>
    void each(const char* name, const Read& read) {
        const nb::object entry = take(name);
        if (!entry.is_valid()) throw wrong("'" + std::string(name) + "' is missing");
        if (!nb::isinstance<nb::sequence>(entry)) throw wrong("'" + std::string(name) + "' is not a list");
        size_t index = 0;
        for (const nb::handle item : entry) {
            Fields fields(item, what_ + "." + name + "[" + std::to_string(index++) + "]");
            read(fields);
            fields.finish();
        }
    }

    bool has(const char* name) const { return values_.contains(name); }

    // The entry as it is; not valid where there is none.
    nb::object take(const char* name) {
        if (!values_.contains(name)) return {};
        names_.emplace_back(name);
        return values_[name];
    }

    // Refuses entries that nobody asked for.
    void finish() const {
        std::string unknown;
        for (const nb::handle key : values_.keys()) {
            const std::string name = nb::cast<std::string>(nb::str(key));
            bool known = false;
            for (const std::string& asked : names_) known = known || asked == name;
            if (!known) unknown += (unknown.empty() ? "'" : ", '") + name + "'";
        }
        if (!unknown.empty()) throw wrong("unknown: " + unknown);
    }

    nb::builtin_exception wrong(const std::string& fault) const {
        return nb::type_error((what_ + ": " + fault).c_str());
    }

  private:
    static std::string type_name(nb::handle value) {
        return nb::cast<std::string>(nb::str(value.type().attr("__name__")));
    }

    nb::dict values_;
    std::string what_;
    std::vector<std::string> names_;
};

}  // namespace enginery
