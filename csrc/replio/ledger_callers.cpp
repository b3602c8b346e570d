// The books of a pool, as callers' threads use them; see ledger.hpp.
#include <algorithm>

#include "event.hpp"
#include "ledger.hpp"

namespace fdfast::replio {

Ledger::Booked Ledger::submit(std::vector<std::string>& texts, const std::string& header, double timeout_s,
                              bool unique, TicketId& first, bool chain) {
  size_t bytes = 0;
  for (const auto& text : texts) bytes += text.size();
  const std::lock_guard lock(mutex);
  if (stopping_) return Booked::closed;
  if (!has_room(bytes)) return Booked::full;
  first = next_ticket_;
  if (texts.empty()) return Booked::all;
  const bool was_idle = queue_.empty();
  Header* const under = header_of(header);
  const Time now = Clock::now();
  Command* before = nullptr;
  for (auto& text : texts) {
    Command* const booked = book(text, under, timeout_s, unique || chain, chain && before, now);
    if (chain && before) before->then = booked;
    before = booked;
  }
  if (hungry_ && was_idle && !queue_.empty()) wake();
  any_ready_.notify_all();  // for answers that were kept
  return Booked::all;
}

// Null: the ticket shares a command, or has its answer.
Command* Ledger::book(std::string& text, Header* header, double timeout_s, bool unique, bool follows, Time now) {
  const TicketId id = next_ticket_++;
  Ticket& ticket = tickets_[id];
  ticket.id = id;
  ticket.queued = now;
  ++count.submitted;
  if (!unique) {
    const CommandKey key(header, timeout_s, text);
    if (const auto found = in_flight_.find(key); found != in_flight_.end()) {
      ticket.command = found->second;
      ticket.command->tickets.push_back(id);
      return nullptr;
    }
    if (const Answer* const kept = cache_.find(key)) {
      Answer answer = *kept;
      answer.shared = true;
      answer.queued_s = 0;
      settle(ticket, std::move(answer));
      return nullptr;
    }
  }
  auto* const command = new Command(std::move(text), header, timeout_s, unique);
  command->tickets.push_back(id);
  ticket.command = command;
  command_bytes_ += static_cast<int64_t>(command->text.size());
  ++header->commands;
  if (!unique) in_flight_.emplace(command->key, command);
  command->follows = command->pending = follows;
  if (!follows) enqueue(command, false);
  return command;
}

Header* Ledger::header_of(const std::string& text) {
  constexpr size_t kHeaders = 4096;
  if (headers_.size() > kHeaders) {
    cache_.drop_idle_headers();
    std::erase_if(headers_, [](const auto& entry) { return entry.second->id && !entry.second->commands; });
  }
  auto& header = headers_[text];
  // 0 is for no header; numbers are not used again, since workers know headers by them.
  if (!header) header.reset(new Header{.id = text.empty() ? 0 : ++last_header_, .text = text, .queue = {}});
  return header.get();
}

// Waits to be woken; false at the end of patience.
bool Ledger::rest(std::unique_lock<std::mutex>& lock, std::condition_variable& woken, const Patience& patience) {
  const Time now = Clock::now();
  if (now >= patience.until) return false;
  if (patience.until - now <= patience.slice) {
    woken.wait_until(lock, patience.until);
    return true;
  }
  if (woken.wait_until(lock, now + patience.slice) == std::cv_status::no_timeout || !patience.interrupted) return true;
  lock.unlock();
  const bool interrupted = patience.interrupted();
  lock.lock();
  return !interrupted;
}

bool Ledger::wait_for_room(size_t bytes, const Patience& patience) {
  std::unique_lock lock(mutex);
  ++room_waiters_;
  while (!stopping_ && !has_room(bytes) && rest(lock, room_, patience)) {
  }
  --room_waiters_;
  return stopping_ || has_room(bytes);
}

Ledger::Got Ledger::next(Answer& answer, const Patience& patience) {
  std::unique_lock lock(mutex);
  while (true) {
    if (!ready_.empty()) {
      answer = hand_out(*ready_.front());
      return Got::answer;
    }
    if (tickets_.empty()) return Got::none;
    ++next_waiters_;
    const bool go_on = rest(lock, any_ready_, patience);
    --next_waiters_;
    if (!go_on && ready_.empty()) return Got::out_of_patience;
  }
}

Ledger::Got Ledger::wait(TicketId id, Answer& answer, const Patience& patience) {
  std::unique_lock lock(mutex);
  auto found = tickets_.find(id);
  if (found == tickets_.end()) return Got::none;
  if (found->second.command) {
    Waiter waiter;
    waiter.next = found->second.waiters;
    found->second.waiters = &waiter;
    const bool was_paused = paused();
    ++ticket_waiters_;
    if (was_paused) wake();
    bool go_on = true;
    while (go_on && found != tickets_.end() && found->second.command) {
      go_on = rest(lock, waiter.woken, patience);
      found = tickets_.find(id);  // another thread may have fetched it
    }
    --ticket_waiters_;
    if (found == tickets_.end()) return Got::none;
    leave(found->second, waiter);
    if (found->second.command) return Got::out_of_patience;
  }
  answer = hand_out(found->second);
  return Got::answer;
}

void Ledger::leave(Ticket& ticket, Waiter& waiter) {
  Waiter** place = &ticket.waiters;
  while (*place != &waiter) place = &(*place)->next;
  *place = waiter.next;
}

Answer Ledger::hand_out(Ticket& ticket) {
  const bool was_paused = paused();
  if (ticket.listed) ready_.erase(&ticket);
  Answer answer = std::move(ticket.answer);
  ready_bytes_ -= payload_bytes(answer);
  tickets_.erase(ticket.id);
  if (ready_fd_set_ && ready_.empty()) {
    clear_event(ready_fd_);
    ready_fd_set_ = false;
  }
  if (was_paused && !paused()) wake();
  if (room_waiters_) room_.notify_all();
  if (tickets_.empty() && next_waiters_) any_ready_.notify_all();  // nothing is left to wait for
  return answer;
}

std::vector<Answer> Ledger::ready() {
  const std::lock_guard lock(mutex);
  std::vector<Answer> answers;
  answers.reserve(ready_.size());
  while (!ready_.empty()) answers.push_back(hand_out(*ready_.front()));
  return answers;
}

bool Ledger::was_issued(TicketId ticket) {
  const std::lock_guard lock(mutex);
  return ticket >= 0 && ticket < next_ticket_;
}

int Ledger::cancel(const std::vector<TicketId>& tickets) {
  const std::lock_guard lock(mutex);
  const Time now = Clock::now();
  int cancelled = 0;
  // The last first: when the first of a chain is cancelled, so is what comes after it.
  for (auto id = tickets.rbegin(); id != tickets.rend(); ++id) {
    const auto found = tickets_.find(*id);
    if (found == tickets_.end() || !found->second.command) continue;
    Command* const command = found->second.command;
    std::erase(command->tickets, *id);
    Answer answer(End::cancelled);
    answer.queued_s = seconds_between(found->second.queued, now);
    settle(found->second, answer);
    ++cancelled;
    if (!command->tickets.empty() || command->pending) continue;
    if (command->running) {
      forget(command);
      unwanted.push_back(command);
    } else {
      finish(command, answer, now);
    }
  }
  if (!unwanted.empty()) wake();
  if (cancelled) any_ready_.notify_all();
  return cancelled;
}

int Ledger::ready_fd() {
  const std::lock_guard lock(mutex);
  if (!ready_fd_) {
    ready_fd_ = make_event();
    if (!ready_.empty()) {
      raise_event(ready_fd_);
      ready_fd_set_ = true;
    }
  }
  return ready_fd_.get();
}

Counts Ledger::counts() {
  const std::lock_guard lock(mutex);
  Counts now = count;
  now.queued = static_cast<int64_t>(queue_.size());
  now.unfetched = 0;
  for (const auto& [id, ticket] : tickets_) now.unfetched += !ticket.command;
  now.held_bytes = command_bytes_ + ready_bytes_;
  return now;
}

std::vector<std::pair<const char*, int64_t>> named(const Counts& counts) {
  return {
      {"submitted", counts.submitted},
      {"answered", counts.answered},
      {"shared", counts.shared},
      {"queued", counts.queued},
      {"running", counts.running},
      {"unfetched", counts.unfetched},
      {"held_bytes", counts.held_bytes},
      {"starts", counts.starts},
      {"restarts", counts.restarts},
      {"failed_starts", counts.failed_starts},
      {"recycled", counts.recycled},
      {"requeued", counts.requeued},
      {"headers", counts.headers},
      {"crashed", counts.crashed},
      {"forged", counts.forged},
      {"unsolicited", counts.unsolicited},
      {"killed_timeout", counts.killed_timeout},
      {"killed_memory", counts.killed_memory},
      {"killed_overflow", counts.killed_overflow},
      {"killed_cancelled", counts.killed_cancelled},
      {"workers_alive", counts.workers_alive},
      {"rss_bytes", counts.rss_bytes},
  };
}

std::vector<int> Ledger::pids() {
  const std::lock_guard lock(mutex);
  return worker_pids;
}

void Ledger::request_stop() {
  const std::lock_guard lock(mutex);
  stopping_ = true;
  room_.notify_all();
  wake();
}

}  // namespace fdfast::replio
