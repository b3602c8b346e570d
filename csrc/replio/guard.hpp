// What a killed parent leaves to others: a shell that ends the workers' process groups.
//
// The kernel kills a worker when our process dies (PR_SET_PDEATHSIG), but not what that worker has started: `lake exe
// repl` runs the REPL as its child. So a small shell waits for the end of a pipe from us, which comes however we die,
// and kills the groups that it was told of. It is not the worker's parent and has a session of its own.
#pragma once

#include <sys/types.h>

#include "process.hpp"

namespace fdfast::replio {

class Guard {
 public:
  explicit Guard(int places) : pids_(static_cast<size_t>(places)) {}
  void start();  // if it does not run; throws MachineFault
  void set(int place, pid_t pid);  // 0: none; to be told before the process is reaped
  void close();

 private:
  void tell(size_t place) const;

  Child shell_;
  std::vector<pid_t> pids_;
};

}  // namespace fdfast::replio
