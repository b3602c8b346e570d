// The shell that ends the workers of a killed parent; see guard.hpp.
#include "guard.hpp"

#include <poll.h>
#include <unistd.h>

#include <cerrno>

#include "types.hpp"

namespace fdfast::replio {

namespace {

// Lines "place pid" until the end of input, then the groups that are left are killed.
constexpr const char* kScript =
    "last=0; while read -r place pid; do eval \"pid_$place=$pid\"; [ \"$place\" -le \"$last\" ] || last=$place; done;"
    " while [ \"$last\" -ge 0 ]; do eval \"pid=\\${pid_$last:-0}\"; [ \"$pid\" -le 1 ] || kill -s KILL -- \"-$pid\";"
    " last=$((last - 1)); done";

bool has_ended(const Child& child, int patience_ms) {
  pollfd ended{child.pidfd.get(), POLLIN, 0};
  int done;
  do {
    done = poll(&ended, 1, patience_ms);
  } while (done < 0 && errno == EINTR);
  return done == 1;
}

}  // namespace

void Guard::start() {
  if (shell_.pid > 0) {
    if (!has_ended(shell_, 0)) return;
    shell_.reap();  // somebody has killed it
    shell_ = Child();
  }
  shell_ = start_process({.argv = {"/bin/sh", "-c", kScript}, .env = {}, .cwd = "/", .dies_with_us = false});
  shell_.out.close();
  shell_.errors.close();
  for (size_t place = 0; place < pids_.size(); ++place) {
    if (pids_[place]) tell(place);
  }
}

void Guard::set(int place, pid_t pid) {
  pids_[static_cast<size_t>(place)] = pid;
  tell(static_cast<size_t>(place));
}

// A line is shorter than a pipe's atomic write, and the pipe holds thousands: if it is full, the shell does not run,
// and must not act on old numbers later. The next start of a worker makes another and tells it all.
void Guard::tell(size_t place) const {
  const std::string line = std::to_string(place) + " " + std::to_string(pids_[place]) + "\n";
  ssize_t done;
  do {
    done = write(shell_.in.get(), line.data(), line.size());
  } while (done < 0 && errno == EINTR);
  if (done < 0 && errno == EAGAIN) shell_.kill_all({}, false);
}

void Guard::close() {
  constexpr int kPatience_ms = 2000;
  if (shell_.pid <= 0) return;
  shell_.in.close();
  if (!has_ended(shell_, kPatience_ms)) shell_.kill_all({}, false);
  if (has_ended(shell_, kPatience_ms)) shell_.reap();
  shell_ = Child();
}

}  // namespace fdfast::replio
