// Fuzz target: a stream of any bytes, read in any pieces, gives the frames that the obvious way gives, and no frame
// breaks the JSON behind it. The first byte says how long the pieces are.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "framing.hpp"
#include "json.hpp"

using namespace fdfast::replio;

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

// What a frame is used for; a header's text comes from callers.
void use(std::string_view frame) {
  const Parsed parsed = parse_json(frame);
  require(bool(parsed.doc) == parsed.error.empty());
  const auto env = environment_of(frame);
  require(!env || parsed.doc);
  require(parse_json(header_command(frame)).doc || !parse_json("\"" + std::string(frame) + "\"").doc);
  const size_t open = frame.find_first_not_of(" \t\r\n");
  if (open != std::string_view::npos && frame[open] == '{') {
    const Splice splice = splice_environment(frame, 7);
    const std::string spliced = splice.prefix + std::string(frame.substr(splice.skip));
    require(!parsed.doc || environment_of(spliced));
  }
  depth_overflow(frame);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const size_t piece = 1 + data[0];
  const std::string text(reinterpret_cast<const char*>(data + 1), size - 1);
  FrameReader reader;
  Bytes frame;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    char* const room = reader.room();
    const size_t count = std::min({text.size() - at, reader.room_bytes(), piece});
    text.copy(room, count, at);
    reader.filled(count);
    at += count;
    while (reader.next_frame(frame)) {
      begin = text.find_first_not_of('\n', begin);
      require(begin != std::string::npos);
      const size_t end = text.find("\n\n", begin);
      require(end != std::string::npos && frame.view() == std::string_view(text).substr(begin, end - begin));
      use(frame.view());
      begin = end + 2;
    }
  }
  begin = std::min(text.find_first_not_of('\n', std::min(begin, text.size())), text.size());
  require(text.find("\n\n", begin) == std::string::npos);
  require(reader.pending() == text.size() - begin);
  require(reader.take_rest().view() == std::string_view(text).substr(begin));
  use(text);
  return 0;
}
