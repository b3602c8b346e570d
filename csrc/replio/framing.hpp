// Framing by blank line: where one answer ends in what a worker prints.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "bytes.hpp"

namespace fdfast::replio {

inline constexpr size_t kNotFound = std::string_view::npos;

// The offset of the first "\n\n" at or after `from`, kNotFound if there is none.
size_t find_blank_line(std::string_view text, size_t from = 0);

// Collects what is read from a worker and cuts it into frames. Every byte is looked at once, however small the reads.
class FrameReader {
 public:
  // Where the next read may write, and how much.
  char* room() { return make_room(), buffer_.data() + buffer_.size(); }
  size_t room_bytes() const { return buffer_.capacity() - buffer_.size(); }
  void filled(size_t count) { buffer_.resize(buffer_.size() + count); }

  // Moves the next whole frame, without its blank line, into `frame`; newlines before it are not part of it.
  bool next_frame(Bytes& frame);
  // Moves the next whole line into `line`, without its newline.
  bool next_line(std::string& line);
  // What has come after the last whole frame; newlines alone count as nothing.
  size_t pending();
  std::string_view view() const { return buffer_.view().substr(begin_); }
  Bytes take_rest();
  void clear();

 private:
  void make_room();
  void skip_newlines();

  Bytes buffer_;
  size_t begin_ = 0;  // of the frame that is being read
  size_t scan_ = 0;   // no blank line begins before
};

}  // namespace fdfast::replio
