// An eventfd: raised by one thread, waited for by another.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "fd.hpp"
#include "types.hpp"

namespace fdfast::replio {

inline Fd make_event() {
  const auto held = hold_forks();
  const int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) throw MachineFault(std::string("Pool: eventfd: ") + std::strerror(errno) + "; raise `ulimit -n`");
  return Fd(fd);
}

inline void raise_event(const Fd& event) {
  const uint64_t one = 1;
  while (write(event.get(), &one, sizeof one) < 0 && errno == EINTR) {
  }
}

inline void clear_event(const Fd& event) {
  uint64_t count;
  while (read(event.get(), &count, sizeof count) < 0 && errno == EINTR) {
  }
}

}  // namespace fdfast::replio
