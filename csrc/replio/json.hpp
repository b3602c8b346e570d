// JSON for the pool itself: header commands out, their environment back, and why a text is no JSON.
#pragma once

#include <optional>
#include <string>
#include <string_view>

struct yyjson_doc;

namespace fdfast::replio {

inline constexpr int kMaxDepth = 512;

// A parsed text; `doc` is null where it is no JSON, and then `error` says why, with the byte offset and an excerpt.
struct Parsed {
  yyjson_doc* doc = nullptr;
  std::string error;

  Parsed() = default;
  Parsed(Parsed&& other) noexcept : doc(other.doc), error(std::move(other.error)) { other.doc = nullptr; }
  Parsed& operator=(Parsed&&) = delete;
  ~Parsed();
};
Parsed parse_json(std::string_view text);

// Where the nesting goes deeper than kMaxDepth, npos if nowhere.
size_t depth_overflow(std::string_view text);

// What to say of a text that goes wrong at `offset`.
std::string json_complaint(std::string_view text, const char* what, size_t offset);

// The integer "env" of an object, if `text` is one that has it.
std::optional<int64_t> environment_of(std::string_view text);

// {"cmd": "<header>"}
std::string header_command(std::string_view header);

// The text that opens a command sent into environment `env`, and where in the command (an object's text) to go on
// after it.
struct Splice {
  std::string prefix;
  size_t skip;
};
Splice splice_environment(std::string_view command, int64_t env);

}  // namespace fdfast::replio
