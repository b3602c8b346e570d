// File descriptors that a forked child of ours does not keep.
//
// A child made by fork() (multiprocessing, os.fork) holds a copy of each pipe, and a worker would wait forever for the
// end of its input. So every descriptor is listed, and closed in such a child before fork() returns there.
#pragma once

#include <mutex>

namespace fdfast::replio {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd);  // takes `fd` over and lists it
  Fd(Fd&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Fd& operator=(Fd&& other) noexcept;
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { close(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void close();

 private:
  int fd_ = -1;
};

// fork() in another thread waits while this is held: between opening and listing.
std::unique_lock<std::recursive_mutex> hold_forks();

struct Pipe {
  Fd read, write;
};
// Close-on-exec, and never 0, 1 or 2. Throws MachineFault.
Pipe make_pipe();

}  // namespace fdfast::replio
