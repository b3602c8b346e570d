// The books of a pool, as its I/O thread sees them; see ledger.hpp. The callers' side is in
// ledger_callers.cpp.
#include "ledger.hpp"

#include <algorithm>

#include "event.hpp"

namespace fdfast::replio {

Ledger::Ledger(const Settings& settings) : settings_(settings), cache_(settings.cache_bytes), wake_(make_event()) {}

Command* Ledger::follow(Command* command) {
  Command* const next = std::exchange(command->then, nullptr);
  if (!next) return nullptr;
  if (next->tickets.empty()) {  // cancelled meanwhile
    finish(next, Answer(End::cancelled), Clock::now());
    return nullptr;
  }
  next->pending = false;
  next->running = true;
  ++count.running;
  return next;
}

void Ledger::finish(Command* command, Answer answer, Time begun) {
  Command* const then = std::exchange(command->then, nullptr);
  const End rest = answer.end == End::cancelled ? End::cancelled : End::header;
  if (command->running) {
    command->running = false;
    --count.running;
  } else if (!command->pending) {
    unqueue(command);
  }
  if (command->tickets.empty()) {
    std::erase(unwanted, command);
  }
  for (const TicketId id : command->tickets) {
    Ticket& ticket = tickets_.at(id);
    answer.queued_s = std::max(0.0, seconds_between(ticket.queued, begun));
    settle(ticket, answer);
    answer.shared = true;
  }
  answer.shared = false;
  release(command, answer);
  if (then) finish(then, Answer(rest), begun);
}

// Out of the books, into the cache if it may be.
void Ledger::release(Command* command, const Answer& answer) {
  const std::unique_ptr<Command> freed(command);
  command_bytes_ -= static_cast<int64_t>(command->text.size());
  --command->header->commands;
  if (!command->unique) {
    forget(command);
    if (answer.end == End::answer) cache_.keep(*command, answer);
  }
  if (room_waiters_) room_.notify_all();
}

// From now on nobody shares the command's answer.
void Ledger::forget(Command* command) {
  const auto found = in_flight_.find(command->key);
  if (found != in_flight_.end() && found->second == command) in_flight_.erase(found);
}

void Ledger::settle(Ticket& ticket, Answer answer) {
  answer.ticket = ticket.id;
  ticket.command = nullptr;
  ticket.answer = std::move(answer);
  ++count.answered;
  if (ticket.answer.shared) ++count.shared;
  ready_bytes_ += payload_bytes(ticket.answer);
  if (!ticket.waiters) list(ticket);
  // Under the mutex: a waiter lives on the stack of a thread that may leave at once.
  for (Waiter* waiter = ticket.waiters; waiter; waiter = waiter->next) waiter->woken.notify_one();
}

void Ledger::list(Ticket& ticket) {
  ready_.push_back(&ticket);
  ticket.listed = true;
  if (next_waiters_) ++news_;
  if (ready_fd_ && !ready_fd_set_) {
    raise_event(ready_fd_);
    ready_fd_set_ = true;
  }
}

void Ledger::notify(int news) {
  if (news == 1) any_ready_.notify_one();
  if (news > 1) any_ready_.notify_all();
}

void Ledger::requeue(Command* command) {
  command->running = false;
  --count.running;
  if (command->tickets.empty()) {  // cancelled meanwhile
    std::erase(unwanted, command);
    release(command, Answer(End::cancelled));
    return;
  }
  ++count.requeued;
  enqueue(command, true);
}

void Ledger::finish_queued(const Answer& answer, const Header* header) {
  const Time now = Clock::now();
  for (Command* command = queue_.front(); command;) {
    Command* const next = queue_.after(command);
    if (!header || command->header == header) finish(command, answer, now);
    command = next;
  }
}

void Ledger::enqueue(Command* command, bool front) {
  if (queue_.empty() || front) front_since_ = Clock::now();
  Header& header = *command->header;
  if (header.queue.empty()) {
    header.place = active_.size();
    active_.push_back(&header);
  }
  if (front) {
    queue_.push_front(command);
    header.queue.push_front(command);
  } else {
    queue_.push_back(command);
    header.queue.push_back(command);
  }
}

void Ledger::unqueue(Command* command) {
  if (queue_.front() == command) front_since_ = Clock::now();
  Header& header = *command->header;
  queue_.erase(command);
  header.queue.erase(command);
  if (!header.queue.empty()) return;
  active_[header.place] = active_.back();
  active_[header.place]->place = header.place;
  active_.pop_back();
}

void Ledger::clear_wake() { clear_event(wake_); }

void Ledger::wake() { raise_event(wake_); }

}  // namespace fdfast::replio
