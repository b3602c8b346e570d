// A growable block of bytes that is never filled with zeros, and whose memory can be handed on as it is.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>

namespace fdfast::replio {

class Bytes {
 public:
  Bytes() = default;
  explicit Bytes(std::string_view text) { append(text); }
  Bytes(Bytes&& other) noexcept { swap(other); }
  Bytes& operator=(Bytes&& other) noexcept {
    Bytes moved(std::move(other));
    swap(moved);
    return *this;
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { std::free(data_); }

  char* data() { return data_; }
  const char* data() const { return data_; }
  size_t size() const { return size_; }
  size_t capacity() const { return capacity_; }
  std::string_view view() const { return {data_, size_}; }

  void resize(size_t size) {  // new bytes are whatever was there
    if (size > capacity_) reserve(size);
    size_ = size;
  }
  void reserve(size_t capacity) { reallocate(capacity > capacity_ ? capacity : capacity_); }
  void append(std::string_view text) {
    if (text.empty()) return;
    const size_t old = size_;
    resize(old + text.size());
    std::memcpy(data_ + old, text.data(), text.size());
  }
  // Gives memory back that is not used, where that is most of it.
  void trim() {
    if (size_ > 0 && size_ < capacity_ / 2) reallocate(size_);
  }

 private:
  void swap(Bytes& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }
  void reallocate(size_t capacity) {
    void* moved = std::realloc(data_, capacity);
    if (!moved && capacity) throw std::bad_alloc();
    data_ = static_cast<char*>(moved);
    capacity_ = capacity;
  }

  char* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

}  // namespace fdfast::replio
