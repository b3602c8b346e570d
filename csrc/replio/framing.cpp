// Framing by blank line; see framing.hpp.
#include "framing.hpp"

#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fdfast::replio {

namespace {

constexpr size_t kBufferBytes = 64 << 10;
constexpr size_t kLeastRead = 16 << 10;
constexpr size_t kMovedFrom = 16 << 10;  // a smaller frame is copied, so that the buffer stays

}  // namespace

size_t find_blank_line(std::string_view text, size_t from) {
  const char* const data = text.data();
  const size_t size = text.size();
  size_t i = from;
#if defined(__SSE2__)
  const __m128i newline = _mm_set1_epi8('\n');
  for (; i + 17 <= size; i += 16) {
    const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i));
    const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i + 1));
    const int both = _mm_movemask_epi8(_mm_and_si128(_mm_cmpeq_epi8(here, newline), _mm_cmpeq_epi8(next, newline)));
    if (both) return i + static_cast<size_t>(__builtin_ctz(static_cast<unsigned>(both)));
  }
#endif
  while (i + 1 < size) {
    const void* found = std::memchr(data + i, '\n', size - 1 - i);
    if (!found) return kNotFound;
    i = static_cast<size_t>(static_cast<const char*>(found) - data);
    if (data[i + 1] == '\n') return i;
    ++i;
  }
  return kNotFound;
}

void FrameReader::make_room() {
  if (begin_ > 0 && begin_ == buffer_.size()) clear();
  if (room_bytes() >= kLeastRead) return;
  if (begin_ >= buffer_.size() / 2 && begin_ > 0) {
    const size_t left = buffer_.size() - begin_;
    std::memmove(buffer_.data(), buffer_.data() + begin_, left);
    buffer_.resize(left);
    scan_ -= begin_;
    begin_ = 0;
    if (room_bytes() >= kLeastRead) return;
  }
  buffer_.reserve(buffer_.capacity() ? 2 * buffer_.capacity() : kBufferBytes);
}

void FrameReader::skip_newlines() {
  while (begin_ < buffer_.size() && buffer_.data()[begin_] == '\n') ++begin_;
  if (scan_ < begin_) scan_ = begin_;
}

bool FrameReader::next_frame(Bytes& frame) {
  skip_newlines();
  const size_t end = find_blank_line(buffer_.view(), scan_);
  if (end == kNotFound) {
    // The last byte may be the first half of a blank line.
    scan_ = buffer_.size() > begin_ ? buffer_.size() - 1 : begin_;
    return false;
  }
  const size_t length = end - begin_;
  const size_t rest = buffer_.size() - (end + 2);
  if (begin_ == 0 && length >= kMovedFrom && rest <= kMovedFrom) {
    Bytes fresh;
    if (rest) fresh.append(buffer_.view().substr(end + 2));
    frame = std::move(buffer_);
    frame.resize(length);
    frame.trim();
    buffer_ = std::move(fresh);
    begin_ = scan_ = 0;
    return true;
  }
  frame = Bytes(buffer_.view().substr(begin_, length));
  begin_ = scan_ = end + 2;
  if (rest == 0) clear();
  return true;
}

bool FrameReader::next_line(std::string& line) {
  const std::string_view rest = view();
  const size_t end = rest.find('\n');
  if (end == kNotFound) return false;
  line.assign(rest.substr(0, end));
  begin_ += end + 1;
  scan_ = begin_;
  return true;
}

size_t FrameReader::pending() {
  skip_newlines();
  return buffer_.size() - begin_;
}

Bytes FrameReader::take_rest() {
  Bytes rest;
  if (begin_ == 0) {
    rest = std::move(buffer_);
    rest.trim();
  } else {
    rest = Bytes(view());
  }
  buffer_ = Bytes();
  begin_ = scan_ = 0;
  return rest;
}

void FrameReader::clear() {
  buffer_.resize(0);
  begin_ = scan_ = 0;
}

}  // namespace fdfast::replio
