// JSON for the pool itself; see json.hpp.
#include "json.hpp"

#include <algorithm>
#include <cstdio>

#include "third_party/yyjson/yyjson.h"

namespace fdfast::replio {

namespace {

constexpr size_t kCheckedFirst = 4 << 20;
constexpr const char* kBlanks = " \t\r\n";

}  // namespace

size_t depth_overflow(std::string_view text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) return i;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return std::string_view::npos;
}

Parsed::~Parsed() {
  if (doc) yyjson_doc_free(doc);
}

std::string json_complaint(std::string_view text, const char* what, size_t offset) {
  constexpr size_t kAround = 20;
  const size_t begin = offset > kAround ? offset - kAround : 0;
  std::string shown;
  for (const char c : text.substr(std::min(begin, text.size()), 2 * kAround)) {
    char escaped[8];
    const auto byte = static_cast<unsigned char>(c);
    std::snprintf(escaped, sizeof escaped, byte < 0x20 || byte >= 0x7f ? "\\x%02x" : "%c", byte);
    shown += escaped;
  }
  return "json: the answer is no JSON (" + std::string(what) + " at byte " + std::to_string(offset) + " of " +
         std::to_string(text.size()) + ": \"" + shown + "\"); its bytes are in `raw`";
}

Parsed parse_json(std::string_view text) {
  Parsed parsed;
  // The parser needs 16 bytes a bracket and does not mind depth: a large text of brackets is turned down before.
  if (text.size() >= kCheckedFirst) {
    const size_t at = depth_overflow(text);
    if (at != std::string_view::npos) {
      parsed.error = json_complaint(text, "nested deeper than 512", at);
      return parsed;
    }
  }
  yyjson_read_err error{};
  // The parser does not write to its input unless told to.
  char* const unchanged = const_cast<char*>(text.data());
  parsed.doc = yyjson_read_opts(unchanged, text.size(), YYJSON_READ_BIGNUM_AS_RAW, nullptr, &error);
  if (!parsed.doc) parsed.error = json_complaint(text, text.empty() ? "it is empty" : error.msg, error.pos);
  return parsed;
}

std::optional<int64_t> environment_of(std::string_view text) {
  const Parsed parsed = parse_json(text);
  if (!parsed.doc) return std::nullopt;
  yyjson_val* env = yyjson_obj_get(yyjson_doc_get_root(parsed.doc), "env");
  if (!env || !yyjson_is_int(env)) return std::nullopt;
  return yyjson_get_sint(env);
}

std::string header_command(std::string_view header) {
  std::string text = "{\"cmd\": \"";
  for (const char c : header) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (c == '\n') {
      text += "\\n";
    } else if (byte < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", byte);
      text += escaped;
    } else {
      text += c;
    }
  }
  return text + "\"}";
}

Splice splice_environment(std::string_view command, int64_t env) {
  const size_t open = command.find_first_not_of(kBlanks);
  const size_t first = open == std::string_view::npos ? open : command.find_first_not_of(kBlanks, open + 1);
  const bool empty = first == std::string_view::npos || command[first] == '}';
  return {"{\"env\": " + std::to_string(env) + (empty ? "" : ", "), open + 1};
}

}  // namespace fdfast::replio
