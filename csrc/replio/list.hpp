// A list through links that lie in its members: nothing is allocated, and a member is taken out where it stands.
#pragma once

#include <cstddef>

namespace fdfast::replio {

template <typename T>
struct Link {
  T* before = nullptr;
  T* after = nullptr;
};

template <typename T, Link<T> T::*link>
class List {
 public:
  bool empty() const { return !front_; }
  size_t size() const { return size_; }
  T* front() const { return front_; }
  static T* after(const T* item) { return (item->*link).after; }

  void push_back(T* item) { insert(item, back_, nullptr); }
  void push_front(T* item) { insert(item, nullptr, front_); }
  void erase(T* item) {
    Link<T>& own = item->*link;
    (own.before ? (own.before->*link).after : front_) = own.after;
    (own.after ? (own.after->*link).before : back_) = own.before;
    own = {};
    --size_;
  }

 private:
  void insert(T* item, T* before, T* after) {
    item->*link = {before, after};
    (before ? (before->*link).after : front_) = item;
    (after ? (after->*link).before : back_) = item;
    ++size_;
  }

  T* front_ = nullptr;
  T* back_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fdfast::replio
