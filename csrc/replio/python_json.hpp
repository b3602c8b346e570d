// Python objects straight from the parser's document.
#pragma once

#include <pybind11/pybind11.h>

#include <string_view>

namespace fdfast::replio {

// As json.loads would give it. Throws a ValueError with the byte offset and an excerpt where the text is no JSON, no
// UTF-8, or nested deeper than kMaxDepth.
pybind11::object python_json(std::string_view text);

}  // namespace fdfast::replio
