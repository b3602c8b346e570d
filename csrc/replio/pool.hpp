// A pool of worker processes and its I/O thread: what the bindings wrap. Every call is for any thread.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "ledger.hpp"
#include "loop.hpp"
#include "types.hpp"

namespace fdfast::replio {

class Pool {
 public:
  explicit Pool(Settings settings);  // throws InputFault, MachineFault
  ~Pool() { close(); }

  // Throws std::runtime_error in a process that was forked off the one that made the pool: nothing of it works there.
  void check_process() const;
  bool is_foreign() const;

  // As in fdfast/_replio.pyi. `false`: no room before the end of patience, nothing was taken.
  bool submit(std::vector<std::string> texts, const std::string& header, double timeout_s, bool unique,
              const Patience& patience, TicketId& first, bool chain = false);
  Counts counts();  // with the memory of today
  Ledger& ledger() { return ledger_; }
  const Settings& settings() const { return settings_; }
  void close();

 private:
  const Settings settings_;
  const pid_t process_;
  Ledger ledger_;
  Loop loop_;
  std::mutex closing_;
  std::thread thread_;
};

}  // namespace fdfast::replio
