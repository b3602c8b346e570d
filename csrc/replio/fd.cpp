// File descriptors that a forked child does not keep; see fd.hpp.
#include "fd.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "types.hpp"

namespace fdfast::replio {

namespace {

struct Registry {
  std::recursive_mutex mutex;
  std::vector<int> open;
};

// Never destroyed: an I/O thread may outlive the statics at exit.
Registry& registry() {
  static Registry* const all = [] {
    auto* made = new Registry;
    pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                   [] {
                     for (const int fd : registry().open) ::close(fd);
                     registry().open.clear();
                     // Its owner, by number, is a thread of the parent: it can't be unlocked here.
                     new (&registry().mutex) std::recursive_mutex;
                   });
    return made;
  }();
  return *all;
}

// 0, 1 and 2 are what a child's own are made of.
int above_standard(int fd) {
  if (fd > 2) return fd;
  const int moved = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  const int error = errno;
  ::close(fd);
  errno = error;
  return moved;
}

}  // namespace

std::unique_lock<std::recursive_mutex> hold_forks() { return std::unique_lock(registry().mutex); }

Fd::Fd(int fd) : fd_(fd) {
  if (fd < 0) return;
  const auto held = hold_forks();
  registry().open.push_back(fd);
}

Fd& Fd::operator=(Fd&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = other.fd_;
    other.fd_ = -1;
  }
  return *this;
}

void Fd::close() {
  if (fd_ < 0) return;
  const auto held = hold_forks();
  auto& open = registry().open;
  const auto found = std::find(open.begin(), open.end(), fd_);
  if (found != open.end()) {
    *found = open.back();
    open.pop_back();
    ::close(fd_);
  }
  fd_ = -1;
}

Pipe make_pipe() {
  const auto held = hold_forks();
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) throw MachineFault(std::string("pipe: ") + std::strerror(errno));
  const int read = above_standard(ends[0]);
  const int error = errno;
  const int write = above_standard(ends[1]);
  Pipe pipe{Fd(read), Fd(write)};
  if (read < 0 || write < 0) throw MachineFault(std::string("pipe: ") + std::strerror(read < 0 ? error : errno));
  return pipe;
}

}  // namespace fdfast::replio
