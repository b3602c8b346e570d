// One place of the pool and the process in it: what was written to it, what it has printed.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "command.hpp"
#include "framing.hpp"
#include "process.hpp"
#include "types.hpp"

namespace fdfast::replio {

// Something written, or being written, to a worker, that it owes a frame for.
struct Flight {
  enum class Kind : uint8_t { header, command, probe };
  Kind kind;
  Command* command;   // whom it is for
  std::string prefix;  // goes before the body
  std::string_view body;
  std::string_view suffix;
  uint64_t begin = 0;  // offsets in all that was ever written to the process
  uint64_t end = 0;
};

enum class Phase : uint8_t {
  vacant,    // no process
  starting,  // until its `ready` line
  serving,
  dying,     // killed, not reaped
};

struct Worker {
  int index = 0;
  uint32_t generation = 0;  // of the process: events of an earlier one are stale
  Phase phase = Phase::vacant;
  Child child;
  FrameReader out;
  std::string errors;         // the tail of stderr since the last answer
  std::deque<Flight> flights;  // the first is what the worker is at
  std::unordered_map<uint64_t, int64_t> environments;  // header -> env
  uint64_t written = 0;     // bytes, to this process
  uint64_t queued_end = 0;  // end of the last flight
  bool watches_input = false, watches_out = false, watches_errors = false;
  bool unflushed = false;     // a flight has not been written yet
  bool ended = false;         // the process; what it printed may not all be read
  bool retiring = false;      // to be replaced once nothing is in flight
  bool proven = false;        // it has given an answer or its `ready` line
  int64_t served = 0;         // commands
  Time begun{};               // when the first flight became the first
  Time answered{};            // when `unproven` was read
  std::optional<Time> deadline;
  End late = End::timeout;    // what the first flight's command ends as at the deadline
  End verdict = End::crashed;  // what it ends as once the process is reaped
  std::string why;             // why a start failed
  Time looked{};                  // at its memory
  int64_t resident_bytes = 0;     // as of then
  std::optional<Time> next_poll;  // of memory, while it works
  std::vector<Descendant> descendants;  // as of the last poll
  std::optional<Bytes> unproven;  // the answer that a probe is out for
  std::string secret;

  bool holds(const Header& header) const { return header.id == 0 || environments.contains(header.id); }
  // Writes what it owes, as far as the pipe takes it; false where the other end is closed.
  bool write_flights();
  bool wholly_written() const { return written == queued_end; }
  // How much of all that was written the process has taken out of the pipe.
  uint64_t consumed() const;
  // Reads what it says on stderr and keeps the tail; false at its end.
  bool read_errors(size_t tail_bytes);
  enum class Read { more, empty, end };  // what can be read next
  Read read_out(size_t limit_bytes);
};

}  // namespace fdfast::replio
