// Python objects straight from the parser's document; see python_json.hpp.
#include "python_json.hpp"

#include <array>
#include <cstring>

#include "json.hpp"
#include "third_party/yyjson/yyjson.h"

namespace py = pybind11;

namespace fdfast::replio {

namespace {

constexpr size_t kParsedWithoutGil = 64 << 10;
constexpr size_t kLongestKey = 32;

struct TooDeep {};

PyObject* checked(PyObject* made) {
  if (!made) throw py::error_already_set();
  return made;
}

// Builds one document. Keys repeat (a message has the same ten), so each is made once.
class Builder {
 public:
  py::object build(yyjson_val* value, int depth) {
    switch (yyjson_get_type(value)) {
      case YYJSON_TYPE_STR:
        return text(value);
      case YYJSON_TYPE_ARR:
        return array(value, depth);
      case YYJSON_TYPE_OBJ:
        return object(value, depth);
      case YYJSON_TYPE_BOOL:
        return py::bool_(yyjson_get_bool(value));
      case YYJSON_TYPE_NUM:
        return number(value);
      case YYJSON_TYPE_RAW:
        return large_number(value);
      default:
        return py::none();
    }
  }

 private:
  static py::object steal(PyObject* made) { return py::reinterpret_steal<py::object>(checked(made)); }

  static py::object text(yyjson_val* value) {
    return steal(PyUnicode_DecodeUTF8(yyjson_get_str(value), static_cast<Py_ssize_t>(yyjson_get_len(value)), nullptr));
  }

  static py::object number(yyjson_val* value) {
    if (yyjson_is_uint(value)) return steal(PyLong_FromUnsignedLongLong(yyjson_get_uint(value)));
    if (yyjson_is_sint(value)) return steal(PyLong_FromLongLong(yyjson_get_sint(value)));
    return steal(PyFloat_FromDouble(yyjson_get_real(value)));
  }

  // One that fits no machine word: an integer of any length, or a float that overflows.
  static py::object large_number(yyjson_val* value) {
    const std::string digits(yyjson_get_raw(value), yyjson_get_len(value));
    if (digits.find_first_of(".eE") == std::string::npos) return steal(PyLong_FromString(digits.c_str(), nullptr, 10));
    return steal(PyFloat_FromDouble(std::strtod(digits.c_str(), nullptr)));
  }

  py::object array(yyjson_val* value, int depth) {
    if (depth >= kMaxDepth) throw TooDeep{};
    py::object list = steal(PyList_New(static_cast<Py_ssize_t>(yyjson_arr_size(value))));
    size_t i, size;
    yyjson_val* item;
    yyjson_arr_foreach(value, i, size, item) {
      PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), build(item, depth + 1).release().ptr());
    }
    return list;
  }

  py::object object(yyjson_val* value, int depth) {
    if (depth >= kMaxDepth) throw TooDeep{};
    py::object dict = steal(PyDict_New());
    size_t i, size;
    yyjson_val *name, *item;
    yyjson_obj_foreach(value, i, size, name, item) {
      const py::object under = key(name);
      const py::object made = build(item, depth + 1);
      if (PyDict_SetItem(dict.ptr(), under.ptr(), made.ptr()) != 0) throw py::error_already_set();
    }
    return dict;
  }

  py::object key(yyjson_val* name) {
    const std::string_view characters(yyjson_get_str(name), yyjson_get_len(name));
    if (characters.size() > kLongestKey) return text(name);
    size_t hash = characters.size();
    for (const char c : characters) hash = hash * 31 + static_cast<unsigned char>(c);
    Kept& kept = keys_[hash % keys_.size()];
    if (!kept.object || kept.characters != characters) kept = {characters, text(name)};
    return kept.object;
  }

  struct Kept {
    std::string_view characters;  // in the document
    py::object object;
  };
  std::array<Kept, 128> keys_;
};

// No collections meanwhile: a document holds no cycles, and thousands of new objects would start one after the other,
// each over all that the process holds.
class WithoutCollections {
 public:
  WithoutCollections() : was_enabled_(PyGC_Disable()) {}
  ~WithoutCollections() {
    if (was_enabled_) PyGC_Enable();
  }
  WithoutCollections(const WithoutCollections&) = delete;
  WithoutCollections& operator=(const WithoutCollections&) = delete;

 private:
  const int was_enabled_;
};

[[noreturn]] void raise(const std::string& complaint) {
  throw py::value_error(complaint);
}

}  // namespace

py::object python_json(std::string_view text) {
  const auto parse = [&] {
    if (text.size() < kParsedWithoutGil) return parse_json(text);
    const py::gil_scoped_release no_gil;
    return parse_json(text);
  };
  const Parsed parsed = parse();
  if (!parsed.doc) raise(parsed.error);
  try {
    const WithoutCollections none;
    return Builder().build(yyjson_doc_get_root(parsed.doc), 0);
  } catch (const TooDeep&) {
    raise(json_complaint(text, "nested deeper than 512", depth_overflow(text)));
  }
}

}  // namespace fdfast::replio
