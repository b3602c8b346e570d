// Framing and JSON: every way to cut a stream gives the same frames, and no text breaks the parser.
#include <algorithm>
#include <random>
#include <vector>

#include "check.hpp"
#include "framing.hpp"
#include "json.hpp"
#include "third_party/yyjson/yyjson.h"

using namespace fdfast::replio;

namespace {

std::string random_text(std::mt19937& random, size_t size, int newline_in) {
  std::string text(size, 'x');
  for (char& c : text) {
    if (random() % static_cast<unsigned>(newline_in) == 0) c = '\n';
  }
  return text;
}

// The obvious way: whole frames between blank lines, newlines before a frame left out.
std::vector<std::string> frames_of(const std::string& text) {
  std::vector<std::string> frames;
  size_t begin = 0;
  while (true) {
    begin = text.find_first_not_of('\n', begin);
    if (begin == std::string::npos) return frames;
    const size_t end = text.find("\n\n", begin);
    if (end == std::string::npos) return frames;
    frames.push_back(text.substr(begin, end - begin));
    begin = end + 2;
  }
}

std::vector<std::string> read_in_pieces(const std::string& text, std::mt19937& random, size_t most) {
  FrameReader reader;
  std::vector<std::string> frames;
  Bytes frame;
  for (size_t at = 0; at < text.size();) {
    char* const room = reader.room();
    const size_t count = std::min<size_t>({text.size() - at, reader.room_bytes(), 1 + random() % most});
    text.copy(room, count, at);
    reader.filled(count);
    at += count;
    while (reader.next_frame(frame)) frames.emplace_back(frame.view());
  }
  return frames;
}

void a_blank_line_is_found_where_find_finds_it() {
  std::mt19937 random(1);
  for (int round = 0; round < 3000; ++round) {
    const std::string text = random_text(random, random() % 80, 2 + static_cast<int>(random() % 30));
    const size_t from = text.empty() ? 0 : random() % text.size();
    CHECK(find_blank_line(text, from) == text.find("\n\n", from));
  }
}

void a_stream_gives_the_same_frames_however_it_is_cut() {
  std::mt19937 random(2);
  for (int round = 0; round < 300; ++round) {
    // Frames of all sizes about the two limits: copied or moved (16 KiB), and the buffer's first size (64 KiB).
    std::string text;
    const size_t longest = round % 2 ? 300 : 90'000;
    for (int part = 0; part < 6; ++part) text += random_text(random, random() % longest, 60) + "\n\n";
    text += random_text(random, random() % 100, 40);
    const auto expected = frames_of(text);
    CHECK(read_in_pieces(text, random, round % 3 ? 1 << 20 : 100) == expected);
  }
}

void what_follows_the_last_frame_is_kept() {
  FrameReader reader;
  const std::string text = "ready\n\n\n{\"env\": 1}\n\n\nrest";
  text.copy(reader.room(), text.size());
  reader.filled(text.size());
  std::string line;
  Bytes frame;
  CHECK(reader.next_line(line) && line == "ready");
  CHECK(reader.next_frame(frame) && frame.view() == "{\"env\": 1}");
  CHECK(!reader.next_frame(frame));
  CHECK(reader.pending() == 4);
  CHECK(reader.take_rest().view() == "rest");
  CHECK(reader.pending() == 0);
}

void an_environment_is_read_from_an_object_alone() {
  CHECK(environment_of("{\"messages\": [], \"env\": 7}") == 7);
  CHECK(environment_of(" {\"env\": 0}\n") == 0);
  for (const char* text : {"", "{}", "[7]", "7", "{\"env\": \"7\"}", "{\"env\": 1.5}", "{\"env\": 7",
                           "{\"a\": {\"env\": 7}}", "{\"message\": \"no\"}", "\xff"}) {
    CHECK_SEEING(!environment_of(text), text);
  }
}

void a_header_is_escaped_into_a_command() {
  CHECK(header_command("import A\nopen \"B\" \\ \t\xe2\x88\x80") ==
        "{\"cmd\": \"import A\\nopen \\\"B\\\" \\\\ \\u0009\xe2\x88\x80\"}");
  const Parsed parsed = parse_json(header_command(std::string("\0\x1f\x7f", 3)));
  CHECK(parsed.doc && std::string(yyjson_get_str(yyjson_obj_get(yyjson_doc_get_root(parsed.doc), "cmd")), 3) ==
                          std::string("\0\x1f\x7f", 3));
}

void an_environment_is_put_first_into_a_command() {
  const auto spliced = [](std::string text, int64_t env) {
    const Splice splice = splice_environment(text, env);
    return splice.prefix + text.substr(splice.skip);
  };
  CHECK(spliced("{\"cmd\": \"x\"}", 3) == "{\"env\": 3, \"cmd\": \"x\"}");
  CHECK(spliced(" {  }", 0) == "{\"env\": 0  }");
  CHECK(spliced("{}", 12) == "{\"env\": 12}");
  CHECK(spliced("{", 1) == "{\"env\": 1");
}

void a_text_that_is_no_json_is_refused_with_its_place() {
  CHECK(parse_json("{\"a\": [1, 2.5e3, null, true, \"\\u00e9\"]}").doc);
  CHECK(parse_json("123456789012345678901234567890").doc);
  const std::string error = parse_json("{\"a\": 1, oops}").error;
  CHECK_SEEING(error.find("at byte 9 of 14") != std::string::npos && error.find("oops") != std::string::npos, error);
  for (const char* text : {"", " ", "{", "nul", "NaN", "{} {}", "\"\xff\"", "\"\\ud800\"", "\"\n\"", "[1,]"}) {
    const Parsed parsed = parse_json(text);
    CHECK_SEEING(!parsed.doc && !parsed.error.empty(), text);
  }
  const std::string deep(8 << 20, '[');
  CHECK(parse_json(deep).error.find("deeper than 512 at byte 512") != std::string::npos);
  CHECK(depth_overflow("[\"[[\\\"[\", {}]") == kNotFound);
}

}  // namespace

int main() {
  a_blank_line_is_found_where_find_finds_it();
  a_stream_gives_the_same_frames_however_it_is_cut();
  what_follows_the_last_frame_is_kept();
  an_environment_is_read_from_an_object_alone();
  a_header_is_escaped_into_a_command();
  an_environment_is_put_first_into_a_command();
  a_text_that_is_no_json_is_refused_with_its_place();
  return checks::result("text");
}
