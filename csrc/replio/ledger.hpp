// The books of a pool: which commands wait, which tickets they answer, which answers nobody has fetched yet.
//
// Callers' threads and the I/O thread share them under `mutex`; what is said to need it is called with it held. Every
// ticket is in the books from `submit` until its answer is handed out, and gets exactly one.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "command.hpp"
#include "fd.hpp"
#include "list.hpp"
#include "types.hpp"

namespace fdfast::replio {

struct Counts {
  int64_t submitted = 0, answered = 0, shared = 0, starts = 0, restarts = 0, failed_starts = 0, recycled = 0,
          killed_timeout = 0, killed_memory = 0, killed_overflow = 0, killed_cancelled = 0, crashed = 0, forged = 0,
          unsolicited = 0, requeued = 0, headers = 0, workers_alive = 0, rss_bytes = 0, queued = 0, running = 0,
          unfetched = 0, held_bytes = 0;
};

// How long a caller's thread waits: until a time, or until `interrupted`, which it asks every `slice` without holding
// anything.
struct Patience {
  Time until;
  Clock::duration slice = std::chrono::hours(24);
  std::function<bool()> interrupted;
};

// All counts, by the names of `Pool.stats`.
std::vector<std::pair<const char*, int64_t>> named(const Counts& counts);

class Ledger {
 public:
  explicit Ledger(const Settings& settings);

  // ---- Callers' threads, without the mutex.
  enum class Booked { all, full, closed };
  // Books the commands as consecutive tickets from `first` on. `full`: nothing was booked, and the texts are as before.
  // A chain's are unique, and but for its first they wait for `follow`.
  Booked submit(std::vector<std::string>& texts, const std::string& header, double timeout_s, bool unique,
                TicketId& first, bool chain);
  // Waits until so many bytes have room, or the pool is closed; false at the end of patience.
  bool wait_for_room(size_t bytes, const Patience& patience);
  enum class Got { answer, none, out_of_patience };
  // Moves the next answer out; none: no ticket is outstanding.
  Got next(Answer& answer, const Patience& patience);
  // Moves this one's, which `next` can't give meanwhile; none: it has been fetched.
  Got wait(TicketId ticket, Answer& answer, const Patience& patience);
  std::vector<Answer> ready();
  bool was_issued(TicketId ticket);
  int cancel(const std::vector<TicketId>& tickets);
  int ready_fd();  // an eventfd, readable while `ready` would give something
  Counts counts();
  std::vector<int> pids();
  void request_stop();

  // ---- The I/O thread, with the mutex held.
  std::mutex mutex;
  // The next command for a worker that holds the environments of the headers for which `holds(header)` is true. Those
  // go first for a while, then the oldest; with `only_held` no others are given. Null: none.
  template <typename Holds>
  Command* take(const Holds& holds, bool only_held, Time now);
  // What the worker that has answered this command must run next; null: the command ends no chain's part. To be called
  // before `finish`, which otherwise ends the rest of the chain too.
  Command* follow(Command* command);
  // Answers the command's tickets and frees it; `begun` is when it was written to a worker.
  void finish(Command* command, Answer answer, Time begun);
  void requeue(Command* command);                // in front of all that wait
  void finish_queued(const Answer& answer, const Header* header);  // all that wait under the header; null: under any
  int take_news() { return std::exchange(news_, 0); }  // answers since, that a thread in `next` waits for
  bool any_queued() const { return !queue_.empty() && !paused(); }
  size_t queued() const { return queue_.size(); }
  bool stopping() const { return stopping_; }
  // Whether a submit must wake the I/O thread, since a worker has nothing to do.
  void set_hungry(bool hungry) { hungry_ = hungry; }
  std::vector<Command*> unwanted;  // running, and all their tickets are cancelled
  std::vector<int> worker_pids;
  Counts count;

  // ---- The I/O thread, without the mutex.
  int wake_fd() const { return wake_.get(); }
  void clear_wake();
  void notify(int news);  // wakes those who wait for any answer

 private:
  struct Waiter {
    std::condition_variable woken;
    Waiter* next = nullptr;
  };
  struct Ticket {
    TicketId id = -1;
    Command* command = nullptr;  // until it is answered
    Time queued{};
    bool listed = false;          // in ready_
    Waiter* waiters = nullptr;    // threads that wait for this one by name
    Answer answer;
    Link<Ticket> in_ready;
  };

  Command* book(std::string& text, Header* header, double timeout_s, bool unique, bool follows, Time now);
  void settle(Ticket& ticket, Answer answer);
  void list(Ticket& ticket);
  Answer hand_out(Ticket& ticket);
  void leave(Ticket& ticket, Waiter& waiter);
  void enqueue(Command* command, bool front);
  void unqueue(Command* command);
  void release(Command* command, const Answer& answer);
  void forget(Command* command);
  Header* header_of(const std::string& text);
  void wake();
  bool rest(std::unique_lock<std::mutex>& lock, std::condition_variable& woken, const Patience& patience);
  bool paused() const { return ready_bytes_ >= settings_.queue_bytes && ticket_waiters_ == 0; }
  bool has_room(size_t bytes) const {
    const int64_t held = command_bytes_ + ready_bytes_;
    return held == 0 || held + static_cast<int64_t>(bytes) <= settings_.queue_bytes;
  }

  const Settings& settings_;
  TicketId next_ticket_ = 0;
  std::unordered_map<TicketId, Ticket> tickets_;  // its nodes do not move
  List<Ticket, &Ticket::in_ready> ready_;         // answered, and no thread waits for it by name
  std::condition_variable any_ready_, room_;
  int next_waiters_ = 0, room_waiters_ = 0, ticket_waiters_ = 0;
  int news_ = 0;

  List<Command, &Command::in_all> queue_;
  Time front_since_{};  // since when the oldest command has been the oldest
  std::unordered_map<std::string, std::unique_ptr<Header>> headers_;
  uint64_t last_header_ = 0;
  std::vector<Header*> active_;  // that have commands in the queue
  std::unordered_map<CommandKey, Command*, CommandKeyHash> in_flight_;  // queued or running, not `unique`
  AnswerCache cache_;
  int64_t command_bytes_ = 0, ready_bytes_ = 0;
  bool stopping_ = false, hungry_ = true, ready_fd_set_ = false;
  Fd wake_, ready_fd_;  // the second is made when it is asked for
};

template <typename Holds>
Command* Ledger::take(const Holds& holds, bool only_held, Time now) {
  constexpr double kPatience_s = 1.0;  // for so long others may overtake the oldest command
  if (queue_.empty() || paused()) return nullptr;
  Command* chosen = queue_.front();
  if (!holds(*chosen->header) && (only_held || seconds_between(front_since_, now) < kPatience_s)) {
    Command* held = nullptr;
    for (const Header* header : active_) {
      Command* const first = header->queue.front();
      if (holds(*header) && (!held || first->tickets.front() < held->tickets.front())) held = first;
    }
    if (held) chosen = held;
    else if (only_held) return nullptr;
  }
  unqueue(chosen);
  chosen->running = true;
  ++count.running;
  return chosen;
}

}  // namespace fdfast::replio
