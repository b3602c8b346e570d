// The words of the pool: its settings, and what comes back for a command.
//
// Legend: a *worker* is a process; a *command* is a text to run once; a *ticket* is a caller's claim to its answer, and
// several tickets share a command when their texts are equal; a *frame* is what a worker prints up to a blank line.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bytes.hpp"

namespace fdfast::replio {

using Clock = std::chrono::steady_clock;  // CLOCK_MONOTONIC
using Time = Clock::time_point;
using TicketId = int64_t;

inline Time after(Time start, double seconds) {
  constexpr double kForever_s = 1e8;  // three years; more would overflow
  return start + std::chrono::duration_cast<Clock::duration>(
                     std::chrono::duration<double>(seconds < kForever_s ? seconds : kForever_s));
}

inline double seconds_between(Time start, Time end) { return std::chrono::duration<double>(end - start).count(); }

enum class Mode { repl, once };

enum class End : uint8_t { answer, timeout, memory, crashed, cancelled, header, overflow, forged, unavailable };
inline constexpr std::array<const char*, 9> kEndNames = {"answer",   "timeout", "memory",   "crashed", "cancelled",
                                                         "header",   "overflow", "forged", "unavailable"};

// Each field is described in fdfast/_replio.pyi.
struct Settings {
  std::vector<std::string> argv;
  Mode mode = Mode::repl;
  int workers = 1;
  std::vector<std::string> env;  // NAME=value
  std::string cwd;
  double timeout_s = 60;
  double start_timeout_s = 120;
  std::string ready;
  int64_t memory_bytes = 0;
  int64_t recycle_bytes = 0;
  int64_t recycle_after = 0;
  double poll_s = 0.02;
  int64_t answer_bytes = int64_t{256} << 20;
  int64_t stderr_bytes = 64 << 10;
  int64_t queue_bytes = int64_t{256} << 20;
  int depth = 1;
  int64_t cache_bytes = 0;
  std::string probe;
  int max_restarts = 5;
};

// What a worker printed for a command; tickets that share the command share it.
struct Payload {
  Bytes raw;
  std::string errors;
};

struct Answer {
  TicketId ticket = -1;
  End end = End::answer;
  bool shared = false;
  std::optional<int> status;  // of the worker's end: its exit status, or minus the signal
  int pid = 0;
  double seconds = 0;
  double queued_s = 0;
  std::shared_ptr<const Payload> payload;

  Answer() = default;
  explicit Answer(End how) : end(how) {}
};

// What an answer holds in memory that is not another ticket's too.
inline int64_t payload_bytes(const Answer& answer) {
  if (answer.shared || !answer.payload) return 0;
  return static_cast<int64_t>(answer.payload->raw.size() + answer.payload->errors.size());
}

// The caller's fault: becomes fdfast.errors.InputError.
struct InputFault : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The machine's: becomes fdfast.errors.MachineError.
struct MachineFault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace fdfast::replio
