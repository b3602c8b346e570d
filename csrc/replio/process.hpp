// One worker process: start it, end it with all that it started, measure it.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fd.hpp"

namespace fdfast::replio {

// What to start; made once, since the environment may change while we run.
struct Launch {
  std::vector<std::string> argv;
  std::vector<std::string> env;  // NAME=value
  std::string cwd;
  bool dies_with_us = true;  // it is killed when the thread that started it ends
};

// A process that some worker started, by its start time too: its number may be another's by now.
struct Descendant {
  pid_t pid;
  uint64_t start_ticks;
};

struct Child {
  pid_t pid = -1;
  Fd pidfd;  // readable once the process has ended
  Fd in, out, errors;

  // Kills the process's group, and those of `known` and, if the process lives, of today's descendants who left it.
  // Before `reap`: until then nobody else can have the number.
  void kill_all(const std::vector<Descendant>& known, bool lives) const;
  // The status of an ended process, as in Answer; none where somebody else has reaped it.
  std::optional<int> reap();
};

// Starts a process in a session of its own, with pipes for its standard streams (our ends are non-blocking) and no
// other descriptor. It costs no copy of our page tables. Throws MachineFault with the system call that failed and why.
Child start_process(const Launch& launch);

// Resident bytes of a process and its descendants, who are put into `found`. Pages that they share count for each.
int64_t resident_bytes(pid_t pid, std::vector<Descendant>& found);

}  // namespace fdfast::replio
